"""``prefix_attention``: softmax attention with a prefix of keys and values that all queries see, one operator.

The prefix has no batch dimension, or each row picks one: it is never repeated or concatenated, and its gradient is
summed over the batch inside. Forward saves its inputs, one float a query and the result, but for few keys on a CPU in
code that nobody compiles; nothing of size [queries, keys] exists at any time (the reference, which serves other devices
and dtypes, excepted).
"""

from __future__ import annotations

from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from . import reference
from .autocast import autocast_dtype
from .backends import Backend, choose_attention
from .checks import as_count, check_flag, check_matrix, check_number, check_tensor
from .library import fake_of
from .once import once_differentiable
from .reference import HIDDEN
from .tracing import recorded, traced

# Up to here the CPU's kernel holds all keys at once in the backward pass, and does without the result.
_FEW_KEYS = 96


def key_positions(mask: Tensor, first_query: int) -> Tensor:
    """A padding mask as the positions that :func:`prefix_attention` takes.

    Args:
        mask: [B, S], nonzero = visible.
        first_query: which of the S keys is the first query's own (S - T where the queries' keys are the last).

    Returns:
        int32 [B, 1, 1, S]: the key's place counted from the first query's, plus ``HIDDEN`` where the mask is 0.

    Raises:
        TypeError, ValueError: the argument at fault, what it was and what it must be.
    """
    check_matrix("mask", mask, "[B, S]")
    if not traced():  # a compiler would make limits of what it need not know
        if not isinstance(first_query, (int, Integral)):
            raise TypeError(f"first_query is a {type(first_query).__name__}; it must be an integer")
        most = HIDDEN // 2  # places beyond would be taken for those of hidden keys
        if not mask.shape[1] - most < first_query < most:
            raise ValueError(f"first_query is {first_query}; it must lie between S - 2**29 and 2**29")
    return _counted_from(mask, first_query)


def _counted_from(mask: Tensor, first_query: int) -> Tensor:
    places = torch.arange(-first_query, mask.shape[1] - first_query, dtype=torch.int32, device=mask.device)
    return torch.where(mask != 0, places, places + HIDDEN)[:, None, None, :]


def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor | None = None,
    prefix_v: Tensor | None = None,
    causal: bool = True,
    scale: float | Tensor | None = None,
    mask: Tensor | None = None,
    prefix_index: Tensor | None = None,
    *,
    window: int | None = None,
    prefix_lengths: Tensor | None = None,
) -> Tensor:
    """``softmax(q · [prefix_k; k]ᵀ · scale) · [prefix_v; v]``.

    Args:
        q: [B, H, T, D], float32, bfloat16 or float16 (float64 and other devices take plain torch); any strides.
        k, v: [B, Hkv, S, D], Hkv dividing H: query head h reads head h // (H / Hkv).
        prefix_k, prefix_v: [Hkv, P, D], seen by every row; or [n, Hkv, P, D], of which ``prefix_index`` picks one a
            row. Any floating dtype; used in the dtype of q. A prefix lies right before the first visible key of its
            row, and every query sees it (within the window).
        causal: query t sees its own key and those before it; the last T keys are the queries' own.
        scale: a number, or a tensor of one that needs no gradient; D^-0.5 where None.
        mask: bool or integer [B, S], nonzero = visible; or int32 [B, 1, 1, S], the place of each key counted from the
            first query's (see :func:`key_positions`): then causal means place <= t, wherever the keys lie.
        prefix_index: int64 [B], the prefix of each row; -1 is none. (On a GPU, which is not waited for, so is any other
            number that is no prefix's, and a length is cut to P.)
        window: query t sees keys fewer than ``window`` places before it, itself included.
        prefix_lengths: int64 [n], the true length of each prefix; what follows is padding.

    Returns:
        [B, H, T, D] in q's dtype, in memory [B, T, H, D]; zeros for a query that sees nothing. Sums are float32.
        Differentiable in q, k, v and the prefix, whose gradient is summed over the batch in float32.

    Raises:
        TypeError, ValueError: the argument at fault, what it was and what it must be.
        RuntimeError: a number in ``prefix_index`` or ``prefix_lengths`` is out of range, which the operator finds as it
            reads them.
    """
    _check_floating(q, k, v)
    dtype = autocast_dtype(q.device)
    if dtype is not None:
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    _check_tensors(q, k, v)
    batch, _, tokens, dim = q.shape
    keys = k.shape[2]
    check_flag("causal", causal)
    if scale is not None:
        check_number("scale", scale)
        if isinstance(scale, Tensor) and recorded(scale):
            raise ValueError("scale requires a gradient, and prefix_attention has none for it; multiply q by it")
    if mask is not None:
        check_tensor("mask", mask)
    if mask is not None and mask.device != q.device:
        raise ValueError(f"mask is on {mask.device}; it must be on q's device, {q.device}")
    if causal and keys < tokens and (mask is None or mask.dim() != 4):
        raise ValueError(f"k has {keys} keys; causal attention needs at least the {tokens} of the queries")
    if prefix_k is not None or prefix_v is not None:
        prefix_k, prefix_v = _check_prefix(prefix_k, prefix_v, prefix_index, prefix_lengths, q, k)
    elif prefix_index is not None or prefix_lengths is not None:
        name = "prefix_lengths" if prefix_index is None else "prefix_index"
        raise ValueError(f"{name} is given without prefix_k and prefix_v")
    if window is not None:
        window = as_count("window", window)
        if window >= 2**63:
            raise ValueError(f"window is {window}; it must be an integer below 2**63")
    positions = None if mask is None else _positions(mask, batch, keys, tokens)
    scale = dim**-0.5 if scale is None else float(scale)
    selection = (prefix_index, prefix_lengths, positions)
    if choose_attention(q) is Backend.REFERENCE:
        return reference.attention(q, k, v, prefix_k, prefix_v, *selection, causal, scale, window)
    rest = (*selection, causal, scale, window or 0)
    if recorded(q, k, v, prefix_k, prefix_v):
        return _PrefixAttention.apply(q, k, v, prefix_k, prefix_v, *rest)
    return _forward(q, k, v, prefix_k, prefix_v, rest, False)[0].transpose(1, 2)


