"""``rms_norm``, ``swiglu`` and ``rope`` by their Triton kernels in Triton's interpreter: the operators' own tests."""

from __future__ import annotations

import pytest
import repair  # noqa: F401
import torch
from test_elementwise import (  # noqa: F401
    check_gradients,
    norm64,
    test_a_frozen_weight_or_input_gets_no_gradient,
    test_a_last_dimension_of_zero_gives_what_torch_gives,
    test_backward_keeps_the_inputs_and_nothing_else,
    test_nan_and_infinity_reach_the_outputs_they_touch,
    test_rms_norm_and_its_gradients,
    test_rope_and_its_gradients,
    test_strided_inputs_give_the_contiguous_result,
    test_swiglu_and_its_gradients,
    test_swiglu_of_large_and_special_values,
    test_the_gradient_of_rope_is_its_transpose,
    test_values_are_rounded_where_transformers_rounds_them,
)
from test_fused_layers import CONFIGS
from test_fused_layers import test_a_model_computes_the_same as computes_the_same

from pyfastpeft.ops import Backend, rms_norm
from pyfastpeft.ops.backends import choose_plain
from pyfastpeft.ops.triton_kernels import _kernels

kernels = _kernels("elementwise")


@pytest.fixture
def device():
    """Of the operator's tests: no instruction set."""


def test_the_kernels_serve_here():
    assert choose_plain(torch.device("cpu")) is Backend.TRITON


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(41, 24), (7, 9000)], ids=str)
def test_the_gradient_of_a_weight_is_summed_over_programs_of_several_tiles(shape, dtype, monkeypatch):
    monkeypatch.setattr(kernels, "_PROGRAMS", 3)
    monkeypatch.setattr(kernels, "_ELEMENTS", 64)
    x, weight = torch.randn(shape), torch.randn(shape[1])
    check_gradients(rms_norm, norm64, (x, weight), dtype)


@pytest.mark.parametrize("config", CONFIGS[3:5], ids=lambda c: c.model_type)
def test_a_model_with_these_kernels_inside_computes_the_same(config):
    computes_the_same(config)
