"""Adapters change while a model serves: values in place, nothing rebuilt, nothing recompiled, the base untouched."""

from __future__ import annotations

import copy
import gc
import re
import weakref
from functools import partial

import architectures as tiny
import peft
import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import pyfastpeft as fp
from pyfastpeft.adapters import AdapterBank
from pyfastpeft.tuners import lora_swap

pytestmark = pytest.mark.filterwarnings("ignore")


def serving(*configs, four_bits=True):
    """A model with adapters "default", "1", "2", … of random values, each for inference."""
    base = tiny.make()
    model = fp.get_peft_model(tiny.quantized(base) if four_bits else base, configs[0])
    for i, config in enumerate(configs[1:], 1):
        model.add_adapter(str(i), config)
    tiny.randomize(model)
    for name in model.peft_config:
        model.set_adapter(name, inference_mode=True)
    model.set_adapter("default")
    return model.eval()


def snapshot(model):
    """Identities of all modules and parameters, and the bits of the base weights."""
    base = {n: t.clone() for n, t in model.state_dict().items() if "lora_" not in n}
    return [id(m) for m in model.modules()], [id(p) for p in model.parameters()], base


def assert_untouched(model, before):
    modules, parameters, base = before
    assert [id(m) for m in model.modules()] == modules
    assert [id(p) for p in model.parameters()] == parameters
    now = {n: t for n, t in model.state_dict().items() if "lora_" not in n}
    assert now.keys() == base.keys()
    assert all(torch.equal(t.view(torch.uint8), base[n].view(torch.uint8)) for n, t in now.items() if t.dim())


def tensors_of(model, name):
    return {k: t.clone() for k, t in fp.get_peft_model_state_dict(model, adapter_name=name).items()}


ALL = {"target_modules": "all-linear"}
PROMPT = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}


def test_the_packed_copy_of_an_adapter_follows_its_values():
    model = serving(fp.LoraConfig(**ALL)).bfloat16()
    batch, name = tiny.inputs(), "default"

    def logits(model=model):
        with torch.no_grad():
            return model(**batch).logits

    def packed(model=model):
        layers = [m for m in model.modules() if isinstance(m, fp.nn.LoraLinear)]
        return [m._cache.get((name,), ("packed", (name,)))[1] for m in layers]

    first = logits()
    held, layer = packed(), next(m for m in model.modules() if isinstance(m, fp.nn.LoraLinear))
    twin = copy.deepcopy(model)
    state = tensors_of(model, name)
    model.hotswap_adapter({k: -2 * t for k, t in state.items()}, name)
    second = logits()
    assert not torch.equal(first, second) and torch.equal(first, logits(twin))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_() if parameter.dim() == 2 and parameter.is_floating_point() else None
    assert not torch.equal(second, logits())
    model.hotswap_adapter(state, name)
    assert torch.equal(first, logits())
    twin.hotswap_adapter({k: -2 * t for k, t in state.items()}, name)
    assert torch.equal(second, logits(twin)) and torch.equal(first, logits())
    for before, now in zip(held, packed(), strict=True):  # into the memory that was there
        assert now.handle is before.handle and now.a_pairs is before.a_pairs and now.b_pairs is before.b_pairs


@pytest.mark.parametrize("four_bits", [False, True])
@pytest.mark.parametrize("kwargs", [{}, {"use_dora": True}, {"lora_bias": True}], ids=["plain", "dora", "bias"])
def test_an_adapter_swapped_in_serves_as_if_it_had_been_loaded(four_bits, kwargs, tmp_path):
    model = serving(fp.LoraConfig(**ALL, **kwargs), fp.LoraConfig(**ALL, **kwargs, lora_alpha=20), four_bits=four_bits)
    batch = tiny.inputs()
    model.set_adapter("1")
    expected = model(**batch).logits
    model.set_adapter("default")
    assert not torch.equal(model(**batch).logits, expected)
    model.save_pretrained(tmp_path, selected_adapters=["1"])
    before = snapshot(model)
    model.hotswap_adapter(tmp_path / "1", "default")
    assert_untouched(model, before)
    assert torch.equal(model(**batch).logits, expected)
    assert model.peft_config["default"].lora_alpha == 20
    layer = next(m for m in model.modules() if isinstance(m, fp.nn.LoraLinear))
    layer.scale_layer(3)
    layer.unscale_layer()
    assert layer.scaling["default"] == 20 / 8
    new = fp.LoraConfig(**ALL, **kwargs, lora_alpha=20, revision="new")  # the same form: values are copied alone
    model.hotswap_adapter(tensors_of(model, "1"), "default", new)
    assert (model.peft_config["default"].revision, model.peft_config["default"].inference_mode) == ("new", True)


