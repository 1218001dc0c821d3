"""RMSNorm, SwiGLU and rotary embeddings by this library's operators, inside transformers' Llama-like layers.

A class is recognized by its code: transformers' models repeat Llama's functions word for word, so a module whose
``forward`` has the bytecode of Llama's computes what Llama's does, under whatever name. In training these operators
keep their inputs alone, in the model's dtype, where the plain ones keep several tensors in float32.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llama import modeling_llama as llama
from transformers.models.phi3 import modeling_phi3 as phi3

from ..ops import rms_norm, rope, swiglu
from ..ops.backends import FLOATS, Backend, choose_plain
from .forwards import ModuleForward, install, remove

_ROPE = "apply_rotary_pos_emb"


def _code(function: Callable) -> tuple:
    code = inspect.unwrap(function).__code__
    constants = tuple(c for c in code.co_consts if not isinstance(c, str))  # less the docstring
    return code.co_code, constants, code.co_names, code.co_varnames


@functools.cache
def _has_code_of(module_class: type[nn.Module], other: type[nn.Module]) -> bool:
    return _code(module_class.forward) == _code(other.forward)


def _serves(x: Tensor, *others: Tensor) -> bool:
    """Whether the operators take this call; a compiler fuses the plain code itself."""
    known = x.dtype in FLOATS and choose_plain(x.device) is not Backend.REFERENCE
    return known and not torch.compiler.is_compiling() and all(t.dtype == x.dtype for t in others)


class _RmsNorm(ModuleForward):
    def __call__(self, hidden_states: Tensor) -> Tensor:
        weight = self.module.weight
        if not _serves(hidden_states, weight):
            return self.own(hidden_states)
        return rms_norm(hidden_states, weight, self.module.variance_epsilon)


class _LlamaMlp(ModuleForward):
    def __call__(self, x: Tensor) -> Tensor:
        mlp = self.module
        if not _serves(x):
            return self.own(x)
        return mlp.down_proj(swiglu(mlp.gate_proj(x), mlp.up_proj(x)))


class _Phi3Mlp(ModuleForward):
    def __call__(self, hidden_states: Tensor) -> Tensor:
        mlp = self.module
        if not _serves(hidden_states):
            return self.own(hidden_states)
        return mlp.down_proj(swiglu(*mlp.gate_up_proj(hidden_states).chunk(2, dim=-1)))


class _Attention(ModuleForward):
    """The attention's own code with another function under the name of its rotary embedding."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.own(*args, **kwargs)
        function, parameters = _with_rope(type(self.module))
        if "past_key_values" in kwargs and "past_key_values" not in parameters:
            return self.own(*args, **kwargs)  # which knows how to translate the old name
        return function(self.module, *args, **kwargs)


@functools.cache
def _with_rope(attention: type[nn.Module]) -> tuple[Callable, frozenset[str]]:
    own = inspect.unwrap(attention.forward)
    plain = own.__globals__[_ROPE]

    def rotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
        if unsqueeze_dim != 1 or not _serves(q, k, cos, sin):
            return plain(q, k, cos, sin, unsqueeze_dim)
        return rope(q, k, cos, sin)

    namespace = own.__globals__ | {_ROPE: rotated}
    function = types.FunctionType(own.__code__, namespace, own.__name__, own.__defaults__, own.__closure__)
    function.__kwdefaults__ = own.__kwdefaults__
    return function, frozenset(inspect.signature(own).parameters)


@functools.cache
def _rotates_as_llama(attention: type[nn.Module]) -> bool:
    own = inspect.unwrap(attention.forward)
    function = own.__globals__.get(_ROPE)
    return (
        _ROPE in own.__code__.co_names and function is not None and _code(function) == _code(llama.apply_rotary_pos_emb)
    )


def _forward_for(module: nn.Module) -> type[ModuleForward] | None:
    kind = type(module)
    if not kind.__module__.startswith("transformers."):
        return None
    if _has_code_of(kind, llama.LlamaRMSNorm):
        return _RmsNorm
    if _has_code_of(kind, llama.LlamaMLP) and _is_silu(module.act_fn):
        return _LlamaMlp
    if _has_code_of(kind, phi3.Phi3MLP) and _is_silu(module.activation_fn):
        return _Phi3Mlp
    return _Attention if _rotates_as_llama(kind) else None


def _is_silu(activation: Any) -> bool:
    return isinstance(activation, nn.SiLU) or type(activation).__name__ == "SiLUActivation"


def fuse_layers(model: nn.Module, fuse: bool = True) -> None:
    """Let the modules inside ``model`` that this library has operators for use them, or their own code again."""
    if not fuse:
        for kind in (_RmsNorm, _LlamaMlp, _Phi3Mlp, _Attention):
            remove(model, kind)
        return
    for module in model.modules():
        forward = _forward_for(module)
        if forward is not None:
            install(module, forward)
