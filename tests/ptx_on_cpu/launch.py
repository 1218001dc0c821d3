"""Builds translated PTX and launches it on tensors of the CPU."""

from __future__ import annotations

import ctypes
import os
import random
import struct
import subprocess
from pathlib import Path

import torch
from translate import SIZES, translate

HERE = Path(__file__).parent


class Fault(Exception):
    """What a kernel did that no GPU allows, or that no GPU would survive."""


# Hidden: the libraries of one process must not share what the header defines. Unoptimized: compiling takes longer than
# running, and with a compiled header (found beside the source) half as long.
COMPILER = [os.environ.get("CXX", "c++"), "-std=c++20", "-O0", "-w", "-fPIC", "-fvisibility=hidden"]
COMPILER += [f"-I{HERE}", f"-I{HERE.parents[1] / 'csrc'}"]


def build(ptx: str, out: Path) -> ctypes.CDLL:
    """The kernels of a PTX module as a library at ``out``."""
    header, source = out.with_name("runtime.h.gch"), out.with_suffix(".cpp")
    if not header.exists():
        subprocess.run([*COMPILER, "-x", "c++-header", str(HERE / "runtime.h"), "-o", str(header)], check=True)
    source.write_text(translate(ptx))
    subprocess.run([*COMPILER, "-shared", str(source), "-o", str(out)], check=True)
    return ctypes.CDLL(str(out))


def allow(library: ctypes.CDLL, *tensors: torch.Tensor | None) -> None:
    """Makes the tensors' storage the memory that kernels of ``library`` may touch."""
    library.ptx_forget()
    for t in tensors:
        if t is not None:
            storage = t.untyped_storage()
            library.ptx_allow(ctypes.c_uint64(storage.data_ptr()), ctypes.c_uint64(storage.nbytes()))


def launch(
    library: ctypes.CDLL,
    name: str,
    grid: tuple[int, ...],
    threads: int,
    shared: int,
    arguments: list[tuple[str, torch.Tensor | int | float | None]],
) -> None:
    """Runs a kernel to its end; the order in which warps run is drawn from ``random``.

    Args:
        arguments: PTX type and value of each parameter, in order.
    """
    packed = b""
    for type_, value in arguments:
        if isinstance(value, torch.Tensor):
            value = value.data_ptr()
        packed += b"\0" * (-len(packed) % SIZES[type_])
        form = {"f32": "f", "f64": "d"}.get(type_) or {1: "B", 2: "H", 4: "I", 8: "Q"}[SIZES[type_]]
        packed += struct.pack(f"<{form}", value if form in "fd" else (value or 0) % 2 ** (8 * SIZES[type_]))
    error = ctypes.create_string_buffer(512)
    three = [(*sizes, 1, 1)[:3] for sizes in (grid, (threads,))]
    library.ptx_launch(
        name.encode(),
        *((ctypes.c_uint32 * 3)(*sizes) for sizes in three),
        shared,
        packed,
        random.randrange(100),
        error,
        ctypes.c_uint64(len(error)),
    )
    if error.value:
        raise Fault(f"{name}: {error.value.decode()}")
