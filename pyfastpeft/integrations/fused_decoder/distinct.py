"""Which calls of a decoder run on the batch's different tokens (:mod:`..distinct_tokens`) in the place of all.

Those that fill no cache, which are those of training, where rows begin alike or are padded to one length. Padding is
left out where the model was called with labels and has none there.
"""

from __future__ import annotations

import math
import sys
from contextvars import ContextVar
from types import NoneType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from ...adapters import Prefix
from ...nn.hooks import GLOBAL_HOOKS
from ...ops.cross_entropy import IGNORED
from ...ops.tracing import transformed
from ..distinct_tokens import DistinctTokens
from ..forwards import ModuleForward
from ..fused_layers import OF_LLAMA, depends_on_length, written_in_transformers
from ..soft_prompts.first_label import FIRST


class Loss(NamedTuple):
    """What a call of a language model with labels says.

    Attributes:
        unread: its attention mask, if the loss reads nothing of what the model makes of the padding in it.
    """

    unread: Tensor | None


LOSS: ContextVar[Loss | None] = ContextVar("LOSS", default=None)
"""Of the call that runs here; None: it has no labels."""

_WORTH = 15 / 16  # of the tokens; more are not worth the copies
_SPREAD = 4  # times the memory that queries, keys and values of packed sequences may take in rows
_FUNCTIONS = (*OF_LLAMA, "create_sliding_window_causal_mask")
_KNOWN = ("torch.nn.", "pyfastpeft.", "peft.tuners.lora.", "bitsandbytes.")


def loss_of(kwargs: dict[str, Any]) -> Loss | None:
    """What a model's arguments say of its loss."""
    return None if kwargs.get("labels") is None else Loss(_unread_padding(kwargs))


def _unread_padding(kwargs: dict[str, Any]) -> Tensor | None:
    labels, mask = kwargs["labels"], kwargs.get("attention_mask")
    known = all(isinstance(t, Tensor) and t.dim() == 2 and t.is_cpu for t in (labels, mask))
    if not known or kwargs.get("shift_labels") is not None:
        return None
    labels = labels[:, 1:] if FIRST in kwargs else labels
    if labels.shape != mask.shape:
        return None
    learned, padding = labels != IGNORED, mask == 0
    # The loss of a language model compares the logits of a token with the label of the next, that of others its own.
    return None if (learned & padding).any() or (learned[:, 1:] & padding[:, :-1]).any() else mask


def learns(model: nn.Module) -> bool:
    """Whether a call that runs here is one of training."""
    return model.training and torch.is_grad_enabled()


def distinct_tokens(model: nn.Module, arguments: dict[str, Any], caches: bool) -> DistinctTokens | None:
    """Of a call of the decoder ``model``, which is of a known family, with what is not None among its arguments.

    Args:
        caches: whether transformers would fill a cache, over which it knows no packed sequences.

    Returns:
        None where the tokens do not run each by itself, or little would be gained.
    """
    ids, mask, positions = (arguments.get(name) for name in ("input_ids", "attention_mask", "position_ids"))
    if not (isinstance(ids, Tensor) and ids.is_cpu and ids.dim() == 2 and ids.numel()) or transformed():
        return None
    if mask is not None and not (isinstance(mask, Tensor) and mask.shape == ids.shape):
        return None
    if positions is None:
        positions = torch.arange(ids.shape[1]).unsqueeze(0)
    elif positions.dim() != 2:
        return None
    positions, packed = positions.expand_as(ids), None
    shown = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask != 0
    if mask is None and (positions.diff() != 1).any():
        if caches:
            return None
        ids, positions, shown, packed = _unpacked(ids, positions)
        if not _fit_rows(ids, packed):
            return None
    elif not (shown.all() or (learns(model) and (loss := LOSS.get()) and mask is loss.unread)):
        return None
    alike = ((ids == ids[:1]) & (positions == positions[:1]) & shown).all(0)
    shared = int(alike[:-1].cumprod(0).sum()) if len(ids) > 1 else 0
    prefix = _prefix_of(model, len(ids))
    if prefix is not None and prefix.index is not None:
        if packed is not None:
            return None
        shared = 0  # each row makes something else of the same tokens
    worth = math.inf if packed is not None else _WORTH * ids.numel()
    if _count(shown, shared) > worth or any(GLOBAL_HOOKS):
        return None
    modules = list(model.modules())[1:]
    if shared and _drops(model, modules):
        shared = 0  # each row leaves out something else
    if _count(shown, shared) > worth or not _by_themselves(model, modules, ids.shape[1], prefix is not None):
        return None
    return DistinctTokens.of(ids, positions, shared, shown[:, shared:], packed)


