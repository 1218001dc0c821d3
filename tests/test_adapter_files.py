"""Adapter folders: real peft reads what is written here, and what it writes is read here, bit for bit."""

from __future__ import annotations

import copy
import json
import os
import re
import threading
import warnings
from pathlib import Path
from unittest import mock

import accelerate
import architectures as tiny
import peft
import pytest
import torch
import transformers as tf
from architectures import relative
from huggingface_hub import ModelCard
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers.utils import PushToHubMixin

import pyfastpeft as fp
from pyfastpeft.hub import files
from pyfastpeft.hub import peft as folders

pytestmark = pytest.mark.filterwarnings("ignore")

EQUAL = 1e-5  # "equal logits" in fp32: peft adds the same products in another order, and a small head's logits cancel

CASES = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"layers.0.self_attn.q_proj": 3}},
    "some_layers": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "embedding_and_head": {"target_modules": ["embed_tokens", "lm_head"]},
    "head_saved": {"modules_to_save": ["lm_head"]},
    "regex": {"target_modules": r".*\.1\..*_proj"},
    "all_linear": {"target_modules": "all-linear"},
    "excluded": {"target_modules": "all-linear", "exclude_modules": r".*mlp.*"},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "pissa_and_embedding": {"init_lora_weights": "pissa", "target_modules": ["embed_tokens", "q_proj"]},
    "bias_all": {"bias": "all"},
    "bias_lora_only": {"bias": "lora_only"},
    "lora_bias": {"lora_bias": True},
    "task": {"task_type": "CAUSAL_LM"},
}


def configured(case, **kwargs):
    arguments = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "v_proj"], **CASES[case], **kwargs}
    return fp.LoraConfig(**arguments), peft.LoraConfig(**arguments)


def architecture_for(case):
    return "opt" if "bias" in case else "llama"


def trained(attach, base, config):
    model = attach(copy.deepcopy(base), config)
    if config.init_lora_weights is True:
        tiny.randomize(model)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not name.startswith("base_model.model.lm_head.original"):
            parameter.data.add_(torch.randn_like(parameter) / 20)
    return model.eval()


@pytest.mark.parametrize("case", CASES)
class TestRoundTrip:
    def test_peft_reads_what_is_written_here(self, case, tmp_path):
        base = tiny.make(architecture_for(case))
        model = trained(fp.get_peft_model, base, configured(case)[0])
        model.save_pretrained(tmp_path)
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
        batch = tiny.inputs()
        tiny.use_plain_layers(model)
        assert relative(theirs(**batch).logits, model(**batch).logits) < EQUAL
        written = load_file(tmp_path / "adapter_model.safetensors")
        read = peft.get_peft_model_state_dict(theirs)
        assert written.keys() == read.keys()
        assert all(torch.equal(written[k], read[k]) for k in written)

    def test_what_peft_writes_is_read_here(self, case, tmp_path):
        base = tiny.make(architecture_for(case))
        theirs = trained(peft.get_peft_model, base, configured(case)[1])
        theirs.save_pretrained(tmp_path)
        model = fp.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
        batch = tiny.inputs()
        tiny.use_plain_layers(model)
        assert relative(model(**batch).logits, theirs(**batch).logits) < EQUAL
        written = load_file(tmp_path / "adapter_model.safetensors")
        read = fp.get_peft_model_state_dict(model)
        assert written.keys() == read.keys()
        assert all(torch.equal(written[k], read[k]) for k in written)

    def test_the_files_are_those_peft_writes(self, case, tmp_path):
        base = tiny.make(architecture_for(case))
        ours, theirs = configured(case)
        fp.get_peft_model(copy.deepcopy(base), ours).save_pretrained(tmp_path / "a")
        peft.get_peft_model(copy.deepcopy(base), theirs).save_pretrained(tmp_path / "b")
        a, b = (json.loads((tmp_path / n / "adapter_config.json").read_text()) for n in "ab")
        for config in (a, b):
            if isinstance(config["target_modules"], list):
                config["target_modules"].sort()
        assert a == b
        text = (tmp_path / "a" / "adapter_config.json").read_text()
        assert text == json.dumps(json.loads(text), indent=2, sort_keys=True)
        a, b = (load_file(tmp_path / n / "adapter_model.safetensors") for n in "ab")
        assert {k: (t.shape, t.dtype) for k, t in a.items()} == {k: (t.shape, t.dtype) for k, t in b.items()}
        names = {p.name for p in (tmp_path / "a").iterdir()}
        assert names == {"adapter_config.json", "adapter_model.safetensors", "README.md"}


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_every_architecture_makes_the_round_trip(architecture, tmp_path):
    base = tiny.make(architecture)
    kwargs = {"target_modules": "all-linear", "task_type": "SEQ_CLS" if architecture == "bert" else None}
    batch = tiny.inputs(architecture)
    for attach, config, load in (
        (fp.get_peft_model, fp.LoraConfig, peft.PeftModel.from_pretrained),
        (peft.get_peft_model, peft.LoraConfig, fp.PeftModel.from_pretrained),
    ):
        model = trained(attach, base, config(**kwargs))
        folder = tmp_path / attach.__module__
        model.save_pretrained(folder)
        again = load(copy.deepcopy(base), folder).eval()
        assert relative(again(**batch).logits, model(**batch).logits) < EQUAL


def test_an_adapter_trained_over_4_bits_loads_in_peft(tmp_path):
    base = tiny.quantized(tiny.make())
    model = trained(fp.get_peft_model, base, fp.LoraConfig(target_modules="all-linear"))
    model.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny.dequantized(base), tmp_path).eval()
    batch = tiny.inputs()
    assert relative(theirs(**batch).logits, model(**batch).logits) < 1e-4


