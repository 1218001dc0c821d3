"""Bottleneck adapters (Houlsby et al. 2019): a small network beside the output of a sublayer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapters import AdapterBank, Rows
from ..ops import mixed

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
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation is {activation!r}; it must be one of {', '.join(ACTIVATIONS)}")
        self.activation = activation
        self.down = nn.Linear(features, size, device=device, dtype=dtype)
        self.up = nn.Linear(size, features, device=device, dtype=dtype)
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    @property
    def size(self) -> int:
        return self.down.out_features

    def inner(self, y: Tensor) -> Tensor:
        """What passes the bottleneck, [..., size]."""
        down = self.down
        return ACTIVATIONS[self.activation](_linear(y, down.weight, down.bias))

    def forward(self, y: Tensor) -> Tensor:
        up = self.up
        return y + _linear(self.inner(y), up.weight, up.bias)


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(x, weight.to(x.dtype), bias.to(x.dtype))


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
        self.bottleneck = nn.ModuleDict()
        self._plan: tuple[Bottleneck, ...] = ()

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    def plan(self, active: tuple[str, ...]) -> tuple[Bottleneck, ...]:
        return tuple(self.bottleneck[n] for n in active if n in self.bottleneck)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        y = self._modules["base_layer"](*args, **kwargs)
        mode = self.bank.mode
        if mode is None:
            plan = self._plan
            return plan[0](y) if len(plan) == 1 else self._several(y, plan) if plan else y
        names = tuple(n for n in mode.names if n in self.bottleneck)
        return self._several(y, tuple(self.bottleneck[n] for n in names), names, mode) if names else y

    def _several(
        self, y: Tensor, adapters: tuple[Bottleneck, ...], names: tuple[str, ...] = (), mode: Rows | None = None
    ) -> Tensor:
        """``y`` and the update of each adapter, in the rows that ``mode`` gives it."""
        inner = torch.cat([adapter.inner(y) for adapter in adapters], dim=-1)
        up = torch.cat([adapter.up.weight for adapter in adapters], dim=1)
        bias = torch.stack([adapter.up.bias for adapter in adapters])
        if mode is None:
            return y + _linear(inner, up, bias.sum(0))
        rows, lead = y.numel() // y.shape[-1], y.shape[:-1]
        sizes = tuple(adapter.size for adapter in adapters)
        update = mixed.added(inner, mode.mask(names, sizes, rows, y.device), up.to(y.dtype))
        own = mixed.summed(mode.mask(names, (1,) * len(names), rows, y.device), bias)
        return y + (update + own.view(*lead, -1).to(y.dtype))
