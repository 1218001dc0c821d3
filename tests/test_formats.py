"""The 4-bit formats: NF4 and FP4 are bitsandbytes' to the bit, INT4 holds GGUF's blocks, layouts lose nothing."""

import copy
import math
import pickle

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import pyfastpeft as fp
from pyfastpeft.formats import DYNAMIC_MAP, get_format
from pyfastpeft.formats.double_quant import dequantize_scales, quantize_scales
from pyfastpeft.formats.packed import quantize_reference

np = pytest.importorskip("numpy")
bnb = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is what NF4 and FP4 are compared with")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BLOCKSIZES = [32, 64, 128, 256, 512, 1024, 2048, 4096]
# Odd counts, blocks that straddle rows, short last blocks, whole tiles, one element, nothing.
SHAPES = [
    (1,),
    (7,),
    (33, 65),
    (3, 50),
    (5, 13, 7),
    (16, 96),
    (17, 64),
    (2, 4096),
    (6, 512),
    (31, 160),
    (100, 100),
    (9000,),
    (0, 64),
]


@pytest.fixture(autouse=True)
def ieee_arithmetic():
    """bitsandbytes' library, and what torch.compile makes of its quantizer, leave this thread flushing denormals."""
    with torch.compiler.set_stance("force_eager"):
        torch.set_flush_denormal(False)
        yield


def bits(t):
    """The tensor as integers, so that equality tells -0 from 0 and holds for NaN."""
    return t.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


def assert_same_bits(got, expected, what=""):
    assert got.shape == expected.shape and got.dtype == expected.dtype, f"{what}: {got.shape} {got.dtype}"
    both_nan = got.isnan() & expected.isnan() if got.is_floating_point() else torch.zeros_like(got, dtype=torch.bool)
    wrong = (bits(got) != bits(expected)) & ~both_nan
    assert not wrong.any(), (
        f"{what}: {int(wrong.sum())} of {wrong.numel()} differ, first at {wrong.nonzero()[0].tolist()}"
    )


