"""Soft prompts in transformers models.

- :mod:`.prefixes`: what a model's soft prompts are as prefixes of keys and values, and which prefix each row has
- :mod:`.causal`: how a causal model gets them
- :mod:`.first_label`: how a prompt in it is trained to the text's first token
- :mod:`.decoders`: what a model consists of, and which causal ones can take a prefix
- :mod:`.bidirectional`: how encoders and encoder–decoders get them
- :mod:`.prompt_tokens`: there, prompts at the embedding as tokens in front of each row's own
- :mod:`.kept_prompts`: what a prompt comes to, kept until something changes that it depends on
- :mod:`.bare`: how a prompt runs through the model by itself
- :mod:`.checkpointing`: the gradients of prefixes under reentrant checkpointing
- :mod:`.prompt_operator`: what a prompt comes to, as one operator of compiled code
"""

from __future__ import annotations

from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING, PreTrainedModel

from ...adapters import AdapterBank
from .bidirectional import BidirectionalPrefixes
from .causal import CausalPrefixes
from .decoders import attentions_in, is_encoder_decoder
from .prefixes import Prefixes


def prefixes_of(model: nn.Module, bank: AdapterBank) -> Prefixes:
    """The soft prompts of ``model``.

    Raises:
        ValueError: soft prompts do not apply to the model; says why.
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"a {type(model).__name__} is no model of transformers; soft prompts need one")
    decoder = model.get_decoder()
    if getattr(getattr(decoder, "config", None), "is_encoder_decoder", False) and decoder.get_decoder() is not decoder:
        raise ValueError(
            f"{type(model).__name__}.get_decoder() returned a {type(decoder).__name__}, which has an encoder of its "
            f"own; give soft prompts to that {type(decoder).__name__}"
        )
    known = attentions_in(decoder)
    causal = any(m.is_causal for m in known) if known else _is_causal(model)  # what attends across is not
    causal = causal and not is_encoder_decoder(model)
    return (CausalPrefixes if causal else BidirectionalPrefixes)(model, bank)


def _is_causal(model: PreTrainedModel) -> bool:
    """Where the attention does not say so: a classifier as what generates with its configuration, but XLM and XLNet."""
    kind = type(model.config)
    generates = kind in MODEL_FOR_CAUSAL_LM_MAPPING and kind not in MODEL_FOR_MASKED_LM_MAPPING
    return model.can_generate() or (generates and getattr(model.config, "attn_type", None) != "bi")
