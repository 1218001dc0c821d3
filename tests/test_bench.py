"""The benchmarks run, and say what they measured and what they did not; no test looks at a time."""

import argparse
import functools
import importlib.util
import json
import os
import re
import runpy
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

import pyfastpeft as fp
from pyfastpeft import _native
from pyfastpeft.cli import main
from pyfastpeft.cli.bench import full

BENCH = full.__package__  # pyfastpeft.bench where that is installed, else the folder beside the package
ROOT = Path(__file__).parent.parent
linear = importlib.import_module(f"{BENCH}.linear")
registry = importlib.import_module(f"{BENCH}.registry")
report = importlib.import_module(f"{BENCH}.report")
targets = importlib.import_module(f"{BENCH}.targets")
RECORD = {
    "name": str, "package": str, "tier": str, "dtype": str, "rank": int, "adapters": int, "m": int, "k": int, "n": int,
    "threads": int, "train": bool, "us": float, "us_best": float, "spread": float, "rounds": int, "gb_s": float,
    "gflop_s": float, "error": float, "nbytes": int, "other_load_cores": float, "samples_us": list, "part": int,
}  # fmt: skip
LIMITS = functools.cache(linear.harness.limits)
PEERS = {"bitsandbytes", "peft", "torchao", "onnxruntime", "onnx", "openvino", "llama_cpp"}


@pytest.fixture(autouse=True)
def limits_measured_once(monkeypatch):
    """They take longer than what these tests measure."""
    monkeypatch.setattr(linear.harness, "limits", LIMITS)


@pytest.fixture(autouse=True)
def threads_of_the_tests_that_follow():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class Page(HTMLParser):
    """Checks that tags nest, and gathers the text and what the page would load."""

    def __init__(self, text):
        super().__init__()
        self.open, self.text, self.links = [], "", []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "br"):
            self.open.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href")]

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def run_bench(tmp_path, monkeypatch):
    """``run_bench(module, *args)``: what a benchmark writes, run as by ``python -m``."""

    def run(module, *args):
        out = tmp_path / "out.json"
        monkeypatch.setattr(sys, "argv", [module, *args, "--out", str(out)])
        monkeypatch.delitem(sys.modules, f"{BENCH}.{module}", raising=False)
        runpy.run_module(f"{BENCH}.{module}", run_name="__main__", alter_sys=True)
        payload = json.loads(out.read_text())
        assert payload["machine"]["isa"][-1] == "generic"
        return payload

    return run


def small(names, rows=(1, 20), dtypes=("bf16", "fp32"), ranks=(0,), adapters=(1,), train=False, rotate=0):
    torch.manual_seed(0)
    chosen = registry.select(names, dtypes, ranks, adapters, train)
    return linear.measure(registry.Weight(512, 96), rows, chosen.cases, 1, 1, train, rotate=rotate)


def page_of(*results):
    """The report of several passes."""
    whole = linear.Result()
    for number, result in enumerate(results):
        for entry in (*result.records, *result.limits):
            entry["part"] = number
        whole += result
    return Page(report.html(whole.payload()))


def test_the_limits_name_what_this_cpu_lacks():
    limits = _native.limits(1)
    assert limits["read_gb_s"] > 0 and limits["fp32_gflop_s"] > 0
    features = _native.cpu_features()
    assert (limits["bf16_gflop_s"] is None) == ("avx512bf16" not in features)
    assert (limits["int8_gop_s"] is None) == ("avx512vnni" not in features)
    with pytest.raises(ValueError, match="threads must lie in"):
        _native.limits(0)


def test_the_registry_has_every_peer():
    packages = {entry.package for entry in registry.REGISTRY.values()}
    assert packages == set(report.PACKAGES)
    assert {package for entry in registry.REGISTRY.values() for package in entry.requires} == PEERS
    assert all(entry.over in ("", *registry.REGISTRY) for entry in registry.REGISTRY.values())


def test_every_contender_is_right_or_named():
    """The error of each is what its arithmetic gives, so that its time is of the right product."""
    names = list(registry.REGISTRY)
    result = small(names, ranks=(0, 8), adapters=(1, 4))
    for r in result.records:
        # In eval mode bitsandbytes computes in bf16, whatever x is; this package keeps packed adapters in bf16.
        bf16 = r["dtype"] == "bf16" or r["rank"] or r["name"].startswith("bnb")
        assert r["error"] <= (1e-2 if r["tier"] == "int8" else 5e-3 if bf16 else 1e-5), r
    absent = set(registry.select(names, ("bf16", "fp32"), (0, 8)).absent)
    seen = {r["name"] for r in result.records} | {a["name"] for a in result.absent} | absent
    assert seen == set(names)
    assert all(a["reason"] for a in result.absent)


