"""What a model with adapters keeps from one call to the next is never what was: after training steps, interruptions,
other adapters' coming and going, casts and a user's own changes."""

from __future__ import annotations

import copy
import json
import sys
import threading
from functools import partial

import architectures as tiny
import peft
import pytest
import torch
import transformers as tf
from architectures import relative
from torch import nn

import pyfastpeft as fp
from pyfastpeft import peft_model
from pyfastpeft.adapters import AdapterBank
from pyfastpeft.caching import registered
from pyfastpeft.nn.lora import LoraLinear
from pyfastpeft.nn.modes import evaluating
from pyfastpeft.tuners.adapted import AdaptedModel

SOFT = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4}
LORA = {"task_type": "CAUSAL_LM", "init_lora_weights": False}


def adapted(config, name="default", base=None):
    return fp.get_peft_model(tiny.make() if base is None else base, config, name)


def logits(model, ids, **kwargs):
    with torch.no_grad():
        return model(ids, **kwargs).logits


def copied(model, dtype=torch.float32):
    """A model with the same values, in which nothing was kept."""
    fresh = adapted(model.peft_config["default"], base=tiny.make(dtype=dtype))
    fresh.load_state_dict(model.state_dict())
    return fresh.eval()


class TestAfterOptimizerSteps:
    @pytest.mark.parametrize(
        ("optimizer", "rate", "compiled"),
        [(torch.optim.AdamW, 0.1, False), (torch.optim.SGD, 3.0, False), (torch.optim.AdamW, 0.1, True)],
    )
    @pytest.mark.parametrize(
        "config",
        [
            fp.PromptTuningConfig(**SOFT),
            fp.PrefixTuningConfig(**SOFT),
            fp.LoraConfig(r=4, use_dora=True, **LORA),
        ],
    )
    def test_an_evaluation_sees_what_a_fused_optimizer_wrote(self, config, optimizer, rate, compiled):
        ids = tiny.inputs()["input_ids"]
        model = adapted(config)
        model.set_adapter("default", inference_mode=True)
        before = logits(model.eval(), ids)
        model.set_requires_grad("default")  # which a user may do to one that was loaded for inference
        steps = optimizer([p for p in model.parameters() if p.requires_grad], lr=rate, fused=True)
        step = torch.compile(lambda: steps.step(), backend="eager") if compiled else steps.step
        for _ in range(3):
            model(ids, labels=ids).loss.backward()
            step()
            steps.zero_grad()
        after = logits(model, ids)
        assert relative(after, before) > 1e-3
        assert relative(after, logits(copied(model), ids)) < 1e-6

    @pytest.mark.parametrize("rows", [False, True])
    @pytest.mark.parametrize(("dora", "dtype"), [(True, torch.float32), (False, torch.bfloat16)])
    def test_what_was_kept_for_inference_is_gone_once_an_adapter_has_trained(self, dora, dtype, rows):
        ids = torch.randint(
            1, tiny.VOCAB, (2, 6)
        )  # few: they are decoded as one operator, which packs adapters in bf16
        config = fp.LoraConfig(r=4, use_dora=dora, target_modules=["q_proj", "down_proj"], **LORA)
        model = adapted(config, base=tiny.make(dtype=dtype)).eval()
        kwargs = {"adapter_names": ["default"] * 2} if rows else {}

        def answer(model):
            return logits(model, ids, past_key_values=tf.DynamicCache(config=model.config), **kwargs).float()

        model.set_adapter("default", inference_mode=True)
        before = answer(model)
        model.set_adapter("default", inference_mode=False)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.mul_(8)  # as optimizers of other libraries do: it leaves no trace
        model.set_adapter("default", inference_mode=True)
        after, fresh = answer(model), copied(model, dtype)
        fresh.set_adapter("default", inference_mode=True)
        assert relative(after, before) > 1e-3
        assert relative(after, answer(fresh)) < 1e-6

    def test_doras_norm_is_that_of_the_weight_that_is_there(self):
        layer = adapted(fp.LoraConfig(use_dora=True, target_modules=["q_proj"])).get_submodule(
            "base_model.model.model.layers.0.self_attn.q_proj"
        )
        for value in (1.0, 5.0, 25.0):
            layer.base_layer.weight = None  # so that the next may lie where this one lay
            layer.base_layer.weight = nn.Parameter(torch.full((32, 32), value), requires_grad=False)
            assert torch.allclose(layer.norm("default"), torch.tensor(value * 32**0.5))

    @pytest.mark.parametrize("target", ["q_proj", "embed_tokens"])
    def test_a_call_under_autocast_leaves_doras_norm_in_float32(self, target):
        ids = tiny.inputs()["input_ids"]
        model = adapted(fp.LoraConfig(use_dora=True, target_modules=[target], **LORA))
        model.set_adapter("default", inference_mode=True)
        fresh = copied(model.eval())
        with torch.autocast("cpu", torch.bfloat16):
            model(ids)
        assert torch.equal(logits(model, ids), logits(fresh, ids))

    def test_what_is_merged_or_computed_from_weights_under_autocast_is_in_float32(self):
        ids = tiny.inputs()["input_ids"]
        for kwargs in ({}, {"use_dora": True}):
            model = adapted(fp.LoraConfig(**LORA, **kwargs)).eval()
            expected = logits(model, ids)
            with torch.autocast("cpu", torch.bfloat16):
                merged = model.merge_and_unload()
            assert relative(logits(merged, ids), expected) < 1e-5
        for init in ("pissa", "pissa_niter_4", "olora"):
            expected = logits(base := tiny.make(), ids)
            with torch.autocast("cpu", torch.bfloat16):
                model = adapted(fp.LoraConfig(init_lora_weights=init), base=base).eval()
            assert relative(logits(model, ids), expected) < 1e-5

    def test_doras_norm_compiled_under_autocast_is_in_float32(self):
        model = adapted(fp.LoraConfig(use_dora=True, target_modules=["q_proj"], **LORA))
        layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
        expected = layer.norm("default")
        norm = torch.compile(lambda: layer.norm("default"), fullgraph=True, backend="eager")
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(norm(), expected)


