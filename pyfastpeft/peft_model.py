"""PeftModel: a model with adapters, under PEFT's interface."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers.utils import PushToHubMixin

from .adapters import CARRIED, NO_ROWS, Names, Rows
from .hub.files import as_path, check_named, save_safetensors
from .hub.peft import OWN_NAME, adapter_folder, complete_card, read_own, read_tensors, write_adapter
from .integrations.accelerate import fuse, is_fused, take_over, unfuse
from .integrations.attention import with_sdpa
from .integrations.generated_rows import check_generated
from .integrations.on_import import when_imported
from .integrations.packed_images import check_shares
from .integrations.trainer import teach_trainer
from .ops.checks import floating_dtype
from .status import TunerLayerStatus, TunerModelStatus, get_layer_status, get_model_status
from .tuners.adapted import AdaptedModel, check_carries_nothing, check_name, check_new
from .tuners.base import PeftConfig, PeftType, TaskType
from .tuners.lora import LoraConfig
from .tuners.lora_weighted import combine
from .tuners.modules import dequantize_model
from .tuners.soft_prompt import KEY, SoftPromptConfig, SoftPromptTuner


class IncompatibleKeys(NamedTuple):
    """What did not fit when tensors were loaded."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def get_peft_model(
    model: nn.Module,
    peft_config: PeftConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> PeftModel:
    """Freeze ``model`` and attach a new adapter to it, in place.

    On a CPU bitsandbytes' 4-bit layers become :class:`~pyfastpeft.nn.Linear4bit` (on a GPU, with :func:`accelerate`).

    Args:
        peft_config: of this library or of PEFT. Its ``task_type`` chooses the class that comes back.
        mixed: accepted for PEFT's sake: every model here takes adapters of several methods.
        autocast_adapter_dtype: keep the adapter in float32 over a 16-bit base (else in the base's dtype).
        revision: the base model's, in place of the one in ``peft_config``.
        low_cpu_mem_usage: accepted for PEFT's sake: an adapter is made where its layers are.

    Raises:
        TypeError, ValueError: the argument at fault, what it was and what it must be; ``model`` is then unchanged.
    """
    config = PeftConfig.from_peft(peft_config)
    if revision is not None:
        config = replace(config, revision=revision)
    return _class_for(config)(model, config, adapter_name, autocast_adapter_dtype)


def _check_base(model: Any) -> None:
    if not isinstance(model, nn.Module) or isinstance(model, PeftModel):
        raise TypeError(f"model is a {type(model).__name__}; it must be a torch.nn.Module without adapters")
    check_carries_nothing(model)


@contextmanager
def _attaching(model: nn.Module) -> Iterator[None]:
    """Inside, ``model`` gets its first adapter; what goes wrong leaves it as it was."""
    _check_base(model)
    trainable = [p for p in model.parameters() if p.requires_grad]
    taken = take_over(model, "cpu")  # where bitsandbytes' layers lose their gradients after an evaluation
    try:
        yield
    except BaseException:
        for parent, name, layer in taken:
            parent._modules[name] = layer
        for parameter in trainable:
            parameter.requires_grad_(True)
        raise
    if getattr(model, "is_activation_checkpointing", False):
        _let_inputs_require_gradients(model)


def _let_inputs_require_gradients(model: nn.Module) -> None:
    """Reentrant checkpoints pass no gradient on where none of their inputs asks for one."""
    if hasattr(model, "enable_input_require_grads"):
        model.enable_input_require_grads()
    elif hasattr(model, "get_input_embeddings"):
        model.get_input_embeddings().register_forward_hook(_require_gradients)


def _require_gradients(module: nn.Module, args: tuple, output: Tensor) -> None:
    output.requires_grad_(True)


