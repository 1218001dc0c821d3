"""Who records the call that runs: a compiler, a trace, a CUDA graph or autograd.

================  ================================================  ===================================================
predicate         true while                                        what follows
================  ================================================  ===================================================
``is_compiling``  a compiler follows the code                       only what compilers understand may run
``followed``      a compiler or ``torch.jit.trace`` does            nothing may depend on the values of tensors
``traced``        so it is, or under a dispatch mode                no number may name an object of this process
``captured``      a CUDA graph records the stream                   there are no values yet; nothing made may be kept
``is_repeated``   it is ``traced`` or ``captured``                  whatever may change must come from a tensor
``recorded``      autograd records what is made of given tensors    the operator's ``autograd.Function`` must run
``forward_mode``  tensors may have tangents, gradients or not       the bare operators would drop these without a word
``transformed``   so it is, or under a transform of torch.func      neither operators nor their functions know of it
================  ================================================  ===================================================
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

is_compiling = torch.compiler.is_compiling


def followed() -> bool:
    """Whether a compiler or ``torch.jit.trace`` follows what runs, so that nothing may depend on values."""
    return is_compiling() or torch._C._is_tracing()


def traced() -> bool:
    """Whether what runs may run again without this code: a compiler, ``torch.jit.trace`` or a dispatch mode records it.

    What it does then must go by tensors alone: a number that names something here would name another's elsewhere.
    """
    return followed() or torch._C._len_torch_dispatch_stack() > 0


def captured() -> bool:
    """Whether a CUDA graph records what is computed: it has no values before a replay, and is in the graph's memory."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def is_repeated() -> bool:
    """Whether this call is being recorded (compiler, trace, CUDA graph).

    A replay reads tensors again but repeats Python numbers, so whatever may change must come from a tensor.
    """
    return traced() or captured()


def recorded(*tensors: Tensor | None) -> bool:
    """Whether what is computed of ``tensors`` is recorded for autograd.

    Tensors with tangents count: autograd's functions refuse forward mode, the bare operators drop tangents in silence.
    """
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return True
    return forward_mode() and any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors)


def forward_mode() -> bool:
    """Whether tensors may have tangents here, without gradients too."""
    return forward_ad._current_level >= 0


def transformed() -> bool:
    """Whether tensors may stand for others, by which no ``autograd.Function`` here knows to compute."""
    return forward_mode() or torch._C._are_functorch_transforms_active()
