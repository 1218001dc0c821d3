"""Every launch of the Triton kernels compiled for GPUs that need not be here, and held to a budget."""

import fnmatch
import importlib.util
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

COMPILED = Path(__file__).parent / "compiled"
# Whose registers the table counts: other versions hand them out otherwise, and are held to the rest. What those before
# it spill is in the table too, in bytes.
TRITON = "3.9"
# The shared memory, in bytes, that a program can have; what is compiled for 8.0 runs on 8.6 and 8.9, which have less.
TARGETS = {"cuda:80": 101376, "cuda:90": 232448, "cuda:100": 232448, "cuda:120": 101376, "hip:gfx942": 65536}
# What a kernel has, unless the table says that it lacks it: the beginnings that one of its instructions must have.
# Elements of two bytes, which rows of odd length are loaded by, are too short to be copied asynchronously.
HAS = {
    "tensor cores": ("HMMA", "HGMMA", "UTCHMMA", "v_mfma"),
    "16-byte loads": ("LDGSTS.E.BYPASS.128", "LDG.E.128", "UTMALDG", "global_load_dwordx4", "buffer_load_dwordx4"),
}
HAS_ON_CUDA = {"asynchronous copies": ("LDGSTS", "UTMALDG")}
SPILLS = ("LDL", "STL", "scratch_load", "scratch_store")


def why_not(target):
    """Why nothing can be compiled for ``target`` here, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    tools = Path(importlib.util.find_spec("triton").origin).parent / "backends/nvidia/bin"
    needed = ["ptxas", "nvdisasm", "cuobjdump"] if target.startswith("cuda") else []
    missing = [tool for tool in needed if not (tools / tool).exists()]
    return f"triton came without {', '.join(missing)}" if missing else None


def complaints(facts, budget, target):
    name, instructions = facts["name"], facts["instructions"]

    def has(*beginnings):
        return any(instruction.startswith(beginnings) for instruction in instructions)

    triton = ".".join(version("triton").split(".")[:2])
    known = budget.get("spills", {}).get(triton, {}).get(name, {}).get(target, 0)
    if facts["stack"] > known or (has(*SPILLS) and known == 0):
        yield f"{name} spills {facts['stack']} bytes"
    if triton == TRITON and facts["registers"] > budget["registers"].get(name, {}).get(target, 0):
        yield f"{name} takes {facts['registers']} registers"
    if facts["shared"] > TARGETS[target]:
        yield f"{name} takes {facts['shared']} bytes of shared memory"
    for wanted, rows in ((True, budget.get("has", {})), (False, budget.get("has not", {}))):
        for beginnings, patterns in rows.items():
            if any(fnmatch.fnmatch(name, p) for p in patterns) and has(*beginnings.split("|")) != wanted:
                yield f"{name} {'has no' if wanted else 'has'} {beginnings}"
    cuda = target.startswith("cuda")
    for what, beginnings in (HAS | HAS_ON_CUDA if cuda else HAS).items():
        lacks = ["float32*"] if what == "tensor cores" and cuda else []
        lacks += budget.get("lacks", {}).get(what, [])
        if not has(*beginnings) and not any(fnmatch.fnmatch(name, pattern) for pattern in lacks):
            yield f"{name} has no {what}"


@pytest.mark.long
@pytest.mark.parametrize("target", TARGETS)
def test_kernels_keep_to_their_budget(target, tmp_path):
    if (why := why_not(target)) is not None:
        pytest.skip(why)
    operators = sorted(p.stem for p in COMPILED.glob("*.py") if p.stem != "toolchain")
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("TRITON_INTERPRET", None)
    # Triton warns of what another version will compile otherwise.
    command = [sys.executable, "-W", "error::UserWarning", str(COMPILED / "toolchain.py"), target, *operators]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    budgets = json.loads((COMPILED / "budgets.json").read_text())
    launches = [json.loads(line) for line in done.stdout.splitlines()]
    for operator in operators:
        names = {facts["name"] for facts in launches if facts["operator"] == operator}
        assert names == set(budgets[operator]["registers"])
    wrong = [line for facts in launches for line in complaints(facts, budgets[facts["operator"]], target)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("hip", [None, "7.0"])
def test_tf32_stands_beside_float16_alone_and_never_on_amd(monkeypatch, hip):
    """Of AMD's chips only gfx942 compiles it, needed or not."""
    pytest.importorskip("triton")
    from pyfastpeft.kernels.linear_4bit import _precision

    monkeypatch.setattr(torch.version, "hip", hip)
    found = {dtype: _precision(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)}
    assert found == dict.fromkeys(found, "ieee") | ({} if hip else {torch.float16: "tf32"})
