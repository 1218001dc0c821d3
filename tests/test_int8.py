"""The int8-activation tier under every instruction set: against float64, and against what its rounding defines."""

import math
import pickle

import numpy as np
import pytest
import torch
from test_linear_4bit import adapter, distributions, error, float64, packed_weight, pick

import pyfastpeft as fp
from pyfastpeft.ops import BankView, linear_4bit, pack_lora

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (N, K): whole and partial tiles, odd tiles, one 32-column unit upwards, blocks of 512 columns crossed.
MATRICES = [(16, 32), (33, 96), (100, 64), (257, 160), (48, 1024), (129, 544), (24, 608), (70, 1088)]
ROWS = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 16, 17, 31, 64, 100]
BOUND = 7e-3


def test_the_stated_error_holds_for_every_format_and_blocksize(isa):
    cases = [(q, b, d) for q in ("nf4", "fp4") for b in (32, 64, 128, 256, 1024, 4096) for d in (False, True)]
    for quant_type, blocksize, double_quant in [*cases, *(("int4", b, False) for b in (32, 64, 128))]:
        w = fp.quantize_4bit(torch.randn(512, 2048), quant_type, blocksize, double_quant)
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(320, 2048).to(dtype)  # so many that chance hardly moves the error
            exact = float64(x, w)
            for m in (4, 40):
                y = torch.cat([linear_4bit(part, w, compute="int8") for part in x.split(m)])
                got = error(y, exact)
                assert got <= BOUND, f"M={m} {dtype} {w}: {got:.2e}"


@pytest.mark.parametrize("double_quant", [False, True])
def test_the_weights_rounding_cancels_out_where_x_has_a_mean(isa, double_quant):
    """As after an activation: what is off in each product to the same side adds up with the length of the rows."""
    x = torch.randn(32, 4096)
    for weight in distributions(640, 4096):  # of fewer columns, few large weights of Student's t are most of an error
        w = fp.quantize_4bit(weight, "nf4", 64, double_quant)
        spread = error(linear_4bit(x, w, compute="int8"), float64(x, w))
        for aside in (x.relu(), x + 1, -x.relu()):
            assert error(linear_4bit(aside, w, compute="int8"), float64(aside, w)) <= 3 * spread


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "int4"])
def test_any_shape_with_bias_and_branch(isa, quant_type, dtype):
    for m in ROWS:
        for n, k in [pick(MATRICES), pick(MATRICES)]:
            w = packed_weight(n, k, quant_type)
            x = torch.randn(m, k).to(dtype)
            bias = pick([None, torch.randn(n), torch.randn(n).to(dtype)])
            lora = pick([None, (*adapter(n, k, pick([1, 4, 17, 40])), 2.0)])
            y = linear_4bit(x, w, bias, lora, compute="int8")
            assert y.dtype == dtype and y.shape == (m, n)
            # Few columns round together: what they add up to scatters more than independent elements.
            got = error(y, float64(x, w, bias, lora), max(1, m * k // 64))
            assert got <= BOUND, f"M={m} {w} bias={bias is not None} lora={lora is not None}: {got:.2e}"


@pytest.mark.parametrize("quant_type", ["fp4", "int4"])
def test_values_that_8_bits_hold_are_not_rounded(isa, quant_type):
    n, k = 40, 640
    w = packed_weight(n, k, quant_type, double_quant=False)
    if quant_type == "fp4":  # all of its values but +-0.0052 are multiples of 1/120: leave those out
        dense = w.dequantize(torch.float32)
        peak = dense.abs().amax(1, keepdim=True).clamp(min=1e-3)
        w = fp.quantize_4bit((torch.randint(-2, 3, (n, k)) / 4 * 2).clamp(-1, 1) * peak, "fp4", w.blocksize)
    for m in (1, 5, 40):
        x = torch.randint(-127, 128, (m, k)).float()
        x[:, ::32] = 127.0  # every unit's largest, so that its step is 1
        assert error(linear_4bit(x, w, compute="int8"), float64(x, w)) <= 1e-5


def test_few_and_many_rows_agree(isa):
    for quant_type in ("nf4", "fp4", "int4"):
        w, x = packed_weight(72, 1120, quant_type), torch.randn(40, 1120)
        bias, lora = torch.randn(72), (*adapter(72, 1120, 5), 0.5)
        whole = linear_4bit(x, w, bias, lora, compute="int8")
        for rows in (1, 3, 6, 8, 13):
            assert error(linear_4bit(x[:rows], w, bias, lora, compute="int8"), whole[:rows]) <= 1e-5


def test_chunks_of_rows_and_threads_change_nothing(isa, by_threads):
    w, x = packed_weight(320, 96), torch.randn(1100, 96)
    (whole,) = by_threads(lambda: [linear_4bit(x, w, compute="int8")], 1, 2, 3)
    assert error(whole, torch.cat([linear_4bit(part, w, compute="int8") for part in x.split(100)])) <= 1e-5


def test_the_branch_is_exact(isa):
    n, k = 40, 512
    w = fp.quantize_4bit(torch.randn(n, k) * 1e-8, "nf4")
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 6e-3)):
        x = torch.randn(70, k).to(dtype)
        for rows, rank in ((3, 7), (20, 7), (70, 7), (20, 40), (70, 107)):
            a, b = adapter(n, k, rank)
            slots = BankView(
                torch.stack([a, -a]), torch.stack([b, b]), torch.tensor([1.0, 0.5]), torch.arange(rows) % 3 - 1
            )
            for lora in ((a, b, 2.0), pack_lora(a, b, 2.0), pack_lora(a, b, torch.rand(rows, rank)), slots):
                got = linear_4bit(x[:rows], w, None, lora, compute="int8")
                expected = linear_4bit(x[:rows], w, None, lora)
                assert error(got, expected, rows * rank) <= bound, (type(lora), rows, rank)


