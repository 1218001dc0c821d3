"""What is printed as it is."""

from __future__ import annotations

from rich.console import Console


def print_answer(console: Console, text: str) -> None:
    """Print what a model says: rich would wrap it and make emojis of parts of it."""
    print(text, file=console.file)