def test_tensors_in_memory_swap_in_and_stay_the_callers_own():
    model = serving(fp.LoraConfig(**ALL), fp.LoraConfig(**ALL))
    batch = tiny.inputs()
    new = tensors_of(model, "1")
    kept = {k: t.clone() for k, t in new.items()}
    model.set_adapter("1")
    expected = model(**batch).logits
    model.set_adapter("default")
    model.hotswap_adapter(new)
    assert torch.equal(model(**batch).logits, expected)
    tiny.randomize(model)
    assert all(torch.equal(new[k], kept[k]) for k in new)


def test_a_new_adapter_does_not_have_the_scaling_that_was_set_for_the_old_one():
    model = serving(fp.LoraConfig(**ALL), fp.LoraConfig(**ALL))
    batch, new = tiny.inputs(), tensors_of(model, "1")
    model.set_adapter("1")
    expected = model(**batch).logits
    model.set_adapter("default")
    model.hotswap_adapter(new)  # the fast way is known from now on
    for config in (None, model.peft_config["1"]):
        for module in model.modules():
            if isinstance(module, fp.nn.LoraLinear):
                module.set_scale("default", 3)
        assert not torch.equal(model(**batch).logits, expected)
        model.hotswap_adapter(new, config=config)
        assert torch.equal(model(**batch).logits, expected)


@pytest.mark.parametrize(
    ("old", "new", "keys", "where"),
    [
        (fp.LoraConfig(**ALL), fp.LoraConfig(**ALL | {"lora_alpha": 40}), ["lora_alpha"], (AdapterBank, "refresh")),
        (fp.LoraConfig(**ALL), fp.LoraConfig(**ALL | {"r": 3}), ["r"], (lora_swap, "copy_tensors")),
        (
            fp.PromptTuningConfig(**PROMPT),
            fp.PromptTuningConfig(**PROMPT | {"num_virtual_tokens": 5}),
            ["num_virtual_tokens"],
            (AdapterBank, "forget"),
        ),
    ],
    ids=["scaling", "rank", "prompt"],
)
def test_an_interrupted_swap_leaves_no_half_of_either_adapter(old, new, keys, where, tmp_path, interrupted):
    model = serving(old, new)
    batch = tiny.inputs()
    model.save_pretrained(tmp_path)
    model.set_adapter("1")
    expected = model(**batch).logits
    model.set_adapter("default")
    interrupted(*where)
    with pytest.raises(KeyboardInterrupt):
        model.hotswap_adapter(tmp_path / "1")
    assert torch.equal(model(**batch).logits, expected)
    assert all(getattr(model.peft_config["default"], key) == getattr(new, key) for key in keys)
    model.save_pretrained(tmp_path / "again", selected_adapters=["default"])
    again = fp.PeftModel.from_pretrained(model.unload(), tmp_path / "again")
    assert torch.equal(again(**batch).logits, expected)


@pytest.mark.parametrize("use_dora", [False, True])
def test_a_smaller_rank_and_fewer_modules_swap_in_and_out_again(use_dora, tmp_path):
    small = fp.LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj", "down_proj"], use_dora=use_dora, use_rslora=True)
    model = serving(fp.LoraConfig(**ALL, use_dora=use_dora), small)
    batch = tiny.inputs()
    first = model(**batch).logits
    original = tensors_of(model, "default")
    model.set_adapter("1")
    expected = model(**batch).logits
    model.set_adapter("default")
    model.save_pretrained(tmp_path, selected_adapters=["1"])
    before = snapshot(model)
    config = model.peft_config["default"]
    model.hotswap_adapter(tmp_path / "1")
    assert_untouched(model, before)
    torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-4, atol=1e-5)
    a, b = model.get_base_model().model.layers[0].self_attn.q_proj.factors("default")
    assert a[:3].all() and not a[3:].any() and not b[:, 3:].any()
    saved = tensors_of(model, "default")
    new = tensors_of(model, "1")
    assert saved.keys() == new.keys()
    assert all(torch.equal(saved[k], new[k]) for k in new)
    model.save_pretrained(tmp_path / "again", selected_adapters=["default"])
    again = fp.PeftModel.from_pretrained(model.unload(), tmp_path / "again")
    torch.testing.assert_close(again(**batch).logits, expected, rtol=1e-4, atol=1e-5)

    model = fp.PeftModel.from_pretrained(again.unload(), tmp_path / "again", config=None)
    model.add_adapter("big", fp.LoraConfig(**ALL, use_dora=use_dora))
    model.hotswap_adapter(original, "big", config)
    model.set_adapter("big")
    torch.testing.assert_close(model(**batch).logits, first, rtol=1e-4, atol=1e-5)


