"""Soft prompts in a causal model: before every forward each attention layer gets its prefix of keys and values.

A soft prompt comes first in the sequence, so what it is in a layer does not depend on what follows. It is worked out
once at batch 1 (:class:`Source` says how), and the layers' attention (:mod:`pyfastpeft.integrations.attention`) reads
it: rows never get longer, caches never hold it, logits are those of the text alone. The text stands after the prefix:
its positions start at the length of its own row's prefix, padding on the left not counted.

What depends on neither input nor training is kept: at inference a soft prompt costs nothing after its first use, until
its parameters, or those of the other adapters on its row, change.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from ...adapters import NO_ROWS, AdapterBank, Prefix, Rows
from ...caching import put_bounded
from ...nn.prompt_encoder import Form
from ...ops.tracing import traced
from .. import attention
from .bare import all_layers, fed, reaching, without_checkpointing
from .checkpointing import collected, reentrant
from .decoders import KeyValueShape, attentions_of, decoder_of, depends_on_length, owners_of
from .first_label import FIRST, with_first_label, with_last, without_last
from .kept_prompts import KeptPrompts, Source, Values
from .prompt_operator import compiled_tensors, number_of
from .prompt_tokens import first_visible

OFF = object()
"""``bank.run`` while a soft prompt itself is worked out: no prefix."""

_RUNS_KEPT = 8  # batches whose rows use the same adapters again build nothing


class _Run:
    """The prefixes of one forward.

    Attributes:
        layers: the layers' prefixes; empty where there are none.
        shift: where the text starts: a number, or one a row [batch, 1].
        last: as in :class:`Values`, [batch or 1, 1, hidden].
    """

    def __init__(self, layers: list[Prefix], shift: int | Tensor, last: Tensor | None) -> None:
        self.layers, self.shift, self.last = layers, shift, last


_NOTHING = _Run([], 0, None)
"""Handed down: no prefix."""


class _LayerPrefix:
    """``_prefix`` of one attention module."""

    def __init__(self, prefixes: Prefixes, layer: int) -> None:
        self.prefixes, self.layer = prefixes, layer

    def current(self, batch: int) -> Prefix | None:
        """The prefix of ``batch`` rows in the forward that is running."""
        return _apart(self._looked_up, batch) if torch.compiler.is_compiling() else self._current()

    def of(self, run: _Run) -> Prefix | None:
        """The prefix in what a compiled forward hands down."""
        return run.layers[self.layer] if run.layers else None

    def _current(self) -> Prefix | None:
        bank = self.prefixes.bank
        run = bank.run
        if run is OFF:
            return None
        if run is None:
            if bank.mode is None and any(name in self.prefixes.sources for name in bank.active):
                raise RuntimeError(
                    "a layer with a soft prompt runs outside its model's forward; where gradient checkpointing "
                    "computes layers again, call the PeftModel, not the model inside it"
                )
            return None
        return run.layers[self.layer]

    def _looked_up(self, batch: int) -> Prefix | None:
        """For compiled code whose model did not hand down what there is."""
        prefixes = self.prefixes
        rows = prefixes.rows
        if prefixes.bank.run is None and prefixes.uses(rows):
            return prefixes.run_of(rows, batch, False).layers[self.layer]
        return self._current()


@torch.compiler.disable
def _apart(function: Callable[..., Any], *args: Any) -> Any:
    """``function`` of ``args``, not compiled along: this thread's run is another one in every forward."""
    return function(*args)


