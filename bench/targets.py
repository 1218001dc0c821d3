"""The promises on speed and memory, measured on this machine and held against their targets.

    python -m bench.targets            # everything
    python -m bench.targets --only lora,small

Every figure is a ratio or a time from interleaved rounds in one process; peak memory comes from a process each. A speed
ratio is the other's time over ours, so more is better; a cost is time over the base layer's. Roofs are those measured
around the same rounds. A contender that is not measured is named, with the reason. Writes bench/results/targets.json.
"""

from __future__ import annotations

import argparse
import copy
import gc
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import pyfastpeft as fp

from . import attention, decode, harness, hotswap, linear, prefix_decode, qlora_step, quantize, soft_prompts
from .linear import Result
from .registry import DTYPES, REGISTRY, Case, Weight

BUDGET_S = 8.0  # for the rounds of one number of rows
PEERS = ("ggml_q4_K", "ggml_q4_0", "ggml_q4_K_tiled", "ort_nbits_b64_acc4", "ov_u4_dq64", "bnb_nf4_eval", "ov_nf4")


@dataclass
class Row:
    """One promise: ``measured`` must be at most, or at least, ``target``; None is what could not be measured."""

    what: str
    measured: float | None
    relation: str
    target: float
    unit: str
    note: str = ""

    @property
    def met(self) -> bool:
        if self.measured is None:
            return False
        return self.measured <= self.target if self.relation == "≤" else self.measured >= self.target


def _measure(
    shape: tuple[int, int], rows: Iterable[int], cases: Iterable[Case], threads: int, args: argparse.Namespace,
    keep: list[dict], train: bool = False,
) -> Result:  # fmt: skip
    cases = list(cases)
    missing = {case.name: REGISTRY[case.name].missing() for case in cases}
    present = [case for case in cases if not missing[case.name]]
    result = linear.measure(Weight(*shape), rows, present, threads, args.rounds, train, BUDGET_S)
    result.absent += [{"name": name, "reason": reason} for name, reason in missing.items() if reason]
    keep += [{key: value for key, value in r.items() if key != "samples_us"} for r in result.records]
    keep += result.limits + result.absent
    return result


def _bench(module: ModuleType, keep: list[dict], *options: str) -> dict:
    """What the bench ``module`` finds with these options on two threads."""
    torch.set_num_threads(2)
    keep.append(module.measure(module.parser().parse_args(["--threads=2", *options]), Console(quiet=True)))
    return keep[-1]


def _absent(keep: list[dict]) -> list[dict]:
    """What a section could not measure, layers and whole models, with the reasons."""
    models = ((name, reason) for found in keep for name, reason in found.get("absent", {}).items())
    return [found for found in keep if "reason" in found] + [{"name": name, "reason": why} for name, why in models]


def _cases(names: Iterable[str], rank: int = 0) -> list[Case]:
    """Each contender with the inputs it likes best: bf16 where it takes them, and both where rows decide."""

    def dtypes(name: str) -> tuple[str, ...]:
        if name == "ov_nf4":  # up to 4 rows in fp32, more in bf16
            return "bf16", "fp32"
        return ("bf16" if "bf16" in REGISTRY[name].dtypes else "fp32",)

    return [Case(name, dtype, rank) for name in names for dtype in dtypes(name)]


def _ratio(above: dict | None, below: dict | None) -> float | None:
    return None if above is None or below is None else harness.paired_ratio(above["samples_us"], below["samples_us"])


def _speed(result: Result, m: int, ours: str, tier: str) -> tuple[float | None, str]:
    """Speed of ``ours`` over the best peer of a tier, and who that is."""
    mine = result.record(ours, m, "bf16")
    peers = [r for r in result.records if r["m"] == m and r["tier"] == tier and r["package"] != "ours"]
    if mine is None or not peers:
        missing = next((a["reason"] for a in result.absent if a["name"] == ours), "no such peer is installed")
        return None, missing
    best = min(peers, key=lambda r: r["us"])
    return _ratio(best, mine), f"against {linear.label(best)}"


