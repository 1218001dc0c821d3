"""Fine-tuning an adapter on conversations with transformers' Trainer.

A checkpoint holds the adapter (a PEFT folder), the optimizer, the schedule and the random state in safetensors and
JSON. It is written aside and renamed, and renamed before it is removed, so a checkpoint that can be seen is whole.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import TrainOutput, get_last_checkpoint, sort_checkpoints

from .conversations import (
    Messages,
    check_ids,
    check_positions,
    embedded_tokens,
    encode,
    learned_positions,
    pad_id,
    virtual_tokens,
)
from .hub.files import atomic_write, check_tensors, load_safetensors, read_json, save_safetensors, write_text
from .hub.peft import CONFIG_NAME, adapter_folder
from .nn.linear4bit import Linear4bit
from .nn.modes import evaluating
from .ops.cross_entropy import IGNORED

_SLOTS = ("step", "exp_avg", "exp_avg_sq")
"""What AdamW keeps of a parameter: the number of its steps, and two tensors of its shape."""
_ARGUMENTS = (
    *("learning_rate", "lr_scheduler_type", "warmup_steps"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "seed"),
)


class Collator:
    """Pads a batch on the right: ids with ``pad_token_id``, labels with -100."""

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, examples: Sequence[Mapping[str, list[int]]]) -> dict[str, Tensor]:
        length = max(len(e["input_ids"]) for e in examples)

        def padded(rows: list[list[int]], value: int) -> Tensor:
            return torch.tensor([row + [value] * (length - len(row)) for row in rows])

        ids = [e["input_ids"] for e in examples]
        return {
            "input_ids": padded(ids, self.pad_token_id),
            "attention_mask": padded([[1] * len(row) for row in ids], 0),
            "labels": padded([e["labels"] for e in examples], IGNORED),
        }


class AdapterTrainer(Trainer):
    """transformers' Trainer for a :class:`PeftModel`: checkpoints hold the adapter alone, and no pickle."""

    @cached_property
    def _settings(self) -> dict[str, Any]:
        """Without the same of these a resumed run is not the uninterrupted one. (Another number of steps is asked
        for.)"""
        rows = hashlib.sha256()
        for row in self.train_dataset:
            rows.update(np.array([row["input_ids"], row["labels"]], dtype=np.int64).tobytes())
        quantized = {
            f"{layer.quant_type} in blocks of {layer.blocksize}{', double-quantized' * layer.double_quant}"
            for layer in self.model.modules()
            if isinstance(layer, Linear4bit)
        }
        return {name: getattr(self.args, name) for name in _ARGUMENTS} | {
            "base weights": " and ".join(sorted(quantized)) or "not quantized",
            "dataset": f"{len(self.train_dataset)} rows with hash {rows.hexdigest()[:12]}",
        }

    def _save_checkpoint(self, model: nn.Module, trial: object) -> None:
        root = Path(self.args.output_dir)
        final = root / f"checkpoint-{self.state.global_step}"
        aside = root / f".{final.name}.partial"
        rank = self.args.process_index
        try:
            if self.args.should_save:
                self.model.save_pretrained(aside, selected_adapters=self.model.active_adapters)
                tensors, numbers = _split_tensors(self.optimizer.state_dict())
                save_safetensors(tensors, aside / "optimizer.safetensors")
                schedule = self.lr_scheduler.state_dict()
                saved = {"optimizer": numbers, "scheduler": schedule, "settings": self._settings}
                write_text(json.dumps(saved), aside / "optimizer.json")
                with atomic_write(aside / "trainer_state.json") as state:
                    self.state.save_to_json(str(state))
            tensors, numbers = _random_state()
            save_safetensors(tensors, aside / f"random-{rank}.safetensors")
            write_text(json.dumps(numbers), aside / f"random-{rank}.json")
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            _remove_checkpoint(final)
            os.replace(aside, final)
            for old in sort_checkpoints(str(root))[: -self.args.save_total_limit]:
                _remove_checkpoint(Path(old))

    def _load_from_checkpoint(self, checkpoint: str, model: nn.Module | None = None) -> None:
        differ = _differences(self.model, checkpoint)
        if base := differ.get("base_model_name_or_path"):
            warnings.warn(f"{checkpoint} was trained over another base model, or that was moved: {base}", stacklevel=2)
        try:
            super()._load_from_checkpoint(checkpoint, model)
        except ValueError as error:
            if not differ:
                raise
            raise ValueError(
                f"{checkpoint} cannot be resumed with another adapter than its own: {_listed(differ)}"
            ) from error

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            file = Path(checkpoint) / "optimizer.safetensors"
            settings = file.with_suffix(".json")
            tensors, saved = load_safetensors(file), read_json(settings)
            with _of_checkpoint(checkpoint):
                numbers, groups = saved["optimizer"], self.optimizer.param_groups
                known = self.optimizer.state_dict()["param_groups"]
                if [g["params"] for g in numbers["param_groups"]] != [g["params"] for g in known]:
                    raise ValueError(f"{settings} is of another number of parameters")
                shapes = dict(enumerate(tuple(p.shape) for group in groups for p in group["params"]))
                # The fused AdamW trusts its state to have the parameters' shapes: others would be read past their ends.
                expected = {
                    f"{i}.{slot}": () if slot == "step" else shapes[i] for i in numbers["trained"] for slot in _SLOTS
                }
                check_tensors(tensors, expected, {}, str(file))
                _check_numbers(numbers["param_groups"], known, f"{settings}: param_groups")
                schedule = self.lr_scheduler.state_dict()
                _check_numbers(saved["scheduler"], schedule, f"{settings}: scheduler")
                self.optimizer.load_state_dict(_join_tensors(tensors, numbers))
                self.lr_scheduler.load_state_dict(saved["scheduler"])
                if differ := _compared(saved.get("settings", {}), self._settings):
                    warnings.warn(
                        f"{checkpoint} is resumed with other settings than its own: {_listed(differ)}", stacklevel=2
                    )

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            stem = Path(checkpoint) / f"random-{self.args.process_index}"
            tensors, numbers = load_safetensors(f"{stem}.safetensors"), read_json(f"{stem}.json")
            with _of_checkpoint(checkpoint, ValueError):
                _set_random_state(tensors, numbers)