class TestWhatTrains:
    @staticmethod
    def frozen_a():
        """LoRA-FA: A stays as it was."""
        model = adapted(fp.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parameter.requires_grad_(False)
        return model

    @staticmethod
    def training(model, name):
        return {n for n, p in model.named_parameters() if p.requires_grad and f".{name}." in n}

    def test_what_a_user_froze_stays_frozen_whatever_comes_and_goes(self, tmp_path):
        model = self.frozen_a()
        expected = self.training(model, "default")
        model.save_pretrained(tmp_path)
        model.add_adapter("other", fp.LoraConfig(target_modules=["q_proj", "v_proj"]))
        assert self.training(model, "default") == expected
        assert not self.training(model, "other")
        model.set_requires_grad("other")
        both = self.training(model, "other")
        model.load_adapter(tmp_path, "third")
        model.load_adapter(tmp_path, "default")
        assert self.training(model, "default") == expected
        assert self.training(model, "other") == both
        model.delete_adapter("third")
        assert self.training(model, "default") == expected
        model.set_adapter("default")
        assert len(self.training(model, "default")) == 2 * len(expected)
        assert not self.training(model, "other")

    def test_the_trainer_goes_on_with_what_a_user_froze(self, tmp_path):
        rows = [{"input_ids": torch.arange(1, 8), "labels": torch.arange(1, 8)}] * 8

        def train(steps, resume):
            model = self.frozen_a()
            before = {n: p.clone() for n, p in model.named_parameters() if "lora_A" in n}
            arguments = tf.TrainingArguments(
                tmp_path, max_steps=steps, save_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True
            )
            tf.Trainer(model, arguments, train_dataset=rows).train(resume_from_checkpoint=resume)
            return before, model

        train(2, None)
        before, model = train(4, True)
        saved = fp.load_peft_weights(tmp_path / "checkpoint-2")
        for name, parameter in model.named_parameters():
            if name in before:
                assert torch.equal(parameter, saved[name.replace(".default", "")])


class TestMerged:
    @pytest.mark.parametrize("config", [{"target_modules": ["embed_tokens"]}, {"trainable_token_indices": [1, 5]}])
    def test_a_cast_reaches_the_weights_that_unmerging_restores(self, config):
        ids = tiny.inputs()["input_ids"]
        model = adapted(fp.LoraConfig(**config, **LORA)).eval()
        tiny.randomize(model)
        model.merge_adapter()
        model.to(torch.bfloat16)
        model.unmerge_adapter()
        weight = model.get_input_embeddings().weight
        assert weight.dtype == torch.bfloat16
        assert logits(model, ids).isfinite().all()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_biases_go_on_to_train_after_a_move_while_merged(self, dtype):
        batch = tiny.inputs("phi")
        model = adapted(fp.LoraConfig(target_modules=["q_proj"], bias="lora_only", **LORA), base=tiny.make("phi"))
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e3)
        held = set(map(id, optimizer.param_groups[0]["params"]))
        model.merge_adapter()
        model.to(dtype)
        model.unmerge_adapter()
        assert {id(p) for p in model.parameters() if p.requires_grad} == held
        layers = [layer for layer in model.modules() if isinstance(layer, LoraLinear)]
        before = [layer.bias.detach().clone() for layer in layers]
        model(**batch).loss.backward()
        optimizer.step()
        assert layers and not any(torch.equal(layer.bias, old) for layer, old in zip(layers, before, strict=True))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("config", [{"target_modules": ["lm_head"]}, {"trainable_token_indices": [1, 5]}])
    def test_a_tied_head_is_tied_after_a_move_while_merged(self, config, dtype):
        base = tiny.make("qwen2")
        weight = base.lm_head.weight
        model = adapted(fp.LoraConfig(**config, **LORA), base=base)
        model.merge_adapter()
        model.to(dtype)
        model.unmerge_adapter()
        assert model.unload() is base
        assert base.lm_head.weight is base.model.embed_tokens.weight is weight and weight.dtype == dtype
        assert base.config.tie_word_embeddings

    def test_base_embeddings_are_written_and_read_without_what_is_merged(self, tmp_path):
        ids = tiny.inputs()["input_ids"]
        base = tiny.make()
        values = {key: t.clone() for key, t in base.state_dict().items()}
        model = adapted(fp.LoraConfig(target_modules=["embed_tokens"], **LORA), base=base).eval()
        expected = logits(model, ids)
        model.merge_adapter()
        model.save_pretrained(tmp_path)
        model.load_adapter(tmp_path, "other")
        assert model.base_model.bank.mergeable[0].merged_adapters == ["default"]
        again = tiny.make()
        again.load_state_dict(values)
        assert relative(logits(fp.PeftModel.from_pretrained(again, tmp_path).eval(), ids), expected) < 1e-6
        assert relative(logits(model, ids), expected) < 1e-6

    def test_other_base_embeddings_unmerge_what_is_merged_before_they_are_written(self, tmp_path):
        ids = tiny.inputs()["input_ids"]
        adapted(fp.LoraConfig(target_modules=["embed_tokens"], **LORA)).save_pretrained(tmp_path)
        model = adapted(fp.LoraConfig(target_modules=["embed_tokens"], **LORA)).eval()
        model.merge_adapter()
        with pytest.warns(UserWarning, match="are merged, and are unmerged as .* has other base embeddings"):
            model.load_adapter(tmp_path, "other")
        assert not model.base_model.bank.mergeable[0].merged_adapters
        stored = fp.load_peft_weights(tmp_path)["base_model.model.model.embed_tokens.base_layer.weight"]
        assert torch.equal(model.get_input_embeddings().base_layer.weight, stored)
        assert logits(model, ids).isfinite().all()

    def test_a_merged_adapter_takes_no_new_values(self, tmp_path):
        model = adapted(fp.LoraConfig(target_modules=["q_proj"], **LORA))
        model.save_pretrained(tmp_path)
        model.merge_adapter()
        with pytest.raises(ValueError, match=r"'default' is merged; call unmerge_adapter\(\) first"):
            model.load_adapter(tmp_path, "default")

    def test_an_adapter_made_active_inside_disable_adapter_is_active_afterwards(self):
        ids = tiny.inputs()["input_ids"]
        model = adapted(fp.LoraConfig(**LORA)).eval()
        model.add_adapter("other", fp.LoraConfig(**LORA))
        expected = logits(model, ids, adapter_names=["other"] * len(ids))
        model.merge_adapter()
        with model.disable_adapter():
            model.set_adapter("other")
        assert relative(logits(model, ids), expected) < 1e-6

    @pytest.mark.parametrize("config", [{"target_modules": ["q_proj"]}, {"trainable_token_indices": [1, 5]}])
    @pytest.mark.parametrize("unload", [fp.PeftModel.unload, fp.PeftModel.merge_and_unload])
    def test_a_model_that_was_unloaded_inside_disable_adapter_stays_as_it_was_handed_out(self, config, unload):
        ids, model = tiny.inputs()["input_ids"], adapted(fp.LoraConfig(**config, **LORA)).eval()
        tiny.randomize(model)
        model.merge_adapter()
        with model.disable_adapter():
            base = unload(model)
            expected = logits(base, ids)
        assert torch.equal(logits(base, ids), expected)

    @pytest.mark.parametrize(
        "merge",
        [
            fp.PeftModel.merge_adapter,
            fp.PeftModel.merge_and_unload,
            lambda model: model.merge_and_unload(dequantize=True, dtype=torch.float64),
        ],
        ids=["merge_adapter", "merge_and_unload", "dequantize"],
    )
    @pytest.mark.parametrize("four_bits", [False, True])
    @pytest.mark.parametrize(
        "config",
        [
            {"target_modules": ["q_proj", "lm_head"]},
            {"target_modules": ["q_proj"], "lora_bias": True, "trainable_token_indices": [1, 5]},
        ],
    )
    def test_what_was_merged_in_inference_mode_can_be_trained_over(self, merge, four_bits, config):
        base = tiny.make("qwen2")
        base = tiny.quantized(base) if four_bits else base
        model = adapted(fp.LoraConfig(**config, **LORA), base=base)
        tiny.randomize(model)
        with torch.inference_mode():
            merge(model)
            with model.disable_adapter():
                pass
        assert not any(t.is_inference() for t in (*base.parameters(), *base.buffers()))
        x = torch.randn(2, 3, base.config.hidden_size, dtype=base.dtype, requires_grad=True)
        base(inputs_embeds=x).logits.sum().backward()
        assert x.grad.isfinite().all()

    def test_an_interrupt_while_disable_adapter_unmerges_leaves_all_merged(self, monkeypatch):
        def interrupt():
            raise KeyboardInterrupt

        ids, model = tiny.inputs()["input_ids"], adapted(fp.LoraConfig(**LORA)).eval()
        model.merge_adapter()
        expected = logits(model, ids)
        monkeypatch.setattr(model.base_model.bank.mergeable[1], "unmerge", interrupt)
        with pytest.raises(KeyboardInterrupt), model.disable_adapter():
            pass
        assert model.get_model_status().merged_adapters == ["default"]
        assert torch.equal(logits(model, ids), expected)

    @pytest.mark.parametrize("four_bits", [False, True])
    @pytest.mark.parametrize("dequantize", [False, True])
    def test_an_interrupt_while_a_weight_is_exchanged_leaves_the_base_as_it_was(
        self, dequantize, four_bits, interrupted
    ):
        ids, base = tiny.inputs()["input_ids"], tiny.make("qwen2").eval()
        base = tiny.quantized(base) if four_bits else base
        clean = logits(base, ids)
        model = adapted(fp.LoraConfig(target_modules=["q_proj", "v_proj"], **LORA), base=base).eval()
        tiny.randomize(model)
        expected = logits(model, ids)
        interrupted(LoraLinear, "exchange")
        with pytest.raises(KeyboardInterrupt):
            model.merge_and_unload(dequantize=True) if dequantize else model.merge_adapter()
        assert not model.get_model_status().merged_adapters
        assert torch.equal(logits(model, ids), expected) and torch.equal(logits(model.unload(), ids), clean)


