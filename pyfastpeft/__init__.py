"""Parameter-efficient fine-tuning with kernels of its own: 4-bit linear layers with the LoRA branch inside."""

from . import nn, ops
from .formats import Packed4bit, quantize_4bit
from .integrations.accelerate import accelerate
from .integrations.gguf import from_gguf
from .integrations.transformers import FastPeftConfig
from .peft_model import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from .tuners import LoraConfig, PeftConfig, TaskType

__all__ = [
    "FastPeftConfig",
    "LoraConfig",
    "Packed4bit",
    "PeftConfig",
    "PeftModel",
    "TaskType",
    "accelerate",
    "from_gguf",
    "get_peft_model",
    "get_peft_model_state_dict",
    "nn",
    "ops",
    "quantize_4bit",
    "set_peft_model_state_dict",
]
