"""LoRA layers and PeftModel: the same numbers as real peft, over full-precision and over 4-bit base models."""

from __future__ import annotations

import copy
import inspect
import itertools
import math
import pickle
import re
import types
import warnings
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import architectures as tiny
import numpy as np
import peft
import pytest
import torch
import transformers as tf
from architectures import relative
from torch import nn
from torch.nn.utils import prune
from transformers import GenerationConfig
from transformers.models.maskformer.modeling_maskformer import MaskformerMLPPredictionHead
from transformers.pytorch_utils import Conv1D

import pyfastpeft as fp
from pyfastpeft.adapters import Rows
from pyfastpeft.integrations.accelerate import unfuse
from pyfastpeft.ops import backends

VARIANTS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "gaussian": {"init_lora_weights": "gaussian"},
    "not_initialized": {"init_lora_weights": False},
    "patterns": {"rank_pattern": {"0.*": 4, "v_proj": 2}, "alpha_pattern": {"layers.1.self_attn.q_proj": 3}},
    "some_layers": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "some_layers_and_a_path": {
        "target_modules": ["0.self_attn.q_proj", "model.layers.0.mlp.up_proj"],
        "layers_to_transform": 1,
    },
    "excluded": {"exclude_modules": ["v_proj"]},
    "lora_bias": {"lora_bias": True, "target_modules": ["q_proj", "lm_head"]},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "embedding_dora": {"target_modules": ["embed_tokens"], "use_dora": True},
    "head_saved": {"modules_to_save": ["lm_head"]},
    "regex": {"target_modules": r".*\.1\..*_proj"},
    "all_linear": {"target_modules": "all-linear"},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
}


class Coded(nn.Linear):
    """Multiplies by its codes times a scale, as transformers' FP8Linear and bitsandbytes' Linear8bitLt do."""

    scale = 1 / 64

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


def coded(dtype):
    """A tiny model with codes in all query projections, and the same in full precision."""
    plain = tiny.make()
    for layer in plain.model.layers:
        layer.self_attn.q_proj.weight.data = torch.randint(-8, 9, (32, 32)) * Coded.scale
    held = copy.deepcopy(plain)
    for layer in held.model.layers:
        codes = layer.self_attn.q_proj.weight.detach() / Coded.scale
        layer.self_attn.q_proj = Coded(32, 32, bias=False, device="meta")
        layer.self_attn.q_proj.weight = nn.Parameter(codes.to(dtype), requires_grad=False)
    return held, plain


def pair(base, seed, **kwargs):
    """The same new adapter, here and in peft, from the same random state."""
    kwargs = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], **kwargs}
    torch.manual_seed(seed)
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**kwargs))
    torch.manual_seed(seed)
    ours = fp.get_peft_model(copy.deepcopy(base), fp.LoraConfig(**kwargs))
    return ours, theirs


