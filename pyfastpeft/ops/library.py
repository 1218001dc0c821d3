"""What the compiled operators need from Python: a table, and for compilers their shapes."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..formats import DYNAMIC_MAP, format_of
from ..formats.packed import Operands
from ..kernels.graphs import constant_on

torch.ops.pyfastpeft.set_dynamic_map(DYNAMIC_MAP)

WEIGHT = "Tensor codes, Tensor scale, Tensor? zero, Tensor? absmax2, Tensor? offset, int format, int n, int blocksize"
""":class:`Operands` in an operator's schema."""
BRANCH = "Tensor? lora_a, Tensor? lora_b, Tensor? row_scale, float scaling, Tensor? seed, float dropout"
"""A LoRA branch in an operator's schema."""

_F = TypeVar("_F", bound=Callable)
_WRITTEN_IN_PYTHON = torch.library.Library("pyfastpeft", "FRAGMENT")


@functools.cache
def dynamic_map(device: torch.device) -> Tensor:
    """``DYNAMIC_MAP`` on ``device``."""
    return constant_on(DYNAMIC_MAP, device)


def constant_to_compilers(function: _F) -> _F:
    """``torch.compiler.assume_constant_result``, which loads the compiler to set this one attribute.

    Loading it takes a second and a half, and 150 MB, of every process that computes without it.
    """
    function._dynamo_marked_constant = True
    return function


def remembered(function: _F) -> _F:
    """``functools.cache`` of what compilers take for a constant: at its own wrapper they look, and warn of it."""
    cached = functools.cache(function)

    @constant_to_compilers
    @functools.wraps(function)
    def constant(*args: Any) -> Any:
        return cached(*args)

    constant.cache_clear = cached.cache_clear
    return constant


def split_weight(arguments: Sequence[Any]) -> tuple[Operands, Sequence[Any]]:
    """The operands of the weight, with which ``arguments`` of an operator begin, and what follows them."""
    n = len(Operands._fields)
    return Operands(*arguments[:n]), arguments[n:]


def fake_of(name: str) -> Callable[[_F], _F]:
    """Decorator: what ``pyfastpeft::<name>`` returns to compilers and on the meta device, where it computes nothing.

    One tensor on the meta device brings a call there, whatever the others hold: the result would be memory that nobody
    wrote. So they must all be on one device.
    """

    def register(fake: _F) -> _F:
        @functools.wraps(fake)
        def on_one_device(*given: Any) -> Any:
            if len({t.device for t in given if isinstance(t, Tensor)}) > 1:
                arguments = getattr(torch.ops.pyfastpeft, name).default._schema.arguments
                tensors = [(a.name, t.device) for a, t in zip(arguments, given, strict=True) if isinstance(t, Tensor)]
                first, device = tensors[0]
                other, elsewhere = next(t for t in tensors if t[1] != device)
                raise ValueError(f"{other} is on {elsewhere}; it must be where {first} is, on {device}")
            return fake(*given)

        torch.library.register_fake(f"pyfastpeft::{name}", on_one_device)
        return fake

    return register


