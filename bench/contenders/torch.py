"""PyTorch: the dense product, and its int4 product for CPUs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..registry import Layer, Problem, Unavailable, contender

BLOCK = 64


@contender("torch_dense", "torch", lora=True, trains=True)
def _dense(p: Problem) -> Layer:
    if p.adapters > 1:
        raise Unavailable("no batch that mixes adapters")
    w = p.weight.dense.to(p.dtype, copy=True)
    a, b = (t.to(p.dtype, copy=True).requires_grad_(p.train) for t in (p.a, p.b))

    def adapted(x: Tensor) -> Tensor:
        return F.linear(x, w) + F.linear(F.linear(x, a), b) * p.scaling

    if p.rank == 0:
        return Layer(lambda x: F.linear(x, w), w.nbytes, w.double)
    return Layer(adapted, w.nbytes, lambda: p.adapted(w.double()), (a, b))


@contender("torch_int4pack", "torch", dtypes=("bf16",))
def _int4pack(p: Problem) -> Layer:
    codes, scale = p.weight.int4(BLOCK)
    scale_zero = torch.stack([scale, torch.zeros_like(scale)], -1).transpose(0, 1).contiguous().to(p.dtype)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    return Layer(
        lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, BLOCK, scale_zero),
        packed.nbytes + scale_zero.nbytes,
        lambda: p.weight.int4_dequantized(BLOCK),
    )
