"""Autocast as the operators ask for it. Torch knows none for the meta device, and raises where it is asked."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast computes in on ``device``; None where it is off, or there is none."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def autocast_of(x: Tensor) -> dict[str, Any]:
    """Arguments with which ``torch.autocast`` is as it is now for what is on x's device."""
    dtype = autocast_dtype(x.device)
    device = "cpu" if x.is_meta else x.device.type  # any: off, it changes nothing on the meta device
    return {"device_type": device, "dtype": dtype, "enabled": dtype is not None}


def autocast_off(device: torch.device) -> AbstractContextManager[Any]:
    """Within it what is computed on ``device`` is in the dtypes that are written, whatever autocast would make them."""
    # Not entered where there is none: an exported graph would have a part of its own for what is within.
    if autocast_dtype(device) is None:
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, whose first argument is a tensor, within :func:`autocast_off`."""

    @functools.wraps(function)
    def run(first: Tensor, *rest: Any, **options: Any) -> Any:
        with autocast_off(first.device):
            return function(first, *rest, **options)

    return run
