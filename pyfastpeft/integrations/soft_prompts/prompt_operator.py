"""What a soft prompt comes to, as one operator of compiled code.

A prompt that runs through the model needs hooks, caches and modules that compilers do not follow, and at inference it
is kept until something about it changes, which they cannot guard. So to a compiler it is one operator, from parameters
to keys and values; inside, all is as without a compiler. Its backward works the prompt out again.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import Tensor

from ...ops.library import constant_to_compilers

if TYPE_CHECKING:
    from .prefixes import Prefixes


class _Form(NamedTuple):
    """A tensor without its values."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


_numbers = itertools.count()
_numbered: WeakValueDictionary[int, Prefixes] = WeakValueDictionary()
_forms: WeakKeyDictionary[Prefixes, dict[str, list[_Form]]] = WeakKeyDictionary()


@functools.cache
def _dispatch_outside() -> tuple[Any, Any]:
    """Of a thread in which no operator runs: it can record, and autocast is off."""
    with ThreadPoolExecutor(1) as thread:
        sets = torch._C._dispatch_tls_local_include_set, torch._C._dispatch_tls_local_exclude_set
        return thread.submit(lambda: tuple(get() for get in sets)).result()


def number_of(prefixes: Prefixes) -> int:
    """A number by which compiled code knows ``prefixes``, for as long as that lives."""
    number = next(_numbers)
    _numbered[number] = prefixes
    return number


def compiled_tensors(
    prefixes: Prefixes, names: tuple[str, ...], random: bool, decoding: bool, reach: int | Tensor
) -> list[Tensor]:
    """``prefixes.tensors(names, decoding, reach)`` in code that is being compiled.

    Args:
        random: whether there may be dropout.
        reach: a tensor where it depends on the text.

    Raises:
        RuntimeError: the code is exported, to run where the number is another model's.
    """
    if _exporting():
        raise RuntimeError(
            "a soft prompt that runs through the model cannot be exported; export the model with an adapter whose keys "
            "and values are learned (PrefixTuningConfig), or without adapters"
        )
    joined = "/".join(names)
    _learn_forms(prefixes.number, joined)
    seed = torch.randint(2**63 - 1, (1,), device="cpu") if random else None
    reach = reach if isinstance(reach, Tensor) else None
    return torch.ops.pyfastpeft.soft_prompt(prefixes.parameters(names), seed, reach, prefixes.number, joined, decoding)


@constant_to_compilers  # asked in the code that they compile, some say that they always export
def _exporting() -> bool:
    return torch.compiler.is_exporting()


@constant_to_compilers  # so it runs, while the code around it is only looked at
def _learn_forms(number: int, joined: str) -> None:
    prefixes, names = _numbered[number], joined.split("/")
    with _as_outside(prefixes.parameters(names), torch.zeros(1, device="cpu")), torch.no_grad():
        made = prefixes.tensors(names, False, 0)
    _forms.setdefault(prefixes, {})[joined] = [_Form(t.shape, t.dtype, t.device) for t in made]


@contextmanager
def _as_outside(parameters: Sequence[Tensor], seed: Tensor | None) -> Iterator[None]:
    """Run what is in an operator as if it were not; dropout, where the ``parameters`` are, draws from ``seed``."""
    devices = list({p.device for p in parameters if p.is_cuda})
    drawn = torch.random.fork_rng(devices, enabled=seed is not None)
    with torch._C._ForceDispatchKeyGuard(*_dispatch_outside()), drawn:
        if seed is not None:
            for generator in (torch.default_generator, *(torch.cuda.default_generators[d.index] for d in devices)):
                generator.manual_seed(int(seed))
        yield


@torch.library.custom_op("pyfastpeft::soft_prompt", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _soft_prompt(
    parameters: Sequence[Tensor], seed: Tensor | None, reach: Tensor | None, number: int, names: str, decoding: bool
) -> list[Tensor]:
    with _as_outside(parameters, seed), torch.no_grad():
        made = _numbered[number].tensors(names.split("/"), decoding, int(reach or 0))
        return [t.clone(memory_format=torch.contiguous_format) for t in made]  # some are kept


@_soft_prompt.register_fake
def _(parameters: Sequence[Tensor], seed: Any, reach: Any, number: int, names: str, decoding: bool) -> list[Tensor]:
    forms = _forms[_numbered[number]][names]
    return [torch.empty(form.shape, dtype=form.dtype, device=form.device) for form in forms]


@torch.library.custom_op("pyfastpeft::soft_prompt_backward", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _soft_prompt_backward(
    gradients: Sequence[Tensor],
    parameters: Sequence[Tensor],
    seed: Tensor | None,
    reach: Tensor | None,
    number: int,
    names: str,
) -> list[Tensor]:
    """The gradients of ``parameters``."""
    live = _numbered[number].parameters(names.split("/"))
    train = [p for p in live if p.requires_grad]
    with _as_outside(parameters, seed), torch.enable_grad():
        made = _numbered[number].tensors(names.split("/"), False, int(reach or 0))
        found = iter(torch.autograd.grad(made, train, gradients, allow_unused=True, materialize_grads=True))
    return [next(found).contiguous() if p.requires_grad else torch.zeros_like(p) for p in live]


@_soft_prompt_backward.register_fake
def _(gradients: Sequence[Tensor], parameters: Sequence[Tensor], *_: Any) -> list[Tensor]:
    return [torch.empty_like(p) for p in parameters]


def _save(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    parameters, seed, reach, *ctx.rest, _ = inputs
    ctx.save_for_backward(*parameters, seed, reach)


def _backward(ctx: Any, gradients: list[Tensor]) -> tuple:
    *parameters, seed, reach = ctx.saved_tensors
    found = torch.ops.pyfastpeft.soft_prompt_backward(gradients, parameters, seed, reach, *ctx.rest)
    return found, None, None, None, None, None


_soft_prompt.register_autograd(_backward, setup_context=_save)
