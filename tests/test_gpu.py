"""What only a GPU can show of the operators: graphs, streams, several devices, memory. The promises that hold on every
device are tested where they are made, under the fixture `device`."""

import os
import subprocess
import sys

import pytest
import torch
from test_linear_4bit import FORWARD, adapter, error, float64, packed_weight

import pyfastpeft as fp
from pyfastpeft.integrations.deferred_logits import chunked_cross_entropy
from pyfastpeft.nn.lora_init import pissa
from pyfastpeft.ops import BankView, Lora, backends, linear_4bit
from pyfastpeft.ops.cuda_kernels import why_not

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is here")
GPU = torch.device("cuda", 0)
N, K, R = 256, 512, 16
DTYPE = torch.bfloat16


@pytest.fixture(autouse=True)
def on_gpu():
    with GPU:
        yield


def layer(device=GPU):
    with device:
        return packed_weight(N, K, "nf4"), torch.randn(N).to(DTYPE), Lora(*adapter(N, K, R, DTYPE), 2.0)


def close(got, x, w, bias, lora):
    assert error(got, float64(x, w, bias, lora)) <= FORWARD[x.dtype]


def test_the_cuda_kernels_serve_this_gpu():
    assert why_not(GPU) is None
    assert backends.choose(packed_weight(N, K), 1, DTYPE, infers=True) is backends.Backend.CUDA


@pytest.mark.parametrize("m", [1, 16, 100, 300])
@torch.no_grad()
def test_a_captured_graph_replays_with_new_inputs_and_another_adapter(m):
    w, bias, _ = layer()
    a, b = torch.randn(2, R, K).to(DTYPE) * 0.05, torch.randn(2, N, R).to(DTYPE)
    scaling, rows = torch.tensor([2.0, 0.5]), torch.zeros(m, dtype=torch.int64)
    x, bank = torch.randn(m, K).to(DTYPE), BankView(a, b, scaling, rows)

    def run():
        return linear_4bit(linear_4bit(x, w, bias, bank)[:, :N].repeat(1, 2), w, bias, bank)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run()
    for slot in (0, 1, -1):
        x.copy_(torch.randn(m, K).to(DTYPE))
        rows.fill_(slot)
        graph.replay()
        assert torch.equal(y, run())


COMPILED = """
run = torch.compile(product, mode="reduce-overhead", fullgraph=True)
found = [run(x).clone() for _ in range(4)]
"""
CAPTURED = """
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    y = product(x)
graph.replay()
found = [y]
"""


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("way", [COMPILED, CAPTURED], ids=["compiled", "captured"])
def test_the_first_call_of_all_may_be_for_a_graph(way, backend):
    """What is kept from call to call is made by a process's first, while memory comes from the graph's pool."""
    code = f"""
import torch, pyfastpeft as fp
torch.set_grad_enabled(False)
w = fp.quantize_4bit(torch.randn(256, 2048, device="cuda"), double_quant=True)
x = torch.randn(1, 2048, device="cuda").bfloat16()
product = lambda x: fp.ops.linear_4bit(x, w)
{way}
torch.cuda.synchronize()
assert all(torch.equal(y, product(x)) for y in found)
"""
    environment = os.environ | {"PYFASTPEFT_BACKEND": backend}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


@torch.no_grad()
def test_streams_do_not_disturb_one_another():
    w, bias, lora = layer()
    inputs = [torch.randn(m, K).to(DTYPE) for m in (1, 5, 16, 64)]
    expected = [linear_4bit(x, w, bias, lora) for x in inputs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in inputs]
    found = [[] for _ in inputs]
    for _ in range(50):
        for stream, x, results in zip(streams, inputs, found, strict=True):
            with torch.cuda.stream(stream):
                results.append(linear_4bit(x, w, bias, lora))
    torch.cuda.synchronize()
    for results, right in zip(found, expected, strict=True):
        assert all(torch.equal(y, right) for y in results)


@torch.no_grad()
def test_graphs_do_not_disturb_one_another_nor_those_that_are_gone():
    """More than there are counters for at a time."""
    w, bias, lora = layer()
    x = torch.randn(1, K).to(DTYPE)
    right, live = linear_4bit(x, w, bias, lora), []
    for i in range(600):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = linear_4bit(x, w, bias, lora)
        if i % 100 == 0:
            live.append((graph, y, torch.cuda.Stream()))
        for one, _, stream in live:
            with torch.cuda.stream(stream):
                one.replay()
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(found, right) for found in (y, *(found for _, found, _ in live)))


@torch.no_grad()
def test_the_same_call_gives_the_same_bits():
    w, bias, lora = layer()
    for m in (1, 7, 16, 128, 512):
        x = torch.randn(m, K).to(DTYPE)
        first = linear_4bit(x, w, bias, lora)
        assert all(torch.equal(linear_4bit(x, w, bias, lora), first) for _ in range(5))


