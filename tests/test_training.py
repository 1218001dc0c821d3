"""Training: what rows become, that the loss is the ordinary one, that a resumed run is the uninterrupted one."""

from __future__ import annotations

import copy
import io
import itertools
import json
import math
import os
import re
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from architectures import inputs, make, quantized, randomize
from rich.console import Console
from tiny import CHAT_TEMPLATE, Losses, tiny_llama, tiny_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import pyfastpeft as fp
from pyfastpeft.cli.examine import examine
from pyfastpeft.conversations import (
    IGNORED,
    encode,
    learned_positions,
    load_dataset,
    pad_id,
    prompt_ids,
    read_rows,
)
from pyfastpeft.data import drug_qa, score_answers
from pyfastpeft.generation import answer, prompts_of
from pyfastpeft.hub.files import load_safetensors, save_safetensors, write_text
from pyfastpeft.training import Collator, held_out_loss, train_adapter

QUESTION, ANSWER = "Which drug?", "Drug: x"
TALK = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]


def write(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


# Rows.


def test_messages_and_prompt_with_completion_are_read_alike(tmp_path):
    path = write(tmp_path / "d.jsonl", {"messages": TALK}, "", {"prompt": QUESTION, "completion": ANSWER, "id": 3})
    assert read_rows(path) == [TALK, TALK]
    rows = path.read_bytes()
    for first in (b"", b"\n", b" \r\n"):
        path.write_bytes(b"\xef\xbb\xbf" + first + rows)  # as editors on Windows begin a file
        assert read_rows(path) == [TALK, TALK]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"prompt": "a", ', "line 2, character 17: Expecting property name"),
        ("[1, 2]", "JSON list"),
        ('{"prompt": "a"}', "'completion'"),
        ('{"prompt": "a", "completion": 3}', "as text"),
        ('{"messages": []}', "not empty"),
        ('{"messages": [{"role": "user"}]}', "'content'"),
        ('{"messages": [{"content": "a"}]}', "'role'"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "'assistant'"),
        ("[" * 100_000, "line 2"),
        (r'{"prompt": "a \ud83d", "completion": "b"}', "half of a character"),
        (r'{"messages": [{"role": "assistant", "content": "\udc00"}]}', "half of a character"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "before it must stand what it answers"),
    ],
)
def test_a_row_that_does_not_parse_is_named_by_file_and_line(tmp_path, line, says):
    path = write(tmp_path / "bad.jsonl", {"messages": TALK}, line)
    with pytest.raises(ValueError, match=says) as error:
        read_rows(path)
    assert "bad.jsonl, line 2" in str(error.value)


def test_bytes_that_are_not_utf8_and_an_empty_file_are_refused(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"prompt": "\xff", "completion": "a"}')
    with pytest.raises(ValueError, match="line 1"):
        read_rows(path)
    path.write_text("\n")
    with pytest.raises(ValueError, match="no rows"):
        read_rows(path)
    for missing in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(FileNotFoundError, match=f"there is no file {missing}"):
            read_rows(missing)


def test_labels_are_on_the_completions_only():
    tokenizer = tiny_tokenizer()
    talk = [
        {"role": "system", "content": "S"},
        *TALK,
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "Y"},
    ]
    example = encode(talk, tokenizer, 1000)
    assert tokenizer.decode(example["input_ids"]) == (
        f"<|system|>S<|end|><|user|>{QUESTION}<|end|><|assistant|>{ANSWER}<|end|><|user|>And?<|end|><|assistant|>Y<|end|>"
    )
    labels = [label for label in example["labels"] if label != IGNORED]
    assert tokenizer.decode(labels) == f"{ANSWER}<|end|>Y<|end|>"
    assert all(label in (IGNORED, i) for label, i in zip(example["labels"], example["input_ids"], strict=True))


def test_a_prompt_is_tokenized_in_training_as_in_generation():
    tokenizer = tiny_tokenizer()
    asked = prompt_ids(TALK[:-1], tokenizer)
    assert encode(TALK, tokenizer, 1000)["input_ids"][: len(asked)] == asked


