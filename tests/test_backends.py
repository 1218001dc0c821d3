"""Which backend serves a weight, decided without the device."""

import importlib.util
import os
import subprocess
import sys
import threading
import warnings
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_llama
from torch.utils._python_dispatch import TorchDispatchMode

import pyfastpeft as fp
from pyfastpeft.kernels import graphs
from pyfastpeft.ops import Backend, backends, cuda_kernels, dense_linear, library, swiglu, triton_kernels
from pyfastpeft.ops.backends import choose, choose_attention, choose_plain, choose_quantizer


@pytest.fixture(autouse=True)
def forget():
    """What was found out about devices that are not here."""
    yield
    for remembered in (triton_kernels.why_not, cuda_kernels.why_not, cuda_kernels._most_rows, backends._serving):
        remembered.cache_clear()


def find_triton(monkeypatch, spec):
    """Makes ``spec`` what is found of Triton, and of nothing else: torch looks for modules by the same function."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *at: spec if name == "triton" else find(name, *at))


@pytest.fixture
def gpu(monkeypatch, forget):
    """Called with a compute capability: a weight on a GPU of that capability, with Triton installed and, where wanted,
    with CUDA kernels that take 128 rows of 16 bits."""

    def of(capability, cuda=None):
        for remembered in (triton_kernels.why_not, backends._serving):
            remembered.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        find_triton(monkeypatch, object())
        monkeypatch.setattr(backends, "why_not_cuda", lambda device: cuda)
        monkeypatch.setattr(backends, "most_rows", lambda w, dtype: 128 if dtype.itemsize == 2 else 0)
        return SimpleNamespace(device=torch.device("cuda", 0), layout="rows")

    return of


def weight(k):
    return fp.quantize_4bit(torch.randn(16, k))


def chosen(w, rows=1, dtype=torch.bfloat16, infers=True, drops=False):
    return choose(w, rows, dtype, infers, drops)


def test_each_weight_is_served_by_the_kernels_of_its_device(gpu):
    assert chosen(weight(64)) is Backend.NATIVE
    assert chosen(weight(33)) is Backend.REFERENCE  # no tile holds its rows
    assert chosen(gpu((9, 0))) is Backend.CUDA
    assert chosen(SimpleNamespace(device=torch.device("meta"), layout="rows")) is Backend.REFERENCE


@pytest.mark.parametrize(
    ("backend", "call"),
    [
        (Backend.CUDA, {"rows": 128}),
        (Backend.CUDA, {"rows": 0}),
        (Backend.TRITON, {"rows": 129}),
        (Backend.TRITON, {"rows": 255}),
        (Backend.TRITON, {"rows": 1, "infers": False}),
        (Backend.TRITON, {"rows": 1, "dtype": torch.float32}),
        (Backend.TRITON, {"rows": 1, "drops": True}),
        (Backend.TRITON, {"rows": 4096, "infers": False, "drops": True}),
        (Backend.SLABS, {"rows": 256}),
        (Backend.SLABS, {"rows": 4096, "infers": False}),
        (Backend.SLABS, {"rows": 4096, "dtype": torch.float32}),
    ],
)
def test_a_gpu_chooses_by_rows(gpu, monkeypatch, backend, call):
    assert chosen(gpu((9, 0)), **call) is backend
    for missing in ("forced", "not installed"):
        with monkeypatch.context() as context:
            backends._serving.cache_clear()
            if missing == "forced":
                context.setattr(backends, "_FORCED", Backend.CUDA)
            else:
                context.setattr(backends, "why_not_triton", lambda device: "triton is not installed")
            without_triton = Backend.SLABS if backend is Backend.TRITON else backend
            assert chosen(gpu((9, 0)), **call) is without_triton


def test_how_many_rows_the_kernels_take_is_asked_once_a_shape_and_gpu(monkeypatch):
    asked = []
    operator = SimpleNamespace(default=lambda *what: asked.append(what) or 100 + what[0])
    monkeypatch.setattr(torch.ops.pyfastpeft, "linear_4bit_cuda_rows", operator)
    for _ in range(3):
        for device in (0, 1):
            w = {name: getattr(weight(64), name) for name in ("codes", "format", "shape", "blocksize", "nested")}
            w = SimpleNamespace(device=torch.device("cuda", device), **w)
            assert cuda_kernels.most_rows(w, torch.bfloat16) == 100 + device
    assert len(asked) == 2


@pytest.mark.parametrize(("triton", "backend"), [(True, Backend.TRITON), (False, Backend.REFERENCE)])
def test_without_cuda_kernels_the_slower_path_is_said_once(gpu, triton, backend):
    w = gpu((9, 0) if triton else (7, 5), "pyfastpeft was built without CUDA kernels")
    said = "Triton's kernels serve" if triton else "plain torch serves, as cuda:0 has compute capability 7.5"
    with pytest.warns(UserWarning, match=f"not used on cuda:0: pyfastpeft was built without CUDA kernels. {said}"):
        assert chosen(w) is backend
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen(w, 1023, infers=False) is backend


@pytest.mark.parametrize("triton", [True, False])
def test_amd_is_not_told_of_cuda_kernels(gpu, monkeypatch, triton):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    device = gpu((7, 5), "this torch has no CUDA").device  # AMD's capabilities are numbered apart
    if triton:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert choose_plain(device) is Backend.TRITON
    else:
        find_triton(monkeypatch, None)
        with pytest.warns(UserWarning, match="Triton kernels are not used on cuda:0: triton is not installed. Plain"):
            assert choose_plain(device) is Backend.REFERENCE


def test_where_triton_stands_alone_many_rows_are_worth_all_of_w_but_on_amd(gpu, monkeypatch):
    w = gpu((9, 0), "pyfastpeft was built without CUDA kernels")
    with pytest.warns(UserWarning, match="Triton's kernels serve"):
        assert chosen(w, 1024) is chosen(w, 4096, infers=False) is Backend.SLABS
    assert chosen(w, 4096, infers=False, drops=True) is Backend.TRITON
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert chosen(w, 4096) is Backend.TRITON


def test_without_any_kernels_a_gpu_has_the_reference(gpu, monkeypatch):
    on_gpu = gpu((9, 0), "pyfastpeft was built without CUDA kernels")
    find_triton(monkeypatch, None)
    with pytest.warns(UserWarning, match="plain torch serves, as triton is not installed"):
        assert chosen(on_gpu) is Backend.REFERENCE


@pytest.mark.parametrize("lacking", ["CC", "compiler", "headers"])
def test_what_triton_needs_to_launch_kernels_is_said_once_and_plain_torch_serves(gpu, monkeypatch, tmp_path, lacking):
    device = gpu((9, 0)).device
    monkeypatch.delenv("CC", raising=False)
    assert triton_kernels.why_not(device) is None
    w = gpu((9, 0))
    if lacking == "headers":
        monkeypatch.setattr(triton_kernels.sysconfig, "get_path", lambda *at: str(tmp_path))
    elif lacking == "CC":
        monkeypatch.setenv("CC", "no-such-compiler")
    else:
        monkeypatch.setenv("PATH", str(tmp_path))
    needed = {"CC": "no no-such-compiler", "compiler": "no gcc or clang", "headers": "no .*Python.h"}[lacking]
    with pytest.warns(UserWarning, match=f"Triton kernels are not used on cuda:0: Triton needs.*{needed}"):
        assert choose_plain(device) is Backend.REFERENCE
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen(w, infers=False) is Backend.SLABS and choose_plain(device) is Backend.REFERENCE
    monkeypatch.setattr(backends, "_FORCED", Backend.TRITON)
    with pytest.raises(RuntimeError, match=f"PYFASTPEFT_BACKEND is 'triton', and Triton needs.*{needed}"):
        choose_plain(device)


@pytest.mark.parametrize("forced", list(Backend))
def test_a_forced_backend_serves_wherever_it_can(gpu, monkeypatch, forced):
    monkeypatch.setattr(backends, "_FORCED", forced)
    assert chosen(gpu((9, 0))) is (Backend.CUDA if forced is Backend.NATIVE else forced)
    if forced not in (Backend.TRITON, Backend.CUDA):
        assert chosen(weight(64)) is forced


@pytest.mark.parametrize("reason", ["installed", "capability 7.5", "on cpu"])
def test_triton_forced_where_it_cannot_serve_says_why(gpu, monkeypatch, reason):
    monkeypatch.setattr(backends, "_FORCED", Backend.TRITON)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    w = gpu((7, 5))
    if reason == "installed":
        find_triton(monkeypatch, None)
    if reason == "on cpu":
        w = weight(64)
    with pytest.raises(RuntimeError, match=f"PYFASTPEFT_BACKEND is 'triton'.*{reason}"):
        chosen(w)


def test_cuda_forced_where_it_cannot_serve_says_why(gpu, monkeypatch):
    monkeypatch.setattr(backends, "_FORCED", Backend.CUDA)
    with pytest.raises(RuntimeError, match="PYFASTPEFT_BACKEND is 'cuda', and NVIDIA's driver is not installed"):
        chosen(gpu((9, 0), "NVIDIA's driver is not installed"))


def test_an_unknown_backend_is_refused_by_name():
    done = subprocess.run(
        [sys.executable, "-c", "import pyfastpeft"],
        env=os.environ | {"PYFASTPEFT_BACKEND": "cudnn"},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "PYFASTPEFT_BACKEND is 'cudnn'; it must be one of native, cuda, slabs, triton, reference" in done.stderr


def test_an_empty_name_forces_nothing():
    environment = os.environ | {"PYFASTPEFT_BACKEND": ""}
    subprocess.run([sys.executable, "-c", "import pyfastpeft.ops"], env=environment, check=True)


def test_the_oldest_gpu_and_the_largest_head_that_are_served(gpu):
    assert choose_plain(gpu((8, 0)).device) is Backend.TRITON
    assert choose_attention(torch.empty(1, 1, 1, 256)) is Backend.NATIVE
    assert choose_attention(torch.empty(1, 1, 1, 257)) is Backend.REFERENCE


def test_why_cuda_kernels_do_not_serve_is_their_own_word(monkeypatch):
    missing = {(9, 0): "", (7, 5): "the GPU has compute capability 7.5"}
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.ops.pyfastpeft, "cuda_missing", SimpleNamespace(default=lambda *c: missing[c]))
    for capability, why in missing.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        cuda_kernels.why_not.cache_clear()
        assert cuda_kernels.why_not(torch.device("cuda", 0)) == (why or None)


def test_plain_tensors_are_served_by_the_kernels_of_their_device(gpu, monkeypatch):
    assert choose_plain(torch.device("cpu")) is Backend.NATIVE
    assert choose_plain(gpu((9, 0)).device) is Backend.TRITON
    assert choose_plain(gpu((7, 5)).device) is Backend.REFERENCE
    assert choose_plain(torch.device("meta")) is Backend.REFERENCE
    monkeypatch.setattr(backends, "_FORCED", Backend.REFERENCE)
    assert choose_plain(torch.device("cpu")) is choose_plain(gpu((9, 0)).device) is Backend.REFERENCE
    monkeypatch.setattr(backends, "_FORCED", Backend.TRITON)
    assert choose_plain(gpu((9, 0)).device) is Backend.TRITON
    with pytest.raises(RuntimeError, match="has compute capability"):
        choose_plain(gpu((7, 5)).device)


@pytest.mark.parametrize("forced", [Backend.CUDA, Backend.SLABS])
def test_what_a_forced_backend_has_no_kernel_for_is_left_to_plain_torch(gpu, monkeypatch, forced):
    monkeypatch.setattr(backends, "_FORCED", forced)
    for device in (torch.device("cpu"), gpu((9, 0)).device, gpu((9, 0), "NVIDIA's driver is not installed").device):
        assert choose_plain(device) is choose_attention(torch.empty(1, 1, 1, 64, device="meta")) is Backend.REFERENCE
    x, up = torch.randn(2, 3, 16)
    monkeypatch.setattr(torch.ops.pyfastpeft.swiglu, "default", None)
    torch.testing.assert_close(swiglu(x, up), torch.nn.functional.silu(x) * up)


def test_a_forced_backend_quantizes_or_says_why_it_cannot(gpu, monkeypatch):
    missing = "NVIDIA's driver is not installed"
    for forced, without in ((Backend.CUDA, None), (Backend.SLABS, Backend.REFERENCE), (None, Backend.TRITON)):
        monkeypatch.setattr(backends, "_FORCED", forced)
        assert choose_quantizer(gpu((9, 0)).device) is Backend.CUDA
        device = gpu((9, 0), missing).device
        if without is None:
            with pytest.raises(RuntimeError, match=f"PYFASTPEFT_BACKEND is 'cuda', and {missing}"):
                choose_quantizer(device)
        else:
            with pytest.warns(UserWarning, match=missing):
                assert choose_quantizer(device) is without
    for forced in Backend:
        monkeypatch.setattr(backends, "_FORCED", forced)
        assert choose_quantizer(torch.device("cpu")) is Backend.NATIVE
        w = torch.randn(16, 64)
        assert (fp.quantize_4bit(w).dequantize() - w).abs().max() < 1


@pytest.mark.parametrize(("backend", "kernels"), [(Backend.CUDA, cuda_kernels), (Backend.TRITON, triton_kernels)])
def test_a_gpus_quantizers_get_what_the_operators_are_given(monkeypatch, backend, kernels):
    """Reached past the compiled ones, as torch reaches them for a GPU's tensors."""
    w, packed, seen = torch.randn(3, 70), fp.quantize_4bit(torch.randn(3, 70), "int4", 32), []
    held = packed.codes, packed.scale, packed.zero
    monkeypatch.setattr(backends, "choose_quantizer", lambda device: backend)
    for name, result in (("quantize_4bit", held), ("dequantize_4bit", w)):
        monkeypatch.setattr(kernels, name, lambda *given, result=result: seen.append(given) or result)
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CompositeExplicitAutograd)
    given = (w, 2, 32), (*held, 2, 32, [3, 70], torch.bfloat16)
    torch.ops.pyfastpeft.quantize_4bit.default.redispatch(keys, *given[0])
    torch.ops.pyfastpeft.dequantize_4bit.default.redispatch(keys, *given[1])
    assert seen == list(given)


