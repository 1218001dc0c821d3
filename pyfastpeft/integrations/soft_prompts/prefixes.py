"""Soft prompts as prefixes: before every forward each attention layer gets keys and values, of each row its own.

What depends on neither input nor training is kept: at inference a soft prompt costs nothing after its first use, until
its parameters, or those of the other adapters on its row, change.
"""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...adapters import NO_ROWS, AdapterBank, Prefix, Rows
from ...caching import put_bounded
from ...nn.ends import embedding_weight, input_embedding
from ...nn.modes import evaluating
from ...nn.prompt_encoder import Form
from ...ops.tracing import is_compiling, traced
from ..attention import Said, exchange_attention, say_attention
from .bare import fed, without_checkpointing
from .checkpointing import collected, reentrant
from .decoders import is_encoder_decoder, layer_configs, text_config
from .kept_prompts import KeptPrompts, Source, Values
from .prompt_operator import compiled_tensors, number_of

_RUNS_KEPT = 8  # batches whose rows use the same adapters again build nothing


class Run:
    """The prefixes of one forward.

    Attributes:
        layers: the layers' prefixes; empty where there are none.
        shift: where the text starts: a number, or one a row [batch, 1].
        last: as in :class:`Values`, [batch or 1, 1, hidden].
    """

    def __init__(self, layers: list[Prefix], shift: int | Tensor, last: Tensor | None) -> None:
        self.layers, self.shift, self.last = layers, shift, last


OFF = Run([], 0, None)
"""No prefix: ``bank.run`` while a soft prompt itself is worked out, and handed down where no row has one."""


class _LayerPrefix:
    """``_prefix`` of one attention module."""

    def __init__(self, prefixes: Prefixes, layer: int) -> None:
        self.prefixes, self.layer = prefixes, layer

    def current(self, batch: int) -> Prefix | None:
        """The prefix of ``batch`` rows in the forward that is running."""
        return apart(self._looked_up, batch) if is_compiling() else self._current()

    def of(self, run: Run) -> Prefix | None:
        """The prefix in ``run``."""
        return run.layers[self.layer] if run.layers else None

    def _current(self) -> Prefix | None:
        bank = self.prefixes.bank
        run = bank.run
        if run is not None:
            return self.of(run)
        if bank.mode is None and any(name in self.prefixes.sources for name in bank.active):
            raise RuntimeError(
                "a layer with a soft prompt runs outside its model's call: call the model, not its forward(); where "
                "gradient checkpointing computes layers again, call the PeftModel, not the model inside it, after "
                "gradient_checkpointing_enable(): a checkpoint put around a layer by itself knows no soft prompt"
            )
        return None

    def _looked_up(self, batch: int) -> Prefix | None:
        """For compiled code whose model did not hand down what there is."""
        prefixes = self.prefixes
        rows = prefixes.rows
        if prefixes.bank.run is None and prefixes.uses(rows):
            return prefixes.run_of(rows, batch, False).layers[self.layer]
        return self._current()


@torch.compiler.disable
def apart(function: Callable[..., Any], *args: Any) -> Any:
    """``function`` of ``args``, not compiled along: this thread's run is another one in every forward."""
    return function(*args)


