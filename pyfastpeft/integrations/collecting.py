"""Hooks with which transformers collects hidden states and attention weights, and when they do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers.utils import output_capturing

_COLLECTOR = getattr(output_capturing, "_active_collector", None)  # private: without it its hooks are anybody's


def collects(hook: Callable[..., Any]) -> bool:
    """Whether this is transformers' own hook that collects hidden states or attention weights.

    A model keeps these from the first call that asks for them; they do nothing but while :func:`is_collecting`.
    """
    return _COLLECTOR is not None and getattr(hook, "__module__", None) == output_capturing.__name__


def is_collecting() -> bool:
    """Whether a call that runs here asked for hidden states or attention weights."""
    return _COLLECTOR is not None and bool(_COLLECTOR.get())
