"""Which devices have compiled kernels, beside the CPU."""

from __future__ import annotations

import functools

import torch


@functools.cache
@torch.compiler.assume_constant_result
def why_not_cuda(device: torch.device) -> str | None:
    """Why the CUDA kernels cannot serve tensors on ``device``; None where they can."""
    if device.type != "cuda":
        return f"the tensors are on {device}; they must be on a GPU"
    if torch.version.cuda is None:
        return "this torch has no CUDA"
    return torch.ops.pyfastpeft.cuda_missing.default(*torch.cuda.get_device_capability(device)) or None
