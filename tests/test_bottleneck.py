"""Bottleneck adapters: arithmetic, placement, several at once, rows that choose, files, what they refuse."""

from __future__ import annotations

import copy
import json
import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from architectures import (
    ARCHITECTURES,
    WITH_SCORES,
    assert_same_answers,
    check_not_finite_stays,
    dequantized,
    inputs,
    loss_curve,
    make,
    quantized,
    randomize,
)
from safetensors.torch import load_file
from torch import nn

import pyfastpeft as fp
from pyfastpeft.tuners.bottleneck import ends_of_sublayers

ACTIVATIONS = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu, "tanh": torch.tanh}


def random_bottleneck(features=12, **kwargs):
    module = fp.nn.Bottleneck(features, 5, **kwargs)
    for parameter in module.parameters():
        parameter.data.normal_(std=0.3)
    return module


def reference(module, y):
    """In float64, from the definition."""
    down, up = module.down, module.up
    inner = ACTIVATIONS[module.activation](y.double() @ down.weight.double().t() + down.bias.double())
    return y.double() + inner @ up.weight.double().t() + up.bias.double()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(3, 7, 12), (1, 12), (0, 12), (12,)], ids=str)
def test_a_bottleneck_computes_its_definition(activation, shape):
    module, y = random_bottleneck(activation=activation), torch.randn(shape)
    torch.testing.assert_close(module(y).double(), reference(module, y), rtol=1e-5, atol=1e-5)
    out = module(y.bfloat16())
    assert out.dtype is torch.bfloat16
    torch.testing.assert_close(out.double(), reference(module, y), rtol=0.05, atol=0.05)


def test_a_bottleneck_has_the_gradients_of_its_definition():
    module, y = random_bottleneck(), torch.randn(4, 12, requires_grad=True)
    inputs = [y, *module.parameters()]
    grad = torch.randn(4, 12)
    found = torch.autograd.grad(module(y), inputs, grad)
    expected = torch.autograd.grad(reference(module, y), inputs, grad.double())
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b.to(a.dtype), rtol=1e-4, atol=1e-5)


def test_a_new_bottleneck_is_the_identity_and_learns_from_the_first_step():
    module, y = fp.nn.Bottleneck(12, 5), torch.randn(4, 12)
    assert torch.equal(module(y), y)
    module(y).square().sum().backward()
    assert module.up.weight.grad.abs().sum() > 0 and module.down.weight.abs().sum() > 0


@pytest.mark.parametrize("sizes", [(8, 0), (8, 1.5), (0, 8), (True, 8)])
def test_sizes_are_integers_of_at_least_1(sizes):
    with pytest.raises(ValueError, match=r"(size|features) is .*; it must be an integer of at least 1"):
        fp.nn.Bottleneck(*sizes)


def test_an_unknown_activation_is_refused():
    with pytest.raises(ValueError, match="activation is 'swish'; it must be one of gelu, relu, silu, tanh"):
        fp.nn.Bottleneck(12, 5, "swish")


