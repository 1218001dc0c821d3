"""Soft prompts as tokens: for models whose tokens see those that follow them (encoders, encoder–decoders).

There a prompt's hidden states depend on the row, so no keys and values can stand for it; its vectors run in front of
each row's own tokens, as in PEFT. Two things are different. A row is laid out as its prompt, its tokens from the first
visible one on, and then, hidden, what was in front of that one (which stays in front of it all where a head reads the
last entry): so rows with prompts of different lengths, and rows padded on the left, come out as each would alone (in an
encoder also where the prompt is all keys and values, and has no tokens). And outputs have one entry a real token, none
for the prompt.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...ops.cross_entropy import IGNORED
from ...ops.reference import prefix_rows
from ...ops.tracing import traced
from ..forwards import NamedForward, with_item

_ALONG = {
    "bbox": None,
    "bbox_first_token_mask": None,
    "global_attention_mask": None,
    "input_pronunciation_ids": None,
    "input_shape_ids": None,
    "langs": None,
    "token_type_ids": None,
    "xpath_subs_seq": "subs_pad_id",
    "xpath_tags_seq": "tag_pad_id",
}
"""Arguments of models that have an entry a token, [batch, …, tokens, …] → what of the configuration stands for none;
None: 0 does."""


class Tokens(NamedTuple):
    """What goes in front of the rows of a batch.

    ``vectors`` are [slots, length, dim]; ``index`` [batch] int64 names each row's slot (-1: none), None the first slot
    for all; ``lengths`` [slots] int64 where slots are padded at the end.
    """

    vectors: Tensor
    index: Tensor | None = None
    lengths: Tensor | None = None

    def of_rows(self, batch: int) -> Tensor:
        """[batch, length, dim]; zeros where there is nothing, as padding mostly is: convolutions see what is hidden."""
        if self.index is None:
            return self.vectors[:1].expand(batch, -1, -1)
        return self.vectors[self.index.clamp(min=0)].masked_fill((self.index < 0)[:, None, None], 0)

    def length_of_rows(self, batch: int) -> Tensor:
        """[batch] int64."""
        return prefix_rows(batch, self.vectors.shape[1], self.index, self.lengths, self.vectors.device)[1]


TokenSource = Callable[[int], Tokens | None]
"""The tokens for a batch of so many rows; None: none in any row."""


def first_visible(mask: Tensor) -> Tensor:
    """Where each row's text begins [batch, 1], of a mask [batch, tokens], nonzero where visible."""
    return (mask != 0).int().argmax(1, keepdim=True)


def shape_of_tokens(given: Tensor) -> torch.Size:
    """[batch, tokens], or [batch, choices, tokens], of what a model is given: ids, or vectors in their place."""
    return given.shape[:-1] if given.is_floating_point() else given.shape