def test_a_head_that_counts_its_batches_comes_and_goes_with_its_adapter(tmp_path):
    """SegFormer's has a BatchNorm, whose buffers are files' only whole numbers."""
    sizes = {"hidden_sizes": [8] * 4, "depths": [1] * 4, "num_attention_heads": [1] * 4, "decoder_hidden_size": 8}
    base = tf.SegformerForSemanticSegmentation(tf.SegformerConfig(**sizes, num_labels=3, classifier_dropout_prob=0.0))
    kwargs = {"r": 2, "target_modules": ["q_proj", "v_proj"], "modules_to_save": ["decode_head"]}
    pixels = torch.randn(2, 3, 32, 32)
    model = fp.get_peft_model(copy.deepcopy(base), fp.LoraConfig(**kwargs)).train()
    tiny.randomize(model)
    model(pixels)
    model(pixels * 2)
    expected = model.eval()(pixels).logits
    model.save_pretrained(tmp_path)
    counted = "base_model.model.decode_head.batch_norm.num_batches_tracked"
    assert load_file(tmp_path / "adapter_model.safetensors")[counted] == 2
    for library in (peft, fp):
        again = library.PeftModel.from_pretrained(copy.deepcopy(base).eval(), tmp_path)
        torch.testing.assert_close(again(pixels).logits, expected, rtol=1e-4, atol=1e-5)
    swapped = fp.get_peft_model(copy.deepcopy(base), fp.LoraConfig(**kwargs)).eval()
    halved = {k: t.bfloat16() if t.is_floating_point() else t for k, t in fp.load_peft_weights(tmp_path).items()}
    for values in (tmp_path, halved):
        swapped.hotswap_adapter(values)
        assert swapped.state_dict()[counted.replace("head.", "head.modules_to_save.default.")] == 2
    wrong = fp.load_peft_weights(tmp_path) | {counted: torch.tensor(2.0)}
    with pytest.raises(ValueError, match=f"{counted} has dtype torch.float32; it must be whole numbers"):
        fp.set_peft_model_state_dict(again, wrong)


def test_other_adapters_lie_in_folders_of_their_names(tmp_path):
    model = fp.get_peft_model(tiny.make(), fp.LoraConfig())
    model.add_adapter("other", fp.LoraConfig(r=2))
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_config.json").is_file()
    assert (tmp_path / "other" / "adapter_model.safetensors").is_file()
    again = fp.PeftModel.from_pretrained(tiny.make(), tmp_path)
    again.load_adapter(tmp_path / "other", "second")
    again.load_adapter(tmp_path, "third", subfolder="other")
    assert again.peft_config["third"].r == 2
    model.save_pretrained(tmp_path / "one", selected_adapters=["other"])
    assert [p.name for p in (tmp_path / "one").iterdir()] == ["other"]
    with pytest.raises(ValueError, match=r"selected_adapters is \[\]; it must name an adapter"):
        model.save_pretrained(tmp_path / "none", selected_adapters=[])
    assert not (tmp_path / "none").exists()


def test_is_trainable_decides_whether_it_trains(tmp_path):
    fp.get_peft_model(tiny.make(), fp.LoraConfig()).save_pretrained(tmp_path)
    for is_trainable in (False, True):
        model = fp.PeftModel.from_pretrained(tiny.make(), tmp_path, is_trainable=is_trainable)
        assert any(p.requires_grad for p in model.parameters()) == is_trainable


@pytest.mark.parametrize("is_trainable", [False, True])
@pytest.mark.parametrize("trains", [False, True])
def test_an_adapter_that_exists_goes_on_to_train_or_not_as_it_did(trains, is_trainable, tmp_path):
    fp.get_peft_model(tiny.make(), fp.LoraConfig()).save_pretrained(tmp_path)
    for library in (peft, fp):
        model = library.PeftModel.from_pretrained(tiny.make(), tmp_path, is_trainable=trains)
        model.load_adapter(tmp_path, "default", is_trainable=is_trainable)
        assert any(p.requires_grad for p in model.parameters()) == trains
        assert model.peft_config["default"].inference_mode != trains


@pytest.mark.parametrize(
    ("held", "read", "message"),
    [
        (fp.LoraConfig(), fp.LoraConfig(lora_alpha=1), "has another scaling"),
        (fp.LoraConfig(), fp.LoraConfig(r=2), "has other modules or ranks"),
        (
            fp.LoraConfig(trainable_token_indices=[1]),
            fp.LoraConfig(trainable_token_indices=[2]),
            r"indices is .*\[2\].*; adapter 'a' has .*\[1\]",
        ),
        (fp.LoraConfig(), fp.BottleneckConfig(), "is LORA, not BOTTLENECK"),
        (fp.BottleneckConfig(), fp.BottleneckConfig(bottleneck_size=3), "has other shapes"),
        (fp.BottleneckConfig(), fp.BottleneckConfig(activation="relu"), "has the activation 'gelu'"),
        (fp.PromptTuningConfig(num_virtual_tokens=2), fp.PromptTuningConfig(num_virtual_tokens=3), "has other shapes"),
        (
            fp.DeepPromptConfig(num_virtual_tokens=4, prefix=True),
            fp.DeepPromptConfig(num_virtual_tokens=4),
            "has virtual tokens of another form",
        ),
    ],
    ids=lambda of: type(of).__name__,
)
def test_an_adapter_that_exists_takes_no_values_that_would_mean_something_else(tmp_path, held, read, message):
    fp.get_peft_model(tiny.make("llama"), read).save_pretrained(tmp_path)
    model = fp.get_peft_model(tiny.make("llama"), held, "a")
    config = model.peft_config["a"]
    with tiny.unchanged(model), pytest.raises(ValueError, match=f"{message}.*delete it first"):
        model.load_adapter(tmp_path, "a")
    assert model.peft_config["a"] is config


@pytest.mark.parametrize(
    ("held", "read"), [(True, "pissa"), ("pissa", True), ("pissa", "olora"), ("pissa", "pissa_niter_4")]
)
def test_an_adapter_that_exists_takes_no_values_for_other_base_weights(tmp_path, held, read):
    fp.get_peft_model(tiny.make("llama"), fp.LoraConfig(init_lora_weights=read)).save_pretrained(tmp_path)
    model = fp.get_peft_model(tiny.make("llama"), fp.LoraConfig(init_lora_weights=held))
    message = f"init_lora_weights {held!r}, .* with {read!r} are for other base"
    with tiny.unchanged(model), pytest.raises(ValueError, match=message):
        model.load_adapter(tmp_path, "default")


