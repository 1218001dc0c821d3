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
        accuracy: those whose line for the reference's first key is the reference's first line.
        format_validity: those that are exactly the reference's keys in order, a line each, with something after each.

    The key of a line ends with its first ": "; those of a drug_qa row are "Drug: ", "Class: ", "Use: ".
    """

    accuracy: float
    format_validity: float


def score_answers(answers: Sequence[str], references: Sequence[str]) -> Score:
    """Score ``answers`` against the completions of their rows; white space around either does not count."""
    right = valid = 0
    for answer, reference in zip(answers, references, strict=True):
        lines, wanted = answer.strip().split("\n"), reference.strip().split("\n")
        keys = [line[: line.find(": ") + 2] if ": " in line else "" for line in wanted]
        first = next((line for line in lines if line.startswith(keys[0].rstrip())), None)
        right += first == wanted[0]
        valid += len(lines) == len(keys) and all(
            line.startswith(key) and len(line) > len(key) for line, key in zip(lines, keys, strict=True)
        )
    return Score(right / len(answers), valid / len(answers))
