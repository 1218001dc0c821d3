"""The methods that ``train``, ``compare`` and ``demo`` know: the one table of what each takes and of its defaults."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from ..nn.bottleneck import ACTIVATIONS
from ..tuners.bottleneck import PLACEMENTS

if TYPE_CHECKING:
    from .. import PeftConfig


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        about: what it is, in a few words.
        config: makes the configuration, from the tokenizer and the values of ``options``.
        learning_rate: the default.
        options: command-line option (without dashes) → its default; any other method's option is refused.
        quantized: whether the base model is brought to 4 bits; None: unless --full-precision is given.
        slower: (option, value) → the default learning rate with it.
        starts: what --init may be.
    """

    about: str
    config: Callable[..., PeftConfig]
    learning_rate: float
    options: dict[str, Any]
    quantized: bool | None = None
    slower: dict[tuple[str, Any], float] = field(default_factory=dict)
    starts: tuple[str, ...] = ("text", "random", "zero")

    def rate(self, options: dict[str, Any]) -> float:
        """The default learning rate with ``options``."""
        return next((rate for (name, value), rate in self.slower.items() if options[name] == value), self.learning_rate)

    @property
    def rates(self) -> str:
        """The default learning rates, for the help text."""
        slower = (f" ({flag(name)} {value}: {rate:g})" for (name, value), rate in self.slower.items())
        return f"{self.learning_rate:g}" + "".join(slower).replace(" True", "")


def _lora(tokenizer: Any, r: int, alpha: float | None, dropout: float, target_modules: list[str] | None) -> PeftConfig:
    from .. import LoraConfig

    targets = "all-linear" if target_modules == ["all-linear"] else target_modules
    return LoraConfig(task_type="CAUSAL_LM", r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets)


def _prompt(tokenizer: Any, virtual_tokens: int, init: str, init_text: str | None) -> PeftConfig:
    from .. import PromptTuningConfig

    init = {"vocab": "SAMPLE_VOCAB"}.get(init, init.upper())
    start = _start("prompt_tuning_init", init, init_text, tokenizer)
    return PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=virtual_tokens, **start)


def _ptuning(tokenizer: Any, virtual_tokens: int, encoder: str, encoder_hidden_size: int | None) -> PeftConfig:
    from .. import PromptEncoderConfig

    return PromptEncoderConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=virtual_tokens,
        encoder_reparameterization_type=encoder.upper(),
        encoder_hidden_size=encoder_hidden_size,
    )


def _ptuning_v2(tokenizer: Any, virtual_tokens: int, init: str, init_text: str | None) -> PeftConfig:
    from .. import DeepPromptConfig

    start = _start("prefix_init", init, init_text, tokenizer)
    return DeepPromptConfig(task_type="CAUSAL_LM", num_virtual_tokens=virtual_tokens, **start)


def _prefix(
    tokenizer: Any,
    virtual_tokens: int,
    init: str | None,
    init_text: str | None,
    projection: bool,
    encoder_hidden_size: int | None,
) -> PeftConfig:
    from .. import PrefixTuningConfig

    if encoder_hidden_size is not None and not projection:
        raise ValueError("--encoder-hidden-size is given, and there is no encoder; it needs --projection")
    if projection and init == "text":
        raise ValueError("--init is text; with --projection it must be random or zero")
    start = _start("prefix_init", init or ("random" if projection else "text"), init_text, tokenizer)
    return PrefixTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=virtual_tokens,
        prefix_projection=projection,
        encoder_hidden_size=encoder_hidden_size,
        **start,
    )


def _start(field: str, init: str, text: str | None, tokenizer: Any) -> dict[str, Any]:
    """The fields of a configuration that say what a soft prompt starts from."""
    if init.lower() == "text":
        return {field: init, f"{field}_text": _TEXT if text is None else text, "tokenizer_name_or_path": tokenizer}
    if text is not None:
        raise ValueError(f"--init-text is given, and the adapter starts from {init.lower()}; it needs --init text")
    return {field: init}


def _bottleneck(tokenizer: Any, **options: Any) -> PeftConfig:
    from .. import BottleneckConfig

    return BottleneckConfig(task_type="CAUSAL_LM", **options)


