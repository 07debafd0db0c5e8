"""Tensors on several devices are refused by name; an operator given one on meta would return unwritten memory."""

import pytest
import torch

from torchdsc import ops

TOKENS, ATOMS, TOP_K = 5, 11, 3


def floats(*shape):
    return lambda: torch.randn(*shape)


CALLS = {
    "compose": (
        ops.compose,
        {
            "x": floats(TOKENS, 8),
            "u": floats(ATOMS, 8),
            "v": floats(ATOMS, 6),
            "indices": lambda: torch.zeros(TOKENS, TOP_K, dtype=torch.int64),
            "coefficients": floats(TOKENS, TOP_K),
        },
        {},
    ),
    "latents": (
        ops.latents,
        {
            "x": floats(TOKENS, 8),
            "u": floats(ATOMS, 8),
            "indices": lambda: torch.zeros(TOKENS, TOP_K, dtype=torch.int64),
        },
        {},
    ),
    "route": (
        ops.route,
        {
            "x": floats(TOKENS, 8),
            "weight": floats(ATOMS, 8),
            "bias": floats(ATOMS),
            "token_mask": lambda: torch.ones(TOKENS, dtype=torch.bool),
        },
        {"top_k": TOP_K, "statistics": True},
    ),
    "select": (
        ops.select,
        {"logits": floats(TOKENS, ATOMS), "token_mask": lambda: torch.ones(TOKENS, dtype=torch.bool)},
        {"top_k": TOP_K, "logit_clamp": 20.0},
    ),
    "select_product_key": (
        ops.select_product_key,
        {
            "left": floats(TOKENS, 1, 4),
            "right": floats(TOKENS, 1, 4),
            "token_mask": lambda: torch.ones(TOKENS, dtype=torch.bool),
        },
        {"top_k": TOP_K, "logit_clamp": 20.0, "statistics": True},
    ),
    "short_convolution": (
        ops.short_convolution,
        {
            "x": floats(TOKENS, 8),
            "weight": floats(3, 8),
            "positions": lambda: torch.arange(TOKENS),
            "onto": floats(TOKENS, 8),
        },
        {"length": TOKENS},
    ),
}


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize(
    ("name", "elsewhere"), [(name, tensor) for name, (_, tensors, _) in CALLS.items() for tensor in tensors]
)
def test_the_tensor_on_another_device_is_named(name, elsewhere, gradients):
    function, makers, options = CALLS[name]
    tensors = {key: make() for key, make in makers.items()}
    with torch.set_grad_enabled(gradients):
        function(**tensors, **options)
        tensors[elsewhere] = tensors[elsewhere].to("meta")
        with pytest.raises(ValueError, match=rf"^all tensors must be on one device, got .*{elsewhere} on meta"):
            function(**tensors, **options)
