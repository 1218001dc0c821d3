"""Serialized 4-bit weights: exchangeable with bitsandbytes in both directions, and read with suspicion."""

import json

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import QuantState
from safetensors.torch import load_file, save_file

import pyfastpeft as fp
from pyfastpeft.formats import DYNAMIC_MAP
from pyfastpeft.hub.bitsandbytes import packed_from_state, packed_to_state

KINDS = [(q, d, b) for q in ("nf4", "fp4") for d in (False, True) for b in (64, 128)]
NF4_STATE = "w.quant_state.bitsandbytes__nf4"


def bnb_layer(n, k, quant_type="nf4", double=False, storage=torch.uint8, blocksize=64, dtype=torch.bfloat16):
    """A bitsandbytes layer with random weights, not quantized yet."""
    layer = bnb.nn.Linear4bit(k, n, quant_type=quant_type, compress_statistics=double, quant_storage=storage)
    layer.weight = bnb.nn.Params4bit(
        torch.randn(n, k).to(dtype),
        requires_grad=False,
        quant_type=quant_type,
        compress_statistics=double,
        quant_storage=storage,
        blocksize=blocksize,
        module=layer,
    )
    return layer


def as_bytes(tensor):
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


@pytest.mark.parametrize(("quant_type", "double", "blocksize"), KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_our_serialized_weight_is_bitsandbytes_own_byte_for_byte(quant_type, double, blocksize, dtype):
    layer = bnb_layer(48, 128, quant_type, double, blocksize=blocksize, dtype=dtype)
    ours = packed_to_state(fp.quantize_4bit(layer.weight.data, quant_type, blocksize, double), "weight")
    theirs = layer.to("cpu").state_dict()
    del theirs["bias"]
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert ours[key].dtype == tensor.dtype and ours[key].shape == tensor.shape, key
        assert torch.equal(as_bytes(ours[key]), as_bytes(tensor)), key


@pytest.mark.parametrize(("quant_type", "double", "blocksize"), KINDS)
def test_bitsandbytes_reads_our_file(tmp_path, quant_type, double, blocksize):
    packed = fp.quantize_4bit(torch.randn(48, 128), quant_type, blocksize, double)
    save_file(packed_to_state(packed, "weight"), tmp_path / "w.safetensors")
    state = load_file(tmp_path / "w.safetensors")
    codes = state.pop("weight")
    theirs = QuantState.from_dict({k.removeprefix("weight."): v for k, v in state.items()}, torch.device("cpu"))
    assert torch.equal(bnb.functional.dequantize_4bit(codes, theirs), packed.dequantize())


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("quant_type", "double", "blocksize"), KINDS)
def test_we_read_bitsandbytes_file_in_any_quant_storage(tmp_path, storage, quant_type, double, blocksize):
    layer = bnb_layer(48, 128, quant_type, double, storage, blocksize).to("cpu")
    save_file(layer.state_dict(), tmp_path / "l.safetensors")
    packed = packed_from_state(load_file(tmp_path / "l.safetensors"), "weight")
    expected = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    assert packed.dtype == expected.dtype and torch.equal(packed.dequantize(packed.dtype), expected)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "int4"])
@pytest.mark.parametrize("shape", [(), (5, 7), (33, 96), (64, 64), (3, 5, 8), (0, 64)])
def test_a_round_trip_changes_nothing(quant_type, shape):
    packed = fp.quantize_4bit(torch.randn(shape), quant_type, 32, double_quant=quant_type != "int4")
    state = packed_to_state(packed, "w")
    again = packed_to_state(packed_from_state(state, "w"), "w")
    assert state.keys() == again.keys() and all(torch.equal(state[k], again[k]) for k in state)


def test_a_half_precision_default_dtype_does_not_touch_the_nested_offset():
    state = packed_to_state(fp.quantize_4bit(torch.randn(64, 64), double_quant=True), "w")
    torch.set_default_dtype(torch.bfloat16)
    try:
        packed = packed_from_state(state, "w")
    finally:
        torch.set_default_dtype(torch.float32)
    assert packed.nested.offset.dtype == torch.float32
    assert packed.nested.offset.item() == json.loads(bytes(state[NF4_STATE].numpy()))["nested_offset"]


@pytest.mark.parametrize("change", ["map", "blocksize"])
def test_foreign_double_quantization_is_undone_exactly(change):
    packed = fp.quantize_4bit(torch.randn(256, 128), double_quant=True)
    state = packed_to_state(packed, "w")
    blocksize = 256
    if change == "map":
        state["w.nested_quant_map"] = torch.linspace(-1, 1, 256)
    else:
        blocksize = 128
        state["w.nested_absmax"] = torch.rand(4) + 0.5
        state[NF4_STATE] = edited(state[NF4_STATE], nested_blocksize=blocksize)
    codes, absmax2 = state["w.absmax"].long(), state["w.nested_absmax"]
    expected = state["w.nested_quant_map"][codes] * absmax2.repeat_interleave(blocksize)[: codes.numel()]
    read = packed_from_state(state, "w")
    assert read.nested is None
    assert torch.equal(read.scale, expected + packed.nested.offset)


