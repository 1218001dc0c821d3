"""Bottleneck adapters (Houlsby et al. 2019; Pfeiffer et al. 2020): configuration and where they attach.

PEFT has no such method: the folders have its layout, with a ``peft_type`` of this library's own.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from ..adapters import AdapterBank
from ..nn.bottleneck import ACTIVATIONS, Bottleneck, BottleneckLayer
from ..nn.ends import base_of
from ..nn.lora import is_linear, matrix_shape
from ..nn.weight_reads import passes_by
from ..ops.checks import check_choice
from .adapted import adapter_dtype
from .base import PeftConfig, PeftType, names_or_pattern, register_method
from .modules import (
    check_called,
    is_named,
    modules_of,
    no_target,
    put,
    set_packing,
    standing,
    unmatched,
)
from .tuner import Tuner

_ATTENTION = (
    r"(.*\.)?\w*([Aa]ttention|attn)(\.output)?"
    r"\.(o_proj|out_proj|c_proj|proj|projection|projection_layer|dense|o|out_lin|Wo)"
)
_FEED_FORWARD = (
    r"(.*\.)?(mlp|ffn|feed_forward|DenseReluDense)\.(down_proj|c_proj|fc2|linear_fc2|wo|Wo|lin2|dense_4h_to_h|fc_out|w2)"
    r"|.*\.\d+\.(fc2|output\.dense)"
)
"""The paths of the projections that end a sublayer, in transformers' architectures."""
PLACEMENTS = {"houlsby": (_ATTENTION, _FEED_FORWARD), "pfeiffer": (_FEED_FORWARD,)}
"""``placement`` → the paths of the projections that adapters go after."""


@register_method
@dataclass(kw_only=True)
class BottleneckConfig(PeftConfig):
    """Configuration of bottleneck adapters.

    Attributes:
        placement: "houlsby": after every attention and every feed-forward sublayer; "pfeiffer": after the feed-forward
            ones alone. An adapter works on the sublayer's output, before that is added to the residual stream (and
            before a dropout that the model has there).
        reduction_factor: the bottleneck's size is the width of what passes it, divided by this.
        bottleneck_size: the size itself, in place of ``reduction_factor``.
        activation: "gelu", "relu", "silu" or "tanh".
        target_modules: the projections that end the sublayers: names (the last parts of a path) or one regular
            expression for whole paths. Default: those of ``placement``, in any of the usual architectures.
    """

    peft_type: ClassVar[PeftType] = PeftType.BOTTLENECK
    IN_PEFT: ClassVar[bool] = False

    placement: str = "houlsby"
    reduction_factor: float = 16
    bottleneck_size: int | None = None
    activation: str = "gelu"
    target_modules: list[str] | str | None = None

    @classmethod
    def tuner(cls) -> type[Tuner]:
        return BottleneckTuner

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("placement", self.placement, PLACEMENTS)
        factor = self.reduction_factor
        if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not 0 < factor < math.inf:
            raise ValueError(f"reduction_factor is {factor!r}; it must be a finite number above 0")
        check_choice("activation", self.activation, ACTIVATIONS)
        self.target_modules = names_or_pattern("target_modules", self.target_modules)

    def size_for(self, features: int) -> int:
        """Of the bottleneck after a projection with ``features`` outputs."""
        return self.bottleneck_size or max(1, int(features / self.reduction_factor))


def ends_of_sublayers(model: nn.Module, placement: str) -> list[str]:
    """Paths of the projections that end the sublayers of ``placement``.

    Raises:
        ValueError: the model's layers are not of a known form.
    """
    modules = [path for path, _ in modules_of(model)]
    found = [[path for path in modules if re.fullmatch(kind, path)] for kind in PLACEMENTS[placement]]
    numbered = [{re.match(r".*?\.\d+\.|", path)[0] for path in kind} for kind in found]
    if not all(found) or any(layers != numbered[0] for layers in numbered):
        raise ValueError(
            f"target_modules is None, and where the attention and feed-forward sublayers of a {type(model).__name__} "
            "end is not known; name the projections that end them"
        )
    layers_in = defaultdict(list)
    for path, module in modules_of(model):
        if is_linear(base_of(module)):
            layers_in[path.rpartition(".")[0]].append(path)
    # Some are no layers but have one, as in Gemma 4's encoders.
    ends = [layers_in[path][0] if len(layers_in[path]) == 1 else path for kind in found for path in kind]
    return sorted(path for path in ends if not passes_by(model, path))


