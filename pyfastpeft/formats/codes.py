"""The 4-bit number formats: one class each, owning its code table, its quantizer and its decoder.

Every format reads ``value = table[code] * scale (+ zero)``, one ``scale`` (and, for INT4, one ``zero``) a block of
``blocksize`` consecutive elements of the flattened tensor. The methods here are the readable reference in torch; the
compiled kernels are held to them bit for bit.
"""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from typing import SupportsIndex

import torch
from torch import Tensor

# NF4: the information-theoretically optimal code for N(0, 1) weights (Dettmers et al. 2023, QLoRA, appendix E).
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# Times NF4.bf16_factor; csrc/codes.h says why these.
_NF4_BF16 = (
    -1.0234375, -0.71484375, -0.5390625, -0.404296875, -0.291015625, -0.1884765625, -0.09326171875, 0.0, 0.08154296875,
    0.1640625, 0.251953125, 0.345703125, 0.451171875, 0.578125, 0.7421875, 1.0234375,
)  # fmt: skip
# FP4 (sign, 2 exponent bits, 1 mantissa bit) in bit-pattern order, as multiples of 1/12 of the block maximum.
_FP4_TWELFTHS = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)


class Format(ABC):
    """One 4-bit number format.

    Attributes:
        name: the public name, ``quant_type`` in bitsandbytes' terms.
        id: the number the compiled kernels know it by.
        table: float32 [16], the value of each code before scaling.
        bf16_table: bfloat16 [16], the same times ``bf16_factor``, where products are in bfloat16 and their sums are
            scaled.
        has_zero: whether blocks carry an additive ``zero`` beside their scale.
        blocksizes: the block sizes the format allows.
    """

    name: str
    id: int
    table: Tensor
    bf16_table: Tensor
    bf16_factor: float = 1.0
    has_zero: bool = False
    blocksizes: tuple[int, ...] = (32, 64, 128, 256, 512, 1024, 2048, 4096)

    @abstractmethod
    def quantize(self, flat: Tensor, blocksize: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Quantize float32 ``flat`` [n] to (codes uint8 [n], scale float32 [blocks], zero or None)."""

    def dequantize(self, codes: Tensor, scale: Tensor, zero: Tensor | None, blocksize: int) -> Tensor:
        """Decode ``codes`` uint8 [n] to float32 [n]."""
        n = codes.numel()
        per_element = torch.arange(n, device=codes.device) // blocksize
        out = self.table.to(codes.device)[codes.long()]
        out = out * scale[per_element]
        return out if zero is None else out + zero[per_element]


class _Codebook(Format):
    """A format whose scale is the block's absolute maximum; the quantizer is bitsandbytes' to the bit."""

    def quantize(self, flat: Tensor, blocksize: int) -> tuple[Tensor, Tensor, None]:
        full = flat.numel() // blocksize * blocksize
        blocks, tail = flat[:full].view(-1, blocksize), flat[full:]
        absmax = blocks.abs().amax(-1)
        scaled = (blocks * (1.0 / absmax.clamp(min=1e-38))[:, None]).flatten()
        if tail.numel():
            # bitsandbytes divides in the short last block and multiplies by the reciprocal elsewhere.
            tail_absmax = tail.abs().amax().clamp(min=1e-38)
            absmax = torch.cat([absmax, tail_absmax[None]])
            scaled = torch.cat([scaled, tail / tail_absmax])
        order = self.table.argsort()
        ordered = self.table[order]
        midpoints = ((ordered[:-1] + ordered[1:]) / 2).to(flat.device)
        codes = torch.bucketize(scaled.clamp(-1, 1), midpoints)
        return order.to(flat.device)[codes].to(torch.uint8), absmax, None


class NF4(_Codebook):
    name = "nf4"
    id = 0
    table = torch.tensor(_NF4, dtype=torch.float32, device="cpu")
    bf16_table = torch.tensor(_NF4_BF16, dtype=torch.bfloat16, device="cpu")
    bf16_factor = 1.0243


class FP4(_Codebook):
    name = "fp4"
    id = 1
    # Code 8, the negative zero of the bit pattern, decodes to +0.0 as in bitsandbytes.
    table = torch.tensor(_FP4_TWELFTHS + tuple(0.0 - v for v in _FP4_TWELFTHS), dtype=torch.float32, device="cpu") / 12
    bf16_factor = 0.75  # sixteenths, which bfloat16 has
    bf16_table = (table * bf16_factor).bfloat16()


class INT4(Format):
    """Unsigned 4-bit integers with a scale and a zero a block: ``value = code * scale + zero``.

    ``zero`` is the value of code 0, in the unit of the weight. GGUF's Q4_1 is (d, m) and its Q4_0 is (d, -8 d), both
    held exactly.
    """

    name = "int4"
    id = 2
    table = torch.arange(16, dtype=torch.float32, device="cpu")
    bf16_table = table.bfloat16()
    has_zero = True
    blocksizes = (32, 64, 128)

    def quantize(self, flat: Tensor, blocksize: int) -> tuple[Tensor, Tensor, Tensor]:
        n = flat.numel()
        blocks = -(-n // blocksize)
        padded = torch.cat([flat, flat[-1:].expand(blocks * blocksize - n)]).view(blocks, blocksize)
        low, high = padded.amin(-1), padded.amax(-1)
        # By a tensor: a number's reciprocal is what a GPU multiplies with, which is not the CPU's quotient.
        scale = (high - low) / low.new_full((), 15.0)
        inverse = torch.where(scale > 0, 1 / scale, torch.zeros_like(scale))
        codes = torch.round((padded - low[:, None]) * inverse[:, None]).nan_to_num(0.0).clamp(0, 15)
        return codes.flatten()[:n].to(torch.uint8), scale, low


FORMATS: dict[str, Format] = {f.name: f for f in (NF4(), FP4(), INT4())}


def get_format(quant_type: str) -> Format:
    """The format called ``quant_type``; ValueError names the choices."""
    try:
        return FORMATS[quant_type]
    except (KeyError, TypeError):
        raise ValueError(f"quant_type is {quant_type!r}; it must be one of {', '.join(map(repr, FORMATS))}") from None


def format_of(id: int) -> Format:
    """The format that the compiled kernels know by ``id``."""
    return next(f for f in FORMATS.values() if f.id == id)


def check_blocksize(fmt: Format, blocksize: SupportsIndex) -> int:
    """``blocksize`` as a plain int, which JSON and the operators take; numpy's integers are welcome."""
    try:
        size = operator.index(blocksize)
    except TypeError:
        size = None
    if size not in fmt.blocksizes:
        allowed = ", ".join(map(str, fmt.blocksizes))
        raise ValueError(f"blocksize is {blocksize!r}; for quant_type {fmt.name!r} it must be one of {allowed}")
    return size


def check_settings(quant_type: str, blocksize: SupportsIndex, double_quant: bool) -> tuple[Format, int]:
    """What to quantize by: the format called ``quant_type``, and ``blocksize`` as a plain int.

    Raises:
        ValueError: an unknown ``quant_type``, a ``blocksize`` the format does not allow, a ``double_quant`` that is no
            bool, or is True with INT4.
    """
    fmt = get_format(quant_type)
    if not isinstance(double_quant, bool):
        raise ValueError(f"double_quant is {double_quant!r}; it must be True or False")
    if double_quant and fmt.has_zero:
        raise ValueError("double_quant is True; it applies to 'nf4' and 'fp4', int4 keeps a scale and a zero a block")
    return fmt, check_blocksize(fmt, blocksize)


def pack_nibbles(codes: Tensor, fmt: Format) -> Tensor:
    """Codes uint8 [n] to bytes uint8 [(n + 1) // 2, 1]; the high nibble is the first element (bitsandbytes' order).

    An odd count is padded with the code of 0.0, as bitsandbytes does.
    """
    if codes.numel() % 2:
        codes = torch.cat([codes, codes.new_full((1,), int(fmt.table.abs().argmin()))])
    return (codes[::2] << 4 | codes[1::2]).unsqueeze(1)


def unpack_nibbles(packed: Tensor, n: int) -> Tensor:
    """Inverse of :func:`pack_nibbles`: bytes to ``n`` codes."""
    flat = packed.reshape(-1)
    return torch.stack([flat >> 4, flat & 15], dim=1).flatten()[:n]
