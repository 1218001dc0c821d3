"""``copy_tensors``: many tensors into as many others, by all threads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def copy_tensors(into: Sequence[Tensor], source: Sequence[Tensor]) -> None:
    """Copy each tensor of ``source`` into the one of ``into`` at its place; shapes are equal in pairs.

    One pass that all threads share where both sides are contiguous, on the CPU and of one dtype.
    """
    if not into:
        return
    on_cpu = all(t.is_cpu for t in into) and all(t.is_cpu for t in source)
    if on_cpu and torch.ops.pyfastpeft.copy_tensors.default(into, source):
        torch.autograd.graph.increment_version(into)  # as any write in place: what was derived from them is stale
    else:
        torch._foreach_copy_(into, source)
