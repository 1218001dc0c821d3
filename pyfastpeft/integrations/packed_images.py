"""Rows that choose their adapters, where a model sees the images of a whole batch as one sequence of patches.

A layer counts equally many of its rows to each row of the batch. In such a sequence a row's share is as long as its
images are large.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..adapters import Parts, Rows

_PACKING = {"cu_seqlens", "image_sizes"}
"""Arguments that say where in such a sequence an image ends."""


def check_shares(model: nn.Module, rows: Rows, ids: Any, kwargs: Mapping[str, Any]) -> None:
    """Check that each layer that sees packed images finds its ``rows`` in them.

    Args:
        ids: the batch's ``input_ids`` [batch, tokens], if it is they that the model gets.
        kwargs: its other arguments.

    Raises:
        ValueError: rows choose different adapters there, and their shares are not known to be equal.
    """
    given = [n for n in kwargs if n.startswith(("pixel_values", "input_features")) and kwargs[n] is not None]
    if not given or len(set(rows.of_row)) < 2:
        return
    held = _adapters_there(model)
    if not rows.differing(held):
        return
    if given == ["pixel_values"] and _equal_shares(model.config, ids, kwargs.get("image_grid_thw")):
        return
    raise ValueError(
        f"adapter_names has different adapters for the {' and '.join(given)} of different rows; a "
        f"{type(model).__name__} packs those of all rows into one sequence, so of the adapters in its layers for them, "
        f"{sorted(held)}, all rows must use the same, or bring images alone, with equally many tokens each in input_ids"
    )


def _adapters_there(model: nn.Module) -> set[str]:
    """The adapters in layers for images or sounds, if these are packed."""
    if not isinstance(model, PreTrainedModel):
        return set()
    text = set(model.get_decoder().modules())
    others = [m for m in model.base_model.modules() if m is not model.base_model and m not in text]
    if not any(_packs(type(m)) for m in others):
        return set()
    return {name for m in others if isinstance(m, Parts) for name in m}


@cache
def _packs(kind: type[nn.Module]) -> bool:
    return not _PACKING.isdisjoint(inspect.signature(kind.forward).parameters)


@torch.compiler.disable
def _equal_shares(config: Any, ids: Any, grid: Tensor | None) -> bool:
    """Whether the images [images, time, height, width] of each row have equally many patches: those that stand in the
    text, each for as many, and no others."""
    token = getattr(config, "image_token_id", None)
    merged = getattr(getattr(config, "vision_config", None), "spatial_merge_size", None)
    if grid is None or token is None or merged is None or not isinstance(ids, Tensor) or ids.is_floating_point():
        return False
    counts = (ids == token).sum(1)
    return len(counts.unique()) == 1 and int(counts.sum()) * merged**2 == int(grid.prod(1).sum())
