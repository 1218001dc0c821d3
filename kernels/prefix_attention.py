"""``prefix_attention`` in Triton: softmax(q · [prefix_k; k]ᵀ · scale) · [prefix_v; v], both directions.

A program's rows are queries that share a head of keys: the group's heads of a token, token after token (with a prefix
that the batch shares, of all its rows). Grouped queries so share what is read of K and V, and decoding fills a tile.
Keys are the prefix's, then the tokens', each from its own pointers; a tile is BN keys from wherever the rows begin to
see any. Scores are in units of log 2: a weight is exp2(s - max), s carrying scale · log2(e).

    _starts       where each row's prefix lies, for a window over padded keys.
    _forward      over keys, online softmax. Where rows are few, keys are split over programs ("parts").
    _combine      the parts of a result to one, in their order.
    _query_grad   over keys: dq; and delta = Σ dO ∘ O, which the next one reads.
    _key_grad     a tile of keys, over the rows of one row of the batch: dk, dv; of the prefix a float32 part.
    _prefix_sum   those parts, added in the order of the batch.

What a tile of BM rows and BN keys of size D cannot do without, of e bytes an element, in one program:

                   read (L2)      tensor cores, operations   exponentials
    _forward       2 · BN · D · e     4 · BM · BN · D          BM · BN
    _query_grad    2 · BN · D · e     6 · BM · BN · D          BM · BN
    _key_grad      2 · BM · D · e     8 · BM · BN · D          BM · BN

On an H100 (a processor does 4096 operations, 16 exponentials and 128 float32 instructions a clock) a forward tile of
128 · 64 at D = 128 takes 1024 clocks of tensor cores, 512 of exponentials and, at 7 instructions a score, 448 of the
rest: tensor cores bound it, from D = 64 down the exponentials. Decoding reads K and V once: 2 · S · D · e bytes for a
head of keys and a row of the batch, and 2 · P · D · e for a head of a prefix that the batch shares.

Offsets that grow with a tensor are 64-bit. Sums are ordered: the same call gives the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from inspect import signature
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .layouts import with_contiguous_columns
from .options import FUSED

_SHOWN = tl.constexpr(2**29)
"""The place of a key that nobody sees is at or beyond this."""
_LEAST = tl.constexpr(-3e38)
"""A running maximum of nothing: finite, so that differences are."""
_WIDEST = 2**30
"""A window that holds all keys, whatever their places."""
_SCAN = tl.constexpr(1024)
"""Places that a program looks at at a time."""
_PARTS = tl.constexpr(16)
"""Parts that ``_combine`` takes at a time."""
_BLOCK = 512
"""Elements that a program of ``_prefix_sum`` takes."""
_FEW = 64
"""Rows of a unit up to which units read a prefix that the batch shares together."""
_PROGRAMS = 512
"""Programs that a call should have, to fill any GPU; few rows get them by splitting the keys."""
_SPLIT_KEYS = 256
"""The least keys of a part: what it writes is then small beside what it reads."""


class View(NamedTuple):
    """A tensor [batch, heads, rows, D] as the kernels take it: its columns lie side by side.

    Attributes:
        data: the tensor; a pointer in a kernel.
        batch, head, row: its strides.
    """

    data: Tensor
    batch: int
    head: int
    row: int


# ---- pieces ----------------------------------------------------------------------------------------------------------


@triton.jit
def _load(rows, inside, D: tl.constexpr, WIDTH: tl.constexpr):
    """What ``rows`` point to, [rows, WIDTH]; zero outside."""
    d = tl.arange(0, WIDTH)
    return tl.load(rows[:, None] + d[None, :], mask=inside[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def _store(rows, value, inside, D: tl.constexpr, WIDTH: tl.constexpr):
    d = tl.arange(0, WIDTH)
    at = rows[:, None] + d[None, :]
    tl.store(at, value.to(rows.dtype.element_ty), mask=inside[:, None] & (d < D)[None, :])


@triton.jit
def _rows(t, batch, head, row):
    """Pointers to rows of a View."""
    return t.data + batch.to(tl.int64) * t.batch + head.to(tl.int64) * t.head + row.to(tl.int64) * t.row


@triton.jit
def _query_rows(kv_head, row0, R, GROUP: tl.constexpr, BM: tl.constexpr):
    """Rows row0 to row0 + BM - 1 of one row of the batch: (they, which of them there are, their tokens, their heads)"""
    rows = row0 + tl.arange(0, BM)
    return rows, rows < R, rows // GROUP, kv_head * GROUP + rows % GROUP


@triton.jit
def _unit_rows(b, kv_head, row0, R, T, GROUP: tl.constexpr, BM: tl.constexpr):
    """Rows row0 to row0 + BM - 1 of unit b, counted over the batch: (they, which of them there are, their rows of the
    batch, their tokens, their heads)"""
    inside = row0 + tl.arange(0, BM) < R
    rows = b * R + row0 + tl.arange(0, BM)
    return rows, inside, rows // (T * GROUP), rows // GROUP % T, kv_head * GROUP + rows % GROUP


@triton.jit
def _prefix_of(index, lengths, b, slots, P):
    """(which prefix row b of the batch has, its length: 0 where it has none)"""
    slot = b.to(tl.int64) * 0
    if index is not None:
        slot = tl.load(index + b)
    known = (slot >= 0) & (slot < slots)
    slot = tl.where(known, slot, 0)
    length = tl.where(known, P, 0)
    if lengths is not None:
        length = tl.minimum(tl.maximum(tl.load(lengths + slot, mask=known, other=0), 0), length).to(tl.int32)
    return slot, length


@triton.jit
def _first_place(starts, b, S, T):
    """The place of the first key that is shown in row b of the batch; 0 where none is."""
    if starts is None:
        return tl.where(S > 0, T - S, 0)
    else:
        return tl.load(starts + b)


@triton.jit
def _places(positions, shift, j, end):
    """The places of keys j, counted from the first query's."""
    if positions is None:
        return tl.where(j < end, j + shift, _SHOWN)
    else:
        return tl.load(positions + j, mask=j < end, other=_SHOWN)


