"""Soft prompts: what PEFT computes, with none of what it breaks on; any mix of methods in a batch."""

from __future__ import annotations

import copy
import inspect
import json
import math
import re
import textwrap
import threading
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import architectures as tiny
import peft
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
import transformers as tf
from safetensors.torch import load_file
from tiny import tiny_llama, tiny_tokenizer
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from transformers import DynamicCache, StaticCache

import pyfastpeft as fp
from pyfastpeft.hub.peft import OWN_NAME
from pyfastpeft.integrations import attention
from pyfastpeft.integrations.soft_prompts import prefixes
from pyfastpeft.integrations.soft_prompts.bare import reaching
from pyfastpeft.nn.prompt_encoder import LstmEncoder

CAUSAL = ["llama", "qwen2", "qwen3", "mistral", "gemma", "phi", "gpt2", "opt"]
P = 5
_SHARED = {"num_virtual_tokens": P, "task_type": "CAUSAL_LM"}
_CONFIGS = {
    "prompt": ("PromptTuningConfig", {}),
    "ptuning": ("PromptEncoderConfig", {"encoder_hidden_size": 16}),
    "ptuning_lstm": ("PromptEncoderConfig", {"encoder_hidden_size": 16, "encoder_reparameterization_type": "LSTM"}),
    "prefix": ("PrefixTuningConfig", {}),
    "prefix_projection": ("PrefixTuningConfig", {"prefix_projection": True, "encoder_hidden_size": 16}),
}
PEFT_HAS = list(_CONFIGS)
OURS = {
    "deep": lambda: fp.DeepPromptConfig(**_SHARED),
    "deep_prefix": lambda: fp.DeepPromptConfig(**_SHARED, prefix=True),
}
METHODS = [*PEFT_HAS, *OURS]
GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": -1}
WITH_SCORES = GREEDY | tiny.WITH_SCORES

_WINDOW = tiny._LLAMA | {"sliding_window": 6}
OTHERS = {
    "capped scores, window": lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**_WINDOW, head_dim=8)),
    "scaled embedding, window": lambda: tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**_WINDOW, head_dim=8)),
    "window in some layers": lambda: tf.Qwen2ForCausalLM(
        tf.Qwen2Config(**_WINDOW, use_sliding_window=True, max_window_layers=1)
    ),
    "sinks, experts": lambda: tf.GptOssForCausalLM(
        tf.GptOssConfig(**_WINDOW, head_dim=8, num_local_experts=2, num_experts_per_tok=1)
    ),
    "one projection": lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**tiny._LLAMA)),
    "no rotation in some layers": lambda: tf.SmolLM3ForCausalLM(tf.SmolLM3Config(**tiny._LLAMA)),
    "keys of other layers": lambda: tf.Gemma3nForCausalLM(
        tf.Gemma3nTextConfig(
            **_WINDOW | {"num_hidden_layers": 4, "intermediate_size": [64] * 4},
            head_dim=8,
            vocab_size_per_layer_input=tiny.VOCAB,
            hidden_size_per_layer_input=4,
            layer_types=["sliding_attention", "full_attention"] * 2,
            num_kv_shared_layers=2,
            laurel_rank=4,
            activation_sparsity_pattern=[0.0] * 4,
        )
    ),
    "positions from 2 on": lambda: tf.RobertaForCausalLM(
        tf.RobertaConfig(**tiny._BERT, is_decoder=True, hidden_dropout_prob=0, attention_probs_dropout_prob=0)
    ),
    "its own decoder, head and all": lambda: tf.Llama4ForCausalLM(
        tf.Llama4TextConfig(**tiny._LLAMA, head_dim=8, num_local_experts=2, intermediate_size_mlp=48)
    ),
    "could have a state": lambda: tf.GraniteMoeHybridForCausalLM(
        tf.GraniteMoeHybridConfig(
            **tiny._LLAMA,
            layer_types=["attention"] * 2,
            position_embedding_type="rope",
            shared_intermediate_size=64,
            num_local_experts=0,
            mamba_n_heads=4,
            mamba_d_head=16,
        )
    ),
    "scales in place": lambda: tf.CTRLLMHeadModel(
        tf.CTRLConfig(
            vocab_size=tiny.VOCAB, n_embd=32, n_layer=2, n_head=4, dff=64, n_positions=64, resid_pdrop=0, embd_pdrop=0
        )
    ),
}


def narrow_opt() -> torch.nn.Module:
    """An embedding narrower than the layers, as in OPT-350m."""
    sizes = {"vocab_size": 320, "word_embed_proj_dim": 16, "do_layer_norm_before": False}
    return tf.OPTForCausalLM(tf.OPTConfig(**tiny._OPT | sizes))


def config(library, method: str, **kwargs):
    if method in OURS:
        return OURS[method]()
    name, own = _CONFIGS[method]
    if library is fp and method == "prefix":
        own = own | {"prefix_init": "random"}
    return getattr(library, name)(**_SHARED | own | kwargs)


class Elsewhere(torch.Tensor):
    """As on a GPU, which whoever looks at a value waits for."""

    is_cpu = False

    def __bool__(self) -> bool:
        raise AssertionError("this waits for a GPU")

    __int__ = __index__ = item = __bool__


def ours(base, method: str, seed: int = 0, **kwargs) -> fp.PeftModel:
    torch.manual_seed(seed)
    return fp.get_peft_model(copy.deepcopy(base), config(fp, method, **kwargs))


def pair(base, method: str):
    """The same model with PEFT's adapter and with ours, from one seed."""
    torch.manual_seed(0)
    theirs = peft.get_peft_model(copy.deepcopy(base), config(peft, method))
    own = ours(base, method)
    for a, b in zip(theirs.prompt_encoder.parameters(), own.prompt_encoder.parameters(), strict=True):
        assert torch.equal(a, b)
    return theirs, own


def close(a, b, tol: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=tol)


def close_each(got, expected, tol: float = 1e-5) -> None:
    """To ``tol`` of the largest value of each tensor."""
    for a, b in zip(got, expected, strict=True):
        close(a, b, tol * float(b.abs().max()))


def checkpoint_layers(model, **kwargs) -> None:
    """As people do without transformers' gradient_checkpointing_enable."""
    wrapper = partial(checkpoint_wrapper, **kwargs)
    apply_activation_checkpointing(model, wrapper, check_fn=lambda m: type(m).__name__.endswith(("Layer", "Block")))


def of_text(logits, ids):
    """PEFT's logits hold virtual tokens where the prompt is one of the embeddings."""
    return logits[:, logits.shape[1] - ids.shape[1] :]


def assert_same(theirs, own, x) -> None:
    """Logits and loss in both modes, and gradients."""
    for training in (False, True):
        a, b = theirs.train(training)(**x), own.train(training)(**x)
        close(of_text(a.logits, x["input_ids"]), b.logits)
        close(a.loss, b.loss)
    a.loss.backward()
    b.loss.backward()
    for p, q in zip(theirs.prompt_encoder.parameters(), own.prompt_encoder.parameters(), strict=True):
        close(q.grad, p.grad, 1e-4 * float(p.grad.abs().max()))


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def llama() -> torch.nn.Module:
    return tiny.make("llama")


def qwen2_audio() -> torch.nn.Module:
    audio = {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16}
    audio |= {"model_type": "qwen2_audio_encoder", "num_mel_bins": 8, "max_source_positions": 8}
    text = tiny._LLAMA | {"model_type": "qwen2"}
    shape = tf.Qwen2AudioConfig(text_config=text, audio_config=audio, audio_token_index=63)
    return tf.Qwen2AudioForConditionalGeneration(shape).eval()


def got_ocr2() -> torch.nn.Module:
    vision = {"hidden_size": 16, "output_channels": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_dim": 16}
    vision |= {"image_size": 32, "patch_size": 4, "window_size": 2, "global_attn_indexes": [1]}
    text = tiny._LLAMA | {"model_type": "qwen2"}
    shape = tf.GotOcr2Config(text_config=text, vision_config=vision, image_token_id=63)
    return tiny.vary_vectors(tf.GotOcr2ForConditionalGeneration(shape)).eval()


def hunyuan_vl(sections: tuple[int, ...] = (1, 1, 1, 1)) -> torch.nn.Module:
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 16, "patch_size": 4, "out_hidden_size": 32, "text_hidden_size": 32}
    vision |= {"spatial_merge_size": 2, "max_image_size": 16, "min_image_size": 16, "img_max_token_num": 16}
    rope = {"rope_type": "default", "rope_theta": 100.0, "mrope_section": list(sections)}
    text = tiny._LLAMA | {"head_dim": 2 * sum(sections), "rope_parameters": rope}
    ids = {"image_token_id": 63, "im_start_id": 60, "im_end_id": 61, "im_newline_id": 62}
    shape = tf.HunYuanVLConfig(text_config=text, vision_config=vision, **ids)
    return tiny.vary_vectors(tf.HunYuanVLForConditionalGeneration(shape)).eval()


