"""RMSNorm, SwiGLU and rotary embeddings under every instruction set: against float64, and as transformers has them."""

import math
import os
import subprocess
import sys

import pytest
import torch
from torch.autograd import forward_ad

import pyfastpeft as fp
from pyfastpeft.ops import projected_swiglu, rms_norm, rope, swiglu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Relative Frobenius error: two roundings of an output at most.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 6e-3, torch.float16: 8e-4}
SHAPES = [(1, 19), (3, 11), (1, 576), (2, 5, 96), (40, 33), (0, 16), (130, 257), (600, 64)]


def error(got, expected):
    assert got.shape == expected.shape
    if expected.numel() == 0:
        return 0.0
    scatter = 1 + 3 / math.sqrt(expected.numel())
    return float(
        (got.detach().double() - expected.detach()).norm() / expected.detach().norm().clamp(min=1e-30) / scatter
    )


def same(got, expected):
    """To the bit, on a CPU. A GPU's kernels sum in an order of their own where an address or a stride is no multiple
    of 16."""
    return torch.equal(got, expected) if got.is_cpu else torch.allclose(got, expected, rtol=1e-6, atol=1e-6)


def check_gradients(function, reference, tensors, dtype):
    """Outputs and the gradients of all of ``tensors``, against ``reference`` in float64."""
    ours = [t.to(dtype).requires_grad_() for t in tensors]
    exact = [t.detach().double().requires_grad_() for t in ours]
    got, expected = function(*ours), reference(*exact)
    got, expected = (o if isinstance(o, tuple) else (o,) for o in (got, expected))
    for g, e in zip(got, expected, strict=True):
        assert g.dtype == dtype
        assert error(g, e) <= TOLERANCE[dtype]
    into = [torch.randn(e.shape).to(dtype) for e in expected]
    mine = torch.autograd.grad(got, ours, into)
    theirs = torch.autograd.grad(expected, exact, [d.double() for d in into])
    for g, e in zip(mine, theirs, strict=True):
        assert g.dtype == dtype
        assert error(g, e) <= 3 * TOLERANCE[dtype]


def norm64(x, weight, eps=1e-6):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def half_turn(x):
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


def rope64(q, k, cos, sin):
    cos, sin = cos.double().unsqueeze(1), sin.double().unsqueeze(1)
    return q * cos + half_turn(q) * sin, k * cos + half_turn(k) * sin


def angles(batch, tokens, dim, dtype=torch.float32):
    return torch.randn(batch, tokens, dim).cos().to(dtype), torch.randn(batch, tokens, dim).sin().to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rms_norm_and_its_gradients(device, dtype):
    for shape in SHAPES:
        x, weight = torch.randn(shape) * 3, torch.randn(shape[-1])
        check_gradients(lambda x, w: rms_norm(x, w, 1e-5), lambda x, w: norm64(x, w, 1e-5), (x, weight), dtype)


def test_a_frozen_weight_or_input_gets_no_gradient():
    x, weight = torch.randn(5, 16, requires_grad=True), torch.randn(16, requires_grad=True)
    rms_norm(x, weight.detach()).sum().backward()
    rms_norm(x.detach(), weight).sum().backward()
    assert x.grad is not None and weight.grad is not None
    assert not rms_norm(x.detach(), weight.detach()).requires_grad
    with torch.no_grad():
        assert not rms_norm(x, weight).requires_grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_swiglu_and_its_gradients(device, dtype):
    for shape in SHAPES:
        check_gradients(
            swiglu, lambda g, u: g * torch.sigmoid(g) * u, (torch.randn(shape) * 4, torch.randn(shape)), dtype
        )


def test_swiglu_of_large_and_special_values(device):
    gate = torch.tensor([0.0, -0.0, 1e-30, 30.0, -30.0, 87.0, -87.0, 100.0, -100.0, 1e30, -1e30, math.inf, math.nan])
    got, expected = swiglu(gate, torch.ones_like(gate)), gate * torch.sigmoid(gate)
    finite = expected.isfinite()
    assert torch.allclose(got[finite], expected[finite], rtol=1e-6, atol=1e-30)
    assert got[-2] == math.inf and got[-1].isnan()


