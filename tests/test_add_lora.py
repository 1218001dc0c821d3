"""The LoRA branch beside a full-precision product: against float64, both directions, under every instruction set."""

import math

import pytest
import torch
import torch.nn.functional as F
from test_linear_4bit import DTYPES, FORWARD, GRADIENT, adapter, error, pick

from pyfastpeft.ops import add_lora, backends
from pyfastpeft.ops.backends import Backend
from pyfastpeft.ops.reference import keep_mask

SHAPES = [(16, 32), (33, 95), (100, 64), (257, 161), (48, 1024), (129, 545), (7, 33), (1, 100), (24, 8), (5, 1)]


def float64(base, x, a, b, scaling, keep=None, dropout=0.0):
    dropped = x.double() if keep is None else x.double() * keep / (1 - dropout)
    return base.double() + dropped @ a.double().t() @ b.double().t() * scaling


def check(m, n, k, r, dtype, adapter_dtype=torch.float32, dropout=0.0):
    leaves = [torch.randn(m, n).to(dtype), torch.randn(m, k).to(dtype), *adapter(n, k, r, adapter_dtype)]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    dy = torch.randn(m, n).to(dtype)
    with torch.random.fork_rng():
        y = add_lora(*leaves, 2.0, dropout)
    keep = None
    if dropout:  # one seed a call is drawn from torch's generator
        keep = keep_mask(m, k, torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64), dropout)
    expected = float64(*leaves, 2.0, keep, dropout)
    squared = [leaf.detach().double().square().requires_grad_() for leaf in leaves]
    squares = float64(*squared, 4.0 / (1 - dropout), keep, dropout)
    what = f"M={m} N={n} K={k} R={r} {dtype} {adapter_dtype} dropout={dropout}"
    assert y.dtype == dtype
    assert error(y, expected, m * r, squares.detach()) <= FORWARD[dtype], what
    with torch.no_grad(), torch.random.fork_rng():
        if not dropout:
            assert torch.equal(add_lora(*leaves, 2.0), y), what
    got = torch.autograd.grad(y, leaves, dy)
    wanted = torch.autograd.grad(expected, leaves, dy.double())
    sizes = torch.autograd.grad(squares, squared, dy.double().square())
    assert torch.equal(got[0], dy)
    for name, leaf, mine, theirs, size in zip("xab", leaves[1:], got[1:], wanted[1:], sizes[1:], strict=True):
        assert mine.dtype == leaf.dtype
        limit = GRADIENT[dtype] if leaf.dtype == torch.float32 else max(GRADIENT[dtype], GRADIENT[torch.bfloat16])
        assert error(mine, theirs, m * r, size) <= limit, f"gradient of {name}, {what}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients_match_float64(isa, dtype):
    for m in (0, 1, 2, 3, 5, 8, 16, 17, 64, 65, 130):
        n, k = pick(SHAPES)
        check(m, n, k, pick([1, 2, 8, 16, 17, 40]), dtype, pick([torch.float32, torch.bfloat16]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropout_drops_the_same_elements_in_both_directions(isa, dtype):
    for m, n, k in ((1, 24, 8), (5, 33, 95), (70, 100, 64)):
        check(m, n, k, pick([4, 17]), dtype, dropout=pick([0.1, 0.5]))


def test_a_long_branch_and_many_rows(isa):
    check(600, 70, 2050, 300, torch.float32)


def test_what_is_not_contiguous_and_leading_dimensions(isa):
    a, b = adapter(24, 64, 4)
    wide_base, wide_x = torch.randn(6, 48), torch.randn(6, 128)
    for base, x in (
        (wide_base[:, ::2], wide_x[:, ::2]),
        (wide_base[:, :24], wide_x[:, 64:]),
        (torch.randn(24, 6).t(), torch.randn(64, 6).t()),
    ):
        assert error(add_lora(base, x, a, b, 0.5), float64(base, x, a, b, 0.5)) <= 1e-5
        strided = a.t().contiguous().t(), torch.randn(24, 8)[:, ::2]
        assert error(add_lora(base, x, *strided, 0.5), float64(base, x, *strided, 0.5)) <= 1e-5
    for lead in ((), (3,), (2, 3), (2, 0, 3)):
        assert add_lora(torch.randn(*lead, 0), torch.randn(*lead, 64), a, b[:0], 0.5).shape == (*lead, 0)
        base, x = torch.randn(*lead, 24), torch.randn(*lead, 64)
        y = add_lora(base, x, a, b, 0.5)
        assert y.shape == base.shape and error(y, float64(base, x, a, b, 0.5)) <= 1e-5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_stays_in_its_row(isa, dtype):
    a, b = adapter(24, 64, 4)
    for m in (3, 40):
        base, x = torch.randn(m, 24).to(dtype), torch.randn(m, 64).to(dtype)
        y = add_lora(base, x, a, b, 1.0)
        x[1, 63], base[2, 5] = math.nan, math.inf
        got = add_lora(base, x, a, b, 1.0)
        others = [row for row in range(m) if row not in (1, 2)]
        assert torch.equal(got[others], y[others]) and got[1].isnan().all()
        assert torch.equal(got[2, 6:], y[2, 6:]) and got[2, 5] == math.inf


def test_only_what_needs_a_gradient_gets_one(isa):
    leaves = [torch.randn(5, 24), torch.randn(5, 64), *adapter(24, 64, 4)]
    dy = torch.randn(5, 24)
    for needed in range(1, 16):
        wants = [bool(needed >> i & 1) for i in range(4)]
        mine = [leaf.clone().requires_grad_(wants[i]) for i, leaf in enumerate(leaves)]
        theirs = [leaf.clone().requires_grad_(wants[i]) for i, leaf in enumerate(leaves)]
        add_lora(*mine, 2.0).backward(dy)
        (theirs[0] + F.linear(F.linear(theirs[1], theirs[2]), theirs[3]) * 2.0).backward(dy)
        for got, expected, wanted in zip(mine, theirs, wants, strict=True):
            assert (got.grad is not None) is wanted
            assert not wanted or torch.allclose(got.grad, expected.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("frozen", [None, 2, 3], ids=["all", "A frozen", "B frozen"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_second_derivatives_match_float64(isa, dropout, frozen):
    leaves = [torch.randn(5, 33), torch.randn(5, 33), *adapter(33, 33, 4)]
    trained = [leaf.requires_grad_() for i, leaf in enumerate(leaves) if i != frozen]

    def seconds(y):
        first = torch.autograd.grad(y.pow(3).sum(), trained, create_graph=True)
        slope = torch.autograd.grad(y.sum(), trained[1:], create_graph=True)
        return torch.autograd.grad(sum(t.square().sum() for t in (*first, *slope)), trained)

    with torch.random.fork_rng():
        got = seconds(add_lora(*leaves, 2.0, dropout))
    seed = torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64)
    keep = keep_mask(5, 33, seed, dropout) if dropout else None
    for mine, theirs in zip(got, seconds(float64(*leaves, 2.0, keep, dropout)), strict=True):
        assert error(mine, theirs) <= 1e-5


class Other(torch.nn.Parameter):
    """As torchao's weights in 8 bits are: what it computes with need not be what lies in its memory."""


def test_plain_torch_serves_the_rest(monkeypatch):
    base, x, (a, b) = torch.randn(5, 24), torch.randn(5, 64), adapter(24, 64, 4)
    expected = float64(base, x, a, b, 2.0)
    called, linear = [], F.linear
    plain = lambda *args: called.append(args) or linear(*args)  # noqa: E731
    monkeypatch.setattr("pyfastpeft.ops.lora.F.linear", plain)
    assert error(add_lora(base, x, a, b, 2.0), expected) <= 1e-5 and not called
    doubles = [t.double() for t in (base, x, a, b)]
    assert torch.allclose(add_lora(*doubles, 2.0), expected) and len(called) == 2
    assert error(add_lora(base, x, a, b, torch.tensor(2.0)), expected) <= 1e-5 and len(called) == 4
    with torch.autocast("cpu", torch.bfloat16):
        assert error(add_lora(base, x, a, b, 2.0), expected) <= 2e-2 and len(called) == 6
    for factors in ((Other(a), b), (a, Other(b))):
        assert error(add_lora(base, x, *factors, 2.0), expected) <= 1e-5
    assert len(called) == 10
    monkeypatch.setattr(backends, "_FORCED", Backend.REFERENCE)
    assert error(add_lora(base, x, a, b, 2.0), expected) <= 1e-5 and len(called) == 12


def test_operands_that_do_not_fit_are_named():
    forward, backward = torch.ops.pyfastpeft.lora_forward, torch.ops.pyfastpeft.lora_backward
    base, x, (a, b) = torch.randn(5, 24), torch.randn(5, 64), adapter(24, 64, 4)
    for operands, words in (
        ((base[:4], x, a, b), "base must have the rows of x"),
        ((base.bfloat16(), x, a, b), "and its dtype"),
        ((base, x, a[:, :63], b), r"lora A must be \[R, K\]"),
        ((base, x, a, b[:23]), r"lora B \[N, R\]"),
        ((base, x, a[:0], b[:, :0]), "R and K at least 1"),
        ((base, x[:, :0], a[:, :0], b), "R and K at least 1"),
        ((base.double(), x, a, b), "must be float32, bfloat16 or float16"),
    ):
        with pytest.raises(RuntimeError, match=words):
            forward(*operands, 1.0, None, 0.0)
    with pytest.raises(RuntimeError, match="lora A must be"):
        backward(base, None, None, a, b[:23], 1.0, None, 0.0, True)


@pytest.mark.parametrize(
    "change, kind, message",
    [
        ({"base": None}, TypeError, "base is a NoneType; it must be a tensor"),
        ({"base": torch.ones(5, 1)}, ValueError, r"base has shape \(5, 1\); it must be \(5, 24\)"),
        ({"x": "x"}, TypeError, "x is a str; it must be a tensor"),
        ({"x": torch.ones(5, 63)}, ValueError, r"x has shape \(5, 63\); its last dimension must be K = 64"),
        ({"a": torch.ones(64)}, ValueError, r"a has shape \(64,\); it must be \[R, K\]"),
        ({"b": torch.ones(24)}, ValueError, r"b has shape \(24,\); it must be \[N, R\]"),
        ({"b": torch.ones(24, 5)}, ValueError, r"b has shape \(24, 5\); it must be \[N, R\].* as a is \(4, 64\)"),
        ({"scaling": "2"}, TypeError, "scaling is a str; it must be a number or a tensor"),
        (
            {"scaling": torch.ones(24)},
            ValueError,
            r"scaling has shape \(24,\); it must be a number or .* of one",
        ),
        ({"scaling": torch.ones(2, 5, 1)}, ValueError, r"scaling has shape \(2, 5, 1\)"),
        ({"dropout": 1.5}, ValueError, r"dropout is 1.5; it must lie in \[0, 1\)"),
    ],
)
def test_bad_arguments_are_named(change, kind, message):
    arguments = {"base": torch.ones(5, 24), "x": torch.ones(5, 64), "a": torch.ones(4, 64), "b": torch.ones(24, 4)}
    with pytest.raises(kind, match=message):
        add_lora(**(arguments | {"scaling": 2.0} | change))


def test_a_base_of_another_shape_is_named_where_torch_would_spread_it():
    for base in (torch.ones(1, 24), torch.ones(5, 1), torch.ones(24)):
        with pytest.raises(ValueError, match=r"base has shape .*; it must be \(5, 24\)"):
            add_lora(base, torch.ones(5, 64), torch.ones(4, 64), torch.ones(24, 4), torch.tensor(2.0))


def test_a_base_of_as_many_rows_in_another_shape_is_named():
    for scaling in (2.0, torch.tensor(2.0)):
        with pytest.raises(ValueError, match=r"base has shape \(2, 3, 24\); it must be \(3, 2, 24\)"):
            add_lora(torch.ones(2, 3, 24), torch.ones(3, 2, 64), torch.ones(4, 64), torch.ones(24, 4), scaling)


def test_a_scaling_that_is_a_tensor_takes_factors_of_different_dtypes():
    base, x, (a, b) = torch.randn(5, 24).bfloat16(), torch.randn(5, 64).bfloat16(), adapter(24, 64, 4)
    for factors in ((a, b.bfloat16()), (a.bfloat16(), b), (a.double(), b)):
        y = add_lora(base, x, *factors, torch.tensor([2.0]))
        assert y.dtype == torch.bfloat16 and error(y, float64(base, x, *factors, 2.0)) <= 1e-2


def test_operands_that_were_offloaded_are_named():
    base, x, a, b = torch.zeros(3, 8), torch.randn(3, 16), torch.empty(4, 16, device="meta"), torch.randn(8, 4)
    with pytest.raises(ValueError, match="a is on meta and b on cpu"):
        add_lora(base, x, a, b, 1.0)


def test_dropout_is_drawn_where_x_is_whatever_the_default_device():
    base, x, (a, b) = torch.zeros(5, 24), torch.randn(5, 64), adapter(24, 64, 4)
    with torch.device("meta"):
        assert add_lora(base, x, a, b, 2.0, 0.5).isfinite().all()
