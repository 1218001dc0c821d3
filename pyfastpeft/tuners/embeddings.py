"""The base model's embeddings, which an adapter's file may hold beside the adapter."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from torch import Tensor, nn

from ..nn.linear4bit import Linear4bit
from .base import PeftConfig
from .modules import ends_of, find_saved, parameters_of, plain_modules_of

_INSIDE = ("", ".base_layer", ".original_module", ".token_adapter.base_layer")
"""What PEFT may have between the path of a module and its parameters; which, depends on all adapters in the model."""


def own_embeddings(
    model: nn.Module, config: PeftConfig, prefix: str, inside: Callable[[str], str] = lambda _: ""
) -> dict[str, Tensor]:
    """Key → tensor of input embedding and output head, as PEFT stores them beside this adapter if it is the only one.

    Args:
        prefix: what stands before a module's path.
        inside: what PEFT has between the path of a module and its parameters.
    """
    saved = find_saved(config, model)
    return {
        f"{prefix}{path}{'.original_module' if path in saved else inside(path)}.{key}": t
        for path, parameters in _ends(model)
        for key, t in parameters.items()
    }


def base_embeddings(model: nn.Module, prefix: str) -> dict[str, Tensor]:
    """The same under every key that a file of PEFT's may hold them by."""
    return {
        f"{prefix}{path}{inside}.{key}": t
        for path, parameters in _ends(model)
        for inside in _INSIDE
        for key, t in parameters.items()
    }


def _ends(model: nn.Module) -> Iterator[tuple[str, dict[str, nn.Parameter]]]:
    ends = ends_of(model)
    for path, plain, around in plain_modules_of(model):
        ours = any(end is plain or end is around for end in ends)
        if ours and isinstance(plain, (nn.Linear, nn.Embedding)) and not isinstance(plain, Linear4bit):
            yield path, parameters_of(plain, around)


def to_be_saved(model: nn.Module, save: bool | str) -> bool:
    """Whether ``save_embedding_layers`` asks for all embeddings: by True, or by "auto" where they were resized."""
    if save != "auto" or not _resized(model):
        return save is True
    warnings.warn("the embeddings were resized, so they are written beside the adapter", stacklevel=3)
    return True


def _resized(model: nn.Module) -> bool:
    """Whether the vocabulary has another size than in the folder or GGUF file that the base model came from."""
    base = getattr(model, "name_or_path", None)
    size = getattr(getattr(model, "config", None), "vocab_size", None)
    if not base or size is None:
        return False
    from transformers import AutoConfig

    from ..hub.gguf import GgufFile

    try:
        if Path(base).is_file():
            return GgufFile(base).shape("token_embd.weight")[0] != size
        return AutoConfig.from_pretrained(base, local_files_only=True).vocab_size != size
    except (AttributeError, KeyError, OSError, ValueError):  # not there, or none of transformers' own
        return False
