"""Loads translated PTX and launches it on tensors of the CPU."""

from __future__ import annotations

import ctypes
import functools
import json
import os
import random
import struct
import subprocess
from array import array
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from translate import SIZES, Module

HERE = Path(__file__).parent
FOLDER = Path(os.environ["PTX_FOLDER"])  # of what is compiled, once for all processes


class Fault(Exception):
    """What a kernel did that no GPU allows, or that no GPU would survive."""


# Hidden: the libraries of one process must not share what the headers define. To optimize more takes longer than it
# saves.
COMPILER = [os.environ.get("CXX", "c++"), "-std=c++20", "-O1", "-w", "-fPIC", "-fvisibility=hidden"]
COMPILER += ["-fno-strict-aliasing", f"-I{HERE}", f"-I{HERE.parents[1] / 'csrc'}"]


def in_parallel(commands: list[list]) -> None:
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(functools.partial(subprocess.run, check=True), commands))


def built(name: str, source: Path, *options: str) -> Path:
    """``name`` in the folder that processes share, compiled from ``source``."""
    out = FOLDER / name
    if not out.exists():
        made = FOLDER / f"{os.getpid()}.{name}"
        subprocess.run([*COMPILER, *options, source, "-o", made], check=True)
        made.replace(out)
    return out


def machine() -> ctypes.CDLL:
    """machine.h by itself."""
    return ctypes.CDLL(str(built("machine.so", HERE / "machine.h", "-shared", "-x", "c++")))


class Functions:
    """The functions of instructions, compiled where they are first asked for: by whichever process."""

    def __init__(self):
        self.addresses: dict[str, int] = {}
        self.libraries = []
        for listed in FOLDER.glob("*.json"):
            self._open(listed, json.loads(listed.read_text()))

    def __call__(self, bodies: list[str]) -> list[int]:
        new = [body for body in dict.fromkeys(bodies) if body not in self.addresses]
        if new:
            self._compile(new)
        return [self.addresses[body] for body in bodies]

    def _open(self, listed: Path, bodies: list[str]) -> None:
        self.libraries.append(ctypes.CDLL(str(listed.with_suffix(".so"))))
        held = (ctypes.c_uint64 * len(bodies)).in_dll(self.libraries[-1], "functions")
        self.addresses |= dict(zip(bodies, held, strict=True))

    def _compile(self, bodies: list[str]) -> None:
        built("runtime.h.gch", HERE / "runtime.h", "-x", "c++-header")
        signature = "(Warp& w, const uint32_t* o)"
        lines = ['#include "runtime.h"', "namespace ptx {"]
        for i, body in enumerate(bodies):
            start = "Block& block = *w.block; const uint32_t active = w.active;"
            lines.append(f"static void f{i}{signature} {{ {start} {body} }}")
        names = ", ".join(f"f{i}" for i in range(len(bodies)))
        table = f'extern "C" __attribute__((visibility("default"))) void (*const functions[]){signature} = {{{names}}};'
        source = FOLDER / f"functions_{os.getpid()}_{len(self.libraries)}.cpp"
        source.write_text("\n".join([*lines, table, "}", ""]))
        built(f"{source.stem}.so", source, "-shared", f"-I{FOLDER}")
        listed = source.with_suffix(".json")
        self._open(listed, bodies)
        begun = source.with_suffix(".part")
        begun.write_text(json.dumps(bodies))
        begun.replace(listed)


functions = Functions()
TABLES: list[ctypes.Array] = []  # of modules, in global memory


def load(library: ctypes.CDLL, module: Module, prefix: str = "") -> None:
    """Makes a module's kernels those of ``library``, which includes machine.h, under their names behind ``prefix``."""
    tables = {name: ctypes.create_string_buffer(held, len(held)) for name, held in module.tables.items()}
    TABLES.extend(tables.values())
    places = {name: ctypes.addressof(held) for name, held in tables.items()}
    functions([body for program in module.kernels.values() for body in program.functions])
    for name, program in module.kernels.items():
        constants = array("Q", [places[c] if isinstance(c, str) else c for c in program.constants])
        lists = [array("Q", functions(program.functions)), program.code, program.blocks, constants]
        passed = [(prefix + name).encode()]
        for held in lists:
            passed += [ctypes.c_void_p(held.buffer_info()[0]), ctypes.c_uint64(len(held))]
        passed += [program.texts, ctypes.c_uint64(len(program.texts))]
        parameters = program.parameters
        passed += [ctypes.c_void_p(parameters.buffer_info()[0]), ctypes.c_uint64(len(parameters) // 2)]
        library.ptx_kernel(*passed, ctypes.c_void_p(program.sizes.buffer_info()[0]))


def allow(library: ctypes.CDLL, *tensors: torch.Tensor | None) -> None:
    """Makes the tensors' storage, beside the modules' tables, the memory that kernels of ``library`` may touch."""
    ranges = [(ctypes.addressof(held), ctypes.addressof(held) + len(held)) for held in TABLES]
    for t in tensors:
        if t is not None:
            storage = t.untyped_storage()
            ranges.append((storage.data_ptr(), storage.data_ptr() + storage.nbytes()))
    held = array("Q", [end for pair in ranges for end in pair])
    library.ptx_memory(ctypes.c_void_p(held.buffer_info()[0]), ctypes.c_uint64(len(ranges)))


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
        ctypes.c_uint64(len(packed)),
        random.randrange(100),
        error,
        ctypes.c_uint64(len(error)),
    )
    if error.value:
        raise Fault(f"{name}: {error.value.decode()}")
