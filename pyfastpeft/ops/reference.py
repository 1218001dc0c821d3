"""The operators in plain torch: the fallback where there is no kernel, and what the kernels are held to."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..formats import Packed4bit
from .autocast import without_autocast
from .tracing import followed

_MASK32 = 0xFFFFFFFF
HIDDEN = 2**30
"""Added to the position of a key that nobody sees."""


def _mix32(h: Tensor) -> Tensor:
    """A 32-bit integer hash with good avalanche, on int64 tensors holding 32-bit values."""
    h = h ^ (h >> 16)
    h = (h * 0x7FEB352D) & _MASK32
    h = h ^ (h >> 15)
    h = (h * 0x846CA68B) & _MASK32
    return h ^ (h >> 16)


def new_seed(device: torch.device) -> Tensor:
    """Int64 [1] on ``device``: what a dropout mask is made from, drawn from torch's generator."""
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)


def keep_mask(rows: int, columns: int, seed: Tensor, dropout: float) -> Tensor:
    """Bool [rows, columns]: which elements survive dropout; the same function of (seed, row, column) as csrc's."""
    low, high = seed & _MASK32, (seed >> 32) & _MASK32
    row = _mix32((torch.arange(rows, device=seed.device).unsqueeze(1) + low) & _MASK32) ^ high
    column = (torch.arange(columns, device=seed.device) * 0x9E3779B9) & _MASK32
    return _mix32((column + row) & _MASK32) >= round(dropout * 2**32)


def dropped(x: Tensor, seed: Tensor | None, dropout: float) -> Tensor:
    if seed is None:
        return x
    return torch.where(keep_mask(*x.shape, seed, dropout), x / (1 - dropout), torch.zeros_like(x))


def projected(x: Tensor, a: Tensor, seed: Tensor | None, dropout: float) -> Tensor:
    """S = dropout(x) · Aᵀ, float32 [M, R]."""
    return F.linear(dropped(x.float(), seed, dropout), a.float())


def scaled(s: Tensor, row_scale: Tensor | None, scaling: float) -> Tensor:
    """S ∘ f; where rows choose, zero where f is, whatever S is."""
    if row_scale is None:
        return s * scaling
    s = s * row_scale * scaling
    return s.masked_fill(row_scale == 0, 0) if row_scale.dim() == 2 else s


@without_autocast
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
    y = F.linear(x, w.dequantize(x.dtype), None if bias is None else bias.to(x.dtype))
    if a is None:
        return y, x.new_empty((x.shape[0], 0), dtype=torch.float32)
    s = projected(x, a, seed, dropout)
    return y + F.linear(scaled(s, row_scale, scaling), b.float()).to(y.dtype), s


@without_autocast
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
    ds: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dA, dB), None where not needed; ``ds`` is the gradient of S itself, where that was differentiated."""
    dx = dy @ w.dequantize(dy.dtype) if need_x else None
    if a is None:
        return dx, None, None
    added, da, db = branch_backward(dy, x, s, a, b, row_scale, scaling, seed, dropout, need_x, need_a, need_b, ds)
    return dx + added if need_x else None, da, db


@without_autocast
def branch_backward(
    dy: Tensor,
    x: Tensor | None,
    s: Tensor | None,
    a: Tensor,
    b: Tensor,
    row_scale: Tensor | None,
    scaling: float,
    seed: Tensor | None,
    dropout: float,
    need_x: bool,
    need_a: bool,
    need_b: bool,
    ds: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """:func:`backward` of the LoRA branch alone."""
    dx = da = db = None
    through_y = scaled(dy.float() @ b.float(), row_scale, scaling)
    ds = through_y if ds is None else through_y + ds
    if need_x:
        dx = dropped(ds @ a.float(), seed, dropout).to(dy.dtype)
    if need_a:
        da = (ds.t() @ dropped(x.float(), seed, dropout)).to(a.dtype)
    if need_b:
        db = (dy.float().t() @ scaled(s, row_scale, scaling)).to(b.dtype)
    return dx, da, db


def _check_range(name: str, t: Tensor, least: int, most: int) -> None:
    if not t.is_cpu or followed():
        return  # looking would wait for a GPU, and compilers cannot
    for value in t.tolist():
        if not least <= value <= most:
            raise RuntimeError(f"{name} has {value}; each must lie in [{least}, {most}]")  # as the operators


def prefix_rows(
    batch: int, length: int, index: Tensor | None, lengths: Tensor | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Which of the prefixes each row reads, and how much of it: int64 [batch] both.

    Args:
        length: of the prefixes, padding included.
        index: int64 [batch], -1 for none (a length of 0); None: all rows read the first.
        lengths: int64 [prefixes], without padding; None: there is none.
    """
    index = torch.zeros(batch, dtype=torch.int64, device=device) if index is None else index
    row = index.clamp(min=0)
    own = torch.full_like(row, length) if lengths is None else lengths[row]
    return row, own.masked_fill(index < 0, 0)


