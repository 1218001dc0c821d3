"""The operators by Triton kernels, with the signatures of :mod:`reference`. The first call imports triton."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from ..formats import DYNAMIC_MAP, Packed4bit, get_format

_OLDEST = (8, 0)
"""The compute capability of the oldest GPU of NVIDIA's that Triton compiles for."""


@functools.cache
@torch.compiler.assume_constant_result
def why_not(device: torch.device) -> str | None:
    """Why Triton kernels cannot serve tensors on ``device``; None where they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type == "cuda":
        oldest = ".".join(map(str, _OLDEST))
        capability = torch.cuda.get_device_capability(device)
        if torch.version.hip is None and capability < _OLDEST:
            return f"{device} has compute capability {'.'.join(map(str, capability))}; it must be {oldest} or later"
        return None
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return f"the tensors are on {device}; they must be on a GPU (or, with TRITON_INTERPRET=1, on the CPU)"


@functools.cache
def _kernels(operator: str) -> ModuleType:
    """The kernels of ``operator``: installed as pyfastpeft.kernels, or beside the package in a source tree."""
    name = f"{__package__.rpartition('.')[0]}.kernels.{operator}"
    with contextlib.suppress(ModuleNotFoundError):
        return importlib.import_module(name)
    # By its file: `kernels` itself is the name of a package on PyPI.
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[2] / "kernels" / f"{operator}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def _dynamic_map(device: torch.device) -> Tensor:
    return DYNAMIC_MAP.to(device)


def _on(device: torch.device) -> contextlib.AbstractContextManager:
    """Kernels are launched on the current GPU."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@functools.cache
def _table(quant_type: str) -> tuple[float, ...]:
    return tuple(get_format(quant_type).table.tolist())


def _weight(w: Packed4bit) -> tuple:
    w = w.rows()
    nested = (None, None, None) if w.nested is None else (w.nested.absmax2, w.nested.offset, _dynamic_map(w.device))
    table = _table(w.quant_type)
    return _kernels("linear_4bit").Weight(w.codes, w.scale, w.zero, *nested, table, *w.shape, w.blocksize)


def _branch(
    a: Tensor | None,
    b: Tensor | None,
    row_scale: Tensor | None,
    scaling: float,
    seed: Tensor | None,
    dropout: float,
) -> tuple | None:
    if a is None:
        return None
    row_scale = None if row_scale is None else row_scale.contiguous()
    return _kernels("linear_4bit").Branch(a, b, row_scale, scaling, seed, dropout)


def forward(x: Tensor, w: Packed4bit, bias: Tensor | None, *branch: Tensor | float | None) -> tuple[Tensor, Tensor]:
    """(y [M, N] in x's dtype, S [M, R] float32; R = 0 without a branch)."""
    with _on(x.device):
        return _kernels("linear_4bit").forward(x, _weight(w), bias, _branch(*branch))


def forward_slots(x: Tensor, w: Packed4bit, bias: Tensor | None, *bank: Tensor) -> Tensor:
    """y [M, N] in x's dtype; ``bank``: a, b, scaling and rows of a :class:`linear_4bit.BankView`."""
    a, b, scaling, rows = bank
    kernels = _kernels("linear_4bit")
    lora = kernels.Slots(a, b, scaling.float().contiguous(), rows.contiguous())
    with _on(x.device):
        return kernels.forward_slots(x, _weight(w), bias, lora)


def backward(
    dy: Tensor, x: Tensor | None, s: Tensor | None, w: Packed4bit, *rest: Tensor | float | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dA, dB), None where not needed."""
    *branch, need_x, need_a, need_b = rest
    lora = _branch(*branch)
    with _on(dy.device):
        dx, da, db = _kernels("linear_4bit").backward(dy, x, s, _weight(w), lora, need_x, need_a, need_b)
    return dx, None if da is None else da.to(lora.a.dtype), None if db is None else db.to(lora.b.dtype)
