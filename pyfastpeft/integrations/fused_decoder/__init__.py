"""Decoding with one compiled call a token: the layers of a decoder like Llama's as ``decoder_forward``.

:func:`fuse_decoder` puts a :class:`_FewRows` before the forward of a decoder (the module between embedding and head).
It serves calls of a few rows over a cache that record nothing, when every layer is what the compiled stack
computes; whatever is out of the ordinary goes to transformers' own forward. The stack holds the model's own tensors
(and the packed copies of adapters for inference that the layers keep as well); a model that has changed since (another
adapter, a merged weight, a hook) is noticed at the next call.

- :mod:`.stack`: what the compiled stack is made of, and whether the model is still that
- :mod:`.rooms`: where the cache's keys and values lie, with room for more tokens
"""

from __future__ import annotations

import functools
import weakref
from contextlib import suppress
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, StaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask, sdpa_mask
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel

from ...caching import registered
from ...ops.tracing import forward_mode, traced
from ..attention import HANDED_DOWN, attention_forward, attention_mask
from ..attention import NAME as ATTENTION
from ..collecting import is_collecting
from ..each_token_once import distinct_tokens, tell_of_padding
from ..forwards import ModuleForward, install, remove, with_item
from ..soft_prompts.first_label import FIRST
from .rooms import Growing, Static, is_known, past_of
from .stack import MOST_ROWS, Stack, family_of

# What asks for nothing more; of other keywords any value may.
_NOTHING_MORE = {"output_attentions": False, "output_hidden_states": False, "return_dict": True}
# The function and its mask function that are registered; "eager" is the function of the model's module.
_ATTENTIONS = {
    "sdpa": (sdpa_attention_forward, sdpa_mask),
    "eager": (None, eager_mask),
    ATTENTION: (attention_forward, attention_mask),
}
# transformers renamed it; whichever name this version has.
_CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"
_TOKENS = frozenset(("input_ids", "attention_mask", "position_ids", "use_cache", _CACHE))
# Which a decoder makes nothing of but to hand it on; with the latter some collators say what they packed, beside the
# positions.
_BESIDES = frozenset(("num_items_in_batch", "logits_to_keep", FIRST, HANDED_DOWN))
_BESIDES |= {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}
_STACKS_KEPT = 32  # switching between this many sets of adapters, and choices of rows, builds nothing


def fuse_decoder(model: nn.Module, fuse: bool = True) -> None:
    """Let every decoder in ``model`` that is of a known family compute few rows by the fused stack, and each token of a
    batch once, in place; or undo it."""
    if not fuse:
        tell_of_padding(model, False)
        remove(model, _FewRows)
        return
    decoders = {m for m in model.modules() if family_of(m) is not None}
    for decoder in decoders:
        registered()  # from now on
        install(decoder, _FewRows)
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module._modules.get(module.base_model_prefix) in decoders:
            tell_of_padding(module)


def _of_one_query(mask: Any, length: int) -> Any:
    """[batch, length] of a mask that the caller made for one query a row; any other mask as it is.

    generate does so for a static cache, and models of several modalities do: bool [batch, 1, 1, length or more], None
    where nothing is hidden, or such for each type of layers.
    """
    if isinstance(mask, dict):
        mask = mask.get("full_attention", mask)
    made = isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.shape[1:-1] == (1, 1)
    return mask[:, 0, 0, :length] if made else mask


