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

from .prompts import Answers, collate_prompts, encode_prompt
from .retained import OldDomains, make_questions
from .sentences import collate_sentences
from .settings import Settings

__all__ = ["Data", "load_data"]

# Splitting rows does not depend on a run's seed.
_SPLIT_SEED = 1234

Encoded = list[dict[str, Any]]


@dataclass(frozen=True)
class Data:
    """Encoded examples.

    Attributes:
        train: To train on.
        validation: Held out of train: for trials, and the best checkpoint.
        evaluation: For the final score, looked at once; as many held out of train where the settings name none.
        retain: Texts of old domains; without any, a run leaves them out.
        labels: Names of the classes, by id; one for regression; none for causal LMs without prompts.
        scale: Mean and standard deviation of train's labels, which regression standardises them by.
        hashes: Of the sources, by what the settings call them.
        collate: What makes a batch of examples.
        answers: Of prompts; None for other kinds.
    """

    train: Encoded
    validation: Encoded
    evaluation: Encoded
    retain: OldDomains | None
    labels: list[str]
    scale: tuple[float, float]
    hashes: dict[str, str]
    collate: Callable[..., dict[str, Any]]
    answers: Answers | None = None


def load_data(settings: Settings, tokenizer: PreTrainedTokenizerBase) -> Data:
    """Read, split and encode a run's data, by the tokenizer of the base model.

    Raises:
        ValueError: If a source is unusable, train is too small or its labels are all alike, or a label is none of its.
        OSError: If a file cannot be read.
    """
    source = _Source(settings, {})
    if settings.kind == "causal_lm":
        return _load_blocks(settings, tokenizer, source)
    if settings.kind == "prompted":
        return _load_prompts(settings, tokenizer, source)
    return _load_rows(settings, tokenizer, source)