_LORA = {"r": 8, "alpha": None, "dropout": 0.0, "target_modules": None}
_TEXT = "Answer the question with the facts that belong to it, exactly and in the form that was learned."
METHODS: dict[str, Method] = {
    "qlora": Method("LoRA over a 4-bit base", _lora, 3e-3, _LORA, True),
    "lora": Method("LoRA over full precision", _lora, 3e-3, _LORA, False),
    "prompt": Method(
        "vectors before the text",
        _prompt,
        1e-1,
        {"virtual_tokens": 100, "init": "text", "init_text": None},
        starts=("text", "random", "vocab"),
    ),
    "ptuning": Method(
        "the same, from an encoder",
        _ptuning,
        1e-2,
        {"virtual_tokens": 20, "encoder": "mlp", "encoder_hidden_size": None},
        slower={("encoder", "lstm"): 1e-3},
    ),
    "ptuning-v2": Method(
        "vectors before every layer",
        _ptuning_v2,
        2e-1,
        {"virtual_tokens": 20, "init": "text", "init_text": None},
    ),
    "prefix": Method(
        "keys and values of every layer",
        _prefix,
        1e-1,
        {"virtual_tokens": 20, "init": None, "init_text": None, "projection": False, "encoder_hidden_size": None},
        slower={("projection", True): 1e-3},
    ),
    "bottleneck": Method(
        "small networks after attention and feed-forward",
        _bottleneck,
        1e-3,
        {"placement": "houlsby", "reduction_factor": 16, "activation": "gelu", "target_modules": None},
    ),
}
"""Defaults are what learned the drug facts that come with the package best (see USE.md)."""


def above_zero(kind: type, or_zero: bool = False) -> Callable[[str], Any]:
    """For argparse: a finite number of that kind, above 0."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not (0 < value < math.inf or (or_zero and value == 0)):
            raise argparse.ArgumentTypeError(f"{text} must be a number above 0{', or 0' * or_zero}")
        return value

    parse.__name__ = kind.__name__  # argparse names it where the text is no number
    return parse


def seed(text: str) -> int:
    """For argparse: what torch's, NumPy's and Python's generators all take."""
    value = int(text)
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"{text} must be from 0 to 2**32 - 1")
    return value


class _Option(NamedTuple):
    help: str
    keywords: dict[str, Any]


_OPTIONS: dict[str, _Option] = {
    "r": _Option("rank", {"type": int}),
    "alpha": _Option("lora_alpha, 2 r if not given", {"type": above_zero(float)}),
    "dropout": _Option("lora_dropout", {"type": float}),
    "target_modules": _Option(
        "layers to adapt, or all-linear; bottleneck: the projections that end a sublayer",
        {"nargs": "+", "metavar": "NAME"},
    ),
    "virtual_tokens": _Option("how many", {"type": int}),
    "init": _Option(
        "what the model makes of a text, random numbers, or zeros (prompt: tokens of the vocabulary instead)",
        {"choices": ("text", "random", "zero", "vocab")},
    ),
    "init_text": _Option("that text", {}),
    "encoder": _Option("kind", {"choices": ("mlp", "lstm")}),
    "encoder_hidden_size": _Option("of the encoder or projection; the model's width if not given", {"type": int}),
    "projection": _Option("let an MLP make keys and values", {"action": "store_const", "const": True}),
    "placement": _Option("after attention and feed-forward, or feed-forward alone", {"choices": tuple(PLACEMENTS)}),
    "reduction_factor": _Option("width over the bottleneck's size", {"type": float}),
    "activation": _Option("in the bottleneck", {"choices": tuple(ACTIVATIONS)}),
}


def flag(option: str) -> str:
    """What an option is on the command line."""
    return "--" + option.replace("_", "-")


def add_method_arguments(parser: argparse.ArgumentParser) -> None:
    """``--method``, ``--lr`` and every option that belongs to some methods only."""
    parser.add_argument(
        "--method",
        choices=tuple(METHODS),
        default="qlora",
        help="; ".join(f"{name}: {method.about}" for name, method in METHODS.items()) + " (default: %(default)s)",
    )
    rates = ", ".join(f"{name} {method.rates}" for name, method in METHODS.items())
    parser.add_argument("--lr", type=above_zero(float), help=f"peak learning rate (default: {rates})")
    parser.add_argument("--full-precision", action="store_true", help="do not bring the base model to 4 bits")
    group = parser.add_argument_group("options of the methods")
    for option, (text, keywords) in _OPTIONS.items():
        owners = ", ".join(
            name if (default := method.options[option]) is None else f"{name}: {default}"
            for name, method in METHODS.items()
            if option in method.options
        )
        group.add_argument(flag(option), help=f"{text} ({owners})", **keywords)


def chosen(args: argparse.Namespace) -> tuple[Method, dict[str, Any], bool]:
    """The method, the values of its options, and whether the base model is in 4 bits.

    Ends the command (``args.error``) where an option does not go with the method.
    """
    method = METHODS[args.method]
    given = {option: value for option in _OPTIONS if (value := getattr(args, option)) is not None}
    for option in given:
        if option not in method.options:
            owners = ", ".join(name for name, other in METHODS.items() if option in other.options)
            args.error(f"{flag(option)} does not go with --method {args.method}; it is an option of {owners}")
    if "init" in given and given["init"] not in method.starts:
        *most, last = method.starts
        must = f"it must be {', '.join(most)} or {last}"
        args.error(f"--init {given['init']} does not go with --method {args.method}; {must}")
    if args.full_precision and method.quantized:
        args.error(f"--full-precision does not go with --method {args.method}, {method.about}")
    quantized = not args.full_precision if method.quantized is None else method.quantized
    return method, method.options | given, quantized
