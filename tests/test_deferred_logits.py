"""Deferred logits: the loss is the ordinary one, and whoever looks at the logits finds them."""

import copy
import inspect
import io
import pickle
import threading
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from architectures import copy_adapters, dequantized, inputs, make, randomize, relative
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    Trainer,
    TrainingArguments,
)

import pyfastpeft as fp
from pyfastpeft.integrations import deferred_logits
from pyfastpeft.integrations.accelerate import unfuse
from pyfastpeft.integrations.deferred_logits import (
    DeferredLogits,
    _DeferringForward,
    chunked_cross_entropy,
    defer_logits,
)
from pyfastpeft.integrations.forwards import install
from pyfastpeft.ops import backends, cross_entropy_

IGNORED = -100
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 200,
}
CONFIGS = [
    LlamaConfig(**SMALL),
    MixtralConfig(**SMALL, num_local_experts=4, output_router_logits=True),
    GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=200, bos_token_id=0, eos_token_id=0),
    Gemma2Config(**SMALL),  # changes the head's output: the ordinary way, by itself
]

# Logits that are read are compared bit for bit with those that are never put off: torch's, once forwards are removed.
pytestmark = pytest.mark.usefixtures("layers_of_torch")


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(deferred_logits, "_CHUNK_LOGITS", 200 * 7)
    monkeypatch.setattr(deferred_logits, "_CPU_ROWS", 1)


@pytest.fixture
def computed(monkeypatch):
    """The rows of every product of a head, but those of the operator that computes head and loss."""
    rows = []
    project = deferred_logits._Call.project
    monkeypatch.setattr(
        deferred_logits._Call, "project", lambda call, h: rows.append(h[..., 0].numel()) or project(call, h)
    )
    return rows


@pytest.fixture(params=[True, False], ids=["operator", "torch"])
def operator(request, monkeypatch):
    """Whether an operator computes a head and its loss, as on CPUs where it serves; else torch and ``computed``."""
    if not request.param:
        monkeypatch.setattr(deferred_logits._Call, "weight", lambda call: None)
    return request.param


def trained_model(config, dtype=torch.float32):
    model = AutoModelForCausalLM.from_config(config).to(dtype).train()
    model = fp.get_peft_model(model, fp.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=4))
    randomize(model)
    return model


def labelled_batch():
    ids = torch.randint(0, 200, (3, 17))
    labels = ids.clone()
    labels[:, :9] = IGNORED
    labels[1] = IGNORED
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}


def loss_and_gradients(model, batch, loss=lambda outputs: outputs.loss, **kwargs):
    model.zero_grad()
    torch.manual_seed(0)
    value = loss(model(**batch, **kwargs))
    value.backward()
    return value.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_same(one, other):
    torch.testing.assert_close(one[0], other[0], rtol=1e-5, atol=1e-6)
    assert one[1].keys() == other[1].keys()
    for name, gradient in one[1].items():
        assert relative(gradient, other[1][name]) < 1e-5, name


def test_second_derivatives_are_an_error(operator):
    model = trained_model(CONFIGS[0])
    trained = [p for p in model.parameters() if p.requires_grad]
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(model(**labelled_batch()).loss, trained, create_graph=True)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.model_type)
@pytest.mark.parametrize("kwargs", [{}, {"num_items_in_batch": 37}], ids=["mean", "num_items"])
def test_a_models_own_loss_is_the_ordinary_one(config, kwargs, operator, computed):
    model, batch = trained_model(config), labelled_batch()
    deferred = loss_and_gradients(model, batch, **kwargs)
    chunks = [] if operator else [7, 7, 2]  # 16 rows with a label
    assert computed == ([51] if config.model_type == "gemma2" else chunks)
    defer_logits(model, False)
    assert_same(deferred, loss_and_gradients(model, batch, **kwargs))


@pytest.mark.parametrize("architecture", ["llama", "opt", "t5", "phi"])
def test_architectures_that_compute_their_loss_otherwise(architecture):
    model = fp.get_peft_model(make(architecture).train(), fp.LoraConfig(target_modules="all-linear", r=4))
    randomize(model)
    batch = inputs(architecture)
    deferred = loss_and_gradients(model, batch)
    defer_logits(model, False)
    assert_same(deferred, loss_and_gradients(model, batch))


@pytest.mark.parametrize("training", [True, False])
def test_lora_on_a_head_in_4_bits_computes_what_it_does_over_the_decoded_weight(training):
    base, config = make("llama"), fp.LoraConfig(target_modules=["q_proj", "lm_head"], r=4)
    base.lm_head = fp.nn.Linear4bit.from_linear(base.lm_head)
    expected = fp.get_peft_model(dequantized(base), config).train(training)
    model = fp.get_peft_model(fp.accelerate(base), config).train(training)
    assert isinstance(base.lm_head.base_layer.forward, _DeferringForward)
    randomize(expected)
    copy_adapters(expected, model)
    batch = inputs()
    assert_same(loss_and_gradients(model, batch), loss_and_gradients(expected, batch))
    assert relative(model(**batch).logits, expected(**batch).logits) < 1e-5
    with model.disable_adapter(), expected.disable_adapter():
        assert relative(model(**batch).logits, expected(**batch).logits) < 1e-5


def shifted(outputs, labels):
    logits = outputs.logits[..., :-1, :].contiguous()
    return F.cross_entropy(logits.view(-1, logits.size(-1)).float(), labels[..., 1:].reshape(-1))


