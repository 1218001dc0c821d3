"""Whether a module runs with hooks, which see what it takes and gives and may change both, or under FSDP."""

from __future__ import annotations

from torch import nn
from torch.nn.modules import module as torch_module

GLOBAL_HOOKS = (
    torch_module._global_forward_hooks,
    torch_module._global_forward_pre_hooks,
    torch_module._global_backward_hooks,
    torch_module._global_backward_pre_hooks,
)
"""What runs with every module of the process; empty as a rule."""


def hooked(module: nn.Module) -> bool:
    """Whether anything of the caller's runs with ``module``'s forward or backward pass."""
    forward = module._forward_hooks or module._forward_pre_hooks
    return bool(forward or module._backward_hooks or module._backward_pre_hooks or any(GLOBAL_HOOKS))


def sharded(module: nn.Module) -> bool:
    """Whether FSDP brings the parameters of ``module``, which have no values but between hooks on what is around it."""
    return vars(module).get("_is_fsdp_managed_module", False)  # torch's own sign, for its compiler
