"""P-Tuning v2 (Liu et al. 2022): virtual tokens of their own in every layer.

As the paper's text has it, vectors are put into every layer's input, and the layer's own norm and frozen projections
make their keys and values. As the paper's code has it (``prefix=True``), keys and values themselves are learned.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..nn.prompt_encoder import Form
from .base import PeftType, check_dropout, register_method
from .prefix import InitialTextConfig

if TYPE_CHECKING:
    from ..integrations.soft_prompts.prefixes import Prefixes


@register_method
@dataclass(kw_only=True)
class DeepPromptConfig(InitialTextConfig):
    """Configuration of P-Tuning v2. PEFT does not have the method, so the files are for this library alone.

    For classification give ``task_type`` ("SEQ_CLS", "TOKEN_CLS"): the model's head then trains along, as in the paper.

    Attributes:
        prefix: learn keys and values themselves.
        prefix_dropout: on keys and values, in training.
    """

    peft_type: ClassVar[PeftType] = PeftType.DEEP_PROMPT_TUNING
    IN_PEFT: ClassVar[bool] = False
    IN_PLACE: ClassVar[tuple[str, ...]] = (*InitialTextConfig.IN_PLACE, "prefix_dropout")

    prefix: bool = False
    prefix_dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_dropout("prefix_dropout", self.prefix_dropout)
        self._check_initial()

    @property
    def form(self) -> Form:
        return Form.KEYS_VALUES if self.prefix else Form.LAYER_INPUTS

    @property
    def dropout(self) -> float:
        return self.prefix_dropout

    def fill(self, prefixes: Prefixes) -> None:
        if prefixes.seq2seq:
            kind = type(prefixes.model).__name__
            raise ValueError(f"P-Tuning v2 does not apply to an encoder–decoder, and a {kind} is one")
        super().fill(prefixes)
