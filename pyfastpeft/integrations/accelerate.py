"""``accelerate``: a live model made fast, in place."""

from __future__ import annotations

import re

from torch import nn

from ..nn import Linear4bit
from ..nn.lora_layer import LoraLayer
from ..nn.weight_reads import needs_full_precision
from .attention import has_fast_attention, use_fast_attention
from .deferred_logits import defer_logits
from .forwards import remove, runs
from .fused_decoder import fuse_decoder
from .fused_layers import fuse_layers, use_hub_kernels
from .on_import import when_imported
from .trainer import keep_to_one_gpu


def accelerate(model: nn.Module) -> nn.Module:
    """Put :class:`Linear4bit` in place of every ``bitsandbytes.nn.Linear4bit`` in ``model``.

    Codes, scales and biases are kept, and so are the keys of the state dict; a layer used in several places stays one
    layer. One whose weight the module around it reads (:func:`needs_full_precision`), which bitsandbytes converts all
    the same, comes in full precision; it is saved so, and bitsandbytes does not open that. Under a peft LoRA layer it
    is the base layer that is replaced: forward, training and saving the adapter go on as before, but peft cannot merge
    into the new layer (load the adapter with ``pyfastpeft.PeftModel`` for that). Forward hooks of a replaced layer move
    to the new one. What is between the linear layers is fused as well (:mod:`.fused_layers`), in place of what
    transformers fetched for it, attention goes through this library's operator (:mod:`.attention`), in training, and in
    evaluation with ``labels``, the head's logits are computed when something reads them (:mod:`.deferred_logits`), each
    different token of a batch runs once on a CPU unless a cache holds others before it (:mod:`.each_token_once`), and
    in generation all layers run as one operator (:mod:`.fused_decoder`).

    Returns:
        ``model`` itself, unless it is such a layer.

    Raises:
        TypeError: ``model`` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; it must be a torch.nn.Module")
    if _is_bnb(model):
        return _replacement(model)
    take_over(model)
    fuse(model)
    return model


def take_over(model: nn.Module, device: str | None = None) -> list[tuple[nn.Module, str, nn.Module]]:
    """The first part of :func:`accelerate`; with ``device``, of the layers on devices of that type.

    Returns:
        Each layer that was replaced, after the module it was in and its name there.
    """
    replaced: dict[nn.Module, nn.Module] = {}
    taken = []
    for around, parent in list(model.named_modules()):
        ours = isinstance(parent, LoraLayer)
        for name, child in parent._modules.items():
            if child is not None and _is_bnb(child) and device in (None, child.weight.device.type):
                if child not in replaced:
                    path = re.sub(r"(\.base_layer)+$", "", f"{around}.{name}").removeprefix(".")
                    replaced[child] = _replacement(child, full=needs_full_precision(model, path))
                parent._modules[name] = replaced[child]
                taken.append((parent, name, child))
                if ours:
                    parent._changed()
    return taken


def fuse(model: nn.Module, attention: bool = True) -> None:
    """Everything that is faster here and not a linear layer's; what is there already stays.

    Without ``attention``, so does the one that the model has, which somebody may have chosen.
    """
    if attention:
        use_fast_attention(model)
    fuse_layers(model)
    defer_logits(model)
    fuse_decoder(model)


def unfuse(model: nn.Module) -> None:
    """Undo :func:`fuse`."""
    defer_logits(model, False)
    fuse_decoder(model, False)
    remove(model)
    use_hub_kernels(model, True)
    use_fast_attention(model, False)


def is_fused(model: nn.Module) -> bool:
    """Whether there is something for :func:`unfuse` to undo."""
    return has_fast_attention(model) or any(map(runs, model.modules()))


def _is_bnb(module: nn.Module) -> bool:
    # By name: bitsandbytes is not imported here, and where it is not installed there is nothing to find.
    return any(c.__name__ == "Linear4bit" and c.__module__.startswith("bitsandbytes.") for c in type(module).__mro__)


def _replacement(layer: nn.Module, full: bool = False) -> nn.Linear:
    new = Linear4bit.from_bnb(layer)
    new = new.to_linear() if full else new
    for name, held in vars(layer).items():
        if name.startswith(("_forward_hooks", "_forward_pre_hooks")):  # and which of them take keywords
            vars(new)[name] = held
    return new


when_imported("transformers.trainer", keep_to_one_gpu)
