"""Rotary embeddings of GGUF files, as transformers' configs say them: of these its own reader leaves out what scales
them and, for some architectures, their base and how many dimensions turn.

What the keys and tensors mean is what llama.cpp makes of them.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from transformers import PreTrainedConfig

from ..hub.gguf import GgufFile

FACTORS = "rope_freqs.weight"
"""The tensor that divides each frequency by a number of its own."""
_LONGROPE = ("rope_factors_long.weight", "rope_factors_short.weight")
_TYPES = ("linear", "yarn", "none")
# Of the keys under `rope.scaling.`, those that YaRN reads and nothing else does; and where the others change nothing.
_OF_YARN = ("original_context_length", "yarn_beta_fast", "yarn_beta_slow")
_NEUTRAL = {"attn_factor": 1, "yarn_attn_factor": 1, "yarn_log_multiplier": 0, "alpha": 0}
_NEVER = 1e20  # a frequency divided by so much turns nothing


def take_over_rope(file: GgufFile, config: PreTrainedConfig) -> None:
    """Let ``config`` compute and scale its rotary embeddings as the file says.

    Raises:
        ValueError: the file says what no config of transformers computes; the tensor or key is named.
    """
    for name in _LONGROPE:
        if name in file.names:
            raise ValueError(f"its tensor {name} scales rotary embeddings in a way that is not supported")
    said = {k.removeprefix("rope."): v for k, v in file.metadata.items() if k.startswith("rope.")}
    if _parameters(config):
        _set_bases(said, config)
        _set_dimensions(said, config)
    by_keys, by_factors = _said_by_keys(said, config), _said_by_factors(file, config)
    if by_keys and by_factors:
        raise ValueError(f"its rotary embeddings are scaled twice, by rope.scaling.factor and by its tensor {FACTORS}")
    if scaling := by_keys or by_factors:
        parameters = _parameters(config)
        if "rope_theta" not in parameters:
            raise ValueError(f"its metadata scales rotary embeddings, of which a {type(config).__name__} has none")
        kept = {key: parameters[key] for key in ("rope_theta", "partial_rotary_factor") if key in parameters}
        parameters.clear()
        parameters.update(kept | scaling)


def _parameters(config: PreTrainedConfig) -> dict[str, Any]:
    """The ``rope_parameters`` that scaling is of: layers with a window have none where they have their own."""
    parameters = getattr(config, "rope_parameters", None) or {}
    return parameters.get("full_attention", parameters)


def _set_bases(said: dict[str, Any], config: PreTrainedConfig) -> None:
    with_window = config.rope_parameters.get("sliding_attention")
    for key, parameters in (("freq_base", _parameters(config)), ("freq_base_swa", with_window)):
        base = said.get(key)
        if base is None:
            continue
        if not isinstance(base, (int, float)) or not 0 < base < math.inf:
            raise ValueError(f"its rope.{key} is {base!r}; it must be a positive number")
        if parameters is not None:
            parameters["rope_theta"] = base
        elif base != said.get("freq_base"):
            raise ValueError(f"its rope.{key} is {base!r}; a {type(config).__name__} has one base for all layers")


def _set_dimensions(said: dict[str, Any], config: PreTrainedConfig) -> None:
    parameters, turning = _parameters(config), said.get("dimension_count")
    if turning is None or parameters.get("rope_type") == "proportional":  # Gemma 4: its tensor says which turn
        return
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if turning == size:
        factor = 1.0
    elif "partial_rotary_factor" in parameters and turning in range(2, size, 2):
        factor = turning / size
    else:
        raise ValueError(f"its rope.dimension_count is {turning!r}; a {type(config).__name__} turns {size} dimensions")
    if "partial_rotary_factor" in parameters:
        parameters["partial_rotary_factor"] = factor


def _said_by_keys(rope: dict[str, Any], config: PreTrainedConfig) -> dict[str, Any]:
    said = {k.removeprefix("scaling."): v for k, v in rope.items() if k.startswith("scaling.")}
    said.pop("finetuned", None)  # a remark
    kind = said.pop("type", "linear")
    if kind not in _TYPES:
        raise ValueError(f"its rope.scaling.type is {kind!r}; it must be one of {', '.join(map(repr, _TYPES))}")
    factor = float(said.pop("factor", 0) or rope.get("scale_linear", 0) or 1)
    if not (factor > 0 and math.isfinite(factor)):
        raise ValueError(f"its rope.scaling.factor is {factor}; it must be positive")
    neutral = _NEUTRAL | {"yarn_ext_factor": int(kind == "yarn")}
    for key, value in said.items():
        if key not in _OF_YARN and value != neutral.get(key):
            raise ValueError(f"its rope.scaling.{key} is {value!r}, which is not supported with type {kind!r}")
    if kind == "none" or factor == 1:
        return {}
    scaling = {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        original = said.get("original_context_length") or config.max_position_embeddings
        scaling |= {"original_max_position_embeddings": int(original)}
        scaling |= {k: float(said[f"yarn_{k}"]) for k in ("beta_fast", "beta_slow") if f"yarn_{k}" in said}
    return scaling


def _said_by_factors(file: GgufFile, config: PreTrainedConfig) -> dict[str, Any]:
    """Llama 3's scaling is all that such factors are known for; its settings are found again in them."""
    if FACTORS not in file.names:
        return {}
    factors = file.dequantized(FACTORS).reshape(-1).astype(np.float64)
    if (factors == 1).all():
        return {}
    parameters = _parameters(config)
    if parameters.get("rope_type") == "proportional":  # Gemma 4: the config says so too
        turning = int(parameters.get("partial_rotary_factor", 1) * len(factors))
        if (factors[:turning] == 1).all() and (factors[turning:] >= _NEVER).all():
            return {}
    theta = parameters.get("rope_theta")
    low, high, original = 1.0, 4.0, 8192
    factor = float(factors.max())
    if theta is not None and math.isfinite(factor):
        frequencies = float(theta) ** -(np.arange(len(factors)) / len(factors))
        smooth = np.clip((original * frequencies / (2 * math.pi) - low) / (high - low), 0, 1)
        if np.allclose(factors, 1 / ((1 - smooth) / factor + smooth), rtol=1e-5, atol=0):
            scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high}
            return scaling | {"original_max_position_embeddings": original}
    raise ValueError(
        f"its tensor {FACTORS} scales rotary embeddings by {factors.min():g} to {factor:g}, but not as Llama 3 does; "
        "nothing else is supported"
    )
