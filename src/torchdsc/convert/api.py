"""Conversion of a model in place."""

import re
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from torchdsc.arguments import check_at_least, check_types
from torchdsc.losses import add_regularization
from torchdsc.nn import DSC, BasisBank, Residual
from torchdsc.nn.host import TokenMasked, feature_sizes, leave_fused_encoder, pass_attention_mask, stream_width

from .saving import remember_conversion


def convert(
    model: nn.Module,
    *,
    target: str | Callable[[str, nn.Module], bool] = r"(^|\.)(mlp|ffn|feed_forward)$",
    mode: Literal["wrap", "replace"] = "wrap",
    in_features: int | None = None,
    out_features: int | None = None,
    share_bank: bool = False,
    **options: Any,
) -> list[str]:
    """Put a DSC layer beside (``base(x) + dsc(x)``) or in place of the feed-forward modules of ``model``, in place.

    A converted model passes the ``attention_mask`` it is called with, where it has the shape of the tokens, to its DSC
    layers, so that padding does not count in their regularisers. A Hugging Face model adds these to its loss in
    training; for others add ``torchdsc.regularization(model).total``. A backward pass without them raises.
    ``save_pretrained`` saves the converted model, :func:`torchdsc.load_converted` loads it; transformers' own
    ``from_pretrained`` refuses it.

    Args:
        model: Any PyTorch or Hugging Face model whose targets map (..., d_in) to (..., d_out).
        target: Regular expression searched in module names, or a predicate of name and module. Modules inside a
            target, and those converted by an earlier call, are not converted again.
        mode: "wrap" keeps the module as base, "replace" drops it.
        in_features: d_in; by default that of each target, as far as it can be told.
        out_features: d_out; likewise.
        share_bank: One bank for all layers; their sizes must then agree.
        **options: Fields of :class:`torchdsc.DSCOptions`; ``num_atoms`` and ``top_k`` are required.

    Returns:
        Names of the converted modules, in order.

    Raises:
        TypeError: If an argument has another type.
        ValueError: If nothing matches, ``mode`` is unknown, sizes cannot be told, or a shared bank does not fit.
    """
    check_types(convert, locals())
    check_at_least(1, in_features=in_features, out_features=out_features)
    names = _matches(model, target)
    if not names:
        raise ValueError(f"target must match a module of model, got {target!r}, which matches none")
    # Everything is built before anything is replaced: an error leaves the model as it was.
    layers: list[DSC] = []
    for name in names:
        base = model.get_submodule(name)
        sizes = _sizes(name, base, in_features, out_features, stream_width(model, name))
        bank: BasisBank | None = layers[0].bank if share_bank and layers else None
        like = next(base.parameters(), torch.empty(0))
        layer = DSC(*sizes, bank=bank, device=like.device, dtype=like.dtype, **options)
        layers.append(layer.train(base.training))
    for name, layer in zip(names, layers, strict=True):
        base = model.get_submodule(name)
        converted = _Wrapped(Residual(base, layer)) if mode == "wrap" else _Replaced(layer)
        converted.training = converted.module.training = base.training
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, converted)
    leave_fused_encoder(model)
    if share_bank:
        _declare_shared(model, layers[0].bank)
    pass_attention_mask(model)
    add_regularization(model)
    given = {
        "mode": mode,
        "in_features": in_features,
        "out_features": out_features,
        "share_bank": share_bank,
        **options,
    }
    remember_conversion(model, {"modules": names, "arguments": given})
    return names


class _Converted(nn.Module, TokenMasked):
    """A converted module: hands the attention mask of its model to the DSC layer."""

    def __init__(self, module: Residual | DSC) -> None:
        super().__init__()
        self.module = module


class _Wrapped(_Converted):
    module: Residual

    @property
    def takes_router_input(self) -> bool:
        return getattr(self.module.base, "takes_router_input", False)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # The base has the arguments that it had before, whatever their names.
        y: Tensor = self.module.base(x, *args, **kwargs)
        update: Tensor = self.module.dsc(x, self.mask_of(x))
        return y + update


class _Replaced(_Converted):
    module: DSC
    takes_router_input = True

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y: Tensor = self.module(x, *args, **{"token_mask": self.mask_of(x), **kwargs})
        return y


def _declare_shared(model: nn.Module, bank: BasisBank) -> None:
    """Tell transformers which tensors share memory: it refuses to save others, and fills them anew on loading."""
    declared = getattr(model, "_tied_weights_keys", ())
    if not isinstance(declared, dict | None):
        return
    tied = {}
    for own in bank.parameters():
        first, *others = (
            name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter is own
        )
        tied.update(dict.fromkeys(others, first))
    patterns = {re.escape(name): first for name, first in tied.items()}
    model._tied_weights_keys = {**(declared or {}), **patterns}  # type: ignore[assignment]
    # Loading goes by what the model found out of these when it was built.
    model.all_tied_weights_keys = {**getattr(model, "all_tied_weights_keys", {}), **tied}  # type: ignore[assignment]


def _matches(model: nn.Module, target: str | Callable[[str, nn.Module], bool]) -> list[str]:
    names: list[str] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in names)
        matched = re.search(target, name) is not None if isinstance(target, str) else target(name, module)
        if name and matched and not inside and not isinstance(module, _Converted):
            names.append(name)
    return names


def _sizes(
    name: str, base: nn.Module, in_features: int | None, out_features: int | None, width: int | None
) -> tuple[int, int]:
    if in_features is not None and out_features is not None:
        return in_features, out_features
    first, last = feature_sizes(base, name, width)
    first = first if in_features is None else in_features
    last = last if out_features is None else out_features
    if first is None or last is None:
        raise ValueError(f"in_features and out_features must be given for {name!r}: it holds no linear layer")
    return first, last
