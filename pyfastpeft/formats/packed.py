"""Packed4bit: a tensor in 4 bits, in one of two lossless layouts.

``rows`` is the interchange layout, bitsandbytes' own: codes of the flattened tensor two to a byte (high nibble first),
scales one a block. ``tiles`` is the order in which the CPU kernels read a matrix [N, K] (csrc/cpu/weight.h): 16 rows to
a tile, padded with zeros. A matrix on the CPU is kept in tiles only; every way out converts back.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from .codes import Format, check_settings, format_of, get_format, pack_nibbles, unpack_nibbles
from .double_quant import NestedScales, dequantize_scales, quantize_scales
from .handles import WeightHandle

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""The dtypes that the compiled operators take."""

_ALIGNMENT = 16  # of codes on a GPU, in bytes


def is_full_precision(dtype: torch.dtype) -> bool:
    """Whether a weight in ``dtype`` is what a layer multiplies by: integers and float8 are codes with scales beside."""
    return dtype.is_floating_point and dtype.itemsize > 1


class Operands(NamedTuple):
    """A matrix [N, K] as the operators take it, in the order of their schemas.

    Attributes:
        codes, scale, zero: as in :class:`Packed4bit`.
        absmax2, offset: of :class:`NestedScales`, None where scales are not double-quantized.
        format: its number, ``Format.id``.
        n: the rows of the matrix; K follows from the codes, or from x.
        blocksize: as in :class:`Packed4bit`.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    absmax2: Tensor | None
    offset: Tensor | None
    format: int
    n: int
    blocksize: int


@dataclass(frozen=True, eq=False)
class Packed4bit:
    """A tensor of ``shape`` and original ``dtype``, held in 4 bits. Immutable: every change makes another.

    Attributes:
        codes: uint8. ``rows``: [(numel + 1) // 2, 1]; ``tiles``: [ceil(N / 16), 8 * K].
        scale: float32, or uint8 when double-quantized. ``rows``: [blocks]; ``tiles``: [ceil(N / 16), K / segment, 16],
            a segment being the greatest common divisor of K and ``blocksize``.
        zero: float32 like ``scale`` (INT4), else None.
        nested: second-level scales when double-quantized (always in block order), else None.
        operands: the same as the operators take it, made once.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    nested: NestedScales | None
    shape: torch.Size
    dtype: torch.dtype
    quant_type: str
    blocksize: int
    layout: str = "rows"
    operands: Operands = field(init=False, repr=False)

    def __post_init__(self) -> None:
        nested = (None, None) if self.nested is None else (self.nested.absmax2, self.nested.offset)
        rows = self.shape[0] if self.shape else 1
        operands = Operands(self.codes, self.scale, self.zero, *nested, self.format.id, rows, self.blocksize)
        object.__setattr__(self, "operands", operands)

    @classmethod
    def of_operands(cls, w: Operands, k: int, layout: str = "rows") -> Packed4bit:
        """The matrix [N, K] whose :attr:`operands` these are; its dtype is float32."""
        nested = None if w.absmax2 is None else NestedScales(w.absmax2, w.offset)
        shape, name = torch.Size((w.n, k)), format_of(w.format).name
        return cls(w.codes, w.scale, w.zero, nested, shape, torch.float32, name, w.blocksize, layout)

    @functools.cached_property
    def handle(self) -> WeightHandle:
        """This weight, in tiles, as compiled inference takes it: checked once."""
        # Of threads that come at the same time, which are not kept apart from Python 3.12 on, all get the first one's:
        # another's would be released, and its number another weight's, while it is in use.
        return vars(self).setdefault("handle", WeightHandle(torch.ops.pyfastpeft.hold_weight.default(*self.operands)))

    def __getstate__(self) -> dict:
        return {name: value for name, value in vars(self).items() if name not in ("handle", "operands")}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self.__post_init__()
        vars(self).update(vars(self.prepared()))  # torch.load(map_location=...) has moved the tensors as they were

    @property
    def format(self) -> Format:
        """What ``quant_type`` names."""
        return get_format(self.quant_type)

    @property
    def device(self) -> torch.device:
        """Where codes and scales are."""
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Bytes held, scales included."""
        return sum(t.numel() * t.element_size() for t in self._tensors().values())

    def _tensors(self) -> dict[str, Tensor]:
        held = {"codes": self.codes, "scale": self.scale}
        if self.zero is not None:
            held["zero"] = self.zero
        if self.nested is not None:
            held |= {"absmax2": self.nested.absmax2, "offset": self.nested.offset}
        return held

    def __repr__(self) -> str:
        double = ", double_quant" if self.nested is not None else ""
        return (
            f"Packed4bit({self.quant_type}, shape={tuple(self.shape)}, blocksize={self.blocksize}{double}, "
            f"dtype={self.dtype}, device={self.device}, {self.nbytes} bytes)"
        )

    def map_bytes(self, fn: Callable[[Tensor], Tensor]) -> Packed4bit:
        """Apply ``fn`` (a move or a copy) to every tensor *as bytes*, so that no dtype conversion can touch a value."""

        def one(t: Tensor) -> Tensor:
            # A scalar cannot be viewed as bytes of another size; and `Module.type` converts bytes as well.
            return fn(t.reshape(-1).view(torch.uint8)).to(torch.uint8).view(t.dtype).view(t.shape)

        out = {name: one(t) for name, t in self._tensors().items()}
        nested = None if self.nested is None else NestedScales(out["absmax2"], out["offset"])
        return replace(self, codes=out["codes"], scale=out["scale"], zero=out.get("zero"), nested=nested)

    def to(self, device: torch.device | str, copy: bool = False) -> Packed4bit:
        """The same weight on ``device``, in that device's layout; with ``copy`` it shares no memory with this one.

        Raises:
            TypeError: ``device`` is not one: a dtype, for example.
        """
        try:
            device = torch.device(device)
        except TypeError:
            what = "it must be a torch.device or its name; dequantize(dtype) gives another dtype"
            raise TypeError(f"device is {device!r}; {what}") from None
        moved = self if device == self.device else self.rows().map_bytes(lambda t: t.to(device)).prepared()
        if not copy:
            return moved
        # A layout or a device that changes has made copies already: peak memory counts.
        held = {t.data_ptr() for t in self._tensors().values()}
        return moved.prepared().map_bytes(lambda t: t.clone() if t.data_ptr() in held else t)

    def clone(self) -> Packed4bit:
        """A copy with memory of its own, in the same layout."""
        return self.map_bytes(_copy)

    def __deepcopy__(self, memo: dict) -> Packed4bit:
        return memo.setdefault(id(self), self.clone())

    def prepared(self) -> Packed4bit:
        """The layout the kernels of this device read; ``self`` where it already is."""
        if self.device.type == "cpu":
            return self.tiles() if self.tileable else self
        rows = self.rows()
        if self.device.type == "cuda" and rows.codes.storage_offset() % _ALIGNMENT:
            return replace(rows, codes=rows.codes.clone())
        return rows

    @property
    def tileable(self) -> bool:
        """Whether the ``tiles`` layout can hold this tensor: a matrix whose rows are whole 32-element segments."""
        return len(self.shape) == 2 and self.shape[0] > 0 and self.shape[1] > 0 and self.shape[1] % 32 == 0

    def tiles(self) -> Packed4bit:
        """This matrix in the ``tiles`` layout."""
        if self.layout == "tiles":
            return self
        if not self.tileable:
            raise ValueError(f"shape is {tuple(self.shape)}; the tiles layout needs a matrix with K a multiple of 32")
        n, k = self.shape
        codes = torch.ops.pyfastpeft.pack_tiles.default(self.codes, n, k)
        return self._relaid(codes, torch.ops.pyfastpeft.pack_scales.default, "tiles")

    def rows(self) -> Packed4bit:
        """This tensor in the ``rows`` layout; ``self`` where it already is."""
        if self.layout == "rows":
            return self
        if self.device.type not in ("cpu", "meta"):  # which alone have the operators
            return self.map_bytes(Tensor.cpu).rows().map_bytes(lambda t: t.to(self.device))
        n, k = self.shape
        codes = torch.ops.pyfastpeft.unpack_tiles.default(self.codes, n, k)
        return self._relaid(codes, torch.ops.pyfastpeft.unpack_scales.default, "rows")

    def _relaid(self, codes: Tensor, relay: Callable[..., Tensor], layout: str) -> Packed4bit:
        scale = relay(self.scale, *self.shape, self.blocksize)
        zero = None if self.zero is None else relay(self.zero, *self.shape, self.blocksize)
        return replace(self, codes=codes, scale=scale, zero=zero, layout=layout)

    def block_scales(self) -> Tensor:
        """Float32 scales [blocks], double quantization undone."""
        scale = self.rows().scale
        return scale if self.nested is None else dequantize_scales(scale, self.nested)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The tensor in full precision, ``shape`` and ``dtype``.

        Decoded in float32, and rounded once to any other dtype.

        Raises:
            TypeError: ``dtype`` is no floating-point dtype.
        """
        if dtype in FLOATS:
            rows = self.rows()
            return torch.ops.pyfastpeft.dequantize_4bit.default(
                rows.codes, rows.block_scales(), rows.zero, self.format.id, self.blocksize, list(self.shape), dtype
            )
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise TypeError(f"dtype is {dtype!r}; it must be a floating-point torch.dtype")
        return self.reference(dtype)

    def reference(self, dtype: torch.dtype) -> Tensor:
        """:meth:`dequantize` in plain torch, on any device: what the kernels are held to."""
        rows = self.rows()
        return dequantize_reference(
            rows.codes, rows.block_scales(), rows.zero, self.format, self.blocksize, self.shape, dtype
        )


def _copy(t: Tensor) -> Tensor:
    copy = t.clone()
    if t.is_cpu:
        torch.ops.pyfastpeft.large_pages.default(copy)
    return copy


def quantize_4bit(
    weight: Tensor, quant_type: str = "nf4", blocksize: int = 64, double_quant: bool = False
) -> Packed4bit:
    """Quantize a tensor to 4 bits.

    Args:
        weight: float32, bfloat16 or float16, any shape and strides. Blocks run over the flattened tensor.
        quant_type: ``"nf4"``, ``"fp4"`` (both bit-identical to bitsandbytes) or ``"int4"`` (scale and zero a block).
        blocksize: elements a scale; a power of two, 32 to 4096 (``"int4"``: 32, 64 or 128).
        double_quant: keep the scales themselves in 8 bits (``"nf4"`` and ``"fp4"``).

    Returns:
        Packed4bit of the same shape, in the layout its device's kernels read.

    Raises:
        TypeError: ``weight`` is not a dense floating-point tensor.
        ValueError: an unknown ``quant_type``, a ``blocksize`` the format does not allow, ``double_quant`` with INT4, or
            for INT4 a block of which float32 cannot hold the span.
    """
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight is a {type(weight).__name__}; it must be a torch.Tensor")
    if weight.layout is not torch.strided:
        raise TypeError(f"weight has layout {weight.layout}; it must be dense")
    if weight.dtype not in FLOATS:
        raise TypeError(f"weight has dtype {weight.dtype}; it must be float32, bfloat16 or float16")
    fmt, blocksize = check_settings(quant_type, blocksize, double_quant)
    weight = weight.detach()
    codes, scale, zero = torch.ops.pyfastpeft.quantize_4bit.default(weight.contiguous(), fmt.id, blocksize)
    zero = zero if fmt.has_zero else None
    if fmt.has_zero and not (scale.is_meta or torch.compiler.is_compiling() or is_fake(scale)):
        _check_span(weight, scale, blocksize)
    nested = None
    if double_quant:
        scale, nested = quantize_scales(scale)
    return Packed4bit(codes, scale, zero, nested, weight.shape, weight.dtype, quant_type, blocksize).prepared()


def _check_span(weight: Tensor, scale: Tensor, blocksize: int) -> None:
    """What is decoded as a multiple of the scale, which infinite values make NaN, finite ones must not overflow."""
    if (scale * 15).isinf().any() and weight.isfinite().all():
        low, high = (float(v) for v in weight.aminmax())
        raise ValueError(
            f"weight lies in [{low:.3g}, {high:.3g}], and a block of {blocksize} of it spans more than float32 holds; "
            "int4 counts from a block's least value, 'nf4' and 'fp4' take it"
        )


def quantize_reference(weight: Tensor, fmt: Format, blocksize: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes (``rows`` layout), scales and zeros in plain torch, on any device."""
    flat = weight.reshape(-1).float()
    codes, scale, zero = fmt.quantize(flat, blocksize)
    return pack_nibbles(codes, fmt), scale, zero


def dequantize_reference(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    fmt: Format,
    blocksize: int,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """The inverse of :func:`quantize_reference`, as a tensor of ``shape``."""
    flat = fmt.dequantize(unpack_nibbles(codes, math.prod(shape)), scale, zero, blocksize)
    return flat.view(shape).to(dtype)
