"""Rows of different adapters in one product: what one adapter holds reaches no row of another.

The adapters lie side by side along the rank, and the factors of a row are zero in the columns of those that it does not
use. Zero times what is not finite would be NaN. So a sum is left out where its factor is zero; and of the operands, the
columns and rows that are not finite are set to zero, while the factors there that are not zero become NaN. A row whose
adapter is not finite is then NaN throughout, and so are that adapter's gradients; nothing else changes by a bit.

On a CPU the operands are only looked at where a result is not finite. Looking at one row is enough: a value that is not
finite times a factor of zero is NaN, so it reaches every row of the product. Elsewhere looking at a result would wait
for the device, and the operands are always treated.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .autocast import autocast_dtype
from .tracing import followed


def zero_unless(chosen: Tensor, scale: Tensor) -> Tensor:
    """``scale`` where ``chosen`` is true, else zero."""
    return torch.where(chosen, scale, torch.zeros_like(scale))


def tells(result: Tensor) -> bool:
    """Whether a result may be looked at, to find out whether its operands are finite."""
    return type(result) is Tensor and result.is_cpu and not followed()


def is_finite(*results: Tensor | None) -> bool:
    """Whether all elements are (never true where one is not)."""
    return all(t is None or math.isfinite(torch.linalg.vector_norm(t.detach()).item()) for t in results)


def _spoiled(factor: Tensor, finite: Tensor) -> Tensor:
    """``factor`` with NaN where it is not zero and ``finite`` is false."""
    return factor.masked_fill(~finite & (factor != 0), math.nan)


def finite_columns(a: Tensor, b: Tensor, factor: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """A [R, K], B [N, R] and ``factor`` [M, R] after treatment; finite means in ``dtype``, that of the products."""
    finite = a.to(dtype).isfinite().all(1) & b.to(dtype).isfinite().all(0)
    return a.masked_fill(~finite[:, None], 0), b.masked_fill(~finite, 0), _spoiled(factor, finite)


def finite_rows(factor: Tensor, *operands: Tensor) -> tuple[Tensor, ...]:
    """(which rows are not finite [M, 1], ``factor`` [M, R], the operands [M, ...]), after treatment."""
    finite = torch.stack([t.isfinite().all(1) for t in operands]).all(0)[:, None]
    return ~finite, _spoiled(factor, finite), *(t.masked_fill(~finite, 0) for t in operands)


# ---- full precision --------------------------------------------------------------------------------------------------


def _product(p: Tensor, q: Tensor) -> Tensor:
    """p [M, R] · q [R, N], where a zero of p leaves out what q holds."""
    if tells(p):
        y = p @ q
        if is_finite(y[:1]):
            return y
    finite = q.isfinite().all(1)
    return _spoiled(p, finite) @ q.masked_fill(~finite[:, None], 0)


class _Added(torch.autograd.Function):
    """``_product``, in both directions."""

    @staticmethod
    def forward(ctx, p, q):  # noqa: ANN001
        ctx.save_for_backward(p, q)
        return _product(p, q)

    @staticmethod
    def backward(ctx, dy):  # noqa: ANN001
        p, q = ctx.saved_tensors
        dp = dy @ q.t() if ctx.needs_input_grad[0] else None
        return dp, _product(p.t(), dy) if ctx.needs_input_grad[1] else None


class _Projected(torch.autograd.Function):
    """x · Aᵀ, whose gradient is zero where a row does not use a column."""

    @staticmethod
    def forward(ctx, x, a):  # noqa: ANN001
        ctx.save_for_backward(x, a)
        return x @ a.t()

    @staticmethod
    def backward(ctx, ds):  # noqa: ANN001
        x, a = ctx.saved_tensors
        dx = _product(ds, a) if ctx.needs_input_grad[0] else None
        return dx, _product(ds.t(), x) if ctx.needs_input_grad[1] else None


def _alike(*tensors: Tensor) -> tuple[Tensor, ...]:
    """In autocast's dtype, where it is on."""
    dtype = autocast_dtype(tensors[0].device)
    return tensors if dtype is None else tuple(t.to(dtype) for t in tensors)


def projected(x: Tensor, a: Tensor) -> Tensor:
    """x [..., K] · Aᵀ, A [R, K]: for :func:`added`."""
    x, a = _alike(x, a)
    return _Projected.apply(x.reshape(-1, x.shape[-1]), a).view(*x.shape[:-1], len(a))


def added(s: Tensor, factor: Tensor, b: Tensor) -> Tensor:
    """(S ∘ f) · Bᵀ of rows of different adapters, whose factors are zero in the columns of others.

    Args:
        s: [..., R].   factor: [rows of s, R].   b: [N, R].

    Returns:
        [..., N] in the dtype of ``s``. Differentiable in ``s`` and ``b``.
    """
    s, b = _alike(s, b)
    factor = factor.to(s.dtype)
    p = (s.reshape(factor.shape) * factor).masked_fill(factor == 0, 0)
    return _Added.apply(p, b.t()).view(*s.shape[:-1], len(b))


def summed(chosen: Tensor, q: Tensor) -> Tensor:
    """The sum of the rows of ``q`` [R, N] that ``chosen`` [rows, R] has a one for, not a zero: [rows, N]."""
    return _Added.apply(*_alike(chosen.to(q.dtype), q))
