"""Which implementation serves a call: the one place that decides."""

from __future__ import annotations

import enum
import os
import warnings

import torch
from torch import Tensor, nn

from ..formats import Packed4bit, format_of
from ..formats.packed import FLOATS, dequantize_reference, quantize_reference
from . import cuda_kernels, triton_kernels
from .cuda_kernels import most_rows
from .cuda_kernels import why_not as why_not_cuda
from .library import remembered
from .triton_kernels import why_not as why_not_triton


def is_plain(t: Tensor) -> bool:
    """Whether operators may read what is in the memory of ``t``: a dense tensor, and none that only says it has these
    values, as torchao's quantized weights do."""
    return type(t) in (Tensor, nn.Parameter) and t.layout is torch.strided and not t.is_nested


def as_rows(t: Tensor) -> Tensor:
    """``t`` [..., size] as a matrix [rows, size], of which either may be 0: that of a -1 is then unknown to torch."""
    return t.flatten(0, -2) if t.dim() > 1 else t.reshape(1, -1)


class Backend(enum.Enum):
    """``NATIVE``: compiled for CPUs. ``CUDA``: compiled for NVIDIA's GPUs, inference of few rows. ``SLABS``: torch's
    dense product over W decoded slab by slab. ``TRITON``: kernels for GPUs. ``REFERENCE``: plain torch, any device."""

    NATIVE = "native"
    CUDA = "cuda"
    SLABS = "slabs"
    TRITON = "triton"
    REFERENCE = "reference"


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
_DENSE_ROWS = 256
"""Rows from which on a dense product, which runs at the tensor cores' speed, is worth decoding W into memory."""
_WHOLE_ROWS = 1024
"""The same where Triton decodes it, all at once, which leaves the cache: an A100 would gain from 512 rows on, an H100
from 1024 (``bench.gpu_estimate``)."""


@remembered
def _serving(device: torch.device) -> tuple[bool, bool]:
    """Whether the CUDA and the Triton kernels serve ``device``. Says once what a GPU lacks."""
    if device.type != "cuda":
        return False, False
    no_cuda, no_triton = why_not_cuda(device), why_not_triton(device)
    if no_cuda is not None and torch.version.hip is None:
        instead = "Triton's kernels serve" if no_triton is None else f"plain torch serves, as {no_triton}"
        said = f"pyfastpeft's CUDA kernels are not used on {device}: {no_cuda}. {instead}, slower."
        warnings.warn(said, stacklevel=2)
    elif no_triton is not None:
        said = f"pyfastpeft's Triton kernels are not used on {device}: {no_triton}. Plain torch serves, slower."
        warnings.warn(said, stacklevel=2)
    return no_cuda is None, no_triton is None


def _check_forced(device: torch.device, *having: Backend) -> None:
    """``having``: those that have such a kernel."""
    if _FORCED in having:
        why_not = why_not_cuda if _FORCED is Backend.CUDA else why_not_triton
        if (why := why_not(device)) is not None:
            raise RuntimeError(f"PYFASTPEFT_BACKEND is {_FORCED.value!r}, and {why}")


def native(w: Packed4bit) -> bool:
    """Whether the CPU operators serve ``w``, whatever it is multiplied with."""
    # For every token: in Python 3.11 a name looked up in an enumeration costs a fifth of a microsecond.
    return w.layout == "tiles" and (_FORCED is None or _FORCED is Backend.NATIVE)