def test_scales_that_an_eval_forward_transposed_before_the_save_are_put_back():
    layer = bnb_layer(64, 128).to("cpu").eval()
    expected = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    layer(torch.randn(2, 128, dtype=torch.bfloat16))
    packed = packed_from_state({k: v for k, v in layer.state_dict().items() if k != "bias"}, "weight")
    # The absmax of bfloat16 weights survives its rounding to bfloat16.
    assert torch.equal(packed.dequantize(packed.dtype), expected)


def edited(encoded, **fields):
    """The JSON part with fields replaced; None removes one."""
    info = json.loads(bytes(encoded.numpy())) | fields
    text = json.dumps({k: v for k, v in info.items() if v is not None})
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def raw(text):
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("w", None, "w is missing"),
        ("w.absmax", None, "w.absmax is missing"),
        ("w.quant_map", None, "w.quant_map is missing"),
        ("w.nested_absmax", None, "w.nested_absmax is missing"),
        (NF4_STATE, None, "none of the keys"),
        ("w.surprise", torch.zeros(1), "w.surprise is not a key"),
        ("w.zero", torch.zeros(64), "w.zero should not be there"),
        ("w.quant_state.bitsandbytes__fp4", raw("{}"), "2 of them of the keys"),
        ("w", torch.zeros(7, dtype=torch.uint8), "w holds 7 bytes of codes"),
        ("w.absmax", torch.zeros(63, dtype=torch.uint8), "w.absmax is torch.uint8 of shape"),
        ("w.absmax", torch.zeros(64), "w.absmax is torch.float32"),
        ("w.nested_absmax", torch.zeros(2), "w.nested_absmax is torch.float32 of shape"),
        ("w.nested_quant_map", torch.zeros(255), "w.nested_quant_map is torch.float32 of shape"),
        ("w.quant_map", torch.arange(16.0), "w.quant_map is not the table of nf4"),
        ("w.quant_map", torch.arange(16), "w.quant_map is torch.int64"),
        (NF4_STATE, torch.zeros(3, dtype=torch.bfloat16), "must be a uint8 vector"),
        (NF4_STATE, raw("{}")[None], "must be a uint8 vector"),
        (NF4_STATE, raw("{"), "does not hold JSON"),
        (NF4_STATE, torch.tensor([255], dtype=torch.uint8), "does not hold JSON"),
        (NF4_STATE, raw("[" * 100_000), "does not hold JSON"),
        (NF4_STATE, raw('{"blocksize": ' + "9" * 5000 + "}"), "does not hold JSON"),
        (NF4_STATE, raw("[]"), "JSON list; it must be an object"),
        (NF4_STATE, raw("{}"), "quant_type is None"),
    ],
)
def test_a_damaged_state_is_refused_by_key_and_rule(key, value, message):
    state = packed_to_state(fp.quantize_4bit(torch.randn(64, 64), double_quant=True), "w")
    state.pop(key, None)
    if value is not None:
        state[key] = value
    with pytest.raises(ValueError, match="w") as error:
        packed_from_state(state, "w")
    assert message in str(error.value)


def test_a_tensor_without_values_is_refused_by_name():
    state = packed_to_state(fp.quantize_4bit(torch.randn(64, 64), double_quant=True), "w")
    for key, tensor in state.items():
        with pytest.raises(ValueError, match=f"^{key} is a meta tensor"):
            packed_from_state(state | {key: tensor.to("meta")}, "w")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"quant_type": "fp4"}, "quant_type is 'fp4'"),
        ({"quant_type": ["nf4"]}, "quant_type is ['nf4']"),
        ({"blocksize": 48}, "blocksize is 48"),
        ({"blocksize": 64.0}, "blocksize is 64.0"),
        ({"blocksize": 128}, "w.absmax"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"dtype": {"a": 1}}, "dtype is {'a': 1}"),
        ({"shape": [64, -64]}, "shape is [64, -64]"),
        ({"shape": [64.0, 64]}, "shape is [64.0, 64]"),
        ({"shape": "64"}, "shape is '64'"),
        ({"shape": 64}, "shape is 64"),
        ({"shape": {}}, "shape is {}"),
        ({"shape": [2**40, 2**40]}, "bytes of codes"),
        ({"shape": [10**30]}, "shape is"),
        ({"nested_offset": "x"}, "nested_offset is 'x'"),
        ({"nested_blocksize": 0}, "nested_blocksize is 0"),
        ({"nested_blocksize": "256"}, "nested_blocksize is '256'"),
        ({"nested_blocksize": 10**30}, "nested_blocksize is 1000"),
    ],
)
def test_a_hostile_field_is_refused_by_name(fields, message):
    state = packed_to_state(fp.quantize_4bit(torch.randn(64, 64), double_quant=True), "w")
    state[NF4_STATE] = edited(state[NF4_STATE], **fields)
    with pytest.raises(ValueError, match="w") as error:
        packed_from_state(state, "w")
    assert message in str(error.value)


