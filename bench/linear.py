"""y = x · Wᵀ with 4-bit weights on the CPU: ours beside its peers, interleaved in one process.

    python -m bench.linear --shapes 4096x4096 --M 1,16,512 --threads 1
    python -m bench.linear --only 'ours_nf4*,bnb_nf4_eval' --dtypes bf16 --ranks 0,16 --train

Every contender gets so many copies of its weights that they exceed the last-level cache twice over, and calls walk over
them; where the memory for that is not free, fewer, and the result says so. The error is against float64 on the weights
(and adapters) that the contender really uses: of y, or of the gradient to x with ``--train``, which times forward and
backward together. Times are medians over interleaved rounds. The machine's limits are measured before and after each
shape. A contender that is not measured is named, with the reason.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from . import (
    contenders,  # noqa: F401  (fills the registry)
    harness,
)
from .registry import DTYPES, REGISTRY, Case, Layer, Problem, Weight, select, why

SCHEMA = 1
CHECKED_ROWS = 16  # of y are held against float64
MOST_COPIES = 256  # of a contender's weights: peers keep a session each
MANY_ROWS = 64


@dataclass
class Result:
    """What one or several measurements found; ``payload`` is what the JSON file holds."""

    records: list[dict] = field(default_factory=list)
    absent: list[dict] = field(default_factory=list)
    limits: list[dict] = field(default_factory=list)

    def __iadd__(self, other: Result) -> Result:
        self.records += other.records
        self.absent += [a for a in other.absent if a not in self.absent]
        self.limits += other.limits
        return self

    def payload(self, **more: object) -> dict:
        found = {"limits": self.limits, "records": self.records, "absent": self.absent}
        return {"schema": SCHEMA, "machine": harness.machine(), **found, **more}

    def record(self, name: str, m: int, dtype: str, rank: int = 0, adapters: int = 1) -> dict | None:
        """The only record of these settings; None where that contender was not measured."""
        wanted = {"name": name, "m": m, "dtype": dtype, "rank": rank, "adapters": adapters}
        return next((r for r in self.records if all(r[key] == value for key, value in wanted.items())), None)


def _prepare(problem: Problem, case: Case, rotate: int) -> list[Layer]:
    """Copies of one contender's layer, their weights ``rotate`` bytes together."""
    prepare = REGISTRY[case.name].prepare
    first = prepare(problem)
    copies = min(MOST_COPIES, math.ceil(rotate / first.nbytes))
    return [first, *(prepare(replace(problem, copy=i)) for i in range(1, copies))]


def _call(layers: list[Layer], turn: Iterator[int], x: Tensor, dy: Tensor | None) -> Callable[[], object]:
    """``turn`` is common to all cases: whoever shares a copy finds it as cold."""
    if dy is None:
        ring = [layer.call for layer in layers]
        return lambda: ring[next(turn) % len(ring)](x)
    ring, x = [layer.gradients for layer in layers], x.clone().requires_grad_(True)
    return lambda: ring[next(turn) % len(ring)](x, dy)


def _error(layer: Layer, x: Tensor, dy: Tensor | None, expected: Tensor) -> float:
    """Relative Frobenius error of y, or of the gradient to x, over the first rows."""
    if dy is None:
        with torch.no_grad():
            got = layer.call(x)
    else:
        got, *_ = layer.gradients(x.clone().requires_grad_(True), dy)
    got, expected = got[:CHECKED_ROWS].double(), expected[: len(got)]
    return float((got - expected).norm() / expected.norm())


