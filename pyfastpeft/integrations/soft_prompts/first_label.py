"""The first label: what a prompt at the embedding says next is the text's first token.

PEFT trains the prompt to that token where it has a label. The logits of the last virtual token are there for the loss
alone, in front of all others, or where the padding on the left ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...ops.cross_entropy import IGNORED
from ...ops.tracing import traced
from ..forwards import with_item
from .prompt_tokens import first_visible

FIRST = "pyfastpeft_first"
"""The argument by which a model tells its decoder where the texts begin [batch], if their first tokens have labels."""


def with_first_label(kwargs: dict[str, Any], ends: Sequence[bool], masks: bool) -> dict[str, Any] | None:
    """Arguments of a model, which have ``labels`` [batch, tokens], with :data:`FIRST` and room for that label in front.

    Args:
        ends: whether a row's prefix ends with a prompt at the embedding; several consecutive rows of the batch each.
        masks: whether the loss picks its logits by ``attention_mask``, in which there is room then too.

    Returns:
        None where no first token has a label that is learned.
    """
    labels, mask = kwargs["labels"], kwargs.get("attention_mask")
    if len(labels) % len(ends) or not any(ends):
        return None
    if all(ends):  # made where the labels are: a copy would wait for a GPU
        ends = torch.ones(len(labels), dtype=torch.bool, device=labels.device)
    else:
        ends = torch.tensor(ends, device=labels.device).repeat_interleave(len(labels) // len(ends))
    first = torch.zeros_like(labels[:, 0])
    if isinstance(mask, Tensor) and mask.shape == labels.shape:
        first = torch.where(ends, first_visible(mask).squeeze(1), first)
    learned = (labels.gather(1, first.unsqueeze(1)).squeeze(1) != IGNORED) & ends
    # In compiled code nothing may depend on values, and elsewhere than on a CPU looking at them would wait for it.
    if learned.is_cpu and not (traced() or learned.any()):
        return None
    labels = F.pad(labels, (1, 0), value=IGNORED)
    labels[:, 1].masked_fill_(~ends, IGNORED)
    if masks and isinstance(mask, Tensor):
        kwargs = kwargs | {"attention_mask": F.pad(mask, (1, 0), value=1)}
    return kwargs | {"labels": labels, FIRST: first}


def with_last(output: Any, last: Tensor, first: Tensor | None) -> Any:
    """A decoder's output with ``last`` [batch or 1, 1, hidden], the last virtual token's, in front of the texts, which
    begin at ``first``; None where nobody asks for it."""
    if first is None or output is None:
        return None
    hidden = output[0]
    hidden = torch.cat([last.expand(len(hidden), -1, -1), hidden], 1)
    before_text = torch.arange(hidden.shape[1], device=hidden.device) == first.to(hidden.device).unsqueeze(1)
    hidden = torch.where(before_text.unsqueeze(2), last, hidden)
    return with_item(output, "last_hidden_state", 0, hidden)


def without_last(model: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
    """Forward hook of a model: its output without the logits that were there for the loss alone."""
    if FIRST not in kwargs or output is None:
        return None
    if not isinstance(output, tuple) and "logits" not in output:
        return None  # the head is TRL's: what it says of the text's first token counts in its loss, as with PEFT
    # In a tuple they stand behind the losses, of which models with experts may return two.
    at = next(i for i, t in enumerate(output) if t.dim()) if isinstance(output, tuple) else "logits"
    return with_item(output, "logits", at, output[at][:, 1:])