def prepare_model_for_kbit_training(
    model: nn.Module,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
    auto_clear_cache: bool = True,
) -> nn.Module:
    """Freeze ``model`` and, by default, let it compute activations again in the backward pass; it comes back itself.

    Unlike PEFT's, it leaves 16-bit parameters in 16 bits: the kernels and the fused norms accumulate in float32 anyway,
    and float32 activations would double the time of a step.

    Args:
        gradient_checkpointing_kwargs: for the model's ``gradient_checkpointing_enable``; default: its own.
        auto_clear_cache: accepted for PEFT's sake: nothing is converted that would leave memory behind.

    Raises:
        TypeError: ``model`` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; it must be a torch.nn.Module")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if use_gradient_checkpointing:
        _let_inputs_require_gradients(model)
        # The name in transformers 5, where the other warns.
        for name in ("activation_checkpointing_enable", "gradient_checkpointing_enable"):
            if hasattr(model, name):
                getattr(model, name)(gradient_checkpointing_kwargs)
                break
    return model


class PeftModel(PushToHubMixin, nn.Module):
    """A base model with named adapters. Made by :func:`get_peft_model` and :meth:`from_pretrained`.

    Args:
        model: the base model, changed in place.
        peft_config, adapter_name, autocast_adapter_dtype: of a first adapter, which becomes active, as in
            :func:`get_peft_model`; None: there is none yet.
        low_cpu_mem_usage: accepted for PEFT's sake.

    Parameters are named as in PEFT (``base_model.model.<path>.lora_A.<adapter>.weight``); whatever is not defined here
    is the base model's (``config``, ``device``, ``gradient_checkpointing_enable`` …).
    """

    _hf_peft_config_loaded = True
    """Tells transformers' Trainer that a quantized base model has something to train."""

    prefix = "lora_"
    """Tells TRL which parameters are not for vLLM, to which it hands the merged ones."""

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig | None = None,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
    ) -> None:
        super().__init__()
        if peft_config is None:
            _check_base(model)
            self._wrap(model)
            return
        config = PeftConfig.from_peft(peft_config)
        with _attaching(model):
            self._wrap(model)
            with self._beginning():
                self.add_adapter(adapter_name, config, autocast_adapter_dtype=autocast_adapter_dtype)
                self.set_adapter(adapter_name)

    def _wrap(self, model: nn.Module) -> None:
        self._came_fused = is_fused(model)
        self.base_model = AdaptedModel(model)
        self.prompt_encoder = self.base_model.bank.prompts
        for module in (self, self.base_model, self.prompt_encoder):  # not what is in the model: some may be frozen
            module.training = model.training
        self._complete()

    @contextmanager
    def _beginning(self) -> Iterator[None]:
        """Inside, this model gets its first adapter; after an error, with which this object is lost, the base model has
        nothing of it."""
        try:
            yield
        except BaseException:
            self._unloaded((), self._came_fused)
            raise

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._complete()

    def _complete(self) -> None:
        """Make what refers to this object, and what a copy must have anew."""
        self.base_model.belong_to(self)
        self._show_signature()

    def _show_signature(self) -> None:
        """Give ``forward`` the base model's signature, for those who inspect it."""

        def forward(self: PeftModel, *args: Any, **kwargs: Any) -> Any:
            return type(self).forward(self, *args, **kwargs)

        signature = inspect.signature(self.get_base_model().forward)
        own = inspect.Parameter("adapter_names", inspect.Parameter.KEYWORD_ONLY, default=None)
        held = list(signature.parameters.values())
        at = len(held) - bool(held and held[-1].kind is inspect.Parameter.VAR_KEYWORD)
        bound = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
        forward.__signature__ = signature.replace(parameters=[bound, *held[:at], own, *held[at:]])
        self.forward = MethodType(forward, self)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model, name)

    # What there is.

    @property
    def generation_config(self) -> Any:
        """The base model's."""
        return self.get_base_model().generation_config

    @generation_config.setter
    def generation_config(self, config: Any) -> None:
        self.get_base_model().generation_config = config

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        """Adapter name → configuration."""
        return self.base_model.configs

    @property
    def peft_type(self) -> PeftType | None:
        """The method of the first adapter; None without adapters."""
        return next((config.peft_type for config in self.peft_config.values()), None)

    @property
    def active_adapters(self) -> list[str]:
        """The names of the active adapters; also while :meth:`disable_adapter` holds them back."""
        return list(self.base_model.bank.chosen)

    @property
    def active_adapter(self) -> str | list[str] | None:
        """The active adapter's name; a list where several are active, None where none is."""
        active = self.active_adapters
        return active[0] if len(active) == 1 else active or None

    @property
    def active_peft_config(self) -> PeftConfig:
        """The active adapter's.

        Raises:
            ValueError: none is active, or several are.
        """
        active = self.active_adapters
        if len(active) != 1:
            raise ValueError(f"active_peft_config needs one active adapter; active are {active}")
        return self.peft_config[active[0]]

    def get_base_model(self) -> nn.Module:
        """The base model, with the adapter layers in it."""
        return self.base_model.model

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable, all) numbers of parameters; a 4-bit weight counts as the parameters it stands for."""
        packed = {id(m.weight): m.out_features * m.in_features for m in self.modules() if isinstance(m, nn.Linear)}
        counted = [(packed.get(id(p), p.numel()), p.requires_grad) for p in self.parameters()]
        return sum(n for n, trains in counted if trains), sum(n for n, _ in counted)

    def print_trainable_parameters(self) -> None:
        """Print :meth:`get_nb_trainable_parameters` and their ratio, as PEFT does."""
        trainable, total = self.get_nb_trainable_parameters()
        share = 100 * trainable / max(total, 1)
        print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}")

    def get_layer_status(self) -> list[TunerLayerStatus]:
        """See :func:`get_layer_status`."""
        return get_layer_status(self)

    def get_model_status(self) -> TunerModelStatus:
        """See :func:`get_model_status`."""
        return get_model_status(self)

    # Running.

    def forward(self, *args: Any, adapter_names: Sequence[Names] | None = None, **kwargs: Any) -> Any:
        """The base model's forward.

        Args:
            adapter_names: for each row of the batch the adapter it uses (``"__base__"``: none; a list of names:
                several at once). Default: every row uses the active adapters. Works in training as well; inside
                :meth:`disable_adapter` rows are checked and use none.
        """
        bank = self.base_model.bank
        mode = bank.mode if adapter_names is None else self._rows(adapter_names, args, kwargs)
        if mode is None and not (bank.prompts and self.training):
            return self.base_model(*args, **kwargs)
        with self._mode(mode):
            return self.base_model(*args, **kwargs)

    def generate(self, *args: Any, adapter_names: Sequence[Names] | None = None, **kwargs: Any) -> Any:
        """The base model's generate; ``adapter_names`` as in :meth:`forward` (a row's beams use its adapter)."""
        if adapter_names is None:
            return self.base_model.model.generate(*args, **kwargs)
        rows = self._rows(adapter_names, args, kwargs)
        check_generated(self.base_model.model, rows, args, kwargs)
        with self._mode(rows):
            return self.base_model.model.generate(*args, **kwargs)

    def generate_batch(self, *args: Any, adapter_names: None = None, **kwargs: Any) -> Any:
        """The base model's: transformers' continuous batching, by an attention of transformers.

        Raises:
            ValueError: a soft prompt is active, which these attentions know nothing of, or ``adapter_names`` are given:
                continuous batching packs the rows into one.
        """
        if adapter_names is not None:
            raise ValueError(
                f"adapter_names is {adapter_names!r}; continuous batching has one choice of adapters for all rows, "
                "which set_adapter makes: leave it out, or call generate"
            )
        bank = self.base_model.bank
        prompts = [name for name in bank.active if self.peft_config[name].is_prompt_learning]
        if bank.enabled and prompts:
            raise ValueError(
                f"adapters {prompts} are soft prompts; continuous batching does not serve them, generate does"
            )
        with with_sdpa(self.base_model.model):
            return self.base_model.model.generate_batch(*args, **kwargs)

    def _rows(self, adapter_names: Sequence[Names], args: tuple, kwargs: dict) -> Rows:
        unordered = isinstance(adapter_names, (str, set, frozenset, Mapping))
        if unordered or not isinstance(adapter_names, Collection):
            raise ValueError(
                f"adapter_names is {adapter_names!r}; it must be a list, one name for each row of the batch"
            )
        named = (kwargs.get(n) for n in ("input_ids", "inputs_embeds", "inputs", "input_features", "pixel_values"))
        batch = next((t for t in (*args[:1], *named) if isinstance(t, Tensor)), None)
        if batch is not None and len(adapter_names) != len(batch):
            raise ValueError(f"adapter_names has {len(adapter_names)} names; the batch has {len(batch)} rows")
        bank = self.base_model.bank
        since = bank.changes  # before it is known who is here: another thread may take one's name for another
        rows = Rows(adapter_names, tuple(self.peft_config), since)
        if bank.held_back:
            return NO_ROWS
        check_shares(self.base_model.model, rows, batch, kwargs)
        return rows

    @contextmanager
    def _mode(self, mode: Rows | None) -> Iterator[None]:
        """Run with ``mode``, and let what gradient checkpointing computes again run with it too."""
        bank = self.base_model.bank
        checkpointed = []
        if torch.is_grad_enabled() and self.training:
            for module in self.get_base_model().modules():
                if getattr(module, "gradient_checkpointing", False) and "_gradient_checkpointing_func" in vars(module):
                    checkpointed.append((module, module._gradient_checkpointing_func))

        def bound(checkpoint: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
            run, chosen = bank.run, bank.mode  # where each token runs once it is of tokens

            def again(*inner: Any, **named: Any) -> Any:
                with bank.using(chosen), bank.running(run):
                    return function(*inner, **named)

            return checkpoint(again, *args, **kwargs)

        for module, checkpoint in checkpointed:
            module._gradient_checkpointing_func = partial(bound, checkpoint)
        try:
            with bank.using(mode):
                yield
        finally:
            for module, checkpoint in checkpointed:
                module._gradient_checkpointing_func = checkpoint

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """The base model alone, inside ``with``; merged adapters are taken out and, unless others were made active,
        merged again.

        In this thread, whatever ``adapter_names`` say, and, unless these say otherwise, in those that first meet the
        model inside. Others go on as they were, but for what was merged: they see the active adapters in its place.
        """
        self._warn_of_changes(self.peft_config, stacklevel=4)
        with self.base_model.without_merged(), self.base_model.bank.disabling(), self._mode(NO_ROWS):
            yield

    def _warn_of_changes(self, names: Collection[str], stacklevel: int) -> None:
        """Say what the base model without the adapters ``names`` has of them nevertheless."""
        configs = [c for n, c in self.peft_config.items() if n in names and isinstance(c, LoraConfig)]
        if any(c.bias != "none" for c in configs):
            said = "biases of the base model were trained (bias is not 'none'); they stay as trained"
            warnings.warn(said, stacklevel=stacklevel)
        if changing := [c.init_lora_weights for c in configs if c.changes_base]:
            said = f"base weights are without what init_lora_weights {changing} took out of them; they stay so"
            warnings.warn(said, stacklevel=stacklevel)

    # Adding, choosing and removing adapters.

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Attach a new adapter beside the others; it becomes active with :meth:`set_adapter`.

        Arguments as in :func:`get_peft_model`.

        Raises:
            TypeError, ValueError: the argument at fault; the model is then as it was.
        """
        config = self.base_model.resolved(PeftConfig.from_peft(peft_config))
        self.base_model.add(adapter_name, config, strict=True, autocast_adapter_dtype=autocast_adapter_dtype)
        self._prepare(adapter_name)

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool | None = None) -> None:
        """Make one adapter (or several at once) the active one.

        Its parameters train, and those of all others do not. No module is rebuilt and compiled code stays valid between
        adapters of equal ranks. Merged adapters are taken out of the base weights first, with a warning. A forward that
        runs meanwhile in another thread may see both adapters: requests served side by side choose theirs by
        ``adapter_names``. Several soft prompts stand one behind the other, in a decoder with the keys and values that
        each has alone: none sees another.

        Args:
            inference_mode: whether the active ones are frozen as well, and are for inference until it is given again.
                Default: as it was last given for each adapter, else as that was loaded (PEFT's is False).
        """
        self.base_model.set_adapter(adapter_name, inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Let the parameters of adapters train, or not, active or not; the next :meth:`set_adapter` decides anew."""
        for name in self.base_model.known(adapter_names):
            self.base_model.bank.let_train(name, requires_grad)

    def _prepare(self, new: str | None) -> None:
        """Work out now what switching to each adapter needs, so that no request waits for it; after an error the
        adapter ``new`` is out again."""
        try:
            fuse(self.get_base_model(), attention=[*self.peft_config] == [new])
            for name in self.peft_config:
                self.base_model.bank.prepare((name,))
            self.base_model.activate(self.base_model.bank.chosen)
        except BaseException:
            if new is not None:
                self.base_model.remove(new)
            raise

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter; if it was active, the first one left becomes active.

        A CUDA graph captured around any soft prompt must be captured again. With the last soft prompt the model has its
        own attention again, at once: delete that one while no other thread is in a forward. What an adapter changed of
        the base model stays as :meth:`unload` says, with a warning.
        """
        self.base_model.known([adapter_name])
        self.base_model.bank.check_unmerged(adapter_name)
        self._warn_of_changes([adapter_name], stacklevel=3)
        chosen = self.base_model.bank.chosen
        try:
            self.base_model.remove(adapter_name)
        finally:
            left = tuple(n for n in chosen if n != adapter_name)
            self.base_model.activate(tuple(self.peft_config)[:1] if chosen == (adapter_name,) else left)

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        *,
        density: float | None = None,
        majority_sign_method: str = "total",
    ) -> None:
        """Add an adapter made of others: the sum of their updates, each multiplied by its weight.

        Args:
            combination_type: "cat" (exact; the ranks add up), "svd" (the best approximation of rank ``svd_rank``), or
                "linear" (A's and B's are summed by themselves; equal ranks). "ties", "dare_linear", "dare_ties" and
                "magnitude_prune" are "linear", and "ties_svd" … "svd", of the share ``density`` of the elements
                (see :func:`.tuners.task_arithmetic.summed`); of a single adapter all elements are kept, as in PEFT.
            svd_rank: default: the largest rank among ``adapters``.
            density: above 0, at most 1; for those that leave elements out.
            majority_sign_method: "total" or "frequency"; for "ties" and "dare_ties".

        Raises:
            ValueError: the argument at fault; DoRA, lora_bias, modules_to_save and trainable_token_indices cannot be
                combined.
        """
        if isinstance(adapters, (set, frozenset)):
            raise ValueError(f"adapters is {adapters!r}; it must be a list, in the order of weights")
        names = self.base_model.known(adapters)
        check_new(adapter_name, self.peft_config)
        config, tensors = combine(
            self.base_model, names, weights, combination_type, svd_rank, density, majority_sign_method
        )
        self.install_adapter(adapter_name, config, tensors, f"adapter {adapter_name!r}", True)

    # Merging.

    def merge_adapter(self, adapter_names: Sequence[str] | None = None, safe_merge: bool = False) -> None:
        """Add adapters (default: the active ones) into the base weights, beside those that are merged already.

        The original weights are kept meanwhile, so that :meth:`unmerge_adapter` restores them bit for bit. A 4-bit base
        is quantized again.

        Args:
            safe_merge: refuse a result that is not finite in the dtype it will have.

        Raises:
            ValueError: the adapters are disabled, and in the weights would not be; or one cannot be merged.
        """
        if not self.base_model.bank.enabled:
            raise ValueError(
                "adapters cannot be merged while they are disabled; merge them when they are enabled again"
            )
        self.base_model.merge(adapter_names, safe_merge)

    def unmerge_adapter(self) -> None:
        """Restore the base weights of before :meth:`merge_adapter`, bit for bit."""
        self.base_model.unmerge()

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: Sequence[str] | None = None,
        dequantize: bool = False,
        dtype: torch.dtype | str | None = None,
    ) -> nn.Module:
        """The base model with the adapters (default: the active ones) in its weights, and no adapter layers.

        What is merged already stays so, and so does what :func:`accelerate` or loading in 4 bits had done to the model
        before it had adapters.

        Args:
            progressbar: accepted for PEFT's sake; there is none.
            safe_merge: refuse a result that is not finite in the dtype it will have.
            dequantize: over a 4-bit base: the whole model in ``dtype``, the merged weights rounded once, with all else
                as transformers has it (:func:`accelerate` makes it fast again). Default: merged weights are quantized
                again, in the same format.
            dtype: with ``dequantize``, a floating-point dtype or its name; default: the dtype the model has now; of a
                model without ``model.dtype`` the one each layer was quantized from.

        Raises:
            ValueError: an adapter that cannot be merged, or two that each have a copy of one module; or ``dtype``
                alone, or that is no floating-point dtype; the model is then as it was.
        """
        if dtype is not None and not dequantize:
            raise ValueError(f"dtype is {dtype}; it is for dequantize=True")
        dtype = None if dtype is None else floating_dtype(dtype)
        names = self.base_model.names_to_merge(adapter_names)
        kept = tuple(dict.fromkeys((*self.base_model.merged(), *names)))
        self.base_model.bank.prepare(kept)  # what cannot stay together is refused before anything changes
        self.base_model.merge(names, safe_merge, dequantize, dtype)
        model = self._unloaded(kept, self._came_fused and not dequantize)
        if dequantize:
            dequantize_model(model, dtype)
        return model

    def unload(self) -> nn.Module:
        """The base model as it was, accelerated or not, without adapters: what is merged is taken out, with a warning.

        (PEFT leaves it in the weights; here :meth:`merge_and_unload` does.) Biases that were trained stay as trained,
        and weights that PiSSA, OLoRA or LoftQ started from without what these took, with a warning.
        """
        self._warn_of_changes(self.peft_config, stacklevel=3)
        self.base_model.give_way("by unload(); merge_and_unload() keeps them")
        return self._unloaded((), self._came_fused)

    def _unloaded(self, names: tuple[str, ...], fused: bool) -> nn.Module:
        model = self.base_model.unwrapped(names)
        vars(model).pop(CARRIED, None)
        (fuse if fused else unfuse)(model)
        return model

    # Files.

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        safe_serialization: bool = True,
        selected_adapters: Sequence[str] | None = None,
        save_embedding_layers: bool | str = "auto",
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write the adapters (not the base model) as PEFT folders: "default" into the root, others below it.

        Args:
            safe_serialization: must be True; pickle is never written.
            selected_adapters: default: all.
            save_embedding_layers: also the base embeddings: "auto": those LoRA targets, and all where the vocabulary
                has another size than the base model's folder says; True: all; False: none.
            state_dict: values to write instead of the model's own, under the names of :meth:`state_dict`.
            kwargs: accepted for transformers' sake; ignored, but for ``path_initial_model_for_weight_conversion``,
                which must be None.

        Raises:
            TypeError, ValueError: the argument at fault, a ``save_directory`` that is a file, or there is no adapter.
        """
        folder = as_path("save_directory", save_directory)
        if not safe_serialization:
            raise ValueError("safe_serialization is False; adapters are written as safetensors only")
        if kwargs.get("path_initial_model_for_weight_conversion") is not None:
            raise ValueError(
                "path_initial_model_for_weight_conversion is not supported: an adapter that starts from a changed base "
                "(pissa, olora, loftq) is written as it is, for that base"
            )
        names = self.base_model.known(self.peft_config if selected_adapters is None else selected_adapters)
        if not self.peft_config:
            raise ValueError("there is no adapter to save: none was added, or they were deleted or unloaded")
        if not names:
            raise ValueError(f"selected_adapters is {selected_adapters!r}; it must name an adapter, or be None for all")
        if not is_main_process:
            return
        for name in names:
            tensors, own = self.adapter_state(name, save_embedding_layers, state_dict)
            in_peft = self.peft_config[name].IN_PEFT
            write_adapter(adapter_folder(folder, name), self._config_to_save(name), tensors, own, in_peft)

    def adapter_state(
        self, name: str, save_embedding_layers: bool | str, state_dict: Mapping[str, Tensor] | None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What PEFT's file of an adapter gets, and ours; of the values in ``state_dict`` where there is one."""
        if not isinstance(save_embedding_layers, bool) and save_embedding_layers != "auto":
            raise ValueError(f"save_embedding_layers is {save_embedding_layers!r}; it must be 'auto', True or False")

        def state() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
            own = self.base_model.tuner_of(name).own_state(name, self.peft_config[name])
            return self.base_model.state(name, save_embedding_layers), own

        if state_dict is None:
            return state()
        if not isinstance(state_dict, Mapping):
            raise ValueError(f"state_dict is a {type(state_dict).__name__}; it must be a mapping of names to tensors")
        given = {key.replace("_orig_mod.", ""): t for key, t in state_dict.items()}  # a compiled model's names
        known = {key: p for key, p in self.named_parameters() if p.is_floating_point()}  # a tied one under one name
        trained = set(map(id, self.base_model.bank.parameters(name)))
        for key, parameter in known.items():
            if id(parameter) in trained and key not in given:
                raise ValueError(f"state_dict lacks the key {key} of adapter {name!r}")
            if key in given and given[key].shape != parameter.shape:
                shapes = f"{tuple(given[key].shape)}; it must be {tuple(parameter.shape)}"
                raise ValueError(f"{key} in state_dict has shape {shapes}")
        called = nn.Module()
        called.model, called.forward = self, state
        return functional_call(called, {f"model.{key}": given[key] for key in known if key in given})

    def get_prompt_embedding_to_save(self, adapter_name: str) -> Tensor:
        """The ``prompt_embeddings`` of a soft prompt's file [rows, width], on the CPU: what an encoder makes, not it.

        Raises:
            ValueError: there is no such adapter, or it is no soft prompt.
        """
        self.base_model.known([adapter_name])
        config = self.peft_config[adapter_name]
        if not config.is_prompt_learning:
            raise ValueError(f"adapter_name is {adapter_name!r}, which is {config.peft_type}; it must be a soft prompt")
        return self.adapter_state(adapter_name, False, None)[0][KEY].cpu()

    def create_or_update_model_card(self, output_dir: str | os.PathLike) -> None:
        """Write the README.md of :meth:`save_pretrained` alone, for transformers' Trainer: "default"'s, or the first's.

        The text that somebody else wrote or changed stays, and its metadata tells of the adapter from now on.
        """
        for name in sorted(self.peft_config, key="default".__ne__)[:1]:
            complete_card(output_dir, self._config_to_save(name), self.peft_config[name].IN_PEFT)

    def _config_to_save(self, name: str) -> dict[str, Any]:
        base = self.get_base_model()
        values = replace(self.peft_config[name], inference_mode=True).to_dict()
        if values["task_type"] is None:
            values["auto_mapping"] = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}
        return values

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        **hub: Any,
    ) -> PeftModel:
        """Attach the adapter of a PEFT folder or hub repository to ``model``, in place.

        Called on PeftModel itself, it makes the class for the adapter's ``task_type``. LoRA of before transformers
        moved or renamed the model's modules (LLaVA's, Gemma 3's, Qwen2-VL's, ViT's …) is brought up to today's paths
        by the renamings with which transformers reads older checkpoints.

        Args:
            is_trainable: whether its parameters train.
            config: instead of the folder's adapter_config.json.
            low_cpu_mem_usage: accepted for PEFT's sake: nothing is made twice.
            hub: ``subfolder``, and what ``hf_hub_download`` takes (revision, token, cache_dir, …). PEFT's
                ``key_mapping`` must be None.

        Raises:
            FileNotFoundError: there is no such folder or file.
            ValueError: a damaged file, or one that does not fit ``model``: names the file and the key. ``model`` is
                then unchanged.
        """
        with _attaching(model):
            config = PeftConfig.from_pretrained(model_id, **hub) if config is None else PeftConfig.from_peft(config)
            self = (_class_for(config) if cls is PeftModel else cls)(model)
            with self._beginning():
                self.load_adapter(
                    model_id,
                    adapter_name,
                    is_trainable,
                    autocast_adapter_dtype=autocast_adapter_dtype,
                    config=config,
                    **hub,
                )
                self.set_adapter(adapter_name)
        return self

    def load_adapter(
        self,
        model_id: str | os.PathLike,
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | torch.device | None = None,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        config: PeftConfig | None = None,
        **hub: Any,
    ) -> IncompatibleKeys:
        """Load another adapter beside the others, or new values into one that exists.

        Arguments and errors as in :meth:`from_pretrained`; the model is unchanged after an error. As in PEFT,
        ``is_trainable`` is for new adapters: one that exists goes on to train, or not, as it did. Without it the model
        is put into evaluation mode.

        Args:
            torch_device: accepted for PEFT's sake: an adapter is where its layers are.

        Returns:
            As :func:`set_peft_model_state_dict`.
        """
        check_name(adapter_name)
        config = PeftConfig.from_pretrained(model_id, **hub) if config is None else PeftConfig.from_peft(config)
        tensors, path = read_tensors(model_id, **hub)
        source = str(path)
        held = self.peft_config.get(adapter_name)
        encodes = is_trainable if held is None else self.base_model.tuner_of(adapter_name).own_state(adapter_name, held)
        if encodes and isinstance(config, SoftPromptConfig) and (own := read_own(model_id, **hub)):
            tensors |= own
            source += f" with {OWN_NAME}"
        config = replace(config, inference_mode=not is_trainable)
        keys = self.install_adapter(adapter_name, config, tensors, source, autocast_adapter_dtype)
        if not is_trainable:
            self.eval()
        return keys

    def install_adapter(
        self, name: str, config: PeftConfig, tensors: Mapping[str, Tensor], source: str, autocast_adapter_dtype: bool
    ) -> IncompatibleKeys:
        """Fill an adapter, new or there already, from ``tensors``; all is checked before anything changes."""
        new = None if name in self.peft_config else name
        self.base_model.install(name, config, tensors, source, autocast_adapter_dtype)
        self._prepare(new)
        return IncompatibleKeys([], [])

    def export_prefix(self, path: str | os.PathLike, adapter_name: str | Sequence[str] | None = None) -> None:
        """Write what a soft prompt comes to in this model, its keys and values in every layer, as one safetensors file.

        The file serves without this library: its ``layers.<i>.key`` and ``layers.<i>.value`` [heads, length, dim] go
        into a cache of transformers, in front of the text::

            held = safetensors.torch.load_file(path)
            pairs = [(held[f"layers.{i}.key"], held[f"layers.{i}.value"]) for i in range(len(held) // 2)]
            cache = DynamicCache([tuple(t[None].repeat(batch, 1, 1, 1) for t in pair) for pair in pairs])
            mask = torch.cat([attention_mask.new_ones(batch, pairs[0][0].shape[1]), attention_mask], 1)
            places = (mask.cumsum(1) - 1)[:, -input_ids.shape[1] :]  # padding on the left takes none
            # "cache=" in newer versions
            logits = model(input_ids, attention_mask=mask, position_ids=places, past_key_values=cache).logits

        Where layers have a sliding window, pad on the right: transformers counts padding before the text in it.

        Args:
            adapter_name: one adapter, or several used together (a prompt and the LoRA it works with). Default: the
                active ones.

        Raises:
            TypeError: ``path`` is no path.
            ValueError: none of them is a soft prompt.
        """
        names = self.active_adapters if adapter_name is None else adapter_name
        names = self.base_model.known(names)
        tuners = [self.base_model.tuner_of(name) for name in names]
        tuner = next((t for t in tuners if isinstance(t, SoftPromptTuner)), None)
        if tuner is None:
            raise ValueError(f"adapter_name is {list(names)}, of which none is a soft prompt")
        save_safetensors(tuner.export(names), as_path("path", path))

    # Hot-swap.

    def hotswap_adapter(
        self,
        source: str | os.PathLike | Mapping[str, Tensor],
        adapter_name: str = "default",
        config: PeftConfig | None = None,
        **hub: Any,
    ) -> None:
        """Replace the values of an adapter in place, while the model serves.

        Parameters stay the same objects, so compiled code and optimizers stay valid; the base weights are not touched.
        The new adapter may lack some of the modules (they become zero) and may have smaller ranks (the rest is zero);
        its scaling is its own. A soft prompt that is for inference may get another number of virtual tokens. Everything
        is validated first: after an error nothing has changed. A forward that runs meanwhile in another thread may see
        old and new values; load the new ones as another adapter, and let rows choose, where that must not be.

        Args:
            source: a PEFT folder or hub repository, or the tensors themselves under PEFT's keys.
            adapter_name: the adapter to replace.
            config: with tensors: the new adapter's configuration. Default: as the old one's, with the ranks and modules
                that the tensors have.

        Raises:
            TypeError: a key that is no name, a value that is no tensor.
            ValueError: an unknown adapter, a rank larger than the one in place, a key or shape that does not fit, no
                tensors at all.
        """
        self.base_model.known([adapter_name])
        config = None if config is None else PeftConfig.from_peft(config)
        if isinstance(source, (str, os.PathLike)):
            config = PeftConfig.from_pretrained(source, **hub) if config is None else config
            tensors, path = read_tensors(source, **hub)
            label = str(path)
        elif isinstance(source, Mapping):
            tensors, label = source, "the state dict"
            check_named(tensors, label)
        else:
            raise ValueError(f"source is {source!r}; it must be a folder, a hub repository or a dict of tensors")
        if not tensors:
            raise ValueError(f"{label} holds no tensors; to do without the adapter, use disable_adapter()")
        self.base_model.swap(adapter_name, config, tensors, label)


