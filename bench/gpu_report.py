"""The promises of the GPU kernels, measured on this machine's GPU and held against their targets.

    bench/gpu_report.sh                  # builds in place, runs the GPU tests, then this
    python -m bench.gpu_report --out results.json

A layer's time is the median over replays of one CUDA graph; in inference its calls go over copies of the weight that
together exceed the L2 cache three times. Ratios are to cuBLAS's bf16 product, timed the same way. Every product's error
is against float64. Needs torch alone; models want transformers, and peers are measured where they are installed.
Without a GPU the same code runs on small shapes, to be tested: then nothing is held against a target.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.metadata
import importlib.util
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

import pyfastpeft as fp
from pyfastpeft.ops import backends
from pyfastpeft.ops.cuda_kernels import why_not

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if ON_GPU else torch.device("cpu")
DTYPE = torch.bfloat16
RANK = 16
# (N, K)
SHAPES = [(4096, 4096), (4096, 14336), (14336, 4096), (8192, 8192), (28672, 4096)] if ON_GPU else [(64, 96)]
ROWS = [1, 4, 16, 32, 64, 128, 256, 512, 2048, 8192] if ON_GPU else [1, 20]
TRAINED_ROWS = [512, 2048, 8192] if ON_GPU else [20]
LLAMAS = {
    "1.1b": (2048, 5632, 22, 32, 4, 32000),
    "7b": (4096, 11008, 32, 32, 32, 32000),
} if ON_GPU else {"tiny": (64, 128, 2, 2, 1, 512)}  # fmt: skip
BATCH, LENGTH, TOKENS = (4, 512, 64) if ON_GPU else (2, 8, 4)
PEERS = ("bitsandbytes", "peft", "transformers", "triton")


def installed(*packages: str) -> bool:
    return all(importlib.util.find_spec(package) is not None for package in packages)


def cache_bytes() -> int:
    return torch.cuda.get_device_properties(DEVICE).L2_cache_size if ON_GPU else 0


def machine() -> dict:
    versions = {"torch": torch.__version__, "cuda of torch": torch.version.cuda, "python": platform.python_version()}
    for package in PEERS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    found = {"gpu": None, "versions": versions, "date": time.strftime("%Y-%m-%d %H:%M:%S")}
    if ON_GPU:
        of = torch.cuda.get_device_properties(DEVICE)
        found["gpu"] = {
            "name": of.name, "capability": [of.major, of.minor], "multiprocessors": of.multi_processor_count,
            "l2_bytes": of.L2_cache_size, "memory_bytes": of.total_memory, "cuda_kernels": why_not(DEVICE) or "served",
        }  # fmt: skip
    return found


# ---- timing ----------------------------------------------------------------------------------------------------------


def seconds(calls: list[Callable[[], object]], replays: int = 15) -> float:
    """Of one call: the median over replays of a graph of all ``calls``."""
    if not ON_GPU:
        for call in calls:
            call()
        start = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - start) / len(calls)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    for _ in range(3):
        graph.replay()
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(replays)]
    for begin, end in marks:
        begin.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in marks) / 1e3 / len(calls)


def over_copies(make: Callable[[], Callable[[], object]], nbytes: int) -> list[Callable[[], object]]:
    """Calls over copies that exceed the cache three times; twice as many where they are few."""
    copies = [make() for _ in range(min(64, max(2, -(-3 * cache_bytes() // nbytes))))]
    return copies * max(1, 8 // len(copies))


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm())


# ---- what is measured ------------------------------------------------------------------------------------------------


def ceilings() -> dict:
    """Copying (read and written bytes together) and the dense bf16 product, at their best."""
    size, n = (1 << 30, 8192) if ON_GPU else (1 << 16, 64)
    source = torch.empty(size, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    a, b = (torch.randn(n, n, device=DEVICE).to(DTYPE) for _ in range(2))
    return {
        "copy_gb_s": 2 * size / seconds([lambda: target.copy_(source)]) / 1e9,
        "dense_bf16_tflop_s": 2 * n**3 / seconds([lambda: torch.mm(a, b)]) / 1e12,
    }


def operands(n: int, k: int) -> tuple[torch.Tensor, fp.Packed4bit, fp.ops.Lora]:
    """W [n, k] in full precision and in NF4, and an adapter, whose scaling is a tensor as a layer's is."""
    dense = (torch.randn(n, k, device=DEVICE) * k**-0.5).to(DTYPE)
    a, b = (torch.randn(RANK, k, device=DEVICE) * k**-0.5).to(DTYPE), torch.randn(n, RANK, device=DEVICE).to(DTYPE)
    return dense, fp.quantize_4bit(dense, "nf4"), fp.ops.Lora(a, b, torch.full((RANK,), 2.0, device=DEVICE))


