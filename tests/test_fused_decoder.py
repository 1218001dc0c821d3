"""Decoding by the fused stack gives what transformers' own forward gives, and only where it may."""

import contextlib
import copy
import functools
import gc
import io
import math
import pickle
import types
import weakref

import accelerate
import pytest
import torch
import transformers as tf
from accelerate.state import AcceleratorState
from architectures import (
    VOCAB,
    WITH_SCORES,
    HeldPrefix,
    assert_same_answers,
    inputs,
    make,
    quantized,
    randomize,
    vary_vectors,
)
from torch.nn.utils.parametrizations import weight_norm
from transformers.activations import ACT2FN
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral

import pyfastpeft as fp
from pyfastpeft.compiled import C_FUNCTIONS
from pyfastpeft.integrations import fused_decoder
from pyfastpeft.integrations.forwards import remove
from pyfastpeft.integrations.fused_decoder import stack
from pyfastpeft.ops import backends

FAMILIES = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {},
    "smollm3": {"no_rope_layer_interval": 2},
    "granite": {
        "residual_multiplier": 0.4,
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.3,
        "logits_scaling": 2.0,
    },
    "phi3": {"partial_rotary_factor": 0.5},
    "gemma": {"head_dim": 24},
    "gemma3_text": {
        "head_dim": 24,
        "query_pre_attn_scalar": 20,
        "sliding_window": 256,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 50.0}},
    },
}

# What one operator decodes is compared with products that share no kernel with it.
pytestmark = pytest.mark.usefixtures("layers_of_torch")


@pytest.fixture
def served(monkeypatch):
    """For each call that reached a fused decoder, whether the stack served it."""
    calls = []
    few_rows = fused_decoder._FewRows._few_rows

    def spy(self, **kwargs):
        output = few_rows(self, **kwargs)
        calls.append(output is not None)
        return output

    monkeypatch.setattr(fused_decoder._FewRows, "_few_rows", spy)
    return calls


def family(name, dtype=torch.float32, **changes):
    if name in ("llama", "qwen2") and not changes:
        model = make(name, dtype)
    else:
        sizes = {"sliding_window": None, "intermediate_size": 96, "num_hidden_layers": 3}
        changes = sizes | FAMILIES[name] | changes
        config = tf.AutoConfig.for_model(
            name,
            vocab_size=VOCAB,
            hidden_size=64,
            num_attention_heads=4,
            num_key_value_heads=2,
            pad_token_id=0,
            **changes,
        )
        model = vary_vectors(tf.AutoModelForCausalLM.from_config(config)).to(dtype).eval()
    model.generation_config.eos_token_id = None
    return model


def steps(model, ids):
    """What feeds ``ids`` from one position to another to ``model``, and the list that its last logits go to."""
    base, cache, out = model.get_base_model(), tf.DynamicCache(config=model.config), []

    def step(start, end):
        with torch.no_grad():
            out.append(base(input_ids=ids[:, start:end], **{fused_decoder._CACHE: cache}).logits[:, -1])

    return step, out


def adapted(model, **changes):
    config = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | changes
    peft_model = fp.get_peft_model(model, fp.LoraConfig(task_type="CAUSAL_LM", **config))
    randomize(peft_model, std=0.1)  # at 0.2 three layers multiply a rounding by tens
    return peft_model.eval()


def narrowed(model, name, placement="houlsby", activation="gelu", size=5):
    """With a bottleneck."""
    config = fp.BottleneckConfig(
        task_type="CAUSAL_LM", placement=placement, bottleneck_size=size, activation=activation
    )
    if isinstance(model, fp.PeftModel):
        model.add_adapter(name, config)
    else:
        model = fp.get_peft_model(model, config, name)
    randomize(model, std=0.1)
    return model.eval()


def pair(name="llama", dtype=torch.float32, lora=False, dense=False, placement=None, **changes):
    """The same model, in 4 bits or ``dense``, twice: as transformers runs it, and fused.

    With LoRA or with bottlenecks at ``placement``.
    """
    plain = family(name, dtype, **changes)
    if not dense:
        plain = quantized(plain)
    if lora or placement:
        plain = adapted(plain) if lora else narrowed(plain, "default", placement)
        remove(plain)
        plain.set_attn_implementation("sdpa")
    fused = copy.deepcopy(plain)
    fp.accelerate(fused)
    return plain, fused


def generate(model, ids, mask=None, n=8, **kwargs):
    options = {"max_new_tokens": n, "do_sample": False, "pad_token_id": 0} | kwargs
    return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids) if mask is None else mask, **options)


def logits_along(model, ids, chunks, mask=None):
    """Logits of ``ids`` given in chunks over one cache."""
    cache, out, start = tf.DynamicCache(config=model.config), [], 0
    with torch.no_grad():
        for length in chunks:
            end = start + length
            seen = None if mask is None else mask[:, :end]
            out.append(model(input_ids=ids[:, start:end], attention_mask=seen, **{fused_decoder._CACHE: cache}).logits)
            start = end
    return torch.cat(out, 1)


def outcome_of(call, *arguments):
    """What it returns, or what its error says."""
    try:
        return call(*arguments)
    except (RuntimeError, ValueError) as error:
        return str(error)


ADAPTERS = [{"lora": True}, {"placement": "houlsby"}, {"placement": "pfeiffer"}]


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("adapter", [{}, *ADAPTERS], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_equal_the_unfused_models(isa, name, adapter, dense, served):
    plain, fused = pair(name, dense=dense, **adapter)
    ids = torch.randint(1, VOCAB, (7, 20))
    chunks = [10, 1, 1, 2, 5, 1]
    expected, got = logits_along(plain, ids, chunks), logits_along(fused, ids, chunks)
    assert served == [False] + [True] * 5
    assert torch.allclose(got, expected, rtol=1e-5, atol=1e-5 * expected.abs().max())


@pytest.mark.parametrize("layers", [[0], [1], [0, 1]], ids=str)
@pytest.mark.parametrize("before", [False, True])
def test_a_rotary_embedding_that_the_kernels_library_exchanged_is_heeded(before, layers, served):
    plain, fused = pair()
    if not hasattr(plain.model.layers[0].self_attn, "_kernel_funcs"):
        pytest.skip("transformers has no kernels library here, or not of a version it takes")
    ids, chunks = torch.randint(1, VOCAB, (2, 8)), [5, 1, 2]
    rotated = logits_along(plain, ids, chunks)
    if not before:
        logits_along(fused, ids, chunks)
        served.clear()
    for model in (plain, fused):
        for i in layers:
            for function in model.model.layers[i].self_attn._kernel_funcs.values():
                function.forward = types.MethodType(lambda self, q, k, cos, sin: (2 * q, k), function)
    expected, got = logits_along(plain, ids, chunks), logits_along(fused, ids, chunks)
    assert not torch.allclose(expected, rotated, rtol=1e-3)
    assert served == [False] * 3
    assert torch.allclose(got, expected, rtol=1e-5, atol=1e-5 * expected.abs().max())


@pytest.mark.parametrize("name", FAMILIES)
def test_one_position_for_all_tokens_of_a_row_is_spread_as_by_transformers(name):
    plain, fused = pair(name)
    ids = torch.randint(1, VOCAB, (2, 5))
    with torch.no_grad():
        for rows in (1, 2):
            for use_cache in (True, False):  # by the stack, and by the layers
                options = {"position_ids": torch.tensor([[3], [4]])[:rows], "use_cache": use_cache}
                expected, got = (m(input_ids=ids, **options).logits for m in (plain, fused))
                assert torch.allclose(got, expected, rtol=1e-5, atol=1e-5 * expected.abs().max())


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("adapter", ADAPTERS, ids=str)
def test_sixteen_bits_err_no_more_than_the_unfused_model(isa, adapter, dtype, inference, dense, served):
    plain, fused = pair(dtype=dtype, dense=dense, **adapter)
    exact = copy.deepcopy(plain).float()
    for model in (plain, fused):
        model.set_adapter("default", inference_mode=inference)  # for inference: packed
    ids = torch.randint(1, VOCAB, (7, 20))
    chunks = [10, 1, 1, 1, 1, 3, 1, 1, 1]
    expected, unfused, got = (logits_along(m, ids, chunks).float() for m in (exact, plain, fused))
    assert served.count(True) == 8
    assert (got - expected).norm() <= 1.5 * (unfused - expected).norm() + 1e-3 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["smollm3", "granite", "phi3", "gemma", "gemma3_text"])
def test_sixteen_bits_err_no_more_in_families_with_ways_of_their_own(isa, name, dtype, served):
    plain, fused = pair(name, dtype=dtype)
    exact, ids, chunks = copy.deepcopy(plain).float(), torch.randint(1, VOCAB, (7, 20)), [10, 1, 1, 1, 1, 3, 1, 1, 1]
    expected, unfused, got = (logits_along(m, ids, chunks).float() for m in (exact, plain, fused))
    assert served.count(True) == 8
    assert (got - expected).norm() <= 1.5 * (unfused - expected).norm() + 1e-3 * expected.norm()


@pytest.mark.parametrize("size", [0.0, 1e-30, 3.0, 100.0, 1e10, math.nan])
def test_gates_of_any_size_go_through_gelu(isa, size, served):
    models = pair("gemma", dense=True)
    for model in models:
        for layer in model.model.layers:
            layer.mlp.gate_proj.weight.data *= size
            layer.mlp.down_proj.weight.data /= max(1, size)
    ids = torch.randint(1, VOCAB, (2, 5))
    expected, got = (logits_along(model, ids, [2, 1, 2]) for model in models)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5, equal_nan=True)
    assert all(served)


