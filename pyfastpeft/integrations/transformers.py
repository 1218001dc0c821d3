"""transformers: 4-bit loading through ``from_pretrained(quantization_config=FastPeftConfig(...))``.

Importing this module registers the method ``"pyfastpeft"``, so a saved model reloads with nothing but
``import pyfastpeft``. Each weight is quantized as it comes off the disk: the peak is the 4-bit model plus one layer.
"""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Collection
from typing import Any

import torch
import transformers.modeling_utils
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightTransform
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..adapters import CARRIED
from ..formats import Packed4bit, quantize_4bit
from ..formats.codes import check_settings, get_format
from ..hub.bitsandbytes import STATE_SUFFIXES, packed_from_state
from ..nn import Linear4bit
from ..nn.ends import HEADS, output_head
from ..nn.weight_reads import needs_full_precision
from ..ops.checks import floating_dtype
from ..ops.linear_4bit import check_compute, check_compute_dtype

METHOD = "pyfastpeft"


@register_quantization_config(METHOD)
class FastPeftConfig(QuantizationConfigMixin):
    """How ``from_pretrained`` quantizes a model to 4 bits.

    Given with a checkpoint that is quantized already — by this package, or by bitsandbytes in 4 bits — the checkpoint's
    own settings hold, its weights are read as they are, and only ``compute_dtype`` and ``compute`` count. bitsandbytes
    itself is not needed for that.

    Args:
        quant_type: ``"nf4"``, ``"fp4"`` or ``"int4"``.
        blocksize: elements a scale.
        double_quant: keep the scales themselves in 8 bits (NF4 and FP4).
        compute_dtype: dtype the products run in, default the input's.
        modules_to_not_convert: names (or patterns) of linear layers to leave in full precision. Default: the output
            embedding, the heads of classes and answers (``classifier``, ``score``, ``qa_outputs``) and the last layer.
            Layers whose weight is tied to another, or read by the module around them, are always left, and so are those
            that it calls from a list of its own.
        compute: ``"int8"`` for faster inference on CPUs with activations rounded to 8 bits (relative error of a layer
            about 7e-3, of a single row of a small K up to 1.5e-2); training is exact all the same.

    Raises:
        ValueError: a ``quant_type``, ``blocksize``, ``double_quant``, ``compute_dtype`` or ``compute`` that does not
            exist.
        TypeError: ``modules_to_not_convert`` is no list, tuple or set of names.
    """

    def __init__(
        self,
        quant_type: str = "nf4",
        blocksize: int = 64,
        double_quant: bool = False,
        compute_dtype: torch.dtype | str | None = None,
        modules_to_not_convert: Collection[str] | None = None,
        compute: str | None = None,
    ) -> None:
        _, blocksize = check_settings(quant_type, blocksize, double_quant)
        if isinstance(compute_dtype, str):
            compute_dtype = getattr(torch, compute_dtype, compute_dtype)
        self.quant_method = METHOD
        self.quant_type = quant_type
        self.blocksize = blocksize
        self.double_quant = double_quant
        self.compute_dtype = check_compute_dtype(compute_dtype)
        self.modules_to_not_convert = _names(modules_to_not_convert)
        self.compute = check_compute(compute)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """The configuration that a checkpoint's ``quantization_config`` holds; arguments as transformers has them.

        Raises:
            ValueError: a key that is unknown, or a value that is not taken.
        """
        fields = {name: value for name, value in config_dict.items() if name != "quant_method"}
        try:
            return super().from_dict(fields, return_unused_kwargs, **kwargs)
        except TypeError as error:
            raise ValueError(f"quantization_config of method {METHOD!r}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        dtype = self.compute_dtype
        return super().to_dict() | {"compute_dtype": None if dtype is None else str(dtype).removeprefix("torch.")}

    def for_checkpoint(self, stored: Any) -> FastPeftConfig | None:
        """The config to read a checkpoint by, given its own ``quantization_config``; None where it is not ours to read.

        Raises:
            ValueError: a bitsandbytes checkpoint that is not in 4 bits.
        """
        stored = stored if isinstance(stored, dict) else stored.to_dict()
        if stored.get("quant_method") == METHOD:
            config = FastPeftConfig.from_dict(stored)
        elif stored.get("load_in_4bit"):
            config = FastPeftConfig(
                stored.get("bnb_4bit_quant_type", "fp4"),
                double_quant=bool(stored.get("bnb_4bit_use_double_quant")),
                compute_dtype=stored.get("bnb_4bit_compute_dtype"),
                modules_to_not_convert=stored.get("llm_int8_skip_modules"),
            )
        elif stored.get("load_in_8bit"):
            raise ValueError("the checkpoint was quantized by bitsandbytes to 8 bits; FastPeftConfig reads 4 bits only")
        else:
            return None
        config.compute_dtype = self.compute_dtype or config.compute_dtype
        config.compute = self.compute or config.compute
        return config


def _names(value: Any) -> list[str] | None:
    """``modules_to_not_convert`` as a list; of a str every letter would be a pattern."""
    if value is None:
        return None
    if not isinstance(value, (list, tuple, set, frozenset)) or not all(isinstance(name, str) for name in value):
        raise TypeError(f"modules_to_not_convert is {value!r}; it must be a list, tuple or set of names")
    return sorted(value) if isinstance(value, (set, frozenset)) else list(value)


@register_quantizer(METHOD)
class FastPeftQuantizer(HfQuantizer):
    """Puts :class:`Linear4bit` in place of linear layers (``nn.Linear`` and GPT-2's ``Conv1D``) and fills them.

    Attributes:
        originals: name → the full-precision layer, without weights, that stood there.
        read: those of them that must be in full precision, though the checkpoint has them in 4 bits.
        found: those of them that a checkpoint in 4 bits has, in whatever precision.
    """

    quantization_config: FastPeftConfig
    requires_calibration = False

    def __init__(self, quantization_config: FastPeftConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.originals: dict[str, nn.Module] = {}
        self.read: set[str] = set()
        self.found: set[str] = set()

    @property
    def quantized_element_size(self) -> float:
        config = self.quantization_config
        scales = 1 if config.double_quant else 8 if get_format(config.quant_type).has_zero else 4
        return 0.5 + scales / config.blocksize

    @property
    def is_trainable(self) -> bool:
        return True

    def is_serializable(self) -> bool:
        return True

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        device_map = device_map if isinstance(device_map, dict) else {"": device_map}
        places = {name: str(device) for name, device in device_map.items()}
        # Beside GPUs accelerate only keeps modules on a CPU, and brings their parameters to a GPU one by one.
        offloaded = {"disk"} if {"cpu", "disk"}.issuperset(places.values()) else {"cpu", "disk"}
        found = [f"{name!r} to {place!r}" for name, place in places.items() if place in offloaded]
        if found:
            raise ValueError(
                f"device_map sends {', '.join(found)}; a 4-bit model must lie entirely on GPUs or entirely on the CPU: "
                "raise max_memory until it fits on the GPUs, or pass device_map='cpu'"
            )

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        module, name = get_module_from_name(model, param_name)
        return isinstance(module, Linear4bit) and name == "weight"

    def leave(self, model: PreTrainedModel, name: str, layer: Linear4bit) -> nn.Module:
        """Let that layer stand there again, with the bias of ``layer`` and a weight that is still to come."""
        original = self.originals.pop(name)
        original.bias = layer.bias
        model.set_submodule(name, original.requires_grad_())
        return original

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        config = self.quantization_config
        # Which layers are in 4 bits a checkpoint itself says, whatever class opens it: the others are left.
        skipped = [] if self.pre_quantized else config.modules_to_not_convert
        layers = layers_to_convert(model, skipped, read=self.pre_quantized)
        self.read = {name for name in layers if needs_full_precision(model, name)}
        for name, module in layers.items():
            shape = module.weight.shape
            rows, columns = reversed(shape) if isinstance(module, Conv1D) else shape
            layer = Linear4bit(
                columns,
                rows,
                module.bias is not None,
                config.quant_type,
                config.blocksize,
                config.double_quant,
                config.compute_dtype,
                device="meta",
                dtype=module.weight.dtype,
                compute=config.compute,
            )
            model.set_submodule(name, layer.requires_grad_(False))
            self.originals[name] = module
        if not self.originals:
            raise nothing_to_convert(model, config)
        if not self.pre_quantized:
            _warn_of_other_weights(model)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, Linear4bit)]
        for name, layer in layers:
            # Not in the checkpoint: transformers has initialized it (and said so).
            if layer.packed is None and not self.pre_quantized:
                layer.set_packed(self.quantized(layer.weight))
            elif layer.packed is None:
                if not layer.weight.is_floating_point():
                    raise ValueError(
                        f"{name}.weight is stored as {layer.weight.dtype} without the tensors that say how; "
                        "it must be in floating point or have those of a 4-bit weight beside it"
                    )
                if _is_lost(name, self.found):
                    raise ValueError(
                        f"the checkpoint lacks {name}.weight, which it has for other blocks; it must have all of a "
                        "block: save the model again, or give the configuration that it was saved with"
                    )
                self._put_original(model, name, layer, layer.weight.detach())
                self.originals.pop(name).requires_grad_()
        in_4_bits = [f"{name}.weight" for name, layer in model.named_modules() if isinstance(layer, Linear4bit)]
        conversions = getattr(model, "_weight_conversions", None) or []
        model._weight_conversions = [c for c in conversions if not _only_reads(c, in_4_bits)]
        for tensor in (*model.parameters(), *model.buffers()):
            # A view of the mapped file keeps all of it mapped, also what was quantized.
            if not tensor.untyped_storage().resizable():
                mapped, tensor.data = tensor.data, tensor.data.clone()
                _let_go(mapped)
        from .accelerate import accelerate  # not while transformers is still importing itself: it needs the models

        return accelerate(model)

    def quantized(self, weight: Tensor) -> Packed4bit:
        """``weight`` in the format the config asks for."""
        config = self.quantization_config
        return quantize_4bit(weight, config.quant_type, config.blocksize, config.double_quant)

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(self)

    def get_weight_conversions(self) -> list[WeightConverter]:
        if not self.pre_quantized:
            return []
        # By the layers' own names, so that other weights load the ordinary way.
        leaves = dict.fromkeys(name.rpartition(".")[2] for name in self.originals)
        # The bare name last: older transformers take the first pattern that matches.
        suffixes = (*(f".{suffix}" for suffix in STATE_SUFFIXES), "")
        return [
            WeightConverter(
                [f"{leaf}.weight{suffix}" for suffix in suffixes], f"{leaf}.weight", operations=[_Deserialize(self)]
            )
            for leaf in leaves
        ]

    def dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        """transformers', by default in the dtype the model has now; there it is that of its loading.

        Raises:
            ValueError: the model carries a soft prompt, or a 4-bit layer other adapters; or ``dtype`` is no
                floating-point dtype. Nothing has changed then.
        """
        return super().dequantize(model, model.dtype if dtype is None else floating_dtype(dtype))

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        from .accelerate import unfuse  # not while transformers is still importing itself

        layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, Linear4bit)}
        prompts = any(config.is_prompt_learning for config in vars(model).get(CARRIED, {}).values())
        if prompts or not layers.keys() <= self.originals.keys():  # the latter: something is around them
            raise ValueError(
                f"this {type(model).__name__} carries adapters, and dequantize() is of a model without; call unload() "
                "first, or a PeftModel's merge_and_unload(dequantize=True) instead"
            )
        unfuse(model)
        for name, layer in layers.items():
            self._put_original(model, name, layer, layer.dequantize(dtype))
        return model

    def transpose_back(self, model: nn.Module) -> None:
        """Let ``Conv1D`` stand again where adapters left a linear layer in full precision."""
        for name, original in self.originals.items():
            layer = model.get_submodule(name)
            if isinstance(original, Conv1D) and type(layer) is nn.Linear:
                self._put_original(model, name, layer, layer.weight.detach())

    def _put_original(self, model: nn.Module, name: str, layer: nn.Linear, weight: Tensor) -> None:
        """Let what stood at ``name`` stand there again, with ``weight`` [out, in] and the rest of ``layer``."""
        original = self.originals[name]
        weight = weight.t().contiguous() if isinstance(original, Conv1D) else weight
        original.weight, original.bias = nn.Parameter(weight, requires_grad=False), layer.bias
        model.set_submodule(name, original.train(layer.training))


