"""The fused operator under every instruction set and on a GPU: against float64 on the same dequantized weights, both
directions."""

import copy
import dataclasses
import math
import os
import pickle
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode, is_fake
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import pyfastpeft as fp
from pyfastpeft.ops import BankView, Lora, add_lora, backends, linear_4bit, mixed, pack_lora
from pyfastpeft.ops.linear_4bit import repack_lora
from pyfastpeft.ops.reference import keep_mask

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
QUANT_TYPES = ["nf4", "fp4", "int4"]
ROWS = [0, 1, 2, 3, 5, 8, 13, 16, 17, 33, 64, 100, 130]
# (N, K): whole and partial tiles, K of one 32-column segment upwards; then K that no tile holds (the reference serves).
MATRICES = [(16, 32), (33, 96), (100, 64), (257, 160), (48, 1024), (129, 544), (7, 33), (64, 100), (24, 8)]
# Relative Frobenius error. fp16 is computed in float32 or in bf16 pairs, as its instruction set has them.
FORWARD = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 4e-3}
# A gradient passes through two products (dy · B, then · A or · x), each rounding its bf16 operands once.
GRADIENT = {torch.float32: 1e-5, torch.bfloat16: 6e-3, torch.float16: 6e-3}


def pick(options):
    return options[int(torch.randint(len(options), ()))]


def error(got, expected, roundings=None, squares=None):
    """Relative Frobenius error, allowing for its scatter where few independent roundings make it up.

    Args:
        squares: of each element, the sum of the squares of the products that it sums: where these happen to cancel, the
            error is relative to what they would make with random signs.
        roundings: how many there are; default one an element. Through a LoRA branch it is rows times rank: all outputs
            of a row share the roundings of its S.
    """
    assert got.shape == expected.shape
    got, expected = got.detach().double(), expected.detach().double()
    if expected.numel() == 0:
        return 0.0
    scatter = 1 + 3 / math.sqrt(min(roundings or math.inf, expected.numel()))
    size = expected.norm() if squares is None else torch.maximum(expected.norm(), squares.sum().sqrt())
    return float((got - expected).norm() / size.clamp(min=1e-30) / scatter)


def assert_same(got, expected):
    """To the bit on a CPU; a GPU may read another way what lies another way, and add in another order."""
    assert torch.equal(got, expected) if got.is_cpu else error(got, expected) <= FORWARD[got.dtype]


def packed_weight(n, k, quant_type=None, double_quant=None):
    quant_type = quant_type or pick(QUANT_TYPES)
    blocksize = pick([32, 64, 128] if quant_type == "int4" else [32, 64, 128, 256, 1024, 4096])
    if double_quant is None:
        double_quant = quant_type != "int4" and bool(torch.rand(()) < 0.3)
    return fp.quantize_4bit(torch.randn(n, k) * 0.05 + 0.01, quant_type, blocksize, double_quant)


def adapter(n, k, r, dtype=torch.float32):
    return (torch.randn(r, k) * k**-0.5).to(dtype), (torch.randn(n, r) * r**-0.5).to(dtype)


def float64(x, w, bias=None, lora=None, keep=None):
    """The operator in float64: x, bias, A and B may require gradients."""
    y = x.double() @ w.dequantize(torch.float64).t()
    if bias is not None:
        y = y + bias.double()
    if lora is None:
        return y
    a, b, scaling, dropout = Lora(*lora)
    dropped = x.double() if keep is None else x.double() * keep / (1 - dropout)
    s = dropped @ a.double().t()
    s = s * (scaling.double() if isinstance(scaling, torch.Tensor) else scaling)
    return y + s @ b.double().t()


# ---- forward ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_forward_is_exact_to_the_stated_error_for_any_rows(device, quant_type, dtype):
    for m in ROWS:
        for n, k in [pick(MATRICES), pick(MATRICES)]:
            w = packed_weight(n, k, quant_type)
            x = torch.randn(m, k).to(dtype)
            bias = pick([None, torch.randn(n), torch.randn(n).to(dtype)])
            lora = pick([None, (*adapter(n, k, pick([1, 4, 16, 40])), 2.0)])
            y = linear_4bit(x, w, bias, lora)
            assert y.dtype == dtype and y.shape == (m, n)
            got = error(y, float64(x, w, bias, lora), lora and m * len(lora[0]))
            assert got <= FORWARD[dtype], f"M={m} {w} bias={bias is not None} lora={lora is not None}: {got:.1e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_blocksize_and_double_quantization_in_the_product(device, dtype):
    for quant_type in ("nf4", "fp4"):
        for blocksize in (32, 64, 128, 256, 512, 1024, 2048, 4096):
            for double_quant in (False, True):
                n, k = pick([(40, 96), (21, 576), (35, 1056)])
                w = fp.quantize_4bit(torch.randn(n, k), quant_type, blocksize, double_quant)
                for m in (1, 7, 40):
                    x = torch.randn(m, k).to(dtype)
                    got = error(linear_4bit(x, w), float64(x, w))
                    assert got <= FORWARD[dtype], f"M={m} {w}: {got:.1e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_long_products_do_not_lose_accuracy(device, dtype):
    n, k = 32, 16384
    w = packed_weight(n, k)
    for m in (1, 4, 40):
        x = torch.randn(m, k).to(dtype)
        assert error(linear_4bit(x, w), float64(x, w)) <= FORWARD[dtype]


def products_of_inputs_with_a_mean(quant_type):
    """Weights, and with each x, dy, y and dx in float64. Rows of x are nearly alike, so that only as many roundings as
    outputs do not depend on each other."""
    n, k = 2048, 4096
    made = []
    for dense in (torch.randn(n, k), torch.rand(n, k) - 0.5):
        for w in (fp.quantize_4bit(dense, quant_type), fp.quantize_4bit(dense.t().contiguous(), quant_type)):
            exact, products = w.dequantize(torch.float64), []
            for m in (1, 8, 40, 130):
                x, dy = torch.rand(m, w.shape[1]).bfloat16(), torch.rand(m, w.shape[0]).bfloat16()
                products.append((x, dy, x.double() @ exact.t(), dy.double() @ exact))
            made.append((w, products))
    return made


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_inputs_with_a_mean_lose_no_accuracy_in_either_direction(device, quant_type, in_common):
    # Errors of a code table in bf16 that have a mean themselves would add up: to 3e-2 here, NF4's to the nearest.
    for w, products in in_common(products_of_inputs_with_a_mean, quant_type):
        w = w.to(device, copy=True)  # and whatever is kept beside it
        for x, dy, y_exact, dx_exact in products:
            x = x.to(device, copy=True).requires_grad_()
            y = linear_4bit(x, w)
            y.backward(dy.to(device))
            for got, expected in ((y, y_exact), (x.grad, dx_exact)):
                assert error(got.cpu(), expected) <= FORWARD[torch.bfloat16], f"M={len(x)} {w}"


def distributions(n, k):
    """Weights that are normal, pruned, with outliers, of Laplace and of Student's t of 3 degrees."""
    normal = torch.randn(n, k)
    yield normal
    yield torch.where(normal.abs() > 1.3, normal, 0.0)
    yield torch.where(torch.arange(k) % 64 == 3, 20 * normal, normal)
    yield normal.sign() * torch.empty(n, k).exponential_()
    yield normal / torch.randn(3, n, k).square().mean(0).sqrt()


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_the_weights_rounding_cancels_out_however_they_are_distributed(device, quant_type):
    """As after an activation, x has a mean: what is off in each product to the same side adds up with the columns."""
    n, k = 160, 8192
    x = torch.randn(64, k)
    for dense in distributions(n, k):
        w = fp.quantize_4bit(dense, quant_type, 64, pick([False, True]))
        for aside in (x.relu().bfloat16(), (x + 1).bfloat16()):
            exact = float64(aside, w)
            for m in (1, 4, 40, 64):
                assert error(linear_4bit(aside[:m], w), exact[:m], n) <= FORWARD[torch.bfloat16], f"M={m} {w}"


def test_few_rows_take_the_values_of_fp4_as_they_are(device):
    for n, k in MATRICES[:6]:
        w, x = packed_weight(n, k, "fp4"), torch.randn(3, k).bfloat16()
        exact = float64(x, w)
        assert error(linear_4bit(x, w), exact) <= 1.05 * error(exact.bfloat16(), exact), w


def test_a_single_output(device):
    for k in (32, 8, 544):
        w, x = packed_weight(1, k), torch.randn(200, k)
        lora = (*adapter(1, k, 3), 1.0)
        assert error(linear_4bit(x, w, None, lora), float64(x, w, None, lora)) <= 1e-5


def test_leading_dimensions_are_kept(device):
    w = packed_weight(24, 64)
    for shape in [(64,), (3, 64), (2, 3, 64), (2, 1, 3, 64), (2, 0, 64)]:
        x = torch.randn(shape)
        y = linear_4bit(x, w)
        assert y.shape == (*shape[:-1], 24)
        assert error(y, float64(x, w)) <= 1e-5