@triton.jit
def _in_sight(positions, begin, end, shift, first, last, window, CAUSAL: tl.constexpr):
    """[begin, end) without the keys at its ends that none of the tokens first to last sees."""
    if positions is None:
        if CAUSAL:
            end = tl.minimum(end, last - shift + 1)
        if window is not None:
            begin = tl.maximum(begin, first - window + 1 - shift)
    else:
        low = end
        high = begin
        for j0 in range(begin, end, _SCAN):
            j = j0 + tl.arange(0, _SCAN)
            place = tl.load(positions + j, mask=j < end, other=_SHOWN)
            seen = place <= (last if CAUSAL else _SHOWN - 1)
            if window is not None:
                seen = seen & (place > first - window)
            low = tl.minimum(low, tl.min(tl.where(seen, j, end), 0))
            high = tl.maximum(high, tl.max(tl.where(seen, j + 1, begin), 0))
        begin, end = low, high
    return begin, end


@triton.jit
def _seen(place, upper, token, window):
    """Which keys queries see: those whose place is at most ``upper``, and within the window of ``token``."""
    seen = place <= upper
    if window is not None:
        seen = seen & (place > token - window)
    return seen


@triton.jit
def _sweep(
    acc,  # float32 [BM, WIDTH]: Σ weight · value so far
    total,  # float32 [BM]: Σ weight
    most,  # float32 [BM]: the largest score
    q,
    k,  # View
    v,  # View
    batch,
    kv_head,
    begin,
    end,
    positions,
    shift,
    upper,  # int32 [BM, 1], or a number
    token,  # int32 [BM, 1]
    window,
    scale,
    MASKED: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BN: tl.constexpr,
):
    """Takes keys [begin, end) into the sums."""
    for j0 in range(begin, end, BN):
        j = j0 + tl.arange(0, BN)
        k_tile = _load(_rows(k, batch, kv_head, j), j < end, D, WIDTH)
        s = tl.dot(q, tl.trans(k_tile), input_precision="ieee") * scale
        if MASKED:
            s = tl.where(_seen(_places(positions, shift, j, end)[None, :], upper, token, window), s, float("-inf"))
        peak = tl.maximum(most, tl.max(s, 1))
        weight, factor = tl.exp2(s - peak[:, None]), tl.exp2(most - peak)
        v_tile = _load(_rows(v, batch, kv_head, j), j < end, D, WIDTH)
        acc = tl.dot(weight.to(v_tile.dtype), v_tile, acc * factor[:, None], input_precision="ieee")
        total = total * factor + tl.sum(weight, 1)
        most = peak
    return acc, total, most


@triton.jit
def _gradient_sweep(
    dq,  # float32 [BM, WIDTH], but for the scale
    q,
    dout,
    lse,
    delta,
    k,  # View
    v,  # View
    batch,
    kv_head,
    begin,
    end,
    positions,
    shift,
    upper,  # int32 [BM, 1], or a number
    token,  # int32 [BM, 1]
    window,
    scale,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BN: tl.constexpr,
):
    """Adds what keys [begin, end) give."""
    for j0 in range(begin, end, BN):
        j = j0 + tl.arange(0, BN)
        k_tile = _load(_rows(k, batch, kv_head, j), j < end, D, WIDTH)
        v_tile = _load(_rows(v, batch, kv_head, j), j < end, D, WIDTH)
        s = tl.dot(q, tl.trans(k_tile), input_precision="ieee") * scale
        seen = _seen(_places(positions, shift, j, end)[None, :], upper, token, window)
        weight = tl.where(seen, tl.exp2(s - lse[:, None]), 0.0)
        ds = weight * (tl.dot(dout, tl.trans(v_tile), input_precision="ieee") - delta[:, None])
        dq = tl.dot(ds.to(k_tile.dtype), k_tile, dq, input_precision="ieee")
    return dq


