"""4-bit number formats and the packed tensor that holds them."""

from .codes import FORMATS, Format, format_of, get_format
from .double_quant import DYNAMIC_MAP, NestedScales
from .packed import Packed4bit, is_full_precision, quantize_4bit

__all__ = [
    "DYNAMIC_MAP",
    "FORMATS",
    "Format",
    "NestedScales",
    "Packed4bit",
    "format_of",
    "get_format",
    "is_full_precision",
    "quantize_4bit",
]
