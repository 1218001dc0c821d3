"""What ``nn.DataParallel`` cannot copy."""

from __future__ import annotations

from typing import NoReturn


class OneDevice:
    """Base of modules that hold more of a device than parameters: a replica would go on using the original's."""

    def _replicate_for_data_parallel(self) -> NoReturn:
        raise RuntimeError(
            f"nn.DataParallel cannot replicate a {type(self).__name__}; run one process a GPU (torchrun), or use one "
            "GPU (CUDA_VISIBLE_DEVICES=0)"
        )
