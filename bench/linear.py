"""y = x · Wᵀ with 4-bit weights on the CPU: ours beside torch, bitsandbytes and peft, interleaved in one process.

    python bench/linear.py --shapes 4096x4096 --M 1,16,512 --threads 1
    python bench/linear.py --only 'ours_nf4*,bnb_nf4_eval' --dtypes bf16 --train

Every contender gets so many copies of its weights that they exceed the last-level cache, and calls walk over them.
Error is against float64 on the weights (and adapters) that the contender really uses. Times are medians over
interleaved rounds; ``--train`` times forward and backward together (gradients to x and to the adapters).
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass

import harness
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

import pyfastpeft as fp

ROTATE_BYTES = 100_000_000
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}


class Problem:
    """One weight [N, K], the adapters over it and the settings of a run; what is expensive is made once."""

    def __init__(self, k: int, n: int, dtype: torch.dtype, rank: int, train: bool) -> None:
        self.k, self.n, self.dtype, self.rank, self.train = k, n, dtype, rank, train
        g = torch.Generator().manual_seed(1)
        self.w = torch.randn(n, k, generator=g) * 0.03
        self.a = torch.randn(rank, k, generator=g) * k**-0.5
        self.b = torch.randn(n, rank, generator=g) * 0.03
        self.scaling = 2.0

    @functools.cache  # noqa: B019  (a problem lives as long as its contenders)
    def ours(self, quant_type: str, double_quant: bool) -> fp.Packed4bit:
        return fp.quantize_4bit(self.w, quant_type, 64, double_quant)

    @functools.cache  # noqa: B019
    def bnb(self, quant_type: str) -> tuple:
        from bitsandbytes.functional import quantize_4bit

        return quantize_4bit(self.w.to(self.dtype), blocksize=64, quant_type=quant_type)


@dataclass
class Layer:
    """A contender ready to be called.

    Attributes:
        call: x [M, K] to y [M, N].
        nbytes: weight bytes a call reads.
        weight: the weight [N, K] really used, in float64, adapters included.
    """

    call: Callable[[Tensor], Tensor]
    nbytes: int
    weight: Callable[[], Tensor]


@dataclass
class Contender:
    prepare: Callable[[Problem], Layer]
    requires: tuple[str, ...]
    dtypes: tuple[str, ...]
    inference_only: bool


REGISTRY: dict[str, Contender] = {}


def contender(
    name: str,
    requires: tuple[str, ...] = (),
    dtypes: tuple[str, ...] = tuple(DTYPES),
    inference_only: bool = False,
) -> Callable[[Callable[[Problem], Layer]], Callable[[Problem], Layer]]:
    """Register ``prepare(problem) -> Layer``; it is called once for every copy of the weights."""

    def register(prepare: Callable[[Problem], Layer]) -> Callable[[Problem], Layer]:
        REGISTRY[name] = Contender(prepare, requires, dtypes, inference_only)
        return prepare

    return register


# ---- ours ------------------------------------------------------------------------------------------------------------


def _ours(
    p: Problem, quant_type: str, double_quant: bool = False, lora: bool = False, adapter: torch.dtype = torch.float32
) -> Layer:
    packed = p.ours(quant_type, double_quant).clone()
    branch = None
    if lora:
        a, b = (t.to(adapter, copy=True).requires_grad_(p.train) for t in (p.a, p.b))
        branch = (a, b, p.scaling)

    def weight() -> Tensor:
        w = packed.dequantize(torch.float64)
        return w + p.scaling * b.detach().double() @ a.detach().double() if lora else w

    return Layer(lambda x: fp.ops.linear_4bit(x, packed, None, branch), packed.nbytes, weight)


for _q in ("nf4", "fp4", "int4"):
    contender(f"ours_{_q}")(functools.partial(_ours, quant_type=_q))
    contender(f"ours_{_q}_lora")(functools.partial(_ours, quant_type=_q, lora=True))
contender("ours_nf4_lora_bf16")(functools.partial(_ours, quant_type="nf4", lora=True, adapter=torch.bfloat16))
contender("ours_nf4_dq")(functools.partial(_ours, quant_type="nf4", double_quant=True))


@contender("ours_nf4_module")
def _(p: Problem) -> Layer:
    layer = fp.nn.Linear4bit.from_packed(p.ours("nf4", False).clone())
    return Layer(layer, layer.packed.nbytes, lambda: layer.dequantize(torch.float64))


@contender("ours_nf4_bank4", inference_only=True)
def _(p: Problem) -> Layer:
    """Four adapters and the base mixed over the rows of one batch."""
    packed = p.ours("nf4", False).clone()
    a, b, scaling = p.a.expand(4, -1, -1).contiguous(), p.b.expand(4, -1, -1).contiguous(), torch.full((4,), p.scaling)

    @functools.cache
    def rows(m: int) -> Tensor:
        return torch.arange(m) % 4

    def weight() -> Tensor:
        return packed.dequantize(torch.float64) + p.scaling * p.b.double() @ p.a.double()

    return Layer(
        lambda x: fp.ops.linear_4bit(x, packed, None, fp.ops.BankView(a, b, scaling, rows(len(x)))),
        packed.nbytes,
        weight,
    )


# ---- torch -----------------------------------------------------------------------------------------------------------


@contender("torch_dense")
def _(p: Problem) -> Layer:
    w = p.w.to(p.dtype)
    return Layer(lambda x: F.linear(x, w), w.numel() * w.element_size(), w.double)


@contender("torch_dense_lora")
def _(p: Problem) -> Layer:
    w = p.w.to(p.dtype)
    a, b = (t.to(p.dtype).requires_grad_(p.train) for t in (p.a, p.b))
    return Layer(
        lambda x: F.linear(x, w) + F.linear(F.linear(x, a), b) * p.scaling,
        w.numel() * w.element_size(),
        lambda: w.double() + p.scaling * b.detach().double() @ a.detach().double(),
    )


@contender("torch_int4pack", dtypes=("bf16", "fp32"), inference_only=True)
def _(p: Problem) -> Layer:
    """torch's own int4 product for CPUs (affine groups of 64)."""
    blocks = p.w.view(p.n, -1, 64)
    low = blocks.amin(-1)
    scale = (blocks.amax(-1) - low) / 15
    codes = ((blocks - low[..., None]) / scale[..., None]).round().clamp(0, 15)
    scale_zero = torch.stack([scale, low + 8 * scale], -1).transpose(0, 1).contiguous().to(p.dtype)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.view(p.n, p.k).int(), 1)

    def weight() -> Tensor:
        s, z = (t.double().t()[..., None] for t in scale_zero.unbind(-1))
        return ((codes.double() - 8) * s + z).view(p.n, p.k)

    return Layer(
        lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, 64, scale_zero),
        packed.numel() * packed.element_size() + scale_zero.numel() * scale_zero.element_size(),
        weight,
    )


