"""Conversion of a model in place."""

import re
from collections.abc import Callable, Mapping
from inspect import Signature, signature
from typing import Any, Literal, Unpack, cast

import torch
from torch import Tensor, nn

from torchdsc.arguments import check_at_least, check_types
from torchdsc.losses import add_regularization
from torchdsc.nn import DSC, BasisBank, ContextOptions, Residual
from torchdsc.nn.broadcast import Listener, broadcast_tokens
from torchdsc.nn.context_options import FeedForwardArguments, split_context
from torchdsc.nn.host import (
    TokenMasked,
    feature_sizes,
    layer_index,
    leave_fused_encoder,
    pass_attention_mask,
    stream_width,
    tied_keys,
)
from torchdsc.nn.residual import build_static
from torchdsc.nn.routers import set_salt

from .matching import match_parameters
from .saving import remember_conversion


def convert(
    model: nn.Module,
    *,
    target: str | Callable[[str, nn.Module], bool] = r"(^|\.)(mlp|ffn|feed_forward)$",
    mode: Literal["wrap", "replace"] = "wrap",
    match: Literal["parameters"] | None = None,
    in_features: int | None = None,
    out_features: int | None = None,
    hidden_features: int | None = None,
    share_bank: bool = False,
    **options: Unpack[FeedForwardArguments],
) -> list[str]:
    """Put DSC layers beside the feed-forward modules of ``model`` (``base(x) + dsc(x)``), or instead of them, in place.

    To replace the MLPs of a transformers causal language model by the recommended layer, with no more parameters::

        torchdsc.convert(model, mode="replace", match="parameters", **torchdsc.recommended())

    The converted model hands its DSC layers the ``attention_mask`` it is called with, so that padding does not count in
    the regularisers, and token embeddings or ids if the options ask for them. This works in training, evaluation and
    cached generation, with padding, and with sequences packed by ``position_ids``. A Hugging Face model adds the
    regularisers to its loss in training; with other models add ``torchdsc.regularization(model).total``. A backward
    pass without them raises. Save a converted model by ``save_pretrained`` and load it by
    :func:`torchdsc.load_converted`; transformers' own ``from_pretrained`` refuses it.

    Args:
        model: Any PyTorch or Hugging Face model whose targets map (..., d_in) to (..., d_out); if it is to be saved,
            the one whose ``save_pretrained`` is called, not a model inside it. A target that is wrapped may return a
            tuple whose first element is that, as attention does.
        target: Regular expression searched in module names, or a predicate of name and module. Modules inside a
            target, and those converted by an earlier call, are not converted again.
        mode: "wrap" keeps the module as base, with unchanged inputs; "replace" drops it.
        match: "parameters" chooses ``num_atoms`` and ``hidden_features``, unless given, so that a layer has no more
            parameters than the module it replaces.
        in_features: d_in; by default read from each target, if possible.
        out_features: d_out; likewise.
        hidden_features: With "replace", width of a static layer beside DSC (:class:`torchdsc.nn.DenseFFN`, or
            :class:`torchdsc.nn.GatedFFN` with ``static="gated"``); by default none.
        share_bank: One bank for all layers, which must then have the same sizes.
        **options: Fields of :class:`torchdsc.DSCOptions` and :class:`torchdsc.nn.ContextOptions`, for example those of
            :func:`torchdsc.recommended`. ``top_k`` is required, and without ``match`` also ``num_atoms``. With
            ``router="ngram"`` the model must be called with token ids, and the salt of each layer's router is the first
            number in its name.

    Returns:
        Names of the converted modules, in order.

    Raises:
        TypeError: If an argument has another type, or an option is unknown or missing.
        ValueError: If nothing matches, a target to replace returns a tuple, an argument is out of its range or does not
            go with the others, sizes cannot be read, a shared bank does not fit, or the options ask for tokens or
            embeddings that the model does not have.
    """
    check_types(convert, locals())
    check_at_least(1, in_features=in_features, out_features=out_features, hidden_features=hidden_features)
    context, own = split_context(options)
    _check_combination(mode, match, hidden_features, share_bank, context)
    names = _matches(model, target)
    if not names:
        done = " that is not converted yet" if any(isinstance(module, _Converted) for module in model.modules()) else ""
        raise ValueError(f"target must match a module of model{done}, got {target!r}, which matches none")
    # All layers are built before any module is replaced, so that an error leaves the model as it was.
    layers: list[_Converted] = []
    sizes: list[tuple[int, int | None]] = []
    for name in names:
        base = model.get_submodule(name)
        if mode == "replace":
            _check_output(name, base)
        first, last = _sizes(name, base, in_features, out_features, stream_width(model, name))
        num_atoms, width = own.get("num_atoms"), hidden_features
        if match:
            budget = sum(parameter.numel() for parameter in base.parameters())
            num_atoms, width = match_parameters(budget, first, last, context, own, hidden_features)
        if width and first != last:
            raise ValueError(f"hidden_features must be None for {name!r}, which maps {first} to {last}, got {width}")
        bank: BasisBank | None = layers[0].dsc.bank if share_bank and layers else None
        changes = own if num_atoms is None else {**own, "num_atoms": num_atoms}
        layers.append(_build(base, mode, (first, last), width, context, changes, bank))
        set_salt(layers[-1].dsc.router, layer_index(name))
        sizes.append((layers[-1].dsc.options.num_atoms, width or None))
    _tell_tokens(model, layers, context)
    for name, layer in zip(names, layers, strict=True):
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
    leave_fused_encoder(model)
    if share_bank:
        _declare_shared(model)
    pass_attention_mask(model)
    add_regularization(model)
    arguments = {"mode": mode, "in_features": in_features, "out_features": out_features, "share_bank": share_bank}
    _remember(model, names, sizes, {**arguments, **options})
    return names


