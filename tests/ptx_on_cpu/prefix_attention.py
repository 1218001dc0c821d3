"""``prefix_attention`` by the PTX of its Triton kernels: see test_ptx_on_cpu.py."""

from __future__ import annotations

import pytest
import torch
import triton_on_cpu  # noqa: F401  (launches run PTX)
from test_prefix_attention import check, make

from pyfastpeft.ops import key_positions


@pytest.mark.parametrize("dtype, dim", [(torch.bfloat16, 64), (torch.float16, 40)], ids=str)
def test_results_and_gradients_behind_a_shared_prefix(dtype, dim):
    check(make(2, 4, 2, 70, None, dim, prefix=20, dtype=dtype))


def test_prefixes_chosen_by_row_under_a_mask():
    tensors = make(3, 2, 1, 40, 60, 64, prefix=40, slots=2, dtype=torch.bfloat16)
    how = {"prefix_index": torch.tensor([1, -1, 0]), "prefix_lengths": torch.tensor([40, 11])}
    check(tensors, mask=torch.rand(3, 60) < 0.8, window=30, **how)


def test_decoding_with_keys_in_parts():
    tensors = make(3, 4, 2, 1, 300, 64, prefix=300, dtype=torch.bfloat16)
    check(tensors, gradients=False, mask=key_positions(torch.rand(3, 300) < 0.7, 290))