LOSSES = {
    "shifted": shifted,
    "flattened": lambda o, y: F.cross_entropy(o.logits.flatten(0, 1), y.flatten(), reduction="sum"),
    "criterion": lambda o, y: nn.CrossEntropyLoss()(o["logits"][:, 1:].reshape(-1, 200), y[:, 1:].reshape(-1)),
    "transposed": lambda o, y: F.cross_entropy(o.logits.transpose(1, 2), y),
    "smoothed": lambda o, y: F.cross_entropy(o[1].view(-1, 200), y.view(-1), label_smoothing=0.1),
    "two losses": lambda o, y: o.loss + o.logits.float().logsumexp(-1).square().mean(),
    "read first": lambda o, y: o.logits.mean() + F.cross_entropy(o.logits.view(-1, 200), y.view(-1)),
    "by name": lambda o, y: F.cross_entropy(input=o.logits.view(-1, 200), target=y.view(-1)),
    "as a target": lambda o, y: F.cross_entropy(torch.ones(51, 200).cumsum(1) / 99, o.logits.view(-1, 200)),
    "weighted": lambda o, y: F.cross_entropy(o.logits.view(-1, 200), y.view(-1), torch.arange(200) / 99),
    "old sum": lambda o, y: F.cross_entropy(o.logits.view(-1, 200), y.view(-1), size_average=False),
    "old rows": lambda o, y: F.cross_entropy(o.logits.view(-1, 200), y.view(-1), reduce=False)[14],
    "probabilities": lambda o, y: F.cross_entropy(o.logits.view(-1, 200), torch.ones(51, 200).cumsum(1) / 99),
    "labels of a byte": lambda o, y: F.cross_entropy(o.logits.view(-1, 200), y.view(-1).byte(), ignore_index=156),
    "per row": lambda o, y: F.cross_entropy(o.logits.view(-1, 200), y.view(-1), reduction="none")[3],
    "some columns": lambda o, y: o.logits[..., 5:9].square().sum() + o.logits[0, 1, 2] + o.logits[:, -1].sum(),
}


@pytest.mark.parametrize("name", LOSSES)
def test_any_function_of_the_logits_has_its_value_and_gradient(name, operator):
    model, batch = trained_model(CONFIGS[0]), labelled_batch()

    def loss(outputs):
        return LOSSES[name](outputs, batch["labels"])

    deferred = loss_and_gradients(model, batch, loss)
    defer_logits(model, False)
    assert_same(deferred, loss_and_gradients(model, batch, loss))


@pytest.mark.parametrize("name", ["shifted", "flattened", "criterion"])
def test_hand_written_losses_run_in_chunks(name, operator, computed):
    model, batch = trained_model(CONFIGS[0]), labelled_batch()
    outputs = model(input_ids=batch["input_ids"])
    LOSSES[name](outputs, batch["labels"]).backward()
    assert not computed if operator else 0 < max(computed) <= 7


class Squares(torch.autograd.Function):
    """Something that does not ask ``__torch_function__``."""

    @staticmethod
    def forward(ctx, logits):
        ctx.save_for_backward(logits)
        return logits.square().sum()

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad * ctx.saved_tensors[0]


@pytest.mark.parametrize("arranged", [lambda t: t, lambda t: t[:, 1:].reshape(-1, 200).float()], ids=["as is", "rows"])
def test_a_gradient_that_arrives_at_the_deferred_tensor_reaches_the_model(arranged):
    model, batch = trained_model(CONFIGS[0]), labelled_batch()

    def loss(outputs):
        return Squares.apply(arranged(outputs.logits))

    deferred = loss_and_gradients(model, batch, loss)
    defer_logits(model, False)
    assert_same(deferred, loss_and_gradients(model, batch, loss))


@pytest.mark.parametrize("head", ["dense", "4-bit", "parametrized"])
@pytest.mark.parametrize(
    "loss",
    [
        lambda t: Squares.apply(t) + t.exp().mean(),
        lambda t: t.exp().mean() + Squares.apply(t),
        lambda t: Squares.apply(t[:, 1:].bfloat16().view(-1, 64)) + t.float().exp().mean() + Squares.apply(t.double()),
        lambda t: t.neg_().exp().mean() + Squares.apply(t),
        lambda t: 0 * t.mul_(3)[0, 0, 0].detach() + Squares.apply(t),
    ],
    ids=["first", "last", "forms", "changed", "changed before"],
)
def test_such_a_gradient_may_arrive_beside_that_of_another_reader(loss, head):
    model = make("llama").train().requires_grad_(False)
    if head == "parametrized":
        parametrize.register_parametrization(model.lm_head, "weight", Squared())
    elif head == "4-bit":
        model.lm_head = fp.nn.Linear4bit.from_linear(model.lm_head)
    hidden, gradients = torch.randn(2, 3, 32, requires_grad=True), []
    for defer in (True, False):
        defer_logits(model, defer)
        logits = model.lm_head(hidden)
        assert isinstance(logits, DeferredLogits) == defer
        gradients += torch.autograd.grad(loss(logits), hidden)
    assert relative(*gradients) < 1e-5


