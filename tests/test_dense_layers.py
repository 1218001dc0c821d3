"""Products with a weight in full precision: the operator, and linear layers that use it."""

import copy
import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from architectures import relative
from tiny import tiny_llama
from torch import Tensor, nn
from torch.autograd import forward_ad
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.pytorch_utils import Conv1D

import pyfastpeft as fp
from pyfastpeft.integrations import dense_layers
from pyfastpeft.integrations.dense_layers import DenseForward
from pyfastpeft.integrations.forwards import remove
from pyfastpeft.integrations.fused_layers import fuse_layers
from pyfastpeft.ops import dense, dense_linear, large_pages

ERROR = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 4e-3}
# (rows, N, K): whole and partial groups of lanes, blocks and chunks of rows.
SHAPES = [(0, 9, 8), (1, 49, 37), (17, 33, 96), (40, 7, 129), (70, 300, 64), (33, 1, 1), (129, 64, 257), (530, 40, 48)]


def is_its(y):
    """Whether the kernel made ``y``, or what that is a view or a multiple of."""
    node = y.grad_fn
    while "_LinearBackward" not in node.name() and len(node.next_functions) and node.next_functions[0][0] is not None:
        node = node.next_functions[0][0]
    return "_LinearBackward" in node.name()


@pytest.fixture
def pays(monkeypatch):
    """As on a CPU where it does."""
    monkeypatch.setattr(dense, "outruns_torch", lambda dtype: True)
    monkeypatch.setattr(dense_layers, "outruns_torch", lambda dtype: True)


@pytest.mark.parametrize("dtype", list(ERROR), ids=str)
@pytest.mark.parametrize("rows, n, k", SHAPES)
def test_both_directions(isa, dtype, rows, n, k):
    x, weight, dy = (torch.randn(*shape).to(dtype) for shape in ((rows, k), (n, k), (rows, n)))
    for bias in (None, torch.randn(n).to(dtype)):
        y = torch.ops.pyfastpeft.dense_linear(x, weight, bias)
        assert y.dtype == dtype and y.shape == (rows, n)
        assert (
            relative(y, F.linear(x.double(), weight.double(), None if bias is None else bias.double())) <= ERROR[dtype]
        )
    dx = torch.ops.pyfastpeft.dense_linear_backward(dy, weight)
    assert dx.dtype == dtype and dx.shape == (rows, k)
    assert relative(dx, dy.double() @ weight.double()) <= ERROR[dtype]


def test_matrices_that_are_not_contiguous(isa):
    x, weight, dy = torch.randn(50, 130)[:, ::2], torch.randn(65, 40).t(), torch.randn(40, 50).t()
    linear, backward = torch.ops.pyfastpeft.dense_linear, torch.ops.pyfastpeft.dense_linear_backward
    assert torch.equal(linear(x, weight, None), linear(x.contiguous(), weight.contiguous(), None))
    assert torch.equal(backward(dy, weight), backward(dy.contiguous(), weight.contiguous()))


def test_what_is_not_finite_stays_in_its_row_and_column(isa):
    x, weight, dy = torch.randn(40, 100), torch.randn(70, 100), torch.randn(40, 70)
    linear, backward = torch.ops.pyfastpeft.dense_linear, torch.ops.pyfastpeft.dense_linear_backward
    y, dx = linear(x, weight, None), backward(dy, weight)
    x[3, 99], x[18, 0], dy[5, 69] = torch.nan, torch.inf, torch.nan
    others = torch.ones(40, dtype=torch.bool)
    others[[3, 18]] = False
    got = linear(x, weight, None)
    assert torch.equal(got[others], y[others]) and not got[~others].isfinite().any()
    got = backward(dy, weight)
    assert got[5].isnan().all() and torch.equal(got[torch.arange(40) != 5], dx[torch.arange(40) != 5])
    weight[16, 3] = -torch.inf
    got = linear(x[others], weight, None)
    assert not got[:, 16].isfinite().any()
    assert torch.equal(got[:, torch.arange(70) != 16], y[others][:, torch.arange(70) != 16])


