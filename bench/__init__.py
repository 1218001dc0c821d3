"""The benchmarks: most figures in README.md come from a command here, the others from one that is written there.

In the repository's root: ``python -m bench.linear``, ``bench.attention``, ``bench.qlora_step``, ``bench.soft_prompts``,
``bench.decode``, ``bench.prefix_decode``, ``bench.hotswap``, ``bench.quantize``; ``bench.targets`` holds it all against
targets, and ``python -m bench`` makes the report. Installed, the folder is ``pyfastpeft.bench``, and
``pyfastpeft bench`` makes the report. ``bench.gpu_estimate`` needs no GPU to say what bounds the kernels on one.
"""
