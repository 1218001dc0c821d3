"""The benchmarks run, and write what they say they write; no test looks at a time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parent.parent / "bench"


def run_bench(script, tmp_path, *args):
    out = tmp_path / "out.json"
    command = [sys.executable, BENCH / script, *args, "--out", str(out)]
    package = Path(sys.modules["pyfastpeft"].__file__).parent.parent
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHONPATH": str(package)}
    )
    assert result.returncode == 0, result.stderr
    payload = json.loads(out.read_text())
    assert payload["machine"]["isa"][-1] == "generic"
    return payload


@pytest.mark.parametrize("train", [[], ["--train"]], ids=["forward", "train"])
def test_linear_reports_each_contender_with_its_error(tmp_path, train):
    contenders = "ours_nf4,ours_nf4_lora,ours_int4,torch_dense"
    args = ["--shapes", "576x1536", "--M", "1,20", "--threads", "1", "--rounds", "1", "--only", contenders]
    payload = run_bench("linear.py", tmp_path, *args, *train)
    assert {(r["name"], r["m"]) for r in payload["records"]} == {(n, m) for n in contenders.split(",") for m in (1, 20)}
    assert all(0 < r["error"] < 4e-3 for r in payload["records"])
    assert payload["limits"]["1"]["read_gb_s"] > 0


def test_quantize_reports_both_directions(tmp_path):
    payload = run_bench("quantize.py", tmp_path, "--threads", "1", "--shape", "256x256", "--rounds", "1")
    assert {"ours.quantize", "ours.dequantize"} <= {r["name"] for r in payload["records"]}


def test_qlora_step_trains_every_contender_to_the_same_loss(tmp_path):
    args = ["--model", "tiny", "--batch", "2", "--length", "16", "--rounds", "1", "--threads", "1"]
    contenders = run_bench("qlora_step.py", tmp_path, *args)["result"]["contenders"]
    first = [row["first_losses"][0] for row in contenders.values()]
    assert max(first) - min(first) < 2e-2
    assert all(row["peak_mb"] > 0 for row in contenders.values())


def test_hotswap_reports_every_way_to_exchange_an_adapter(tmp_path):
    rows = run_bench("hotswap.py", tmp_path, "--model", "tiny", "--rounds", "1")["rows"]
    assert {"ours: set_adapter, r = 8 on q, v", "ours: hotswap from memory, r = 16 on all"} <= set(rows)
