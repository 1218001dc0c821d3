"""A transformers model from a GGUF file, its 4-bit weights kept as they are."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map
from transformers.pytorch_utils import Conv1D

from ..formats import Packed4bit, quantize_4bit
from ..hub.bitsandbytes import packed_to_state
from ..hub.gguf import GgufFile
from .transformers import FastPeftConfig, left_in_full_precision


def from_gguf(
    path: str | os.PathLike,
    quant_type: str | None = None,
    blocksize: int = 64,
    double_quant: bool = False,
    dtype: torch.dtype = torch.float32,
    **kwargs: Any,
) -> PreTrainedModel:
    """Load a language model from a GGUF file.

    Linear layers stored as Q4_0 or Q4_1 become :class:`Linear4bit` with the very same codes and scales (INT4, blocks
    of 32). Everything else, tied embeddings included, is decoded to ``dtype``. The model saves and reloads like any
    other quantized by this package; its tokenizer is
    ``AutoTokenizer.from_pretrained(folder, gguf_file=name)``.

    Args:
        path: the file.
        quant_type: quantize all linear layers anew to ``"nf4"``, ``"fp4"`` or ``"int4"``, whatever they are stored in.
            Default: keep them as they are.
        blocksize, double_quant: as :class:`FastPeftConfig`; only with ``quant_type``.
        dtype: of what is not in 4 bits.
        kwargs: passed on to the model's ``from_pretrained``, for example ``attn_implementation`` or ``device_map``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, damaged, or of an architecture transformers cannot read from GGUF.
    """
    path = Path(path)
    file = GgufFile(path)
    wanted = None if quant_type is None else FastPeftConfig(quant_type, blocksize, double_quant)
    try:
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        if config.num_hidden_layers > len(file.names):
            layers, tensors = config.num_hidden_layers, len(file.names)
            raise ValueError(f"its metadata says {layers} layers, but it has {tensors} tensors")
        auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        with torch.device("meta"):
            skeleton = auto.from_config(config)
        weights = _Weights(file, skeleton, dtype, wanted)
    except (ValueError, TypeError, ArithmeticError, LookupError, AttributeError, OSError, NotImplementedError) as error:
        # transformers trusts the metadata: a wrong value in it can fail in any of these ways.
        raise ValueError(f"{path} cannot be loaded as a transformers model: {error}") from error
    if weights.converted:
        settings = wanted or FastPeftConfig("int4", 32)
        settings.modules_to_not_convert = weights.left
        config.quantization_config = settings.to_dict()
    return type(skeleton).from_pretrained(None, config=config, state_dict=weights.state, dtype=dtype, **kwargs)


class _Shallow:
    """A model as transformers' name mapping sees it, down to ``depth``: it builds its table anew for every module."""

    def __init__(self, module: nn.Module, depth: int) -> None:
        self.module, self.depth = module, depth
        self.config = getattr(module, "config", None)
        self.state_dict = module.state_dict

    def named_children(self) -> list[tuple[str, _Shallow]]:
        children = self.module.named_children() if self.depth else ()
        return [(name, _Shallow(child, self.depth - 1)) for name, child in children]


class _Weights:
    """The file's weights under transformers' names.

    Attributes:
        state: state dict, 4-bit weights in serialized form.
        converted: whether any layer is in 4 bits.
        left: names of linear layers that are not.
    """

    def __init__(
        self, file: GgufFile, model: PreTrainedModel, dtype: torch.dtype, wanted: FastPeftConfig | None
    ) -> None:
        self.file, self.dtype, self.wanted = file, dtype, wanted
        config = model.config.to_dict()
        self.processor: TensorProcessor = TENSOR_PROCESSORS.get(file.architecture, TensorProcessor)(config=config)
        self.names = get_gguf_hf_weights_map(_Shallow(model, 2), self.processor)
        linear = {name: m for name, m in model.named_modules() if type(m) is nn.Linear or isinstance(m, Conv1D)}
        skip = left_in_full_precision(model, [] if wanted is None else None)
        self.state: dict[str, Tensor] = {}
        # What transformers' processors of mixtures of experts write to.
        self.parsed = {"config": config, "tensors": self.state}
        done = set()
        for name in file.names:
            key = self.names.get(name, "")
            layer = key.removesuffix(".weight")
            if layer in linear and layer not in skip and (packed := self._packed(name, linear[layer])) is not None:
                shape = linear[layer].weight.shape
                _check_shape(key, packed.shape, shape[::-1] if isinstance(linear[layer], Conv1D) else shape)
                self.state |= packed_to_state(packed, key)
                done.add(layer)
            else:
                self._full_precision(name)
        for key, parameter in model.named_parameters():
            if key in self.state and key.removesuffix(".weight") not in done:
                _check_shape(key, self.state[key].shape, parameter.shape)
            elif key not in self.state and key not in model.all_tied_weights_keys:
                raise ValueError(f"it has no tensor for {key}")
        self.converted = bool(done)
        self.left = [name for name in linear if name not in done]

    def _packed(self, name: str, layer: nn.Module) -> Packed4bit | None:
        if self.wanted is not None:
            weight, _ = self._processed(name, self.file.dequantized(name))
            weight = torch.from_numpy(np.ascontiguousarray(weight.T if isinstance(layer, Conv1D) else weight))
            return quantize_4bit(weight, self.wanted.quant_type, self.wanted.blocksize, self.wanted.double_quant)
        if not self.file.is_4bit(name):
            return None
        order = self._row_order(name, isinstance(layer, Conv1D))
        return None if order is None else self.file.packed(name, order)

    def _full_precision(self, name: str) -> None:
        weight, name = self._processed(name, self.file.dequantized(name))
        if name in self.names:
            self.state[self.names[name]] = torch.from_numpy(np.array(weight)).to(self.dtype)

    def _processed(self, name: str, weight: np.ndarray) -> tuple[np.ndarray, str]:
        result = self.processor.process(
            weights=weight, name=name, tensor_key_mapping=self.names, parsed_parameters=self.parsed
        )
        return result.weights, result.name

    def _row_order(self, name: str, transposed: bool) -> np.ndarray | None:
        """The order in which transformers wants the rows, found by sending row and column numbers through its own code.

        None where it changes more than the order of rows.
        """
        rows, columns = self.file.shape(name)
        row = np.broadcast_to(np.arange(rows)[:, None], (rows, columns))
        column = np.broadcast_to(np.arange(columns), (rows, columns))
        (rows_after, name_after), (columns_after, _) = self._processed(name, row), self._processed(name, column)
        if transposed:
            rows_after, columns_after = rows_after.T, columns_after.T
        if name_after != name or rows_after.shape != row.shape:
            return None
        order = rows_after[:, 0]
        same = np.array_equal(rows_after, np.broadcast_to(order[:, None], row.shape))
        return order if same and np.array_equal(columns_after, column) else None


def _check_shape(key: str, found: torch.Size, expected: torch.Size) -> None:
    if found != expected:
        raise ValueError(f"{key} has shape {tuple(found)}; the metadata makes it {tuple(expected)}")
