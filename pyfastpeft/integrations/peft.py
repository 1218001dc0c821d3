"""PEFT's functions that read an adapter out of a model, and fill one, take this library's models as they take PEFT's.

Others call them on a model that they were given (TRL for a teacher that follows what trains, accelerate for
checkpoints), and find them where they are needed. Of a model that is not PEFT's own they would read nothing.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any


def teach_peft(home: ModuleType) -> None:
    """Widen the functions of ``home``, peft.utils.save_and_load, in all of PEFT's modules that have them by now."""
    for name in ("get_peft_model_state_dict", "set_peft_model_state_dict"):
        theirs = getattr(home, name)
        either = _either(theirs)
        for path, module in tuple(sys.modules.items()):
            if path.partition(".")[0] == "peft" and vars(module).get(name) is theirs:
                setattr(module, name, either)


def _either(theirs: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(theirs)
    def either(model: Any, *args: Any, **kwargs: Any) -> Any:
        from .. import functional
        from ..status import adapters_of

        try:
            adapters_of(model)
        except TypeError:
            return theirs(model, *args, **kwargs)
        return getattr(functional, theirs.__name__)(model, *args, **kwargs)

    return either
