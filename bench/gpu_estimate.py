"""What bounds the 4-bit product's kernels on a GPU, from their machine code: an estimate that needs no GPU.

    python -m bench.gpu_estimate

Triton's kernels are compiled as the operator launches them, those of csrc/cuda where nvcc is (CUDA_HOME); what either
lacks is said. In the machine code of each the main loop is counted: bytes asked of memory, tensor-core operations,
cycles of shared memory (without bank conflicts), instructions issued, and those of the integer and the floating pipe.
The slowest of these is the bound, and its time the prediction; latencies, the loop's entry and the epilogue are left
out, so a kernel can only be slower. Beside it stands what cuBLAS in bf16 could at best reach on the same GPU, and
the target against it. Writes bench/results/gpu_estimate.json.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import math
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from pyfastpeft.ops.triton_kernels import _kernels, _tables

ROOT = Path(__file__).parents[1]
SHAPES = ((4096, 4096), (8192, 8192))
ROWS = (1, 16, 64, 128, 4096)
SCHEDULERS = 4  # of a multiprocessor, each of which issues one instruction a cycle
BLOCKSIZE = 64


class Gpu(NamedTuple):
    """Vendor's figures. ``tensor``: dense bf16 operations a cycle and multiprocessor, by wgmma (if there) and by mma.
    ``floating``: cycles for which an instruction of a warp takes the floating pipe; the integer pipe is taken for two.
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
    opcode: str
    operands: str


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
        elif m := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;", line):
            labels |= dict.fromkeys(waiting, f"0x{m[1]}")
            waiting = []
            code.setdefault(name, []).append(Instruction(int(m[1], 16), m[2], m[3]))

    def resolved(i: Instruction) -> Instruction:
        return i._replace(operands=re.sub(r"`\((\.L_\w+)\)", lambda m: labels.get(m[1], m[0]), i.operands))

    return {name: [resolved(i) for i in body] for name, body in code.items()}


def is_tensor(i: Instruction) -> bool:
    return i.opcode.startswith(("HMMA", "HGMMA"))


def main_loop(code: list[Instruction]) -> list[Instruction]:
    """Of the loops that hold no other loop with tensor-core operations the one with the most of these.

    A loop is what lies between the target of branches that lead back and the last of them.

    Raises:
        ValueError: there is no such loop.
    """
    ends: dict[int, int] = {}
    for i in code:
        target = re.search(r"(0x[0-9a-f]+)\s*$", i.operands) if i.opcode.startswith("BRA") else None
        if target and int(target[1], 16) < i.address:
            ends[int(target[1], 16)] = i.address
    loops = [[i for i in code if start <= i.address <= end] for start, end in ends.items()]
    loops = [loop for loop in loops if any(map(is_tensor, loop))]
    innermost = [loop for loop in loops if not any(set(other) < set(loop) for other in loops)]
    if not innermost:
        raise ValueError("no loop has tensor-core operations")
    return max(innermost, key=lambda loop: sum(map(is_tensor, loop)))


