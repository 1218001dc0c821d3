"""``rms_norm``, ``swiglu`` and ``rope`` in Triton, both directions: one read and one write of every element.

Arithmetic is float32; a value that transformers rounds to the tensors' dtype on the way is rounded here as well, as the
CPU kernels do (csrc/cpu/elementwise.h). Rows are matrices' rows, at any stride; what is returned is contiguous. The
gradient of a norm's weight is a sum over rows in a fixed order: the same call gives the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .layouts import with_contiguous_columns
from .options import FUSED

_ELEMENTS = 4096
"""Of a program's tile: 16 bytes a thread, several times over."""
_HELD = tl.constexpr(8192)
"""The most columns of which a program keeps the weight and its gradient's part in registers."""
_PROGRAMS = 512
"""Programs that fill any GPU, where each keeps a partial sum: of more rows each takes several tiles."""
_HEADS = 32
"""Heads that a program of ``_rope`` turns at a time."""


# ---- pieces ----------------------------------------------------------------------------------------------------------


@triton.jit
def _rounded(v, like: tl.constexpr):
    """float32 ``v`` as the dtype ``like`` holds it."""
    return v.to(like).to(tl.float32)


@triton.jit
def _exp(x):
    """e^x to a few units in the last place. (``tl.exp`` rounds x · log2(e) first, an error that grows with x.)"""
    x = tl.clamp(x, -105.0, 89.0, propagate_nan=tl.PropagateNan.ALL)
    whole = tl.floor(x * 1.4426950408889634 + 0.5)
    part = tl.fma(x, 1.925963033500e-8, tl.fma(x, 1.442695021629333, -whole))
    return tl.exp2(whole) * tl.exp2(part)


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + _exp(-x))


