"""A training step with a soft prompt (forward, backward, AdamW), ours beside peft, and the switch between two prompts.

    python -m bench.soft_prompts --model 135m --bases bf16,fp32,nf4

20 virtual tokens, batch 8 × 64, random weights of the model's size. Over a 4-bit base peft runs on bitsandbytes. Deep
prompts, which peft does not have, stand beside its prefix tuning. Times are medians over steps that alternate in one
process; the peak memory of each comes from a process of its own, loading included.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from . import harness, models

METHODS = ("prompt", "ptuning", "prefix", "ptuning-v2")
BASES = ("bf16", "fp32", "nf4")


def _config(library: Any, method: str, virtual: int, hidden: int) -> Any:
    shared = {"task_type": "CAUSAL_LM", "num_virtual_tokens": virtual}
    if method == "prompt":
        return library.PromptTuningConfig(**shared)
    if method == "ptuning":
        return library.PromptEncoderConfig(**shared, encoder_hidden_size=hidden)
    if method == "ptuning-v2" and hasattr(library, "DeepPromptConfig"):
        return library.DeepPromptConfig(**shared)
    return library.PrefixTuningConfig(**shared)


def ours(folder: str, base: str, method: str, virtual: int) -> nn.Module:
    import pyfastpeft as fp

    model = models.load_ours(folder) if base == "nf4" else models.load_dense(folder, base)
    return fp.get_peft_model(model, _config(fp, method, virtual, model.config.hidden_size))


def peft(folder: str, base: str, method: str, virtual: int) -> nn.Module:
    import peft as library

    model = models.load_bnb(folder) if base == "nf4" else models.load_dense(folder, base)
    return library.get_peft_model(model, _config(library, method, virtual, model.config.hidden_size))


CONTENDERS = {"ours": ours, "peft": peft}


def stepper(model: nn.Module, batch: int, length: int) -> Callable[[], float]:
    """A function that trains one step and returns its loss."""
    optimizer = torch.optim.AdamW([p for p in model.train().parameters() if p.requires_grad], lr=1e-3)
    tokens = torch.randint(0, 500, (batch, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)

    def step() -> float:
        loss = model(input_ids=tokens, attention_mask=mask, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss)

    return step


def peak_mb(name: str, folder: str, base: str, method: str, args: argparse.Namespace) -> float:
    """Peak resident memory of two steps in a fresh process."""
    command = [sys.executable, "-m", __spec__.name, "--child", name, "--folder", folder, f"--bases={base}"]
    command += [f"--methods={method}", f"--batch={args.batch}", f"--length={args.length}"]
    command += [f"--virtual={args.virtual}", f"--threads={args.threads}"]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(out.splitlines()[-1])["peak_mb"]


def child(args: argparse.Namespace) -> None:
    model = CONTENDERS[args.child](args.folder, *args.bases, *args.methods, args.virtual)
    step = stepper(model, args.batch, args.length)
    for _ in range(2):
        step()
    print(json.dumps({"peak_mb": harness.peak_mb()}))


def steps(folder: str, base: str, method: str, args: argparse.Namespace) -> dict:
    """Ours and peft, and what ours is of peft."""
    names = [n for n in CONTENDERS if n == "ours" or _has_peft(base)]
    peaks = {name: peak_mb(name, folder, base, method, args) for name in names}
    calls = {}
    for name in names:
        calls[name] = stepper(CONTENDERS[name](folder, base, method, args.virtual), args.batch, args.length)
        calls[name]()
    timings = {name: harness.Timing() for name in names}
    with harness.Load() as load:
        for _ in range(args.rounds):
            for name, step in calls.items():
                start = time.perf_counter()
                step()
                timings[name].samples.append(time.perf_counter() - start)
    row = {name: timings[name].as_dict() | {"peak_mb": peaks[name]} for name in names}
    if "peft" in names:
        row["speedup"] = round(timings["peft"].ratio(timings["ours"]), 3)
        row["memory_ratio"] = round(peaks["ours"] / peaks["peft"], 3)
    return {"base": base, "method": method, "other_load_cores": round(load.cores, 2)} | row


def _has_peft(base: str) -> bool:
    return harness.installed("peft") and (base != "nf4" or harness.installed("bitsandbytes"))


def switch(folder: str, method: str, virtual: int, rounds: int) -> dict:
    """``set_adapter`` between two prompts for inference, after each has answered once."""
    model = ours(folder, "bf16", method, virtual)
    model.add_adapter("other", model.peft_config["default"])
    names = itertools.cycle(["default", "other"])
    model.eval()
    tokens = torch.ones((1, 4), dtype=torch.long)
    with torch.no_grad():
        for _ in range(2):
            model.set_adapter(next(names), inference_mode=True)
            model(input_ids=tokens)
    timing = harness.interleave({"switch": lambda: model.set_adapter(next(names))}, rounds, sample_s=0.0)["switch"]
    return {"method": method} | timing.as_dict()


def measure(args: argparse.Namespace, console: Console) -> dict:
    for base in args.bases:
        if not _has_peft(base):
            console.print(f"[yellow]peft over {base}: not measured (peft or bitsandbytes absent)")
    rows = []
    with models.checkpoint(args.model) as folder:
        for base in args.bases:
            for method in args.methods:
                rows.append(steps(folder, base, method, args))
                console.print(_line(rows[-1]))
        switches = [switch(folder, method, args.virtual, 10 * args.rounds) for method in args.methods]
    return {
        "model": args.model, "batch": args.batch, "length": args.length, "virtual_tokens": args.virtual,
        "threads": args.threads, "steps": rows, "switches": switches,
    }  # fmt: skip


def _line(row: dict) -> str:
    ratios = f"{row['speedup']:.2f}× as fast, {row['memory_ratio']:.2f}× the memory" if "peft" in row else "alone"
    return f"{row['method']} over {row['base']}: {row['ours']['us'] / 1e6:.2f} s a step, {ratios}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=models.NAMES, default="135m")
    parser.add_argument("--bases", type=harness.split, default=",".join(BASES))
    parser.add_argument("--methods", type=harness.split, default=",".join(METHODS))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--virtual", type=int, default=20, help="virtual tokens")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", default="soft_prompts", help="name in bench/results, or a path ending in .json")
    parser.add_argument("--child", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    for name, given, known in (("--bases", args.bases, BASES), ("--methods", args.methods, METHODS)):
        if unknown := set(given) - set(known):
            parser.error(f"{name} has {', '.join(sorted(unknown))}; it must be among {', '.join(known)}")
    torch.set_num_threads(args.threads)
    if args.child:
        child(args)
        return
    console = Console()
    result = measure(args, console)
    size = f"{args.batch} × {args.length}, {args.virtual} virtual tokens"
    table = Table(title=f"Training step, {args.model}, {size}, {args.threads} threads")
    for column in ("base", "method", "s a step", "peak MB", "speed against peft", "memory against peft"):
        table.add_column(column)
    nan = float("nan")
    for row in result["steps"]:
        mine = row["ours"]
        cells = (f"{mine['us'] / 1e6:.2f} ±{100 * mine['spread']:.0f}%", f"{mine['peak_mb']:.0f}")
        ratios = (f"{row.get('speedup', nan):.2f}×", f"{row.get('memory_ratio', nan):.2f}×")
        table.add_row(row["base"], row["method"], *cells, *ratios)
    console.print(table)
    for row in result["switches"]:
        console.print(f"switching between two adapters of {row['method']}: {row['us'] / 1e3:.3f} ms")
    path = harness.write(args.out, {"machine": harness.machine(), "result": result})
    console.print(f"written: {path}")


if __name__ == "__main__":
    main()
