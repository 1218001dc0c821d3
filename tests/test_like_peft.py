"""A script written for peft runs here: its names are there, take what peft's take, and give what peft's give."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import logging
import pickle
import warnings
from functools import partial
from unittest import mock

import architectures as tiny
import peft
import pytest
import torch
import transformers as tf
from peft import helpers, optimizers
from peft.utils import hotswap
from safetensors.torch import load_file
from tiny import tiny_llama, tiny_tokenizer
from torch import nn

import pyfastpeft as fp

pytestmark = pytest.mark.filterwarnings("ignore")

VIRTUAL = {"num_virtual_tokens": 3, "task_type": "CAUSAL_LM"}
CONFIGS = {
    "LoraConfig": {"r": 4, "target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 2}, "use_rslora": True},
    "PromptTuningConfig": {**VIRTUAL, "prompt_tuning_init": "SAMPLE_VOCAB"},
    "PromptEncoderConfig": {**VIRTUAL, "encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 8},
    "PrefixTuningConfig": {**VIRTUAL, "prefix_projection": True},
}
TASKS = {
    "CAUSAL_LM": "PeftModelForCausalLM",
    "SEQ_2_SEQ_LM": "PeftModelForSeq2SeqLM",
    "SEQ_CLS": "PeftModelForSequenceClassification",
    "TOKEN_CLS": "PeftModelForTokenClassification",
    "QUESTION_ANS": "PeftModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "PeftModelForFeatureExtraction",
}
MODELS = {
    "SEQ_2_SEQ_LM": lambda: tiny.make("t5"),
    "SEQ_CLS": lambda: tiny.make("bert"),
    "TOKEN_CLS": lambda: tf.BertForTokenClassification(tiny.make("bert").config),
    "QUESTION_ANS": lambda: tf.BertForQuestionAnswering(tiny.make("bert").config),
    "FEATURE_EXTRACTION": lambda: tf.LlamaModel(tiny.make().config),
}


def model_for(task):
    return MODELS.get(task, tiny.make)()


def pair_of_configs(name):
    return getattr(fp, name)(**CONFIGS[name]), getattr(peft, name)(**CONFIGS[name])


def test_every_name_takes_the_arguments_of_peft_in_their_order():
    for name in fp.__all__:
        theirs = getattr(peft, name, None)
        if inspect.isfunction(theirs):
            own = inspect.signature(getattr(fp, name)).parameters
            order = [n for n in inspect.signature(theirs).parameters if n in own]
            assert list(own) == order, name
    for name in ("add_adapter", "load_adapter", "from_pretrained"):
        own = list(inspect.signature(getattr(fp.PeftModel, name)).parameters)
        theirs = list(inspect.signature(getattr(peft.PeftModel, name)).parameters)
        assert own[:5] == theirs[:5], name


class TestConfigurations:
    @pytest.mark.parametrize("name", CONFIGS)
    def test_a_configuration_is_made_of_all_that_pefts_says(self, name):
        ours, theirs = pair_of_configs(name)
        again = type(ours)(**theirs.to_dict())
        assert again.to_dict().items() >= {(k, v) for k, v in CONFIGS[name].items() if not isinstance(v, (list, dict))}
        assert json.dumps(again.to_dict()) == json.dumps(type(ours)(**again.to_dict()).to_dict())
        assert fp.PeftConfig.from_peft(theirs) == again
        assert fp.PeftConfig.from_peft(ours) is ours

    @pytest.mark.parametrize("name", CONFIGS)
    def test_every_key_of_pefts_is_an_attribute_with_the_value_that_the_file_has(self, name):
        ours, theirs = pair_of_configs(name)
        for key, value in ours.to_dict().items():
            assert getattr(ours, key) == value, key
        assert theirs.to_dict().keys() == ours.to_dict().keys()

    def test_what_says_that_a_variant_is_not_used_is_no_part_of_the_configuration(self):
        plain = fp.LoraConfig(r=4)
        unused = fp.LoraConfig(r=4, layer_replication=None, megatron_config=None, use_qalora=False, runtime_config=None)
        assert unused == plain and repr(unused) == repr(plain) and unused.to_dict() == plain.to_dict()
        assert dataclasses.replace(unused, r=2) == fp.LoraConfig(r=2, lora_alpha=8)
        assert pickle.loads(pickle.dumps(unused)) == copy.deepcopy(unused) == plain
        assert "layer_replication" not in inspect.signature(fp.LoraConfig).parameters
        assert unused.layer_replication is None and unused.megatron_core == "megatron.core"

    @pytest.mark.parametrize(
        ("kwargs", "message"),
        [
            ({"layer_replication": [[0, 1]]}, "layer_replication is .*does not have that variant of LORA"),
            ({"use_qalora": True}, "use_qalora is True"),
            ({"eva_config": peft.EvaConfig()}, "eva_config is EvaConfig"),
            ({"peft_type": "IA3"}, "peft_type is 'IA3'; a LoraConfig is LORA"),
            ({"peft_type": peft.PeftType.IA3}, "peft_type is 'IA3'; a LoraConfig is LORA"),
        ],
    )
    def test_a_variant_that_is_not_here_is_named(self, kwargs, message):
        with pytest.raises(ValueError, match=message):
            fp.LoraConfig(**kwargs)
        with pytest.raises(TypeError, match="unexpected keyword argument 'nothing'"):
            fp.LoraConfig(nothing=1)

    @pytest.mark.parametrize("name", CONFIGS)
    def test_a_dictionary_makes_the_configuration_of_a_new_adapter(self, name):
        ours, theirs = pair_of_configs(name)
        assert fp.get_peft_config({"peft_type": ours.peft_type.value, **CONFIGS[name]}) == ours
        assert (
            type(peft.get_peft_config(theirs.to_dict())).__name__ == type(fp.get_peft_config(ours.to_dict())).__name__
        )
        with pytest.raises(ValueError, match="peft_type is 'IA3'; it must be one of"):
            fp.get_peft_config({"peft_type": "IA3"})
        with pytest.raises(TypeError, match="nothing"):
            fp.get_peft_config({"peft_type": "LORA", "nothing": 1})

    def test_a_method_is_a_member_and_the_string_in_its_file(self):
        assert fp.LoraConfig().peft_type is fp.PeftType.LORA
        configs = [pair_of_configs(name)[0] for name in CONFIGS]
        for config in (*configs, fp.BottleneckConfig(), fp.DeepPromptConfig(**VIRTUAL)):
            kind = config.peft_type
            assert isinstance(kind, fp.PeftType) and kind == kind.value and f"{kind}" == kind.value
            assert json.loads(json.dumps(config.to_dict()))["peft_type"] == kind.value
            known = peft.PeftType.__members__.get(kind.value)
            assert known in (None, kind)
            assert config.is_prompt_learning == (kind.value not in ("LORA", "BOTTLENECK"))
        for name in CONFIGS:
            ours, theirs = pair_of_configs(name)
            assert (ours.peft_type, ours.is_prompt_learning) == (theirs.peft_type, theirs.is_prompt_learning)

    @pytest.mark.parametrize("name", CONFIGS)
    def test_a_model_takes_pefts_own_configuration(self, name, seed):
        ours, theirs = pair_of_configs(name)
        base = tiny.make()
        models = []
        for config in (fp.PeftConfig.from_peft(theirs), theirs):
            torch.manual_seed(seed)
            models.append(fp.get_peft_model(copy.deepcopy(base), config))
        states = [fp.get_peft_model_state_dict(model) for model in models]
        assert states[0].keys() == states[1].keys() and all(torch.equal(states[0][k], states[1][k]) for k in states[0])
        models[1].add_adapter("b", theirs)
        assert type(models[1].peft_config["b"]) is type(ours)
        assert models[1].peft_type == theirs.peft_type

    def test_one_of_pefts_that_cannot_be_followed_is_refused(self):
        base = tiny.make()
        with pytest.raises(ValueError, match="init_lora_weights is 'orthogonal'"):
            fp.get_peft_model(base, peft.LoraConfig(init_lora_weights="orthogonal"))
        with pytest.raises(ValueError, match="peft_type is 'IA3'; it must be one of"):
            fp.get_peft_model(base, peft.IA3Config())
        with pytest.raises(TypeError, match=r"peft_config is a builtins\.dict; it must be one of .*LoraConfig"):
            fp.get_peft_model(base, {"r": 8})
        for method in (fp.LoraConfig, peft.LoraConfig):
            with pytest.raises(
                TypeError, match=rf"peft_config is the class {method.__module__}\.LoraConfig; it must be"
            ):
                fp.get_peft_model(base, method)
        assert all(p.requires_grad for p in base.parameters())

    @pytest.mark.parametrize("init", ["eva", "orthogonal"])
    def test_a_folder_whose_initial_values_peft_chose_otherwise_loads(self, init, tmp_path):
        kwargs = {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": init}
        base, ids = tiny.make(), tiny.inputs()["input_ids"]
        theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**kwargs)).eval()
        tiny.randomize(theirs)
        theirs.save_pretrained(tmp_path)
        ours = fp.PeftModel.from_pretrained(base, tmp_path)
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-5)
        with pytest.raises(ValueError, match=f"init_lora_weights is '{init}'"):
            fp.LoraConfig(**kwargs)

    def test_loftq_is_configured_as_in_peft(self):
        expected = fp.LoraConfig(init_lora_weights="loftq", loftq_config={"loftq_iter": 2})
        for config in (fp.LoftQConfig(loftq_iter=2), peft.LoftQConfig(loftq_iter=2)):
            assert fp.LoraConfig(init_lora_weights="loftq", loftq_config=config) == expected


class TestModels:
    @pytest.mark.parametrize("task", TASKS)
    def test_the_task_chooses_the_class_as_in_peft(self, task, tmp_path):
        config = {"r": 2, "task_type": task}
        theirs = peft.get_peft_model(model_for(task), peft.LoraConfig(**config))
        model = fp.get_peft_model(model_for(task), fp.LoraConfig(**config)).eval()
        assert type(model).__name__ == type(theirs).__name__ == TASKS[task]
        assert type(model) is getattr(fp, TASKS[task])
        model.save_pretrained(tmp_path)
        assert type(fp.PeftModel.from_pretrained(model_for(task), tmp_path)) is type(model)
        assert type(fp.PeftModelForCausalLM.from_pretrained(model_for(task), tmp_path)) is fp.PeftModelForCausalLM

    def test_a_model_of_its_own_class_is_copied_and_pickled(self):
        model = fp.get_peft_model(tiny.make(), fp.LoraConfig(task_type="CAUSAL_LM")).eval()
        tiny.randomize(model)
        batch = tiny.inputs()
        for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert type(again) is fp.PeftModelForCausalLM
            assert torch.equal(again(**batch).logits, model(**batch).logits)

    def test_without_a_task_it_is_the_plain_class(self, tmp_path):
        model = fp.get_peft_model(tiny.make(), fp.LoraConfig())
        assert type(model) is fp.PeftModel
        model.save_pretrained(tmp_path)
        assert type(fp.PeftModel.from_pretrained(tiny.make(), tmp_path)) is fp.PeftModel

    def test_the_class_itself_makes_a_model_as_in_peft(self, seed):
        base, models = tiny.make(), []
        for cls, config in ((fp.PeftModelForCausalLM, fp.LoraConfig), (peft.PeftModelForCausalLM, peft.LoraConfig)):
            torch.manual_seed(seed)
            models.append(cls(copy.deepcopy(base), config(r=4, lora_alpha=8, target_modules=["q_proj"]), "mine"))
        own, others = (dict(model.named_parameters()) for model in models)
        assert own.keys() == others.keys() and all(torch.equal(own[n], others[n]) for n in own)
        assert models[0].active_adapter == models[1].active_adapter == "mine"
        refused = tiny.make()
        with pytest.raises(ValueError, match="matches no module"):
            fp.PeftModel(refused, fp.LoraConfig(target_modules=["nothing"]))
        assert all(p.requires_grad for p in refused.parameters())
        for config in ((fp.LoraConfig(),), ()):
            for model in (models[0], refused.config):
                with pytest.raises(TypeError, match="without adapters"):
                    fp.PeftModel(model, *config)

    def test_the_class_itself_refuses_a_model_that_carries_adapters(self):
        base = tiny.make()
        model = fp.get_peft_model(base, fp.LoraConfig())
        for config in ((fp.LoraConfig(),), ()):
            with pytest.raises(ValueError, match=r"carries the adapters \['default'\] of a PeftModel already"):
                fp.PeftModel(base, *config)
        model.unload()
        assert fp.PeftModel(base).peft_config == {}

    def test_the_active_configuration_is_that_of_the_one_active_adapter(self):
        model = fp.get_peft_model(tiny.make(), fp.LoraConfig(), "a")
        model.add_adapter("b", fp.LoraConfig())
        assert model.active_peft_config is model.peft_config["a"]
        model.set_adapter(["b", "a"])
        with pytest.raises(ValueError, match=r"needs one active adapter; active are \['b', 'a'\]"):
            _ = model.active_peft_config

    def test_base_model_answers_for_the_adapters_as_in_peft(self, seed):
        base, ids = tiny.make(), tiny.inputs()["input_ids"]
        seen = []
        for library in (fp, peft):
            config = library.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"])
            model = library.get_peft_model(copy.deepcopy(base), config, "a")
            model.add_adapter("b", config)
            torch.manual_seed(seed)
            tiny.randomize(model)
            for again in (model, copy.deepcopy(model)):
                held, outputs = again.base_model, []
                held.add_weighted_adapter(["a", "b"], [1.0, 0.5], "c", combination_type="cat")
                held.set_adapter(["c"])
                outputs.append(again(ids).logits)
                held.merge_adapter(adapter_names=["b"])
                outputs.append(again(ids).logits)
                held.unmerge_adapter()
                held.delete_adapter("b")
                said = list(held.peft_config), held.active_adapters, again.active_adapters
                outputs.append(held.merge_and_unload()(ids).logits)
                seen.append((said, outputs))
        for said, outputs in seen:
            assert said == (["a", "c"], ["c"], ["c"])
            torch.testing.assert_close(outputs, seen[-1][1], rtol=1e-4, atol=1e-5)
        model = fp.get_peft_model(copy.deepcopy(base), fp.LoraConfig(), "a")
        assert model.base_model.active_adapter == "a"
        assert pickle.loads(pickle.dumps(model)).base_model.active_adapters == ["a"]
        assert torch.equal(model.base_model.unload()(ids).logits, base(ids).logits)

    def test_the_layers_with_lora_are_named_as_in_peft(self):
        named = []
        for library in (fp, peft):
            model = library.get_peft_model(tiny.make(), library.LoraConfig(target_modules=["v_proj", "embed_tokens"]))
            model.add_adapter("b", library.LoraConfig(target_modules=r".*\.1\..*\.(q|v)_proj"))
            named.append(model.targeted_module_names)
            assert model.base_model.targeted_module_names == named[-1]
        assert named[0] == named[1] and len(named[0]) == 4

    @pytest.mark.parametrize("name", [name for name in CONFIGS if name != "LoraConfig"])
    def test_the_embeddings_of_a_soft_prompt_are_given_as_in_peft(self, name, seed):
        base, given = tiny.make(), []
        for library in (fp, peft):
            torch.manual_seed(seed)
            model = library.get_peft_model(copy.deepcopy(base), getattr(library, name)(**CONFIGS[name]), "p")
            given.append(model.get_prompt_embedding_to_save("p"))
        torch.testing.assert_close(*given)
        assert not given[0].requires_grad
        model = fp.get_peft_model(base, fp.LoraConfig())
        with pytest.raises(ValueError, match="adapter_name is 'default', which is LORA; it must be a soft prompt"):
            model.get_prompt_embedding_to_save("default")

    def test_a_pipeline_takes_it_without_a_word(self, caplog):
        model = fp.get_peft_model(tiny_llama(), fp.LoraConfig(task_type="CAUSAL_LM"))
        logger = logging.getLogger("transformers")
        before, logger.propagate = logger.propagate, True
        try:
            with caplog.at_level(logging.ERROR, "transformers"):
                pipe = tf.pipeline("text-generation", model=model, tokenizer=tiny_tokenizer())
        finally:
            logger.propagate = before
        assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
        assert pipe("hello", max_new_tokens=2)[0]["generated_text"].startswith("hello")

    def test_the_keywords_of_peft_are_taken(self, tmp_path):
        model = fp.get_peft_model(
            tiny.make(), fp.LoraConfig(revision="old"), "a", mixed=True, revision="new", low_cpu_mem_usage=True
        )
        assert model.peft_config["a"].revision == "new"
        model.add_adapter("b", fp.PromptTuningConfig(num_virtual_tokens=2), low_cpu_mem_usage=True)
        model.save_pretrained(tmp_path)
        again = fp.PeftModel.from_pretrained(tiny.make(), tmp_path / "a", low_cpu_mem_usage=True)
        result = again.load_adapter(tmp_path / "b", "b", False, "cpu", low_cpu_mem_usage=True)
        assert result == ([], []) and result.missing_keys == result.unexpected_keys == []
        theirs = peft.LoraConfig.from_pretrained(tmp_path / "a")
        again.load_adapter(tmp_path / "a", "c", config=theirs)
        state = fp.get_peft_model_state_dict(again, adapter_name="c")
        again.hotswap_adapter(state, "c", theirs)
        assert type(again.peft_config["c"]) is fp.LoraConfig
        assert fp.set_peft_model_state_dict(again, state, "c", low_cpu_mem_usage=True) == ([], [])
        with pytest.raises(ValueError, match="ignore_mismatched_sizes is True; it must be False"):
            fp.set_peft_model_state_dict(again, state, "c", ignore_mismatched_sizes=True)

    def test_what_is_loaded_for_inference_runs_without_dropout(self, tmp_path):
        fp.get_peft_model(tiny.make(), fp.LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
        for wrap in (fp.get_peft_model, peft.get_peft_model):
            for is_trainable in (False, True):
                config = peft.LoraConfig(target_modules=["q_proj"], lora_dropout=0.5)
                model = wrap(tiny.make(), config, "first").train()
                model.load_adapter(str(tmp_path), "second", is_trainable=is_trainable)
                assert {module.training for module in model.modules()} == {is_trainable}, wrap


LORA, PROMPT = fp.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]), fp.PromptTuningConfig(**VIRTUAL)


@pytest.mark.parametrize("first", [LORA, PROMPT, fp.BottleneckConfig()], ids=lambda c: type(c).__name__)
@pytest.mark.parametrize("second", [LORA, PROMPT], ids=lambda c: type(c).__name__)
def test_a_base_that_carries_adapters_is_not_adapted_again(first, second, tmp_path):
    """Both would write into the same modules, and neither's file would hold what runs."""
    base = tiny.make()
    model = fp.get_peft_model(base, first).eval()
    ids = torch.arange(1, 6).unsqueeze(0)
    expected = model(ids).logits
    fp.get_peft_model(tiny.make(), second).save_pretrained(tmp_path)
    for again in (fp.get_peft_model, lambda b, _: fp.PeftModel.from_pretrained(b, tmp_path)):
        with pytest.raises(ValueError, match=r"carries the adapters \['default'\].*unload"):
            again(base, second)
    assert torch.equal(model(ids).logits, expected)
    fp.get_peft_model(model.unload(), second)


