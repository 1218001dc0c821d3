"""attn_implementation="pyfastpeft" gives what transformers' own attention gives, with a prefix and without."""

import copy
import subprocess
import sys

import pytest
import torch
import transformers as tf
from architectures import ARCHITECTURES, VOCAB, WITH_SCORES, HeldPrefix, assert_same_answers, make, vary_vectors
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper

import pyfastpeft as fp
from pyfastpeft.integrations import attention

CAUSAL = [name for name in ARCHITECTURES if name not in ("t5", "bert")]
SLIDING = ["mistral-sliding", "qwen2-mixed", "gemma3"]
CAPS_AND_SINKS = ["gemma2", "gpt-oss"]  # left to the models' own attention
_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "head_dim": 8,
}
_MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
_CONFIGS = {
    "mistral-sliding": lambda: tf.MistralConfig(**_SIZES, sliding_window=5),
    "qwen2-mixed": lambda: tf.Qwen2Config(**_SIZES, use_sliding_window=True, sliding_window=4, layer_types=_MIXED),
    "gemma3": lambda: tf.Gemma3TextConfig(**_SIZES, sliding_window=4, layer_types=_MIXED),
    "gemma2": lambda: tf.Gemma2Config(**_SIZES, sliding_window=4, layer_types=_MIXED, attn_logit_softcapping=2.0),
    "gpt-oss": lambda: tf.GptOssConfig(
        **_SIZES, sliding_window=4, layer_types=_MIXED, num_local_experts=2, num_experts_per_tok=1
    ),
}


def model_of(name, dtype=torch.float32):
    if name in ARCHITECTURES:
        model = make(name, dtype)
    else:
        model = vary_vectors(tf.AutoModelForCausalLM.from_config(_CONFIGS[name]())).to(dtype).eval()
    if name != "bert":
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
    return model


def pair(name="llama", dtype=torch.float32):
    """The same model with transformers' attention and with ours."""
    plain = model_of(name, dtype)
    ours = copy.deepcopy(plain)
    if name in CAPS_AND_SINKS:
        plain.set_attn_implementation("eager")
    ours.set_attn_implementation("pyfastpeft")
    assert ours.config._attn_implementation == "pyfastpeft"
    return plain, ours


def ids_and_mask(rows=3, length=9, side="left"):
    ids, mask = torch.randint(1, VOCAB, (rows, length)), torch.ones(rows, length, dtype=torch.long)
    for row, count in enumerate((0, 3, 1)[:rows]):
        part = slice(0, count) if side == "left" else slice(length - count, length)
        ids[row, part], mask[row, part] = 0, 0
    return ids, mask


def near(got, expected, tolerance=1e-5):
    return torch.allclose(got, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("name", [*CAUSAL, *SLIDING, *CAPS_AND_SINKS])
def test_logits_of_causal_models(name, side):
    plain, ours = pair(name)
    ids, mask = ids_and_mask(side=side)
    mask = mask if side else None
    with torch.no_grad():
        expected, got = (m(input_ids=ids, attention_mask=mask).logits for m in (plain, ours))
    seen = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    assert near(got[seen], expected[seen])


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_encoders_and_encoder_decoders(name):
    plain, ours = pair(name)
    ids, mask = ids_and_mask(side="right")
    more = {} if name == "bert" else {"decoder_input_ids": ids[:, :5]}
    for m in (None, mask):
        with torch.no_grad():
            expected, got = (model(input_ids=ids, attention_mask=m, **more).logits for model in (plain, ours))
        assert near(got, expected)


def test_no_layer_gets_a_mask_that_hides_nothing(monkeypatch):
    def spy(*args, **kwargs):
        masks.append(args[4])
        return sdpa(*args, **kwargs)

    _, ours = pair("t5")
    ids, padding = ids_and_mask(side="right")
    sdpa = attention.sdpa_attention_forward
    monkeypatch.setattr(attention, "sdpa_attention_forward", spy)
    for given, hides in ((None, False), (torch.ones_like(padding), False), (padding, True)):
        masks = []
        with torch.no_grad():
            ours.encoder(input_ids=ids, attention_mask=given)
        assert [mask is not None for mask in masks] == [hides] * 2


STRATEGIES = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "sampling": {"do_sample": True, "top_k": 8},
    "static": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "prompt lookup": {"prompt_lookup_num_tokens": 2},
}


