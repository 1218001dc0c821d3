"""P-Tuning (Liu et al. 2021): an MLP or LSTM makes the vectors at the embedding, and trains with what it reads."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..nn.prompt_encoder import Form, LstmEncoder, MlpEncoder, SoftPrompt
from .base import PeftType, as_member, check_dropout, register_method
from .soft_prompt import SoftPromptConfig

if TYPE_CHECKING:
    from ..integrations.soft_prompts.prefixes import Prefixes


class PromptEncoderReparameterizationType(str, enum.Enum):
    """The kind of encoder."""

    MLP = "MLP"
    LSTM = "LSTM"


@register_method
@dataclass(kw_only=True)
class PromptEncoderConfig(SoftPromptConfig):
    """Configuration of P-Tuning; names and meaning are PEFT's.

    Attributes:
        encoder_reparameterization_type: "MLP" or "LSTM".
        encoder_hidden_size: of the encoder; None: the model's.
        encoder_num_layers, encoder_dropout: of the LSTM; the MLP has three layers and no dropout.
    """

    peft_type: ClassVar[PeftType] = PeftType.P_TUNING
    form: ClassVar[Form] = Form.EMBEDDINGS

    encoder_reparameterization_type: PromptEncoderReparameterizationType | str = PromptEncoderReparameterizationType.MLP
    encoder_hidden_size: int | None = None
    encoder_num_layers: int = 2
    encoder_dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        name = "encoder_reparameterization_type"
        self.encoder_reparameterization_type = as_member(PromptEncoderReparameterizationType, name, getattr(self, name))
        check_dropout("encoder_dropout", self.encoder_dropout)

    def fill(self, prefixes: Prefixes) -> None:
        super().fill(prefixes)
        self.encoder_hidden_size = self.encoder_hidden_size or self.token_dim

    def encoder(self) -> SoftPrompt | None:
        if self.encoder_reparameterization_type is PromptEncoderReparameterizationType.MLP:
            return MlpEncoder(self.rows, self.token_dim, self.encoder_hidden_size)
        return LstmEncoder(
            self.rows, self.token_dim, self.encoder_hidden_size, self.encoder_num_layers, self.encoder_dropout
        )
