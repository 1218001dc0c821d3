"""Layers with this library's operators inside compute what transformers' do, and keep less."""

import copy
import functools
import math
import pickle
import types

import pytest
import torch
import transformers as tf
from architectures import SMALL, make, vary_vectors
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_full_backward_hook
from transformers.activations import ACT2FN
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

import pyfastpeft as fp
from pyfastpeft.integrations.dense_layers import DenseForward
from pyfastpeft.integrations.forwards import ModuleForward, remove
from pyfastpeft.integrations.fused_layers import fuse_layers

CONFIGS = [
    tf.LlamaConfig(**SMALL),
    tf.MistralConfig(**SMALL, sliding_window=5),
    tf.Qwen2Config(**SMALL),
    tf.Qwen3Config(**SMALL, head_dim=8),
    tf.Phi3Config(**SMALL),
    tf.SmolLM3Config(**SMALL),
    tf.GemmaConfig(**SMALL, head_dim=8),
    tf.GraniteConfig(**SMALL),
    tf.NanoChatConfig(**SMALL),
]
# What of a layer has an operator, as counted over two layers and the last norm.
FUSED = {"llama": 11, "mistral": 11, "qwen2": 11, "qwen3": 15, "phi3": 7, "smollm3": 11, "gemma": 4, "granite": 9}
FUSED["nanochat"] = 2  # of its own are the norms, the MLP, and the way that it rotates


def model_of(config, dtype=torch.float32):
    return vary_vectors(tf.AutoModelForCausalLM.from_config(copy.deepcopy(config))).to(dtype)


def fused_modules(model):
    """But for linear layers that the CPU alone decides about."""
    forwards = ((m, vars(m).get("forward")) for m in model.modules())
    return [m for m, f in forwards if isinstance(f, ModuleForward) and not isinstance(f, DenseForward)]


def batch():
    ids = torch.randint(2, 200, (3, 11))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids}


def logits_and_gradients(model, inputs):
    model.zero_grad()
    outputs = model(**inputs)
    outputs.loss.backward()
    return outputs.logits.detach(), {n: p.grad for n, p in model.named_parameters()}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.model_type)
def test_a_model_computes_the_same(config):
    model, inputs = model_of(config).train(), batch()
    logits, gradients = logits_and_gradients(model, inputs)
    fuse_layers(model)
    assert len(fused_modules(model)) == FUSED[config.model_type]
    fused_logits, fused_gradients = logits_and_gradients(model, inputs)
    torch.testing.assert_close(fused_logits, logits, rtol=1e-4, atol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(fused_gradients[name], gradient, rtol=1e-3, atol=1e-5)
    remove(model)
    assert not fused_modules(model)
    assert torch.equal(model(**inputs).logits, logits)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.model_type)
def test_in_bf16_it_is_as_near_to_float64_as_before(config):
    model, inputs = model_of(config, torch.bfloat16).train(), batch()
    exact, exact_gradients = logits_and_gradients(copy.deepcopy(model).double(), inputs)
    plain, plain_gradients = logits_and_gradients(model, inputs)
    fuse_layers(model)
    fused, fused_gradients = logits_and_gradients(model, inputs)

    def error(got, expected):
        return (got.double() - expected).norm() / expected.norm()

    def whole(gradients):
        return torch.cat([gradient.double().flatten() for gradient in gradients.values()])

    assert error(fused, exact) <= 1.3 * error(plain, exact) + 1e-3
    exact, plain, fused = whole(exact_gradients), whole(plain_gradients), whole(fused_gradients)
    assert error(fused, exact) <= 1.3 * error(plain, exact) + 1e-3


@pytest.mark.parametrize("config", CONFIGS[:4], ids=lambda c: c.model_type)
def test_generation_with_a_cache_is_the_same(config):
    model, ids = model_of(config).eval(), torch.randint(2, 200, (2, 6))
    expected = model.generate(ids, max_new_tokens=8, do_sample=False)
    fuse_layers(model)
    assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), expected)


def test_training_in_bf16_keeps_no_activation_in_float32():
    model = fp.get_peft_model(model_of(CONFIGS[0], torch.bfloat16).train(), fp.LoraConfig(target_modules="all-linear"))
    large = []

    def pack(tensor):
        if tensor.dtype == torch.float32 and tensor.dim() == 3 and tensor.shape[-1] >= 64:
            large.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(**batch())
    assert not large


def prefixed(model):
    return fp.get_peft_model(model, fp.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))