@pytest.mark.parametrize(
    ("asked", "reasons"),
    [
        ({"dtypes": ["bf16"]}, {"ours_nf4_packed": "a LoRA branch only", "ggml_q4_0": "x in fp32 only"}),
        ({"ranks": [8]}, {"ggml_q4_0": "no LoRA branch"}),
        ({"train": True}, {"ours_nf4_packed": "no gradients", "ggml_q4_0": "no gradients"}),
    ],
)
def test_a_contender_that_has_nothing_of_what_is_asked_is_named(monkeypatch, asked, reasons):
    monkeypatch.setattr(registry.harness, "missing", lambda *packages: "")
    names = ["ours_nf4", "ours_nf4_packed", "ggml_q4_0"]
    assert registry.select(names, **{"dtypes": ["bf16", "fp32"], **asked}).absent == reasons


@pytest.mark.parametrize(("mode", "dtype"), [("eval", torch.float32), ("train", torch.bfloat16)])
def test_bitsandbytes_is_held_against_the_weight_that_it_uses(mode, dtype):
    pytest.importorskip("bitsandbytes")
    problem = registry.Problem(registry.Weight(512, 96), torch.bfloat16)
    layer = registry.REGISTRY[f"bnb_nf4_{mode}"].prepare(problem)
    exact = fp.quantize_4bit(problem.weight.dense.bfloat16()).dequantize(torch.float32)
    torch.testing.assert_close(layer.weight(), exact.to(dtype).double(), rtol=1e-6, atol=0)


def test_gradients_are_held_against_float64_too():
    names = [name for name, entry in registry.REGISTRY.items() if entry.trains]
    result = small(names, ranks=(0, 8), train=True)
    assert {"ours_nf4", "torch_dense"} <= {r["name"] for r in result.records}
    assert all(r["train"] and r["error"] < 4e-3 for r in result.records)


def test_a_call_adds_to_no_earlier_calls_gradients(monkeypatch):
    fresh = []

    def prepare(p):
        w, a = p.weight.dense, torch.ones(1, requires_grad=True)

        def call(x):
            fresh.append(x.grad is None and a.grad is None)
            return a * (x @ w.t())

        return registry.Layer(call, w.nbytes, w.double, (a,))

    monkeypatch.setitem(registry.REGISTRY, "seen", registry.Contender(prepare, "ours", trains=True))
    (record,) = small(["seen"], rows=(1,), dtypes=("fp32",), train=True).records
    assert record["error"] < 1e-5
    assert len(fresh) > 2 and all(fresh)


def test_a_wrong_contender_is_seen(monkeypatch):
    def prepare(p):
        w = p.weight.dense.to(p.dtype)
        return registry.Layer(lambda x: 1.1 * x @ w.t(), w.nbytes, w.double)

    monkeypatch.setitem(registry.REGISTRY, "wrong", registry.Contender(prepare, "ours"))
    assert all(r["error"] > 0.05 for r in small(["wrong"]).records)


def test_a_case_that_is_not_measured_is_told_from_those_of_its_contender_that_are():
    result = small(["torch_dense"], rows=(1,), dtypes=("fp32",), ranks=(0, 8), adapters=(1, 4))
    assert [(r["rank"], r["adapters"]) for r in result.records] == [(0, 1), (8, 1)]
    (absent,) = result.absent
    assert (absent["rank"], absent["adapters"]) == (8, 4)
    page = page_of(result)
    assert linear.reasons(result.absent) == ["torch_dense fp32 r8 ×4: no batch that mixes adapters"]
    assert "torch_dense fp32 r8 ×4: no batch" in page.text and "torch_dense: no batch" not in page.text


def test_calls_walk_over_copies_beyond_the_cache(monkeypatch):
    layers = []

    def prepare(p):
        calls = []
        layers.append(calls)
        return registry.Layer(lambda x: calls.append(1) or x @ p.weight.dense.t(), 1 << 24, p.weight.dense.double)

    monkeypatch.setitem(registry.REGISTRY, "counted", registry.Contender(prepare, "ours"))
    small(["counted"], dtypes=("fp32",), rows=(1,), rotate=None)
    assert len(layers) * (1 << 24) >= 2 * linear.harness.last_level_cache()
    assert all(len(calls) > 1 for calls in layers)


