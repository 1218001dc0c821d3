"""RMSNorm, SwiGLU and rotary embeddings by this library's operators, inside transformers' Llama-like layers; and linear
layers (:mod:`.dense_layers`).

A class is recognized by its code: transformers' models repeat Llama's functions word for word, so a module whose
``forward`` has the bytecode of Llama's computes what Llama's does, under whatever name. This is asked at each call:
where somebody has patched the class or the rotary embedding, before or since, the patch runs. In training these
operators keep their inputs alone, in the model's dtype, where the plain ones keep several tensors in float32.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Collection
from types import NoneType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.models.llama import modeling_llama as llama
from transformers.models.phi3 import modeling_phi3 as phi3

from ..formats.packed import FLOATS
from ..nn import Linear4bit
from ..nn.hooks import hooked
from ..nn.lora import LoraLinear
from ..nn.modules_to_save import ModulesToSave
from ..ops import projected_swiglu, rms_norm, rope, swiglu
from ..ops.autocast import autocast_of
from ..ops.backends import Backend, choose_plain
from ..ops.tracing import is_compiling, traced
from .dense_layers import DenseForward, dense_forward_for
from .forwards import ModuleForward, install, remove, runs, with_parameters

Kinds = frozenset[tuple[type, Any]]


def kinds_of(*activations: Any) -> Kinds:
    """Their classes and what these compute, to be recognized where nobody has patched them since."""
    return frozenset((type(module), getattr(type(module), "forward", None)) for module in activations)


SILUS = kinds_of(nn.SiLU(), ACT2FN["silu"])  # transformers had a class of its own
ROPE = "apply_rotary_pos_emb"


def _module_of(function: types.FunctionType) -> str:
    return function.__globals__.get("__name__", "")  # a wrapper's attribute is copied from what it wraps


def written_in_transformers(function: Any) -> types.FunctionType | None:
    """The function that transformers' decorators are around here, and those of the kernels library, by which it lets
    functions be exchanged; None where any of it is somebody else's, or was exchanged."""
    if isinstance(function, nn.Module):  # which that library makes of a function
        function = None if "forward" in vars(function) else type(function).forward
    return _undecorated(function)


@functools.cache
def _undecorated(function: Any) -> types.FunctionType | None:
    while isinstance(function, types.FunctionType):
        home, wrapped = _module_of(function), getattr(function, "__wrapped__", None)
        if home.startswith("kernels."):
            function = wrapped or inspect.getclosurevars(function).nonlocals.get("func")
        elif not home.startswith("transformers."):
            return None
        elif wrapped is None:
            return function
        else:
            function = wrapped
    return None


def _kernel_functions(module: dict[str, Any]) -> Collection[nn.Module]:
    """The functions that a module of this state calls and the kernels library may exchange."""
    return module.get("_kernel_funcs", {}).values()


def kernelized(module: dict[str, Any]) -> bool:
    """Whether the kernels library has exchanged a function that this module, of this state, calls."""
    return any("forward" in vars(function) for function in _kernel_functions(module))


_SWITCHED = "_used_hub_kernels"


def use_hub_kernels(model: nn.Module, use: bool) -> None:
    """Take what the kernels library has put into the transformers models inside ``model`` out again, or let it come
    back where this function took it.

    From transformers 5.25 on each loaded model asks that library for its functions, on a CPU in vain, and again at
    each change between training and evaluation, by which the modules it knows lose any other forward. Left alone are
    models where it has exchanged what has no forward here, and those with a ``kernel_config``, which a caller chose.
    """
    for part in model.modules():
        if use and not vars(part).pop(_SWITCHED, False):
            continue
        if not use and not (getattr(part, "use_kernels", False) and _all_served(part)):
            continue
        own = {m: m.forward for m in part.modules() if "forward" in vars(m) and "_kernel_repo" not in vars(m)}
        if use:
            part.set_use_kernels(True)
        else:
            part.reset_kernels()
            vars(part)[_SWITCHED] = True
        for module, forward in own.items():
            module.forward = forward


def _all_served(model: nn.Module) -> bool:
    if getattr(model, "kernel_config", None) is not None or not hasattr(model, "reset_kernels"):
        return False
    for module in model.modules():
        exchanged = any("_kernel_repo" in vars(m) for m in (module, *_kernel_functions(vars(module))))
        if exchanged and _forward_for(module) is None and not _is_silu(module):
            return False
    return True


def _code(function: Any) -> tuple | None:
    own = written_in_transformers(function)
    return None if own is None else _code_of(own)


@functools.cache
def _code_of(function: types.FunctionType) -> tuple:
    code = function.__code__
    constants = tuple(c for c in code.co_consts if not isinstance(c, str))  # less the docstring
    return code.co_code, constants, code.co_names, code.co_varnames


def _has_code(function: Any, code: tuple | None) -> bool:
    return code is not None and _code(function) == code


