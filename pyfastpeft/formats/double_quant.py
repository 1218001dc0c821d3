"""Double quantization (Dettmers et al. 2023, section 3): the block scales themselves in 8 bits.

``absmax[i] = DYNAMIC_MAP[codes[i]] * absmax2[i // 256] + offset`` with ``offset`` the mean of the scales.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCKSIZE = 256


def _dynamic_values() -> list[float]:
    """The signed 8-bit dynamic-exponent code (Dettmers 2016, 8-bit approximations), 256 values of float32, sorted."""
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32, device="cpu")
        means = (10 ** (i - 6)) * ((edges[:-1] + edges[1:]) / 2)
        values += means.tolist() + (-means).tolist()
    return sorted(values)


_VALUES = _dynamic_values()


def _map_on(device: torch.device | str) -> Tensor:
    """``DYNAMIC_MAP`` on ``device``, made anew: FakeTensorMode takes no tensor from outside."""
    return torch.tensor(_VALUES, dtype=torch.float32, device=device)


DYNAMIC_MAP = _map_on("cpu")


@dataclass
class NestedScales:
    """Second-level state of double-quantized scales.

    Attributes:
        absmax2: float32 [ceil(blocks / 256)].
        offset: float32 [].
    """

    absmax2: Tensor
    offset: Tensor


def quantize_scales(absmax: Tensor) -> tuple[Tensor, NestedScales]:
    """Float32 scales [blocks] to (uint8 codes [blocks], their second-level state)."""
    offset = absmax.mean() if absmax.numel() else absmax.new_zeros(())
    shifted = absmax - offset
    blocks = -(-shifted.numel() // BLOCKSIZE)
    padded = torch.cat([shifted, shifted.new_zeros(blocks * BLOCKSIZE - shifted.numel())]).view(blocks, BLOCKSIZE)
    absmax2 = torch.where(padded.isnan(), 0.0, padded.abs()).amax(-1)
    scaled = padded * (1 / absmax2)[:, None]
    # bitsandbytes' CPU quantizer snaps to one of 65536 bins over [-1, 1], then takes the code nearest to the bin's
    # centre; NaN (0 / 0 in an all-zero block) falls into the first bin.
    bins = ((scaled.flatten() + 1) * 32767.5 + 0.5).nan_to_num(0.0).clamp(0, 65535).floor()
    table = _map_on(absmax.device)
    codes = torch.bucketize(bins * (2 / 65535) - 1, (table[:-1] + table[1:]) / 2)
    return codes[: shifted.numel()].to(torch.uint8), NestedScales(absmax2, offset)


def dequantize_scales(codes: Tensor, nested: NestedScales, table: Tensor | None = None) -> Tensor:
    """Uint8 codes [blocks] in canonical order to float32 scales [blocks]; ``table``: ``DYNAMIC_MAP`` on the device."""
    table = _map_on(codes.device) if table is None else table
    # A twentieth of the time of indexing by tensors, and of what fresh memory for each step takes.
    absmax2 = nested.absmax2.repeat_interleave(BLOCKSIZE)[: codes.numel()]
    return table.index_select(0, codes.int()).mul_(absmax2).add_(nested.offset)