@pytest.mark.parametrize("init, scale", [("pissa", 1), ("olora", 1), ("loftq", 1), (True, 0.5)])
def test_new_values_load_into_an_adapter_that_changed_base_weights_alike_or_was_rescaled(tmp_path, init, scale):
    model = trained(fp.get_peft_model, tiny.make(), fp.LoraConfig(init_lora_weights=init))
    batch = tiny.inputs()
    for layer in model.base_model.bank.layers.values():
        layer.set_scale("default", scale)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(**batch).logits
        tiny.randomize(model)
        model.load_adapter(tmp_path, "default")
        assert torch.equal(model(**batch).logits, expected)


def test_new_values_load_into_an_adapter_that_exists(tmp_path):
    model = trained(fp.get_peft_model, tiny.make(), fp.LoraConfig())
    expected = {k: t.clone() for k, t in fp.get_peft_model_state_dict(model).items()}
    model.save_pretrained(tmp_path)
    tiny.randomize(model)
    parameters = dict(model.named_parameters())
    model.load_adapter(tmp_path, "default", is_trainable=True)
    assert all(torch.equal(t, expected[k]) for k, t in fp.get_peft_model_state_dict(model).items())
    assert all(p is parameters[n] and p.requires_grad == ("lora_" in n) for n, p in model.named_parameters())


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize("saved", ["lm_head", "embed_tokens"])
def test_a_module_that_is_loaded_whole_leaves_the_base_models_own_alone(architecture, saved, tmp_path):
    base, batch = tiny.make(architecture), tiny.inputs()  # the ends of a qwen2 are tied
    model = trained(fp.get_peft_model, base, fp.LoraConfig(modules_to_save=[saved]))
    model.save_pretrained(tmp_path)
    again = fp.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert relative(again(**batch).logits, model(**batch).logits) < EQUAL
    assert all(torch.equal(t, base.get_parameter(n)) for n, t in again.unload().named_parameters())


def test_a_module_inside_another_that_is_saved_whole_is_trained_and_saved_with_it(tmp_path):
    """A classifying task adds the head of which ``modules_to_save`` names a part."""
    base = tf.RobertaForSequenceClassification(tf.RobertaConfig(**tiny._BERT)).eval()
    batch = tiny.inputs("bert")
    kwargs = {"target_modules": ["query"], "modules_to_save": ["classifier.out_proj"], "task_type": "SEQ_CLS"}
    model = trained(fp.get_peft_model, base, fp.LoraConfig(**kwargs))
    model.add_adapter("another", fp.LoraConfig(**kwargs))
    expected = model(**batch).logits
    model.save_pretrained(tmp_path)
    again = fp.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert relative(again(**batch).logits, expected) < EQUAL
    assert relative(model.merge_and_unload()(**batch).logits, expected) < EQUAL


def test_a_base_embedding_in_the_file_replaces_the_one_that_initialization_left(tmp_path):
    base, batch = tiny.make(), tiny.inputs()
    config = peft.LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights="pissa_niter_1")
    theirs = trained(peft.get_peft_model, base, config)
    theirs.save_pretrained(tmp_path)
    model = fp.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert relative(model(**batch).logits, theirs(**batch).logits) < EQUAL


def test_the_first_pattern_that_matches_still_holds_after_a_round_trip(tmp_path):
    config = fp.LoraConfig(
        r=4,
        rank_pattern={"v_proj": 2, r"layers\.0\..*": 3},
        alpha_pattern={"q_proj": 5, r"layers\.1\..*": 1, "k_proj": 9},
        target_modules=["q_proj", "v_proj"],
    )
    base, batch = tiny.make(), tiny.inputs()
    model = trained(fp.get_peft_model, base, config)
    model.save_pretrained(tmp_path)
    tiny.use_plain_layers(model)
    for load in (fp.PeftModel.from_pretrained, peft.PeftModel.from_pretrained):
        again = load(copy.deepcopy(base), tmp_path).eval()
        assert relative(again(**batch).logits, model(**batch).logits) < EQUAL
    config.save_pretrained(tmp_path)
    assert list(fp.LoraConfig.from_pretrained(tmp_path).alpha_pattern) == list(config.alpha_pattern)


def test_biases_that_peft_stores_more_than_once_are_read(tmp_path):
    base, batch = tiny.make("bert"), tiny.inputs("bert")
    config = peft.LoraConfig(bias="all", task_type="SEQ_CLS", modules_to_save=["pooler"])
    theirs = trained(peft.get_peft_model, base, config)
    theirs.save_pretrained(tmp_path)
    assert any("original_module" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    model = fp.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert relative(model(**batch).logits, theirs(**batch).logits) < EQUAL


@pytest.mark.parametrize("config", [fp.LoraConfig(), fp.BottleneckConfig(), fp.DeepPromptConfig(num_virtual_tokens=2)])
def test_the_card_names_peft_where_peft_loads_the_folder(tmp_path, config):
    fp.get_peft_model(tiny.make(), config).save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    its = config.peft_type in peft.PeftType.__members__
    assert ("library_name: peft" in card) == ("PEFT and pyfastpeft load it" in card) == its


@pytest.mark.parametrize("name", ["", 'a/"b": c'])
def test_the_card_names_the_base_model_if_that_has_a_name(tmp_path, name):
    model = fp.get_peft_model(tiny.make(), fp.LoraConfig())
    model.peft_config["default"].base_model_name_or_path = name
    model.save_pretrained(tmp_path)
    data = ModelCard((tmp_path / "README.md").read_text()).data
    assert data.base_model == (name or None)
    assert data.tags == ([f"base_model:adapter:{name}"] if name else []) + ["lora"]


STATES = {
    "lora": lambda library: library.LoraConfig(r=4, modules_to_save=["lm_head"], task_type="CAUSAL_LM"),
    "ptuning": lambda library: library.PromptEncoderConfig(
        num_virtual_tokens=3, encoder_hidden_size=16, task_type="CAUSAL_LM"
    ),
}


@pytest.mark.parametrize("config", STATES.values(), ids=STATES)
@pytest.mark.parametrize("wrapped", [False, True], ids=["", "compiled"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])  # the second's embeddings are tied
def test_the_values_of_a_state_dict_are_written_instead_of_the_models(tmp_path, config, wrapped, architecture):
    model = fp.get_peft_model(tiny.make(architecture), config(fp))
    tiny.randomize(model)
    own = {k: t.clone() for k, t in fp.get_peft_model_state_dict(model).items()}
    averaged = {k: t * 0.5 if t.is_floating_point() else t for k, t in model.state_dict().items()}
    twin = copy.deepcopy(model)
    twin.load_state_dict(averaged)
    expected = fp.get_peft_model_state_dict(twin)
    if wrapped:
        averaged = {f"_orig_mod.{k}": t for k, t in averaged.items()}
    model.save_pretrained(tmp_path, state_dict=averaged)
    written = load_file(tmp_path / "adapter_model.safetensors")
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[k], t) and not torch.equal(t, own[k]) for k, t in expected.items())
    given = fp.get_peft_model_state_dict(model, averaged, "default")
    assert all(torch.equal(given[k], t) for k, t in expected.items())
    assert all(torch.equal(t, own[k]) for k, t in fp.get_peft_model_state_dict(model).items())


