"""``nn.Linear4bit`` as a module: whatever is done to it, its weight stays exactly what it was.

The tests named after bitsandbytes hold the promises that its CPU path breaks.
"""

import copy
import gc
import io
import pickle

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from tiny import tiny_llama
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.utils import parametrize, prune

import pyfastpeft as fp

# K a multiple of the block, of 32 only, of nothing; N a multiple of 32, and not.
SHAPES = [(64, 128), (40, 128), (64, 96), (48, 80), (5, 7)]
FORMATS = [("nf4", False), ("nf4", True), ("fp4", True), ("int4", False)]


def layer(n=48, k=96, quant_type="nf4", double_quant=False, dtype=torch.float32, bias=True):
    linear = torch.nn.Linear(k, n, bias=bias).to(dtype)
    return fp.nn.Linear4bit.from_linear(linear, quant_type, 64, double_quant)


def held(module):
    """Everything the layer's weight consists of, as it would be stored."""
    return {name: t.clone() for name, t in module.state_dict().items() if name.startswith("weight")}


def same(a, b):
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def close(actual, expected, tolerance):
    return (actual.double() - expected.double()).norm() <= tolerance * expected.double().norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_an_eval_forward_works_for_any_n_and_k(shape, dtype):
    module = layer(*shape, dtype=dtype).eval()
    x = torch.randn(3, shape[1], dtype=dtype)
    expected = F.linear(x.double(), module.dequantize(dtype).double(), module.bias.double())
    with torch.no_grad():
        assert close(module(x), expected, 1e-5 if dtype == torch.float32 else 4e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [7, 33])
def test_where_torch_computes_the_bias_is_not_rounded_by_itself(k, dtype):
    module, x = layer(512, k, dtype=dtype).eval(), torch.randn(64, k, dtype=dtype)
    expected = F.linear(x.double(), module.dequantize(dtype).double(), module.bias.double())
    rounding = (expected.to(dtype).double() - expected).norm()
    with torch.no_grad():
        assert (module(x).double() - expected).norm() <= 1.1 * rounding


