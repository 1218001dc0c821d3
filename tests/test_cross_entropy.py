"""Cross-entropy and its gradient under every instruction set, against float64."""

import itertools
import math

import pytest
import torch
from test_elementwise import same

from pyfastpeft.ops import cross_entropy_, head_cross_entropy

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def losses_and_gradient(logits, labels):
    gradient = logits.clone()
    return cross_entropy_(gradient, labels), gradient


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 64), (2, 1000), (0, 9), (4, 333), (70, 2051)], ids=str)
def test_losses_and_gradients(device, dtype, shape):
    logits = (torch.randn(shape) * 5).to(dtype)
    labels = torch.randint(0, shape[1], shape[:1])
    exact = logits.double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(exact, labels, reduction="none")
    expected.sum().backward()
    losses, gradient = losses_and_gradient(logits, labels)
    assert losses.dtype == torch.float32 and gradient.dtype == dtype
    torch.testing.assert_close(losses.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    rounding = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
    torch.testing.assert_close(gradient.double(), exact.grad, rtol=rounding, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_plain_torch_serves_where_there_is_no_kernel(plain_torch, monkeypatch, dtype):
    monkeypatch.setattr(torch.ops, "pyfastpeft", None)
    for shape in ((0, 9), (3, 7), (70, 2051)):  # rows of more than one part
        test_losses_and_gradients(torch.device("cpu"), dtype, shape)


def test_large_logits_and_large_differences(device):
    logits = torch.tensor([[1e4, -1e4, 9999.0], [-math.inf, 2.0, 2.0], [-300.0, -301.0, -500.0]])
    labels = torch.tensor([2, 1, 0])
    expected = torch.nn.functional.cross_entropy(logits.double(), labels, reduction="none")
    losses, gradient = losses_and_gradient(logits, labels)
    torch.testing.assert_close(losses.double(), expected, rtol=1e-6, atol=1e-6)
    assert gradient.isfinite().all() and gradient[1, 0] == 0


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("at", [0, 17, 36])
def test_what_is_not_finite_shows_in_its_row_alone(device, value, at):
    logits, labels = torch.randn(3, 37), torch.tensor([1, 2, 3])
    alone = [losses_and_gradient(logits[i : i + 1], labels[i : i + 1]) for i in (0, 2)]
    logits[1, at] = value
    losses, gradient = losses_and_gradient(logits, labels)
    assert losses[1].isnan() and gradient[1].isnan().any()
    for i, (loss, grad) in zip((0, 2), alone, strict=True):
        assert same(losses[i], loss[0]) and same(gradient[i], grad[0])


def test_rows_may_lie_apart(device):
    wide, labels = torch.randn(6, 2, 50), torch.randint(0, 50, (12,))[::2]
    before, expected = wide.clone(), losses_and_gradient(wide[:, 1].contiguous(), labels.contiguous())
    losses = cross_entropy_(wide[:, 1], labels)
    assert same(losses, expected[0]) and same(wide[:, 1], expected[1]) and same(wide[:, 0], before[:, 0])


def test_autograd_learns_that_logits_have_changed(device):
    logits = torch.randn(3, 7, requires_grad=True) * 2
    squares, labels = logits.square().sum(), torch.tensor([1, 2, 3])
    cross_entropy_(logits.detach(), labels)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squares.backward()


def test_columns_may_not(device):
    with pytest.raises((RuntimeError, ValueError), match="logits must have contiguous columns"):
        cross_entropy_(torch.randn(50, 6).t(), torch.zeros(6).long())


def test_rows_may_not_overlap(device):
    for logits in (torch.randn(1, 50).expand(6, 50), torch.randn(8, 50).as_strided((6, 50), (49, 1))):
        with pytest.raises((RuntimeError, ValueError), match=r"logits must have .* rows that do not overlap"):
            cross_entropy_(logits, torch.zeros(6).long())
    cross_entropy_(torch.randn(1, 50).expand(6, 50)[:1], torch.zeros(1).long())  # of one row there is no next


def test_labels_are_checked():
    logits = torch.randn(2, 5)
    for labels in (torch.tensor([0, 5]), torch.tensor([-1, 0])):
        with pytest.raises(RuntimeError, match="must lie in"):
            losses_and_gradient(logits, labels)


def test_labels_must_be_one_a_row(device):
    for labels in (torch.tensor([0]), torch.tensor([0, 1, 2]), torch.tensor([0.0, 1.0]), torch.tensor([[0, 1]])):
        with pytest.raises(ValueError, match=r"labels are torch.*; they must be int64 of shape \(2,\)"):
            losses_and_gradient(torch.randn(2, 5), labels)


def test_the_operator_passes_opcheck():
    for dtype in DTYPES:
        operands = torch.randn(3, 40).to(dtype), torch.tensor([1, 2, 39])
        torch.library.opcheck(torch.ops.pyfastpeft.cross_entropy_.default, operands)


# ---- of an output head -----------------------------------------------------------------------------------------------


def head64(hidden, weight, labels):
    exact = hidden.double().requires_grad_()
    losses = torch.nn.functional.cross_entropy(exact @ weight.double().t(), labels, reduction="none")
    return losses.detach(), torch.autograd.grad(losses.sum(), exact)[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (3, 5, 7), (0, 8, 9), (33, 40, 257), (70, 600, 515), (5, 64, 2048), (300, 33, 1001)], ids=str
)
def test_a_head_and_its_loss(isa, dtype, shape):
    n, width, classes = shape
    hidden, weight = torch.randn(n, width).to(dtype), (torch.randn(classes, width) * 3 / width**0.5).to(dtype)
    labels = torch.randint(0, classes, (n,))
    expected, gradient = head64(hidden, weight, labels)
    losses, d_hidden = head_cross_entropy(hidden, weight, labels, True)
    assert losses.dtype == torch.float32 and d_hidden.dtype == dtype
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 1e-2}[dtype]
    torch.testing.assert_close(losses.double(), expected, rtol=tolerance, atol=tolerance)
    assert (d_hidden - gradient).norm() <= tolerance / 3 * gradient.norm() + 1e-12
    alone, nothing = head_cross_entropy(hidden, weight, labels, False)
    assert same(alone, losses) and nothing.shape == (0, width)


