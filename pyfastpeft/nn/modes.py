"""Evaluation mode for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """``module`` is in evaluation mode while this lasts, and then it, and each module in it, in the one it was in."""
    training, modes = module.training, [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        module.train(training)  # some do more then than to set their mode
        for part, mode in modes:
            part.training = mode
