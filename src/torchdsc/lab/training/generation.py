"""Text from a trained model."""

from math import inf
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from torchdsc.models import DSCGPTForCausalLM

from .environment import quiet_transformers
from .loading import load_model

__all__ = ["continue_text", "generate"]


def generate(
    folder: Path,
    prompt: str,
    *,
    max_new_tokens: int = 100,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 42,
) -> str:
    """Continue a prompt with the model of a run.

    Args:
        folder: A run's folder, or the model's inside it, which holds the tokenizer too.
        prompt: Text to go on from.
        max_new_tokens: Tokens to add, >= 1.
        temperature: Of sampling; 0 takes the likeliest token.
        top_p: Nucleus to sample from.
        seed: Of sampling.

    Returns:
        Prompt and continuation.

    Raises:
        FileNotFoundError: If there is no model or tokenizer.
        ValueError: If an argument is out of its range, the folder does not hold the model's weights, or prompt and new
            tokens do not fit the positions.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be >= 1, got {max_new_tokens}")
    if not 0 <= temperature < inf:
        raise ValueError(f"temperature must be >= 0, got {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")
    path = next((p for p in (folder / "model", folder) if (p / "config.json").is_file()), None)
    if path is None:
        runs = sorted(p.parents[1].name for p in folder.glob("*/model/config.json"))
        hint = f"choose one of its runs: {', '.join(runs)}" if runs else "a run's folder holds model/config.json"
        raise FileNotFoundError(f"no model in {folder}: {hint}")
    # Models of earlier versions have the tokenizer of their experiment, in a folder beside or above them.
    places = (path, *(folder / "tokenizer" for folder in (path, *path.resolve().parents[:2])))
    tokenizer_path = next((place for place in places if (place / "tokenizer_config.json").is_file()), None)
    if tokenizer_path is None:
        raise FileNotFoundError(f"no tokenizer in {path}, nor a folder tokenizer beside or above it")
    with quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
        model: Any = load_model(DSCGPTForCausalLM, path).eval()
    ids = torch.tensor([tokenizer(prompt)["input_ids"] or [tokenizer.eos_token_id]])
    limit = model.config.max_position_embeddings
    if ids.shape[1] + max_new_tokens > limit:
        raise ValueError(
            f"prompt and max_new_tokens must fit the model's {limit} positions, "
            f"got {ids.shape[1]} tokens and {max_new_tokens}"
        )
    begun, added = continue_text(
        model, tokenizer, ids, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed
    )
    return begun + added


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
    was_training = model.training
    # The caller's random numbers are none of this function's business.
    with torch.random.fork_rng(devices=[]), quiet_transformers():
        torch.manual_seed(seed)
        output = model.eval().generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
            **sampling,
        )
    model.train(was_training)
    begun: str = tokenizer.decode(output[0, : ids.shape[1]], skip_special_tokens=True)
    whole: str = tokenizer.decode(output[0], skip_special_tokens=True)
    return begun, whole.removeprefix(begun)