def test_a_file_without_lora_alpha_has_pefts_default_and_one_with_null_is_refused(tmp_path):
    peft.get_peft_model(tiny.make("llama"), peft.LoraConfig(r=16, target_modules=["q_proj"])).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    del written["lora_alpha"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(written))
    model = fp.PeftModel.from_pretrained(tiny.make("llama"), tmp_path)
    assert model.peft_config["default"].lora_alpha == 8
    (tmp_path / "adapter_config.json").write_text(json.dumps(written | {"lora_alpha": None}))
    with pytest.raises(ValueError, match=r"adapter_config\.json: lora_alpha is None; it must be a finite number"):
        fp.PeftModel.from_pretrained(tiny.make("llama"), tmp_path)


def test_an_adapter_from_randomized_components_is_itself_again_when_it_is_loaded(tmp_path):
    base = tiny.make("llama")
    model = fp.get_peft_model(copy.deepcopy(base), fp.LoraConfig(r=4, init_lora_weights="pissa_niter_2"))
    tiny.randomize(model)
    model.save_pretrained(tmp_path)
    batch = tiny.inputs()
    again = fp.PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(again(**batch).logits, model.eval()(**batch).logits)


@pytest.mark.parametrize("attach", ["new", "loaded"])
def test_a_start_from_the_weight_that_embedding_and_head_share_is_refused(attach, tmp_path):
    kwargs = {"target_modules": ["lm_head", "q_proj"], "init_lora_weights": "olora"}
    base = tiny.make("qwen2")  # tied
    with pytest.raises(ValueError, match="changes the weight of lm_head; embedding and output head share it"):
        if attach == "new":
            fp.get_peft_model(base, fp.LoraConfig(**kwargs))
        peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**kwargs)).save_pretrained(tmp_path)
        fp.PeftModel.from_pretrained(base, tmp_path)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_embedding_that_is_tied_to_the_head_starts_as_usual_beside_a_start_from_the_weights(init, tmp_path):
    base, batch = tiny.make("qwen2"), tiny.inputs()  # tied
    ours, theirs = configured("embedding", init_lora_weights=init)
    fp.get_peft_model(copy.deepcopy(base), ours)
    theirs = trained(peft.get_peft_model, base, theirs)
    theirs.save_pretrained(tmp_path)
    model = fp.PeftModel.from_pretrained(base, tmp_path)
    tiny.use_plain_layers(model)
    assert relative(model(**batch).logits, theirs(**batch).logits) < EQUAL


def test_names_in_pefts_folders_that_no_module_has_are_said_once_and_left(tmp_path):
    kwargs = {"target_modules": ["q_proj", "Wqkv"], "modules_to_save": ["lm_head", "head_of_others"]}
    base, batch = tiny.make("llama"), tiny.inputs()
    theirs = trained(peft.get_peft_model, base, peft.LoraConfig(**kwargs))
    theirs.save_pretrained(tmp_path)
    with pytest.warns() as caught:
        model = fp.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    said = [str(w.message) for w in caught if "match no module" in str(w.message)]
    assert len(said) == 2 and "head_of_others" in said[0] and "Wqkv" in said[1]
    tiny.use_plain_layers(model)
    assert relative(model(**batch).logits, theirs(**batch).logits) < EQUAL
    with pytest.raises(ValueError, match=r"modules_to_save \['head_of_others'\] match no module"):
        fp.get_peft_model(base, fp.LoraConfig(modules_to_save=["head_of_others"]))


