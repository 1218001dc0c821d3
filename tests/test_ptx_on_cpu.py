"""The PTX that compilers emitted for GPUs, run on the CPU and held to float64: see ptx_on_cpu/."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CHECKS = Path(__file__).parent / "ptx_on_cpu"
TARGETS = ["cuda:80", "cuda:90"]
NVCC = shutil.which(os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin", "nvcc")) or shutil.which("nvcc")
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(shutil.which(os.environ.get("CXX", "c++")) is None, reason="no C++ compiler is here"),
]


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """A folder for what the checks compile and have in common."""
    return tmp_path_factory.mktemp("ptx")


def run_checks(names, compiled, tmp_path, **variables):
    """In a process of their own: triton decides when it is imported for which GPU it compiles."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | variables
    environment |= {"TRITON_CACHE_DIR": str(tmp_path / "triton"), "TMPDIR": str(tmp_path), "PTX_FOLDER": str(compiled)}
    environment["PYTHONPATH"] = os.pathsep.join([str(CHECKS.parent), str(CHECKS), *sys.path])
    environment.pop("TRITON_INTERPRET", None)
    files = [str(CHECKS / f"{name}.py") for name in names]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, env=environment, cwd=CHECKS.parent.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("target", TARGETS)
def test_triton_kernels_compute_what_they_promise(target, compiled, tmp_path):
    operators = ["linear_4bit", "prefix_attention", "small_operators"]
    run_checks(operators, compiled, tmp_path, PTX_TARGET=target, PYFASTPEFT_BACKEND="triton")


@pytest.mark.skipif(NVCC is None, reason="nvcc is in neither CUDA_HOME, /usr/local/cuda nor PATH")
@pytest.mark.parametrize("target", TARGETS)
def test_cuda_kernels_compute_what_they_promise(target, compiled, tmp_path):
    run_checks(["cuda_kernels"], compiled, tmp_path, PTX_TARGET=target, NVCC=NVCC)