def generate(model, ids, mask, **kwargs):
    torch.manual_seed(7)
    options = {"max_new_tokens": 7, "do_sample": False} | kwargs
    return model.generate(input_ids=ids, attention_mask=mask, **options)


def check_answers(strategy, got, expected, rows=slice(None)):
    if strategy == "sampling":
        length = min(got.sequences.shape[1], expected.sequences.shape[1])  # where one has a prefix's tokens before it
        assert torch.equal(got.sequences[rows, -length:], expected.sequences[:, -length:])
    else:
        assert_same_answers(got, expected, rows)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", ["llama", "gpt2", *SLIDING])
def test_generation(name, strategy):
    plain, ours = pair(name)
    ids, mask = ids_and_mask()
    if "lookup" in strategy:
        ids, mask = torch.randint(1, 4, (1, 9)), torch.ones(1, 9, dtype=torch.long)
    expected, got = (generate(m, ids, mask, **STRATEGIES[strategy], **WITH_SCORES) for m in (plain, ours))
    check_answers(strategy, got, expected)


def test_generation_with_an_assistant():
    plain, ours = pair()
    assistant = model_of("llama")
    ids, mask = ids_and_mask(rows=1)
    assert_same_answers(*(generate(m, ids, mask, assistant_model=assistant, **WITH_SCORES) for m in (ours, plain)))


def test_encoder_decoders_generate():
    plain, ours = pair("t5")
    ids, mask = ids_and_mask(side="right")
    assert_same_answers(*(generate(m, ids, mask, num_beams=2, **WITH_SCORES) for m in (ours, plain)))
    for cache in (None, "static"):  # with more tokens before the first step than one
        started = {"decoder_input_ids": ids[:, :4], "cache_implementation": cache, **WITH_SCORES}
        assert_same_answers(*(generate(m, ids, mask, **started) for m in (ours, plain)))


@pytest.mark.parametrize("name", ["llama", "mistral-sliding"])
def test_packed_sequences_do_not_see_each_other(name):
    plain, ours = pair(name)
    ids = torch.randint(1, VOCAB, (1, 12))
    positions = torch.cat([torch.arange(7), torch.arange(5)])[None]
    with torch.no_grad():
        expected, got = (m(input_ids=ids, position_ids=positions, use_cache=False).logits for m in (plain, ours))
        alone = ours(input_ids=ids[:, 7:]).logits
    assert near(got, expected) and near(got[:, 7:], alone)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32], ids=str)
def test_masks_of_the_callers_own(dtype):
    plain, ours = pair()
    ids = torch.randint(1, VOCAB, (2, 6))
    mask = (torch.rand(2, 1, 6, 6) < 0.5) | torch.eye(6, dtype=torch.bool)
    if dtype is not torch.bool:
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(dtype).min)
    with torch.no_grad():
        expected, got = (m(input_ids=ids, attention_mask=mask).logits for m in (plain, ours))
    assert near(got, expected)


def test_a_mask_of_the_callers_own_for_all_rows_of_one_token():
    ids = torch.randint(1, VOCAB, (2, 6))
    mask = (torch.arange(6) != 2).expand(1, 1, 1, 6)
    logits = []
    for model in pair():
        cache = tf.DynamicCache(config=model.config)
        with torch.no_grad():
            model(input_ids=ids[:, :5], past_key_values=cache)
            logits.append(model(input_ids=ids[:, 5:], attention_mask=mask, past_key_values=cache).logits)
    assert near(logits[1], logits[0])


def test_dropout_in_training():
    plain, ours = pair()
    ids, mask = ids_and_mask()
    for m in (plain, ours):
        m.train()
        for module in m.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.5
    results = []
    for m in (plain, ours):
        torch.manual_seed(3)
        results.append(m(input_ids=ids, attention_mask=mask).logits[mask.bool()])
    assert near(*results)


