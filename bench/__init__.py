"""The benchmarks: every figure that README.md states comes from a command here.

In the repository's root: ``python -m bench.linear``, ``bench.targets``, ``bench.qlora_step``, ``bench.soft_prompts``,
``bench.decode``, ``bench.hotswap``, ``bench.quantize``; ``python -m bench`` makes the report. Installed, the folder is
``pyfastpeft.bench``, and ``pyfastpeft bench`` makes the report.
"""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when the hub clients start