def _share(what: str, result: Result, record: dict | None, roof: str, target: float) -> Row:
    """A record's rate as a share of a limit of the machine."""
    limit = result.limits[0][roof]
    rate = None if record is None else record["gb_s" if roof == "read_gb_s" else "gflop_s"]
    note = f"{rate} of {limit}" if limit else "this CPU has no such instructions"
    return Row(what, rate / limit if rate and limit else None, "≥", target, "", note if rate else "")


def one_row(args: argparse.Namespace, keep: list[dict]) -> Iterator[Row]:
    names = ["ours_nf4", "ours_nf4_dq", "ours_int4", *PEERS]
    for threads, share in ((1, 0.90), (2, 0.92)):
        for k, n in ((4096, 4096), (4096, 14336)):
            result = _measure((k, n), [1], _cases(names), threads, args, keep)
            where = f"M = 1, {k}×{n}, {threads} thread(s)"
            ours, k_quant = result.record("ours_nf4", 1, "bf16"), result.record("ggml_q4_K", 1, "fp32")
            yield _share(f"{where}: share of the read bandwidth", result, ours, "read_gb_s", share)
            exact, int8 = (_speed(result, 1, "ours_nf4", tier) for tier in ("exact", "int8"))
            least = min((s for s in (exact, int8) if s[0]), default=exact, key=lambda s: s[0])
            target = 1.25 if threads == 1 else 1.0
            yield Row(f"{where}: speed over the best peer", least[0], "≥", target, "×", least[1])
            if threads == 2:
                dq = result.record("ours_nf4_dq", 1, "bf16")
                yield Row(f"{where}: speed over ggml Q4_K", _ratio(k_quant, ours), "≥", 1.0, "×")
                yield Row(f"{where}, double quantization: speed over ggml Q4_K", _ratio(k_quant, dq), "≥", 1.12, "×")


def few_rows(args: argparse.Namespace, keep: list[dict]) -> Iterator[Row]:
    for threads in (1, 2):
        for k, n in ((4096, 4096), (2048, 8192)):
            names = ["ours_nf4", "ours_nf4_int8", "torch_dense", *PEERS]
            result = _measure((k, n), [4, 16, 64], _cases(names), threads, args, keep)

            def where(m: int, k: int = k, n: int = n, threads: int = threads) -> str:
                return f"M = {m}, {k}×{n}, {threads} thread(s)"

            def dynamic(m: int, result: Result = result) -> tuple[float | None, str]:
                mine, peer = result.record("ours_nf4_int8", m, "bf16"), result.record("ov_u4_dq64", m, "bf16")
                return _ratio(peer, mine), "" if mine else _speed(result, m, "ours_nf4_int8", "int8")[1]

            value, note = _speed(result, 4, "ours_nf4", "exact")
            yield Row(f"{where(4)}: speed over the best exact peer", value, "≥", 1.3, "×", note)
            value, note = dynamic(4)
            yield Row(f"{where(4)}, int8: speed over OpenVINO dynamic", value, "≥", 1.2, "×", note)
            for m, share in ((16, 0.8), (64, 0.9)):
                ours = result.record("ours_nf4", m, "bf16")
                yield _share(f"{where(m)}: share of the vdpbf16ps peak", result, ours, "bf16_gflop_s", share)
            value, note = dynamic(16)
            yield Row(f"{where(16)}, int8: speed over OpenVINO dynamic", value, "≥", 1.25, "×", note)
            dense = result.record("torch_dense", 64, "bf16")
            value = _ratio(dense, result.record("ours_nf4", 64, "bf16"))
            yield Row(f"{where(64)}: speed over torch bf16", value, "≥", 1.1, "×")
            value, note = _speed(result, 64, "ours_nf4_int8", "int8")
            yield Row(f"{where(64)}, int8: speed over the best such peer", value, "≥", 1.25, "×", note)


