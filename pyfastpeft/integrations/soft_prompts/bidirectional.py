"""Soft prompts in encoders and encoder–decoders.

Vectors at the embedding go in front of each row's own tokens (:mod:`.prompt_tokens`); in an encoder–decoder in front of
the encoder's. Keys and values are seen by an encoder's self-attention, and in an encoder–decoder by the decoder's. As
in PEFT they take the first positions and the row's tokens follow: learned positions move up, and T5's relative bias
covers the prefix.
"""

from __future__ import annotations

import inspect
import math
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from ...adapters import NO_ROWS, AdapterBank, Rows
from ...nn.ends import embedding_weight, input_embedding
from ...nn.prompt_encoder import Form
from .. import attention
from ..forwards import NamedForward
from .bare import tied
from .decoders import KeyValueShape, attentions_in, block_of, config_of, text_config
from .kept_prompts import Source, Values
from .prefixes import OFF, Prefixes, distinct, goes_on, past_of
from .prompt_tokens import DecoderForward, EncoderForward, EncoderModelForward, Tokens, shape_of_tokens

Room = Callable[[], "tuple[int, Tensor | None] | None"]
"""In the forward that is running: the length of the prefix, and int64 [batch] where a row has less of it than that;
None: there is none."""

_POSITIONS = (
    "BrosSpadeEEForTokenClassification",
    "BrosSpadeELForTokenClassification",
    "FlaubertForQuestionAnswering",
    "LongformerForMultipleChoice",
    "LongformerForQuestionAnswering",
    "LongformerForSequenceClassification",
    "LukeForEntitySpanClassification",
    "SplinterForPreTraining",
    "SplinterForQuestionAnswering",
    "TapasForQuestionAnswering",
    "XLMForQuestionAnswering",
    "XLNetForQuestionAnswering",
)
"""Classes that take, find or give out positions of tokens beside those of an answer's start and end."""


def _embeds_ids_alone(config: Any) -> bool:
    """Whether a model does more with ids than to look their vectors up, and nothing of it with vectors: ESM."""
    if config.model_type != "esm":
        return False
    return config.token_dropout or config.emb_layer_norm_before or config.position_embedding_type == "absolute"


def by_row(make: Callable[[int], Tensor], lengths: Tensor) -> Tensor:
    """[batch, …]: ``make(length)`` [batch or 1, …] for each row's own length."""
    different, which = lengths.unique(return_inverse=True)
    made = [make(length) for length in different.tolist()]
    made = [m.expand(len(lengths), *m.shape[1:]) for m in made]
    return torch.stack(made)[which, torch.arange(len(lengths), device=lengths.device)]


class MovedPositions(NamedForward):
    """Of a module that embeds positions or turns by them: those of the tokens start behind the prefix."""

    EMBEDS = ("embed_positions", "embeddings")
    TURNS = ("rotary_emb", "rotary_embeddings")
    _STARTS = ("cache_length", "past_key_values_length")

    def __init__(self, module: nn.Module, room: Room) -> None:
        super().__init__(module)
        self.room = room
        self._start = next((n for n in self._STARTS if n in self.__signature__.parameters), None)
        self._turns = "x" in self.__signature__.parameters
        count = getattr(module, "create_position_ids_from_inputs_embeds", None)
        self._first = 0 if count is None else module.padding_idx + 1
        # RoBERTa's, given vectors instead of ids, count from the first position wherever they are told to start.
        self._forgets = count is not None and self._start not in inspect.signature(count).parameters

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        names = inspect.signature(type(module).forward).parameters
        return any(n in names for n in (*cls._STARTS, "position_ids"))

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        room = self.room()
        if room is None:
            return self.own(*args, **kwargs)
        named = self.named(args, kwargs)
        length, lengths = room
        if self._turns:
            shift = length if lengths is None else lengths.unsqueeze(1)
            return self.own(**named | {"position_ids": named["position_ids"] + shift})
        if lengths is None:
            return self._behind(length, named)

        def of_rows(length: int) -> Tensor:
            made = self._behind(length, named)
            return made if made.dim() == 3 else made.unsqueeze(0)  # Marian's are alike for all rows

        return by_row(of_rows, lengths)

    def _behind(self, length: int, named: dict[str, Any]) -> Tensor:
        positions = named.get("position_ids")
        if positions is not None:
            return self.own(**named | {"position_ids": positions + length})
        if self._start is not None and not (self._forgets and named.get("input_ids") is None):
            return self.own(**named | {self._start: named.get(self._start, 0) + length})
        inputs = next(v for n, v in named.items() if n.startswith("input") and v is not None)
        first = self._first + length
        positions = torch.arange(first, first + inputs.shape[1], device=inputs.device)
        return self.own(**named | {"position_ids": positions.unsqueeze(0)})