@pytest.mark.filterwarnings("ignore")
class TestLikePeft:
    @pytest.mark.parametrize("kernels", [False, True])
    @pytest.mark.parametrize("variant", VARIANTS)
    def test_parameters_outputs_and_gradients_are_those_of_peft(self, variant, kernels, seed, monkeypatch):
        if not kernels:
            monkeypatch.setattr(backends, "_FORCED", backends.Backend.REFERENCE)
        base = tiny.make("phi" if variant == "lora_bias" else "llama")
        ours, theirs = pair(base, seed, **VARIANTS[variant])
        own, others = dict(ours.named_parameters()), dict(theirs.named_parameters())
        assert own.keys() == others.keys()
        for name, parameter in own.items():
            assert parameter.requires_grad == others[name].requires_grad, name
            torch.testing.assert_close(parameter, others[name], rtol=1e-4, atol=1e-5, msg=name)
        if variant not in ("pissa", "olora"):
            # The kernels' sums have another order, which larger adapters on every layer multiply tenfold.
            tiny.randomize(ours, 0.05 if kernels else 0.2)
        tiny.copy_adapters(ours, theirs)
        batch = tiny.inputs()
        tiny.use_plain_layers(ours)
        a, b = ours(**batch), theirs(**batch)
        assert relative(a.logits, b.logits) < 1e-6
        a.loss.backward()
        b.loss.backward()
        trained = [n for n, p in own.items() if p.requires_grad]
        grads = [torch.cat([m[n].grad.flatten() for n in trained]) for m in (own, others)]
        assert relative(*grads) < 2e-5
        # One by one in float64: in float32 a single gradient that nearly cancels is rounding noise.
        for model in (ours, theirs):
            model.double().zero_grad()
            logits = model(**batch).logits
            (logits * torch.linspace(-1, 1, logits.shape[-1]).double()).sum().backward()
        for name in trained:
            assert relative(own[name].grad, others[name].grad) < 2e-5, name

    @pytest.mark.parametrize(
        "compute",
        [
            nn.utils.parametrizations.weight_norm,
            nn.utils.weight_norm,
            lambda part, name: prune.ln_structured(part, name, 0.5, 2, 0),
        ],
        ids=["parametrization", "old weight_norm", "prune"],
    )
    def test_factors_that_are_computed_from_other_parameters_train_as_in_peft(self, compute, seed, plain_torch):
        ours, theirs = pair(tiny.make(), seed, lora_bias=True, lora_alpha=8)
        tiny.randomize(ours)
        tiny.copy_adapters(ours, theirs)
        curves, batch = [], tiny.inputs()
        for model in (ours, theirs):
            for layer in model.base_model.model.model.layers:
                compute(layer.self_attn.q_proj.lora_A["default"], "weight")
                compute(layer.self_attn.v_proj.lora_B["default"], "weight")
            curves.append(tiny.loss_curve(model, batch, steps=4, rate=1e-2))
        torch.testing.assert_close(*curves, rtol=1e-5, atol=1e-5)
        assert curves[0][-1] < curves[0][0] - 1e-2

    @pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
    def test_every_architecture_gives_the_outputs_of_peft(self, architecture, seed, plain_torch):
        kwargs = {"target_modules": "all-linear"}
        ours, theirs = pair(tiny.make(architecture), seed, **kwargs)
        assert dict(ours.named_parameters()).keys() == dict(theirs.named_parameters()).keys()
        tiny.randomize(ours)
        tiny.copy_adapters(ours, theirs)
        batch = tiny.inputs(architecture)
        tiny.use_plain_layers(ours)
        assert relative(ours(**batch).logits, theirs(**batch).logits) < 1e-6

    @pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
    def test_every_architecture_gives_the_outputs_and_gradients_of_peft_by_the_operator(self, architecture, seed):
        kwargs = {"target_modules": "all-linear", "task_type": tiny.TASKS[architecture]}
        ours, theirs = pair(tiny.make(architecture), seed, **kwargs)
        tiny.randomize(ours)
        tiny.copy_adapters(ours, theirs)
        batch = tiny.inputs(architecture)
        outputs = [model(**batch) for model in (ours, theirs)]
        assert relative(outputs[0].logits, outputs[1].logits) < 1e-5
        for output in outputs:
            (output.logits * torch.linspace(-1, 1, output.logits.shape[-1])).sum().backward()
        grads = [
            torch.cat([p.grad.flatten() for n, p in sorted(m.named_parameters()) if "lora_" in n])
            for m in (ours, theirs)
        ]
        assert relative(*grads) < 1e-4

    @pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
    def test_training_from_the_same_seed_gives_the_loss_curve_of_peft(self, architecture, seed):
        base = tiny.make(architecture)
        ours, theirs = pair(base, seed, target_modules="all-linear", task_type=tiny.TASKS[architecture])
        batch = tiny.inputs(architecture)
        curves = [tiny.loss_curve(model.train(), batch) for model in (ours, theirs)]
        assert curves[0][-1] < 0.97 * curves[0][0]
        torch.testing.assert_close(*curves, rtol=0, atol=1e-4)

    def test_same_seed_gives_the_same_initial_values_bit_for_bit(self, seed):
        ours, theirs = pair(tiny.make(), seed, target_modules=["q_proj", "embed_tokens"])
        for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
            assert torch.equal(a, b), name

    @pytest.mark.parametrize("bias", ["all", "lora_only"])
    def test_biases_that_unload_leaves_are_spoken_of(self, bias):
        model = fp.get_peft_model(tiny.make("opt"), fp.LoraConfig(bias=bias))
        with pytest.warns(UserWarning, match="biases of the base model were trained"):
            model.unload()

    @pytest.mark.parametrize("init", ["pissa", "olora"])
    def test_base_weights_that_unload_leaves_changed_are_spoken_of(self, init):
        model = fp.get_peft_model(tiny.make(), fp.LoraConfig(init_lora_weights=init))
        with pytest.warns(UserWarning, match=f"base weights are without what init_lora_weights .'{init}'"):
            model.unload()

    @pytest.mark.parametrize("bias", ["all", "lora_only"])
    def test_bias_trains_the_biases_peft_trains(self, bias, seed):
        ours, theirs = pair(tiny.make("opt"), seed, bias=bias)
        trains = {n for n, p in ours.named_parameters() if p.requires_grad}
        assert trains == {n for n, p in theirs.named_parameters() if p.requires_grad}
        assert any(n.endswith("bias") for n in trains)
        ours.delete_adapter("default")
        assert not any(p.requires_grad for p in ours.parameters())

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_adapters_over_a_16_bit_base_are_float32(self, dtype, seed, plain_torch):
        ours, theirs = pair(tiny.make(dtype=dtype), seed)
        tiny.use_plain_layers(ours)
        tiny.randomize(ours)
        tiny.copy_adapters(ours, theirs)
        batch = tiny.inputs()
        out, expected = ours(**batch).logits, theirs(**batch).logits
        assert out.dtype == dtype
        assert torch.equal(out, expected)
        assert {p.dtype for n, p in ours.named_parameters() if "lora_" in n} == {torch.float32}

    def test_autocast_adapter_dtype_false_keeps_the_dtype_of_the_base(self):
        model = fp.get_peft_model(tiny.make(dtype=torch.bfloat16), fp.LoraConfig(), autocast_adapter_dtype=False)
        assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {torch.bfloat16}

    @pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
    @pytest.mark.parametrize("config", [fp.LoraConfig(), fp.BottleneckConfig()], ids=["lora", "bottleneck"])
    def test_adapters_over_codes_train_as_over_the_values_that_these_stand_for(self, dtype, config, seed):
        held, plain = (fp.get_peft_model(base, config) for base in coded(dtype))
        trained = [[p for p in model.parameters() if p.requires_grad] for model in (held, plain)]
        assert {p.dtype for p in trained[0]} == {torch.float32}
        with torch.no_grad():
            for mine, other in zip(*trained, strict=True):
                other.copy_(mine.add_(torch.randn_like(mine), alpha=0.1))
        batch = tiny.inputs()
        losses = [model(**batch).loss for model in (held, plain)]
        torch.testing.assert_close(*losses)
        grads = [torch.autograd.grad(loss, own) for loss, own in zip(losses, trained, strict=True)]
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
    def test_codes_are_not_taken_for_the_values_that_they_stand_for(self, dtype):
        base, _ = coded(dtype)
        with tiny.unchanged(base):
            for settings in ({"use_dora": True}, {"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}):
                with pytest.raises(TypeError, match=r"a Coded whose weight is .* need it in full precision"):
                    fp.get_peft_model(base, fp.LoraConfig(**settings))
            with pytest.raises(ValueError, match=r"holds 'model.layers.0.self_attn.q_proj', but .* is a Coded"):
                fp.get_peft_model(base, fp.LoraConfig(target_modules=["v_proj"], modules_to_save=["q_proj"]))
            model = fp.get_peft_model(base, fp.LoraConfig())
            with pytest.raises(TypeError, match=r"a Coded whose weight is .* need it in full precision"):
                model.merge_adapter()
            model.unload()

    def test_autocast_gives_the_outputs_of_peft(self, seed):
        ours, theirs = pair(tiny.make(), seed)
        unfuse(ours.get_base_model())  # as theirs, to the bit
        tiny.randomize(ours)
        tiny.copy_adapters(ours, theirs)
        batch = tiny.inputs()
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(ours(**batch).logits, theirs(**batch).logits)

    def test_dropout_leaves_the_mean_and_stays_out_of_the_base(self):
        model = fp.get_peft_model(tiny.make(), fp.LoraConfig(lora_dropout=0.5))
        tiny.randomize(model)
        layer = model.get_base_model().model.layers[0].self_attn.q_proj
        x = torch.randn(2, 32)
        layer.train()
        mean = torch.stack([layer(x) for _ in range(4000)]).mean(0)
        layer.eval()
        torch.testing.assert_close(mean, layer(x), rtol=0.2, atol=0.3)
        assert torch.equal(layer(x), layer(x))
        nn.init.zeros_(layer.lora_B["default"].weight)
        assert torch.equal(layer.train()(x), layer.base_layer(x))

    def test_print_trainable_parameters_counts_as_peft_does(self, seed, capsys):
        ours, theirs = pair(tiny.make(), seed)
        ours.print_trainable_parameters()
        first = capsys.readouterr().out
        theirs.print_trainable_parameters()
        assert first == capsys.readouterr().out


def test_a_layer_that_stands_at_two_paths_carries_lora_at_the_first_as_in_peft(seed):
    base = Block()
    base.again = base.linear
    ours, theirs = pair(base, seed, target_modules=r"linear|again|packed|embed", exclude_modules=["packed"])
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    assert type(ours.get_base_model().again) is nn.Linear


_BART = {"vocab_size": 64, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4}
_BART |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64}
_BART |= {"pad_token_id": 0, "decoder_start_token_id": 0, "forced_eos_token_id": 2}


def bart() -> nn.Module:
    return tf.BartForConditionalGeneration(tf.BartConfig(**_BART)).eval()


def marian() -> nn.Module:
    return tf.MarianMTModel(tf.MarianConfig(**_BART)).eval()


def switch() -> nn.Module:
    config = tf.SwitchTransformersConfig(**tiny._T5, num_sparse_encoder_layers=0, num_sparse_decoder_layers=0)
    return tf.SwitchTransformersForConditionalGeneration(config).eval()


def bert_mlm() -> nn.Module:
    return tiny.vary_vectors(tf.BertForMaskedLM(tf.BertConfig(**tiny._BERT)).eval())


class Encoder(nn.Module):
    """torch's own encoder, which in evaluation does not call its linear layers and packs padded rows."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(32, 3)

    def forward(self, x, padding=None):
        return self.head(self.encoder(x, src_key_padding_mask=padding))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    "config",
    [
        fp.LoraConfig(target_modules=["linear1", "linear2"]),
        fp.LoraConfig(target_modules=["layers.1.linear2"]),
        fp.BottleneckConfig(target_modules=["linear2"]),
        fp.LoraConfig(target_modules=["head"], modules_to_save=["linear1"]),
    ],
    ids=["lora", "lora_on_one", "bottleneck", "saved"],
)
@torch.no_grad()
def test_torchs_encoder_computes_in_evaluation_what_it_trained(config, padded):
    base, x = Encoder(), torch.randn(2, 5, 32)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2]) if padded else None
    seen = slice(None) if padding is None else ~padding
    bare, plain = base.train()(x, padding), base.eval()(x, padding)
    model = fp.get_peft_model(base, config)
    tiny.randomize(model)
    expected = model.train()(x, padding)
    for same in (model.eval(), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(same(x, padding)[seen], expected[seen])
    mixed, expected = model(x, padding, adapter_names=["__base__", "default"]), torch.stack([bare[0], expected[1]])
    torch.testing.assert_close(mixed[seen], expected[seen])
    assert torch.equal(model.unload()(x, padding), plain)  # with zeros where the padding is


def mask_head():
    parts = {"0": MaskformerMLPPredictionHead(8, 8, 8, num_layers=2), "head": nn.Linear(8, 8)}
    return nn.Sequential(OrderedDict(parts))


@pytest.mark.parametrize("config", [fp.LoraConfig, fp.BottleneckConfig], ids=["lora", "bottleneck"])
def test_a_layer_that_torchs_attention_never_calls_is_no_target(config):
    with pytest.raises(ValueError, match=r"layers.0.self_attn.out_proj', whose weight MultiheadAttention reads"):
        fp.get_peft_model(Encoder(), config(target_modules=["out_proj", "linear1"]))


def test_all_linear_leaves_out_what_torchs_attention_never_calls():
    model = fp.get_peft_model(Encoder(), fp.LoraConfig(target_modules="all-linear"))
    assert {path.rpartition(".")[2] for path in model.base_model.bank.layers} == {"linear1", "linear2", "head"}


@pytest.mark.parametrize("config", [fp.LoraConfig, fp.BottleneckConfig], ids=["lora", "bottleneck"])
def test_a_layer_that_its_module_calls_from_a_list_is_no_target(config):
    with pytest.raises(ValueError, match=r"0.0.0', whose weight PredictionBlock reads without calling the layer"):
        fp.get_peft_model(mask_head(), config(target_modules=["0.0.0", "head"]))


@torch.no_grad()
def test_nor_does_all_linear_take_it_and_pefts_file_may_hold_it(tmp_path):
    base, x = mask_head(), torch.randn(2, 8)
    model = fp.get_peft_model(copy.deepcopy(base), fp.LoraConfig(target_modules="all-linear"))
    assert set(model.base_model.bank.layers) == {"head"}
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(target_modules=["0.0.0", "0.1.0", "head"]))
    tiny.randomize(theirs)
    theirs.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"'0.0.0', '0.1.0'\], .* no effect, and is left out of merges"):
        model = fp.PeftModel.from_pretrained(base, tmp_path)
    with pytest.warns(UserWarning, match="no effect"):  # whatever stands around it already
        model.load_adapter(tmp_path, "again")
    torch.testing.assert_close(model(x), theirs.eval()(x))
    torch.testing.assert_close(model.merge_and_unload()(x), theirs(x))


def test_all_linear_takes_a_layer_whose_path_another_module_s_ends_with():
    base = nn.ModuleDict({"proj": nn.Linear(8, 8), "inner": nn.ModuleDict({"proj": nn.Sequential(nn.Linear(8, 8))})})
    model = fp.get_peft_model(base, fp.LoraConfig(target_modules="all-linear"))
    assert set(model.base_model.bank.layers) == {"proj", "inner.proj.0"}


_WAVLM = {"conv_dim": (32,), "conv_stride": (5,), "conv_kernel": (10,), "num_feat_extract_layers": 1}
_WAVLM |= {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "mask_time_prob": 0.0, "layerdrop": 0.0}
_TDNN = {"tdnn_dim": (32,), "tdnn_kernel": (1,), "tdnn_dilation": (1,), "xvector_output_dim": 32}
_LONGCAT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
_LONGCAT |= {"head_dim": 8, "num_layers": 1, "ffn_hidden_size": 32, "n_routed_experts": 4}
_LONGCAT |= {"moe_topk": 2, "expert_ffn_hidden_size": 32}
_GEMMA_3N = {"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 64, "laurel_rank": 8, "head_dim": 8}
_GEMMA_3N |= {"altup_num_inputs": 2, "num_kv_shared_layers": 0, "layer_types": ["full_attention"] * 2}
_GEMMA_3N |= {"activation_sparsity_pattern": None}
_MOBILE = {"embedding_size": 16, "intra_bottleneck_size": 16, "num_feedforward_networks": 1}
_LAYOUT = {"visual_embed": False, "coordinate_size": 4, "shape_size": 8, "max_position_embeddings": 64}
_SLICED = {"n_head": 4, "pretraining_tp": 2, "slow_but_exact": True}
# class: (arguments of its configuration, the layers that it reads the weights of)
READ = {
    "MambaForCausalLM": ({"state_size": 4}, ["dt_proj", "out_proj"]),
    "FalconMambaForCausalLM": ({"state_size": 4}, ["dt_proj", "out_proj"]),
    "Mamba2ForCausalLM": ({"num_heads": 8, "head_dim": 8, "n_groups": 1}, ["out_proj"]),
    "WavLMModel": (_WAVLM, ["q_proj", "k_proj", "v_proj", "out_proj"]),
    "MobileBertForMaskedLM": (_MOBILE, ["cls.predictions.dense"]),
    "Wav2Vec2ForXVector": (_WAVLM | _TDNN, ["kernel"]),
    "LongcatFlashForCausalLM": (_LONGCAT, ["classifier"]),
    "Gemma3nForCausalLM": (_GEMMA_3N, ["correction_coefs"]),
    "LayoutLMv3ForTokenClassification": (_LAYOUT, ["rel_pos_bias", "rel_pos_x_bias", "rel_pos_y_bias"]),
    "BloomForCausalLM": (_SLICED, ["self_attention.dense", "dense_4h_to_h"]),
}


@pytest.mark.parametrize("name", READ)
def test_nor_is_one_whose_weight_a_model_reads_while_every_other_learns(name):
    arguments, read = READ[name]
    cls = getattr(tf, name)
    base = cls(cls.config_class(**(tiny._LLAMA | {"num_key_value_heads": 4} | arguments)))
    for parameter in base.parameters():
        if not parameter.any():  # such as the scales of Gemma 3n, which let nothing through yet
            nn.init.normal_(parameter, std=0.1)
    for layer, config in itertools.product(read, (fp.LoraConfig, fp.BottleneckConfig)):
        with pytest.raises(ValueError, match=f"{layer}', whose weight .* reads without calling the layer"):
            fp.get_peft_model(base, config(target_modules=[layer]))
    inputs = {"input_values": torch.randn(2, 400)} if name[:3] == "Wav" else {"input_ids": torch.arange(5, 14)[None]}
    model = fp.get_peft_model(base, fp.LoraConfig(target_modules="all-linear")).train()
    model(**inputs)[0].square().sum().backward()
    learning = {n: p.grad for n, p in model.named_parameters() if "lora_B" in n}
    assert learning and all(grad is not None and grad.any() for grad in learning.values())
    tiny.randomize(model)
    with torch.no_grad():
        expected = model.eval()(**inputs)[0]
        torch.testing.assert_close(model.merge_and_unload().eval()(**inputs)[0], expected, rtol=1e-4, atol=1e-4)


def test_pefts_file_may_hold_lora_that_torchs_attention_never_called(tmp_path):
    base, x = Encoder(), torch.randn(2, 5, 32)
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(target_modules=["out_proj", "head"]))
    tiny.randomize(theirs)
    theirs.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"layers.0.self_attn.out_proj', .* no effect, and is left out of merges"):
        model = fp.PeftModel.from_pretrained(base, tmp_path)
    assert fp.get_peft_model_state_dict(model).keys() == peft.get_peft_model_state_dict(theirs).keys()
    torch.testing.assert_close(model(x), theirs.eval()(x))
    torch.testing.assert_close(model.merge_and_unload()(x), theirs(x))


@torch.no_grad()
def test_lora_of_pefts_file_that_training_alone_passes_by_is_merged(tmp_path):
    config = tf.Gemma3nTextConfig(**(tiny._LLAMA | {"num_key_value_heads": 4} | _GEMMA_3N))
    base, ids = tf.Gemma3nForCausalLM(config).eval(), torch.arange(5, 14)[None]
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(target_modules=["correction_coefs"]))
    tiny.randomize(theirs, std=3.0)
    theirs.save_pretrained(tmp_path)
    plain, expected = base(ids).logits, theirs.eval()(ids).logits
    model = fp.PeftModel.from_pretrained(base, tmp_path)
    assert relative(plain, expected) > 0.01
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.merge_and_unload()(ids).logits, expected, rtol=1e-4, atol=1e-4)


class TestDefaults:
    @pytest.mark.parametrize(
        ("architecture", "names"),
        [
            ("llama", {"q_proj", "v_proj"}),
            ("phi", {"q_proj", "v_proj"}),
            ("opt", {"q_proj", "v_proj"}),
            ("gpt2", {"c_attn"}),
            ("t5", {"q", "v"}),
            ("bert", {"query", "value"}),
        ],
    )
    def test_default_targets_are_the_query_and_value_projections(self, architecture, names):
        model = fp.get_peft_model(tiny.make(architecture), fp.LoraConfig())
        assert {path.rpartition(".")[2] for path in model.base_model.bank.layers} == names

    @pytest.mark.parametrize("layer", [None, 1])
    def test_default_targets_are_the_layers_in_what_has_their_names(self, layer, tmp_path):
        def attention(*around):
            made = {name: nn.Linear(8, 8) for name in ("q_proj", "k_proj", "v_proj")}
            return nn.ModuleDict(made | {name: nn.ModuleDict({"linear": made[name]}) for name in around})

        model = nn.ModuleDict({"layers": nn.ModuleList([attention(), attention("q_proj", "v_proj")])})
        model = fp.get_peft_model(model, fp.LoraConfig(layers_to_transform=layer))
        held = [f"layers.1.{name}.linear" for name in ("q_proj", "v_proj")]
        expected = held if layer else ["layers.0.q_proj", "layers.0.v_proj", *held]
        assert sorted(model.base_model.bank.layers) == expected
        model.save_pretrained(tmp_path)
        assert sorted(fp.LoraConfig.from_pretrained(tmp_path).target_modules) == expected

    def test_default_rank_is_8_and_alpha_twice_the_rank(self):
        assert (fp.LoraConfig().r, fp.LoraConfig().lora_alpha) == (8, 16)
        assert fp.LoraConfig(r=5).lora_alpha == 10

    def test_classification_keeps_the_head_with_the_adapter(self):
        model = fp.get_peft_model(tiny.make("bert"), fp.LoraConfig(task_type="SEQ_CLS"))
        assert "base_model.model.classifier.weight" in fp.get_peft_model_state_dict(model)


@pytest.mark.parametrize(
    "quant", [{"quant_type": "nf4"}, {"quant_type": "nf4", "double_quant": True}, {"quant_type": "int4"}]
)
@pytest.mark.parametrize("variant", ["plain", "rslora", "dora", "head_saved", "all_linear"])
class TestOver4Bits:
    @pytest.mark.filterwarnings("ignore")
    def test_outputs_and_gradients_are_those_of_peft_over_the_dequantized_base(self, variant, quant, seed):
        base = tiny.quantized(tiny.make(), **quant)
        kwargs = {"target_modules": ["q_proj", "v_proj"], "lora_alpha": 16, **VARIANTS[variant]}
        ours = fp.get_peft_model(base, fp.LoraConfig(**kwargs))
        theirs = peft.get_peft_model(tiny.dequantized(tiny.quantized(tiny.make(), **quant)), peft.LoraConfig(**kwargs))
        theirs_base = theirs.get_base_model()
        for name, parameter in tiny.dequantized(ours.get_base_model()).named_parameters():
            theirs_base.get_parameter(name).data.copy_(parameter.data)
        tiny.randomize(ours)
        values = dict(ours.named_parameters())
        for name, parameter in theirs.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.data.copy_(values[name].data)
        batch = tiny.inputs()
        a, b = ours(**batch), theirs(**batch)
        assert relative(a.logits, b.logits) < 1e-4
        a.loss.backward()
        b.loss.backward()
        for name, parameter in theirs.named_parameters():
            if parameter.requires_grad:
                assert relative(values[name].grad, parameter.grad) < 1e-3, name


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kwargs", [{}, {"use_dora": True}, {"lora_bias": True}], ids=["plain", "dora", "bias"])
@pytest.mark.parametrize("names", [["a"], ["a", "b"]], ids=["one", "two"])
def test_hooks_of_a_4_bit_base_layer_see_and_change_its_product_alone(names, kwargs, dtype, frozen):
    base = nn.Sequential(fp.nn.Linear4bit(48, 32, dtype=dtype))
    model = fp.get_peft_model(base, fp.LoraConfig(target_modules=["0"], **kwargs), "a")
    model.add_adapter("b", fp.LoraConfig(target_modules=["0"], **kwargs))
    tiny.randomize(model)
    model.base_model.set_adapter(names, inference_mode=frozen)
    plain, x = copy.deepcopy(model), torch.randn(5, 48, dtype=dtype)
    packed = base[0].base_layer
    plain.base_model.model[0].base_layer = packed.to_linear()
    tolerance, rows, seen = 1e-5 if dtype == torch.float32 else 0.02, [*names, *["__base__"] * (5 - len(names))], []
    expected, alone = [plain(x), plain(x, adapter_names=rows)], packed(x)
    everywhere = nn.modules.module.register_module_forward_hook(lambda m, _, y: seen.append(y) if m is packed else None)
    for got, want in zip((model(x), model(x, adapter_names=rows)), expected, strict=True):
        assert relative(got, want) < tolerance and relative(seen[-1], alone) < tolerance
    everywhere.remove()
    for layer in (packed, plain.base_model.model[0].base_layer):
        layer.register_forward_pre_hook(lambda _, args: (args[0] * 2,))
        layer.register_forward_hook(lambda _, args, y: seen.append(y) or y * 3)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            for choice in ({}, {"adapter_names": rows}):
                assert relative(model(x, **choice), plain(x, **choice)) < tolerance
                assert relative(seen[-2], packed.forward(x * 2)) < tolerance


class Block(nn.Module):
    """One layer of each kind that can carry LoRA."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 32)
        self.conv = Conv1D(48, 32)
        nn.init.normal_(self.conv.bias)
        self.linear = nn.Linear(48, 32)
        self.packed = fp.nn.Linear4bit(32, 24)

    def forward(self, ids):
        return self.packed(torch.tanh(self.linear(torch.tanh(self.conv(self.embed(ids))))))


def block(*names, **kwargs):
    kwargs = {"target_modules": ["embed", "conv", "linear", "packed"], **kwargs}
    model = fp.get_peft_model(Block(), fp.LoraConfig(**kwargs), adapter_name=names[0] if names else "default")
    for name in names[1:]:
        model.add_adapter(name, fp.LoraConfig(**kwargs))
    tiny.randomize(model)
    return model


class TestInitialValues:
    @pytest.mark.parametrize("init", ["pissa", "pissa_niter_8", "olora", "loftq"])
    @pytest.mark.parametrize("use_rslora", [False, True])
    def test_values_from_the_weight_leave_the_output_as_it_was(self, init, use_rslora):
        base = Block()
        before = {n: m.weight.clone() for n, m in (("conv", base.conv), ("linear", base.linear))}
        ids = torch.randint(0, 20, (2, 5))
        expected = base(ids)
        config = fp.LoraConfig(target_modules=["conv", "linear"], init_lora_weights=init, r=4, use_rslora=use_rslora)
        model = fp.get_peft_model(base, config)
        if init != "loftq":
            torch.testing.assert_close(model(ids), expected, rtol=1e-4, atol=1e-4)
        for name, weight in before.items():
            layer = base.get_submodule(name)
            assert not torch.equal(layer.weight, weight)
            whole = layer.weight + layer.get_delta_weight("default")
            if init == "loftq":
                plain = fp.quantize_4bit(weight.t() if name == "conv" else weight).dequantize()
                plain = plain.t() if name == "conv" else plain
                assert (whole - weight).norm() < (plain - weight).norm()
            else:
                torch.testing.assert_close(whole, weight, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("init", ["pissa", "pissa_niter_2", "olora", "loftq"])
    def test_values_from_the_weight_have_at_most_its_rank(self, init):
        for r in (16, 17):
            base = nn.ModuleDict({"linear": nn.Linear(24, 16, bias=False)})
            weight = base["linear"].weight.clone()
            config = fp.LoraConfig(target_modules=["linear"], init_lora_weights=init, r=r, lora_alpha=2)
            if r > 16:
                with pytest.raises(ValueError, match=rf"r is 17; with .*{init[:5]}.* at most 16, .*\(16, 24\)"):
                    fp.get_peft_model(base, config)
                assert torch.equal(base["linear"].weight, weight)
            else:
                layer = fp.get_peft_model(base, config).get_base_model()["linear"]
                whole = layer.weight + layer.get_delta_weight("default")
                torch.testing.assert_close(whole, weight, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("init", ["pissa", "pissa_niter_1", "pissa_niter_128", "olora"])
    def test_values_from_the_weight_are_its_principal_part(self, init, monkeypatch):
        base = nn.ModuleDict({"linear": nn.Linear(48, 40, bias=False)})
        base["linear"].weight.data *= 0.85 ** torch.arange(48)  # whose singular values lie apart
        weight = base["linear"].weight.detach().clone()
        config = fp.LoraConfig(target_modules=["linear"], init_lora_weights=init, r=4, lora_alpha=2)
        seed = torch.initial_seed()
        monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("seeds the GPUs"))
        layer = fp.get_peft_model(base, config).get_base_model()["linear"]
        assert torch.initial_seed() == seed  # the SVD's own is its alone
        a, b = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
        if init == "olora":
            torch.testing.assert_close(b.t() @ b, torch.eye(4))
            assert not a.tril(-1).any()
            torch.testing.assert_close(b @ a[:, :4], weight[:, :4], rtol=1e-4, atol=1e-5)
            return
        exact, found = torch.linalg.svdvals(weight), a.square().sum(1) / 2  # the scaling
        for shares in (a @ a.t(), b.t() @ b):
            torch.testing.assert_close(shares, torch.diag(2 * found), rtol=1e-3, atol=1e-4)
        left = torch.linalg.svdvals(layer.weight)[:-4]
        for values, principal in ((found, exact[:4]), (left, exact[4:])):
            assert torch.allclose(values, principal, rtol=1e-3) == (init != "pissa_niter_1")

    def test_loftq_leaves_weights_that_nf4_holds_exactly(self):
        model = fp.get_peft_model(Block(), fp.LoraConfig(target_modules=["linear"], init_lora_weights="loftq"))
        weight = model.get_base_model().linear.base_layer.weight
        assert torch.equal(fp.quantize_4bit(weight).dequantize(), weight)

    def test_loftq_fits_what_quantizing_lost_and_more_iterations_fit_it_better(self):
        base = nn.ModuleDict({"linear": nn.Linear(64, 48, bias=False)})
        base["linear"].weight.data.normal_()
        weight, losses = base["linear"].weight.detach().clone(), []
        for n in (1, 5):
            loftq = {"init_lora_weights": "loftq", "loftq_config": {"loftq_iter": n}}
            config = fp.LoraConfig(target_modules=["linear"], r=8, lora_alpha=4, **loftq)
            layer = fp.get_peft_model(copy.deepcopy(base), config).get_base_model()["linear"]
            lost = weight - layer.weight
            losses.append((lost - layer.get_delta_weight("default")).norm())
            torch.testing.assert_close(losses[-1], torch.linalg.svdvals(lost)[8:].norm(), rtol=1e-4, atol=0)
        assert losses[1] < 0.95 * losses[0]

    @pytest.mark.parametrize("init", ["pissa", "olora"])
    def test_a_4_bit_base_is_quantized_again_without_the_principal_part(self, init):
        base = Block()
        whole = base.packed.dequantize()
        model = fp.get_peft_model(base, fp.LoraConfig(target_modules=["packed"], init_lora_weights=init))
        layer = model.get_base_model().packed
        plain = (fp.quantize_4bit(whole + torch.randn_like(whole) * 1e-4).dequantize() - whole).norm()
        now = layer.base_layer.dequantize() + layer.get_delta_weight("default")
        assert (now - whole).norm() < 2 * plain.clamp_min(whole.norm() * 0.1)

    def test_loftq_over_a_4_bit_base_is_refused(self):
        with pytest.raises(ValueError, match=r"loftq.*quantized already"):
            fp.get_peft_model(Block(), fp.LoraConfig(target_modules=["packed"], init_lora_weights="loftq"))

    def test_loftq_on_an_embedding_is_refused(self):
        with pytest.raises(ValueError, match=r"loftq.*the embedding 'embed'"):
            fp.get_peft_model(Block(), fp.LoraConfig(target_modules=["embed", "linear"], init_lora_weights="loftq"))

    @pytest.mark.parametrize("init", ["pissa", "olora", "loftq"])
    def test_a_weight_without_values_is_refused(self, init):
        """What is loaded later would be the whole weight, of which the adapter has a part already."""
        base = Block().to("meta")
        with pytest.raises(ValueError, match=rf"init_lora_weights is '{init}'.*'linear'.*meta device"):
            fp.get_peft_model(base, fp.LoraConfig(target_modules=["linear"], init_lora_weights=init))
        assert type(base.linear) is nn.Linear

    def test_a_second_adapter_may_not_change_the_base_under_the_first(self):
        model = block()
        with pytest.raises(ValueError, match="must be the first adapter"):
            model.add_adapter("b", fp.LoraConfig(target_modules=["linear"], init_lora_weights="pissa"))


def check_refused(model, options):
    """A safe merge, with ``options`` of merge_and_unload (None: merge_adapter), is refused and changes nothing."""
    merge = model.merge_adapter if options is None else partial(model.merge_and_unload, **options)
    with tiny.unchanged(model), pytest.raises(ValueError, match="not finite"):
        merge(safe_merge=True)


class TestMerging:
    @pytest.mark.parametrize("use_dora", [False, True])
    def test_merged_weights_compute_what_the_adapters_compute_and_unmerge_restores_every_bit(self, use_dora):
        model = block("a", "b", use_dora=use_dora)
        model.set_adapter(["a", "b"])
        base = model.get_base_model()
        before = {n: p.clone() for n, p in base.state_dict().items()}
        dense = [base.embed, base.conv, base.linear]
        inputs = [torch.randint(0, 20, (3, 4)), torch.randn(3, 32), torch.randn(3, 48)]
        expected = [layer(x) for layer, x in zip(dense, inputs, strict=True)]
        x4 = torch.randn(30, 32)
        expected4 = base.packed(x4)
        model.merge_adapter()
        for layer, x, y in zip(dense, inputs, expected, strict=True):
            torch.testing.assert_close(layer(x), y, rtol=1e-4, atol=1e-4)
        assert relative(base.packed(x4), expected4) < 0.15
        assert not torch.equal(base.state_dict()["linear.base_layer.weight"], before["linear.base_layer.weight"])
        model.unmerge_adapter()
        after = base.state_dict()
        assert after.keys() == before.keys()
        for name, value in before.items():
            assert torch.equal(after[name], value), name

    def test_a_4_bit_base_merges_into_16_bits_with_one_rounding(self):
        model = block()
        expected = model.get_base_model().packed.merged_matrix(("default",)).to(torch.bfloat16)
        merged = model.merge_and_unload(dequantize=True, dtype=torch.bfloat16)
        assert type(merged.packed) is nn.Linear
        assert torch.equal(merged.packed.weight, expected)

    def test_a_model_that_merges_into_another_dtype_is_in_it_as_a_whole(self):
        config = fp.LoraConfig(target_modules=["q_proj", "embed_tokens", "lm_head"], modules_to_save=["norm"])
        model = fp.get_peft_model(tiny.quantized(tiny.make()), config)
        tiny.randomize(model)
        batch = tiny.inputs()
        expected = model(**batch).logits
        merged = model.merge_and_unload(dequantize=True, dtype="bfloat16")
        assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
        assert relative(merged(**batch).logits, expected) < 3e-2

    def test_a_4_bit_base_merges_back_into_4_bits_of_the_same_format(self):
        model = block()
        expected = model.get_base_model().packed.merged_matrix(("default",))
        merged = model.merge_and_unload()
        assert isinstance(merged.packed, fp.nn.Linear4bit)
        assert torch.equal(merged.packed.dequantize(), fp.quantize_4bit(expected).dequantize())

    def test_merge_and_unload_leaves_a_plain_model_that_saves_and_loads(self, tmp_path):
        model = fp.get_peft_model(
            tiny.make("qwen2"), fp.LoraConfig(target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head"])
        )
        tiny.randomize(model)
        batch = tiny.inputs()
        expected = model(**batch).logits
        plain = model.merge_and_unload()
        assert not any("lora" in n or "modules_to_save" in n for n, _ in plain.named_parameters())
        assert relative(plain(**batch).logits, expected) < 1e-5
        plain.save_pretrained(tmp_path)
        again = type(plain).from_pretrained(tmp_path)
        assert torch.equal(again(**batch).logits, plain(**batch).logits)

    def test_activating_an_adapter_unmerges_what_is_merged(self):
        model = fp.get_peft_model(tiny.make("llama"), fp.LoraConfig(init_lora_weights=False)).eval()
        model.add_adapter("b", fp.LoraConfig(init_lora_weights=False))
        ids = tiny.inputs()["input_ids"]
        merged = model(ids).logits
        model.set_adapter("b")
        expected = model(ids).logits
        model.set_adapter("default")
        model.merge_adapter()
        with pytest.warns(UserWarning, match="'default'.* merged"):
            model.set_adapter("b")
        assert torch.equal(model(ids).logits, expected)
        assert not torch.allclose(expected, merged, atol=1e-3)

    @pytest.mark.parametrize("dequantize", [False, True])
    @pytest.mark.parametrize("quantized", [False, True])
    def test_more_is_merged_beside_what_is_merged_already(self, quantized, dequantize):
        def make():
            torch.manual_seed(0)
            base = tiny.make("llama")
            model = fp.get_peft_model(tiny.quantized(base) if quantized else base, fp.LoraConfig(), "a")
            model.add_adapter("b", fp.LoraConfig(r=4, target_modules=["q_proj", "o_proj"]))
            tiny.randomize(model)
            return model

        expected, model = make(), make()
        with tiny.unchanged(model):
            expected.merge_adapter(["a", "b"])
            model.merge_adapter(["a"])
            model.merge_adapter(["a", "b"])
            state = expected.state_dict()
            assert all(torch.equal(t, state[k]) for k, t in model.state_dict().items())
            model.unmerge_adapter()
        model.merge_adapter(["a"])
        model.get_base_model().model.layers[1].self_attn.o_proj.lora_B["b"].weight.data.fill_(torch.inf)
        for merge in (model.merge_adapter, partial(model.merge_and_unload, dequantize=dequantize)):
            with tiny.unchanged(model), pytest.raises(ValueError, match="not finite"):
                merge(adapter_names=["b"], safe_merge=True)
        model, ids = make(), tiny.inputs()["input_ids"]
        model.merge_adapter(["a"])
        merged = model.merge_and_unload(adapter_names=["b"], dequantize=dequantize)
        expected.unmerge_adapter()
        expected = expected.merge_and_unload(adapter_names=["a", "b"], dequantize=dequantize)
        assert torch.equal(merged(ids).logits, expected(ids).logits)

    @pytest.mark.parametrize(
        "config",
        [{"target_modules": ["embed_tokens"]}, {"target_modules": ["lm_head"]}, {"modules_to_save": ["lm_head"]}],
    )
    def test_what_is_no_longer_tied_is_not_said_to_be(self, config, tmp_path):
        model = fp.get_peft_model(tiny.make("qwen2"), fp.LoraConfig(**config))
        tiny.randomize(model)
        ids = tiny.inputs()["input_ids"]
        merged = model.merge_and_unload()
        expected = merged(ids).logits
        assert not merged.config.tie_word_embeddings
        merged.save_pretrained(tmp_path)
        again = type(merged).from_pretrained(tmp_path)
        again.resize_token_embeddings(72)
        torch.testing.assert_close(again(ids).logits[..., :64], expected)

    @pytest.mark.parametrize(
        ("make", "config"),
        [
            (bert_mlm, {"target_modules": ["word_embeddings"]}),
            (bert_mlm, {"modules_to_save": ["word_embeddings"]}),
            (bart, {"target_modules": ["shared"]}),
            (bart, {"modules_to_save": ["lm_head"]}),
            (marian, {"target_modules": ["shared"]}),
            (partial(tiny.make, "t5"), {"target_modules": ["shared"]}),
            (switch, {"target_modules": ["shared"]}),
            (switch, {"modules_to_save": ["lm_head"]}),
        ],
    )
    def test_what_else_was_tied_is_saved_under_every_name(self, make, config, tmp_path, seed):
        model = fp.get_peft_model(make(), fp.LoraConfig(**{"target_modules": "all-linear", **config}))
        tiny.randomize(model)
        ids = tiny.inputs()["input_ids"]
        batch = {"input_ids": ids, "decoder_input_ids": ids} if model.config.is_encoder_decoder else {"input_ids": ids}
        adapted = model(**batch).logits
        merged = model.merge_and_unload()
        merged.save_pretrained(tmp_path)
        again, found = type(merged).from_pretrained(tmp_path, output_loading_info=True)
        assert not found["missing_keys"]
        for other in (merged, again):
            torch.testing.assert_close(other(**batch).logits, adapted, rtol=1e-4, atol=1e-4)

    def test_unload_gives_the_base_model_back(self):
        base = tiny.make()
        batch = tiny.inputs()
        expected, names = base(**batch).logits, [n for n, _ in base.named_modules()]
        model = fp.get_peft_model(base, fp.LoraConfig(target_modules="all-linear", modules_to_save=["lm_head"]))
        tiny.randomize(model)
        model.merge_adapter()
        with pytest.warns(UserWarning, match=r"unmerged by unload\(\); merge_and_unload\(\) keeps them"):
            plain = model.unload()
        assert [n for n, _ in plain.named_modules()] == names
        assert torch.equal(plain(**batch).logits, expected)

    def test_safe_merge_refuses_values_that_are_not_finite_and_changes_nothing(self):
        model = block()
        model.get_base_model().linear.lora_B["default"].weight.data[0, 0] = torch.inf
        check_refused(model, None)

    @pytest.mark.parametrize("use_dora", [False, True])
    @pytest.mark.parametrize("target", ["embed", "conv", "linear", "packed"])
    @pytest.mark.parametrize(
        ("dtype", "options"),
        [
            (torch.float16, None),
            (torch.float16, {}),
            (torch.float16, {"dequantize": True}),
            (torch.float32, {"dequantize": True, "dtype": torch.float16}),
        ],
    )
    def test_safe_merge_refuses_what_only_float32_can_hold(self, target, dtype, options, use_dora):
        base = Block().to(dtype)
        base.packed = fp.nn.Linear4bit.from_linear(nn.Linear(32, 24, dtype=dtype), double_quant=True)
        model = fp.get_peft_model(base, fp.LoraConfig(target_modules=[target], use_dora=use_dora))
        layer = base.get_submodule(target)
        for factor in layer.factors("default"):
            factor.data.fill_(100.0)
        if use_dora:
            layer.lora_magnitude_vector["default"].weight.data.fill_(1e6)
        assert layer.merged_matrix(("default",)).isfinite().all()
        check_refused(model, options)

    @pytest.mark.parametrize("options", [None, {}, {"dequantize": True}, {"dequantize": True, "dtype": torch.float16}])
    @pytest.mark.parametrize("target", ["conv", "linear", "packed"])
    @pytest.mark.parametrize("value", [torch.inf, torch.nan, 1e5])
    def test_safe_merge_refuses_a_bias_that_is_not_finite(self, value, target, options):
        base = Block().half()
        base.packed = fp.nn.Linear4bit.from_linear(base.packed.to_linear(torch.float16))
        model = fp.get_peft_model(base, fp.LoraConfig(target_modules=[target], lora_bias=True))
        base.get_submodule(target).lora_B["default"].bias.data[0] = value
        check_refused(model, options)

    def test_safe_merge_refuses_scales_that_8_bits_cannot_hold(self):
        base = nn.Sequential(fp.nn.Linear4bit(64, 64, double_quant=True))
        model = fp.get_peft_model(base, fp.LoraConfig(target_modules=["0"], r=8, lora_alpha=8))
        for factor in base[0].factors("default"):
            factor.data.fill_(6e18)
        assert base[0].merged_matrix(("default",)).isfinite().all()
        check_refused(model, None)

    @pytest.mark.parametrize("dequantize", [False, True])
    def test_a_merge_and_unload_that_is_refused_changes_nothing(self, dequantize):
        model = fp.get_peft_model(tiny.quantized(tiny.make()), fp.LoraConfig(target_modules=["q_proj", "lm_head"]))
        tiny.randomize(model)
        model.add_adapter("broken", fp.LoraConfig(target_modules=["q_proj"]))
        model.get_base_model().model.layers[1].self_attn.q_proj.lora_B["broken"].weight.data.fill_(torch.inf)
        batch = tiny.inputs()
        expected = model(**batch).logits
        check_refused(model, {"adapter_names": ["default", "broken"], "dequantize": dequantize})
        assert torch.equal(model(**batch).logits, expected)

    def test_adapters_that_each_have_a_head_do_not_leave_together_but_one_named_twice_does(self):
        config = fp.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False)
        model = fp.get_peft_model(tiny.make(), config, "a")
        model.add_adapter("b", config)
        tiny.randomize(model)
        batch = tiny.inputs()
        expected, paths = model(**batch).logits, [path for path, _ in model.named_modules()]
        with pytest.raises(ValueError, match="only one can be active"):
            model.merge_and_unload(adapter_names=["a", "b"])
        assert torch.equal(model(**batch).logits, expected)
        assert [path for path, _ in model.named_modules()] == paths
        merged = model.merge_and_unload(adapter_names=["a", "a"])
        torch.testing.assert_close(merged(**batch).logits, expected, rtol=1e-4, atol=1e-4)

    def test_the_head_of_what_is_merged_already_stays_with_it(self):
        lora = {"target_modules": ["q_proj"], "init_lora_weights": False}
        config = fp.LoraConfig(**lora, modules_to_save=["lm_head"])
        model = fp.get_peft_model(tiny.make(), config, "a")
        model.add_adapter("b", fp.LoraConfig(**lora))
        model.add_adapter("c", config)
        tiny.randomize(model)
        batch = tiny.inputs()
        model.merge_adapter()
        with pytest.raises(ValueError, match="only one can be active"):
            model.merge_and_unload(adapter_names=["c"])
        both = copy.deepcopy(model)
        both.set_adapter(["a", "b"])
        merged = model.merge_and_unload(adapter_names=["b"])
        torch.testing.assert_close(merged(**batch).logits, both(**batch).logits, rtol=1e-4, atol=1e-4)

    def test_a_layer_merges_and_unmerges_by_itself_as_in_peft(self):
        base, ids = tiny.make(), tiny.inputs()["input_ids"]
        for library in (fp, peft):
            model = library.get_peft_model(copy.deepcopy(base), library.LoraConfig(target_modules=["q_proj", "v_proj"]))
            tiny.randomize(model)
            layers = [module for module in model.modules() if hasattr(module, "lora_A")]
            expected = model(ids).logits
            for each in (
                lambda layer: layer.merge(),
                lambda layer: layer.unmerge(),
                lambda layer: layer.merge(safe_merge=True, adapter_names=["default"]),
            ):
                for layer in layers:
                    each(layer)
                torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-5)
            model.unmerge_adapter()
            model.merge_adapter()
            layers[0].unmerge()
            torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-5)

    def test_a_copy_of_a_merged_model_unmerges_by_itself(self):
        model = block()
        ids = torch.randint(0, 20, (2, 3))
        expected = model(ids)
        model.merge_adapter()
        twin = copy.deepcopy(model)
        twin.unmerge_adapter()
        assert torch.equal(twin(ids), expected)
        assert model.get_base_model().linear.merged

    def test_lora_bias_is_scaled_when_merged(self):
        model = fp.get_peft_model(Block(), fp.LoraConfig(target_modules=["linear", "packed"], lora_bias=True))
        tiny.randomize(model)
        layer = model.get_base_model().linear
        x = torch.randn(2, 48)
        expected = layer(x)
        model.merge_adapter()
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
        model.unmerge_adapter()
        assert torch.equal(layer(x), expected)


