"""prefix_attention under every instruction set and on a GPU, against its definition in float64, row by row."""

import math
import subprocess
import sys

import pytest
import torch

from pyfastpeft.ops import HIDDEN, backends, key_positions, prefix_attention

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Relative Frobenius error.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 1e-3}
ONE_ISA = pytest.mark.parametrize("device", [torch.ops.pyfastpeft.isa(), "cuda"], indirect=True)


def exact(q, k, v, prefix_k=None, prefix_v=None, causal=True, scale=None, mask=None, prefix_index=None,
          window=None, prefix_lengths=None):  # fmt: skip
    """The definition: one row of the batch at a time, keys side by side, a place for each."""
    q, k, v = q.double(), k.double(), v.double()
    batch, heads, tokens, dim = q.shape
    keys, group = k.shape[2], heads // k.shape[1]
    t = torch.arange(tokens)
    rows = []
    for b in range(batch):
        places = torch.arange(keys) - (keys - tokens)
        hidden = torch.zeros(keys, dtype=torch.bool)
        if mask is not None and mask.dim() == 4:
            places = mask[b, 0, 0].long()
            hidden = places >= HIDDEN // 2
        elif mask is not None:
            hidden = mask[b] == 0
        seen = ~hidden[None].expand(tokens, keys)
        if causal:
            seen = seen & (places[None] <= t[:, None])
        row_k, row_v = k[b], v[b]
        slot = -1 if prefix_k is None else 0 if prefix_index is None else int(prefix_index[b])
        if slot >= 0:
            own_k, own_v = (p if p.dim() == 3 else p[slot] for p in (prefix_k, prefix_v))
            length = own_k.shape[1] if prefix_lengths is None else int(prefix_lengths[slot])
            first = next((int(p) for p, h in zip(places, hidden, strict=True) if not h), 0)
            places = torch.cat((torch.arange(first - length, first), places))
            seen = torch.cat((torch.ones(tokens, length, dtype=torch.bool), seen), 1)
            row_k = torch.cat((own_k[:, :length].to(k.dtype), row_k), 1)
            row_v = torch.cat((own_v[:, :length].to(v.dtype), row_v), 1)
        if window is not None:
            seen = seen & (places[None] > t[:, None] - window)
        row_k, row_v = (x.repeat_interleave(group, 0) for x in (row_k, row_v))
        scores = q[b] @ row_k.transpose(1, 2) * (dim**-0.5 if scale is None else scale)
        blind = ~seen.any(1)[:, None]
        weights = scores.masked_fill(~(seen | blind), -math.inf)
        weights = torch.softmax(weights, -1) if weights.shape[-1] else weights
        rows.append(weights.masked_fill(blind, 0) @ row_v)
    return torch.stack(rows) if rows else q * 1


def error(got, expected, least=1e-30):
    """Relative to what is expected, at least to elements of size ``least``."""
    assert got.shape == expected.shape
    if expected.numel() == 0:
        return 0.0
    size = expected.detach().norm().clamp(min=max(least, 1e-30) * math.sqrt(expected.numel()))
    return float((got.detach().double() - expected.detach()).norm() / size)


def together(tensors):
    return torch.cat([t.flatten() for t in tensors])


def make(batch=2, heads=4, kv_heads=2, tokens=7, keys=None, dim=32, prefix=None, slots=None, dtype=torch.float32):
    """q, k, v, and with ``prefix`` a pair of prefixes, of ``slots`` or shared."""
    keys = tokens if keys is None else keys
    shapes = [(batch, heads, tokens, dim), (batch, kv_heads, keys, dim), (batch, kv_heads, keys, dim)]
    if prefix is not None:
        shapes += [(kv_heads, prefix, dim) if slots is None else (slots, kv_heads, prefix, dim)] * 2
    return [torch.randn(shape).to(dtype) for shape in shapes]