class RelativeBias:
    """``compute_bias`` of an attention that adds a relative position bias (T5's): in front of the bias [batch or 1,
    heads, queries, keys] comes the prefix's."""

    def __init__(self, module: nn.Module, room: Room) -> None:
        self.module, self.room = module, room

    def __call__(
        self, query_length: int, key_length: int, device: torch.device | None = None, past_seen_tokens: int | Tensor = 0
    ) -> Tensor:
        compute = type(self.module).compute_bias
        bias = compute(self.module, query_length, key_length, device, past_seen_tokens)
        room = self.room()
        if room is None:
            return bias
        longest, lengths = room

        def of_prefix(length: int) -> Tensor:
            made = compute(self.module, query_length, length, device, past_seen_tokens + length)
            return nn.functional.pad(made, (0, longest - length))

        front = of_prefix(longest) if lengths is None else by_row(of_prefix, lengths)
        return torch.cat([front, bias.expand(len(front), -1, -1, -1)], 3)


class _Recorder(threading.local):
    """Where the calling thread puts the keys and values that attention layers see."""

    held: dict[nn.Module, tuple[Tensor, Tensor]] | None = None


_RECORDED = "pyfastpeft_recorded"
_recorder = _Recorder()


def _recorded_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
    """The attention function that can give away what a layer's keys and values are: not every encoder fills a cache."""
    if _recorder.held is not None:
        _recorder.held[module] = (key, value)
    return attention.attention_forward(module, query, key, value, *args, **kwargs)


AttentionInterface.register(_RECORDED, _recorded_attention)
AttentionMaskInterface.register(_RECORDED, attention.attention_mask)