def test_whole_tensors_are_quantized_and_decoded_by_the_cuda_kernels_where_they_serve(gpu, monkeypatch):
    assert choose_quantizer(torch.device("cpu")) is Backend.NATIVE
    assert choose_quantizer(gpu((9, 0)).device) is Backend.CUDA
    with pytest.warns(UserWarning, match="Triton's kernels serve"):
        assert choose_quantizer(gpu((9, 0), "NVIDIA's driver is not installed").device) is Backend.TRITON
    for forced in (Backend.TRITON, Backend.REFERENCE):
        monkeypatch.setattr(backends, "_FORCED", forced)
        assert choose_quantizer(gpu((9, 0)).device) is forced


def test_forcing_the_reference_reaches_operators_over_plain_tensors(monkeypatch):
    x, up = torch.randn(2, 3, 16)
    native = swiglu(x, up)
    monkeypatch.setattr(backends, "_FORCED", Backend.REFERENCE)
    monkeypatch.setattr(torch.ops.pyfastpeft.swiglu, "default", None)
    assert torch.allclose(swiglu(x, up), native)


def test_forcing_the_reference_reaches_dense_products_and_decoding(monkeypatch):
    x, weight = torch.randn(2, 64), torch.randn(32, 64)
    model = tiny_llama().eval()
    monkeypatch.setattr(backends, "_FORCED", Backend.REFERENCE)
    fp.accelerate(model)
    for name in ("dense_linear", "new_decoder"):
        monkeypatch.setattr(getattr(torch.ops.pyfastpeft, name), "default", None)
    with torch.no_grad():
        assert torch.equal(dense_linear(x, weight), torch.nn.functional.linear(x, weight))
        model.generate(torch.ones(1, 3, dtype=torch.long), max_new_tokens=3, min_new_tokens=3)


