"""A decoder runs on a batch's different tokens; nothing that anybody reads is another for it."""

import copy
import itertools

import pytest
import torch
import transformers as tf
from architectures import SMALL, quantized, randomize, relative, vary_vectors
from tiny import Losses, tiny_llama, tiny_tokenizer
from torch.nn.modules.module import register_module_forward_hook
from transformers.cache_utils import DynamicLayer
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.models.llama import modeling_llama

import pyfastpeft as fp
from pyfastpeft.adapters import Rows
from pyfastpeft.conversations import encode, read_rows
from pyfastpeft.data import drug_qa
from pyfastpeft.integrations import fused_decoder
from pyfastpeft.integrations.accelerate import unfuse
from pyfastpeft.integrations.deferred_logits import defer_logits
from pyfastpeft.training import train_adapter

ROWS, LENGTH, SHARED = 4, 19, 6
CACHE = fused_decoder._CACHE
CONFIGS = [
    tf.LlamaConfig(**SMALL),
    tf.MistralConfig(**SMALL, sliding_window=LENGTH),
    tf.Qwen2Config(**SMALL),
    tf.Qwen3Config(**SMALL),
    tf.SmolLM3Config(**SMALL),
    tf.GraniteConfig(**SMALL),
    tf.Phi3Config(**SMALL),
    tf.GemmaConfig(**SMALL),
    tf.Gemma3TextConfig(**SMALL, sliding_window=LENGTH, layer_types=["full_attention", "sliding_attention"]),
]
METHODS = {
    "lora": fp.LoraConfig(r=4, target_modules="all-linear", bias="all"),
    "dora": fp.LoraConfig(r=4, use_dora=True),
    "bottleneck": fp.BottleneckConfig(reduction_factor=4),
    "tokens": fp.LoraConfig(r=4, trainable_token_indices=[3, 7]),
    "prompt": fp.PromptTuningConfig(num_virtual_tokens=5),
    "prefix": fp.PrefixTuningConfig(num_virtual_tokens=5, prefix_init="random"),
    "ptuning-v2": fp.DeepPromptConfig(num_virtual_tokens=5),
}


def llama(**config):
    return vary_vectors(tf.AutoModelForCausalLM.from_config(tf.LlamaConfig(**SMALL | config))).float()


def others(count):
    """Tokens of which no two are the same."""
    return torch.randperm(SMALL["vocab_size"] - 2)[:count] + 2


def batch(lengths=(LENGTH, 9, 12, 7), left=False, shared=SHARED):
    """Rows of these lengths, padded, of which all begin with as many tokens alike, and no two with more; with none
    where the padding is on the left."""
    ids = torch.randint(2, SMALL["vocab_size"], (ROWS, LENGTH))
    ids[:, :shared] = ids[0, :shared]
    ids[:, shared : shared + 1] = others(ROWS).unsqueeze(1)
    mask = (torch.arange(LENGTH) < torch.tensor(lengths).unsqueeze(1)).long()
    if left:
        ids, mask = (t.flip(1) for t in (ids, mask))
    first = mask.argmax(1, keepdim=True)
    if left:
        ids.scatter_(1, first, others(ROWS).unsqueeze(1))
    labels = ids.masked_fill(mask == 0, -100)
    labels.scatter_(1, first, -100)  # which padding on the left would be said to predict
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def different(inputs):
    """The tokens of rows that begin at their first place, each with those before it."""
    rows = zip(inputs["input_ids"].tolist(), inputs["attention_mask"].sum(1).tolist(), strict=True)
    return {tuple(row[: i + 1]) for row, length in rows for i in range(length)}


@pytest.fixture
def seen(monkeypatch):
    """How many tokens ran in each call, and how many of them the rows shared; None: all, in their rows."""
    calls = []

    def recorded(*args):
        tokens = plan(*args)
        calls.append(tokens and (tokens.ids.shape[0], tokens.mask.shape[2] - 1))
        return tokens

    plan = fused_decoder.distinct_tokens
    monkeypatch.setattr(fused_decoder, "distinct_tokens", recorded)
    return calls


def pair(model, config=METHODS["lora"]):
    """A model in training that runs as it does here, and a copy that runs as transformers wrote it; without a cache, as
    the Trainer has it."""
    model.config.use_cache = False
    fast = fp.get_peft_model(model, config)
    randomize(fast)
    fp.accelerate(fast.get_base_model())
    plain = copy.deepcopy(fast)
    unfuse(plain.get_base_model())
    return fast.train(), plain.train()


def loss_and_gradients(model, **inputs):
    model.zero_grad()
    outputs = model(**inputs)
    outputs.loss.backward()
    return outputs, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def check_alike(fast, plain, inputs, tolerance=1e-5):
    """In loss, gradients, and the logits that are no padding's."""
    got, gradients = loss_and_gradients(fast, **inputs)
    expected, expected_gradients = loss_and_gradients(plain, **inputs)
    torch.testing.assert_close(got.loss, expected.loss.to(got.loss), rtol=tolerance, atol=tolerance)
    assert gradients.keys() == expected_gradients.keys()
    for name, expected_gradient in expected_gradients.items():
        assert relative(gradients[name], expected_gradient) < 50 * tolerance, name
    shown = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])) != 0
    assert relative(fast(**inputs).logits[shown], plain(**inputs).logits[shown]) < 10 * tolerance


def check_as_exact(model, inputs, dtype):
    """As near to float64 as with all tokens in their rows; in float32, or within the 1e-4 that gradients must keep."""
    exact = copy.deepcopy(model).double()
    unfuse(exact.get_base_model())
    outputs, gradients = loss_and_gradients(exact, **inputs)
    loss = outputs.loss.double()
    got, got_gradients = loss_and_gradients(model, **inputs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused_decoder, "distinct_tokens", lambda *_: None)
        near, near_gradients = loss_and_gradients(model, **inputs)
    eps = torch.finfo(dtype).eps
    assert abs(got.loss - loss) < 2 * abs(near.loss - loss) + 4 * eps * loss
    for name, expected in gradients.items():
        near_error = relative(near_gradients[name], expected)
        assert relative(got_gradients[name], expected) < 3 * near_error + max(10 * eps, 1e-4), name


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.model_type)
def test_families(config, dtype, left, seen):
    model = vary_vectors(tf.AutoModelForCausalLM.from_config(copy.deepcopy(config))).to(dtype)
    inputs = batch(left=left)
    check_as_exact(pair(model)[0], inputs, dtype)
    shared = 0 if left else SHARED
    assert seen[0] == (int(inputs["attention_mask"].sum()) - (ROWS - 1) * shared, shared)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", ["padded", "whole", "left"])
