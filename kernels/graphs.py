"""What a kernel does in its first call only, kept away from a CUDA graph that is being recorded or warmed up."""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

_RELAXED = 2
"""``cudaStreamCaptureModeRelaxed``, and AMD's."""


@functools.cache
def _exchange() -> Callable | None:
    """What exchanges the calling thread's capture mode, of the runtime that torch is linked with; None without one."""
    name = f"{'cuda' if torch.version.hip is None else 'hip'}ThreadExchangeStreamCaptureMode"
    return getattr(ctypes.CDLL(torch._C.__file__), name, None)


@contextlib.contextmanager
def relaxed() -> Iterator[None]:
    """For allocating or loading a kernel, forbidden otherwise while this thread or another captures."""
    exchange = _exchange() or (lambda mode: None)
    mode = ctypes.c_int(_RELAXED)
    exchange(ctypes.byref(mode))
    try:
        yield
    finally:
        exchange(ctypes.byref(mode))


def constant_on(values: Tensor, device: torch.device) -> Tensor:
    """``values`` on ``device``, to be kept from call to call.

    A thread of its own copies them, in the default stream: what the calling one allocates may be from a graph's pool,
    where all that lives on must be accounted for, and its stream may be what a graph records.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_copied, values, device).result()


def _copied(values: Tensor, device: torch.device) -> Tensor:
    with relaxed():
        return values.to(device)
