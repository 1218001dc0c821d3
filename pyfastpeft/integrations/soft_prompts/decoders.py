"""What a model consists of, as far as soft prompts need it, and which causal ones can take a prefix."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedModel

from ...nn.ends import output_head

_UNLIKE = {
    "kv_lora_rank": "keeps keys and values compressed",
    "lambda_std_dev": "attends twice, each time to half of the values",
    "keep_window_size": "chooses its keys by their values",
    "kv_channels": "repeats its keys and values for each expert of a token",
}
"""What a causal model that has this in its configuration does, so that a prefix is not to it what tokens are."""

_ATTENTION = {"attention", "full_attention", "sliding_attention", "chunked_attention"}
"""The kinds of layers, as configurations call them, to which a token is one key and one value."""


class KeyValueShape(NamedTuple):
    """Of a model: how many layers, key/value heads a layer, and the size of a head."""

    layers: int
    heads: int
    dim: int

    @staticmethod
    def of(config: Any) -> KeyValueShape:
        queries = config.num_attention_heads
        width = getattr(config, "true_hidden_size", config.hidden_size)  # MobileBERT's layers are narrower inside
        dim = getattr(config, "d_kv", None) or getattr(config, "head_dim", None) or width // queries
        return KeyValueShape(config.num_hidden_layers, getattr(config, "num_key_value_heads", None) or queries, dim)

    @staticmethod
    def of_decoder(decoder: nn.Module, kind: str) -> KeyValueShape:
        """Of all layers of ``decoder``, which a ``kind`` has.

        Raises:
            ValueError: they differ.
        """
        shapes = set(map(KeyValueShape.of, layer_configs(decoder.config)))
        if len(shapes) > 1:
            raise ValueError(f"the layers of a {kind} have heads of different sizes or numbers; soft prompts need one")
        return shapes.pop()


def attentions_in(model: nn.Module) -> list[nn.Module]:
    """The attention modules of ``model``, which say of themselves whether they are causal."""
    return [m for m in model.modules() if isinstance(vars(m).get("is_causal"), bool)]


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether ``model`` has the decoder of an encoder–decoder: an encoder that stands alone may have the configuration
    of both (UMT5EncoderModel, BartEncoder)."""
    if not model.config.is_encoder_decoder:
        return False
    encoder, decoder = model.get_encoder(), model.get_decoder()
    beside = all(module is not encoder for module in decoder.modules())
    return beside or any(module.is_causal for module in attentions_in(decoder))


def text_config(config: Any, seq2seq: bool) -> Any:
    """What ``config`` says of the text's layers, which are the decoder's, but for an encoder that stands alone with the
    configuration of both."""
    alone = config.is_encoder_decoder and not seq2seq
    return config.get_text_config(encoder=True) if alone else config.get_text_config(decoder=True)


def layer_configs(config: Any) -> Sequence[Any]:
    """The configuration of each layer, or the one of all: where layers differ, ``config`` does not say in what."""
    return config.per_layer_config if getattr(config, "is_heterogeneous", False) else (config,)


def decoder_of(model: nn.Module) -> nn.Module:
    """The module of ``model`` between embedding and head.

    Raises:
        ValueError: a prefix is not to it what tokens are; says why.
    """
    decoder, kind = _without_head(model), type(model).__name__
    config = config_of(decoder, kind)
    for name, does in _UNLIKE.items():
        if getattr(config, name, None):
            raise ValueError(f"a {kind} {does}, so it cannot take a prefix")
    layer_types = set(getattr(config, "layer_types", None) or ())
    if others := ", ".join(sorted(layer_types - _ATTENTION)):
        raise ValueError(
            f"a {kind} has layers of other kinds than full, sliding or chunked attention ({others}), so it cannot take "
            "a prefix"
        )
    if getattr(config, "n_recurrent_loops", 1) > 1:
        raise ValueError(f"a {kind} runs its layers several times, so it cannot take a prefix")
    if getattr(layer_configs(config)[0], "num_attention_heads", None) is None:  # RWKV carries a state instead
        raise ValueError(f"the {type(config).__name__} of a {kind} has no num_attention_heads: it cannot take a prefix")
    return decoder


def config_of(decoder: nn.Module, kind: str) -> Any:
    """The configuration of ``decoder``, which a ``kind`` has.

    Raises:
        ValueError: it has none.
    """
    config = getattr(decoder, "config", None)
    if config is None:
        raise ValueError(
            f"{kind}.get_decoder() returned a {type(decoder).__name__}, which has no config; soft prompts need a "
            "transformers decoder there"
        )
    return config


def _without_head(model: nn.Module) -> nn.Module:
    """The decoder of ``model`` without a head: some models call one that has its head a decoder."""
    decoder = model.get_decoder()
    if output_head(decoder) is None:
        return decoder
    # OPT's calls not what is directly in it, but the decoder in that, which it names.
    if isinstance(decoder, PreTrainedModel) and output_head(inner := decoder.get_decoder()) is None:
        return inner
    return next((module for module in decoder.children() if isinstance(module, PreTrainedModel)), decoder)


def attentions_of(decoder: nn.Module) -> tuple[list[nn.Module], list[nn.Module]]:
    """The attention module of each layer, and the layer around each."""
    found = {}
    for path, module in decoder.named_modules():
        if _attends_to_text(module) and not any(map(_attends_to_text, module.children())):
            found.setdefault(module.layer_idx, (path, module))
    count = getattr(decoder.config, "decoder_layers", decoder.config.num_hidden_layers)  # BART's counts the encoder's
    if sorted(found) != list(range(count)):
        raise ValueError(
            f"a {type(decoder).__name__} has self-attention in {len(found)} of its {count} layers; soft prompts need "
            "it in every layer"
        )
    paths, attentions = zip(*(found[i] for i in range(count)), strict=True)
    return list(attentions), [block_of(decoder, path) for path in paths]


def _attends_to_text(module: nn.Module) -> bool:
    """By its name, as a layer may be called as well for what is in it: what has such modules in it is none itself."""
    name = type(module).__name__
    return hasattr(module, "layer_idx") and "Attention" in name and "CrossAttention" not in name


def owners_of(attentions: Sequence[nn.Module]) -> Iterator[int]:
    """For each layer the one whose keys and values it uses: its own, or the last of its kind that makes any."""
    owners: dict[str | None, int] = {}
    for i, module in enumerate(attentions):
        if not getattr(module, "is_kv_shared_layer", False):
            owners[getattr(module, "layer_type", None)] = i
        yield owners[getattr(module, "layer_type", None)]


def block_of(stack: nn.Module, path: str) -> nn.Module:
    """The layer of ``stack`` that the module at ``path`` is in: the outermost member of a list."""
    parts = path.split(".")
    end = next(i for i, part in enumerate(parts) if part.isdigit())
    return stack.get_submodule(".".join(parts[: end + 1]))
