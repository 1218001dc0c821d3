"""Llama models as ours, in bf16, as peft over bitsandbytes and as GGUF: what the model benchmarks measure."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from torch import nn

from .registry import DTYPES

SIZES = {
    "135m": {
        "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
        "intermediate_size": 1536, "vocab_size": 49152, "tie_word_embeddings": True,
    },
    "1.1b": {
        "hidden_size": 2048, "num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4,
        "intermediate_size": 5632, "vocab_size": 32000, "tie_word_embeddings": False,
    },
    "tiny": {
        "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "intermediate_size": 128, "vocab_size": 512, "tie_word_embeddings": True,
    },
}  # fmt: skip
NAMES = ("smollm2", *SIZES)
LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear"}
SMALL_LORA = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": ["q_proj", "v_proj"]}


def checkpoint(name: str) -> tempfile.TemporaryDirectory:
    """A folder with the model in bf16 safetensors: random weights, but ``smollm2`` is the real one if installed."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    folder = tempfile.TemporaryDirectory(prefix="pyfastpeft-bench-")
    (_smollm2() if name == "smollm2" else _random(name)).save_pretrained(folder.name)
    return folder


def _random(size: str) -> nn.Module:
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(**SIZES[size]), dtype=torch.bfloat16)


def _smollm2() -> nn.Module:
    from pyfastpeft.cli.models import SMOLLM2, load_model

    try:
        return load_model(argparse.Namespace(model=SMOLLM2), quantized=False)[0]
    except ValueError:  # not installed
        return _random("135m")


def load_dense(folder: str, dtype: str = "bf16") -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype])


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


def lora_over(model: nn.Module, inference_mode: bool = False) -> nn.Module:
    import pyfastpeft as fp

    config = fp.LoraConfig(task_type="CAUSAL_LM", inference_mode=inference_mode, **LORA)
    return fp.get_peft_model(model, config)


def adapted_ours(folder: str, inference_mode: bool = False) -> nn.Module:
    return lora_over(load_ours(folder), inference_mode)


def peft_over(model: nn.Module, inference_mode: bool = False) -> nn.Module:
    import peft

    config = peft.LoraConfig(task_type="CAUSAL_LM", inference_mode=inference_mode, **LORA)
    return peft.get_peft_model(model, config)


def adapted_peft(folder: str, inference_mode: bool = False) -> nn.Module:
    return peft_over(load_bnb(folder), inference_mode)


def write_gguf(folder: str, file: Path) -> None:
    """The Llama checkpoint in ``folder`` as GGUF in Q4_0, with a made-up tokenizer.

    The head is what llama.cpp's own quantizer makes it: Q6_K, or Q8_0 where rows are no multiple of 256. llama.cpp
    pairs the halves of a head for RoPE in its own order, so the rows of q and k move.
    """
    import gguf
    from safetensors.torch import load_file
    from transformers import AutoConfig

    from .contenders.ggml import quantize

    kinds = gguf.GGMLQuantizationType
    config = AutoConfig.from_pretrained(folder)
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([f"t{i}" for i in range(config.vocab_size)])
    writer.add_token_types([gguf.TokenType.NORMAL] * config.vocab_size)
    writer.add_token_merges(["t 0"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for shard in sorted(Path(folder).glob("*.safetensors")):
        for name, tensor in load_file(shard).items():
            if name == "lm_head.weight" and config.tie_word_embeddings:
                continue
            tensor = tensor.float()
            heads = {"q_proj.weight": config.num_attention_heads, "k_proj.weight": config.num_key_value_heads}
            for ending, count in heads.items():
                if name.endswith(ending):
                    tensor = tensor.view(count, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
            data, kind = tensor.numpy(), kinds.F32
            if tensor.dim() == 2:
                head = "lm_head" in name or ("embed" in name and config.tie_word_embeddings)
                kind = (kinds.Q8_0 if config.hidden_size % 256 else kinds.Q6_K) if head else kinds.Q4_0
                data = quantize(tensor, kind)
            writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