def granite_speech() -> torch.nn.Module:
    encoder = {"input_dim": 8, "hidden_dim": 24, "num_layers": 1, "num_heads": 2, "dim_head": 8, "output_dim": 6}
    encoder |= {"context_size": 10, "max_pos_emb": 16, "feedforward_mult": 2, "conv_kernel_size": 3}
    projector = {"model_type": "blip_2_qformer", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    projector |= {"intermediate_size": 16, "encoder_hidden_size": 24}
    shape = tf.GraniteSpeechConfig(
        text_config=tiny._LLAMA | {"model_type": "granite", "embedding_multiplier": 3.0},
        encoder_config=encoder,
        projector_config=projector,
        audio_token_index=63,
        downsample_rate=5,
        window_size=15,
        has_lora_adapter=False,
    )
    return tiny.vary_vectors(tf.GraniteSpeechForConditionalGeneration(shape)).eval()


def padded(ids: torch.Tensor, *starts: int) -> dict[str, torch.Tensor]:
    """Rows whose texts begin at ``starts``."""
    mask = (torch.arange(ids.shape[1]) >= torch.tensor(starts)[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask}


def assert_as_unpadded(own, given, **options) -> None:
    """Each row of ``given``, padded on the left, has the logits and the answer that it has alone."""
    ids, starts = given["input_ids"], (given["attention_mask"] == 0).sum(1).tolist()
    logits, answers = own(**given).logits, own.generate(**given, **WITH_SCORES, **options)
    for i, start in enumerate(starts):
        row = {k: t[i : i + 1, start:] if t.shape == ids.shape else t[i : i + 1] for k, t in given.items()}
        del row["attention_mask"]
        close(logits[i : i + 1, start:], own(**row).logits)
        tiny.assert_same_answers(answers, own.generate(**row, **WITH_SCORES, **options), slice(i, i + 1))


def is_what_tokens_make(base, method):
    """A soft prompt with what the model makes of some tokens is these tokens in front of the text."""
    tokens, ids = torch.arange(P), torch.arange(4, 13)[None]
    own = ours(base, method)
    prefixes = own.base_model.tuner_of("default").prefixes
    made = {"prompt": base.get_input_embeddings(), "prefix": prefixes.keys_values, "deep": prefixes.layer_inputs}
    with torch.no_grad():
        own.prompt_encoder["default"].embedding.weight.copy_(made[method](tokens))
        expected = base(torch.cat([tokens[None], ids], 1)).logits[:, P:]
    close(own(ids).logits, expected)


class TestAgainstPeft:
    @pytest.mark.parametrize("architecture", CAUSAL)
    @pytest.mark.parametrize("method", PEFT_HAS)
    def test_logits_loss_and_gradients(self, architecture, method):
        base = tiny.make(architecture)
        theirs, own = pair(base, method)
        assert_same(theirs, own, tiny.inputs(architecture))
        assert {n for n, p in own.named_parameters() if p.requires_grad} == {
            n for n, p in theirs.named_parameters() if p.requires_grad
        }

    @pytest.mark.parametrize("architecture", CAUSAL)
    @pytest.mark.parametrize("method", PEFT_HAS)
    def test_twenty_steps_have_the_same_losses(self, architecture, method):
        batches = [tiny.inputs(architecture) for _ in range(4)]
        models = pair(tiny.make(architecture), method)
        theirs, own = (tiny.loss_curve(model.train(), *batches) for model in models)
        close(own, theirs, 1e-4)

    @pytest.mark.parametrize("method", PEFT_HAS)
    def test_a_sliding_window_counts_virtual_tokens_as_peft_does(self, method):
        base = tf.MistralForCausalLM(tf.MistralConfig(**tiny._LLAMA, sliding_window=6)).eval()
        theirs, own = pair(base, method)
        assert_same(theirs, own, tiny.inputs(length=9))

    @pytest.mark.parametrize("method", ["prompt", "prefix"])
    @pytest.mark.parametrize("kind", OTHERS)
    def test_other_architectures(self, kind, method):
        theirs, own = pair(OTHERS[kind]().eval(), method)
        x = tiny.inputs(length=9)
        assert_same(theirs, own, x)
        own.eval()
        ids = x["input_ids"]
        tiny.assert_same_answers(*(own.generate(ids, **WITH_SCORES, use_cache=c) for c in (True, False)))

    def test_layers_that_are_called_attention_as_well(self):
        sizes = tiny._LLAMA | {"eos_token_id": 1, "bos_token_id": 2}
        base = tf.MllamaForCausalLM(tf.MllamaTextConfig(**sizes, cross_attention_layers=[])).eval()
        assert_same(*pair(base, "prefix"), tiny.inputs(length=9))
        own, ids = ours(base, "prompt"), tiny.inputs(length=9)["input_ids"]  # PEFT takes the head for the embedding
        vectors = own.prompt_encoder["default"]().expand(3, -1, -1)
        text = base.get_input_embeddings()(ids)
        close(own(ids).logits, base(inputs_embeds=torch.cat([vectors, text], 1)).logits[:, P:])

    def test_positions_of_an_embedding_beside_that_of_the_tokens(self):
        text = {"vocab_size": tiny.VOCAB, "embed_dim": 32, "layers": 2, "attention_heads": 4, "ffn_dim": 48}
        vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        vision |= {"head_dim": 8, "patch_embed_hidden_size": 48, "max_num_patches": 16}
        base = tf.Kosmos2_5ForConditionalGeneration(tf.Kosmos2_5Config(text_config=text, vision_config=vision)).eval()
        own, ids = ours(base, "prompt"), torch.randint(2, tiny.VOCAB, (3, 9))
        vectors = own.prompt_encoder["default"]().expand(3, -1, -1)
        text = base.get_input_embeddings()(ids)
        close(own(ids).logits, base(inputs_embeds=torch.cat([vectors, text], 1)).logits[:, P:])

    @pytest.mark.parametrize("method", PEFT_HAS)
    def test_generation(self, method):
        theirs, own = pair(llama(), method)
        ids = expected = tiny.inputs()["input_ids"]
        for _ in range(6):  # its generate() differs from its forward() in this version
            following = theirs.eval()(input_ids=expected).logits[:, -1].argmax(-1, keepdim=True)
            expected = torch.cat([expected, following], 1)
        got = own.eval().generate(ids, **GREEDY)
        assert torch.equal(got, expected)

    @pytest.mark.parametrize("method", PEFT_HAS)
    def test_a_forward_that_leaves_after_the_first_layer(self, method):
        theirs, own = pair(llama(), method)
        ids, short = tiny.inputs()["input_ids"], {"input_ids": tiny.inputs(length=1)["input_ids"], "use_cache": True}
        for model in (theirs.eval(), own.eval()):
            model.config.num_hidden_layers = 1
        with torch.no_grad():
            close(own(ids).logits, of_text(theirs(ids).logits, ids))
            close(own(**short).logits, theirs(**short).logits[:, -1:])

    @pytest.mark.parametrize("method", PEFT_HAS)
    @pytest.mark.parametrize("labels", ["all", "none of the first", "some"])
    def test_the_first_label_trains_what_the_prompt_says_next(self, method, labels):
        theirs, own = pair(llama(), method)
        x = tiny.inputs()
        x["labels"] = x["labels"].clone()
        if labels != "all":
            x["labels"][1 if labels == "some" else slice(None), 0] = -100
        a, b = theirs.train()(**x), own.train()(**x)
        close(a.loss, b.loss)
        assert b.logits.shape[:2] == x["input_ids"].shape
        assert own(**x, return_dict=False)[0].item() == pytest.approx(b.loss.item())

    @pytest.mark.parametrize("method", METHODS)
    def test_labels_that_go_on_from_a_cache_or_are_shifted_are_predicted_by_the_text(self, method):
        own, ids = ours(llama(), method).eval(), tiny.inputs(length=9)["input_ids"]
        with torch.no_grad():
            start = own(ids[:, :5], use_cache=True, labels=ids[:, :5])
            rest = own(ids[:, 5:], past_key_values=start.past_key_values, labels=ids[:, 5:])
            shifted = own(ids, labels=ids, shift_labels=ids.roll(-1, 1))
        close(rest.loss, F.cross_entropy(rest.logits[:, :-1].flatten(0, 1), ids[:, 6:].flatten()))
        close(shifted.loss, F.cross_entropy(shifted.logits.flatten(0, 1), ids.roll(-1, 1).flatten()))

    @pytest.mark.parametrize("method", ["prompt", "ptuning"])
    @pytest.mark.parametrize("base", [qwen2_audio, granite_speech])
    def test_a_loss_that_picks_its_logits_by_the_mask(self, base, method):
        theirs, own = pair(base(), method)
        x = {k: v.clamp(max=60) for k, v in tiny.inputs().items()}
        x["attention_mask"] = torch.ones_like(x["input_ids"])
        x["attention_mask"][0, 4:] = 0
        assert_same(theirs, own, x)
        x["labels"] = x["labels"].masked_fill(torch.arange(6) == 0, -100)
        assert_same(theirs, own, x)
        del x["attention_mask"]
        x["labels"] = x["input_ids"]
        assert_same(theirs, own, x)
        x["attention_mask"] = torch.ones_like(x["input_ids"])
        x["attention_mask"][0, :2] = 0
        rows = [x["input_ids"][:1, 2:], x["input_ids"][1:]]
        total = sum(row.numel() * own(row, labels=row).loss for row in rows)
        close(own(**x).loss, total / sum(row.numel() for row in rows))

    @pytest.mark.parametrize("first", [-100, 3])
    def test_labels_on_a_device_are_not_looked_at(self, first):
        own, x = ours(llama(), "prompt").train(), tiny.inputs()
        x["labels"] = x["labels"].clone()
        x["labels"][:, 0] = first
        found = []
        for labels in (x["labels"], x["labels"].as_subclass(Elsewhere)):
            own.zero_grad()
            loss = own(**x | {"labels": labels}).loss
            loss.backward()
            found.append([loss, *(p.grad for p in own.prompt_encoder.parameters())])
        for mine, expected in zip(*found, strict=True):
            close(mine, expected.as_subclass(torch.Tensor))

    @pytest.mark.parametrize("init", ["RANDOM", "TEXT", "SAMPLE_VOCAB"])
    def test_first_values_of_a_prompt(self, init, tmp_path):
        tiny_tokenizer().save_pretrained(tmp_path)
        kwargs = {"prompt_tuning_init": init}
        if init == "TEXT":
            kwargs |= {"prompt_tuning_init_text": "abc", "tokenizer_name_or_path": tmp_path}
            assert fp.PromptTuningConfig(**_SHARED, **kwargs).to_dict()["tokenizer_name_or_path"] == str(tmp_path)
        base = tiny_llama()
        torch.manual_seed(0)
        theirs = peft.get_peft_model(copy.deepcopy(base), peft.PromptTuningConfig(**_SHARED, **kwargs))
        torch.manual_seed(0)
        own = fp.get_peft_model(copy.deepcopy(base), fp.PromptTuningConfig(**_SHARED, **kwargs))
        assert torch.equal(
            own.prompt_encoder["default"].embedding.weight, theirs.prompt_encoder["default"].embedding.weight
        )

    def test_a_prompt_starts_from_the_base_models_embeddings(self):
        lora = fp.LoraConfig(target_modules=["embed_tokens"], lora_dropout=0.5, init_lora_weights=False)
        base, init = llama(), {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "a"}
        init |= {"tokenizer_name_or_path": lambda _: {"input_ids": list(range(3, 3 + P))}}
        model = fp.get_peft_model(base, lora, "lora").train()
        model.add_adapter("prompt", config(fp, "prompt", **init))
        embedding = base.get_input_embeddings().base_layer
        assert torch.equal(model.prompt_encoder["prompt"].embedding.weight, embedding.weight[3 : 3 + P])

    @pytest.mark.parametrize("projection", [False, True])
    def test_a_zero_prefix(self, projection):
        theirs, own = (
            library.get_peft_model(
                llama(), library.PrefixTuningConfig(**_SHARED, prefix_projection=projection, init_weights="zero")
            )
            for library in (peft, fp)
        )
        for model in (theirs, own):
            assert not model.prompt_encoder["default"].eval()(*[torch.arange(P)] * (model is theirs)).any()

    def test_a_prefix_starts_from_what_the_model_makes_of_some_tokens(self):
        base = llama()
        drawn = ours(base, "prefix", prefix_init=None).prompt_encoder["default"].embedding.weight.view(P, 2, 2, 16)
        first = base.model.layers[0]
        values = first.self_attn.v_proj(first.input_layernorm(base.model.embed_tokens.weight))
        distances = (drawn[:, 0, 1, None] - values).abs().amax(-1)
        close(distances.min(1).values, torch.zeros(P))

    @pytest.mark.parametrize("kind", [fp.PrefixTuningConfig, fp.DeepPromptConfig])
    def test_a_prefix_starts_from_zero_on_request(self, kind):
        own = fp.get_peft_model(llama(), kind(**_SHARED, prefix_init="zero"))
        assert not own.prompt_encoder["default"].embedding.weight.any()

    @pytest.mark.parametrize("method", ["prompt", "ptuning", "ptuning_lstm"])
    def test_virtual_tokens_run_once_for_the_whole_batch(self, method):
        own, x, seen = ours(llama(), method).train(), tiny.inputs(), []
        layer = own.get_base_model().model.layers[0]
        layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[:2]))
        own(**x).loss.backward()
        assert seen == [(1, P), (3, 6)]

    @pytest.mark.parametrize("method", METHODS)
    def test_a_batch_holds_its_prefix_once(self, method, monkeypatch):
        own, ids, sizes = ours(llama(), method).eval(), tiny.inputs()["input_ids"][:1], []
        computed = attention.prefix_attention

        def noted(q, k, v, prefix_k, prefix_v, **kwargs):
            if prefix_k is not None:
                assert k.shape[2] == ids.shape[1]
                sizes.append([t.untyped_storage().nbytes() for t in (prefix_k, prefix_v)])
            return computed(q, k, v, prefix_k, prefix_v, **kwargs)

        monkeypatch.setattr(attention, "prefix_attention", noted)
        for rows in (1, 8):
            cache = own(ids.expand(rows, -1), use_cache=True).past_key_values
            assert all(layer.keys.shape[:3:2] == (rows, ids.shape[1]) for layer in cache.layers)
        half = len(sizes) // 2
        assert half and sizes[:half] == sizes[half:]

    def test_classification(self):
        base = tf.LlamaForSequenceClassification(tf.LlamaConfig(**tiny._LLAMA, num_labels=3)).eval()
        kwargs = {"num_virtual_tokens": P, "task_type": "SEQ_CLS"}
        torch.manual_seed(0)
        theirs = peft.get_peft_model(copy.deepcopy(base), peft.PromptTuningConfig(**kwargs))
        torch.manual_seed(0)
        own = fp.get_peft_model(copy.deepcopy(base), fp.PromptTuningConfig(**kwargs))
        x = {"input_ids": torch.randint(1, tiny.VOCAB, (3, 6)), "labels": torch.tensor([0, 1, 2])}
        a, b = theirs(**x), own(**x)
        close(a.logits, b.logits)
        b.loss.backward()
        assert own.base_model.model.score.modules_to_save["default"].weight.grad.any()