def _check_floating(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, t in (("q", q), ("k", k), ("v", v)):
        if not isinstance(t, Tensor) or not t.is_floating_point():
            what = f"has dtype {t.dtype}" if isinstance(t, Tensor) else f"is a {type(t).__name__}"
            raise TypeError(f"{name} {what}; it must be a floating-point tensor")


def _check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.dtype != q.dtype or t.device != q.device:
            raise TypeError(f"{name} is {t.dtype} on {t.device}; it must be {q.dtype} on {q.device}, as q is")
        if t.dim() != 4:
            raise ValueError(f"{name} has shape {tuple(t.shape)}; it must be [batch, heads, tokens, head size]")
    batch, heads, _, dim = q.shape
    if dim < 1 or heads < 1:
        raise ValueError(f"q has shape {tuple(q.shape)}; it must have a head and a head size of at least 1")
    if k.shape[0] != batch or k.shape[3] != dim:
        raise ValueError(
            f"k has shape {tuple(k.shape)}; its batch and head size must be those of q, which has shape "
            f"{tuple(q.shape)}"
        )
    if k.shape[1] < 1 or heads % k.shape[1] != 0:
        raise ValueError(f"k has {k.shape[1]} heads; their number must divide that of q, {heads}")
    if v.shape != k.shape:
        raise ValueError(f"v has shape {tuple(v.shape)}; it must be that of k, {tuple(k.shape)}")


def _check_prefix(
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    index: Tensor | None,
    lengths: Tensor | None,
    q: Tensor,
    k: Tensor,
) -> tuple[Tensor, Tensor]:
    """Both as [n, Hkv, P, D]."""
    for name, t in (("prefix_k", prefix_k), ("prefix_v", prefix_v)):
        if not isinstance(t, Tensor) or not t.is_floating_point() or t.device != q.device:
            what = f"{t.dtype} on {t.device}" if isinstance(t, Tensor) else f"a {type(t).__name__}"
            raise TypeError(f"{name} is {what}; it must be a floating-point tensor on {q.device}, as q is")
        heads, dim = k.shape[1], k.shape[3]
        if t.dim() not in (3, 4) or t.shape[-3] != heads or t.shape[-1] != dim:
            raise ValueError(
                f"{name} has shape {tuple(t.shape)}; it must be [{heads}, P, {dim}] or [n, {heads}, P, {dim}], as k "
                f"has {heads} heads of size {dim}"
            )
    if prefix_v.shape != prefix_k.shape:
        raise ValueError(f"prefix_v has shape {tuple(prefix_v.shape)}; it must be that of prefix_k")
    if prefix_k.dim() == 3:
        prefix_k, prefix_v = prefix_k.unsqueeze(0), prefix_v.unsqueeze(0)
    slots = prefix_k.shape[0]
    if index is None and slots != 1:
        raise ValueError(f"prefix_index is None; of {slots} prefixes it must pick one a row")
    for name, t, n in (("prefix_index", index, q.shape[0]), ("prefix_lengths", lengths, slots)):
        if t is not None:
            check_tensor(name, t)
        if t is not None and (t.dtype != torch.int64 or t.shape != (n,) or t.device != q.device):
            what = f"{t.dtype} of shape {tuple(t.shape)} on {t.device}"
            raise ValueError(f"{name} is {what}; it must be int64 of shape ({n},) on {q.device}")
    return prefix_k, prefix_v


def _positions(mask: Tensor, batch: int, keys: int, tokens: int) -> Tensor:
    """int32 [B, S]"""
    if mask.shape == (batch, 1, 1, keys) and mask.dtype == torch.int32:
        return mask[:, 0, 0]
    if mask.shape != (batch, keys) or mask.is_floating_point() or mask.is_complex():
        raise ValueError(
            f"mask is {mask.dtype} of shape {tuple(mask.shape)}; it must be bool or integer of shape {(batch, keys)}, "
            f"nonzero where a key is visible, or int32 key positions of shape {(batch, 1, 1, keys)}"
        )
    return _counted_from(mask, keys - tokens)[:, 0, 0]


def _as(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if t is None else t.to(dtype)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor | None, prefix_v: Tensor | None, rest: tuple, need_lse: bool
) -> tuple[Tensor, Tensor]:
    """The result [B, T, H, D], and for the backward pass the logarithm of the sum of each query's weights."""
    prefix_k, prefix_v = _as(prefix_k, q.dtype), _as(prefix_v, q.dtype)
    return torch.ops.pyfastpeft.prefix_attention.default(q, k, v, prefix_k, prefix_v, *rest, need_lse)


class _PrefixAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, prefix_k, prefix_v, index, lengths, positions, causal, scale, window):  # noqa: ANN001
        rest = (index, lengths, positions, causal, scale, window)
        out, lse = _forward(q, k, v, prefix_k, prefix_v, rest, True)
        # Compilers would make a limit of the number.
        few = not traced() and k.shape[2] + (0 if prefix_k is None else prefix_k.shape[2]) <= _FEW_KEYS
        kept = None if few and choose_attention(q) is Backend.NATIVE else out
        ctx.save_for_backward(q, k, v, prefix_k, prefix_v, index, lengths, positions, kept, lse)
        ctx.rest = rest[3:]
        return out.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):  # noqa: ANN001
        q, k, v, prefix_k, prefix_v, index, lengths, positions, out, lse = ctx.saved_tensors
        dq, dk, dv, *dprefix = torch.ops.pyfastpeft.prefix_attention_backward.default(
            dout.to(q.dtype), q, k, v, _as(prefix_k, q.dtype), _as(prefix_v, q.dtype), index, lengths, positions,
            *ctx.rest, out, lse,
        )  # fmt: skip
        dprefix = (None, None) if prefix_k is None else (d.to(prefix_k.dtype) for d in dprefix)
        return *(d.transpose(1, 2) for d in (dq, dk, dv)), *dprefix, *([None] * 6)


@fake_of("prefix_attention")
def _(q: Tensor, k: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    batch, heads, tokens, dim = q.shape
    kv_heads, need_lse = k.shape[1], rest[-1]
    lse = q.new_empty((batch * kv_heads if need_lse else 0, tokens * (heads // kv_heads)), dtype=torch.float32)
    return q.new_empty((batch, tokens, heads, dim)), lse


@fake_of("prefix_attention_backward")
def _(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    batch, heads, tokens, dim = q.shape
    kv_heads, keys = k.shape[1:3]
    dk, dv = (q.new_empty((batch, keys, kv_heads, dim)) for _ in range(2))
    shape = (0, kv_heads, 0, dim) if prefix_k is None else prefix_k.shape
    dprefix = (q.new_empty(shape, dtype=torch.float32) for _ in range(2))
    return q.new_empty((batch, tokens, heads, dim)), dk, dv, *dprefix
