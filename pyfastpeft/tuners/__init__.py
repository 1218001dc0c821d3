"""Tuning methods: one file each."""

from .base import METHODS, PeftConfig, TaskType
from .bottleneck import BottleneckConfig
from .deep_prompt import DeepPromptConfig
from .lora import LoraConfig
from .prefix import PrefixTuningConfig
from .prompt import PromptTuningConfig, PromptTuningInit
from .ptuning import PromptEncoderConfig, PromptEncoderReparameterizationType

__all__ = [
    "METHODS",
    "BottleneckConfig",
    "DeepPromptConfig",
    "LoraConfig",
    "PeftConfig",
    "PrefixTuningConfig",
    "PromptEncoderConfig",
    "PromptEncoderReparameterizationType",
    "PromptTuningConfig",
    "PromptTuningInit",
    "TaskType",
]
