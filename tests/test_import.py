"""What ``import pyfastpeft`` brings along, and what it does not."""

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

import pyfastpeft as fp
from pyfastpeft.integrations.on_import import when_any_imported

ROOT = Path(__file__).parent.parent


def imports_of(tree):
    """The relative ones that run when the module does."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            yield node
        elif not isinstance(node, ast.FunctionDef) and not (
            isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        ):
            yield from imports_of(node)


def test_imports_point_down_as_contributing_says():
    said = " ".join((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split())
    layers = re.search(r"Imports point down only: (.*?), compiled code\.", said)[1].split(" → ")
    layers = [re.sub(r"`|\.py", "", layer).replace("/", ".") for layer in layers]

    def depth(module):
        within = [layer for layer in layers if f"{module}.".startswith(f"pyfastpeft.{layer}.")]
        return layers.index(max(within, key=len)) if within else len(layers)

    files = {".".join(f.relative_to(ROOT).with_suffix("").parts): f for f in (ROOT / "pyfastpeft").rglob("*.py")}
    seen = set()
    for module, file in files.items():
        if module == "pyfastpeft.__init__":
            continue
        for node in imports_of(ast.parse(file.read_text(encoding="utf-8"))):
            source = importlib.util.resolve_name("." * node.level + (node.module or ""), module.rpartition(".")[0])
            for name in node.names:
                target = f"{source}.{name.name}" if f"{source}.{name.name}" in files else source
                assert depth(target) >= depth(module), f"{module} imports {target}"
                seen.add((depth(module), depth(target)))
    assert len(seen) > 3 * len(layers)


def python(*lines):
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_transformers_is_imported_by_those_who_need_it():
    absent = "assert 'transformers' not in sys.modules"
    use = "import sys, pyfastpeft as fp; fp.ops.linear_4bit, fp.LoraConfig()"
    help_ = "from pyfastpeft.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass"
    assert "info" in python(use, absent, help_, absent, "main(['info'])", absent)


def test_the_command_line_leaves_the_process_as_it_is():
    state = "(list(warnings.filters), dict(os.environ), logging.getLogger('bitsandbytes').level)"
    begin = "import logging, os, warnings, pyfastpeft, rich.console, safetensors; os.environ.pop('HF_HUB_OFFLINE', 0)"
    assert python(begin, f"before = {state}", "import pyfastpeft.cli", f"print(before == {state})") == ["True"]


@pytest.mark.parametrize(
    ("before", "said"),
    [
        ("import torch; torch.__version__ = '2.9.1+cpu'", "torch 2.9.1+cpu is here; pyfastpeft needs 2.10 or newer"),
        ("import torch; torch.__version__ = '2.10.0'", None),
        ("import pathlib; pathlib.Path.glob = lambda *_: iter(())", "operators are not compiled: install the package"),
    ],
)
def test_what_is_missing_is_said(before, said):
    run = [sys.executable, "-c", f"{before}; import pyfastpeft.ops"]
    done = subprocess.run(run, capture_output=True, text=True)
    assert (done.returncode == 0) is (said is None), done.stderr
    assert said is None or said in done.stderr


def test_the_compiler_is_loaded_by_those_who_compile():
    loaded = "print('torch._dynamo' in sys.modules)"
    use = "w = fp.quantize_4bit(torch.ones(16, 64))", "fp.nn.Linear4bit(64, 16)(torch.ones(1, 64)).sum()"
    assert python("import sys, torch, pyfastpeft as fp", *use, loaded) == ["False"]


def test_the_default_device_is_nothing_to_what_a_cpu_computes():
    """Where it is "meta", nothing made there has a value."""
    use = (
        "from pyfastpeft.ops import add_lora, linear_4bit, pack_lora",
        "x, a, b = (torch.ones(s, device='cpu') for s in ((2, 64), (4, 64), (16, 4)))",
        "w = fp.quantize_4bit(torch.ones((16, 64), device='cpu'), double_quant=True)",
        "assert torch.equal(w.dequantize(), w.reference(torch.float32))",
        "with torch.no_grad(): y = linear_4bit(x.bfloat16(), w, None, pack_lora(a, b))",
        "assert torch.equal(y, linear_4bit(x.bfloat16(), w, None, (a, b, 1.0)))",
        "print(y.mean().item(), add_lora(torch.ones((2, 16), device='cpu'), x, a, b, 1.0, 0.5).device)",
        "with torch.device('cpu'): model = fp.get_peft_model(torch.nn.Sequential(torch.nn.Linear(64, 16)),"
        " fp.LoraConfig(target_modules=['0']))",
        "print(model(x, adapter_names=['default', '__base__']).device)",
    )
    printed = python("import torch", "torch.set_default_device('meta')", "import pyfastpeft as fp", *use)
    assert printed == ["320.0", "cpu", "cpu"]


def test_every_name_is_there_and_listed():
    assert set(fp.__all__) <= set(dir(fp))
    for name in fp.__all__:
        assert getattr(fp, name) is vars(fp)[name]
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        fp.nothing  # noqa: B018


@pytest.mark.parametrize(
    "first",
    [
        "import pyfastpeft, transformers.modeling_utils",
        "import transformers.modeling_utils, pyfastpeft",
        "import pyfastpeft, transformers.quantizers, transformers.modeling_utils",
        "import pyfastpeft, transformers.core_model_loading, transformers.modeling_utils",
        "import pyfastpeft\nfrom transformers import AutoModelForCausalLM as Auto\nAuto.from_pretrained\n"
        "import importlib.util as u\nu.find_spec('transformers.modeling_utils')\nimport transformers.modeling_utils",
    ],
)
def test_transformers_knows_the_quantizer_whichever_comes_first(first):
    known = "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as m; print('pyfastpeft' in m)"
    assert python(first, known)[-1] == "True"


@pytest.mark.parametrize(
    "first",
    ["import pyfastpeft, sys; assert 'peft' not in sys.modules", "import transformers.trainer, peft, pyfastpeft"],
)
def test_pefts_functions_and_the_trainer_know_our_models_whichever_comes_first(first):
    pytest.importorskip("peft")
    named = "from peft import get_peft_model_state_dict as a, utils, functional, peft_model"
    same = "print(all(m.get_peft_model_state_dict is a for m in (utils, utils.save_and_load, functional, peft_model)))"
    known = "import torch; print(len(a(pyfastpeft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(2, 2)), c))))"
    config = "c = pyfastpeft.LoraConfig(target_modules=['0'])"
    imported = "import sys; print('transformers.trainer' in sys.modules)"
    trainer = "from transformers import Trainer as t; print(t._save.__name__ == '_save' and bool(t._save.__wrapped__))"
    said = python(first, named, same, config, known, imported, trainer)
    assert said == ["True", "2", str("trainer" in first), "True"]


def test_a_package_is_watched_whatever_was_imported_before(tmp_path, monkeypatch):
    for name in ("__init__", "first", "second", "part/__init__", "part/third"):
        (tmp_path / "watched" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "watched" / f"{name}.py").write_text("done = True\n")
    (tmp_path / "watched" / "folder").mkdir()  # without code
    (tmp_path / "watchedtoo.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    seen = []
    importlib.import_module("watched.first")
    when_any_imported("watched", lambda module: seen.append(module.__name__) if module.done else None)
    for name in ("watched.second", "watched.part.third", "watched.folder", "watchedtoo", "watched.second"):
        importlib.import_module(name)
    assert seen == ["watched.first", "watched.second", "watched.part", "watched.part.third"]
