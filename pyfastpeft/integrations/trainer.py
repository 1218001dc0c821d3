"""transformers' own Trainer treats a :class:`PeftModel` as it treats PEFT's: its checkpoints hold the adapters alone.

The Trainer knows PEFT's models by their class; what it asks about them is answered for ours as well. And a model that
``nn.DataParallel`` cannot copy trains on one GPU, as bitsandbytes' models do.
"""

from __future__ import annotations

import functools
import os
from types import ModuleType
from typing import Any

import torch

from ..nn.one_device import OneDevice
from .forwards import runs


def keep_to_one_gpu(module: ModuleType) -> None:
    """Let the Trainer of ``module``, transformers.trainer, not spread what is ours over the GPUs of one process."""
    initialize = module.Trainer.__init__

    @functools.wraps(initialize)
    def initialize_on_one_gpu(self: Any, *args: Any, **kwargs: Any) -> None:
        initialize(self, *args, **kwargs)
        if self.args.n_gpu > 1 and any(isinstance(m, OneDevice) or runs(m) for m in self.model.modules()):
            self.args._n_gpu = 1
            self._train_batch_size = self.args.train_batch_size

    module.Trainer.__init__ = initialize_on_one_gpu


def teach_trainer(module: ModuleType) -> None:
    """Change what ``module``, transformers.trainer, asks of a model and how it saves one."""
    from transformers import trainer_utils

    from ..hub.peft import WEIGHTS_NAME, adapter_folder
    from ..peft_model import PeftModel

    is_peft_model, save = module._is_peft_model, module.Trainer._save
    resume, load_best = module.Trainer._load_from_checkpoint, module.Trainer._load_best_model

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

    def load_adapters(self: Any, folder: str) -> bool:
        """Into a model of ours, every adapter from its own folder: the Trainer loads the first active one alone."""
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if not isinstance(model, PeftModel):
            return False
        for name in model.peft_config:
            if name in model.active_adapters or (adapter_folder(folder, name) / WEIGHTS_NAME).is_file():
                model.load_adapter(adapter_folder(folder, name), name)
        return True

    @functools.wraps(resume)
    def resume_adapters(self: Any, resume_from_checkpoint: str, model: Any = None) -> None:
        if not load_adapters(self, resume_from_checkpoint):
            resume(self, resume_from_checkpoint, model)

    @functools.wraps(load_best)
    def load_best_adapters(self: Any) -> None:
        if not load_adapters(self, self.state.best_model_checkpoint):
            load_best(self)

    module._is_peft_model = trainer_utils._is_peft_model = is_peft_model_or_ours
    module.Trainer._save = save_adapters
    module.Trainer._load_from_checkpoint = resume_adapters
    module.Trainer._load_best_model = load_best_adapters
