"""OpenVINO: u4 and nf4 weights; dynamic quantization (``dq64``) rounds activations to int8 in groups of 64."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

import pyfastpeft as fp
from pyfastpeft.formats.codes import unpack_nibbles

from ..registry import Layer, Problem, contender

BLOCK = 64


def _compiled(p: Problem, codes: Tensor, kind: str, scale: Tensor, dynamic: bool) -> Callable:
    """x to y through a compiled model, both held where torch has them.

    Args:
        codes: uint8 [N, K], one code a byte.
        scale: float32 [N, K / BLOCK], exact in float16.
    """
    import openvino as ov
    import openvino.opset13 as op

    flat = codes.flatten()
    packed = (flat[0::2] | flat[1::2] << 4).numpy()
    io = ov.Type.bf16 if p.dtype == torch.bfloat16 else ov.Type.f32
    # Only a product that is float32 in the model is quantized dynamically.
    inner = ov.Type.f32 if dynamic else io
    x = op.parameter([-1, p.k], io)
    w = op.convert(op.constant(ov.Tensor(packed, ov.Shape([p.n, p.k // BLOCK, BLOCK]), getattr(ov.Type, kind))), "f16")
    if kind == "u4":
        w = op.subtract(w, op.convert(op.constant(np.array([8], np.uint8)), "f16"))
    w = op.multiply(w, op.constant(scale.numpy().astype(np.float16)[..., None]))
    w = op.convert(op.reshape(w, op.constant(np.array([p.n, p.k])), False), inner)
    y = op.matmul(x if inner == io else op.convert(x, inner), w, False, True)
    model = ov.Model([y if inner == io else op.convert(y, io)], [x])
    compiled = ov.Core().compile_model(
        model, "CPU",
        {
            "INFERENCE_NUM_THREADS": p.threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY",
            "ENABLE_CPU_PINNING": False,  # it would pin the threads of the others too
            "INFERENCE_PRECISION_HINT": "bf16" if p.dtype == torch.bfloat16 else "f32",
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": BLOCK if dynamic else 0,
        },
    )  # fmt: skip
    request = compiled.create_infer_request()
    bound: dict[tuple[int, int], Tensor] = {}

    def view(t: Tensor) -> ov.Tensor:
        return ov.Tensor(t.view(torch.uint8).flatten().numpy(), ov.Shape(t.shape), io)

    def call(x: Tensor, weights: np.ndarray = packed) -> Tensor:  # which OpenVINO reads where they lie
        key = (x.data_ptr(), len(x))
        if key not in bound:
            bound.clear()
            bound[key] = torch.empty(len(x), p.n, dtype=p.dtype)
            request.set_input_tensor(view(x))
            request.set_output_tensor(view(bound[key]))
        request.infer()
        return bound[key]

    return call


def _u4(p: Problem, dynamic: bool) -> Layer:
    codes, scale = p.weight.int4(BLOCK)
    call = _compiled(p, codes, "u4", scale, dynamic)
    return Layer(call, codes.numel() // 2 + 2 * scale.numel(), lambda: p.weight.int4_dequantized(BLOCK))


def _nf4(p: Problem, dynamic: bool) -> Layer:
    packed = p.weight.once("nf4 rows", lambda: fp.quantize_4bit(p.weight.dense, "nf4", BLOCK).rows())
    codes = p.weight.once("nf4 codes", lambda: unpack_nibbles(packed.codes, p.n * p.k).to(torch.uint8))
    scale = packed.scale.view(p.n, -1).half().float()
    call = _compiled(p, codes, "nf4", scale, dynamic)

    def weight() -> Tensor:
        exact = packed.dequantize(torch.float64).view(p.n, -1, BLOCK)
        return (exact * (scale.double() / packed.scale.double().view(p.n, -1))[..., None]).view(p.n, p.k)

    return Layer(call, codes.numel() // 2 + 2 * scale.numel(), weight)


_WHAT = {"requires": ("openvino",), "dtypes": ("bf16", "fp32")}
contender("ov_u4", "openvino", **_WHAT)(partial(_u4, dynamic=False))
contender("ov_u4_dq64", "openvino", tier="int8", **_WHAT)(partial(_u4, dynamic=True))
contender("ov_nf4", "openvino", **_WHAT)(partial(_nf4, dynamic=False))
contender("ov_nf4_dq64", "openvino", **_WHAT)(partial(_nf4, dynamic=True))  # asked to, it stays exact
