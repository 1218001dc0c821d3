"""transformers: loaded in 4 bits, saved, reloaded, bitsandbytes checkpoints read as they are, live models replaced."""

import copy
import gc
import json
import re
import subprocess
import sys
import warnings
from pathlib import Path

import bitsandbytes as bnb
import numpy as np
import peft
import pytest
import torch
import transformers
from architectures import dequantized, relative, unchanged
from safetensors.torch import load_file, save_file
from tiny import tiny_llama
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
)
from transformers.pytorch_utils import Conv1D

import pyfastpeft as fp
from pyfastpeft.integrations.transformers import FastPeftQuantizer, _let_go

SMALL_BERT = {
    "vocab_size": 64,
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": 64,
}

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = SIZES | {"num_key_value_heads": 2}
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 128, "n_positions": 64, "eos_token_id": 2}
OPT = SIZES | {"ffn_dim": 96, "word_embed_proj_dim": 64, "pad_token_id": 1}
T5 = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4, "vocab_size": 128}

# name: (config class, its arguments, auto class, linear layers in 4 bits)
MODELS = {
    "llama": ("LlamaConfig", GROUPED, AutoModelForCausalLM, 14),
    "llama_tied": ("LlamaConfig", GROUPED | {"tie_word_embeddings": True}, AutoModelForCausalLM, 14),
    "qwen2": ("Qwen2Config", GROUPED, AutoModelForCausalLM, 14),
    "mistral": ("MistralConfig", GROUPED, AutoModelForCausalLM, 14),
    "gpt2": ("GPT2Config", GPT2, AutoModelForCausalLM, 8),
    "phi": ("PhiConfig", SIZES, AutoModelForCausalLM, 12),
    "gemma": ("GemmaConfig", GROUPED | {"head_dim": 16}, AutoModelForCausalLM, 14),
    "falcon": ("FalconConfig", SIZES | {"bias": True}, AutoModelForCausalLM, 8),
    "opt": ("OPTConfig", OPT, AutoModelForCausalLM, 12),
    "t5": ("T5Config", T5, AutoModelForSeq2SeqLM, 28),  # its `wo` stay in float32, as transformers asks
    "bert": ("BertConfig", SIZES, AutoModelForMaskedLM, 13),
    "bert_classifier": ("BertConfig", SIZES, AutoModelForSequenceClassification, 13),
    "nomic_bert": ("NomicBertConfig", SIZES, AutoModelForMaskedLM, 15),  # a file joins its projections
}
SETTINGS = [{}, {"quant_type": "fp4", "double_quant": True}, {"quant_type": "int4", "blocksize": 32}]


def saved(folder, name="llama", dtype=torch.float32):
    """A random tiny model in ``folder``; (the model, its auto class)."""
    config, arguments, auto, _ = MODELS[name]
    model = auto.from_config(getattr(transformers, config)(**arguments)).to(dtype).eval()
    for module in model.modules():
        if isinstance(module, (torch.nn.Linear, Conv1D)):
            torch.nn.init.normal_(module.weight, std=0.2)
    model.tie_weights()
    model.save_pretrained(folder)
    return model, auto


def output(model, ids):
    extra = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=ids, **extra).logits


def layers_4bit(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, fp.nn.Linear4bit)}


def same_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture
def ids():
    return torch.randint(3, 100, (2, 9))


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: s.get("quant_type", "nf4"))
@pytest.mark.parametrize("name", MODELS)
def test_loaded_in_4_bits_saved_and_reloaded_it_is_the_same_model(tmp_path, ids, name, settings):
    original, auto = saved(tmp_path / "full", name)
    model = auto.from_pretrained(tmp_path / "full", quantization_config=fp.FastPeftConfig(**settings))
    layers = layers_4bit(model)
    assert len(layers) == MODELS[name][3]
    for path, layer in layers.items():
        source = original.get_submodule(path)
        weight = source.weight.t() if isinstance(source, Conv1D) else source.weight
        expected = fp.quantize_4bit(weight.detach(), layer.quant_type, layer.blocksize, layer.double_quant)
        assert torch.equal(layer.dequantize(), expected.dequantize())

    # The plain model with the decoded weights computes the same.
    for path, layer in layers.items():
        source = original.get_submodule(path)
        weight = layer.dequantize()
        source.weight.data = weight.t() if isinstance(source, Conv1D) else weight
    expected, actual = output(original, ids), output(model, ids)
    assert (actual - expected).norm() <= 1e-4 * expected.norm()

    model.save_pretrained(tmp_path / "quantized")
    again, report = auto.from_pretrained(tmp_path / "quantized", output_loading_info=True)
    assert not any(report.values()), report
    assert same_state(model, again) and torch.equal(output(again, ids), actual)
    again.save_pretrained(tmp_path / "twice")
    assert (tmp_path / "twice" / "model.safetensors").read_bytes() == (
        tmp_path / "quantized" / "model.safetensors"
    ).read_bytes()