class Layout:
    """Where the prompt's and the row's own tokens go.

    Args:
        tokens: the prompts.
        shape: of the rows' own tokens: [batch, tokens], or [batch, choices, tokens] for a model that takes these as
            batch · choices rows.
        mask: of that shape, nonzero where visible; None: all are.
        hidden_first: what is hidden in front of a row's tokens stays in front and does not go to the end, so that a
            row's last entry stays its last.
    """

    def __init__(self, tokens: Tokens, shape: Sequence[int], mask: Tensor | None, hidden_first: bool = False) -> None:
        if mask is not None and mask.shape != shape:
            raise ValueError(
                f"attention_mask has shape {tuple(mask.shape)}; with a soft prompt it must be that of the tokens, "
                f"{tuple(shape)}"
            )
        self.lead, self.length = shape[:-1], shape[-1]
        self.room, batch, length = tokens.vectors.shape[1], math.prod(self.lead), self.length
        self.plain = tokens.index is None and tokens.lengths is None
        hidden = mask is not None and (traced() or not bool(mask[..., :1].all()))
        if self.plain and not hidden:
            self.mask = None if mask is None else self.insert(mask.new_ones(batch, self.room), mask)
            return
        self.plain = False
        device = tokens.vectors.device
        mask = torch.ones(shape, dtype=torch.int64, device=device) if mask is None else mask
        prompt = torch.arange(self.room, device=device) < tokens.length_of_rows(batch).unsqueeze(1)
        own = torch.arange(length, device=device) >= first_visible(mask.reshape(batch, length))
        shown = torch.cat([prompt, own], 1)
        # Everything keeps its order, but what is hidden at the front goes to one end.
        self.take = (shown == hidden_first).to(torch.uint8).argsort(dim=1, stable=True)
        self.place = self.take.argsort(dim=1)[:, self.room :]
        self.mask = self.insert(prompt.to(mask.dtype), mask)

    def insert(self, prompt: Tensor, own: Tensor) -> Tensor:
        """[…, prompt + own, …] from ``prompt`` [rows, prompt, …] and ``own`` […, own, …]."""
        both = torch.cat([prompt, own.flatten(0, len(self.lead) - 1)], 1)
        both = both if self.plain else both.gather(1, _like(self.take, both))
        return both.unflatten(0, self.lead)

    def own(self, both: Tensor) -> Tensor:
        """The entries of the rows' own tokens, in their order."""
        return both[:, self.room :] if self.plain else both.gather(1, _like(self.place, both))

    def where(self, positions: Tensor) -> Tensor:
        """Where the row's own tokens at ``positions`` [batch] are; what is none goes beyond the end."""
        if self.plain:
            moved = positions + self.room
        else:
            moved = self.place.gather(1, positions.clamp(0, self.length - 1).unsqueeze(1)).squeeze(1)
        none = (positions < 0) | (positions >= self.length)
        return moved.masked_fill(none, self.room + self.length)


def _like(index: Tensor, values: Tensor) -> Tensor:
    index = index.view(*index.shape, *[1] * (values.dim() - 2))
    return index.expand(-1, -1, *values.shape[2:])


class _Prompted(NamedForward):
    def __init__(self, module: nn.Module, source: TokenSource) -> None:
        super().__init__(module)
        self.source = source
        # Of padding too: XLNet's classifier, whose text is padded on the left.
        self._reads_last = any(vars(m).get("summary_type") in ("last", "cls_index") for m in module.modules())

    def with_prompt(self, named: dict[str, Any]) -> Layout | None:
        """Put the prompts into the arguments ``named``; None where no row has one."""
        embeds, ids = named.get("inputs_embeds"), named.get("input_ids")
        given = ids if embeds is None else embeds
        if given is None:
            return None
        shape = shape_of_tokens(given)
        rows = math.prod(shape[:-1])
        tokens = self.source(rows)
        if tokens is None:
            return None
        mask, none = named.get("attention_mask"), tokens.vectors.shape[1] == 0
        if none and (mask is None or mask.dim() != len(shape)):
            return None
        layout = Layout(tokens, shape, mask, self._reads_last)
        if none and layout.plain:
            return None
        if none and embeds is None:  # some models do more with ids than to embed them
            named["input_ids"] = layout.insert(ids.new_empty(rows, 0), ids)
        else:
            embeds = self.module.get_input_embeddings()(ids) if embeds is None else embeds
            named["input_ids"] = None
            named["inputs_embeds"] = layout.insert(tokens.of_rows(rows).to(embeds.dtype), embeds)
        named["attention_mask"] = layout.mask
        for name, blank in _ALONG.items():
            if named.get(name) is not None:
                own = named[name].expand(*shape, *named[name].shape[len(shape) :])
                fill = 0 if blank is None else getattr(self.module.config, blank)
                named[name] = layout.insert(own.new_full((rows, layout.room, *own.shape[len(shape) :]), fill), own)
        if named.get("position_ids") is not None:
            warnings.warn(
                "position_ids are ignored: with a soft prompt in front, positions are counted anew", stacklevel=4
            )
            named["position_ids"] = None
        return layout


