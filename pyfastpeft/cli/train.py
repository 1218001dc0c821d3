"""Train an adapter on a JSONL file, by any method; the base model is kept in 4 bits or in full precision.

A line of the file is an object with "messages" (which ends with the assistant), or with "prompt" and "completion".
The loss is taken on the assistant's words only. The output is a PEFT folder.

examples:
  pyfastpeft train --model smollm2 --data train.jsonl --output adapter
  pyfastpeft train --model ./llama --data train.jsonl --output adapter --method lora --r 16 --target-modules all-linear
  pyfastpeft train --model ./llama --data train.jsonl --output adapter --method bottleneck --test test.jsonl
  pyfastpeft train --model ./llama --data train.jsonl --output adapter --save-steps 100
  pyfastpeft train --model ./llama --data train.jsonl --output adapter --save-steps 100 --resume
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

from .memory import peak_bytes
from .methods import Method, above_zero, add_method_arguments, chosen, seed
from .models import MODEL_HELP, add_quantization_arguments, in_4_bits, load_model, refuse_format
from .output import check_place

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .. import PeftModel
    from ..conversations import Messages, Rows

SCHEDULES = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
)
"""transformers' lr_scheduler_type, as far as it asks for neither arguments of its own nor an evaluation."""
MEASURES = (
    "an answer is exact if all of it is the row's, and in form (JSON: format_validity) if it has as many lines, each "
    "with the row's 'key: ' where there is one; JSON's accuracy counts those whose first line is the row's"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``train``."""
    add_run_arguments(parser)
    parser.add_argument("--output", required=True, help="folder for the adapter and its checkpoints")
    parser.add_argument("--test", help=f"JSONL file with rows to answer afterwards; {MEASURES}")
    add_method_arguments(parser)
    parser.add_argument(
        "--save-steps",
        type=above_zero(int, or_zero=True),
        default=0,
        help="write a checkpoint every so many steps, of which the last two stay (0: none)",
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on from the newest checkpoint in --output, at its learning rate"
    )


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Those that go with any method: the model, the data, how long it trains and by what steps."""
    parser.add_argument("--model", required=True, help=MODEL_HELP)
    parser.add_argument("--data", required=True, help="JSONL file with the rows to learn")
    parser.add_argument(
        "--epochs", type=above_zero(float), default=3.0, help="passes over the data (default: %(default)s)"
    )
    parser.add_argument("--max-steps", type=above_zero(int), default=-1, help="stop after this many steps instead")
    parser.add_argument("--schedule", choices=SCHEDULES, default="linear", help="default: %(default)s")
    parser.add_argument(
        "--warmup",
        type=above_zero(float, or_zero=True),
        default=0.05,
        help="steps, or a share below 1 (default: %(default)s)",
    )
    parser.add_argument("--batch-size", type=above_zero(int), default=8, help="rows a step (default: %(default)s)")
    parser.add_argument("--accumulate", type=above_zero(int), default=1, help="batches a step (default: %(default)s)")
    parser.add_argument(
        "--max-length", type=above_zero(int), default=1024, help="tokens of a row (default: %(default)s)"
    )
    parser.add_argument("--seed", type=seed, default=0, help="random seed (default: %(default)s)")
    add_quantization_arguments(parser)


def rows_of(args: argparse.Namespace) -> tuple[Rows, Rows]:
    """The rows of ``--data`` and of ``--test``. Either may be a pipe, which can be read once."""
    from ..conversations import numbered_rows

    return numbered_rows(args.data), numbered_rows(args.test) if args.test else {}


def run(args: argparse.Namespace, console: Console, read: tuple[Rows, Rows] | None = None) -> dict[str, Any]:
    """Train, save, report; ``read`` is what :func:`rows_of` gave, where that was asked before."""
    from transformers import set_seed

    from .. import get_peft_model
    from ..conversations import encode_rows
    from ..generation import prompts_of
    from ..training import last_checkpoint

    method, options, quantized = chosen(args)
    if not quantized:
        refuse_format(args, "--full-precision" if args.full_precision else f"--method {args.method}")
    # What is wrong with these shows before the model is loaded.
    _check_output(args.output)
    last_checkpoint(args.output, args.resume)
    rows, tests = read or rows_of(args)
    questions, lines = list(tests.values()), [f"{args.test}, line {number}" for number in tests]
    base, tokenizer = _load(args, method, quantized)
    dataset = encode_rows(args.data, rows, tokenizer, args.max_length)
    set_seed(args.seed)  # the adapter's initial values are part of the run
    model = get_peft_model(base, method.config(tokenizer, **options))
    # As a fault in the data, before training.
    prompts_of(model, tokenizer, [messages[:-1] for messages in questions], called=lines)
    result = _train(args, console, model, tokenizer, dataset, method.rate(options) if args.lr is None else args.lr)
    if questions:
        result |= _test(args, console, model, tokenizer, questions)
    console.print(f"adapter saved in {escape(args.output)}")
    return result


def _check_output(output: str) -> None:
    check_place(Path(output))
    if (Path(output) / "config.json").is_file():  # with that model transformers would load the adapter
        raise ValueError(f"output is {output!r}, which holds a model; name another folder for the adapter")


def _load(args: argparse.Namespace, method: Method, quantized: bool) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    base, tokenizer = load_model(args, quantized)
    if not quantized and in_4_bits(base):
        asked, instead = "--full-precision is given", "leave it out"
        if method.quantized is False:
            asked, instead = f"--method {args.method} is {method.about}", "use --method qlora"
        raise ValueError(
            f"{asked}, but model {args.model!r} is in 4 bits already; {instead}, or name the one in full precision"
        )
    return base, tokenizer


def _train(
    args: argparse.Namespace,
    console: Console,
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Sequence[Mapping[str, list[int]]],
    rate: float,
) -> dict[str, Any]:
    from ..conversations import pad_id
    from ..training import train_adapter
    from .progress import TrainingProgress

    trainable, total = model.get_nb_trainable_parameters()
    with TrainingProgress(console, "training", args.lr) as progress:
        output = train_adapter(
            model,
            dataset,
            pad_token_id=pad_id(tokenizer, model),
            output_dir=args.output,
            epochs=args.epochs,
            max_steps=args.max_steps,
            learning_rate=rate,
            lr_scheduler_type=args.schedule,
            warmup_steps=args.warmup,
            batch_size=args.batch_size,
            gradient_accumulation_steps=args.accumulate,
            save_steps=args.save_steps,
            seed=args.seed,
            resume=args.resume,
            callbacks=[progress],
        )
    result = {
        "output": args.output,
        "rows": len(dataset),
        "learning_rate": progress.learning_rate,
        "steps": output.global_step,
        "loss": next(filter(math.isfinite, progress.losses[-1:]), None),  # JSON has no NaN
        "trainable_parameters": trainable,
        "parameters": total,
        "seconds": round(progress.seconds, 3),
        "seconds_per_step": round(progress.seconds_per_step, 4),
        "peak_memory_bytes": peak_bytes(),
    }
    console.print(
        f"{result['steps']} steps, {result['seconds_per_step']:.2f} s/step, trainable parameters {trainable:,} of "
        f"{total:,}, peak memory {result['peak_memory_bytes'] / 2**20:.0f} MiB"
    )
    return result


def _test(
    args: argparse.Namespace,
    console: Console,
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: list[Messages],
) -> dict[str, Any]:
    from ..training import held_out_loss
    from .examine import examine

    score = examine(console, "questions", model, tokenizer, questions)
    loss = held_out_loss(model, tokenizer, questions, args.max_length, args.batch_size)
    console.print(
        f"of {len(questions)} answers {score.exact:.0%} exact, {score.accuracy:.0%} with the right first line, "
        f"{score.format_validity:.0%} in form; mean loss on what they should be {loss:.3f}"
    )
    return {**score._asdict(), "test_loss": loss if math.isfinite(loss) else None}
