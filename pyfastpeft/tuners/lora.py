"""LoRA (Hu et al. 2021) with rsLoRA, DoRA, PiSSA, OLoRA, LoftQ: configuration, where it attaches, its tensors."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..adapters import AdapterBank
from ..nn.ends import base_of, output_head
from ..nn.linear4bit import Linear4bit
from ..nn.lora import LoraConv1D, expected_tensors, is_linear, layer_class
from ..nn.lora_init import loftq, olora, pissa
from ..nn.lora_layer import LoraLayer, scaling_of
from ..nn.trainable_tokens import TrainableTokens
from ..nn.weight_reads import never_calls, passes_by
from ..ops.checks import as_count
from .adapted import adapter_dtype
from .base import (
    PeftConfig,
    PeftType,
    TaskType,
    as_list,
    check_dropout,
    check_pattern,
    names_or_pattern,
    plain_number,
    register_method,
)
from .embeddings import own_embeddings
from .modules import (
    at,
    check_called,
    ends_with,
    find_saved,
    hint,
    inside_of,
    inside_saved,
    is_named,
    modules_of,
    names_of,
    no_target,
    parameters_of,
    plain_modules_of,
    put,
    put_back,
    tied_ends,
    unmatched,
)
from .trainable_tokens import DELTA, Place, checked_tokens, find_places, put_tokens, take_tokens
from .tuner import Tuner

ALL_LINEAR = "all-linear"
_DEFAULT_TARGETS = (
    ("q_proj", "v_proj"),
    ("query", "value"),
    ("q", "v"),
    ("q_lin", "v_lin"),
    ("query_proj", "value_proj"),
    ("wq", "wv"),
    ("query_key_value",),
    ("qkv_proj",),
    ("c_attn",),
    ("Wqkv",),
    ("in_proj",),
)
"""What architectures call W_Q and W_V; where one projection holds Q, K and V, that one."""
_EMBEDDING_NAMES = ("embed_tokens", "lm_head")
_SCALING_FIELDS = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
_KIND_FIELDS = ("use_dora", "lora_bias", "bias", "init_lora_weights", "trainable_token_indices")


@dataclass
class LoftQConfig:
    """LoftQ's bits, which must be 4, and how often quantizing and decomposing alternate."""

    loftq_bits: int = 4
    loftq_iter: int = 1

    def __post_init__(self) -> None:
        if self.loftq_bits != 4:
            raise ValueError(f"loftq_bits is {self.loftq_bits!r}; it must be 4")
        self.loftq_iter = as_count("loftq_iter", self.loftq_iter)


