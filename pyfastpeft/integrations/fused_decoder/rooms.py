"""The memory of a cache's keys and values, in which a decoder's one operator writes those of new tokens."""

from __future__ import annotations

import operator
import sys
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticCache,
    StaticLayer,
)

from ..fused_layers import written_in_transformers

LAYERS = {DynamicCache: (DynamicLayer, DynamicSlidingWindowLayer), StaticCache: (StaticLayer,)}


class _Room:
    """Keys and values of layers that keep equally many tokens, with room behind them.

    A token is written there, not concatenated, and nothing is written twice. The layers hold views; one that was
    cropped, reordered or replaced is no longer the view given to it, and is copied into new room.
    """

    def __init__(
        self, layers: list[DynamicLayer], shape: tuple[int, int, int, int], tokens: int, dtype: torch.dtype
    ) -> None:
        """Copy what ``layers`` hold, [batch, heads, past, dim], with room for ``tokens`` behind it and more."""
        batch, heads, self.past, dim = shape
        length = self.past + tokens
        self.size = max(length + 64, length * 5 // 4)
        self.tensor = torch.empty((2 * len(layers), batch, heads, self.size, dim), dtype=dtype, device="cpu")
        for i, layer in enumerate(layers):
            if layer.is_initialized:
                self.tensor[2 * i, :, :, : self.past] = layer.keys
                self.tensor[2 * i + 1, :, :, : self.past] = layer.values
        self.views: tuple[Tensor, ...] = ()

    def serves(self, layers: list[DynamicLayer], tokens: int) -> bool:
        held = [t for layer in layers if layer.is_initialized for t in (layer.keys, layer.values)]
        return (
            self.past + tokens <= self.size
            and len(held) == len(self.views)
            and all(map(operator.is_, held, self.views))
        )

    def show(self, layers: list[DynamicLayer], tokens: int) -> None:
        """Let the cache's layers hold ``tokens`` more, and what they keep of those before."""
        self.past += tokens
        first = max(0, self.past - tokens_kept(layers[0]))
        self.views = self.tensor[:, :, :, first : self.past].unbind(0)
        views = iter(self.views)
        for layer in layers:
            keys, values = next(views), next(views)
            if not layer.is_initialized:
                layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
            if type(layer) is DynamicSlidingWindowLayer:
                layer.cumulative_length += tokens


def tokens_kept(layer: DynamicLayer) -> int:
    """How many tokens a layer of a cache keeps."""
    return layer.sliding_window - 1 if type(layer) is DynamicSlidingWindowLayer else sys.maxsize


class Growing:
    """Keys and values of a :class:`DynamicCache` in rooms, one for each number of tokens that layers keep."""

    def __init__(self, layers: list[DynamicLayer]) -> None:
        kept = [tokens_kept(layer) for layer in layers]
        self.members = [[i for i, n in enumerate(kept) if n == each] for each in set(kept)]
        self.rooms: list[_Room | None] = [None] * len(self.members)
        self.keys: list[Tensor | None] = [None] * len(layers)
        self.values: list[Tensor | None] = [None] * len(layers)
        self.past = [0] * len(layers)

    def fits(
        self, layers: list[DynamicLayer], shape: tuple[int, int, int, int], tokens: int, dtype: torch.dtype
    ) -> bool:
        """Whether ``layers`` hold what they keep of keys and values of ``shape`` [batch, heads, past, dim]; there is
        room for ``tokens`` more then."""
        batch, heads, past, dim = shape
        for j, members in enumerate(self.members):
            those = [layers[i] for i in members]
            room = self.rooms[j]
            if room is None or not room.serves(those, tokens):
                held = (batch, heads, min(past, tokens_kept(those[0])), dim)
                if any(t.shape != held for layer in those if layer.is_initialized for t in (layer.keys, layer.values)):
                    return False
                room = self.rooms[j] = _Room(those, held, tokens, dtype)
                for n, tensor in enumerate(room.tensor.unbind(0)):
                    (self.values if n % 2 else self.keys)[members[n // 2]] = tensor
            for i in members:
                self.past[i] = room.past
        return True

    def show(self, layers: list[DynamicLayer], tokens: int) -> None:
        """Let the cache's layers hold ``tokens`` more."""
        for room, members in zip(self.rooms, self.members, strict=True):
            room.show([layers[i] for i in members], tokens)


class Static:
    """Keys and values of a :class:`StaticCache`, which has room for all its tokens."""

    def __init__(
        self, layers: list[StaticLayer], shape: tuple[int, int, int, int], tokens: int, dtype: torch.dtype
    ) -> None:
        """Those that ``layers`` hold, of ``shape`` [batch, heads, past, dim]; they are made if there are none yet."""
        batch, heads, past, dim = shape
        if not layers[0].is_initialized:
            new = torch.empty((batch, heads, tokens, dim), dtype=dtype, device="cpu")
            for layer in layers:
                layer.lazy_initialization(new, new)
        self.keys, self.values = [layer.keys for layer in layers], [layer.values for layer in layers]
        self.past = [past] * len(layers)

    def show(self, layers: list[StaticLayer], tokens: int) -> None:
        """Let the cache's layers hold ``tokens`` more."""
        for layer, past in zip(layers, self.past, strict=True):
            if hasattr(layer, "cumulative_length"):  # older versions count what is not zero
                layer.cumulative_length.fill_(past + tokens)


def is_known(cache: Any) -> bool:
    """Whether this is a cache of a kind that is known here, all of whose layers keep what they are given."""
    kinds = LAYERS.get(type(cache))
    if kinds is None or getattr(cache, "offloading", False) or "update" in vars(cache):
        return False
    if getattr(cache, "layer_class_to_replicate", None) not in (None, *kinds):  # of the layers that are yet to be made
        return False
    if any(written_in_transformers(kind.update) is None for kind in (type(cache), *kinds)):
        return False
    return all(type(layer) in kinds and "update" not in vars(layer) for layer in cache.layers)


def past_of(cache: DynamicCache | StaticCache, count: int, tokens: int) -> int | None:
    """How many tokens each of the ``count`` layers of ``cache`` has seen; None where there are others, only some have
    begun, or ``tokens`` more are for the cache itself."""
    layers = cache.layers
    if len(layers) != count or any(layer.is_initialized is not layers[0].is_initialized for layer in layers):
        return None
    past = int(layers[0].get_seq_length())
    length = past + tokens
    if type(cache) is StaticCache and length > layers[0].max_cache_len:
        return None  # it says so itself
    if any(getattr(layer, "record_past", False) and length >= layer.sliding_window for layer in layers):
        return None  # it keeps what it may have to go back to
    return past
