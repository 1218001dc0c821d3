"""A batch's different tokens, out of their rows, and attention of them.

What a causal decoder makes of a token depends on the tokens before it alone. So the tokens that rows begin with alike,
such as the system prompt of a chat template, or a prompt that several answers follow, come to the same in each of these
rows, and padding comes to nothing that anybody reads. A decoder's layers can therefore run on the different tokens of a
batch, [N, 1, hidden], in the order of the rows. Attention alone asks which rows a token is in: the tokens that all rows
begin with attend to themselves, and the rows' other tokens to theirs, in every row that has them, with the former's
keys and values as a prefix.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from ..adapters import AdapterBank, Prefix
from ..ops.prefix_attention import key_positions
from ..ops.rows import take_rows
from ..ops.tracing import is_compiling

# What the mask says of a place in a row, in bits. Numbers that no mask of a caller's begins with tell it from those:
# layers that run again under checkpoints get a copy of it, which has lost whatever else it might be known by.
_MARK, _KEPT, _SHOWN, _ALIKE = 0xA0, 1, 2, 4


class Rows(NamedTuple):
    """The rows of a batch, or what was made of them.

    Attributes:
        ids: [rows, length].
        positions: likewise.
        shown: bool, likewise, whether others see a token.
        kept: bool, likewise, whether anybody reads what becomes of a token; those that are shown are kept.
        chosen: int64, likewise, which of the choices in the bank a token's row made; the same have one number.
        alike: bool, likewise, whether a token comes to the same as that of the row above.
        places: [batch, length of the batch], where each token of the batch is in all of the rows; None: where it was.
    """

    ids: Tensor
    positions: Tensor
    shown: Tensor
    kept: Tensor
    chosen: Tensor
    alike: Tensor
    places: Tensor | None

    @classmethod
    def of(cls, ids: Tensor, positions: Tensor, shown: Tensor, kept: Tensor, places: Tensor | None = None) -> Rows:
        """Rows that use the same adapters and of which nothing is known to be alike."""
        return cls(ids, positions, shown, kept, torch.zeros_like(ids), torch.zeros_like(kept), places)

    @property
    def run(self) -> Tensor:
        """bool, [rows, length], which tokens run."""
        return self.kept & ~self.alike


class DistinctTokens(NamedTuple):
    """A batch's different tokens.

    Attributes:
        ids: [N, 1], those that all rows begin with first.
        positions: [N, 1].
        mask: for the attention: uint8 [rows, 1, shared + 1, length - shared], what there is in the places behind those
            that all rows share; the third dimension takes no memory.
        sources: [batch, length of the batch], which of the N each token of the batch is; -1: none.
        chosen: [N], of :class:`Rows`.
        bank: in which rows choose their adapters; None: all use the active ones.
    """

    ids: Tensor
    positions: Tensor
    mask: Tensor
    sources: Tensor
    chosen: Tensor
    bank: AdapterBank | None

    @classmethod
    def of(cls, rows: Rows, bank: AdapterBank | None) -> DistinctTokens:
        run, shared = rows.run, _shared(rows)
        bits = _MARK + _KEPT * rows.kept + _SHOWN * rows.shown + _ALIKE * rows.alike
        mask = bits[:, shared:].to(torch.uint8)[:, None, None].expand(-1, 1, shared + 1, -1)
        sources = _sources(rows.kept, rows.alike)
        if rows.places is not None:
            sources = sources.flatten()[rows.places]
        ids, positions = (t[run].unsqueeze(1) for t in (rows.ids, rows.positions))
        return cls(ids, positions, mask, sources, rows.chosen[run], bank)

    def choosing(self) -> AbstractContextManager[None]:
        """With the adapters in force for each of the N that its row chose."""
        if self.bank is None:
            return nullcontext()
        return self.bank.using(self.bank.mode.of_rows(self.chosen.tolist()))

    def put_back(self, t: Tensor) -> Tensor:
        """[N, ...] as [batch, length, ...] of the batch that there was, zeros where it has no token."""
        return take_rows(t, self.sources)


def _shared(rows: Rows) -> int:
    """How many tokens all of several rows begin with, but for their last."""
    alike = (rows.alike & rows.shown)[1:, :-1].all(0)
    return int(alike.cumprod(0).sum()) if len(rows.ids) > 1 else 0


def _sources(kept: Tensor, alike: Tensor) -> Tensor:
    """Which of the tokens that run is in each place of rows; -1: none."""
    run = kept & ~alike
    number = run.flatten().cumsum(0).view_as(run) - 1
    return number.masked_fill(~run, -1).cummax(0).values.masked_fill(~kept, -1)


def are_distinct(mask: Tensor | None) -> bool:
    """Whether an attention mask is that of :class:`DistinctTokens`."""
    if mask is None or mask.dtype != torch.uint8 or mask.dim() != 4 or is_compiling() or not mask.numel():
        return False
    return int(mask[0, 0, 0, 0]) & ~(_KEPT | _SHOWN | _ALIKE) == _MARK


def attend_in_rows(
    attend: Callable[[Tensor, Tensor, Tensor, Tensor | None, Prefix | None], Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    prefix: Prefix | None,
) -> Tensor:
    """Attention of distinct tokens.

    Args:
        attend: of query, key, value, mask and prefix, [batch, tokens, heads, dim].
        query: [N, heads, 1, dim]; key and value too.
        prefix: of all rows; where these share no tokens, each may have its own.

    Returns:
        [N, 1, heads, dim].
    """
    layout, shared = _layout_of(mask), mask.shape[2] - 1
    parts = [t.squeeze(2).split([shared, len(t) - shared]) for t in (query, key, value)]
    q, k, v = (layout.in_rows(own).transpose(1, 2) for _, own in parts)
    outs = []
    if shared:
        q0, k0, v0 = (t.unsqueeze(0).transpose(1, 2) for t, _ in parts)
        outs += attend(q0, k0, v0, None, prefix)
        if prefix is not None:
            k0, v0 = torch.cat([prefix.k, k0], 2), torch.cat([prefix.v, v0], 2)
        prefix = Prefix(k0, v0)
    out = attend(q, k, v, layout.keys, prefix).flatten(0, 1)
    outs.append(out if layout.places is None else take_rows(out, layout.places))
    return torch.cat(outs).unsqueeze(1)


class _Layout(NamedTuple):
    """What a mask says of the places of rows.

    Attributes:
        sources: [rows, places], which token each has; -1: none.
        places: [tokens], where each is, among all places; None: each place has one of its own.
        keys: the keys' positions; None: all are seen.
    """

    sources: Tensor
    places: Tensor | None
    keys: Tensor | None

    def in_rows(self, own: Tensor) -> Tensor:
        """[tokens, ...] as [rows, places, ...], zeros where there is none."""
        return own.unflatten(0, self.sources.shape) if self.places is None else take_rows(own, self.sources)


def _layout_of(mask: Tensor) -> _Layout:
    """Worked out once for all layers."""
    layout: _Layout | None = getattr(mask, "_layout", None)
    if layout is None:
        kept, shown, alike = ((mask[:, 0, 0] & bit) != 0 for bit in (_KEPT, _SHOWN, _ALIKE))
        run = kept & ~alike
        places = None if run.all() else run.flatten().nonzero()[:, 0]
        keys = None if shown.all() else key_positions(shown, 0)
        layout = mask._layout = _Layout(_sources(kept, alike), places, keys)
    return layout
