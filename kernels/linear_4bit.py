"""``linear_4bit`` in Triton: y = x · Wᵀ + bias + (S ∘ f) · Bᵀ with S = dropout(x) · Aᵀ, W [N, K] in 4 bits.

Four kernels, each a sweep over one dimension with float32 accumulators in registers:

    _forward     y [M, N], over K. S accumulates in the same sweep, one more product a step, unless it is given.
    _input_grad  dx [M, K] = dy · W + dropout(dS · A), over N.
    _project     reads P [M, C] once for P · Q and Pᵀ · T, Q and T of R columns: of dy, dS and dB together; of x, dA,
                 and S where the sweep does not take it (few rows; a large R; dropout, hashed once an element).
    _slot_sums   S where each row has the adapter of a slot, over K.

W is read as it lies in storage (bitsandbytes' order: the flattened matrix, two codes to a byte, the high nibble first,
one scale a block of consecutive elements), so a row of odd length may start in the middle of a byte, and a block may
straddle rows. A tile of W is decoded once, in float32, and rounded to x's dtype; NVIDIA's GPUs, where x has 16 bits,
look codes up in a table that is rounded to float16. For few rows, which memory should bound, the code table is rounded
to x's dtype instead, and scales multiply float32 sums. The factors of the branch are rounded to x's dtype where they
meet x or dy; S and dS stay float32 beside float16, which could not hold their range.
Offsets that grow with a matrix are 64-bit. Sums are ordered: the same call gives the same bits.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .graphs import constant_on
from .layouts import with_contiguous_columns
from .options import FUSED

_SWEEP_RANK = 32
"""The largest rank whose S fits into registers beside the accumulator of the forward sweep."""
_SWEEP_ROWS = 128
"""The least height of a block whose sweep takes S along; in a lower one every warp would decode the whole tile of W."""
_FEW_ROWS = 32
"""The most rows whose products with W, by words, fit into registers."""
_RANKS = 64
"""Columns of Q and T that a program of ``_project`` takes, and of S that ``_branch`` takes at a time."""
_CHUNK = 512
"""Rows of P that a program of ``_project`` takes: the partial sums of Pᵀ · T are then small beside P."""
_PARTIAL = 1 << 25
"""Partial sums of P · Q that are in memory at a time: of all rows at once they would be larger than P, of high rank."""
_SPAN = 1024
"""Columns of x that a program of ``_slot_sums`` takes."""
_PROGRAMS = 512
"""Programs that a product should have, to fill any GPU; few rows get them by splitting the sweep."""


# ---- the code table --------------------------------------------------------------------------------------------------


@functools.cache
def table_words(table: tuple[float, ...], dtype: torch.dtype) -> tuple[int, ...]:
    """The table's values in ``dtype`` (of two bytes) as eight words: the sixteen low bytes, then the high ones."""
    halves = torch.tensor(table, dtype=dtype, device="cpu").view(torch.uint8).view(16, 2).t().contiguous()
    return tuple(halves.view(torch.int32).flatten().tolist())


def lookup_asm(words: Sequence[str]) -> str:
    """PTX from four bytes of codes ($4) to four words ($0 to $3), each the values of a byte's two codes, the high
    nibble's first; ``words``: operands, see ``table_words``.

    A byte permutation looks four codes up among eight bytes, so codes 0 to 7 and 8 to 15 are looked up apart; bit 3,
    spread over a byte by another permutation, chooses between the two. Shifts are products, for which GPUs have another
    pipe than the one that permutations fill.
    """
    lines = [
        ".reg .b32 index, next, mask, below, above, low, high;",
        "and.b32 index, $4, 0x77777777;",
        "mul.lo.u32 next, $4, 16;",
    ]
    for first, bytes_of_bit_3 in ((0, "0xd9c8"), (2, "0xfbea")):
        lines.append(f"prmt.b32 mask, next, $4, {bytes_of_bit_3};")
        for name, (a, b, c, d) in (("low", words[:4]), ("high", words[4:])):
            lines += [
                f"prmt.b32 below, {a}, {b}, index;",
                f"prmt.b32 above, {c}, {d}, index;",
                f"lop3.b32 {name}, mask, above, below, 0xca;",
            ]
        lines += [
            f"prmt.b32 ${first}, low, high, 0x4051;",
            f"prmt.b32 ${first + 1}, low, high, 0x6273;",
            "mul.hi.u32 index, index, 65536;",
        ]
    return "{ " + " ".join(lines) + " }"


@functools.cache
def table_asm(table: tuple[float, ...]) -> str:
    """``lookup_asm`` of a table in float16."""
    return lookup_asm([f"0x{word & 0xFFFFFFFF:08x}" for word in table_words(table, torch.float16)])


_WORDS_ASM = tl.constexpr(lookup_asm([f"${i}" for i in range(5, 13)]))