@pytest.mark.parametrize("name", ["llava", "llava_onevision", "voxtral"])
def test_a_model_of_several_modalities_decodes_from_embeddings(name, served):
    config = {"model_type": "llama", "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96}
    config |= {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    part = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    sizes = (
        {"audio_config": part}
        if name == "voxtral"
        else {"vision_config": {"model_type": "siglip_vision_model", **part}}
    )
    config = tf.AutoConfig.for_model(name, text_config=config, **sizes)
    plain = quantized(tf.AutoModelForMultimodalLM.from_config(config).eval())
    fused = fp.accelerate(copy.deepcopy(plain))
    ids = torch.randint(1, VOCAB, (2, 7))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    assert_same_answers(*(generate(model, ids, mask, eos_token_id=-1, **WITH_SCORES) for model in (fused, plain)))
    assert served == [True] * 8


@pytest.mark.parametrize("name", ["gemma", "gemma3_text"])
def test_a_decoder_that_sees_what_follows_is_served_a_token_at_a_time(name, served):
    """PaliGemma's is one."""
    plain, fused = pair(name, dense=True, use_bidirectional_attention=True)
    ids, chunks = torch.randint(1, VOCAB, (2, 10)), [4, 1, 3, 1, 1]
    for model in (plain, fused):
        model.set_attn_implementation("eager")
    expected, got = (logits_along(model, ids, chunks) for model in (plain, fused))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert served == [length == 1 for length in chunks]


def test_layers_of_the_int8_tier_stay_in_it(isa, served):
    def set_compute(tier):
        for model in (plain, fused):
            for module in model.modules():
                if isinstance(module, fp.nn.Linear4bit):
                    module.compute = tier

    plain, fused = pair(lora=True)
    equal, apart, rounded = [], 0.0, 0.0
    # A difference in the last bit rounds, now and then, one activation to another of the 8-bit values.
    for _ in range(16):  # of 8 one alone could be more than what is allowed of all
        ids = torch.randint(1, VOCAB, (2, 14))
        set_compute(None)
        exact = logits_along(fused, ids, [9] + [1] * 5)
        set_compute("int8")
        served.clear()
        expected, got = (logits_along(m, ids, [9] + [1] * 5) for m in (plain, fused))
        equal.append(torch.allclose(got, expected, rtol=1e-4, atol=1e-4 * expected.abs().max()))
        apart += (got - expected).norm()
        rounded += (expected - exact).norm()
        assert not torch.allclose(got, exact, rtol=1e-4, atol=1e-4 * expected.abs().max())
        assert served.count(True) == 6
    assert any(equal)
    assert apart <= 0.1 * rounded


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("name", FAMILIES)
def test_answers_are_the_same_over_each_cache_also_with_padding(name, kind, served):
    plain, fused = pair(name, lora=True)
    ids = torch.randint(1, VOCAB, (10, 7))
    mask = torch.ones_like(ids)
    mask[0, :4], mask[2, :1] = 0, 0
    for options in ({}, {"mask": mask}, {"mask": mask, "num_beams": 2}):
        served.clear()
        options |= WITH_SCORES
        got = generate(fused, ids, cache_implementation=kind, **options)
        assert_same_answers(got, generate(plain, ids, **options))
        # Gemma 3's windows have static layers of their own.
        assert served == [False] + [(name, kind) != ("gemma3_text", "static")] * 7


@pytest.mark.parametrize("dtype", [torch.long, torch.bool], ids=str)
def test_a_hidden_token_anywhere_is_hidden(dtype, served):
    plain, fused = pair()
    ids = torch.randint(1, VOCAB, (2, 9))
    mask = torch.ones_like(ids, dtype=dtype)  # of which a part, of the first keys, is not contiguous
    mask[0, 0], mask[1, 3], mask[1, 6] = 0, 0, 0
    expected, got = (logits_along(m, ids, [4, 1, 3, 1], mask) for m in (plain, fused))
    visible = mask.bool()
    assert torch.allclose(got[visible], expected[visible], rtol=1e-5, atol=1e-5)
    assert served.count(True) == 4


def test_other_ways_to_generate_give_the_same(served):
    plain, fused = pair(lora=True)
    ids = torch.randint(1, VOCAB, (2, 6))
    for options in (
        {"num_beams": 3},
        {"num_beams": 2, "do_sample": True},
        {"do_sample": True, "top_k": 5},
        {"cache_implementation": "static"},
        {"use_cache": False},
        {"num_return_sequences": 3, "do_sample": True},
        WITH_SCORES,
    ):
        outputs = []
        for model in (plain, fused):
            torch.manual_seed(0)
            outputs.append(generate(model, ids, **options))
        expected, got = outputs
        if isinstance(got, torch.Tensor):
            assert torch.equal(got, expected), options
        else:
            assert torch.equal(got.sequences, expected.sequences)
            assert torch.allclose(torch.stack(got.scores), torch.stack(expected.scores), rtol=1e-4, atol=1e-4)
    assert any(served)


def test_assisted_generation_crops_the_cache_and_gives_the_same(served):
    plain, fused = pair()
    helper = quantized(family("llama"))
    fp.accelerate(helper)
    ids = torch.randint(1, VOCAB, (1, 6))
    expected = generate(plain, ids, n=20, **WITH_SCORES)
    assert_same_answers(generate(fused, ids, assistant_model=helper, n=20, **WITH_SCORES), expected)
    assert_same_answers(generate(fused, ids, prompt_lookup_num_tokens=3, n=20, **WITH_SCORES), expected)
    assert any(served)


@pytest.mark.parametrize("lora", [False, True])
def test_a_generation_that_exits_early_to_guess_gives_the_same(lora, served):
    plain, fused = pair("qwen3", lora=lora)
    ids = torch.randint(1, VOCAB, (1, 6))
    for exit_after in (1, 2):
        got = generate(fused, ids, assistant_early_exit=exit_after, **WITH_SCORES)
        assert_same_answers(got, generate(plain, ids, **WITH_SCORES))
    assert any(served)


def test_a_static_cache_is_written_in_place(served):
    plain, fused = pair()
    ids = torch.randint(1, VOCAB, (2, 10))
    outputs = []
    for model in (plain, fused):
        cache = tf.StaticCache(config=model.config, max_cache_len=16)
        with torch.no_grad():
            parts = [model(input_ids=c, **{fused_decoder._CACHE: cache}).logits for c in ids.split([5, 1, 3, 1], 1)]
        outputs.append((torch.cat(parts, 1), int(cache.get_seq_length()), cache.layers[1].keys))
    (expected, length, keys), (got, same_length, same_keys) = outputs
    assert length == same_length == 10 and torch.allclose(keys, same_keys, rtol=1e-5, atol=1e-5)
    assert torch.allclose(got, expected, rtol=1e-5, atol=1e-5) and served.count(True) == 4


def test_a_static_cache_that_is_full_says_so_itself():
    _, fused = pair()
    cache = tf.StaticCache(config=fused.config, max_cache_len=3)
    with torch.no_grad(), pytest.raises(IndexError, match="out of bounds"):
        for _ in range(4):
            fused(input_ids=torch.ones(1, 1, dtype=torch.int64), **{fused_decoder._CACHE: cache})


def test_tokens_on_a_device_ask_nothing_of_its_cache(monkeypatch):
    _, fused = pair(dense=True)
    cache = tf.StaticCache(config=fused.config, max_cache_len=16)
    monkeypatch.setattr(tf.cache_utils.StaticLayer, "get_seq_length", lambda *_: pytest.fail("this waits for a GPU"))
    token = torch.ones(1, 1, dtype=torch.int64, device="meta")
    assert fused.model.forward._few_rows(input_ids=token, use_cache=True, **{fused_decoder._CACHE: cache}) is None


def test_a_cache_stays_an_ordinary_cache():
    """Cropped, copied, reordered or kept: what is appended to one never shows in another."""
    plain, fused = pair()
    ids = torch.randint(1, VOCAB, (2, 6))

    def step(model, cache, token):
        with torch.no_grad():
            return model(input_ids=torch.full((2, 1), token), **{fused_decoder._CACHE: cache}).logits

    def history(model):
        cache = tf.DynamicCache(config=model.config)
        with torch.no_grad():
            model(input_ids=ids, **{fused_decoder._CACHE: cache})
        out = [step(model, cache, 3), step(model, cache, 4)]
        kept, deep, shallow = cache.layers[0].keys, copy.deepcopy(cache), copy.copy(cache)
        shallow.layers = [copy.copy(layer) for layer in cache.layers]
        before = kept.clone()
        cache.crop(-2)
        out.append(step(model, cache, 5))
        assert torch.equal(kept, before)
        out += [step(model, deep, 6), step(model, shallow, 7), step(model, cache, 8)]
        cache.reorder_cache(torch.tensor([1, 0]))
        out += [step(model, cache, 9), step(model, deep, 9), step(model, shallow, 9)]
        cache.batch_repeat_interleave(2)
        assert cache.layers[0].keys.shape[0] == 4 and cache.get_seq_length() == 9
        return torch.cat(out, 1)

    assert torch.allclose(history(fused), history(plain), rtol=1e-5, atol=1e-5)


def test_a_cache_grows_far_past_its_first_room(served):
    plain, fused = pair()
    ids = torch.randint(1, VOCAB, (1, 4))
    assert_same_answers(*(generate(model, ids, n=150, **WITH_SCORES) for model in (fused, plain)))
    assert served.count(True) == 150


# ---- adapters --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_adapters_take_effect_at_the_next_token(dtype, dense, served):
    model = family("llama", dtype)
    model = adapted(model if dense else quantized(model))
    model.add_adapter("other", fp.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    randomize(model, std=0.1)  # as in `adapted`
    for name in ("other", "default"):
        model.set_adapter(name, inference_mode=True)
    plain = copy.deepcopy(model)
    remove(plain)
    ids = torch.randint(1, VOCAB, (1, 12))

    def tokens(m):
        step, out = steps(m, ids)
        torch.manual_seed(1)
        step(0, 4)
        step(4, 5)
        m.set_adapter("other")
        step(5, 6)
        with m.disable_adapter():
            step(6, 7)
        m.set_adapter("default")
        step(7, 8)
        state = fp.get_peft_model_state_dict(m)
        m.hotswap_adapter({key: torch.full_like(value, 0.1) for key, value in state.items()}, "default")
        step(8, 9)
        m.merge_adapter()
        step(9, 10)
        m.unmerge_adapter()
        m.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight = torch.nn.Parameter(
            torch.zeros_like(m.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight)
        )
        step(10, 11)
        m.base_model.model.model.norm.weight.data = torch.ones(32, dtype=dtype)
        step(11, 12)
        return torch.cat(out)

    expected, got = tokens(plain), tokens(model)
    tolerance = 1e-5 if dtype == torch.float32 else 4e-2
    assert (got - expected).norm() <= tolerance * expected.norm()
    assert served == [True] * 9


def three_adapters(dtype=torch.float32, dense=False, **packed):
    """For inference, of different ranks (an odd sum), modules and scalings; and the model without the stack."""
    model = family("llama", dtype)
    model = adapted(model if dense else quantized(model, **packed))
    model.add_adapter("short", fp.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    model.add_adapter("odd", fp.LoraConfig(r=5, lora_alpha=3, target_modules=["q_proj", "o_proj", "up_proj"]))
    randomize(model, std=0.1)
    for name in ("short", "odd", "default"):
        model.set_adapter(name, inference_mode=True)
    return without_stack(model), model


def without_stack(model):
    plain = copy.deepcopy(model)
    remove(plain)
    plain.set_attn_implementation("sdpa")
    return plain


BOTTLENECKS = {"gelu": "houlsby", "relu": "pfeiffer", "silu": "houlsby", "tanh": "pfeiffer"}
"""Activation → placement."""


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_that_choose_and_several_active_adapters(isa, dtype, dense, served):
    _, model = three_adapters(dtype, dense)
    for size, (name, placement) in enumerate(BOTTLENECKS.items(), 3):
        narrowed(model, name, placement, name, size)
    plain = without_stack(model)
    ids = torch.randint(1, VOCAB, (4, 29))
    exact = copy.deepcopy(plain).float()

    def along(m, active=None, names=None):
        m.set_adapter(active or "default")
        cache, out = tf.DynamicCache(config=m.config), []
        with torch.no_grad():
            for part in ids.split([17, 1, 10, 1], 1):
                rows = {} if names is None else {"adapter_names": names}
                out.append(m(input_ids=part, **{fused_decoder._CACHE: cache}, **rows).logits)
        return torch.cat(out, 1).float()

    for active, names in (
        (["default", "odd"], None),
        (["short", "odd", "default"], None),
        (None, ["default", "odd", "__base__", "short"]),
        (None, ["short", ["default", "odd"], "odd", "odd"]),
        (None, ["__base__"] * 4),
        (["gelu", "default", "tanh", "relu"], None),
        (None, list(BOTTLENECKS)),
        (None, ["gelu", "__base__", "odd", ["relu", "short", "gelu"]]),
    ):
        served.clear()
        expected, unfused, got = (along(m, active, names) for m in (exact, plain, model))
        assert served == [False, True, True, True], (active, names)
        if dtype is torch.float32:
            assert torch.allclose(got, expected, rtol=1e-5, atol=1e-5 * expected.abs().max())
        else:
            assert (got - expected).norm() <= 1.5 * (unfused - expected).norm() + 1e-3 * expected.norm()


@pytest.mark.parametrize("names", [None, ["default", "__base__", ["default", "other"]]])
def test_adapters_for_inference_over_a_weight_of_odd_width(isa, names, served):
    """Which pairs of columns do not fill: the last one is alone, and weighs as much as all others.

    bfloat16 products also round s = x · Aᵀ, which torch does not, by no more than it rounds the product: sqrt(2) times
    the error. Of one layer, since three multiply a rounding by tens: one token's may be most of the error.
    """
    _, fused = pair("llama", torch.bfloat16, lora=True, dense=True, intermediate_size=77, num_hidden_layers=1)
    fused.add_adapter("other", fp.LoraConfig(r=3, target_modules=["down_proj"]))
    randomize(fused, std=0.1)
    down = fused.get_base_model().model.layers[0].mlp.down_proj
    for weight in (down.base_layer.weight, *(a.weight for a in down.lora_A.values())):
        weight.data[:, -1] *= 8
    for name in ("other", "default"):
        for parameter in fused.base_model.tensors(name).values():
            parameter.data = parameter.data.bfloat16().float()  # as pairs are
        fused.set_adapter(name, inference_mode=True)
    plain = without_stack(fused)
    exact, rows = copy.deepcopy(plain).float(), {} if names is None else {"adapter_names": names}
    for length in (5, 20):
        served.clear()
        ids = torch.randint(1, VOCAB, (3, length))
        cache = [{fused_decoder._CACHE: tf.DynamicCache(config=plain.config)} for _ in range(3)]
        with torch.no_grad():
            got = fused(input_ids=ids, **rows, **cache[0]).logits.float()
            with pytest.MonkeyPatch.context() as patch:  # else the layers by themselves may share what is wrong
                patch.setattr(backends, "_FORCED", backends.Backend.REFERENCE)
                expected, unfused = (
                    m(input_ids=ids, **rows, **c).logits.float() for m, c in zip((exact, plain), cache[1:], strict=True)
                )
        assert served == [True]
        assert (got - expected).norm() <= 1.5 * (unfused - expected).norm() + 1e-3 * expected.norm()


@pytest.mark.parametrize("rows", [17, 31, 32, 33, 64, 65])
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("base", ["nf4", "int4", "dense"])
def test_a_row_among_many_is_what_it_is_alone(isa, base, mixed, rows, served):
    plain, model = three_adapters(dense=base == "dense", quant_type=base)
    names = ["default", "odd", "__base__", ["default", "odd"], "short"] if mixed else ["default"]
    names = (names * rows)[:rows]
    ids, mask = torch.randint(1, VOCAB, (rows, 8)), torch.ones(rows, 8, dtype=torch.long)
    mask[::3, :2] = 0

    def along(m, kept):
        cache, out = tf.DynamicCache(config=m.config), []
        for start, end in ((0, 6), (6, 7), (7, 8)):
            given = {"attention_mask": mask[kept, :end], "adapter_names": names[kept], fused_decoder._CACHE: cache}
            with torch.no_grad():
                out.append(m(input_ids=ids[kept, start:end], **given).logits[:, -1])
        return torch.stack(out, 1)

    got = along(model, slice(None))
    assert served == [False] + [rows <= 64] * 2
    close = functools.partial(torch.allclose, rtol=1e-5, atol=1e-5 * float(got.abs().max()))
    assert close(got, along(plain, slice(None)))
    for i in (0, 16, rows - 1):
        assert close(got[i : i + 1], along(model, slice(i, i + 1)))


@pytest.mark.parametrize(
    ("dtype", "dense", "outruns", "most"),
    [
        (torch.bfloat16, True, False, 16),
        (torch.bfloat16, True, True, 64),
        (torch.bfloat16, False, False, 64),
        (torch.float32, True, False, 64),
    ],
    ids=str,
)
def test_more_rows_than_a_tile_by_wide_weights_in_bfloat16_are_left_to_layers_that_are_torchs(
    dtype, dense, outruns, most, served, monkeypatch
):
    monkeypatch.setattr(stack, "_WIDE", 16)
    monkeypatch.setattr(stack, "outruns_torch", lambda dtype: outruns)
    _, fused = pair(dtype=dtype, dense=dense)
    for rows in (16, 17, 64, 65):
        served.clear()
        logits_along(fused, torch.randint(1, VOCAB, (rows, 2)), [1, 1])
        assert served == [rows <= most] * 2


@pytest.mark.parametrize("names", [None, ["short", "odd"]])
@pytest.mark.parametrize("active", [["short"], ["short", "odd"]])
def test_adapters_that_decoded_while_they_trained_are_served_as_any_for_inference(active, names, served):
    _, model = three_adapters(torch.bfloat16)
    ids, rows = torch.randint(1, VOCAB, (2, 6)), {} if names is None else {"adapter_names": names}
    logits = []
    for inference in (True, False, True):
        for name in ("short", "odd"):
            model.set_adapter(name, inference_mode=inference)
        model.set_adapter(active)
        served.clear()
        output = generate(model, ids, output_logits=True, return_dict_in_generate=True, **rows)
        assert any(served) is (inference or (names is None and len(active) == 1))
        logits.append(torch.stack(output.logits))
    assert torch.equal(logits[2], logits[0])  # by packed copies again


def test_rows_that_choose_see_what_changes_and_nothing_of_each_other(served):
    plain, model = three_adapters()
    ids = torch.randint(1, VOCAB, (2, 6))
    rows = {"adapter_names": ["odd", "short"]}

    def layer(m):
        return m.base_model.model.model.layers[1].self_attn.q_proj

    def check(serves):
        served.clear()
        expected, got = (generate(m, ids, **rows) for m in (plain, model))
        assert torch.equal(got, expected) and any(served) is serves
        return got

    first = check(True)
    beams = {"num_beams": 3, "num_return_sequences": 3}
    assert torch.equal(generate(model, ids, **rows, **beams), generate(plain, ids, **rows, **beams))
    for m in (plain, model):
        state = {k: v * 3 for k, v in fp.get_peft_model_state_dict(m, adapter_name="short").items()}
        m.hotswap_adapter(state, "short")
    check(True)
    for m in (plain, model):
        layer(m).set_scaling("odd", 40.0)
        m.base_model.bank.refresh()
    check(True)
    for m in (plain, model):
        layer(m).set_scaling("odd", 0.6)
        m.base_model.bank.refresh()
        layer(m).lora_B["short"].weight.data[3, 1] = torch.nan
        layer(m)._changed()
    served.clear()
    assert torch.equal(generate(model, ids, **rows)[0], first[0]) and not any(served)
    with pytest.raises(ValueError, match="adapter_names"):
        generate(model, ids, adapter_names=["odd", "short", "odd"])


def built(monkeypatch):
    """The stacks that are built from now on, by the models they are of."""
    models, build = [], stack.Stack._build

    def spy(self, model):
        models.append(model)
        build(self, model)

    monkeypatch.setattr(stack.Stack, "_build", spy)
    return models


def test_requests_in_turn_build_a_stack_for_each_choice_of_rows(served, monkeypatch):
    plain, model = three_adapters()
    choices = [["default"], ["odd"], ["short"], ["__base__"], ["default", "odd"], ["odd", "default"], ["short", "odd"]]
    ids = [torch.randint(1, VOCAB, (len(names), 8)) for names in choices]
    built_for = built(monkeypatch)

    def in_turn(m):
        caches, last = [[tf.DynamicCache(config=m.config) for _ in range(2)] for _ in choices], []
        for at in range(8):
            for names, rows, requests in zip(choices, ids, caches, strict=True):
                for cache in requests:
                    held = {fused_decoder._CACHE: cache}
                    with torch.no_grad():
                        last.append(m(input_ids=rows[:, at : at + 1], adapter_names=names, **held).logits)
        return last[-2 * len(choices) :]

    torch.testing.assert_close(in_turn(model), in_turn(plain), rtol=1e-4, atol=1e-4)
    assert all(served) and len(built_for) == len(choices)


def test_rows_choose_the_adapter_that_has_the_name_now(served):
    """Also where no layer has another plan, as none is active."""
    model = adapted(quantized(family("llama")), inference_mode=True)
    model.set_adapter([])
    ids = torch.randint(1, VOCAB, (2, 6))

    def logits(**kwargs):
        with torch.no_grad():
            return model(input_ids=ids, adapter_names=["other", "__base__"], **kwargs).logits

    for targets in (["v_proj"], ["v_proj"], ["v_proj", "up_proj"]):
        model.add_adapter("other", fp.LoraConfig(r=4, target_modules=targets, inference_mode=True))
        randomize(model, std=0.1)
        expected, got = logits(use_cache=False), logits(**{fused_decoder._CACHE: tf.DynamicCache(config=model.config)})
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        assert served[-2:] == [False, True]
        model.delete_adapter("other")


@pytest.mark.parametrize("active", [["default"], ["default", "odd"]])
def test_what_is_swapped_into_inference_tensors_takes_effect(active):
    with torch.inference_mode():
        _, model = three_adapters(torch.bfloat16)
        model.set_adapter(active, inference_mode=True)
        ids = torch.randint(1, VOCAB, (2, 6))
        before = logits_along(model, ids, (4, 1, 1))
        tensors = model.base_model.tensors("default")
        model.hotswap_adapter({key: 0.1 * torch.randn_like(t) for key, t in tensors.items()}, "default")
        after, expected = logits_along(model, ids, (4, 1, 1)), model(input_ids=ids, use_cache=False).logits
    assert (after - expected).abs().max() < 0.1 * (after - before).abs().max()


@pytest.mark.parametrize("dense", [False, True])
def test_weights_that_are_out_of_the_model_leave_memory_with_the_next_token(dense, served):
    model = family("llama")
    model = adapted(fp.accelerate(model if dense else quantized(model)))
    ids = torch.randint(1, VOCAB, (1, 5))

    def weights():
        generate(model, ids, n=2)
        layers = [module.base_layer for module in model.modules() if isinstance(module, fp.nn.LoraLinear)]
        return [weakref.ref(layer.weight if dense else layer.packed) for layer in layers]

    own = weights()
    model.merge_adapter()
    merged = weights()
    model.unmerge_adapter()
    weights()
    gc.collect()
    assert not any(ref() for ref in merged)
    model = model.merge_and_unload()
    weights()
    gc.collect()
    assert all(served) and len(own) > 7 and not any(ref() for ref in own)


@pytest.mark.parametrize("active", [["odd"], ["default", "odd"]])
def test_factors_that_are_computed_from_other_parameters_go_the_ordinary_way(active, served):
    plain, model = three_adapters()
    ids = torch.randint(1, VOCAB, (2, 6))
    found = []
    for m in (plain, model):
        m.set_adapter(active, inference_mode=True)
        served.clear()
        before = logits_along(m, ids, (4, 1, 1))
        assert any(served) is (m is model)
        part = m.base_model.model.model.layers[1].self_attn.o_proj.lora_B["odd"]
        weight_norm(part)
        served.clear()
        torch.testing.assert_close(logits_along(m, ids, (4, 1, 1)), before, rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            part.parametrizations.weight.original0.mul_(40)
        found.append(logits_along(m, ids, (4, 1, 1)))
        assert not any(served) and (found[-1] - before).abs().max() > 1e-2
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dense", [False, True])
def test_pefts_own_layers_are_served_and_obeyed(dense, served):
    peft = pytest.importorskip("peft")
    model = family("llama")
    if not dense:
        model = quantized(model)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_dropout=0.2, target_modules="all-linear"))
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    randomize(model)
    plain = copy.deepcopy(model.eval())
    fp.accelerate(model)
    ids = torch.randint(1, VOCAB, (1, 12))

    def tokens(m):
        step, out = steps(m, ids)
        step(0, 4)
        step(4, 5)
        m.set_adapter("other")
        step(5, 6)
        with m.disable_adapter():
            step(6, 7)
        m.base_model.set_adapter(["default", "other"])
        step(7, 8)
        m.set_adapter("default")
        m.base_model.model.model.layers[0].self_attn.v_proj.set_scale("default", 3.0)
        step(8, 9)
        m.train()
        torch.manual_seed(0)
        step(9, 10)
        return torch.cat(out)

    expected, got = tokens(plain), tokens(model)
    assert torch.allclose(got, expected, rtol=1e-4, atol=1e-4 * expected.abs().max())
    assert served == [True, True, True, True, False, True, False]


def test_what_the_stack_does_not_know_goes_the_ordinary_way(served):
    ids = torch.randint(1, VOCAB, (2, 6))
    for changes in ({"use_dora": True}, {"lora_bias": True}):
        model = adapted(quantized(family("llama")), **changes)
        model.set_adapter("default", inference_mode=True)
        asked = ({}, {"adapter_names": ["default", "__base__"]})
        expected = [generate(model, ids, **rows) for rows in asked]
        fp.accelerate(model)
        assert all(torch.equal(generate(model, ids, **rows), e) for rows, e in zip(asked, expected, strict=True))
    model = adapted(quantized(family("llama")))
    model.add_adapter("other", fp.LoraConfig(r=2, target_modules=["q_proj"]))
    randomize(model)
    names = ["default", "other"]
    expected = generate(model, ids, adapter_names=names)
    fp.accelerate(model)
    assert torch.equal(generate(model, ids, adapter_names=names), expected)
    half = family("llama").double()
    expected = generate(half, ids)
    fp.accelerate(half)
    assert torch.equal(generate(half, ids), expected)
    assert not any(served)


def test_a_dense_weight_counts_as_it_is_now(served):
    """It may be written, replaced, cast or made anew, unlike a packed one."""
    plain, fused = pair(dense=True)
    ids = torch.randint(1, VOCAB, (2, 12))

    def logits(model):
        layers, cache, out = model.model.layers, tf.DynamicCache(config=model.config), []

        def step(start, end):
            with torch.no_grad():
                out.append(model(input_ids=ids[:, start:end], **{fused_decoder._CACHE: cache}).logits[:, -1])

        step(0, 5)
        step(5, 6)
        with torch.no_grad():
            layers[0].mlp.up_proj.weight.mul_(1.5)
        step(6, 7)
        layers[1].self_attn.v_proj.weight.data = layers[1].self_attn.v_proj.weight.data.t().contiguous().t()
        step(7, 8)
        layers[1].mlp.gate_proj.weight = torch.nn.Parameter(layers[1].mlp.gate_proj.weight * 0.5)
        step(8, 9)
        layers[0].self_attn.q_proj = torch.nn.Linear(*layers[0].self_attn.q_proj.weight.shape[::-1], bias=True)
        torch.nn.init.constant_(layers[0].self_attn.q_proj.weight, 0.01)
        torch.nn.init.constant_(layers[0].self_attn.q_proj.bias, 0.1)
        step(9, 10)
        layers[0].self_attn.q_proj.weight.data = layers[0].self_attn.q_proj.weight.data.bfloat16()
        with pytest.raises(RuntimeError, match="dtype"):
            step(10, 11)
        return torch.cat(out)

    assert torch.allclose(logits(fused), logits(plain), rtol=1e-5, atol=1e-5)
    assert served.count(True) == 6


def test_a_bias_that_torch_spreads_goes_the_ordinary_way(served):
    for shape in ((), (1,), (1, 32)):
        models, bias, ids = pair(dense=True), torch.randn(shape), torch.randint(1, VOCAB, (2, 6))
        for model in models:
            model.model.layers[0].self_attn.o_proj.bias = torch.nn.Parameter(bias)
        expected, got = (logits_along(model, ids, [2, 1, 3]) for model in models)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert not any(served)


def test_a_weight_of_no_elements_goes_the_ordinary_way(served):
    models, ids = pair(dense=True, intermediate_size=0), torch.randint(1, VOCAB, (2, 6))
    expected, got = (logits_along(model, ids, [4, 1, 1]) for model in models)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert not any(served)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("part", ["bias", "lora_A", "lora_B"])
def test_parts_of_float64_go_the_ordinary_way(part, dense, served):
    models, ids = pair("qwen2", lora=True, dense=dense), torch.randint(1, VOCAB, (2, 6))
    for model in models:
        layer = model.get_base_model().model.layers[1].self_attn.q_proj
        if part == "bias":
            layer.base_layer.bias.data = layer.base_layer.bias.data.double()
        else:
            getattr(layer, part).double()
    expected, got = (outcome_of(logits_along, model, ids, [4, 1, 1]) for model in models)
    if isinstance(expected, str):
        assert got == expected
    else:
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert not any(served)


def test_a_model_whose_parts_have_another_dtype_goes_the_ordinary_way(served):
    ids = torch.randint(1, VOCAB, (2, 6))
    plain, fused = pair(dtype=torch.bfloat16)
    for model in (plain, fused):
        for name, module in model.named_modules():
            if "norm" in name:
                module.float()  # as peft's prepare_model_for_kbit_training does
    outputs = [outcome_of(generate, model, ids) for model in (plain, fused)]
    assert str(outputs[0]) == str(outputs[1]) and not any(served)
    plain, fused = pair(dtype=torch.bfloat16)
    generate(fused, ids)
    assert any(served)
    assert torch.equal(generate(fused.float(), ids), generate(plain.float(), ids))
    fused.model.layers[1].mlp.up_proj.compute_dtype = torch.bfloat16
    served.clear()
    generate(fused, ids)
    assert not any(served)


@pytest.mark.parametrize("first", [torch.float32, torch.float64])
def test_a_model_that_was_cast_is_served_in_its_new_dtype(first, served):
    plain, fused = pair(dense=True)
    ids = torch.randint(1, VOCAB, (2, 6))
    for dtype in (first, torch.bfloat16, torch.float32):
        served.clear()
        got = logits_along(fused.to(dtype), ids, (4, 1, 1))
        assert all(served) is (dtype is not torch.float64)
    expected = logits_along(plain.to(torch.bfloat16).to(torch.float32), ids, (4, 1, 1))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


WINDOWS = {
    "mistral": {},
    "phi3": {},
    "gemma3_text": {},
    "qwen2": {"use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "qwen3": {"use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention", "full_attention"]},
}


@pytest.mark.parametrize("prompt", [None, "prefix", "prompt"])
@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("name", WINDOWS)
def test_sliding_windows_are_served_but_behind_a_prefix_that_they_hide(name, own, prompt, served):
    """Over a cache that lets go of what lies before the window, its ``own``, and over one that does not."""
    plain, virtual = quantized(family(name, sliding_window=12, **WINDOWS[name])), 0
    if prompt is not None:
        config = {"prefix": fp.PrefixTuningConfig, "prompt": fp.PromptTuningConfig}[prompt]
        plain, virtual = fp.get_peft_model(plain, config(num_virtual_tokens=3, task_type="CAUSAL_LM")).eval(), 3
        randomize(plain, std=0.3)
    fused = copy.deepcopy(plain)
    if prompt is not None:
        remove(plain)
    fp.accelerate(fused)
    decoder = (fused if prompt is None else fused.get_base_model()).model
    ids, chunks = torch.randint(1, VOCAB, (9, 19)), (4, 1, 2, 1, 3, 1, *[1] * 7)
    caches = [tf.DynamicCache(config=m.config) if own else tf.DynamicCache() for m in (plain, fused)]
    start = 0
    for length in chunks:
        end = start + length
        with torch.no_grad():
            expected, got = (
                m(input_ids=ids[:, start:end], **{fused_decoder._CACHE: cache}).logits
                for m, cache in zip((plain, fused), caches, strict=True)
            )
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        shown = prompt is None or end + virtual <= 12
        assert served[-1] is (shown and (own or start > 0))  # without one, the cache has layers when they are filled
        assert (caches[1] in decoder.forward._caches) is served[-1]  # else its room is given back
        start = end
    for layers in zip(*(cache.layers for cache in caches), strict=True):
        theirs, ours = layers
        torch.testing.assert_close(ours.keys, theirs.keys, rtol=1e-4, atol=1e-4)
        assert ours.get_seq_length() == theirs.get_seq_length()


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama", {}),
        ("gemma", {}),
        ("smollm3", {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
        ("smollm3", {"layer_types": ["full_attention"] * 3, "use_sliding_window": True}),
    ],
    ids=str,
)
def test_a_window_in_a_config_counts_where_masks_make_it(name, changes, own, served):
    """Llama and Gemma have no such masks; SmolLM3 makes them by the layers' types alone."""
    plain, fused = pair(name, dense=True, sliding_window=4, **changes)
    ids, windowed = torch.randint(1, VOCAB, (2, 14)), "layer_types" in changes
    caches = [tf.DynamicCache(config=m.config) if own else tf.DynamicCache() for m in (plain, fused)]
    for part in ids.split([3, 1, 3, 1, 6], 1):
        with torch.no_grad():
            expected, got = (
                m(input_ids=part, **{fused_decoder._CACHE: c}).logits
                for m, c in zip((plain, fused), caches, strict=True)
            )
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    # A cache may let go of what such a model would see.
    assert served == [own, True, windowed or not own, windowed or not own, windowed or not own]


def test_a_patch_of_the_masks_of_windows_is_heeded(served, monkeypatch):
    plain, fused = pair("mistral", dense=True, sliding_window=3)
    ids, chunks = torch.randint(1, VOCAB, (2, 9)), [2, 1, 5, 1]
    before = logits_along(fused, ids, chunks)
    assert all(served)
    served.clear()
    monkeypatch.setattr(modeling_mistral, "create_sliding_window_causal_mask", modeling_mistral.create_causal_mask)
    for model in (plain, fused):
        model.config.layer_types = ["full_attention"] * 3  # of its cache
    expected, got = (logits_along(model, ids, chunks) for model in (plain, fused))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert (got - before).abs().max() > 1e-3 and not any(served)


@pytest.mark.parametrize("name", WINDOWS)
def test_a_cache_that_records_what_leaves_its_windows_still_has_it(name, served):
    plain = quantized(family(name, sliding_window=6, **WINDOWS[name]))
    fused = fp.accelerate(copy.deepcopy(plain))
    ids = torch.randint(1, VOCAB, (2, 12))
    caches = [tf.DynamicCache(config=m.config) for m in (plain, fused)]
    for cache in caches:
        cache.activate_past_recording()
    for start, end, removed in [(0, 3, 0), (3, 5, 0), (5, 8, 2), (6, 7, 0), (7, 12, 3), (9, 10, 0)]:
        for model, cache in zip((plain, fused), caches, strict=True):
            with torch.no_grad():
                model(input_ids=ids[:, start:end], **{fused_decoder._CACHE: cache})
            cache.crop(-removed)
        for theirs, ours in zip(*(cache.layers for cache in caches), strict=True):
            torch.testing.assert_close(ours.keys, theirs.keys, rtol=1e-4, atol=1e-4)
            assert ours.get_seq_length() == theirs.get_seq_length() == end - removed
    assert served == [True, True, False, False, False, False]


def test_what_leaves_a_window_leaves_memory(served):
    fused = fp.accelerate(quantized(family("gemma3_text", sliding_window=16)))
    cache = tf.DynamicCache(config=fused.config)
    generate(fused, torch.randint(1, VOCAB, (1, 5)), n=300, **{fused_decoder._CACHE: cache})
    assert all(served)
    for room, members in zip(
        *(getattr(fused.model.forward._caches[cache], n) for n in ("rooms", "members")), strict=True
    ):
        assert room.tensor.shape[3] < (16 + 100 if 0 in members else 500)


def test_other_families_are_left_alone(served):
    for model in (quantized(make("phi")), quantized(make("gpt2"))):
        ids = torch.randint(1, VOCAB, (2, 6))

        expected = generate(model, ids)
        fp.accelerate(model)
        assert torch.equal(generate(model, ids), expected)
    assert not any(served)


@pytest.mark.parametrize(
    ("adapter", "within"),
    [
        ({"lora": True}, "self_attn.q_proj.base_layer"),
        ({"placement": "houlsby"}, "self_attn.o_proj.bottleneck.default"),
    ],
    ids=str,
)
def test_hooks_inside_the_model_run(adapter, within, served):
    _, fused = pair(**adapter)
    ids = torch.randint(1, VOCAB, (1, 5))
    generate(fused, ids, n=4)
    assert any(served)
    for path in ("model.layers.1.mlp.down_proj", "model.layers.0", f"model.layers.0.{within}"):
        seen, served[:] = [], []
        handle = fused.get_base_model().get_submodule(path).register_forward_hook(lambda *_: seen.append(1))  # noqa: B023
        generate(fused, ids, n=4)
        assert len(seen) == 4 and not any(served)
        handle.remove()
    generate(fused, ids, n=4)
    assert any(served)


def other_order(model):
    model.layers[0], model.layers[1] = model.layers[1], model.layers[0]  # each keeps its place in the cache


def other_norm(model):
    model.norm.variance_epsilon = 0.5


def other_scaling(model):
    model.layers[1].self_attn.scaling *= 30


def sees_what_follows(model):
    model.config.is_causal = False


def halved(kind):
    """A user's class under the name of the one that it is derived from."""

    def forward(self, x):
        return kind.forward(self, x) * 0.5

    return type(kind.__name__, (kind,), {"forward": forward, "__module__": __name__})


def other_mlp(model):
    mlp = halved(type(model.layers[1].mlp))(model.config)
    mlp._modules.update(model.layers[1].mlp._modules)
    model.layers[1].mlp = mlp


def other_norm_class(model):
    norm, model.norm = model.norm, halved(type(model.norm))(64)
    model.norm.weight = norm.weight


def other_activation(model):
    model.layers[1].mlp.act_fn = halved(torch.nn.SiLU)()


@pytest.mark.parametrize(
    "change",
    [other_order, other_norm, other_scaling, sees_what_follows, other_mlp, other_norm_class, other_activation],
)
def test_a_decoder_that_was_changed_is_left_to_its_class(change, served):
    models, ids = pair(), torch.randint(1, VOCAB, (1, 5))

    def logits(model):
        return logits_along(model, ids, [2, 1, 2])  # of several tokens each sees those that follow, or not

    before = logits(models[1])
    assert any(served)
    for model in models:
        change(model.model)
    served.clear()
    expected, got = map(logits, models)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert (got - before).abs().max() > 1e-3 and not any(served)


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize(
    ("owner", "name"),
    [(f"Llama{part}", "forward") for part in ("Model", "DecoderLayer", "Attention", "MLP", "RMSNorm")]
    + [(None, "apply_rotary_pos_emb"), (None, "rotate_half"), (type(ACT2FN["silu"]), "forward")],
)
def test_a_patch_of_transformers_is_heeded(owner, name, before, served, monkeypatch):
    plain, ids = family("llama"), torch.randint(1, VOCAB, (1, 5))
    fused = copy.deepcopy(plain)
    if not before:
        generate(fp.accelerate(fused), ids)
        assert any(served)
    served.clear()
    patched = getattr(modeling_llama, owner) if isinstance(owner, str) else owner or modeling_llama
    own = getattr(patched, name)

    @functools.wraps(own)
    def half(*args, **kwargs):
        out = own(*args, **kwargs)
        if isinstance(out, tuple):
            return out[0] * 0.5, *out[1:]
        if owner == "LlamaModel":
            out.last_hidden_state = out.last_hidden_state * 0.5
            return out
        return out * 0.5

    monkeypatch.setattr(patched, name, half)
    fp.accelerate(fused)
    expected, got = (
        torch.stack(generate(model, ids, return_dict_in_generate=True, output_logits=True).logits)
        for model in (plain, fused)
    )
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert not any(served)


def tripled(function):
    """A user's function around another."""

    def triple(*args, **kwargs):
        return tuple(out if out is None else 3 * out for out in function(*args, **kwargs))

    return triple


def sees_all(*args, **kwargs):
    return torch.zeros(2, 1, 5, 5)


def patch_mask(patch, cache, attention):
    patch.setattr(modeling_llama, "create_causal_mask", sees_all)


def register_mask(patch, cache, attention):
    patch.setitem(AttentionMaskInterface._global_mapping, attention, sees_all)


def register_attention(patch, cache, attention):
    own = ALL_ATTENTION_FUNCTIONS.get(attention, modeling_llama.eager_attention_forward)
    patch.setitem(AttentionInterface._global_mapping, attention, tripled(own))


def patch_attention(patch, cache, attention):
    if attention == "eager":
        patch.setattr(modeling_llama, "eager_attention_forward", tripled(modeling_llama.eager_attention_forward))
    else:
        patch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, attention, tripled(ALL_ATTENTION_FUNCTIONS[attention]))


def patch_cache(patch, cache, attention):
    patch.setattr(cache, "update", tripled(cache.update))


def patch_caches(patch, cache, attention):
    patch.setattr(type(cache), "update", tripled(type(cache).update))


def patch_cache_layers(patch, cache, attention):
    kind = type(cache.layers[0])
    patch.setattr(kind, "update", tripled(kind.update))


@pytest.mark.parametrize(("attention", "kind"), [("sdpa", tf.DynamicCache), ("eager", tf.StaticCache)])
@pytest.mark.parametrize(
    "change",
    [
        patch_mask,
        register_mask,
        register_attention,
        patch_attention,
        patch_cache,
        patch_caches,
        patch_cache_layers,
    ],
)
def test_a_patch_of_masks_attentions_and_caches_is_heeded(change, attention, kind, served, monkeypatch):
    models, ids = pair(), torch.randint(1, VOCAB, (2, 5))

    def logits(model, change=None):
        model.set_attn_implementation(attention)
        cache = kind(config=model.config, **({"max_cache_len": 5} if kind is tf.StaticCache else {}))
        with monkeypatch.context() as patch, torch.no_grad():
            if change is not None:
                change(patch, cache, attention)
            return model(input_ids=ids, **{fused_decoder._CACHE: cache}).logits

    before = logits(models[1])
    expected, got = (logits(model, change) for model in models)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert (got - before).abs().max() > 1e-3
    torch.testing.assert_close(logits(models[1]), before)
    assert served == [True, False, True]


@pytest.mark.parametrize("asked", [{"is_causal": False}, {"return_dict": False}, None], ids=str)
def test_a_keyword_that_is_false_is_obeyed(asked, served):
    models, ids = pair(), torch.randint(1, VOCAB, (2, 5))

    def output(body, **asked):
        with torch.no_grad():
            return body(input_ids=ids, **{fused_decoder._CACHE: tf.DynamicCache(config=body.config)}, **asked)

    for model in models:
        output(model.model, output_attentions=False, output_hidden_states=False)
        model.config.return_dict = asked is not None
    expected, got = (output(model.model, **(asked or {})) for model in models)
    assert type(got) is type(expected) and served == [True, False]
    torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=1e-5)


def test_types_of_layers_that_nothing_reads(served):
    models = pair()
    ids, caches = torch.randint(1, VOCAB, (1, 5)), [tf.DynamicCache(), tf.DynamicCache()]
    models[1].config.layer_types = ["full_attention"]  # of the first alone
    with torch.no_grad():
        for _ in range(2):  # such a cache has no layers before the first
            expected, got = (m(ids, **{fused_decoder._CACHE: c}).logits for m, c in zip(models, caches, strict=True))
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert served == [False, True]


def test_hidden_states_and_attentions_come_when_asked_for(served):
    plain, fused = pair(attn_implementation="eager")
    ids = torch.randint(1, VOCAB, (1, 5))
    for options in ({"output_hidden_states": True}, {"output_attentions": True}):
        expected, got = (generate(m, ids, return_dict_in_generate=True, **options) for m in (plain, fused))
        for name in ("hidden_states", "attentions"):
            for a, b in zip(getattr(got, name) or (), getattr(expected, name) or (), strict=True):
                assert all(torch.allclose(x, y, rtol=1e-5, atol=1e-5) for x, y in zip(a, b, strict=True))
    assert not any(served)
    assert torch.equal(*(generate(m, ids) for m in (plain, fused)))  # transformers' hooks are still there
    assert any(served)
    with torch.no_grad():
        cache = tf.DynamicCache(config=fused.config)
        fused(ids, **{fused_decoder._CACHE: cache})
        served.clear()
        hook = fused.model.layers[1].register_forward_hook(lambda *_: None)
        fused(ids[:, :1], **{fused_decoder._CACHE: cache})
        assert not any(served)
        hook.remove()
        fused(ids[:, :1], **{fused_decoder._CACHE: cache})
        assert all(served[1:]) and served[1:]


@pytest.mark.parametrize(("head_dim", "serves"), [(256, True), (258, False), (320, False)])
def test_heads_larger_than_the_kernels_hold_are_computed_by_layers(isa, head_dim, serves, served):
    plain, fused = pair(head_dim=head_dim)
    ids = torch.randint(1, VOCAB, (2, 24))
    expected, got = (logits_along(m, ids, [22, 1, 1]) for m in (plain, fused))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    assert served == [serves] * 3


def test_training_goes_on_as_before(served):
    plain, fused = pair(lora=True)
    batch = inputs()
    losses = []
    for model in (plain, fused):
        model.train()
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
        loss = model(**batch).loss
        loss.backward()
        losses.append((loss, [p.grad for p in model.parameters() if p.requires_grad]))
    torch.testing.assert_close(losses[0][0], losses[1][0], rtol=1e-5, atol=1e-6)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(losses[0][1], losses[1][1], strict=True))
    fused.zero_grad()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        expected, got = (logits_along(m.eval(), batch["input_ids"], [4, 1, 1]) for m in (plain, fused))
    torch.testing.assert_close(got, expected, rtol=3e-2, atol=3e-2 * float(expected.abs().max()))
    assert not any(served)


def test_dropout_in_training_mode_is_not_skipped(served):
    model = adapted(quantized(family("llama")), lora_dropout=0.5)
    fp.accelerate(model)
    ids = torch.randint(1, VOCAB, (1, 6))
    with torch.no_grad():
        logits_along(model.train(), ids, [4, 1, 1])
        assert not any(served)
        logits_along(model.eval(), ids, [4, 1, 1])
        assert served.count(True) == 3
    _, model = pair()
    logits_along(model, ids, [4, 1, 1])
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    served.clear()
    logits_along(model.train(), ids, [4, 1, 1])
    assert served == [False] * 3


def test_what_is_put_in_the_place_of_a_dropout_between_tokens_is_asked(served):
    _, model = pair("phi3", lora=True)
    step, out = steps(model, torch.randint(1, VOCAB, (1, 8)))
    layer = model.get_base_model().model.layers[1]
    step(0, 4), step(4, 5)
    layer.resid_mlp_dropout = torch.nn.Threshold(1e9, 1e3)
    step(5, 6)
    assert served == [True, True, False] and not torch.allclose(*out[-2:], atol=0.1)
    layer.resid_mlp_dropout = torch.nn.Identity()
    step(6, 7)
    assert served[3:] == [True]
    layer.self_attn.qkv_proj.lora_dropout["default"] = torch.nn.ReLU()
    with pytest.raises(TypeError, match="lora_dropout holds a ReLU"):
        step(7, 8)


# ---- the model stays what it was -------------------------------------------------------------------------------------


def test_copies_and_pickles_are_models_of_their_own(served):
    _, fused = pair(lora=True)
    ids = torch.randint(1, VOCAB, (1, 5))
    expected = generate(fused, ids)
    again = copy.deepcopy(fused)
    randomize(fused, 0.5)
    assert again.get_base_model().model.forward.module is again.get_base_model().model
    served.clear()
    assert torch.equal(generate(again, ids), expected) and any(served)
    buffer = io.BytesIO()
    torch.save(again.get_base_model(), buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    served.clear()
    assert torch.equal(generate(loaded, ids), expected) and any(served)
    assert len(pickle.dumps(again.get_base_model().model.forward)) > 0


def test_names_and_saved_files_do_not_change(tmp_path):
    plain, fused = pair()
    assert list(plain.state_dict()) == list(fused.state_dict())
    assert [n for n, _ in plain.named_modules()] == [n for n, _ in fused.named_modules()]
    assert type(plain) is type(fused) and type(plain.model) is type(fused.model)
    base = family("llama")
    fp.accelerate(base)
    base.save_pretrained(tmp_path)
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.lm_head.weight, base.lm_head.weight)


def test_fusing_twice_is_fusing_once_and_the_signature_stays():
    import inspect

    _, fused = pair()
    before = fused.model.forward
    fp.accelerate(fused)
    assert fused.model.forward is before
    own = inspect.signature(type(fused.model).forward.__get__(fused.model))
    assert inspect.signature(before) == own


def test_a_decoder_without_a_head_is_adapted_accelerated_or_quantized_and_copied(tmp_path):
    bare = family("llama").model.eval()
    bare.save_pretrained(tmp_path)
    ids = torch.randint(1, VOCAB, (2, 5))
    config = fp.LoraConfig(r=2, target_modules=["q_proj"], task_type="FEATURE_EXTRACTION", init_lora_weights=False)
    expected = fp.get_peft_model(bare, config)
    expected.save_pretrained(tmp_path / "adapter")
    others = [
        fp.PeftModel.from_pretrained(fp.accelerate(tf.AutoModel.from_pretrained(tmp_path)), tmp_path / "adapter"),
        copy.deepcopy(expected),
        pickle.loads(pickle.dumps(expected)),
    ]
    for other in others:
        assert torch.allclose(other(ids).last_hidden_state, expected(ids).last_hidden_state, atol=1e-5)
    quantized_base = tf.AutoModel.from_pretrained(tmp_path, quantization_config=fp.FastPeftConfig("nf4"))
    assert fp.get_peft_model(quantized_base, config)(ids).last_hidden_state.isfinite().all()


@pytest.fixture
def bf16_accelerator():
    """There is one a process: a trainer of a test before may have left its own."""
    AcceleratorState._reset_state(True)
    yield accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    AcceleratorState._reset_state(True)


def test_a_bare_decoder_that_accelerate_unwraps_is_what_it_was_and_so_are_its_copies(served, bf16_accelerator):
    _, fused = pair()
    decoder, ids = fused.model, torch.randint(1, VOCAB, (2, 5))
    expected = decoder(input_ids=ids).last_hidden_state
    prepared = bf16_accelerator.prepare_model(decoder, evaluation_mode=True)
    assert not torch.equal(prepared(input_ids=ids).last_hidden_state, expected)
    assert bf16_accelerator.unwrap_model(prepared, keep_fp32_wrapper=False) is decoder
    other = copy.deepcopy(decoder)
    other.norm.weight.data.mul_(2)
    with torch.no_grad():
        served.clear()
        for model, factor in ((decoder, 1), (other, 2), (copy.deepcopy(other), 2)):
            got = model(input_ids=ids, use_cache=True).last_hidden_state
            assert torch.allclose(got, factor * expected, atol=1e-5)


def test_a_call_uses_its_own_stack_whatever_another_thread_builds_meanwhile():
    model = adapted(quantized(family("llama")))
    model.add_adapter("other", fp.LoraConfig(r=4, target_modules="all-linear"))
    randomize(model, std=0.1)
    for name in ("other", "default"):
        model.set_adapter(name, inference_mode=True)
    ids = torch.randint(1, VOCAB, (2, 1))

    def logits(name):
        cache = {fused_decoder._CACHE: tf.DynamicCache(config=model.config)}
        with torch.no_grad():
            return model(input_ids=ids, adapter_names=[name, name], **cache).logits

    others = logits("other")
    forward = model.get_base_model().model.forward
    stack = forward._stacks[0]

    class Raced(list):
        def insert(self, at, new):
            super().insert(at, new)
            super().insert(at, stack)

    forward._stacks = Raced()
    got = logits("default")
    forward._stacks = []
    expected = logits("default")
    assert torch.equal(got, expected) and not torch.equal(got, others)


def test_stacks_die_with_their_model():
    _, fused = pair()
    generate(fused, torch.randint(1, VOCAB, (1, 5)))
    numbers = [stack.held.number for stack in fused.model.forward._stacks]
    assert numbers
    del fused
    gc.collect()
    x = torch.zeros(1, 1, 32)
    for number in numbers:
        with pytest.raises(RuntimeError, match="stack is"):
            torch.ops.pyfastpeft.decoder_forward(number, x, [x], [x], None, [], [], [], [], [], None, None)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dense", [False, True])
def test_a_traced_step_over_a_cache_needs_no_stack(dense, served, tmp_path):
    class Logits(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, ids):
            cache = {fused_decoder._CACHE: tf.DynamicCache(config=self.model.config)}
            return self.model(input_ids=ids, use_cache=True, return_dict=False, **cache)[0]

    plain, fused = pair(dense=dense)
    ids = torch.randint(1, VOCAB, (2, 5))
    with torch.no_grad():
        expected = Logits(plain)(ids.flip(1))
        Logits(fused)(ids)
        assert served == [True]
        torch.jit.trace(Logits(fused), ids).save(tmp_path / "traced.pt")
        del fused
        gc.collect()
        other = fp.accelerate(family("llama"))
        Logits(other)(ids)
        assert torch.allclose(torch.jit.load(tmp_path / "traced.pt")(ids.flip(1)), expected, atol=1e-5)


def test_a_compiled_model_is_compiled_from_transformers_own_forward():
    plain, fused = pair()
    batch = {"input_ids": torch.randint(1, VOCAB, (2, 6))}
    with torch.no_grad():
        got = torch.compile(fused, fullgraph=True, backend="eager")(**batch, use_cache=False).logits
        assert torch.allclose(got, plain(**batch).logits, rtol=1e-5, atol=1e-5)


def test_a_compiled_model_stays_compiled_while_modules_come_and_go():
    plain, fused = pair()
    generate(fused, torch.randint(1, VOCAB, (1, 5)))
    batch = {"input_ids": torch.randint(1, VOCAB, (2, 6)), "use_cache": False}
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        compiled = torch.compile(plain, fullgraph=True, backend="eager")
        first = compiled(**batch).logits
        torch.nn.Linear(2, 2)
        assert torch.equal(compiled(**batch).logits, first)


def test_a_compiled_model_stays_compiled_when_it_decodes_beside(served):
    fused = pair()[1]
    batch = {"input_ids": torch.randint(1, VOCAB, (2, 6)), "use_cache": False}
    compiled = torch.compile(fused, fullgraph=True, backend="eager")
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        first = compiled(**batch).logits
        generate(fused, torch.randint(1, VOCAB, (1, 5)))
        assert any(served) and torch.equal(compiled(**batch).logits, first)


# ---- the head --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_few_rows_of_a_dense_product(isa, dtype):
    shapes = [(1, 49, 37), (2, 300, 64), (3, 40, 200), (5, 64, 576), (7, 81, 67), (16, 33, 8), (0, 5, 4)]
    shapes += [(8, 17, 1024), (9, 50, 1057), (15, 33, 2113)]  # eight rows take 1024 columns at a time
    for rows, n, k in shapes:
        x, weight = torch.randn(rows, k).to(dtype), torch.randn(n, k).to(dtype)
        for bias in (None, torch.randn(n).to(dtype)):
            got = torch.ops.pyfastpeft.dense_linear(x, weight, bias)
            expected = x.double() @ weight.double().t() + (0 if bias is None else bias.double())
            assert got.dtype == dtype and got.shape == (rows, n)
            tolerance = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
            assert torch.allclose(got.double(), expected, rtol=tolerance, atol=tolerance * k**0.5)
    strided = torch.randn(4, 2 * k if (k := 64) else 0)[:, ::2], torch.randn(64, 30).t()
    got = torch.ops.pyfastpeft.dense_linear(*(t.to(dtype) for t in strided), None)
    contiguous = torch.ops.pyfastpeft.dense_linear(*(t.to(dtype).contiguous() for t in strided), None)
    assert torch.equal(got, contiguous)


def test_a_row_of_a_dense_product_is_its_own(isa):
    """What is not finite stays in its row, or in its column; and a row does not depend on its company."""
    for dtype in (torch.float32, torch.bfloat16):
        x, weight = torch.randn(11, 100).to(dtype), torch.randn(70, 100).to(dtype)
        linear = torch.ops.pyfastpeft.dense_linear
        expected = linear(x, weight, None)
        alone = torch.cat([linear(row, weight, None) for row in x.split(1)])
        assert torch.allclose(alone, expected, rtol=1e-5 if dtype is torch.float32 else 8e-3, atol=1e-4)
        broken_x, broken_weight = x.clone(), weight.clone()
        broken_x[3, 99], broken_x[8, 0] = torch.nan, torch.inf
        broken_weight[69, 99], broken_weight[16, 3] = torch.nan, -torch.inf
        got = linear(broken_x, broken_weight, None)
        rows, columns = torch.ones(11, dtype=torch.bool), torch.ones(70, dtype=torch.bool)
        rows[[3, 8]], columns[[16, 69]] = False, False
        assert torch.equal(got[rows][:, columns], expected[rows][:, columns])
        assert not got[~rows].isfinite().any() and not got[:, ~columns].isfinite().any()


def test_the_head_takes_the_last_position_of_many_rows_and_trains():
    plain, fused = pair()
    ids = torch.randint(1, VOCAB, (3, 7))
    with torch.no_grad():
        expected, got = (m(input_ids=ids, logits_to_keep=1).logits for m in (plain, fused))
    assert torch.allclose(got, expected, rtol=1e-5, atol=1e-5)
    fused.lm_head.weight.requires_grad_(True)
    fused(input_ids=ids, labels=ids).loss.backward()
    assert fused.lm_head.weight.grad is not None


# ---- the operator ----------------------------------------------------------------------------------------------------


def test_the_operator_refuses_what_does_not_fit():
    _, fused = pair()
    generate(fused, torch.randint(1, VOCAB, (1, 5)))
    number = fused.model.forward._stacks[0].held.number
    forward = torch.ops.pyfastpeft.decoder_forward
    x, angle = torch.zeros(1, 1, 32), [torch.zeros(1, 1, 8)]
    room = [torch.zeros(1, 2, 4, 8) for _ in range(2)]
    prefix = [torch.zeros(2, 2, 3, 8) for _ in range(2)]
    none, index = ([], [], None, None), torch.tensor([1])
    forward(number, x, angle, angle, None, room, room, [3, 3], *none)
    forward(number, x, angle, angle, None, room, room, [3, 2], prefix, prefix, index, None)
    for args, words in [
        ((x, angle, angle, None, room, room, [4] * 2), "keys must be"),
        ((x, angle, angle, None, room, room, [2**63 - 1] * 2), "past is 9223372036854775807; it must be from 0 to"),
        ((x, angle, angle, None, room, room, [-1] * 2), "past is -1; it must be from 0 to"),
        ((x, angle, angle, None, room, room, [0]), "keys, values and past must be one a layer"),
        ((x, angle, angle, None, room[:1], room, [0] * 2), "one a layer"),
        ((x[..., :16], angle, angle, None, room, room, [0] * 2), "x must be"),
        ((x, [angle[0][..., :4]], angle, None, room, room, [0] * 2), "cos and sin"),
        ((x, angle * 2, angle, None, room, room, [0] * 2), "cos and sin must be equally many"),
        ((x, [angle[0][..., :7]], angle, None, room, room, [0] * 2), "cos has 7 columns"),
        ((x, [], [], None, room, room, [0] * 2), "layer 0 turns by angles 0; cos and sin are 0"),
        ((x, angle, angle, torch.ones(1, 2), room, room, [0] * 2), "mask must be"),
        ((x.bfloat16(), angle, angle, None, room, room, [0] * 2), "x must be"),
        ((x, angle, angle, None, [t.half() for t in room], room, [0] * 2), "keys must be"),
    ]:
        with pytest.raises(RuntimeError, match=words):
            forward(number, *args, *none)
    for args, words in [
        ((prefix, prefix[:1], index, None), "one a layer or none"),
        ((prefix, prefix, None, None), "prefix_index must pick one"),
        (([t[:0] for t in prefix], [t[:0] for t in prefix], None, None), "prefix_index must pick one"),
        ((prefix, prefix, index + 1, None), r"prefix_index has 2; each must lie in \[-1, 1\]"),
        ((prefix, prefix, index, torch.tensor([1, 4])), r"prefix_lengths has 4; each must lie in \[0, 3\]"),
        ((prefix, [t[:, :, :2] for t in prefix], index, None), r"prefix_values must be \[2, 2, 3, 8\]"),
        (([t.half() for t in prefix], prefix, index, None), "prefix_keys must be"),
    ]:
        with pytest.raises(RuntimeError, match=words):
            forward(number, x, angle, angle, None, room, room, [3, 3], *args)


@pytest.mark.parametrize(
    ("row_scale", "refused"),
    [
        (torch.ones(2, 4), False),
        (torch.ones(2, 8)[:, ::2], True),
        (torch.ones(1).expand(2, 4), True),
        (torch.ones(2, 1, 4), True),
        (torch.ones(2, 4).double(), True),
    ],
    ids=["groups", "strides", "expanded", "three_dimensions", "dtype"],
)
def test_the_operator_refuses_factors_of_groups_that_it_would_read_past(row_scale, refused):
    ops, row = torch.ops.pyfastpeft, torch.ones(32)
    stack = ops.new_decoder(row, [row, row], [], [], [0], [0], 2, 2, 16, 1e-6, 0.25, 1.0, False, False)
    for n, k in [(32, 32)] * 4 + [(48, 32)] * 2 + [(32, 48)]:
        branch = torch.randn(4, k), torch.randn(n, 4)
        ops.add_decoder_dense(stack, torch.randn(n, k), None, *branch, 1.0, row_scale)
    angle, room = [torch.zeros(1, 1, 16)], [torch.zeros(4, 2, 1, 16)]
    raises = pytest.raises(RuntimeError, match="row_scale must be contiguous float32")
    with raises if refused else contextlib.nullcontext():
        ops.decoder_forward(stack, torch.randn(4, 1, 32), angle, angle, None, room, room, [0], [], [], None, None)
    C_FUNCTIONS.pf_free_decoder(stack)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, None),
        ({"down": torch.ones(3, 31)}, r"down must be \[R, 32\] and up \[32, R\]"),
        ({"up": torch.ones(32, 4)}, r"down must be \[R, 32\] and up \[32, R\]"),
        ({"up_bias": torch.ones(1)}, r"bias must be \[N\]"),
        ({"up": torch.ones(32, 3).double()}, "up must be float32, bfloat16 or float16"),
        ({"activation": 4}, "activation is 4; it must be from 0 to 3"),
        ({"uses": [1, 0, 1]}, "x has 4 rows; they must be a multiple of the 3 of uses"),
    ],
    ids=["fits", "down", "up", "bias", "dtype", "activation", "rows"],
)
def test_the_operator_refuses_bottlenecks_that_do_not_fit(changes, words):
    ops, row = torch.ops.pyfastpeft, torch.ones(32)
    stack = ops.new_decoder(row, [row, row], [], [], [0], [0], 2, 2, 16, 1e-6, 0.25, 1.0, False, False)
    held = {"down": torch.ones(3, 32), "down_bias": torch.ones(3), "up": torch.ones(32, 3), "up_bias": row}
    held |= {"activation": 0, "uses": [1, 0]} | changes
    with pytest.raises(RuntimeError, match="a bottleneck needs a linear layer before it"):
        ops.add_decoder_bottleneck(stack, **held)
    for n, k in [(32, 32)] * 4 + [(48, 32)] * 2 + [(32, 48)]:
        ops.add_decoder_dense(stack, torch.randn(n, k), None, None, None, 1.0, None)
    angle, room = [torch.zeros(1, 1, 16)], [torch.zeros(4, 2, 1, 16)]
    with pytest.raises(RuntimeError, match=words) if words else contextlib.nullcontext():
        ops.add_decoder_bottleneck(stack, **held)
        ops.decoder_forward(stack, torch.randn(4, 1, 32), angle, angle, None, room, room, [0], [], [], None, None)
    C_FUNCTIONS.pf_free_decoder(stack)


