"""How the tensors of several adapters become one: what ``combination_type`` of ``add_weighted_adapter`` names."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

KINDS = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")


def check_pruning(combination_type: str, kind: str, density: float | None, majority_sign_method: str) -> None:
    """Whether the arguments fit ``combination_type``, which sums as ``kind`` does."""
    if (density is not None) if kind == "linear" else not (density is not None and 0 < density <= 1):
        wanted = "be left out" if kind == "linear" else "be above 0 and at most 1"
        raise ValueError(f"density is {density!r}; with combination_type {combination_type!r} it must {wanted}")
    if majority_sign_method not in ("total", "frequency"):
        raise ValueError(f"majority_sign_method is {majority_sign_method!r}; it must be 'total' or 'frequency'")


def summed(
    kind: str, tensors: Sequence[Tensor], weights: Sequence[float], density: float | None, majority_sign_method: str
) -> Tensor:
    """Σ weight · tensor, where a ``kind`` other than "linear" leaves elements out.

    Args:
        kind: one of :data:`KINDS`. "magnitude_prune" and "ties" keep the largest elements of each tensor, "dare_…"
            random ones, divided by ``density`` (Yu et al. 2023). "ties" and "dare_ties" then average, element by
            element, over the tensors that have the sign of the majority (Yadav et al. 2023).
        density: the share of elements that is kept.
        majority_sign_method: the majority's is the sign of the sum ("total"), or the more frequent one ("frequency").
    """
    stack = torch.stack([_pruned(kind, t, density) for t in tensors])
    weighted = stack * torch.tensor(weights, dtype=torch.float32, device=stack.device).view(
        -1, *[1] * (stack.dim() - 1)
    )
    if not kind.endswith("ties"):
        return weighted.sum(0)
    total = (stack if majority_sign_method == "total" else stack.sign()).sum(0)
    agree = stack.sign() == torch.where(total >= 0, 1, -1)
    return (weighted * agree).sum(0) / agree.sum(0).clamp_min(1)


def _pruned(kind: str, tensor: Tensor, density: float | None) -> Tensor:
    if density is None or density == 1:
        return tensor
    if kind.startswith("dare"):
        return tensor * torch.bernoulli(torch.full_like(tensor, density)) / density
    kept = tensor.abs().flatten().topk(int(density * tensor.numel())).indices
    return torch.zeros_like(tensor).flatten().index_copy(0, kept, tensor.flatten()[kept]).view_as(tensor)
