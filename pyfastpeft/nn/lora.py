"""Linear, Conv1D and Embedding layers with LoRA adapters beside them.

    y = M x + bias + Σ scaling_i · B_i A_i dropout(x)

M is the layer's matrix [out, in] whatever the module stores. With DoRA (Liu et al. 2024), as PEFT has it,

    y = M x + bias + (g - 1) ∘ M dropout(x) + g ∘ scaling · B A dropout(x)

with ``g = magnitude / ||M + scaling · B A||`` a row, the norm detached; several adapters add up their differences from
the base.

Over a :class:`Linear4bit` the base product and the branch are one call of ``ops.linear_4bit``; over full precision the
branch of one adapter is ``ops.add_lora``. Whatever else is added there (several adapters, DoRA, biases) is plain torch
with PEFT's dtypes: x is cast to the adapter's, the result returns in the base layer's. A :class:`Linear4bit` with hooks
is taken as one in full precision: they see and change its own product alone. Several adapters run stacked along the
rank, also when each row of the batch has its own.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapters import AdapterBank, Rows
from ..formats import Packed4bit, is_full_precision, quantize_4bit
from ..ops import add_lora, linear_4bit, mixed
from ..ops.tracing import is_compiling, is_repeated
from .hooks import hooked
from .linear4bit import Linear4bit
from .lora_layer import Factor, LoraLayer, dropout_rate


class LoraLinear(LoraLayer):
    """LoRA on ``nn.Linear`` and :class:`Linear4bit`."""

    def __init__(self, base_layer: nn.Module, bank: AdapterBank) -> None:
        super().__init__(base_layer, bank)
        self.in_features, self.out_features = matrix_shape(base_layer)[::-1]

    @property
    def _fused(self) -> bool:
        return isinstance(self._modules["base_layer"], Linear4bit)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output for ``x`` [..., K], [..., N] in its dtype, and the updates of the adapters in use."""
        mode, plan = self.bank.mode, self._plan
        if mode is not None:
            names = self.present(mode)
            if names and mode.mixes:
                return self._general(x, names, mode, args, kwargs)
            plan = self.plan(names)  # as if they were active
        if plan is None:
            return self.base_layer(x, *args, **kwargs)
        if not plan.simple:
            return self._general(x, plan.names, None, args, kwargs)
        try:
            a, b, bias = plan.a["weight"], plan.b["weight"], plan.b["bias"]
        except KeyError:  # they are computed from other parameters
            a, b = self.factors(plan.names[0])
            bias = self._bias_of(plan.names[0])
        repeated = is_repeated()
        scaling = plan.scale if repeated else plan.scaling
        dropout = dropout_rate(plan.dropout)
        if dropout and plan.magnitude is not None:
            return self._general(x, plan.names, None, args, kwargs)
        base_layer = self._modules["base_layer"]  # past nn.Module.__getattr__: this is the path of every token
        if isinstance(base_layer, Linear4bit) and not hooked(base_layer):
            y = base_layer(x, self.branch(x.dtype, plan.names, a, b, scaling, dropout))
            if plan.magnitude is None and bias is None:
                return y
            dtype = y.dtype
            if plan.magnitude is not None:
                y = self._scaled_without_bias(y, self._plan_gain(plan, a, b))
        else:
            y = base_layer(x, *args, **kwargs)
            dtype = y.dtype
            factor = scaling[0] if repeated else scaling
            if plan.magnitude is None:
                y = add_lora(y, x, a, b, factor, dropout)
            else:
                added = F.linear(F.linear(x.to(a.dtype), a), b) * factor
                gain = self._plan_gain(plan, a, b)
                y = self._scaled_without_bias(y, gain) + added * gain
        if bias is not None:
            y = y + bias * (scaling[0] if repeated else scaling)
        return y.to(dtype)

    def _general(self, x: Tensor, names: tuple[str, ...], mode: Rows | None, args: tuple, kwargs: dict) -> Tensor:
        """Several adapters, or rows that choose."""
        if mode is not None:
            mode.check_lead(x, 3)
        rows = x.numel() // self.in_features
        gains = {n: self.gain(n) for n in names if n in self.lora_magnitude_vector}
        groups: dict[float, tuple[str, ...]] = {}
        for name in names:
            dropout = dropout_rate(self.lora_dropout[name])
            groups[dropout] = (*groups.get(dropout, ()), name)

        if self._fused and len(groups) == 1 and not gains and not hooked(self.base_layer):
            a, b, scale = self.stacked(names, mode, rows)
            y = self.base_layer(x, self.branch(x.dtype, names, a, b, scale, next(iter(groups))))
            dtype = y.dtype
        else:
            y = self.base_layer(x, *args, **kwargs)
            dtype, bare = y.dtype, y if self.bias is None or not gains else y - self.bias
            for dropout, group in groups.items():
                a, b, scale = self.stacked(group, mode, rows)
                h = F.dropout(x.to(a.dtype), dropout) if dropout else x.to(a.dtype)
                if scaled := {n: gains[n] for n in group if n in gains}:
                    b = torch.cat([self._gained(n, gains) for n in group], dim=1)
                    extra = self._base_gain(scaled, mode, x, rows) - 1
                    product = self._base_product(h.to(x.dtype)) if dropout else bare
                    y = y + (extra if mode is None else extra.view_as(product)) * product
                if mode is None:
                    h = F.linear(h, a)
                    y = y + F.linear(h * scale.to(h.dtype), b)
                else:
                    y = y + mixed.added(mixed.projected(h, a), scale, b)
        return self._with_biases(y, names, mode, x, rows).to(dtype)

    def _base_product(self, x: Tensor) -> Tensor:
        """M x."""
        return self.base_layer.product(x) if self._fused else F.linear(x, self._dense_weight())

    def _scaled_without_bias(self, y: Tensor, factor: Tensor) -> Tensor:
        bias = self.bias
        return y * factor if bias is None else (y - bias) * factor + bias

    def _with_biases(self, y: Tensor, names: tuple[str, ...], mode: Rows | None, x: Tensor, rows: int) -> Tensor:
        held = {n: self._bias_of(n) for n in names if self._bias_of(n) is not None}
        if not held:
            return y
        scaled = torch.stack([bias * self._scale[n][0] for n, bias in held.items()])
        if mode is None:
            return y + scaled.sum(0)
        chosen = mode.mask(tuple(held), rows, x.device)
        return y + mixed.summed(chosen, scaled).view_as(y)

    def matrix(self) -> Tensor:
        if self._fused:
            return self.base_layer.dequantize(torch.float32)
        return self._dense_weight().detach().float()

    def _dense_weight(self) -> Tensor:
        weight = self.base_layer.weight
        if not is_full_precision(weight.dtype) or weight.shape != (self.out_features, self.in_features):
            raise TypeError(
                f"the base layer is a {type(self.base_layer).__name__} whose weight is {weight.dtype} of shape "
                f"{tuple(weight.shape)}; merging, DoRA and initial values from the weight need it in full "
                "precision or this library's Linear4bit"
            )
        return weight

    def stored(self, matrix: Tensor) -> nn.Parameter | Packed4bit:
        if not self._fused:
            return super().stored(matrix)
        base = self.base_layer
        packed = quantize_4bit(matrix, base.quant_type, base.blocksize, base.double_quant)
        return replace(packed, dtype=base.packed.dtype)

    @property
    def stored_weight(self) -> Any:
        return self.base_layer.packed if self._fused else super().stored_weight

    def exchange(self, stored: Any) -> None:
        if isinstance(stored, Linear4bit):
            self.base_layer = stored
        elif self._fused:
            self.base_layer.set_packed(stored)
        else:
            super().exchange(stored)

    @torch.inference_mode(False)
    @torch.no_grad()
    def merge_dense(self, names: tuple[str, ...], safe: bool, dtype: torch.dtype | None) -> None:
        """:meth:`merge`, with the 4-bit base layer exchanged for one in ``dtype`` (default: the one it was quantized
        from), rounded once."""
        names = (*self.merged_adapters, *names)
        self.unmerge()
        packed = self.base_layer
        dtype = packed.original_dtype if dtype is None else dtype
        dense = packed.to_linear(torch.float32)
        try:
            self.base_layer = dense
            self.merge(safe, names, dtype)
        finally:
            self._unmerged = packed, packed.bias
        self.base_layer.to(dtype)

    def times(self, a: Tensor) -> Tensor:
        if self._fused:
            return linear_4bit(a.float(), self.base_layer.packed).t()
        weight = self._dense_weight()
        return F.linear(a.to(weight.dtype), weight).float().t()