def test_fewer_modules_are_saved_as_they_are_where_others_end_as_one_of_them(tmp_path):
    """A path without a dot, as of diffusers' Flux, is also how others end."""
    base = nn.ModuleDict({"block": nn.ModuleDict({"out": nn.Linear(4, 4)}), "out": nn.Linear(4, 4)})
    model = fp.get_peft_model(copy.deepcopy(base), fp.LoraConfig(target_modules=["out"]))
    only = {key: torch.randn_like(t) for key, t in tensors_of(model, "default").items() if "block" not in key}
    model.hotswap_adapter(only)
    model.save_pretrained(tmp_path)
    x = torch.randn(3, 4)
    expected = model.base_model.model["out"](x)
    for library in (fp, peft):
        again = library.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).base_model.model
        torch.testing.assert_close(again["out"](x), expected, rtol=1e-5, atol=1e-6)
        assert type(again["block"]["out"]) is nn.Linear


@pytest.mark.parametrize(
    "narrow", [None, {"layers_to_transform": [0]}, {"exclude_modules": r".*\.1\..*"}, {"target_modules": ["q_proj"]}]
)
def test_a_swap_back_from_fewer_modules_is_saved_whole(narrow, tmp_path):
    wide = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
    config = None if narrow is None else fp.LoraConfig(**wide | narrow)
    model = serving(fp.LoraConfig(**wide), config or fp.LoraConfig(**wide), four_bits=False)
    batch, whole = tiny.inputs(), tensors_of(model, "default")
    expected = model(**batch).logits
    few = tensors_of(model, "1")
    model.hotswap_adapter(dict(list(few.items())[:2]) if narrow is None else few, config=config)
    model.hotswap_adapter(whole)
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    base = model.unload()
    for library in (fp, peft):
        again = library.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
        torch.testing.assert_close(again(**batch).logits, expected, rtol=1e-4, atol=1e-5)


def test_tensors_of_several_ranks_are_swapped_in_and_saved_with_them(tmp_path):
    wide = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
    model = serving(fp.LoraConfig(**wide), fp.LoraConfig(**wide | {"rank_pattern": {r".*0\..*q_proj": 2}}))
    assert {t.shape[0] for key, t in tensors_of(model, "1").items() if "lora_A" in key} == {2, 4}
    batch, base = tiny.inputs(), copy.deepcopy(model).unload()
    swapped_in = tensors_of(model, "1")
    model.set_adapter("1")
    expected = model(**batch).logits
    model.set_adapter("default")
    model.hotswap_adapter(swapped_in)
    torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    again = fp.PeftModel.from_pretrained(base, tmp_path).eval()
    assert again.peft_config["default"].rank_pattern and torch.equal(again(**batch).logits, expected)
    saved = tensors_of(again, "default")
    assert saved.keys() == swapped_in.keys() and all(torch.equal(t, swapped_in[key]) for key, t in saved.items())


@pytest.mark.parametrize("small", [{"target_modules": ["q_proj"]}, {"r": 2}])
def test_an_adapter_that_a_swap_made_smaller_is_not_loaded_over(small, tmp_path):
    """What is loaded would be saved without what the smaller one lacks."""
    wide = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
    model = serving(fp.LoraConfig(**wide), fp.LoraConfig(**wide | small))  # both scale by 2
    model.save_pretrained(tmp_path)
    model.hotswap_adapter(tmp_path / "1")
    before = tensors_of(model, "default")
    with pytest.raises(ValueError, match="has other modules or ranks; use hotswap_adapter"):
        model.load_adapter(tmp_path, "default")
    now = tensors_of(model, "default")
    assert now.keys() == before.keys() and all(torch.equal(now[k], before[k]) for k in now)


def test_a_module_trained_whole_swaps_in_with_a_smaller_rank():
    model = serving(*(fp.LoraConfig(r=r, modules_to_save=["lm_head"]) for r in (8, 4)))
    batch = tiny.inputs()
    model.set_adapter("1")
    expected = model(**batch).logits
    model.set_adapter("default")
    model.hotswap_adapter(tensors_of(model, "1"), config=model.peft_config["1"])
    torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-4, atol=1e-5)


