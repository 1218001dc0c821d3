"""Layers whose weight the module around them reads, past the layer, in transformers' and torch's models; and those that
it has in a list of its own and calls there, past what is put in their place."""

from __future__ import annotations

import re

from torch import nn

_RELATIVE = ("rel_pos_bias", "rel_pos_x_bias", "rel_pos_y_bias")
_UNCALLED = {
    "WavLMAttention": ("q_proj", "k_proj", "v_proj", "out_proj"),
    "MobileBertLMPredictionHead": ("dense",),
    "NeoMMEForMaskedLM": ("unembedding_projection",),
    "TDNNLayer": ("kernel",),
    "LayoutLMv2Encoder": _RELATIVE,
    "LayoutLMv3Encoder": _RELATIVE,
    "PPDocLayoutV2ReadingOrderEncoder": _RELATIVE,
    "DetrMHAttentionMap": ("k_proj",),
    "ConditionalDetrMHAttentionMap": ("k_proj",),
    "LongcatFlashTopkRouter": ("classifier",),
    "BloomAttention": ("dense",),
    "BloomMLP": ("dense_4h_to_h",),
}
"""Class of the module around them → layers that it takes the weights of and never calls."""
_MIXER = re.compile("Mamba|Bamba|FalconH1")
"""In the names of the classes of Mamba's mixers, which multiply by the weight of ``dt_proj``, and in their fused kernel
by that of ``out_proj``."""
_READ = (
    *("dt_proj", "wo", "patch_embedding", "weights_proj"),
    *("project_q", "embedding_proj_layer", "audio_prompt_proj", "audio_latent_proj"),
)
"""Layers of Mamba's mixers; and of T5's relatives, SigLIP 2, the indexers of sparse attention, Wav2Vec2's pretraining,
and the relatives of ColPali and Pocket TTS, which bring what they call these with to the dtype of their weight."""
_READ_BY = {
    "Blip2ForImageTextRetrieval": ("vision_projection", "text_projection", "itm_head"),
    "Blip2TextModelWithProjection": ("text_projection",),
    "Blip2VisionModelWithProjection": ("vision_projection",),
    "Ernie4_5_VLMoePatchEmbed": ("proj",),
    "EsmFold2AtomEncoder": ("atom_linear",),
    "EsmFold2ConfidenceHead": ("pae_head",),
    "EsmFold2DiffusionConditioning": ("pair_proj", "noise_proj"),
    "EsmFold2DiffusionModule": ("coords_linear",),
    "EsmFold2InputEmbedder": ("token_bonds",),
    "EsmFold2LanguageModelEncoder": ("pair_proj",),
    "EsmFold2MSAEncoder": ("embed",),
    "EsmFold2Model": ("distogram_head",),
    "EsmFold2RelativePositionEncoding": ("embed",),
    "FalconMambaForCausalLM": ("lm_head",),
    "Gemma4AssistantForCausalLM": ("lm_head",),
    "Gemma4UnifiedAssistantForCausalLM": ("lm_head",),
    "Gemma3nTextAltUp": ("prediction_coefs", "correction_coefs"),
    "GraniteSpeech5Encoder": ("input_linear",),
    "HYV4ForCausalLM": ("lm_head",),
    "HYV4VLForConditionalGeneration": ("lm_head",),
    "Inkling2LoopMessageGate": ("down_proj",),
    "JevForDecision": ("proj",),
    "LSHSelfAttention": ("query_key", "value"),
    "Mamba2ForCausalLM": ("lm_head",),
    "MambaForCausalLM": ("lm_head",),
    "NeoMMEMultiVectorHead": ("proj",),
    "RwkvSelfAttention": ("output",),
    "RwkvFeedForward": ("value",),
    "xLSTMForCausalLM": ("lm_head",),
}
"""Class of the module around them → layers that it calls, and reads the weights of or writes them: Gemma 3n clips them,
RWKV divides them, Reformer multiplies by them where it generates, Gemma 4's assistants where they order their tokens,
and the others take their dtype."""

_READ_WITHIN = {"continuous_position_bias_mlp"}
"""Modules to the dtype of whose first layer's weight the one around them brings what it calls them with: Swin v2's. All
their layers are kept."""


def _has_in_a_list(parent: nn.Module, name: str) -> bool:
    """Whether a plain list of ``parent`` holds its layer ``name`` too, as in MaskFormer's blocks of predictions."""
    layer = getattr(parent, name)
    while hasattr(layer, "base_layer"):  # of an adapter
        layer = layer.base_layer
    lists = (value for value in vars(parent).values() if isinstance(value, (list, tuple)))
    return any(entry is layer for held in lists for entry in held)


def _uncalled(parent: nn.Module) -> tuple[str, ...]:
    uncalled = _UNCALLED.get(type(parent).__name__, ())
    if uncalled and hasattr(parent, "slow_but_exact"):  # BLOOM, which takes slices of the weights where asked to
        return uncalled if parent.slow_but_exact and parent.pretraining_tp > 1 else ()
    return uncalled


def _parent_of(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    around, _, name = path.rpartition(".")
    return model.get_submodule(around), name


def never_calls(model: nn.Module, path: str) -> bool:
    """Whether what is around the layer at ``path`` takes its weight, or the layer from a list, and never calls what is
    in its place: what is put around it has no effect. (Mamba's mixers call ``dt_proj`` of a quantized model.)"""
    parent, name = _parent_of(model, path)
    if _has_in_a_list(parent, name):
        return True
    if isinstance(parent, nn.MultiheadAttention):
        return name == "out_proj"
    kind = type(parent).__name__
    if name == "dt_proj" and _MIXER.search(kind):
        return not hasattr(getattr(parent, "config", None), "_is_quantized")
    return name in _uncalled(parent)


def passes_by(model: nn.Module, path: str) -> bool:
    """Whether that is so on some paths at least, as in training of the ``out_proj`` of Mamba's mixers and Gemma 3n's
    ``correction_coefs``: what is put around the layer does not learn there."""
    parent, name = _parent_of(model, path)
    kind = type(parent).__name__
    if kind == "Gemma3nTextAltUp":
        return name == "correction_coefs"
    return never_calls(model, path) or (name in ("dt_proj", "out_proj") and _MIXER.search(kind) is not None)


def needs_full_precision(model: nn.Module, path: str) -> bool:
    """Whether what is around the layer at ``path`` reads its weight wherever it runs, or has the layer in a list, so
    that 4 bits do not do. (Mamba's fused kernel, which reads that of ``out_proj``, trains on GPUs alone.)"""
    parent, name = _parent_of(model, path)
    read = name in (*_READ, *_uncalled(parent), *_READ_BY.get(type(parent).__name__, ()))
    return read or not _READ_WITHIN.isdisjoint(path.split(".")[:-1]) or _has_in_a_list(parent, name)
