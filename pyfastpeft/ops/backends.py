"""Which implementation serves a call: the one place that decides."""

from __future__ import annotations

import enum
import os

import torch
from torch import Tensor

from ..formats import Packed4bit, format_of
from ..formats.packed import dequantize_reference, quantize_reference
from . import triton_kernels
from .triton_kernels import why_not

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""The dtypes that the compiled operators take."""


class Backend(enum.Enum):
    """``NATIVE``: the compiled operators. ``TRITON``: kernels for GPUs. ``REFERENCE``: plain torch, any device."""

    NATIVE = "native"
    TRITON = "triton"
    REFERENCE = "reference"


NATIVE = Backend.NATIVE
"""For the path of every token: in Python 3.11 a name looked up in an enumeration costs a fifth of a microsecond."""


def _forced() -> Backend | None:
    name = os.environ.get("PYFASTPEFT_BACKEND")
    if not name:
        return None
    try:
        return Backend(name)
    except ValueError:
        choices = ", ".join(b.value for b in Backend)
        raise ValueError(f"PYFASTPEFT_BACKEND is {name!r}; it must be one of {choices}") from None


_FORCED = _forced()


def _check_forced(device: torch.device) -> None:
    if _FORCED is Backend.TRITON and (why := why_not(device)) is not None:
        raise RuntimeError(f"PYFASTPEFT_BACKEND is 'triton', and {why}")


def choose(w: Packed4bit) -> Backend:
    """The backend for ``w``.

    Native for CPU weights in tiles, Triton for weights on a GPU that it compiles for, else the reference (dequantize,
    then a dense product). ``PYFASTPEFT_BACKEND`` forces one; ``native`` only where it can serve.

    Raises:
        RuntimeError: Triton is forced and cannot serve; it says why.
    """
    if _FORCED is None and w.layout == "tiles":
        return NATIVE
    _check_forced(w.device)
    if _FORCED in (Backend.TRITON, Backend.REFERENCE):
        return _FORCED
    if w.layout == "tiles":
        return Backend.NATIVE
    return Backend.TRITON if w.device.type == "cuda" and why_not(w.device) is None else Backend.REFERENCE


def choose_plain(device: torch.device) -> Backend:
    """The backend for operators over plain tensors on ``device``: norms, activations, losses, attention, quantization.

    Native on a CPU, Triton on a GPU that it compiles for, else the reference.

    Raises:
        RuntimeError: as ``choose``.
    """
    _check_forced(device)
    if _FORCED is Backend.REFERENCE:
        return _FORCED
    if device.type in triton_devices():
        return Backend.TRITON if why_not(device) is None else Backend.REFERENCE
    return Backend.NATIVE if device.type == "cpu" else Backend.REFERENCE


_MOST_HEAD_SIZE = 256
"""Of the attention kernels."""


def choose_attention(q: Tensor) -> Backend:
    """The backend for attention with queries ``q`` [..., D]: as for plain tensors, but for float64 and large heads,
    which only the reference has.

    Raises:
        RuntimeError: as ``choose``.
    """
    chosen = choose_plain(q.device)
    return chosen if q.dtype in FLOATS and q.shape[-1] <= _MOST_HEAD_SIZE else Backend.REFERENCE


def triton_devices() -> list[str]:
    """The types of device whose operators are Triton kernels: GPUs, and the CPU where it is forced."""
    return ["cuda", "cpu"] if _FORCED is Backend.TRITON else ["cuda"]


# The names of the compiled operators, where they are not compiled: to torch.compile one node, whatever serves it.
_COMPILED = (
    "rms_norm",
    "rms_norm_backward",
    "swiglu",
    "swiglu_backward",
    "rope",
    "cross_entropy",
    "prefix_attention",
    "prefix_attention_backward",
)
for _name in _COMPILED:
    torch.library.register_kernel(f"pyfastpeft::{_name}", triton_devices(), getattr(triton_kernels, _name))


def _quantize_4bit(w: Tensor, format: int, blocksize: int) -> tuple[Tensor, Tensor, Tensor]:
    if choose_plain(w.device) is Backend.TRITON:
        return triton_kernels.quantize_4bit(w, format, blocksize)
    codes, scale, zero = quantize_reference(w, format_of(format), blocksize)
    return codes, scale, scale.new_empty(0) if zero is None else zero


def _dequantize_4bit(
    codes: Tensor, scale: Tensor, zero: Tensor | None, format: int, blocksize: int, shape: list[int], dtype: torch.dtype
) -> Tensor:
    if choose_plain(codes.device) is Backend.TRITON:
        return triton_kernels.dequantize_4bit(codes, scale, zero, format, blocksize, shape, dtype)
    return dequantize_reference(codes, scale, zero, format_of(format), blocksize, shape, dtype)


torch.library.impl("pyfastpeft::quantize_4bit", "CompositeExplicitAutograd", _quantize_4bit)
torch.library.impl("pyfastpeft::dequantize_4bit", "CompositeExplicitAutograd", _dequantize_4bit)
