"""Folders of before transformers moved a model's modules: they load at today's paths, whole, or are refused."""

from __future__ import annotations

import copy
import json
import re
import warnings

import peft
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from transformers.core_model_loading import Transpose, WeightConverter

import pyfastpeft as fp
from pyfastpeft.tuners import lora_moved

pytestmark = pytest.mark.filterwarnings("ignore")

EQUAL = 1e-5  # peft adds the same products in another order

_LAYERS = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_TEXT = {**_LAYERS, "vocab_size": 64, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
_IMAGE = {**_LAYERS, "image_size": 32, "patch_size": 8}
_CLIP, _SIGLIP = ({"model_type": kind, **_IMAGE} for kind in ("clip_vision_model", "siglip_vision_model"))
_ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}


def llava():
    text = {"model_type": "llama", **_TEXT}
    return tf.LlavaForConditionalGeneration(tf.LlavaConfig(text_config=text, vision_config=_CLIP, image_token_index=60))


def qwen2_vl():
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 4}
    config = tf.Qwen2VLConfig(text_config=_TEXT | {"rope_parameters": _ROPE}, vision_config=vision)
    return tf.Qwen2VLForConditionalGeneration(config)


def paligemma():
    shape = {"projection_dim": 32, "hidden_size": 32, "image_token_index": 60}
    config = tf.PaliGemmaConfig(text_config={"model_type": "gemma", **_TEXT}, vision_config=_SIGLIP, **shape)
    model = tf.PaliGemmaForConditionalGeneration(config)
    model.set_attn_implementation("eager")  # transformers' sdpa lets tokens see those that follow in text alone
    return model


def gemma3():
    shape = {"mm_tokens_per_image": 4, "image_token_index": 60}
    return tf.Gemma3ForConditionalGeneration(tf.Gemma3Config(text_config=_TEXT, vision_config=_SIGLIP, **shape))


def internvl():
    vision = _IMAGE | {"image_size": [32, 32], "patch_size": [8, 8]}
    text = {"model_type": "qwen2", **_TEXT}
    return tf.InternVLForConditionalGeneration(tf.InternVLConfig(text_config=text, vision_config=vision))


def vit():
    return tf.ViTForImageClassification(tf.ViTConfig(**_IMAGE))


def around_a_text_model(key):
    """What transformers 4.51 called the tensor that is ``key`` now."""
    key = re.sub(r"\bmodel\.language_model\.", "language_model.model.", key)
    key = re.sub(r"\bmodel\.(vision_tower|multi_modal_projector)\.", r"\1.", key)
    key = re.sub(r"\bvision_tower\.(encoder\.layers)\.", r"vision_tower.vision_model.\1.", key)
    return re.sub(r"\bmodel\.lm_head\.", "model.language_model.lm_head.", key)


def in_one_model(key):
    return key.replace("model.language_model.", "model.").replace("model.visual.", "visual.")


def with_blocks(key):
    key = key.replace("vit.layers", "vit.encoder.layer").replace("attention.o_proj", "attention.output.dense")
    return key.replace("attention.q_proj", "attention.attention.query").replace(
        "attention.v_proj", "attention.attention.value"
    )


ARCHITECTURES = {
    "llava": (llava, around_a_text_model),
    "qwen2_vl": (qwen2_vl, in_one_model),
    "paligemma": (paligemma, around_a_text_model),
    "gemma3": (gemma3, around_a_text_model),
    "internvl": (internvl, around_a_text_model),
    "vit": (vit, with_blocks),
}
LEFT_RANDOM_BY_PEFT = ("qwen2_vl", "internvl", "vit")

_IDS = {"input_ids": torch.arange(3, 11)[None]}


def logits(model):
    pixels = torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)
    with torch.no_grad():
        return model.eval()(**({"pixel_values": pixels} if hasattr(model.get_base_model(), "vit") else _IDS)).logits


def trained(model, **config):
    """An adapter of PEFT's in a copy of ``model``, with values of its own in all that it trains."""
    config = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, **config}
    model = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**config))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter) / 20)
    return model


def aged(folder, old, **config):
    """Give the tensors in ``folder`` their ``old`` names, and its configuration these values."""
    weights, settings = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    tensors = load_file(weights)
    renamed = {old(key): t for key, t in tensors.items()}
    assert len(renamed) == len(tensors) and renamed.keys() != tensors.keys()
    save_file(renamed, weights)
    settings.write_text(json.dumps(json.loads(settings.read_text()) | config))


def assert_same(model, theirs, name="default"):
    """``model`` holds the adapter of ``theirs``, a model of PEFT's, and computes with it what that does."""
    held = fp.get_peft_model_state_dict(model, adapter_name=name)
    expected = peft.get_peft_model_state_dict(theirs)
    assert held.keys() == expected.keys() and all(torch.equal(held[key], t) for key, t in expected.items())
    one, other = logits(model), logits(theirs)
    assert (one - other).abs().max() < EQUAL * other.abs().max()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_folder_with_the_paths_of_old_gives_the_adapter_that_it_holds(architecture, tmp_path):
    make, old = ARCHITECTURES[architecture]
    base = make()
    theirs = trained(base)
    theirs.save_pretrained(tmp_path)
    aged(tmp_path, old, **({"target_modules": ["query", "value"]} if architecture == "vit" else {}))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        ours = fp.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert_same(ours, theirs)
    if architecture not in LEFT_RANDOM_BY_PEFT:
        assert_same(ours, peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path))
    ours.save_pretrained(tmp_path / "again")
    assert_same(ours, peft.PeftModel.from_pretrained(base, tmp_path / "again"))


