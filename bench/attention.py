"""Attention alone on the CPU: prefix_attention beside torch's scaled_dot_product_attention, interleaved.

    python -m bench.attention --threads 2
    python -m bench.attention --shapes 4x256 --prefix 0,20 --dtypes bf16

``sdpa`` is what transformers calls: without a prefix ``is_causal`` and ``enable_gqa``; with one the prefix repeated and
concatenated in every row, keys and values repeated for every head, and a boolean mask (made beforehand: a model makes
it once a step). A shape is batch × tokens. Queries, keys and values are [batch, tokens, heads, size] in memory, as
linear layers leave them. The floor is the time that the products of the pairs (query, key) that are seen take at the
rate of dense products by vectors (AMX is faster, and comes below it), and one exponential a pair and direction, of 14
vector instructions at the rate of fp32's.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

import pyfastpeft as fp

from . import harness
from .registry import DTYPES

PASSES = ("forward", "both")
EXP_INSTRUCTIONS = 14


class Problem:
    """Tensors of one shape, and what each contender makes of them."""

    def __init__(self, args: argparse.Namespace, batch: int, tokens: int, prefix: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)

        def made(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(dtype).transpose(1, 2).requires_grad_()

        self.heads, self.size = args.heads, args.head_size
        self.group = args.heads // args.kv_heads
        self.q = made(batch, tokens, args.heads, args.head_size)
        self.k, self.v = (made(batch, tokens, args.kv_heads, args.head_size) for _ in range(2))
        self.into = torch.randn(self.q.shape, generator=generator).to(dtype)
        self.leaves = [self.q, self.k, self.v]
        self.prefix: list[Tensor] = []
        if prefix:
            shape = (args.kv_heads, prefix, args.head_size)
            self.prefix = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for _ in range(2)]
            self.leaves += self.prefix
            seen = torch.ones(tokens, tokens, dtype=torch.bool).tril()
            seen = torch.cat((torch.ones(tokens, prefix, dtype=torch.bool), seen), 1)
            self.mask = seen.expand(batch, 1, tokens, tokens + prefix)
        self.pairs = batch * args.heads * (tokens * (tokens + 1) // 2 + tokens * prefix)

    def ours(self) -> Tensor:
        return fp.ops.prefix_attention(self.q, self.k, self.v, *self.prefix)

    def sdpa(self) -> Tensor:
        if not self.prefix:
            return F.scaled_dot_product_attention(self.q, self.k, self.v, is_causal=True, enable_gqa=True)
        batch = len(self.q)
        k, v = (
            torch.cat((p.expand(batch, -1, -1, -1), t), 2).repeat_interleave(self.group, 1)
            for p, t in zip(self.prefix, (self.k, self.v), strict=True)
        )
        return F.scaled_dot_product_attention(self.q, k, v, attn_mask=self.mask)

    def call(self, attention: Callable[[], Tensor], passes: str) -> Callable[[], object]:
        def forward() -> Tensor:
            with torch.no_grad():
                return attention()

        def both() -> tuple[Tensor, ...]:
            return torch.autograd.grad(attention(), self.leaves, self.into)

        return forward if passes == "forward" else both

    def floor(self, passes: str, limits: dict[str, float | None]) -> float:
        """Seconds."""
        products, exps = (4, 1) if passes == "forward" else (14, 2)
        vector = limits["fp32_gflop_s"] * 1e9
        dense = (limits["bf16_gflop_s"] or limits["fp32_gflop_s"]) * 1e9 if self.q.dtype == torch.bfloat16 else vector
        return self.pairs * (products * self.size / dense + exps * 2 * EXP_INSTRUCTIONS / vector)


def measure(args: argparse.Namespace, console: Console) -> dict:
    torch.set_num_threads(args.threads)
    before = harness.limits(args.threads)
    problems, timings = {}, {}
    with harness.Load() as load:
        for dtype in args.dtypes:
            for batch, tokens in args.shapes:
                for prefix in args.prefix:
                    problem = Problem(args, batch, tokens, prefix, DTYPES[dtype])
                    ours, theirs = problem.ours(), problem.sdpa()
                    error = float((ours - theirs).detach().double().norm() / theirs.detach().double().norm())
                    assert error < 1e-2, f"the contenders differ by {error}"
                    for passes in PASSES:
                        calls = {name: problem.call(getattr(problem, name), passes) for name in ("ours", "sdpa")}
                        key = (dtype, batch, tokens, prefix, passes)
                        timings[key] = harness.interleave(calls, args.rounds, budget_s=args.budget)
                        problems[key] = problem
    limits = harness.best_limits([before, harness.limits(args.threads)])
    rows, lines = [], []
    for key, timed in timings.items():
        dtype, batch, tokens, prefix, passes = key
        ours, theirs = timed["ours"], timed["sdpa"]
        speedup, floor = theirs.ratio(ours), problems[key].floor(passes, limits)
        rows.append(
            {
                "dtype": dtype,
                "batch": batch,
                "tokens": tokens,
                "prefix": prefix,
                "passes": passes,
                "ours": ours.as_dict(),
                "sdpa": theirs.as_dict(),
                "speedup": round(speedup, 2),
                "floor_us": round(floor * 1e6, 1),
                "over_floor": round(ours.median / floor, 2),
            }
        )
        times = (f"{timing.median * 1e6:.0f} µs" for timing in (ours, theirs))
        ratios = (f"{speedup:.2f}", f"{ours.median / floor:.2f}")
        lines.append((dtype, f"{batch} × {tokens}", str(prefix), passes, *times, *ratios))
    title = f"{args.heads} heads over {args.kv_heads} of {args.head_size}, {args.threads} thread(s)"
    columns = ("dtype", "batch × tokens", "prefix", "passes", "ours", "sdpa", "times as fast", "over the floor")
    console.print(harness.table(title, columns, lines))
    return {
        "heads": args.heads, "kv_heads": args.kv_heads, "head_size": args.head_size, "threads": args.threads,
        "limits": limits, "other_load_cores": round(load.cores, 2), "rows": rows,
    }  # fmt: skip


def parser() -> argparse.ArgumentParser:
    made = harness.parser(__doc__, "attention", rounds=9, threads=2)
    made.add_argument("--shapes", type=harness.shapes, default="1x128,8x128,4x256,1x512,8x512,1x2048")
    made.add_argument("--prefix", type=harness.ints, default="0,20", help="lengths; 0 is none")
    made.add_argument("--dtypes", type=harness.among(DTYPES), default="bf16,fp32")
    made.add_argument("--heads", type=harness.count, default=9)
    made.add_argument("--kv-heads", type=harness.count, default=3)
    made.add_argument("--head-size", type=harness.count, default=64)
    made.add_argument("--budget", type=float, default=1.0, help="seconds a line")
    return made


def main() -> None:
    harness.run(measure, parser().parse_args())


if __name__ == "__main__":
    main()