ON_GPUS = (
    *("rms_norm", "rms_norm_backward", "swiglu", "swiglu_backward", "rope", "cross_entropy_", "quantize_4bit"),
    *("dequantize_4bit", "prefix_attention", "prefix_attention_backward"),
)


@pytest.mark.parametrize("name", ON_GPUS)
def test_gpus_have_kernels_under_the_compiled_operators_names(name):
    assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(f"pyfastpeft::{name}", "CUDA")


@pytest.mark.parametrize("name", [*ON_GPUS, "_forward", "_backward", "_forward_slots"])
def test_triton_kernels_are_launched_on_the_gpu_of_their_tensors(monkeypatch, name):
    devices, current = [], []

    @contextmanager
    def on(device):
        current.append(device)
        yield
        current.pop()

    class Kernels:
        """Those that only say where they are launched."""

        def __getattr__(self, what):
            if what in ("Weight", "Branch", "Slots", "Call", "formula", "around"):
                held = {"rank": 4, "n": 8, "k": 64, "blocksize": 64, "absmax2": None, "seed": None}
                return lambda *_, **__: SimpleNamespace(**held, a=torch.ones(1), b=torch.ones(1))
            return lambda *_, **__: devices.append(list(current)) or (torch.ones(1),) * 3

    with monkeypatch.context() as context:
        context.setattr(torch.cuda, "device", on)
        with triton_kernels._on(torch.device("cuda", 1)):
            assert current == [torch.device("cuda", 1)]
    monkeypatch.setattr(triton_kernels, "_on", on)
    monkeypatch.setattr(triton_kernels, "_kernels", lambda file: Kernels())
    w = fp.quantize_4bit(torch.randn(8, 33))
    x, dy, a, b = torch.randn(2, 33), torch.randn(2, 8), torch.randn(4, 33), torch.randn(8, 4)
    attention = (*[torch.randn(1, 2, 3, 32)] * 3, None, None, None, None, None, True, 1.0, 0)
    given = {
        "quantize_4bit": (x, 0, 64),
        "dequantize_4bit": (w.codes, w.scale, None, 0, 64, [8, 33], torch.float32),
        "prefix_attention": (*attention, False),
        "prefix_attention_backward": (attention[0], *attention, attention[0], x),
        "_forward": (x, *w.operands, None, a, b, None, 1.0, None, 0.0),
        "_backward": (dy, x, dy, *w.operands, 33, a, b, None, 1.0, None, 0.0, True, True, True),
        "_forward_slots": (x, *w.operands, None, a[None], b[None], torch.ones(1), torch.zeros(2, dtype=torch.int64)),
    }
    getattr(triton_kernels, name)(*given.get(name, (x, x)))
    assert devices == [[x.device]]