@pytest.mark.parametrize("rows", [4, 17, 65, 301])
def test_threads_share_the_branch(isa, rows, by_threads):
    n, k, rank = 6144, 1024, 33
    w, (a, b), x = packed_weight(n, k), adapter(n, k, rank), torch.randn(rows, k).bfloat16()
    loras = (a, b, 2.0), pack_lora(a, b, 2.0)
    results = by_threads(lambda: [linear_4bit(x, w, None, lora, compute="int8") for lora in loras], 1, 2)
    expected = linear_4bit(x, w, compute="int8").double() + 2 * x.double() @ a.double().t() @ b.double().t()
    assert all(error(got, expected) <= 6e-3 for got in results)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_inputs_and_leading_dimensions(isa, dtype):
    k, n = 96, 40
    w = packed_weight(n, k)
    wide = torch.randn(150, 2 * k + 3).to(dtype)
    for x in (
        wide[:20, 1 : k + 1],
        wide[:40:2, :k],
        wide[:9, : 2 * k : 2],
        torch.randn(k, 33).to(dtype).t(),
        wide[0, :k],
    ):
        assert torch.equal(linear_4bit(x, w, compute="int8"), linear_4bit(x.contiguous(), w, compute="int8"))
    for shape in [(k,), (2, 3, k), (2, 0, k)]:
        assert linear_4bit(torch.randn(shape), w, compute="int8").shape == (*shape[:-1], n)


def test_what_is_not_a_number_spoils_its_row_and_no_other(isa):
    w = packed_weight(40, 1088)
    for m in (1, 4, 20):
        for bad in (math.nan, math.inf, -math.inf):
            x = torch.randn(m, 1088)
            clean = linear_4bit(x, w, compute="int8")
            row, column = int(torch.randint(m, ())), int(torch.randint(1088, ()))
            x[row, column] = bad
            y = linear_4bit(x, w, compute="int8")
            assert not y[row].isfinite().any()
            others = torch.arange(m) != row
            assert torch.equal(y[others], clean[others])


def test_zeros_and_extreme_magnitudes(isa):
    w = packed_weight(40, 128)
    for m in (2, 20):
        assert torch.equal(linear_4bit(torch.zeros(m, 128), w, compute="int8"), torch.zeros(m, 40))
        x = torch.randn(m, 128)
        x[:, 64:] = 0  # whole units of zeros
        for scale in (1e-20, 1e20):
            assert error(linear_4bit(x * scale, w, compute="int8") / scale, float64(x, w), m) <= BOUND


def test_long_sums_and_outliers_stay_within_their_unit(isa):
    w, x = packed_weight(48, 16384, "nf4", False), torch.randn(5, 16384)
    assert error(linear_4bit(x, w, compute="int8"), float64(x, w), 5 * 256) <= BOUND
    w, x = fp.quantize_4bit(torch.randn(48, 1024), "nf4"), torch.randn(200, 1024)
    loud = x.clone()
    loud[:, 7] = 1000.0
    w7 = w.dequantize(torch.float64)[:, 7]
    rest = linear_4bit(loud, w, compute="int8").double() - 1000.0 * w7
    # The loud unit's other values are lost, and the weight beside it is off by its own rounding; no more than that.
    off = rest - (x.double() @ w.dequantize(torch.float64).t() - x[:, 7:8].double() * w7)
    assert off.square().mean().sqrt() < 10  # 63 lost products of a variance near 1: 8 and the weight's rounding


