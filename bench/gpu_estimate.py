"""What bounds the kernels on a GPU, from their machine code: an estimate that needs no GPU.

    python -m bench.gpu_estimate

Triton's kernels are compiled as the operators launch them, those of csrc/cuda where nvcc is (CUDA_HOME); what either
lacks is said. In the machine code of each the main loop is counted: bytes asked of memory, tensor-core operations,
cycles of shared memory (without bank conflicts and TMA's copies), instructions issued, and those of the integer, the
floating and the special pipe. The slowest of these is the bound, and its time the prediction; latencies, the loop's
entry and the epilogue are left out, so a kernel can only be slower. Of code without tensor-core operations the loops
are counted, or else all; of CUDA's conversions the shortest way that writes whole words.

Beside the 4-bit product stands what cuBLAS in bf16 could at best reach on the same GPU, and the target against it.
"slabs" is the product of many rows, W decoded for it: the dense product at its limit and the decoding one after the
other, as if what is decoded went to memory and not to the L2 cache. Writes bench/results/gpu_estimate.json.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import functools
import heapq
import itertools
import json
import math
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from pyfastpeft.ops.triton_kernels import _kernels, _tables

ROOT = Path(__file__).parents[1]
SCHEDULERS = 4  # of a multiprocessor, each of which issues one instruction a cycle
BLOCKSIZE = 64
BF16 = 2  # bytes


class Gpu(NamedTuple):
    """Vendor's figures. ``tensor``: dense bf16 operations a cycle and multiprocessor, by wgmma (if there) and by mma.
    ``floating``: cycles for which an instruction of a warp takes the floating pipe; the integer pipe is taken for two,
    the special one for eight.
    """

    name: str
    chip: str
    multiprocessors: int
    hertz: float
    bytes_per_s: float
    wgmma: float
    mma: float
    floating: int

    @property
    def peak(self) -> float:
        return max(self.wgmma, self.mma) * self.multiprocessors * self.hertz


GPUS = (
    Gpu("A100", "80", 108, 1.41e9, 2.04e12, 0, 2048, 2),
    Gpu("H100", "90", 132, 1.83e9, 3.35e12, 4096, 3072, 1),  # mma reaches three quarters
)


# ---- machine code ----------------------------------------------------------------------------------------------------


class Instruction(NamedTuple):
    address: int
    conditional: bool
    opcode: str
    operands: str

    @property
    def target(self) -> int | None:
        """Of a branch."""
        found = re.search(r"(0x[0-9a-f]+)\s*$", self.operands) if self.opcode.startswith("BRA") else None
        return found and int(found[1], 16)


def functions(sass: str) -> dict[str, list[Instruction]]:
    """The instructions of each function in what ``nvdisasm -c`` prints; targets of branches become addresses."""
    code: dict[str, list[Instruction]] = {}
    labels: dict[str, str] = {}
    name, waiting = "", []
    for line in sass.splitlines():
        if m := re.match(r"\s*\.section\s+\.text\.([\w$]+)", line):
            name = m[1]
        elif m := re.match(r"(\.L_\w+):", line):
            waiting.append(m[1])
        elif m := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;", line):
            labels |= dict.fromkeys(waiting, f"0x{m[1]}")
            waiting = []
            code.setdefault(name, []).append(Instruction(int(m[1], 16), m[2] is not None, m[3], m[4]))

    def resolved(i: Instruction) -> Instruction:
        return i._replace(operands=re.sub(r"`\((\.L_\w+)\)", lambda m: labels.get(m[1], m[0]), i.operands))

    return {name: [resolved(i) for i in body] for name, body in code.items()}


def is_tensor(i: Instruction) -> bool:
    return i.opcode.startswith(("HMMA", "HGMMA"))


def is_load(i: Instruction) -> bool:
    return i.opcode.startswith(("LDG.", "LDGSTS"))


def main_loop(code: list[Instruction]) -> list[Instruction]:
    """What a kernel does again and again: of the loops that hold no other loop with tensor-core operations the one with
    the most of these, of equal ones the shortest (the others mask); without such operations all innermost loops that
    read memory, or else the whole code.

    A loop is what lies between the target of branches that lead back and the last of them.
    """
    ends = {i.target: i.address for i in code if i.target is not None and i.target < i.address}
    loops = [[i for i in code if start <= i.address <= end] for start, end in ends.items()]
    tensor = any(map(is_tensor, code))
    loops = [loop for loop in loops if any(map(is_tensor if tensor else is_load, loop))]
    innermost = [loop for loop in loops if not any(set(other) < set(loop) for other in loops)]
    if tensor:
        return max(innermost, key=lambda loop: (sum(map(is_tensor, loop)), -len(loop)), default=code)
    return [i for loop in innermost for i in loop] or code


def is_narrow(i: Instruction) -> bool:
    return i.opcode.startswith("STG.") and width(i.opcode) < 4


def wide_path(code: list[Instruction]) -> list[Instruction]:
    """Of the ways from the entry to an exit that write to global memory, by four bytes a lane or more, the one with the
    fewest instructions: what whole blocks of a kernel do that has other code for what is left over."""
    place = {i.address: n for n, i in enumerate(code)}
    starts = {0, *(place[i.target] for i in code if i.target is not None)}
    starts |= {n + 1 for n, i in enumerate(code[:-1]) if i.opcode.startswith(("BRA", "EXIT"))}
    blocks = {a: code[a:b] for a, b in itertools.pairwise([*sorted(starts), len(code)])}
    blocks = {start: block for start, block in blocks.items() if not any(map(is_narrow, block))}
    ways = []
    for start, block in blocks.items():
        last = block[-1]
        if last.target is not None:
            ways.append((start, place[last.target]))
        if last.conditional or not last.opcode.startswith(("BRA", "EXIT")):
            ways.append((start, start + len(block)))

    def shortest(ends: list[int], ways: list[tuple[int, int]]) -> dict[int, tuple[int, ...]]:
        """Of the ways from one of ``ends`` to each block the one with the fewest instructions."""
        waiting, found = [(len(blocks[end]), (end,)) for end in ends], {}
        while waiting:
            length, way = heapq.heappop(waiting)
            if way[-1] not in found:
                found[way[-1]] = way
                for a, b in ways:
                    if a == way[-1] and b in blocks:
                        heapq.heappush(waiting, (length + len(blocks[b]), (*way, b)))
        return found

    there = shortest([0], ways)
    back = shortest([s for s, block in blocks.items() if block[-1].opcode == "EXIT"], [(b, a) for a, b in ways])
    writing = [s for s, block in blocks.items() if any(i.opcode.startswith("STG.") for i in block)]
    both = ((*there[s], *back[s][-2::-1]) for s in writing if s in there and s in back)
    return [i for start in min(both, key=lambda way: sum(len(blocks[s]) for s in way)) for i in blocks[start]]


def width(opcode: str) -> int:
    """Bytes of a lane that a load or store moves."""
    parts = opcode.split(".")
    return next((int(p) // 8 for p in parts if p in ("64", "128")), 2 if "U16" in parts else 1 if "U8" in parts else 4)


def shared_cycles(i: Instruction) -> float:
    """Cycles (of 128 bytes) that a warp takes shared memory for, without bank conflicts."""
    if m := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", i.opcode):  # four warps; the weights may be in registers
        rows, columns, depth = map(int, m.groups())
        from_registers = re.match(r"R\d+, R\d+", i.operands)
        return (columns + (0 if from_registers else rows)) * depth * BF16 / 128 / 4
    if i.opcode.startswith(("LDSM", "STSM")):
        return int(i.opcode[-1]) if i.opcode.endswith((".2", ".4")) else 1
    if i.opcode.startswith(("LDS", "STS", "LDGSTS")):
        return max(1, width(i.opcode) // 4)
    return int(i.opcode.startswith(("SHFL", "ATOMS")))


INTEGER = "LOP3 PRMT SHF IADD3 VIADD IADD ISETP SEL LEA MOV PLOP3 FMNMX IMNMX VIMNMX IABS POPC FLO BREV SGXT BMSK F2FP"
FLOATING = "FMUL FADD FFMA FSEL FSETP HADD2 HMUL2 HFMA2 IMAD"
SPECIAL = "MUFU F2F F2I I2F"


class Step(NamedTuple):
    """What a warp does in one pass through the main loop."""

    issued: int
    integer: int
    floating: int
    special: int
    shared: float  # cycles
    bytes: int  # from global memory; of instructions that only some lanes do, as if all did
    mma: int  # operations
    wgmma: int
    most: dict[str, int]  # how often the most frequent instructions stand there


def count(loop: list[Instruction]) -> Step:
    names = [i.opcode.split(".")[0] for i in loop]
    loads = [i.opcode for i in loop if is_load(i)]
    mma = wgmma = 0
    for i in loop:
        if m := re.match(r"HMMA\.(\d+)", i.opcode):
            rows, columns, depth = {"16816": (16, 8, 16), "1688": (16, 8, 8), "16832": (16, 8, 32)}[m[1]]
            mma += 2 * rows * columns * depth * (2 if "TF32" in i.opcode else 1)  # at half the rate
        elif m := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", i.opcode):
            wgmma += 2 * math.prod(map(int, m.groups())) // 4 * (2 if "TF32" in i.opcode else 1)
    return Step(
        issued=sum(name != "NOP" for name in names),
        integer=sum(name in INTEGER.split() for name in names),
        floating=sum(name in FLOATING.split() for name in names),
        special=sum(name in SPECIAL.split() for name in names),
        shared=sum(shared_cycles(i) for i in loop if not i.operands.startswith("RZ,")),
        bytes=sum(32 * width(opcode) for opcode in loads),
        mma=mma,
        wgmma=wgmma,
        most=dict(collections.Counter(names).most_common(12)),
    )


def tool(name: str) -> Path | None:
    """A program of the CUDA toolkit, of CUDA_HOME or as triton brings it."""
    import triton

    places = [Path(os.environ["CUDA_HOME"]) / "bin"] if "CUDA_HOME" in os.environ else []
    places.append(Path(triton.__file__).parent / "backends/nvidia/bin")
    return next((place / name for place in places if (place / name).exists()), None)


def disassembled(cubin: bytes) -> dict[str, list[Instruction]]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool("nvdisasm"), "-c", file.name], capture_output=True, text=True, check=True)
    return functions(done.stdout)


# ---- the bound -------------------------------------------------------------------------------------------------------


class Work(NamedTuple):
    """What a launch has to do: ``bytes`` of memory at least, W cold; dense ``operations`` of tensor cores; passes of a
    warp through the main loop, of which the busiest multiprocessor has ``uneven`` times its share."""

    bytes: float
    operations: float
    warp_steps: float
    uneven: float = 1.0


class Product(NamedTuple):
    """m rows of x, or of dy, times W [n, k] in 4 bits."""

    m: int
    n: int
    k: int

    def __str__(self) -> str:
        size = f"{self.n}²" if self.n == self.k else f"{self.n} × {self.k}"
        return f"{self.m} row{'s' * (self.m > 1)}, {size}"

    @property
    def bytes(self) -> float:
        return self.n * self.k * (0.5 + 4 / BLOCKSIZE) + BF16 * self.m * (self.n + self.k)

    @property
    def operations(self) -> float:
        return 2 * self.m * self.n * self.k

    def beside_cublas(self, gpu: Gpu, seconds: float) -> dict:
        """Of a product in ``seconds``: the speed over the least time of the dense one, and what is asked on an H100."""
        m, n, k = self
        cublas = max(BF16 * (n * k + m * k + m * n) / gpu.bytes_per_s, self.operations / gpu.peak)
        target = (2.0 if n < 8192 else 2.6) if m <= 16 else 1.4 if m <= 128 else 0.95
        return {"over_cublas_limit": cublas / seconds, "target": target}


def times(gpu: Gpu, step: Step, work: Work) -> dict[str, float]:
    """Seconds for which each part of the GPU is taken."""
    a_cycle = gpu.multiprocessors * gpu.hertz / work.uneven
    tensor = step.mma / gpu.mma + (step.wgmma / gpu.wgmma if step.wgmma else 0)
    return {
        "memory": work.bytes / gpu.bytes_per_s,
        "tensor": work.warp_steps * tensor / a_cycle,
        "shared memory": work.warp_steps * step.shared / a_cycle,
        "issue": work.warp_steps * step.issued / SCHEDULERS / a_cycle,
        "integer pipe": work.warp_steps * step.integer * 2 / SCHEDULERS / a_cycle,
        "floating pipe": work.warp_steps * step.floating * gpu.floating / SCHEDULERS / a_cycle,
        "special pipe": work.warp_steps * step.special * 8 / SCHEDULERS / a_cycle,
    }


def estimate(gpu: Gpu, kernel: str, what: Product | str, step: Step, work: Work) -> dict:
    taken = times(gpu, step, work)
    bound = max(taken, key=taken.get)
    limit = max(taken["memory"], work.operations / gpu.peak)
    found = {
        "gpu": gpu.name,
        "kernel": kernel,
        "what": str(what),
        "bound": bound,
        "predicted_us": taken[bound] * 1e6,
        "fraction_of_limit": limit / taken[bound],
        "us": {name: t * 1e6 for name, t in taken.items()},
        "step": step._asdict(),
    }
    if isinstance(what, Product):
        slots = step.issued * work.warp_steps * 32 / (what.n * what.k)
        found |= {"issued_per_weight": slots} | what.beside_cublas(gpu, taken[bound])
    return found


# ---- Triton's kernels ------------------------------------------------------------------------------------------------

PRODUCTS = tuple(Product(m, n, n) for n in (4096, 8192) for m in (1, 16, 32, 64, 128, 256, 4096))
MANY = 4096  # rows of what trains
CONVERTED = "4096², quantization"
PROJECTED = "64 rows, 4096 columns, LoRA r = 16"


def _empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """A tensor without data."""
    return torch.empty(shape, dtype=dtype, device="meta")


def _weight(n: int, k: int) -> NamedTuple:
    codes, scale = _empty(n * k // 2, 1, dtype=torch.uint8), _empty(n * k // BLOCKSIZE, dtype=torch.float32)
    return _kernels("linear_4bit").Weight(codes, scale, *[None] * 4, *_tables("nf4"), n, k, BLOCKSIZE)


def _forward(m: int, n: int, k: int) -> None:
    _kernels("linear_4bit").forward(_empty(m, k), _weight(n, k), None, None)


def _backward(n: int, rank: int) -> None:
    kernels, f32 = _kernels("linear_4bit"), torch.float32
    branch = kernels.Branch(_empty(rank, n, dtype=f32), _empty(n, rank, dtype=f32), None, 2.0, None, 0.0)
    x, s = _empty(MANY, n), _empty(MANY, rank, dtype=f32)
    kernels.backward(x, x, s, _weight(n, n), branch, True, True, True)


def _mixed(n: int, rank: int, adapters: int) -> None:
    kernels, f32 = _kernels("linear_4bit"), torch.float32
    a, b, scaling = _empty(adapters, rank, n), _empty(adapters, n, rank), _empty(adapters, dtype=f32)
    slots = kernels.Slots(a, b, scaling, _empty(MANY, dtype=torch.int64))
    kernels.forward_slots(_empty(MANY, n), _weight(n, n), None, slots)


def _attention(batch: int, tokens: int, keys: int, dim: int, train: bool) -> None:
    from pyfastpeft.ops.triton_kernels import prefix_attention, prefix_attention_backward

    q, k = _empty(batch, tokens, 32, dim).transpose(1, 2), _empty(batch, 8, keys, dim)
    rest = (q, k, k, *[None] * 5, True, 0.125, 0)
    out, lse = prefix_attention(*rest, train)
    if train:
        prefix_attention_backward(q, *rest, out, lse)


def _attention_sums() -> None:
    """Of prefixes' gradients in a batch of 8; where each row's keys begin."""
    kernels = _kernels("prefix_attention")
    kernels._summed(_empty(8, 8, 512, 128, dtype=torch.float32), None, 1)
    q, k, positions = _empty(8, 32, 1, 128), _empty(8, 8, 4096, 128), _empty(8, 4096, dtype=torch.int32)
    kernels.Call(q, k, k, k, k, None, None, positions, True, 1.0, 512).arguments()


def _elementwise() -> None:
    kernels = _kernels("elementwise")
    x, wide = _empty(MANY, 4096), _empty(MANY, 14336)
    kernels.rms_norm(x, x[0], 1e-6)
    kernels.rms_norm_backward(x, x, x[0], 1e-6, False)
    kernels.swiglu(wide, wide)
    kernels.swiglu_backward(wide, wide, wide)
    q, k = (_empty(MANY // 1024, 1024, heads, 128).transpose(1, 2) for heads in (32, 8))
    kernels.rope(q, k, _empty(1, 1024, 128), _empty(1, 1024, 128), False)


def _quantization(n: int) -> None:
    kernels = _kernels("quantize_4bit")
    codes, scale, _ = kernels.quantize(_empty(n, n), _tables("nf4")[0], False, BLOCKSIZE)
    kernels.dequantize(codes, scale, None, _empty(16, dtype=torch.float32), BLOCKSIZE, [n, n], torch.bfloat16)


def _cross_entropy(classes: int) -> None:
    _kernels("cross_entropy").cross_entropy_(_empty(MANY, classes), _empty(MANY, dtype=torch.int64))


CALLS: tuple[tuple[Product | str, Callable[[], None]], ...] = (
    *((product, functools.partial(_forward, *product)) for product in PRODUCTS),
    (Product(MANY, 4096, 4096), lambda: _backward(4096, 16)),
    (f"{MANY} rows, 4096², 8 adapters", lambda: _mixed(4096, 16, 8)),
    ("4 × 2048 tokens, 32 heads of 128 over 8", lambda: _attention(4, 2048, 2048, 128, True)),
    ("4 × 2048 tokens, 32 heads of 64 over 8", lambda: _attention(4, 2048, 2048, 64, True)),
    ("decoding 8 rows, 4096 keys, 32 heads of 128 over 8", lambda: _attention(8, 1, 4096, 128, False)),
    ("8 rows, 512 tokens of a prefix, 4096 keys", _attention_sums),
    (f"{MANY} rows of 4096, of 14336, of heads of 128", _elementwise),
    (f"{MANY} rows, 128256 classes", lambda: _cross_entropy(128256)),
    (CONVERTED, lambda: _quantization(4096)),
)


class Launch(NamedTuple):
    """A kernel, by its module and name, the number of its programs, its arguments and its machine code."""

    kernel: str
    programs: int
    given: SimpleNamespace
    cubin: bytes

    def work(self, gpu: Gpu, need: tuple[float, float, float]) -> Work:
        """``need``: bytes, operations, passes of all programs through the main loop."""
        size, operations, passes = need
        uneven = -(-self.programs // gpu.multiprocessors) * gpu.multiprocessors / self.programs
        return Work(size, operations, passes * self.given.num_warps, uneven)


def _size(*tensors: torch.Tensor | None) -> int:
    """Bytes."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def _of_product(run: Launch) -> tuple[float, float, float]:
    g, forward = run.given, "_forward" in run.kernel
    product, step = Product(g.M, g.N, g.K), g.BK if forward else g.BN
    return product.bytes, product.operations, run.programs * -(-min(g.span if forward else g.N, g.K) // step)


def _of_projection(run: Launch) -> tuple[float, float, float]:
    g = run.given
    sums = (g.q is not None) + (g.t is not None)
    return _size(g.p, g.q, g.t), 2 * g.M * g.C * g.R * sums, run.programs * (g.CHUNK // g.BM)


def _of_slots(run: Launch) -> tuple[float, float, float]:
    """As if each block of rows met one slot, as they do in order, but where two meet."""
    g = run.given
    return _size(g.x, g.a, g.s), 2 * g.M * g.K * g.R, run.programs * (g.SPAN // g.BK)


def _of_attention(run: Launch) -> tuple[float, float, float]:
    """Token t sees the keys up to t + S - T. A program takes rows and passes over keys, or the other way around."""
    g, rows, more = run.given, run.given.T * run.given.GROUP, run.given.S - run.given.T
    q, k = _size(g.q.data), _size(g.k.data)
    units = g.k.data.shape[0] * g.HKV
    pairs = units * g.GROUP * sum(min(g.S, t + 1 + more) for t in range(g.T))
    if "_key_grad" in run.kernel:
        tiles = sum(-(-(rows - max(j - more, 0) * g.GROUP) // g.BM) for j in range(0, g.S, g.BN))
        return 2 * q + 4 * k, 8 * pairs * g.D, units * tiles
    last = ((min(row + g.BM, rows) - 1) // g.GROUP for row in range(0, rows, g.BM))
    tiles = sum(-(-min(g.S, t + 1 + more) // g.BN) for t in last)
    forward = "_forward" in run.kernel
    return (2 if forward else 4) * q + 2 * k, (4 if forward else 6) * pairs * g.D, units * tiles


def _of_tensors(*names: str) -> Callable[[Launch], tuple[float, float, float]]:
    """A kernel that takes each of these once, and passes once through its code."""
    return lambda run: (_size(*(getattr(run.given, name) for name in names)), 0, run.programs)


NEEDS: dict[str, Callable[[Launch], tuple[float, float, float]]] = {
    "linear_4bit._forward": _of_product,
    "linear_4bit._input_grad": _of_product,
    "linear_4bit._project": _of_projection,
    "linear_4bit._slot_sums": _of_slots,
    "prefix_attention._forward": _of_attention,
    "prefix_attention._query_grad": _of_attention,
    "prefix_attention._key_grad": _of_attention,
    "prefix_attention._combine": lambda run: (_size(run.given.outs, run.given.lses, run.given.out), 0, run.programs),
    "prefix_attention._prefix_sum": lambda run: (_size(run.given.parts, run.given.out), 0, run.programs * run.given.B),
    "prefix_attention._starts": lambda run: (_size(run.given.positions), 0, run.programs * -(-run.given.S // 1024)),
    "elementwise._rms_norm": _of_tensors("x", "y"),
    "elementwise._rms_norm_backward": _of_tensors("dy", "x", "dx"),
    "elementwise._swiglu": _of_tensors("gate", "up", "y"),
    "elementwise._swiglu_backward": _of_tensors("dy", "gate", "up", "dgate", "dup"),
    "elementwise._rope": _of_tensors("q", "k", "q_out", "k_out"),
    "cross_entropy._cross_entropy": lambda run: (
        2 * _size(run.given.logits),
        0,
        run.programs * -(-run.given.C // run.given.COLUMNS),
    ),
    "quantize_4bit._quantize": _of_tensors("w", "codes", "scale", "zero"),
    "quantize_4bit._dequantize": _of_tensors("codes", "scale", "zero", "out"),
}


@contextlib.contextmanager
def triton_launches(gpu: Gpu) -> Iterator[list[Launch]]:
    """Collects launches, which do not run."""
    import triton
    from triton.backends.compiler import GPUTarget

    collected: list[Launch] = []

    def launcher(kernel, grid):
        def compile(**given):
            out = kernel.run(grid=(1,), warmup=True, **given)
            name = f"{kernel.fn.__module__.split('.')[-1]}.{kernel.fn.__name__}"
            collected.append(Launch(name, math.prod(grid), SimpleNamespace(**given), out.asm["cubin"]))

        return compile

    driver, get = triton.runtime.driver, triton.JITFunction.__getitem__
    available, capability = torch.cuda.is_available, torch.cuda.get_device_capability
    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", int(gpu.chip), 32),
            get_current_device=lambda: int(gpu.chip),
            get_current_stream=lambda device: 0,
        )
    )
    triton.JITFunction.__getitem__ = launcher
    torch.cuda.is_available = lambda: True
    torch.cuda.get_device_capability = lambda device=None: divmod(int(gpu.chip), 10)
    try:
        yield collected
    finally:
        triton.JITFunction.__getitem__ = get
        torch.cuda.is_available, torch.cuda.get_device_capability = available, capability


def triton_estimates(gpu: Gpu, only: str) -> Iterator[dict]:
    steps: dict[bytes, Step] = {}
    for what, call in CALLS:
        if only not in str(what):
            continue
        with triton_launches(gpu) as launches:
            call()
        for run in launches:
            if run.cubin not in steps:
                steps[run.cubin] = count(main_loop(next(iter(disassembled(run.cubin).values()))))
            need = NEEDS[run.kernel]
            named = what if need is _of_product else str(what)
            yield estimate(gpu, f"triton {run.kernel}", named, steps[run.cubin], run.work(gpu, need(run)))


# ---- the kernels of csrc/cuda ----------------------------------------------------------------------------------------


class Cuda(NamedTuple):
    """A product of csrc/cuda for ``first`` to ``last`` rows, whose mangled name matches ``pattern``. ``columns``: rows
    of x that its products are wide."""

    source: str
    pattern: str
    chips: tuple[str, ...]
    first: int
    last: int
    columns: int


def _mma(tiles: int, first: int, last: int, columns: int) -> Cuda:
    pattern = rf"linear_4bit_kernelI13__nv_bfloat16Li{tiles}E.*E0E"
    return Cuda("linear_4bit.cu", pattern, ("80", "90"), first, last, columns)


def _wgmma(width: int, count: int, first: int) -> Cuda:
    columns = 2 * width * count
    pattern = rf"sweepI13__nv_bfloat16Li{width}ELi{count}E"
    return Cuda("linear_4bit_sm90.cu", pattern, ("90",), first, columns, columns)


CUDA = (
    _mma(1, 1, 8, 8),
    _mma(2, 9, 16, 16),
    _mma(4, 17, 32, 32),
    _mma(8, 33, 128, 64),
    _wgmma(16, 1, 17),
    _wgmma(32, 1, 33),
    _wgmma(64, 1, 97),
    _wgmma(64, 2, 193),
)


def cuda_code(gpu: Gpu, source: str) -> dict[str, list[Instruction]]:
    """The functions of a source by their mangled names."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        chip = "90a" if gpu.chip == "90" else gpu.chip
        command = [tool("nvcc"), "-std=c++20", "-O3", f"-arch=sm_{chip}", "-cubin", f"-I{ROOT / 'csrc'}"]
        subprocess.run([*command, ROOT / "csrc/cuda" / source, "-o", cubin], check=True, capture_output=True)
        return disassembled(cubin.read_bytes())


def function(code: dict[str, list[Instruction]], pattern: str) -> list[Instruction]:
    (name,) = [f for f in code if re.search(pattern, f)]
    return code[name]


def cuda_products(gpu: Gpu, only: str) -> Iterator[dict]:
    """Of a warp's products the weights are known; that the multiprocessors have equal shares is assumed."""
    kernels = [c for c in CUDA if gpu.chip in c.chips]
    code = {source: cuda_code(gpu, source) for source in sorted({c.source for c in kernels})}
    for product in PRODUCTS:
        for kernel in kernels:
            if kernel.first <= product.m <= kernel.last and only in str(product):
                step = count(main_loop(function(code[kernel.source], kernel.pattern)))
                weights = (step.mma + step.wgmma) / (2 * kernel.columns)
                steps = -(-product.m // kernel.columns) * product.n * product.k / weights
                work = Work(product.bytes, product.operations, steps)
                yield estimate(gpu, f"cuda {kernel.source}", product, step, work)


def cuda_projection(gpu: Gpu) -> dict:
    """S of wgmma's kernel."""
    rows, rank = 64, 16
    step = count(main_loop(function(cuda_code(gpu, "linear_4bit_sm90.cu"), "projectI13__nv_bfloat16E")))
    size, operations = BF16 * (rows + rank) * 4096, 2 * rows * rank * 4096
    work = Work(size, operations, operations / step.mma)
    return estimate(gpu, "cuda project", PROJECTED, step, work)


def cuda_conversion(gpu: Gpu, kernel: str, elements: int) -> dict:
    """Of W, 4096² in NF4, ``elements`` at a time for a thread."""
    source, pattern = f"{kernel}_4bit.cu", {"quantize": "Li0ELb1E", "dequantize": "Lb0E"}[kernel]
    code = function(cuda_code(gpu, source), f"{kernel}_kernelI13__nv_bfloat16{pattern}")
    work = Work(4096**2 * (BF16 + 0.5 + 4 / BLOCKSIZE), 0, 4096**2 / elements / 32)
    return estimate(gpu, f"cuda {source}", CONVERTED, count(wide_path(code)), work)


def slabs(gpu: Gpu, product: Product, decoding_us: float) -> dict:
    """W decoded, then the dense product at its limit."""
    taken = {"decoding": decoding_us, "tensor": product.operations / gpu.peak * 1e6}
    total = sum(taken.values())
    return {
        "gpu": gpu.name,
        "kernel": "slabs",
        "what": str(product),
        "bound": max(taken, key=taken.get),
        "predicted_us": total,
        "fraction_of_limit": taken["tensor"] / total,
        "us": taken,
    } | product.beside_cublas(gpu, total / 1e6)


def cuda_estimates(gpu: Gpu, only: str) -> Iterator[dict]:
    yield from cuda_products(gpu, only)
    if gpu.wgmma and only in PROJECTED:
        yield cuda_projection(gpu)
    if only in CONVERTED:
        yield cuda_conversion(gpu, "quantize", 8)
        decoding = cuda_conversion(gpu, "dequantize", 32)
        yield decoding
        yield from (slabs(gpu, Product(m, 4096, 4096), decoding["predicted_us"]) for m in (2048, 4096))


# ---- report ----------------------------------------------------------------------------------------------------------


def table(estimates: list[dict]) -> Table:
    out = Table(title="predicted at best (W cold); slots: instructions issued a weight and lane")
    for column in ("GPU", "kernel", "of", "slots", "bound", "µs", "of its limit", "× cuBLAS' limit", "target"):
        out.add_column(column, justify="left" if column in ("GPU", "kernel", "of", "bound") else "right")
    for e in estimates:
        beside = ("", "")
        if "target" in e:
            good = e["over_cublas_limit"] >= e["target"]
            beside = (f"[{'green' if good else 'red'}]{e['over_cublas_limit']:.2f}[/]", f"{e['target']:.2f}")
        out.add_row(
            e["gpu"],
            e["kernel"],
            e["what"],
            f"{e['issued_per_weight']:.2f}" if "issued_per_weight" in e else "",
            e["bound"],
            f"{e['predicted_us']:.1f}",
            f"{e['fraction_of_limit']:.2f}",
            *beside,
        )
    return out


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="what is in the name of what is estimated, such as '1 row'")
    parser.add_argument("--gpus", nargs="+", choices=[g.name for g in GPUS], default=[g.name for g in GPUS])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "gpu_estimate.json")
    args = parser.parse_args(argv)
    console = Console(width=160)
    estimates: list[dict] = []
    absent = [] if tool("nvcc") else ["csrc/cuda: no nvcc is here (CUDA_HOME)"]
    for gpu in GPUS:
        if gpu.name in args.gpus:
            estimates += triton_estimates(gpu, args.only)
            if not absent:
                estimates += cuda_estimates(gpu, args.only)
    for line in absent:
        console.print(line)
    console.print(table(estimates))
    gpus = [g._asdict() | {"peak": g.peak} for g in GPUS]
    args.output.write_text(json.dumps({"gpus": gpus, "absent": absent, "estimates": estimates}, indent=1) + "\n")


if __name__ == "__main__":
    main()