def check(tensors, gradients=True, **how):
    """The result, and the gradients of all of ``tensors``, against the definition."""
    dtype = tensors[0].dtype
    ours = [t.detach().requires_grad_() for t in tensors]
    theirs = [t.detach().double().requires_grad_() for t in tensors]
    got, expected = prefix_attention(*ours, **how), exact(*theirs, **how)
    assert got.dtype == dtype and got.transpose(1, 2).is_contiguous()
    assert error(got, expected) <= TOLERANCE[dtype]
    with torch.no_grad():
        assert error(prefix_attention(*ours, **how), expected) <= TOLERANCE[dtype]
    if gradients:
        into = torch.randn(expected.shape).to(dtype)
        mine = torch.autograd.grad(got, ours, into)
        right = torch.autograd.grad(expected, theirs, into.double(), allow_unused=True, materialize_grads=True)
        assert error(together(mine), together(right)) <= 2 * TOLERANCE[dtype]
        # Some are differences that vanish, as that of the queries where one key has all the weight.
        least = 0.1 * max((float(e.square().mean().sqrt()) for e in right if e.numel()), default=0.0)
        for g, e, t in zip(mine, right, tensors, strict=True):
            assert g.dtype == t.dtype
            assert error(g, e, least) <= (1e-4 if dtype == torch.float32 else 0.1)
    return got


