"""The base model's embeddings, which an adapter's file may hold beside the adapter."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

from torch import Tensor, nn

from ..nn.linear4bit import Linear4bit
from ..nn.modules_to_save import ModulesToSave
from .base import PeftConfig
from .modules import base_of, ends_of, find_saved, modules_of


def base_embeddings(
    model: nn.Module, config: PeftConfig, prefix: str, inside: Callable[[str, nn.Module], str] = lambda *_: ""
) -> dict[str, Tensor]:
    """Key → tensor of input embedding and output head, under the keys that a file of PEFT's may hold them by.

    Args:
        prefix: what stands before a module's path.
        inside: what PEFT has between the path of a module and its parameters.
    """
    held, ends, saved = {}, ends_of(model), find_saved(config, model)
    for path, module in modules_of(model):
        middle, base = inside(path, module), base_of(module)
        if isinstance(module, ModulesToSave) or path in saved:
            middle, base = ".original_module", getattr(module, "original_module", base)
        ours = any(module is end or base is end for end in ends)
        if ours and isinstance(base, (nn.Linear, nn.Embedding)) and not isinstance(base, Linear4bit):
            held |= {f"{prefix}{path}{middle}.{k}": t for k, t in base.named_parameters()}
    return held


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
