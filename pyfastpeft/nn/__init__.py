"""Drop-in modules."""

from .linear4bit import Linear4bit
from .lora import LoraConv1D, LoraEmbedding, LoraLinear

__all__ = ["Linear4bit", "LoraConv1D", "LoraEmbedding", "LoraLinear"]
