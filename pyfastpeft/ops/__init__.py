"""The fused operators as Python sees them."""

from . import library as library  # loads the compiled operators
from .backends import Backend
from .cross_entropy import cross_entropy_with_gradient
from .elementwise import rms_norm, rope, swiglu
from .linear_4bit import BankView, Lora, linear_4bit

__all__ = [
    "Backend",
    "BankView",
    "Lora",
    "cross_entropy_with_gradient",
    "linear_4bit",
    "rms_norm",
    "rope",
    "swiglu",
]
