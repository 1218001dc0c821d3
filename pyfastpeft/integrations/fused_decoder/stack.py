"""The layers of a decoder as one compiled stack: for which there is one, and until when it holds."""

from __future__ import annotations

import math
import operator
import sys
import weakref
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.activations import ACT2FN
from transformers.cache_utils import DynamicLayer, StaticLayer
from transformers.masking_utils import create_sliding_window_causal_mask

from ...adapters import AdapterBank, Rows
from ...caching import registered, stamp_of
from ...formats.handles import DecoderHandle
from ...formats.packed import FLOATS
from ...nn import Linear4bit
from ...nn.bottleneck import ACTIVATIONS, Bottleneck, BottleneckLayer
from ...nn.hooks import GLOBAL_HOOKS
from ...nn.lora import LoraLinear
from ...ops import PackedLora
from ...ops.backends import Backend, choose_attention, choose_plain, is_plain, native
from ...ops.dense import FEW_ROWS, outruns_torch
from ...ops.linear_4bit import of_pairs, takes_int8
from ..collecting import collects
from ..forwards import ModuleForward
from ..fused_layers import (
    OF_LLAMA,
    ROPE,
    SILUS,
    Kinds,
    has_llamas,
    kernelized,
    kinds_of,
    written_in_transformers,
)
from .rooms import tokens_kept

_GELUS = kinds_of(ACT2FN["gelu_pytorch_tanh"])


@dataclass(frozen=True)
class _Family:
    """How transformers writes the decoders of a family, where it is not as it writes Llama's."""

    name: str  # with which the names of its classes begin
    attention: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    mlp: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    activation: str = "act_fn"
    activations: Kinds = SILUS
    norms: tuple[str, str] = ("input_layernorm", "post_attention_layernorm")  # before attention and MLP
    head_norms: tuple[str, ...] = ()  # of queries and keys
    added_norms: tuple[str, ...] = ()  # behind attention and MLP
    dropouts: tuple[str, ...] = ()
    eps: str = "variance_epsilon"
    own: str | None = None  # which function of OF_LLAMA it has of its own
    angles_of_types: bool = False  # each type of layers has its own

    @property
    def joined(self) -> bool:
        """Whether one layer projects to queries, keys and values, and one to gate and up."""
        return "qkv_proj" in self.attention

    @property
    def gemma(self) -> bool:
        """Whether norms scale by 1 + weight, and the gate goes through GELU."""
        return self.activations == _GELUS


_HEAD_NORMS = ("q_norm", "k_norm")
_FAMILIES = {
    "LlamaModel": _Family("Llama"),
    "MistralModel": _Family("Mistral"),
    "Qwen2Model": _Family("Qwen2"),
    "Qwen3Model": _Family("Qwen3", head_norms=_HEAD_NORMS),
    "SmolLM3Model": _Family("SmolLM3"),
    "GraniteModel": _Family("Granite"),
    "Phi3Model": _Family(
        "Phi3",
        attention=("qkv_proj", "o_proj"),
        mlp=("gate_up_proj", "down_proj"),
        activation="activation_fn",
        dropouts=("resid_attn_dropout", "resid_mlp_dropout"),
        own=ROPE,  # turns a part of each head
    ),
    "GemmaModel": _Family("Gemma", activations=_GELUS, eps="eps"),
    "Gemma3TextModel": _Family(
        "Gemma3",
        activations=_GELUS,
        eps="eps",
        norms=("input_layernorm", "pre_feedforward_layernorm"),
        head_norms=_HEAD_NORMS,
        added_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
        own="eager_attention_forward",  # can cap its scores
        angles_of_types=True,
    ),
}
_ACTIVATIONS = F.gelu, F.relu, F.silu, torch.tanh  # of bottlenecks, in the compiled order
_NO_BRANCH = None, None, 1.0, None  # A, B, scaling, and the factors of the columns or of each row's
_version_of = operator.attrgetter("_version")
_forward_of = operator.attrgetter("forward")
_dtype_of = operator.attrgetter("dtype")
MOST_ROWS = 64  # more take longer than by the layers (a dense model in bfloat16, 2048 wide, 128 rows: 1.06 times)
_WIDE = 2048  # torch is faster at more than FEW_ROWS by wider weights in bfloat16 (4096 x 4096: 0.91 of the time)


