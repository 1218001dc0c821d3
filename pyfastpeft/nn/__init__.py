"""Drop-in modules."""

from .bottleneck import Bottleneck
from .linear4bit import Linear4bit
from .lora import LoraConv1D, LoraEmbedding, LoraLinear

__all__ = ["Bottleneck", "Linear4bit", "LoraConv1D", "LoraEmbedding", "LoraLinear"]
