"""``trainable_token_indices``: rows of an embedding that train beside LoRA are PEFT's, in memory and in files."""

from __future__ import annotations

import copy

import architectures as tiny
import peft
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from torch.nn.utils import prune

import pyfastpeft as fp

pytestmark = pytest.mark.filterwarnings("ignore")

TARGETS = {"gpt2": ["c_attn"], "t5": ["q"], "bert": ["query"]}
EMBEDDINGS = {"gpt2": "wte", "t5": "shared", "bert": "word_embeddings"}
FILE = "adapter_model.safetensors"


def config(library, tokens, architecture="qwen2", **kwargs):
    return library.LoraConfig(
        r=2,
        lora_alpha=4,
        target_modules=TARGETS.get(architecture, ["q_proj"]),
        trainable_token_indices=tokens,
        **kwargs,
    )


def adapted(library, model, tokens, architecture="qwen2", **kwargs):
    made = library.get_peft_model(copy.deepcopy(model), config(library, tokens, architecture), **kwargs)
    tiny.randomize(made)
    return made.eval()


def logits(model, rows, **kwargs):
    with torch.no_grad():
        return model(**rows, **kwargs).logits


def rows_of(model):
    return model.get_parameter("base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta.default")


def places(architecture):
    """``trainable_token_indices`` of every kind."""
    embedding = EMBEDDINGS.get(architecture, "embed_tokens")
    yield [1, 3, 60]
    if architecture != "bert":  # which has no head over the vocabulary
        yield {embedding: [5, 2], "lm_head": [5, 2]}
        yield {embedding: [5, 2], "lm_head": [7]}
        yield {"lm_head": [7]}
    if architecture == "t5":  # whose encoder and decoder have embeddings of their own with one weight
        yield {"embed_tokens": [5, 2]}
        yield {"encoder.embed_tokens": [5, 2], "decoder.embed_tokens": [7]}


@pytest.mark.parametrize(
    ("architecture", "tokens"), [(a, t) for a in ("llama", "qwen2", "gpt2", "t5", "bert") for t in places(a)], ids=str
)
def test_rows_are_pefts_in_files_in_logits_in_gradients_and_by_name(tmp_path, architecture, tokens):
    base, rows = tiny.make(architecture), tiny.inputs(architecture, length=16)
    theirs = adapted(peft, base, tokens, architecture)
    expected = logits(theirs, rows)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = fp.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "theirs", is_trainable=True).eval()
    torch.testing.assert_close(logits(ours, rows), expected, rtol=1e-4, atol=1e-5)
    ours.save_pretrained(tmp_path / "ours")
    first, second = (load_file(tmp_path / of / FILE) for of in ("theirs", "ours"))
    assert first.keys() == second.keys() and all(torch.equal(t, second[key]) for key, t in first.items())
    assert torch.equal(logits(peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours"), rows), expected)
    assert theirs.state_dict().keys() == ours.state_dict().keys()
    for model in (theirs, ours):
        model(**rows).loss.backward()
    trained = {name: p.grad for name, p in ours.named_parameters() if p.requires_grad}
    assert trained.keys() == {name for name, p in theirs.named_parameters() if p.requires_grad}
    for name, gradient in trained.items():
        torch.testing.assert_close(gradient, theirs.get_parameter(name).grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("architecture", "tokens"), [(a, t) for a in ("llama", "qwen2", "phi") for t in places(a)], ids=str
)
def test_rows_merge_come_out_again_and_leave_with_the_adapter(architecture, tokens):
    base, rows = tiny.make(architecture), tiny.inputs(architecture, length=16)
    model = adapted(fp, base, tokens)
    expected = logits(model, rows)
    model.merge_adapter()
    torch.testing.assert_close(logits(model, rows), expected, rtol=1e-4, atol=1e-5)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model, rows), logits(base, rows), rtol=1e-4, atol=1e-5)
        copied = copy.deepcopy(model)  # in which nothing is merged or disabled
        model.unmerge_adapter()
    torch.testing.assert_close(logits(copied, rows), expected, rtol=1e-4, atol=1e-5)
    assert model.get_model_status().merged_adapters == ["default"] and not model(**rows).logits.requires_grad
    model.unmerge_adapter()
    assert torch.equal(logits(model, rows), expected)
    merged, plain = copy.deepcopy(model).merge_and_unload(), model.unload()
    torch.testing.assert_close(logits(merged, rows), expected, rtol=1e-4, atol=1e-5)
    for left in (merged, plain):
        assert left.state_dict().keys() == base.state_dict().keys()
        tied = left.lm_head.weight is left.model.embed_tokens.weight
        assert left.config.tie_word_embeddings == tied
    assert all(torch.equal(t, base.state_dict()[key]) for key, t in plain.state_dict().items())


