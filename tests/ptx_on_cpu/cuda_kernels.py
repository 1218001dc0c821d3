"""csrc/cuda by the PTX that nvcc emits, launched by its own host code: see test_ptx_on_cpu.py."""

from __future__ import annotations

import ctypes
import os
import random
import subprocess

import pytest
import torch
from launch import COMPILER, HERE, allow
from test_linear_4bit import FORWARD, adapter, error, float64
from translate import translate

import pyfastpeft as fp
from pyfastpeft.formats import FORMATS
from pyfastpeft.ops.triton_kernels import _weight

CHIP = int(os.environ["PTX_TARGET"].removeprefix("cuda:"))
CSRC = HERE.parents[1] / "csrc"
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
KERNELS = {  # what of each source is translated: the kernels that the tests below launch
    "linear_4bit.cu": "linear_4bit_kernel(I13__nv_bfloat16Li1ELNS0_6AccessE[01]E|I6__halfLi2ELNS0_6AccessE0E)",
    "dequantize_4bit.cu": "bfloat16|half",
    "quantize_4bit.cu": "",
}


def structure(name: str, fields: str) -> type[ctypes.Structure]:
    """Names of fields, each with the letter of its type: p(ointer), q (int64), i (int32), f(loat)."""
    types = {"p": ctypes.c_void_p, "q": ctypes.c_int64, "i": ctypes.c_int32, "f": ctypes.c_float}
    parsed = [(field[1:], types[field[0]]) for field in fields.split()]
    return type(name, (ctypes.Structure,), {"_fields_": parsed})


PfWeight = structure("PfWeight", "pcodes pscale pscale8 pzero pabsmax2 poffset pdynamic_map qn qk iblocksize iformat")
PfLora = structure(
    "PfLora",
    "pa pb pscaling prows ffactor ia_dtype ib_dtype qrank qslots qa_slot_stride qa_stride qb_slot_stride qb_stride "
    "qb_column_stride",
)


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cuda")
    arch = f"compute_{CHIP}{'a' if CHIP == 90 else ''}"
    nvcc = [os.environ["NVCC"], "-std=c++20", "-O3", "-cudart", "none", "-Xcompiler", "-fPIC", f"-I{CSRC}"]
    nvcc += ["-gencode", f"arch={arch},code={arch}", "--keep", "--keep-dir", folder]
    linked = []
    sources = {CSRC / "cuda" / name: only for name, only in KERNELS.items()}
    # Hopper's own kernel uses what the translator does not know; linear_4bit.cu asks its host code whether it serves.
    for source in (CSRC / "cuda/api.cu", CSRC / "cuda/linear_4bit_sm90.cu", HERE / "cudart.cpp"):
        sources[source] = None
    for source, only in sources.items():
        host = (folder / source.name).with_suffix(".o")
        subprocess.run([*nvcc, f"-I{HERE}", "-c", source, "-o", host], check=True)
        linked.append(host)
        if only is not None:
            linked.append(host.with_suffix(".ptx.cpp"))
            linked[-1].write_text(translate(host.with_suffix(".ptx").read_text(), only))
    subprocess.run([*COMPILER, "-shared", *linked, "-o", folder / "kernels.so"], check=True)
    loaded = ctypes.CDLL(str(folder / "kernels.so"))
    loaded.pf_cuda_error.restype = ctypes.c_char_p
    loaded.pf_linear_4bit_workspace.restype = ctypes.c_int64
    return loaded


@pytest.fixture(autouse=True)
def device(library):
    """Any number of multiprocessors, any order of warps."""
    library.ptx_device(CHIP, random.choice([2, 4, 132]), random.randrange(100))


def call(library, name, *arguments):
    """Tensors by their address, integers in 64 bits but those in a tuple, which have 32."""
    passed = []
    for a in arguments:
        if isinstance(a, ctypes.Structure):
            a = ctypes.byref(a)
        elif isinstance(a, tuple):
            a = ctypes.c_int32(*a)
        elif isinstance(a, int):
            a = ctypes.c_int64(a)
        elif a is None or isinstance(a, torch.Tensor):
            a = ctypes.c_void_p(None if a is None else a.data_ptr())
        passed.append(a)
    status = getattr(library, name)(*passed)
    assert status == 0, library.pf_cuda_error(ctypes.c_int32(status)).decode()


def operand(w):
    """(PfWeight, its tensors)."""
    parts = _weight(w)
    nested = parts.absmax2 is not None
    tensors = [parts.codes, None if nested else parts.scale, parts.scale if nested else None, *parts[2:6]]
    addresses = [None if t is None else t.data_ptr() for t in tensors]
    return PfWeight(*addresses, parts.n, parts.k, parts.blocksize, FORMATS[w.quant_type].id), tensors


def poisoned(*shape, dtype):
    return torch.full(shape, float("nan"), dtype=dtype)