class PeftModelForCausalLM(PeftModel):
    """A :class:`PeftModel` with adapters for "CAUSAL_LM"."""


class PeftModelForSeq2SeqLM(PeftModel):
    """A :class:`PeftModel` with adapters for "SEQ_2_SEQ_LM"."""


class PeftModelForSequenceClassification(PeftModel):
    """A :class:`PeftModel` with adapters for "SEQ_CLS"."""


class PeftModelForTokenClassification(PeftModel):
    """A :class:`PeftModel` with adapters for "TOKEN_CLS"."""


class PeftModelForQuestionAnswering(PeftModel):
    """A :class:`PeftModel` with adapters for "QUESTION_ANS"."""


class PeftModelForFeatureExtraction(PeftModel):
    """A :class:`PeftModel` with adapters for "FEATURE_EXTRACTION"."""


MODELS: dict[TaskType, type[PeftModel]] = {
    TaskType.CAUSAL_LM: PeftModelForCausalLM,
    TaskType.SEQ_2_SEQ_LM: PeftModelForSeq2SeqLM,
    TaskType.SEQ_CLS: PeftModelForSequenceClassification,
    TaskType.TOKEN_CLS: PeftModelForTokenClassification,
    TaskType.QUESTION_ANS: PeftModelForQuestionAnswering,
    TaskType.FEATURE_EXTRACTION: PeftModelForFeatureExtraction,
}
"""task_type → class. The classes differ only in their names, which transformers' pipelines check."""


def _class_for(config: PeftConfig) -> type[PeftModel]:
    return MODELS.get(config.task_type, PeftModel)


when_imported("transformers.trainer", teach_trainer)
