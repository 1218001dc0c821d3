"""Exchanging adapters on SmolLM2-135M while it serves: set_adapter and hotswap_adapter, ours beside peft.

    python -m bench.hotswap

Two adapters for inference: r = 8 on q and v (the default), and r = 16 on all linear layers. ``set_adapter`` chooses
between two that are loaded; ``hotswap`` replaces the weights of the one in use: from tensors in memory, or from a
folder that the operating system has cached. The model answers one token before each exchange and twice after it: what
the first of these two takes more is what was left to it.
"""

from __future__ import annotations

import argparse
import itertools
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from safetensors.torch import load_file

from . import harness, models
from .registry import ready

LORAS = {"r = 8 on q, v": models.SMALL_LORA, "r = 16 on all": models.LORA}


def _calls(
    model: torch.nn.Module,
    folders: list[str],
    from_folder: Callable[[str], object],
    from_memory: Callable[[dict[str, torch.Tensor]], object],
) -> dict[str, tuple[Callable[[], object], Callable[[], object]]]:
    """What is exchanged → the exchange, and the model's answer."""
    names, paths = itertools.cycle(["a", "b"]), itertools.cycle(folders)
    states = itertools.cycle([load_file(Path(folder) / "adapter_model.safetensors") for folder in folders])
    ids = torch.ones(1, 1, dtype=torch.long)

    def answer() -> None:
        with torch.inference_mode():
            model(input_ids=ids)

    return {
        "set_adapter": (lambda: model.set_adapter(next(names), inference_mode=True), answer),
        "hotswap from memory": (lambda: from_memory(next(states)), answer),
        "hotswap from a folder": (lambda: from_folder(next(paths)), answer),
    }


def ours(checkpoint: str, out: Path, lora: dict) -> dict[str, tuple[Callable, Callable]]:
    import pyfastpeft as fp

    config = fp.LoraConfig(task_type="CAUSAL_LM", inference_mode=True, **lora)
    model = fp.get_peft_model(models.load_ours(checkpoint), config, adapter_name="a")
    model.add_adapter("b", config)
    model.save_pretrained(out)
    folders = [str(out / "a"), str(out / "b")]

    def swap(source: str | dict[str, torch.Tensor]) -> None:
        model.hotswap_adapter(source, adapter_name=model.active_adapter)

    return _calls(model.eval(), folders, swap, swap)


def peft(checkpoint: str, out: Path, lora: dict) -> dict[str, tuple[Callable, Callable]]:
    from peft import LoraConfig, get_peft_model
    from peft.utils.hotswap import hotswap_adapter, hotswap_adapter_from_state_dict

    config = LoraConfig(task_type="CAUSAL_LM", inference_mode=True, **lora)
    model = get_peft_model(models.load_bnb(checkpoint), config, adapter_name="a")
    model.add_adapter("b", config)
    model.save_pretrained(out)
    folders = [str(out / "a"), str(out / "b")]

    def from_folder(path: str) -> None:
        hotswap_adapter(model, path, adapter_name=model.active_adapter)

    def from_memory(state: dict[str, torch.Tensor]) -> None:
        name = model.active_adapter
        named = {key.replace(".weight", f".{name}.weight"): value for key, value in state.items()}
        hotswap_adapter_from_state_dict(model, named, name, config)

    return _calls(model.eval(), folders, from_folder, from_memory)


# Name to (packages it needs, what exchanges adapters, from a checkpoint's folder, one to write to and the options).
CONTENDERS: dict[str, tuple[tuple[str, ...], Callable[[str, Path, dict], dict[str, tuple[Callable, Callable]]]]] = {
    "ours": ((), ours),
    "peft": (("peft", "bitsandbytes"), peft),
}


def measure(args: argparse.Namespace, console: Console) -> dict:
    torch.set_num_threads(args.threads)
    wanted = {(name, size): requires for name, (requires, _) in CONTENDERS.items() for size in LORAS}
    with models.checkpoint(args.model) as checkpoint, tempfile.TemporaryDirectory() as out:

        def make(pair: tuple[str, str]) -> dict[str, tuple[Callable, Callable]]:
            name, size = pair
            return CONTENDERS[name][1](checkpoint, Path(out) / f"{name}-{LORAS[size]['r']}", LORAS[size])

        made, absent = ready(wanted, make)
        calls = {f"{name}: {what}, {size}": call for (name, size), of in made.items() for what, call in of.items()}
        begun, failed = ready(dict.fromkeys(calls, ()), lambda name: _begun(*calls[name]))
        rows = _timed(begun, args.rounds)
    absent = {f"{name} ({size})": reason for (name, size), reason in absent.items()} | failed
    harness.print_absent(absent, console)
    lines = (
        (name, f"{row['us'] / 1e3:.2f} {harness.spread(row)}", f"{row['next_forward_us'] / 1e3:.2f}")
        for name, row in rows.items()
    )
    console.print(harness.table("Exchanging an adapter", ("what", "ms", "more in the next forward, ms"), lines))
    return {"model": args.model, "threads": args.threads, "rows": rows, "absent": absent}


def _begun(swap: Callable, answer: Callable) -> tuple[Callable, Callable]:
    """The same, called once: what is made at the first exchange is not timed."""
    for call in (answer, swap, answer):
        call()
    return swap, answer


def _timed(calls: dict[str, tuple[Callable, Callable]], rounds: int) -> dict[str, dict]:
    swaps, left = ({name: harness.Timing() for name in calls} for _ in range(2))
    order = list(calls)
    for _ in range(rounds):
        random.shuffle(order)
        for name in order:
            swap, answer = calls[name]
            answer()
            times = [time.perf_counter()]
            for call in (swap, answer, answer):
                call()
                times.append(time.perf_counter())
            exchange, first, second = (end - start for start, end in itertools.pairwise(times))
            swaps[name].samples.append(exchange)
            left[name].samples.append(first - second)
    return {name: swaps[name].as_dict() | {"next_forward_us": round(left[name].median * 1e6, 2)} for name in calls}


def parser() -> argparse.ArgumentParser:
    made = harness.parser(__doc__, "hotswap", rounds=15, threads=1)
    made.add_argument("--model", choices=models.SIZES, default="135m")
    return made


def main() -> None:
    harness.run(measure, parser().parse_args())


if __name__ == "__main__":
    main()