class TestFiles:
    @pytest.mark.parametrize("architecture", CAUSAL)
    @pytest.mark.parametrize("method", PEFT_HAS)
    def test_folders_load_in_both_directions(self, architecture, method, tmp_path):
        base = tiny.make(architecture)
        theirs, own = pair(base, method)
        for parameter in own.prompt_encoder.parameters():
            parameter.data.add_(torch.randn_like(parameter) / 10)
        ids = tiny.inputs(architecture)["input_ids"]
        own.save_pretrained(tmp_path / "own")
        theirs.save_pretrained(tmp_path / "theirs")
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # PEFT warns about keys it does not know
            read = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "own").eval()
        close(of_text(read(ids).logits, ids), own.eval()(ids).logits)
        close(
            fp.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "theirs")(ids).logits,
            of_text(theirs.eval()(ids).logits, ids),
        )
        close(fp.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "own")(ids).logits, own(ids).logits)
        held = {name: load_file(tmp_path / name / "adapter_model.safetensors") for name in ("own", "theirs")}
        assert {k: (t.shape, t.dtype) for k, t in held["own"].items()} == {
            k: (t.shape, t.dtype) for k, t in held["theirs"].items()
        }
        configs = [json.loads((tmp_path / n / "adapter_config.json").read_text()) for n in ("own", "theirs")]
        assert configs[0].keys() == configs[1].keys()
        for c in configs:
            c.pop("auto_mapping")
        assert configs[0] == configs[1]

    @pytest.mark.parametrize("method", METHODS)
    def test_training_goes_on_after_a_reload(self, method, tmp_path):
        base = llama()
        x = tiny.inputs()

        def steps(model, n):
            model.train()
            optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
            for _ in range(n):
                model(**x).loss.backward()
                optimizer.step()
                optimizer.zero_grad()

        whole, first = ours(base, method), ours(base, method)
        steps(whole, 4)
        steps(first, 2)
        first.save_pretrained(tmp_path)
        second = fp.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True)
        assert second.get_nb_trainable_parameters() == whole.get_nb_trainable_parameters()
        steps(second, 2)
        ids = x["input_ids"]
        close(second.eval()(ids).logits, whole.eval()(ids).logits)

    @pytest.mark.parametrize("method", ["ptuning", "prefix_projection"])
    def test_without_the_encoder_the_virtual_tokens_train(self, method, tmp_path):
        theirs, _ = pair(llama(), method)
        theirs.save_pretrained(tmp_path)
        model = fp.PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
        assert [p.shape for p in model.parameters() if p.requires_grad] == [
            load_file(tmp_path / "adapter_model.safetensors")["prompt_embeddings"].shape
        ]
        model(**tiny.inputs()).loss.backward()
        assert model.prompt_encoder["default"].embedding.weight.grad.any()

    def test_an_encoder_of_another_adapter_is_refused(self, tmp_path):
        for name, seed in (("a", 0), ("b", 1)):
            ours(llama(), "ptuning", seed).save_pretrained(tmp_path / name)
        file = "pyfastpeft_encoder.safetensors"
        (tmp_path / "a" / file).write_bytes((tmp_path / "b" / file).read_bytes())
        with pytest.raises(ValueError, match="encoder beside the adapter does not belong to it"):
            fp.PeftModel.from_pretrained(llama(), tmp_path / "a", is_trainable=True)
        ours(llama(), "ptuning", encoder_hidden_size=5).save_pretrained(tmp_path / "b")
        (tmp_path / "a" / file).write_bytes((tmp_path / "b" / file).read_bytes())
        with pytest.raises(ValueError, match=rf"with {file}: encoder.mlp_head.0.bias has shape \(5,\)"):
            fp.PeftModel.from_pretrained(llama(), tmp_path / "a", is_trainable=True)
        fp.PeftModel.from_pretrained(llama(), tmp_path / "a")

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_an_encoder_that_is_not_finite_loads_as_it_was_saved(self, value, tmp_path):
        model = ours(llama(), "ptuning")
        with torch.no_grad():
            model.prompt_encoder["default"].mlp_head[-1].bias[3] = value
        model.save_pretrained(tmp_path)
        again = fp.PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
        vectors = again.prompt_encoder["default"]()
        torch.testing.assert_close(vectors, model.prompt_encoder["default"](), equal_nan=True)

    def test_saving_leaves_no_encoder_of_an_earlier_adapter(self, tmp_path):
        ours(llama(), "ptuning").save_pretrained(tmp_path)
        assert (tmp_path / "pyfastpeft_encoder.safetensors").exists()
        ours(llama(), "prompt").save_pretrained(tmp_path)
        assert not (tmp_path / "pyfastpeft_encoder.safetensors").exists()

    @pytest.mark.parametrize("method", ["ptuning", "ptuning_lstm", "prefix_projection"])
    def test_the_configuration_of_what_loads_without_its_encoder_makes_none(self, method, tmp_path):
        base = llama()
        theirs, _ = pair(base, method)
        theirs.save_pretrained(tmp_path)
        own = fp.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True)
        own.hotswap_adapter(tmp_path)
        held = own.peft_config["default"]
        for name, same in {"it": held, "copied": copy.deepcopy(held), "replaced": replace(held, revision="x")}.items():
            own.add_adapter(name, same)
            own.prompt_encoder[name].load_state_dict(own.prompt_encoder["default"].state_dict())
        own.save_pretrained(tmp_path / "again")
        x = tiny.inputs()
        expected = of_text(theirs.eval()(**x).logits, x["input_ids"])
        for name in ("", "it", "copied", "replaced"):
            again = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "again" / name)).eval()
            close(of_text(again(**x).logits, x["input_ids"]), expected)

    def test_a_prefix_is_bit_equal_in_layout(self, tmp_path):
        base = llama()
        theirs, own = pair(base, "prefix")
        e = own.prompt_encoder["default"].embedding.weight
        expected = theirs.get_prompt(1)
        own.export_prefix(tmp_path / "prefix.safetensors")
        held = load_file(tmp_path / "prefix.safetensors")
        for i, (k, v, *_) in enumerate(expected):
            assert torch.equal(held[f"layers.{i}.key"], k[0])
            assert torch.equal(held[f"layers.{i}.value"], v[0])
            heads = base.config.num_key_value_heads
            assert torch.equal(e.view(P, 2, 2, heads, -1)[:, i, 0].transpose(0, 1), k[0])

    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("architecture", ["llama", "gpt2"])
    def test_an_exported_prefix_serves_in_plain_transformers(self, method, architecture, tmp_path):
        base = tiny.make(architecture)
        own = ours(base, method).eval()
        own.export_prefix(tmp_path / "prefix.safetensors")
        ids = tiny.inputs(architecture, rows=2)["input_ids"]
        mask = torch.ones_like(ids)
        mask[0, :2] = 0
        recipe = re.search(r"::\n\n((?: {4}.+\n)+)", inspect.getdoc(fp.PeftModel.export_prefix))[1]
        names = {"torch": torch, "safetensors": safetensors, "DynamicCache": DynamicCache, "model": base, "batch": 2}
        names |= {"path": tmp_path / "prefix.safetensors", "input_ids": ids, "attention_mask": mask}
        exec(textwrap.dedent(recipe), names)
        expected = own(ids, attention_mask=mask).logits
        close(names["logits"][mask.bool()], expected[mask.bool()])

    def test_a_prompt_is_exported_with_the_lora_it_works_with(self, tmp_path):
        base = llama()
        own = ours(base, "prompt").eval()
        own.add_adapter("lora", fp.LoraConfig())
        tiny.randomize(own)
        own.export_prefix(tmp_path / "both", ["default", "lora"])
        own.export_prefix(tmp_path / "alone", "default")
        both, alone = load_file(tmp_path / "both"), load_file(tmp_path / "alone")
        assert torch.equal(both["layers.0.key"], alone["layers.0.key"])
        assert not torch.equal(both["layers.1.key"], alone["layers.1.key"])
        with pytest.raises(ValueError, match="none is a soft prompt"):
            own.export_prefix(tmp_path / "none", "lora")

    @pytest.mark.parametrize("method", METHODS)
    def test_state_dicts_go_out_and_in(self, method, tmp_path):
        a, b = ours(llama(), method, seed=1), ours(llama(), "prompt")
        state = fp.get_peft_model_state_dict(a)
        assert list(state) == ["prompt_embeddings"]
        if a.prompt_encoder["default"].encodes:
            with pytest.raises(ValueError, match=r"has an encoder .* its output alone; exchange model\.state_dict\(\)"):
                fp.set_peft_model_state_dict(a, state)
            a.save_pretrained(tmp_path)
            serves = fp.PeftModel.from_pretrained(llama(), tmp_path)
            with pytest.raises(ValueError, match="has no encoder that trains, what is loaded has one"):
                fp.set_peft_model_state_dict(serves, state | load_file(tmp_path / OWN_NAME))
            again = ours(llama(), method, seed=2)
            again.load_state_dict(a.state_dict())
            assert torch.equal(fp.get_peft_model_state_dict(again)["prompt_embeddings"], state["prompt_embeddings"])
        elif method == "prompt":
            fp.set_peft_model_state_dict(b, state)
            assert torch.equal(b.prompt_encoder["default"].embedding.weight, state["prompt_embeddings"])