def linear(library, x, w, bias=None, bank=None):
    """y; bank: (a [slots, r, K], b [slots, N, r], scaling [slots], rows [M])."""
    m, n, dtype = len(x), w.shape[0], DTYPES[x.dtype]
    weight, tensors = operand(w)
    lora = None
    if bank is not None:
        a, b, scaling, rows = bank
        lora = PfLora(a.data_ptr(), b.data_ptr(), scaling.data_ptr(), rows.data_ptr(), 1.0, DTYPES[a.dtype],
                      DTYPES[b.dtype], a.shape[1], len(a), *a.stride()[:2], *b.stride())  # fmt: skip
    size = library.pf_linear_4bit_workspace(
        ctypes.byref(weight), None if lora is None else ctypes.byref(lora), ctypes.c_int64(m), ctypes.c_int32(dtype)
    )
    # What is counted with begins at zero; the rest is written before it is read.
    workspace = torch.full((size // 4,), float("nan"))
    counters = 4 * (4 + 2 * 4096)
    workspace[: counters // 4] = 0
    y = poisoned(m, n, dtype=x.dtype)
    allow(library, *tensors, x, bias, y, workspace, *(bank or ()))
    bias_dtype = DTYPES[torch.float32 if bias is None else bias.dtype]
    call(library, "pf_linear_4bit", weight, x, x.stride(0), bias, (bias_dtype,), lora, y, m, (dtype,), workspace, None)
    assert not workspace[: counters // 4].any()
    return y


@pytest.mark.parametrize(
    "m, n, k, dtype, quant_type, blocksize, nested",
    [
        (1, 64, 1024, torch.bfloat16, "nf4", 64, False),
        (5, 70, 640, torch.bfloat16, "fp4", 128, True),
        (5, 70, 640, torch.bfloat16, "int4", 64, False),
        (3, 66, 320, torch.bfloat16, "nf4", 32, False),
        (16, 130, 512, torch.float16, "nf4", 256, True),
    ],
)
def test_products_match_float64(library, m, n, k, dtype, quant_type, blocksize, nested):
    w = fp.quantize_4bit(torch.randn(n, k), quant_type, blocksize, nested)
    x, bias = torch.randn(m, k).to(dtype), random.choice([None, torch.randn(n), torch.randn(n).to(dtype)])
    assert error(linear(library, x, w, bias), float64(x, w, bias)) <= FORWARD[dtype]


@pytest.mark.parametrize("m, k, dtype", [(1, 1088, torch.bfloat16), (7, 512, torch.bfloat16), (13, 512, torch.float16)])
def test_rows_of_mixed_adapters_match_each_alone(library, m, k, dtype):
    n, r, slots = 70, 16, 3
    w = fp.quantize_4bit(torch.randn(n, k))
    pairs = [adapter(n, k, r, random.choice([torch.float32, dtype])) for _ in range(slots)]
    a, b = (torch.stack([p[i].to(pairs[0][i].dtype) for p in pairs]) for i in (0, 1))
    scaling, rows, x = torch.rand(slots) + 0.5, torch.randint(-1, slots, (m,)), torch.randn(m, k).to(dtype)
    y = linear(library, x, w, None, (a, b, scaling, rows))
    for i, slot in enumerate(rows.tolist()):
        lora = None if slot < 0 else (a[slot], b[slot], float(scaling[slot]))
        assert error(y[i : i + 1], float64(x[i : i + 1], w, None, lora), r) <= FORWARD[dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("quant_type", ["nf4", "int4"])
def test_weights_are_decoded(library, quant_type, dtype):
    n, k = 40, random.choice([96, 35])
    w = fp.quantize_4bit(torch.randn(n, k), quant_type)
    weight, tensors = operand(w)
    row0, rows = 3, 30
    out = poisoned(rows, k, dtype=dtype)
    allow(library, *tensors, out)
    call(library, "pf_dequantize_4bit", weight, row0, rows, out, (DTYPES[dtype],), None)
    assert error(out, w.dequantize(torch.float64)[row0 : row0 + rows]) <= FORWARD[dtype]


@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "int4"])
def test_weights_are_encoded_as_the_reference_does(library, quant_type):
    count, blocksize = 64 * 37 + 5, 64
    source = torch.randn(1, count)
    expected = _weight(fp.quantize_4bit(source, quant_type, blocksize))
    codes = torch.full_like(expected.codes, 0xFF)
    scale = torch.full_like(expected.scale, float("nan"))
    zero = None if expected.zero is None else torch.full_like(expected.zero, float("nan"))
    allow(library, source, codes, scale, zero)
    form = (FORMATS[quant_type].id,)
    call(library, "pf_quantize_4bit", source, (0,), count, form, (blocksize,), codes, scale, zero, None)
    assert torch.equal(codes, expected.codes) and torch.equal(scale, expected.scale)
    assert zero is None or torch.equal(zero, expected.zero)