METHODS = [
    fp.LoraConfig(modules_to_save=["lm_head"], trainable_token_indices=[1], **LORA),
    fp.BottleneckConfig(task_type="CAUSAL_LM"),
    fp.PrefixTuningConfig(**SOFT),
]
"""Of each way into a model."""


def structure(model):
    return [
        (path, type(m), "forward" in vars(m)) for path, m in model.named_modules()
    ], model.config._attn_implementation


class TestWithoutAdaptersAgain:
    @pytest.mark.parametrize("unload", [fp.PeftModel.unload, fp.PeftModel.merge_and_unload])
    def test_an_unloaded_model_has_no_adapters_and_overwrites_none(self, unload, tmp_path):
        ids, model = tiny.inputs()["input_ids"], adapted(fp.LoraConfig(**LORA)).eval()
        tiny.randomize(model)
        expected = logits(model, ids)
        model.save_pretrained(tmp_path)
        state = fp.load_peft_weights(tmp_path)
        base = unload(model)
        assert not model.peft_config and not model.active_adapters and unload(model) is base
        for use in (model.set_adapter, model.delete_adapter, lambda name: model.save_pretrained(tmp_path)):
            with pytest.raises(ValueError, match="there is no adapter"):
                use("default")
        assert fp.load_peft_weights(tmp_path).keys() == state.keys()
        if unload is fp.PeftModel.unload:
            model.load_adapter(tmp_path, "default")
            model.set_adapter("default")
            assert torch.equal(logits(model, ids), expected)
        model.add_adapter("other", fp.LoraConfig(**LORA))
        with pytest.raises(ValueError, match=r"carries the adapters \[.*'other'\]"):
            fp.get_peft_model(base, fp.LoraConfig(**LORA))

    @pytest.mark.parametrize(
        ("config", "said"),
        [({"bias": "all"}, "biases of the base model"), ({"init_lora_weights": "pissa"}, "what init_lora_weights")],
    )
    def test_what_a_deleted_adapter_leaves_in_the_base_model_is_spoken_of(self, config, said, recwarn):
        model = adapted(fp.LoraConfig(**LORA | config), base=tiny.make("opt"))
        model.add_adapter("other", fp.LoraConfig(**LORA))
        recwarn.clear()
        model.delete_adapter("other")
        assert not [w for w in recwarn if said in str(w.message)]
        with pytest.warns(UserWarning, match=said):
            model.delete_adapter("default")


