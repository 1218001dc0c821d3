"""One LoRA adapter made of several: the weighted sum of their updates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..nn.lora import LoraLayer
from .adapted import AdaptedModel
from .base import Tuner
from .lora import LoraConfig


def combine(
    model: AdaptedModel, names: tuple[str, ...], weights: Sequence[float], combination_type: str, svd_rank: int | None
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """(configuration, tensors under PEFT's keys) of Σ weight · scaling · B A over ``names``; its own scaling is 1.

    Raises:
        ValueError: as :meth:`PeftModel.add_weighted_adapter`.
    """
    if not names or len(names) != len(weights):
        raise ValueError(
            f"adapters has {len(names)} names and weights {len(weights)}; there must be as many, at least one"
        )
    if combination_type not in ("cat", "svd", "linear"):
        raise ValueError(f"combination_type is {combination_type!r}; it must be 'cat', 'svd' or 'linear'")
    configs = [model.configs[n] for n in names]
    for config, name in zip(configs, names, strict=True):
        if not isinstance(config, LoraConfig):
            raise ValueError(f"adapter {name!r} is {config.peft_type}; only LoRA adapters can be combined")
        for what in ("use_dora", "lora_bias", "modules_to_save", "trainable_token_indices"):
            if getattr(config, what):
                raise ValueError(f"adapter {name!r} has {what}, which cannot be combined")
    if svd_rank is not None and (combination_type != "svd" or svd_rank < 1):
        raise ValueError(f"svd_rank is {svd_rank!r}; it must be at least 1, and goes with combination_type 'svd' only")
    layers = {p: layer for p, layer in model.bank.layers.items() if any(n in layer.r for n in names)}
    held = {p: [(n, w) for n, w in zip(names, weights, strict=True) if n in layer.r] for p, layer in layers.items()}
    sizes = {p: [layers[p].capacity(n) for n, _ in own] for p, own in held.items()}
    if combination_type == "linear" and any(len(set(ranks)) > 1 for ranks in sizes.values()):
        raise ValueError(f"combination_type is 'linear', but the ranks of {list(names)} differ; use 'cat' or 'svd'")
    rank = svd_rank or max(sum(s) if combination_type == "cat" else max(s) for s in sizes.values())
    config = replace(
        configs[0],
        r=rank,
        lora_alpha=rank,
        use_rslora=False,
        rank_pattern={},
        alpha_pattern={},
        target_modules=sorted(layers),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        init_lora_weights=True,
        inference_mode=all(config.inference_mode for config in configs),
        bias="none",
    )
    tensors = {}
    make = {"cat": _cat, "svd": _svd, "linear": _linear}[combination_type]
    for path, layer in layers.items():
        a, b = make(layer, held[path], rank)
        a_key, b_key = (f"{Tuner.PREFIX}{path}.{key}" for key in layer.KEYS)
        tensors[a_key], tensors[b_key] = F.pad(a, (0, 0, 0, rank - len(a))), F.pad(b, (0, rank - len(a)))
    return config, tensors


@torch.no_grad()
def _cat(layer: LoraLayer, held: list[tuple[str, float]], rank: int) -> tuple[Tensor, Tensor]:
    pairs = [(*layer.factors(n), w * layer.scaling[n]) for n, w in held]
    return torch.cat([a * factor for a, _, factor in pairs]), torch.cat([b for _, b, _ in pairs], dim=1)


@torch.no_grad()
def _svd(layer: LoraLayer, held: list[tuple[str, float]], rank: int) -> tuple[Tensor, Tensor]:
    u, s, vh = torch.linalg.svd(sum(w * layer.delta(n) for n, w in held), full_matrices=False)
    return vh[:rank], u[:, :rank] * s[:rank]


@torch.no_grad()
def _linear(layer: LoraLayer, held: list[tuple[str, float]], rank: int) -> tuple[Tensor, Tensor]:
    factors = [(n, w * layer.scaling[n]) for n, w in held]
    a = sum(layer.factors(n)[0] * math.copysign(math.sqrt(abs(f)), f) for n, f in factors)
    return a, sum(layer.factors(n)[1] * math.sqrt(abs(f)) for n, f in factors)
