"""A transformers model from a GGUF file, its 4-bit weights kept as they are."""

from __future__ import annotations

import copy
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map
from transformers.pytorch_utils import Conv1D

from ..formats import Packed4bit, quantize_4bit
from ..hub.bitsandbytes import packed_to_state
from ..hub.files import as_path
from ..hub.gguf import GgufFile
from ..ops.checks import floating_dtype
from .gguf_rope import FACTORS, take_over_rope
from .transformers import FastPeftConfig, layers_to_convert, linear_layers, nothing_to_convert

# No model computes with these: transformers makes the one anew, as llama.cpp does, and T5 has no use for the other.
_UNUSED = re.compile(r"blk\.\d+\.attn_rot_embd\.weight|dec\.blk\.\d+\.cross_attn_rel_b\.weight")

_EPSILONS = ("layer_norm_epsilon", "layer_norm_eps", "norm_epsilon", "norm_eps", "rms_norm_eps")
# What transformers' reader leaves out for some architectures, by the key: names of it in configs.
_LEFT_OUT = {
    "attention.layer_norm_epsilon": _EPSILONS,
    "attention.layer_norm_rms_epsilon": _EPSILONS,
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
}
# The layers of the 27B models, whose queries llama.cpp scales by hidden_size / num_attention_heads; no key says it.
_LAYERS_OF_27B = {"gemma2": 46, "gemma3": 62}


