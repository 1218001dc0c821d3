"""Conversations as tokens: JSONL, chat templates, labels on the completions only, places in a model for them all."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeVar

from torch import nn
from transformers import PreTrainedTokenizerBase

from .hub.files import check_text
from .nn.ends import embedding_weight
from .ops.cross_entropy import IGNORED

Messages = list[dict[str, str]]
Rows = dict[int, Messages]
"""Conversations by the numbers of their lines in a file."""
_Row = TypeVar("_Row")
_ROLES = ("system", "user", "assistant", "tool")


def pad_id(tokenizer: PreTrainedTokenizerBase, model: nn.Module) -> int:
    """The id to pad with: any that ``model`` embeds will do where a mask says what counts."""
    known, rows = (tokenizer.pad_token_id, tokenizer.eos_token_id), embedded_tokens(model)
    return next((i for i in known if i is not None and i < rows), 0)


def embedded_tokens(model: nn.Module) -> int:
    """How many tokens ``model`` embeds."""
    return len(embedding_weight(model))


def check_ids(what: str, ids: Sequence[int], rows: int) -> None:
    """Whether a row's tokens are among the ``rows`` embedded ones; torch says "index out of range" where one is not."""
    if (largest := max(ids, default=0)) >= rows:
        raise ValueError(
            f"{what} has the token {largest}; the model embeds 0 to {rows - 1}. Where the tokenizer got new tokens, "
            "resize_token_embeddings makes room for them"
        )


def learned_positions(model: nn.Module) -> int | None:
    """How many positions ``model`` has learned, each by a vector of its own (GPT-2, OPT); None: they are computed."""
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None) or 0
    words = set(model.get_input_embeddings().modules())
    tables = (m for m in model.modules() if isinstance(m, nn.Embedding) and m not in words)
    # OPT's has two rows more.
    table = next((m for m in tables if 0 < limit <= m.num_embeddings <= limit + 2), None)
    if table is None:
        return None
    return limit if table.padding_idx is None else limit - table.padding_idx - 1  # RoBERTa's begin behind padding's


def virtual_tokens(model: nn.Module, names: str | Sequence[str] | None = None) -> int:
    """How many virtual tokens stand before a row that uses the adapters ``names`` (default: the active ones)."""
    configs = getattr(model, "peft_config", {})
    names = model.active_adapters if names is None and configs else names or ()
    used = (configs.get(name) for name in ([names] if isinstance(names, str) else names))
    return sum(getattr(config, "num_virtual_tokens", 0) for config in used)


def check_positions(what: str, tokens: int, virtual: int, positions: int) -> None:
    """Whether a row has a place at ``positions`` learned ones; torch says "index out of range" where it has none."""
    if tokens + virtual > positions:
        beside = f" beside {virtual} virtual ones" if virtual else ""
        raise ValueError(f"{what} has {tokens} tokens{beside}; the model has learned {positions} positions")


