"""One LoRA adapter made of several: the weighted sum of their updates."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..nn.lora_layer import LoraLayer
from ..ops.checks import as_count
from .adapted import AdaptedModel
from .base import PeftConfig
from .lora import LoraConfig
from .modules import names_of
from .task_arithmetic import KINDS, check_pruning, summed
from .tuner import Tuner

_SVD = {"svd": "linear"} | {f"{kind}_svd": kind for kind in KINDS if kind != "linear"}
"""``combination_type`` → how the updates are summed before they are decomposed."""


def combine(
    model: AdaptedModel,
    names: tuple[str, ...],
    weights: Iterable[float],
    combination_type: str,
    svd_rank: int | None,
    density: float | None,
    majority_sign_method: str,
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """(configuration, tensors under PEFT's keys) of Σ weight · scaling · B A over ``names``; its own scaling is 1.

    Raises:
        ValueError: as :meth:`PeftModel.add_weighted_adapter`.
    """
    configs = {name: model.configs[name] for name in names}
    svd_rank = None if svd_rank is None else as_count("svd_rank", svd_rank)
    weights = _as_weights(weights)
    _check(configs, names, weights, combination_type, svd_rank)
    kind = _SVD.get(combination_type, "linear" if combination_type == "cat" else combination_type)
    check_pruning(combination_type, kind, density, majority_sign_method)
    if len(names) == 1:
        kind, density = "linear", None  # as in PEFT: there is nothing that others could disturb
    layers = {p: layer for p, layer in model.bank.layers.items() if any(n in layer.r for n in names)}
    held = {p: [(n, w) for n, w in zip(names, weights, strict=True) if n in layer.r] for p, layer in layers.items()}
    sizes = {p: [layers[p].capacity(n) for n, _ in own] for p, own in held.items()}
    if combination_type in KINDS and any(len(set(ranks)) > 1 for ranks in sizes.values()):
        raise ValueError(
            f"combination_type is {combination_type!r}, but the ranks of {list(names)} differ; use 'cat' or an svd"
        )
    rank = svd_rank or max(sum(s) if combination_type == "cat" else max(s) for s in sizes.values())
    config = replace(
        configs[names[0]],
        r=rank,
        lora_alpha=rank,
        use_rslora=False,
        rank_pattern={},
        alpha_pattern={},
        target_modules=names_of(layers, model.model),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        init_lora_weights=True,
        inference_mode=all(config.inference_mode for config in configs.values()),
        bias="none",
    )
    tensors = {}
    add = partial(summed, kind, density=density, majority_sign_method=majority_sign_method)
    for path, layer in layers.items():
        if combination_type == "cat":
            a, b = _cat(layer, held[path])
        else:
            a, b = _svd(layer, held[path], add, rank) if combination_type in _SVD else _each(layer, held[path], add)
        a_key, b_key = (f"{Tuner.PREFIX}{path}.{key}" for key in layer.KEYS)
        tensors[a_key], tensors[b_key] = F.pad(a, (0, 0, 0, rank - len(a))), F.pad(b, (0, rank - len(a)))
    return config, tensors


def _as_weights(weights: Iterable[float]) -> list[float]:
    try:
        numbers = [float(w) for w in weights]
    except (TypeError, ValueError):
        raise ValueError(f"weights is {weights!r}; it must be a list of numbers") from None
    if not all(map(math.isfinite, numbers)):
        raise ValueError(f"weights is {weights!r}; each must be finite")
    return numbers


def _check(
    configs: Mapping[str, PeftConfig],
    names: tuple[str, ...],
    weights: Sequence[float],
    combination_type: str,
    svd_rank: int | None,
) -> None:
    """Arguments as :func:`combine` has them, and the adapters' configurations."""
    if not names or len(names) != len(weights):
        raise ValueError(
            f"adapters has {len(names)} names and weights {len(weights)}; there must be as many, at least one"
        )
    if combination_type not in ("cat", *_SVD, *KINDS):
        known = ", ".join(map(repr, ("cat", *_SVD, *KINDS)))
        raise ValueError(f"combination_type is {combination_type!r}; it must be one of {known}")
    for name, config in configs.items():
        if not isinstance(config, LoraConfig):
            raise ValueError(f"adapter {name!r} is {config.peft_type}; only LoRA adapters can be combined")
        for what in ("use_dora", "lora_bias", "modules_to_save", "trainable_token_indices"):
            if getattr(config, what):
                raise ValueError(f"adapter {name!r} has {what}, which cannot be combined")
        if config.changes_base or config.bias != "none":
            raise ValueError(
                f"adapter {name!r} has init_lora_weights {config.init_lora_weights!r} and bias {config.bias!r}, which "
                "tie it to base weights of its own; a combination would be saved without these"
            )
    if svd_rank is not None and combination_type not in _SVD:
        raise ValueError(f"svd_rank is {svd_rank!r}; it goes with {', '.join(_SVD)} only")


Held = list[tuple[str, float]]
"""The adapters of one layer and their weights."""


@torch.no_grad()
def _cat(layer: LoraLayer, held: Held) -> tuple[Tensor, Tensor]:
    pairs = [(*layer.factors(n), w * layer.scaling[n]) for n, w in held]
    return torch.cat([a * factor for a, _, factor in pairs]), torch.cat([b for _, b, _ in pairs], dim=1)


@torch.no_grad()
def _svd(layer: LoraLayer, held: Held, add: Callable[..., Tensor], rank: int) -> tuple[Tensor, Tensor]:
    # As the base layer stores them: where elements are left out by chance, in PEFT's order.
    total = add([layer.get_delta_weight(n) for n, _ in held], [w for _, w in held])
    u, s, vh = torch.linalg.svd(layer.as_stored(total), full_matrices=False)
    return vh[:rank], u[:, :rank] * s[:rank]


@torch.no_grad()
def _each(layer: LoraLayer, held: Held, add: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
    """A's and B's by themselves."""
    factors = [w * layer.scaling[n] for n, w in held]
    a, b = zip(*(layer.factors(n) for n, _ in held), strict=True)
    roots = [math.sqrt(abs(f)) for f in factors]
    return add(a, [math.copysign(r, f) for r, f in zip(roots, factors, strict=True)]), add(b, roots)
