"""Data sets of the Hugging Face hub, and the packages that these and parquet files need."""

from importlib import import_module
from typing import Any

__all__ = ["library", "load_hub"]


def load_hub(source: str) -> Any:
    """A part of a data set, through ``datasets``.

    Args:
        source: "user/name", "user/name:split" or "user/name/config:split"; the split is "train" by default.

    Raises:
        ImportError: If ``datasets`` is not installed.
        OSError: If it cannot be loaded.
    """
    name, _, split = source.partition(":")
    user, *rest = name.split("/")
    load = library("datasets").load_dataset
    try:
        return load("/".join([user, *rest[:1]]), *rest[1:], split=split or "train")
    # The hub's clients raise errors of several unrelated families; all mean that the data set is not to be had.
    except Exception as error:
        raise OSError(
            f"{source} must be files, or a data set of the hub that can be loaded, got {type(error).__name__}: {error}"
        ) from error


def library(name: str) -> Any:
    """A module that is no part of the lab's own requirements.

    Raises:
        ImportError: If it is not installed; says how to.
    """
    try:
        return import_module(name)
    except ImportError as error:
        raise ImportError(
            f"data sets of the hub and parquet files need {name}: pip install 'torchdsc[corpora]', or give other files"
        ) from error
