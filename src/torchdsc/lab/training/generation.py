"""Text from a trained model."""

from math import inf
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from torchdsc.lab.saved import load_saved
from torchdsc.nn.modes import evaluating

from .environment import quiet_transformers

__all__ = ["continue_text", "generate", "generates"]


def generate(
    folder: Path,
    prompt: str,
    *,
    base: str | None = None,
    max_new_tokens: int = 100,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 42,
) -> str:
    """Continue a prompt with a saved DSCGPT, converted model or adapter.

    Args:
        folder: A run's folder, or the model's or adapter's, which holds the tokenizer too.
        prompt: Text to go on from.
        base: The base model of an adapter; by default the one that it names.
        max_new_tokens: Tokens to add, >= 1.
        temperature: Of sampling; 0 takes the likeliest token.
        top_p: Nucleus to sample from.
        seed: Of sampling.

    Returns:
        Prompt and continuation.

    Raises:
        FileNotFoundError: If there is no model or tokenizer.
        ValueError: If an argument is out of its range, the folder does not hold the model's weights, the model does not
            generate text, or prompt and new tokens do not fit the positions.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be >= 1, got {max_new_tokens}")
    if not 0 <= temperature < inf:
        raise ValueError(f"temperature must be >= 0, got {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")
    saved = load_saved(folder, base=base)
    tokenizer, model = saved.tokenizer or _earlier_tokenizer(saved.folder), saved.model
    if not generates(model):
        raise ValueError(f"the model in {saved.folder} must generate text, and is a {type(model).__name__}")
    ids = torch.tensor([tokenizer(prompt)["input_ids"] or [tokenizer.eos_token_id]])
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and ids.shape[1] + max_new_tokens > limit:
        raise ValueError(
            f"prompt and max_new_tokens must fit the model's {limit} positions, "
            f"got {ids.shape[1]} tokens and {max_new_tokens}"
        )
    begun, added = continue_text(
        model, tokenizer, ids, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed
    )
    return begun + added


def generates(model: Any) -> bool:
    """Whether a model, or the base of an adapter, generates text."""
    return bool(getattr(model, "can_generate", lambda: False)())


def _earlier_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """Models of earlier versions have the tokenizer of their experiment, in a folder beside or above them."""
    places = (folder / "tokenizer" for folder in (path, *path.resolve().parents[:2]))
    place = next((place for place in places if (place / "tokenizer_config.json").is_file()), None)
    if place is None:
        raise FileNotFoundError(f"no tokenizer in {path}, nor a folder tokenizer beside or above it")
    with quiet_transformers():
        found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(place)
    return found


def continue_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: torch.Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 42,
) -> tuple[str, str]:
    """The text of tokens, and what the model adds to it.

    Args:
        model: A causal language model, which is in evaluation meanwhile.
        tokenizer: Its own.
        ids: Tokens of shape (1, length), int64.
        max_new_tokens: Tokens to add.
        temperature: Of sampling; 0 takes the likeliest token.
        top_p: Nucleus to sample from.
        seed: Of sampling.
    """
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p}
    # The caller's random numbers are none of this function's business.
    with torch.random.fork_rng(devices=[]), quiet_transformers(), evaluating(model):
        torch.manual_seed(seed)
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
            **sampling,
        )
    begun: str = tokenizer.decode(output[0, : ids.shape[1]], skip_special_tokens=True)
    whole: str = tokenizer.decode(output[0], skip_special_tokens=True)
    return begun, whole.removeprefix(begun)