def measure(
    weight: Weight, rows: Iterable[int], cases: Iterable[Case], threads: int, rounds: int = 11, train: bool = False,
    budget_s: float = math.inf, rotate: int | None = None,
) -> Result:  # fmt: skip
    """One weight at one number of threads: a record for every case and number of rows, all cases interleaved.

    Args:
        rounds: of interleaved samples; fewer, but at least three, where they take longer than ``budget_s`` seconds.
        rotate: bytes of weights that the calls of a contender walk over; by default twice the last-level cache, or what
            half of the free memory has for each case, and one weight for 64 rows or more, which leave enough else to
            do.
    """
    torch.set_num_threads(threads)
    rows, cases = list(rows), list(cases)
    where = {"k": weight.k, "n": weight.n, "threads": threads, "train": train}
    result = Result()
    limits = [harness.limits(threads)]
    wanted, by_default = rotate, rotate is None
    if rotate is None:
        wanted = 2 * harness.last_level_cache() if min(rows) < MANY_ROWS else 0
        rotate = min(wanted, harness.free_memory() // 2 // max(1, len(cases)))
    generator = torch.Generator().manual_seed(4)
    all_x = torch.randn(max(rows), weight.k, generator=generator)
    all_dy = torch.randn(max(rows), weight.n, generator=generator)
    ready: dict[Case, tuple[list[Layer], Tensor]] = {}
    for case in cases:
        problem = Problem(weight, DTYPES[case.dtype], case.rank, case.adapters, train, threads)
        try:
            layers = _prepare(problem, case, rotate)
            exact = layers[0].weight()
            given = (all_dy if train else all_x)[:CHECKED_ROWS].to(problem.dtype).double()
            ready[case] = layers, given @ exact if train else given @ exact.t()
        except Exception as error:
            result.absent.append(asdict(case) | {"reason": why(error)})
    for m in rows:
        xs = {name: all_x[:m].to(dtype) for name, dtype in DTYPES.items()}
        dys = {name: all_dy[:m].to(dtype) if train else None for name, dtype in DTYPES.items()}
        turn, calls = itertools.count(), {}
        for case, (layers, _) in ready.items():
            layers = layers[:1] if by_default and m >= MANY_ROWS else layers
            call = _call(layers, turn, xs[case.dtype], dys[case.dtype])
            try:
                # The first call of each copy is none to time: bitsandbytes repacks the weight, and with every new
                # number of rows ONNX Runtime and OpenVINO bind, and oneDNN looks for a kernel.
                with torch.set_grad_enabled(train):
                    for _ in layers:
                        call()
            except Exception as error:
                result.absent.append(asdict(case) | {"m": m, "reason": why(error)})
            else:
                calls[case] = call
        with harness.Load() as load, torch.set_grad_enabled(train):
            timings = harness.interleave(calls, rounds, budget_s=budget_s)
        for case, timing in timings.items():
            layers, expected = ready[case]
            entry, nbytes = REGISTRY[case.name], layers[0].nbytes
            flop = 2 * m * weight.k * weight.n * (2 if train else 1)
            result.records.append(
                {"name": case.name, "package": entry.package, "tier": entry.tier, "dtype": case.dtype}
                | {"rank": case.rank, "adapters": case.adapters, "m": m, **where, **timing.as_dict()}
                | {
                    "gb_s": round(nbytes / timing.median / 1e9, 2),
                    "gflop_s": round(flop / timing.median / 1e9, 1),
                    "error": _error(layers[0], xs[case.dtype], dys[case.dtype], expected),
                    "nbytes": nbytes,
                    "other_load_cores": round(load.cores, 2),
                    "samples_us": [round(s * 1e6, 2) for s in timing.samples],
                }
            )
    limits.append(harness.limits(threads))
    result.limits.append(where | {"rotate": rotate, "rotate_wanted": wanted} | harness.best_limits(limits))
    return result


def sweep(
    names: Iterable[str], shapes: Iterable[tuple[int, int]], rows: Iterable[int], threads: Iterable[int],
    dtypes: Iterable[str], ranks: Iterable[int], adapters: Iterable[int], rounds: int, train: bool, console: Console,
    budget_s: float = math.inf,
) -> Iterable[Result]:  # fmt: skip
    """:func:`measure` over shapes and threads; prints a table of each and what could not be measured."""
    chosen = select(names, dtypes, ranks, adapters, train)
    absent = [{"name": name, "reason": reason} for name, reason in chosen.absent.items()]
    for k, n in shapes:
        weight = Weight(k, n)
        for count in threads:
            part = measure(weight, rows, chosen.cases, count, rounds, train, budget_s)
            part.absent = absent + part.absent
            console.print(table(part))
            yield part


def table(result: Result) -> Table:
    """Microseconds a call (median), with GB/s of weights up to M = 4 and GFLOP/s above; what is absent below."""
    limits = result.limits[0]
    roofs = ", ".join(f"{limits[key]} {unit}" for key, unit in ROOFS.items() if limits[key])
    rows = sorted({r["m"] for r in result.records})
    out = Table(
        title=f"K×N = {limits['k']}×{limits['n']}, {limits['threads']} thread(s), "
        f"{'forward + backward' if limits['train'] else 'forward'}; the machine: {roofs}; others used "
        f"{max((r['other_load_cores'] for r in result.records), default=0)} cores",
        title_justify="left",
        caption="\n".join([*walked(limits), *(f"not measured: {line}" for line in reasons(result.absent))]) or None,
        caption_justify="left",
    )
    out.add_column("contender", no_wrap=True)
    for m in rows:
        out.add_column(f"M={m}", justify="right")
    out.add_column("error ≤", justify="right")
    found = {(label(r), r["m"]): r for r in result.records}
    for name in dict.fromkeys(label for label, _ in found):
        mine = [found.get((name, m)) for m in rows]
        out.add_row(name, *map(_cell, mine), f"{max(r['error'] for r in mine if r):.0e}")
    return out


def _cell(record: dict | None) -> str:
    if record is None:
        return "–"
    rate = f"{record['gb_s']:.1f}" if record["m"] <= 4 else f"{record['gflop_s']:.0f}"
    return f"{record['us']:.0f} ({rate}) {harness.spread(record)}"


ROOFS = {
    "read_gb_s": "GB/s read",
    "fp32_gflop_s": "GFLOP/s fp32",
    "bf16_gflop_s": "GFLOP/s bf16",
    "int8_gop_s": "Gop/s int8",
}


def walked(limits: dict) -> list[str]:
    """A line where the calls walked over fewer weights than they should, so that caches help; else none."""
    if limits["rotate"] >= limits["rotate_wanted"]:
        return []
    rotate, wanted = (limits[key] >> 20 for key in ("rotate", "rotate_wanted"))
    return [f"calls walked over {rotate} MiB of weights, not {wanted} MiB (twice the cache): no more memory was free"]


def label(record: dict) -> str:
    return Case(record["name"], record["dtype"], record["rank"], record["adapters"]).label


def reasons(absent: list[dict]) -> list[str]:
    """Lines ``names: reason``, contenders with one reason together; of whom some cases only are absent, which."""
    together: dict[str, dict[str, list[str]]] = {}
    for entry in absent:
        names = together.setdefault(entry["reason"], {})
        rows = names.setdefault(label(entry) if "dtype" in entry else entry["name"], [])
        if "m" in entry and str(entry["m"]) not in rows:
            rows.append(str(entry["m"]))
    named = {
        reason: [name + (f" at M = {'/'.join(rows)}" if rows else "") for name, rows in names.items()]
        for reason, names in together.items()
    }
    return [f"{', '.join(names)}: {reason}" for reason, names in named.items()]


@harness.undisturbed()
def main() -> None:
    parser = harness.parser(__doc__, "linear", rounds=11)
    parser.add_argument("--shapes", type=harness.shapes, default="576x1536,4096x4096", help="KxN, comma-separated")
    parser.add_argument("--M", type=harness.counts, default="1,4,16,64,256,512", help="rows of x")
    parser.add_argument("--threads", type=harness.counts, default="1,2")
    parser.add_argument("--dtypes", type=harness.among(DTYPES), default="bf16,fp32", help="bf16,fp32,fp16")
    parser.add_argument("--ranks", type=harness.ints, default="0", help="of the LoRA branch; 0 is none")
    parser.add_argument("--adapters", type=harness.counts, default="1", help="mixed in one batch")
    parser.add_argument("--only", type=harness.among(REGISTRY), default="*", help="names, or patterns with *")
    parser.add_argument("--skip", type=harness.among(REGISTRY), default=[])
    parser.add_argument("--train", action="store_true", help="forward and backward")
    parser.add_argument("--list", action="store_true", help="print the contenders and stop")
    args = parser.parse_args()
    names = [name for name in args.only if name not in args.skip]
    console = Console(width=None if sys.stdout.isatty() else 200)
    if args.list:
        for name in names:
            console.print(name, REGISTRY[name].missing(), style="dim" if REGISTRY[name].missing() else None)
        return
    result = Result()
    for part in sweep(
        names,
        args.shapes,
        args.M,
        args.threads,
        args.dtypes,
        args.ranks,
        args.adapters,
        args.rounds,
        args.train,
        console,
    ):
        result += part
        path = harness.write(args.out, result.payload())
    console.print(f"written: {path}")


if __name__ == "__main__":
    main()
