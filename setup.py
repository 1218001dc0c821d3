"""Builds the compiled parts: `_C`, the operators (LibTorch stable ABI); `_native`, a torch-free pybind11 module; and,
where nvcc is, `libpyfastpeft_cuda`, the CUDA kernels behind a C ABI.

PYFASTPEFT_CUDA: "0" leaves the kernels out; "all" compiles them for every GPU in ARCHITECTURES, "8.0;9.0" for those.
Unset: for the GPUs that are here, for all where none is. CUDA_HOME chooses the toolkit (12.4 or newer).
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
CPU = Path("csrc/cpu")
# One file an instruction set, each with its own flags; dispatch.cpp chooses at run time.
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c", "-mprefer-vector-width=512"]
ISA_FLAGS = {
    "x86_64": {
        "avx512_bf16.cpp": [*AVX512, "-mavx512bf16"],
        "avx512_bf16x2.cpp": [*AVX512, "-mavx512bf16"],
        "avx512_amx.cpp": [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
        "avx512.cpp": AVX512,
        "avx2.cpp": ["-mavx2", "-mfma", "-mf16c"],
    },
    "aarch64": {"neon.cpp": []},
}
MACHINE = {"arm64": "aarch64"}.get(platform.machine(), platform.machine())
FLAGS = {str(CPU / name): flags for name, flags in ISA_FLAGS.get(MACHINE, {}).items()}
KERNELS = [*FLAGS, str(CPU / "generic.cpp"), str(CPU / "dispatch.cpp")]
OPERATORS = [
    "csrc/ops.cpp",
    "csrc/held_ops.cpp",
    "csrc/model_ops.cpp",
    "csrc/decoder_ops.cpp",
    "csrc/copy_ops.cpp",
    "csrc/attention_ops.cpp",
    "csrc/cuda_ops.cpp",
    "csrc/cpu/linear.cpp",
    "csrc/cpu/layout.cpp",
    "csrc/cpu/decoder.cpp",
    "csrc/cpu/attention_forward.cpp",
]
# -ffp-contract=off: formats are reproduced to the bit; fused multiply-adds are written where they are meant.
CXX_FLAGS = ["-O3", "-g0", "-std=c++20", "-fvisibility=hidden", "-ffp-contract=off", "-Wall"]

OLDEST_TOOLKIT = (12, 4)  # the first with __maxnreg__
ARCHITECTURES = ["8.0", "8.6", "8.9", "9.0a", "10.0", "12.0"]
# Whose PTX is theirs but for a name: it is compiled once, which halves what nvcc does.
FRONT_END = {"8.6": "8.0", "8.9": "8.0", "12.0": "10.0"}
# The longest to compile first.
CUDA = [str(p.relative_to(ROOT)) for p in sorted(ROOT.glob("csrc/cuda/*.cu"), key=lambda p: -p.stat().st_size)]
CUDA_LIBRARY = "pyfastpeft.libpyfastpeft_cuda"


def torch_folder() -> Path:
    """Torch's folder, found without importing it."""
    spec = importlib.util.find_spec("torch")
    found = None if spec is None or spec.origin is None else importlib.metadata.version("torch")
    if found is None or tuple(map(int, found.split(".")[:2])) < (2, 10):
        raise SystemExit(f"torch >= 2.10 is needed to build, here is {found}: install it, or build with isolation")
    return Path(spec.origin).parent


def find_nvcc() -> str | None:
    """Of CUDA_HOME, else of where CUDA's installer puts it, else on the PATH."""
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    return shutil.which(os.path.join(home, "bin", "nvcc")) or shutil.which("nvcc")


def capabilities_here() -> list[tuple[int, int]]:
    """The compute capabilities of this machine's GPUs."""
    try:
        command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        found = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [(int(major), int(minor)) for major, minor in re.findall(r"^(\d+)\.(\d+)$", found, re.M)]


def version(text: str) -> tuple[int, int]:
    major, minor = text.split(".")
    return int(major), int(minor)


def parsed(architecture: str) -> tuple[int, int]:
    return version(architecture.removesuffix("a"))


def serving(capability: tuple[int, int], known: list[str]) -> str | None:
    """Of ``known`` the one for a GPU: of its generation, else the oldest, whose PTX newer GPUs compile."""
    own = [a for a in known if parsed(a)[0] == capability[0] and parsed(a) <= capability]
    return own[-1] if own else known[0] if capability > parsed(known[0]) else None


