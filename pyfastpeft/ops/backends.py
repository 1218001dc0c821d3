"""Which implementation serves a call: the one place that decides."""

from __future__ import annotations

import enum
import functools
import os
import warnings

import torch
from torch import Tensor

from ..formats import Packed4bit, why_not_cuda
from .cuda_kernels import most_rows
from .triton_kernels import why_not as why_not_triton

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""The dtypes that the compiled operators take."""


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


@functools.cache
@torch.compiler.assume_constant_result
def _serving(device: torch.device) -> tuple[bool, bool]:
    """Whether the CUDA and the Triton kernels serve ``device``. Says once what a GPU lacks."""
    if device.type != "cuda":
        return False, False
    no_cuda, no_triton = why_not_cuda(device), why_not_triton(device)
    if no_cuda is not None and torch.version.hip is None:
        instead = "Triton's kernels serve" if no_triton is None else f"plain torch serves, as {no_triton}"
        said = f"pyfastpeft's CUDA kernels are not used on {device}: {no_cuda}. {instead}, slower."
        warnings.warn(said, stacklevel=2)
    return no_cuda is None, no_triton is None


def native(w: Packed4bit) -> bool:
    """Whether the CPU operators serve ``w``, whatever it is multiplied with."""
    return w.layout == "tiles" and _FORCED in (None, Backend.NATIVE)


def choose(w: Packed4bit, rows: int, dtype: torch.dtype, infers: bool, drops: bool = False) -> Backend:
    """The backend for ``w`` and ``rows`` rows of ``dtype``.

    On a CPU the native operators, for weights in tiles. On a GPU the CUDA kernels as far as they go; above, slabs from
    256 rows on; Triton's kernels for the rest, or for all where it stands alone. Else the reference (dequantize, then a
    dense product). ``PYFASTPEFT_BACKEND`` forces one: ``native`` only where it can serve; ``cuda`` means slabs too.

    Args:
        infers: nothing is recorded for autograd, and what scales the LoRA branch is the same for all rows, or a bank.
        drops: the LoRA branch has dropout, which Triton's kernels do in passing.

    Raises:
        RuntimeError: CUDA or Triton is forced and cannot serve; it says why.
    """
    if native(w):
        return Backend.NATIVE
    for backend, why_not in ((Backend.CUDA, why_not_cuda), (Backend.TRITON, why_not_triton)):
        if _FORCED is backend and (why := why_not(w.device)) is not None:
            raise RuntimeError(f"PYFASTPEFT_BACKEND is {backend.value!r}, and {why}")
    if _FORCED in (Backend.SLABS, Backend.TRITON, Backend.REFERENCE):
        return _FORCED
    cuda, triton = _serving(w.device)
    triton = triton and _FORCED is not Backend.CUDA
    if cuda:
        if infers and not drops and rows <= most_rows(w, dtype):
            return Backend.CUDA
        if not triton or (rows >= _DENSE_ROWS and not drops):
            return Backend.SLABS
    return Backend.TRITON if triton else Backend.REFERENCE


_MOST_HEAD_SIZE = 256
"""Of the attention kernels."""


def choose_attention(q: Tensor) -> Backend:
    """The backend for attention with queries ``q`` [..., D]."""
    if q.device.type != "cpu" or q.dtype not in FLOATS or q.shape[-1] > _MOST_HEAD_SIZE:
        return Backend.REFERENCE
    return Backend.REFERENCE if _FORCED is Backend.REFERENCE else Backend.NATIVE
