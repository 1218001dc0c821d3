"""Greedy decoding of several rows behind one shared prefix, tokens a second: ours beside a prefix in every row's cache.

    python -m bench.prefix_decode --model smollm2 --threads 2
    python -m bench.prefix_decode --model 1.1b --tokens 16

``ours_nf4`` and ``ours_bf16`` are a PeftModel with Prefix Tuning, which holds the prefix once; the others get it as a
cache with a copy for every row, which is what transformers (and peft's prefix tuning) has. All go through
transformers' generate; what is timed are the tokens after the first.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from rich.console import Console
from torch import Tensor, nn

from . import harness, models

PROMPT = 8
Pairs = list[tuple[Tensor, Tensor]]


def _share(model: nn.Module, length: int) -> nn.Module:
    import pyfastpeft as fp

    return fp.get_peft_model(model, fp.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=length))


def _repeat(model: nn.Module, prefix: Pairs, rows: int) -> Callable[[], dict]:
    """The prefix in a cache, for every row."""
    from transformers import DynamicCache

    def cache() -> dict:
        filled = DynamicCache(config=model.config)
        for layer, pair in enumerate(prefix):
            filled.update(*(t.expand(rows, -1, -1, -1) for t in pair), layer)
        return {"past_key_values": filled}

    return cache


# Name to (whether the prefix is shared, the model in a folder).
CONTENDERS: dict[str, tuple[bool, Callable[[str], nn.Module]]] = {
    "ours_nf4": (True, models.load_ours),
    "ours_nf4_repeated": (False, models.load_ours),
    "ours_bf16": (True, models.load_dense),
    "bf16_repeated": (False, models.load_dense),
}


def _prefix_of(model: nn.Module, length: int) -> Pairs:
    """Keys and values [1, heads, length, dim] of some text, layer by layer."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    ids = torch.randint(1, model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        model(input_ids=ids, past_key_values=cache)
    return [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]


def _generate(
    model: nn.Module, more: Callable[[], dict], rows: int, length: int, shared: bool
) -> Callable[[int], float]:
    """Seconds that so many tokens took after the first, and with it the prompt."""
    model.eval()
    model.generation_config.eos_token_id = None
    prompt = torch.arange(1, PROMPT + 1).expand(rows, -1)
    seen = PROMPT if shared else PROMPT + length
    ids = prompt if shared else torch.cat((torch.zeros(rows, length, dtype=torch.long), prompt), 1)
    mask = torch.ones(rows, seen, dtype=torch.long)

    def call(tokens: int) -> float:
        with torch.inference_mode():
            given = more()
            started = _Times()
            out = model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=tokens + 1, min_new_tokens=tokens + 1,
                do_sample=False, pad_token_id=0, stopping_criteria=[started], **given,
            )  # fmt: skip
        assert out.shape[1] == seen + tokens + 1
        return started.times[-1] - started.times[0]

    return call


class _Times:
    """A stopping criterion that never stops and notes when it is asked, which is after every token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: object) -> Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool)


def measure(args: argparse.Namespace, console: Console) -> dict:
    """Tokens a second, all rows together, of every contender."""
    torch.set_num_threads(args.threads)
    calls = {}
    with models.checkpoint(args.model) as folder:
        prefix = _prefix_of(models.load_dense(folder), args.prefix)
        for name in args.only:
            shared, load = CONTENDERS[name]
            model = load(folder)
            more = dict if shared else _repeat(model, prefix, args.rows)
            if shared:
                model = _share(model, args.prefix)
            calls[name] = _generate(model, more, args.rows, args.prefix, shared)
            calls[name](2)
        a_token = {name: lambda call=call: call(args.tokens) / args.tokens for name, call in calls.items()}
        timings, load = harness.in_turn(a_token, args.rounds, harness.SETTLE_S)
    title = f"{args.model}, {args.rows} rows behind {args.prefix} tokens, {args.threads} thread(s)"
    rows = harness.tokens_a_second(title, timings, console, args.rows)
    return {
        "model": args.model, "tokens": args.tokens, "rows": args.rows, "prefix": args.prefix, "threads": args.threads,
        "other_load_cores": round(load.cores, 2), "contenders": rows,
    }  # fmt: skip


def parser() -> argparse.ArgumentParser:
    made = harness.parser(__doc__, "prefix_decode", rounds=5, threads=2)
    made.add_argument("--model", choices=models.NAMES, default="smollm2")
    made.add_argument("--rows", type=harness.count, default=8)
    made.add_argument("--prefix", type=harness.count, default=512, help="tokens in the prefix")
    made.add_argument("--tokens", type=harness.count, default=32)
    made.add_argument("--only", type=harness.among(CONTENDERS), default="*")
    return made


def main() -> None:
    harness.run(measure, parser().parse_args())


if __name__ == "__main__":
    main()
