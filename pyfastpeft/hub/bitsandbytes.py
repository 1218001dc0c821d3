"""4-bit weights in bitsandbytes' serialized form: the keys beside ``<p>.weight`` in a state dict or safetensors file.

NF4 and FP4 are written exactly as bitsandbytes writes them, so files go both ways. INT4, which bitsandbytes does not
have, follows the same pattern under names of its own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..formats import DYNAMIC_MAP, Format, NestedScales, Packed4bit, get_format, quantize_4bit
from ..formats.codes import check_blocksize, pack_nibbles
from ..formats.double_quant import BLOCKSIZE as NESTED_BLOCKSIZE

_QUANT_STATE = {
    "nf4": "quant_state.bitsandbytes__nf4",
    "fp4": "quant_state.bitsandbytes__fp4",
    "int4": "quant_state.pyfastpeft__int4",
}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

STATE_SUFFIXES = (
    "absmax",
    "quant_map",
    "nested_absmax",
    "nested_quant_map",
    "scale",
    "zero",
    *_QUANT_STATE.values(),
)
"""Every key that may follow ``<p>.weight.``."""


def packed_to_state(packed: Packed4bit, key: str) -> dict[str, Tensor]:
    """``packed`` as the tensors that stand under ``key`` (``<p>.weight``) in a state dict.

    ``key`` holds the codes, uint8 [(numel + 1) // 2, 1]; beside it NF4 and FP4 have ``.absmax`` (float32 [blocks], or
    uint8 when double-quantized), ``.quant_map`` and, double-quantized, ``.nested_absmax`` and ``.nested_quant_map``;
    INT4 has ``.scale`` and ``.zero`` (float32 [blocks]); all have ``.quant_state.*``, JSON in a uint8 tensor.
    """
    rows = packed.rows()
    info: dict[str, Any] = {
        "quant_type": rows.quant_type,
        "blocksize": rows.blocksize,
        "dtype": str(rows.dtype).removeprefix("torch."),
        "shape": list(rows.shape),
    }
    state = {key: rows.codes}
    if rows.zero is not None:
        state |= {f"{key}.scale": rows.scale, f"{key}.zero": rows.zero}
    else:
        # A copy: tensors that share memory could not be stored in one file.
        state |= {f"{key}.absmax": rows.scale, f"{key}.quant_map": rows.format.table.to(rows.device, copy=True)}
    if rows.nested is not None:
        state[f"{key}.nested_absmax"] = rows.nested.absmax2
        state[f"{key}.nested_quant_map"] = DYNAMIC_MAP.to(rows.device, copy=True)
        info |= {
            "nested_blocksize": NESTED_BLOCKSIZE,
            "nested_dtype": "float32",
            "nested_offset": rows.nested.offset.item(),
        }
    encoded = torch.tensor(list(json.dumps(info).encode()), dtype=torch.uint8, device=rows.device)
    state[f"{key}.{_QUANT_STATE[rows.quant_type]}"] = encoded
    return state


def packed_from_state(state: Mapping[str, Tensor], key: str) -> Packed4bit:
    """The inverse of :func:`packed_to_state`: the weight that stands under ``key`` in ``state``.

    The codes may lie in any dtype (bitsandbytes' ``quant_storage``). Scales that were double-quantized with another
    map or block size than ours are decoded, exactly, to float32 and kept so.

    Returns:
        Packed4bit in the ``rows`` layout, on the codes' device; its tensors may share memory with ``state``.

    Raises:
        ValueError: a key that is missing or unknown, or a tensor or JSON field that breaks a rule; both are named.
    """
    own = {name.removeprefix(key + "."): t for name, t in state.items() if name.startswith(key + ".")}
    if empty := sorted(name for name, t in state.items() if t.is_meta and (name == key or name.startswith(key + "."))):
        raise ValueError(f"{empty[0]} is a meta tensor, which has no values; it must hold a part of a 4-bit weight")
    if unknown := sorted(own.keys() - set(STATE_SUFFIXES)):
        raise ValueError(f"{key}.{unknown[0]} is not a key of a 4-bit weight; those are {', '.join(STATE_SUFFIXES)}")
    present = [quant_type for quant_type, suffix in _QUANT_STATE.items() if suffix in own]
    if len(present) != 1:
        found = f"{len(present)} of them" if present else "none"
        raise ValueError(f"{key} has {found} of the keys {', '.join(_QUANT_STATE.values())} beside it; it needs one")
    fmt = get_format(present[0])
    info = _Info(own.pop(_QUANT_STATE[fmt.name]), f"{key}.{_QUANT_STATE[fmt.name]}", fmt)
    # INT4 has no absmax, NF4 and FP4 no scale: a key of the other kind is a damaged file.
    wanted = {"scale", "zero"} if fmt.has_zero else {"absmax", "quant_map"}
    if info.nested:
        wanted |= {"nested_absmax", "nested_quant_map"}
    if own.keys() != wanted:
        name = sorted(own.keys() ^ wanted)[0]
        problem = "is missing" if name in wanted else "should not be there"
        raise ValueError(f"{key}.{name} {problem}; this weight's keys are {', '.join(sorted(wanted))}")
    if key not in state:
        raise ValueError(f"{key} is missing, though its quantization state is there")

    numel = math.prod(info.shape)
    blocks = -(-numel // info.blocksize)
    codes = _codes(state[key], key, (numel + 1) // 2)
    zero = nested = None
    if fmt.has_zero:
        scale = _floats(own["scale"], f"{key}.scale", blocks)
        zero = _floats(own["zero"], f"{key}.zero", blocks)
    else:
        _check_table(own["quant_map"], f"{key}.quant_map", fmt)
        if info.nested:
            scale, nested = _nested(own, key, info, blocks)
        else:
            absmax = own["absmax"]
            if info.shape and absmax.shape == (blocks // max(info.shape[0], 1), info.shape[0]):
                # bitsandbytes on a CPU transposes its scales in an eval forward, and saves them so.
                absmax = absmax.t()
            scale = _floats(absmax, f"{key}.absmax", blocks)
    shape = torch.Size(info.shape)
    return Packed4bit(codes, scale, zero, nested, shape, info.dtype, fmt.name, info.blocksize)


def bnb_state(linear: nn.Module) -> Any:
    """The quantization state of a layer of bitsandbytes'; None where nothing is quantized."""
    # FSDP drops the state from the parameter; the module then still has it.
    return getattr(linear.weight, "quant_state", None) or getattr(linear, "quant_state", None)


def packed_from_bnb(bnb_linear: nn.Module) -> Packed4bit:
    """The weight of a live ``bitsandbytes.nn.Linear4bit``, which is left as it is.

    Codes and scales are kept bit for bit wherever bitsandbytes still has them: an eval forward on a CPU with AVX-512
    makes it round its scales to bfloat16, and those are then what is found. A layer that is not quantized yet is
    quantized here, with its own settings.

    Raises:
        TypeError: ``bnb_linear`` is no such layer.
        ValueError: its weight and quantization state do not fit together.
    """
    if not isinstance(bnb_linear, nn.Linear) or not hasattr(bnb_linear, "quant_state"):
        raise TypeError(f"bnb_linear is a {type(bnb_linear).__name__}; it must be a bitsandbytes.nn.Linear4bit")
    weight = bnb_linear.weight
    state = bnb_state(bnb_linear)
    if state is None:
        if not weight.is_floating_point():
            raise ValueError(f"the layer's weight is {weight.dtype}, yet it has no quantization state")
        if not hasattr(weight, "quant_type"):
            raise ValueError(
                f"the layer's weight is a {type(weight).__name__} in {weight.dtype}; it must be a "
                "bitsandbytes.nn.Params4bit (a head that is tied to the embedding belongs into llm_int8_skip_modules)"
            )
        return quantize_4bit(weight.data, weight.quant_type, weight.blocksize, weight.compress_statistics)
    codes = weight.data.as_subclass(Tensor)
    repacked = getattr(state, "packing_format_for_cpu", False)
    if repacked:
        codes = _undo_cpu_packing(codes, *state.shape, get_format(state.quant_type))
    held = {"weight": codes} | {f"weight.{name}": t for name, t in state.as_dict(packed=True).items()}
    packed = packed_from_state(held, "weight")
    # Repacking also overwrites the dtype that was quantized from.
    return replace(packed, dtype=state.original_dtype) if repacked else packed


def _undo_cpu_packing(codes: Tensor, n: int, k: int, fmt: Format) -> Tensor:
    """bitsandbytes' AVX-512 order, bytes [n / 32, k / 2, 32], to its storage order, uint8 [n * k / 2, 1].

    In each run of 32 bytes the low nibbles are the first 32 elements of the run's 64 and the high nibbles the others;
    the run's elements are pairs of neighbouring columns of 32 rows.
    """
    runs = codes.reshape(n // 32, k // 2, 32)
    elements = torch.cat([runs & 15, runs >> 4], dim=-1).view(n // 32, k // 2, 32, 2)
    return pack_nibbles(elements.transpose(1, 2).flatten(), fmt)


class _Info:
    """The JSON part of a quantization state, checked field by field."""

    def __init__(self, encoded: Tensor, key: str, fmt: Format) -> None:
        if encoded.dtype != torch.uint8 or encoded.dim() != 1:
            raise ValueError(f"{key} is {encoded.dtype} of shape {tuple(encoded.shape)}; it must be a uint8 vector")
        try:
            fields = json.loads(bytes(encoded.cpu().numpy()).decode())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{key} does not hold JSON: {error}") from None
        if not isinstance(fields, dict):
            raise ValueError(f"{key} holds a JSON {type(fields).__name__}; it must be an object")
        if fields.get("quant_type") != fmt.name:
            raise ValueError(f"{key}: quant_type is {fields.get('quant_type')!r}; it must be {fmt.name!r}")
        blocksize, dtype, shape = fields.get("blocksize"), fields.get("dtype"), fields.get("shape")
        try:
            self.blocksize = check_blocksize(fmt, blocksize)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from None
        if not isinstance(dtype, str) or dtype not in _DTYPES:
            raise ValueError(f"{key}: dtype is {dtype!r}; it must be one of {', '.join(_DTYPES)}")
        self.dtype = _DTYPES[dtype]
        if not isinstance(shape, list) or not all(type(size) is int and 0 <= size < 2**48 for size in shape):
            raise ValueError(f"{key}: shape is {shape!r}; it must be a list of sizes")
        self.shape: list[int] = shape
        self.nested = "nested_offset" in fields
        if self.nested:
            offset, blocksize = fields["nested_offset"], fields.get("nested_blocksize")
            if type(offset) is not float:
                raise ValueError(f"{key}: nested_offset is {offset!r}; it must be a float")
            if type(blocksize) is not int or not 0 < blocksize < 2**48:
                raise ValueError(f"{key}: nested_blocksize is {blocksize!r}; it must be a positive integer below 2**48")
            # Always float32: in a half-precision default dtype the scales would lose digits, or turn into NaN.
            self.nested_offset = torch.tensor(offset, dtype=torch.float32)
            self.nested_blocksize = blocksize


def _codes(weight: Tensor, key: str, nbytes: int) -> Tensor:
    held = weight.numel() * weight.element_size()
    if held != nbytes:
        raise ValueError(f"{key} holds {held} bytes of codes; its quantization state asks for {nbytes}")
    return _dense(weight).view(torch.uint8).view(nbytes, 1)


def _floats(tensor: Tensor, key: str, count: int) -> Tensor:
    if not tensor.is_floating_point() or tensor.numel() != count:
        raise ValueError(f"{key} is {tensor.dtype} of shape {tuple(tensor.shape)}; it must be {count} float32 values")
    return _dense(tensor).float()


def _dense(tensor: Tensor) -> Tensor:
    """Flattened, element beside element, as kernels and views as bytes take it: reshape keeps a vector's strides."""
    return tensor.detach().reshape(-1).contiguous()


def _check_table(quant_map: Tensor, key: str, fmt: Format) -> None:
    table = _floats(quant_map, key, 16)
    if not torch.allclose(table.cpu(), fmt.table, rtol=0, atol=1e-6):
        raise ValueError(f"{key} is not the table of {fmt.name}; only bitsandbytes' own code tables can be read")


def _nested(own: Mapping[str, Tensor], key: str, info: _Info, blocks: int) -> tuple[Tensor, NestedScales | None]:
    """Double-quantized scales as they are, or decoded where they use another map or block size than ours."""
    codes = own["absmax"]
    if codes.dtype != torch.uint8 or codes.numel() != blocks:
        shape = tuple(codes.shape)
        raise ValueError(f"{key}.absmax is {codes.dtype} of shape {shape}; double-quantized, it must be {blocks} bytes")
    codes = _dense(codes)
    absmax2 = _floats(own["nested_absmax"], f"{key}.nested_absmax", -(-blocks // info.nested_blocksize))
    table = _floats(own["nested_quant_map"], f"{key}.nested_quant_map", 256)
    offset = info.nested_offset.to(codes.device)
    if info.nested_blocksize == NESTED_BLOCKSIZE and torch.equal(table.cpu(), DYNAMIC_MAP):
        return codes, NestedScales(absmax2, offset)
    block = torch.arange(blocks, device=codes.device) // info.nested_blocksize
    return table[codes.long()] * absmax2[block] + offset, None
