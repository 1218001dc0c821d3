"""Layers of transformers' and torch's models whose weight the module around them reads, past the layer."""

from __future__ import annotations

import re

from torch import nn

_UNCALLED = {
    "WavLMAttention": ("q_proj", "k_proj", "v_proj", "out_proj"),
    "MobileBertLMPredictionHead": ("dense",),
}
"""Class of the module around them → layers that it takes the weights of and never calls."""
_MIXER = re.compile("Mamba|Bamba|FalconH1")
"""In the names of the classes of Mamba's mixers, which multiply by the weight of ``dt_proj``, and in their fused kernel
by that of ``out_proj``."""
_CAST_TO = ("wo", "patch_embedding")
"""To the dtype of these layers' weights T5's relatives and SigLIP 2 bring what they call them with."""


def never_calls(parent: nn.Module, name: str) -> bool:
    """Whether ``parent`` takes the weight of its layer ``name`` without calling the layer, be it on some of its paths
    alone: what is put around the layer has no effect there."""
    if isinstance(parent, nn.MultiheadAttention):
        return name == "out_proj"
    kind = type(parent).__name__
    return name in _UNCALLED.get(kind, ()) or (name in ("dt_proj", "out_proj") and _MIXER.search(kind) is not None)


def needs_full_precision(parent: nn.Module, name: str) -> bool:
    """Whether ``parent`` reads the weight of its layer ``name``, so that it has to be in full precision. (Mamba's
    ``out_proj`` need not be on a CPU or in inference.)"""
    mixed = name == "out_proj" and _MIXER.search(type(parent).__name__) is not None
    return name in _CAST_TO or (never_calls(parent, name) and not mixed)
