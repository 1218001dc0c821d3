"""Tuning methods: one file each."""

from .base import METHODS, PeftConfig, TaskType
from .lora import LoraConfig

__all__ = ["METHODS", "LoraConfig", "PeftConfig", "TaskType"]