def test_reload_needs_nothing_but_the_import(tmp_path, ids):
    _, auto = saved(tmp_path / "full")
    model = auto.from_pretrained(tmp_path / "full", quantization_config=fp.FastPeftConfig())
    model.save_pretrained(tmp_path / "quantized")
    torch.save(output(model, ids), tmp_path / "expected.pt")
    torch.save(ids, tmp_path / "ids.pt")
    code = (
        "import sys, torch, pyfastpeft\n"
        "from transformers import AutoModelForCausalLM\n"
        "folder = sys.argv[1]\n"
        "model = AutoModelForCausalLM.from_pretrained(folder + '/quantized')\n"
        "with torch.no_grad(): logits = model(torch.load(folder + '/ids.pt')).logits\n"
        "assert torch.equal(logits, torch.load(folder + '/expected.pt'))\n"
        "assert 'bitsandbytes' not in sys.modules and 'peft' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_each_weight_is_quantized_before_the_next_is_read(tmp_path, monkeypatch):
    _, auto = saved(tmp_path)
    alive, quantize = [], fp.integrations.transformers.quantize_4bit
    linear = {(64, 64), (32, 64), (96, 64), (64, 96)}

    def full_precision(o):
        tensor = type(o) in (torch.Tensor, torch.nn.Parameter) and o.is_floating_point() and not o.is_meta
        return tensor and tuple(o.shape) in linear

    def watched(weight, *settings):
        alive.append(sum(full_precision(o) for o in gc.get_objects()))
        return quantize(weight, *settings)

    monkeypatch.setattr(fp.integrations.transformers, "quantize_4bit", watched)
    model = auto.from_pretrained(tmp_path, quantization_config=fp.FastPeftConfig())
    assert len(alive) == 14 and min(alive) >= 1 and max(alive) - min(alive) <= 1, alive
    assert all(p.dtype == torch.uint8 for layer in layers_4bit(model).values() for p in layer.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_is_that_of_all_that_is_not_in_4_bits_at_every_load(tmp_path, dtype):
    _, auto = saved(tmp_path / "full", "qwen2")
    model = auto.from_pretrained(tmp_path / "full", quantization_config=fp.FastPeftConfig(), dtype=dtype)
    model.save_pretrained(tmp_path / "quantized")
    for loaded in (model, auto.from_pretrained(tmp_path / "quantized", dtype=dtype)):
        kinds = {p.dtype for p in loaded.parameters()}
        assert kinds == {dtype, torch.uint8}
    other = auto.from_pretrained(tmp_path / "quantized", dtype=torch.bfloat16)
    assert {p.dtype for p in other.parameters()} == {torch.bfloat16, torch.uint8}
    assert all(layer.packed.scale.dtype == torch.float32 for layer in layers_4bit(other).values())


def test_names_of_modules_are_a_list_and_a_blocksize_any_integer():
    for names in ("q_proj", ["q_proj", 1], {"q_proj": True}, 7):
        with pytest.raises(TypeError, match=r"modules_to_not_convert is .* list, tuple or set of names"):
            fp.FastPeftConfig(modules_to_not_convert=names)
    for names in (["b", "a"], ("b", "a"), {"a", "b"}):
        config = fp.FastPeftConfig(blocksize=np.int64(128), modules_to_not_convert=names)
        saved = json.loads(config.to_json_string(use_diff=False))
        assert saved["blocksize"] == 128 and sorted(saved["modules_to_not_convert"]) == ["a", "b"]


def test_modules_to_not_convert_stay_in_full_precision_through_a_reload(tmp_path, ids):
    original, auto = saved(tmp_path / "full")
    config = fp.FastPeftConfig(modules_to_not_convert=["lm_head", "model.layers.1.mlp", "q_proj"])
    model = auto.from_pretrained(tmp_path / "full", quantization_config=config)
    assert len(layers_4bit(model)) == 14 - 3 - 2
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight, original.model.layers[1].mlp.up_proj.weight)
    model.save_pretrained(tmp_path / "quantized")
    again = auto.from_pretrained(tmp_path / "quantized")
    assert same_state(model, again) and torch.equal(output(model, ids), output(again, ids))


def test_the_output_layer_is_converted_when_asked_for_unless_it_is_tied(tmp_path):
    for name, converted in (("llama", True), ("llama_tied", False)):
        _, auto = saved(tmp_path / name, name)
        config = fp.FastPeftConfig(modules_to_not_convert=[])
        model = auto.from_pretrained(tmp_path / name, quantization_config=config)
        assert ("lm_head" in layers_4bit(model)) == converted


_WAVLM = {
    "conv_dim": (32,),
    "conv_stride": (5,),
    "conv_kernel": (10,),
    "num_feat_extract_layers": 1,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
MLA = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16}
MLA |= {"head_dim": 16, "n_routed_experts": 4, "num_key_value_heads": 4}
# class: (arguments of its configuration, names of the layers in 4 bits)
READ = {
    "MambaForCausalLM": ({"state_size": 4}, "in_proj x_proj out_proj"),
    "LongT5ForConditionalGeneration": (T5, "q k v o wi"),
    "WavLMForSequenceClassification": (
        _WAVLM,
        "intermediate_dense output_dense projection projector gru_rel_pos_linear",
    ),
    "MobileBertForMaskedLM": (
        {"embedding_size": 32, "intra_bottleneck_size": 32, "num_feedforward_networks": 1},
        "embedding_transformation query key value dense",
    ),
    "Wav2Vec2ForXVector": (
        _WAVLM | {"tdnn_dim": (64,), "tdnn_kernel": (1,), "tdnn_dilation": (1,), "xvector_output_dim": 64},
        "q_proj k_proj v_proj out_proj intermediate_dense output_dense projection projector feature_extractor",
    ),
    "RwkvForCausalLM": ({"rescale_every": 1, "attention_hidden_size": 64}, "key value receptance"),
    "LongcatFlashForCausalLM": (
        MLA | {"num_layers": 1, "ffn_hidden_size": 64, "expert_ffn_hidden_size": 64, "moe_topk": 2},
        "q_a_proj q_b_proj kv_a_proj_with_mqa kv_b_proj o_proj gate_proj up_proj down_proj",
    ),
    "HYV4ForCausalLM": (
        MLA
        | {"num_experts_per_tok": 2, "moe_intermediate_size": 64, "index_topk": 3}
        | {"layer_types": ["indexed_attention"] * 2, "index_n_heads": 2, "index_head_dim": 32},
        "q_a_proj q_b_proj kv_a_proj_with_mqa kv_b_proj o_proj gate_proj up_proj down_proj wq_b wk",
    ),
    "Gemma3nForCausalLM": (
        {"hidden_size_per_layer_input": 32, "vocab_size_per_layer_input": 64, "laurel_rank": 32, "head_dim": 16}
        | {"altup_num_inputs": 2, "num_kv_shared_layers": 0, "num_key_value_heads": 4}
        | {"activation_sparsity_pattern": None, "layer_types": ["full_attention"] * 2},
        "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj linear_left linear_right modality_router 0 "
        "per_layer_input_gate per_layer_projection per_layer_model_projection",
    ),
    "LayoutLMv3ForTokenClassification": (
        {"visual_embed": False, "coordinate_size": 8, "shape_size": 16},
        "query key value dense",
    ),
    "BloomForCausalLM": ({"pretraining_tp": 2, "slow_but_exact": True}, "query_key_value dense_h_to_4h"),
}


@pytest.mark.parametrize("name", READ)
def test_a_layer_whose_weight_the_module_around_it_reads_stays_in_full_precision(tmp_path, ids, name):
    arguments, names = READ[name]
    cls = getattr(transformers, name)
    original = cls(cls.config_class(**(SIZES | arguments))).eval()
    original.save_pretrained(tmp_path / "full")
    given = {"input_values": torch.randn(2, 400)} if name.startswith("Wav") else {"input_ids": ids}
    given |= {"decoder_input_ids": ids} if original.config.is_encoder_decoder else {}
    skipped = ["lm_head", "head", "classifier", "predictions.decoder"]
    theirs = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=skipped)
    live = cls.from_pretrained(tmp_path / "full", quantization_config=theirs).eval()
    live.save_pretrained(tmp_path / "bnb")
    configs = [fp.FastPeftConfig(), fp.FastPeftConfig(modules_to_not_convert=skipped), fp.FastPeftConfig()]
    loaded = [
        cls.from_pretrained(tmp_path / folder, quantization_config=config).eval()
        for folder, config in zip(("full", "full", "bnb"), configs, strict=True)
    ]
    for model in (*loaded, fp.accelerate(live)):
        assert {path.rpartition(".")[2] for path in layers_4bit(model)} == set(names.split())
        assert "cls.predictions.dense" not in layers_4bit(model)
        for path, layer in layers_4bit(model).items():
            assert relative(layer.dequantize(), original.get_submodule(path).weight) < 0.2
        with torch.no_grad():
            assert relative(model(**given).logits, dequantized(model)(**given).logits) < 1e-4