def weights(shape, dtype):
    """Fresh tensors that between them meet every branch of a quantizer."""
    scale = 10.0 ** float(torch.randint(-6, 5, ()))
    yield "normal", (torch.randn(shape) * scale).to(dtype)
    yield "heavy-tailed", (torch.randn(shape) * torch.randn(shape).exp() * 0.02).to(dtype)
    w = torch.randn(shape)
    if w.numel() > 40:
        w.view(-1)[: w.numel() // 2] = 0.0
        w.view(-1)[-3:] = -0.0
    yield "zero blocks", w.to(dtype)
    # Every value lies on, or one rounding beside, a midpoint of two codes.
    table = get_format("nf4").table.to(w.device)
    midpoints = torch.cat([(table[:-1] + table[1:]) / 2, table, torch.tensor([1.0, -1.0])])
    yield "midpoints", midpoints[torch.randint(len(midpoints), shape)].to(dtype)
    yield "denormal", (torch.randn(shape) * 1e-39).to(dtype)


def pathological(dtype):
    for value in (math.nan, math.inf, -math.inf):
        w = torch.randn(300)
        w[[5, 295]] = value
        yield w.to(dtype)
    yield torch.full((70,), torch.finfo(dtype).max, dtype=dtype)


def with_zero(fmt, zero):
    """The operator returns an empty zero where the format has none."""
    return zero if fmt.has_zero else None


# ---- NF4 and FP4 are bitsandbytes' -----------------------------------------------------------------------------------


def test_code_tables_are_bitsandbytes_own():
    for quant_type in ("nf4", "fp4"):
        assert_same_bits(get_format(quant_type).table, bnb.get_4bit_type(quant_type, device="cpu"), quant_type)
    assert_same_bits(DYNAMIC_MAP, bnb.create_dynamic_map(), "dynamic map")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_codes_packing_and_scales_are_bit_identical_to_bitsandbytes(isa, quant_type, dtype):
    for shape in SHAPES:
        for name, w in weights(shape, dtype):
            for blocksize in np.random.choice(BLOCKSIZES, 2, replace=False).tolist():
                codes, state = bnb.quantize_4bit(w, blocksize=blocksize, quant_type=quant_type)
                packed = fp.quantize_4bit(w, quant_type, blocksize)
                what = f"{name} {shape} blocksize {blocksize}"
                assert_same_bits(packed.rows().codes, codes, what)
                assert_same_bits(packed.block_scales(), state.absmax, what)
                # bitsandbytes' decoder is wrong for rows that are not whole blocks, and flushes subnormals, on AVX-512;
                # elsewhere it makes FP4's minus zero plus zero, as adding one does.
                comparable = shape[-1] % blocksize == 0 and name != "denormal"
                zero = -0.0 if quant_type == "nf4" or torch.backends.cpu.get_cpu_capability() == "AVX512" else 0.0
                for out in DTYPES if comparable else ():
                    state.dtype = out
                    theirs = bnb.dequantize_4bit(codes, state) + zero
                    assert_same_bits(packed.dequantize(out) + zero, theirs, f"{what} to {out}")


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_nan_and_inf_quantize_as_in_bitsandbytes(isa, quant_type):
    for dtype in DTYPES:
        for w in pathological(dtype):
            codes, state = bnb.quantize_4bit(w, blocksize=64, quant_type=quant_type)
            packed = fp.quantize_4bit(w, quant_type, 64)
            assert_same_bits(packed.rows().codes, codes)
            assert_same_bits(packed.block_scales(), state.absmax)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_double_quantization_is_bit_identical_to_bitsandbytes(quant_type):
    for shape in [(1, 64), (33, 65), (64, 512), (300, 448), (512, 1000)]:
        for name, w in weights(shape, torch.float32):
            codes, state = bnb.quantize_4bit(w, blocksize=64, quant_type=quant_type, compress_statistics=True)
            packed = fp.quantize_4bit(w, quant_type, 64, double_quant=True)
            rows = packed.rows()
            assert_same_bits(rows.codes, codes, name)
            assert_same_bits(rows.scale, state.absmax, name)
            assert_same_bits(rows.nested.absmax2, state.state2.absmax, name)
            assert_same_bits(rows.nested.offset, state.offset, name)
            scales = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
            assert_same_bits(packed.block_scales(), scales, name)


def test_the_scales_of_nothing_have_an_offset_that_a_file_can_hold():
    packed = fp.quantize_4bit(torch.empty(0, 64), "nf4", double_quant=True)
    assert packed.nested.offset == 0 and packed.dequantize().shape == (0, 64)


def test_the_8_bit_quantizer_bins_as_bitsandbytes_does():
    for spread in (1.0, 1e-3, 1e6, 1e-38, 1e-42, 0.0):
        for count in (1, 2, 255, 256, 257, 5000):
            absmax = torch.rand(count) * spread
            codes, state = bnb.quantize_blockwise(absmax - absmax.mean(), blocksize=256)
            ours, nested = quantize_scales(absmax)
            assert_same_bits(ours, codes, f"{count} scales of {spread}")
            assert_same_bits(nested.absmax2, state.absmax)
            expected = bnb.dequantize_blockwise(codes, state) + absmax.mean()
            assert_same_bits(dequantize_scales(ours, nested), expected)


# ---- INT4 ------------------------------------------------------------------------------------------------------------


def test_int4_error_is_at_most_half_a_step(device):
    for blocksize in (32, 64, 128):
        for shape in SHAPES[:-1]:
            w = torch.randn(shape) + torch.randn(())
            got = fp.quantize_4bit(w, "int4", blocksize).dequantize()
            for block, back in zip(w.flatten().split(blocksize), got.flatten().split(blocksize), strict=True):
                step = (block.max() - block.min()) / 15
                assert (block - back).abs().max() <= step * 0.5 * 1.0001 + 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int4_refuses_a_span_that_float32_cannot_hold(device, dtype):
    w = torch.zeros(4, 64, dtype=dtype)
    w[2, 5], w[2, 9] = 3e38, -3e38
    with pytest.raises(ValueError, match=r"weight lies in \[-3e\+38, 3e\+38\], and a block of 32 of it spans more"):
        fp.quantize_4bit(w, "int4", 32)
    assert fp.quantize_4bit(w, "nf4", 32).dequantize().isfinite().all()
    w[2, 5] = 0.0
    assert torch.allclose(fp.quantize_4bit(w, "int4", 32).dequantize(dtype), w)
    w[2, 9] = -math.inf  # which is NaN afterwards, not refused
    assert not fp.quantize_4bit(w, "int4", 32).dequantize()[2].isfinite().all()


def test_int4_keeps_a_constant_block_exactly(device):
    w = torch.full((4, 64), 0.37)
    assert torch.equal(fp.quantize_4bit(w, "int4", 32).dequantize(), w)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1"])
def test_int4_holds_gguf_blocks_exactly(kind):
    gguf = pytest.importorskip("gguf", reason="gguf decodes the blocks that INT4 must represent")
    n, k = 24, 96
    raw = gguf.quants.quantize(np.random.randn(n, k).astype(np.float32), gguf.GGMLQuantizationType[kind])
    expected = torch.from_numpy(gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind]))
    # A Q4 block is a half d (and in Q4_1 a half m), then 16 bytes: low nibbles are elements 0..15, high ones 16..31.
    blocks = torch.from_numpy(raw).view(-1, 18 if kind == "Q4_0" else 20)
    d = blocks[:, :2].contiguous().view(torch.float16).float().flatten()
    m = blocks[:, 2:4].contiguous().view(torch.float16).float().flatten() if kind == "Q4_1" else -8 * d
    codes = torch.cat([blocks[:, -16:] & 15, blocks[:, -16:] >> 4], 1).flatten()
    packed = fp.Packed4bit(
        (codes[::2] << 4 | codes[1::2]).unsqueeze(1), d, m, None, torch.Size((n, k)), torch.float32, "int4", 32
    )
    assert torch.equal(packed.dequantize(), expected)
    assert torch.equal(packed.tiles().dequantize(), expected)


