"""What the configurations of all tuning methods share: task and method names, the base class, the registry."""

from __future__ import annotations

import enum
import functools
import json
import os
import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, ClassVar

from ..hub.files import as_path, read_json, write_text
from ..hub.peft import CONFIG_NAME, locate
from ..ops.checks import as_count

if TYPE_CHECKING:
    from .tuner import Tuner

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


class PeftType(str, enum.Enum):
    """The tuning methods, by the names that an adapter_config.json has (PEFT's, for those that PEFT has)."""

    LORA = "LORA"
    PROMPT_TUNING = "PROMPT_TUNING"
    P_TUNING = "P_TUNING"
    PREFIX_TUNING = "PREFIX_TUNING"
    DEEP_PROMPT_TUNING = "DEEP_PROMPT_TUNING"
    BOTTLENECK = "BOTTLENECK"

    __str__ = str.__str__


def as_list(name: str, value: Any) -> list[str]:
    """The argument ``name``, names of modules, as a list; a str, which is a collection of letters, is none."""
    listed = isinstance(value, Collection) and not isinstance(value, (str, Mapping))
    if not listed or not all(isinstance(v, str) for v in value):
        raise ValueError(f"{name} is {value!r}; it must be a list of names")
    return sorted(value) if isinstance(value, (set, frozenset)) else list(value)


def as_member(kind: type[enum.Enum], name: str, value: Any) -> Any:
    """The argument ``name``, a member of the enumeration ``kind`` or its value, as a member."""
    try:
        return kind(value)
    except ValueError:
        choices = ", ".join(repr(member.value) for member in kind)
        raise ValueError(f"{name} is {value!r}; it must be one of {choices}") from None


def check_pattern(name: str, pattern: str) -> None:
    """Whether the argument ``name`` is a regular expression."""
    try:
        re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ValueError(f"{name} is {pattern!r}; it must be a regular expression: {error}") from None


def names_or_pattern(name: str, value: Any) -> list[str] | str | None:
    """The argument ``name``, which says which modules are meant: a regular expression, names as a list, or None."""
    if value is None:
        return None
    if not isinstance(value, str):
        return as_list(name, value)
    check_pattern(name, value)
    return value


def plain_number(value: Any) -> Any:
    """``value``, of which numpy's numbers, and others, become Python's own, which JSON takes."""
    if isinstance(value, (int, float)) or not isinstance(value, Real):
        return value
    return int(value) if isinstance(value, Integral) else float(value)


def check_dropout(name: str, value: float) -> None:
    """Whether the argument ``name`` is a share that can be dropped."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise ValueError(f"{name} is {value!r}; it must be at least 0 and below 1")


_SAYS_NOTHING = {"auto_mapping": None, "peft_version": PEFT_VERSION, "runtime_config": None}
"""PEFT's keys that say nothing about what an adapter computes, with what a configuration of ours says there."""

METHODS: dict[str, type[PeftConfig]] = {}
"""``peft_type`` of an adapter_config.json → the configuration class that reads it."""


def register_method(config_class: type[PeftConfig]) -> type[PeftConfig]:
    """Class decorator: make a method known under its ``peft_type``.

    The class then takes every key of PEFT's files, and has every one as an attribute: what is not a field of its own
    (:attr:`PeftConfig.ABSENT`, :data:`_SAYS_NOTHING`) is checked and not kept.
    """
    METHODS[config_class.peft_type] = config_class
    for key, unused in (_SAYS_NOTHING | config_class.ABSENT).items():
        setattr(config_class, key, unused)
    of_fields = config_class.__init__

    @functools.wraps(of_fields)
    def of_fields_and_peft_keys(self: PeftConfig, **values: Any) -> None:
        of_fields(self, **config_class._present(values))

    config_class.__init__ = of_fields_and_peft_keys
    return config_class


