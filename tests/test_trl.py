"""TRL's trainers do with this library's configurations and models what they do with PEFT's."""

from __future__ import annotations

import math
import types
from functools import partial

import pytest
import torch
from tiny import tiny_llama, tiny_tokenizer

import pyfastpeft as fp

peft = pytest.importorskip("peft")
trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

from pyfastpeft.integrations.trl import teach_trl  # noqa: E402

PAIRS = [
    {"prompt": f"Question {i}? ", "chosen": f"The answer is {i}.", "rejected": "No idea" + "." * (i % 3)}
    for i in range(8)
]
TEXTS = [{"text": pair["prompt"] + pair["chosen"]} for pair in PAIRS]
COMPLETIONS = [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in PAIRS]
ROWS = {"SFT": TEXTS, "DPO": PAIRS, "GRPO": [{"prompt": pair["prompt"]} for pair in PAIRS]}


@pytest.fixture(autouse=True, scope="module")
def no_progress_bars():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture
def base(tmp_path):
    """Makes the same model each time. GRPO and KTO load it by its path, as a reference where there is no adapter."""
    tiny_llama().save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    return lambda: trl.trainer.utils.create_model_from_path(str(tmp_path / "base"), dtype=torch.float32)


def lora(library, **kwargs):
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    return library.LoraConfig(**(settings | kwargs))


def trainer(kind, output, model, config=None, rows=None, module=trl, **kwargs):
    settings = {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1}
    settings |= {"report_to": [], "seed": 1, "use_cpu": True, "bf16": False, "disable_tqdm": True, "save_steps": 3}
    arguments = {}
    if kind == "GRPO":
        settings |= {"max_completion_length": 6, "num_generations": 4, "beta": 0.1}
        arguments["reward_funcs"] = lambda completions, **_: [float(len(set(c))) for c in completions]
    return getattr(module, f"{kind}Trainer")(
        model=model,
        args=getattr(module, f"{kind}Config")(str(output), **(settings | kwargs)),
        train_dataset=datasets.Dataset.from_list(ROWS[kind] if rows is None else rows),
        processing_class=tiny_tokenizer(),
        peft_config=config,
        **arguments,
    )


def losses(trained):
    trained.train()
    return [log[key] for log in trained.state.log_history for key in ("loss", "grad_norm", "entropy") if key in log]


def check_alike(train):
    """That ``train(library)`` goes with this library as with peft."""
    theirs, ours = losses(train(peft)), losses(train(fp))
    assert len(ours) >= 6 and ours == pytest.approx(theirs, rel=1e-4, abs=1e-4)


