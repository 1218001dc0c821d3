"""transformers' attention by :func:`~pyfastpeft.ops.prefix_attention`: ``attn_implementation="pyfastpeft"``.

Importing this module registers the attention function and its mask function, so that after ``import pyfastpeft`` the
name can be given to ``from_pretrained`` or ``set_attn_implementation``.

The mask function never makes a mask of [queries, keys] where it knows the pattern. It gives None where a single query
sees every key, else one int32 number a key: *key positions* [batch, 1, window, keys], the place of the key counted from
the first query, plus ``HIDDEN`` where it is padding. The query at t sees the keys at t and before. Keys that every
query sees lie before all queries, so a mask that is not causal is of the same form; the third dimension is the sliding
window, 1 where there is none, and takes no memory (its stride is 0). If the cache has already dropped a row's first
token, its padding gets place minus ``HIDDEN``. That is outside every window, and it moves the prefix, which lies right
before the first key not hidden, out of the window too. The mask therefore describes the whole pattern; beside one,
attributes of the module such as ``is_causal`` are not consulted. Patterns of other kinds (packed sequences, chunks,
whatever a model adds) are transformers' own bool masks. Where such a mask is cut to a sliding window, its attributes
say where a prefix lies: ``_places``, key positions, as over Gemma 3's images; of packed sequences ``_packed``, the
window and where each begins.

A prefix of keys and values, shared by the batch or chosen by row, comes from the attention module itself:
``vars(module)["_prefix"].current(batch)`` gives a :class:`~pyfastpeft.adapters.Prefix` or None.

What the operator has no kernel for goes to transformers' own functions with the prefix concatenated: other devices and
dtypes, dropout, masks of the caller's own and position biases to its sdpa attention; capped scores, attention sinks and
``output_attentions`` to the model's eager attention, which is its definition.
"""

from __future__ import annotations

import functools
import inspect
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    AttentionMaskInterface,
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    packed_sequence_mask_function,
    prepare_padding_mask,
    sdpa_mask,
    sliding_window_overlay,
)
from transformers.modeling_utils import AttentionInterface
from transformers.utils import logging

from ..adapters import Prefix
from ..formats.packed import FLOATS
from ..ops.backends import Backend, choose_attention
from ..ops.prefix_attention import HIDDEN, prefix_attention
from ..ops.reference import prefix_rows, sees_keys, sees_prefix
from ..ops.tracing import is_compiling, traced
from .distinct_tokens import are_distinct, attend_in_rows

NAME = "pyfastpeft"
"""Of this attention, for ``attn_implementation``."""
HANDED_DOWN = "pyfastpeft_prefixes"
"""The argument by which a forward hands down the layers' prefixes where they could not be looked up: in compiled code,
and where checkpoints run layers again, which keep their arguments."""

logger = logging.get_logger(__name__)

_EAGER_ONLY = {"softcap": "caps its scores", "s_aux": "has attention sinks", "sinks": "has attention sinks"}
_SPARSE = ("indices", "block_indices")  # of the keys a query sees
_AND = and_masks(causal_mask_function).__code__
_SLIDING = sliding_window_overlay(1).__code__
_PACKED = packed_sequence_mask_function(torch.empty(0)).__code__


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    config: Any = None,
    **kwargs: Any,
) -> Tensor | None:
    """The mask of a forward, as transformers asks for it: None, key positions (see above), or transformers' bool mask.

    ``attention_mask`` is bool [batch, keys seen so far] or None; offsets are the places of the first query and of the
    first key in the sequence.
    """
    causal = mask_function is causal_mask_function and allow_is_causal_skip
    full = mask_function is bidirectional_mask_function and bool(allow_is_bidirectional_skip)
    window = _window(mask_function, use_vmap, allow_is_bidirectional_skip, config, local_size)
    # What may not be skipped is packed, or one token over a static cache.
    unpacked = allow_is_causal_skip or q_length == 1 < kv_length
    if not (causal or full or (window and unpacked)):
        mask = sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            local_size=local_size,
            allow_is_causal_skip=False,
            allow_is_bidirectional_skip=bool(allow_is_bidirectional_skip),
            use_vmap=use_vmap,
            device=device,
            config=config,
            **kwargs,
        )
        sequences = _enclosed(mask_function, _PACKED)
        if sequences is not None:
            if window is not None:  # sequences are numbered from left to right
                mask._packed = window, torch.searchsorted(sequences, sequences)
        elif (window := _enclosed(mask_function, _SLIDING) or 1) > 1:
            padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)
            mask._places = _key_positions(padding, kv_length, kv_offset, q_offset, window, batch_size, device)
        return mask
    padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if window is None and _sees_all(padding, causal, q_length, kv_length, q_offset, kv_offset):
        return None
    first_query = kv_offset + kv_length if full else q_offset
    return _key_positions(padding, kv_length, kv_offset, first_query, window, batch_size, device)


