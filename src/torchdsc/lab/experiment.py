"""An experiment's folder: it belongs to one configuration and one corpus, and to no other once it holds them."""

import logging
from pathlib import Path
from typing import Any

import yaml

from .budget import Plan
from .config import ExperimentConfig
from .corpora import Corpus, load_corpus
from .files import draft_beside, naming_writes, new_folder, read_json, write_json, write_text
from .tokenizers import load_tokenizer
from .tokens import FixedWindows, tokenize_corpus
from .training import Data, make_plans

__all__ = ["load_data", "look", "prepare"]

_logger = logging.getLogger(__name__)

CONFIG, CORPUS, TOKENIZER = "config.yaml", "corpus.json", "tokenizer"


def prepare(config: ExperimentConfig, folder: Path) -> tuple[Data, dict[str, Plan]]:
    """Get ready to train: load and tokenise the corpus, solve the budgets, and take the folder.

    The folder is taken last, by writing ``config.yaml``, ``corpus.json`` and the tokenizer, so that a config that does
    not work leaves it free.

    Args:
        config: The experiment.
        folder: Its folder: a new or empty one, or one that holds this very experiment.

    Returns:
        The data, and the plans by method.

    Raises:
        ValueError: If the folder holds another experiment, another text or other files; a split is shorter than a
            window, or the corpus unusable; or a budget is infeasible.
        OSError: If the folder cannot be written, or the corpus or tokenizer not read.
    """
    _check_folder(folder, config)
    with new_folder(folder):
        # Found out now rather than after minutes of tokenising.
        with draft_beside(folder / CONFIG):
            pass
        data, plans = look(config, folder)
        write_text(folder / CONFIG, yaml.safe_dump(config.as_dict(), sort_keys=False))
        write_json(folder / CORPUS, {"name": data.corpus.name, "sha256": data.corpus.sha256})
        with naming_writes(folder / TOKENIZER):
            data.tokenizer.save_pretrained(folder / TOKENIZER)
    return data, plans


def look(config: ExperimentConfig, folder: Path) -> tuple[Data, dict[str, Plan]]:
    """As :func:`prepare`, but without writing anything to the folder."""
    _check_folder(folder, config)
    corpus = _load_corpus(config)
    _check_corpus(folder, corpus)
    data = _tokenize(config, corpus)
    return data, make_plans(config, data.vocab_size)


def load_data(config: ExperimentConfig) -> Data:
    """Load and tokenise the corpus alone.

    Args:
        config: The experiment.

    Returns:
        The data.

    Raises:
        ValueError: If a split is shorter than a window, or the corpus unusable.
        OSError: If the corpus or tokenizer cannot be read.
    """
    return _tokenize(config, _load_corpus(config))


def _load_corpus(config: ExperimentConfig) -> Corpus:
    for doubt in config.doubts():
        _logger.warning("%s", doubt)
    return load_corpus(config.corpus, preparation=config.preparation, max_bytes=config.max_bytes)


def _tokenize(config: ExperimentConfig, corpus: Corpus) -> Data:
    tokenizer = load_tokenizer(config.tokenizer, corpus, vocab_size=config.vocab_size)
    if config.tokenizer == "bpe" and len(tokenizer) < config.vocab_size:
        _logger.warning(
            "vocab_size = %s: the corpus gives a vocabulary of %s", f"{config.vocab_size:,}", f"{len(tokenizer):,}"
        )
    data = Data(corpus, tokenize_corpus(corpus, tokenizer), tokenizer)
    for split in ("train", "valid", "test"):
        _check_length(data, split, config.window)
    return data


def _check_folder(folder: Path, config: ExperimentConfig) -> None:
    if (folder / CONFIG).is_file():
        _check_config(folder / CONFIG, config)
    elif folder.exists() and (not folder.is_dir() or any(not _is_draft(path) for path in folder.iterdir())):
        raise ValueError(f"output must be a new or empty folder, or an experiment's, got {folder} with other files")


def _is_draft(path: Path) -> bool:
    """Whether a kill left this file on the way to ``config.yaml``."""
    return path.name.startswith(f".{CONFIG}.")


def _check_config(path: Path, config: ExperimentConfig) -> None:
    try:
        kept = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(
            f"{path} must be the YAML that was written there, got {' '.join(str(error).split())}"
        ) from error
    # Through YAML as well, which makes lists of tuples.
    wanted: dict[str, Any] = yaml.safe_load(yaml.safe_dump(config.as_dict()))
    if not isinstance(kept, dict):
        raise ValueError(f"{path} must hold an experiment's settings, got {type(kept).__name__}")
    different = [key for key in {**wanted, **kept} if kept.get(key) != wanted.get(key)]
    if different:
        key = different[0]
        others = f", and other {', '.join(different[1:])}" if different[1:] else ""
        raise ValueError(
            f"output {path.parent} holds an experiment with {key} {kept.get(key)!r} instead of {wanted.get(key)!r}"
            f"{others}: choose another folder, or delete this one"
        )


def _check_corpus(folder: Path, corpus: Corpus) -> None:
    file = folder / CORPUS
    if file.is_file() and read_json(file).get("sha256") != corpus.sha256:
        raise ValueError(
            f"corpus {corpus.name!r} must be the text that the runs in {folder} are trained on, got another: "
            "choose another folder for it"
        )


def _check_length(data: Data, split: str, window: int) -> None:
    try:
        FixedWindows(getattr(data.tokens, split), window)
    except ValueError as error:
        raise ValueError(f"corpus {data.corpus.name!r} is too short in its {split} split: {error}") from error
