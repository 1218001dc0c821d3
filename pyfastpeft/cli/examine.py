"""Asking a model the questions of a JSONL file and scoring what it says."""

from __future__ import annotations

from rich.console import Console
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..conversations import Messages, opening
from ..data import Score, score_answers
from ..generation import answer
from .progress import progress_bar

_SPARE_TOKENS = 8  # an answer that does not end where it should is cut a little later


def examine(
    console: Console, title: str, model: nn.Module, tokenizer: PreTrainedTokenizerBase, rows: list[Messages]
) -> Score:
    """Score the model's greedy answers against the last message of every row."""
    references = [messages[-1]["content"] for messages in rows]
    asked = [messages[:-1] for messages in rows]
    begin = opening(asked[0], tokenizer)
    longest = max(map(len, tokenizer([begin + text for text in references], add_special_tokens=False)["input_ids"]))
    with progress_bar(console) as progress:
        task = progress.add_task(title, total=len(rows), note="")
        answers = answer(model, tokenizer, asked, longest + _SPARE_TOKENS, on_batch=lambda n: progress.advance(task, n))
    return score_answers(answers, references)
