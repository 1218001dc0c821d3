"""A model's ends: what transformers says its input embedding and its output head are, what is below their adapters, and
what tasks call theirs."""

from __future__ import annotations

from torch import Tensor, nn

from .lora_layer import LoraLayer
from .trainable_tokens import TrainableTokens

HEADS = {
    "SEQ_CLS": ["classifier", "score"],
    "TOKEN_CLS": ["classifier", "score"],
    "QUESTION_ANS": ["qa_outputs"],
}
"""By task type, the modules that a task trains whole beside any adapter, where the model has them."""


def input_embedding(model: nn.Module) -> nn.Module | None:
    """What transformers says it is, where there is one and only one."""
    return _end(model, "get_input_embeddings")


def base_of(module: nn.Module) -> nn.Module:
    """The layer that adapters of its weight stand around, or ``module`` itself."""
    return module.base_layer if isinstance(module, (LoraLayer, TrainableTokens)) else module


def embedding_weight(model: nn.Module) -> Tensor:
    """The input embedding's own [tokens, dim]: one that adapters train tokens of computes what its ``weight`` is."""
    return base_of(model.get_input_embeddings()).weight


def output_head(model: nn.Module) -> nn.Module | None:
    return _end(model, "get_output_embeddings")


def _end(model: nn.Module, getter: str) -> nn.Module | None:
    try:
        return getattr(model, getter)()
    except (AttributeError, NotImplementedError):  # none of transformers' models, or one without
        return None