_POCKET = {"audio_prompt_token_id": 10, "audio_latent_token_id": 11, "audio_bos_token_id": 4, "latent_dim": 64}
_POCKET |= {"flow_head_config": {"condition_dim": 64, "hidden_size": 64, "num_hidden_layers": 1, "latent_dim": 64}}
LATENTS = {"audio_prompt_latents": torch.ones(1, 2, 64) / 2, "audio_latents": torch.ones(1, 2, 64) / 3}
# class: (arguments of its configuration, inputs beside the ids or in their place, the output that is compared)
DTYPE_TAKEN = {
    "MambaForCausalLM": ({"state_size": 4, "tie_word_embeddings": False}, {}, "logits"),
    "Wav2Vec2ForPreTraining": (
        _WAVLM,
        {"input_values": torch.ones(2, 400).cumsum(1).sin()},
        "projected_quantized_states",
    ),
    "PocketTTSModel": (_POCKET | {"audio_prompt_bos_token_id": 12}, LATENTS, "last_hidden_state"),
}


@pytest.mark.parametrize("name", DTYPE_TAKEN)
def test_what_a_layer_is_called_with_is_never_brought_to_the_dtype_of_codes(tmp_path, name):
    arguments, given, output = DTYPE_TAKEN[name]
    cls = getattr(transformers, name)
    cls(cls.config_class(**(SIZES | arguments))).save_pretrained(tmp_path)
    given = given if "input_values" in given else given | {"input_ids": torch.tensor([[10, 10, 7, 8, 4, 11, 11]])}
    for compute_dtype in (None, torch.float32):
        config = fp.FastPeftConfig(compute_dtype=compute_dtype, modules_to_not_convert=[])
        model = cls.from_pretrained(tmp_path, quantization_config=config).eval()
        with torch.no_grad():
            got, expected = (m(**given)[output] for m in (model, dequantized(model)))
        assert got.is_floating_point() and relative(got, expected) < 1e-4


@pytest.mark.parametrize("name", ["Swinv2Model", "Swin2SRModel"])
def test_tables_of_positions_are_not_brought_to_the_dtype_of_codes(tmp_path, name):
    cls = getattr(transformers, name)
    config = cls.config_class(image_size=32, patch_size=4, embed_dim=64, depths=[1], num_heads=[2], window_size=4)
    original = cls(config)
    original.save_pretrained(tmp_path / "full")
    theirs = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=[])
    cls.from_pretrained(tmp_path / "full", quantization_config=theirs).save_pretrained(tmp_path / "bnb")
    tables = [path for path, _ in original.named_buffers() if path.endswith("relative_coords_table")]
    for folder, chosen in (("full", None), ("full", []), ("bnb", None)):
        model = cls.from_pretrained(
            tmp_path / folder, quantization_config=fp.FastPeftConfig(modules_to_not_convert=chosen)
        )
        assert tables and all(torch.equal(model.get_buffer(path), original.get_buffer(path)) for path in tables)
        assert {path.rpartition(".")[2] for path in layers_4bit(model)} == {"query", "key", "value", "dense"}
        model.save_pretrained(tmp_path / "again")
        again = cls.from_pretrained(tmp_path / "again")
        assert all(torch.equal(again.get_buffer(path), original.get_buffer(path)) for path in tables)


def test_a_layer_that_a_module_calls_from_a_list_stays_in_full_precision(tmp_path):
    sizes = {"conv_dim": 64, "mask_dim": 64, "hidden_dim": 64, "encoder_feedforward_dim": 64, "dim_feedforward": 64}
    sizes |= {"encoder_layers": 1, "decoder_layers": 2, "query_dec_layers": 1, "num_attention_heads": 4}
    stages = ["stage1", "stage2", "stage3", "stage4"]
    swin = {"image_size": 32, "patch_size": 4, "embed_dim": 24, "depths": [1] * 4, "out_features": stages}
    config = transformers.OneFormerConfig(
        backbone_config=transformers.SwinConfig(**swin), **sizes, num_queries=5, task_seq_len=8
    )
    cls, given = transformers.OneFormerModel, (torch.randn(1, 3, 32, 32), torch.randint(0, 30, (1, 8)).float())
    cls(config).save_pretrained(tmp_path / "full")
    theirs = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    cls.from_pretrained(tmp_path / "full", quantization_config=theirs).save_pretrained(tmp_path / "bnb")
    for folder in ("full", "bnb"):
        model = cls.from_pretrained(tmp_path / folder, quantization_config=fp.FastPeftConfig()).eval()
        assert layers_4bit(model) and not any("task_mlp" in path for path in layers_4bit(model))
        with torch.no_grad():
            got, expected = (m(*given).transformer_decoder_mask_predictions for m in (model, dequantized(model)))
            assert relative(got, expected) < 1e-4


@pytest.mark.parametrize("task", ["SequenceClassification", "TokenClassification", "QuestionAnswering"])
@pytest.mark.parametrize("family", ["Bert", "XLMRoberta"])  # the second has its head before its layers
def test_heads_stay_in_full_precision_wherever_a_model_has_them(tmp_path, family, task):
    cls = getattr(transformers, f"{family}For{task}")
    cls(cls.config_class(**SMALL_BERT)).save_pretrained(tmp_path)
    model = cls.from_pretrained(tmp_path, quantization_config=fp.FastPeftConfig())
    assert all(".layer.0." in name or "pooler" in name for name in layers_4bit(model))
    assert sum(".layer.0." in name for name in layers_4bit(model)) == 6


def test_experts_in_one_parameter_are_said_to_stay_in_full_precision(tmp_path):
    cls = transformers.MixtralForCausalLM
    original = cls(cls.config_class(**GROUPED, num_local_experts=4))
    original.save_pretrained(tmp_path / "full")
    left, total = 2 * (4 * 3 * 64 * 96 + 4 * 64), original.num_parameters()  # experts and routers
    said = f"{left:,} of the {total:,} parameters .* 6 weights that no linear layer holds .*experts.gate_up_proj, "
    with pytest.warns(UserWarning, match=said):
        model = cls.from_pretrained(tmp_path / "full", quantization_config=fp.FastPeftConfig())
    model.save_pretrained(tmp_path / "4")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        cls.from_pretrained(tmp_path / "4")
        for name in ("llama_tied", "bert", "gpt2"):  # mostly embeddings and layers
            _, auto = saved(tmp_path / name, name)
            auto.from_pretrained(tmp_path / name, quantization_config=fp.FastPeftConfig())