# ---- compiled against the reference ----------------------------------------------------------------------------------


@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "int4"])
def test_compiled_quantizer_equals_the_reference_bit_for_bit(device, quant_type):
    fmt = get_format(quant_type)
    for shape in SHAPES:
        for dtype in DTYPES:
            for name, w in weights(shape, dtype):
                blocksize = int(np.random.choice(fmt.blocksizes))
                what = f"{name} {shape} {dtype} blocksize {blocksize}"
                codes, scale, zero = torch.ops.pyfastpeft.quantize_4bit(w, fmt.id, blocksize)
                expected = quantize_reference(w, fmt, blocksize)
                assert_same_bits(codes, expected[0], what)
                if fmt.has_zero:
                    # Adding 0.0 makes -0.0 positive: which zero is the smaller of a -0.0 and a 0.0 is open.
                    assert_same_bits(scale + 0.0, expected[1] + 0.0, what)
                    assert_same_bits(zero + 0.0, expected[2] + 0.0, what)
                else:
                    assert_same_bits(scale, expected[1], what)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "int4"])
def test_compiled_dequantizer_equals_the_reference_bit_for_bit(device, quant_type):
    fmt = get_format(quant_type)
    for shape in SHAPES:
        for blocksize in np.random.choice(fmt.blocksizes, 2, replace=False).tolist():
            w = torch.randn(shape) * torch.randn(shape).exp()
            for double_quant in (False, True) if not fmt.has_zero else (False,):
                packed = fp.quantize_4bit(w, quant_type, blocksize, double_quant)
                for dtype in DTYPES:
                    got = packed.dequantize(dtype)
                    assert_same_bits(got, packed.reference(dtype), f"{shape} {dtype} blocksize {blocksize}")


@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "int4"])
def test_compiled_quantizer_treats_nan_and_inf_as_the_reference(device, quant_type):
    fmt = get_format(quant_type)
    for dtype in DTYPES:
        for w in pathological(dtype):
            codes, scale, zero = torch.ops.pyfastpeft.quantize_4bit(w, fmt.id, 32)
            expected = quantize_reference(w, fmt, 32)
            assert_same_bits(codes, expected[0], str(w[:8]))
            assert_same_bits(scale, expected[1])
            got = torch.ops.pyfastpeft.dequantize_4bit(codes, scale, with_zero(fmt, zero), fmt.id, 32, w.shape, dtype)
            assert not got[:6].isfinite().all() or w.isfinite().all()


