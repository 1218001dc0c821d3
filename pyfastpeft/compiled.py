"""Loads the compiled operators, which are in ``torch.ops.pyfastpeft`` from then on."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

_PATH = next(Path(__file__).parent.glob("_C*.so"), None)
if _PATH is None:
    raise ImportError("pyfastpeft's operators are not compiled: install the package (`pip install .`)")
if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10):
    raise ImportError(f"torch {torch.__version__} is here; pyfastpeft needs 2.10 or newer")
torch.ops.load_library(str(_PATH))

C_FUNCTIONS = ctypes.CDLL(str(_PATH))
"""What the library has beside operators."""
