"""One QLoRA step of SmolLM2-135M on the CPU (forward, backward, AdamW): ours beside peft over bitsandbytes NF4.

    python -m bench.qlora_step --threads 2

Batch 4 × 256, r = 16 on all linear layers, bf16, random weights of the model's size. Times are medians over steps that
alternate in one process; the peak memory of each comes from a process of its own, loading included.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table

from . import harness, models

CONTENDERS: dict[str, Callable[[str], torch.nn.Module]] = {
    "ours": models.adapted_ours,
    "peft_bnb_nf4": models.adapted_peft,
}


def stepper(name: str, folder: str, batch: int, length: int) -> Callable[[], float]:
    """A function that trains one step and returns its loss."""
    model = CONTENDERS[name](folder).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    tokens = torch.randint(0, 500, (batch, length), generator=torch.Generator().manual_seed(0))

    def step() -> float:
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss)

    return step


def peak_mb(name: str, args: argparse.Namespace, folder: str) -> float:
    """Peak resident memory of two steps in a fresh process."""
    command = [sys.executable, "-m", __spec__.name, "--child", name, "--folder", folder]
    command += [f"--batch={args.batch}", f"--length={args.length}", f"--threads={args.threads}"]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(out.splitlines()[-1])["peak_mb"]


def child(args: argparse.Namespace) -> None:
    step = stepper(args.child, args.folder, args.batch, args.length)
    for _ in range(2):
        step()
    print(json.dumps({"peak_mb": harness.peak_mb()}))


def measure(args: argparse.Namespace, console: Console) -> dict:
    names = [n for n in CONTENDERS if harness.matches(n, args.only)]
    missing = [p for p in ("peft", "bitsandbytes") if not harness.installed(p)]
    if missing:
        console.print(f"[yellow]peft_bnb_nf4: not measured ({', '.join(missing)} absent)")
        names.remove("peft_bnb_nf4")
    with models.checkpoint(args.model) as folder:
        peaks = {name: peak_mb(name, args, folder) for name in names}
        steps = {name: stepper(name, folder, args.batch, args.length) for name in names}
        losses = {name: [step(), step()] for name, step in steps.items()}
        timings = {name: harness.Timing() for name in names}
        with harness.Load() as load:
            for _ in range(args.rounds):
                for name, step in steps.items():
                    start = time.perf_counter()
                    step()
                    timings[name].samples.append(time.perf_counter() - start)
    rows = {}
    for name in names:
        rows[name] = timings[name].as_dict() | {"peak_mb": peaks[name], "first_losses": losses[name]}
        if "peft_bnb_nf4" in timings:
            rows[name]["speedup"] = round(timings["peft_bnb_nf4"].ratio(timings[name]), 3)
            rows[name]["memory_ratio"] = round(peaks[name] / peaks["peft_bnb_nf4"], 3)
    return {
        "model": args.model, "batch": args.batch, "length": args.length, "rank": models.LORA["r"],
        "threads": args.threads, "other_load_cores": round(load.cores, 2), "contenders": rows,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=models.SIZES, default="135m")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", type=harness.split, default="*")
    parser.add_argument("--out", default="qlora_step", help="name in bench/results, or a path ending in .json")
    parser.add_argument("--child", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.child:
        child(args)
        return
    console = Console()
    result = measure(args, console)
    table = Table(title=f"QLoRA step, {args.batch} × {args.length}, {args.threads} threads")
    for column in ("contender", "s a step", "peak MB", "speed against peft", "memory against peft"):
        table.add_column(column)
    for name, row in result["contenders"].items():
        cells = (f"{row['us'] / 1e6:.2f} ±{100 * row['spread']:.0f}%", f"{row['peak_mb']:.0f}")
        table.add_row(
            name, *cells, f"{row.get('speedup', float('nan')):.2f}×", f"{row.get('memory_ratio', float('nan')):.2f}"
        )
    console.print(table)
    path = harness.write(args.out, {"machine": harness.machine(), "result": result})
    console.print(f"written: {path}")


if __name__ == "__main__":
    main()
