"""Training on two processes under DDP and FSDP2 is training on one, on both batches."""

import datetime
import os

import pytest
import torch
import torch.distributed as dist
from architectures import quantized, randomize
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

import pyfastpeft as fp

PROCESSES, STEPS, LAYERS = 2, 2, 3  # so many layers that one has another on either side
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": LAYERS}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
CONFIGS = {
    "lora": fp.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=4),
    "prefix": fp.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "prompt": fp.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "deep": fp.DeepPromptConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "deep-bert": fp.DeepPromptConfig(task_type="SEQ_CLS", num_virtual_tokens=4),
}
RUNS = [
    *(("ddp", name, "") for name in ("lora", "prompt")),
    *(("fsdp", name, "") for name in CONFIGS),
    *(("fsdp", name, option) for name, option in (("lora", "4bit"), ("lora", "reshard"), ("deep", "checkpointing"))),
]


def built(name, option):
    torch.manual_seed(0)
    if name.endswith("bert"):
        model = BertForSequenceClassification(BertConfig(**SIZES, num_attention_heads=4, **NO_DROPOUT))
    else:
        model = LlamaForCausalLM(LlamaConfig(**SIZES, num_attention_heads=4, num_key_value_heads=2))
    if option == "4bit":
        model = quantized(model)
    model = fp.get_peft_model(model.eval(), CONFIGS[name])
    randomize(model)
    if option == "checkpointing":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def wrapped(model, how, option):
    if how == "ddp":
        return DistributedDataParallel(model)
    whole = {m.weight for m in model.modules() if isinstance(m, fp.nn.Linear4bit)}
    kwargs = {"mesh": init_device_mesh("cpu", (PROCESSES,)), "ignored_params": whole}
    for layer in next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == LAYERS):
        fully_shard(layer, **kwargs)
    return fully_shard(model, reshard_after_forward=True if option == "reshard" else None, **kwargs)


def trained(model, name, rows):
    """The losses and the last gradients of a few steps on those of the batches' ``rows``, and what was learned."""
    parameters = {n.removeprefix("module."): p for n, p in model.named_parameters() if p.requires_grad}
    optimizer, losses = torch.optim.SGD(parameters.values(), lr=0.5), []
    random = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        optimizer.zero_grad()
        ids = torch.randint(64, (2 * PROCESSES, 9), generator=random)
        loss = model(input_ids=ids[rows], labels=(ids[:, 0] % 2 if name.endswith("bert") else ids)[rows]).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    whole = [
        [t.full_tensor() if isinstance(t, DTensor) else t for t in (p.grad, p.detach())] for p in parameters.values()
    ]
    return torch.tensor(losses), dict(zip(parameters, whole, strict=True))


def process(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{folder}/meeting", datetime.timedelta(seconds=120), world_size=PROCESSES, rank=rank
    )
    found = {}
    for how, name, option in RUNS:
        model = wrapped(built(name, option), how, option)
        losses, parameters = trained(model, name, slice(2 * rank, 2 * rank + 2))
        dist.all_reduce(losses)
        found[how, name, option] = losses / PROCESSES, parameters
    if rank == 0:
        torch.save(found, f"{folder}/found")
    dist.barrier()
    os._exit(0)  # an orderly end is aborted now and then, by a thread that is left when nothing of Python is


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    torch.multiprocessing.spawn(process, (folder,), PROCESSES)
    return torch.load(folder / "found")


@pytest.mark.parametrize("run", RUNS, ids=lambda run: "-".join(filter(None, run)))
def test_two_processes_train_as_one_does_on_both_batches(found, run):
    _, name, option = run
    torch.testing.assert_close(found[run], trained(built(name, option), name, slice(None)), rtol=1e-3, atol=1e-5)