def test_every_instruction_set_gives_the_same_codes_for_large_tensors(device):
    """Large enough to be split over threads."""
    w = torch.randn(1024, 1000)
    for quant_type in ("nf4", "fp4", "int4"):
        fmt = get_format(quant_type)
        codes, scale, zero = torch.ops.pyfastpeft.quantize_4bit(w, fmt.id, 64)
        expected = quantize_reference(w, fmt, 64)
        assert_same_bits(codes, expected[0])
        assert_same_bits(scale, expected[1])
        out = torch.ops.pyfastpeft.dequantize_4bit(
            codes, scale, with_zero(fmt, zero), fmt.id, 64, w.shape, torch.float32
        )
        packed = fp.Packed4bit(codes, scale, with_zero(fmt, zero), None, w.shape, w.dtype, quant_type, 64)
        assert_same_bits(out, packed.reference(torch.float32))


# ---- layouts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "int4"])
def test_rows_to_tiles_and_back_loses_nothing(isa, quant_type):
    fmt = get_format(quant_type)
    for n in (1, 2, 15, 16, 17, 33, 100):
        for k in (32, 64, 96, 160, 4096 if n < 3 else 288):
            for blocksize in fmt.blocksizes:
                for double_quant in (False, True) if not fmt.has_zero else (False,):
                    tiles = fp.quantize_4bit(torch.randn(n, k), quant_type, blocksize, double_quant)
                    assert tiles.layout == "tiles"
                    rows = tiles.rows()
                    again = rows.tiles()
                    back = again.rows()
                    for name, tensor in rows._tensors().items():
                        assert_same_bits(back._tensors()[name], tensor, f"{name} {n}x{k} blocksize {blocksize}")
                    for name, tensor in tiles._tensors().items():
                        assert_same_bits(again._tensors()[name], tensor, f"{name} {n}x{k} blocksize {blocksize}")


def test_tiles_add_no_more_than_their_padding():
    packed = fp.quantize_4bit(torch.randn(4096, 1024), "nf4", 64)
    assert packed.nbytes == 4096 * 1024 // 2 + 4096 * 1024 // 64 * 4


def test_shapes_without_tiles_stay_in_rows():
    for shape in [(5,), (4, 33), (2, 3, 64), (0, 64), (8, 16)]:
        packed = fp.quantize_4bit(torch.randn(shape))
        assert packed.layout == "rows"
        assert packed.dequantize().shape == torch.Size(shape)
        if shape != (0, 64):
            with pytest.raises(ValueError, match="K a multiple of 32"):
                packed.tiles()


def test_copies_and_pickles_keep_every_bit():
    for double_quant in (False, True):
        packed = fp.quantize_4bit(torch.randn(40, 96), "nf4", 64, double_quant)
        for other in (packed.clone(), copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
            assert other.codes.data_ptr() != packed.codes.data_ptr()
            for name, tensor in packed._tensors().items():
                assert_same_bits(other._tensors()[name], tensor, name)
            assert_same_bits(other.dequantize(), packed.dequantize())


def test_strided_and_unaligned_weights_quantize_as_their_contiguous_copy(device):
    base = torch.randn(70, 131)
    for view in (base.t(), base[:, 1:65], base[::2, ::2], base.view(-1)[3:1027].view(16, 64)):
        got, expected = fp.quantize_4bit(view), fp.quantize_4bit(view.clone(memory_format=torch.contiguous_format))
        assert_same_bits(got.rows().codes, expected.rows().codes)
        assert_same_bits(got.block_scales(), expected.block_scales())


@pytest.mark.parametrize("settings", [("nf4", 64), ("nf4", 64, True), ("int4", 64)], ids=str)
def test_fake_tensors_are_quantized_and_decoded(settings):
    with FakeTensorMode():
        packed = fp.quantize_4bit(torch.randn(32, 64), *settings)
        assert packed.dequantize().shape == (32, 64)
    real = fp.quantize_4bit(torch.randn(32, 64), *settings)
    assert (packed.codes.shape, packed.scale.shape) == (real.codes.shape, real.scale.shape)


def test_dequantize_gives_float32_and_a_layer_its_own_dtype_where_no_other_is_asked_for():
    for dtype in DTYPES:
        weight = torch.randn(4, 64).to(dtype)
        packed = fp.quantize_4bit(weight)
        assert_same_bits(packed.dequantize(), packed.dequantize(torch.float32))
        assert packed.dequantize(torch.float64).dtype == torch.float64
        layer = fp.nn.Linear4bit.from_linear(torch.nn.Linear(64, 4, dtype=dtype))
        assert layer.dequantize().dtype == dtype


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        (([[1.0]],), TypeError, "weight is a list"),
        ((torch.ones(4, 4, dtype=torch.int32),), TypeError, "weight has dtype torch.int32"),
        ((torch.ones(4, 4).to_sparse(),), TypeError, "weight has layout torch.sparse_coo; it must be dense"),
        ((torch.ones(4, 4, dtype=torch.float64),), TypeError, "float32, bfloat16 or float16"),
        ((torch.ones(4, 4), "nf5"), ValueError, "quant_type is 'nf5'.*'nf4', 'fp4', 'int4'"),
        ((torch.ones(4, 4), None), ValueError, "quant_type is None"),
        ((torch.ones(4, 4), ["nf4"]), ValueError, "quant_type is"),
        ((torch.ones(4, 4), "nf4", 48), ValueError, "blocksize is 48.*32, 64, 128"),
        ((torch.ones(4, 4), "nf4", 8192), ValueError, "blocksize is 8192"),
        ((torch.ones(4, 4), "nf4", 0), ValueError, "blocksize is 0"),
        ((torch.ones(4, 4), "nf4", -64), ValueError, "blocksize is -64"),
        ((torch.ones(4, 4), "nf4", 64.0), ValueError, "blocksize is 64.0"),
        ((torch.ones(4, 4), "int4", 256), ValueError, "blocksize is 256.*32, 64, 128"),
        ((torch.ones(4, 4), "int4", 64, True), ValueError, "double_quant is True"),
        ((torch.ones(4, 4), "nf4", 64, "no"), ValueError, "double_quant is 'no'; it must be True or False"),
    ],
)
def test_bad_arguments_are_named(args, error, message):
    with pytest.raises(error, match=message):
        fp.quantize_4bit(*args)


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64, "float32"])
def test_what_is_no_floating_point_dtype_is_no_dtype_to_dequantize_to(dtype):
    with pytest.raises(TypeError, match=r"dtype is .*must be a floating-point"):
        fp.quantize_4bit(torch.ones(4, 4)).dequantize(dtype)


