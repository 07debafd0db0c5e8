"""Layers inside models of other libraries: sizes of the modules they join, the attention mask, tied parameters."""

import copy
import inspect
import warnings
from collections.abc import Iterable
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from torchdsc.arguments import named_arguments


def tied_keys(layers: Iterable[tuple[str, nn.Module]]) -> dict[str, str]:
    """Names of parameters and buffers that ``layers`` share, each mapped to its name in the first layer that has it.

    Transformers asks a model for this mapping; without it, it refuses to save tensors that share memory.

    Args:
        layers: Modules with their names.
    """
    first: dict[int, str] = {}
    tied: dict[str, str] = {}
    for owner, module in layers:
        for name, parameter in chain(module.named_parameters(owner), module.named_buffers(owner)):
            known = first.setdefault(id(parameter), name)
            if known != name:
                tied[name] = known
    return tied


def feature_sizes(module: nn.Module, name: str, width: int | None = None) -> tuple[int | None, int | None]:
    """d_in and d_out of a module that maps tokens (..., d_in) to (..., d_out).

    A linear layer has them as attributes. Any other module is run on the meta device. Where that fails (it takes more
    arguments, or reads values), it is assumed to be a block of the residual stream, which maps a width to itself, or
    the block's last part.

    Args:
        module: Linear layer, quantised or not, Conv1D, or a module that contains some.
        name: Its name, for errors.
        width: Width of the residual stream, if known.

    Returns:
        d_in and d_out, or None and None for a module without linear layers.

    Raises:
        ValueError: If the module's output has other leading dimensions than its input, or its sizes cannot be told.
    """
    own = _linear_sizes(module)
    if own is not None:
        return own
    sizes = [size for size in map(_linear_sizes, module.modules()) if size is not None]
    if not sizes:
        return None, None
    inputs, outputs = ([*dict.fromkeys(values)] for values in zip(*sizes, strict=True))
    mapped = _run(module, name, inputs)
    if len(mapped) == 1:
        return next(iter(mapped.items()))
    norms = {part.weight.numel() for part in module.modules() if _is_norm(part)}  # type: ignore[operator]
    blocks = [size for size in inputs if size in outputs]
    for widths in ({width}, norms, set(blocks)):
        found = [size for size in blocks if size in widths]
        if len(found) == 1:
            return found[0], found[0]
    # The second half of a block: its output is added to the residual stream.
    if len(inputs) == len(outputs) == 1 and outputs[0] in {width, *norms}:
        return inputs[0], outputs[0]
    raise ValueError(
        f"in_features and out_features must be given for {name!r}, a {type(module).__name__}, whose sizes cannot be "
        f"told: it holds linear layers from {inputs} to {outputs} features"
    )


def stream_width(model: nn.Module, name: str) -> int | None:
    """``hidden_size`` in the config of the module of that name, or of the innermost module around it that has one."""
    module, width = model, None
    for part in ("", *name.split(".")):
        module = module.get_submodule(part)
        own = getattr(getattr(module, "config", None), "hidden_size", None)
        width = own if isinstance(own, int) else width
    return width


def _run(module: nn.Module, name: str, sizes: list[int]) -> dict[int, int]:
    """The input sizes that a copy of ``module`` on the meta device accepts, each mapped to its output size."""
    if any(hasattr(part, "_hf_hook") for part in module.modules()):
        # Accelerate's hooks would load the weights.
        return {}
    mapped: dict[int, int] = {}
    try:
        tensors = {id(tensor): _without_data(tensor) for tensor in (*module.parameters(), *module.buffers())}
        # A layer of this package may refer to the model's embedding: not copied either.
        left = {id(found): None for part in module.modules() if (found := vars(part).get("broadcast")) is not None}
        copied = copy.deepcopy(module, {**tensors, **left}).eval()
        dtype = next((t.dtype for t in tensors.values() if t.is_floating_point()), torch.get_default_dtype())
    except Exception:  # Foreign modules may raise anything when copied.
        return {}
    for size in sizes:
        x = torch.empty(2, 3, size, device="meta", dtype=dtype)
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                output = copied(x, *[None] * _num_required(copied))
        except Exception:  # The size does not fit, or the module cannot run on meta tensors.
            continue
        output = output[0] if isinstance(output, tuple) and output else output
        if not isinstance(output, Tensor) or output.shape[:-1] != x.shape[:-1]:
            shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(
                f"modules must map tokens (..., d_in) to (..., d_out), got {name!r}, a {type(module).__name__}, which "
                f"maps {tuple(x.shape)} to {shape}"
            )
        mapped[size] = output.shape[-1]
    return mapped


def _without_data(tensor: Tensor) -> Tensor:
    # Not empty_like, which keeps the subclass of a quantised parameter.
    return torch.empty(tensor.shape, device="meta", dtype=tensor.dtype)