def _key_positions(
    padding: Tensor | None,
    kv_length: int,
    kv_offset: int,
    first_query: int | Tensor,
    window: int | None,
    batch_size: int,
    device: torch.device | str,
) -> Tensor:
    """What the module's docstring says, of ``padding`` bool [batch, keys seen so far]."""
    places = torch.arange(kv_length, dtype=torch.int32, device=device) + (kv_offset - first_query)
    places = places.to(torch.int32).view(1, 1, 1, kv_length)
    if padding is not None:
        hidden = places + HIDDEN
        if window is not None:
            begun = padding[:, :kv_offset].any(1)
            hidden = torch.where(begun[:, None, None, None], places - HIDDEN, hidden)
        shown = padding[:, kv_offset : kv_offset + kv_length]
        places = torch.where(shown[:, None, None], places, hidden)
    return places.expand(batch_size, 1, window or 1, kv_length)


def _window(
    mask_function: Callable, use_vmap: bool, bidirectional: bool | None, config: Any, local_size: int | None
) -> int | None:
    """``local_size`` where ``mask_function`` is transformers' causal sliding window of it, and nothing on top.

    By what surrounds the function: a compiler cannot look into it.
    """
    sliding = (
        local_size is not None
        and local_size > 1
        and bidirectional is None
        and not use_vmap
        and mask_function.__code__ is _AND
        and getattr(config, "sliding_window", None) == local_size
        and getattr(config, "attention_chunk_size", None) is None
    )
    return local_size if sliding else None


def _enclosed(mask_function: Callable, code: CodeType) -> Any:
    """What transformers' function of this ``code`` holds, where it is the last of those that ``mask_function`` joins:
    the size of a sliding window, to which masks of any kind are cut, or the sequences that are packed, which come after
    it. Else, and in compiled code, which cannot look into functions, None."""
    if is_compiling() or getattr(mask_function, "__code__", None) is not _AND:
        return None
    last = mask_function.__closure__[0].cell_contents[-1]
    return last.__closure__[0].cell_contents if getattr(last, "__code__", None) is code else None


def _sees_all(
    padding: Tensor | None, causal: bool, q_length: int, kv_length: int, q_offset: int | Tensor, kv_offset: int
) -> bool:
    """Whether there is one query, which sees every key.

    For more queries None would mean what the module's ``is_causal`` says, which may be wrong in models that have
    no sdpa attention.
    """
    if q_length != 1:
        return False
    if padding is not None:
        padding = padding[:, kv_offset : kv_offset + kv_length]
    # What compiled code may not depend on, and what only a GPU knows, which would be waited for.
    unseen = traced()
    if any(isinstance(t, Tensor) and (unseen or not t.is_cpu) for t in (padding, q_offset)):
        return False
    if padding is not None and not padding.all():
        return False
    return not causal or kv_offset + kv_length == int(q_offset) + 1