def test_a_heads_logits_come_a_chunk_of_rows_at_a_time(isa):
    hidden, weight, labels = torch.randn(200, 48), torch.randn(70001, 48) / 4, torch.randint(0, 70001, (200,))
    losses, d_hidden = head_cross_entropy(hidden, weight, labels, True)
    expected, gradient = head64(hidden, weight, labels)
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-5)
    assert (d_hidden - gradient).norm() <= 5e-6 * gradient.norm()


def test_a_heads_operands_may_be_parts_of_wider_ones(isa):
    hidden, weight, labels = torch.randn(9, 50)[:, :33], torch.randn(40, 60)[::2, 5:38], torch.randint(0, 20, (9,))
    expected = head_cross_entropy(hidden.contiguous(), weight.contiguous(), labels, True)
    assert all(map(same, head_cross_entropy(hidden, weight, labels, True), expected))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_of_a_head_what_is_not_finite_shows_in_its_row_alone(isa, value):
    hidden, weight, labels = torch.randn(70, 40).bfloat16(), torch.randn(333, 40).bfloat16(), torch.arange(70)
    expected = head_cross_entropy(hidden, weight, labels, True)
    hidden[33, 7] = value
    losses, d_hidden = head_cross_entropy(hidden, weight, labels, True)
    others = torch.arange(70) != 33
    assert losses[33].isnan() and d_hidden[33].isnan().any()
    assert same(losses[others], expected[0][others]) and same(d_hidden[others], expected[1][others])


def test_a_heads_operands_are_checked():
    hidden, weight, labels = torch.randn(3, 8), torch.randn(5, 8), torch.tensor([0, 1, 4])
    for operands, words in (
        ((hidden[:, :7], weight, labels), r"weight must be \[classes, 7\]"),
        ((hidden.bfloat16(), weight, labels), "in the dtype of hidden"),
        ((hidden, weight, labels + 1), r"label 5 must lie in \[0, 5\)"),
        ((hidden, weight, labels[:2]), r"labels must be int64 \[3\]"),
    ):
        with pytest.raises(RuntimeError, match=words):
            head_cross_entropy(*operands, True)


def test_what_is_no_tensor_or_no_matrix_is_named():
    hidden, weight, labels = torch.randn(3, 8), torch.randn(5, 8), torch.tensor([0, 1, 4])
    for call, kind, words in (
        (lambda: cross_entropy_(None, labels), TypeError, "logits is a NoneType; it must be a tensor"),
        (lambda: cross_entropy_(hidden, [0, 1, 4]), TypeError, "labels is a list; it must be a tensor"),
        (lambda: cross_entropy_(hidden[0], labels), ValueError, r"logits has shape \(8,\); it must be \[n, classes\]"),
        (lambda: head_cross_entropy(hidden[0], weight, labels, True), ValueError, r"hidden has shape \(8,\)"),
        (lambda: head_cross_entropy(hidden, weight[0], labels, True), ValueError, r"must be \[classes, H\]"),
        (lambda: head_cross_entropy(hidden, None, labels, True), TypeError, "weight is a NoneType"),
        (lambda: head_cross_entropy(hidden, weight, None, True), TypeError, "labels is a NoneType"),
    ):
        with pytest.raises(kind, match=words):
            call()


def test_the_heads_operator_passes_opcheck():
    for dtype, differentiates in itertools.product(DTYPES, (True, False)):
        operands = torch.randn(3, 8).to(dtype), torch.randn(40, 8).to(dtype), torch.tensor([1, 2, 39])
        torch.library.opcheck(torch.ops.pyfastpeft.head_cross_entropy.default, (*operands, differentiates))


def test_what_was_offloaded_is_named():
    with pytest.raises(ValueError, match="weight is on meta; it must be where hidden is, on cpu"):
        head_cross_entropy(torch.ones(2, 8), torch.ones(5, 8, device="meta"), torch.tensor([0, 1]), True)
    nowhere = torch.zeros(2, dtype=torch.int64, device="meta")
    with pytest.raises(ValueError, match="labels are on meta; they must be where hidden is, on cpu"):
        head_cross_entropy(torch.ones(2, 8), torch.ones(5, 8), nowhere, True)
    with pytest.raises(ValueError, match="labels are on meta; they must be where logits are, on cpu"):
        cross_entropy_(torch.ones(2, 8), nowhere)
