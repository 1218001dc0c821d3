"""What is installed and which kernels serve here: build, CPU features, instruction sets, GPUs, versions.

examples:
  pyfastpeft info
  pyfastpeft info --json
  PYFASTPEFT_CPU_ISA=avx2 pyfastpeft info     # force an instruction set
"""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ..ops.cuda_kernels import why_not

_PACKAGES = ("torch", "transformers", "accelerate", "safetensors", "numpy", "triton", "gguf", "peft", "bitsandbytes")
_ANY_GPU = (99, 0)  # a compute capability that is not what is missing


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``info`` takes no arguments of its own."""


def version_of(package: str) -> str | None:
    """The version that is installed, if any."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cuda_kernels(gpus: Sequence[int]) -> dict[str, str]:
    """Whether they serve each GPU; without one, what else is missing."""
    if not gpus:
        return {"not used": torch.ops.pyfastpeft.cuda_missing.default(*_ANY_GPU) or "no GPU is here"}
    return {f"cuda:{i}": why_not(torch.device("cuda", i)) or "served" for i in gpus}


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Print the table and return it as a dictionary."""
    try:
        from .. import _native

        build, features = _native.build_info(), _native.cpu_features()
    except ImportError:
        build, features = {"without": "_native (pybind11 was not there)"}, []
    gpus = range(torch.cuda.device_count())
    result = {
        "version": version_of("pyfastpeft"),
        "build": build,
        "isa": torch.ops.pyfastpeft.isa(),
        "available_isas": torch.ops.pyfastpeft.available_isas(),
        "cpu_features": features,
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in gpus],
        "cuda_kernels": _cuda_kernels(gpus),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version for name in _PACKAGES if (version := version_of(name))},
    }
    table = Table("", "", show_header=False)
    for key, value in result.items():
        if isinstance(value, dict):
            value = "\n".join(f"{k}: {v}" for k, v in value.items())
        elif isinstance(value, list):
            value = " ".join(map(str, value)) or "none"
        table.add_row(key.replace("_", " "), str(value))
    console.print(table)
    return result
