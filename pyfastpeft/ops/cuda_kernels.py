"""The operators by the CUDA kernels (csrc/cuda)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats import Packed4bit
from .library import remembered


@remembered
def why_not(device: torch.device) -> str | None:
    """Why the CUDA kernels cannot serve tensors on ``device``; None where they can."""
    if device.type != "cuda":
        return f"the tensors are on {device}; they must be on a GPU"
    if torch.version.cuda is None:
        return "this torch has no CUDA"
    return torch.ops.pyfastpeft.cuda_missing.default(*torch.cuda.get_device_capability(device)) or None


@remembered
def _most_rows(device: int, format: int, n: int, k: int, blocksize: int, nested: bool, dtype: torch.dtype) -> int:
    return torch.ops.pyfastpeft.linear_4bit_cuda_rows.default(device, format, n, k, blocksize, nested, dtype)


def most_rows(w: Packed4bit, dtype: torch.dtype) -> int:
    """The most rows of ``dtype`` that the kernels multiply with ``w``, prepared for its device; 0: none."""
    if w.codes.numel() == 0:
        return 0
    return _most_rows(w.device.index, w.format.id, *w.shape, w.blocksize, w.nested is not None, dtype)


def forward(
    x: Tensor,
    w: Packed4bit,
    bias: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    row_scale: Tensor | None,
    scaling: float,
    seed: None,
    dropout: float,
) -> tuple[Tensor, None]:
    """(y [M, N] in x's dtype, None); ``row_scale`` at most one for all rows [R], no dropout."""
    if a is not None:
        a, b = a.unsqueeze(0), b.unsqueeze(0)
    return _product(x, w, bias, a, b, None, row_scale, None, scaling), None


def forward_slots(
    x: Tensor, w: Packed4bit, bias: Tensor | None, a: Tensor, b: Tensor, scaling: Tensor, rows: Tensor
) -> Tensor:
    """y [M, N] in x's dtype, of a :class:`linear_4bit.BankView`."""
    return _product(x, w, bias, a, b, scaling.float().contiguous(), None, rows.contiguous(), 1.0)


def _product(x: Tensor, w: Packed4bit, bias: Tensor | None, *lora: Tensor | float | None) -> Tensor:
    y = x.new_empty((x.shape[0], w.shape[0]))
    torch.ops.pyfastpeft.linear_4bit_cuda.default(x, *w.operands, bias, *lora, y)
    return y


def quantize_4bit(w: Tensor, format: int, blocksize: int) -> tuple[Tensor, Tensor, Tensor]:
    """The operator ``quantize_4bit``."""
    return torch.ops.pyfastpeft.quantize_4bit_cuda.default(w, format, blocksize)


def dequantize_4bit(
    codes: Tensor, scale: Tensor, zero: Tensor | None, format: int, blocksize: int, shape: list[int], dtype: torch.dtype
) -> Tensor:
    """The operator ``dequantize_4bit``."""
    return torch.ops.pyfastpeft.dequantize_4bit_cuda.default(codes, scale, zero, format, blocksize, shape, dtype)
