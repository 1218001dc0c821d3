"""The interface of a tuning method: :class:`Tuner`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, ClassVar

from torch import Tensor, nn

from ..adapters import AdapterBank
from ..hub.files import check_tensors
from .base import PeftConfig
from .embeddings import own_embeddings, to_be_saved


class Tuner(ABC):
    """One tuning method on one model: how its adapters attach, what their files hold, and how they come out again.

    A :class:`~.adapted.AdaptedModel` makes one of each method that its adapters use, and does itself what all methods
    have in common: names, ``modules_to_save``, which parameters train, files. A new method is a configuration whose
    ``tuner()`` names a subclass of this, registered with :func:`~.base.register_method`. What is not abstract has a
    meaning for most methods.

    How an adapter takes effect is the method's own business. What depends on which adapters are active goes through
    the bank: an object put into ``bank.layers`` or ``bank.others`` has ``plan(active)``, called once for a set of
    active names, and gets the result as its attribute ``_plan`` whenever that set becomes active. Where a batch chooses
    by row, ``bank.mode`` (:class:`~..adapters.Rows`, of the calling thread) is not None while the model runs, and wins.

    Args:
        model: the base model, which adapters change in place.
        bank: shared by all methods on the model.
    """

    PREFIX: ClassVar[str] = "base_model.model."
    """What stands before a module's path in this method's files."""

    merges: ClassVar[bool] = False
    """Whether an adapter can be added into the base weights (``merge_adapter``)."""

    def __init__(self, model: nn.Module, bank: AdapterBank) -> None:
        self.model, self.bank = model, bank

    @abstractmethod
    def resolved(self, config: Any) -> Any:
        """``config`` (a copy, free to be changed) with everything that depends on the model filled in.

        Raises:
            ValueError: the model is none that this method applies to.
        """

    def at_todays_paths(
        self, config: Any | None, values: Mapping[str, Tensor]
    ) -> tuple[Any | None, Mapping[str, Tensor]]:
        """``config``, resolved or None, and ``values`` of a file, with the module paths that this model has now where
        they have those of an older version of it."""
        return config, values

    @abstractmethod
    def expected(self, config: Any, values: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
        """Key → shape of all that the files for a resolved ``config`` must hold; nothing is changed.

        Args:
            values: the tensors about to be loaded, where they decide the form.
        """

    def without_duplicates(self, config: Any, values: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """``values`` of a file without duplicates: tensors that it stores again under a second key."""
        return values

    @abstractmethod
    def attach(
        self,
        name: str,
        config: Any,
        *,
        strict: bool,
        values: Mapping[str, Tensor] | None,
        autocast_adapter_dtype: bool,
    ) -> None:
        """Attach an adapter for a resolved ``config``; on any error :meth:`remove` makes the model what it was.

        Args:
            strict: names in ``config`` that the model has not are an error, not a warning.
            values: None: a new adapter, to be initialized. Else it is filled (through :meth:`tensors`) right after.
            autocast_adapter_dtype: parameters in float32 over a 16-bit base; else in the base's dtype.
        """

    @abstractmethod
    def tensors(self, name: str, config: Any) -> dict[str, Tensor]:
        """The adapter's live parameters under the keys of its files."""

    def filled(self, name: str, config: Any, values: Mapping[str, Tensor]) -> None:  # noqa: B027 (most do nothing)
        """Called when :meth:`tensors` have taken their ``values``; what raises here undoes the loading."""

    def state(self, name: str, config: Any, save_embedding_layers: bool | str) -> dict[str, Tensor]:
        """What ``adapter_model.safetensors`` gets: PEFT's keys, where PEFT has the method."""
        return self.tensors(name, config) | self.saved_embeddings(config, save_embedding_layers)

    def saved_embeddings(self, config: Any, save: bool | str) -> dict[str, Tensor]:
        """What of :meth:`embeddings` is written, by ``save_embedding_layers``."""
        return self.embeddings(config) if to_be_saved(self.model, save) else {}

    def embeddings(self, config: Any) -> dict[str, Tensor]:
        """The base model's, under the keys of the adapter's file."""
        return own_embeddings(self.model, config, self.PREFIX)

    def own_state(self, name: str, config: Any) -> dict[str, Tensor]:
        """What goes into a file of ours beside PEFT's, so that training can go on (see :mod:`..hub.peft`)."""
        return {}

    def check_same_layout(self, name: str, old: Any, new: Any, live: dict, expected: dict) -> None:
        """An adapter may take new values in place only where ``new`` computes with them what ``old`` did.

        Args:
            live, expected: key → shape, of the adapter and of the file.

        Raises:
            ValueError: it may not.
        """
        if live != expected:
            raise ValueError(f"adapter {name!r} has other shapes; delete it first")

    @abstractmethod
    def swaps_alike(self, name: str, old: Any, new: Any | None) -> bool:
        """Whether copying every tensor makes the adapter ``old`` into ``new`` (None: not given), shapes being equal."""

    def swap(
        self,
        name: str,
        old: Any,
        new: Any | None,
        live: dict[str, Tensor],
        values: Mapping[str, Tensor],
        source: str,
    ) -> Callable[[], Any]:
        """Check a hot-swap that is not of the common kind (:meth:`swaps_alike`).

        Args:
            old, new: the configurations; ``new`` is as the file has it, or None.
            live: every tensor of the adapter, ``modules_to_save`` included.
            values: the new tensors, from ``source`` (a name for messages).

        Returns:
            What does it, as often as it is called, and returns the adapter's configuration from now on.
        """
        whole = [k for k, t in live.items() if not t.is_floating_point()]
        check_tensors(values, {k: tuple(t.shape) for k, t in live.items()}, {}, source, whole)
        of_all = {field.name for field in fields(PeftConfig)} | old.NOT_SAVED  # what the tensors mean is not in these
        own = [field.name for field in fields(old) if field.name not in of_all]
        differ = ", ".join(key for key in own if getattr(old, key) != getattr(new, key))
        raise ValueError(f"adapter {name!r} cannot be replaced from {source}: their configurations differ in {differ}")

    @abstractmethod
    def remove(self, name: str) -> None:
        """Take out an adapter (also one that failed half-way), leaving the model as it was before it."""

    @abstractmethod
    def unload(self) -> None:
        """Take out everything this method put into the model; the adapters are not used again."""
