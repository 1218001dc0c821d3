"""bitsandbytes, and peft over it."""

from __future__ import annotations

import copy
import functools
import itertools

import torch
from torch import Tensor

from ..registry import Layer, Problem, contender


def _quantized(p: Problem, quant_type: str) -> tuple:
    from bitsandbytes.functional import quantize_4bit

    def make() -> tuple:
        return quantize_4bit(p.weight.dense.to(p.dtype), blocksize=64, quant_type=quant_type)

    return p.weight.once(("bitsandbytes", quant_type, p.dtype), make)


def _linear(p: Problem, quant_type: str) -> torch.nn.Module:
    import bitsandbytes as bnb

    codes, state = _quantized(p, quant_type)
    layer = bnb.nn.Linear4bit(p.k, p.n, bias=False, compute_dtype=p.dtype, quant_type=quant_type, device="meta")
    stats = {k: v.clone() if isinstance(v, Tensor) else v for k, v in state.as_dict(packed=True).items()}
    layer.weight = bnb.nn.Params4bit.from_prequantized(
        codes.clone(), stats, requires_grad=False, device="cpu", module=layer
    )
    return layer


def _dequantized(p: Problem, quant_type: str, mode: str) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    codes, state = _quantized(p, quant_type)
    state = copy.copy(state)
    # In training the weight is dequantized to x's dtype, which rounds it; that is no part of what eval mode computes.
    state.dtype = p.dtype if mode == "train" else torch.float32
    return dequantize_4bit(codes, state).double()


def _nbytes(p: Problem, train: bool) -> int:
    # In eval mode its scales are kept in bf16.
    return p.n * p.k // 2 + p.n * p.k // 64 * (4 if train else 2)


def _base(p: Problem, quant_type: str, mode: str) -> Layer:
    layer = _linear(p, quant_type).train(mode == "train")
    return Layer(layer, _nbytes(p, mode == "train"), lambda: _dequantized(p, quant_type, mode))


for _quant_type, _mode in itertools.product(("nf4", "fp4"), ("eval", "train")):
    contender(f"bnb_{_quant_type}_{_mode}", "bitsandbytes", requires=("bitsandbytes",), trains=_mode == "train")(
        functools.partial(_base, quant_type=_quant_type, mode=_mode)
    )


def _peft(p: Problem, mode: str) -> Layer:
    from peft import LoraConfig, get_peft_model

    model = torch.nn.Sequential(_linear(p, "nf4"))
    config = LoraConfig(r=p.rank, lora_alpha=int(p.rank * p.scaling), target_modules=["0"])
    model = get_peft_model(model, config, adapter_name="a0")
    for i in range(1, p.adapters):
        model.add_adapter(f"a{i}", config)
    layer = model.base_model.model[0]
    with torch.no_grad():
        for i in range(p.adapters):
            layer.lora_A[f"a{i}"].weight.copy_(p.a)
            layer.lora_B[f"a{i}"].weight.copy_(p.b)
    layer.train(mode == "train").requires_grad_(False)
    trained = layer.lora_A["a0"].weight, layer.lora_B["a0"].weight
    for parameter in trained:
        parameter.requires_grad_(p.train)

    @functools.cache
    def names(rows: int) -> list[str]:
        return [f"a{i % p.adapters}" for i in range(rows)]

    call = layer if p.adapters == 1 else lambda x: layer(x, adapter_names=names(len(x)))
    return Layer(call, _nbytes(p, mode == "train"), lambda: p.adapted(_dequantized(p, "nf4", mode)), trained)


for _mode in ("eval", "train"):
    contender(
        f"peft_bnb_nf4_{_mode}",
        "peft + bitsandbytes",
        requires=("bitsandbytes", "peft"),
        lora=True,
        over=f"bnb_nf4_{_mode}",
        trains=_mode == "train",
    )(functools.partial(_peft, mode=_mode))