def test_the_operator_refuses_more_projections_than_its_layers_have():
    ops, row = torch.ops.pyfastpeft, torch.ones(32)
    stack = ops.new_decoder(row, [row, row], [], [], [0], [0], 2, 2, 16, 1e-6, 0.25, 1.0, False, False)
    for n, k in [(32, 32)] * 4 + [(48, 32)] * 2 + [(32, 48)]:
        ops.add_decoder_dense(stack, torch.randn(n, k), None, None, None, 1.0, None)
    with pytest.raises(RuntimeError, match="the stack has all the projections of its layers already"):
        ops.add_decoder_dense(stack, torch.randn(32, 48), None, None, None, 1.0, None)
    C_FUNCTIONS.pf_free_decoder(stack)


@pytest.mark.parametrize("rows", [1, 20])
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("adapter", ADAPTERS, ids=str)
def test_threads_change_nothing(adapter, dense, rows, served):
    _, fused = pair(dense=dense, **adapter)
    ids = torch.randint(1, VOCAB, (rows, 5))
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(logits_along(fused, ids, [2, 1, 1, 1]))
        assert all(torch.equal(r, results[0]) for r in results)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("names", [None, ["narrow", "default", ["other", "narrow"]]])
def test_bottlenecks_count_as_they_are_now(dense, names, served):
    """Trained, swapped or exchanged since, whether for inference or not."""
    model = family("llama")
    model = adapted(model if dense else quantized(model), inference_mode=True)
    narrowed(narrowed(model, "other", "pfeiffer", "relu", 7), "narrow")
    model.set_adapter("narrow")
    models, ids = (without_stack(model), model), torch.randint(1, VOCAB, (3, 6))
    rows, before = {} if names is None else {"adapter_names": names}, None

    def narrow(m):
        return m.base_model.model.model.layers[1].mlp.down_proj.bottleneck

    def check(serves=True, changes=True):
        nonlocal before
        served.clear()
        expected, got = (
            torch.stack(generate(m, ids, output_logits=True, return_dict_in_generate=True, **rows).logits)
            for m in models
        )
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        assert any(served) is serves
        assert before is None or bool((got - before).abs().max() > 1e-3) is changes
        before = got

    check()
    for m in models:
        narrow(m)["narrow"].up.weight.data.mul_(-3)  # leaves no trace
    check()
    for m in models:
        m.train()
        sgd = torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.3)
        torch.manual_seed(3)
        m(input_ids=ids, labels=ids, **rows).loss.backward()
        sgd.step()
        m.eval()
    check()
    for m in models:
        m.set_adapter("narrow", inference_mode=True)
    check(changes=False)
    torch.manual_seed(4)
    state = {
        k: 0.2 * torch.randn_like(v) for k, v in fp.get_peft_model_state_dict(model, adapter_name="narrow").items()
    }
    for m in models:
        m.hotswap_adapter(state, "narrow")
    check()
    for m in models:
        narrow(m)["narrow"].down.bias = torch.nn.Parameter(torch.ones(5))
    check()
    with contextlib.ExitStack() as stack:
        for m in models:
            stack.enter_context(m.disable_adapter())
        if names is None:
            check()
    for m in models:
        m.set_adapter(["narrow", "other"] if names is None else [], inference_mode=True)
    check(changes=names is None)
    for m in models:
        weight_norm(narrow(m)["narrow"].down)  # computed from other parameters
    check(serves=False, changes=False)


