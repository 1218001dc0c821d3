"""The operators by Triton kernels. The first call imports triton.

To compilers each is one node: they cannot look into what is remembered between calls, and could leave theirs in it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import math
import os
import shutil
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..formats import Packed4bit, format_of, get_format
from ..formats.packed import Operands
from ..kernels.graphs import constant_on, relaxed
from .library import WEIGHT, define, define_linear_4bit, dynamic_map, remembered, split_weight
from .tuning import tuned

_OLDEST = (8, 0)
"""The compute capability of the oldest GPU of NVIDIA's that Triton compiles for."""


@remembered
def why_not(device: torch.device) -> str | None:
    """Why Triton kernels cannot serve tensors on ``device``; None where they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type == "cuda":
        oldest = ".".join(map(str, _OLDEST))
        capability = torch.cuda.get_device_capability(device)
        if torch.version.hip is None and capability < _OLDEST:
            return f"{device} has compute capability {'.'.join(map(str, capability))}; it must be {oldest} or later"
        return _no_compiler()
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return f"the tensors are on {device}; they must be on a GPU (or, with TRITON_INTERPRET=1, on the CPU)"


def _no_compiler() -> str | None:
    """What Triton lacks to compile what launches its kernels, looked for as it does (triton/runtime/build.py)."""
    compilers = ["gcc", "clang"] if (chosen := os.environ.get("CC")) is None else [chosen]
    if not any(map(shutil.which, compilers)):
        return f"Triton needs a C compiler, and there is no {' or '.join(compilers)} on the PATH"
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
    header = Path(sysconfig.get_path("include", scheme)) / "Python.h"
    return None if header.is_file() else f"Triton needs Python's headers (python3-dev), and there is no {header}"


@functools.cache
def _kernels(operator: str) -> ModuleType:
    return importlib.import_module(f"..kernels.{operator}", __package__)


@contextlib.contextmanager
def _on(device: torch.device) -> Iterator[None]:
    """Kernels are launched on the current GPU, and loaded when they first are."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device), relaxed():
        yield


@functools.cache
def _tables(quant_type: str) -> tuple[tuple[float, ...], tuple[float, ...], float]:
    """The values of the codes, what products in bfloat16 take for them, and the factor of that."""
    form = get_format(quant_type)
    return tuple(form.table.tolist()), tuple(form.bf16_table.tolist()), form.bf16_factor


def _weight(w: Operands, k: int) -> tuple:
    nested = (None, None, None) if w.absmax2 is None else (w.absmax2, w.offset, dynamic_map(w.codes.device))
    tables = _tables(format_of(w.format).name)
    return _kernels("linear_4bit").Weight(w.codes, w.scale, w.zero, *nested, *tables, w.n, k, w.blocksize)


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


def _best(
    direction: str, kernels: ModuleType, x: Tensor, format: int, w: tuple, lora: tuple | None, run: Callable
) -> tuple:
    """``run`` with the tiles for the rows of x.

    Tiles are remembered for calls of the same kernels only: others may need more shared memory than there is.
    """
    rows = 1 << max(len(x) - 1, 0).bit_length()
    weight = format_of(format).name, math.gcd(w.k, w.blocksize), w.absmax2 is not None
    branch = (0,) if lora is None else (lora.rank, lora.a.dtype, lora.seed is not None)
    call = ("linear_4bit", direction, x.dtype, rows, w.n, w.k, *weight, *branch)
    return run(tuned(call, x.device, kernels.formula(x, w, direction == "forward"), kernels.around, run))