def test_models_that_have_no_embedding_load(tmp_path):
    part = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    text, vision = part | {"vocab_size": 64, "max_position_embeddings": 16}, part | {"image_size": 16, "patch_size": 8}
    base = tf.CLIPModel(tf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    model = fp.get_peft_model(copy.deepcopy(base), fp.LoraConfig(target_modules=["q_proj"]))
    tiny.randomize(model)
    model.save_pretrained(tmp_path)
    again = fp.get_peft_model_state_dict(fp.PeftModel.from_pretrained(base, tmp_path))
    assert all(torch.equal(t, again[k]) for k, t in fp.get_peft_model_state_dict(model).items())


@pytest.mark.parametrize("full_when", ["written", "synced"])
def test_a_save_that_fails_loses_nothing(tmp_path, monkeypatch, full_when):
    model = fp.get_peft_model(tiny.make("llama"), STATES["ptuning"](fp))
    model.save_pretrained(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    put = files.put_safetensors
    for parameter in model.prompt_encoder.parameters():
        parameter.data.add_(1)

    def written(tensors, *paths):
        if "prompt_embeddings" in tensors:
            raise OSError("the disk is full")
        put(tensors, *paths)

    def synced(fd):
        if "adapter_config" in os.readlink(f"/proc/self/fd/{fd}"):
            raise OSError("the disk is full")

    monkeypatch.setattr(*((folders, "put_safetensors", written) if full_when == "written" else (os, "fsync", synced)))
    with pytest.raises(OSError, match="disk is full"):
        model.save_pretrained(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_files_of_two_saves_are_not_mixed(tmp_path, monkeypatch):
    models = [fp.get_peft_model(tiny.make("llama"), fp.LoraConfig(lora_alpha=alpha)) for alpha in (1, 2)]
    for alpha, model in enumerate(models, 1):
        for parameter in model.parameters():
            parameter.data.fill_(alpha)
    other = threading.Thread(target=models[1].save_pretrained, args=[tmp_path])
    steps, replace = [], os.replace

    def replaced(source, target):
        replace(source, target)
        if not os.path.basename(target).startswith("."):
            steps.append("name")
            if len(steps) == 1:  # the first file of the first save has its name
                other.start()
                other.join(0.3)

    monkeypatch.setattr(os, "replace", replaced)
    models[0].save_pretrained(tmp_path)
    other.join()
    alpha = json.loads((tmp_path / "adapter_config.json").read_text())["lora_alpha"]
    weights = load_file(tmp_path / "adapter_model.safetensors")
    assert all((tensor == alpha).all() for tensor in weights.values())


def test_files_of_an_adapter_take_their_names_one_right_after_the_other(tmp_path, monkeypatch):
    model = fp.get_peft_model(tiny.make("llama"), STATES["ptuning"](fp))
    model.save_pretrained(tmp_path)
    steps, replace, sync = [], os.replace, os.fsync

    def replaced(source, target):
        steps.append(os.path.basename(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", replaced)
    monkeypatch.setattr(os, "fsync", lambda fd: (steps.append("sync"), sync(fd)))
    model.save_pretrained(tmp_path)
    names = [i for i, step in enumerate(steps) if step in os.listdir(tmp_path)]
    assert len(names) == 3 and names[-1] - names[0] == 2
    assert steps[: names[0]] == ["sync"] * 3 and steps[names[-1] :][1:] == ["sync"]


@pytest.mark.parametrize(
    ("writes", "error", "name"),
    [
        ("pathlib.Path.write_text", OSError(28, "No space left"), "adapter_config.json"),
        ("safetensors.torch.save_file", SafetensorError("No space left"), "adapter_model.safetensors"),
    ],
)
def test_a_file_that_cannot_be_written_is_named_by_the_name_it_was_to_have(tmp_path, monkeypatch, writes, error, name):
    monkeypatch.setattr(writes, mock.Mock(side_effect=error))
    with pytest.raises(OSError, match=f"{re.escape(str(tmp_path / name))} could not be written: No space left"):
        fp.get_peft_model(tiny.make("llama"), fp.LoraConfig()).save_pretrained(tmp_path)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    ("error", "warns"),
    [(ConnectionError("timed out"), True), (LocalEntryNotFoundError("off"), True), (EntryNotFoundError("no"), False)],
)
def test_an_encoder_that_could_not_be_looked_up_is_missed_with_a_warning(tmp_path, monkeypatch, error, warns):
    fp.get_peft_model(tiny.make("llama"), STATES["ptuning"](fp)).save_pretrained(tmp_path)

    def download(repository, filename, **_):
        if "encoder" in filename:
            raise error
        return str(tmp_path / filename)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        model = fp.PeftModel.from_pretrained(tiny.make("llama"), "someone/adapter", is_trainable=True)
    assert any("trains without that" in str(w.message) for w in seen) == warns
    assert not model.prompt_encoder["default"].encodes


def test_a_state_dict_that_does_not_fit_is_refused():
    model = fp.get_peft_model(tiny.make("llama"), fp.LoraConfig())
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
    state = model.state_dict()
    with pytest.raises(ValueError, match=f"lacks the key {key}"):
        fp.get_peft_model_state_dict(model, {k: t for k, t in state.items() if k != key})
    with pytest.raises(ValueError, match=f"{key}.* has shape .3,.; it must be"):
        fp.get_peft_model_state_dict(model, state | {key: torch.zeros(3)})
    with pytest.raises(ValueError, match="state_dict is a str"):
        fp.get_peft_model_state_dict(model, "default")


def test_loading_says_as_peft_does_what_did_not_fit():
    model = fp.get_peft_model(tiny.make("llama"), fp.LoraConfig())
    result = fp.set_peft_model_state_dict(model, fp.get_peft_model_state_dict(model))
    assert result.missing_keys == result.unexpected_keys == []


def test_a_readme_is_of_the_last_adapter_unless_somebody_changed_it(tmp_path):
    card = tmp_path / "README.md"

    def save(config, name, folder=tmp_path):
        model = fp.get_peft_model(tiny.make(), config)
        model.peft_config["default"].base_model_name_or_path = name
        model.save_pretrained(folder)
        return (folder / "README.md").read_text()

    cases = [(fp.LoraConfig(), "one"), (fp.BottleneckConfig(), None), (fp.LoraConfig(), "two"), (fp.LoraConfig(), None)]
    for number, case in enumerate(cases):
        written = save(*case)
        assert written == save(*case, tmp_path / str(number))
        for changed in ("mine", "", written.replace("tags:\n", "tags:\n- french\n"), written + "more\n"):
            card.write_text(changed)
            assert save(fp.LoraConfig(), "three") == changed
        card.write_text(written)


def test_a_base_model_may_be_named_by_its_path(tmp_path):
    model = fp.get_peft_model(tiny.make(), fp.LoraConfig(base_model_name_or_path=tmp_path / "base"))
    model.save_pretrained(tmp_path / "it")
    assert fp.PeftConfig.from_pretrained(tmp_path / "it").base_model_name_or_path == str(tmp_path / "base")


def test_none_in_the_place_of_a_model_or_a_mapping_is_named():
    model = fp.get_peft_model(tiny.make("llama"), fp.LoraConfig())
    for call, message in (
        (lambda: fp.get_peft_config(None), "config_dict is a NoneType; it must be a dict"),
        (lambda: fp.prepare_model_for_kbit_training(None), "model is a NoneType; it must be a torch.nn.Module"),
        (lambda: fp.set_peft_model_state_dict(model, None), "peft_model_state_dict is a NoneType; it must be"),
        (lambda: fp.set_peft_model_state_dict(model, {"lora_A": None}), "lora_A is a NoneType; it must be a tensor"),
        (lambda: fp.set_peft_model_state_dict(model, {1: torch.ones(1)}), "the key 1 is a int; it must be a str"),
        (lambda: fp.inject_adapter_in_model(fp.LoraConfig(), None), "model is a NoneType; it must be"),
        (lambda: fp.get_peft_model_state_dict(None), "model is a NoneType; it must be a PeftModel"),
    ):
        with pytest.raises(TypeError, match=message):
            call()


def test_config_makes_the_round_trip_and_unknown_keys_are_dropped_with_a_warning(tmp_path):
    config = fp.LoraConfig(r=3, use_dora=True, target_modules=["q_proj"], task_type="CAUSAL_LM")
    config.save_pretrained(tmp_path)
    assert fp.PeftConfig.from_pretrained(tmp_path) == config
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"from_the_future": 1}))
    with pytest.warns(UserWarning, match="from_the_future"):
        assert fp.LoraConfig.from_pretrained(tmp_path) == config


class TestBadFolders:
    @pytest.fixture
    def folder(self, tmp_path):
        fp.get_peft_model(tiny.make(), fp.LoraConfig(r=4)).save_pretrained(tmp_path)
        return tmp_path

    def refused(self, folder, message, error=ValueError):
        """Loading fails with ``message``, into a fresh model and beside another adapter, and leaves no trace."""
        base = tiny.make()
        with tiny.unchanged(base), pytest.raises(error, match=message):
            fp.PeftModel.from_pretrained(base, folder)
        assert all(p.requires_grad for p in base.parameters())
        model = fp.get_peft_model(base, fp.LoraConfig(target_modules=["k_proj"]))
        with tiny.unchanged(model), pytest.raises(error, match=message):
            model.load_adapter(folder, "new")
        assert list(model.peft_config) == ["default"]

    def edit(self, folder, change):
        path = folder / "adapter_model.safetensors"
        tensors = {k: t.clone() for k, t in load_file(path).items()}
        change(tensors)
        save_file(tensors, path)

    KEY = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"

    def test_a_missing_key_is_named(self, folder):
        self.edit(folder, lambda t: t.pop(self.KEY))
        self.refused(folder, rf"Keys missing: {self.KEY}$")

    def test_an_extra_key_is_named(self, folder):
        self.edit(folder, lambda t: t.update({"base_model.model.extra": torch.ones(1)}))
        self.refused(folder, r"Keys not expected: base_model\.model\.extra$")

    def test_another_shape_is_named_with_the_expected_one(self, folder):
        self.edit(folder, lambda t: t.update({self.KEY: torch.ones(16, 5)}))
        self.refused(folder, rf"{self.KEY} has shape \(16, 5\); it must be \(16, 4\)")

    def test_another_dtype_is_named(self, folder):
        self.edit(folder, lambda t: t.update({self.KEY: torch.ones(16, 4, dtype=torch.int64)}))
        self.refused(folder, rf"{self.KEY} has dtype torch\.int64")

    def test_a_truncated_file_is_named(self, folder):
        path = folder / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes()[:-7])
        self.refused(folder, r"adapter_model\.safetensors is not a valid")

    def test_a_missing_file_is_named(self, folder):
        (folder / "adapter_model.safetensors").unlink()
        self.refused(folder, r"adapter_model\.safetensors", FileNotFoundError)

    def test_a_missing_folder_is_named(self, tmp_path):
        self.refused(tmp_path / "nowhere", "nowhere", FileNotFoundError)
        self.refused("no_such_adapter", "no_such_adapter", FileNotFoundError)
        self.refused("a/b/c", "a/b/c", FileNotFoundError)

    def test_what_is_no_path_is_named(self):
        self.refused(None, "model_id is None; it must be a path", TypeError)
        model = fp.get_peft_model(tiny.make(), fp.PrefixTuningConfig(num_virtual_tokens=2))
        for call, name in (
            (model.save_pretrained, "save_directory"),
            (fp.LoraConfig().save_pretrained, "save_directory"),
            (model.export_prefix, "path"),
            (fp.from_gguf, "path"),
        ):
            with pytest.raises(TypeError, match=f"{name} is None; it must be a path"):
                call(None)

    def test_a_pickle_is_never_loaded(self, folder):
        tensors = load_file(folder / "adapter_model.safetensors")
        (folder / "adapter_model.safetensors").unlink()
        torch.save(tensors, folder / "adapter_model.bin")
        self.refused(folder, "pickle, which is never loaded")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"r": 0}, "r is 0"),
            ({"r": "8"}, "r is '8'"),
            ({"r": 5}, r"must be \(5, 32\)"),
            ({"peft_type": "MAGIC"}, "peft_type is 'MAGIC'"),
            ({"peft_type": None}, "peft_type is None"),
            ({"peft_type": ["LORA"]}, "peft_type is .'LORA'."),
            ({"rank_pattern": {"(": 4}}, "a key of rank_pattern is"),
            ({"lora_dropout": "much"}, "lora_dropout is .much."),
            ({"loftq_config": 5}, "loftq_config is 5; it must be a LoftQConfig or a dict"),
            ({"target_modules": ["nothing"]}, "matches no module"),
            ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
            ({"layer_replication": [[0, 1]]}, "layer_replication"),
            ({"init_lora_weights": "corda"}, "init_lora_weights is 'corda'"),
        ],
    )
    def test_a_config_with_a_wrong_value_is_refused(self, folder, change, message):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        self.refused(folder, message)

    def test_a_config_that_is_not_json_is_named(self, folder):
        (folder / "adapter_config.json").write_text("{")
        self.refused(folder, r"adapter_config\.json is not valid JSON")

    def test_an_adapter_of_another_model_is_refused(self, folder):
        with pytest.raises(ValueError, match=r"layers\.1|matches no module|has shape"):
            fp.PeftModel.from_pretrained(tiny.make("gpt2"), folder)

    def test_pickle_is_never_written(self, folder):
        with pytest.raises(ValueError, match="safe_serialization is False"):
            fp.get_peft_model(tiny.make(), fp.LoraConfig()).save_pretrained(folder, safe_serialization=False)

    def test_a_file_in_the_place_of_the_folder_is_named(self, tmp_path):
        (tmp_path / "x").write_text("")
        with pytest.raises(ValueError, match=r"save_directory is .*x'.*a file"):
            fp.get_peft_model(tiny.make(), fp.LoraConfig()).save_pretrained(tmp_path / "x")


