"""The CUDA kernels, compiled as C++ and run on the CPU: a fiber or a thread a CUDA thread (tests/cuda_on_cpu)."""

from __future__ import annotations

import fcntl
import itertools
import os
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from test_linear_4bit import error

import pyfastpeft  # noqa: F401  (registers the CPU operators)
from pyfastpeft.formats.codes import FORMATS
from pyfastpeft.formats.double_quant import DYNAMIC_MAP, dequantize_scales, quantize_scales

ROOT = Path(__file__).parent.parent
SHIM = ROOT / "tests" / "cuda_on_cpu"
KERNELS = ROOT / "csrc" / "cuda"
COMPILER = shutil.which("g++")
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
BOUND = {torch.bfloat16: 4e-3, torch.float16: 7e-4}  # relative Frobenius error; bf16's is the promise

pytestmark = pytest.mark.skipif(COMPILER is None, reason="g++ is not installed")


# ---- building and running ------------------------------------------------------------------------------------------


def build(folder: Path, *flags: str) -> Path:
    """The program of tests/cuda_on_cpu/main.cpp with every kernel and every fault of SEEDED, in ``folder``."""
    folder.mkdir(exist_ok=True)
    for source in [*KERNELS.glob("*.cu"), *KERNELS.glob("*.cuh"), *KERNELS.glob("*.h"), *SHIM.glob("*")]:
        text = source.read_text()
        for number, (file, before, after) in enumerate(SEEDED, 1):
            if file == source.name:
                assert text.count(before) == 1, f"{before!r} is in {file} {text.count(before)} times"
                text = text.replace(before, after.replace("FAULT", f"(emulator::settings.fault == {number})"))
        (folder / source.name).write_text(text)
    program = folder / "run"
    common = ["-O1", "-std=c++20", "-ffp-contract=off", "-Wall", "-Werror", "-Wno-unknown-pragmas", "-pthread"]
    common.append('-DPF_CUDA_ARCHITECTURES=""')
    sources = ["main.cpp", "-x", "c++", *(source.name for source in KERNELS.glob("*.cu"))]
    command = [COMPILER, *common, *flags, "-I.", f"-I{ROOT / 'csrc'}", *sources, "-o", str(program)]
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
    stream: int = 0  # -1: unknown; below: a graph records it
    results: list[torch.Tensor] = field(default_factory=list)
    kept: int = 0  # memories that are not freed, after the call
    zeroed: int = 0  # bytes that it set to zero before its kernel

    def write(self, file) -> None:
        head = [self.operation, self.outputs, self.stream, len(self.numbers), *self.numbers, len(self.buffers)]
        file.write(np.array(head, np.int64).tobytes())
        for buffer in self.buffers:
            if buffer is None:
                file.write(np.array([-1, 0], np.int64).tobytes())
                continue
            # The storage from the start, so that a view begins where it would begin on a device.
            storage = torch.empty(0, dtype=torch.uint8).set_(buffer.untyped_storage())
            file.write(np.array([len(storage), buffer.storage_offset() * buffer.element_size()], np.int64).tobytes())
            file.write(storage.numpy().tobytes())

    def read(self, file) -> None:
        status, self.kept, self.zeroed = np.frombuffer(file.read(24), np.int64).tolist()
        assert status == 0, f"the call returned {status}"
        for buffer in self.buffers[-self.outputs :]:
            data = bytearray(file.read(buffer.numel() * buffer.element_size()))
            self.results.append(torch.frombuffer(data, dtype=buffer.dtype).view(buffer.shape) if data else buffer)


def run(
    program: Path,
    calls: list[Call],
    seed=0,
    resident=2,
    processors=4,
    shared_bytes=228 << 10,
    fault=None,
    capability=8,
):
    """Runs the calls; each then has its results. ``fault``: one of SEEDED."""
    cases, results = (program.parent / f"{name}_{os.getpid()}" for name in ("cases", "results"))
    with cases.open("wb") as file:
        for call in calls:
            call.write(file)
            call.results.clear()
    number = 0 if fault is None else 1 + SEEDED.index(fault)
    settings = map(str, (seed, resident, processors, shared_bytes, number, capability))
    ran = subprocess.run([program, cases, results, *settings], capture_output=True, text=True, timeout=300)
    if ran.returncode != 0:
        raise RuntimeError(ran.stdout + ran.stderr)
    with results.open("rb") as file:
        for call in calls:
            call.read(file)