class EncoderModelForward(_Prompted):
    """Of a whole model that is an encoder, with or without a head.

    Labels and positions count the real tokens, as outputs do; attention weights alone count the prompt's as well. Token
    types are 0 for the prompt and as given for the row (PEFT drops those of question answering and feature extraction),
    and so is what else goes along with the tokens (``_ALONG``).
    """

    def __init__(self, module: nn.Module, source: TokenSource) -> None:
        super().__init__(module, source)
        self._images_first = module.config.model_type == "git"  # and no token of the text stands for an image

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        named = self.named(args, kwargs)
        layout = self.with_prompt(named)
        if layout is None:
            return self.own(*args, **kwargs)
        if named.get("use_cache") or any(named.get(name) is not None for name in ("cache", "past_key_values")):
            raise ValueError(
                f"use_cache is True, or there is a cache; it must be False with a soft prompt, as tokens of a "
                f"{type(self.module).__name__} see those that follow"
            )
        self._move_labels(named, layout)
        kept = self._take_kept(named, layout)
        output = self._own_tokens(self.own(**named), layout)
        if kept is None:
            return output
        index = int(named.get("labels") is not None)  # behind the loss
        logits = output[index if isinstance(output, tuple) else "logits"]
        return with_item(output, "logits", index, logits[:, kept])

    def _take_kept(self, named: dict[str, Any], layout: Layout) -> slice | Tensor | None:
        """Which of the rows' own logits ``logits_to_keep``, which is taken out of ``named``, asks for; None where the
        model itself finds them, or is not asked."""
        keep = named.get("logits_to_keep", 0) if "logits_to_keep" in self.__signature__.parameters else 0
        if isinstance(keep, int) and (not keep or (layout.plain and keep <= layout.length)):
            return None
        if isinstance(keep, Tensor) and keep.dim() != 1:
            raise ValueError(
                f"logits_to_keep has shape {tuple(keep.shape)}; with a soft prompt it must be a number or [positions]"
            )
        del named["logits_to_keep"]
        return slice(-keep, None) if isinstance(keep, int) else keep

    def _move_labels(self, named: dict[str, Any], layout: Layout) -> None:
        labels = named.get("labels")
        given = named.get("inputs_embeds")
        batch = len(named["input_ids"] if given is None else given)
        if labels is not None and labels.shape == (batch, layout.length) and not labels.is_floating_point():
            named["labels"] = layout.insert(labels.new_full((batch, layout.room), IGNORED), labels)
        for name in ("start_positions", "end_positions"):
            if named.get(name) is not None:
                named[name] = layout.where(named[name].view(batch))

    def _own_tokens(self, output: Any, layout: Layout) -> Any:
        """``output`` without the entries of the prompt."""
        if isinstance(output, Tensor):
            spans = "start_positions" in self.__signature__.parameters  # then the logits are [batch, tokens]
            if output.dim() != 3 and not (spans and output.dim() == 2):
                return output
            front = output.shape[1] - layout.room - layout.length
            if front > 0 and self._images_first:
                return torch.cat([output[:, :front], layout.own(output[:, front:])], 1)
            return output if front else layout.own(output)
        if isinstance(output, Mapping):
            for name, value in output.items():
                if value is not None:
                    output[name] = self._own_tokens(value, layout)
            return output
        if isinstance(output, tuple):
            return tuple(self._own_tokens(value, layout) for value in output)
        return output


class EncoderForward(_Prompted):
    """Of the encoder of an encoder–decoder: its output has the prompt's entries, which the decoder sees."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        named = self.named(args, kwargs)
        if self.with_prompt(named) is None:
            return self.own(*args, **kwargs)
        return self.own(**named)


class DecoderForward(_Prompted):
    """Of the decoder that sees such an encoder's output: widens the mask of what it sees.

    The encoder's output says whether the prompt is in it: it may have been computed before.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        named = self.named(args, kwargs)
        seen, mask = named.get("encoder_hidden_states"), named.get("encoder_attention_mask")
        tokens = None if seen is None else self.source(len(seen))
        if tokens is None:
            return self.own(*args, **kwargs)
        length = seen.shape[1] - tokens.vectors.shape[1]
        if mask is None or (mask.dim() == 2 and mask.shape[1] == length):
            named["encoder_attention_mask"] = Layout(tokens, (len(seen), length), mask).mask
        return self.own(**named)
