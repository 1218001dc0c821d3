"""Prefix Tuning (Li and Liang 2021): keys and values of every layer train, optionally through an MLP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from ..nn.ends import embedding_weight
from ..nn.prompt_encoder import Form, PrefixEncoder, SoftPrompt
from .base import PeftType, register_method
from .soft_prompt import SoftPromptConfig, random_ids, text_ids

if TYPE_CHECKING:
    from ..integrations.soft_prompts.prefixes import Prefixes


@dataclass(kw_only=True)
class InitialTextConfig(SoftPromptConfig):
    """A soft prompt in every layer, whose first values may be what the model makes of a text.

    Attributes:
        prefix_init: "text" (what the model itself makes of a text, or of random tokens without one), "random" (standard
            normal) or "zero".
        prefix_init_text: that text.
        tokenizer_name_or_path: of the tokenizer for it, or the tokenizer itself.
    """

    NOT_SAVED: ClassVar[frozenset[str]] = SoftPromptConfig.NOT_SAVED | {
        "prefix_init",
        "prefix_init_text",
        "tokenizer_name_or_path",
    }

    prefix_init: str | None = "text"
    prefix_init_text: str | None = None
    tokenizer_name_or_path: Any = None

    def _check_initial(self) -> None:
        if self.prefix_init not in ("text", "random", "zero"):
            raise ValueError(f"prefix_init is {self.prefix_init!r}; it must be 'text', 'random' or 'zero'")
        if self.prefix_init_text is not None and (self.prefix_init != "text" or self.tokenizer_name_or_path is None):
            raise ValueError("prefix_init_text is given; it needs prefix_init 'text' and tokenizer_name_or_path")

    @torch.no_grad()
    def initialize(self, module: SoftPrompt, prefixes: Prefixes) -> None:
        if self.prefix_init == "zero":
            last = module.transform[-1] if module.encodes else module.embedding
            for parameter in last.parameters():
                parameter.zero_()
        elif self.prefix_init == "text":
            model = prefixes.model
            if self.prefix_init_text is None:
                ids = random_ids(model, self.num_virtual_tokens)
            else:
                ids = text_ids(self.prefix_init_text, self.tokenizer_name_or_path, model, self.num_virtual_tokens)
            ids = ids.to(embedding_weight(model).device)
            values = prefixes.keys_values(ids) if self.form is Form.KEYS_VALUES else prefixes.layer_inputs(ids)
            module.embedding.weight.copy_(values)


@register_method
@dataclass(kw_only=True)
class PrefixTuningConfig(InitialTextConfig):
    """Configuration of Prefix Tuning; names are PEFT's but for the ``prefix_`` ones on initial values.

    Attributes:
        prefix_projection: train an MLP that makes the keys and values.
        encoder_hidden_size: of that MLP; None: ``token_dim``.
        init_weights: "zero": as ``prefix_init`` (PEFT's name for it).
        prefix_init: None: "text", and with a projection "random", which alone it can start from besides zero.
    """

    peft_type: ClassVar[PeftType] = PeftType.PREFIX_TUNING
    form: ClassVar[Form] = Form.KEYS_VALUES

    prefix_projection: bool = False
    encoder_hidden_size: int | None = None
    init_weights: str | None = None
    prefix_init: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init_weights not in (None, "zero"):
            raise ValueError(f"init_weights is {self.init_weights!r}; it must be None or 'zero'")
        if self.init_weights == "zero" and self.prefix_init not in (None, "zero"):
            raise ValueError(f"prefix_init is {self.prefix_init!r}, and init_weights is 'zero'; give one of them")
        if self.prefix_init is None:
            self.prefix_init = self.init_weights or ("random" if self.prefix_projection else "text")
        self._check_initial()
        if self.prefix_projection and self.prefix_init == "text":
            raise ValueError("prefix_init is 'text'; with prefix_projection it must be 'random' or 'zero'")

    def fill(self, prefixes: Prefixes) -> None:
        own = prefixes.first_layer
        if (self.token_dim, self.num_attention_heads) == (own.hidden_size, own.num_attention_heads):
            self.token_dim = self.num_attention_heads = None  # the queries' shape, as PEFT lets it be given
        super().fill(prefixes)
        self.encoder_hidden_size = self.encoder_hidden_size or self.token_dim

    def encoder(self) -> SoftPrompt | None:
        if not self.prefix_projection:
            return None
        return PrefixEncoder(self.num_virtual_tokens, self.token_dim, self.encoder_hidden_size, self.width)