def width(opcode: str) -> int:
    """Bytes of a lane that a load or store moves."""
    parts = opcode.split(".")
    return next((int(p) // 8 for p in parts if p in ("64", "128")), 2 if "U16" in parts else 1 if "U8" in parts else 4)


def shared_cycles(opcode: str) -> int:
    """Cycles (of 128 bytes) that shared memory is taken for, without bank conflicts."""
    if opcode.startswith(("LDSM", "STSM")):
        return int(opcode[-1]) if opcode.endswith((".2", ".4")) else 1
    if opcode.startswith(("LDS", "STS", "LDGSTS")):
        return max(1, width(opcode) // 4)
    return int(opcode.startswith(("SHFL", "ATOMS")))


INTEGER = "LOP3 PRMT SHF IADD3 VIADD IADD ISETP SEL LEA MOV PLOP3 FMNMX IMNMX VIMNMX IABS POPC FLO BREV SGXT BMSK F2FP"
FLOATING = "FMUL FADD FFMA FSEL FSETP HADD2 HMUL2 HFMA2 IMAD"


class Step(NamedTuple):
    """What a warp does in one pass through the main loop."""

    issued: int
    integer: int
    floating: int
    shared: int  # cycles
    bytes: int  # from global memory; of instructions that only some lanes do, as if all did
    mma: int  # operations
    wgmma: int
    most: dict[str, int]  # how often the most frequent instructions stand there


def count(loop: list[Instruction]) -> Step:
    names = [i.opcode.split(".")[0] for i in loop]
    loads = [i.opcode for i in loop if i.opcode.startswith(("LDG.", "LDGSTS"))]
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
        shared=sum(shared_cycles(i.opcode) for i in loop if not i.operands.startswith("RZ,")),
        bytes=sum(32 * width(opcode) for opcode in loads),
        mma=mma,
        wgmma=wgmma,
        most=dict(collections.Counter(names).most_common(12)),
    )


# ---- the bound -------------------------------------------------------------------------------------------------------


class Work(NamedTuple):
    """A launch: ``warp_steps`` passes through the loop in all, the busiest multiprocessor having ``uneven`` times its
    share."""

    m: int
    n: int
    k: int
    warp_steps: float
    uneven: float


def times(gpu: Gpu, step: Step, work: Work) -> dict[str, float]:
    """Seconds for which each part of the GPU is taken."""
    a_cycle = gpu.multiprocessors * gpu.hertz / work.uneven
    m, n, k = work.m, work.n, work.k
    tensor = step.mma / gpu.mma + (step.wgmma / gpu.wgmma if step.wgmma else 0)
    return {
        "memory": (n * k * (0.5 + 4 / BLOCKSIZE) + 2 * m * (n + k)) / gpu.bytes_per_s,
        "tensor": work.warp_steps * tensor / a_cycle,
        "shared memory": work.warp_steps * step.shared / a_cycle,
        "issue": work.warp_steps * step.issued / SCHEDULERS / a_cycle,
        "integer pipe": work.warp_steps * step.integer * 2 / SCHEDULERS / a_cycle,
        "floating pipe": work.warp_steps * step.floating * gpu.floating / SCHEDULERS / a_cycle,
    }


def target(m: int, n: int) -> float:
    """The speed over cuBLAS bf16 that is asked (on an H100)."""
    if m <= 16:
        return 2.0 if n < 8192 else 2.6
    return 1.4 if m <= 128 else 0.95


def estimate(gpu: Gpu, kernel: str, step: Step, work: Work) -> dict:
    m, n, k = work.m, work.n, work.k
    taken = times(gpu, step, work)
    bound = max(taken, key=taken.get)
    dense = 2 * m * n * k / gpu.peak
    limit = max(taken["memory"], dense)
    cublas = max(2 * (n * k + m * k + m * n) / gpu.bytes_per_s, dense)
    return {
        "gpu": gpu.name,
        "kernel": kernel,
        "m": m,
        "n": n,
        "k": k,
        "bound": bound,
        "predicted_us": taken[bound] * 1e6,
        "fraction_of_limit": limit / taken[bound],
        "over_cublas_limit": cublas / taken[bound],
        "target": target(m, n),
        "us": {name: t * 1e6 for name, t in taken.items()},
        "issued_per_weight": step.issued * work.warp_steps * 32 / (n * k),
        "step": step._asdict(),
    }


# ---- kernels ---------------------------------------------------------------------------------------------------------


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


@contextlib.contextmanager
def triton_launches(gpu: Gpu) -> Iterator[list]:
    """Collects (kernel's name, grid, arguments, what Triton compiled) of launches, which do not run."""
    import triton
    from triton.backends.compiler import GPUTarget

    collected: list = []

    def launcher(kernel, grid):
        def compile(**given):
            out = kernel.run(grid=(1,), warmup=True, **given)
            collected.append((kernel.fn.__name__, grid, given, out))

        return compile

    driver, get = triton.runtime.driver, triton.JITFunction.__getitem__
    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", int(gpu.chip), 32),
            get_current_device=lambda: int(gpu.chip),
            get_current_stream=lambda device: 0,
        )
    )
    triton.JITFunction.__getitem__ = launcher
    try:
        yield collected
    finally:
        triton.JITFunction.__getitem__ = get