def test_nan_and_infinity_reach_the_outputs_they_touch(device):
    for value in (math.nan, math.inf):
        x = torch.randn(3, 40)
        x[1, 7] = value
        y = rms_norm(x, torch.ones(40))
        assert y[0].isfinite().all() and y[2].isfinite().all() and not y[1].isfinite().all()
        q = torch.randn(1, 2, 3, 8)
        q[0, 1, 2, 5] = value
        out, other = rope(q, torch.randn(1, 1, 3, 8), *angles(1, 3, 8))
        assert set(map(tuple, (~out.isfinite()).nonzero().tolist())) == {(0, 1, 2, 1), (0, 1, 2, 5)}
        assert other.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rope_and_its_gradients(device, dtype):
    for batch, heads, kv, tokens, dim, shared in [
        (1, 9, 3, 1, 64, True),
        (2, 4, 4, 7, 8, False),
        (3, 1, 2, 5, 34, True),
        (2, 3, 1, 40, 128, False),
        (2, 2, 2, 0, 16, False),
        (6, 2, 1, 5, 2, True),
    ]:
        cos, sin = angles(1 if shared else batch, tokens, dim, dtype)
        q, k = torch.randn(batch, tokens, heads, dim), torch.randn(batch, tokens, kv, dim)
        check_gradients(
            lambda q, k: rope(q.transpose(1, 2), k.transpose(1, 2), cos, sin),  # noqa: B023
            lambda q, k: rope64(q.transpose(1, 2), k.transpose(1, 2), cos, sin),  # noqa: B023
            (q, k),
            dtype,
        )


