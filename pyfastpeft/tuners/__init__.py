"""Tuning methods: one file each."""

from .base import METHODS, PeftConfig, TaskType
from .bottleneck import BottleneckConfig
from .lora import LoraConfig

__all__ = ["METHODS", "BottleneckConfig", "LoraConfig", "PeftConfig", "TaskType"]