class TestWherePeftFails:
    """Each of these raises or is wrong in PEFT."""

    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("kwargs", [{"cache_implementation": "static"}, {"use_cache": False}])
    def test_generate(self, method, kwargs):
        own = ours(llama(), method).eval()
        ids = tiny.inputs()["input_ids"]
        tiny.assert_same_answers(own.generate(ids, **WITH_SCORES, **kwargs), own.generate(ids, **WITH_SCORES))

    @pytest.mark.parametrize("method", ["prompt", "prefix", "deep", "deep_prefix"])
    @pytest.mark.parametrize("kwargs", [{}, {"num_beams": 3}, {"cache_implementation": "static", "num_beams": 2}])
    def test_a_prompt_that_is_a_text_generates_as_the_text_does(self, method, kwargs):
        base, tokenizer = tiny_llama().eval(), tiny_tokenizer()
        own = {"num_virtual_tokens": 6, "tokenizer_name_or_path": tokenizer}
        if method == "prompt":
            made = fp.PromptTuningConfig(**own, prompt_tuning_init="TEXT", prompt_tuning_init_text="a text")
            assert json.loads(json.dumps(made.to_dict()))["tokenizer_name_or_path"] == type(tokenizer).__name__
        elif method == "prefix":
            made = fp.PrefixTuningConfig(**own, prefix_init_text="a text")
        else:
            made = fp.DeepPromptConfig(**own, prefix_init_text="a text", prefix=method == "deep_prefix")
        text = torch.tensor(tokenizer("a text")["input_ids"]).expand(3, -1)
        ids = torch.randint(0, 256, (3, 5))
        expected = base.generate(torch.cat([text, ids], 1), **WITH_SCORES, **kwargs)
        got = fp.get_peft_model(base, made).eval().generate(ids, **WITH_SCORES, **kwargs)
        assert torch.equal(got.sequences[:, :5], ids) and got.sequences.shape == (3, 11)
        tiny.assert_same_answers(got, expected)

    @pytest.mark.parametrize("method", METHODS)
    def test_assisted_generation_is_greedy_generation(self, method):
        own, assistant = ours(llama(), method).eval(), llama()
        ids = tiny.inputs(rows=1)["input_ids"]
        assert torch.equal(own.generate(ids, **GREEDY, assistant_model=assistant), own.generate(ids, **GREEDY))

    @pytest.mark.parametrize("kind", ["llama", "mistral"])
    @pytest.mark.parametrize("method", METHODS)
    def test_generation_that_exits_early_to_guess_is_greedy_generation(self, method, kind):
        own, ids = ours(tiny.make(kind), method).eval(), tiny.inputs(rows=1)["input_ids"]
        got = own.generate(ids, **GREEDY, assistant_early_exit=1)
        assert torch.equal(got, own.generate(ids, **GREEDY))

    @pytest.mark.parametrize("method", METHODS)
    def test_sampling_draws_from_the_models_distribution(self, method):
        own = ours(llama(), method).eval()
        ids = tiny.inputs(rows=1)["input_ids"]
        p = own(ids).logits[0, -1].softmax(-1)
        drawn = own.generate(ids.expand(4000, -1), max_new_tokens=1, do_sample=True, top_k=0, eos_token_id=-1)[:, -1]
        assert (torch.bincount(drawn, minlength=tiny.VOCAB) / 4000 - p).abs().max() < 0.03

    @pytest.mark.parametrize("method", METHODS)
    def test_compiled(self, method):
        own = ours(llama(), method).eval()
        x = tiny.inputs()
        compiled = torch.compile(own, backend="eager")
        with torch.no_grad():
            close(compiled(**x).logits, own(**x).logits)
        close_each(self.gradients(compiled, x), self.gradients(own, x), 1e-4)

    @pytest.mark.parametrize(
        ("method", "rows", "broken"),
        [
            ("prefix_projection", "alike", False),
            ("deep_prefix", "alike", False),
            ("prefix", "mixed", False),
            ("prefix", "mixed", True),
        ],
    )
    def test_keys_and_values_are_compiled_along(self, method, rows, broken):
        own = ours(llama(), method).train()
        own.add_adapter("lora", fp.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
        tiny.randomize(own)
        x = tiny.inputs()
        if rows == "mixed":
            x["adapter_names"] = ["default", "lora", ["lora", "default"]]
        if broken:
            own.get_base_model().model.layers[1].register_forward_hook(torch.compiler.disable(lambda *_: None))
        compiled = torch.compile(own, fullgraph=not broken, backend="eager" if broken else "aot_eager")
        expected = own(**x)
        out = compiled(**x)
        close(out.logits, expected.logits)
        out.loss.backward()
        got = [p.grad.clone() for p in own.prompt_encoder.parameters()]
        close_each(got, self.gradients(own, x), 1e-4)
        if not broken:
            with torch.no_grad():
                close(compiled(**x).logits, expected.logits)

    @pytest.mark.parametrize("method", METHODS)
    def test_a_static_cache_in_forward(self, method):
        base = llama()
        own = ours(base, method).eval()
        ids = tiny.inputs()["input_ids"]
        cache = StaticCache(config=base.config, max_cache_len=16)
        first = own(ids[:, :4], past_key_values=cache, use_cache=True).logits
        second = own(ids[:, 4:], past_key_values=cache, use_cache=True).logits
        close(torch.cat([first, second], 1), own(ids).logits)

    @pytest.mark.parametrize("method", METHODS)
    @torch.no_grad()
    def test_the_length_of_a_static_cache_on_a_device_is_not_looked_at(self, method, monkeypatch):
        own, ids = ours(llama(), method).eval(), tiny.inputs()["input_ids"]
        length = tf.cache_utils.StaticLayer.get_seq_length

        def elsewhere(layer):
            found = length(layer)
            return found.as_subclass(Elsewhere) if isinstance(found, torch.Tensor) else found

        monkeypatch.setattr(tf.cache_utils.StaticLayer, "get_seq_length", elsewhere)
        worked_out = []
        work_out = prefixes.Prefixes._work_out
        monkeypatch.setattr(prefixes.Prefixes, "_work_out", lambda *given: worked_out.append(1) or work_out(*given))
        cache = StaticCache(config=own.config, max_cache_len=16)
        for _ in range(2):
            tokens = ids.as_subclass(Elsewhere).split((3, 1, 2), 1)
            parts = [own(t, past_key_values=cache, use_cache=True).logits for t in tokens]
            cache.reset()
            assert len(worked_out) == 2  # of what trains, once for every call but those of single tokens
            worked_out.clear()
            close(torch.cat(parts, 1).as_subclass(torch.Tensor), own(ids).logits)
            worked_out.clear()

    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("reentrant", [False, True])
    @pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
    def test_gradient_checkpointing(self, method, reentrant, architecture):
        own = ours(tiny.make(architecture), method).train()
        x = tiny.inputs(architecture)
        expected = self.gradients(own, x)
        own.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        close_each(self.gradients(own, x), expected)
        close_each(self.gradients(own, x), expected)

    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("reentrant", [False, True])
    def test_gradient_checkpointing_of_vectors(self, method, reentrant):
        """The embedding does not run inside the decoder, as where images stand among the tokens."""
        own, x = ours(llama(), method).train(), tiny.inputs()
        x["inputs_embeds"] = own.get_input_embeddings()(x.pop("input_ids")).detach().requires_grad_()
        expected = self.gradients(own, x)
        own.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        close_each(self.gradients(own, x), expected)

    @staticmethod
    def gradients(model, x):
        model.zero_grad()
        model(**x).loss.backward()
        return [p.grad.clone() for p in model.prompt_encoder.parameters()]

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_gradient_checkpointing_of_two_forwards_before_a_backward(self, reentrant):
        own = ours(llama(), "prefix").train()
        own.add_adapter("b", config(fp, "prompt"))
        x, y = tiny.inputs(), tiny.inputs()
        expected = []
        for on in (False, True):
            if on:
                own.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            own.set_adapter(["default", "b"])
            own.zero_grad()
            loss = own(**x, adapter_names=["default", "b", "__base__"]).loss + own(**y, adapter_names=["b"] * 3).loss
            loss.backward()
            expected.append([p.grad.clone() for p in own.prompt_encoder.parameters()])
        close_each(*expected)

    @pytest.mark.parametrize("reentrant", [False, True])
    @pytest.mark.parametrize("method", METHODS)
    def test_gradient_checkpointing_without_the_peft_model_around_it(self, method, reentrant):
        own, x = ours(llama(), method).train(), tiny.inputs()
        expected = self.gradients(own, x)
        own.zero_grad()
        own.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        loss = own.get_base_model()(**x).loss
        if method == "deep":
            with pytest.raises(RuntimeError, match="call the PeftModel"):
                loss.backward()
            return
        loss.backward()
        close_each([p.grad for p in own.prompt_encoder.parameters()], expected)

    @pytest.mark.parametrize("quantized", [False, True])
    @pytest.mark.parametrize("method", [method for method in METHODS if method != "deep"])
    @pytest.mark.parametrize("architecture", CAUSAL)
    def test_checkpoints_around_the_layers(self, architecture, method, quantized):
        base = tiny.make(architecture)
        own, x = ours(tiny.quantized(base) if quantized else base, method).train(), tiny.inputs(architecture)
        expected = self.gradients(own, x)
        checkpoint_layers(own)
        close_each(self.gradients(own, x), expected)

    def test_checkpoints_around_layers_that_cannot_run_again_say_so(self):
        own = ours(llama(), "deep").train()
        checkpoint_layers(own)
        loss = own(**tiny.inputs()).loss
        with pytest.raises(RuntimeError, match="put around a layer by itself knows no soft prompt"):
            loss.backward()
        own = ours(llama(), "prompt").train()
        checkpoint_layers(own, checkpoint_impl=CheckpointImpl.REENTRANT)
        with pytest.raises(RuntimeError, match="reentrant checkpoints keep no gradient of a prompt"):
            own(**tiny.inputs())

    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("architecture", CAUSAL)
    def test_a_left_padded_batch_equals_the_unpadded_rows(self, method, architecture):
        own = ours(tiny.make(architecture), method).eval()
        assert_as_unpadded(own, padded(torch.randint(1, tiny.VOCAB, (3, 7)), 0, 3, 6))

    @pytest.mark.parametrize("last", ["full", "sliding"])
    @pytest.mark.parametrize("images", [False, True])
    @pytest.mark.parametrize("method", ["prompt", "prefix", "deep"])
    def test_a_model_around_the_decoder_makes_the_masks(self, method, images, last):
        vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        base = tf.Gemma3ForConditionalGeneration(
            tf.Gemma3Config(
                text_config=_WINDOW | {"head_dim": 8, "layer_types": ["sliding_attention", f"{last}_attention"]},
                vision_config=vision | {"image_size": 8, "patch_size": 4},
                image_token_index=tiny.VOCAB - 1,
                mm_tokens_per_image=4,
            )
        )
        given = padded(tiny.inputs(length=9)["input_ids"], 0, 3, 6)
        if images:
            given["token_type_ids"] = torch.tensor([[0] * 6 + [1] * 2 + [0]]).expand(3, -1)
        assert_as_unpadded(ours(base.eval(), method), given)

    @pytest.mark.parametrize("kind", ["Fuyu", "Exaone4_5_", "Molmo2"])
    @pytest.mark.parametrize("method", ["prompt", "prefix", "deep"])
    def test_a_model_around_the_decoder_counts_padding(self, method, kind):
        """In the positions, or, as Molmo2, in a mask that is no longer that of the caller."""
        vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        parts = {
            "Fuyu": {
                "text_config": {"model_type": "persimmon", **tiny._LLAMA, "num_key_value_heads": 4},
                "patch_size": 2,
            },
            "Exaone4_5_": {
                "text_config": {"model_type": "exaone4", **tiny._LLAMA},
                "vision_config": {"hidden_size": 16, "out_hidden_size": 32, "depth": 1, "num_heads": 2},
            },
            "Molmo2": {
                "text_config": tiny._LLAMA | {"head_dim": 8, "additional_vocab_size": 4},
                "vit_config": vision | {"head_dim": 8, "image_default_input_size": [8, 8], "image_patch_size": 4},
            },
        }
        base = tf.AutoModelForImageTextToText.from_config(getattr(tf, f"{kind}Config")(**parts[kind]))
        assert_as_unpadded(ours(base.eval(), method), padded(torch.randint(3, 60, (3, 9)), 0, 3, 6))

    @pytest.mark.parametrize("method", ["prompt", "prefix", "deep"])
    def test_layers_may_have_different_numbers_of_query_heads(self, method):
        text = _WINDOW | {"head_dim": 8, "num_sliding_attention_heads": 8, "moe_intermediate_size": 16}
        vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
        whole = tf.Step3p7Config(
            text_config=text | {"layer_types": ["full_attention", "sliding_attention"]},
            vision_config=vision,
            image_token_id=tiny.VOCAB - 1,
        )
        is_what_tokens_make(tf.Step3p7ForConditionalGeneration(whole).eval(), method)

    @pytest.mark.parametrize("method", ["prompt", "prefix", "deep"])
    def test_a_decoder_may_have_fewer_layers_than_an_encoder_that_its_configuration_counts(self, method):
        """As distilled Whispers, of whose keys and values PEFT's files have those for the encoder's number."""
        sizes = {"d_model": 32, "encoder_layers": 3, "decoder_layers": 2, "encoder_attention_heads": 4}
        sizes |= {"decoder_attention_heads": 4, "decoder_ffn_dim": 48, "encoder_ffn_dim": 48, "pad_token_id": 0}
        base = tf.WhisperForCausalLM(tf.WhisperConfig(vocab_size=tiny.VOCAB, max_source_positions=6, **sizes)).eval()
        is_what_tokens_make(base, method)
        if method == "prefix":
            theirs, own = pair(base, method)
            ids = torch.arange(4, 13)[None]
            close(own(ids).logits, theirs(input_ids=ids).logits)

    @pytest.mark.parametrize("method", ["prompt", "prefix", "deep"])
    def test_a_model_around_opt_reaches_the_decoder_in_it(self, method):
        """BLIP-2's decoder is an OPT with its head, which does not call the model in it but the decoder in that."""
        part = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
        text = {"model_type": "opt", "vocab_size": tiny.VOCAB, "hidden_size": 32, "num_hidden_layers": 2}
        text |= {"ffn_dim": 48, "num_attention_heads": 2, "max_position_embeddings": 64, "word_embed_proj_dim": 32}
        image = tiny.VOCAB - 1
        whole = tf.Blip2Config(
            text_config=text,
            qformer_config=part | {"vocab_size": 96, "encoder_hidden_size": 32},
            vision_config=part | {"image_size": 16, "patch_size": 8},
            num_query_tokens=4,
            image_token_index=image,
        )
        base, seen = tf.Blip2ForConditionalGeneration(whole).eval(), []
        alone, own = ours(base.language_model, method).eval(), ours(base, method).eval()
        alone.prompt_encoder.load_state_dict(own.prompt_encoder.state_dict())
        inner = own.get_base_model().language_model
        inner.register_forward_pre_hook(lambda _, a, given: seen.append(given["inputs_embeds"]), with_kwargs=True)
        ids = torch.cat([torch.full((2, 4), image), torch.randint(2, image, (2, 5))], 1)
        got = own(input_ids=ids, pixel_values=torch.randn(2, 3, 16, 16)).logits
        close(got, alone(inputs_embeds=seen[-1]).logits)
        with alone.disable_adapter():
            assert not torch.allclose(got, alone(inputs_embeds=seen[-1]).logits, atol=1e-3)

    @pytest.mark.parametrize("base", [got_ocr2, granite_speech])
    @pytest.mark.parametrize("method", ["prompt", "ptuning", "prefix", "deep"])
    @torch.no_grad()
    def test_a_decoder_whose_attention_goes_through_the_interface_alone(self, base, method):
        """That of the images or sounds around it does not, and takes no prefix."""
        base, seen = base(), []
        own, alone = ours(base, method).eval(), ours(base.get_decoder(), method).eval()
        for parameter in own.prompt_encoder.parameters():
            parameter.data.add_(torch.randn_like(parameter))
        alone.prompt_encoder.load_state_dict(own.prompt_encoder.state_dict())
        inner = own.get_base_model().get_decoder()
        inner.register_forward_pre_hook(lambda _, a, given: seen.append(given["inputs_embeds"]), with_kwargs=True)
        ids = torch.cat([torch.randint(2, 60, (3, 6)), torch.full((3, 3), 63), torch.randint(2, 60, (3, 3))], 1)
        given = padded(ids, 0, 3, 5)
        if isinstance(base, tf.GotOcr2ForConditionalGeneration):
            ids[:, 9] = 63
            given["pixel_values"] = torch.randn(3, 3, 32, 32)
        else:
            given["input_features"] = torch.randn(3, 15, 8)
            given["input_features_mask"] = torch.ones(3, 3, dtype=torch.bool)
        out, mask = own(**given).logits, given["attention_mask"]
        close(out, base.get_output_embeddings()(alone(inputs_embeds=seen[-1], attention_mask=mask)[0]))
        with own.disable_adapter():
            assert not torch.allclose(own(**given).logits, out, atol=1e-3)
        assert_as_unpadded(own, given, suppress_tokens=[63])
        options = WITH_SCORES | {"suppress_tokens": [63]}
        tiny.assert_same_answers(*(own.generate(**given, **options, use_cache=c) for c in (True, False)))
        before = base.get_decoder().config._attn_implementation
        own.delete_adapter("default")
        assert inner.config._attn_implementation == before

    @pytest.mark.parametrize("method", ["prompt", "prefix"])
    @torch.no_grad()
    def test_parts_beside_the_decoder_keep_the_attention_that_was_chosen_for_them(self, method):
        """Gemma 4's encoder of sounds, which cuts masks in a way of its own, has no other than its eager one."""
        layers = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        heads = {"num_key_value_heads": 2, "head_dim": 8}
        text = layers | heads | {"global_head_dim": 8, "hidden_size_per_layer_input": 0, "vocab_size": tiny.VOCAB}
        sound = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "output_proj_dims": 32}
        kinds = ("image", "video", "audio", "boi", "eoi", "boa")
        whole = tf.Gemma4Config(
            text_config=text,
            vision_config=layers | heads,
            audio_config=sound,
            eoa_token_index=57,
            **{f"{kind}_token_id": 63 - i for i, kind in enumerate(kinds)},
        )
        base = tf.Gemma4ForConditionalGeneration(whole).eval()
        parts = [m for m in base.modules() if isinstance(m, tf.PreTrainedModel)]
        before = [part.config._attn_implementation for part in parts]
        assert {"sdpa", "eager"} == set(before)
        ids = torch.tensor([[2, 3, *[61] * 8, 4, 5]])
        given = {"input_ids": ids, "input_features": torch.randn(1, 32, 128)}
        given["input_features_mask"] = torch.ones(1, 32, dtype=torch.bool)
        plain, heard = base(**given).logits, []
        base.model.audio_tower.register_forward_hook(lambda *called: heard.append(called[2].last_hidden_state))
        own = ours(base, method).eval()
        assert not torch.allclose(own(**given).logits, plain, atol=1e-3)
        with own.disable_adapter():
            close(own(**given).logits, plain)
        assert torch.equal(*heard)
        held = [part.config._attn_implementation for part in parts]
        with attention.with_sdpa(base):  # for continuous batching
            assert [part.config._attn_implementation for part in parts] == before
        assert [part.config._attn_implementation for part in parts] == held
        own.delete_adapter("default")
        assert [part.config._attn_implementation for part in parts] == before
        close(own.unload()(**given).logits, plain)
        assert [part.config._attn_implementation for part in parts] == before

    @torch.no_grad()
    def test_images_whose_tokens_are_numbered_within_them(self):
        """HunYuan-VL's: the prompt is what the same vectors are as tokens in front of the text."""
        base, row = hunyuan_vl(), torch.cat([torch.randint(2, 60, (2,)), torch.full((8,), 63), torch.tensor([5, 9, 7])])
        own = ours(base, "prompt").eval()
        given = {"pixel_values": torch.randn(16, 48), "image_grid_thw": torch.tensor([[1, 4, 4]])}
        given["input_ids"] = torch.nn.functional.pad(row, (2, 0))[None]
        given["attention_mask"] = torch.tensor([[0] * 2 + [1] * len(row)])
        given["mm_token_type_ids"] = (given["input_ids"] == 63).int()
        tokens = torch.randint(2, 60, (P,))
        own.prompt_encoder["default"].embedding.weight.copy_(base.get_input_embeddings()(tokens))
        front = given | {"input_ids": torch.cat([tokens, row])[None]}
        front |= {"attention_mask": torch.ones_like(front["input_ids"])}
        front["mm_token_type_ids"] = (front["input_ids"] == 63).int()
        close(own(**given).logits[:, 2:], base(**front).logits[:, P:])
        options = GREEDY | {"suppress_tokens": [63]}
        got = own.generate(**given, **options)
        assert torch.equal(got[:, -6:], base.generate(**front, **options)[:, -6:])

    @pytest.mark.parametrize("method", METHODS)
    def test_training_on_left_padded_rows_equals_the_unpadded_ones(self, method):
        own = ours(llama(), method).train()
        rows = [torch.randint(1, tiny.VOCAB, (1, n)) for n in (7, 4, 2)]
        pad = torch.nn.functional.pad
        firsts = method == "prompt" or "ptuning" in method  # where the prompt says what comes first
        own.zero_grad()
        total, count = torch.zeros(()), 0
        for row in rows:
            n = row.shape[1] - 1 + firsts
            total, count = total + n * own(row, labels=row).loss, count + n
        (total / count).backward()
        expected = [p.grad.clone() for p in own.prompt_encoder.parameters()]
        width = [7 - row.shape[1] for row in rows]
        labels = [pad(row, (w, 0), value=-100) for row, w in zip(rows, width, strict=True)]
        if not firsts:
            for row, w in zip(labels, width, strict=True):
                row[:, w] = -100
        x = {
            "input_ids": torch.cat([pad(row, (w, 0)) for row, w in zip(rows, width, strict=True)]),
            "attention_mask": torch.cat([pad(torch.ones_like(r), (w, 0)) for r, w in zip(rows, width, strict=True)]),
            "labels": torch.cat(labels),
        }
        close_each(self.gradients(own, x), expected)


