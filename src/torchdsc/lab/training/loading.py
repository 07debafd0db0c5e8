"""Saved models, whose folder must hold the very weights that the model has: none is drawn at random in silence."""

from os import PathLike
from typing import Any

from safetensors import SafetensorError
from transformers import PreTrainedModel

__all__ = ["load_model"]

_SHOWN = 3
# BERT's and its like: absent in checkpoints of masked language models, and no part of what a task's head needs.
_POOLER = "pooler"


def load_model(
    kind: Any, folder: str | PathLike[str], *, has_new_head: bool = False, **options: Any
) -> PreTrainedModel:
    """``kind.from_pretrained``, or an error where weights are missing, left over, or of other sizes.

    Args:
        kind: A model class of transformers, or one of its Auto classes.
        folder: Folder or hub id. Weights that are tied to others need not be there.
        has_new_head: Whether the head may be new, and that of another task left aside: only weights of the base model
            are checked, its pooler apart.
        **options: See ``from_pretrained``.

    Returns:
        The model.

    Raises:
        ValueError: If the folder does not hold the model's weights, or a file in it is damaged.
        OSError: If there is no such model, or it has no weights.
    """
    try:
        model, info = kind.from_pretrained(folder, output_loading_info=True, **options)
    except (OSError, ValueError, ImportError):
        raise
    except SafetensorError as error:
        raise ValueError(f"the weights in {folder} are damaged: {error}") from error
    # transformers raises anything from RuntimeError to KeyError for what it cannot make a model of.
    except Exception as error:
        raise ValueError(f"{folder} could not be loaded: {type(error).__name__}: {error}") from error
    # Of mismatched weights it gives the two shapes too.
    mismatched = [key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]]
    found = {"lack": info["missing_keys"], "have sizes that differ in": mismatched}
    found["have, beside the model's,"] = info["unexpected_keys"]
    for verb, keys in found.items():
        wrong = sorted(key for key in keys if not has_new_head or _is_of_base(model, key))
        if wrong:
            more = f" and {len(wrong) - _SHOWN} more" if wrong[_SHOWN:] else ""
            names = ", ".join(wrong[:_SHOWN]) + more
            raise ValueError(
                f"the weights in {folder} must be those that its config.json asks for: they {verb} {names}"
            )
    loaded: PreTrainedModel = model
    return loaded


def _is_of_base(model: PreTrainedModel, key: str) -> bool:
    first = key.removeprefix(f"{model.base_model_prefix}.").split(".")[0]
    return first != _POOLER and hasattr(model.base_model, first)
