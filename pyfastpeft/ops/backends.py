"""Which implementation serves a call: the one place that decides."""

from __future__ import annotations

import enum
import os

import torch
from torch import Tensor

from ..formats import Packed4bit
from .triton_kernels import why_not

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""The dtypes that the compiled operators take."""


class Backend(enum.Enum):
    """``NATIVE``: the compiled operators. ``TRITON``: kernels for GPUs. ``REFERENCE``: plain torch, any device."""

    NATIVE = "native"
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
    _check_forced(w.device)
    if _FORCED in (Backend.TRITON, Backend.REFERENCE):
        return _FORCED
    if w.layout == "tiles":
        return Backend.NATIVE
    return Backend.TRITON if w.device.type == "cuda" and why_not(w.device) is None else Backend.REFERENCE


_MOST_HEAD_SIZE = 256
"""Of the attention kernels."""


def choose_attention(q: Tensor) -> Backend:
    """The backend for attention with queries ``q`` [..., D], by device as for weights; the reference for float64 and
    large heads.

    Raises:
        RuntimeError: as ``choose``.
    """
    _check_forced(q.device)
    if q.dtype not in FLOATS or q.shape[-1] > _MOST_HEAD_SIZE or _FORCED is Backend.REFERENCE:
        return Backend.REFERENCE
    if q.device.type in triton_devices():
        return Backend.TRITON if why_not(q.device) is None else Backend.REFERENCE
    return Backend.NATIVE if q.device.type == "cpu" else Backend.REFERENCE


def triton_devices() -> list[str]:
    """The types of device whose operators are Triton kernels: GPUs, and the CPU where it is forced."""
    return ["cuda", "cpu"] if _FORCED is Backend.TRITON else ["cuda"]
