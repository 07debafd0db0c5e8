"""Thin atoms and atoms with an offset: their equations, factors, bounds and initial weights."""

import math

import pytest
import torch
from torch.nn import functional

from torchdsc import DSC, certified_spectral_bound, spectral_norm
from torchdsc.models import DSCGPTConfig, DSCGPTForCausalLM

OPTIONS = {"thin": {"atom_features": 5}, "offset": {"offset": True}, "both": {"atom_features": 5, "offset": True}}


@pytest.fixture(params=OPTIONS)
def layer(request):
    torch.manual_seed(0)
    layer = DSC(12, 10, num_atoms=30, top_k=4, gamma_init=0.8, **OPTIONS[request.param]).double()
    if layer.reduce is not None:
        # As after training.
        torch.nn.init.normal_(layer.reduce.weight)
        torch.nn.init.normal_(layer.expand.weight)
    return layer


@pytest.fixture
def x():
    return torch.randn(6, 12, dtype=torch.float64)


def test_equation(layer, x):
    routing = layer.route(x)
    seen = x if layer.reduce is None else x @ layer.reduce.weight.T
    if layer.options.offset:
        seen = torch.cat([seen, torch.full((6, 1), math.sqrt(seen.shape[1]), dtype=torch.float64)], dim=1)
    u, v = (functional.normalize(atoms, dim=1)[routing.indices] for atoms in (layer.bank.u, layer.bank.v))
    y = torch.einsum("tki,ti,tk,tko->to", u, seen, routing.coefficients, v)
    y = y if layer.expand is None else y @ layer.expand.weight.T
    torch.testing.assert_close(layer(x), 0.8 * y)


def test_factors_and_bounds(layer, x):
    routing, weights = layer.route(x), layer.delta_weight(x)
    offset = layer(torch.zeros_like(x), routing=routing)
    assert (offset.abs().sum() > 0) == layer.options.offset
    torch.testing.assert_close(torch.einsum("ti,tio->to", x, weights) + offset, layer(x))
    norms, bound = torch.linalg.matrix_norm(weights, ord=2), certified_spectral_bound(layer)
    torch.testing.assert_close(spectral_norm(layer, x), norms)
    assert (norms < bound).all()
    # sqrt(d), of the features that atoms see.
    constant = math.sqrt(layer.bank.in_features - 1) if layer.options.offset else 0.0
    size = x if layer.reduce is None else x @ layer.reduce.weight.T
    limit = (size.norm(dim=1) ** 2 + constant**2).sqrt() * 0.8
    if layer.expand is not None:
        limit = limit * torch.linalg.matrix_norm(layer.expand.weight, ord=2)
    assert (layer(x).norm(dim=1) < limit).all()


def test_bound_is_as_small_as_gamma_at_the_start():
    layer = DSC(12, num_atoms=30, top_k=4, gamma_init=0.8, atom_features=5)
    assert certified_spectral_bound(layer) == pytest.approx(0.8)


def test_projections_start_orthonormal_in_a_model_too():
    options = {"num_atoms": 30, "top_k": 4, "atom_features": 5}
    config = DSCGPTConfig(64, 16, 1, 2, intermediate_size=8, feed_forward_options=options, initializer_range=0.3)
    layer = DSCGPTForCausalLM(config).model.blocks[0].feed_forward.dsc
    torch.testing.assert_close(layer.reduce.weight @ layer.reduce.weight.T, torch.eye(5))
    torch.testing.assert_close(layer.expand.weight.T @ layer.expand.weight, torch.eye(5))


def test_size():
    with pytest.raises(ValueError, match="atom_features must be >= 1, got 0"):
        DSC(6, num_atoms=4, top_k=2, atom_features=0)
