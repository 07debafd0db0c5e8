"""What a layer inside a model needs of it: sizes of the module beside it, the padding, parts of other layers."""

import inspect
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


def refer(layer: nn.Module, name: str, part: nn.Module) -> None:
    """Give ``layer`` a part that another layer owns: it is neither trained, moved nor saved twice.

    The reference is to the module, so that it sees parameters that are loaded or cast; copies of a model refer to
    their own.
    """
    del layer._modules[name]
    layer.__dict__[name] = part


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

    Attributes:
        token_mask: The mask of the tokens that the module's model is called with.
        memory: In a decoder beside an encoder, whose cross-attention reads other tokens: what tells the encoder's
            states, by ``id``, and their mask.
    """

    token_mask: Tensor | None = None
    memory: tuple[int, Tensor | None] | None = None

    def mask_of(self, x: Tensor) -> Tensor | None:
        """The mask of tokens x of shape (..., d), None where it is that of other tokens.

        Models that flatten leading axes on the way keep the order of their tokens.
        """
        mask = self.token_mask
        if self.memory is not None and not torch.compiler.is_compiling() and id(x) == self.memory[0]:
            mask = self.memory[1]
        if mask is None or mask.shape == x.shape[:-1]:
            return mask
        # Into tokens, or as models of several texts an example do, into sequences of the same length.
        shape = x.shape[:-1]
        keeps_length = len(shape) == 1 or shape[-1] == mask.shape[-1]
        is_flat = len(shape) < mask.dim() and keeps_length and mask.numel() == shape.numel()
        return mask.reshape(shape) if is_flat else None


def pass_attention_mask(model: nn.Module) -> None:
    """Hand the ``attention_mask`` that ``model`` is called with to every :class:`TokenMasked` module in it.

    The decoder of an encoder-decoder is called with its own.
    """
    for caller in _callers(model):
        if _HANDLE not in caller.__dict__:
            accepted = tuple(inspect.signature(caller.forward).parameters)
            handle = caller.register_forward_pre_hook(partial(_pass, accepted), with_kwargs=True)
            caller.__dict__[_HANDLE] = handle


def leave_attention_mask(model: nn.Module) -> None:
    """Undo :func:`pass_attention_mask`, unless there are still modules that want the mask."""
    if not any(isinstance(module, TokenMasked) for module in model.modules()):
        for caller in _callers(model):
            if _HANDLE in caller.__dict__:
                caller.__dict__.pop(_HANDLE).remove()
                caller.__dict__.pop(_LABELLED, None)


_HANDLE = "_torchdsc_mask_handle"
_LABELLED = "_torchdsc_labelled"


def _callers(model: nn.Module) -> list[nn.Module]:
    """The model, and its decoder where that has tokens of its own."""
    is_encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    decoder = model.get_decoder() if is_encoder_decoder and hasattr(model, "get_decoder") else None  # type: ignore[operator]
    return [model] if decoder is None or decoder is model else [model, decoder]


def _pass(accepted: tuple[str, ...], model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    given = {**dict(zip(accepted, args, strict=False)), **kwargs}
    mask, states = given.get("attention_mask"), given.get("encoder_hidden_states")
    labels = _tensor(given.get("labels"))
    for caller in _callers(model)[1:]:
        # A decoder that makes its tokens of labels is given no mask: what has no label is padding.
        caller.__dict__[_LABELLED] = None if labels is None or labels.dim() != 2 else labels != -100
    if mask is None:
        mask = model.__dict__.get(_LABELLED)
    memory = None if states is None else (id(states), _tensor(given.get("encoder_attention_mask")))
    for module in model.modules():
        if isinstance(module, TokenMasked):
            module.token_mask, module.memory = _tensor(mask), memory


def _tensor(value: Any) -> Tensor | None:
    return value if isinstance(value, Tensor) else None


def leave_fused_encoder(model: nn.Module) -> None:
    """Torch's encoder reads the weights of its linear layers past their modules in evaluation: not past these."""
    for module in model.modules():
        if any(isinstance(inner, TokenMasked) for inner in module.modules()):
            if isinstance(module, nn.TransformerEncoderLayer):
                module.activation_relu_or_gelu = 0
            elif isinstance(module, nn.TransformerEncoder):
                module.use_nested_tensor = False
