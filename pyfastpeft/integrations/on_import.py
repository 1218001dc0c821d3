"""Doing something once another package's module is imported, so that nobody has to import it for that."""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any


def when_imported(name: str, action: Callable[[ModuleType], Any]) -> None:
    """Call ``action`` with the module ``name``: now where it is imported already, else when it first is."""
    if name in sys.modules:
        action(sys.modules[name])
    else:
        sys.meta_path.insert(0, _Watch(name, action))


def when_any_imported(package: str, action: Callable[[ModuleType], Any]) -> None:
    """Call ``action`` with every module inside ``package``: now where it is imported already, else when it is."""
    inside = f"{package}."
    for name, module in tuple(sys.modules.items()):
        if name.startswith(inside) and module is not None:
            action(module)
    sys.meta_path.insert(0, _Watch(inside, action))


class _Watch(importlib.abc.MetaPathFinder):
    """Finds a module the way the other finders do, and lets its execution end with an action.

    ``name`` is that of one module, after whose import this is removed; or, with a dot at its end, that of a package:
    then this stays, for every module inside.
    """

    def __init__(self, name: str, action: Callable[[ModuleType], Any]) -> None:
        self.name, self.action = name, action
        self.inside = name.endswith(".")
        self.asking = False

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if self.asking or not (fullname.startswith(self.name) if self.inside else fullname == self.name):
            return None
        self.asking = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self.asking = False
        if spec is not None and spec.loader is not None:  # none: a folder without code
            execute = spec.loader.exec_module

            def execute_and_act(module: ModuleType) -> None:
                execute(module)
                if self in sys.meta_path:
                    if not self.inside:
                        sys.meta_path.remove(self)
                    self.action(module)

            spec.loader.exec_module = execute_and_act
        return spec