@pytest.mark.parametrize(("quant_type", "double_quant"), FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_training_after_an_eval_forward_gives_the_same_gradients(shape, quant_type, double_quant):
    module = layer(*shape, quant_type, double_quant)
    x = torch.randn(6, shape[1])

    def gradients():
        a = torch.linspace(-1, 1, 4 * shape[1]).view(4, shape[1]).requires_grad_()
        b = torch.linspace(-1, 1, 4 * shape[0]).view(shape[0], 4).requires_grad_()
        inputs = x.clone().requires_grad_()
        module.train()(inputs, lora=(a, b, 0.5)).square().sum().backward()
        return inputs.grad, a.grad, b.grad

    before = gradients()
    with torch.no_grad():
        module.eval()(x)
    after = gradients()
    assert all(torch.equal(p, q) for p, q in zip(before, after, strict=True))
    weight = module.dequantize(torch.float32).double()
    a = torch.linspace(-1, 1, 4 * shape[1]).view(4, shape[1]).double()
    b = torch.linspace(-1, 1, 4 * shape[0]).view(shape[0], 4).double()
    y = F.linear(x.double(), weight + 0.5 * b @ a, module.bias.double())
    assert close(after[0], 2 * y @ (weight + 0.5 * b @ a), 1e-5)


@pytest.mark.parametrize(("quant_type", "double_quant"), FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_state_dict_after_an_eval_forward_is_exact_and_reloads(shape, quant_type, double_quant):
    module = layer(*shape, quant_type, double_quant).eval()
    before, x = held(module), torch.randn(2, shape[1])
    with torch.no_grad():
        y = module(x)
    assert same(before, held(module))
    other = fp.nn.Linear4bit(shape[1], shape[0], quant_type="nf4", blocksize=32)
    other.load_state_dict(module.state_dict())
    assert same(held(other), before)
    assert (other.quant_type, other.blocksize, other.double_quant) == (quant_type, 64, double_quant)
    with torch.no_grad():
        assert torch.equal(other(x), y)


@pytest.mark.parametrize(("quant_type", "double_quant"), FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_dequantize_after_an_eval_forward_is_exact(shape, quant_type, double_quant):
    weight = torch.randn(shape)
    module = fp.nn.Linear4bit.from_packed(fp.quantize_4bit(weight, quant_type, 64, double_quant)).eval()
    before = module.dequantize()
    with torch.no_grad():
        module(torch.randn(2, shape[1]))
    assert torch.equal(module.dequantize(), before)
    # A wrong layout gives an error of 1.4.
    assert (before - weight).norm() < 0.25 * weight.norm()


@pytest.mark.parametrize(("quant_type", "double_quant"), FORMATS)
@pytest.mark.parametrize(
    "change",
    [
        copy.deepcopy,
        copy.copy,
        lambda m: pickle.loads(pickle.dumps(m)),
        lambda m: m.half(),
        lambda m: m.double(),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.type(torch.bfloat16),
        lambda m: m.to("cpu"),
        lambda m: m.to(torch.bfloat16).float(),
        lambda m: m.eval().train().eval(),
        lambda m: m.requires_grad_(False),
        lambda m: m.share_memory(),
    ],
    ids=[
        "deepcopy",
        "copy",
        "pickle",
        "half",
        "double",
        "bfloat16",
        "type",
        "cpu",
        "there_and_back",
        "eval_train",
        "requires_grad",
        "share",
    ],
)
def test_the_weight_survives(change, quant_type, double_quant):
    module = layer(48, 96, quant_type, double_quant)
    before = held(module)
    after = change(module)
    assert same(held(after), before)
    assert torch.equal(after.weight, after.packed.codes) and not after.weight.requires_grad


def loaded(saved, device):
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, map_location=device, weights_only=False)


@pytest.mark.parametrize(("quant_type", "double_quant"), FORMATS)
def test_what_is_loaded_has_the_layout_of_the_device_that_it_is_loaded_to(monkeypatch, quant_type, double_quant):
    module = layer(48, 96, quant_type, double_quant)
    rows = module.packed.rows()
    alone, there = loaded(module.packed, "meta"), loaded(module, "meta")  # in the place of a GPU
    for packed in (alone, there.packed):
        shapes = {name: t.shape for name, t in packed._tensors().items()}
        assert packed.layout == "rows" and shapes == {name: t.shape for name, t in rows._tensors().items()}
    assert there.weight.shape == rows.codes.shape
    with monkeypatch.context() as context:
        context.setattr(type(rows), "prepared", lambda self: self)
        on_gpu = fp.nn.Linear4bit.from_packed(rows, module.bias)
    here = loaded(on_gpu, "cpu")
    assert on_gpu.packed.layout == "rows" and here.packed.layout == "tiles" and same(held(here), held(module))
    assert here.weight.data_ptr() == here.packed.codes.data_ptr()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is here")
@pytest.mark.parametrize(("quant_type", "double_quant"), FORMATS)
def test_what_a_cpu_saved_is_loaded_to_a_gpu_and_back(quant_type, double_quant):
    module = layer(48, 96, quant_type, double_quant)
    there, alone = loaded(module, "cuda"), loaded(module.packed, "cuda")
    assert same(held(copy.deepcopy(there).cpu()), held(module))
    assert torch.equal(alone.dequantize().cpu(), module.dequantize())
    assert same(held(loaded(there, "cpu")), held(module))


def test_a_model_that_served_is_loaded_to_another_device():
    model = tiny_llama().bfloat16()
    attention = model.model.layers[0].self_attn
    attention.q_proj = fp.nn.Linear4bit.from_linear(attention.q_proj)
    model = fp.get_peft_model(model, fp.LoraConfig(r=4, inference_mode=True)).eval()
    with torch.no_grad():
        model(torch.ones(1, 4, dtype=torch.int64))
    assert all(p.is_meta for p in loaded(model, "meta").parameters())


def test_a_change_of_dtype_reaches_the_bias_alone():
    module = layer().to(torch.bfloat16)
    assert module.bias.dtype == torch.bfloat16 and module.weight.dtype == torch.uint8
    assert module.packed.scale.dtype == torch.float32


def test_a_deep_copy_shares_no_memory():
    module = layer()
    twin = copy.deepcopy(module)
    mine = {t.data_ptr() for t in (module.weight, module.packed.codes, module.packed.scale)}
    assert mine.isdisjoint({t.data_ptr() for t in (twin.weight, twin.packed.codes, twin.packed.scale)})


def test_there_is_one_copy_of_the_codes():
    module = layer()
    for moved in (module, module.half(), copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert moved.weight.data_ptr() == moved.packed.codes.data_ptr()


def test_a_full_precision_weight_is_quantized_on_the_way_in():
    linear = torch.nn.Linear(96, 48)
    module = fp.nn.Linear4bit(96, 48, quant_type="fp4", blocksize=32)
    module.load_state_dict(linear.state_dict())
    assert same(held(module), held(fp.nn.Linear4bit.from_linear(linear, "fp4", 32)))


def test_a_layer_made_on_the_meta_device_says_so_until_it_is_loaded():
    module = fp.nn.Linear4bit(96, 48, device="meta", bias=False)
    with pytest.raises(RuntimeError, match="holds no weight"):
        module.dequantize()
    assert module.state_dict()["weight"].is_meta
    source = layer(bias=False)
    module.load_state_dict(source.state_dict())
    assert same(held(module), held(source))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("weight"), "Missing key"),
        (lambda s: s.pop("weight.absmax"), "weight.absmax is missing"),
        (lambda s: s.update({"weight.surprise": torch.zeros(1)}), "weight.surprise is not a key"),
        (lambda s: s.update(weight=torch.zeros(3, dtype=torch.uint8)), "holds 3 bytes of codes"),
        (lambda s: s.update(bias=torch.zeros(3)), "bias has shape"),
        (lambda s: s.update(layer(32, 96).state_dict()), "packed has shape"),
    ],
    ids=["weight", "absmax", "extra_weight", "codes", "bias_shape", "other_layer"],
)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(change, message):
    module, state = layer(), layer().state_dict()
    before = held(module)
    change(state)
    with pytest.raises(RuntimeError, match=message):
        module.load_state_dict(state)
    assert same(held(module), before)


