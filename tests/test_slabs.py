"""The dense product over W decoded slab by slab: the operator's promises, kept by torch on any device."""

from types import SimpleNamespace

import pytest
import torch
from test_linear_4bit import (
    DTYPES,
    FORWARD,
    adapter,
    check_autocast,
    check_gradients,
    check_isolation,
    error,
    float64,
    packed_weight,
    pick,
)

from pyfastpeft.formats import Packed4bit
from pyfastpeft.formats.packed import Operands
from pyfastpeft.ops import Lora, backends, linear_4bit, mixed, slabs


@pytest.fixture(autouse=True)
def forced(monkeypatch):
    monkeypatch.setattr(backends, "_FORCED", backends.Backend.SLABS)


@pytest.fixture(params=["one slab", "several"])
def cut(request, monkeypatch):
    """W on a CPU is decoded as a GPU's: by rows, here few at a time; and few rows of x and dy are in float32."""
    if request.param == "one slab":
        return
    monkeypatch.setattr(slabs, "_COPIED", 700)

    def in_slabs(weight, k, m, dtype):
        whole = slabs._whole(weight, k, dtype)
        for row in range(0, len(whole), 24):
            memory = whole[row : row + 24].clone()
            yield row, memory
            memory.fill_(torch.nan)

    monkeypatch.setattr(slabs, "_slabs", in_slabs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_and_gradients_match_float64(device, cut, dtype):
    for m in (0, 3, 40, 300):
        for rank in (0, 4, 17):
            n, k = pick([(33, 96), (100, 64), (64, 100), (7, 33)])
            bias = pick([None, torch.randn(n), torch.randn(n).to(dtype)])
            scaling = pick([2.0, torch.rand(rank) + 0.5, torch.randn(m, rank)]) if rank else 1.0
            check_gradients(dtype, m, n, k, rank, pick([torch.float32, torch.bfloat16]), bias, scaling)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dropout_drops_the_same_elements_forward_and_backward(device, cut, dtype):
    for m, (n, k) in [(5, (100, 64)), (70, (33, 96))]:
        check_gradients(dtype, m, n, k, 8, torch.float32, None, 2.0, 0.4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_changes_no_dtype_within(device, cut, dtype):
    for scaling in (2.0, 2.0**18):
        check_autocast(device.type, dtype, 33, 96, scaling)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_weight_without_columns_leaves_the_bias(device, cut, dtype):
    x, bias = torch.empty(40, 0, dtype=dtype, requires_grad=True), torch.randn(33).to(dtype)
    a, b = torch.empty(4, 0, requires_grad=True), torch.randn(33, 4, requires_grad=True)
    y = linear_4bit(x, packed_weight(33, 0), bias, Lora(a, b, 2.0))
    assert torch.equal(y, bias.expand(40, 33))
    dx, da, db = torch.autograd.grad(y, (x, a, b), torch.randn_like(y))
    assert dx.shape == x.shape and da.shape == a.shape and torch.equal(db, torch.zeros(33, 4))


def test_a_backward_pass_under_autocast_is_the_same():
    w, (a, b) = packed_weight(33, 96), adapter(33, 96, 4)
    leaves = [t.requires_grad_() for t in (torch.randn(40, 96), a, b)]
    y = linear_4bit(leaves[0], w, None, Lora(a, b, 2.0))
    dy = torch.randn_like(y)
    expected = torch.autograd.grad(y, leaves, dy, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, torch.autograd.grad(y, leaves, dy), expected))


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (1, 2)])
def test_any_of_the_gradients_alone(needed):
    w, (a, b) = packed_weight(33, 96), adapter(33, 96, 4)
    tensors = [torch.randn(40, 96), a, b]
    dy = torch.randn(40, 33)

    def gradients(places):
        leaves = [t.detach().requires_grad_(i in places) for i, t in enumerate(tensors)]
        y = linear_4bit(leaves[0], w, None, Lora(*leaves[1:], 2.0))
        return torch.autograd.grad(y, [leaves[i] for i in places], dy)

    every = gradients((0, 1, 2))
    assert all(map(torch.equal, gradients(needed), [every[i] for i in needed]))


def test_what_is_not_finite_stays_in_its_rows_and_slot(device, cut, monkeypatch):
    monkeypatch.setattr(mixed, "tells", lambda _: False)  # as on a GPU
    check_isolation(torch.float32, 40, 33, 96)


