"""``linear_4bit`` for many rows: torch's dense product, over W decoded slab by slab into memory that stays in cache.

A result is started at the LoRA branch and the bias, and multiplied onto: one rounding more, and no pass more. Forward,
a slab is some rows of W and gives those columns of y. dX sums over the rows of W, so that there slabs would have to be
columns; the kernel decodes whole rows, and W is decoded at once.

S and dS are float32, in products bfloat16 beside bfloat16 (float16 could not hold their range).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..formats import Packed4bit
from ..formats.double_quant import dequantize_scales
from ..formats.packed import Operands
from .autocast import without_autocast
from .cuda_kernels import why_not as why_not_cuda
from .library import define_linear_4bit, dynamic_map, split_weight
from .reference import keep_mask, scaled

_TILE = 128
"""Rows and columns of the blocks that a dense product is cut into, about."""
_COPIED = 1 << 24
"""Elements beside float16 that are in float32 at a time: of all of x or dy, these would be a GPU's largest tensors."""


def slab_rows(m: int, n: int, row_bytes: int, cache: int, cores: int) -> int:
    """Rows of W in a slab for the product with ``m`` rows: half the cache, but enough to keep every core busy."""
    fitting = cache // 2 // row_bytes
    busy = -(-cores * _TILE * _TILE // m)
    slabs = max(1, n // max(fitting, busy, 1))
    return -(-n // slabs // _TILE) * _TILE


def _decode(weight: Operands, k: int, row: int, out: Tensor) -> Tensor:
    """Rows of W from ``row`` on into ``out`` [rows, K]."""
    torch.ops.pyfastpeft.dequantize_rows.default(*weight, k, row, out)
    return out


def _whole(weight: Operands, k: int, dtype: torch.dtype) -> Tensor:
    codes = weight.codes
    if why_not_cuda(codes.device) is None:
        return _decode(weight, k, 0, codes.new_empty((weight.n, k), dtype=dtype))
    packed = Packed4bit.of_operands(weight, k)
    if packed.nested is not None:  # by a map that is there already: copying one would wait for the GPU
        scale = dequantize_scales(packed.scale, packed.nested, dynamic_map(codes.device))
        packed = replace(packed, scale=scale, nested=None)
    return packed.dequantize(dtype)


def _slabs(weight: Operands, k: int, m: int, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """(first row, W [rows, K] from there on); each is gone with the next."""
    codes, n = weight.codes, weight.n
    if why_not_cuda(codes.device) is not None:
        yield 0, _whole(weight, k, dtype)
        return
    device = torch.cuda.get_device_properties(codes.device)
    height = slab_rows(m, n, k * dtype.itemsize, device.L2_cache_size, device.multi_processor_count)
    memory = codes.new_empty((min(height, n), k), dtype=dtype)
    for row in range(0, n, height):
        yield row, _decode(weight, k, row, memory[: n - row])


def _parts(length: int, width: int) -> Iterator[slice]:
    """``length`` rows of ``width`` elements, ``_COPIED`` elements at a time."""
    step = max(1, _COPIED // max(width, 1))
    return (slice(start, start + step) for start in range(0, length, step))


def _product(p: Tensor, q: Tensor) -> Tensor:
    """p · q in float32."""
    if p.is_cuda and p.dtype == q.dtype != torch.float32:
        return torch.mm(p, q, out_dtype=torch.float32)
    if p.dtype == q.dtype:
        return p.float() @ q.float()
    y = p.new_zeros((len(p), q.shape[1]), dtype=torch.float32)
    for part in _parts(len(q), max(y.shape)):
        y.addmm_(p[:, part].float(), q[part].float())
    return y


def _beside(s: Tensor, dtype: torch.dtype) -> Tensor:
    return s.to(torch.bfloat16) if dtype is torch.bfloat16 else s


def _start(out: Tensor, s: Tensor, factor: Tensor, bias: Tensor | None) -> None:
    """out = s · factor + bias, s float32."""
    s = _beside(s, out.dtype)
    if s.dtype != out.dtype:
        factor = factor.float()
        for part in _parts(*out.shape):
            y = s[part] @ factor
            out[part] = y if bias is None else y + bias
    elif bias is None:
        torch.mm(s, factor.to(out.dtype), out=out)
    else:
        torch.addmm(bias.to(out.dtype), s, factor.to(out.dtype), out=out)


def _kept(x: Tensor, seed: Tensor | None, dropout: float) -> Tensor:
    """x with the dropped elements zero; the others are not scaled."""
    return x if seed is None else torch.where(keep_mask(*x.shape, seed, dropout), x, 0)


@without_autocast
def _forward(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    weight, (bias, a, b, row_scale, scaling, seed, dropout) = split_weight(rest)
    (m, k), n = x.shape, weight.n
    if x.stride(1) != 1:
        x = x.contiguous()
    y = x.new_empty((m, n))
    if a is None:
        s = x.new_empty((m, 0), dtype=torch.float32)
    else:
        s = _product(_kept(x, seed, dropout), a.t().to(x.dtype)) / (1 - dropout)
        start = scaled(s, row_scale, scaling)
    if y.numel() == 0:
        return y, s
    for row, w in _slabs(weight, k, m, x.dtype):
        out, here = y[:, row : row + len(w)], slice(row, row + len(w))
        part = None if bias is None else bias[here]
        if a is not None:
            _start(out, start, b[here].t(), part)
            out.addmm_(x, w.t())
        elif bias is None:
            torch.mm(x, w.t(), out=out)
        else:
            torch.addmm(part.to(x.dtype), x, w.t(), out=out)
    return y, s


@without_autocast
def _backward(dy: Tensor, x: Tensor | None, s: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    weight, (k, a, b, row_scale, scaling, seed, dropout, need_x, need_a, need_b) = split_weight(rest)
    dx, da, db = dy.new_empty(0), dy.new_empty(0), dy.new_empty(0)
    if a is not None and (need_x or need_a):
        ds = scaled(_product(dy, b.to(dy.dtype)), row_scale, scaling)
    if need_x:
        w = _whole(weight, k, dy.dtype)
        if a is None:
            dx = dy @ w
        else:
            dx = dy.new_empty((dy.shape[0], k))
            if seed is None:
                _start(dx, ds, a, None)
            else:
                dx.copy_(_kept(ds @ a.float(), seed, dropout) / (1 - dropout))
            dx.addmm_(dy, w)
    if need_a:
        da = (_product(_beside(ds, x.dtype).t(), _kept(x, seed, dropout)) / (1 - dropout)).to(a.dtype)
    if need_b:
        db = _product(dy.t(), _beside(scaled(s, row_scale, scaling), dy.dtype)).to(b.dtype)
    return dx, da, db


define_linear_4bit("slabs", _forward, _backward)
