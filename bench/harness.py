"""What every benchmark shares: interleaved timing, the machine's limits, tables, results on disk."""

from __future__ import annotations

import argparse
import fnmatch
import gc
import importlib.util
import json
import logging
import math
import os
import platform
import random
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from rich.console import Console
from rich.table import Table

# Beside this file in a source tree; where the package is installed, the working directory.
RESULTS = Path(__file__).parent / "results" if Path(__file__).parents[1].joinpath("setup.py").exists() else Path()
PEERS = ("peft", "bitsandbytes", "torchao", "onnxruntime", "onnx", "openvino", "llama-cpp-python")
Name = TypeVar("Name")


@contextmanager
def undisturbed() -> Iterator[None]:
    """What is measured says nothing of its own, and asks no hub. Not at import, which is every command's."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when the hub clients start, which no module here imports
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@dataclass
class Timing:
    """Seconds a call, one sample a round."""

    samples: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def best(self) -> float:
        return min(self.samples)

    @property
    def spread(self) -> float:
        """Interquartile range over the median."""
        if len(self.samples) < 4:
            return (max(self.samples) - min(self.samples)) / self.median
        low, _, high = statistics.quantiles(self.samples, n=4)
        return (high - low) / self.median

    def ratio(self, other: Timing) -> float:
        """Median over rounds of this time over ``other``'s in the same round, so that a slow moment hits both."""
        return paired_ratio(self.samples, other.samples)

    def as_dict(self) -> dict[str, float | int]:
        return {
            "us": round(self.median * 1e6, 2),
            "us_best": round(self.best * 1e6, 2),
            "spread": round(self.spread, 3),
            "rounds": len(self.samples),
        }


def paired_ratio(a: list[float], b: list[float]) -> float:
    """Median of a / b over the rounds that both were timed in."""
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


SETTLE_S = 0.01  # after which the idle threads of the pool before have stopped spinning


def interleave(
    calls: dict[Name, Callable[[], object]], rounds: int, sample_s: float = 0.008, budget_s: float = math.inf
) -> dict[Name, Timing]:
    """Time every call once a round, in random order; a sample repeats its call for at least ``sample_s`` seconds.

    After three rounds no new one begins once ``budget_s`` seconds have passed.
    """
    repeats: dict[Name, int] = {}
    for name, call in calls.items():
        call()
        start = time.perf_counter()
        call()
        repeats[name] = max(1, math.ceil(sample_s / (time.perf_counter() - start)))
    timings = {name: Timing() for name in calls}
    order = list(calls)
    gc.collect()
    gc.disable()
    try:
        begin = time.perf_counter()
        for done in range(rounds):
            if done >= 3 and time.perf_counter() - begin > budget_s:
                break
            random.shuffle(order)
            for name in order:
                call, n = calls[name], repeats[name]
                if torch.get_num_threads() > 1 and len(calls) > 1:
                    time.sleep(SETTLE_S)
                if n > 1:
                    call()
                start = time.perf_counter()
                for _ in range(n):
                    call()
                timings[name].samples.append((time.perf_counter() - start) / n)
    finally:
        gc.enable()
    return timings


