"""Rows that choose their adapters, where a model generates with guidance and runs all rows with their prompts and all
without as one batch. (A text model, and VibeVoice, runs those without by themselves.)"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from transformers import GenerationConfig

from ..adapters import Rows

_GUIDED = (
    *("DiaForConditionalGeneration", "MusicgenForCausalLM", "MusicgenForConditionalGeneration"),
    *("MusicgenMelodyForCausalLM", "MusicgenMelodyForConditionalGeneration"),
)


def check_guided(model: nn.Module, rows: Rows, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Check that ``model.generate(*args, **kwargs)`` finds its ``rows`` in each batch that it runs.

    Raises:
        ValueError: rows choose different adapters, and each stands in the batch twice, which a layer takes for two
            consecutive ones.
    """
    said = _asks_for_guidance(model, args, kwargs)
    if said is not None and (differing := rows.differing(rows.names)):
        raise ValueError(
            f"adapter_names has {differing} for some rows and not for others, and {said}; a {type(model).__name__} "
            "then runs all rows once more, without their prompts, in the same batch, so all must use the same adapters"
        )


def _asks_for_guidance(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
    """Which argument or setting does so, and what it is; None: none does."""
    name = type(model).__name__
    if name == "JanusForConditionalGeneration" and kwargs.get("generation_mode") == "image":
        return "generation_mode is 'image'"
    if name not in _GUIDED:
        return None
    given = kwargs.get("generation_config") or next((a for a in args if isinstance(a, GenerationConfig)), None)
    held = [getattr(config, "guidance_scale", None) for config in (given, model.generation_config)]
    scale = next((scale for scale in (kwargs.get("guidance_scale"), *held) if scale is not None), 1)
    return f"guidance_scale is {scale}" if scale > 1 else None
