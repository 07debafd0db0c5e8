"""What a layer inside somebody else's model needs of it: the sizes of the module beside it, and the padding."""

import inspect
from functools import partial
from typing import Any

from torch import Tensor, nn


def feature_sizes(module: nn.Module) -> tuple[int | None, int | None]:
    """d_in of the first and d_out of the last linear layer in ``module`` (itself included); None without one."""
    sizes = [size for size in map(_linear_sizes, module.modules()) if size is not None]
    return (sizes[0][0], sizes[-1][1]) if sizes else (None, None)


def _linear_sizes(module: nn.Module) -> tuple[int, int] | None:
    # Quantised linear layers of several libraries are no nn.Linear.
    first, last = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if isinstance(first, int) and isinstance(last, int):
        return first, last
    # Hugging Face's Conv1D, GPT-2's linear layer, stores its weight as (in, out).
    if type(module).__name__ == "Conv1D" and isinstance(getattr(module, "weight", None), Tensor):
        return int(module.weight.shape[0]), int(module.weight.shape[1])  # type: ignore[index]
    return None


class TokenMasked:
    """A module that is told the attention mask of its model: padding does not count in regularisers.

    The mask stays until the next call: a checkpointed block that is recomputed in the backward pass needs it again.
    """

    token_mask: Tensor | None = None

    def mask_of(self, x: Tensor) -> Tensor | None:
        """The mask of tokens x of shape (..., d), None where it is that of other tokens.

        Models that flatten batch and sequence on the way keep the order of their tokens.
        """
        mask = self.token_mask
        if mask is None or mask.shape == x.shape[:-1]:
            return mask
        is_flat = mask.dim() == 2 and x.dim() == 2 and mask.numel() == x.shape[0]
        return mask.reshape(-1) if is_flat else None


def pass_attention_mask(model: nn.Module) -> None:
    """Hand the ``attention_mask`` that ``model`` is called with to every :class:`TokenMasked` module in it."""
    if any(isinstance(hook, partial) and hook.func is _pass for hook in model._forward_pre_hooks.values()):
        return
    accepted = list(inspect.signature(model.forward).parameters)
    position = accepted.index("attention_mask") if "attention_mask" in accepted else None
    model.register_forward_pre_hook(partial(_pass, position), with_kwargs=True)


def _pass(position: int | None, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    mask = kwargs.get("attention_mask")
    if position is not None and position < len(args):
        mask = args[position]
    if not isinstance(mask, Tensor):
        mask = None
    for module in model.modules():
        if isinstance(module, TokenMasked):
            module.token_mask = mask