def test_tiles_are_asked_for_by_all_that_they_depend_on(monkeypatch):
    asked = []
    monkeypatch.setattr(triton_kernels, "tuned", lambda call, device, formula, *_: asked.append((*call, formula)))
    kernels = SimpleNamespace(formula=lambda x, w, forward: f"forward {forward}", around=None)

    def key(direction="forward", rows=8, n=16, k=128, dtype=torch.bfloat16, weight=("nf4", 64), branch=None):
        packed = fp.quantize_4bit(torch.randn(n, k), *weight)
        w = SimpleNamespace(n=n, k=k, blocksize=packed.blocksize, absmax2=packed.operands.absmax2)
        rank, adapter, seed = branch or (0, None, None)
        lora = SimpleNamespace(rank=rank, a=torch.empty(1, dtype=adapter), seed=seed) if branch else None
        x = torch.empty(rows, 1, dtype=dtype)
        triton_kernels._best(direction, kernels, x, packed.format.id, w, lora, lambda cut: cut)
        assert asked[-1][-1] == f"forward {direction == 'forward'}"
        return asked[-1]

    others = [{"direction": "backward"}, {"rows": 9}, {"n": 8}, {"k": 256}, {"dtype": torch.float16}]
    others += [
        {"weight": ("fp4", 64)},
        {"weight": ("int4", 64)},
        {"weight": ("nf4", 32)},
        {"weight": ("nf4", 64, True)},
    ]
    others += [{"branch": (4, torch.float32, None)}, {"branch": (8, torch.float32, None)}]
    others += [{"branch": (4, torch.bfloat16, None)}, {"branch": (4, torch.float32, torch.zeros(1))}]
    keys = [key(), *(key(**other) for other in others)]
    assert len(set(keys)) == len(keys)
    assert key(rows=5) == key() and key(rows=0) == key(rows=1)
    assert key(k=96, weight=("nf4", 32)) == key(k=96, weight=("nf4", 64))  # segments of 32 columns, both


