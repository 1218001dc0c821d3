"""The operators over the CUDA kernels' C ABI: arguments, checks, workspace and errors, with kernels for the CPU behind
them (see native/cuda_operators.cpp). The kernels themselves are tested elsewhere."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_linear_4bit import FORWARD, adapter, error, float64, packed_weight, pick

from pyfastpeft.formats import DYNAMIC_MAP, FORMATS
from pyfastpeft.ops import BankView, Lora, backends, cuda_kernels, linear_4bit

ROOT = Path(__file__).parent.parent
MOST_ROWS = 24  # of these kernels
HALVES = [torch.bfloat16, torch.float16]
call = torch.ops.pyfastpeft.linear_4bit_cuda.default


def braced(values):
    return ",".join(f"{v:.9e}f" for v in values)


@pytest.fixture(scope="module", autouse=True)
def operators(tmp_path_factory):
    """Registers the operators for tensors on the CPU."""
    torch_folder = Path(torch.__file__).parent
    library = tmp_path_factory.mktemp("operators") / "cuda_operators.so"
    tables = ",".join("{" + braced(f.table.tolist()) + "}" for f in FORMATS.values())
    flags = [
        "-O1",
        "-std=c++20",
        "-shared",
        "-fPIC",
        "-fvisibility=hidden",
        "-DTORCH_TARGET_VERSION=0x020a000000000000",
    ]
    flags += [f"-DPF_TABLES={tables}", f"-DPF_DYNAMIC_MAP={braced(DYNAMIC_MAP.tolist())}"]
    flags += [f"-I{ROOT / 'csrc'}", f"-I{torch_folder / 'include'}"]
    command = [
        "g++",
        *flags,
        ROOT / "tests/native/cuda_operators.cpp",
        torch_folder / "lib/libtorch_cpu.so",
        "-o",
        library,
    ]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    torch.ops.load_library(str(library))


@pytest.fixture(autouse=True)
def served(monkeypatch):
    """Weights on the CPU that lie in rows are served as a GPU's."""
    monkeypatch.setattr(backends, "_serving", lambda device: (True, False))
    monkeypatch.setattr(cuda_kernels, "_most_rows", lambda *arguments: 0 if arguments[-1].itemsize == 4 else MOST_ROWS)


def rows_weight(n, k, *arguments):
    return packed_weight(n, k, *arguments).rows()


def agrees(x, w, bias=None, lora=None):
    assert backends.choose(w, len(x), x.dtype, infers=True) is backends.Backend.CUDA
    with torch.no_grad():
        y = linear_4bit(x, w, bias, lora)
    assert y.dtype == x.dtype
    expected = float64(x, w, bias, None if lora is None else Lora(*lora))
    assert error(y, expected) <= FORWARD[x.dtype]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_argument_reaches_the_kernel_as_it_is_meant(dtype):
    for m in (0, 1, 3, 8, MOST_ROWS, 5):
        for quant_type, double_quant in (("nf4", False), ("fp4", True), ("int4", False)):
            n, k = pick([(33, 96), (7, 33), (16, 64)])
            w, r = rows_weight(n, k, quant_type, double_quant), pick([1, 4, 17])
            a, b = adapter(n, k, r, pick([torch.float32, *HALVES]))
            bias = pick([None, torch.randn(n), torch.randn(2 * n)[::2].to(dtype)])
            lora = pick(
                [None, (a, b, 0.5), (a.t().contiguous().t(), b, torch.rand(r)), (a, b.t().contiguous().t(), 2.0)]
            )
            x = torch.randn(m, 2 * k).to(dtype)
            agrees(pick([x[:, :k], x[:, ::2], x[:, :k].contiguous()]), w, bias, lora)


def test_a_bank_serves_each_row_its_own_adapter_and_none_for_minus_one():
    slots, r, n, k, m = 4, 8, 40, 96, 9
    w, x = rows_weight(n, k), torch.randn(m, k).bfloat16()
    a, b, scaling = torch.randn(slots, r, 2 * k)[..., :k] * 0.1, torch.randn(slots, n, r) * 0.3, torch.rand(slots) + 0.5
    rows = torch.randint(-1, slots, (m,))
    with torch.no_grad():
        y = linear_4bit(x, w, None, BankView(a, b, scaling, rows))
    for i, slot in enumerate(rows.tolist()):
        lora = None if slot < 0 else (a[slot], b[slot], float(scaling[slot]))
        assert error(y[i : i + 1], float64(x[i : i + 1], w, None, lora), r) <= FORWARD[x.dtype]


