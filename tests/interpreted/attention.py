"""A model's attention by Triton kernels in Triton's interpreter: see test_triton_interpreted.py."""

from __future__ import annotations

import repair  # noqa: F401
import torch
from tiny import tiny_llama

import pyfastpeft as fp
from pyfastpeft.integrations import attention
from pyfastpeft.ops.backends import Backend


def test_the_kernels_serve_a_model_with_a_prefix(monkeypatch):
    model = fp.get_peft_model(tiny_llama(), fp.PrefixTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"))
    ids, mask = torch.randint(1, 50, (2, 6)), torch.ones(2, 6, dtype=torch.int64)
    mask[1, :2] = 0
    served = []
    operator = attention.prefix_attention
    monkeypatch.setattr(attention, "prefix_attention", lambda *a, **k: served.append(1) or operator(*a, **k))
    found = []
    for expects in (False, True):
        if expects:
            monkeypatch.setattr(attention, "choose_attention", lambda query: Backend.REFERENCE)
        model.zero_grad()
        logits = model(input_ids=ids, attention_mask=mask).logits[mask.bool()]
        logits.square().sum().backward()
        found.append([logits, *(p.grad for p in model.parameters() if p.grad is not None)])
        assert len(served) == 2  # layers
    for mine, expected in zip(*found, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