def _differences(model: nn.Module, checkpoint: str) -> dict[str, str]:
    """What the configurations of ``checkpoint``'s adapters and those of ``model`` have in common, but not the value of:
    that there, and that here."""
    differ = {}
    for name in model.active_adapters:
        saved = read_json(adapter_folder(checkpoint, name) / CONFIG_NAME)
        differ |= _compared(saved, replace(model.peft_config[name], inference_mode=True).to_dict())
    return differ


def _compared(saved: dict[str, Any], here: dict[str, Any]) -> dict[str, str]:
    here = json.loads(json.dumps(here))  # as it is saved: what was a tuple or an enumeration is none
    return {k: f"{saved[k]!r} there and {v!r} here" for k, v in here.items() if saved.get(k, v) != v}


def _listed(differ: dict[str, str]) -> str:
    return "; ".join(f"{key} is {values}" for key, values in differ.items())


def _remove_checkpoint(folder: Path) -> None:
    aside = folder.with_name(f".{folder.name}.gone.partial")
    with suppress(OSError):  # an old one that stays does no harm
        os.replace(folder, aside)
        shutil.rmtree(aside)


class _NothingLeft(Exception):
    """A resumed run has all its steps behind it."""


class _StopBeforeTheFirstStep(TrainerCallback):
    """Raises :class:`_NothingLeft`; transformers looks at the number of steps only after one more."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if state.global_step >= state.max_steps:
            raise _NothingLeft


@contextmanager
def _of_checkpoint(checkpoint: str, *more: type[Exception]) -> Iterator[None]:
    """What the files of a checkpoint lack is an error that names it, and so are ``more`` errors."""
    try:
        yield
    except (AttributeError, LookupError, TypeError, *more) as error:
        raise ValueError(f"{checkpoint} does not hold the state of a training: {error!r}") from error


def _check_numbers(saved: Any, known: Any, name: str) -> None:
    """Whether what is a number in ``known``, or numbers in lists and objects, is one in ``saved`` as well."""
    if isinstance(known, dict):
        for key, value in known.items():
            if key in saved:
                _check_numbers(saved[key], value, f"{name}.{key}")
    elif isinstance(known, (list, tuple)):
        for i, value in enumerate(known):
            _check_numbers(saved[i], value, f"{name}[{i}]")
    elif isinstance(known, (int, float)) and not isinstance(saved, (int, float)):
        raise ValueError(f"{name} is {saved!r}; it must be a number")


def last_checkpoint(output_dir: str | os.PathLike, resume: bool) -> str | None:
    """The newest checkpoint, to go on from; None without ``resume``, where there must be none."""
    last = get_last_checkpoint(str(output_dir)) if Path(output_dir).is_dir() else None
    if resume and last is None:
        raise ValueError(f"resume is True, but {output_dir} holds no checkpoint")
    if last is not None:
        if not resume:
            raise ValueError(
                f"{output_dir} holds checkpoints of an earlier run; resume it, remove them, or choose another folder"
            )
        _check_state(Path(last) / "trainer_state.json")
    return last


def _check_state(file: Path) -> None:
    """Whether ``file`` says where a training stands; transformers asks nothing before it reckons with it."""
    state = read_json(file)
    for key, kind in (("global_step", int), ("train_batch_size", int), ("log_history", list)):
        if type(state.get(key)) is not kind:
            raise ValueError(f"{file}: {key} is {state.get(key)!r}; it must be of the type {kind.__name__}")


def _split_tensors(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """AdamW's state dict as tensors by name and the rest, which JSON can hold.

    ``trained`` are the numbers of the parameters that have a state: one that no loss has depended on yet has none.
    """
    tensors = {f"{i}.{slot}": value for i, slots in state["state"].items() for slot, value in slots.items()}
    return tensors, {"trained": list(state["state"]), "param_groups": state["param_groups"]}


def _join_tensors(tensors: dict[str, Tensor], numbers: dict[str, Any]) -> dict[str, Any]:
    state = {i: {slot: tensors[f"{i}.{slot}"] for slot in _SLOTS} for i in numbers["trained"]}
    return {"state": state, "param_groups": numbers["param_groups"]}


def _random_state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    name, keys, *rest = np.random.get_state()
    tensors = {"torch": torch.get_rng_state(), "numpy": torch.from_numpy(keys.astype(np.int64))}
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    return tensors, {"python": random.getstate(), "numpy": [name, *rest]}


def _set_random_state(tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
    version, keys, gauss = numbers["python"]
    random.setstate((version, tuple(keys), gauss))
    name, *rest = numbers["numpy"]
    np.random.set_state((name, tensors["numpy"].numpy().astype(np.uint32), *rest))
    torch.set_rng_state(tensors["torch"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])


def train_adapter(
    model: nn.Module,
    dataset: Sequence[Mapping[str, list[int]]],
    pad_token_id: int,
    output_dir: str | os.PathLike,
    epochs: float = 3.0,
    learning_rate: float = 2e-4,
    batch_size: int = 8,
    gradient_accumulation_steps: int = 1,
    warmup_steps: float = 0,
    lr_scheduler_type: str = "linear",
    max_steps: int = -1,
    save_steps: int = 0,
    seed: int = 0,
    resume: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
) -> TrainOutput:
    """Train ``model``'s active adapter and write it to ``output_dir`` as a PEFT folder.

    Args:
        model: a :class:`PeftModel` over a causal language model.
        dataset: examples as :func:`load_dataset` makes them.
        warmup_steps: a number of steps, or below 1 a share of all steps.
        save_steps: write ``output_dir/checkpoint-<step>`` every so many steps (the newest two are kept); 0: none.
        resume: go on from the newest checkpoint in ``output_dir``; where that has all steps behind it, nothing trains.
            Warns where that was trained over another base model or one in another format, on other rows, or with
            another learning rate, schedule, batch or seed.

    Raises:
        ValueError: ``resume`` without a checkpoint, or one that is damaged or of another adapter; checkpoints of an
            earlier run without ``resume``; ``save_steps`` below 0; no rows, or numbers by which there is no step to
            train; a row that has a token which the model does not embed, or is longer than the positions it has
            learned.
    """
    if save_steps < 0:
        raise ValueError(f"save_steps is {save_steps}; it must be 0 (no checkpoints) or more")
    for name, value in (("batch_size", batch_size), ("gradient_accumulation_steps", gradient_accumulation_steps)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be 1 or more")
    if max_steps == 0 or (max_steps < 0 and epochs <= 0):
        raise ValueError(f"epochs is {epochs} and max_steps is {max_steps}; there must be a step to train")
    if len(dataset) == 0:
        raise ValueError("dataset is empty; it must have a row to train on")
    last = last_checkpoint(output_dir, resume)
    rows, positions, virtual = embedded_tokens(model), learned_positions(model), virtual_tokens(model)
    for number, example in enumerate(dataset, 1):
        check_ids(f"row {number}", example["input_ids"], rows)
        if positions is not None:
            check_positions(f"row {number}", len(example["input_ids"]), virtual, positions)
    for left in Path(output_dir).glob(".checkpoint-*.partial"):  # of a run that was killed
        shutil.rmtree(left, ignore_errors=True)
    set_seed(seed)
    args = TrainingArguments(
        output_dir=str(output_dir),
        num_train_epochs=epochs,
        max_steps=max_steps,
        learning_rate=learning_rate,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=gradient_accumulation_steps,
        warmup_steps=warmup_steps,
        lr_scheduler_type=lr_scheduler_type,
        save_strategy="steps" if save_steps else "no",
        save_steps=save_steps or 500,
        save_total_limit=2,
        logging_steps=1,
        logging_nan_inf_filter=False,  # a loss of NaN is shown as one, not as 0
        seed=seed,
        label_names=["labels"],
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to=[],
        disable_tqdm=True,
    )
    trainer = AdapterTrainer(
        model=model, args=args, train_dataset=dataset, data_collator=Collator(pad_token_id), callbacks=list(callbacks)
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_StopBeforeTheFirstStep)
    try:
        output = trainer.train(resume_from_checkpoint=last)
    except _NothingLeft:
        output = TrainOutput(trainer.state.global_step, math.nan, {})
    model.save_pretrained(output_dir, selected_adapters=model.active_adapters)
    return output


@torch.no_grad()
def held_out_loss(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Messages],
    max_length: int,
    batch_size: int = 8,
) -> float:
    """The model's mean cross-entropy, in nats, over all labels of ``rows``, which are cut as in training.

    A row that could be asked but not learned (:func:`encode` refuses it, or the model does not embed all of its tokens)
    does not count; NaN if none does.
    """
    if (positions := learned_positions(model)) is not None:
        max_length = min(max_length, positions - virtual_tokens(model))
    examples, embedded = [], embedded_tokens(model)
    for messages in rows:
        with suppress(ValueError):
            example = encode(messages, tokenizer, max_length)
            check_ids("the row", example["input_ids"], embedded)
            examples.append(example)
    collate, device = Collator(pad_id(tokenizer, model)), next(model.parameters()).device
    total, count = 0.0, 0
    with evaluating(model):
        for start in range(0, len(examples), batch_size):
            batch = {name: t.to(device) for name, t in collate(examples[start : start + batch_size]).items()}
            labels = int((batch["labels"][:, 1:] != IGNORED).sum())
            if labels:  # the loss of none is NaN
                total += labels * model(**batch).loss.item()
                count += labels
    return total / count if count else math.nan