def busy_elsewhere() -> float:
    """CPU seconds spent so far by everything but this process and its children that ended, stolen time included (0
    where /proc is absent)."""
    try:
        user, nice, system, idle, iowait, *rest = map(int, Path("/proc/stat").read_text().split()[1:9])
    except OSError:
        return 0.0
    del idle, iowait
    return (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK") - sum(os.times()[:4])


class Load:
    """Context manager; ``.cores`` afterwards is the mean number of cores that others kept busy meanwhile."""

    def __enter__(self) -> Load:
        self._busy, self._start = busy_elsewhere(), time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.cores = max(0.0, busy_elsewhere() - self._busy) / (time.perf_counter() - self._start)


def seconds(call: Callable[..., object], *args: object) -> float:
    """How long ``call(*args)`` takes."""
    start = time.perf_counter()
    call(*args)
    return time.perf_counter() - start


def in_turn(
    calls: dict[str, Callable[[], float]], rounds: int, settle_s: float = 0.0
) -> tuple[dict[str, Timing], Load]:
    """Every call once a round, which returns the seconds to be noted; and what else kept the cores busy meanwhile."""
    timings = {name: Timing() for name in calls}
    with Load() as load:
        for _ in range(rounds):
            for name, call in calls.items():
                time.sleep(settle_s)
                timings[name].samples.append(call())
    return timings, load


def limits(threads: int) -> dict[str, float | None]:
    """What this machine reaches now: reading memory, and in each arithmetic; None where it lacks the instruction."""
    from pyfastpeft import _native

    return {name: None if rate is None else round(rate, 1) for name, rate in _native.limits(threads).items()}


def best_limits(samples: Iterable[dict[str, float | None]]) -> dict[str, float | None]:
    """The best of several readings, limit by limit."""
    first, *others = samples
    return {name: max([rate, *(s[name] for s in others)]) if rate else None for name, rate in first.items()}


def last_level_cache() -> int:
    """Bytes of the largest cache; 32 MiB where the system does not say."""
    sizes = [32 << 20]
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        sizes.append(int(text[:-1]) << {"K": 10, "M": 20, "G": 30}[text[-1]])
    return max(sizes)


def free_memory() -> int:
    """Bytes that processes can take here; what the machine or the container has where the system does not say."""
    sizes = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    meminfo, container = Path("/proc/meminfo"), Path("/sys/fs/cgroup/memory.max")
    if meminfo.exists():
        sizes.append(int(meminfo.read_text().partition("MemAvailable:")[2].split()[0]) << 10)
    if container.exists() and (limit := container.read_text().strip()) != "max":
        sizes.append(int(limit))
    return min(sizes)


def peak_mb() -> float:
    """Peak resident memory of this process."""
    from pyfastpeft.cli.memory import peak_resident

    return round(peak_resident() / 2**20, 1)


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def missing(*packages: str) -> str:
    """Which of them are absent here, as a reason; empty where all are installed."""
    absent = [package for package in packages if not installed(package)]
    return f"{', '.join(absent)} absent" if absent else ""


def machine() -> dict[str, object]:
    """Processor, instruction sets and versions, for the head of a results file."""
    cpuinfo = Path("/proc/cpuinfo")
    model = platform.processor()
    if cpuinfo.exists():
        model = next((s.split(":")[1].strip() for s in cpuinfo.read_text().splitlines() if "model name" in s), model)
    from pyfastpeft.cli.info import version_of

    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
        "last_level_cache": last_level_cache(),
        "isa": list(torch.ops.pyfastpeft.available_isas()),
        "isa_used": torch.ops.pyfastpeft.isa(),
        "python": platform.python_version(),
        "versions": {p: version_of(p) or "absent" for p in ("torch", "transformers", "numpy", *PEERS)},
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def place(name: str) -> Path:
    """The file that a name or a path means, for argparse, which refuses what cannot be written before all the work."""
    from pyfastpeft.cli.output import check_place

    path = Path(name)
    if path.suffix != ".json":
        if path.name != name:
            raise argparse.ArgumentTypeError(f"{name} must be a name, or a path ending in .json")
        path = RESULTS / f"{name}.json"
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is a folder; it must be a file, or not exist yet")
    try:
        check_place(path.parent)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{path} cannot be written: {error}") from None
    return path


def write(path: str | Path, payload: dict) -> Path:
    """Write ``payload`` as JSON."""
    from pyfastpeft.hub.files import write_text

    write_text(json.dumps(payload, indent=1) + "\n", path)
    return Path(path)


def table(title: str, columns: Iterable[str], rows: Iterable[Iterable[str]]) -> Table:
    out = Table(title=title)
    for column in columns:
        out.add_column(column)
    for row in rows:
        out.add_row(*row)
    return out


def print_absent(absent: dict[str, str], console: Console) -> None:
    """Name what is not measured, with the reason of each."""
    for name, reason in absent.items():
        console.print(f"{name}: not measured ({reason})", style="yellow", markup=False)


def spread(row: dict) -> str:
    """Of a row that holds ``Timing.as_dict()``, for a table."""
    return f"±{100 * row['spread']:.0f}%"


def tokens_a_second(title: str, a_token: dict[str, Timing], console: Console, rows: int = 1) -> dict[str, dict]:
    """The records of who decodes, from the time that one token for each of ``rows`` takes; printed as a table, too."""
    records = {
        name: timing.as_dict()
        | {"tokens_per_s": round(rows / timing.median, 2), "samples_us": [round(s * 1e6) for s in timing.samples]}
        for name, timing in a_token.items()
    }
    lines = ((name, f"{record['tokens_per_s']:.1f}", spread(record)) for name, record in records.items())
    console.print(table(title, ("contender", "tokens a second", "spread"), lines))
    return records


@undisturbed()
def run(measure: Callable[[argparse.Namespace, Console], dict], args: argparse.Namespace) -> None:
    """Measure, and write what was found to ``args.out``."""
    console = Console()
    path = write(args.out, {"machine": machine(), "result": measure(args, console)})
    console.print(f"written: {path}")


def parser(doc: str, out: str, rounds: int, threads: int | None = None) -> argparse.ArgumentParser:
    """For a module of this package, with the options that all have; ``--threads`` where it takes one number of them."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if threads is not None:
        made.add_argument("--threads", type=count, default=threads)
    made.add_argument("--rounds", type=count, default=rounds)
    where = "name in bench/results (installed: in the working directory), or a path ending in .json"
    made.add_argument("--out", type=place, default=out, help=where)
    return made


def _numbers(parts: list[str], least: int, problem: str) -> list[int]:
    try:
        numbers = [int(part) for part in parts]
    except ValueError:
        numbers = [least - 1]
    if min(numbers) < least:
        raise argparse.ArgumentTypeError(problem)
    return numbers


def ints(text: str) -> list[int]:
    """``"0,4,16"`` to a list, for argparse."""
    return _numbers(text.split(","), 0, f"{text} must be whole numbers of at least 0, comma-separated")


def count(text: str) -> int:
    """A number above 0."""
    (number,) = _numbers([text], 1, f"{text} must be a whole number above 0")
    return number


def counts(text: str) -> list[int]:
    """The same of numbers above 0."""
    return _numbers(text.split(","), 1, f"{text} must be whole numbers above 0, comma-separated")


def shapes(text: str) -> list[tuple[int, int]]:
    """``"4096x4096,576x1536"`` to (K, N) pairs, for argparse."""
    problem = f"{text} must be pairs of numbers above 0, such as 4096x4096,576x1536"
    pairs = [tuple(_numbers(part.split("x"), 1, problem)) for part in text.split(",")]
    if any(len(pair) != 2 for pair in pairs):
        raise argparse.ArgumentTypeError(problem)
    return pairs


def among(known: Iterable[str]) -> Callable[[str], list[str]]:
    """For argparse: those of ``known`` that are named, comma-separated, by themselves or by patterns with ``*``."""

    def parse(text: str) -> list[str]:
        meant = {pattern: fnmatch.filter(known, pattern) for pattern in text.split(",") if pattern}
        unknown = [pattern for pattern, names in meant.items() if not names]
        if unknown or not meant:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown) or 'nothing'} must be among {', '.join(known)}")
        return [name for name in known if any(name in names for names in meant.values())]

    return parse
