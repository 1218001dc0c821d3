"""Hot-swap of a LoRA adapter where the new one differs in ranks, modules or scaling."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..hub.files import check_kind
from ..nn.lora_layer import LoraLayer, scaling_of
from ..ops import copy_tensors
from .lora import LoraConfig, matches
from .modules import names_of

if TYPE_CHECKING:
    from .lora import LoraTuner


class Swap:
    """One hot-swap: everything is worked out and checked in the constructor, and done by :meth:`run`."""

    def __init__(
        self,
        tuner: LoraTuner,
        name: str,
        old: LoraConfig,
        config: LoraConfig | None,
        live: dict[str, Tensor],
        tensors: Mapping[str, Tensor],
        source: str,
    ) -> None:
        """Arguments as :meth:`Tuner.swap` has them."""
        self.model, self.bank, self.prefix, self.name = tuner.model, tuner.bank, tuner.PREFIX, name
        self.source = source
        self.new = new = old if config is None else config
        for what in ("use_dora", "lora_bias"):
            if getattr(old, what) != getattr(new, what):
                raise ValueError(
                    f"{what} is {getattr(new, what)} in {source}, {getattr(old, what)} in adapter {name!r}"
                )
        if old.changes_base or new.changes_base or old.bias != "none" or new.bias != "none":
            raise ValueError(
                f"adapter {name!r} cannot be replaced from {source}: init_lora_weights or bias ties one of the two to "
                "other base weights; use load_adapter"
            )
        tuner.check_same_tokens(name, old, new)
        tuner.check_parameters(name)
        self.tensors = tuner.without_duplicates(old, tensors)
        self.bank.check_unmerged(name)
        layers = tuner.layers(name)
        of_layers = {path: layer.tensors(name) for path, layer in layers.items()}
        keys = {f"{tuner.PREFIX}{path}.{suffix}" for path, held in of_layers.items() for suffix in held}
        saved = {k: t for k, t in live.items() if k not in keys}
        known = keys | saved.keys()
        extra = sorted(self.tensors.keys() - known)
        if extra:
            raise ValueError(f"{source} holds keys that adapter {name!r} does not have: {', '.join(extra[:5])}")
        self.pairs: list[tuple[Tensor, Tensor]] = []
        self.zeroed: list[Tensor] = []
        self.ranks: dict[str, tuple[int, float, float]] = {}
        for path, held in of_layers.items():
            self._plan_layer(path, layers[path], held)
        for key, tensor in saved.items():
            if key not in self.tensors:
                raise ValueError(f"{source} lacks the key {key}")
            self._pair(key, tensor)
        self.replans = any(
            layer.r[name] != r or layer.scaling[name] != scaling
            for layer, (r, _, scaling) in zip(layers.values(), self.ranks.values(), strict=True)
        )
        self.config = self._new_config(old) if config is None else new.in_place_of(old)

    def _plan_layer(self, path: str, layer: LoraLayer, held: dict[str, Tensor]) -> None:
        new, tensors, source = self.new, self.tensors, self.source
        keys = {suffix: f"{self.prefix}{path}.{suffix}" for suffix in held}
        missing = [key for key in keys.values() if key not in tensors]
        if missing:
            if len(missing) < len(keys):
                raise ValueError(f"{source} lacks the key {missing[0]}")
            if layer.merged and self.name in layer.lora_magnitude_vector:
                raise ValueError(
                    f"{layer.merged_adapters} are merged, and {source} lacks {path}, where the magnitude becomes that "
                    "of the base weights; call unmerge_adapter() first"
                )
            self.zeroed += [t for suffix, t in held.items() if suffix != "lora_magnitude_vector"]
            self.ranks[path] = (0, 0.0, layer.scaling[self.name])
            return
        a, b = layer.KEYS
        a_key = keys[a]
        r = tensors[a_key].shape[0] if tensors[a_key].dim() == 2 else 0
        capacity = layer.capacity(self.name)
        if r > capacity:
            raise ValueError(f"{source}: {a_key} has rank {r}; adapter {self.name!r} has room for rank {capacity}")
        if r < 1:
            raise ValueError(f"{source}: {a_key} has shape {tuple(tensors[a_key].shape)}; it must be [r, K], r >= 1")
        for suffix, key in keys.items():
            target = held[suffix]
            if r < capacity and suffix == a:
                self.zeroed.append(target[r:])
                target = target[:r]
            elif r < capacity and suffix == b:
                self.zeroed.append(target[:, r:])
                target = target[:, :r]
            self._pair(key, target)
        alpha = new.alpha_of(path)
        self.ranks[path] = (r, alpha, scaling_of(alpha, r, new.use_rslora))

    def _pair(self, key: str, target: Tensor) -> None:
        value = self.tensors[key]
        if value.shape != target.shape:
            shape = tuple(value.shape)
            raise ValueError(f"{self.source}: {key} has shape {shape}; it must be {tuple(target.shape)}")
        check_kind(key, value, target.is_floating_point(), self.source)
        self.pairs.append((target, value))

    def _new_config(self, old: LoraConfig) -> LoraConfig:
        """The old configuration with the ranks and the modules that the tensors have."""
        ranks = {path: r for path, (r, _, _) in self.ranks.items() if r}
        if all(r == old.rank_of(path) for path, r in ranks.items()):
            changed = replace(old)
        elif len(set(ranks.values())) == 1:
            changed = replace(old, r=next(iter(ranks.values())), rank_pattern={})
        else:
            changed = replace(old, rank_pattern={f"^{re.escape(path)}": r for path, r in ranks.items()})
        if ranks.keys() != {path for path in self.ranks if matches(old, path)}:
            names = names_of(ranks, self.model)
            changed = replace(
                changed, target_modules=names, exclude_modules=None, layers_to_transform=None, layers_pattern=None
            )
        return changed

    @torch.no_grad()
    def run(self) -> LoraConfig:
        """Do it, as often as it is called; returns the adapter's configuration from now on."""
        if self.zeroed:
            torch._foreach_zero_(self.zeroed)
        copy_tensors([t for t, _ in self.pairs], [v for _, v in self.pairs])
        for path, (r, alpha, scaling) in self.ranks.items():
            layer = self.bank.layers[path]
            layer.r[self.name], layer.lora_alpha[self.name] = r, alpha
            layer.set_scaling(self.name, scaling)
            if r == 0 and self.name in layer.lora_magnitude_vector:
                layer.lora_magnitude_vector[self.name].weight.copy_(layer.norm(self.name))
        if self.replans:
            self.bank.refresh()
        return self.config
