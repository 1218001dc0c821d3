"""The launches of ``prefix_attention``, compiled: see toolchain.py."""

from __future__ import annotations

from collections.abc import Callable

import torch
from toolchain import empty

from pyfastpeft.ops.triton_kernels import prefix_attention, prefix_attention_backward

TOLD_APART_BY = ("prefix_k",)


def cases() -> dict[str, Callable]:
    """Calls of the operator by name."""

    def call(
        heads: int,
        kv_heads: int,
        tokens: int,
        keys: int,
        dim: int,
        prefix: int = 0,
        slots: int = 0,
        dtype: torch.dtype = torch.bfloat16,
        padded: bool = False,
        window: int = 0,
        train: bool = True,
    ) -> None:
        batch = 8
        q = empty(batch, tokens, heads, dim, dtype=dtype).transpose(1, 2)
        k, v = (empty(batch, kv_heads, keys, dim, dtype=dtype) for _ in range(2))
        pk, pv = (empty(max(slots, 1), kv_heads, prefix, dim, dtype=dtype) if prefix else None for _ in range(2))
        index, lengths = (empty(n, dtype=torch.int64) if slots else None for n in (batch, slots))
        positions = empty(batch, keys, dtype=torch.int32) if padded else None
        rest = (q, k, v, pk, pv, index, lengths, positions, True, 0.125, window)
        out, lse = prefix_attention(*rest, train)
        if train:
            prefix_attention_backward(q, *rest, out, lse)

    return {
        "decoding": lambda: call(32, 8, 1, 4096, 128, prefix=512, train=False),
        "decoding, D 64, prefixes by row": lambda: call(9, 3, 1, 600, 64, 512, 4, padded=True, train=False),
        "D 64": lambda: call(9, 3, 1024, 1024, 64, prefix=20),
        "D 128": lambda: call(32, 8, 2048, 2048, 128),
        "D 128, prefixes by row, padding, window": lambda: call(32, 8, 2048, 2048, 128, 20, 4, padded=True, window=512),
        "D 256, fp16": lambda: call(8, 4, 2048, 2048, 256, dtype=torch.float16),
        "odd D, 40": lambda: call(8, 8, 512, 512, 40, prefix=20, train=False),
        "float32, D 256": lambda: call(8, 4, 512, 512, 256, dtype=torch.float32),
        "float32, D 128": lambda: call(32, 8, 2048, 2048, 128, prefix=20, dtype=torch.float32),
        "float32, D 64": lambda: call(9, 3, 1024, 1024, 64, prefix=20, dtype=torch.float32),
    }