def test_who_fails_at_one_number_of_rows_is_named_and_costs_no_other_result(monkeypatch):
    def prepare(p):
        def call(x):
            if len(x) in (4, 5):
                raise RuntimeError("could not create a primitive")
            return x @ p.weight.dense.t()

        return registry.Layer(call, p.weight.dense.nbytes, p.weight.dense.double)

    monkeypatch.setitem(registry.REGISTRY, "picky", registry.Contender(prepare, "torch"))
    result = small(["ours_nf4", "picky"], dtypes=("fp32",), rows=(1, 4, 5, 20))
    assert [r["m"] for r in result.records if r["name"] == "ours_nf4"] == [1, 4, 5, 20]
    assert [r["m"] for r in result.records if r["name"] == "picky"] == [1, 20]
    reason = "picky fp32 at M = 4/5: RuntimeError: could not create a primitive"
    assert linear.reasons(result.absent) == [reason]
    assert reason in page_of(result).text
    assert linear.table(result).row_count == 2


def test_no_timed_call_is_the_first_of_a_copy_with_so_many_rows(monkeypatch):
    fresh, timed = [], []

    def prepare(p):
        seen = set()

        def call(x):
            fresh.append(len(x) not in seen)
            seen.add(len(x))
            return x @ p.weight.dense.t()

        return registry.Layer(call, 1 << 10, p.weight.dense.double)

    def interleave(calls, *args, **kwargs):
        fresh.clear()
        timings = measured(calls, *args, **kwargs)
        timed.extend(fresh)
        return timings

    measured = linear.harness.interleave
    monkeypatch.setattr(linear.harness, "interleave", interleave)
    monkeypatch.setitem(registry.REGISTRY, "binding", registry.Contender(prepare, "torch"))
    small(["binding"], dtypes=("fp32",), rows=(1, 20), rotate=10 << 10)
    assert timed and not any(timed)


def test_the_weights_walked_over_fit_the_free_memory_and_less_than_wanted_is_said(monkeypatch):
    copies = []

    def prepare(p):
        copies.append(p.copy)
        return registry.Layer(lambda x: x @ p.weight.dense.t(), 1 << 20, p.weight.dense.double)

    monkeypatch.setitem(registry.REGISTRY, "a", registry.Contender(prepare, "torch"))
    monkeypatch.setitem(registry.REGISTRY, "b", registry.Contender(prepare, "torch"))
    monkeypatch.setattr(linear.harness, "last_level_cache", lambda: 480 << 20)
    monkeypatch.setattr(linear.harness, "free_memory", lambda: 32 << 20)
    result = small(["a", "b"], dtypes=("fp32",), rows=(1,), rotate=None)
    assert len(copies) << 20 == 16 << 20  # half of what is free
    line = "calls walked over 8 MiB of weights, not 960 MiB"
    assert line in linear.table(result).caption and line in page_of(result).text
    monkeypatch.setattr(linear.harness, "last_level_cache", lambda: 2 << 20)
    assert linear.table(small(["a", "b"], dtypes=("fp32",), rows=(1,), rotate=None)).caption is None


