"""A base model with adapters of any methods in it: what all methods have in common."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..adapters import BASE, CARRIED, AdapterBank, in_order
from ..formats import is_full_precision
from ..hub.files import check_copies, check_tensors, copies
from ..nn.bottleneck import BottleneckLayer
from ..nn.ends import HEADS
from ..nn.linear4bit import Linear4bit
from ..nn.lora import LoraLinear
from ..nn.lora_layer import LoraLayer
from ..nn.modules_to_save import ModulesToSave
from ..nn.one_device import OneDevice
from ..nn.trainable_tokens import TokenRows
from ..ops import copy_alike, copy_tensors
from .base import PeftConfig
from .embeddings import base_embeddings
from .modules import (
    WRAPPERS,
    dense_dtype,
    find_saved,
    put,
    put_back,
    says_tied,
    tied_ends,
    trainable_copy,
    trainable_state,
    unmatched_saved,
)
from .tuner import Tuner

if TYPE_CHECKING:
    from ..peft_model import PeftModel

_OF_PEFT_MODEL = frozenset(
    (
        "active_adapter",
        "active_adapters",
        "add_weighted_adapter",
        "delete_adapter",
        "merge_adapter",
        "merge_and_unload",
        "peft_config",
        "set_requires_grad",
        "unload",
        "unmerge_adapter",
    )
)
"""Attributes that scripts read from ``model.base_model``, as PEFT has them there. They come from the PeftModel, not the
base model, which has unrelated ones of the same names."""

_SCALED_WHERE_TIED = ("switch_transformers", "udop", "umt5")  # UMT5 in transformers 5.20
"""Models that scale the output head's input where ``tie_word_embeddings`` is set: it has to stay set."""

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


def check_carries_nothing(model: nn.Module) -> None:
    """Whether ``model`` can get its first adapter.

    Raises:
        ValueError: another model's adapters are in it, or PEFT's own.
    """
    for path, module in model.named_modules():
        carrier = f"model is a {type(model).__name__} {f'whose {path!r}' if path else 'that'} carries"
        held = vars(module).get(CARRIED)
        if held or isinstance(module, WRAPPERS):  # the latter: inside of what carries them
            adapters = f"the adapters {list(held)}" if held else "adapters"
            raise ValueError(
                f"{carrier} {adapters} of a PeftModel already; add others to that one (add_adapter, load_adapter), or "
                "call its unload() or merge_and_unload() first"
            )
        if any(kind.__module__.startswith("peft.") for kind in type(module).__mro__):
            raise ValueError(
                f"{carrier} adapters of PEFT's own, or what is left of them; call its unload() or merge_and_unload() "
                "first, or load the model anew"
            )


