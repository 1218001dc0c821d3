"""What arguments must be. Errors name the argument, what it was and what it must be."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ..formats.packed import FLOATS

_NUMBERS = (float, Real, torch.SymFloat)
_FACTORS = (float, Tensor, Real, torch.SymFloat)  # in the order of their cost


def check_tensor(name: str, value: Any) -> None:
    """Whether the argument ``name`` is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}; it must be a tensor")


def check_matrix(name: str, value: Any, shape: str) -> None:
    """Whether the argument ``name`` is a tensor of two dimensions, which ``shape`` names."""
    check_tensor(name, value)
    if value.dim() != 2:
        raise ValueError(f"{name} has shape {tuple(value.shape)}; it must be {shape}")


def check_floats(name: str, t: Any) -> None:
    """Whether the argument ``name`` is a tensor of a dtype in ``FLOATS``."""
    if not isinstance(t, Tensor) or t.dtype not in FLOATS:
        what = f"has dtype {t.dtype}" if isinstance(t, Tensor) else f"is a {type(t).__name__}"
        raise TypeError(f"{name} {what}; it must be a tensor of float32, bfloat16 or float16")


def floating_dtype(given: torch.dtype | str) -> torch.dtype:
    """The dtype that the argument ``dtype`` of a whole model gives, or names.

    Raises:
        ValueError: it is no floating-point dtype.
    """
    dtype = getattr(torch, given, None) if isinstance(given, str) else given
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype is {given!r}; it must be a floating-point torch.dtype or its name, such as 'bfloat16'")
    return dtype


def check_dropout(name: str, value: Any) -> None:
    """Whether the argument ``name`` is a share that can be left out."""
    if not isinstance(value, _NUMBERS):
        raise TypeError(f"{name} is a {type(value).__name__}; it must be a number")
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{name} is {value}; it must lie in [0, 1)")


def check_factor(name: str, value: Any) -> None:
    """Whether the argument ``name`` is a number or a tensor of them."""
    if not isinstance(value, _FACTORS):
        raise TypeError(f"{name} is a {type(value).__name__}; it must be a number or a tensor")


def check_number(name: str, value: Any) -> None:
    """Whether the argument ``name`` is a number or a tensor of one."""
    check_factor(name, value)
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(f"{name} has shape {tuple(value.shape)}; it must be a number or a tensor of one")


def is_among(value: Any, choices: Iterable[Any]) -> bool:
    """Whether ``value`` equals one of ``choices``, as an array or a tensor of several values does not."""
    try:
        return value in choices
    except (RuntimeError, ValueError):
        return False


def check_flag(name: str, value: Any) -> None:
    """Whether the argument ``name`` is true or false, be it in numpy's way."""
    if not is_among(value, (True, False)):
        raise TypeError(f"{name} is {value!r}; it must be True or False")


def check_choice(name: str, value: Any, choices: Iterable[str]) -> None:
    """Whether the argument ``name`` is one of ``choices``."""
    if not is_among(value, choices := list(choices)):
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(choices)}")


def as_count(name: str, value: Any, least: int = 1) -> int:
    """The argument ``name``, a number of things, as a plain int, which JSON takes; numpy's integers are welcome."""
    try:
        count = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        count = None
    if count is None or count < least:
        raise ValueError(f"{name} is {value!r}; it must be an integer of at least {least}")
    return count
