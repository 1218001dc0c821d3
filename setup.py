"""Builds the compiled parts: `_C`, the operators (LibTorch stable ABI), and `_native`, a torch-free pybind11 module."""

from __future__ import annotations

import importlib.util
import os
import platform
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
CPU = Path("csrc/cpu")
# One file an instruction set, each with its own flags; dispatch.cpp chooses at run time.
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c", "-mprefer-vector-width=512"]
ISA_FLAGS = {
    "x86_64": {
        "avx2.cpp": ["-mavx2", "-mfma", "-mf16c"],
        "avx512.cpp": AVX512,
        "avx512_bf16.cpp": [*AVX512, "-mavx512bf16"],
        "avx512_amx.cpp": [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
    },
    "aarch64": {"neon.cpp": []},
}
MACHINE = {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())
KERNELS = [str(CPU / name) for name in ("dispatch.cpp", "generic.cpp", *ISA_FLAGS.get(MACHINE, {}))]
OPERATORS = [
    "csrc/ops.cpp",
    "csrc/held_ops.cpp",
    "csrc/model_ops.cpp",
    "csrc/decoder_ops.cpp",
    "csrc/copy_ops.cpp",
    "csrc/attention_ops.cpp",
    "csrc/cpu/linear.cpp",
    "csrc/cpu/decoder.cpp",
    "csrc/cpu/attention_forward.cpp",
]
# -ffp-contract=off: formats are reproduced to the bit; fused multiply-adds are written where they are meant.
CXX_FLAGS = ["-O3", "-g0", "-std=c++20", "-fvisibility=hidden", "-ffp-contract=off", "-Wall"]


def torch_folder() -> Path:
    """Torch's folder, found without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise SystemExit("torch >= 2.10 is needed to build: install it first, or build with isolation")
    return Path(spec.origin).parent


class BuildExt(build_ext):
    def build_extension(self, ext: Extension) -> None:
        if ext.name.endswith("._C"):
            torch = torch_folder()
            ext.include_dirs.append(str(torch / "include"))
            ext.library_dirs.append(str(torch / "lib"))
            ext.libraries.append("torch_cpu")
        else:
            import pybind11

            ext.include_dirs.append(pybind11.get_include())
        flags = {str(CPU / name): extra for name, extra in ISA_FLAGS.get(MACHINE, {}).items()}
        temp, self.build_temp = self.build_temp, os.path.join(self.build_temp, ext.name)
        own = [source for source in ext.sources if source in flags]
        ext.sources = [source for source in ext.sources if source not in flags]
        try:
            for source in own:
                ext.extra_objects += self.compiler.compile(
                    [source], self.build_temp, include_dirs=["csrc"], extra_postargs=CXX_FLAGS + flags[source]
                )
            super().build_extension(ext)
        finally:
            self.build_temp = temp

    def get_ext_filename(self, fullname: str) -> str:
        # _C is a library of operators, not a Python module: one file for every CPython.
        if fullname.endswith("_C"):
            return os.path.join(*fullname.split(".")) + ".abi3.so"
        return super().get_ext_filename(fullname)

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return [] if ext.name.endswith("._C") else super().get_export_symbols(ext)


def extension(name: str, sources: list[str], macros: list[tuple[str, str]]) -> Extension:
    return Extension(
        f"pyfastpeft.{name}",
        sources + KERNELS,
        include_dirs=["csrc"],
        define_macros=macros,
        extra_compile_args=CXX_FLAGS,
        extra_link_args=["-s"],
        depends=[str(p) for p in ROOT.glob("csrc/**/*.h")],
    )


# Folders at the root that are packages of pyfastpeft when it is installed.
package_dir = {"pyfastpeft.kernels": "kernels", "pyfastpeft.bench": "bench"}
packages = ["pyfastpeft", *package_dir, "pyfastpeft.bench.contenders"]
packages += sorted(".".join(path.parent.relative_to(ROOT).parts) for path in ROOT.glob("pyfastpeft/*/**/__init__.py"))
setup(
    packages=packages,
    package_dir=package_dir,
    package_data={"pyfastpeft": ["data/**/*"], "pyfastpeft.kernels": ["*.md"]},
    ext_modules=[
        extension("_C", OPERATORS, [("TORCH_TARGET_VERSION", "0x020a000000000000")]),
        extension("_native", ["csrc/native.cpp", "csrc/cpu/limits.cpp"], [("PF_CUDA_VERSION", '""')]),
    ],
    cmdclass={"build_ext": BuildExt},
)