class BottleneckTuner(Tuner):
    """Bottleneck adapters on one model.

    Their layer is the outermost at its path: LoRA at the same path is within it, whichever came first.
    """

    def __init__(self, model: nn.Module, bank: AdapterBank) -> None:
        super().__init__(model, bank)
        self._layers: dict[str, BottleneckLayer] = {}

    def resolved(self, config: BottleneckConfig) -> BottleneckConfig:
        if config.target_modules is None:
            config.target_modules = ends_of_sublayers(self.model, config.placement)
        return config

    def _targets(self, config: BottleneckConfig) -> dict[str, nn.Module]:
        """Path → the module an adapter goes after."""
        names = config.target_modules
        found = {path: base_of(module) for path, module in modules_of(self.model) if is_named(path, names)}
        if (missing := unmatched(names, found)) or not found:
            possible = [path for path, m in modules_of(self.model) if is_linear(base_of(m))]
            raise no_target(missing or names, self.model, possible)
        for path, module in found.items():
            if not is_linear(module):
                raise ValueError(
                    f"target_modules matches {path!r}, a {type(module).__name__}; a bottleneck goes after a Linear or "
                    "Conv1D"
                )
        check_called(self.model, found, "leave it out")
        return found

    def expected(self, config: BottleneckConfig, values: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
        shapes = {}
        for path, module in self._targets(config).items():
            features = matrix_shape(module)[0]
            size = config.size_for(features)
            own = {"down.weight": (size, features), "down.bias": (size,), "up.weight": (features, size)}
            shapes |= {f"{self.PREFIX}{path}.bottleneck.{k}": v for k, v in own.items()}
            shapes[f"{self.PREFIX}{path}.bottleneck.up.bias"] = (features,)
        return shapes

    def attach(
        self,
        name: str,
        config: BottleneckConfig,
        *,
        strict: bool,
        values: Mapping[str, Tensor] | None,
        autocast_adapter_dtype: bool,
    ) -> None:
        for path, module in self._targets(config).items():
            self._layer(path).bottleneck[name] = self._made(config, module, autocast_adapter_dtype)
        self.bank.forget()

    def _layer(self, path: str) -> BottleneckLayer:
        if path not in self._layers:
            inner = self.model.get_submodule(path)
            layer = BottleneckLayer(inner, self.bank).train(inner.training)
            self._layers[path] = self.bank.others[f"bottleneck:{path}"] = layer
            put(self.model, path, layer)
        return self._layers[path]

    def _made(self, config: BottleneckConfig, module: nn.Module, autocast_adapter_dtype: bool) -> Bottleneck:
        features = matrix_shape(module)[0]
        dtype = adapter_dtype(module, autocast_adapter_dtype)
        return Bottleneck(features, config.size_for(features), config.activation, module.weight.device, dtype)

    def _take_out(self, path: str) -> None:
        layer = self._layers.pop(path)
        if standing(self.model, path) is layer:
            self.model.set_submodule(path, layer.base_layer)
            set_packing(self.model, path)
        del self.bank.others[f"bottleneck:{path}"]

    def tensors(self, name: str, config: BottleneckConfig) -> dict[str, Tensor]:
        return {
            f"{self.PREFIX}{path}.bottleneck.{key}": parameter
            for path, layer in self._layers.items()
            if name in layer.bottleneck
            for key, parameter in layer.bottleneck[name].named_parameters()
        }

    def check_same_layout(self, name: str, old: Any, new: Any, live: dict, expected: dict) -> None:
        super().check_same_layout(name, old, new, live, expected)
        if not self.swaps_alike(name, old, new):
            raise ValueError(f"adapter {name!r} has the activation {old.activation!r}; delete it first")

    def swaps_alike(self, name: str, old: BottleneckConfig, new: BottleneckConfig | None) -> bool:
        return new is None or new.activation == old.activation

    def remove(self, name: str) -> None:
        for path, layer in list(self._layers.items()):
            if name in layer.bottleneck:
                del layer.bottleneck[name]
            if not layer.bottleneck:
                self._take_out(path)

    def unload(self) -> None:
        for path in list(self._layers):
            self._take_out(path)