class BidirectionalPrefixes(Prefixes):
    """The soft prompts of one model that is no plain causal decoder.

    Attributes:
        tokens: adapter name → soft prompt, of those at the embedding; all others are in ``sources``.
    """

    ATTENTION = _RECORDED

    def __init__(self, model: nn.Module, bank: AdapterBank) -> None:
        self.tokens: dict[str, Source] = {}
        super().__init__(model, bank)

    def _find(self) -> None:
        self.decoder = self.model.get_decoder() if self.seq2seq else self.model
        if not self.seq2seq:
            self._check_embeds()
        self.attentions = [m for m in attentions_in(self.decoder) if m.is_causal or not self.seq2seq]
        paths = {m: path for path, m in self.decoder.named_modules()}
        self._blocks = [block_of(self.decoder, paths[m]) for m in self.attentions]
        kind = type(self.model).__name__
        config = config_of(self.decoder, kind)
        text = text_config(config, self.seq2seq)
        if getattr(text, "num_attention_heads", None) is None:
            raise ValueError(f"a {kind} has no attention, so it cannot take a soft prompt")
        shape = KeyValueShape.of(text)
        # Of an encoder–decoder PEFT counts the encoder's layers.
        self.shape = shape._replace(layers=getattr(self.model.config, "num_hidden_layers", shape.layers))
        # PEFT lays out an encoder–decoder's keys and values in fours, and uses the first two of each.
        step = 2 if self.seq2seq else 1
        self.slots = [step * i % self.shape.layers for i in range(len(self.attentions))]
        # GIT's and PaliGemma's images have some too.
        self._of_text = all(isinstance(getattr(m, "config", text), type(text)) for m in self.attentions)
        self._whole = len(self.attentions) == shape.layers
        self._biased = [m for m in self.attentions if getattr(m, "has_relative_attention_bias", False)]
        self._slides = bool(getattr(config, "sliding_window", None))
        # Such a model's rotary positions are left alone, and `check` refuses it.
        names = MovedPositions.EMBEDS + (() if self._slides else MovedPositions.TURNS)
        named = (m for n, m in self.decoder.named_modules() if n.rpartition(".")[2] in names)
        self._places = [m for m in named if MovedPositions.fits(m)]

    # In the model and out of it.

    def add(self, name: str, source: Source) -> None:
        if source.form is Form.EMBEDDINGS:
            self.tokens[name] = source
        else:
            super().add(name, source)
        if self.tokens or not self.seq2seq:
            self._install_tokens()

    def remove(self, name: str) -> None:
        if self.tokens.pop(name, None) is None:
            super().remove(name)
        if not self.tokens and (self.seq2seq or not self.sources):
            self._uninstall_tokens()

    def uninstall(self) -> None:
        super().uninstall()
        self.tokens.clear()
        self._uninstall_tokens()

    def check(self, form: Form) -> None:
        if form is Form.EMBEDDINGS:
            if self.seq2seq and any(module is self.decoder for module in self.model.get_encoder().modules()):
                raise ValueError(
                    f"a {type(self.model).__name__} is a decoder without its encoder, and a soft prompt at the "
                    "embedding is the encoder's; use Prefix Tuning"
                )
            self._check_embeds()
            if type(self.model).__name__ in _POSITIONS:
                raise ValueError(
                    f"a {type(self.model).__name__} works with positions of tokens in a way of its own, so no soft "
                    "prompt can go in front"
                )
            return
        self._check_interface()
        kind = type(self.decoder).__name__
        if not self._of_text:
            raise ValueError(
                f"a {kind} has attention among an image's patches beside that of its text, and which layers of the two "
                "a prefix is for is not known; use Prompt Tuning or P-Tuning, whose prompt is in front of the text"
            )
        if not self._whole:
            raise ValueError(f"a {kind} has no attention of its own in each layer that could be given a prefix")
        if not (self._biased or self._places) and self._slides:
            raise ValueError(
                f"a {kind} has sliding windows, whose masks do not say where a prefix lies; use Prompt Tuning or "
                "P-Tuning, whose prompt is in front of the text"
            )
        if not (self._biased or self._places):
            raise ValueError(f"how a {kind} counts its positions is not known, so it takes no prefix")

    def _check_embeds(self) -> None:
        for module in self._ends():
            parts = (module, getattr(module, "base_model", module))
            around, inside = (inspect.signature(type(m).forward).parameters for m in parts)
            # ModernBERT's question answering hands down what it does not name.
            takes = "inputs_embeds" in around or any(p.kind is p.VAR_KEYWORD for p in around.values())
            if not takes or "inputs_embeds" not in inside:
                raise ValueError(f"a {type(module).__name__} takes no inputs_embeds, so no soft prompt can go in front")
        if type(input_embedding(self.model)).__name__ == "QuantEmbedding":
            raise ValueError(
                f"the embedding of a {type(self.model).__name__} returns scales beside its vectors, so no soft prompt "
                "can go in front"
            )

    def _install(self) -> None:
        super()._install()
        for module in self._biased:
            module.compute_bias = RelativeBias(module, self._room)
        for module in self._places:
            module.forward = MovedPositions(module, self._room)

    def _uninstall(self) -> None:
        super()._uninstall()
        for module in (*self._biased, *self._places):
            for name in ("forward", "compute_bias"):
                vars(module).pop(name, None)

    def _ends(self) -> dict[nn.Module, type]:
        if self.seq2seq:
            return {self.model.get_encoder(): EncoderForward, self.decoder: DecoderForward}
        return {self.model: EncoderModelForward}

    def _install_tokens(self) -> None:
        for module, forward in self._ends().items():
            module.forward = forward(module, self._tokens)

    def _uninstall_tokens(self) -> None:
        for module in self._ends():
            vars(module).pop("forward", None)

    # Tokens.

    def _tokens(self, batch: int) -> Tokens | None:
        """What goes in front of ``batch`` rows at the embedding: none, where they have keys and values alone."""
        rows = self.rows
        used = {name for names in rows for name in names}
        if self.bank.run is OFF or used.isdisjoint([*self.tokens, *self.sources]):
            return None
        if used.isdisjoint(self.tokens):
            return Tokens(embedding_weight(self.model)[:0].unsqueeze(0))
        different, index = distinct(tuple(name for name in names if name in self.tokens) for names in rows)
        if -1 in index and _embeds_ids_alone(self.model.config):
            prompts = sorted(used.intersection(self.tokens))
            raise ValueError(
                f"adapter_names has {prompts} for some rows and no prompt at the embedding for others; ESM scales, and "
                "gives positions to, what it embeds of ids alone: give those rows apart"
            )
        vectors = [torch.cat([self._vectors(name) for name in names]) for names in different]
        if not any(index):
            return Tokens(vectors[0].unsqueeze(0))
        lengths = torch.tensor([len(v) for v in vectors], device=vectors[0].device)
        slot = torch.tensor(index, device=lengths.device).repeat_interleave(batch // len(index))
        return Tokens(pad_sequence(vectors, batch_first=True), slot, lengths)

    def _vectors(self, name: str) -> Tensor:
        source = self.tokens[name]
        return source.module()[: source.count]  # a second part is for the decoder, and PEFT does not use it

    # Keys and values.

    @torch.compiler.disable
    def _before(self, decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        rows = self.rows
        if self.bank.run is OFF:
            return None
        self._clear_interrupted()
        if not self.uses(rows):
            return None
        self._check_attention()
        inputs = [*args[:1], *(kwargs.get(name) for name in ("input_ids", "inputs_embeds"))]
        given = next((x for x in inputs if x is not None), None)
        if given is None:
            return None  # the decoder says so itself
        *lead, length = shape_of_tokens(given)
        self.bank.run = self.run_of(rows, math.prod(lead), goes_on(past_of(kwargs), length))
        return args, kwargs | self._collect(self.bank.run, kwargs.get("inputs_embeds"))

    @torch.compiler.disable
    def _after(self, decoder: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        if self.bank.run is not OFF:
            self._clear()

    @torch.compiler.disable
    def _room(self) -> tuple[int, Tensor | None] | None:
        run = self.bank.run
        if run is None or run is OFF:
            return None
        length = run.layers[0].k.shape[2]
        if not isinstance(run.shift, Tensor):
            return length, None
        return length, run.shift.squeeze(1)

    def _computed(self, embeddings: Tensor, rows: Rows | None, layer_inputs: Sequence[Tensor] = ()) -> Values:
        return self._made_of(rows, layer_inputs, inputs_embeds=embeddings.unsqueeze(0))

    @torch.no_grad()
    def _of_tokens(self, ids: Tensor) -> list[Tensor]:
        """As ids: Speech2Text counts its positions by them."""
        return self._made_of(NO_ROWS, (), input_ids=ids.unsqueeze(0)).tensors

    def _made_of(self, rows: Rows | None, layer_inputs: Sequence[Tensor], **inputs: Tensor) -> Values:
        stack = self.decoder if self.seq2seq else self.model.base_model
        attention_before = self._set_attention()
        _recorder.held = held = {}
        try:
            with self._bare(rows, layer_inputs):
                output = stack(**inputs, use_cache=False)
        finally:
            _recorder.held = None
            attention.say_attention(attention_before)
        tensors = [t for module in self.attentions for t in held[module]]
        return Values(tied(tensors, output[0], self._blocks[-1]), None)

    def export(self, names: tuple[str, ...]) -> list[Tensor]:
        at_embedding = [name for name in names if name in self.tokens]
        if at_embedding:
            raise ValueError(
                f"adapter {at_embedding[0]!r} is a prompt at the embedding of a {type(self.model).__name__}, where its "
                "keys and values depend on the text; there is no prefix to export"
            )
        return super().export(names)