@register_method
@dataclass(kw_only=True)
class LoraConfig(PeftConfig):
    """Configuration of LoRA; names and meaning are PEFT's.

    Two defaults follow the literature's common practice instead of PEFT's table: ``lora_alpha`` is 2 · r (scaling 2),
    and ``target_modules`` are W_Q and W_V of every attention layer (Hu et al. 2021, section 7.1), or what holds both.

    Attributes:
        r: rank.
        lora_alpha: the update is scaled by ``lora_alpha / r``; None: 2 · r.
        lora_dropout: probability of dropping an input of the LoRA branch in training, below 1.
        target_modules: module names (the last parts of a path), one regular expression for whole paths,
            ``"all-linear"`` (every linear layer but the output head), or None: W_Q and W_V.
        exclude_modules: names or a regular expression of what is left out.
        layers_to_transform, layers_pattern: only these layer numbers; the name of the list that is numbered.
        rank_pattern, alpha_pattern: names or regular expressions → another rank, another alpha.
        bias: which biases of the base model train: "none", "all" or "lora_only" (those of the target modules).
        lora_bias: give B a bias.
        use_rslora: scale by ``lora_alpha / sqrt(r)``.
        use_dora: decompose into magnitude and direction (Liu et al. 2024).
        init_lora_weights: True (A Kaiming-uniform, B zero), False (neither zero), "gaussian", "pissa",
            "pissa_niter_<n>", "olora" or "loftq"; the last four also change the base weight (but not of an embedding,
            which starts as with True, and which "loftq" refuses).
        loftq_config: a :class:`LoftQConfig`, or ``{"loftq_bits": 4, "loftq_iter": n}``.
        fan_in_fan_out: kept for PEFT's files; the orientation is read from the layer's type.
        trainable_token_indices: tokens whose rows of the input embedding train as well, in a head tied to it too; or
            names of embeddings → tokens.
    """

    peft_type: ClassVar[PeftType] = PeftType.LORA
    IN_PLACE: ClassVar[tuple[str, ...]] = (*PeftConfig.IN_PLACE, "lora_dropout")
    ABSENT: ClassVar[dict[str, Any]] = {
        "alora_invocation_tokens": None,
        "arrow_config": None,
        "corda_config": None,
        "ensure_weight_tying": False,
        "eva_config": None,
        "kasa_config": None,
        "layer_replication": None,
        "lora_ga_config": None,
        "megatron_config": None,
        "megatron_core": "megatron.core",
        "monteclora_config": None,
        "qalora_group_size": 16,
        "target_parameters": None,
        "use_bdlora": None,
        "use_qalora": False,
        "velora_config": None,
    }

    r: int = 8
    lora_alpha: float | None = None
    lora_dropout: float = 0.0
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    bias: str = "none"
    lora_bias: bool = False
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: bool | str = True
    loftq_config: LoftQConfig | dict[str, int] = field(default_factory=dict)
    fan_in_fan_out: bool = False
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None

    @classmethod
    def tuner(cls) -> type[Tuner]:
        return LoraTuner

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_numbers()
        self.trainable_token_indices = checked_tokens(self.trainable_token_indices)
        if self.bias not in ("none", "all", "lora_only"):
            raise ValueError(f"bias is {self.bias!r}; it must be 'none', 'all' or 'lora_only'")
        self._check_targets()
        self._check_layers()
        self._check_init()

    def _check_numbers(self) -> None:
        self.lora_alpha = 2 * self.r if self.lora_alpha is None else self.lora_alpha
        for name in ("rank_pattern", "alpha_pattern"):
            value = getattr(self, name) or {}
            if not isinstance(value, Mapping):
                raise ValueError(f"{name} is {value!r}; it must be a dict from names or regular expressions")
            for key in value:
                check_pattern(f"a key of {name}", key)
            setattr(self, name, dict(value))
        for key, rank in self.rank_pattern.items():
            self.rank_pattern[key] = as_count(f"rank_pattern[{key!r}]", rank)
        self.alpha_pattern = {key: plain_number(alpha) for key, alpha in self.alpha_pattern.items()}
        alphas = {f"alpha_pattern[{key!r}]": alpha for key, alpha in self.alpha_pattern.items()}
        for name, alpha in {"lora_alpha": self.lora_alpha, **alphas}.items():
            _check_alpha(name, alpha)
        check_dropout("lora_dropout", self.lora_dropout)

    def _check_targets(self) -> None:
        if isinstance(self.target_modules, str) and self.target_modules.lower() == ALL_LINEAR:
            self.target_modules = ALL_LINEAR  # PEFT takes any case
        for name in ("target_modules", "exclude_modules"):
            setattr(self, name, names_or_pattern(name, getattr(self, name)))
        for name in self.modules_to_save or ():  # as in PEFT, what it matches is no target
            check_pattern("a name in modules_to_save", name)

    def _check_layers(self) -> None:
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            raise ValueError("layers_to_transform is given; target_modules must then be a list of names, not a string")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern is given; it needs layers_to_transform, the numbers of the layers")
        if self.layers_pattern is not None and not isinstance(self.layers_pattern, str):
            self.layers_pattern = as_list("layers_pattern", self.layers_pattern)
        for pattern in self.layer_patterns:
            check_pattern("layers_pattern", pattern)
        wanted = self.layers_to_transform
        if isinstance(wanted, (list, tuple)):
            wanted = self.layers_to_transform = [plain_number(number) for number in wanted]
        for number in wanted if isinstance(wanted, (list, tuple)) else [0 if wanted is None else wanted]:
            if isinstance(number, bool) or not isinstance(number, int):
                raise ValueError(f"layers_to_transform is {wanted!r}; it must be a number or a list of numbers")

    def _check_init(self) -> None:
        init = self.init_lora_weights
        if isinstance(init, str):
            init = self.init_lora_weights = init.lower()
        known = isinstance(init, bool) or init in ("gaussian", "pissa", "olora", "loftq")
        if not known and not (isinstance(init, str) and re.fullmatch(r"pissa_niter_\d+", init)):
            raise ValueError(
                f"init_lora_weights is {init!r}; it must be True, False, 'gaussian', 'pissa', 'pissa_niter_<n>', "
                "'olora' or 'loftq'"
            )
        if self.lora_bias and (self.use_dora or isinstance(init, str)):
            raise ValueError("lora_bias is True; it goes with init_lora_weights True or False, and without use_dora")
        given = self.loftq_config or {}
        is_one = hasattr(given, "loftq_iter") and not isinstance(given, type)  # PEFT's own has it too
        if not isinstance(given, Mapping) and not is_one:
            raise ValueError(f"loftq_config is {given!r}; it must be a LoftQConfig or a dict of what that takes")
        loftq_config = given if isinstance(given, Mapping) else vars(given)
        loftq_config = {key: plain_number(value) for key, value in loftq_config.items()}
        if init == "loftq":
            known = [held.name for held in fields(LoftQConfig)]
            if unknown := sorted(loftq_config.keys() - known):
                raise ValueError(f"loftq_config has {', '.join(unknown)}; it takes {', '.join(known)}")
            loftq_config = vars(LoftQConfig(**loftq_config))
        self.loftq_config = loftq_config

    @classmethod
    def _from_file(cls, values: dict[str, Any]) -> dict[str, Any]:
        # PEFT's default; null would be ours, which an adapter that is trained already need not have had.
        values["lora_alpha"] = plain_number(values.get("lora_alpha", 8))
        _check_alpha("lora_alpha", values["lora_alpha"])
        if values.get("init_lora_weights") in ("eva", "orthogonal"):
            # Only the initial values differ, and those are about to be loaded.
            values |= {"init_lora_weights": True, "eva_config": None}
        return values

    @property
    def changes_base(self) -> bool:
        """Whether attaching this adapter changes the base weights it sits on."""
        return isinstance(self.init_lora_weights, str) and self.init_lora_weights != "gaussian"

    @property
    def taken_from_base(self) -> tuple | None:
        """What says which part of the base weights attaching this adapter takes out of them; None: nothing is."""
        return (self.init_lora_weights, self.loftq_config) if self.changes_base else None

    @property
    def layer_patterns(self) -> list[str]:
        """``layers_pattern`` as a list; none is any name."""
        patterns = self.layers_pattern or [r"[^.]*"]
        return [patterns] if isinstance(patterns, str) else patterns

    def rank_of(self, path: str) -> int:
        """``r``, or what ``rank_pattern`` has for the module at ``path``."""
        return _by_pattern(self.rank_pattern, path, self.r)

    def alpha_of(self, path: str) -> float:
        """``lora_alpha``, or what ``alpha_pattern`` has for the module at ``path``."""
        return _by_pattern(self.alpha_pattern, path, self.lora_alpha)

    def initial(self) -> Callable[[Tensor, int, float], tuple[Tensor, Tensor, Tensor]] | bool | str:
        """What :meth:`LoraLayer.add_adapter` takes as ``initial``."""
        init = self.init_lora_weights
        if init == "olora":
            return olora
        if init == "loftq":
            return partial(loftq, iterations=self.loftq_config["loftq_iter"])
        if isinstance(init, str) and init.startswith("pissa"):
            return partial(pissa, iterations=int(init.rpartition("_")[2]) if init != "pissa" else None)
        return init


