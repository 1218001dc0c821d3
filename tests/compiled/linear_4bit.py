"""Compiles the launches of ``linear_4bit`` for one target and prints what came out, as JSON: run by
test_triton_compiled.py, in its own process, which holds it to linear_4bit.json.

    python linear_4bit.py cuda:90        (or hip:gfx942)

The launches are the operator's own: its host code runs on tensors without data, before a GPU of which there is only the
name, and each kernel is compiled and not run.
"""

from __future__ import annotations

import collections
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel

from pyfastpeft.formats import FORMATS
from pyfastpeft.ops.triton_kernels import _kernels

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
kernels = _kernels("linear_4bit")


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def weight(quant_type: str, n: int, k: int, blocksize: int = 64, nested: bool = False) -> kernels.Weight:
    """A packed weight without data."""
    form, blocks = FORMATS[quant_type], -(-n * k // blocksize)
    scale = empty(blocks, dtype=torch.uint8 if nested else torch.float32)
    second = (empty(-(-blocks // 256)), empty(), empty(256)) if nested else (None, None, None)
    zero = empty(blocks) if form.has_zero else None
    codes = empty((n * k + 1) // 2, 1, dtype=torch.uint8)
    return kernels.Weight(codes, scale, zero, *second, tuple(form.table.tolist()), n, k, blocksize)


def branch(rank: int, n: int, k: int, dropout: float = 0.0) -> kernels.Branch:
    seed = empty(1, dtype=torch.int64) if dropout else None
    return kernels.Branch(empty(rank, k), empty(n, rank), None, 2.0, seed, dropout)


def cases() -> dict:
    """Calls of the operator by name."""

    def forward(m: int, w: kernels.Weight, dtype: torch.dtype, lora: kernels.Branch | None = None) -> None:
        kernels.forward(empty(m, w.k, dtype=dtype), w, None, lora)

    def backward(m: int, w: kernels.Weight, dtype: torch.dtype, lora: kernels.Branch) -> None:
        x, s = empty(m, w.k, dtype=dtype), empty(m, lora.rank)
        kernels.backward(empty(m, w.n, dtype=dtype), x, s, w, lora, True, True, True)

    n, k, bf16 = 4096, 4096, torch.bfloat16
    return {
        "one row": lambda: forward(1, weight("nf4", n, k), bf16),
        "one row, lora 16": lambda: forward(1, weight("nf4", n, k), bf16, branch(16, n, k)),
        "16 rows, int4, fp16": lambda: forward(16, weight("int4", n, k, 128), torch.float16, branch(16, n, k)),
        "64 rows": lambda: forward(64, weight("nf4", n, k), bf16, branch(16, n, k)),
        "many rows": lambda: forward(4096, weight("nf4", n, k), bf16),
        "many rows, lora 16, nested": lambda: forward(4096, weight("nf4", n, k, nested=True), bf16, branch(16, n, k)),
        "many rows, lora 64, fp16": lambda: forward(4096, weight("fp4", n, k), torch.float16, branch(64, n, k)),
        "odd rows": lambda: forward(4096, weight("nf4", 255, 333), bf16, branch(16, 255, 333)),
        "16 rows, mixed adapters": lambda: kernels.forward_slots(
            empty(16, k, dtype=bf16),
            weight("nf4", n, k),
            None,
            kernels.Slots(empty(8, 16, k), empty(8, n, 16), empty(8), empty(16, dtype=torch.int64)),
        ),
        "float32": lambda: forward(4096, weight("nf4", n, k), torch.float32, branch(16, n, k)),
        "training": lambda: backward(4096, weight("nf4", n, k, nested=True), bf16, branch(16, n, k, 0.1)),
        "training, fp16, rank 64": lambda: backward(4096, weight("nf4", n, k), torch.float16, branch(64, n, k)),
    }


def launches(target: GPUTarget) -> dict[str, CompiledKernel]:
    """Every launch that the calls make, by name, compiled by Triton's own launcher for ``target``."""
    gpu = SimpleNamespace(
        get_current_target=lambda: target,
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
    )
    triton.runtime.driver.set_active(gpu)
    done: dict[str, CompiledKernel] = {}
    case = ""

    class Compiler:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            return self.compile

        def compile(self, **given):
            which = "+".join(key for key in ("q", "t", "seed", "slot_of") if given.get(key) is not None)
            name = f"{case}: {self.kernel.fn.__name__}" + (f" {which}" if which else "")
            done[name] = self.kernel.run(grid=(1,), warmup=True, **given)

    for name, kernel in vars(kernels).copy().items():
        if isinstance(kernel, triton.JITFunction) and name in ("_forward", "_input_grad", "_project", "_slot_sums"):
            setattr(kernels, name, Compiler(kernel))
    for case, call in cases().items():  # noqa: B007 (named in compile)
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


def main(target: str) -> None:
    backend, chip = target.split(":")
    if backend == "hip":
        torch.version.hip = "stands in"
    gpu = GPUTarget(backend, int(chip) if backend == "cuda" else chip, 32 if backend == "cuda" else 64)
    for name, out in launches(gpu).items():
        facts = sass_facts(out.asm["cubin"]) if backend == "cuda" else amdgcn_facts(out.asm["amdgcn"])
        print(json.dumps({"name": name, "shared": out.metadata.shared} | facts), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