def dummy_prefix_tokenizer(scheme, *merges, frame="<s> $A"):
    """As Llama-2's: a text begins with a space that it does not have, and stands in a ``frame`` of special tokens."""
    known = ["<unk>", "<s>", "</s>", *dict.fromkeys("\u2581abcdQ2+=4."), *map("".join, merges)]
    model = models.BPE({token: i for i, token in enumerate(known)}, list(merges), unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    tokenizer.post_processor = processors.TemplateProcessing(frame, special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
@pytest.mark.parametrize("frame", ["$A", "<s> $A", "<s> $A </s>", "$A </s>"])
def test_without_a_chat_template_a_text_begins_as_the_tokenizer_begins_it(scheme, frame):
    """As any model was trained, and as everything else will ask it with the adapter."""
    tokenizer = dummy_prefix_tokenizer(scheme, frame=frame)
    talk = [{"role": "user", "content": "Q 2+2="}, {"role": "assistant", "content": "4"}]
    begins = [tokenizer.bos_token_id] if frame.startswith("<s>") else []
    written = tokenizer("Q 2+2=")["input_ids"]
    asked = prompt_ids(talk[:1], tokenizer)
    assert asked == (written[:-1] if frame.endswith("</s>") else written)
    assert asked[: len(begins)] == begins
    assert encode(talk, tokenizer, 1000)["input_ids"] == [*asked, *tokenizer.convert_tokens_to_ids(["4", "</s>"])]
    nothing = [{"role": "user", "content": ""}]
    if begins:
        assert prompt_ids(nothing, tokenizer) == begins
    else:
        with pytest.raises(ValueError, match="the prompt is empty, and the tokenizer begins a text with no token"):
            prompt_ids(nothing, tokenizer)


@pytest.mark.parametrize("scheme", ["first", "always"])
@pytest.mark.parametrize("template", [None, "{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"])
def test_answers_and_later_questions_get_no_space_that_inference_has_not(scheme, template):
    tokenizer = dummy_prefix_tokenizer(scheme)
    tokenizer.chat_template = template
    texts = ("Q 2+2=", "4", "Q a+b=", "c d.")
    talk = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    example = encode(talk, tokenizer, 1000)
    for turn in (1, 3):
        asked = prompt_ids(talk[:turn], tokenizer)
        assert example["input_ids"][: len(asked)] == asked
    labels = [label for label in example["labels"] if label != IGNORED]
    wanted = "4</s>c\u2581d.</s>" if template is None or scheme == "first" else "\u25814</s>\u2581c\u2581d.</s>"
    assert "".join(tokenizer.convert_ids_to_tokens(labels)) == wanted


def test_an_answer_that_would_share_a_token_with_its_question_is_tokenized_apart():
    tokenizer = dummy_prefix_tokenizer("never", ("=", "4"))
    talk = [{"role": "user", "content": "2+2="}, {"role": "assistant", "content": "4"}]
    example = encode(talk, tokenizer, 1000)
    assert tokenizer.convert_ids_to_tokens(example["input_ids"]) == ["<s>", "2", "+", "2", "=", "4", "</s>"]
    assert example["input_ids"][:5] == prompt_ids(talk[:1], tokenizer)


def test_without_a_chat_template_the_completion_follows_the_prompt():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    assert tokenizer.decode(encode(TALK, tokenizer, 1000)["input_ids"]) == f"{QUESTION}{ANSWER}<|end|>"


def test_a_row_that_cannot_be_encoded_is_named_by_its_line(tmp_path):
    path = write(tmp_path / "d.jsonl", "", {"messages": TALK})
    with pytest.raises(ValueError, match=r"d.jsonl, line 2: .*max_length = 5"):
        load_dataset(path, tiny_tokenizer(), 5)
    tokenizer = tiny_tokenizer()
    refusal = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    tokenizer.chat_template = refusal + tokenizer.chat_template
    path = write(
        tmp_path / "d.jsonl", {"messages": TALK}, "", {"messages": [{"role": "system", "content": "S"}, *TALK]}
    )
    with pytest.raises(ValueError, match=r"d.jsonl, line 3: the chat template refuses the messages: no system role"):
        load_dataset(path, tokenizer)


@pytest.mark.parametrize("wrong", ["asistant", "human", "Assistant", "use"])
@pytest.mark.parametrize("template", [None, CHAT_TEMPLATE, {"default": CHAT_TEMPLATE, "rag": "{{ messages }}"}])
def test_a_role_that_no_template_names_is_refused_by_its_line(tmp_path, wrong, template):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    rows = [TALK, [{"role": "tool", "content": "T"}, *TALK], [*TALK, {"role": wrong, "content": "W"}, *TALK]]
    path = write(tmp_path / "d.jsonl", *({"messages": messages} for messages in rows))
    with pytest.raises(ValueError, match=rf"d.jsonl, line 3: one of 'messages' has the role '{wrong}'; it must"):
        load_dataset(path, tokenizer)
    with pytest.raises(ValueError, match=f"has the role '{wrong}'"):
        prompt_ids(rows[2], tokenizer)


def test_a_role_that_the_chat_template_names_is_taken():
    tokenizer, rows = tiny_tokenizer(), [{"role": "developer", "content": "D"}, *TALK]
    tokenizer.chat_template = "{% if messages[0]['role'] == 'developer' %}!{% endif %}" + CHAT_TEMPLATE
    assert tokenizer.decode(encode(rows, tokenizer, 1000)["input_ids"]).startswith("!<|developer|>D<|end|>")


def test_rows_that_are_cut_are_counted(tmp_path):
    path = write(tmp_path / "d.jsonl", {"messages": TALK}, {"prompt": QUESTION, "completion": "x" * 99})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        longest = max(len(row["input_ids"]) for row in load_dataset(path, tiny_tokenizer(), 200))
        load_dataset(path, tiny_tokenizer(), longest)
    with pytest.warns(UserWarning, match=rf"d.jsonl: 1 of 2 rows are longer than max_length = {longest - 1} tokens"):
        assert len(load_dataset(path, tiny_tokenizer(), longest - 1)[1]["input_ids"]) == longest - 1


@pytest.mark.parametrize("template", ["{{ messages[0]['content'] + 1 }}", "{{ messages[9].x.y }}", "{% broken"])
def test_a_chat_template_that_fails_in_any_way_is_a_value_error(template):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match="the chat template refuses the messages: "):
        prompt_ids(TALK[:1], tokenizer)


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (
            "{% for m in messages %}{{ m.content if loop.last or m.role == 'user' }}{% endfor %}",
            "the chat template rewrites earlier messages",
        ),
        (
            "{% for m in messages %}{% if loop.last %}{{ m.content }}{% endif %}{% endfor %}",
            "asks for an answer by '.*' and does not write that before one that is given",
        ),
        (
            "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}: <think>{% endif %}",
            "asks for an answer by ': <think>' and does not write that",
        ),
    ],
    ids=["without_earlier_answers", "without_earlier_messages", "without_what_the_answer_begins_with"],
)
def test_a_chat_template_that_rewrites_what_was_said_is_refused(template, says):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=says):
        encode([*TALK, *TALK], tokenizer, 1000)


@pytest.mark.parametrize(
    ("pad", "eos", "used"), [(3, 5, 3), (None, 5, 5), (0, 5, 0), (None, None, 0), (9, 5, 5), (8, 8, 0)]
)
def test_what_is_padded_with_is_always_a_token_of_the_model(pad, eos, used):
    model = SimpleNamespace(get_input_embeddings=lambda: torch.nn.Embedding(8, 2))
    assert pad_id(SimpleNamespace(pad_token_id=pad, eos_token_id=eos), model) == used