def bnb_linear(dense: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    import bitsandbytes as bnb

    n, k = dense.shape
    layer = bnb.nn.Linear4bit(k, n, bias=False, compute_dtype=DTYPE, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(dense.cpu(), requires_grad=False, quant_type="nf4", module=layer)
    return layer.to(DEVICE).eval()


@torch.no_grad()
def products(n: int, k: int) -> Iterator[dict]:
    """Inference: seconds of cuBLAS, of ours with and without LoRA, and of bitsandbytes, by rows of x."""
    dense, w, lora = operands(n, k)
    decoded = w.dequantize(torch.float64)
    denses = over_copies(dense.clone, dense.nbytes)
    packed = over_copies(w.clone, w.nbytes)
    peers = over_copies(lambda: bnb_linear(dense), w.nbytes) if ON_GPU and installed("bitsandbytes") else []
    for m in ROWS:
        x = torch.randn(m, k, device=DEVICE).to(DTYPE)
        row = {"n": n, "k": k, "m": m, "backend": backends.choose(w, m, DTYPE, infers=True).value}
        expected = x.double() @ decoded.t()
        row["error"] = error(fp.ops.linear_4bit(x, w), expected)
        expected += x.double() @ lora.a.double().t() * lora.scaling @ lora.b.double().t()
        row["lora_error"] = error(fp.ops.linear_4bit(x, w, None, lora), expected)
        linear = fp.ops.linear_4bit
        row["dense_s"] = seconds([partial(F.linear, x, w) for w in denses])
        row["ours_s"] = seconds([partial(linear, x, w) for w in packed])
        row["lora_s"] = seconds([partial(linear, x, w, None, lora) for w in packed])
        if peers:
            try:
                row["bnb_s"] = seconds([partial(layer, x) for layer in peers])
            except RuntimeError as e:  # its kernels may not be there, or refuse a graph
                row["bnb_error"], peers = str(e), []
        yield row


def trainings(n: int, k: int) -> Iterator[dict]:
    """Forward and backward to x (and A and B)."""
    dense, w, lora = operands(n, k)
    leaves = [lora.a.requires_grad_(), lora.b.requires_grad_()]
    for m in TRAINED_ROWS:
        x = torch.randn(m, k, device=DEVICE).to(DTYPE).requires_grad_()
        dy = torch.randn(m, n, device=DEVICE).to(DTYPE)

        def grads(y: torch.Tensor, *more: torch.Tensor, x: torch.Tensor = x, dy: torch.Tensor = dy) -> tuple:
            return torch.autograd.grad(y, (x, *more), dy)

        calls = {
            "dense_s": lambda x=x: grads(F.linear(x, dense)),
            "ours_s": lambda x=x: grads(fp.ops.linear_4bit(x, w)),
            "lora_s": lambda x=x: grads(fp.ops.linear_4bit(x, w, None, lora), *leaves),
        }
        row = {"n": n, "k": k, "m": m, "backend": backends.choose(w, m, DTYPE, infers=False).value}
        row["error"] = error(calls["ours_s"]()[0], dy.double() @ w.dequantize(torch.float64))
        yield row | {name: seconds([call] * 4) for name, call in calls.items()}


def whole_tensors() -> dict:
    """Quantizing and decoding a matrix: bytes read and written a second."""
    n, k = (8192, 8192) if ON_GPU else (64, 96)
    dense = torch.randn(n, k, device=DEVICE).to(DTYPE)
    w = fp.quantize_4bit(dense, "nf4")
    moved = dense.nbytes + w.nbytes
    return {
        "quantize_gb_s": moved / seconds([lambda: fp.quantize_4bit(dense, "nf4")] * 4) / 1e9,
        "dequantize_gb_s": moved / seconds([lambda: w.dequantize(DTYPE)] * 4) / 1e9,
    }


def llama(name: str, kind: str) -> torch.nn.Module:
    """A Llama of random weights, ``dense``, ``ours`` or ``bnb``, the latter two with LoRA on all linear layers."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    hidden, inner, layers, heads, kv_heads, words = LLAMAS[name]
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=words, tie_word_embeddings=False,
    )  # fmt: skip
    with DEVICE:
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPE)
    if kind == "dense":
        return model
    for parent in list(model.model.modules()):
        for child, layer in list(parent.named_children()):
            if isinstance(layer, torch.nn.Linear):
                ours = kind == "ours"
                setattr(parent, child, fp.nn.Linear4bit.from_linear(layer) if ours else bnb_linear(layer.weight.data))
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    lora = {"r": RANK, "lora_alpha": 32, "target_modules": targets, "task_type": "CAUSAL_LM"}
    if kind == "ours":
        return fp.accelerate(fp.get_peft_model(model, fp.LoraConfig(**lora)))
    import peft

    return peft.get_peft_model(model, peft.LoraConfig(**lora))


def synchronized() -> float:
    if ON_GPU:
        torch.cuda.synchronize()
    return time.perf_counter()


def model_row(name: str, kind: str) -> dict:
    """Seconds of a QLoRA step and peak memory; tokens a second of greedy decoding of one row."""
    model = llama(name, kind)
    tokens = torch.randint(0, 500, (BATCH, LENGTH), device=DEVICE)
    row = {}
    if kind != "dense":
        optimizer = torch.optim.AdamW([p for p in model.train().parameters() if p.requires_grad], lr=1e-4)
        if ON_GPU:
            torch.cuda.reset_peak_memory_stats()
        samples = []
        for _ in range(6):
            start = synchronized()
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            samples.append(synchronized() - start)
        row["step_s"] = statistics.median(samples[2:])
        row["peak_mb"] = torch.cuda.max_memory_allocated() / 2**20 if ON_GPU else None
    model.eval().generation_config.eos_token_id = None
    samples = []
    for _ in range(3):
        start = synchronized()
        with torch.no_grad():
            model.generate(input_ids=tokens[:1, :8], max_new_tokens=TOKENS, do_sample=False, pad_token_id=0)
        samples.append(synchronized() - start)
    return row | {"tokens_s": TOKENS / min(samples)}


# ---- targets ---------------------------------------------------------------------------------------------------------


def promises(result: dict) -> Iterator[tuple[str, float, str, float | None]]:
    """(what, measured, relation, the target on an H100, or None)."""
    for row in result["products"]:
        n, k, m = row["n"], row["k"], row["m"]
        speed, cost = row["dense_s"] / row["ours_s"], row["lora_s"] / row["ours_s"]
        target = None
        if m <= 16:
            target = {(4096, 4096): 2.0, (8192, 8192): 2.6}.get((n, k))
        elif m == 128:
            target = 1.4
        elif m >= 2048:
            target = 0.95
        what = f"{n} x {k}, {m} rows ({row['backend']})"
        yield f"{what}: speed over cuBLAS", speed, ">=", target
        yield f"{what}: LoRA over base, time", cost, "<=", 1.08 if m <= 16 else 1.05 if m >= 2048 else None
        yield f"{what}: error", max(row["error"], row["lora_error"]), "<=", 4e-3
        if "bnb_s" in row:
            yield f"{what}: speed over bitsandbytes", row["bnb_s"] / row["ours_s"], ">=", None
    for row in result["trainings"]:
        what, large = f"{row['n']} x {row['k']}, {row['m']} rows, both directions ({row['backend']})", row["m"] >= 2048
        yield f"{what}: speed over cuBLAS", row["dense_s"] / row["ours_s"], ">=", 0.95 if large else None
        yield f"{what}: LoRA over base, time", row["lora_s"] / row["ours_s"], "<=", 1.05 if large else None
        yield f"{what}: error of dx", row["error"], "<=", 6e-3
    ceiling = result["ceilings"].get("copy_gb_s")
    for name, rate in result["whole_tensors"].items() if ceiling else ():
        yield f"{name.removesuffix('_gb_s')}, part of copying's speed", rate / ceiling, ">=", None
    for name, kinds in result["models"].items():
        for what in ("step_s", "peak_mb") if {"ours", "bnb"} <= set(kinds) else ():
            ratio = kinds["bnb"][what] / kinds["ours"][what]
            yield f"Llama {name}: {what} of peft + bitsandbytes over ours", ratio, ">=", None
        for kind, row in kinds.items():
            yield f"Llama {name}, {kind}: tokens/s", row["tokens_s"], ">=", None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = str(Path(__file__).parent / "results" / "gpu_report.json")
    parser.add_argument("--out", default=default, help="JSON file (default: bench/results/gpu_report.json)")
    parser.add_argument("--tests", default="not run", help="what the GPU tests said, to be kept with the results")
    parser.add_argument("--limit", type=int, default=420, help="after so many seconds no section begins (default: 420)")
    args = parser.parse_args()
    torch.manual_seed(0)
    start = time.perf_counter()
    result: dict = {"machine": machine(), "tests": args.tests, "skipped": {}}

    def section(name: str, measure: Callable[[], object]) -> object | None:
        """``measure()``, or the reason why there is nothing, in ``skipped``: the rest goes on."""
        if time.perf_counter() - start > args.limit:
            result["skipped"][name] = "no time was left"
            return None
        try:
            return measure()
        except Exception as e:
            result["skipped"][name] = f"{type(e).__name__}: {e}"
            return None
        finally:
            gc.collect()
            if ON_GPU:
                torch.cuda.empty_cache()

    if not ON_GPU:
        result["skipped"]["targets"] = "no GPU is here: small shapes ran on the CPU, which says nothing about speed"
    for peer in ("bitsandbytes", "peft"):
        if not (ON_GPU and installed(peer)):
            result["skipped"][peer] = "not installed" if ON_GPU else "no GPU is here"
    result["ceilings"] = section("ceilings", ceilings) or {}
    result["whole_tensors"] = section("whole_tensors", whole_tensors) or {}
    result["products"], result["trainings"], result["models"] = [], [], {}
    for n, k in SHAPES:
        section(f"products {n} x {k}", lambda n=n, k=k: result["products"].extend(products(n, k)))
    for n, k in SHAPES[:3]:
        section(f"trainings {n} x {k}", lambda n=n, k=k: result["trainings"].extend(trainings(n, k)))
    kinds = ["ours", "dense"] + ["bnb"] * (ON_GPU and installed("bitsandbytes", "peft"))
    for name in LLAMAS:
        if not installed("transformers"):
            result["skipped"][f"Llama {name}"] = "transformers is not installed"
            continue
        for kind in kinds:  # a section each: memory may suffice for one alone, and a peer may fail
            found = section(f"Llama {name}, {kind}", lambda name=name, kind=kind: model_row(name, kind))
            if found is not None:
                result["models"].setdefault(name, {})[kind] = found

    result["promises"] = []
    print(f"\n{'measured':>10}  {'target':>10}")
    for what, measured, relation, target in promises(result):
        if not ON_GPU and "error" not in what:
            continue  # the speed of a CPU
        met = None
        if target is not None and ON_GPU:
            met = measured >= target if relation == ">=" else measured <= target
        goal = "" if target is None else f"{relation} {target:g}"
        print(f"{measured:10.4g}  {goal:>10}  {'' if met is None else 'met   ' if met else 'MISSED'}  {what}")
        result["promises"].append({"what": what, "measured": measured, "target": target, "met": met})
    for what, why in result["skipped"].items():
        print(f"skipped: {what}: {why}")
    result["seconds"] = round(time.perf_counter() - start, 1)
    path = Path(args.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    met = [p["met"] for p in result["promises"] if p["met"] is not None]
    print(f"{sum(met)} of {len(met)} targets met in {result['seconds']} s; written: {path}")


if __name__ == "__main__":
    main()
