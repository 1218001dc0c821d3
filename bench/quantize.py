"""Quantizing to 4 bits and back on the CPU: ours beside bitsandbytes, in GB/s and in seconds for 7e9 parameters.

python -m bench.quantize --threads 1,2
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from types import ModuleType

import torch
from rich.console import Console

import pyfastpeft as fp

from . import harness
from .registry import ready

PARAMETERS = 7e9


def bitsandbytes() -> ModuleType:
    """Its functions, which have run once."""
    from bitsandbytes import functional as bnb

    bnb.dequantize_4bit(*bnb.quantize_4bit(torch.ones(64, 64), quant_type="nf4"))
    return bnb


def contenders(
    weight: torch.Tensor, quant_type: str, double_quant: bool, bnb: ModuleType | None
) -> dict[str, Callable[[], object]]:
    """Both directions of each implementation that has the format; dequantization is to the weight's dtype."""
    packed = fp.quantize_4bit(weight, quant_type, 64, double_quant)
    calls: dict[str, Callable[[], object]] = {
        "ours.quantize": lambda: fp.quantize_4bit(weight, quant_type, 64, double_quant),
        "ours.dequantize": lambda: packed.dequantize(weight.dtype),
    }
    if bnb and quant_type != "int4":
        codes, state = bnb.quantize_4bit(weight, quant_type=quant_type, compress_statistics=double_quant)
        calls["bnb.quantize"] = lambda: bnb.quantize_4bit(
            weight, quant_type=quant_type, compress_statistics=double_quant
        )
        calls["bnb.dequantize"] = lambda: bnb.dequantize_4bit(codes, state)
    return calls


def _measure(threads: int, shape: tuple[int, int], rounds: int, bnb: ModuleType | None) -> list[dict]:
    torch.set_num_threads(threads)
    k, n = shape
    records = []
    for dtype in (torch.bfloat16, torch.float32):
        weight = (torch.randn(n, k) * 0.02).to(dtype)
        for quant_type, double_quant in (("nf4", False), ("nf4", True), ("fp4", False), ("int4", False)):
            with harness.Load() as load:
                timings = harness.interleave(contenders(weight, quant_type, double_quant, bnb), rounds)
            # What must be read and written at least: the full-precision tensor and the packed one.
            nbytes = weight.numel() * (weight.element_size() + 0.5 + (1 if double_quant else 4) / 64)
            for name, timing in timings.items():
                peer = timings.get(name.replace("ours", "bnb"))
                records.append(
                    {"name": name, "format": quant_type + ("+dq" if double_quant else ""), "dtype": str(dtype)[6:]}
                    | {"threads": threads, "k": k, "n": n}
                    | timing.as_dict()
                    | {
                        "gb_s": round(nbytes / timing.median / 1e9, 2),
                        "seconds_for_7e9": round(timing.median * PARAMETERS / weight.numel(), 1),
                        "speedup": round(peer.ratio(timing), 2) if peer else None,
                        "other_load_cores": round(load.cores, 2),
                    }
                )
    return records


def measure(args: argparse.Namespace, console: Console) -> dict:
    peers, absent = ready({"bnb": ("bitsandbytes",)}, lambda _: bitsandbytes())
    harness.print_absent(absent, console)
    records = []
    for threads in args.threads:
        part = _measure(threads, args.shape[0], args.rounds, peers.get("bnb"))
        records += part
        lines = []
        for r in part:
            ratio = "" if r["speedup"] is None else f"{r['speedup']:.1f}×"
            cells = (f"{r['us'] / 1e3:.1f}", f"{r['gb_s']:.1f}", f"{r['seconds_for_7e9']:.1f}", ratio)
            lines.append((r["name"], r["format"], r["dtype"], *cells))
        columns = ("what", "format", "dtype", "ms", "GB/s", "s for 7e9", "against bitsandbytes")
        console.print(harness.table(f"{threads} thread(s)", columns, lines))
    return {"records": records, "absent": absent}


def parser() -> argparse.ArgumentParser:
    made = harness.parser(__doc__, "quantize", rounds=5)
    made.add_argument("--threads", type=harness.counts, default="1,2")
    made.add_argument("--shape", type=harness.shapes, default="4096x4096", help="KxN of the weight")
    return made


def main() -> None:
    harness.run(measure, parser().parse_args())


if __name__ == "__main__":
    main()
