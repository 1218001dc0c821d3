"""Which backend serves a weight, decided without the device."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import pyfastpeft as fp
from pyfastpeft.ops import Backend, backends, swiglu, triton_kernels
from pyfastpeft.ops.backends import choose, choose_plain


@pytest.fixture
def gpu(monkeypatch):
    """Called with a compute capability: a weight on a GPU of that capability, with Triton installed."""

    def of(capability):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(triton_kernels.importlib.util, "find_spec", lambda name: object())
        triton_kernels.why_not.cache_clear()
        return SimpleNamespace(device=torch.device("cuda", 0), layout="rows")

    yield of
    triton_kernels.why_not.cache_clear()


def weight(k):
    return fp.quantize_4bit(torch.randn(16, k))


def test_each_weight_is_served_by_the_kernels_of_its_device(gpu):
    assert choose(weight(64)) is Backend.NATIVE
    assert choose(weight(33)) is Backend.REFERENCE  # no tile holds its rows
    assert choose(gpu((9, 0))) is Backend.TRITON
    assert choose(gpu((7, 5))) is Backend.REFERENCE
    assert choose(SimpleNamespace(device=torch.device("meta"), layout="rows")) is Backend.REFERENCE


def test_without_triton_a_gpu_has_the_reference(gpu, monkeypatch):
    on_gpu = gpu((9, 0))
    monkeypatch.setattr(triton_kernels.importlib.util, "find_spec", lambda name: None)
    assert choose(on_gpu) is Backend.REFERENCE


@pytest.mark.parametrize("forced", [Backend.REFERENCE, Backend.TRITON, Backend.NATIVE])
def test_a_forced_backend_serves_wherever_it_can(gpu, monkeypatch, forced):
    monkeypatch.setattr(backends, "_FORCED", forced)
    assert choose(gpu((9, 0))) is (Backend.TRITON if forced is Backend.NATIVE else forced)
    if forced is not Backend.TRITON:
        assert choose(weight(64)) is forced


@pytest.mark.parametrize("reason", ["installed", "capability 7.5", "on cpu"])
def test_triton_forced_where_it_cannot_serve_says_why(gpu, monkeypatch, reason):
    monkeypatch.setattr(backends, "_FORCED", Backend.TRITON)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    w = gpu((7, 5))
    if reason == "installed":
        monkeypatch.setattr(triton_kernels.importlib.util, "find_spec", lambda name: None)
    if reason == "on cpu":
        w = weight(64)
    with pytest.raises(RuntimeError, match=f"PYFASTPEFT_BACKEND is 'triton'.*{reason}"):
        choose(w)


def test_an_unknown_backend_is_refused_by_name():
    done = subprocess.run(
        [sys.executable, "-c", "import pyfastpeft"],
        env=os.environ | {"PYFASTPEFT_BACKEND": "cudnn"},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "PYFASTPEFT_BACKEND is 'cudnn'; it must be one of native, triton, reference" in done.stderr


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


def test_forcing_the_reference_reaches_operators_over_plain_tensors(monkeypatch):
    x, up = torch.randn(2, 3, 16)
    native = swiglu(x, up)
    monkeypatch.setattr(backends, "_FORCED", Backend.REFERENCE)
    monkeypatch.setattr(torch.ops.pyfastpeft.swiglu, "default", None)
    assert torch.allclose(swiglu(x, up), native)


@pytest.mark.parametrize(
    "name", ["rms_norm", "rms_norm_backward", "swiglu", "swiglu_backward", "rope", "cross_entropy", "quantize_4bit"]
)
def test_gpus_have_kernels_under_the_compiled_operators_names(name):
    assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(f"pyfastpeft::{name}", "CUDA")


def test_the_choice_is_a_constant_to_the_compiler(gpu):
    device = gpu((9, 0)).device
    chosen = torch.compile(lambda x: x + (choose_plain(device) is Backend.TRITON), fullgraph=True, backend="eager")
    assert chosen(torch.zeros(1)) == 1
