"""Every Triton kernel in Triton's interpreter: what it computes, with no GPU."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECKS = Path(__file__).parent / "interpreted"


@pytest.mark.long
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_kernels_compute_what_they_promise():
    """In one process of their own: triton decides when it is imported whether it interprets or compiles, and what all
    of them import takes some seconds."""
    checks = sorted(str(p) for p in CHECKS.glob("*.py") if p.stem != "repair")
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYFASTPEFT_BACKEND": "triton", "OMP_NUM_THREADS": "1"}
    # The checks share helpers with the tests beside this file.
    environment["PYTHONPATH"] = os.pathsep.join([str(CHECKS.parent), str(CHECKS), *sys.path])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *checks]
    done = subprocess.run(command, env=environment, cwd=CHECKS.parent.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
