"""Rows that choose their adapters, where a model sees the images of a whole batch as one sequence of patches or tokens.

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

_PACKING = {
    "cu_seqlens": ("pixel_values", "input_features"),
    "image_sizes": ("pixel_values", "input_features"),
    "pixel_position_ids": ("pixel_values",),
    "pooled_patches_idx": ("pixel_values",),
}
"""Arguments that say where in such a sequence an image ends, or which tokens of an image go into one → how the model's
arguments begin of which it is made."""

_SHARES = ("image_grid_thw", "image_position_ids", "image_token_pooling")
"""Arguments from which :func:`_equal_shares` tells how much of it is a row's. (Pixtral has none of them.)"""


def check_shares(model: nn.Module, rows: Rows, ids: Any, kwargs: Mapping[str, Any]) -> None:
    """Check that each layer that sees packed images finds its ``rows`` in them.

    Args:
        ids: the batch's ``input_ids`` [batch, tokens], if it is they that the model gets.
        kwargs: its other arguments.

    Raises:
        ValueError: rows choose different adapters there, and their shares are not known to be equal.
    """
    given = [n for n in kwargs if n.startswith(("pixel_values", "input_features")) and kwargs[n] is not None]
    if not given or len(set(rows.of_row)) < 2 or not isinstance(model, PreTrainedModel):
        return
    text = set(model.get_decoder().modules())
    others = [m for m in model.base_model.modules() if m is not model.base_model and m not in text]
    packed = {start for m in others for start in _packed_by(type(m))}
    given = [n for n in given if n.startswith(tuple(packed))]
    held = {name for m in others if isinstance(m, Parts) for name in m}
    if not given or not rows.differing(held):
        return
    if given == ["pixel_values"] and _equal_shares(model.config, ids, kwargs):
        return
    tells = any(kwargs.get(name) is not None for name in _SHARES)
    raise ValueError(
        f"adapter_names has different adapters for the {' and '.join(given)} of different rows; a "
        f"{type(model).__name__} packs those of all rows into one sequence, so of the adapters in its layers for them, "
        f"{sorted(held)}, all rows must use the same"
        + (", or bring images alone, with equally many tokens each in input_ids" if tells else "")
    )


@cache
def _packed_by(kind: type[nn.Module]) -> tuple[str, ...]:
    names = inspect.signature(kind.forward).parameters
    return tuple(start for name, starts in _PACKING.items() if name in names for start in starts)


@torch.compiler.disable
def _equal_shares(config: Any, ids: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether the images of each row are equally much of all that the layers for them see: those that stand in the
    text, each for as many tokens, and no others."""
    token, vision = getattr(config, "image_token_id", None), getattr(config, "vision_config", None)
    if token is None or not isinstance(ids, Tensor) or ids.is_floating_point():
        return False
    counts = (ids == token).sum(1)
    rows, share = len(counts), int(counts[0])
    if not share or bool((counts != share).any()):
        return False
    grid, positions, patches = map(kwargs.get, _SHARES)
    merged, pooled = (getattr(vision, name, None) for name in ("spatial_merge_size", "pooling_kernel_size"))
    if grid is not None and merged is not None:  # [images, time, height, width] in patches
        return rows * share * merged**2 == int(grid.prod(1).sum())
    # Elsewhere only tokens are packed, and the encoder in front sees images or crops: both must be shared equally.
    if len(kwargs["pixel_values"]) % rows:
        return False
    if positions is not None and pooled is not None:  # [images, patches, 2], padding is (-1, -1)
        shown = (positions != -1).all(-1).sum(1).view(rows, -1).sum(1)
        return bool((shown == share * pooled**2).all())
    # [tokens, patches], numbered through all crops, or from transformers 5.25 on through an image's; padding is -1
    if patches is None or len(patches) != rows * share:
        return False
    of_crop = kwargs["pixel_values"].shape[1:-1].numel()
    crops, grids = kwargs.get("image_num_crops"), kwargs.get("image_grids")
    if crops is not None and grids is not None:
        tokens = grids[:, 0] * grids[:, 1] + grids[:, 2] * grids[:, 3]
        if len(tokens) != len(crops) or int(tokens.sum()) != len(patches):
            return False
        first = (of_crop * (crops.cumsum(0) - crops)).repeat_interleave(tokens).unsqueeze(1)
        patches = torch.where(patches < 0, patches, patches + first)
    of_row = of_crop * len(kwargs["pixel_values"]) // rows
    row = torch.arange(rows, device=patches.device).repeat_interleave(share).unsqueeze(1)
    return bool(((patches // of_row == row) | (patches < 0)).all())