@pytest.mark.parametrize("grad", [True, False])
def test_what_is_no_product_of_rows_is_left_to_torch(grad):
    x, weight = torch.randn(3, 8), torch.randn(8)
    with torch.set_grad_enabled(grad):
        assert torch.equal(dense_linear(x, weight), F.linear(x, weight))
        for operands in ((torch.tensor(1.0), weight[None]), (None, weight[None]), (x, None), ("x", weight[None])):
            with pytest.raises((TypeError, RuntimeError), match="linear"):
                dense_linear(*operands)


@pytest.mark.parametrize(
    "x, weight, match",
    [
        (torch.zeros(20, 8), torch.zeros(3, 9), "weight must be .N, 8. in the dtype of x"),
        (torch.zeros(20, 8), torch.zeros(3, 8).bfloat16(), "weight must be .N, 8. in the dtype of x"),
    ],
)
def test_the_operator_names_what_is_wrong(x, weight, match):
    with pytest.raises(RuntimeError, match=match):
        torch.ops.pyfastpeft.dense_linear(x, weight, None)
    with pytest.raises(RuntimeError, match=r"weight must be \[8, K\] in the dtype of dy"):
        torch.ops.pyfastpeft.dense_linear_backward(x, weight)


def test_operators_of_matrices_say_what_is_none():
    ops, vector = torch.ops.pyfastpeft, torch.zeros(8)
    for operator, arguments in ((ops.dense_linear, (torch.zeros(3, 8), None)), (ops.swiglu, (vector,))):
        with pytest.raises(RuntimeError, match="must be a matrix"):
            operator(vector, *arguments)


@pytest.mark.parametrize("rows", [100, 520])
def test_the_number_of_threads_does_not_change_the_result(isa, rows, by_threads):
    x, weight, dy = torch.randn(rows, 96), torch.randn(200, 96), torch.randn(rows, 200)
    ops = torch.ops.pyfastpeft
    by_threads(lambda: (ops.dense_linear(x, weight, None), ops.dense_linear_backward(dy, weight)), 1, 2, 3, 8)


@pytest.mark.parametrize("trained", ["", "weight", "bias", "weight, bias"])
@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_gradients_once_and_twice(kind, trained):
    layer, x = kind(40, 40), torch.randn(3, 9, 40, requires_grad=True)
    nn.init.normal_(layer.bias)
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(name in trained)
    dy = torch.randn(3, 9, 40, requires_grad=True)
    leaves = [t for t in (x, *layer.parameters()) if t.requires_grad]

    def gradients(y):
        first = torch.autograd.grad(y, leaves, dy, create_graph=True)
        return *first, *torch.autograd.grad(sum(g.square().sum() for g in first), [dy, *leaves], materialize_grads=True)

    expected = layer(x)
    y = dense.kernel_linear(x, layer.weight.t() if kind is Conv1D else layer.weight, layer.bias)
    assert is_its(y)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    once, wanted = torch.autograd.grad(y, leaves, dy, retain_graph=True), gradients(expected)
    for got, gradient, leaf in zip(once, wanted, leaves, strict=False):
        torch.testing.assert_close(got, gradient, rtol=1e-5, atol=1e-5)
        assert got.stride() == leaf.stride()
    for got, gradient in zip(gradients(y), wanted, strict=True):
        torch.testing.assert_close(got, gradient, rtol=1e-5, atol=1e-5 * gradient.abs().max().item())