def test_rows_are_not_merged_into_a_weight_that_is_computed():
    base, rows = tiny.make(), tiny.inputs(length=16)
    prune.l1_unstructured(base.model.embed_tokens, "weight", 0.4)
    model = fp.get_peft_model(base, config(fp, [1, 3], "llama")).eval()
    tiny.randomize(model)
    expected = logits(model, rows)
    with pytest.raises(ValueError, match=r"the weight of a Embedding of shape .* is computed"):
        model.merge_adapter()
    assert torch.equal(logits(model, rows), expected)


@pytest.mark.parametrize(
    ("dtype", "value", "options"),
    [
        (torch.float32, torch.inf, None),
        (torch.float16, 1e5, None),
        (torch.float16, 1e5, {}),
        (torch.float32, 1e5, {"dequantize": True, "dtype": torch.float16}),
    ],
)
def test_a_row_that_would_not_be_finite_is_not_merged(dtype, value, options):
    model = adapted(fp, tiny.make("qwen2").to(dtype), [1, 3])
    rows_of(model).data[0, 0] = value
    before = model.get_base_model().model.embed_tokens.base_layer.weight
    with pytest.raises(ValueError, match="not finite"):
        if options is None:
            model.merge_adapter(safe_merge=True)
        else:
            model.merge_and_unload(safe_merge=True, **options)
    assert model.get_base_model().model.embed_tokens.base_layer.weight is before


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_new_tokens_of_a_resized_model_travel_with_the_embeddings_that_peft_stores(tmp_path, architecture):
    tiny.make(architecture).save_pretrained(tmp_path / "base")

    def resized():
        model = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        model.resize_token_embeddings(70)  # whose new rows are random, each time others
        return model.eval()

    rows = {"input_ids": torch.randint(60, 70, (3, 9))}
    theirs = adapted(peft, resized(), list(range(64, 70)))
    expected = logits(theirs, rows)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = fp.PeftModel.from_pretrained(resized(), tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    torch.testing.assert_close(logits(ours, rows), expected, rtol=1e-4, atol=1e-5)
    ours.hotswap_adapter(tmp_path / "theirs")
    ours.load_adapter(tmp_path / "theirs", "another")
    assert "base_model.model.model.embed_tokens.token_adapter.base_layer.weight" in load_file(tmp_path / "ours" / FILE)
    assert torch.equal(logits(peft.PeftModel.from_pretrained(resized(), tmp_path / "ours"), rows), expected)
    theirs.save_pretrained(tmp_path / "rows", save_embedding_layers=False)
    alone = load_file(tmp_path / "rows" / FILE)
    assert [key for key in alone if "lora" not in key] == [key for key in alone if key.endswith("tokens_delta")]
    fp.PeftModel.from_pretrained(resized(), tmp_path / "rows")


def several(base):
    """Adapters of which "b" and "c" train the same token, "d" none."""
    model = adapted(fp, base, [1, 2], adapter_name="a")
    for name, tokens in {"b": [3, 4], "c": [4, 5], "d": None}.items():
        model.add_adapter(name, config(fp, tokens))
    tiny.randomize(model)
    return model


def test_the_rows_of_a_batch_use_their_own_and_each_adapter_trains_its_own():
    base, rows = tiny.make("qwen2"), tiny.inputs("qwen2", rows=6, length=32)
    model = several(base)
    names = ["a", "b", "__base__", "c", "d", ["a", "b"]]
    mixed = logits(model, rows, adapter_names=names)
    for i, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                alone = logits(model, rows)
        else:
            model.set_adapter(name)
            alone = logits(model, rows)
        torch.testing.assert_close(mixed[i], alone[i], rtol=1e-4, atol=1e-5)
    model.set_adapter(["a", "b"])
    model(**rows, adapter_names=["a", "b", "a", "b", "__base__", "a"]).loss.backward()
    deltas = model.get_base_model().lm_head.token_adapter["trainable_tokens_delta"]
    assert {name: p.requires_grad for name, p in deltas.items()} == {"a": True, "b": True, "c": False}
    mixed = {name: p.grad for name, p in deltas.items()}
    assert mixed["c"] is None and all(mixed[name].norm() > 0 for name in "ab")
    model.zero_grad()
    for name, chosen in {"a": [0, 2, 5], "b": [1, 3]}.items():
        loss = model(input_ids=rows["input_ids"][chosen], adapter_names=[name] * len(chosen)).logits
        labels = rows["labels"][chosen][:, 1:].flatten()
        (torch.nn.functional.cross_entropy(loss[:, :-1].flatten(0, 1), labels) * len(chosen) / 6).backward()
        torch.testing.assert_close(deltas[name].grad, mixed[name], rtol=1e-4, atol=1e-6)


def test_adapters_with_rows_of_one_token_are_not_used_together():
    model, rows = several(tiny.make("qwen2")), tiny.inputs("qwen2", rows=2)
    said = r"adapters \['b', 'c'\] each bring their own rows for the tokens \[4\]"
    with pytest.raises(ValueError, match=said):
        model.set_adapter(["b", "c"])
    with pytest.raises(ValueError, match=said):
        model.merge_adapter(["b", "c"])
    with pytest.raises(ValueError, match=said):
        logits(model, rows, adapter_names=["a", ["b", "c"]])
    assert model.active_adapters == ["a"]
    with pytest.raises(ValueError, match="'a' has trainable_token_indices, which cannot be combined"):
        model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "sum")


