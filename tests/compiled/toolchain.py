"""Compiles the launches of an operator's Triton kernels for one target and says what came out: what the files beside
this one share.

The launches are the operator's own: its host code runs on tensors without data, before a GPU of which there is only the
name, and each kernel is compiled and not run. Such a file is run by test_triton_compiled.py in its own process, which
holds what it prints to the table of that name in budgets.json:

    python linear_4bit.py cuda:90        (or hip:gfx942)
"""

from __future__ import annotations

import collections
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor without data."""
    return torch.empty(shape, dtype=dtype, device="meta")


def launches(
    target: GPUTarget, cases: dict[str, Callable], told_apart_by: tuple[str, ...]
) -> dict[str, CompiledKernel]:
    """Every launch that the calls in ``cases`` make, compiled by Triton's own launcher for ``target``.

    Its name is the case's, the kernel's and which of the optional arguments ``told_apart_by`` were given.
    """
    gpu = SimpleNamespace(
        get_current_target=lambda: target,
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
    )
    triton.runtime.driver.set_active(gpu)
    done: dict[str, CompiledKernel] = {}
    case = ""

    def launcher(kernel: triton.JITFunction, grid: tuple) -> Callable:
        def compiled(**given) -> None:
            which = "+".join(key for key in told_apart_by if given.get(key) is not None)
            name = f"{case}: {kernel.fn.__name__}" + (f" {which}" if which else "")
            done[name] = kernel.run(grid=(1,), warmup=True, **given)

        return compiled

    triton.JITFunction.__getitem__ = launcher
    for case, call in cases.items():  # noqa: B007 (named in compiled)
        call()
    return done


def run(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def sass_facts(cubin: bytes) -> dict:
    """Registers and stack of a cubin, and how often each instruction stands in it."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = run(TOOLS / "cuobjdump", "-res-usage", file.name)
        sass = run(TOOLS / "nvdisasm", "-c", file.name)
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    found = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", sass, re.MULTILINE)
    return {"registers": int(registers), "stack": int(stack), "instructions": collections.Counter(found)}


def amdgcn_facts(text: str) -> dict:
    def count(what: str) -> int:
        return int(re.search(rf"\.{what}:\s+(\d+)", text).group(1))

    found = re.findall(r"^\t([a-z][a-z0-9_]+)", text, re.MULTILINE)
    return {
        "registers": count("vgpr_count"),
        "stack": count("vgpr_spill_count"),
        "instructions": collections.Counter(found),
    }


def main(cases: dict[str, Callable], told_apart_by: tuple[str, ...] = ()) -> None:
    """Prints the facts of every launch (see ``launches``) for the target on the command line, a line of JSON each."""
    backend, chip = sys.argv[1].split(":")
    if backend == "hip":
        torch.version.hip = "stands in"
    else:
        torch.cuda.get_device_capability = lambda device=None: divmod(int(chip), 10)
    torch.cuda.is_available = lambda: True
    target = GPUTarget(backend, int(chip) if backend == "cuda" else chip, 32 if backend == "cuda" else 64)
    for name, out in launches(target, cases, told_apart_by).items():
        facts = sass_facts(out.asm["cubin"]) if backend == "cuda" else amdgcn_facts(out.asm["amdgcn"])
        print(json.dumps({"name": name, "shared": out.metadata.shared} | facts), flush=True)