class TestSeveralAdapters:
    def test_a_module_trained_whole_comes_and_goes_with_its_adapter(self):
        model = fp.get_peft_model(tiny.make("llama"), fp.LoraConfig(), "a")
        batch, logits = tiny.inputs(), {}
        model.add_adapter("b", fp.LoraConfig(modules_to_save=["lm_head"]))
        tiny.randomize(model)
        for name in ("a", "b", "a", "b"):
            model.set_adapter(name)
            now = model(**batch).logits
            assert torch.equal(logits.setdefault(name, now), now)
        assert not torch.allclose(logits["a"], logits["b"])
        model.delete_adapter("b")
        model.set_adapter("a")
        assert torch.equal(model(**batch).logits, logits["a"])
        assert type(model.get_base_model().lm_head) is nn.Linear and not model.base_model.bank.wrappers

    def test_of_a_module_trained_whole_a_row_has_one_copy(self):
        config, batch = fp.LoraConfig(modules_to_save=["lm_head"]), tiny.inputs()
        model = fp.get_peft_model(tiny.make("llama"), config, "a")
        model.add_adapter("b", config)
        rows = [["a"], ["a", "b"], "__base__"]
        refused = r"adapters \['a', 'b'\] each bring their own copy of one module"
        with pytest.raises(ValueError, match=refused):
            model.set_adapter(["a", "b"])
        with pytest.raises(ValueError, match=refused):
            model(**{k: v[:1].expand(3, -1) for k, v in batch.items()}, adapter_names=rows)

    @pytest.mark.parametrize("kwargs", [{}, {"use_dora": True}, {"lora_bias": True}], ids=["plain", "dora", "bias"])
    def test_adapters_active_together_add_up(self, kwargs):
        model = block("a", "b", target_modules=["linear", "packed"], **kwargs)
        for layer, x in (("linear", torch.randn(2, 48)), ("packed", torch.randn(2, 32))):
            layer = model.get_base_model().get_submodule(layer)
            single = []
            for names in ("a", "b", ["a", "b"]):
                model.set_adapter(names)
                single.append(layer(x))
            with model.disable_adapter():
                base = layer(x)
            torch.testing.assert_close(single[2] - base, single[0] + single[1] - 2 * base, rtol=1e-4, atol=1e-4)

    def test_dora_is_normed_by_the_weight_that_is_there_now(self):
        """Also where it lies at the address of the one before."""
        base = nn.Sequential(nn.Linear(16, 8, bias=False))
        model = fp.get_peft_model(base, fp.LoraConfig(r=2, target_modules=["0"], use_dora=True, inference_mode=True))
        layer, x = model.base_model.model[0], torch.randn(3, 16)
        for values in torch.randn(20, 8, 16):
            layer.base_layer.weight = None
            layer.base_layer.weight = nn.Parameter(values.clone(), requires_grad=False)
            norm = layer.base_layer.weight.norm(dim=1)
            torch.testing.assert_close(layer.norm("default"), norm, rtol=1e-4, atol=0)
            magnitude = layer.lora_magnitude_vector["default"].weight
            expected = layer.base_layer(x) * (magnitude / norm)
            torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)

    def test_dora_multiplies_what_it_drops_from_as_the_layer_does(self):
        linear = fp.nn.Linear4bit.from_linear(nn.Linear(64, 48, bias=False), "nf4", compute_dtype=torch.bfloat16)
        config = {"r": 4, "target_modules": ["0"], "use_dora": True}
        x, ys = torch.randn(5, 64), []
        for dropout in (0.0, 1e-12):  # which drops nothing
            model = fp.get_peft_model(
                nn.Sequential(copy.deepcopy(linear)), fp.LoraConfig(lora_dropout=dropout, **config)
            )
            layer = model.train().base_model.model[0]
            with torch.no_grad():
                layer.lora_magnitude_vector["default"].weight.mul_(3)
            ys.append(layer(x))
        torch.testing.assert_close(ys[1], ys[0], rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("packed", [False, True])
    @pytest.mark.parametrize("bias", [False, True])
    def test_dora_drops_what_peft_drops(self, packed, bias):
        """From the base product as well, as far as the gain scales it."""
        linear = nn.Linear(64, 48, bias=bias)
        if packed:
            weight = fp.quantize_4bit(linear.weight.detach(), "nf4").dequantize(torch.float32)
            linear.weight.data.copy_(weight)
        ours = copy.deepcopy(linear)
        config = {"r": 4, "target_modules": ["0"], "use_dora": True, "lora_dropout": 0.5, "init_lora_weights": False}
        results, seed, x = [], int(torch.randint(0, 1000, ())), torch.randn(5, 64)
        for library in (peft, fp):
            base = fp.nn.Linear4bit.from_linear(ours, "nf4") if packed and library is fp else copy.deepcopy(linear)
            torch.manual_seed(seed)
            model = library.get_peft_model(nn.Sequential(base), library.LoraConfig(**config)).train()
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "magnitude" in name:
                        parameter.mul_(1.3)
            given = x.clone().requires_grad_()
            torch.manual_seed(seed)
            y = model(given)
            y.sin().sum().backward()
            trained = sorted((n, p.grad) for n, p in model.named_parameters() if p.requires_grad)
            results.append([y, given.grad, *(grad for _, grad in trained)])
        for got, expected in zip(*results, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("training", [False, True])
    @pytest.mark.parametrize("use_dora", [False, True])
    def test_a_mixed_batch_equals_each_row_alone(self, use_dora, training):
        model = block("a", "b", use_dora=use_dora).train(training)
        model.add_adapter("c", fp.LoraConfig(r=3, target_modules=["linear", "packed"]))
        tiny.randomize(model)
        ids = torch.randint(0, 20, (5, 4))
        names = ["b", "__base__", "c", "a", "b"]
        mixed = model(ids, adapter_names=names)
        for i, name in enumerate(names):
            if name == "__base__":
                with model.disable_adapter():
                    alone = model(ids[i : i + 1])
            else:
                model.set_adapter(name)
                alone = model(ids[i : i + 1])
            torch.testing.assert_close(mixed[i : i + 1], alone, rtol=1e-4, atol=1e-5)

    def test_a_row_may_use_several_adapters(self):
        model = block("a", "b")
        tiny.randomize(model)
        ids = torch.randint(0, 20, (3, 4))
        mixed = model(ids, adapter_names=[["a", "b"], "b", ["__base__"]])
        for i, names in enumerate((["a", "b"], ["b"])):
            model.set_adapter(names)
            torch.testing.assert_close(mixed[i : i + 1], model(ids[i : i + 1]), rtol=1e-4, atol=1e-5)
        with model.disable_adapter():
            torch.testing.assert_close(mixed[2:], model(ids[2:]), rtol=1e-4, atol=1e-5)
        expected = model(ids[:2], adapter_names=["a", "b"])
        assert torch.equal(model(ids[:2], adapter_names={"a": 1, "b": 2}.keys()), expected)  # which have an order

    def test_a_set_of_names_is_in_the_order_of_the_alphabet(self):
        model = block(*"gfedcba")
        names = tuple(model.peft_config)
        rows = Rows([set(names), frozenset(names), list(names)], names)
        assert rows.of_row == (tuple("abcdefg"), tuple("abcdefg"), names)
        model.set_adapter(set(names))
        assert model.active_adapters == [*"abcdefg"]

    @pytest.mark.parametrize("names", ["a", "dora", "narrow", ["a", "b"], ["b", "dora", "narrow"], ["narrow", "wide"]])
    def test_rows_that_choose_alike_go_the_way_of_active_adapters(self, names, monkeypatch):
        targets = ["conv", "linear", "packed"]
        model = block("a", "b", target_modules=targets)
        model.add_adapter("dora", fp.LoraConfig(use_dora=True, target_modules=targets))
        for name, factor in (("narrow", 8), ("wide", 4)):
            model.add_adapter(name, fp.BottleneckConfig(reduction_factor=factor, target_modules=["conv", "linear"]))
        tiny.randomize(model)
        ids = torch.randint(0, 20, (3, 4))
        model.set_adapter(names)
        expected = model(ids)
        model.set_adapter("b" if names == "a" else "a")
        monkeypatch.setattr("pyfastpeft.ops.mixed.added", lambda *_: pytest.fail("mixes rows"))
        assert torch.equal(model(ids, adapter_names=[names] * 3), expected)

    def test_a_mixed_batch_trains_each_adapter_on_its_own_rows(self):
        model = block("a", "b")
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.requires_grad_(True)
        ids = torch.randint(0, 20, (4, 3))
        model(ids, adapter_names=["a", "b", "a", "b"]).square().sum().backward()
        mixed = {n: p.grad.clone() for n, p in model.named_parameters() if "lora_" in n}
        for name, rows in (("a", ids[::2]), ("b", ids[1::2])):
            model.set_adapter(name)
            model.zero_grad()
            model(rows).square().sum().backward()
            for n, p in model.named_parameters():
                if n.endswith(f".{name}") or f".{name}." in n:
                    torch.testing.assert_close(mixed[n], p.grad, rtol=1e-3, atol=1e-4, msg=n)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("quantized", [False, True], ids=["full precision", "4-bit"])
    @pytest.mark.parametrize(
        "kwargs",
        [
            {"target_modules": "all-linear"},
            {"target_modules": ["q_proj", "up_proj"], "use_dora": True, "lora_dropout": 0.5},
            {"target_modules": ["embed_tokens", "v_proj", "lm_head"]},
            {"target_modules": ["q_proj", "down_proj"], "lora_bias": True, "modules_to_save": ["lm_head"]},
        ],
        ids=["plain", "dora", "embedding", "bias and a module of its own"],
    )
    def test_an_adapter_that_is_not_finite_reaches_no_other_rows_and_no_other_gradients(self, kwargs, quantized, dtype):
        base = tiny.make(dtype=dtype)
        model = fp.get_peft_model(tiny.quantized(base) if quantized else base, fp.LoraConfig(**kwargs), "a").train()
        for name in ("b", "c"):
            model.add_adapter(name, fp.LoraConfig(**kwargs))
        tiny.randomize(model)
        model.set_adapter(["a", "b"] if "modules_to_save" not in kwargs else "a")
        names = ["a", "__base__", "b", "a" if "modules_to_save" in kwargs else ["a", "c"], "b"]
        tiny.check_not_finite_stays(model, torch.randint(0, tiny.VOCAB, (5, 6)), names)

    def test_generate_with_a_different_adapter_in_every_row(self):
        model = fp.get_peft_model(tiny.quantized(tiny.make()), fp.LoraConfig(), adapter_name="a").eval()
        model.add_adapter("b", fp.LoraConfig(r=4, target_modules="all-linear"))
        tiny.randomize(model, 0.5)
        ids = torch.randint(1, tiny.VOCAB, (3, 5))
        kwargs = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "num_beams": 2}
        kwargs |= tiny.WITH_SCORES
        names = ["b", "__base__", "a"]
        mixed = model.generate(ids, adapter_names=names, **kwargs)
        for i, name in enumerate(names):
            alone = model.generate(ids[i : i + 1], adapter_names=[name], **kwargs)
            tiny.assert_same_answers(mixed, alone, slice(i, i + 1))

    def test_peft_gives_the_same_mixed_batch(self, seed):
        ours, theirs = pair(tiny.make(), seed)
        for model, config in ((ours, fp.LoraConfig), (theirs, peft.LoraConfig)):
            model.add_adapter("other", config(r=4, lora_alpha=12, target_modules=["q_proj"]))
            model.eval()
        tiny.randomize(ours)
        tiny.copy_adapters(ours, theirs)
        ids = tiny.inputs()["input_ids"]
        names = ["other", "__base__", "default"]
        tiny.use_plain_layers(ours)
        assert relative(ours(ids, adapter_names=names).logits, theirs(input_ids=ids, adapter_names=names).logits) < 1e-6

    @pytest.mark.parametrize(
        ("kind", "kwargs"),
        [(kind, {}) for kind in ("cat", "svd", "linear")]
        + [
            (kind + svd, {"density": 0.4, "majority_sign_method": sign})
            for kind in ("ties", "dare_linear", "dare_ties", "magnitude_prune")
            for svd in ("", "_svd")
            for sign in ("total", "frequency")
        ],
        ids=str,
    )
    @pytest.mark.filterwarnings("ignore")
    def test_add_weighted_adapter_is_that_of_peft(self, kind, kwargs, seed, monkeypatch):
        def chosen(share):  # of a shape the same elements, whatever was drawn before
            generator = torch.Generator().manual_seed(share.numel())
            return (torch.rand(share.shape, generator=generator) < share).to(share)

        monkeypatch.setattr(torch, "bernoulli", chosen)
        ours, theirs = pair(tiny.make(), seed)
        for model, config in ((ours, fp.LoraConfig), (theirs, peft.LoraConfig)):
            model.add_adapter("other", config(r=8, lora_alpha=8, target_modules=["q_proj", "k_proj"]))
        tiny.randomize(ours)
        tiny.copy_adapters(ours, theirs)
        for model in (ours, theirs):
            model.add_weighted_adapter(["default", "other"], [0.7, -1.5], "mix", combination_type=kind, **kwargs)
            model.set_adapter("mix")
        assert [sum(p.requires_grad for p in model.parameters()) for model in (ours, theirs)] == [12, 12]
        batch = tiny.inputs()
        assert relative(ours(**batch).logits, theirs(**batch).logits) < 1e-4
        assert {p for p, layer in ours.base_model.bank.layers.items() if "mix" in layer.r} == {
            n.removeprefix("base_model.model.")
            for n, m in theirs.named_modules()
            if "mix" in getattr(m, "lora_A", {}) and not isinstance(m, nn.ModuleDict)
        }

    @pytest.mark.parametrize("kind", ["ties", "dare_linear_svd", "magnitude_prune", "svd"])
    def test_add_weighted_adapter_leaves_nothing_of_a_single_one_out(self, kind, seed):
        models = pair(tiny.make(), seed)
        tiny.randomize(models[0])
        tiny.copy_adapters(*models)
        kwargs = {} if kind == "svd" else {"density": 0.3}
        for model in models:
            model.add_weighted_adapter(["default"], [0.7], "part", combination_type=kind, **kwargs)
            model.set_adapter("part")
        batch = tiny.inputs()
        assert relative(models[0](**batch).logits, models[1](**batch).logits) < 1e-4

    def test_add_weighted_adapter_refuses_what_it_cannot_combine(self):
        model = block("a", "b")
        model.add_adapter("c", fp.LoraConfig(r=3, target_modules=["linear"]))
        model.add_adapter("d", fp.LoraConfig(target_modules=["linear"], use_dora=True))
        model.add_adapter("e", fp.BottleneckConfig(target_modules=["linear"]))
        for names, kind, new, message, kwargs in (
            (["a"], "cat", "x", "adapters has 1 names and weights 2", {}),
            (["a", "e"], "cat", "x", "adapter 'e' is BOTTLENECK; only LoRA", {}),
            (["a", "b"], "magic", "x", "combination_type is 'magic'", {}),
            (["a", "c"], "linear", "x", "ranks of .* differ", {}),
            (["a", "c"], "ties", "x", "ranks of .* differ", {"density": 0.5}),
            (["a", "d"], "svd", "x", "use_dora", {}),
            (["a", "b"], "cat", "c", "has already", {}),
            (["a", "z"], "cat", "x", "no adapter 'z'", {}),
            (["a", "b"], "ties", "x", "density is None; with combination_type 'ties' it must be above 0", {}),
            (
                ["a", "b"],
                "dare_ties_svd",
                "x",
                "density is 0; with combination_type 'dare_ties_svd' it must",
                {"density": 0},
            ),
            (
                ["a", "b"],
                "cat",
                "x",
                "density is 0.5; with combination_type 'cat' it must be left out",
                {"density": 0.5},
            ),
            (["a", "b"], "ties", "x", "majority_sign_method is 'x'", {"density": 1, "majority_sign_method": "x"}),
            (["a", "b"], "ties", "x", "svd_rank is 2", {"density": 1, "svd_rank": 2}),
            (["a", "b"], "svd", "x", "svd_rank is 0; it must be an integer of at least 1", {"svd_rank": 0}),
            (["a", "b"], "svd", "x", "svd_rank is 1.5; it must be an integer", {"svd_rank": 1.5}),
            (["a", "b"], "svd", "x", "svd_rank is '4'; it must be an integer", {"svd_rank": "4"}),
        ):
            with pytest.raises(ValueError, match=message):
                model.add_weighted_adapter(names, [1.0, 1.0], new, combination_type=kind, **kwargs)
        for tied in ({"init_lora_weights": "pissa"}, {"bias": "all"}):
            bound = fp.get_peft_model(tiny.make(), fp.LoraConfig(**tied))
            with pytest.raises(ValueError, match=r"adapter 'default' has init_lora_weights .* tie it to base weights"):
                bound.add_weighted_adapter(["default"], [1.0], "x", combination_type="cat")
        for weights, message in (
            (None, "weights is None; it must be a list of numbers"),
            (["1", "x"], r"weights is \['1', 'x'\]; it must be a list of numbers"),
            ([math.nan, 1.0], r"weights is \[nan, 1.0\]; each must be finite"),
            ([1.0, -math.inf], r"weights is \[1.0, -inf\]; each must be finite"),
        ):
            for kind in ("linear", "svd", "cat"):
                with pytest.raises(ValueError, match=message):
                    model.add_weighted_adapter(["a", "b"], weights, "x", combination_type=kind)
        assert list(model.peft_config) == ["a", "b", "c", "d", "e"]

    def test_cat_is_exact(self):
        model = block("a", "b")
        model.add_adapter("c", fp.LoraConfig(r=3, target_modules=["linear"], init_lora_weights=False))
        model.add_weighted_adapter(["a", "b"], [2.0, -0.5], "mix", combination_type="cat")
        model.add_weighted_adapter(["a", "c"], [2.0, -0.5], "ranks", combination_type="cat")
        layer = model.get_base_model().linear
        expected = 2 * layer.get_delta_weight("a") - 0.5 * layer.get_delta_weight("c")
        torch.testing.assert_close(layer.get_delta_weight("ranks"), expected, rtol=1e-4, atol=1e-5)
        expected = 2 * layer.get_delta_weight("a") - 0.5 * layer.get_delta_weight("b")
        torch.testing.assert_close(layer.get_delta_weight("mix"), expected, rtol=1e-4, atol=1e-5)

    def test_what_only_ends_as_a_target_takes_no_part(self, tmp_path):
        """A path without a dot, as of diffusers' Flux, is also how others end."""
        base = nn.ModuleDict({"block": nn.ModuleDict({"out": nn.Linear(4, 4)}), "out": nn.Linear(4, 4)})
        config = {"target_modules": ["out"], "exclude_modules": ["block.out"], "lora_alpha": 8}
        models = []
        for library in (fp, peft):
            model = library.get_peft_model(copy.deepcopy(base), library.LoraConfig(**config), adapter_name="a")
            model.add_adapter("b", library.LoraConfig(**config))
            models.append(model)
        tiny.randomize(models[0])
        tiny.copy_adapters(*models)
        for model in models:
            model.add_weighted_adapter(["a", "b"], [2.0, -0.5], "mix", combination_type="cat")
            model.base_model.set_adapter("mix")
        x = torch.randn(3, 4)
        ours, theirs = (model.base_model.model["out"](x) for model in models)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        models[0].save_pretrained(tmp_path, selected_adapters=["mix"])
        saved = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "mix")
        torch.testing.assert_close(saved.base_model.model["out"](x), theirs, rtol=1e-5, atol=1e-6)
        assert type(saved.base_model.model["block"]["out"]) is nn.Linear

    def test_svd_is_the_best_approximation_of_its_rank(self):
        model = block("a", "b")
        model.add_weighted_adapter(["a", "b"], [2.0, -0.5], "mix", combination_type="svd", svd_rank=3)
        layer = model.get_base_model().linear
        total = 2 * layer.get_delta_weight("a") - 0.5 * layer.get_delta_weight("b")
        u, s, v = total.svd()
        assert layer.r["mix"] == 3
        torch.testing.assert_close(layer.get_delta_weight("mix"), u[:, :3] * s[:3] @ v[:, :3].t(), rtol=1e-4, atol=1e-5)

    def test_deleting_the_active_adapter_activates_the_first_left(self):
        model = block("a", "b")
        model.set_adapter("b")
        ids = torch.randint(0, 20, (2, 3))
        model.delete_adapter("b")
        assert model.active_adapter == "a"
        assert not any(n.endswith(".b") or ".b." in n for n, _ in model.named_parameters())
        model.delete_adapter("a")
        assert not any("lora" in n for n, _ in model.named_modules())
        assert model(ids).shape == (2, 3, 24)

    def test_deleting_another_adapter_activates_none_where_none_is(self):
        model = block("a", "b")
        model.set_adapter([])
        model.delete_adapter("b")
        assert model.active_adapters == []

    def test_only_the_active_adapter_trains(self):
        model = block("a", "b")
        for name in ("a", "b", "a"):
            model.set_adapter(name)
            trains = {n for n, p in model.named_parameters() if p.requires_grad}
            assert trains == {n for n, _ in model.named_parameters() if n.endswith(f".{name}") or f".{name}." in n}
        model.set_adapter("a", inference_mode=True)
        assert not any(p.requires_grad for p in model.parameters())

    def test_an_adapter_is_for_inference_until_another_mode_is_given(self):
        model = block("a", "b")
        for mode in (True, False):
            model.set_adapter("a", inference_mode=mode)
            for name in ("a", "b", "a"):
                model.set_adapter(name)
                assert any(p.requires_grad for p in model.parameters()) == (name == "b" or not mode)
            assert model.peft_config["a"].inference_mode == mode

    @pytest.mark.parametrize("of_base_model", [False, True])
    def test_what_trains_may_be_set_by_adapter_as_in_peft(self, of_base_model):
        models, found = pair(tiny.make("llama"), 0, modules_to_save=["lm_head"]), []
        for model, library in zip(models, (fp, peft), strict=True):
            model.add_adapter("b", library.LoraConfig(target_modules=["k_proj"]))
            setting = (model.base_model if of_base_model else model).set_requires_grad
            changes = partial(setting, "b"), partial(setting, ["default", "b"], False), partial(setting, "b", True)
            trains = []
            for change in (*changes, partial(model.set_adapter, "default")):
                change()
                trains.append({n for n, p in model.named_parameters() if p.requires_grad})
            found.append(trains)
        assert found[0] == found[1]
        with pytest.raises(ValueError, match="'no'"):
            models[0].set_requires_grad("no")