@pytest.mark.parametrize("name", ["llama", "mistral-sliding", "gemma3"])
def test_attention_weights_are_given_where_asked_for(name):
    plain, ours = pair(name)
    plain.set_attn_implementation("eager")
    ids, mask = ids_and_mask(side="right")
    with torch.no_grad():
        expected, got = (m(input_ids=ids, attention_mask=mask, output_attentions=True) for m in (plain, ours))
    assert near(got.logits, expected.logits)
    assert all(near(a, b) for a, b in zip(got.attentions, expected.attentions, strict=True))


@pytest.mark.parametrize("name", ["llama", "gemma2"])  # by sdpa; by the model's own, which would add it to the scores
def test_a_mask_of_integers_for_each_query_is_refused(name):
    ids = ids_and_mask()[0]
    mask = torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.long).tril()
    with pytest.raises(ValueError, match=r"attention_mask is torch\.int64; .* bool or floating-point"):
        pair(name)[1](input_ids=ids, attention_mask=mask)


def gradients(model, ids, mask, **kwargs):
    model.zero_grad()
    labels = ids.masked_fill(~mask.bool(), -100) if mask is not None else ids
    model(input_ids=ids, attention_mask=mask, labels=labels, **kwargs).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "checkpointed", "reentrant"])
@pytest.mark.parametrize("side", [None, "left"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2-mixed"])
def test_gradients(name, side, checkpointing):
    plain, ours = pair(name)
    ids, mask = ids_and_mask()
    mask = mask if side else None
    if checkpointing is not None:
        ours.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        ours.enable_input_require_grads()
    expected, got = (gradients(m.train(), ids, mask) for m in (plain, ours))
    assert got.keys() == expected.keys()
    assert all(near(got[name], expected[name], 1e-4) for name in expected)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("side", [None, "left"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2-mixed", "mistral"])
def test_gradients_where_torch_checkpoints_the_layers_over_a_cache(name, side, reentrant):
    plain, ours = pair(name)
    ids, mask = ids_and_mask()
    mask = mask if side else None
    blocks = next(m for m in ours.modules() if isinstance(m, nn.ModuleList))
    for i, block in enumerate(blocks):
        blocks[i] = checkpoint_wrapper(block, CheckpointImpl.REENTRANT if reentrant else CheckpointImpl.NO_REENTRANT)
    ours.enable_input_require_grads()
    expected, got = (gradients(m.train(), ids, mask, use_cache=True) for m in (plain, ours))
    got = {name.replace("_checkpoint_wrapped_module.", ""): grad for name, grad in got.items()}
    assert got.keys() == expected.keys()
    assert all(near(got[name], expected[name], 1e-4) for name in expected)


@pytest.mark.parametrize("name", ["llama", "qwen2-mixed"])
def test_compiled_whole(name):
    plain, ours = pair(name)
    ids, mask = ids_and_mask()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for m in (mask, None):
        with torch.no_grad():
            expected, got = (
                model(input_ids=ids, attention_mask=m, use_cache=False).logits for model in (plain, compiled)
            )
        assert near(got[mask.bool()] if m is not None else got, expected[mask.bool()] if m is not None else expected)
    expected, got = gradients(plain, ids, mask), gradients(compiled, ids, mask, use_cache=False)
    assert all(near(got[f"_orig_mod.{name}"], expected[name], 1e-4) for name in expected)


@pytest.mark.parametrize("name", ["llama", "qwen2-mixed"])
def test_generation_compiled_over_a_static_cache(name):
    plain, ours = pair(name)
    ids, mask = ids_and_mask()
    expected = generate(plain, ids, mask, **WITH_SCORES)
    ours.forward = torch.compile(ours.forward, fullgraph=True, backend="aot_eager")
    assert_same_answers(generate(ours, ids, mask, cache_implementation="static", **WITH_SCORES), expected)


LENGTH = 5


def layers_of(model):
    return [module for module in model.modules() if type(module).__name__.endswith("Attention")]


def prefixes_for(model, slots=1):
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shape = (slots, heads, LENGTH, dim)
    return [(torch.randn(shape).requires_grad_(), torch.randn(shape).requires_grad_()) for _ in layers_of(model)]


def hold(model, prefixes, *more):
    for layer, (k, v) in zip(layers_of(model), prefixes, strict=True):
        layer._prefix = HeldPrefix(k, v, *more)


def cache_of(prefixes, rows, slot=0, length=LENGTH):
    """The prefix as tokens that every row has seen, the way peft gives it to a model."""
    cache = tf.DynamicCache()
    for layer, (k, v) in enumerate(prefixes):
        cache.update(*(t[slot : slot + 1, :, :length].expand(rows, -1, -1, -1) for t in (k, v)), layer)
    return cache


def positions_of(mask, length=LENGTH):
    """Tokens begin behind the prefix; padding anywhere."""
    return (mask.cumsum(1) - 1).clamp(min=0) + length


def by_hand(plain, prefixes, ids, mask, slot=0, length=LENGTH):
    """Logits over a cache that holds the prefix, row by row without padding, so that every position is as in peft."""
    rows = []
    for row in range(len(ids)):
        own = ids[row, mask[row].bool()][None]
        if length:
            cache = {"past_key_values": cache_of(prefixes, 1, slot[row] if isinstance(slot, list) else slot, length)}
        else:
            cache = {}
        positions = torch.arange(own.shape[1])[None] + length
        logits = plain(
            input_ids=own, position_ids=positions, attention_mask=torch.ones(1, length + own.shape[1]), **cache
        ).logits
        rows.append(logits[0])
    return torch.cat(rows)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "phi", "gemma", *SLIDING, *CAPS_AND_SINKS])
def test_a_prefix_is_what_peft_puts_into_the_cache(name, side):
    plain, ours = pair(name)
    prefixes = prefixes_for(ours)
    hold(ours, prefixes)
    ids, mask = ids_and_mask(side=side)
    with torch.no_grad():
        got = ours(input_ids=ids, attention_mask=mask, position_ids=positions_of(mask)).logits[mask.bool()]
        assert near(got, by_hand(plain, prefixes, ids, mask))


@pytest.mark.parametrize("name", ["llama", "qwen2-mixed"])
def test_each_row_its_own_prefix_or_none(name):
    plain, ours = pair(name)
    prefixes = prefixes_for(ours, slots=2)
    hold(ours, prefixes, torch.tensor([1, -1, 0]), torch.tensor([LENGTH, 2]))
    ids, mask = ids_and_mask()
    lengths = torch.tensor([2, 0, LENGTH])
    positions = (mask.cumsum(1) - 1).clamp(min=0) + lengths[:, None]
    with torch.no_grad():
        for dropout in (0.0, 1e-9):  # by the operator, and elsewhere
            got = run_with_dropout(ours, dropout, input_ids=ids, attention_mask=mask, position_ids=positions).logits
            for row, (slot, length) in enumerate([(1, 2), (0, 0), (0, LENGTH)]):
                expected = by_hand(plain, prefixes, ids[row : row + 1], mask[row : row + 1], slot, length)
                assert near(got[row, mask[row].bool()], expected)


def run_with_dropout(model, dropout, **inputs):
    """A forward that asks the attention for dropout, which transformers' own function then computes."""
    for layer in layers_of(model):
        layer.attention_dropout = dropout
        layer.training = dropout > 0
    return model(**inputs)


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "checkpointed", "reentrant"])
@pytest.mark.parametrize("dropout", [0.0, 1e-9], ids=["operator", "elsewhere"])
@pytest.mark.parametrize("name", ["llama", "mistral-sliding"])
def test_gradients_of_a_prefix(name, dropout, checkpointing):
    plain, ours = pair(name)
    prefixes = prefixes_for(ours)
    hold(ours, prefixes)
    ids, mask = ids_and_mask(side="right")
    cotangent = torch.randn(int(mask.sum()), VOCAB)
    parameters = [t for pair in prefixes for t in pair] + [plain.model.embed_tokens.weight]
    expected = torch.autograd.grad(by_hand(plain, prefixes, ids, mask), parameters, cotangent)
    if checkpointing is not None:
        ours.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    ours.train()
    out = run_with_dropout(ours, dropout, input_ids=ids, attention_mask=mask, position_ids=positions_of(mask))
    parameters[-1] = ours.model.embed_tokens.weight
    for p in parameters:
        p.grad = None
    out.logits[mask.bool()].backward(cotangent)
    assert all(near(p.grad, g, 1e-4) for p, g in zip(parameters, expected, strict=True))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", ["llama", *SLIDING])
