"""The folder ``kernels/`` at the repository's root never stands in for the PyPI package ``kernels``."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def in_root(code: str, *path: Path) -> str:
    """Stdout of ``code`` run with the repository root first on sys.path, as under ``python -m``."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path)), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def installed_kernels(tmp_path):
    """A site directory with a regular package ``kernels`` and its metadata, standing in for the one on PyPI."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("def get_kernel(name, **kwargs):\n    return 'installed'\n")
    (tmp_path / "kernels-0.0.1.dist-info").mkdir()
    (tmp_path / "kernels-0.0.1.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: kernels\nVersion: 0.0.1\n"
    )
    return tmp_path


def test_an_installed_kernels_package_wins_over_the_folder(installed_kernels):
    assert in_root("import kernels; print(kernels.get_kernel('x'))", installed_kernels).strip() == "installed"


def test_transformers_probes_the_installed_package(installed_kernels):
    code = (
        "from transformers.utils.import_utils import _is_package_available as probe\n"
        "import transformers.modeling_utils\n"
        "print(*probe('kernels', return_version=True))"
    )
    assert in_root(code, installed_kernels).split() == ["True", "0.0.1"]


@pytest.mark.skipif(getattr(find_spec("kernels"), "origin", None) is not None, reason="kernels is installed")
def test_transformers_and_bitsandbytes_work_where_it_is_absent():
    code = (
        "import torch, transformers.modeling_utils, bitsandbytes\n"
        "from transformers.utils import is_kernels_available\n"
        "bitsandbytes.nn.Linear4bit(64, 64).to('cpu').eval()(torch.zeros(1, 64))\n"
        "print(is_kernels_available())"
    )
    assert in_root(code).split() == ["False"]


def test_the_folder_is_no_regular_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize("path", [[], [ROOT]], ids=["installed", "source tree"])
def test_the_kernels_are_a_part_of_the_package(path, tmp_path):
    code = "import pyfastpeft.kernels, pyfastpeft.kernels.linear_4bit as m; print(m.__file__, pyfastpeft.__file__)"
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.split()[0]).name == "linear_4bit.py"
