"""``dense_linear``: a full-precision product for an output head, whose weight is most of what few rows cost."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

FEW_ROWS = 16
"""Rows up to which the kernel, which reads the weight once, serves: it multiplies by a tile of so many."""


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear(x, weight, bias)``; few rows take what reading the weight takes.

    Rows that do not lie side by side are brought together first: torch on a CPU would multiply each by a copy of the
    weight of its own, seconds and gigabytes for a head and a few sequences.

    Args:
        x: [..., K].   weight: [N, K].   bias: [N] or None.
    """
    if torch.compiler.is_compiling() or not x.is_cpu:
        return F.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    served = len(rows) <= FEW_ROWS and rows.dtype == weight.dtype and not torch.is_grad_enabled()
    if served and rows.is_floating_point() and rows.element_size() <= 4 and not torch.is_autocast_enabled("cpu"):
        y = torch.ops.pyfastpeft.few_rows_linear.default(rows, weight, bias)
    else:
        y = F.linear(rows, weight, bias)
    return y.view(*x.shape[:-1], len(weight))


@torch.library.register_fake("pyfastpeft::few_rows_linear")
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))
