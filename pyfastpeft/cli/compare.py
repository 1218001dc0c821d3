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
import os
import signal
import threading
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from . import train
from .methods import METHODS
from .models import FORMAT
from .output import check_place, opened_console

if TYPE_CHECKING:  # transformers takes seconds to import
    from ..conversations import Rows


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
    check_place(Path(args.output))
    read = train.rows_of(args)  # once: a pipe has nothing for the second process, and a fault would show in each
    rows = [_row(args, name, read, console) for name in dict.fromkeys(args.methods)]
    rows.sort(key=_order)
    best = rows[0]
    if "error" in best:
        raise ValueError(f"no method could be trained; {best['method']}: {best['error']}")
    console.print(_table(rows))
    console.print(f"fits best: {best['method']}; adapter in {escape(best['output'])}")
    return {"best": best["method"], "methods": rows}


def _row(args: argparse.Namespace, method: str, read: tuple[Rows, Rows], console: Console) -> dict[str, Any]:
    console.print(f"[bold]{method}[/bold]: {METHODS[method].about}")
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    output = Path(args.output) / method
    required = {"--model": args.model, "--data": args.data, "--output": str(output), "--method": method}
    asked = parser.parse_args([word for option in required.items() for word in option])
    vars(asked).update((name, value) for name, value in vars(args).items() if name in asked and name != "output")
    if METHODS[method].quantized is False:  # the format is that of the other methods
        vars(asked).update(dict.fromkeys(FORMAT))
    result = _in_a_process(asked, read, console)
    if "error" in result:
        console.print(f"{method} failed: {escape(result['error'])}")
        return {"method": method, **result}
    return {"method": method, **result, "adapter_bytes": sum(f.stat().st_size for f in output.glob("*.safetensors"))}


def _in_a_process(args: argparse.Namespace, read: tuple[Rows, Rows], console: Console) -> dict[str, Any]:
    """The result of ``train``, or what its ``error`` was; in a process of its own, as peak memory is a process's."""
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    process = spawn.Process(target=_train, args=(args, console.stderr, there), daemon=True)
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as the process inherits it: Ctrl-C is for this one alone
    try:
        process.start()
    finally:
        signal.signal(signal.SIGINT, handler)
    there.close()
    result = None
    try:
        with suppress(EOFError, ConnectionError):  # it ended without a word
            here.send(read)
            result = here.recv()
        process.join()
    finally:
        process.kill()
        process.join()
        console.show_cursor()  # which a progress bar hides until it is stopped
    return result or {"error": f"its process {_end(process.exitcode)}"}


def _end(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    memory = ", often for want of memory" if -code == signal.SIGKILL else ""
    return f"was ended by signal {-code} ({signal.strsignal(-code)}){memory}"


def _train(args: argparse.Namespace, stderr: bool, parent: Connection) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with opened_console("compare", stderr) as console:
        try:
            result = train.run(args, console, parent.recv())
        except Exception as error:
            result = {"error": " ".join(str(error).split()) or type(error).__name__}
    parent.send(result)


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


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
