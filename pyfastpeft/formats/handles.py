"""Handles of what the compiled operators hold, checked once: see csrc/held_ops.cpp and csrc/decoder_ops.cpp."""

from __future__ import annotations

import weakref
from typing import ClassVar

import torch


class Handle:
    """A handle: the number of an object that the compiled operators keep.

    The object is freed with the last reference to the handle, but not at interpreter exit, when the operators may be
    gone. Operators are called with ``number``: an ``int`` passes the dispatcher 0.4 µs sooner than an object of a class
    derived from it.
    """

    __slots__ = ("__weakref__", "number")
    _release: ClassVar[str]

    def __init__(self, number: int) -> None:
        self.number = number
        release = getattr(torch.ops.pyfastpeft, self._release).default
        weakref.finalize(self, release, number).atexit = False

    def __reduce__(self) -> tuple:
        raise TypeError("a handle of what the compiled operators hold cannot be copied; make another")


class WeightHandle(Handle):
    """Of a packed weight in tiles."""

    __slots__ = ()
    _release = "release_weight"


class BranchHandle(Handle):
    """Of an adapter in pairs."""

    __slots__ = ()
    _release = "release_branch"


class DecoderHandle(Handle):
    """Of a decoder's layers."""

    __slots__ = ()
    _release = "free_decoder"
