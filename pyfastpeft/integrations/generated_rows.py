"""Rows that choose their adapters, where a model's ``generate`` runs other batches than it is given: under guidance all
rows with their prompts and all without as one (a text model, and VibeVoice, runs those without by themselves), of long
sounds, or between their timestamps, those rows that are not done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import GenerationConfig

from ..adapters import Rows

_GUIDED = (
    *("DiaForConditionalGeneration", "MusicgenForCausalLM", "MusicgenForConditionalGeneration"),
    *("MusicgenMelodyForCausalLM", "MusicgenMelodyForConditionalGeneration"),
)


def check_generated(model: nn.Module, rows: Rows, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Check that ``model.generate(*args, **kwargs)`` finds its ``rows`` in each batch that it runs.

    Raises:
        ValueError: rows choose different adapters, and in some batch each stands twice or some are missing, so that a
            layer takes them for others.
    """
    does = "runs all rows once more, without their prompts, in the same batch"
    said = _asks_for_guidance(model, args, kwargs)
    if said is None:
        does, said = "runs some of the rows by themselves", _runs_some(model, args, kwargs)
    if said is not None and (differing := rows.differing(rows.names)):
        raise ValueError(
            f"adapter_names has {differing} for some rows and not for others, and {said}; a {type(model).__name__} "
            f"then {does}, so all must use the same adapters"
        )


def _runs_some(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
    """Which argument or setting lets Whisper go on with the rows that have more to say, or try some again, and what it
    is; None: none does."""
    if type(model).__name__ != "WhisperForConditionalGeneration":
        return None
    sounds, window = args[0] if args else kwargs.get("input_features"), 2 * model.config.max_source_positions
    if isinstance(sounds, Tensor) and sounds.shape[-1] > window:
        return f"input_features has {sounds.shape[-1]} frames, and a window {window}"
    temperature = kwargs.get("temperature")
    if isinstance(temperature, (list, tuple)) and len(temperature) > 1:
        return f"temperature is {temperature}"
    return "return_timestamps is True" if _setting("return_timestamps", model, args, kwargs) else None


def _asks_for_guidance(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
    """Which argument or setting does so, and what it is; None: none does."""
    name = type(model).__name__
    if name == "JanusForConditionalGeneration" and kwargs.get("generation_mode") == "image":
        return "generation_mode is 'image'"
    if name not in _GUIDED:
        return None
    scale = _setting("guidance_scale", model, args, kwargs) or 1
    return f"guidance_scale is {scale}" if scale > 1 else None


def _setting(name: str, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What a generation goes by: an argument, else of the configuration that is given, else of the model's."""
    given = kwargs.get("generation_config") or next((a for a in args if isinstance(a, GenerationConfig)), None)
    held = [getattr(config, name, None) for config in (given, model.generation_config)]
    return next((value for value in (kwargs.get(name), *held) if value is not None), None)
