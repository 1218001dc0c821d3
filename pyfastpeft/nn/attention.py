"""Attention: a self-attention layer on :func:`pyfastpeft.ops.prefix_attention`, for models outside transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..ops import prefix_attention, rope
from ..ops.autocast import autocast_dtype
from ..ops.checks import as_count, check_flag, check_tensor

if TYPE_CHECKING:
    from ..adapters import Prefix


class Attention(nn.Module):
    """Multi-head (or grouped-query) self-attention.

    The projections are ordinary linear layers of Llama's names, ``q_proj``, ``k_proj``, ``v_proj`` and ``o_proj``; a
    :class:`Linear4bit` may take the place of each.

    Args:
        hidden_size: of the input and of the result.
        num_heads: of the queries.
        num_kv_heads: of keys and values; it divides ``num_heads``. Default: as many.
        head_dim: default ``hidden_size / num_heads``.
        bias: whether the projections have one.
        causal: a token sees itself and what comes before it; else it sees all.
        window: of these, the nearest ``window`` only. Default: all.

    Raises:
        TypeError: ``causal`` is neither true nor false.
        ValueError: head counts or sizes that do not divide, or are no integers of at least 1.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = False,
        causal: bool = True,
        window: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        hidden_size, num_heads = as_count("hidden_size", hidden_size), as_count("num_heads", num_heads)
        num_kv_heads = as_count("num_kv_heads", num_kv_heads)
        head_dim = None if head_dim is None else as_count("head_dim", head_dim)
        window = None if window is None else as_count("window", window)
        check_flag("causal", causal)
        if num_heads % num_kv_heads:
            raise ValueError(f"num_kv_heads is {num_kv_heads}; it must divide num_heads, {num_heads}")
        if head_dim is None and hidden_size % num_heads:
            raise ValueError(f"num_heads is {num_heads}; without a head_dim it must divide hidden_size, {hidden_size}")
        self.hidden_size, self.num_heads, self.num_kv_heads = hidden_size, num_heads, num_kv_heads
        self.head_dim = hidden_size // num_heads if head_dim is None else head_dim
        self.causal, self.window = causal, window
        width, kv_width = num_heads * self.head_dim, num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(hidden_size, width, bias=bias, device=device, dtype=dtype)
        self.k_proj = nn.Linear(hidden_size, kv_width, bias=bias, device=device, dtype=dtype)
        self.v_proj = nn.Linear(hidden_size, kv_width, bias=bias, device=device, dtype=dtype)
        self.o_proj = nn.Linear(width, hidden_size, bias=bias, device=device, dtype=dtype)

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor] | None = None,
        past: tuple[Tensor, Tensor] | None = None,
        mask: Tensor | None = None,
        prefix: Prefix | tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The tokens ``x`` [B, T, hidden_size] after attention to themselves, to ``past`` and to a prefix.

        Args:
            rotary: cos and sin, [B or 1, T, head_dim] in x's dtype, of the tokens' positions; they turn queries and
                new keys as in Llama (:func:`pyfastpeft.ops.rope`).
            past: the keys and values of the tokens before, as an earlier call returned them.
            mask: bool or integer [B, past + T], nonzero = visible.
            prefix: keys and values [kv heads, P, head_dim] that every row sees before its own, or what
                :class:`pyfastpeft.adapters.Prefix` says. Keys are taken as they are; tokens usually begin at position
                P.

        Returns:
            [B, T, hidden_size], and the keys and values [B, kv heads, past + T, head_dim] for the next call.

        Raises:
            TypeError, ValueError: the argument at fault, what it was and what it must be.
        """
        check_tensor("x", x)
        if x.dim() != 3 or x.shape[2] != self.hidden_size:
            shape = f"[batch, tokens, hidden_size], hidden_size = {self.hidden_size}"
            raise ValueError(f"x has shape {tuple(x.shape)}; it must be {shape}")
        if type(self.q_proj) is nn.Linear and x.dtype != self.q_proj.weight.dtype and autocast_dtype(x.device) is None:
            raise TypeError(f"x has dtype {x.dtype}; it must be that of the projections, {self.q_proj.weight.dtype}")
        q, k, v = (
            projection(x).unflatten(2, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if rotary is not None:
            if self.head_dim % 2:
                raise ValueError(f"head_dim is {self.head_dim}; with rotary it must be even")
            q, k = rope(q, k, *_pair("rotary", rotary, "cos and sin"))
        if past is not None:
            past_k, past_v = _pair("past", past, "keys and values")
            batch, heads, _, size = k.shape
            for name, t in (("keys", past_k), ("values", past_v)):
                check_tensor(f"{name} of past", t)
                if t.dim() != 4 or (*t.shape[:2], t.shape[3]) != (batch, heads, size):
                    shape = f"[{batch}, {heads}, past, {size}]"
                    raise ValueError(f"past has {name} of shape {tuple(t.shape)}; it must be {shape}")
            k, v = torch.cat((past_k, k), 2), torch.cat((past_v, v), 2)
        try:
            parts = (None, None) if prefix is None else tuple(prefix)
        except TypeError:
            what = "a pair of tensors, keys and values"
            raise TypeError(f"prefix is a {type(prefix).__name__}; it must be {what}") from None
        if not 2 <= len(parts) <= 4:
            held = "keys and values, and may hold an index and lengths"
            raise ValueError(f"prefix holds {len(parts)} parts; it must hold {held}")
        prefix_k, prefix_v, index, lengths = (*parts, None, None)[:4]
        out = prefix_attention(
            q,
            k,
            v,
            prefix_k,
            prefix_v,
            causal=self.causal,
            mask=mask,
            prefix_index=index,
            window=self.window,
            prefix_lengths=lengths,
        )
        return self.o_proj(out.transpose(1, 2).flatten(2)), (k, v)

    def extra_repr(self) -> str:
        window = "" if self.window is None else f", window={self.window}"
        return f"heads={self.num_heads}, kv_heads={self.num_kv_heads}, causal={self.causal}{window}"


def _pair(name: str, value: Any, what: str) -> tuple[Tensor, Tensor]:
    """The two parts of the argument ``name``, which may be one tensor."""
    try:
        first, second = value
    except (TypeError, ValueError):
        raise TypeError(f"{name} is a {type(value).__name__}; it must be a pair of tensors, {what}") from None
    return first, second
