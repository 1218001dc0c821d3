"""What a model leaves out, and gets instead, while a soft prompt runs through it by itself."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...nn.hooks import sharded


class _Together(torch.autograd.Function):
    """Tensors as they are; those that nothing reads get gradients of zeros as soon as one of them gets any."""

    @staticmethod
    def forward(ctx, *tensors):  # noqa: ANN001
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    def backward(ctx, *grads):  # noqa: ANN001
        return grads


def tied(tensors: Sequence[Tensor], output: Tensor, module: nn.Module) -> list[Tensor]:
    """``tensors``, whose gradients reach ``output`` as well where FSDP brings the parameters of ``module``: it brings
    them for the backward pass when the module's output gets a gradient."""
    return list(_Together.apply(output, *tensors)[1:]) if sharded(module) else list(tensors)


@contextmanager
def fed(blocks: Sequence[nn.Module], inputs: Sequence[Tensor]) -> Iterator[None]:
    """Let each of ``blocks`` get its ``inputs`` [length, hidden] in place of what comes to it; none: leave them alone.

    In this thread: others may be running the model.
    """
    thread = threading.get_ident()

    def exchanged(x: Tensor, module: nn.Module, args: tuple) -> tuple | None:
        return (*tied([x.unsqueeze(0)], args[0], module), *args[1:]) if threading.get_ident() == thread else None

    with ExitStack() as hooks:
        for block, x in zip(blocks, inputs, strict=True) if inputs else ():
            hooks.enter_context(block.register_forward_pre_hook(partial(exchanged, x)))
        yield


@contextmanager
def reaching(rotaries: Sequence[nn.Module], reach: int) -> Iterator[None]:
    """Let ``rotaries`` turn as in a sequence of ``reach`` positions, in this thread; 0: as they do."""
    thread = threading.get_ident()

    def lengthen(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        if threading.get_ident() != thread:
            return None
        kwargs = dict(zip(("x", "position_ids", "layer_type"), args, strict=False)) | kwargs
        return (), kwargs | {"position_ids": F.pad(kwargs["position_ids"], (0, 1), value=reach - 1)}

    def cut(module: nn.Module, args: tuple, output: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        return tuple(t[:, :-1] for t in output) if threading.get_ident() == thread else None

    with ExitStack() as hooks:
        for module in rotaries if reach else ():
            hooks.enter_context(module.register_forward_pre_hook(lengthen, with_kwargs=True))
            hooks.enter_context(module.register_forward_hook(cut))
        yield


@contextmanager
def without_checkpointing(checkpointing: list[nn.Module]) -> Iterator[None]:
    on = [m for m in checkpointing if m.gradient_checkpointing]
    for module in on:
        module.gradient_checkpointing = False
    try:
        yield
    finally:
        for module in on:
            module.gradient_checkpointing = True


@contextmanager
def all_layers(config: Any, count: int) -> Iterator[None]:
    """Let a model run all its ``count`` layers, also while a generation exits early."""
    asked, config.num_hidden_layers = config.num_hidden_layers, count
    try:
        yield
    finally:
        config.num_hidden_layers = asked
