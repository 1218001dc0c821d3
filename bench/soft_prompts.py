"""A training step with a soft prompt (forward, backward, AdamW), ours beside peft, and the switch between two prompts.

    python -m bench.soft_prompts --model 135m --bases bf16,fp32,nf4

20 virtual tokens, batch 8 × 64, random weights of the model's size. Over a 4-bit base peft runs on bitsandbytes. Deep
prompts, which peft does not have, stand beside its prefix tuning. Times are medians over steps that alternate in one
process; the peak memory of each comes from a process of its own, loading included, and what transformers imports where
it is installed (torchao: 11 MB).
"""

from __future__ import annotations

import argparse
import gc
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from rich.console import Console
from torch import nn

from . import harness, models, training
from .registry import ready

METHODS = ("prompt", "ptuning", "prefix", "ptuning-v2")
REQUIRES = {"bf16": ("peft",), "fp32": ("peft",), "nf4": ("peft", "bitsandbytes")}  # of peft over each base
BASES = tuple(REQUIRES)


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


def stepper(name: str, folder: str, base: str, method: str, args: argparse.Namespace) -> Callable[[], float]:
    model, tokens = CONTENDERS[name](folder, base, method, args.virtual), training.tokens_of(args.batch, args.length)
    return training.stepper(model, 1e-3, input_ids=tokens, attention_mask=torch.ones_like(tokens), labels=tokens)


def steps(folder: str, base: str, method: str, args: argparse.Namespace) -> tuple[dict, dict[str, str]]:
    """Ours and peft where its packages are, and what ours is of peft; and why who failed is not among them."""
    gc.collect()  # the models of the steps before, which refer to themselves
    names = [n for n in CONTENDERS if n == "ours" or not harness.missing(*REQUIRES[base])]
    options = [f"--bases={base}", f"--methods={method}", f"--virtual={args.virtual}"]
    options += [f"--batch={args.batch}", f"--length={args.length}", f"--threads={args.threads}"]

    def begun(name: str) -> Callable[[], float]:
        step = stepper(name, folder, base, method, args)
        step()
        return partial(harness.seconds, step)

    peaks, absent = ready(
        dict.fromkeys(names, ()), lambda name: training.peak_mb_of_child(__spec__.name, name, folder, *options)
    )
    calls, failed = ready(dict.fromkeys(peaks, ()), begun)
    timings, load = harness.in_turn(calls, args.rounds)
    row = {name: timing.as_dict() | {"peak_mb": peaks[name]} for name, timing in timings.items()}
    row |= training.against("ours", "peft", timings, peaks)
    absent = {f"{name} ({method} over {base})": reason for name, reason in (absent | failed).items()}
    return {"base": base, "method": method, "other_load_cores": round(load.cores, 2)} | row, absent


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
    absent = {f"peft over {base}": reason for base in args.bases if (reason := harness.missing(*REQUIRES[base]))}
    rows = []
    with models.checkpoint(args.model) as folder:
        for base in args.bases:
            for method in args.methods:
                row, failed = steps(folder, base, method, args)
                absent |= failed
                if "ours" in row:
                    rows.append(row)
                    console.print(_line(row))
        switches = [switch(folder, method, args.virtual, 10 * args.rounds) for method in args.methods]
    harness.print_absent(absent, console)
    size = f"{args.batch} × {args.length}, {args.virtual} virtual tokens"
    title = f"Training step, {args.model}, {size}, {args.threads} threads"
    columns = ("base", "method", "s a step", "peak MB", "speed against peft", "memory against peft")
    lines = ((row["base"], row["method"], *training.cells(row["ours"], row)) for row in rows)
    console.print(harness.table(title, columns, lines))
    for row in switches:
        console.print(f"switching between two adapters of {row['method']}: {row['us'] / 1e3:.3f} ms")
    return {
        "model": args.model, "batch": args.batch, "length": args.length, "virtual_tokens": args.virtual,
        "threads": args.threads, "steps": rows, "switches": switches, "absent": absent,
    }  # fmt: skip


def _line(row: dict) -> str:
    ratios = f"{row['speedup']:.2f}× as fast, {row['memory_ratio']:.2f}× the memory" if "peft" in row else "alone"
    return f"{row['method']} over {row['base']}: {row['ours']['us'] / 1e6:.2f} s a step, {ratios}"


def parser() -> argparse.ArgumentParser:
    made = harness.parser(__doc__, "soft_prompts", rounds=7, threads=2)
    made.add_argument("--model", choices=models.NAMES, default="135m")
    made.add_argument("--bases", type=harness.among(BASES), default=",".join(BASES))
    made.add_argument("--methods", type=harness.among(METHODS), default=",".join(METHODS))
    made.add_argument("--batch", type=harness.count, default=8)
    made.add_argument("--length", type=harness.count, default=64)
    made.add_argument("--virtual", type=harness.count, default=20, help="virtual tokens")
    training.add_child_arguments(made, CONTENDERS)
    return made


def main() -> None:
    args = parser().parse_args()
    torch.set_num_threads(args.threads)
    if args.child:
        training.child(stepper(args.child, args.folder, *args.bases, *args.methods, args))
        return
    harness.run(measure, args)


if __name__ == "__main__":
    main()