# ---- bitsandbytes, and peft over it ----------------------------------------------------------------------------------


def _bnb_linear(p: Problem, quant_type: str) -> torch.nn.Module:
    import bitsandbytes as bnb

    codes, state = p.bnb(quant_type)
    layer = bnb.nn.Linear4bit(p.k, p.n, bias=False, compute_dtype=p.dtype, quant_type=quant_type, device="meta")
    layer.weight = bnb.nn.Params4bit.from_prequantized(
        codes.clone(), {k: v.clone() if isinstance(v, Tensor) else v for k, v in state.as_dict(packed=True).items()},
        requires_grad=False, device="cpu", module=layer,
    )  # fmt: skip
    return layer


def _bnb_weight(p: Problem, quant_type: str) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(*p.bnb(quant_type)).double()


def _bnb(p: Problem, quant_type: str, train: bool) -> Layer:
    layer = _bnb_linear(p, quant_type).train(train)
    nbytes = p.n * p.k // 2 + p.n * p.k // 64 * (4 if train else 2)
    return Layer(layer, nbytes, lambda: _bnb_weight(p, quant_type))


def _peft(p: Problem, train: bool, adapters: int = 1) -> Layer:
    from peft import LoraConfig, get_peft_model

    model = torch.nn.Sequential(_bnb_linear(p, "nf4"))
    config = LoraConfig(r=p.rank, lora_alpha=int(p.rank * p.scaling), target_modules=["0"])
    model = get_peft_model(model, config, adapter_name="a0")
    for i in range(1, adapters):
        model.add_adapter(f"a{i}", config)
    layer = model.base_model.model[0]
    with torch.no_grad():
        for i in range(adapters):
            layer.lora_A[f"a{i}"].weight.copy_(p.a)
            layer.lora_B[f"a{i}"].weight.copy_(p.b)
    layer.train(train).requires_grad_(False)
    if p.train:
        layer.lora_A["a0"].weight.requires_grad_(True)
        layer.lora_B["a0"].weight.requires_grad_(True)

    @functools.cache
    def names(m: int) -> list[str]:
        return [f"a{i % adapters}" for i in range(m)]

    call = layer if adapters == 1 else lambda x: layer(x, adapter_names=names(len(x)))
    nbytes = p.n * p.k // 2 + p.n * p.k // 64 * (4 if train else 2)
    return Layer(call, nbytes, lambda: _bnb_weight(p, "nf4") + p.scaling * p.b.double() @ p.a.double())