class AdaptedModel(OneDevice, nn.Module):
    """``model`` is the base model, changed in place; ``configs`` the adapters' configurations by name.

    Names, modules trained whole and what trains when are dealt with here, all else by each method's :class:`Tuner`.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.bank = AdapterBank()
        self.configs: dict[str, PeftConfig] = {}
        self._tuners: dict[type[Tuner], Tuner] = {}
        self._tied = _tied(model)
        self._ties = _ties(model)
        for parameter in model.parameters():
            parameter.requires_grad_(False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("model", "peft_model"):
                raise
            return getattr(self.peft_model if name in _OF_PEFT_MODEL else self.model, name)

    def belong_to(self, peft_model: PeftModel) -> None:
        """Let ``peft_model``, whose ``base_model`` this is, give the attributes that PEFT has here."""
        vars(self)["peft_model"] = peft_model  # no submodule of its own submodule

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "peft_model"}  # a copy's own will say so

    def tuner(self, config: PeftConfig) -> Tuner:
        kind = config.tuner()
        if kind not in self._tuners:
            self._tuners[kind] = kind(self.model, self.bank)
        return self._tuners[kind]

    def tuner_of(self, name: str) -> Tuner:
        return self.tuner(self.configs[name])

    @property
    def targeted_module_names(self) -> list[str]:
        """The paths of the layers that have LoRA."""
        return list(self.bank.layers)

    def resolved(self, config: PeftConfig) -> PeftConfig:
        """A copy of ``config`` for this model (:meth:`Tuner.resolved`), the task's head in ``modules_to_save``."""
        config = copy.deepcopy(config)
        if config.base_model_name_or_path is None:
            config.base_model_name_or_path = getattr(self.model, "name_or_path", None) or None
        heads = HEADS.get(config.task_type)
        if heads is not None:
            config.modules_to_save = list(dict.fromkeys([*(config.modules_to_save or ()), *heads]))
        return self.tuner(config).resolved(config)

    def _to_save(self, config: PeftConfig) -> dict[str, Tensor]:
        """Key → tensor, as far as shape and kind go, of the copies that ``modules_to_save`` makes."""
        held, prefix = {}, self.tuner(config).PREFIX
        for path, module in self._whole(config).items():
            held |= {f"{prefix}{path}.{key}": t for key, t in trainable_state(_original(module)).items()}
        return held

    def _whole(self, config: PeftConfig) -> dict[str, nn.Module]:
        """:func:`find_saved`, of modules that can be copied.

        Raises:
            ValueError: one only holds modules, which the model takes out of it; or layers of another adapter are inside
                one, which would not train the copies; or codes that are not ours to decode, which cannot train.
        """
        saved = find_saved(config, self.model)
        for path, module in saved.items():
            if isinstance(module, _CONTAINERS):
                raise ValueError(
                    f"modules_to_save names {path!r}, a {type(module).__name__}, which is not called itself; name what "
                    "is in it"
                )
            for inner, carrier in _original(module).named_modules():
                at = f"{path}.{inner}".removesuffix(".")
                codes = [p.dtype for p in carrier.parameters(recurse=False) if not is_full_precision(p.dtype)]
                if codes and not isinstance(carrier, Linear4bit):
                    raise ValueError(
                        f"modules_to_save holds {path!r}, but {at!r} is a {type(carrier).__name__} with {codes[0]}, "
                        "which cannot train; load the model with it in full precision"
                    )
                if isinstance(carrier, WRAPPERS):
                    kinds = {ModulesToSave: "modules_to_save", BottleneckLayer: "a bottleneck"}
                    kind = kinds.get(type(carrier), "LoRA or tokens")
                    raise ValueError(f"modules_to_save holds {path!r}, but {at!r} carries {kind} of another adapter")
        return saved

    def add(
        self,
        name: str,
        config: PeftConfig,
        *,
        strict: bool,
        values: Mapping[str, Tensor] | None = None,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Attach an adapter as :meth:`Tuner.attach` says; on any error the model is as it was."""
        check_new(name, self.configs)
        if not self.configs:
            check_carries_nothing(self.model)  # also by now: another may have been made around it since
        tuner = self.tuner(config)
        unmatched = unmatched_saved(config, self.model)
        if strict and unmatched:
            raise ValueError(unmatched)
        saved = self._whole(config)
        if unmatched:
            warnings.warn(unmatched, stacklevel=3)  # which may be an error: before anything changes
        try:
            for path, module in saved.items():
                self._keep(name, path, module)
            tuner.attach(name, config, strict=strict, values=values, autocast_adapter_dtype=autocast_adapter_dtype)
            self.configs[name] = config
            vars(self.model)[CARRIED] = self.configs
            self.bank.hold(name, partial(self._trained, name))
            if any(hasattr(module, "_hf_hook") for module in self.model.modules()):  # of accelerate, which may offload
                _check_kept(name, self.tensors(name))
        except BaseException:
            self._take_out(name, tuner)
            raise

    def install(
        self, name: str, config: PeftConfig, tensors: Mapping[str, Tensor], source: str, autocast_adapter_dtype: bool
    ) -> None:
        """Give the adapter ``name``, which is attached if there is none yet, the values ``tensors``.

        Args:
            tensors: under the keys of its files, from ``source`` (a name for messages).
            autocast_adapter_dtype: as in :meth:`Tuner.attach`.

        Raises:
            ValueError: they do not fit ``config`` and this model, or the adapter there is computes something else with
                them; nothing has changed then.
        """
        config = self.resolved(config)
        tuner = self.tuner(config)
        config, tensors = tuner.at_todays_paths(config, tensors)
        tensors = tuner.without_duplicates(config, tensors)
        expected = self._fitting(tuner, config, tensors, source)
        exists = name in self.configs
        if exists:
            held, live = self.configs[name], self.tensors(name)
            if type(held) is not type(config):
                raise ValueError(f"adapter {name!r} is {held.peft_type}, not {config.peft_type}; delete it first")
            self.bank.check_unmerged(name)
            tuner.check_same_layout(name, held, config, {k: tuple(t.shape) for k, t in live.items()}, expected)
        else:
            self.add(name, config, strict=False, values=tensors, autocast_adapter_dtype=autocast_adapter_dtype)
        live = self.tensors(name)
        before = {key: t.detach().clone() for key, t in live.items()} if exists else {}
        try:
            _check_kept(name, live)
            with torch.no_grad():
                for key, tensor in live.items():
                    tensor.copy_(tensors[key])
                tuner.filled(name, config, tensors)
                # Looked up again: what the adapter trains whole is no base weight any more, others are new objects.
                embeddings = self._embeddings(tuner, expected)
                base = [(t, tensors[key].to(t)) for key, t in embeddings.items() if key in tensors]
                base = [(tensor, value) for tensor, value in base if not torch.equal(tensor, value)]
                if base:
                    self.give_way(f"as {source} has other base embeddings")
                for tensor, value in base:  # all are converted by now: running out of memory leaves none changed
                    tensor.copy_(value)
        except BaseException:
            with torch.no_grad():
                for key, tensor in before.items():
                    live[key].copy_(tensor)
            if not exists:
                self.remove(name)
            raise

    def _fitting(
        self, tuner: Tuner, config: PeftConfig, tensors: Mapping[str, Tensor], source: str
    ) -> dict[str, tuple[int, ...]]:
        """Key → shape of all that a file for the resolved ``config`` must hold, as ``tensors`` do."""
        saved = self._to_save(config)
        expected = tuner.expected(config, tensors) | {key: tuple(t.shape) for key, t in saved.items()}
        optional = {k: tuple(t.shape) for k, t in self._embeddings(tuner, expected).items()}
        whole = [key for key, t in saved.items() if not t.is_floating_point()]
        check_tensors(tensors, expected, optional, source, whole)
        return expected

    def _embeddings(self, tuner: Tuner, own: Collection[str]) -> dict[str, Tensor]:
        """The base model's under all keys that a file may hold them by, but for the keys of what is an adapter's own.
        When loading they are copied over."""
        return {key: t for key, t in base_embeddings(self.model, tuner.PREFIX).items() if key not in own}

    # Which are in use.

    def known(self, names: str | Sequence[str]) -> tuple[str, ...]:
        """One name or several, each of an adapter."""
        if not isinstance(names, Collection):
            raise ValueError(f"the adapter is {names!r}; it must be among {list(self.configs)}, or several of them")
        names = (names,) if isinstance(names, str) else in_order(names)
        unknown = [n for n in names if not isinstance(n, str) or n not in self.configs]
        if unknown:
            raise ValueError(f"there is no adapter {unknown[0]!r}; this model has {list(self.configs)}")
        return names

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool | None = None) -> None:
        """See :meth:`PeftModel.set_adapter`."""
        names = self.known(adapter_name)
        if len(set(names)) < len(names):
            raise ValueError(f"adapter_name is {adapter_name!r}; each adapter can be named once")
        self.bank.prepare(names)  # what cannot be active together is refused before anything changes
        self.give_way(f"to make {list(names)} active")
        if inference_mode is not None:
            for name in names:
                self.configs[name].inference_mode = inference_mode
        self.bank.decide()
        self.activate(names)

    def activate(self, names: tuple[str, ...]) -> None:
        """Make ``names`` the active adapters; those that are not for inference train."""
        self.bank.freeze(frozenset(n for n, config in self.configs.items() if config.inference_mode))
        self.bank.activate(names)

    def disable_adapter_layers(self) -> None:
        """Compute as the base model alone, until :meth:`enable_adapter_layers`; nothing trains meanwhile.

        Merged adapters are taken out of the base weights, with a warning. Rows that choose their own adapters
        (``adapter_names``) use these all the same.
        """
        self.give_way("to disable them")
        self._enable(False)

    def enable_adapter_layers(self) -> None:
        """Use the active adapters again."""
        self._enable(True)

    def _enable(self, enabled: bool) -> None:
        self.bank.disabled = not enabled
        self.activate(self.bank.chosen)

    # Merging.

    def merge(
        self,
        adapter_names: Sequence[str] | None,
        safe_merge: bool,
        dequantize: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Add adapters (None: the active ones) into the base weights; after an error all is merged that was before.

        Args:
            safe_merge: refuse a result that is not finite in the dtype it will have.
            dequantize: exchange the 4-bit layers under LoRA for layers in ``dtype`` (None: :func:`dense_dtype`).
        """
        names, before = self.names_to_merge(adapter_names), self._merged()
        dense = dense_dtype(self.model) if dtype is None else dtype
        try:
            for layer in self.bank.mergeable:
                if dequantize and isinstance(layer, LoraLinear) and isinstance(layer.base_layer, Linear4bit):
                    layer.merge_dense(names, safe_merge, dense)
                else:
                    layer.merge(safe_merge, names, dtype)
        except BaseException:
            for layer in self.bank.mergeable:
                layer.unmerge()
                layer.merge(False, before.get(layer, ()))
            raise

    def names_to_merge(self, adapter_names: Sequence[str] | None) -> tuple[str, ...]:
        """The names, each once, of adapters (None: the active ones) that can all be merged into weights."""
        names = tuple(dict.fromkeys(self.known(self.bank.chosen if adapter_names is None else adapter_names)))
        for name in names:
            if not self.tuner_of(name).merges:
                kind = self.configs[name].peft_type
                raise ValueError(f"adapter {name!r} is {kind}, which cannot be merged into weights; merge others alone")
        return names

    def merged(self) -> tuple[str, ...]:
        """The names of what is merged."""
        return tuple(dict.fromkeys(name for names in self._merged().values() for name in names))

    def _merged(self) -> dict[LoraLayer | TokenRows, tuple[str, ...]]:
        """What is merged, in the layers where something is."""
        return {layer: tuple(layer.merged_adapters) for layer in self.bank.mergeable if layer.merged}

    @contextmanager
    def without_merged(self) -> Iterator[None]:
        """What is merged is not, inside, and is merged again afterwards, unless others were made active, into the
        layers that are still in the model, as far as it is still there."""
        merged, chosen, since = self._merged(), self.bank.chosen, self.bank.changes
        try:
            if merged:
                self.unmerge()
            yield
        finally:
            if self.bank.chosen == chosen:  # else set_adapter would have unmerged them
                for layer in self.bank.mergeable if merged else ():
                    layer.merge(False, [n for n in merged.get(layer, ()) if self.bank.holds(n, since)])

    def unmerge(self) -> None:
        """Restore the base weights, bit for bit."""
        for layer in self.bank.mergeable:
            layer.unmerge()

    def give_way(self, why: str) -> None:
        """Unmerge what is merged, with a warning that says ``why``."""
        if merged := self.merged():
            warnings.warn(f"{list(merged)} are merged, and are unmerged {why}", stacklevel=3)
            self.unmerge()

    def _trained(self, name: str) -> list[nn.Parameter]:
        """What trains while the adapter does."""
        tensors = self.tuner_of(name).tensors(name, self.configs[name])
        trained = [t for t in tensors.values() if isinstance(t, nn.Parameter)]
        for wrapper in self.bank.wrappers.values():
            if name in wrapper.modules_to_save:
                trained += wrapper.modules_to_save[name].parameters()
        return trained

    def remove(self, name: str) -> None:
        """Take an adapter out; where it was the last on a module, the plain module stands there again."""
        tuner = self.tuner_of(name)
        try:
            self._take_out(name, tuner)
        except BaseException:  # an interrupt: half an adapter must not stay
            self._take_out(name, tuner)
            raise

    def _take_out(self, name: str, tuner: Tuner) -> None:
        """:meth:`remove`, also of one of which only some is here."""
        self.bank.release(name)
        self.configs.pop(name, None)
        tuner.remove(name)
        self._drop_saved(name)
        self._let_inputs_require_grads()

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The adapter's live parameters (and buffers of saved modules) under the keys of its files."""
        return self.tuner_of(name).tensors(name, self.configs[name]) | self._saved(name)

    def state(self, name: str, save_embedding_layers: bool | str) -> dict[str, Tensor]:
        """What ``adapter_model.safetensors`` gets."""
        state = self.tuner_of(name).state(name, self.configs[name], save_embedding_layers) | self._saved(name)
        return {key: t.detach() for key, t in state.items()}

    def _saved(self, name: str) -> dict[str, Tensor]:
        prefix = self.tuner_of(name).PREFIX
        held = {}
        for path, wrapper in self.bank.wrappers.items():
            if name in wrapper.modules_to_save:
                state = wrapper.modules_to_save[name].state_dict(keep_vars=True)
                held |= {f"{prefix}{path}.{key}": t for key, t in state.items()}
        return held

    def _keep(self, name: str, path: str, module: nn.Module) -> None:
        wrapper = module
        if not isinstance(module, ModulesToSave):
            wrapper = ModulesToSave(module, self.bank)
            wrapper.training = module.training  # what is in it has its own mode
            put(self.model, path, wrapper)
            self.bank.wrappers[path] = wrapper
            self.bank.forget()
        wrapper.modules_to_save[name] = trainable_copy(wrapper.original_module, dense_dtype(self.model))

    def _drop_saved(self, name: str) -> None:
        for path, wrapper in list(self.bank.wrappers.items()):
            if name in wrapper.modules_to_save:
                del wrapper.modules_to_save[name]
            if not wrapper.modules_to_save:
                put_back(self.model, path, wrapper, wrapper.original_module)
                del self.bank.wrappers[path]
        self.bank.forget()

    # Hot-swap.

    def swap(self, name: str, config: PeftConfig | None, values: Mapping[str, Tensor], source: str) -> None:
        """See :meth:`PeftModel.hotswap_adapter`."""
        old = self.configs[name]
        if config is not None and type(config) is not type(old):
            raise ValueError(f"{source} holds a {config.peft_type} adapter; adapter {name!r} is {old.peft_type}")
        if (config is None or config.asks_as(old)) and self._swapped_alike(name, config, values):
            return
        for key, value in values.items():
            check_copies(key, value, source)
        tuner = self.tuner_of(name)
        new, values = tuner.at_todays_paths(None if config is None else self.resolved(config), values)
        if new is not None:
            saved = {path for path, wrapper in self.bank.wrappers.items() if name in wrapper.modules_to_save}
            if find_saved(new, self.model).keys() != saved:
                here, there = old.modules_to_save, new.modules_to_save
                raise ValueError(f"modules_to_save is {there} in {source}; adapter {name!r} has {here}")
            values = tuner.without_duplicates(new, values)
            self._fitting(tuner, new, values, source)
        held = self._embeddings(tuner, self.tensors(name))
        embeddings = {key: t for key, t in held.items() if key in values}
        for key, tensor in embeddings.items():
            if not torch.equal(tensor, values[key].to(tensor)):
                raise ValueError(f"{source}: {key} differs from the base model's; a hot-swap leaves base weights alone")
        if embeddings:
            values = {key: t for key, t in values.items() if key not in embeddings}
        if self._swapped_alike(name, new, values):
            return
        run = tuner.swap(name, old, new, self.tensors(name), values, source)
        try:
            self.configs[name] = run()
        except BaseException:  # an interrupt: half of another adapter must not stay
            self.configs[name] = run()
            raise
        finally:
            self.bank.version += 1

    def _swapped_alike(self, name: str, config: PeftConfig | None, values: Mapping[str, Tensor]) -> bool:
        """The common case at full speed: the same keys, shapes and form. False: another case, nothing is done."""
        tuner, old, layouts = self.tuner_of(name), self.configs[name], self.bank.layouts
        if name not in layouts:
            live = self.tensors(name) if tuner.swaps_alike(name, old, None) else {}
            layouts[name] = (live, list(live.values()), [t.shape for t in live.values()])
        live, targets, shapes = layouts[name]
        if not live or values.keys() != live.keys():
            return False
        if config is not None and not tuner.swaps_alike(name, old, config):
            return False
        new = [values[key] for key in live]
        if not copy_alike(targets, new):
            kinds = [v.is_floating_point() for v in new] == [t.is_floating_point() for t in targets]
            if [v.shape for v in new] != shapes or not kinds or not all(map(copies, new)):
                return False
            copy_tensors(targets, new)
        if config is not None:
            self.configs[name] = config.in_place_of(old)
        self.bank.version += 1
        return True

    # Without adapters again.

    def unwrapped(self, names: tuple[str, ...]) -> nn.Module:
        """The base model without any wrapper; modules kept by ``names`` stand in the place of the originals. There are
        no adapters any more."""
        for tuner in self._tuners.values():
            tuner.unload()
        for path, wrapper in self.bank.wrappers.items():
            kept = wrapper.plan(names)
            put_back(self.model, path, wrapper, wrapper.original_module if kept is None else kept)
        self.bank.wrappers.clear()
        self.bank.vacate()
        self.configs.clear()
        if self._tied and not _tied(self.model) and self.model.config.model_type not in _SCALED_WHERE_TIED:
            for config in (self.model.config, self.model.config.get_text_config()):
                config.tie_word_embeddings = False
        if _ties(self.model) != self._ties:
            # Of tied names one is saved. The others would be tied to what is no longer theirs when it is loaded, or,
            # without the flag, to nothing: each needs a tensor of its own, at the price of an embedding's memory.
            _untie(self.model, {*self._ties, *self._ties.values()})
        self._let_inputs_require_grads()
        return self.model

    def _let_inputs_require_grads(self) -> None:
        """Where transformers does so (for checkpointing), at the input embedding that stands there now."""
        if getattr(self.model, "_require_grads_hooks", None):
            self.model.disable_input_require_grads()
            self.model.enable_input_require_grads()


def _original(module: nn.Module) -> nn.Module:
    return module.original_module if isinstance(module, ModulesToSave) else module


def _tied(model: nn.Module) -> bool:
    """Whether the output head has the weight of the embedding, and the configuration says so."""
    return says_tied(model) and bool(tied_ends(model))


def _ties(model: nn.Module) -> dict[str, str]:
    """Name → the name it is tied to, for all parameters that transformers ties and that do share a tensor."""
    tensors = dict(model.named_parameters(remove_duplicate=False))
    declared = getattr(model, "all_tied_weights_keys", {})
    return {name: of for name, of in declared.items() if name in tensors and tensors[name] is tensors.get(of)}


@torch.inference_mode(False)
@torch.no_grad()
def _untie(model: nn.Module, names: set[str]) -> None:
    """Give each of the parameters ``names`` a tensor that no other of them has."""
    seen = set()
    for path, tensor in list(model.named_parameters(remove_duplicate=False)):
        if path in names and tensor in seen:
            parent, _, attribute = path.rpartition(".")
            setattr(model.get_submodule(parent), attribute, copy.deepcopy(tensor))
        elif path in names:
            seen.add(tensor)


def _check_kept(name: str, tensors: Mapping[str, Tensor]) -> None:
    if nowhere := [key for key, tensor in tensors.items() if tensor.is_meta]:
        raise ValueError(
            f"{nowhere[0]} of adapter {name!r} is on the meta device, as its layer is offloaded or not loaded yet, and "
            "would keep no values; give the adapter to a model that lies in memory"
        )


def check_name(name: Any) -> None:
    """Whether an adapter can be called ``name``."""
    if (
        not isinstance(name, str)
        or not re.fullmatch(r"[^./\\\s]+", name)
        or name == BASE
        or any(hasattr(holder(), name) for holder in (nn.ModuleDict, nn.ParameterDict))
    ):
        raise ValueError(
            f"adapter_name is {name!r}; it must be a word without dots, slashes or spaces, and not {BASE!r} or "
            "the name of an attribute of torch.nn.ModuleDict or ParameterDict"
        )


def check_new(name: Any, taken: Mapping[str, PeftConfig]) -> None:
    """Whether an adapter beside those ``taken`` can be called ``name``."""
    check_name(name)
    if name in taken:
        raise ValueError(f"adapter_name is {name!r}, which this model has already; delete it first or choose another")


def adapter_dtype(base: nn.Module, autocast_adapter_dtype: bool) -> torch.dtype:
    """The dtype of an adapter's parameters over the layer ``base``."""
    dtype = base.original_dtype if isinstance(base, Linear4bit) else base.weight.dtype
    if not is_full_precision(dtype):
        return torch.float32
    return torch.float32 if autocast_adapter_dtype and dtype in (torch.float16, torch.bfloat16) else dtype