class TestModes:
    """Modules of a model in training that a user has put into evaluation mode, as frozen norms, stay there."""

    @pytest.mark.parametrize(
        "config",
        [
            fp.LoraConfig(**LORA),
            fp.LoraConfig(target_modules=["q_proj"], modules_to_save=["mlp"], **LORA),
            fp.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
            fp.BottleneckConfig(task_type="CAUSAL_LM"),
        ],
    )
    def test_adapters_and_export_leave_each_module_in_its_mode(self, config, tmp_path):
        base = tiny.make().train()
        frozen = [base.model.norm, base.model.layers[1].mlp.act_fn]
        for module in frozen:
            module.eval()
        expected = {path: module.training for path, module in base.named_modules()}
        model = fp.get_peft_model(base, config)
        assert model.training and not any(module.training for module in frozen)
        if config.is_prompt_learning:
            model.export_prefix(tmp_path / "prefix")
        base = model.unload()
        assert {path: module.training for path, module in base.named_modules()} == expected

    def test_evaluation_for_a_while_ends_in_what_a_module_does_where_it_trains_again(self):
        class Layer(torch.nn.Linear):
            def train(self, mode=True):
                self.modes = [*getattr(self, "modes", ()), mode]
                return super().train(mode)

        model = torch.nn.Sequential(Layer(2, 2), torch.nn.Dropout().eval())
        with evaluating(model):
            assert not any(module.training for module in model.modules())
        assert model[0].modes == [False, True] and not model[1].training