def check_checkpoint(folder, base, trained):
    assert {p.name for p in folder.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    assert not list(folder.rglob("model*.safetensors"))
    ids = torch.randint(3, 200, (2, 7))
    loaded = peft.PeftModel.from_pretrained(base(), str(folder)).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, trained.model.eval()(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("given", ["config", "model"])
def test_sft(tmp_path, base, given):
    made = {}

    def train(library):
        torch.manual_seed(5)
        config = lora(library, lora_dropout=0.0)
        arguments = (base(), config) if given == "config" else (library.get_peft_model(base(), config),)
        made[library] = trainer("SFT", tmp_path / library.__name__, *arguments)
        return made[library]

    check_alike(train)
    assert isinstance(made[fp].model, fp.PeftModel)
    check_checkpoint(tmp_path / "pyfastpeft" / "checkpoint-3", base, made[fp])


def test_dpo_with_a_config_refers_to_the_base_model_and_has_no_dropout(tmp_path, base):
    check_alike(lambda library: trainer("DPO", tmp_path, base(), lora(library, lora_dropout=0.5)))


def trained_before(base, folder, **kwargs):
    model = fp.get_peft_model(base(), lora(fp, **kwargs))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.1)
    model.save_pretrained(folder)


@pytest.mark.parametrize("kind", ["DPO", "GRPO"])
def test_a_trained_adapter_is_its_own_reference(tmp_path, base, kind):
    trained_before(base, tmp_path / "adapter")
    made = {}

    def train(library):
        model = library.PeftModel.from_pretrained(base(), str(tmp_path / "adapter"), is_trainable=True)
        made[library] = trainer(kind, tmp_path / library.__name__, model)
        return made[library]

    check_alike(train)
    model = made[fp].model
    assert list(model.peft_config) == ["default", "ref"] and model.active_adapters == ["default"]
    kept = fp.get_peft_model_state_dict(model, adapter_name="ref")
    before = fp.hub.files.load_safetensors(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(kept[name], before[name]) for name in before)
    check_checkpoint(tmp_path / "pyfastpeft" / "checkpoint-3", base, made[fp])


@pytest.mark.parametrize(
    "method",
    [peft.PromptEncoderConfig, partial(peft.PrefixTuningConfig, prefix_projection=True)],
    ids=["ptuning", "prefix"],
)
def test_a_soft_prompt_without_its_encoder_is_its_own_reference(tmp_path, base, method):
    made = method(num_virtual_tokens=4, encoder_hidden_size=8, task_type="CAUSAL_LM")
    peft.get_peft_model(base(), made).save_pretrained(tmp_path / "adapter")
    model = fp.PeftModel.from_pretrained(base(), tmp_path / "adapter", is_trainable=True)
    loss = losses(trainer("DPO", tmp_path, model))[0]
    assert list(model.peft_config) == ["default", "ref"] and loss == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("kwargs", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_a_teacher_that_follows_the_adapter(tmp_path, base, kwargs):
    sdft = pytest.importorskip("trl.experimental.sdft")
    trained_before(base, tmp_path / "adapter", **kwargs)
    rows = [{"prompt": pair["prompt"], "privileged_context": pair["chosen"]} for pair in PAIRS]

    def train(library):
        model = library.PeftModel.from_pretrained(base(), str(tmp_path / "adapter"), is_trainable=True)
        settings = {"teacher_model_kind": "ema", "teacher_update_rate": 0.5, "teacher_sync_steps": 1}
        settings |= {"max_completion_length": 6, "num_generations": 4, "distillation_topk": 20}
        return trainer("SDFT", tmp_path, model, None, rows, module=sdft, **settings)

    check_alike(train)


def test_grpo_with_a_config(tmp_path, base):
    check_alike(lambda library: trainer("GRPO", tmp_path, base(), lora(library)))


@pytest.mark.parametrize("method", ["PromptTuningConfig", "PrefixTuningConfig"])
@pytest.mark.parametrize("rows", [TEXTS, COMPLETIONS])
def test_sft_of_soft_prompts(tmp_path, base, method, rows):
    def train(library):
        made = trainer(
            "SFT",
            tmp_path,
            base(),
            getattr(library, method)(task_type="CAUSAL_LM", num_virtual_tokens=4),
            rows,
            gradient_checkpointing=False,  # peft's prefixes fail with it
        )
        torch.manual_seed(7)
        torch.nn.init.normal_(made.model.prompt_encoder["default"].embedding.weight)
        return made

    check_alike(train)


def test_what_trl_refuses_of_peft_it_refuses_of_ours(tmp_path, base):
    with pytest.raises(ValueError, match="adapter to `lm_head` is not supported"):
        trainer("SFT", tmp_path, base(), lora(fp, target_modules=["lm_head"]))
    with pytest.raises(ValueError, match="PeftModel` instance together with a `peft_config`"):
        trainer("SFT", tmp_path, fp.get_peft_model(base(), lora(fp)), lora(fp))
    with pytest.raises(TypeError, match="`peft_config` must be"):
        trainer("SFT", tmp_path, base(), {"r": 4})


def test_names_of_a_module_mean_both_libraries_and_only_those_that_it_has(monkeypatch):
    from accelerate.utils import is_peft_model

    own = lambda model: "trl's own"  # noqa: E731
    module = types.ModuleType("trl.some")
    module.PeftConfig, module.PeftModel, module.is_peft_model = peft.PeftConfig, peft.PeftModel, is_peft_model
    module.get_peft_model = own
    teach_trl(module)
    once = dict(vars(module))
    teach_trl(module)
    assert vars(module) == once and module.get_peft_model is own and not hasattr(module, "BaseTunerLayer")
    for library in (peft, fp):
        model = library.get_peft_model(tiny_llama(), lora(library))
        assert isinstance(lora(library), module.PeftConfig) and isinstance(model, module.PeftModel)
        assert module.is_peft_model(model) and not isinstance(model, module.PeftConfig)
    assert not isinstance({}, module.PeftConfig) and not module.is_peft_model(tiny_llama())
    assert issubclass(module.PeftConfig, peft.PeftConfig) and not is_peft_model(model)
    monkeypatch.setattr("transformers.utils.is_peft_available", lambda: False)
    with pytest.raises(ImportError, match="pip install peft"):
        module.is_peft_model(model)
