"""A batch's different tokens, out of their rows, and attention of them.

What a causal decoder makes of a token depends on the tokens before it alone. So the tokens that all rows begin with,
such as a chat template's system prompt, come to the same in every row, as do rows that are the same as a whole, and
padding comes to nothing that anybody reads. A decoder's layers can therefore run on the different tokens of a batch,
[1, N, hidden]: first those that the rows share, then each row's own. Attention alone asks which row a token is in: the
shared tokens attend to themselves, the rows' own to theirs, with the shared keys and values as a prefix.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..adapters import Prefix
from ..ops.prefix_attention import key_positions
from ..ops.tracing import is_compiling

# What the mask says of a place in a row. Numbers that no mask of a caller's begins with tell it from those: layers that
# run again under checkpoints get a copy of it, which has lost whatever else it might be known by.
_SEEN, _HIDDEN, _NONE = 0xA5, 0xA6, 0xA7


class Rows(NamedTuple):
    """The rows of a batch, or what was made of them.

    Attributes:
        ids: [rows, length].
        positions: likewise.
        shown: bool, likewise, whether others see a token.
        kept: bool, likewise, whether it is one of those to run.
        places: [batch, length of the batch], where each token of the batch is in all of the rows; None: where it was.
    """

    ids: Tensor
    positions: Tensor
    shown: Tensor
    kept: Tensor
    places: Tensor | None


class DistinctTokens(NamedTuple):
    """A batch's different tokens.

    Attributes:
        ids: [1, N], the shared ones first.
        positions: [1, N].
        mask: for the attention: uint8 [rows, 1, shared + 1, length - shared], which of the places that are a row's own
            have a token, and whether others see it; the third dimension takes no memory.
        places: of :class:`Rows`.
    """

    ids: Tensor
    positions: Tensor
    mask: Tensor
    places: Tensor | None

    @classmethod
    def of(cls, rows: Rows, shared: int) -> DistinctTokens:
        """Of ``rows`` the first ``shared`` tokens, which are alike, and those of the rest that run."""
        kept, shown = rows.kept[:, shared:], rows.shown[:, shared:]
        both = ([t[:1, :shared], t[:, shared:][kept].unsqueeze(0)] for t in (rows.ids, rows.positions))
        mask = torch.full(kept.shape, _NONE, dtype=torch.uint8).masked_fill_(kept, _HIDDEN)
        mask = mask.masked_fill_(kept & shown, _SEEN)[:, None, None].expand(-1, 1, shared + 1, -1)
        return cls(*(torch.cat(parts, 1) for parts in both), mask, rows.places)

    def put_back(self, t: Tensor) -> Tensor:
        """[1, N, ...] as [batch, length, ...] of the batch that there was, zeros where it has no token."""
        shared, own = _split(t, self.mask, 1)
        rows = torch.cat([shared.expand(len(self.mask), *shared.shape[1:]), _in_rows(own[0], self.mask)], 1)
        if self.places is None:
            return rows
        return rows.flatten(0, 1).index_select(0, self.places.flatten()).unflatten(0, self.places.shape)


def are_distinct(mask: Tensor | None) -> bool:
    """Whether an attention mask is that of :class:`DistinctTokens`."""
    if mask is None or mask.dtype != torch.uint8 or mask.dim() != 4 or is_compiling() or not mask.numel():
        return False
    return int(mask[0, 0, 0, 0]) in (_SEEN, _HIDDEN, _NONE)


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
        query: [1, heads, N, dim]; key and value too.
        prefix: of all rows; where these share no tokens, each may have its own.

    Returns:
        [1, N, heads, dim].
    """
    parts = [_split(t, mask, 2) for t in (query, key, value)]
    q, k, v = (_in_rows(own[0].transpose(0, 1), mask).transpose(1, 2) for _, own in parts)
    outs = []
    if mask.shape[2] > 1:
        q0, k0, v0 = (shared for shared, _ in parts)
        outs.append(attend(q0, k0, v0, None, prefix))
        if prefix is not None:
            k0, v0 = torch.cat([prefix.k, k0], 2), torch.cat([prefix.v, v0], 2)
        prefix = Prefix(k0, v0)
    layout = _layout_of(mask)
    out = attend(q, k, v, layout.keys, prefix).flatten(0, 1)
    outs.append((out if layout.places is None else out.index_select(0, layout.places)).unsqueeze(0))
    return torch.cat(outs, 1)


class _Layout(NamedTuple):
    """Where a mask's own tokens are among all places of the rows, and as the keys' positions; None: everywhere."""

    places: Tensor | None
    keys: Tensor | None


def _layout_of(mask: Tensor) -> _Layout:
    """Worked out once for all layers."""
    layout: _Layout | None = getattr(mask, "_layout", None)
    if layout is None:
        own = mask[:, 0, 0]
        kept, seen = own != _NONE, own == _SEEN
        places = None if kept.all() else kept.flatten().nonzero()[:, 0]
        layout = mask._layout = _Layout(places, None if seen.all() else key_positions(seen, 0))
    return layout


def _split(t: Tensor, mask: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """What the rows share, and what is their own."""
    shared = mask.shape[2] - 1
    return t.split([shared, t.shape[dim] - shared], dim)


def _in_rows(own: Tensor, mask: Tensor) -> Tensor:
    """[tokens of their own, ...] as [rows, length of their own, ...], zeros where there is none."""
    shape, places = (mask.shape[0], mask.shape[3]), _layout_of(mask).places
    if places is not None:
        own = own.new_zeros(shape[0] * shape[1], *own.shape[1:]).index_copy(0, places, own)
    return own.unflatten(0, shape)