def many_rows(args: argparse.Namespace, keep: list[dict]) -> Iterator[Row]:
    names = ["ours_nf4", "ours_nf4_int8", "torch_dense", "ov_u4_dq64", "ggml_q4_K_tiled"]
    for threads in (1, 2):
        result = _measure((4096, 4096), [256, 512, 2048], _cases(names), threads, args, keep)
        for m in (256, 512, 2048):
            where = f"M = {m}, 4096², {threads} thread(s)"
            value = _ratio(result.record("torch_dense", m, "bf16"), result.record("ours_nf4", m, "bf16"))
            yield Row(f"{where}: speed over torch bf16", value, "≥", 1.0, "×")
            value, note = _speed(result, m, "ours_nf4_int8", "int8")
            yield Row(f"{where}, int8: speed over the best such peer", value, "≥", 1.25, "×", note)
        int8 = result.record("ours_nf4_int8", 512, "bf16")
        if threads == 1:
            what = "M = 512, 4096², 1 thread, int8: share of the vpdpbusd peak"
            yield _share(what, result, int8, "int8_gop_s", 0.8)
            yield Row("its error", int8 and int8["error"], "≤", 7e-3, "")


def train(args: argparse.Namespace, keep: list[dict]) -> Iterator[Row]:
    cases = [
        *_cases(["ours_nf4", "torch_dense"]),
        *_cases(["ours_nf4", "torch_dense", "peft_bnb_nf4_train"], 16),
    ]
    for threads in (1, 2):
        result = _measure((4096, 4096), [64, 256, 512], cases, threads, args, keep, train=True)
        for m in (256, 512):
            value = _ratio(result.record("torch_dense", m, "bf16"), result.record("ours_nf4", m, "bf16", 16))
            what = f"forward + backward with LoRA r = 16, M = {m}, 4096², {threads} thread(s)"
            yield Row(f"{what}: speed over torch bf16 without LoRA", value, "≥", 1.0, "×")
        for m, target in ((64, 2.0), (512, 1.12)):
            value = _ratio(result.record("peft_bnb_nf4_train", m, "bf16", 16), result.record("ours_nf4", m, "bf16", 16))
            what = f"forward + backward with LoRA r = 16, M = {m}, 4096², {threads} thread(s)"
            yield Row(f"{what}: speed over peft + bitsandbytes", value, "≥", target, "×")


def lora(args: argparse.Namespace, keep: list[dict]) -> Iterator[Row]:
    rows = [1, 2, 4, 8, 16, 64, 512]
    names = ("ours_nf4_packed", "ours_nf4_int8")
    for threads in (1, 2):
        for k, n in ((2048, 2048), (4096, 4096), (2048, 8192)):
            cases = _cases(["ours_nf4", "ours_nf4_int8"]) + [c for r in (16, 64) for c in _cases(names, r)]
            result = _measure((k, n), rows, cases, threads, args, keep)
            for name, rank, m in ((name, rank, m) for name in names for rank in (16, 64) for m in rows):
                base = result.record(REGISTRY[name].over or name, m, "bf16")
                value = _ratio(result.record(name, m, "bf16", rank), base)
                tier = ", int8" if REGISTRY[name].tier == "int8" else ""
                what = f"LoRA r = {rank} over base{tier}, {k}×{n}, M = {m}, {threads} thread(s)"
                yield Row(what, value, "≤", {16: 1.04, 64: 1.12}[rank], "×")


