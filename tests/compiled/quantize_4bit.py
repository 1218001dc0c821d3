"""The launches of ``quantize_4bit`` and ``dequantize_4bit``, compiled: see toolchain.py."""

from __future__ import annotations

from collections.abc import Callable

import torch
from toolchain import empty

from pyfastpeft.formats import FORMATS
from pyfastpeft.ops.triton_kernels import _kernels, _tables

kernels = _kernels("quantize_4bit")


def quantize(quant_type: str, blocksize: int, dtype: torch.dtype) -> None:
    kernels.quantize(empty(4096, 4096, dtype=dtype), _tables(quant_type)[0], FORMATS[quant_type].has_zero, blocksize)


def dequantize(quant_type: str, blocksize: int, dtype: torch.dtype) -> None:
    scale = empty(4096 * 4096 // blocksize)
    zero = scale if FORMATS[quant_type].has_zero else None
    codes = empty(4096 * 2048, 1, dtype=torch.uint8)
    kernels.dequantize(codes, scale, zero, empty(16), blocksize, [4096, 4096], dtype)


def cases() -> dict[str, Callable]:
    """Calls of the operators by name."""
    return {
        "nf4": lambda: quantize("nf4", 64, torch.bfloat16),
        "fp4, blocks of 4096, float32": lambda: quantize("fp4", 4096, torch.float32),
        "int4": lambda: quantize("int4", 32, torch.bfloat16),
        "nf4 to bfloat16": lambda: dequantize("nf4", 64, torch.bfloat16),
        "int4 to float32": lambda: dequantize("int4", 32, torch.float32),
    }
