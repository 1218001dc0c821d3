"""Progress of training and evaluation on the terminal."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerState, TrainingArguments


def progress_bar(console: Console) -> Progress:
    """A bar with a description, a count, times and the field ``note``."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
    )


class TrainingProgress(TrainerCallback):
    """Shows the step and its loss, and keeps the peak learning rate, the losses and the seconds a step.

    Args:
        asked: what ``--lr`` says; where a resumed run has another rate, that is printed on stderr.
    """

    def __init__(self, console: Console, description: str, asked: float | None = None) -> None:
        self._progress = progress_bar(console)
        self._description = description
        self._begin = 0.0
        self._steps = 0
        self._asked = asked
        self.learning_rate = 0.0
        self.losses: list[float] = []
        self.seconds = 0.0

    @property
    def seconds_per_step(self) -> float:
        """Mean over the steps of this run."""
        return self.seconds / max(self._steps, 1)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: object, optimizer: Optimizer, **kwargs: object
    ) -> None:
        # A resumed run goes on at its checkpoint's rate. Schedules that follow the loss keep no initial one.
        self.learning_rate = optimizer.param_groups[0].get("initial_lr", args.learning_rate)
        if self._asked not in (None, self.learning_rate):
            rate = f"{self.learning_rate:g}"
            print(f"--lr {self._asked:g} is ignored: the run goes on at its checkpoint's {rate}", file=sys.stderr)
        self._task = self._progress.add_task(self._description, total=state.max_steps, note="")
        self._progress.start()
        self._begin = time.perf_counter()

    def on_step_end(self, args: object, state: TrainerState, control: object, **kwargs: object) -> None:
        self._steps += 1
        self.seconds = time.perf_counter() - self._begin
        self._progress.update(self._task, completed=state.global_step)

    def on_log(
        self, args: object, state: TrainerState, control: object, logs: dict[str, float], **kwargs: object
    ) -> None:
        if "loss" in logs:
            self.losses.append(logs["loss"])
            self._progress.update(self._task, note=f"loss {logs['loss']:.3f}  {self.seconds_per_step:.2f} s/step")

    def __enter__(self) -> TrainingProgress:
        return self

    def __exit__(self, *error: object) -> None:
        """Give the terminal back."""
        self._progress.stop()
