"""The rows shipped with the package (see drug_qa/README.md) and how an answer to them is scored."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

_KEYS = ("Drug: ", "Class: ", "Use: ")


def drug_qa(name: str) -> Path:
    """Path of ``train``, ``test``, ``train_50`` or ``test_50`` (JSONL)."""
    return Path(__file__).parent / "drug_qa" / f"{name}.jsonl"


class Score(NamedTuple):
    """Shares in [0, 1] of the answers that name the drug exactly, and that are exactly the three lines in order."""

    accuracy: float
    format_validity: float


def score_drug_qa(answers: Sequence[str], references: Sequence[str]) -> Score:
    """Score ``answers`` against the completions of their rows."""
    right = valid = 0
    for answer, reference in zip(answers, references, strict=True):
        lines = answer.split("\n")
        drug = next((line for line in lines if line.startswith("Drug:")), None)
        right += drug == reference.split("\n")[0]
        valid += len(lines) == 3 and all(
            line.startswith(key) and len(line) > len(key) for line, key in zip(lines, _KEYS, strict=True)
        )
    return Score(right / len(answers), valid / len(answers))
