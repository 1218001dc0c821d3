"""``once_differentiable``: for backward passes that cannot be differentiated."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .tracing import is_compiling

TWICE = "pyfastpeft's fused operators have no second derivative, and this backward ran with create_graph=True"


class _Refused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, count, *tensors):  # noqa: ANN001
        return tuple(t.view_as(t) for t in tensors[:count])

    @staticmethod
    def backward(ctx, *_):  # noqa: ANN001
        raise RuntimeError(TWICE)


def once_differentiable(backward: Callable[..., tuple]) -> Callable[..., tuple]:
    """For the ``backward`` of an autograd function, whose gradients cannot be differentiated.

    torch's ``once_differentiable`` detaches the gradients. Where a second derivative has another path too (every
    residual is one), it then silently lacks this function's share. Here it raises.
    """

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Tensor | None) -> tuple:
        if is_compiling() or not torch.is_grad_enabled():
            return backward(ctx, *grads)
        with torch.no_grad():
            found = backward(ctx, *grads)
        made = [t for t in found if t is not None]
        refused = iter(_Refused.apply(len(made), *made, *grads, *ctx.saved_tensors))
        return tuple(None if t is None else next(refused) for t in found)

    return run
