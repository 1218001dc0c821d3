"""Keeping what was made of tensors, and knowing when it is out of date.

A stamp (:func:`stamp_of`), the tensors' addresses and versions, tells whether their values may have changed, and
:func:`registered` whether modules or parameters may have been exchanged. While a CUDA graph is captured
(``captured``), nothing is stored.
"""

from __future__ import annotations

import functools
import threading
import weakref
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from .ops.tracing import captured


def stamp_of(tensors: list[Tensor]) -> tuple | None:
    """Changes whenever a value may have changed; None where that cannot be told.

    Whoever keeps a stamp keeps the adapter's tensors too: the address of one that is gone may become another's.
    """
    if any(t.is_inference() for t in tensors):
        return None
    return tuple((t.data_ptr(), t._version) for t in tensors)


def put_bounded(held: dict[Any, Any], key: Any, value: Any, most: int) -> None:
    """Put ``value`` into ``held`` and take the oldest out beyond ``most``; other threads may be doing the same."""
    if captured():
        return
    held.pop(key, None)
    held[key] = value
    for old in tuple(held)[:-most]:
        held.pop(old, None)


class AdapterCache:
    """What was made of adapters: of a single one it is kept for good, of several together for the last combinations.

    Rows can choose any combination, so that nothing else would bound their number.
    """

    _COMBINATIONS = 32

    def __init__(self) -> None:
        self._alone: dict[Any, Any] = {}
        self._together: dict[Any, Any] = {}

    def __len__(self) -> int:
        return len(self._alone) + len(self._together)

    def get(self, names: tuple[str, ...], key: Any) -> Any:
        """What is kept of ``names`` under ``key``; None: nothing."""
        return (self._alone if len(names) == 1 else self._together).get(key)

    def put(self, names: tuple[str, ...], key: Any, value: Any) -> None:
        if len(names) != 1:
            put_bounded(self._together, key, value, self._COMBINATIONS)
        elif not captured():
            self._alone[key] = value

    def clear(self) -> None:
        self._alone.clear()
        self._together.clear()


# By id: a module's own hash may be of what it does not have yet.
_touched: weakref.WeakValueDictionary[int, nn.Module] = weakref.WeakValueDictionary()
_count, _counting = 0, threading.RLock()


def registered() -> int:
    """A counter that has changed if a module or parameter was registered anywhere in a module that still exists.

    (transformers' models make a list of their layers anew for every forward: it is gone when somebody asks.) Counting
    begins with the first call. So does raising the versions of parameters that optimizers write.
    """
    global _count
    _watch()
    with _counting:
        while len(_touched):
            with suppress(KeyError):  # the last of them ended meanwhile
                _touched.popitem()
                _count += 1
        return _count


@functools.cache
def _watch() -> None:
    torch_module.register_module_module_registration_hook(_note_registration)
    torch_module.register_module_parameter_registration_hook(_note_registration)
    # Compiled steps too leave the versions as they are, and in a graph raising them would do nothing.
    register_optimizer_step_post_hook(torch.compiler.disable(_note_step))


def _note_step(optimizer: Optimizer, *_: Any) -> None:
    """Fused optimizers write parameters without raising ``_version``; stamps rely on it, so it is raised here."""
    stepped = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    torch.autograd.graph.increment_version([p for p in stepped if not p.is_inference()])


def _note_registration(module: nn.Module, *_: Any) -> None:
    if not torch.compiler.is_dynamo_compiling():  # traced, it would be a guard that never holds
        _touched[id(module)] = module