def mixed(base) -> fp.PeftModel:
    """A model with one adapter of each kind."""
    model = fp.get_peft_model(base, fp.LoraConfig(), adapter_name="lora")
    for method in METHODS:
        kwargs = {} if method in OURS else {"num_virtual_tokens": 3 + len(method) % 4}
        model.add_adapter(method, config(fp, method, **kwargs))
    model.add_adapter("bottleneck", fp.BottleneckConfig(reduction_factor=2))
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "bottleneck" in name:
            parameter.data.normal_(std=0.3)
    return model.eval()


ROWS = ["lora", "__base__", *METHODS, ["lora", "prefix"], ["prompt", "lora"], ["prefix", "deep"], "bottleneck"]
ROWS += [["bottleneck", "ptuning"]]


class TestRows:
    def alone(self, model, row, run):
        if row == "__base__":
            with model.disable_adapter():
                return run()
        model.set_adapter(row)
        return run()

    @pytest.mark.parametrize("architecture", ["llama", "gpt2"])
    def test_each_row_is_as_with_its_adapters_alone(self, architecture):
        model = mixed(tiny.make(architecture))
        ids = torch.randint(1, tiny.VOCAB, (len(ROWS), 6))
        got = model(ids, adapter_names=ROWS).logits
        for i, row in enumerate(ROWS):
            close(got[i : i + 1], self.alone(model, row, partial(model, ids[i : i + 1])).logits, 2e-5)

    @pytest.mark.parametrize("bits", [32, 4])
    def test_generate_also_padded_and_with_beams(self, bits):
        model = mixed(llama() if bits == 32 else tiny.quantized(llama()))
        ids = torch.randint(1, tiny.VOCAB, (len(ROWS), 6))
        mask = torch.ones_like(ids)
        for i in range(0, len(ROWS), 2):
            ids[i, :2], mask[i, :2] = 0, 0
        for kwargs in ({}, {"num_beams": 2}, {"cache_implementation": "static"}):
            kwargs |= WITH_SCORES
            got = model.generate(input_ids=ids, attention_mask=mask, adapter_names=ROWS, **kwargs)
            for i, row in enumerate(ROWS):
                own = ids[i : i + 1, (mask[i] == 0).sum() :]
                alone = self.alone(model, row, partial(model.generate, own, **kwargs))
                tiny.assert_same_answers(got, alone, slice(i, i + 1))

    def test_rows_choose_nothing_inside_disable_adapter(self):
        base, ids = tiny.make("llama").eval(), torch.randint(1, tiny.VOCAB, (len(ROWS), 6))
        plain, told = base(ids).logits, base.generate(ids, **GREEDY)
        model = mixed(base)
        chosen = model(ids, adapter_names=ROWS).logits
        with model.disable_adapter():
            with model.disable_adapter():
                close(model(ids, adapter_names=ROWS).logits, plain, 2e-5)
            close(model(ids, adapter_names=ROWS).logits, plain, 2e-5)
            assert torch.equal(model.generate(ids, adapter_names=ROWS, **GREEDY), told)
            with pytest.raises(ValueError, match=r"adapter_names has 1 names; the batch has"):
                model(ids, adapter_names=["lora"])
            with pytest.raises(ValueError, match=r"adapter_names holds \['no'\]"):
                model.generate(ids, adapter_names=["no"] * len(ids), **GREEDY)
        assert not torch.allclose(chosen, plain, atol=1e-2)
        close(model(ids, adapter_names=ROWS).logits, chosen, 2e-5)

    def test_a_mixed_batch_trains_each_adapter_on_its_own_rows(self):
        model = mixed(llama()).train()
        rows = ["lora", "prompt", ["lora", "prefix"], "prompt"]
        ids = torch.randint(1, tiny.VOCAB, (4, 6))
        labels = ids.clone()
        model.set_adapter(["lora", "prompt", "prefix"])
        summed = torch.zeros(())
        for i, row in enumerate(rows):
            logits = model(ids[i : i + 1], adapter_names=[row]).logits[:, :-1]
            summed = summed + torch.nn.functional.cross_entropy(logits[0], labels[i, 1:], reduction="sum")
        summed.backward()
        expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        logits = model(ids, adapter_names=rows).logits[:, :-1]
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum").backward()
        assert any("lora" in n for n in expected) and any("prompt_encoder.prompt." in n for n in expected)
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                close(parameter.grad, expected[name], 1e-4 * float(expected[name].abs().max()) + 1e-7)

    def test_the_first_label_is_for_rows_that_end_with_a_prompt(self):
        model = mixed(llama()).train()
        ids = torch.randint(1, tiny.VOCAB, (3, 6))
        rows = ["prompt", "prefix", "__base__"]
        loss = model(ids, labels=ids, adapter_names=rows).loss
        total, count = 0.0, 0
        for i, row in enumerate(rows):
            n = 6 if row == "prompt" else 5
            total += n * model(ids[i : i + 1], labels=ids[i : i + 1], adapter_names=[row]).loss
            count += n
        close(loss, total / count)

    def test_a_prefix_lies_where_its_layer_does(self, monkeypatch):
        """Layers of one model may be on several devices, which learn nothing of one another's."""
        model = mixed(llama())
        found = next(vars(m)["_prefix"].prefixes for m in model.modules() if "_prefix" in vars(m))
        homes = [torch.device("cpu"), torch.device("meta")]
        monkeypatch.setattr(prefixes, "_home", dict(zip(found.attentions, homes, strict=True)).__getitem__)
        rows = (("prefix",), ("lora",), ("deep_prefix", "prefix"), ("prefix_projection",))
        with torch.no_grad():
            run = found.run_of(rows, 8, False)
        assert run.shift.device == homes[0]
        for prefix, home in zip(run.layers, homes, strict=True):
            assert [t.device for t in prefix] == [home] * 4

    def test_threads_choose_apart_also_while_prompts_are_worked_out(self):
        choices = [["deep", "prompt"], ["__base__", "prefix"], None, [["lora", "deep"], "__base__"]]
        tiny.check_threads_choose_apart(mixed(llama()), choices)  # what trains is worked out in every forward

    def test_active_adapters_of_several_methods(self):
        model = mixed(llama())
        ids = tiny.inputs()["input_ids"]
        model.set_adapter(["lora", "prefix", "prompt"])
        close(model(ids).logits, model(ids, adapter_names=[["prompt", "prefix", "lora"]] * 3).logits)
        assert model.active_adapters == ["lora", "prefix", "prompt"]


class TestCalls:
    """What a caller may do differently."""

    def test_arguments_by_position(self):
        model = ours(llama(), "prompt").train()
        ids = torch.randint(1, tiny.VOCAB, (2, 9))
        mask = torch.ones_like(ids)
        mask[0, :4] = 0
        labels = ids.masked_fill(mask == 0, -100)
        expected = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        close(model(ids, mask, labels=labels).loss, expected)
        close(model(ids, mask, None, None, None, labels).loss, expected)

    def test_a_tuple_whose_logits_stand_behind_two_losses(self):
        base = tf.MixtralForCausalLM(tf.MixtralConfig(**tiny._LLAMA, num_local_experts=2)).eval()
        model, x = ours(base, "prompt"), tiny.inputs() | {"output_router_logits": True}
        expected = model(**x)
        loss, aux_loss, logits = model(**x, return_dict=False)[:3]
        assert loss == expected.loss and aux_loss == expected.aux_loss
        assert torch.equal(logits, expected.logits)

    @pytest.mark.parametrize("method", ["prompt", "prefix"])
    def test_hidden_tokens_inside_a_text_have_positions_as_in_peft(self, method):
        theirs, own = pair(llama(), method)
        ids = torch.randint(1, tiny.VOCAB, (2, 9))
        mask = torch.ones_like(ids)
        mask[:, 3:5] = 0
        with torch.no_grad():
            expected, got = theirs(ids, attention_mask=mask).logits[:, -9:], own(ids, attention_mask=mask).logits
        close(got[:, 5:], expected[:, 5:])

    @pytest.mark.parametrize("method", ["prompt", "prefix", "deep"])
    @pytest.mark.parametrize("base", [name for name in OTHERS if "window" in name])
    def test_packed_sequences_in_a_window_each_begin_with_the_prompt(self, base, method):
        model = ours(OTHERS[base](), method).eval()
        model.add_adapter("b", config(fp, method, num_virtual_tokens=2))
        tiny.randomize(model)
        model.set_adapter(["default", "b"])
        parts = torch.randint(1, tiny.VOCAB, (2, 9)), torch.randint(1, tiny.VOCAB, (2, 5))
        positions = torch.cat([torch.arange(9), torch.arange(5)]).expand(2, -1)
        learned = [p for p in model.parameters() if p.requires_grad]
        for names in (["default"] * 2, ["default", "b"], ["b", "__base__"]):
            got = model(torch.cat(parts, 1), position_ids=positions, use_cache=False, adapter_names=names).logits
            expected = torch.cat([model(p, use_cache=False, adapter_names=names).logits for p in parts], 1)
            close(got, expected)
            both = [torch.autograd.grad(t.square().sum(), learned, materialize_grads=True) for t in (got, expected)]
            close_each(*both)

    def test_several_prompts_lie_in_the_order_given(self):
        base = tf.MistralForCausalLM(tf.MistralConfig(**tiny._LLAMA | {"sliding_window": 6})).eval()
        model = ours(base, "prefix")
        model.add_adapter("b", config(fp, "prompt"))
        ids = tiny.inputs()["input_ids"]
        with torch.no_grad():
            for order in (["b", "default"], ["default", "b"]):
                model.set_adapter(order)
                close(model(ids, adapter_names=[order] * 3).logits, model(ids).logits)
                other = model(ids, adapter_names=[order[::-1]] * 3).logits
                assert not torch.allclose(other, model(ids).logits, atol=1e-3)

    @pytest.mark.parametrize("exchange", ["assign", "parameter", "layer"])
    def test_a_base_whose_parameters_become_others(self, exchange, tmp_path):
        base = llama()
        ours(copy.deepcopy(base), "prompt").save_pretrained(tmp_path)
        warm, cold = (fp.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path) for _ in range(2))
        ids = tiny.inputs()["input_ids"]
        with torch.no_grad():
            before = warm(ids).logits
        new = {k: v + torch.randn_like(v) / 10 for k, v in base.state_dict().items() if "mlp" in k}
        for model in (warm, cold):
            plain = model.get_base_model()
            if exchange == "assign":
                plain.load_state_dict(new, strict=False, assign=True)
            for i, layer in enumerate(plain.model.layers):
                if exchange == "parameter":
                    layer.mlp.up_proj.weight = torch.nn.Parameter(new[f"model.layers.{i}.mlp.up_proj.weight"])
                elif exchange == "layer":
                    layer.mlp.down_proj = fp.nn.Linear4bit.from_linear(layer.mlp.down_proj)
        with torch.no_grad():
            close(warm(ids).logits, cold(ids).logits)
            assert not torch.allclose(warm(ids).logits, before, atol=1e-4)

    def test_a_static_cache_where_all_layers_name_a_window_and_some_have_one(self):
        shape = tiny._LLAMA | {"num_hidden_layers": 4, "sliding_window": 8, "sliding_window_pattern": 2}
        base = tf.Exaone4ForCausalLM(tf.Exaone4Config(**shape, bos_token_id=None, eos_token_id=None)).eval()
        model = ours(base, "prompt")
        ids = tiny.inputs()["input_ids"]
        expected = model.generate(ids, **GREEDY)
        assert torch.equal(model.generate(ids, cache_implementation="static", **GREEDY), expected)

    def test_a_model_whose_tokens_see_later_ones_keeps_no_cache(self):
        text = tf.GemmaConfig(**tiny._LLAMA, head_dim=8)
        vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
        vision |= {"image_size": 28, "patch_size": 14, "model_type": "siglip_vision_model"}
        shape = {"image_token_index": 60, "hidden_size": 32, "projection_dim": 32}
        base = tf.PaliGemmaForConditionalGeneration(tf.PaliGemmaConfig(text_config=text, vision_config=vision, **shape))
        model = ours(base.eval(), "prompt")
        ids = torch.randint(1, 50, (2, 6))
        with pytest.raises(ValueError, match=r"use_cache is True.* it must be False with a soft prompt"):
            model.generate(ids, token_type_ids=0 * ids, **GREEDY)
        assert model.generate(ids, token_type_ids=0 * ids, use_cache=False, **GREEDY).shape == (2, 12)
        for name in ("cache", "past_key_values"):  # newer versions of transformers have the first, older the second
            if name in inspect.signature(base.forward).parameters:
                with pytest.raises(ValueError, match="there is a cache; it must be False with a soft prompt"):
                    model(ids, token_type_ids=0 * ids, **{name: DynamicCache()})


