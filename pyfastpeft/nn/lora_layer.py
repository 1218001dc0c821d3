"""What a layer with LoRA adapters beside it has and does, whatever layer it is; :mod:`.lora` says what it computes."""

from __future__ import annotations

import math
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..adapters import NO_ROWS, AdapterBank, Parts, Rows
from ..caching import AdapterCache, stamp_of
from ..formats.packed import Packed4bit
from ..ops import Lora, PackedLora, mixed
from ..ops.autocast import autocast_off
from ..ops.linear_4bit import repack_lora
from ..ops.tracing import captured, is_compiling, is_repeated, traced


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """What one layer does while a set of adapters is active.

    Not a tuple: torch.export would copy it, parameters included, and leave the copy in the layer.

    Attributes:
        names: the active adapters that this layer has.
        simple: one adapter: the fields below describe it (else they are not used).
        a, b: parameter dictionaries with A [r, in] and B [out, r] as "weight", and a "bias" [out] or None; never stale.
        magnitude: the same of DoRA's magnitude [out], or None.
        scaling: a number; ``scale`` is the same as a tensor [r], for what :func:`is_repeated`.
        dropout: what the adapter's input goes through in training.
    """

    names: tuple[str, ...]
    simple: bool
    a: dict[str, Tensor]
    b: dict[str, Tensor]
    magnitude: dict[str, Tensor] | None
    scaling: float
    scale: Tensor | None
    dropout: nn.Module | None


class Magnitude(nn.Module):
    """DoRA's magnitude, ``weight`` [out]."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)


def dropout_rate(dropout: nn.Module | None) -> float:
    """The share that ``dropout`` leaves out now. It is asked each time: users switch off what they find in a model.

    Raises:
        TypeError: it is another module, which the branch could not compute.
    """
    if isinstance(dropout, nn.Dropout):
        return dropout.p if dropout.training else 0.0
    if dropout is None or isinstance(dropout, nn.Identity):
        return 0.0
    raise TypeError(f"lora_dropout holds a {type(dropout).__name__}; it must be an nn.Dropout or an nn.Identity")


def scaling_of(alpha: float, r: int, use_rslora: bool) -> float:
    """What multiplies B A of rank ``r``: alpha / r, or alpha / √r (rsLoRA, Kalajdzievski 2023)."""
    return alpha / math.sqrt(r) if use_rslora else alpha / r


class _Scaling(MutableMapping[str, float]):
    """A layer's scaling by adapter; what is written takes effect, so it is refused of one that is merged."""

    def __init__(self, layer: LoraLayer) -> None:
        self._layer = layer

    def __getitem__(self, name: str) -> float:
        return self._layer._scaling[name]

    def __setitem__(self, name: str, scaling: float) -> None:
        self._layer.scaling = {name: scaling}

    def update(self, *scaling: Any, **by_name: float) -> None:
        self._layer.scaling = dict(*scaling, **by_name)

    def __delitem__(self, name: str) -> None:
        raise TypeError("a layer's scaling is removed with its adapter")

    def __iter__(self) -> Iterator[str]:
        return iter(self._layer._scaling)

    def __len__(self) -> int:
        return len(self._layer._scaling)

    def __repr__(self) -> str:
        return repr(self._layer._scaling)

    def copy(self) -> dict[str, float]:
        return dict(self)


def check_finite(names: Sequence[str], values: Iterable[Tensor | None], dtype: torch.dtype | None) -> None:
    """Refuse a merge of ``names`` whose ``values``, as they are or, if given, in ``dtype``, are not finite."""
    if not all(v is None or bool(v.to(dtype or v.dtype).isfinite().all()) for v in values):
        raise ValueError(f"merging {list(names)} would write values that are not finite")


Factor = nn.Linear | Tensor
"""A or B: a linear layer, or, beside an embedding, the values themselves."""


def check_own_weight(layer: nn.Module) -> None:
    """Whether the weight is a parameter, in whose place a merged one can stand.

    Raises:
        ValueError: it is computed from others, which a merge would not reach.
    """
    if "weight" not in layer._parameters:
        raise ValueError(
            f"the weight of a {type(layer).__name__} of shape {tuple(layer.weight.shape)} is computed, by a "
            "parametrization, prune or weight_norm; to take other values it must be a parameter again: "
            "parametrize.remove_parametrizations, prune.remove or remove_weight_norm"
        )


