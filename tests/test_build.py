"""What the build decides about CUDA, and what the operators find of it when they run."""

import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import setuptools
import torch

ROOT = Path(__file__).parent.parent


@pytest.fixture
def build(monkeypatch):
    """setup.py, without setting anything up; ``given``: what it would be from."""
    given = {}
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: given.update(arguments))
    spec = importlib.util.spec_from_file_location("build_of_pyfastpeft", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.delenv("PYFASTPEFT_CUDA", raising=False)
    module.given, module.asked_driver = given, module.capabilities_here
    monkeypatch.setattr(module, "capabilities_here", lambda: [])
    return module


def toolkit(folder, version, known):
    """An nvcc that only says what it is, and which GPUs it has code for."""
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir(exist_ok=True)
    codes = "\n".join("sm_" + name.replace(".", "") for name in known.split())
    said = f"Cuda compilation tools, release {version}, V{version}.0"
    nvcc.write_text(f"#!/bin/sh\n[ $1 = --version ] && echo '{said}' || echo '{codes}'\n")
    nvcc.chmod(0o755)
    return str(nvcc)


@pytest.fixture
def nvcc(tmp_path):
    return toolkit(tmp_path, "13.0", "7.5 8.0 8.6 8.9 9.0 10.0 12.0")


@pytest.fixture
def old_setuptools(monkeypatch):
    monkeypatch.setattr(setuptools, "__version__", "68.1.2")
    monkeypatch.setattr(sys, "argv", ["setup.py", "-q", "build_ext", "--inplace"])


def test_setuptools_that_refuses_pyproject_builds_in_place(old_setuptools, build):
    distribution = build.given["distclass"]({"ext_modules": build.given["ext_modules"]})
    distribution.parse_config_files()
    assert distribution.metadata.name is None and distribution.has_ext_modules()


@pytest.mark.parametrize(
    ("capability", "architecture"),
    [
        ((7, 5), None),
        ((8, 0), "8.0"),
        ((8, 7), "8.6"),
        ((8, 9), "8.9"),
        ((9, 0), "9.0a"),
        ((10, 3), "10.0"),
        ((11, 0), "8.0"),  # by its PTX
        ((12, 1), "12.0"),
        ((13, 0), "8.0"),
    ],
)
def test_a_source_build_is_for_the_gpus_that_are_here(build, nvcc, monkeypatch, capability, architecture):
    monkeypatch.setattr(build, "capabilities_here", lambda: [capability, capability])
    assert build.chosen_architectures(nvcc) == ([] if architecture is None else [architecture])


@pytest.mark.parametrize("error", [FileNotFoundError("nvidia-smi"), subprocess.TimeoutExpired("nvidia-smi", 60)])
def test_where_the_driver_does_not_answer_no_gpu_is_here(build, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(subprocess, "run", fail)
    assert build.asked_driver() == []


def test_a_gpu_newer_than_the_toolkit_gets_the_oldest_code(build, tmp_path, monkeypatch):
    nvcc = toolkit(tmp_path, "12.4", "8.0 8.6 8.9 9.0")
    for capability, architecture in (((12, 0), "8.0"), ((10, 0), "8.0"), ((9, 0), "9.0a")):
        monkeypatch.setattr(build, "capabilities_here", lambda found=capability: [found])
        assert build.chosen_architectures(nvcc) == [architecture]


def test_the_environment_chooses_architectures(build, nvcc, monkeypatch):
    assert build.chosen_architectures(nvcc) == build.ARCHITECTURES
    for wanted, chosen in (("0", []), ("9.0", ["9.0a"]), ("9.0a; 8.0", ["8.0", "9.0a"]), ("12.0;8.9", ["8.9", "12.0"])):
        monkeypatch.setenv("PYFASTPEFT_CUDA", wanted)
        assert build.chosen_architectures(nvcc) == chosen
    for wanted in ("7.5", "yes", "8.0,9.0"):
        monkeypatch.setenv("PYFASTPEFT_CUDA", wanted)
        with pytest.raises(SystemExit, match=f"PYFASTPEFT_CUDA is '{wanted}'; it must be 0, all, or some of 8.0"):
            build.chosen_architectures(nvcc)


def codes(flags):
    """The code for each real GPU, or PTX, and the PTX that it is made from."""
    pairs = [re.fullmatch(r"-gencode=arch=compute_(\w+),code=(\w+)", flag) for flag in flags]
    return {m[2]: m[1] for m in pairs if m}


def test_each_architecture_has_its_code_and_gpus_of_other_generations_find_ptx(build):
    made_from = codes(build.nvcc_flags("csrc/cuda/linear_4bit.cu", build.ARCHITECTURES))
    assert made_from == {
        **{"compute_80": "80", "sm_80": "80", "sm_86": "80", "sm_89": "80", "sm_90a": "90a"},
        **{"sm_100": "100", "sm_120": "100"},
    }
    assert codes(build.nvcc_flags("csrc/cuda/linear_4bit.cu", ["12.0"])) == {"compute_80": "80", "sm_120": "100"}
    # What only Hopper runs is compiled for it alone; without it, once, for the host code.
    for_hopper = "csrc/cuda/linear_4bit_sm90.cu"
    assert codes(build.nvcc_flags(for_hopper, build.ARCHITECTURES)) == {"sm_90a": "90a"}
    assert codes(build.nvcc_flags(for_hopper, ["8.6", "12.0"])) == {"sm_86": "80"}


def test_architectures_whose_ptx_is_compiled_once_have_the_same(build, tmp_path):
    """By the source that compiles soonest."""
    if (nvcc := build.find_nvcc()) is None:
        pytest.skip("nvcc is in neither CUDA_HOME, /usr/local/cuda nor PATH")

    @functools.cache
    def ptx(architecture):
        target = tmp_path / architecture
        virtual = f"compute_{architecture.replace('.', '')}"
        command = [nvcc, "-O3", "-std=c++20", "-Icsrc", f"-arch={virtual}", "-ptx", "-o", target]
        subprocess.run([*command, "csrc/cuda/quantize_4bit.cu"], check=True, cwd=ROOT)
        return re.sub(r"^\.target .*", "", target.read_text(), flags=re.M)

    for architecture, front_end in build.FRONT_END.items():
        assert ptx(architecture) == ptx(front_end)


@pytest.mark.parametrize("found", [None, "12.3", "11.8"])
def test_without_nvcc_that_serves_the_build_goes_on_unless_kernels_were_asked_for(
    build, monkeypatch, capsys, tmp_path, found
):
    nvcc = found and toolkit(tmp_path, found, "8.0 9.0")
    why = "there is no nvcc" if found is None else f"{nvcc} is of CUDA {found}; it must be 12.4 or newer"
    assert build.chosen_architectures(nvcc) == []
    assert f"built without CUDA kernels, as {why}" in capsys.readouterr().out
    monkeypatch.setenv("PYFASTPEFT_CUDA", "all")
    with pytest.raises(SystemExit, match=f"PYFASTPEFT_CUDA is 'all', but {why}"):
        build.chosen_architectures(nvcc)


def test_a_toolkit_is_found_where_it_says(build, nvcc, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert build.find_nvcc() == nvcc
    assert build.toolkit_version(nvcc) == "13.0"


def test_the_sdist_has_all_that_is_built_and_tested(tmp_path):
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("this is no git checkout")
    files = {name for name in listing.stdout.split("\0") if name and (ROOT / name).exists()}
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    subprocess.run([sys.executable, "setup.py", "-q", "sdist"], check=True, cwd=tmp_path, capture_output=True)
    (archive,) = (tmp_path / "dist").iterdir()
    with tarfile.open(archive) as packed:
        held = {name.partition("/")[2] for name in packed.getnames()}
    assert {name for name in files - held if not name.startswith(".git")} == set()


KERNELS = ROOT / "pyfastpeft" / "libpyfastpeft_cuda.so"


@pytest.mark.skipif(not KERNELS.exists(), reason="built without CUDA kernels")
@pytest.mark.skipif(torch.version.cuda is not None, reason="torch has a CUDA half of its own")
@pytest.mark.parametrize(
    ("driver", "capability", "missing"),
    [
        (12080, (9, 0), "NVIDIA's driver serves CUDA 12.8 at most; the kernels were built with 13."),
        (99000, (7, 5), "the GPU has compute capability 7.5, the CUDA kernels were built for "),
        (99000, (8, 6), ""),
        (99000, (99, 0), ""),
    ],
)
def test_an_old_driver_or_gpu_is_named_before_anything_is_launched(tmp_path, driver, capability, missing):
    """With libraries that stand in for the driver and for torch's CUDA half."""
    of_driver = (
        f"int cuDriverGetVersion(int* v) {{ *v = {driver}; return 0; }} int cuStreamIsCapturing() {{ return 0; }}"
    )
    of_torch = "int aoti_torch_get_current_cuda_stream() { return 0; }"
    sources = {"libcuda.so.1": of_driver, "libtorch_cuda.so": of_torch}
    for name, source in sources.items():
        command = ["gcc", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-x", "c", "-", "-o", str(tmp_path / name)]
        subprocess.run(command, input=source, text=True, check=True)
    code = f"import ctypes; ctypes.CDLL({str(tmp_path / 'libtorch_cuda.so')!r}); import torch, pyfastpeft; "
    code += f"print('missing:', torch.ops.pyfastpeft.cuda_missing(*{capability}))"
    environment = os.environ | {"LD_LIBRARY_PATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = done.stdout.partition("missing: ")[2].strip()
    assert said.startswith(missing) if missing else said == ""