def _count(shown: Tensor, shared: int) -> int:
    return shared + int(shown[:, shared:].sum())


def _unpacked(ids: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Packed sequences [batch, length], which begin where positions do not go on, in rows of their own: ids, positions,
    where there are any, and where each token is among them all."""
    begins = torch.ones_like(ids, dtype=torch.bool)
    begins[:, 1:] = positions.diff() != 1
    row = begins.flatten().cumsum(0) - 1
    counts = row.bincount()
    size = len(counts), int(counts.max())
    places = row * size[1] + torch.arange(len(row)) - (counts.cumsum(0) - counts)[row]

    def unpacked(t: Tensor) -> Tensor:
        return t.new_zeros(size[0] * size[1]).index_copy(0, places, t.flatten()).view(size)

    return unpacked(ids), unpacked(positions), unpacked(torch.ones_like(begins)), places.view_as(ids)


def _fit_rows(rows: Tensor, packed: Tensor) -> bool:
    """Whether attention of packed sequences, in rows as long as the longest of them, is less than of all tokens."""
    return rows.numel() <= _SPREAD * packed.numel() and rows.numel() * rows.shape[1] <= packed.numel() * packed.shape[1]


def _prefix_of(model: nn.Module, batch: int) -> Prefix | None:
    holder = vars(model.layers[0].self_attn).get("_prefix")
    return None if holder is None else holder.current(batch)


def _drops(model: nn.Module, modules: list[nn.Module]) -> bool:
    """Whether there is dropout."""
    drops = any(isinstance(m, _DropoutNd) and m.training and m.p for m in modules)
    return drops or bool(model.training and getattr(model.config, "attention_dropout", 0))


def _by_themselves(model: nn.Module, modules: list[nn.Module], length: int, prefix: bool) -> bool:
    """Whether nothing but attention, to all tokens before, sees more than one token, nor any code of the caller's."""
    config, namespace = model.config, vars(sys.modules[type(model).__module__])
    window = getattr(config, "sliding_window", None)
    if window is not None and (length > window or prefix):
        return False
    if not getattr(config, "is_causal", True) or getattr(config, "use_bidirectional_attention", False):
        return False
    if not all(map(_is_plain, map(vars, modules))):
        return False
    functions = (namespace[name] for name in _FUNCTIONS if name in namespace)
    return all(map(written_in_transformers, functions)) and all(map(_known, {type(model), *map(type, modules)}))


def _is_plain(module: dict[str, Any]) -> bool:
    """Whether this is the state of a module that runs as its class or this library wrote it, alike for all rows."""
    if module["_forward_pre_hooks"] or module["_backward_hooks"] or module["_backward_pre_hooks"]:
        return False
    if not all(map(_asks_for_gradients, module["_forward_hooks"].values())):
        return False
    if (
        not isinstance(module.get("forward"), (NoneType, ModuleForward))
        or module.get("_compiled_call_impl") is not None
    ):
        return False
    bank = module.get("bank")
    return not (bank is not None and bank.mode is not None) and not depends_on_length(module.get("rope_type"))


def _asks_for_gradients(hook: Any) -> bool:
    """Whether this is transformers' own hook of an embedding, which gradient checkpointing needs."""
    name = getattr(hook, "__module__", None), getattr(hook, "__name__", None)
    return name == ("transformers.modeling_utils", "make_inputs_require_grads")


def _known(kind: type[nn.Module]) -> bool:
    return kind.__module__.startswith(_KNOWN) or written_in_transformers(kind.forward) is not None
