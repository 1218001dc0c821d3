"""``add_lora``: the LoRA branch beside a product in full precision."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..formats.packed import FLOATS
from . import reference
from .backends import Backend, as_rows, choose_plain, is_plain
from .checks import check_dropout, check_matrix, check_number, check_tensor
from .tracing import is_compiling, recorded


def add_lora(base: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float | Tensor, dropout: float = 0.0) -> Tensor:
    """``base + scaling · (dropout(x) · Aᵀ) · Bᵀ``, in one pass over x and one over ``base``.

    On CPUs as in :func:`linear_4bit`: the operands of a product have 16 bits where x has (what is added errs by up to
    4e-3 then, as under autocast), sums are float32; the backward pass keeps x itself and S = x · Aᵀ. Elsewhere, under
    autocast and in compiled code it is plain torch in A's dtype.

    Args:
        base: [..., N], the product with the layer's own weight.
        x: [..., K].   a: [R, K].   b: [N, R], each of a floating dtype of its own.
        scaling: a number, or a tensor of one.
        dropout: the probability with which an element of x is left out.

    Returns:
        [..., N] in the dtype of ``base``. Differentiable in ``base``, ``x``, ``a`` and ``b``.

    Raises:
        TypeError: no tensor, or no number.
        ValueError: a shape or dtype that does not fit; ``a`` or ``b`` on another device than ``x``; torch would compute
            with whatever is in memory where one is on the meta device (offloaded).
    """
    try:
        return _added(base, x, a, b, scaling, dropout)
    except (AttributeError, IndexError, RuntimeError, TypeError):
        _check(base, x, a, b, scaling, dropout)  # only now: this is the path of every token
        raise


def _added(base: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float | Tensor, dropout: float) -> Tensor:
    if not _served(base, x, a, b) or isinstance(scaling, Tensor):
        if not a.device == b.device == x.device:
            raise ValueError(f"a is on {a.device} and b on {b.device}; they must be where x is, on {x.device}")
        x = F.dropout(x.to(a.dtype), dropout) if dropout else x.to(a.dtype)
        update = F.linear(F.linear(x, a), b.to(a.dtype))
        one = not isinstance(scaling, Tensor) or scaling.numel() == 1
        if update.shape != base.shape or not one:  # torch would spread one over the other
            _check(base, x, a, b, scaling, dropout)
        return (base + update * scaling).to(base.dtype)
    if base.shape[:-1] != x.shape[:-1]:  # of as many rows, in another order
        _check(base, x, a, b, scaling, dropout)
    seed = reference.new_seed(x.device) if dropout else None
    rows = as_rows(base), as_rows(x)
    if recorded(base, x, a, b):
        y = _AddLora.apply(*rows, a, b, scaling, seed, dropout)[0]
    else:
        y = torch.ops.pyfastpeft.lora_forward.default(*rows, a, b, scaling, seed, dropout)[0]
    return y.view(base.shape)


def _check(base: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float | Tensor, dropout: float) -> None:
    for name, t in (("base", base), ("x", x), ("a", a), ("b", b)):
        check_tensor(name, t)
        if not t.is_floating_point():
            raise ValueError(f"{name} has dtype {t.dtype}; it must be floating")
    check_matrix("a", a, "[R, K]")
    check_matrix("b", b, "[N, R]")
    (r, k), n = a.shape, len(b)
    if r < 1 or b.shape[1] != r:
        raise ValueError(f"b has shape {tuple(b.shape)}; it must be [N, R], R >= 1, as a is {tuple(a.shape)}")
    if x.dim() == 0 or x.shape[-1] != k:
        raise ValueError(f"x has shape {tuple(x.shape)}; its last dimension must be K = {k}, as a is {tuple(a.shape)}")
    if base.shape != (*x.shape[:-1], n):
        raise ValueError(f"base has shape {tuple(base.shape)}; it must be {(*x.shape[:-1], n)}, as x and b have it")
    check_number("scaling", scaling)
    check_dropout("dropout", dropout)


def _served(base: Tensor, x: Tensor, a: Tensor, b: Tensor) -> bool:
    if is_compiling() or torch.is_autocast_enabled("cpu") or type(x) is not Tensor:
        return False
    floats = x.dtype is base.dtype and all(t.is_cpu and t.dtype in FLOATS for t in (base, x, a, b))
    return floats and is_plain(a) and is_plain(b) and choose_plain(x.device) is Backend.NATIVE


class _AddLora(torch.autograd.Function):
    """(y, S): S is an output so that what is saved of it has a gradient itself, without x."""

    @staticmethod
    def forward(ctx, base, x, a, b, scaling, seed, dropout):  # noqa: ANN001
        y, s = torch.ops.pyfastpeft.lora_forward.default(base, x, a, b, scaling, seed, dropout)
        ctx.save_for_backward(x if a.requires_grad else None, s if b.requires_grad else None, a, b, seed)
        ctx.rest = scaling, dropout, x.dtype
        ctx.set_materialize_grads(False)
        return y, s

    @staticmethod
    def backward(ctx, dy, ds):  # noqa: ANN001
        if dy is None and ds is None:  # what is behind y gives it no gradient
            return (None,) * len(ctx.needs_input_grad)
        x, s, a, b, seed = ctx.saved_tensors
        scaling, dropout, dtype = ctx.rest
        needs = _, need_x, need_a, need_b = ctx.needs_input_grad[:4]
        if ds is not None or torch.is_grad_enabled():  # differentiated again
            dy = b.new_zeros(len(ds), len(b), dtype=dtype) if dy is None else dy
            grads = reference.branch_backward(dy, x, s, a, b, None, scaling, seed, dropout, *needs[1:], ds)
            return dy, *grads, None, None, None
        dx, da, db = torch.ops.pyfastpeft.lora_backward.default(dy, x, s, a, b, scaling, seed, dropout, need_x)
        da, db = da.to(a.dtype) if need_a else None, db.to(b.dtype) if need_b else None
        return dy, dx if need_x else None, da, db, None, None, None
