"""Tiles by measurement: the best of a few around a kernel's formula, found once a shape and kept in a file.

Off unless ``PYFASTPEFT_TUNE=1``: the first call of each shape then compiles and times about ten variants. What it found
lies in ``pyfastpeft/tiles.json`` in the user's cache folder, for every device name and version of Triton apart.
"""

from __future__ import annotations

import functools
import json
import math
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..hub.files import write_text
from .tracing import captured, is_compiling

Tiles = Any
"""A kernel's NamedTuple of integers."""

_ENABLED = os.environ.get("PYFASTPEFT_TUNE") == "1"


def tuned(
    call: tuple, device: torch.device, formula: Tiles, around: Callable[[Tiles], Sequence[Tiles]], run: Callable
) -> Tiles:
    """The tiles for a kernel's call: ``formula``'s, or with tuning on the fastest of it and ``around(formula)``.

    Args:
        call: what is tuned: the kernel, the dtype, the class of shapes.
        run: the call with the tiles that it is given.
    """
    if not _ENABLED or is_compiling():
        return formula
    call, place, found = " ".join(map(str, call)), _place(device), _found()
    if len(found.setdefault(place, {}).get(call, ())) != len(formula):  # unknown, or of another version's tiles
        if captured():  # nothing can be timed in a graph
            return formula
        times = {cut: seconds(functools.partial(run, cut)) for cut in (formula, *around(formula))}
        found[place][call] = list(min(times, key=times.get))
        _keep(place, call, found[place][call])
    return type(formula)(*found[place][call])


def seconds(run: Callable[[], Any]) -> float:
    """How long ``run`` takes on the current GPU, its cache cold; infinity if its kernels do not fit there."""
    from triton.runtime.errors import TritonError
    from triton.testing import do_bench

    try:
        return do_bench(run, warmup=5, rep=20, return_mode="median") / 1e3
    except TritonError:
        return math.inf


@functools.cache
def _place(device: torch.device) -> str:
    import triton

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{name}, triton {triton.__version__}"


def path() -> Path:
    """The file of what was found."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "pyfastpeft" / "tiles.json"


@functools.cache
def _found() -> dict[str, dict[str, list[int]]]:
    return _read()


def _read() -> dict[str, dict[str, list[int]]]:
    """place → call → tiles; empty without a file, or with one that is no such thing."""
    try:
        held = json.loads(path().read_text(encoding="utf-8"))
        if all(type(n) is int for calls in held.values() for tiles in calls.values() for n in tiles):
            return held
        problem = "not every tile is an integer"
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        problem = str(error)
    warnings.warn(f"{path()} is ignored, as it holds no tiles: {problem}", stacklevel=4)
    return {}


def _keep(place: str, call: str, tiles: list[int]) -> None:
    """Adds to the file what other processes may have added to meanwhile."""
    held = _read()
    held.setdefault(place, {})[call] = tiles
    try:
        write_text(json.dumps(held, indent=1, sort_keys=True), path())
    except OSError as error:
        warnings.warn(f"tiles could not be kept in {path()}: {error}", stacklevel=3)
