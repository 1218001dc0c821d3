"""``copy_tensors``: many tensors into as many others, by all threads; ``large_pages``: how memory is laid out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


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


@torch.no_grad()
def copy_tensors(into: Sequence[Tensor], source: Sequence[Tensor]) -> None:
    """Copy each tensor of ``source`` into the one of ``into`` at its place; shapes are equal in pairs."""
    if into and not copy_alike(into, source):
        torch._foreach_copy_(into, source)


def large_pages(t: Tensor) -> None:
    """Move the memory of a dense tensor on the CPU onto large pages, where the system can: it reads a third faster.

    Nothing else changes, and anything but such a tensor stays as it is.
    """
    if t.device.type == "cpu" and t.is_contiguous():
        torch.ops.pyfastpeft.large_pages.default(t)