@pytest.mark.parametrize("first", [LORA, PROMPT], ids=lambda c: type(c).__name__)
@pytest.mark.parametrize("second", [LORA, PROMPT], ids=lambda c: type(c).__name__)
def test_of_two_models_around_one_base_a_single_one_gets_adapters(first, second):
    base = tiny.make()
    one, other, around = fp.PeftModel(base), fp.PeftModel(base), fp.PeftModel(torch.nn.Sequential(base))
    one.add_adapter("a", first)
    one.set_adapter("a")
    ids = torch.arange(1, 6).unsqueeze(0)
    expected = one.eval()(ids).logits
    for late, config in ((other, second), (around, LORA)):
        with pytest.raises(ValueError, match=r"carries the adapters \['a'\] of a PeftModel already"):
            late.add_adapter("b", config)
        assert not late.peft_config and torch.equal(one(ids).logits, expected)
    one.delete_adapter("a")
    other.add_adapter("b", second)


def _by_transformers(base, config, deletes=False):
    with mock.patch("transformers.integrations.peft.check_peft_version"):  # 5.24 asks for a version that is not out
        base.add_adapter(config, "a")
        if deletes:
            base.delete_adapter("a")  # PEFT's layers stay
    return base


@pytest.mark.parametrize(
    "attach",
    [
        peft.get_peft_model,
        lambda base, config: peft.inject_adapter_in_model(config, base),
        _by_transformers,
        partial(_by_transformers, deletes=True),
    ],
    ids=["model", "injected", "transformers", "deleted"],
)
@pytest.mark.parametrize("second", [LORA, PROMPT], ids=lambda c: type(c).__name__)
def test_a_base_that_carries_adapters_of_pefts_own_is_not_adapted(attach, second, tmp_path):
    """They would be in no file, and the base model that the file names would be another."""
    fp.get_peft_model(tiny.make(), second).save_pretrained(tmp_path)
    model = attach(tiny.make(), peft.LoraConfig(target_modules=["q_proj"]))
    for again in (fp.get_peft_model, lambda b, _: fp.PeftModel.from_pretrained(b, tmp_path)):
        with pytest.raises(ValueError, match="carries adapters of PEFT's own"):
            again(model, second)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ("model", "", r"LlamaForCausalLM whose 'model' carries the adapters \['default'\]"),
        ("model.layers.1", "model", r"LlamaModel whose 'layers.1' carries the adapters \['default'\]"),
        ("", "model", "LlamaModel whose 'layers.0.self_attn.q_proj' carries adapters"),
    ],
)
def test_no_part_of_a_model_carries_the_adapters_of_another_model(first, second, message, tmp_path):
    """What the first trains in the other's modules would be in no file."""
    base, config = tiny.make(), fp.LoraConfig(target_modules=["q_proj"])
    held = fp.get_peft_model(base.get_submodule(first), config)
    fp.get_peft_model(tiny.make().get_submodule(second), config).save_pretrained(tmp_path)
    for again in (fp.get_peft_model, lambda b, _: fp.PeftModel.from_pretrained(b, tmp_path)):
        with pytest.raises(ValueError, match=f"{message} of a PeftModel already.*unload"):
            again(base.get_submodule(second), config)
    held.unload()
    fp.get_peft_model(base.get_submodule(second), config)