def define(schema: str, function: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Make ``function`` an operator of this library: to compilers one node, which ``fake`` gives the shapes of."""
    name = schema.partition("(")[0]
    _WRITTEN_IN_PYTHON.define(schema)
    _WRITTEN_IN_PYTHON.impl(name, function, "CompositeExplicitAutograd")
    fake_of(name)(fake)


def define_linear_4bit(
    name: str, forward: Callable[..., Any], backward: Callable[..., Any], transposed: bool = False
) -> None:
    """``linear_4bit_<name>``, which returns y and S, and its backward: dx, dA and dB, empty where not needed.

    Args:
        transposed: whether dA lies in memory as [K, R].
    """

    def fake(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        w, (_, a, *_) = split_weight(rest)
        rank = 0 if a is None else len(a)
        return x.new_empty((x.shape[0], w.n)), x.new_empty((x.shape[0], rank), dtype=torch.float32)

    def fake_backward(dy: Tensor, x: Tensor | None, s: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
        _, (k, a, b, *_, need_x, need_a, need_b) = split_weight(rest)
        dx, da, db = (dy.new_empty(0) for _ in range(3))
        if need_x:
            dx = dy.new_empty((dy.shape[0], k))
        if need_a:
            da = a.new_empty((k, len(a))).t() if transposed else a.new_empty((len(a), k))
        return dx, da, b.new_empty(b.shape) if need_b else db

    define(f"linear_4bit_{name}(Tensor x, {WEIGHT}, Tensor? bias, {BRANCH}) -> (Tensor, Tensor)", forward, fake)
    define(
        f"linear_4bit_{name}_backward(Tensor dy, Tensor? x, Tensor? s, {WEIGHT}, int k, {BRANCH}, bool need_x, "
        "bool need_a, bool need_b) -> (Tensor, Tensor, Tensor)",
        backward,
        fake_backward,
    )


@fake_of("quantize_4bit")
def _(w: Tensor, format: int, blocksize: int) -> tuple[Tensor, Tensor, Tensor]:
    n = w.numel()
    blocks = -(-n // blocksize)
    zeros = blocks if format_of(format).has_zero else 0
    scale = w.new_empty((blocks,), dtype=torch.float32)
    return w.new_empty(((n + 1) // 2, 1), dtype=torch.uint8), scale, scale.new_empty((zeros,))


@fake_of("dequantize_4bit")
def _(
    codes: Tensor, scale: Tensor, zero: Tensor | None, format: int, blocksize: int, shape: list[int], dtype: torch.dtype
) -> Tensor:
    return codes.new_empty(shape, dtype=dtype)


for _name in ("dequantize_rows", "linear_4bit_cuda", "pack_pairs", "large_pages"):
    fake_of(_name)(lambda *_: None)


@fake_of("pack_tiles")
def _(codes: Tensor, n: int, k: int) -> Tensor:
    return codes.new_empty(((n + 15) // 16, 8 * k))


@fake_of("unpack_tiles")
def _(codes: Tensor, n: int, k: int) -> Tensor:
    return codes.new_empty(((n * k + 1) // 2, 1))


@fake_of("pack_scales")
def _(scale: Tensor, n: int, k: int, blocksize: int) -> Tensor:
    return scale.new_empty(((n + 15) // 16, k // math.gcd(k, blocksize), 16))


@fake_of("unpack_scales")
def _(scale: Tensor, n: int, k: int, blocksize: int) -> Tensor:
    return scale.new_empty((-(-n * k // blocksize),))


@fake_of("linear_4bit")
def _(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    w, (_, a, b, *_, int8) = split_weight(rest)
    rank = 0 if a is None or int8 else a.shape[0] if a.dim() == 2 else 2 * b.shape[1]
    return x.new_empty((x.shape[0], w.n)), x.new_empty((x.shape[0], rank), dtype=torch.float32)


@fake_of("linear_4bit_backward")
def _(dy: Tensor, x: Tensor | None, s: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    w, (lora_a, *_, need_dx) = split_weight(rest)
    return _gradients(dy, x, s, w.codes.shape[1] // 8, lora_a, need_dx)


@fake_of("lora_backward")
def _(dy: Tensor, x: Tensor | None, s: Tensor | None, lora_a: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, need_dx = rest
    return _gradients(dy, x, s, lora_a.shape[1], lora_a, need_dx)


def _gradients(
    dy: Tensor, x: Tensor | None, s: Tensor | None, k: int, lora_a: Tensor | None, need_dx: bool
) -> tuple[Tensor, Tensor, Tensor]:
    rows, n = dy.shape
    r = 0 if lora_a is None else lora_a.shape[0]
    return (
        dy.new_empty((rows if need_dx else 0, k)),
        dy.new_empty((0 if x is None else r, k), dtype=torch.float32),
        dy.new_empty((0 if s is None else n, r), dtype=torch.float32),
    )
