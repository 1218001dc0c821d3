"""Tiny random transformers models, one an architecture, and what tests do to them."""

from __future__ import annotations

import copy
import math
import random
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
import transformers as tf
from torch import nn
from transformers.generation.utils import GenerateOutput

import pyfastpeft as fp
from pyfastpeft.adapters import Prefix
from pyfastpeft.integrations.forwards import remove

VOCAB = 64
# No ReLU, which OPT and T5 have: where its input is zero within a rounding, two right computations may have gradients
# that differ by percents, and loss curves that part (about one run of T5 in fifty).
_LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
_OPT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "word_embed_proj_dim": 32,
    "ffn_dim": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "dropout": 0.0,
    "activation_function": "gelu",
}
_GPT2 = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "pad_token_id": 0}
_GPT2 |= {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
_T5 = {"vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
_T5 |= {"feed_forward_proj": "gelu"}
_BERT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
_MAKERS = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**_LLAMA)),
    "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**_LLAMA, tie_word_embeddings=True)),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**_LLAMA, head_dim=8)),
    "mistral": lambda: tf.MistralForCausalLM(tf.MistralConfig(**_LLAMA)),
    "gemma": lambda: tf.GemmaForCausalLM(tf.GemmaConfig(**_LLAMA, head_dim=8)),
    "phi": lambda: tf.PhiForCausalLM(tf.PhiConfig(**_LLAMA)),
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**_GPT2)),
    "opt": lambda: tf.OPTForCausalLM(tf.OPTConfig(**_OPT)),
    "t5": lambda: tf.T5ForConditionalGeneration(tf.T5Config(**_T5, decoder_start_token_id=0)),
    "bert": lambda: tf.BertForSequenceClassification(tf.BertConfig(**_BERT)),
}
ARCHITECTURES = list(_MAKERS)
TASKS = dict.fromkeys(ARCHITECTURES, "CAUSAL_LM") | {"t5": "SEQ_2_SEQ_LM", "bert": "SEQ_CLS"}

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 200,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
"""Sizes of a decoder like Llama's."""


def make(architecture: str = "llama", dtype: torch.dtype = torch.float32) -> nn.Module:
    """A random model in evaluation mode; dropout is off everywhere."""
    model = _MAKERS[architecture]()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return vary_vectors(model).to(dtype).eval()


def vary_vectors(model: nn.Module) -> nn.Module:
    """``model`` with biases and norms that are not all alike, in place."""
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.add_(torch.randn_like(parameter) / 10)
    return model


def inputs(architecture: str = "llama", rows: int = 3, length: int = 6) -> dict[str, torch.Tensor]:
    ids = torch.randint(1, VOCAB, (rows, length))
    labels = torch.randint(0, 2, (rows,)) if architecture == "bert" else ids
    return {"input_ids": ids, "labels": labels}


def loss_curve(
    model: nn.Module, *batches: dict[str, torch.Tensor], steps: int = 20, rate: float = 3e-3
) -> torch.Tensor:
    """The loss of each step of a training run with AdamW on one batch after another, over and over.

    Two right computations part at an eps of 1e-8, which moves a parameter by the whole rate where its gradient is
    nothing but a rounding, and at a rate of 1e-2, where twenty steps of P-Tuning's encoder can multiply a rounding by a
    hundred.
    """
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, eps=1e-5)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = model(**batches[step % len(batches)]).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


WITH_SCORES = {"output_scores": True, "return_dict_in_generate": True}


def assert_same_answers(got: GenerateOutput, expected: GenerateOutput, rows: slice = slice(None)) -> None:
    """``rows`` of ``got`` are the answers of ``expected``, both ``WITH_SCORES``.

    Where the two best tokens are a rounding apart either is right, and what follows one of them is another text.
    """
    steps, length = len(expected.scores), min(got.sequences.shape[1], expected.sequences.shape[1])
    own, other = got.sequences[rows, -length:], expected.sequences[:, -length:]
    assert torch.equal(own[:, :-steps], other[:, :-steps])  # what one of them has before it is padding, or a prompt
    tokens, others = own[:, -steps:], other[:, -steps:]
    if hasattr(expected, "sequences_scores"):  # of beams, whose steps' scores are those of beams that end as well
        torch.testing.assert_close(got.sequences_scores[rows], expected.sequences_scores, rtol=0, atol=1e-5)
        assert torch.equal(tokens, others)
        return
    alike = torch.ones(len(tokens), dtype=torch.bool)
    for step, (own, other) in enumerate(zip(got.scores, expected.scores, strict=True)):
        torch.testing.assert_close(own[rows][alike], other[alike], rtol=0, atol=1e-5)
        for chosen in (tokens[:, step], others[:, step]):
            assert (other.gather(1, chosen[:, None])[:, 0] >= other.amax(1) - 1e-5)[alike].all()
        alike &= tokens[:, step] == others[:, step]


