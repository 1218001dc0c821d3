"""Forwards of single modules that stand in the place of their class's own: installed on an instance, and removed."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module


class ModuleForward:
    """What one module runs instead of its class's ``forward``; gives the same result, up to rounding."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def own(self, *args: Any, **kwargs: Any) -> Any:
        """The class's own forward."""
        return type(self.module).forward(self.module, *args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError


def install(module: nn.Module, forward: type[ModuleForward]) -> None:
    """Give ``module`` a ``forward`` of its own, unless it has one already, of whatever kind."""
    if "forward" not in vars(module):
        module.forward = forward(module)


def remove(model: nn.Module, kind: type[ModuleForward] = ModuleForward) -> None:
    """Give every module in ``model`` that runs a ``kind`` its class's forward back."""
    for module in model.modules():
        if isinstance(vars(module).get("forward"), kind):
            del module.forward


_registrations = itertools.count(1)
_registered = 0


def registered() -> int:
    """A number that is another one after a module or parameter was registered anywhere, from the first call on."""
    _watch_registrations()
    return _registered


@functools.cache
def _watch_registrations() -> None:
    torch_module.register_module_module_registration_hook(_note_registration)
    torch_module.register_module_parameter_registration_hook(_note_registration)


def _note_registration(*_: Any) -> None:
    global _registered
    if not torch.compiler.is_dynamo_compiling():  # traced, the number would be a guard that never holds
        _registered = next(_registrations)


def hooked(module: nn.Module) -> bool:
    """Whether anything of the caller's runs with ``module``'s forward or backward pass."""
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return any(hooks)


def autocast_of(x: Tensor) -> dict[str, Any]:
    """Arguments with which ``torch.autocast`` is as it is now for what is on x's device."""
    device = x.device.type
    return {
        "device_type": device,
        "dtype": torch.get_autocast_dtype(device),
        "enabled": torch.is_autocast_enabled(device),
    }
