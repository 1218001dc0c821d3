"""Decoding with one compiled call a token: the layers of a decoder like Llama's as ``decoder_forward``.

:func:`fuse_decoder` puts a :class:`_FewRows` before the forward of a decoder (the module between embedding and head).
It serves calls of a few rows over a cache that record nothing, when every layer is what the compiled stack
computes; whatever is out of the ordinary goes to transformers' own forward. The stack holds the model's own tensors
(and the packed copies of adapters for inference that the layers keep as well); a model that has changed since (another
adapter, a merged weight, a hook) is noticed at the next call.
"""

from __future__ import annotations

import functools
import math
import operator
import sys
import weakref
from contextlib import suppress
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.activations import ACT2FN
from transformers.cache_utils import (
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticCache,
    StaticLayer,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    create_sliding_window_causal_mask,
    eager_mask,
    sdpa_mask,
)
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..adapters import AdapterBank, Rows
from ..caching import registered, stamp_of
from ..formats.handles import DecoderHandle
from ..nn import Linear4bit
from ..nn.bottleneck import ACTIVATIONS, Bottleneck, BottleneckLayer
from ..nn.hooks import GLOBAL_HOOKS
from ..nn.lora import LoraLinear
from ..ops import PackedLora
from ..ops.backends import Backend, choose_attention, choose_plain, is_plain, native
from ..ops.dense import FEW_ROWS
from ..ops.linear_4bit import of_pairs, takes_int8
from ..ops.tracing import forward_mode, traced
from .attention import NAME as ATTENTION
from .attention import attention_forward, attention_mask
from .forwards import ModuleForward, install
from .fused_layers import OF_LLAMA, ROPE, SILUS, Kinds, has_llamas, kinds_of, written_in_transformers

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
# What asks for nothing more; of other keywords any value may.
_NOTHING_MORE = {"output_attentions": False, "output_hidden_states": False, "return_dict": True}
# The function and its mask function that are registered; "eager" is the function of the model's module.
_ATTENTIONS = {
    "sdpa": (sdpa_attention_forward, sdpa_mask),
    "eager": (None, eager_mask),
    ATTENTION: (attention_forward, attention_mask),
}
_ACTIVATIONS = F.gelu, F.relu, F.silu, torch.tanh  # of bottlenecks, in the compiled order
_NO_BRANCH = None, None, 1.0, None  # A, B, scaling, and the factors of the columns or of each row's
# transformers renamed it; whichever name this version has.
_CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"
_version_of = operator.attrgetter("_version")
_forward_of = operator.attrgetter("forward")
_dtype_of = operator.attrgetter("dtype")
_MOST_ROWS = 64  # more take longer than by the layers (a dense model in bfloat16, 2048 wide, 128 rows: 1.06 times)
_WIDE = 2048  # torch is faster at more than FEW_ROWS by wider weights in bfloat16 (4096 x 4096: 0.91 of the time)
_STACKS_KEPT = 32  # switching between this many sets of adapters, and choices of rows, builds nothing


def fuse_decoder(model: nn.Module) -> None:
    """Let every decoder in ``model`` that is of a known family compute few rows by the fused stack, in place."""
    for module in list(model.modules()):
        if _family(module) is not None:
            registered()  # from now on
            install(module, _FewRows)


def _family(module: nn.Module) -> _Family | None:
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
        return any(self.hooks)

    def hold(self) -> bool:
        found = map(dict.get, self.containers, self.keys)
        forwards = map(_forward_of, map(type, self.modules))
        return (
            all(map(operator.is_, found, self.found))
            and all(map(operator.is_, forwards, self.forwards))
            and all(map(operator.is_, map(_dtype_of, self.parameters), self.dtypes))
        )