def test_generation_with_a_prefix(name, strategy):
    plain, ours = pair(name)
    prefixes = prefixes_for(ours)
    hold(ours, prefixes)
    if "sampling" in strategy or "lookup" in strategy:
        ids, mask = torch.randint(1, 5, (1, 9)), torch.ones(1, 9, dtype=torch.long)
    else:
        ids, mask = ids_and_mask()
    shift(ours)
    got = generate(ours, ids, mask, **STRATEGIES[strategy], **WITH_SCORES)
    for row in range(len(ids)):
        own = ids[row, mask[row].bool()][None]
        # The other strategies give what greedy decoding gives (transformers' own drop a cache they are given).
        more = STRATEGIES[strategy] if strategy in ("beams", "sampling") else {}
        expected = generate(
            plain,
            torch.cat([torch.zeros(1, LENGTH, dtype=torch.long), own], 1),
            torch.ones(1, LENGTH + own.shape[1]),
            past_key_values=cache_of(prefixes, more.get("num_beams", 1)),
            **more,
            **WITH_SCORES,
        )
        check_answers(strategy, got, expected, slice(row, row + 1))


def shift(model):
    """Tokens begin behind the prefix, as the owner of a prefix sees to."""

    def hook(_, args, kwargs):
        return args, kwargs | {"position_ids": kwargs["position_ids"] + LENGTH}

    model.model.register_forward_pre_hook(hook, with_kwargs=True)