for _q in ("nf4", "fp4"):
    for _mode in ("eval", "train"):
        contender(f"bnb_{_q}_{_mode}", requires=("bitsandbytes",), inference_only=_mode == "eval")(
            functools.partial(_bnb, quant_type=_q, train=_mode == "train")
        )
for _mode in ("eval", "train"):
    contender(f"peft_bnb_nf4_{_mode}_lora", requires=("bitsandbytes", "peft"), inference_only=_mode == "eval")(
        functools.partial(_peft, train=_mode == "train")
    )
contender("peft_bnb_nf4_eval_bank4", requires=("bitsandbytes", "peft"), inference_only=True)(
    functools.partial(_peft, train=False, adapters=4)
)


# ---- measuring -------------------------------------------------------------------------------------------------------


def _relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm())


def _prepare(problem: Problem, names: list[str], dtype: str, console: Console) -> dict[str, list[Layer]]:
    """Copies of each contender; those that cannot run here are named with the reason."""
    ready: dict[str, list[Layer]] = {}
    for name in names:
        entry = REGISTRY[name]
        missing = [package for package in entry.requires if not harness.installed(package)]
        if missing or dtype not in entry.dtypes:
            reason = f"{', '.join(missing)} absent" if missing else f"no {dtype}"
            console.print(f"[yellow]{name}: not measured ({reason})")
            continue
        if problem.train and entry.inference_only:
            continue
        try:
            first = entry.prepare(problem)
            copies = max(2, math.ceil(ROTATE_BYTES / first.nbytes))
            layers = [first, *(entry.prepare(problem) for _ in range(copies - 1))]
            for layer in layers:
                # bitsandbytes repacks the weight on the first call of each layer.
                with torch.no_grad():
                    layer.call(torch.zeros(1, problem.k, dtype=problem.dtype))
            ready[name] = layers
        except Exception as error:
            console.print(f"[yellow]{name}: not measured ({type(error).__name__}: {str(error)[:160]})")
    return ready


def _call(layers: list[Layer], x: Tensor, train: bool) -> Callable[[], object]:
    ring = itertools.cycle(layer.call for layer in layers)
    if not train:
        return lambda: next(ring)(x)
    x = x.clone().requires_grad_(True)
    dy: list[Tensor] = []

    def forward_backward() -> None:
        y = next(ring)(x)
        if not dy:
            dy.append(torch.randn(y.shape).to(y.dtype))
        y.backward(dy[0])

    return forward_backward


