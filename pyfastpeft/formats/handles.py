"""Handles of what the compiled operators hold, checked once: see csrc/held_ops.cpp and csrc/decoder_ops.cpp."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from typing import ClassVar

from ..compiled import C_FUNCTIONS


def _freeing(name: str) -> Callable[[int], None]:
    """A function of C, no operator: the collector may call it while a compiler or a mode records this thread's."""
    function = getattr(C_FUNCTIONS, name)
    function.argtypes, function.restype = [ctypes.c_int64], None
    return function


class Handle:
    """A handle: the number of an object that the compiled operators keep.

    The object is freed with the last reference to the handle, but not at interpreter exit, when the operators may be
    gone. Operators are called with ``number``: an ``int`` passes the dispatcher 0.4 µs sooner than an object of a class
    derived from it.
    """

    __slots__ = ("__weakref__", "number")
    _free: ClassVar[Callable[[int], None]]

    def __init__(self, number: int) -> None:
        self.number = number
        weakref.finalize(self, self._free, number).atexit = False

    def __reduce__(self) -> tuple:
        raise TypeError("a handle of what the compiled operators hold cannot be copied; make another")


class WeightHandle(Handle):
    """Of a packed weight in tiles."""

    __slots__ = ()
    _free = _freeing("pf_free_weight")


class BranchHandle(Handle):
    """Of an adapter in pairs."""

    __slots__ = ()
    _free = _freeing("pf_free_branch")


class DecoderHandle(Handle):
    """Of a decoder's layers."""

    __slots__ = ()
    _free = _freeing("pf_free_decoder")
