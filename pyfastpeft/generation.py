"""Greedy answers to a list of questions, in batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from .conversations import (
    Messages,
    check_ids,
    check_positions,
    embedded_tokens,
    end_ids,
    learned_positions,
    opening,
    pad_id,
    prompt_ids,
    virtual_tokens,
)
from .nn.modes import evaluating
from .ops.checks import as_count


@contextmanager
def _plain_generation(model: nn.Module) -> Iterator[None]:
    """Generate without the model's own settings while this lasts.

    A repetition penalty or beams of its generation_config are for conversation; they keep it from what it has learned.
    ``generate`` takes from there all that its arguments leave open.
    """
    held = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = held


def prompts_of(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Messages],
    adapter_names: Sequence[str] | None = None,
    called: Sequence[str] | None = None,
) -> tuple[list[list[int]], list[float]]:
    """Each conversation's token ids up to where its answer begins, and how many tokens the answer can have.

    Raises:
        ValueError: ``adapter_names`` of another length; a conversation that cannot be asked, which it names as
            ``called`` does (default: by its number).
    """
    if adapter_names is not None and len(adapter_names) != len(conversations):
        raise ValueError(f"adapter_names has {len(adapter_names)} names; there are {len(conversations)} conversations")
    rows, positions = embedded_tokens(model), learned_positions(model)
    prompts, room = [], []
    for number, messages in enumerate(conversations, 1):
        what = f"prompt {number}" if called is None else called[number - 1]
        try:
            ids = prompt_ids(messages, tokenizer)
        except ValueError as error:
            raise ValueError(f"{what}: {error}") from error
        check_ids(what, ids, rows)
        left = math.inf
        if positions is not None:
            virtual = virtual_tokens(model, None if adapter_names is None else adapter_names[number - 1])
            check_positions(what, len(ids), virtual, positions)
            left = positions - virtual - len(ids) + 1  # the last token of an answer is not read again
        prompts.append(ids)
        room.append(left)
    return prompts, room


def _eos_ids(model: nn.Module) -> set[int]:
    """The tokens that end a text by the model's own configuration."""
    given = model.generation_config.eos_token_id
    ids = given if isinstance(given, (list, tuple)) else [] if given is None else [given]
    if not all(isinstance(i, int) for i in ids):
        raise ValueError(
            f"the generation_config's eos_token_id is {given!r}; it must be the number of a token, or a list"
        )
    return set(ids)


def answer(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Messages],
    max_new_tokens: int = 64,
    batch_size: int = 32,
    adapter_names: Sequence[str] | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> list[str]:
    """The model's greedy answer to each conversation (whose last message is the user's): its likeliest next tokens.

    It ends at what ends a text for the model, for the tokenizer or in training (:func:`end_ids`).

    Args:
        max_new_tokens: the longest answer; a batch's are shorter where the positions end that the model has learned.
        adapter_names: for each conversation the adapter that answers (``"__base__"``: none); default: the active one.
        on_batch: called after each batch with the number of conversations answered in it.

    Returns:
        One text a conversation, without special tokens and what the chat template begins each answer with.

    Raises:
        ValueError: as :func:`prompts_of`; a ``batch_size`` below 1; a ``generation_config`` whose ``eos_token_id`` is
            no number of a token.
    """
    batch_size = as_count("batch_size", batch_size)
    device = next(model.parameters()).device
    pad = pad_id(tokenizer, model)
    prompts, room = prompts_of(model, tokenizer, conversations, adapter_names)
    own_ends = _eos_ids(model)
    answers: list[str] = []
    with evaluating(model), _plain_generation(model):
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            length = max(map(len, batch))
            ids = torch.tensor([[pad] * (length - len(p)) + p for p in batch], device=device)
            mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in batch], device=device)
            routed = {} if adapter_names is None else {"adapter_names": adapter_names[start : start + batch_size]}
            ends = own_ends | end_ids(conversations[start], tokenizer)
            out = model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=min(max_new_tokens, *room[start : start + batch_size]),
                pad_token_id=pad,
                eos_token_id=sorted(ends) or None,
                **routed,
            )
            rows = out[:, length:].tolist()
            said = [row[: next((n for n, i in enumerate(row) if i in ends), None)] for row in rows]
            begun = tokenizer(opening(conversations[start], tokenizer), add_special_tokens=False)["input_ids"]
            begin, *texts = (t.strip() for t in tokenizer.batch_decode([begun, *said], skip_special_tokens=True))
            answers += [text.removeprefix(begin).strip() for text in texts]
            if on_batch is not None:
                on_batch(len(batch))
    return answers