def triton_estimates(gpu: Gpu, rows: tuple[int, ...], shapes: tuple[tuple[int, int], ...]) -> Iterator[dict]:
    kernels = _kernels("linear_4bit")

    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    steps: dict[bytes, Step] = {}
    for n, k in shapes:
        codes, scale = empty(n * k // 2, 1, dtype=torch.uint8), empty(n * k // BLOCKSIZE)
        w = kernels.Weight(codes, scale, *[None] * 4, *_tables("nf4"), n, k, BLOCKSIZE)
        for m in rows:
            with triton_launches(gpu) as launches:
                kernels.forward(empty(m, k, dtype=torch.bfloat16), w, None, None)
            ((name, grid, given, out),) = launches
            cubin = out.asm["cubin"]
            if cubin not in steps:
                steps[cubin] = count(main_loop(next(iter(disassembled(cubin).values()))))
            programs, passes = math.prod(grid), -(-min(given["span"], k) // given["BK"])
            uneven = -(-programs // gpu.multiprocessors) * gpu.multiprocessors / programs
            work = Work(m, n, k, programs * given["num_warps"] * passes, uneven)
            yield estimate(gpu, f"triton {name}", steps[cubin], work)


class Cuda(NamedTuple):
    """A kernel of csrc/cuda for ``first`` to ``last`` rows, whose mangled name matches ``pattern``. ``columns``: rows
    of x that its products are wide."""

    source: str
    pattern: str
    chips: tuple[str, ...]
    first: int
    last: int
    columns: int


CUDA = (
    Cuda("linear_4bit.cu", r"linear_4bit_kernelI13__nv_bfloat16Li1E.*E0E", ("80", "90"), 1, 8, 8),
    Cuda("linear_4bit.cu", r"linear_4bit_kernelI13__nv_bfloat16Li2E.*E0E", ("80", "90"), 9, 16, 16),
    Cuda("linear_4bit.cu", r"linear_4bit_kernelI13__nv_bfloat16Li8E.*E0E", ("80", "90"), 33, 128, 64),
)


def cuda_estimates(gpu: Gpu, rows: tuple[int, ...], shapes: tuple[tuple[int, int], ...]) -> Iterator[dict]:
    """Of a warp's products the weights are known; that the multiprocessors have equal shares is assumed."""
    nvcc, sources = tool("nvcc"), {c.source for c in CUDA if gpu.chip in c.chips}
    code: dict[str, dict[str, list[Instruction]]] = {}
    for source in sorted(sources):
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder) / "kernels.cubin"
            chip = "90a" if gpu.chip == "90" else gpu.chip
            command = [nvcc, "-std=c++20", "-O3", f"-arch=sm_{chip}", "-cubin", f"-I{ROOT / 'csrc'}"]
            subprocess.run([*command, ROOT / "csrc/cuda" / source, "-o", cubin], check=True, capture_output=True)
            code[source] = disassembled(cubin.read_bytes())
    for n, k in shapes:
        for m in rows:
            for kernel in CUDA:
                if not kernel.first <= m <= kernel.last or gpu.chip not in kernel.chips:
                    continue
                (name,) = [f for f in code[kernel.source] if re.search(kernel.pattern, f)]
                step = count(main_loop(code[kernel.source][name]))
                weights = (step.mma + step.wgmma) / (2 * kernel.columns)
                work = Work(m, n, k, -(-m // kernel.columns) * n * k / weights, 1.0)
                yield estimate(gpu, f"cuda {kernel.source}", step, work)


# ---- report ----------------------------------------------------------------------------------------------------------


def table(estimates: list[dict]) -> Table:
    out = Table(title="predicted at best (W cold); slots: instructions issued a weight and lane")
    for column in ("GPU", "kernel", "rows", "W", "slots", "bound", "µs", "of its limit", "× cuBLAS' limit", "target"):
        out.add_column(column, justify="left" if column in ("GPU", "kernel", "bound") else "right")
    for e in estimates:
        good = e["over_cublas_limit"] >= e["target"]
        out.add_row(
            e["gpu"],
            e["kernel"],
            str(e["m"]),
            f"{e['n']}²" if e["n"] == e["k"] else f"{e['n']} × {e['k']}",
            f"{e['issued_per_weight']:.2f}",
            e["bound"],
            f"{e['predicted_us']:.1f}",
            f"{e['fraction_of_limit']:.2f}",
            f"[{'green' if good else 'red'}]{e['over_cublas_limit']:.2f}[/]",
            f"{e['target']:.2f}",
        )
    return out


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--gpus", nargs="+", choices=[g.name for g in GPUS], default=[g.name for g in GPUS])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "gpu_estimate.json")
    args = parser.parse_args(argv)
    console = Console()
    estimates: list[dict] = []
    absent = [] if tool("nvcc") else ["csrc/cuda: no nvcc is here (CUDA_HOME)"]
    for gpu in GPUS:
        if gpu.name in args.gpus:
            estimates += triton_estimates(gpu, tuple(args.rows), SHAPES)
            estimates += [] if absent else cuda_estimates(gpu, tuple(args.rows), SHAPES)
    for line in absent:
        console.print(line)
    console.print(table(estimates))
    gpus = [g._asdict() | {"peak": g.peak} for g in GPUS]
    args.output.write_text(json.dumps({"gpus": gpus, "absent": absent, "estimates": estimates}, indent=1) + "\n")


if __name__ == "__main__":
    main()