_ENDS = {
    **dict.fromkeys(["llama", "qwen2", "qwen3", "mistral", "gemma"], ("self_attn.o_proj", "mlp.down_proj")),
    "phi": ("self_attn.dense", "mlp.fc2"),
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
    "opt": ("self_attn.out_proj", "fc2"),
    "bert": ("attention.output.dense", "output.dense"),
    "t5": ("SelfAttention.o", "EncDecAttention.o", "DenseReluDense.wo"),
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_adapters_stand_at_the_ends_of_the_sublayers(architecture):
    model = make(architecture)
    attention, ffn = _ENDS[architecture][:-1], _ENDS[architecture][-1]
    both, after_ffn = ends_of_sublayers(model, "houlsby"), ends_of_sublayers(model, "pfeiffer")
    layers = 4 if architecture == "t5" else 2
    assert len(after_ffn) == layers and all(path.endswith(ffn) for path in after_ffn)
    assert set(after_ffn) < set(both)
    rest = set(both) - set(after_ffn)
    assert len(rest) == layers + 2 * (architecture == "t5")
    assert all(path.endswith(attention) for path in rest)


@pytest.mark.parametrize(
    ("architecture", "of_images"),
    [
        ("qwen2_vl", "visual.blocks.{}.attn.proj visual.blocks.{}.mlp.fc2"),
        ("qwen2_5_vl", "visual.blocks.{}.attn.proj visual.blocks.{}.mlp.down_proj"),
        ("qwen3_vl", "visual.blocks.{}.attn.proj visual.blocks.{}.mlp.linear_fc2"),
        ("janus", "vision_model.encoder.layers.{}.self_attn.projection_layer vision_model.encoder.layers.{}.mlp.fc2"),
        ("llava", "vision_tower.encoder.layers.{}.self_attn.out_proj vision_tower.encoder.layers.{}.mlp.fc2"),
    ],
)
def test_adapters_stand_in_the_layers_for_images_as_in_those_for_text(architecture, of_images):
    config = tf.AutoConfig.for_model(architecture)
    config.text_config.num_hidden_layers = config.vision_config.num_hidden_layers = config.vision_config.depth = 2
    if hasattr(config.text_config, "layer_types"):
        config.text_config.layer_types = config.text_config.layer_types[:2]
    with torch.device("meta"):
        model = tf.AutoModelForImageTextToText.from_config(config)
    of_text = "language_model.layers.{}.self_attn.o_proj language_model.layers.{}.mlp.down_proj"
    expected = [f"model.{path.format(i)}" for path in f"{of_text} {of_images}".split() for i in range(2)]
    assert ends_of_sublayers(model, "houlsby") == sorted(expected)


def test_adapters_stand_at_the_layer_in_what_ends_a_sublayer(tmp_path):
    def layer(held):
        made = [nn.Linear(8, 8) for _ in range(2)]
        o_proj, down_proj = [nn.ModuleDict({"linear": module}) for module in made] if held else made
        return nn.ModuleDict(
            {"self_attn": nn.ModuleDict({"o_proj": o_proj}), "mlp": nn.ModuleDict({"down_proj": down_proj})}
        )

    model = fp.get_peft_model(nn.ModuleDict({"layers": nn.ModuleList([layer(False), layer(True)])}), config())
    ends = ["layers.0.mlp.down_proj", "layers.0.self_attn.o_proj"]
    ends += ["layers.1.mlp.down_proj.linear", "layers.1.self_attn.o_proj.linear"]
    assert model.peft_config["default"].target_modules == ends
    model.add_adapter("b", config())
    assert model.peft_config["b"].target_modules == ends
    model.save_pretrained(tmp_path)
    assert fp.BottleneckConfig.from_pretrained(tmp_path).target_modules == ends


def config(**kwargs):
    return fp.BottleneckConfig(**{"reduction_factor": 4} | kwargs)


@pytest.mark.parametrize(("kwargs", "size"), [({}, 8), ({"reduction_factor": 100}, 1), ({"bottleneck_size": 5}, 5)])
def test_the_size_is_the_width_over_the_reduction_factor(kwargs, size):
    state = fp.get_peft_model_state_dict(fp.get_peft_model(make(), config(**kwargs)))
    assert {t.shape for key, t in state.items() if "down.weight" in key} == {(size, 32)}


def adapted(model, name="default", **kwargs):
    model = fp.get_peft_model(model, config(**kwargs), adapter_name=name)
    randomize(model)
    return model.eval()


def by_hooks(model, peft_model):
    """The plain ``model`` with the adapter's definition applied to the outputs of its modules."""
    tensors = fp.get_peft_model_state_dict(peft_model)
    activation = ACTIVATIONS[peft_model.peft_config["default"].activation]
    for path in {key.removeprefix("base_model.model.").partition(".bottleneck.")[0] for key in tensors}:
        down, b, up, c = (
            tensors[f"base_model.model.{path}.bottleneck.{k}"]
            for k in ("down.weight", "down.bias", "up.weight", "up.bias")
        )

        def hook(module, args, y, down=down, b=b, up=up, c=c):
            return y + F.linear(activation(F.linear(y, down, b)), up, c)

        model.get_submodule(path).register_forward_hook(hook)
    return model


def logits(model, **kwargs):
    with torch.no_grad():
        return model(**kwargs).logits


@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_computes_the_definition(architecture, placement):
    model, batch = make(architecture), inputs(architecture)
    plain, before = copy.deepcopy(model), logits(model, **batch)
    peft_model = fp.get_peft_model(model, config(placement=placement)).eval()
    torch.testing.assert_close(logits(peft_model, **batch), before, rtol=1e-5, atol=1e-5)
    randomize(peft_model, 0.5)  # of 0.2 BERT's head sometimes shows less than that
    expected = logits(by_hooks(plain, peft_model), **batch)
    assert (expected - before).abs().max() > 1e-3
    torch.testing.assert_close(logits(peft_model, **batch), expected, rtol=1e-5, atol=1e-5)
    with peft_model.disable_adapter():
        torch.testing.assert_close(logits(peft_model, **batch), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert", "t5"])
def test_only_the_adapter_trains_and_has_the_definitions_gradients(architecture):
    model, batch = make(architecture), inputs(architecture)
    plain = copy.deepcopy(model)
    peft_model = adapted(model)
    trained = {n: p for n, p in peft_model.named_parameters() if p.requires_grad}
    assert trained and all(".bottleneck.default." in n for n in trained)
    peft_model.train()(**batch).loss.backward()

    tensors = fp.get_peft_model_state_dict(peft_model)
    leaves = {key: t.clone().requires_grad_() for key, t in tensors.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fp, "get_peft_model_state_dict", lambda *_, **__: leaves)
        by_hooks(plain, peft_model)(**batch).loss.backward()
    for name, parameter in trained.items():
        expected = leaves[name.replace(".default", "")].grad
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-5)


def test_a_4_bit_base_computes_what_its_dense_twin_does():
    model, batch = quantized(make()), inputs()
    twin, peft_model = dequantized(model), adapted(model)
    torch.testing.assert_close(
        logits(peft_model, **batch), logits(by_hooks(twin, peft_model), **batch), rtol=1e-4, atol=1e-4
    )
    peft_model.train()(**batch).loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in peft_model.parameters() if p.requires_grad)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(use_reentrant):
    peft_model, batch = adapted(make()), inputs()
    peft_model.train()(**batch).loss.backward()
    expected = {n: p.grad.clone() for n, p in peft_model.named_parameters() if p.requires_grad}
    peft_model.zero_grad()
    peft_model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    peft_model.enable_input_require_grads()
    rows = [["default"]] * 3
    for names in (None, rows):
        peft_model.zero_grad()
        peft_model(**batch, adapter_names=names).loss.backward()
        for name, parameter in peft_model.named_parameters():
            if parameter.requires_grad:
                torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", [config, fp.LoraConfig])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