def test_a_swap_back_to_the_full_rank_is_saved_whole():
    model = serving(fp.LoraConfig(r=8, **ALL), fp.LoraConfig(r=4, **ALL))  # both scale by 2
    whole = tensors_of(model, "default")
    model.hotswap_adapter(whole)
    model.hotswap_adapter(tensors_of(model, "1"))
    model.hotswap_adapter(whole)
    saved = tensors_of(model, "default")
    assert all(torch.equal(saved[k], whole[k]) for k in whole)


def test_a_swap_back_to_the_full_rank_is_exact():
    model = serving(fp.LoraConfig(r=8, **ALL), fp.LoraConfig(r=2, **ALL))
    batch = tiny.inputs()
    expected, original, config = model(**batch).logits, tensors_of(model, "default"), model.peft_config["default"]
    before = snapshot(model)
    model.hotswap_adapter(tensors_of(model, "1"))
    assert model.peft_config["default"].r == 2
    assert not torch.equal(model(**batch).logits, expected)
    model.hotswap_adapter(original, config=config)
    assert_untouched(model, before)
    assert torch.equal(model(**batch).logits, expected)
    assert model.peft_config["default"].r == 8


def test_set_adapter_rebuilds_nothing_and_touches_no_weight():
    model = serving(fp.LoraConfig(**ALL), fp.LoraConfig(r=4))
    before = snapshot(model)
    batch = tiny.inputs()
    outputs = {}
    for name in ("default", "1", "default", "1"):
        model.set_adapter(name)
        out = model(**batch).logits
        assert torch.equal(outputs.setdefault(name, out), out)
    assert not torch.equal(outputs["default"], outputs["1"])
    assert_untouched(model, before)