class Prefixes(ABC):
    """The soft prompts of one model; :mod:`.causal` and :mod:`.bidirectional` have the two kinds of them.

    Attributes:
        seq2seq: whether the model is an encoder–decoder.
        sources: adapter name → soft prompt.
        attentions: each layer's attention module.
        shape: of the keys and values.
        slots: for each layer, which one's keys and values of a file it reads.
        number: by which compiled code knows this.

    Raises:
        ValueError: soft prompts do not apply to the model; says why.
    """

    ATTENTION: str
    """The name of an attention that knows prefixes."""

    def __init__(self, model: nn.Module, bank: AdapterBank) -> None:
        self.model, self.bank = model, bank
        self.seq2seq = is_encoder_decoder(model)
        self.sources: dict[str, Source] = {}
        self._find()
        if not isinstance(getattr(input_embedding(model), "weight", None), Tensor):  # but several, as in Bark
            raise ValueError(f"a {type(model).__name__} has no single input embedding, which soft prompts need")
        self._kept = KeptPrompts(model, self.decoder, bank)
        self._checkpointing = [m for m in self.decoder.modules() if hasattr(m, "gradient_checkpointing")]
        self._handles: list[Any] = []
        self._collecting: Any = None
        self._attention_before: Said = []
        self.number = number_of(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.number = number_of(self)  # a copy is another one

    # What the kinds of models have their own of.

    @abstractmethod
    def _find(self) -> None:
        """Find out what there is in the model: ``decoder``, ``attentions``, the layers around them as ``_blocks``,
        ``shape`` and ``slots``."""

    @abstractmethod
    def check(self, form: Form) -> None:
        """Whether the model can take soft prompts of that form.

        Raises:
            ValueError: it cannot; says why.
        """

    @abstractmethod
    def _before(self, decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        """Forward pre-hook of the decoder: set ``bank.run``, or hand the prefixes down."""

    @abstractmethod
    def _after(self, decoder: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        """Forward hook of the decoder, which is called after errors too: clear what ``_before`` set."""

    @abstractmethod
    def _computed(self, embeddings: Tensor, rows: Rows | None, layer_inputs: Sequence[Tensor] = ()) -> Values:
        """What the model makes of [length, hidden] at the embedding, or of ``layer_inputs`` put into its layers."""

    @property
    def first_layer(self) -> Any:
        """The configuration of the text's first layer: others may have other numbers of query heads (Step 3.7)."""
        return layer_configs(text_config(self.model.config, self.seq2seq))[0]

    @property
    def _attends(self) -> nn.Module:
        """Whose attention is exchanged: the model's, or the decoder's alone where that of images or sounds, which takes
        no prefix, does not go through transformers' interface."""
        alone = isinstance(self.decoder, PreTrainedModel) and not self.model._can_set_attn_implementation()
        return self.decoder if alone else self.model

    def _check_interface(self) -> None:
        attends = self._attends
        if attends.config._attn_implementation != self.ATTENTION and not attends._can_set_attn_implementation():
            raise ValueError(
                f"the attention of a {type(self.model).__name__} cannot be exchanged through transformers' interface, "
                "so it cannot take a prefix"
            )

    # In the model and out of it.

    def add(self, name: str, source: Source) -> None:
        if not self._handles:
            self._install()
        self.sources[name] = source

    def remove(self, name: str) -> None:
        if self.sources.pop(name, None) is not None and not self.sources:
            self._uninstall()

    def _install(self) -> None:
        self._attention_before = self._set_attention()
        for i, module in enumerate(self.attentions):
            vars(module)["_prefix"] = _LayerPrefix(self, i)
        self._handles = [
            self.decoder.register_forward_pre_hook(self._before, with_kwargs=True),
            self.decoder.register_forward_hook(self._after, with_kwargs=True, always_call=True),
        ]

    def _set_attention(self) -> Said:
        """Let the model use an attention that knows prefixes: what a prefix is for, and what uses sdpa beside that.

        Other parts keep theirs: what Gemma 4 does with the masks of sounds only its eager attention can.
        """
        layers = set(self.attentions)
        return exchange_attention(
            self._attends,
            self.ATTENTION,
            lambda module, config: config._attn_implementation == "sdpa" or not layers.isdisjoint(module.modules()),
        )

    def uninstall(self) -> None:
        """Leave the model as it was."""
        self.sources.clear()
        if self._handles:
            self._uninstall()

    def _uninstall(self) -> None:
        self._clear_interrupted()
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for module in self.attentions:
            vars(module).pop("_prefix", None)
        say_attention(self._attention_before)

    def uses(self, rows: Sequence[tuple[str, ...]]) -> bool:
        """Whether rows that use the adapters ``rows`` have a soft prompt."""
        return any(name in self.sources for names in rows for name in names)

    def _check_attention(self) -> None:
        if (name := self._attends.config._attn_implementation) != self.ATTENTION:
            raise ValueError(
                f"the attention was changed to {name!r}, which knows no prefix; soft prompts need {self.ATTENTION!r}, "
                "which a model does without while generate_batch runs"
            )

    def _clear_interrupted(self) -> None:
        """Of a forward that a KeyboardInterrupt ended: torch does not call its hook."""
        if self.bank.run is not None:
            self._clear()

    def _clear(self) -> None:
        self.bank.run = None
        if self._collecting is not None:
            self._collecting.remove()
            self._collecting = None

    @property
    def rows(self) -> tuple[tuple[str, ...], ...]:
        """The adapters of each row; one for all where rows do not choose."""
        return (self.bank.active,) if self.bank.mode is None else self.bank.mode.of_row

    # What the prefixes are.

    def run_of(self, rows: Sequence[tuple[str, ...]], batch: int, decoding: bool) -> Run:
        """For rows that use the adapters ``rows`` (one: all use these); several consecutive ones of the batch each.

        Args:
            decoding: whether this goes on from a cache, for which the same prefixes were worked out before.
        """
        if batch % len(rows):
            raise ValueError(f"adapter_names has {len(rows)} names; the batch has {batch} rows")
        different, index = distinct(names if any(n in self.sources for n in names) else () for names in rows)
        values = [self._of_row(names, decoding) for names in different]
        if traced():
            return self._stacked(values, index, batch)
        runs = self.bank.kept.setdefault("runs", {})
        held = runs.get((rows, batch))
        if held is not None and all(map(operator.is_, held[0], values)):
            return held[1]
        run = self._stacked(values, index, batch)
        if not any(v.records for v in values):
            put_bounded(runs, (rows, batch), (values, run), _RUNS_KEPT)
        return run

    @staticmethod
    def _stacked(values: list[Values], index: list[int], batch: int) -> Run:
        lengths = [v.tensors[0].shape[2] for v in values]
        longest, device = max(lengths), values[0].tensors[0].device
        if len(values) == 1:
            both, last = values[0].tensors, values[0].last
        else:
            padded = [
                [F.pad(t, (0, 0, 0, longest - n)) for t in v.tensors] for v, n in zip(values, lengths, strict=True)
            ]
            both = [torch.cat(parts) for parts in zip(*padded, strict=True)]
            some = next((v.last for v in values if v.last is not None), None)
            last = None if some is None else torch.cat([some if v.last is None else v.last for v in values])
        pairs = list(zip(both[::2], both[1::2], strict=True))
        last = None if last is None else last.unsqueeze(1)
        if not any(index):
            return Run([Prefix(k, v) for k, v in pairs], longest, last)
        slot_lengths = torch.tensor(lengths, device=device) if min(lengths) < longest else None
        slot = torch.tensor(index, device=device).repeat_interleave(batch // len(index))
        shift = torch.tensor([*lengths, 0], device=device)[slot].unsqueeze(1)
        rows = {k.device: (k, slot, slot_lengths) for k, _ in pairs}
        rows = {home: tuple(beside(k, t) for t in of_rows) for home, (k, *of_rows) in rows.items()}
        last = None if last is None else last[beside(last, slot)]
        return Run([Prefix(k, v, *rows[k.device]) for k, v in pairs], shift, last)

    def _of_row(self, names: tuple[str, ...], decoding: bool) -> Values:
        """For a row that uses ``names``."""
        others = tuple(n for n in names if n not in self.sources)
        parts = [self._of_prompt((n, *others), decoding) for n in names if n in self.sources]
        return parts[0] if len(parts) == 1 else self._kept.joined(names, parts)

    def _of_prompt(self, names: tuple[str, ...], decoding: bool) -> Values:
        """For the soft prompt ``names[0]``, with the other adapters on its row."""
        source = self.sources[names[0]]
        if not is_compiling():
            return self._kept.of_prompt(source, names, decoding, self._work_out)
        if source.form is Form.KEYS_VALUES:
            return self._work_out(source, ())
        tensors = compiled_tensors(self, names, self.decoder.training, decoding, self.bank.reach)
        return Values(tensors[:-1], tensors[-1]) if source.form is Form.EMBEDDINGS else Values(tensors, None)

    # For :mod:`.prompt_operator`; ``names`` are a soft prompt's own and those of the other adapters on its row.

    def parameters(self, names: Sequence[str]) -> list[nn.Parameter]:
        """All that may train and that the prompt may depend on."""
        return [parameter for name in names for parameter in self.bank.parameters(name)]

    def tensors(self, names: Sequence[str], decoding: bool, reach: int) -> list[Tensor]:
        """What the prompt comes to, for ``bank.reach``; differentiable in what trains, where gradients are recorded."""
        names = tuple(names)
        with self.bank.using(_beside_a_prompt(names[1:])), self.bank.reaching(reach):
            values = self._kept.of_prompt(self.sources[names[0]], names, decoding, self._work_out)
        return values.tensors if values.last is None else [*values.tensors, values.last]

    def _work_out(self, source: Source, others: tuple[str, ...]) -> Values:
        rows = self.bank.mode and _beside_a_prompt(others)
        vectors = source.module().to(embedding_weight(self.model).dtype)
        if source.form is Form.KEYS_VALUES:
            layers, heads, dim = self.shape
            tensors = vectors.view(len(vectors), 2 * layers, 1, heads, dim).permute(1, 2, 3, 0, 4)
            values = Values(self._in_layers(list(tensors.contiguous().unbind(0))), None)
        elif source.form is Form.EMBEDDINGS:
            values = self._computed(vectors.clone(), rows)  # models may scale in place what they are given
        else:
            inputs = vectors.view(len(vectors), len(self._blocks), -1).unbind(1)
            # What is at the embedding, which may be of another width, does not matter.
            embeddings = vectors.new_zeros(len(vectors), embedding_weight(self.decoder).shape[1])
            values = Values(self._computed(embeddings, rows, inputs).tensors, None)
        if source.dropout and self.decoder.training:
            values = values._replace(tensors=[F.dropout(t, source.dropout) for t in values.tensors])
        return values

    def _in_layers(self, tensors: list[Tensor]) -> list[Tensor]:
        """Keys and values as and where the layers read them, from those of a file."""
        homes = map(_home, self.attentions)
        return [tensors[2 * slot + i].to(home) for slot, home in zip(self.slots, homes, strict=True) for i in (0, 1)]

    @contextmanager
    def _bare(self, rows: Rows | None, layer_inputs: Sequence[Tensor]) -> Iterator[None]:
        """The model without prefixes, with the adapters that ``rows`` says, its layers fed with ``layer_inputs``."""
        with (
            self.bank.using(rows),
            self.bank.running(OFF),
            without_checkpointing(self._checkpointing),
            fed(self._blocks, layer_inputs),
        ):
            yield

    @torch.no_grad()
    def _of_tokens(self, ids: Tensor) -> list[Tensor]:
        """The keys and values that the base model makes of the tokens ``ids`` [P], as in :class:`Values`."""
        return self._computed(self.decoder.get_input_embeddings()(ids), NO_ROWS).tensors

    @torch.no_grad()
    def export(self, names: tuple[str, ...]) -> list[Tensor]:
        """Keys and values, layer by layer in turn, each [heads, length, dim], of a row that uses ``names``."""
        with evaluating(self.decoder), self.bank.using(Rows((names,), names)):
            return [t[0].clone() for t in self._of_row(names, False).tensors]  # layers may read the same ones

    def keys_values(self, ids: Tensor) -> Tensor:
        """What the base model makes of the tokens ``ids`` [P]: [P, L · 2 · heads · dim], as Prefix Tuning keeps it."""
        made, slots = self._of_tokens(ids), self.slots
        # What no layer reads is as of the layer of that number.
        readers = [slots.index(i) if i in slots else min(i, len(slots) - 1) for i in range(self.shape.layers)]
        made = [made[2 * r + i].to(ids.device) for r in readers for i in (0, 1)]
        return torch.cat(made).permute(2, 0, 1, 3).flatten(1)

    def layer_inputs(self, ids: Tensor) -> Tensor:
        """What the base model puts into its layers for the tokens ``ids`` [P]: [P, L · hidden]."""
        seen: list[Tensor] = []
        handles = [b.register_forward_pre_hook(lambda _, args: seen.append(args[0][0])) for b in self._blocks]
        try:
            self._of_tokens(ids)
        finally:
            for handle in handles:
                handle.remove()
        return torch.cat([t.to(ids.device) for t in seen], 1)

    def _collect(self, run: Run, embeds: Tensor | None) -> dict[str, Tensor]:
        """Where layers run again in backward passes of their own, let the gradients of their prefixes be gathered.

        Args:
            embeds: the decoder's ``inputs_embeds``: then the embedding does not run inside.

        Returns:
            What the decoder is to be given in the place of its own arguments.
        """
        if not (any(map(reentrant, self._checkpointing)) and self.decoder.training and torch.is_grad_enabled()):
            return {}
        if not any(t.requires_grad for prefix in run.layers for t in (prefix.k, prefix.v)):
            return {}
        run.layers, gather = collected(run.layers)
        if embeds is not None:
            return {"inputs_embeds": gather(embeds)}
        embedding = self.decoder.get_input_embeddings()
        self._collecting = embedding.register_forward_hook(lambda module, args, x: gather(x))
        return {}


def _home(layer: nn.Module) -> torch.device | None:
    """Where ``layer`` lies; None where nobody knows, as its parameters come to it when it runs."""
    parameter = next(layer.parameters(), None)
    return None if parameter is None or parameter.is_meta else parameter.device


def beside(t: Tensor, value: Any) -> Any:
    """``value`` on the device of ``t``, if it is a tensor."""
    return value.to(t.device) if isinstance(value, Tensor) else value


def _beside_a_prompt(others: tuple[str, ...]) -> Rows:
    """The one row that a soft prompt is worked out in, with the adapters ``others``."""
    return Rows((others,), others) if others else NO_ROWS


def past_of(kwargs: dict[str, Any]) -> int | Tensor | None:
    """How many tokens the cache among a decoder's arguments holds; None: there is no cache. Of a static cache it is a
    tensor, which compiled code cannot ask, and on a GPU would be waited for, or be an error in a graph."""
    cache = kwargs.get("cache", kwargs.get("past_key_values"))
    if cache is None:
        return None
    length = cache.get_seq_length()
    unknown = is_compiling() or (isinstance(length, Tensor) and not length.is_cpu)
    return length if unknown else int(length)


def goes_on(past: int | Tensor | None, length: int) -> bool:
    """Whether ``length`` tokens go on from ``past`` ones. Where nobody knows, a single one does: others may be the
    first of a cache that was emptied."""
    if isinstance(past, Tensor):
        return length == 1 and not is_compiling()
    return bool(past)


def distinct(rows: Iterable[tuple[str, ...]]) -> tuple[list[tuple[str, ...]], list[int]]:
    """The different ones among ``rows``, and for each row which of them it is: -1 for an empty one."""
    slots: dict[tuple[str, ...], int] = {}
    index = [slots.setdefault(names, len(slots)) if names else -1 for names in rows]
    return list(slots), index
