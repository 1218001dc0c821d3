"""linear_4bit's kernel for sm_90, run on the CPU: clusters, TMA, barriers and wgmma as tests/cuda_on_cpu has them."""

from __future__ import annotations

import itertools

import pytest
import torch
from test_cuda_on_cpu import COMPILER, Call, Lora, Weight, build, check_linear, linear
from test_cuda_on_cpu import run as run_on

pytestmark = pytest.mark.skipif(COMPILER is None, reason="g++ is not installed")


def run(program, calls: list[Call], **settings) -> None:
    run_on(program, calls, capability=9, faults=FAULTS, **settings)


@pytest.fixture(scope="session")
def plain(tmp_path_factory):
    return build(tmp_path_factory.mktemp("sm90") / "plain", faults=FAULTS)


def test_every_format_block_size_and_dtype_agrees_with_float64(plain):
    calls = []
    blocks = itertools.chain(
        itertools.product(("nf4", "fp4"), (32, 64, 256, 4096), (False, True)),
        itertools.product(("int4",), (32, 64, 128), (False, True)),
    )
    for (quant_type, blocksize, nested), dtype in itertools.product(blocks, (torch.bfloat16, torch.float16)):
        w = Weight(70, 320, quant_type, blocksize, nested)
        calls.append(linear(w, 17, dtype, bias=torch.randn(70) if nested else None))
    run(plain, calls)
    check_linear(calls)


@pytest.mark.parametrize("seed", [0, 2])
def test_any_number_of_rows_gives_the_product(plain, seed):
    rows = (17, 33, 64, 96, 100, 128, 129, 200, 256)
    calls = [linear(Weight(130, 256), m, bias=torch.randn(130).bfloat16()) for m in rows]
    run(plain, calls, seed=seed)
    check_linear(calls)


def test_any_shape_gives_the_product(plain):
    shapes = [(1, 64), (5, 128), (128, 192), (129, 256), (300, 320), (512, 64), (66, 1344)]
    calls = [linear(Weight(n, k), 18, bias=torch.randn(n).half()) for n, k in shapes]
    calls.append(linear(Weight(66, 192, blocksize=128), 18))  # blocks that straddle rows
    calls.append(linear(Weight(66, 192, "int4", 512), 18))
    calls.append(linear(Weight(66, 128), 20, ldx=136))  # rows of x with something between them
    calls.append(linear(Weight(66, 128), 20, ldx=131))  # so that they begin anywhere: another kernel's
    calls.append(linear(Weight(66, 128), 20, ldx=8, x=torch.randn(280).bfloat16().as_strided((20, 128), (8, 1))))
    calls.append(linear(Weight(66, 128, offset=1), 20))
    run(plain, calls)
    check_linear(calls)


@pytest.mark.parametrize("processors", [1, 4, 40])
def test_splits_over_the_columns_add_up_one_call_after_another(plain, processors):
    calls = [linear(Weight(n, k), m) for n, k, m in [(64, 1088, 17), (300, 512, 33), (70, 512, 130)]]
    calls.append(linear(Weight(64, 1088), 17, lora=Lora(70)))
    run(plain, calls, processors=processors, seed=2)
    check_linear(calls)


def test_adapters_of_any_rank_are_added(plain):
    calls = []
    for rank, m in zip((1, 2, 7, 8, 15, 16, 31, 32, 33, 64, 70), itertools.cycle((17, 40, 70, 100, 130, 200))):
        dtype = (torch.float32, torch.bfloat16, torch.float16)[rank % 3]
        lora = Lora(rank, dtype=dtype, scaled=rank % 2 == 0, b_transposed=rank % 5 == 0)
        calls.append(linear(Weight(130, 320), m, torch.float16 if rank % 4 == 0 else torch.bfloat16, lora))
    run(plain, calls, seed=3)
    check_linear(calls)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_each_row_has_the_adapter_of_its_slot_or_none(plain, seed):
    rows = [[-1, 0, 1, 2, 3, 0, 7, -5, 2] * 4, [2] * 20, [-1] * 20, [0, 1, 2] * 6, [*range(40), 99], [0, 2, -1] * 60]
    calls = [linear(Weight(70, 320), len(r), lora=Lora(9, 3, r)) for r in rows]
    calls.append(linear(Weight(33, 576), 36, torch.float16, Lora(40, 3, rows[0], dtype=torch.bfloat16)))
    run(plain, calls, seed=seed, processors=1 + 8 * seed)
    check_linear(calls)


def test_the_same_call_gives_the_same_bits_in_every_schedule(plain):
    calls = [
        linear(Weight(70, 576), 18, lora=Lora(20, 3, [-1, 0, 1, 2, 3, 0, 7, -5, 2] * 2)),
        linear(Weight(130, 512, "int4", 32, True), 33, torch.float16, Lora(5)),
    ]
    run(plain, calls)
    first = [call.results[0] for call in calls]
    for seed in (1, 2, 3):
        run(plain, calls, seed=seed)
        assert all(torch.equal(call.results[0], y) for call, y in zip(calls, first, strict=True))


