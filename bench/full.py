"""The report: everything in one go, as ``report.json`` and ``report.html``; what ``pyfastpeft bench`` runs."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from . import decode, harness, qlora_step
from .linear import Result, sweep
from .registry import DTYPES, REGISTRY
from .report import html

SHAPES = [(576, 1536), (2048, 8192), (4096, 4096), (4096, 14336), (14336, 4096), (8192, 8192)]
ROWS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 2048]
QUICK = (
    "ours_nf4,ours_int4,ours_nf4_int8,ours_nf4_packed,torch_dense,torch_int4pack,bnb_nf4_eval,bnb_nf4_train,"
    "peft_bnb_nf4_eval,peft_bnb_nf4_train,torchao_int4,ort_nbits_b32_acc1,ort_nbits_b64_acc4,ov_u4,ov_u4_dq64,ov_nf4,"
    "ggml_q4_0,ggml_q4_K,ggml_iq4_nl,ggml_q4_K_tiled"
)


@dataclass(frozen=True)
class Part:
    """One pass over shapes and threads; ``budget_s`` bounds the rounds of one number of rows."""

    shapes: list[tuple[int, int]]
    rows: list[int]
    ranks: list[int]
    adapters: list[int]
    train: bool
    rounds: int
    budget_s: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--full", action="store_true", help="every shape, rank and model: hours instead of two minutes")
    parser.add_argument("--out", default="pyfastpeft-bench", help="folder for report.json and report.html")
    parser.add_argument("--only", type=harness.among(REGISTRY), help="contenders: names, or patterns with *")
    parser.add_argument("--threads", type=harness.counts, help="default: 1 and 2")
    parser.add_argument(
        "--dtypes", type=harness.among(DTYPES), default="bf16,fp32", help="of the inputs: bf16,fp32,fp16"
    )
    parser.add_argument("--shapes", type=harness.shapes, help="KxN, comma-separated")
    parser.add_argument("--M", type=harness.counts, help="numbers of rows")


def parts(args: argparse.Namespace) -> Iterator[Part]:
    """What is measured, in order."""
    shapes, rows = args.shapes or SHAPES, args.M or ROWS
    if args.full:
        yield Part(shapes, rows, [0], [1], False, 11, 60)
        for rank in (8, 16, 64):
            yield Part(shapes, rows, [0, rank], [1, 4], False, 11, 60)
            yield Part(shapes, rows, [0, rank], [1], True, 7, 60)
    else:
        shapes = args.shapes or [(4096, 4096)]
        yield Part(shapes, args.M or [1, 16, 256], [0, 16], [1], False, 7, 4)
        yield Part(shapes, args.M or [256], [0, 16], [1], True, 5, 3)


@harness.undisturbed()
def run(args: argparse.Namespace, console: Console) -> dict:
    """Measure, write both files after every step, and return where they are and what was not measured."""
    names = args.only or harness.among(REGISTRY)("*" if args.full else QUICK)
    threads = args.threads or [count for count in (1, 2) if count <= (os.cpu_count() or 1)]
    folder = Path(args.out)
    result, more = Result(), {}

    def write() -> dict:
        from pyfastpeft.hub.files import write_text

        payload = result.payload(**more)
        harness.write(str(folder / "report.json"), payload)
        write_text(html(payload), folder / "report.html")
        return payload

    payload = write()  # a folder that cannot be written shows before anything is measured
    for number, part in enumerate(parts(args)):
        # A pass over branches measures what can have one, and what that stands over.
        lora = {name for name in names if REGISTRY[name].lora}
        chosen = lora | {REGISTRY[name].over for name in lora} if args.full and len(part.ranks) > 1 else names
        # What another pass measures is not named as absent from this one.
        chosen = [n for n, c in REGISTRY.items() if n in chosen and not c.unfit(DTYPES, part.ranks, part.train)]
        for found in sweep(
            chosen, part.shapes, part.rows, threads, args.dtypes, part.ranks, part.adapters, part.rounds, part.train,
            console, part.budget_s,
        ):  # fmt: skip
            for entry in (*found.records, *found.limits):
                entry["part"] = number
            result += found
            payload = write()
    if args.full:
        torch.set_num_threads(max(threads))
        common = f"--threads={max(threads)}"
        more["qlora_step"] = qlora_step.measure(qlora_step.parser().parse_args([common, "--rounds=5"]), console)
        payload = write()
        more["decode"] = []
        for model in ("smollm2", "1.1b"):
            options = [common, f"--model={model}", "--rounds=3"]
            more["decode"].append(decode.measure(decode.parser().parse_args(options), console))
            payload = write()
    console.print(f"written: {folder / 'report.json'}, {folder / 'report.html'}", markup=False)
    return {"report": str(folder / "report.html"), "json": str(folder / "report.json"), "absent": payload["absent"]}