def no_kernels(nvcc: str | None) -> str | None:
    """Why the CUDA kernels cannot be compiled; None where they can."""
    if nvcc is None:
        return "there is no nvcc in CUDA_HOME, in /usr/local/cuda or on the PATH"
    found, oldest = toolkit_version(nvcc), ".".join(map(str, OLDEST_TOOLKIT))
    return f"{nvcc} is of CUDA {found}; it must be {oldest} or newer" if version(found) < OLDEST_TOOLKIT else None


def chosen_architectures(nvcc: str | None) -> list[str]:
    """What the CUDA kernels are compiled for, oldest first; empty: they are not."""
    wanted = os.environ.get("PYFASTPEFT_CUDA", "")
    if wanted == "0":
        return []
    if (why := no_kernels(nvcc)) is not None:
        if wanted:
            raise SystemExit(f"PYFASTPEFT_CUDA is {wanted!r}, but {why}")
        print(f"pyfastpeft: built without CUDA kernels, as {why}")
        return []
    if wanted in ("", "all"):
        codes = subprocess.run([nvcc, "--list-gpu-code"], check=True, capture_output=True, text=True).stdout
        known = [a for a in ARCHITECTURES if f"sm_{''.join(map(str, parsed(a)))}\n" in codes]
        here = [] if wanted else capabilities_here()
        return sorted({a for c in here if (a := serving(c, known)) is not None}, key=parsed) if here else known
    asked = [a.strip() for a in wanted.split(";")]
    names = {a.removesuffix("a"): a for a in ARCHITECTURES}
    if not set(asked) <= {*names, *ARCHITECTURES}:
        choices = ", ".join(ARCHITECTURES)
        raise SystemExit(f"PYFASTPEFT_CUDA is {wanted!r}; it must be 0, all, or some of {choices}, separated by ';'")
    return sorted({names[a.removesuffix("a")] for a in asked}, key=parsed)


def nvcc_flags(source: str, architectures: list[str]) -> list[str]:
    gpus = [("8.0", "compute_80")]  # what GPUs of other generations compile for themselves
    if source.endswith("_sm90.cu"):  # empty for all but Hopper; its host code is wanted everywhere
        gpus, architectures = [], ["9.0a"] if "9.0a" in architectures else architectures[:1]
    gpus += [(FRONT_END.get(a, a), "sm_" + a.replace(".", "")) for a in architectures]
    return [
        *("-O3", "-std=c++20", "--threads", str(os.cpu_count()), "-Icsrc", "-Xcompiler", "-fPIC,-g0,-Wall"),
        *(f"-gencode=arch=compute_{front_end.replace('.', '')},code={code}" for front_end, code in gpus),
    ]


def toolkit_version(nvcc: str) -> str:
    said = subprocess.run([nvcc, "--version"], check=True, capture_output=True, text=True).stdout
    return re.search(r"release (\d+\.\d+)", said).group(1)


