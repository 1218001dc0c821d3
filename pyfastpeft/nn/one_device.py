"""What ``nn.DataParallel`` cannot copy."""

from __future__ import annotations

from typing import NoReturn


class OneDevice:
    """A module, or what is in it, that holds more than parameters of its device: a replica would use the original's."""

    def _replicate_for_data_parallel(self) -> NoReturn:
        raise RuntimeError(
            f"nn.DataParallel cannot replicate a {type(self).__name__}; run one process a GPU (torchrun), or use one "
            "GPU (CUDA_VISIBLE_DEVICES=0)"
        )