def test_nan_and_inf_stay_in_their_rows_and_adapters(plain):
    x = torch.randn(18, 320).bfloat16()
    x[1, 7], x[3, 300] = float("nan"), float("inf")
    alone, slots = linear(Weight(70, 320), 18, x=x), linear(Weight(70, 320), 18, x=x, lora=Lora(8, 2, [0, -1, 1] * 6))
    slots.buffers[10][1] = float("nan")  # B of slot 1
    slots.buffers[9][0, 3, 5] = float("inf")  # A of slot 0
    weight = linear(Weight(70, 192, "int4"), 18)
    weight.buffers[1][3] = float("nan")
    run(plain, [alone, slots, weight])
    finite = [i for i in range(18) if alone.results[0][i].isfinite().all()]
    assert finite == [i for i in range(18) if i not in (1, 3)]
    finite = [i for i in range(18) if slots.results[0][i].isfinite().all()]
    assert finite == [i for i in range(18) if i % 3 == 1 and i != 1]
    columns = weight.results[0].isnan().all(0)
    blocks = torch.arange(70 * 192).view(70, 192) // 64
    assert torch.equal(columns, (blocks == 3).any(1)) and weight.results[0][:, ~columns].isfinite().all()


# ---- seeded faults, and the sanitizers -------------------------------------------------------------------------------

KERNEL = "linear_4bit_sm90.cu"
# What: a text that is there once, and what stands there instead (None: nothing of its first statement), FAULT being 1
# while the fault is asked for.
SEEDED = {
    "no wait for x": ("barrier_wait(&sh.x_full[step], panel % 2);", None),
    "no wait for the codes": ("barrier_wait(&sh.codes_full[at], round_of<kPanels>(panel));", None),
    "no wait before x is overwritten": ("barrier_wait(&sh.x_empty[at], round_of<kSteps>(step) ^ 1);", None),
    "codes given back too early": ("(step == kSteps - 1) release", "(step == (FAULT ? 0 : kSteps - 1)) release"),
    "registers written while a product reads them": ("wgmma_wait<1>();", None),
    "sums read before they are done": ("wgmma_wait<0>();\n  release_x", None),
    "no fence before a product": ("wgmma_fence();\n#pragma unroll\n      for (int i = 0; i < 4; ++i)\n#pragma unroll\n"
                                  "        for (int c = 0; c < kCount; ++c)\n          wgmma<T>", None),
    "no barrier before sums overwrite x": ("named_sync(1, kConsumers);\n  float (*part)", None),
    "no wait for S": ("wait_for_previous_grid();", None),
    "a phase of long ago": ("gone.\n  named_sync(2, ", "gone.\n  if (!FAULT) named_sync(2, "),
    "the half of a pair twice": ("half = task.rank % 2", "half = (FAULT ? 0 : task.rank % 2)"),
    "blocks that do not wait for one another": ("cluster_sync();\n    store", None),
    "the byte of another lane": ("turn = (8 * (threadIdx.x % 4)", "turn = (8 * ((threadIdx.x + FAULT) % 4)"),
    "registers in another order": ("[i + j % 2 * 2]", "[FAULT ? i * 2 + j % 2 : i + j % 2 * 2]"),
    "the adapter of another slot": ("== slot) sums[", "== slot + FAULT) sums["),
    "a split left out": ("i < g.splits; ++i) {\n    ", "i < g.splits - FAULT; ++i) {\n    "),
    "scales of another segment": (">> segment_shift", ">> (segment_shift + FAULT)"),
    "half a pair of registers of the branch": ("rank / 4 ^ r % 8", "rank / 4 ^ (r + FAULT) % 8"),
}  # fmt: skip
FAULTS = {name: (KERNEL, before, after or "if (!FAULT) " + before) for name, (before, after) in SEEDED.items()}


def small_calls() -> list[Call]:
    """One of each kind, with the ends that faults like."""
    return [
        linear(Weight(130, 1344), 18, lora=Lora(20, 3, [-1, 0, 1, 2, 3, 0, 7, -5, 2] * 2)),
        linear(Weight(67, 576, "int4", 32, True), 33, torch.float16, Lora(40)),
        linear(Weight(67, 320), 129),
    ]


@pytest.mark.parametrize("fault", FAULTS)
def test_each_seeded_fault_is_found(plain, fault):
    calls = small_calls()
    for seed in range(4):
        try:
            run(plain, calls, seed=seed, processors=1 + 8 * (seed % 2), fault=fault)
            check_linear(calls)
        except (AssertionError, RuntimeError) as found:
            print(f"found with seed {seed}: {found}")
            return
    pytest.fail(f"{fault}: nothing was wrong")