def test_a_layer_the_checkpoint_lacks_is_initialized_and_quantized(tmp_path):
    original, auto = saved(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["model.layers.0.self_attn.q_proj.weight"]
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    model = auto.from_pretrained(tmp_path, quantization_config=fp.FastPeftConfig())
    weight = model.model.layers[0].self_attn.q_proj.dequantize()
    assert 0.5 * original.config.initializer_range < weight.std() < 2 * original.config.initializer_range


@pytest.mark.parametrize(
    ("saved_as", "opened_as"),
    [("SequenceClassification", ""), ("", "SequenceClassification"), ("MultipleChoice", "NextSentencePrediction")],
)
def test_a_folder_in_4_bits_is_opened_by_classes_that_end_otherwise(tmp_path, saved_as, opened_as):
    saved_as, opened_as = (
        getattr(transformers, f"BertFor{task}" if task else "BertModel") for task in (saved_as, opened_as)
    )
    config = transformers.BertConfig(**SMALL_BERT)
    saved_as(config).save_pretrained(tmp_path / "full")
    first = saved_as.from_pretrained(tmp_path / "full", quantization_config=fp.FastPeftConfig())
    first.save_pretrained(tmp_path / "4")
    again = opened_as.from_pretrained(tmp_path / "4")
    base, other = first.base_model, again.base_model
    ids = torch.randint(1, 64, (2, 5))
    assert same_state(base, other) and layers_4bit(base).keys() == layers_4bit(other).keys()
    assert torch.equal(base(ids).last_hidden_state, other(ids).last_hidden_state)
    for name, parameter in again.named_parameters():  # of the head, which is initialized anew
        if not name.startswith("bert.") and again is not other:
            assert parameter.is_floating_point() and parameter.requires_grad
            assert name.endswith("bias") or 0.01 < parameter.std() < 0.04


def test_dequantize_gives_back_an_ordinary_model(tmp_path, ids):
    for name in ("llama", "gpt2"):
        original, auto = saved(tmp_path / name, name)
        model = auto.from_pretrained(tmp_path / name, quantization_config=fp.FastPeftConfig())
        expected = output(model, ids)
        plain = model.dequantize()
        assert not layers_4bit(plain)
        assert {n: type(m) for n, m in plain.named_modules()} == {n: type(m) for n, m in original.named_modules()}
        assert (output(plain, ids) - expected).norm() <= 1e-5 * expected.norm()
        plain.save_pretrained(tmp_path / "plain")
        assert torch.equal(output(auto.from_pretrained(tmp_path / "plain"), ids), output(plain, ids))


@pytest.mark.parametrize("adapter", ["lora", "prompt", "peft"])
def test_a_model_that_carries_adapters_is_not_dequantized_around_them(tmp_path, ids, adapter):
    name = "bert" if adapter == "prompt" else "llama"
    _, auto = saved(tmp_path, name)
    model = auto.from_pretrained(tmp_path, quantization_config=fp.FastPeftConfig()).eval()
    library = peft if adapter == "peft" else fp
    lora = library.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    config = fp.PromptTuningConfig(num_virtual_tokens=3) if adapter == "prompt" else lora
    adapted = library.get_peft_model(model, config).eval()
    expected = output(adapted, ids)
    with pytest.raises(
        ValueError, match=r"carries adapters, and dequantize\(\) is of a model without; call unload\(\)"
    ):
        model.dequantize()
    assert torch.equal(output(adapted, ids), expected)
    assert not layers_4bit(adapted.unload().dequantize())


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("llama", fp.FastPeftConfig()),
        ("gpt2", fp.FastPeftConfig()),
        ("llama", BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")),
    ],
    ids=["llama", "gpt2", "bitsandbytes"],
)
def test_merged_into_full_precision_it_is_an_ordinary_model(tmp_path, ids, name, config):
    original, auto = saved(tmp_path / "full", name)
    model = auto.from_pretrained(tmp_path / "full", quantization_config=config)
    linear = (torch.nn.Linear, Conv1D)
    names = [n for n, module in model.named_modules() if ".0." in n and isinstance(module, linear)]
    model = fp.get_peft_model(model, fp.LoraConfig(target_modules=names, init_lora_weights=False))
    expected = output(model, ids)
    plain = model.merge_and_unload(dequantize=True)
    assert {n: type(m) for n, m in plain.named_modules()} == {n: type(m) for n, m in original.named_modules()}
    assert (output(plain, ids) - expected).norm() <= 1e-5 * expected.norm()
    plain.save_pretrained(tmp_path / "plain")
    assert torch.equal(output(auto.from_pretrained(tmp_path / "plain"), ids), output(plain, ids))
    assert {p.dtype for p in plain.to(torch.bfloat16).parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("way", ["opened", "cast"])
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("name", ["llama", "bert", "gpt2"])
def test_in_full_precision_it_has_the_dtype_that_it_has_now(tmp_path, ids, name, merged, way):
    _, auto = saved(tmp_path / "full", name, torch.bfloat16)
    model = auto.from_pretrained(tmp_path / "full", quantization_config=fp.FastPeftConfig())
    model.save_pretrained(tmp_path / "nf4")
    model = auto.from_pretrained(tmp_path / "nf4", dtype=torch.float32) if way == "opened" else model.to(torch.float32)
    expected = output(model, ids)
    if merged:
        some = [n for n in layers_4bit(model) if ".0." in n]
        model = fp.get_peft_model(model, fp.LoraConfig(target_modules=some, init_lora_weights=False)).eval()
        expected = output(model, ids)
        plain = model.merge_and_unload(dequantize=True, safe_merge=True)
    else:
        plain = model.dequantize()
    assert {p.dtype for p in plain.parameters()} == {torch.float32}
    assert (output(plain, ids) - expected).norm() <= 1e-5 * expected.norm()


def test_deepcopy_and_a_change_of_mode_leave_the_model_exact(tmp_path, ids):
    _, auto = saved(tmp_path)
    model = auto.from_pretrained(tmp_path, quantization_config=fp.FastPeftConfig())
    expected, twin = output(model, ids), copy.deepcopy(model)
    model.train()
    assert torch.equal(output(model.eval(), ids), expected) and torch.equal(output(twin, ids), expected)
    assert same_state(model, twin)


def test_the_int8_tier_reaches_the_layers_and_is_saved(tmp_path, ids):
    _, auto = saved(tmp_path / "full")
    exact = auto.from_pretrained(tmp_path / "full", quantization_config=fp.FastPeftConfig())
    fast = auto.from_pretrained(tmp_path / "full", quantization_config=fp.FastPeftConfig(compute="int8"))
    y, expected = output(fast, ids), output(exact, ids)
    assert 0 < (y - expected).norm() <= 0.05 * expected.norm()
    fast.save_pretrained(tmp_path / "fast")
    again = auto.from_pretrained(tmp_path / "fast")
    assert {layer.compute for layer in layers_4bit(again).values()} == {"int8"}
    assert torch.equal(output(again, ids), y)


def test_the_trainer_accepts_it_under_an_adapter(tmp_path):
    _, auto = saved(tmp_path / "full")
    model = auto.from_pretrained(tmp_path / "full", quantization_config=fp.FastPeftConfig())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    tuned = fp.get_peft_model(model, fp.LoraConfig(r=4, target_modules="all-linear"))
    rows = [{"input_ids": r, "labels": r} for r in torch.randint(3, 100, (8, 6)).tolist()]
    arguments = transformers.TrainingArguments(
        tmp_path / "run", max_steps=2, per_device_train_batch_size=4, report_to=[], use_cpu=True, save_strategy="no"
    )
    transformers.Trainer(tuned, arguments, train_dataset=rows, data_collator=transformers.default_data_collator).train()
    for path, layer in layers_4bit(model).items():
        original = path.replace(".base_layer", "")
        assert all(torch.equal(t, before[f"{original}.{k}"]) for k, t in layer.state_dict().items() if "weight" in k)


class TestBadInput:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"quant_type": "nf5"}, "quant_type is 'nf5'"),
            ({"blocksize": 48}, "blocksize is 48"),
            ({"quant_type": "int4", "blocksize": 256}, "blocksize is 256"),
            ({"quant_type": "int4", "double_quant": True}, "double_quant is True"),
            ({"compute_dtype": "int8"}, "compute_dtype is"),
            ({"compute_dtype": "nn"}, "compute_dtype is"),
        ],
    )
    def test_a_setting_that_does_not_exist_is_named(self, settings, message):
        with pytest.raises(ValueError, match=message):
            fp.FastPeftConfig(**settings)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"surprise": 1}, "surprise"),
            ({"quant_type": ["nf4"]}, "quant_type is"),
            ({"blocksize": "64"}, "blocksize is"),
        ],
    )
    def test_a_damaged_config_is_refused(self, tmp_path, change, message):
        _, auto = saved(tmp_path / "full")
        auto.from_pretrained(tmp_path / "full", quantization_config=fp.FastPeftConfig()).save_pretrained(tmp_path / "q")
        config = json.loads((tmp_path / "q" / "config.json").read_text())
        config["quantization_config"] |= change
        (tmp_path / "q" / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=message):
            auto.from_pretrained(tmp_path / "q")

    @pytest.mark.parametrize(
        "change",
        [
            lambda s, key: s.pop(f"{key}.absmax"),
            lambda s, key: s.update({f"{key}.absmax": torch.zeros(3)}),
            lambda s, key: s.update({key: torch.zeros(5, 1, dtype=torch.uint8)}),
            lambda s, key: s.update({f"{key}.quant_state.bitsandbytes__nf4": torch.zeros(4, dtype=torch.uint8)}),
        ],
        ids=["missing", "scales", "codes", "json"],
    )
    def test_a_damaged_weight_fails_the_load(self, tmp_path, change):
        _, auto = saved(tmp_path / "full")
        auto.from_pretrained(tmp_path / "full", quantization_config=fp.FastPeftConfig()).save_pretrained(tmp_path / "q")
        state = load_file(tmp_path / "q" / "model.safetensors")
        change(state, "model.layers.0.mlp.up_proj.weight")
        save_file(state, tmp_path / "q" / "model.safetensors", {"format": "pt"})
        with pytest.raises(RuntimeError, match="conversion"):
            auto.from_pretrained(tmp_path / "q")

    @pytest.mark.parametrize("kept", [None, ["q_proj"]])
    def test_a_layer_that_other_blocks_have_fails_the_load(self, tmp_path, kept):
        _, auto = saved(tmp_path / "full")
        config = fp.FastPeftConfig(modules_to_not_convert=kept)
        auto.from_pretrained(tmp_path / "full", quantization_config=config).save_pretrained(tmp_path / "q")
        state = load_file(tmp_path / "q" / "model.safetensors")
        more = auto.from_pretrained(tmp_path / "q", num_hidden_layers=3)  # whose last is new as a whole
        assert more.model.layers[2].self_attn.k_proj.weight.requires_grad
        lacks = "model.layers.0.self_attn.q_proj.weight"
        state = {key: tensor for key, tensor in state.items() if not key.startswith(lacks)}
        save_file(state, tmp_path / "q" / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match=f"the checkpoint lacks {lacks}"):
            auto.from_pretrained(tmp_path / "q")

    def test_packed_weights_that_were_joined_are_named(self, tmp_path):
        _, auto = saved(tmp_path / "full", "nomic_bert")
        auto.from_pretrained(tmp_path / "full", quantization_config=fp.FastPeftConfig()).save_pretrained(tmp_path / "q")
        state = load_file(tmp_path / "q" / "model.safetensors")
        names = sorted(key for key in state if re.search(r"layers\.0\..*[qkv]_proj\.weight$", key))
        joined = torch.cat([state[name] for name in names])
        state = {key: tensor for key, tensor in state.items() if not key.startswith(tuple(names))}
        state[re.sub(r"self_attn\..*", "attn.Wqkv.weight", names[0])] = joined
        save_file(state, tmp_path / "q" / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match=r"layers\.0\..*_proj\.weight is stored as torch\.uint8"):
            auto.from_pretrained(tmp_path / "q")

    def test_a_truncated_file_fails_the_load(self, tmp_path):
        _, auto = saved(tmp_path)
        file = tmp_path / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
        with pytest.raises(Exception, match=r"(?i)safetensors|incomplete|header"):
            auto.from_pretrained(tmp_path, quantization_config=fp.FastPeftConfig())

    def test_disk_offload_is_refused(self, tmp_path):
        _, auto = saved(tmp_path)
        with pytest.raises(ValueError, match="disk"):
            auto.from_pretrained(tmp_path, quantization_config=fp.FastPeftConfig(), device_map={"": "disk"})

    def test_a_cpu_beside_gpus_is_refused(self):
        quantizer = FastPeftQuantizer(fp.FastPeftConfig())
        for gpu in (0, "cuda:0", torch.device("cuda:0")):
            with pytest.raises(
                ValueError, match=r"sends 'model.layers.1' to 'cpu', 'lm_head' to 'disk'; a 4-bit model"
            ):
                places = {"model.layers.0": gpu, "model.layers.1": "cpu", "lm_head": "disk"}
                quantizer.validate_environment(device_map=places)
            quantizer.validate_environment(device_map={"model": gpu, "lm_head": "cuda:1"})
        for whole in ("auto", None, {"": "cpu"}, {"": torch.device("cpu")}, {"model": "cpu", "lm_head": "cpu"}):
            quantizer.validate_environment(device_map=whole)

    def test_a_model_with_nothing_to_convert_is_refused(self, tmp_path):
        _, auto = saved(tmp_path)
        config = fp.FastPeftConfig(modules_to_not_convert=["model", "lm_head"])
        with pytest.raises(ValueError, match="no linear layer to quantize"):
            auto.from_pretrained(tmp_path, quantization_config=config)


