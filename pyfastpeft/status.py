"""What the adapters of a model are doing, layer by layer and as a whole, in PEFT's terms."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from .nn.bottleneck import BottleneckLayer
from .nn.linear4bit import Linear4bit
from .nn.lora_layer import LoraLayer
from .nn.modules_to_save import ModulesToSave
from .nn.trainable_tokens import TrainableTokens
from .tuners.adapted import AdaptedModel
from .tuners.modules import WRAPPERS

if TYPE_CHECKING:
    from .peft_model import PeftModel

Irregular = Literal["irregular"]
"""In place of a value that is not the same everywhere."""

INJECTED = "_injected_adapters"
"""Where a model has what :func:`inject_adapter_in_model` put into it, a :class:`PeftModel` around itself."""


@dataclass
class TunerLayerStatus:
    """One layer with adapters; dictionaries are by adapter."""

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None


@dataclass
class TunerModelStatus:
    """A model with adapters; dictionaries are by adapter."""

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str] | Irregular
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | Irregular | None


def injected(model: Any) -> PeftModel | None:
    """What was injected into ``model``, if anything."""
    return vars(model).get(INJECTED) if isinstance(model, nn.Module) else None


def adapters_of(model: nn.Module) -> PeftModel:
    """``model`` itself, or what was injected into it.

    Raises:
        TypeError: it has no adapters.
    """
    held = injected(model)
    held = model if held is None else held
    if not isinstance(getattr(held, "base_model", None), AdaptedModel):
        raise TypeError(f"model is a {type(model).__name__}; it must be a PeftModel, or have adapters injected")
    return held


def get_layer_status(model: nn.Module) -> list[TunerLayerStatus]:
    """The status of every layer with adapters; soft prompts, which are in no layer, have none.

    Args:
        model: a :class:`PeftModel`, or one with injected adapters, whose layers are named as it names them.

    Raises:
        TypeError: it has no adapters.
    """
    root = model.base_model if adapters_of(model) is model else model
    return [_status(name, m) for name, m in root.named_modules() if isinstance(m, WRAPPERS)]


def _status(name: str, layer: LoraLayer | BottleneckLayer | ModulesToSave | TrainableTokens) -> TunerLayerStatus:
    base, kind, merged = getattr(layer, "base_layer", None), type(layer).__name__, []
    if isinstance(layer, LoraLayer):
        kind, merged = f"lora.{type(base).__name__}", list(layer.merged_adapters)
        parameters = {n: list(layer.tensors(n).values()) for n in layer.r}
    elif isinstance(layer, TrainableTokens):
        merged, parameters = list(layer.rows.merged_adapters), {n: [p] for n, p in layer.rows.values.items()}
    else:
        adapters = layer.bottleneck if isinstance(layer, BottleneckLayer) else layer.modules_to_save
        parameters = {n: list(adapter.parameters()) for n, adapter in adapters.items()}
    return TunerLayerStatus(
        name=name,
        module_type=kind,
        enabled=layer.bank.enabled,
        active_adapters=list(layer.bank.chosen),
        merged_adapters=merged,
        requires_grad={n: _same(p.requires_grad for p in ps) for n, ps in parameters.items()},
        available_adapters=sorted(parameters),
        devices={n: sorted({p.device.type for p in ps}) for n, ps in parameters.items()},
        quantization_backend=f"pyfastpeft {base.quant_type}" if isinstance(base, Linear4bit) else None,
    )


def _same(values: Iterable[Any]) -> Any:
    """The one value that ``values`` are, or "irregular"; None without any."""
    found = set(values) or {None}
    return found.pop() if len(found) == 1 else "irregular"


def get_model_status(model: nn.Module) -> TunerModelStatus:
    """The status of ``model``: what its layers have in common. Argument and error as in :func:`get_layer_status`."""
    layers, model = get_layer_status(model), adapters_of(model)
    bank = model.base_model.bank
    trainable, total = model.get_nb_trainable_parameters()
    merged = {n for layer in layers for n in layer.merged_adapters}
    partly = any(merged & set(layer.available_adapters) - set(layer.merged_adapters) for layer in layers)
    names = sorted({n for layer in layers for n in layer.available_adapters})
    return TunerModelStatus(
        base_model_type=type(model.get_base_model()).__name__,
        adapter_model_type=type(model.base_model).__name__,
        peft_types={n: str(config.peft_type) for n, config in model.peft_config.items()},
        trainable_params=trainable,
        total_params=total,
        num_adapter_layers=len(layers),
        enabled=bank.enabled,
        active_adapters=list(bank.chosen),
        merged_adapters="irregular" if partly else sorted(merged),
        requires_grad={n: _same(s.requires_grad[n] for s in layers if n in s.requires_grad) for n in names},
        available_adapters=names,
        devices={n: sorted({d for s in layers for d in s.devices.get(n, ())}) for n in names},
        quantization_backend=_same(layer.quantization_backend for layer in layers),
    )
