"""Logits that are computed only when something reads them.

In training a language model's logits [batch, length, vocabulary] are its largest tensor by far, in the model's dtype,
again in float32, and as much for their gradients; and usually one number, the loss, is all that is made of them. So
:func:`defer_logits` lets a frozen output head return a :class:`DeferredLogits` in training: ``cross_entropy`` over it
drops the rows without a label and runs the head over the rest a chunk at a time, gradient included. Whatever else reads
it gets the logits. A model's own loss, a trainer's and a hand-written one are all served, and code that looks at
``outputs.logits`` finds them there. Without gradients it is so where the model is called with ``labels``, that is, for
a loss: an evaluation is then no larger than the training around it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._pytree import tree_map_only

from ..caching import stamp_of
from ..formats.packed import FLOATS
from ..nn.ends import output_head
from ..nn.hooks import hooked, sharded
from ..ops import Backend, cross_entropy_, dense_linear, head_cross_entropy, large_pages
from ..ops.autocast import autocast_of
from ..ops.backends import choose_plain
from ..ops.cross_entropy import IGNORED
from ..ops.once import TWICE, once_differentiable
from ..ops.tracing import captured, traced, transformed
from .dense_layers import DenseForward
from .forwards import ModuleForward, hook, install, remove, unhook, with_parameters

_CHUNK_LOGITS = 1 << 22
_CPU_ROWS, _GPU_ROWS = 128, 512
"""Rows of a chunk at least: of fewer, the product takes the time that reading the head's weight does, or on a CPU
arranging it."""


def chunked_cross_entropy(
    hidden: Tensor,
    labels: Tensor,
    head: Callable[[Tensor], Tensor],
    classes: int,
    ignore: Tensor | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """Sum of the cross-entropies of ``head(hidden)`` against ``labels``, in float32, a chunk of rows at a time.

    Args:
        hidden: [n, H].
        labels: int64 [n], each in [0, classes).
        head: [m, H] → [m, classes]; its parameters receive no gradients.
        ignore: bool [n], rows that do not count, whatever their labels; leaving them out of the rest is faster.
        weight: [classes, H], on a CPU, instead of ``head`` where that is nothing but the product with it.

    Returns:
        A scalar, differentiable once in ``hidden``. Nothing waits for a device: a label there that is no class makes
        the loss NaN, and the gradient of its row.

    Raises:
        IndexError: a label that is no class, on a CPU.
    """
    if ignore is not None:
        labels = labels.masked_fill(ignore, 0)
    if labels.is_cpu and len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise IndexError(f"labels lie in [{int(labels.min())}, {int(labels.max())}]; there are {classes} classes")
    return _ChunkedCrossEntropy.apply(hidden, labels, head, classes, ignore, weight)


def _in_chunks(
    hidden: Tensor, labels: Tensor, head: Callable[[Tensor], Tensor], classes: int, differentiates: bool
) -> tuple[Tensor, Tensor | None]:
    """As ``head_cross_entropy``, of any head."""
    d_hidden = torch.empty_like(hidden) if differentiates else None
    losses = hidden.new_zeros(len(hidden), dtype=torch.float32)
    rows = max(_CPU_ROWS if hidden.is_cpu else _GPU_ROWS, _CHUNK_LOGITS // classes)
    for start in range(0, len(hidden), rows):
        chunk = slice(start, start + rows)
        with torch.set_grad_enabled(differentiates):
            part = hidden[chunk].detach().requires_grad_(differentiates)
            logits = head(part)
        gradient = logits.detach()  # which takes their place
        losses[chunk] = cross_entropy_(gradient, labels[chunk])
        if differentiates:
            (d_hidden[chunk],) = torch.autograd.grad(logits, part, gradient)
        del logits, gradient  # before the next chunk's come to lie beside them
    return losses, d_hidden


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, labels, head, classes, ignore, weight):  # noqa: ANN001
        differentiates = ctx.needs_input_grad[0]
        if weight is None:
            losses, d_hidden = _in_chunks(hidden, labels, head, classes, differentiates)
        else:
            losses, d_hidden = head_cross_entropy(hidden, weight, labels, differentiates)
        if ignore is not None:
            losses = losses.masked_fill(ignore, 0)
            if differentiates:
                d_hidden.masked_fill_(ignore[:, None], 0)
        ctx.save_for_backward(d_hidden)
        return losses.sum()

    @staticmethod
    def backward(ctx, grad):  # noqa: ANN001
        if torch.is_grad_enabled():  # what the gradient depends on was not kept
            raise RuntimeError(TWICE)
        (d_hidden,) = ctx.saved_tensors
        # That of a scaled loss may be beyond float16. Without a dimension it would be rounded first.
        return torch.mul(d_hidden, grad.view(1), out=torch.empty_like(d_hidden)), *[None] * 5


class _Call:
    """One call of an output head that was put off."""

    def __init__(self, head: nn.Linear, hidden: Tensor) -> None:
        self.head, self._hidden = head, hidden
        self._parameters = head._parameters.copy()  # it may have others by the time the logits are computed
        self._operands = [hidden, *head.parameters()]  # a parametrization's too
        self._stamp = stamp_of(self._operands)
        self.autocast = autocast_of(hidden)  # which may have ended by the time the logits are computed
        self.dtype = self.autocast["dtype"] if self.autocast["enabled"] else hidden.dtype
        self.loss_taken = False
        self.value: Tensor | None = None
        self._product: GradientEdge | None = None  # its place in the graph, before any change in place
        self.forms: list[weakref.ref[_Form]] = []

    @property
    def hidden(self) -> Tensor:
        if stamp_of(self._operands) != self._stamp:
            raise RuntimeError(
                "what the output head was called with, or its weight, was changed in place before the logits were "
                "read; call pyfastpeft.integrations.deferred_logits.defer_logits(model, False) before the forward"
            )
        return self._hidden

    def project(self, hidden: Tensor) -> Tensor:
        head = with_parameters(self.head, self._parameters)
        with torch.autocast(**self.autocast):
            return _logits_of(head, hidden)

    def weight(self) -> Tensor | None:
        """The head's, where there is nothing else to it and ``head_cross_entropy`` serves it."""
        weight, bias = self._parameters.get("weight"), self._parameters.get("bias")
        if not (type(self.head) is nn.Linear and bias is None and type(weight) is nn.Parameter):
            return None
        alike = not self.autocast["enabled"] and weight.dtype == self.hidden.dtype
        return weight if alike and choose_plain(weight.device) is Backend.NATIVE else None

    def logits(self) -> Tensor:
        """The logits [..., classes], computed once, with the graph that they have where nothing is put off."""
        if self.value is None:
            with torch.inference_mode(False), torch.enable_grad():
                logits = self.project(self.hidden)
                # No view to autograd: a change in place would take a view out of its place in the graph.
                self.value = torch.ops.aten._unsafe_view(logits, logits.shape)
                if self.value.requires_grad:
                    self._product = get_gradient_edge(self.value)
            # What was copied is a copy from now on: what reads the logits may go on to change them in place.
            for held in self.forms:
                if (form := held()) is not None:
                    form.computed()
        return self.value

    def gradient(self, logits: Tensor, grad: Tensor) -> Tensor:
        """The gradient of ``hidden``, given that of ``logits``, which are these or what was made of them."""
        hidden = self.hidden
        (grad,) = torch.autograd.grad(logits, self._product, grad, retain_graph=True)
        try:
            return torch.autograd.grad(self._product, hidden, grad, retain_graph=True)[0]
        except RuntimeError:  # a gradient that came by another way has freed what the product saved
            hidden = hidden.detach().requires_grad_()
            with torch.enable_grad():
                product = self.project(hidden)
            return torch.autograd.grad(product, hidden, grad)[0]