def test_push_to_hub_uploads_the_adapter_alone(monkeypatch):
    uploaded = set()

    def upload(self, folder, *_, **__):
        uploaded.update(path.name for path in Path(folder).iterdir())

    monkeypatch.setattr(PushToHubMixin, "_upload_modified_files", upload)
    monkeypatch.setattr("transformers.utils.hub.hf_api", mock.MagicMock())
    monkeypatch.setattr("transformers.utils.hub.create_and_tag_model_card", mock.MagicMock())
    fp.get_peft_model(tiny.make("llama"), fp.LoraConfig()).push_to_hub("me/it")
    assert uploaded == {"adapter_config.json", "adapter_model.safetensors", "README.md"}


def test_a_card_is_there_for_the_trainer(tmp_path):
    model = fp.get_peft_model(tiny.make("llama"), fp.LoraConfig())
    model.add_adapter("other", fp.BottleneckConfig())
    model.create_or_update_model_card(tmp_path / "cards")
    model.save_pretrained(tmp_path / "saved")
    card = tmp_path / "cards" / "README.md"
    assert [*(tmp_path / "cards").iterdir()] == [card]  # an adapter that lay there would stay
    assert card.read_text() == (tmp_path / "saved" / "README.md").read_text()
    model.peft_config["default"].task_type = "CAUSAL_LM"
    for mine in ("mine", "---\nlanguage: en\npipeline_tag: translation\ntags:\n- lora\n- mine\n---\nmine"):
        card.write_text(mine)
        for _ in range(2):
            model.create_or_update_model_card(tmp_path / "cards")
            data, text = ModelCard.load(card).data, card.read_text()
            assert text.endswith("\nmine") and text.count("mine") == mine.count("mine")
            assert data.library_name == "peft" and data.tags.count("lora") == 1
            described = ("en", "translation") if "language" in mine else (None, "text-generation")
            assert (data.language, data.pipeline_tag) == described


