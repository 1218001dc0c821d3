"""What a decoder layer does between its linear layers: ``rms_norm``, ``swiglu`` and ``rope``, both directions.

Forward saves its inputs only; backward computes the rest again. Values are rounded where transformers' Llama rounds
them, so that exchanging one for the other changes a result by the order of a float32 sum at most.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..formats.packed import FLOATS
from .backends import Backend, as_rows, choose_plain
from .checks import check_floats, check_number, check_tensor
from .library import fake_of
from .once import once_differentiable
from .tracing import is_compiling, recorded


def rms_norm(x: Tensor, weight: Tensor, eps: float | Tensor = 1e-6) -> Tensor:
    """``x / sqrt(mean(x²) + eps) · weight`` over the last dimension.

    Args:
        x: [..., H], float32, bfloat16 or float16.
        weight: [H], in x's dtype.
        eps: a number, or a tensor of one, for which this is plain torch.

    Returns:
        [..., H] in x's dtype. Differentiable in all of them.

    Raises:
        TypeError, ValueError: the argument at fault, what it was and what it must be.
    """
    check_floats("x", x)
    check_floats("weight", weight)
    check_number("eps", eps)
    if (weight.dtype, weight.device) != (x.dtype, x.device) or x.dim() == 0 or weight.shape != x.shape[-1:]:
        raise ValueError(
            f"weight is {weight.dtype} of shape {tuple(weight.shape)} on {weight.device}; it must be {x.dtype} on "
            f"{x.device}, of the size of the last dimension of x, which has shape {tuple(x.shape)}"
        )
    if choose_plain(x.device) is Backend.REFERENCE or isinstance(eps, Tensor):
        wide, eps = x.float(), eps.reshape(()) if isinstance(eps, Tensor) else eps
        return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
    norm = _RmsNorm.apply if recorded(x, weight) else _rms_norm
    return norm(x, weight, eps).view(x.shape)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) · up``.

    Args:
        gate, up: of one shape and dtype (float32, bfloat16 or float16).

    Returns:
        The same shape and dtype. Differentiable in both.

    Raises:
        TypeError, ValueError: the argument at fault, what it was and what it must be.
    """
    check_floats("gate", gate)
    check_floats("up", up)
    if up.shape != gate.shape or up.dtype != gate.dtype or up.device != gate.device:
        raise ValueError(
            f"up is {up.dtype} of shape {tuple(up.shape)} on {up.device}; it must be {gate.dtype} of shape "
            f"{tuple(gate.shape)} on {gate.device}"
        )
    if choose_plain(gate.device) is Backend.REFERENCE:
        return F.silu(gate) * up
    product = _SwiGlu.apply if recorded(gate, up) else _swiglu
    return product(gate, up).view(gate.shape)


