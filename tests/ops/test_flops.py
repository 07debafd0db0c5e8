"""FlopCounterMode counts the products that the equations ask for, whatever computes them."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from torchdsc import DSC, regularization
from torchdsc.baselines import PEER

T, D, OUT, M, K = 50, 24, 32, 40, 3
PRODUCTS = 2 * T * (D * M + K * (D + OUT))


def count(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def make(**options):
    return DSC(D, OUT, num_atoms=M, top_k=K, frame_weight=0.0, **options)


@pytest.mark.parametrize("impl", ["auto", "gather", "dense", "reference"])
def test_forward(impl):
    layer, x = make(impl=impl), torch.randn(T, D)
    assert count(lambda: layer.eval()(x)) == PRODUCTS
    with torch.no_grad():
        assert count(lambda: layer(x)) == PRODUCTS


def test_many_tokens_in_inference():
    """Where logits would be screened in bfloat16, or made in chunks."""
    layer, tokens = DSC(64, num_atoms=2048, top_k=4).eval(), 4096
    with torch.no_grad():
        assert count(lambda: layer(torch.randn(tokens, 64))) == 2 * tokens * (64 * 2048 + 4 * 128)


def test_training():
    layer, x = make(), torch.randn(T, D, requires_grad=True)

    def step():
        y = layer(x)
        (y.square().sum() + regularization(layer).total).backward()

    # Two products for each in the backward pass.
    assert count(step) == 3 * PRODUCTS


def test_rectified():
    layer, x = make(activation="relu").eval(), torch.randn(T, D)
    with torch.no_grad():
        assert count(lambda: layer(x)) == PRODUCTS + 2 * T * K * D


def test_peer_computes_its_selected_experts_alone():
    layer, x = PEER(D, OUT, num_experts=400, top_k=K, query_features=8), torch.randn(T, D, requires_grad=True)
    selected = T * K * (D + OUT)
    # Twice the latent values: their own products, and those in the composition.
    expected = 2 * (T * D * 8 + T * 8 * 20 + selected + T * K * D)
    assert count(lambda: layer.eval()(x)) == expected
    assert count(lambda: layer(x).sum().backward()) == 3 * expected


def test_inference_is_the_same_where_it_is_counted():
    layer, x = make().eval(), torch.randn(T, D)
    with torch.no_grad():
        expected, found = layer(x), []
        count(lambda: found.append(layer(x)))
    torch.testing.assert_close(found[0], expected)