def unpadded_keys(masks: dict[str, Tensor | None]) -> Tensor | None:
    """The keys that are no padding, bool [batch or 1, keys], of a forward's masks by kind of layer; where every layer
    has a sliding window, of the keys that its cache still holds.

    None: all, or the masks are of another form.
    """
    mask = masks.get("full_attention")
    if "full_attention" not in masks:
        mask = masks.get("sliding_attention")
        mask = getattr(mask, "_places", mask)
        if mask is not None and mask.dtype == torch.bool:
            return None  # what is cut to a window does not tell padding from what lies before it
    if mask is None or mask.dtype not in (torch.int32, torch.bool):
        return None
    return mask[:, 0, -1] if mask.dtype == torch.bool else mask[:, 0, 0].abs() < HIDDEN // 2


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of one layer, as transformers' models call it.

    Args:
        module: the attention layer; it may hold a prefix.
        query: [batch, heads, queries, dim].
        key, value: [batch, kv heads, keys, dim].
        attention_mask: what :func:`attention_mask` made, a mask that sdpa takes, or that of :class:`DistinctTokens`.
        kwargs: of these ``position_bias`` [batch or 1, heads, queries, keys] counts the prefix, if any, as keys in
            front.

    Returns:
        [batch, queries, heads, dim], and the weights where ``output_attentions`` asks for them.

    Raises:
        ValueError: a layer that chooses keys by index, or a prefix where it cannot be placed: with a position bias that
            leaves it out, or in a sliding window under a mask of another kind.
    """
    holder = vars(module).get("_prefix")
    handed, prefix = kwargs.pop(HANDED_DOWN, None), None
    if holder is not None:
        prefix: Prefix | None = holder.current(query.shape[0]) if handed is None else holder.of(handed)
    if not are_distinct(attention_mask):
        return _attention(module, query, key, value, attention_mask, prefix, dropout, scaling, is_causal, kwargs)

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, prefix: Prefix | None) -> Tensor:
        return _attention(module, q, k, v, mask, prefix, dropout, scaling, True, kwargs.copy())[0]

    return attend_in_rows(attend, query, key, value, attention_mask, prefix), None


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    prefix: Prefix | None,
    dropout: float,
    scaling: float | None,
    is_causal: bool | None,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """Of tokens in their rows; the arguments are :func:`attention_forward`'s."""
    causal = attention_mask is None and (getattr(module, "is_causal", True) if is_causal is None else is_causal)
    bias = kwargs.get("position_bias")
    if causal and key.shape[2] > query.shape[2] > 1:
        if bias is not None:
            kwargs["position_bias"] = bias[..., : bias.shape[3] - key.shape[2] + query.shape[2]]
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
    places = attention_mask is not None and attention_mask.dtype == torch.int32
    if places and key.shape[2] > attention_mask.shape[3] == query.shape[2]:
        # A layer that torch's checkpoints run again fills its cache again: only the last keys have a graph now.
        key, value = key[:, :, -query.shape[2] :], value[:, :, -query.shape[2] :]
    form = _form(attention_mask)
    if (
        dropout
        or form is None
        or _out_of_reach(module, key, attention_mask, prefix, kwargs)
        or choose_attention(query) is Backend.REFERENCE
        or not (query.dtype == key.dtype == value.dtype)
        or value.shape[3] != query.shape[3]
        or bias is not None
        or any(kwargs.get(name) is not None for name in (*_EAGER_ONLY, *_SPARSE))
        or kwargs.get("output_attentions")
    ):
        kwargs |= {"dropout": dropout, "scaling": scaling}
        return _elsewhere(module, query, key, value, attention_mask, prefix, causal, kwargs)
    window, mask = form
    if mask is not None:
        mask = mask.expand(query.shape[0], *mask.shape[1:])  # one of the caller's own may stand for every row
    prefix_k, prefix_v, index, lengths = prefix or (None,) * 4
    out = prefix_attention(
        query,
        key,
        value,
        prefix_k,
        prefix_v,
        causal=causal or (mask is not None and mask.dim() == 4),
        scale=scaling,
        mask=mask,
        prefix_index=index,
        window=window,
        prefix_lengths=lengths,
    )
    return out.transpose(1, 2), None


def _form(mask: Tensor | None) -> tuple[int | None, Tensor | None] | None:
    """(window, the operator's mask), or None where the operator cannot take it."""
    if mask is None:
        return None, None
    if mask.dtype == torch.int32:
        return (mask.shape[2] if mask.shape[2] > 1 else None), mask[:, :, :1]
    if mask.dtype == torch.bool and mask.shape[1] == mask.shape[2] == 1:
        return None, mask[:, 0, 0]
    return None


