"""SmolLM2-135M with random weights, as ours and as peft over bitsandbytes: what the model benchmarks measure."""

from __future__ import annotations

import tempfile

import torch
from torch import nn
from transformers.utils.logging import disable_progress_bar

disable_progress_bar()
SIZES = {
    "135m": {
        "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
        "intermediate_size": 1536, "vocab_size": 49152, "tie_word_embeddings": True,
    },
    "tiny": {
        "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "intermediate_size": 128, "vocab_size": 512, "tie_word_embeddings": True,
    },
}  # fmt: skip
LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear"}
SMALL_LORA = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": ["q_proj", "v_proj"]}


def checkpoint(size: str) -> tempfile.TemporaryDirectory:
    """A folder with the model in bf16 safetensors."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    folder = tempfile.TemporaryDirectory(prefix="pyfastpeft-bench-")
    LlamaForCausalLM(LlamaConfig(**SIZES[size])).bfloat16().save_pretrained(folder.name)
    return folder


def load_ours(folder: str) -> nn.Module:
    from transformers import AutoModelForCausalLM

    import pyfastpeft as fp

    config = fp.FastPeftConfig(quant_type="nf4")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=config)


def load_bnb(folder: str) -> nn.Module:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=config, device_map="cpu"
    )


def adapted_ours(folder: str) -> nn.Module:
    import pyfastpeft as fp

    return fp.get_peft_model(load_ours(folder), fp.LoraConfig(task_type="CAUSAL_LM", **LORA))


def adapted_peft(folder: str) -> nn.Module:
    import peft

    return peft.get_peft_model(load_bnb(folder), peft.LoraConfig(task_type="CAUSAL_LM", **LORA))
