"""Each token of a batch computed once: which calls of a decoder run on its different tokens
(:mod:`.distinct_tokens`) in the place of all.

Those that begin with no token in a cache, where rows are or begin alike, are packed, or are padded. Padding is left
out where the model around the decoder is transformers' own and makes something of other tokens alone: with labels that
leave it out in training, for the logits of rows' last tokens, or for the class of each row.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from contextvars import ContextVar
from types import NoneType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from transformers.loss.loss_utils import ForSequenceClassificationLoss
from transformers.modeling_layers import GenericForSequenceClassification

from ..nn.ends import output_head
from ..nn.hooks import GLOBAL_HOOKS
from ..ops.cross_entropy import IGNORED
from ..ops.tracing import traced, transformed
from .distinct_tokens import DistinctTokens, Rows
from .forwards import ModuleForward, hook, unhook
from .fused_layers import OF_LLAMA, depends_on_length, kernelized, written_in_transformers
from .known_hooks import only_known_hooks
from .soft_prompts.first_label import FIRST

_UNREAD: ContextVar[Tensor | None] = ContextVar("_UNREAD", default=None)
"""The attention mask of the call that runs here, if nothing reads what the model makes of the padding in it."""

_WORTH, _WORTH_CACHED = 15 / 16, 7 / 8  # of the tokens; more are not worth the copies, of which a cache needs two more
_SPREAD = 4  # times the memory that queries, keys and values of packed sequences may take in rows
_FUNCTIONS = (*OF_LLAMA, "create_sliding_window_causal_mask")
# Modules that make something of each token by itself.
_TORCHS = frozenset(
    getattr(nn, name)
    for name in (
        *("Linear", "Embedding", "Identity", "Dropout", "LayerNorm", "RMSNorm", "SiLU", "GELU", "ReLU", "Tanh"),
        *("ModuleList", "ModuleDict", "ParameterList", "ParameterDict", "Sequential"),
    )
)
_PACKAGES = ("pyfastpeft.", "peft.tuners.lora.", "bitsandbytes.")
_DECORATED = torch.no_grad()(lambda: None).__code__  # by torch's no_grad and its like, as transformers 5.20's RoPE is


def tell_of_padding(model: nn.Module, tell: bool = True) -> None:
    """Let ``model``, which a decoder is in, tell it of padding that nothing reads, or not any more."""
    if tell:
        hook(model, _begin, _end)
    else:
        unhook(model, _begin, _end)


def _begin(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    if not traced():
        _UNREAD.set(None if transformed() else _unread_padding(model, kwargs))


def _end(model: nn.Module, args: tuple, output: Any) -> None:
    if not traced():
        _UNREAD.set(None)


def _unread_padding(model: nn.Module, kwargs: dict[str, Any]) -> Tensor | None:
    ids, mask = (kwargs.get(name) for name in ("input_ids", "attention_mask"))
    if not (_of_tokens(mask) and _of_tokens(ids) and ids.shape == mask.shape and ids.numel()):
        return None
    forward = vars(model).get("forward")  # accelerate puts its own around the class's
    known = forward is None or (getattr(forward, "__module__", None) or "").startswith(("accelerate.", "transformers."))
    if not (known and written_in_transformers(type(model).forward) and only_known_hooks(vars(model))):
        return None  # others may read more
    classifies = type(model).forward is GenericForSequenceClassification.forward
    read = _pooled(model, ids) if classifies else _read(model, kwargs, ids)
    if read is None or (read & (mask == 0)).any():
        return None
    head = model.score if classifies else output_head(model)
    if head is None or not all(_is_plain(vars(m)) and _known(type(m)) for m in head.modules()):
        return None
    if kwargs.get("labels") is not None:
        loss = model.loss_function
        if not (loss is ForSequenceClassificationLoss if classifies else written_in_transformers(loss)):
            return None
    return mask


def _pooled(model: nn.Module, ids: Tensor) -> Tensor | None:
    """Which tokens a classifier of rows reads, their last ones."""
    padding = model.config.get_text_config().pad_token_id
    if padding is None:
        return None
    last = (torch.arange(ids.shape[1]) * (ids != padding)).argmax(1, keepdim=True)
    return torch.zeros_like(ids, dtype=torch.bool).scatter_(1, last, True)


def _read(model: nn.Module, kwargs: dict[str, Any], ids: Tensor) -> Tensor | None:
    """Of which tokens something reads what a language model makes of them; None: perhaps of all."""
    labels, last = kwargs.get("labels"), kwargs.get("logits_to_keep")
    read = torch.zeros_like(ids, dtype=torch.bool)
    if labels is None:
        if type(last) is not int:  # as generate's is
            return None
        read[:, -last:] = True
        return read
    if not (model.training and torch.is_grad_enabled() and _of_tokens(labels)):
        return None  # an evaluation's logits are looked at
    labels = labels[:, 1:] if FIRST in kwargs else labels
    if labels.shape != ids.shape:
        return None
    read[:, :-1] = labels[:, 1:] != IGNORED  # a token's logits are compared with the next one's label
    return read


def _of_tokens(t: Any) -> bool:
    """Whether this says something of each token of a batch, on a CPU."""
    return isinstance(t, Tensor) and t.dim() == 2 and t.is_cpu


def distinct_tokens(model: nn.Module, arguments: dict[str, Any], caches: bool) -> DistinctTokens | None:
    """Of a call of the decoder ``model``, which is of a known family, with what is not None among its arguments;
    ``caches``: it fills a cache.

    None where the tokens do not run each by itself, or little would be gained.
    """
    unread = _UNREAD.get()
    _UNREAD.set(None)  # an error or interrupt may let the model around this forget to
    ids, mask, positions = (arguments.get(name) for name in ("input_ids", "attention_mask", "position_ids"))
    if not (_of_tokens(ids) and ids.numel()) or transformed():
        return None
    if mask is not None and not (isinstance(mask, Tensor) and mask.shape == ids.shape):
        return None
    if positions is None:
        positions = torch.arange(ids.shape[1]).unsqueeze(0)
    elif positions.shape not in (ids.shape, (1, ids.shape[1])) or positions.is_floating_point():
        return None  # one of all tokens, or several of each
    positions = positions.expand_as(ids)
    packed = mask is None and bool((positions.diff() != 1).any())
    everywhere = torch.ones_like(ids, dtype=torch.bool)
    if packed:
        if caches:
            return None
        rows = _unpacked(ids, positions)
        if not _fit_rows(rows.ids, ids):
            return None
    else:
        shown = everywhere if mask is None else mask != 0
        rows = Rows.of(ids, positions, shown, everywhere)
        if mask is not None and mask is unread:
            rows = _to_the_left(rows._replace(kept=shown))
    different = _different(rows)
    worth = math.inf if packed else (_WORTH_CACHED if caches else _WORTH) * ids.numel()
    if not 0 < different.run.sum() <= worth:
        return None
    modules = list(model.modules())[1:]
    bank = next((held for m in modules if (held := vars(m).get("bank")) is not None), None)
    if bank is None or not (bank.mode and bank.mode.names):
        bank = None  # no row chooses
    elif len(ids) % len(bank.mode.of_row):
        return None
    else:
        rows = rows._replace(chosen=_chosen(bank.mode.of_row, rows, ids.shape))
        different = _different(rows)
    prefix = next((held for m in modules if (held := vars(m).get("_prefix")) is not None), None)
    prefix = None if prefix is None else prefix.current(len(ids))
    by_row = prefix is not None and prefix.index is not None
    if by_row and packed:
        return None
    if different is not rows and (by_row or _drops(modules)):
        different = rows  # each row makes something else of the same tokens
    if different.run.sum() > worth or not _by_themselves(model, modules, ids.shape[1], prefix is not None):
        return None
    return DistinctTokens.of(different, bank)


def _chosen(of_row: Sequence[Sequence[str]], rows: Rows, batch: tuple[int, int]) -> Tensor:
    """For each token in ``rows`` the first choice in ``of_row`` that is as its own."""
    sets = [frozenset(names) for names in of_row]
    first = torch.tensor([sets.index(names) for names in sets]).repeat_interleave(batch[0] // len(sets))
    chosen = first.unsqueeze(1).expand(batch)
    if rows.places is None:
        return chosen
    return torch.zeros_like(rows.ids).index_put((rows.places // rows.ids.shape[1],), chosen.unsqueeze(2))


def _unpacked(ids: Tensor, positions: Tensor) -> Rows:
    """Packed sequences [batch, length], which begin where positions do not go on, in rows of their own."""
    begins = torch.ones_like(ids, dtype=torch.bool)
    begins[:, 1:] = positions.diff() != 1
    row = begins.flatten().cumsum(0) - 1
    counts = row.bincount()
    size = len(counts), int(counts.max())
    places = row * size[1] + torch.arange(len(row)) - (counts.cumsum(0) - counts)[row]

    def unpacked(t: Tensor) -> Tensor:
        return t.new_zeros(size[0] * size[1]).index_copy(0, places, t.flatten()).view(size)

    shown = unpacked(torch.ones_like(begins))
    return Rows.of(unpacked(ids), unpacked(positions), shown, shown, places.view_as(ids))


def _to_the_left(rows: Rows) -> Rows:
    """Padding that rows begin with at their end, where it does not keep them from beginning alike."""
    before = rows.shown.long().argmax(1, keepdim=True)
    if not before.any():
        return rows
    count, length = rows.ids.shape
    columns = torch.arange(length)
    moved = (t.gather(1, (columns + before) % length) for t in rows[:-1])
    return Rows(*moved, (columns - before) % length + torch.arange(0, count * length, length).unsqueeze(1))


def _different(rows: Rows) -> Rows:
    """Those of ``rows`` that are different, as beams of one prompt are not, in an order in which all that begin alike
    are neighbours."""
    parts = rows.ids, rows.positions, rows.shown, rows.kept, rows.chosen
    said = torch.stack([t.long() for t in parts], 2) * rows.kept.unsqueeze(2)  # what padding is makes no difference
    said, which = said.flatten(1).unique(dim=0, return_inverse=True)
    said = said.unflatten(1, (-1, len(parts)))
    alike = torch.zeros_like(said[..., 0], dtype=torch.bool)
    alike[1:] = (said[1:] == said[:-1]).all(2).cumprod(1)
    if len(said) == len(rows.ids) and not alike.any():
        return rows
    ids, positions, shown, kept, chosen = said.unbind(2)
    length = ids.shape[1]
    places = torch.arange(rows.ids.numel()).view_as(rows.ids) if rows.places is None else rows.places
    places = which[places // length] * length + places % length
    return Rows(ids, positions, shown.bool(), kept.bool(), chosen, alike, places)


def _fit_rows(rows: Tensor, packed: Tensor) -> bool:
    """Whether attention of packed sequences, in rows as long as the longest of them, is less than of all tokens."""
    return rows.numel() <= _SPREAD * packed.numel() and rows.numel() * rows.shape[1] <= packed.numel() * packed.shape[1]


def _drops(modules: list[nn.Module]) -> bool:
    """Whether there is dropout."""
    training = (m for m in modules if m.training)
    return any(m.p if isinstance(m, _DropoutNd) else vars(m).get("attention_dropout") for m in training)


def _by_themselves(model: nn.Module, modules: list[nn.Module], length: int, prefix: bool) -> bool:
    """Whether nothing but attention, to all tokens before, sees more than one token, nor any code of the caller's."""
    config, namespace = model.config, vars(sys.modules[type(model).__module__])
    window = getattr(config, "sliding_window", None)
    if window is not None and (length > window or prefix):
        return False
    if not getattr(config, "is_causal", True) or getattr(config, "use_bidirectional_attention", False):
        return False
    if any(GLOBAL_HOOKS) or not only_known_hooks(vars(model)) or not all(map(_is_plain, map(vars, modules))):
        return False
    functions = (namespace[name] for name in _FUNCTIONS if name in namespace)
    return all(map(written_in_transformers, functions)) and all(map(_known, {type(model), *map(type, modules)}))


def _is_plain(module: dict[str, Any]) -> bool:
    """Whether this is the state of a module that runs as its class or this library wrote it."""
    if not isinstance(module.get("forward"), (NoneType, ModuleForward)) or module.get("_compiled_call_impl"):
        return False
    if module.get("scale_grad_by_freq") or depends_on_length(module.get("rope_type")) or kernelized(module):
        return False
    return only_known_hooks(module)


def _known(kind: type[nn.Module]) -> bool:
    if kind in _TORCHS or kind.__module__.startswith(_PACKAGES):
        return True
    forward = kind.forward
    if getattr(forward, "__code__", None) is _DECORATED:
        forward = forward.__wrapped__
    return written_in_transformers(forward) is not None