def test_a_failed_attachment_leaves_a_base_that_can_be_adapted():
    base = tiny.make()
    with pytest.raises(ValueError, match="nowhere"):
        fp.get_peft_model(base, fp.LoraConfig(target_modules=["nowhere"]))
    model = fp.get_peft_model(base, LORA)
    model.delete_adapter("default")
    fp.get_peft_model(copy.deepcopy(model.unload()), PROMPT)


@pytest.mark.parametrize(
    "architecture, name", [("t5", "EncDecAttention"), ("llama", "self_attn"), ("llama", "layers.1")]
)
def test_modules_to_save_may_hold_attention(architecture, name):
    """The copy goes by the attention that the model is given, and is called as what it stands for."""
    base, batch = tiny.make(architecture).eval(), tiny.inputs(architecture)
    outputs = []
    for library in (peft, fp):
        config = library.LoraConfig(
            target_modules=["wi" if architecture == "t5" else "up_proj"], modules_to_save=[name]
        )
        model = library.get_peft_model(copy.deepcopy(base), config).eval()
        outputs.append(model(**batch).logits)
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=1e-5)
    rows = len(next(iter(batch.values())))
    mixed = model(
        **batch, adapter_names=["default", "__base__"] * (rows // 2) + ["default"] * (rows % 2), use_cache=False
    )
    torch.testing.assert_close(mixed.logits, outputs[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("how", ["assign", "to_empty"])
@pytest.mark.parametrize("extra", [{}, {"use_dora": True}, {"trainable_token_indices": [3, 4]}], ids=str)
def test_a_model_goes_to_the_meta_device_and_comes_back(how, extra):
    config = fp.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False, **extra)
    model = fp.get_peft_model(tiny.make(), config).eval()
    model.add_adapter("b", fp.LoraConfig(target_modules=["q_proj"], init_lora_weights=False, lora_alpha=3))
    rows = {"input_ids": torch.randint(1, tiny.VOCAB, (2, 5)), "adapter_names": ["default", "b"]}
    expected = model(rows["input_ids"]).logits, model(**rows).logits
    state, buffers = {k: t.clone() for k, t in model.state_dict().items()}, dict(model.named_buffers())
    model.to("meta")
    if how == "assign":
        model.load_state_dict(state, assign=True)
    else:
        model.to_empty(device="cpu")
        model.load_state_dict(state)
    for name, values in buffers.items():  # what no state_dict has
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner)._buffers[leaf] = values
    assert torch.equal(model(rows["input_ids"]).logits, expected[0])
    assert torch.equal(model(**rows).logits, expected[1])


@pytest.mark.parametrize("extra", [{}, {"use_dora": True}], ids=str)
def test_an_adapter_made_on_the_meta_device_takes_the_tensors_it_is_assigned(extra):
    config = fp.LoraConfig(target_modules=["0", "1"], init_lora_weights=False, **extra)
    base, ids = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 4)), torch.arange(20)
    model, empty = fp.get_peft_model(copy.deepcopy(base), config), fp.get_peft_model(base.to("meta"), config)
    assert all(p.is_meta for p in empty.parameters())
    empty.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(empty(ids), model(ids))


