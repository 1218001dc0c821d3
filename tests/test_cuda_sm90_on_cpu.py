"""linear_4bit's kernel for sm_90, run on the CPU: clusters, TMA, barriers and wgmma as tests/cuda_on_cpu has them."""

from __future__ import annotations

import itertools

import pytest
import torch
from test_cuda_on_cpu import COMPILER, HOPPER_FAULTS, Call, Lora, Weight, built, check_linear, linear
from test_cuda_on_cpu import run as run_on

pytestmark = pytest.mark.skipif(COMPILER is None, reason="g++ is not installed")


def run(program, calls: list[Call], **settings) -> None:
    run_on(program, calls, capability=9, **settings)


@pytest.fixture(scope="session")
def plain(tmp_path_factory):
    return built(tmp_path_factory)


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
        scaled = {"scaled": rank % 2 == 0, "rank_scaled": rank % 4 < 2}
        lora = Lora(rank, dtype=dtype, b_transposed=rank % 5 == 0, **scaled)
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


def small_calls() -> list[Call]:
    """One of each kind, with the ends that faults like."""
    return [
        linear(Weight(130, 1344), 18, lora=Lora(20, 3, [-1, 0, 1, 2, 3, 0, 7, -5, 2] * 2)),
        linear(Weight(67, 576, "int4", 32, True), 33, torch.float16, Lora(40)),
        linear(Weight(67, 320), 129),
    ]


@pytest.mark.parametrize("fault", HOPPER_FAULTS)
def test_each_seeded_fault_is_found(plain, fault):
    calls = small_calls()
    for seed in range(4):
        try:
            run(plain, calls, seed=seed, processors=1 + 8 * (seed % 2), fault=HOPPER_FAULTS[fault])
            check_linear(calls)
        except (AssertionError, RuntimeError) as found:
            print(f"found with seed {seed}: {found}")
            return
    pytest.fail(f"{fault}: nothing was wrong")