@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", [nn.Linear, Conv1D, FalconLinear])
def test_layers_of_halves_are_exact_where_they_use_it(pays, kind, dtype, rows):
    layer = Conv1D(333, 401) if kind is Conv1D else kind(401, 333)
    nn.init.normal_(layer.bias)
    layer.to(dtype)
    x, dy = torch.randn(2, rows, 401).to(dtype).requires_grad_(True), torch.randn(2, rows, 333).to(dtype)
    fuse_layers(nn.ModuleList([layer]))
    y = layer(x)
    assert is_its(y) and y.dtype is dtype
    leaves = x, layer.weight, layer.bias
    got = torch.autograd.grad(y, leaves, dy)
    x64, weight, bias = (t.detach().double().requires_grad_() for t in leaves)
    exact = F.linear(x64, weight.t() if kind is Conv1D else weight, bias)
    assert relative(y, exact) <= ERROR[dtype]
    for gradient, wanted in zip(got, torch.autograd.grad(exact, (x64, weight, bias), dy.double()), strict=True):
        assert gradient.dtype is dtype and relative(gradient, wanted) <= ERROR[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_torch_says_what_is_wrong_and_transforms_what_it_transforms(pays, dtype):
    plain = nn.Linear(400, 350).requires_grad_(False).to(dtype)
    layer, x = copy.deepcopy(plain), torch.randn(20, 400, dtype=dtype)
    fuse_layers(nn.ModuleList([layer]))
    assert type(layer.forward) is DenseForward
    for wrong in (torch.randn(20, 399, dtype=dtype), torch.tensor(1.0, dtype=dtype)):
        with pytest.raises(RuntimeError) as expected:
            plain(wrong)
        with pytest.raises(RuntimeError, match=re.escape(str(expected.value))):
            layer(wrong)
    for transform in (torch.func.grad, lambda f: torch.func.vmap(torch.func.grad(f))):
        got, expected = (transform(lambda x, m=m: m(x).float().square().sum())(x) for m in (layer, plain))
        assert torch.equal(got, expected)


@pytest.mark.parametrize("grad", [True, False])
def test_without_a_gradient_no_function_of_autograds_is_called(pays, monkeypatch, grad):
    layer, x = nn.Linear(24, 40).requires_grad_(False), torch.randn(27, 24, requires_grad=not grad)
    monkeypatch.setattr(dense, "_Linear", None)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(dense_linear(x, layer.weight, layer.bias), layer(x), rtol=1e-5, atol=1e-5)


def test_what_torch_computes(pays, monkeypatch):
    """Few rows of float32 with gradients, a gradient of its weight, none, float64, autocast, no kernels, a compiler."""
    frozen, x = nn.Linear(24, 40).requires_grad_(False), torch.randn(20, 24)
    assert dense.kernel_pays(x, frozen.weight, frozen.bias)
    assert not dense.kernel_pays(x[:16], frozen.weight, frozen.bias)
    assert not dense.kernel_pays(x[:0], frozen.weight, frozen.bias)
    assert not dense.kernel_pays(x.double(), frozen.weight.double(), None)
    assert not dense.kernel_pays(x.bfloat16(), frozen.weight, None)
    # Where it is slow at halves, it is so at any number of rows, but for the smallest products.
    for dtype in (torch.bfloat16, torch.float16):
        row, weight = torch.randn(1, 400, dtype=dtype), torch.randn(400, 400, dtype=dtype)
        assert dense.kernel_pays(row, weight, None) and not dense.kernel_pays(row[:, :300], weight[:, :300], None)
        assert not dense.kernel_pays(row[:0], weight, None)
    trained = nn.Parameter(frozen.weight)
    assert not dense.kernel_pays(x, trained, frozen.bias)
    with torch.no_grad():
        assert dense.kernel_pays(x, trained, frozen.bias)
    with torch.autocast("cpu", torch.bfloat16):
        assert not dense.kernel_pays(x, frozen.weight, frozen.bias)
    fuse_layers(nn.ModuleList([frozen]))
    assert type(frozen.forward) is DenseForward
    compiled = torch.compile(frozen, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), F.linear(x, frozen.weight, frozen.bias))
    monkeypatch.setattr(dense, "choose_plain", lambda device: fp.ops.Backend.REFERENCE)
    assert not dense.kernel_pays(x, frozen.weight, frozen.bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [3, 20])
def test_what_trains_has_all_its_gradients(pays, rows, dtype):
    leaves = [torch.randn(*s, dtype=dtype, requires_grad=True) for s in ((rows, 240), (280, 240), (280,))]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    y = dense_linear(*leaves)
    assert is_its(y) is (dtype is torch.bfloat16)
    dy = torch.randn(y.shape, dtype=dtype)
    got, expected = torch.autograd.grad(y, leaves, dy), torch.autograd.grad(F.linear(*exact), exact, dy.double())
    assert all(relative(g, e) <= ERROR[dtype] for g, e in zip(got, expected, strict=True))


def test_only_what_a_gradient_needs_is_kept():
    x, layer = torch.randn(20, 24), nn.Linear(24, 40)
    y = dense.kernel_linear(x, layer.weight, layer.bias)
    expected = torch.autograd.grad(layer(x).sum(), layer.parameters())
    with torch.no_grad():
        layer.weight.add_(1)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), layer.parameters()), expected)
    x.requires_grad_()
    y = dense.kernel_linear(x, layer.weight.detach(), layer.bias)
    expected = torch.autograd.grad(layer(x).sum(), x)
    with torch.no_grad():
        x.add_(1)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x), expected)


