"""Soft prompts on encoders, on encoder–decoders and under task heads: the numbers and the files of real peft."""

from __future__ import annotations

import copy
import itertools
import json

import architectures as tiny
import peft
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from torch import nn

import pyfastpeft as fp

N = 3  # virtual tokens
_BERT = tiny._BERT | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_BART = {
    "vocab_size": tiny.VOCAB,
    "d_model": 32,
    "encoder_layers": 4,
    "decoder_layers": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 64,
    "dropout": 0.0,
    "scale_embedding": True,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
_XLNET = {"vocab_size": tiny.VOCAB, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64}
_LLAMA, _GPT2 = tiny._LLAMA, tiny._GPT2
_T5 = tiny._T5 | {"num_layers": 4, "num_decoder_layers": 4, "decoder_start_token_id": 0, "pad_token_id": 0}
_HEAD = {"num_labels": 3}
MODELS = {
    "bert SEQ_CLS": lambda: tf.BertForSequenceClassification(tf.BertConfig(**_BERT, **_HEAD)),
    "bert TOKEN_CLS": lambda: tf.BertForTokenClassification(tf.BertConfig(**_BERT, **_HEAD)),
    "bert QUESTION_ANS": lambda: tf.BertForQuestionAnswering(tf.BertConfig(**_BERT)),
    "bert FEATURE_EXTRACTION": lambda: tf.BertModel(tf.BertConfig(**_BERT)),
    "roberta FEATURE_EXTRACTION": lambda: tf.RobertaModel(tf.RobertaConfig(**_BERT)),
    "roberta SEQ_CLS": lambda: tf.RobertaForSequenceClassification(tf.RobertaConfig(**_BERT, **_HEAD)),
    "t5 SEQ_2_SEQ_LM": lambda: tf.T5ForConditionalGeneration(tf.T5Config(**_T5)),
    "bart SEQ_2_SEQ_LM": lambda: tf.BartForConditionalGeneration(tf.BartConfig(**_BART)),
}
HEADS = {
    "llama SEQ_CLS": lambda: tf.LlamaForSequenceClassification(tf.LlamaConfig(**_LLAMA, **_HEAD)),
    "llama TOKEN_CLS": lambda: tf.LlamaForTokenClassification(tf.LlamaConfig(**_LLAMA, **_HEAD)),
    "gpt2 SEQ_CLS": lambda: tf.GPT2ForSequenceClassification(tf.GPT2Config(**_GPT2, **_HEAD)),
    "gpt2 TOKEN_CLS": lambda: tf.GPT2ForTokenClassification(tf.GPT2Config(**_GPT2, **_HEAD)),
}
SEQ2SEQ = [name for name in MODELS if "SEQ_2_SEQ" in name]
ENCODERS = [name for name in MODELS if name not in SEQ2SEQ]
TOKEN_METHODS = {
    "prompt": ("PromptTuningConfig", {}),
    "ptuning": ("PromptEncoderConfig", {"encoder_hidden_size": 16}),
    "ptuning_lstm": (
        "PromptEncoderConfig",
        {"encoder_hidden_size": 16, "encoder_reparameterization_type": "LSTM", "encoder_num_layers": 1},
    ),
}
PREFIX_METHODS = {
    "prefix": ("PrefixTuningConfig", {}),
    "prefix_projection": ("PrefixTuningConfig", {"prefix_projection": True, "encoder_hidden_size": 16}),
}
METHODS = TOKEN_METHODS | PREFIX_METHODS
pytestmark = pytest.mark.filterwarnings("ignore")


def make(name: str) -> nn.Module:
    model = (MODELS | HEADS)[name]().eval()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if not name.startswith("t5"):
        for parameter in model.parameters():
            parameter.data.mul_(3)  # so that attention attends
    return model


def task_of(name: str) -> str:
    return name.split()[1]


def config(library, name: str, method: str, **kwargs):
    kind, own = METHODS[method]
    if library is fp and kind == "PrefixTuningConfig":
        own = own | {"prefix_init": "random"}
    return getattr(library, kind)(task_type=task_of(name), num_virtual_tokens=N, **own, **kwargs)


def pair(name: str, method: str, seed: int):
    """The same new adapter, here and in peft, from the same random state."""
    base, models = make(name), []
    for library in (fp, peft):
        torch.manual_seed(seed)
        models.append(library.get_peft_model(copy.deepcopy(base), config(library, name, method)).eval())
    return models


def batch_of(name: str, pad: str | None = "right") -> dict[str, torch.Tensor]:
    """Two rows of 6 and 4 tokens."""
    ids = torch.randint(3, tiny.VOCAB, (2, 6))
    mask = torch.ones(2, 6, dtype=torch.int64)
    if pad == "right":
        mask[1, 4:] = 0
    elif pad == "left":
        mask[1, :2] = 0
    ids = torch.where(mask.bool(), ids, 1 if name.startswith(("bart", "roberta")) else 0)
    own = {
        "SEQ_CLS": lambda: {"labels": torch.tensor([0, 2])},
        "TOKEN_CLS": lambda: {"labels": torch.randint(0, 3, (2, 6)).masked_fill(mask == 0, -100)},
        "QUESTION_ANS": lambda: {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 3])},
        "FEATURE_EXTRACTION": dict,
        "SEQ_2_SEQ_LM": lambda: {"labels": torch.randint(3, tiny.VOCAB, (2, 5))},
    }
    return {"input_ids": ids, "attention_mask": mask, **own[task_of(name)]()}


def for_peft(name: str, method: str, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """peft counts the virtual tokens of an encoder in labels and positions; here only real tokens count."""
    batch = dict(batch)
    if method in TOKEN_METHODS and task_of(name) == "TOKEN_CLS":
        labels = batch["labels"]
        batch["labels"] = torch.cat([labels.new_full((len(labels), N), -100), labels], 1)
    for key in ("start_positions", "end_positions"):
        if method in TOKEN_METHODS and key in batch:
            batch[key] = batch[key] + N
    return batch


def outputs_of(output, length: int) -> dict[str, torch.Tensor]:
    names = ("logits", "start_logits", "end_logits", "last_hidden_state", "pooler_output")
    held = {k: output[k] for k in names if k in output}
    return {k: v[:, -length:] if v.dim() > 1 and v.shape[1] == length + N else v for k, v in held.items()}


def loss_of(output) -> torch.Tensor:
    if output.get("loss") is not None:
        return output.loss
    return sum((v * torch.linspace(-1, 1, v.shape[-1])).sum() for v in outputs_of(output, 6).values())


def assert_same_outputs(a, b, length: int = 6) -> None:
    a, b = outputs_of(a, length), outputs_of(b, length)
    assert a and a.keys() == b.keys()
    for key, value in a.items():
        torch.testing.assert_close(value, b[key], rtol=0, atol=1e-5 * max(1.0, b[key].abs().max().item()), msg=key)


def trained(model) -> dict[str, nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def assert_checkpointing_changes_nothing(model, batch) -> None:
    gradients = []
    for reentrant in (None, False, True):
        if reentrant is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.zero_grad()
        loss_of(model.train()(**batch)).backward()
        gradients.append({name: p.grad.clone() for name, p in trained(model).items() if p.grad is not None})
    assert gradients[0]
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-4, atol=1e-6)


def peft_works(name: str, method: str) -> bool:
    """Whether peft can run this at all (transformers 5.24)."""
    return method in TOKEN_METHODS or task_of(name) in ("FEATURE_EXTRACTION", "SEQ_2_SEQ_LM")


CASES = [(n, m) for n in MODELS for m in METHODS if peft_works(n, m)]


@pytest.mark.parametrize(("name", "method"), CASES)
class TestLikePeft:
    def test_outputs_and_gradients_are_those_of_peft(self, name, method, seed):
        ours, theirs = pair(name, method, seed)
        own, others = trained(ours), trained(theirs)
        assert [p.shape for p in own.values()] == [p.shape for p in others.values()]
        for (a, p), (b, q) in zip(own.items(), others.items(), strict=True):
            assert torch.equal(p, q), (a, b)
        batch = batch_of(name)
        a, b = ours(**batch), theirs(**for_peft(name, method, batch))
        assert_same_outputs(a, b)
        loss_of(a).backward()
        loss_of(b).backward()
        for (key, p), q in zip(own.items(), others.values(), strict=True):
            if q.grad is None:
                assert p.grad is None or not p.grad.any(), key
            else:
                atol = 1e-4 * q.grad.abs().max().item() + 1e-6  # of a bias that moves all logits alike, only roundings
                torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=atol, msg=key)

    def test_training_gives_the_loss_curve_of_peft(self, name, method, seed):
        if task_of(name) == "FEATURE_EXTRACTION":
            pytest.skip("has no loss of its own")
        ours, theirs = pair(name, method, seed)
        batch = batch_of(name)
        batches = ((ours, batch), (theirs, for_peft(name, method, batch)))
        curves = [tiny.loss_curve(m.train(), b) for m, b in batches]
        assert curves[0][-1] < curves[0][0]
        torch.testing.assert_close(*curves, rtol=0, atol=1e-4)

    def test_folders_load_in_both_directions_bit_for_bit(self, name, method, seed, tmp_path):
        base = make(name)
        ours, theirs = pair(name, method, seed)
        for model in (ours, theirs):
            for parameter in trained(model).values():
                parameter.data.add_(torch.randn_like(parameter) / 3)
        for model, folder in ((ours, tmp_path / "ours"), (theirs, tmp_path / "theirs")):
            model.save_pretrained(folder)
        files = [load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs")]
        assert {k: v.shape for k, v in files[0].items()} == {k: v.shape for k, v in files[1].items()}
        configs = [json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("ours", "theirs")]
        for key in ("token_dim", "num_layers", "num_attention_heads", "num_transformer_submodules", "task_type"):
            assert configs[0][key] == configs[1][key], key
        batch = batch_of(name)
        for source, held in (("ours", files[0]), ("theirs", files[1])):
            a = fp.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / source)
            b = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / source).eval()
            for model, state in ((a, fp.get_peft_model_state_dict(a)), (b, peft.get_peft_model_state_dict(b))):
                assert state.keys() == held.keys()
                assert all(torch.equal(state[k], held[k]) for k in held), type(model)
            with torch.no_grad():
                assert_same_outputs(a(**batch), b(**for_peft(name, method, batch)))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["bert FEATURE_EXTRACTION", "bart SEQ_2_SEQ_LM"])
