"""The CUDA kernels, compiled as C++ and run on the CPU: a fiber or a thread a CUDA thread (tests/cuda_on_cpu)."""

from __future__ import annotations

import itertools
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch

import pyfastpeft as fp
from pyfastpeft.formats.codes import FORMATS
from pyfastpeft.formats.double_quant import DYNAMIC_MAP, NestedScales, dequantize_scales, quantize_scales

ROOT = Path(__file__).parent.parent
SHIM = ROOT / "tests" / "cuda_on_cpu"
KERNELS = ROOT / "csrc" / "cuda"
COMPILER = shutil.which("g++")
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
BOUND = {torch.bfloat16: 4e-3, torch.float16: 7e-4}  # relative Frobenius error; bf16's is DESIGN's

pytestmark = pytest.mark.skipif(COMPILER is None, reason="g++ is not installed")


# ---- building and running ------------------------------------------------------------------------------------------


def build(folder: Path, flags: tuple[str, ...] = (), edits: dict[str, tuple[str, str]] | None = None) -> Path:
    """The program of tests/cuda_on_cpu/main.cpp with every kernel, in ``folder``.

    Args:
        edits: for a file of csrc/cuda, a text that is there once, and what stands there instead.
    """
    folder.mkdir()
    for source in [*KERNELS.glob("*.cu"), *KERNELS.glob("*.cuh"), KERNELS / "api.h", *SHIM.glob("*")]:
        text = source.read_text()
        if edits and source.name in edits:
            before, after = edits[source.name]
            assert text.count(before) == 1, f"{before!r} is in {source.name} {text.count(before)} times"
            text = text.replace(before, after)
        (folder / source.name).write_text(text)
    program = folder / "run"
    common = ["-std=c++20", "-ffp-contract=off", "-Wall", "-Werror", "-Wno-unknown-pragmas", "-pthread"]
    sources = ["main.cpp", "-x", "c++", "linear_4bit.cu", "dequantize_4bit.cu", "quantize_4bit.cu", "api.cu"]
    command = [COMPILER, "-O2", *common, *flags, "-I.", f"-I{ROOT / 'csrc'}", *sources, "-o", str(program)]
    built = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stderr
    return program


@dataclass
class Call:
    """A call of an operation of csrc/cuda/api.h: its numbers, and buffers of which the last ``outputs`` come back."""

    operation: int
    numbers: list[int]
    buffers: list[torch.Tensor | None]
    outputs: int
    results: list[torch.Tensor] = field(default_factory=list)

    def write(self, file) -> None:
        head = [self.operation, self.outputs, len(self.numbers), *self.numbers, len(self.buffers)]
        file.write(np.array(head, np.int64).tobytes())
        for buffer in self.buffers:
            if buffer is None:
                file.write(np.array([-1, 0], np.int64).tobytes())
                continue
            # The storage from the start, so that a view begins where it would begin on a device.
            storage = bytes(buffer.untyped_storage())
            file.write(np.array([len(storage), buffer.storage_offset() * buffer.element_size()], np.int64).tobytes())
            file.write(storage)

    def read(self, file) -> None:
        (status,) = np.frombuffer(file.read(8), np.int64)
        assert status == 0, f"the call returned {status}"
        for buffer in self.buffers[-self.outputs :]:
            data = bytearray(file.read(buffer.numel() * buffer.element_size()))
            self.results.append(torch.frombuffer(data, dtype=buffer.dtype).view(buffer.shape) if data else buffer)


def run(program: Path, calls: list[Call], seed=0, resident=2, processors=4, shared_bytes=228 << 10, environment=None):
    """Runs the calls; each then has its results."""
    cases, results = program.parent / "cases", program.parent / "results"
    with cases.open("wb") as file:
        for call in calls:
            call.write(file)
            call.results.clear()
    settings = map(str, (seed, resident, processors, shared_bytes))
    ran = subprocess.run(
        [program, cases, results, *settings], capture_output=True, text=True, timeout=300, env=environment
    )
    if ran.returncode != 0:
        raise RuntimeError(ran.stdout + ran.stderr)
    with results.open("rb") as file:
        for call in calls:
            call.read(file)