@pytest.mark.parametrize("config", [CONFIGS[0], CONFIGS[3], CONFIGS[4]], ids=lambda c: c.model_type)
@pytest.mark.parametrize("linear", [nn.Linear, fp.nn.Linear4bit])
def test_a_frozen_layer_keeps_nothing_as_wide_as_its_mlp_or_over_4_bits_gate_and_up_alone(config, linear):
    model = model_of(config).train()
    if linear is fp.nn.Linear4bit:
        for layer in model.model.layers:
            for name, child in layer.mlp.named_children():
                if isinstance(child, nn.Linear):
                    layer.mlp.set_submodule(name, linear.from_linear(child))
    model, inputs, kept = prefixed(model), batch(), []
    weights = {p.data_ptr() for p in model.parameters()}
    tokens, layers = inputs["input_ids"].numel(), len(model.get_base_model().model.layers)

    def pack(tensor):
        if tensor.data_ptr() not in weights:
            kept.append(tuple(tensor.shape))
        return tensor

    def wide():
        return [math.prod(shape) for shape in kept if {96, 192} & set(shape[1:])]

    def gradients():
        model.zero_grad()
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = model(**inputs).loss
        loss.backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    got = gradients()
    assert kept and wide() == [tokens * 96] * (0 if linear is nn.Linear else 2 * layers)
    remove(model)
    for a, b in zip(got, gradients(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)
    assert len(wide()) > 2 * layers


def test_a_model_without_memory_tells_the_shapes():
    """On the meta device, for which torch knows no autocast."""
    inputs = {name: batch()[name].to("meta") for name in ("input_ids", "labels")}
    with torch.device("meta"):
        model = fp.accelerate(model_of(CONFIGS[0]).train())
    rows = inputs["input_ids"].shape
    assert model(**inputs).loss.is_meta
    model = fp.get_peft_model(model, fp.LoraConfig(r=4))
    assert model(**inputs).logits.shape == (*rows, model.config.vocab_size)
    model(**inputs).loss.backward()


def test_training_is_exact_whatever_the_layers_take_for_inference():
    """The int8 tier is for inference alone, inside the fused layers too."""
    model, losses = model_of(CONFIGS[0], torch.bfloat16).train(), []
    for layer in model.model.layers:
        for name, child in layer.mlp.named_children():
            if isinstance(child, nn.Linear):
                layer.mlp.set_submodule(name, fp.nn.Linear4bit.from_linear(child))
    model, inputs = prefixed(model), batch()
    for compute in (None, "int8"):
        for module in model.modules():
            if isinstance(module, fp.nn.Linear4bit):
                module.compute = compute
        losses.append(model(**inputs).loss)
    assert torch.equal(*losses)


def test_autocast_is_the_same_where_layers_are_computed_again():
    model, inputs = prefixed(model_of(CONFIGS[0]).train()), batch()
    (weight,) = (p for p in model.parameters() if p.requires_grad)
    found = []
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**inputs).loss
        found.append(torch.autograd.grad(loss, weight)[0])
        remove(model)
    torch.testing.assert_close(*found, rtol=5e-2, atol=5e-2 * float(found[0].abs().max()))


def check_gradients_are_those_of_plain_layers(model, loss_of):
    trained = [p for p in model.parameters() if p.requires_grad]
    found = []
    for _ in range(2):
        found.append(torch.autograd.grad(loss_of(), trained, allow_unused=True))
        remove(model)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "name"),
    [(CONFIGS[0], name) for name in ("gate_proj", "up_proj", "post_attention_layernorm")]
    + [(CONFIGS[4], "gate_up_proj")],
    ids=lambda v: v if isinstance(v, str) else v.model_type,
)
def test_weights_that_a_call_brings_are_those_of_its_backward_pass(config, name):
    model = prefixed(model_of(config).train())
    weights = {n: 2 * p.detach() for n, p in model.named_parameters() if name in n}
    assert weights
    inputs = batch()
    check_gradients_are_those_of_plain_layers(
        model, lambda: torch.func.functional_call(model, weights, (), inputs).loss
    )


def test_nothing_of_a_model_is_exchanged_while_it_trains():
    """Other threads may train it at the same time, or read its weights."""
    model = prefixed(model_of(CONFIGS[0]).train())
    own, exchanged = {m: m._parameters for m in model.modules()}, set()

    def look(tensor):
        exchanged.update(m for m, parameters in own.items() if m._parameters is not parameters)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(look, look):
        model(**batch()).loss.backward()
    assert not exchanged


