"""``copy_tensors``: many tensors into as many others, by all threads; ``large_pages`` and ``Arena``: where they lie."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from .backends import is_plain
from .tracing import traced


@torch.no_grad()  # the dispatcher looks at every tensor for autograd otherwise, which takes half as long as the copy
def copy_alike(into: Sequence[Tensor], source: Sequence[Tensor]) -> bool:
    """Copy each tensor of ``source`` into the one of ``into`` at its place, in one pass that all threads share.

    False, and nothing is copied, unless all are dense tensors on the CPU, of one shape and dtype in pairs. (That is
    found out in compiled code: hundreds of questions to tensors from Python take as long as the copy.)
    """
    try:
        copied = torch.ops.pyfastpeft.copy_tensors.default(into, source)
    except RuntimeError:  # not tensors of the CPU
        return False
    if copied:
        torch.autograd.graph.increment_version(into)  # as any write in place: what was derived from them is stale
    return copied


def copy_tensors(into: Sequence[Tensor], source: Sequence[Tensor]) -> None:
    """Copy each tensor of ``source`` into the one of ``into`` at its place; shapes are equal in pairs.

    Raises:
        ValueError: there are not as many of the one as of the other.
    """
    if len(into) != len(source):
        raise ValueError(f"source has {len(source)} tensors; it must have {len(into)}, as many as into")
    if into and not copy_alike(into, source):
        with torch.no_grad():
            torch._foreach_copy_(into, source)


def large_pages(t: Tensor) -> None:
    """Move the memory of a dense tensor on the CPU onto large pages, where the system can: it reads a third faster.

    Nothing else changes, and anything but such a tensor stays as it is.
    """
    if is_plain(t) and t.is_cpu and t.is_contiguous():
        torch.ops.pyfastpeft.large_pages.default(t)


class Arena:
    """Memory for small tensors that are read together, side by side on large pages.

    Each alone lies on small pages, and looking up their addresses takes as long as reading them: one row through
    2048 × 2048 and a LoRA of rank 16 takes 15 % more time than without, and 8 % more with A and B in an arena.
    """

    _BYTES = 1 << 22  # two large pages
    _ALIGNMENT = 64

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rest = torch.empty(0, dtype=torch.uint8, device="cpu")

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor on the CPU, for all modes. A part of the arena lives as long as a tensor in it."""
        if traced():  # a mode's tensors may have no memory, which others would be given a part of
            return torch.empty(shape, dtype=dtype, device="cpu")
        nbytes = math.prod(shape) * dtype.itemsize
        size = math.ceil(nbytes / self._ALIGNMENT) * self._ALIGNMENT
        with self._lock, torch.inference_mode(False), torch.no_grad():
            if size > len(self._rest):
                self._rest = torch.zeros(max(size, self._BYTES), dtype=torch.uint8, device="cpu")
                large_pages(self._rest)
            place, self._rest = self._rest[:nbytes].view(dtype).view(shape), self._rest[size:]
            return place