def from_gguf(
    path: str | os.PathLike,
    quant_type: str | None = None,
    blocksize: int = 64,
    double_quant: bool = False,
    dtype: torch.dtype | str = torch.float32,
    quantization_config: FastPeftConfig | None = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """Load a language model from a GGUF file.

    Linear layers stored as Q4_0 or Q4_1 become :class:`Linear4bit` with the very same codes and scales (INT4, blocks
    of 32). Everything else, tied embeddings included, is decoded to ``dtype``. The model computes what llama.cpp makes
    of the metadata, the base and the scaling of rotary embeddings (linear, YaRN, Llama 3) included. It saves and
    reloads like any other quantized by this package; its tokenizer is
    ``AutoTokenizer.from_pretrained(folder, gguf_file=name)``.

    Args:
        path: the file.
        quant_type: quantize all linear layers anew to ``"nf4"``, ``"fp4"`` or ``"int4"``, whatever they are stored in.
            Default: keep them as they are.
        blocksize, double_quant: as :class:`FastPeftConfig`; only with ``quant_type``.
        dtype: of what is not in 4 bits: a floating-point dtype or its name. ``torch_dtype`` is taken for it, as
            transformers does.
        quantization_config: quantize the linear layers that are not stored as Q4_0 or Q4_1, as this says; those that
            are stay as they are. Not with ``quant_type``.
        kwargs: passed on to the model's ``from_pretrained``, for example ``attn_implementation`` or ``device_map``.

    Raises:
        FileNotFoundError: there is no such file.
        TypeError: ``path`` is none, or ``quantization_config`` is of another class.
        ValueError: the file is truncated, damaged, or of an architecture transformers cannot read from GGUF; it has a
            tensor, or rotary embeddings, that the model cannot take over; the model has no layer to quantize as asked;
            arguments that do not go together; or ``dtype`` is no such dtype.
    """
    if quantization_config is not None and not isinstance(quantization_config, FastPeftConfig):
        raise TypeError(f"quantization_config is a {type(quantization_config).__name__}; it must be a FastPeftConfig")
    if quant_type is not None and quantization_config is not None:
        raise ValueError(f"quant_type is {quant_type!r} and a quantization_config is given; give one of them")
    for name, value, default in (("blocksize", blocksize, 64), ("double_quant", double_quant, False)):
        if quant_type is None and value != default:
            raise ValueError(f"{name} is {value!r}, and quant_type is None; {name} goes with a quant_type only")
    wanted = quantization_config if quant_type is None else FastPeftConfig(quant_type, blocksize, double_quant)
    dtype = floating_dtype(kwargs.pop("torch_dtype", dtype))
    return load_gguf(as_path("path", path), dtype, quant_type is None, wanted, **kwargs)


def load_gguf(
    path: Path, dtype: torch.dtype, keep: bool, wanted: FastPeftConfig | None = None, **kwargs: Any
) -> PreTrainedModel:
    """:func:`from_gguf`: ``keep`` Q4_0 and Q4_1 as they are, bring what else ``wanted`` says to 4 bits."""
    file = GgufFile(path)
    try:
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        if config.num_hidden_layers > len(file.names):
            layers, tensors = config.num_hidden_layers, len(file.names)
            raise ValueError(f"its metadata says {layers} layers, but it has {tensors} tensors")
        _take_over(file, config)
        take_over_rope(file, config)
        auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        with torch.device("meta"):
            skeleton = auto.from_config(config)
        weights = _Weights(file, skeleton, dtype, keep, wanted)
    except MemoryError:
        raise
    except Exception as error:  # transformers trusts the metadata: a wrong value in it can fail in any way
        raise ValueError(f"{path} cannot be loaded as a transformers model: {error}") from error
    if weights.kept or weights.quantized:
        settings = copy.copy(wanted) if weights.quantized else FastPeftConfig("int4", 32)
        if wanted is not None:
            settings.compute_dtype, settings.compute = wanted.compute_dtype, wanted.compute
        settings.modules_to_not_convert = weights.left
        config.quantization_config = settings.to_dict()
    elif wanted is not None:
        raise nothing_to_convert(skeleton, wanted)
    model = type(skeleton).from_pretrained(None, config=config, state_dict=weights.state, dtype=dtype, **kwargs)
    model.name_or_path = model.config.name_or_path = str(path)  # adapters are saved with it
    return model


def _take_over(file: GgufFile, config: PreTrainedConfig) -> None:
    """Let ``config`` say what llama.cpp computes with and transformers' reader leaves out."""
    for key, names in _LEFT_OUT.items():
        for name in names:
            if key in file.metadata and hasattr(config, name):
                setattr(config, name, file.metadata[key])
    if hasattr(config, "query_pre_attn_scalar"):
        is_27b = config.num_hidden_layers == _LAYERS_OF_27B.get(file.architecture)
        config.query_pre_attn_scalar = config.hidden_size // config.num_attention_heads if is_27b else config.head_dim


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
        kept: names of linear layers that are in the file's 4 bits.
        quantized: names of those brought to 4 bits here.
        left: names of those that are not in 4 bits.
    """

    def __init__(
        self, file: GgufFile, model: PreTrainedModel, dtype: torch.dtype, keep: bool, wanted: FastPeftConfig | None
    ) -> None:
        self.file, self.dtype, self.wanted = file, dtype, wanted
        config = model.config.to_dict()
        self.processor: TensorProcessor = TENSOR_PROCESSORS.get(file.architecture, TensorProcessor)(config=config)
        self.names = get_gguf_hf_weights_map(_Shallow(model, 2), self.processor)
        to_keep = layers_to_convert(model, []) if keep else {}
        to_quantize = {} if wanted is None else layers_to_convert(model, wanted.modules_to_not_convert)
        self.state: dict[str, Tensor] = {}
        # What transformers' processors of mixtures of experts write to.
        self.parsed = {"config": config, "tensors": self.state}
        self.kept: set[str] = set()
        self.quantized: set[str] = set()
        for name in file.names:
            if name == FACTORS or _UNUSED.fullmatch(name):
                continue
            key = self.names.get(name, "")
            layer = key.removesuffix(".weight")
            if layer in to_keep and (packed := self._as_stored(name, to_keep[layer])) is not None:
                self.kept.add(layer)
            elif layer in to_quantize and (packed := self._anew(name, to_quantize[layer])) is not None:
                self.quantized.add(layer)
            else:
                self._full_precision(name, model)
                continue
            module = model.get_submodule(layer)
            shape = module.weight.shape
            _check_shape(key, packed.shape, shape[::-1] if isinstance(module, Conv1D) else shape)
            self.state |= packed_to_state(packed, key)
        done = self.kept | self.quantized
        for key, parameter in model.named_parameters():
            if key in self.state and key.removesuffix(".weight") not in done:
                _check_shape(key, self.state[key].shape, parameter.shape)
            elif key not in self.state and key not in model.all_tied_weights_keys:
                raise ValueError(f"it has no tensor for {key}")
        self.left = [name for name in linear_layers(model) if name not in done]

    def _as_stored(self, name: str, layer: nn.Module) -> Packed4bit | None:
        """The layer's weight in the very codes of the file; None where these cannot be kept."""
        if not self.file.is_4bit(name):
            return None
        order = self._row_order(name, isinstance(layer, Conv1D))
        return None if order is None else self.file.packed(name, order)

    def _anew(self, name: str, layer: nn.Module) -> Packed4bit | None:
        """The layer's weight quantized as wanted; None where transformers makes something else of the tensor."""
        weight, name_after = self._processed(name, self.file.dequantized(name))
        if name_after != name:
            return None
        # F32 is not decoded: it is the mapped file itself, and torch warns of what cannot be written.
        weight = torch.from_numpy(np.require(weight.T if isinstance(layer, Conv1D) else weight, requirements="CW"))
        return quantize_4bit(weight, self.wanted.quant_type, self.wanted.blocksize, self.wanted.double_quant)

    def _full_precision(self, name: str, model: PreTrainedModel) -> None:
        weight, name_after = self._processed(name, self.file.dequantized(name))
        if name_after in self.names:
            # In memory of torch's own: any other is taken for a mapped file's, and copied once more.
            self.state[self.names[name_after]] = torch.tensor(weight, dtype=self.dtype)
        elif name_after is not None:  # else it went to the state already
            raise ValueError(f"its tensor {name} belongs to no parameter of a {type(model).__name__}")

    def _processed(self, name: str, weight: np.ndarray) -> tuple[np.ndarray, str | None]:
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
