"""``cross_entropy_with_gradient``: the loss of each row of logits and its gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from .backends import Backend, choose_plain


def cross_entropy_with_gradient(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy a row and the gradient of their sum.

    Args:
        logits: [n, classes], float32, bfloat16 or float16.
        labels: int64 [n], each in [0, classes).

    Returns:
        losses float32 [n], and softmax(logits) - onehot(labels) in the dtype of ``logits``. Arithmetic is float32.
        Loss and gradient of a row whose label is no class are NaN; on a CPU that is an error instead.
    """
    if choose_plain(logits.device) is not Backend.REFERENCE:
        return torch.ops.pyfastpeft.cross_entropy.default(logits, labels)
    log_probabilities = torch.log_softmax(logits, 1, dtype=torch.float32)
    if not labels.is_cpu:  # where an index out of range is no error that can be caught
        known = (labels >= 0) & (labels < logits.shape[1])
        log_probabilities = log_probabilities.masked_fill(~known[:, None], torch.nan)
        labels = labels.where(known, 0)
    losses = -log_probabilities.gather(1, labels.unsqueeze(1)).squeeze(1)
    gradient = log_probabilities.exp_()
    gradient[torch.arange(len(labels), device=labels.device), labels] -= 1
    return losses, gradient.to(logits.dtype)


@torch.library.register_fake("pyfastpeft::cross_entropy")
def _(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return logits.new_empty(labels.shape, dtype=torch.float32), logits.new_empty(logits.shape)
