"""The operators in plain torch: the fallback where there is no kernel, and what the kernels are held to."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..formats import Packed4bit

_MASK32 = 0xFFFFFFFF


def _mix32(h: Tensor) -> Tensor:
    """A 32-bit integer hash with good avalanche, on int64 tensors holding 32-bit values."""
    h = h ^ (h >> 16)
    h = (h * 0x7FEB352D) & _MASK32
    h = h ^ (h >> 15)
    h = (h * 0x846CA68B) & _MASK32
    return h ^ (h >> 16)


def keep_mask(rows: int, columns: int, seed: Tensor, dropout: float) -> Tensor:
    """Bool [rows, columns]: which elements survive dropout; the same function of (seed, row, column) as csrc's."""
    low, high = seed & _MASK32, (seed >> 32) & _MASK32
    row = _mix32((torch.arange(rows).unsqueeze(1) + low) & _MASK32) ^ high
    column = (torch.arange(columns) * 0x9E3779B9) & _MASK32
    return _mix32((column + row) & _MASK32) >= round(dropout * 2**32)


def _dropped(x: Tensor, seed: Tensor | None, dropout: float) -> Tensor:
    if seed is None:
        return x
    keep = keep_mask(*x.shape, seed, dropout).to(x.device)
    return torch.where(keep, x / (1 - dropout), torch.zeros_like(x))


def _scaled(s: Tensor, row_scale: Tensor | None, scaling: float) -> Tensor:
    return s * scaling if row_scale is None else s * row_scale * scaling


def forward(
    x: Tensor,
    w: Packed4bit,
    bias: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    row_scale: Tensor | None,
    scaling: float,
    seed: Tensor | None,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    """(y [M, N] in x's dtype, S [M, R] float32; R = 0 without a branch)."""
    y = F.linear(x, w.dequantize(x.dtype))
    if bias is not None:
        y = y + bias.to(y.dtype)
    if a is None:
        return y, x.new_empty((x.shape[0], 0), dtype=torch.float32)
    s = F.linear(_dropped(x.float(), seed, dropout), a.float())
    return y + F.linear(_scaled(s, row_scale, scaling), b.float()).to(y.dtype), s


def backward(
    dy: Tensor,
    x: Tensor | None,
    s: Tensor | None,
    w: Packed4bit,
    a: Tensor | None,
    b: Tensor | None,
    row_scale: Tensor | None,
    scaling: float,
    seed: Tensor | None,
    dropout: float,
    need_x: bool,
    need_a: bool,
    need_b: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dA, dB), None where not needed."""
    dx = da = db = None
    if need_x:
        dx = dy @ w.dequantize(dy.dtype)
    if a is None:
        return dx, None, None
    ds = _scaled(dy.float() @ b.float(), row_scale, scaling)
    if need_x:
        dx = dx + _dropped(ds @ a.float(), seed, dropout).to(dx.dtype)
    if need_a:
        da = (ds.t() @ _dropped(x.float(), seed, dropout)).to(a.dtype)
    if need_b:
        db = (dy.float().t() @ _scaled(s, row_scale, scaling)).to(b.dtype)
    return dx, da, db