def _forward(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """(y [M, N] in x's dtype, S [M, R] float32; R = 0 without a branch)."""
    operands, (bias, *branch) = split_weight(rest)
    kernels, w, lora = _kernels("linear_4bit"), _weight(operands, x.shape[1]), _branch(*branch)
    with _on(x.device):
        run = functools.partial(kernels.forward, x, w, bias, lora)
        return _best("forward", kernels, x, operands.format, w, lora, run)


def _backward(dy: Tensor, x: Tensor | None, s: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dA, dB), empty where not needed."""
    operands, (k, *branch, need_x, need_a, need_b) = split_weight(rest)
    kernels, w, lora = _kernels("linear_4bit"), _weight(operands, k), _branch(*branch)
    run = functools.partial(kernels.backward, dy, x, s, w, lora, need_x, need_a, need_b)
    with _on(dy.device):
        dx, da, db = _best("backward", kernels, dy, operands.format, w, lora, run) if need_x else run(None)
    da = None if da is None else da.to(lora.a.dtype)
    db = None if db is None else db.to(lora.b.dtype)
    return tuple(dy.new_empty(0) if d is None else d for d in (dx, da, db))


def _forward_slots(x: Tensor, *rest: Any) -> Tensor:
    """y [M, N] in x's dtype; of a :class:`linear_4bit.BankView`."""
    operands, (bias, a, b, scaling, rows) = split_weight(rest)
    kernels = _kernels("linear_4bit")
    lora = kernels.Slots(a, b, scaling.float().contiguous(), rows.contiguous())
    with _on(x.device):
        return kernels.forward_slots(x, _weight(operands, x.shape[1]), bias, lora)


def _fake_slots(x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty((x.shape[0], split_weight(rest)[0].n))


define_linear_4bit("triton", _forward, _backward, transposed=True)
define(
    f"linear_4bit_triton_slots(Tensor x, {WEIGHT}, Tensor? bias, Tensor lora_a, Tensor lora_b, Tensor scaling, "
    "Tensor slot_of) -> Tensor",
    _forward_slots,
    _fake_slots,
)


def forward_slots(x: Tensor, w: Packed4bit, bias: Tensor | None, *bank: Tensor) -> Tensor:
    """y [M, N] in x's dtype; ``bank``: a, b, scaling and rows of a :class:`linear_4bit.BankView`."""
    return torch.ops.pyfastpeft.linear_4bit_triton_slots.default(x, *w.rows().operands, bias, *bank)


# ---- operators over plain tensors, with the signatures of the compiled ones ------------------------------------------


def _operator(file: str, name: str) -> Callable:
    def launch(first: Tensor, *rest: Tensor | float | None) -> Tensor | tuple[Tensor, ...]:
        with _on(first.device):
            return getattr(_kernels(file), name)(first, *rest)

    return launch


rms_norm = _operator("elementwise", "rms_norm")
rms_norm_backward = _operator("elementwise", "rms_norm_backward")
swiglu = _operator("elementwise", "swiglu")
swiglu_backward = _operator("elementwise", "swiglu_backward")
rope = _operator("elementwise", "rope")
cross_entropy_ = _operator("cross_entropy", "cross_entropy_")


def quantize_4bit(w: Tensor, format: int, blocksize: int) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, scale, zero) of contiguous ``w``, in the ``rows`` layout."""
    form = format_of(format)
    with _on(w.device):
        return _kernels("quantize_4bit").quantize(w, _tables(form.name)[0], form.has_zero, blocksize)


def dequantize_4bit(
    codes: Tensor, scale: Tensor, zero: Tensor | None, format: int, blocksize: int, shape: list[int], dtype: torch.dtype
) -> Tensor:
    """The tensor of ``shape``, decoded in float32 and rounded once."""
    table = _table_on(format, codes.device)
    with _on(codes.device):
        return _kernels("quantize_4bit").dequantize(codes, scale, zero, table, blocksize, shape, dtype)


@functools.cache
def _table_on(format: int, device: torch.device) -> Tensor:
    return constant_on(format_of(format).table, device)


def _attention(selection: tuple, *tensors: Tensor | None) -> tuple:
    index, lengths, positions, causal, scale, window = selection
    index, lengths, positions = (None if t is None else t.contiguous() for t in (index, lengths, positions))
    return _kernels("prefix_attention").Call(*tensors, index, lengths, positions, causal, scale, window or None)


def prefix_attention(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor | None, prefix_v: Tensor | None, *rest: Tensor | float | None
) -> tuple[Tensor, Tensor]:
    """(the result [B, T, H, D], float32 [B * HKV or 0, T * group]); prefixes are [n, HKV, P, D], positions [B, S]."""
    *selection, need_lse = rest
    with _on(q.device):
        return _kernels("prefix_attention").forward(_attention(selection, q, k, v, prefix_k, prefix_v), need_lse)


def prefix_attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    *rest: Tensor | float | None,
) -> tuple[Tensor, ...]:
    """(dq, dk and dv, [B, tokens, heads, D] each, and float32 of the prefix)"""
    *selection, out, lse = rest
    call = _attention(selection, q, k, v, prefix_k, prefix_v)
    with _on(q.device):
        return _kernels("prefix_attention").backward(call, dout, out, lse)