def run(
    k: int, n: int, rows: list[int], dtype: str, names: list[str], rounds: int, rank: int, train: bool, console: Console
) -> list[dict]:
    """Measure one shape at torch's current thread count: one record a (contender, M)."""
    problem = Problem(k, n, DTYPES[dtype], rank, train)
    ready = _prepare(problem, names, dtype, console)
    x = torch.randn(16, k, generator=torch.Generator().manual_seed(2)).to(problem.dtype)
    with torch.no_grad():
        errors = {
            s: _relative_error(layers[0].call(x), x.double() @ layers[0].weight().t()) for s, layers in ready.items()
        }
    records = []
    for m in rows:
        x = torch.randn(m, k, generator=torch.Generator().manual_seed(3)).to(problem.dtype)
        calls = {name: _call(layers, x, train) for name, layers in ready.items()}
        with harness.Load() as load, torch.set_grad_enabled(train):
            timings = harness.interleave(calls, rounds)
        for name, timing in timings.items():
            nbytes = ready[name][0].nbytes
            records.append(
                {
                    "k": k,
                    "n": n,
                    "m": m,
                    "dtype": dtype,
                    "threads": torch.get_num_threads(),
                    "train": train,
                    "name": name,
                }
                | timing.as_dict()
                | {
                    "gb_s": round(nbytes / timing.median / 1e9, 2),
                    "gflop_s": round(2 * m * k * n * (2 if train else 1) / timing.median / 1e9, 1),
                    "error": errors[name],
                    "nbytes": nbytes,
                    "other_load_cores": round(load.cores, 2),
                    "rank": rank,
                    "samples_us": [round(s * 1e6, 2) for s in timing.samples],
                }
            )
    return records


def table(records: list[dict], title: str) -> Table:
    """Microseconds a call (median), with GB/s of weights up to M = 4 and GFLOP/s above."""
    rows = sorted({r["m"] for r in records})
    out = Table(title=title, title_justify="left")
    out.add_column("contender (error)", no_wrap=True)
    for m in rows:
        out.add_column(f"M={m}", justify="right", no_wrap=True)
    for name in dict.fromkeys(r["name"] for r in records):
        mine = {r["m"]: r for r in records if r["name"] == name}
        cells = []
        for m in rows:
            r = mine[m]
            rate = f"{r['gb_s']:.1f}" if m <= 4 else f"{r['gflop_s']:.0f}"
            cells.append(f"{r['us']:.0f} ({rate}) ±{100 * r['spread']:.0f}%")
        out.add_row(f"{name} ({mine[rows[0]]['error']:.0e})", *cells)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=harness.shapes, default="576x1536,4096x4096", help="KxN, comma-separated")
    parser.add_argument("--M", type=harness.ints, default="1,4,16,64,256,512", help="rows of x")
    parser.add_argument("--threads", type=harness.ints, default="1,2")
    parser.add_argument("--dtypes", type=harness.split, default="bf16", help="bf16,fp32,fp16")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--only", type=harness.split, default="*", help="names, or prefixes with *")
    parser.add_argument("--skip", type=harness.split, default="")
    parser.add_argument("--train", action="store_true", help="forward and backward")
    parser.add_argument("--list", action="store_true", help="print the contenders and stop")
    parser.add_argument("--out", default="linear", help="name in bench/results, or a path ending in .json")
    args = parser.parse_args()
    names = [n for n in REGISTRY if harness.matches(n, args.only) and not harness.matches(n, args.skip)]
    console = Console(width=None if sys.stdout.isatty() else 160)
    if args.list:
        console.print("\n".join(names))
        return
    records: list[dict] = []
    limits: dict[int, dict] = {}
    for threads in args.threads:
        torch.set_num_threads(threads)
        limits[threads] = harness.limits()
        console.print(f"machine, {threads} thread(s): {limits[threads]}")
        for (k, n), dtype in itertools.product(args.shapes, args.dtypes):
            part = run(k, n, args.M, dtype, names, args.rounds, args.rank, args.train, console)
            records += part
            what = "forward + backward" if args.train else "forward"
            load = max((r["other_load_cores"] for r in part), default=0)
            console.print(table(part, f"K×N = {k}×{n}, {dtype}, {threads} thread(s), {what}; others used {load} cores"))
            path = harness.write(args.out, {"machine": harness.machine(), "limits": limits, "records": records})
    console.print(f"written: {path}")


if __name__ == "__main__":
    main()