def test_a_left_padded_batch_equals_the_unpadded_rows(architecture, kind):
    peft_model = fp.get_peft_model(make(architecture), kind())
    randomize(peft_model.eval())
    ids, mask = inputs(architecture)["input_ids"], torch.ones(3, 6, dtype=torch.int64)
    mask[1, :2], mask[2, :5] = 0, 0
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": -1, **WITH_SCORES}
    positions = (mask.cumsum(1) - 1).clamp(min=0)  # which transformers works out in generate alone
    padded = logits(peft_model, input_ids=ids, attention_mask=mask, position_ids=positions)
    generated = peft_model.generate(input_ids=ids, attention_mask=mask, **options)
    for i, start in enumerate((0, 2, 5)):
        row = ids[i : i + 1, start:]
        torch.testing.assert_close(padded[i : i + 1, start:], logits(peft_model, input_ids=row), rtol=1e-4, atol=1e-5)
        alone = peft_model.generate(input_ids=row, **options)
        assert_same_answers(generated, alone, slice(i, i + 1))


def several():
    """Three bottleneck adapters and a LoRA on one model."""
    peft_model = adapted(make(), "a")
    peft_model.add_adapter("b", config(placement="pfeiffer", bottleneck_size=3, activation="tanh"))
    peft_model.add_adapter("c", config(activation="relu"))
    peft_model.add_adapter("lora", fp.LoraConfig(r=4, target_modules=["o_proj", "down_proj", "q_proj"]))
    randomize(peft_model)
    return peft_model.eval()


