"""The command ``pyfastpeft``. Exit codes: 0 success, 1 failure (one line on stderr says which), 2 wrong usage.

A warning of this library is one line on stderr; other libraries' are not shown.

With PYFASTPEFT_TRACEBACK=1 in the environment a failure's traceback stands before that line.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from collections.abc import Sequence

from rich.console import Console
from safetensors import SafetensorError

from . import bench, compare, demo, generate, info, quantize, train
from .output import opened_console

_COMMANDS = (info, quantize, train, generate, compare, demo, bench)
_EXPECTED = (ValueError, OSError, ImportError, MemoryError, SafetensorError, RuntimeError)
"""Errors whose message says what is wrong. What torch has no memory for on a CPU is a RuntimeError."""
_TRACEBACK = "PYFASTPEFT_TRACEBACK"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pyfastpeft", description="Fine-tune and serve language models with fused 4-bit LoRA kernels."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {info.version_of('pyfastpeft')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for module in _COMMANDS:
        name = module.__name__.rsplit(".", 1)[-1]
        summary, _, examples = (module.__doc__ or "").partition("\n\n")
        sub = commands.add_parser(
            name,
            help=summary,
            description=summary,
            epilog=examples,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(sub)
        sub.add_argument("--json", action="store_true", help="print the result as JSON on stdout, all else on stderr")
        sub.set_defaults(run=module.run, error=sub.error)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; usage errors exit with 2, as argparse does.

    For a process of its own: the seeds, transformers' verbosity and the error handlers of stdout and stderr stay as the
    command sets them.
    """
    args = _parser().parse_args(argv)
    with opened_console(args.command, stderr=args.json) as console:
        return _run(args, console)


def _run(args: argparse.Namespace, console: Console) -> int:
    try:
        result = args.run(args, console)
        if args.json:
            print(json.dumps(result, indent=2))
        print(end="", flush=True)  # sys.stdout is None where it was closed from the start
    except BrokenPipeError:  # whoever reads has enough, as in `| head`; nor is there anybody for what Python flushes
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        said, _, _ = str(error).partition("\nException raised from ")  # below it, torch's own frames
        message = " ".join(said.split())
        if not isinstance(error, _EXPECTED):
            message = f"{type(error).__name__}: {message} ({_TRACEBACK}=1 shows where)"
        if os.environ.get(_TRACEBACK):
            traceback.print_exc()
        print(f"pyfastpeft {args.command}: error: {message or 'out of memory'}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"pyfastpeft {args.command}: interrupted", file=sys.stderr)
        return 1
    return 0