def test_over_a_4_bit_base_it_is_as_in_peft_over_the_dequantized_one(name, method, seed):
    base, models = tiny.quantized(make(name)), []
    for library, own in ((fp, base), (peft, tiny.dequantized(base))):
        torch.manual_seed(seed)
        models.append(library.get_peft_model(own, config(library, name, method)).eval())
    batch, gradients = batch_of(name), []
    outputs = [model(**batch) for model in models]
    for model, output in zip(models, outputs, strict=True):
        loss_of(output).backward()
        gradients.append([p.grad for p in trained(model).values() if p.grad is not None])
    assert_same_outputs(*outputs)
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())


ALL_CASES = [(n, m) for n in MODELS for m in METHODS]


def adapted(name: str, methods: dict[str, str], seed: int = 0):
    """A model with one adapter a name, of that method; every one matters."""
    torch.manual_seed(seed)
    model = make(name)
    for adapter, method in methods.items():
        if isinstance(model, fp.PeftModel):
            model.add_adapter(adapter, config(fp, name, method))
        else:
            model = fp.get_peft_model(model, config(fp, name, method), adapter)
    return model.eval()


def lone(row: int, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A row without its padding."""
    one = {k: v[row : row + 1] for k, v in batch.items() if k in ("input_ids", "attention_mask", "labels")}
    keep = one.pop("attention_mask").bool()[0]
    if one.get("labels") is not None and one["labels"].shape[1:] == keep.shape:
        one["labels"] = one["labels"][:, keep]
    return one | {"input_ids": one["input_ids"][:, keep]}


@pytest.mark.parametrize(("name", "method"), ALL_CASES)
@pytest.mark.parametrize("pad", ["left", "right"])
def test_a_padded_batch_equals_the_rows_alone(name, method, pad):
    if name.startswith("bart") and method in PREFIX_METHODS and pad == "left":
        pytest.skip("BART's own encoder, which a prefix leaves alone, counts padding as positions")
    model = adapted(name, {"a": method})
    batch = batch_of(name, pad)
    batch = {k: v for k, v in batch.items() if "positions" not in k}
    out = outputs_of(model(**batch), 6)
    for row in range(2):
        one = lone(row, batch)
        length = one["input_ids"].shape[1]
        visible = batch["attention_mask"][row].bool()
        for key, value in outputs_of(model(**one), length).items():
            expected = out[key][row]
            if task_of(name) != "SEQ_2_SEQ_LM" and expected.shape[:1] == visible.shape and key != "pooler_output":
                expected = expected[visible]
            torch.testing.assert_close(value[0], expected, rtol=1e-4, atol=1e-5, msg=key)


@pytest.mark.parametrize("name", SEQ2SEQ)
class TestGenerate:
    KWARGS = (
        {},
        {"num_beams": 3},
        {"do_sample": True},
        {"use_cache": False},
        {"cache_implementation": "static"},
    )

    def greedy(self, model, batch) -> torch.Tensor:
        """The tokens by one forward each: peft's own generate loses a prefix with transformers 5.24's caches."""
        config = model.get_base_model().config
        out = torch.full((len(batch["input_ids"]), 1), config.decoder_start_token_id)
        for _ in range(6):
            logits = model(**batch, decoder_input_ids=out).logits[:, -1]
            logits[:, config.eos_token_id] = -torch.inf
            out = torch.cat([out, logits.argmax(-1, keepdim=True)], 1)
        return out

    @pytest.mark.parametrize("method", TOKEN_METHODS)
    def test_prompts_generate_what_peft_generates(self, name, method, seed):
        models = pair(name, method, seed)
        batch = batch_of(name)
        del batch["labels"]
        for kwargs in self.KWARGS:
            told = []
            for model in models:
                torch.manual_seed(seed)
                told.append(model.generate(**batch, max_new_tokens=6, min_new_tokens=6, **kwargs, **tiny.WITH_SCORES))
            if "do_sample" in kwargs:
                assert torch.equal(*(answers.sequences for answers in told))
            else:
                tiny.assert_same_answers(*told)

    @pytest.mark.parametrize("method", PREFIX_METHODS)
    @torch.no_grad()
    def test_a_prefix_generates_what_peft_computes(self, name, method, seed):
        ours, theirs = pair(name, method, seed)
        for model in (ours, theirs):
            for parameter in trained(model).values():
                torch.manual_seed(seed)
                parameter.data.add_(torch.randn_like(parameter))
        batch = batch_of(name)
        del batch["labels"]
        expected = self.greedy(theirs, batch)
        for kwargs in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
            assert torch.equal(ours.generate(**batch, max_new_tokens=6, min_new_tokens=6, **kwargs), expected), kwargs
        sampled = []
        for kwargs in ({}, {"use_cache": False}):
            torch.manual_seed(seed)
            sampled.append(ours.generate(**batch, max_new_tokens=6, num_beams=2, do_sample=True, **kwargs))
        assert torch.equal(*sampled)

    def test_rows_generate_as_each_alone(self, name):
        model = adapted(name, {"a": "prompt", "b": "prefix", "c": "prefix"})
        batch = batch_of(name)
        del batch["labels"]
        for names in (["a", "b"], ["b", "c"], ["c", "__base__"], [["a", "b"], "a"]):
            for kwargs in ({}, {"num_beams": 2}):
                kwargs = kwargs | tiny.WITH_SCORES | {"max_new_tokens": 5, "min_new_tokens": 5}
                out = model.generate(**batch, adapter_names=names, **kwargs)
                for row, one in enumerate(names):
                    alone = model.generate(**lone(row, batch), adapter_names=[one], **kwargs)
                    tiny.assert_same_answers(out, alone, slice(row, row + 1))


@pytest.mark.parametrize("name", MODELS)
class TestRows:
    @torch.no_grad()
    def test_each_row_equals_its_adapters_alone(self, name):
        model = adapted(name, {"a": "prompt", "b": "ptuning", "c": "prefix", "d": "prefix_projection"})
        model.add_adapter("long", fp.PromptTuningConfig(task_type=task_of(name), num_virtual_tokens=5))
        model.add_adapter("lora", fp.LoraConfig(task_type=task_of(name), r=4))
        tiny.randomize(model)
        batch = {k: v.repeat(2, *[1] * (v.dim() - 1)) for k, v in batch_of(name).items() if "positions" not in k}
        several = [["a", "c"], ["lora", "long"], "b", "c"]
        if any("modules_to_save" in key for key in model.state_dict()):  # a head of each adapter's own; a row gets one
            with pytest.raises(ValueError, match=r"\['a', 'c'\] each bring their own copy of one module"):
                model(**batch, adapter_names=several)
            several = ["c", "lora", "b", "c"]
        for names in (["a", "b", "c", "__base__"], ["long", "a", "d", "lora"], several):
            out = outputs_of(model(**batch, adapter_names=names), 6)
            for row, one in enumerate(names):
                alone = {k: v[row : row + 1] for k, v in batch.items()}
                visible = batch["attention_mask"][row].bool()
                for key, value in outputs_of(model(**alone, adapter_names=[one]), 6).items():
                    a, b = out[key][row], value[0]
                    if name in ENCODERS and key != "pooler_output" and len(a) == len(visible):
                        a, b = a[visible], b[visible]
                    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=f"{key} {one}")

    @torch.no_grad()
    @pytest.mark.parametrize("method", METHODS)
    def test_disabled_and_unloaded_is_the_base_model(self, name, method):
        base = make(name)
        batch = batch_of(name)
        expected = outputs_of(base(**batch), 6)
        model = fp.get_peft_model(base, config(fp, name, method)).eval()
        changed = outputs_of(model(**batch), 6)
        assert any(not torch.equal(changed[k], expected[k]) for k in expected)
        with model.disable_adapter():
            assert_same_outputs(model(**batch), expected)
        assert_same_outputs(model.unload()(**batch), expected)
        assert all("forward" not in vars(m) and "_prefix" not in vars(m) for m in base.modules())

    @pytest.mark.parametrize("method", METHODS)
    def test_gradient_checkpointing_changes_nothing(self, name, method):
        assert_checkpointing_changes_nothing(adapted(name, {"a": method}), batch_of(name))


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("method", METHODS)
class TestHeadsOfCausalModels:
    def test_outputs_and_the_loss_curve_are_those_of_peft(self, name, method, seed):
        ours, theirs = pair(name, method, seed)
        if method in PREFIX_METHODS:  # peft cannot run it with transformers 5.24, but can load what it saves
            return
        batch = batch_of(name, pad=None)
        other = for_peft(name, method, batch)
        assert_same_outputs(ours(**batch), theirs(**other))
        curves = [tiny.loss_curve(ours.train(), batch), tiny.loss_curve(theirs.train(), other)]
        torch.testing.assert_close(*curves, rtol=0, atol=1e-4)

    def test_folders_load_in_both_directions_bit_for_bit(self, name, method, seed, tmp_path):
        ours, theirs = pair(name, method, seed)
        held = []
        for model, folder in ((ours, tmp_path / "ours"), (theirs, tmp_path / "theirs")):
            model.save_pretrained(folder)
            held.append(load_file(folder / "adapter_model.safetensors"))
        assert held[0].keys() == held[1].keys()
        for key, value in held[0].items():
            torch.testing.assert_close(value, held[1][key], rtol=0, atol=1e-6, msg=key)
        base = make(name)
        a = fp.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "theirs")
        b = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours")
        for state, file in ((fp.get_peft_model_state_dict(a), held[1]), (peft.get_peft_model_state_dict(b), held[0])):
            assert all(torch.equal(state[k], file[k]) for k in file)

    def test_a_padded_batch_equals_the_rows_alone(self, name, method):
        model = adapted(name, {"a": method})
        for pad in ("left", "right"):
            batch = batch_of(name, pad)
            out = model(**batch).logits
            for row in range(2):
                one = model(**lone(row, batch)).logits[0]
                expected = out[row] if task_of(name) == "SEQ_CLS" else out[row][batch["attention_mask"][row].bool()]
                torch.testing.assert_close(one, expected, rtol=1e-4, atol=1e-5)


DEEP = {"vectors": {}, "keys and values": {"prefix": True}}


def deep(name: str, **kwargs) -> fp.DeepPromptConfig:
    return fp.DeepPromptConfig(task_type=task_of(name), num_virtual_tokens=N, **kwargs)


@pytest.mark.parametrize("kind", DEEP)
@pytest.mark.parametrize("name", ENCODERS)
class TestDeepPromptsOnEncoders:
    def test_keys_and_values_are_the_layers_own(self, name, kind):
        base = make(name)
        vectors = fp.get_peft_model(copy.deepcopy(base), deep(name, **DEEP[kind], prefix_init="random")).eval()
        given = fp.get_peft_model(copy.deepcopy(base), config(fp, name, "prefix")).eval()
        made = fp.get_peft_model_state_dict(vectors)["prompt_embeddings"]
        if kind == "vectors":
            attentions = [m for m in base.modules() if type(m).__name__.endswith("SelfAttention")]
            inputs = made.view(N, len(attentions), -1).unbind(1)
            made = torch.cat([f(x) for a, x in zip(attentions, inputs, strict=True) for f in (a.key, a.value)], 1)
        state = fp.get_peft_model_state_dict(given) | {"prompt_embeddings": made.detach()}
        fp.set_peft_model_state_dict(given, state)
        batch = batch_of(name)
        assert_same_outputs(vectors(**batch), given(**batch))

    def test_it_trains_with_its_head_and_is_saved_with_it(self, name, kind, tmp_path):
        base = make(name)
        model = fp.get_peft_model(copy.deepcopy(base), deep(name, **DEEP[kind], prefix_dropout=0.1)).train()
        batch = batch_of(name)
        loss = loss_of(model(**batch))
        loss.backward()
        assert all(p.grad is not None and p.grad.any() for key, p in trained(model).items() if "bias" not in key)
        if task_of(name) != "FEATURE_EXTRACTION":
            curve = tiny.loss_curve(model, batch, rate=1e-2)
            assert curve[-3:].mean() < curve[:3].mean()
            assert any("modules_to_save" in key for key in trained(model))
        model.save_pretrained(tmp_path)
        again = fp.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
        with torch.no_grad():
            assert_same_outputs(model.eval()(**batch), again(**batch))

    def test_it_starts_from_what_the_model_makes_of_a_text(self, name, kind):
        class Tokenizer:
            name_or_path = "tokens"

            def __call__(self, text):
                return {"input_ids": [ord(c) % 40 + 3 for c in text]}

        text = {"prefix_init_text": "abc", "tokenizer_name_or_path": Tokenizer()}
        made = []
        for own in ({}, {"prefix": True}):
            model = fp.get_peft_model(make_same(name), deep(name, **own, **text)).eval()
            made.append(outputs_of(model(**batch_same(name)), 6))
        plain = fp.PrefixTuningConfig(task_type=task_of(name), num_virtual_tokens=N, **text)
        made.append(outputs_of(fp.get_peft_model(make_same(name), plain).eval()(**batch_same(name)), 6))
        for other in made[1:]:
            for key, value in made[0].items():
                torch.testing.assert_close(value, other[key], rtol=1e-4, atol=1e-5)


def make_same(name: str) -> nn.Module:
    torch.manual_seed(1)
    return make(name)


def batch_same(name: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(2)
    return batch_of(name)


class TestBadInput:
    @pytest.mark.parametrize(
        ("name", "asked", "match"),
        [
            ("t5 SEQ_2_SEQ_LM", fp.DeepPromptConfig(num_virtual_tokens=2), "does not apply to an encoder–decoder"),
            (
                "bart SEQ_2_SEQ_LM",
                fp.DeepPromptConfig(num_virtual_tokens=2, prefix=True),
                "does not apply to an encoder–decoder",
            ),
            (
                "bert SEQ_CLS",
                fp.PromptTuningConfig(num_virtual_tokens=2, task_type="SEQ_2_SEQ_LM"),
                "task_type is 'SEQ_2_SEQ_LM', but a BertForSequenceClassification is no encoder–decoder",
            ),
            (
                "t5 SEQ_2_SEQ_LM",
                fp.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
                "task_type is 'CAUSAL_LM', but a T5ForConditionalGeneration is an encoder–decoder",
            ),
            (
                "t5 SEQ_2_SEQ_LM",
                fp.PrefixTuningConfig(num_virtual_tokens=2, num_transformer_submodules=1),
                "num_transformer_submodules is 1; for a T5ForConditionalGeneration it must be 2",
            ),
            (
                "bert SEQ_CLS",
                fp.PromptTuningConfig(num_virtual_tokens=2, num_transformer_submodules=2),
                "num_transformer_submodules is 2; for a BertForSequenceClassification it must be 1",
            ),
            ("bert SEQ_CLS", fp.PrefixTuningConfig(num_virtual_tokens=2, num_layers=3), "num_layers is 3, must be 2"),
            ("bert SEQ_CLS", fp.PromptTuningConfig(num_virtual_tokens=64), "context of 64 tokens"),
        ],
    )
    def test_where_a_method_does_not_apply(self, name, asked, match):
        model = make(name)
        before = {n: p.requires_grad for n, p in model.named_parameters()}
        with pytest.raises(ValueError, match=match):
            fp.get_peft_model(model, asked)
        assert {n: p.requires_grad for n, p in model.named_parameters()} == before
        assert all("forward" not in vars(m) for m in model.modules())

    def test_values_for_another_number_of_submodules(self, tmp_path):
        name = "t5 SEQ_2_SEQ_LM"
        base = make(name)
        own = {"num_virtual_tokens": 2 * N, "num_transformer_submodules": 1}
        fp.get_peft_model(copy.deepcopy(base), fp.PromptTuningConfig(**own)).save_pretrained(tmp_path)
        model = fp.get_peft_model(base, config(fp, name, "prompt")).eval()
        batch = batch_of(name)
        expected = model(**batch)
        with pytest.raises(ValueError, match="'default' has virtual tokens of another form"):
            model.load_adapter(tmp_path, "default")
        with pytest.raises(ValueError, match="differ in num_virtual_tokens, num_transformer_submodules"):
            model.hotswap_adapter(tmp_path)
        assert_same_outputs(model(**batch), expected)

    def test_rows_that_the_submodules_cannot_share_are_not_swapped_in(self, tmp_path):
        name = "t5 SEQ_2_SEQ_LM"
        fp.get_peft_model(make(name), config(fp, name, "prompt")).save_pretrained(tmp_path)
        model, batch = fp.PeftModel.from_pretrained(make(name), tmp_path).eval(), batch_of(name)
        expected = model(**batch)
        rows = torch.cat([*fp.get_peft_model_state_dict(model).values(), torch.ones(1, 32)])
        with pytest.raises(ValueError, match=f"has {2 * N + 1} rows; their number must be a multiple of 2"):
            model.hotswap_adapter({"prompt_embeddings": rows})
        assert_same_outputs(model(**batch), expected)

    def test_models_that_take_no_soft_prompt(self):
        shared = tf.AlbertModel(tf.AlbertConfig(**_BERT, embedding_size=32))
        own = tf.DebertaV2Model(tf.DebertaV2Config(**_BERT))
        sliding = tf.ModernBertModel(
            tf.ModernBertConfig(**_BERT, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1)
        )
        unknown = _TURNING["turns, grouped heads"]()
        unknown.turning = unknown._modules.pop("rotary_emb")
        part = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
        seeing = tf.GitModel(tf.GitConfig(**_BERT, vision_config=part | {"image_size": 16, "patch_size": 8}))
        for model, match in (
            (shared, "AlbertModel has no attention of its own in each layer"),
            (own, "attention of a DebertaV2Model cannot be exchanged"),
            (sliding, "a ModernBertModel has sliding windows, whose masks do not say where a prefix lies; use Prompt"),
            (unknown, "how a EuroBertModel counts its positions is not known"),
            (seeing, "a GitModel has attention among an image's patches beside that of its text"),
            (SEEING["git"](), "a GitForCausalLM has attention among an image's patches beside that of its text"),
            (SEEING["paligemma"](), "a PaliGemmaForConditionalGeneration has attention among an image's patches"),
        ):
            for asked in (fp.PrefixTuningConfig(num_virtual_tokens=2), fp.DeepPromptConfig(num_virtual_tokens=2)):
                with pytest.raises(ValueError, match=match):
                    fp.get_peft_model(model, asked)
        mixing = tf.FNetModel(tf.FNetConfig(**{k: v for k, v in _BERT.items() if "attention" not in k}))
        sizes = {k: v for k, v in _BART.items() if k not in ("vocab_size", "forced_eos_token_id")}
        old = tf.FSMTForConditionalGeneration(
            tf.FSMTConfig(**sizes, langs=["en", "de"], src_vocab_size=tiny.VOCAB, tgt_vocab_size=tiny.VOCAB)
        )
        part = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
        text = {"model_type": "t5", "vocab_size": tiny.VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1}
        around = tf.Blip2ForConditionalGeneration(
            tf.Blip2Config(
                text_config=text | {"num_heads": 4, "decoder_start_token_id": 0},
                qformer_config=part | {"vocab_size": 8, "encoder_hidden_size": 32},
                vision_config=part | {"image_size": 16, "patch_size": 8},
            )
        )
        bark = {"input_vocab_size": 8, "output_vocab_size": 8, "num_layers": 1, "num_heads": 2, "hidden_size": 32}
        for model, match in (
            (around, r"get_decoder\(\) returned a T5ForConditionalGeneration, which has an encoder of its own"),
            (mixing, "a FNetModel has no attention"),
            (tf.IBertModel(tf.IBertConfig(**_BERT)), "the embedding of a IBertModel returns scales beside its vectors"),
            (tf.BarkFineModel(tf.BarkFineConfig(**bark)), "a BarkFineModel has no single input embedding"),
            (tf.CanineModel(tf.CanineConfig(**_BERT)), "a CanineModel has no single input embedding"),
            (
                tf.EsmcForSequenceClassification(tf.EsmcConfig(**_BERT, num_key_value_heads=4)),
                "a EsmcForSequenceClassification takes no inputs_embeds",
            ),
            (old, r"FSMTForConditionalGeneration\.get_decoder\(\) returned a FSMTDecoder, which has no config"),
        ):
            with pytest.raises(ValueError, match=match):
                fp.get_peft_model(model, fp.PromptTuningConfig(num_virtual_tokens=2))
        audio = tf.WhisperForConditionalGeneration(
            tf.WhisperConfig(**_BART | {"pad_token_id": 0, "num_mel_bins": 4, "max_source_positions": 6})
        )
        with pytest.raises(ValueError, match="WhisperEncoder takes no inputs_embeds"):
            fp.get_peft_model(audio, fp.PromptTuningConfig(num_virtual_tokens=2))
        towers = {"text_config": part | {"vocab_size": 8}, "vision_config": part | {"image_size": 16, "patch_size": 8}}
        scales = {"image_size": 16, "patch_size": 4, "embed_dim": 8, "depths": [1], "num_heads": [2], "window_size": 2}
        for pixels in (tf.CLIPModel(tf.CLIPConfig(**towers)), tf.SwinModel(tf.SwinConfig(**scales))):
            for asked in (fp.PromptTuningConfig(num_virtual_tokens=2), fp.PrefixTuningConfig(num_virtual_tokens=2)):
                with pytest.raises(ValueError, match=f"{type(pixels).__name__} takes no inputs_embeds"):
                    fp.get_peft_model(pixels, asked)

    @pytest.mark.parametrize("method", METHODS)
    def test_a_decoder_without_inputs_is_refused_by_the_model(self, method):
        name = "t5 SEQ_2_SEQ_LM"
        batch = batch_of(name)
        del batch["labels"]
        for model in pair(name, method, 0):
            with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
                model(**batch)

    def test_a_mask_of_the_wrong_shape(self):
        model = adapted("bert SEQ_CLS", {"a": "prompt"})
        with pytest.raises(ValueError, match=r"attention_mask has shape \(2, 9\).*\(2, 6\)"):
            model(input_ids=torch.ones(2, 6, dtype=torch.int64), attention_mask=torch.ones(2, 9))


@pytest.mark.parametrize("name", ["bert SEQ_CLS", "t5 SEQ_2_SEQ_LM"])
class TestLivesOfAdapters:
    @pytest.mark.parametrize("method", METHODS)
    def test_training_goes_on_after_loading(self, name, method, tmp_path):
        base, batch = make(name), batch_of(name)
        model = fp.get_peft_model(copy.deepcopy(base), config(fp, name, method)).train()
        tiny.loss_curve(model, batch, steps=3)
        model.save_pretrained(tmp_path)
        again = fp.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True).train()
        assert trained(again).keys() == trained(model).keys()
        curves = [tiny.loss_curve(m, batch, steps=5) for m in (model, again)]
        torch.testing.assert_close(*curves, rtol=0, atol=1e-5)

    @torch.no_grad()
    def test_adapters_come_and_go_in_any_order(self, name):
        batch = batch_of(name)
        model = adapted(name, {"a": "prompt", "b": "prefix", "c": "ptuning", "d": "prefix"})
        alone = {n: outputs_of(model(**batch, adapter_names=[n] * 2), 6) for n in "abcd"}
        with model.disable_adapter():
            base = outputs_of(model(**batch), 6)
        for gone in "bacd":
            model.delete_adapter(gone)
            for left in model.peft_config:
                assert_same_outputs(model(**batch, adapter_names=[left] * 2), alone[left])
        assert_same_outputs(model(**batch), base)
        left = [type(vars(m).get("forward")).__module__ for m in model.modules()]
        assert not any(module.endswith(("bidirectional", "prompt_tokens")) for module in left)
        assert not any("_prefix" in vars(m) or "compute_bias" in vars(m) for m in model.modules())

    @torch.no_grad()
    @pytest.mark.parametrize("method", ["prompt", "prefix"])
    def test_hot_swap(self, name, method, tmp_path):
        batch, models = batch_of(name), [adapted(name, {"a": method}, seed) for seed in (1, 1)]
        for parameter in trained(models[1]).values():
            parameter.add_(torch.randn_like(parameter))
        expected = models[1](**batch)
        models[1].save_pretrained(tmp_path)
        assert any(not torch.equal(v, outputs_of(expected, 6)[k]) for k, v in outputs_of(models[0](**batch), 6).items())
        models[0].hotswap_adapter(tmp_path / "a", "a")
        assert_same_outputs(models[0](**batch), expected)

    def test_export(self, name, tmp_path):
        model = adapted(name, {"a": "prefix", "b": "prompt"})
        model.export_prefix(tmp_path / "a.safetensors", "a")
        held = load_file(tmp_path / "a.safetensors")
        layers = 4 if name.startswith("t5") else 2
        assert len(held) == 2 * layers and all(t.shape == (4, N, 8) for t in held.values())
        with pytest.raises(ValueError, match="adapter 'b' is a prompt at the embedding"):
            model.export_prefix(tmp_path / "b.safetensors", "b")

    def test_copies_are_apart(self, name):
        batch = batch_of(name)
        model = adapted(name, {"a": "prompt", "b": "prefix"})
        model.set_adapter(["a", "b"] if name.startswith("t5") else "b")
        other = copy.deepcopy(model)
        expected = model(**batch)
        for parameter in trained(other).values():
            parameter.data.zero_()
        assert_same_outputs(model(**batch), expected)
        assert any(not torch.equal(v, outputs_of(expected, 6)[k]) for k, v in outputs_of(other(**batch), 6).items())


@torch.no_grad()
@pytest.mark.parametrize("method", ["prompt", "prefix"])
@pytest.mark.parametrize("name", ENCODERS)
def test_every_way_to_call_gives_the_same(name, method):
    model = adapted(name, {"a": method})
    # RoBERTa itself counts padding another way where it is given embeddings.
    batch = batch_of(name, None if name.startswith("roberta") else "right")
    expected = model(**batch, output_hidden_states=True)
    assert all(h.shape[1] == 6 for h in expected.hidden_states)
    ids, mask = batch.pop("input_ids"), batch.pop("attention_mask")
    types = torch.zeros_like(ids)
    embeds = model.get_base_model().get_input_embeddings()(ids)
    assert_same_outputs(model(ids, mask, **batch), expected)
    assert_same_outputs(model(ids, mask, types, **batch), expected)
    assert_same_outputs(model(inputs_embeds=embeds, attention_mask=mask, **batch), expected)
    assert_same_outputs(model(ids, mask.bool(), **batch), expected)
    told = model(ids, mask, **batch, return_dict=False)
    for value, other in zip(told, (v for k, v in expected.items() if k != "hidden_states"), strict=False):
        torch.testing.assert_close(value, other, rtol=0, atol=1e-5 * max(1.0, other.abs().max().item()))


@pytest.mark.parametrize("method", ["prompt", "prefix"])
@pytest.mark.parametrize("name", SEQ2SEQ)
@torch.no_grad()
def test_an_encoders_output_can_be_given(name, method):
    model, batch = adapted(name, {"a": method}), batch_of(name)
    expected = model(**batch)
    ids, mask = batch.pop("input_ids"), batch["attention_mask"]
    held = model.get_base_model().get_encoder()(input_ids=ids, attention_mask=mask)
    assert_same_outputs(model(encoder_outputs=held, **batch), expected)
    seen = torch.ones(2, 5, dtype=torch.int64)
    seen[1, 3:] = 0
    cut = model(encoder_outputs=held, **batch, decoder_attention_mask=seen).logits
    torch.testing.assert_close(cut[seen.bool()], expected.logits[seen.bool()], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("library", [fp, peft])
@pytest.mark.parametrize("kind", ["LoraConfig", "PromptTuningConfig"])
def test_every_module_whose_name_ends_like_a_head_is_saved(library, kind, tmp_path):
    sizes = {"vocab_size": 64, "dim": 32, "n_layers": 1, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 64}
    base = tf.DistilBertForSequenceClassification(tf.DistilBertConfig(**sizes))
    own = {"num_virtual_tokens": N, "token_dim": 32, "num_layers": 1, "num_attention_heads": 4}
    own = {"target_modules": ["q_lin"]} if kind == "LoraConfig" else own
    model = library.get_peft_model(copy.deepcopy(base), getattr(library, kind)(task_type="SEQ_CLS", **own)).eval()
    for parameter in trained(model).values():
        parameter.data.add_(torch.randn_like(parameter) / 3)
    model.save_pretrained(tmp_path)
    ids = torch.randint(0, 64, (2, 5))
    for other in (fp, peft):
        again = other.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
        assert_same_outputs(again(input_ids=ids), model(input_ids=ids))


def test_all_linear_leaves_such_heads_to_be_trained_whole():
    sizes = {"vocab_size": 64, "dim": 32, "n_layers": 1, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 64}
    base = tf.DistilBertForSequenceClassification(tf.DistilBertConfig(**sizes))
    model = fp.get_peft_model(base, fp.LoraConfig(task_type="SEQ_CLS", target_modules="all-linear"))
    assert {k.split(".")[2] for k in fp.get_peft_model_state_dict(model) if "lora" not in k} == {
        "classifier",
        "pre_classifier",
    }


@pytest.mark.parametrize("name", ["bert FEATURE_EXTRACTION", "t5 SEQ_2_SEQ_LM"])
def test_a_prefix_in_compiled_code(name, seed):
    own, _ = pair(name, "prefix", seed)
    batch = batch_of(name)
    compiled = torch.compile(own, backend="eager")
    with torch.no_grad():
        assert_same_outputs(compiled(**batch), own(**batch))
    gradients = []
    for model in (compiled, own):
        own.zero_grad()
        loss_of(model(**batch)).backward()
        gradients.append([p.grad for p in trained(own).values()])
    for p, q in zip(*gradients, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-4 * q.abs().max().item())


@pytest.mark.parametrize("tokens", [1, 2, 5])
@pytest.mark.parametrize("kind", ["Marian", "Pegasus", "Blenderbot"])
def test_rows_choose_where_positions_are_alike_for_all_rows(kind, tokens):
    model_class = getattr(tf, "MarianMTModel" if kind == "Marian" else f"{kind}ForConditionalGeneration")
    base = model_class(getattr(tf, f"{kind}Config")(**_BART)).eval()
    model = fp.get_peft_model(base, fp.PrefixTuningConfig(num_virtual_tokens=N, task_type="SEQ_2_SEQ_LM")).eval()
    ids, own, names = torch.randint(3, 60, (2, 9)), torch.randint(3, 60, (2, tokens)), ["default", "__base__"]
    with torch.no_grad():
        together = model(input_ids=ids, decoder_input_ids=own, adapter_names=names).logits
        for i in range(2):
            row = slice(i, i + 1)
            alone = model(input_ids=ids[row], decoder_input_ids=own[row], adapter_names=names[row]).logits
            assert torch.allclose(together[row], alone, atol=1e-4)


_TURNING = {
    "turns, beside an embedding without positions": lambda: tf.NomicBertModel(tf.NomicBertConfig(**_BERT)),
    "turns, grouped heads": lambda: tf.EuroBertModel(
        tf.EuroBertConfig(**_BERT, num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    ),
    "turns, its layer type open": lambda: tf.EsmModel(
        tf.EsmConfig(**_BERT, position_embedding_type="rotary", mask_token_id=3, pad_token_id=1)
    ),
    "from 2 on, without a start": lambda: tf.EsmModel(tf.EsmConfig(**_BERT, mask_token_id=3, pad_token_id=1)),
    "narrower inside": lambda: tf.MobileBertModel(
        tf.MobileBertConfig(**_BERT, embedding_size=16, intra_bottleneck_size=16, num_feedforward_networks=1)
    ),
}


@pytest.mark.parametrize("kind", _TURNING)
@torch.no_grad()
def test_the_tokens_of_an_encoder_stand_behind_its_prefix(kind):
    base, ids = _TURNING[kind]().eval(), torch.randint(4, 60, (2, 8))
    for parameter in base.parameters():
        if parameter.dim() == 2:
            parameter.mul_(5)  # so that attention attends
    made = fp.DeepPromptConfig(num_virtual_tokens=N, task_type="FEATURE_EXTRACTION", prefix=True)
    model = fp.get_peft_model(copy.deepcopy(base), made).eval()
    together = model(ids, adapter_names=["default", "__base__"]).last_hidden_state
    torch.testing.assert_close(together[1:], base(ids[1:]).last_hidden_state, rtol=0, atol=1e-4)
    attentions = [m for m in base.modules() if isinstance(vars(m).get("is_causal"), bool)]
    config = base.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    values = model.prompt_encoder["default"]().view(N, len(attentions), 2, 1, heads, -1).permute(1, 2, 3, 4, 0, 5)
    base.set_attn_implementation("pyfastpeft")
    for module, prefix in zip(attentions, values.contiguous(), strict=True):
        vars(module)["_prefix"] = tiny.HeldPrefix(*prefix)
    first = 2 if kind.startswith("from 2") else 0
    expected = base(ids, position_ids=torch.arange(first + N, first + N + 8).unsqueeze(0).expand(2, -1))
    torch.testing.assert_close(model(ids).last_hidden_state, expected.last_hidden_state, rtol=0, atol=1e-4)
    torch.testing.assert_close(together[:1], expected.last_hidden_state[:1], rtol=0, atol=1e-4)


@torch.no_grad()
def test_a_row_without_a_prompt_has_nothing_of_anothers_behind_it():
    """Of MobileBERT, which puts the vectors of a token's neighbours beside its own, hidden or not."""
    base, ids = _TURNING["narrower inside"]().eval(), torch.randint(4, 60, (2, 8))
    made = fp.PromptTuningConfig(num_virtual_tokens=N, task_type="FEATURE_EXTRACTION")
    names, model = ["default", "__base__"], fp.get_peft_model(base, made).eval()
    together = model(ids, adapter_names=names).last_hidden_state
    alone = [model(ids[i : i + 1], adapter_names=names[i : i + 1]).last_hidden_state for i in range(2)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_row_without_a_prompt_is_refused_beside_one_where_ids_are_embedded_in_another_way():
    base, ids = tf.EsmModel(tf.EsmConfig(**_BERT, mask_token_id=3, pad_token_id=1)).eval(), torch.randint(4, 60, (2, 8))
    model = fp.get_peft_model(base, fp.PromptTuningConfig(num_virtual_tokens=N)).eval()
    with pytest.raises(ValueError, match=r"adapter_names has \['default'\] for some rows and no prompt"):
        model(ids, adapter_names=["default", "__base__"])
    for name in ("default", "__base__"):
        both = model(ids, adapter_names=[name, name]).last_hidden_state
        torch.testing.assert_close(both[:1], model(ids[:1], adapter_names=[name]).last_hidden_state)
    same = tf.EsmConfig(**_BERT, mask_token_id=3, pad_token_id=1, position_embedding_type="rotary")  # ids are looked up
    model = fp.get_peft_model(tf.EsmModel(same), fp.PromptTuningConfig(num_virtual_tokens=N)).eval()
    names = ["default", "__base__"]
    alone = [model(row[None], adapter_names=[name]).last_hidden_state for row, name in zip(ids, names, strict=True)]
    torch.testing.assert_close(model(ids, adapter_names=names).last_hidden_state, torch.cat(alone))


@pytest.mark.parametrize("kind", ["Bart", "M2M100"])
@torch.no_grad()
def test_a_decoder_behind_a_prefix_can_be_given_vectors(kind):
    base = getattr(tf, f"{kind}ForConditionalGeneration")(getattr(tf, f"{kind}Config")(**_BART)).eval()
    model = fp.get_peft_model(base, fp.PrefixTuningConfig(num_virtual_tokens=N, task_type="SEQ_2_SEQ_LM")).eval()
    ids, own = torch.randint(3, 60, (2, 9)), torch.randint(3, 60, (2, 5))
    vectors = base.get_decoder().get_input_embeddings()(own)
    given = model(input_ids=ids, decoder_inputs_embeds=vectors).logits
    torch.testing.assert_close(given, model(input_ids=ids, decoder_input_ids=own).logits, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_prefix_starts_from_a_text_where_ids_say_the_positions():
    sizes = _BART | {"decoder_layers": 1, "num_conv_layers": 1, "conv_kernel_sizes": [3], "conv_channels": 32}
    base = tf.Speech2TextForConditionalGeneration(tf.Speech2TextConfig(**sizes, input_feat_per_channel=8)).eval()
    sound, text, own = torch.randn(2, 12, 8), torch.randint(3, 60, (N,)), torch.randint(3, 60, (2, 5))
    initial = {"prefix_init_text": "said", "tokenizer_name_or_path": lambda _: {"input_ids": text.tolist()}}
    asked = fp.PrefixTuningConfig(num_virtual_tokens=N, task_type="SEQ_2_SEQ_LM", **initial)
    model = fp.get_peft_model(copy.deepcopy(base), asked).eval()
    expected = base(sound, decoder_input_ids=torch.cat([text.expand(2, -1), own], 1)).logits[:, N:]
    torch.testing.assert_close(model(input_features=sound, decoder_input_ids=own).logits, expected, rtol=0, atol=1e-5)


def test_gradient_checkpointing_of_a_decoders_vectors():
    base = tf.BartForConditionalGeneration(tf.BartConfig(**_BART))
    model = fp.get_peft_model(base, fp.PrefixTuningConfig(num_virtual_tokens=N, task_type="SEQ_2_SEQ_LM"))
    ids = torch.randint(3, 60, (2, 5))
    vectors = base.get_decoder().get_input_embeddings()(ids).detach()
    assert_checkpointing_changes_nothing(model, {"input_ids": ids, "decoder_inputs_embeds": vectors, "labels": ids})


@pytest.mark.parametrize("method", ["prefix", "deep"])
def test_an_encoder_that_does_more_with_ids_than_to_embed_them(method):
    base = tf.EsmForTokenClassification(
        tf.EsmConfig(**_BERT, position_embedding_type="rotary", token_dropout=True, mask_token_id=3, pad_token_id=1)
    ).eval()
    shape = {"num_virtual_tokens": N, "task_type": "TOKEN_CLS"}
    made = fp.PrefixTuningConfig(**shape) if method == "prefix" else fp.DeepPromptConfig(**shape)
    model = fp.get_peft_model(base, made).eval()
    ids = torch.randint(4, 60, (2, 8))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    padded = ids.masked_fill(mask == 0, 1)
    with torch.no_grad():
        alone = model(input_ids=ids[:1, 3:], attention_mask=mask[:1, 3:]).logits
        together = model(input_ids=padded, attention_mask=mask).logits[:1, 3:]
    assert torch.allclose(together, alone, atol=1e-5)


def test_a_configuration_whose_text_has_one_of_its_own():
    part = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    text = _BERT | {"model_type": "modernbert", "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    vision = part | {"model_type": "siglip_vision_model", "image_size": 16, "patch_size": 8}
    base = tf.ModernVBertForMaskedLM(tf.ModernVBertConfig(text_config=text, vision_config=vision)).eval()
    own, ids = (
        fp.get_peft_model(copy.deepcopy(base), fp.PromptTuningConfig(num_virtual_tokens=N)),
        torch.randint(2, 60, (2, 9)),
    )
    vectors = own.prompt_encoder["default"]().expand(2, -1, -1)
    text = base.get_input_embeddings()(ids)
    with torch.no_grad():
        expected = base(inputs_embeds=torch.cat([vectors, text], 1)).logits[:, N:]
        assert torch.allclose(own(input_ids=ids).logits, expected, atol=1e-5)


def test_a_context_without_limit():
    config = tf.XLNetConfig(**_XLNET)
    base = tf.XLNetForSequenceClassification(config).eval()
    made = [library.PromptTuningConfig(num_virtual_tokens=N, task_type="SEQ_CLS") for library in (fp, peft)]
    a, b = fp.get_peft_model(copy.deepcopy(base), made[0]), peft.get_peft_model(copy.deepcopy(base), made[1])
    state = peft.get_peft_model_state_dict(b)
    fp.set_peft_model_state_dict(
        a, state | {k: t for k, t in fp.get_peft_model_state_dict(a).items() if k not in state}
    )
    assert a(torch.randint(2, 60, (2, 9))).logits.shape == (2, 2)


@pytest.mark.parametrize("method", TOKEN_METHODS)
@torch.no_grad()
def test_a_head_that_reads_the_last_entry_reads_a_token_of_rows_padded_on_the_left(method):
    base = tf.XLNetForSequenceClassification(tf.XLNetConfig(**_XLNET, **_HEAD, pad_token_id=0)).eval()
    for parameter in base.parameters():
        parameter.mul_(3)
    model = fp.get_peft_model(base, config(fp, "xlnet SEQ_CLS", method)).eval()
    model.add_adapter("long", fp.PromptTuningConfig(num_virtual_tokens=5))
    batch = batch_of("xlnet SEQ_CLS", "left")
    for names in (["default", "default"], ["long", "default"], ["default", "long"], ["default", "__base__"]):
        together = model(**batch, adapter_names=names).logits
        for row in range(2):
            alone = model(**lone(row, batch), adapter_names=names[row : row + 1]).logits
            torch.testing.assert_close(together[row], alone[0], rtol=1e-4, atol=1e-5)


_OTHER_DECODER = _BART | {"decoder_layers": 2, "decoder_attention_heads": 2}
_ALONE = {
    "UMT5": lambda: tf.UMT5EncoderModel(tf.UMT5Config(**_T5)),
    "UMT5 under a head": lambda: tf.UMT5ForTokenClassification(tf.UMT5Config(**_T5)),
    "BART": lambda: tf.BartModel(tf.BartConfig(**_OTHER_DECODER)).get_encoder(),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", _ALONE)
@torch.no_grad()
def test_an_encoder_may_stand_alone_with_the_configuration_of_both(kind, method):
    base = _ALONE[kind]().eval()
    assert base.config.is_encoder_decoder
    ids, mask = batch_of("bert FEATURE_EXTRACTION").values()
    model = fp.get_peft_model(copy.deepcopy(base), config(fp, "umt5 FEATURE_EXTRACTION", method)).eval()
    both = model(input_ids=ids, attention_mask=mask)[0]
    assert len(both[0]) == len(ids[0]) and tiny.relative(both[0], base(input_ids=ids[:1])[0][0]) > 1e-3
    torch.testing.assert_close(both[1:, :4], model(input_ids=ids[1:, :4])[0], rtol=1e-4, atol=1e-5)
    shape = model.peft_config["default"]
    assert (shape.num_layers, shape.num_attention_heads) == (4, 4)  # not the decoder's, as in peft


@torch.no_grad()
def test_a_decoder_that_stands_alone_takes_the_prefix_that_it_takes_beside_its_encoder():
    whole = tf.BartModel(tf.BartConfig(**_BART)).eval()
    base, ids, seen = whole.get_decoder(), torch.randint(3, tiny.VOCAB, (2, 6)), torch.randn(2, 5, 32)
    prefix = fp.PrefixTuningConfig(num_virtual_tokens=N, prefix_init="random")
    alone = fp.get_peft_model(copy.deepcopy(base), prefix).eval()
    both = fp.get_peft_model(whole, copy.copy(prefix)).eval()
    fp.set_peft_model_state_dict(both, fp.get_peft_model_state_dict(alone))
    expected = both(encoder_outputs=(seen,), decoder_input_ids=ids).last_hidden_state
    torch.testing.assert_close(alone(input_ids=ids, encoder_hidden_states=seen)[0], expected)
    with pytest.raises(ValueError, match="a BartDecoder is a decoder without its encoder"):
        fp.get_peft_model(copy.deepcopy(base), fp.PromptTuningConfig(num_virtual_tokens=N))


@torch.no_grad()
def test_rows_of_no_tokens_have_no_outputs():
    model = fp.get_peft_model(tf.BertModel(tf.BertConfig(**_BERT)), fp.PromptTuningConfig(num_virtual_tokens=N)).eval()
    ids = torch.zeros(2, 0, dtype=torch.int64)
    for mask in (None, torch.zeros_like(ids)):
        assert model(input_ids=ids, attention_mask=mask)[0].shape == (2, 0, 32)


_XLM = {"vocab_size": tiny.VOCAB, "emb_dim": 32, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("SplinterForQuestionAnswering", _BERT),
        ("SplinterForPreTraining", _BERT),
        ("XLNetForQuestionAnswering", _XLNET),
        ("XLMForQuestionAnswering", _XLM),
        ("FlaubertForQuestionAnswering", _XLM),
        ("TapasForQuestionAnswering", _BERT),
        ("BrosSpadeEEForTokenClassification", _BERT),
        ("BrosSpadeELForTokenClassification", _BERT),
        ("LongformerForSequenceClassification", _BERT | {"attention_window": 4}),
        ("LongformerForQuestionAnswering", _BERT | {"attention_window": 4}),
        ("LongformerForMultipleChoice", _BERT | {"attention_window": 4}),
        ("LukeForEntitySpanClassification", _BERT | {"entity_vocab_size": 4, "entity_emb_size": 16}),
    ],
)
def test_heads_with_positions_of_their_own_take_no_prompt_in_front(kind, sizes):
    cls = getattr(tf, kind)
    base = cls(cls.config_class(**sizes))
    for asked in (fp.PromptTuningConfig(num_virtual_tokens=N), fp.PromptEncoderConfig(num_virtual_tokens=N)):
        with pytest.raises(ValueError, match=f"a {kind} works with positions of tokens in a way of its own"):
            fp.get_peft_model(base, asked)
    assert all("forward" not in vars(m) for m in base.modules())


_LAYOUT = {"coordinate_size": 4, "shape_size": 8, "visual_embed": False, "has_relative_attention_bias": False}
_BOX = {"bbox": lambda *shape: torch.randint(0, 64, (*shape, 4)).cumsum(2)}
# class → (of its configuration, argument that has an entry a token → a maker of it for [rows, tokens], what says none)
ALONG = {
    "LayoutLMForTokenClassification": (_BERT, _BOX, 0),
    "LayoutLMv3ForTokenClassification": (_BERT | _LAYOUT, _BOX, 0),
    "LiltForTokenClassification": (_BERT | {"hidden_size": 48, "channel_shrink_ratio": 4}, _BOX, 0),
    "BrosForTokenClassification": (
        _BERT | {"hidden_size": 64},
        {"bbox": lambda *shape: torch.rand(*shape, 4).cumsum(2) / 4},
        0,
    ),
    "MarkupLMForTokenClassification": (
        _BERT,
        {"xpath_tags_seq": lambda *shape: torch.randint(0, 200, (*shape, 50))},
        216,
    ),
    "RoCBertForTokenClassification": (
        _BERT,
        {n: lambda *shape: torch.randint(1, 50, shape) for n in ("input_shape_ids", "input_pronunciation_ids")},
        0,
    ),
    "XLMForTokenClassification": (_XLM | {"n_langs": 3}, {"langs": lambda *shape: torch.randint(1, 3, shape)}, 0),
    "LongformerForTokenClassification": (
        _BERT | {"attention_window": 4},
        {"global_attention_mask": lambda *shape: torch.randint(0, 2, shape)},
        0,
    ),
    "TapasModel": (_BERT, {"token_type_ids": lambda *shape: torch.randint(0, 2, (*shape, 7))}, 0),
}


@pytest.mark.parametrize("kind", ALONG)
@torch.no_grad()
def test_what_goes_along_with_the_tokens_is_laid_out_with_them(kind):
    sizes, makers, none = ALONG[kind]
    cls = getattr(tf, kind)
    base = cls(cls.config_class(**sizes)).eval()
    for parameter in base.parameters():
        if parameter.dim() == 2:
            parameter.mul_(5)  # so that attention attends
    model = fp.get_peft_model(copy.deepcopy(base), fp.PromptTuningConfig(num_virtual_tokens=N)).eval()
    ids, prompt = torch.randint(4, 60, (2, 8)), model.prompt_encoder["default"]()
    mask = torch.ones_like(ids)
    along = {name: make(2, 8) for name, make in makers.items()}
    text = base.get_input_embeddings()(ids)
    front = {name: values.new_full((2, N, *values.shape[2:]), none) for name, values in along.items()}
    expected = base(
        inputs_embeds=torch.cat([prompt.expand(2, -1, -1), text], 1),
        attention_mask=torch.ones(2, N + 8, dtype=torch.int64),
        **{name: torch.cat([front[name], values], 1) for name, values in along.items()},
    )[0][:, N:]
    own = model(input_ids=ids, attention_mask=mask, **along)[0]
    torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-5)
    other = model(input_ids=ids, attention_mask=mask, **{name: make(2, 8) for name, make in makers.items()})[0]
    assert not torch.allclose(own, other, rtol=1e-4, atol=1e-5)
    mask[1, :3] = 0
    padded = model(input_ids=ids, attention_mask=mask, **along)[0]
    alone = {name: values[1:, 3:] for name, values in along.items()}
    alone = model(input_ids=ids[1:, 3:], attention_mask=mask[1:, 3:], **alone)[0]
    torch.testing.assert_close(padded[:1], own[:1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(padded[1:, 3:], alone, rtol=1e-4, atol=1e-5)


def test_a_head_may_hand_vectors_down_without_naming_them():
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1}
    base, models = tf.ModernBertForQuestionAnswering(tf.ModernBertConfig(**_BERT, **special)).eval(), []
    for library in (fp, peft):
        torch.manual_seed(0)
        asked = library.PromptTuningConfig(num_virtual_tokens=N, task_type="QUESTION_ANS")
        models.append(library.get_peft_model(copy.deepcopy(base), asked).eval())
    batch = batch_of("modernbert QUESTION_ANS")
    a, b = models[0](**batch), models[1](**for_peft("modernbert QUESTION_ANS", "prompt", batch))
    assert_same_outputs(a, b)
    torch.testing.assert_close(a.loss, b.loss)


CHOOSING = {
    "BertForMultipleChoice": _BERT,
    "RobertaForMultipleChoice": _BERT | {"pad_token_id": 0},
    "DistilBertForMultipleChoice": {"vocab_size": tiny.VOCAB, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64},
    "ElectraForMultipleChoice": _BERT | {"embedding_size": 32},
    "XLNetForMultipleChoice": _XLNET | {"pad_token_id": 0},
}
_CHOOSING = {
    "prompt": fp.PromptTuningConfig(num_virtual_tokens=N),
    "prefix": fp.PrefixTuningConfig(num_virtual_tokens=N),
    "deep": fp.DeepPromptConfig(num_virtual_tokens=N),
}


@pytest.mark.parametrize(
    ("kind", "method"), [(k, m) for k in CHOOSING for m in _CHOOSING if m == "prompt" or not k.startswith("XLNet")]
)
@torch.no_grad()
def test_choices_are_rows_of_their_own(kind, method):
    cls = getattr(tf, kind)
    base = cls(cls.config_class(**CHOOSING[kind])).eval()
    for parameter in base.parameters():
        parameter.mul_(3)
    model = fp.get_peft_model(copy.deepcopy(base), _CHOOSING[method]).eval()
    ids = torch.randint(4, 60, (2, 3, 8))
    mask = torch.ones_like(ids)
    mask[1, 2, :3] = 0
    ids = ids.masked_fill(mask == 0, 0)
    for names in (None, ["default", "default"], ["default", "__base__"], ["__base__", "default"]):
        together = model(input_ids=ids, attention_mask=mask, adapter_names=names).logits
        assert together.shape == (2, 3)
        for row, choice in itertools.product(range(2), range(3)):
            seen = mask[row, choice].bool()
            one = {"input_ids": ids[row, choice, seen], "attention_mask": mask[row, choice, seen]}
            one = {name: values.view(1, 1, -1) for name, values in one.items()}
            alone = model(**one, adapter_names=names and names[row : row + 1]).logits
            torch.testing.assert_close(together[row, choice], alone[0, 0], rtol=1e-4, atol=1e-5)
    if method == "prompt":
        ids, mask = ids[:1], mask[:1]
        prompt = model.prompt_encoder["default"]().expand(1, 3, -1, -1)
        vectors = torch.cat([prompt, base.get_input_embeddings()(ids)], 2)
        given = base(inputs_embeds=vectors, attention_mask=torch.ones(1, 3, N + 8, dtype=torch.int64)).logits
        torch.testing.assert_close(model(input_ids=ids).logits, given, rtol=1e-4, atol=1e-5)
        vectors = base.get_input_embeddings()(ids)
        torch.testing.assert_close(model(inputs_embeds=vectors).logits, given, rtol=1e-4, atol=1e-5)
        with pytest.raises(ValueError, match=r"attention_mask has shape \(1, 8\).*\(1, 3, 8\)"):
            model(input_ids=ids, attention_mask=mask[:, 0])


_PART = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_SIGHT = _PART | {"image_size": 16, "patch_size": 8}
IMAGE = 60  # the token


def paligemma(text: type, **kwargs) -> nn.Module:
    config = tf.PaliGemmaConfig(
        text_config=text(**_LLAMA, head_dim=8, bos_token_id=None, eos_token_id=None, **kwargs),
        vision_config=_SIGHT | {"model_type": "siglip_vision_model"},
        image_token_index=IMAGE,
        hidden_size=32,
        projection_dim=32,
    )
    return tf.PaliGemmaForConditionalGeneration(config)


SEEING = {
    "paligemma": lambda: paligemma(tf.GemmaConfig),
    "paligemma2": lambda: paligemma(tf.Gemma2Config, sliding_window=8, query_pre_attn_scalar=8),
    "git": lambda: tf.GitForCausalLM(tf.GitConfig(**_BERT, vision_config=_SIGHT, bos_token_id=None, eos_token_id=None)),
}


def seeing(name: str) -> tuple[fp.PeftModel, list[dict[str, torch.Tensor]]]:
    """A model that sees images, with prompts of two lengths, and rows of different lengths."""
    base = SEEING[name]().eval()
    for parameter in base.parameters():
        parameter.data.add_(torch.randn_like(parameter) / 5)
    model = fp.get_peft_model(base, fp.PromptTuningConfig(num_virtual_tokens=N, task_type="CAUSAL_LM"), "a")
    model.add_adapter("long", fp.PromptTuningConfig(num_virtual_tokens=N + 2, task_type="CAUSAL_LM"))
    rows = []
    for length in (7, 9, 5):
        ids = torch.randint(2, 50, (1, length))
        row = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(1, 3, 16, 16)}
        if name != "git":  # which puts its images in front of the tokens
            ids[:, :4] = IMAGE
            row["token_type_ids"] = torch.zeros_like(ids)
        rows.append(row)
    return model.eval(), rows


def padded_left(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    length = max(row["input_ids"].shape[1] for row in rows)

    def padded(t: torch.Tensor) -> torch.Tensor:
        return nn.functional.pad(t, (length - t.shape[1], 0)) if t.dim() == 2 else t

    return {key: torch.cat([padded(row[key]) for row in rows]) for key in rows[0]}


@pytest.mark.parametrize("name", SEEING)
@pytest.mark.parametrize("names", [["a", "a", "a"], ["long", "a", "__base__"]])
@torch.no_grad()
def test_padded_rows_with_images_are_and_generate_as_each_alone(name, names):
    model, rows = seeing(name)
    batch = padded_left(rows)
    options = {"use_cache": False, "max_new_tokens": 4, "min_new_tokens": 4, "output_logits": True}
    options |= {"return_dict_in_generate": True, "do_sample": False, "suppress_tokens": [IMAGE]}
    got = model.generate(**batch, adapter_names=names, **options)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    loss, logits = model(**batch, labels=labels, adapter_names=names, return_dict=False)[:2]
    assert logits.shape == model(**batch, adapter_names=["__base__"] * len(rows)).logits.shape
    losses, counts = [], []
    for i, row in enumerate(rows):
        alone = model.generate(**row, adapter_names=names[i : i + 1], **options)
        for a, b in zip(got.logits, alone.logits, strict=True):
            torch.testing.assert_close(a[i], b[0], rtol=1e-4, atol=1e-4)
        expected = model(**row, labels=row["input_ids"], adapter_names=names[i : i + 1])
        own = row["input_ids"].shape[1]
        torch.testing.assert_close(logits[i, -own:], expected.logits[0, -own:], rtol=1e-4, atol=1e-4)
        losses.append(expected.loss)
        counts.append(own - (names[i] == "__base__"))  # the first token is what a prompt says next
    mean = torch.stack(losses) @ torch.tensor(counts, dtype=torch.float32) / sum(counts)
    torch.testing.assert_close(loss, mean, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SEEING)
@pytest.mark.parametrize("pad", [True, False])
@torch.no_grad()
def test_logits_to_keep_are_the_rows_own(name, pad):
    model, rows = seeing(name)
    batch = padded_left(rows if pad else rows[:1])
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    expected = model(**batch).logits
    some = torch.tensor([0, 3, -1])
    for keep, kept in (
        (0, slice(0, None)),
        (1, slice(-1, None)),
        (2, slice(-2, None)),
        (20, slice(0, None)),
        (some, some),
    ):
        outputs = [
            model(**batch, logits_to_keep=keep).logits,
            model(**batch, logits_to_keep=keep, return_dict=False)[0],
        ]
        if pad:  # else the model itself cuts them, which it does before its loss
            outputs.append(model(**batch, logits_to_keep=keep, labels=labels, return_dict=False)[1])
        for logits in outputs:
            torch.testing.assert_close(logits, expected[:, kept], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"logits_to_keep has shape \(\d, 2\)"):
        model(**batch, logits_to_keep=torch.zeros(len(expected), 2, dtype=torch.int64))