def test_an_absent_package_is_named_everywhere(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(linear.harness, "installed", lambda package: package not in PEERS)
    args = ["--shapes", "64x96", "--M", "1,20", "--threads", "1", "--out", str(tmp_path)]
    assert main(["bench", *args]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    payload = json.loads((tmp_path / "report.json").read_text())
    page = Page((tmp_path / "report.html").read_text())
    for package in PEERS - {"onnx", "peft"}:
        reason = next(a["reason"] for a in payload["absent"] if package in a["reason"])
        assert reason in printed and reason in page.text
    assert {r["package"] for r in payload["records"]} == {"ours", "torch"}


def test_the_targets_name_an_absent_package(monkeypatch, tmp_path, capsys):
    def section(args, keep):
        targets._measure((64, 96), [1], targets._cases(["ours_nf4", *targets.PEERS]), 1, args, keep)
        keep.append({"absent": {"a model": "its package absent"}})
        yield targets.Row("none", None, "≥", 1, "×")

    monkeypatch.setattr(targets.harness, "installed", lambda package: package not in PEERS)
    monkeypatch.setattr(targets.harness, "limits", lambda threads: dict.fromkeys(linear.ROOFS, 1.0))
    monkeypatch.setattr(targets, "SECTIONS", {"tiny": section})
    monkeypatch.setattr(sys, "argv", ["targets", "--rounds", "1", "--out", str(tmp_path / "out.json")])
    targets.main()
    printed = " ".join(capsys.readouterr().out.split())
    payload = json.loads((tmp_path / "out.json").read_text())
    kept = {found["name"] for found in payload["detail"]["tiny"] if "reason" in found}
    assert kept == set(targets.PEERS)
    assert all(name in printed for name in kept) and "a model: its package absent" in printed
    assert set(payload["machine"]["versions"]) >= PEERS - {"llama_cpp"}


def test_the_targets_name_a_peer_that_whole_benchmarks_do_without(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(targets.harness, "installed", lambda package: package not in PEERS)
    sizes = targets.hotswap.models.SIZES
    monkeypatch.setitem(sizes, "135m", sizes["tiny"])
    monkeypatch.setattr(targets.soft_prompts, "BASES", ("nf4",))
    monkeypatch.setattr(targets.soft_prompts, "METHODS", ("prompt",))
    monkeypatch.setattr(targets.quantize, "_measure", lambda *args: [])  # of a weight of 4096²
    options = ["--only", "quantize,swap,soft_prompts", "--rounds", "1", "--out", str(tmp_path / "out.json")]
    monkeypatch.setattr(sys, "argv", ["targets", *options])
    targets.main()
    printed = " ".join(capsys.readouterr().out.split())
    detail = json.loads((tmp_path / "out.json").read_text())["detail"]
    absent = {section: found["absent"] for section, (found,) in detail.items()}
    assert absent == {
        "quantize": {"bnb": "bitsandbytes absent"},
        "swap": dict.fromkeys(("peft (r = 8 on q, v)", "peft (r = 16 on all)"), "peft, bitsandbytes absent"),
        "soft_prompts": {"peft over nf4": "peft, bitsandbytes absent"},
    }
    for named in absent.values():
        line = f"not measured: {', '.join(named)}: {next(iter(named.values()))}"
        assert line in printed


def test_one_row_is_held_to_the_best_peer_on_every_number_of_threads(monkeypatch):
    times = {"ours_nf4": 10.0, "ours_nf4_dq": 10.0, "ggml_q4_K": 13.0, "ggml_q4_0": 9.0}

    def measured(shape, rows, cases, threads, *rest):
        made = [
            {"name": case.name, "m": 1, "dtype": case.dtype, "rank": 0, "adapters": 1, "us": times[case.name]}
            | {"tier": registry.REGISTRY[case.name].tier, "package": registry.REGISTRY[case.name].package}
            | {"samples_us": [times[case.name]], "gb_s": 1.0}
            for case in cases
            if case.name in times
        ]
        return linear.Result(made, limits=[{"read_gb_s": 1.0}])

    monkeypatch.setattr(targets, "_measure", measured)
    rows = list(targets.one_row(None, []))
    best = [r for r in rows if "over the best peer" in r.what]
    assert [(r.measured, r.note, r.met) for r in best] == 4 * [(0.9, "against ggml_q4_0 fp32", False)]
    assert [r.measured for r in rows if "over ggml Q4_K" in r.what] == 4 * [1.3]


@pytest.mark.parametrize(
    ("sections", "module"),
    [
        ("step", "qlora_step"),
        ("decode decode_1b", "decode"),
        ("prefix_decode prefix_decode_1b", "prefix_decode"),
        ("attention", "attention"),
        ("quantize", "quantize"),
        ("soft_prompts soft_prompts_1b", "soft_prompts"),
        ("swap", "hotswap"),
    ],
)
def test_the_targets_ask_benchmarks_for_what_they_know(monkeypatch, sections, module):
    def measure(args, console):
        asked.append(args.threads)
        raise InterruptedError

    asked = []
    monkeypatch.setattr(getattr(targets, module), "measure", measure)
    for section in sections.split():
        with pytest.raises(InterruptedError):
            list(targets.SECTIONS[section](argparse.Namespace(rounds=7), []))
    assert all(threads in (2, [2]) for threads in asked)


def test_targets_give_openvino_the_inputs_that_it_likes_best():
    """ov_nf4 is faster in fp32 up to 4 rows, and in bf16 above."""
    assert {case.dtype for case in targets._cases(["ov_nf4"])} == {"bf16", "fp32"}


def test_the_report_says_which_instruction_set_ran(isa):
    payload = linear.Result().payload()
    assert payload["machine"]["isa_used"] == isa
    assert f"of which ours used {isa};" in Page(report.html(payload)).text


def test_the_report_is_whole(tmp_path):
    args = ["--shapes", "64x96,128x64", "--M", "1,20", "--threads", "1", "--only", "ours_nf4,torch_dense", "--json"]
    assert main(["bench", *args, "--out", str(tmp_path)]) == 0
    payload = json.loads((tmp_path / "report.json").read_text())
    assert payload["schema"] == linear.SCHEMA
    for r in payload["records"]:
        assert {key: type(value) for key, value in r.items()} == RECORD
    assert {(r["k"], r["n"], r["threads"], r["train"]) for r in payload["limits"]} == {
        (k, n, 1, train) for k, n in ((64, 96), (128, 64)) for train in (False, True)
    }
    page = Page((tmp_path / "report.html").read_text())
    assert page.links == []
    for name in registry.REGISTRY:
        assert name in page.text
    assert "ours_nf4 bf16" in page.text and "read" in page.text


def test_a_branch_is_held_to_the_base_of_its_own_rounds_and_the_rest_is_of_the_first_pass():
    passes = [small(["ours_nf4"], rows=(1,), dtypes=("fp32",), ranks=ranks) for ranks in ((0,), (0, 8), (0, 16))]
    times = {(0, 0): 8e3, (1, 0): 4e3, (1, 8): 6e3, (2, 0): 1e3, (2, 16): 3e3}
    for number, result in enumerate(passes):
        for r in result.records:
            r["us"] = times[number, r["rank"]]
    text = page_of(*passes).text
    assert "ours_nf4 fp32 r81.50" in text and "ours_nf4 fp32 r163.00" in text
    assert text.count("8000 µs") == 1
    assert "4000 µs" not in text and "1000 µs" not in text
    assert text.split("Ours and the best peer")[0].count("512 × 96") == 1  # of the limits


def test_a_folder_that_cannot_be_written_shows_before_anything_is_measured(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(f"{BENCH}.full.sweep", lambda *args: pytest.fail("measured"))
    (tmp_path / "file").touch()
    assert main(["bench", "--out", str(tmp_path / "file")]) == 1
    assert "file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("file/x.json", "file', which is a file"),
        ("folder.json", "folder.json is a folder"),
        ("new/x", "new/x must be a name, or a path ending in .json"),
        ("link/x.json", "nothing can be written in"),
    ],
)
def test_a_file_that_cannot_be_written_shows_before_anything_is_measured(out, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    parser = linear.harness.parser("", "name", rounds=1)
    with pytest.raises(SystemExit):
        parser.parse_args(["--out", out])
    error = capsys.readouterr().err
    assert "argument --out: " in error and message in error


@pytest.mark.parametrize(("setup", "expected"), [(True, "results/name.json"), (False, "name.json")])
def test_results_lie_in_a_source_tree_or_where_one_works(setup, expected, tmp_path):
    (tmp_path / "bench").mkdir()
    source = Path(linear.harness.__file__).read_text()
    (tmp_path / "bench" / "harness.py").write_text(source)
    if setup:
        (tmp_path / "setup.py").touch()
    place = runpy.run_path(str(tmp_path / "bench" / "harness.py"))["place"]
    assert place("name") == (tmp_path / "bench" / expected if setup else Path(expected))
    assert place("a/name.json") == Path("a/name.json")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--shapes", "64"], "64 must be pairs of numbers above 0"),
        (["--shapes", "0x64"], "0x64 must be pairs"),  # a peer ends the process with a division by zero
        (["--shapes", "4x"], "4x must be pairs of numbers above 0"),
        (["--M", "4,0"], "4,0 must be whole numbers above 0"),
        (["--threads", "x"], "x must be whole numbers above 0"),
        (["--threads", "0"], "0 must be whole numbers above 0"),
        (["--only", "ours_nf4,our_nf4"], "our_nf4 must be among ours_nf4, "),
        (["--only", ""], "nothing must be among ours_nf4, "),
        (["--dtypes", "bf61"], "bf61 must be among bf16, fp32, fp16"),
    ],
)
@pytest.mark.parametrize("module", ["bench", "linear"])
def test_options_of_nothing_are_refused_before_anything_runs(module, args, message, capsys, monkeypatch):
    monkeypatch.setattr(linear, "sweep", lambda *args: pytest.fail("measured"))
    monkeypatch.setattr(sys, "argv", [module, *args])
    with pytest.raises(SystemExit) as stopped:
        linear.main() if module == "linear" else main([module, *args])
    assert stopped.value.code == 2
    assert f"argument {args[0]}: {message}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("module", "args", "message"),
    [
        ("linear", ["--skip", "nobody"], "nobody must be among"),
        ("linear", ["--rounds", "0"], "0 must be a whole number above 0"),
        ("quantize", ["--rounds", "x"], "x must be a whole number above 0"),
        ("decode", ["--threads", "0"], "0 must be a whole number above 0"),
        ("decode", ["--tokens", "0"], "0 must be a whole number above 0"),
        ("attention", ["--head-size", "-4"], "-4 must be a whole number above 0"),
        ("prefix_decode", ["--rows", "0"], "0 must be a whole number above 0"),
        ("qlora_step", ["--batch", "0"], "0 must be a whole number above 0"),
        ("soft_prompts", ["--virtual", "0"], "0 must be a whole number above 0"),
        ("decode", ["--only", "ours"], "ours must be among ours_nf4, "),
        ("prefix_decode", ["--only", "ours_nf"], "ours_nf must be among ours_nf4, "),
        ("targets", ["--only", "swap,nothing"], "nothing must be among one_row, "),
        ("qlora_step", ["--only", "ours,peft"], "peft must be among ours, peft_bnb_nf4, "),
        ("attention", ["--dtypes", "fp8"], "fp8 must be among bf16, fp32, fp16"),
        ("soft_prompts", ["--methods", "lora"], "lora must be among prompt, "),
    ],
)
def test_each_benchmark_names_the_option_that_is_wrong(module, args, message, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [module, *args])
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(f"{BENCH}.{module}").main()
    assert stopped.value.code == 2
    assert f"argument {args[0]}: {message}" in capsys.readouterr().err