def test_methods(method, case, seen):
    """A soft prompt that all rows have stands before what they share."""
    fast, plain = pair(llama(), METHODS[method])
    inputs = batch(left=case == "left", lengths=[LENGTH] * ROWS if case == "whole" else (LENGTH, 9, 12, 7))
    if case == "whole":
        del inputs["attention_mask"]
    check_alike(fast, plain, inputs)
    shared = 0 if case == "left" else SHARED
    shown = ROWS * LENGTH if case == "whole" else int(inputs["attention_mask"].sum())
    assert seen[0] == (shown - (ROWS - 1) * shared, shared)


def test_a_4_bit_base_and_the_labels_of_first_tokens(seen):
    fast, plain = pair(quantized(llama()), METHODS["prompt"])
    inputs = batch()
    inputs["labels"][:, 0] = inputs["input_ids"][:, 0]
    check_alike(fast, plain, inputs)
    assert seen[0] == (int(inputs["attention_mask"].sum()) - (ROWS - 1) * SHARED, SHARED)


@pytest.mark.parametrize(
    "lengths", [(LENGTH, SHARED, SHARED, 7), (LENGTH,) * ROWS, (LENGTH, 0, 5, 1)], ids=["own none", "whole", "empty"]
)
@pytest.mark.parametrize("shared", [0, SHARED, LENGTH])
def test_rows_of_any_length(lengths, shared, seen):
    fast, plain = pair(llama())
    inputs = batch(lengths, shared=shared)
    check_alike(fast, plain, inputs)
    rows = {tuple(row[:length]) for row, length in zip(inputs["input_ids"].tolist(), lengths, strict=True)}
    together = min(shared, LENGTH - 1, *lengths) if len(rows) > 1 else 0
    count = len(different(inputs))
    assert seen[0] == ((count, together) if count <= 15 / 16 * ROWS * LENGTH else None)


def answers_of_prompts(together=3, padding=True):
    """Three prompts that begin alike, each with two answers, side by side or not."""
    lengths = LENGTH, 14, 9, LENGTH, 12, 6
    ids = torch.randint(2, SMALL["vocab_size"], (6, LENGTH))
    ids[:, :together] = ids[0, :together]
    for prompt, (one, other) in enumerate([(0, 1), (2, 5), (3, 4)]):
        length = min(lengths[one], lengths[other], 5 + prompt)
        ids[other, :length] = ids[one, :length]
    mask = (torch.arange(LENGTH) < torch.tensor(lengths).unsqueeze(1)).long()
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :5] = -100
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return inputs if padding else {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize("together", [0, 3, 5])
@pytest.mark.parametrize("method", METHODS)
def test_several_answers_of_each_prompt(method, together, seen):
    fast, plain = pair(llama(), METHODS[method])
    inputs = answers_of_prompts(together=together)
    check_alike(fast, plain, inputs)
    count = len(different(inputs))
    assert seen[0][0] == count < int(inputs["attention_mask"].sum()) - 5 * together


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.model_type)
def test_several_answers_of_each_prompt_in_each_family(config, dtype, seen):
    model = vary_vectors(tf.AutoModelForCausalLM.from_config(copy.deepcopy(config))).to(dtype)
    inputs = answers_of_prompts()
    check_as_exact(pair(model)[0], inputs, dtype)
    assert seen[0][0] == len(different(inputs))


def test_several_answers_of_each_prompt_in_whole_rows(seen):
    fast, plain = pair(llama())
    inputs = answers_of_prompts(padding=False)
    check_alike(fast, plain, inputs)
    whole = inputs | {"attention_mask": torch.ones_like(inputs["input_ids"])}
    assert [call[0] for call in seen] == [len(different(whole))] * 2


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method", ["lora", "prefix"])
@pytest.mark.parametrize("inputs", [batch, answers_of_prompts])
def test_gradient_checkpointing(inputs, method, reentrant, seen):
    fast, plain = pair(llama(), METHODS[method])
    fast.get_base_model().gradient_checkpointing_enable({"use_reentrant": reentrant})
    inputs = inputs()
    check_alike(fast, plain, inputs)
    assert seen[0][0] == len(different(inputs))


def test_rows_that_only_unread_padding_tells_apart(seen):
    fast, plain = pair(llama())
    inputs = batch([9] * ROWS, shared=9)
    inputs["input_ids"][:, 9] = others(ROWS)
    check_alike(fast, plain, inputs)
    assert seen[0] == (9, 0)


def test_several_answers_of_each_prompt_under_dropout(seen):
    fast, _ = pair(llama(), fp.LoraConfig(r=4, lora_dropout=0.1))
    inputs = answers_of_prompts()
    fast(**inputs).loss.backward()
    assert seen == [(int(inputs["attention_mask"].sum()), 0)]


def test_dropout_is_of_each_row(seen):
    fast, plain = pair(llama(), fp.LoraConfig(r=4, lora_dropout=0.1))
    inputs = batch()
    fast(**inputs).loss.backward()
    assert seen == [(int(inputs["attention_mask"].sum()), 0)]
    fast.eval(), plain.eval()
    check_alike(fast, plain, inputs)
    assert seen[1][1] == SHARED


def test_dropout_of_one_attention(seen):
    fast, _ = pair(llama())
    fast.get_base_model().model.layers[1].self_attn.attention_dropout = 0.5
    inputs = batch()
    assert torch.isfinite(fast(**inputs).loss)
    assert seen == [(int(inputs["attention_mask"].sum()), 0)]


@pytest.mark.parametrize("gradients", [False, True])
def test_evaluation_shares_and_keeps_padding(gradients, seen):
    fast, plain = (m.eval() for m in pair(llama()))
    padded = batch()
    whole = {name: t[:, :7] for name, t in padded.items()}
    with torch.set_grad_enabled(gradients):
        for inputs in (padded, whole):
            got, expected = (m(**inputs).logits for m in (fast, plain))
            assert relative(got, expected) < 1e-5  # that of padding too
    assert seen == [(SHARED + ROWS * (LENGTH - SHARED), SHARED), (SHARED + ROWS, SHARED)]


def test_a_hidden_token_among_those_that_rows_begin_with(seen):
    fast, plain = (m.eval() for m in pair(llama()))
    inputs = batch([LENGTH] * ROWS)
    inputs["attention_mask"][:, 2] = 0
    with torch.no_grad():
        got, expected = (m(**inputs).logits for m in (fast, plain))
    assert relative(got, expected) < 1e-5
    assert seen == [(ROWS * LENGTH - (ROWS - 1) * SHARED, 2)]


