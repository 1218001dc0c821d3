"""Compiles the launches of operators' Triton kernels for one target and says what came out.

The launches are the operators' own: their host code runs on tensors without data, before a GPU of which there is only
the name, and each kernel is compiled and not run. The files beside this one have the calls, an operator a file.
test_triton_compiled.py runs this in a process of its own, and holds what it prints to the operators' tables in
budgets.json:

    python toolchain.py cuda:90 linear_4bit quantize_4bit        (or hip:gfx942)
"""

from __future__ import annotations

import bisect
import collections
import importlib
import itertools
import json
import re
import struct
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


def machine_code(cubin: bytes) -> bytes:
    """What the executable sections of this ELF file hold."""
    (start,), (count,) = struct.unpack_from("<Q", cubin, 40), struct.unpack_from("<H", cubin, 60)
    sections = [struct.unpack_from("<8xQ8xQQ", cubin, start + 64 * i) for i in range(count)]  # flags, offset, size
    return b"".join(cubin[offset : offset + size] for flags, offset, size in sections if flags & 4)


def sass_facts(cubins: list[bytes], chip: int) -> list[dict]:
    """Registers and stack of each cubin, and how often each instruction stands in it.

    All are disassembled at once: nvdisasm takes longer to start than for the code of dozens of kernels.
    """
    facts = []
    with tempfile.NamedTemporaryFile() as file:
        for cubin in cubins:
            Path(file.name).write_bytes(cubin)
            usage = run(TOOLS / "cuobjdump", "-res-usage", file.name)
            registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
            facts.append({"registers": int(registers), "stack": int(stack), "instructions": collections.Counter()})
        codes = [machine_code(cubin) for cubin in cubins]
        Path(file.name).write_bytes(b"".join(codes))
        sass = run(TOOLS / "nvdisasm", "-ndf", "--binary", f"SM{chip}{'a' if chip >= 90 else ''}", file.name)
    ends = list(itertools.accumulate(len(code) for code in codes))
    found = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", sass, re.MULTILINE)
    for place, instruction in found:
        facts[bisect.bisect(ends, int(place, 16))]["instructions"][instruction] += 1
    return facts


def amdgcn_facts(text: str) -> dict:
    def count(what: str) -> int:
        return int(re.search(rf"\.{what}:\s+(\d+)", text).group(1))

    found = re.findall(r"^\t([a-z][a-z0-9_]+)", text, re.MULTILINE)
    return {
        "registers": count("vgpr_count"),
        "stack": count("vgpr_spill_count"),
        "instructions": collections.Counter(found),
    }


def main() -> None:
    """Prints the facts of every launch (see ``launches``) of the operators for the target, which the command line
    names, a line of JSON each."""
    backend, chip = sys.argv[1].split(":")
    if backend == "hip":
        torch.version.hip = "stands in"
    else:
        torch.cuda.get_device_capability = lambda device=None: divmod(int(chip), 10)
    torch.cuda.is_available = lambda: True
    target = GPUTarget(backend, int(chip) if backend == "cuda" else chip, 32 if backend == "cuda" else 64)
    named, compiled = [], []
    for operator in sys.argv[2:]:
        module = importlib.import_module(operator)
        found = launches(target, module.cases(), getattr(module, "TOLD_APART_BY", ()))
        named += [{"operator": operator, "name": name} for name in found]
        compiled += found.values()
    if backend == "cuda":
        facts = sass_facts([out.asm["cubin"] for out in compiled], int(chip))
    else:
        facts = [amdgcn_facts(out.asm["amdgcn"]) for out in compiled]
    for names, out, known in zip(named, compiled, facts, strict=True):
        print(json.dumps(names | {"shared": out.metadata.shared} | known))


if __name__ == "__main__":
    main()