def quantized(model: nn.Module, **kwargs) -> nn.Module:
    """A copy whose linear layers, but the head, are 4-bit."""
    model = copy.deepcopy(model)
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear and not path.endswith(("lm_head", "classifier")):
            model.set_submodule(path, fp.nn.Linear4bit.from_linear(module, **kwargs))
    return model


def dequantized(model: nn.Module) -> nn.Module:
    """A copy with every 4-bit layer as an ordinary one of the same values."""
    model = copy.deepcopy(model)
    for path, module in list(model.named_modules()):
        if isinstance(module, fp.nn.Linear4bit):
            plain = nn.Linear(module.in_features, module.out_features, module.bias is not None)
            plain.weight.data = module.dequantize()
            if module.bias is not None:
                plain.bias = module.bias
            model.set_submodule(path, plain)
    return model


def randomize(model: nn.Module, std: float = 0.2) -> None:
    """Give every adapter parameter a value that matters."""
    for name, parameter in model.named_parameters():
        if "lora_magnitude_vector" in name:
            parameter.data.mul_(1 + std * torch.rand_like(parameter))
        elif any(part in name for part in ("lora_", ".bottleneck.", "modules_to_save", "trainable_tokens")):
            parameter.data.normal_(std=std)


def copy_adapters(source: nn.Module, target: nn.Module) -> None:
    """Give ``target`` the values of every parameter of ``source`` (both name them alike)."""
    values = dict(source.named_parameters())
    for name, parameter in target.named_parameters():
        if parameter.is_floating_point():
            parameter.data.copy_(values[name].data)


def use_plain_layers(model: nn.Module) -> None:
    """What is not an adapter runs as transformers has it, so that a comparison with peft is of the adapters alone."""
    base = model.get_base_model()
    base.set_attn_implementation("sdpa")
    remove(base)


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    """The Frobenius norm of the difference, in that of what is expected."""
    got, expected = got.double(), expected.double()
    return ((got - expected).norm() / expected.norm().clamp(min=1e-30)).item()


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """What is done inside leaves all values of ``model`` as they were, under the same names."""
    before = {key: t.clone() for key, t in model.state_dict().items()}
    yield
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0, equal_nan=True)


def check_threads_choose_apart(model: nn.Module, choices: list[list | None]) -> None:
    """Threads that ask at once for different ``adapter_names`` of two rows get what each asked for."""
    ids = torch.randint(1, VOCAB, (2, 6))

    def logits(names: list | None) -> torch.Tensor:
        with torch.no_grad():
            return model(ids, adapter_names=names).logits

    expected = [logits(names) for names in choices]

    def serve(turn: int) -> bool:
        turns = [(turn + i) % len(choices) for i in range(12)]
        return all(torch.equal(logits(choices[t]), expected[t]) for t in turns)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(serve, range(8)))


def check_not_finite_stays(model: nn.Module, ids: torch.Tensor, names: list) -> None:
    """What is not finite in adapter "b", in one parameter of each kind in turn, reaches none of the rows of ``names``
    that leave "b" out, and no gradient of adapter "a"."""
    others = [i for i, name in enumerate(names) if name != "b"]
    own = [p for n, p in model.named_parameters() if p.requires_grad and ".a." in f"{n}."]

    def run(grad: bool) -> tuple[torch.Tensor, list[torch.Tensor]]:
        with torch.set_grad_enabled(grad), torch.random.fork_rng():
            torch.manual_seed(0)
            logits = model(ids, adapter_names=names).logits
            if grad:
                model.zero_grad()
                logits.float().square().sum().backward()
                assert all(p.grad.isfinite().all() and p.grad.any() for p in own)
            return logits[others].clone(), [p.grad.clone() for p in own if grad]

    expected, kinds = (run(False), run(True)), defaultdict(list)
    for name, parameter in model.named_parameters():
        where, found, part = f"{name}.".partition(".b.")
        if found and parameter.numel():
            kinds[where.rpartition(".")[2], part].append(parameter)
    for kind, parameters in kinds.items():
        parameter = random.choice(parameters)
        with torch.no_grad():
            before = parameter.clone()
            parameter.view(-1)[int(torch.randint(parameter.numel(), ()))] = random.choice([math.nan, math.inf])
        for grad in (False, True):
            logits, grads = run(grad)
            assert torch.equal(logits, expected[grad][0]), kind
            assert all(map(torch.equal, grads, expected[grad][1])), kind
        with torch.no_grad():
            parameter.copy_(before)


class HeldPrefix:
    """A prefix as an attention layer holds it."""

    def __init__(self, *prefix) -> None:
        self.prefix = Prefix(*prefix)

    def current(self, batch: int) -> Prefix:
        assert self.prefix.index is None or len(self.prefix.index) == batch
        return self.prefix
