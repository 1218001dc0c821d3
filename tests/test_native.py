"""The AArch64 kernels, cross-compiled and run under an emulator; elsewhere nothing in the suite could see them."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
SOURCES = [f"csrc/cpu/{name}.cpp" for name in ("dispatch", "generic", "neon", "linear", "layout", "attention_forward")]


@pytest.mark.long
@pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"{COMPILER} is not installed")
@pytest.mark.skipif(shutil.which(EMULATOR) is None, reason=f"{EMULATOR} is not installed")
def test_neon_kernels_agree_with_float64_and_their_formats_with_the_generic_ones(tmp_path):
    program = tmp_path / "kernels_check"
    flags = ["-O2", "-std=c++20", "-ffp-contract=off", "-static", "-Icsrc"]
    sources = ["tests/native/kernels_check.cpp", *SOURCES]
    built = subprocess.run(
        [COMPILER, *flags, *sources, "-o", program], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert built.returncode == 0, built.stderr
    for cpu in ("cortex-a57", "max"):  # without and with the dot products of 8 bits
        ran = subprocess.run([EMULATOR, "-cpu", cpu, program], capture_output=True, text=True, timeout=300)
        assert ran.returncode == 0, ran.stdout + ran.stderr
        assert "checked neon" in ran.stdout
