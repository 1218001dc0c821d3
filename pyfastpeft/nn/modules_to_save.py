"""Modules that are trained whole beside an adapter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters import NO_ROWS, AdapterBank, Parts
from ..ops import mixed
from ..ops.dense import dense_linear
from .hooks import hooked


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
        names = self._with_a_copy(active)
        return self.modules_to_save[names[0]] if names else None

    def _with_a_copy(self, active: tuple[str, ...]) -> list[str]:
        """Of ``active``, the adapter that has a copy of this module.

        Raises:
            ValueError: several have.
        """
        names = [n for n in active if n in self.modules_to_save]
        if len(names) > 1:
            raise ValueError(f"adapters {names} each bring their own copy of one module; only one can be active")
        return names

    def _changed(self) -> None:
        self.bank.refresh_one(self)

    def module_in_use(self) -> nn.Module:
        """What attributes are read from. Where rows choose, no one module serves all: it stays the active adapters'."""
        return self.original_module if self._plan is None or self.bank.mode is NO_ROWS else self._plan

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        mode = self.bank.mode
        if mode is None:
            return _run(self.module_in_use(), *args, **kwargs)
        used = {n for row in mode.of_row for n in self._with_a_copy(row)}
        names = tuple(n for n in mode.names if n in used)
        if names and any(hasattr(value, "get_seq_length") for value in (*args, *kwargs.values())):
            kind = type(self.original_module).__name__
            raise ValueError(
                f"adapter_names has {list(names)}, whose modules_to_save hold a {kind} that writes into the cache, "
                "which each copy would do too: give use_cache=False, or choose by set_adapter"
            )
        y = _run(self.original_module, *args, **kwargs)
        # Each adapter's copy is another weight, so it runs by itself; shapes do not depend on who asked for what.
        for i, name in enumerate(names):
            first = y if isinstance(y, Tensor) else next(iter(y.values() if isinstance(y, Mapping) else y))
            chosen = mode.mask(names, first.shape[0], first.device)[:, i].bool()
            # The other rows are zero in its input: where they are inf or NaN, a zero gradient times them would be NaN.
            mine, named = _own_rows(chosen, args, kwargs)
            y = _where(chosen, _run(self.modules_to_save[name], *mine, **named), y)
        return y

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("original_module", "modules_to_save"):
                raise
            return getattr(self.module_in_use(), name)


def _run(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """``module(*args, **kwargs)``, a linear layer's without the call: by the kernels where they are faster.

    A forward on the module would do so too, but code is compiled anew for each such object.
    """
    bare = type(module) is nn.Linear and not (hooked(module) or "forward" in vars(module))
    if bare and not kwargs and len(args) == 1:
        return dense_linear(*args, module.weight, module.bias)
    return module(*args, **kwargs)


def _own_rows(chosen: Tensor, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """The arguments, with zeros in the first tensor outside of the ``chosen`` rows."""

    def own(x: Tensor) -> Tensor:
        return mixed.zero_unless(chosen.view(-1, *[1] * (x.dim() - 1)), x) if x.is_floating_point() else x

    if args and isinstance(args[0], Tensor):
        return (own(args[0]), *args[1:]), kwargs
    name = next((name for name, x in kwargs.items() if isinstance(x, Tensor)), None)
    return args, kwargs if name is None else kwargs | {name: own(kwargs[name])}


def _where(chosen: Tensor, own: Any, others: Any) -> Any:
    """``own`` in the rows ``chosen``, else ``others``; of a module that gives several things in each of them."""
    if isinstance(others, (tuple, list)):
        rows = [_where(chosen, a, b) for a, b in zip(own, others, strict=True)]
        return rows if isinstance(others, list) else tuple(rows)
    if isinstance(others, Mapping):  # an output of transformers
        return type(others)(**{key: _where(chosen, own[key], value) for key, value in others.items()})
    if not isinstance(others, Tensor):
        return others
    return torch.where(chosen.view(-1, *[1] * (others.dim() - 1)), own, others)
