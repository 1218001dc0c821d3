"""Soft prompts in a causal model: before every forward each attention layer gets its prefix of keys and values.

A soft prompt comes first in the sequence, so what it is in a layer does not depend on what follows. It is worked out
once at batch 1, and the layers' attention (:mod:`pyfastpeft.integrations.attention`) reads it: rows never get longer,
caches never hold it, logits are those of the text alone. The text stands after the prefix: its positions start at the
length of its own row's prefix, padding on the left not counted.

What compilers can follow of it is compiled along, the rest runs by itself: what compiled code would set in a thread's
own memory is lost, so there the prefixes are handed down as an argument. In training they are too, for checkpoints of
the user's own, which run a layer again when the model's forward is over.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from ...adapters import Rows
from ...nn.ends import output_head
from ...nn.prompt_encoder import Form
from ...ops.tracing import is_compiling
from .. import attention
from ..fused_layers import depends_on_length
from .bare import all_layers, reaching, tied
from .decoders import KeyValueShape, attentions_of, decoder_of, owners_of
from .first_label import FIRST, with_first_label, with_last, without_last
from .kept_prompts import Values
from .prefixes import OFF, Prefixes, Run, apart, beside, goes_on, past_of
from .prompt_tokens import first_visible


class CausalPrefixes(Prefixes):
    """The soft prompts of one causal model."""

    ATTENTION = attention.NAME

    def _find(self) -> None:
        self.decoder = decoder_of(self.model)
        self._check_interface()
        kind, config = type(self.model).__name__, self.decoder.config
        self.shape = KeyValueShape.of_decoder(self.decoder, kind)
        self.attentions, self._blocks = attentions_of(self.decoder)
        self.slots = list(owners_of(self.attentions))
        self._reaches_part = any(getattr(config, n, None) for n in ("sliding_window", "attention_chunk_size"))
        parameters = inspect.signature(type(self.decoder).forward).parameters
        self._parameters = tuple(parameters)[1:]
        self._model_parameters = tuple(inspect.signature(type(self.model).forward).parameters)[1:]
        self._hands_down = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        if "position_ids" not in self._parameters:
            raise ValueError(f"a {kind} takes no position_ids, so no text can stand after a soft prompt in it")
        self._cache_name = "cache" if "cache" in self._parameters else "past_key_values"
        self._rotaries = [m for m in self.decoder.modules() if depends_on_length(getattr(m, "rope_type", None))]
        rope = getattr(config, "rope_parameters", None) or {}
        self._usual_reach = rope.get("original_max_position_embeddings", getattr(config, "max_position_embeddings", 0))
        # The positions of RoBERTa and Kosmos-2.5 begin behind that of padding.
        numbering = [getattr(self.decoder, name, None) for name in ("embeddings", "embed_positions")]
        numbering = [m for m in numbering if hasattr(m, "create_position_ids_from_inputs_embeds")]
        self._first = numbering[0].padding_idx + 1 if numbering else 0
        # Of HunYuan-VL's positions the last three number an image's tokens within it, whatever stands before.
        self._axes_in_images = 3 if config.model_type == "hunyuan_vl_text" else 0
        if self._axes_in_images and len(rope.get("mrope_section") or ()) == self._axes_in_images:
            raise ValueError(
                f"rope_parameters['mrope_section'] of a {kind} is {rope['mrope_section']}; a soft prompt needs a "
                "fourth axis, of the text, by which tokens of images are told from others"
            )
        # Its loss takes the mask as it is; Granite-Speech's, which picks logits by one too, shortens it to the labels.
        self._masks_loss = self.model.config.model_type == "qwen2_audio"

    def check(self, form: Form) -> None:
        kind, config = type(self.model).__name__, self.decoder.config
        if form is Form.KEYS_VALUES and (differ := self._differing_sizes(kind)):
            raise ValueError(
                f"{differ}; use a prompt at the embedding or in the layers' inputs, as keys and values that are "
                "learned must be of one size"
            )
        if form is not Form.KEYS_VALUES and _looks_up_ids(self.decoder):
            raise ValueError(
                f"a {kind} looks up the token ids of the vectors that it gets, and a prompt's have none; use Prefix "
                "Tuning, or P-Tuning v2 with prefix=True, which learn keys and values themselves"
            )
        if form is Form.LAYER_INPUTS and hasattr(config, "altup_num_inputs"):
            raise ValueError(
                f"the layers of a {kind} have several inputs each; use prefix=True, which learns "
                "keys and values themselves"
            )

    def _differing_sizes(self, kind: str) -> str | None:
        """In what the keys and values of a ``kind`` are not all of one size, if so."""
        of_values = getattr(self.decoder.config, "v_head_dim", None) or self.shape.dim
        if of_values != self.shape.dim:
            return f"the keys of a {kind} have {self.shape.dim} numbers a head and its values {of_values}"
        # MiMo-V2-Flash's layers with a window have twice the heads that its configuration says.
        made = {getattr(getattr(m, "k_proj", None), "out_features", None) for m in self.attentions}
        return f"the layers of a {kind} have different numbers of key/value heads" if len(made - {None}) > 1 else None

    def _install(self) -> None:
        super()._install()
        if output_head(self.model) is not None and self.model is not self.decoder:
            self._handles += [
                self.model.register_forward_pre_hook(self._before_loss, with_kwargs=True),
                self.model.register_forward_hook(without_last, with_kwargs=True, always_call=True),
            ]

    def _follows(self) -> bool:
        return is_compiling() and self._hands_down

    def _may_run_again(self, rows: Sequence[tuple[str, ...]]) -> bool:
        """Whether layers within checkpoints of the user's own, which keep a layer's arguments, could run again for the
        gradients after this forward. What P-Tuning v2 feeds to layers would be lost all the same."""
        if not (self._hands_down and self.decoder.training and torch.is_grad_enabled()):
            return False
        sources = [self.sources[n] for names in rows for n in names if n in self.sources]
        return all(source.form is not Form.LAYER_INPUTS for source in sources)

    def _before(self, decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        return self._begin(args, kwargs) if self._follows() else apart(self._begin, args, kwargs)

    def _begin(self, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        if self.bank.run is OFF or attention.HANDED_DOWN in kwargs:
            return None
        rows = self.rows
        follows = is_compiling()
        if not follows:
            self._clear_interrupted()
        if not self.uses(rows):
            return (args, kwargs | {attention.HANDED_DOWN: OFF}) if follows else None
        self._check_attention()
        kwargs = dict(zip(self._parameters, args, strict=False)) | kwargs
        if kwargs.get("encoder_hidden_states") is not None:
            self._check_apart(rows)
        inputs = kwargs.get("inputs_embeds")
        inputs = kwargs.get("input_ids") if inputs is None else inputs
        if inputs is None:
            return None  # the decoder says so itself
        mask = kwargs.get("attention_mask")
        if self._masks_loss and FIRST in kwargs and mask is not None:
            kwargs["attention_mask"] = mask[:, 1:]  # without the room that was for the loss
        past = past_of(kwargs)
        decoding = goes_on(past, inputs.shape[1])
        positions = self._positions(kwargs, inputs, past)
        with self.bank.reaching(self._reach(rows, positions)):
            run = self.run_of(rows, inputs.shape[0], decoding)
        if not follows:
            self.bank.run = run
        if follows or self._may_run_again(rows):
            kwargs[attention.HANDED_DOWN] = run
        nothing_given = kwargs.get("attention_mask") is kwargs.get("position_ids") is None
        if follows and self._reaches_part and past is None and nothing_given:
            # Without one, compiled code takes the positions below for those of packed sequences, as a caller's may be.
            kwargs["attention_mask"] = torch.ones(inputs.shape[:2], dtype=torch.int64, device=inputs.device)
        kwargs["position_ids"] = self._behind(positions, beside(positions, run.shift))
        if past is None and self.decoder.training and torch.is_grad_enabled() and "use_cache" in self._parameters:
            # Nothing goes on from a training step, and a cache would copy all keys and values.
            kwargs["use_cache"] = bool(kwargs.get("use_cache"))
        return (), kwargs | self._collect(run, kwargs.get("inputs_embeds"))

    def _after(self, decoder: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        handed, first = kwargs.get(attention.HANDED_DOWN), kwargs.get(FIRST)
        if handed is not None and is_compiling():
            return with_last(output, handed.last, first)
        return apart(self._end, output, handed, first)

    def _end(self, output: Any, handed: Run | None, first: Tensor | None) -> Any:
        run = self.bank.run
        if run is OFF:
            return None
        self._clear()
        run = run if handed is None else handed
        return None if run is None else with_last(output, run.last, first)

    def _before_loss(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        return self._begin_loss(args, kwargs) if self._follows() else apart(self._begin_loss, args, kwargs)

    def _begin_loss(self, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        kwargs = dict(zip(self._model_parameters, args, strict=False)) | kwargs
        labels, rows = kwargs.get("labels"), self.rows
        if self.bank.run is OFF or not rows or not isinstance(labels, Tensor) or labels.dim() != 2:
            return None
        if kwargs.get("shift_labels") is not None or goes_on(past_of(kwargs), labels.shape[1]):
            return None  # what predicts the first token is the caller's to say, or in the cache
        forms = [[self.sources[n].form for n in names if n in self.sources] for names in rows]
        ends = [of_row[-1:] == [Form.EMBEDDINGS] for of_row in forms]
        found = with_first_label(kwargs, ends, self._masks_loss)
        return None if found is None else ((), found)

    def _check_apart(self, rows: Sequence[tuple[str, ...]]) -> None:
        """Of rows beside which the decoder attends to something else: a prompt that runs through it alone does not."""
        prompts = {name for names in rows for name in names if name in self.sources}
        if at_embedding := sorted(name for name in prompts if self.sources[name].form is Form.EMBEDDINGS):
            raise ValueError(
                f"encoder_hidden_states is given, on which adapters {at_embedding}, prompts at the embedding that run "
                "through the model without it, would depend; use Prefix Tuning or P-Tuning v2, which do not"
            )

    def _positions(self, kwargs: dict[str, Any], inputs: Tensor, past: int | Tensor | None) -> Tensor:
        """Of the text, from the model's first on."""
        room = past is not None  # beyond what is written
        past, length = past if room else 0, inputs.shape[1]
        given, mask = kwargs.get("position_ids"), kwargs.get("attention_mask")
        new = torch.arange(length, device=inputs.device) + beside(inputs, past)
        seen = length if isinstance(past, Tensor) else past + length
        if isinstance(mask, Tensor) and mask.dim() == 4 and mask.dtype == torch.int32:
            mask = {"full_attention": mask}
        if isinstance(mask, dict):  # made by the model around the decoder, which alone was told of the padding
            mask = attention.unpadded_keys(mask)
            mask = None if mask is None or mask.shape[1] < seen else mask.expand(inputs.shape[0], -1)
        if isinstance(mask, Tensor):
            fits, rows = mask.dim() in (2, 4) and mask.shape[-1] >= seen, inputs.shape[0]  # not len(), an open size's
            if mask.dim() == 4:  # of the caller's own, which may stand for every row, head and query
                fits = fits and mask.shape[0] in (1, rows) and mask.shape[2] in (1, length)
            else:
                fits = fits and mask.shape[0] == rows
            if not fits or (mask.shape[-1] > length and not room):
                wanted, each = (rows, past + length), "token"
                if mask.dim() == 4:
                    wanted, each = (rows, 1, length, past + length), "query and key"
                raise ValueError(
                    f"attention_mask has shape {tuple(mask.shape)}; it must be {wanted}: one number a {each} of the "
                    "text, none for virtual tokens"
                )
        if isinstance(mask, Tensor) and mask.dim() == 2:
            shared = given is not None and given.dim() == 2 and given.shape[0] == 1
            if given is None or shared:
                counted = (new - first_visible(mask)).clamp(min=0) + self._first
                # Those that count every token come from the model around the decoder: without a prefix they are right.
                return torch.where(given == new + self._first, counted, given) if shared else counted
        # Those that number by themselves may want the positions of every row.
        return new.expand(inputs.shape[0] if self._first else 1, -1) + self._first if given is None else given

    def _behind(self, positions: Tensor, shift: int | Tensor) -> Tensor:
        """``positions`` of the text behind a prefix of the length ``shift``."""
        shifted = positions + shift
        if not self._axes_in_images or positions.dim() != 3:
            return shifted
        # Of the text all axes are alike, and of no token of an image, as one that starts it stands before the first.
        text = (positions == positions[:1]).all(0)
        axes = self._axes_in_images
        return torch.cat([shifted[:-axes], torch.where(text, shifted[-axes:], positions[-axes:])])

    def _reach(self, rows: Sequence[tuple[str, ...]], positions: Tensor) -> int | Tensor:
        """See ``bank.reach``; a tensor in compiled code, which cannot ask."""
        if not self._rotaries:
            return 0
        longest = max(sum(self.sources[n].count for n in names if n in self.sources) for names in rows)
        last = positions.max()
        reach = (last if is_compiling() else int(last)) + longest + 1
        return reach * (reach > self._usual_reach)

    def _computed(self, embeddings: Tensor, rows: Rows | None, layer_inputs: Sequence[Tensor] = ()) -> Values:
        cache = DynamicCache()
        positions = torch.arange(len(embeddings), device=embeddings.device) + self._first
        handed = {attention.HANDED_DOWN: OFF} if self._hands_down else {}  # should the decoder be compiled code
        with (
            self._bare(rows, layer_inputs),
            reaching(self._rotaries, self.bank.reach),
            all_layers(self.decoder.config, len(self.attentions)),
        ):
            output = self.decoder(
                inputs_embeds=embeddings.unsqueeze(0),
                position_ids=positions.unsqueeze(0),
                use_cache=True,
                **{self._cache_name: cache},
                **handed,
            )
        held = [t for layer in cache.layers for t in (layer.keys, layer.values)]
        if torch.is_grad_enabled() and embeddings.requires_grad and not any(t.requires_grad for t in held):
            raise RuntimeError(
                "layers within reentrant checkpoints keep no gradient of a prompt that runs through them: call "
                "gradient_checkpointing_enable() instead, or have use_reentrant=False in them"
            )
        return Values(self._in_layers(tied(held, output[0], self._blocks[-1])), output[0][:, -1])


def _looks_up_ids(decoder: nn.Module) -> bool:
    """Whether it wants each vector to be a token's: Gemma 4 does, for its embeddings a layer; Gemma 3n does not."""
    of_ids = getattr(decoder, "get_per_layer_inputs", None)
    if of_ids is None or not decoder.config.hidden_size_per_layer_input:
        return False
    return "inputs_embeds" in inspect.signature(of_ids).parameters