def test_a_row_sees_nothing_of_another_rows_bottleneck(served):
    model = narrowed(narrowed(quantized(family("llama")), "narrow"), "other", "pfeiffer")
    ids, rows = torch.randint(1, VOCAB, (3, 6)), {"adapter_names": ["narrow", "other", "__base__"]}
    first = generate(model, ids, **rows)
    for parameter in model.base_model.tensors("other").values():
        parameter.data.fill_(torch.nan)
    assert torch.equal(generate(model, ids, **rows)[::2], first[::2])
    assert all(served[1:8] + served[9:])


PREFIXES = {
    "shared": (1, 5, None, None),
    "shared, of two parts": (1, 128, None, None),
    "shared, padded": (1, 9, None, [4]),
    "nothing of it": (1, 9, None, [0]),
    "by row": (2, 6, [1, -1, 0], None),
    "by row, padded": (3, 6, [2, 2, 0], [6, 1, 3]),
}


def hold(models, kind, dtype=torch.float32):
    slots, length, index, lengths = PREFIXES[kind]
    numbers = [None if n is None else torch.tensor(n) for n in (index, lengths)]
    for layers in zip(*(model.model.layers for model in models), strict=True):
        heads, dim = models[0].config.num_key_value_heads, layers[0].self_attn.head_dim
        k, v = torch.randn(2, slots, heads, length, dim).to(dtype)
        for layer in layers:
            layer.self_attn._prefix = HeldPrefix(k, v, *numbers)
    for model in models:
        model.set_attn_implementation("pyfastpeft")


