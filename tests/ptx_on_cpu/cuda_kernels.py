"""csrc/cuda by the PTX that nvcc emits, launched by its own host code: see test_ptx_on_cpu.py."""

from __future__ import annotations

import ctypes
import os
import random
import re
import subprocess

import pytest
import torch
from launch import COMPILER, HERE, allow, in_parallel, load
from test_linear_4bit import FORWARD, adapter, error, float64
from translate import translate

import pyfastpeft as fp
from pyfastpeft.formats import FORMATS
from pyfastpeft.ops.triton_kernels import _weight

CHIP = int(os.environ["PTX_TARGET"].removeprefix("cuda:"))
CSRC = HERE.parents[1] / "csrc"
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
KERNELS = {  # what of each source is translated: the kernels that the tests below launch
    "linear_4bit": "linear_4bit_kernel(I13__nv_bfloat16Li1ELNS0_6AccessE[01]E|I6__halfLi2ELNS0_6AccessE0E)",
    "linear_4bit_sm90": "" if CHIP == 90 else None,
    "dequantize_4bit": "bfloat16|half",
    "quantize_4bit": "",
    "api": None,
}


def structure(name: str, fields: str) -> type[ctypes.Structure]:
    """Names of fields, each with the letter of its type: p(ointer), q (int64), i (int32), f(loat)."""
    types = {"p": ctypes.c_void_p, "q": ctypes.c_int64, "i": ctypes.c_int32, "f": ctypes.c_float}
    parsed = [(field[1:], types[field[0]]) for field in fields.split()]
    return type(name, (ctypes.Structure,), {"_fields_": parsed})


PfWeight = structure("PfWeight", "pcodes pscale pscale8 pzero pabsmax2 poffset pdynamic_map qn qk iblocksize iformat")
PfLora = structure(
    "PfLora",
    "pa pb pscaling prank_scale prows ffactor ia_dtype ib_dtype qrank qslots qa_slot_stride qa_stride "
    "qb_slot_stride qb_stride qb_column_stride",
)


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """A folder with the PTX of each source and kernels.so, their host code over cudart.cpp."""
    folder = tmp_path_factory.mktemp("cuda")
    arch = f"compute_{CHIP}{'a' if CHIP == 90 else ''}"
    nvcc = [os.environ["NVCC"], "-std=c++20", "-O3", "-cudart", "none", "-Xcompiler", "-fPIC", f"-I{CSRC}", f"-I{HERE}"]
    nvcc += ["-gencode", f"arch={arch},code={arch}", "--keep", "--keep-dir", folder]
    sources = [*(CSRC / f"cuda/{name}.cu" for name in KERNELS), HERE / "cudart.cpp"]
    in_parallel([[*nvcc, "-c", source, "-o", folder / f"{source.stem}.o"] for source in sources])
    subprocess.run(
        [*COMPILER, "-shared", "-Wl,-Bsymbolic", *folder.glob("*.o"), "-o", folder / "kernels.so"], check=True
    )
    return folder


@pytest.fixture(scope="session")
def library(compiled):
    loaded = ctypes.CDLL(str(compiled / "kernels.so"))
    loaded.pf_cuda_error.restype = ctypes.c_char_p
    loaded.pf_linear_4bit_workspace.restype = ctypes.c_int64
    for name, only in KERNELS.items():
        if only is not None:
            load(loaded, translate((compiled / f"{name}.ptx").read_text(), only))
    return loaded


@pytest.fixture(autouse=True)
def device(library):
    """Any number of multiprocessors, any order of warps; a graph records the calls or not."""
    library.ptx_device(CHIP, random.choice([2, 4, 132]), random.randrange(100))
    library.ptx_captures(random.choice([0, 1]))


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
    parts = _weight(w.rows().operands, w.shape[1])
    nested = parts.absmax2 is not None
    tensors = [parts.codes, None if nested else parts.scale, parts.scale if nested else None, *parts[2:6]]
    addresses = [None if t is None else t.data_ptr() for t in tensors]
    return PfWeight(*addresses, parts.n, parts.k, parts.blocksize, FORMATS[w.quant_type].id), tensors


def poisoned(*shape, dtype):
    return torch.full(shape, float("nan"), dtype=dtype)