_ROTATION = (ROPE, "rotate_half")  # the one calls the other: NanoChat's turns the other way
OF_LLAMA = (*_ROTATION, "create_causal_mask", "eager_attention_forward", "repeat_kv")
"""What a Llama's decoder and its attention call, by names of their module."""
# Taken now: whoever imports this may patch transformers later.
_CODES = {name: _code(getattr(llama, name)) for name in OF_LLAMA}


def _serves(x: Tensor, *others: Tensor) -> bool:
    """Whether the operators take this call; a compiler fuses the plain code itself."""
    known = x.dtype in FLOATS and choose_plain(x.device) is not Backend.REFERENCE
    # A trace does not see what changes in place.
    return known and not traced() and all(t.dtype == x.dtype for t in others)


class _Fused(ModuleForward):
    """What stands in the place of one function of transformers, as long as the class has that."""

    CODE: ClassVar[tuple | None]

    @classmethod
    def stands_for(cls, function: Any) -> bool:
        return _has_code(function, cls.CODE)


class _RmsNorm(_Fused):
    CODE = _code(llama.LlamaRMSNorm.forward)

    def __call__(self, hidden_states: Tensor) -> Tensor:
        weight = self.module.weight
        if not (_serves(hidden_states, weight) and self.stands_for(type(self.module).forward)):
            return self.own(hidden_states)
        return rms_norm(hidden_states, weight, self.module.variance_epsilon)


def _untouched(module: nn.Module, kinds: type | tuple[type, ...]) -> bool:
    """Whether ``module`` runs a forward of these kinds (:func:`runs`), and nothing of the caller's."""
    return runs(module, kinds) and not hooked(module)


def _fused(module: nn.Module, kind: type[_Fused]) -> bool:
    """Whether ``module`` runs a forward of this kind, in the place of what that stands for."""
    return _untouched(module, kind) and kind.stands_for(type(module).forward)


def _plain(layer: nn.Module | None) -> bool:
    """Whether this is a linear layer with nothing around it: what it returns is the caller's alone."""
    return type(layer) in (nn.Linear, Linear4bit) and _untouched(layer, (NoneType, ModuleForward))


def _frozen(*layers: nn.Module) -> bool:
    return not any(p.requires_grad for m in layers for p in m.parameters())


def _activated(
    x: Tensor,
    project: Callable[..., tuple[Tensor, Tensor]],
    *layers: nn.Module,
    norm: nn.Module | None = None,
) -> Tensor:
    """``swiglu`` of what x, or its ``norm``, is projected to by ``layers``, which ``project`` takes and then the norm.

    Gate and up are most of what a layer of a model would keep for the backward pass. Where all that this pass wants of
    them is x's gradient, and the weights are dense, they are computed again instead, by the weights that are here now,
    which takes a tenth to a fifth of a training step. Weights of 4 bits leave more memory free than that saves; and of
    few rows it is little beside dense ones: up to 3/8 of x's size they take less than the MLP's three weights would in
    4 bits.
    """
    dense = all(_plain(m) and type(m) is not Linear4bit for m in layers)
    few = 8 * x[..., 0].numel() <= 3 * x.shape[-1]
    modules = layers if norm is None else (*layers, norm)
    if few or not (dense and _frozen(*layers)):
        return swiglu(*project(x, *modules))
    autocast = autocast_of(x)
    places = [(module, name) for module in modules for name in module._parameters]

    def again(x: Tensor, *weights: Tensor | None) -> tuple[Tensor, Tensor]:
        held = {module: {} for module in modules}
        for (module, name), weight in zip(places, weights, strict=True):
            held[module][name] = weight
        with torch.autocast(**autocast):
            return project(x, *(with_parameters(module, held[module]) for module in modules))

    return projected_swiglu(x, again, *(module._parameters[name] for module, name in places))


class _LlamaMlp(_Fused):
    CODE = _code(llama.LlamaMLP.forward)

    def __call__(self, x: Tensor, norm: nn.Module | None = None) -> Tensor:
        """Of x, or of its ``norm``: a :class:`_RmsNorm`, frozen, without children."""
        mlp = self.module
        if not (_serves(x) and self.stands_for(type(mlp).forward) and _is_silu(mlp.act_fn)):
            return self.own(x if norm is None else norm(x))
        return mlp.down_proj(_activated(x, self._project, mlp.gate_proj, mlp.up_proj, norm=norm))

    @staticmethod
    def _project(x: Tensor, gate: nn.Module, up: nn.Module, norm: nn.Module | None = None) -> tuple[Tensor, Tensor]:
        x = x if norm is None else norm(x)
        return gate(x), up(x)


class _Sum(torch.autograd.Function):
    """x + y in the memory of y, which nobody else may hold."""

    @staticmethod
    def forward(ctx, x, y):  # noqa: ANN001
        return y.detach().add_(x)

    @staticmethod
    def backward(ctx, dsum):  # noqa: ANN001
        return dsum, dsum