def test_the_last_adapter_with_rows_takes_the_wrappers_along():
    base, rows = tiny.make("qwen2"), tiny.inputs("qwen2")
    model = several(base)
    status = {s.name: s for s in model.get_layer_status()}
    assert status["model.lm_head"].available_adapters == ["a", "b", "c"]
    for name in "abc":
        model.delete_adapter(name)
    assert type(model.get_base_model().lm_head) is torch.nn.Linear
    assert model.active_adapters == ["d"] and torch.isfinite(logits(model, rows)).all()
    model.add_adapter("e", config(fp, {"lm_head": [1]}))  # now that the embedding's are gone


def test_a_hot_swap_takes_rows_of_the_same_tokens_alone(tmp_path):
    base, rows = tiny.make("qwen2"), tiny.inputs("qwen2", length=16)
    model, other = (adapted(fp, base, [1, 3]) for _ in range(2))
    held, expected = rows_of(model), logits(other, rows)
    other.save_pretrained(tmp_path / "other")
    model.hotswap_adapter(tmp_path / "other")
    assert rows_of(model) is held and torch.equal(logits(model, rows), expected)
    model.hotswap_adapter({key: t * 0.5 for key, t in load_file(tmp_path / "other" / FILE).items()})
    assert torch.equal(rows_of(model), rows_of(other) * 0.5)
    adapted(fp, base, [3, 1]).save_pretrained(tmp_path / "turned")
    adapted(fp, base, None).save_pretrained(tmp_path / "none")
    for folder in ("turned", "none"):
        with pytest.raises(ValueError, match="trainable_token_indices is"):
            model.hotswap_adapter(tmp_path / folder)
        with pytest.raises(ValueError, match=r"trainable_token_indices is|other modules"):
            model.load_adapter(tmp_path / folder, "default")
    assert torch.equal(rows_of(model), rows_of(other) * 0.5)


