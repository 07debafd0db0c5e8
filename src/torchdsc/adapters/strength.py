"""How much an adapter changes: how open its gates are on a text, and its whole update."""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from torchdsc.nn.context import Seen

from .dsc_layer import dsc_layers


def signal_strength(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    adapter_name: str = "default",
) -> Tensor:
    """Mean signal strength S of a DSC adapter on some tokens, without a pass of the model: it is routed by embeddings.

    In a loss, a small multiple of it on text of an old domain closes the gate there, so that the adapter changes less
    of what the model knew::

        loss = model(**batch).loss + 0.1 * signal_strength(model, old_ids)

    Args:
        model: A language model with the adapter.
        input_ids: Tokens of shape (B, T), int64.
        attention_mask: Shape (B, T), 0 or False for padding, which does not count; by default none.
        adapter_name: Of the adapter.

    Returns:
        A scalar, differentiable in the routers and their short convolutions.

    Raises:
        ValueError: If the model has no such adapter, or it is routed by hidden states or n-grams.
    """
    layers = dsc_layers(model, adapter_name)
    for name, layer in layers.items():
        if layer.context.router_input != "embeddings" or layer.context.routes_by_ngrams:
            raise ValueError(f"router_input must be 'embeddings', and router no 'ngram', got another at {name}")
    embeddings = cast(Any, model).get_input_embeddings()(input_ids)
    x = functional.layer_norm(embeddings, embeddings.shape[-1:])
    mask = None if attention_mask is None else attention_mask.bool()
    if mask is not None:
        x = x.masked_fill(~mask.unsqueeze(-1), 0.0)
    strengths = []
    for layer in layers.values():
        seen = Seen(x, x.shape[-2]).to(layer.gamma.device, layer.parameter_dtype)
        routed = layer.router_sees(seen)
        assert routed is not None
        # Nothing is composed, so that there is no output to regularise.
        routing, _ = layer.route(routed, mask).take_statistics()
        assert routing.strength is not None
        strengths.append((routing.strength if mask is None else routing.strength[mask]).mean())
    return torch.stack([strength.to(strengths[0].device) for strength in strengths]).mean()


def scale_adapter(model: nn.Module, factor: float, *, adapter_name: str = "default") -> None:
    """Multiply the update of a DSC adapter, once it is trained: on the way back to the base model it forgets less.

    The adapter's gamma is changed, and saved with it: ``y = base(x) + factor * update(x)``. How much is lost and kept
    on the way is to be measured; half of an update often has most of what it learnt.

    Args:
        model: With the adapter.
        factor: In [0, 1].
        adapter_name: Of the adapter.

    Raises:
        ValueError: If the model has no such adapter, or the factor is another number.
    """
    for layer in dsc_layers(model, adapter_name).values():
        layer.multiply_output_scale(factor)