class TestTargets:
    @pytest.mark.parametrize("head", ["roberta", "electra"])
    def test_all_linear_in_any_case_leaves_a_head_of_several_layers_to_be_trained_whole(self, head):
        name = {"roberta": "Roberta", "electra": "Electra"}[head]
        config = getattr(tf, f"{name}Config")(**tiny._BERT)
        base = getattr(tf, f"{name}ForSequenceClassification")(config)
        made = [lib.LoraConfig(r=4, target_modules="ALL-linear", task_type="SEQ_CLS") for lib in (fp, peft)]
        a, b = fp.get_peft_model(copy.deepcopy(base), made[0]), peft.get_peft_model(base, made[1])
        assert a.get_nb_trainable_parameters()[0] == b.get_nb_trainable_parameters()[0]

    @pytest.mark.filterwarnings("ignore:.*several experts")
    def test_routers_that_derive_from_linear_choose_experts_and_carry_none(self):
        sizes = {"num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 8, "intermediate_size_mlp": 64}
        base = tf.Llama4ForCausalLM(tf.Llama4TextConfig(**tiny._LLAMA, **sizes))
        with pytest.raises(ValueError, match="a Llama4Router; LoRA needs a Linear"):
            fp.get_peft_model(base, fp.LoraConfig(target_modules=["router"]))
        model = fp.get_peft_model(base, fp.LoraConfig(target_modules="all-linear"))
        assert not any("router" in path for path in model.peft_config["default"].target_modules)
        model(**tiny.inputs()).loss.backward()

    @pytest.mark.parametrize("name", ["bart", "whisper"])
    def test_nor_do_embeddings_that_count_positions(self, name):
        cls = getattr(tf, f"{name.title()}ForConditionalGeneration")
        sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
        base = cls(cls.config_class(**tiny._LLAMA, **sizes, d_model=32, encoder_ffn_dim=64, decoder_ffn_dim=64))
        with pytest.raises(ValueError, match=r"embed_positions', a .*PositionalEmbedding; LoRA needs"):
            fp.get_peft_model(base, fp.LoraConfig(target_modules=["embed_positions"]))

    @pytest.mark.parametrize("config", [{"target_modules": ["tokens"]}, {"trainable_token_indices": {"tokens": [1]}}])
    def test_nor_do_those_that_bound_a_norm(self, config):
        base = nn.ModuleDict({"tokens": nn.Embedding(8, 4, max_norm=1.0), "out": nn.Linear(4, 8)})
        with pytest.raises(ValueError, match=r"'tokens', a Embedding; .* without max_norm"):
            fp.get_peft_model(base, fp.LoraConfig(**{"target_modules": ["out"]} | config))
        assert type(base["tokens"]) is nn.Embedding and type(base["out"]) is nn.Linear

    def test_nor_does_a_layer_that_multiplies_groups(self):
        grouped = tf.models.deepseek_v4.modeling_deepseek_v4.DeepseekV4GroupedLinear(8, 12, n_groups=2)
        base = nn.ModuleDict({"o_a": grouped, "o_b": nn.Linear(12, 8)})
        for config in (fp.LoraConfig, fp.BottleneckConfig):
            with pytest.raises(ValueError, match="a DeepseekV4GroupedLinear; "):
                fp.get_peft_model(base, config(target_modules=["o_a"]))
        model = fp.get_peft_model(base, fp.LoraConfig(target_modules="all-linear"))
        assert set(model.base_model.bank.layers) == {"o_b"}

    def test_all_linear_says_that_fused_experts_are_left_alone(self):
        base = tf.MixtralForCausalLM(tf.MixtralConfig(**tiny._LLAMA, num_local_experts=2))
        with pytest.warns(UserWarning, match=r"leaves 4 weights alone .* several experts \(model.layers.0.*experts"):
            fp.get_peft_model(base, fp.LoraConfig(target_modules="all-linear"))

    @pytest.mark.parametrize("pattern", ["layers|blocks", ["blocks", "layers"]])
    def test_a_pattern_of_layers_may_have_alternatives(self, pattern):
        config = {"r": 4, "target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": pattern}
        model = fp.get_peft_model(tiny.make(), fp.LoraConfig(**config))
        assert list(model.base_model.bank.layers) == ["model.layers.1.self_attn.q_proj"]
        with pytest.raises(ValueError, match=r"layers_to_transform .* leave none"):
            fp.get_peft_model(tiny.make(), fp.LoraConfig(**config | {"layers_pattern": ["blocks"]}))

    def test_peft_finds_some_layers_of_a_list_at_the_models_root(self, tmp_path):
        base = tiny.make().model
        model = fp.get_peft_model(
            copy.deepcopy(base), fp.LoraConfig(layers_to_transform=[1], target_modules=["q_proj", "v_proj"])
        )
        assert list(model.base_model.bank.layers) == ["layers.1.self_attn.q_proj", "layers.1.self_attn.v_proj"]
        tiny.randomize(model)
        model.save_pretrained(tmp_path)
        batch = {key: value for key, value in tiny.inputs().items() if key != "labels"}
        with torch.no_grad():
            own, other = (m.eval()(**batch)[0] for m in (model, peft.PeftModel.from_pretrained(base, tmp_path)))
        assert relative(own, other) < 1e-5

    def test_a_layer_tells_what_the_module_it_stands_for_does(self):
        base = nn.ModuleDict({"tokens": nn.Embedding(8, 4, padding_idx=2), "out": nn.Linear(4, 8)})
        held = dict(base.items())
        fp.get_peft_model(base, fp.LoraConfig(target_modules=["tokens", "out"]))
        assert all(base[name].get_base_layer() is module for name, module in held.items())
        assert (base["out"].in_features, base["out"].out_features) == (4, 8)
        embedding = base["tokens"]
        assert (embedding.num_embeddings, embedding.embedding_dim, embedding.padding_idx) == (8, 4, 2)

    def test_lists_within_layers_are_no_lists_of_layers(self):
        expert = nn.ModuleDict({"up": nn.Linear(4, 4)})
        layer = nn.ModuleDict({"experts": nn.ModuleList([expert, copy.deepcopy(expert)])})
        base = nn.ModuleDict({"layers": nn.ModuleList([layer, copy.deepcopy(layer)])})
        for given in (None, "layers"):
            config = fp.LoraConfig(target_modules=["up"], layers_to_transform=[1], layers_pattern=given)
            model = fp.get_peft_model(copy.deepcopy(base), config)
            assert list(model.base_model.bank.layers) == [f"layers.1.experts.{i}.up" for i in range(2)]
            assert model.peft_config["default"].layers_pattern in ("layers", ["layers"])

    def test_several_adapters_are_activated_where_peft_does_it(self):
        model = fp.get_peft_model(tiny.make(), fp.LoraConfig(), "a")
        model.add_adapter("b", fp.LoraConfig())
        model.base_model.set_adapter(["a", "b"])
        assert model.active_adapters == ["a", "b"]


class TestWhatIsKept:
    def test_combinations_of_adapters_do_not_pile_up(self):
        names = [f"a{i}" for i in range(7)]
        model = fp.get_peft_model(tiny.make(), fp.LoraConfig(r=2, inference_mode=True), names[0]).eval()
        for name in names[1:]:
            model.add_adapter(name, fp.LoraConfig(r=2, inference_mode=True))
        tiny.randomize(model)
        layer = model.get_base_model().model.layers[0].self_attn.q_proj
        with torch.no_grad():
            chosen = [list(c) for k in (2, 3) for c in itertools.combinations(names, k)]
            for names in chosen:
                model(torch.ones(len(names), 20, dtype=torch.long), adapter_names=names)
            assert len(layer._cache) <= 32
            ids = tiny.inputs(rows=3)["input_ids"]
            alone = [model(ids, adapter_names=[name] * 3).logits[i] for i, name in enumerate(chosen[-1])]
            together = model(ids, adapter_names=chosen[-1]).logits
        torch.testing.assert_close(together, torch.stack(alone), rtol=1e-5, atol=1e-5)

    @torch.no_grad()
    def test_nothing_that_a_graph_records_is_kept(self, monkeypatch):
        """It has no values before a replay."""
        model = fp.get_peft_model(tiny.make(), fp.LoraConfig(use_dora=True, inference_mode=True), "a").eval()
        model.add_adapter("b", fp.LoraConfig(inference_mode=True))
        model.add_adapter("c", fp.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM", inference_mode=True))
        layer, bank = model.get_base_model().model.layers[0].self_attn.q_proj, model.base_model.bank
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        for recorded in (True, False):
            monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda recorded=recorded: recorded)
            layer._square = None  # as after loading
            for names in (["a"], ["a", "b"], ["c"]):
                model.base_model.set_adapter(names, inference_mode=True)
                model(torch.ones(1, 4, dtype=torch.int64))
            kept = [len(layer._cache) > 0, len(bank.kept["made"]) > 0, len(bank.kept["runs"]) > 0]
            assert [*kept, layer._square is not None] == [not recorded] * 4

    def test_rows_choose_on_each_device(self):
        rows = Rows(["a", "b"], ["a", "b"])
        for device in (torch.device("cpu"), torch.device("meta")):
            assert rows.mask(("a", "b"), 2, device).device == device

    def test_values_given_for_a_call_reach_an_embedding(self):
        model = fp.get_peft_model(tiny.make(), fp.LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"]))
        tiny.randomize(model)
        ids = tiny.inputs()["input_ids"]
        given = {k: p * 1.5 for k, p in model.named_parameters() if "lora_" in k}
        twin = copy.deepcopy(model)
        twin.load_state_dict(given, strict=False)
        called = torch.func.functional_call(model, given, (ids,))
        torch.testing.assert_close(called.logits, twin(ids).logits)


class TestDisabled:
    """``disable_adapter_layers`` against peft's."""

    def test_the_base_model_computes_and_nothing_trains(self):
        config = {"r": 4, "modules_to_save": ["lm_head"], "init_lora_weights": False}
        base = tiny.make("llama")
        a = fp.get_peft_model(copy.deepcopy(base), fp.LoraConfig(**config))
        b = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**config, target_modules=["q_proj", "v_proj"]))
        batch = tiny.inputs()
        plain, adapted = base(**batch).logits, a(**batch).logits
        for model in (a, b):
            model.base_model.disable_adapter_layers()
            assert relative(model(**batch).logits, plain) < 1e-6
            assert model.active_adapters == ["default"]
            assert not any(p.requires_grad for n, p in model.named_parameters() if "lora" in n)
        a.add_adapter("other", fp.LoraConfig(init_lora_weights=False))
        a.set_adapter("other")
        assert relative(a(**batch).logits, plain) < 1e-6
        a.set_adapter("default")
        for model in (a, b):
            model.base_model.enable_adapter_layers()
            assert all(p.requires_grad for n, p in model.named_parameters() if "lora" in n and "default" in n)
        assert torch.equal(a(**batch).logits, adapted)

    def test_a_soft_prompt_is_disabled_too(self):
        base = tiny.make("llama")
        batch = tiny.inputs()
        plain = base(**batch).logits
        model = fp.get_peft_model(base, fp.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")).eval()
        adapted = model(**batch).logits
        model.disable_adapter_layers()
        assert torch.allclose(model(**batch).logits, plain, atol=1e-6)
        model.enable_adapter_layers()
        assert torch.equal(model(**batch).logits, adapted)
        assert not torch.allclose(adapted, plain, atol=1e-3)

    def test_a_thread_that_begins_inside_has_no_adapter_and_one_from_before_goes_on(self):
        model = fp.get_peft_model(tiny.make("llama"), fp.LoraConfig(init_lora_weights=False)).eval()
        ids = tiny.inputs()["input_ids"]
        ask = lambda: model(ids).logits.detach()  # noqa: E731
        adapted = ask()
        with ThreadPoolExecutor(1) as before:
            assert torch.equal(before.submit(ask).result(), adapted)
            with ThreadPoolExecutor(1) as inside:
                with model.disable_adapter():
                    plain = ask()
                    assert torch.equal(inside.submit(ask).result(), plain) and not torch.equal(plain, adapted)
                    assert torch.equal(before.submit(ask).result(), adapted)
                    chosen = inside.submit(lambda: model(ids, adapter_names=["default"] * len(ids)).logits).result()
                    assert relative(chosen, adapted) < 1e-6
                assert torch.equal(inside.submit(ask).result(), adapted)

    def test_the_weight_of_a_module_trained_whole_is_the_base_models(self):
        """Attention reads ``out_proj``'s and does not call it."""

        class Attends(nn.MultiheadAttention):
            def forward(self, x):
                return super().forward(x, x, x)[0]

        base, x = nn.Sequential(nn.Linear(8, 8), Attends(8, 2)), torch.randn(3, 2, 8)
        plain = base(x)
        model = fp.get_peft_model(base, fp.LoraConfig(target_modules=["0"], modules_to_save=["out_proj"]))
        tiny.randomize(model)
        adapted = model(x)
        assert not torch.allclose(adapted, plain, atol=1e-3)
        with model.disable_adapter():
            assert torch.equal(model(x), plain)
            with ThreadPoolExecutor(1) as inside:
                assert torch.equal(inside.submit(model, x).result(), plain)
        assert torch.equal(model(x), adapted)

    def test_what_is_merged_is_unmerged_with_a_warning(self):
        model = fp.get_peft_model(tiny.make("llama"), fp.LoraConfig(init_lora_weights=False))
        batch = tiny.inputs()
        with model.disable_adapter():
            plain = model(**batch).logits
        model.merge_adapter()
        with pytest.warns(UserWarning, match="'default'.* unmerged to disable"):
            model.disable_adapter_layers()
        assert torch.equal(model(**batch).logits, plain)
        model.get_base_model().model.layers[0].self_attn.q_proj.scaling["default"] = 3.0  # which enables nothing
        with pytest.raises(ValueError, match="cannot be merged while they are disabled"):
            model.merge_adapter()
        assert torch.equal(model(**batch).logits, plain)
        model.enable_adapter_layers()
        with model.disable_adapter(), pytest.raises(ValueError, match="cannot be merged while they are disabled"):
            model.merge_adapter()

    def test_another_adapter_of_the_name_of_a_merged_one_is_not_merged(self):
        model = fp.get_peft_model(tiny.make("llama"), fp.LoraConfig(init_lora_weights=False), "a")
        model.add_adapter("b", fp.LoraConfig(init_lora_weights=False))
        model.merge_adapter(["b"])
        with model.disable_adapter():
            model.delete_adapter("b")
            model.add_adapter("b", fp.LoraConfig(init_lora_weights=False))
        assert model.base_model.merged() == ()


class TestInTraining:
    @pytest.mark.parametrize("several", [False, True])
    def test_dropout_is_switched_off_where_it_is_found_in_the_model(self, several):
        config = {"r": 4, "lora_dropout": 0.5, "target_modules": ["q_proj", "embed_tokens"], "init_lora_weights": False}
        model, theirs = pair(tiny.make("llama"), 0, **config)
        if several:
            for m, library in ((model, fp), (theirs, peft)):
                m.add_adapter("other", library.LoraConfig(**config))
                m.base_model.set_adapter(["default", "other"])
        batch = tiny.inputs()
        assert not torch.equal(model.train()(**batch).logits, model(**batch).logits)
        found = [[m for m in x.modules() if isinstance(m, nn.Dropout)] for x in (model, theirs)]
        assert len(found[0]) == len(found[1]) == (6 if several else 3)
        for module in found[0]:
            module.p = 0
        assert torch.equal(model(**batch).logits, model(**batch).logits)
        assert torch.equal(model(**batch).logits, model.eval()(**batch).logits)
        for module in found[0]:  # as for Monte Carlo estimates
            module.p = 0.5
            module.train()
        assert not torch.equal(model(**batch).logits, model(**batch).logits)

    @pytest.mark.parametrize("put", [setattr, nn.ModuleDict.__setitem__], ids=["as attribute", "as item"])
    @pytest.mark.parametrize("part", ["lora_A", "lora_B", "lora_magnitude_vector", "modules_to_save"])
    def test_what_is_put_in_the_place_of_a_part_computes_and_trains_as_in_peft(self, part, put):
        config = {"init_lora_weights": False, "modules_to_save": ["lm_head"], "use_dora": part.endswith("vector")}
        ours, theirs = pair(tiny.make("llama"), 0, **config)
        batch, found = tiny.inputs(), []
        for model in (copy.deepcopy(ours), theirs):
            holders = [getattr(m, part) for m in model.modules() if part in m._modules]
            for holder in holders:
                module = copy.deepcopy(holder["default"])
                module.weight.data.mul_(0.5)
                put(holder, "default", module)
            out = model(**batch)
            out.loss.backward()
            found.append([out.logits, *(holder["default"].weight.grad for holder in holders)])
        for own, other in zip(*found, strict=True):
            assert relative(own, other) < 1e-4

    def test_a_dropout_that_is_put_in_drops(self):
        model, batch = fp.get_peft_model(tiny.make("llama"), fp.LoraConfig(init_lora_weights=False)), tiny.inputs()
        model.train()
        assert torch.equal(model(**batch).logits, model(**batch).logits)
        for layer in model.modules():
            if hasattr(layer, "lora_dropout"):
                layer.lora_dropout["default"] = nn.Dropout(0.5)
        assert not torch.equal(model(**batch).logits, model(**batch).logits)

    @pytest.mark.parametrize("names", [["default"], ["default", "b"]])
    def test_a_module_that_is_no_dropout_is_refused_in_its_place(self, names):
        model = fp.get_peft_model(tiny.make("llama"), fp.LoraConfig()).eval()
        model.add_adapter("b", fp.LoraConfig())
        model.base_model.set_adapter(names)
        model.base_model.model.model.layers[1].self_attn.q_proj.lora_dropout["default"] = nn.ReLU()
        with torch.no_grad(), pytest.raises(TypeError, match=r"lora_dropout holds a ReLU; it must be an nn\.Dropout"):
            model.generate(**{key: value[:1] for key, value in tiny.inputs().items() if key != "labels"})

    def test_an_adapter_added_to_a_model_that_serves_drops_nothing(self):
        model, batch = fp.get_peft_model(tiny.make("llama"), fp.LoraConfig()).eval(), tiny.inputs()
        model.add_adapter("b", fp.LoraConfig(lora_dropout=0.5, init_lora_weights=False))
        model.set_adapter("b")
        assert torch.equal(model(**batch).logits, model(**batch).logits)

    def test_a_layers_scaling_may_be_written(self):
        ours, theirs = pair(tiny.make("llama"), 0, init_lora_weights=False)
        batch = tiny.inputs()

        def each(change):
            for model in (ours, theirs):
                for layer in model.modules():
                    if hasattr(layer, "lora_A"):
                        change(layer)
            scalings = [dict(m.base_model.model.model.layers[1].self_attn.q_proj.scaling) for m in (ours, theirs)]
            assert scalings[0] == pytest.approx(scalings[1])
            assert relative(ours(**batch).logits, theirs(**batch).logits) < 1e-5

        each(lambda layer: layer.scaling.update(default=0.5))
        each(lambda layer: layer.scale_layer(3))
        each(lambda layer: layer.unscale_layer(2))
        each(lambda layer: layer.set_scale("default", 0.25))
        each(lambda layer: layer.unscale_layer())
        for model, library in ((ours, fp), (theirs, peft)):
            model.add_adapter("k", library.LoraConfig(target_modules=["k_proj"]))
            model.base_model.set_adapter(["default", "k"])  # of which each layer has one
        each(lambda layer: layer.scale_layer(2))
        ours.eval().merge_adapter()
        assert relative(ours(**batch).logits, theirs.eval()(**batch).logits) < 1e-5
        layer = ours.base_model.model.model.layers[0].self_attn.q_proj
        with pytest.raises(KeyError, match=r"'no'; the adapters of this layer are \['default'\]"):
            layer.scaling["no"] = 1.0
        with pytest.raises(TypeError, match="removed with its adapter"):
            del layer.scaling["default"]
        ours.add_adapter("first", fp.LoraConfig())
        with pytest.warns(UserWarning, match="are unmerged"):
            ours.base_model.set_adapter(["first", "default"])
        ours.merge_adapter(["default"])
        held, both = dict(layer.scaling), {"first": 3, "default": 3}
        changes = [lambda: layer.set_scale("default", 3), lambda: layer.scale_layer(3), layer.unscale_layer]
        changes.append(lambda: layer.scaling.update(both))
        for change in changes:
            with pytest.raises(ValueError, match=r"'default' is merged; call unmerge_adapter\(\) first"):
                change()
            assert layer.scaling == held

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_gradient_checkpointing_gives_the_same_gradients_also_for_rows_that_choose(self, reentrant):
        model = fp.get_peft_model(tiny.quantized(tiny.make()), fp.LoraConfig(), adapter_name="a").train()
        model.add_adapter("b", fp.LoraConfig())
        tiny.randomize(model)
        model.set_adapter(["a", "b"])
        batch = tiny.inputs()
        names = ["b", "__base__", "a"]

        def gradients():
            model.zero_grad()
            model(**batch, adapter_names=names).loss.backward()
            return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}

        expected = gradients()
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        for name, value in gradients().items():
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-7, msg=name)

    @pytest.mark.filterwarnings("ignore")
    @pytest.mark.parametrize(
        "config",
        [{"target_modules": ["embed_tokens"]}, {"trainable_token_indices": [3]}, {"modules_to_save": ["embed_tokens"]}],
    )
    def test_checkpointing_outlives_the_adapter_of_the_embedding(self, config):
        """transformers lets the input embedding's output require a gradient, wherever that embedding is by now."""
        batch, model = tiny.inputs(), fp.get_peft_model(tiny.make(), fp.LoraConfig(**config), adapter_name="a").train()
        model.add_adapter("b", fp.LoraConfig(init_lora_weights=False))
        model.gradient_checkpointing_enable({"use_reentrant": True})
        model.set_adapter("b")
        model(**batch).loss.backward()
        trained = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
        model.zero_grad()
        model.delete_adapter("a")
        copy.deepcopy(model)(**batch).loss.backward()
        model(**batch).loss.backward()
        assert all(torch.equal(model.get_parameter(n).grad, grad) for n, grad in trained.items())
        copy.deepcopy(model.unload())(**batch)

    @pytest.mark.filterwarnings("ignore")
    def test_transformers_trainer_trains_the_adapter_and_nothing_else(self, tmp_path):
        from transformers import Trainer, TrainingArguments

        model = fp.get_peft_model(tiny.quantized(tiny.make()), fp.LoraConfig())
        frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
        rows = [{k: v[0] for k, v in tiny.inputs(rows=1).items()} for _ in range(8)]
        args = TrainingArguments(
            str(tmp_path),
            max_steps=4,
            learning_rate=1e-2,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
        )
        Trainer(model, args, train_dataset=rows).train()
        assert all(torch.equal(p, dict(model.named_parameters())[n]) for n, p in frozen.items())
        assert all(p.abs().sum() > 0 for n, p in model.named_parameters() if "lora_B" in n)

    def test_a_compiled_model_is_one_graph_and_agrees(self):
        model = fp.get_peft_model(tiny.quantized(tiny.make()), fp.LoraConfig(target_modules="all-linear"))
        tiny.randomize(model)
        batch = tiny.inputs()
        expected = model(**batch)
        expected.loss.backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        out = torch.compile(model, fullgraph=True, backend="aot_eager")(**batch)
        out.loss.backward()
        torch.testing.assert_close(out.logits, expected.logits, rtol=1e-5, atol=1e-5)
        for name, parameter in model.named_parameters():
            if name in grads:
                torch.testing.assert_close(parameter.grad, grads[name], rtol=1e-4, atol=1e-6, msg=name)

    @pytest.mark.parametrize("use_dora", [False, True])
    def test_a_compiled_mixed_batch_is_one_graph_and_agrees(self, use_dora):
        model = block("a", "b", use_dora=use_dora).eval()
        ids = torch.randint(0, 20, (3, 4))
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        names = ["b", "__base__", "a"]
        torch.testing.assert_close(compiled(ids, adapter_names=names), model(ids, adapter_names=names))

    def test_a_compiled_model_without_its_adapter_is_the_base_model(self):
        model = block().eval()
        ids = torch.randint(0, 20, (3, 4))
        compiled = torch.compile(model, fullgraph=True, backend="eager")  # before it has run
        adapted = compiled(ids)
        torch.testing.assert_close(adapted, model(ids))
        with model.disable_adapter():
            torch.testing.assert_close(compiled(ids), model(ids))
            assert not torch.allclose(compiled(ids), adapted)
        torch.testing.assert_close(compiled(ids), adapted)

    def test_copies_and_casts_keep_adapters_working(self):
        model = block()
        ids = torch.randint(0, 20, (2, 3))
        expected = model(ids)
        twin = copy.deepcopy(model)
        twin.get_base_model().linear.lora_B["default"].weight.data.zero_()
        assert torch.equal(model(ids), expected)
        assert not torch.equal(twin(ids), expected)
        assert relative(model.to(torch.bfloat16)(ids), expected) < 0.05

    def test_values_loaded_by_assignment_are_used(self):
        model = block()
        ids = torch.randint(0, 20, (2, 3))
        before = model(ids)
        state = {
            k: torch.zeros_like(v) if "lora_B" in k or "embedding_B" in k else v for k, v in model.state_dict().items()
        }
        model.load_state_dict(state, assign=True)
        with model.disable_adapter():
            base = model(ids)
        torch.testing.assert_close(model(ids), base)
        assert not torch.allclose(before, base)

    @pytest.mark.parametrize("again", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
    def test_forward_is_a_method_that_wrappers_can_bind_again(self, again):
        model = again(fp.get_peft_model(tiny.make("llama"), fp.LoraConfig()).eval())
        batch = tiny.inputs()
        assert model.forward.__self__ is model
        assert {"input_ids", "adapter_names"} <= set(inspect.signature(model.forward).parameters)
        expected = model(**batch).logits
        model.forward = types.MethodType(model.forward.__func__, model)  # as accelerate does
        assert torch.equal(model(**batch).logits, expected)

    def test_the_generation_config_is_that_of_the_base_model(self):
        model = fp.get_peft_model(tiny.make("llama"), fp.LoraConfig())
        model.generation_config = GenerationConfig(max_new_tokens=3, eos_token_id=-1, pad_token_id=0)
        ids = tiny.inputs()["input_ids"]
        assert model.generate(ids).shape[1] == ids.shape[1] + 3

    def test_parameters_loaded_by_assignment_train_with_their_adapter(self):
        model = fp.get_peft_model(tiny.make("llama"), fp.LoraConfig())
        model.add_adapter("b", fp.LoraConfig())
        model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
        model.set_adapter("b")
        assert {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad} == {"b"}

    @pytest.mark.parametrize("target", ["q_proj", "embed_tokens"])
    def test_adapters_with_and_without_dora_work_together_in_16_bits(self, target):
        base = tiny.make("llama").to(torch.bfloat16)
        config = {"target_modules": [target], "init_lora_weights": False}
        model = fp.get_peft_model(base, fp.LoraConfig(**config, use_dora=True), autocast_adapter_dtype=False)
        model.add_adapter("b", fp.LoraConfig(**config), autocast_adapter_dtype=False)
        exact = copy.deepcopy(model).double().eval()
        batch = tiny.inputs()
        for m in (model.eval(), exact):
            m.set_adapter(["default", "b"])
        assert relative(model(**batch).logits, exact(**batch).logits) < 2e-2

    def test_forward_has_the_signature_of_the_base_model(self):
        model = fp.get_peft_model(tiny.make(), fp.LoraConfig())
        names = inspect.signature(model.forward).parameters
        assert {"input_ids", "attention_mask", "labels", "adapter_names"} <= set(names)


class TestBadArguments:
    @pytest.mark.parametrize(
        ("kwargs", "message"),
        [
            ({"r": 0}, "r is 0"),
            ({"r": 2.5}, "r is 2.5"),
            ({"r": True}, "r is True"),
            ({"rank_pattern": {"q": -1}}, "rank_pattern"),
            ({"lora_alpha": "big"}, "lora_alpha is 'big'"),
            ({"lora_alpha": True}, "lora_alpha is True"),
            ({"lora_alpha": math.nan}, "lora_alpha is nan"),
            ({"lora_alpha": 1e300}, r"lora_alpha is 1e\+300; it must be a finite number in float32's range"),
            ({"lora_alpha": 10**400}, "lora_alpha is 1000"),
            ({"alpha_pattern": {"q": math.inf}}, r"alpha_pattern\['q'\] is inf"),
            ({"lora_dropout": 1.0}, "lora_dropout is 1.0"),
            ({"lora_dropout": False}, "lora_dropout is False"),
            ({"bias": "some"}, "bias is 'some'"),
            ({"init_lora_weights": "magic"}, "init_lora_weights is 'magic'"),
            ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 2}}, "loftq_bits"),
            ({"loftq_config": "x"}, "loftq_config is 'x'; it must be a LoftQConfig or a dict"),
            ({"loftq_config": fp.LoftQConfig}, "loftq_config is <class .*LoftQConfig'>; it must be a LoftQConfig"),
            ({"lora_bias": True, "use_dora": True}, "lora_bias is True"),
            (
                {
                    "target_modules": "(",
                },
                "regular expression",
            ),
            ({"target_modules": "q_proj", "layers_to_transform": [0]}, "layers_to_transform"),
            ({"layers_pattern": "layers"}, "layers_pattern"),
            ({"task_type": "POETRY"}, "task_type is 'POETRY'"),
            ({"modules_to_save": "lm_head"}, "modules_to_save is 'lm_head'"),
            ({"modules_to_save": [3]}, "modules_to_save is \\[3\\]"),
            ({"modules_to_save": {"lm_head": 2}}, "modules_to_save is {'lm_head': 2}; it must be a list"),
            ({"modules_to_save": ["("]}, "a name in modules_to_save is '\\('"),
            ({"layers_to_transform": ""}, "layers_to_transform is ''"),
            ({"target_modules": 5}, "target_modules is 5"),
            ({"target_modules": [5]}, "target_modules is \\[5\\]"),
            ({"lora_dropout": "x"}, "lora_dropout is 'x'"),
            ({"rank_pattern": {"(": 2}}, "a key of rank_pattern is '\\('"),
            ({"alpha_pattern": {5: 2}}, "a key of alpha_pattern is 5"),
            ({"alpha_pattern": [1]}, "alpha_pattern is \\[1\\]"),
            ({"layers_pattern": "(", "layers_to_transform": [0]}, "layers_pattern is '\\('"),
            ({"layers_to_transform": "1"}, "layers_to_transform is '1'"),
            ({"layers_to_transform": [0.5]}, "layers_to_transform is \\[0.5\\]"),
            ({"use_rslora": "false"}, "use_rslora is 'false'"),
            ({"inference_mode": 1}, "inference_mode is 1"),
        ],
    )
    def test_a_wrong_field_is_named(self, kwargs, message):
        with pytest.raises(ValueError, match=message):
            fp.LoraConfig(**kwargs)

    def test_a_configuration_keeps_its_own_fields(self):
        ranks, targets = {"q_proj": 2}, {"v_proj", "q_proj", "k_proj", "o_proj"}
        config = fp.LoraConfig(rank_pattern=ranks, alpha_pattern=None, target_modules=targets)
        ranks.clear(), targets.clear()
        assert (config.rank_of("q_proj"), config.rank_of("v_proj"), config.alpha_pattern) == (2, 8, {})
        assert config.target_modules == ["k_proj", "o_proj", "q_proj", "v_proj"]  # whatever order the set had

    @pytest.mark.parametrize(
        ("method", "kwargs"),
        [
            (fp.LoraConfig, {"r": np.int64(4), "rank_pattern": {"v_proj": np.int32(2)}}),
            (fp.LoraConfig, {"lora_alpha": np.float32(4), "alpha_pattern": {"v_proj": np.int64(2)}}),
            (fp.LoraConfig, {"lora_dropout": np.float32(0.5), "layers_to_transform": [np.int64(0)]}),
            (fp.LoraConfig, {"layers_to_transform": np.int64(0)}),
            (fp.LoraConfig, {"loftq_config": {"loftq_bits": np.int64(4)}, "init_lora_weights": "loftq"}),
            (fp.LoraConfig, {"trainable_token_indices": [np.int64(1), np.int32(3)]}),
            (fp.PromptEncoderConfig, {"num_virtual_tokens": 4, "encoder_dropout": np.float16(0.5)}),
            (fp.DeepPromptConfig, {"num_virtual_tokens": 4, "prefix_dropout": np.float32(0.5)}),
            (fp.BottleneckConfig, {"reduction_factor": np.float32(2)}),
        ],
    )
    def test_numbers_may_be_of_any_type_and_are_saved_as_pythons(self, tmp_path, method, kwargs):
        config = method(**kwargs)
        config.save_pretrained(tmp_path)
        assert method.from_pretrained(tmp_path) == config == method.from_dict(config.to_dict() | kwargs)

    @pytest.mark.parametrize(
        ("kwargs", "message"),
        [
            ({"loftq_bits": 8}, "loftq_bits is 8; it must be 4"),
            ({"loftq_iter": 0}, "loftq_iter is 0; it must be an integer of at least 1"),
        ],
    )
    def test_what_loftq_does_not_have_is_refused_at_once(self, kwargs, message):
        with pytest.raises(ValueError, match=message):
            fp.LoftQConfig(**kwargs)
        with pytest.raises(ValueError, match="loftq_config has bits; it takes loftq_bits, loftq_iter"):
            fp.LoraConfig(init_lora_weights="loftq", loftq_config={"bits": 4})

    def test_patterns_that_match_no_target_are_said(self):
        config = fp.LoraConfig(rank_pattern={"q_prj": 2, "0.*": 4}, alpha_pattern={"layers.9.*": 3})
        with pytest.warns(UserWarning) as caught:
            fp.get_peft_model(tiny.make(), config)
        said = [str(w.message) for w in caught if "match no target" in str(w.message)]
        assert [m.partition(" match")[0] for m in said] == ["rank_pattern ['q_prj']", "alpha_pattern ['layers.9.*']"]

    @pytest.mark.parametrize("names", [["q_prj"], ["q_proj", "v_prj"], "q_prj"])
    def test_an_unknown_target_lists_close_matches_and_leaves_the_model_alone(self, names):
        base = tiny.make()
        before = [n for n, _ in base.named_modules()]
        with pytest.raises(ValueError, match=r"matches no module.*_proj"):
            fp.get_peft_model(base, fp.LoraConfig(target_modules=names))
        assert [n for n, _ in base.named_modules()] == before
        assert all(p.requires_grad for p in base.parameters())

    def test_a_name_that_is_given_as_an_expression_for_whole_paths_says_so(self):
        with pytest.raises(ValueError, match=r"one regular expression for whole paths; give \['q_proj'\]"):
            fp.get_peft_model(tiny.make(), fp.LoraConfig(target_modules="q_proj"))

    @pytest.mark.parametrize("kwargs", [{"exclude_modules": ["q_proj"]}, {"layers_to_transform": [7]}])
    def test_what_leaves_none_of_the_targets_is_named(self, kwargs):
        (name,) = kwargs
        with pytest.raises(ValueError, match=rf"target_modules \['q_proj'\] are modules .*{name} \["):
            fp.get_peft_model(tiny.make(), fp.LoraConfig(target_modules=["q_proj"], **kwargs))

    @pytest.mark.parametrize("method", ["pissa", "olora", "loftq"])
    @pytest.mark.parametrize("alpha", [0, -8, math.inf, math.nan])
    def test_values_from_the_weight_need_a_scaling_above_zero(self, method, alpha):
        base, config = tiny.make(), fp.LoraConfig(r=4, init_lora_weights=method)
        config.lora_alpha = alpha  # past the configuration's own check
        with tiny.unchanged(base), pytest.raises(ValueError, match="lora_alpha must be above 0, and finite"):
            fp.get_peft_model(base, config)

    def test_a_refused_choice_changes_nothing(self):
        model = fp.get_peft_model(tiny.make(), fp.LoraConfig(modules_to_save=["lm_head"]), "a")
        model.add_adapter("b", fp.LoraConfig(modules_to_save=["lm_head"]))
        model.merge_adapter(["a"])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(ValueError, match="only one can be active"):
                model.set_adapter(["a", "b"], inference_mode=True)
        assert model.active_adapters == ["a"]
        assert not any(c.inference_mode for c in model.peft_config.values())
        assert model.get_base_model().model.layers[0].self_attn.q_proj.merged

    def test_what_is_not_called_itself_is_not_trained_whole(self):
        config = fp.LoraConfig(target_modules=["q"], modules_to_save=["held"])
        for holder in (torch.nn.ModuleList, torch.nn.ModuleDict, torch.nn.ParameterList, torch.nn.ParameterDict):
            model = torch.nn.ModuleDict({"q": torch.nn.Linear(4, 4), "held": holder()})
            before = dict(model.named_modules())
            with pytest.raises(ValueError, match=rf"modules_to_save names 'held', a {holder.__name__}, which is not"):
                fp.get_peft_model(model, config)
            assert dict(model.named_modules()) == before

    @pytest.mark.parametrize(
        ("config", "kind"),
        [
            (fp.LoraConfig(target_modules=["down_proj"]), "LoRA or tokens"),
            (fp.BottleneckConfig(target_modules=["down_proj"]), "a bottleneck"),
            (fp.LoraConfig(target_modules=["q_proj"], modules_to_save=["down_proj"]), "modules_to_save"),
        ],
        ids=["lora", "bottleneck", "saved"],
    )
    def test_what_carries_one_adapter_is_not_copied_for_another(self, config, kind, tmp_path):
        """Neither where it lies inside what another trains whole, nor the other way round."""
        whole = fp.LoraConfig(target_modules=["v_proj"], modules_to_save=["mlp"])
        fp.get_peft_model(tiny.make(), whole).save_pretrained(tmp_path)
        model = fp.get_peft_model(tiny.make(), config, "a")
        before = model.state_dict().keys()
        message = rf"holds 'model.layers.0.mlp', but 'model.layers.0.mlp.down_proj' carries {kind} of another adapter"
        for attach in (lambda: model.add_adapter("b", whole), lambda: model.load_adapter(tmp_path, "b")):
            with pytest.raises(ValueError, match=message):
                attach()
        assert model.state_dict().keys() == before
        model = fp.get_peft_model(tiny.make(), whole, "b")
        with pytest.raises(
            ValueError, match=r"layers.0.mlp.down_proj' lies in 'model.layers.0.mlp', which modules_to_"
        ):
            model.add_adapter("a", config)

    def test_targets_inside_what_another_adapter_trains_whole_are_left_out_with_a_warning(self):
        whole = fp.LoraConfig(target_modules=["v_proj"], modules_to_save=["layers.0.mlp"])
        model = fp.get_peft_model(tiny.make(), whole)
        with pytest.warns(UserWarning, match=r"match \['model.layers.0.mlp.down_proj'\], which modules_to"):
            model.add_adapter("other", fp.LoraConfig(target_modules=["down_proj"]))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.add_adapter("third", fp.LoraConfig(target_modules=["down_proj"], modules_to_save=["layers.0.mlp"]))

    def test_a_target_inside_what_the_adapter_itself_trains_whole_says_so(self):
        config = fp.LoraConfig(target_modules=["q_proj"], modules_to_save=["self_attn", "o_proj"])
        with pytest.raises(
            ValueError, match=r"self_attn.q_proj' lies in 'model.layers.0.self_attn', which modules_to_"
        ):
            fp.get_peft_model(tiny.make(), config)

    def test_a_refused_adapter_leaves_no_hook(self):
        base = tiny.make().train()
        base.gradient_checkpointing_enable()
        hooks = len(base.get_input_embeddings()._forward_hooks)
        with pytest.raises(ValueError, match="nothing"):
            fp.get_peft_model(base, fp.LoraConfig(target_modules=["nothing"]))
        assert len(base.get_input_embeddings()._forward_hooks) == hooks
        fp.get_peft_model(base, fp.LoraConfig())
        assert base.get_input_embeddings()(torch.tensor([1])).requires_grad

    @pytest.mark.parametrize("names", [None, 3, ["default", "default"]])
    def test_active_adapters_that_make_no_sense_are_named(self, names):
        model = fp.get_peft_model(tiny.make(), fp.LoraConfig())
        with pytest.raises(ValueError, match=re.escape(f"is {names!r}; ")):
            model.set_adapter(names)
        assert model.active_adapters == ["default"]

    def test_one_adapter_may_be_given_as_its_name_alone(self):
        model = fp.get_peft_model(tiny.make(), fp.LoraConfig())
        model.merge_adapter("default")
        assert model.get_base_model().model.layers[0].self_attn.q_proj.merged_adapters == ["default"]
        model.unmerge_adapter()
        with pytest.raises(ValueError, match="no adapter 'other'"):
            model.merge_adapter("other")

    def test_what_is_no_name_of_an_adapter_is_named(self, tmp_path):
        model = fp.get_peft_model(tiny.make(), fp.LoraConfig())
        model.save_pretrained(tmp_path)
        for call, message in (
            (lambda: model.delete_adapter(["default"]), r"no adapter \['default'\]; this model has \['default'\]"),
            (lambda: model.load_adapter(tmp_path, ["new"]), r"adapter_name is \['new'\]; it must be a word"),
            (lambda: model.add_weighted_adapter(["default"], [1.0], ["new"]), r"adapter_name is \['new'\]; it must be"),
            (lambda: model(**tiny.inputs(), adapter_names=3), "adapter_names is 3; it must be a list"),
            (
                lambda: model(**tiny.inputs(rows=2), adapter_names={"default", "__base__"}),
                "adapter_names is {.*}; it must be a list",
            ),
            (
                lambda: model.add_weighted_adapter({"default", "b"}, [1.0, 2.0], "c"),
                "adapters is {.*}; it must be a list, in the order of weights",
            ),
        ):
            with pytest.raises(ValueError, match=message):
                call()
        assert list(model.peft_config) == ["default"]

    def test_a_target_that_cannot_carry_lora_is_named(self):
        with pytest.raises(ValueError, match=r"input_layernorm.*Linear, Conv1D or Embedding"):
            fp.get_peft_model(tiny.make(), fp.LoraConfig(target_modules=["input_layernorm"]))

    @pytest.mark.parametrize("name", ["a.b", "__base__", "a/b", "", "keys", "training", "get", 3, "a"])
    def test_a_wrong_adapter_name_is_refused(self, name):
        model, config = block("a"), fp.LoraConfig(target_modules=["packed"])
        with pytest.raises(ValueError, match=f"adapter_name is {name!r}"):
            model.add_adapter(name, config)
        assert list(model.peft_config) == ["a"]

    @pytest.mark.parametrize(
        ("kwargs", "message"),
        [
            ({"target_modules": None}, "target_modules is None, .*Block has none .*: conv, embed, linear, packed"),
            ({"target_modules": ["embed"], "lora_bias": True}, "an embedding has no place for a bias"),
            ({"target_modules": ["linear"], "bias": "all"}, "biases can follow only one"),
        ],
    )
    def test_what_a_model_has_no_place_for_is_refused(self, kwargs, message):
        model = fp.get_peft_model(Block(), fp.LoraConfig(target_modules=["linear"], bias="lora_only"))
        before = [name for name, _ in model.named_modules()]
        with pytest.raises(ValueError, match=message):
            model.add_adapter("b", fp.LoraConfig(**kwargs))
        assert [name for name, _ in model.named_modules()] == before

    def test_a_bias_that_the_base_cannot_hold_is_not_merged(self):
        base = Block()
        base.linear.bias = None
        model = fp.get_peft_model(base, fp.LoraConfig(target_modules=["linear"], lora_bias=True))
        weight = base.linear.weight.clone()
        with pytest.raises(ValueError, match=r"adapters \['default'\] have lora_bias=True, but the base"):
            model.merge_adapter()
        assert not base.linear.merged and torch.equal(base.linear.weight, weight)

    def test_an_unknown_adapter_is_named_with_those_that_exist(self):
        model = block("a")
        ids = torch.randint(0, 20, (1, 2))
        for call in (
            lambda: model.set_adapter("b"),
            lambda: model.delete_adapter("b"),
            lambda: model.merge_adapter(["b"]),
            lambda: model(ids, adapter_names=["b"]),
            lambda: model(ids, adapter_names=[[3, "b"]]),
        ):
            with pytest.raises(ValueError, match=r"b.*\['a'\]"):
                call()

    def test_adapter_names_must_be_one_a_row(self):
        model = block("a")
        with pytest.raises(ValueError, match="3 names; the batch has 2 rows"):
            model(torch.randint(0, 20, (2, 3)), adapter_names=["a"] * 3)
        with pytest.raises(ValueError, match="has 4 names; it must have one a row, and a layer saw 6 rows"):
            model(ids=torch.randint(0, 20, (2, 3)), adapter_names=["a"] * 4)

    @pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
    @pytest.mark.parametrize(
        "compute",
        [
            lambda layer: prune.l1_unstructured(layer, "weight", 0.4),
            nn.utils.weight_norm,
            nn.utils.parametrizations.weight_norm,
        ],
    )
    @pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
    def test_a_weight_that_is_computed_is_not_merged_into(self, compute, merge):
        base, ids = tiny.make(), tiny.inputs()["input_ids"]
        compute(base.model.layers[1].mlp.down_proj)
        model = fp.get_peft_model(base, fp.LoraConfig(target_modules="all-linear", init_lora_weights=False)).eval()
        expected = model(ids).logits
        with pytest.raises(ValueError, match=r"the weight of a .*Linear of shape \(32, 64\) is computed"):
            getattr(model, merge)()
        assert torch.equal(model(ids).logits, expected)

    def test_an_adapter_that_starts_from_the_base_is_refused_while_others_are_merged(self):
        model = block("a")
        model.merge_adapter()
        with pytest.raises(ValueError, match=r"\['a'\] are merged"):
            model.add_adapter("b", fp.LoraConfig(target_modules=["linear"], use_dora=True))
        model.unmerge_adapter()
        model.add_adapter("b", fp.LoraConfig(target_modules=["linear"], use_dora=True))
        assert list(model.peft_config) == ["a", "b"]

    def test_a_dtype_is_for_dequantizing(self):
        with pytest.raises(ValueError, match="it is for dequantize=True"):
            block("a").merge_and_unload(dtype=torch.bfloat16)

    @pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64, "half precision"])
    def test_a_dtype_that_no_model_can_have_loses_nothing(self, dtype):
        model, message = block("a"), r"dtype is .*; it must be a floating-point torch.dtype or its name"
        with tiny.unchanged(model), pytest.raises(ValueError, match=message):
            model.merge_and_unload(dequantize=True, dtype=dtype)

    @pytest.mark.parametrize("name", ["a", "__base__", []])
    def test_rows_cannot_choose_while_adapters_are_merged(self, name):
        model = block("a")
        model.merge_adapter()
        with pytest.raises(ValueError, match="merged"):
            model(torch.randint(0, 20, (1, 3)), adapter_names=[name])

    def test_an_adapter_that_fails_half_way_leaves_nothing_behind(self):
        base, config = Block(), fp.LoraConfig(r=30, target_modules=["linear", "packed"], init_lora_weights="olora")
        with tiny.unchanged(base), pytest.raises(ValueError, match="at most 24"):
            fp.get_peft_model(base, config)
        assert not any("lora" in name for name, _ in base.named_modules())
        model = block("a")
        with tiny.unchanged(model), pytest.raises(ValueError, match="modules_to_save"):
            model.add_adapter("b", fp.LoraConfig(target_modules=["linear"], modules_to_save=["nothing"]))
        assert list(model.peft_config) == ["a"]

    def test_scaling_is_alpha_over_rank_or_over_its_root(self):
        model = block(r=4, lora_alpha=6)
        assert model.get_base_model().linear.scaling["default"] == 1.5
        model = block(r=4, lora_alpha=6, use_rslora=True)
        assert model.get_base_model().linear.scaling["default"] == 6 / math.sqrt(4)