def test_linear_writes_its_records(run_bench):
    args = ["--shapes", "64x96", "--M", "1,20", "--threads", "1", "--rounds", "1", "--only", "ours_nf4,torch_dense"]
    payload = run_bench("linear", *args, "--dtypes", "bf16")
    assert {(r["name"], r["m"]) for r in payload["records"]} == {(n, m) for n in args[-1].split(",") for m in (1, 20)}


def test_quantize_reports_both_directions(run_bench):
    payload = run_bench("quantize", "--threads", "1", "--shape", "256x256", "--rounds", "1")
    assert {"ours.quantize", "ours.dequantize"} <= {r["name"] for r in payload["result"]["records"]}


def test_qlora_step_trains_every_contender_to_the_same_loss(run_bench):
    args = ["--model", "tiny", "--batch", "2", "--length", "16", "--rounds", "1", "--threads", "1"]
    contenders = run_bench("qlora_step", *args)["result"]["contenders"]
    first = [row["first_losses"][0] for row in contenders.values()]
    assert max(first) - min(first) < 2e-2
    assert all(row["peak_mb"] > 0 for row in contenders.values())


def test_soft_prompts_are_timed_beside_peft_and_switched(run_bench):
    options = ["--model", "tiny", "--bases", "nf4", "--methods", "ptuning,ptuning-v2", "--batch", "2", "--length", "8"]
    result = run_bench("soft_prompts", *options, "--rounds", "1", "--threads", "1")["result"]
    assert [(r["base"], r["method"]) for r in result["steps"]] == [("nf4", "ptuning"), ("nf4", "ptuning-v2")]
    assert all(r["ours"]["us"] > 0 and r["peft"]["peak_mb"] > 0 and r["speedup"] > 0 for r in result["steps"])
    assert [r["method"] for r in result["switches"]] == ["ptuning", "ptuning-v2"]