def test_such_a_gradient_may_arrive_twice_and_is_not_differentiated():
    model, hidden = make("llama").train().requires_grad_(False), torch.randn(3, 32, requires_grad=True)
    defer_logits(model)
    loss = Squares.apply(model.lm_head(hidden))
    first, again = (torch.autograd.grad(loss, hidden, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, again)
    (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(gradient.sum(), hidden)


def test_the_logits_are_there_for_whoever_reads_them(operator, computed):
    model, batch = trained_model(CONFIGS[0]), labelled_batch()
    outputs = model(**batch)
    logits = outputs.logits
    assert isinstance(logits, DeferredLogits) and isinstance(logits, torch.Tensor)
    assert logits.shape == (3, 17, 200) == logits.size() and logits.dim() == 3 and len(logits) == 3
    assert logits.dtype == torch.float32 and logits.requires_grad and logits.device.type == "cpu"
    assert sum(computed) == (0 if operator else 16), "describing them computes nothing"
    with torch.no_grad():
        best = logits.argmax(-1)
    model.eval()
    expected = model(**batch).logits
    assert type(expected) is torch.Tensor
    assert torch.equal(best, expected.argmax(-1)) and torch.equal(logits.detach(), expected)
    assert torch.equal(torch.cat([logits, logits])[3:], expected) and "tensor" in repr(logits)
    assert (logits.detach().numpy() == expected.detach().numpy()).all()
    assert computed.count(51) == 1
    copied = pickle.loads(pickle.dumps(logits.detach()))
    assert torch.equal(copied, expected)


def test_logits_that_were_first_read_in_inference_mode_have_their_gradient_after_it():
    model, batch = trained_model(CONFIGS[0]), labelled_batch()

    def loss(outputs):
        with torch.inference_mode():
            assert not outputs.logits.view(-1, 200).argmax(-1).requires_grad
        return outputs.logits.float().square().mean() + shifted(outputs, batch["labels"])

    deferred = loss_and_gradients(model, batch, loss)
    defer_logits(model, False)
    assert_same(deferred, loss_and_gradients(model, batch, loss))


def test_a_change_in_place_is_seen_by_every_view():
    model, batch = trained_model(CONFIGS[0]), labelled_batch()
    logits = model(input_ids=batch["input_ids"]).logits
    rows = logits.view(-1, 200)
    with torch.no_grad():
        rows[0] = 7.0
        logits[1].fill_(3.0)
    assert (logits[0, 0] == 7).all() and (rows[17:34] == 3).all()
    expected = F.cross_entropy(rows.detach().clone(), torch.arange(51))
    torch.testing.assert_close(F.cross_entropy(rows, torch.arange(51)), expected)


def argmax_of_a_copy(logits, labels):
    rows = logits[:, :-1].contiguous()
    rows.argmax(-1)
    return F.cross_entropy(rows.view(-1, 200), labels[:, 1:].flatten())


def change_of_a_copy(logits, labels):
    logits = logits.float()
    logits[..., 5] = -1e4
    return logits.div_(0.1).softmax(-1).square().sum() + logits[:, 1:].reshape(-1, 200)[0, 0]


def change_of_a_copy_in_its_dtype(logits, labels):
    by_name, by_place = logits.to(logits.dtype, copy=True), logits.to(logits.dtype, False, True)
    logits.mul_(10)
    return (by_name + by_place).square().mean() + logits.mean()


def change_of_rows(logits, labels):
    rows = logits[:, :-1].reshape(-1, 200)
    rows.mul_(10)
    return F.cross_entropy(rows, labels[:, 1:].flatten()) + logits.square().mean()


def change_beside_a_copy(logits, labels):
    rows, wide = logits[:, 1:].contiguous(), logits.double()
    logits.mul_(10)
    return (rows + wide[:, 1:]).square().mean() + logits.mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "loss",
    [argmax_of_a_copy, change_of_a_copy, change_of_a_copy_in_its_dtype, change_of_rows, change_beside_a_copy],
    ids=lambda loss: loss.__name__,
)
def test_copies_are_copies_and_views_are_views(loss, dtype):
    model, batch = trained_model(CONFIGS[0], dtype), labelled_batch()
    labels = batch["labels"].clamp(min=0)
    values = []
    for defer in (True, False):
        defer_logits(model, defer)
        values.append(loss(model(input_ids=batch["input_ids"]).logits, labels))
    assert torch.equal(*values)


class Doubled(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


class DoubledWeight(nn.Parameter):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        result = super().__torch_function__(func, types, args, kwargs or {})
        return 2 * result if func is F.linear else result


class Squared(nn.Module):
    def forward(self, weight):
        return weight * weight


@pytest.mark.parametrize("head", ["product", "biased", "forward", "weight", "parametrized", "autocast", "plain_torch"])
def test_a_head_that_is_more_than_a_product_or_that_no_operator_serves_is_called(head, computed, request):
    model = make("llama").train()
    if head == "forward":
        model.lm_head.__class__ = Doubled
    elif head == "weight":
        model.lm_head.weight = DoubledWeight(model.lm_head.weight.data)
    elif head == "parametrized":
        parametrize.register_parametrization(model.lm_head, "weight", Squared())
    elif head == "biased":
        model.lm_head.bias = nn.Parameter(torch.randn(64))
    elif head == "plain_torch":
        request.getfixturevalue(head)
    model.lm_head.requires_grad_(False)
    hidden, labels = torch.randn(6, 32, requires_grad=True), torch.arange(6)
    found = []
    for defer in (True, False):
        defer_logits(model, defer)
        with torch.autocast("cpu", torch.bfloat16, enabled=head == "autocast"):
            loss = F.cross_entropy(model.lm_head(hidden).float(), labels)
        found.append((loss, *torch.autograd.grad(loss, hidden)))
    tolerance = 1e-2 if head == "autocast" else 1e-5
    torch.testing.assert_close(*found, rtol=tolerance, atol=tolerance / 10)
    assert bool(computed) == (head != "product")


@pytest.mark.parametrize("read", [torch.sum, lambda t: F.cross_entropy(t.view(6, -1), torch.arange(6))])
def test_a_head_whose_input_was_changed_in_place_is_an_error(read):
    model = make("llama").train().requires_grad_(False)
    defer_logits(model)
    hidden = torch.randn(2, 3, 32)
    logits, read_before = model.lm_head(hidden[:]), model.lm_head(hidden)
    expected = read_before.clone()
    hidden.mul_(2)
    with pytest.raises(RuntimeError, match=r"changed in place.*defer_logits"):
        read(logits)
    assert torch.equal(read_before.clone(), expected)


@pytest.mark.parametrize("read", [torch.sum, lambda t: F.cross_entropy(t.view(6, -1), torch.arange(6))])
def test_a_head_that_has_other_parameters_since_gives_the_logits_of_its_call(read, operator):
    plain = make("llama").lm_head.train().requires_grad_(False)
    deferring = copy.deepcopy(plain)
    install(deferring, _DeferringForward)
    hidden, brought, found = torch.randn(2, 3, 32, requires_grad=True), {"weight": plain.weight * 2}, []
    for head in (deferring, plain):
        calls = head(hidden), torch.func.functional_call(head, brought, (hidden,))
        head.weight = nn.Parameter(torch.zeros(64, 32), requires_grad=False)
        head.bias = nn.Parameter(torch.ones(64), requires_grad=False)
        found.append([(loss, *torch.autograd.grad(loss, hidden)) for loss in map(read, calls)])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("parametrized", [False, True])
def test_a_head_whose_weight_was_changed_in_place_is_an_error(parametrized):
    head = make("llama").lm_head.train().requires_grad_(False)
    if parametrized:
        parametrize.register_parametrization(head, "weight", Squared())
    install(head, _DeferringForward)
    logits = head(torch.randn(2, 3, 32))
    next(head.parameters()).mul_(2)
    with pytest.raises(RuntimeError, match=r"changed in place.*defer_logits"):
        logits.sum()


def test_inference_tensors_are_projected_at_once():
    model = make("llama").train().requires_grad_(False)
    defer_logits(model)
    with torch.inference_mode():
        hidden = torch.randn(2, 3, 32)
    assert torch.equal(model.lm_head(hidden), F.linear(hidden, model.lm_head.weight))
    with torch.inference_mode():
        model.lm_head.weight = nn.Parameter(torch.randn(64, 32), requires_grad=False)
    assert torch.equal(model.lm_head(hidden), F.linear(hidden, model.lm_head.weight))


def check_alike(*calls: Callable[[Tensor], Tensor]) -> None:
    """Whether these give of deferred logits what they give of the logits."""
    batch = labelled_batch()
    del batch["labels"]
    model = trained_model(CONFIGS[0])
    expected = model(**batch).logits.detach()
    for call in calls:
        got, wanted = call(model(**batch).logits), call(expected)
        assert got.shape == wanted.shape and got.dtype == wanted.dtype and torch.equal(got, wanted)


def test_arguments_may_have_their_names():
    check_alike(
        lambda t: t.to("cpu"),
        lambda t: t.to(device="cpu"),
        lambda t: t.to(dtype=torch.float64),
        lambda t: t.float(memory_format=torch.preserve_format),
        lambda t: t.contiguous(memory_format=torch.contiguous_format),
        lambda t: t.view(size=(-1, 200)),
        lambda t: t.flatten(end_dim=1),
        lambda t: torch.reshape(input=t, shape=(-1, 200)),
    )


def test_slices_and_views_are_those_of_the_logits():
    check_alike(
        lambda t: t[1:],
        lambda t: t[1],
        lambda t: t[None],
        lambda t: t[torch.tensor([2, 0])],
        lambda t: t[:, torch.arange(17) > 3],
        lambda t: t[0, 1:],
        lambda t: t[...],
        lambda t: t[..., :, :, :],
        lambda t: t[:, ..., 3:4],
        lambda t: t[1:, ..., :],
        lambda t: t.view(-1, 100),
        lambda t: t.view(3, 17, 2, 100),
        lambda t: t.view(torch.int32),
    )


def test_classes_that_are_not_last_are_where_torch_looks_for_them():
    model, hidden = make("llama").train().requires_grad_(False), torch.randn(2, 64, 32)
    defer_logits(model)
    labels = torch.randint(0, 64, (2, 64))
    expected = F.cross_entropy(F.linear(hidden, model.lm_head.weight), labels)
    torch.testing.assert_close(F.cross_entropy(model.lm_head(hidden), labels), expected)


def test_a_view_that_torch_refuses_is_refused():
    model, batch = trained_model(CONFIGS[0]), labelled_batch()
    with pytest.raises(RuntimeError, match="view size is not compatible"):
        model(input_ids=batch["input_ids"]).logits[:, :-1].view(-1, 200)
    with pytest.raises(IndexError, match="too many indices"):
        model(input_ids=batch["input_ids"]).logits[:, :, :, :]


def test_observing_gradients_of_logits_that_the_loss_did_without_is_an_error():
    model, batch = trained_model(CONFIGS[0]), labelled_batch()
    outputs = model(**batch)
    with pytest.raises(RuntimeError, match="defer_logits"):
        outputs.logits.retain_grad()
    outputs = model(input_ids=batch["input_ids"])
    seen = []
    outputs.logits.register_hook(seen.append)
    F.cross_entropy(outputs.logits.view(-1, 200), batch["labels"].view(-1)).backward()
    assert seen[0].shape == (3, 17, 200)


TOLD_OF_INPUTS = pytest.mark.skipif(
    "has_torch_function" not in inspect.getsource(torch.autograd.backward),
    reason="this torch's backward tells no tensor that it is among its inputs",
)


@pytest.mark.parametrize("read", [False, True])
@pytest.mark.parametrize(
    "ask",
    [
        lambda loss, logits: torch.autograd.grad(loss, logits, allow_unused=True),
        pytest.param(lambda loss, logits: torch.autograd.backward(loss, inputs=[logits]), marks=TOLD_OF_INPUTS),
        pytest.param(lambda loss, logits: loss.backward(inputs=logits), marks=TOLD_OF_INPUTS),
        lambda loss, logits: logits.register_hook(print),
    ],
    ids=["grad", "backward", "method", "hook"],
)
def test_asking_for_the_gradient_of_logits_that_the_loss_did_without_is_an_error(ask, read):
    outputs = trained_model(CONFIGS[0])(**labelled_batch())
    if read:
        outputs.logits.sum()
    with pytest.raises(RuntimeError, match="defer_logits"):
        ask(outputs.loss, outputs.logits)


@pytest.mark.parametrize(
    "ask",
    [
        lambda loss, logits: torch.autograd.grad(loss, logits),
        pytest.param(lambda loss, logits: (loss.backward(inputs=[logits]), logits.grad)[1:], marks=TOLD_OF_INPUTS),
    ],
    ids=["grad", "backward"],
)
def test_gradients_of_logits_that_were_read_are_there(ask):
    model, ids = trained_model(CONFIGS[0]), labelled_batch()["input_ids"]
    logits = model(input_ids=ids).logits
    (gradient,) = ask(logits.square().sum() / 2, logits)
    assert torch.equal(gradient, logits)


def test_autocast_holds_for_logits_that_are_computed_after_it():
    model, batch = trained_model(CONFIGS[0]), labelled_batch()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(**batch)
    assert outputs.logits.dtype == torch.bfloat16 and outputs.loss.dtype == torch.float32
    defer_logits(model, False)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(**batch)
    assert torch.equal(outputs.logits, expected.logits)
    torch.testing.assert_close(outputs.loss, expected.loss, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_loss_has_the_dtype_that_torch_gives_it(autocast):
    model = make("llama").to(torch.float32 if autocast else torch.bfloat16).train().requires_grad_(False)
    hidden, labels = torch.randn(6, 32).to(model.dtype), torch.arange(6)
    losses = []
    for defer in (True, False):
        defer_logits(model, defer)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = model.lm_head(hidden)
            losses.append(F.cross_entropy(logits, labels))
        assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("change", ["trained head", "hooked head", "no_grad", "eval", "logits_to_keep"])
def test_where_deferring_would_not_do_the_logits_are_computed_at_once(change):
    model, batch = trained_model(CONFIGS[0]), {"input_ids": torch.randint(0, 200, (2, 5))}
    head = model.get_output_embeddings()
    if change == "trained head":
        head.weight.requires_grad_(True)
    elif change == "hooked head":
        head.register_forward_hook(lambda *_: None)
    elif change == "eval":
        model.eval()
    with torch.set_grad_enabled(change != "no_grad"):
        logits = model(**batch, logits_to_keep=2 if change == "logits_to_keep" else 0).logits
    assert (type(logits) is torch.Tensor) == (change != "logits_to_keep")
    assert logits.shape == (2, 2 if change == "logits_to_keep" else 5, 200)


MODES = pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=lambda m: m.__name__)


@MODES
@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.model_type)
@pytest.mark.parametrize("training", [False, True])
def test_an_evaluation_with_labels_makes_no_more_logits_than_training(config, mode, training, operator, computed):
    model, batch = trained_model(config).train(training), labelled_batch()

    def evaluated():
        torch.manual_seed(0)  # of dropout
        with mode():
            return model(**batch)

    outputs = evaluated()
    chunks = [] if operator else [7, 7, 2]  # 16 rows with a label
    assert computed == ([51] if config.model_type == "gemma2" else chunks)
    defer_logits(model, False)
    expected = evaluated()
    torch.testing.assert_close(outputs.loss, expected.loss, rtol=1e-5, atol=1e-6)
    assert torch.equal(outputs.logits, expected.logits)


PEFT = {
    "lora": fp.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"),
    "prompt": fp.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prefix": fp.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}


@MODES
@pytest.mark.parametrize("head", ["dense", "4-bit"])
@pytest.mark.parametrize("method", [None, *PEFT])
@pytest.mark.parametrize("autocast", [False, True])
def test_an_evaluation_of_any_adapter_has_the_loss_and_the_logits_of_one_that_puts_nothing_off(
    method, head, mode, autocast
):
    model = make("llama").requires_grad_(False)
    if head == "4-bit":
        model.lm_head = fp.nn.Linear4bit.from_linear(model.lm_head)
    fp.accelerate(model)
    model = (model if method is None else fp.get_peft_model(model, PEFT[method])).eval()
    found, batch = [], inputs()
    for defer in (True, False):
        defer_logits(model, defer)
        with mode(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss, logits = model(**batch, return_dict=False)[:2]
        assert isinstance(logits, DeferredLogits) == defer
        found.append((loss, logits))
    tolerance = 2e-3 if autocast else 1e-5
    torch.testing.assert_close(found[0][0], found[1][0], rtol=tolerance, atol=tolerance)
    assert torch.equal(found[0][1], found[1][1])


def saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


EVALUATED = {
    "argmax": lambda o: o.logits.argmax(-1),
    "topk": lambda o: o.logits.topk(3).values,
    "softmax": lambda o: o.logits[:, :-1].softmax(-1),
    "cpu": lambda o: o.logits.cpu(),
    "float": lambda o: o.logits.float(),
    "numpy": lambda o: torch.from_numpy(o.logits.numpy().copy()),
    "saved": lambda o: saved(o).logits,
    "pickled": lambda o: pickle.loads(pickle.dumps(o.logits)),
    "copied": lambda o: copy.deepcopy(o).logits,
    "tuple": lambda o: torch.cat([tuple(o.values())[1], o.to_tuple()[1]]),
    "detached": lambda o: o.logits.detach(),
    "padded": lambda o: F.pad(o.logits, (0, 0, 0, 2)),
    "changed": lambda o: (o.logits.view(-1, 64)[0].fill_(3), o.logits + 0)[1],
    "another shape": lambda o: torch.tensor([o.logits.unsqueeze_(0).dim(), *o.logits.shape]),
    "may have a gradient": lambda o: torch.tensor([o.logits.requires_grad, o.logits.is_leaf]),
    "own loss": lambda o: F.cross_entropy(o.logits.float().view(-1, 64), torch.arange(18)),
}


@MODES
@pytest.mark.parametrize("name", EVALUATED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_whatever_reads_the_logits_of_an_evaluation_has_their_values(name, mode, dtype):
    model, batch, found = fp.accelerate(make("llama", dtype).requires_grad_(False)), inputs(), []
    for defer in (True, False):
        defer_logits(model, defer)
        with mode():
            found.append(EVALUATED[name](model(**batch)))
    tolerance = 1e-5 if dtype == torch.float32 else 1e-3
    torch.testing.assert_close(torch.as_tensor(found[0]), found[1], rtol=tolerance, atol=tolerance)


def test_a_gradient_may_be_asked_for_at_the_logits_of_an_evaluation():
    model, batch = fp.accelerate(make("llama").requires_grad_(False)), inputs()
    with torch.no_grad():
        logits = model(**batch).logits
    logits.requires_grad_()
    assert logits.requires_grad
    assert torch.equal(torch.autograd.grad(logits.square().sum() / 2, logits)[0], logits)


@pytest.mark.parametrize("preprocess", [None, lambda logits, labels: logits.argmax(-1)], ids=["logits", "argmax"])
@pytest.mark.parametrize("bf16", [False, True])
def test_a_trainer_evaluates_the_logits(preprocess, bf16, tmp_path):
    model, found = trained_model(CONFIGS[0]), []
    rows = [{"input_ids": torch.arange(n), "labels": torch.arange(n)} for n in (5, 9, 7)]
    args = TrainingArguments(
        tmp_path, per_device_eval_batch_size=1, bf16=bf16, use_cpu=True, report_to=[], label_names=["labels"]
    )
    for defer in (True, False):
        defer_logits(model, defer)
        trainer = Trainer(
            model,
            args,
            eval_dataset=rows,
            compute_metrics=lambda p: {"sum": p.predictions.astype("float64").sum(), "mean": p.label_ids.mean()},
            preprocess_logits_for_metrics=preprocess,
        )
        metrics = trainer.evaluate()
        found.append([metrics[f"eval_{name}"] for name in ("loss", "sum", "mean")])
    assert found[0] == pytest.approx(found[1], rel=1e-4 if bf16 else 1e-5)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.lm_head.weight.mul_(2),
        lambda model: setattr(model.lm_head.weight, "data", model.lm_head.weight * 2),
        lambda model: model.bfloat16(),
        lambda model: model.load_state_dict(make("llama").state_dict()),
        lambda model: model.load_state_dict(make("llama").state_dict(), assign=True),
    ],
    ids=["in place", "data", "converted", "loaded", "exchanged"],
)
def test_logits_of_an_evaluation_whose_weights_changed_are_those_of_its_call_or_an_error(change, request):
    model, batch = fp.accelerate(make("llama").requires_grad_(False)), inputs()
    with torch.no_grad():
        logits, expected = model(**batch).logits, model(**batch).logits.clone()
        change(model)
    if "exchanged" in request.node.name:
        assert torch.equal(logits, expected)
    else:
        with pytest.raises(RuntimeError, match=r"changed in place.*defer_logits"):
            logits.sum()


@pytest.mark.parametrize(
    "call",
    [
        lambda model, ids: model(input_ids=ids).logits,
        lambda model, ids: model(input_ids=ids, labels=None).logits,
        lambda model, ids: model.lm_head(torch.randn(2, 3, 32)),
        lambda model, ids: model.generate(ids, return_dict_in_generate=True, output_logits=True).logits[0],
        lambda model, ids: torch.compile(model, backend="eager")(input_ids=ids, labels=ids).logits,
        lambda model, ids: torch.enable_grad()(model)(input_ids=ids, labels=ids).logits,
        lambda model, ids: torch.func.vmap(
            lambda x, row: model(inputs_embeds=x[None], labels=row[None], use_cache=False).logits
        )(model.get_input_embeddings()(ids), ids),
    ],
    ids=["without labels", "labels of None", "the head", "generate", "compiled", "gradients", "vmap"],
)
@pytest.mark.parametrize("before", [None, ValueError])
def test_without_labels_or_where_others_look_on_an_evaluation_computes_its_logits_at_once(call, before):
    model, ids = make("gpt2").requires_grad_(False), inputs()["input_ids"]
    defer_logits(model)

    def fail(*_):
        raise before

    with torch.no_grad():
        if before is not None:
            hook = model.base_model.register_forward_hook(fail)
            with pytest.raises(before):
                model(input_ids=ids, labels=ids)
            hook.remove()
        assert type(call(model, ids)) is torch.Tensor


def test_an_evaluation_in_one_thread_is_none_in_another():
    model, batch, inside = fp.accelerate(make("llama").requires_grad_(False)), inputs(), []

    @torch.no_grad()
    def without_labels():
        inside.append(type(model(input_ids=batch["input_ids"]).logits))

    def meanwhile(*_):
        if not inside:
            inside.append(None)
            thread = threading.Thread(target=without_labels)
            thread.start()
            thread.join()

    model.model.register_forward_hook(meanwhile)
    with torch.no_grad():
        assert isinstance(model(**batch).logits, DeferredLogits)
    assert inside == [None, torch.Tensor]


def test_a_model_that_evaluates_so_is_copied_wrapped_and_exported_as_before():
    model, batch = fp.accelerate(make("llama").requires_grad_(False)), inputs() | {"use_cache": False}
    assert "forward" not in vars(model)
    with torch.no_grad():
        expected = model(**batch)
        exported = torch.export.export(model, (), batch).module()
        torch.testing.assert_close(exported(**batch).loss, expected.loss)
        prepared = Accelerator(mixed_precision="bf16", cpu=True).prepare(copy.deepcopy(model))
        copied = copy.deepcopy(prepared)
        for parameter in prepared.parameters():
            parameter.zero_()
        for other in (copied, copy.copy(model), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            outputs = other(**batch)
            assert isinstance(outputs.logits, DeferredLogits)
            torch.testing.assert_close(outputs.logits.float(), expected.logits, rtol=0.05, atol=0.05)


def bert(**config) -> BertConfig:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    return BertConfig(vocab_size=64, **sizes, **config)


def encoder_decoder() -> nn.Module:
    config = EncoderDecoderConfig.from_encoder_decoder_configs(bert(), bert(is_decoder=True, add_cross_attention=True))
    config.decoder_start_token_id = config.pad_token_id = 0
    return EncoderDecoderModel(config)


@pytest.mark.parametrize("made", [lambda: BertForMaskedLM(bert()), encoder_decoder], ids=["deep", "in an inner model"])
def test_the_outermost_model_of_a_head_is_told_of_labels(made):
    model, ids = made().eval().requires_grad_(False), inputs()["input_ids"]
    defer_logits(model)
    with torch.no_grad():
        assert isinstance(model(input_ids=ids, labels=ids).logits, DeferredLogits)


def hooks_of(model: nn.Module) -> list:
    return [hook for m in model.modules() for hook in (*m._forward_pre_hooks.values(), *m._forward_hooks.values())]


@pytest.mark.parametrize("change", ["none", "resized", "merged", "dequantized"])
def test_no_hook_stays_where_the_head_was_exchanged(change):
    model = fp.accelerate(make("llama").requires_grad_(False))
    defer_logits(model)  # once more: what is there stays
    assert len(hooks_of(model)) == 4
    if change == "resized":
        model.resize_token_embeddings(70)
        assert len(hooks_of(fp.accelerate(model.requires_grad_(False)))) == 4
    elif change in ("merged", "dequantized"):
        adapted = fp.get_peft_model(model, fp.LoraConfig(modules_to_save=["lm_head"]))
        model = adapted.merge_and_unload(dequantize=change == "dequantized")
    unfuse(model)
    assert not hooks_of(model)


def test_a_head_is_copied_without_the_hooks_of_its_model():
    model = fp.accelerate(make("llama").requires_grad_(False))
    lock = threading.Lock()
    model.register_forward_hook(lambda *_, lock=lock: None)
    model.lock = lock
    assert torch.equal(pickle.loads(pickle.dumps(model.lm_head)).weight, copy.deepcopy(model.lm_head).weight)


def test_what_has_gradients_within_an_evaluation_keeps_them():
    model, batch, found = fp.accelerate(make("llama").requires_grad_(False)), inputs(), []

    def learn(*_):
        x = torch.randn(2, 32, requires_grad=True)
        with torch.enable_grad():
            found.append(model.lm_head(x).sum())

    model.model.register_forward_hook(learn)
    with torch.no_grad():
        model(**batch)
    assert type(found[0]) is torch.Tensor and found[0].requires_grad


def test_a_model_without_a_head_is_left_alone():
    defer_logits(nn.Linear(2, 2))
    bert = make("bert")
    defer_logits(bert)
    assert type(bert.train()(**inputs("bert")).logits) is torch.Tensor


def test_unloading_gives_the_head_its_forward_back():
    for unload in (fp.PeftModel.unload, fp.PeftModel.merge_and_unload):
        base = unload(trained_model(CONFIGS[0]))
        assert "forward" not in vars(base.lm_head)


def test_accelerate_defers_as_well_and_twice_is_once():
    model = make("llama").train()
    model.lm_head.requires_grad_(False)
    for _ in range(2):
        assert fp.accelerate(model) is model
        assert isinstance(model(**inputs()).logits, DeferredLogits)
    defer_logits(model, False)
    assert type(model(**inputs()).logits) is torch.Tensor


def test_a_copied_or_pickled_model_defers_by_its_own_head():
    model = trained_model(CONFIGS[0])
    batch = labelled_batch()
    expected = loss_and_gradients(model, batch)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.get_output_embeddings().forward.module is other.get_output_embeddings()
        assert_same(loss_and_gradients(other, batch), expected)


def test_compiled_code_computes_the_logits():
    model, batch = trained_model(CONFIGS[0]), labelled_batch()
    expected = loss_and_gradients(model, batch)
    compiled = torch.compile(model.forward, backend="eager")
    torch.testing.assert_close(compiled(**batch).loss.detach(), expected[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "loss",
    [
        lambda t: t.square().mean() + t.exp().mean(),
        lambda t: -(t.softmax(-1) * t.log_softmax(-1)).sum(-1).mean(),
    ],
    ids=["two methods", "entropy"],
)
def test_a_compiled_function_of_the_logits_is_the_one_that_it_says(loss):
    model, batch = trained_model(CONFIGS[0]), labelled_batch()
    compiled = torch.compile(loss, backend="eager")
    deferred = loss_and_gradients(model, batch, lambda outputs: compiled(outputs.logits))
    defer_logits(model, False)
    assert_same(deferred, loss_and_gradients(model, batch, lambda outputs: loss(outputs.logits)))


@pytest.mark.parametrize("rows", [0, 1, 3, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_chunks_add_up_to_the_whole(rows, dtype):
    head = nn.Linear(8, 50).requires_grad_(False).to(dtype)
    hidden, labels = torch.randn(rows, 8, dtype=dtype, requires_grad=True), torch.randint(0, 50, (rows,))
    expected = F.cross_entropy(head(hidden).float(), labels, reduction="sum")
    (wanted,) = torch.autograd.grad(expected, hidden)
    loss = chunked_cross_entropy(hidden, labels, head, 50)
    (got,) = torch.autograd.grad(loss * 2, hidden)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(got, wanted * 2, rtol=tolerance, atol=tolerance)
    with torch.no_grad():
        torch.testing.assert_close(chunked_cross_entropy(hidden, labels, head, 50), expected.detach())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [2.0**17, 2.0**17 / 3000, 1 / 3000])
def test_a_scaled_loss_has_gradients_that_are_rounded_once(dtype, scale):
    head = nn.Linear(8, 50).requires_grad_(False).to(dtype)
    hidden, labels = torch.randn(3, 8, dtype=dtype, requires_grad=True), torch.randint(0, 50, (3,))
    (plain,) = torch.autograd.grad(chunked_cross_entropy(hidden, labels, head, 50), hidden)
    (got,) = torch.autograd.grad(chunked_cross_entropy(hidden, labels, head, 50) * scale, hidden)
    assert got.dtype == dtype and torch.equal(got, (plain.float() * scale).to(dtype))


def test_rows_to_ignore_count_for_nothing_whoever_computes_the_head():
    head, hidden = nn.Linear(8, 50, bias=False).requires_grad_(False), torch.randn(9, 8, requires_grad=True)
    labels, ignore = torch.randint(0, 50, (9,)), torch.arange(9) % 3 == 0
    expected = F.cross_entropy(head(hidden)[~ignore], labels[~ignore], reduction="sum")
    (wanted,) = torch.autograd.grad(expected, hidden)
    for weight in (None, head.weight):
        loss = chunked_cross_entropy(hidden, labels.masked_fill(ignore, -100), head, 50, ignore, weight)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(torch.autograd.grad(loss, hidden)[0], wanted)


def test_a_label_that_is_no_class_is_an_error():
    head, hidden = nn.Linear(8, 50), torch.randn(2, 8)
    for labels in ([0, 50], [-1, 0]):
        with pytest.raises(IndexError, match="50 classes"):
            chunked_cross_entropy(hidden, torch.tensor(labels), head, 50)


@pytest.mark.parametrize("chunk", [None, 50 * 3])
def test_a_chunk_waits_for_no_device(monkeypatch, chunk):
    """Tensors on "meta" have no values that could be looked at."""
    if chunk is not None:
        monkeypatch.setattr(deferred_logits, "_CHUNK_LOGITS", chunk)
        monkeypatch.setattr(deferred_logits, "_GPU_ROWS", 1)
        monkeypatch.setattr(deferred_logits, "_CPU_ROWS", 1)
    head = nn.Linear(8, 50, device="meta").requires_grad_(False)
    hidden, labels = torch.empty(9, 8, device="meta", requires_grad=True), torch.zeros(9, device="meta").long()
    for ignore in (None, labels == 0):
        loss = chunked_cross_entropy(hidden, labels, head, 50, ignore)
        (gradient,) = torch.autograd.grad(loss, hidden)
        assert loss.is_meta and gradient.shape == hidden.shape


def test_rows_without_a_label_count_for_nothing_in_a_recorded_step(monkeypatch):
    model, batch = trained_model(CONFIGS[0]), labelled_batch()
    batch["labels"][0, :3] = IGNORED
    expected = loss_and_gradients(model, batch)
    monkeypatch.setattr(deferred_logits, "captured", lambda: True)
    assert_same(loss_and_gradients(model, batch), expected)


def test_on_a_device_a_label_that_is_no_class_spoils_its_row_and_the_loss(monkeypatch):
    """Plain torch's way there, which no exception leaves."""
    monkeypatch.setattr(backends, "_FORCED", backends.Backend.REFERENCE)
    logits, labels = torch.randn(4, 50), torch.tensor([0, 50, -1, 49])
    with pytest.raises((IndexError, RuntimeError)):
        cross_entropy_(logits.clone(), labels)
    elsewhere = labels.as_subclass(Elsewhere)
    gradient = logits.clone()
    losses = cross_entropy_(gradient, elsewhere)
    known = torch.tensor([True, False, False, True])
    torch.testing.assert_close(losses[known], F.cross_entropy(logits[known], labels[known], reduction="none"))
    assert losses[~known].isnan().all() and gradient[~known].isnan().all() and gradient[known].isfinite().all()


class Elsewhere(torch.Tensor):
    is_cpu = False


def test_a_batch_without_labels_has_the_loss_that_torch_gives_it():
    model, batch = trained_model(CONFIGS[0]), labelled_batch()
    batch["labels"][:] = IGNORED
    assert model(**batch).loss.isnan()
    assert model(**batch, num_items_in_batch=1).loss == 0


def test_float64_is_computed_at_once_by_torch():
    model = fp.get_peft_model(make().double(), fp.LoraConfig(target_modules=["q_proj"]))
    model.train()(**inputs()).loss.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_a_head_takes_no_rows():
    weight = torch.randn(7, 6)
    for shape in ((0, 6), (2, 0, 6)):
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                assert fp.ops.dense_linear(torch.empty(shape), weight).shape == (*shape[:-1], 7)


def test_a_model_that_cannot_say_what_its_head_is_has_none():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj = nn.Linear(8, 8)

        def get_output_embeddings(self):
            raise NotImplementedError

        def forward(self, x):
            return self.q_proj(x)

    model = fp.get_peft_model(Model(), fp.LoraConfig(target_modules=["q_proj"]))
    assert model(torch.ones(1, 8)).shape == (1, 8)
