"""Data of a task: rows of files or data sets, split and encoded."""

import csv
import hashlib
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase
from transformers.data.data_collator import DataCollatorWithPadding, default_data_collator

from torchdsc.lab.files import expand

from .config import Head, Task
from .sentences import collate_sentences

__all__ = ["TaskData", "load_task"]

Row = dict[str, Any]
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
        sha256: Of the files, in order; empty for data sets on the hub.
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
        ValueError: If a column is missing, a label is not one of train's or no number, or train is too small.
        OSError: If a file cannot be read.
    """
    hashes: list[str] = []
    if task.kind == "causal_lm":
        return _load_text(task, tokenizer, max_length, validation_examples, hashes)
    rows = list(_rows(task, task.train, hashes))
    random.Random(_SPLIT_SEED).shuffle(rows)
    # A score on the examples that chose a rate or a checkpoint would flatter: without a file of their own others are
    # held out for it.
    held = validation_examples * (1 if task.evaluation is not None else 2)
    if len(rows) <= held:
        raise ValueError(f"train of task {task.name!r} must hold more than {held} held-out examples, got {len(rows)}")
    train = rows[held:][: task.max_train]
    labels = sorted({str(row[task.label]) for row in rows}) if task.kind == "classification" else [task.label]

    if task.scored_by in ("matthews", "f1") and len(labels) != 2:
        raise ValueError(f"metric of task {task.name!r} must be accuracy where labels are not two, got {labels}")
    scale = _scale(task, train) if task.kind == "regression" else (0.0, 1.0)

    tokenize: Callable[..., Any] = partial(tokenizer, truncation=True, max_length=max_length)
    collate: Callable[..., Any] = DataCollatorWithPadding(tokenizer)
    if head == "embedding":
        tokenize, collate = partial(_apart, tokenize), partial(collate_sentences, tokenizer)

    def encode(rows: list[Row]) -> _Examples:
        texts = ([str(row[name]) for name in task.text] for row in rows)
        labelled = ({"labels": _label(task, row, labels, scale)} for row in rows)
        return _Examples([{**tokenize(*text), **label} for text, label in zip(texts, labelled, strict=True)])

    validation = _by_length(encode(rows[:validation_examples]))
    last = rows[validation_examples:held] if task.evaluation is None else list(_rows(task, task.evaluation, hashes))
    evaluation = _by_length(encode(last[: task.max_evaluation]))
    return TaskData(task, encode(train), validation, evaluation, None, labels, scale, hashes, collate)


def _by_length(examples: _Examples) -> _Examples:
    """Batches of evaluation in this order have little padding."""
    return _Examples(sorted(examples.rows, key=lambda row: len(row["input_ids"])))


def _scale(task: Task, rows: list[Row]) -> tuple[float, float]:
    values = [_number(task, row[task.label]) for row in rows]
    return fmean(values), pstdev(values) or 1.0


def _number(task: Task, value: Any) -> float:
    try:
        return float(value)
    except ValueError as error:
        raise ValueError(f"labels of task {task.name!r} must be numbers, got {value!r}") from error


def _apart(tokenize: Callable[..., Any], *texts: str) -> dict[str, Any]:
    """As :func:`collate_sentences` takes them; in one list, by whose length a sampler may sort."""
    encoded = [tokenize(text)["input_ids"] for text in texts]
    return {"input_ids": list(chain.from_iterable(encoded)), "lengths": [len(ids) for ids in encoded]}


def _label(task: Task, row: Row, labels: list[str], scale: tuple[float, float]) -> int | float:
    value = row[task.label]
    if task.kind == "regression":
        return (_number(task, value) - scale[0]) / scale[1]
    if str(value) not in labels:
        raise ValueError(f"labels of task {task.name!r} must be among those of train, {labels}, got {value!r}")
    return labels.index(str(value))


def _load_text(task: Task, tokenizer: PreTrainedTokenizerBase, length: int, held: int, hashes: list[str]) -> TaskData:
    def blocks(source: str) -> list[dict[str, Any]]:
        text = "\n".join(str(row[task.text[0]]) for row in _rows(task, source, hashes))
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


def _rows(task: Task, source: str, hashes: list[str]) -> Iterator[Row]:
    path = Path(expand(source)).expanduser()
    if path.suffix in (".csv", ".tsv", ".jsonl", ".txt"):
        hashes.append(hashlib.sha256(path.read_bytes()).hexdigest())
        rows = _read(path, task)
    else:
        rows = _from_hub(source)
    needed = task.text if task.kind == "causal_lm" else [*task.text, task.label]
    for number, row in enumerate(rows, 1):
        missing = [name for name in needed if row.get(name) is None]
        if missing:
            raise ValueError(f"{source}, row {number}, must have columns {needed}, got none or nothing in {missing}")
        yield row


def _read(path: Path, task: Task) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig", newline="" if path.suffix == ".csv" else None) as file:
        if path.suffix == ".txt":
            yield {"text": file.read()}
        elif path.suffix == ".jsonl":
            for number, line in enumerate(file, 1):
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise ValueError(f"{path}, line {number}, must be JSON: {error}") from error
        elif path.suffix == ".csv":
            yield from csv.DictReader(file, fieldnames=task.columns)
        else:
            # Quotation marks in a tab-separated file are text.
            yield from csv.DictReader(file, fieldnames=task.columns, delimiter="\t", quoting=csv.QUOTE_NONE)


def _from_hub(source: str) -> Iterator[Row]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError("a data set of the hub needs datasets: pip install 'torchdsc[corpora]'") from error
    # "user/name", or "user/name/config".
    name, _, split = source.partition(":")
    user, *rest = name.split("/")
    yield from load_dataset("/".join([user, *rest[:1]]), *rest[1:], split=split or "train")