@pytest.mark.parametrize("rows", [False, True])
def test_a_norm_of_another_adapter_has_no_part_in_the_backward_pass(rows):
    lora = {"init_lora_weights": False, "task_type": "CAUSAL_LM"}
    own = fp.LoraConfig(**lora, modules_to_save=["post_attention_layernorm"])
    model, inputs = fp.get_peft_model(model_of(CONFIGS[0]), own, "a").train(), batch()
    for name, p in model.named_parameters():
        if "modules_to_save.a" in name:
            p.data.mul_(2)
    model.add_adapter("b", fp.LoraConfig(**lora))
    model.set_adapter("b")
    trained = [p for p in model.parameters() if p.requires_grad]

    def loss():
        if rows:
            return model(**inputs, adapter_names=[["a", "b"]] * 3).loss
        model.set_adapter("b")
        loss = model(**inputs).loss
        model.set_adapter("a")
        for p in trained:
            p.requires_grad_()
        return loss

    check_gradients_are_those_of_plain_layers(model, loss)


def test_a_frozen_weight_that_changes_before_the_backward_pass_is_an_error():
    model = prefixed(model_of(CONFIGS[0]).train())
    loss = model(**batch()).loss
    with torch.no_grad():
        model.get_base_model().model.layers[0].mlp.gate_proj.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_gradient_checkpointing_gives_the_same_gradients():
    model = fp.get_peft_model(model_of(CONFIGS[0]).train(), fp.LoraConfig(target_modules="all-linear"))
    inputs = batch()
    model(**inputs).loss.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(**inputs).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, expected[name])


def test_autocast_and_mixed_dtypes_are_left_to_the_class():
    model, inputs = model_of(CONFIGS[0]).train(), batch()
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(**inputs).logits
        fuse_layers(model)
        fused = model(**inputs).logits
    assert fused.dtype == expected.dtype
    torch.testing.assert_close(fused, expected, rtol=5e-2, atol=5e-2)
    norm = LlamaRMSNorm(8)
    fuse_layers(nn.ModuleList([norm]))
    x = torch.randn(2, 8, dtype=torch.bfloat16)
    assert torch.equal(norm(x), LlamaRMSNorm(8)(x))


def test_only_what_has_the_code_of_llama_is_replaced():
    class Scaled(LlamaRMSNorm):
        def forward(self, hidden_states):
            return super().forward(hidden_states) * 2

    gelu = LlamaMLP(tf.LlamaConfig(**SMALL, hidden_act="gelu"))
    taken = LlamaRMSNorm(8)
    taken.forward = lambda x: x
    model = nn.ModuleList([Scaled(8), gelu, taken, nn.RMSNorm(8), nn.Linear(8, 8)])
    fuse_layers(model)
    assert not fused_modules(model)
    for architecture in ("gpt2", "opt", "t5", "bert"):
        other = make(architecture)
        fuse_layers(other)
        assert not fused_modules(other)


def test_accelerate_and_adapters_fuse_and_unloading_undoes_it():
    model = model_of(CONFIGS[0])
    assert len(fused_modules(fp.accelerate(copy.deepcopy(model)))) == 13  # with the head and the decoder
    adapted = fp.get_peft_model(model, fp.LoraConfig())
    assert len(fused_modules(adapted)) == 13
    assert not fused_modules(adapted.unload())


needs_hub_kernels = pytest.mark.skipif(
    not hasattr(tf.PreTrainedModel, "reset_kernels"),
    reason="this transformers does not ask the hub for kernels by itself",
)


def kernelized_of(model, *exchanged):
    """A copy of ``model`` as from_pretrained gives it, for which the hub had a kernel for modules of these classes."""
    model = copy.deepcopy(model).eval()
    model.set_use_kernels(True)
    for module in exchanged and model.modules():
        if isinstance(module, exchanged):
            module.forward = types.MethodType(lambda self, x: 2 * x, module)
            module._kernel_repo = "a repository"
    return model


