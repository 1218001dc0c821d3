"""Whether modules run with hooks that may see or change what goes through them, or only with some that are known."""

from __future__ import annotations

from typing import Any

from .collecting import collects


def only_known_hooks(module: dict[str, Any]) -> bool:
    """Whether those that run with a module, of which this is the state, neither read nor change tokens."""
    if module["_backward_hooks"] or module["_backward_pre_hooks"]:
        return False
    hooks = module["_forward_hooks"], module["_forward_pre_hooks"]
    return all(_is_known(hook) for by_number in hooks if by_number for hook in by_number.values())


def _is_known(hook: Any) -> bool:
    """Whether this is this library's own, or transformers' for gradient checkpointing, or for hidden states, which the
    call did not ask for."""
    home, name = getattr(hook, "__module__", None) or "", getattr(hook, "__name__", None)
    asks_for_gradients = (home, name) == ("transformers.modeling_utils", "make_inputs_require_grads")
    return asks_for_gradients or home.startswith("pyfastpeft.") or collects(hook)
