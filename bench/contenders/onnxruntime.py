"""ONNX Runtime: MatMulNBits in blocks of 32 and 64, exact and with int8 activations, and MatMulBnb4."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

import pyfastpeft as fp

from ..registry import Layer, Problem, contender

REQUIRES = ("onnxruntime", "onnx")


def _session(p: Problem, operator: str, constants: dict[str, np.ndarray], **attributes: int) -> Callable:
    """x to y through a model of one node, both bound where torch has them."""
    import onnx
    import onnxruntime
    from onnx import helper, numpy_helper

    node = helper.make_node(operator, ["x", *constants], ["y"], domain="com.microsoft", K=p.k, N=p.n, **attributes)
    ends = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["M", size])
        for name, size in (("x", p.k), ("y", p.n))
    ]
    held = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph([node], operator, ends[:1], ends[1:], held)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = p.threads
    # Every copy of the weights is a session with a pool of its own: pools that spin would slow all others.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    bound: dict[tuple[int, int], tuple] = {}

    def call(x: Tensor) -> Tensor:
        key = (x.data_ptr(), len(x))
        if key not in bound:
            binding, y = session.io_binding(), torch.empty(len(x), p.n)
            binding.bind_input("x", "cpu", 0, np.float32, list(x.shape), x.data_ptr())
            binding.bind_output("y", "cpu", 0, np.float32, list(y.shape), y.data_ptr())
            bound.clear()
            bound[key] = (binding, y)
        binding, y = bound[key]
        session.run_with_iobinding(binding)
        return y

    return call


def _nbits(p: Problem, block: int, accuracy: int) -> Layer:
    codes, scale = p.weight.int4(block)
    blocks = codes.view(p.n, -1, block)
    packed = (blocks[..., 0::2] | blocks[..., 1::2] << 4).numpy()
    constants = {"w": packed, "scale": scale.numpy()}
    call = _session(p, "MatMulNBits", constants, bits=4, block_size=block, accuracy_level=accuracy)
    return Layer(call, packed.nbytes + scale.nbytes, lambda: p.weight.int4_dequantized(block))


for _block in (32, 64):
    for _accuracy in (1, 4):
        contender(
            f"ort_nbits_b{_block}_acc{_accuracy}", "onnxruntime", requires=REQUIRES, dtypes=("fp32",),
            tier="int8" if _accuracy == 4 else "exact",
        )(lambda p, block=_block, accuracy=_accuracy: _nbits(p, block, accuracy))  # fmt: skip


@contender("ort_bnb4_nf4", "onnxruntime", requires=REQUIRES, dtypes=("fp32",))
def _bnb4(p: Problem) -> Layer:
    packed = p.weight.once("nf4 rows", lambda: fp.quantize_4bit(p.weight.dense, "nf4", 64).rows())
    constants = {"w": packed.codes.flatten().numpy(), "absmax": packed.scale.flatten().numpy()}
    call = _session(p, "MatMulBnb4", constants, block_size=64, quant_type=1)
    return Layer(call, sum(c.nbytes for c in constants.values()), lambda: packed.dequantize(torch.float64))
