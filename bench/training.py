"""What the benchmarks of training steps share: a step, and the peak memory of one on its own."""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

from . import harness
from .registry import Unavailable


def tokens_of(batch: int, length: int) -> Tensor:
    return torch.randint(0, 500, (batch, length), generator=torch.Generator().manual_seed(0))


def drug_qa(batch: int, vocab_size: int) -> dict[str, Tensor]:
    """Rows of the demo's data in SmolLM2's chat template, padded, with labels on the completions alone."""
    from pyfastpeft import data
    from pyfastpeft.cli.models import load_smollm2
    from pyfastpeft.conversations import load_dataset
    from pyfastpeft.training import Collator

    rows = load_dataset(data.drug_qa("train_50"), load_smollm2()[1])
    random.Random(0).shuffle(rows)
    padded = Collator(0)([rows[i % len(rows)] for i in range(batch)])
    # In a smaller vocabulary as other tokens, which take as long.
    return {name: t.where(t < 0, t % vocab_size) for name, t in padded.items()}


def stepper(model: nn.Module, rate: float, **inputs: Tensor) -> Callable[[], float]:
    """A function that trains one step on ``inputs`` with AdamW and returns its loss."""
    optimizer = torch.optim.AdamW([p for p in model.train().parameters() if p.requires_grad], lr=rate)

    def step() -> float:
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss)

    return step


def against(
    name: str, peer: str | None, timings: dict[str, harness.Timing], peaks: dict[str, float]
) -> dict[str, float]:
    """Speed and memory of a contender's step against its peer's; nothing where one of them was not measured."""
    if name not in timings or peer not in timings:
        return {}
    return {
        "speedup": round(timings[peer].ratio(timings[name]), 3),
        "memory_ratio": round(peaks[name] / peaks[peer], 3),
    }


def cells(timed: dict, compared: dict) -> tuple[str, str, str, str]:
    """Of a table: time and memory of a step, and its speed and memory against peft's where that was measured."""
    ratios = (f"{compared[key]:.2f} ×" if key in compared else "–" for key in ("speedup", "memory_ratio"))
    return f"{timed['us'] / 1e6:.2f} {harness.spread(timed)}", f"{timed['peak_mb']:.0f}", *ratios


def add_child_arguments(parser: argparse.ArgumentParser, contenders: dict[str, Callable]) -> None:
    """What :func:`peak_mb_of_child` gives to the process that it starts."""
    parser.add_argument("--child", choices=contenders, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)


def peak_mb_of_child(module: str, name: str, folder: str, *options: str) -> float:
    """Peak resident memory of two steps of a contender in a fresh process, which runs ``module``."""
    options += (f"--out={folder}/none.json",)  # which nobody writes: where results go by default may be read-only
    command = [sys.executable, "-m", module, "--child", name, "--folder", folder, *options]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise Unavailable(done.stderr.strip().rpartition("\n")[2] or f"its process ended with {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])["peak_mb"]


def child(step: Callable[[], object]) -> None:
    """What that process does."""
    for _ in range(2):
        step()
    print(json.dumps({"peak_mb": harness.peak_mb()}))