def _elsewhere(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    prefix: Prefix | None,
    causal: bool,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """What the operator does not compute, by transformers' own functions."""
    layer = type(module).__name__
    for name in _SPARSE:
        if kwargs.get(name) is not None:
            raise ValueError(
                f'{layer} chooses its keys by {name}, which attn_implementation "{NAME}" cannot; use "eager"'
            )
    if mask is not None and not (mask.is_floating_point() or mask.dtype in (torch.bool, torch.int32)):
        raise ValueError(f"attention_mask is {mask.dtype}; of four dimensions it must be bool or floating-point")
    reasons = [reason for name, reason in _EAGER_ONLY.items() if kwargs.get(name) is not None]
    if reasons:
        logger.warning_once(f'{layer} {reasons[0]}, which "{NAME}" attention leaves to transformers\' eager function.')
    eager = bool(reasons or kwargs.get("output_attentions"))
    if prefix is not None or eager or (mask is not None and mask.dtype == torch.int32):
        key, value, mask = _dense(module, query, key, value, mask, prefix, causal, kwargs)
        causal = causal and mask is None
    if not eager:
        return sdpa_attention_forward(module, query, key, value, mask, is_causal=causal, **kwargs)
    function = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if function is None:
        raise ValueError(f'{layer} has no eager attention for what attn_implementation "{NAME}" cannot do here')
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)
    return function(module, query, key, value, mask, **kwargs)


