"""``quantize_4bit`` and ``dequantize_4bit`` in Triton, bit for bit what the formats' definitions give.

Codes lie in bitsandbytes' order: of the flattened tensor, two to a byte, the high nibble first, one scale a block of
consecutive elements, the last of which may be short. A program takes whole blocks. Divisions are rounded correctly, and
products and sums are not contracted, as the definitions know of neither.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .graphs import constant_on

_ELEMENTS = 4096
"""Of a program: the longest block, or several shorter ones."""
_PER_UNIT, _MIDDLE = tl.constexpr(15.25), tl.constexpr(2.0**23 + 16)
"""Scaled values, -1 to 1, are rounded into bins 1 to 31: bins a unit, and 0's. At no edge of a bin lies a threshold."""


# ---- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit
def _absmax_bits(v):
    """The bits of max |v| of each block, [BLOCKS, 1]; as integers, those of a NaN exceed all others'."""
    return tl.max(v.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1, keep_dims=True)


@triton.jit
def _codebook_codes(v, short, bins, THRESHOLDS: tl.constexpr):
    """(codes int32, absmax) of v float32 [BLOCKS, BLOCKSIZE]: the nearest code, a tie taking the lower rank, NaN the
    last. ``short`` [BLOCKS, 1]: of the short last block; ``bins``: see ``_bins``."""
    absmax = _absmax_bits(v).to(tl.float32, bitcast=True)
    least = tl.full((1, 1), 1e-38, tl.float32)
    least = tl.where(absmax < least, least, absmax)
    scaled = v * tl.div_rn(tl.full((1, 1), 1.0, tl.float32), least)
    # bitsandbytes divides in the short last block and multiplies by the reciprocal elsewhere.
    if tl.program_id(0) == tl.num_programs(0) - 1:
        scaled = tl.where(short, tl.div_rn(v, tl.broadcast_to(least, v.shape)), scaled)
    # The sum is rounded to an integer, which is its low bits: see _integer_codes. NaN's exceed all others'.
    number = tl.fma(scaled, _PER_UNIT, _MIDDLE).to(tl.uint32, bitcast=True) - 0x4B000000
    at = bins + tl.minimum(number, 31).to(tl.int32) * (1 + THRESHOLDS)
    passed = tl.zeros(v.shape, tl.int32)
    for i in tl.static_range(THRESHOLDS):
        passed += tl.where(scaled <= tl.load(at + 1 + i).to(tl.float32, bitcast=True), 0, 4)
    code = tl.load(at) >> passed & 15
    return code, tl.where(short, least, absmax)


@triton.jit
def _integer_codes(v, inside):
    """(codes int32, scale, zero) of v float32 [BLOCKS, BLOCKSIZE]: round((v - low) / scale), ties to even, a NaN 0."""
    nan = _absmax_bits(v) > 0x7F800000
    low = tl.min(tl.where(inside, v, float("inf")), 1, keep_dims=True)
    high = tl.max(tl.where(inside, v, float("-inf")), 1, keep_dims=True)
    low = tl.where(nan, float("nan"), low)
    high = tl.where(nan, float("nan"), high)
    scale = tl.div_rn(high - low, tl.full((1, 1), 15.0, tl.float32))
    inverse = tl.where(scale > 0.0, tl.div_rn(tl.full((1, 1), 1.0, tl.float32), scale), 0.0)
    unit = (v - low) * inverse
    unit = tl.where(unit > 0.0, tl.where(unit < 15.0, unit, 15.0), 0.0)
    # float32 holds integers only from 2^23 on: the sum is rounded to one, which is its low bits.
    return (unit + 8388608.0).to(tl.int32, bitcast=True) & 15, scale, low


