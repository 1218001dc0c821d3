"""Numbers under which the operators hold what was checked once: see csrc/held_ops.cpp."""

from __future__ import annotations

from typing import ClassVar

import torch


class Held(int):
    """A number that is given back with its last reference."""

    _release: ClassVar[str]

    def __del__(self) -> None:
        getattr(torch.ops.pyfastpeft, self._release).default(self)

    def __reduce__(self) -> tuple:
        raise TypeError("what the operators hold cannot be copied, only held anew")


class HeldWeight(Held):
    """Of a packed weight in tiles."""

    _release = "release_weight"


class HeldBranch(Held):
    """Of an adapter in pairs."""

    _release = "release_branch"
