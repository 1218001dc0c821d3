"""Tuning methods: one file each."""

from .base import METHODS, PeftConfig, PeftType, TaskType, get_peft_config
from .bottleneck import BottleneckConfig
from .deep_prompt import DeepPromptConfig
from .lora import LoftQConfig, LoraConfig
from .prefix import PrefixTuningConfig
from .prompt import PromptTuningConfig, PromptTuningInit
from .ptuning import PromptEncoderConfig, PromptEncoderReparameterizationType

__all__ = [
    "METHODS",
    "BottleneckConfig",
    "DeepPromptConfig",
    "LoftQConfig",
    "LoraConfig",
    "PeftConfig",
    "PeftType",
    "PrefixTuningConfig",
    "PromptEncoderConfig",
    "PromptEncoderReparameterizationType",
    "PromptTuningConfig",
    "PromptTuningInit",
    "TaskType",
    "get_peft_config",
]
