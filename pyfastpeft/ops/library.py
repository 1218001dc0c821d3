"""Loads the compiled operators and gives torch.compile their shapes."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

_LIBRARY = next(Path(__file__).parent.parent.glob("_C*.so"), None)
if _LIBRARY is None:
    raise ImportError("pyfastpeft's compiled operators are missing: install the package (`pip install .`) to build them")
torch.ops.load_library(str(_LIBRARY))


@torch.library.register_fake("pyfastpeft::quantize_4bit")
def _(w: Tensor, format: int, blocksize: int) -> tuple[Tensor, Tensor, Tensor]:
    n = w.numel()
    blocks = -(-n // blocksize)
    scale = w.new_empty((blocks,), dtype=torch.float32)
    return w.new_empty(((n + 1) // 2, 1), dtype=torch.uint8), scale, scale.new_empty((blocks if format == 2 else 0,))


@torch.library.register_fake("pyfastpeft::dequantize_4bit")
def _(
    codes: Tensor, scale: Tensor, zero: Tensor | None, format: int, blocksize: int, shape: list[int], dtype: torch.dtype
) -> Tensor:
    return codes.new_empty(shape, dtype=dtype)


@torch.library.register_fake("pyfastpeft::pack_tiles")
def _(codes: Tensor, n: int, k: int) -> Tensor:
    return codes.new_empty(((n + 15) // 16, 8 * k))


@torch.library.register_fake("pyfastpeft::unpack_tiles")
def _(codes: Tensor, n: int, k: int) -> Tensor:
    return codes.new_empty(((n * k + 1) // 2, 1))


@torch.library.register_fake("pyfastpeft::linear_4bit")
def _(x, codes, scale, zero, absmax2, offset, format, n, blocksize, bias, a, b, row_scale, scaling, seed, dropout):  # noqa: ANN001, ANN202
    rank = 0 if a is None else a.shape[0]
    return x.new_empty((x.shape[0], n)), x.new_empty((x.shape[0], rank), dtype=torch.float32)


@torch.library.register_fake("pyfastpeft::linear_4bit_backward")
def _(
    dy, codes, scale, zero, absmax2, offset, format, n, blocksize, a, b, row_scale, scaling, seed, dropout,
    need_dx, need_ds,
):  # noqa: ANN001, ANN202  # fmt: skip
    m, k = dy.shape[0], codes.shape[1] // 8
    rank = 0 if a is None else a.shape[0]
    return (
        dy.new_empty((m if need_dx else 0, k)),
        dy.new_empty((m if rank else 0, rank), dtype=torch.float32),
    )


@torch.library.register_fake("pyfastpeft::lora_backward")
def _(dy, x, s, ds, row_scale, scaling, seed, dropout):  # noqa: ANN001, ANN202
    r = s.shape[1]
    return x.new_empty((r, x.shape[1]), dtype=torch.float32), x.new_empty((dy.shape[1], r), dtype=torch.float32)