def _weight_of(part: nn.Linear) -> Tensor:
    """A or B, which may be computed: by a parametrization, or (``prune``, the old ``weight_norm``) before a forward."""
    if "weight" not in part._parameters:
        for hook in part._forward_pre_hooks.values():
            hook(part, ())
    return part.weight


def applied(held: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    """The weight or bias that is kept for :meth:`LoraLayer.unmerge`, changed as ``nn.Module._apply`` does: a parameter,
    which an optimizer or a tied layer may hold, stays the same object where it would in a module."""
    if isinstance(held, nn.Parameter):
        holder = nn.Module()
        holder.held = held
        return holder._apply(fn).held
    return held.to(fn(held.codes[:0]).device) if isinstance(held, Packed4bit) else held


def _after_loading(layer: LoraLayer, _: Any) -> None:
    layer._changed()


class LoraLayer(nn.Module, ABC):
    """A base layer with named LoRA adapters; the parts that do not depend on the base layer's type.

    Attributes:
        base_layer: the wrapped module.
        r, lora_alpha: by adapter name. ``r`` is the rank in use, which after a hot-swap may be below the rank of the
            parameters (the rest is zero).
        lora_dropout: by adapter name an ``nn.Dropout``, or ``nn.Identity`` where nothing is left out.
        merged_adapters: the adapters added into the base weight at the moment.
        called: whether what stands around the layer calls it; where that reads its weight instead, adapters have no
            effect, and are not merged.
    """

    def __init__(self, base_layer: nn.Module, bank: AdapterBank) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.bank = bank
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.lora_dropout = Parts(self._changed)
        self.merged_adapters: list[str] = []
        self.called = True
        self.lora_A = Parts(self._changed)
        self.lora_B = Parts(self._changed)
        self.lora_magnitude_vector = Parts(self._changed)
        self._scaling: dict[str, float] = {}
        self._own_scaling: dict[str, float] = {}
        self._scale: dict[str, Tensor] = {}
        self._plan: Plan | None = None
        self._unmerged: tuple[Any, nn.Parameter | None] | None = None
        self._cache = AdapterCache()
        self._square: tuple[tuple | None, Tensor, weakref.ref] | None = None
        self.register_load_state_dict_post_hook(_after_loading)

    # What a subclass says about its base layer.

    in_features: int
    out_features: int

    @abstractmethod
    def matrix(self) -> Tensor:
        """M [out, in] in float32."""

    def stored(self, matrix: Tensor) -> nn.Parameter | Packed4bit:
        """``matrix`` [out, in] as the base layer holds it, in its own precision."""
        check_own_weight(self.base_layer)
        weight = self.base_layer.weight
        # A new parameter, so that a tied one elsewhere keeps its values.
        stored = self.as_stored(matrix).to(weight.dtype).contiguous()
        return nn.Parameter(stored, requires_grad=weight.requires_grad)

    @property
    def stored_weight(self) -> Any:
        """The base layer's weight as :meth:`exchange` takes it."""
        return self.base_layer.weight

    def exchange(self, stored: Any) -> None:
        """Make what :meth:`stored` returned, or :attr:`stored_weight` was, the base layer's weight."""
        self.base_layer.weight = stored

    def as_stored(self, matrix: Tensor) -> Tensor:
        """M in the orientation of the base layer's weight."""
        return matrix

    @abstractmethod
    def times(self, a: Tensor) -> Tensor:
        """M aᵀ [out, r] in float32, without building M."""

    KEYS: ClassVar[tuple[str, str]] = ("lora_A.weight", "lora_B.weight")
    """What A and B are called in PEFT's files, after the layer's path."""

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """A [r, in] and B [out, r] of an adapter."""
        return _weight_of(self.lora_A[name]), _weight_of(self.lora_B[name])

    def capacity(self, name: str) -> int:
        """The rank of an adapter's parameters, of which ``r`` may be in use."""
        return len(self._scale[name])

    # Adapters.

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    @property
    def scaling(self) -> MutableMapping[str, float]:
        """Scaling of each adapter; may be written, one or several at once."""
        return _Scaling(self)

    @scaling.setter
    def scaling(self, scaling: Mapping[str, float]) -> None:
        given = {name: float(value) for name, value in scaling.items()}
        for name in given:
            if name not in self._scaling:
                raise KeyError(f"{name!r}; the adapters of this layer are {list(self._scaling)}")
            self.bank.check_unmerged(name)
        for name, value in given.items():
            self._scale_by(name, value)
        self.bank.refresh_one(self)

    def set_scale(self, adapter: str, scale: float) -> None:
        """Make an adapter's scaling ``scale`` times its own, alpha / r (or alpha / √r)."""
        if adapter in self._own_scaling:
            self.scaling[adapter] = scale * self._own_scaling[adapter]

    def scale_layer(self, scale: float) -> None:
        """Multiply the scaling of the active adapters."""
        if scale != 1:
            self.scaling = {name: scale * self._scaling[name] for name in self.active_adapters}

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scaling of the active adapters; None: give them their own again."""
        own, now = self._own_scaling, self._scaling
        self.scaling = {name: own[name] if scale is None else now[name] / scale for name in self.active_adapters}

    def own_scaling(self, adapter: str) -> float:
        """An adapter's scaling without what :meth:`set_scale` and the like made of it."""
        return self._own_scaling[adapter]

    def is_rescaled(self, adapter: str) -> bool:
        """Whether an adapter's scaling is another than its own."""
        return self._scaling[adapter] != self._own_scaling[adapter]

    @property
    def active_adapters(self) -> list[str]:
        """Those of the active adapters that this layer has."""
        return [name for name in self.bank.chosen if name in self.r]

    @property
    def use_dora(self) -> dict[str, bool]:
        """By adapter name."""
        return {name: name in self.lora_magnitude_vector for name in self.r}

    def get_base_layer(self) -> nn.Module:
        """The layer that is adapted (PEFT's name)."""
        return self.base_layer

    @property
    def merged(self) -> bool:
        """Whether an adapter is merged into the base layer's weight."""
        return bool(self.merged_adapters)

    def set_scaling(self, name: str, scaling: float) -> None:
        """Change what is an adapter's own scaling, in place; the bank must be refreshed afterwards."""
        self._own_scaling[name] = scaling
        self._scale_by(name, scaling)

    def _scale_by(self, name: str, scaling: float) -> None:
        self._scaling[name] = scaling
        self._scale[name].fill_(scaling)

    def add_adapter(
        self,
        name: str,
        r: int,
        alpha: float,
        *,
        dropout: float = 0.0,
        use_rslora: bool = False,
        use_dora: bool = False,
        lora_bias: bool = False,
        dtype: torch.dtype | None = None,
        initial: Callable[[Tensor, int, float], tuple[Tensor, Tensor, Tensor]] | bool | str = True,
        empty: bool = False,
    ) -> None:
        """Add an adapter of rank ``r``.

        Args:
            dtype: of its parameters.
            initial: True (A Kaiming-uniform, B zero), False (both as ``nn.Linear``'s default), "gaussian", or a
                function of (M, r, scaling) that returns A, B and the weight that is left for the base layer.
            empty: leave the values to be loaded; a function ``initial`` still changes the base weight.
        """
        self.r[name], self.lora_alpha[name] = r, alpha
        self.lora_dropout[name] = nn.Dropout(dropout) if dropout else nn.Identity()
        self.lora_dropout[name].train(self.training)
        self._scaling[name] = self._own_scaling[name] = scaling_of(alpha, r, use_rslora)
        device = self.weight.device
        self._hold(name, *(factor.to(device, dtype) for factor in self._draw(r, lora_bias, initial, empty)))
        if callable(initial):
            a, b, rest = initial(self.matrix(), r, self._scaling[name])
            for parameter, value in zip(self.factors(name), (a, b), strict=True):
                parameter.data.copy_(value)
            self.exchange(self.stored(rest))
            self._square = None
        self._scale[name] = torch.full((r,), self._scaling[name], dtype=torch.float32, device=device)
        if use_dora:
            norm = self.weight.new_empty((self.out_features,), dtype=dtype) if empty else self.norm(name).to(dtype)
            self.lora_magnitude_vector[name] = Magnitude(norm)

    def _draw(self, r: int, lora_bias: bool, initial: Any, empty: bool) -> tuple[Factor, Factor]:
        """A and B for :meth:`_hold`, drawn before they are placed: a seed's values are the same wherever they go."""
        make = partial(nn.utils.skip_init, nn.Linear) if empty else nn.Linear
        a, b = make(self.in_features, r, bias=False), make(r, self.out_features, bias=lora_bias)
        if not (empty or initial is False or callable(initial)):
            if initial == "gaussian":
                nn.init.normal_(a.weight, std=1 / r)
            else:
                nn.init.kaiming_uniform_(a.weight, a=math.sqrt(5))
            nn.init.zeros_(b.weight)
            if lora_bias:
                nn.init.zeros_(b.bias)
        return a, b

    def _hold(self, name: str, a: Factor, b: Factor) -> None:
        self.lora_A[name], self.lora_B[name] = a, b

    def remove_adapter(self, name: str) -> None:
        """Forget an adapter, also one of which only some is here."""
        for holder in (self.lora_A, self.lora_B, self.lora_magnitude_vector, self.lora_dropout):
            if name in holder:  # one that failed half-way has only some
                del holder[name]
        self._cache.clear()
        # The rank last, by which a removal that was interrupted is seen to be unfinished.
        for held in (self.lora_alpha, self._scaling, self._own_scaling, self._scale, self.r):
            held.pop(name, None)

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The adapter's live parameters under the suffixes of PEFT's files."""
        held = dict(zip(self.KEYS, self.factors(name), strict=True))
        if (bias := self._bias_of(name)) is not None:
            held["lora_B.bias"] = bias
        if name in self.lora_magnitude_vector:
            held["lora_magnitude_vector"] = self.lora_magnitude_vector[name].weight
        return held

    def plan(self, active: tuple[str, ...]) -> Plan | None:
        """What this layer does while these adapters are active; None: its base layer's product alone."""
        names = tuple(n for n in active if n in self.r)
        if not names or self.merged:
            return None
        (name, *rest) = names
        if rest:
            return Plan(names, False, {}, {}, None, 0.0, None, None)
        a, b = self._holders(name)
        magnitude = None
        if name in self.lora_magnitude_vector:
            magnitude = self.lora_magnitude_vector[name]._parameters
        return Plan(names, True, a, b, magnitude, self._scaling[name], self._scale[name], self.lora_dropout[name])

    def _holders(self, name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return self.lora_A[name]._parameters, self.lora_B[name]._parameters

    def _plan_gain(self, plan: Plan, a: Tensor, b: Tensor) -> Tensor:
        """:meth:`gain` of the plan's adapter; compiled code must not depend on its name."""
        if is_compiling():
            return plan.magnitude["weight"] / self._norm(a, b, plan.scale)
        return self.gain(plan.names[0])

    def all_finite(self, names: tuple[str, ...], dtype: torch.dtype) -> bool:
        """Whether A and B of these adapters are finite in ``dtype``."""
        factors = [t for name in names for t in self.factors(name)]
        compute = lambda _: all(bool(t.to(dtype).isfinite().all()) for t in factors)  # noqa: E731
        return self._cached(names, ("finite", names, dtype), factors, compute)

    def only_product(self, names: tuple[str, ...]) -> bool:
        """Whether these adapters add (x · Aᵀ ∘ f) · Bᵀ and nothing else: no DoRA, no bias."""
        return not any(n in self.lora_magnitude_vector or self._bias_of(n) is not None for n in names)

    def _bias_of(self, name: str) -> Tensor | None:
        return self.lora_B[name].bias if name in self.lora_B else None

    def present(self, mode: Rows) -> tuple[str, ...]:
        """The adapters that the rows choose among and that this layer has."""
        if self.merged and mode is not NO_ROWS:  # where nobody chooses, what is merged is the base
            raise ValueError("adapter_names cannot be used while adapters are merged; call unmerge_adapter() first")
        return tuple(n for n in mode.names if n in self.r)

    # Arithmetic shared by the layer types.

    def _cached(
        self,
        names: tuple[str, ...],
        key: Any,
        tensors: list[Tensor],
        compute: Callable[[Any], Any],
        weight: Tensor | None = None,
    ) -> Any:
        """``compute(before)``, kept while ``tensors`` and ``weight`` do not change; only for adapters that are for
        inference.

        One that trains may be written through ``.data``, which leaves no trace. ``before`` is what was kept until now,
        to be written over or left; None: nothing. The tensors are kept along, but not the weight, which may be
        offloaded: another may come to lie where it was.
        """
        sources = tensors if weight is None else [*tensors, weight]
        records = torch.is_grad_enabled() and any(t.requires_grad for t in sources)
        if is_repeated() or records or not self.bank.frozen.issuperset(names):
            return compute(None)
        stamp = stamp_of(sources)
        held = self._cache.get(names, key)
        if held is None or stamp is None or held[0] != stamp or (weight is not None and held[3]() is not weight):
            with torch.inference_mode(False), torch.no_grad():  # it may serve where something else trains
                made = compute(None if held is None else held[1])
            held = stamp, made, tensors, None if weight is None else weakref.ref(weight)
            self._cache.put(names, key, held)
        return held[1]

    def stacked(self, names: tuple[str, ...], mode: Rows | None, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """A's one below the other [R, in], B's side by side [out, R], the factor of each column [R], or, where ``rows``
        choose, of each row's columns [rows, R]."""
        tensors = self.parts(names)

        def stack(_: Any) -> tuple[Tensor, Tensor, Tensor]:
            return torch.cat(tensors[::3]), torch.cat(tensors[1::3], dim=1), torch.cat(tensors[2::3])

        a, b, scale = tensors if len(names) == 1 else self._cached(names, names, tensors, stack)
        if mode is None:
            return a, b, scale
        ranks = tuple(self.capacity(n) for n in names)
        return a, b, mixed.zero_unless(mode.mask(names, rows, scale.device, ranks) > 0, scale)

    def parts(self, names: tuple[str, ...]) -> list[Tensor]:
        """What :meth:`stacked` puts together: A, B and the scaling of each."""
        return [t for n in names for t in (*self.factors(n), self._scale[n])]

    def branch(
        self, dtype: torch.dtype, names: tuple[str, ...], a: Tensor, b: Tensor, scaling: Any, dropout: float
    ) -> Lora | PackedLora:
        """The branch of stacked adapters for x of ``dtype``; packed, once, where they are for inference."""
        packable = not traced() and dtype is torch.bfloat16 and dropout == 0.0 and a.device.type == "cpu"
        if not (packable and self.bank.frozen.issuperset(names)):  # asked last: compiled code must not depend on names
            return Lora(a, b, scaling, dropout)
        tensors = [t for name in names for t in self.factors(name)]
        packed = self._cached(names, ("packed", names), tensors, lambda before: repack_lora(before, a, b))
        return PackedLora(a, b, scaling, *packed[3:])

    def norm(self, name: str) -> Tensor:
        """Float32 [out]: ||M + scaling · B A|| a row; no gradient flows into it."""
        a, b = self.factors(name)
        scale = self._scale[name]
        return self._cached((name,), ("norm", name), [a, b, scale], lambda _: self._norm(a, b, scale), self.weight)

    @torch.no_grad()
    def _norm(self, a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
        """From ||M||² and products with A, never building the sum."""
        a32, b32, s = a.float(), b.float(), scale[0]
        with autocast_off(a.device):  # it may be kept for what runs without
            square = self._matrix_square() + 2 * s * (self.times(a) * b32).sum(1)
            square = square + s * s * ((b32 @ (a32 @ a32.t())) * b32).sum(1)
        return square.clamp_min(torch.finfo(torch.float32).tiny).sqrt()

    def _matrix_square(self) -> Tensor:
        """Float32 [out]: ||M||² a row, computed once for a weight."""
        weight = self.weight
        # What is packed is not written to in place, which compiled code could not notice.
        if is_compiling() and self._square is not None and not weight.is_floating_point():
            return self._square[1]
        if traced():
            return self.matrix().square().sum(1)
        stamp = stamp_of([weight])
        held = self._square
        if held is None or stamp is None or held[0] != stamp or held[2]() is not weight:
            held = stamp, self.matrix().square().sum(1), weakref.ref(weight)
            if not captured():
                self._square = held
        return held[1]

    def gain(self, name: str) -> Tensor:
        """DoRA's factor a row [out], differentiable in the magnitude."""
        return self.lora_magnitude_vector[name].weight / self.norm(name)

    def _base_gain(self, gains: dict[str, Tensor], mode: Rows | None, x: Tensor, rows: int) -> Tensor:
        """Factor of the base product: 1 + Σ (g - 1), [out] or, where rows choose, [rows, out]."""
        names = tuple(gains)
        extra = torch.stack([gains[n] - 1 for n in names])
        if mode is None:
            return 1 + extra.sum(0)
        return 1 + mixed.summed(mode.mask(names, rows, x.device), extra)

    def _gained(self, name: str, gains: dict[str, Tensor]) -> Tensor:
        b = self.factors(name)[1]
        return (b * gains[name][:, None]).to(b.dtype) if name in gains else b

    # Merging.

    @torch.no_grad()
    def delta(self, name: str) -> Tensor:
        """scaling · B A, float32 [out, in]."""
        a, b = self.factors(name)
        with autocast_off(a.device):
            return self._scaling[name] * (b.float() @ a.float())

    @torch.no_grad()
    def merged_matrix(self, names: tuple[str, ...]) -> Tensor:
        """The float32 matrix that alone computes what base and adapters compute."""
        matrix = self.matrix()
        gains = {n: self.gain(n).float() for n in names if n in self.lora_magnitude_vector}
        out = matrix
        if gains:
            out = matrix * self._base_gain(gains, None, matrix, 0)[:, None]
        for name in names:
            delta = self.delta(name)
            out = out + (delta * gains[name][:, None] if name in gains else delta)
        return out

    @torch.inference_mode(False)  # what is merged may be trained over later
    @torch.no_grad()
    def merge(
        self,
        safe_merge: bool = False,
        adapter_names: Sequence[str] | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Add adapters (default: the active ones) into the base weight, with those that are merged already.

        The original weight is kept, not recomputed, for :meth:`unmerge`; all are added to it with one rounding.

        Args:
            safe_merge: refuse a result that is not finite as the base layer stores it.
            dtype: what the caller will cast the result to, where it must be finite too.

        Raises:
            ValueError: ``safe_merge`` and the result is not finite, an adapter has a bias and the base layer none, or
                that one's weight is computed; nothing is merged then.
        """
        held, asked = self.merged_adapters, self.active_adapters if adapter_names is None else adapter_names
        names = tuple(dict.fromkeys((*held, *(n for n in asked if n in self.r))))
        if len(names) == len(held) or not self.called:
            return
        self.unmerge()
        biases = [n for n in names if self._bias_of(n) is not None]
        if biases and self.bias is None:
            raise ValueError(f"adapters {biases} have lora_bias=True, but the base layer has no bias to merge it into")
        weight, bias, held = self.stored(self.merged_matrix(names)), None, self.bias
        if biases:
            added = sum(self._scaling[n] * self._bias_of(n).detach().float() for n in biases)
            bias = nn.Parameter((held.float() + added).to(held.dtype), requires_grad=False)
        if safe_merge:
            values = weight.dequantize(weight.dtype) if isinstance(weight, Packed4bit) else weight
            check_finite(names, (values, bias), dtype)
        # Before the exchange: an interrupt in between must find what there was.
        self._unmerged, self.merged_adapters = (self.stored_weight, held), list(names)
        self.exchange(weight)
        self._square = None
        if biases:
            self.base_layer.bias = bias
        self.bank.refresh_one(self)

    def unmerge(self) -> None:
        """The base weight of before :meth:`merge`, bit for bit (it was kept)."""
        if self._unmerged is not None:
            weight, bias = self._unmerged
            self.exchange(weight)
            if bias is not None:
                self.base_layer.bias = bias
            self._unmerged, self.merged_adapters = None, []
            self._square = None
            self._cache.clear()
            self.bank.refresh_one(self)

    def base_parameters(self) -> dict[str, nn.Parameter]:
        """The base layer's own, as they are without what is merged."""
        held = dict(self.base_layer.named_parameters())
        if self._unmerged is not None:
            kept = dict(zip(("weight", "bias"), self._unmerged, strict=True))
            held |= {name: t for name, t in kept.items() if isinstance(t, nn.Parameter)}
        return held

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What the adapter adds to the base weight, in the orientation in which the base layer stores it."""
        return self.as_stored(self.delta(adapter))

    def forget(self) -> None:
        """Keep nothing of what was made of adapters."""
        self._cache.clear()

    def _changed(self) -> None:
        """Parameters may be other objects now."""
        device = self.weight.device
        # On the meta device they have lost their values, and a loading that assigns gives the weight others.
        self._scale = {
            n: torch.full((len(t),), self._scaling[n], dtype=torch.float32, device=device)
            if t.is_meta
            else t.to(device)
            for n, t in self._scale.items()
        }
        self._cache.clear()
        self._square = None
        self.bank.refresh_one(self)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_cache": AdapterCache(), "_square": None}  # they are of this object's own tensors

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LoraLayer:
        super()._apply(fn, recurse)
        if self._unmerged is not None:
            weight, bias = self._unmerged
            self._unmerged = applied(weight, fn), applied(bias, fn)
        self._changed()  # not cast: scalings stay in float32
        return self
