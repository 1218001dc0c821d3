"""transformers' own Trainer treats a :class:`PeftModel` as it treats PEFT's: its checkpoints hold the adapters alone.

The Trainer knows PEFT's models by their class. What it asks is answered for ours as well, once it is imported; until
then nothing is, for the Trainer takes a second to import.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.util
import os
import sys
from types import ModuleType
from typing import Any

import torch

_MODULE = "transformers.trainer"


class _OnImport(importlib.abc.MetaPathFinder):
    """Lets the next import of the Trainer's module end with :func:`_teach`."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname != _MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        execute = spec.loader.exec_module

        def execute_and_teach(module: ModuleType) -> None:
            execute(module)
            _teach(module)

        spec.loader.exec_module = execute_and_teach
        return spec


def serve_trainer() -> None:
    """Teach the Trainer about our models, now or when it is imported."""
    if _MODULE in sys.modules:
        _teach(sys.modules[_MODULE])
    elif not any(isinstance(finder, _OnImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _OnImport())


def _teach(module: ModuleType) -> None:
    from transformers import trainer_utils

    from ..peft_model import PeftModel

    is_peft_model, save = module._is_peft_model, module.Trainer._save

    @functools.wraps(is_peft_model)
    def is_peft_model_or_ours(model: Any) -> bool:
        return isinstance(model, PeftModel) or is_peft_model(model)

    @functools.wraps(save)
    def save_adapters(self: Any, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if not isinstance(model, PeftModel):
            return save(self, output_dir, state_dict)
        if self.args.should_save:
            output_dir = self.args.output_dir if output_dir is None else output_dir
            model.save_pretrained(output_dir)
            tokenizer = self.processing_class or getattr(self.data_collator, "tokenizer", None)
            if tokenizer is not None:
                tokenizer.save_pretrained(output_dir)
            torch.save(self.args, os.path.join(output_dir, module.TRAINING_ARGS_NAME))

    module._is_peft_model = trainer_utils._is_peft_model = is_peft_model_or_ours
    module.Trainer._save = save_adapters
