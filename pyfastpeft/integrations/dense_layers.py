"""Linear layers in full precision by this library's products, where these are faster than torch's."""

from __future__ import annotations

from torch import Tensor, nn

from ..ops.backends import is_plain
from ..ops.dense import kernel_linear, kernel_pays, outruns_torch
from ..ops.tracing import traced
from .forwards import ModuleForward


class DenseForward(ModuleForward):
    """Forward of ``nn.Linear``."""

    def __call__(self, input: Tensor) -> Tensor:
        layer = self.module
        if traced():
            return self.own(input)
        weight = self.matrix(layer.weight)
        if not kernel_pays(input, weight, layer.bias):
            return self.own(input)
        return kernel_linear(input, weight, layer.bias)

    @staticmethod
    def matrix(weight: Tensor) -> Tensor:
        """The weight as [out, in]."""
        return weight


class Conv1DForward(DenseForward):
    """Forward of transformers' ``Conv1D``, whose weight is [in, out]."""

    @staticmethod
    def matrix(weight: Tensor) -> Tensor:
        return weight.t() if is_plain(weight) else weight  # another may know no transpose, and is left to torch


_FORWARDS = {
    "torch.nn.modules.linear.Linear": DenseForward,
    "transformers.models.falcon.modeling_falcon.FalconLinear": DenseForward,  # which does it as a matmul
    "transformers.pytorch_utils.Conv1D": Conv1DForward,
}
"""By name: transformers imports what defines a class when it is first needed."""


def dense_forward_for(module: nn.Module) -> type[DenseForward] | None:
    """What can be faster here than the own forward of ``module``."""
    kind = _FORWARDS.get(f"{type(module).__module__}.{type(module).__qualname__}")
    return kind if kind is not None and outruns_torch(module.weight.dtype) else None