def _num_required(module: nn.Module) -> int:
    """Number of required positional arguments of ``forward`` after the first."""
    parameters = [*inspect.signature(module.forward).parameters.values()][1:]
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(parameter.kind in kinds and parameter.default is parameter.empty for parameter in parameters)


def _is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return "norm" in type(module).__name__.lower() and isinstance(weight, Tensor) and weight.dim() == 1


def layer_index(name: str) -> int:
    """The first number in the name of a module: that of its layer, as in "model.layers.3.mlp"; 0 if there is none."""
    return next((int(part) for part in name.split(".") if part.isdecimal()), 0)


def is_linear(module: nn.Module) -> bool:
    """Whether a module is itself a linear layer."""
    return _linear_sizes(module) is not None


def _linear_sizes(module: nn.Module) -> tuple[int, int] | None:
    # By attributes: quantised linear layers of several libraries do not subclass nn.Linear.
    first, last = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if isinstance(first, int) and isinstance(last, int):
        return first, last
    # Hugging Face's Conv1D, GPT-2's linear layer, stores its weight as (in, out).
    if type(module).__name__ == "Conv1D" and isinstance(getattr(module, "weight", None), Tensor):
        return int(module.weight.shape[0]), int(module.weight.shape[1])  # type: ignore[index]
    return None


class TokenMasked:
    """A module that is given its model's attention mask, so that padding does not count in the regularisers.

    The mask stays until the model's next call, since activation checkpointing needs it again in the backward pass.

    Attributes:
        token_mask: The mask of the tokens that the model is called with.
        memory: In the decoder of an encoder-decoder, whose cross-attention reads the encoder's hidden states: their
            ``id``, by which they are recognised, and their mask.
    """

    token_mask: Tensor | None = None
    memory: tuple[int, Tensor | None] | None = None

    def mask_of(self, x: Tensor) -> Tensor | None:
        """The padding mask of hidden states ``x`` of shape (..., d); None if the known masks have another shape.

        A model may have flattened the leading dimensions, which keeps the order of the tokens.
        """
        mask = self.token_mask
        if self.memory is not None and not torch.compiler.is_compiling() and id(x) == self.memory[0]:
            mask = self.memory[1]
        if mask is not None and mask.is_floating_point():
            # Models take these too, 1.0 for tokens that count.
            mask = mask.bool()
        if mask is None or mask.shape == x.shape[:-1]:
            return mask
        # Flattened to (tokens,), or to (sequences, length) as models with several texts an example do.
        shape = x.shape[:-1]
        keeps_length = len(shape) == 1 or shape[-1] == mask.shape[-1]
        is_flat = len(shape) < mask.dim() and keeps_length and mask.numel() == shape.numel()
        return mask.reshape(shape) if is_flat else None


def pass_attention_mask(model: nn.Module) -> None:
    """Hand the ``attention_mask`` that ``model`` is called with to every :class:`TokenMasked` module in it.

    In an encoder-decoder, modules of the decoder get the mask of the decoder's call.
    """
    for caller in _callers(model):
        if _HANDLE not in caller.__dict__:
            accepted = tuple(inspect.signature(caller.forward).parameters)
            handle = caller.register_forward_pre_hook(partial(_pass, accepted), with_kwargs=True)
            caller.__dict__[_HANDLE] = handle


def leave_attention_mask(model: nn.Module) -> None:
    """Undo :func:`pass_attention_mask`, unless the model still has :class:`TokenMasked` modules."""
    if not any(isinstance(module, TokenMasked) for module in model.modules()):
        for caller in _callers(model):
            if _HANDLE in caller.__dict__:
                caller.__dict__.pop(_HANDLE).remove()
                caller.__dict__.pop(_LABELLED, None)


_HANDLE = "_torchdsc_mask_handle"
_LABELLED = "_torchdsc_labelled"


def _callers(model: nn.Module) -> list[nn.Module]:
    """The model, and for an encoder-decoder its decoder."""
    is_encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    decoder = model.get_decoder() if is_encoder_decoder and hasattr(model, "get_decoder") else None  # type: ignore[operator]
    return [model] if decoder is None or decoder is model else [model, decoder]


def _pass(accepted: tuple[str, ...], model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    given = named_arguments(accepted, args, kwargs)
    mask, states = given.get("attention_mask"), given.get("encoder_hidden_states")
    labels = _tensor(given.get("labels"))
    for caller in _callers(model)[1:]:
        # A decoder whose inputs are made from the labels gets no mask: tokens without a label are padding.
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
    """Switch off the fused path of ``nn.TransformerEncoder`` around :class:`TokenMasked` modules.

    In evaluation that path reads the weights of linear layers without calling the modules, and so skips ours.
    """
    for module in model.modules():
        if any(isinstance(inner, TokenMasked) for inner in module.modules()):
            if isinstance(module, nn.TransformerEncoderLayer):
                module.activation_relu_or_gelu = 0
            elif isinstance(module, nn.TransformerEncoder):
                module.use_nested_tensor = False
