"""``linear_4bit`` by the PTX of its Triton kernels: see test_ptx_on_cpu.py."""

from __future__ import annotations

import re

import pytest
import torch
import triton_on_cpu
from launch import Fault
from test_linear_4bit import FORWARD, adapter, check_gradients, error, float64, packed_weight
from translate import UnknownPTX

from pyfastpeft.ops import BankView, linear_4bit


def forward_error(m, n, k, rank, dtype, quant_type=None):
    w, lora = packed_weight(n, k, quant_type), (*adapter(n, k, rank), 2.0) if rank else None
    x, bias = torch.randn(m, k).to(dtype), torch.randn(n)
    y = linear_4bit(x, w, bias, lora)
    return error(y, float64(x, w, bias, lora), m * rank) if y.isfinite().all() else float("inf")


@pytest.mark.parametrize(
    "m, n, k, rank, dtype, quant_type",
    [
        (1, 64, 1024, 0, torch.bfloat16, "nf4"),  # a sweep in parts
        (20, 40, 416, 16, torch.bfloat16, "fp4"),
        (16, 80, 640, 16, torch.float16, "int4"),
        (64, 96, 192, 16, torch.bfloat16, None),
        (140, 65, 77, 16, torch.bfloat16, None),
    ],
)
def test_products_match_float64(m, n, k, rank, dtype, quant_type):
    assert forward_error(m, n, k, rank, dtype, quant_type) <= FORWARD[dtype]


def test_rows_of_mixed_adapters_match_each_alone():
    m, n, k, r, slots = 16, 64, 1100, 16, 5
    w = packed_weight(n, k, "nf4")
    a, b = torch.randn(slots, r, k) * k**-0.5, torch.randn(slots, n, r) * r**-0.5
    scaling, rows = torch.rand(slots) + 0.5, torch.randint(-1, 3, (m,))
    x = torch.randn(m, k).bfloat16()
    y = linear_4bit(x, w, None, BankView(a, b, scaling, rows))
    for i, slot in enumerate(rows.tolist()):
        lora = None if slot < 0 else (a[slot], b[slot], float(scaling[slot]))
        assert error(y[i : i + 1], float64(x[i : i + 1], w, None, lora), r) <= FORWARD[x.dtype]


@pytest.mark.parametrize(
    "m, rank, dropout, dtype",
    [(140, 16, 0.1, torch.bfloat16), (140, 64, 0.0, torch.float16), (40, 16, 0.0, torch.float32)],
)
def test_gradients_match_float64(m, rank, dropout, dtype):
    check_gradients(dtype, m, 192, 192, rank, torch.float32, torch.randn(192), 2.0, dropout)


@pytest.mark.parametrize(
    "pattern, replacement",
    [
        (r"cp\.async\.wait_group\s+\d+;", ""),  # copies that nothing waits for
        (r"bar\.sync\s+0;", ""),
        (r"(cp\.async\.c[ag]\.shared\.global \[[^]]*\], \[ %rd\d+ \+ )0", r"\g<1>65536"),  # beyond the tensors
        (r"0x77777777", "0x33333333"),  # other nibbles
    ],
    ids=["wait", "barrier", "address", "nibbles"],
)
def test_faults_are_seen(pattern, replacement, monkeypatch):
    changed = []

    def edit(ptx):
        text, count = re.subn(pattern, replacement, ptx)
        changed.append(count)
        return text

    monkeypatch.setattr(triton_on_cpu, "edit", edit)
    try:
        wrong = forward_error(16, 64, 640, 0, torch.bfloat16, "nf4")
    except Fault:
        wrong = float("inf")
    assert sum(changed) > 0 and wrong > FORWARD[torch.bfloat16]


def test_an_unknown_instruction_is_named(monkeypatch):
    monkeypatch.setattr(triton_on_cpu, "edit", lambda ptx: ptx.replace("bar.sync", "barter.sync"))
    with pytest.raises(UnknownPTX, match="barter"):
        forward_error(16, 64, 640, 0, torch.bfloat16, "nf4")
