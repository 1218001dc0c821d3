"""TRL's trainers take this library's configurations and models as they take PEFT's.

Each module of trl has PEFT's classes and functions among its names. There, and nowhere else, those below come to mean
ours as well. (``LoraConfig`` and ``PrefixTuningConfig`` are there for what some versions of PEFT cannot do.)
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from ..nn.lora_layer import LoraLayer
from .peft import either_class


def teach_trl(module: ModuleType) -> None:
    """Widen what ``module``, one of trl's, has of PEFT; what it has not is not added."""
    for name, widen in _WIDENED.items():
        held = vars(module).get(name)
        if str(getattr(held, "__module__", "")).startswith(("peft.", "accelerate.")):  # not trl's own, not widened yet
            setattr(module, name, widen(held))


def _is_ours(model: Any) -> bool:
    from ..peft_model import PeftModel

    return isinstance(model, PeftModel)


def _is_our_config(config: Any) -> bool:
    from ..tuners import PeftConfig

    return isinstance(config, PeftConfig)


def _get_peft_model(theirs: Callable[..., Any]) -> Callable[..., Any]:
    def get_peft_model(model: Any, peft_config: Any, *args: Any, **kwargs: Any) -> Any:
        if not _is_our_config(peft_config):
            return theirs(model, peft_config, *args, **kwargs)
        from .. import peft_model

        return peft_model.get_peft_model(model, peft_config, *args, **kwargs)

    return get_peft_model


def _is_peft_model(theirs: Callable[[Any], bool]) -> Callable[[Any], bool]:
    def is_peft_model(model: Any) -> bool:
        from accelerate.utils import extract_model_from_parallel
        from transformers.utils import is_peft_available

        if not _is_ours(extract_model_from_parallel(model)):
            return theirs(model)
        if not is_peft_available():
            raise ImportError("TRL looks into peft to train a model with adapters; please install it: pip install peft")
        return True

    return is_peft_model


_WIDENED: dict[str, Callable[[Any], Any]] = {
    "BaseTunerLayer": either_class(lambda module: isinstance(module, LoraLayer)),
    "PeftConfig": either_class(_is_our_config),
    "PeftModel": either_class(_is_ours),
    "PromptLearningConfig": either_class(lambda config: _is_our_config(config) and config.is_prompt_learning),
    "get_peft_model": _get_peft_model,
    "is_peft_model": _is_peft_model,
}
