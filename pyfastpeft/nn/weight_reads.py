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
_READ = ("dt_proj", "wo", "patch_embedding")
"""Layers of Mamba's mixers; and of T5's relatives and SigLIP 2, which bring what they call these with to the dtype of
their weight."""


def never_calls(parent: nn.Module, name: str) -> bool:
    """Whether ``parent`` takes the weight of its layer ``name`` without calling the layer, be it on some of its paths
    alone: what is put around the layer has no effect there."""
    if isinstance(parent, nn.MultiheadAttention):
        return name == "out_proj"
    kind = type(parent).__name__
    return name in _UNCALLED.get(kind, ()) or (name in ("dt_proj", "out_proj") and _MIXER.search(kind) is not None)


def needs_full_precision(parent: nn.Module, name: str) -> bool:
    """Whether ``parent`` reads the weight of its layer ``name`` wherever it runs, so that 4 bits do not do. (Mamba's
    fused kernel, which reads that of ``out_proj``, trains on GPUs alone.)"""
    return name in _READ or name in _UNCALLED.get(type(parent).__name__, ())
