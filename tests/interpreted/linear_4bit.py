"""``linear_4bit`` by its Triton kernels in Triton's interpreter: see test_triton_interpreted.py."""

from __future__ import annotations

import math

import numpy as np
import pytest
import repair
import torch
from test_linear_4bit import (
    DTYPES,
    FORWARD,
    QUANT_TYPES,
    adapter,
    check_gradients,
    check_isolation,
    error,
    float64,
    packed_weight,
    pick,
)

import pyfastpeft as fp
from pyfastpeft.formats import FORMATS
from pyfastpeft.ops import BankView, Lora, linear_4bit, mixed, triton_kernels
from pyfastpeft.ops.backends import Backend, choose
from pyfastpeft.ops.triton_kernels import _kernels

kernels = _kernels("linear_4bit")
# (M, N, K): less than a tile, a tile's tails, blocks that straddle rows, rows that start in the middle of a byte, a
# sweep in parts.
SHAPES = [(1, 5, 32), (5, 33, 96), (17, 40, 35), (3, 70, 130), (70, 16, 640), (2, 1, 7)]


def test_the_kernels_serve_here():
    assert choose(packed_weight(16, 32), 1, torch.float32, infers=True) is Backend.TRITON


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_the_byte_permutations_are_the_code_table(quant_type, dtype):
    table = FORMATS[quant_type].table
    codes = torch.arange(256, dtype=torch.uint8).view(torch.uint32).numpy()
    words = kernels.table_words(tuple(table.tolist()), dtype)
    by_operand = [np.full_like(codes, word & 0xFFFFFFFF) for word in words]
    asm = kernels.lookup_asm([f"${i}" for i in range(5, 13)])
    for i, word in enumerate(repair.run_ptx(asm, [codes, *by_operand], 4)):
        byte = torch.arange(i, 256, 4)
        pair = torch.from_numpy(word.copy()).view(dtype).view(-1, 2)
        assert torch.equal(pair, table.to(dtype)[torch.stack([byte >> 4, byte & 15], 1)])
    if dtype == torch.float16:
        constant = repair.run_ptx(kernels.table_asm(tuple(table.tolist())), [codes], 4)
        assert all(map(np.array_equal, constant, repair.run_ptx(asm, [codes, *by_operand], 4)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_and_gradients_match_float64(shape, dtype):
    m, n, k = shape
    for rank in (0, pick([3, 4, 17])):
        bias = pick([None, torch.randn(n), torch.randn(n).to(dtype)])
        scaling = pick([2.0, torch.rand(rank) + 0.5, torch.randn(m, rank)]) if rank else 1.0
        check_gradients(dtype, m, n, k, rank, pick([torch.float32, torch.bfloat16]), bias, scaling)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_several_blocks_of_every_kind(dtype):
    """Rows, columns, steps and ranks beyond one block; S is then computed before the sweep."""
    shape = (140, 150, 150) if dtype == torch.bfloat16 else (70, 40, 70)
    check_gradients(dtype, *shape, 70, dtype, None, 0.5)
    check_gradients(dtype, *shape, 16, dtype, None, 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_cut_that_tuning_tries_computes_the_same(dtype, monkeypatch):
    for cut in kernels.around(kernels.tiles(5, dtype == torch.float32)):
        monkeypatch.setattr(kernels, "formula", lambda *_: cut)  # noqa: B023
        check_gradients(dtype, 5, 70, 140, 4, dtype, None, 0.5)


@pytest.mark.parametrize("part", ["scaling dtype", "scaling stride", "rows stride"])
def test_a_bank_of_any_strides(part):
    slots, r, n, k, m = 4, 8, 40, 96, 9
    w, x = packed_weight(n, k), torch.randn(m, k).bfloat16()
    a, b, scaling = torch.randn(slots, r, k) * 0.1, torch.randn(slots, n, r) * 0.3, torch.rand(slots) + 0.5
    rows = torch.randint(-1, slots, (m,))
    if part == "scaling dtype":
        scaling = scaling.half()
    elif part == "scaling stride":
        scaling = torch.stack([scaling, scaling + 1], 1)[:, 0]
    else:
        rows = torch.stack([rows, 1 - rows], 1)[:, 0]
    y = linear_4bit(x, w, None, BankView(a, b, scaling, rows))
    assert torch.equal(y, linear_4bit(x, w, None, BankView(a, b, scaling.float().contiguous(), rows.contiguous())))


def test_opcheck_passes_beside_an_adapter_of_another_dtype():
    w, (a, b) = packed_weight(24, 64, "nf4", True).rows(), [t.bfloat16() for t in adapter(24, 64, 4)]
    x, dy, s = torch.randn(5, 64), torch.randn(5, 24), torch.randn(5, 4)
    for needs in ((True, True, True), (False, True, False), (False, False, True)):
        arguments = (dy, x, s, *w.operands, 64, a, b, None, 2.0, None, 0.0, *needs)
        torch.library.opcheck(torch.ops.pyfastpeft.linear_4bit_triton_backward.default, arguments)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("m", [1, 8, 9, 16, 32])
def test_few_rows_by_words_of_the_weight(m, dtype):
    for quant_type in QUANT_TYPES:
        n, k = pick([(5, 32), (70, 96), (33, 416), (64, 1056)])
        double_quant = quant_type != "int4" and pick([False, True])
        w = fp.quantize_4bit(torch.randn(n, k), quant_type, pick([32, 64, 128]), double_quant)
        x, bias = torch.randn(m, k).to(dtype), pick([None, torch.randn(n)])
        assert error(linear_4bit(x, w, bias), float64(x, w, bias)) <= FORWARD[dtype], w


def test_few_rows_with_a_mean_lose_no_accuracy():
    for dense in (torch.randn(64, 4096), torch.rand(64, 4096) - 0.5, torch.randn(64, 4096) ** 3):
        w, x = fp.quantize_4bit(dense, "nf4"), torch.rand(8, 4096).bfloat16()
        assert error(linear_4bit(x, w), float64(x, w)) <= FORWARD[torch.bfloat16]


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_every_blocksize_and_double_quantization(quant_type, double_quant):
    for blocksize in (32, 64, 128, 256, 512, 1024, 2048, 4096):
        n, k = pick([(40, 96), (9, 544), (300, 33)])
        w = fp.quantize_4bit(torch.randn(n, k), quant_type, blocksize, double_quant)
        x = torch.randn(3, k).to(torch.bfloat16)
        assert error(linear_4bit(x, w), float64(x, w)) <= FORWARD[x.dtype], w


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropout_drops_what_the_definition_drops_in_both_directions(dtype):
    check_gradients(dtype, 17, 40, pick([35, 96]), 4, torch.float32, None, 2.0, pick([0.1, 0.5]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 24, 64, 3), (40, 33, 35, 4), (3, 16, 1100, 70), (140, 24, 64, 4)], ids=str)
def test_rows_of_mixed_adapters_match_each_alone(shape, dtype):
    m, n, k, r = shape
    w, bias, slots = packed_weight(n, k), pick([None, torch.randn(n)]), 5
    a, b = torch.randn(slots, r, k) * k**-0.5, torch.randn(slots, n, r) * r**-0.5
    scaling, rows = torch.tensor([0.5, 1.0, 2.0, math.nan, 3.0]), torch.randint(-1, 3, (m,))
    rows[0] = 4
    bank = pick([(a, b), (a.mT.contiguous().mT, b.mT.contiguous().mT)])
    y = linear_4bit(x := torch.randn(m, k).to(dtype), w, bias, BankView(*bank, scaling, rows))
    for slot in rows.unique().tolist():
        of_slot = rows == slot
        lora = None if slot < 0 else (a[slot], b[slot], float(scaling[slot]))
        assert error(y[of_slot], float64(x[of_slot], w, bias, lora), int(of_slot.sum()) * r) <= FORWARD[dtype]


@pytest.mark.parametrize("m", [5, 140])
def test_an_adapter_that_is_not_finite_stays_in_its_rows(m):
    w, x, rows = packed_weight(24, 64), torch.randn(m, 64).to(torch.bfloat16), torch.randint(-1, 3, (m,))
    rows[:4] = torch.arange(-1, 3)
    bank = (torch.randn(3, 4, 64), torch.randn(3, 24, 4), torch.ones(3))
    clean = linear_4bit(x, w, None, BankView(*bank, rows))
    for i in range(3):
        dirty = [t.clone() for t in bank]
        dirty[i][1] = pick([math.nan, math.inf])
        y = linear_4bit(x, w, None, BankView(*dirty, rows))
        assert torch.equal(y[rows != 1], clean[rows != 1])
        assert not y[rows == 1].isfinite().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_training_keeps_what_is_not_finite_to_its_rows_and_slot(monkeypatch, dtype):
    monkeypatch.setattr(mixed, "tells", lambda _: False)  # as on a GPU
    check_isolation(dtype, *pick([(5, 24, 64), (17, 33, 35)]))


def test_mixed_adapters_train():
    n, k, r = 24, 64, 3
    w, x = packed_weight(n, k), torch.randn(5, k, requires_grad=True)
    a, b = torch.randn(3, r, k, requires_grad=True), torch.randn(3, n, r, requires_grad=True)
    scaling, rows, dy = torch.tensor([0.5, 1.0, 2.0]), torch.tensor([0, 2, -1, 0, 2]), torch.randn(5, n)
    got = torch.autograd.grad(linear_4bit(x, w, None, BankView(a, b, scaling, rows)), (x, a, b), dy)
    alone = [(a[s], b[s], float(scaling[s])) if s >= 0 else None for s in rows.tolist()]
    y = torch.cat([float64(x[i : i + 1], w, None, lora) for i, lora in enumerate(alone)])
    for mine, theirs in zip(got, torch.autograd.grad(y, (x, a, b), dy.double()), strict=True):
        assert error(mine, theirs) <= 1e-5


@pytest.mark.parametrize("needed", ["x", "a", "b", "x b"])
def test_only_the_gradients_asked_for_are_computed(needed):
    n, k, m = 33, 48, 9
    w, (a, b) = packed_weight(n, k), adapter(n, k, 4)
    tensors = {"x": torch.randn(m, k), "a": a, "b": b}
    wanted = [tensors[name].requires_grad_() for name in needed.split()]
    lora, dy = (a, b, 1.5), torch.randn(m, n)
    got = torch.autograd.grad(linear_4bit(tensors["x"], w, None, lora), wanted, dy)
    expected = torch.autograd.grad(float64(tensors["x"], w, None, lora), wanted, dy.double())
    for mine, theirs in zip(got, expected, strict=True):
        assert error(mine, theirs) <= 1e-5


@pytest.mark.parametrize("k", [64, 640])
def test_what_a_layer_that_trains_returns_may_be_changed_in_place(k):
    w, x, lora = packed_weight(33, k), torch.randn(5, k, requires_grad=True), (*adapter(33, k, 4), 1.5)
    for branch in (None, lora):
        (once,) = torch.autograd.grad(linear_4bit(x, w, None, branch).sum(), x)
        (twice,) = torch.autograd.grad(linear_4bit(x, w, None, branch).mul_(2).sum(), x)
        assert error(twice, 2 * once) <= 1e-5


def test_strides_are_followed():
    n, k = 40, 48
    w, (a, b) = packed_weight(n, k), adapter(n, k, 5)
    strided = Lora(a.t().contiguous().t(), b.t().contiguous().t(), 0.5)
    wide = torch.randn(20, 2 * k + 3)
    for x in (wide[:9, 1 : k + 1], wide[::2, :k], wide[:9, : 2 * k : 2], torch.randn(1, k).expand(6, k)):
        assert torch.equal(linear_4bit(x, w, None, strided), linear_4bit(x.contiguous(), w, None, (a, b, 0.5)))
    x = torch.randn(6, k, requires_grad=True)
    dy = torch.randn(n, 6).t()
    got = torch.autograd.grad(linear_4bit(x, w, None, strided), x, dy)[0]
    assert error(got, torch.autograd.grad(float64(x, w, None, strided), x, dy.double())[0]) <= 1e-5
    total = linear_4bit(x, w).sum()  # dy is one element expanded
    assert error(torch.autograd.grad(total, x)[0], torch.autograd.grad(float64(x, w).sum(), x)[0]) <= 1e-5


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_partial_sums_of_many_rows_are_in_memory_a_part_at_a_time(dropout, monkeypatch):
    monkeypatch.setattr(kernels, "_CHUNK", 32)
    monkeypatch.setattr(kernels, "_PARTIAL", 2 * 32 * 2 * 70)  # two chunks of rows, two blocks of columns
    shapes, empty = [], torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda t, size, **how: shapes.append(size) or empty(t, size, **how))
    check_gradients(torch.bfloat16, 150, 100, 96, 70, torch.bfloat16, None, 0.5, dropout)
    of_s = [(2, 64, 70), (2, 64, 70), (2, 22, 70)]
    assert [shape for shape in shapes if shape in of_s] == of_s * 2  # forward, and of the gradient


def test_rows_may_lie_further_apart_than_32_bits_count():
    w = packed_weight(16, 32)
    far = torch.empty(2**31 + 64, dtype=torch.bfloat16)[:].as_strided((2, 32), (2**31 + 16, 1))
    far.copy_(torch.randn(2, 32))
    assert torch.equal(linear_4bit(far, w), linear_4bit(far.contiguous(), w))


def test_no_rows():
    w, (a, b) = packed_weight(24, 64), adapter(24, 64, 4)
    x = torch.randn(0, 64, requires_grad=True)
    a.requires_grad_(), b.requires_grad_()
    y = linear_4bit(x, w, None, (a, b, 1.0))
    dx, da, db = torch.autograd.grad(y, (x, a, b), torch.randn(0, 24))
    assert y.shape == (0, 24) and dx.shape == (0, 64)
    assert da.shape == a.shape and db.shape == b.shape and not da.any() and not db.any()


def test_no_columns_leave_the_bias():
    w, a, b, bias = packed_weight(24, 0), torch.randn(4, 0), torch.randn(24, 4), torch.randn(24)
    for lora in (None, (a, b, 2.0)):
        assert torch.equal(linear_4bit(torch.randn(3, 0), w, bias, lora), bias.expand(3, 24))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_inf_stay_in_their_row_and_are_never_lost(dtype):
    m, n, k = 4, 33, 96
    w = packed_weight(n, k)
    lora = pick([None, (*adapter(n, k, 3), 1.0)])
    x = torch.randn(m, k).to(dtype)
    clean = linear_4bit(x, w, None, lora)
    for value in (math.nan, math.inf, -math.inf):
        dirty = x.clone()
        dirty[1, int(torch.randint(k, ()))] = value
        y = linear_4bit(dirty, w, None, lora)
        assert not y[1][~float64(dirty, w, None, lora)[1].isfinite()].isfinite().any()
        others = torch.arange(m) != 1
        assert torch.equal(y[others], clean[others])
    weight = torch.randn(n, k)
    weight[17, 40] = math.nan
    y = linear_4bit(x, fp.quantize_4bit(weight, "nf4", 32))
    assert y[:, 17].isnan().all() and y[:, torch.arange(n) != 17].isfinite().all()


def test_a_branch_that_half_precision_could_not_hold():
    """S and dS beyond 65504 on their way to results within."""
    n, k = 24, 64
    w = fp.quantize_4bit(torch.zeros(n, k))
    a, b = torch.full((4, k), 100.0), torch.full((n, 4), 1e-4)
    x = torch.full((3, k), 100.0, dtype=torch.float16)
    assert error(linear_4bit(x, w, None, (a, b, 1.0)), float64(x, w, None, (a, b, 1.0))) <= FORWARD[x.dtype]


def test_to_compilers_every_product_is_one_operator():
    n, k, m = 24, 64, 6
    w, bias = packed_weight(n, k), torch.randn(n, requires_grad=True)
    a, b = (t.requires_grad_() for t in adapter(n, k, 4))
    bank = BankView(*(t.detach()[None] for t in (a, b)), torch.tensor([2.0]), torch.arange(m) % 2 - 1)
    x, dy = torch.randn(m, k, requires_grad=True), torch.randn(m, n)
    for lora, leaves in (((a, b, 2.0), (x, a, b, bias)), (None, (x, bias)), (bank, ())):

        def layer(x, lora=lora):
            return torch.tanh(linear_4bit(x, w, bias, lora)) * 2

        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            assert torch.equal(compiled(x), layer(x))
        if leaves:
            expected = torch.autograd.grad(layer(x), leaves, dy)
            for mine, theirs in zip(torch.autograd.grad(compiled(x), leaves, dy), expected, strict=True):
                assert torch.equal(mine, theirs)


def test_opcheck_passes():
    w, (a, b) = packed_weight(24, 64, "nf4", True).rows(), adapter(24, 64, 4)
    x, dy, s, seed = torch.randn(5, 64), torch.randn(5, 24), torch.randn(5, 4), torch.tensor([12345])
    product, gradients, of_slots = (
        getattr(torch.ops.pyfastpeft, f"linear_4bit_triton{name}").default for name in ("", "_backward", "_slots")
    )
    for branch in ((None, None, None, 1.0, None, 0.0), (a, b, torch.rand(5, 4), 2.0, seed, 0.5)):
        torch.library.opcheck(product, (x, *w.operands, torch.randn(24), *branch))
    for needs in ((True, True, True), (True, False, False), (False, False, True)):
        torch.library.opcheck(gradients, (dy, x, s, *w.operands, 64, *branch, *needs))
    bank = torch.randn(2, 4, 64), torch.randn(2, 24, 4), torch.rand(2), torch.arange(5) - 2
    torch.library.opcheck(of_slots, (x, *w.operands, None, *bank))


def test_an_export_leaves_nothing_behind():
    """What is remembered between calls may hold no symbol of a tracer's."""
    layer = fp.nn.Linear4bit.from_linear(torch.nn.Linear(64, 24)).eval()
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    for remembered in (kernels.table_words, kernels.table_asm, kernels._table_on, triton_kernels._tables):
        remembered.cache_clear()
    with torch.no_grad():
        exported = torch.export.export(layer, (x,), strict=False)
        assert torch.equal(exported.module()(x), layer(x))