TARGETS = {
    "names": (["q_proj", "v_proj"], ["q_proj", "v_proj"]),
    "expression": (r".*language_model.*\.q_proj", r"language_model\.model\.layers\.\d+\.self_attn\.q_proj"),
    "expression that matches more now": (
        r"model\.language_model.*\.q_proj",
        r"(model\.vision_tower.*|language_model\.model.*)\.q_proj",
    ),
    "paths": (
        ["model.language_model.layers.1.mlp.up_proj", "model.vision_tower.encoder.layers.0.mlp.fc1"],
        ["language_model.model.layers.1.mlp.up_proj", "vision_tower.vision_model.encoder.layers.0.mlp.fc1"],
    ),
}


@pytest.mark.parametrize(("now", "then"), TARGETS.values(), ids=TARGETS)
def test_targets_that_are_named_by_paths_of_old_are_found(now, then, tmp_path):
    base = llava()
    theirs = trained(base, target_modules=now)
    theirs.save_pretrained(tmp_path)
    aged(tmp_path, around_a_text_model, target_modules=then)
    assert_same(fp.PeftModel.from_pretrained(base, tmp_path), theirs)


def test_paths_of_old_load_beside_another_adapter_and_into_it(tmp_path):
    base = llava()
    theirs = trained(base)
    theirs.save_pretrained(tmp_path)
    aged(tmp_path, around_a_text_model)
    ours = fp.get_peft_model(copy.deepcopy(base), fp.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]))
    for name in ("other", "default"):
        ours.load_adapter(tmp_path, name)
        ours.set_adapter(name)
        assert_same(ours, theirs, name)


def test_ranks_alphas_saved_modules_and_tokens_go_with_the_paths_of_old(tmp_path):
    base = llava()
    layer = r"layers.1.self_attn.q_proj"
    theirs = trained(
        base,
        rank_pattern={f"model.language_model.{layer}": 2},
        alpha_pattern={f"model.language_model.{layer}": 3},
        modules_to_save=["lm_head", "multi_modal_projector"],
        trainable_token_indices={"embed_tokens": [4, 6]},
    )
    theirs.save_pretrained(tmp_path)
    aged(
        tmp_path,
        around_a_text_model,
        rank_pattern={f"^language_model.model.{layer}": 2},
        alpha_pattern={f"^language_model.model.{layer}": 3},
        modules_to_save=["language_model.lm_head", "multi_modal_projector"],
        trainable_token_indices={"language_model.model.embed_tokens": [4, 6]},
    )
    assert_same(fp.PeftModel.from_pretrained(base, tmp_path), theirs)


@pytest.mark.parametrize("r", [4, 2])
@pytest.mark.parametrize("source", ["folder", "tensors"])
def test_paths_of_old_swap_in(source, r, tmp_path):
    base = qwen2_vl()
    theirs = trained(base, r=r, lora_alpha=8)
    theirs.save_pretrained(tmp_path)
    aged(tmp_path, in_one_model)
    ours = fp.get_peft_model(copy.deepcopy(base), fp.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    ours.hotswap_adapter(tmp_path if source == "folder" else load_file(tmp_path / "adapter_model.safetensors"))
    assert ours.peft_config["default"].r == r
    ours.save_pretrained(tmp_path / "again")
    assert_same(fp.PeftModel.from_pretrained(base, tmp_path / "again"), theirs)


def lacks_a_layer(tensors):
    return {key: t for key, t in tensors.items() if "layers.1.self_attn.v_proj" not in key}


def has_half_a_layer(tensors):
    return {key: t for key, t in tensors.items() if "layers.1.self_attn.v_proj.lora_B" not in key}


def is_of_nowhere(tensors):
    return {key.replace("language_model", "speech_model"): t for key, t in tensors.items()}


@pytest.mark.parametrize("spoil", [lacks_a_layer, has_half_a_layer, is_of_nowhere])
def test_what_does_not_fit_after_renaming_is_refused(spoil, tmp_path):
    base = llava()
    trained(base).save_pretrained(tmp_path)
    aged(tmp_path, around_a_text_model)
    weights = tmp_path / "adapter_model.safetensors"
    save_file(spoil(load_file(weights)), weights)
    with pytest.raises(ValueError, match="does not fit the adapter's configuration and this model"):
        fp.PeftModel.from_pretrained(base, tmp_path)
    assert not any("lora_" in name for name, _ in base.named_parameters())


def test_tensors_for_layers_that_the_configuration_does_not_mean_are_refused(tmp_path):
    base = llava()
    trained(base).save_pretrained(tmp_path)
    aged(tmp_path, around_a_text_model, target_modules=r"language_model\.model.*\.q_proj")
    with pytest.raises(ValueError, match="matches no module"):
        fp.PeftModel.from_pretrained(base, tmp_path)


def test_layers_whose_weights_transformers_converts_are_refused(tmp_path, monkeypatch):
    base = llava()
    trained(base).save_pretrained(tmp_path)
    aged(tmp_path, around_a_text_model)
    renamings = lora_moved.get_model_conversion_mapping
    turned = WeightConverter(r"self_attn\.q_proj\.weight", r"self_attn.q_proj.weight", [Transpose(0, 1)])
    monkeypatch.setattr(lora_moved, "get_model_conversion_mapping", lambda model: [*renamings(model), turned])
    with pytest.raises(ValueError, match="does not fit the adapter's configuration and this model"):
        fp.PeftModel.from_pretrained(base, tmp_path)