@triton.jit
def _anew(x, MOVE: tl.constexpr):
    """The number x, which the compiler does not know to be that: what follows from it is computed again, and does not
    lie in registers during the sweep, which has use for all of them."""
    if MOVE is None:
        return x
    else:
        return tl.inline_asm_elementwise(MOVE, "=r,r", [x], dtype=tl.int32, is_pure=False, pack=1)


# ---- kernels ---------------------------------------------------------------------------------------------------------

_SIZES = ["T", "S", "P", "slots", "window", "units", "R", "M", "span", "parts", "B", "N"]
"""Arguments of which no kernel wants to know more: one code serves a cache as it grows."""


def _jit(kernel: Callable) -> triton.JITFunction:
    return triton.jit(kernel, do_not_specialize=[name for name in _SIZES if name in signature(kernel).parameters])


@_jit
def _starts(
    positions,  # int32 [B, S]
    starts,  # int32 [B]: the place of each row's first key that is shown; 0 where none is
    S,
):
    b = tl.program_id(0)
    positions += b.to(tl.int64) * S
    first = tl.full((_SCAN,), 2**31 - 1, tl.int32)
    for j0 in range(0, S, _SCAN):
        j = j0 + tl.arange(0, _SCAN)
        shown = tl.load(positions + j, mask=j < S, other=_SHOWN) < _SHOWN
        first = tl.minimum(first, tl.where(shown, j, 2**31 - 1))
    first = tl.min(first)
    tl.store(starts + b, tl.load(positions + first, mask=first < S, other=0))


