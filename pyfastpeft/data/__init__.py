"""The rows shipped with the package (see drug_qa/README.md) and how answers are scored."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple


def drug_qa(name: str) -> Path:
    """Path of ``train``, ``test``, ``train_50`` or ``test_50`` (JSONL)."""
    return Path(__file__).parent / "drug_qa" / f"{name}.jsonl"


class Score(NamedTuple):
    """Shares in [0, 1] of the answers.

    Attributes:
        exact: those that are the reference from beginning to end.
        accuracy: those whose line for the reference's first key is the reference's first line.
        format_validity: those that have exactly the reference's keys in order, a line each, with something after each
            where the reference has something.

    The key of a line ends with its first ": "; those of a drug_qa row are "Drug: ", "Class: ", "Use: ". A line without
    one has an empty key.
    """

    exact: float
    accuracy: float
    format_validity: float


def score_answers(answers: Sequence[str], references: Sequence[str]) -> Score:
    """Score ``answers`` against the completions of their rows.

    White space around either does not count, nor whether lines end as on Windows.
    """
    exact = right = valid = 0
    for answer, reference in zip(answers, references, strict=True):
        lines, wanted = (text.strip().replace("\r\n", "\n").split("\n") for text in (answer, reference))
        keys = [line[: line.find(": ") + 2] if ": " in line else "" for line in wanted]
        first = next((line for line in lines if line.startswith(keys[0].rstrip())), None)
        exact += lines == wanted
        right += first == wanted[0]
        valid += len(lines) == len(keys) and all(
            line.startswith(key) and (len(line) > len(key)) == (len(own) > len(key))
            for line, own, key in zip(lines, wanted, keys, strict=True)
        )
    return Score(exact / len(answers), right / len(answers), valid / len(answers))
