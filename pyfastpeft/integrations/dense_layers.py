"""Frozen linear layers in full precision by this library's products, where these are faster than torch's."""

from __future__ import annotations

from torch import Tensor, nn

from ..ops.dense import kernel_linear, kernel_pays, outruns_torch
from ..ops.tracing import traced
from .forwards import ModuleForward


class DenseForward(ModuleForward):
    """Forward of a linear layer."""

    def __call__(self, input: Tensor) -> Tensor:
        layer = self.module
        if traced() or not kernel_pays(input, layer.weight, layer.bias):
            return self.own(input)
        return kernel_linear(input, layer.weight, layer.bias)


def has_fast_forward(module: nn.Module) -> bool:
    """Whether :class:`DenseForward` can be faster here than the own forward of ``module``."""
    return type(module) is nn.Linear and outruns_torch(module.weight.dtype)
