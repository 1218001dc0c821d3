"""``trainable_token_indices``: where a LoRA adapter trains rows of an embedding, and of the head tied to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..adapters import AdapterBank
from ..formats import is_full_precision
from ..nn.ends import base_of, input_embedding
from ..nn.lora_layer import LoraLayer
from ..nn.modules_to_save import ModulesToSave
from ..nn.trainable_tokens import TokenRows, TrainableTokens
from .adapted import adapter_dtype
from .base import plain_number
from .modules import at, modules_of, put, says_tied

DELTA = "token_adapter.trainable_tokens_delta"
"""What PEFT calls the rows, behind the path of the module."""


class Place(NamedTuple):
    """One weight of which an adapter has rows.

    Attributes:
        indices: the tokens.
        layers: path → module for each that holds the weight; the first names the rows in files.
    """

    indices: list[int]
    layers: dict[str, nn.Module]

    @property
    def path(self) -> str:
        return next(iter(self.layers))


def checked_tokens(given: Any) -> list[int] | dict[str, list[int]] | None:
    """The argument ``trainable_token_indices``, as lists."""
    if given is None:
        return None
    if isinstance(given, Mapping):
        return {name: _checked(f"trainable_token_indices[{name!r}]", tokens) for name, tokens in given.items()}
    return _checked("trainable_token_indices", given)


def _checked(name: str, given: Any) -> list[int]:
    tokens = [plain_number(token) for token in given] if isinstance(given, (list, tuple, set, frozenset)) else []
    plain = all(isinstance(t, int) and not isinstance(t, bool) and t >= 0 for t in tokens)
    if not tokens or not plain or len(set(tokens)) < len(tokens):
        raise ValueError(f"{name} is {given!r}; it must be a list of token numbers, each once and at least one")
    return tokens


def find_places(given: list[int] | dict[str, list[int]] | None, model: nn.Module) -> list[Place]:
    """The weights that ``given``, a ``trainable_token_indices``, means in ``model``.

    As in PEFT a list is for the input embedding, and, where the model's configuration says that its ends are tied, what
    holds the embedding's weight has its rows too, unless rows of its own are asked for. Others that share a weight (the
    embeddings of T5's encoder and decoder, a head that is tied inside of a captioning model) do not share rows.

    Raises:
        ValueError: a name that no module's path ends with, a module without such rows, or a token it does not have.
    """
    if not given:
        return []
    modules = dict(modules_of(model, repeated=True))
    embedding = base_of(input_embedding(model))
    of_embedding = next((path for path, m in modules.items() if base_of(m) is embedding), "embed_tokens")
    asked: dict[str, list[int]] = {}
    for name, tokens in given.items() if isinstance(given, dict) else [(of_embedding, given)]:
        paths = [path for path in modules if path.endswith(name)]
        if not paths:
            raise ValueError(f"trainable_token_indices names {name!r}, with which no module of the model ends")
        asked |= dict.fromkeys(paths, tokens)
    places: list[Place] = []
    for path in sorted(asked, key=lambda p: p != of_embedding):
        tokens, module = asked[path], modules[path]
        weight = _weight_of(path, module)
        if max(tokens) >= len(weight):
            raise ValueError(f"trainable_token_indices holds {max(tokens)}; {path!r} has {len(weight)} tokens")
        same = next((p for p in places if p.indices == tokens and _shares(p, of_embedding, module, weight)), None)
        if same:
            same.layers[path] = module
        else:
            places.append(Place(tokens, {path: module}))
    first = places[0]
    weight, *others = (_weight_of(place.path, modules[place.path]) for place in places)
    if says_tied(model) and first.path == of_embedding and not any(other is weight for other in others):
        tied = [path for path, m in modules.items() if getattr(_held(m), "weight", None) is weight]
        first.layers.update({path: modules[path] for path in tied if _weight_of(path, modules[path]) is weight})
    return places


def _shares(place: Place, of_embedding: str, module: nn.Module, weight: Tensor) -> bool:
    """Whether ``module`` with ``weight`` has the rows of ``place``."""
    first = place.layers[place.path]
    return base_of(first) is base_of(module) or (place.path == of_embedding and _weight_of(place.path, first) is weight)


def _held(module: nn.Module) -> nn.Module:
    return module.original_module if isinstance(module, ModulesToSave) else base_of(module)


def _weight_of(path: str, module: nn.Module) -> Tensor:
    base = base_of(module)
    weight = getattr(base, "weight", None)
    fits = isinstance(base, (nn.Embedding, nn.Linear)) and is_full_precision(weight.dtype)
    if not fits or getattr(base, "max_norm", None) is not None:
        raise ValueError(
            f"trainable_token_indices means {path!r}, a {type(base).__name__}; it must be an Embedding without "
            "max_norm or a Linear in full precision, and not be in modules_to_save"
        )
    return weight


def put_tokens(model: nn.Module, bank: AdapterBank, name: str, place: Place, autocast_adapter_dtype: bool) -> None:
    """Attach an adapter's rows of a weight."""
    rows = bank.tokens.get(place.path)
    if rows is None or rows.layers.keys() != place.layers.keys():
        for path, module in place.layers.items():
            if isinstance(module, (LoraLayer, TrainableTokens)):
                kind = "LoRA" if isinstance(module, LoraLayer) else "rows of another adapter"
                raise ValueError(
                    f"trainable_token_indices means {path!r}, which carries {kind}; it can carry one of the two"
                )
        rows = bank.tokens[place.path] = TokenRows(place.layers, bank)
        for path, module in place.layers.items():
            put(model, path, TrainableTokens(module, rows, bank).train(module.training))
        bank.forget()
    dtype = adapter_dtype(next(iter(rows.layers.values())), autocast_adapter_dtype)
    rows.add_adapter(name, place.indices, dtype)


def take_tokens(model: nn.Module, bank: AdapterBank, name: str | None = None) -> None:
    """Take an adapter's rows out, or (None) those of all."""
    for path, rows in list(bank.tokens.items()):
        if name is not None:
            rows.remove_adapter(name)
        if name is None or not rows.indices:
            for where, layer in rows.layers.items():
                if getattr(at(model, where), "rows", None) is rows:
                    put(model, where, layer)
            del bank.tokens[path]
    bank.forget()
