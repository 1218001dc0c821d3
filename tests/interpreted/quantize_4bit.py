"""``quantize_4bit`` and ``dequantize_4bit`` by their Triton kernels in Triton's interpreter, to the bit."""

from __future__ import annotations

import random

import pytest
import repair  # noqa: F401
import torch
from test_formats import DTYPES, SHAPES, assert_same_bits, pathological, weights, with_zero

from pyfastpeft.formats import FORMATS
from pyfastpeft.formats.packed import dequantize_reference, quantize_reference
from pyfastpeft.ops.triton_kernels import dequantize_4bit, quantize_4bit

formats = pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
# Beside whole blocks and short ones: a single element, and one that shares its byte with nothing.
SIZES = [*SHAPES, (1,), (33,), (4096 * 2 + 65,)]


def check(w, fmt, blocksize):
    got, what = quantize_4bit(w, fmt.id, blocksize), f"{fmt.name} {w.dtype} {tuple(w.shape)} blocksize {blocksize}"
    for name, mine, theirs in zip(("codes", "scale", "zero"), got, quantize_reference(w, fmt, blocksize), strict=True):
        if theirs is None:
            assert mine.numel() == 0
        elif name == "codes":
            assert_same_bits(mine, theirs, f"{name} of {what}")
        else:
            # Adding 0.0 makes -0.0 positive: which zero is the smaller of a -0.0 and a 0.0 is open.
            assert_same_bits(mine + 0.0, theirs + 0.0, f"{name} of {what}")
    return got


@formats
@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_codes_and_scales_are_the_definitions_bit_for_bit(fmt, shape):
    for dtype in DTYPES:
        for _, w in weights(shape, dtype):
            check(w, fmt, fmt.blocksizes[int(torch.randint(len(fmt.blocksizes), ()))])


@formats
def test_nan_and_inf_quantize_as_defined(fmt):
    for dtype in DTYPES:
        for w in pathological(dtype):
            for blocksize in (32, 64, 128):
                check(w, fmt, blocksize)


@formats
@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_values_are_the_definitions_bit_for_bit(fmt, shape):
    for blocksize in random.sample(fmt.blocksizes, 2):
        codes, scale, zero = quantize_4bit(torch.randn(shape) * torch.randn(shape).exp(), fmt.id, blocksize)
        zero = with_zero(fmt, zero)
        for dtype in DTYPES:
            got = dequantize_4bit(codes, scale, zero, fmt.id, blocksize, list(shape), dtype)
            expected = dequantize_reference(codes, scale, zero, fmt, blocksize, shape, dtype)
            assert_same_bits(got, expected, f"{fmt.name} {dtype} {shape} blocksize {blocksize}")


@formats
def test_the_operators_of_other_devices_than_cpus_are_these(fmt):
    """Reached past the compiled ones, as torch reaches them for a GPU's tensors."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CompositeExplicitAutograd)
    quantize, dequantize = torch.ops.pyfastpeft.quantize_4bit.default, torch.ops.pyfastpeft.dequantize_4bit.default
    w = torch.randn(3, 70)
    codes, scale, zero = quantize.redispatch(keys, w, fmt.id, 32)
    assert_same_bits(codes, quantize_4bit(w, fmt.id, 32)[0])
    zero = with_zero(fmt, zero)
    got = dequantize.redispatch(keys, codes, scale, zero, fmt.id, 32, [3, 70], torch.float32)
    assert_same_bits(got, dequantize(codes, scale, zero, fmt.id, 32, [3, 70], torch.float32))