def test_the_tag_of_a_model_card_is_the_base_models_name(tmp_path):
    base = tiny.make()
    base.name_or_path = base.config._name_or_path = "someone/model"
    fp.get_peft_model(base, LORA).save_pretrained(tmp_path, save_embedding_layers=False)
    from huggingface_hub import ModelCard

    assert "base_model:adapter:someone/model" in ModelCard.load(tmp_path / "README.md").data.tags
    config = fp.PeftConfig.from_pretrained(pretrained_model_name_or_path=tmp_path)
    assert config.base_model_name_or_path == "someone/model"


def test_the_configuration_of_a_model_names_its_base_as_pefts_does():
    for library in (peft, fp):
        base = tiny.make()
        base.name_or_path = base.config._name_or_path = "someone/model"
        model = library.get_peft_model(base, library.LoraConfig(target_modules=["q_proj"]))
        assert model.peft_config["default"].base_model_name_or_path == "someone/model"


def test_a_mapping_of_keys_is_refused(tmp_path):
    fp.get_peft_model(tiny.make(), LORA).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"key_mapping is \{'a': 'b'\}"):
        fp.PeftModel.from_pretrained(tiny.make(), tmp_path, key_mapping={"a": "b"})


@pytest.mark.parametrize("injected", [False, True], ids=["", "injected"])
@pytest.mark.parametrize("kwargs", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_pefts_own_functions_take_our_models(kwargs, injected):
    base, x, made = tiny.make(), tiny.inputs(), []
    for library in (peft, fp):
        config, model = library.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], **kwargs), copy.deepcopy(base)
        put_in = library.inject_adapter_in_model if injected else library.get_peft_model
        made.append(put_in(config, model, "one") if injected else put_in(model, config, "one"))
    theirs, ours = made
    tiny.randomize(theirs)
    expected = peft.get_peft_model_state_dict(theirs, adapter_name="one")
    peft.set_peft_model_state_dict(ours, expected, adapter_name="one")
    held = peft.get_peft_model_state_dict(model=ours, adapter_name="one", save_embedding_layers=False)
    assert held.keys() == expected.keys() and all(torch.equal(held[key], t) for key, t in expected.items())
    torch.testing.assert_close(ours(**x).logits, theirs(**x).logits, rtol=1e-4, atol=1e-5)
    named = {key: t * 2 for key, t in ours.state_dict().items()}
    given = peft.get_peft_model_state_dict(ours, named, "one")
    assert all(torch.equal(given[key], t * 2) for key, t in expected.items())
    assert [s.name for s in peft.get_layer_status(ours)] == [s.name for s in peft.get_layer_status(theirs)]
    status = peft.get_model_status(ours)
    assert status == fp.get_model_status(ours)
    for field in ("active_adapters", "trainable_params", "requires_grad", "num_adapter_layers"):
        assert getattr(status, field) == getattr(peft.get_model_status(theirs), field)


