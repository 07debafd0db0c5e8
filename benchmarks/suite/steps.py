"""What several benchmarks share: forward and training calls of a layer, and the rule for what does not fit."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from torchdsc import regularization
from torchdsc.baselines import DenseFFN

from .published import PublishedLayer

FLOAT = 4
# A call is left out where what it gathers or masks would take more than this: a fixed figure, so that every machine
# of 24 GiB measures the same points.
MEMORY_LIMIT = 8 << 30


def too_large(num_bytes: int) -> str | None:
    """The reason why a call of this working memory is left out; None where it fits."""
    if num_bytes <= MEMORY_LIMIT:
        return None
    return f"its tensors of tokens x K or M would take {num_bytes / 2**30:.1f} GiB, over {MEMORY_LIMIT >> 30} GiB"


def forward_call(layer: nn.Module, x: Tensor) -> Callable[[], object]:
    """A forward pass in evaluation mode, which the layer is left in, without gradients."""
    layer.eval()

    @torch.no_grad()
    def forward() -> object:
        return layer(x)

    return forward


def training_call(layer: nn.Module, x: Tensor) -> Callable[[], object]:
    """A forward and backward pass in training mode, with regularisers, to the gradients of x and the weights."""
    layer.train()
    leaf = x.clone().requires_grad_()

    def step() -> None:
        if isinstance(layer, PublishedLayer):
            y, regularizers = layer(leaf, regularize=True)
            (y.sum() + regularizers).backward()
        else:
            outputs = layer(leaf)
            if isinstance(outputs, tuple):
                torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])
            elif isinstance(layer, DenseFFN):
                outputs.sum().backward()
            else:
                (outputs.sum() + regularization(layer).total).backward()
        layer.zero_grad()
        leaf.grad = None

    return step