@pytest.mark.parametrize("kind", PREFIXES)
@pytest.mark.parametrize("name", FAMILIES)
def test_layers_with_a_prefix(isa, name, kind, served):
    plain, fused = pair(name)
    hold((plain, fused), kind)
    ids, mask = torch.randint(1, VOCAB, (3, 31)), torch.ones(3, 31, dtype=torch.long)
    mask[0, :7], mask[2, :2] = 0, 0
    for m in (None, mask):
        served.clear()
        expected, got = (logits_along(model, ids, [22, 1, 1, 6, 1], m) for model in (plain, fused))
        assert served == [False] + [True] * 4
        assert torch.allclose(got[:, 22:], expected[:, 22:], rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["shared, of two parts", "by row"])
def test_sixteen_bits_err_no_more_behind_a_prefix(isa, kind, dtype, served):
    plain, fused = pair(dtype=dtype)
    exact = copy.deepcopy(plain).float()
    hold((plain, fused, exact), kind, dtype)
    ids = torch.randint(1, VOCAB, (3, 32))
    expected, unfused, got = (logits_along(m, ids, [22, 1, 1, 1, 1, 3, 1, 1, 1]).float() for m in (exact, plain, fused))
    assert served.count(True) == 8
    assert (got - expected).norm() <= 1.5 * (unfused - expected).norm() + 1e-3 * expected.norm()