def test_pefts_hotswap_takes_effect_in_what_serves(tmp_path):
    base, ids, outputs = tiny.make(dtype=torch.bfloat16), tiny.inputs()["input_ids"], []
    quantized = tiny.quantized(copy.deepcopy(base))
    for name in ("first", "second"):
        saved = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
        tiny.randomize(saved)
        saved.save_pretrained(tmp_path / name)
        model = fp.PeftModel.from_pretrained(copy.deepcopy(quantized), tmp_path / name).eval()
        outputs.append(model(ids).logits.detach())
    assert not torch.equal(*outputs)
    for name, expected in zip(("first", "second"), outputs, strict=True):
        hotswap.hotswap_adapter(model, str(tmp_path / name), "default", torch_device="cpu")
        assert torch.equal(model(ids).logits, expected)


def test_pefts_helper_rescales_our_layers():
    base, ids, given, state = tiny.make(), tiny.inputs()["input_ids"], [], {}
    for library in (peft, fp):
        config = library.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "embed_tokens"])
        model = library.get_peft_model(copy.deepcopy(base), config).eval()
        if not state:
            tiny.randomize(model)
            state = peft.get_peft_model_state_dict(model)
        library.set_peft_model_state_dict(model, state)
        before = model(ids).logits
        with helpers.rescale_adapter_scale(model, 0.5):
            inside = model(ids).logits
        assert torch.equal(model(ids).logits, before)
        given.append(inside)
    torch.testing.assert_close(*given, rtol=1e-4, atol=1e-5)