def linear(library, x, w, bias=None, bank=None):
    """y; bank: (a [slots, r, K], b [slots, N, r], scaling [slots], rank_scale [r] or None, rows [M] or None: all have
    slot 0)."""
    m, n, dtype = len(x), w.shape[0], DTYPES[x.dtype]
    weight, tensors = operand(w)
    lora = None
    if bank is not None:
        a, b = bank[:2]
        lora = PfLora(*(None if t is None else t.data_ptr() for t in bank), 1.0, DTYPES[a.dtype], DTYPES[b.dtype],
                      a.shape[1], len(a), *a.stride()[:2], *b.stride())  # fmt: skip
    branch = None if lora is None else ctypes.byref(lora)
    size = library.pf_linear_4bit_workspace(ctypes.byref(weight), branch, ctypes.c_int64(m))
    workspace = torch.full((size // 4,), float("nan"))
    y = poisoned(m, n, dtype=x.dtype)
    allow(library, *tensors, x, bias, y, workspace, *(bank or ()))
    bias_dtype = DTYPES[torch.float32 if bias is None else bias.dtype]
    call(library, "pf_linear_4bit", weight, x, x.stride(0), bias, (bias_dtype,), lora, y, m, (dtype,), workspace, None)
    call(library, "ptx_finish")
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


def test_calls_of_one_kernel_may_need_less_and_more_shared_memory(library):
    """Those of other threads and of graphs go on meanwhile."""
    w = fp.quantize_4bit(torch.randn(70, 640))
    for m in (8, 1, 5, 8):
        x = torch.randn(m, 640).bfloat16()
        assert error(linear(library, x, w), float64(x, w)) <= FORWARD[x.dtype]


def test_what_is_kept_may_be_made_while_graphs_are_captured(library):
    values, places = torch.randn(256), []
    for capture in (1, 0):
        library.ptx_captures(capture)
        place = ctypes.c_void_p()
        call(library, "pf_dynamic_map", values, ctypes.byref(place))
        call(library, "ptx_finish")
        places.append(place.value)
    assert places[0] == places[1] and list((ctypes.c_float * 256).from_address(places[0])) == values.tolist()
    w, x, pair = fp.quantize_4bit(torch.randn(64, 1024)), torch.randn(1, 1024).bfloat16(), adapter(64, 1024, 4)
    bank = (pair[0][None], pair[1][None], torch.ones(1), None, None)
    made = []
    for capture in (0, 2, 3, 4, 0):
        library.ptx_captures(capture)
        assert error(linear(library, x, w, None, bank), float64(x, w, None, (*pair, 1.0))) <= FORWARD[x.dtype]
        made.append(library.ptx_kept())
    assert made[1:] == [3] * 4  # the map; counters of the stream, and of one graph after another


def mixed_adapters_error(library, m, n, k, r, dtype):
    """The largest of a row's, whose adapter is drawn."""
    slots = 3
    w = fp.quantize_4bit(torch.randn(n, k))
    pairs = [adapter(n, k, r, random.choice([torch.float32, dtype])) for _ in range(slots)]
    a, b = (torch.stack([p[i].to(pairs[0][i].dtype) for p in pairs]) for i in (0, 1))
    scaling, rows, x = torch.rand(slots) + 0.5, torch.randint(-1, slots, (m,)), torch.randn(m, k).to(dtype)
    rank_scale = random.choice([None, torch.rand(r) + 0.5])
    y, largest = linear(library, x, w, None, (a, b, scaling, rank_scale, rows)), 0.0
    for i, slot in enumerate(rows.tolist()):
        scale = scaling[slot] * (1.0 if rank_scale is None else rank_scale)
        lora = None if slot < 0 else (a[slot], b[slot], scale)
        wrong = error(y[i : i + 1], float64(x[i : i + 1], w, None, lora), r)
        largest = wrong if wrong > largest or wrong != wrong else largest
    return largest


@pytest.mark.parametrize("m, k, dtype", [(1, 1088, torch.bfloat16), (7, 512, torch.bfloat16), (13, 512, torch.float16)])
def test_rows_of_mixed_adapters_match_each_alone(library, m, k, dtype):
    assert mixed_adapters_error(library, m, 70, k, 16, dtype) <= FORWARD[dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("quant_type", ["nf4", "int4"])
@pytest.mark.parametrize("k", [35, 320])  # by elements; by words, and what is left over
def test_weights_are_decoded(library, k, quant_type, dtype):
    n = 40
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
    expected = fp.quantize_4bit(source, quant_type, blocksize).rows()
    codes = torch.full_like(expected.codes, 0xFF)
    scale = torch.full_like(expected.scale, float("nan"))
    zero = None if expected.zero is None else torch.full_like(expected.zero, float("nan"))
    allow(library, source, codes, scale, zero)
    form = (FORMATS[quant_type].id,)
    call(library, "pf_quantize_4bit", source, (0,), count, form, (blocksize,), codes, scale, zero, None)
    assert torch.equal(codes, expected.codes) and torch.equal(scale, expected.scale)
    assert zero is None or torch.equal(zero, expected.zero)


# ---- Hopper's own kernels --------------------------------------------------------------------------------------------

hopper = pytest.mark.skipif(CHIP != 90, reason="kernels for Hopper")


@hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("m", [18, 64, 90, 128, 150, 200])  # each kernel has the rows up to a number of its own
def test_many_rows_on_hopper_match_float64(library, m, dtype):
    n, k, r = random.choice([70, 130]), random.choice([64, 320]), random.choice([5, 40])
    quant_type, nested = random.choice([("nf4", False), ("nf4", True), ("fp4", False), ("int4", False)])
    w = fp.quantize_4bit(torch.randn(n, k), quant_type, random.choice([32, 64]), nested)
    x, bias = torch.randn(m, k).to(dtype), random.choice([None, torch.randn(n), torch.randn(n).to(dtype)])
    a, b = adapter(n, k, r, random.choice([torch.float32, dtype]))
    rank_scale = torch.rand(r) + 0.5
    y = linear(library, x, w, bias, (a[None], b[None], torch.tensor([0.5]), rank_scale, None))
    assert error(y, float64(x, w, bias, (a, b, 0.5 * rank_scale)), m * r) <= FORWARD[dtype]


@hopper
@pytest.mark.parametrize("m, k, dtype", [(18, 1344, torch.bfloat16), (100, 320, torch.float16)], ids=str)
def test_many_rows_of_mixed_adapters_match_each_alone(library, m, k, dtype):
    for seed in range(4):
        library.ptx_device(CHIP, 132, seed)
        assert mixed_adapters_error(library, m, 70, k, 9, dtype) <= FORWARD[dtype]


@hopper
@pytest.mark.parametrize("multiprocessors", [2, 4, 132])
def test_splits_over_the_columns_add_up(library, multiprocessors):
    library.ptx_device(CHIP, multiprocessors, random.randrange(100))
    w, x = fp.quantize_4bit(torch.randn(66, 1088)), torch.randn(18, 1088).bfloat16()
    assert error(linear(library, x, w), float64(x, w)) <= FORWARD[x.dtype]


FAULTS = {  # what stands in the PTX, what does instead, and what is said where the result alone would not tell
    "a product that nothing waits for": (r"wgmma\.wait_group\.sync\.aligned\s+1;", "", "operand is written before"),
    "sums read before they are there": (r"wgmma\.wait_group\.sync\.aligned\s+0;", "", "sum is accessed before"),
    "a wait for one product less": (r"(wgmma\.wait_group\.sync\.aligned\s+)0;", r"\g<1>1;", "sum is accessed before"),
    "products of no group": (r"wgmma\.commit_group\.sync\.aligned;", "", "before wgmma.wait_group"),
    "no fence before products": (r"wgmma\.fence\.sync\.aligned;", "", "after the last wgmma.fence"),
    "registers of A in another order": (r"(\}, \{%r\d+),(%r\d+),(%r\d+)", r"\1,\3,\2", None),
    "columns of x of the next product": (r"(add\.s64 \s*%rd\d+, %rd\d+), 2;", r"\1, 4;", None),
    "eight rows further than they are": (r"4611686293305360384", str(1 << 62 | 128 << 32 | 1 << 16), None),
    "another swizzle": (r"4611686293305360384", str(2 << 62 | 64 << 32 | 1 << 16), None),
    "stores of the branch that wgmma does not see": (r"fence\.proxy\.async\.shared::cta;", "", None),
    "no wait for copies": (r"@!ended bra again;", "", None),
    "S read before it is there": (r"griddepcontrol\.wait;", "", None),
    "another block's sums read before they are there": (r"barrier\.cluster\.wait\.acquire;", "", None),
    "copies to one block of two": (r"(\.multicast::cluster \[[^;]*), %rs\d+;", r"\1, 1;", None),
}


@pytest.fixture(scope="session")
def sweep(compiled):
    """PTX of what serves up to 32 rows of bfloat16, and the module that it is."""
    head, *kernels = re.split(r"(?=\.entry)", (compiled / "linear_4bit_sm90.ptx").read_text())
    ptx = head + "".join(k for k in kernels if re.match(r"\S+\s+\S+(project|sweep)I13__nv_bfloat16(Li16ELi1E)?E", k))
    return ptx, translate(ptx)


@hopper
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_in_hopper_kernels_are_seen(library, sweep, fault):
    pattern, replacement, message = FAULTS[fault]
    ptx, count = re.subn(pattern, replacement, sweep[0])
    assert count > 0
    load(library, translate(ptx))
    try:
        for seed in range(4):
            library.ptx_device(CHIP, 132, seed)
            try:
                wrong = mixed_adapters_error(library, 18, 70, 1344, 9, torch.bfloat16)
            except AssertionError as found:
                assert message is None or message in str(found)
                return
            if not wrong <= FORWARD[torch.bfloat16]:
                assert message is None, f"a result {wrong} off, and no error"
                return
        pytest.fail("nothing was wrong")
    finally:
        load(library, sweep[1])