def read_objects(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The JSON objects in a JSONL file, one a line; blank lines are skipped.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line that is not a JSON object (names the file and the line), or no line at all.
    """
    return list(_read(path, lambda row: row).values())


def read_rows(path: str | os.PathLike) -> list[Messages]:
    """The conversations in a JSONL file.

    Args:
        path: each line is an object with ``messages`` (a list of ``{"role", "content"}`` that ends with the assistant)
            or with ``prompt`` and ``completion``; other keys are ignored.

    Raises:
        FileNotFoundError, ValueError: as :func:`read_objects`, and for a row without these keys.
    """
    return list(numbered_rows(path).values())


def numbered_rows(path: str | os.PathLike) -> Rows:
    """:func:`read_rows`, by their lines' numbers."""
    return _read(path, _messages)


def _read(path: str | os.PathLike, convert: Callable[[dict[str, Any]], _Row]) -> dict[int, _Row]:
    path = Path(path)
    if not path.exists() or path.is_dir():  # a pipe is no file
        raise FileNotFoundError(f"there is no file {path}")
    rows = {}
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            with _of_line(path, number):
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if text.strip():
                    row = json.loads(text)
                    if not isinstance(row, dict):
                        raise ValueError(f"the row is a JSON {type(row).__name__}; it must be an object")
                    rows[number] = convert(row)
    if not rows:
        raise ValueError(f"{path} holds no rows; it must hold one JSON object a line")
    return rows


@contextmanager
def _of_line(path: str | os.PathLike, number: int) -> Iterator[None]:
    try:
        yield
    except json.JSONDecodeError as error:  # it counts lines from this one
        raise ValueError(f"{path}, line {number}, character {error.pos + 1}: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}, line {number}: {error}") from None


def _messages(row: dict[str, Any]) -> Messages:
    if "messages" not in row:
        for key in ("prompt", "completion"):
            if not isinstance(row.get(key), str):
                raise ValueError("the row must have 'messages', or 'prompt' and 'completion' as text")
            check_text(row[key])
        return [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
    messages = row["messages"]
    if not isinstance(messages, list) or not messages:
        raise ValueError("'messages' must be a list that is not empty")
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise ValueError("each of 'messages' must be an object with 'role' and 'content' as text")
        check_text(message["role"] + message["content"])
    if messages[0]["role"] == "assistant":
        raise ValueError("the first of 'messages' has the role 'assistant'; before it must stand what it answers")
    if messages[-1]["role"] != "assistant":
        raise ValueError(f"the last of 'messages' has the role {messages[-1]['role']!r}; it must be 'assistant'")
    return messages


def _template(messages: Messages, tokenizer: PreTrainedTokenizerBase, answer_next: bool) -> str:
    """The conversation as text; without a chat template, its contents one after the other."""
    _check_roles(messages, tokenizer.chat_template or "")
    if tokenizer.chat_template:
        try:
            return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer_next)
        except Exception as error:  # it is a program, and many refuse a system's message, or roles that take no turns
            raise ValueError(f"the chat template refuses the messages: {error}") from error
    ends = ((tokenizer.eos_token or "") if m["role"] == "assistant" else "" for m in messages)
    return "".join(m["content"] + end for m, end in zip(messages, ends, strict=True))


def _check_roles(messages: Messages, template: str | dict[str, str]) -> None:
    """Refuse roles without a turn in the template, which writes out a word that it does not know, or nothing at all."""
    source = template if isinstance(template, str) else "".join(template.values())
    for role in (m["role"] for m in messages):
        if role not in _ROLES and f"'{role}'" not in source and f'"{role}"' not in source:
            known = ", ".join(map(repr, _ROLES))
            raise ValueError(
                f"one of 'messages' has the role {role!r}; it must be {known} or another that the chat template names"
            )


def _ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    check_text(text)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _ids_from_start(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The same of what :func:`_template` returns, with the tokens that begin a text for this tokenizer.

    A chat template writes them itself. Without one they cannot be written into the text: sentencepiece begins a text
    with a space that it does not have, but not behind a special token.
    """
    ids = _ids(text, tokenizer)
    if tokenizer.chat_template:
        return ids
    some = text or "a"
    plain, framed = _ids(some, tokenizer), tokenizer(some)["input_ids"]
    begins = next((i for i in range(len(framed)) if framed[i : i + len(plain)] == plain), 0)
    return framed[:begins] + ids


def prompt_ids(messages: Messages, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a conversation up to where the assistant's next answer begins.

    Raises:
        ValueError: the chat template refuses the messages or does not name a role, or there are no tokens that an
            answer could follow.
    """
    ids = _ids_from_start(_template(messages, tokenizer, True), tokenizer)
    if not ids:
        raise ValueError("the prompt is empty, and the tokenizer begins a text with no token; it needs some text")
    return ids


_ANSWER = "An answer."


def _around_answer(messages: Messages, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str, str]:
    """What the chat template writes before an answer to ``messages``, that answer if it is there, and what follows."""
    text = _template([*messages, {"role": "assistant", "content": _ANSWER}], tokenizer, False)
    return text.rpartition(_ANSWER)


def opening(messages: Messages, tokenizer: PreTrainedTokenizerBase) -> str:
    """What begins every answer as :func:`encode` teaches it, and is the template's: Qwen3's empty thought."""
    before, _, _ = _around_answer(messages, tokenizer)
    asked = _template(messages, tokenizer, True)
    return before[len(asked) :] if before.startswith(asked) else ""


def end_ids(messages: Messages, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that end an answer to ``messages`` as :func:`encode` teaches it: the tokenizer's end of a text, and
    the first special token that stands behind an answer."""
    _, found, behind = _around_answer(messages, tokenizer)
    known = tokenizer.added_tokens_decoder
    ends = (i for i in _ids(behind, tokenizer) if i in known and known[i].special)
    return {i for i in (tokenizer.eos_token_id, next(ends, None) if found else None) if i is not None}


def encode(messages: Messages, tokenizer: PreTrainedTokenizerBase, max_length: int) -> dict[str, list[int]]:
    """``input_ids`` and ``labels`` of one conversation, cut to ``max_length``.

    Labels are the ids of every assistant message (and what ends it), -100 elsewhere. The tokens of what is asked are
    those it has when the model answers, and an answer's are what it adds to them; where the two would share a token,
    they are tokenized apart.

    Raises:
        ValueError: the chat template refuses the messages, does not name a role, rewrites earlier messages or asks for
            an answer by what it does not write before it, or there is no label, or none within ``max_length``.
    """
    return _cut(_encode(messages, tokenizer), max_length)


def _encode(messages: Messages, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[int]]:
    ids: list[int] = []
    labels: list[int] = []
    done, before = "", []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        asked, answered = _template(messages[:i], tokenizer, True), _template(messages[: i + 1], tokenizer, False)
        if not asked.startswith(done):
            raise ValueError("the chat template rewrites earlier messages, so the answers cannot be told apart")
        if not answered.startswith(asked):
            same = next(i for i, (a, b) in enumerate(zip_longest(asked, answered)) if a != b)
            raise ValueError(
                f"the chat template asks for an answer by {asked[same:]!r} and does not write that before one that is "
                "given, so the answer cannot be told apart"
            )
        for text, is_label in ((asked, False), (answered, True)):
            # Not apart where it need not be: Llama-2's tokenizer begins every text with a space.
            now = _ids_from_start(text, tokenizer)
            follows = now[: len(before)] == before
            part = now[len(before) :] if follows else _ids(text[len(done) :], tokenizer)
            ids += part
            labels += part if is_label else [IGNORED] * len(part)
            done, before = text, now
    if all(label == IGNORED for label in labels):
        raise ValueError("no message of the assistant has a token, so there is nothing to learn")
    return {"input_ids": ids, "labels": labels}


def _cut(example: dict[str, list[int]], max_length: int) -> dict[str, list[int]]:
    example = {key: values[:max_length] for key, values in example.items()}
    if all(label == IGNORED for label in example["labels"]):
        raise ValueError(f"the prompt fills max_length = {max_length} tokens; no answer is left to learn")
    return example


def load_dataset(
    path: str | os.PathLike, tokenizer: PreTrainedTokenizerBase, max_length: int = 1024
) -> list[dict[str, list[int]]]:
    """The rows of a JSONL file (:func:`read_rows`), encoded (:func:`encode`); an error names the line.

    Warns where rows are cut.
    """
    return encode_rows(path, numbered_rows(path), tokenizer, max_length)


def encode_rows(
    path: str | os.PathLike, rows: Rows, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[dict[str, list[int]]]:
    """:func:`load_dataset` of what :func:`numbered_rows` has read from ``path``, which may be a pipe."""
    examples = []
    cut = 0
    for number, messages in rows.items():
        with _of_line(path, number):
            encoded = _encode(messages, tokenizer)
            cut += len(encoded["input_ids"]) > max_length
            examples.append(_cut(encoded, max_length))
    if cut:
        warnings.warn(
            f"{path}: {cut} of {len(rows)} rows are longer than max_length = {max_length} tokens; they are cut there, "
            "and the ends of their answers are not learned",
            stacklevel=3,
        )
    return examples