@needs_hub_kernels
@pytest.mark.parametrize("exchanged", [(), (LlamaRMSNorm,), (LlamaRMSNorm, nn.SiLU)], ids=str)
def test_a_change_of_mode_leaves_a_model_fused_that_asked_the_hub_for_kernels(exchanged):
    inputs, plain = batch(), model_of(CONFIGS[0]).eval()
    accelerated = fp.accelerate(kernelized_of(plain, *exchanged))
    adapted = fp.get_peft_model(kernelized_of(plain, *exchanged), fp.LoraConfig())
    expected = accelerated(**inputs).logits
    torch.testing.assert_close(expected, plain(**inputs).logits, rtol=1e-4, atol=1e-5)
    for model in (accelerated, adapted):
        model.train().eval()
        assert len(fused_modules(model)) == 13
        assert torch.equal(model(**inputs).logits, expected)
    assert len(fused_modules(copy.deepcopy(adapted).train())) == 13
    base = adapted.unload()
    assert base.use_kernels and not fused_modules(base)
    assert torch.equal(base(**inputs).logits, plain(**inputs).logits)


@needs_hub_kernels
def test_kernels_of_the_hub_stay_where_they_were_chosen_or_nothing_here_serves_their_module():
    for choose, others in ((lambda m: setattr(m, "kernel_config", tf.KernelConfig()), ()), (id, [nn.Embedding])):
        model = kernelized_of(model_of(CONFIGS[0]), LlamaRMSNorm, *others)
        choose(model)
        assert fp.accelerate(model).use_kernels
        assert not any(isinstance(m.forward, ModuleForward) for m in model.modules() if isinstance(m, LlamaRMSNorm))


@needs_hub_kernels
def test_a_callers_own_forward_stays_where_kernels_of_the_hub_leave():
    model = kernelized_of(model_of(CONFIGS[0]))
    model.model.norm.forward = forward = types.MethodType(lambda self, x: 2 * x, model.model.norm)
    adapted = fp.get_peft_model(model, fp.LoraConfig())
    assert not model.use_kernels and model.model.norm.forward is forward
    assert adapted.unload().use_kernels and model.model.norm.forward is forward


@pytest.mark.parametrize(
    "config", [fp.LoraConfig(), fp.PrefixTuningConfig(num_virtual_tokens=2)], ids=["lora", "prefix"]
)
@pytest.mark.parametrize("kept", ["itself", "a copy", "pickled"])
def test_what_was_accelerated_stays_so_when_adapters_leave(config, kept):
    def state(model):
        return {path for path, m in model.named_modules() if "forward" in vars(m)}, model.config._attn_implementation

    base = fp.accelerate(copy.deepcopy(model_of(CONFIGS[0])))
    before = state(base)
    model = fp.get_peft_model(base, config)
    model.add_adapter("head", fp.LoraConfig(target_modules=["q_proj", "lm_head"]))
    if kept != "itself":
        model = copy.deepcopy(model) if kept == "a copy" else pickle.loads(pickle.dumps(model))
    merged = copy.deepcopy(model).merge_and_unload(adapter_names=["head"])
    assert len(fused_modules(model.unload())) == 13 and before[1] == "pyfastpeft"
    assert state(merged) == state(model.get_base_model()) == before
    saved = fp.get_peft_model(merged, fp.LoraConfig(modules_to_save=["lm_head", "norm"]))
    assert state(saved.merge_and_unload(dequantize=True)) == (set(), "sdpa")