@triton.jit
def _quantize(
    w,  # [n]
    codes,  # uint8 [ceil(n / 2)]
    scale,  # float32 [blocks]
    zero,  # float32 [blocks] of a format that has zeros, else None
    bins,  # int32 [32, 1 + THRESHOLDS], see _bins, of a format without zeros, else None
    n,
    byte_count,  # ceil(n / 2)
    BLOCKS: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    THRESHOLDS: tl.constexpr,  # of a bin
    PAD: tl.constexpr,  # the code that fills up the last byte
):
    block = (tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS))[:, None]
    at = block * BLOCKSIZE + tl.arange(0, BLOCKSIZE)[None, :]
    v = tl.load(w + at, mask=at < n, other=0.0).to(tl.float32)
    if zero is None:
        code, s = _codebook_codes(v, (block + 1) * BLOCKSIZE > n, bins, THRESHOLDS)
    else:
        code, s, low = _integer_codes(v, at < n)
        tl.store(zero + block, low, mask=block * BLOCKSIZE < n)
    tl.store(scale + block, s, mask=block * BLOCKSIZE < n)
    code = tl.where(at < n, code, PAD)
    first, second = tl.split(tl.reshape(code, (BLOCKS, BLOCKSIZE // 2, 2)))
    byte = block * (BLOCKSIZE // 2) + tl.arange(0, BLOCKSIZE // 2)[None, :]
    tl.store(codes + byte, (first * 16 + second).to(tl.uint8), mask=byte < byte_count)


@triton.jit
def _dequantize(
    codes,  # uint8 [ceil(n / 2)]
    scale,  # float32 [blocks]
    zero,  # float32 [blocks], or None
    table,  # float32 [16], the value of each code: read from the cache, a load an element
    out,  # [n]
    n,
    byte_count,  # ceil(n / 2)
    BLOCKS: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
):
    block = (tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS))[:, None]
    byte = block * (BLOCKSIZE // 2) + tl.arange(0, BLOCKSIZE // 2)[None, :]
    pair = tl.load(codes + byte, mask=byte < byte_count, other=0)
    v = tl.interleave(tl.load(table + (pair >> 4)), tl.load(table + (pair & 15)))
    inside = block * BLOCKSIZE < n
    v *= tl.load(scale + block, mask=inside, other=0.0)
    if zero is not None:
        # The selection keeps them apart: Triton 3.6's ptxas contracts packed products and sums whatever it is told.
        v = tl.where(inside, v, 0.0) + tl.load(zero + block, mask=inside, other=0.0)
    at = block * BLOCKSIZE + tl.arange(0, BLOCKSIZE)[None, :]
    tl.store(out + at, v.to(out.dtype.element_ty), mask=at < n)


# ---- launches --------------------------------------------------------------------------------------------------------


@functools.cache
def _bins(table: tuple[float, ...], device: torch.device) -> Tensor:
    """int32 [32, 1 + the most thresholds of a bin]: the codes that scaled values of a bin can have, four bits each, in
    order, and the bits of the thresholds between them, among which are some that every value passes, or none.
    """
    ordered, order = torch.tensor(table, dtype=torch.float32, device="cpu").sort(stable=True)  # FP4 holds 0 twice
    thresholds = (ordered[:-1] + ordered[1:]) / 2
    of = (thresholds.double() * _PER_UNIT.value + _MIDDLE.value).float().view(torch.int32) - 0x4B000000
    most = int(of.bincount().max())
    rows = []
    for number in range(32):
        below, here = int((of < number).sum()), thresholds[of == number].tolist()
        first = min(below, 15 - most)  # the rank of the first code
        held = [-math.inf] * (below - first) + here + [math.inf] * most
        codes = sum(int(order[first + i]) << 4 * i for i in range(most + 1))
        rows.append([codes, *torch.tensor(held[:most], device="cpu").view(torch.int32).tolist()])
    return constant_on(torch.tensor(rows, dtype=torch.int32, device="cpu"), device)


def quantize(w: Tensor, table: tuple[float, ...], has_zero: bool, blocksize: int) -> tuple[Tensor, Tensor, Tensor]:
    """(codes uint8 [ceil(n / 2), 1], scale float32 [blocks], zero likewise, empty where the format has none).

    Args:
        w: contiguous, of n elements.
        table: the value of each code.
        has_zero: a block has a zero beside its scale, and codes are integers.
    """
    n = w.numel()
    blocks = triton.cdiv(n, blocksize)
    codes = w.new_empty((triton.cdiv(n, 2), 1), dtype=torch.uint8)
    scale = w.new_empty(blocks, dtype=torch.float32)
    zero = w.new_empty(blocks if has_zero else 0, dtype=torch.float32)
    if n > 0:
        bins = None if has_zero else _bins(table, w.device)
        _quantize[(triton.cdiv(n, _ELEMENTS),)](
            w=w,
            codes=codes,
            scale=scale,
            zero=zero if has_zero else None,
            n=n,
            byte_count=len(codes),
            bins=bins,
            THRESHOLDS=0 if has_zero else bins.shape[1] - 1,
            PAD=min(range(16), key=lambda code: abs(table[code])),
            **_blocks_of(blocksize),
        )
    return codes, scale, zero


def dequantize(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    table: Tensor,
    blocksize: int,
    shape: list[int],
    dtype: torch.dtype,
) -> Tensor:
    """The tensor of ``shape``, decoded in float32 and rounded once.

    Args:
        codes: uint8 [ceil(n / 2), 1].
        scale, zero: float32 [blocks].
        table: float32 [16], the value of each code.
    """
    out = codes.new_empty(shape, dtype=dtype)
    if out.numel() > 0:
        _dequantize[(triton.cdiv(out.numel(), _ELEMENTS),)](
            codes=codes,
            scale=scale,
            zero=zero,
            table=table,
            out=out,
            n=out.numel(),
            byte_count=len(codes),
            **_blocks_of(blocksize),
        )
    return out


def _blocks_of(blocksize: int) -> dict:
    warps = 4 if torch.version.hip is None else 2  # 128 threads, each with 16 bytes of codes
    return {"BLOCKS": _ELEMENTS // blocksize, "BLOCKSIZE": blocksize, "num_warps": warps, "enable_fp_fusion": False}
