"""Which implementation serves a call: the one place that decides."""

from __future__ import annotations

import enum
import os

import torch
from torch import Tensor

from ..formats import Packed4bit

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""The dtypes that the compiled operators take."""


class Backend(enum.Enum):
    """``NATIVE``: the compiled operators. ``REFERENCE``: plain torch, any device, any shape."""

    NATIVE = "native"
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


def choose(w: Packed4bit) -> Backend:
    """The backend for ``w``: native for CPU weights in tiles, else the reference (dequantize, then a dense product)."""
    if _FORCED is not None and not (_FORCED is Backend.NATIVE and w.layout != "tiles"):
        return _FORCED
    return Backend.NATIVE if w.layout == "tiles" else Backend.REFERENCE


_MOST_HEAD_SIZE = 256
"""Of the attention kernels."""


def choose_attention(q: Tensor) -> Backend:
    """The backend for attention with queries ``q`` [..., D]."""
    if q.device.type != "cpu" or q.dtype not in FLOATS or q.shape[-1] > _MOST_HEAD_SIZE:
        return Backend.REFERENCE
    return _FORCED or Backend.NATIVE