class TestServing:
    @pytest.mark.parametrize("method", METHODS)
    def test_hotswap(self, method, tmp_path):
        a, b = (ours(llama(), method, seed) for seed in (1, 2))
        for name, model in (("a", a), ("b", b)):
            model.save_pretrained(tmp_path / name)
        serving = fp.PeftModel.from_pretrained(llama(), tmp_path / "a")
        ids = tiny.inputs()["input_ids"]
        serving(ids)
        parameter = serving.prompt_encoder["default"].embedding.weight
        serving.hotswap_adapter(tmp_path / "b")
        assert serving.prompt_encoder["default"].embedding.weight is parameter
        expected = load_file(tmp_path / "b" / "adapter_model.safetensors")["prompt_embeddings"]
        assert torch.equal(parameter, expected)
        swapped = serving(ids).logits
        serving.load_adapter(tmp_path / "b", "fresh")
        serving.set_adapter("fresh")
        assert torch.equal(serving(ids).logits, swapped)

    @pytest.mark.parametrize("method", METHODS)
    def test_hotswap_to_another_number_of_virtual_tokens(self, method, tmp_path):
        short = {} if method in OURS else {"num_virtual_tokens": 3}
        ours(llama(), method).save_pretrained(tmp_path / "a")
        small = fp.get_peft_model(llama(), config(fp, method, **short) if short else OURS[method]())
        values = {k: t[:3].clone() for k, t in fp.get_peft_model_state_dict(small).items()}
        serving = fp.PeftModel.from_pretrained(llama(), tmp_path / "a")
        ids = tiny.inputs()["input_ids"]
        five = serving(ids).logits
        serving.hotswap_adapter(values)
        three = serving(ids).logits
        serving.save_pretrained(tmp_path / "three")
        assert not torch.allclose(three, five)
        assert serving.peft_config["default"].num_virtual_tokens == 3
        read = fp.PeftModel.from_pretrained(copy.deepcopy(serving.unload()), tmp_path / "three")
        close(read(ids).logits, three)
        read.hotswap_adapter(tmp_path / "a")
        close(read(ids).logits, five)
        trained = fp.PeftModel.from_pretrained(read.unload(), tmp_path / "three", is_trainable=True)
        with pytest.raises(ValueError, match=r"prompt_embeddings has shape \(5, .*must be \(3, "):
            trained.hotswap_adapter(tmp_path / "a")

    def test_hotswap_leaves_an_encoder_that_trains(self, tmp_path):
        ours(llama(), "ptuning", seed=1).save_pretrained(tmp_path)
        trained = ours(llama(), "ptuning", seed=2)
        before = {key: t.clone() for key, t in trained.state_dict().items()}
        with pytest.raises(ValueError, match=r"'default' has an encoder that trains.*is_trainable=False"):
            trained.hotswap_adapter(tmp_path)
        assert all(torch.equal(t, before[key]) for key, t in trained.state_dict().items())

    def test_hotswap_to_another_number_of_virtual_tokens_beside_whole_numbers(self):
        def made(count):
            base = llama()
            base.lm_head = torch.nn.Sequential(base.lm_head, torch.nn.BatchNorm1d(7))
            prompt = fp.PromptTuningConfig(
                num_virtual_tokens=count, modules_to_save=["lm_head"], inference_mode=True, task_type="CAUSAL_LM"
            )
            return fp.get_peft_model(base, prompt).eval()

        serving, longer = made(3), made(5)
        state = fp.get_peft_model_state_dict(longer)
        counted = next(key for key in state if "num_batches_tracked" in key)
        state[counted] += 4
        serving.hotswap_adapter(state)
        now = fp.get_peft_model_state_dict(serving)
        assert now[counted] == 4 and torch.equal(now["prompt_embeddings"], state["prompt_embeddings"])
        with pytest.raises(ValueError, match=f"{counted} has dtype torch.float32; it must be whole numbers"):
            made(3).hotswap_adapter(state | {counted: state[counted].float()})

    def test_a_soft_prompt_is_worked_out_once(self, tmp_path, monkeypatch):
        from pyfastpeft.integrations.soft_prompts.causal import CausalPrefixes

        for name in ("a", "b"):
            ours(llama(), "prompt", seed=len(name)).save_pretrained(tmp_path / name)
        model = fp.PeftModel.from_pretrained(llama(), tmp_path / "a")
        model.load_adapter(tmp_path / "b", "b")
        counted = []
        computed = CausalPrefixes._computed
        monkeypatch.setattr(CausalPrefixes, "_computed", lambda self, *a: counted.append(1) or computed(self, *a))
        ids = tiny.inputs()["input_ids"]
        for name in ("default", "b", "default", "b"):
            model.set_adapter(name)
            model.generate(ids, max_new_tokens=3)
            model(ids)
        assert len(counted) == 2
        with torch.no_grad():
            model.prompt_encoder["b"].embedding.weight.mul_(2)
        before = model(ids).logits
        assert len(counted) == 3
        model.load_adapter(tmp_path / "a", "c")
        model.set_adapter("b")
        close(model(ids).logits, before)

    @pytest.mark.parametrize("method", METHODS)
    def test_what_is_kept_follows_the_base_model(self, method):
        model = ours(llama(), method).eval()
        model.set_adapter("default", inference_mode=True)
        ids = tiny.inputs()["input_ids"]
        base = model.get_base_model()
        doubled = {key: t * 2 for key, t in base.state_dict().items()}
        before = model(ids).logits
        for change in (base.double, base.float, lambda: base.load_state_dict(doubled)):
            change()
            after = model(ids).logits
            model.base_model.bank.kept.clear()
            assert torch.equal(model(ids).logits, after)
        assert not torch.allclose(after, before, atol=1e-3)

    @pytest.mark.parametrize("method", METHODS)
    def test_what_is_kept_follows_hooks_and_modules_of_the_base_model(self, method):
        model = ours(llama(), method).eval()
        model.set_adapter("default", inference_mode=True)
        ids, layer = tiny.inputs()["input_ids"], model.get_base_model().model.layers[0]
        steered = torch.randn(layer.mlp.down_proj.out_features)

        def logits():
            """As they are, and as they are where nothing was kept."""
            kept = model(ids).logits
            model.base_model.bank.kept.clear()
            assert torch.equal(model(ids).logits, kept)
            return kept

        plain = logits()
        handle = layer.mlp.register_forward_hook(lambda module, args, output: output + steered)
        hooked = logits()
        steered *= 2
        assert not any(torch.allclose(hooked, other, atol=1e-3) for other in (plain, logits()))
        handle.remove()
        assert torch.equal(logits(), plain)
        handle = torch.nn.modules.module.register_module_forward_hook(lambda module, args, output: output)
        logits()
        handle.remove()
        layer.mlp.act_fn = torch.nn.Tanh()
        assert not torch.allclose(logits(), plain, atol=1e-3)

    @pytest.mark.parametrize("method", ["prompt", "ptuning"])
    def test_a_base_that_trains_learns_through_a_frozen_prompt_which_follows_it(self, method, tmp_path):
        base, ids, models, gradients = llama(), tiny.inputs()["input_ids"], [], []
        ours(base, method).save_pretrained(tmp_path)
        for library in (peft, fp):
            model = library.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
            models.append(model)
            norms = [p.requires_grad_() for n, p in model.named_parameters() if "layernorm" in n]
            model.eval()(ids)
            model(ids, labels=ids).loss.backward()
            gradients.append([p.grad for p in norms])
            torch.optim.SGD(norms, lr=1.0).step()
            for p in norms:
                p.requires_grad_(False)
        assert len(gradients[0]) == 4
        close(gradients[1], gradients[0], 1e-4)
        close(models[1](ids).logits, of_text(models[0](ids).logits, ids), 1e-4)

    def test_biases_that_train_with_a_lora_change_a_prompt_beside_it(self):
        model = ours(tiny.make("gpt2"), "prompt").eval()
        model.add_adapter("lora", fp.LoraConfig(bias="all"))
        model.set_adapter("default", inference_mode=True)
        ids = tiny.inputs()["input_ids"]
        before = model(ids).logits
        model.set_adapter("lora")
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(0.5)
        model.set_adapter("default", inference_mode=True)
        after = model(ids).logits
        model.base_model.bank.kept.clear()
        assert torch.equal(model(ids).logits, after)
        assert not torch.allclose(after, before, atol=1e-3)

    @pytest.mark.parametrize("how", ["dropout of the model", "dropout of the prefix", "autocast"])
    def test_what_was_worked_out_in_training_or_autocast_serves_nothing_else(self, how):
        if how == "dropout of the prefix":
            model = fp.get_peft_model(llama(), fp.DeepPromptConfig(**_SHARED, prefix=True, prefix_dropout=0.5))
        else:
            dropout = {"resid_pdrop": 0.5, "attn_pdrop": 0.0, "embd_pdrop": 0.0}
            model = ours(tf.GPT2LMHeadModel(tf.GPT2Config(**tiny._GPT2 | dropout)), "prompt")
        model.set_adapter("default", inference_mode=True)
        ids = tiny.inputs()["input_ids"]
        expected = model.eval()(ids).logits
        model.base_model.bank.kept.clear()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            model.train(how != "autocast")(ids)
        assert torch.equal(model.eval()(ids).logits, expected)

    def test_an_lstm_trains_under_autocast_on_every_cpu(self):
        model, ids = ours(llama(), "ptuning_lstm").train(), tiny.inputs()["input_ids"]
        losses, gradients = [], []
        for enabled in (True, False):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                losses.append(model(ids, labels=ids).loss)
            gradients.append(torch.autograd.grad(losses[-1], [p for p in model.parameters() if p.requires_grad]))
        close(*losses, 0.05)
        assert LstmEncoder(P, 8, 6, 1, 0.0).to("meta", torch.float32)().shape == (P, 8)  # where there is no autocast
        assert len(gradients[0]) > 8 and all(g.isfinite().all() and g.any() for g in gradients[0])

    @pytest.mark.parametrize("rope_type", ["longrope", "dynamic"])
    def test_a_prompt_turns_as_far_as_the_length_of_its_sequence_says(self, rope_type, tmp_path):
        rope = {"rope_type": rope_type, "rope_theta": 10000.0, "factor": 4.0}
        if rope_type == "longrope":
            rope |= {"short_factor": [1.0] * 4, "long_factor": [2.0, 4.0, 6.0, 8.0]}
            rope |= {"original_max_position_embeddings": 16}
        base = tf.LlamaForCausalLM(
            tf.LlamaConfig(**tiny._LLAMA | {"max_position_embeddings": 16}, rope_parameters=rope)
        )
        ours(base, "prompt").save_pretrained(tmp_path)
        theirs, own = (lib.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval() for lib in (peft, fp))
        for length in (8, 40, 8, 14):
            ids = torch.randint(3, tiny.VOCAB, (2, length))
            close(own(ids).logits, of_text(theirs(ids).logits, ids))
        generated = own.generate(ids, **GREEDY)
        # Under a dynamic rope what a cache holds stays turned as far as the sequence had come by then.
        known = 14 if rope_type == "dynamic" else generated.shape[1] - 1
        close(own(generated[:, :known]).logits[:, 13:].argmax(-1), generated[:, 14 : known + 1])
        expected = own.base_model.tuner_of("default").prefixes.export(("default",))
        own(torch.randint(3, tiny.VOCAB, (2, 40)))
        close(own.base_model.tuner_of("default").prefixes.export(("default",)), expected)

    def test_a_prompt_follows_the_lora_on_its_row(self):
        model = ours(llama(), "prompt").eval()
        model.add_adapter("lora", fp.LoraConfig())
        model.set_adapter(["default", "lora"], inference_mode=True)
        ids = tiny.inputs()["input_ids"]
        before = model(ids).logits
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_()
        after = model(ids).logits
        assert not torch.allclose(before, after)
        names = [["default", "lora"]] * len(ids)
        close(model(ids, adapter_names=names).logits, after)
        model.base_model.bank.kept.clear()
        assert torch.equal(model(ids).logits, after)

    def test_what_inference_kept_serves_beside_what_trains(self):
        model = ours(llama(), "prefix").eval()
        model.set_adapter("default", inference_mode=True)
        ids = tiny.inputs()["input_ids"]
        with torch.inference_mode():
            model(ids)
        model.add_adapter("lora", fp.LoraConfig())
        model.set_adapter(["default", "lora"])
        model(ids, labels=ids).loss.backward()
        assert all(p.grad is not None for n, p in model.named_parameters() if "lora_B" in n)

    def test_parameters_that_train_may_be_written_past_autograd(self):
        model = ours(llama(), "prompt").eval()
        ids = tiny.inputs()["input_ids"]
        with torch.no_grad():
            before = model(ids).logits
            model.prompt_encoder["default"].embedding.weight.data.mul_(3)
            assert not torch.allclose(model(ids).logits, before)

    def test_disable_delete_and_unload_leave_the_model_as_it_was(self):
        base = llama()
        ids = tiny.inputs()["input_ids"]
        plain = base(ids).logits
        model = fp.get_peft_model(base, config(fp, "prefix"))
        model.add_adapter("b", config(fp, "ptuning"))
        with model.disable_adapter():
            close(model(ids, labels=ids).logits, plain)
        model.delete_adapter("default")
        assert model.active_adapter == "b"
        model.delete_adapter("b")
        close(model(ids).logits, plain)
        assert base.config._attn_implementation == "sdpa"
        assert not any("_prefix" in vars(m) for m in base.modules())
        assert not list(model.prompt_encoder.parameters())
        model.add_adapter("c", config(fp, "prefix"))
        model.set_adapter("c")
        assert not torch.allclose(model(ids).logits, plain, atol=1e-3)
        assert model.unload() is base
        assert torch.equal(base(ids).logits, plain)

    @pytest.mark.parametrize("method", METHODS)
    def test_on_a_4_bit_base_in_bf16(self, method):
        base = tiny.quantized(tiny.make(dtype=torch.bfloat16))
        own = ours(base, method).train()
        dense = fp.get_peft_model(tiny.dequantized(base).float(), config(fp, method))
        dense.prompt_encoder["default"].load_state_dict(own.prompt_encoder["default"].state_dict())
        x = tiny.inputs()
        loss, expected = own(**x).loss, dense.train()(**x).loss
        assert loss.item() == pytest.approx(expected.item(), abs=3e-2)
        loss.backward()
        expected.backward()
        for a, b in zip(own.prompt_encoder.parameters(), dense.prompt_encoder.parameters(), strict=True):
            assert a.dtype == torch.float32
            assert (a.grad - b.grad).norm() <= 0.1 * b.grad.norm()
        assert own.eval().generate(x["input_ids"], max_new_tokens=4, eos_token_id=-1).shape == (3, 10)

    def test_a_copy_is_a_model_of_its_own(self):
        model = ours(llama(), "prompt").eval()
        ids = tiny.inputs()["input_ids"]
        expected = model(ids).logits
        copied = copy.deepcopy(model)
        with torch.no_grad():
            model.prompt_encoder["default"].embedding.weight.zero_()
        close(copied(ids).logits, expected)
        assert not torch.allclose(model(ids).logits, expected, atol=1e-4)