def choose(w: Packed4bit, rows: int, dtype: torch.dtype, infers: bool, drops: bool = False) -> Backend:
    """The backend for ``w`` and ``rows`` rows of ``dtype``.

    On a CPU the native operators, for weights in tiles. On a GPU the CUDA kernels as far as they go; above, slabs from
    256 rows on; Triton's kernels for the rest, or slabs where Triton cannot serve. Where Triton stands alone, slabs
    from 1024 rows on, but on AMD's, about which nothing is known. Else the reference (dequantize, then a dense
    product). ``PYFASTPEFT_BACKEND`` forces one: ``native`` only where it can serve; ``cuda`` means slabs too.

    Args:
        infers: nothing is recorded for autograd, and what scales the LoRA branch is the same for all rows, or a bank.
        drops: the LoRA branch has dropout, which Triton's kernels do in passing.

    Raises:
        RuntimeError: CUDA or Triton is forced and cannot serve; it says why.
    """
    if native(w):
        return Backend.NATIVE
    _check_forced(w.device, Backend.CUDA, Backend.TRITON)
    if _FORCED in (Backend.SLABS, Backend.TRITON, Backend.REFERENCE):
        return _FORCED
    cuda, triton = _serving(w.device)
    triton = triton and _FORCED is not Backend.CUDA
    if cuda:
        if infers and not drops and rows <= most_rows(w, dtype):
            return Backend.CUDA
        if not triton or (rows >= _DENSE_ROWS and not drops):
            return Backend.SLABS
    elif triton and rows >= _WHOLE_ROWS and not drops and torch.version.hip is None:
        return Backend.SLABS
    return Backend.TRITON if triton else Backend.REFERENCE


def choose_plain(device: torch.device) -> Backend:
    """The backend for operators over plain tensors on ``device``: norms, activations, losses, attention.

    Native on a CPU, Triton on a GPU that it compiles for, else the reference. Where a backend is forced that has no
    such operator (``cuda``, ``slabs``), plain torch computes it, not the kernels of a third.

    Raises:
        RuntimeError: Triton is forced and cannot serve; it says why.
    """
    _check_forced(device, Backend.TRITON)
    if _FORCED in (Backend.REFERENCE, Backend.CUDA, Backend.SLABS):
        return Backend.REFERENCE
    if _FORCED is Backend.TRITON:
        return Backend.TRITON
    if device.type == "cuda":
        return Backend.TRITON if _serving(device)[1] else Backend.REFERENCE
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


_TRITON_DEVICES = ["cuda", "cpu"] if _FORCED is Backend.TRITON else ["cuda"]
# The names of the compiled operators, where they are not compiled: to torch.compile one node, whatever serves it.
_COMPILED = (
    "rms_norm",
    "rms_norm_backward",
    "swiglu",
    "swiglu_backward",
    "rope",
    "cross_entropy_",
    "prefix_attention",
    "prefix_attention_backward",
)
for _name in _COMPILED:
    torch.library.register_kernel(f"pyfastpeft::{_name}", _TRITON_DEVICES, getattr(triton_kernels, _name))


def choose_quantizer(device: torch.device) -> Backend:
    """The backend that quantizes and decodes whole tensors: native on a CPU whatever is forced, since weights are
    prepared there for other devices; else as for plain tensors, but CUDA where its kernels serve.

    Raises:
        RuntimeError: as ``choose``.
    """
    if device.type == "cpu":
        return Backend.NATIVE
    _check_forced(device, Backend.CUDA, Backend.TRITON)
    cuda = _FORCED not in (Backend.TRITON, Backend.REFERENCE) and _serving(device)[0]
    return Backend.CUDA if cuda else choose_plain(device)


_QUANTIZERS = {Backend.CUDA: cuda_kernels, Backend.TRITON: triton_kernels}


def _quantize_4bit(w: Tensor, format: int, blocksize: int) -> tuple[Tensor, Tensor, Tensor]:
    kernels = _QUANTIZERS.get(choose_quantizer(w.device))
    if kernels is not None:
        return kernels.quantize_4bit(w, format, blocksize)
    codes, scale, zero = quantize_reference(w, format_of(format), blocksize)
    return codes, scale, scale.new_empty(0) if zero is None else zero


def _dequantize_4bit(
    codes: Tensor, scale: Tensor, zero: Tensor | None, format: int, blocksize: int, shape: list[int], dtype: torch.dtype
) -> Tensor:
    kernels = _QUANTIZERS.get(choose_quantizer(codes.device))
    if kernels is not None:
        return kernels.dequantize_4bit(codes, scale, zero, format, blocksize, shape, dtype)
    return dequantize_reference(codes, scale, zero, format_of(format), blocksize, shape, dtype)


torch.library.impl("pyfastpeft::quantize_4bit", "CompositeExplicitAutograd", _quantize_4bit)
torch.library.impl("pyfastpeft::dequantize_4bit", "CompositeExplicitAutograd", _dequantize_4bit)
