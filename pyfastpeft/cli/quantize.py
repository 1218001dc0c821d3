"""Quantize a model to 4 bits and save it; after "import pyfastpeft" transformers loads the folder as it is.

A folder's float32 and float16 weights are rounded to bfloat16 before they are quantized; what stays in full precision
is saved in bfloat16.

examples:
  pyfastpeft quantize ./llama ./llama-nf4
  pyfastpeft quantize ./llama ./llama-int4 --quant-type int4 --blocksize 32
  pyfastpeft quantize model-q4_1.gguf ./model-int4      # its Q4_0 and Q4_1 matrices are kept as they are
"""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from safetensors import SafetensorError

from ..nn import Linear4bit
from .memory import peak_bytes
from .models import MODEL_HELP, add_quantization_arguments, load_model, processor_files
from .output import check_place


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``quantize``."""
    parser.add_argument("model", help=MODEL_HELP)
    parser.add_argument("output", help="folder to write; it must not exist yet")
    add_quantization_arguments(parser)


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Load quantized, save aside, rename."""
    output = Path(args.output)
    if os.path.lexists(output):
        raise ValueError(f"output is {args.output!r}, which exists; name a new folder")
    check_place(output)
    with console.status(f"quantizing {escape(args.model)}"):
        model, tokenizer = load_model(args)
        processor = processor_files(args)
        aside = output.with_name(f".{output.name}.partial")
        shutil.rmtree(aside, ignore_errors=True)
        try:
            model.save_pretrained(aside)
            tokenizer.save_pretrained(aside)
            for file in processor:
                shutil.copyfile(file, aside / file.name)
            os.replace(aside, output)
        except (OSError, SafetensorError) as error:
            raise OSError(f"{output} could not be written: {error}") from error
        finally:
            shutil.rmtree(aside, ignore_errors=True)  # what was not renamed
    layers = sum(isinstance(module, Linear4bit) for module in model.modules())
    size = sum(f.stat().st_size for f in output.rglob("*") if f.is_file())
    result = {"output": str(output), "layers_4bit": layers, "bytes": size, "peak_memory_bytes": peak_bytes()}
    console.print(
        f"{escape(str(output))}: {layers} linear layers in 4 bits, {size / 2**20:.0f} MiB, "
        f"peak memory {result['peak_memory_bytes'] / 2**20:.0f} MiB"
    )
    return result
