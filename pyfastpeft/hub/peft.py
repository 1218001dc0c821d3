"""PEFT's adapter folders: ``adapter_config.json``, ``adapter_model.safetensors``, ``README.md``."""

from __future__ import annotations

import inspect
import json
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from .files import as_path, atomic_writes, load_safetensors, put_safetensors, put_text, write_text

CONFIG_NAME = "adapter_config.json"
CARD_NAME = "README.md"
WEIGHTS_NAME = "adapter_model.safetensors"
OWN_NAME = "pyfastpeft_encoder.safetensors"
"""What PEFT does not keep and training needs to go on: the encoder of a soft prompt. PEFT never looks at it."""
_OF_A_WRAPPER = re.compile(r"\.modules_to_save\.|\.original_module\..*bias$")

_CARD = """---
{base}library_name: {library}
{task}tags:
{tag}- {method}
---

# {method} adapter

{readers} it with `PeftModel.from_pretrained(base_model, folder)`.
"""
_OPTIONAL = {
    "base": r"(base_model: .*\n)?",
    "task": r"(pipeline_tag: .*\n)?",
    "tag": r'(- "base_model:adapter:.*"\n)?',
}
_UNEDITED = re.compile(re.sub(r"\\{(\w+)\\}", lambda field: _OPTIONAL.get(field[1], ".*"), re.escape(_CARD)))


def adapter_folder(root: str | os.PathLike, name: str) -> Path:
    """Where PEFT keeps the adapter ``name`` of a model that lies in ``root``."""
    return Path(root) if name == "default" else Path(root) / name