class Prefixes:
    """The soft prompts of one causal model.

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

    ATTENTION = attention.NAME
    _hands_down = False
    """Whether the decoder hands what it does not know down to its layers."""
    _reaches_part = False
    """Whether there are layers that see a part of the sequence only."""
    _rotaries: Sequence[nn.Module] = ()
    """Rotary embeddings whose frequencies depend on how long the sequence is, beyond a usual length."""

    def __init__(self, model: nn.Module, bank: AdapterBank) -> None:
        self.model, self.bank = model, bank
        self.seq2seq = bool(model.config.is_encoder_decoder)
        self.sources: dict[str, Source] = {}
        self._find()
        self._kept = KeptPrompts(model, self.decoder, bank)
        self._checkpointing = [m for m in self.decoder.modules() if hasattr(m, "gradient_checkpointing")]
        self._handles: list[Any] = []
        self._collecting: Any = None
        self._attention_before: str = ""
        self.number = number_of(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.number = number_of(self)  # a copy is another one

    def _find(self) -> None:
        """Find out what there is in the model."""
        self.decoder = decoder_of(self.model)
        self._check_interface()
        kind, config = type(self.model).__name__, self.decoder.config
        self.shape = KeyValueShape.of_decoder(self.decoder, kind)
        self.attentions, self._blocks = attentions_of(self.decoder)
        self.slots = list(owners_of(self.attentions))
        self._reaches_part = any(getattr(config, n, None) for n in ("sliding_window", "attention_chunk_size"))
        parameters = inspect.signature(type(self.decoder).forward).parameters
        self._parameters = tuple(parameters)[1:]
        self._model_parameters = tuple(inspect.signature(type(self.model).forward).parameters)[1:]
        self._hands_down = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        if "position_ids" not in self._parameters:
            raise ValueError(f"a {kind} takes no position_ids, so no text can stand after a soft prompt in it")
        self._cache_name = "cache" if "cache" in self._parameters else "past_key_values"
        embeddings = getattr(self.decoder, "embeddings", None)
        self._rotaries = [m for m in self.decoder.modules() if depends_on_length(getattr(m, "rope_type", None))]
        rope = getattr(config, "rope_parameters", None) or {}
        self._usual_reach = rope.get("original_max_position_embeddings", getattr(config, "max_position_embeddings", 0))
        # RoBERTa's positions begin behind that of padding.
        self._first = embeddings.padding_idx + 1 if hasattr(embeddings, "create_position_ids_from_inputs_embeds") else 0

    def _check_interface(self) -> None:
        if self.model.config._attn_implementation != self.ATTENTION and not self.model._can_set_attn_implementation():
            raise ValueError(
                f"the attention of a {type(self.model).__name__} cannot be exchanged through transformers' interface, "
                "so it cannot take a prefix"
            )

    def check(self, form: Form) -> None:
        """Whether the model can take soft prompts of that form.

        Raises:
            ValueError: it cannot; says why.
        """
        kind, config = type(self.model).__name__, self.decoder.config
        of_values = getattr(config, "v_head_dim", None) or self.shape.dim
        if form is Form.KEYS_VALUES and of_values != self.shape.dim:
            raise ValueError(
                f"the keys of a {kind} have {self.shape.dim} numbers a head and its values {of_values}; use a prompt "
                "at the embedding or in the layers' inputs, as keys and values that are learned must be of one size"
            )
        if form is Form.LAYER_INPUTS and hasattr(config, "altup_num_inputs"):
            raise ValueError(
                f"the layers of a {kind} have several inputs each; use prefix=True, which learns "
                "keys and values themselves"
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
        head = getattr(self.model, "get_output_embeddings", lambda: None)()
        if head is not None and self.model is not self.decoder:
            self._handles += [
                self.model.register_forward_pre_hook(self._before_loss, with_kwargs=True),
                self.model.register_forward_hook(without_last, with_kwargs=True, always_call=True),
            ]

    def _set_attention(self, name: str | None = None) -> str:
        """Let the model use that attention (default: one that knows prefixes). Returns which it used before."""
        name, before = name or self.ATTENTION, self.model.config._attn_implementation
        if before != name:
            self.model.set_attn_implementation(name)
        return before

    def uninstall(self) -> None:
        """Leave the model as it was."""
        self.sources.clear()
        if self._handles:
            self._uninstall()

    def _uninstall(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for module in self.attentions:
            vars(module).pop("_prefix", None)
        self._set_attention(self._attention_before)

    # Around every forward of the decoder. What compilers can follow is compiled along, the rest runs by itself: what
    # compiled code would set in a thread's own memory is lost, so the prefixes are handed down as an argument.

    def uses(self, rows: Sequence[tuple[str, ...]]) -> bool:
        """Whether rows that use the adapters ``rows`` have a soft prompt."""
        return any(name in self.sources for names in rows for name in names)

    def _follows(self) -> bool:
        return torch.compiler.is_compiling() and self._hands_down

    def _before(self, decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        return self._begin(args, kwargs) if self._follows() else _apart(self._begin, args, kwargs)

    def _begin(self, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        if self.bank.run is OFF or attention.HANDED_DOWN in kwargs:
            return None
        rows = self.rows
        follows = torch.compiler.is_compiling()
        if not follows:
            self._clear_interrupted()
        if not self.uses(rows):
            return (args, kwargs | {attention.HANDED_DOWN: _NOTHING}) if follows else None
        self._check_attention()
        kwargs = dict(zip(self._parameters, args, strict=False)) | kwargs
        inputs = kwargs.get("inputs_embeds")
        inputs = kwargs.get("input_ids") if inputs is None else inputs
        if inputs is None:
            return None  # the decoder says so itself
        past = past_of(kwargs)
        decoding = goes_on(past, inputs.shape[1])
        positions = self._positions(kwargs, inputs, past)
        with self.bank.reaching(0 if follows else self._reach(rows, positions)):
            run = self.run_of(rows, len(inputs), decoding)
        if follows:
            kwargs[attention.HANDED_DOWN] = run
        else:
            self.bank.run = run
        kwargs["position_ids"] = positions + _beside(positions, run.shift)
        if follows and self._reaches_part and past is None and kwargs.get("attention_mask") is None:
            # Without one, transformers takes positions that were given for those of packed sequences.
            kwargs["attention_mask"] = torch.ones(inputs.shape[:2], dtype=torch.int64, device=inputs.device)
        if past is None and self.decoder.training and torch.is_grad_enabled() and "use_cache" in self._parameters:
            # Nothing goes on from a training step, and a cache would copy all keys and values.
            kwargs["use_cache"] = bool(kwargs.get("use_cache"))
        return (), kwargs | self._collect(run, kwargs.get("inputs_embeds"))

    def _check_attention(self) -> None:
        if self.model.config._attn_implementation != self.ATTENTION:
            raise ValueError(
                f"the attention was changed to {self.model.config._attn_implementation!r}, which knows no prefix; soft "
                f"prompts need {self.ATTENTION!r}"
            )

    def _after(self, decoder: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        run, first = kwargs.get(attention.HANDED_DOWN), kwargs.get(FIRST)
        return _apart(self._end, output, first) if run is None else with_last(output, run.last, first)

    def _end(self, output: Any, first: Tensor | None) -> Any:
        run = self.bank.run
        if run is OFF:
            return None
        self._clear()
        return None if run is None else with_last(output, run.last, first)

    def _clear_interrupted(self) -> None:
        """Before a forward: of one that a KeyboardInterrupt ends torch does not call the hook."""
        if self.bank.run is not None:
            self._clear()

    def _clear(self) -> None:
        self.bank.run = None
        if self._collecting is not None:
            self._collecting.remove()
            self._collecting = None

    def _before_loss(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        return self._begin_loss(args, kwargs) if self._follows() else _apart(self._begin_loss, args, kwargs)

    def _begin_loss(self, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        kwargs = dict(zip(self._model_parameters, args, strict=False)) | kwargs
        labels, rows = kwargs.get("labels"), self.rows
        if self.bank.run is OFF or not rows or not isinstance(labels, Tensor) or labels.dim() != 2:
            return None
        forms = [[self.sources[n].form for n in names if n in self.sources] for names in rows]
        found = with_first_label(kwargs, [of_row[-1:] == [Form.EMBEDDINGS] for of_row in forms])
        return None if found is None else ((), found)

    @property
    def rows(self) -> tuple[tuple[str, ...], ...]:
        """The adapters of each row; one for all where rows do not choose."""
        return (self.bank.active,) if self.bank.mode is None else self.bank.mode.of_row

    def _positions(self, kwargs: dict[str, Any], inputs: Tensor, past: int | Tensor | None) -> Tensor:
        """Of the text, from the model's first on."""
        room = past is not None  # beyond what is written
        past, length = past if room else 0, inputs.shape[1]
        given, mask = kwargs.get("position_ids"), kwargs.get("attention_mask")
        new = torch.arange(length, device=inputs.device) + _beside(inputs, past)
        if isinstance(mask, dict):  # made by the model around the decoder, which alone was told of the padding
            mask = attention.seen_keys(mask)
            mask = None if mask is None else mask.expand(len(inputs), -1)
        if isinstance(mask, Tensor) and mask.dim() != 4:
            seen = length if isinstance(past, Tensor) else past + length
            fits = mask.dim() == 2 and len(mask) == len(inputs) and mask.shape[1] >= seen
            if not fits or (mask.shape[1] > length and not room):
                raise ValueError(
                    f"attention_mask has shape {tuple(mask.shape)}; it must be {(len(inputs), past + length)}: one "
                    "number a token of the text, none for virtual tokens"
                )
            if given is None:
                return (new - first_visible(mask)).clamp(min=0) + self._first
        return new.unsqueeze(0) + self._first if given is None else given

    def _reach(self, rows: Sequence[tuple[str, ...]], positions: Tensor) -> int:
        """See ``bank.reach``."""
        if not self._rotaries:
            return 0
        longest = max(sum(self.sources[n].count for n in names if n in self.sources) for names in rows)
        reach = int(positions.max()) + longest + 1
        return reach if reach > self._usual_reach else 0

    # What the prefixes are.

    def run_of(self, rows: Sequence[tuple[str, ...]], batch: int, decoding: bool) -> _Run:
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
    def _stacked(values: list[Values], index: list[int], batch: int) -> _Run:
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
            return _Run([Prefix(k, v) for k, v in pairs], longest, last)
        slot_lengths = torch.tensor(lengths, device=device) if min(lengths) < longest else None
        slot = torch.tensor(index, device=device).repeat_interleave(batch // len(index))
        shift = torch.tensor([*lengths, 0], device=device)[slot].unsqueeze(1)
        rows = {k.device: (k, slot, slot_lengths) for k, _ in pairs}
        rows = {home: tuple(_beside(k, t) for t in of_rows) for home, (k, *of_rows) in rows.items()}
        last = None if last is None else last[_beside(last, slot)]
        return _Run([Prefix(k, v, *rows[k.device]) for k, v in pairs], shift, last)

    def _of_row(self, names: tuple[str, ...], decoding: bool) -> Values:
        """For a row that uses ``names``."""
        others = tuple(n for n in names if n not in self.sources)
        parts = [self._of_prompt((n, *others), decoding) for n in names if n in self.sources]
        return parts[0] if len(parts) == 1 else self._kept.joined(names, parts)

    def _of_prompt(self, names: tuple[str, ...], decoding: bool) -> Values:
        """For the soft prompt ``names[0]``, with the other adapters on its row."""
        source = self.sources[names[0]]
        if not torch.compiler.is_compiling():
            return self._kept.of_prompt(source, names, decoding, self._work_out)
        if source.form is Form.KEYS_VALUES:
            return self._work_out(source, ())
        tensors = compiled_tensors(self, names, self.decoder.training, decoding)
        return Values(tensors[:-1], tensors[-1]) if source.form is Form.EMBEDDINGS else Values(tensors, None)

    def parameters(self, names: Sequence[str]) -> list[nn.Parameter]:
        return [parameter for name in names for parameter in self.bank.parameters(name)]

    def tensors(self, names: Sequence[str], decoding: bool) -> list[Tensor]:
        names = tuple(names)
        with self.bank.using(_beside_a_prompt(names[1:])):
            values = self._kept.of_prompt(self.sources[names[0]], names, decoding, self._work_out)
        return values.tensors if values.last is None else [*values.tensors, values.last]

    def _work_out(self, source: Source, others: tuple[str, ...]) -> Values:
        rows = self.bank.mode and _beside_a_prompt(others)
        vectors = source.module().to(self.model.get_input_embeddings().weight.dtype)
        if source.form is Form.KEYS_VALUES:
            layers, heads, dim = self.shape
            tensors = vectors.view(len(vectors), 2 * layers, 1, heads, dim).permute(1, 2, 3, 0, 4)
            values = Values(self._in_layers(list(tensors.contiguous().unbind(0))), None)
        elif source.form is Form.EMBEDDINGS:
            values = self._computed(vectors.clone(), rows)  # models may scale in place what they are given
        else:
            inputs = vectors.view(len(vectors), len(self._blocks), -1).unbind(1)
            # What is at the embedding, which may be of another width, does not matter.
            embeddings = vectors.new_zeros(len(vectors), self.decoder.get_input_embeddings().weight.shape[1])
            values = Values(self._computed(embeddings, rows, inputs).tensors, None)
        if source.dropout and self.decoder.training:
            values = values._replace(tensors=[F.dropout(t, source.dropout) for t in values.tensors])
        return values

    def _in_layers(self, tensors: list[Tensor]) -> list[Tensor]:
        """Keys and values as and where the layers read them, from those of a file."""
        homes = map(_home, self.attentions)
        return [tensors[2 * slot + i].to(home) for slot, home in zip(self.slots, homes, strict=True) for i in (0, 1)]

    def _computed(self, embeddings: Tensor, rows: Rows | None, layer_inputs: Sequence[Tensor] = ()) -> Values:
        """What the model makes of [length, hidden] at the embedding, or of ``layer_inputs`` put into its layers."""
        cache = DynamicCache()
        positions = torch.arange(len(embeddings), device=embeddings.device) + self._first
        handed = {attention.HANDED_DOWN: _NOTHING} if self._hands_down else {}  # should the decoder be compiled code
        with self._bare(rows, layer_inputs), all_layers(self.decoder.config, len(self.attentions)):
            output = self.decoder(
                inputs_embeds=embeddings.unsqueeze(0),
                position_ids=positions.unsqueeze(0),
                use_cache=True,
                **{self._cache_name: cache},
                **handed,
            )
        held = [t for layer in cache.layers for t in (layer.keys, layer.values)]
        return Values(self._in_layers(held), output[0][:, -1])

    @contextmanager
    def _bare(self, rows: Rows | None, layer_inputs: Sequence[Tensor]) -> Iterator[None]:
        """The model without prefixes, with the adapters that ``rows`` says, its layers fed with ``layer_inputs``."""
        with (
            self.bank.using(rows),
            self.bank.running(OFF),
            without_checkpointing(self._checkpointing),
            fed(self._blocks, layer_inputs),
            reaching(self._rotaries, self.bank.reach),
        ):
            yield

    def keys_values(self, ids: Tensor) -> Tensor:
        """What the base model makes of the tokens ``ids`` [P]: [P, L · 2 · heads · dim], as Prefix Tuning keeps it."""
        return torch.cat([t.to(ids.device) for t in self._of_tokens(ids)]).permute(2, 0, 1, 3).flatten(1)

    @torch.no_grad()
    def _of_tokens(self, ids: Tensor) -> list[Tensor]:
        """The keys and values that the base model makes of the tokens ``ids`` [P], as in :class:`Values`."""
        return self._computed(self.decoder.get_input_embeddings()(ids), NO_ROWS).tensors

    @torch.no_grad()
    def export(self, names: tuple[str, ...]) -> list[Tensor]:
        """Keys and values, layer by layer in turn, each [heads, length, dim], of a row that uses ``names``."""
        training = self.decoder.training
        self.decoder.eval()
        try:
            with self.bank.using(Rows((names,), names)):
                return [t[0].clone() for t in self._of_row(names, False).tensors]  # layers may read the same ones
        finally:
            self.decoder.train(training)

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

    def _collect(self, run: _Run, embeds: Tensor | None) -> dict[str, Tensor]:
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


def _beside(t: Tensor, value: Any) -> Any:
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
    unknown = torch.compiler.is_compiling() or (isinstance(length, Tensor) and not length.is_cpu)
    return length if unknown else int(length)


def goes_on(past: int | Tensor | None, length: int) -> bool:
    """Whether ``length`` tokens go on from ``past`` ones. Where nobody knows, a single one does: others may be the
    first of a cache that was emptied."""
    if isinstance(past, Tensor):
        return length == 1 and not torch.compiler.is_compiling()
    return bool(past)


def distinct(rows: Iterable[tuple[str, ...]]) -> tuple[list[tuple[str, ...]], list[int]]:
    """The different ones among ``rows``, and for each row which of them it is: -1 for an empty one."""
    slots: dict[tuple[str, ...], int] = {}
    index = [slots.setdefault(names, len(slots)) if names else -1 for names in rows]
    return list(slots), index
