"""A soft prompt, what it comes to, and that being kept until something changes that it depends on."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...adapters import AdapterBank
from ...caching import AdapterCache, registered, stamp_of
from ...nn.ends import embedding_weight
from ...nn.hooks import GLOBAL_HOOKS
from ...nn.prompt_encoder import Form, SoftPrompt
from ...ops.autocast import autocast_of
from ...ops.tracing import traced
from ..known_hooks import only_known_hooks

_BASE = "base"
_ADAPTERS = {
    "bottleneck",
    "lora_A",
    "lora_B",
    "lora_embedding_A",
    "lora_embedding_B",
    "lora_magnitude_vector",
    "modules_to_save",
    "trainable_tokens_delta",
}
"""Where layers have what is an adapter's own."""


class Source(NamedTuple):
    """A soft prompt: its parameters, what they are, how many tokens, and the dropout on keys and values in training."""

    module: SoftPrompt
    form: Form
    count: int
    dropout: float = 0.0


class Values(NamedTuple):
    """What a soft prompt, or several, come to.

    Attributes:
        tensors: keys and values, layer by layer in turn, each [1, heads, length, dim].
        last: the decoder's output [1, hidden] for the last virtual token, from which the model would go on; None where
            there is none.
    """

    tensors: list[Tensor]
    last: Tensor | None

    @property
    def records(self) -> bool:
        """Whether a gradient would flow into them."""
        return any(t.requires_grad for t in self.tensors)


class KeptPrompts:
    """What the soft prompts of ``model``, which run through its ``decoder``, come to; it is kept in the ``bank``."""

    def __init__(self, model: nn.Module, decoder: nn.Module, bank: AdapterBank) -> None:
        self.model, self.decoder, self.bank = model, decoder, bank

    def of_prompt(
        self,
        source: Source,
        names: tuple[str, ...],
        decoding: bool,
        work_out: Callable[[Source, tuple[str, ...]], Values],
    ) -> Values:
        """What ``source`` comes to: as ``work_out`` says, or as it said before where that is safe.

        Args:
            names: the prompt's own and those of the other adapters on its row.
            decoding: whether this goes on from a cache, for which the same prompt was worked out before.
            work_out: from the source and those of the other adapters that matter to it.
        """
        if source.form is Form.KEYS_VALUES:
            names, base, modules = names[:1], [], []
        else:
            base, modules = self._base()
        others = names[1:]
        parameters = list(source.module.parameters())
        for other in others:
            parameters += self.bank.parameters(other)
        if traced() or (torch.is_grad_enabled() and any(p.requires_grad for p in (*parameters, *base))):
            return work_out(source, others)
        # The embedding stands for the model, which may be moved, cast or loaded anew.
        embedding = embedding_weight(self.model)
        stamp = stamp_of([*parameters, embedding])
        own = stamp, self.decoder.training, autocast_of(embedding)
        # A request beyond the usual reach, which stays there, and one that is not may be served in turn.
        key = names, self.bank.reach > 0
        held = self._made.get(names, key)
        known = stamp is not None and held is not None and held[0] == own
        if known and decoding:
            return held[2]
        hooked = _hooked(modules)
        rest = stamp_of(base), self.bank.reach, hooked, modules
        # What trains may be written through .data, and what hooks do may change, which leaves no trace: it is kept for
        # one generation at most, in which the base does not change either.
        trusted = self.bank.frozen.issuperset(names) and not self.decoder.training and not hooked
        if known and trusted and held[1] == rest:
            return held[2]
        with torch.inference_mode(False), torch.no_grad():  # what is kept may serve where something else trains
            values = work_out(source, others)
        self._made.put(names, key, (own, rest, values, parameters))
        return values

    def joined(self, names: tuple[str, ...], parts: list[Values]) -> Values:
        """Several soft prompts of a row that uses ``names``, one after the other, each as it is alone."""
        held = None if traced() else self._made.get(names, names)
        if held is not None and all(map(operator.is_, held[0], parts)):
            return held[1]
        tensors = zip(*(part.tensors for part in parts), strict=True)
        joined = Values([torch.cat(layer, 2) for layer in tensors], parts[-1].last)
        if not (joined.records or traced()):
            self._made.put(names, names, (parts, joined))
        return joined

    @property
    def _made(self) -> AdapterCache:
        """What prompts come to: one beside other adapters, or several."""
        return self.bank.kept.setdefault("made", AdapterCache())

    def _base(self) -> tuple[list[nn.Parameter], list[nn.Module]]:
        """The decoder's own parameters and modules, as against its adapters'."""
        now = registered()
        known, found = self.bank.kept.get(_BASE, (None, ([], [])))
        if known != now:  # some may be other objects
            found = self._look_up_base()
            self.bank.kept[_BASE] = now, found
        return found

    def _look_up_base(self) -> tuple[list[nn.Parameter], list[nn.Module]]:
        while True:
            try:
                named = self.decoder.named_parameters(), self.decoder.named_modules()
                return tuple([x for name, x in of if _ADAPTERS.isdisjoint(name.split("."))] for of in named)
            except RuntimeError as error:
                if "during iteration" not in str(error):  # else another thread puts an adapter in or takes one out
                    raise


def _hooked(modules: list[nn.Module]) -> bool:
    """Whether something of the caller's runs with one of ``modules``."""
    with_hooks = [m for m in modules if m._forward_hooks or m._forward_pre_hooks]  # few: the others need no look
    return any(GLOBAL_HOOKS) or not all(map(only_known_hooks, map(vars, with_hooks)))
