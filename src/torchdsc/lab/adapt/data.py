"""Data of a task: rows of files or data sets, split and encoded."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from statistics import fmean, pstdev
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase
from transformers.data.data_collator import DataCollatorWithPadding, default_data_collator

from .config import Head, Task
from .rows import Example, read_source
from .sentences import collate_sentences

__all__ = ["TaskData", "load_task"]

# Splitting a task's rows does not depend on a run's seed.
_SPLIT_SEED = 1234


class _Examples(Dataset[dict[str, Any]]):
    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


@dataclass(frozen=True)
class TaskData:
    """A task's encoded examples.

    Attributes:
        task: The task.
        train: To train on.
        validation: Held out of train: for tuning, and the best checkpoint.
        evaluation: For the final score, looked at once; as many held out of train where the task names none.
        retain: Blocks of the old domain, or None.
        labels: Names of the classes, by id; one for regression; none for causal LMs.
        scale: Mean and standard deviation of train's labels, which regression standardises them by.
        sha256: Of the sources: train, then the task's evaluation and retain if it has them.
        collate: What makes a batch of examples.
    """

    task: Task
    train: Dataset[dict[str, Any]]
    validation: Dataset[dict[str, Any]]
    evaluation: Dataset[dict[str, Any]]
    retain: Dataset[dict[str, Any]] | None
    labels: list[str]
    scale: tuple[float, float]
    sha256: list[str]
    collate: Callable[..., Any]


def load_task(
    task: Task, tokenizer: PreTrainedTokenizerBase, *, max_length: int, validation_examples: int, head: Head = None
) -> TaskData:
    """Read, split and encode a task's data.

    Args:
        task: The task.
        tokenizer: Of the base model.
        max_length: Tokens of an example at most (of each of its texts, for embeddings), or of a block.
        validation_examples: Examples held out of train, and once more where the task names no evaluation.
        head: As of the study.

    Returns:
        The examples.

    Raises:
        ValueError: If a source is unusable, train is too small or its labels are all alike, or a label is none of its.
        OSError: If a file cannot be read.
    """
    hashes: list[str] = []
    if task.kind == "causal_lm":
        return _load_text(task, tokenizer, max_length, validation_examples, hashes)
    rows = _rows(task, task.train, hashes)
    random.Random(_SPLIT_SEED).shuffle(rows)
    # A score on the examples that chose a rate or a checkpoint would flatter: without a file of their own others are
    # held out for it.
    held = validation_examples * (1 if task.evaluation is not None else 2)
    if len(rows) <= held:
        raise ValueError(f"train of task {task.name!r} must hold more than {held} held-out examples, got {len(rows)}")
    train = rows[held:][: task.max_train]
    labels = sorted({str(row.label) for row in rows})
    if len(labels) < 2:
        raise ValueError(f"train of task {task.name!r} must have two labels or more, got {labels[0]!r} alone")
    if task.kind == "regression":
        labels = [task.label]
    if task.scored_by in ("matthews", "f1") and len(labels) != 2:
        raise ValueError(f"metric of task {task.name!r} must be accuracy where labels are not two, got {labels}")
    scale = _scale(train) if task.kind == "regression" else (0.0, 1.0)

    tokenize: Callable[..., Any] = partial(tokenizer, truncation=True, max_length=max_length)
    collate: Callable[..., Any] = DataCollatorWithPadding(tokenizer)
    if head == "embedding":
        tokenize, collate = partial(_apart, tokenize), partial(collate_sentences, tokenizer)

    def encode(rows: Sequence[Example]) -> _Examples:
        return _Examples([{**tokenize(*row.texts), "labels": _label(task, row, labels, scale)} for row in rows])

    validation = _by_length(encode(rows[:validation_examples]))
    last = rows[validation_examples:held] if task.evaluation is None else _rows(task, task.evaluation, hashes)
    evaluation = _by_length(encode(last[: task.max_evaluation]))
    return TaskData(task, encode(train), validation, evaluation, None, labels, scale, hashes, collate)


def _by_length(examples: _Examples) -> _Examples:
    """Batches of evaluation in this order have little padding."""
    return _Examples(sorted(examples.rows, key=lambda row: len(row["input_ids"])))


def _rows(task: Task, source: str, hashes: list[str]) -> list[Example]:
    found = read_source(task, source)
    hashes.append(found.sha256)
    return found.examples


def _scale(rows: Sequence[Example]) -> tuple[float, float]:
    values = [float(row.label or 0.0) for row in rows]
    return fmean(values), pstdev(values) or 1.0


def _apart(tokenize: Callable[..., Any], *texts: str) -> dict[str, Any]:
    """As :func:`collate_sentences` takes them; in one list, by whose length a sampler may sort."""
    encoded = [tokenize(text)["input_ids"] for text in texts]
    return {"input_ids": list(chain.from_iterable(encoded)), "lengths": [len(ids) for ids in encoded]}


def _label(task: Task, row: Example, labels: list[str], scale: tuple[float, float]) -> int | float:
    if task.kind == "regression":
        return (float(row.label or 0.0) - scale[0]) / scale[1]
    if row.label not in labels:
        raise ValueError(f"{row.place}, column {task.label!r}, must be a label of train, {labels}, got {row.label!r}")
    return labels.index(str(row.label))


def _load_text(task: Task, tokenizer: PreTrainedTokenizerBase, length: int, held: int, hashes: list[str]) -> TaskData:
    def blocks(source: str) -> list[dict[str, Any]]:
        text = "\n".join(row.texts[0] for row in _rows(task, source, hashes))
        ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
        cut = ids[: len(ids) // length * length].view(-1, length)
        if not len(cut):
            raise ValueError(f"{source} must hold at least {length} tokens, got {len(ids)}")
        return [{"input_ids": block, "labels": block, "attention_mask": torch.ones_like(block)} for block in cut]

    train = blocks(task.train)
    parts = 1 if task.evaluation is not None else 2
    if len(train) <= parts * held:
        raise ValueError(
            f"train of task {task.name!r} must hold more than {parts * held} held-out blocks of {length} tokens, "
            f"got {len(train)}"
        )
    # The end, not a sample: blocks beside each other share their sentences.
    last = train[-held:] if task.evaluation is None else blocks(task.evaluation)
    validation, evaluation = train[-parts * held :][:held], last[: task.max_evaluation]
    train = train[: -parts * held][: task.max_train]
    retain = None if task.retain is None else _Examples(blocks(task.retain)[: task.max_evaluation])
    examples = (_Examples(train), _Examples(validation), _Examples(evaluation))
    return TaskData(task, *examples, retain, [], (0.0, 1.0), hashes, default_data_collator)