def test_rows_that_are_alike_again_after_they_differed(seen):
    fast, plain = pair(llama())
    inputs = batch([LENGTH] * ROWS)
    inputs["input_ids"][:, SHARED + 1 :] = inputs["input_ids"][0, SHARED + 1 :]
    check_alike(fast, plain, inputs)
    assert seen[0] == (ROWS * LENGTH - (ROWS - 1) * SHARED, SHARED)


def test_rotary_embeddings_that_are_decorated_as_in_transformers_5_20(monkeypatch, seen):
    fast, plain = pair(llama())
    rotary = modeling_llama.LlamaRotaryEmbedding
    monkeypatch.setattr(rotary, "forward", torch.no_grad()(rotary.forward))
    check_alike(fast, plain, batch())
    assert seen[0] is not None


def test_a_cache_that_training_goes_on_from(seen):
    fast, plain = pair(llama())
    inputs = batch()
    for model in (fast, plain):
        model.config.use_cache = True
    check_alike(fast, plain, inputs)
    assert seen[0] == (int(inputs["attention_mask"].sum()) - (ROWS - 1) * SHARED, SHARED)
    caches = [cache_of(m(**inputs)) for m in (fast, plain)]
    check_same_cache(*caches, inputs["attention_mask"] != 0)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(inputs["attention_mask"])], 1)
    more = {"input_ids": inputs["input_ids"], "attention_mask": mask}
    seen.clear()
    got, expected = (m(**more, **{CACHE: c}).logits for m, c in zip((fast, plain), caches, strict=True))
    assert relative(got, expected) < 1e-5
    assert not any(seen)


def test_gradient_checkpointing_fills_no_cache(seen):
    fast, plain = pair(llama())
    for model in (fast, plain):
        model.config.use_cache = True
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    inputs = batch()
    check_alike(fast, plain, inputs)
    assert fast(**inputs).keys() == plain(**inputs).keys()
    assert seen[0][1] == SHARED


def test_autocast(seen):
    fast, _ = pair(llama())
    with torch.autocast("cpu", torch.bfloat16):
        check_as_exact(fast, batch(), torch.bfloat16)
    assert seen[0][1] == SHARED


def test_the_sum_over_all_batches_of_a_step(seen):
    fast, plain = pair(llama())
    check_alike(fast, plain, batch() | {"num_items_in_batch": torch.tensor(77)})
    assert seen[0] is not None


def test_a_head_for_each_token(seen):
    model = vary_vectors(
        tf.LlamaForTokenClassification(tf.LlamaConfig(**SMALL, num_labels=5, classifier_dropout=0.0))
    ).float()
    fast, plain = pair(model, fp.LoraConfig(r=4, task_type="TOKEN_CLS"))
    inputs = batch()
    inputs["labels"] = inputs["labels"].clamp(max=4)
    check_alike(fast, plain, inputs)
    assert seen[0] == (SHARED + ROWS * (LENGTH - SHARED), SHARED)


CLASSIFIERS = [tf.LlamaForSequenceClassification, tf.Qwen2ForSequenceClassification, tf.Phi3ForSequenceClassification]


def classifiers(kind=tf.LlamaForSequenceClassification, method="lora"):
    model = vary_vectors(kind(kind.config_class(**SMALL, num_labels=3))).float()
    assert kind.forward is GenericForSequenceClassification.forward
    config = copy.deepcopy(METHODS[method])
    config.task_type = "SEQ_CLS"
    return pair(model, config)


def check_classes_alike(fast, plain, inputs):
    expected, gradients = loss_and_gradients(plain, **inputs)
    got, got_gradients = loss_and_gradients(fast, **inputs)
    assert relative(got.logits, expected.logits) < 1e-5
    assert all(relative(got_gradients[name], gradients[name]) < 1e-4 for name in gradients)
    fast.eval(), plain.eval()
    with torch.no_grad():
        assert relative(fast(**inputs).logits, plain(**inputs).logits) < 1e-5


def of_classes(left=False):
    inputs = batch(left=left)
    ids = inputs["input_ids"] * inputs["attention_mask"]
    return {"input_ids": ids, "attention_mask": inputs["attention_mask"], "labels": torch.randint(3, (ROWS,))}


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_a_head_for_each_row(kind, left, seen):
    inputs = of_classes(left)
    check_classes_alike(*classifiers(kind), inputs)
    shared = 0 if left else SHARED
    assert seen == [(int(inputs["attention_mask"].sum()) - (ROWS - 1) * shared, shared)] * 2


@pytest.mark.parametrize("method", ["bottleneck", "prompt", "prefix", "ptuning-v2"])
def test_a_head_for_each_row_with_each_method(method, seen):
    inputs = of_classes()
    check_classes_alike(*classifiers(method=method), inputs)
    assert seen == [(int(inputs["attention_mask"].sum()) - (ROWS - 1) * SHARED, SHARED)] * 2


def test_a_row_whose_last_token_is_hidden_is_pooled_there(seen):
    fast, plain = classifiers()
    inputs = of_classes()
    inputs["attention_mask"][0, -1] = 0
    check_classes_alike(fast, plain, inputs)
    assert seen == [(SHARED + ROWS * (LENGTH - SHARED), SHARED)] * 2


def test_a_head_for_each_row_whose_loss_is_of_each_token(seen):
    fast, plain = classifiers()
    for model in (fast, plain):
        model.get_base_model().loss_type = "ForTokenClassification"
    inputs = of_classes() | {"labels": torch.randint(3, (ROWS, LENGTH))}
    losses = [m(**inputs).loss for m in (fast, plain)]
    torch.testing.assert_close(*losses)


def test_a_head_for_each_row_that_reads_more(seen):
    fast, plain = classifiers()
    for model in (fast, plain):
        model.get_base_model().score.register_forward_hook(lambda module, args, logits: logits + logits.mean())
    check_classes_alike(fast, plain, of_classes())
    assert seen == [(SHARED + ROWS * (LENGTH - SHARED), SHARED)] * 2


@pytest.mark.parametrize(
    "options", [{"target_modules": ["q_proj", "lm_head"]}, {"modules_to_save": ["lm_head"]}], ids=str
)
def test_an_output_head_with_an_adapter(options, seen):
    fast, plain = pair(llama(), fp.LoraConfig(r=4, **options))
    inputs = batch()
    check_alike(fast, plain, inputs)
    assert seen[0] == (int(inputs["attention_mask"].sum()) - (ROWS - 1) * SHARED, SHARED)


