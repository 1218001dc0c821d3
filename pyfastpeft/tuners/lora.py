"""LoRA (Hu et al. 2021) with rsLoRA, DoRA, PiSSA, OLoRA, LoftQ: configuration, where it attaches, its tensors."""

from __future__ import annotations

import copy
import difflib
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..adapters import BASE, AdapterBank
from ..nn.linear4bit import Linear4bit
from ..nn.lora import LoraConv1D, LoraLayer, LoraLinear, ModulesToSave, dense, expected_tensors, layer_class
from ..nn.lora_init import loftq, olora, pissa
from .base import PeftConfig, TaskType, register_method

ALL_LINEAR = "all-linear"
PREFIX = "base_model.model."
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
_HEADS = {
    TaskType.SEQ_CLS: ["classifier", "score"],
    TaskType.TOKEN_CLS: ["classifier", "score"],
    TaskType.QUESTION_ANS: ["qa_outputs"],
}
_EMBEDDING_NAMES = ("embed_tokens", "lm_head")


@register_method
@dataclass(kw_only=True)
class LoraConfig(PeftConfig):
    """Configuration of LoRA; names and meaning are PEFT's.

    Two defaults follow the literature's common practice instead of PEFT's table: ``lora_alpha`` is 2 · r (scaling 2),
    and ``target_modules`` are W_Q and W_V of every attention layer (Hu et al. 2021, section 7.1).

    Attributes:
        r: rank.
        lora_alpha: the update is scaled by ``lora_alpha / r``; None: 2 · r.
        lora_dropout: probability of dropping an input of the LoRA branch in training, below 1.
        target_modules: module names (the last parts of a path), one regular expression for whole paths,
            ``"all-linear"`` (every linear layer but the output head), or None: W_Q and W_V.
        exclude_modules: names or a regular expression of what is left out.
        layers_to_transform, layers_pattern: only these layer numbers; the name of the list that is numbered.
        rank_pattern, alpha_pattern: names or regular expressions → another rank, another alpha.
        modules_to_save: names of modules trained whole and saved with the adapter.
        bias: which biases of the base model train: "none", "all" or "lora_only" (those of the target modules).
        lora_bias: give B a bias.
        use_rslora: scale by ``lora_alpha / sqrt(r)``.
        use_dora: decompose into magnitude and direction (Liu et al. 2024).
        init_lora_weights: True (A Kaiming-uniform, B zero), False (neither zero), "gaussian", "pissa",
            "pissa_niter_<n>", "olora" or "loftq"; the last four also change the base weight.
        loftq_config: ``{"loftq_bits": 4, "loftq_iter": n}``.
        fan_in_fan_out: kept for PEFT's files; the orientation is read from the layer's type.
    """

    peft_type: ClassVar[str] = "LORA"
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
        "trainable_token_indices": None,
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
    modules_to_save: list[str] | None = None
    bias: str = "none"
    lora_bias: bool = False
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: bool | str = True
    loftq_config: dict[str, int] = field(default_factory=dict)
    fan_in_fan_out: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_rank("r", self.r)
        self.lora_alpha = 2 * self.r if self.lora_alpha is None else self.lora_alpha
        self.rank_pattern, self.alpha_pattern = dict(self.rank_pattern or {}), dict(self.alpha_pattern or {})
        for key, rank in self.rank_pattern.items():
            _check_rank(f"rank_pattern[{key!r}]", rank)
        for name, alpha in {"lora_alpha": self.lora_alpha, **self.alpha_pattern}.items():
            if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
                raise ValueError(f"{name} is {alpha!r}; it must be a number")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout is {self.lora_dropout!r}; it must be at least 0 and below 1")
        if self.bias not in ("none", "all", "lora_only"):
            raise ValueError(f"bias is {self.bias!r}; it must be 'none', 'all' or 'lora_only'")
        for name in ("target_modules", "exclude_modules", "modules_to_save"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                value = sorted(value) if isinstance(value, (set, frozenset)) else list(value)
                setattr(self, name, value)
            if name != "modules_to_save" and isinstance(value, str) and value != ALL_LINEAR:
                _check_pattern(name, value)
        if isinstance(self.modules_to_save, str):
            raise ValueError(f"modules_to_save is {self.modules_to_save!r}; it must be a list of names")
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            raise ValueError("layers_to_transform is given; target_modules must then be a list of names, not a string")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern is given; it needs layers_to_transform, the numbers of the layers")
        self._check_init()

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
        loftq_config = dict(self.loftq_config or {})
        if init == "loftq":
            loftq_config = {"loftq_bits": 4, "loftq_iter": 1} | loftq_config
            if loftq_config["loftq_bits"] != 4:
                raise ValueError(f"loftq_config['loftq_bits'] is {loftq_config['loftq_bits']!r}; it must be 4")
            if not isinstance(loftq_config["loftq_iter"], int) or loftq_config["loftq_iter"] < 1:
                raise ValueError(f"loftq_config['loftq_iter'] is {loftq_config['loftq_iter']!r}; it must be 1 or more")
        self.loftq_config = loftq_config

    @classmethod
    def _from_file(cls, values: dict[str, Any]) -> dict[str, Any]:
        if values.get("init_lora_weights") in ("eva", "orthogonal"):
            # Only the initial values differ, and those are about to be loaded.
            values["init_lora_weights"] = True
        return values

    @property
    def changes_base(self) -> bool:
        """Whether attaching this adapter changes the base weights it sits on."""
        return isinstance(self.init_lora_weights, str) and self.init_lora_weights != "gaussian"

    def rank_of(self, path: str) -> int:
        return _by_pattern(self.rank_pattern, path, self.r)

    def alpha_of(self, path: str) -> float:
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


def _check_rank(name: str, rank: int) -> None:
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"{name} is {rank!r}; a rank must be an integer of at least 1")


