"""Peak memory of this process."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch


def peak_resident() -> int:
    """Largest resident set so far, in bytes."""
    status = Path("/proc/self/status")
    peak = status.read_text().partition("VmHWM:")[2] if status.exists() else ""
    if peak:  # where there is that, ru_maxrss begins with what the parent process held when it started this one
        return int(peak.split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peak_bytes() -> int:
    """:func:`peak_resident`; on a GPU the largest allocation there instead."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    return peak_resident()