class TestBitsandbytesCheckpoint:
    """A folder that transformers and bitsandbytes wrote is read as it is."""

    @pytest.fixture(params=[("nf4", False), ("nf4", True), ("fp4", True)], ids=["nf4", "nf4_double", "fp4_double"])
    def folder(self, request, tmp_path):
        quant_type, double = request.param
        _, auto = saved(tmp_path / "full", dtype=torch.bfloat16)
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quant_type,
            bnb_4bit_use_double_quant=double,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        theirs = auto.from_pretrained(tmp_path / "full", quantization_config=config, dtype=torch.bfloat16)
        theirs.save_pretrained(tmp_path / "bnb")
        return tmp_path / "bnb"

    def test_codes_and_scales_are_the_files(self, folder):
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=fp.FastPeftConfig())
        stored, ours = load_file(folder / "model.safetensors"), model.state_dict()
        assert len(layers_4bit(model)) == 14 and ours.keys() == stored.keys()
        assert all(torch.equal(ours[key], stored[key]) for key in stored)

    def test_it_computes_what_bitsandbytes_decodes(self, folder, ids):
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=fp.FastPeftConfig())
        theirs = AutoModelForCausalLM.from_pretrained(folder)
        for path, layer in layers_4bit(model).items():
            assert layer.compute_dtype == torch.bfloat16
            source = theirs.get_submodule(path).weight
            if source.quant_state.shape[1] % 64 == 0:  # elsewhere bitsandbytes decodes wrongly on a CPU
                assert torch.equal(layer.dequantize(), bnb.functional.dequantize_4bit(source.data, source.quant_state))

    def test_saved_by_us_it_reloads_as_ours(self, folder, ids, tmp_path):
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=fp.FastPeftConfig())
        model.save_pretrained(tmp_path / "ours")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
        assert again.config.quantization_config.quant_method == "pyfastpeft"
        assert same_state(model, again) and torch.equal(output(model, ids), output(again, ids))

    def test_how_to_compute_can_be_chosen_anew(self, folder):
        config = fp.FastPeftConfig(compute_dtype="float32", compute="int8")
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
        chosen = {(layer.compute_dtype, layer.compute) for layer in layers_4bit(model).values()}
        assert chosen == {(torch.float32, "int8")}

    def test_without_our_config_bitsandbytes_reads_it_as_ever(self, folder):
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert sum(isinstance(m, bnb.nn.Linear4bit) for m in model.modules()) == 14

    def test_8_bits_are_refused(self, folder):
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] |= {"load_in_4bit": False, "load_in_8bit": True}
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match="8 bits"):
            AutoModelForCausalLM.from_pretrained(folder, quantization_config=fp.FastPeftConfig())

    def test_layers_it_left_in_full_precision_stay_so(self, folder, ids):
        name = "model.layers.0.mlp.up_proj.weight"
        state = load_file(folder / "model.safetensors")
        for key in [key for key in state if key.startswith(name)]:
            del state[key]
        state[name] = torch.randn(96, 64, dtype=torch.bfloat16)
        save_file(state, folder / "model.safetensors", {"format": "pt"})
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=fp.FastPeftConfig())
        assert len(layers_4bit(model)) == 13
        assert torch.equal(model.model.layers[0].mlp.up_proj.weight, state[name])
        assert output(model, ids).isfinite().all()


