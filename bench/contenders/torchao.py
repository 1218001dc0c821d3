"""torchao: its int4 tensors for CPUs, with activations as they are and in dynamic int8."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..registry import Layer, Problem, Unavailable, contender

BLOCK = 64
REQUIRES = ("torchao",)


@contender("torchao_int4", "torchao", requires=REQUIRES, dtypes=("bf16",))
def _weight_only(p: Problem) -> Layer:
    from torchao.prototype.quantization.int4 import Int4OpaqueTensor
    from torchao.quantization.quant_primitives import _quantize_affine_tinygemm

    dense = p.weight.dense.to(p.dtype)
    w = Int4OpaqueTensor.from_hp(dense, [1, BLOCK])

    def weight() -> Tensor:
        # The codes are packed for the kernel: made again, as the tensor made them.
        scale, zero = (t.t().contiguous() for t in w.scale_and_zero.unbind(-1))
        codes = _quantize_affine_tinygemm(dense, [1, BLOCK], scale, zero, torch.int32, 0, 15).view(p.n, -1, BLOCK)
        return ((codes.double() - 8) * scale.double()[..., None] + zero.double()[..., None]).view(p.n, p.k)

    return Layer(lambda x: F.linear(x, w), w.qdata.nbytes + w.scale_and_zero.nbytes, weight)


@contender("torchao_da8w4", "torchao", requires=REQUIRES, dtypes=("bf16", "fp32"), tier="int8")
def _dynamic(p: Problem) -> Layer:
    from torchao.prototype.quantization.int4 import Int4OpaqueTensor

    # Some wheels have only Python in them.
    if not torch._C._dispatch_has_kernel_for_dispatch_key("torchao::da8w4_linear_cpu", "CPU"):
        raise Unavailable("this torchao wheel has no CPU kernels")
    w = Int4OpaqueTensor.from_hp_da8w4(p.weight.dense.to(p.dtype), BLOCK)
    eye = torch.eye(p.k, dtype=torch.float32)
    return Layer(lambda x: F.linear(x, w), w.qdata.nbytes + w.scale_and_zero.nbytes, lambda: F.linear(eye, w).t())