def test_hotswap_reports_every_way_to_exchange_an_adapter(run_bench):
    rows = run_bench("hotswap", "--model", "tiny", "--rounds", "1")["result"]["rows"]
    assert {"ours: set_adapter, r = 8 on q, v", "ours: hotswap from memory, r = 16 on all"} <= set(rows)


def test_attention_is_timed_beside_torch_and_its_floor(run_bench):
    options = ("--shapes", "2x16", "--dtypes", "fp32", "--rounds", "1", "--threads", "1")
    rows = run_bench("attention", *options)["result"]["rows"]
    assert [(r["prefix"], r["passes"]) for r in rows] == [(p, d) for p in (0, 20) for d in ("forward", "both")]
    assert all(r["speedup"] > 0 and r["over_floor"] > 0 for r in rows)


def test_prefix_decode_counts_tokens_beside_a_copy_a_row(run_bench):
    sizes = ("--model", "tiny", "--rows", "3", "--prefix", "8", "--tokens", "2", "--rounds", "1", "--threads", "1")
    contenders = run_bench("prefix_decode", *sizes)["result"]["contenders"]
    assert set(contenders) == {"ours_nf4", "ours_nf4_repeated", "ours_bf16", "bf16_repeated"}
    assert all(row["tokens_per_s"] > 0 for row in contenders.values())


def test_decode_counts_tokens_or_names_who_is_absent(run_bench):
    result = run_bench("decode", "--model", "tiny", "--tokens", "3", "--rounds", "1", "--threads", "1")["result"]
    assert {"ours_nf4", "ours_nf4_lora", "ours_bf16_lora", "bf16"} <= set(result["contenders"])
    assert len(result["contenders"]) + len(result["absent"]) == 8
    assert all(row["tokens_per_s"] > 0 for row in result["contenders"].values())


def test_a_step_is_held_against_its_peer_where_both_were_measured():
    training = importlib.import_module(f"{BENCH}.training")
    timings = {"ours": linear.harness.Timing([1.0, 2.0, 3.0]), "theirs": linear.harness.Timing([2.0, 8.0, 9.0])}
    peaks = {"ours": 300.0, "theirs": 600.0, "slow": 900.0}
    assert training.against("ours", "theirs", timings, peaks) == {"speedup": 3.0, "memory_ratio": 0.5}
    for name, peer in (("ours", "slow"), ("slow", "ours"), ("ours", None)):
        assert training.against(name, peer, timings, peaks) == {}