def _tell_tokens(model: nn.Module, layers: "list[_Converted]", context: ContextOptions) -> None:
    """Let layers get what the options ask for of their model's tokens."""
    if not context.tokens_are_seen:
        return
    seen_by = {layer.dsc.in_features for layer in layers if layer.context.embeddings_are_seen}
    if len(seen_by) > 1:
        raise ValueError(f"in_features must be the same for layers that see embeddings, got {sorted(seen_by)}")
    source = broadcast_tokens(model, next(iter(seen_by), None), context.past_tokens, context.orders_seen)
    for layer in layers:
        layer.listen(source)


def _remember(
    model: nn.Module, names: list[str], sizes: list[tuple[int, int | None]], arguments: Mapping[str, Any]
) -> None:
    """Note the conversion for saving: with the sizes that were chosen, not the budget."""
    for size in dict.fromkeys(sizes):
        found = [name for name, other in zip(names, sizes, strict=True) if other == size]
        solved = {"num_atoms": size[0], "hidden_features": size[1]}
        remember_conversion(model, {"modules": found, "arguments": {**arguments, **solved}})


def _check_output(name: str, module: nn.Module) -> None:
    """Refuse a module that returns a tuple, by its class: attention does, whether it is annotated so or not."""
    annotation, kind = signature(type(module).forward).return_annotation, type(module).__name__
    returns_tuple = "attention" in kind.lower()
    if annotation is not Signature.empty:
        returns_tuple = str(annotation).lower().removeprefix("<class '").startswith(("tuple", "typing.tuple"))
    if returns_tuple:
        raise ValueError(
            f"target must match modules that return one tensor for mode = 'replace', got {name!r}, a {kind}, which "
            "returns a tuple"
        )


def _check_combination(
    mode: str, match: str | None, hidden_features: int | None, share_bank: bool, context: ContextOptions
) -> None:
    """Refuse arguments that do not go together."""
    for argument, value in (("match", match), ("hidden_features", hidden_features)):
        if mode == "wrap" and value is not None:
            raise ValueError(f"{argument} must be None for mode = 'wrap', which keeps the module, got {value!r}")
    if mode == "wrap" and context.static != "dense":
        raise ValueError(f"static must be 'dense' for mode = 'wrap', which keeps the module, got {context.static!r}")
    if match and share_bank:
        raise ValueError(
            "match must be None for share_bank = True, as one bank is in every layer's budget, got 'parameters'"
        )
    if context.router_context > 1 and context.router_input == "hidden":
        raise ValueError(
            "router_input must be 'embeddings' for router_context > 1 in a model of others, got 'hidden': its cache "
            "keeps no hidden states"
        )


