"""Bottleneck adapters (Houlsby et al. 2019): a small network beside the output of a sublayer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapters import AdapterBank, Parts, Rows
from ..ops import mixed
from ..ops.checks import as_count, check_choice
from ..ops.dense import dense_linear

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


class Bottleneck(nn.Module):
    """``y + up(activation(down(y)))``; ``up`` starts at zero, so that the module starts as the identity.

    Args:
        features: H, of y [..., H].
        size: of the bottleneck: ``down`` is [size, H], ``up`` [H, size], both with a bias.
        activation: "gelu", "relu", "silu" or "tanh".

    The parameters may be in another dtype than y: the products are in y's.

    Raises:
        ValueError: a size that is no integer of at least 1, or an unknown ``activation``.
    """

    def __init__(
        self,
        features: int,
        size: int,
        activation: str = "gelu",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_choice("activation", activation, ACTIVATIONS)
        self.activation = activation
        features, size = as_count("features", features), as_count("size", size)
        self.down = nn.Linear(features, size, device=device, dtype=dtype)
        self.up = nn.Linear(size, features, device=device, dtype=dtype)
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    @property
    def size(self) -> int:
        """The width of the bottleneck."""
        return self.down.out_features

    def inner(self, y: Tensor) -> Tensor:
        """What passes the bottleneck, [..., size]."""
        down = self.down
        return self.activate(_linear(y, down.weight, down.bias))

    def activate(self, x: Tensor) -> Tensor:
        """The activation of ``x``, element by element."""
        return ACTIVATIONS[self.activation](x)

    def forward(self, y: Tensor) -> Tensor:
        """``y`` [..., features] and the update, of y's shape and dtype."""
        up = self.up
        return y + _linear(self.inner(y), up.weight, up.bias)


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return dense_linear(x, weight.to(x.dtype), bias.to(x.dtype))


class BottleneckLayer(nn.Module):
    """The layer that ends a sublayer, with named bottleneck adapters after it.

    Several that are active at once each add their own update of the same output; each row of a batch may have its own.

    Attributes:
        base_layer: the wrapped module, which may be anything that carries LoRA as well.
        bottleneck: adapter name → :class:`Bottleneck`.
    """

    def __init__(self, base_layer: nn.Module, bank: AdapterBank) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.bank = bank
        self.bottleneck = Parts(self._changed)
        self._plan: tuple[Bottleneck, ...] = ()

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    def plan(self, active: tuple[str, ...]) -> tuple[Bottleneck, ...]:
        return tuple(self.bottleneck[n] for n in active if n in self.bottleneck)

    def _changed(self) -> None:
        self.bank.refresh_one(self)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        y = self._modules["base_layer"](*args, **kwargs)
        mode, plan = self.bank.mode, self._plan
        if mode is not None:
            names = tuple(n for n in mode.names if n in self.bottleneck)
            if names and mode.mixes:
                return self._by_row(y, names, mode)
            plan = self.plan(names)  # as if they were active
        return plan[0](y) if len(plan) == 1 else self._several(y, plan) if plan else y

    @staticmethod
    def _several(y: Tensor, adapters: tuple[Bottleneck, ...]) -> Tensor:
        """``y`` and the update of each adapter."""
        inner = torch.cat([adapter.inner(y) for adapter in adapters], dim=-1)
        up = torch.cat([adapter.up.weight for adapter in adapters], dim=1)
        biases = torch.stack([adapter.up.bias for adapter in adapters])
        # A product: the gradients of a plain sum are one tensor, whose memory autograd or Inductor leaves to them all.
        return y + _linear(inner, up, biases.new_ones(len(biases)) @ biases)

    def _by_row(self, y: Tensor, names: tuple[str, ...], mode: Rows) -> Tensor:
        """``y`` and the updates of the adapters that each row uses."""
        mode.check_lead(y, 3)
        adapters = [self.bottleneck[n] for n in names]
        sizes, rows = tuple(adapter.size for adapter in adapters), y.numel() // y.shape[-1]
        of_inner = mode.mask(names, rows, y.device, sizes)
        of_bias = mode.mask(names, rows, y.device)
        down = torch.cat([adapter.down.weight for adapter in adapters])
        inner = mixed.projected(y, down.to(y.dtype))
        inner = inner + torch.cat([adapter.down.bias for adapter in adapters]).to(inner.dtype)
        # Zero before the activation: its derivative at what is not finite would be NaN, whatever gradient comes.
        parts = mixed.zero_unless(of_inner.view(inner.shape) > 0, inner).split(sizes, dim=-1)
        inner = torch.cat([adapter.activate(part) for adapter, part in zip(adapters, parts, strict=True)], dim=-1)
        up = torch.cat([adapter.up.weight for adapter in adapters], dim=1)
        bias = mixed.summed(of_bias, torch.stack([adapter.up.bias for adapter in adapters]))
        return y + (mixed.added(inner, of_inner, up.to(y.dtype)) + bias.view_as(y).to(y.dtype))