@pytest.mark.parametrize("m", [4, 300])
def test_torch_compile_takes_the_whole_graph_in_both_directions(m):
    w, bias, lora = layer()
    a, b = (t.requires_grad_() for t in lora[:2])
    x, dy = torch.randn(m, K).to(DTYPE).requires_grad_(), torch.randn(m, N).to(DTYPE)
    compiled = torch.compile(lambda x: linear_4bit(x, w, bias, (a, b, 2.0)), fullgraph=True)
    expected = torch.autograd.grad(linear_4bit(x, w, bias, (a, b, 2.0)), (x, a, b), dy)
    for mine, theirs in zip(torch.autograd.grad(compiled(x), (x, a, b), dy), expected, strict=True):
        assert error(mine, theirs) <= 2 * FORWARD[DTYPE]
    with torch.no_grad():
        close(compiled(x), x, w, bias, (a, b, 2.0))


@pytest.mark.parametrize("m", [1, 300])
def test_nothing_waits_for_the_gpu(m):
    w, bias, lora = layer()
    a, b = (t.requires_grad_() for t in lora[:2])
    bank = BankView(a.unsqueeze(0), b.unsqueeze(0), torch.ones(1), torch.arange(m) % 2 - 1)
    x, head = torch.randn(m, K).to(DTYPE), torch.randn(50, N).to(DTYPE)
    labels = torch.randint(0, 50, (m,))

    def step():
        for branch in ((a, b, 2.0), bank):
            y = linear_4bit(x, w, bias, branch)
            chunked_cross_entropy(y, labels, lambda h: h @ head.t(), 50).backward(retain_graph=True)
            with torch.no_grad():
                linear_4bit(x, w, bias, branch)

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("forced", [None, backends.Backend.REFERENCE])
def test_a_label_that_is_no_class_makes_the_loss_nan_and_the_next_call_works(monkeypatch, forced):
    monkeypatch.setattr(backends, "_FORCED", forced)
    head, hidden = torch.randn(50, K).to(DTYPE), torch.randn(5, K).to(DTYPE).requires_grad_()
    for labels, bad in (([1, 50, 2, -1, 3], [1, 3]), ([1, 2, 3, 4, 5], [])):
        loss = chunked_cross_entropy(hidden, torch.tensor(labels), lambda h: h @ head.t(), 50)
        (gradient,) = torch.autograd.grad(loss, hidden)
        assert bool(loss.isnan()) is bool(bad)
        assert gradient.isnan().any(1).nonzero().flatten().tolist() == bad


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU is here")
@torch.no_grad()
def test_a_weight_on_another_gpu_than_the_current_one():
    other = torch.device("cuda", 1)
    w, bias, lora = layer(other)
    for m in (1, 64, 300):
        x = torch.randn(m, K, device=other).to(DTYPE)
        y = linear_4bit(x, w, bias, lora)
        assert y.device == other and torch.cuda.current_device() == 0
        close(y, x, w, bias, lora)
    with pytest.raises(ValueError, match="x is on cuda:0; it must be on the device of w, cuda:1"):
        linear_4bit(torch.randn(1, K).to(DTYPE), w)


def test_tensors_left_on_the_cpu_are_named():
    w, bias, lora = layer()
    x = torch.randn(2, K).to(DTYPE)
    bank = BankView(lora.a[None], lora.b[None], torch.ones(1), torch.zeros(2, dtype=torch.int64, device="cpu"))
    for change, message in (
        ({"x": x.cpu()}, "x is on cpu"),
        ({"bias": bias.cpu()}, "bias is on cpu"),
        ({"lora": (lora.a.cpu(), lora.b, 1.0)}, "lora A is on cpu"),
        ({"lora": bank}, "rows of the bank is on cpu"),
    ):
        with pytest.raises(ValueError, match=message), torch.no_grad():
            linear_4bit(**({"x": x, "w": w, "bias": bias, "lora": lora} | change))


@torch.no_grad()
def test_out_of_memory_is_torchs_own_error_and_the_next_call_works():
    w, bias, lora = layer()
    x = torch.randn(1, K).to(DTYPE)
    before = linear_4bit(x, w, bias, lora)
    for rows in (2**36 // K, 2**40 // K):
        with pytest.raises(torch.OutOfMemoryError):
            linear_4bit(x.expand(rows, K), w, bias, lora)
    assert torch.equal(linear_4bit(x, w, bias, lora), before)


@torch.no_grad()
def test_quantizing_and_decoding_give_the_cpus_bits():
    for quant_type in ("nf4", "fp4", "int4"):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            weight = (torch.randn(300, 331) * torch.randn(300, 331).exp()).to(dtype)
            here, there = fp.quantize_4bit(weight, quant_type), fp.quantize_4bit(weight.cpu(), quant_type).rows()
            assert torch.equal(here.codes.cpu(), there.codes) and torch.equal(here.scale.cpu(), there.scale)
            for to in (torch.float32, torch.bfloat16, torch.float16):
                assert torch.equal(here.dequantize(to).cpu(), there.dequantize(to))


def test_randomized_components_are_those_that_the_cpu_finds():
    weight = torch.randn(N, K, device="cpu")
    for ours, expected in zip(pissa(weight.to(GPU), R, 2.0, iterations=1), pissa(weight, R, 2.0, 1), strict=True):
        torch.testing.assert_close(ours.cpu(), expected, rtol=1e-4, atol=1e-5)