class TestErrorsAndInterrupts:
    @pytest.mark.parametrize("where", [(peft_model, "fuse"), (AdaptedModel, "add"), (AdaptedModel, "activate")])
    @pytest.mark.parametrize("way", ["made", "loaded"])
    @pytest.mark.parametrize("accelerated", [False, True])
    @pytest.mark.parametrize("config", METHODS)
    def test_a_first_adapter_that_is_interrupted_leaves_the_base_model(
        self, config, accelerated, way, where, tmp_path, interrupted
    ):
        base, ids = tiny.make(), tiny.inputs()["input_ids"]
        base = fp.accelerate(base) if accelerated else base
        adapted(config).save_pretrained(tmp_path)
        before, expected = structure(base), logits(base.eval(), ids)
        interrupted(*where)
        with pytest.raises(KeyboardInterrupt):
            adapted(config, base=base) if way == "made" else fp.PeftModel.from_pretrained(base, tmp_path)
        assert structure(base) == before and torch.equal(logits(base, ids), expected)
        assert all(p.requires_grad for p in base.parameters())
        assert adapted(config, base=base).active_adapters == ["default"]

    @pytest.mark.parametrize("where", [(peft_model, "fuse"), (AdapterBank, "hold"), (AdaptedModel, "activate")])
    @pytest.mark.parametrize("way", ["made", "loaded"])
    @pytest.mark.parametrize("config", METHODS)
    def test_another_adapter_that_is_interrupted_is_out_again(self, config, way, where, tmp_path, interrupted):
        model, ids = adapted(fp.LoraConfig(target_modules=["v_proj"], **LORA)).eval(), tiny.inputs()["input_ids"]
        adapted(config).save_pretrained(tmp_path)
        before, expected = structure(model), logits(model, ids)
        interrupted(*where)
        with pytest.raises(KeyboardInterrupt):
            model.add_adapter("other", config) if way == "made" else model.load_adapter(tmp_path, "other")
        assert structure(model) == before and torch.equal(logits(model, ids), expected)
        assert list(model.peft_config) == model.active_adapters == ["default"]
        model.load_adapter(tmp_path, "other")
        assert list(model.peft_config) == ["default", "other"]

    @pytest.mark.parametrize("way", ["unloaded", "deleted"])
    def test_a_prompt_whose_training_step_was_interrupted_leaves_nothing_behind(self, way):
        base, ids = tiny.make(), tiny.inputs()["input_ids"]
        model = adapted(fp.PrefixTuningConfig(prefix_projection=True, **SOFT), base=base).train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})

        def interrupt(*_):
            raise KeyboardInterrupt

        handle = base.model.layers[1].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(ids, labels=ids)
        handle.remove()
        if way == "unloaded":
            model = model.unload().train().requires_grad_(True)
        else:
            model.add_adapter("other", fp.LoraConfig(target_modules=["v_proj"], **LORA))
            model.set_adapter("other")
            model.delete_adapter("default")
        for _ in range(2):
            model(ids, labels=ids).loss.backward()

    @pytest.mark.parametrize("amid", [False, True])
    @pytest.mark.parametrize("active", ["default", "other"])
    @pytest.mark.parametrize("method", METHODS)
    def test_an_adapter_whose_deletion_is_interrupted_is_out(self, method, active, amid, interrupted):
        model, ids = adapted(fp.LoraConfig(target_modules=["v_proj"], **LORA)).eval(), tiny.inputs()["input_ids"]
        before, expected = structure(model), logits(model, ids)
        model.add_adapter("other", method)
        model.set_adapter(active)
        interrupted(*((nn.ModuleDict, "__delitem__") if amid else (method.tuner(), "remove")))
        with pytest.raises(KeyboardInterrupt):
            model.delete_adapter("other")
        assert structure(model) == before and torch.equal(logits(model, ids), expected)
        assert list(model.peft_config) == model.active_adapters == ["default"]
        with pytest.raises(ValueError, match="no adapter 'other'"):
            model.set_adapter("other")
        model.add_adapter("other", method)
        model.set_adapter("other")

    @pytest.mark.parametrize(("first", "init"), [(False, False), (True, False), (True, "pissa")])
    @pytest.mark.filterwarnings("error")
    def test_a_warning_that_is_an_error_leaves_nothing_of_the_adapter(self, first, init, tmp_path):
        adapted(fp.LoraConfig(**LORA | {"init_lora_weights": init})).save_pretrained(tmp_path)
        file = tmp_path / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"modules_to_save": ["nowhere"]}))
        model = tiny.make() if first else adapted(fp.LoraConfig(target_modules=["v_proj"], **LORA))
        load = partial(fp.PeftModel.from_pretrained, model) if first else partial(model.load_adapter, adapter_name="b")
        before = structure(model)
        with tiny.unchanged(model), pytest.raises(UserWarning, match="match no module"):
            load(tmp_path)
        assert structure(model) == before

    @pytest.mark.filterwarnings("error")
    def test_adapters_that_could_not_give_way_leave_the_others_configuration(self):
        model = adapted(fp.LoraConfig(**LORA))
        model.add_adapter("other", fp.LoraConfig(**LORA))
        model.merge_adapter()
        with pytest.raises(UserWarning, match="are merged"):
            model.set_adapter("other", inference_mode=True)
        assert model.active_adapters == ["default"] and not model.peft_config["other"].inference_mode

    def test_the_warning_names_all_that_is_unmerged(self):
        model = adapted(fp.LoraConfig(target_modules=["q_proj"], **LORA))
        model.add_adapter("other", fp.LoraConfig(target_modules=["v_proj"], **LORA))
        model.merge_adapter(["default", "other"])
        with pytest.warns(UserWarning, match=r"\['default', 'other'\] are merged, and are unmerged"):
            model.set_adapter("other")