@pytest.mark.parametrize("matter", ["title: a: b", "- a list", "model-index: 3", "tags: 3", "3: 4"])
def test_a_readme_without_readable_metadata_stays(tmp_path, matter):
    (tmp_path / "README.md").write_text(f"---\n{matter}\n---\nmine")
    fp.get_peft_model(tiny.make("llama"), fp.LoraConfig()).create_or_update_model_card(tmp_path)
    assert (tmp_path / "README.md").read_text() == f"---\n{matter}\n---\nmine"


def test_the_trainers_card_is_an_adapters_as_pefts_is(tmp_path):
    cards = []
    for library in (fp, peft):
        base = tiny.make("llama")
        base.name_or_path = base.config._name_or_path = "me/base"
        model = library.get_peft_model(base, library.LoraConfig(task_type="CAUSAL_LM"))
        arguments = tf.TrainingArguments(tmp_path / library.__name__, report_to=[], use_cpu=True)
        trainer = tf.Trainer(model, arguments)
        trainer.save_model()
        trainer.create_model_card(model_name="it")
        cards.append(ModelCard.load(tmp_path / library.__name__ / "README.md").data)
    ours, theirs = cards
    assert (ours.library_name, ours.base_model) == (theirs.library_name, theirs.base_model) == ("peft", "me/base")
    assert ours.pipeline_tag == theirs.pipeline_tag == "text-generation"
    assert {"base_model:adapter:me/base", "lora"} <= {*ours.tags} & {*theirs.tags}


def test_a_hub_repository_takes_the_arguments_that_peft_takes_for_loading(monkeypatch, tmp_path):
    fp.get_peft_model(tiny.make("llama"), STATES["ptuning"](fp)).save_pretrained(tmp_path / "part")
    asked = {}

    def download(repo_id, filename, *, subfolder=None, revision=None):
        asked[filename] = subfolder, revision
        return str(tmp_path / "part" / filename)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    kwargs = {"low_cpu_mem_usage": True, "device_map": "cpu", "subfolder": "part", "revision": "main"}
    fp.PeftModel.from_pretrained(tiny.make("llama"), "me/it", is_trainable=True, **kwargs)
    assert asked == dict.fromkeys((folders.CONFIG_NAME, folders.WEIGHTS_NAME, folders.OWN_NAME), ("part", "main"))