@pytest.mark.parametrize("double_quant", [False, True])
def test_inference_of_every_format(device, cut, double_quant):
    for quant_type in ("nf4", "fp4") if double_quant else ("nf4", "fp4", "int4"):
        w, x = packed_weight(100, 96, quant_type, double_quant), torch.randn(3, 50, 96)
        lora = Lora(*adapter(100, 96, 4), 0.5)
        with torch.no_grad():
            assert error(linear_4bit(x, w, None, lora), float64(x, w, None, lora)) <= FORWARD[torch.float32]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gpus_slabs_take_turns_in_one_memory(monkeypatch, dtype):
    decoded = []

    def dequantize_rows(*arguments):
        *weight, k, row, out = arguments
        decoded.append((row, *out.shape, out.data_ptr()))
        out.copy_(Packed4bit.of_operands(Operands(*weight), k).dequantize(out.dtype)[row : row + len(out)])

    n, k = 700, 96
    gpu = SimpleNamespace(L2_cache_size=2 * 256 * k * dtype.itemsize, multi_processor_count=2)
    monkeypatch.setattr(slabs, "why_not_cuda", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    monkeypatch.setattr(torch.ops.pyfastpeft, "dequantize_rows", SimpleNamespace(default=dequantize_rows))
    for bias, rank in ((None, 0), (torch.randn(n), 4)):
        decoded.clear()
        check_gradients(dtype, 300, n, k, rank, torch.float32, bias, 2.0 if rank else 1.0)
        assert [shape for *shape, _ in decoded] == [[0, 384, k], [384, 316, k], [0, n, k]]
        assert decoded[0][-1] == decoded[1][-1]
    decoded.clear()
    check_gradients(dtype, 0, n, k, 0, torch.float32, None, 1.0)
    assert [shape for *shape, _ in decoded] == [[0, n, k]]


@pytest.mark.parametrize("m", [1, 256, 512, 2048, 16384])
@pytest.mark.parametrize("shape", [(4096, 4096), (14336, 4096), (4096, 14336), (28672, 4096), (300, 64)], ids=str)
def test_a_slab_fits_the_cache_unless_that_leaves_cores_idle(shape, m):
    (n, k), cache, cores = shape, 50 << 20, 132
    height = slabs.slab_rows(m, n, 2 * k, cache, cores)
    blocks = -(-m // 128) * -(-height // 128)
    assert height % 128 == 0
    assert height * 2 * k <= cache or height >= n or blocks <= 2 * cores
    assert blocks >= cores // 2 or height >= n
    slabs_needed = -(-n // height)
    assert n - (slabs_needed - 1) * height >= height / 2 or slabs_needed == 1


def test_torch_compile_takes_the_whole_graph():
    n, k, m = 24, 64, 6
    w, bias = packed_weight(n, k), torch.randn(n, requires_grad=True)
    a, b = (t.requires_grad_() for t in adapter(n, k, 4))

    def layer(x):
        return torch.tanh(linear_4bit(x, w, bias, (a, b, 2.0))) * 2

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x, dy = torch.randn(m, k, requires_grad=True), torch.randn(m, n)
    expected = torch.autograd.grad(layer(x), (x, a, b, bias), dy)
    for mine, theirs in zip(torch.autograd.grad(compiled(x), (x, a, b, bias), dy), expected, strict=True):
        assert torch.equal(mine, theirs)


def test_opcheck_passes():
    w, (a, b) = packed_weight(24, 64, "nf4", True).rows(), adapter(24, 64, 4)
    x, dy, s, seed = torch.randn(5, 64), torch.randn(5, 24), torch.randn(5, 4), torch.tensor([12345])
    for branch in ((None, None, None, 1.0, None, 0.0), (a, b, torch.rand(5, 4), 2.0, seed, 0.5)):
        for dtype in DTYPES:
            arguments = (x.to(dtype), *w.operands, torch.randn(24), *branch)
            torch.library.opcheck(torch.ops.pyfastpeft.linear_4bit_slabs.default, arguments)
    for needs in ((True, True, True), (True, False, False), (False, False, True)):
        arguments = (dy, x, s, *w.operands, 64, *branch, *needs)
        torch.library.opcheck(torch.ops.pyfastpeft.linear_4bit_slabs_backward.default, arguments)