@dataclass(kw_only=True)
class PeftConfig(ABC):
    """Fields of every method's configuration.

    Attributes:
        task_type: a :class:`TaskType` or its name.
        base_model_name_or_path: where the base model came from; filled in when a model gets the adapter.
        revision: the base model's revision.
        inference_mode: the adapter is for inference: its parameters do not train when it becomes active.
        modules_to_save: names of modules trained whole and saved with the adapter.
    """

    peft_type: ClassVar[PeftType]
    is_prompt_learning: ClassVar[bool] = False
    """Whether the method is a soft prompt."""
    ABSENT: ClassVar[dict[str, Any]] = {}
    """PEFT's keys for what this library does not have, with the values that mean "not used"."""
    IN_PEFT: ClassVar[bool] = True
    """Whether PEFT has the method, so that it loads the folders."""
    NOT_SAVED: ClassVar[frozenset[str]] = frozenset()
    """Fields that PEFT does not know and that mean nothing to who loads the adapter."""

    IN_PLACE: ClassVar[tuple[str, ...]] = ("inference_mode",)
    """Fields that belong to an adapter's place in the model: a hot-swap, which brings other values, leaves them."""

    task_type: TaskType | str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False
    modules_to_save: list[str] | None = None

    @classmethod
    @abstractmethod
    def tuner(cls) -> type[Tuner]:
        """The class that attaches adapters of this configuration."""

    def __post_init__(self) -> None:
        if self.task_type is not None:
            self.task_type = as_member(TaskType, "task_type", self.task_type)
        if isinstance(self.base_model_name_or_path, os.PathLike):
            self.base_model_name_or_path = os.fspath(self.base_model_name_or_path)  # for JSON
        for field in fields(self):
            value = plain_number(getattr(self, field.name))
            setattr(self, field.name, value)
            if field.type == "bool" and value is not None and not isinstance(value, bool):
                raise ValueError(f"{field.name} is {value!r}; it must be True or False")
            if field.type == "int" or (field.type == "int | None" and value is not None):
                setattr(self, field.name, as_count(field.name, value))
        if self.modules_to_save is not None:
            self.modules_to_save = as_list("modules_to_save", self.modules_to_save)

    def asks_as(self, other: PeftConfig) -> bool:
        """Whether all that decides which tensors there are, and what they mean, is as in ``other`` of this class."""
        elsewhere = {"task_type", "base_model_name_or_path", "revision", *self.IN_PLACE, *self.NOT_SAVED}
        for field in fields(self):
            own, others = getattr(self, field.name), getattr(other, field.name)
            if isinstance(own, list) and isinstance(others, list):
                own, others = set(own), set(others)  # PEFT writes its sets in any order
            if own != others and field.name not in elsewhere:
                return False
        return True

    def in_place_of(self, old: PeftConfig) -> PeftConfig:
        """This configuration for the adapter ``old``, which takes the values that belong to it."""
        return replace(self, **{name: getattr(old, name) for name in self.IN_PLACE})

    def to_dict(self) -> dict[str, Any]:
        """The configuration under PEFT's keys, sorted, ready for JSON."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in self.NOT_SAVED}
        own = {k: sorted(v) if isinstance(v, set) else v for k, v in own.items()}
        own |= {"auto_mapping": None, "peft_type": self.peft_type, "peft_version": PEFT_VERSION}
        # Not deeper: of rank_pattern and alpha_pattern the first key that matches holds.
        return dict(sorted((self.ABSENT | own).items()))

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """Write ``adapter_config.json`` into ``save_directory``."""
        write_text(json.dumps(self.to_dict(), indent=2), as_path("save_directory", save_directory) / CONFIG_NAME)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PeftConfig:
        """The configuration that an adapter_config.json holds.

        Unknown keys are dropped with a warning.

        Raises:
            ValueError: a ``peft_type`` that is missing or not supported, a value out of range, or a key of PEFT's
                that changes what the adapter computes in a way this library does not have.
        """
        config_class = cls._class_of(values)
        return config_class._of_peft_keys(config_class._from_file(dict(values)))

    @classmethod
    def from_peft(cls, config: Any) -> PeftConfig:
        """A configuration for a new adapter from an object of PEFT's own; one of this library comes back as it is.

        Raises:
            TypeError: neither has it PEFT's interface (``peft_type`` and ``to_dict()``).
            ValueError: as in :meth:`from_dict`, and initial values that this library does not have.
        """
        if isinstance(config, cls):
            return config
        is_class = isinstance(config, type)
        if is_class or not hasattr(config, "peft_type") or not callable(getattr(config, "to_dict", None)):
            known = ", ".join(sorted(c.__name__ for c in METHODS.values()))
            kind = config if is_class else type(config)
            what = f"{'the class' if is_class else 'a'} {kind.__module__}.{kind.__name__}"
            raise TypeError(f"peft_config is {what}; it must be one of {known}, or PEFT's own for such a method")
        values = config.to_dict()
        return cls._class_of(values)._of_peft_keys(values)

    @classmethod
    def _class_of(cls, values: Mapping[str, Any]) -> type[PeftConfig]:
        """The class that ``values["peft_type"]`` names."""
        kind = values.get("peft_type")
        kind = getattr(kind, "value", kind)
        if not isinstance(kind, str) or kind not in METHODS:
            known = ", ".join(sorted(METHODS))
            raise ValueError(f"peft_type is {kind!r}; it must be one of {known}")
        if not issubclass(METHODS[kind], cls):
            raise ValueError(f"peft_type is {kind!r}, which is not a {cls.__name__}")
        return METHODS[kind]

    @classmethod
    def _of_peft_keys(cls, values: Mapping[str, Any]) -> PeftConfig:
        """The configuration with ``values``, of which unknown keys are dropped with a warning."""
        values = cls._present(values)
        known_fields = {f.name for f in fields(cls)}
        unknown = sorted(values.keys() - known_fields)
        if unknown:
            warnings.warn(
                f"unknown keys in the adapter's configuration are ignored: {', '.join(unknown)}", stacklevel=3
            )
        try:
            return cls(**{k: v for k, v in values.items() if k in known_fields})
        except TypeError as error:
            raise ValueError(f"the adapter's configuration holds a value of the wrong type: {error}") from error

    @classmethod
    def _present(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """``values`` without PEFT's keys that are no fields here.

        Raises:
            ValueError: such a key says that it is used, or ``peft_type`` is another method's.
        """
        values = {k: v for k, v in values.items() if k not in _SAYS_NOTHING}
        kind = values.pop("peft_type", None) or cls.peft_type
        if kind != cls.peft_type:
            raise ValueError(f"peft_type is {getattr(kind, 'value', kind)!r}; a {cls.__name__} is {cls.peft_type}")
        for key, unused in cls.ABSENT.items():
            value = values.pop(key, unused)
            if value != unused and value:
                raise ValueError(f"{key} is {value!r}; this library does not have that variant of {cls.peft_type}")
        return values

    @classmethod
    def _from_file(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Hook for what a file may say and a user may not."""
        return values

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, subfolder: str | None = None, **hub: Any
    ) -> PeftConfig:
        """Read ``adapter_config.json`` from a folder or a hub repository (``hub``: revision, token, cache_dir, …).

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged or its values are out of range (names the file).
        """
        path = locate(pretrained_model_name_or_path, CONFIG_NAME, subfolder, **hub)
        try:
            return cls.from_dict(read_json(path))
        except ValueError as error:
            raise error if str(path) in str(error) else ValueError(f"{path}: {error}") from error


def get_peft_config(config_dict: Mapping[str, Any]) -> PeftConfig:
    """The configuration of a new adapter from PEFT's keys, of which ``peft_type`` names the method.

    Raises:
        ValueError, TypeError: as the configuration's class.
    """
    if not isinstance(config_dict, Mapping):
        raise TypeError(f"config_dict is a {type(config_dict).__name__}; it must be a dict of PEFT's keys")
    return PeftConfig._class_of(config_dict)(**config_dict)