def projected_swiglu(x: Tensor, project: Callable[..., tuple[Tensor, Tensor]], *weights: Tensor | None) -> Tensor:
    """``swiglu(*project(x, *weights))``, of which x alone is kept: the backward pass computes gate and up again.
    A compiler decides itself what is kept.

    Args:
        x: of any shape, floating.
        project: x, weights → gate and up, of x's shape but for the last dimension, the same each time, recorded for
            autograd; in it nothing but x receives a gradient.
        weights: what else they depend on; kept, too, as what is there anyway.

    Returns:
        As ``swiglu``. Differentiable once, in x.
    """
    if recorded(x) and not is_compiling() and choose_plain(x.device) is not Backend.REFERENCE:
        y = _ProjectedSwiGlu.apply(x, project, *weights)
        return y.view(*x.shape[:-1], y.shape[-1])
    return swiglu(*project(x, *weights))


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary position embeddings (Su et al. 2021) as transformers' Llama has them: halves, not pairs, are rotated.

    Args:
        q, k: [batch, heads, tokens, dim], heads may differ; float32, bfloat16, float16, or float64, which plain torch
            computes; any strides.
        cos, sin: [batch or 1, tokens, dim], in their dtype; constants.

    Returns:
        q and k rotated, of the same shapes; in memory heads lie next to dim, as after a linear layer.

    Raises:
        TypeError, ValueError: the argument at fault, what it was and what it must be.
    """
    for name, t in (("q", q), ("k", k), ("cos", cos), ("sin", sin)):
        check_tensor(name, t)
        if t.dtype != q.dtype or t.dtype not in (*FLOATS, torch.float64) or t.device != q.device:
            raise TypeError(
                f"{name} is {t.dtype} on {t.device}; q, k, cos and sin must share a dtype (float32, "
                "bfloat16, float16 or float64) and a device"
            )
    for name, t in (("q", q), ("k", k)):
        if t.dim() != 4 or t.shape[3] % 2 or (t.shape[0], *t.shape[2:]) != (q.shape[0], *q.shape[2:]):
            raise ValueError(f"{name} has shape {tuple(t.shape)}; it must be [batch, heads, tokens, dim], dim even")
    batch, _, tokens, dim = q.shape
    for name, t in (("cos", cos), ("sin", sin)):
        # Chained, as in linear_4bit: Dynamo answers `in` wrongly where sizes are symbolic.
        if t.shape != cos.shape or (t.shape != (batch, tokens, dim) and t.shape != (1, tokens, dim)):
            raise ValueError(f"{name} has shape {tuple(t.shape)}; it must be ({batch} or 1, {tokens}, {dim})")
    if choose_plain(q.device) is Backend.REFERENCE or q.dtype not in FLOATS:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        return q * cos + _half_turn(q) * sin, k * cos + _half_turn(k) * sin
    turn = _Rope.apply if recorded(q, k) else _rope
    return _heads(turn(q, k, cos, sin), (q.shape, k.shape))


def _half_turn(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


# What the functions of autograd below return are rows, which their callers give x's shape: a view that such a function
# makes may not be changed in place.


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.ops.pyfastpeft.rms_norm.default(as_rows(x), weight, eps)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):  # noqa: ANN001
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return _rms_norm(x, weight, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):  # noqa: ANN001
        x, weight = ctx.saved_tensors
        need_x, need_weight, _ = ctx.needs_input_grad
        dx, dweight = torch.ops.pyfastpeft.rms_norm_backward.default(dy, as_rows(x), weight, ctx.eps, need_weight)
        dweight = dweight[0].to(weight.dtype) if need_weight else None
        return dx.view(x.shape) if need_x else None, dweight, None


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return torch.ops.pyfastpeft.swiglu.default(as_rows(gate), as_rows(up))


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):  # noqa: ANN001
        ctx.save_for_backward(gate, up)
        return _swiglu(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):  # noqa: ANN001
        gate, up = ctx.saved_tensors
        dgate, dup = torch.ops.pyfastpeft.swiglu_backward.default(dy, as_rows(gate), as_rows(up))
        return dgate.view(gate.shape), dup.view(up.shape)


class _ProjectedSwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, project, *weights):  # noqa: ANN001
        ctx.save_for_backward(x, *weights)
        ctx.project = project
        with torch.enable_grad():  # as in the backward pass: without, a layer may take what is for inference alone
            both = project(x.detach().requires_grad_(), *weights)
        return _swiglu(*both)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):  # noqa: ANN001
        x, *weights = ctx.saved_tensors
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            both = ctx.project(x, *weights)
        found = torch.ops.pyfastpeft.swiglu_backward.default(dy, *map(as_rows, both))
        dx = torch.autograd.grad(both, x, [d.view(t.shape) for d, t in zip(found, both, strict=True)])
        return *dx, *[None] * (1 + len(weights))


def _rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, transposed: bool = False) -> tuple[Tensor, Tensor]:
    return torch.ops.pyfastpeft.rope.default(q, k, cos, sin, transposed)


def _heads(rows: tuple[Tensor, Tensor], shapes: tuple[torch.Size, torch.Size]) -> tuple[Tensor, Tensor]:
    """What was turned, [batch · tokens, heads · dim], as [batch, heads, tokens, dim]."""
    return tuple(y.view(b, t, h, d).transpose(1, 2) for y, (b, h, t, d) in zip(rows, shapes, strict=True))


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin):  # noqa: ANN001
        ctx.save_for_backward(cos, sin)
        ctx.shapes = q.shape, k.shape
        return _rope(q, k, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx, dq, dk):  # noqa: ANN001
        turned = _rope(*_heads((dq, dk), ctx.shapes), *ctx.saved_tensors, True)
        return (*_heads(turned, ctx.shapes), None, None)


@fake_of("rms_norm")
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


@fake_of("rms_norm_backward")
def _(dy: Tensor, x: Tensor, weight: Tensor, eps: float, need_weight: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty((1 if need_weight else 0, x.shape[1]), dtype=torch.float32)


@fake_of("swiglu")
def _(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


@fake_of("swiglu_backward")
def _(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape)


@fake_of("rope")
def _(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, transposed: bool) -> tuple[Tensor, Tensor]:
    return tuple(x.new_empty((x.shape[0] * x.shape[2], x.shape[1] * x.shape[3])) for x in (q, k))