@_jit
def _forward(
    q,  # View [B, H, T, D]
    k,  # View [B, HKV, S, D], or None: no tokens
    v,  # View
    prefix_k,  # View [slots, HKV, P, D], or None
    prefix_v,  # View
    index,  # int64 [B], the prefix of each row, any other number being none; None: all have the first
    lengths,  # int64 [slots], or None: P
    positions,  # int32 [B, S], the keys' places, counted from the first query's; None: the last T are the queries' own
    starts,  # int32 [B], what ``_starts`` wrote; None where no window asks for it or positions are None
    out,  # [parts, B, T, H, D]; float32 where it is to be combined
    lse,  # float32 [parts, B, HKV, T, GROUP], the logarithm to base 2 of Σ weight, infinity for 0; or None
    scale,  # to units of log 2
    window,  # or None
    units,  # B * HKV; HKV where a unit has the rows of the whole batch, and no tokens
    R,  # rows of a unit
    M,  # B * T * H
    T,
    S,
    P,
    slots,
    span,  # keys of a part, those of the prefix first
    HKV: tl.constexpr,
    GROUP: tl.constexpr,
    CAUSAL: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    MOVE: tl.constexpr,  # of an integer in PTX, or None
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    unit, part = tl.program_id(0) % units, tl.program_id(1)
    row0 = (tl.num_programs(0) // units - 1 - tl.program_id(0) // units) * BM  # those that see the most come first
    b, kv_head = unit // HKV, unit % HKV
    rows, inside, row_b, token, head = _unit_rows(b, kv_head, row0, R, T, GROUP, BM)
    first, last = row0 // GROUP, (tl.minimum(row0 + BM, R) - 1) // GROUP  # tokens
    q_tile = _load(_rows(q, row_b, head, token), inside, D, WIDTH)
    upper = token[:, None] if CAUSAL else _SHOWN - 1
    acc = tl.zeros((BM, WIDTH), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    most = tl.full((BM,), _LEAST, tl.float32)
    if positions is not None:
        positions += b.to(tl.int64) * S
    if prefix_k is not None:
        slot, length = _prefix_of(index, lengths, b, slots, P)
        begin, end, shift = part * span, tl.minimum(part * span + span, length), 0
        if window is not None:
            shift = _first_place(starts, b, S, T) - length
            begin = tl.maximum(begin, first - window + 1 - shift)
        acc, total, most = _sweep(
            acc, total, most, q_tile, prefix_k, prefix_v, slot, kv_head, begin, end,
            None, shift, _SHOWN - 1, token[:, None], window, scale, True, D, WIDTH, BN,
        )  # fmt: skip
    if k is not None:
        shift = T - S
        begin, end = tl.maximum(part * span - P, 0), tl.minimum(tl.maximum(part * span + span - P, 0), S)
        begin, end = _in_sight(positions, begin, end, shift, first, last, window, CAUSAL)
        if positions is None and window is None:
            seen_by_all = (tl.minimum(end, first - shift + 1) if CAUSAL else end) - begin
            masked = begin + tl.maximum(seen_by_all, 0) // BN * BN
            acc, total, most = _sweep(
                acc, total, most, q_tile, k, v, b, kv_head, begin, masked,
                positions, shift, upper, token[:, None], window, scale, False, D, WIDTH, BN,
            )  # fmt: skip
            begin = masked
        acc, total, most = _sweep(
            acc, total, most, q_tile, k, v, b, kv_head, begin, end,
            positions, shift, upper, token[:, None], window, scale, True, D, WIDTH, BN,
        )  # fmt: skip
    unit = _anew(unit, MOVE)
    rows, inside, row_b, token, head = _unit_rows(unit // HKV, unit % HKV, _anew(row0, MOVE), R, T, GROUP, BM)
    at = part.to(tl.int64) * M + (row_b * T + token) * (HKV * GROUP) + head
    _store(out + at * D, acc * tl.where(total == 0.0, 0.0, 1.0 / total)[:, None], inside, D, WIDTH)
    if lse is not None:
        at = part.to(tl.int64) * M + ((row_b * HKV + kv_head) * T + token) * GROUP + rows % GROUP
        tl.store(lse + at, tl.where(total == 0.0, float("inf"), most + tl.log2(total)), mask=inside)


@_jit
def _combine(
    outs,  # float32 [parts, B, T, H, D]
    lses,  # float32 [parts, B, HKV, T, GROUP]
    out,  # [B, T, H, D]
    lse,  # float32 [B, HKV, T, GROUP], or None
    parts,
    M,  # B * T * H
    T,
    HKV: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0)
    head, token, b = row % (HKV * GROUP), row // (HKV * GROUP) % T, row // (HKV * GROUP) // T
    lse_row = ((b * HKV + head // GROUP) * T + token) * GROUP + head % GROUP
    acc = tl.zeros((WIDTH,), tl.float32)
    total, most = tl.full((), 0.0, tl.float32), tl.full((), _LEAST, tl.float32)
    for part0 in range(0, parts, _PARTS):
        part = part0 + tl.arange(0, _PARTS)
        inside = part < parts
        part = part.to(tl.int64)
        s = tl.load(lses + part * M + lse_row, mask=inside, other=float("inf"))
        s = tl.where(s == float("inf"), float("-inf"), s)
        peak = tl.maximum(most, tl.max(s, 0))
        weight, factor = tl.exp2(s - peak), tl.exp2(most - peak)
        acc = acc * factor + tl.sum(_load(outs + (part * M + row) * D, inside, D, WIDTH) * weight[:, None], 0)
        total = total * factor + tl.sum(weight, 0)
        most = peak
    d = tl.arange(0, WIDTH)
    acc *= tl.where(total == 0.0, 0.0, 1.0 / total)
    tl.store(out + row.to(tl.int64) * D + d, acc.to(out.dtype.element_ty), mask=d < D)
    if lse is not None:
        tl.store(lse + lse_row, tl.where(total == 0.0, float("inf"), most + tl.log2(total)))


@_jit
def _query_grad(
    q,  # as for _forward, to `lse`
    k,
    v,
    prefix_k,
    prefix_v,
    index,
    lengths,
    positions,
    starts,
    out,
    lse,
    dout,  # View [B, H, T, D]
    dq,  # [B, T, H, D]
    delta,  # float32 [B, HKV, T, GROUP], written
    scale,  # to units of log 2
    dq_scale,
    window,
    T,
    S,
    P,
    slots,
    HKV: tl.constexpr,
    GROUP: tl.constexpr,
    CAUSAL: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    MOVE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    R = T * GROUP
    blocks = tl.cdiv(R, BM)
    units = tl.num_programs(0) // blocks
    unit, row0 = tl.program_id(0) % units, (blocks - 1 - tl.program_id(0) // units) * BM
    b, kv_head = unit // HKV, unit % HKV
    rows, inside, token, head = _query_rows(kv_head, row0, R, GROUP, BM)
    first, last = row0 // GROUP, (tl.minimum(row0 + BM, R) - 1) // GROUP  # tokens
    upper = token[:, None] if CAUSAL else _SHOWN - 1
    q_tile = _load(_rows(q, b, head, token), inside, D, WIDTH)
    dout_tile = _load(_rows(dout, b, head, token), inside, D, WIDTH)
    at = (b.to(tl.int64) * T + token) * (HKV * GROUP) + head
    out_tile = _load(out + at * D, inside, D, WIDTH)
    delta_tile = tl.sum(dout_tile.to(tl.float32) * out_tile.to(tl.float32), 1)
    lse_at = unit.to(tl.int64) * R + rows
    tl.store(delta + lse_at, delta_tile, mask=inside)
    lse_tile = tl.load(lse + lse_at, mask=inside, other=float("inf"))
    acc = tl.zeros((BM, WIDTH), tl.float32)
    if positions is not None:
        positions += b.to(tl.int64) * S
    if prefix_k is not None:
        slot, length = _prefix_of(index, lengths, b, slots, P)
        begin, shift = 0, 0
        if window is not None:
            shift = _first_place(starts, b, S, T) - length
            begin = tl.maximum(begin, first - window + 1 - shift)
        acc = _gradient_sweep(
            acc, q_tile, dout_tile, lse_tile, delta_tile, prefix_k, prefix_v, slot, kv_head, begin, length,
            None, shift, _SHOWN - 1, token[:, None], window, scale, D, WIDTH, BN,
        )  # fmt: skip
    begin, end = _in_sight(positions, 0, S, T - S, first, last, window, CAUSAL)
    acc = _gradient_sweep(
        acc, q_tile, dout_tile, lse_tile, delta_tile, k, v, b, kv_head, begin, end,
        positions, T - S, upper, token[:, None], window, scale, D, WIDTH, BN,
    )  # fmt: skip
    unit = _anew(unit, MOVE)
    b, kv_head = unit // HKV, unit % HKV
    rows, inside, token, head = _query_rows(kv_head, _anew(row0, MOVE), R, GROUP, BM)
    at = (b.to(tl.int64) * T + token) * (HKV * GROUP) + head
    _store(dq + at * D, acc * dq_scale, inside, D, WIDTH)


@_jit
def _key_grad(
    q,  # as for _query_grad
    k,
    v,
    prefix_k,
    prefix_v,
    index,
    lengths,
    positions,
    starts,
    lse,
    dout,
    delta,
    dk,  # [B, S, HKV, D]
    dv,
    prefix_dk,  # float32 [B, HKV, P, D], of the prefix of each row
    prefix_dv,
    scale,  # to units of log 2
    dk_scale,
    window,
    T,
    S,
    P,
    slots,
    HKV: tl.constexpr,
    GROUP: tl.constexpr,
    CAUSAL: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    MOVE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    R = T * GROUP
    tiles = tl.cdiv(P, BN) + tl.cdiv(S, BN)
    units = tl.num_programs(0) // tiles
    unit, tile = tl.program_id(0) % units, tl.program_id(0) // units
    b, kv_head = unit // HKV, unit % HKV
    if positions is not None:
        positions += b.to(tl.int64) * S
    # The prefix's tiles come first, as all rows see them.
    of_prefix = tile < tl.cdiv(P, BN)
    j0 = (tile - tl.where(of_prefix, 0, tl.cdiv(P, BN))) * BN
    j = j0 + tl.arange(0, BN)
    place = _places(positions, T - S, j, tl.where(of_prefix, 0, S))
    if prefix_k is not None:
        slot, length = _prefix_of(index, lengths, b, slots, P)
        shift = -length
        if window is not None:
            shift += _first_place(starts, b, S, T)
        place = tl.where(of_prefix & (j < length), j + shift, place)
    shown = place < _SHOWN
    k_tile = tl.zeros((BN, WIDTH), q.data.dtype.element_ty)
    v_tile = tl.zeros((BN, WIDTH), q.data.dtype.element_ty)
    if of_prefix:
        if prefix_k is not None:
            k_tile = _load(_rows(prefix_k, slot, kv_head, j), shown, D, WIDTH)
            v_tile = _load(_rows(prefix_v, slot, kv_head, j), shown, D, WIDTH)
    else:
        k_tile = _load(_rows(k, b, kv_head, j), shown, D, WIDTH)
        v_tile = _load(_rows(v, b, kv_head, j), shown, D, WIDTH)
    # Tokens [first, last) see any. Both lie in [0, T], so that times GROUP they do not overflow.
    first, last = tl.minimum(tl.min(tl.where(shown, tl.where(of_prefix, 0, place) if CAUSAL else 0, T)), T), T
    if window is not None:
        last = tl.maximum(0, tl.minimum(T, tl.max(tl.where(shown, place, -window)) + window))
    acc_k = tl.zeros((BN, WIDTH), tl.float32)
    acc_v = tl.zeros((BN, WIDTH), tl.float32)
    for row0 in range(tl.maximum(first, 0) * GROUP, last * GROUP, BM):
        rows, inside, token, head = _query_rows(kv_head, row0, R, GROUP, BM)
        q_tile = _load(_rows(q, b, head, token), inside, D, WIDTH)
        dout_tile = _load(_rows(dout, b, head, token), inside, D, WIDTH)
        at = unit.to(tl.int64) * R + rows
        lse_tile = tl.load(lse + at, mask=inside, other=float("inf"))
        delta_tile = tl.load(delta + at, mask=inside, other=0.0)
        s = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee") * scale
        upper = tl.where(of_prefix, _SHOWN - 1, token)[None, :] if CAUSAL else _SHOWN - 1
        seen = _seen(place[:, None], upper, token[None, :], window)
        weight = tl.where(seen, tl.exp2(s - lse_tile[None, :]), 0.0)
        acc_v = tl.dot(weight.to(dout_tile.dtype), dout_tile, acc_v, input_precision="ieee")
        ds = weight * (tl.dot(v_tile, tl.trans(dout_tile), input_precision="ieee") - delta_tile[None, :])
        acc_k = tl.dot(ds.to(q_tile.dtype), q_tile, acc_k, input_precision="ieee")
    acc_k *= dk_scale
    j, unit = _anew(j0, MOVE) + tl.arange(0, BN), _anew(unit, MOVE)
    b, kv_head = unit // HKV, unit % HKV
    if of_prefix:
        at = (unit.to(tl.int64) * P + j) * D
        _store(prefix_dk + at, acc_k, j < P, D, WIDTH)
        _store(prefix_dv + at, acc_v, j < P, D, WIDTH)
    else:
        at = ((b.to(tl.int64) * S + j) * HKV + kv_head) * D
        _store(dk + at, acc_k, j < S, D, WIDTH)
        _store(dv + at, acc_v, j < S, D, WIDTH)


@_jit
def _prefix_sum(
    parts,  # float32 [B, N]
    index,  # int64 [B], or None
    out,  # float32 [slots, N]: the sum over the rows of the batch that have it
    B,
    N,
    BLOCK: tl.constexpr,
):
    slot = tl.program_id(1)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for b in range(B):
        end = N
        if index is not None:
            end = tl.where(tl.load(index + b) == slot, N, 0)
        acc += tl.load(parts + tl.cast(b, tl.int64) * N + n, mask=n < end, other=0.0)
    tl.store(out + slot.to(tl.int64) * N + n, acc, mask=n < N)


# ---- launches --------------------------------------------------------------------------------------------------------


class Tiles(NamedTuple):
    """What a program takes at a time.

    Attributes:
        rows: of queries.
        keys: of those that they see, a step.
        warps, stages: of a program.
    """

    rows: int
    keys: int
    warps: int
    stages: int


_TILES = {
    "wgmma": {
        64: (Tiles(128, 64, 8, 3), Tiles(128, 64, 8, 2), Tiles(64, 128, 8, 2)),
        128: (Tiles(128, 64, 8, 2), Tiles(128, 64, 8, 2), Tiles(32, 128, 8, 2)),
        256: (Tiles(64, 32, 4, 2), Tiles(64, 32, 4, 2), Tiles(16, 64, 8, 2)),
    },
    "mma": {
        64: (Tiles(128, 32, 4, 3), Tiles(128, 32, 4, 2), Tiles(32, 128, 8, 2)),
        128: (Tiles(128, 64, 8, 2), Tiles(128, 32, 8, 2), Tiles(32, 128, 8, 2)),
        256: (Tiles(64, 16, 4, 2), Tiles(64, 16, 4, 2), Tiles(16, 32, 4, 2)),
    },
    "mfma": {
        64: (Tiles(128, 64, 4, 3), Tiles(128, 32, 4, 2), Tiles(32, 128, 4, 2)),
        128: (Tiles(64, 64, 4, 2), Tiles(64, 32, 4, 2), Tiles(32, 64, 4, 2)),
        256: (Tiles(64, 32, 4, 2), Tiles(64, 16, 4, 2), Tiles(16, 32, 4, 2)),
    },
}
"""By tensor cores and width (the nearest of these), of elements of two bytes: what ``_forward``, ``_query_grad`` and
``_key_grad`` take. A warp reads the tiles that it multiplies from shared memory, which is what bounds these kernels. So
warps divide the rows of the products alone (of ``_key_grad``, keys), 16 or 32 each: two side by side would read the
same, and hand the weights to one another. And tiles are as large as registers hold without spilling (AMD's warps are
twice as wide, its shared memory is the smallest)."""
_TILES["tcgen05"] = _TILES["wgmma"] | {256: (Tiles(64, 16, 4, 2), *_TILES["wgmma"][256][1:])}


def _cuts(width: int) -> tuple[Tiles, Tiles, Tiles]:
    cores = "mma" if torch.version.hip is None else "mfma"
    if cores == "mma" and torch.cuda.is_available():
        cores = {9: "wgmma", 10: "tcgen05"}.get(torch.cuda.get_device_capability()[0], cores)
    return _TILES[cores][min(max(width, 64), 256)]


def tiles(rows: int, width: int, dtype: torch.dtype) -> Tiles:
    """Of ``_forward``, for units of ``rows`` rows; ``width`` is D, padded."""
    height = max(16, triton.next_power_of_2(rows))
    if dtype == torch.float32:
        side = _side(width)
        return Tiles(min(height, side), side, 4, 2)
    if height <= 32:  # reading bounds it
        return Tiles(height, 64 if width <= 128 else 32, 4, 3 if width <= 64 else 2)
    cut = _cuts(width)[0]
    height = min(height, cut.rows)
    return cut._replace(rows=height, warps=max(4, cut.warps * height // cut.rows))


def gradient_tiles(width: int, dtype: torch.dtype) -> tuple[Tiles, Tiles]:
    """Of ``_query_grad``, and of ``_key_grad``, which holds two sums, [keys, width]."""
    if dtype == torch.float32:
        side, warps = _side(width), 8 if width >= 128 and torch.version.hip is None else 4
        return Tiles(side, side, warps, 2), Tiles(16, side, warps, 2)
    return _cuts(width)[1:]


def _side(width: int) -> int:
    """Of float32 tiles: what fits into the smallest shared memory, 99 KiB, and into registers, where what is multiplied
    without tensor cores lies too."""
    return 32 if width <= 64 else 16


class Call(NamedTuple):
    """The tensors of a call, of the operator's shapes but for the prefixes, [slots, HKV, P, D], and the positions,
    [B, S]. Of index, lengths and positions elements lie side by side."""

    q: Tensor
    k: Tensor
    v: Tensor
    prefix_k: Tensor | None
    prefix_v: Tensor | None
    index: Tensor | None
    lengths: Tensor | None
    positions: Tensor | None
    causal: bool
    scale: float
    window: int | None

    @property
    def group(self) -> int:
        return self.q.shape[1] // self.k.shape[1]

    @property
    def width(self) -> int:
        return max(16, triton.next_power_of_2(self.q.shape[3]))

    @property
    def prefix(self) -> tuple[int, int]:
        """(how many prefixes there are, the length of one)"""
        return (0, 0) if self.prefix_k is None else (self.prefix_k.shape[0], self.prefix_k.shape[2])

    def _starts(self) -> Tensor | None:
        if self.positions is None:
            return None
        batch, keys = self.positions.shape
        starts = self.positions.new_empty((batch,))
        if batch > 0:
            _starts[(batch,)](positions=self.positions, starts=starts, S=keys, num_warps=4, **FUSED)
        return starts

    def arguments(self) -> dict:
        """Of all kernels that read keys."""
        slots, length = self.prefix
        prefix_k, prefix_v = (self.prefix_k, self.prefix_v) if length > 0 else (None, None)
        return {
            "q": _view(self.q),
            "k": _view(self.k),
            "v": _view(self.v),
            "prefix_k": _view(prefix_k),
            "prefix_v": _view(prefix_v),
            "index": self.index,
            "lengths": self.lengths,
            "positions": self.positions,
            "starts": self._starts() if length > 0 and self.window is not None else None,
            "scale": self.scale * math.log2(math.e),
            "window": None if self.window is None else min(self.window, _WIDEST),
            "T": self.q.shape[2],
            "S": self.k.shape[2],
            "P": length,
            "slots": slots,
            "HKV": self.k.shape[1],
            "GROUP": self.group,
            "CAUSAL": self.causal,
            "D": self.q.shape[3],
            "WIDTH": self.width,
        }


def _view(t: Tensor | None) -> View | None:
    if t is None:
        return None
    t = with_contiguous_columns(t)
    return View(t, *t.stride()[:3])


def _cut(cut: Tiles, full: bool) -> dict:
    """``full``: the sums fill the registers."""
    move = "mov.b32 $0, $1;" if full and torch.version.hip is None else None
    return {"BM": cut.rows, "BN": cut.keys, "MOVE": move, "num_warps": cut.warps, "num_stages": cut.stages} | FUSED


class _Pass(NamedTuple):
    """A launch of ``_forward``: ``keys`` keys for each of ``units`` units of ``rows`` rows."""

    units: int
    rows: int
    keys: int
    without: dict

    def parts(self, cut: Tiles) -> tuple[int, int]:
        """(into how many parts the keys are split, keys of a part)"""
        programs = triton.cdiv(self.rows, cut.rows) * self.units
        parts = max(1, min(_PROGRAMS // programs, self.keys // _SPLIT_KEYS))
        span = max(1, triton.cdiv(triton.cdiv(self.keys, parts), cut.keys)) * cut.keys
        return max(1, triton.cdiv(self.keys, span)), span


def forward(call: Call, need_lse: bool) -> tuple[Tensor, Tensor]:
    """(the result [B, T, H, D] in q's dtype, float32 [B * HKV or 0, T * GROUP]: see ``_forward``)."""
    q, group = call.q, call.group
    (batch, heads, tokens, dim), (_, kv_heads, keys, _) = q.shape, call.k.shape
    out = q.new_empty((batch, tokens, heads, dim))
    lse = q.new_empty((batch * kv_heads if need_lse else 0, tokens * group), dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    arguments, prefix, full = call.arguments(), call.prefix[1], q.dtype != torch.float32
    rows, units = tokens * group, batch * kv_heads
    passes = [_Pass(units, rows, prefix + keys, {})]
    if prefix > 0 and call.index is None and call.window is None and rows <= _FEW and batch > 1:
        passes = [
            _Pass(kv_heads, batch * rows, prefix, dict.fromkeys(("k", "v", "positions"))),
            _Pass(units, rows, keys, dict.fromkeys(("prefix_k", "prefix_v", "index", "lengths")) | {"P": 0}),
        ]
    cuts = [tiles(each.rows, call.width, q.dtype) for each in passes]
    split = [each.parts(cut) for each, cut in zip(passes, cuts, strict=True)]
    parts = sum(n for n, _ in split)
    outs, lses = out[None], lse[None] if need_lse else None
    if parts > 1:
        outs = q.new_empty((parts, *out.shape), dtype=torch.float32)
        lses = q.new_empty((parts, units, rows), dtype=torch.float32)
    at = 0
    for each, cut, (n, span) in zip(passes, cuts, split, strict=True):
        _forward[(triton.cdiv(each.rows, cut.rows) * each.units, n)](
            out=outs[at],
            lse=None if lses is None else lses[at],
            units=each.units,
            R=each.rows,
            M=batch * tokens * heads,
            span=span,
            **arguments | each.without,
            **_cut(cut, full and cut.rows > 32),
        )
        at += n
    if parts > 1:
        _combine[(batch * tokens * heads,)](
            outs=outs,
            lses=lses,
            out=out,
            lse=lse if need_lse else None,
            parts=parts,
            M=batch * tokens * heads,
            T=tokens,
            HKV=kv_heads,
            GROUP=group,
            D=dim,
            WIDTH=call.width,
            num_warps=2,
            **FUSED,
        )
    return out, lse


def backward(call: Call, dout: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
    """(dq [B, T, H, D], dk, dv [B, S, HKV, D] in q's dtype; of the prefix float32 [slots, HKV, P, D] twice).

    Args:
        dout: [B, H, T, D] in q's dtype.
        out, lse: what ``forward`` gave.
    """
    q = call.q
    (batch, _, tokens, dim), (_, kv_heads, keys, _) = q.shape, call.k.shape
    slots, prefix = call.prefix
    units = batch * kv_heads
    dq = torch.empty_like(out)
    dk, dv = (q.new_empty((batch, keys, kv_heads, dim)) for _ in range(2))
    prefix_dk, prefix_dv = (q.new_empty((batch, kv_heads, prefix, dim), dtype=torch.float32) for _ in range(2))
    delta = torch.empty_like(lse)
    arguments = call.arguments() | {"dout": _view(dout), "lse": lse, "delta": delta}
    for_queries, for_keys = gradient_tiles(call.width, q.dtype)
    full = q.dtype != torch.float32
    if dq.numel() > 0:
        _query_grad[(triton.cdiv(tokens * call.group, for_queries.rows) * units,)](
            out=out, dq=dq, dq_scale=call.scale, **arguments, **_cut(for_queries, full)
        )
    blocks = triton.cdiv(prefix, for_keys.keys) + triton.cdiv(keys, for_keys.keys)
    if blocks * units > 0:
        _key_grad[(blocks * units,)](
            dk=dk,
            dv=dv,
            prefix_dk=prefix_dk,
            prefix_dv=prefix_dv,
            dk_scale=call.scale,
            **arguments,
            **_cut(for_keys, full),
        )
    return dq, dk, dv, *(_summed(parts, call.index, slots) for parts in (prefix_dk, prefix_dv))


def _summed(parts: Tensor, index: Tensor | None, slots: int) -> Tensor:
    """float32 [slots, ...]: of ``parts`` [B, ...], which row of the batch belongs to which."""
    out = parts.new_empty((slots, *parts.shape[1:]))
    if out.numel() > 0:
        n = out[0].numel()
        _prefix_sum[(triton.cdiv(n, _BLOCK), slots)](
            parts=parts, index=index, out=out, B=len(parts), N=n, BLOCK=_BLOCK, num_warps=4, **FUSED
        )
    return out
