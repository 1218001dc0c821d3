"""Initial values of a LoRA pair that are computed from the weight.

Each function takes the weight as a float32 matrix M [N, K] and returns ``(A [r, K], B [N, r], M')`` such that
``M' + scaling · B A`` is M, up to rounding (LoftQ: up to the quantization error that is left).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..formats import quantize_4bit
from ..ops.autocast import without_autocast


def _check(weight: Tensor, r: int, scaling: float, name: str) -> None:
    if not 0 < scaling < math.inf:
        raise ValueError(
            f"the scaling is {scaling}; with init_lora_weights={name!r} lora_alpha must be above 0, and finite"
        )
    if r > min(weight.shape):
        raise ValueError(
            f"r is {r}; with init_lora_weights={name!r} it must be at most {min(weight.shape)}, the smaller side of "
            f"the weight {tuple(weight.shape)}"
        )


@without_autocast
def pissa(weight: Tensor, r: int, scaling: float, iterations: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The r principal components (PiSSA, Meng et al. 2024); ``iterations``: of the randomized SVD, None: exact."""
    _check(weight, r, scaling, "pissa")
    if iterations is None:
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        u, s, vh = u[:, :r], s[:r], vh[:r]
    else:
        # Loaded again, the adapter starts from the same base weights: its random part is always the same, drawn by the
        # CPU, as a GPU draws other numbers of a seed.
        with torch.random.fork_rng([]):
            torch.default_generator.manual_seed(0)
            factors = torch.svd_lowrank(weight.cpu(), r, niter=iterations)
        u, s, v = (factor.to(weight.device) for factor in factors)
        vh = v.t()
    root = (s / scaling).sqrt()
    a, b = root[:, None] * vh, u * root
    return a, b, weight - scaling * (b @ a)


@without_autocast
def olora(weight: Tensor, r: int, scaling: float) -> tuple[Tensor, Tensor, Tensor]:
    """The first r columns of the QR decomposition (OLoRA, Büyükakyüz 2024)."""
    _check(weight, r, scaling, "olora")
    q, upper = torch.linalg.qr(weight)
    a, b = upper[:r].contiguous(), q[:, :r].contiguous()
    return a, b, weight - scaling * (b @ a)


@without_autocast
def loftq(weight: Tensor, r: int, scaling: float, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    """Alternate quantizing to NF4 and fitting what is lost by rank r (LoftQ, Li et al. 2023).

    M' holds exactly the values NF4 can hold, so quantizing it afterwards changes nothing. Unlike in PEFT, the pair is
    divided by ``scaling``, so the fit holds for every ``lora_alpha``.
    """
    _check(weight, r, scaling, "loftq")
    residual = weight
    for _ in range(iterations):
        quantized = quantize_4bit(residual, "nf4").dequantize(torch.float32)
        u, s, vh = torch.linalg.svd(weight - quantized, full_matrices=False)
        root = (s[:r] / scaling).sqrt()
        a, b = root[:, None] * vh[:r], u[:, :r] * root
        residual = weight - scaling * (b @ a)
    return a, b, quantized