class _Stack:
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
        self.most_rows = _MOST_ROWS
        self.windows: list[int] = []  # of each layer, 0: none
        self.window = math.inf  # up to so many keys each layer sees all
        self.causal = True  # else of several tokens each sees those that follow
        self.angles: list[dict[str, str]] = []  # what the rotary embedding is asked for
        self.banks: set[AdapterBank] = set()
        self._attentions: list[dict] = []  # what each layer's attention holds, a prefix among it
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
            past > _kept(layer) and not 0 < window <= layer.sliding_window
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
        look, config, family = self.lookups, model.config, _family(model)
        layers = look.module(model, "layers")
        norms, head_norms, added_norms, angles, linears = [], [], [], [], []
        dtype, eps = model.norm.weight.dtype, getattr(model.norm, family.eps)
        scaling = layers[0].self_attn.scaling
        multiplier = vars(layers[0]).get("residual_multiplier")  # Granite's layers have one, and its embedding
        self.embedding_multiplier = look.get(vars(model), "embedding_multiplier")
        self.dtype = dtype
        look.get(vars(config), "is_causal")  # which few have
        if not look.get(vars(config), "return_dict"):
            raise _Unsupported
        home = type(model).__module__

        def of_family(module: nn.Module, part: str) -> bool:
            kind = type(module)
            own = written_in_transformers(kind.forward)
            written = own is not None and own.__globals__["__name__"] == home
            return written and (kind.__module__, kind.__name__) == (home, f"{family.name}{part}")

        look.forward(model)
        namespace = vars(sys.modules[home])
        functions = {name: look.get(namespace, name) for name in OF_LLAMA}
        own = written_in_transformers(functions.pop(family.own, None))
        # Masks make the windows: a family without these, as Llama's, has none, whatever its config says.
        slides = look.get(namespace, "create_sliding_window_causal_mask")
        window = None if slides is None else look.get(vars(config), "sliding_window")
        types = look.get(vars(config), "layer_types")
        if not (
            of_family(model, type(model).__name__.removeprefix(family.name))
            and has_llamas(namespace, tuple(functions))
            and (family.own is None or (own is not None and own.__globals__["__name__"] == home))
            and (slides is None or (slides is create_sliding_window_causal_mask and written_in_transformers(slides)))
        ):
            raise _Unsupported

        def norm(parent: nn.Module, name: str) -> Tensor:
            module = look.module(parent, name)
            weight = look.get(module._parameters, "weight")
            if not of_family(module, "RMSNorm") or weight.dtype != dtype:
                raise _Unsupported
            if look.get(vars(module), family.eps) != eps:
                raise _Unsupported
            return weight

        for i in range(look.get(vars(config), "num_hidden_layers")):  # fewer where a generation exits early
            layer = look.module(layers, str(i))
            attention, mlp = look.module(layer, "self_attn"), look.module(layer, "mlp")
            state = vars(attention)
            # Mistral's slide all, under one mask; where the attention keeps a window, each type has a mask of its own.
            size = window if "sliding_window" not in state or types[i] == "sliding_attention" else None
            self.window = min(self.window, math.inf if size is None else size)
            self.windows.append(size or 0)
            if (
                not (of_family(layer, "DecoderLayer") and of_family(attention, "Attention") and of_family(mlp, "MLP"))
                or not kinds_of(look.module(mlp, family.activation)) <= family.activations
                or look.get(state, "layer_idx") != i  # its place in the cache
                or look.get(state, "scaling") != scaling
                or look.get(vars(layer), "residual_multiplier") != multiplier
            ):
                raise _Unsupported
            if look.get(state, "attention_dropout") and look.get(state, "training"):
                raise _Unsupported
            if any(self._drops(look.module(layer, name)) for name in family.dropouts):
                raise _Unsupported
            self._attentions.append(state)
            norms += [norm(layer, name) for name in family.norms]
            head_norms += [norm(attention, name) for name in family.head_norms]
            added_norms += [norm(layer, name) for name in family.added_norms]
            turns = look.get(state, "use_rope") if "use_rope" in state else True  # SmolLM3's have it
            kind = types[i] if family.angles_of_types else None
            angles.append(self._angles_of(kind) if turns else -1)
            for name in family.attention:
                linears += self._projection(look.module(attention, name), dtype)
            for name in family.mlp:
                linears += self._projection(look.module(mlp, name), dtype)
        last_weight = norm(model, "norm")
        self.kv_heads, self.dim = config.num_key_value_heads, layers[0].self_attn.head_dim
        if not getattr(config, "is_causal", True):
            raise _Unsupported
        self.causal = not look.get(vars(config), "use_bidirectional_attention")
        for kind in self.angles:
            turned = 2 * getattr(model.rotary_emb, f"{kind['layer_type']}_inv_freq" if kind else "inv_freq").numel()
            if turned != self.dim and not (turned < self.dim and family.own == ROPE):
                raise _Unsupported
        try:
            heads = config.num_attention_heads, self.kv_heads, self.dim
            new = torch.ops.pyfastpeft.new_decoder.default
            norms = last_weight, norms, head_norms, added_norms
            scales = scaling, 1.0 if multiplier is None else multiplier
            held = DecoderHandle(new(*norms, angles, self.windows, *heads, eps, *scales, family.joined, family.gemma))
            for add, *linear in linears:
                add(held.number, *linear)
        except RuntimeError as error:
            raise _Unsupported from error
        self.held = held

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
        if type(module) is nn.Linear:
            weight = look.get(module._parameters, "weight")
            if not is_plain(weight) or choose_plain(weight.device) is not Backend.NATIVE:
                raise _Unsupported
            if bias is not None and bias.shape != weight.shape[:1]:  # torch spreads it
                raise _Unsupported
            if weight.dtype is torch.bfloat16 and min(weight.shape) > _WIDE:
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
        held = vars(dropout) if isinstance(dropout, nn.Dropout) else {}
        return bool(held and self.lookups.get(held, "training") and self.lookups.get(held, "p"))

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