def check_not_finite(dtype, value):
    """Of q, k or v, an element that is not finite reaches the tokens that see it, and no others."""
    for which in range(3):
        tensors = make(1, 2, 1, 50, None, 64, dtype=dtype)
        tensors[which][0, 0, 20, 3] = value
        got, expected = prefix_attention(*tensors)[0, 0], exact(*tensors)[0, 0]
        assert torch.equal(got[20:].isfinite(), expected[20:].isfinite())
        assert torch.equal(got[20:].isnan(), expected[20:].isnan())
        if which < 2:  # a value is multiplied with the weights of its neighbourhood, zeros among them
            assert got[:20].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_result_and_gradients(device, dtype, causal):
    for heads, kv_heads, tokens, keys, dim in [
        (1, 1, 1, 1, 32), (4, 2, 7, 7, 64), (3, 1, 33, 40, 64), (9, 3, 70, 70, 64), (2, 2, 130, 131, 80),
        (6, 2, 5, 300, 96), (4, 1, 19, 19, 128), (2, 2, 9, 21, 256), (2, 1, 11, 11, 33), (5, 5, 17, 17, 1),
        (2, 2, 40, 40, 7),
    ]:  # fmt: skip
        check(make(2, heads, kv_heads, tokens, keys, dim, dtype=dtype), causal=causal)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_prefix_that_the_batch_shares(device, dtype):
    for prefix, tokens, dim in [(1, 5, 64), (20, 33, 64), (100, 128, 32), (0, 4, 32), (7, 1, 48)]:
        for causal in (True, False):
            tensors = make(3, 6, 2, tokens, None, dim, prefix=prefix, dtype=dtype)
            check(tensors, causal=causal)
            check(tensors, causal=causal, prefix_lengths=torch.tensor([prefix // 2]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_prefix_chosen_by_row_and_of_its_own_length(device, dtype):
    tensors = make(5, 4, 2, 20, None, 64, prefix=30, slots=3, dtype=dtype)
    index = torch.tensor([2, -1, 0, 0, 1])
    check(tensors, prefix_index=index)
    check(tensors, prefix_index=index, prefix_lengths=torch.tensor([30, 0, 11]))
    check(tensors, prefix_index=torch.full((5,), -1))


def test_rows_with_other_prefixes_equal_each_alone(device):
    q, k, v, pk, pv = make(4, 4, 2, 12, None, 64, prefix=9, slots=2)
    index, lengths = torch.tensor([1, -1, 0, 1]), torch.tensor([9, 4])
    together = prefix_attention(q, k, v, pk, pv, prefix_index=index, prefix_lengths=lengths)
    for b, slot in enumerate(index.tolist()):
        own = () if slot < 0 else (pk[slot, :, : lengths[slot]], pv[slot, :, : lengths[slot]])
        alone = prefix_attention(q[b : b + 1], k[b : b + 1], v[b : b + 1], *own)
        assert error(together[b : b + 1], alone.double()) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_padding_and_holes(device, dtype, causal):
    tokens = 45
    place = torch.arange(tokens)
    left, right = place >= 13, place < 30
    holes = torch.rand(tokens) < 0.7
    nothing = torch.zeros(tokens, dtype=torch.bool)
    mask = torch.stack([left, right, holes, nothing, ~nothing])
    for prefix in (None, 10):
        tensors = make(5, 4, 2, tokens, None, 64, prefix=prefix, dtype=dtype)
        expected = check(tensors, causal=causal, mask=mask)
        tensors = [t.requires_grad_() for t in tensors]
        assert torch.equal(prefix_attention(*tensors, causal=causal, mask=mask.long()), expected)
        assert torch.equal(prefix_attention(*tensors, causal=causal, mask=key_positions(mask, 0)), expected)


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize(("causal", "window"), [(False, None), (True, None), (False, 3), (True, 3)])
def test_keys_far_before_or_behind_the_queries_are_as_others(device, tokens, causal, window):
    far = HIDDEN // 2 - 64
    for places in ([-far, 0, HIDDEN // 4, far, HIDDEN // 2], [HIDDEN // 4] * 300, [-far] * 300):
        mask = torch.tensor(places, dtype=torch.int32).view(1, 1, 1, -1)
        check(make(1, 8, 1, tokens, len(places), 32), causal=causal, window=window, mask=mask)


def test_a_query_that_sees_nothing_gets_zeros_and_no_gradient(device):
    q, k, v = (t.requires_grad_() for t in make(1, 2, 1, 6, None, 32))
    mask = torch.tensor([[0, 0, 0, 1, 1, 1]])
    out = prefix_attention(q, k, v, mask=mask)
    assert (out[:, :, :3] == 0).all() and (out[:, :, 3:] != 0).all()
    out.sum().backward()
    for t, dead in ((q, 3), (k, 3), (v, 3)):
        assert (t.grad[:, :, :dead] == 0).all() and t.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_sliding_window_and_a_prefix_that_slides_out_of_it(device, dtype):
    for tokens, keys, window, prefix in [
        (50, 50, 8, None),
        (50, 50, 8, 5),
        (33, 90, 40, 12),
        (20, 20, 64, 10),
        (9, 9, 1, 3),
    ]:
        tensors = make(2, 4, 2, tokens, keys, 64, prefix=prefix, dtype=dtype)
        for causal in (True, False):
            check(tensors, causal=causal, window=window)
            mask = torch.stack([torch.arange(keys) >= 4, torch.arange(keys) < keys - 2])
            check(tensors, causal=causal, window=window, mask=mask)


def test_a_window_wider_than_all_keys_hides_none(device):
    for tokens, keys in ((8, 2), (3, 40), (40, 40), (40, 3)):
        q, k, v, pk, pv = make(2, 2, 1, tokens, keys, 32, prefix=4)
        for causal in {False, keys >= tokens}:
            for mask in (None, torch.rand(2, keys) > 0.2):
                expected = prefix_attention(q, k, v, pk, pv, causal, mask=mask)
                for window in (2**31, 2**63 - 1):
                    got = prefix_attention(q, k, v, pk, pv, causal, mask=mask, window=window)
                    assert error(got, expected.double()) <= 1e-6


def test_a_window_over_a_prefix_is_that_over_as_many_tokens(device):
    q, k, v, pk, pv = make(2, 2, 2, 30, None, 32, prefix=6)
    joined = [torch.cat((p.expand(2, -1, -1, -1), t), 2) for p, t in ((pk, k), (pv, v))]
    got = prefix_attention(q, k, v, pk, pv, window=9)
    assert error(got, prefix_attention(q, *joined, window=9).double()) <= 1e-6


def test_keys_of_a_static_cache(device):
    """Slots beyond those written hold anything; the mask hides them, or their place is after every query."""
    q, k, v, pk, pv = make(2, 4, 2, 3, 40, 64, prefix=5)
    written = torch.tensor([17, 17])
    k[:, :, 17:] = 100.0
    mask = torch.arange(40)[None] < written[:, None]
    mask[1, :6] = False
    positions = key_positions(mask, 14)
    got = check([q, k, v, pk, pv], mask=positions)
    short = prefix_attention(q, k[:, :, :17], v[:, :, :17], pk, pv, mask=mask[:, :17])
    assert error(got, short.double()) <= 1e-6
    check([q, k, v, pk, pv], mask=key_positions(torch.ones(2, 40), 14))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decoding_behind_prefixes(device, dtype):
    """Few queries, over a cache: kernels of their own."""
    for batch, tokens, prefix, dim in [
        (1, 1, 7, 64),
        (1, 2, 130, 64),
        (3, 1, 128, 40),
        (9, 1, 20, 64),
        (4, 2, 300, 32),
    ]:
        keys = 21
        mask = torch.rand(batch, keys) < 0.7
        mask[:, -tokens:] = True
        shared = make(batch, 6, 2, tokens, keys, dim, prefix=prefix, dtype=dtype)
        slots = make(batch, 6, 2, tokens, keys, dim, prefix=prefix, slots=3, dtype=dtype)
        index, lengths = torch.randint(-1, 3, (batch,)), torch.tensor([prefix, 0, prefix // 2])
        positions = key_positions(torch.arange(keys).expand(batch, -1) < 15, 15 - tokens)
        for how in ({}, {"mask": mask}, {"mask": positions}, {"causal": False}, {"window": 10}):
            check(shared[:3], gradients=False, **how)
            check(shared, gradients=False, **how)
            for length in (prefix // 2, 0):
                check(shared, gradients=False, prefix_lengths=torch.tensor([length]), **how)
            check(slots, gradients=False, prefix_index=index, prefix_lengths=lengths, **how)


def test_left_padded_rows_equal_unpadded_ones(device):
    q, k, v, pk, pv = make(1, 4, 2, 21, None, 64, prefix=8)
    for window in (None, 11):
        alone = prefix_attention(q, k, v, pk, pv, window=window)
        padded = [torch.cat((torch.randn(1, t.shape[1], 10, 64), t), 2) for t in (q, k, v)]
        mask = torch.arange(31)[None] >= 10
        got = prefix_attention(*padded, pk, pv, mask=mask, window=window)[:, :, 10:]
        assert error(got, alone.double()) <= 1e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_strides(device, dtype):
    q = torch.randn(2, 19, 6, 64).to(dtype).transpose(1, 2)
    k = torch.randn(2, 19, 2, 64).to(dtype).transpose(1, 2)
    v = torch.randn(2, 2, 64, 19).to(dtype).transpose(2, 3)
    prefix = torch.randn(2, 2, 64, 2, 5).to(dtype).unbind(3)
    check([q, k, v, *(p[0].transpose(1, 2) for p in prefix)])
    check([q[:, :, ::2], k[:, :, 1::2][:, :, :10].expand(2, 2, -1, -1), v[:, :, 1:10]], causal=False)


@ONE_ISA
def test_a_prefix_of_another_dtype_is_used_in_that_of_q(device):
    q, k, v, pk, pv = make(3, 4, 2, 10, None, 64, prefix=6, dtype=torch.bfloat16)
    wide = [p.float().requires_grad_() for p in (pk, pv)]
    q.requires_grad_()
    out = prefix_attention(q, k, v, *wide)
    assert torch.equal(out, prefix_attention(q, k, v, pk, pv))
    into = torch.randn(out.shape)
    out.backward(into.bfloat16())
    theirs = [p.double().requires_grad_() for p in (pk, pv)]
    right = torch.autograd.grad(exact(q, k, v, *theirs), theirs, into.bfloat16().double())
    for mine, e in zip(wide, right, strict=True):
        assert mine.grad.dtype == torch.float32 and error(mine.grad, e) <= 1e-2


@pytest.mark.parametrize("shape", [(0, 2, 1, 4, 4), (2, 2, 1, 0, 5), (2, 2, 1, 0, 0)])
def test_nothing_in_nothing_out(device, shape):
    for prefix in (None, 3):
        check(make(*shape, 32, prefix=prefix))


@pytest.mark.parametrize("kernels", [True, False])
def test_without_keys_the_prefix_is_all_there_is(device, monkeypatch, kernels):
    if not kernels:
        monkeypatch.setattr(backends, "_FORCED", backends.Backend.REFERENCE)
    for window in (None, 3):
        check(make(2, 2, 1, 5, 0, 32, prefix=4), causal=False, window=window)
    check(make(2, 2, 1, 5, 0, 32), causal=False)
    positions = torch.zeros(2, 1, 1, 0, dtype=torch.int32)
    for tokens in (1, 4, 5, 40):
        for window in (None, 3):
            check(make(2, 2, 1, tokens, 0, 32, prefix=4), mask=positions, window=window)
        check(make(2, 2, 1, tokens, 0, 32), mask=positions)


def test_scale(device):
    for scale in (0.01, 1.0, 3.0, 0.0, -0.5):
        check(make(1, 2, 2, 20, None, 64), scale=scale)


def test_large_scores(device):
    q, k, v = make(8, 4, 2, 80, None, 64)  # so many rows that the few whose keys nearly tie do not make the error
    check([q * 30, k * 10, v], gradients=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_infinity_reach_those_that_see_them(device, dtype, value):
    check_not_finite(dtype, value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_bits_every_time(device, dtype):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)  # which share the keys, and the packed queries where they are more than the heads
        for batch, tokens in ((1, 450), (3, 150), (3, 450)):
            tensors = make(batch, 3, 1, tokens, None, 64, prefix=20, dtype=dtype)
            check(tensors)
            tensors = [t.requires_grad_() for t in tensors]
            first = None
            for _ in range(3):
                out = prefix_attention(*tensors)
                run = [out, *torch.autograd.grad(out.float().square().sum(), tensors)]
                first = first or run
                assert all(torch.equal(a, b) for a, b in zip(first, run, strict=True))
    finally:
        torch.set_num_threads(threads)


@ONE_ISA
def test_autocast(device):
    q, k, v, pk, pv = make(2, 2, 1, 9, None, 32, prefix=3)
    with torch.autocast(device.type, torch.bfloat16):
        out = prefix_attention(q, k, v, pk, pv)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, prefix_attention(*(t.bfloat16() for t in (q, k, v, pk, pv))))


@ONE_ISA
def test_float64_and_large_heads_take_plain_torch(device):
    tensors = make(2, 4, 2, 9, None, 32, prefix=3)
    wide = [t.double() for t in tensors]
    assert error(prefix_attention(*wide), exact(*wide)) <= 1e-12
    for dim in (256, 257):  # the last that the kernels have, and the first that they do not
        check(make(1, 2, 1, 9, None, dim))


@pytest.mark.parametrize("dtype, size", [(torch.float32, 32), (torch.float64, 32), (torch.float32, 300)], ids=str)
def test_a_number_out_of_range_is_one_kind_of_error(dtype, size):
    tensors = [t.to(dtype) for t in make(2, 4, 2, 9, None, size, prefix=3, slots=2)]
    index = torch.tensor([0, 1])
    with pytest.raises(RuntimeError, match="prefix_index has 2; each must lie in"):
        prefix_attention(*tensors, prefix_index=index + 1)
    with pytest.raises(RuntimeError, match="prefix_lengths has 4; each must lie in"):
        prefix_attention(*tensors, prefix_index=index, prefix_lengths=index + 3)


def test_the_reference_looks_at_no_index_in_compiled_code_nor_on_a_device():
    """A GPU would be waited for; what is no prefix is none there, and a length is cut to what there is."""

    class Elsewhere(torch.Tensor):
        is_cpu = False

        def tolist(self) -> list:
            raise AssertionError("this waits for a GPU")

    tensors = [t.double() for t in make(4, 4, 2, 9, None, 32, prefix=3, slots=2)]
    index, lengths = torch.tensor([1, -1, 2, 0]), torch.tensor([2, 7])
    known = exact(*tensors, prefix_index=torch.tensor([1, -1, -1, 0]), prefix_lengths=torch.tensor([2, 3]))
    there = {"prefix_index": index.as_subclass(Elsewhere), "prefix_lengths": lengths.as_subclass(Elsewhere)}
    assert error(prefix_attention(*tensors, **there).as_subclass(torch.Tensor), known) <= 1e-12
    compiled = torch.compile(prefix_attention, fullgraph=True, backend="eager")
    assert error(compiled(*tensors, prefix_index=index, prefix_lengths=lengths), known) <= 1e-12


def test_second_derivatives_are_an_error():
    """Past a residual too, whose own would be taken for the whole."""
    q, k, v = (t.requires_grad_() for t in make())
    for y in (prefix_attention(q, k, v), q + prefix_attention(q, k, v)):
        (first,) = torch.autograd.grad(y.square().sum(), q, create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(first.sum(), q)


BAD = {
    "q has dtype torch.int64": lambda a: a.update(q=a["q"].long()),
    "v is torch.float64 on cpu; it must be torch.float32": lambda a: a.update(v=a["v"].double()),
    "q is a NoneType; it must be a floating-point tensor": lambda a: a.update(q=None),
    "k has dtype torch.int64; it must be a floating-point tensor": lambda a: a.update(k=a["k"].long()),
    "k has shape (2, 7, 32); it must be [batch, heads, tokens, head size]": lambda a: a.update(k=a["k"][:, 0]),
    "k has 2 heads; their number must divide that of q, 3": lambda a: a.update(q=a["q"][:, :3]),
    "k has shape (1, 2, 7, 32); its batch": lambda a: a.update(k=a["k"][:1]),
    "v has shape (2, 2, 6, 32); it must be that of k": lambda a: a.update(v=a["v"][:, :, 1:]),
    "k has 5 keys; causal attention needs at least the 7": lambda a: a.update(k=a["k"][:, :, 2:], v=a["v"][:, :, 2:]),
    "q has shape (2, 0, 7, 32); it must have a head": lambda a: a.update(q=a["q"][:, :0]),
    "prefix_v is a NoneType": lambda a: a.update(prefix_v=None),
    "prefix_k has shape (1, 3, 32); it must be [2, P, 32]": lambda a: a.update(prefix_k=a["prefix_k"][:1]),
    "prefix_v has shape (2, 2, 32); it must be that of prefix_k": lambda a: a.update(prefix_v=a["prefix_v"][:, 1:]),
    "prefix_index is None; of 2 prefixes": lambda a: a.update(
        prefix_k=torch.randn(2, 2, 3, 32), prefix_v=torch.randn(2, 2, 3, 32)
    ),
    "prefix_index is torch.int64 of shape (3,)": lambda a: a.update(prefix_index=torch.zeros(3, dtype=torch.int64)),
    "prefix_index is a list; it must be a tensor": lambda a: a.update(prefix_index=[0, 0]),
    "prefix_lengths is a int; it must be a tensor": lambda a: a.update(prefix_lengths=3),
    "prefix_index has 1; each must lie in [-1, 0]": lambda a: a.update(prefix_index=torch.tensor([0, 1])),
    "prefix_lengths has 4; each must lie in [0, 3]": lambda a: a.update(prefix_lengths=torch.tensor([4])),
    "prefix_index is given without": lambda a: a.update(
        prefix_k=None, prefix_v=None, prefix_index=torch.zeros(2, dtype=torch.int64)
    ),
    "mask is a list; it must be a tensor": lambda a: a.update(mask=[[1] * 7] * 2),
    "mask is on meta; it must be on q's device, cpu": lambda a: a.update(mask=torch.ones(2, 7, device="meta").bool()),
    "mask is torch.bool of shape (2, 6)": lambda a: a.update(mask=torch.ones(2, 6, dtype=torch.bool)),
    "mask is torch.float32 of shape (2, 7)": lambda a: a.update(mask=torch.ones(2, 7)),
    "mask is torch.int64 of shape (2, 1, 1, 7); it must be bool or integer of shape (2, 7)": lambda a: a.update(
        mask=torch.ones(2, 1, 1, 7, dtype=torch.int64)
    ),
    "mask is torch.bool of shape (2, 1, 7, 7); it must be bool or integer of shape (2, 7)": lambda a: a.update(
        mask=torch.ones(2, 1, 7, 7, dtype=torch.bool)
    ),
    "window is 0": lambda a: a.update(window=0),
    "window is 2.0; it must be an integer": lambda a: a.update(window=2.0),
    f"window is {2**70}; it must be an integer below 2**63": lambda a: a.update(window=2**70),
    "scale is a str; it must be a number": lambda a: a.update(scale="a"),
    "scale has shape (2,); it must be a number or a tensor of one": lambda a: a.update(scale=torch.ones(2)),
    "scale requires a gradient, and prefix_attention has none": lambda a: a.update(
        scale=torch.ones(()).requires_grad_()
    ),
    "causal is 'no'; it must be True or False": lambda a: a.update(causal="no"),
    "causal is None; it must be True or False": lambda a: a.update(causal=None),
    "causal is tensor([ True, False]); it must be True": lambda a: a.update(causal=torch.tensor([True, False])),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_are_named(message):
    arguments = dict(zip(("q", "k", "v", "prefix_k", "prefix_v"), make(2, 4, 2, 7, None, 32, prefix=3), strict=True))
    BAD[message](arguments)
    with pytest.raises((TypeError, ValueError, RuntimeError)) as caught:
        prefix_attention(**arguments)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ((None, 0), TypeError, "mask is a NoneType; it must be a tensor"),
        ((torch.ones(7), 0), ValueError, r"mask has shape \(7,\); it must be \[B, S\]"),
        ((torch.ones(2, 7), "0"), TypeError, "first_query is a str; it must be an integer"),
        ((torch.ones(2, 7), 10**12), ValueError, r"first_query is 1000000000000; it must lie between S - 2\*\*29 and"),
        ((torch.ones(2, 7), -(10**12)), ValueError, "first_query is -1000000000000"),
    ],
)
def test_positions_are_of_a_mask_and_fit_their_dtype(arguments, kind, message):
    with pytest.raises(kind, match=message):
        key_positions(*arguments)


def test_positions_export_with_sizes_that_nobody_knows():
    class Positions(torch.nn.Module):
        def forward(self, mask, first):
            return key_positions(mask, first.item())

    mask = torch.rand(2, 9) < 0.5
    shapes = {"mask": {0: torch.export.Dim("rows"), 1: torch.export.Dim("keys")}, "first": None}
    exported = torch.export.export(Positions(), (mask, torch.tensor(3)), dynamic_shapes=shapes).module()
    mask = torch.rand(3, 12) < 0.5
    assert torch.equal(exported(mask, torch.tensor(8)), key_positions(mask, 8))


def test_flags_and_numbers_of_numpy_are_flags_and_numbers():
    np = pytest.importorskip("numpy")  # which the GPU's report runs without
    tensors = make(1, 2, 1, 4, 4, 32)
    for causal in (True, False):
        expected = prefix_attention(*tensors, causal=causal, window=3, scale=0.5)
        numbers = {"window": np.int64(3), "scale": np.float32(0.5)}
        assert torch.equal(prefix_attention(*tensors, causal=np.bool_(causal), **numbers), expected)
    mask = torch.ones(2, 7)
    assert torch.equal(key_positions(mask, np.int64(3)), key_positions(mask, 3))


def test_the_compiled_operator_refuses_fewer_keys_than_causal_queries_have(isa):
    q, k, v = make(1, 2, 1, 4, 2, 32)[:3]
    for need_lse in (False, True):
        with pytest.raises(RuntimeError, match="k has 2 keys"):
            torch.ops.pyfastpeft.prefix_attention(q, k, v, *[None] * 5, True, 1.0, 0, need_lse)


def test_tensors_on_the_meta_device_tell_the_shapes():
    tensors = [t.to("meta").requires_grad_() for t in make(2, 4, 2, 9, None, 32, prefix=5)]
    out = prefix_attention(*tensors, mask=torch.empty(2, 9, dtype=torch.bool, device="meta"), window=4)
    assert out.is_meta and out.shape == (2, 4, 9, 32)
    assert [g.shape for g in torch.autograd.grad(out.sum(), tensors)] == [t.shape for t in tensors]


@ONE_ISA
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(device, dtype):
    plain, several = make(2, 4, 2, 9, 12, 32, dtype=dtype), make(2, 4, 2, 9, 12, 32, prefix=5, slots=3, dtype=dtype)
    selection = (torch.tensor([2, -1]), torch.tensor([5, 0, 3]), key_positions(torch.ones(2, 12), 3)[:, 0, 0])
    for args in ((*plain, None, None, None, None, None, True, 0.2, 0), (*several, *selection, False, 0.2, 4)):
        for need_lse in (True, False):
            torch.library.opcheck(torch.ops.pyfastpeft.prefix_attention.default, (*args, need_lse))
        out, lse = torch.ops.pyfastpeft.prefix_attention(*args, True)
        dout = torch.randn(2, 9, 4, 32).to(dtype).transpose(1, 2)
        torch.library.opcheck(torch.ops.pyfastpeft.prefix_attention_backward.default, (dout, *args, out, lse))


@ONE_ISA
@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_torch_compile_takes_the_whole_graph(device, backend, dynamic):

    def layer(q, k, v, pk, pv, mask):
        return torch.tanh(prefix_attention(q * 2, k, v, pk, pv, mask=mask, window=9)) * 2

    compiled = torch.compile(layer, fullgraph=True, backend=backend, dynamic=dynamic)
    for tokens in (12, 15) if dynamic else (12,):
        tensors = [t.requires_grad_() for t in make(2, 4, 2, tokens, None, 32, prefix=4)]
        mask = torch.rand(2, tokens) < 0.8
        expected, got = layer(*tensors, mask), compiled(*tensors, mask)
        assert error(got, expected.double()) <= 1e-5
        into = torch.randn(expected.shape)
        mine, right = (torch.autograd.grad(out, tensors, into) for out in (got, expected))
        for g, e in zip(mine, right, strict=True):
            assert error(g, e.double()) <= 1e-5


def test_one_graph_trains_over_few_keys_and_many_as_plain_code_does():
    compiled = torch.compile(lambda *tensors: prefix_attention(*tensors), backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for tokens in (12, 130, 15):
            tensors = [t.requires_grad_() for t in make(2, 4, 2, tokens, None, 32, prefix=4, dtype=torch.bfloat16)]
            into = torch.randn(tensors[0].shape).bfloat16()
            mine, right = (torch.autograd.grad(f(*tensors), tensors, into) for f in (compiled, prefix_attention))
            assert all(map(torch.equal, mine, right))


def test_sums_over_many_keys_keep_their_last_bits(isa):
    """What the weights' sum lacks is the same for all keys: a mean of the values or of the gradient magnifies it."""
    q, k, v = make(1, 2, 2, tokens=16, keys=8192, dim=64)
    ours = [t.requires_grad_() for t in (q, k, v + 2)]
    theirs = [t.detach().double().requires_grad_() for t in ours]
    into = torch.randn(q.shape) + 2
    mine = torch.autograd.grad(prefix_attention(*ours), ours, into)
    right = torch.autograd.grad(exact(*theirs), theirs, into.double())
    for got, expected, bound in zip(mine, right, (6e-5, 1e-5, 1e-5), strict=True):
        assert error(got, expected) <= bound


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("keys", "kept"), [(76, False), (77, True)])
def test_the_backward_pass_of_few_keys_does_without_the_result(isa, keys, kept):
    q, k, v, prefix_k, prefix_v = make(tokens=keys, prefix=20)
    out = prefix_attention(q.requires_grad_(), k, v, prefix_k, prefix_v)
    saved = [t for t in out.grad_fn.saved_tensors if t is not None]
    assert any(t.data_ptr() == out.data_ptr() for t in saved) == kept


def test_the_compiled_operator_refuses_many_keys_without_the_result(isa):
    q, k, v = make(tokens=97)
    rest = None, None, None, None, None, True, 1.0, 0
    _, lse = torch.ops.pyfastpeft.prefix_attention.default(q, k, v, *rest, True)
    with pytest.raises(RuntimeError, match="out must be the forward's"):
        torch.ops.pyfastpeft.prefix_attention_backward.default(q, q, k, v, *rest, None, lse)


def test_memory_grows_with_the_tokens_not_with_their_square():
    """Both directions at 32,768 tokens under a limit that one [queries, keys] matrix of bytes would break."""
    code = """
import resource, torch
from pyfastpeft.ops import prefix_attention
q, k, v, pk, pv = (torch.randn(1, 2, n, 32).bfloat16().requires_grad_() for n in (32768,) * 3 + (64,) * 2)
prefix_attention(q[:, :, :64], k[:, :, :64], v[:, :, :64], pk[0], pv[0], window=16).float().sum().backward()
status = dict(line.split(":") for line in open("/proc/self/status"))
used = int(status["VmData"].split()[0]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (used + 500 * 2**20,) * 2)
prefix_attention(q, k, v, pk[0], pv[0], window=300).float().sum().backward()
prefix_attention(q[:, :1], k[:, :1], v[:, :1], pk[0, :1], pv[0, :1], causal=False, window=300)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