def test_more_rows_are_torchs_where_it_is_faster(monkeypatch):
    layer, x = nn.Linear(24, 40).requires_grad_(False), torch.randn(20, 24)
    monkeypatch.setattr(dense, "outruns_torch", lambda dtype: False)
    assert not dense.kernel_pays(x, layer.weight, layer.bias)
    monkeypatch.undo()
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    assert not dense.outruns_torch.__wrapped__(torch.float32)


@pytest.mark.parametrize("dtype, ask", [(torch.bfloat16, "bf16"), (torch.float16, "fp16")], ids=str)
def test_halves_are_the_kernels_where_onednn_has_no_products_of_them(monkeypatch, dtype, ask, isa):
    outruns, vectors = dense.outruns_torch.__wrapped__, isa.startswith("avx")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    for supported in (True, False):
        answers = {f"_is_mkldnn_{ask}_supported": lambda answer=supported: answer}
        monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace(**answers))
        assert outruns(dtype) is (vectors and not supported)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(torch.ops, "mkldnn", None)
    assert outruns(dtype) is vectors


@pytest.mark.parametrize("rows", [3, 20])
def test_a_compiler_sees_torchs_own(pays, rows):
    seen = []

    def backend(graph, _):
        seen.extend(node.target.__name__ for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    x, weight = torch.randn(rows, 24), torch.randn(8, 24)
    with torch.no_grad():
        compiled = torch.compile(dense_linear, fullgraph=True, backend=backend)
        assert torch.equal(compiled(x, weight), F.linear(x, weight))
    assert seen == ["linear"]


def test_opcheck_passes():
    x, weight, dy = torch.randn(5, 24), torch.randn(8, 24), torch.randn(5, 8)
    for bias in (None, torch.randn(8)):
        torch.library.opcheck(torch.ops.pyfastpeft.dense_linear.default, (x, weight, bias))
    torch.library.opcheck(torch.ops.pyfastpeft.dense_linear_backward.default, (dy, weight))


def test_rows_apart_take_no_copies_of_the_weight():
    x, weight = torch.randn(8, 4, 64).bfloat16().transpose(0, 1), torch.randn(2000, 64).bfloat16()
    with torch.no_grad(), torch.profiler.profile(profile_memory=True) as profile:
        dense_linear(x, weight)
    taken = [event.self_cpu_memory_usage for event in profile.events()]
    assert sum(bytes for bytes in taken if bytes > 0) < 2 * weight.nbytes


@pytest.mark.parametrize("rows", [3, 70])
@pytest.mark.parametrize("grad", [True, False])
def test_tangents_are_those_of_torch(pays, grad, rows):
    x, weight = torch.randn(rows, 64), torch.randn(48, 64)
    with forward_ad.dual_level(), torch.set_grad_enabled(grad):
        y = dense_linear(forward_ad.make_dual(x, 2 * x), weight)
        assert torch.equal(forward_ad.unpack_dual(y).tangent, F.linear(2 * x, weight))


@pytest.mark.parametrize("rows", [3, 20])
def test_a_bias_that_was_offloaded_is_an_error(pays, rows):
    with torch.no_grad(), pytest.raises(RuntimeError):
        dense_linear(torch.randn(rows, 24), torch.randn(8, 24), torch.empty(8, device="meta"))


@pytest.mark.parametrize("rows", [3, 20])
@pytest.mark.parametrize("shape", [(), (1,), (1, 8)], ids=str)
def test_a_bias_that_torch_spreads_is_left_to_it(pays, rows, shape):
    layer, x = nn.Linear(24, 8).requires_grad_(False), torch.randn(rows, 24)
    layer.bias = nn.Parameter(torch.randn(shape), requires_grad=False)
    expected = layer(x)
    fuse_layers(nn.ModuleList([layer]))
    with torch.no_grad():
        assert torch.equal(layer(x), expected) and torch.equal(dense_linear(x, layer.weight, layer.bias), expected)


def test_without_columns_there_is_the_bias():
    bias = torch.randn(8)
    with torch.no_grad():
        assert torch.equal(dense_linear(torch.randn(3, 0), torch.randn(8, 0), bias), bias.expand(3, 8))


class Coded(Tensor):
    """A weight in 8 bits that says it is one of float32, as torchao's are."""

    @staticmethod
    def __new__(cls, codes):
        return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)

    def __init__(self, codes):
        self.codes = codes

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is F.linear:
            return F.linear(args[0], args[1].codes.float(), *args[2:])
        if func is torch.addmm:
            return torch.addmm(*args[:2], args[2].codes.float())
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func, types, args, kwargs=None):
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(args[0].codes)
        raise NotImplementedError(func)


