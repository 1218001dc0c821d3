"""The launches of ``rms_norm``, ``swiglu`` and ``rope``, compiled: see toolchain.py."""

from __future__ import annotations

from collections.abc import Callable

import torch
from toolchain import empty

from pyfastpeft.ops.triton_kernels import _kernels

kernels = _kernels("elementwise")


def cases() -> dict[str, Callable]:
    """Calls of the operators by name."""

    def norm(m: int, h: int, dtype: torch.dtype = torch.bfloat16) -> None:
        x, weight = empty(m, h, dtype=dtype), empty(h, dtype=dtype)
        kernels.rms_norm(x, weight, 1e-6)
        kernels.rms_norm_backward(x, x, weight, 1e-6, True)

    def activation(m: int, h: int, dtype: torch.dtype = torch.bfloat16) -> None:
        x = empty(m, h, dtype=dtype)
        kernels.swiglu(x, x)
        kernels.swiglu_backward(x, x, x)

    def rotation() -> None:
        q, k = (empty(4, 512, heads, 128, dtype=torch.bfloat16).transpose(1, 2) for heads in (32, 8))
        cos = empty(1, 512, 128, dtype=torch.bfloat16)
        kernels.rope(q, k, cos, cos, False)

    return {
        "4096 columns": lambda: norm(4096, 4096),
        "8192 columns, float32": lambda: norm(4096, 8192, torch.float32),
        "16384 columns, float32": lambda: norm(4096, 16384, torch.float32),
        "heads of 128": lambda: norm(65536, 128),
        "14336 columns": lambda: activation(4096, 14336),
        "one row, float32": lambda: activation(1, 14336, torch.float32),
        "32 heads of 128 over 8": rotation,
    }
