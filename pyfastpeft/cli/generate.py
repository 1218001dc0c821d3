"""Ask a model, with any number of adapters loaded at once.

With --prompt every adapter answers it, all in one batch. Without, an interactive prompt: "/adapter name" switches to an
adapter ("/adapter base" to none), "/adapter" lists them, "/quit" ends.

examples:
  pyfastpeft generate --model smollm2 --prompt "What is the capital of Japan?"
  pyfastpeft generate --model smollm2 --adapter drugs=pyfastpeft-demo/drug_qa
  pyfastpeft generate --model ./llama --adapter a=./a --adapter b=./b --prompt "Hello" --json
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.markup import escape

from ..adapters import BASE
from .methods import above_zero
from .models import MODEL_HELP, add_quantization_arguments, load_model, on_gpu, refuse_format
from .output import print_answer

_BASE = "base"


def _adapter(text: str) -> tuple[str, str]:
    name, separator, path = text.partition("=")
    if not (name and separator and path) or name == _BASE:
        raise argparse.ArgumentTypeError(f"{text!r} must be name=path, with a name other than {_BASE!r}")
    return name, path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``generate``."""
    parser.add_argument("--model", required=True, help=MODEL_HELP)
    parser.add_argument(
        "--adapter", action="append", type=_adapter, default=[], metavar="NAME=PATH", help="a PEFT folder; repeatable"
    )
    parser.add_argument("--prompt", help="answer this and end (default: ask at an interactive prompt)")
    parser.add_argument(
        "--max-new-tokens", type=above_zero(int), default=128, help="longest answer (default: %(default)s)"
    )
    parser.add_argument("--full-precision", action="store_true", help="do not quantize the model to 4 bits")
    add_quantization_arguments(parser)


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Answer the prompt, or hold a conversation."""
    from .. import PeftConfig, PeftModel
    from ..generation import answer
    from ..integrations.accelerate import fuse
    from ..tuners.adapted import check_name

    if args.json and args.prompt is None:
        args.error("--json needs --prompt")
    if args.full_precision:
        refuse_format(args, "--full-precision")
    names = [name for name, _ in args.adapter]
    if len(set(names)) != len(names):
        args.error(f"--adapter names must differ, got {' '.join(names)}")
    # What is wrong with these shows before the model is loaded.
    for name in names:
        check_name(name)
    configs = [PeftConfig.from_pretrained(path) for _, path in args.adapter]
    with console.status(f"loading {escape(args.model)}"):
        model, tokenizer = load_model(args, quantized=not args.full_precision)
        fuse(model)
        model = on_gpu(model)
        for i, ((name, path), config) in enumerate(zip(args.adapter, configs, strict=True)):
            if i == 0:
                model = PeftModel.from_pretrained(model, path, adapter_name=name, config=config)
            else:
                model.load_adapter(path, adapter_name=name, config=config)

    def ask(prompt: str, adapters: list[str]) -> list[str]:
        rows = None
        if len(adapters) == 1 and adapters[0] in names:
            model.set_adapter(adapters[0])
        elif names:
            rows = [BASE if name == _BASE else name for name in adapters]
        conversations = [[{"role": "user", "content": prompt}]] * len(adapters)
        return answer(model, tokenizer, conversations, args.max_new_tokens, adapter_names=rows)

    if args.prompt is not None:
        adapters = names or [_BASE]
        answers = [{"adapter": n, "answer": a} for n, a in zip(adapters, ask(args.prompt, adapters), strict=True)]
        for entry in answers:
            console.print(f"[bold]{escape(entry['adapter'])}[/bold]", end=" ")
            print_answer(console, entry["answer"])
        return {"prompt": args.prompt, "answers": answers}
    _converse(console, [_BASE, *names], (names or [_BASE])[0], ask)
    return {}


def _converse(console: Console, known: list[str], active: str, ask: Callable[[str, list[str]], list[str]]) -> None:
    adapters = f"adapters: {escape(' '.join(known))}"
    console.print(f"{adapters}. /adapter NAME switches, /quit ends.")
    while True:
        try:
            line = console.input(f"[bold]{escape(active)}>[/bold] ", emoji=False).strip()
        except EOFError:
            return
        command, _, name = line.partition(" ")
        if command == "/quit":
            return
        if command == "/adapter":
            if (name := name.strip()) in known:
                active = name
            else:
                console.print(adapters)
        elif line:
            try:
                print_answer(console, ask(line, [active])[0])
            except ValueError as error:  # it cannot be asked; the next one can
                console.print(f"error: {error}", markup=False)
