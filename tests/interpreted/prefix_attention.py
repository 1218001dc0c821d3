"""``prefix_attention`` by its Triton kernels in Triton's interpreter: see test_triton_interpreted.py."""

from __future__ import annotations

import math

import pytest
import repair  # noqa: F401
import torch
from test_prefix_attention import (  # noqa: F401
    DTYPES,
    check,
    check_not_finite,
    make,
    test_a_window_wider_than_all_keys_hides_none,
    test_keys_far_before_or_behind_the_queries_are_as_others,
    test_large_scores,
)

from pyfastpeft.ops import key_positions, prefix_attention
from pyfastpeft.ops.backends import Backend, choose_attention
from pyfastpeft.ops.triton_kernels import _kernels

kernels = _kernels("prefix_attention")


@pytest.fixture
def device():
    """Of the operator's tests: no instruction set."""


def test_the_kernels_serve_here():
    assert choose_attention(torch.empty(1, 1, 1, 64)) is Backend.TRITON


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_result_and_gradients(dtype, causal):
    """Less than a tile; several of rows and of keys, with tails; head sizes that are padded."""
    for heads, kv_heads, tokens, keys, dim in [
        (1, 1, 1, 1, 32), (6, 2, 50, 75, 40), (2, 1, 70, 70, 64), (2, 2, 9, 21, 256), (3, 3, 5, 6, 1)
    ]:  # fmt: skip
        check(make(1, heads, kv_heads, tokens, keys, dim, dtype=dtype), causal=causal)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_prefix_that_the_batch_shares(dtype):
    for tokens, prefix, dim in [(3, 5, 64), (70, 40, 32), (2, 0, 16)]:
        tensors = make(2, 2, 1, tokens, None, dim, prefix=prefix, dtype=dtype)
        check(tensors)
        check(tensors, causal=False, prefix_lengths=torch.tensor([prefix // 2]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_prefix_chosen_by_row_and_of_its_own_length(dtype):
    tensors = make(5, 4, 2, 6, None, 32, prefix=40, slots=3, dtype=dtype)
    index = torch.tensor([2, -1, 0, 0, 1])
    check(tensors, prefix_index=index)
    check(tensors, prefix_index=index, prefix_lengths=torch.tensor([40, 0, 11]))
    check(tensors, prefix_index=torch.full((5,), -1))
    none = make(5, 4, 2, 6, None, 32, prefix=40, slots=0, dtype=dtype)
    check(none, prefix_index=torch.full((5,), -1), prefix_lengths=torch.empty(0, dtype=torch.int64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_padding_holes_and_windows(dtype, causal):
    tokens, keys = 40, 80
    place = torch.arange(keys)
    nothing = torch.zeros(keys, dtype=torch.bool)
    mask = torch.stack([place >= 70, place < 30, torch.rand(keys) < 0.7, nothing])
    for prefix, window in [(None, None), (10, None), (None, 9), (10, 9), (70, 100)]:
        tensors = make(4, 2, 1, tokens, keys, 32, prefix=prefix, dtype=dtype)
        check(tensors, causal=causal, window=window, mask=mask)
        if window is not None:
            check([t[:1] if t.dim() == 4 else t for t in tensors], causal=causal, window=window)


def test_a_query_that_sees_nothing_gets_zeros_and_no_gradient():
    q, k, v = (t.requires_grad_() for t in make(1, 2, 1, 6, None, 32))
    out = prefix_attention(q, k, v, mask=torch.tensor([[0, 0, 0, 1, 1, 1]]))
    assert (out[:, :, :3] == 0).all() and (out[:, :, 3:] != 0).all()
    out.sum().backward()
    for t in (q, k, v):
        assert (t.grad[:, :, :3] == 0).all() and t.grad.isfinite().all()


def test_keys_of_a_static_cache():
    q, k, v, pk, pv = make(2, 2, 1, 3, 1100, 32, prefix=5)
    k[:, :, 17:] = 100.0
    mask = (torch.arange(1100) < 17).expand(2, -1).clone()
    mask[1, :6] = False
    check([q, k, v, pk, pv], mask=key_positions(mask, 14))
    check([q, k, v, pk, pv], gradients=False, mask=key_positions(torch.ones(2, 1100), 14))
    check([q, k, v, pk, pv], gradients=False, mask=key_positions(mask, 14), window=8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decoding_with_keys_in_parts(dtype):
    """Few queries: the keys are split, and a prefix that the batch shares is read once."""
    for batch, tokens, prefix, keys in [(1, 1, 300, 600), (3, 2, 530, 40), (5, 1, 30, 0), (2, 1, 40, 520)]:
        shared = make(batch, 4, 2, tokens, keys, 32, prefix=prefix, dtype=dtype)
        check(shared, gradients=False, causal=keys >= tokens)
        check(shared, gradients=False, causal=False, prefix_lengths=torch.tensor([prefix // 2]))
    slots = make(3, 4, 2, 1, 300, 32, prefix=300, slots=2, dtype=dtype)
    mask = key_positions(torch.rand(3, 300) < 0.7, 290)
    how = {"prefix_index": torch.tensor([1, -1, 0]), "prefix_lengths": torch.tensor([300, 20]), "mask": mask}
    check(slots, gradients=False, **how)
    check(slots, gradients=False, window=400, **how)
    # Parts that see the prefix alone, beside keys that have places.
    tensors = make(2, 4, 2, 1, 300, 32, prefix=600, slots=2, dtype=dtype)
    check(tensors, gradients=False, prefix_index=torch.tensor([1, 0]), mask=key_positions(torch.ones(2, 300), 299))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_strides(dtype):
    q = torch.randn(2, 9, 2, 32).to(dtype).transpose(1, 2)
    k = torch.randn(2, 9, 1, 32).to(dtype).transpose(1, 2)
    v = torch.randn(2, 1, 32, 9).to(dtype).transpose(2, 3)
    prefix = torch.randn(2, 1, 32, 2, 5).to(dtype).unbind(3)
    check([q, k, v, *(p[0].transpose(1, 2) for p in prefix)])
    check([q[:, :, ::2], k[:, :, 1::2].expand(2, 2, -1, -1), v[:, :, 1:5].expand(2, 2, -1, -1)], causal=False)


def test_what_chooses_keys_may_have_any_strides():
    def strided(t, other):
        return torch.stack([t, torch.full_like(t, other)], -1)[..., 0]

    tensors = make(3, 4, 2, 6, None, 32, prefix=40, slots=2)
    chosen = {
        "prefix_index": torch.tensor([1, -1, 0]),
        "prefix_lengths": torch.tensor([40, 20]),
        "mask": key_positions(torch.rand(3, 6) < 0.7, 6),
    }
    expected = prefix_attention(*tensors, **chosen)
    for name, other in (("prefix_index", 0), ("prefix_lengths", 3), ("mask", 0)):
        assert torch.equal(prefix_attention(*tensors, **chosen | {name: strided(chosen[name], other)}), expected)


@pytest.mark.parametrize("shape", [(0, 2, 1, 4, 4), (2, 2, 1, 0, 5), (2, 2, 1, 0, 0)], ids=str)
def test_nothing_in_nothing_out(shape):
    for prefix in (None, 3):
        check(make(*shape, 32, prefix=prefix))


def test_without_keys_the_prefix_is_all_there_is():
    check(make(2, 2, 1, 5, 0, 32, prefix=4), causal=False)
    check(make(2, 2, 1, 5, 0, 32), causal=False)


def test_scale():
    for scale in (0.01, 3.0, 0.0, -0.5):
        check(make(1, 2, 2, 5, None, 32), scale=scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_infinity_reach_those_that_see_them(dtype, value):
    check_not_finite(dtype, value)


def test_a_number_that_is_no_prefix_is_none():
    tensors = make(3, 2, 1, 4, None, 32, prefix=6, slots=2)
    index = torch.tensor([0, 7, -1])
    got = prefix_attention(*tensors, prefix_index=index)
    assert torch.equal(got, prefix_attention(*tensors, prefix_index=index.where(index < 2, -1)))


def test_keys_may_lie_further_apart_than_32_bits_count():
    q, k, v = make(1, 2, 2, 3, None, 32, dtype=torch.bfloat16)
    far = torch.empty(2**31 + 256, dtype=torch.bfloat16)
    far = far.as_strided((1, 2, 3, 32), (2**31, 2**31, 64, 1))
    far.copy_(k)
    assert torch.equal(prefix_attention(q, far, v), prefix_attention(q, k, v))


def test_to_torch_compile_it_is_one_node():
    layer = torch.compile(lambda *t: prefix_attention(*t).square(), fullgraph=True, backend="aot_eager")
    tensors = [t.requires_grad_() for t in make(2, 2, 1, 5, None, 32, prefix=3)]
    expected, got = prefix_attention(*tensors).square(), layer(*tensors)
    assert torch.equal(got, expected)
    gradients = (torch.autograd.grad(out.sum(), tensors) for out in (got, expected))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    options = (None, None, None, True, 0.2, 0)
    torch.library.opcheck(torch.ops.pyfastpeft.prefix_attention.default, (*tensors[:3], None, None, *options, True))


def test_the_same_bits_every_time():
    tensors = [t.requires_grad_() for t in make(2, 3, 1, 2, 600, 32, prefix=300)]
    runs = []
    for _ in range(2):
        out = prefix_attention(*tensors)
        runs.append([out, *torch.autograd.grad(out.square().sum(), tensors)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
