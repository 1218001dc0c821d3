"""Layers of transformers' models whose input does not begin with the rows of the batch, but with its positions, its
decoder layers, patches of several scales or other things, of which there may happen to be as many."""

from __future__ import annotations

from torch import nn

_ALL = ("*",)
_WITHIN = {
    "BridgeTowerTransformer": _ALL,
    "BrosBboxEmbeddings": ("bbox_projection",),
    "BrosSpadeEEForTokenClassification": ("initial_token_classifier", "subsequent_token_classifier"),
    "BrosSpadeELForTokenClassification": ("entity_linker",),
    "DepthProPatchEncoder": _ALL,
    "FSMTDecoder": ("layers",),
    "FSMTEncoder": ("layers",),
    "HiggsAudioV2DecoderLayer": ("mlp", "audio_mlp"),
    "LEDEncoderSelfAttention": _ALL,
    "LongformerSelfAttention": _ALL,
    "MLCDAttention": ("out_proj",),
    "Mask2FormerMaskedAttentionDecoderLayer": ("fc1", "fc2"),
    "OmDetTurboDecoder": ("task_encoder", "task_project", "encoder_class_head", "decoder_class_head"),
    "OmDetTurboLanguageBackbone": _ALL,
    "OneFormerTransformerDecoderFFNLayer": _ALL,
    "OneFormerTransformerDecoderQueryTransformerDecoderLayer": ("linear1", "linear2"),
    "PerceptionLMMultiModalProjector": _ALL,
    "Sam3DotProductScoring": ("query_proj",),
    "Sam3LiteTextDotProductScoring": ("query_proj",),
    "SegGptEncoder": ("layers",),
    "VibeVoiceModel": ("diffusion_head", "multi_modal_projector", "semantic_connector"),
    "XLNetModel": _ALL,
}
"""Class of a module → what in it is called so each time. (OmDet-Turbo encodes the texts that it has not kept, SegGPT
has the prompts' images after all rows, VibeVoice goes on with the rows that speak, and Higgs Audio has the tokens of
text and those of sound each by themselves, of which rows may have unequally many.)"""
_CALLED_WITH = {
    2: ("relative_attention_bias", "rel_attn_embed", "rel_pos_emb", "distance_embedding", "pe_k"),
    4: ("class_labels_classifier", "bbox_predictor", "class_embed", "bbox_embed", "class_predictor", "box_head"),
}
"""Dimensions of an input → names of modules that are called so with one of as many, in which all else begins with rows:
embeddings of distances [positions, positions], and the heads of DETR and its relatives on [decoder layers, batch,
queries, width]."""


def dims_elsewhere(model: nn.Module, path: str) -> int | None:
    """How many dimensions an input of the module at ``path`` has that does not begin with rows: 0 if any has, None if
    each begins with rows."""
    names = path.split(".")
    for i in range(len(names)):
        held = _WITHIN.get(type(model.get_submodule(".".join(names[:i]))).__name__, ())
        if held == _ALL or names[i] in held:
            return 0
    return next((dims for dims, held in _CALLED_WITH.items() if not set(held).isdisjoint(names)), None)