class TestFilesBesideOtherAdapters:
    @pytest.mark.parametrize("other", [{"target_modules": ["v_proj"]}, {"modules_to_save": ["lm_head"]}])
    def test_biases_have_the_keys_of_their_adapter_alone(self, other, tmp_path):
        base = tiny.make("phi")
        model = fp.get_peft_model(base, fp.LoraConfig(target_modules=["q_proj"], bias="all"), "a")
        model.save_pretrained(tmp_path / "alone")
        alone = fp.load_peft_weights(tmp_path / "alone" / "a")
        model.add_adapter("b", fp.LoraConfig(**{"target_modules": ["k_proj"]} | other))
        model.save_pretrained(tmp_path / "both")
        both = fp.load_peft_weights(tmp_path / "both" / "a")
        assert both.keys() == alone.keys()
        assert all(torch.equal(both[key], t) for key, t in alone.items())
        # And where the other one is there first.
        second = fp.PeftModel.from_pretrained(tiny.make("phi"), tmp_path / "both" / "b", "b")
        second.load_adapter(tmp_path / "alone" / "a", "a")
        for key, t in fp.get_peft_model_state_dict(second, adapter_name="a").items():
            assert torch.equal(t, alone[key]), key

    @pytest.mark.parametrize(
        "other",
        [{"modules_to_save": ["lm_head"]}, {"target_modules": ["embed_tokens"]}, {"trainable_token_indices": [1]}],
    )
    def test_embeddings_have_the_keys_of_their_adapter_alone_and_all_of_pefts_are_read(self, other, tmp_path):
        settings = {"task_type": "CAUSAL_LM"}
        first = {"target_modules": ["q_proj"], **settings}
        other = {"target_modules": ["v_proj"], **settings} | other
        folders = {}
        for library in (fp,) if "trainable_token_indices" in other else (fp, peft):  # PEFT cannot save that
            torch.manual_seed(0)
            model = library.get_peft_model(tiny.make(), library.LoraConfig(**first), "a")
            model.add_adapter("b", library.LoraConfig(**other))
            folder = tmp_path / library.__name__
            model.save_pretrained(folder, save_embedding_layers=True)
            folders[library] = folder / "a"
            loaded = fp.PeftModel.from_pretrained(tiny.make(), folder / "a")
            embedding = next(t for key, t in fp.load_peft_weights(folder / "a").items() if "embed_tokens" in key)
            assert torch.equal(loaded.get_input_embeddings().weight, embedding)
        keys = fp.load_peft_weights(folders[fp]).keys()
        assert not any("base_layer" in key or "original_module" in key for key in keys)


def test_what_a_user_put_in_the_place_of_an_adapted_layer_stays(tmp_path):
    ids = tiny.inputs()["input_ids"]
    model = adapted(fp.LoraConfig(target_modules=["q_proj", "v_proj"], **LORA)).eval()
    attention = model.get_base_model().model.layers[0].self_attn
    attention.q_proj = own = nn.Linear(32, 32, bias=False)
    expected = logits(model, ids)
    model.save_pretrained(tmp_path)
    assert not any("layers.0.self_attn.q_proj" in key for key in fp.load_peft_weights(tmp_path))
    merged = model.merge_and_unload()
    assert attention.q_proj is own
    assert relative(logits(merged, ids), expected) < 1e-5