def test_what_a_folder_lacks_is_not_looked_for_at_the_hub(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", mock.Mock(side_effect=AssertionError("asked")))
    fp.get_peft_model(tiny.make("llama"), fp.PromptTuningConfig(num_virtual_tokens=2)).save_pretrained("me/it")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fp.PeftModel.from_pretrained(tiny.make("llama"), "me/it", is_trainable=True)  # there is no encoder
    Path("me/it/adapter_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"me/it/adapter_config\.json"):
        fp.PeftModel.from_pretrained(tiny.make("llama"), "me/it")


def test_embeddings_that_were_resized_are_stored_with_the_adapter(tmp_path):
    tiny.make("llama").save_pretrained(tmp_path / "base")

    def resized():
        base = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        base.resize_token_embeddings(tiny.VOCAB + 3)
        return base

    model = fp.get_peft_model(resized(), fp.LoraConfig()).eval()
    with pytest.warns(UserWarning, match="embeddings were resized"):
        model.save_pretrained(tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(resized(), tmp_path / "adapter").eval()
    ours = fp.PeftModel.from_pretrained(resized(), tmp_path / "adapter").eval()
    ids = torch.arange(tiny.VOCAB, tiny.VOCAB + 3).unsqueeze(0)
    for again in (theirs, ours):
        torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=0, atol=1e-5)
    fp.get_peft_model(tf.AutoModelForCausalLM.from_pretrained(tmp_path / "base"), fp.LoraConfig()).save_pretrained(
        tmp_path / "plain"
    )
    assert all("lora_" in key for key in load_file(tmp_path / "plain" / "adapter_model.safetensors"))


@pytest.fixture
def resized(tmp_path):
    """A model with tokens that its folder does not have; other processes draw other values for them."""
    tiny.make("llama").save_pretrained(tmp_path / "base")

    def make(seed):
        base = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        torch.manual_seed(seed)
        base.resize_token_embeddings(tiny.VOCAB + 3, mean_resizing=False)
        return base

    return make


_VIRTUAL = {"num_virtual_tokens": 3, "task_type": "CAUSAL_LM"}


@pytest.mark.parametrize("save", ["auto", True])
@pytest.mark.parametrize(
    "config",
    [
        fp.PromptTuningConfig(**_VIRTUAL),
        fp.PromptEncoderConfig(**_VIRTUAL, encoder_hidden_size=16),
        fp.DeepPromptConfig(**_VIRTUAL),
        fp.BottleneckConfig(reduction_factor=8),
        fp.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False),
    ],
    ids=lambda config: type(config).__name__,
)
def test_every_method_keeps_embeddings_that_were_resized(config, save, resized, tmp_path):
    model, ids = fp.get_peft_model(resized(1), config).eval(), torch.tensor([[3, *range(tiny.VOCAB, tiny.VOCAB + 3)]])
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=save)
    again = fp.PeftModel.from_pretrained(resized(2), tmp_path / "adapter").eval()
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=0, atol=1e-5)
    with again.disable_adapter(), model.disable_adapter():
        torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "name, arguments",
    [
        ("LoraConfig", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}),
        ("LoraConfig", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
        ("PromptTuningConfig", _VIRTUAL),
    ],
)
def test_resized_embeddings_of_peft_are_read_and_hot_swapped(name, arguments, resized, tmp_path):
    theirs = peft.get_peft_model(resized(1), getattr(peft, name)(**arguments)).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    ids, target = torch.tensor([[3, *range(tiny.VOCAB, tiny.VOCAB + 3)]]), resized(2)
    expected = theirs(ids).logits[:, -4:]
    ours = fp.PeftModel.from_pretrained(target, tmp_path / "adapter").eval()
    torch.testing.assert_close(ours(ids).logits, expected, rtol=0, atol=1e-5)
    ours.hotswap_adapter(tmp_path / "adapter", adapter_name="default")
    torch.testing.assert_close(ours(ids).logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("save", ["all", None, 1])
def test_what_does_not_say_whether_embeddings_are_saved_is_refused(save, tmp_path):
    model = fp.get_peft_model(tiny.make(), fp.LoraConfig())
    with pytest.raises(ValueError, match=f"save_embedding_layers is {save!r}; it must be 'auto', True or False"):
        model.save_pretrained(tmp_path / "adapter", save_embedding_layers=save)
    assert not (tmp_path / "adapter").exists()


def test_a_process_that_is_not_the_main_one_writes_nothing(tmp_path):
    model = fp.get_peft_model(tiny.make(), fp.LoraConfig())
    model.save_pretrained(tmp_path / "adapter", is_main_process=False)
    assert not (tmp_path / "adapter").exists()


def test_a_whole_module_loads_over_a_base_in_four_bits(tmp_path):
    base, batch = tiny.quantized(tiny.make()), tiny.inputs()
    model = trained(fp.get_peft_model, copy.deepcopy(base), fp.LoraConfig(modules_to_save=["mlp"]))
    model.save_pretrained(tmp_path)
    again = fp.PeftModel.from_pretrained(base, tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, model.eval()(**batch).logits)


def test_what_a_converted_adapter_would_need_is_refused(tmp_path):
    model = fp.get_peft_model(tiny.make("llama"), fp.LoraConfig(init_lora_weights="pissa"))
    with pytest.raises(ValueError, match="path_initial_model_for_weight_conversion"):
        model.save_pretrained(tmp_path, path_initial_model_for_weight_conversion=str(tmp_path))


def test_an_adapter_is_not_loaded_onto_offloaded_layers_which_would_lose_it(tmp_path):
    base = tiny.make()
    fp.get_peft_model(copy.deepcopy(base), configured("plain")[0]).save_pretrained(tmp_path)
    ids = tiny.inputs()["input_ids"]
    expected = base(ids).logits
    accelerate.cpu_offload(base.model.layers[1], execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn.* is on the meta device, as its layer is offloaded"):
        fp.PeftModel.from_pretrained(base, tmp_path)
    assert not any("lora" in name for name, _ in base.named_modules())
    assert relative(base(ids).logits, expected) < EQUAL


@pytest.mark.parametrize(
    "config",
    [
        fp.LoraConfig(use_dora=True),
        fp.LoraConfig(target_modules=["v_proj"], layers_to_transform=[0], modules_to_save=["layers.1.mlp.up_proj"]),
        fp.LoraConfig(target_modules=["v_proj"], layers_to_transform=[0], trainable_token_indices=[1]),
        fp.BottleneckConfig(),
        fp.PromptTuningConfig(num_virtual_tokens=2),
    ],
    ids=["dora", "modules_to_save", "tokens", "bottleneck", "prompt"],
)
def test_a_new_adapter_is_not_put_on_offloaded_layers(config):
    base = tiny.make()
    ids, keys, attention = tiny.inputs()["input_ids"], list(base.state_dict()), base.config._attn_implementation
    expected = base(ids).logits
    for module in (base.model.layers[1], base.model.embed_tokens):
        accelerate.cpu_offload(module, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match="is on the meta device, as its layer is offloaded"):
        fp.get_peft_model(base, config)
    assert list(base.state_dict()) == keys and all(p.requires_grad for p in base.parameters())
    assert base.config._attn_implementation == attention and relative(base(ids).logits, expected) < EQUAL
