"""``dense_linear``: products with a weight in full precision that torch on a CPU is slow at."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from ..formats.packed import FLOATS
from .backends import Backend, as_rows, choose_plain, is_plain
from .library import fake_of
from .tracing import recorded, traced, transformed

FEW_ROWS = 16
"""Rows up to which the kernel takes what reading the weight once takes: it multiplies by a tile of so many."""
_SMALL = 1 << 17  # multiply-adds: of halves up to here calling the kernel takes longer than torch's product


@functools.cache
def outruns_torch(dtype: torch.dtype) -> bool:
    """Whether products in ``dtype`` that are not small are faster on this CPU than torch's."""
    if dtype is torch.float32:
        return torch.backends.mkl.is_available() and torch.ops.pyfastpeft.outruns_mkl()
    # Where oneDNN has no instructions for them torch's take 2 to 8 times as long, those of gradients up to 200 (Zen 3).
    on_dnn = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    if dtype not in on_dnn or not torch.ops.pyfastpeft.isa().startswith("avx"):
        return False
    return not (torch.backends.mkldnn.is_available() and getattr(torch.ops.mkldnn, on_dnn[dtype])())


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear(x, weight, bias)``; without gradients few rows take what reading the weight takes, and all run faster
    where :func:`kernel_pays`.

    Rows that do not lie side by side are brought together first: torch on a CPU would multiply each by a copy of the
    weight of its own, seconds and gigabytes for a head and a few sequences.

    Args:
        x: [..., K].   weight: [N, K].   bias: [N] or None.

    Raises:
        TypeError, RuntimeError: as ``F.linear``.
    """
    try:
        return _dense_linear(x, weight, bias)
    except AttributeError:
        return F.linear(x, weight, bias)  # which says what is no tensor


def _dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if traced() or not (is_plain(x) and x.is_cpu) or weight.dim() != 2 or x.dim() == 0:
        return F.linear(x, weight, bias)
    if kernel_pays(x, weight, bias):
        return kernel_linear(x, weight, bias)
    rows = as_rows(x).contiguous()
    if len(rows) <= FEW_ROWS and not torch.is_grad_enabled() and _multiplies(rows, weight, bias):
        y = torch.ops.pyfastpeft.dense_linear.default(rows, weight, bias)
    else:
        y = F.linear(rows, weight, bias)
    return y.view(*x.shape[:-1], len(weight))


def kernel_pays(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether :func:`kernel_linear` takes these and is faster than ``F.linear``."""
    if not (x.is_cpu and x.dim() > 0 and outruns_torch(x.dtype) and _multiplies(x, weight, bias)):
        return False
    if x.dtype is not torch.float32:
        return x.numel() * len(weight) > _SMALL
    # MKL computes the gradient of a weight in half the kernel's time where rows are few.
    return x.numel() > FEW_ROWS * x.shape[-1] and not (torch.is_grad_enabled() and weight.requires_grad)


def kernel_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear(x, weight, bias)`` where :func:`kernel_pays`."""
    multiply = _Linear.apply if recorded(x, weight, bias) else _product
    y = multiply(as_rows(x), weight, bias)
    return y.view(*x.shape[:-1], len(weight))


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x · weightᵀ + bias, of a weight that may be stored transposed."""
    if weight.is_contiguous() or not weight.t().is_contiguous():
        return torch.ops.pyfastpeft.dense_linear.default(x, weight, bias)
    y = torch.ops.pyfastpeft.dense_linear_backward.default(x, weight.t())
    return y if bias is None else y.add_(bias)


def _multiplies(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    if torch.is_autocast_enabled("cpu") or transformed() or x.dtype not in FLOATS:
        return False
    operands = (x, weight) if bias is None else (x, weight, bias)
    if not all(is_plain(t) and t.dtype == x.dtype and t.device == x.device for t in operands):
        return False
    if weight.dim() != 2 or x.shape[-1] != weight.shape[1]:  # torch says so
        return False
    if bias is not None and bias.shape != weight.shape[:1]:  # torch spreads it
        return False
    return choose_plain(x.device) is Backend.NATIVE


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):  # noqa: ANN001
        of_x, of_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if of_weight else None, weight if of_x else None)
        ctx.transposed = not weight.is_contiguous()
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx, dy):  # noqa: ANN001
        x, weight = ctx.saved_tensors
        times = torch.matmul if torch.is_grad_enabled() else _times  # to be differentiated again
        of_x, of_weight, of_bias = ctx.needs_input_grad
        dx = times(dy, weight) if of_x else None
        dw = None
        if of_weight:  # laid out as the weight is, or autograd would copy it
            dw = times(x.t(), dy).t() if ctx.transposed else times(dy.t(), x)
        return dx, dw, dy.sum(0) if of_bias else None


def _times(a: Tensor, b: Tensor) -> Tensor:
    return _product(a, b.t(), None)


@fake_of("dense_linear")
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


@fake_of("dense_linear_backward")
def _(dy: Tensor, weight: Tensor) -> Tensor:
    return dy.new_empty((dy.shape[0], weight.shape[1]))
