"""Linear4bit: an ``nn.Linear`` whose weight is held in 4 bits."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from ..formats import Packed4bit, quantize_4bit
from ..formats.codes import check_settings
from ..formats.packed import FLOATS
from ..hub.bitsandbytes import STATE_SUFFIXES, bnb_state, packed_from_bnb, packed_from_state, packed_to_state
from ..ops import Lora, linear_4bit
from ..ops.checks import as_count
from ..ops.linear_4bit import check_compute, check_compute_dtype, needs_grad
from .one_device import OneDevice


def _as_attributes(names: Iterable[str]) -> SimpleNamespace:
    """A tree in which each of ``names``, which have dots, can be followed from attribute to attribute."""
    root = SimpleNamespace()
    for name in names:
        node = root
        for part in name.split("."):
            node = vars(node).setdefault(part, SimpleNamespace())
    return root


class Linear4bit(OneDevice, nn.Linear):
    """Drop-in ``nn.Linear`` with a frozen 4-bit weight.

    ``weight`` is the packed codes (uint8, in the layout of its device, which never changes under a forward);
    ``packed`` is the whole :class:`Packed4bit`, ``dequantize()`` the weight in full precision. The state dict holds
    bitsandbytes' keys and layout, whatever the layout in memory; loading takes those or a full-precision ``weight``,
    which is quantized on the way in.

    Args:
        in_features, out_features, bias: as ``nn.Linear``.
        quant_type: ``"nf4"``, ``"fp4"`` or ``"int4"``.
        blocksize: elements a scale.
        double_quant: keep the scales in 8 bits.
        compute_dtype: dtype the product runs in; the result returns in x's dtype. Default: x's dtype.
        device, dtype: of the bias, and the dtype that ``dequantize`` defaults to.
        compute: None, or ``"int8"``: see :func:`pyfastpeft.ops.linear_4bit`. Whatever needs a gradient is computed
            exactly all the same.

    Raises:
        ValueError: the argument at fault, what it was and what it must be.
    """

    # The class's, not the parameter's, whose attributes neither pickling nor sharding would keep.
    _state_names = _as_attributes(f"weight.{suffix}" for suffix in STATE_SUFFIXES)

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        quant_type: str = "nf4",
        blocksize: int = 64,
        double_quant: bool = False,
        compute_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        compute: str | None = None,
    ) -> None:
        _, blocksize = check_settings(quant_type, blocksize, double_quant)
        in_features = as_count("in_features", in_features, least=0)
        out_features = as_count("out_features", out_features, least=0)
        # float64 is quantize_4bit's to refuse: a model that comes in 4 bits may have it around these layers.
        if dtype not in (None, *FLOATS, torch.float64):
            raise ValueError(f"dtype is {dtype!r}; it must be None, float32, bfloat16 or float16")
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.quant_type, self.blocksize, self.double_quant = quant_type, blocksize, double_quant
        self.compute_dtype, self.compute = check_compute_dtype(compute_dtype), check_compute(compute)
        if self.weight.is_meta:
            # Filled by load_state_dict or by the transformers integration; nothing to quantize yet.
            self.packed: Packed4bit | None = None
            self.weight.requires_grad_(False)
        else:
            self.set_packed(quantize_4bit(self.weight, quant_type, blocksize, double_quant))

    def set_packed(self, packed: Packed4bit) -> None:
        """Hold ``packed`` (shape (out_features, in_features)) as this layer's weight."""
        self._check_shape(packed)
        self.packed = packed.prepared()
        self.quant_type, self.blocksize = packed.quant_type, packed.blocksize
        self.double_quant = packed.nested is not None
        self.weight = nn.Parameter(self.packed.codes, requires_grad=False)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Refuses another ``weight`` than ``packed``'s codes, by which the layer goes: it would never be read."""
        packed = self.__dict__.get("packed")
        if name == "weight" and packed is not None and (param is None or param.data_ptr() != packed.codes.data_ptr()):
            raise TypeError(
                "weight is assigned, but a Linear4bit's is packed: call set_packed, with quantize_4bit(weight) or with "
                "another layer's packed, which both then share; or load_state_dict"
            )
        if packed is not None and param is not None and name != "weight" and param is self._parameters.get("weight"):
            self._keep_weight(f"taken as {name}")  # as pruning does
        super().register_parameter(name, param)

    def __delattr__(self, name: str) -> None:
        """Refuses to be without ``weight``, as parametrizations want it: what took its place would never be read."""
        if name == "weight" and self.__dict__.get("packed") is not None:
            self._keep_weight("deleted")
        super().__delattr__(name)

    def _keep_weight(self, done: str) -> None:
        raise TypeError(
            f"weight is {done}, but a Linear4bit's is packed, and its product reads nothing else; prune or parametrize "
            "what to_linear() gives, and set_packed its weight"
        )

    def _check_shape(self, packed: Packed4bit) -> None:
        if tuple(packed.shape) != (self.out_features, self.in_features):
            expected = (self.out_features, self.in_features)
            raise ValueError(f"packed has shape {tuple(packed.shape)}; this layer's weight is {expected}")

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight [out_features, in_features] in ``dtype`` (default: the original weight's)."""
        packed = self._require_packed()
        return packed.dequantize(packed.dtype if dtype is None else dtype)

    @property
    def W_q(self) -> Tensor:
        """``weight``, by the name at which peft asks a layer to dequantize itself, as its DoRA needs."""
        return self.weight

    @property
    def original_dtype(self) -> torch.dtype:
        """Of the weight before it was quantized, or while there is none, of the one that is to come."""
        return self.weight.dtype if self.packed is None else self.packed.dtype

    def _require_packed(self) -> Packed4bit:
        if self.packed is None:
            raise RuntimeError("this Linear4bit holds no weight: it was made on or moved to the meta device; load one")
        return self.packed

    def forward(self, x: Tensor, lora: Lora | tuple | None = None) -> Tensor:
        """The product of ``x`` [..., in_features], [..., out_features] in x's dtype.

        Args:
            lora: a branch in the same pass, as :func:`pyfastpeft.ops.linear_4bit` takes it.

        Raises:
            RuntimeError: there is no weight yet.
            TypeError, ValueError: as ``linear_4bit``.
        """
        return self.product(x, self.bias, lora)

    def product(self, x: Tensor, bias: Tensor | None = None, lora: Lora | tuple | None = None) -> Tensor:
        """:meth:`forward` with another bias, or none."""
        packed = self.packed if self.packed is not None else self._require_packed()
        compute = self.compute
        if compute is not None and needs_grad(x, bias, lora):
            compute = None
        # Whole numbers, which a conversion there and back would hide, are the product's to refuse.
        if self.compute_dtype in (None, x.dtype) or not x.is_floating_point():
            return linear_4bit(x, packed, bias, lora, compute)
        return linear_4bit(x.to(self.compute_dtype), packed, bias, lora, compute).to(x.dtype)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        quant_type: str = "nf4",
        blocksize: int = 64,
        double_quant: bool = False,
        compute_dtype: torch.dtype | None = None,
        compute: str | None = None,
    ) -> Linear4bit:
        """Quantize ``linear``'s weight; the bias is shared with it.

        Raises:
            TypeError: ``linear`` is no ``nn.Linear``, or in 4 bits already.
            ValueError: a setting that :class:`Linear4bit` does not take.
        """
        if isinstance(linear, Linear4bit):
            raise TypeError("linear is already a Linear4bit")
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear is a {type(linear).__name__}; it must be a torch.nn.Linear")
        if bnb_state(linear) is not None:
            raise TypeError("linear is in 4 bits already, by bitsandbytes; use Linear4bit.from_bnb")
        packed = quantize_4bit(linear.weight, quant_type, blocksize, double_quant)
        return cls.from_packed(packed, linear.bias, compute_dtype, compute)

    def to_linear(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """The same layer in full precision, in ``dtype`` (default: the one it was quantized from)."""
        weight = self.dequantize(dtype)
        out = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        out.weight = nn.Parameter(weight, requires_grad=False)
        if self.bias is not None:
            out.bias = nn.Parameter(self.bias.detach().to(weight.dtype, copy=True), requires_grad=False)
        return out.train(self.training)

    @classmethod
    def from_packed(
        cls,
        packed: Packed4bit,
        bias: Tensor | None = None,
        compute_dtype: torch.dtype | None = None,
        compute: str | None = None,
    ) -> Linear4bit:
        """A layer around an existing packed matrix (N, K)."""
        n, k = packed.shape
        self = cls(k, n, bias=False, compute_dtype=compute_dtype, device="meta", compute=compute)
        self.set_packed(packed)
        if bias is not None:
            self.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias, requires_grad=False)
        return self

    @classmethod
    def from_bnb(cls, bnb_linear: nn.Module) -> Linear4bit:
        """Take over a ``bitsandbytes.nn.Linear4bit`` in whatever state; see :func:`hub.bitsandbytes.packed_from_bnb`.

        Codes and scales are kept bit for bit, the bias is shared.

        Raises:
            TypeError, ValueError: as ``packed_from_bnb``.
        """
        self = cls.from_packed(packed_from_bnb(bnb_linear), bnb_linear.bias, bnb_linear.compute_dtype)
        return self.train(bnb_linear.training)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Linear4bit:
        if self.packed is None:
            return super()._apply(fn, recurse)
        packed, self._parameters["weight"] = self.packed, None
        try:
            super()._apply(fn, recurse)
        finally:
            self.weight = nn.Parameter(packed.codes, requires_grad=False)
        # Move as bytes: `.half()` or `.to(dtype)` must not touch a scale, and a change of device changes the layout.
        target = fn(packed.codes[:0]).device
        if target.type == "meta":  # as if it had been made there
            self.packed = None
            shape = self.out_features, self.in_features
            self.weight = nn.Parameter(torch.empty(shape, dtype=packed.dtype, device=target), requires_grad=False)
            return self
        self.set_packed(packed.to(target) if target != packed.device else packed.map_bytes(fn))
        return self

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        # Pickle writes the parameter and the packed weight's codes apart, and these may have been laid out anew; they
        # are one memory.
        if self.packed is not None:
            self.weight = nn.Parameter(self.packed.codes, requires_grad=False)

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.packed is not None:
            del destination[prefix + "weight"]
            destination.update(packed_to_state(self.packed, prefix + "weight"))

    def _fqn_modifiers(self) -> dict[str, str]:
        """Where ``torch.distributed.checkpoint.state_dict`` follows the keys under ``weight``: a parameter has none."""
        return {"weight": "_state_names"}

    def _load_from_state_dict(
        self,
        state_dict: dict,
        prefix: str,
        local_metadata: dict,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        rest = local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        for hook in self._load_state_dict_pre_hooks.values():
            hook(state_dict, prefix, *rest)
        key, bias = prefix + "weight", state_dict.get(prefix + "bias")
        own = {k: state_dict[k] for k in list(state_dict) if k == key or k.startswith(key + ".")}
        packed, problems = None, len(error_msgs)
        if key in own:
            try:
                packed = self._packed_from(own, key, local_metadata.get("assign_to_params_buffers", False))
            except (ValueError, TypeError) as error:
                error_msgs.append(f"{key}: {error}")
        elif strict:
            missing_keys.append(key)
        if bias is not None and self.bias is not None and bias.shape != self.bias.shape:
            error_msgs.append(f"{prefix}bias has shape {tuple(bias.shape)}; it must be {tuple(self.bias.shape)}")
        # All that is there of the layer or nothing.
        if len(error_msgs) > problems:
            return
        known = {key, *(f"{key}.{suffix}" for suffix in STATE_SUFFIXES)}
        hooks, weight = self._load_state_dict_pre_hooks, self.weight
        self._load_state_dict_pre_hooks, self._parameters["weight"] = OrderedDict(), None
        try:
            super()._load_from_state_dict({k: t for k, t in state_dict.items() if k not in known}, prefix, *rest)
        finally:
            self._load_state_dict_pre_hooks, self._parameters["weight"] = hooks, weight
        if packed is not None:
            self.set_packed(packed)

    def _packed_from(self, state: dict[str, Tensor], key: str, assign: bool) -> Packed4bit | None:
        """The weight under ``key``, in 4 bits already or quantized now, on this layer's device and of its shape.

        It shares memory with ``state`` only where ``assign`` allows it.
        """
        weight = state[key]
        if hasattr(self.weight, "device_mesh"):  # a DTensor, as packed is not
            raise TypeError("this layer's weight is sharded; a 4-bit weight must be loaded before fully_shard")
        if weight is self.weight:
            # torch.distributed.checkpoint puts the parameters themselves where a state leaves the frozen ones out; the
            # scales beside them may be another model's.
            return self.packed
        if weight.is_floating_point() and len(state) == 1:
            packed, copy = quantize_4bit(weight, self.quant_type, self.blocksize, self.double_quant), False
        else:
            packed, copy = packed_from_state(state, key), not assign
        self._check_shape(packed)
        return packed.to(packed.device if self.packed is None else self.packed.device, copy)

    def extra_repr(self) -> str:
        double = ", double_quant=True" if self.double_quant else ""
        compute = "" if self.compute is None else f", compute={self.compute!r}"
        return f"{super().extra_repr()}, quant_type={self.quant_type!r}, blocksize={self.blocksize}{double}{compute}"
