"""Forwards of single modules that stand in the place of their class's own, and hooks around them: installed on an
instance, and removed."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class ModuleForward(ABC):
    """What one module runs instead of its class's ``forward``; gives the same result, up to rounding."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def own(self, *args: Any, **kwargs: Any) -> Any:
        """The class's own forward."""
        return type(self.module).forward(self.module, *args, **kwargs)

    @abstractmethod
    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


class NamedForward(ModuleForward):
    """A forward that knows its arguments by name, and shows its class's signature to those who inspect it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.__signature__ = inspect.signature(type(module).forward.__get__(module))
        self._rest = next((p.name for p in self.__signature__.parameters.values() if p.kind is p.VAR_KEYWORD), None)

    def named(self, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        named = dict(self.__signature__.bind_partial(*args, **kwargs).arguments)
        return named | named.pop(self._rest, {})


def install(module: nn.Module, forward: type[ModuleForward]) -> None:
    """Give ``module`` a ``forward`` of its own, unless it has one already, of whatever kind."""
    if "forward" not in vars(module):
        module.forward = forward(module)


def runs(module: nn.Module, kind: type | tuple[type, ...] = ModuleForward) -> bool:
    """Whether ``module`` runs a forward of this kind, NoneType being its class's."""
    return isinstance(vars(module).get("forward"), kind)


def remove(model: nn.Module, kind: type[ModuleForward] = ModuleForward) -> None:
    """Give every module in ``model`` that runs a ``kind`` its class's forward back."""
    for module in model.modules():
        if runs(module, kind):
            del module.forward


def hook(module: nn.Module, before: Callable[..., None], after: Callable[..., None]) -> None:
    """Call these around ``module``'s forward, ``before`` with its keywords; once, however often they are put there."""
    if before not in module._forward_pre_hooks.values():
        module.register_forward_pre_hook(before, with_kwargs=True)
        module.register_forward_hook(after, always_call=True)


def unhook(model: nn.Module, before: Callable[..., None], after: Callable[..., None]) -> None:
    """Take these from every module in ``model``; a handle of theirs, where copied, would take others along."""
    for module in model.modules():
        of_hooks = module._forward_pre_hooks_with_kwargs, module._forward_hooks_always_called
        for hooks, options in zip((module._forward_pre_hooks, module._forward_hooks), of_hooks, strict=True):
            for number in [n for n, found in hooks.items() if found in (before, after)]:
                del hooks[number], options[number]


def with_parameters(module: nn.Module, parameters: dict[str, Tensor | None]) -> nn.Module:
    """Like ``module``, with which it shares all else, but with these parameters by name; other threads may run both."""
    other = object.__new__(type(module))
    state = vars(other)
    state.update(vars(module), _parameters=parameters)
    if isinstance(forward := state.get("forward"), ModuleForward):
        state["forward"] = type(forward)(other)
    return other


def with_item(output: Any, name: str, index: int, value: Any) -> Any:
    """A model's output, a tuple or an object, with one item exchanged."""
    if isinstance(output, tuple):
        return (*output[:index], value, *output[index + 1 :])
    output[name] = value
    return output