_LAYERS = {DynamicCache: (DynamicLayer, DynamicSlidingWindowLayer), StaticCache: (StaticLayer,)}


class _Room:
    """Keys and values of layers that keep equally many tokens, with room behind them.

    A token is written there, not concatenated, and nothing is written twice. The layers hold views; one that was
    cropped, reordered or replaced is no longer the view given to it, and is copied into new room.
    """

    def __init__(
        self, layers: list[DynamicLayer], shape: tuple[int, int, int, int], tokens: int, dtype: torch.dtype
    ) -> None:
        """Copy what ``layers`` hold, [batch, heads, past, dim], with room for ``tokens`` behind it and more."""
        batch, heads, self.past, dim = shape
        length = self.past + tokens
        self.size = max(length + 64, length * 5 // 4)
        self.tensor = torch.empty((2 * len(layers), batch, heads, self.size, dim), dtype=dtype, device="cpu")
        for i, layer in enumerate(layers):
            if layer.is_initialized:
                self.tensor[2 * i, :, :, : self.past] = layer.keys
                self.tensor[2 * i + 1, :, :, : self.past] = layer.values
        self.views: tuple[Tensor, ...] = ()

    def serves(self, layers: list[DynamicLayer], tokens: int) -> bool:
        held = [t for layer in layers if layer.is_initialized for t in (layer.keys, layer.values)]
        return (
            self.past + tokens <= self.size
            and len(held) == len(self.views)
            and all(map(operator.is_, held, self.views))
        )

    def show(self, layers: list[DynamicLayer], tokens: int) -> None:
        """Let the cache's layers hold ``tokens`` more, and what they keep of those before."""
        self.past += tokens
        first = max(0, self.past - _kept(layers[0]))
        self.views = self.tensor[:, :, :, first : self.past].unbind(0)
        views = iter(self.views)
        for layer in layers:
            keys, values = next(views), next(views)
            if not layer.is_initialized:
                layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
            if type(layer) is DynamicSlidingWindowLayer:
                layer.cumulative_length += tokens


def _kept(layer: DynamicLayer) -> int:
    """How many tokens a layer of a cache keeps."""
    return layer.sliding_window - 1 if type(layer) is DynamicSlidingWindowLayer else sys.maxsize


class _Growing:
    """Keys and values of a :class:`DynamicCache` in rooms, one for each number of tokens that layers keep."""

    def __init__(self, layers: list[DynamicLayer]) -> None:
        kept = [_kept(layer) for layer in layers]
        self.members = [[i for i, n in enumerate(kept) if n == each] for each in set(kept)]
        self.rooms: list[_Room | None] = [None] * len(self.members)
        self.keys: list[Tensor | None] = [None] * len(layers)
        self.values: list[Tensor | None] = [None] * len(layers)
        self.past = [0] * len(layers)

    def fits(
        self, layers: list[DynamicLayer], shape: tuple[int, int, int, int], tokens: int, dtype: torch.dtype
    ) -> bool:
        """Whether ``layers`` hold what they keep of keys and values of ``shape`` [batch, heads, past, dim]; there is
        room for ``tokens`` more then."""
        batch, heads, past, dim = shape
        for j, members in enumerate(self.members):
            those = [layers[i] for i in members]
            room = self.rooms[j]
            if room is None or not room.serves(those, tokens):
                held = (batch, heads, min(past, _kept(those[0])), dim)
                if any(t.shape != held for layer in those if layer.is_initialized for t in (layer.keys, layer.values)):
                    return False
                room = self.rooms[j] = _Room(those, held, tokens, dtype)
                for n, tensor in enumerate(room.tensor.unbind(0)):
                    (self.values if n % 2 else self.keys)[members[n // 2]] = tensor
            for i in members:
                self.past[i] = room.past
        return True

    def show(self, layers: list[DynamicLayer], tokens: int) -> None:
        """Let the cache's layers hold ``tokens`` more."""
        for room, members in zip(self.rooms, self.members, strict=True):
            room.show([layers[i] for i in members], tokens)


class _Static:
    """Keys and values of a :class:`StaticCache`, which has room for all its tokens."""

    def __init__(
        self, layers: list[StaticLayer], shape: tuple[int, int, int, int], tokens: int, dtype: torch.dtype
    ) -> None:
        """Those that ``layers`` hold, of ``shape`` [batch, heads, past, dim]; they are made if there are none yet."""
        batch, heads, past, dim = shape
        if not layers[0].is_initialized:
            new = torch.empty((batch, heads, tokens, dim), dtype=dtype, device="cpu")
            for layer in layers:
                layer.lazy_initialization(new, new)
        self.keys, self.values = [layer.keys for layer in layers], [layer.values for layer in layers]
        self.past = [past] * len(layers)

    def show(self, layers: list[StaticLayer], tokens: int) -> None:
        """Let the cache's layers hold ``tokens`` more."""
        for layer, past in zip(layers, self.past, strict=True):
            if hasattr(layer, "cumulative_length"):  # older versions count what is not zero
                layer.cumulative_length.fill_(past + tokens)


def _patched(cache: DynamicCache | StaticCache) -> bool:
    """Whether somebody else's function takes up what is computed, for ``cache`` or its layers."""
    kinds = type(cache), *_LAYERS[type(cache)]
    return "update" in vars(cache) or any(written_in_transformers(kind.update) is None for kind in kinds)


def _of_one_query(mask: Any, length: int) -> Any:
    """[batch, length] of a mask that the caller made for one query a row; any other mask as it is.

    generate does so for a static cache, and models of several modalities do: bool [batch, 1, 1, length or more], None
    where nothing is hidden, or such for each type of layers.
    """
    if isinstance(mask, dict):
        mask = mask.get("full_attention", mask)
    made = isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.shape[1:-1] == (1, 1)
    return mask[:, 0, 0, :length] if made else mask


def _asks_for_more(config: Any, use_cache: bool | None, kwargs: dict[str, Any]) -> bool:
    """Whether a call wants what the stack does not compute, or says what it does not know."""
    attention = config._attn_implementation
    functions = ALL_ATTENTION_FUNCTIONS.get(attention), ALL_MASK_ATTENTION_FUNCTIONS.get(attention)
    return (
        any(value is not _NOTHING_MORE.get(name) for name, value in kwargs.items())
        or not (config.use_cache if use_cache is None else use_cache)
        or config.output_attentions
        or config.output_hidden_states
        or functions != _ATTENTIONS.get(attention)
        or torch.is_autocast_enabled("cpu")
    )


class _FewRows(ModuleForward):
    """Forward of a decoder: few rows by the fused stack, everything else by the class's own forward."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        functools.update_wrapper(self, MethodType(type(module).forward, module))  # its signature has no self
        self._stacks: list[_Stack] = []
        self._caches: weakref.WeakKeyDictionary[DynamicCache, _Growing] = weakref.WeakKeyDictionary()

    def __getstate__(self) -> dict:
        return {"module": self.module}

    def __setstate__(self, state: dict) -> None:
        self.__init__(state["module"])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if args and isinstance(args[0], nn.Module):
            # accelerate gives a model its forward back as a method, and a copy of that model has this one's.
            module = args[0]
            module.forward = self if module is self.module else _FewRows(module)
            return module.forward(*args[1:], **kwargs)
        if not (args or traced() or torch.is_grad_enabled() or forward_mode()):
            output = self._few_rows(**{name: value for name, value in kwargs.items() if value is not None})
            if output is not None:
                return output
        if not traced():  # what is compiled must not depend on how many there are
            for stack in self._stacks:
                stack.look_again()
            if type(cache := kwargs.get(_CACHE)) is DynamicCache:
                self._caches.pop(cache, None)  # it holds other tensors afterwards, and the room is for these alone
        return self.own(*args, **kwargs)

    def _few_rows(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | None:
        """The output, or None where this is not a call for the stack."""
        model = self.module
        config = model.config
        cache = kwargs.pop(_CACHE, None)
        kwargs.pop("cache_position", None)  # of older versions: the positions after those in the cache
        kwargs.pop("logits_to_keep", None)  # the head's: models around this one hand on what they were given
        if (input_ids is None) is (inputs_embeds is None):
            return None
        given = inputs_embeds if input_ids is None else input_ids
        batch, tokens = given.shape[:2]
        if not given.is_cpu or batch * tokens > _MOST_ROWS:
            return None  # before anything is asked that a GPU would be waited for
        kinds = _LAYERS.get(type(cache))
        if kinds is None:
            return None
        if _asks_for_more(config, use_cache, kwargs):
            return None
        layers = cache.layers
        count = config.num_hidden_layers
        if len(layers) != count or getattr(cache, "offloading", False) or _patched(cache):
            return None
        begun = layers[0].is_initialized
        if not all(type(layer) in kinds and layer.is_initialized is begun for layer in layers):
            return None
        past = int(layers[0].get_seq_length())
        length = past + tokens
        if type(cache) is StaticCache and length > layers[0].max_cache_len:
            return None  # the cache says so itself
        if any(getattr(layer, "record_past", False) and length >= layer.sliding_window for layer in layers):
            return None  # it keeps what it may have to go back to
        seen = _of_one_query(attention_mask, length) if tokens == 1 else attention_mask
        if seen is not None and (not isinstance(seen, Tensor) or seen.shape != (batch, length)):
            return None
        stack = self._stack(cache)
        if stack.held is None or batch * tokens > stack.most_rows:
            return None
        if not stack.serves(batch) or stack.forgets(layers, past):
            return None
        if tokens > 1 and not stack.causal:
            return None
        x = model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds.contiguous()
        if stack.embedding_multiplier is not None:
            x = x * stack.embedding_multiplier
        if not x.is_cpu or x.dtype != stack.dtype:
            return None
        if begun and (layers[0].keys.dtype != x.dtype or layers[0].values.dtype != x.dtype):
            return None
        prefix = stack.prefix(batch)
        if prefix is None:
            return None
        whole = prefix[0] or seen is not attention_mask  # a prefix is seen whole; a mask that was made says all itself
        if whole and length + (prefix[0][0].shape[2] if prefix[0] else 0) > stack.window:
            return None
        if position_ids is None:
            position_ids = torch.arange(past, length, device=x.device).unsqueeze(0)
        elif position_ids.shape[-1] != tokens:
            return None  # one position for all tokens
        angles = [model.rotary_emb(x, position_ids=position_ids, **kind) for kind in stack.angles]
        cos, sin = ([pair[i] for pair in angles] for i in range(2))
        mask = None if seen is None else seen.bool().contiguous()
        room = self._room(cache, (batch, stack.kv_heads, past, stack.dim), tokens, x.dtype)
        if room is None:
            return None
        number = stack.held.number
        y = torch.ops.pyfastpeft.decoder_forward.default(
            number, x, cos, sin, mask, room.keys, room.values, room.past, *prefix
        )
        room.show(layers, tokens)
        return BaseModelOutputWithPast(last_hidden_state=y.view(batch, tokens, -1), **{_CACHE: cache})

    def _room(
        self, cache: DynamicCache | StaticCache, shape: tuple[int, int, int, int], tokens: int, dtype: torch.dtype
    ) -> _Growing | _Static | None:
        """For ``tokens`` behind keys and values of ``shape`` [batch, heads, past, dim]; None where the cache holds
        others."""
        layers = cache.layers
        if type(cache) is StaticCache:
            return _Static(layers, shape, tokens, dtype)
        growing = self._caches.get(cache)
        if growing is None:
            growing = self._caches[cache] = _Growing(layers)
        return growing if growing.fits(layers, shape, tokens, dtype) else None

    def _stack(self, cache: Any) -> _Stack:
        for stack in self._stacks:
            if stack.holds(cache):
                return stack
        stack = _Stack(self.module)
        self._stacks.insert(0, stack)
        for other in self._stacks[1:]:
            if not other.may_hold():  # it would keep what the model does not have any more in memory
                with suppress(ValueError):  # another thread has taken it out
                    self._stacks.remove(other)
        del self._stacks[_STACKS_KEPT:]
        return stack  # and not the first: another thread may have put its own before it