def test_a_prefix_may_come_and_go(served):
    plain, fused = pair()
    ids = torch.randint(1, VOCAB, (3, 8))

    def check():
        expected, got = (logits_along(model, ids, [5, 1, 1, 1]) for model in (plain, fused))
        assert torch.allclose(got, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
        return got

    without = check()
    hold((plain, fused), "shared")
    assert not torch.allclose(check(), without, rtol=1e-2)
    hold((plain, fused), "by row")
    check()
    for model in (plain, fused):
        del model.model.layers[1].self_attn._prefix  # some layers only: these attend themselves
    served.clear()
    check()
    assert not any(served)
    for model in (plain, fused):
        for layer in model.model.layers:
            vars(layer.self_attn).pop("_prefix", None)
    assert torch.allclose(check(), without, rtol=1e-5)


def test_rows_of_several_methods_are_served_together(served):
    _, model = three_adapters()
    virtual = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
    torch.manual_seed(0)
    model.add_adapter("prefix", fp.PrefixTuningConfig(**virtual))
    model.add_adapter("prompt", fp.PromptTuningConfig(**virtual))
    for name in ("prefix", "prompt", "default"):
        model.set_adapter(name, inference_mode=True)
    narrowed(model, "narrow")
    narrowed(model, "late", "pfeiffer", "relu", 7)
    alone = copy.deepcopy(model)
    remove(alone, fused_decoder._FewRows)
    ids = torch.randint(1, VOCAB, (8, 6))
    names = ["odd", ["prefix", "short"], "prompt", "__base__", "prefix", "narrow", ["prefix", "late", "odd"], "late"]
    together = generate(model, ids, adapter_names=names)
    assert any(served)
    served.clear()
    assert torch.equal(together, generate(alone, ids, adapter_names=names)) and not any(served)
    for i, name in enumerate(names):
        assert torch.equal(generate(alone, ids[i : i + 1], adapter_names=[name])[0], together[i])