def test_rows_of_w_are_decoded_where_they_are_asked_for():
    for quant_type, double_quant in (("nf4", True), ("fp4", False), ("int4", False)):
        w = rows_weight(40, 33, quant_type, double_quant)
        for dtype in (torch.float32, *HALVES):
            out = torch.empty(7, 33, dtype=dtype)
            torch.ops.pyfastpeft.dequantize_rows.default(*w.operands, 33, 11, out)
            assert error(out, w.dequantize(torch.float64)[11:18]) <= FORWARD[dtype]


def test_what_the_kernels_do_not_take_goes_another_way():
    w = rows_weight(40, 96)
    choose, slabs = backends.choose, backends.Backend.SLABS
    assert choose(w, MOST_ROWS + 1, torch.bfloat16, infers=True) is slabs
    assert choose(w, 1, torch.float32, infers=True) is slabs
    assert choose(w, 1, torch.bfloat16, infers=False) is slabs
    assert choose(w, 1, torch.bfloat16, infers=True, drops=True) is slabs
    a, b = adapter(40, 96, 4)
    x = torch.randn(3, 96).bfloat16()
    with torch.no_grad():  # a scaling for each row
        lora = Lora(a, b, torch.rand(3, 4))
        assert error(linear_4bit(x, w, None, lora), float64(x, w, None, lora), 12) <= FORWARD[x.dtype]


def arguments(m=3, n=24, k=64, r=4):
    w = rows_weight(n, k, "nf4", True)
    a, b = torch.randn(2, r, k), torch.randn(2, n, r)
    x = torch.randn(m, k).bfloat16()
    return [
        x,
        *w.operands,
        torch.randn(n),
        a,
        b,
        torch.rand(2),
        torch.rand(r),
        torch.zeros(m, dtype=torch.int64),
        1.0,
        torch.empty(m, n).bfloat16(),
    ]


@pytest.mark.parametrize(
    ("position", "spoil", "message"),
    [
        (0, lambda x: x[None], "x must be a matrix"),
        (0, lambda x: x[:, :32], "codes must be contiguous uint8"),
        (0, lambda x: x.float(), "x has 3 rows; the kernels take at most 0"),
        (0, lambda x: x.expand(3, 64).repeat(10, 1), "x has 30 rows; the kernels take at most 24"),
        (0, lambda x: x.to("meta"), "x is on another device than the weight"),
        (1, lambda codes: codes[:-1], "codes must be contiguous uint8"),
        (1, lambda codes: codes.int(), "codes must be contiguous uint8"),
        (1, lambda codes: codes.repeat(1, 2)[:, :1], "codes must be contiguous uint8"),
        (2, lambda scale: scale[:-1], "scale must be contiguous uint8"),
        (2, lambda scale: scale.float(), "scale must be contiguous uint8"),
        (3, lambda zero: torch.ones(1), "zero belongs to int4"),
        (4, lambda absmax2: absmax2[:0], "absmax2 must be contiguous float32"),
        (4, lambda absmax2: None, "scale must be contiguous float32"),
        (5, lambda offset: None, "second-level scales and offset"),
        (6, lambda format: 3, "format must be"),
        (6, lambda format: 2, "zero belongs to int4"),
        (7, lambda n: n + 2, "codes must be contiguous uint8"),
        (7, lambda n: -1, "n is -1"),
        (8, lambda blocksize: 48, "blocksize must be"),
        (9, lambda bias: bias[:-1], "bias must be"),
        (9, lambda bias: bias.long(), "bias must be float32"),
        (9, lambda bias: bias.to("meta"), "bias is on another device"),
        (10, lambda a: a[:, :, :-1], "lora A must be"),
        (10, lambda a: a.long(), "lora A must be float32"),
        (10, lambda a: a.to("meta"), "lora A is on another device"),
        (10, lambda a: a[:, :0], "lora A must be"),
        (11, lambda b: b[:, :-1], "lora B"),
        (11, lambda b: b[:1], "lora B"),
        (11, lambda b: None, "lora A needs lora B"),
        (12, lambda scaling: scaling[:1], "scaling must be contiguous float32 .slots."),
        (12, lambda scaling: scaling.half(), "scaling must be"),
        (13, lambda rank_scale: rank_scale[:-1], "rank_scale must be contiguous float32 .R."),
        (13, lambda rank_scale: rank_scale.double(), "rank_scale must be"),
        (13, lambda rank_scale: rank_scale.to("meta"), "rank_scale is on another device"),
        (14, lambda slots: slots[:-1], "slots must be contiguous int64"),
        (14, lambda slots: slots.int(), "slots must be"),
        (14, lambda slots: slots.to("meta"), "slots is on another device"),
        (16, lambda y: y[:, :-1], "y must be"),
        (16, lambda y: y.float(), "y must be"),
    ],
)
def test_what_would_be_read_past_its_end_is_refused_before_a_launch(position, spoil, message):
    given = arguments()
    call(*given)
    given[position] = spoil(given[position])
    with pytest.raises((RuntimeError, NotImplementedError), match=message):
        # Past the dispatcher, which would choose by the argument on another device.
        torch.ops.pyfastpeft.linear_4bit_cuda.default.redispatch(
            torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *given
        )