def adapters(args: argparse.Namespace, keep: list[dict]) -> Iterator[Row]:
    cases = [Case(name, "bf16", 16, count) for name in ("ours_nf4_packed", "peft_bnb_nf4_eval") for count in (1, 4)]
    cases += [Case("ours_nf4_int8", "bf16", 16, count) for count in (1, 4)]
    for threads in (1, 2):
        for k, n in ((4096, 4096), (2048, 8192)):
            result = _measure((k, n), [16, 512], cases, threads, args, keep)
            for m in (16, 512):
                what = f"4 adapters in a batch over one, {k}×{n}, M = {m}, {threads} thread(s)"
                for name, tier in (("ours_nf4_packed", ""), ("ours_nf4_int8", ", int8")):
                    value = _ratio(*(result.record(name, m, "bf16", 16, count) for count in (4, 1)))
                    peer = _ratio(*(result.record("peft_bnb_nf4_eval", m, "bf16", 16, count) for count in (4, 1)))
                    yield Row(f"{what}{tier}", value, "≤", 1.08, "×", f"peft: {peer:.2f} ×" if peer else "")


def small(args: argparse.Namespace, keep: list[dict]) -> Iterator[Row]:
    names = ["ours_nf4", "ours_nf4_module", "bnb_nf4_eval", "ggml_q4_0", "ort_nbits_b64_acc4", "ov_u4_dq64"]
    for threads in (1, 2):
        wide = argparse.Namespace(**{**vars(args), "rounds": 3 * args.rounds})
        result = _measure((576, 1536), [1], _cases(names), threads, wide, keep)
        record = result.record("ours_nf4", 1, "bf16")
        yield Row(f"576×1536, M = 1, one call from Python, {threads} thread(s)", record["us"], "≤", 10, "µs")


def float32(args: argparse.Namespace, keep: list[dict]) -> Iterator[Row]:
    cases = [Case(name, "fp32") for name in ("ours_nf4", "torch_dense", "bnb_nf4_train")]
    for threads in (1, 2):
        result = _measure((4096, 4096), [64, 512], cases, threads, args, keep)
        for m in (64, 512):
            ours = result.record("ours_nf4", m, "fp32")
            what = f"fp32 inputs, M = {m}, 4096², {threads} thread(s)"
            yield Row(
                f"{what}: speed over torch fp32", _ratio(result.record("torch_dense", m, "fp32"), ours), "≥", 0.95, "×"
            )
            yield Row(f"{what}: error", ours["error"], "≤", 1e-5, "")