@pytest.mark.parametrize(
    ("config", "path"),
    [({"modules_to_save": ["lm_head"]}, "lm_head"), ({"trainable_token_indices": [1]}, "model.embed_tokens")],
)
def test_what_a_user_put_in_the_place_of_a_module_that_trains_stays(config, path):
    model = adapted(fp.LoraConfig(target_modules=["q_proj"], **config, **LORA))
    base = model.get_base_model()
    own = nn.Linear(32, tiny.VOCAB, bias=False) if path == "lm_head" else nn.Embedding(tiny.VOCAB, 32)
    base.set_submodule(path, own)
    model.add_adapter("other", fp.LoraConfig(target_modules=["q_proj"]))
    model.delete_adapter("default")
    assert base.get_submodule(path) is own
    assert model.unload().get_submodule(path) is own


class TestServing:
    @pytest.mark.parametrize("config", [fp.PromptTuningConfig(**SOFT), fp.PrefixTuningConfig(**SOFT)])
    @pytest.mark.parametrize("architecture", ["llama", "t5"])
    def test_a_forward_that_is_interrupted_leaves_no_prefix_behind(self, config, architecture):
        base = tiny.make(architecture)
        batch = tiny.inputs(architecture)
        with torch.no_grad():
            expected = base(**batch).logits
        config = type(config)(num_virtual_tokens=4, task_type=tiny.TASKS[architecture])
        model = fp.get_peft_model(base, config).eval()
        last = [m for m in base.modules() if "Attention" in type(m).__name__][-1]

        def interrupt(*_):
            raise KeyboardInterrupt

        handle = last.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt), torch.no_grad():
            model(**batch)
        handle.remove()
        with torch.no_grad(), model.disable_adapter():
            assert relative(model(**batch).logits, expected) < 1e-6

    def test_rows_do_not_choose_in_a_layer_that_sees_no_rows(self):
        config = tf.DebertaV2Config(
            vocab_size=tiny.VOCAB,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=4,
            relative_attention=True,
            pos_att_type=["p2c", "c2p"],
            share_att_key=True,
            position_buckets=8,
            max_relative_positions=16,
        )
        lora = {"r": 2, "task_type": "SEQ_CLS", "init_lora_weights": False}
        model = adapted(fp.LoraConfig(**lora), "a", tf.DebertaV2ForSequenceClassification(config)).eval()
        model.add_adapter("b", fp.LoraConfig(**lora))
        ids = torch.randint(1, tiny.VOCAB, (4, 10))
        with pytest.raises(ValueError, match=r"a layer saw an input of shape \(1, 16, 32\)"):
            logits(model, ids, adapter_names=["a", "b", "__base__", "b"])
        alike = logits(model, ids, adapter_names=["b"] * 4)
        model.set_adapter("b")
        assert relative(alike, logits(model, ids)) < 1e-6

    def test_requests_of_both_sides_of_a_usual_length_are_served_in_turn(self):
        rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4}
        rope |= {"long_factor": [4.0, 8.0, 3.0, 2.0], "original_max_position_embeddings": 32}
        shape = {"vocab_size": tiny.VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
        config = tf.Phi3Config(
            **shape,
            num_hidden_layers=2,
            pad_token_id=0,
            max_position_embeddings=256,
            original_max_position_embeddings=32,
            rope_parameters=rope,
            initializer_range=0.2,
        )
        model = adapted(fp.PromptTuningConfig(inference_mode=True, **SOFT), base=tf.Phi3ForCausalLM(config)).eval()
        long, short, token = (torch.randint(1, tiny.VOCAB, (1, n)) for n in (50, 8, 1))

        def goes_on(ids, between=None):
            cache = tf.DynamicCache(config=model.config)
            logits(model, ids, past_key_values=cache)
            if between is not None:
                logits(model, between)
            return logits(model, token, past_key_values=cache)

        assert torch.equal(goes_on(short, long), goes_on(short))
        assert torch.equal(goes_on(long, short), goes_on(long))

    @pytest.mark.parametrize("several", [False, True])
    def test_a_write_to_an_adapter_is_seen_while_a_cache_goes_on(self, several):
        lora = {"r": 2, "target_modules": "all-linear", "inference_mode": True, **LORA}
        model = adapted(fp.LoraConfig(**lora), base=tiny.make(dtype=torch.bfloat16)).eval()
        if several:
            model.add_adapter("other", fp.LoraConfig(**lora))
            model.set_adapter(["default", "other"])
        ids, token = torch.randint(1, tiny.VOCAB, (1, 6)), torch.tensor([[3]])

        def second(look):
            cache = tf.DynamicCache(config=model.config)
            for part in (ids, token):
                logits(model, part, past_key_values=cache)
            with torch.no_grad():
                written = {n: p for n, p in model.named_parameters() if "lora_B" in n}
                for parameter in written.values():
                    parameter.mul_(8)
                if look:
                    model.base_model.bank.forget()
                answer = logits(model, token, past_key_values=cache)
                for parameter in written.values():
                    parameter.mul_(1 / 8)
            return answer

        assert torch.equal(second(look=False), second(look=True))

    @pytest.mark.parametrize("config", [fp.LoraConfig(**LORA), fp.PromptTuningConfig(**SOFT)], ids=["lora", "prompt"])
    @pytest.mark.parametrize("beside", ["a", "b", None], ids=["alone", "with_rows", "beams"])
    @pytest.mark.parametrize("anew", [False, True], ids=["", "and_loaded_anew"])
    def test_a_request_whose_adapter_is_deleted_says_so(self, anew, beside, config):
        model = adapted(fp.LoraConfig(**LORA), "a").eval()
        model.add_adapter("b", copy.deepcopy(config))
        ids, deleted = torch.randint(1, tiny.VOCAB, (1, 6)), []

        def delete():
            model.delete_adapter("b")
            if anew:
                model.add_adapter("b", copy.deepcopy(config))

        class Delete(tf.LogitsProcessor):
            def __call__(self, ids, scores):
                if not deleted:
                    deleted.append("b")
                    thread = threading.Thread(target=delete)
                    thread.start()
                    thread.join()
                return scores

        names, beams = (["b"], 2) if beside is None else (["b", beside], 1)
        with pytest.raises(RuntimeError, match=r"adapters \['b'\] were deleted while a request"):
            model.generate(
                ids.expand(len(names), -1), adapter_names=names, num_beams=beams, min_new_tokens=4, max_new_tokens=4,
                logits_processor=[Delete()],
            )  # fmt: skip
        if not anew:
            model.add_adapter("b", config)
        logits(model, ids, adapter_names=["b"])

    def test_a_request_goes_on_where_other_adapters_come_and_go(self):
        model = adapted(fp.LoraConfig(**LORA), "a").eval()
        model.add_adapter("b", fp.LoraConfig(**LORA))
        tiny.randomize(model)
        ids, told = torch.randint(1, tiny.VOCAB, (1, 6)), {"min_new_tokens": 4, "max_new_tokens": 4}

        class Exchange(tf.LogitsProcessor):
            def __call__(self, ids, scores):
                model.delete_adapter("b")
                model.add_adapter("b", fp.LoraConfig(**LORA))
                return scores

        expected = model.generate(ids, adapter_names=["a"], **told)
        assert torch.equal(model.generate(ids, adapter_names=["a"], logits_processor=[Exchange()], **told), expected)

    def test_adapters_come_and_go_while_a_prompt_is_served(self):
        interval = sys.getswitchinterval()
        model = adapted(fp.PromptTuningConfig(inference_mode=True, **SOFT), "prompt").eval()
        ids, stop, failed = torch.randint(1, tiny.VOCAB, (1, 6)), threading.Event(), []

        def serve():
            while not stop.is_set():
                try:
                    logits(model, ids, adapter_names=["prompt"])
                except Exception as error:
                    failed.append(error)

        thread = threading.Thread(target=serve)
        sys.setswitchinterval(1e-5)
        try:
            thread.start()
            for i in range(10):
                model.add_adapter(f"n{i}", fp.LoraConfig(target_modules="all-linear", **LORA))
                model.delete_adapter(f"n{i}")
        finally:
            stop.set()
            thread.join()
            sys.setswitchinterval(interval)
        assert not failed

    def test_what_is_made_in_inference_mode_serves_where_something_trains(self):
        ids = torch.randint(1, tiny.VOCAB, (1, 6))
        model = adapted(fp.LoraConfig(inference_mode=True, **LORA), "a").eval()
        model.add_adapter("b", fp.LoraConfig(inference_mode=True, **LORA))
        model.add_adapter("c", fp.PrefixTuningConfig(**SOFT))
        model.set_adapter(["a", "b", "c"])
        with torch.inference_mode():
            model(ids)
        model(ids, labels=ids).loss.backward()
        assert any(p.grad is not None for p in model.parameters())


class _NamedByValue(nn.Module):
    """Whose hash is of what it does not have yet when its first layer comes into it."""

    def __init__(self, name):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.name = name

    def __eq__(self, other):
        return self.name == other.name

    def __hash__(self):
        return hash(self.name)


def test_modules_of_any_hash_can_be_made_beside_an_adapted_model():
    model = adapted(fp.LoraConfig(**LORA))
    logits(model, tiny.inputs()["input_ids"])  # from now on what is registered anywhere counts
    before = registered()
    first, second = _NamedByValue("a"), _NamedByValue("a")
    assert first == second and registered() == before + 4  # both, and a layer in each
    del first, second
    assert registered() == before + 4


def test_factors_that_are_computed_take_no_values():
    model = adapted(fp.LoraConfig(target_modules=["q_proj"], **LORA))
    state = {key: t.clone() for key, t in fp.get_peft_model_state_dict(model).items()}
    model.hotswap_adapter(state)
    layer = model.base_model.model.model.layers[1].self_attn.q_proj
    nn.utils.parametrizations.weight_norm(layer.lora_A["default"])
    for fill in (fp.set_peft_model_state_dict, fp.PeftModel.hotswap_adapter):
        with pytest.raises(ValueError, match=r"layers.1.self_attn.q_proj.lora_A.weight is computed from other param"):
            fill(model, state)