def test_an_empty_prompt_and_a_row_without_labels_say_so():
    tokenizer = tiny_tokenizer()
    with pytest.raises(ValueError, match="no message of the assistant has a token"):
        encode(TALK[:1], tokenizer, 1000)
    tokenizer.chat_template = tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no message of the assistant has a token"):
        encode([*TALK[:1], {"role": "assistant", "content": ""}], tokenizer, 1000)
    with pytest.raises(ValueError, match="the prompt is empty"):
        prompt_ids([{"role": "user", "content": ""}], tokenizer)


def test_a_prompt_with_a_half_of_a_character_is_refused():
    with pytest.raises(ValueError, match=r"'\\udcff', a half of a character; it must be Unicode"):
        prompt_ids([{"role": "user", "content": "a \udcff"}], tiny_tokenizer())


def test_batches_are_padded_on_the_right():
    batch = Collator(9)([{"input_ids": [1, 2, 3], "labels": [IGNORED, 2, 3]}, {"input_ids": [4], "labels": [4]}])
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 2, 3], [4, IGNORED, IGNORED]]


# Runs.


def quantized_llama():
    torch.manual_seed(0)
    model = tiny_llama()
    for layer in model.model.layers:
        for name in ("q_proj", "v_proj"):
            setattr(layer.self_attn, name, fp.nn.Linear4bit.from_linear(getattr(layer.self_attn, name)))
    return model


def adapter(adapter_name="default", targets=("q_proj", "v_proj")):
    config = fp.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, lora_dropout=0.1, target_modules=targets)
    return fp.get_peft_model(quantized_llama(), config, adapter_name=adapter_name)


def examples(n=12):
    tokenizer = tiny_tokenizer()
    rows = read_rows(drug_qa("train_50"))[:n]
    return [encode(messages, tokenizer, 80) for messages in rows]


def run(model, output, **kwargs):
    return train_adapter(model, examples(), 0, output, epochs=2, learning_rate=1e-2, batch_size=4, seed=3, **kwargs)


def weights(model):
    return {k: v.clone() for k, v in fp.get_peft_model_state_dict(model, adapter_name=model.active_adapter).items()}


SOFT_PROMPTS = {
    "prompt": lambda: fp.PromptTuningConfig(num_virtual_tokens=4),
    "ptuning": lambda: fp.PromptEncoderConfig(num_virtual_tokens=4, encoder_reparameterization_type="LSTM"),
    "prefix": lambda: fp.PrefixTuningConfig(num_virtual_tokens=4, prefix_projection=True),
    "deep": lambda: fp.DeepPromptConfig(num_virtual_tokens=4),
}


def adapted(kind):
    """A model with a soft prompt, or with a LoRA of that name."""
    if kind not in SOFT_PROMPTS:
        return adapter(kind)
    torch.manual_seed(0)
    return fp.get_peft_model(quantized_llama(), SOFT_PROMPTS[kind]())


@pytest.mark.parametrize("kind", ["default", "drugs", *SOFT_PROMPTS])
def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path, kind):
    whole = adapted(kind)
    run(whole, tmp_path, save_steps=2)
    shutil.rmtree(tmp_path / "checkpoint-6")
    resumed = adapted(kind)
    run(resumed, tmp_path, save_steps=2, resume=True)
    expected = weights(whole)
    for key, value in weights(resumed).items():
        assert torch.equal(value, expected[key]), key


@pytest.mark.parametrize("steps", [{}, {"max_steps": 4}, {"max_steps": 3}], ids=str)
def test_a_finished_run_that_is_resumed_trains_no_more(tmp_path, steps):
    model, again = adapter(), adapter()
    done = run(model, tmp_path, save_steps=2, lr_scheduler_type="constant", **dict.fromkeys(steps, 4)).global_step
    output = run(again, tmp_path, save_steps=2, lr_scheduler_type="constant", resume=True, **steps)
    saved = fp.PeftModel.from_pretrained(quantized_llama(), tmp_path)
    assert output.global_step == done == (4 if steps else 6)
    for key, value in weights(model).items():
        assert torch.equal(weights(again)[key], value) and torch.equal(weights(saved)[key], value), key


def test_a_checkpoint_is_an_adapter_and_no_pickle(tmp_path, monkeypatch):
    model, sync, synced = adapter(), os.fsync, set()
    write_text("of a run that was killed", tmp_path / ".checkpoint-6.partial" / "optimizer.bin")
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.add(os.readlink(f"/proc/self/fd/{fd}")), sync(fd)))
    run(model, tmp_path, save_steps=2)
    names = {p.name for p in (tmp_path / "checkpoint-6").iterdir()}
    assert all(any(f"/.checkpoint-6.partial/.{name}." in path for path in synced) for name in names)
    assert {"adapter_config.json", "adapter_model.safetensors", "optimizer.safetensors", "trainer_state.json"} <= names
    assert all(p.suffix in (".json", ".safetensors", ".md") for p in tmp_path.rglob("*") if p.is_file())
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    assert not list(tmp_path.glob(".*"))


def test_a_checkpoint_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pyfastpeft.training._random_state", full)
    with pytest.raises(OSError, match="No space left"):
        run(adapter(), tmp_path, save_steps=2)
    assert list(tmp_path.iterdir()) == []