def test_nothing_is_left_of_it(seen):
    model = llama()
    hooks = [list(map(len, (m._forward_hooks, m._forward_pre_hooks))) for m in model.modules()]
    fp.accelerate(fp.accelerate(model))
    unfuse(model)
    assert hooks == [list(map(len, (m._forward_hooks, m._forward_pre_hooks))) for m in model.modules()]
    assert not any("forward" in vars(m) for m in model.modules())


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"labels": lambda b: b["input_ids"]}, id="labels of padding"),
        pytest.param({"labels": lambda b: None}, id="no labels"),
        pytest.param({"shift_labels": lambda b: b["labels"].roll(-1, 1)}, id="shifted labels"),
        pytest.param({"output_hidden_states": lambda b: True}, id="hidden states"),
        pytest.param({"output_attentions": lambda b: True}, id="attentions"),
        pytest.param({"attention_mask": lambda b: b["attention_mask"][:, None, None] != 0}, id="a mask of one's own"),
    ],
)
def test_calls_that_read_more(change, seen):
    fast, plain = pair(llama())
    inputs = batch()
    inputs |= {name: value(inputs) for name, value in change.items()}
    got, expected = fast(**inputs), plain(**inputs)
    assert relative(got.logits, expected.logits) < 1e-5
    for one, other in zip(got.hidden_states or (), expected.hidden_states or (), strict=True):
        assert relative(one, other) < 1e-5
    # All tokens run, but that what is alike in all rows may run once.
    assert all(call in (None, (SHARED + ROWS * (LENGTH - SHARED), SHARED)) for call in seen)
    assert any(seen) == ("labels" in change)


def test_calls_after_one_for_hidden_states(seen):
    fast, plain = pair(llama())
    inputs = batch()
    for model in (fast, plain):
        model(**inputs, output_hidden_states=True)
    check_alike(fast, plain, inputs)
    assert seen[0] == (int(inputs["attention_mask"].sum()) - (ROWS - 1) * SHARED, SHARED)


def test_positions_between_others(seen):
    fast, plain = pair(llama())
    inputs = batch()
    check_alike(fast, plain, inputs | {"position_ids": torch.arange(LENGTH).expand(ROWS, -1) / 2})
    assert not any(seen)


def test_rows_in_other_places_share_nothing(seen):
    fast, plain = pair(llama())
    places = torch.arange(LENGTH) + torch.arange(ROWS).unsqueeze(1)
    inputs = batch()
    check_alike(fast, plain, inputs | {"position_ids": places})
    assert seen[0] == (int(inputs["attention_mask"].sum()), 0)


def packed(batches, *lengths, shared=SHARED):
    """Sequences of these lengths one after another, which begin alike, without a mask."""
    positions = torch.cat([torch.arange(n) for n in lengths]).repeat(batches, 1)
    ids = torch.randint(2, SMALL["vocab_size"], positions.shape)
    alike = positions < shared
    ids[alike] = torch.randint(2, SMALL["vocab_size"], (shared,))[positions[alike]]
    own = positions == shared
    ids[own] = others(int(own.sum()))
    labels = ids.masked_fill(positions == 0, -100)
    return {"input_ids": ids, "position_ids": positions, "labels": labels, "use_cache": False}


@pytest.mark.parametrize("shared", [0, SHARED])
@pytest.mark.parametrize("method", ["lora", "bottleneck", "tokens", "prefix"])
@pytest.mark.parametrize("batches", [1, 2])
def test_packed_sequences_that_begin_alike(batches, method, shared, seen):
    fast, plain = pair(llama(), METHODS[method])
    inputs = packed(batches, 9, 12, 7, 14, shared=shared)
    if method == "prefix":  # transformers' mask says nothing of one: each sequence by itself
        del inputs["labels"]
        got = fast(**inputs).logits
        places = [0, 9, 21, 28, 42]
        for row in range(batches):
            for start, end in itertools.pairwise(places):
                alone = plain(inputs["input_ids"][row : row + 1, start:end]).logits
                assert relative(got[row : row + 1, start:end], alone) < 1e-5
    else:
        check_alike(fast, plain, inputs)
    together = shared * (4 * batches - 1)
    assert seen[0] == (42 * batches - together, shared)


def test_packed_sequences_of_which_the_collator_says_more(seen):
    """As TRL's does, and transformers' for flash attention."""
    fast, plain = pair(llama())
    inputs = packed(1, 9, 12, 7)
    ends = torch.tensor([0, 9, 21, 28], dtype=torch.int32)
    said = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 12, "max_length_k": 12}
    said["seq_idx"] = torch.arange(3, dtype=torch.int32).repeat_interleave(torch.tensor([9, 12, 7])).unsqueeze(0)
    check_alike(fast, plain, inputs | said)
    assert seen[0] == (28 - 2 * SHARED, SHARED)


def test_packed_answers_of_each_prompt(seen):
    fast, plain = pair(llama())
    inputs = answers_of_prompts()
    shown = inputs["attention_mask"] != 0
    places = torch.arange(LENGTH).expand(6, -1)
    ids, positions, labels = (t[shown].unsqueeze(0) for t in (inputs["input_ids"], places, inputs["labels"]))
    check_alike(fast, plain, {"input_ids": ids, "position_ids": positions, "labels": labels, "use_cache": False})
    assert seen[0][0] == len(different(inputs))


@pytest.mark.parametrize("gradients", [False, True])
def test_packed_sequences_in_evaluation(gradients, seen):
    fast, plain = (m.eval() for m in pair(llama()))
    inputs = packed(1, 9, 12, 7)
    with torch.set_grad_enabled(gradients):
        assert relative(fast(**inputs).logits, plain(**inputs).logits) < 1e-5
    assert seen == [(28 - 2 * SHARED, SHARED)]


def test_over_a_cache_nothing_is_packed(seen):
    fast, plain = pair(llama())
    check_alike(fast, plain, packed(2, 9, 12, 7) | {"use_cache": True})
    assert not any(seen)


def test_packed_sequences_of_which_one_is_long_stay_as_they_are(seen):
    fast, plain = pair(llama())
    check_alike(fast, plain, packed(1, *[3] * 20, 60, shared=0))
    assert not any(seen)


def test_padding_on_the_left_that_predicts_a_label_runs(seen):
    fast, plain = pair(llama())
    inputs = batch(left=True)
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    check_alike(fast, plain, inputs)
    assert not any(seen)


def read_in_the_loss(model):
    own = model.loss_function
    model.loss_function = lambda logits, labels, **more: own(logits, labels, **more) + logits.logsumexp(-1).mean()


class Reading(tf.LlamaForCausalLM):
    def forward(self, **kwargs):
        outputs = tf.LlamaForCausalLM.forward(self, **kwargs)
        outputs.loss = outputs.loss + outputs.logits.float().logsumexp(-1).mean()
        return outputs