@pytest.mark.parametrize("device", [torch.float16, None])
def test_what_is_no_device_is_none_to_go_to(device):
    with pytest.raises(TypeError, match=f"device is {device}; it must be a torch.device or its name; dequantize"):
        fp.quantize_4bit(torch.ones(4, 4)).to(device)


@pytest.mark.parametrize(
    "call",
    [
        lambda o, c, s: o.dequantize_4bit(c, s[:-1], None, 0, 64, [16, 64], torch.float32),
        lambda o, c, s: o.dequantize_4bit(c[:-1], s, None, 0, 64, [16, 64], torch.float32),
        lambda o, c, s: o.dequantize_4bit(c, s, None, 0, 64, [16, 65], torch.float32),
        lambda o, c, s: o.dequantize_4bit(c, s, None, 0, 0, [16, 64], torch.float32),
        lambda o, c, s: o.dequantize_4bit(c, s, None, 0, 48, [16, 64], torch.float32),
        lambda o, c, s: o.dequantize_4bit(c, s, None, 2, 64, [16, 64], torch.float32),
        lambda o, c, s: o.dequantize_4bit(c, s, None, 7, 64, [16, 64], torch.float32),
        lambda o, c, s: o.dequantize_4bit(c, s, None, 0, 64, [16, 64], torch.int64),
        lambda o, c, s: o.dequantize_4bit(c.int(), s, None, 0, 64, [16, 64], torch.float32),
        lambda o, c, s: o.dequantize_4bit(c, s.half(), None, 0, 64, [16, 64], torch.float32),
        lambda o, c, s: o.quantize_4bit(torch.ones(8, dtype=torch.int64), 0, 64),
        lambda o, c, s: o.quantize_4bit(torch.ones(8), 3, 64),
        lambda o, c, s: o.quantize_4bit(torch.ones(8), 0, 0),
        lambda o, c, s: o.pack_tiles(c[:-1], 16, 64),
        lambda o, c, s: o.pack_tiles(c, 16, 63),
        lambda o, c, s: o.unpack_tiles(c, 16, 128),
    ],
)
def test_the_compiled_operators_refuse_what_would_read_past_a_buffer(call):
    packed = fp.quantize_4bit(torch.randn(16, 64)).rows()
    with pytest.raises((RuntimeError, ValueError, TypeError)):
        call(torch.ops.pyfastpeft, packed.codes, packed.scale)
