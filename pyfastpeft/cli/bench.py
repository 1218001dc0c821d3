"""Speed of the 4-bit linear layer here, beside every peer that is installed: two minutes, a table and an HTML report.

examples:
  pyfastpeft bench                                  # pyfastpeft-bench/report.html and report.json
  pyfastpeft bench --only 'ours_nf4*,torch_dense' --threads 1
  pyfastpeft bench --full                           # all shapes, ranks and models: hours
"""

from __future__ import annotations

import argparse
from typing import Any

from rich.console import Console

try:
    from pyfastpeft.bench import full
except ImportError:  # a source tree on the path, not installed: the folder lies beside the package
    from bench import full


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the report."""
    full.add_arguments(parser)


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Measure, and return where the report is and what was not measured."""
    return full.run(args, console)
