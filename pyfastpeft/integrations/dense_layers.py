"""Frozen linear layers in full precision by this library's products, where these are faster than torch's."""

from __future__ import annotations

from torch import Tensor, nn

from ..ops.dense import fast_float32, many_rows_linear, many_rows_pay
from ..ops.tracing import traced
from .forwards import ModuleForward


class DenseForward(ModuleForward):
    """Forward of a linear layer."""

    def __call__(self, input: Tensor) -> Tensor:
        layer = self.module
        if traced() or not many_rows_pay(input, layer.weight, layer.bias):
            return self.own(input)
        return many_rows_linear(input, layer.weight, layer.bias)


def has_fast_forward(module: nn.Module) -> bool:
    """Whether :class:`DenseForward` can be faster here than the own forward of ``module``."""
    return type(module) is nn.Linear and fast_float32()
