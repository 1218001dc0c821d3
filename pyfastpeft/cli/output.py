"""Where a command writes: text to a console, folders to a disk."""

from __future__ import annotations

import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from logging import ERROR, getLogger
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console


class _Stderr:
    """stderr, on which nobody may read: from the first error of writing on, what is said there is lost."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            self._lose()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._lose()

    def _lose(self) -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())  # where Python flushes the rest to at the end


@contextmanager
def _said_in_a_line(command: str) -> Iterator[None]:
    """This library's warnings are a line each on stderr, once, whatever the filters are; others' are not shown."""
    said = set()

    def show(message: Warning | str, *_: object) -> None:
        # Whose it is, the place it points to does not tell: where the user is, or who calls this library.
        issuer = sys._getframe(2).f_globals.get("__name__", "")  # 1 is the module warnings
        text = " ".join(str(message).split())
        if issuer.partition(".")[0] == __package__.partition(".")[0] and text not in said:
            said.add(text)
            print(f"pyfastpeft {command}: warning: {text}", file=sys.stderr)

    getLogger("bitsandbytes").setLevel(ERROR)  # which transformers' Trainer imports where it is installed
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show
        yield


@contextmanager
def opened_console(command: str, stderr: bool) -> Iterator[Console]:
    """The console of ``command``, on stdout or ``stderr``, and its warnings on stderr.

    What their encodings lack is escaped, and what stderr does not take is lost: it is not worth the work.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # None has not, nor has what a caller may have put there
            stream.reconfigure(errors="backslashreplace")
    with redirect_stderr(_Stderr(sys.stderr) if sys.stderr else StringIO()), _said_in_a_line(command):
        yield Console(stderr=stderr, highlight=False, emoji=False)


def print_answer(console: Console, text: str) -> None:
    """Print what a model says: rich would wrap it and take parts of it for markup."""
    print(text, file=console.file)


def check_place(output: Path) -> None:
    """Whether a folder ``output`` can be written: this would show after the work else."""
    if output.is_file():
        raise ValueError(f"output is {str(output)!r}, which is a file; it must be a folder, or not exist yet")
    # A link that leads nowhere is there too.
    there = next(folder for folder in (output, *output.absolute().parents) if os.path.lexists(folder))
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise ValueError(f"output is {str(output)!r}; nothing can be written in {there}: {error.strerror}") from None
