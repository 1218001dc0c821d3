"""``cross_entropy_``: the loss of each row of logits, which become its gradient; and that of an output head's."""

from __future__ import annotations

import torch
from torch import Tensor

from .backends import Backend, choose_plain
from .checks import check_matrix, check_tensor
from .library import fake_of
from .tracing import is_compiling

IGNORED = -100
"""The label of what is not learned."""

_REFERENCE_ROWS = 64  # that are in memory in float32 together


def cross_entropy_(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy a row; its gradient, of the sum over the rows, takes the logits' place.

    Args:
        logits: [n, classes], float32, bfloat16 or float16, columns contiguous, rows that do not overlap. Become
            softmax(logits) - onehot(labels).
        labels: int64 [n], each in [0, classes).

    Returns:
        Losses, float32 [n], in which the arithmetic is done. Loss and gradient of a row whose label is no class are
        NaN; on a CPU that is an error instead.

    Raises:
        TypeError: no tensor.
        ValueError: ``logits`` is no matrix, or ``labels`` are of another size or dtype, or on another device.
        RuntimeError: what the operator finds: a dtype or a label.
    """
    check_matrix("logits", logits, "[n, classes]")
    check_tensor("labels", labels)
    if labels.shape != logits.shape[:1] or labels.dtype != torch.int64:
        what = f"{labels.dtype} of shape {tuple(labels.shape)}"
        raise ValueError(f"labels are {what}; they must be int64 of shape ({len(logits)},)")
    if labels.device != logits.device:
        raise ValueError(f"labels are on {labels.device}; they must be where logits are, on {logits.device}")
    if choose_plain(logits.device) is not Backend.REFERENCE:
        losses = torch.ops.pyfastpeft.cross_entropy_.default(logits, labels)
        if not is_compiling():  # whose graphs count what they write
            torch.autograd.graph.increment_version(logits)
        return losses
    parts = zip(logits.split(_REFERENCE_ROWS), labels.split(_REFERENCE_ROWS), strict=True)
    return torch.cat([_reference(*part) for part in parts])


def _reference(logits: Tensor, labels: Tensor) -> Tensor:
    log_probabilities = torch.log_softmax(logits, 1, dtype=torch.float32)
    if not labels.is_cpu:  # where an index out of range is no error that can be caught
        known = (labels >= 0) & (labels < logits.shape[1])
        log_probabilities = log_probabilities.masked_fill(~known[:, None], torch.nan)
        labels = labels.where(known, 0)
    losses = -log_probabilities.gather(1, labels.unsqueeze(1)).squeeze(1)
    gradient = log_probabilities.exp_()
    gradient[torch.arange(len(labels), device=labels.device), labels] -= 1
    logits.copy_(gradient)
    return losses


def head_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, differentiates: bool) -> tuple[Tensor, Tensor]:
    """``cross_entropy_`` of the logits ``hidden · weightᵀ``, on CPUs; they are in memory a chunk of rows at a time.

    Args:
        hidden: [n, H], float32, bfloat16 or float16.
        weight: [classes, H] in the dtype of ``hidden``.
        labels: int64 [n], each in [0, classes).

    Returns:
        Losses, float32 [n], and the gradient of their sum in ``hidden`` ([0, H] unless it ``differentiates``).

    Raises:
        TypeError: no tensor.
        ValueError: ``hidden`` or ``weight`` is no matrix, or ``weight`` is elsewhere, as where it was offloaded.
        RuntimeError: what the operator finds: a dtype, a size or a label.
    """
    check_matrix("hidden", hidden, "[n, H]")
    check_matrix("weight", weight, "[classes, H]")
    check_tensor("labels", labels)
    if weight.device != hidden.device:
        raise ValueError(f"weight is on {weight.device}; it must be where hidden is, on {hidden.device}")
    if labels.device != hidden.device:
        raise ValueError(f"labels are on {labels.device}; they must be where hidden is, on {hidden.device}")
    return torch.ops.pyfastpeft.head_cross_entropy.default(hidden, weight, labels, differentiates)


@fake_of("head_cross_entropy")
def _(hidden: Tensor, weight: Tensor, labels: Tensor, differentiates: bool) -> tuple[Tensor, Tensor]:
    rows = len(hidden) if differentiates else 0
    return hidden.new_empty(labels.shape, dtype=torch.float32), hidden.new_empty((rows, hidden.shape[1]))


@fake_of("cross_entropy_")
def _(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.new_empty(labels.shape, dtype=torch.float32)
