"""Lets launches of Triton kernels on tensors of the CPU run the PTX that Triton emits for a GPU.

Import it before the kernels are launched. The GPU is the one that ``PTX_TARGET`` names (cuda:90).
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import torch
import triton
from launch import allow, launch, load, machine
from translate import translate
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend

from pyfastpeft.ops import backends, triton_kernels

TARGET = GPUTarget("cuda", int(os.environ["PTX_TARGET"].removeprefix("cuda:")), 32)
LIBRARY = machine()
edit: Callable[[str], str] | None = None
"""A change of the PTX before it runs: a fault that must be seen."""


@functools.cache
def loaded(ptx: str) -> str:
    """The prefix of a module's kernels."""
    prefix = f"{loaded.cache_info().misses}:"
    load(LIBRARY, translate(ptx), prefix)
    return prefix


def parameters(value, type_) -> Iterator[torch.Tensor | int | float | None]:
    """What PTX gets of an argument: of a tuple its parts, of what is compiled in nothing."""
    if isinstance(type_, tuple):
        for part, of in zip(value, type_, strict=True):
            yield from parameters(part, of)
    elif type_ != "constexpr":
        yield value


def launcher(kernel: triton.JITFunction, grid: tuple[int, ...]) -> Callable:
    def run(*arguments, **given) -> None:
        given = dict(zip(kernel.arg_names, arguments, strict=False)) | given
        compiled = kernel.run(grid=(1,), warmup=True, **given)
        ptx = compiled.asm["ptx"] if edit is None else edit(compiled.asm["ptx"])
        name = loaded(ptx) + compiled.metadata.name
        types = re.findall(r"\.param\s+\.(\w+)[^,)]*", ptx[ptx.index(".entry") : ptx.index("{", ptx.index(".entry"))])
        values = [v for name, type_ in compiled.src.signature.items() for v in parameters(given[name], type_)]
        allow(LIBRARY, *(v for v in values if isinstance(v, torch.Tensor)))
        values += [None] * (len(types) - len(values))  # scratch memory, which none of the kernels asks for
        threads = int(re.search(r"\.reqntid (\d+)", ptx)[1])
        typed = list(zip(types, values, strict=True))
        launch(LIBRARY, name, grid, threads, compiled.metadata.shared, typed)

    return run


def without_assembler(backend, stages, *arguments) -> None:
    add_stages(backend, stages, *arguments)
    stages["cubin"] = lambda ptx, metadata: b""


add_stages, CUDABackend.add_stages = CUDABackend.add_stages, without_assembler
triton.runtime.driver.set_active(
    SimpleNamespace(
        get_current_target=lambda: TARGET,
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
    )
)
triton.JITFunction.__getitem__ = launcher
backends.why_not_triton = triton_kernels.why_not = lambda device: None