def test_rows_of_one_weight_that_differ_are_refused(tmp_path):
    model = adapted(fp, tiny.make("qwen2"), [1, 3])
    state = fp.get_peft_model_state_dict(model)
    (key,) = (key for key in state if "trainable_tokens_delta" in key)
    tied = "base_model.model.lm_head.token_adapter.trainable_tokens_delta"
    fp.set_peft_model_state_dict(model, state | {tied: state[key].clone()})
    for fill in (fp.set_peft_model_state_dict, fp.PeftModel.hotswap_adapter):
        with pytest.raises(ValueError, match=f"{tied} and {key} differ"):
            fill(model, state | {tied: state[key] + 1})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_train_over_4_bits_and_while_logits_are_put_off(dtype):
    base = fp.accelerate(tiny.quantized(tiny.make("qwen2", dtype)))
    model = fp.get_peft_model(base, config(fp, [1, 3], task_type="CAUSAL_LM")).train()
    tiny.randomize(model)
    assert rows_of(model).dtype is torch.float32
    rows = tiny.inputs("qwen2", length=32)
    before = model(**rows).loss
    before.backward()
    assert all(p.grad.norm() > 0 for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        rows_of(model).sub_(rows_of(model).grad)
    assert model(**rows).loss < before


def test_an_accelerated_model_of_pefts_keeps_its_rows():
    rows = tiny.inputs("qwen2", length=16)
    theirs = adapted(peft, tiny.make("qwen2"), [1, 3])
    expected = logits(theirs, rows)
    theirs(**rows).loss.backward()
    gradient = rows_of(theirs).grad.clone()
    theirs.zero_grad()
    fp.accelerate(theirs)
    torch.testing.assert_close(logits(theirs, rows), expected, rtol=1e-4, atol=1e-5)
    theirs.train()(**rows).loss.backward()
    torch.testing.assert_close(rows_of(theirs).grad, gradient, rtol=1e-4, atol=1e-6)


def test_rows_compile_into_one_graph():
    model, rows = adapted(fp, tiny.make("qwen2"), [1, 3]), tiny.inputs("qwen2", length=16)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(logits(compiled, rows), logits(model, rows), rtol=1e-4, atol=1e-5)
    model(**rows).loss.backward()
    expected = rows_of(model).grad.clone()
    model.zero_grad()
    compiled(**rows).loss.backward()
    torch.testing.assert_close(rows_of(model).grad, expected, rtol=1e-4, atol=1e-6)


def test_a_scaled_embedding_scales_its_rows_and_padding_learns_nothing_from_the_embedding():
    base = tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**tiny._LLAMA, head_dim=8, tie_word_embeddings=True)).eval()
    rows = tiny.inputs("llama", length=16)
    theirs, ours = (adapted(library, base, [0, 1, 3]) for library in (peft, fp))
    tiny.copy_adapters(theirs, ours)
    torch.testing.assert_close(logits(ours, rows), logits(theirs, rows), rtol=1e-4, atol=1e-5)
    for model in (theirs, ours):
        model.get_input_embeddings()(torch.arange(4)).sum().backward()
    assert torch.equal(rows_of(ours).grad, rows_of(theirs).grad) and not rows_of(ours).grad[0].any()


def test_who_multiplies_by_the_weight_of_the_embedding_gets_the_rows():
    base = tiny.make("qwen2")
    model = adapted(fp, base, [1, 3])
    weight = model.get_input_embeddings().weight
    assert torch.equal(weight[[1, 3]], rows_of(model)) and torch.equal(weight[4:], base.lm_head.weight[4:])
    with model.disable_adapter():
        assert torch.equal(model.get_input_embeddings().weight, base.lm_head.weight)


def test_who_multiplies_by_the_weight_gets_what_all_rows_of_a_batch_use():
    base, rows = tiny.make("qwen2"), tiny.inputs("qwen2", rows=2, length=8)
    model = several(base)
    head = model.get_base_model().lm_head
    # As DeBERTa's old head does.
    head.forward = lambda x: x @ model.get_input_embeddings().weight.t()
    for name in ("a", "b", "d"):
        model.set_adapter(name)
        alone = logits(model, rows)
        model.set_adapter("c")
        torch.testing.assert_close(logits(model, rows, adapter_names=[name, name]), alone, rtol=1e-5, atol=1e-6)
    with model.disable_adapter():
        alone = logits(model, rows)
    torch.testing.assert_close(logits(model, rows, adapter_names=["__base__"] * 2), alone, rtol=1e-5, atol=1e-6)