def test_lora_plus_gives_embeddings_their_own_rate():
    groups = []
    for library in (fp, peft):
        model = library.get_peft_model(tiny.make(), library.LoraConfig(target_modules=["q_proj", "embed_tokens"]))
        names = {id(p): name for name, p in model.named_parameters()}
        held = optimizers.create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=4.0)
        groups.append([(sorted(names[id(p)] for p in g["params"]), g["lr"]) for g in held.param_groups])
    assert groups[0] == groups[1]
    assert any("embed_tokens" in name for name in groups[0][1][0])


class TestInjected:
    def test_a_model_with_injected_adapters_is_pefts(self, tmp_path):
        base, ids = tiny.make("qwen2"), tiny.inputs("qwen2")["input_ids"]
        config = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "trainable_token_indices": [1, 3]}
        theirs = peft.inject_adapter_in_model(peft.LoraConfig(**config), copy.deepcopy(base))
        tiny.randomize(theirs)
        model = copy.deepcopy(base)
        ours = fp.inject_adapter_in_model(fp.LoraConfig(**config), model)
        assert ours is model and type(ours) is type(base) and ours.peft_config["default"].r == 2
        tensors = peft.get_peft_model_state_dict(theirs)
        assert not any(fp.set_peft_model_state_dict(ours, tensors))
        held = fp.get_peft_model_state_dict(ours)
        assert held.keys() == tensors.keys() and all(torch.equal(t, tensors[key]) for key, t in held.items())
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-5)
        trains = {name for name, p in ours.named_parameters() if p.requires_grad}
        assert trains == {name for name, p in theirs.named_parameters() if p.requires_grad}
        halved = {key: t * 0.5 for key, t in ours.state_dict().items()}
        given = fp.get_peft_model_state_dict(ours, halved)
        assert all(torch.equal(t, held[key] * 0.5) for key, t in given.items())
        for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            assert torch.equal(twin(ids).logits, ours(ids).logits)
            fp.set_peft_model_state_dict(twin, given)
            assert not torch.equal(twin(ids).logits, ours(ids).logits)

    def test_more_can_follow_and_the_last_is_active(self):
        model, ids = tiny.make(), tiny.inputs()["input_ids"]
        plain = model(ids).logits
        for name in ("first", "second"):
            fp.inject_adapter_in_model(fp.LoraConfig(r=2, target_modules=["q_proj"]), model, name)
        assert list(model.peft_config) == ["first", "second"]
        values = fp.get_peft_model_state_dict(model, adapter_name="first")
        fp.set_peft_model_state_dict(model, {key: torch.ones_like(t) for key, t in values.items()}, "first")
        torch.testing.assert_close(model(ids).logits, plain)
        values = fp.get_peft_model_state_dict(model, adapter_name="second")
        fp.set_peft_model_state_dict(model, {key: torch.ones_like(t) for key, t in values.items()}, "second")
        assert not torch.allclose(model(ids).logits, plain, atol=1e-3)

    def test_what_cannot_be_injected_is_named(self):
        with pytest.raises(ValueError, match="a PrefixTuningConfig, a soft prompt, which needs get_peft_model"):
            fp.inject_adapter_in_model(fp.PrefixTuningConfig(**VIRTUAL), tiny.make())
        with pytest.raises(TypeError, match="model is a LlamaForCausalLM; it must be a PeftModel"):
            fp.get_peft_model_state_dict(tiny.make())
        model = fp.inject_adapter_in_model(fp.LoraConfig(), tiny.make())
        for call in (fp.get_peft_model_state_dict, partial(fp.set_peft_model_state_dict, peft_model_state_dict={})):
            with pytest.raises(ValueError, match=r"no adapter 'none'.*\['default'\]"):
                call(model, adapter_name="none")

    def test_the_tensors_of_a_folder_are_what_peft_reads(self, tmp_path):
        model = fp.get_peft_model(tiny.make(), fp.LoraConfig(r=2))
        tiny.randomize(model)
        model.save_pretrained(tmp_path)
        ours, theirs = fp.load_peft_weights(tmp_path), peft.load_peft_weights(tmp_path, "cpu")
        assert ours.keys() == theirs.keys() and all(torch.equal(t, theirs[key]) for key, t in ours.items())
        assert not any(fp.set_peft_model_state_dict(model, ours))