def test_a_copied_or_pickled_model_runs_its_own_modules():
    model, inputs = model_of(CONFIGS[0]).eval(), batch()
    fuse_layers(model)
    expected = model(**inputs).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(m.forward.module is m for m in fused_modules(other)) and fused_modules(other)
        assert torch.equal(other(**inputs).logits, expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_a_traced_model_computes_the_same(grad, training):
    class Logits(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, ids):
            return self.model(input_ids=ids, use_cache=False).logits

    model = Logits(fp.get_peft_model(model_of(CONFIGS[0]), fp.LoraConfig(init_lora_weights=False)).train(training))
    ids = batch()["input_ids"]
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(model, ids, check_trace=False)
        for other in (ids, ids.flip(1)):
            torch.testing.assert_close(traced(other), model(other), rtol=0, atol=1e-5)


def test_hooks_see_what_they_saw():
    model, inputs, seen = model_of(CONFIGS[0]).eval(), batch(), []
    fuse_layers(model)
    model.model.layers[0].self_attn.register_forward_hook(lambda module, args, out: seen.append(out[0].shape))
    model.model.norm.register_forward_hook(lambda module, args, out: out * 0)
    assert model(**inputs).logits.abs().max() == 0 and seen == [(3, 11, 64)]


def test_a_hook_may_keep_what_it_saw():
    model, kept = model_of(CONFIGS[0]), []
    fuse_layers(model)

    def keep(module, args, out):
        out = out[0] if isinstance(out, tuple) else out
        kept.append((out, out.clone()))

    for name in ("self_attn", "self_attn.o_proj", "mlp", "mlp.down_proj"):
        handle = model.model.layers[0].get_submodule(name).register_forward_hook(keep)
        model(**batch())
        handle.remove()
    assert len(kept) == 4 and all(torch.equal(*pair) for pair in kept)


@pytest.mark.filterwarnings("ignore:For backward hooks to be called")
def test_a_hook_of_every_module_sees_each_and_may_keep_what_it_saw():
    model = fp.get_peft_model(model_of(CONFIGS[0]).train(), fp.LoraConfig(task_type="CAUSAL_LM"))
    kept, ran, turned = [], [], []

    def keep(module, args, out):
        ran.append(module)
        if isinstance(out, torch.Tensor):
            kept.append((out, out.clone()))

    handles = [
        register_module_forward_hook(keep),
        register_module_full_backward_hook(lambda module, *_: turned.append(module)),
    ]
    try:
        model(**batch()).loss.backward()
    finally:
        for handle in handles:
            handle.remove()
    assert all(torch.equal(*pair) for pair in kept)
    for layer in model.get_base_model().model.layers:
        assert {layer.mlp, layer.mlp.gate_proj, layer.post_attention_layernorm} <= set(ran)
    assert layer.mlp in turned


def halved(function):
    """A user's function around another, under its name."""

    @functools.wraps(function)
    def half(*args, **kwargs):
        out = function(*args, **kwargs)
        return (out[0] * 0.5, *out[1:]) if isinstance(out, tuple) else out * 0.5

    return half


PATCHES = [(f"Llama{part}", "forward") for part in ("RMSNorm", "MLP", "Attention", "DecoderLayer")]
PATCHES += [(None, name) for name in ("apply_rotary_pos_emb", "rotate_half", "eager_attention_forward")]
PATCHES += [(type(ACT2FN["silu"]), "forward")]


@pytest.mark.parametrize("when", ["before", "after", "between two models"])
@pytest.mark.parametrize(("owner", "name"), PATCHES)
@pytest.mark.parametrize("wrapped", [True, False])
def test_a_patch_of_transformers_is_heeded(owner, name, wrapped, when, monkeypatch):
    plain, inputs = model_of(CONFIGS[0]).train(), batch()
    plain.set_attn_implementation("eager")
    plain.requires_grad_(False).get_input_embeddings().weight.requires_grad_()
    fused = copy.deepcopy(plain)
    if when != "before":
        other = fused if when == "after" else copy.deepcopy(plain)
        fuse_layers(other)
        other(**inputs)
    before = plain(**inputs).logits
    patched = getattr(modeling_llama, owner) if isinstance(owner, str) else owner or modeling_llama
    half = halved(getattr(patched, name))
    if not wrapped:
        del half.__wrapped__
    monkeypatch.setattr(patched, name, half)
    fuse_layers(fused)
    logits, gradients = logits_and_gradients(plain, inputs)
    fused_logits, fused_gradients = logits_and_gradients(fused, inputs)
    assert (logits - before).abs().max() > 1e-3
    torch.testing.assert_close(fused_logits, logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fused_gradients, gradients, rtol=1e-3, atol=1e-5)
    monkeypatch.undo()
    torch.testing.assert_close(fused(**inputs).logits, before, rtol=1e-4, atol=1e-5)


class Dropped(nn.Module):
    """A norm of the user's, which draws."""

    def __init__(self, norm):
        super().__init__()
        self.norm_weight = norm.weight

    def forward(self, x):
        return nn.functional.dropout(x, 0.5, self.training) * self.norm_weight


class Bounded(nn.Module):
    """An attention of the user's around another."""

    def __init__(self, attention):
        super().__init__()
        self.attention, self.o_proj = attention, attention.o_proj

    def forward(self, **kwargs):
        return torch.tanh(self.attention(**kwargs)[0]), None


def trains(layer, owned):
    own, a, b = layer.mlp.gate_proj.forward, torch.randn(4, 64), torch.randn(96, 4)
    owned += [a.requires_grad_(), b.requires_grad_()]
    layer.mlp.gate_proj.forward = lambda x: own(x) + x @ a.T @ b.T


def scales(layer, owned):
    own, factor = layer.post_attention_layernorm.forward, torch.randn(64, requires_grad=True)
    owned.append(factor)
    layer.post_attention_layernorm.forward = lambda x: own(x) * factor


def draws(layer, owned):
    own = layer.mlp.up_proj.forward
    layer.mlp.up_proj.forward = lambda x: own(x) * torch.rand(96)


def keeps(name):
    def change(layer, owned):
        module, kept = layer.get_submodule(name), torch.randn(3, 11, 64)
        owned.append(kept)
        module.forward = lambda *args, **kwargs: (kept, None) if name == "self_attn" else kept

    return change


def bounds(name):
    def change(layer, owned):
        own = layer.get_submodule(name).forward
        layer.get_submodule(name).forward = lambda x: torch.tanh(own(x))

    return change


def drops(layer, owned):
    layer.post_attention_layernorm = Dropped(layer.post_attention_layernorm)


def wraps(layer, owned):
    layer.self_attn = Bounded(layer.self_attn)


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize(
    "change",
    [trains, scales, draws, drops, wraps]
    + [keeps(name) for name in ("self_attn", "self_attn.o_proj", "mlp.down_proj")]
    + [bounds(name) for name in ("self_attn.o_proj", "mlp.down_proj")],
)
@pytest.mark.parametrize("lora", [False, True])
def test_a_forward_of_the_users_runs_once_and_keeps_what_is_its_own(change, before, lora):
    """Whatever it closes over is trained, what it draws is drawn once, and what it stores nobody else writes to."""
    model, inputs, results = model_of(CONFIGS[0]), batch(), []
    for fuse in (lambda model: None, fuse_layers):
        torch.manual_seed(0)
        changed, owned = copy.deepcopy(model).requires_grad_(False), []
        if lora:
            changed = fp.get_peft_model(changed, fp.LoraConfig(target_modules=["o_proj", "down_proj"]))
            remove(changed)
        if not before:
            fuse(changed)
        torch.manual_seed(1)
        for layer in changed.get_submodule("base_model.model.model" if lora else "model").layers:
            change(layer, owned)
        if before:
            fuse(changed)
        changed.train().get_input_embeddings().weight.requires_grad_()
        torch.manual_seed(2)
        loss = changed(**inputs).loss
        wanted = [p for p in [*changed.parameters(), *owned] if p.requires_grad]
        results.append([loss, *torch.autograd.grad(loss, wanted, allow_unused=True), *owned])
    for plain, fused in zip(*results, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("config", [tf.LlamaConfig(**SMALL), tf.Phi3Config(**SMALL)], ids=lambda c: c.model_type)
@pytest.mark.parametrize("train", [False, True])
def test_a_hook_on_the_activation_or_another_one_is_heeded(config, train):
    plain, inputs = model_of(config).train(train), batch()
    fused = copy.deepcopy(plain)
    fuse_layers(fused)
    if train:  # the MLP is then computed from its norm's input
        for model in (plain, fused):
            model.model.layers.requires_grad_(False)
    name = "activation_fn" if config.model_type == "phi3" else "act_fn"
    for change in (
        lambda mlp: mlp.get_submodule(name).register_forward_hook(lambda module, args, out: out * 0.5),
        lambda mlp: setattr(mlp.get_submodule(name), "forward", lambda x: x * 0.5),
        lambda mlp: setattr(mlp, name, nn.GELU()),
    ):
        before = fused(**inputs).logits
        for model in (plain, fused):
            change(model.model.layers[0].mlp)
        logits = fused(**inputs).logits
        torch.testing.assert_close(logits, plain(**inputs).logits, rtol=0, atol=1e-5)
        assert (logits - before).abs().max() > 1e-3


@pytest.mark.parametrize("config", [tf.LlamaConfig(**SMALL), tf.Phi3Config(**SMALL)], ids=lambda c: c.model_type)
@pytest.mark.parametrize(("rows", "computed"), [(24, 1), (25, 2)])
def test_gate_and_up_are_kept_where_they_are_few_beside_the_weights(config, rows, computed, monkeypatch):
    model = fp.accelerate(model_of(config)).requires_grad_(False).train()
    plain, calls = nn.Linear.forward, []
    mlp = model.model.layers[0].mlp
    projection = getattr(mlp, "gate_up_proj", None) or mlp.gate_proj

    def counted(layer, x):
        calls.append(layer)
        return plain(layer, x)

    monkeypatch.setattr(nn.Linear, "forward", counted)
    monkeypatch.setattr("pyfastpeft.integrations.dense_layers.kernel_pays", lambda *_: False)
    x = torch.randn(1, rows, 64, requires_grad=True)
    mlp(x).sum().backward()
    assert sum(layer.weight is projection.weight for layer in calls) == computed