class TestDeepPrompts:
    def test_vectors_go_through_each_layers_own_norm_and_projections(self):
        base = llama()
        own = ours(base, "deep").eval()
        layers = base.config.num_hidden_layers
        vectors = own.prompt_encoder["default"].embedding.weight.view(P, layers, -1)
        vectors.data.normal_()
        decoder = own.get_base_model().model
        cos, sin = decoder.rotary_emb(vectors, torch.arange(P)[None])
        names = own.base_model.tuner_of("default").prefixes
        got = names.export(("default",))
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        for i, layer in enumerate(decoder.layers):
            x = layer.input_layernorm(vectors[None, :, i])
            k, v = (p(x).view(1, P, -1, 8).transpose(1, 2) for p in (layer.self_attn.k_proj, layer.self_attn.v_proj))
            close(got[2 * i], apply_rotary_pos_emb(k, k, cos, sin)[1][0])
            close(got[2 * i + 1], v[0])

    @pytest.mark.parametrize("prefix", [False, True])
    @pytest.mark.parametrize("make", [tiny_llama, narrow_opt])
    def test_first_values_are_those_of_a_text(self, make, prefix):
        base = make().eval()
        tokenizer = tiny_tokenizer()
        text = "a text"
        kwargs = {"num_virtual_tokens": len(text), "prefix_init_text": text, "tokenizer_name_or_path": tokenizer}
        deep = fp.DeepPromptConfig(**kwargs, prefix=prefix)
        ids = torch.tensor(tokenizer(text)["input_ids"])
        tail = torch.randint(0, 256, (1, 4))
        expected = base(torch.cat([ids[None], tail], 1)).logits[:, len(ids) :]
        own = fp.get_peft_model(copy.deepcopy(base), deep).eval()
        close(own(tail).logits, expected)
        assert not any(layer._forward_pre_hooks for layer in own.get_base_model().get_decoder().layers)
        plain = fp.PrefixTuningConfig(**kwargs)
        close(fp.get_peft_model(copy.deepcopy(base), plain).eval()(tail).logits, expected)

    def test_prefix_dropout_is_for_training(self):
        base = llama()
        own = fp.get_peft_model(base, fp.DeepPromptConfig(**_SHARED, prefix_dropout=0.5))
        ids = tiny.inputs()["input_ids"]
        assert torch.equal(own.eval()(ids).logits, own(ids).logits)
        own.train()
        assert not torch.equal(own(ids).logits, own(ids).logits)
        own.set_adapter("default", inference_mode=True)
        assert not torch.equal(own(ids).logits, own(ids).logits)

    def test_a_classification_head_trains_along(self, tmp_path):
        base = tf.LlamaForSequenceClassification(tf.LlamaConfig(**tiny._LLAMA, num_labels=3)).eval()
        own = fp.get_peft_model(copy.deepcopy(base), fp.DeepPromptConfig(num_virtual_tokens=P, task_type="SEQ_CLS"))
        x = {"input_ids": torch.randint(1, tiny.VOCAB, (3, 6)), "labels": torch.tensor([0, 1, 2])}
        optimizer = torch.optim.SGD([p for p in own.parameters() if p.requires_grad], lr=0.5)
        for _ in range(3):
            own.train()(**x).loss.backward()
            optimizer.step()
        own.save_pretrained(tmp_path)
        assert set(load_file(tmp_path / "adapter_model.safetensors")) == {
            "prompt_embeddings",
            "base_model.score.weight",
        }
        read = fp.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
        close(read(x["input_ids"]).logits, own.eval()(x["input_ids"]).logits)


def without_attention(model: torch.nn.Module) -> torch.nn.Module:
    model.model.layers[1].self_attn = torch.nn.Identity()
    return model


@pytest.mark.parametrize("method", METHODS)
def test_a_model_that_was_called_with_other_parameters_can_be_copied(method):
    own, ids = ours(llama(), method).eval(), tiny.inputs()["input_ids"]
    given = {name: parameter * 2.0 for name, parameter in own.named_parameters() if parameter.requires_grad}
    with torch.no_grad():
        torch.func.functional_call(own, given, (), {"input_ids": ids})
        close(copy.deepcopy(own)(input_ids=ids).logits, own(input_ids=ids).logits)


def test_positions_are_lengthened_for_a_prompt_in_its_own_thread_alone():
    class Rotary(torch.nn.Module):
        def forward(self, x, position_ids):
            return position_ids, position_ids.max() + torch.zeros_like(position_ids)

    def turned():
        return [t.tolist() for t in rotary(None, torch.arange(3)[None])]

    rotary, elsewhere = Rotary(), []
    with reaching([rotary], 9):
        thread = threading.Thread(target=lambda: elsewhere.extend(turned()))
        thread.start()
        thread.join()
        assert turned() == [[[0, 1, 2]], [[8, 8, 8]]]
    assert turned() == elsewhere == [[[0, 1, 2]], [[2, 2, 2]]]