def test_rope_turns_float64_too():
    """As ``prefix_attention`` takes it, for one layer in float64 (``nn.Attention``)."""
    q, k, cos, sin = (t.double() for t in (torch.randn(2, 3, 5, 8), torch.randn(2, 1, 5, 8), *angles(1, 5, 8)))
    assert all(map(torch.equal, rope(q, k, cos, sin), rope64(q, k, cos, sin)))
    layer = fp.nn.Attention(16, 2, dtype=torch.float64)
    assert layer(torch.randn(2, 5, 16).double(), (cos, sin))[0].dtype == torch.float64


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_are_rounded_where_transformers_rounds_them(device, dtype):
    """Equal but where the order of a float32 sum decides a rounding."""
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    x = torch.randn(50, 96).to(dtype)
    norm = llama.LlamaRMSNorm(96).to(dtype)
    norm.weight.data.normal_()
    q, k = torch.randn(2, 6, 4, 16).to(dtype).transpose(1, 2), torch.randn(2, 6, 2, 16).to(dtype).transpose(1, 2)
    cos, sin = angles(2, 6, 16, dtype)
    gate, up = torch.randn(2, 50, 96).to(dtype)
    with torch.no_grad():
        pairs = [
            (rms_norm(x, norm.weight, norm.variance_epsilon), norm(x)),
            (swiglu(gate, up), torch.nn.functional.silu(gate) * up),
            *zip(rope(q, k, cos, sin), llama.apply_rotary_pos_emb(q, k, cos, sin), strict=True),
        ]
    for got, expected in pairs:
        if dtype == torch.float32:
            assert torch.allclose(got, expected, rtol=1e-5, atol=1e-6)
        else:
            assert (got == expected).float().mean() > 0.99
            assert torch.allclose(got.float(), expected.float(), rtol=1e-2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_plain_torch_serves_where_there_are_no_kernels(plain_torch, monkeypatch, dtype):
    monkeypatch.setattr(torch.ops, "pyfastpeft", None)
    cpu = torch.device("cpu")
    test_rms_norm_and_its_gradients(cpu, dtype)
    test_swiglu_and_its_gradients(cpu, dtype)
    test_rope_and_its_gradients(cpu, dtype)
    test_values_are_rounded_where_transformers_rounds_them(cpu, dtype)
    check_gradients(
        lambda x: projected_swiglu(x, lambda x: (x, 2 * x)),
        lambda x: 2 * x * x * torch.sigmoid(x),
        (torch.randn(3, 4),),
        dtype,
    )


def test_what_is_computed_again_is_computed_in_the_same_mode():
    modes = []

    def project(x):
        modes.append((torch.is_grad_enabled(), x.requires_grad))
        return x.sin(), x.cos()

    x = torch.randn(3, 4, requires_grad=True)
    y, expected = projected_swiglu(x, project), swiglu(x.sin(), x.cos())
    dy = torch.randn(3, 4)
    torch.testing.assert_close(torch.autograd.grad(y, x, dy), torch.autograd.grad(expected, x, dy))
    assert modes == [(True, True)] * 2 and torch.equal(y, expected)


def test_strided_inputs_give_the_contiguous_result(device):
    wide = torch.randn(9, 201)
    for x in (wide[:, 1:97], wide[::2, :96], wide[:, :192:2], torch.randn(96, 9).t()):
        weight = torch.randn(192)[::2]
        assert same(rms_norm(x, weight), rms_norm(x.contiguous(), weight.contiguous()))
        assert same(swiglu(x, x.flip(0)), swiglu(x.contiguous(), x.flip(0).contiguous()))
    q = torch.randn(2, 4, 6, 32)
    cos, sin = angles(2, 12, 16)
    for view in (q[..., :16], q[..., ::2], torch.randn(2, 6, 4, 16).transpose(1, 2)):
        for c, s in ((cos[:, :6], sin[:, 6:]), (cos[:1, ::2], sin[:1, 1::2])):
            got, expected = (
                rope(view, view, c, s),
                rope(view.contiguous(), view.contiguous(), c.contiguous(), s.contiguous()),
            )
            assert same(got[0], expected[0]) and same(got[1], expected[1])


def test_a_last_dimension_of_zero_gives_what_torch_gives(device):
    for lead in ((), (3,), (2, 3), (0, 3)):
        x = torch.randn(*lead, 0, requires_grad=True)
        for y in (rms_norm(x, torch.ones(0)), swiglu(x, x)):
            assert y.shape == torch.autograd.grad(y.sum(), x)[0].shape == x.shape


def test_an_eps_that_wants_a_gradient_gets_it():
    x, weight, eps = torch.randn(3, 8), torch.randn(8), torch.full((1, 1, 1), 0.1, requires_grad=True)
    y, expected = rms_norm(x, weight, eps), norm64(x, weight, eps)[0]
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(*(torch.autograd.grad(out.sum(), eps) for out in (y, expected)))


def test_backward_keeps_the_inputs_and_nothing_else():
    saved = []
    x, up = (torch.randn(30, 40, requires_grad=True) for _ in range(2))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        swiglu(x, up)
        assert {t.data_ptr() for t in saved} == {x.data_ptr(), up.data_ptr()}
        saved.clear()
        weight = torch.randn(40)
        rms_norm(x, weight)
        assert {t.data_ptr() for t in saved} == {x.data_ptr(), weight.data_ptr()}


HOLES = """
import torch
from pyfastpeft.ops import rms_norm
x, weight, kept = torch.randn(512, 576), torch.ones(576), []
for _ in range(30):
    y = rms_norm(x, weight)
    kept.append(torch.empty_like(x))
    del y
begins = sorted(t.data_ptr() for t in kept)
print((begins[-1] + x.nbytes - begins[0]) / (len(kept) * x.nbytes))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="it counts on how glibc gives memory")
def test_a_norm_that_is_freed_leaves_a_hole_for_a_tensor_of_its_size():
    heap = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TOP_PAD_": str(1 << 28)}
    done = subprocess.run([sys.executable, "-c", HOLES], env=os.environ | heap, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1.5


def test_the_gradient_of_rope_is_its_transpose(device):
    q, d = torch.randn(2, 3, 5, 12, requires_grad=True), torch.randn(2, 3, 5, 12)
    cos, sin = angles(2, 5, 12)
    out, _ = rope(q, q.detach(), cos, sin)
    (grad,) = torch.autograd.grad(out, q, d)
    assert torch.allclose((out * d).sum(), (q * grad).sum(), rtol=1e-4, atol=1e-4)


def _samples():
    x, weight, cos_sin = torch.randn(6, 24), torch.randn(24), angles(2, 3, 8)
    q, k = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 3, 8)
    return {
        "rms_norm": [(x, weight, 1e-6)],
        "rms_norm_backward": [
            (x, x, weight, 1e-6, True),
            (x, x, weight, 1e-6, False),
            (x.half(), x.half(), weight.half(), 1e-6, True),
        ],
        "swiglu": [(x, x + 1)],
        "swiglu_backward": [(x, x + 1, x + 2)],
        "rope": [(q, k, *cos_sin, False), (q, k, *angles(1, 3, 8), True)],
    }


@pytest.mark.parametrize("name", list(_samples()))
def test_opcheck_passes_for_every_operator(name):
    for args in _samples()[name]:
        torch.library.opcheck(getattr(torch.ops.pyfastpeft, name).default, args)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_as_one_graph_with_gradients(backend):
    cos, sin = angles(1, 5, 8)
    weight = torch.randn(16, requires_grad=True)

    def layer(x):
        q = rms_norm(x, weight).view(1, 5, 2, 8).transpose(1, 2)
        q, k = rope(q, q * 2, cos, sin)
        return swiglu(q + k, q), rms_norm(x, weight), projected_swiglu(x, lambda x: (x.sin(), x.cos()))

    x = torch.randn(1, 5, 16, requires_grad=True)
    expected, got = layer(x), torch.compile(layer, fullgraph=True, backend=backend)(x)
    for g, e in zip(got, expected, strict=True):
        assert torch.allclose(g, e, rtol=1e-5, atol=1e-6)
    for g, e in zip(
        torch.autograd.grad([o.sum() for o in got], (x, weight)),
        torch.autograd.grad([o.sum() for o in expected], (x, weight)),
        strict=True,
    ):
        assert torch.allclose(g, e, rtol=1e-4, atol=1e-5)


def test_rope_compiles_for_any_number_of_tokens():
    def turned(q, k, positions):
        half = positions[..., None].float() * torch.arange(8)
        angle = torch.cat([half, half], -1)
        return torch.cat(rope(q, k, angle.cos(), angle.sin()), 1)

    compiled = torch.compile(turned, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (16, 5, 1):
        operands = torch.randn(1, 4, tokens, 16), torch.randn(1, 2, tokens, 16), torch.arange(tokens)[None]
        assert torch.equal(compiled(*operands), turned(*operands))


def test_errors_name_the_argument():
    x = torch.randn(3, 8)
    q, (cos, sin) = torch.randn(1, 2, 3, 8), angles(1, 3, 8)
    for call, error_type, words in [
        (lambda: rms_norm(x.long(), torch.ones(8)), TypeError, "x has dtype"),
        (lambda: rms_norm(x, torch.ones(7)), ValueError, "weight is"),
        (lambda: rms_norm(x, torch.ones(8).double()), TypeError, "weight has dtype torch.float64"),
        (lambda: rms_norm(x, torch.ones(8).bfloat16()), ValueError, "weight is torch.bfloat16"),
        (lambda: rms_norm(x, None), TypeError, "weight is a NoneType"),
        (lambda: rms_norm(x, torch.ones(8), "a"), TypeError, "eps is a str; it must be a number or a tensor"),
        (lambda: rms_norm(x, torch.ones(8), torch.ones(2)), ValueError, r"eps has shape \(2,\); it must be"),
        (lambda: rms_norm(x[0, 0], torch.tensor(1.0)), ValueError, "weight is"),
        (lambda: swiglu(x, x.bfloat16()), ValueError, "up is"),
        (lambda: swiglu(x, x.to("meta")), ValueError, "up is .* on meta"),
        (lambda: rope(None, q, cos, sin), TypeError, "q is a NoneType; it must be a tensor"),
        (lambda: rope(q, q, cos, 1.0), TypeError, "sin is a float; it must be a tensor"),
        (lambda: rope(q[0], q, cos, sin), ValueError, "q has shape"),
        (lambda: rope(q, q[..., :6], cos, sin), ValueError, "k has shape"),
        (lambda: rope(q, q, cos[:, :2], sin), ValueError, "cos has shape"),
        (lambda: rope(q, q, cos, sin.double()), TypeError, "sin is"),
    ]:
        with pytest.raises(error_type, match=words):
            call()
    assert fp.ops.rms_norm is rms_norm


def test_threads_change_nothing(isa, by_threads):
    x, weight = torch.randn(700, 96), torch.randn(96)
    cos, sin = angles(2, 300, 16)
    q = torch.randn(2, 5, 300, 16)

    def run():
        a = x.clone().requires_grad_()
        w = weight.clone().requires_grad_()
        y = swiglu(rms_norm(a, w), a)
        y.sum().backward()
        return [y, a.grad, w.grad, *rope(q, q, cos, sin)]

    by_threads(run, 1, 4)


FUNCTIONS = (
    lambda x: rms_norm(x, torch.ones(16), 1e-5),
    lambda x: swiglu(x, x),
    lambda x: rope(x, x, torch.ones(1, 3, 16), torch.ones(1, 3, 16))[0],
    lambda x: projected_swiglu(x, lambda x: (x, 2 * x)),
)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_results_may_be_changed_in_place(function):
    x = torch.randn(1, 2, 3, 16, requires_grad=True)
    y, expected = function(x), function(x) * torch.arange(16)
    y[..., :8] *= torch.arange(8)
    y[..., 8:].mul_(torch.arange(8, 16))
    grads = (torch.autograd.grad(z.square().sum(), x) for z in (y, expected))
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_second_derivatives_are_an_error(function):
    """Past a residual too, whose own would be taken for the whole."""
    x = torch.randn(1, 2, 3, 16, requires_grad=True)
    totals = [function(x).square(), (x + function(x)).square()]
    if function is not FUNCTIONS[2]:  # rope is linear: what arrives is all that its gradient depends on
        totals.append(x.pow(3) + function(x))
    for total in totals:
        (first,) = torch.autograd.grad(total.sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(first.sum(), x)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("function", FUNCTIONS[:3])
def test_forward_mode_is_an_error(function, grad):
    x = torch.randn(1, 2, 3, 16)
    with forward_ad.dual_level(), torch.set_grad_enabled(grad), pytest.raises(NotImplementedError, match="jvp"):
        function(forward_ad.make_dual(x, x))


def test_a_weight_that_was_offloaded_is_named():
    x, weight = torch.ones(2, 8), torch.ones(8, device="meta")
    with pytest.raises(ValueError, match=r"weight is .* on meta; it must be .* on cpu"):
        rms_norm(x, weight)