class _LlamaLayer(_Fused):
    """A decoder layer whose sums take the memory of what is added, and whose MLP keeps the sum before its norm."""

    CODE = _code(llama.LlamaDecoderLayer.forward)

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        layer = self.module
        known = _serves(hidden_states) and self.stands_for(type(layer).forward)
        if args or not known or (layer.gradient_checkpointing and layer.training):
            return self.own(hidden_states, *args, **kwargs)
        attention, norm, mlp = layer.self_attn, layer.post_attention_layernorm, layer.mlp
        y, _ = attention(hidden_states=layer.input_layernorm(hidden_states), **kwargs)
        last = getattr(attention, "o_proj", None) if _fused(attention, _Attention) else None
        x = self._sum(hidden_states, y, last)
        # A norm of several, of which adapters choose one, may be another in the backward pass.
        alone = _fused(norm, _RmsNorm) and not norm._modules and _frozen(norm)
        if not (alone and _fused(mlp, _LlamaMlp)):
            return x + mlp(norm(x))
        return self._sum(x, mlp.forward(x, norm), mlp.down_proj)

    @staticmethod
    def _sum(x: Tensor, y: Tensor, last: nn.Module | None) -> Tensor:
        """x + y, which ``last`` made."""
        if type(last) is LoraLinear and _untouched(last, NoneType):
            last = last.base_layer  # around it nothing is kept of the result
        return _Sum.apply(x, y) if _plain(last) and x.dtype == y.dtype else x + y


class _Phi3Mlp(_Fused):
    CODE = _code(phi3.Phi3MLP.forward)

    def __call__(self, hidden_states: Tensor) -> Tensor:
        mlp = self.module
        if not (_serves(hidden_states) and self.stands_for(type(mlp).forward) and _is_silu(mlp.activation_fn)):
            return self.own(hidden_states)
        return mlp.down_proj(_activated(hidden_states, lambda x, layer: layer(x).chunk(2, dim=-1), mlp.gate_up_proj))


class _Attention(_Fused):
    """The attention's own code with another function under the name of its rotary embedding."""

    @classmethod
    def stands_for(cls, function: Any) -> bool:
        own = written_in_transformers(function)
        return own is not None and ROPE in own.__code__.co_names and has_llamas(own.__globals__, _ROTATION)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        forward = type(self.module).forward
        if is_compiling() or not self.stands_for(forward) or kernelized(vars(self.module)):
            return self.own(*args, **kwargs)
        own = written_in_transformers(forward)
        if "past_key_values" in kwargs and "past_key_values" not in own.__code__.co_varnames:
            return self.own(*args, **kwargs)  # which knows how to translate the old name
        return _with_rope(own)(self.module, *args, **kwargs)


def has_llamas(namespace: dict[str, Any], names: tuple[str, ...]) -> bool:
    """Whether these globals have the functions of transformers' Llama under these names, which are of OF_LLAMA."""
    return all(_has_code(namespace.get(name), _CODES[name]) for name in names)


def _with_rope(own: types.FunctionType) -> types.FunctionType:
    """For one call: all other names are what they are now, which costs less than to ask whether they still are."""
    plain = own.__globals__[ROPE]

    def rotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
        alike = unsqueeze_dim == 1 and cos.shape[-2] == q.shape[2]  # not one position for all tokens
        if not (alike and _serves(q, k, cos, sin)):
            return plain(q, k, cos, sin, unsqueeze_dim)
        return rope(q, k, cos, sin)

    namespace = own.__globals__ | {ROPE: rotated}
    function = types.FunctionType(own.__code__, namespace, own.__name__, own.__defaults__, own.__closure__)
    function.__kwdefaults__ = own.__kwdefaults__
    return function


def depends_on_length(rope_type: Any) -> bool:
    """Whether a rotary embedding of that type has other frequencies in longer sequences."""
    kinds = rope_type.values() if isinstance(rope_type, dict) else (rope_type,)
    return any(kind in ("dynamic", "longrope") for kind in kinds)


def _forward_for(module: nn.Module) -> type[ModuleForward] | None:
    if (fast := dense_forward_for(module)) is not None:
        return fast
    if not type(module).__module__.startswith("transformers."):
        return None
    forward = type(module).forward
    for kind in (_RmsNorm, _LlamaMlp, _Phi3Mlp, _LlamaLayer, _Attention):
        if kind.stands_for(forward):
            activation = {_LlamaMlp: "act_fn", _Phi3Mlp: "activation_fn"}.get(kind)
            return kind if activation is None or _is_silu(getattr(module, activation)) else None
    return None


def _is_silu(activation: Any) -> bool:
    """Whether this is SiLU with nothing around it."""
    return kinds_of(activation) <= SILUS and _untouched(activation, NoneType)


def fuse_layers(model: nn.Module) -> None:
    """Let the modules inside ``model`` that this library has operators for use them."""
    use_hub_kernels(model, False)
    for module in model.modules():
        forward = _forward_for(module)
        if forward is not None:
            install(module, forward)
    for module in model.modules():
        if isinstance(module, ModulesToSave):  # which sees to its copies: code is compiled anew for each of these
            remove(module, DenseForward)
