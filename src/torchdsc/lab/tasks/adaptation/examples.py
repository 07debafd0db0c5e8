"""Data of a run: rows of files or data sets, split and encoded."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, cycle, islice
from statistics import fmean, pstdev
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase
from transformers.data.data_collator import DataCollatorWithPadding, default_data_collator

from torchdsc.lab.data.rows import Example, read_source

from .retained import OldDomains, make_questions
from .sentences import collate_sentences
from .settings import Settings

__all__ = ["Data", "load_data"]

# Splitting rows does not depend on a run's seed.
_SPLIT_SEED = 1234

Encoded = list[dict[str, Any]]
_Read = Callable[[str], list[Example]]


@dataclass(frozen=True)
class Data:
    """Encoded examples.

    Attributes:
        train: To train on.
        validation: Held out of train: for trials, and the best checkpoint.
        evaluation: For the final score, looked at once; as many held out of train where the settings name none.
        retain: Texts of old domains; without any, a run leaves them out.
        labels: Names of the classes, by id; one for regression; none for causal LMs.
        scale: Mean and standard deviation of train's labels, which regression standardises them by.
        hashes: Of the sources, by what the settings call them.
        collate: What makes a batch of examples.
    """

    train: Encoded
    validation: Encoded
    evaluation: Encoded
    retain: OldDomains | None
    labels: list[str]
    scale: tuple[float, float]
    hashes: dict[str, str]
    collate: Callable[..., dict[str, Any]]


def load_data(settings: Settings, tokenizer: PreTrainedTokenizerBase) -> Data:
    """Read, split and encode a run's data, by the tokenizer of the base model.

    Raises:
        ValueError: If a source is unusable, train is too small or its labels are all alike, or a label is none of its.
        OSError: If a file cannot be read.
    """
    hashes: dict[str, str] = {}

    def read(source: str) -> list[Example]:
        names: dict[str, Any] = {"text": settings.text, "label": settings.label, "columns": settings.columns}
        found, hashes[source] = read_source(source, kind=settings.kind, **names)
        return found

    load = _load_blocks if settings.kind == "causal_lm" else _load_rows
    return load(settings, tokenizer, read, hashes)


def _split(settings: Settings, train: Sequence[Any], kind: str) -> tuple[Any, Any, Any]:
    """Examples to train on, to validate, and for the final score, the last two from the front."""
    count = settings.validation_examples
    # A score on the examples that chose a trial or a checkpoint would flatter: without a file of their own others are
    # held out for it.
    held = count * (1 if settings.evaluation is not None else 2)
    if len(train) <= held:
        raise ValueError(
            f"train {settings.train} must hold more {kind} than the {held} that are held out for validation_examples = "
            f"{count}, got {len(train)}"
        )
    return train[held:][: settings.max_train], train[:count], train[count:held]


def _load_rows(settings: Settings, tokenizer: PreTrainedTokenizerBase, read: _Read, hashes: dict[str, str]) -> Data:
    rows = read(settings.train)
    random.Random(_SPLIT_SEED).shuffle(rows)
    train, validation, evaluation = _split(settings, rows, "examples")
    labels, scale = _labels(settings, rows), (0.0, 1.0)
    if settings.kind == "regression":
        values = [float(row.label or 0.0) for row in train]
        scale = fmean(values), pstdev(values) or 1.0
    if settings.evaluation is not None:
        evaluation = read(settings.evaluation)

    tokenize: Callable[..., Any] = partial(tokenizer, truncation=True, max_length=settings.max_length)
    collate: Callable[..., Any] = DataCollatorWithPadding(tokenizer)
    if settings.head == "embedding":
        tokenize, collate = partial(_apart, tokenize), partial(collate_sentences, tokenizer)

    def encode(rows: Sequence[Example]) -> Encoded:
        return [{**tokenize(*row.texts), "labels": _label(settings, row, labels, scale)} for row in rows]

    def by_length(rows: Sequence[Example]) -> Encoded:
        """Batches of evaluation in this order have little padding."""
        return sorted(encode(rows), key=lambda row: len(row["input_ids"]))

    parts = encode(train), by_length(validation), by_length(evaluation[: settings.max_evaluation])
    return Data(*parts, None, labels, scale, hashes, collate)


def _labels(settings: Settings, rows: Sequence[Example]) -> list[str]:
    labels = sorted({str(row.label) for row in rows})
    if len(labels) < 2:
        raise ValueError(f"train {settings.train} must have two labels or more, got {labels[0]!r} alone")
    if settings.scored_by in ("matthews", "f1") and len(labels) != 2:
        raise ValueError(f"metric must be accuracy where labels of train are not two, got {labels}")
    return [settings.label] if settings.kind == "regression" else labels


def _apart(tokenize: Callable[..., Any], *texts: str) -> dict[str, Any]:
    """As :func:`collate_sentences` takes them; in one list, by whose length a sampler may sort."""
    encoded = [tokenize(text)["input_ids"] for text in texts]
    return {"input_ids": list(chain.from_iterable(encoded)), "lengths": [len(ids) for ids in encoded]}


def _label(settings: Settings, row: Example, labels: list[str], scale: tuple[float, float]) -> int | float:
    if settings.kind == "regression":
        return (float(row.label or 0.0) - scale[0]) / scale[1]
    if row.label not in labels:
        place = f"{row.place}, column {settings.label!r}"
        raise ValueError(f"{place}, must be a label of train, {labels}, got {row.label!r}")
    return labels.index(str(row.label))


def _load_blocks(settings: Settings, tokenizer: PreTrainedTokenizerBase, read: _Read, hashes: dict[str, str]) -> Data:
    length = settings.max_length

    def blocks(source: str) -> Encoded:
        text = "\n".join(row.texts[0] for row in read(source))
        ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
        cut = ids[: len(ids) // length * length].view(-1, length)
        if not len(cut):
            raise ValueError(f"{source} must hold at least {length} tokens, got {len(ids)}")
        return [{"input_ids": block, "labels": block, "attention_mask": torch.ones_like(block)} for block in cut]

    found = blocks(settings.train)
    # The end is held out, not a sample: blocks beside each other share their sentences.
    end = -settings.validation_examples * (1 if settings.evaluation is not None else 2)
    train, validation, evaluation = _split(settings, found[end:] + found[:end], f"blocks of {length} tokens")
    if settings.evaluation is not None:
        evaluation = blocks(settings.evaluation)
    parts = train, validation, evaluation[: settings.max_evaluation]
    retain = _old_domains(settings, {source: blocks(source) for source in settings.old_texts})
    if retain is not None and settings.replay:
        # Blocks of each text in turn, until they have their share.
        count = max(1, round(settings.replay / (1 - settings.replay) * len(train)))
        turns = zip(*map(cycle, retain.rest.values()), strict=True)
        parts = [*train, *islice(chain.from_iterable(turns), count)], *parts[1:]
    return Data(*parts, retain, [], (0.0, 1.0), hashes, default_data_collator)


def _old_domains(settings: Settings, texts: dict[str, Encoded]) -> OldDomains | None:
    if not texts:
        return None
    evaluated = {source: blocks[: settings.max_evaluation] for source, blocks in texts.items()}
    questions = {}
    if settings.choices is not None:
        questions = {source: make_questions(blocks, settings.choices) for source, blocks in evaluated.items()}
    rest = {}
    if settings.replay or settings.quiet:
        rest = {source: blocks[len(evaluated[source]) :] for source, blocks in texts.items()}
        short = next((source for source, blocks in rest.items() if not blocks), None)
        if short is not None:
            raise ValueError(f"max_evaluation must leave blocks of {short} to train on, got {settings.max_evaluation}")
    return OldDomains(evaluated, questions, rest)
