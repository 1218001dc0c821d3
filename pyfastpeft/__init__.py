"""Parameter-efficient fine-tuning with kernels of its own: 4-bit linear layers with the LoRA branch inside."""

from . import nn, ops
from .formats import Packed4bit, quantize_4bit

__all__ = ["Packed4bit", "nn", "ops", "quantize_4bit"]