def test_who_asks_a_weight_for_its_dtype_serves_rows_that_differ():
    base, rows = tiny.make("qwen2"), tiny.inputs("qwen2", rows=3, length=8)
    model = several(base)
    head = model.get_base_model().lm_head
    head.register_forward_pre_hook(lambda head, args: args[0].to(head.weight.dtype))  # as Mamba's
    names = ["a", "b", "__base__"]
    mixed = logits(model, rows, adapter_names=names)
    for i, name in enumerate(names):
        one = {key: value[i : i + 1] for key, value in rows.items()}
        torch.testing.assert_close(mixed[i], logits(model, one, adapter_names=[name])[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", [fp.PromptTuningConfig, fp.PrefixTuningConfig])
def test_rows_of_tokens_and_soft_prompts_that_have_none_share_a_batch(method):
    base, rows = tiny.make("bert"), tiny.inputs("bert", rows=3, length=8)
    model = adapted(fp, base, [1, 3], "bert", adapter_name="rows")
    model.add_adapter("prompt", method(num_virtual_tokens=3))
    names = ["rows", "prompt", "__base__"]
    mixed = logits(model, rows, adapter_names=names)
    for i, name in enumerate(names):
        one = {key: value[i : i + 1] for key, value in rows.items()}
        torch.testing.assert_close(mixed[i], logits(model, one, adapter_names=[name])[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("tokens", "kwargs", "message"),
    [
        ([], {}, r"trainable_token_indices is \[\]"),
        ([1, 1], {}, "each once"),
        ([-1], {}, "token numbers"),
        ([True], {}, "token numbers"),
        (["1"], {}, "token numbers"),
        (3, {}, "token numbers"),
        ("12", {}, "token numbers"),
        ({"embed_tokens": []}, {}, r"trainable_token_indices\['embed_tokens'\] is"),
        ([64], {}, "holds 64; 'model.embed_tokens' has 64 tokens"),
        ({"nothing": [1]}, {}, "names 'nothing'"),
        ({"norm": [1]}, {}, "a Qwen2RMSNorm; it must be an Embedding without max_norm or a Linear"),
        ({"q_proj": [1]}, {}, "q_proj', which carries LoRA"),
        ([1], {"target_modules": ["embed_tokens"]}, "'model.embed_tokens', which carries LoRA"),
        ([1], {"target_modules": ["q_proj", "lm_head"]}, "'lm_head', which carries LoRA"),
        ([1], {"modules_to_save": ["embed_tokens"]}, "'model.embed_tokens', a ModulesToSave"),
        ([1], {"modules_to_save": ["lm_head"]}, "'lm_head', a ModulesToSave"),
    ],
)
def test_what_cannot_be_is_refused_and_leaves_the_model_as_it_was(tokens, kwargs, message):
    model = tiny.make("qwen2")
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match=message):
        given = {"target_modules": ["q_proj"], "trainable_token_indices": tokens} | kwargs
        fp.get_peft_model(model, fp.LoraConfig(r=2, **given))
    assert dict(model.named_modules()) == before


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"target_modules": ["embed_tokens"]}, "of which another adapter trains tokens"),
        ({"modules_to_save": ["lm_head"]}, "carries LoRA or tokens of another adapter"),
        ({"trainable_token_indices": {"lm_head": [1]}}, "'lm_head', which carries rows of another adapter"),
    ],
)
def test_a_second_adapter_cannot_have_the_embedding_otherwise(kwargs, message):
    model = adapted(fp, tiny.make("qwen2"), [1])
    before = model.state_dict().keys()
    with pytest.raises(ValueError, match=message):
        model.add_adapter("second", fp.LoraConfig(r=2, **({"target_modules": ["q_proj"]} | kwargs)))
    assert model.state_dict().keys() == before


def captioner():
    """Its decoder's head is tied to the decoder's embedding, and its own configuration does not say so."""
    torch.manual_seed(0)
    vision = tf.ViTConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, image_size=8, patch_size=4
    )
    decoder = tf.GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=4, n_positions=16, add_cross_attention=True)
    config = tf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(vision, decoder)
    model = tf.VisionEncoderDecoderModel(config).eval()
    rows = {"pixel_values": torch.randn(2, 3, 8, 8), "decoder_input_ids": torch.randint(0, 8, (2, 6))}
    return model, rows, "decoder.transformer.wte", "c_attn"


def two_towers():
    """Which of its embeddings is the one for inputs it does not say."""
    torch.manual_seed(0)
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    text, vision = tower | {"vocab_size": 64, "eos_token_id": 63}, tower | {"image_size": 8, "patch_size": 4}
    model = tf.CLIPModel(tf.CLIPConfig(text_config=text, vision_config=vision)).eval()
    rows = {"pixel_values": torch.randn(2, 3, 8, 8), "input_ids": torch.randint(0, 8, (2, 6))}
    return model, rows, "token_embedding", "q_proj"


@pytest.mark.parametrize("make", [captioner, two_towers])
def test_what_has_rows_in_models_of_models_is_what_has_them_in_peft(tmp_path, make):
    base, rows, embedding, target = make()
    config = {"r": 2, "target_modules": [target], "trainable_token_indices": {embedding: [1, 3, 5]}}
    outputs = lambda model: model(**rows)[0].detach()  # noqa: E731
    made = [library.get_peft_model(copy.deepcopy(base), library.LoraConfig(**config)).eval() for library in (peft, fp)]
    for model, library, other in zip(made, ("peft", "fp"), (fp, peft), strict=True):
        tiny.randomize(model)
        model.save_pretrained(tmp_path / library)
        loaded = other.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / library).eval()
        torch.testing.assert_close(outputs(loaded), outputs(model), rtol=1e-4, atol=1e-5)
    expected = outputs(made[1])
    made[1].merge_and_unload().save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(outputs(type(base).from_pretrained(tmp_path / "merged")), expected, rtol=1e-4, atol=1e-5)