def poisoned(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.full((*shape, torch.empty(0, dtype=dtype).element_size()), 0xFF, dtype=torch.uint8).view(dtype)[..., 0]


@pytest.fixture(scope="session")
def plain(tmp_path_factory) -> Path:
    return build(tmp_path_factory.mktemp("cuda") / "plain")


# ---- operands --------------------------------------------------------------------------------------------------------


@dataclass
class Weight:
    """W [n, k] in storage order with random codes."""

    n: int
    k: int
    quant_type: str = "nf4"
    blocksize: int = 64
    nested: bool = False
    offset: int = 0  # of the codes, in bytes

    def __post_init__(self):
        fmt, count = FORMATS[self.quant_type], self.n * self.k
        blocks = -(-count // self.blocksize)
        self.codes = torch.randint(0, 256, ((count + 1) // 2 + self.offset,), dtype=torch.uint8)[self.offset :]
        self.scale, self.nest = torch.rand(blocks) + 0.2, (None, None)
        self.zero = torch.randn(blocks) if fmt.has_zero else None
        if self.nested:
            self.scale8, state = quantize_scales(self.scale)
            self.scale = dequantize_scales(self.scale8, state)
            self.nest = state.absmax2, state.offset.reshape(1)

    @property
    def numbers(self) -> list[int]:
        return [self.n, self.k, self.blocksize, FORMATS[self.quant_type].id]

    @property
    def buffers(self) -> list[torch.Tensor | None]:
        if self.nested:
            return [self.codes, None, self.scale8, self.zero, *self.nest, DYNAMIC_MAP]
        return [self.codes, self.scale, None, self.zero, None, None, None]

    def float32(self) -> torch.Tensor:
        fmt, count = FORMATS[self.quant_type], self.n * self.k
        codes = torch.stack([self.codes >> 4, self.codes & 15], 1).flatten()[:count]
        return fmt.dequantize(codes, self.scale, self.zero, self.blocksize).view(self.n, self.k)


@dataclass
class Lora:
    rank: int
    slots: int = 1
    rows: list[int] | None = None  # slot of each row of x
    scaled: bool = True
    dtype: torch.dtype = torch.float32
    b_transposed: bool = False
    factor: float = 0.75

    def make(self, w: Weight) -> None:
        self.a = torch.randn(self.slots, self.rank, w.k).div(w.k**0.5).to(self.dtype)
        b = torch.randn(self.slots, w.n, self.rank).to(self.dtype)
        self.b = b.mT.contiguous().mT if self.b_transposed else b
        self.scaling = torch.rand(self.slots) + 0.5 if self.scaled else None


def linear(w: Weight, m: int, dtype=torch.bfloat16, lora: Lora | None = None, bias=None, ldx=None, x=None) -> Call:
    """A call of pf_linear_4bit, with its reference in float64."""
    ldx = ldx or w.k
    if x is None:
        x = torch.randn(m * ldx).to(dtype).as_strided((m, w.k), (ldx, 1))
    y = poisoned(m, w.n, dtype=dtype)
    numbers = [*w.numbers, m, ldx, DTYPES[dtype], DTYPES[bias.dtype] if bias is not None else 0]
    buffers = [*w.buffers, x, bias]
    reference = x.double() @ w.float32().double().T
    if bias is not None:
        reference += bias.double()
    if lora is not None:
        lora.make(w)
        rows = None if lora.rows is None else torch.tensor(lora.rows)
        (a_slot, a_row, _), (b_slot, b_row, b_column) = lora.a.stride(), lora.b.stride()
        numbers += [int(lora.factor * 1024), DTYPES[lora.dtype], DTYPES[lora.dtype], lora.rank, lora.slots]
        numbers += [a_slot, a_row, b_slot, b_row, b_column]
        buffers += [lora.a, lora.b, lora.scaling, rows]
        for i in range(m):
            slot = 0 if rows is None else lora.rows[i]
            if 0 <= slot < lora.slots:
                scaling = lora.factor * (1.0 if lora.scaling is None else lora.scaling[slot].item())
                s = x[i].double() @ lora.a[slot].double().T
                reference[i] += scaling * (lora.b[slot].double() @ s)
    call = Call(0, numbers, [*buffers, y], 1)
    call.reference = reference
    return call


def check_linear(calls: list[Call]) -> None:
    for call in calls:
        y, reference = call.results[0].double(), call.reference
        dtype = call.results[0].dtype
        error = ((y - reference).norm() / reference.norm()).item()
        assert error <= BOUND[dtype], (call.numbers, error)


# ---- linear_4bit -----------------------------------------------------------------------------------------------------


def test_products_agree_with_float64(plain):
    torch.manual_seed(0)
    calls = [linear(Weight(64, 256), 1), linear(Weight(70, 640), 5), linear(Weight(200, 384), 16), linear(Weight(130, 192), 33),
             linear(Weight(70, 77), 5), linear(Weight(70, 512, "int4"), 5), linear(Weight(70, 512, "fp4", 32, True), 5),
             linear(Weight(70, 2112), 5, lora=Lora(16)), linear(Weight(70, 512), 12, torch.float16, lora=Lora(33, 3, [-1, 0, 1, 2, 5, 0] * 2))]
    import time
    t = time.time()
    for seed in (0, 1, 2):
        run(plain, calls, seed=seed)
        check_linear(calls)
        print(seed, time.time() - t)
