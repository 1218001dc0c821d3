"""The launches of ``linear_4bit``, compiled: see toolchain.py."""

from __future__ import annotations

from collections.abc import Callable

import torch
from toolchain import empty

from pyfastpeft.formats import FORMATS
from pyfastpeft.ops.triton_kernels import _kernels, _tables

kernels = _kernels("linear_4bit")
TOLD_APART_BY = ("q", "t", "seed", "slot_of", "order")


def weight(quant_type: str, n: int, k: int, blocksize: int = 64, nested: bool = False) -> kernels.Weight:
    """A packed weight without data."""
    form, blocks = FORMATS[quant_type], -(-n * k // blocksize)
    scale = empty(blocks, dtype=torch.uint8 if nested else torch.float32)
    second = (empty(-(-blocks // 256)), empty(), empty(256)) if nested else (None, None, None)
    zero = empty(blocks) if form.has_zero else None
    codes = empty((n * k + 1) // 2, 1, dtype=torch.uint8)
    return kernels.Weight(codes, scale, zero, *second, *_tables(quant_type), n, k, blocksize)


def branch(rank: int, n: int, k: int, dropout: float = 0.0) -> kernels.Branch:
    seed = empty(1, dtype=torch.int64) if dropout else None
    return kernels.Branch(empty(rank, k), empty(n, rank), None, 2.0, seed, dropout)


def cases() -> dict[str, Callable]:
    """Calls of the operator by name."""

    def forward(m: int, w: kernels.Weight, dtype: torch.dtype, lora: kernels.Branch | None = None) -> None:
        kernels.forward(empty(m, w.k, dtype=dtype), w, None, lora)

    def backward(m: int, w: kernels.Weight, dtype: torch.dtype, lora: kernels.Branch) -> None:
        x, s = empty(m, w.k, dtype=dtype), empty(m, lora.rank)
        kernels.backward(empty(m, w.n, dtype=dtype), x, s, w, lora, True, True, True)

    def mixed(m: int) -> None:
        slots = kernels.Slots(empty(8, 16, k), empty(8, n, 16), empty(8), empty(m, dtype=torch.int64))
        kernels.forward_slots(empty(m, k, dtype=bf16), weight("nf4", n, k), None, slots)

    n, k, bf16 = 4096, 4096, torch.bfloat16
    return {
        "one row": lambda: forward(1, weight("nf4", n, k), bf16),
        "one row, lora 16": lambda: forward(1, weight("nf4", n, k), bf16, branch(16, n, k)),
        "16 rows, int4, fp16": lambda: forward(16, weight("int4", n, k, 128), torch.float16, branch(16, n, k)),
        "32 rows, nested": lambda: forward(32, weight("nf4", n, k, nested=True), bf16),
        "64 rows": lambda: forward(64, weight("nf4", n, k), bf16, branch(16, n, k)),
        "many rows": lambda: forward(4096, weight("nf4", n, k), bf16),
        "many rows, lora 16, nested": lambda: forward(4096, weight("nf4", n, k, nested=True), bf16, branch(16, n, k)),
        "many rows, lora 64, fp16": lambda: forward(4096, weight("fp4", n, k), torch.float16, branch(64, n, k)),
        "odd rows": lambda: forward(4096, weight("nf4", 255, 333), bf16, branch(16, 255, 333)),
        "16 rows, mixed adapters": lambda: mixed(16),
        "many rows, mixed adapters": lambda: mixed(4096),
        "float32": lambda: forward(4096, weight("nf4", n, k), torch.float32, branch(16, n, k)),
        "training": lambda: backward(4096, weight("nf4", n, k, nested=True), bf16, branch(16, n, k, 0.1)),
        "training, fp16, rank 64": lambda: backward(4096, weight("nf4", n, k), torch.float16, branch(64, n, k)),
    }