@pytest.mark.parametrize("there", ["weight", "bias"])
def test_what_is_missing_is_named_and_what_is_there_is_loaded_where_that_is_enough(there):
    module, source = layer(), layer()
    state = {name: t for name, t in source.state_dict().items() if name.startswith(there)}
    with pytest.raises(RuntimeError, match="Missing key"):
        layer().load_state_dict(state)
    assert module.load_state_dict(state, strict=False).missing_keys == [{"weight": "bias", "bias": "weight"}[there]]
    assert same(held(module), held(source)) is (there == "weight")
    assert torch.equal(module.bias, source.bias) is (there == "bias")


def test_a_layer_made_on_the_meta_device_takes_the_tensors_it_is_assigned():
    source, x = layer(dtype=torch.bfloat16), torch.randn(3, 96).bfloat16()
    module = fp.nn.Linear4bit(96, 48, device="meta")
    module.load_state_dict(source.state_dict(), assign=True)
    assert torch.equal(module(x), source(x)) and module.bias.dtype == torch.bfloat16


@pytest.mark.parametrize(("quant_type", "double_quant"), FORMATS)
@pytest.mark.parametrize("k", [96, 80], ids=["tiles", "rows"])
@pytest.mark.parametrize("made_on", ["cpu", "meta"])
def test_what_is_loaded_shares_no_memory_with_the_state_unless_it_is_assigned(made_on, k, quant_type, double_quant):
    source, module = layer(48, k, quant_type, double_quant), fp.nn.Linear4bit(k, 48, False, device=made_on)
    state = {name: t for name, t in source.state_dict().items() if name != "bias"}
    expected = held(source)
    module.load_state_dict(state)
    for t in state.values():
        t.zero_()
    assert same(held(module), expected) and module.weight.data_ptr() == module.packed.codes.data_ptr()
    module.load_state_dict(expected, assign=True)
    assert (module.weight.data_ptr() == expected["weight"].data_ptr()) is (k == 80)  # tiles are made anew


@pytest.mark.parametrize(("quant_type", "double_quant"), FORMATS)
@pytest.mark.parametrize("k", [1056, 1040], ids=["tiles", "rows"])
@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
def test_a_state_whose_tensors_have_strides_is_read_as_its_values(assign, k, quant_type, double_quant):
    source, module = layer(48, k, quant_type, double_quant), layer(48, k)
    state = {name: torch.stack([t, t.flip(0)], -1)[..., 0] for name, t in source.state_dict().items()}
    module.load_state_dict(state, assign=assign)
    x = torch.randn(3, k)
    assert same(held(module), held(source)) and torch.equal(module(x), source(x))