@functools.cache
def _table_on(table: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """int32 [8, 4]: ``table_words``, each for the four lanes that share a row of W.

    A value that all lanes share would be kept in a register they share, and be copied from there for every lookup.
    """
    words = torch.tensor(table_words(table, dtype), dtype=torch.int32, device="cpu")
    return constant_on(words[:, None].repeat(1, 4), device)


@triton.jit
def _lookup(code, TABLE: tl.constexpr):
    """TABLE[code] in float32, by selections."""
    odd = code % 2 == 1
    w = tl.where(odd, TABLE[1], TABLE[0])
    for i in tl.static_range(1, 8):
        w = tl.where(code // 2 == i, tl.where(odd, TABLE[2 * i + 1], TABLE[2 * i]), w)
    return w


# ---- pieces ----------------------------------------------------------------------------------------------------------


@triton.jit
def _scales(scale, absmax2, offset, dynamic_map, block, inside):
    """The scale of each block in float32, 0 where not ``inside``."""
    if absmax2 is None:
        s = tl.load(scale + block, mask=inside, other=0.0)
    else:
        s = tl.load(dynamic_map + tl.load(scale + block, mask=inside, other=0))
        s = s * tl.load(absmax2 + block // 256, mask=inside, other=0.0) + tl.load(offset)
        s = tl.where(inside, s, 0.0)
    return s


@triton.jit
def _decode(
    codes,  # uint8 [ceil(N * K / 2)]
    scale,  # float32 [blocks]; uint8 when double-quantized
    zero,  # float32 [blocks], or None
    absmax2,  # float32 [ceil(blocks / 256)] when double-quantized, else None
    offset,  # float32 [1] likewise
    dynamic_map,  # float32 [256] likewise
    rows,  # int64 [ROWS], of W
    k0,
    N,
    K,
    row_bytes,  # K // 2
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    GROUP: tl.constexpr,  # columns of a tile's row that share a scale; 1 where K is odd
    TABLE: tl.constexpr,  # the value of each code
    ASM: tl.constexpr,  # table_asm(TABLE), or None: selections
):
    """W[rows, k0 : k0 + COLUMNS] in float32, zero outside the matrix."""
    inside = (rows < N)[:, None]
    if GROUP > 1:
        pair = k0 // 2 + tl.arange(0, COLUMNS // 2)
        at = codes + rows[:, None] * row_bytes + pair[None, :]
        byte = tl.load(at, mask=inside & (pair < row_bytes)[None, :], other=0)
        if ASM is not None:
            both = tl.inline_asm_elementwise(ASM, "=r,=r,=r,=r,r", [byte], dtype=tl.uint32, is_pure=True, pack=4)
            first = both.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
            second = (both >> 16).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
            w = tl.interleave(first, second)
        else:
            w = tl.interleave(_lookup(byte >> 4, TABLE), _lookup(byte & 15, TABLE))
    else:
        k = k0 + tl.arange(0, COLUMNS)
        element = rows[:, None] * K + k[None, :]
        byte = tl.load(codes + element // 2, mask=inside & (k < K)[None, :], other=0)
        w = _lookup(tl.where(element % 2 == 0, byte >> 4, byte & 15), TABLE)
    k = k0 + tl.arange(0, COLUMNS // GROUP) * GROUP
    inside = inside & (k < K)[None, :]
    block = (rows[:, None] * K + k[None, :]) // BLOCKSIZE
    s = _scales(scale, absmax2, offset, dynamic_map, block, inside)
    w = tl.reshape(w, (ROWS, COLUMNS // GROUP, GROUP)) * s[:, :, None]
    if zero is not None:
        w += tl.load(zero + block, mask=inside, other=0.0)[:, :, None]
    return tl.reshape(w, (ROWS, COLUMNS))


@triton.jit
def _few_rows(
    x_rows,  # pointers [BM, 1] to the rows of x
    codes,  # int32 [N, K // 8]
    scale,
    zero,
    absmax2,
    offset,
    dynamic_map,
    table,  # int32 [8, 4]: see _table_on
    inside,  # [BM, 1], which rows of x there are
    columns,  # int64 [BN], of y
    first,
    last,
    K,
    BM: tl.constexpr,
    BN: tl.constexpr,
    GROUPS: tl.constexpr,  # of a step
    GROUP: tl.constexpr,  # columns that share a scale, a multiple of 32
    BLOCKSIZE: tl.constexpr,
    FACTOR: tl.constexpr,  # that the values of `table` are multiplied with
    STAGES: tl.constexpr,
):
    """x[:, first:last] · W[columns, first:last]ᵀ, float32 [BM, BN].

    W comes first in the products, so that eight rows of x cost what one does. Every group of columns is a product for
    itself, a warp's, and its scale multiplies the sums. The order of a contraction is free: of 32 columns the eight of
    word t stand at 4 t to 4 t + 3 and 16 + 4 t to 16 + 4 t + 3, in W as in x, which is where tensor cores want what
    lane t of four holds. So ldmatrix brings every lane its word, and what is decoded from that moves no more.

    For 16 x 64 weights and 8 rows of x on an H100 memory takes 42 cycles of a multiprocessor, issuing 122 instructions
    31, and the integer pipe's 83 of these, 80 of which decode, 42.
    """
    like: tl.constexpr = x_rows.dtype.element_ty
    WORDS: tl.constexpr = GROUPS * GROUP // 8
    entry = table + tl.arange(0, 4)[None, None, :]
    t0, t1, t2, t3 = tl.load(entry), tl.load(entry + 4), tl.load(entry + 8), tl.load(entry + 12)
    t4, t5, t6, t7 = tl.load(entry + 16), tl.load(entry + 20), tl.load(entry + 24), tl.load(entry + 28)
    row_words = tl.multiple_of(K // 8, 4)  # as K is a multiple of 32
    w_rows = codes + columns[:, None] * row_words
    acc = tl.zeros((GROUPS, BN, BM), tl.float32)
    for k0 in tl.range(first, last, GROUPS * GROUP, num_stages=STAGES):
        k = k0 + tl.arange(0, GROUPS * GROUP)
        x = tl.load(x_rows + k[None, :], mask=inside & (k < K)[None, :], other=0.0)
        x = tl.permute(tl.reshape(x, (BM, GROUPS, GROUP // 32, 4, 2, 4)), (1, 2, 4, 3, 5, 0))
        x = tl.reshape(x, (GROUPS, GROUP, BM))
        at = tl.multiple_of(k0 >> 3, 4) + tl.arange(0, WORDS)
        word = tl.load(w_rows + at[None, :], mask=(at < row_words)[None, :], other=0)
        w0, w1, w2, w3 = tl.inline_asm_elementwise(
            _WORDS_ASM, "=r,=r,=r,=r,r,r,r,r,r,r,r,r,r",
            [tl.reshape(word, (BN, WORDS // 4, 4)), t0, t1, t2, t3, t4, t5, t6, t7],
            dtype=(tl.uint32, tl.uint32, tl.uint32, tl.uint32), is_pure=True, pack=1,
        )  # fmt: skip
        pairs = tl.join(tl.join(w0, w2), tl.join(w1, w3))
        w = tl.join(pairs.to(tl.uint16), (pairs >> 16).to(tl.uint16)).to(like, bitcast=True)
        w = tl.permute(tl.reshape(w, (BN, GROUPS, GROUP // 32, 4, 2, 4)), (1, 0, 2, 4, 3, 5))
        part = tl.dot(tl.reshape(w, (GROUPS, BN, GROUP)), x)
        group = k0 // GROUP + tl.arange(0, GROUPS)
        block = (columns[:, None] * (K // GROUP) + group[None, :]) // (BLOCKSIZE // GROUP)
        there = (group < K // GROUP)[None, :]
        s = _scales(scale, absmax2, offset, dynamic_map, block, there)
        part *= tl.trans(s)[:, :, None]
        if zero is not None:
            z = tl.load(zero + block, mask=there, other=0.0)
            sums = tl.dot(tl.full((GROUPS, 16, GROUP), 1.0, like), x)  # in every row the same
            sums = tl.broadcast_to(sums[:, None, :, :], (GROUPS, BN // 16, 16, BM))
            part += tl.reshape(sums, (GROUPS, BN, BM)) * tl.trans(z)[:, :, None]
        acc += part
    return tl.trans(tl.sum(acc, 0)) / FACTOR


@triton.jit
def _scaled(s, factor, factor_stride, scaling, rows, ranks, M, R):
    """s [rows, ranks] ∘ f, f = scaling · row_scale; zero where that is, whatever s is."""
    if factor is not None:
        at = factor + rows.to(tl.int64)[:, None] * factor_stride + ranks[None, :]
        f = tl.load(at, mask=(rows < M)[:, None] & (ranks < R)[None, :], other=0.0)
        s = tl.where(f == 0, 0.0, s * f)
    return s * scaling


@triton.jit
def _beside(t, like: tl.constexpr):
    """A factor of a product with S or dS: in bfloat16 beside bfloat16, else in float32 (see the module)."""
    return t.to(tl.bfloat16 if like == tl.bfloat16 else tl.float32)


@triton.jit
def _branch(
    acc,  # float32 [BM, BC]
    s,  # float32 [M, R]
    factor,
    factor_stride,
    scaling,
    other,  # of element (rank, column) at rank_stride, column_stride
    rank_stride,
    column_stride,
    rows,
    columns,
    M,
    C,
    R,
    RANK: tl.constexpr,
    PRECISION: tl.constexpr,
    LIKE: tl.constexpr,
):
    """acc + (s ∘ f)[rows] · other[:, columns]."""
    for r0 in tl.range(0, R, RANK, num_stages=1):  # short: its operands in flight would only take shared memory
        ranks = r0 + tl.arange(0, RANK)
        at = s + rows.to(tl.int64)[:, None] * R + ranks[None, :]
        part = tl.load(at, mask=(rows < M)[:, None] & (ranks < R)[None, :], other=0.0)
        part = _scaled(part, factor, factor_stride, scaling, rows, ranks, M, R)
        at = other + ranks.to(tl.int64)[:, None] * rank_stride + columns.to(tl.int64)[None, :] * column_stride
        right = tl.load(at, mask=(ranks < R)[:, None] & (columns < C)[None, :], other=0.0)
        acc = tl.dot(_beside(part, LIKE), _beside(right, LIKE), acc, input_precision=PRECISION)
    return acc


@triton.jit
def _slots_of(slot_of, rows, M, slots):
    """The slot of each row, int32; ``slots`` where it has none."""
    named = tl.load(slot_of + rows, mask=rows < M, other=-1)
    return tl.where((named >= 0) & (named < slots), named, slots).to(tl.int32)


@triton.jit
def _next_slot(named, after, slots):
    """The least slot in ``named`` beyond ``after``; ``slots`` where there is none."""
    return tl.min(tl.where(named > after, named, slots))


@triton.jit
def _places(order, rows, M):
    """Where x and y have the rows, int64."""
    return rows.to(tl.int64) if order is None else tl.load(order + rows, mask=rows < M, other=0)


@triton.jit
def _mix32(h):
    """A 32-bit integer hash with good avalanche, the CPU operator's."""
    h = (h ^ (h >> 16)) * tl.full((), 0x7FEB352D, tl.uint32)
    h = (h ^ (h >> 15)) * tl.full((), 0x846CA68B, tl.uint32)
    return h ^ (h >> 16)


@triton.jit
def _keep_mask(seed, threshold, rows, columns):
    """Which elements (rows, columns) survive dropout: a hash of their place and the seed (int64 [1])."""
    seed = tl.load(seed)
    row = _mix32(rows.to(tl.uint32) + seed.to(tl.uint32)) ^ (seed >> 32).to(tl.uint32)
    column = columns.to(tl.uint32) * tl.full((), 0x9E3779B9, tl.uint32)
    return _mix32(column[None, :] + row[:, None]).to(tl.int64) >= threshold


@triton.jit
def _block_of(M, C, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """This program's block (row, column): eight row blocks after one another share a column block, for the L2 cache."""
    WIDTH: tl.constexpr = 8
    program = tl.program_id(0)
    row_blocks, column_blocks = tl.cdiv(M, ROWS), tl.cdiv(C, COLUMNS)
    first = program // (WIDTH * column_blocks) * WIDTH
    width = tl.minimum(row_blocks - first, WIDTH)
    within = program % (WIDTH * column_blocks)
    return first + within % width, within // width


# ---- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit
def _forward(
    x,  # [M, K], columns side by side
    y,  # [M, N]; float32 [splits, M, N] where the sweep is split, and the sum over splits is y
    codes,
    scale,
    zero,
    absmax2,
    offset,
    dynamic_map,
    table,  # int32 [8, 4], for few rows: `codes` are then words, int32 [N, K // 8]; else None
    bias,  # [N], or None
    a,  # [R, K], columns side by side, or None: no branch, or S is given
    b,  # [N, R], or None: no branch
    s,  # float32 [M, R], read; where `a` is given it is written, [splits, M, R]
    factor,  # float32 [M, R] at factor_stride, or None
    scaling,
    slot_of,  # int64 [M], or None; with it `b` is [slots, N, R] and `factor` float32 [slots]
    order,  # int64 [M], or None: which row of x and of y is that of `s` and `slot_of`
    slots,
    b_slot_stride,
    M,
    N,
    K,
    R,
    row_bytes,
    x_stride,
    a_stride,
    b_stride,
    b_column_stride,
    factor_stride,
    span,  # columns of a split, a multiple of BK
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    RANK: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    GROUP: tl.constexpr,
    TABLE: tl.constexpr,
    ASM: tl.constexpr,
    FACTOR: tl.constexpr,  # of `table`
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    row_block, column_block = _block_of(M, N, BM, BN)
    split = tl.program_id(1)
    rows = row_block * BM + tl.arange(0, BM)
    columns = column_block * BN + tl.arange(0, BN)
    ranks = tl.arange(0, RANK)
    places = _places(order, rows, M)
    x_rows = x + places[:, None] * x_stride
    sums = tl.zeros((BM, RANK), tl.float32)
    first, last = split * span, tl.minimum(split * span + span, K)
    if table is not None:
        acc = _few_rows(
            x_rows, codes, scale, zero, absmax2, offset, dynamic_map, table, (rows < M)[:, None],
            tl.minimum(columns, N - 1).to(tl.int64), first, last, K, BM, BN, BK // GROUP, GROUP, BLOCKSIZE, FACTOR,
            STAGES,
        )  # fmt: skip
    else:
        acc = tl.zeros((BM, BN), tl.float32)
        for k0 in range(first, last, BK):
            k = k0 + tl.arange(0, BK)
            x_tile = tl.load(x_rows + k[None, :], mask=(rows < M)[:, None] & (k < K)[None, :], other=0.0)
            w = _decode(
                codes, scale, zero, absmax2, offset, dynamic_map, columns.to(tl.int64), k0, N, K, row_bytes,
                BN, BK, BLOCKSIZE, GROUP, TABLE, ASM,
            )  # fmt: skip
            acc = tl.dot(x_tile, tl.trans(w.to(x_tile.dtype)), acc, input_precision=PRECISION)
            if a is not None:
                a_at = a + ranks.to(tl.int64)[:, None] * a_stride + k[None, :]
                a_tile = tl.load(a_at, mask=(ranks < R)[:, None] & (k < K)[None, :], other=0.0).to(x_tile.dtype)
                sums = tl.dot(x_tile, tl.trans(a_tile), sums, input_precision=PRECISION)
    if a is not None:
        if column_block == 0:
            s_at = s + (split.to(tl.int64) * M + rows[:, None]) * R + ranks[None, :]
            tl.store(s_at, sums, mask=(rows < M)[:, None] & (ranks < R)[None, :])
        sums = _scaled(sums, factor, factor_stride, scaling, rows, ranks, M, R)
        at = b + columns.to(tl.int64)[None, :] * b_stride + ranks.to(tl.int64)[:, None] * b_column_stride
        right = tl.load(at, mask=(ranks < R)[:, None] & (columns < N)[None, :], other=0.0)
        like: tl.constexpr = x.dtype.element_ty
        acc = tl.dot(_beside(sums, like), _beside(right, like), acc, input_precision=PRECISION)
    if split == 0:  # what is added once
        if slot_of is not None:
            named = _slots_of(slot_of, rows, M, slots)
            slot = _next_slot(named, -1, slots)
            while slot < slots:
                added = _branch(
                    acc, s, None, 0, tl.load(factor + slot), b + slot.to(tl.int64) * b_slot_stride, b_column_stride,
                    b_stride, rows, columns, M, N, R, RANK, PRECISION, x.dtype.element_ty,
                )  # fmt: skip
                acc = tl.where((named == slot)[:, None], added, acc)  # what is not finite stays in its rows
                slot = _next_slot(named, slot, slots)
        elif a is None and b is not None:
            acc = _branch(
                acc, s, factor, factor_stride, scaling, b, b_column_stride, b_stride, rows, columns, M, N, R,
                RANK, PRECISION, x.dtype.element_ty,
            )  # fmt: skip
        if bias is not None:
            acc += tl.load(bias + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    at = y + (split.to(tl.int64) * M + places[:, None]) * N + columns[None, :]
    tl.store(at, acc.to(y.dtype.element_ty), mask=(rows < M)[:, None] & (columns < N)[None, :])


@triton.jit
def _input_grad(
    dy,  # [M, N], columns side by side
    dx,  # [M, K]
    codes,
    scale,
    zero,
    absmax2,
    offset,
    dynamic_map,
    ds,  # float32 [M, R], or None: no branch
    a,  # [R, K]
    seed,  # int64 [1], or None: no dropout
    threshold,
    keep_scale,
    M,
    N,
    K,
    R,
    row_bytes,
    dy_stride,
    a_stride,
    a_column_stride,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    RANK: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    GROUP: tl.constexpr,
    TABLE: tl.constexpr,
    ASM: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row_block, column_block = _block_of(M, K, BM, BK)
    rows = row_block * BM + tl.arange(0, BM)
    k0 = column_block * BK
    columns = k0 + tl.arange(0, BK)
    dy_rows = dy + rows.to(tl.int64)[:, None] * dy_stride
    acc = tl.zeros((BM, BK), tl.float32)
    for n0 in range(0, N, BN):
        n = n0 + tl.arange(0, BN)
        dy_tile = tl.load(dy_rows + n[None, :], mask=(rows < M)[:, None] & (n < N)[None, :], other=0.0)
        w = _decode(
            codes, scale, zero, absmax2, offset, dynamic_map, n.to(tl.int64), k0, N, K, row_bytes,
            BN, BK, BLOCKSIZE, GROUP, TABLE, ASM,
        )  # fmt: skip
        acc = tl.dot(dy_tile, w.to(dy_tile.dtype), acc, input_precision=PRECISION)
    if ds is not None:
        part = _branch(
            acc if seed is None else tl.zeros((BM, BK), tl.float32), ds, None, 0, 1.0, a, a_stride, a_column_stride,
            rows, columns, M, K, R, RANK, PRECISION, dy.dtype.element_ty,
        )  # fmt: skip
        kept = None if seed is None else _keep_mask(seed, threshold, rows, columns)
        acc = part if seed is None else acc + tl.where(kept, part * keep_scale, 0.0)
    at = dx + rows.to(tl.int64)[:, None] * K + columns[None, :]
    tl.store(at, acc.to(dx.dtype.element_ty), mask=(rows < M)[:, None] & (columns < K)[None, :])


@triton.jit
def _project(
    p,  # [M, C], columns side by side
    q,  # [C, R], or None
    t,  # float32 [M, R], or None
    pq,  # float32 [column blocks, height, R]: (P · Q) ∘ f of this launch's rows, a part a column block
    pt,  # float32 [chunks, C, R]: Pᵀ · (T ∘ f), a part a chunk of rows
    factor,  # float32 [M, R] at factor_stride, or None
    scaling,
    seed,  # int64 [1], or None: no dropout; of P
    threshold,
    row0,  # the first of this launch, a multiple of CHUNK
    height,  # how many there are
    M,
    C,
    R,
    p_stride,
    q_stride,
    q_column_stride,
    factor_stride,
    CHUNK: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
    RANK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    like: tl.constexpr = p.dtype.element_ty
    column_block, chunk = tl.program_id(0), row0 // CHUNK + tl.program_id(1)
    columns = column_block * BC + tl.arange(0, BC)
    ranks = tl.program_id(2) * RANK + tl.arange(0, RANK)
    if q is not None:
        q_at = q + columns.to(tl.int64)[:, None] * q_stride + ranks.to(tl.int64)[None, :] * q_column_stride
        q_tile = tl.load(q_at, mask=(columns < C)[:, None] & (ranks < R)[None, :], other=0.0).to(like)
    acc = tl.zeros((BC, RANK), tl.float32)
    for m0 in range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, M), BM):
        rows = m0 + tl.arange(0, BM)
        p_at = p + rows.to(tl.int64)[:, None] * p_stride + columns[None, :]
        tile = tl.load(p_at, mask=(rows < M)[:, None] & (columns < C)[None, :], other=0.0)
        if seed is not None:
            tile = tl.where(_keep_mask(seed, threshold, rows, columns), tile, 0.0)
        inside = (rows < M)[:, None] & (ranks < R)[None, :]
        if q is not None:
            part = tl.dot(tile, q_tile, input_precision=PRECISION)
            part = _scaled(part, factor, factor_stride, scaling, rows, ranks, M, R)
            pq_at = pq + (column_block.to(tl.int64) * height + rows[:, None] - row0) * R + ranks[None, :]
            tl.store(pq_at, part, mask=inside)
        if t is not None:
            t_tile = tl.load(t + rows.to(tl.int64)[:, None] * R + ranks[None, :], mask=inside, other=0.0)
            t_tile = _scaled(t_tile, factor, factor_stride, scaling, rows, ranks, M, R)
            acc = tl.dot(_beside(tl.trans(tile), like), _beside(t_tile, like), acc, input_precision=PRECISION)
    if t is not None:
        pt_at = pt + (chunk.to(tl.int64) * C + columns[:, None]) * R + ranks[None, :]
        tl.store(pt_at, acc, mask=(columns < C)[:, None] & (ranks < R)[None, :])


@triton.jit
def _slot_sums(
    x,  # [M, K], columns side by side
    a,  # [slots, R, K]
    slot_of,  # int64 [M]
    order,  # int64 [M], or None: which row of x is that of `slot_of` and `s`
    s,  # float32 [parts, M, R]: a part a span of columns; rows without a slot stay unwritten
    slots,
    M,
    K,
    R,
    x_stride,
    a_slot_stride,
    a_stride,
    a_column_stride,
    SPAN: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    RANK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    part = tl.program_id(1)
    ranks = tl.program_id(2) * RANK + tl.arange(0, RANK)
    named = _slots_of(slot_of, rows, M, slots)
    x_rows = x + _places(order, rows, M)[:, None] * x_stride
    slot = _next_slot(named, -1, slots)
    while slot < slots:
        here = (named == slot)[:, None]
        sums = tl.zeros((BM, RANK), tl.float32)
        for k0 in range(part * SPAN, tl.minimum(part * SPAN + SPAN, K), BK):
            k = k0 + tl.arange(0, BK)
            x_tile = tl.load(x_rows + k[None, :], mask=here & (k < K)[None, :], other=0.0)
            a_at = a + slot.to(tl.int64) * a_slot_stride + ranks.to(tl.int64)[:, None] * a_stride
            a_at += k.to(tl.int64)[None, :] * a_column_stride
            a_tile = tl.load(a_at, mask=(ranks < R)[:, None] & (k < K)[None, :], other=0.0).to(x_tile.dtype)
            sums = tl.dot(x_tile, tl.trans(a_tile), sums, input_precision=PRECISION)
        s_at = s + (part.to(tl.int64) * M + rows[:, None]) * R + ranks[None, :]
        tl.store(s_at, sums, mask=here & (ranks < R)[None, :])
        slot = _next_slot(named, slot, slots)


# ---- launches --------------------------------------------------------------------------------------------------------


class Tiles(NamedTuple):
    """How a product of M rows is cut.

    Attributes:
        rows, columns: of the block that a program computes.
        depth: of one step of its sweep.
        warps, stages: of a program.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


def tiles(m: int, plain: bool, words: bool = False) -> Tiles:
    """The cut for ``m`` rows; ``plain``: where no tensor core (float32) or no whole byte (K odd) helps; ``words``:
    where W can be read by words.

    A program decodes its part of W for itself, so blocks are as high as ``m`` asks for, up to what registers hold.
    Few rows leave narrow blocks, deep steps and many stages: that keeps the most of W in flight.
    """
    rows = min(max(16, triton.next_power_of_2(m)), 128)
    if plain:
        return Tiles(min(rows, 32), 32, 32, 4, 2)
    if words and rows <= _FEW_ROWS:  # every block of 64 columns reads x again, from the L2 cache
        return Tiles(8 if m <= 8 else rows, 64, 128, 4 if rows == 32 else 2, 4)
    if rows <= 32:
        return Tiles(rows, 32, 128, 4, 5)
    if rows == 64:
        return Tiles(rows, 64, 64, 4, 4)
    return Tiles(rows, 128, 64, 8, 3)


def formula(x: Tensor, w: Weight, forward: bool) -> Tiles:
    """``tiles`` for the rows of x or of dy."""
    return tiles(x.shape[0], x.dtype == torch.float32 or w.k % 2 == 1, forward and w.in_words(x.dtype))


def around(cut: Tiles) -> list[Tiles]:
    """What is worth trying beside a cut: its columns, depth or warps halved or doubled, a stage less or more."""
    halved_or_doubled = [
        cut._replace(**{name: size})
        for name, least, most in (("columns", 32, 256), ("depth", 32, 256), ("warps", 2, 16))
        for size in (getattr(cut, name) // 2, getattr(cut, name) * 2)
        if least <= size <= most
    ]
    return halved_or_doubled + [cut._replace(stages=n) for n in (cut.stages - 1, cut.stages + 1) if n > 1]


def splits(m: int, n: int, k: int, cut: Tiles) -> int:
    """Into how many parts the sweep over k is split, each of four steps at least."""
    programs = triton.cdiv(m, cut.rows) * triton.cdiv(n, cut.columns)
    return max(1, min(_PROGRAMS // programs, k // (4 * cut.depth)))


class Weight(NamedTuple):
    """W [N, K] in storage order: see ``_decode`` for the tensors. ``table``: the value of each code; ``bf16_table``:
    the same times ``bf16_factor``, where products are in bf16 and their sums are scaled."""

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    absmax2: Tensor | None
    offset: Tensor | None
    dynamic_map: Tensor | None
    table: tuple[float, ...]
    bf16_table: tuple[float, ...]
    bf16_factor: float
    n: int
    k: int
    blocksize: int

    def arguments(self, columns: int, like: torch.dtype) -> dict:
        """Of the kernels, for tiles of ``columns`` columns decoded to ``like``."""
        group = math.gcd(self.k, self.blocksize, columns)
        asm = table_asm(self.table) if like != torch.float32 and torch.version.hip is None else None
        tensors = {name: getattr(self, name) for name in self._fields[:6]}
        sizes = {"N": self.n, "K": self.k, "row_bytes": self.k // 2}
        return tensors | sizes | {"BLOCKSIZE": self.blocksize, "GROUP": group, "TABLE": self.table, "ASM": asm}

    def in_words(self, like: torch.dtype) -> bool:
        """Whether few rows of ``like`` can be multiplied by words of W."""
        whole = math.gcd(self.k, self.blocksize) % 32 == 0 and self.codes.storage_offset() % 4 == 0
        return whole and like != torch.float32 and torch.version.hip is None

    def words(self, cut: Tiles, like: torch.dtype) -> dict:
        """What ``arguments`` become for few rows, a group of columns for every warp; nothing if these are not few."""
        group = math.gcd(self.k, self.blocksize, cut.depth // cut.warps)
        if cut.rows > _FEW_ROWS or group % 32 != 0 or not self.in_words(like):
            return {"table": None, "FACTOR": None}
        codes = self.codes.view(-1).view(torch.int32)
        values, factor = (self.bf16_table, self.bf16_factor) if like == torch.bfloat16 else (self.table, 1.0)
        table = _table_on(values, like, codes.device)
        sizes = {"BK": group * cut.warps, "GROUP": group}
        return sizes | {"table": table, "FACTOR": factor, "codes": codes, "ASM": None}


class Branch(NamedTuple):
    """The LoRA branch: A [R, K], B [N, R], f = scaling · row_scale (float32 [R] or [M, R]), dropout with its seed
    (int64 [1], on the device)."""

    a: Tensor
    b: Tensor
    row_scale: Tensor | None
    scaling: float
    seed: Tensor | None
    dropout: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def factor(self) -> dict:
        """f, as the kernels take it."""
        stride = 0 if self.row_scale is None or self.row_scale.dim() == 1 else self.rank
        return {"factor": self.row_scale, "factor_stride": stride, "scaling": self.scaling}

    @property
    def dropping(self) -> dict:
        return {"seed": self.seed, "threshold": round(self.dropout * 2**32)}

    @property
    def keep_scale(self) -> float:
        return 1 / (1 - self.dropout)


class Slots(NamedTuple):
    """Adapters in slots, for inference: a [slots, R, K], b [slots, N, R], scaling float32 [slots]; rows int64 [M], the
    slot of each row, any other number being none."""

    a: Tensor
    b: Tensor
    scaling: Tensor
    rows: Tensor


_NO_BRANCH = dict.fromkeys(("a", "b", "s", "factor", "slot_of", "order")) | {"scaling": 1.0}
_NO_BRANCH |= dict.fromkeys(("R", "slots", "b_slot_stride", "a_stride", "b_stride", "b_column_stride"), 0)
_NO_BRANCH |= {"factor_stride": 0}


def forward(
    x: Tensor, w: Weight, bias: Tensor | None, branch: Branch | None, cut: Tiles | None = None
) -> tuple[Tensor, Tensor]:
    """(y [M, N] in x's dtype, S float32 [M, R], R = 0 without a branch); ``cut``: instead of the formula's."""
    x = with_contiguous_columns(x)
    cut, parts, span = _split(x, w, cut)
    if branch is None:
        return _product(x, w, bias, cut, parts, span), x.new_empty((x.shape[0], 0), dtype=torch.float32)
    sweeps = branch.seed is None and branch.rank <= _SWEEP_RANK and cut.rows >= _SWEEP_ROWS
    a = with_contiguous_columns(branch.a)
    if sweeps:
        s = x.new_empty((parts, x.shape[0], branch.rank), dtype=torch.float32)
    else:
        s = _projected(x, q=a.t(), scaling=branch.keep_scale, **branch.dropping)[0][None]
    y = _product(
        x,
        w,
        bias,
        cut,
        parts,
        span,
        a=a if sweeps else None,
        b=branch.b,
        s=s,
        R=branch.rank,
        a_stride=a.stride(0),
        b_stride=branch.b.stride(0),
        b_column_stride=branch.b.stride(1),
        **branch.factor,
    )
    return y, _summed(s)


def forward_slots(x: Tensor, w: Weight, bias: Tensor | None, lora: Slots) -> Tensor:
    """y [M, N] in x's dtype, each row of x with the adapter in its slot.

    A block of rows takes the slots that occur in it one by one. More rows than a block has are taken in the order of
    their slots: blocks and slots are then met no more often than they are, together, where unsorted rows may bring
    every slot to every block. The launches are those of the numbers of rows and slots, whatever the slots.
    """
    x = with_contiguous_columns(x)
    (m, k), (slots, r, _) = x.shape, lora.a.shape
    rank, split = _rank_block(r), _split(x, w)
    slot_of, order = lora.rows.sort() if m > split[0].rows else (lora.rows, None)
    s = x.new_empty((triton.cdiv(k, _SPAN), m, r), dtype=torch.float32)
    if s.numel() > 0:
        height = min(max(16, triton.next_power_of_2(m)), 32)
        _slot_sums[(triton.cdiv(m, height), len(s), triton.cdiv(r, rank))](
            x=x,
            a=lora.a,
            slot_of=slot_of,
            order=order,
            s=s,
            slots=slots,
            M=m,
            K=k,
            R=r,
            x_stride=x.stride(0),
            a_slot_stride=lora.a.stride(0),
            a_stride=lora.a.stride(1),
            a_column_stride=lora.a.stride(2),
            SPAN=_SPAN,
            BM=height,
            BK=64,
            RANK=rank,
            PRECISION=_precision(x.dtype),
            num_warps=4,
            **FUSED,
            num_stages=3,
        )
    return _product(
        x,
        w,
        bias,
        *split,
        b=lora.b,
        s=_summed(s),
        factor=lora.scaling,
        slot_of=slot_of,
        order=order,
        slots=slots,
        R=r,
        b_slot_stride=lora.b.stride(0),
        b_stride=lora.b.stride(1),
        b_column_stride=lora.b.stride(2),
    )


def _split(x: Tensor, w: Weight, cut: Tiles | None = None) -> tuple[Tiles, int, int]:
    """(tiles of x · Wᵀ, parts of the sweep, columns of a part)."""
    (m, k), n = x.shape, w.n
    cut = cut or formula(x, w, True)
    span = triton.cdiv(triton.cdiv(k, splits(m, n, k, cut)), cut.depth) * cut.depth if m and n and k else max(k, 1)
    return cut, max(triton.cdiv(k, span), 1), span


def _product(
    x: Tensor, w: Weight, bias: Tensor | None, cut: Tiles, parts: int, span: int, **lora: Tensor | float | None
) -> Tensor:
    """Launches ``_forward`` and adds its parts."""
    m, n = x.shape[0], w.n
    # Of one part no view: what an autograd function returns may be changed in place.
    y = x.new_empty((m, n)) if parts == 1 else x.new_empty((parts, m, n), dtype=torch.float32)
    if y.numel() > 0:
        lora = _NO_BRANCH | lora
        _forward[(triton.cdiv(m, cut.rows) * triton.cdiv(n, cut.columns), parts)](
            x=x,
            y=y,
            bias=None if bias is None else bias.contiguous(),
            M=m,
            x_stride=x.stride(0),
            span=span,
            BM=cut.rows,
            BN=cut.columns,
            RANK=_rank_block(lora["R"]),
            PRECISION=_precision(x.dtype),
            STAGES=cut.stages,
            num_warps=cut.warps,
            **FUSED,
            num_stages=cut.stages,
            **{"BK": cut.depth} | w.arguments(cut.depth, x.dtype) | w.words(cut, x.dtype),
            **lora,
        )
    return y if parts == 1 else y.sum(0).to(x.dtype)


def backward(
    dy: Tensor,
    x: Tensor | None,
    s: Tensor | None,
    w: Weight,
    branch: Branch | None,
    need_x: bool,
    need_a: bool,
    need_b: bool,
    cut: Tiles | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dx [M, K] in dy's dtype, dA float32 [R, K], dB float32 [N, R]), None where not needed.

    Args:
        dy: [M, N].
        x, s: what ``forward`` took and gave; needed for dA and dB.
        cut: of dx's product, instead of the formula's.
    """
    dy = with_contiguous_columns(dy)
    da = db = ds = None
    if branch is not None:
        ds, db = _projected(
            dy,
            q=branch.b if need_x or need_a else None,
            t=s if need_b else None,
            **branch.factor,
        )
        if need_a:
            x = with_contiguous_columns(x)
            da = _projected(x, t=ds, scaling=branch.keep_scale, **branch.dropping)[1].t()
    return (_dx(dy, w, branch, ds, cut or formula(dy, w, False)) if need_x else None), da, db


def _dx(dy: Tensor, w: Weight, branch: Branch | None, ds: Tensor | None, cut: Tiles) -> Tensor:
    m, k = dy.shape[0], w.k
    dx = dy.new_empty((m, k))
    if dx.numel() == 0:
        return dx
    if branch is None:
        arguments = dict.fromkeys(("ds", "a", "seed"))
        arguments |= {"threshold": 0, "keep_scale": 1.0, "R": 0, "a_stride": 0, "a_column_stride": 0}
    else:
        arguments = branch.dropping | {
            "ds": ds,
            "a": branch.a,
            "keep_scale": branch.keep_scale,
            "R": branch.rank,
            "a_stride": branch.a.stride(0),
            "a_column_stride": branch.a.stride(1),
        }
    _input_grad[(triton.cdiv(m, cut.rows) * triton.cdiv(k, cut.columns),)](
        dy=dy,
        dx=dx,
        M=m,
        dy_stride=dy.stride(0),
        BM=cut.rows,
        BN=cut.depth,
        BK=cut.columns,
        RANK=_rank_block(arguments["R"]),
        PRECISION=_precision(dy.dtype),
        num_warps=cut.warps,
        **FUSED,
        num_stages=cut.stages,
        **w.arguments(cut.columns, dy.dtype),
        **arguments,
    )
    return dx


def _projected(
    p: Tensor,
    q: Tensor | None = None,
    t: Tensor | None = None,
    factor: Tensor | None = None,
    factor_stride: int = 0,
    scaling: float = 1.0,
    seed: Tensor | None = None,
    threshold: int = 0,
) -> tuple[Tensor | None, Tensor | None]:
    """((P · Q) ∘ f [M, R], Pᵀ · (T ∘ f) [C, R]) in float32, None without Q or T; f = scaling · factor.

    With a ``seed`` elements of P are dropped; what makes up for that is to be in ``scaling``.
    """
    if q is None and t is None:
        return None, None
    (m, c), r = p.shape, t.shape[1] if q is None else q.shape[1]
    rank = _rank_block(r)
    # Rows that begin anywhere are loaded element by element, each with an address in registers.
    columns = 32 if p.dtype == torch.float32 else 128 if rank <= 32 and p.stride(0) % 8 == 0 else 64
    column_blocks, chunks = max(triton.cdiv(c, columns), 1), max(triton.cdiv(m, _CHUNK), 1)
    pt = None if t is None else p.new_empty((chunks, c, r), dtype=torch.float32)
    if p.numel() == 0:
        zeros = None if q is None else p.new_zeros((m, r), dtype=torch.float32)
        return zeros, (None if t is None else pt[0].zero_())
    step = _CHUNK * (chunks if q is None else max(1, _PARTIAL // (column_blocks * _CHUNK * r)))
    found = []
    for row0 in range(0, m, step):
        height = min(m - row0, step)
        pq = None if q is None else p.new_empty((column_blocks, height, r), dtype=torch.float32)
        _project[(column_blocks, triton.cdiv(height, _CHUNK), triton.cdiv(r, rank))](
            p=p,
            q=q,
            t=t,
            pq=pq,
            pt=pt,
            factor=factor,
            scaling=scaling,
            seed=seed,
            threshold=threshold,
            row0=row0,
            height=height,
            M=m,
            C=c,
            R=r,
            p_stride=p.stride(0),
            q_stride=0 if q is None else q.stride(0),
            q_column_stride=0 if q is None else q.stride(1),
            factor_stride=factor_stride,
            CHUNK=_CHUNK,
            BM=min(max(16, triton.next_power_of_2(m)), 32),
            BC=columns,
            RANK=rank,
            PRECISION=_precision(p.dtype),
            num_warps=4,
            **FUSED,
            num_stages=3,
        )
        found.append(_summed(pq))
        del pq  # before the next
    return (torch.cat(found) if len(found) > 1 else found[0]), _summed(pt)


def _summed(parts: Tensor | None) -> Tensor | None:
    return None if parts is None else parts[0] if len(parts) == 1 else parts.sum(0)


def _rank_block(rank: int) -> int:
    return min(max(16, triton.next_power_of_2(rank)), _RANKS)


def _precision(dtype: torch.dtype) -> str:
    """Of products of float32: beside float16 tf32 carries what that does, in float32's range. Few of AMD's have it."""
    return "tf32" if dtype == torch.float16 and torch.version.hip is None else "ieee"