def test_what_a_checkpoint_says_of_its_text_model_counts_as_what_it_says_of_itself(tmp_path, ids):
    vision = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    vision |= {"image_size": 16, "patch_size": 8, "projection_dim": 32, "model_type": "clip_vision_model"}
    text = GROUPED | {"model_type": "llama"}
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=127)
    auto = transformers.AutoModelForImageTextToText
    auto.from_config(config).save_pretrained(tmp_path / "full")
    model = auto.from_pretrained(tmp_path / "full", quantization_config=fp.FastPeftConfig())
    model.save_pretrained(tmp_path / "ours")
    held = json.loads((tmp_path / "ours" / "config.json").read_text())
    ours = held.pop("quantization_config")
    for settings in (ours, {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}):
        held["text_config"]["quantization_config"] = settings
        (tmp_path / "ours" / "config.json").write_text(json.dumps(held))
        again = auto.from_pretrained(tmp_path / "ours", quantization_config=fp.FastPeftConfig(compute="int8"))
        assert {layer.compute for layer in layers_4bit(again).values()} == {"int8"} and same_state(model, again)
        again.save_pretrained(tmp_path / "again")
        once_more = auto.from_pretrained(tmp_path / "again")
        assert same_state(model, once_more) and torch.equal(output(once_more, ids), output(again, ids))


def bnb_layers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)}