def test_a_weight_of_another_class_is_not_asked_for_its_transpose(pays):
    layer, x = Conv1D(8, 24), torch.randn(20, 24)
    layer.weight = nn.Parameter(Coded(torch.randint(-9, 9, (24, 8), dtype=torch.int8)), requires_grad=False)
    expected = layer(x)
    fuse_layers(nn.ModuleList([layer]))
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("rows", [3, 20])
def test_weights_of_another_class_are_left_to_torch(pays, rows):
    layer, x = nn.Linear(24, 8), torch.randn(rows, 24)
    layer.weight = nn.Parameter(Coded(torch.randint(-9, 9, (8, 24), dtype=torch.int8)), requires_grad=False)
    expected = layer(x)
    fuse_layers(nn.ModuleList([layer]))
    large_pages(layer.weight.data)
    with torch.no_grad():
        assert torch.equal(layer(x), expected) and torch.equal(dense_linear(x, layer.weight, layer.bias), expected)


def test_the_gradient_of_many_outputs_is_a_sum_of_sums(pays):
    """As that of a whole vocabulary is, whose weight and gradient have means: one running sum erred by 8e-5."""
    outputs, rows = 131072, 20
    weight, x = torch.randn(outputs, 32) * 0.02 + 0.01, torch.randn(rows, 32, requires_grad=True)
    dy = (torch.randn(rows, outputs) * 2).softmax(1)
    dy[torch.arange(rows), torch.randint(0, outputs, (rows,))] -= 1
    (dx,) = torch.autograd.grad(dense_linear(x, weight), x, dy)
    assert relative(dx, dy.double() @ weight.double()) < 1e-5


def test_layers_use_it_where_it_pays(pays, monkeypatch):
    model = nn.Sequential(nn.Linear(24, 48), nn.Tanh(), nn.Linear(48, 8)).requires_grad_(False)
    plain = copy.deepcopy(model)
    fuse_layers(model)
    rows = []
    spy = lambda *args: rows.append(args[0].shape) or dense.kernel_linear(*args)  # noqa: E731
    monkeypatch.setattr(dense_layers, "kernel_linear", spy)
    x = torch.randn(2, 30, 24)
    ours, theirs = x.clone().requires_grad_(True), x.clone().requires_grad_(True)
    torch.testing.assert_close(model(ours), plain(theirs), rtol=1e-5, atol=1e-5)
    assert rows == [(2, 30, 24), (2, 30, 48)]
    model(ours).sum().backward()
    plain(theirs).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-5)
    twin = copy.deepcopy(model)
    twin[0].weight.zero_()
    assert twin(x).std(dim=1).max() < 1e-6 and model(x).std(dim=1).min() > 1e-3
    remove(model)
    assert torch.equal(model(x), plain(x))


