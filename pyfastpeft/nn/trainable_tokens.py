"""Rows of an embedding, and of the head tied to it, that adapters train while the rest stays as it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapters import AdapterBank, Rows
from ..ops import mixed
from ..ops.dense import dense_linear
from .lora import as_output
from .lora_layer import applied, check_finite, check_own_weight


class TokenRows:
    """The rows that adapters have of one weight [tokens, dim].

    Attributes:
        layers: path → module for each that holds the weight.
        values: by adapter [n, dim], what stands in the place of the weight's rows (no difference to them).
        indices: by adapter int64 [n], the tokens they belong to.
        slots: by adapter int64 [tokens], where in ``values`` a token is; -1: nowhere.
        merged_adapters: the adapters whose rows are in the weight at the moment.
    """

    def __init__(self, layers: Mapping[str, nn.Embedding | nn.Linear], bank: AdapterBank) -> None:
        self.layers, self.bank = dict(layers), bank
        self.values = nn.ParameterDict()
        self.indices: dict[str, Tensor] = {}
        self.slots: dict[str, Tensor] = {}
        self.merged_adapters: list[str] = []
        self._unmerged: nn.Parameter | None = None
        self._plan: tuple[str, ...] = ()

    @property
    def weight(self) -> nn.Parameter:
        return next(iter(self.layers.values())).weight

    @property
    def merged(self) -> bool:
        return bool(self.merged_adapters)

    def add_adapter(self, name: str, indices: list[int], dtype: torch.dtype) -> None:
        """Rows for an adapter, with the values of the weight as it is without any."""
        weight = self.weight if self._unmerged is None else self._unmerged
        device = "cpu" if weight.is_meta else weight.device
        self.indices[name] = torch.tensor(indices, device=device)
        self.slots[name] = torch.full((len(weight),), -1, device=device)
        self.slots[name][self.indices[name]] = torch.arange(len(indices), device=device)
        self.values[name] = nn.Parameter(weight.detach()[self.indices[name].to(weight.device)].to(dtype))

    def remove_adapter(self, name: str) -> None:
        for held in (self.indices, self.slots, self.values):
            if name in held:
                del held[name]

    def follow(self) -> None:
        """Go to the weight's device, with the weight of before merging, which takes its dtype too. Not to the meta
        device, where the values would be lost."""
        weight = self.weight
        if weight.is_meta:
            return
        for held in (self.indices, self.slots):
            held.update({name: t.to(weight.device) for name, t in held.items()})
        self._unmerged = applied(self._unmerged, lambda t: t.to(weight))

    def plan(self, active: tuple[str, ...]) -> tuple[str, ...]:
        """The adapters whose rows are in use while ``active`` are the adapters."""
        names = self._apart(active)
        return () if self.merged else names

    def present(self, mode: Rows) -> tuple[str, ...]:
        """The adapters that the rows of a batch choose among and that have rows here."""
        for names in set(mode.of_row):
            self._apart(names)
        return tuple(n for n in mode.names if n in self.indices)

    def _apart(self, names: Sequence[str]) -> tuple[str, ...]:
        """Those of ``names`` that have rows here, none of the same token."""
        names = tuple(n for n in names if n in self.indices)
        if len(names) > 1:
            tokens, counts = torch.cat([self.indices[n] for n in names]).unique(return_counts=True)
            if bool((counts > 1).any()):
                raise ValueError(
                    f"adapters {list(names)} each bring their own rows for the tokens {tokens[counts > 1].tolist()}; "
                    "only one of them can be in use"
                )
        return names

    def replaced(self, names: Sequence[str]) -> Tensor:
        """The weight with the rows of ``names`` in it; differentiable in these."""
        weight: Tensor = self.weight
        for name in names:
            weight = weight.index_copy(0, self.indices[name].to(weight.device), self.values[name].to(weight))
        return weight

    @torch.inference_mode(False)
    @torch.no_grad()
    def merge(self, safe_merge: bool, adapter_names: Sequence[str], dtype: torch.dtype | None = None) -> None:
        """Put rows into the weight, beside those that are merged already; :meth:`LoraLayer.merge` has the rest."""
        held = self.merged_adapters
        names = self._apart(tuple(dict.fromkeys((*held, *adapter_names))))
        if len(names) == len(held):
            return
        self.unmerge()
        for layer in self.layers.values():
            check_own_weight(layer)
        if safe_merge:
            check_finite(names, (self.values[n].to(self.weight) for n in names), dtype)
        self._unmerged, self.merged_adapters = self.weight, list(names)
        self._hold(nn.Parameter(self.replaced(names), requires_grad=self.weight.requires_grad))
        self.bank.refresh_one(self)

    def unmerge(self) -> None:
        """The weight of before :meth:`merge`."""
        if self._unmerged is not None:
            self._hold(self._unmerged)
            self._unmerged, self.merged_adapters = None, []
            self.bank.refresh_one(self)

    def _hold(self, weight: nn.Parameter) -> None:
        for layer in self.layers.values():
            layer.weight = weight


class TrainableTokens(nn.Module):
    """A layer around an embedding or a linear layer, of whose weight adapters have rows (:class:`TokenRows`)."""

    def __init__(self, base_layer: nn.Embedding | nn.Linear, rows: TokenRows, bank: AdapterBank) -> None:
        super().__init__()
        # As in PEFT, whose names the parameters have.
        self.token_adapter = nn.ModuleDict({"base_layer": base_layer, "trainable_tokens_delta": rows.values})
        self.rows, self.bank = rows, bank

    @property
    def base_layer(self) -> nn.Embedding | nn.Linear:
        return self.token_adapter["base_layer"]

    def base_parameters(self) -> dict[str, nn.Parameter]:
        """The base layer's own, as they are without what is merged."""
        held = dict(self.base_layer.named_parameters())
        return held if self.rows._unmerged is None else held | {"weight": self.rows._unmerged}

    @property
    def weight(self) -> Tensor:
        """With the rows in use in it, for models that multiply by it themselves.

        Where the rows of a batch differ in these it is the base's: most models that read it then ask for its dtype.
        """
        mode, names = self.bank.mode, self._in_use()
        return self.base_layer.weight if mode is not None and mode.differing(names) else self.rows.replaced(names)

    def _in_use(self) -> tuple[str, ...]:
        """The adapters whose rows are in use, by some rows of the batch at least."""
        mode = self.bank.mode
        return self.rows._plan if mode is None else self.rows.present(mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        mode, names = self.bank.mode, self._in_use()
        y = self.base_layer(x, *args, **kwargs)
        put = self._looked_up if isinstance(self.base_layer, nn.Embedding) else self._multiplied
        for i, name in enumerate(names):
            chosen = None
            if mode is not None:
                chosen = mode.mask(names, x.shape[0], x.device)[:, i].bool()
                chosen = chosen.view(-1, *[1] * (y.dim() - 1))
            y = put(y, x, name, chosen)
        return y

    def _looked_up(self, y: Tensor, ids: Tensor, name: str, chosen: Tensor | None) -> Tensor:
        base, slot = self.base_layer, self.rows.slots[name].to(ids.device)[ids]
        own = as_output(base, F.embedding(slot.clamp_min(0), self.rows.values[name].to(base.weight)))
        if base.padding_idx is not None:  # whose row gets no gradient from here
            own = torch.where((ids == base.padding_idx).unsqueeze(-1), own.detach(), own)
        mine = (slot >= 0).unsqueeze(-1)
        return torch.where(mine if chosen is None else mine & chosen, own.to(y.dtype), y)

    def _multiplied(self, y: Tensor, x: Tensor, name: str, chosen: Tensor | None) -> Tensor:
        base, indices = self.base_layer, self.rows.indices[name].to(x.device)
        if chosen is not None:
            # Else inf and NaN in other rows reach the gradient, as zero times them is NaN.
            x = mixed.zero_unless(chosen, x)
        bias = None if base.bias is None else base.bias[indices]
        own = dense_linear(x, self.rows.values[name].to(base.weight), bias).to(y.dtype)
        if chosen is not None:
            own = torch.where(chosen, own, y.index_select(-1, indices))
        return y.index_copy(-1, indices, own)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TrainableTokens:
        super()._apply(fn, recurse)
        self.rows.follow()
        self.bank.forget()
        return self

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("token_adapter", "rows", "bank"):
                raise
            return getattr(self.base_layer, name)