def _dense(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    prefix: Prefix | None,
    causal: bool,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys and values with the prefix in front, and the mask [batch or 1, 1, queries, keys] of all of them; None: each
    query sees every key."""
    batch, queries, keys = query.shape[0], query.shape[2], key.shape[2]
    window, places, begins = None, getattr(mask, "_places", mask), None
    positions = torch.arange(queries - keys, queries, device=key.device).unsqueeze(0)  # the last keys are the queries'
    if mask is None and (causal or prefix is not None):
        mask = sees_keys(positions, queries, causal, None).unsqueeze(1)
    elif places is not None and places.dtype == torch.int32:
        mask = _spread(mask, queries) if mask is places else mask
        window, places = _form(places)
        positions = places[:, 0, 0]
    elif hasattr(mask, "_packed"):
        window, begins = mask._packed
    elif _out_of_reach(module, key, mask, prefix, kwargs):
        raise ValueError(
            f"{type(module).__name__} sees a part of the sequence only, and attention_mask is {tuple(mask.shape)}; "
            "with a prefix it must be [batch, keys], with one sequence a row; compiled code takes position_ids without "
            "a mask for those of several"
        )
    if prefix is None:
        return key, value, None if getattr(mask, "_shows_all", False) else mask
    count = prefix.k.shape[2]
    bias = kwargs.get("position_bias")
    if bias is not None and bias.shape[3] != count + keys:
        raise ValueError(f"{type(module).__name__} adds a position bias, which says nothing about a prefix")
    slot, lengths = prefix_rows(batch, count, prefix.index, prefix.lengths, key.device)
    seen = sees_prefix(count, lengths, positions, queries, window, begins).unsqueeze(1)
    if mask.dtype != torch.bool:
        seen = torch.zeros_like(seen, dtype=mask.dtype).masked_fill(~seen, torch.finfo(mask.dtype).min)
    heads = mask.shape[1]
    mask = torch.cat([seen.expand(batch, heads, queries, count), mask.expand(batch, heads, queries, -1)], -1)
    return torch.cat([prefix.k[slot].to(key), key], 2), torch.cat([prefix.v[slot].to(value), value], 2), mask


def _out_of_reach(
    module: nn.Module, key: Tensor, mask: Tensor | None, prefix: Prefix | None, kwargs: dict[str, Any]
) -> bool:
    """Whether queries may be too far from the prefix to see it, of which ``mask`` itself says nothing."""
    if prefix is None or mask is None or mask.dtype == torch.int32:
        return False
    config = getattr(module, "config", None)
    kinds = getattr(config, "layer_types", None)
    if kinds and kinds[getattr(module, "layer_idx", 0)] == "full_attention":  # whatever else the module says
        return False
    sizes = (
        kwargs.get("sliding_window"),
        getattr(module, "sliding_window", None),
        getattr(config, "attention_chunk_size", None),
    )
    reach = min([math.inf, *(size for size in sizes if size is not None)])  # compilers follow no default
    return reach < prefix.k.shape[2] + key.shape[2]


def _spread(places: Tensor, queries: int) -> Tensor:
    """Key positions as a bool mask [batch, 1, queries, keys]; made once for all layers."""
    spread = getattr(places, "_spread", None)
    if spread is None:
        window, positions = _form(places)
        spread = sees_keys(positions[:, 0, 0], queries, True, window).unsqueeze(1)
        if not is_compiling():
            places._spread = spread
        if spread.is_cpu and not traced():  # else each layer adds nothing to its position bias
            spread._shows_all = bool(spread.all())
    return spread


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, attention_mask)


def use_fast_attention(model: nn.Module, fast: bool = True) -> None:
    """Let the transformers models inside ``model`` use this attention for sdpa, or sdpa again where they did.

    Left alone are models that do not go through transformers' interface or work on their masks themselves, or that are
    in a dtype for which there is no kernel; and those on a GPU, where sdpa is fast by itself. A soft prompt brings this
    attention along wherever the model is, and a model that moves keeps what it has.
    """
    done: set[nn.Module] = set()
    for part in model.modules():
        if not isinstance(part, PreTrainedModel) or part in done:
            continue
        done.update(part.modules())
        if not fast:
            if vars(part).pop(_SWITCHED, False) and part.config._attn_implementation == NAME:
                exchange_attention(part, "sdpa", _naming(NAME))
        elif all(_gains(m) for m in part.modules() if isinstance(m, PreTrainedModel)):
            exchange_attention(part, NAME, _naming("sdpa"))
            vars(part)[_SWITCHED] = True


def has_fast_attention(model: nn.Module) -> bool:
    """Whether :func:`use_fast_attention` has given it to a model inside ``model``."""
    return any(_SWITCHED in vars(module) for module in model.modules())


Said = list[tuple[PreTrainedConfig, str]]
"""Configurations, layers' own among them, and the attention that each names."""


def exchange_attention(model: nn.Module, name: str, where: Callable[[nn.Module, PreTrainedConfig], bool]) -> Said:
    """Let those configurations of modules name ``name`` for which ``where`` holds; returns what they said before."""
    before = {}
    for module in model.modules():
        config = vars(module).get("config")
        if isinstance(config, PreTrainedConfig) and where(module, config):
            before[id(config)] = config, config._attn_implementation
    said = list(before.values())
    say_attention([(config, name) for config, _ in said])
    return said


def say_attention(said: Said) -> None:
    """Let each configuration name that attention, and none of those within it."""
    for config, name in said:
        config._attn_implementation_internal = name  # the property would say it for every part within


def _naming(name: str) -> Callable[[nn.Module, PreTrainedConfig], bool]:
    return lambda _, config: config._attn_implementation == name


@contextmanager
def with_sdpa(model: PreTrainedModel) -> Iterator[None]:
    """Let ``model`` use sdpa instead of this attention, for what knows transformers' own alone."""
    said = exchange_attention(model, "sdpa", _naming(NAME))
    try:
        yield
    finally:
        say_attention(said)


_SWITCHED = "_uses_fast_attention"


def _gains(model: PreTrainedModel) -> bool:
    return (
        model.config._attn_implementation == "sdpa"
        and model._can_set_attn_implementation()
        and not _reads_masks(type(model))
        and model.device.type == "cpu"
        and model.dtype in FLOATS
    )


@functools.cache
def _reads_masks(kind: type[PreTrainedModel]) -> bool:
    """Whether a model does more with masks than to hand them on: it insists on whole ones, adds them to a position bias
    of its own, as BEiT does, or something beside its attention reads them, as convolutions do in LASR, which asks first
    whether they are bool.
    """
    source = inspect.getsource(sys.modules[kind.__module__])
    signs = "allow_is_causal_skip", "position_bias + attention_mask if", "attention_mask.dtype == torch.bool"
    return any(sign in source for sign in signs)
