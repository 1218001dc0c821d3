"""Drop-in modules."""

from .attention import Attention
from .bottleneck import Bottleneck
from .linear4bit import Linear4bit
from .lora import LoraConv1D, LoraEmbedding, LoraLinear

__all__ = ["Attention", "Bottleneck", "Linear4bit", "LoraConv1D", "LoraEmbedding", "LoraLinear"]