class TestAccelerate:
    """``accelerate`` puts our layers into a live model."""

    @pytest.fixture
    def model(self, tmp_path):
        _, auto = saved(tmp_path, "llama", torch.bfloat16)
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
        return auto.from_pretrained(tmp_path, quantization_config=config, dtype=torch.bfloat16)

    def test_every_layer_is_replaced_in_place_with_the_same_weights(self, model):
        with unchanged(model):
            assert fp.accelerate(model) is model
        assert len(layers_4bit(model)) == 14 and not any(isinstance(m, bnb.nn.Linear4bit) for m in model.modules())

    def test_what_it_saves_bitsandbytes_reads(self, model, tmp_path):
        fp.accelerate(model).save_pretrained(tmp_path / "saved")
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
        assert sum(isinstance(m, bnb.nn.Linear4bit) for m in theirs.modules()) == 14
        assert same_state(model, theirs)

    def test_after_an_eval_forward_the_codes_are_still_exact(self, model):
        path = "model.layers.0.self_attn.q_proj"
        layer = model.get_submodule(path)
        codes = layer.weight.data.clone()
        layer.eval()(torch.randn(2, 64, dtype=torch.bfloat16))
        fp.accelerate(model)
        assert torch.equal(model.get_submodule(path).state_dict()["weight"], codes)

    def test_a_peft_model_trains_on_with_exact_gradients(self, model, ids):
        tuned = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        assert fp.accelerate(tuned) is tuned
        assert len(layers_4bit(tuned)) == 14
        tuned.eval()(input_ids=ids)

        batches = [ids, *(torch.randint_like(ids, 2, int(ids.max()) + 1) for _ in range(11))]

        def gradients():
            found = []
            for batch in batches:
                tuned.zero_grad()
                tuned.train()(input_ids=batch, labels=batch).loss.backward()
                found.append({n: p.grad.float() for n, p in tuned.named_parameters() if p.grad is not None})
            return {name: torch.stack([f[name] for f in found]) for name in found[0]}

        def decoded(layer, dtype):
            plain = torch.nn.Linear(layer.in_features, layer.out_features, bias=False, dtype=dtype)
            plain.weight = torch.nn.Parameter(layer.dequantize(dtype), requires_grad=False)
            return plain

        # The same model with every base weight decoded into an ordinary layer: in bf16, and, as what is right, in
        # float32.
        got, layers = gradients(), layers_4bit(tuned)
        assert len(got) == 8
        for name, layer in layers.items():
            tuned.set_submodule(name, decoded(layer, torch.bfloat16))
        usual = gradients()
        tuned.float()
        for name, layer in layers.items():
            tuned.set_submodule(name, decoded(layer, torch.float32))
        right = gradients()
        for name, layer in layers.items():
            layer.compute_dtype = None
            tuned.set_submodule(name, layer)
        for name, gradient in gradients().items():
            assert (gradient - right[name]).norm() <= 1e-5 * right[name].norm(), name
        got, usual, right = (torch.cat([g[n].flatten() for n in right]) for g in (got, usual, right))
        assert (got - right).norm() <= 2 * (usual - right).norm()

    def test_our_adapters_over_bitsandbytes_train_on_after_an_evaluation_and_merge(self, model, ids):
        expected = {name: fp.nn.Linear4bit.from_bnb(layer).dequantize() for name, layer in bnb_layers(model).items()}
        tuned = fp.get_peft_model(model, fp.LoraConfig(r=4, target_modules=["q_proj"], use_dora=True))
        assert not bnb_layers(tuned) and tuned.get_nb_trainable_parameters()[1] > 14 * 64 * 16
        tuned.eval()(input_ids=ids)
        tuned.train()(input_ids=ids, labels=ids).loss.backward()
        gradients = [p.grad for n, p in tuned.named_parameters() if "lora_B" in n]
        assert len(gradients) == 2 and all(g.abs().sum() > 0 for g in gradients)
        merged = tuned.merge_and_unload(dequantize=True)
        layers = {n: m for n, m in merged.named_modules() if n in expected}
        assert len(layers) == 14
        for name, layer in layers.items():
            torch.testing.assert_close(layer.weight.data, expected[name], rtol=1e-2, atol=1e-6)

    def test_a_refused_adapter_leaves_bitsandbytes_layers_in_place(self, model):
        held = bnb_layers(model)
        with pytest.raises(ValueError, match="target_modules"):
            fp.get_peft_model(model, fp.LoraConfig(target_modules=["no_such"]))
        assert bnb_layers(model) == held and len(held) == 14

    def test_a_layer_whose_weight_is_read_comes_in_full_precision_under_adapters_of_ours(self, tmp_path, monkeypatch):
        cls = transformers.LongT5ForConditionalGeneration
        sizes = {"vocab_size": 128, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}
        cls(cls.config_class(**sizes)).save_pretrained(tmp_path)
        config = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["lm_head"])
        model = cls.from_pretrained(tmp_path, quantization_config=config)
        assert {n.rpartition(".")[2] for n in bnb_layers(model)} == {"q", "k", "v", "o", "wi", "wo"}
        with monkeypatch.context() as context:  # as on a GPU, where get_peft_model leaves them
            context.setattr("pyfastpeft.peft_model.take_over", lambda *_: [])
            tuned = fp.get_peft_model(model, fp.LoraConfig(target_modules=["wi", "wo"]))
        tuned.add_adapter("bottleneck", fp.BottleneckConfig(target_modules=["wi", "wo"]))
        fp.accelerate(tuned)
        held = {n.split(".")[-3]: type(m) for n, m in tuned.named_modules() if n.endswith(".base_layer.base_layer")}
        assert held == {"wi": fp.nn.Linear4bit, "wo": torch.nn.Linear}

    def test_adapters_of_ours_merge_into_layers_that_were_replaced_under_them(self, model, ids, monkeypatch):
        with monkeypatch.context() as context:  # as on a GPU, where get_peft_model leaves them
            context.setattr("pyfastpeft.peft_model.take_over", lambda *_: [])
            tuned = fp.get_peft_model(model, fp.LoraConfig(r=4, init_lora_weights=False)).eval()
        assert len(bnb_layers(tuned)) == 14
        fp.accelerate(tuned)
        expected = output(tuned, ids)
        merged = tuned.merge_and_unload(dequantize=True)
        assert not bnb_layers(merged)
        assert (output(merged, ids) - expected).norm() <= 0.05 * expected.norm()

    def test_real_peft_trains_on_a_model_loaded_by_us(self, tmp_path, ids):
        _, auto = saved(tmp_path)
        model = auto.from_pretrained(tmp_path, quantization_config=fp.FastPeftConfig())
        expected = output(model, ids)
        tuned = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear"))
        tuned.eval()
        assert torch.equal(output(tuned, ids), expected)
        tuned.train()(input_ids=ids, labels=ids).loss.backward()
        assert sum(p.grad is not None for p in tuned.parameters()) == 28

    def test_a_layer_used_twice_stays_one_layer(self):
        layer = bnb.nn.Linear4bit(64, 64).to("cpu")
        model = torch.nn.ModuleDict({"a": layer, "b": torch.nn.Sequential(layer)})
        fp.accelerate(model)
        assert isinstance(model["a"], fp.nn.Linear4bit) and model["a"] is model["b"][0]

    def test_hooks_move_to_the_new_layer(self):
        model, seen = torch.nn.Sequential(bnb.nn.Linear4bit(64, 64).to("cpu")), []
        model[0].register_forward_hook(lambda *_: seen.append(1))
        model[0].register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
        model[0].register_forward_hook(lambda _, args, kwargs, y: seen.append(kwargs), with_kwargs=True)
        fp.accelerate(model)(torch.randn(1, 64))
        assert seen == [{}, 1, {}]

    @pytest.mark.parametrize("rows", [1, 40])
    def test_layers_under_dora_of_peft_are_right_in_evaluation_too(self, rows):
        layer = bnb.nn.Linear4bit(64, 48, bias=False, quant_type="nf4").to("cpu")
        weight = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).double()
        config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["0"], use_dora=True, init_lora_weights=False)
        model, x = fp.accelerate(peft.get_peft_model(torch.nn.Sequential(layer), config)), torch.randn(rows, 64)
        a, b, magnitude = (p.detach().double() for p in model.parameters() if p.requires_grad)
        weight = weight + 2 * b @ a
        expected = x.double() @ (magnitude[:, None] * weight / weight.norm(dim=1, keepdim=True)).T
        for training in (True, False, True):
            assert (model.train(training)(x) - expected).norm() <= 1e-5 * expected.norm()
        model(x).sum().backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)

    def test_dora_of_real_peft_goes_on_a_model_loaded_by_us(self, tmp_path, ids):
        _, auto = saved(tmp_path)
        model = auto.from_pretrained(tmp_path, quantization_config=fp.FastPeftConfig())
        expected = output(model, ids)
        tuned = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear", use_dora=True)).eval()
        torch.testing.assert_close(output(tuned, ids), expected)

    def test_what_is_no_module_is_refused_by_name(self):
        with pytest.raises(TypeError, match=r"model is a str; it must be a torch\.nn\.Module"):
            fp.accelerate("model")

    def test_all_models_in_a_container_are_accelerated(self):
        models = torch.nn.ModuleList([tiny_llama(), tiny_llama()])
        fp.accelerate(models)
        assert [m.config._attn_implementation for m in models] == ["pyfastpeft"] * 2

    def test_a_model_without_such_layers_is_left_alone(self):
        model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU())
        before = list(model.modules())
        assert fp.accelerate(model) is model and list(model.modules()) == before