class _Op(ConversionOps):
    def __init__(self, hf_quantizer: FastPeftQuantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def __deepcopy__(self, memo: dict) -> _Op:
        # transformers copies the operation for every weight; the quantizer is one for the model.
        return self


class _Quantize(_Op):
    """A full-precision weight to 4 bits, straight into its layer."""

    def convert(self, input_dict: dict[str, Any], *, model: PreTrainedModel, **kwargs: Any) -> dict[str, Tensor]:
        result = {}
        for key, weight in input_dict.items():
            weight = weight[0] if isinstance(weight, list) else weight
            layer, _ = get_module_from_name(model, key)
            transposed = isinstance(self.hf_quantizer.originals[key.removesuffix(".weight")], Conv1D)
            layer.set_packed(self.hf_quantizer.quantized(weight.t() if transposed else weight))
            _let_go(weight)
            result[key] = layer.weight
        return result


class _Deserialize(_Op):
    """The tensors of one stored 4-bit weight into its layer."""

    def convert(
        self, input_dict: dict[str, Any], *, model: PreTrainedModel, full_layer_name: str, target_patterns: list[str],
        **kwargs: Any,
    ) -> dict[str, Tensor]:  # fmt: skip
        key, name = target_patterns[0], full_layer_name.removesuffix(".weight")
        state = {name: t[0] if isinstance(t, list) else t for name, t in input_dict.items()}
        layer, _ = get_module_from_name(model, full_layer_name)
        self.hf_quantizer.found.add(name)
        if state.keys() == {key} and state[key].is_floating_point():
            # A layer that the checkpoint left in full precision stays so here.
            if isinstance(layer, Linear4bit):
                layer = self.hf_quantizer.leave(model, name, layer)
            return {key: state[key].to(layer.weight.dtype)}
        if not isinstance(layer, Linear4bit):
            raise ValueError(f"{full_layer_name} is stored in 4 bits, but its layer is one that is not converted")
        packed = packed_from_state(state, key)
        if name in self.hf_quantizer.read:  # while loading already, where buffers are made
            layer = self.hf_quantizer.leave(model, name, layer)
            weight = packed.dequantize(layer.weight.dtype)
            weight = weight.t().contiguous() if isinstance(layer, Conv1D) else weight
        else:
            layer.set_packed(packed.to(packed.device, copy=True))
            weight = layer.weight
        for tensor in state.values():
            _let_go(tensor)
        return {key: weight}


def _is_lost(name: str, found: Collection[str]) -> bool:
    """Whether a layer that is not among those ``found`` is missing from a block that is not new.

    Other layers of the block are found then, and this one in other blocks. Heads and blocks that the configuration adds
    lack all that they have.
    """
    block = re.match(r"(.*\.\d+\.)", name)
    in_any = re.compile(re.sub(r"\b\d+\b", r"\\d+", re.escape(name)))
    return block is not None and any(n.startswith(block[1]) for n in found) and any(map(in_any.fullmatch, found))


def _only_reads(conversion: WeightTransform, in_4_bits: list[str]) -> bool:
    """Whether a save must not undo ``conversion``: one of ours, or one that makes weights which are ``in_4_bits`` now,
    so that packed tensors would be joined or permuted.
    """
    if not isinstance(conversion, WeightConverter):
        return False
    if any(isinstance(op, _Deserialize) for op in conversion.operations):
        return True
    undone = conversion.reverse_transform()
    return any(undone.rename_source_key(key)[1] is not None for key in in_4_bits)


def _let_go(read: Tensor) -> None:
    """What was ``read`` from a mapped file need not stay in memory: the whole file would add to the peak."""
    if read.is_cpu and read.is_contiguous() and not read.untyped_storage().resizable():
        torch.ops.pyfastpeft.drop_mapped_pages.default(read)


def linear_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """All layers that could be in 4 bits, by name."""
    # Falcon's layers compute what nn.Linear does, the bias in an addition of its own.
    return {
        name: m
        for name, m in model.named_modules()
        if type(m) is nn.Linear or isinstance(m, Conv1D) or type(m).__name__ == "FalconLinear"
    }


def layers_to_convert(model: PreTrainedModel, chosen: list[str] | None, read: bool = False) -> dict[str, nn.Module]:
    """The layers to bring to 4 bits, by name, where ``chosen`` is a ``modules_to_not_convert``.

    Args:
        read: also those whose weight the module around them reads.
    """
    skip = [*_left_in_full_precision(model, chosen), *(model._keep_in_fp32_modules or ())]
    layers = {name: module for name, module in linear_layers(model).items() if should_convert_module(name, skip)}
    return {name: module for name, module in layers.items() if read or not needs_full_precision(model, name)}


def nothing_to_convert(model: PreTrainedModel, config: FastPeftConfig) -> ValueError:
    """What to raise where a 4-bit model was asked for and no layer is in 4 bits."""
    skipped = config.modules_to_not_convert
    return ValueError(f"{type(model).__name__} has no linear layer to quantize; modules_to_not_convert is {skipped}")


def _warn_of_other_weights(model: PreTrainedModel) -> None:
    """Say so where much of ``model`` is in parameters of no layer, such as those that hold a layer of all experts."""
    layers = (nn.Linear, Conv1D, nn.Embedding, nn.modules.conv._ConvNd)
    other = {
        f"{path}.{name}": parameter.numel()
        for path, module in model.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() > 1 and not isinstance(module, layers)
    }
    left, total = sum(other.values()), sum(parameter.numel() for parameter in model.parameters())
    if left > total / 10:
        warnings.warn(
            f"{left:,} of the {total:,} parameters of {type(model).__name__} stay in full precision, in {len(other)} "
            f"weights that no linear layer holds ({max(other, key=other.get)}, …): only linear layers are quantized",
            stacklevel=2,
        )


def _left_in_full_precision(model: PreTrainedModel, chosen: list[str] | None) -> set[str]:
    """Names of modules not to convert: ``chosen``, or the heads and the last module; and all tied ones."""
    keys = (key for pair in model.all_tied_weights_keys.items() for key in pair)
    tied = {key.removesuffix(".weight") for key in keys if key.endswith(".weight")}
    if chosen is not None:
        return tied | set(chosen)
    names = {name for heads in HEADS.values() for name in heads}
    heads = [output_head(model), *(child for name, child in model.named_children() if name in names)]
    last, _ = list(model.named_parameters())[-1]
    return tied | {last.rpartition(".")[0]} | {n for n, m in model.named_modules() if any(m is head for head in heads)}


def quantized_config(config: PreTrainedConfig) -> PreTrainedConfig | None:
    """That of a checkpoint or of the text model in it, whichever has the ``quantization_config``, as transformers looks
    for it; None where neither has."""
    both = config, config.get_text_config(decoder=True)
    return next((held for held in both if getattr(held, "quantization_config", None) is not None), None)


def _read_checkpoints_of_others() -> None:
    """Let ``FastPeftConfig`` open checkpoints that name another method.

    transformers refuses a ``quantization_config`` of another class than the checkpoint's; the checkpoint's is
    translated before it looks.
    """
    wrapped = transformers.modeling_utils.get_hf_quantizer

    @functools.wraps(wrapped)
    def get_hf_quantizer(config: Any, quantization_config: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(quantization_config, FastPeftConfig):
            if kwargs.get("gguf_file") is not None:
                raise ValueError(
                    "gguf_file and a FastPeftConfig cannot go together in from_pretrained; "
                    "pyfastpeft.from_gguf(path, quantization_config=...) loads a GGUF file and keeps its Q4_0 and Q4_1 "
                    "weights as they are"
                )
            holder = quantized_config(config)
            translated = None if holder is None else quantization_config.for_checkpoint(holder.quantization_config)
            if translated is not None:
                del holder.quantization_config
                config.quantization_config, quantization_config = translated.to_dict(), None
        return wrapped(config, quantization_config, *args, **kwargs)

    transformers.modeling_utils.get_hf_quantizer = get_hf_quantizer


_read_checkpoints_of_others()
