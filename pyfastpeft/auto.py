"""A model and its adapter at once: the base model is the one that the adapter's folder names."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, ClassVar

import transformers
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel
from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE

from .hub.files import read_json
from .hub.peft import CONFIG_NAME, locate
from .integrations.gguf import from_gguf
from .nn.ends import embedding_weight
from .peft_model import MODELS, PeftModel
from .tuners.base import PeftConfig, TaskType

_BASES = {
    TaskType.CAUSAL_LM: transformers.AutoModelForCausalLM,
    TaskType.SEQ_2_SEQ_LM: transformers.AutoModelForSeq2SeqLM,
    TaskType.SEQ_CLS: transformers.AutoModelForSequenceClassification,
    TaskType.TOKEN_CLS: transformers.AutoModelForTokenClassification,
    TaskType.QUESTION_ANS: transformers.AutoModelForQuestionAnswering,
    TaskType.FEATURE_EXTRACTION: transformers.AutoModel,
}
"""What loads the base model of a task."""


class AutoPeftModel:
    """An adapter of any task; the subclasses take their own alone."""

    task_type: ClassVar[TaskType | None] = None

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        revision: str | None = None,
        subfolder: str | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """Load the base model that an adapter names, and the adapter into it.

        Where a tokenizer lies beside the adapter that has more tokens than the base model, its embeddings are resized.
        A base model that is a GGUF file is loaded by :func:`pyfastpeft.from_gguf`.

        Args:
            adapter_name, is_trainable, config: as in :meth:`PeftModel.from_pretrained`.
            revision, subfolder: of the adapter; the base model's revision is in its configuration.
            kwargs: for the base model's ``from_pretrained`` (``dtype``, ``quantization_config``, ``device_map`` …);
                those that ``hf_hub_download`` takes (token, cache_dir, …) are for the adapter as well.

        Raises:
            FileNotFoundError: there is no such folder or file.
            ValueError: the adapter names no base model, or none that is known how to load; it is of another task than
                this class; or as in :meth:`PeftModel.from_pretrained`.
        """
        source = pretrained_model_name_or_path
        hub = kwargs | {"revision": revision, "subfolder": subfolder}
        stored = PeftConfig.from_pretrained(source, **hub)
        if stored.base_model_name_or_path is None:
            raise ValueError(
                f"{source} names no base model (base_model_name_or_path is null); load that yourself and use "
                "PeftModel.from_pretrained"
            )
        task = stored.task_type
        if cls.task_type is not None and task not in (None, cls.task_type):
            raise ValueError(f"{source} is for {task.value}, and {cls.__name__} for {cls.task_type.value}")
        base = Path(stored.base_model_name_or_path)
        if base.suffix == ".gguf" and base.is_file():
            model = from_gguf(base, **kwargs)
        else:
            loader = cls._loader(task, str(source), hub)
            model = loader.from_pretrained(stored.base_model_name_or_path, revision=stored.revision, **kwargs)
        _make_room(model, source, hub)
        peft_class = PeftModel if cls.task_type is None else MODELS[cls.task_type]
        return peft_class.from_pretrained(model, source, adapter_name, is_trainable, config, **hub)

    @classmethod
    def _loader(cls, task: TaskType | None, source: str, hub: dict[str, Any]) -> Any:
        """The class of transformers whose ``from_pretrained`` gives the base model."""
        if wanted := cls.task_type or task:
            return _BASES[wanted]
        mapping = read_json(locate(source, CONFIG_NAME, **hub)).get("auto_mapping") or {}
        name, library = (str(mapping.get(key)) for key in ("base_model_class", "parent_library"))
        # Looked up, not imported: a file does not choose what code runs.
        known = getattr(transformers, name, None) if library.partition(".")[0] == "transformers" else None
        if not (isinstance(known, type) and issubclass(known, PreTrainedModel)):
            raise ValueError(
                f"{source} has neither a task_type nor the auto_mapping of a transformers model (it is {mapping!r}); "
                "use the class for the task, as AutoPeftModelForCausalLM"
            )
        return known


def _make_room(model: nn.Module, source: str | os.PathLike, hub: dict[str, Any]) -> None:
    """Resize the embeddings of ``model`` for the tokenizer that lies beside the adapter, if it has more tokens."""
    try:
        locate(source, TOKENIZER_CONFIG_FILE, **hub)
    except FileNotFoundError:
        return
    known = ("revision", "token", "cache_dir", "local_files_only", "force_download", "trust_remote_code")
    chosen = {key: hub[key] for key in known if key in hub}
    tokenizer = AutoTokenizer.from_pretrained(source, subfolder=hub["subfolder"] or "", **chosen)
    if len(tokenizer) > len(embedding_weight(model)):
        model.resize_token_embeddings(len(tokenizer))


class AutoPeftModelForCausalLM(AutoPeftModel):
    """An adapter for "CAUSAL_LM", with its base model."""

    task_type = TaskType.CAUSAL_LM


class AutoPeftModelForSeq2SeqLM(AutoPeftModel):
    """An adapter for "SEQ_2_SEQ_LM", with its base model."""

    task_type = TaskType.SEQ_2_SEQ_LM


class AutoPeftModelForSequenceClassification(AutoPeftModel):
    """An adapter for "SEQ_CLS", with its base model."""

    task_type = TaskType.SEQ_CLS


class AutoPeftModelForTokenClassification(AutoPeftModel):
    """An adapter for "TOKEN_CLS", with its base model."""

    task_type = TaskType.TOKEN_CLS


class AutoPeftModelForQuestionAnswering(AutoPeftModel):
    """An adapter for "QUESTION_ANS", with its base model."""

    task_type = TaskType.QUESTION_ANS


class AutoPeftModelForFeatureExtraction(AutoPeftModel):
    """An adapter for "FEATURE_EXTRACTION", with its base model."""

    task_type = TaskType.FEATURE_EXTRACTION