def poisoned(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.full((*shape, torch.empty(0, dtype=dtype).element_size()), 0xFF, dtype=torch.uint8).view(dtype)[..., 0]


def built(tmp_path_factory) -> Path:
    """The program of all files' tests that need no sanitizer; it has no fault but the one that ``run`` asks for."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # of all processes of this run
    program = folder / "cuda_on_cpu" / "run"
    with (folder / "cuda_on_cpu.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return program if program.exists() else build(program.parent)


@pytest.fixture(scope="session")
def plain(tmp_path_factory) -> Path:
    return built(tmp_path_factory)


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
    rank_scaled: bool = False
    dtype: torch.dtype = torch.float32
    b_transposed: bool = False
    factor: float = 0.75

    def make(self, w: Weight) -> None:
        self.a = torch.randn(self.slots, self.rank, w.k).div(w.k**0.5).to(self.dtype)
        b = torch.randn(self.slots, w.n, self.rank).to(self.dtype)
        self.b = b.mT.contiguous().mT if self.b_transposed else b
        self.scaling = torch.rand(self.slots) + 0.5 if self.scaled else None
        self.rank_scale = torch.rand(self.rank) + 0.5 if self.rank_scaled else None


def linear(w: Weight, m: int, dtype=torch.bfloat16, lora: Lora | None = None, bias=None, ldx=None, x=None) -> Call:
    """A call of pf_linear_4bit, with its reference in float64."""
    ldx = ldx or w.k
    if x is None:
        x = torch.randn(m * ldx).to(dtype).as_strided((m, w.k), (ldx, 1))
    y = poisoned(m, w.n, dtype=dtype)
    numbers = [*w.numbers, m, ldx, DTYPES[dtype], DTYPES[bias.dtype] if bias is not None else 0]
    buffers = [*w.buffers, x, bias]
    dense = w.float32().double()
    reference, squares = x.double() @ dense.T, x.double() ** 2 @ (dense**2).T
    if bias is not None:
        reference += bias.double()
        squares += bias.double() ** 2
    if lora is not None:
        lora.make(w)
        rows = None if lora.rows is None else torch.tensor(lora.rows)
        (a_slot, a_row, _), (b_slot, b_row, b_column) = lora.a.stride(), lora.b.stride()
        numbers += [int(lora.factor * 1024), DTYPES[lora.dtype], DTYPES[lora.dtype], lora.rank, lora.slots]
        numbers += [a_slot, a_row, b_slot, b_row, b_column]
        buffers += [lora.a, lora.b, lora.scaling, lora.rank_scale, rows]
        for i in range(m):
            slot = 0 if rows is None else lora.rows[i]
            if 0 <= slot < lora.slots:
                scaling = torch.tensor(lora.factor, dtype=torch.float64)
                for scale in (None if lora.scaling is None else lora.scaling[slot], lora.rank_scale):
                    scaling = scaling if scale is None else scaling * scale
                row, a, b = x[i].double(), lora.a[slot].double(), lora.b[slot].double()
                reference[i] += b @ (scaling * (a @ row))
                squares[i] += b**2 @ (scaling**2 * (a**2 @ row**2))
    call = Call(0, numbers, [*buffers, y], 1)
    call.reference, call.squares = reference, squares
    return call


def check_linear(calls: list[Call]) -> None:
    for call in calls:
        for y in call.results:
            got = error(y, call.reference, squares=call.squares)
            assert got <= BOUND[y.dtype], (call.numbers, got)


# ---- linear_4bit -----------------------------------------------------------------------------------------------------


def test_every_format_block_size_and_dtype_agrees_with_float64(plain):
    calls = []
    blocks = itertools.chain(
        itertools.product(("nf4", "fp4"), (32, 64, 256, 4096), (False, True)),
        itertools.product(("int4",), (32, 64, 128), (False, True)),
    )
    rows = itertools.cycle((1, 2, 7, 8, 9, 16, 21, 40))
    for (quant_type, blocksize, nested), dtype in itertools.product(blocks, BOUND):
        w = Weight(70, 320, quant_type, blocksize, nested)
        calls.append(linear(w, next(rows), dtype, bias=torch.randn(70) if nested else None))
    run(plain, calls)
    check_linear(calls)


def test_inputs_with_a_mean_lose_no_accuracy(plain):
    calls = [linear(Weight(70, 4096), m, x=torch.rand(m, 4096).bfloat16()) for m in (3, 40)]
    run(plain, calls)
    check_linear(calls)


@pytest.mark.parametrize("shared_bytes", [228 << 10, 100 << 10])  # an H100's, and an Ada's: narrower tiles
def test_any_number_of_rows_gives_the_product(plain, shared_bytes):
    calls = [
        linear(Weight(67, 192), m, bias=torch.randn(67).bfloat16()) for m in (1, 3, 8, 15, 17, 32, 33, 64, 65, 128)
    ]
    calls += [linear(Weight(67, 192, "int4", 32, True), m) for m in (16, 32, 64)]
    run(plain, calls, shared_bytes=shared_bytes)
    check_linear(calls)


def test_any_shape_and_alignment_gives_the_product(plain):
    shapes = [(1, 64), (63, 64), (64, 320), (65, 576), (129, 1088), (1, 1), (3, 33), (70, 77), (65, 96), (5, 2050)]
    calls = [linear(Weight(n, k), 16 if n == 1 else m) for (n, k), m in zip(shapes, itertools.cycle((3, 5, 9)))]
    odd = Weight(66, 257, "int4", 32), Weight(40, 100, "fp4", 128, nested=True)
    calls += [linear(w, 3, dtype, bias=torch.randn(w.n).half()) for w in odd for dtype in BOUND]
    calls.append(linear(Weight(66, 128, offset=1), 4))  # codes that begin at an odd byte
    calls.append(linear(Weight(66, 128), 4, ldx=136))  # rows of x with something between them
    calls.append(linear(Weight(66, 128), 4, ldx=131))  # so that they begin anywhere
    calls.append(linear(Weight(66, 128), 4, x=torch.randn(5 + 4 * 128).bfloat16()[5:].view(4, 128)))
    run(plain, calls)
    check_linear(calls)


@pytest.mark.parametrize("processors", [1, 5, 40])
def test_splits_over_the_columns_add_up_one_call_after_another(plain, processors):
    calls = [linear(Weight(n, k), m) for n, k, m in [(64, 2112, 2), (130, 1024, 16), (70, 640, 70)]]
    calls.append(linear(Weight(64, 2112), 2, lora=Lora(5)))
    calls.append(linear(Weight(67, 999), 2, lora=Lora(5)))
    run(plain, calls * 2, processors=processors)
    check_linear(calls)


def test_calls_of_a_stream_share_counters_and_a_graph_s_have_their_own(plain):
    """That all are zero again after a call is seen after every call of these tests."""

    def calls(stream):
        made = [linear(Weight(64, 2112), 2), linear(Weight(130, 640), 9, lora=Lora(20))]
        for call in made:
            call.stream = stream
        return made

    streams = (-2, 0, 7, -3, 0, -2)  # and graphs
    every = [call for stream in (*streams, -1) for call in calls(stream)]
    run(plain, every, processors=40)
    check_linear(every)
    assert [call.kept for call in every] == [1, 1, 2, 2, 3, 3, *[4] * 8]
    assert all(call.zeroed == 0 for call in every[:-2])
    assert all(0 < call.zeroed < 256 for call in every[-2:])  # of a workspace of tens of kilobytes


def test_a_call_whose_blocks_need_not_meet_has_no_counters(plain):
    calls = [linear(Weight(64, 64), 2), linear(Weight(64, 64), 2)]
    calls[1].stream = -1
    run(plain, calls)
    check_linear(calls)
    assert all(call.kept == call.zeroed == 0 for call in calls)


def test_streams_past_those_with_kept_counters_are_served_too(plain):
    calls = [linear(Weight(64, 64), 1, lora=Lora(1)) for _ in range(258)]
    for stream, call in enumerate(calls):
        call.stream = stream
    run(plain, calls)
    check_linear(calls)
    assert [(call.kept, call.zeroed > 0) for call in calls[254:]] == [
        (255, False),
        (256, False),
        (256, True),
        (256, True),
    ]


def test_adapters_of_any_rank_are_added(plain):
    calls = []
    for rank, (m, n, k) in zip(
        (1, 2, 7, 8, 15, 16, 17, 32, 33, 64, 70),
        itertools.cycle([(1, 67, 640), (9, 64, 192), (20, 130, 1088), (3, 5, 33)]),
    ):
        dtype = (torch.float32, torch.bfloat16, torch.float16)[rank % 3]
        scaled = {"scaled": rank % 2 == 0, "rank_scaled": rank % 4 < 2}
        lora = Lora(rank, dtype=dtype, b_transposed=rank % 5 == 0, **scaled)
        calls.append(linear(Weight(n, k), m, torch.float16 if rank % 4 == 0 else torch.bfloat16, lora))
    calls.append(linear(Weight(5, 64), 128, lora=Lora(8230)))  # more counters than are kept
    run(plain, calls)
    check_linear(calls)
    assert [call.zeroed > 0 for call in calls] == [False] * (len(calls) - 1) + [True]


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_each_row_has_the_adapter_of_its_slot_or_none(plain, seed):
    rows = [[-1, 0, 1, 2, 3, 0, 7, -5, 2], [2] * 9, [-1] * 9, [0, 1, 2] * 6, [*range(12), 99]]
    calls = [linear(Weight(70, 640), len(r), lora=Lora(9, 3, r)) for r in rows]
    calls.append(linear(Weight(33, 1100), 9, lora=Lora(20, 3, rows[0], dtype=torch.bfloat16)))
    calls.append(linear(Weight(70, 320), 0, lora=Lora(4, 2, [])))
    run(plain, calls, seed=seed, resident=1 + seed)
    check_linear([call for call in calls if call.results[0].numel()])


def test_the_same_call_gives_the_same_bits_in_every_schedule(plain):
    calls = [
        linear(Weight(70, 2112), 9, lora=Lora(20, 3, [-1, 0, 1, 2, 3, 0, 7, -5, 2])),
        linear(Weight(66, 512, "int4", 32, True), 33, torch.float16),
    ]
    run(plain, calls)
    first = [call.results[0] for call in calls]
    for seed in range(1, 5):
        run(plain, calls, seed=seed, resident=1 + seed % 4)
        assert all(torch.equal(call.results[0], y) for call, y in zip(calls, first, strict=True))


def test_nan_and_inf_stay_in_their_rows_and_adapters(plain):
    w = Weight(70, 320)
    x = torch.randn(6, 320).bfloat16()
    x[1, 7], x[3, 300] = float("nan"), float("inf")
    plain_call, slots = linear(w, 6, x=x), linear(w, 6, x=x, lora=Lora(8, 2, [0, -1, 1, -1, -1, 0]))
    slots.buffers[10][1] = float("nan")  # B of slot 1
    slots.buffers[9][0, 3, 5] = float("inf")  # A of slot 0
    weight = linear(Weight(70, 77, "int4"), 6, x=torch.randn(6, 77).bfloat16())
    weight.buffers[1][3] = float("nan")
    calls = [plain_call, slots, weight]
    run(plain, calls)
    finite = [call.results[0].isfinite().all(1).tolist() for call in calls[:2]]
    assert finite[0] == [True, False, True, False, True, True]
    assert finite[1] == [False, False, False, False, True, False]
    columns = weight.results[0].isnan().all(0)
    blocks = torch.arange(70 * 77).view(70, 77) // 64
    assert torch.equal(columns, (blocks == 3).any(1)) and weight.results[0][:, ~columns].isfinite().all()


# ---- quantize_4bit, dequantize_4bit ----------------------------------------------------------------------------------


def quantize(values: torch.Tensor, quant_type: str, blocksize: int) -> Call:
    fmt, count = FORMATS[quant_type], values.numel()
    blocks = -(-count // blocksize)
    outputs = [
        poisoned((count + 1) // 2, dtype=torch.uint8),
        poisoned(blocks, dtype=torch.float32),
        poisoned(blocks, dtype=torch.float32) if fmt.has_zero else torch.empty(0),
    ]
    call = Call(2, [DTYPES[values.dtype], count, fmt.id, blocksize], [values, *outputs], 3)
    call.reference = torch.ops.pyfastpeft.quantize_4bit(values, fmt.id, blocksize)
    return call


def test_quantize_gives_the_bits_of_the_cpu(plain):
    calls = []
    for quant_type, blocksize in itertools.product(FORMATS, (32, 64, 128, 256, 512, 4096)):
        if blocksize not in FORMATS[quant_type].blocksizes:
            continue
        for dtype, count in zip(itertools.cycle(DTYPES), (1, blocksize - 1, blocksize, 3 * blocksize + 5, 4097)):
            values = torch.randn(count).to(dtype)
            if count > 40:
                values[:31], values[-1] = 0.0, -0.0
            calls.append(quantize(values, quant_type, blocksize))
    unusual = torch.randn(8 * 64 + 3)
    unusual[0:64] = 0.0
    unusual[70], unusual[135], unusual[200] = float("nan"), float("inf"), float("-inf")
    unusual[256:320] = 1e-41
    unusual[320:384], unusual[384:448] = 3.0, torch.linspace(-1, 1, 64)
    # Midpoints between codes: a tie takes the lower one.
    for name in ("nf4", "fp4"):
        ordered = FORMATS[name].table.sort().values
        ties = torch.cat([torch.ones(1), (ordered[:-1] + ordered[1:]) / 2, torch.zeros(48)])
        calls.append(quantize(torch.cat([unusual, torch.zeros(61), ties]), name, 64))
        calls.append(quantize(ties[:40].clone(), name, 64))
    calls.append(quantize(unusual, "int4", 64))
    calls.append(quantize(torch.randn(203).bfloat16()[3:], "nf4", 64))  # not aligned
    run(plain, calls)
    for call in calls:
        codes, scale, zero = call.reference
        assert torch.equal(call.results[0], codes.flatten()), call.numbers
        assert torch.equal(call.results[1].nan_to_num(7e7), scale.nan_to_num(7e7)), call.numbers
        if zero.numel():
            assert torch.equal(call.results[2].nan_to_num(7e7), zero.nan_to_num(7e7)), call.numbers


def dequantize(w: Weight, row0: int, rows: int, dtype: torch.dtype) -> Call:
    out = poisoned(rows, w.k, dtype=dtype)
    call = Call(1, [*w.numbers, row0, rows, DTYPES[dtype]], [*w.buffers, out], 1)
    codes, fmt = w.codes.clone().unsqueeze(1), FORMATS[w.quant_type]
    whole = torch.ops.pyfastpeft.dequantize_4bit(codes, w.scale, w.zero, fmt.id, w.blocksize, [w.n, w.k], dtype)
    call.reference = whole[row0 : row0 + rows]
    return call


def test_dequantize_gives_the_bits_of_the_cpu(plain):
    weights = [
        Weight(n, k, q, b, nested)
        for n, k in ((20, 512), (7, 77), (9, 4))
        for q, b in (("nf4", 64), ("fp4", 256), ("int4", 32))
        for nested in (False, True)
    ]
    weights += [Weight(9, 513, blocksize=4096), Weight(6, 64, offset=1)]
    parts = [(0, None), (1, 3), (2, 1), (3, 0)]
    calls = [
        dequantize(w, row0, w.n if rows is None else rows, dtype)
        for w in weights
        for row0, rows in parts
        for dtype in DTYPES
    ]
    run(plain, calls)
    for call in calls:
        assert torch.equal(call.results[0], call.reference), call.numbers


# ---- seeded faults, and the sanitizers -------------------------------------------------------------------------------

LINEAR, DEQUANTIZE, QUANTIZE = "linear_4bit.cu", "dequantize_4bit.cu", "quantize_4bit.cu"
# What: a text that is there once, and what stands there instead, FAULT being 1 while the fault is asked for.
FAULTS = {
    "a wait that leaves a group too many": (
        LINEAR,
        "cp_async_wait<kStages - 2>();",
        "if (FAULT) cp_async_wait<kStages - 1>(); else cp_async_wait<kStages - 2>();",
    ),
    "no barrier in the sweep": (LINEAR, "__syncthreads();\n    copy(", "if (!FAULT) __syncthreads();\n    copy("),
    "no barrier before warps are added": (
        LINEAR,
        "__syncthreads();\n  const int row = threadIdx",
        "if (!FAULT) __syncthreads();\n  const int row = threadIdx",
    ),
    "no barrier before a split arrives": (
        LINEAR,
        "__syncthreads();\n  if (threadIdx.x == 0) {\n    flags[1]",
        "if (!FAULT) __syncthreads();\n  if (threadIdx.x == 0) {\n    flags[1]",
    ),
    "no wait for S": (LINEAR, "while (load_acquire(p.at.ready)", "while (!FAULT && load_acquire(p.at.ready)"),
    "a counter that stays": (
        LINEAR,
        "store_relaxed(p.at.splits_done + tile, 0)",
        "store_relaxed(p.at.splits_done + tile, FAULT)",
    ),
    "a unit too many in the last step": (LINEAR, "unit < last_units", "unit < last_units + FAULT"),
    "blocks that leave before the last": (
        LINEAR,
        "p.plan.tasks() + p.plan.tiles() - 1) return",
        "p.plan.tasks() + p.plan.tiles() - 1 - FAULT) return",
    ),
    "counters that are not set to zero": (
        LINEAR,
        "counted * sizeof(uint32_t)",
        "counted * sizeof(uint32_t) / (1 + FAULT)",
    ),
    "a row too many": (LINEAR, "if (n >= p.w.n) return", "if (n >= p.w.n + FAULT) return"),
    "a slot too many": ("lora.cuh", "slot < lora.slots", "slot < lora.slots + FAULT"),
    "the nibbles of a pair swapped": (
        LINEAR,
        "value[entry / 16], value[entry % 16]",
        "value[FAULT ? entry % 16 : entry / 16], value[FAULT ? entry / 16 : entry % 16]",
    ),
    "the scales of another step": (LINEAR, "= step % 2 * scale_stage + (", "= (step + FAULT) % 2 * scale_stage + ("),
    "dequantize: the other nibble": (DEQUANTIZE, "4 * (e ^ 1)", "4 * (e ^ !FAULT)"),
    "dequantize: a group past the end": (
        DEQUANTIZE,
        "block_start + kGroups * kThreads * 8 > count",
        "block_start + kGroups * kThreads * 8 * !FAULT > count",
    ),
    "quantize: an element too many": (QUANTIZE, "if (c + i >= size) continue", "if (c + i >= size + FAULT) continue"),
    "quantize: lanes that are not asked": (QUANTIZE, "other < lanes;", "other < lanes / (1 + FAULT);"),
}
# Those of sm_90's kernel, of which test_cuda_sm90_on_cpu.py asks; None: nothing of the text's first statement.
_HOPPER = {
    "no wait for x": ("barrier_wait(&sh.x_full[step], panel % 2);", None),
    "no wait for the codes": ("barrier_wait(&sh.codes_full[at], round_of<kPanels>(panel));", None),
    "no wait before x is overwritten": ("barrier_wait(&sh.x_empty[at], round_of<kSteps>(step) ^ 1);", None),
    "codes given back too early": ("(step == kSteps - 1) release", "(step == (FAULT ? 0 : kSteps - 1)) release"),
    "registers written while a product reads them": ("wgmma_wait<1>();", None),
    "sums read before they are done": ("wgmma_wait<0>();\n  release_x", None),
    "no fence before a product": ("wgmma_fence();\n#pragma unroll\n      for (int i = 0; i < 4; ++i)\n#pragma unroll\n"
                                  "        for (int c = 0; c < kCount; ++c)\n          wgmma<T>", None),
    "no barrier before sums overwrite x": ("named_sync(1, kConsumers);\n  float (*part)", None),
    "no wait for S": ("wait_for_previous_grid();", None),
    "a phase of long ago": ("gone.\n  named_sync(2, ", "gone.\n  if (!FAULT) named_sync(2, "),
    "the half of a pair twice": ("half = task.rank % 2", "half = (FAULT ? 0 : task.rank % 2)"),
    "blocks that do not wait for one another": ("cluster_sync();\n    store", None),
    "the byte of another lane": ("turn = (8 * (threadIdx.x % 4)", "turn = (8 * ((threadIdx.x + FAULT) % 4)"),
    "registers in another order": ("[i + j % 2 * 2]", "[FAULT ? i * 2 + j % 2 : i + j % 2 * 2]"),
    "the adapter of another slot": ("== slot) sums[", "== slot + FAULT) sums["),
    "a split left out": ("i < g.splits; ++i) {\n    ", "i < g.splits - FAULT; ++i) {\n    "),
    "scales of another segment": (">> segment_shift", ">> (segment_shift + FAULT)"),
    "half a pair of registers of the branch": ("rank / 4 ^ r % 8", "rank / 4 ^ (r + FAULT) % 8"),
}  # fmt: skip
HOPPER_FAULTS = {
    name: ("linear_4bit_sm90.cu", before, after or "if (!FAULT) " + before) for name, (before, after) in _HOPPER.items()
}
SEEDED = [*FAULTS.values(), *HOPPER_FAULTS.values()]
ONLY_A_RACE = "no barrier before a split arrives"  # hardly ever a wrong sum: ThreadSanitizer sees it
RACES = [name for name in FAULTS if name.startswith("no barrier")]


def sanitizer(tmp_path_factory, name: str, *flags: str) -> Path:
    folder = tmp_path_factory.mktemp("cuda")
    (folder / "empty.cpp").write_text("int main() {}")
    probe = subprocess.run([COMPILER, *flags, folder / "empty.cpp", "-o", folder / "probe"], capture_output=True)
    if probe.returncode != 0 or subprocess.run([folder / "probe"], capture_output=True).returncode != 0:
        pytest.skip(f"{COMPILER} has no working {name}")
    return build(folder / "faulty", "-g1", *flags)


@pytest.fixture(scope="session")
def address(tmp_path_factory) -> Path:
    flags = ("-fsanitize=address,alignment", "-fno-sanitize-recover=all")
    # Each access asks a function, which compiles in three quarters of the time that checks in its place take.
    calls = ("--param", "asan-instrumentation-with-call-threshold=0")
    return sanitizer(tmp_path_factory, "AddressSanitizer", *flags, *calls)


@pytest.fixture(scope="session")
def threads(tmp_path_factory) -> Path:
    return sanitizer(tmp_path_factory, "ThreadSanitizer", "-fsanitize=thread", "-DPF_THREADS")


def small_calls() -> list[Call]:
    """One of each kind, with the ends that faults like."""
    calls = [
        linear(Weight(67, 1088, nested=True), 9, lora=Lora(20, 3, [-1, 0, 1, 2, 3, 0, 7, -5, 2])),
        linear(Weight(65, 576), 3, lora=Lora(5)),
        linear(Weight(65, 576), 3, lora=Lora(5)),
        linear(Weight(20, 77, "int4", 32), 3),
        dequantize(Weight(21, 516), 0, 21, torch.float16),
        quantize(torch.rand(131) + 0.1, "int4", 64),
        quantize(torch.randn(2179), "nf4", 64),
    ]
    calls[2].stream = -1
    return calls


def hopper_calls() -> list[Call]:
    """For the kernel of sm_90: a pair of blocks, adapters of each row."""
    return [linear(Weight(67, 320, nested=True), 18, lora=Lora(9, 3, [-1, 0, 1, 2, 3, 0, 7, -5, 2] * 2))]


def check(calls: list[Call]) -> None:
    check_linear([call for call in calls if call.operation == 0])
    for call in calls:
        if call.operation == 1:
            assert torch.equal(call.results[0], call.reference)
        if call.operation == 2:
            for result, reference in zip(call.results, call.reference, strict=True):
                assert torch.equal(result, reference.flatten())


def test_nothing_outside_of_what_was_given_is_touched(address):
    calls = [*small_calls(), linear(Weight(70, 192, "int4", 32, True), 33), linear(Weight(3, 64), 1)]
    calls += [linear(Weight(3, 5), 2, lora=Lora(3)), dequantize(Weight(5, 9), 2, 3, torch.float32)]
    calls += [quantize(torch.randn(n), "nf4", 64) for n in (1, 65, 4097)]
    run(address, calls)
    check(calls)
    calls = hopper_calls()
    run(address, calls, processors=1, capability=9)
    check(calls)


def test_no_thread_reads_what_another_is_writing(threads):
    calls = small_calls()
    run(threads, calls, resident=3)
    check(calls)
    calls = hopper_calls()
    run(threads, calls, processors=1, capability=9)
    check(calls)


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault != ONLY_A_RACE])
def test_each_seeded_fault_is_found(plain, fault):
    calls = small_calls()
    for seed in range(4):
        try:
            run(plain, calls, seed=seed, resident=2 + 2 * seed, fault=FAULTS[fault])
            check(calls)
        except (AssertionError, RuntimeError) as found:
            print(f"found with seed {seed}: {found}")
            return
    pytest.fail(f"{fault}: nothing was wrong")


@pytest.mark.parametrize("fault", RACES)
def test_missing_barriers_are_races(threads, fault):
    """ThreadSanitizer follows 256 threads at once, fewer than two blocks have: it sees one race of six or so."""
    with pytest.raises(RuntimeError, match="data race"):
        for _ in range(80):
            run(threads, [linear(Weight(64, 1152), 16)], fault=FAULTS[fault], resident=3)