def read_in_the_forward(model):
    model.__class__ = Reading


def read_in_a_forward_of_its_own(model):
    model.forward = Reading.forward.__get__(model, Reading)


def read_hidden_states(model):
    model.model.register_forward_hook(lambda module, args, output: output[0].register_hook(lambda g: g * 1.5) and None)


def read_logits(model):
    model.lm_head.register_forward_hook(lambda module, args, logits: logits * logits.std())


def change_labels(model):
    def changed(module, args, kwargs):
        return args, kwargs | {"labels": kwargs["input_ids"]}

    model.register_forward_pre_hook(changed, with_kwargs=True)


@pytest.mark.parametrize(
    "change",
    [
        *(read_in_the_loss, read_in_the_forward, read_in_a_forward_of_its_own),
        *(read_hidden_states, read_logits, change_labels),
    ],
)
def test_code_of_the_callers_that_may_read_padding(change, seen):
    fast, plain = pair(llama())
    for model in (fast, plain):
        change(model.get_base_model())
    check_alike(fast, plain, batch())
    assert all(call is None or call[0] == SHARED + ROWS * (LENGTH - SHARED) for call in seen)


def test_a_mask_of_the_callers_in_the_same_dtype(seen):
    fast, _ = pair(llama())
    for mask in (torch.ones(1, 1, 1, LENGTH), torch.ones(ROWS, 1, LENGTH, LENGTH).tril()):
        with pytest.raises(ValueError, match=r"attention_mask is torch\.uint8; of four dimensions it must be bool"):
            fast(input_ids=batch()["input_ids"], attention_mask=mask.to(torch.uint8))


def test_a_batch_of_padding_alone(seen):
    fast, plain = pair(llama())
    inputs = batch()
    inputs["attention_mask"][:] = 0
    inputs["labels"][:] = -100
    loss, expected = (m(**inputs, num_items_in_batch=torch.tensor(9)).loss for m in (fast, plain))
    assert loss == expected == 0
    assert seen == [None]


class Skipped(torch.nn.Module):
    def forward(self, hidden_states, **kwargs):
        return hidden_states


def test_models_without_some_layers(seen):
    model = llama()
    fp.accelerate(model)
    model.config.use_cache = False
    plain = copy.deepcopy(model)
    unfuse(plain)
    inputs = batch()
    for pruned in (1, 2):
        for m in (model, plain):
            m.model.layers[2 - pruned] = Skipped()
        torch.testing.assert_close(model(**inputs).loss, plain(**inputs).loss)
    empty = fp.accelerate(llama(num_hidden_layers=0, use_cache=False))
    assert torch.isfinite(empty(**inputs).loss)


def test_a_call_that_is_served_otherwise_says_nothing_of_the_next(seen):
    fast, plain = for_inference(llama())
    inputs = prompts()
    with torch.no_grad():
        fast(**inputs, logits_to_keep=1, **{CACHE: OfTheCallers()})
        got, expected = (m.get_base_model().model(**inputs)[0] for m in (fast, plain))
    assert relative(got, expected) < 1e-5
    assert seen == [None]


def test_the_same_rows_under_other_masks(seen):
    fast, plain = (m.eval() for m in pair(llama()))
    inputs = {name: batch()[name] for name in ("input_ids", "attention_mask")}
    inputs["input_ids"] = inputs["input_ids"][:1].expand(ROWS, -1)
    got, expected = (m(**inputs).logits for m in (fast, plain))
    assert relative(got, expected) < 1e-5


def test_the_same_rows_under_dropout(seen):
    fast, _ = pair(llama(), fp.LoraConfig(r=4, lora_dropout=0.5))
    inputs = batch([LENGTH] * ROWS, shared=LENGTH)
    logits = fast(**inputs).logits[:, -1]
    assert not torch.equal(logits[0], logits[1])
    assert seen == [None]


def test_training_without_gradients_shows_the_logits_of_padding(seen):
    fast, plain = pair(llama())
    inputs = batch()
    with torch.no_grad():
        got, expected = (m(**inputs).logits for m in (fast, plain))
    assert relative(got, expected) < 1e-5
    assert seen == [(SHARED + ROWS * (LENGTH - SHARED), SHARED)]


def test_a_cache_is_filled_though_none_is_asked_for(seen):
    fast, plain = for_inference(llama())
    inputs, caches = prompts(), [tf.DynamicCache(), tf.DynamicCache()]
    with torch.no_grad():
        for model, cache in zip((fast, plain), caches, strict=True):
            model(**inputs, **{CACHE: cache}, use_cache=False, logits_to_keep=1)
    check_same_cache(*caches, inputs["attention_mask"] != 0)


@pytest.mark.parametrize("gradients", [False, True])
def test_a_cache_is_filled_where_nothing_is_checkpointed(gradients, seen):
    """In evaluation, and without gradients."""
    fast, plain = pair(llama())
    inputs = prompts()
    for model in (fast, plain):
        model.config.use_cache = True
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
        model.train(not gradients)
    with torch.set_grad_enabled(gradients):
        got, expected = (m(**inputs, logits_to_keep=1) for m in (fast, plain))
    assert got.keys() == expected.keys()
    if CACHE in expected:  # transformers 5.20 has none in training
        check_same_cache(cache_of(got), cache_of(expected), inputs["attention_mask"] != 0)
        assert len(cache_of(got).layers[0].keys) == len(PADDED)


def test_an_interrupted_call_says_nothing_of_the_next(seen):
    fast, plain = pair(llama())
    inputs = batch()
    layer = fast.get_base_model().model.layers[1]
    with pytest.raises(KeyboardInterrupt), pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(layer), "__call__", interrupt)
        fast(**inputs)
    rest = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    got, expected = (m.get_base_model().model(**rest)[0] for m in (fast, plain))
    assert relative(got, expected) < 1e-5


def interrupt(*args, **kwargs):
    raise KeyboardInterrupt


class OfTheCaller(torch.nn.Linear):
    pass


def mix_tokens(model):
    model.model.layers[0].mlp = torch.nn.TransformerEncoderLayer(SMALL["hidden_size"], 2, 64, 0.0, batch_first=True)


def hook_before_a_layer(model):
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: None)


def hook_behind_a_layer(model):
    model.model.layers[0].mlp.register_full_backward_hook(lambda *_: None)


class Mixing(torch.nn.Linear):
    def forward(self, x):
        return super().forward(x + x.mean(1, keepdim=True))


def put_a_forward(model):
    norm = model.model.norm
    norm.forward = lambda x: type(norm).forward(norm, x)


def count_tokens(model):
    model.model.embed_tokens.scale_grad_by_freq = True