_NUMBERED = re.compile(r"(?:^|.*?\.)([^.]*)\.\d+\.")
"""The first list in a module's path."""


def _check_alpha(name: str, alpha: Any) -> None:
    most = torch.finfo(torch.float32).max  # layers keep their scaling as float32 too
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not abs(alpha) <= most:
        raise ValueError(f"{name} is {alpha!r}; it must be a finite number in float32's range")


def _fits(pattern: str, path: str) -> bool:
    return re.match(rf"(.*\.)?({pattern})$", path) is not None


def _by_pattern(patterns: dict[str, Any], path: str, default: Any) -> Any:
    return next((value for pattern, value in patterns.items() if _fits(pattern, path)), default)


def matches(config: LoraConfig, path: str) -> bool:
    """Whether the module at ``path`` is a target of ``config`` (whose ``target_modules`` are resolved)."""
    if config.exclude_modules and is_named(path, config.exclude_modules):
        return False
    if any(re.match(rf".*{name}($|\..*)", path) for name in config.modules_to_save or ()):
        return False
    if isinstance(config.target_modules, str):
        return re.fullmatch(config.target_modules, path) is not None
    if path in config.target_modules:
        return True
    if not ends_with(path, config.target_modules):
        return False
    wanted = config.layers_to_transform
    if wanted is None or wanted == []:
        return True
    for pattern in config.layer_patterns:
        found = re.match(rf"(?:^|.*?\.)(?:{pattern})\.(\d+)\.", path)
        if found:
            return int(found[1]) in ([wanted] if isinstance(wanted, int) else wanted)
    return False