def test_a_layer_moved_to_the_meta_device_is_as_one_made_there():
    source, x = layer(), torch.randn(3, 96)
    state, before = copy.deepcopy(source.state_dict()), source(x)
    assert source.to("meta").state_dict()["weight"].is_meta
    with pytest.raises(RuntimeError, match="holds no weight"):
        source(x)
    source.to_empty(device="cpu").load_state_dict(state)
    assert torch.equal(source(x), before)


def test_another_weight_is_set_packed_and_refused_where_it_would_never_be_read():
    module, other = layer(), layer()
    before = held(module)
    for weight in (other.weight, torch.nn.Parameter(torch.randn(48, 96)), None):
        with pytest.raises(TypeError, match="weight is assigned, but a Linear4bit's is packed: call set_packed"):
            module.weight = weight
    assert same(held(module), before)
    module.set_packed(other.packed)
    assert module.weight.data_ptr() == other.weight.data_ptr() and same(held(module), held(other))


@pytest.mark.parametrize(
    "change",
    [
        lambda module: prune.l1_unstructured(module, "weight", amount=0.5),
        lambda module: parametrize.register_parametrization(module, "weight", torch.nn.Identity()),
        lambda module: delattr(module, "weight"),
    ],
    ids=["prune", "parametrize", "delete"],
)
def test_a_weight_that_would_never_be_read_does_not_take_the_place_of_the_packed_one(change):
    module, x = layer(), torch.randn(3, 96)
    before, y = held(module), module(x)
    with pytest.raises(TypeError, match="but a Linear4bit's is packed, and its product reads nothing else"):
        change(module)
    assert same(held(module), before) and torch.equal(module(x), y)
    module.load_state_dict(layer().state_dict())


@pytest.mark.parametrize("full_state_dict", [False, True])
@pytest.mark.parametrize("ignore_frozen", [False, True])
@pytest.mark.parametrize(("quant_type", "double_quant"), [*FORMATS, ("fp4", False)])
def test_a_distributed_checkpoint_is_exact(tmp_path, quant_type, double_quant, ignore_frozen, full_state_dict):
    def made():
        base = torch.nn.ModuleDict({"q_proj": layer(48, 96, quant_type, double_quant)})
        return fp.inject_adapter_in_model(fp.LoraConfig(target_modules=["q_proj"], init_lora_weights=False), base)

    source, other = made(), made()
    before, after = copy.deepcopy(other.state_dict()), source.state_dict()
    options = StateDictOptions(full_state_dict, ignore_frozen_params=ignore_frozen, strict=not ignore_frozen)
    saved = get_model_state_dict(source, options=options)
    dcp.save(saved, checkpoint_id=tmp_path)
    # Not the other's own state: the length of quant_state differs with the digits of double quantization's offset.
    read = {name: torch.zeros_like(t) for name, t in saved.items()}
    dcp.load(read, checkpoint_id=tmp_path)
    set_model_state_dict(other, read, options=options)
    kept = [name for name in before if ignore_frozen and "lora_" not in name]
    assert same(other.state_dict(), after | {name: before[name] for name in kept})


def test_a_sharded_layer_is_saved_exactly_and_loads_no_weight():
    model = torch.nn.Sequential(layer())
    before, x = copy.deepcopy(model.state_dict()), torch.randn(3, 96)
    y = model(x)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        # As fully_shard does, which in torch 2.10 takes no bytes.
        weight = distribute_tensor(model[0].weight, init_device_mesh("cpu", (1,)), [Shard(0)])
        model[0]._parameters["weight"] = torch.nn.Parameter(weight, requires_grad=False)
        options = StateDictOptions(full_state_dict=True)
        assert same(get_model_state_dict(model, options=options), before)
        with pytest.raises(RuntimeError, match=r"0.weight: this layer's weight is sharded; .* before fully_shard"):
            set_model_state_dict(model, torch.nn.Sequential(layer()).state_dict(), options=options)
        assert same(model.state_dict(), before) and torch.equal(model(x), y)
    finally:
        dist.destroy_process_group()


