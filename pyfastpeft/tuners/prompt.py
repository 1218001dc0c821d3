"""Prompt Tuning (Lester et al. 2021): vectors at the embedding train, in front of the text."""

from __future__ import annotations

import enum
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from ..adapters import NO_ROWS
from ..nn.ends import embedding_weight
from ..nn.prompt_encoder import Form, SoftPrompt
from .base import PeftType, as_member, register_method
from .soft_prompt import SoftPromptConfig, random_ids, text_ids

if TYPE_CHECKING:
    from ..integrations.soft_prompts.prefixes import Prefixes


class PromptTuningInit(str, enum.Enum):
    """First values: standard normal, the base model's embeddings of a text, or of tokens drawn from the vocabulary."""

    RANDOM = "RANDOM"
    TEXT = "TEXT"
    SAMPLE_VOCAB = "SAMPLE_VOCAB"


@register_method
@dataclass(kw_only=True)
class PromptTuningConfig(SoftPromptConfig):
    """Configuration of Prompt Tuning; names and meaning are PEFT's.

    Attributes:
        prompt_tuning_init: a :class:`PromptTuningInit` or its name.
        prompt_tuning_init_text: the text for "TEXT", cut off or repeated to ``num_virtual_tokens``.
        tokenizer_name_or_path: of the tokenizer for it, or the tokenizer itself.
        tokenizer_kwargs: for ``AutoTokenizer.from_pretrained``.
    """

    peft_type: ClassVar[PeftType] = PeftType.PROMPT_TUNING
    form: ClassVar[Form] = Form.EMBEDDINGS

    prompt_tuning_init: PromptTuningInit | str = PromptTuningInit.RANDOM
    prompt_tuning_init_text: str | None = None
    tokenizer_name_or_path: Any = None
    tokenizer_kwargs: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.prompt_tuning_init = as_member(PromptTuningInit, "prompt_tuning_init", self.prompt_tuning_init)
        if self.prompt_tuning_init is PromptTuningInit.TEXT:
            for name in ("prompt_tuning_init_text", "tokenizer_name_or_path"):
                if getattr(self, name) is None:
                    raise ValueError(f"{name} is None; prompt_tuning_init 'TEXT' needs it")
        elif self.tokenizer_kwargs:
            raise ValueError("tokenizer_kwargs is given; it goes with prompt_tuning_init 'TEXT' only")
        if not isinstance(self.tokenizer_kwargs, Mapping | None):
            raise ValueError(f"tokenizer_kwargs is {self.tokenizer_kwargs!r}; it must be a dict or None")

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        tokenizer = self.tokenizer_name_or_path
        if isinstance(tokenizer, os.PathLike):
            values["tokenizer_name_or_path"] = os.fspath(tokenizer)
        elif tokenizer is not None and not isinstance(tokenizer, str):
            # PEFT wants a name beside a text, and does not use it when it loads an adapter.
            values["tokenizer_name_or_path"] = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        return values

    @torch.no_grad()
    def initialize(self, module: SoftPrompt, prefixes: Prefixes) -> None:
        if self.prompt_tuning_init is PromptTuningInit.RANDOM:
            return
        model = prefixes.model
        if self.prompt_tuning_init is PromptTuningInit.TEXT:
            kwargs = self.tokenizer_kwargs or {}
            ids = text_ids(self.prompt_tuning_init_text, self.tokenizer_name_or_path, model, self.rows, **kwargs)
        else:
            ids = random_ids(model, self.rows)
        embedding = model.get_input_embeddings()
        with prefixes.bank.using(NO_ROWS):
            module.embedding.weight.copy_(embedding(ids.to(embedding_weight(model).device)))
