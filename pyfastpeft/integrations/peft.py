"""PEFT's functions that are given a model take this library's as they take PEFT's.

Others call them on a model that they were given (TRL for a teacher that follows what trains, accelerate for
checkpoints, scripts that exchange adapters), and find them where they are needed. Of a model that is not PEFT's own
they would read nothing.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from ..nn.lora import LoraEmbedding
from ..nn.lora_layer import LoraLayer


def teach_peft(home: ModuleType) -> None:
    """Widen the functions of ``home``, in all of PEFT's modules that have them by now, and the classes that it asks
    layers for."""
    where, names = _FUNCTIONS.get(home.__name__, (None, ()))
    for name in names:
        theirs = getattr(home, name)
        either = _either(theirs, where)
        for path, module in tuple(sys.modules.items()):
            if path.partition(".")[0] == "peft" and vars(module).get(name) is theirs:
                setattr(module, name, either)
    for name, widen in _CLASSES.get(home.__name__, {}).items():
        if name in vars(home):  # which is no part of PEFT's interface: another version may ask for another class
            setattr(home, name, widen(vars(home)[name]))


def _either(theirs: Callable[..., Any], where: str) -> Callable[..., Any]:
    @functools.wraps(theirs)
    def either(model: Any, *args: Any, **kwargs: Any) -> Any:
        from ..status import adapters_of

        try:
            adapters_of(model)
        except TypeError:
            return theirs(model, *args, **kwargs)
        ours = getattr(importlib.import_module(where, __package__), theirs.__name__)
        return ours(model, *args, **kwargs)

    return either


def either_class(ours: Callable[[Any], bool]) -> Callable[[type], type]:
    """For a class of PEFT's: a subclass that ``isinstance`` finds all that is ``ours`` to be of as well."""

    @functools.cache
    def widen(theirs: type) -> type:
        class Either(type(theirs)):
            def __instancecheck__(cls, instance: Any) -> bool:
                return isinstance(instance, theirs) or ours(instance)

        return Either(theirs.__name__, (theirs,), {"__module__": __name__})

    return widen


_FUNCTIONS = {
    "peft.peft_model": ("..status", ("get_layer_status", "get_model_status")),
    "peft.utils.save_and_load": ("..functional", ("get_peft_model_state_dict", "set_peft_model_state_dict")),
    # theirs writes through .data, which nothing here would notice
    "peft.utils.hotswap": ("..functional", ("hotswap_adapter",)),
}
"""By module: where ours are, and their names."""
_CLASSES = {
    # rescale_adapter_scale
    "peft.helpers": {"LoraLayer": either_class(lambda module: isinstance(module, LoraLayer))},
    # which have a rate of their own
    "peft.optimizers.loraplus": {"Embedding": either_class(lambda module: isinstance(module, LoraEmbedding))},
}
TAUGHT = (*_FUNCTIONS, *_CLASSES)
"""The modules for :func:`teach_peft`."""