class TestStatus:
    @staticmethod
    def same(ours, theirs, but):
        own, others = ([dataclasses.asdict(s) for s in statuses] for statuses in (ours, theirs))
        for values in (*own, *others):
            for key in but:
                del values[key]
        assert own == others

    @pytest.mark.parametrize("change", ["none", "second", "merged", "one_merged", "disabled", "saved", "embedding"])
    def test_it_is_what_peft_says(self, change):
        kwargs = {"target_modules": ["embed_tokens"] if change == "embedding" else ["q_proj", "v_proj"]}
        kwargs |= {"modules_to_save": ["lm_head"]} if change == "saved" else {}
        base = tiny.make()
        models = (
            fp.get_peft_model(copy.deepcopy(base), fp.LoraConfig(**kwargs)),
            peft.get_peft_model(base, peft.LoraConfig(**kwargs)),
        )
        for model, config in zip(models, (fp.LoraConfig, peft.LoraConfig), strict=True):
            if change == "second":
                model.add_adapter("b", config(target_modules=["q_proj", "k_proj"]))
            elif change == "merged":
                model.merge_adapter()
            elif change == "one_merged":
                model.base_model.model.model.layers[0].self_attn.q_proj.merge(adapter_names=["default"])
            elif change == "disabled":
                model.base_model.disable_adapter_layers()
        ours, theirs = models
        # What a copy of a whole module is called is each library's own affair, and so is what holds the adapters.
        self.same(ours.get_layer_status(), theirs.get_layer_status(), ["module_type"] if change == "saved" else [])
        self.same([ours.get_model_status()], [theirs.get_model_status()], ["adapter_model_type"])
        assert fp.get_model_status(ours) == ours.get_model_status()
        assert fp.get_layer_status(ours) == ours.get_layer_status()

    def test_adapters_are_not_enabled_inside_disable_adapter(self):
        models = [library.get_peft_model(tiny.make(), library.LoraConfig(lora_alpha=16)) for library in (fp, peft)]
        for model in models:
            with model.disable_adapter():
                inside = model.get_model_status().enabled, {s.enabled for s in model.get_layer_status()}
            assert inside == (False, {False}) and model.get_model_status().enabled is True

    def test_injected_adapters_have_a_status_and_other_models_none(self):
        for library in (fp, peft):
            kwargs = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
            model = library.inject_adapter_in_model(library.LoraConfig(**kwargs), tiny.make())
            layers, whole = library.get_layer_status(model), library.get_model_status(model)
            assert {s.name for s in layers} == {
                n for n, _ in model.named_modules() if n.endswith(("q_proj", "lm_head"))
            }
            assert whole.base_model_type == "LlamaForCausalLM" and whole.num_adapter_layers == len(layers)
            assert whole.requires_grad == {"default": True} and whole.available_adapters == ["default"]
        for status in (fp.get_layer_status, fp.get_model_status):
            with pytest.raises(TypeError, match="model is a LlamaForCausalLM; it must be a PeftModel, or"):
                status(tiny.make())

    def test_a_4_bit_base_and_the_other_methods_are_told(self):
        model = fp.get_peft_model(tiny.quantized(tiny.make()), fp.LoraConfig(task_type="CAUSAL_LM"))
        model.add_adapter("b", fp.BottleneckConfig())
        model.add_adapter("p", fp.PromptTuningConfig(num_virtual_tokens=2))
        status = model.get_model_status()
        assert status.peft_types == {"default": "LORA", "b": "BOTTLENECK", "p": "PROMPT_TUNING"}
        assert status.available_adapters == ["b", "default"]
        assert status.requires_grad == {"b": False, "default": True}
        assert {s.module_type for s in model.get_layer_status()} == {"lora.Linear4bit", "BottleneckLayer"}
        assert "pyfastpeft nf4" in {s.quantization_backend for s in model.get_layer_status()}
        model.delete_adapter("default")
        model.delete_adapter("b")
        assert model.get_layer_status() == [] and model.get_model_status().num_adapter_layers == 0


