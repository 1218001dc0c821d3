"""What the soft prompts have in common: virtual tokens, where they are put in, files."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ..adapters import AdapterBank
from ..hub.files import check_tensors, check_text
from ..nn.ends import embedding_weight
from ..nn.modes import evaluating
from ..nn.prompt_encoder import Form, SoftPrompt
from ..ops.checks import as_count
from .base import PeftConfig, TaskType
from .tuner import Tuner

if TYPE_CHECKING:
    from ..integrations.soft_prompts.prefixes import Prefixes

KEY = "prompt_embeddings"
_ENCODER = "encoder."


@dataclass(kw_only=True)
class SoftPromptConfig(PeftConfig):
    """Fields of every soft prompt's configuration; names and meaning are PEFT's.

    Attributes:
        num_virtual_tokens: how many.
        token_dim, num_attention_heads, num_layers, num_transformer_submodules: the model's shape; filled in when the
            adapter is attached, and checked against the model where they are given.
        without_encoder: the virtual tokens train themselves, whatever the method has to make them; filled in when an
            adapter is loaded, as PEFT's files hold them alone. Not saved.
    """

    NOT_SAVED: ClassVar[frozenset[str]] = frozenset(("without_encoder",))
    IN_PLACE: ClassVar[tuple[str, ...]] = (*PeftConfig.IN_PLACE, "without_encoder")
    is_prompt_learning: ClassVar[bool] = True
    form: ClassVar[Form]
    """What the virtual tokens are to the model."""

    num_virtual_tokens: int | None = None
    token_dim: int | None = None
    num_transformer_submodules: int | None = None
    num_attention_heads: int | None = None
    num_layers: int | None = None
    without_encoder: bool = False

    @classmethod
    def tuner(cls) -> type[Tuner]:
        return SoftPromptTuner

    def __post_init__(self) -> None:
        super().__post_init__()
        self.num_virtual_tokens = as_count("num_virtual_tokens", self.num_virtual_tokens)

    def __deepcopy__(self, memo: dict) -> SoftPromptConfig:
        return copy.copy(self)  # the tokenizer that it may hold is large, and nothing in it is changed in place

    @property
    def rows(self) -> int:
        """Of ``prompt_embeddings``; at the embedding an encoder and its decoder have virtual tokens of their own."""
        return self.num_virtual_tokens * (self.num_transformer_submodules or 1 if self.at_embedding else 1)

    # What a method says.

    @property
    def at_embedding(self) -> bool:
        """Whether the virtual tokens are put in at the embedding alone."""
        return self.form is Form.EMBEDDINGS

    @property
    def width(self) -> int:
        """Of one row of ``prompt_embeddings``."""
        layers = 1 if self.at_embedding else self.num_layers
        return self.token_dim * layers * (2 if self.form is Form.KEYS_VALUES else 1)

    @property
    def dropout(self) -> float:
        """On keys and values, in training."""
        return 0.0

    def fill(self, prefixes: Prefixes) -> None:
        """Fill in and check what depends on the model."""
        if self.form is Form.KEYS_VALUES:
            layers, heads, dim = prefixes.shape
            width = heads * dim
        else:
            own = prefixes.first_layer
            layers, heads, width = len(prefixes.attentions), own.num_attention_heads, own.hidden_size
            if self.at_embedding:
                layers, width = prefixes.shape.layers, embedding_weight(prefixes.model).shape[1]
        self._expect(num_layers=layers, num_attention_heads=heads, token_dim=width)

    def _expect(self, **values: int) -> None:
        """Fill in ``values`` where nothing is given.

        Raises:
            ValueError: something else is given.
        """
        other = {name: getattr(self, name) for name in values if getattr(self, name) not in (None, values[name])}
        if other:
            listed = ", ".join(f"{name} is {asked}, must be {values[name]}" for name, asked in other.items())
            own = ", ".join(f"{name} {value}" for name, value in values.items())
            raise ValueError(f"the {self.peft_type} adapter is of another model: {listed} (this model has {own})")
        for name, value in values.items():
            setattr(self, name, value)

    def encoder(self) -> SoftPrompt | None:
        """The module that makes the virtual tokens in training; None: they train themselves."""
        return None

    def initialize(self, module: SoftPrompt, prefixes: Prefixes) -> None:
        """Give the parameters other first values than ``module`` was made with."""


def text_ids(text: str, tokenizer: Any, model: nn.Module, count: int, **kwargs: Any) -> Tensor:
    """``count`` token ids: the text's, cut off, or repeated until there are enough.

    Args:
        tokenizer: a tokenizer, or the name or path of one (``kwargs`` go to ``AutoTokenizer``).
    """
    if not isinstance(text, str):
        raise TypeError(f"the initial text is {text!r}; it must be a string")
    must = "it must be a tokenizer, or the name or path of one"
    if not isinstance(tokenizer, (str, os.PathLike)) and not callable(tokenizer):
        raise TypeError(f"tokenizer_name_or_path is {tokenizer!r}; {must}")
    check_text(text)
    if isinstance(tokenizer, (str, os.PathLike)):
        from transformers import AutoTokenizer

        kwargs.pop("trust_remote_code", None)  # a checkpoint must not be able to run code
        try:
            tokenizer = AutoTokenizer.from_pretrained(tokenizer, **kwargs)
        except (OSError, ValueError) as error:
            raise ValueError(f"tokenizer_name_or_path is {tokenizer!r}; {must}: {error}") from error
    ids = tokenizer(text)["input_ids"]
    if not ids:
        raise ValueError(f"the initial text is {text!r}, which has no tokens")
    ids, known = (ids * -(-count // len(ids)))[:count], len(embedding_weight(model))
    if max(ids) >= known:
        raise ValueError(
            f"tokenizer_name_or_path is of another model: the initial text has token {max(ids)}, and a "
            f"{type(model).__name__} has {known}"
        )
    return torch.tensor(ids, device="cpu")


def random_ids(model: nn.Module, count: int) -> Tensor:
    return torch.randint(0, model.get_input_embeddings().num_embeddings, (count,), device="cpu")


class SoftPromptTuner(Tuner):
    """All soft prompts on one model."""

    PREFIX = "base_model."

    def __init__(self, model: nn.Module, bank: AdapterBank) -> None:
        super().__init__(model, bank)
        self._prefixes: Prefixes | None = None

    @property
    def prefixes(self) -> Prefixes:
        """How the virtual tokens reach this model."""
        if self._prefixes is None:
            from ..integrations.soft_prompts import prefixes_of

            self._prefixes = prefixes_of(self.model, self.bank)
        return self._prefixes

    def resolved(self, config: SoftPromptConfig) -> SoftPromptConfig:
        self.prefixes.check(config.form)
        self._resolve_submodules(config)
        config.fill(self.prefixes)
        context = getattr(self.model.config, "max_position_embeddings", None)
        if context is not None and 0 < context <= config.num_virtual_tokens:  # XLNet's -1 is no limit
            raise ValueError(
                f"num_virtual_tokens is {config.num_virtual_tokens}; a {type(self.model).__name__} has a context of "
                f"{context} tokens, of which some must be left for the text"
            )
        return config

    def _resolve_submodules(self, config: SoftPromptConfig) -> None:
        """An encoder–decoder has two, of which those that classify use one."""
        kind, seq2seq = type(self.model).__name__, self.prefixes.seq2seq
        if config.task_type == TaskType.SEQ_2_SEQ_LM and not seq2seq:
            raise ValueError(f"task_type is 'SEQ_2_SEQ_LM', but a {kind} is no encoder–decoder")
        if config.task_type == TaskType.CAUSAL_LM and seq2seq:
            raise ValueError(
                f"task_type is 'CAUSAL_LM', but a {kind} is an encoder–decoder; it must be 'SEQ_2_SEQ_LM' or the task "
                "of its head"
            )
        both = seq2seq and (config.task_type in (None, TaskType.SEQ_2_SEQ_LM) or not config.at_embedding)
        asked = config.num_transformer_submodules = config.num_transformer_submodules or 1 + both
        allowed = (1, 2) if seq2seq and config.at_embedding else (1 + seq2seq,)
        if asked not in allowed:
            raise ValueError(f"num_transformer_submodules is {asked}; for a {kind} it must be {allowed[-1]}")

    def expected(self, config: SoftPromptConfig, values: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
        shapes = {KEY: (config.rows, config.width)}
        if _with_encoder(values):
            with torch.device("meta"):
                encoder = config.encoder()
            if encoder is not None:
                shapes |= {_ENCODER + key: tuple(p.shape) for key, p in encoder.named_parameters()}
        return shapes

    def attach(
        self,
        name: str,
        config: SoftPromptConfig,
        *,
        strict: bool,
        values: Mapping[str, Tensor] | None,
        autocast_adapter_dtype: bool,
    ) -> None:
        if values is not None:
            config.without_encoder = not _with_encoder(values)
        module = None if config.without_encoder else config.encoder()
        if module is None:
            module = SoftPrompt(config.rows, config.width)
        if values is None:
            config.initialize(module, self.prefixes)
        # In float32 whatever the model is in, as in PEFT.
        module = module.to(embedding_weight(self.model).device).train(self.model.training)
        self.bank.prompts[name] = module
        self._put(name, config)

    def _put(self, name: str, config: SoftPromptConfig) -> None:
        """Let the model read the adapter's parameters."""
        from ..integrations.soft_prompts.kept_prompts import Source

        source = Source(self.bank.prompts[name], config.form, config.num_virtual_tokens, config.dropout)
        self.prefixes.add(name, source)
        self.bank.forget()

    def tensors(self, name: str, config: SoftPromptConfig) -> dict[str, Tensor]:
        module = self.bank.prompts[name]
        if not module.encodes:
            return {KEY: module.embedding.weight}
        return {_ENCODER + key: p for key, p in module.named_parameters()}

    def filled(self, name: str, config: SoftPromptConfig, values: Mapping[str, Tensor]) -> None:
        if self.bank.prompts[name].encodes:
            made, saved = self._output(name), values[KEY].float()
            largest = float(saved.abs().nan_to_num(0.0, 0.0).max())  # training may have ended in NaN
            if not torch.allclose(made, saved, rtol=1e-2, atol=1e-2 * largest, equal_nan=True):
                raise ValueError(
                    "the encoder beside the adapter does not belong to it: its output is not prompt_embeddings; remove "
                    "the encoder's file to train the virtual tokens themselves"
                )

    @torch.no_grad()
    def _output(self, name: str) -> Tensor:
        module = self.bank.prompts[name]
        with evaluating(module):
            return module().float().cpu()

    def state(self, name: str, config: SoftPromptConfig, save_embedding_layers: bool | str) -> dict[str, Tensor]:
        return {KEY: self._output(name)} | self.saved_embeddings(config, save_embedding_layers)

    def own_state(self, name: str, config: SoftPromptConfig) -> dict[str, Tensor]:
        return self.tensors(name, config) if self.bank.prompts[name].encodes else {}

    def check_same_layout(
        self, name: str, old: SoftPromptConfig, new: SoftPromptConfig, live: dict, expected: dict
    ) -> None:
        encodes = self.bank.prompts[name].encodes
        if encodes != _with_encoder(expected):
            has, other = ("an", "its output alone") if encodes else ("no", "one")
            raise ValueError(
                f"adapter {name!r} has {has} encoder that trains, what is loaded has {other}; exchange "
                "model.state_dict(), or delete the adapter first"
            )
        if encodes:
            expected = {key: shape for key, shape in expected.items() if key != KEY}
        if live != expected:
            raise ValueError(f"adapter {name!r} has other shapes; delete it first")
        if not _reads_alike(old, new):
            raise ValueError(f"adapter {name!r} has virtual tokens of another form; delete it first")

    def swaps_alike(self, name: str, old: SoftPromptConfig, new: SoftPromptConfig | None) -> bool:
        return not self.bank.prompts[name].encodes and (new is None or _reads_alike(old, new))

    def swap(
        self,
        name: str,
        old: SoftPromptConfig,
        new: SoftPromptConfig | None,
        live: dict[str, Tensor],
        values: Mapping[str, Tensor],
        source: str,
    ) -> Callable[[], SoftPromptConfig]:
        """Another number of virtual tokens, for adapters that are for inference."""
        if self.bank.prompts[name].encodes:
            raise ValueError(
                f"adapter {name!r} has an encoder that trains, so its virtual tokens cannot be replaced; load it with "
                "is_trainable=False"
            )
        shapes = {key: tuple(t.shape) for key, t in live.items()}
        count = len(values[KEY]) if KEY in values and values[KEY].dim() == 2 else old.rows
        if old.inference_mode:
            shapes[KEY] = (count, *shapes[KEY][1:])
        check_tensors(values, shapes, {}, source, [k for k, t in live.items() if not t.is_floating_point()])
        tokens = count * old.num_virtual_tokens // old.rows
        config = replace(old if new is None else new.in_place_of(old), num_virtual_tokens=tokens)
        if new is None and config.rows != count:
            parts = old.num_transformer_submodules
            raise ValueError(f"{source}: {KEY} has {count} rows; their number must be a multiple of {parts}")
        if config.rows != count or config.form is not old.form:
            return super().swap(name, old, new, live, values, source)
        self.resolved(config)

        @torch.no_grad()
        def run() -> SoftPromptConfig:
            for key, tensor in live.items():
                if key == KEY:
                    tensor.data = values[key].to(tensor, copy=True)
                else:
                    tensor.copy_(values[key])
            self.bank.prompts[name].embedding.num_embeddings = count
            self._put(name, config)
            return config

        return run

    def export(self, names: tuple[str, ...]) -> dict[str, Tensor]:
        """``layers.<i>.key`` and ``.value`` [heads, length, dim] of a row that uses ``names``."""
        tensors = self.prefixes.export(names)
        pairs = enumerate(zip(tensors[::2], tensors[1::2], strict=True))
        return {f"layers.{i}.{what}": t for i, pair in pairs for what, t in zip(("key", "value"), pair, strict=True)}

    def remove(self, name: str) -> None:
        if name in self.bank.prompts:
            self.prefixes.remove(name)
            del self.bank.prompts[name]
        self.bank.forget()

    def unload(self) -> None:
        if self._prefixes is not None:
            self.prefixes.uninstall()
        self.bank.prompts.clear()


def _with_encoder(values: Mapping[str, Tensor]) -> bool:
    return any(key.startswith(_ENCODER) for key in values)


def _reads_alike(a: SoftPromptConfig, b: SoftPromptConfig) -> bool:
    """Whether equal numbers mean the same to both: shapes may agree by chance."""
    return (a.form, a.num_virtual_tokens) == (b.form, b.num_virtual_tokens)
