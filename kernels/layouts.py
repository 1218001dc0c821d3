"""How tensors lie in memory for the kernels."""

from torch import Tensor


def with_contiguous_columns(t: Tensor) -> Tensor:
    """``t`` itself where its last dimension lies side by side, else a copy."""
    return t if t.stride(-1) == 1 or t.shape[-1] <= 1 else t.contiguous()