def test_resume_without_a_checkpoint_says_so(tmp_path):
    with pytest.raises(ValueError, match="no checkpoint"):
        run(adapter(), tmp_path / "none", resume=True)
    with pytest.raises(ValueError, match="save_steps is -1"):
        run(adapter(), tmp_path / "none", save_steps=-1)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"batch_size": 0}, "batch_size is 0; it must be 1 or more"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps is 0; it must be 1 or more"),
        ({"epochs": 0}, "epochs is 0 and max_steps is -1; there must be a step to train"),
        ({"max_steps": 0}, "epochs is 3.0 and max_steps is 0; there must be a step to train"),
        ({"dataset": []}, "dataset is empty; it must have a row to train on"),
    ],
)
def test_a_training_of_no_step_writes_nothing(tmp_path, options, says):
    arguments = {"dataset": examples(), "pad_token_id": 0, "output_dir": tmp_path / "out"} | options
    with pytest.raises(ValueError, match=says):
        train_adapter(adapter(), **arguments)
    assert not (tmp_path / "out").exists()


def test_a_new_run_does_not_mix_its_checkpoints_with_those_of_another(tmp_path):
    run(adapter(), tmp_path, save_steps=2)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="holds checkpoints of an earlier run"):
        run(adapter(), tmp_path, save_steps=1)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.fixture(scope="module")
def run_of_four_steps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    run(adapter(), folder, save_steps=2)
    shutil.rmtree(folder / "checkpoint-6")  # the last: nothing would be left to do after it
    return folder


@pytest.fixture
def interrupted(run_of_four_steps, tmp_path):
    """A folder as a run leaves it that ends after its fourth step of six."""
    return Path(shutil.copytree(run_of_four_steps, tmp_path / "run"))


@pytest.mark.parametrize(
    ("name", "before", "after", "says"),
    [
        ("optimizer.json", r".*", "{}", "checkpoint-4 does not hold the state of a training"),
        ("random-0.json", r".*", "{}", "checkpoint-4 does not hold the state of a training"),
        ("random-0.json", r'"python": .*', '"python": "x"}', "checkpoint-4 does not hold the state of a training"),
        ("trainer_state.json", r".*", "{}", "global_step is None; it must be of the type int"),
        ("trainer_state.json", r'"global_step": 4', '"global_step": "4"', "global_step is '4'"),
        ("optimizer.json", r'"lr": [^,]*', '"lr": "x"', r"param_groups\[0\].lr is 'x'; it must be a number"),
        ("optimizer.json", r'"base_lrs": \[', '"base_lrs": ["x", ', r"scheduler.base_lrs\[0\] is 'x'"),
        ("optimizer.json", r'"params": \[0, ', '"params": [', "another number of parameters"),
    ],
)
def test_a_damaged_checkpoint_is_named(interrupted, name, before, after, says):
    file = interrupted / "checkpoint-4" / name
    file.write_text(re.sub(before, after, file.read_text(), count=1, flags=re.DOTALL))
    with pytest.raises(ValueError, match=says) as error:
        run(adapter(), interrupted, save_steps=2, resume=True)
    assert str(interrupted / "checkpoint-4") in str(error.value)


def one_number(tensors):
    tensors["0.exp_avg"] = tensors["0.exp_avg"][:1, :1].clone()


def without_a_slot(tensors):
    del tensors["1.exp_avg_sq"]


def without_a_parameter(tensors):
    for slot in ("step", "exp_avg", "exp_avg_sq"):
        del tensors[f"1.{slot}"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (one_number, r"0.exp_avg has shape \(1, 1\); it must be \(4, 64\)"),
        (without_a_slot, "missing: 1.exp_avg_sq"),
        (without_a_parameter, "missing: 1.step, 1.exp_avg, 1.exp_avg_sq"),
    ],
)
def test_an_optimizer_of_other_shapes_is_refused_before_a_step(interrupted, change, says):
    file = interrupted / "checkpoint-4" / "optimizer.safetensors"
    tensors = load_safetensors(file)
    change(tensors)
    save_safetensors(tensors, file)
    with pytest.raises(ValueError, match=says) as error:
        run(adapter(), interrupted, save_steps=2, resume=True)
    assert str(file) in str(error.value)


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (fp.LoraConfig(r=2, lora_alpha=8), "r is 4 there and 2 here"),
        (fp.LoraConfig(r=4, lora_alpha=99), "lora_alpha is 8 there and 99 here"),
        (fp.PromptTuningConfig(num_virtual_tokens=4), "peft_type is 'LORA' there and 'PROMPT_TUNING' here"),
    ],
)
def test_a_checkpoint_of_another_adapter_says_in_what_it_differs(tmp_path, other, says):
    run(adapter(), tmp_path, save_steps=2, max_steps=2)
    with pytest.raises(ValueError, match=f"checkpoint-2 cannot be resumed .*{says}"):
        run(fp.get_peft_model(quantized_llama(), other), tmp_path, save_steps=2, resume=True)


@pytest.mark.parametrize("schedules", list(itertools.permutations(["constant", "linear", "cosine"], 2)), ids=" ".join)
def test_a_checkpoint_goes_on_with_another_schedule_and_it_is_said(tmp_path, schedules):
    there, here = schedules
    run(adapter(), tmp_path, save_steps=1, max_steps=1, lr_scheduler_type=there)
    says = (
        f"checkpoint-1 is resumed with other settings than its own: lr_scheduler_type is '{there}' there and '{here}'"
    )
    with pytest.warns(UserWarning, match=says):
        output = run(adapter(), tmp_path, save_steps=1, max_steps=3, lr_scheduler_type=here, resume=True)
    assert output.global_step == 3


def test_a_checkpoint_that_goes_on_with_other_batches_or_another_seed_is_said(tmp_path):
    def run(**kwargs):
        train_adapter(adapter(), examples(), 0, tmp_path, save_steps=1, **kwargs)

    run(max_steps=1, batch_size=4)
    says = (
        "per_device_train_batch_size is 4 there and 2 here; gradient_accumulation_steps is 1 there and 3 here; "
        "seed is 0 there and 5 here$"
    )
    with pytest.warns(UserWarning, match=says):
        run(max_steps=2, batch_size=2, gradient_accumulation_steps=3, seed=5, resume=True)