class TestBadInput:
    @pytest.mark.parametrize("number", [0, -1, True, 2.5, None])
    def test_no_virtual_tokens(self, number):
        with pytest.raises(ValueError, match=r"num_virtual_tokens is .*must be an integer of at least 1"):
            fp.PromptTuningConfig(num_virtual_tokens=number)

    @pytest.mark.parametrize("method", ["prompt", "prefix"])
    def test_more_than_the_context(self, method):
        base = tiny.make("gpt2")
        with pytest.raises(ValueError, match=r"num_virtual_tokens is 64; .* context of 64 tokens"):
            fp.get_peft_model(base, config(fp, method, num_virtual_tokens=64))

    def test_heads_that_do_not_divide(self):
        with pytest.raises(ValueError, match="num_attention_heads is 3, must be 2"):
            fp.get_peft_model(llama(), fp.PrefixTuningConfig(num_virtual_tokens=P, num_attention_heads=3))

    def test_a_prefix_of_another_model(self, tmp_path):
        ours(tiny.make("gpt2"), "prefix").save_pretrained(tmp_path)
        base = llama()
        longer = tf.LlamaForCausalLM(tf.LlamaConfig(**tiny._LLAMA | {"num_hidden_layers": 3}))
        message = "of another model: num_attention_heads is 4, must be 2, token_dim is 32, must be 16"
        model = r"\(this model has num_layers 3, num_attention_heads 2, token_dim 16\)"
        with pytest.raises(ValueError, match="of another model: num_layers is 2, must be 3 " + model):
            fp.PeftModel.from_pretrained(longer, tmp_path)
        own = ours(base, "prefix", seed=3)
        values = {k: t.clone() for k, t in fp.get_peft_model_state_dict(own).items()}
        values["prompt_embeddings"] = values["prompt_embeddings"][:, :-8]
        with pytest.raises(ValueError, match=r"prompt_embeddings has shape \(5, 56\); it must be \(5, 64\)"):
            own.hotswap_adapter(values)
        settings = json.loads((tmp_path / "adapter_config.json").read_text()) | {"token_dim": 40}
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
        with pytest.raises(ValueError, match=message.replace("is 32", "is 40")):
            fp.PeftModel.from_pretrained(llama(), tmp_path)

    def test_values_of_another_form_whose_shapes_agree(self, tmp_path):
        ours(llama(), "deep_prefix").save_pretrained(tmp_path)
        own = ours(llama(), "deep")
        before = {k: t.clone() for k, t in fp.get_peft_model_state_dict(own).items()}
        with pytest.raises(ValueError, match="'default' has virtual tokens of another form"):
            own.load_adapter(tmp_path, "default")
        with pytest.raises(ValueError, match=r"configurations differ in .*\bprefix$"):
            own.hotswap_adapter(tmp_path)
        assert torch.equal(fp.get_peft_model_state_dict(own)["prompt_embeddings"], before["prompt_embeddings"])

    def test_names_of_rows(self):
        model = mixed(llama())
        ids = tiny.inputs()["input_ids"]
        with pytest.raises(ValueError, match="adapter_names has 2 names; the batch has 3 rows"):
            model(ids, adapter_names=["prefix", "prompt"])
        with pytest.raises(ValueError, match=r"adapter_names holds \['other'\]"):
            model(ids, adapter_names=["prefix", ["prompt", "other"], "lora"])
        with pytest.raises(ValueError, match="adapter_names has 4 names; the batch has 3 rows"):
            model.generate(ids, adapter_names=["prefix"] * 4)
        with pytest.raises(ValueError, match=r"adapter_names holds \['other'\]"):
            model.generate(input_ids=ids, adapter_names=["prefix", "prompt", "other"])
        with pytest.raises(ValueError, match=r"adapter_names holds \[None, 'other'\]"):
            model(ids, adapter_names=[None, "prompt", ["prefix", "other"]])

    @pytest.mark.parametrize(
        "shape",
        [(3, 11), (3, 5), (2, 6), (6,), (3, 6, 6), (3, 1, 5, 5), (2, 1, 6, 6), (3, 1, 6, 11), (3, 1, 11, 11)],
        ids=str,
    )
    def test_a_mask_of_the_wrong_shape(self, shape):
        wanted = r"\(3, 1, 6, 6\)" if len(shape) == 4 else r"\(3, 6\)"
        with pytest.raises(ValueError, match=rf"attention_mask has shape .* it must be {wanted}"):
            ours(llama(), "prompt")(tiny.inputs()["input_ids"], attention_mask=torch.ones(shape))

    def test_a_call_without_tokens_is_the_models_own_error(self):
        with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
            ours(llama(), "prefix")(attention_mask=torch.ones(2, 3))

    def test_a_prompt_at_the_embedding_beside_something_else_that_is_attended_to(self):
        sizes = {"vocab_size": tiny.VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "add_cross_attention": True}
        base, ids = tf.GPT2LMHeadModel(tf.GPT2Config(**sizes)).eval(), tiny.inputs()["input_ids"]
        other = {"encoder_hidden_states": torch.randn(len(ids), 6, 32)}
        own = ours(base, "prompt").eval()
        with pytest.raises(ValueError, match=r"encoder_hidden_states is given, on which adapters \['default'\]"):
            own(ids, **other)
        with own.disable_adapter():
            close(own(ids, **other).logits, base(ids, **other).logits)
        theirs, own = pair(base, "prefix")
        close(own.eval()(ids, **other).logits, theirs.eval()(input_ids=ids, **other).logits)

    def test_a_model_that_is_no_transformers_model(self):
        with pytest.raises(ValueError, match="no model of transformers"):
            fp.get_peft_model(torch.nn.Linear(2, 2), config(fp, "prefix"))

    @pytest.mark.parametrize(
        ("make", "match"),
        [
            (
                lambda: tf.MiniCPM3ForCausalLM(
                    tf.MiniCPM3Config(
                        **tiny._LLAMA | {"num_key_value_heads": 4, "q_lora_rank": 8, "kv_lora_rank": 8},
                        qk_nope_head_dim=8,
                        qk_rope_head_dim=4,
                        v_head_dim=8,
                    )
                ),
                "a MiniCPM3ForCausalLM keeps keys and values compressed",
            ),
            (lambda: tf.DiffLlamaForCausalLM(tf.DiffLlamaConfig(**tiny._LLAMA)), "attends twice"),
            (lambda: tf.DogeForCausalLM(tf.DogeConfig(**tiny._LLAMA)), "chooses its keys by their values"),
            (
                lambda: tf.Gemma4ForCausalLM(
                    tf.Gemma4TextConfig(
                        **_WINDOW,
                        head_dim=8,
                        global_head_dim=16,
                        hidden_size_per_layer_input=0,
                        layer_types=["sliding_attention", "full_attention"],
                        num_kv_shared_layers=0,
                    )
                ),
                "layers of a Gemma4ForCausalLM have heads of different sizes",
            ),
            (lambda: without_attention(llama()), "a LlamaModel has self-attention in 1 of its 2 layers"),
            (
                lambda: tf.MllamaForCausalLM(
                    tf.MllamaTextConfig(**tiny._LLAMA, cross_attention_layers=[1], eos_token_id=1, bos_token_id=2)
                ),
                "a MllamaTextModel has self-attention in 1 of its 2 layers",
            ),
            (
                lambda: tf.JetMoeForCausalLM(
                    tf.JetMoeConfig(**tiny._LLAMA | {"num_attention_heads": 4}, kv_channels=8, num_local_experts=2)
                ),
                "a JetMoeForCausalLM repeats its keys and values for each expert of a token",
            ),
            (
                lambda: tf.GPTNeoForCausalLM(
                    tf.GPTNeoConfig(
                        vocab_size=tiny.VOCAB,
                        hidden_size=32,
                        num_layers=2,
                        num_heads=4,
                        attention_types=[[["global", "local"], 1]],
                    )
                ),
                "the attention of a GPTNeoForCausalLM cannot be exchanged",
            ),
            (
                lambda: tf.BloomForSequenceClassification(
                    tf.BloomConfig(vocab_size=tiny.VOCAB, hidden_size=32, n_layer=2, n_head=4, pad_token_id=0)
                ),
                "the attention of a BloomForSequenceClassification cannot be exchanged",
            ),
            (
                lambda: tf.BartForCausalLM(
                    tf.BartConfig(vocab_size=tiny.VOCAB, d_model=32, decoder_layers=2, decoder_attention_heads=4)
                ),
                "a BartForCausalLM takes no position_ids",
            ),
            (
                lambda: tf.FalconH1ForCausalLM(
                    tf.FalconH1Config(**tiny._LLAMA, head_dim=8, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8)
                ),
                r"a FalconH1ForCausalLM has layers of other kinds than .* attention \(hybrid\), so it cannot take",
            ),
            (
                lambda: tf.MiniMaxForCausalLM(tf.MiniMaxConfig(**tiny._LLAMA, head_dim=8, num_local_experts=2)),
                r"a MiniMaxForCausalLM has layers of other kinds than .* attention \(linear_attention\)",
            ),
            (
                lambda: tf.MambaForCausalLM(tf.MambaConfig(vocab_size=tiny.VOCAB, hidden_size=32, num_hidden_layers=2)),
                r"a MambaForCausalLM has layers of other kinds than .* attention \(linear_attention\)",
            ),
            (
                lambda: tf.RwkvForCausalLM(tf.RwkvConfig(vocab_size=tiny.VOCAB, hidden_size=32, num_hidden_layers=2)),
                "the RwkvConfig of a RwkvForCausalLM has no num_attention_heads: it cannot take a prefix",
            ),
            (
                lambda: tf.DoryForCausalLM(tf.DoryConfig(**_WINDOW, head_dim=8, layer_types=["full_attention"] * 2)),
                "a DoryForCausalLM runs its layers several times, so it cannot take a prefix",
            ),
            (
                lambda: tf.ModernBertDecoderForCausalLM(
                    tf.ModernBertDecoderConfig(
                        vocab_size=tiny.VOCAB, hidden_size=36, num_hidden_layers=2, pad_token_id=0
                    )
                ),
                r"ModernBertDecoderForCausalLM\.get_decoder\(\) returned a Linear, which has no config",
            ),
        ],
    )
    @pytest.mark.parametrize("method", ["prompt", "prefix", "deep"])
    def test_a_model_to_which_a_prefix_is_not_what_tokens_are(self, make, match, method):
        base = make()
        with pytest.raises(ValueError, match=match):
            fp.get_peft_model(base, config(fp, method))
        assert all(p.requires_grad for p in base.parameters())

    @pytest.mark.parametrize(
        ("size", "match"),
        [
            (16, "keys of a MiMoV2FlashForCausalLM have 8 .* and its values 16"),
            (8, "layers of a MiMoV2FlashForCausalLM have different numbers of key/value heads"),
        ],
    )
    def test_keys_and_values_of_different_sizes_are_not_learned_but_computed(self, size, match):
        kwargs = {"layer_types": ["full_attention", "sliding_attention"], "n_routed_experts": 2}
        base = tf.MiMoV2FlashForCausalLM(
            tf.MiMoV2FlashConfig(**_WINDOW, **kwargs, head_dim=8, v_head_dim=size, num_experts_per_tok=1)
        )
        for made in (fp.PrefixTuningConfig(**_SHARED), fp.DeepPromptConfig(**_SHARED, prefix=True)):
            with pytest.raises(ValueError, match=match):
                fp.get_peft_model(base, made)
        own, ids = ours(base.eval(), "deep"), tiny.inputs(length=9)["input_ids"]
        with torch.no_grad():
            assert (own(ids).logits - base(ids).logits).abs().max() > 1e-4
        tiny.assert_same_answers(*(own.generate(ids, **WITH_SCORES, use_cache=c) for c in (True, False)))

    def test_layers_of_several_inputs_take_no_vectors_of_their_own(self):
        with pytest.raises(
            ValueError, match="layers of a Gemma3nForCausalLM have several inputs each; use prefix=True"
        ):
            ours(OTHERS["keys of other layers"](), "deep")

    @pytest.mark.parametrize("method", METHODS)
    def test_a_model_that_looks_up_the_ids_of_its_vectors_takes_keys_and_values_alone(self, method):
        sizes = {"head_dim": 8, "global_head_dim": 8, "num_kv_shared_layers": 0}
        sizes |= {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": tiny.VOCAB}
        base = tf.Gemma4ForCausalLM(tf.Gemma4TextConfig(**_WINDOW, **sizes)).eval()
        if "prefix" not in method:
            with pytest.raises(
                ValueError, match="a Gemma4ForCausalLM looks up the token ids of the vectors that it gets"
            ):
                ours(base, method)
            return
        ids = tiny.inputs()["input_ids"]
        assert not torch.allclose(ours(base, method)(ids).logits, base(ids).logits, atol=1e-4)

    def test_numbers_within_images_that_no_axis_of_the_text_stands_beside(self):
        with pytest.raises(
            ValueError, match=r"mrope_section'\] of a HunYuanVLFor.* is \[2, 1, 1\]; a soft prompt needs"
        ):
            ours(hunyuan_vl((2, 1, 1)), "prompt")

    def test_a_text_in_the_tokens_of_another_model(self, tmp_path):
        text = {"num_virtual_tokens": P, "tokenizer_name_or_path": tiny_tokenizer()}
        for made in (
            fp.PromptTuningConfig(**text, prompt_tuning_init="TEXT", prompt_tuning_init_text="z"),
            fp.PrefixTuningConfig(**text, prefix_init_text="z"),
            fp.DeepPromptConfig(**text, prefix_init_text="z"),
        ):
            with pytest.raises(ValueError, match=r"text has token \d+, and a LlamaForCausalLM has 64"):
                fp.get_peft_model(llama(), made)
        with pytest.raises(ValueError, match="initial text is '', which has no tokens"):
            fp.get_peft_model(llama(), fp.PrefixTuningConfig(**text, prefix_init_text=""))
        with pytest.raises(TypeError, match="the initial text is 3; it must be a string"):
            fp.get_peft_model(llama(), fp.PrefixTuningConfig(**text, prefix_init_text=3))
        with pytest.raises(TypeError, match="tokenizer_name_or_path is 3; it must be a tokenizer, or the name or path"):
            fp.get_peft_model(
                llama(), fp.DeepPromptConfig(**text | {"tokenizer_name_or_path": 3}, prefix_init_text="z")
            )
        for path in (tmp_path, str(tmp_path / "none")):
            named = re.escape(f"tokenizer_name_or_path is {path!r}; it must be a tokenizer, or the name or path of one")
            with pytest.raises(ValueError, match=named):
                fp.get_peft_model(
                    llama(), fp.PrefixTuningConfig(**text | {"tokenizer_name_or_path": path}, prefix_init_text="z")
                )

    def test_continuous_batching(self):
        """transformers has no attention with a prefix for it: refused where it is called; LoRA alone is served."""
        model = fp.get_peft_model(tiny.make(), fp.PrefixTuningConfig(num_virtual_tokens=4)).eval()
        model.add_adapter("lora", fp.LoraConfig(init_lora_weights=False))
        with pytest.raises(ValueError, match=r"adapters \['default'\] are soft prompts; continuous batching"):
            model.generate_batch([[5, 6, 7]])
        model.set_adapter("lora")
        with pytest.raises(ValueError, match=r"adapter_names is \['lora'\]; continuous batching has one choice"):
            model.generate_batch([[5, 6, 7]], adapter_names=["lora"])
        assert model.config._attn_implementation == "pyfastpeft"
        config = tf.GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=-1, pad_token_id=0)
        small = tf.ContinuousBatchingConfig(num_blocks=4, max_batch_tokens=16)  # not a large part of the memory
        (found,) = model.generate_batch([[5, 6, 7]], config, small).values()
        expected = model.generate(torch.tensor([[5, 6, 7]]), generation_config=config)[0, 3:]
        assert found.generated_tokens == expected.tolist()
        assert model.config._attn_implementation == "pyfastpeft"

    def test_attention_exchanged_afterwards(self):
        model = ours(llama(), "prefix")
        model.get_base_model().set_attn_implementation("sdpa")
        with pytest.raises(ValueError, match=r"attention was changed to 'sdpa'.* without while generate_batch runs"):
            model(tiny.inputs()["input_ids"])

    def test_merging(self):
        model = mixed(llama())
        model.set_adapter(["lora", "prefix"])
        with pytest.raises(ValueError, match="'prefix' is PREFIX_TUNING, which cannot be merged"):
            model.merge_and_unload()
        model.merge_adapter(["lora"])

    @pytest.mark.parametrize(
        ("kind", "kwargs", "message"),
        [
            (fp.PromptTuningConfig, {"prompt_tuning_init": "x"}, "prompt_tuning_init is 'x'"),
            (
                fp.PromptTuningConfig,
                {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "a"},
                "tokenizer_name_or_path is None; prompt_tuning_init 'TEXT' needs it",
            ),
            (fp.PromptTuningConfig, {"tokenizer_kwargs": {"a": 1}}, "tokenizer_kwargs is given"),
            (
                fp.PromptTuningConfig,
                {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "a"}
                | {"tokenizer_name_or_path": "b", "tokenizer_kwargs": 3},
                "tokenizer_kwargs is 3; it must be a dict or None",
            ),
            (fp.PromptTuningConfig, {"token_dim": 0}, "token_dim is 0"),
            (fp.PromptTuningConfig, {"num_transformer_submodules": "1"}, "num_transformer_submodules is '1'"),
            (fp.PromptTuningConfig, {"num_attention_heads": True}, "num_attention_heads is True"),
            (fp.PromptTuningConfig, {"num_layers": -1}, "num_layers is -1"),
            (
                fp.PromptEncoderConfig,
                {"encoder_reparameterization_type": "x"},
                "encoder_reparameterization_type is 'x'",
            ),
            (fp.PromptEncoderConfig, {"encoder_hidden_size": 0}, "encoder_hidden_size is 0"),
            (fp.PromptEncoderConfig, {"encoder_num_layers": 0}, "encoder_num_layers is 0"),
            (fp.PromptEncoderConfig, {"encoder_dropout": 1.0}, "encoder_dropout is 1.0"),
            (fp.PrefixTuningConfig, {"prefix_init": "x"}, "prefix_init is 'x'"),
            (fp.PrefixTuningConfig, {"prefix_init_text": "x"}, "prefix_init_text is given"),
            (fp.PrefixTuningConfig, {"init_weights": "x"}, "init_weights is 'x'"),
            (fp.PrefixTuningConfig, {"init_weights": "zero", "prefix_init": "random"}, "init_weights is 'zero'"),
            (fp.PrefixTuningConfig, {"encoder_hidden_size": 2.5}, "encoder_hidden_size is 2.5"),
            (fp.PrefixTuningConfig, {"prefix_projection": True, "prefix_init": "text"}, "prefix_init is 'text'"),
            (fp.DeepPromptConfig, {"prefix_init": "x"}, "prefix_init is 'x'"),
            (fp.DeepPromptConfig, {"prefix_dropout": 1}, "prefix_dropout is 1"),
        ],
    )
    def test_a_wrong_field(self, kind, kwargs, message):
        with pytest.raises(ValueError, match=message):
            kind(num_virtual_tokens=P, **kwargs)

    @pytest.mark.parametrize("method", METHODS)
    def test_an_error_leaves_the_model_as_it_was(self, method, tmp_path):
        ours(llama(), method).save_pretrained(tmp_path)
        (Path(tmp_path) / "adapter_model.safetensors").write_bytes(b"damaged")
        base = llama()
        with pytest.raises(ValueError, match=r"adapter_model\.safetensors"):
            fp.PeftModel.from_pretrained(base, tmp_path)
        assert base.config._attn_implementation == "sdpa"
        assert all(p.requires_grad for p in base.parameters())
