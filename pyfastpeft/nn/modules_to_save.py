"""Modules that are trained whole beside an adapter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..adapters import AdapterBank, Parts
from ..ops import mixed


class ModulesToSave(nn.Module):
    """A module with a trainable copy for each adapter that names it in ``modules_to_save``."""

    def __init__(self, module: nn.Module, bank: AdapterBank) -> None:
        super().__init__()
        self.original_module = module
        self.modules_to_save = Parts(self._changed)
        self.bank = bank
        self._plan: nn.Module | None = None

    def plan(self, active: tuple[str, ...]) -> nn.Module | None:
        """The copy in use while ``active`` are the adapters; None: the original."""
        names = [n for n in active if n in self.modules_to_save]
        if len(names) > 1:
            raise ValueError(f"adapters {names} each bring their own copy of one module; only one can be active")
        return self.modules_to_save[names[0]] if names else None

    def _changed(self) -> None:
        self.bank.refresh_one(self)

    def module_in_use(self) -> nn.Module:
        return self.original_module if self._plan is None else self._plan

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        mode = self.bank.mode
        if mode is None:
            return self.module_in_use()(x, *args, **kwargs)
        names = tuple(n for n in mode.names if n in self.modules_to_save)
        y = self.original_module(x, *args, **kwargs)
        # Each adapter's copy is another weight, so it runs by itself; shapes do not depend on who asked for what.
        for i, name in enumerate(names):
            chosen = mode.mask(names, (1,) * len(names), x.shape[0], x.device)[:, i].bool()
            # Neither may the other rows reach its gradient, nor it theirs, by a product with zero.
            mine = mixed.own(chosen.view(-1, *[1] * (x.dim() - 1)), x) if x.is_floating_point() else x
            own = self.modules_to_save[name](mine, *args, **kwargs)
            y = torch.where(chosen.view(-1, *[1] * (y.dim() - 1)), own, y)
        return y

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("original_module", "modules_to_save"):
                raise
            return getattr(self.module_in_use(), name)