def _check_pattern(name: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{name} is {pattern!r}; it must be a regular expression: {error}") from None


def _by_pattern(patterns: dict[str, Any], path: str, default: Any) -> Any:
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return default


def _ends_with(path: str, names: list[str]) -> bool:
    return any(path == name or path.endswith(f".{name}") for name in names)


def modules_of(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of the base model's own modules: a wrapped one is given as its wrapper, and not looked into."""
    seen: set[int] = set()

    def walk(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
        for name, child in module.named_children():
            if id(child) not in seen:
                seen.add(id(child))
                child_path = f"{path}.{name}" if path else name
                yield child_path, child
                if not isinstance(child, (LoraLayer, ModulesToSave)):
                    yield from walk(child, child_path)

    yield from walk(model, prefix)


def _base(module: nn.Module) -> nn.Module:
    return module.base_layer if isinstance(module, LoraLayer) else module


def matches(config: LoraConfig, path: str) -> bool:
    """Whether the module at ``path`` is a target of ``config`` (whose ``target_modules`` are resolved)."""
    excluded = config.exclude_modules
    if excluded:
        if isinstance(excluded, str):
            if re.fullmatch(excluded, path):
                return False
        elif _ends_with(path, excluded):
            return False
    if any(re.match(rf"(^|.*\.){name}($|\..*)", path) for name in config.modules_to_save or ()):
        return False
    if isinstance(config.target_modules, str):
        return re.fullmatch(config.target_modules, path) is not None
    if path in config.target_modules:
        return True
    if not _ends_with(path, config.target_modules):
        return False
    wanted = config.layers_to_transform
    if wanted is None or wanted == []:
        return True
    patterns = config.layers_pattern or [r"[^.]*"]
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        found = re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", path)
        if found:
            return int(found[1]) in ([wanted] if isinstance(wanted, int) else wanted)
    return False


def resolved(config: LoraConfig, model: nn.Module) -> LoraConfig:
    """A copy of ``config`` for ``model``: targets as names or one expression, the task's head in ``modules_to_save``.

    Raises:
        ValueError: no default targets are known for the model.
    """
    config = copy.deepcopy(config)
    heads = _HEADS.get(config.task_type)
    if heads is not None:
        config.modules_to_save = [*(config.modules_to_save or ()), *heads]
        config.modules_to_save = list(dict.fromkeys(config.modules_to_save))
    if config.target_modules is None:
        names = {path.rpartition(".")[2] for path, m in modules_of(model) if layer_class(_base(m)) is not None}
        found = next((list(t) for t in _DEFAULT_TARGETS if names.issuperset(t)), None)
        if found is None:
            raise ValueError(
                f"target_modules is None, and a {type(model).__name__} has none of the usual names of W_Q and W_V; "
                f"name some of its layers: {', '.join(sorted(names))}"
            )
        config.target_modules = found
    elif config.target_modules == ALL_LINEAR:
        config.target_modules = _all_linear(model, config)
    return config


def _all_linear(model: nn.Module, config: LoraConfig) -> list[str]:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None and config.task_type == TaskType.SEQ_CLS:
        head = next((h for h in (getattr(model, n, None) for n in ("score", "classifier")) if h is not None), None)
    linear = []
    for path, module in modules_of(model):
        base = _base(module)
        if layer_class(base) is not None and not isinstance(base, nn.Embedding) and module is not head:
            linear.append(path)
    return sorted(linear)


def find_targets(config: LoraConfig, model: nn.Module, strict: bool) -> dict[str, nn.Module]:
    """Path → module for every target of a resolved ``config``.

    Args:
        strict: a name in ``target_modules`` that no module has is an error, not a warning.

    Raises:
        ValueError: nothing matches, a name matches nothing (``strict``), or a match cannot carry LoRA.
    """
    candidates = dict(modules_of(model))
    targets = {path: m for path, m in candidates.items() if matches(config, path)}
    unmatched: list[str] = []
    if isinstance(config.target_modules, list):
        unmatched = [n for n in config.target_modules if not any(_ends_with(path, [n]) for path in candidates)]
    if not targets or (unmatched and strict):
        asked = unmatched if unmatched else config.target_modules
        raise ValueError(
            f"target_modules {asked!r} matches no module of {type(model).__name__}. {_hint(asked, candidates)}"
        )
    if unmatched:
        warnings.warn(f"target_modules {unmatched} match no module. {_hint(unmatched, candidates)}", stacklevel=3)
    wrong = {p: m for p, m in targets.items() if layer_class(_base(m)) is None}
    if wrong:
        path, module = next(iter(wrong.items()))
        raise ValueError(
            f"target_modules matches {path!r}, a {type(module).__name__}; LoRA needs a Linear, Conv1D or Embedding"
        )
    return targets


def _hint(asked: list[str] | str, candidates: dict[str, nn.Module]) -> str:
    names = sorted({p.rpartition(".")[2] for p, m in candidates.items() if layer_class(_base(m)) is not None})
    close: list[str] = []
    for name in [asked] if isinstance(asked, str) else asked:
        close += difflib.get_close_matches(name.rpartition(".")[2], names, n=3, cutoff=0.5)
    if close:
        return f"Close matches: {', '.join(dict.fromkeys(close))}"
    return f"Layers that can be targets: {', '.join(names)}"


def find_saved(config: LoraConfig, model: nn.Module) -> dict[str, nn.Module]:
    """Path → module for every module of ``modules_to_save``; a head the task adds need not exist."""
    wanted = config.modules_to_save or []
    found = {path: m for path, m in modules_of(model) if _ends_with(path, wanted)}
    added = _HEADS.get(config.task_type, [])
    missing = [n for n in wanted if n not in added and not any(_ends_with(path, [n]) for path in found)]
    if missing:
        names = sorted({path.rpartition(".")[2] for path, _ in modules_of(model)})
        close = [c for n in missing for c in difflib.get_close_matches(n, names, n=3, cutoff=0.5)]
        raise ValueError(f"modules_to_save {missing} match no module of the model. Close matches: {close}")
    return found


def _bias_names(config: LoraConfig, model: nn.Module, targets: dict[str, nn.Module]) -> list[str]:
    """Keys, without the prefix, of the base biases that train with the adapter."""
    if config.bias == "none":
        return []
    if config.bias == "lora_only":
        return [f"{p}.base_layer.bias" for p, m in targets.items() if getattr(_base(m), "bias", None) is not None]
    names = []
    for path, module in [("", model), *modules_of(model)]:
        held = _base(module)
        if isinstance(held, ModulesToSave) or "bias" not in held._parameters or held._parameters["bias"] is None:
            continue
        wrapped = path in targets or isinstance(module, LoraLayer)
        names.append(f"{path}.base_layer.bias" if wrapped else f"{path}.bias" if path else "bias")
    return names


class LoraModel(nn.Module):
    """A model with LoRA layers in it. ``model`` is the base model, changed in place."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.bank = AdapterBank()
        self.configs: dict[str, LoraConfig] = {}
        for parameter in model.parameters():
            parameter.requires_grad_(False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(self.model, name)

    def expected(self, config: LoraConfig, strict: bool) -> dict[str, tuple[int, ...]]:
        """Key → shape of what a file for a resolved ``config`` must hold; nothing is changed."""
        targets = find_targets(config, self.model, strict)
        shapes = {}
        for path, module in targets.items():
            own = expected_tensors(_base(module), config.rank_of(path), config.use_dora, config.lora_bias)
            shapes |= {f"{PREFIX}{path}.{suffix}": shape for suffix, shape in own.items()}
        for path, module in find_saved(config, self.model).items():
            source = module.original_module if isinstance(module, ModulesToSave) else module
            held = _trainable_state(source)
            shapes |= {f"{PREFIX}{path}.{key}": tuple(t.shape) for key, t in held.items()}
        held = dict(self.model.named_parameters())
        for name in _bias_names(config, self.model, targets):
            bias = held[name] if name in held else held[name.replace(".base_layer.bias", ".bias")]
            shapes[PREFIX + name] = tuple(bias.shape)
        return shapes

    def add(
        self, name: str, config: LoraConfig, *, strict: bool, empty: bool = False, autocast_adapter_dtype: bool = True
    ) -> None:
        """Attach an adapter for a resolved ``config``; on any error the model is as it was.

        Args:
            strict: see :func:`find_targets`.
            empty: leave the values to be loaded.
            autocast_adapter_dtype: keep adapters in float32 over a 16-bit base; else in the base's dtype.
        """
        _check_name(name, self.configs)
        targets = find_targets(config, self.model, strict)
        saved = find_saved(config, self.model)
        if config.bias != "none" and any(c.bias != "none" for c in self.configs.values()):
            raise ValueError("bias is not 'none' for a second adapter; the base model's biases can follow only one")
        biases = _bias_names(config, self.model, targets)
        undo: list[tuple[LoraLayer, Any]] = []
        config.fan_in_fan_out = any(layer_class(_base(m)) is LoraConv1D for m in targets.values())
        self.configs[name] = config
        try:
            for path, module in targets.items():
                self._attach(name, config, path, module, empty, autocast_adapter_dtype, undo)
            for path, module in saved.items():
                self._keep(name, path, module)
        except BaseException:
            for layer, weight in reversed(undo):
                layer.put_back(weight)
            self._detach(name)
            raise
        parameters = [t for held in self._holders(name) for t in held.values()]
        self.bank.hold(name, parameters + [self.model.get_parameter(b) for b in biases])

    def _attach(
        self,
        name: str,
        config: LoraConfig,
        path: str,
        module: nn.Module,
        empty: bool,
        autocast_adapter_dtype: bool,
        undo: list[tuple[LoraLayer, Any]],
    ) -> None:
        layer = module
        if not isinstance(module, LoraLayer):
            layer = layer_class(module)(module, self.bank).train(module.training)
            self._put(path, layer)
            self.bank.layers[path] = layer
            self.bank.forget()
        if layer.merged and (config.changes_base or config.use_dora):
            raise ValueError(
                f"{layer.merged_adapters} are merged, and the new adapter starts from the base weights; call "
                "unmerge_adapter() first"
            )
        if config.changes_base:
            if layer.r:
                raise ValueError(
                    f"init_lora_weights is {config.init_lora_weights!r}, which changes the base weight of {path!r}; "
                    "other adapters depend on it, so it must be the first adapter"
                )
            undo.append((layer, layer.base_layer.packed if isinstance(layer.base_layer, Linear4bit) else layer.weight))
        initial = config.initial()
        if config.init_lora_weights == "loftq" and isinstance(layer.base_layer, Linear4bit):
            raise ValueError(
                f"init_lora_weights is 'loftq', but {path!r} is quantized already and what was lost is unknown; start "
                "from the model in 16 or 32 bits (the base weights become values that NF4 holds exactly)"
            )
        if callable(initial) and isinstance(layer.base_layer, nn.Embedding):
            raise ValueError(
                f"init_lora_weights is {config.init_lora_weights!r}, and target_modules holds the embedding {path!r}; "
                "an embedding starts with True, False or 'gaussian'"
            )
        dtype = _adapter_dtype(layer.base_layer, autocast_adapter_dtype)
        layer.add_adapter(
            name,
            config.rank_of(path),
            config.alpha_of(path),
            dropout=config.lora_dropout,
            use_rslora=config.use_rslora,
            use_dora=config.use_dora,
            lora_bias=config.lora_bias,
            dtype=dtype,
            initial=initial,
            empty=empty,
        )

    def _keep(self, name: str, path: str, module: nn.Module) -> None:
        wrapper = module
        if isinstance(module, LoraLayer):
            raise ValueError(f"modules_to_save holds {path!r}, which carries LoRA of another adapter")
        if not isinstance(module, ModulesToSave):
            wrapper = ModulesToSave(module, self.bank).train(module.training)
            self._put(path, wrapper)
            self.bank.wrappers[path] = wrapper
            self.bank.forget()
        wrapper.modules_to_save[name] = _trainable_copy(wrapper.original_module)

    def _put(self, path: str, module: nn.Module) -> None:
        parent, _, attribute = path.rpartition(".")
        setattr(self.model.get_submodule(parent), attribute, module)

    def _holders(self, name: str) -> Iterator[dict[str, Tensor]]:
        for layer in self.bank.layers.values():
            if name in layer.r:
                yield layer.tensors(name)
        for wrapper in self.bank.wrappers.values():
            if name in wrapper.modules_to_save:
                yield dict(wrapper.modules_to_save[name].named_parameters())

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The adapter's live parameters (and buffers of saved modules) under the keys of PEFT's files."""
        held = {}
        for path, layer in self.bank.layers.items():
            if name in layer.r:
                held |= {f"{PREFIX}{path}.{suffix}": t for suffix, t in layer.tensors(name).items()}
        for path, wrapper in self.bank.wrappers.items():
            if name in wrapper.modules_to_save:
                state = wrapper.modules_to_save[name].state_dict(keep_vars=True)
                held |= {f"{PREFIX}{path}.{key}": t for key, t in state.items()}
        config = self.configs[name]
        if config.bias != "none":
            own = {p: layer for p, layer in self.bank.layers.items() if name in layer.r}
            held |= {PREFIX + b: self.model.get_parameter(b) for b in _bias_names(config, self.model, own)}
        return held

    def saved_embeddings(self, name: str, save: bool | str) -> dict[str, Tensor]:
        """The base embeddings that PEFT stores beside an adapter: those it targets ("auto"), or all (True)."""
        config = self.configs[name]
        targets = config.target_modules
        if isinstance(targets, str):
            paths = [p for p, _ in modules_of(self.model) if _ends_with(p, list(_EMBEDDING_NAMES))]
            targeted = any(re.fullmatch(targets, p) for p in paths)
        else:
            targeted = any(n in targets for n in _EMBEDDING_NAMES)
        if save is False or (save == "auto" and not targeted) or not hasattr(self.model, "get_input_embeddings"):
            return {}
        held = self.embeddings(config)
        if targeted:
            held = {k: t for k, t in held.items() if ".base_layer." in k}
        return held

    def remove(self, name: str) -> None:
        """Take an adapter out; where it was the last on a layer, the plain module stands there again."""
        self.bank.release(name)
        self._detach(name)

    def _detach(self, name: str) -> None:
        for path, layer in list(self.bank.layers.items()):
            if name in layer.r:
                layer.remove_adapter(name)
            if not layer.r:
                self._put(path, layer.base_layer)
                del self.bank.layers[path]
        for path, wrapper in list(self.bank.wrappers.items()):
            if name in wrapper.modules_to_save:
                del wrapper.modules_to_save[name]
            if not wrapper.modules_to_save:
                self._put(path, wrapper.original_module)
                del self.bank.wrappers[path]
        self.bank.forget()
        self.configs.pop(name, None)

    def embeddings(self, config: LoraConfig) -> dict[str, Tensor]:
        """The base embeddings under the keys that a file of PEFT's may hold them by (see :meth:`saved_embeddings`)."""
        if not hasattr(self.model, "get_input_embeddings"):
            return {}
        held = {}
        ends = [e for e in (self.model.get_input_embeddings(), self.model.get_output_embeddings()) if e is not None]
        for path, module in modules_of(self.model):
            base = _base(module)
            if any(module is e or base is e for e in ends) and isinstance(base, (nn.Linear, nn.Embedding)):
                middle = ".base_layer" if base is not module or matches(config, path) else ""
                if not isinstance(base, Linear4bit):
                    held |= {f"{PREFIX}{path}{middle}.{k}": t for k, t in base.named_parameters()}
        return held

    def merge_and_unload(
        self, names: tuple[str, ...], safe: bool, dequantize: bool, dtype: torch.dtype | None
    ) -> nn.Module:
        """See :meth:`PeftModel.merge_and_unload`."""
        for layer in self.bank.layers.values():
            if dequantize and isinstance(layer, LoraLinear):
                layer.merge_dense(names, safe, dtype)
            else:
                layer.merge(names, safe)
        if dequantize:
            dequantize_model(self.model, dtype)
        return self.unload(names)

    def unload(self, names: tuple[str, ...]) -> nn.Module:
        """The base model without any wrapper; modules kept by ``names`` stand in the place of the originals."""
        tied = _tied(self.model)
        for path, layer in self.bank.layers.items():
            self._put(path, layer.base_layer)
        for path, wrapper in self.bank.wrappers.items():
            kept = wrapper.plan(names)
            self._put(path, wrapper.original_module if kept is None else kept)
        self.bank.layers.clear()
        self.bank.wrappers.clear()
        if tied and not _tied(self.model):
            self.model.config.tie_word_embeddings = False
        return self.model


def _tied(model: nn.Module) -> bool:
    if not (hasattr(model, "get_output_embeddings") and getattr(model.config, "tie_word_embeddings", False)):
        return False
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    return all(e is not None for e in ends) and ends[0].weight is ends[1].weight


def _check_name(name: str, taken: dict[str, LoraConfig]) -> None:
    if (
        not isinstance(name, str)
        or not re.fullmatch(r"[^./\\\s]+", name)
        or name == BASE
        or hasattr(nn.ModuleDict, name)
    ):
        raise ValueError(
            f"adapter_name is {name!r}; it must be a word without dots, slashes or spaces, and not {BASE!r} or "
            "the name of a method of torch.nn.ModuleDict"
        )
    if name in taken:
        raise ValueError(f"adapter_name is {name!r}, which this model has already; delete it first or choose another")


def _adapter_dtype(base: nn.Module, autocast_adapter_dtype: bool) -> torch.dtype:
    if isinstance(base, Linear4bit):
        dtype = base.packed.dtype
    else:
        dtype = base.weight.dtype if base.weight.is_floating_point() else torch.float32
    return torch.float32 if autocast_adapter_dtype and dtype in (torch.float16, torch.bfloat16) else dtype


def _trainable_copy(module: nn.Module) -> nn.Module:
    """A copy whose every parameter can train: 4-bit layers in it become full precision."""
    if isinstance(module, Linear4bit):
        return dense(module)
    module = copy.deepcopy(module)
    for path, child in list(module.named_modules()):
        if isinstance(child, Linear4bit):
            parent, _, attribute = path.rpartition(".")
            setattr(module.get_submodule(parent), attribute, dense(child))
    return module


def _trainable_state(module: nn.Module) -> dict[str, Tensor]:
    """The state dict that :func:`_trainable_copy` would have, without making it."""
    state = {}
    for path, child in module.named_modules():
        prefix = f"{path}." if path else ""
        if isinstance(child, Linear4bit):
            state[f"{prefix}weight"] = torch.empty(child.out_features, child.in_features, device="meta")
            if child.bias is not None:
                state[f"{prefix}bias"] = child.bias
        else:
            own = {k: t for k, t in child._parameters.items() if t is not None}
            own |= {
                k: t for k, t in child._buffers.items() if t is not None and k not in child._non_persistent_buffers_set
            }
            state |= {prefix + k: t for k, t in own.items()}
    return state


def dequantize_model(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Replace every :class:`Linear4bit` of ``model`` by an ``nn.Linear``, one at a time, and forget the quantization.

    Args:
        dtype: default: the one each weight was quantized from.
    """
    for path, module in list(model.named_modules()):
        if isinstance(module, Linear4bit):
            parent, _, attribute = path.rpartition(".")
            setattr(model.get_submodule(parent), attribute, dense(module, dtype))
    if getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer = None
        model.is_quantized = False
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
