"""Peak memory of this process."""

from __future__ import annotations

import resource
import sys

import torch


def peak_bytes() -> int:
    """Largest resident set so far; on a GPU the largest allocation there instead."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