class _Form:
    """The logits as some operations leave them: of the logits of a call, or of another form.

    Attributes:
        arranged: rows as the head has them, of whatever width → rows as they are here.
        meta: without values.
    """

    def __init__(
        self,
        call: _Call,
        arranged: Callable[[Tensor], Tensor],
        meta: Tensor,
        source: Callable[[], Tensor],
        operation: Callable[[Tensor], Tensor],
    ) -> None:
        self.call, self.arranged, self.meta = call, arranged, meta
        self._source, self._operation = source, operation
        self.value: Tensor | None = None
        call.forms.append(weakref.ref(self))

    def after(self, operation: Callable[[Tensor], Tensor], rows: Callable[[Tensor], Tensor] | None = None) -> _Form:
        """The form after ``operation``, which does to the rows what ``rows`` does."""
        own = self.arranged
        arranged = own if rows is None else lambda t: rows(own(t))
        return _Form(self.call, arranged, operation(self.meta), self.computed, operation)

    def computed(self) -> Tensor:
        """What the operations give: views of the logits are views, and copies are made once."""
        source = self._source()  # which may make this one too
        if self.value is None:
            with torch.inference_mode(False), torch.enable_grad():
                self.value = self._operation(source)
        return self.value


class DeferredLogits(Tensor):
    """Stands for the logits [..., classes] of an output head; whatever reads it as a tensor computes them.

    Shape, dtype and device are known without that. So is the result of ``float``, ``to(dtype)``, ``contiguous``, and of
    ``view``, ``reshape``, ``flatten`` and slices that leave the last dimension whole: those are deferred as well.
    """

    form: _Form

    # Dynamo, which would compile these two by themselves, does not tell one method of Tensor (``func``) from another.
    @classmethod
    @torch.compiler.disable
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        computed = bool(args) and isinstance(args[0], cls) and args[0].form.value is not None
        if func in _DESCRIPTIONS and not computed:  # what was computed describes itself: it may have been changed
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func in _OBSERVED:
            _check_observed(_OBSERVED[func](*args, **kwargs))
        handler = _HANDLERS.get(func)
        if handler is not None and args and isinstance(args[0], DeferredLogits) and args[0].form.call.value is None:
            result = handler(*args, **kwargs)
            if result is not NotImplemented:
                return result
        args, kwargs = tree_map_only(DeferredLogits, lambda d: d.form.computed(), (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    @torch.compiler.disable
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        # Reached past __torch_function__ (autograd.Function, compiled code), below autograd: see _Deferral.backward.
        args, kwargs = tree_map_only(DeferredLogits, lambda d: d.form.computed().detach(), (args, kwargs or {}))
        return func(*args, **kwargs)


class _Deferral(torch.autograd.Function):
    """Makes a :class:`DeferredLogits` that has its place in the graph, for a gradient that arrives at itself."""

    @staticmethod
    def forward(ctx, hidden, form):  # noqa: ANN001
        shape, dtype = form.meta.shape, form.meta.dtype
        deferred = Tensor._make_wrapper_subclass(DeferredLogits, shape, dtype=dtype, device=hidden.device)
        deferred.form = ctx.form = form
        return deferred

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # noqa: ANN001
        return ctx.form.call.gradient(ctx.form.computed(), grad), None


def _deferred(form: _Form) -> DeferredLogits:
    return _Deferral.apply(form.call.hidden, form)


def _converted(logits: DeferredLogits, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
    if not isinstance(dtype, torch.dtype) or args or kwargs:
        return NotImplemented
    return logits if dtype == logits.dtype else _deferred(logits.form.after(lambda t: t.to(dtype)))


def _contiguous(logits: DeferredLogits, **layout: Any) -> Any:
    if layout:
        return NotImplemented
    return logits if logits.form.meta.is_contiguous() else _deferred(logits.form.after(Tensor.contiguous))


def _reshaped(function: Callable[..., Tensor]) -> Callable[..., Any]:
    def handler(logits: DeferredLogits, *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(a, torch.dtype) for a in (*args, *kwargs.values())):
            return NotImplemented
        *rows, last = function(logits.form.meta, *args, **kwargs).shape
        if last != logits.form.call.head.out_features:
            return NotImplemented
        form = logits.form.after(lambda t: function(t, *args, **kwargs), lambda t: t.reshape(*rows, t.shape[-1]))
        return _deferred(form)

    return handler


def _sliced(logits: DeferredLogits, index: Any) -> Any:
    index = index if isinstance(index, tuple) else (index,)
    if not all(i is Ellipsis or isinstance(i, slice) for i in index) or len(index) > logits.dim():
        return NotImplemented
    if Ellipsis in index:
        at = index.index(Ellipsis)
        index = (*index[:at], *[slice(None)] * (logits.dim() - len(index) + 1), *index[at + 1 :])
    if len(index) == logits.dim() and index[-1] != slice(None):
        return NotImplemented
    rows = index[: logits.dim() - 1]
    return _deferred(logits.form.after(lambda t: t[rows], lambda t: t[rows]))


def _cross_entropy(
    logits: DeferredLogits,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = IGNORED,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    plain = weight is None and size_average is None and reduce is None and label_smoothing == 0.0
    rows = target.dim() == 1 and logits.shape[:-1] == target.shape and target.dtype == torch.int64
    if not (plain and rows and reduction in ("mean", "sum")):
        return NotImplemented
    call = logits.form.call
    call.loss_taken = call.hidden.requires_grad
    keep, hidden = target != ignore_index, logits.form.arranged(call.hidden)
    if captured() or target.is_meta:  # when no shape may depend on values
        loss = chunked_cross_entropy(hidden, target, call.project, call.head.out_features, ~keep)
    else:
        rows = hidden[keep], target[keep]
        loss = chunked_cross_entropy(*rows, call.project, call.head.out_features, weight=call.weight())
    loss = loss if reduction == "sum" else loss / keep.sum()
    return loss if autocast_of(loss)["enabled"] else loss.to(logits.dtype)


def _check_observed(tensors: Sequence[Tensor]) -> None:
    if any(isinstance(t, DeferredLogits) and t.form.call.loss_taken for t in tensors):
        raise RuntimeError(
            "a loss was computed without these logits, so its gradient will not reach them; "
            "call pyfastpeft.integrations.deferred_logits.defer_logits(model, False) before the forward"
        )


_DESCRIPTIONS = frozenset(
    [getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "layout", "requires_grad")]
    + [getattr(Tensor, name).__get__ for name in ("is_leaf", "grad_fn", "is_cuda", "is_meta")]
    + [Tensor.size, Tensor.dim, Tensor.numel, Tensor.__len__, Tensor.is_floating_point, torch.is_floating_point]
)
_HANDLERS: dict[Any, Callable[..., Any]] = {
    F.cross_entropy: _cross_entropy,
    Tensor.float: lambda logits, **layout: _converted(logits, torch.float32, **layout),
    Tensor.to: _converted,
    Tensor.contiguous: _contiguous,
    Tensor.__getitem__: _sliced,
} | {function: _reshaped(function) for function in (Tensor.view, Tensor.reshape, Tensor.flatten, torch.reshape)}

# What asks for the gradient of which of its arguments.
_OBSERVED: dict[Any, Callable[..., Sequence[Tensor]]] = {
    Tensor.retain_grad: lambda *logits: logits,
    Tensor.register_hook: lambda logits, hook: (logits,),
    torch.autograd.grad: lambda outputs, inputs, **_: inputs,
    torch.autograd.backward: lambda tensors, inputs=None, **_: inputs or (),
}


_EVALUATES: ContextVar[weakref.ref[nn.Module] | None] = ContextVar("_EVALUATES", default=None)
"""The head of the model that runs here with labels and without gradients."""


def _evaluates(head: nn.Module) -> bool:
    told = _EVALUATES.get()
    return told is not None and told() is head


def _begin(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """Tells the head of a call that is made for its loss: without gradients there is no other sign of it."""
    if not traced():
        evaluates = kwargs.get("labels") is not None and not (torch.is_grad_enabled() or captured())
        head = output_head(model) if evaluates else None
        _EVALUATES.set(None if head is None else weakref.ref(head))


def _end(model: nn.Module, args: tuple, output: Any) -> None:
    if not traced():
        _EVALUATES.set(None)


class _DeferringForward(ModuleForward):
    """Forward of an output head: puts the product off where a loss is computed of a frozen one."""

    def __call__(self, input: Tensor, *args: Any) -> Tensor:
        head = self.module
        if args:  # LoRA's branch, which a 4-bit head adds itself
            return self.own(input, *args)
        gradients = torch.is_grad_enabled()
        learns = gradients and head.training
        if traced() or transformed() or not (learns or (_evaluates(head) and not gradients)):
            return _logits_of(head, input)
        # A hook wants to see the logits, or brings the weight for this very call, and FSDP does both around the model;
        # a trained weight may soon be another.
        trained = any(p.requires_grad for p in head.parameters())
        # Inference tensors do not tell whether they were changed: of the small one a copy serves.
        inference = any(p.is_inference() for p in head.parameters())
        if hooked(head) or sharded(head) or trained or input.dtype not in FLOATS or inference:
            return _logits_of(head, input)
        if input.is_inference():
            with torch.inference_mode(False):
                input = input.clone()
        call = _Call(head, input if learns else input.detach())
        meta = torch.empty((*input.shape[:-1], head.out_features), dtype=call.dtype, device="meta")
        return _deferred(_Form(call, lambda t: t, meta, call.logits, lambda t: t))


def _logits_of(head: nn.Linear, hidden: Tensor) -> Tensor:
    """The logits, computed now."""
    if type(head) is nn.Linear:
        return dense_linear(hidden, head.weight, head.bias)
    return type(head).forward(head, hidden)


def defer_logits(model: nn.Module, defer: bool = True) -> None:
    """Let the output head of ``model`` return :class:`DeferredLogits`, or compute at once again.

    It does so in training, and without gradients where the model around it is called with ``labels=``.

    Does nothing where the head is no ``nn.Linear``, or where something else has taken over its ``forward``.

    Args:
        model: a transformers model, or a module that wraps one (a PeftModel).
    """
    from transformers import PreTrainedModel  # not above: the loss in chunks needs torch alone

    head = output_head(model)
    if not defer:
        unhook(model, _begin, _end)
        remove(model, _DeferringForward)
    elif isinstance(head, nn.Linear):
        remove(head, DenseForward)  # which the head's own has within
        install(head, _DeferringForward)
        large_pages(head.weight.data)
        around = (m for m in model.modules() if isinstance(m, PreTrainedModel) and output_head(m) is head)
        outermost = next(around, None)  # which is given the labels
        if outermost is not None:
            hook(outermost, _begin, _end)