def test_the_choice_is_a_constant_to_the_compiler(gpu):
    device = gpu((9, 0)).device
    chosen = torch.compile(lambda x: x + (choose_plain(device) is Backend.TRITON), fullgraph=True, backend="eager")
    assert chosen(torch.zeros(1)) == 1


class _Allocations(TorchDispatchMode):
    """Fails where the thread in which it is on makes something on a device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **kwargs or {})
        assert not isinstance(made, torch.Tensor) or made.device.type == "cpu", func
        return made


def test_what_triton_kernels_keep_is_not_allocated_by_the_thread_that_calls_them():
    """Whose memory may be from the pool of a graph, while torch.compile warms it up with its device as the default."""
    pytest.importorskip("triton")
    from pyfastpeft.kernels import linear_4bit, quantize_4bit

    table, device = triton_kernels._tables("nf4")[0], torch.device("meta")
    for cached, *key in (
        (library.dynamic_map,),
        (triton_kernels._table_on, 0),
        (linear_4bit._table_on, table, torch.bfloat16),
        (quantize_4bit._bins, table),
    ):
        cached.cache_clear()
        linear_4bit.table_words.cache_clear()
        with torch.inference_mode(), _Allocations(), device:
            kept = cached(*key, device)
        assert kept.device == device and not kept.is_inference()
        cached.cache_clear()


def test_compilers_take_what_serves_a_device_without_a_warning(gpu):
    device = gpu((9, 0)).device

    @torch.compile(fullgraph=True, backend="eager")
    def served(x):
        return x + sum(backends._serving(device)) + (cuda_kernels.why_not(torch.device("cpu")) is not None)

    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert served(torch.zeros(())) == 3


def test_what_a_capture_forbids_is_done_in_the_relaxed_mode(monkeypatch):
    mode, seen = threading.local(), []

    def exchange(other):
        before, mode.now = getattr(mode, "now", 0), other._obj.value
        other._obj.value = before

    class Values:
        def to(self, device):
            seen.append((threading.get_ident(), mode.now))

    monkeypatch.setattr(graphs, "_exchange", lambda: exchange)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    graphs.constant_on(Values(), torch.device("cuda", 0))
    assert seen[0][0] != threading.get_ident() and seen[0][1] == graphs._RELAXED
    with pytest.raises(ZeroDivisionError), triton_kernels._on(torch.device("cuda", 0)):
        assert mode.now == graphs._RELAXED
        _ = 1 / 0
    assert mode.now == 0
