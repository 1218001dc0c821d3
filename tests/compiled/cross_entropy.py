"""The launches of ``cross_entropy_``, compiled: see toolchain.py."""

from __future__ import annotations

from collections.abc import Callable

import torch
from toolchain import empty

from pyfastpeft.ops.triton_kernels import _kernels


def call(classes: int, dtype: torch.dtype) -> None:
    _kernels("cross_entropy").cross_entropy_(empty(512, classes, dtype=dtype), empty(512, dtype=torch.int64))


def cases() -> dict[str, Callable]:
    """Calls of the operators by name."""
    return {
        "128256 classes": lambda: call(128256, torch.bfloat16),
        "49152 classes, float32": lambda: call(49152, torch.float32),
    }
