"""The fused operators as Python sees them."""

from . import library as library  # loads the compiled operators
from . import mixed as mixed
from .backends import Backend
from .cross_entropy import cross_entropy_, head_cross_entropy
from .dense import dense_linear
from .elementwise import projected_swiglu, rms_norm, rope, swiglu
from .linear_4bit import BankView, Lora, PackedLora, linear_4bit, pack_lora
from .lora import add_lora
from .memory import copy_alike, copy_tensors, large_pages
from .prefix_attention import HIDDEN, key_positions, prefix_attention
from .rows import take_rows

__all__ = [
    "HIDDEN",
    "Backend",
    "BankView",
    "Lora",
    "PackedLora",
    "add_lora",
    "copy_alike",
    "copy_tensors",
    "cross_entropy_",
    "dense_linear",
    "head_cross_entropy",
    "key_positions",
    "large_pages",
    "linear_4bit",
    "pack_lora",
    "prefix_attention",
    "projected_swiglu",
    "rms_norm",
    "rope",
    "swiglu",
    "take_rows",
]
