"""The gradients of prefixes where layers run again under reentrant checkpointing, each in a backward of its own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from ...adapters import Prefix
from ...ops.once import once_differentiable


def reentrant(module: nn.Module) -> bool:
    """Whether ``module`` runs again in a backward of its own."""
    function = vars(module).get("_gradient_checkpointing_func") if module.gradient_checkpointing else None
    while isinstance(function, partial):
        if "use_reentrant" in function.keywords:
            return bool(function.keywords["use_reentrant"])
        function = function.args[0] if function.args else function.func
    return function is not None


def collected(layers: list[Prefix]) -> tuple[list[Prefix], Callable[[Tensor], Tensor]]:
    """Copies of the ``layers``' prefixes that end their graphs, and what gathers their gradients.

    That is to be applied to the embedding's output, which is upstream of every layer, so its backward comes last: then
    the sums go on from the prefixes. And that output then requires a gradient, without which these checkpoints record
    nothing.
    """
    values = [t for prefix in layers for t in (prefix.k, prefix.v)]
    leaves = [t.detach().requires_grad_() for t in values]
    copies = [prefix._replace(k=k, v=v) for prefix, k, v in zip(layers, leaves[::2], leaves[1::2], strict=True)]
    return copies, lambda embeds: _Collect.apply(embeds, leaves, *values)


class _Collect(torch.autograd.Function):
    """x itself; in backward the gradients that ``leaves`` have gathered go to what they were copied from."""

    @staticmethod
    def forward(ctx, x, leaves, *values):  # noqa: ANN001
        ctx.leaves = leaves
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # noqa: ANN001
        gathered = [leaf.grad for leaf in ctx.leaves]
        for leaf in ctx.leaves:
            leaf.grad = None
        return grad, None, *gathered