def family_of(module: nn.Module) -> _Family | None:
    known = type(module).__module__.startswith("transformers.models.")
    return _FAMILIES.get(type(module).__name__) if known else None


class _Unsupported(Exception):
    """This model is not what the fused stack computes."""


class _Lookups:
    """What was found in a model's dictionaries on the way to its tensors, and whether it would be found again."""

    def __init__(self) -> None:
        self.containers: list[dict] = []
        self.keys: list[str] = []
        self.found: list[Any] = []
        self.parameters: list[nn.Parameter] = []
        self.dtypes: list[torch.dtype] = []  # which a model that is cast changes in place
        self.modules: list[nn.Module] = []
        self.forwards: list[Any] = []  # of their classes
        self.hooks: list[Any] = [*GLOBAL_HOOKS]  # and whatever else must be empty

    def get(self, container: dict, key: str) -> Any:
        found = container.get(key)
        self.containers.append(container)
        self.keys.append(key)
        self.found.append(found)
        if isinstance(found, nn.Parameter):
            self.parameters.append(found)
            self.dtypes.append(found.dtype)
        return found

    def module(self, parent: nn.Module, name: str) -> nn.Module:
        module = self.get(parent._modules, name)
        forward = None if module is None else self.get(vars(module), "forward")
        if module is None or not (forward is None or isinstance(forward, ModuleForward)):
            raise _Unsupported
        self.hooks += (module._forward_hooks, module._forward_pre_hooks)
        self.forward(module)
        return module

    def forward(self, module: nn.Module) -> None:
        """That its class has this one, and it this class."""
        self.modules.append(module)
        self.forwards.append(type(module).forward)

    def hooked(self) -> bool:
        def idle(held: Any) -> bool:
            return isinstance(held, dict) and all(map(collects, held.values()))

        return not all(map(idle, filter(None, self.hooks)))

    def hold(self) -> bool:
        found = map(dict.get, self.containers, self.keys)
        forwards = map(_forward_of, map(type, self.modules))
        return (
            all(map(operator.is_, found, self.found))
            and all(map(operator.is_, forwards, self.forwards))
            and all(map(operator.is_, map(_dtype_of, self.parameters), self.dtypes))
        )


@dataclass
class _Parts:
    """What the operator takes of the layers, in their order."""

    norms: list[Tensor] = field(default_factory=list)
    head_norms: list[Tensor] = field(default_factory=list)
    added_norms: list[Tensor] = field(default_factory=list)
    angles: list[int] = field(default_factory=list)  # which of them; -1: none
    linears: list[tuple] = field(default_factory=list)  # the operator that adds each, and its arguments


