"""One QLoRA step of SmolLM2-135M on the CPU (forward, backward, AdamW): ours beside peft over bitsandbytes NF4, and a
step of LoRA over bf16 beside peft's.

    python -m bench.qlora_step --threads 2

Batch 4 × 256, r = 16 on all linear layers, bf16, random weights of the model's size. With ``--chat`` the batch is of
rows of the demo's data: behind SmolLM2's system prompt, padded to the longest, with labels on the completions alone.
Times are medians over steps that alternate in one process; the peak memory of each comes from a process of its own,
loading included.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor

from . import harness, models, training
from .registry import ready

# Name to (packages it needs, the model in a folder).
CONTENDERS: dict[str, tuple[tuple[str, ...], Callable[[str], torch.nn.Module]]] = {
    "ours": ((), models.adapted_ours),
    "peft_bnb_nf4": (("peft", "bitsandbytes"), models.adapted_peft),
    "ours_bf16": ((), lambda folder: models.lora_over(models.load_dense(folder))),
    "peft_bf16": (("peft",), lambda folder: models.peft_over(models.load_dense(folder))),
}
PEERS = {"ours": "peft_bnb_nf4", "ours_bf16": "peft_bf16"}


def stepper(name: str, folder: str) -> Callable[[], float]:
    model = CONTENDERS[name][1](folder)
    model.config.use_cache = False  # as transformers' Trainer has it
    return training.stepper(model, 1e-4, **load_file(f"{folder}/batch.safetensors"))


def _batch(args: argparse.Namespace) -> dict[str, Tensor]:
    if args.chat:
        return training.drug_qa(args.batch, models.SIZES[args.model]["vocab_size"])
    tokens = training.tokens_of(args.batch, args.length)
    return {"input_ids": tokens, "labels": tokens.clone()}


def measure(args: argparse.Namespace, console: Console) -> dict:
    chosen = {name: CONTENDERS[name][0] for name in args.only}
    batch, threads = _batch(args), f"--threads={args.threads}"
    rows, length = batch["input_ids"].shape
    with models.checkpoint(args.model) as folder:
        save_file(batch, f"{folder}/batch.safetensors")

        def begun(name: str) -> tuple[Callable[[], float], list[float]]:
            step = stepper(name, folder)
            return partial(harness.seconds, step), [step(), step()]

        peaks, absent = ready(chosen, lambda name: training.peak_mb_of_child(__spec__.name, name, folder, threads))
        steps, failed = ready(dict.fromkeys(peaks, ()), begun)
        timings, load = harness.in_turn({name: call for name, (call, _) in steps.items()}, args.rounds)
    absent |= failed
    harness.print_absent(absent, console)
    found = {}
    for name, timing in timings.items():
        found[name] = timing.as_dict() | {"peak_mb": peaks[name], "first_losses": steps[name][1]}
        found[name] |= training.against(name, PEERS.get(name), timings, peaks)
    title = f"QLoRA step, {rows} × {length}, {args.threads} threads"
    columns = ("contender", "s a step", "peak MB", "speed against peft", "memory against peft")
    console.print(harness.table(title, columns, ((name, *training.cells(row, row)) for name, row in found.items())))
    return {
        "model": args.model, "batch": rows, "length": length, "chat": args.chat, "rank": models.LORA["r"],
        "threads": args.threads, "other_load_cores": round(load.cores, 2), "contenders": found, "absent": absent,
    }  # fmt: skip


def parser() -> argparse.ArgumentParser:
    made = harness.parser(__doc__, "qlora_step", rounds=7, threads=2)
    made.add_argument("--model", choices=models.SIZES, default="135m")
    made.add_argument("--batch", type=harness.count, default=4)
    made.add_argument("--length", type=harness.count, default=256)
    made.add_argument("--chat", action="store_true", help="rows of the demo's data, instead of --length")
    made.add_argument("--only", type=harness.among(CONTENDERS), default="*")
    training.add_child_arguments(made, CONTENDERS)
    return made


def main() -> None:
    args = parser().parse_args()
    if args.chat and args.out == harness.place("qlora_step"):
        args.out = harness.place("qlora_step_chat")
    torch.set_num_threads(args.threads)
    if args.child:
        training.child(stepper(args.child, args.folder))
        return
    harness.run(measure, args)


if __name__ == "__main__":
    main()