each_kind = pytest.mark.parametrize(
    "kwargs",
    [
        ALL,
        {**ALL, "use_dora": True},
        {**ALL, "lora_bias": True},
        {"target_modules": ["embed_tokens", "q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["embed_tokens"], "use_dora": True},
    ],
    ids=["plain", "dora", "bias", "embedding_and_head", "embedding_dora"],
)


@pytest.mark.parametrize(
    ("four_bits", "dtype"), [(False, torch.float32), (True, torch.float32), (True, torch.bfloat16)], ids=str
)
@each_kind
def test_exchanging_adapters_recompiles_nothing(four_bits, dtype, kwargs):
    model = serving(fp.LoraConfig(**kwargs), fp.LoraConfig(**kwargs, lora_alpha=5), four_bits=four_bits).to(dtype)
    batch = tiny.inputs()
    with torch.no_grad():
        alone = copy.deepcopy(model)
        alone.set_adapter("1")
        expected = {"1": torch.compile(alone, fullgraph=True, backend="eager")(**batch).logits}
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        expected["default"] = compiled(**batch).logits  # as it was compiled
        with torch._dynamo.config.patch(error_on_recompile=True):
            for name in ("1", "default"):
                model.set_adapter(name)
                assert_close(compiled(**batch).logits, expected[name])
            model.hotswap_adapter(tensors_of(model, "1"), "default", model.peft_config["1"])
            assert_close(compiled(**batch).logits, expected["1"])


def captured(model, ids, monkeypatch):
    """(the model's forward, the same as a graph, which holds tensors and numbers as CUDA's do)"""
    length = ids.shape[1]
    mask = torch.full((length, length), -torch.inf).triu(1)[None, None]
    given = {"attention_mask": mask, "position_ids": torch.arange(length)[None], "use_cache": False}

    def run(ids):
        return model(input_ids=ids, **given).logits

    run(ids)
    with monkeypatch.context() as context:
        context.setattr(torch.cuda, "is_initialized", lambda: True)
        context.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        return run, make_fx(run)(ids)


@pytest.mark.parametrize("four_bits", [False, True])
@pytest.mark.parametrize("active", ["default", ["default", "2"]], ids=["one", "two"])
@each_kind
@torch.no_grad()
def test_a_captured_graph_has_what_is_swapped_in_afterwards(monkeypatch, four_bits, active, kwargs):
    configs = [fp.LoraConfig(**kwargs), fp.LoraConfig(**kwargs, lora_alpha=5)]
    beside = fp.LoraConfig(**{k: v for k, v in kwargs.items() if k != "modules_to_save"})  # one can be active
    model, ids = serving(*configs, beside, four_bits=four_bits), tiny.inputs()["input_ids"]
    model.set_adapter(active)
    run, graph = captured(model, ids, monkeypatch)
    before = run(ids)
    close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5)  # other sums than those of the kernels for CPUs
    close(graph(ids), before)
    model.hotswap_adapter(tensors_of(model, "1"), "default", model.peft_config["1"])
    after = run(ids)
    close(graph(ids), after)
    assert not torch.allclose(before, after, rtol=0.01)


@pytest.mark.parametrize("active", ["default", ["default", "2"]], ids=["one", "two"])
@torch.no_grad()
def test_what_a_captured_graph_reads_is_there_when_other_adapters_come_and_go(monkeypatch, active):
    model = serving(*[fp.LoraConfig(**ALL, use_dora=True)] * 3)
    model.set_adapter(active)
    _, graph = captured(model, tiny.inputs()["input_ids"], monkeypatch)
    names = [node.target for node in graph.graph.nodes if node.op == "get_attr"]
    read = [weakref.ref(getattr(graph, name)) for name in names]
    del graph
    model.add_adapter("new", fp.LoraConfig(**ALL))
    model.delete_adapter("1")
    gc.collect()
    assert len(read) > 50 and all(tensor() is not None for tensor in read)


@pytest.mark.parametrize("method", ["dora", "two", "prefix"])
def test_what_was_kept_of_tensors_that_are_gone_serves_no_others_at_their_address(method):
    configs = [fp.LoraConfig(use_dora=method == "dora"), fp.LoraConfig()]
    if method == "prefix":
        configs = [fp.PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")]
    model = serving(*configs[: 2 if method == "two" else 1])
    model.set_adapter(["default", "1"] if method == "two" else "default")
    name = next(n for n, _ in model.named_parameters() if "lora_B.default" in n or "prompt_encoder" in n)
    shape, batch = model.get_parameter(name).shape, tiny.inputs()

    def given(i):
        return torch.linspace(-1, i, shape.numel()).view(shape)

    with torch.no_grad():
        got = [torch.func.functional_call(model, {name: given(i)}, (), batch).logits for i in range(100)]
        for i, logits in enumerate(got):
            model.get_parameter(name).copy_(given(i))
            assert_close(logits, model(**batch).logits)


def assert_close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_an_optimizer_goes_on_with_the_values_that_were_swapped_in():
    model = fp.get_peft_model(tiny.make(), fp.LoraConfig())
    model.add_adapter("other", fp.LoraConfig())
    tiny.randomize(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.hotswap_adapter(tensors_of(model, "other"))
    model(**tiny.inputs()).loss.backward()
    optimizer.step()
    now, other = tensors_of(model, "default"), tensors_of(model, "other")
    assert all(0 < (now[k] - other[k]).norm() < 0.1 * other[k].norm() for k in now)


@pytest.mark.parametrize(
    "config",
    [
        fp.LoraConfig(modules_to_save=["norm"]),
        fp.PrefixTuningConfig(num_virtual_tokens=3, prefix_init="random"),
        fp.BottleneckConfig(bottleneck_size=4),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_a_parameter_that_the_user_put_in_the_place_of_another_is_the_adapters(config):
    model = fp.get_peft_model(tiny.make(), config)
    model.add_adapter("other", config)
    tiny.randomize(model)
    batch, values = tiny.inputs(), tensors_of(model, "default")
    with torch.no_grad():
        expected = model(**batch).logits
    model.hotswap_adapter({k: torch.zeros_like(t) for k, t in values.items()}, adapter_name="default")
    trained = [(m, key, p) for m in model.modules() for key, p in m._parameters.items() if p is not None]
    trained = [(m, key, p) for m, key, p in trained if p.requires_grad]
    for module, key, parameter in trained:
        setattr(module, key, torch.nn.Parameter(parameter.detach().clone()))
    model.hotswap_adapter(values, adapter_name="default")
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, expected)
    model.set_adapter("other")
    assert trained and not any(getattr(module, key).requires_grad for module, key, _ in trained)
    model.set_adapter("default")
    assert all(getattr(module, key).requires_grad for module, key, _ in trained)


def test_a_model_that_serves_looks_its_parameters_up_once(monkeypatch):
    model, batch = serving(fp.LoraConfig(**ALL), fp.LoraConfig(**ALL)), tiny.inputs()
    states = [{k: f * t for k, t in tensors_of(model, "default").items()} for f in (1, 2)]
    model.set_adapter("1")  # to train

    def serve():
        for state, name in zip(states, ("default", "1"), strict=True):
            model.hotswap_adapter(state)
            model(**batch)  # in which transformers puts the layers into a list of its own
            model.set_adapter(name)
            model(**batch)

    serve()
    bank = model.base_model.bank
    monkeypatch.setattr(type(model.base_model), "tensors", lambda *_: pytest.fail("looked up again"))
    monkeypatch.setattr(bank, "_find", dict.fromkeys(bank._find, lambda: pytest.fail("looked up again")))
    serve()


def test_modules_saved_with_the_adapter_swap_too():
    config = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    model = serving(fp.LoraConfig(**config), fp.LoraConfig(**config))
    batch = tiny.inputs()
    model.set_adapter("1")
    expected = model(**batch).logits
    model.set_adapter("default")
    model.hotswap_adapter(tensors_of(model, "1"))
    assert torch.equal(model(**batch).logits, expected)


@pytest.mark.parametrize("beside", [[], ["model.embed_tokens.weight"]], ids=["adapter", "and_an_embedding"])
def test_whatever_keeps_values_is_told_of_a_swap(beside):
    model = serving(fp.LoraConfig(), fp.LoraConfig())
    bank, base = model.base_model.bank, model.get_base_model()
    version = bank.version
    model.hotswap_adapter(
        tensors_of(model, "1") | {f"base_model.model.{k}": base.get_parameter(k).clone() for k in beside}
    )
    assert bank.version > version


def test_an_adapter_that_is_gone_is_kept_nowhere():
    model, batch = serving(fp.LoraConfig(**ALL), fp.LoraConfig(**ALL, use_dora=True)).bfloat16(), tiny.inputs()
    for names in ("1", ["default", "1"]):
        model.set_adapter(names)
        with torch.no_grad():
            model(**batch)
    gone = [weakref.ref(p) for n, p in model.named_parameters() if n.endswith(".1.weight")]
    model.set_adapter("default")
    model.delete_adapter("1")
    gc.collect()
    assert gone and not any(parameter() is not None for parameter in gone)


def test_an_adapter_added_again_under_its_name_takes_the_values():
    model = serving(fp.LoraConfig(), fp.LoraConfig())
    new = tensors_of(model, "1")
    model.hotswap_adapter(new)
    model.set_adapter("1")
    model.delete_adapter("default")
    model.add_adapter("default", fp.LoraConfig())
    model.hotswap_adapter(new, "default")
    assert all(torch.equal(t, new[k]) for k, t in tensors_of(model, "default").items())


@pytest.mark.parametrize(
    ("kind", "field"),
    [
        (partial(fp.LoraConfig, target_modules=["q_proj"]), "lora_dropout"),
        (partial(fp.DeepPromptConfig, num_virtual_tokens=3, prefix=True), "prefix_dropout"),
    ],
)
def test_the_configuration_says_the_dropout_that_is_in_place(kind, field):
    model = fp.get_peft_model(tiny.make(), kind(**{field: 0.5}))
    model.hotswap_adapter(tensors_of(model, "default"), config=kind())
    assert getattr(model.peft_config["default"], field) == 0.5


@pytest.mark.parametrize(
    "config",
    [
        fp.LoraConfig(r=4, **ALL),
        fp.PrefixTuningConfig(num_virtual_tokens=3),
        fp.PromptTuningConfig(num_virtual_tokens=3),
        fp.DeepPromptConfig(num_virtual_tokens=3),
        fp.BottleneckConfig(bottleneck_size=4),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_a_configuration_that_comes_along_is_kept_for_this_model(config, tmp_path):
    base = tiny.make()
    model = fp.get_peft_model(copy.deepcopy(base), config)
    before, batch = model.peft_config["default"], tiny.inputs()
    new = {key: torch.randn_like(t) for key, t in tensors_of(model, "default").items()}
    model.hotswap_adapter(new, config=config)
    assert model.peft_config["default"] == before
    model.save_pretrained(tmp_path)
    again = fp.PeftModel.from_pretrained(base, tmp_path)
    assert all(torch.equal(t, new[key]) for key, t in tensors_of(again, "default").items())
    torch.testing.assert_close(again(**batch).logits, model.eval()(**batch).logits)


class TestRefused:
    KEY = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"

    def refused(self, model, source, message, **kwargs):
        before = snapshot(model), tensors_of(model, "default")
        with pytest.raises(ValueError, match=message):
            model.hotswap_adapter(source, **kwargs)
        assert_untouched(model, before[0])
        now = tensors_of(model, "default")
        assert all(torch.equal(now[k], before[1][k]) for k in now)

    @pytest.fixture
    def model(self):
        return serving(fp.LoraConfig(), fp.LoraConfig(r=16), fp.LoraConfig(target_modules=["q_proj", "k_proj"]))

    def test_a_larger_rank(self, model):
        self.refused(model, tensors_of(model, "1"), "rank 16; adapter 'default' has room for rank 8")

    def test_modules_that_the_adapter_does_not_have(self, model):
        self.refused(model, tensors_of(model, "2"), r"keys that adapter 'default' does not have: .*k_proj")

    def test_what_is_no_source(self, model):
        self.refused(model, None, "source is None; it must be a folder")

    def test_half_a_layer(self, model):
        new = tensors_of(model, "default")
        del new[self.KEY]
        self.refused(model, new, f"lacks the key {self.KEY}")

    def test_a_layer_that_the_configuration_promises(self, model):
        new = {k: t for k, t in tensors_of(model, "default").items() if "layers.1" not in k}
        self.refused(model, new, r"Keys missing: .*layers\.1", config=fp.LoraConfig())

    def test_modules_that_the_configuration_asks_for_and_nobody_has(self, model):
        new = tensors_of(model, "default")
        self.refused(model, new, r"Keys missing: .*k_proj.* more", config=fp.LoraConfig(target_modules="all-linear"))

    def test_a_module_trained_whole_that_the_configuration_lacks(self):
        model = serving(fp.LoraConfig(modules_to_save=["lm_head"]))
        message = r"modules_to_save is None in the state dict; adapter 'default' has \['lm_head'\]"
        self.refused(model, tensors_of(model, "default"), message, config=fp.LoraConfig())

    def test_a_factor_that_is_no_matrix(self, model):
        key = self.KEY.replace("lora_B", "lora_A")
        for shape in ((8,), (0, 32)):
            new = tensors_of(model, "default") | {key: torch.zeros(shape)}
            self.refused(model, new, rf"{key} has shape \({shape[0]},.*\); it must be \[r, K\], r >= 1")

    def test_another_shape(self, model):
        new = tensors_of(model, "default")
        new[self.KEY] = torch.zeros(17, 8)
        self.refused(model, new, rf"{self.KEY} has shape \(17, 8\); it must be \(16, 8\)")

    def test_another_rank_than_the_configuration_says(self, model):
        message = r"has shape \(8, 32\); it must be \(4, 32\)"
        self.refused(model, tensors_of(model, "default"), message, config=fp.LoraConfig(r=4, lora_alpha=8))

    def test_a_module_that_is_trained_whole(self):
        model = serving(fp.LoraConfig(modules_to_save=["lm_head"]))
        new = tensors_of(model, "default")
        del new["base_model.model.lm_head.weight"]
        self.refused(model, new, r"lacks the key base_model\.model\.lm_head\.weight")

    def test_another_embedding(self, model):
        embedding = {"base_model.model.model.embed_tokens.weight": torch.zeros(tiny.VOCAB, 32)}
        self.refused(model, tensors_of(model, "default") | embedding, "embed_tokens.weight differs from the base model")

    def test_another_dtype(self, model):
        new = tensors_of(model, "default")
        new[self.KEY] = new[self.KEY].long()
        self.refused(model, new, rf"{self.KEY} has dtype torch\.int64")

    @pytest.mark.parametrize(
        ("convert", "message"),
        [
            (lambda t: torch.zeros_like(t, dtype=torch.uint8).view(torch.float4_e2m1fn_x2), "float4_e2m1fn_x2 in"),
            (Tensor.to_sparse, "float32 in torch.sparse_coo on cpu; it must be dense"),
            (Tensor.to_mkldnn, "float32 in torch._mkldnn on cpu; it must be dense"),
        ],
    )
    @pytest.mark.parametrize(
        ("held", "config"),
        [
            (fp.LoraConfig(), None),
            (fp.LoraConfig(), fp.LoraConfig()),
            (fp.LoraConfig(), fp.LoraConfig(lora_alpha=3)),
            (fp.PromptTuningConfig(**PROMPT), None),
            (fp.PromptTuningConfig(**PROMPT), fp.PromptTuningConfig(**PROMPT)),
        ],
    )
    def test_what_torch_cannot_copy(self, convert, message, held, config):
        model = serving(held)
        new = {key: torch.ones_like(t) for key, t in tensors_of(model, "default").items()}
        *_, last = new
        self.refused(model, new | {last: convert(new[last])}, re.escape(f"{last} is torch.{message}"), config=config)

    def test_no_tensors_at_all(self, model):
        self.refused(model, {}, "the state dict holds no tensors")

    def test_what_is_no_tensor(self, model):
        new = tensors_of(model, "default")
        with pytest.raises(TypeError, match=rf"{self.KEY} is a ndarray; it must be a tensor"):
            model.hotswap_adapter(new | {self.KEY: new[self.KEY].numpy()})

    def test_another_variant(self, model):
        config = fp.LoraConfig(use_dora=True)
        self.refused(model, tensors_of(model, "default"), r"Keys missing: .*lora_magnitude_vector", config=config)
        model.add_adapter("3", config)
        self.refused(model, tensors_of(model, "3"), "use_dora is True", config=config)

    def test_an_unknown_adapter(self, model):
        self.refused(model, tensors_of(model, "default"), "no adapter 'none'", adapter_name="none")

    def test_an_adapter_that_belongs_to_another_base(self, model):
        config = fp.LoraConfig(init_lora_weights="pissa")
        self.refused(model, tensors_of(model, "default"), "init_lora_weights", config=config)

    def test_a_damaged_file(self, model, tmp_path):
        model.save_pretrained(tmp_path, selected_adapters=["default"])
        path = tmp_path / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
        self.refused(model, tmp_path, r"adapter_model\.safetensors is not a valid")

    def test_while_merged(self, model):
        model.merge_adapter()
        with pytest.raises(ValueError, match="merged"):
            model.hotswap_adapter(tensors_of(model, "default"))

    def test_magnitudes_of_the_base_while_another_adapter_is_merged(self):
        model = serving(fp.LoraConfig(use_dora=True), fp.LoraConfig())
        new = {k: t for k, t in tensors_of(model, "default").items() if "v_proj" not in k}
        model.merge_adapter(["1"])
        self.refused(model, new, r"\['1'\] are merged, and the state dict lacks .*v_proj, where the magnitude")
        model.unmerge_adapter()
        model.hotswap_adapter(new)
        gain = model.get_base_model().model.layers[0].self_attn.v_proj.gain("default")
        torch.testing.assert_close(gain, torch.ones_like(gain))


def test_many_tensors_are_copied_whatever_they_are():
    from pyfastpeft.ops import copy_tensors

    shapes = [(3, 5), (0,), (1,), (700, 300), (64, 64), (2, 0, 3), (100_001,)]
    for dtype, other in (
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float16),
    ):
        into, source = [torch.zeros(s, dtype=dtype) for s in shapes], [torch.randn(s).to(other) for s in shapes]
        before = [t._version for t in into]
        copy_tensors(into, source)
        assert all(torch.equal(a, b.to(dtype)) for a, b in zip(into, source, strict=True))
        assert all(t._version > v for t, v in zip(into, before, strict=True))
    copy_tensors([], [])
    strided, source = torch.zeros(8, 6).t(), torch.randn(6, 8, requires_grad=True)
    copy_tensors([strided, strided[0]], [source, source[1]])
    assert torch.equal(strided[1:], source[1:]) and torch.equal(strided[0], source[1]) and not strided.requires_grad


def test_a_copy_whose_last_pair_does_not_fit_writes_nothing():
    into = [torch.zeros(4), torch.zeros(3)]
    assert not torch.ops.pyfastpeft.copy_tensors.default(into, [torch.ones(4), torch.ones(2)])
    assert not into[0].any()
    with pytest.raises(RuntimeError, match="must have 2"):
        torch.ops.pyfastpeft.copy_tensors.default(into, [torch.ones(4)])


def test_a_copy_that_is_not_of_dense_tensors_is_torchs():
    from pyfastpeft.ops import copy_alike, copy_tensors

    into = torch.zeros(3, 3)
    assert not copy_alike([into], [torch.eye(3).to_sparse()]) and not copy_alike([into], [])
    with pytest.raises(ValueError, match="source has 0 tensors; it must have 1"):
        copy_tensors([into], [])


def test_values_that_are_nowhere_are_an_error():
    model = serving(fp.LoraConfig())
    held = tensors_of(model, "default")
    *_, one = held
    for name, t in ((one, held[one]), (one, torch.empty(1, 77))):
        with pytest.raises(ValueError, match=re.escape(f"{name} is torch.float32 in torch.strided on meta; it must")):
            model.hotswap_adapter({k: torch.full_like(t, 7) for k, t in held.items()} | {name: t.to("meta")})
        assert all(torch.equal(t, held[k]) for k, t in tensors_of(model, "default").items())


def test_threads_choose_the_adapters_of_their_rows_apart():
    model = serving(*[fp.LoraConfig(target_modules="all-linear")] * 2)
    tiny.check_threads_choose_apart(model, [["default", "1"], ["1", "__base__"], None, ["__base__", "default"]])
