"""Parameter-efficient fine-tuning with kernels of its own: 4-bit linear layers with the LoRA branch inside."""

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

from . import nn, ops
from .formats import Packed4bit, quantize_4bit
from .integrations.on_import import when_any_imported, when_imported
from .integrations.peft import TAUGHT, teach_peft
from .integrations.trl import teach_trl
from .tuners import (
    BottleneckConfig,
    DeepPromptConfig,
    LoftQConfig,
    LoraConfig,
    PeftConfig,
    PeftType,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptEncoderReparameterizationType,
    PromptTuningConfig,
    PromptTuningInit,
    TaskType,
    get_peft_config,
)

if TYPE_CHECKING:
    from .auto import (
        AutoPeftModel,
        AutoPeftModelForCausalLM,
        AutoPeftModelForFeatureExtraction,
        AutoPeftModelForQuestionAnswering,
        AutoPeftModelForSeq2SeqLM,
        AutoPeftModelForSequenceClassification,
        AutoPeftModelForTokenClassification,
    )
    from .functional import (
        get_peft_model_state_dict,
        inject_adapter_in_model,
        load_peft_weights,
        set_peft_model_state_dict,
    )
    from .integrations.accelerate import accelerate
    from .integrations.gguf import from_gguf
    from .integrations.transformers import FastPeftConfig
    from .peft_model import (
        PeftModel,
        PeftModelForCausalLM,
        PeftModelForFeatureExtraction,
        PeftModelForQuestionAnswering,
        PeftModelForSeq2SeqLM,
        PeftModelForSequenceClassification,
        PeftModelForTokenClassification,
        get_peft_model,
        prepare_model_for_kbit_training,
    )
    from .status import get_layer_status, get_model_status

__all__ = [
    "AutoPeftModel",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
    "BottleneckConfig",
    "DeepPromptConfig",
    "FastPeftConfig",
    "LoftQConfig",
    "LoraConfig",
    "Packed4bit",
    "PeftConfig",
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "PeftType",
    "PrefixTuningConfig",
    "PromptEncoderConfig",
    "PromptEncoderReparameterizationType",
    "PromptTuningConfig",
    "PromptTuningInit",
    "TaskType",
    "accelerate",
    "from_gguf",
    "get_layer_status",
    "get_model_status",
    "get_peft_config",
    "get_peft_model",
    "get_peft_model_state_dict",
    "inject_adapter_in_model",
    "load_peft_weights",
    "nn",
    "ops",
    "prepare_model_for_kbit_training",
    "quantize_4bit",
    "set_peft_model_state_dict",
]

# What brings transformers along, which takes seconds to import, by the module that has it.
_NAMES = {
    "auto": (
        "AutoPeftModel",
        "AutoPeftModelForCausalLM",
        "AutoPeftModelForFeatureExtraction",
        "AutoPeftModelForQuestionAnswering",
        "AutoPeftModelForSeq2SeqLM",
        "AutoPeftModelForSequenceClassification",
        "AutoPeftModelForTokenClassification",
    ),
    "functional": (
        "get_peft_model_state_dict",
        "inject_adapter_in_model",
        "load_peft_weights",
        "set_peft_model_state_dict",
    ),
    "integrations.accelerate": ("accelerate",),
    "integrations.gguf": ("from_gguf",),
    "integrations.transformers": ("FastPeftConfig",),
    "peft_model": (
        "PeftModel",
        "PeftModelForCausalLM",
        "PeftModelForFeatureExtraction",
        "PeftModelForQuestionAnswering",
        "PeftModelForSeq2SeqLM",
        "PeftModelForSequenceClassification",
        "PeftModelForTokenClassification",
        "get_peft_model",
        "prepare_model_for_kbit_training",
    ),
    "status": ("get_layer_status", "get_model_status"),
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        try:
            return importlib.metadata.version(__name__)
        except importlib.metadata.PackageNotFoundError as error:  # compiled in its folder, not installed
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}: it is not installed") from error
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})


def _register(_: Any) -> None:
    importlib.import_module(".integrations.transformers", __name__)
    importlib.import_module(".integrations.attention", __name__)


# A model that this package quantized, or that asks for its attention, loads with nothing but `import pyfastpeft`.
when_imported("transformers.modeling_utils", _register)
# TRL and others read the adapters of a model, fill and rescale them, with PEFT's functions.
for _home in TAUGHT:
    when_imported(_home, teach_peft)
# TRL's trainers are given a configuration before there is a model of ours.
when_any_imported("trl", teach_trl)