def hook_a_layer(model):
    model.model.layers[0].mlp.register_forward_hook(lambda *_: None)


def put_a_layer(model):
    model.model.layers[1].self_attn.o_proj = OfTheCaller(SMALL["hidden_size"], SMALL["hidden_size"])


def compile_a_layer(model):
    model.model.layers[0].compile(backend="eager")


def slide(model):
    model.config.sliding_window = 8


def look_both_ways(model):
    model.config.is_causal = False


def look_ahead(model):
    model.config.use_bidirectional_attention = True


CHANGES = [
    *(hook_a_layer, hook_before_a_layer, hook_behind_a_layer, put_a_layer, put_a_forward, mix_tokens, compile_a_layer),
    *(count_tokens, slide, look_both_ways, look_ahead),
]


def test_a_head_that_mixes_tokens(seen):
    fast, plain = pair(llama())
    head = Mixing(SMALL["hidden_size"], SMALL["vocab_size"], bias=False)
    fast.get_base_model().lm_head = plain.get_base_model().lm_head = head
    check_alike(fast, plain, batch())
    assert seen[0] == (SHARED + ROWS * (LENGTH - SHARED), SHARED)


@pytest.mark.parametrize("change", CHANGES)
def test_models_in_which_tokens_are_not_each_by_itself(change, seen):
    fast = pair(llama())[0]
    change(fast.get_base_model())
    fast(**batch()).loss.backward()
    assert seen == [None]


def test_a_function_of_transformers_that_somebody_patched(monkeypatch, seen):
    fast = pair(llama())[0]
    own = modeling_llama.create_causal_mask
    monkeypatch.setattr(modeling_llama, "create_causal_mask", lambda *args, **kwargs: own(*args, **kwargs))
    fast(**batch()).loss.backward()
    assert seen == [None]


def test_a_hook_of_every_module(seen):
    fast, _ = pair(llama())
    handle = register_module_forward_hook(lambda *_: None)
    try:
        fast(**batch()).loss.backward()
    finally:
        handle.remove()
    assert seen == [None]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_other_attention_stays(attention, seen):
    fast, plain = pair(llama())
    fast.get_base_model().set_attn_implementation(attention)
    check_alike(fast, plain, batch())
    assert not seen


def test_a_prefix_in_a_window(seen):
    """However large: the prefix may be out of it for the last tokens."""
    model = vary_vectors(tf.MistralForCausalLM(tf.MistralConfig(**SMALL, sliding_window=LENGTH))).float()
    fast, plain = pair(model, METHODS["prefix"])
    check_alike(fast, plain, batch())
    assert not any(seen)


def test_rope_that_depends_on_the_length(seen):
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    fast, plain = pair(llama(rope_parameters=rope, max_position_embeddings=8))
    check_alike(fast, plain, batch())
    assert not any(seen)


SOFT = ("prompt", "prefix", "ptuning-v2")
CHOICES = {
    "two": ["default", "other"] * 2,
    "two and none": ["other", "__base__", "other", "default"],
    "one": ["other"] * ROWS,
    "several": [["other", "default"], "other", ["default", "other"], "default"],
}


def check_choice(fast, plain, method, names, seen):
    """What rows begin with runs once for those of the same adapters."""
    inputs = batch() | {"adapter_names": names}
    check_alike(fast, plain, inputs)
    sets = len({frozenset([names] if isinstance(names, str) else names) for names in names})
    together = 0 if method in SOFT and sets > 1 else SHARED * (ROWS - sets)
    assert seen[0] == (int(inputs["attention_mask"].sum()) - together, SHARED if sets == 1 else 0)


@pytest.mark.parametrize(
    ("method", "names"),
    # Of adapters that train the same tokens one alone can be in use.
    [pair for pair in itertools.product(METHODS, CHOICES) if pair != ("tokens", "several")],
)
def test_rows_with_adapters_of_their_own(method, names, seen):
    check_choice(*with_another(METHODS[method]), method, CHOICES[names], seen)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method", ["lora", "bottleneck", "prefix"])
def test_rows_with_adapters_of_their_own_under_checkpoints(method, reentrant, seen):
    fast, plain = with_another(METHODS[method])
    for model in (fast, plain):
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": reentrant})
    check_choice(fast, plain, method, CHOICES["two"], seen)


@pytest.mark.parametrize("saved", ["gate_proj", "lm_head"])
def test_rows_with_copies_of_a_layer_of_their_own(saved, seen):
    config = fp.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=[saved])
    check_choice(*with_another(config), "lora", CHOICES["two and none"], seen)


def test_rows_of_a_4_bit_base_with_adapters_of_their_own(seen):
    check_choice(*with_another(METHODS["lora"], quantized(llama())), "lora", CHOICES["two and none"], seen)


@pytest.mark.parametrize("method", ["bottleneck", "prompt", "prefix"])
def test_rows_with_adapters_of_two_methods(method, seen):
    fast, plain = with_another(METHODS["lora"], other=METHODS[method])
    check_choice(fast, plain, method, CHOICES["two and none"], seen)


def test_packed_rows_with_adapters_of_their_own(seen):
    fast, plain = with_another(METHODS["lora"])
    check_alike(fast, plain, packed(2, 9, 12, 7) | {"adapter_names": ["default", "other"]})
    assert seen[0] == (2 * (28 - 2 * SHARED), 0)


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_packed_rows_with_soft_prompts_of_their_own(method, seen):
    """A prompt is of a row, and attention would be of a sequence."""
    fast, _ = with_another(METHODS[method])
    with torch.no_grad():
        fast(**packed(2, 9, 12, 7), adapter_names=["default", "other"])
    assert not any(seen)


def test_a_choice_of_too_few_rows(seen):
    fast, _ = with_another(METHODS["lora"])
    names = ["default", "other", "other"]
    with (
        fast.base_model.bank.using(Rows(names, names[:2])),
        pytest.raises(ValueError, match="adapter_names has 3 names"),
    ):
        fast.get_base_model()(**batch())
    assert seen == [None]


@pytest.mark.parametrize("method", METHODS)
def test_with_adapters_disabled(method, seen):
    """As DPO's reference is; and where all rows choose none."""
    fast, plain = pair(llama(), METHODS[method])
    inputs = batch()
    with fast.disable_adapter(), plain.disable_adapter():
        got, expected = (m(**inputs) for m in (fast, plain))
    torch.testing.assert_close(got.loss, expected.loss, rtol=1e-5, atol=1e-5)
    assert torch.equal(got.loss, fast(**inputs, adapter_names=["__base__"] * ROWS).loss)
    assert seen == [(int(inputs["attention_mask"].sum()) - (ROWS - 1) * SHARED, SHARED)] * 2