class TestInference:
    def test_a_gradient_is_refused(self):
        w, x = packed_weight(24, 64), torch.randn(3, 64)
        a, b = adapter(24, 64, 2)
        for arguments in (
            (x.clone().requires_grad_(), w),
            (x, w, torch.randn(24).requires_grad_()),
            (x, w, None, (a.clone().requires_grad_(), b, 1.0)),
        ):
            with pytest.raises(ValueError, match="compute is 'int8', for inference only"):
                linear_4bit(*arguments, compute="int8")
            with torch.no_grad():
                linear_4bit(*arguments, compute="int8")

    def test_an_unknown_tier_is_refused(self):
        w, x = packed_weight(24, 64), torch.randn(3, 64)
        for make in (
            lambda: linear_4bit(x, w, compute="fp8"),
            lambda: fp.nn.Linear4bit(64, 24, compute="fp8"),
            lambda: fp.FastPeftConfig(compute="fp8"),
        ):
            with pytest.raises(ValueError, match="compute is 'fp8'; it must be None"):
                make()
        with pytest.raises(ValueError, match=r"compute is array\(\[0, 0\]\); it must be None"):
            linear_4bit(x, w, compute=np.array([0, 0]))

    @pytest.mark.parametrize("k", [8, 33, 100])
    def test_where_no_kernel_serves_the_product_is_exact(self, k):
        w, x = packed_weight(24, k, "nf4"), torch.randn(5, k)
        assert error(linear_4bit(x, w, compute="int8"), float64(x, w)) <= 1e-5

    def test_under_autocast_and_compile(self):
        w, x = packed_weight(48, 128), torch.randn(4, 128)
        with torch.autocast("cpu", torch.bfloat16):
            assert linear_4bit(x, w, compute="int8").dtype == torch.bfloat16
        expected = linear_4bit(x, w, compute="int8")
        compiled = torch.compile(lambda t: linear_4bit(t, w, compute="int8"), fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), expected)

    def test_the_operator_is_well_formed(self):
        w, x = packed_weight(48, 128, "nf4", True), torch.randn(4, 128)
        a, b = adapter(48, 128, 3)
        arguments = (x, *w.prepared().operands, torch.randn(48), a, b, None, 2.0, None, 0.0, True)
        torch.library.opcheck(torch.ops.pyfastpeft.linear_4bit.default, arguments)

    def test_the_operator_refuses_a_weight_without_columns(self):
        codes, scale = torch.empty(3, 0, dtype=torch.uint8), torch.empty(3, 0, 16)
        for int8 in (False, True):
            with pytest.raises(RuntimeError, match=r"codes must be .* K a positive multiple of 32"):
                torch.ops.pyfastpeft.linear_4bit(
                    torch.empty(4, 0),
                    codes,
                    scale,
                    None,
                    None,
                    None,
                    0,
                    48,
                    64,
                    None,
                    None,
                    None,
                    None,
                    1.0,
                    None,
                    0.0,
                    int8,
                )


class TestModule:
    def test_inference_rounds_and_training_does_not(self):
        linear = torch.nn.Linear(256, 48)
        exact = fp.nn.Linear4bit.from_linear(linear)
        module = fp.nn.Linear4bit.from_linear(linear, compute="int8")
        x = torch.randn(6, 256)
        with torch.no_grad():
            y, expected = module(x), exact(x)
        assert not torch.equal(y, expected) and error(y, expected) <= 1e-2
        x.requires_grad_()
        assert torch.equal(module(x), exact(x))
        a, b = adapter(48, 256, 4)
        module.requires_grad_(False)
        with torch.no_grad():
            exactly = exact(x, (a, b, 1.0))
        assert torch.equal(module(x.detach(), (a.requires_grad_(), b, 1.0)), exactly)

    def test_the_tier_survives_copies_and_shows(self):
        module = fp.nn.Linear4bit(64, 16, compute="int8")
        assert pickle.loads(pickle.dumps(module)).compute == "int8"
        assert "compute='int8'" in repr(module) and "compute" not in repr(fp.nn.Linear4bit(64, 16))
        module.compute = None
        with torch.no_grad():
            assert error(module(torch.eye(64)[:3]) - module.bias, module.dequantize().t()[:3]) <= 1e-5


def test_rows_in_bf16_are_exact_where_that_is_as_fast(isa):
    w, lora = packed_weight(72, 1120, "nf4"), pack_lora(*adapter(72, 1120, 5), 0.5)
    most = {"avx512_bf16x2": 3, "avx512_bf16": 2, "avx512_amx": 2}.get(isa, 0)
    for m in (1, 2, 3, 4, 8, 9, 40):
        x = torch.randn(m, 1120).bfloat16()
        rounded, exact = linear_4bit(x, w, None, lora, compute="int8"), linear_4bit(x, w, None, lora)
        many = {"avx2": 8, "avx512_amx": 10}.get(isa, math.inf)
        assert torch.equal(rounded, exact) is (m <= most or m > many or w.blocksize > 256)
