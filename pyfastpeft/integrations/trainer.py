"""transformers' own Trainer treats a :class:`PeftModel` as it treats PEFT's: its checkpoints hold the adapters alone.

The Trainer knows PEFT's models by their class; what it asks about them is answered for ours as well.
"""

from __future__ import annotations

import functools
import os
from types import ModuleType
from typing import Any

import torch


def teach_trainer(module: ModuleType) -> None:
    """Change what ``module``, transformers.trainer, asks of a model and how it saves one."""
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