def test_the_dynamic_map_is_bitsandbytes_own():
    assert torch.equal(DYNAMIC_MAP, bnb.functional.create_dynamic_map())


class TestFromBnb:
    """``Linear4bit.from_bnb`` takes over a live layer, whatever has been done to it."""

    @pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32])
    @pytest.mark.parametrize(("quant_type", "double", "blocksize"), KINDS)
    def test_a_quantized_layer_keeps_codes_and_scales_bit_for_bit(self, storage, quant_type, double, blocksize):
        layer = bnb_layer(48, 96, quant_type, double, storage, blocksize).to("cpu")
        ours = fp.nn.Linear4bit.from_bnb(layer).state_dict()
        theirs = layer.state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(as_bytes(ours[k]), as_bytes(theirs[k])) for k in theirs)

    @pytest.mark.parametrize("double", [False, True])
    @pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
    def test_after_an_eval_forward_codes_are_exact_and_scales_what_is_left(self, storage, double):
        layer = bnb_layer(64, 128, "nf4", double, storage).to("cpu").eval()
        before = fp.nn.Linear4bit.from_bnb(layer)
        layer(torch.randn(2, 128, dtype=torch.bfloat16))
        if not getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
            pytest.skip("bitsandbytes repacks only on CPUs with AVX-512 bf16")
        after = fp.nn.Linear4bit.from_bnb(layer)
        assert after.packed.dtype == before.packed.dtype
        assert torch.equal(after.packed.rows().codes, before.packed.rows().codes)
        assert torch.equal(after.packed.block_scales(), before.packed.block_scales().bfloat16().float())
        assert layer.weight.quant_state.packing_format_for_cpu, "the layer taken over from was changed"

    @pytest.mark.parametrize("shape", [(40, 128), (64, 96)])
    def test_a_layer_that_bitsandbytes_failed_to_repack_is_still_exact(self, shape):
        layer = bnb_layer(*shape, "nf4", True).to("cpu").eval()
        # Not bitsandbytes' own dequantize: on a CPU it is wrong where K is not a multiple of the block size.
        expected = fp.nn.Linear4bit.from_bnb(layer).dequantize()
        try:
            layer(torch.randn(2, shape[1], dtype=torch.bfloat16))
        except (AssertionError, RuntimeError):
            pass
        else:
            pytest.skip("this CPU makes bitsandbytes take another path")
        assert torch.equal(fp.nn.Linear4bit.from_bnb(layer).dequantize(), expected)

    def test_a_layer_not_quantized_yet_is_quantized_with_its_own_settings(self):
        layer = bnb_layer(48, 96, "fp4", True, blocksize=128)
        ours = fp.nn.Linear4bit.from_bnb(layer)
        assert (ours.quant_type, ours.blocksize, ours.double_quant) == ("fp4", 128, True)
        theirs = layer.to("cpu").state_dict()
        assert all(torch.equal(as_bytes(v), as_bytes(theirs[k])) for k, v in ours.state_dict().items())

    def test_bias_compute_dtype_and_mode_come_along(self):
        layer = bnb_layer(32, 64).to("cpu").eval()
        layer.compute_dtype = torch.bfloat16
        ours = fp.nn.Linear4bit.from_bnb(layer)
        assert ours.bias is layer.bias and ours.compute_dtype == torch.bfloat16 and not ours.training

    def test_another_layer_is_refused(self):
        for layer in (torch.nn.Linear(4, 4), bnb.nn.Embedding4bit(64, 64)):
            with pytest.raises(TypeError, match=f"bnb_linear is a {type(layer).__name__}; it must be a bitsandbytes"):
                fp.nn.Linear4bit.from_bnb(layer)
        for storage in (torch.uint8, torch.bfloat16):
            layer = bnb_layer(32, 64, storage=storage)
            assert fp.nn.Linear4bit.from_linear(layer).out_features == 32  # not quantized yet
            with pytest.raises(TypeError, match=r"in 4 bits already, by bitsandbytes; use Linear4bit\.from_bnb"):
                fp.nn.Linear4bit.from_linear(layer.to("cpu"))

    def test_a_layer_that_fsdp_took_the_state_from_the_weight_of_is_taken_over(self):
        layer = bnb_layer(48, 96).to("cpu")
        expected = fp.nn.Linear4bit.from_bnb(layer).dequantize()
        layer.weight = torch.nn.Parameter(layer.weight.data.as_subclass(torch.Tensor), requires_grad=False)
        assert torch.equal(fp.nn.Linear4bit.from_bnb(layer).dequantize(), expected)
        layer.quant_state = None
        with pytest.raises(ValueError, match=r"weight is torch\.uint8, yet it has no quantization state"):
            fp.nn.Linear4bit.from_bnb(layer)

    def test_a_layer_that_has_the_embeddings_weight_is_refused(self):
        layer = bnb.nn.Linear4bit(64, 32, bias=False)
        layer.weight = torch.nn.Embedding(32, 64).weight
        with pytest.raises(ValueError, match=r"weight is a Parameter in torch\.float32; it must be a .*Params4bit"):
            fp.nn.Linear4bit.from_bnb(layer)
