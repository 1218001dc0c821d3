"""Rows taken by their numbers under every instruction set: against indexing in float64."""

import math

import pytest
import torch

from pyfastpeft.ops import take_rows

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(7, 3, 5), (1, 1), (4, 576), (260, 9, 64), (2, 3, 0), (0, 8), (5, 1, 1, 33)]


def taken(x, index):
    return torch.cat([x, x.new_zeros(1, *x.shape[1:])])[index]


def check(shape, places, dtype, sums_in=torch.float32):
    """Values to the bit, and gradients to one rounding of a sum in ``sums_in``."""
    x = torch.randn(shape).to(dtype).requires_grad_()
    index = torch.randint(-1, len(x), places)
    got, expected = take_rows(x, index), taken(x, index)
    assert torch.equal(got, expected) and got.dtype == dtype
    dy = torch.randn(expected.shape).to(dtype)
    (dx,) = torch.autograd.grad(got, x, dy)
    assert dx.shape == x.shape and dx.dtype == dtype
    exact = x.detach().double().requires_grad_()
    sums, sizes, counts = (
        torch.autograd.grad(taken(exact, index), exact, d.double())[0] for d in (dy, dy.abs(), torch.ones_like(dy))
    )
    rounded, summed = torch.finfo(dtype).eps * sums.abs(), torch.finfo(sums_in).eps / 2 * counts * sizes
    assert ((dx - sums).abs() <= rounded / 2 * 1.01 + summed).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_and_their_gradient(isa, shape, dtype):
    for places in ((8, 36), (3,), (0,), (2, 0), ()):
        check(shape, places, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_ones_are_copied_by_all_threads(isa, dtype):
    check((1500, 4099), (2300,), dtype)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_plain_torch_serves_where_there_are_no_kernels(plain_torch, monkeypatch, dtype):
    monkeypatch.setattr(torch.ops, "pyfastpeft", None)
    check((7, 3, 5), (4, 6), dtype, sums_in=dtype)


def test_float64_is_taken_by_torch():
    check((7, 3, 5), (4, 6), torch.float64, sums_in=torch.float64)


def test_strided_rows_give_the_contiguous_result(isa):
    index = torch.randint(-1, 9, (3, 4))
    wide = torch.randn(18, 80)
    for x in (wide[:9, 1:20], wide[::2], wide[:9, ::3], torch.randn(30, 9).t(), torch.randn(9, 1).expand(9, 8)):
        assert torch.equal(take_rows(x, index), taken(x, index))
    x = torch.randn(9, 4, requires_grad=True)
    for dy in (torch.randn(1).expand(3, 4, 4), torch.randn(4, 4, 3).transpose(0, 2)):
        got, expected = (torch.autograd.grad(take(x, index), x, dy)[0] for take in (take_rows, taken))
        torch.testing.assert_close(got, expected)
    assert torch.equal(take_rows(x, index.t()), taken(x, index.t()))


def test_nan_and_infinity_stay_in_their_rows(isa):
    x = torch.tensor([[1.0, math.nan], [math.inf, 2.0], [3.0, -math.inf]], requires_grad=True)
    index = torch.tensor([2, 0, -1, 2, 1])
    y = take_rows(x, index)
    assert torch.equal(y.nan_to_num(7), taken(x, index).nan_to_num(7)) and not y[2].any()
    dy = torch.tensor([[1.0, math.inf], [math.nan, 2.0], [math.nan, math.nan], [4.0, -math.inf], [5.0, 6.0]])
    (dx,) = torch.autograd.grad(y, x, dy)
    assert torch.equal(dx.nan_to_num(-9), torch.tensor([[math.nan, 2], [5, 6], [5, math.nan]]).nan_to_num(-9))


def test_the_gradient_has_a_gradient(isa):
    index = torch.randint(-1, 5, (4, 3))
    x = torch.randn(5, 6, requires_grad=True)

    def second(take):
        (dx,) = torch.autograd.grad(take(x, index).pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(dx.sin().sum(), x)[0]

    torch.testing.assert_close(second(take_rows), second(taken))


def test_rows_that_are_not_there_are_refused():
    x = torch.randn(3, 4)
    for wrong in (3, -2):
        with pytest.raises(RuntimeError, match=rf"index has {wrong}; each must lie in \[-1, 2\]"):
            take_rows(x, torch.tensor([0, wrong]))
        with pytest.raises(RuntimeError, match=rf"index has {wrong}; each must lie in \[-1, 2\]"):
            torch.ops.pyfastpeft.sum_rows(x, torch.tensor([0, wrong, 1]), 3)
    with pytest.raises(ValueError, match=r"index is torch.int32 on cpu; it must be int64, on x's device, cpu"):
        take_rows(x, torch.tensor([0, 1], dtype=torch.int32))
    with pytest.raises(ValueError, match=r"index is torch.int64 on meta; it must be int64, on x's device, cpu"):
        take_rows(x, torch.tensor([0, 1], device="meta"))
    with pytest.raises(ValueError, match=r"x has shape \(4,\); it must be \[N, ...\]"):
        take_rows(x[0], torch.tensor([0]))
    with pytest.raises(TypeError, match="x is a list; it must be a tensor"):
        take_rows([[0.0]], torch.tensor([0]))
    with pytest.raises(TypeError, match="index is a list; it must be a tensor"):
        take_rows(x, [0, 1])
    with pytest.raises(RuntimeError, match=r"index must be int64 \[3\]"):
        torch.ops.pyfastpeft.sum_rows(x, torch.tensor([0, 1]), 3)


@pytest.mark.parametrize("name", ["take_rows", "sum_rows"])
def test_opcheck_passes_for_every_operator(name):
    x, index = torch.randn(5, 7), torch.tensor([0, -1, 4, 4, 1])
    given = {"take_rows": (x, index[:3]), "sum_rows": (x, index, 6)}
    torch.library.opcheck(getattr(torch.ops.pyfastpeft, name).default, given[name])
