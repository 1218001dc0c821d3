"""Autocast as the operators ask for it. Torch knows none for the meta device, and raises where it is asked."""

from __future__ import annotations

import functools
from collections.abc import Callable
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


def without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, whose first argument is a tensor, in the dtypes that it says, whatever autocast would make them."""

    @functools.wraps(function)
    def run(first: Tensor, *rest: Any) -> Any:
        if first.is_meta:
            return function(first, *rest)
        with torch.autocast(first.device.type, enabled=False):
            return function(first, *rest)

    return run