def locate(model_id: str | os.PathLike, filename: str, subfolder: str | None = None, **hub: Any) -> Path:
    """The path of ``filename`` in a local folder, or of its copy from the hub repository ``model_id``.

    Raises:
        FileNotFoundError: neither has it.
        TypeError: ``model_id`` is neither a path nor a name.
    """
    root = as_path("model_id", model_id)
    folder = root / subfolder if subfolder else root
    if (folder / filename).is_file():
        return folder / filename
    if root.exists() or root.is_absolute():
        raise FileNotFoundError(f"there is no file {folder / filename}")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError

    known = inspect.signature(hf_hub_download).parameters
    hub = {key: value for key, value in hub.items() if key in known}  # PEFT takes others too, for loading
    try:
        return Path(hf_hub_download(str(model_id), filename, subfolder=subfolder, **hub))
    except (EntryNotFoundError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        raise FileNotFoundError(
            f"there is no {filename} in a folder {folder}, and no hub repository {str(model_id)!r} gives one: {error}"
        ) from error


def read_tensors(
    model_id: str | os.PathLike, subfolder: str | None = None, **hub: Any
) -> tuple[dict[str, Tensor], Path]:
    """The tensors of an adapter folder, on the CPU, and the file they came from. Pickle files are never read.

    Raises:
        FileNotFoundError, ValueError: see :func:`load_safetensors`; and PEFT's ``key_mapping``.
    """
    if hub.get("key_mapping") is not None:
        raise ValueError(f"key_mapping is {hub['key_mapping']!r}; it must be None: keys are taken as the file has them")
    try:
        path = locate(model_id, WEIGHTS_NAME, subfolder, **hub)
    except FileNotFoundError:
        folder = Path(model_id) / subfolder if subfolder else Path(model_id)
        if (folder / "adapter_model.bin").is_file():
            raise ValueError(
                f"{folder} holds adapter_model.bin, a pickle, which is never loaded; convert it to {WEIGHTS_NAME} first"
            ) from None
        raise
    return without_duplicates(load_safetensors(path)), path


def without_duplicates(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``tensors`` without those that PEFT stores a second time.

    With bias="all", and where it stores embeddings, what is in ``modules_to_save`` also has the names that PEFT's
    wrapper gives it.
    """
    return {k: t for k, t in tensors.items() if not _OF_A_WRAPPER.search(k)}


def read_own(model_id: str | os.PathLike, subfolder: str | None = None, **hub: Any) -> dict[str, Tensor]:
    """The tensors of the file beside PEFT's, or none where there is no such file.

    Warns where a hub repository could not be asked for one.
    """
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        path = locate(model_id, OWN_NAME, subfolder, **hub)
    except FileNotFoundError as error:
        hubs = error.__cause__  # None: a folder, which has no such file
        absent = isinstance(hubs, EntryNotFoundError) and not isinstance(hubs, LocalEntryNotFoundError)
        if hubs is not None and not absent:
            warnings.warn(f"if the soft prompt has an encoder, it trains without that: {error}", stacklevel=2)
        return {}
    return load_safetensors(path)


def write_adapter(
    folder: str | os.PathLike,
    config: dict[str, Any],
    tensors: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    in_peft: bool,
) -> None:
    """Write an adapter folder: each file is whole at every moment, and two processes' files do not get mixed.

    Args:
        config: PEFT's keys, as :meth:`PeftConfig.to_dict` gives them.
        tensors: PEFT's keys; those that share memory are copied.
        own: what :func:`read_own` reads; without any, a file of an earlier adapter is removed.
        in_peft: whether PEFT has the method, for the README.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"save_directory is {str(folder)!r}, a file; it must be a folder or not exist")
    seen: set[int] = set()
    apart = {}
    for key, tensor in tensors.items():
        shared = tensor.untyped_storage().data_ptr() in seen
        seen.add(tensor.untyped_storage().data_ptr())
        apart[key] = tensor.detach().clone() if shared else tensor
    weights, encoder, settings = (folder / name for name in (WEIGHTS_NAME, OWN_NAME, CONFIG_NAME))
    held = {weights: apart} | ({encoder: own} if own else {})
    gone = [] if own else [encoder]  # never beside weights that it does not belong to
    with atomic_writes([*held, settings], gone) as (*asides, last):
        put_text(json.dumps(config, indent=2), last, settings)
        for aside, path in zip(asides, held, strict=True):
            put_safetensors(held[path], aside, path)
    write_card(folder, config, in_peft)


def write_card(folder: str | os.PathLike, config: dict[str, Any], in_peft: bool) -> None:
    """Write the README alone, as :func:`write_adapter` does; one that somebody else wrote or changed stays."""
    card, text = Path(folder) / CARD_NAME, _card(config, in_peft)
    there = card.read_text(encoding="utf-8", errors="replace") if card.exists() else None
    if there is None or (there != text and _UNEDITED.fullmatch(there)):
        write_text(text, card)


def complete_card(folder: str | os.PathLike, config: dict[str, Any], in_peft: bool) -> None:
    """As :func:`write_card`; the metadata of a README that stays tells of the adapter, by which the hub knows it."""
    from huggingface_hub import ModelCard
    from yaml import YAMLError

    write_card(folder, config, in_peft)
    path = Path(folder) / CARD_NAME
    known = ModelCard(_card(config, in_peft)).data.to_dict()
    try:
        card = ModelCard.load(path)
        known["tags"] = list(dict.fromkeys([*(card.data.tags or []), *known["tags"]]))
    except (ValueError, TypeError, AttributeError, YAMLError):  # what stands where metadata belongs is none
        return
    there = card.data.to_dict()
    if "pipeline_tag" in there:
        known.pop("pipeline_tag", None)
    if there | known != there:
        for key, value in known.items():
            card.data[key] = value
        write_text(str(card), path)


def _card(config: dict[str, Any], in_peft: bool) -> str:
    base = tag = task = ""
    if config.get("task_type") == "CAUSAL_LM":
        task = "pipeline_tag: text-generation\n"
    if name := config.get("base_model_name_or_path"):
        base, tag = f"base_model: {json.dumps(name)}\n", f"- {json.dumps(f'base_model:adapter:{name}')}\n"
    library, readers = "peft", "An adapter in PEFT's format: PEFT and pyfastpeft load"
    if not in_peft:
        library, readers = "pyfastpeft", "A method that PEFT does not have: pyfastpeft loads"
    method = config["peft_type"].lower()
    return _CARD.format(base=base, tag=tag, task=task, library=library, method=method, readers=readers)