def test_a_layer_keeps_a_forward_of_its_own(pays):
    class Own(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    layer = Own(24, 8)
    fuse_layers(nn.ModuleList([layer]))
    assert "forward" not in vars(layer)


def test_elsewhere_layers_are_left_alone(monkeypatch):
    monkeypatch.setattr(dense_layers, "outruns_torch", lambda dtype: False)
    layer = nn.Linear(4, 4)
    fuse_layers(nn.ModuleList([layer]))
    assert "forward" not in vars(layer)


def test_a_model_with_adapters_uses_it_but_in_what_adapters_exchange(pays):
    def fast_in(model):
        return {name for name, m in model.named_modules() if isinstance(vars(m).get("forward"), DenseForward)}

    plain, base = tiny_llama(), fp.accelerate(tiny_llama())
    before = fast_in(base)
    config = fp.LoraConfig(target_modules=["q_proj"], modules_to_save=["k_proj", "lm_head"])
    model = fp.get_peft_model(base, config)
    fast = fast_in(model)
    assert any(name.endswith("q_proj.base_layer") for name in fast) and any(name.endswith("v_proj") for name in fast)
    assert not any("k_proj" in name or "lm_head" in name for name in fast)
    assert before and fast_in(model.unload()) == before
    model = fp.get_peft_model(plain, config)
    assert fast_in(model) and not fast_in(model.unload())


@pytest.fixture
def copied(pays):
    """A linear layer, and what stands in its place with a copy that trains."""
    layers = nn.Sequential(nn.Linear(240, 400), nn.Linear(400, 8)).to(torch.bfloat16)
    own, config = layers[0], fp.LoraConfig(target_modules=["1"], modules_to_save=["0"])
    return own, fp.get_peft_model(layers, config).base_model.model[0]


def test_a_copy_that_trains_uses_it_unless_somebody_looks(copied):
    own, wrapper = copied
    x, trained = torch.randn(20, 240).bfloat16(), wrapper.modules_to_save["default"]
    y, plain = wrapper(x), F.linear(x, own.weight, own.bias)
    assert is_its(y) and relative(y, own(x).double()) <= ERROR[torch.bfloat16]
    seen = []
    handle = trained.register_forward_hook(lambda module, args, y: seen.append(y))
    assert torch.equal(wrapper(x), plain) and len(seen) == 1
    handle.remove()
    trained.forward = lambda x: 2 * F.linear(x, own.weight, own.bias)
    assert torch.equal(wrapper(x), 2 * plain)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "convert", [Tensor.to_sparse, Tensor.to_sparse_csr, lambda t: torch.nested.nested_tensor([t, t])]
)
def test_a_copy_and_a_layer_take_what_torchs_takes(copied, convert):
    own, wrapper = copied
    own.float(), wrapper.float()
    x = convert(torch.randn(20, 240))
    own.bias = wrapper.modules_to_save["default"].bias = None
    expected = own(x)
    fuse_layers(nn.ModuleList([own]))
    for y in (wrapper(x), own(x)):
        assert torch.equal(*(t.unbind()[1] if t.is_nested else t.to_dense() for t in (y, expected)))


def test_what_adapters_train_uses_it(pays, monkeypatch):
    """A head of their own, single tokens of one, bottlenecks."""
    calls, linear = [], dense.kernel_linear
    monkeypatch.setattr(dense, "kernel_linear", lambda x, weight, bias: calls.append(weight) or linear(x, weight, bias))
    model, ids = tiny_llama().to(torch.bfloat16), torch.randint(0, 256, (1, 200))
    lora = {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    head = fp.get_peft_model(copy.deepcopy(model), fp.LoraConfig(**lora, modules_to_save=["lm_head"]))
    loss = head(ids, labels=ids).loss
    assert [weight is head.get_output_embeddings().weight for weight in calls] == [True]
    loss.backward()
    calls.clear()
    lora["trainable_token_indices"] = {"embed_tokens": [*range(50)], "lm_head": [*range(50)]}
    fp.get_peft_model(copy.deepcopy(model), fp.LoraConfig(**lora))(ids)
    assert (50, 64) in [weight.shape for weight in calls]
    calls.clear()
    fp.get_peft_model(model, fp.BottleneckConfig(reduction_factor=2))(ids)
    assert {(32, 64), (64, 32)} <= {weight.shape for weight in calls}


@pytest.mark.parametrize("trained", [False, True])
def test_logits_are_its_whether_they_were_put_off_or_not(pays, trained):
    exact, ids = tiny_llama(), torch.randint(0, 256, (1, 30))
    exact.lm_head.requires_grad_(trained)
    model = fp.accelerate(copy.deepcopy(exact).to(torch.bfloat16))
    logits, expected = model(ids).logits * 1, exact.double()(ids).logits
    assert is_its(logits) and not is_its(expected)
    gradients = [
        torch.autograd.grad(y.square().mean(), m.model.norm.weight)[0] for y, m in ((logits, model), (expected, exact))
    ]
    assert relative(*gradients) <= 0.01