def sees_keys(positions: Tensor, tokens: int, causal: bool, window: int | None) -> Tensor:
    """Bool [B, T, S]: which of the keys at ``positions`` [B, S] each query sees."""
    query = torch.arange(tokens, device=positions.device)[:, None]
    places = positions[:, None, :]
    seen = (places < HIDDEN // 2).expand(-1, tokens, -1)
    if causal:
        seen = seen & (places <= query)
    return seen if window is None else seen & (places > query - window)


def sees_prefix(
    length: int, lengths: Tensor, positions: Tensor, tokens: int, window: int | None, begins: Tensor | None = None
) -> Tensor:
    """Bool [B, T, length]: which tokens of its row's prefix, ``lengths`` [B] long, each query sees.

    A prefix lies right before the first visible key of its row; ``positions`` [B or 1, S] are those of the keys. Where
    rows hold several sequences, it lies right before each: ``begins`` [B or 1, T] of the queries.
    """
    j = torch.arange(length, device=lengths.device)
    seen = (j < lengths[:, None])[:, None, :].expand(-1, tokens, -1)
    if window is None:
        return seen
    begins = _first_shown(positions) if begins is None else begins
    query = torch.arange(tokens, device=lengths.device)
    return seen & (j - lengths[:, None, None] > (query - window - begins)[:, :, None])


def _first_shown(positions: Tensor) -> Tensor:
    """[B, 1]: the place of the first visible key among those at ``positions`` [B, S]; 0 where there is none."""
    if positions.shape[1] == 0:
        return positions.new_zeros(len(positions), 1)
    shown = positions < HIDDEN // 2
    at = shown.to(torch.uint8).argmax(1, keepdim=True)
    return torch.where(shown.any(1, keepdim=True), positions.gather(1, at), 0)


@without_autocast
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    prefix_index: Tensor | None,
    prefix_lengths: Tensor | None,
    positions: Tensor | None,
    causal: bool,
    scale: float,
    window: int | None,
) -> Tensor:
    """:func:`pyfastpeft.ops.prefix_attention` with the prefix as [n, Hkv, P, D] and positions int32 [B, S]; float32
    inside, float64 for float64. Differentiable."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    batch, heads, tokens, dim = q.shape
    kv_heads, keys = k.shape[1:3]
    if positions is None:
        positions = torch.arange(tokens - keys, tokens, device=q.device).expand(batch, keys)
    visible = sees_keys(positions, tokens, causal, window)
    k, v = k.to(wide), v.to(wide)
    if prefix_k is not None:
        length = prefix_k.shape[2]
        if prefix_index is not None:
            _check_range("prefix_index", prefix_index, -1, len(prefix_k) - 1)
            prefix_index = prefix_index.masked_fill(prefix_index >= len(prefix_k), -1)
        if prefix_lengths is not None:
            _check_range("prefix_lengths", prefix_lengths, 0, length)
            prefix_lengths = prefix_lengths.clamp(0, length)
        row, lengths = prefix_rows(batch, length, prefix_index, prefix_lengths, q.device)
        visible = torch.cat((sees_prefix(length, lengths, positions, tokens, window), visible), -1)
        # Rows of the prefix as q's dtype holds them.
        k = torch.cat((prefix_k.to(q.dtype).to(wide)[row], k), 2)
        v = torch.cat((prefix_v.to(q.dtype).to(wide)[row], v), 2)
    visible = visible[:, None, None]
    blind = ~visible.any(-1, keepdim=True)
    grouped = q.to(wide).reshape(batch, kv_heads, heads // kv_heads, tokens, dim)
    scores = grouped @ k.unsqueeze(2).transpose(-1, -2) * scale
    weights = scores.masked_fill(~visible & ~blind, float("-inf")).softmax(-1).masked_fill(blind, 0)
    out = (weights @ v.unsqueeze(2)).to(q.dtype)
    return out.permute(0, 3, 1, 2, 4).reshape(batch, tokens, heads, dim).contiguous().transpose(1, 2)