class TestPreparedForTraining:
    @pytest.mark.parametrize("kwargs", [None, {"use_reentrant": True}, {"use_reentrant": False}], ids=str)
    @pytest.mark.parametrize("quantized", [False, True], ids=["full precision", "4-bit"])
    def test_gradients_are_those_without_checkpoints_and_16_bits_stay(self, quantized, kwargs):
        base = tiny.make(dtype=torch.bfloat16).train()
        base = tiny.quantized(base) if quantized else base
        dtypes = [p.dtype for p in base.parameters()]
        config, batch, grads = fp.LoraConfig(init_lora_weights=False, task_type="CAUSAL_LM"), tiny.inputs(), []
        for checkpoints in (False, True):
            prepared = copy.deepcopy(base)
            assert fp.prepare_model_for_kbit_training(prepared, checkpoints, kwargs) is prepared
            assert prepared.is_gradient_checkpointing == checkpoints
            assert [p.dtype for p in prepared.parameters()] == dtypes
            assert not any(p.requires_grad for p in prepared.parameters())
            torch.manual_seed(0)
            model = fp.get_peft_model(prepared, config).train()
            model(**batch).loss.backward()
            grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
        assert grads[0].abs().max() > 0
        torch.testing.assert_close(*grads, rtol=0.05, atol=1e-3)

    def test_a_model_that_is_not_of_transformers_is_frozen_and_its_inputs_pass_gradients_on(self):
        class Plain(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.embed = torch.nn.Embedding(8, 4)

            def get_input_embeddings(self):
                return self.embed

        model = fp.prepare_model_for_kbit_training(Plain(), auto_clear_cache=False)
        for again in (model, copy.deepcopy(model)):
            assert not again.embed.weight.requires_grad
            assert again.embed(torch.tensor([1])).requires_grad
        assert not fp.prepare_model_for_kbit_training(Plain(), False).embed(torch.tensor([1])).requires_grad
        assert not any(p.requires_grad for p in fp.prepare_model_for_kbit_training(torch.nn.Linear(2, 2)).parameters())


class TestAuto:
    @pytest.fixture
    def folder(self, tmp_path):
        """An adapter of a base model beside it."""
        return self.adapter(tmp_path, "CAUSAL_LM")

    @staticmethod
    def adapter(folder, task, **config):
        model_for(task).save_pretrained(folder / "base")
        base = type(model_for(task)).from_pretrained(folder / "base")
        model = fp.get_peft_model(base, fp.LoraConfig(r=2, task_type=task, init_lora_weights=False, **config))
        model.save_pretrained(folder / "adapter")
        return folder / "adapter"

    @pytest.mark.parametrize("task", TASKS)
    def test_each_task_loads_the_model_and_the_adapter_that_peft_loads(self, task, tmp_path):
        folder = self.adapter(tmp_path, task)
        name = TASKS[task].replace("PeftModel", "AutoPeftModel")
        theirs = getattr(peft, name, None) or peft.auto.AutoPeftModelForSeq2SeqLM
        expected = theirs.from_pretrained(folder).eval()
        for cls in (getattr(fp, name), fp.AutoPeftModel):
            model = cls.from_pretrained(folder).eval()
            assert type(model) is getattr(fp, TASKS[task])
            assert type(model.get_base_model()) is type(expected.get_base_model())
            own, others = model.state_dict(), expected.state_dict()
            assert own.keys() == others.keys() and all(torch.equal(own[k], others[k]) for k in own)
            assert not any(p.requires_grad for p in model.parameters())

    def test_without_a_task_the_folder_says_what_the_model_was(self, tmp_path):
        folder = self.adapter(tmp_path, None)
        model = fp.AutoPeftModel.from_pretrained(folder, "mine", is_trainable=True)
        theirs = peft.AutoPeftModel.from_pretrained(folder)
        assert type(model) is fp.PeftModel and model.active_adapter == "mine"
        assert type(model.get_base_model()) is type(theirs.get_base_model()) is tf.LlamaForCausalLM
        assert any(p.requires_grad for p in model.parameters())
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_mapping": None}))
        assert type(fp.AutoPeftModelForCausalLM.from_pretrained(folder)) is fp.PeftModelForCausalLM

    def test_the_base_model_takes_the_arguments_of_transformers(self, folder):
        model = fp.AutoPeftModelForCausalLM.from_pretrained(
            folder, quantization_config=fp.FastPeftConfig(), dtype=torch.bfloat16, low_cpu_mem_usage=True
        )
        layer = model.get_base_model().model.layers[0].self_attn.q_proj
        assert isinstance(layer.base_layer, fp.nn.Linear4bit) and layer.base_layer.packed.dtype == torch.bfloat16

    def test_a_folder_may_be_called_as_a_gguf_file_is(self, folder):
        base = folder.with_name("base")
        path = folder / "adapter_config.json"
        path.write_text(path.read_text().replace(str(base), str(base.rename(base.with_suffix(".gguf")))))
        assert fp.AutoPeftModelForCausalLM.from_pretrained(folder).peft_config["default"].r == 2

    def test_an_adapter_below_a_folder_is_found(self, folder):
        model = fp.AutoPeftModelForCausalLM.from_pretrained(folder.parent, subfolder="adapter")
        assert model.peft_config["default"].r == 2

    @pytest.mark.parametrize("quantized", [False, True], ids=["full precision", "4-bit"])
    def test_a_tokenizer_with_more_tokens_makes_room_for_them(self, quantized, tmp_path):
        tokenizer, kwargs = tiny_tokenizer(), {"quantization_config": fp.FastPeftConfig()} if quantized else {}
        tiny.make().save_pretrained(tmp_path / "base")
        base = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "base", **kwargs)
        base.resize_token_embeddings(len(tokenizer))
        model = fp.get_peft_model(base, fp.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)).eval()
        model.save_pretrained(tmp_path / "adapter")
        tokenizer.save_pretrained(tmp_path / "adapter")
        ids = torch.tensor([[1, tiny.VOCAB + 1, len(tokenizer) - 1]])
        expected = model(ids).logits
        assert expected.shape[-1] == len(tokenizer) > tiny.VOCAB
        again = fp.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", **kwargs)
        torch.testing.assert_close(again(ids).logits, expected, rtol=0, atol=1e-5)
        if not quantized:
            theirs = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
            torch.testing.assert_close(theirs(ids).logits, expected, rtol=0, atol=1e-5)

    def test_a_tokenizer_with_fewer_tokens_changes_nothing(self, tmp_path):
        tiny_llama().save_pretrained(tmp_path / "base")
        base = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        fp.get_peft_model(base, fp.LoraConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path / "adapter")
        tiny_tokenizer().save_pretrained(tmp_path / "adapter")
        model = fp.AutoPeftModel.from_pretrained(tmp_path / "adapter")
        assert len(model.get_input_embeddings().weight) == 320 > len(tiny_tokenizer())
        assert all("lora_" in key for key in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))

    @pytest.mark.parametrize(
        ("change", "cls", "message"),
        [
            ({"base_model_name_or_path": None}, "AutoPeftModel", "adapter names no base model"),
            ({}, "AutoPeftModelForSequenceClassification", "is for CAUSAL_LM, and AutoPeftModelForSequence.* SEQ_CLS"),
            ({"task_type": None}, "AutoPeftModel", "has neither a task_type nor the auto_mapping"),
            (
                {"task_type": None, "auto_mapping": {"base_model_class": "system", "parent_library": "os"}},
                "AutoPeftModel",
                "auto_mapping of a transformers model .*'os'",
            ),
            (
                {"task_type": None, "auto_mapping": {"base_model_class": "pipeline", "parent_library": "transformers"}},
                "AutoPeftModel",
                "auto_mapping of a transformers model",
            ),
            ({"peft_type": "IA3"}, "AutoPeftModel", "peft_type is 'IA3'"),
        ],
    )
    def test_what_cannot_be_loaded_is_named(self, folder, change, cls, message):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        with pytest.raises(ValueError, match=message):
            getattr(fp, cls).from_pretrained(folder)

    def test_a_folder_that_is_not_there_is_named(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="nowhere"):
            fp.AutoPeftModel.from_pretrained(tmp_path / "nowhere")


def test_nothing_is_said_where_pefts_configuration_says_nothing_else():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fp.PeftConfig.from_peft(peft.LoraConfig(target_modules=["q_proj"]))
