"""A model's ends: what transformers says its input embedding and its output head are."""

from __future__ import annotations

from torch import nn


def input_embedding(model: nn.Module) -> nn.Module | None:
    """What transformers says it is, where there is one and only one."""
    return _end(model, "get_input_embeddings")


def output_head(model: nn.Module) -> nn.Module | None:
    return _end(model, "get_output_embeddings")


def _end(model: nn.Module, getter: str) -> nn.Module | None:
    try:
        return getattr(model, getter)()
    except (AttributeError, NotImplementedError):  # none of transformers' models, or one without
        return None