@triton.jit
def _load(t, stride, rows, columns, M, H):
    """t[rows, columns] in float32, zero outside of the matrix [M, H]."""
    at = t + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    return tl.load(at, mask=(rows < M)[:, None] & (columns < H)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _store(t, v, rows, columns, M, H):
    """v into the contiguous matrix t [M, H]."""
    at = t + rows.to(tl.int64)[:, None] * H + columns[None, :]
    tl.store(at, v.to(t.dtype.element_ty), mask=(rows < M)[:, None] & (columns < H)[None, :])


@triton.jit
def _inverse_norm(x, H, eps):
    """1 / sqrt(mean(x²) + eps) of each row, [ROWS, 1]."""
    return tl.div_rn(1.0, tl.sqrt_rn(tl.sum(x * x, 1, keep_dims=True) / H + eps))


# ---- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit
def _rms_norm(
    x,  # [M, H]
    weight,  # [H]
    y,  # [M, H], contiguous
    eps,
    M,
    H,
    x_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,  # at least H
):
    rows, columns = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    h = _load(x, x_stride, rows, columns, M, H)
    w = tl.load(weight + columns, mask=columns < H, other=0.0).to(tl.float32)[None, :]
    _store(y, w * _rounded(h * _inverse_norm(h, H, eps), x.dtype.element_ty), rows, columns, M, H)


@triton.jit
def _rms_norm_backward(
    dy,  # [M, H]
    x,  # [M, H]
    weight,  # [H]
    dx,  # [M, H], contiguous
    dweight,  # float32 [programs, H], a part each, or None
    eps,
    M,
    H,
    dy_stride,
    x_stride,
    TILES: tl.constexpr,  # of a program, after one another
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    columns = tl.arange(0, COLUMNS)
    w = tl.load(weight + columns, mask=columns < H, other=0.0).to(tl.float32)[None, :]
    part_at = None if dweight is None else dweight + tl.program_id(0) * H + columns[None, :]
    part = tl.zeros((ROWS, COLUMNS), tl.float32)
    for tile in range(TILES):
        rows = (tl.program_id(0) * TILES + tile) * ROWS + tl.arange(0, ROWS)
        h = _load(x, x_stride, rows, columns, M, H)
        d = _load(dy, dy_stride, rows, columns, M, H)
        inverse = _inverse_norm(h, H, eps)
        if dweight is not None:
            if COLUMNS > _HELD:  # the part lies where it is stored in the end
                part = tl.load(part_at, mask=(columns < H)[None, :] & (tile > 0), other=0.0)
            part += d * (h * inverse)
            if COLUMNS > _HELD:
                tl.store(part_at, part, mask=(columns < H)[None, :])
        if COLUMNS > _HELD:
            w = tl.load(weight + columns, mask=columns < H, other=0.0).to(tl.float32)[None, :]
        d *= w
        shift = inverse * inverse * inverse * tl.sum(d * h, 1, keep_dims=True) / H
        _store(dx, d * inverse - h * shift, rows, columns, M, H)
    if dweight is not None and COLUMNS <= _HELD:
        tl.store(part_at, tl.sum(part, 0, keep_dims=True), mask=(columns < H)[None, :])


@triton.jit
def _swiglu(
    gate,  # [M, H]
    up,  # [M, H]
    y,  # [M, H], contiguous
    M,
    H,
    gate_stride,
    up_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    g = _load(gate, gate_stride, rows, columns, M, H)
    silu = _rounded(g * _sigmoid(g), gate.dtype.element_ty)
    _store(y, silu * _load(up, up_stride, rows, columns, M, H), rows, columns, M, H)


@triton.jit
def _swiglu_backward(
    dy,  # [M, H]
    gate,  # [M, H]
    up,  # [M, H]
    dgate,  # [M, H], contiguous
    dup,  # [M, H], contiguous
    M,
    H,
    dy_stride,
    gate_stride,
    up_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    g = _load(gate, gate_stride, rows, columns, M, H)
    d = _load(dy, dy_stride, rows, columns, M, H)
    s = _sigmoid(g)
    silu = g * s
    _store(dup, d * silu, rows, columns, M, H)
    slope = s + silu * (1.0 - s)
    _store(dgate, d * _load(up, up_stride, rows, columns, M, H) * slope, rows, columns, M, H)


@triton.jit
def _turn(
    x,  # [batch, heads, tokens, 2 · half], the last dimension side by side
    y,  # [batch, tokens, heads, 2 · half], contiguous
    cos1,  # float32 [HALF]: the angles of the first half
    cos2,  # of the second
    sin1,  # what multiplies the second half on its way into the first
    sin2,  # and the first on its way into the second
    batch,
    token,
    tokens,
    heads,
    half,
    batch_stride,
    head_stride,
    token_stride,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    like: tl.constexpr = x.dtype.element_ty
    i = tl.arange(0, HALF)[None, :]
    x += batch.to(tl.int64) * batch_stride + token.to(tl.int64) * token_stride
    y += (batch.to(tl.int64) * tokens + token) * heads * 2 * half
    for h0 in range(0, heads, HEADS):
        h = (h0 + tl.arange(0, HEADS))[:, None]
        inside = (h < heads) & (i < half)
        at = x + h.to(tl.int64) * head_stride + i
        x1 = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        x2 = tl.load(at + half, mask=inside, other=0.0).to(tl.float32)
        y1 = _rounded(x1 * cos1[None, :], like) - _rounded(x2 * sin1[None, :], like)
        y2 = _rounded(x2 * cos2[None, :], like) + _rounded(x1 * sin2[None, :], like)
        to = y + h * 2 * half + i
        tl.store(to, y1.to(like), mask=inside)
        tl.store(to + half, y2.to(like), mask=inside)


@triton.jit
def _rope(
    q,
    k,
    q_out,
    k_out,
    cos,  # [batch or 1, tokens, 2 · half], contiguous
    sin,
    tokens,
    q_heads,
    k_heads,
    half,
    angle_stride,  # tokens; 0 where the batch shares its angles
    q_batch_stride,
    q_head_stride,
    q_token_stride,
    k_batch_stride,
    k_head_stride,
    k_token_stride,
    TRANSPOSED: tl.constexpr,  # the gradient's direction
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    batch, token = tl.program_id(0) // tokens, tl.program_id(0) % tokens
    i = tl.arange(0, HALF)
    at = (batch.to(tl.int64) * angle_stride + token) * 2 * half + i
    cos1 = tl.load(cos + at, mask=i < half, other=0.0).to(tl.float32)
    cos2 = tl.load(cos + at + half, mask=i < half, other=0.0).to(tl.float32)
    sin1 = tl.load(sin + at, mask=i < half, other=0.0).to(tl.float32)
    sin2 = tl.load(sin + at + half, mask=i < half, other=0.0).to(tl.float32)
    if TRANSPOSED:
        sin1, sin2 = -sin2, -sin1
    _turn(
        q, q_out, cos1, cos2, sin1, sin2, batch, token, tokens, q_heads, half,
        q_batch_stride, q_head_stride, q_token_stride, HEADS, HALF,
    )  # fmt: skip
    _turn(
        k, k_out, cos1, cos2, sin1, sin2, batch, token, tokens, k_heads, half,
        k_batch_stride, k_head_stride, k_token_stride, HEADS, HALF,
    )  # fmt: skip


# ---- launches --------------------------------------------------------------------------------------------------------


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """y [M, H], of x [M, H] and weight [H], all of one dtype."""
    x = with_contiguous_columns(x)
    m, h = x.shape
    y = x.new_empty((m, h))
    if y.numel() > 0:
        rows, columns, warps = _whole_rows(h)
        _rms_norm[(triton.cdiv(m, rows),)](
            x=x,
            weight=weight.contiguous(),
            y=y,
            eps=eps,
            M=m,
            H=h,
            x_stride=x.stride(0),
            ROWS=rows,
            COLUMNS=columns,
            num_warps=warps,
            **FUSED,
        )
    return y


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, eps: float, need_weight: bool) -> tuple[Tensor, Tensor]:
    """(dx [M, H] in x's dtype, dweight float32 [1, H]; [0, H] where it is not needed)."""
    dy, x = with_contiguous_columns(dy), with_contiguous_columns(x)
    m, h = x.shape
    dx = x.new_empty((m, h))
    rows, columns, warps = _whole_rows(h)
    tiles = triton.cdiv(triton.cdiv(m, rows), _PROGRAMS) if need_weight else 1
    tiles = triton.next_power_of_2(max(tiles, 1))  # which the kernel is compiled for
    programs = triton.cdiv(m, rows * tiles)
    dweight = x.new_empty((programs if need_weight else 0, h), dtype=torch.float32)
    if dx.numel() > 0:
        _rms_norm_backward[(programs,)](
            dy=dy,
            x=x,
            weight=weight.contiguous(),
            dx=dx,
            dweight=dweight if need_weight else None,
            eps=eps,
            M=m,
            H=h,
            dy_stride=dy.stride(0),
            x_stride=x.stride(0),
            TILES=tiles,
            ROWS=rows,
            COLUMNS=columns,
            num_warps=warps,
            **FUSED,
        )
    return dx, dweight.sum(0, keepdim=True) if need_weight else dweight


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up, of matrices [M, H] of one dtype."""
    gate, up = with_contiguous_columns(gate), with_contiguous_columns(up)
    y = gate.new_empty(gate.shape)
    if y.numel() > 0:
        _swiglu[_grid(*gate.shape)](
            gate=gate, up=up, y=y, gate_stride=gate.stride(0), up_stride=up.stride(0), **_tile(*gate.shape)
        )
    return y


def swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """(dgate, dup), [M, H]."""
    dy, gate, up = with_contiguous_columns(dy), with_contiguous_columns(gate), with_contiguous_columns(up)
    dgate, dup = gate.new_empty(gate.shape), gate.new_empty(gate.shape)
    if dup.numel() > 0:
        _swiglu_backward[_grid(*gate.shape)](
            dy=dy,
            gate=gate,
            up=up,
            dgate=dgate,
            dup=dup,
            dy_stride=dy.stride(0),
            gate_stride=gate.stride(0),
            up_stride=up.stride(0),
            **_tile(*gate.shape),
        )
    return dgate, dup


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, transposed: bool) -> tuple[Tensor, Tensor]:
    """q and k [batch, heads, tokens, dim] rotated, each [batch · tokens, heads · dim]; ``transposed``: the gradient.

    cos, sin: [batch or 1, tokens, dim].
    """
    q, k = with_contiguous_columns(q), with_contiguous_columns(k)
    batch, _, tokens, dim = q.shape
    out = [x.new_empty((batch * tokens, x.shape[1] * dim)) for x in (q, k)]
    if batch * tokens * dim > 0:
        heads = min(triton.next_power_of_2(max(q.shape[1], k.shape[1], 1)), _HEADS)
        strides = {
            f"{name}_{what}_stride": stride
            for name, x in (("q", q), ("k", k))
            for what, stride in zip(("batch", "head", "token"), x.stride(), strict=False)
        }
        _rope[(batch * tokens,)](
            q=q,
            k=k,
            q_out=out[0],
            k_out=out[1],
            cos=cos.contiguous(),
            sin=sin.contiguous(),
            tokens=tokens,
            q_heads=q.shape[1],
            k_heads=k.shape[1],
            half=dim // 2,
            angle_stride=0 if cos.shape[0] == 1 else tokens,
            TRANSPOSED=transposed,
            HEADS=heads,
            HALF=triton.next_power_of_2(dim // 2),
            num_warps=4,
            **FUSED,
            **strides,
        )
    return tuple(out)


def _whole_rows(h: int) -> tuple[int, int, int]:
    """(rows, columns, warps) of a tile of whole rows of ``h`` elements."""
    columns = triton.next_power_of_2(max(h, 1))
    rows = max(_ELEMENTS // columns, 1)
    threads = min(max(rows * columns // 16, 128), 1024)
    return rows, columns, threads // (32 if torch.version.hip is None else 64)


def _tile(m: int, h: int) -> dict:
    columns = min(triton.next_power_of_2(h), 1024)
    rows = min(triton.next_power_of_2(m), _ELEMENTS // columns)
    return {"M": m, "H": h, "ROWS": rows, "COLUMNS": columns, "num_warps": 4} | FUSED


def _grid(m: int, h: int) -> tuple[int, int]:
    tile = _tile(m, h)
    return triton.cdiv(m, tile["ROWS"]), triton.cdiv(h, tile["COLUMNS"])
