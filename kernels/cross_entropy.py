"""``cross_entropy_`` in Triton: the loss of each row of logits, which become its gradient.

A program takes a row twice: once for its maximum and the sum of its exponentials, corrected whenever the maximum moves,
once for the gradient. The second reading is of what the L2 cache still holds, so memory is read once and written once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .options import FUSED

_COLUMNS = 8192
"""Of a step: few enough to leave a thread's registers, enough to make the sums across threads rare."""


@triton.jit
def _cross_entropy(
    logits,  # [n, C], columns side by side; become the gradient
    labels,  # int64 [n]
    losses,  # float32 [n]
    gradient,  # the logits' memory; by a name of its own it takes two registers fewer
    C,
    stride,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    gradient += row * stride
    columns = tl.arange(0, COLUMNS)
    top = tl.full((), -float("inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    for c0 in range(0, C, COLUMNS):
        x = tl.load(logits + c0 + columns, mask=c0 + columns < C, other=-float("inf")).to(tl.float32)
        most = tl.maximum(top, tl.max(x, 0))
        shift = tl.where(most == -float("inf"), 0.0, most)  # nothing but -inf so far: the sum stays 0
        total = total * tl.exp(top - shift) + tl.sum(tl.exp(x - shift), 0)
        top = most
    label = tl.load(labels + row)
    known = (label >= 0) & (label < C)
    at_label = tl.load(logits + label, mask=known, other=float("nan")).to(tl.float32)
    tl.debug_barrier()  # before another warp writes the gradient there
    tl.store(losses + row, tl.log(total) + (top - at_label))
    inverse = tl.where(known, 1.0 / total, float("nan"))
    for c0 in range(0, C, COLUMNS):
        c = c0 + columns
        x = tl.load(logits + c, mask=c < C, other=0.0).to(tl.float32)
        d = tl.exp(x - top) * inverse
        d = tl.where(c == label, d - 1.0, d)
        tl.store(gradient + c, d.to(gradient.dtype.element_ty), mask=c < C)


def cross_entropy_(logits: Tensor, labels: Tensor) -> Tensor:
    """Losses, float32 [n]; ``logits`` become softmax(logits) - onehot(labels).

    Args:
        logits: [n, C], columns side by side, rows that do not overlap.
        labels: int64 [n]. Of one outside of [0, C) the loss and the gradient are NaN.
    """
    n, classes = logits.shape
    if (classes > 1 and logits.stride(1) != 1) or (n > 1 and logits.stride(0) < classes):
        raise ValueError("logits must have contiguous columns and rows that do not overlap: they become the gradient")
    losses = logits.new_empty(n, dtype=torch.float32)
    if n > 0:
        columns = min(triton.next_power_of_2(max(classes, 1)), _COLUMNS)
        _cross_entropy[(n,)](
            logits=logits,
            labels=labels.contiguous(),
            losses=losses,
            gradient=logits,
            C=classes,
            stride=logits.stride(0),
            COLUMNS=columns,
            num_warps=min(max(columns // 512, 4), 16),
            **FUSED,
        )
    return losses