def with_another(config, model=None, other=None):
    """A pair with a second adapter, like the first if no other is given, both of which train."""
    config = copy.deepcopy(config)
    if hasattr(config, "bias"):
        config.bias = "none"  # those of the base can follow one alone
    fast, plain = pair(llama() if model is None else model, config)
    for model in (fast, plain):
        model.add_adapter("other", config if other is None else other)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("other" in name or parameter.requires_grad)
    randomize(fast)
    plain.load_state_dict(fast.state_dict())
    unfuse(plain.get_base_model())
    return fast, plain


def test_peft_over_an_accelerated_model(seen):
    peft = pytest.importorskip("peft")
    model = llama(use_cache=False)
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    fast = peft.get_peft_model(fp.accelerate(model), config).train()
    plain = copy.deepcopy(fast)
    unfuse(plain.get_base_model())
    check_alike(fast, plain, batch())
    assert seen[0][1] == SHARED


def test_labels_of_which_only_a_transform_has_values():
    model = llama(use_cache=False)
    defer_logits(model)
    fused_decoder.fuse_decoder(model)
    inputs = batch()
    labels = inputs.pop("labels")
    losses = torch.func.vmap(lambda labels: model(**inputs, labels=labels).loss)(torch.stack([labels, labels]))
    torch.testing.assert_close(losses[0], model(**inputs, labels=labels).loss)


def test_a_training_through_the_trainer(tmp_path, monkeypatch, seen):
    tokenizer = tiny_tokenizer()
    system = {"role": "system", "content": "Name the drug."}
    rows = [encode([system, *messages], tokenizer, 80) for messages in read_rows(drug_qa("train_50"))[:12]]

    def train(name):
        torch.manual_seed(0)
        model = fp.get_peft_model(tiny_llama(), fp.LoraConfig(r=4, target_modules="all-linear"))
        losses = Losses()
        options = {"epochs": 2, "learning_rate": 1e-2, "batch_size": 4, "seed": 3, "callbacks": [losses]}
        train_adapter(model, rows, 0, tmp_path / name, gradient_accumulation_steps=2, **options)
        return losses.values

    fast = train("fast")
    assert len(seen) == 6 and all(shared > 0 for _, shared in seen)
    monkeypatch.setattr(fused_decoder, "distinct_tokens", lambda *_: None)
    assert fast == pytest.approx(train("plain"), rel=1e-4)


PROMPT = 40  # with which a few rows are more than the fused stack takes
PADDED = [PROMPT, 31, 35, 18]


def prompts(lengths=tuple(PADDED), shared=SHARED):
    """As ``batch``, padded on the left, for generate."""
    ids = torch.zeros(len(lengths), PROMPT, dtype=torch.long)
    mask = torch.zeros_like(ids)
    begin = torch.randint(2, SMALL["vocab_size"], (shared,))
    for row, shown, length, own in zip(ids, mask, lengths, others(len(lengths)), strict=True):
        row[PROMPT - length :] = torch.cat([begin, torch.randint(2, SMALL["vocab_size"], (length - shared,))])
        row[PROMPT - length + shared] = own
        shown[PROMPT - length :] = 1
    return {"input_ids": ids, "attention_mask": mask}


def answers(model, inputs, **options):
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0} | options
    with torch.no_grad():
        return model.generate(**inputs, **options)


def for_inference(model, config=METHODS["lora"]):
    fast, plain = pair(model, config)
    for m in (fast, plain):
        m.config.use_cache = True
    return fast.eval(), plain.eval()


def cache_of(outputs):
    return outputs[CACHE]


def check_same_cache(got, expected, shown):
    """Where ``shown`` [batch, length]; the keys and values of padding are zeros, or what they would be."""
    for layer, expected_layer in zip(got.layers, expected.layers, strict=True):
        assert type(layer) is type(expected_layer)
        assert layer.get_seq_length() == expected_layer.get_seq_length()
        for one, other in ((layer.keys, expected_layer.keys), (layer.values, expected_layer.values)):
            one, other = (t[:, :, : shown.shape[1]].transpose(1, 2) for t in (one, other))
            assert one.shape == other.shape and relative(one[shown], other[shown]) < 1e-5
            assert relative(one[~shown], other[~shown]) < 1e-5 or not one[~shown].any()


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.model_type)
def test_generated_answers(config, seen):
    config = copy.deepcopy(config)
    if getattr(config, "sliding_window", None) is not None:
        config.sliding_window = PROMPT  # which the answers go beyond
    fast, plain = for_inference(vary_vectors(tf.AutoModelForCausalLM.from_config(config)).float())
    inputs = prompts()
    assert torch.equal(answers(fast, inputs), answers(plain, inputs))
    assert seen == [(sum(PADDED) - 3 * SHARED, SHARED)]


@pytest.mark.parametrize("method", METHODS)
def test_generated_answers_with_each_method(method, seen):
    fast, plain = for_inference(llama(), METHODS[method])
    inputs = prompts()
    assert torch.equal(answers(fast, inputs), answers(plain, inputs))
    assert seen[0] == (sum(PADDED) - 3 * SHARED, SHARED)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
@pytest.mark.parametrize("method", METHODS)
def test_generated_answers_of_rows_with_adapters_of_their_own(method, options, seen):
    fast, plain = (m.eval() for m in with_another(METHODS[method]))
    for model in (fast, plain):
        model.config.use_cache = True
    inputs = prompts() | {"adapter_names": ["default", "other", "__base__", "other"]}
    assert torch.equal(answers(fast, inputs, **options), answers(plain, inputs, **options))
    each = options.get("num_beams", 1)
    assert seen[0] == ((sum(PADDED) * each, 0) if method in SOFT else (sum(PADDED) - SHARED, 0))


@pytest.mark.parametrize(
    "options",
    [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}, {"num_return_sequences": 3, "do_sample": True}],
    ids=["beams", "several beams", "samples"],
)
@pytest.mark.parametrize("lengths", [(PROMPT,), (PROMPT, 23), (PROMPT, PROMPT, PROMPT)], ids=len)
def test_rows_that_are_the_same(lengths, options, seen):
    fast, plain = for_inference(llama())
    inputs = prompts(lengths)
    results = []
    for model in (fast, plain):
        torch.manual_seed(0)
        results.append(answers(model, inputs, **options))
    assert torch.equal(*results)
    shared = SHARED if len(lengths) > 1 else 0
    assert seen[0] == (sum(lengths) - (len(lengths) - 1) * shared, shared)