@pytest.mark.parametrize("dropout", [0.0, 1e-9], ids=["operator", "elsewhere"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", SLIDING)
def test_a_prefix_that_left_the_window_stays_out_of_sight_behind_hidden_tokens(name, cache, dropout):
    _, ours = pair(name)
    hold(ours, prefixes_for(ours), torch.tensor([0, 0, -1, 0]))
    ids, mask = torch.randint(1, VOCAB, (4, 16)), torch.ones(4, 16, dtype=torch.long)
    mask[0, 4:8] = mask[2, 3:8] = 0  # the first turn of a chat, padded
    mask[1, :6] = 0
    positions = positions_of(mask)
    inputs = {"input_ids": ids, "position_ids": positions}
    kept = tf.DynamicCache(config=ours.config) if cache == "dynamic" else tf.StaticCache(ours.config, max_cache_len=16)
    with torch.no_grad():
        expected = run_with_dropout(ours, dropout, **inputs, attention_mask=mask, use_cache=False).logits
        for start, end in [(0, 8), (8, 9), (9, 12), *((i, i + 1) for i in range(12, 16))]:
            part = {name: t[:, start:end] for name, t in inputs.items()}
            got = ours(**part, attention_mask=mask[:, :end], past_key_values=kept).logits
            seen = mask[:, start:end].bool()
            assert near(got[seen], expected[:, start:end][seen])


def vision_pair():
    """Gemma 3 with images, whose sliding layers have bool masks, in transformers' attention and in ours."""
    text = tf.Gemma3TextConfig(**_SIZES, sliding_window=8, layer_types=_MIXED, eos_token_id=None)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    vision = tf.SiglipVisionConfig(**sizes, image_size=16, patch_size=8)
    config = tf.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=VOCAB - 1)
    plain = tf.Gemma3ForConditionalGeneration(config).eval()
    ours = copy.deepcopy(plain)
    ours.set_attn_implementation("pyfastpeft")
    prefixes = prefixes_for(ours.model.language_model)
    hold(ours.model.language_model, prefixes)
    return plain, ours, prefixes


def test_a_prefix_in_a_window_over_blocks_of_images():
    plain, ours, prefixes = vision_pair()
    ids, ones = torch.randint(1, VOCAB, (2, 14)), torch.ones(2, 14, dtype=torch.long)
    types = torch.zeros_like(ids)
    types[0, 2:6] = types[1, 5:9] = 1
    with torch.no_grad():
        got = ours(input_ids=ids, attention_mask=ones, token_type_ids=types, position_ids=positions_of(ones)).logits
        types, ones = nn.functional.pad(types, (LENGTH, 0)), nn.functional.pad(ones, (LENGTH, 0), value=1)
        more = {"position_ids": positions_of(ones, 0)[:, LENGTH:], "past_key_values": cache_of(prefixes, 2)}
        assert near(got, plain(input_ids=ids, attention_mask=ones, token_type_ids=types, **more).logits)


@pytest.mark.parametrize("cache", [None, "static"])
def test_a_prefix_before_text_alone_where_there_could_be_images(cache):
    _, ours, _ = vision_pair()
    ids, mask = ids_and_mask(length=6)
    mask[0, 1:4] = 0
    options = {"cache_implementation": cache, "return_dict_in_generate": True, "output_logits": True}
    got, expected = (generate(ours, ids, mask, **options, **types) for types in ({"token_type_ids": ids * 0}, {}))
    assert near(torch.stack(got.logits), torch.stack(expected.logits))


@pytest.mark.parametrize(("queries", "keys"), [(1, 6), (6, 6), (3, 8)])
@pytest.mark.parametrize("causal", [True, False])
def test_what_the_operator_leaves_to_others_sees_the_same_keys(queries, keys, causal):
    _, model = pair()
    layer = layers_of(model)[0]
    hold(model, [tuple(torch.randn(1, 2, LENGTH, 8) for _ in range(2)) for _ in layers_of(model)])
    q, k, v = torch.randn(2, 4, queries, 8), torch.randn(2, 2, keys, 8), torch.randn(2, 2, keys, 8)
    expected = attention.attention_forward(layer, q, k, v, None, is_causal=causal)[0]
    asked = {"position_bias": torch.zeros(1, 4, queries, LENGTH + keys)}
    got = attention.attention_forward(layer, q, k, v, None, is_causal=causal, **asked)[0]
    assert near(got, expected)


def test_a_prefix_that_cannot_be_placed_is_an_error():
    ids = torch.randint(1, VOCAB, (1, 12))
    _, sliding = pair("mistral-sliding")
    hold(sliding, prefixes_for(sliding))
    for n in (12, 1):
        with pytest.raises(ValueError, match=rf"MistralAttention sees a part.*attention_mask is \(1, 1, {n}, {n}\)"):
            sliding(input_ids=ids[:, :n], attention_mask=torch.ones(1, 1, n, n, dtype=torch.bool))
    _, biased = pair("t5")
    layers = [module for module in biased.modules() if type(module).__name__ == "T5Attention"]
    k = torch.zeros(1, 4, 2, 8)
    for layer in layers:
        layer._prefix = HeldPrefix(k, k)
    with pytest.raises(ValueError, match="T5Attention adds a position bias"):
        biased(input_ids=ids, decoder_input_ids=ids)


def test_masks_take_memory_for_the_keys_alone():
    _, ours = pair("mistral-sliding")
    ids, mask = ids_and_mask(rows=2, length=50)
    made = attention.attention_mask(
        batch_size=2, q_length=50, kv_length=50, attention_mask=mask.bool(), config=ours.config
    )
    assert made.dtype == torch.int32 and made.shape == (2, 1, 1, 50)
    seen = []
    for layer in layers_of(ours):
        layer.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True)
    ours(input_ids=ids, attention_mask=mask)
    assert all(m.untyped_storage().nbytes() == 2 * 50 * 4 for m in seen)


