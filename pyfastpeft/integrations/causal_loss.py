"""The loss of a causal language model without its logits: only labelled positions reach the head, a few at a time.

The ordinary path builds [batch, length, vocabulary] logits in the model's dtype and again in float32, then as much for
their gradients. Here the rows without a label are dropped before the head, and the head runs over the rest in chunks
whose gradient is taken at once, so that one chunk of logits is alive at a time. Value and gradients are those of the
ordinary loss.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_CHUNK_LOGITS = 1 << 22


def chunked_cross_entropy(hidden: Tensor, labels: Tensor, head: Callable[[Tensor], Tensor]) -> Tensor:
    """Sum of the cross-entropies of ``head(hidden)`` against ``labels``, in float32, a chunk of rows at a time.

    Args:
        hidden: [n, H].
        labels: int64 [n], every one a class of the head (no ignored ones).
        head: a module (its trainable parameters receive gradients) or a function of one tensor: [m, H] → [m, classes].

    Returns:
        A scalar, differentiable once in ``hidden`` and the head's trainable parameters.
    """
    trained = [p for p in head.parameters() if p.requires_grad] if isinstance(head, nn.Module) else []
    return _ChunkedCrossEntropy.apply(hidden, labels, head, *trained)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, labels, head, *trained):  # noqa: ANN001
        need_hidden, _, _, *need_trained = ctx.needs_input_grad
        d_hidden = torch.empty_like(hidden) if need_hidden else None
        d_trained = [torch.zeros_like(p, dtype=torch.float32) for p in trained]
        differentiates = need_hidden or any(need_trained)
        total = hidden.new_zeros((), dtype=torch.float32)
        start, rows = 0, 1  # the first row tells how many classes the head has
        while start < len(hidden):
            chunk = slice(start, start + rows)
            with torch.set_grad_enabled(differentiates):
                part = hidden[chunk].detach().requires_grad_(need_hidden)
                logits = head(part)
                loss = F.cross_entropy(logits.float(), labels[chunk], reduction="sum")
            if differentiates:
                grads = torch.autograd.grad(loss, [part, *trained] if need_hidden else trained)
                if need_hidden:
                    d_hidden[chunk], *grads = grads
                for total_grad, grad in zip(d_trained, grads, strict=True):
                    total_grad += grad
            total += loss.detach()
            start, rows = start + rows, max(1, _CHUNK_LOGITS // logits.shape[-1])
        ctx.save_for_backward(d_hidden, *(g.to(p.dtype) for g, p in zip(d_trained, trained, strict=True)))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # noqa: ANN001
        hidden, *trained = (None if s is None else s * grad.to(s.dtype) for s in ctx.saved_tensors)
        return hidden, None, None, *trained


class LabelledLoss:
    """Hooks on one causal language model that compute its training loss from labelled positions only.

    They act in training mode when ``labels`` are given, and then ``outputs.logits`` has length 0; evaluation and
    generation are untouched. Made by :func:`use_labelled_loss`.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model, self._head = model, model.get_output_embeddings()
        self._ordinary = model.loss_function
        self._armed, self._hidden = False, None
        self._handles = [
            model.register_forward_pre_hook(self._arm, with_kwargs=True),
            model.register_forward_hook(self._disarm, always_call=True),
            self._head.register_forward_pre_hook(self._divert),
        ]
        model.loss_function = self._loss

    def remove(self) -> None:
        """Give the model its ordinary loss back."""
        for handle in self._handles:
            handle.remove()
        self._model.loss_function = self._ordinary

    def _arm(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        whole = isinstance(keep := kwargs.get("logits_to_keep", 0), int) and keep == 0
        self._armed = model.training and kwargs.get("labels") is not None and whole

    def _disarm(self, *_: object) -> None:
        self._armed, self._hidden = False, None

    def _divert(self, head: nn.Module, args: tuple) -> tuple | None:
        if not self._armed:
            return None
        self._armed, self._hidden = False, args[0]
        return (args[0][:, :0], *args[1:])

    @torch.compiler.disable
    def _loss(
        self,
        logits: Tensor,
        labels: Tensor,
        *args: object,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **kwargs: object,
    ) -> Tensor:
        hidden, self._hidden = self._hidden, None
        if hidden is None:
            shared = {"num_items_in_batch": num_items_in_batch, "ignore_index": ignore_index}
            return self._ordinary(logits, labels, *args, shift_labels=shift_labels, **shared, **kwargs)
        if shift_labels is None:
            hidden, shift_labels = hidden[:, :-1], labels[:, 1:]
        shift_labels = shift_labels.to(hidden.device)
        keep = shift_labels != ignore_index
        total = chunked_cross_entropy(hidden[keep], shift_labels[keep], self._head)
        return total / (keep.sum() if num_items_in_batch is None else num_items_in_batch)


def use_labelled_loss(model: nn.Module) -> LabelledLoss | None:
    """Make the causal language model inside ``model`` compute its training loss from labelled positions only.

    Args:
        model: a transformers causal language model, or a module that wraps one (a PeftModel).

    Returns:
        A handle whose ``remove()`` undoes it; None where it does not apply (no causal language model inside, logits
        that are not the head's plain output, a loss of the model's own) and the model is left as it was.
    """
    from transformers import PreTrainedModel

    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            return LabelledLoss(module) if _applies(module) else None
    return None


def _applies(model: nn.Module) -> bool:
    """Whether the head's output goes unchanged into the standard causal loss: seen on a run of four tokens."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    head = model.get_output_embeddings()
    if head is None or model.config.is_encoder_decoder or model.loss_function is not ForCausalLMLoss:
        return False
    produced: list[Tensor] = []
    consumed: list[Tensor] = []

    def loss(logits: Tensor, *args: object, **kwargs: object) -> Tensor:
        consumed.append(logits)
        return ForCausalLMLoss(logits, *args, **kwargs)

    handle = head.register_forward_hook(lambda head, args, out: produced.append(out.clone()))
    ids = torch.arange(4, device=head.weight.device).unsqueeze(0)
    try:
        model.loss_function = loss
        with torch.no_grad(), torch.random.fork_rng():
            model(input_ids=ids, labels=ids)
    finally:
        handle.remove()
        model.loss_function = ForCausalLMLoss
    return len(produced) == len(consumed) == 1 and torch.equal(produced[0], consumed[0])
