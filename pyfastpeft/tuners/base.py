"""What every tuning method shares: the task and method names, the configuration base, and the registry of methods."""

from __future__ import annotations

import enum
import json
import os
import warnings
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

from ..hub.files import write_text

PEFT_VERSION = "0.21.2"
"""The version of PEFT whose files are written."""


class TaskType(str, enum.Enum):
    """What the model does (PEFT's names)."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


METHODS: dict[str, type[PeftConfig]] = {}
"""``peft_type`` of an adapter_config.json → the configuration class that reads it."""


def register_method(config_class: type[PeftConfig]) -> type[PeftConfig]:
    """Class decorator: make a method known under its ``peft_type``."""
    METHODS[config_class.peft_type] = config_class
    return config_class


@dataclass(kw_only=True)
class PeftConfig:
    """Fields of every method's configuration.

    Attributes:
        task_type: a :class:`TaskType` or its name.
        base_model_name_or_path: where the base model came from; filled in when the adapter is saved.
        revision: the base model's revision.
        inference_mode: the adapter is for inference: its parameters do not train when it becomes active.
    """

    peft_type: ClassVar[str]
    ABSENT: ClassVar[dict[str, Any]] = {}
    """PEFT's keys for what this library does not have, with the values that mean "not used"."""

    task_type: TaskType | str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False

    def __post_init__(self) -> None:
        if self.task_type is not None:
            try:
                self.task_type = TaskType(self.task_type)
            except ValueError:
                choices = ", ".join(t.value for t in TaskType)
                raise ValueError(f"task_type is {self.task_type!r}; it must be one of {choices}") from None

    def to_dict(self) -> dict[str, Any]:
        """The configuration under PEFT's keys, ready for JSON."""
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        own = {k: sorted(v) if isinstance(v, set) else v for k, v in own.items()}
        return self.ABSENT | {"auto_mapping": None, "peft_type": self.peft_type, "peft_version": PEFT_VERSION} | own

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """Write ``adapter_config.json`` into ``save_directory``."""
        write_text(json.dumps(self.to_dict(), indent=2, sort_keys=True), Path(save_directory) / "adapter_config.json")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PeftConfig:
        """The configuration that an adapter_config.json holds.

        Unknown keys are dropped with a warning.

        Raises:
            ValueError: a ``peft_type`` that is missing or not supported, a value out of range, or a key of PEFT's
                that changes what the adapter computes in a way this library does not have.
        """
        values = dict(values)
        kind = values.pop("peft_type", None)
        if kind not in METHODS:
            known = ", ".join(sorted(METHODS))
            raise ValueError(f"peft_type is {kind!r}; it must be one of {known}")
        config_class = METHODS[kind]
        if not issubclass(config_class, cls):
            raise ValueError(f"peft_type is {kind!r}, which is not a {cls.__name__}")
        for key in ("auto_mapping", "peft_version", "runtime_config"):
            values.pop(key, None)
        for key, unused in config_class.ABSENT.items():
            value = values.pop(key, unused)
            if value != unused and value:
                raise ValueError(f"{key} is {value!r}; this library does not have that variant of {kind}")
        known_fields = {f.name for f in fields(config_class)}
        unknown = sorted(values.keys() - known_fields)
        if unknown:
            warnings.warn(
                f"unknown keys in the adapter's configuration are ignored: {', '.join(unknown)}", stacklevel=2
            )
        try:
            return config_class(**config_class._from_file({k: v for k, v in values.items() if k in known_fields}))
        except TypeError as error:
            raise ValueError(f"the adapter's configuration holds a value of the wrong type: {error}") from error

    @classmethod
    def _from_file(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Hook for what a file may say and a user may not."""
        return values

    @classmethod
    def from_pretrained(cls, model_id: str | os.PathLike, subfolder: str | None = None, **hub: Any) -> PeftConfig:
        """Read ``adapter_config.json`` from a folder or a hub repository (``hub``: revision, token, cache_dir, …).

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged or its values are out of range (names the file).
        """
        from ..hub.peft import read_config

        return read_config(model_id, subfolder, cls, **hub)
