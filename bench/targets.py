"""The promises on speed and memory, measured on this machine and held against their targets.

    python bench/targets.py            # everything, about ten minutes
    python bench/targets.py --only lora,small

Every figure is a ratio or a time from interleaved rounds in one process; peak memory comes from a process each.
Writes bench/results/targets.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import harness
import hotswap
import linear
import qlora_step
import quantize
import torch
from rich.console import Console
from rich.table import Table


@dataclass
class Row:
    """One promise: ``measured`` must be at most, or at least, ``target``."""

    what: str
    measured: float
    relation: str
    target: float
    unit: str

    @property
    def met(self) -> bool:
        return self.measured <= self.target if self.relation == "≤" else self.measured >= self.target


def _ratios(records: list[dict], name: str, against: str) -> dict[int, float]:
    by = {(r["name"], r["m"]): r["samples_us"] for r in records}
    return {m: harness.paired_ratio(by[name, m], by[against, m]) for n, m in by if n == name and (against, m) in by}


def lora(args: argparse.Namespace, console: Console, keep: list[dict]) -> Iterator[Row]:
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for k, n in ((2048, 2048), (4096, 4096), (2048, 8192)):
            names = ["ours_nf4", "ours_nf4_lora"]
            records = linear.run(k, n, [1, 2, 4, 8, 16, 64, 512], "bf16", names, args.rounds, 16, False, console)
            keep += records
            for m, ratio in _ratios(records, "ours_nf4_lora", "ours_nf4").items():
                yield Row(f"LoRA r = 16 over base, {k}×{n}, M = {m}, {threads} thread(s)", ratio, "≤", 1.08, "×")


def square(args: argparse.Namespace, console: Console, keep: list[dict]) -> Iterator[Row]:
    torch.set_num_threads(1)
    names = ["ours_nf4", "bnb_nf4_eval", "torch_dense"]
    records = linear.run(4096, 4096, [1, 512], "bf16", names, args.rounds, 16, False, console)
    trained = linear.run(4096, 4096, [512], "bf16", ["ours_nf4", "torch_dense"], args.rounds, 16, True, console)
    keep += records + trained
    forward = _ratios(records, "ours_nf4", "torch_dense")
    if harness.installed("bitsandbytes"):
        ratio = _ratios(records, "ours_nf4", "bnb_nf4_eval")[1]
        yield Row("4096², M = 1, against bitsandbytes eval", ratio, "≤", 1.0, "×")
    yield Row("4096², M = 512 forward, against F.linear bf16", forward[512], "≤", 1.0, "×")
    ratio = _ratios(trained, "ours_nf4", "torch_dense")[512]
    yield Row("4096², M = 512 forward + backward, against F.linear bf16", ratio, "≤", 1.0, "×")


def small(args: argparse.Namespace, console: Console, keep: list[dict]) -> Iterator[Row]:
    torch.set_num_threads(1)
    names = ["ours_nf4", "ours_nf4_lora", "bnb_nf4_eval"]
    records = linear.run(576, 1536, [1], "bf16", names, 3 * args.rounds, 16, False, console)
    keep += records
    yield Row("576×1536, M = 1, one call", next(r["us"] for r in records if r["name"] == "ours_nf4"), "≤", 25, "µs")


def quantizing(args: argparse.Namespace, console: Console, keep: list[dict]) -> Iterator[Row]:
    records = quantize.measure(2, (4096, 4096), max(3, args.rounds // 2))
    keep += records
    for r in records:
        if r["name"] == "ours.quantize" and r["dtype"] == "bfloat16" and r["speedup"]:
            what = f"quantizing {r['format']} from bf16, 2 threads"
            yield Row(f"{what}, against bitsandbytes", r["speedup"], "≥", 5, "×")
            yield Row(f"{what}, 7e9 parameters", r["seconds_for_7e9"], "≤", 60, "s")


def step(args: argparse.Namespace, console: Console, keep: list[dict]) -> Iterator[Row]:
    torch.set_num_threads(2)
    options = argparse.Namespace(
        model="135m", batch=4, length=256, threads=2, rounds=max(3, args.rounds // 2), only=["*"]
    )
    result = qlora_step.measure(options, console)
    keep.append(result)
    row = result["contenders"]["ours"]
    if "speedup" in row:
        yield Row("QLoRA step SmolLM2-135M, against peft + bitsandbytes", row["speedup"], "≥", 1.8, "×")
        yield Row("its peak memory", row["memory_ratio"], "≤", 0.5, "×")


def swap(args: argparse.Namespace, console: Console, keep: list[dict]) -> Iterator[Row]:
    torch.set_num_threads(1)
    rows = hotswap.measure("135m", 3 * args.rounds, console)
    keep.append(rows)
    for name, row in rows.items():
        if name.startswith("ours") and "folder" not in name:
            yield Row(f"{name.removeprefix('ours: ')}, SmolLM2-135M", row["us"] / 1e3, "≤", 1.0, "ms")


SECTIONS: dict[str, Callable] = {
    "lora": lora, "square": square, "small": small, "quantize": quantizing, "step": step, "swap": swap,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=harness.split, default=",".join(SECTIONS), help=", ".join(SECTIONS))
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--out", default="targets", help="name in bench/results, or a path ending in .json")
    args = parser.parse_args()
    unknown = set(args.only) - set(SECTIONS)
    if unknown:
        parser.error(f"--only names {', '.join(sorted(unknown))}; it must be among {', '.join(SECTIONS)}")
    console = Console(width=140)
    limits = {}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        limits[threads] = harness.limits()
    console.print(f"machine: {limits}")
    table = Table(title="Speed and memory")
    for column in ("promise", "measured", "target", ""):
        table.add_column(column)
    rows: list[Row] = []
    detail: dict[str, list] = {}
    load: dict[str, float] = {}
    for name in args.only:
        detail[name] = []
        with harness.Load() as others:
            rows += list(SECTIONS[name](args, console, detail[name]))
        load[name] = round(others.cores, 2)
        payload = {"machine": harness.machine(), "limits": limits, "other_load_cores": load}
        payload |= {"rows": [asdict(r) | {"met": r.met} for r in rows], "detail": detail}
        path = harness.write(args.out, payload)
    for r in rows:
        verdict = "[green]met" if r.met else "[red]missed"
        table.add_row(r.what, f"{r.measured:.3g} {r.unit}", f"{r.relation} {r.target:g} {r.unit}", verdict)
    console.print(table)
    console.print(f"written: {path}; cores kept busy by others: {load}")


if __name__ == "__main__":
    main()