def test_sizes_of_zero_give_what_torch_gives(isa):
    wide, narrow, bias = packed_weight(24, 0), packed_weight(0, 64), torch.randn(24)
    branch = torch.ones(4, 0), torch.ones(24, 4), 2.0
    for lead in ((), (3,), (2, 3), (0, 3)):
        x = torch.randn(*lead, 0, requires_grad=True)
        y = linear_4bit(x, wide, bias, branch)
        assert torch.equal(y, bias.expand(*lead, 24)) and torch.autograd.grad(y.sum(), x)[0].shape == x.shape
        assert linear_4bit(torch.randn(*lead, 64), narrow).shape == (*lead, 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_and_unaligned_inputs_give_the_contiguous_result(device, dtype):
    k, n = 96, 40
    w = packed_weight(n, k)
    a, b = adapter(n, k, 5)
    wide = torch.randn(150, 2 * k + 3).to(dtype)
    views = [
        wide[:20, 1 : k + 1],
        wide[:5, 3 : k + 3],
        wide[:40:2, :k],
        wide[:9, : 2 * k : 2],
        torch.randn(k, 33).to(dtype).t(),
        torch.randn(1, k).to(dtype).expand(6, k),
        wide.view(-1)[1 : 1 + 17 * k].view(17, k),
        torch.randn(4, 6, k).to(dtype).transpose(0, 1),
    ]
    strided_a, strided_b = torch.randn(k, 5).t(), torch.randn(n, 10)[:, ::2]
    for x in views:
        assert_same(linear_4bit(x, w, None, (a, b, 0.5)), linear_4bit(x.contiguous(), w, None, (a, b, 0.5)))
        got = linear_4bit(x, w, None, (strided_a, strided_b, 0.5))
        assert_same(got, linear_4bit(x, w, None, (strided_a.contiguous(), strided_b.contiguous(), 0.5)))
    bias = torch.randn(2 * n)[::2]
    assert_same(linear_4bit(views[0], w, bias), linear_4bit(views[0], w, bias.contiguous()))


def test_inputs_are_left_untouched(device):
    w = packed_weight(40, 96)
    x, bias, (a, b) = torch.randn(20, 96), torch.randn(40), adapter(40, 96, 4)
    before = [t.clone() for t in (x, bias, a, b, w.codes, w.scale)]
    linear_4bit(x, w, bias, (a, b, 2.0))
    for now, then in zip((x, bias, a, b, w.codes, w.scale), before, strict=True):
        assert torch.equal(now, then)


# ---- LoRA ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_rank_and_adapter_dtype(device, dtype):
    for r in range(1, 66):
        n, k = pick([(16, 32), (33, 96), (100, 160)])
        w = packed_weight(n, k)
        lora = (*adapter(n, k, r, pick([torch.float32, torch.bfloat16, torch.float16])), 1.5)
        m = pick([1, 2, 5, 16, 17, 40])
        x = torch.randn(m, k).to(dtype)
        got = error(linear_4bit(x, w, None, lora), float64(x, w, None, lora), m * r)
        assert got <= FORWARD[dtype], f"r={r} M={m} {w}: {got:.1e}"


def test_the_branch_itself_is_as_accurate_as_the_base(device):
    """With a base of zeros nothing hides the branch's own error."""
    n, k = 48, 128
    w = fp.quantize_4bit(torch.zeros(n, k))
    for dtype in DTYPES:
        for m in (1, 3, 16, 40):
            x, lora = torch.randn(m, k).to(dtype), (*adapter(n, k, 9), 0.25)
            # S is rounded once to the operand type of its second product.
            assert error(linear_4bit(x, w, None, lora), float64(x, w, None, lora), m * 9) <= FORWARD[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scaling_a_number_a_vector_or_a_row_each(device, dtype):
    n, k, r = 40, 96, 12
    w = packed_weight(n, k)
    a, b = adapter(n, k, r)
    for m in (1, 4, 16, 33):
        x = torch.randn(m, k).to(dtype)
        for scaling in (0.0, -1.5, torch.tensor(0.7), torch.rand(r), torch.randn(m, r), torch.zeros(m, r)):
            lora = (a, b, scaling)
            assert error(linear_4bit(x, w, None, lora), float64(x, w, None, lora), m * r) <= FORWARD[dtype]


def test_a_scaling_may_have_any_strides(device):
    w, (a, b), x = packed_weight(40, 96), adapter(40, 96, 12), torch.randn(5, 96)
    for scaling in (
        torch.tensor(2.0).expand(12),
        torch.rand(24)[::2],
        torch.rand(12).expand(5, 12),
        torch.rand(12, 5).t(),
    ):
        expected = linear_4bit(x, w, None, (a, b, scaling.contiguous()))
        assert_same(linear_4bit(x, w, None, (a, b, scaling)), expected)


def test_a_packed_adapter_is_the_adapter_in_bf16(isa):
    for n, k in [(40, 96), (17, 32), (129, 544), (48, 1056)]:
        w = packed_weight(n, k)
        for r in (1, 3, 16, 20, 64, 107):
            a, b = adapter(n, k, r, torch.bfloat16)
            for m in (0, 1, 2, 4, 7, 16, 17, 70):
                x = torch.randn(m, k + 7).bfloat16()[:, 3 : k + 3]
                scaling = pick([2.0, torch.tensor(0.7), torch.rand(r), torch.randn(m, r)])
                got = linear_4bit(x, w, None, pack_lora(a.float(), b, scaling))
                roundings = None if m == 0 else m * min(n, r)
                assert error(got, float64(x, w, None, (a, b, scaling)), roundings) <= FORWARD[torch.bfloat16]


@pytest.mark.parametrize("r", [3, 4])
def test_a_packed_adapter_goes_the_short_way_with_factors_of_any_rank(monkeypatch, r):
    w, x, packed = packed_weight(40, 96), torch.randn(2, 96).bfloat16(), pack_lora(*adapter(40, 96, r))
    monkeypatch.setattr(sys.modules[linear_4bit.__module__], "_check", lambda *_: pytest.fail("it went the long way"))
    with torch.no_grad():
        for scaling in (torch.rand(r), torch.rand(2, r)):
            got = linear_4bit(x, w, None, packed._replace(scaling=scaling))
            assert error(got, float64(x, w, None, (*packed[:2], scaling)), 2 * r) <= FORWARD[torch.bfloat16]


def test_factors_of_another_rank_than_a_packed_adapters_are_refused():
    w, x, packed = packed_weight(40, 96), torch.randn(2, 96).bfloat16(), pack_lora(*adapter(40, 96, 3))
    for shape in ((4,), (2, 4), (2,)):
        with torch.no_grad(), pytest.raises(ValueError, match=r"lora scaling has shape .* must be a number, \(3,\)"):
            linear_4bit(x, w, None, packed._replace(scaling=torch.ones(shape)))


def test_a_packed_adapter_takes_other_values_of_its_shapes_into_its_memory(isa):
    for n, k in [(40, 96), (17, 32), (129, 544)]:
        w, x = packed_weight(n, k), torch.randn(3, k).bfloat16()
        packed = repack_lora(None, *adapter(n, k, 5))
        for r, taken in [(5, True), (5, True), (6, False), (22, False), (22, True)]:
            a, b = adapter(n, k, r)
            again = repack_lora(packed, a, b)
            assert again.a is a and again.b is b and (again.handle is packed.handle) == taken
            assert torch.equal(linear_4bit(x, w, None, again), linear_4bit(x, w, None, pack_lora(a, b)))
            packed = again
        for other in (adapter(n + 16, k, 22), adapter(n, k + 2, 22)):
            assert repack_lora(packed, *other).handle is not packed.handle


def test_a_packed_adapter_serves_gradients_and_other_dtypes_from_its_source(isa):
    w, (a, b) = packed_weight(40, 96), adapter(40, 96, 5)
    packed = pack_lora(a.requires_grad_(), b, 1.5)
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.randn(6, 96).to(dtype)
        y = linear_4bit(x, w, None, packed)
        assert y.requires_grad and torch.equal(y, linear_4bit(x, w, None, (a, b, 1.5)))
    with torch.no_grad():
        assert torch.equal(linear_4bit(x, w, None, packed), linear_4bit(x, w, None, (a, b, 1.5)))


def test_a_packed_adapter_serves_a_weight_of_odd_columns():
    w, (a, b), x = packed_weight(40, 45), adapter(40, 45, 5), torch.randn(6, 45).bfloat16()
    assert torch.equal(linear_4bit(x, w, None, pack_lora(a, b, 1.5)), linear_4bit(x, w, None, (a, b, 1.5)))
    with pytest.raises(ValueError, match="lora A"):
        linear_4bit(torch.randn(6, 64).bfloat16(), packed_weight(40, 64), None, pack_lora(*adapter(40, 63, 5)))


@pytest.mark.parametrize("rows_or_columns", [(16, 96), (40, 64)])
def test_a_packed_adapter_of_another_layer_is_refused(rows_or_columns):
    n, k = rows_or_columns
    with pytest.raises(ValueError, match="lora"):
        linear_4bit(torch.randn(2, 96).bfloat16(), packed_weight(40, 96), None, pack_lora(*adapter(n, k, 4)))
    with pytest.raises(ValueError, match="r >= 1"):
        pack_lora(torch.randn(4, 32), torch.randn(8, 5))
    with pytest.raises(ValueError, match="lora b is"):
        pack_lora(torch.randn(4, 32), torch.ones(8, 4, dtype=torch.int8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_bank_serves_each_row_its_own_adapter_and_none_for_minus_one(device, dtype):
    slots, r, n, k = 4, 8, 40, 96
    w = packed_weight(n, k)
    a, b, scaling = torch.randn(slots, r, k) * 0.1, torch.randn(slots, n, r) * 0.3, torch.rand(slots) + 0.5
    for m in (1, 5, 24, 70):
        x = torch.randn(m, k).to(dtype)
        rows = torch.randint(-1, slots, (m,))
        y = linear_4bit(x, w, None, BankView(a, b, scaling, rows))
        one = [None if i < 0 else (a[i], b[i], float(scaling[i])) for i in rows.tolist()]
        expected = torch.cat([float64(x[i : i + 1], w, None, lora) for i, lora in enumerate(one)])
        assert error(y, expected, m * r) <= FORWARD[dtype]
        for i, slot in enumerate(rows.tolist()):
            assert error(y[i], expected[i], r) <= FORWARD[dtype], f"row {i} of {m}, slot {slot}"


def test_gradients_of_a_bank_reach_only_the_slots_in_use(device):
    slots, r, n, k = 3, 4, 24, 64
    w = packed_weight(n, k)
    a = (torch.randn(slots, r, k) * 0.1).requires_grad_()
    b = (torch.randn(slots, n, r) * 0.3).requires_grad_()
    scaling, rows = torch.tensor([2.0, 1.0, 0.5]), torch.tensor([0, 2, -1, 0, 2])
    x = torch.randn(5, k, requires_grad=True)
    dy = torch.randn(5, n)
    linear_4bit(x, w, None, BankView(a, b, scaling, rows)).backward(dy)
    got = x.grad, a.grad, b.grad
    x.grad = a.grad = b.grad = None
    for i, slot in enumerate(rows.tolist()):
        lora = None if slot < 0 else (a[slot], b[slot], float(scaling[slot]))
        float64(x[i : i + 1], w, None, lora).backward(dy[i : i + 1].double())
    for mine, expected in zip(got, (x.grad, a.grad, b.grad), strict=True):
        assert error(mine, expected) <= 1e-5
    assert not got[1][1].any() and not got[2][1].any()


# Slots of a bank of which slot 1 alone is not finite, in one of its tensors.
def spoiled(bank):
    for i in range(len(bank)):
        for value in (math.nan, -math.inf):
            tensors = [t.detach().clone() for t in bank]
            at = int(torch.randint(tensors[i][1].numel(), ()))
            tensors[i].view(len(tensors[i]), -1)[1, at] = value
            yield tensors


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_adapter_that_is_not_finite_stays_in_its_rows(device, dtype):
    n, k = pick([(40, 96), (33, 64), (24, 35)])
    w, bank = packed_weight(n, k), (torch.randn(3, 4, k), torch.randn(3, n, 4), torch.rand(3) + 0.5)
    for m, compute in ((4, None), (16, "int8"), (40, "int8"), (170, None)):
        x, rows = torch.randn(m, k).to(dtype), torch.randint(-1, 3, (m,))
        rows[:4] = torch.randperm(4) - 1

        def products(*bank, x=x, rows=rows, compute=compute):
            lora = BankView(*bank, rows)
            yield linear_4bit(x, w, None, lora, compute)
            if x.is_cpu and k % 2 == 0:
                a, b, scaling, _ = lora.stacked()
                packed = pack_lora(a, b, scaling)
                yield linear_4bit(x, w, None, packed, compute)
                with torch.no_grad():
                    yield linear_4bit(x, w, None, packed, compute)

        finite = list(products(*bank))
        for tensors in spoiled(bank):
            for got, expected in zip(products(*tensors), finite, strict=True):
                assert torch.equal(got[rows != 1], expected[rows != 1])
                assert not got[rows == 1].isfinite().all(1).any()


def check_isolation(dtype, m, n, k, frozen=""):
    """Training over a bank: what is not finite stays in its rows and its slot."""
    w, x, dy = packed_weight(n, k), torch.randn(m, k).to(dtype), torch.randn(m, n).to(dtype)
    bank, rows = (torch.randn(3, 4, k), torch.randn(3, n, 4), torch.rand(3) + 0.5), torch.randint(-1, 3, (m,))
    rows[:4] = torch.randperm(4) - 1
    mine = (rows == 1)[:, None]

    def gradients(x, dy, a, b, scaling):
        x, a, b = (t.detach().requires_grad_(name != frozen) for t, name in ((x, "x"), (a, "a"), (b, "b")))
        y = linear_4bit(x, w, None, BankView(a, b, scaling, rows))
        dx, *factors = torch.autograd.grad(y, [t for t in (x, a, b) if t.requires_grad], dy)
        return (y[rows != 1], dx[rows != 1], *(t[::2] for t in factors)), (dx[rows == 1], *(t[1] for t in factors))

    finite, _ = gradients(x, dy, *bank)
    # In a model, rows that an adapter of another layer has spoiled arrive in x and in dy.
    bad_x, bad_dy = (t.masked_fill(mine, math.nan) for t in (x, dy))
    for case in (*((x, dy, *t) for t in spoiled(bank)), (bad_x, dy, *bank), (x, bad_dy, *bank)):
        others, own = gradients(*case)
        assert all(torch.equal(got, expected) for got, expected in zip(others, finite, strict=True))
        assert frozen or not any(t.isfinite().all() for t in own)  # what is wanted alone may not depend on it


@pytest.mark.parametrize("looks", [True, False], ids=["looking at results", "not looking"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_training_over_a_bank_keeps_what_is_not_finite_to_its_rows_and_slot(device, monkeypatch, dtype, looks):
    if not looks:
        monkeypatch.setattr(mixed, "tells", lambda _: False)
    # What no tile holds is torch's product, which in bfloat16 lets a NaN of x into the row before (2.13, AMX, K odd).
    shape = pick([(40, 96), (33, 64), *([(24, 35)] if dtype == torch.float32 else [])])
    for m in (5, 40):
        for frozen in ("", "a", "b"):
            check_isolation(dtype, m, *shape, frozen)


@pytest.mark.parametrize("kernels", [True, False])
def test_an_adapter_that_overflows_stays_in_its_rows(device, monkeypatch, kernels):
    if not kernels:
        monkeypatch.setattr(backends, "_FORCED", backends.Backend.REFERENCE)
    w, x, rows = packed_weight(24, 64), torch.randn(6, 64), torch.tensor([0, 1, -1, 0, 1, 0])
    a, b = torch.randn(2, 4, 64), torch.randn(2, 24, 4)
    huge = a.clone()
    huge[1] = torch.finfo(a.dtype).max
    results = []
    for each in (a, huge):
        x = x.detach().requires_grad_()
        y = linear_4bit(x, w, None, BankView(each, b, torch.ones(2), rows))
        results.append((y[rows != 1], torch.autograd.grad(y, x, torch.ones_like(y))[0][rows != 1]))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


# ---- gradients -------------------------------------------------------------------------------------------------------


def check_gradients(dtype, m, n, k, r, adapter_dtype, bias, scaling, dropout=0.0):
    w = packed_weight(n, k)
    x = torch.randn(m, k).to(dtype).requires_grad_()
    leaves = {"x": x}
    if bias is not None:
        leaves["bias"] = bias.requires_grad_()
    lora = keep = None
    if r:
        a, b = adapter(n, k, r, adapter_dtype)
        leaves |= {"a": a.requires_grad_(), "b": b.requires_grad_()}
        lora = Lora(a, b, scaling, dropout)
    dy = torch.randn(m, n).to(dtype)
    with torch.random.fork_rng():
        y = linear_4bit(x, w, bias, lora)
    if dropout:
        # The operator draws one seed a call from torch's generator.
        keep = keep_mask(m, k, torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64), dropout)
    got = torch.autograd.grad(y, list(leaves.values()), dy)
    expected_y = float64(x, w, bias, lora, keep)
    expected = torch.autograd.grad(expected_y, list(leaves.values()), dy.double())
    squared = {name: leaf.detach().double().square().requires_grad_() for name, leaf in leaves.items()}
    w2 = SimpleNamespace(dequantize=lambda dtype: w.dequantize(dtype).square())
    lora2 = (squared["a"], squared["b"], scaling**2 / (1 - dropout), dropout) if r else None
    y2 = float64(squared["x"], w2, squared.get("bias"), lora2, keep)
    squares = torch.autograd.grad(y2, list(squared.values()), dy.double().square())
    what = f"M={m} {w} r={r} {adapter_dtype}"
    got_y = error(y, expected_y, m * r, y2.detach())
    assert got_y <= FORWARD[dtype], f"y, {what}: {got_y:.1e}"
    for (name, leaf), mine, theirs, square in zip(leaves.items(), got, expected, squares, strict=True):
        assert mine.dtype == leaf.dtype
        limit = GRADIENT[dtype] if leaf.dtype == torch.float32 else max(GRADIENT[dtype], GRADIENT[torch.bfloat16])
        wrong = error(mine, theirs, m * r, square)
        assert wrong <= limit, f"gradient of {name}, {what}: {wrong:.1e}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_to_x_a_b_and_bias_match_float64(device, dtype):
    for m in ROWS:
        n, k = pick(MATRICES)
        check_gradients(
            dtype,
            m,
            n,
            k,
            r=pick([0, 1, 8, 16, 17]),
            adapter_dtype=pick([torch.float32, torch.bfloat16]),
            bias=pick([None, torch.randn(n), torch.randn(n).to(dtype)]),
            scaling=2.0,
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_for_any_rank_and_scaling(device, dtype):
    for r in (1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 48, 64, 65):
        m, (n, k) = pick([1, 4, 16, 19, 70]), pick([(33, 96), (100, 64), (48, 288)])
        scaling = pick([0.5, torch.rand(r) + 0.5, torch.randn(m, r)])
        check_gradients(dtype, m, n, k, r, pick([torch.float32, torch.bfloat16]), None, scaling)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_training_sized_batches(device, dtype):
    check_gradients(dtype, 700, 192, 320, 16, torch.float32, torch.randn(192), 2.0)


@pytest.mark.parametrize("needed", ["x", "a", "b", "bias", "x a", "b bias"])
def test_only_the_gradients_asked_for_are_computed(device, needed):
    n, k, m = 40, 96, 9
    w = packed_weight(n, k)
    a, b = adapter(n, k, 4)
    tensors = {"x": torch.randn(m, k), "a": a, "b": b, "bias": torch.randn(n)}
    wanted = [tensors[name].requires_grad_() for name in needed.split()]
    lora = (tensors["a"], tensors["b"], 1.0)
    y = linear_4bit(tensors["x"], w, tensors["bias"], lora)
    dy = torch.randn(m, n)
    got = torch.autograd.grad(y, wanted, dy)
    expected = torch.autograd.grad(float64(tensors["x"], w, tensors["bias"], lora), wanted, dy.double())
    for mine, theirs in zip(got, expected, strict=True):
        assert error(mine, theirs) <= 1e-5


def test_gradients_through_views_and_strided_dy(device):
    w = packed_weight(24, 64)
    a, b = (t.requires_grad_() for t in adapter(24, 64, 4))
    x = torch.randn(6, 2, 64, requires_grad=True)
    dy = torch.randn(24, 2, 6).permute(2, 1, 0)
    leaves = (x, a, b)
    got = torch.autograd.grad(linear_4bit(x.transpose(0, 1), w, None, (a, b, 1.0)).transpose(0, 1), leaves, dy)
    expected = torch.autograd.grad(float64(x, w, None, (a, b, 1.0)), leaves, dy.double())
    for mine, theirs in zip(got, expected, strict=True):
        assert error(mine, theirs) <= 1e-5
    total = linear_4bit(x, w).sum()  # dy is one element expanded
    assert error(torch.autograd.grad(total, x)[0], torch.autograd.grad(float64(x, w).sum(), x)[0]) <= 1e-5


def test_nothing_is_recorded_without_gradients(device):
    w = packed_weight(24, 64)
    a, b = (t.requires_grad_() for t in adapter(24, 64, 4))
    with torch.no_grad():
        assert linear_4bit(torch.randn(3, 64), w, None, (a, b, 1.0)).grad_fn is None
    assert linear_4bit(torch.randn(3, 64), w).grad_fn is None


# ---- dropout ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dropout_drops_the_same_elements_forward_and_backward(device, dtype):
    for m, (n, k) in [(1, (33, 96)), (5, (100, 64)), (16, (16, 32)), (40, (48, 288)), (70, (33, 96)), (3, (7, 33))]:
        for dropout in (0.1, 0.5, 0.9):
            check_gradients(dtype, m, n, k, pick([4, 8, 17]), torch.float32, None, 2.0, dropout)


def test_dropout_masks_are_fair_and_independent():
    rows, columns = 512, 1024
    for dropout in (0.05, 0.3, 0.5, 0.9):
        seeds = torch.randint(-(2**63), 2**63 - 1, (2,), dtype=torch.int64)
        masks = [keep_mask(rows, columns, s.view(1), dropout).double() for s in seeds]
        mean, sd = 1 - dropout, math.sqrt(dropout * (1 - dropout))
        for mask in masks:
            assert abs(mask.mean() - mean) < 5 * sd / math.sqrt(rows * columns)
            assert ((mask.mean(0) - mean).abs() < 6 * sd / math.sqrt(rows)).all()
            assert ((mask.mean(1) - mean).abs() < 6 * sd / math.sqrt(columns)).all()
            centred = (mask - mean) / sd
            for shifted in (centred.roll(1, 0), centred.roll(1, 1), centred.roll((1, 1), (0, 1))):
                assert abs((centred * shifted).mean()) < 6 / math.sqrt(rows * columns)
        cross = ((masks[0] - mean) * (masks[1] - mean)).mean() / sd**2
        assert abs(cross) < 6 / math.sqrt(rows * columns)


def test_dropout_of_zero_is_no_dropout_and_calls_differ(device):
    n, k, m = 24, 64, 8
    w = packed_weight(n, k)
    a, b = adapter(n, k, 4)
    x = torch.randn(m, k)
    assert torch.equal(linear_4bit(x, w, None, Lora(a, b, 1.0, 0.0)), linear_4bit(x, w, None, (a, b, 1.0)))
    first, second = (linear_4bit(x, w, None, Lora(a, b, 1.0, 0.5)) for _ in range(2))
    assert not torch.equal(first, second)
    nothing = linear_4bit(x, w, None, Lora(a, b, 1.0, 1 - 1e-11))
    torch.testing.assert_close(nothing, linear_4bit(x, w), rtol=1e-5, atol=1e-6)


# ---- NaN and infinity ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_inf_stay_in_their_row_and_are_never_lost(device, dtype):
    for m in (1, 4, 16, 40):
        n, k = pick([(33, 96), (100, 64)])
        w = packed_weight(n, k, pick(["nf4", "int4"]))
        lora = pick([None, (*adapter(n, k, 3), 1.0)])
        x = torch.randn(m, k).to(dtype)
        clean = linear_4bit(x, w, None, lora)
        row, column = int(torch.randint(m, ())), int(torch.randint(k, ()))
        for value in (math.nan, math.inf, -math.inf):
            dirty = x.clone()
            dirty[row, column] = value
            y = linear_4bit(dirty, w, None, lora)
            expected = float64(dirty, w, None, lora)
            if lora is None and (y.is_cpu or w.quant_type == "nf4"):
                assert torch.equal(y[row].isnan(), expected[row].isnan())
                infinite = expected[row].isinf()
                assert torch.equal(y[row][infinite].double(), expected[row][infinite])
            # A GPU sums INT4's code * scale and zero apart, so an infinity may meet its opposite and become NaN.
            assert not y[row][~expected[row].isfinite()].isfinite().any()
            others = torch.arange(m) != row
            assert torch.equal(y[others], clean[others])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_rows_are_right_where_only_their_sums_with_codes_overflow(isa, dtype):
    n, k = 40, 256
    w = fp.quantize_4bit(torch.randn(n, k) / 50, "int4", 64)
    for m in (1, 4, 8, 16):
        x = torch.randn(m, k).to(dtype)
        large = torch.rand(m) < 0.5
        large[int(torch.randint(m, ()))] = True
        lora = pick([None, (*adapter(n, k, 3), torch.rand(m, 3) / 8)])
        clean, x = linear_4bit(x, w, None, lora), torch.where(large[:, None], x * 2e37, x)
        y, expected = linear_4bit(x, w, None, lora), float64(x, w, None, lora)
        assert error(y[large], expected[large], lora and 3 * int(large.sum())) <= FORWARD[dtype]
        assert torch.equal(y[~large], clean[~large])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_columns_of_x_do_not_drown_small_ones(device, dtype):
    """Kernels that hold x in integers must see that: rows of W with zeros for the large columns show what is left."""
    k = pick([64, 576, 1024])
    for m in (1, 3, 8, 16):
        x = torch.randn(m, k)
        large = torch.randperm(k)[: pick([1, 4, k // 8])]
        x[:, large] = torch.randn(m, len(large)) * 10.0 ** pick([2, 4, 6, 20])
        x = x.to(dtype)
        weight = torch.randn(64, k)
        weight[:32, large] = 0
        w = fp.quantize_4bit(weight, pick(["nf4", "fp4"]), pick([32, 64, 128]))
        y, expected = linear_4bit(x, w), float64(x, w)
        assert error(y, expected) <= FORWARD[dtype]
        assert error(y[:, :32], expected[:, :32]) <= FORWARD[dtype]


def test_rows_that_integers_round_too_much_are_right_among_others(device):
    """Many rows of bfloat16 may go in integers, too, but for some of them: each is right, whatever the others are."""
    for m in (5, 40, 300):
        n, k, quant_type = pick([33, 64]), pick([96, 320, 1024]), pick(["nf4", "fp4", "int4"])
        large = torch.randperm(k)[:4]
        weight = torch.randn(n, k)
        weight[:20, large] = 0
        w = fp.quantize_4bit(weight, quant_type, pick([32, 64] if k == 320 or quant_type == "int4" else [32, 128]))
        lora = pick([None, (*adapter(n, k, 3), 1.0)])
        rows = torch.rand(m) < pick([1 / m, 0.2, 0.9])
        rows[int(torch.randint(m, ()))] = True
        x = torch.randn(m, k) + pick([0, 3])
        alone = linear_4bit(x.bfloat16(), w, None, lora)
        x[rows.nonzero(), large] *= pick([1e3, 1e6, math.inf])
        x = x.bfloat16()
        y, expected = linear_4bit(x, w, None, lora), float64(x, w, None, lora)
        assert torch.equal(y[~rows], alone[~rows])
        if x.isfinite().all():
            squares = x.double().square() @ w.dequantize(torch.float64).square().t()
            small = slice(20 if lora is None and quant_type != "int4" else n)
            for row in range(m):
                for part in (slice(n), small):
                    assert error(y[row, part], expected[row, part], squares=squares[row, part]) <= FORWARD[x.dtype]


def test_sparse_and_extreme_values_of_x(device):
    for value in (1e-38, 1e-25, 1.0, 1e25, 1e36):
        x = torch.zeros(pick([1, 5]), 192)
        x[:, torch.randperm(192)[: pick([1, 100, 192])]] = value
        x = (x * torch.randn(192).sign()).bfloat16()
        w = fp.quantize_4bit(torch.randn(48, 192) / 8, pick(["nf4", "fp4"]), 64)
        y, expected = linear_4bit(x, w).double() / value, float64(x, w) / value
        bound = FORWARD[torch.bfloat16] if value > 1e-30 else 2e-2  # results are subnormal
        # Instructions on bf16, where there are any, take what is subnormal for zero.
        flushed = value < 1e-37 and "avx512_" in torch.ops.pyfastpeft.isa() and not y.any()
        assert flushed or error(y, expected, 48) <= bound, value


def test_nan_in_a_weight_block_reaches_its_outputs_only(device):
    n, k = 40, 96
    weight = torch.randn(n, k)
    weight[17, 40] = math.nan
    w = fp.quantize_4bit(weight, "nf4", 32)
    for dtype in DTYPES:
        for m in (1, 40):
            y = linear_4bit(torch.randn(m, k).to(dtype), w)
            assert y[:, 17].isnan().all()
            assert y[:, torch.arange(n) != 17].isfinite().all()


def test_a_nan_among_the_scales_is_one_whatever_its_bits_are(device):
    """Rounded in integers, one with all bits set would run over into a zero."""
    n, k = 40, 96
    for part, quant_type in (("scale", "nf4"), ("scale", "int4"), ("zero", "int4")):
        w = fp.quantize_4bit(torch.randn(n, k), quant_type, 32).rows()
        for bits in (0x7FC00000, 0x7FFFFFFF, -1):
            values = getattr(w, part).clone()
            values.view(torch.int32)[17 * k // 32 + 1] = bits
            dirty = dataclasses.replace(w, **{part: values}).prepared()
            for dtype in DTYPES:
                for m in (1, 16, 17, 40):
                    y = linear_4bit(torch.randn(m, k).to(dtype), dirty)
                    assert y[:, 17].isnan().all()
                    assert y[:, torch.arange(n) != 17].isfinite().all()


def test_nan_gradients_propagate(device):
    w = packed_weight(24, 64)
    a, b = (t.requires_grad_() for t in adapter(24, 64, 4))
    x = torch.randn(20, 64, requires_grad=True)
    dy = torch.randn(20, 24)
    dy[3, 5] = math.nan
    dx, da, db = torch.autograd.grad(linear_4bit(x, w, None, (a, b, 1.0)), (x, a, b), dy)
    assert dx[3].isnan().all() and dx[torch.arange(20) != 3].isfinite().all()
    assert da.isnan().all()
    assert db[5].isnan().all() and db[torch.arange(24) != 5].isfinite().all()


def test_overflow_of_half_precision_is_infinite_not_wrapped(device):
    w = fp.quantize_4bit(torch.ones(16, 64), "nf4", 64)
    y = linear_4bit(torch.full((3, 64), 60000.0, dtype=torch.float16), w)
    assert (y == math.inf).all()


# ---- torch's machinery -----------------------------------------------------------------------------------------------


def operator_arguments():
    n, k, m, r = 24, 64, 5, 4
    packed = fp.quantize_4bit(torch.randn(n, k), "nf4", 32, double_quant=True)
    int4 = fp.quantize_4bit(torch.randn(n, k), "int4", 32)
    rows = fp.quantize_4bit(torch.randn(n, k), "int4", 32).rows()
    x, dy, (a, b) = torch.randn(m, k), torch.randn(m, n), adapter(n, k, r)
    seed = torch.tensor([12345])
    nested = (packed.codes, packed.scale, None, packed.nested.absmax2, packed.nested.offset, 0, n, 32)
    plain = (int4.codes, int4.scale, int4.zero, None, None, 2, n, 32)
    return {
        "quantize_4bit": [(torch.randn(n, k), 0, 64), (torch.randn(n, k).bfloat16(), 2, 32)],
        "dequantize_4bit": [
            (rows.codes, rows.scale, rows.zero, 2, 32, [n, k], torch.bfloat16),
            (rows.codes, rows.scale, None, 0, 32, [n, k], torch.float32),
        ],
        "pack_pairs": [
            (m, torch.empty(tiles, pairs, 16, 2, dtype=torch.bfloat16))
            for m, tiles, pairs in [(a, 1, 32), (torch.randn(33, 5).bfloat16(), 3, 3), (torch.randn(0, 4), 0, 2)]
        ],
        "pack_tiles": [(rows.codes, n, k)],
        "unpack_tiles": [(int4.codes, n, k)],
        "pack_scales": [(rows.scale, n, k, 32), (packed.rows().scale, n, k, 32)],
        "unpack_scales": [(int4.scale, n, k, 32), (packed.scale, n, k, 32)],
        "linear_4bit": [
            (x, *nested, None, None, None, None, 1.0, None, 0.0, False),
            (x, *plain, torch.randn(n), a, b, torch.rand(m, r), 1.0, seed, 0.5, False),
            (x.bfloat16(), *plain, None, a, b, None, 2.0, None, 0.0, False),
            (x.bfloat16(), *plain, None, *pack_lora(a, b)[3:5], None, 2.0, None, 0.0, False),
        ],
        "linear_4bit_backward": [
            (dy, None, None, *nested, None, None, None, 1.0, None, 0.0, True),
            (dy, x, torch.randn(m, r), *plain, a, b, torch.rand(m, r), 1.0, seed, 0.5, True),
            (dy, None, torch.randn(m, r), *plain, a, b, None, 2.0, None, 0.0, True),
            (dy, None, None, *plain, a, b, None, 2.0, None, 0.0, False),
        ],
        "lora_backward": [
            (dy, x, torch.randn(m, r), a, b, 2.0, seed, 0.5, True),
            (dy, x, None, a, b, 2.0, None, 0.0, True),
            (dy, None, None, a, b, 2.0, None, 0.0, True),
        ],
    }


@pytest.mark.parametrize("name", list(operator_arguments()))
def test_opcheck_passes_for_every_operator(name):
    for args in operator_arguments()[name]:
        torch.library.opcheck(getattr(torch.ops.pyfastpeft, name).default, args)


@pytest.mark.parametrize("name", list(operator_arguments()))
def test_a_tensor_on_the_meta_device_beside_others_is_refused(name):
    """It brings the call to what computes nothing, and memory that nobody wrote would be the result."""
    operator = getattr(torch.ops.pyfastpeft, name)
    for arguments in operator_arguments()[name]:
        tensors = [i for i, t in enumerate(arguments) if isinstance(t, torch.Tensor)]
        for i in tensors if len(tensors) > 1 else []:
            with pytest.raises(ValueError, match=r"is on (meta|cpu); it must be where \w+ is, on (meta|cpu)"):
                operator(*replaced(arguments, i, arguments[i].to("meta")))


def test_tensors_on_the_meta_device_tell_the_shapes():
    n, k, r = 24, 64, 4
    x, bias, a, b = (torch.randn(*shape, device="meta") for shape in ((2, 3, k), (n,), (r, k), (n, r)))
    rows, slots = torch.empty(6, dtype=torch.int64, device="meta"), torch.empty(2, device="meta")
    bank = BankView(a.expand(2, r, k), b.expand(2, n, r), slots, rows)
    for w in (fp.quantize_4bit(torch.empty(n, k, device="meta")), packed_weight(n, k).to("meta")):
        for lora in (None, Lora(a, b, 2.0, 0.5), Lora(a, b, torch.empty(6, r, device="meta")), bank):
            y = linear_4bit(x.bfloat16(), w, bias, lora)
            assert y.is_meta and y.shape == (2, 3, n) and y.dtype == torch.bfloat16
        needing = [t.detach().requires_grad_() for t in (x, bias, a, b)]
        grads = torch.autograd.grad(linear_4bit(*needing[:1], w, needing[1], (*needing[2:], 1.0)).sum(), needing)
        assert [g.shape for g in grads] == [t.shape for t in needing]


def compiled_agrees(backend, dynamic=None):
    n, k, m = 24, 64, 6
    w = packed_weight(n, k, "nf4")
    a, b = (t.requires_grad_() for t in adapter(n, k, 4))
    bias = torch.randn(n, requires_grad=True)

    def layer(x):
        return torch.tanh(linear_4bit(x, w, bias, (a, b, 2.0))) * 2

    compiled = torch.compile(layer, fullgraph=True, backend=backend, dynamic=dynamic)
    for rows in (m, m + 3) if dynamic else (m,):
        x = torch.randn(rows, k, requires_grad=True)
        dy = torch.randn(rows, n)
        expected = torch.autograd.grad(layer(x), (x, a, b, bias), dy)
        got = torch.autograd.grad(compiled(x), (x, a, b, bias), dy)
        for mine, theirs in zip(got, expected, strict=True):
            assert error(mine, theirs) <= 1e-5
        with torch.no_grad():
            assert error(compiled(x), layer(x)) <= 1e-5


@pytest.mark.parametrize("dynamic", [None, True])
def test_torch_compile_takes_the_whole_graph(dynamic):
    compiled_agrees("aot_eager", dynamic)


def test_torch_compile_with_inductor():
    compiled_agrees("inductor")


def test_torch_compile_of_a_factor_a_row_for_any_number_of_rows():
    n, k = 24, 64
    w, (a, b) = packed_weight(n, k, "nf4"), adapter(n, k, 4)

    def gated(x, gate):
        return linear_4bit(x, w, None, (a, b, gate[:, None] * torch.ones(4)))

    compiled = torch.compile(gated, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (16, 5, 1, 0):
        x, gate = torch.randn(rows, k), torch.rand(rows)
        assert error(compiled(x, gate), gated(x, gate)) <= 1e-5


def test_torch_compile_of_a_bank_and_of_dropout():
    n, k, m = 24, 64, 6
    w = packed_weight(n, k, "nf4")
    a, b, scaling = torch.randn(3, 4, k) * 0.1, torch.randn(3, n, 4) * 0.3, torch.rand(3)
    x, rows = torch.randn(m, k), torch.randint(-1, 3, (m,))
    bank = torch.compile(
        lambda x, rows: linear_4bit(x, w, None, BankView(a, b, scaling, rows)), fullgraph=True, backend="aot_eager"
    )
    assert error(bank(x, rows), linear_4bit(x, w, None, BankView(a, b, scaling, rows))) <= 1e-5
    dropped = torch.compile(
        lambda x: linear_4bit(x, w, None, Lora(a[0], b[0], 1.0, 0.5)), fullgraph=True, backend="aot_eager"
    )
    assert not torch.equal(dropped(x), dropped(x))


def check_autocast(kind, dtype, n, k, scaling):
    """x and dy themselves are rounded to the autocast dtype."""
    m = 6
    w = packed_weight(n, k)
    a, b = adapter(n, k, 4)
    a, b = a.requires_grad_(), (b * scaling**-0.5).requires_grad_()
    x = torch.randn(m, k, requires_grad=True)
    dy = torch.randn(m, n)
    expected_y = float64(x, w, None, (a, b, scaling))
    expected = torch.autograd.grad(expected_y, (x, a, b), dy.double())
    for within in (False, True):
        with torch.autocast(kind, dtype):
            y = linear_4bit(x, w, None, (a, b, scaling))
        assert y.dtype == dtype
        assert error(y, expected_y) <= 2 * FORWARD[dtype]
        with torch.autocast(kind, dtype, enabled=within):
            got = torch.autograd.grad(y, (x, a, b), dy.to(dtype))
        for mine, theirs in zip(got, expected, strict=True):
            assert mine.dtype == torch.float32
            assert error(mine, theirs) <= 2 * GRADIENT[dtype]


@pytest.mark.parametrize("k", [64, 49])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_computes_in_its_dtype_and_returns_gradients_in_the_leaves(device, dtype, k):
    check_autocast(device.type, dtype, 24, k, 2.0)


@pytest.mark.parametrize("k", [64, 49])
def test_autocast_keeps_the_range_of_the_branch(device, k):
    check_autocast(device.type, torch.float16, 24, k, 2.0**18)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_number_of_threads_does_not_change_the_result(isa, dtype, by_threads):
    n, k = 250, 576
    w = packed_weight(n, k)
    a, b = (t.requires_grad_() for t in adapter(n, k, 16))
    for m in (1, 4, 30, 200, 520, 1100):
        x = torch.randn(m, k).to(dtype).requires_grad_()
        dy = torch.randn(m, n).to(dtype)

        def compute(x=x, dy=dy):
            y = linear_4bit(x, w, None, (a, b, 2.0))
            return y, *torch.autograd.grad(y, (x, a, b), dy)

        by_threads(compute, 1, 2, 3, 8)  # 8 of which some come late, and find their share taken


def test_python_threads_may_call_at_once(isa):
    jobs = []
    for i in range(8):
        n, k, m = pick([33, 100]), pick([64, 288]), pick([1, 5, 40])
        w, (a, b), x = packed_weight(n, k), adapter(n, k, 4 + i), torch.randn(m, k)
        jobs.append((x, w, (a.requires_grad_(), b.requires_grad_(), 1.0)))

    def work(job):
        x, w, lora = job
        y = linear_4bit(x, w, None, lora)
        return [y, *torch.autograd.grad(y.square().sum(), lora[:2])]

    expected = [work(job) for job in jobs]
    wrong = []

    def repeat(job, result):
        for _ in range(20):
            if not all(torch.equal(p, q) for p, q in zip(work(job), result, strict=True)):
                wrong.append(job)

    workers = [threading.Thread(target=repeat, args=pair) for pair in zip(jobs, expected, strict=True)]
    for t in workers:
        t.start()
    for t in workers:
        t.join()
    assert not wrong


FORK = """
import os, signal, torch, pyfastpeft as fp
torch.set_num_threads({threads})
w = fp.quantize_4bit(torch.randn(300, 512))
x = torch.randn(70, 512)
expected = fp.ops.linear_4bit(x, w)
pid = os.fork()
if pid == 0:
    signal.alarm(20)
    torch.set_num_threads(1)
    os._exit(0 if torch.equal(fp.ops.linear_4bit(x, w), expected) else 3)
status = os.waitpid(pid, 0)[1]
assert status == 0, status
assert torch.equal(fp.ops.linear_4bit(x, w), expected)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_computes_after_its_parent_did():
    """As a DataLoader's worker does: torch's own rule is one thread in a forked child."""
    for count in (1, 2):
        run_python(FORK.format(threads=count))


def run_python(code, check=True, **env):
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **env}, timeout=120
    )
    if check:
        assert result.returncode == 0, result.stderr
    return result


# ---- choice of kernels -----------------------------------------------------------------------------------------------


def test_the_environment_forces_an_instruction_set():
    for name in torch.ops.pyfastpeft.available_isas():
        code = "import torch, pyfastpeft; print(torch.ops.pyfastpeft.isa())"
        assert run_python(code, PYFASTPEFT_CPU_ISA=name).stdout.strip() == name


def test_an_unknown_instruction_set_is_refused_by_name():
    code = "import torch, pyfastpeft as fp; fp.ops.linear_4bit(torch.ones(1, 32), fp.quantize_4bit(torch.ones(1, 32)))"
    result = run_python(code, check=False, PYFASTPEFT_CPU_ISA="sse9")
    assert result.returncode != 0
    assert "PYFASTPEFT_CPU_ISA" in result.stderr and "sse9" in result.stderr and "generic" in result.stderr
    with pytest.raises(RuntimeError, match="sse9"):
        torch.ops.pyfastpeft.set_isa("sse9")


def test_the_reference_backend_agrees():
    code = """
import torch, pyfastpeft as fp
torch.manual_seed(0)
w = fp.quantize_4bit(torch.randn(40, 96), "nf4", 64, True)
x, a, b = (torch.randn(shape, requires_grad=True) for shape in ((9, 96), (4, 96), (40, 4)))
y = fp.ops.linear_4bit(x, w, torch.ones(40), fp.ops.Lora(a, b, 0.5, 0.25))
grads = torch.autograd.grad(y.square().sum(), (x, a, b))
print(" ".join(f"{v:.7e}" for t in (y, *grads) for v in t.flatten().tolist()))
"""
    native, reference = (
        torch.tensor([float(v) for v in run_python(code, PYFASTPEFT_BACKEND=name).stdout.split()])
        for name in ("native", "reference")
    )
    assert error(native, reference) <= 1e-5


def test_float64_reference_agrees_with_torch_linear():
    """The yardstick of this file, checked against torch."""
    w, x, bias = packed_weight(24, 64), torch.randn(5, 64), torch.randn(24)
    expected = F.linear(x.double(), w.dequantize(torch.float64), bias.double())
    assert error(float64(x, w, bias), expected) < 1e-14


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"w": torch.ones(24, 64)}, TypeError, "w is a Tensor"),
        ({"x": [1.0]}, TypeError, "x is a list"),
        ({"x": torch.ones(3, 64, dtype=torch.int64)}, TypeError, "x has dtype torch.int64"),
        ({"x": torch.ones(3, 64, dtype=torch.float64)}, TypeError, "x has dtype torch.float64"),
        ({"x": torch.ones(3, 63)}, ValueError, "x has shape .*K = 64"),
        ({"x": torch.ones(())}, ValueError, "x has shape"),
        ({"x": torch.ones(3, 64, device="meta")}, ValueError, "x is on meta"),
        ({"w": fp.quantize_4bit(torch.ones(2, 3, 64))}, ValueError, "w has shape .*must be a matrix"),
        ({"bias": torch.ones(23)}, ValueError, "bias is .*shape \\(24,\\)"),
        ({"bias": torch.ones(24, dtype=torch.int32)}, ValueError, "bias is torch.int32"),
        (
            {"bias": torch.ones(24, dtype=torch.float64)},
            ValueError,
            r"bias is torch.float64 of shape \(24,\); it must be float32, bfloat16 or float16 of shape \(24,\)",
        ),
        ({"bias": torch.ones(24, device="meta")}, ValueError, "bias is on meta; it must be on x's device, cpu"),
        ({"lora": (torch.ones(4, 63), torch.ones(24, 4), 1.0)}, ValueError, "lora A .*K = 64"),
        ({"lora": (torch.ones(0, 64), torch.ones(24, 0), 1.0)}, ValueError, "lora A .*r >= 1"),
        ({"lora": (torch.ones(4, 64), torch.ones(24, 5), 1.0)}, ValueError, "lora B .*r = 4"),
        ({"lora": (torch.ones(4, 64), torch.ones(23, 4), 1.0)}, ValueError, "lora B .*N = 24"),
        ({"lora": (torch.ones(4, 64).long(), torch.ones(24, 4), 1.0)}, ValueError, "lora A is torch.int64"),
        ({"lora": (torch.ones(4, 64), torch.ones(24, 4).double(), 1.0)}, ValueError, "must be float32, bfloat16 or"),
        ({"lora": (torch.ones(4, 64), torch.ones(24, 4), torch.ones(5))}, ValueError, "lora scaling has shape"),
        ({"lora": (torch.ones(4, 64), torch.ones(24, 4, device="meta"), 1.0)}, ValueError, "B on meta"),
        (
            {"lora": (torch.ones(4, 64), torch.ones(24, 4), torch.ones(4, device="meta"))},
            ValueError,
            "scaling is on meta",
        ),
        ({"lora": Lora(torch.ones(4, 64), torch.ones(24, 4), 1.0, 1.5)}, ValueError, "dropout is 1.5"),
        ({"lora": Lora(torch.ones(4, 64), torch.ones(24, 4), 1.0, -0.1)}, ValueError, "dropout is -0.1"),
        ({"lora": Lora(torch.ones(4, 64), torch.ones(24, 4), 1.0, None)}, TypeError, "dropout is a NoneType"),
        ({"lora": (torch.ones(4, 64), torch.ones(24, 4))}, (TypeError, ValueError), "lora"),
        ({"lora": "adapter"}, (TypeError, ValueError), "lora"),
        ({"lora": (None, torch.ones(24, 4), 1.0)}, TypeError, "lora A is a NoneType"),
        ({"lora": (torch.ones(4, 64), [1.0], 1.0)}, TypeError, "lora B is a list"),
        ({"lora": (torch.ones(4, 64), torch.ones(24, 4), None)}, TypeError, "lora scaling is a NoneType"),
        ({"lora": (torch.ones(4, 64), torch.ones(24, 4), "1")}, TypeError, "lora scaling is a str"),
        ({"bias": [0.0] * 24}, TypeError, "bias is a list"),
        (
            {"lora": BankView(torch.ones(2, 4, 64), torch.ones(2, 24, 4), torch.ones(2), [0, 1, 1])},
            TypeError,
            "rows of the bank is a list",
        ),
    ],
)
def test_bad_arguments_are_named(change, kind, message):
    arguments = {"x": torch.ones(3, 64), "w": fp.quantize_4bit(torch.ones(24, 64)), "bias": None, "lora": None} | change
    with pytest.raises(kind, match=message):
        linear_4bit(**arguments)


def replaced(arguments, index, value):
    return (*arguments[:index], value, *arguments[index + 1 :])


# (operator, case of operator_arguments, position, what makes of that argument one that would be read past its end)
HOSTILE = [
    ("linear_4bit", 1, 0, lambda x: x[:, :32]),
    ("linear_4bit", 1, 0, lambda x: x[None]),
    ("linear_4bit", 1, 0, lambda x: x.double()),
    ("linear_4bit", 1, 1, lambda codes: codes[:1]),
    ("linear_4bit", 1, 1, lambda codes: codes.int()),
    ("linear_4bit", 1, 2, lambda scale: scale[:1]),
    ("linear_4bit", 1, 2, lambda scale: scale.half()),
    ("linear_4bit", 1, 3, lambda zero: None),
    ("linear_4bit", 1, 3, lambda zero: zero.half()),
    ("linear_4bit", 0, 4, lambda absmax2: absmax2[:0]),
    ("linear_4bit", 0, 4, lambda absmax2: absmax2.expand(2)),
    ("linear_4bit", 0, 4, lambda absmax2: None),
    ("linear_4bit", 0, 5, lambda offset: offset.new_empty(0)),
    ("linear_4bit", 1, 6, lambda format: 3),
    ("linear_4bit", 1, 7, lambda n: 48),
    ("linear_4bit", 1, 7, lambda n: -1),
    ("linear_4bit", 1, 8, lambda blocksize: 0),
    ("linear_4bit", 1, 9, lambda bias: bias[:-1]),
    ("linear_4bit", 1, 9, lambda bias: bias.int()),
    ("linear_4bit", 1, 10, lambda a: a[:, :-1]),
    ("linear_4bit", 1, 11, lambda b: b[:-1]),
    ("linear_4bit", 1, 11, lambda b: b[:, :-1]),
    ("linear_4bit", 1, 11, lambda b: None),
    ("linear_4bit", 1, 12, lambda row_scale: row_scale[:-1]),
    ("linear_4bit", 1, 12, lambda row_scale: row_scale.double()),
    ("linear_4bit", 1, 12, lambda row_scale: row_scale[:, None].repeat(1, 2, 1)),
    ("linear_4bit", 1, 12, lambda row_scale: row_scale[0, 0]),
    ("linear_4bit", 1, 14, lambda seed: seed.int()),
    ("linear_4bit", 1, 14, lambda seed: seed[:0]),
    ("linear_4bit", 1, 15, lambda dropout: 1.0),
    ("linear_4bit_backward", 1, 0, lambda dy: dy[:, :-1]),
    ("linear_4bit_backward", 0, 1, lambda x: torch.ones(5, 64)),
    ("linear_4bit_backward", 1, 2, lambda s: s[:-1]),
    ("linear_4bit_backward", 1, 12, lambda b: b[:-1]),
    ("lora_backward", 0, 0, lambda dy: dy[:-1]),
    ("lora_backward", 0, 1, lambda x: x[:-1]),
    ("lora_backward", 0, 1, lambda x: x[:, :-1]),
    ("lora_backward", 0, 2, lambda s: s[:-1]),
    ("lora_backward", 0, 2, lambda s: s.half()),
    ("lora_backward", 0, 2, lambda s: s[:, :-1]),
    ("lora_backward", 0, 3, lambda a: pack_lora(a, torch.ones(24, len(a))).a_pairs),
    ("pack_scales", 0, 0, lambda scale: scale[:-1]),
    ("pack_scales", 0, 3, lambda blocksize: 0),
    ("unpack_scales", 0, 0, lambda scale: scale[:1]),
    ("unpack_scales", 0, 1, lambda n: -24),
    ("unpack_scales", 0, 3, lambda blocksize: 0),
]


@pytest.mark.parametrize(("name", "case", "position", "spoil"), HOSTILE)
def test_the_compiled_operators_refuse_what_would_read_past_a_buffer(name, case, position, spoil):
    arguments = operator_arguments()[name][case]
    operator = getattr(torch.ops.pyfastpeft, name)
    operator(*arguments)
    with pytest.raises((RuntimeError, TypeError)):
        operator(*replaced(arguments, position, spoil(arguments[position])))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None, torch.ones(24, 4)), "lora a is a NoneType; it must be a tensor"),
        ((torch.ones(4, 64), "b"), "lora b is a str; it must be a tensor"),
        ((torch.ones(4, 64), torch.ones(24, 4), "abc"), "lora scaling is a str; it must be a number or a tensor"),
    ],
)
def test_an_adapter_is_packed_of_tensors_and_a_number(arguments, message):
    with pytest.raises(TypeError, match=message):
        pack_lora(*arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": torch.tensor([0, 1, 2])}, r"rows of the bank lie in \[0, 2\]; they must lie in \[-1, 1\]"),
        ({"rows": torch.tensor([0, -2, 1])}, r"rows of the bank lie in \[-2, 1\]"),
        ({"rows": torch.tensor([0.0, 1.0, 1.0])}, "rows of the bank are torch.float32; they must be int64"),
        ({"rows": torch.tensor([0, 1])}, r"rows of the bank has shape \(2,\); it must be \(3,\)"),
        ({"b": torch.ones(2, 24, 4, device="meta")}, "b of the bank is on meta; it must be on x's device, cpu"),
        ({"b": torch.ones(2, 24, 4).double()}, "a and b of the bank are torch.float32 and torch.float64 of rank 4"),
        ({"a": torch.ones(2, 0, 64), "b": torch.ones(2, 24, 0)}, "torch.float32 of rank 0; .*of rank 1 at least"),
        ({"a": torch.ones(4, 64)}, r"a of the bank has shape \(4, 64\); it must be \[slots, r, K\], K = 64"),
        ({"a": torch.ones(0, 4, 64)}, r"a of the bank has shape \(0, 4, 64\); it must be .* with a slot at least"),
    ],
)
def test_a_bank_refuses_what_does_not_fit(change, message):
    w = fp.quantize_4bit(torch.ones(24, 64))
    bank = BankView(torch.ones(2, 4, 64), torch.ones(2, 24, 4), torch.ones(2), torch.tensor([0, 1, 1]))._replace(
        **change
    )
    with pytest.raises(ValueError, match=message):
        linear_4bit(torch.ones(3, 64), w, None, bank)


def test_a_factor_that_learns_is_refused():
    w, x, (a, b) = packed_weight(24, 64), torch.randn(3, 64), adapter(24, 64, 4)
    rows = torch.tensor([0, -1, 0])
    for shape, lora in [
        ((4,), lambda factor: (a, b, factor)),
        ((3, 4), lambda factor: Lora(a, b, factor)),
        ((4,), lambda factor: pack_lora(a, b, factor)),
        ((1,), lambda factor: BankView(a[None], b[None], factor, rows)),
    ]:
        factor = torch.rand(shape, requires_grad=True)
        with pytest.raises(ValueError, match=r"scaling.* requires a gradient, .*; multiply A or B by it"):
            linear_4bit(x, w, None, lora(factor))
        with torch.no_grad():
            assert torch.equal(linear_4bit(x, w, None, lora(factor)), linear_4bit(x, w, None, lora(factor.detach())))
        with forward_ad.dual_level(), pytest.raises(ValueError, match=r"scaling.* requires a gradient"):
            linear_4bit(x, w, None, lora(forward_ad.make_dual(factor.detach(), torch.ones(shape))))


# ---- inference over what is held -------------------------------------------------------------------------------------


def test_the_short_way_gives_what_the_long_way_gives(isa):
    for n, k in [(33, 96), (100, 64), (257, 160)]:
        w = packed_weight(n, k)
        for dtype in DTYPES:
            for shape in [(k,), (0, k), (1, k), (5, k), (2, 3, k), (40, k)]:
                x, bias = torch.randn(*shape).to(dtype), pick([None, torch.randn(n), torch.randn(n).bfloat16()])
                packed = pack_lora(*adapter(n, k, pick([1, 4, 16, 40])), 2.0)
                for lora in (None, packed, packed._replace(scaling=torch.full((len(packed.a),), 2.0))):
                    with torch.no_grad():
                        short = linear_4bit(x, w, bias, lora)
                    assert torch.equal(short, linear_4bit(x, w, bias, lora))


def test_the_short_way_takes_any_strides(isa):
    w = packed_weight(40, 64)
    wide = torch.randn(12, 128)
    with torch.no_grad():
        for x in (wide[:, :64], wide[::2, ::2], wide.t()[:64].t(), wide[:, None, :64], wide[:, :64].expand(3, 12, 64)):
            assert torch.equal(linear_4bit(x, w), linear_4bit(x.contiguous(), w))


def test_an_adapter_over_another_weight_is_refused_the_short_way_too():
    w, packed = packed_weight(40, 64), pack_lora(*adapter(40, 96, 4), 1.0)
    with torch.no_grad(), pytest.raises(ValueError, match="K = 64"):
        linear_4bit(torch.randn(2, 64).bfloat16(), w, None, packed)


def test_what_is_held_lives_as_long_as_its_owner_and_no_longer():
    import gc

    w, x = packed_weight(40, 64), torch.randn(2, 64).bfloat16()
    packed = pack_lora(*adapter(40, 64, 4), 1.0)
    number, branch = w.handle.number, packed.handle.number
    with torch.no_grad():
        expected = linear_4bit(x, w, None, packed)
        for pair in ((w, packed), copy.deepcopy((w, packed)), pickle.loads(pickle.dumps((w, packed)))):
            assert torch.equal(linear_4bit(x, pair[0], None, pair[1]), expected)
        del pair
    with pytest.raises(TypeError, match="cannot be copied"):
        copy.copy(w.handle)
    del w, packed
    gc.collect()
    call = torch.ops.pyfastpeft.linear_4bit_held.default
    with pytest.raises(RuntimeError, match="weight is"):
        call(x, number, None, 0, 1.0, None, False)
    other = packed_weight(40, 64).handle
    with pytest.raises(RuntimeError, match="branch is"):
        call(x, other.number, None, branch, 1.0, None, False)


@pytest.mark.parametrize("pre_dispatch", [False, True])
def test_what_is_freed_while_others_are_traced_is_no_part_of_the_trace(pre_dispatch):
    held = [packed_weight(40, 64), pack_lora(*adapter(40, 64, 4), 1.0)]
    freed = held[0].handle.number

    def trace(x):
        held.clear()
        return x + 1

    graph = make_fx(trace, pre_dispatch=pre_dispatch)(torch.ones(3)).graph
    assert [node.target for node in graph.nodes if node.op == "call_function"] == [torch.ops.aten.add.Tensor]
    with pytest.raises(RuntimeError, match=f"weight is {freed}"):
        torch.ops.pyfastpeft.linear_4bit_held.default(torch.randn(1, 64), freed, None, 0, 1.0, None, False)


def test_what_is_held_at_exit_is_left_to_it():
    code = """
import builtins
import torch
import pyfastpeft as fp

packed = fp.quantize_4bit(torch.randn(64, 64))
with torch.no_grad():
    fp.ops.linear_4bit(torch.randn(1, 64), packed)
builtins.last = lambda: None  # holds this script's names until our modules are gone
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "Exception ignored" not in done.stderr, done.stderr


def test_a_held_weight_may_move_into_shared_memory():
    w, x = packed_weight(40, 64), torch.randn(2, 64)
    with torch.no_grad():
        expected = linear_4bit(x, w)
        w.codes.share_memory_()
        w.scale.share_memory_()
        assert torch.equal(linear_4bit(x, w), expected)


def test_large_pages_change_no_value():
    from pyfastpeft.ops import large_pages

    for t in (
        torch.randn(0),
        torch.randn(3),
        torch.randn(1 << 20),
        torch.randn(64, 64).t(),
        torch.randn(3, device="meta"),
    ):
        before = t.clone()
        large_pages(t)
        assert t.is_meta or torch.equal(t, before)
    for other in (torch.eye(3).to_sparse_csr(), torch.eye(3).to_mkldnn()):  # which have no one place
        large_pages(other)


def test_an_arena_keeps_every_value_in_every_mode():
    from pyfastpeft.ops.memory import Arena

    arena, given, kept = Arena(), [], []
    for i, shape in enumerate([(3,), (0,), (5, 7), (40, 1000, 16, 2), (2, 500, 16, 2), (1,)] * 3):
        t = torch.randn(shape).to([torch.bfloat16, torch.float32][i % 2])
        with torch.inference_mode(i % 3 == 0):
            kept.append(arena.empty(shape, t.dtype))
        assert not kept[-1].is_inference()
        kept[-1].copy_(t)
        given.append(t)
    for t, own in zip(given, kept, strict=True):
        assert torch.equal(t, own) and own.dtype == t.dtype and own.is_contiguous()
        assert own.data_ptr() % 64 == 0
    with torch.device("meta"):
        assert Arena().empty((3,), torch.float32).is_cpu
    arena = Arena()
    with FakeTensorMode():
        assert is_fake(arena.empty((3,), torch.float32))
    assert not is_fake(arena.empty((3,), torch.float32))
    kept[2].zero_()
    assert all(torch.equal(t, own) for i, (t, own) in enumerate(zip(given, kept, strict=True)) if i != 2)


@pytest.mark.parametrize("layer", ["4 bits", "full precision"])
@pytest.mark.parametrize("trains", ["ab", "a", "b", ""])
def test_training_keeps_x_for_a_and_the_projection_for_b(layer, trains):
    """With A frozen, as LoRA-FA has it, x would be most of what a layer keeps."""
    x, (a, b), kept = torch.randn(5, 64, requires_grad=True), adapter(48, 64, 4), []
    a.requires_grad_("a" in trains), b.requires_grad_("b" in trains)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        if layer == "4 bits":
            linear_4bit(x, packed_weight(48, 64), lora=(a, b, 2.0))
        else:
            add_lora(torch.randn(5, 48), x, a, b, 2.0)
    assert (x.shape in kept, (5, 4) in kept) == ("a" in trains, "b" in trains)


@pytest.mark.parametrize("layer", ["4 bits", "4 bits alone", "full precision"])
@pytest.mark.parametrize("create_graph", [False, True])
def test_where_a_function_behind_gives_no_gradient_there_is_none(layer, create_graph):
    class Ends(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y, other):
            return y + other

        @staticmethod
        def backward(ctx, gradient):
            return None, gradient

    x, other = (torch.randn(5, n, requires_grad=True) for n in (64, 48))
    a, b = adapter(48, 64, 4)
    leaves = [x, *(t.requires_grad_() for t in (a, b))] if layer != "4 bits alone" else [x]
    if layer == "full precision":
        y = add_lora(torch.randn(5, 48), x, a, b, 2.0)
    else:
        y = linear_4bit(x, packed_weight(48, 64), lora=(a, b, 2.0) if layer == "4 bits" else None)
    loss = Ends.apply(y, other).sum()
    *none, of_other = torch.autograd.grad(loss, [*leaves, other], create_graph=create_graph, allow_unused=True)
    assert none == [None] * len(leaves) and torch.equal(of_other, torch.ones(5, 48))


@pytest.mark.parametrize("factors", [(6, 4), (4,)], ids=["of rows", "of all"])
@pytest.mark.parametrize("trains", ["ab", "a", "b"])
@pytest.mark.parametrize("k", [64, 49])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_second_derivatives_match_float64(device, k, dropout, trains, factors):
    """Past a residual too, whose gradient alone would be half the truth."""
    m, n, w = 6, k, packed_weight(k, k)
    (a, b), x = adapter(n, k, 4), torch.randn(m, k, requires_grad=True)
    trained = [t.requires_grad_() for name, t in (("a", a), ("b", b)) if name in trains]

    def seconds(f):
        (first,) = torch.autograd.grad((x + f(x)).pow(3).sum(), x, create_graph=True)
        slope = torch.autograd.grad(f(x).sum(), (x, *trained), create_graph=True)
        return torch.autograd.grad(first.square().sum() + sum(t.square().sum() for t in slope), (x, *trained))

    numbers = torch.cuda if device.type == "cuda" else torch  # what the operator draws its seed from
    lora, state = Lora(a, b, torch.rand(factors), dropout), numbers.get_rng_state()
    keep = keep_mask(m, k, torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64), dropout) if dropout else None

    def mine(x):
        numbers.set_rng_state(state)
        return linear_4bit(x, w, None, lora)

    for got, expected in zip(seconds(mine), seconds(lambda x: float64(x, w, None, lora, keep)), strict=True):
        assert error(got, expected) <= 1e-5


@pytest.mark.parametrize("grad", [True, False])
def test_forward_mode_is_an_error(grad):
    """Where a tensor has a tangent, which the bare operator would drop; others are as ever."""
    w, x, (a, b) = packed_weight(48, 64), torch.randn(3, 64), adapter(48, 64, 4)
    plain = linear_4bit(x, w)
    with torch.set_grad_enabled(grad):
        with forward_ad.dual_level():
            dual = [forward_ad.make_dual(t, t) for t in (x, a)]
            for x_, lora in ((dual[0], None), (dual[0], (a, b, 1.0)), (x, (dual[1], b, 1.0))):
                with pytest.raises(NotImplementedError, match="jvp"):
                    linear_4bit(x_, w, lora=lora)
            assert torch.equal(linear_4bit(x, w), plain)
        with pytest.raises(RuntimeError, match="functorch"):
            torch.func.jvp(lambda x: linear_4bit(x, w), (x,), (x,))


def test_threads_that_hold_a_weight_at_the_same_time_hold_one():
    """From Python 3.12 on nothing keeps them apart: the second's took the place of the first's, whose number became
    another weight's while the first thread went on to call with it."""
    w = packed_weight(48, 64)
    hold = type(w).handle.func
    first = hold(w)
    number = hold(w).number
    assert number == first.number == w.handle.number
    assert hold(packed_weight(48, 64)).number != number


def test_memory_that_runs_out_is_named_and_what_a_long_input_needed_is_given_back():
    code = """
import resource, torch, pyfastpeft as fp
torch.set_num_threads(2)

def used(what):
    return int(dict(line.split(":") for line in open("/proc/self/status"))[what].split()[0]) * 1024

def many(rows):
    return fp.ops.linear_4bit(torch.ones(rows, 4096), w)

w = fp.quantize_4bit(torch.randn(256, 4096), "nf4")
many(64)
before = used("VmRSS")
many(8192)
assert used("VmRSS") > before + (90 << 20)
for _ in range(300):
    many(64)
assert used("VmRSS") < before + (60 << 20), (before, used("VmRSS"))
limit, rest = resource.getrlimit(resource.RLIMIT_DATA)
x = torch.ones(8192, 4096)
resource.setrlimit(resource.RLIMIT_DATA, (used("VmData") + (60 << 20), rest))
try:
    fp.ops.linear_4bit(x, w)
except RuntimeError as error:
    assert "not enough memory: beside its tensors an operator needs" in str(error), error
else:
    raise SystemExit("there was memory")
resource.setrlimit(resource.RLIMIT_DATA, (limit, rest))
assert torch.equal(fp.ops.linear_4bit(x, w)[:64], many(64))
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_checks_of_values_hold_under_a_dispatch_mode():
    """As selective checkpointing and counters of operations have one: they run what they see."""
    w, x = packed_weight(48, 64), torch.randn(2, 64)
    bank = BankView(torch.randn(2, 4, 64), torch.randn(2, 48, 4), torch.ones(2), torch.tensor([0, 2]))
    with FlopCounterMode(display=False), pytest.raises(ValueError, match=r"rows of the bank lie in \[0, 2\]"):
        linear_4bit(x, w, lora=bank)
