"""What ``import pyfastpeft`` brings along, and what it does not."""

import importlib
import subprocess
import sys

import pytest

import pyfastpeft as fp
from pyfastpeft.integrations.on_import import when_any_imported


def python(*lines):
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_transformers_is_imported_by_those_who_need_it():
    loaded = "print('transformers' in sys.modules)"
    assert python("import sys, pyfastpeft as fp", "fp.ops.linear_4bit, fp.LoraConfig()", loaded) == ["False"]
    run = "from pyfastpeft.cli import main\ntry: main(['{}'])\nexcept SystemExit: pass"
    for command in ("--help", "info"):
        assert python("import sys", run.format(command), loaded)[-1] == "False"


def test_the_compiler_is_loaded_by_those_who_compile():
    loaded = "print('torch._dynamo' in sys.modules)"
    use = "w = fp.quantize_4bit(torch.ones(16, 64))", "fp.nn.Linear4bit(64, 16)(torch.ones(1, 64)).sum()"
    assert python("import sys, torch, pyfastpeft as fp", *use, loaded) == ["False"]


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