def test_a_checkpoint_that_goes_on_with_other_rows_or_another_format_is_said(tmp_path):
    config = fp.LoraConfig(r=4, target_modules=["q_proj"])

    def run(base, dataset, **kwargs):
        train_adapter(fp.get_peft_model(base, config), dataset, 0, tmp_path, save_steps=1, batch_size=2, **kwargs)

    run(quantized_llama(), examples(), max_steps=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*is resumed with other settings")
        run(quantized_llama(), examples(), max_steps=2, resume=True)
    says = (
        "base weights is 'nf4 in blocks of 64' there and 'not quantized' here; "
        "dataset is '.* rows with hash .*' there and '4 rows with hash .*' here$"
    )
    with pytest.warns(UserWarning, match=says):
        run(tiny_llama(), examples(4), max_steps=3, resume=True)


def test_a_checkpoint_over_another_base_model_is_said(tmp_path):
    for number, name in enumerate(("one", "one", "two")):
        model = adapter()
        model.peft_config["default"].base_model_name_or_path = name
        with warnings.catch_warnings(record=True) as seen:
            run(model, tmp_path, save_steps=1, max_steps=1 + number, resume=number > 0)
        said = [str(w.message) for w in seen if "base model" in str(w.message)]
        assert len(said) == (name == "two") and all("'one' there and 'two' here" in text for text in said)


def test_a_parameter_that_no_loss_depends_on_has_no_state_to_resume(tmp_path):
    def partly():
        model = adapter()
        layer = model.get_base_model().model.layers[1].self_attn.v_proj
        layer.forward = layer.base_layer.forward
        return model

    run(partly(), tmp_path, save_steps=2)
    shutil.rmtree(tmp_path / "checkpoint-6")
    held = json.loads((tmp_path / "checkpoint-4" / "optimizer.json").read_text())["optimizer"]
    assert 0 < len(held["trained"]) < len(held["param_groups"][0]["params"])
    assert run(partly(), tmp_path, save_steps=2, resume=True).global_step == 6


def trainer(model, output, **kwargs):
    settings = {"num_train_epochs": 2, "learning_rate": 1e-2, "per_device_train_batch_size": 4, "seed": 3}
    settings |= {"save_strategy": "steps", "save_steps": 2, "report_to": [], "disable_tqdm": True, "use_cpu": True}
    args = TrainingArguments(str(output), **(settings | kwargs))
    return Trainer(model, args, train_dataset=examples(), eval_dataset=examples(4), data_collator=Collator(0))


@pytest.mark.parametrize("kind", ["default", "drugs", "ptuning"])
def test_transformers_own_trainer_saves_the_adapter_alone_and_resumes(tmp_path, kind):
    whole = adapted(kind)
    trainer(whole, tmp_path / "whole").train()
    checkpoint = tmp_path / "whole" / "checkpoint-4"
    assert not list(checkpoint.rglob("model*.safetensors"))
    folder = checkpoint if whole.active_adapter == "default" else checkpoint / whole.active_adapter
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {p.name for p in folder.iterdir()}
    resumed = adapted(kind)
    trainer(resumed, tmp_path / "resumed").train(resume_from_checkpoint=str(checkpoint))
    expected = weights(whole)
    for key, value in weights(resumed).items():
        assert torch.equal(value, expected[key]), key


@pytest.mark.parametrize("kind", ["default", *SOFT_PROMPTS])
def test_transformers_own_trainer_loads_its_best_adapter_which_still_trains(tmp_path, kind):
    model = adapted(kind)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    best = trainer(model, tmp_path, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True)
    best.train()
    saved = load_safetensors(f"{best.state.best_model_checkpoint}/adapter_model.safetensors")
    assert saved.keys() == weights(model).keys()
    for key, value in weights(model).items():
        assert torch.equal(value, saved[key]), key
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained
    best.save_model(str(tmp_path / "final"))
    assert load_safetensors(tmp_path / "final" / "adapter_model.safetensors").keys() == saved.keys()


def test_transformers_own_trainer_keeps_all_active_adapters(tmp_path):
    def two():
        model = adapted("default")
        torch.manual_seed(1)
        model.add_adapter("prompt", SOFT_PROMPTS["ptuning"]())
        model.set_adapter(["default", "prompt"])
        return model

    def of(model):
        return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}

    model = two()
    best = trainer(model, tmp_path, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True)
    best.train()
    assert best.evaluate()["eval_loss"] == pytest.approx(best.state.best_metric, rel=1e-6)
    whole, resumed = two(), two()
    trainer(whole, tmp_path / "whole").train()
    trainer(resumed, tmp_path / "resumed").train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    expected = of(whole)
    assert all(torch.equal(p, expected[n]) for n, p in of(resumed).items()) and len(expected) > 8