def _all_linear(model: nn.Module, config: LoraConfig) -> list[str] | str:
    head = output_head(model)
    if head is None and config.task_type == TaskType.SEQ_CLS:
        head = next((h for h in (getattr(model, n, None) for n in ("score", "classifier")) if h is not None), None)
    linear, fused = [], []
    kept = {m for saved in find_saved(config, model).values() for m in saved.modules()}
    for path, module in modules_of(model):
        if is_linear(base_of(module)) and module is not head:
            linear += [] if module in kept or passes_by(model, path) else [path]
        if path.endswith("experts"):
            fused += [f"{path}.{name}" for name, p in module.named_parameters(recurse=False) if p.dim() == 3]
    if fused:
        warnings.warn(
            f"'all-linear' leaves {len(fused)} weights alone that hold the layers of several experts ({fused[0]}, …): "
            "LoRA goes to linear layers only",
            stacklevel=3,
        )
    return names_of(linear, model)


def find_targets(config: LoraConfig, model: nn.Module, strict: bool) -> dict[str, nn.Module]:
    """Path → module for every target of a resolved ``config``.

    Args:
        strict: a name in ``target_modules`` that no module has is an error, and so is a match that is never called
            (where PEFT has such a target, its files hold LoRA that has learned nothing).

    Raises:
        ValueError: nothing matches, a name matches nothing (``strict``), or a match cannot carry LoRA.
    """
    candidates = dict(modules_of(model))
    targets = {path: m for path, m in candidates.items() if matches(config, path)}
    missing = unmatched(config.target_modules, candidates)
    if not targets and isinstance(config.target_modules, list) and config.target_modules and not missing:
        raise ValueError(
            f"target_modules {config.target_modules!r} are modules of {type(model).__name__}, but exclude_modules "
            f"{config.exclude_modules!r}, layers_to_transform {config.layers_to_transform!r} and modules_to_save "
            f"{config.modules_to_save!r} leave none of them"
        )
    if not targets or (missing and strict):
        raise no_target(missing or config.target_modules, model, _layers_of(model))
    wrong = {p: m for p, m in targets.items() if layer_class(base_of(m)) is None}
    if wrong:
        path, module = next(iter(wrong.items()))
        raise ValueError(
            f"target_modules matches {path!r}, a {type(module).__name__}; LoRA needs a Linear, Conv1D or Embedding "
            "that computes what these do, without max_norm"
        )
    if strict:
        check_called(model, targets, "leave it out, or name it in exclude_modules")
    return targets


def _layers_of(model: nn.Module) -> list[str]:
    """The paths of the layers that can carry LoRA."""
    return [path for path, module in modules_of(model) if layer_class(base_of(module)) is not None]