def test_prompts_that_begin_alike_in_pairs(seen):
    fast, plain = for_inference(llama())
    inputs = prompts()
    ids = inputs["input_ids"]
    ids[1, -31:-10] = ids[0, :21]
    ids[3, -18:-3] = ids[2, -35:-20]
    assert torch.equal(answers(fast, inputs), answers(plain, inputs))
    begun = [(row[shown != 0].tolist()) for row, shown in zip(*inputs.values(), strict=True)]
    assert seen[0][0] == len({tuple(row[: i + 1]) for row in begun for i in range(len(row))}) < sum(PADDED) - 30


def test_two_pairs_of_rows_that_are_the_same(seen):
    """Not side by side, padded, and of one length."""
    fast, plain = for_inference(llama())
    inputs = {name: t[[0, 1, 0, 1]] for name, t in prompts((31, 31)).items()}
    assert torch.equal(answers(fast, inputs), answers(plain, inputs))
    assert seen == [(2 * 31 - SHARED, SHARED)]


def test_rows_that_are_the_same_but_for_where_they_are(seen):
    fast, plain = for_inference(llama())
    inputs = {name: t[[0, 0, 0, 0]] for name, t in prompts((PROMPT,)).items()}
    inputs["position_ids"] = torch.arange(PROMPT) + torch.tensor([0, 5, 0, 7]).unsqueeze(1)
    with torch.no_grad():
        got, expected = (m(**inputs) for m in (fast, plain))
    assert relative(got.logits, expected.logits) < 1e-5
    check_same_cache(cache_of(got), cache_of(expected), inputs["attention_mask"] != 0)
    assert seen == [(3 * PROMPT, 0)]


@pytest.mark.parametrize("kind", ["none", "plain", "configured", "sliding", "sliding none", "static"])
@pytest.mark.parametrize("gradients", [False, True])
def test_the_cache_that_is_filled(gradients, kind, seen):
    sliding = kind.startswith("sliding")
    config = tf.MistralConfig(**SMALL, sliding_window=PROMPT if sliding else None)
    fast, plain = for_inference(vary_vectors(tf.MistralForCausalLM(config)).float())
    inputs = prompts()
    shown = inputs["attention_mask"] != 0
    new = {
        "none": lambda: None,
        "sliding none": lambda: None,
        "plain": tf.DynamicCache,
        "configured": lambda: tf.DynamicCache(config=config),
        "sliding": lambda: tf.DynamicCache(config=config),
        "static": lambda: tf.StaticCache(config=config, max_cache_len=PROMPT + 9),
    }[kind]
    outputs = []
    for model in (fast, plain):
        cache = new()
        with torch.set_grad_enabled(gradients):
            outputs.append(model(**inputs, **{CACHE: cache}, use_cache=True, logits_to_keep=1))
        assert cache is None or cache_of(outputs[-1]) is cache
    got, expected = outputs
    assert relative(got.logits, expected.logits) < 1e-5
    shown_in_cache = shown[:, 1:] if sliding else shown
    check_same_cache(cache_of(got), cache_of(expected), shown_in_cache)
    assert len(seen) == 1 and (seen[0] is not None)
    more = {
        "input_ids": inputs["input_ids"][:, -3:],
        "attention_mask": torch.nn.functional.pad(shown.long(), (0, 3), value=1),
    }
    with torch.set_grad_enabled(gradients):
        again = [m(**more, **{CACHE: cache_of(o)}).logits for m, o in zip((fast, plain), outputs, strict=True)]
    assert relative(*again) < 1e-5


class OfTheCallers(tf.DynamicCache):
    def update(self, *args, **kwargs):
        return super().update(*args, **kwargs)


class Halved(DynamicLayer):
    def update(self, keys, values, *args, **kwargs):
        keys, values = super().update(keys, values, *args, **kwargs)
        return keys / 2, values


def of_layers_of_the_callers(model):
    return tf.Cache(layer_class_to_replicate=Halved)


def with_layers_of_the_callers_to_come(model):
    cache = tf.DynamicCache()
    cache.layer_class_to_replicate = Halved
    return cache


def with_a_layer_of_the_callers_class(model):
    cache = tf.DynamicCache(config=model.config)
    cache.layers[1] = Halved()
    return cache


def with_a_layer_of_the_callers(model):
    cache = tf.DynamicCache(config=model.config)
    own = cache.layers[1].update
    cache.layers[1].update = lambda keys, *args, **more: own(keys / 2, *args, **more)
    return cache


def begun(model):
    cache = tf.DynamicCache()
    with torch.no_grad():
        model(torch.full((len(PADDED), 1), 5), **{CACHE: cache})
    return cache


@pytest.mark.parametrize(
    "make",
    [
        *(lambda model: OfTheCallers(), begun, of_layers_of_the_callers),
        *(with_layers_of_the_callers_to_come, with_a_layer_of_the_callers_class, with_a_layer_of_the_callers),
    ],
)
def test_caches_that_are_not_known_or_not_empty(make, seen):
    fast, plain = for_inference(llama())
    inputs = prompts()
    caches = [make(m) for m in (fast, plain)]
    inputs["attention_mask"] = torch.nn.functional.pad(
        inputs["attention_mask"], (caches[0].get_seq_length(), 0), value=1
    )
    seen.clear()
    with torch.no_grad():
        for _ in range(2):  # a few tokens more the second time
            outputs = [m(**inputs, **{CACHE: c}, logits_to_keep=1) for m, c in zip((fast, plain), caches, strict=True)]
            assert relative(*(o.logits for o in outputs)) < 1e-5
            inputs["input_ids"] = inputs["input_ids"][:, -2:]
            inputs["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], (0, 2), value=1)
    assert not any(seen)


def test_a_cache_asks_for_more_to_be_left_out(seen):
    fast, _ = for_inference(llama())
    inputs = prompts((PROMPT, PROMPT, 35, 31), shared=0)
    with torch.no_grad():
        for caches in (False, True):
            fast(**inputs, use_cache=caches, logits_to_keep=1)
    assert seen == [(146, 0), None]


@pytest.mark.parametrize("last", [0, 1, 3, PROMPT, torch.tensor([PROMPT - 1])], ids=str)
@pytest.mark.parametrize("left", [False, True])
def test_padding_is_read_where_its_logits_are_asked_for(left, last, seen):
    fast, plain = for_inference(llama())
    inputs = prompts()
    if not left:
        inputs = {name: t.flip(1) for name, t in inputs.items()}
    with torch.no_grad():
        got, expected = (m(**inputs, logits_to_keep=last).logits for m in (fast, plain))
    assert relative(got, expected) < 1e-5
    unread = left and type(last) is int and 0 < last <= min(PADDED)
    assert seen[0] == ((sum(PADDED), 0) if unread else None)