def test_each_row_has_its_own_adapters():
    peft_model, batch = several(), inputs(rows=6)
    names = ["a", "__base__", "b", ["c", "lora"], "lora", "c"]
    mixed = logits(peft_model, **batch, adapter_names=names)
    for i, chosen in enumerate(names):
        row = {key: t[i : i + 1] for key, t in batch.items()}
        if chosen == "__base__":
            with peft_model.disable_adapter():
                alone = logits(peft_model, **row)
        else:
            peft_model.set_adapter(chosen)
            alone = logits(peft_model, **row)
        torch.testing.assert_close(mixed[i : i + 1], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_an_adapter_holds_reaches_no_row_of_others(value):
    peft_model, batch = several(), inputs(rows=4)
    names = ["a", "b", "__base__", ["c", "lora"]]
    clean = logits(peft_model, **batch, adapter_names=names)
    for parameter in ("down.weight", "down.bias", "up.weight", "up.bias"):
        dirty = copy.deepcopy(peft_model)
        held = [p for n, p in dirty.named_parameters() if n.endswith(f"bottleneck.b.{parameter}")]
        with torch.no_grad():
            held[0].view(-1)[1] = value
        got = logits(dirty, **batch, adapter_names=names)
        assert got[1].isnan().any() or value == math.inf  # which tanh makes 1
        others = torch.tensor([0, 2, 3])
        assert torch.equal(got[others], clean[others])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_an_adapter_that_is_not_finite_reaches_no_other_rows_and_no_other_gradients(activation, dtype):
    peft_model = fp.get_peft_model(make(dtype=dtype), config(activation=activation), "a").train()
    for name in ("b", "c"):
        peft_model.add_adapter(name, config(activation=activation))
    randomize(peft_model)
    peft_model.set_adapter(["a", "b"])
    # So many rows, and such biases, that no layer's relus are off in all of them: where its inputs are small, eight
    # negative biases (one run in 130) would see to that.
    for name, parameter in peft_model.named_parameters():
        if name.endswith("a.down.bias"):
            parameter.data.abs_()
    ids = inputs(rows=20)["input_ids"]
    check_not_finite_stays(peft_model, ids, ["a", "__base__", "b", ["a", "c"], "b"] * 4)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_row_that_is_not_finite_reaches_no_gradients_of_others(activation, value):
    peft_model = fp.get_peft_model(nn.Sequential(nn.Linear(8, 8)), config(target_modules=["0"], activation=activation))
    peft_model.add_adapter("b", config(target_modules=["0"], activation=activation))
    randomize(peft_model)
    for name, parameter in peft_model.named_parameters():
        if name.endswith("default.down.bias"):
            parameter.data.abs_()  # as above: one run in 750 had relus that were off in all rows
    own = [p for n, p in peft_model.named_parameters() if ".default." in n]
    x, cotangent = torch.randn(50, 8), torch.randn(50, 8)
    names = ["default", "b", "default", "__base__", "b"] * 10
    rows = torch.tensor([i for i in range(50) if i % 5 in (0, 2, 3)])

    def run(x, cotangent):
        x = x.clone().requires_grad_()
        out = peft_model(x, adapter_names=names)
        dx, *grads = torch.autograd.grad(out, [x, *own], cotangent)
        return out[rows], dx[rows], *grads

    expected = run(x, cotangent)
    assert all(t.isfinite().all() and t.any() for t in expected)
    for spoiled in (x, cotangent):
        before = spoiled.clone()
        spoiled[1, 3] = spoiled[4, 0] = value
        assert all(map(torch.equal, run(x, cotangent), expected))
        spoiled.copy_(before)


def test_several_active_at_once_add_their_updates():
    model, batch = make(), inputs()
    plain = copy.deepcopy(model)
    peft_model = adapted(model, "a")
    peft_model.add_adapter("b", config(activation="tanh"))
    randomize(peft_model)
    peft_model.set_adapter(["a", "b"])

    def hook(module, args, y, layer):
        return layer.bottleneck["a"](y) + layer.bottleneck["b"](y) - y

    for path in ends_of_sublayers(plain, "houlsby"):
        layer = peft_model.get_base_model().get_submodule(path)
        plain.get_submodule(path).register_forward_hook(partial(hook, layer=layer))
    torch.testing.assert_close(logits(peft_model, **batch), logits(plain, **batch), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bottleneck_first", [True, False])
def test_lora_on_the_same_modules_comes_and_goes(bottleneck_first):
    model, batch = make(), inputs()
    before = logits(model, **batch)
    lora = fp.LoraConfig(r=4, target_modules=["o_proj", "down_proj"])
    configs = {"b": config(), "l": lora} if bottleneck_first else {"l": lora, "b": config()}
    first, second = configs
    peft_model = fp.get_peft_model(model, configs[first], adapter_name=first)
    peft_model.add_adapter(second, configs[second])
    randomize(peft_model)
    peft_model.eval().set_adapter(["l", "b"])
    both = logits(peft_model, **batch)
    alone = {}
    for name in configs:
        peft_model.set_adapter(name)
        alone[name] = logits(peft_model, **batch)
    assert all((both - other).abs().max() > 1e-3 for other in (before, *alone.values()))
    peft_model.delete_adapter("b")
    torch.testing.assert_close(logits(peft_model, **batch), alone["l"])
    peft_model.delete_adapter("l")
    assert all(type(m).__name__ not in ("BottleneckLayer", "LoraLinear") for m in model.modules())
    torch.testing.assert_close(logits(model, **batch), before)


def test_folders_hold_everything_and_load_again(tmp_path):
    model, batch = make(), inputs()
    base = copy.deepcopy(model)
    peft_model = adapted(model, placement="pfeiffer", activation="silu", bottleneck_size=3)
    expected = logits(peft_model, **batch)
    peft_model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["peft_type"] == "BOTTLENECK" and saved["activation"] == "silu" and saved["bottleneck_size"] == 3
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert tensors.keys() == {
        f"base_model.model.model.layers.{i}.mlp.down_proj.bottleneck.{k}"
        for i in range(2)
        for k in ("down.weight", "down.bias", "up.weight", "up.bias")
    }
    for trainable in (False, True):
        again = fp.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=trainable)
        assert torch.equal(logits(again.eval(), **batch), expected)
        assert any(p.requires_grad for p in again.parameters()) is trainable
    other = adapted(base)
    with pytest.raises(ValueError, match="o_proj"):
        fp.set_peft_model_state_dict(other, tensors)


def test_a_hot_swap_takes_the_new_values():
    peft_model, batch = adapted(make()), inputs()
    other = adapted(copy.deepcopy(make()))
    values = fp.get_peft_model_state_dict(other)
    peft_model.hotswap_adapter(values)
    assert all(torch.equal(t, values[k]) for k, t in fp.get_peft_model_state_dict(peft_model).items())
    logits(peft_model, **batch)
    with pytest.raises(ValueError, match="configuration"):
        peft_model.hotswap_adapter(values, config=config(activation="tanh"))


def test_generation_beside_other_adapters():
    peft_model, ids = several(), inputs()["input_ids"]
    peft_model.generation_config.eos_token_id = None
    options = {"max_new_tokens": 4, "do_sample": False, **WITH_SCORES}
    names = ["a", "lora", "__base__"]
    mixed = peft_model.generate(input_ids=ids, adapter_names=names, **options)
    for i, name in enumerate(names):
        row = ids[i : i + 1]
        if name == "__base__":
            with peft_model.disable_adapter():
                alone = peft_model.generate(input_ids=row, **options)
        else:
            peft_model.set_adapter(name)
            alone = peft_model.generate(input_ids=row, **options)
        assert_same_answers(mixed, alone, slice(i, i + 1))


def test_it_learns():
    losses = loss_curve(fp.get_peft_model(make(), config()).train(), inputs(), steps=40, rate=5e-2)
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize("leave", ["delete", "unload"])
def test_what_a_user_put_in_the_place_of_a_bottleneck_stays(leave):
    model = adapted(make("llama"))
    layer = model.get_base_model().model.layers[0]
    layer.mlp.down_proj = own = nn.Linear(64, 32, bias=False)
    del layer.self_attn
    model.delete_adapter("default") if leave == "delete" else model.unload()
    assert layer.mlp.down_proj is own
    assert not hasattr(layer, "self_attn")


def test_a_bottleneck_that_is_put_in_anothers_place_computes():
    model, batch = fp.get_peft_model(make("llama"), fp.BottleneckConfig(reduction_factor=4)).eval(), inputs()
    before = model(**batch).logits
    layer = next(m for m in model.modules() if hasattr(m, "bottleneck"))
    layer.bottleneck["default"] = random_bottleneck(layer.base_layer.out_features)
    assert not torch.equal(model(**batch).logits, before)


@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
def test_a_bottleneck_cannot_be_merged(merge):
    peft_model, batch = adapted(make()), inputs()
    before = logits(peft_model, **batch)
    with pytest.raises(ValueError, match=r"default.*BOTTLENECK|BOTTLENECK.*default"):
        getattr(peft_model, merge)()
    assert torch.equal(logits(peft_model, **batch), before)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"placement": "both"}, "placement is 'both'; it must be one of houlsby, pfeiffer"),
        ({"placement": ["houlsby"]}, r"placement is \['houlsby'\]; it must be one of houlsby, pfeiffer"),
        ({"placement": np.array(["houlsby"] * 2)}, r"placement is array\(\['houlsby', 'houlsby'\], .*it must be one"),
        ({"activation": ["gelu"]}, r"activation is \['gelu'\]; it must be one of gelu, relu"),
        ({"reduction_factor": 0}, "reduction_factor is 0; it must be a finite number above 0"),
        ({"reduction_factor": math.inf}, "reduction_factor is inf; it must be a finite number above 0"),
        ({"reduction_factor": True}, "reduction_factor is True; it must be a finite number above 0"),
        ({"reduction_factor": "8"}, "reduction_factor is '8'; it must be a finite number above 0"),
        ({"bottleneck_size": 0}, "bottleneck_size is 0; it must be an integer of at least 1"),
        ({"activation": "swish"}, "activation is 'swish'; it must be one of gelu, relu, silu, tanh"),
        ({"target_modules": ["o_prj"]}, r"target_modules \['o_prj'\] matches no module of LlamaForCausalLM"),
        ({"target_modules": ["embed_tokens"]}, "'model.embed_tokens', a Embedding; a bottleneck goes after"),
    ],
    ids=str,
)
def test_a_bad_configuration_names_what_is_wrong(kwargs, message):
    model = make()
    with pytest.raises(ValueError, match=message):
        fp.get_peft_model(model, config(**kwargs))
    assert all(p.requires_grad for p in model.parameters())


def test_an_unknown_architecture_asks_for_the_projections():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.two(self.one(x))

    with pytest.raises(ValueError, match=r"target_modules is None.*Odd.*name the projections"):
        fp.get_peft_model(Odd(), config())
    peft_model = adapted(Odd(), target_modules=["one"])
    assert peft_model(torch.ones(2, 8)).shape == (2, 8)
