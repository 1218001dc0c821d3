"""LoRA of before transformers moved or renamed a model's modules: its paths are brought up to today's."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from .lora import LoraConfig, matches
from .modules import modules_of, names_of, standing


def at_todays_paths(
    config: LoraConfig | None, values: Mapping[str, Tensor], model: nn.Module, prefix: str
) -> tuple[LoraConfig | None, Mapping[str, Tensor]]:
    """``config`` and ``values`` under the paths that the modules of ``model`` have now.

    Both come back as they are where all layers that have LoRA in ``values`` are in ``model``, and where the renamings
    by which transformers reads older checkpoints do not lead from the layers of ``config`` to layers of ``model``.

    Args:
        config: resolved; or None, where there are tensors alone.
        values: their keys are ``prefix``, a path and a tensor's name.
    """
    parts = {key: key.removeprefix(prefix).partition(".lora_") for key in sorted(values)}
    here = [standing(model, path) is not None for path, lora, _ in parts.values() if lora]
    if all(here) or not isinstance(model, PreTrainedModel):
        return config, values
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]

    def today(name: str) -> str:
        for renaming in renamings:
            name, _ = renaming.rename_source_key(name)
        return name

    names = {key: today(f"{path}.weight" if lora else path) for key, (path, lora, _) in parts.items()}
    new = {path: names[key].removesuffix(".weight") for key, (path, lora, _) in parts.items() if lora}
    moved = {
        prefix + (f"{new[path]}{lora}{rest}" if lora else names[key]): values[key]
        for key, (path, lora, rest) in parts.items()
    }
    # What changes values on the way, as it merges layers or turns them for another rope, is more than a renaming.
    others = [t for t in transforms if not isinstance(t, WeightRenaming)]
    changed = any(t.rename_source_key(name)[1] is not None for t in others for name in names.values())
    if changed or len(moved) < len(values) or any(standing(model, path) is None for path in new.values()):
        return config, values
    if config is not None:
        if not all(matches(config, path) or matches(config, there) for path, there in new.items()):
            return config, values
        config = _moved(config, new, model, today)
    return config, moved


def _moved(config: LoraConfig, new: Mapping[str, str], model: nn.Module, today: Callable[[str], str]) -> LoraConfig:
    """``config`` for the same layers at other paths.

    Args:
        new: the path that ``config`` means → the one in ``model``.
        today: the same for the name of anything.
    """
    there = [path for path, _ in modules_of(model)]

    def name(of: str) -> str:
        return of if any(path.endswith(of) for path in there) else today(of)

    def at_new(pattern: dict[str, Any], value_of: Callable[[str], Any]) -> dict[str, Any]:
        if all(value_of(path) == value_of(at) for path, at in new.items()):
            return pattern
        return {f"^{re.escape(at)}": value_of(path) for path, at in new.items()}

    changes: dict[str, Any] = {
        "rank_pattern": at_new(config.rank_pattern, config.rank_of),
        "alpha_pattern": at_new(config.alpha_pattern, config.alpha_of),
    }
    if config.modules_to_save:
        changes["modules_to_save"] = [name(of) for of in config.modules_to_save]
    if isinstance(config.trainable_token_indices, dict):
        changes["trainable_token_indices"] = {name(of): at for of, at in config.trainable_token_indices.items()}
    named = isinstance(config.target_modules, list) and not isinstance(config.exclude_modules, str)
    if not named or not all(matches(config, at) for at in new.values()):
        # Expressions for whole paths may match other layers now: those that have tensors are meant.
        changes |= {"target_modules": names_of(new.values(), model), "exclude_modules": None}
        changes |= {"layers_to_transform": None, "layers_pattern": None}
    return replace(config, **changes)
