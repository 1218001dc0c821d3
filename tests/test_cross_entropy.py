"""Cross-entropy and its gradient under every instruction set, against float64."""

import math

import pytest
import torch
from test_elementwise import same

from pyfastpeft.ops import cross_entropy_

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


def test_columns_may_not(device):
    with pytest.raises((RuntimeError, ValueError), match="logits must have contiguous columns"):
        cross_entropy_(torch.randn(50, 6).t(), torch.zeros(6).long())


def test_labels_are_checked():
    logits = torch.randn(2, 5)
    for labels in (torch.tensor([0, 5]), torch.tensor([-1, 0])):
        with pytest.raises(RuntimeError, match="must lie in"):
            losses_and_gradient(logits, labels)
    for labels in (torch.tensor([0]), torch.tensor([0.0, 1.0]), torch.tensor([[0, 1]])):
        with pytest.raises(RuntimeError, match="labels must be int64"):
            losses_and_gradient(logits, labels)


def test_the_operator_passes_opcheck():
    torch.library.opcheck(torch.ops.pyfastpeft.cross_entropy_.default, (torch.randn(3, 40), torch.tensor([1, 2, 39])))