def test_what_a_benchmarks_own_children_do_is_not_done_elsewhere(monkeypatch):
    monkeypatch.setattr(Path, "read_text", lambda self: "cpu  0 0 0 0 0 0 0 0 0 0\n")
    before = linear.harness.busy_elsewhere()
    # More than is asked for: the times of children are counted in hundredths of a second and their sums rounded.
    subprocess.run([sys.executable, "-c", "import time\nwhile time.process_time() < 0.6: pass"], check=True)
    assert linear.harness.busy_elsewhere() - before <= -0.5


def test_a_weight_is_dequantized_to_its_own_dtype():
    quantize = importlib.import_module(f"{BENCH}.quantize")
    weight = torch.randn(64, 64, dtype=torch.bfloat16)
    assert quantize.contenders(weight, "nf4", False, None)["ours.dequantize"]().dtype is torch.bfloat16


def test_tokens_a_second_are_those_of_all_rows():
    console = linear.harness.Console(record=True)
    timings = {"one": linear.harness.Timing([0.02, 0.05, 0.04])}
    for rows, rate in ((1, 25.0), (8, 200.0)):
        record = linear.harness.tokens_a_second("title", timings, console, rows)["one"]
        assert record["tokens_per_s"] == rate and f"{rate:.1f}" in console.export_text()
        assert record["samples_us"] == [20_000, 50_000, 40_000]


def broken(tmp_path, *packages):
    """A folder with packages that are found and cannot be imported."""
    for package in packages:
        (tmp_path / "broken" / package).mkdir(parents=True)
        (tmp_path / "broken" / package / "__init__.py").write_text("raise ImportError('libfoo.so.1 is not there')\n")
    return tmp_path / "broken"


