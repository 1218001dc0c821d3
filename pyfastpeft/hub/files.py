"""Files written whole or not at all, and read with suspicion: JSON and safetensors, never pickle."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def as_path(name: str, value: Any) -> Path:
    """The argument ``name``, a file's or a folder's path (a hub repository's name looks like one)."""
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"{name} is {value!r}; it must be a path")
    return Path(value)


@contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a fresh path beside ``path`` to write to; on success it replaces ``path``, on any error it is removed.

    The file is synced to disk before it takes the name, so a full disk, an exception or a kill at any moment leaves
    the old file whole.
    """
    with atomic_writes([Path(path)]) as (aside,):
        yield aside


@contextmanager
def atomic_writes(paths: Sequence[Path], gone: Collection[Path] = ()) -> Iterator[list[Path]]:
    """:func:`atomic_write` for files of one folder that belong together.

    All are on disk before the first takes its name, and they take them one right after the other, while no other
    process does so in this folder. Files ``gone`` are removed at that moment.
    """
    folder = paths[0].parent
    folder.mkdir(parents=True, exist_ok=True)
    asides = [path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp") for path in paths]
    try:
        yield asides
        for aside in asides:
            _sync(aside)
        with _locked(folder):
            for path in gone:
                path.unlink(missing_ok=True)
            for aside, path in zip(asides, paths, strict=True):
                os.replace(aside, path)
    except BaseException:
        for aside in asides:
            with suppress(OSError):
                aside.unlink(missing_ok=True)
        raise
    # Best effort: some file systems cannot sync a directory, and the files are in place already.
    with suppress(OSError):
        _sync(folder)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold off other writers, where the system can. A lock that is held for more than a second is not a writer's."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        for _ in range(100):
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.01)
            except OSError:  # not on this file system
                break
        yield
    finally:
        os.close(fd)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_text(text: str, path: str | os.PathLike) -> None:
    """Replace ``path`` by ``text`` in UTF-8, atomically.

    Raises:
        OSError: the file could not be written (the old one is whole).
    """
    with atomic_write(path) as aside:
        put_text(text, aside, path)


def put_text(text: str, aside: Path, path: str | os.PathLike) -> None:
    """:func:`write_text` to ``aside``, which :func:`atomic_writes` gave for ``path``."""
    try:
        aside.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OSError(error.errno, f"{path} could not be written: {error.strerror}") from error


def save_safetensors(tensors: Mapping[str, Tensor], path: str | os.PathLike) -> None:
    """Write ``tensors`` (any device, any strides) to ``path`` atomically.

    Raises:
        OSError: the file could not be written (the old one is whole).
        ValueError: the tensors cannot be stored, for example two keys share one memory.
    """
    with atomic_write(path) as aside:
        put_safetensors(tensors, aside, path)


def put_safetensors(tensors: Mapping[str, Tensor], aside: Path, path: str | os.PathLike) -> None:
    """:func:`save_safetensors` to ``aside``, which :func:`atomic_writes` gave for ``path``."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    held = {k: t.detach().contiguous() for k, t in tensors.items()}
    try:
        save_file(held, aside, {"format": "pt"})  # which transformers and peft look for
    except SafetensorError as error:
        raise OSError(f"{path} could not be written: {error}") from error
    except RuntimeError as error:
        raise ValueError(f"{path} cannot hold these tensors: {error}") from error


def load_safetensors(path: str | os.PathLike) -> dict[str, Tensor]:
    """All tensors of ``path``, on the CPU; the header's sizes and offsets are checked against the file first.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, damaged or not safetensors.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        # For the memory of the CPU torch has no class of its own.
        if "allocate memory" in str(error) or isinstance(error, torch.OutOfMemoryError):
            raise
        raise ValueError(f"{path} is not a valid safetensors file (truncated or damaged?): {error}") from error


def read_json(path: str | os.PathLike) -> dict[str, Any]:
    """The JSON object in ``path``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not UTF-8 JSON, or its top level is not an object.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        value = json.loads(path.read_bytes().decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a JSON {type(value).__name__}; it must be an object")
    return value


def check_tensors(
    tensors: Mapping[str, Tensor],
    expected: Mapping[str, tuple[int, ...]],
    optional: Mapping[str, tuple[int, ...]],
    source: str,
    whole: Collection[str] = (),
) -> None:
    """Hold ``tensors`` against the keys and shapes of an adapter.

    Args:
        whole: keys of what is not floating point, as the number of batches that a BatchNorm has seen.

    Raises:
        ValueError: a key is missing or too many, or a shape or dtype is not the expected one.
    """
    missing = [k for k in expected if k not in tensors]
    extra = [k for k in tensors if k not in expected and k not in optional]
    if missing or extra:
        parts = [f"{label}: {_listed(keys)}" for label, keys in (("missing", missing), ("not expected", extra)) if keys]
        raise ValueError(f"{source} does not fit the adapter's configuration and this model. Keys {'; '.join(parts)}")
    for key, tensor in tensors.items():
        shape = expected.get(key, optional.get(key))
        if tuple(tensor.shape) != tuple(shape):
            raise ValueError(f"{source}: {key} has shape {tuple(tensor.shape)}; it must be {tuple(shape)}")
        check_copies(key, tensor, source)
        check_kind(key, tensor, key not in whole, source)


def check_named(tensors: Mapping[Any, Any], source: str) -> None:
    """Whether a mapping that a caller gives is one of names to tensors.

    Raises:
        TypeError: a key or a value is something else.
    """
    for key, tensor in tensors.items():
        if not isinstance(key, str):
            raise TypeError(f"{source}: the key {key!r} is a {type(key).__name__}; it must be a str")
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{source}: {key} is a {type(tensor).__name__}; it must be a tensor")


def check_kind(key: str, tensor: Tensor, floating: bool, source: str) -> None:
    """Whether the values of ``tensor`` are of the kind that they replace."""
    if tensor.is_floating_point() != floating:
        kind = "floating point" if floating else "whole numbers"
        raise ValueError(f"{source}: {key} has dtype {tensor.dtype}; it must be {kind}")


def copies(tensor: Tensor) -> bool:
    """Whether torch can copy what ``tensor`` holds into a dense tensor."""
    return tensor.layout is torch.strided and not tensor.is_meta and tensor.dtype is not torch.float4_e2m1fn_x2


def check_copies(key: str, tensor: Tensor, source: str) -> None:
    """:func:`copies`, as an error that names the tensor."""
    if not copies(tensor):
        found = f"{tensor.dtype} in {tensor.layout} on {tensor.device}"
        raise ValueError(f"{source}: {key} is {found}; it must be dense, in memory and of a dtype that torch converts")


def check_text(text: str) -> None:
    """Whether ``text`` is Unicode: JSON and command lines can hold halves of characters, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the text holds {text[error.start]!r}, a half of a character; it must be Unicode") from None


def _listed(keys: list[str]) -> str:
    return ", ".join(keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
