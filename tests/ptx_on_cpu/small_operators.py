"""Norms, activations, rotary embeddings, the cross-entropy and quantization by the PTX of their Triton kernels: see
test_ptx_on_cpu.py."""

from __future__ import annotations

import pytest
import torch
import triton_on_cpu  # noqa: F401  (launches run PTX)
from test_cross_entropy import test_losses_and_gradients as check_losses_and_gradients
from test_elementwise import angles, check_gradients, norm64, rope64
from test_formats import assert_same_bits, with_zero

from pyfastpeft.formats import FORMATS
from pyfastpeft.formats.packed import dequantize_reference, quantize_reference
from pyfastpeft.ops import rms_norm, rope, swiglu
from pyfastpeft.ops.triton_kernels import dequantize_4bit, quantize_4bit

dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)


@dtypes
def test_norms(dtype):
    x, weight = torch.randn(13, 200), torch.randn(200)
    check_gradients(rms_norm, norm64, (x, weight), dtype)


def test_swiglu():
    gate, up = torch.randn(5, 300), torch.randn(5, 300)
    check_gradients(swiglu, lambda g, u: torch.nn.functional.silu(g) * u, (gate, up), torch.bfloat16)


def test_rope():
    cos, sin = angles(2, 7, 32, torch.bfloat16)
    q, k = torch.randn(2, 4, 7, 32), torch.randn(2, 2, 7, 32)
    check_gradients(lambda q, k: rope(q, k, cos, sin), lambda q, k: rope64(q, k, cos, sin), (q, k), torch.bfloat16)


@dtypes
def test_cross_entropy(dtype):
    check_losses_and_gradients(None, dtype, (3, 2051))


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_quantization(fmt):
    w = torch.randn(7, 130)
    codes, scale, zero = quantize_4bit(w, fmt.id, 64)
    expected = quantize_reference(w, fmt, 64)
    assert_same_bits(codes, expected[0])
    assert_same_bits(scale, expected[1])
    zero = with_zero(fmt, zero)
    got = dequantize_4bit(codes, scale, zero, fmt.id, 64, [7, 130], torch.bfloat16)
    assert_same_bits(got, dequantize_reference(codes, scale, zero, fmt, 64, (7, 130), torch.bfloat16))