@pytest.mark.parametrize("kind", ["adapter", "4 bits", "fused", "plain"])
def test_the_trainer_keeps_what_is_ours_on_one_gpu(tmp_path, kind):
    """Of several in one process, over which it would spread the batch by nn.DataParallel."""
    make = {"adapter": adapter, "4 bits": lambda: quantized(tiny_llama()), "fused": lambda: fp.accelerate(tiny_llama())}
    model = make.get(kind, tiny_llama)().train()
    args = TrainingArguments(str(tmp_path), per_device_train_batch_size=4, report_to=[], use_cpu=True)
    args._n_gpu = 2
    made = Trainer(model, args, train_dataset=examples(), data_collator=Collator(0))
    expected = 2 if kind == "plain" else 1
    assert made.args.n_gpu == expected
    assert len(next(iter(made.get_train_dataloader()))["input_ids"]) == 4 * expected
    if kind in ("adapter", "4 bits"):
        with pytest.raises(RuntimeError, match=r"cannot replicate a .*torchrun.*CUDA_VISIBLE_DEVICES"):
            for module in model.modules():  # as nn.DataParallel does
                module._replicate_for_data_parallel()


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize(
    ("architecture", "bits", "whole"),
    [("llama", 32, "lm_head"), ("llama", 4, "lm_head"), ("gpt2", 32, "ln_f"), ("bert", 4, "LayerNorm")],
)
def test_no_adapter_that_trains_with_others_has_its_gradients_where_theirs_are(architecture, bits, whole, by_row):
    """In memory: what is added to one, or scales it, changes no other."""
    lora, soft = {"r": 2, "target_modules": "all-linear"}, {"num_virtual_tokens": 3}
    twice = [
        fp.LoraConfig(**lora),
        fp.LoraConfig(**lora, lora_bias=True),
        fp.LoraConfig(**lora, use_dora=True),
        fp.BottleneckConfig(),
        fp.BottleneckConfig(placement="pfeiffer"),
        fp.PrefixTuningConfig(**soft),
        fp.PrefixTuningConfig(**soft, prefix_projection=True),
        fp.PromptTuningConfig(**soft),
        fp.PromptEncoderConfig(**soft, encoder_reparameterization_type="MLP"),
        fp.PromptEncoderConfig(**soft, encoder_reparameterization_type="LSTM"),
        fp.DeepPromptConfig(**soft),
    ]
    once = [
        fp.LoraConfig(**lora, trainable_token_indices=[1, 5], modules_to_save=[whole]),
        fp.LoraConfig(**lora, trainable_token_indices=[2]),
    ]
    configs = {f"a{i}": config for i, config in enumerate([*twice, *copy.deepcopy(twice), *once])}
    names, base = list(configs), make(architecture)
    model = fp.get_peft_model(quantized(base) if bits == 4 else base, configs["a0"], "a0")
    for name in names[1:]:
        model.add_adapter(name, configs[name])
    randomize(model)
    model.set_adapter(names)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    batch = inputs(architecture) | {"adapter_names": [names, "__base__", names[::3]] if by_row else None}

    def learn():
        model(**batch).loss.backward()

    learn()
    expected = {n: p.grad.clone() for n, p in trained.items()}
    for i, parameter in enumerate(trained.values()):
        parameter.grad.fill_(i)
    learn()
    for i, (name, parameter) in enumerate(trained.items()):
        assert torch.allclose(parameter.grad - i, expected[name], rtol=1e-3, atol=1e-3), name


def test_training_lowers_the_loss_and_leaves_the_base_alone(tmp_path):
    model, losses = adapter(targets="all-linear"), Losses()
    base = {n: p.clone() for n, p in model.named_parameters() if "lora_" not in n}
    train_adapter(model, examples(4), 0, tmp_path, epochs=30, learning_rate=2e-2, batch_size=4, callbacks=[losses])
    assert len(losses.values) == 30 and losses.values[-1] < 0.9 * losses.values[0]
    for name, parameter in base.items():
        assert torch.equal(model.get_parameter(name), parameter), name