def _biases(config: LoraConfig, model: nn.Module, targets: Collection[str]) -> dict[str, nn.Parameter]:
    """Key, without the prefix, → bias, for the base model's biases that train with the adapter.

    The keys are as if the adapter were the only one in the model.

    Args:
        targets: the paths of its targets.
    """
    if config.bias == "none":
        return {}
    held = {}
    saved = find_saved(config, model)
    tokens = {path for place in find_places(config.trainable_token_indices, model) for path in place.layers}
    for path, plain, around in plain_modules_of(model):
        bias = None if inside_of(path, saved) else parameters_of(plain, around).get("bias")
        if bias is None or (config.bias == "lora_only" and path not in targets):
            continue
        inside = "base_layer." if path in targets else "token_adapter.base_layer." if path in tokens else ""
        held[f"{path}.{inside}bias" if path else "bias"] = bias
    return held


class LoraTuner(Tuner):
    """LoRA layers in a model, one around each target module."""

    merges = True

    def __init__(self, model: nn.Module, bank: AdapterBank) -> None:
        super().__init__(model, bank)
        self._biased: str | None = None  # the adapter that trains biases of the base model

    def resolved(self, config: LoraConfig) -> LoraConfig:
        """Targets as names or one expression."""
        if config.target_modules is None:
            layers = _layers_of(self.model)
            names = {path.rpartition(".")[2] for path in layers}
            found = next((list(t) for t in _DEFAULT_TARGETS if names.issuperset(t)), None)
            if found is None:
                raise ValueError(
                    f"target_modules is None, and a {type(self.model).__name__} has none of the usual names of W_Q and "
                    f"W_V; name some of its layers: {', '.join(sorted(names))}"
                )
            config.target_modules = found
            chosen = {path for path, _ in modules_of(self.model) if matches(config, path)}
            held = [path for path in layers if path.rpartition(".")[0] in chosen]
            if held:  # some of that name are no layers but have one, as in Kyutai's decoder and Gemma 4's encoders
                config.target_modules = names_of(held + [path for path in layers if path in chosen], self.model)
        elif config.target_modules == ALL_LINEAR:
            config.target_modules = _all_linear(self.model, config)
        config.layers_pattern = config.layers_pattern or self._lists_of_layers(config)
        return config

    def _lists_of_layers(self, config: LoraConfig) -> list[str] | None:
        """The names of the lists that ``layers_to_transform`` numbers where one is at the model's root, which PEFT
        finds by its name alone."""
        if isinstance(config.target_modules, str) or config.layers_to_transform in (None, []):
            return None
        numbered = [_NUMBERED.match(path) for path, _ in modules_of(self.model) if matches(config, path)]
        names = dict.fromkeys(found[1] for found in numbered if found)
        return list(names) if any(found and found.start(1) == 0 for found in numbered) else None

    def at_todays_paths(
        self, config: LoraConfig | None, values: Mapping[str, Tensor]
    ) -> tuple[LoraConfig | None, Mapping[str, Tensor]]:
        from .lora_moved import at_todays_paths

        return at_todays_paths(config, values, self.model, self.PREFIX)

    def expected(self, config: LoraConfig, values: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
        targets = find_targets(config, self.model, strict=False)
        shapes = {}
        for path, module in targets.items():
            own = expected_tensors(base_of(module), config.rank_of(path), config.use_dora, config.lora_bias)
            shapes |= {f"{self.PREFIX}{path}.{suffix}": shape for suffix, shape in own.items()}
        biases = _biases(config, self.model, targets)
        shapes |= {self.PREFIX + key: tuple(bias.shape) for key, bias in biases.items()}
        for place in self._places(config):
            dim = base_of(place.layers[place.path]).weight.shape[1]
            shapes[f"{self.PREFIX}{place.path}.{DELTA}"] = len(place.indices), dim
        return shapes

    def _places(self, config: LoraConfig) -> list[Place]:
        return find_places(config.trainable_token_indices, self.model)

    def without_duplicates(self, config: LoraConfig, values: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """PEFT stores the rows of a tied head as well where it stores embeddings."""
        held = dict(values)
        for place in self._places(config):
            first, *again = (f"{self.PREFIX}{path}.{DELTA}" for path in place.layers)
            for key in again:
                rows = held.pop(key, None)
                if rows is not None and first in held and not torch.equal(rows, held[first]):
                    raise ValueError(f"{key} and {first} differ; they are rows of one weight, and must be the same")
        return held

    def embeddings(self, config: LoraConfig) -> dict[str, Tensor]:
        tokens = {path for place in self._places(config) for path in place.layers}

        def inside(path: str) -> str:
            if path in tokens:
                return ".token_adapter.base_layer"
            return ".base_layer" if matches(config, path) else ""

        return own_embeddings(self.model, config, self.PREFIX, inside)

    def attach(
        self,
        name: str,
        config: LoraConfig,
        *,
        strict: bool,
        values: Mapping[str, Tensor] | None,
        autocast_adapter_dtype: bool,
    ) -> None:
        targets = find_targets(config, self.model, strict)
        self._warn_of_names(config, targets)
        if config.bias != "none" and self._biased:
            raise ValueError("bias is not 'none' for a second adapter; the base model's biases can follow only one")
        if config.changes_base:
            self._check_ends(config, targets)
        undo: list[tuple[LoraLayer, Any]] = []
        config.fan_in_fan_out = any(layer_class(base_of(m)) is LoraConv1D for m in targets.values())
        try:
            for path, module in targets.items():
                layer = self._layer(path, module)
                initial = self._initial(config, path, layer)
                if config.changes_base:
                    undo.append((layer, layer.stored_weight))
                layer.add_adapter(
                    name,
                    config.rank_of(path),
                    config.alpha_of(path),
                    dropout=config.lora_dropout,
                    use_rslora=config.use_rslora,
                    use_dora=config.use_dora,
                    lora_bias=config.lora_bias,
                    dtype=adapter_dtype(layer.base_layer, autocast_adapter_dtype),
                    initial=initial,
                    empty=values is not None,
                )
            for place in self._places(config):
                put_tokens(self.model, self.bank, name, place, autocast_adapter_dtype)
        except BaseException:
            for layer, weight in reversed(undo):
                layer.exchange(weight)
            raise
        if config.bias != "none":
            self._biased = name

    def _warn_of_names(self, config: LoraConfig, targets: Mapping[str, nn.Module]) -> None:
        """Say which names in ``config`` change nothing."""
        if missing := unmatched(config.target_modules, dict(modules_of(self.model))):
            meant = hint(missing, self.model, _layers_of(self.model))
            warnings.warn(f"target_modules {missing} match no module. {meant}", stacklevel=4)
        if hidden := [path for path in inside_saved(self.model) if matches(config, path)]:
            said = f"target_modules match {hidden}, which modules_to_save of another adapter holds; they are left out"
            warnings.warn(said, stacklevel=4)
        if uncalled := [path for path in targets if never_calls(self.model, path)]:
            said = f"target_modules match {uncalled}, whose weights are read without calling the layers in their places"
            warnings.warn(f"{said}: LoRA has no effect, and is left out of merges", stacklevel=4)
        for field_name in ("rank_pattern", "alpha_pattern"):
            unused = [key for key in getattr(config, field_name) if not any(_fits(key, path) for path in targets)]
            if unused:
                warnings.warn(f"{field_name} {unused} match no target, and change nothing", stacklevel=4)

    def _check_ends(self, config: LoraConfig, targets: Mapping[str, nn.Module]) -> None:
        """Where embedding and head share a weight, an adapter that changes the head's changes the embedding too."""
        heads = [end for end in tied_ends(self.model) if not isinstance(end, nn.Embedding)]
        path = next((path for path, m in targets.items() if base_of(m) in heads), None)
        if path is not None:
            raise ValueError(
                f"init_lora_weights is {config.init_lora_weights!r}, which changes the weight of {path}; embedding and "
                "output head share it. Leave it out of target_modules, or untie them"
            )

    def _layer(self, path: str, module: nn.Module) -> LoraLayer:
        """The layer with LoRA at ``path``, around ``module`` where that is none yet."""
        if isinstance(module, TrainableTokens):
            raise ValueError(f"target_modules matches {path!r}, of which another adapter trains tokens; leave it out")
        if isinstance(module, LoraLayer):
            return module
        layer = layer_class(module)(module, self.bank).train(module.training)
        layer.called = not never_calls(self.model, path)
        put(self.model, path, layer)
        self.bank.layers[path] = layer
        self.bank.forget()
        return layer

    @staticmethod
    def _initial(config: LoraConfig, path: str, layer: LoraLayer) -> Any:
        """What :meth:`LoraLayer.add_adapter` takes as ``initial``.

        Raises:
            ValueError: ``config`` asks for initial values that ``layer`` cannot give.
        """
        if layer.merged and (config.changes_base or config.use_dora):
            raise ValueError(
                f"{layer.merged_adapters} are merged, and the new adapter starts from the base weights; call "
                "unmerge_adapter() first"
            )
        if config.changes_base and layer.r:
            raise ValueError(
                f"init_lora_weights is {config.init_lora_weights!r}, which changes the base weight of {path!r}; "
                "other adapters depend on it, so it must be the first adapter"
            )
        if config.init_lora_weights == "loftq" and isinstance(layer.base_layer, Linear4bit):
            raise ValueError(
                f"init_lora_weights is 'loftq', but {path!r} is quantized already and what was lost is unknown; start "
                "from the model in 16 or 32 bits (the base weights become values that NF4 holds exactly), or, over the "
                "base that it left so, give the adapter the configuration with init_lora_weights=True"
            )
        if config.init_lora_weights == "loftq" and isinstance(layer.base_layer, nn.Embedding):
            raise ValueError(
                f"init_lora_weights is 'loftq', and target_modules holds the embedding {path!r}, which stays in "
                "full precision; leave it out"
            )
        if config.changes_base and isinstance(layer.base_layer, nn.Embedding):
            return True  # as in PEFT: nothing multiplies by a table, so no product is to be approximated
        if config.changes_base and layer.weight.is_meta:
            raise ValueError(
                f"init_lora_weights is {config.init_lora_weights!r}, which starts from the weight of {path!r}, and "
                "that is on the meta device, where there are no values; give the adapter to a model that lies in memory"
            )
        return config.initial()

    def tensors(self, name: str, config: LoraConfig) -> dict[str, Tensor]:
        held, layers = {}, self.layers(name)
        for path, layer in layers.items():
            held |= {f"{self.PREFIX}{path}.{suffix}": t for suffix, t in layer.tensors(name).items()}
        held |= {self.PREFIX + key: bias for key, bias in _biases(config, self.model, layers).items()}
        tokens = {path: rows.values[name] for path, rows in self.bank.tokens.items() if name in rows.values}
        return held | {f"{self.PREFIX}{path}.{DELTA}": t for path, t in tokens.items()}

    def layers(self, name: str) -> dict[str, LoraLayer]:
        """Path → layer that has the adapter, where the user has put nothing else since."""
        held = {path: layer for path, layer in self.bank.layers.items() if name in layer.r}
        return {path: layer for path, layer in held.items() if at(self.model, path) is layer}

    def state(self, name: str, config: LoraConfig, save_embedding_layers: bool | str) -> dict[str, Tensor]:
        held = self.tensors(name, config)
        for path, layer in self.layers(name).items():
            r, (a, b) = layer.r[name], layer.KEYS
            if r == layer.capacity(name):
                continue
            # After a hot-swap to a smaller rank the rest is zero: what is saved is the adapter that was swapped in.
            for suffix in layer.tensors(name):
                key = f"{self.PREFIX}{path}.{suffix}"
                if r == 0:
                    del held[key]
                elif suffix == a:
                    held[key] = held[key][:r]
                elif suffix == b:
                    held[key] = held[key][:, :r]
        return held | self.saved_embeddings(config, save_embedding_layers)

    def saved_embeddings(self, config: LoraConfig, save: bool | str) -> dict[str, Tensor]:
        """The base embeddings that PEFT stores beside an adapter: those it targets, or all where there are more or
        fewer than the base model's folder says ("auto"); or all (True)."""
        if save is False:
            return {}
        targets = config.target_modules
        if config.trainable_token_indices is not None:
            targeted = False
        elif isinstance(targets, str):
            paths = [p for p, _ in modules_of(self.model) if ends_with(p, list(_EMBEDDING_NAMES))]
            targeted = any(re.fullmatch(targets, p) for p in paths)
        else:
            targeted = any(n in targets for n in _EMBEDDING_NAMES)
        if not targeted:
            return super().saved_embeddings(config, save)
        return {k: t for k, t in self.embeddings(config).items() if ".base_layer." in k}

    def check_same_layout(self, name: str, old: LoraConfig, new: LoraConfig, live: dict, expected: dict) -> None:
        self.check_parameters(name)
        if old.taken_from_base != new.taken_from_base:
            raise ValueError(
                f"adapter {name!r} has init_lora_weights {old.init_lora_weights!r}, and the values of one with "
                f"{new.init_lora_weights!r} are for other base weights; load these into a base model of their own"
            )
        for path, layer in self.layers(name).items():
            scaling = scaling_of(new.alpha_of(path), new.rank_of(path), new.use_rslora)
            if not math.isclose(scaling, layer.own_scaling(name)):
                raise ValueError(f"adapter {name!r} has another scaling; use hotswap_adapter, or delete it first")
        swapped = any(layer.r[name] != new.rank_of(path) for path, layer in self.layers(name).items())
        if swapped or live != expected:  # after a hot-swap the tensors may have more room than the adapter has
            raise ValueError(f"adapter {name!r} has other modules or ranks; use hotswap_adapter, or delete it first")
        self.check_same_tokens(name, old, new)

    def check_parameters(self, name: str) -> None:
        """Whether all is parameters that can be filled."""
        if computed := self._computed(name):
            raise ValueError(
                f"adapter {name!r} takes no new values: {computed} is computed from other parameters; remove the "
                "parametrization or pruning first"
            )

    def _computed(self, name: str) -> str | None:
        """The first of the adapter's tensors that is computed from other parameters, and has no place for values."""
        for path, layer in self.layers(name).items():
            for suffix, tensor in layer.tensors(name).items():
                if not isinstance(tensor, nn.Parameter):
                    return f"{path}.{suffix}"
        return None

    def check_same_tokens(self, name: str, old: LoraConfig, new: LoraConfig) -> None:
        held, asked = ({p.path: p.indices for p in self._places(config)} for config in (old, new))
        if held != asked:
            raise ValueError(f"trainable_token_indices is {asked}; adapter {name!r} has {held}, delete it first")

    def swaps_alike(self, name: str, old: LoraConfig, new: LoraConfig | None) -> bool:
        if new is None:
            if old.changes_base or old.bias != "none" or self._computed(name) is not None:
                return False
            layers = self.layers(name).values()
            whole = all(layer.r[name] == layer.capacity(name) and not layer.merged for layer in layers)
            return whole and not any(layer.is_rescaled(name) for layer in layers)
        return all(getattr(new, field) == getattr(old, field) for field in _SCALING_FIELDS + _KIND_FIELDS)

    def swap(
        self,
        name: str,
        old: LoraConfig,
        new: LoraConfig | None,
        live: dict[str, Tensor],
        values: Mapping[str, Tensor],
        source: str,
    ) -> Callable[[], LoraConfig]:
        from .lora_swap import Swap

        return Swap(self, name, old, new, live, values, source).run

    def remove(self, name: str) -> None:
        for path, layer in list(self.bank.layers.items()):
            if name in layer.r:
                layer.remove_adapter(name)
            if not layer.r:
                put_back(self.model, path, layer, layer.base_layer)
                del self.bank.layers[path]
        take_tokens(self.model, self.bank, name)
        if self._biased == name:
            self._biased = None

    def unload(self) -> None:
        for path, layer in self.bank.layers.items():
            put_back(self.model, path, layer, layer.base_layer)
        self.bank.layers.clear()
        take_tokens(self.model, self.bank)