class Stack:
    """A compiled stack, or the finding that there cannot be one, and the lookups on which that rests.

    Looking everything up again takes a tenth of a token's time. From one token to the next over the same cache that is
    done only after something was noticed: a hook, module or parameter that was registered anywhere, a change in the
    bank of adapters. A forward or a number that was put on a module is noticed by nothing and waits for the next cache:
    asking the modules for these alone takes a third of that time, as none of them is in the processor's caches by then.
    """

    def __init__(self, model: nn.Module) -> None:
        self.lookups = _Lookups()
        self.plans = _Lookups()  # what switching adapters exchanges, to and fro
        self.held: DecoderHandle | None = None
        self.most_rows = MOST_ROWS
        self.windows: list[int] = []  # of each layer, 0: none
        self.window = math.inf  # up to so many keys each layer sees all
        self.causal = True  # else of several tokens each sees those that follow
        self.angles: list[dict[str, str]] = []  # what the rotary embedding is asked for
        self.banks: set[AdapterBank] = set()
        self._attentions: list[dict] = []  # what each layer's attention holds, a prefix among it
        self._family, self._home = family_of(model), type(model).__module__
        self._copied: list[Tensor] = []  # of these the stack holds copies
        self._model = weakref.ref(model)
        self._watched = True  # peft's layers change without notice
        self._noticed: tuple | None = None
        self._caches: weakref.WeakSet[Any] = weakref.WeakSet()  # over which all was looked up since
        with suppress(_Unsupported, AttributeError):  # a module that lacks something is not a known one
            self._build(model)
        self._modes, self._thaws = self._modes_now(), self._thaws_now()
        self._stamp = stamp_of(self._copied)
        self._versions = 0 if self._stamp is None else sum(map(_version_of, self._copied))
        self._hooked = self.lookups.hooked()
        if self._hooked or self._stamp is None:  # of inference tensors nobody can tell that they were written to
            self.held = None

    def holds(self, cache: Any) -> bool:
        """Whether the model is still what this was built from."""
        if self._modes_now() != self._modes:  # first: the rows of each request may choose others
            return False
        noticed = RemovableHandle.next_id, registered(), self._model().training, *(b.version for b in self.banks)
        if self._watched and noticed == self._noticed and cache in self._caches and self._copies_hold():
            return True
        if not self.plans.hold() or self.lookups.hooked() is not self._hooked or not self.may_hold():
            return False
        if self.held is not None:
            if noticed != self._noticed:
                self._caches, self._noticed = weakref.WeakSet(), noticed
            self._caches.add(cache)
        return True

    def may_hold(self) -> bool:
        """Whether the model is what this was built from, but for the adapters in use and hooks, which come back."""
        return self.lookups.hold() and self._thaws_now() == self._thaws and stamp_of(self._copied) == self._stamp

    def _copies_hold(self) -> bool:
        """Whether nobody has written to what the stack holds copies of; versions only grow."""
        return sum(map(_version_of, self._copied)) == self._versions

    def prefix(self, batch: int) -> tuple[list[Tensor], list[Tensor], Tensor | None, Tensor | None] | None:
        """What the operator takes of the layers' prefixes; None where they are not of one kind."""
        holders = [state["_prefix"] for state in self._attentions if "_prefix" in state]
        held = [prefix for holder in holders if (prefix := holder.current(batch)) is not None]
        if not held:
            return [], [], None, None
        first = held[0]
        if (
            len(held) != len(self._attentions)
            or choose_attention(first.k) is not Backend.NATIVE
            or any(
                p.index is not first.index or p.lengths is not first.lengths or p.k.shape != first.k.shape for p in held
            )
        ):
            return None
        return [p.k.to(self.dtype) for p in held], [p.v.to(self.dtype) for p in held], first.index, first.lengths

    def serves(self, rows: int) -> bool:
        """Whether the rows that chose, where they did, stand for as many each."""
        return all(of_row is None or not any(of_row) or rows % len(of_row) == 0 for of_row in self._modes)

    def forgets(self, layers: list[DynamicLayer | StaticLayer], past: int) -> bool:
        """Whether a layer would see more of the ``past`` than its layer of the cache keeps."""
        return any(
            past > tokens_kept(layer) and not 0 < window <= layer.sliding_window
            for layer, window in zip(layers, self.windows, strict=True)
        )

    def _modes_now(self) -> list[tuple | None]:
        """What the rows choose, where they do: requests for the same have each a mode of their own."""
        return [bank.mode and bank.mode.of_row for bank in self.banks]

    def _thaws_now(self) -> list[int]:
        return [bank.thaws for bank in self.banks]

    def look_again(self) -> None:
        """At the next call, whatever was noticed."""
        self._noticed = None

    def _build(self, model: nn.Module) -> None:
        look, config, family = self.lookups, model.config, self._family
        self.dtype, self._eps = model.norm.weight.dtype, getattr(model.norm, family.eps)
        self.embedding_multiplier = look.get(vars(model), "embedding_multiplier")
        self._check_config(config)
        window = self._window_of(model)
        layers, types = look.module(model, "layers"), look.get(vars(config), "layer_types")
        parts, first = _Parts(), layers[0]
        for i in range(look.get(vars(config), "num_hidden_layers")):  # fewer where a generation exits early
            self._add_layer(parts, look.module(layers, str(i)), i, types, window, first)
        last_norm = self._norm(model, "norm")
        self.kv_heads, self.dim = config.num_key_value_heads, first.self_attn.head_dim
        self._check_angles(model.rotary_emb)
        try:
            heads = config.num_attention_heads, self.kv_heads, self.dim
            new = torch.ops.pyfastpeft.new_decoder.default
            norms = last_norm, parts.norms, parts.head_norms, parts.added_norms
            multiplier = vars(first).get("residual_multiplier")
            scales = first.self_attn.scaling, 1.0 if multiplier is None else multiplier
            kinds = family.joined, family.gemma
            held = DecoderHandle(new(*norms, parts.angles, self.windows, *heads, self._eps, *scales, *kinds))
            for add, *linear in parts.linears:
                add(held.number, *linear)
        except RuntimeError as error:
            raise _Unsupported from error
        self.held = held

    def _check_config(self, config: Any) -> None:
        self.lookups.get(vars(config), "is_causal")  # which few have
        if not (self.lookups.get(vars(config), "return_dict") and getattr(config, "is_causal", True)):
            raise _Unsupported
        self.causal = not self.lookups.get(vars(config), "use_bidirectional_attention")

    def _window_of(self, model: nn.Module) -> int | None:
        """The window of layers that have one, of a model all of whose functions are transformers'."""
        look, family = self.lookups, self._family
        look.forward(model)
        namespace = vars(sys.modules[self._home])
        functions = {name: look.get(namespace, name) for name in OF_LLAMA}
        own = written_in_transformers(functions.pop(family.own, None))
        # Masks make the windows: a family without these, as Llama's, has none, whatever its config says.
        slides = look.get(namespace, "create_sliding_window_causal_mask")
        if not (
            self._of_family(model, type(model).__name__.removeprefix(family.name))
            and has_llamas(namespace, tuple(functions))
            and (family.own is None or (own is not None and own.__globals__["__name__"] == self._home))
            and (slides is None or (slides is create_sliding_window_causal_mask and written_in_transformers(slides)))
        ):
            raise _Unsupported
        return None if slides is None else look.get(vars(model.config), "sliding_window")

    def _of_family(self, module: nn.Module, part: str) -> bool:
        kind = type(module)
        own = written_in_transformers(kind.forward)
        written = own is not None and own.__globals__["__name__"] == self._home
        return written and (kind.__module__, kind.__name__) == (self._home, f"{self._family.name}{part}")

    def _norm(self, parent: nn.Module, name: str) -> Tensor:
        module = self.lookups.module(parent, name)
        weight = self.lookups.get(module._parameters, "weight")
        if not self._of_family(module, "RMSNorm") or weight.dtype != self.dtype:
            raise _Unsupported
        if self.lookups.get(vars(module), self._family.eps) != self._eps:
            raise _Unsupported
        return weight

    def _add_layer(
        self, parts: _Parts, layer: nn.Module, i: int, types: list[str], window: int | None, first: nn.Module
    ) -> None:
        look, family = self.lookups, self._family
        attention, mlp = look.module(layer, "self_attn"), look.module(layer, "mlp")
        state = vars(attention)
        for function in (look.get(state, "_kernel_funcs") or {}).values():
            look.get(vars(function), "forward")  # by which one is exchanged
        if (
            kernelized(state)
            or not self._of_family(layer, "DecoderLayer")
            or not (self._of_family(attention, "Attention") and self._of_family(mlp, "MLP"))
            or not kinds_of(look.module(mlp, family.activation)) <= family.activations
            or look.get(state, "layer_idx") != i  # its place in the cache
            or look.get(state, "scaling") != first.self_attn.scaling
            or look.get(vars(layer), "residual_multiplier") != vars(first).get("residual_multiplier")
        ):
            raise _Unsupported
        if look.get(state, "attention_dropout") and look.get(state, "training"):
            raise _Unsupported
        if any(self._drops(look.module(layer, name)) for name in family.dropouts):
            raise _Unsupported
        self._attentions.append(state)
        # Mistral's slide all, under one mask; where the attention keeps a window, each type has a mask of its own.
        size = window if "sliding_window" not in state or types[i] == "sliding_attention" else None
        self.window = min(self.window, math.inf if size is None else size)
        self.windows.append(size or 0)
        turns = look.get(state, "use_rope") if "use_rope" in state else True  # SmolLM3's have it
        parts.angles.append(self._angles_of(types[i] if family.angles_of_types else None) if turns else -1)
        parts.norms += [self._norm(layer, name) for name in family.norms]
        parts.head_norms += [self._norm(attention, name) for name in family.head_norms]
        parts.added_norms += [self._norm(layer, name) for name in family.added_norms]
        for parent, names in ((attention, family.attention), (mlp, family.mlp)):
            for name in names:
                parts.linears += self._projection(look.module(parent, name), self.dtype)

    def _check_angles(self, rotary: nn.Module) -> None:
        """That the rotary embedding turns whole heads, or that the family's own function takes a part."""
        for kind in self.angles:
            turned = 2 * getattr(rotary, f"{kind['layer_type']}_inv_freq" if kind else "inv_freq").numel()
            if turned != self.dim and not (turned < self.dim and self._family.own == ROPE):
                raise _Unsupported

    def _angles_of(self, layer_type: str | None) -> int:
        """The place in ``angles`` of those that layers of this type have."""
        kind = {} if layer_type is None else {"layer_type": layer_type}
        if kind not in self.angles:
            self.angles.append(kind)
        return self.angles.index(kind)

    def _projection(self, module: nn.Module, dtype: torch.dtype) -> list[tuple]:
        """What adds a linear layer and the bottlenecks behind it."""
        if type(module) is not BottleneckLayer:
            return [self._linear(module, dtype)]
        look, parts, mode = self.lookups, module.bottleneck, module.bank.mode
        self.banks.add(module.bank)
        plan = self.plans.get(vars(module), "_plan")
        calls = [self._linear(look.module(module, "base_layer"), dtype)]
        for name, part in parts.items():
            if part in plan if mode is None else name in mode.names:
                uses = [] if mode is None else [name in row for row in mode.of_row]
                calls.append(self._bottleneck(look.module(parts, name), uses))
        return calls

    def _bottleneck(self, module: nn.Module, uses: list[bool]) -> tuple:
        """Of the parameters themselves, whether they train or not."""
        look = self.lookups
        linears = [look.module(module, name) for name in ("down", "up")]
        if type(module) is not Bottleneck or any(type(linear) is not nn.Linear for linear in linears):
            raise _Unsupported
        activation = look.get(ACTIVATIONS, look.get(vars(module), "activation"))
        parameters = [look.get(linear._parameters, name) for linear in linears for name in ("weight", "bias")]
        if activation not in _ACTIVATIONS or not all(t is not None and is_plain(t) and t.is_cpu for t in parameters):
            raise _Unsupported
        return torch.ops.pyfastpeft.add_decoder_bottleneck.default, *parameters, _ACTIVATIONS.index(activation), uses

    def _linear(self, module: nn.Module, dtype: torch.dtype) -> tuple:
        look = self.lookups
        branch = _NO_BRANCH
        if type(module) is LoraLinear:
            branch = self._own_branch(module, dtype)
            module = look.module(module, "base_layer")
        elif type(module).__module__.startswith("peft.tuners.lora."):
            branch = self._peft_branch(module)
            module = look.module(module, "base_layer")
        bias = look.get(module._parameters, "bias")
        if any(t is not None and t.dtype not in FLOATS for t in (bias, *branch[:2])):
            raise _Unsupported
        if type(module) is nn.Linear:
            weight = look.get(module._parameters, "weight")
            if not is_plain(weight) or choose_plain(weight.device) is not Backend.NATIVE or weight.numel() == 0:
                raise _Unsupported
            if bias is not None and bias.shape != weight.shape[:1]:  # torch spreads it
                raise _Unsupported
            if weight.dtype is torch.bfloat16 and min(weight.shape) > _WIDE and not outruns_torch(torch.bfloat16):
                self.most_rows = FEW_ROWS
            return torch.ops.pyfastpeft.add_decoder_dense.default, weight, bias, *branch
        if type(module) is not Linear4bit or look.get(vars(module), "compute_dtype") not in (None, dtype):
            raise _Unsupported
        packed = look.get(vars(module), "packed")
        if packed is None or not native(packed):
            raise _Unsupported
        int8 = takes_int8(packed, look.get(vars(module), "compute"))
        return torch.ops.pyfastpeft.add_decoder_linear.default, *packed.operands, bias, *branch, int8

    def _own_branch(self, module: LoraLinear, dtype: torch.dtype) -> tuple:
        look = self.lookups
        self.banks.add(module.bank)
        mode, plan = module.bank.mode, self.plans.get(vars(module), "_plan")
        names = module.present(mode) if mode is not None else plan.names if plan is not None else ()
        if not names:
            return _NO_BRANCH
        if not module.bank.frozen.issuperset(names):
            look.get(vars(module.bank), "frozen")  # once they are for inference, more can be served, and from copies
        if mode is not None or not plan.simple:
            return self._stacked_branch(module, names, mode, dtype)
        bias = look.get(plan.b, "bias") is not None or "bias" not in plan.b
        if plan.magnitude is not None or bias or self._drops(plan.dropout):
            raise _Unsupported
        a, b = self._factors(plan.a, plan.b)
        branch = module.branch(dtype, names, a, b, plan.scaling, 0.0)
        if _paired(branch):
            self._copied += (a, b)
            return branch.a_pairs, branch.b_pairs, plan.scaling, None
        return a, b, plan.scaling, None

    def _factors(self, a: dict[str, Tensor], b: dict[str, Tensor]) -> list[Tensor]:
        """A and B, by the dictionaries of their parameters."""
        factors = [self.lookups.get(held, "weight") for held in (a, b)]
        if any(t is None for t in factors):
            raise _Unsupported  # it is computed from other parameters, at each token
        return factors

    def _drops(self, dropout: nn.Module | None) -> bool:
        if dropout is None or isinstance(dropout, nn.Identity):
            return False
        if not isinstance(dropout, nn.Dropout):
            raise _Unsupported
        held = vars(dropout)
        return bool(self.lookups.get(held, "training") and self.lookups.get(held, "p"))

    def _stacked_branch(
        self, module: LoraLinear, names: tuple[str, ...], mode: Rows | None, dtype: torch.dtype
    ) -> tuple:
        """Of several adapters, or of those that the rows choose among."""
        if not module.only_product(names) or not module.bank.frozen.issuperset(names):
            raise _Unsupported  # one that trains may change without a trace, and these are copies
        if any(self._drops(module.lora_dropout[name]) for name in names):
            raise _Unsupported
        for name in names:
            self._factors(*module._holders(name))
        self._copied += module.parts(names)
        if mode is not None and not module.all_finite(names, dtype):
            raise _Unsupported  # a zero of the factor leaves out what is finite; see ops/mixed.py
        a, b, factor = module.stacked(names, mode, 0 if mode is None else len(mode.of_row))
        branch = module.branch(dtype, names, a, b, factor, 0.0)
        if _paired(branch):
            a, b, factor = branch.a_pairs, branch.b_pairs, of_pairs(factor, len(a))
        return a, b, 1.0, factor.contiguous()

    def _peft_branch(self, module: nn.Module) -> tuple:
        """Of peft's own layer, over a base layer of ours."""
        self._watched = False
        look, state = self.lookups, vars(module)
        look.hooks.append(look.get(state, "merged_adapters"))
        active = look.get(state, "_active_adapter")
        factors = [look.get(module._modules, name) for name in ("lora_A", "lora_B")]
        names = [name for name in ([active] if isinstance(active, str) else active) if name in factors[0]]
        if self.plans.get(state, "_disable_adapters") or not names:
            return _NO_BRANCH
        name = names[0]
        dropout = look.module(module.lora_dropout, name)
        a, b = (look.module(holder, name) for holder in factors)
        if (
            len(names) > 1
            or look.get(module.lora_variant, name) is not None
            or (type(dropout) is not nn.Identity and look.get(vars(dropout), "training"))
            or any(type(m) is not nn.Linear or m.bias is not None for m in (a, b))
        ):
            raise _Unsupported
        a, b = (look.get(m._parameters, "weight") for m in (a, b))
        return a, b, look.get(module.scaling, name), None


def _paired(branch: Any) -> bool:
    """Whether the stack takes pairs of ``branch``: they do not fill a dense weight of odd width."""
    return isinstance(branch, PackedLora) and branch.shape[1] % 2 == 0