def test_a_classifier_that_bitsandbytes_quantized_head_and_all_is_read(tmp_path):
    base = transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL_BERT)).eval()
    base.save_pretrained(tmp_path / "dense")
    wanted = transformers.BitsAndBytesConfig(load_in_4bit=True)
    theirs = type(base).from_pretrained(tmp_path / "dense", quantization_config=wanted)
    theirs.save_pretrained(tmp_path / "bnb")
    ours = type(base).from_pretrained(tmp_path / "bnb", quantization_config=fp.FastPeftConfig())
    assert type(theirs.classifier).__name__ == type(ours.classifier).__name__ == "Linear4bit"
    for name, layer in bnb_layers(theirs).items():
        weight = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        base.get_submodule(name).weight.data = weight.to(torch.float32)
    ids = torch.randint(1, 64, (2, 5))
    torch.testing.assert_close(ours(ids).logits, base(ids).logits, rtol=1e-4, atol=1e-6)
    ours.save_pretrained(tmp_path / "ours")
    again = type(base).from_pretrained(tmp_path / "ours")
    assert torch.equal(again(ids).logits, ours(ids).logits)


def test_a_saved_model_is_dequantized_in_the_dtype_that_its_config_names(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=fp.FastPeftConfig())
    model.save_pretrained(tmp_path / "4")
    model.dequantize()
    assert not any(isinstance(m, fp.nn.Linear4bit) for m in model.modules())


def test_a_model_is_dequantized_to_a_dtype_that_is_named(tmp_path, ids):
    _, auto = saved(tmp_path)
    model = auto.from_pretrained(tmp_path, quantization_config=fp.FastPeftConfig())
    expected = output(model, ids)
    with pytest.raises(ValueError, match=r"dtype is torch.int8; it must be a floating-point torch.dtype or its name"):
        model.dequantize(torch.int8)
    assert torch.equal(output(model, ids), expected)
    layers = layers_4bit(model)
    model.dequantize("float64")
    assert {model.get_submodule(path).weight.dtype for path in layers} == {torch.float64}


def test_a_model_in_4_bits_is_opened_in_float64_to_be_dequantized_to_it(tmp_path, ids):
    _, auto = saved(tmp_path)
    model = auto.from_pretrained(tmp_path, quantization_config=fp.FastPeftConfig())
    model.save_pretrained(tmp_path / "4")
    exact = auto.from_pretrained(tmp_path / "4", dtype=torch.float64)
    exact.dequantize("float64")
    assert {p.dtype for p in exact.parameters()} == {torch.float64}
    torch.testing.assert_close(output(model, ids).double(), output(exact, ids), rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(sys.platform != "linux", reason="pages of mapped files are given back on Linux")
def test_pages_of_a_mapped_file_are_given_back_unless_they_were_written_to(tmp_path):
    def resident(t):
        begin = t.data_ptr() // 4096 * 4096
        for region in re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text()):
            found = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", region)
            if found and int(found[1], 16) <= begin < int(found[2], 16):
                return int(re.search(r"Rss:\s+(\d+) kB", region)[1])
        raise AssertionError("not mapped")

    drop = torch.ops.pyfastpeft.drop_mapped_pages
    values = torch.arange(1 << 20, dtype=torch.int32)
    values.numpy().tofile(tmp_path / "values")
    mapped = torch.from_file(str(tmp_path / "values"), size=1 << 20, dtype=torch.int32)
    assert torch.equal(mapped, values) and resident(mapped) >= 4000
    drop(mapped[5:-7])
    assert resident(mapped) <= 100
    assert torch.equal(mapped, values)
    mapped[70000] = -1
    before = resident(mapped)
    drop(mapped)
    assert mapped[70000] == -1 and resident(mapped) == before
    own = values.clone()
    for t in (own, own[:3], own[:0]):
        drop(t)
    assert torch.equal(own, values)
    for t in (mapped.view(1024, 1024)[:, 3:], mapped.view(4, 512, 512).transpose(0, 2), own.view(1024, 1024).t()):
        _let_go(t)  # what a fused weight is cut into does not lie in one piece
    assert mapped[70000] == -1 and torch.equal(own, values)


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: s.get("quant_type", "nf4"))
def test_a_reloaded_model_does_not_change_when_its_file_does(tmp_path, ids, settings):
    config = transformers.LlamaConfig(**GROUPED | {"intermediate_size": 100})  # not all layers go into tiles
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "full")
    config = fp.FastPeftConfig(**settings)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "full", quantization_config=config)
    model.save_pretrained(tmp_path / "4")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "4")
    with open(tmp_path / "4" / "model.safetensors", "r+b") as file:  # in place: a new file would leave the old mapped
        file.write(bytes((tmp_path / "4" / "model.safetensors").stat().st_size))
    assert same_state(again, model) and torch.equal(output(again, ids), output(model, ids))
    for layer in layers_4bit(again).values():
        layer.weight = layer.weight  # refused where it is not the memory that is read


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from Linux")
def test_a_model_that_loads_into_4_bits_never_holds_its_file_in_memory(tmp_path):
    """Packed it has 0.28 of the file's size; more would be beside it only while a layer is read."""
    sizes = GROUPED | {"hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 6}
    for name, config in (("small", GROUPED), ("large", sizes)):
        model = AutoModelForCausalLM.from_config(transformers.LlamaConfig(**config), dtype=torch.bfloat16)
        model.save_pretrained(tmp_path / name)
    code = f"""
import torch, transformers, pyfastpeft as fp
def peak_after_loading(name):
    folder = {str(tmp_path)!r} + "/" + name
    transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=fp.FastPeftConfig("nf4"))
    return 1024 * next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM"))
before = peak_after_loading("small")
print(peak_after_loading("large") - before)
"""
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert int(out.splitlines()[-1]) < 0.6 * (tmp_path / "large" / "model.safetensors").stat().st_size
