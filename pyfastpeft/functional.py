"""PEFT's functions on models with adapters: put in without a model around them, read out and filled."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .hub.files import check_named
from .hub.peft import read_tensors, without_duplicates
from .peft_model import IncompatibleKeys, PeftModel
from .status import INJECTED, adapters_of, injected
from .tuners.base import PeftConfig
from .tuners.tuner import Tuner


def inject_adapter_in_model(
    peft_config: PeftConfig, model: nn.Module, adapter_name: str = "default", low_cpu_mem_usage: bool = False
) -> nn.Module:
    """As :func:`get_peft_model`, or for a model that has such adapters :meth:`PeftModel.add_adapter`; the adapter
    becomes active, and what comes back is ``model`` itself.

    Its adapters' configurations are ``model.peft_config``, and :func:`get_peft_model_state_dict` and
    :func:`set_peft_model_state_dict` take it; as in PEFT the keys are then the modules' paths in it.

    Args:
        peft_config: its ``task_type`` brings the task's head into ``modules_to_save``, unlike in PEFT, where that is
            left to the model around this one; None leaves the head alone.
        low_cpu_mem_usage: accepted for PEFT's sake.

    Raises:
        TypeError, ValueError: as :func:`get_peft_model`; and a soft prompt, which is in no layer.
    """
    config = PeftConfig.from_peft(peft_config)
    if config.is_prompt_learning:
        raise ValueError(f"peft_config is a {type(config).__name__}, a soft prompt, which needs get_peft_model")
    held = injected(model)
    if held is None:
        held = vars(model)[INJECTED] = PeftModel(model, config, adapter_name)  # no submodule of its own base
        model.peft_config = held.peft_config
    else:
        held.add_adapter(adapter_name, config)
        held.set_adapter(adapter_name)
    return model


def _adapters_and_prefix(model: nn.Module) -> tuple[PeftModel, str]:
    """The model's adapters, and what their keys have in front that ``model`` lacks."""
    held = adapters_of(model)
    return held, "" if held is model else Tuner.PREFIX


def load_peft_weights(
    model_id: str | os.PathLike, device: str | torch.device = "cpu", **hf_hub_download_kwargs: Any
) -> dict[str, Tensor]:
    """The tensors of a PEFT folder or hub repository, for :func:`set_peft_model_state_dict`.

    Args:
        hf_hub_download_kwargs: ``hub`` of :meth:`PeftModel.from_pretrained`.
    """
    return {key: t.to(device) for key, t in read_tensors(model_id, **hf_hub_download_kwargs)[0].items()}


def get_peft_model_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: bool | str = "auto",
) -> dict[str, Tensor]:
    """An adapter's tensors under the keys of PEFT's files (without its name); they share the model's memory.

    Args:
        model: a :class:`PeftModel`, or one with injected adapters.
        state_dict: values to take instead of the model's own, under the names of its ``state_dict()``.
        unwrap_compiled: accepted for PEFT's sake: a compiled model's names are understood anyway.
        save_embedding_layers: as in :meth:`PeftModel.save_pretrained`.

    Raises:
        ValueError: there is no such adapter; or a parameter of it is missing in ``state_dict``, or of another shape.
    """
    held, prefix = _adapters_and_prefix(model)
    held.base_model.known([adapter_name])
    if isinstance(state_dict, Mapping):
        state_dict = {prefix + key: t for key, t in state_dict.items()}
    state, _ = held.adapter_state(adapter_name, save_embedding_layers, state_dict)
    return {key.removeprefix(prefix): t for key, t in state.items()}


def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: Mapping[str, Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
) -> IncompatibleKeys:
    """Fill an adapter from tensors under PEFT's keys.

    Args:
        model: as :func:`get_peft_model_state_dict`.
        ignore_mismatched_sizes: must be False: an adapter is filled as a whole.
        low_cpu_mem_usage: accepted for PEFT's sake.

    Returns:
        As PEFT's, ``missing_keys`` and ``unexpected_keys``, which are empty: such tensors are refused.

    Raises:
        TypeError: ``peft_model_state_dict`` is no mapping of names to tensors.
        ValueError: a key is missing or too many, or a shape differs; nothing has changed then.
    """
    if not isinstance(peft_model_state_dict, Mapping):
        kind = type(peft_model_state_dict).__name__
        raise TypeError(f"peft_model_state_dict is a {kind}; it must be a mapping of names to tensors")
    check_named(peft_model_state_dict, "peft_model_state_dict")
    if ignore_mismatched_sizes:
        raise ValueError("ignore_mismatched_sizes is True; it must be False: an adapter is filled as a whole or not")
    held, prefix = _adapters_and_prefix(model)
    held.base_model.known([adapter_name])
    tensors = {prefix + key: t for key, t in without_duplicates(peft_model_state_dict).items()}
    return held.install_adapter(adapter_name, held.peft_config[adapter_name], tensors, "peft_model_state_dict", True)


def hotswap_adapter(
    model: nn.Module,
    model_name_or_path: str | os.PathLike,
    adapter_name: str,
    torch_device: str | torch.device | None = None,
    **hub: Any,
) -> None:
    """:meth:`PeftModel.hotswap_adapter` as PEFT's function has it.

    Args:
        model: as :func:`get_peft_model_state_dict`.
        torch_device: accepted for PEFT's sake: an adapter is where its layers are.
    """
    adapters_of(model).hotswap_adapter(model_name_or_path, adapter_name, **hub)
