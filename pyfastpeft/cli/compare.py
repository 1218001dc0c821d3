"""Train an adapter by each method on one JSONL file, ask each the rows of another, and say which fits.

A method trains as ``train`` does, with its defaults, in a process of its own; its adapter stays in a folder of its
name. One that fails is reported, and the others go on.

examples:
  pyfastpeft compare --model smollm2 --data train.jsonl --test test.jsonl --output methods
  pyfastpeft compare --model ./llama --data train.jsonl --test test.jsonl --output methods --methods qlora prefix prompt
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from . import train
from .methods import METHODS
from .output import check_place


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``compare``."""
    train.add_run_arguments(parser)
    parser.add_argument("--test", required=True, help=f"JSONL file with rows to answer afterwards; {train.MEASURES}")
    parser.add_argument("--output", required=True, help="folder for a folder a method")
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=tuple(METHODS),
        default=tuple(METHODS),
        metavar="METHOD",
        help=f"default: all ({', '.join(METHODS)})",
    )


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Train every method, then one table, the best first."""
    from ..conversations import read_rows

    check_place(Path(args.output))
    for path in (args.data, args.test):  # a fault in one would show in every process
        read_rows(path)
    rows = [_row(args, name, console) for name in dict.fromkeys(args.methods)]
    rows.sort(key=_order)
    best = rows[0]
    if "error" in best:
        raise ValueError(f"no method could be trained; {best['method']}: {best['error']}")
    console.print(_table(rows))
    console.print(f"fits best: {best['method']}; adapter in {escape(best['output'])}")
    return {"best": best["method"], "methods": rows}


def _row(args: argparse.Namespace, method: str, console: Console) -> dict[str, Any]:
    console.print(f"[bold]{method}[/bold]: {METHODS[method].about}")
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    output = Path(args.output) / method
    required = {"--model": args.model, "--data": args.data, "--output": str(output), "--method": method}
    asked = parser.parse_args([word for option in required.items() for word in option])
    vars(asked).update((name, value) for name, value in vars(args).items() if name in asked and name != "output")
    try:
        # Peak memory is a process's.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            result = process.submit(_train, asked, console.stderr).result()
    except Exception as error:
        message = " ".join(str(error).split()) or type(error).__name__
        console.print(f"{method} failed: {escape(message)}")
        return {"method": method, "error": message}
    return {"method": method, **result, "adapter_bytes": sum(f.stat().st_size for f in output.glob("*.safetensors"))}


def _train(args: argparse.Namespace, stderr: bool) -> dict[str, Any]:
    return train.run(args, Console(stderr=stderr, highlight=False))


def _order(row: dict[str, Any]) -> tuple[float, float]:
    """The most exact answers, then the lowest loss on the rows of the test; what failed last."""
    if "error" in row:
        return 1.0, 0.0
    return -row["exact"], math.inf if row["test_loss"] is None else row["test_loss"]


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table("method", "exact", "in form", "test loss", "s/step", "peak MiB", "adapter MiB")
    for row in rows:
        if "error" in row:
            table.add_row(row["method"], "failed")
            continue
        table.add_row(
            row["method"],
            f"{row['exact']:.0%}",
            f"{row['format_validity']:.0%}",
            "nan" if row["test_loss"] is None else f"{row['test_loss']:.3f}",
            f"{row['seconds_per_step']:.2f}",
            f"{row['peak_memory_bytes'] / 2**20:.0f}",
            f"{row['adapter_bytes'] / 2**20:.2f}",
        )
    return table