def test_no_mask_waits_for_a_device():
    """Tensors on "meta" have no values that could be looked at."""
    seen = torch.ones(2, 50, dtype=torch.bool, device="meta")
    offset = torch.full((), 49, device="meta")
    for mask, first in [(seen, 49), (seen, offset), (None, offset)]:
        options = {"q_length": 1, "kv_length": 50, "q_offset": first, "attention_mask": mask, "device": "meta"}
        made = attention.attention_mask(batch_size=2, **options)
        assert made.is_meta and made.dtype == torch.int32 and made.shape == (2, 1, 1, 50)


def test_import_alone_registers_it_and_a_saved_model_does_not_name_it(tmp_path):
    _, ours = pair()
    ours.save_pretrained(tmp_path)
    assert "pyfastpeft" not in (tmp_path / "config.json").read_text()
    code = (
        "import pyfastpeft, transformers; "
        f"m = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}, attn_implementation='pyfastpeft'); "
        "import torch; print(m.config._attn_implementation, m(torch.ones(1, 3, dtype=torch.long)).logits.shape)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.startswith("pyfastpeft torch.Size"), result.stderr


def test_accelerate_and_get_peft_model_use_it_and_give_the_models_own_back():
    ids = torch.randint(1, VOCAB, (2, 6))
    plain = model_of("llama")
    with torch.no_grad():
        expected = plain(input_ids=ids).logits
    fast = fp.accelerate(copy.deepcopy(plain))
    assert fast.config._attn_implementation == "pyfastpeft"
    with torch.no_grad():
        assert near(fast(input_ids=ids).logits, expected)
    model = fp.get_peft_model(copy.deepcopy(plain), fp.LoraConfig())
    assert model.config._attn_implementation == "pyfastpeft"
    for again in (copy.deepcopy(model).unload(), model.merge_and_unload()):
        assert again.config._attn_implementation == "sdpa"
        with torch.no_grad():
            assert torch.equal(again(input_ids=ids).logits, expected)


@pytest.mark.parametrize("chosen", ["sdpa", "eager"])
@pytest.mark.parametrize("config", [fp.LoraConfig, lambda: fp.PrefixTuningConfig(num_virtual_tokens=2)])
def test_a_layer_that_was_copied_goes_with_its_model(config, chosen):
    plain = model_of("llama")
    plain.set_attn_implementation(chosen)
    layers = plain.model.layers
    layers[1] = copy.deepcopy(layers[0])
    layers[1].self_attn.layer_idx = 1
    ids, mask = ids_and_mask()
    model = fp.get_peft_model(copy.deepcopy(plain), config())
    with torch.no_grad(), model.disable_adapter():
        got, expected = (m(input_ids=ids, attention_mask=mask).logits[mask.bool()] for m in (model, plain))
    assert near(got, expected)
    own = model.unload().model.layers[1].self_attn.config
    assert own is not model.get_base_model().config and own._attn_implementation == chosen


@pytest.mark.parametrize("chosen", ["eager", "pyfastpeft", "float64"])
def test_an_attention_that_was_chosen_stays(chosen):
    model = model_of("llama", torch.float64 if chosen == "float64" else torch.float32)
    before = "sdpa" if chosen == "float64" else chosen
    model.set_attn_implementation(before)
    peft_model = fp.get_peft_model(fp.accelerate(model), fp.LoraConfig())
    assert model.config._attn_implementation == before
    assert peft_model.unload().config._attn_implementation == before


@pytest.mark.parametrize("before", ["sdpa", "eager"])
@pytest.mark.parametrize("chosen", ["sdpa", "eager"])
def test_an_attention_that_was_chosen_since_stays_until_the_model_is_accelerated(chosen, before):
    model = model_of("llama")
    model.set_attn_implementation(before)
    model = fp.get_peft_model(model, fp.LoraConfig())
    model.set_attn_implementation(chosen)
    model.add_adapter("other", fp.LoraConfig())
    assert model.config._attn_implementation == chosen
    fp.accelerate(model)
    assert model.config._attn_implementation == ("pyfastpeft" if chosen == "sdpa" else chosen)


def test_a_part_that_names_no_attention_goes_on_naming_none():
    sizes = {k: v for k, v in _SIZES.items() if k not in ("num_key_value_heads", "head_dim")}
    vision = {"embed_dim": 32, "image_size": 16, "patch_size": 8, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = tf.IdeficsModel(tf.IdeficsConfig(**sizes, vision_config=vision | {"intermediate_size": 32}))
    config = model.config
    parts = config, config.vision_config, config.perceiver_config  # of the last there is no module
    adapted = fp.get_peft_model(model, fp.LoraConfig(target_modules=["q_proj"]))
    assert [part._attn_implementation for part in parts] == ["pyfastpeft", "pyfastpeft", None]
    adapted.unload()
    assert [part._attn_implementation for part in parts] == ["sdpa", "sdpa", None]


@pytest.mark.parametrize("name", ["llama", "qwen2-mixed"])
def test_a_prefix_in_compiled_code(name):
    plain, ours = pair(name)
    prefixes = prefixes_for(ours)
    hold(ours, prefixes)
    ids, mask = ids_and_mask()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    got = compiled(input_ids=ids, attention_mask=mask, position_ids=positions_of(mask)).logits[mask.bool()]
    expected = by_hand(plain, prefixes, ids, mask)
    cotangent = torch.randn_like(got)
    leaves = [t for pair in prefixes for t in pair]
    assert near(got, expected)
    for a, b in zip(*(torch.autograd.grad(out, leaves, cotangent) for out in (got, expected)), strict=True):
        assert near(a, b, 1e-4)


def test_a_model_that_works_on_its_masks_is_left_alone():
    model = tf.AutoModelForCausalLM.from_config(tf.DogeConfig(**_SIZES, sliding_window=4))
    assert fp.accelerate(model).config._attn_implementation == "sdpa"
    sizes = {k: v for k, v in _SIZES.items() if k not in ("vocab_size", "pad_token_id")}
    lasr = tf.LasrForCTC(tf.LasrCTCConfig(vocab_size=VOCAB, encoder_config=sizes | {"num_mel_bins": 16})).eval()
    sound = torch.randn(2, 64, 16)
    siglip2 = tf.Siglip2VisionModel(tf.Siglip2VisionConfig(**sizes, num_patches=16, patch_size=4)).eval()
    padding = torch.arange(16).repeat(2, 1) < torch.tensor([[16], [12]])
    images = {
        "pixel_values": torch.randn(2, 16, 48),
        "pixel_attention_mask": padding.long(),
        "spatial_shapes": torch.tensor([[4, 4], [4, 3]]),
    }
    sizes |= {"image_size": 16, "patch_size": 4}
    beit = tf.BeitModel(tf.BeitConfig(**sizes, use_relative_position_bias=True)).eval()
    shared = tf.BeitModel(tf.BeitConfig(**sizes, use_shared_relative_position_bias=True)).eval()
    image = {"pixel_values": torch.randn(2, 3, 16, 16)}
    with torch.no_grad():
        for plain, inputs, output in (
            (lasr, {"input_features": sound}, "logits"),
            (siglip2, images, "pooler_output"),
            (beit, image, "pooler_output"),
            (shared, image, "pooler_output"),
        ):
            ours = fp.accelerate(copy.deepcopy(plain))
            assert near(ours(**inputs)[output], plain(**inputs)[output])


def test_models_without_sdpa_need_not_say_whether_they_are_causal():
    config = tf.BigBirdPegasusConfig(
        vocab_size=VOCAB, d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=64, is_decoder=True
    )
    plain = tf.BigBirdPegasusForCausalLM(config).eval()
    ours = copy.deepcopy(plain)
    ours.set_attn_implementation("pyfastpeft")
    ids = torch.randint(1, VOCAB, (2, 7))
    with torch.no_grad():
        assert near(ours(input_ids=ids).logits, plain(input_ids=ids).logits)
        assert not ours.model.decoder.layers[0].self_attn.is_causal  # which is not so


def test_a_mask_of_the_callers_own_over_a_prefix_within_the_window():
    plain, ours = pair("mistral")  # its window is longer than prefix and text
    prefixes = prefixes_for(ours)
    hold(ours, prefixes)
    ids = torch.randint(1, VOCAB, (2, 6))
    ones = torch.ones_like(ids)
    mask = torch.ones(6, 6).tril().bool().expand(2, 1, 6, 6)
    with torch.no_grad():
        got = ours(input_ids=ids, attention_mask=mask, position_ids=positions_of(ones)).logits
        assert near(got.flatten(0, 1), by_hand(plain, prefixes, ids, ones))