class LoraConv1D(LoraLinear):
    """LoRA on transformers' ``Conv1D``, which stores its weight as [in, out]."""

    def _dense_weight(self) -> Tensor:
        return self.base_layer.weight.t()

    def as_stored(self, matrix: Tensor) -> Tensor:
        return matrix.t()


class LoraEmbedding(LoraLayer):
    """LoRA on ``nn.Embedding``: M is the table transposed, [embedding_dim, num_embeddings].

    A starts at zero and B normal, so the first update moves only the rows of tokens that were seen.
    """

    KEYS = ("lora_embedding_A", "lora_embedding_B")

    def __init__(self, base_layer: nn.Embedding, bank: AdapterBank) -> None:
        super().__init__(base_layer, bank)
        self.in_features, self.out_features = base_layer.num_embeddings, base_layer.embedding_dim
        self.lora_embedding_A = nn.ParameterDict()
        self.lora_embedding_B = nn.ParameterDict()

    @property
    def bias(self) -> None:
        return None

    @property
    def embedding_dim(self) -> int:
        return self.out_features

    @property
    def num_embeddings(self) -> int:
        return self.in_features

    @property
    def padding_idx(self) -> int | None:
        return self.base_layer.padding_idx

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        return self.lora_embedding_A[name], self.lora_embedding_B[name]

    def _draw(self, r: int, lora_bias: bool, initial: Any, empty: bool) -> tuple[Factor, Factor]:
        if lora_bias:
            raise ValueError("lora_bias is True; an embedding has no place for a bias, leave it out of target_modules")
        make = torch.empty if empty else torch.randn
        a, b = make(r, self.in_features), make(self.out_features, r)
        if initial is not False and not empty:
            nn.init.zeros_(a)
            nn.init.normal_(b)
        return a, b

    def _hold(self, name: str, a: Factor, b: Factor) -> None:
        self.lora_embedding_A[name], self.lora_embedding_B[name] = nn.Parameter(a), nn.Parameter(b)

    def remove_adapter(self, name: str) -> None:
        super().remove_adapter(name)
        for holder in (self.lora_embedding_A, self.lora_embedding_B):
            if name in holder:
                del holder[name]

    def _holders(self, name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        a, b = self.factors(name)
        return {"weight": a}, {"weight": b}

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's rows for the tokens ``x``, [..., embedding_dim], and the updates of the adapters in use."""
        mode, plan = self.bank.mode, self._plan
        y = self.base_layer(x, *args, **kwargs)
        dtype = y.dtype
        if mode is None:
            if plan is None:
                return y
            if plan.simple:
                # Compiled code reads the plan, whose dictionaries it guards; they are copies here.
                a, b = (plan.a["weight"], plan.b["weight"]) if is_compiling() else self.factors(plan.names[0])
                added = self._looked_up(x, a) * (plan.scale[0] if is_repeated() else plan.scaling)
                added = as_output(self.base_layer, F.linear(added, b))
                if plan.magnitude is not None:
                    gain = self._plan_gain(plan, a, b)
                    return (y * gain + added * gain).to(dtype)
                return (y + added).to(dtype)
        names = plan.names if mode is None else self.present(mode)
        if not names:
            return y
        if mode is not None:
            mode.check_lead(x, 2)
        rows = x.numel()
        gains = {n: self.gain(n) for n in names if n in self.lora_magnitude_vector}
        a, b, scale = self.stacked(names, mode, rows)
        if gains:
            factor = self._base_gain(gains, mode, x, rows)
            y = y * (factor if mode is None else factor.view_as(y))
            b = torch.cat([self._gained(n, gains) for n in names], dim=1)
        h = self._looked_up(x, a)
        added = F.linear(h * scale.to(h.dtype), b) if mode is None else mixed.added(h, scale, b)
        return (y + as_output(self.base_layer, added)).to(dtype)

    def _looked_up(self, ids: Tensor, a: Tensor) -> Tensor:
        """Column of A for every id, [..., r]."""
        base = self.base_layer
        return F.embedding(ids, a.t(), base.padding_idx, scale_grad_by_freq=base.scale_grad_by_freq, sparse=base.sparse)

    def matrix(self) -> Tensor:
        return self.base_layer.weight.detach().float().t()

    def as_stored(self, matrix: Tensor) -> Tensor:
        return matrix.t()

    def times(self, a: Tensor) -> Tensor:
        weight = self.weight.detach()
        return (a.to(weight.dtype) @ weight).float().t()


def as_output(embedding: nn.Embedding, rows: Tensor) -> Tensor:
    """``rows`` as the embedding would give them: some (Gemma 3) multiply their output."""
    scale = getattr(embedding, "embed_scale", None)
    return rows if scale is None else rows * torch.as_tensor(scale, dtype=rows.dtype, device=rows.device)


def matrix_shape(module: nn.Module) -> tuple[int, int]:
    """(out, in) of a module that can carry LoRA."""
    if isinstance(module, nn.Embedding):
        return module.embedding_dim, module.num_embeddings
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    n_in, n_out = module.weight.shape
    return n_out, n_in


_NO_PRODUCT = re.compile("Router|Grouped|DoryLMHead")
"""In the names of subclasses of ``nn.Linear`` that return no product: Llama 4's and PhiMoE's routers choose experts,
DeepSeek-V4's layers multiply each group by its own part of the weight, Dory's head scales what it returns."""


_LOOKUP = re.compile(r"Embedding(4bit|8bit)?|.*ScaledWordEmbedding")
"""Names of the embeddings, bitsandbytes' among them, that return the rows they are called with, times their
``embed_scale`` if they have one. Others count positions by themselves, norm what they return, or hold further rows."""


def _looks_up(embedding: nn.Embedding) -> bool:
    if embedding.max_norm is not None:  # which bounds the rows before an update is added, and merged ones after it
        return False
    forward_of = next(kind for kind in type(embedding).__mro__ if "forward" in vars(kind))
    return _LOOKUP.fullmatch(forward_of.__name__) is not None


def layer_class(module: nn.Module) -> type[LoraLayer] | None:
    """The layer that carries LoRA for ``module``, or None where there is none."""
    if isinstance(module, nn.Embedding):
        return LoraEmbedding if _looks_up(module) else None
    if isinstance(module, nn.Linear):
        return None if _NO_PRODUCT.search(type(module).__name__) else LoraLinear
    if type(module).__name__ == "Conv1D" and not isinstance(module, nn.Conv1d):
        return LoraConv1D
    return None


def is_linear(module: nn.Module) -> bool:
    """Whether it can carry LoRA and multiplies by a matrix, as an embedding does not."""
    return layer_class(module) in (LoraLinear, LoraConv1D)


def expected_tensors(module: nn.Module, r: int, use_dora: bool, lora_bias: bool) -> dict[str, tuple[int, ...]]:
    """Suffix → shape of the tensors a file must hold for an adapter of rank ``r`` on ``module``."""
    n_out, n_in = matrix_shape(module)
    shapes: dict[str, tuple[int, ...]] = dict(zip(layer_class(module).KEYS, ((r, n_in), (n_out, r)), strict=True))
    if lora_bias and not isinstance(module, nn.Embedding):
        shapes["lora_B.bias"] = (n_out,)
    if use_dora:
        shapes["lora_magnitude_vector"] = (n_out,)
    return shapes