def test_a_package_that_does_not_work_is_named_and_costs_no_other_result(tmp_path):
    cases = {
        "decode": (["--model=tiny", "--tokens=2", "--only=ours_nf4,llama_cpp_q4_0"], ["llama_cpp_q4_0"]),
        "qlora_step": (["--model=tiny", "--batch=1", "--length=8", "--only=ours,peft_bf16"], ["peft_bf16"]),
        "quantize": (["--shape=256x256"], ["bnb"]),
        "hotswap": (["--model=tiny"], ["peft (r = 8 on q, v)", "peft (r = 16 on all)"]),
        "soft_prompts": (
            ["--model=tiny", "--bases=bf16", "--methods=prompt", "--batch=1", "--length=8"],
            ["peft (prompt over bf16)"],
        ),
    }
    lines = ["import importlib, sys"]
    for module, (args, _) in cases.items():
        args = [module, *args, "--rounds=1", "--threads=1", f"--out={tmp_path / module}.json"]
        lines += [f"sys.argv = {args}", f"importlib.import_module('{BENCH}.{module}').main()"]
    beside = broken(tmp_path, "llama_cpp", "peft", "bitsandbytes")
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(beside), str(Path(fp.__file__).parent.parent)])}
    command = [sys.executable, "-c", "\n".join(lines)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    for module, (_, names) in cases.items():
        result = json.loads((tmp_path / f"{module}.json").read_text())["result"]
        assert list(result["absent"]) == names
        assert all("ImportError: libfoo.so.1 is not there" in reason for reason in result["absent"].values())
        assert next(result[key] for key in ("contenders", "records", "rows", "steps") if key in result)


def test_a_peer_that_fails_at_its_first_exchange_is_named_and_costs_no_other_result(monkeypatch):
    hotswap = targets.hotswap

    def fails():
        raise RuntimeError("no such adapter")

    monkeypatch.setitem(hotswap.CONTENDERS, "peft", ((), lambda *args: {"set_adapter": (fails, lambda: None)}))
    args = argparse.Namespace(model="tiny", rounds=1, threads=torch.get_num_threads())
    result = hotswap.measure(args, linear.harness.Console(quiet=True))
    assert result["absent"] == {f"peft: set_adapter, {size}": "RuntimeError: no such adapter" for size in hotswap.LORAS}
    assert len(result["rows"]) == 3 * len(hotswap.LORAS)


def test_the_full_report_keeps_what_was_measured_and_names_who_was_not(tmp_path, monkeypatch):
    step = {"us": 2e6, "spread": 0.1, "peak_mb": 700.0}
    steps = {"batch": 4, "length": 256, "threads": 1, "contenders": {"ours": step}, "absent": {"theirs": "a reason"}}
    monkeypatch.setattr(f"{BENCH}.full.qlora_step.measure", lambda *args: steps)

    def decode(args, console):
        if args.model != "smollm2":
            raise MemoryError
        row = {"tokens_per_s": 12.5, "spread": 0.1}
        asked = {name: getattr(args, name) for name in ("model", "tokens", "threads")}
        return {**asked, "contenders": {"ours_nf4": row}, "absent": {"llama_cpp_q4_0": "<another>"}}

    monkeypatch.setattr(f"{BENCH}.full.decode.measure", decode)
    monkeypatch.setattr(f"{BENCH}.full.parts", lambda args: [])
    assert main(["bench", "--full", "--only", "ours_nf4", "--threads", "1", "--out", str(tmp_path)]) == 1
    payload = json.loads((tmp_path / "report.json").read_text())
    assert payload["qlora_step"] == steps and [found["model"] for found in payload["decode"]] == ["smollm2"]
    text = Page((tmp_path / "report.html").read_text()).text.split("End to end")[1]
    assert "theirs: a reason" in text and "llama_cpp_q4_0: <another>" in text and "nan" not in text


def test_what_llama_cpp_reads_is_the_same_model(tmp_path):
    """Greedy tokens of the GGUF file and of the checkpoint it was written from agree where Q4_0 leaves no doubt."""
    llama_cpp = pytest.importorskip("llama_cpp")
    models = importlib.import_module(f"{BENCH}.models")
    with models.checkpoint("tiny") as folder:
        models.write_gguf(folder, tmp_path / "m.gguf")
        llama = llama_cpp.Llama(str(tmp_path / "m.gguf"), n_ctx=64, n_threads=1, verbose=False, logits_all=True)
        tokens = list(range(1, 17))
        llama.eval(tokens)
        got = torch.from_numpy(llama.scores[: len(tokens)].copy()).double()
        with torch.no_grad():
            expected = models.load_dense(folder)(torch.tensor([tokens])).logits[0].double()
    correlation = torch.nn.functional.cosine_similarity(got.flatten(), expected.flatten(), dim=0)
    assert correlation > 0.97


without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here, which takes minutes to measure")


@without_gpu
def test_the_gpus_report_runs_without_one_and_says_what_it_skips(tmp_path):
    out = tmp_path / "report.json"
    environment = {**os.environ, "BUILD": "0", "PYTHON": sys.executable}
    environment["PYTHONPATH"] = str(Path(sys.modules["pyfastpeft"].__file__).parent.parent)
    command = ["bash", str(ROOT / "bench" / "gpu_report.sh"), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped: targets: no GPU is here" in done.stdout
    result = json.loads(out.read_text())
    assert result["machine"]["gpu"] is None and result["tests"] == "no GPU is here"
    assert set(result["skipped"]) == {"targets", "bitsandbytes", "peft"}, result["skipped"]
    assert all(row["error"] < 4e-3 and row["lora_error"] < 4e-3 for row in result["products"])
    assert result["trainings"] and result["models"]["tiny"]["ours"]["step_s"] > 0
    assert all(promise["met"] is None for promise in result["promises"])


@without_gpu
def test_a_model_that_fails_costs_the_gpus_report_no_other(tmp_path):
    lines = (
        "import sys, bench.gpu_report as report",
        "whole, report.SHAPES = report.llama, []",
        "report.llama = lambda name, kind: {}[name] if kind == 'dense' else whole(name, kind)",
        f"sys.argv = ['', '--out', {str(tmp_path / 'out')!r}]",
        "report.main()",
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "out").read_text())
    assert result["models"]["tiny"]["ours"]["step_s"] > 0 and list(result["models"]["tiny"]) == ["ours"]
    assert "KeyError" in result["skipped"]["Llama tiny, dense"]


def test_the_gpus_report_needs_torch_alone(tmp_path):
    """The build machine has no numpy, safetensors or transformers; nor do the tests that it runs first."""
    tests = sorted((ROOT / "tests").glob("test_*.py"))
    tests = [p for p in tests if p.stem == "test_gpu" or re.search(r"^def test_\w+\(device", p.read_text(), re.M)]
    lines = (
        "import sys",
        "sys.modules |= dict.fromkeys(('numpy', 'safetensors', 'transformers', 'peft', 'bitsandbytes'))",
        "import pytest, bench.gpu_report as report",
        f"assert pytest.main({['-q', '--co', '-p', 'no:cacheprovider', *map(str, tests)]}) == 0",
        f"sys.argv = ['', '--limit', '0', '--out', {str(tmp_path / 'out')!r}]",
        "report.main()",
    )
    root = str(Path(sys.modules["pyfastpeft"].__file__).parent.parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, str(ROOT)])}
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    skipped = json.loads((tmp_path / "out").read_text())["skipped"]
    assert skipped["ceilings"] == "no time was left" and skipped["Llama tiny"] == "transformers is not installed"