@dataclass(frozen=True)
class _Source:
    """Reads sources, and keeps the hash of each."""

    settings: Settings
    hashes: dict[str, str]

    def rows(self, source: str) -> list[Example]:
        chosen = self.settings
        kind = "classification" if chosen.kind == "prompted" else chosen.kind
        names: dict[str, Any] = {"text": chosen.text, "label": chosen.label, "columns": chosen.columns}
        found, self.hashes[source] = read_source(source, kind=kind, **names)
        return found

    def blocks(self, source: str, tokenizer: PreTrainedTokenizerBase) -> Encoded:
        """Blocks of tokens of a text."""
        column, length = self.settings.text if self.settings.kind == "causal_lm" else ["text"], self.settings.max_length
        rows, self.hashes[source] = read_source(source, kind="causal_lm", text=column, label=self.settings.label)
        ids = torch.tensor(tokenizer("\n".join(row.texts[0] for row in rows), verbose=False)["input_ids"])
        cut = ids[: len(ids) // length * length].view(-1, length)
        if not len(cut):
            raise ValueError(f"{source} must hold at least {length} tokens, got {len(ids)}")
        return [{"input_ids": block, "labels": block, "attention_mask": torch.ones_like(block)} for block in cut]


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


def _load_rows(settings: Settings, tokenizer: PreTrainedTokenizerBase, source: _Source) -> Data:
    (train, validation, evaluation), labels = _split_rows(settings, source)
    scale = (0.0, 1.0)
    if settings.kind == "regression":
        values = [float(row.label or 0.0) for row in train]
        scale = fmean(values), pstdev(values) or 1.0

    tokenize: Callable[..., Any] = partial(tokenizer, truncation=True, max_length=settings.max_length)
    collate: Callable[..., Any] = DataCollatorWithPadding(tokenizer)
    if settings.head == "embedding":
        tokenize, collate = partial(_apart, tokenize), partial(collate_sentences, tokenizer)

    def encode(rows: Sequence[Example]) -> Encoded:
        return [{**tokenize(*row.texts), "labels": _label(settings, row, labels, scale)} for row in rows]

    def by_length(rows: Sequence[Example]) -> Encoded:
        """Batches of evaluation in this order have little padding."""
        return sorted(encode(rows), key=lambda row: len(row["input_ids"]))

    parts = encode(train), by_length(validation), by_length(evaluation)
    return Data(*parts, None, labels, scale, source.hashes, collate)


def _load_prompts(settings: Settings, tokenizer: PreTrainedTokenizerBase, source: _Source) -> Data:
    parts, labels = _split_rows(settings, source)
    answers = Answers.of(settings.answers or {}, labels, tokenizer)

    def encode(rows: Sequence[Example]) -> Encoded:
        found = []
        for row in rows:
            prompt = str(settings.prompt).format_map(dict(zip(settings.text, row.texts, strict=True)))
            answer = answers.tokens[int(_label(settings, row, labels, (0.0, 1.0)))]
            found.append(encode_prompt(tokenizer, prompt, answer, settings.max_length))
        return found

    train, validation, evaluation = map(encode, parts)
    retain, replayed = _old_domains(settings, tokenizer, source, len(train))
    collate = partial(collate_prompts, tokenizer)
    return Data(train + replayed, validation, evaluation, retain, labels, (0.0, 1.0), source.hashes, collate, answers)


def _split_rows(settings: Settings, source: _Source) -> tuple[list[list[Example]], list[str]]:
    """Rows to train on, to validate and for the final score, and the labels."""
    rows = source.rows(settings.train)
    random.Random(_SPLIT_SEED).shuffle(rows)
    train, validation, evaluation = _split(settings, rows, "examples")
    if settings.evaluation is not None:
        evaluation = source.rows(settings.evaluation)
    return [train, validation, evaluation[: settings.max_evaluation]], _labels(settings, rows)


def _labels(settings: Settings, rows: Sequence[Example]) -> list[str]:
    labels = sorted({str(row.label) for row in rows})
    if len(labels) < 2:
        raise ValueError(f"train {settings.train} must have two labels or more, got {labels[0]!r} alone")
    if settings.kind != "regression" and 2 * len(labels) > len(rows):
        raise ValueError(
            f"label must be a column with classes of train {settings.train}, two examples or more of each on average, "
            f"got {settings.label!r} with {len(labels)} for {len(rows)} examples, such as {labels[0]!r}"
        )
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


def _load_blocks(settings: Settings, tokenizer: PreTrainedTokenizerBase, source: _Source) -> Data:
    found = source.blocks(settings.train, tokenizer)
    # The end is held out, not a sample: blocks beside each other share their sentences.
    end = -settings.validation_examples * (1 if settings.evaluation is not None else 2)
    kind = f"blocks of {settings.max_length} tokens"
    train, validation, evaluation = _split(settings, found[end:] + found[:end], kind)
    if settings.evaluation is not None:
        evaluation = source.blocks(settings.evaluation, tokenizer)
    retain, replayed = _old_domains(settings, tokenizer, source, len(train))
    parts = train + replayed, validation, evaluation[: settings.max_evaluation]
    return Data(*parts, retain, [], (0.0, 1.0), source.hashes, default_data_collator)


def _old_domains(
    settings: Settings, tokenizer: PreTrainedTokenizerBase, source: _Source, num_train: int
) -> tuple[OldDomains | None, Encoded]:
    """The texts of old domains, and blocks of them to train on beside ``num_train`` examples."""
    texts = {name: source.blocks(name, tokenizer) for name in settings.old_texts}
    if not texts:
        return None, []
    most = settings.max_retained or settings.max_evaluation
    evaluated = {name: blocks[:most] for name, blocks in texts.items()}
    questions, rest = {}, {}
    if settings.choices is not None:
        questions = {name: make_questions(blocks, settings.choices) for name, blocks in evaluated.items()}
    if settings.replay or settings.quiet:
        rest = {name: blocks[len(evaluated[name]) :] for name, blocks in texts.items()}
        short = next((name for name, blocks in rest.items() if not blocks), None)
        if short is not None:
            limit = "max_evaluation" if settings.max_retained is None else "max_retained"
            raise ValueError(f"{limit} must leave blocks of {short} to train on, got {most}")
    replayed: Encoded = []
    if settings.replay:
        # Blocks of each text in turn, until they have their share.
        count = max(1, round(settings.replay / (1 - settings.replay) * num_train))
        turns = zip(*map(cycle, rest.values()), strict=True)
        replayed = [*islice(chain.from_iterable(turns), count)]
    return OldDomains(evaluated, questions, rest), replayed
