"""pyfastpeft: each format, the branch in its forms, the int8-activation tier, the module."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

import pyfastpeft as fp

from ..registry import Layer, Problem, Unavailable, contender


def _packed(p: Problem, quant_type: str, double_quant: bool = False) -> fp.Packed4bit:
    key = ("ours", quant_type, double_quant)
    packed = p.weight.once(key, lambda: fp.quantize_4bit(p.weight.dense, quant_type, 64, double_quant))
    return p.weight.once((*key, p.copy), packed.clone)


def _bank(p: Problem) -> fp.ops.BankView:
    """Copies of the adapter in slots; :func:`_routed` says which row takes which."""
    a, b = (t.expand(p.adapters, -1, -1).contiguous() for t in (p.a, p.b))
    return fp.ops.BankView(a, b, torch.full((p.adapters,), p.scaling), torch.empty(0, dtype=torch.int64))


@functools.cache
def _routed(rows: int, adapters: int) -> Tensor:
    return torch.arange(rows) % adapters


@functools.cache
def _row_scale(rows: int, adapters: int, rank: int, scaling: float) -> Tensor:
    """[rows, adapters * rank], which all layers of a model share."""
    a, b = torch.empty(adapters, rank, 1), torch.empty(adapters, 1, rank)
    bank = fp.ops.BankView(a, b, torch.full((adapters,), scaling), _routed(rows, adapters))
    return bank.stacked().scaling


def _layer(
    p: Problem,
    quant_type: str,
    double_quant: bool = False,
    adapter: torch.dtype = torch.float32,
    pack: bool = False,
    **how: str,
) -> Layer:
    """``pack``: the adapter laid out for the kernel beforehand, as a model that serves holds it."""
    packed, trained = _packed(p, quant_type, double_quant), ()
    if p.adapters > 1:
        bank = _bank(p)
        if p.train:
            raise Unavailable("adapters of a bank are not trained in one batch")

        def call(x: Tensor) -> Tensor:
            rows = _routed(len(x), p.adapters)
            return fp.ops.linear_4bit(x, packed, None, bank._replace(rows=rows), **how)

    else:
        branch = None
        if p.rank:
            trained = tuple(t.to(adapter, copy=True).requires_grad_(p.train) for t in (p.a, p.b))
            branch = (*trained, p.scaling)
            branch = fp.ops.pack_lora(*branch) if pack else branch

        def call(x: Tensor) -> Tensor:
            return fp.ops.linear_4bit(x, packed, None, branch, **how)

    return Layer(call, packed.nbytes, lambda: p.adapted(packed.dequantize(torch.float64)), trained)


for _quant_type in ("nf4", "fp4", "int4"):
    contender(f"ours_{_quant_type}", "ours", lora=True, trains=True)(functools.partial(_layer, quant_type=_quant_type))
contender("ours_nf4_dq", "ours", lora=True, trains=True)(functools.partial(_layer, quant_type="nf4", double_quant=True))
contender("ours_nf4_bf16_adapter", "ours", lora=True, over="ours_nf4", trains=True)(
    functools.partial(_layer, quant_type="nf4", adapter=torch.bfloat16)
)


def _serving(p: Problem, quant_type: str, **how: str) -> Layer:
    """One adapter, or several side by side with a scale a row, as a model that serves holds them."""
    if p.adapters == 1:
        return _layer(p, quant_type, pack=True, **how)
    packed = _packed(p, quant_type)
    branch = fp.ops.pack_lora(*_bank(p)._replace(rows=_routed(1, p.adapters)).stacked()[:2])

    def scaled(rows: int) -> fp.ops.PackedLora:
        return branch._replace(scaling=_row_scale(rows, p.adapters, p.rank, p.scaling))

    return Layer(
        lambda x: fp.ops.linear_4bit(x, packed, None, scaled(len(x)), **how),
        packed.nbytes,
        lambda: p.adapted(packed.dequantize(torch.float64)),
    )


contender("ours_nf4_packed", "ours", lora=True, over="ours_nf4")(functools.partial(_serving, quant_type="nf4"))
for _quant_type in ("nf4", "int4"):
    contender(f"ours_{_quant_type}_int8", "ours", tier="int8", lora=True)(
        functools.partial(_serving, quant_type=_quant_type, compute="int8")
    )


@contender("ours_nf4_module", "ours")
def _module(p: Problem) -> Layer:
    layer = fp.nn.Linear4bit.from_packed(_packed(p, "nf4"))
    return Layer(layer, layer.packed.nbytes, lambda: layer.dequantize(torch.float64))