def learned(kind=GPT2Config, **kwargs):
    """A model whose positions are learned."""
    torch.manual_seed(0)
    config = kind(vocab_size=320, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=32, **kwargs)
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(
    ("config", "length", "says"),
    [
        (fp.LoraConfig(target_modules=["c_attn"]), 32, "row 2 has 33 tokens; the model has learned 32 positions"),
        (fp.PromptTuningConfig(num_virtual_tokens=4), 28, "row 2 has 29 tokens beside 4 virtual ones; the model has"),
    ],
)
def test_a_row_longer_than_the_learned_positions_is_refused_before_a_step(tmp_path, config, length, says):
    model = fp.get_peft_model(learned(hidden_size=8), config)

    def rows(longest):
        return [{"input_ids": [1] * n, "labels": [1] * n} for n in (5, longest)]

    with pytest.raises(ValueError, match=says):
        train_adapter(model, rows(length + 1), 0, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert train_adapter(model, rows(length), 0, tmp_path / "out", epochs=1).global_step == 1


def test_which_models_have_learned_positions():
    opt = learned(OPTConfig, hidden_size=8, ffn_dim=8, word_embed_proj_dim=8)
    assert [learned_positions(m) for m in (learned(hidden_size=8), opt, tiny_llama())] == [32, 32, None]
    assert learned_positions(fp.get_peft_model(opt, fp.LoraConfig())) == 32
    behind_padding = learned(RobertaConfig, hidden_size=8, intermediate_size=8, is_decoder=True)
    assert learned_positions(behind_padding) == 30
    assert behind_padding(torch.full((1, 30), 5)).logits.shape == (1, 30, 320)
    size = {"vocab_size": 64, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    of_rotary = LlamaForCausalLM(LlamaConfig(**size, num_attention_heads=2, max_position_embeddings=64))
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=64, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    assert learned_positions(of_rotary) is learned_positions(t5) is None


# Answers.


def test_a_prompt_longer_than_the_learned_positions_is_refused_and_an_answer_ends_with_them():
    model, tokenizer = learned(hidden_size=8).eval(), tiny_tokenizer()
    tokenizer.chat_template = None
    assert len(prompts_of(model, tokenizer, [[{"role": "user", "content": "x" * 32}]])[0][0]) == 32
    for count in (20, 32):
        answer(model, tokenizer, [[{"role": "user", "content": "x" * count}]], 100)
    with pytest.raises(ValueError, match="batch_size is 0; it must be an integer of at least 1"):
        answer(model, tokenizer, [TALK[:1]], batch_size=0)
    talks = [TALK[:1], [{"role": "user", "content": "x" * 33}]]
    with pytest.raises(ValueError, match="prompt 2 has 33 tokens; the model has learned 32 positions"):
        answer(model, tokenizer, talks, 1)
    model = fp.get_peft_model(model, fp.PromptTuningConfig(num_virtual_tokens=4), "a")
    talks = [[{"role": "user", "content": "x" * 30}]]
    with pytest.raises(ValueError, match="prompt 1 has 30 tokens beside 4 virtual ones"):
        answer(model, tokenizer, talks, 1, adapter_names=["a"])
    answer(model, tokenizer, talks, 100, adapter_names=["__base__"])
    for names in ([], ["a", "a"]):
        with pytest.raises(ValueError, match=f"adapter_names has {len(names)} names; there are 1 conversations"):
            answer(model, tokenizer, talks, 1, adapter_names=names)


def chain(*texts):
    """A model in which a token alone decides which comes next: as in one of ``texts``."""
    model, tokenizer = tiny_llama().eval(), tiny_tokenizer()
    follows = {pair for text in texts for pair in itertools.pairwise(tokenizer(text)["input_ids"])}
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.lm_head.weight.zero_()
        # At right angles, so that no other token counts.
        tokens = sorted({token for pair in follows for token in pair})
        model.model.embed_tokens.weight[tokens] = torch.eye(64)[: len(tokens)]
        for token, following in follows:
            model.lm_head.weight[following] += model.model.embed_tokens.weight[token]
    return model


@pytest.mark.parametrize("own", [None, 5, [5, 6]], ids=str)
@pytest.mark.parametrize("eos", ["<|end|>", "<|user|>", None])
def test_an_answer_ends_where_training_lets_it_end_whatever_the_model_says(own, eos):
    model, tokenizer = chain("<|assistant|>Is no<|end|>zyxw"), tiny_tokenizer()
    model.generation_config.eos_token_id = own
    tokenizer.eos_token = tokenizer.pad_token = eos
    assert answer(model, tokenizer, [TALK[:1]] * 2, 8) == ["Is no"] * 2


@pytest.mark.parametrize(
    "settings",
    [
        {"no_repeat_ngram_size": 2},
        {"min_new_tokens": 6},
        {"num_beams": 2, "num_return_sequences": 2},
        {"suppress_tokens": [64]},
        {"return_dict_in_generate": True, "output_scores": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("adapted", [False, True])
def test_an_answer_is_what_is_likeliest_whatever_the_model_is_set_to(settings, adapted):
    for said in ("no<|end|>", "ababa"):
        model = chain(f"<|assistant|>{said}")
        if adapted:
            model = fp.get_peft_model(model, fp.LoraConfig(r=2, target_modules=["q_proj"]))
        model.generation_config.update(**settings)
        before = model.generation_config.to_dict()
        assert answer(model, tiny_tokenizer(), [TALK[:1]] * 2, 5) == [said.removesuffix("<|end|>")] * 2
        assert model.generation_config.to_dict() == before


def test_what_the_template_begins_each_answer_with_is_no_part_of_it():
    tokenizer, thought = tiny_tokenizer(), "[123456789]"
    begins = "{% if loop.last and m['role'] == 'assistant' %}" + thought + "{% endif %}"  # as Qwen3's empty thought
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ m['content'] }}", begins + "{{ m['content'] }}")
    row = [*TALK[:1], {"role": "assistant", "content": "Is no"}]
    labels = [i for i in encode(row, tokenizer, 99)["labels"] if i != IGNORED]
    assert tokenizer.decode(labels) == f"{thought}Is no<|end|>"
    taught, other = chain(f"<|assistant|>{thought}Is no<|end|>"), chain("<|assistant|>Is no<|end|>")
    for model in (taught, other):
        assert answer(model, tokenizer, [TALK[:1]] * 2, 20) == ["Is no"] * 2
        assert examine(Console(file=io.StringIO()), "asked", model, tokenizer, [row] * 2) == (1, 1, 1)


def test_what_follows_the_end_of_a_shorter_answer_is_no_part_of_it():
    model, tokenizer = chain("pNo<|end|>", "qyes<|end|>"), tiny_tokenizer()
    tokenizer.chat_template = tokenizer.eos_token = tokenizer.pad_token = None
    talks = [[{"role": "user", "content": text}] for text in "pq"]
    assert answer(model, tokenizer, talks, 6) == ["No", "yes"]
    model.generation_config.eos_token_id = tokenizer("e<|end|>")["input_ids"]
    assert answer(model, tokenizer, talks, 6) == ["No", "y"]


def test_answers_do_not_depend_on_the_batch():
    model, tokenizer = quantized_llama(), tiny_tokenizer()
    talks = [[{"role": "user", "content": text}] for text in ("a", "a longer question", "mid size", "??")]
    together = answer(model, tokenizer, talks, 6)
    counted = []
    assert answer(model, tokenizer, talks, 6, batch_size=3, on_batch=counted.append) == together
    assert [answer(model, tokenizer, [talk], 6)[0] for talk in talks] == together
    assert counted == [3, 1]


def test_each_row_is_answered_by_its_own_adapter():
    model, tokenizer = adapter("a"), tiny_tokenizer()
    model.add_adapter("b", model.peft_config["a"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 2)
    talk = [{"role": "user", "content": "hello"}]
    alone = []
    for name in ("a", "b"):
        model.set_adapter(name)
        alone += answer(model, tokenizer, [talk], 8)
    with model.disable_adapter():
        alone += answer(model, tokenizer, [talk], 8)
    assert len(set(alone)) == 3
    assert answer(model, tokenizer, [talk] * 3, 8, adapter_names=["a", "b", "__base__"]) == alone


@pytest.mark.parametrize("rows", [3, 40])
def test_an_accelerated_head_is_never_multiplied_by_strided_rows(monkeypatch, rows):
    model, own, strided = quantized_llama(), torch.nn.functional.linear, []

    def linear(x, weight, *bias):
        strided.append(weight is model.lm_head.weight and not x.is_contiguous())
        return own(x, weight, *bias)

    monkeypatch.setattr("torch.nn.functional.linear", linear)
    answer(model, tiny_tokenizer(), [TALK[:1]] * rows, 2)
    assert any(strided), "transformers itself does it: if this fails, dense_linear need not care"
    strided.clear()
    answer(fp.accelerate(model), tiny_tokenizer(), [TALK[:1]] * rows, 2)
    assert not any(strided)


def test_answering_keeps_the_training_mode():
    model = quantized_llama().train()
    answer(model, tiny_tokenizer(), [TALK[:1]], 2)
    assert model.training


def test_the_loss_on_held_out_rows_is_the_mean_over_their_labels():
    tokenizer, model = tiny_tokenizer(), tiny_llama()
    model.config.attention_dropout = 0.5  # not while this is computed
    rows = [[TALK[0], {"role": "assistant", "content": text}] for text in ("one", "a longer answer than that", "")]
    losses = []
    for example in (encode(messages, tokenizer, 40) for messages in rows):
        ids, labels = (torch.tensor(example[key]) for key in ("input_ids", "labels"))
        scores = model.eval()(ids[None]).logits[0].double().log_softmax(-1)
        losses += [-scores[i - 1, label].item() for i, label in enumerate(labels.tolist()) if label != IGNORED]
    model.train()
    too_long = [{"role": "user", "content": 40 * QUESTION}, TALK[1]]
    got = held_out_loss(model, tokenizer, [too_long, *rows], max_length=40, batch_size=2)
    assert got == pytest.approx(sum(losses) / len(losses), rel=1e-5) and model.training
    assert math.isnan(held_out_loss(model, tokenizer, [too_long], max_length=40))


def test_the_shipped_rows_are_whole():
    names = {"train": 450, "test": 150, "train_50": 150, "test_50": 50}
    rows = {name: read_rows(drug_qa(name)) for name in names}
    assert {name: len(r) for name, r in rows.items()} == names
    for held_out, learned in (("test", "train"), ("test_50", "train_50")):
        questions = {messages[0]["content"] for messages in rows[learned]}
        assert not questions & {messages[0]["content"] for messages in rows[held_out]}


@pytest.mark.parametrize(
    ("text", "exact", "accuracy", "validity"),
    [
        ("Drug: a\nClass: b\nUse: c", 1, 1, 1),
        ("Drug: a\nClass: other\nUse: c", 0, 1, 1),
        ("Drug: ab\nClass: b\nUse: c", 0, 0, 1),
        ("Drug: a \nClass: b\nUse: c", 0, 0, 1),
        ("Drug: b\nDrug: a\nUse: c", 0, 0, 0),
        ("Class: b\nDrug: a\nUse: c", 0, 1, 0),
        ("Drug: a\nClass: b\nUse: c\nmore", 0, 1, 0),
        ("Drug: a\nClass: \nUse: c", 0, 1, 0),
        ("", 0, 0, 0),
    ],
)
def test_an_answer_is_scored_exactly(text, exact, accuracy, validity):
    assert score_answers([text], ["Drug: a\nClass: b\nUse: c"]) == (exact, accuracy, validity)


@pytest.mark.parametrize(
    ("text", "score"), [("Paris", (1, 1, 1)), ("Paris.", (0, 0, 1)), ("Paris\nFrance", (0, 1, 0)), ("", (0, 0, 0))]
)
def test_an_answer_without_keys_is_exact_if_all_of_it_is_right(text, score):
    assert score_answers([text], ["Paris"]) == score


@pytest.mark.parametrize("reference", [" Paris", "Paris\n", "\n Paris \r\n"])
def test_white_space_around_an_answer_does_not_count(reference):
    assert score_answers(["Paris"], [reference]) == score_answers([reference], ["Paris"]) == (1, 1, 1)
    assert score_answers(["Rome"], [reference]) == (0, 0, 1)


@pytest.mark.parametrize(
    "reference", ["First.\n\nSecond.", "def f(x):\n    return x", "Name: \nAge: 3", "A: b\r\n\r\nC: d", ""]
)
def test_what_repeats_the_reference_is_exact_and_in_form_and_what_goes_on_otherwise_is_not_exact(reference):
    assert score_answers([reference, reference.replace("\r", "")], [reference] * 2) == (1, 1, 1)
    assert score_answers([reference + "\nmore", reference + " more"], [reference] * 2).exact == 0


class SavedTwice(TrainerCallback):
    """A step at the end of an epoch is saved once more."""

    def on_epoch_end(self, args, state, control, **kwargs):
        control.should_save = True


@pytest.mark.parametrize(("steps", "callbacks"), [(2, []), (3, [SavedTwice()])], ids=["rotated", "replaced"])
def test_a_kill_while_a_checkpoint_is_removed_leaves_no_half_of_it_to_be_seen(tmp_path, monkeypatch, steps, callbacks):
    def killed(folder, **_):
        if os.path.isdir(folder):
            os.remove(f"{folder}/adapter_model.safetensors")
            raise SystemExit

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(SystemExit):
        run(adapter(), tmp_path, save_steps=steps, callbacks=callbacks)
    seen = list(tmp_path.glob("checkpoint-*"))
    assert [len(list(folder.glob("*.safetensors"))) for folder in seen] == [3] * len(seen)
    monkeypatch.undo()
    run(adapter(), tmp_path, save_steps=steps, resume=bool(seen))
    assert not list(tmp_path.glob(".*"))