@pytest.mark.parametrize(
    "config",
    [fp.LoraConfig, partial(fp.LoraConfig, lora_bias=True), partial(fp.LoraConfig, use_dora=True), fp.BottleneckConfig],
)
def test_rows_choose_adapters_in_a_layer_that_sees_no_tokens(config):
    model = fp.get_peft_model(nn.Sequential(nn.Flatten(0, 1), nn.Linear(8, 4)), config(target_modules=["1"]), "a")
    model.add_adapter("b", config(target_modules=["1"]))
    y = model(torch.empty(2, 0, 8, requires_grad=True), adapter_names=["a", "b"])
    y.sum().backward()
    assert y.shape == (0, 4)


def test_rows_choose_among_copies_of_a_module_that_returns_an_output_of_transformers():
    base, batch = tiny.make("bert"), tiny.inputs()
    model = fp.get_peft_model(base, fp.LoraConfig(target_modules=["pooler.dense"], modules_to_save=["encoder"])).eval()
    tiny.randomize(model)
    names = ["default", "__base__", "default"]
    with torch.no_grad():
        mine = model(batch["input_ids"]).logits
        with model.disable_adapter():
            theirs = model(batch["input_ids"]).logits
        out = model(batch["input_ids"], adapter_names=names).logits
    expected = torch.stack([(mine if name == "default" else theirs)[i] for i, name in enumerate(names)])
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [list, tuple, lambda parts: dict(zip("ab", parts, strict=True))])
def test_rows_choose_among_copies_of_a_module_that_returns_several_things(kind):
    class Neck(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 6)

        def forward(self, x):
            return kind(self.linear(x).chunk(2, -1))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.neck = nn.Linear(4, 4), Neck()

        def forward(self, x):
            parts = self.neck(self.first(x))
            return torch.cat([*(parts.values() if isinstance(parts, dict) else parts)], -1)

    model = fp.get_peft_model(Model(), fp.LoraConfig(target_modules=["first"], modules_to_save=["neck"])).eval()
    tiny.randomize(model)
    x = torch.randn(2, 4)
    mine, out = model(x), model(x, adapter_names=["default", "__base__"])
    with model.disable_adapter():
        theirs = model(x)
    assert not torch.allclose(mine, theirs, atol=1e-3)
    torch.testing.assert_close(out, torch.stack([mine[0], theirs[1]]))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_rows_that_choose_copies_of_a_module_that_writes_into_the_cache_do_without_it(kind):
    block = {"llama": "layers.1", "gpt2": "h.1"}[kind]
    model = fp.get_peft_model(tiny.make(kind), fp.LoraConfig(modules_to_save=[block])).eval()
    tiny.randomize(model)
    prompt = {"input_ids": tiny.inputs()["input_ids"], "max_new_tokens": 5, "do_sample": False, "use_cache": False}
    prompt["eos_token_id"] = -1
    names = ["default", "__base__", "default"]
    mine = model.generate(**prompt)
    with model.disable_adapter():
        theirs = model.generate(**prompt)
    out = model.generate(**prompt, adapter_names=names)
    assert all(torch.equal(out[i], (mine if name == "default" else theirs)[i]) for i, name in enumerate(names))
    with pytest.raises(ValueError, match=r"adapter_names has \['default'\].*writes into the cache.*use_cache=False"):
        model.generate(**prompt | {"use_cache": True}, adapter_names=names)
    assert torch.equal(model.generate(**prompt | {"use_cache": True}), mine)