def _asks_for_more(config: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a call wants more than the last hidden states, or says what is not known here."""
    attention = config._attn_implementation
    functions = ALL_ATTENTION_FUNCTIONS.get(attention), ALL_MASK_ATTENTION_FUNCTIONS.get(attention)
    return (
        any(value is not _NOTHING_MORE.get(name) for name, value in kwargs.items())
        or config.output_attentions
        or config.output_hidden_states
        or functions != _ATTENTIONS.get(attention)
        or is_collecting()
    )


def _is_empty(cache: Any) -> bool:
    """Whether this is a cache that is known here and never held a token."""
    return is_known(cache) and not any(layer.is_initialized for layer in cache.layers)


class _FewRows(ModuleForward):
    """Forward of a decoder: few rows by the fused stack, everything else by the class's own forward, and of the batch's
    tokens only the different ones where that is enough."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        functools.update_wrapper(self, MethodType(type(module).forward, module))  # its signature has no self
        self._stacks: list[Stack] = []
        self._caches: weakref.WeakKeyDictionary[DynamicCache, Growing] = weakref.WeakKeyDictionary()

    def __getstate__(self) -> dict:
        return {"module": self.module}

    def __setstate__(self, state: dict) -> None:
        self.__init__(state["module"])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if args and isinstance(args[0], nn.Module):
            # accelerate gives a model its forward back as a method, and a copy of that model has this one's.
            module = args[0]
            module.forward = self if module is self.module else _FewRows(module)
            return module.forward(*args[1:], **kwargs)
        if len(args) == 1 and "input_ids" not in kwargs:
            args, kwargs = (), {"input_ids": args[0], **kwargs}  # heads that classify give it so
        given = {name: value for name, value in kwargs.items() if value is not None}
        if not (args or traced() or torch.is_grad_enabled() or forward_mode()):
            output = self._few_rows(**given)
            if output is not None:
                return output
        if not traced():  # what is compiled must not depend on how many there are
            for stack in self._stacks:
                stack.look_again()
            if type(cache := kwargs.get(_CACHE)) is DynamicCache:
                self._caches.pop(cache, None)  # it holds other tensors afterwards, and the room is for these alone
            if not args:
                output = self._each_token_once(given)
                if output is not None:
                    return output
        return self.own(*args, **kwargs)

    def _each_token_once(self, kwargs: dict[str, Any]) -> Any:
        """The output of a call over no tokens in a cache, or None where its own are not to be taken out of their
        rows."""
        model = self.module
        config = model.config
        caches, cache = kwargs.get("use_cache", config.use_cache), kwargs.get(_CACHE)
        checkpoints = getattr(model, "gradient_checkpointing", False) and model.training
        if checkpoints and caches and not torch.is_grad_enabled():
            return None  # transformers 5.20 fills no cache then, 5.24 does
        fills = caches and not checkpoints
        if cache is not None and not (fills and _is_empty(cache)):
            return None
        more = {name: value for name, value in kwargs.items() if name not in _TOKENS}
        known = {name: value for name, value in more.items() if name not in _BESIDES}
        if config._attn_implementation != ATTENTION or _asks_for_more(config, known):
            return None
        tokens = distinct_tokens(model, kwargs, fills)
        if tokens is None:
            return None
        filled = DynamicCache() if fills else None  # of no sliding layers, which would not keep all
        more |= {"use_cache": caches, _CACHE: filled}
        with tokens.choosing():
            output = self.own(tokens.ids, tokens.mask, tokens.positions, **more)
        output = with_item(output, "last_hidden_state", 0, tokens.put_back(output[0].squeeze(1)))
        if filled is None:
            return output
        cache = DynamicCache(config=config) if cache is None else cache
        for i, layer in enumerate(filled.layers):
            keys, values = (tokens.put_back(t.squeeze(2)).transpose(1, 2) for t in (layer.keys, layer.values))
            cache.update(keys, values, i)
        return with_item(output, _CACHE, 1, cache)

    def _few_rows(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | None:
        """The output, or None where this is not a call for the stack."""
        model = self.module
        config = model.config
        cache = kwargs.pop(_CACHE, None)
        kwargs.pop("cache_position", None)  # of older versions: the positions after those in the cache
        kwargs.pop("logits_to_keep", None)  # the head's: models around this one hand on what they were given
        if (input_ids is None) is (inputs_embeds is None):
            return None
        given = inputs_embeds if input_ids is None else input_ids
        batch, tokens = given.shape[:2]
        if not given.is_cpu or batch * tokens > MOST_ROWS:
            return None  # before anything is asked that a GPU would be waited for
        if not is_known(cache):
            return None
        caches = config.use_cache if use_cache is None else use_cache
        if not caches or _asks_for_more(config, kwargs) or torch.is_autocast_enabled("cpu"):
            return None
        past = past_of(cache, config.num_hidden_layers, tokens)
        if past is None:
            return None
        layers, length = cache.layers, past + tokens
        seen = _of_one_query(attention_mask, length) if tokens == 1 else attention_mask
        if seen is not None and (not isinstance(seen, Tensor) or seen.shape != (batch, length)):
            return None
        stack = self._stack(cache)
        if stack.held is None or batch * tokens > stack.most_rows:
            return None
        if not stack.serves(batch) or stack.forgets(layers, past):
            return None
        if tokens > 1 and not stack.causal:
            return None
        x = model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds.contiguous()
        if stack.embedding_multiplier is not None:
            x = x * stack.embedding_multiplier
        if not x.is_cpu or x.dtype != stack.dtype:
            return None
        if layers[0].is_initialized and (layers[0].keys.dtype != x.dtype or layers[0].values.dtype != x.dtype):
            return None
        prefix = stack.prefix(batch)
        if prefix is None:
            return None
        whole = prefix[0] or seen is not attention_mask  # a prefix is seen whole; a mask that was made says all itself
        if whole and length + (prefix[0][0].shape[2] if prefix[0] else 0) > stack.window:
            return None
        if position_ids is None:
            position_ids = torch.arange(past, length, device=x.device).unsqueeze(0)
        elif position_ids.shape[-1] != tokens:
            return None  # one position for all tokens
        angles = [model.rotary_emb(x, position_ids=position_ids, **kind) for kind in stack.angles]
        cos, sin = ([pair[i] for pair in angles] for i in range(2))
        mask = None if seen is None else seen.bool().contiguous()
        room = self._room(cache, (batch, stack.kv_heads, past, stack.dim), tokens, x.dtype)
        if room is None:
            return None
        number = stack.held.number
        y = torch.ops.pyfastpeft.decoder_forward.default(
            number, x, cos, sin, mask, room.keys, room.values, room.past, *prefix
        )
        room.show(layers, tokens)
        return BaseModelOutputWithPast(last_hidden_state=y.view(batch, tokens, -1), **{_CACHE: cache})

    def _room(
        self, cache: DynamicCache | StaticCache, shape: tuple[int, int, int, int], tokens: int, dtype: torch.dtype
    ) -> Growing | Static | None:
        """For ``tokens`` behind keys and values of ``shape`` [batch, heads, past, dim]; None where the cache holds
        others."""
        layers = cache.layers
        if type(cache) is StaticCache:
            return Static(layers, shape, tokens, dtype)
        growing = self._caches.get(cache)
        if growing is None:
            growing = self._caches[cache] = Growing(layers)
        return growing if growing.fits(layers, shape, tokens, dtype) else None

    def _stack(self, cache: Any) -> Stack:
        for stack in self._stacks:
            if stack.holds(cache):
                return stack
        stack = Stack(self.module)
        self._stacks.insert(0, stack)
        for other in self._stacks[1:]:
            if not other.may_hold():  # it would keep what the model does not have any more in memory
                with suppress(ValueError):  # another thread has taken it out
                    self._stacks.remove(other)
        del self._stacks[_STACKS_KEPT:]
        return stack  # and not the first: another thread may have put its own before it
