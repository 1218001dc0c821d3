"""The estimate of bench/gpu_estimate.py: what it counts in machine code, and that it runs."""

import importlib.util
import json

import pytest
from pyfastpeft.bench import gpu_estimate

# Two loops, the second with a loop in it; the innermost with the most products is of six instructions and a branch.
SASS = """
	.section	.text.kernel,"ax",@progbits
.text.kernel:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   HMMA.16816.F32.BF16 R20, R20, R30, R16 ;
        /*0020*/               @P0 BRA `(.L_x_0) ;
.L_x_1:
        /*0030*/                   IADD3 R2, R2, 0x1, RZ ;
.L_x_2:
        /*0040*/                   LDGSTS.E.BYPASS.128 [R28], desc[UR10][R56.64], P6 ;
        /*0050*/              @!P4 LDG.E.64 R2, desc[UR4][R2.64] ;
        /*0060*/                   LDS.U16 R20, [R36+UR8+0x4000] ;
        /*0070*/                   LDSM.16.M88.4 R4, [R36] ;
        /*0080*/              @!PT LDS RZ, [RZ] ;
        /*0090*/                   HMMA.16816.F32.BF16 R20, R20, R30, R16 ;
        /*00a0*/                   HMMA.1688.F32.TF32 R20, R20, R30, R16 ;
        /*00b0*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24, gsb0 ;
        /*00c0*/                   PRMT R15, R20, 0x7770, RZ ;
        /*00d0*/                   FMUL R30, R33, R42.reuse ;
        /*00d8*/                   MUFU.EX2 R30, R33 ;
        /*00e0*/                   NOP ;
        /*00f0*/              @!P5 BRA `(.L_x_2) ;
        /*0100*/               @P1 BRA `(.L_x_1) ;
.L_x_3:
        /*0110*/                   BRA `(.L_x_3);
	.section	.text.other,"ax",@progbits
        /*0000*/                   LDG.E R2, desc[UR4][R2.64] ;
        /*0010*/               @P0 BRA `(.L_x_4) ;
        /*0020*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0030*/               @P1 EXIT ;
        /*0040*/                   FMUL R4, R4, R5 ;
        /*0050*/                   BRA `(.L_x_5) ;
.L_x_4:
        /*0060*/                   STG.E.U8 desc[UR4][R2.64], R6 ;
        /*0070*/                   FADD R6, R6, R5 ;
.L_x_5:
        /*0080*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*0090*/                   EXIT ;
"""


def test_the_main_loop_is_found_and_counted():
    code = gpu_estimate.functions(SASS)
    assert set(code) == {"kernel", "other"}
    loop = gpu_estimate.main_loop(code["kernel"])
    assert (loop[0].address, loop[-1].address) == (0x40, 0xF0)
    step = gpu_estimate.count(loop)
    assert step.issued == 12
    assert (step.integer, step.floating, step.special) == (1, 1, 1)
    assert step.shared == 4 + 1 + 4 + (64 + 128) * 16 * 2 / 128 / 4  # LDGSTS, LDS, LDSM; HGMMA, of four warps
    assert step.bytes == 32 * (16 + 8)
    assert step.mma == 2 * 16 * 8 * 16 + 2 * (2 * 16 * 8 * 8)
    assert step.wgmma == 2 * 64 * 128 * 16 // 4


def test_weights_in_registers_are_not_read_from_shared_memory():
    def product(a: str) -> gpu_estimate.Instruction:
        return gpu_estimate.Instruction(0, False, "HGMMA.64x32x16.F32.BF16", f"R24, {a}, R24")

    assert gpu_estimate.shared_cycles(product("R8, gdesc[UR4]")) == 32 * 16 * 2 / 128 / 4
    assert gpu_estimate.shared_cycles(product("gdesc[UR4]")) == (32 + 64) * 16 * 2 / 128 / 4


def test_of_code_without_a_loop_all_is_counted_or_the_shortest_way_that_writes_whole_words():
    code = gpu_estimate.functions(SASS)["other"]
    assert gpu_estimate.main_loop(code) == code
    wide = [i.address for i in gpu_estimate.wide_path(code)]
    assert wide == [0x00, 0x10, 0x20, 0x30, 0x40, 0x50, 0x80, 0x90]


def test_the_slowest_part_is_the_bound():
    gpu = gpu_estimate.Gpu("", "90", 100, 1e9, 1e12, 4096, 2048, 1)
    step = gpu_estimate.Step(100, 10, 10, 10, 10, 0, 2048, 0, {})
    product = gpu_estimate.Product(1, 1024, 1024)
    work = gpu_estimate.Work(product.bytes, product.operations, 1e6, 2.0)
    seconds = gpu_estimate.times(gpu, step, work)
    assert seconds["issue"] == pytest.approx(1e6 * 100 / 4 / 100 / 1e9 * 2)
    assert seconds["tensor"] == pytest.approx(1e6 / 100 / 1e9 * 2)
    assert seconds["memory"] == pytest.approx((1024 * 1024 * 0.5625 + 4096) / 1e12)
    assert seconds["special pipe"] == pytest.approx(1e6 * 10 * 8 / 4 / 100 / 1e9 * 2)
    found = gpu_estimate.estimate(gpu, "kernel", product, step, work)
    assert found["bound"] == "issue"
    assert found["fraction_of_limit"] == pytest.approx(seconds["memory"] / seconds["issue"])


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_it_estimates_the_kernels_that_the_operator_launches(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    gpu_estimate.main(["--only", "1 row", "--gpus", "H100", "--output", str(tmp_path / "out.json")])
    written = json.loads((tmp_path / "out.json").read_text())
    assert [e["what"] for e in written["estimates"]] == ["1 row, 4096²", "1 row, 8192²"]
    for e in written["estimates"]:
        assert e["predicted_us"] == max(e["us"].values()) >= e["us"]["memory"] > 0
        assert 0.9 < e["fraction_of_limit"] <= 1  # decoding is bound by memory, or all but
        assert e["step"]["mma"] + e["step"]["wgmma"] > 0