def test_rows_outside_the_weight_are_refused():
    w = rows_weight(24, 64)
    decode = torch.ops.pyfastpeft.dequantize_rows.default
    for row, out in (
        (-1, torch.empty(2, 64)),
        (23, torch.empty(2, 64)),
        (0, torch.empty(2, 63)),
        (0, torch.empty(2, 128)[:, ::2]),
    ):
        with pytest.raises(RuntimeError, match=r"rows \[|out must be"):
            decode(*w.operands, 64, row, out)


def test_opcheck_passes():
    torch.library.opcheck(call, arguments())
    w = rows_weight(24, 64)
    torch.library.opcheck(torch.ops.pyfastpeft.dequantize_rows.default, (*w.operands, 64, 3, torch.empty(5, 64)))


def test_a_call_keeps_none_of_the_memory_that_torch_gave_it():
    """It may belong to the pool of a graph that is being warmed up."""
    w, every = rows_weight(24, 64, "nf4", True), [arguments(m) for m in (5, 8, 24, 6)]
    out = torch.empty(5, 64)
    with torch.profiler.profile(profile_memory=True) as profile:
        for given in every:
            call(*given)
        torch.ops.pyfastpeft.dequantize_rows.default(*w.operands, 64, 3, out)
    calls = [event for event in profile.events() if event.name.startswith("pyfastpeft::")]
    assert len(calls) == 5 and all(event.cpu_memory_usage == 0 for event in calls)
    sizes = [event.cpu_memory_usage for event in profile.events() if event.name == "[memory]"]
    assert sum(sizes) == 0, sizes


def test_torch_compile_takes_the_whole_graph():
    w, (a, b) = rows_weight(24, 64), adapter(24, 64, 4)
    compiled = torch.compile(lambda x: linear_4bit(x, w, None, (a, b, 2.0)), fullgraph=True, backend="aot_eager")
    x = torch.randn(6, 64).bfloat16()
    with torch.no_grad():
        assert torch.equal(compiled(x), linear_4bit(x, w, None, (a, b, 2.0)))


def test_cuda_forced_where_there_is_no_gpu_says_so():
    code = "import torch, pyfastpeft as fp; fp.ops.linear_4bit(torch.ones(1, 32), fp.quantize_4bit(torch.ones(1, 32)))"
    environment = os.environ | {"PYFASTPEFT_BACKEND": "cuda"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert "PYFASTPEFT_BACKEND is 'cuda', and the tensors are on cpu" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_the_kernels_say_what_is_missing():
    from pyfastpeft import _native

    missing = torch.ops.pyfastpeft.cuda_missing(9, 0)
    if _native.build_info()["cuda"]:
        assert missing in ("this torch has no CUDA", "NVIDIA's driver is not installed")
    else:
        assert missing == "pyfastpeft was built without CUDA kernels"
