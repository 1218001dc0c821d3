"""``take_rows``: rows of a tensor, some of them several times."""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats.packed import FLOATS
from .backends import Backend, choose_plain
from .checks import check_tensor
from .library import fake_of
from .tracing import recorded


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """``x[index]``, and zeros where ``index`` is -1.

    torch's own ways wake threads several times for what one copies in less time (two threads that sleep, 288 rows of
    576 floats: 45 µs here and 56 for the gradient, 130 and 1100 by ``index_select``).

    Args:
        x: [N, ...], floating.
        index: int64 of any shape, each in [-1, N).

    Returns:
        [*index.shape, ...] in x's dtype. Differentiable, the gradient too.

    Raises:
        TypeError, ValueError: the argument at fault, what it was and what it must be.
        RuntimeError: a number in ``index`` is out of range, which only the operator for CPUs looks for.
    """
    check_tensor("x", x)
    check_tensor("index", index)
    if x.dim() < 2:
        raise ValueError(f"x has shape {tuple(x.shape)}; it must be [N, ...], with rows to take")
    if index.dtype is not torch.int64 or index.device != x.device:
        raise ValueError(f"index is {index.dtype} on {index.device}; it must be int64, on x's device, {x.device}")
    if choose_plain(x.device) is not Backend.NATIVE or x.dtype not in FLOATS:
        return torch.cat([x, x.new_zeros(1, *x.shape[1:])])[index]
    return _take(x.flatten(1), index.flatten()).view(*index.shape, *x.shape[1:])


def _take(x: Tensor, index: Tensor) -> Tensor:
    return _TakeRows.apply(x, index) if recorded(x) else torch.ops.pyfastpeft.take_rows.default(x, index)


def _sum(x: Tensor, index: Tensor, rows: int) -> Tensor:
    """What :func:`_take` of ``rows`` rows has for a gradient."""
    return _SumRows.apply(x, index, rows) if recorded(x) else torch.ops.pyfastpeft.sum_rows.default(x, index, rows)


class _TakeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, index):  # noqa: ANN001
        ctx.save_for_backward(index)
        ctx.rows = len(x)
        return torch.ops.pyfastpeft.take_rows.default(x, index)

    @staticmethod
    def backward(ctx, dy):  # noqa: ANN001
        return _sum(dy, *ctx.saved_tensors, ctx.rows), None


class _SumRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, index, rows):  # noqa: ANN001
        ctx.save_for_backward(index)
        return torch.ops.pyfastpeft.sum_rows.default(x, index, rows)

    @staticmethod
    def backward(ctx, dy):  # noqa: ANN001
        return _take(dy, *ctx.saved_tensors), None, None


@fake_of("take_rows")
def _(x: Tensor, index: Tensor) -> Tensor:
    return x.new_empty((len(index), x.shape[1]))


@fake_of("sum_rows")
def _(x: Tensor, index: Tensor, rows: int) -> Tensor:
    return x.new_empty((rows, x.shape[1]))