def test_whatever_else_a_layer_holds_is_saved_and_loaded_as_in_any_module():
    def made():
        module = layer()
        module.register_buffer("seen", torch.zeros(3))
        module.child = torch.nn.Linear(2, 2)
        module.register_load_state_dict_pre_hook(lambda m, state, prefix, *_: state.pop(prefix + "noted"))
        module.register_state_dict_post_hook(lambda m, state, prefix, _: state.update({prefix + "noted": x}))
        return module

    x, module, source = torch.randn(3), made(), made()
    source.seen.copy_(x)
    torch.nn.Sequential(module).load_state_dict(torch.nn.Sequential(source).state_dict())
    assert torch.equal(module.seen, x) and torch.equal(module.child.weight, source.child.weight)
    assert same(held(module), held(source))


def test_an_unexpected_key_is_refused():
    with pytest.raises(RuntimeError, match="Unexpected key"):
        layer().load_state_dict(layer().state_dict() | {"surprise": torch.zeros(1)})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        layer(bias=False).load_state_dict(layer().state_dict())


def test_compute_dtype_decides_the_products_and_the_result_returns_in_the_inputs():
    module = layer(64, 128)
    x = torch.randn(4, 128)
    module.compute_dtype = torch.bfloat16
    y = module(x)
    assert y.dtype == torch.float32 and torch.equal(y, module(x.bfloat16()).float())


@pytest.mark.parametrize("compute_dtype", [None, torch.float32])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool])
def test_whole_numbers_are_refused_whatever_the_compute_dtype(compute_dtype, dtype):
    module = fp.nn.Linear4bit(64, 32, compute_dtype=compute_dtype)
    with pytest.raises(TypeError, match=f"x has dtype {dtype}; it must be a tensor of float32, bfloat16 or float16"):
        module(torch.ones(3, 64, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float64, "bfloat16"])
def test_a_compute_dtype_that_no_product_has_is_refused_at_once(dtype):
    with pytest.raises(ValueError, match=r"compute_dtype is .*float32, bfloat16 or float16"):
        fp.nn.Linear4bit(64, 64, compute_dtype=dtype)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, torch.float8_e4m3fn, "bfloat16"])
def test_a_dtype_that_no_weight_has_is_refused_at_once(dtype, device):
    with pytest.raises(ValueError, match=f"dtype is {dtype!r}; it must be None, float32, bfloat16 or float16"):
        fp.nn.Linear4bit(64, 64, device=device, dtype=dtype)


def test_settings_that_do_not_go_together_are_refused_before_there_is_a_weight():
    with pytest.raises(ValueError, match="double_quant is True"):
        fp.nn.Linear4bit(64, 64, quant_type="int4", double_quant=True, device="meta")


@pytest.mark.parametrize("name", ["in_features", "out_features"])
def test_sizes_are_integers_of_at_least_0(name):
    for size in (-1, 1.5, None):
        with pytest.raises(ValueError, match=f"{name} is {size}; it must be an integer of at least 0"):
            fp.nn.Linear4bit(**({"in_features": 4, "out_features": 4} | {name: size}))


def test_it_is_a_linear_by_class_and_by_name():
    assert isinstance(layer(), torch.nn.Linear) and type(layer()).__name__ == "Linear4bit"


def test_a_blocksize_may_be_of_any_integer_type():
    module = fp.nn.Linear4bit(64, 64, blocksize=np.int32(32))
    assert type(module.blocksize) is int and type(module.packed.blocksize) is int
    module.load_state_dict(module.state_dict())
    for blocksize in (True, 64.0, np.float64(64), "64", None):
        with pytest.raises(ValueError, match=r"blocksize is .* must be one of 32, 64"):
            fp.nn.Linear4bit(64, 64, blocksize=blocksize)


def test_a_traced_layer_carries_its_weight_with_it(tmp_path):
    source, x = layer(), torch.randn(5, 96)
    expected = torch.nn.functional.linear(x, source.dequantize(), source.bias)
    with torch.no_grad():
        source(x)
        torch.jit.trace(source, (torch.randn(3, 96),)).save(tmp_path / "traced.pt")
        del source
        gc.collect()
        others = [layer() for _ in range(3)]
        for other in others:
            other(x)
        assert close(torch.jit.load(tmp_path / "traced.pt")(x), expected, 1e-5)
