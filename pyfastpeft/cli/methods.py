"""The methods that ``train`` and ``demo`` know: the one table of what each takes and of its defaults."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from ..nn.bottleneck import ACTIVATIONS

if TYPE_CHECKING:
    from .. import PeftConfig


class Method(NamedTuple):
    """One row of the table.

    Attributes:
        about: what it is, in a few words.
        config: makes the configuration from the values of ``options``.
        learning_rate: the default.
        options: command-line option (without dashes) → its default; any other method's option is refused.
        quantized: whether the base model is brought to 4 bits; None: unless --full-precision is given.
    """

    about: str
    config: Callable[..., PeftConfig]
    learning_rate: float
    options: dict[str, Any]
    quantized: bool | None = None


def _lora(r: int, alpha: float | None, dropout: float, target_modules: list[str] | None) -> PeftConfig:
    from .. import LoraConfig

    targets = "all-linear" if target_modules == ["all-linear"] else target_modules
    return LoraConfig(task_type="CAUSAL_LM", r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets)


def _bottleneck(**options: Any) -> PeftConfig:
    from .. import BottleneckConfig

    return BottleneckConfig(task_type="CAUSAL_LM", **options)


_LORA = {"r": 8, "alpha": None, "dropout": 0.0, "target_modules": None}
METHODS: dict[str, Method] = {
    "qlora": Method("LoRA over a 4-bit base", _lora, 2e-4, _LORA, True),
    "lora": Method("LoRA over full precision", _lora, 2e-4, _LORA, False),
    "bottleneck": Method(
        "adapters after attention and feed-forward",
        _bottleneck,
        1e-3,
        {"placement": "houlsby", "reduction_factor": 16, "activation": "gelu", "target_modules": None},
    ),
}
"""Defaults are what learned the drug facts that come with the package best (see README.md)."""


class _Option(NamedTuple):
    help: str
    keywords: dict[str, Any]


_OPTIONS: dict[str, _Option] = {
    "r": _Option("rank", {"type": int}),
    "alpha": _Option("lora_alpha, 2 r if not given", {"type": float}),
    "dropout": _Option("lora_dropout", {"type": float}),
    "target_modules": _Option(
        "layers to adapt, or all-linear; bottleneck: the projections that end a sublayer",
        {"nargs": "+", "metavar": "NAME"},
    ),
    "placement": _Option(
        "after attention and feed-forward, or feed-forward alone", {"choices": ("houlsby", "pfeiffer")}
    ),
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
    rates = ", ".join(f"{name} {method.learning_rate:g}" for name, method in METHODS.items())
    parser.add_argument("--lr", type=float, help=f"peak learning rate (default: {rates})")
    parser.add_argument("--full-precision", action="store_true", help="do not bring the base model to 4 bits")
    group = parser.add_argument_group("options of the methods")
    for option, (text, keywords) in _OPTIONS.items():
        owners = ", ".join(
            name if (default := method.options[option]) is None else f"{name}: {default}"
            for name, method in METHODS.items()
            if option in method.options
        )
        group.add_argument(flag(option), help=f"{text} ({owners})", **keywords)


def chosen(args: argparse.Namespace) -> tuple[Method, PeftConfig, bool]:
    """The method, its configuration, and whether the base model is in 4 bits.

    Ends the command (``args.error``) where an option does not go with the method.
    """
    method = METHODS[args.method]
    given = {option: value for option in _OPTIONS if (value := getattr(args, option)) is not None}
    for option in given:
        if option not in method.options:
            owners = ", ".join(name for name, other in METHODS.items() if option in other.options)
            args.error(f"{flag(option)} does not go with --method {args.method}; it is an option of {owners}")
    if args.full_precision and method.quantized:
        args.error(f"--full-precision does not go with --method {args.method}, {method.about}")
    quantized = not args.full_precision if method.quantized is None else method.quantized
    return method, method.config(**method.options | given), quantized