def avx2(args: argparse.Namespace, keep: list[dict]) -> Iterator[Row]:
    """AVX2 on this machine: one row beside the best instruction set, more beside torch that is held to AVX2 too."""
    best, *_ = isas = torch.ops.pyfastpeft.available_isas()
    if "avx2" not in isas:
        return
    chosen = torch.ops.pyfastpeft.isa()
    torch.set_num_threads(1)
    weights = [fp.quantize_4bit(torch.randn(4096, 4096))]
    weights += [copy.deepcopy(weights[0]) for _ in range(2 * harness.last_level_cache() // weights[0].nbytes)]
    turn = itertools.cycle(weights)

    def on(isa: str, x: Tensor) -> Callable[[], object]:
        def call() -> None:
            torch.ops.pyfastpeft.set_isa(isa)
            fp.ops.linear_4bit(x, next(turn))

        return call

    for name in ("bf16", "fp32"):
        x = torch.randn(1, 4096).to(DTYPES[name])
        timings = harness.interleave({isa: on(isa, x) for isa in (best, "avx2")}, args.rounds)
        keep.extend({"isa": isa, "m": 1, "dtype": name} | timing.as_dict() for isa, timing in timings.items())
        value = timings[best].ratio(timings["avx2"])
        yield Row(f"AVX2, M = 1, 4096², {name}, 1 thread: speed over the best instruction set", value, "≥", 0.6, "×")
    torch.ops.pyfastpeft.set_isa(chosen)

    held = {
        "PYFASTPEFT_CPU_ISA": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ATEN_CPU_CAPABILITY": "avx2",
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "out.json")
        options = ["--shapes=4096x4096", "--M=64,512", "--threads=1", "--dtypes=fp32", f"--rounds={args.rounds}"]
        command = [sys.executable, "-m", linear.__name__, *options, "--only=ours_nf4,torch_dense", "--out", out]
        subprocess.run(command, check=True, capture_output=True, env=os.environ | held)
        found = json.loads(Path(out).read_text())
    result = Result(found["records"])
    keep.extend({key: value for key, value in r.items() if key != "samples_us"} for r in result.records)
    keep += found["absent"]
    for m in (64, 512):
        value = _ratio(result.record("torch_dense", m, "fp32"), result.record("ours_nf4", m, "fp32"))
        yield Row(f"AVX2, M = {m}, 4096², fp32, 1 thread: speed over torch fp32 on AVX2", value, "≥", 0.85, "×")


def step(args: argparse.Namespace, keep: list[dict]) -> Iterator[Row]:
    result = _bench(qlora_step, keep, f"--rounds={max(3, args.rounds // 3)}", "--only=ours,peft_bnb_nf4")
    for name, row in result["contenders"].items():
        if "speedup" in row:
            yield Row(f"QLoRA step SmolLM2-135M, {name}: speed over peft + bitsandbytes", row["speedup"], "≥", 1.8, "×")
            yield Row(f"its peak memory, {name}", row["memory_ratio"], "≤", 0.5, "×")


def _decoding(model: str, tokens: int, over_peft: float) -> Callable:
    def section(args: argparse.Namespace, keep: list[dict]) -> Iterator[Row]:
        found = _bench(decode, keep, f"--model={model}", f"--tokens={tokens}", "--rounds=3")["contenders"]
        ours = found["ours_nf4_lora"]
        for peer, target in (("peft_bnb_nf4_lora", over_peft), ("llama_cpp_q4_0", 0.6)):
            what = f"decoding {model} with LoRA r = 16 unmerged, 2 threads: speed over {peer}"
            note = f"{ours['tokens_per_s']:.1f} tokens/s"
            if peer in found:
                note += f" against {found[peer]['tokens_per_s']:.1f}"
            yield Row(what, _ratio(found.get(peer), ours), "≥", target, "×", note)

    return section


def _prefix_decoding(model: str, tokens: int) -> Callable:
    def section(args: argparse.Namespace, keep: list[dict]) -> Iterator[Row]:
        found = _bench(prefix_decode, keep, f"--model={model}", f"--tokens={tokens}", "--rounds=3")["contenders"]
        theirs = found["bf16_repeated"]
        for name in ("ours_nf4", "ours_bf16"):
            what = f"decoding {model}, 8 rows behind 512 shared tokens, {name}: speed over bf16 with a copy a row"
            note = f"{found[name]['tokens_per_s']:.0f} tokens/s against {theirs['tokens_per_s']:.0f}"
            yield Row(what, _ratio(theirs, found[name]), "≥", 2.0, "×", note)

    return section


def attention_alone(args: argparse.Namespace, keep: list[dict]) -> Iterator[Row]:
    result = _bench(attention, keep, f"--rounds={args.rounds}", "--budget=0.5")
    for row in result["rows"]:
        passes = "forward" if row["passes"] == "forward" else "forward and backward"
        behind = f", behind {row['prefix']} tokens" if row["prefix"] else ""
        what = f"attention of {row['batch']} × {row['tokens']} in {row['dtype']}{behind}, {passes}: speed over sdpa"
        note = f"{row['over_floor']:.1f} times the floor"
        yield Row(what, row["speedup"], "≥", 1.3 if row["prefix"] else 1.0, "×", note)


def quantizing(args: argparse.Namespace, keep: list[dict]) -> Iterator[Row]:
    result = _bench(quantize, keep, f"--rounds={max(3, args.rounds // 2)}")
    for r in result["records"]:
        if r["name"] == "ours.quantize" and r["dtype"] == "bfloat16" and r["speedup"]:
            what = f"quantizing {r['format']} from bf16, 2 threads"
            yield Row(f"{what}, against bitsandbytes", r["speedup"], "≥", 5, "×")
            yield Row(f"{what}, 7e9 parameters", r["seconds_for_7e9"], "≤", 60, "s")


def _soft_prompts(model: str) -> Callable:
    def section(args: argparse.Namespace, keep: list[dict]) -> Iterator[Row]:
        result = _bench(soft_prompts, keep, f"--model={model}", f"--rounds={max(3, args.rounds // 3)}")
        for row in result["steps"]:
            if "peft" in row:
                what = f"step of {row['method']} over {row['base']}, {model}"
                target = 1.7 if row["method"] in ("prompt", "ptuning") else 1.4
                note = "over its prefix tuning: it has no v2" if row["method"] == "ptuning-v2" else ""
                yield Row(f"{what}: speed over peft", row["speedup"], "≥", target, "×", note)
                yield Row("its peak memory", row["memory_ratio"], "≤", 0.6, "×")
        for row in result["switches"]:
            yield Row(f"switching between two adapters of {row['method']}", row["us"] / 1e3, "≤", 1.0, "ms")

    return section


def swap(args: argparse.Namespace, keep: list[dict]) -> Iterator[Row]:
    result = _bench(hotswap, keep, f"--rounds={3 * args.rounds}")
    for name, row in result["rows"].items():
        if name.startswith("ours") and "folder" not in name:
            left = f"{row['next_forward_us'] / 1e3:.2f} ms more in the next forward"
            yield Row(f"{name.removeprefix('ours: ')}, SmolLM2-135M", row["us"] / 1e3, "≤", 1.0, "ms", left)


SECTIONS: dict[str, Callable[[argparse.Namespace, list[dict]], Iterator[Row]]] = {
    "one_row": one_row,
    "few_rows": few_rows,
    "many_rows": many_rows,
    "train": train,
    "lora": lora,
    "adapters": adapters,
    "small": small,
    "fp32": float32,
    "avx2": avx2,
    "step": step,
    "decode": _decoding("smollm2", 32, 5.0),
    "decode_1b": _decoding("1.1b", 16, 2.5),
    "prefix_decode": _prefix_decoding("smollm2", 16),
    "prefix_decode_1b": _prefix_decoding("1.1b", 8),
    "attention": attention_alone,
    "quantize": quantizing,
    "swap": swap,
    "soft_prompts": _soft_prompts("135m"),
    "soft_prompts_1b": _soft_prompts("1.1b"),
}


@harness.undisturbed()
def main() -> None:
    parser = harness.parser(__doc__, "targets", rounds=9)
    parser.add_argument("--only", type=harness.among(SECTIONS), default=",".join(SECTIONS), help=", ".join(SECTIONS))
    args = parser.parse_args()
    console = Console(width=150)
    payload = {"machine": harness.machine(), "other_load_cores": {}, "rows": [], "detail": {}}
    for name in args.only:
        payload["detail"][name] = keep = []
        gc.collect()  # the models of the sections before, which refer to themselves
        with harness.Load() as others:
            rows = list(SECTIONS[name](args, keep))
        payload["other_load_cores"][name] = round(others.cores, 2)
        payload["rows"] += [asdict(r) | {"met": r.met, "section": name} for r in rows]
        path = harness.write(args.out, payload)
        table = Table(title=f"{name}; others used {others.cores:.2f} cores", title_justify="left")
        for column in ("promise", "measured", "target", "", ""):
            table.add_column(column)
        for r in rows:
            measured = "–" if r.measured is None else f"{r.measured:.3g} {r.unit}"
            verdict = "[green]met" if r.met else "[red]missed"
            table.add_row(r.what, measured, f"{r.relation} {r.target:g} {r.unit}", verdict, r.note)
        console.print(table)
        for line in linear.reasons(_absent(keep)):
            console.print(f"not measured: {line}", markup=False)
    met = sum(r["met"] for r in payload["rows"])
    console.print(f"{met} of {len(payload['rows'])} met; written: {path}")


if __name__ == "__main__":
    main()