class BuildExt(build_ext):
    def run(self) -> None:
        self.nvcc = find_nvcc()
        self.architectures = chosen_architectures(self.nvcc)
        if not self.architectures:
            self.extensions = [ext for ext in self.extensions if ext.name != CUDA_LIBRARY]
        if importlib.util.find_spec("pybind11") is None:
            print("pyfastpeft: pybind11 is not here, so it is built without _native (see pyfastpeft info)")
            self.extensions = [ext for ext in self.extensions if ext.name != "pyfastpeft._native"]
        super().run()

    def build_extensions(self) -> None:
        """Compiles all files at once, those that two libraries share once; then links."""
        for ext in self.extensions:
            self.complete(ext)
        jobs: dict[tuple[str, str], Future] = {}
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for ext in self.extensions:
                for source in ext.sources:
                    folder = "kernels" if source in KERNELS else ext.name
                    if (folder, source) not in jobs:
                        where = os.path.join(self.build_temp, folder)
                        jobs[folder, source] = pool.submit(self.compiled, ext, source, where)
                    ext.extra_objects.append(jobs[folder, source])
        for ext in self.extensions:
            ext.extra_objects = [job.result() for job in ext.extra_objects]
            ext.depends, ext.sources = ext.extra_objects, []
        super().build_extensions()

    def complete(self, ext: Extension) -> None:
        """What is known only when there is something to build."""
        if ext.name == "pyfastpeft._C":
            folder = torch_folder()
            ext.include_dirs.append(str(folder / "include"))
            ext.library_dirs.append(str(folder / "lib"))
            ext.libraries.append("torch_cpu")
        elif ext.name == "pyfastpeft._native":
            import pybind11

            ext.include_dirs.append(pybind11.get_include())
            version = toolkit_version(self.nvcc) if self.architectures else ""
            ext.define_macros.append(("PF_CUDA_VERSION", f'"{version}"'))

    def compiled(self, ext: Extension, source: str, folder: str) -> str:
        """The object file of ``source``, which is compiled where it is not there or older."""
        if ext.name == CUDA_LIBRARY:
            # Another choice of architectures is another object.
            folder = os.path.join(folder, *self.architectures)
        target = os.path.join(folder, os.path.splitext(source)[0] + ".o")
        newest = max(os.path.getmtime(file) for file in (source, *ext.depends))
        if not self.force and os.path.exists(target) and os.path.getmtime(target) > newest:
            return target
        if ext.name == CUDA_LIBRARY:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            names = f'-DPF_CUDA_ARCHITECTURES="{" ".join(self.architectures)}"'
            self.spawn([self.nvcc, *nvcc_flags(source, self.architectures), names, "-c", source, "-o", target])
        else:
            flags = CXX_FLAGS + FLAGS.get(source, [])
            macros = [] if source in KERNELS else ext.define_macros
            self.compiler.compile([source], folder, macros, ext.include_dirs, extra_postargs=flags)
        return target

    def build_extension(self, ext: Extension) -> None:
        if ext.name != CUDA_LIBRARY:
            return super().build_extension(ext)
        target = self.get_ext_fullpath(ext.name)
        self.mkpath(os.path.dirname(target))
        # In packages the toolkit's lib64 is called lib. Torch has a CUDA runtime of its own: this one is hidden.
        libraries = ["-cudart", "static", "-L" + os.path.join(os.path.dirname(self.nvcc), "..", "lib")]
        linker = ["-Xlinker", "--exclude-libs=ALL", "-Xlinker", "-s"]
        self.spawn([self.nvcc, "-shared", *libraries, *linker, *ext.extra_objects, "-o", target])

    def get_ext_filename(self, fullname: str) -> str:
        # _C and the CUDA kernels are no Python modules: one file for every CPython.
        for name, suffix in (("_C", ".abi3.so"), ("libpyfastpeft_cuda", ".so")):
            if fullname.rpartition(".")[2] == name:
                return os.path.join(*fullname.split(".")) + suffix
        return super().get_ext_filename(fullname)

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return [] if ext.name.endswith("._C") else super().get_export_symbols(ext)


class WithoutPyproject(setuptools.Distribution):
    """Before 77 setuptools refuses the license in pyproject.toml, of which building in place needs nothing."""

    def parse_config_files(self, *_: object, **__: object) -> None:
        pass


def extension(name: str, sources: list[str], macros: list[tuple[str, str]]) -> Extension:
    return Extension(
        name,
        sources,
        include_dirs=["csrc"],
        define_macros=macros,
        language="c++",
        extra_link_args=["-s"],
        depends=[str(p) for pattern in ("csrc/**/*.h", "csrc/**/*.cuh") for p in ROOT.glob(pattern)],
    )


# Folders at the root that are packages of pyfastpeft when it is installed.
package_dir = {"pyfastpeft.kernels": "kernels", "pyfastpeft.bench": "bench"}
packages = ["pyfastpeft", *package_dir, "pyfastpeft.bench.contenders"]
packages += sorted(".".join(path.parent.relative_to(ROOT).parts) for path in ROOT.glob("pyfastpeft/*/**/__init__.py"))
in_place = "build_ext" in sys.argv and int(setuptools.__version__.split(".")[0]) < 77
setup(
    distclass=WithoutPyproject if in_place else setuptools.Distribution,
    packages=packages,
    package_dir=package_dir,
    include_package_data=False,  # what MANIFEST.in adds is for the source distribution
    package_data={"pyfastpeft": ["py.typed", "data/**/*"], "pyfastpeft.kernels": ["*.md"]},
    # The longest to compile first.
    ext_modules=[
        extension(CUDA_LIBRARY, CUDA, []),
        extension("pyfastpeft._C", KERNELS + OPERATORS, [("TORCH_TARGET_VERSION", "0x020a000000000000")]),
        extension("pyfastpeft._native", [*KERNELS, "csrc/native.cpp", "csrc/cpu/limits.cpp"], []),
    ],
    cmdclass={"build_ext": BuildExt},
)
