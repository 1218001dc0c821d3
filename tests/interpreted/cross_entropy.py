"""``cross_entropy_`` by its Triton kernel in Triton's interpreter: the operator's own tests."""

from __future__ import annotations

import math

import pytest
import repair  # noqa: F401
import torch
from test_cross_entropy import (  # noqa: F401
    losses_and_gradient,
    test_autograd_learns_that_logits_have_changed,
    test_columns_may_not,
    test_labels_must_be_one_a_row,
    test_large_logits_and_large_differences,
    test_losses_and_gradients,
    test_rows_may_lie_apart,
    test_rows_may_not_overlap,
    test_what_is_not_finite_shows_in_its_row_alone,
)

from pyfastpeft.integrations import deferred_logits
from pyfastpeft.ops.triton_kernels import _kernels


@pytest.fixture
def device():
    """Of the operator's tests: no instruction set."""


@pytest.mark.parametrize("top", [0, 20, 36])
def test_the_maximum_may_lie_in_any_step_and_nothing_before_it(top, monkeypatch):
    monkeypatch.setattr(_kernels("cross_entropy"), "_COLUMNS", 16)
    logits = torch.full((2, 37), -math.inf)
    logits[:, top] = 7.0
    logits[1] = torch.randn(37)
    logits[1, top] = 30.0
    labels = torch.tensor([top, 3])
    losses, gradient = losses_and_gradient(logits, labels)
    expected = torch.nn.functional.cross_entropy(logits.double(), labels, reduction="none")
    torch.testing.assert_close(losses.double(), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(gradient[0], torch.zeros(37))


def test_loss_and_gradient_of_a_label_that_is_no_class_are_nan():
    losses, gradient = losses_and_gradient(torch.randn(3, 5), torch.tensor([5, 1, -1]))
    assert losses.isnan().tolist() == [True, False, True]
    assert gradient.isnan().all(1).tolist() == gradient.isnan().any(1).tolist() == [True, False, True]
    assert losses_and_gradient(torch.empty(2, 0), torch.tensor([0, 1]))[0].isnan().all()


def test_a_head_and_its_loss_a_chunk_at_a_time(monkeypatch):
    monkeypatch.setattr(deferred_logits, "_CHUNK_LOGITS", 50 * 7)
    monkeypatch.setattr(deferred_logits, "_CPU_ROWS", 1)
    hidden, head, labels = torch.randn(23, 16, requires_grad=True), torch.randn(50, 16), torch.randint(50, (23,))
    loss = deferred_logits.chunked_cross_entropy(hidden, labels, lambda h: h @ head.t(), 50)
    exact = torch.nn.functional.cross_entropy(hidden.double() @ head.double().t(), labels, reduction="sum")
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0)
    for mine, theirs in zip(torch.autograd.grad(loss, hidden), torch.autograd.grad(exact, hidden), strict=True):
        assert (mine - theirs).norm() <= 1e-6 * theirs.norm()