def _build(
    base: nn.Module,
    mode: str,
    features: tuple[int, int],
    width: int | None,
    context: ContextOptions,
    options: dict[str, Any],
    bank: BasisBank | None,
) -> "_Converted":
    """A layer to put in the place of ``base``, on its device, in its dtype and its mode."""
    like = next(base.parameters(), torch.empty(0))
    placed: dict[str, Any] = {"device": like.device, "dtype": like.dtype}
    dsc = DSC(features[0], features[1], bank=bank, **placed, **options)
    layer: _Converted
    if mode == "wrap":
        layer = _Wrapped(Residual(base, dsc))
    else:
        layer = _Replaced(Residual(build_static(context.static, features[0], width, **placed), dsc) if width else dsc)
    layer.add_contexts(features[0], context.beside(gate=bool(width) and context.static == "gated"), **placed)
    kept = {*base.modules()} if mode == "wrap" else set()
    for part in {*layer.modules()} - kept:
        part.training = base.training
    return layer


class _Converted(nn.Module, TokenMasked, Listener):
    """A converted module: hands its DSC layer the model's attention mask, token embeddings and codes of n-grams.

    Attributes:
        module: The DSC layer, alone or with a static layer or the original module.
    """

    module: DSC | Residual

    def __init__(self, module: DSC | Residual) -> None:
        super().__init__()
        self.module = module

    @property
    def dsc(self) -> DSC:
        """The DSC layer."""
        return self.module if isinstance(self.module, DSC) else cast(DSC, self.module.dsc)


class _Wrapped(_Converted):
    module: Residual

    def __init__(self, module: Residual) -> None:
        super().__init__(module)
        self._input_name = next(iter(signature(module.base.forward).parameters))

    @property
    def takes_router_input(self) -> bool:
        return getattr(self.module.base, "takes_router_input", False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # The base gets exactly the arguments it got before, whatever their names; attention may get its input by
        # keyword, and returns a tuple.
        x: Tensor = args[0] if args else kwargs[self._input_name]
        output = self.module.base(*args, **kwargs)
        y: Tensor = output[0] if isinstance(output, tuple) else output
        z, routed, _ = self.look(x)
        update: Tensor = self.module.dsc(z, self.mask_of(x), routed)
        y = self.kept(y + update)
        return (y, *output[1:]) if isinstance(output, tuple) else y


class _Replaced(_Converted):
    takes_router_input = True

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        z, routed, gate = self.look(x)
        given = {"token_mask": self.mask_of(x), **kwargs}
        if routed is not None:
            given["router_input"] = routed
        if isinstance(self.module, Residual):
            given["gate_input"] = gate
        y: Tensor = self.module(z, *args, **given)
        return self.kept(y)


def _declare_shared(model: nn.Module) -> None:
    """Declare tied parameters to transformers, which refuses to save others, and would initialise them on loading."""
    declared = getattr(model, "_tied_weights_keys", ())
    if not isinstance(declared, dict | None):
        return
    tied = tied_keys((name, module) for name, module in model.named_modules() if isinstance(module, DSC))
    patterns = {re.escape(name): first for name, first in tied.items()}
    model._tied_weights_keys = {**(declared or {}), **patterns}  # type: ignore[assignment]
    # Loading reads the expanded mapping, which the model made when it was built.
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
    if first is None and any(parameter.dim() > 1 and width in parameter.shape for parameter in base.parameters()):
        # Experts held as plain parameters: the module maps the residual stream to itself.
        first = last = width
    first = first if in_features is None else in_features
    last = last if out_features is None else out_features
    if first is None or last is None:
        raise ValueError(f"in_features and out_features must be given for {name!r}: it holds no linear layer")
    return first, last
