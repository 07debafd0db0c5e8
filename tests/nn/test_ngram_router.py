"""DSC addressed by n-grams: the atoms that hashing gives, composed as the equation says, within the bound."""

import math

import pytest
import torch
from torch.nn import functional

from torchdsc import DSC, Residual, certified_spectral_bound
from torchdsc.nn import GatedFFN
from torchdsc.ops import ngram_codes, ngram_rows


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return DSC(6, 5, num_atoms=40, top_k=4, router="ngram", frame_weight=0.0, gamma_init=1.5).double()


@pytest.fixture
def codes():
    return ngram_codes(torch.randint(30, (2, 7)), (2, 3))


def atoms_of(codes):
    """The first 20 atoms are for pairs, the others for triples; two of each."""
    return ngram_rows(codes, 2, 20) + torch.tensor([0, 0, 20, 20])


def test_equation(layer, codes):
    x = torch.randn(2, 7, 6, dtype=torch.float64)
    atoms = atoms_of(codes)
    u, v = functional.normalize(layer.bank.u, dim=1), functional.normalize(layer.bank.v, dim=1)
    # softplus(0) = ln 2 of each of four, so that S = 4 ln 2.
    z = math.log(2) * math.tanh(4 * math.log(2)) / (4 * math.log(2) + 1e-6)
    expected = torch.einsum("btki,bti,btko->bto", u[atoms], x, v[atoms]) * z * 1.5
    torch.testing.assert_close(layer(x, router_input=codes), expected)
    torch.testing.assert_close(torch.einsum("bti,btio->bto", x, layer.delta_weight(x, codes)), expected)
    routing = layer.route(codes)
    torch.testing.assert_close(layer(x, routing=routing), expected)


def test_bound(layer, codes):
    x = torch.randn(2, 7, 6, dtype=torch.float64)
    norms = torch.linalg.matrix_norm(layer.delta_weight(x, codes), ord=2)
    assert (norms < certified_spectral_bound(layer)).all()


def test_gradients_and_regularisers(layer, codes):
    layer.train()
    y = layer(torch.randn(2, 7, 6, dtype=torch.float64), router_input=codes)
    # Nothing of a router can be trained, so nothing has to be collected.
    y.square().sum().backward()
    assert not layer.regularizers.any
    selected = torch.zeros(40, dtype=torch.bool).index_fill(0, atoms_of(codes).flatten(), True)
    assert torch.equal(layer.bank.u.grad.abs().sum(1) > 0, selected)
    assert [*layer.router.parameters()] == []


def test_masked_tokens_that_are_not_finite_spoil_nothing(layer, codes):
    x = torch.randn(2, 7, 6, dtype=torch.float64)
    x[0, 3] = torch.nan
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[0, 3] = False
    y = layer.train()(x, mask, codes)
    assert torch.equal(y.isnan().any(-1), ~mask)
    y[mask].sum().backward()
    assert layer.bank.v.grad.isfinite().all()


def test_beside_a_gated_layer(codes):
    dsc = DSC(6, num_atoms=40, top_k=4, router="ngram", frame_weight=0.0).double()
    layer = Residual(GatedFFN(6, 9).double(), dsc)
    x, gate = torch.randn(2, 2, 7, 6, dtype=torch.float64)
    update = dsc(x, router_input=codes)
    # No gate can see codes: by default it sees the layer's input.
    assert torch.equal(layer(x, router_input=codes), layer.base(x) + update)
    expected = layer.base(x, router_input=gate) + update
    assert not torch.allclose(expected, layer(x, router_input=codes))
    assert torch.equal(layer(x, router_input=codes, gate_input=gate), expected)
    assert torch.equal(layer(x, routing=dsc.route(codes), gate_input=gate), expected)


def test_salt_gives_other_atoms(layer, codes):
    first = layer.route(codes).indices
    layer.router.salt = 1
    assert (layer.route(codes).indices != first).any(-1).all()


def test_no_atom_is_left_out():
    layer = DSC(6, num_atoms=11, top_k=3, router="ngram", frame_weight=0.0)
    codes = ngram_codes(torch.randint(50, (1, 500)), (1, 2, 3))
    assert set(layer.route(codes).indices.flatten().tolist()) == set(range(11))


def test_errors(layer, codes):
    x = torch.randn(2, 7, 6, dtype=torch.float64)
    with pytest.raises(
        TypeError, match=r"router_input must be codes of torchdsc\.ops\.ngram_codes .*got torch\.float64"
    ):
        layer(x)
    with pytest.raises(ValueError, match=r"router_input must be codes of shape \(2, 7, 'n'\), got \(2, 6, 2\)"):
        layer(x, router_input=codes[:, :6])
    with pytest.raises(ValueError, match="top_k must be a multiple of the 3 orders of n-grams, got 4"):
        layer(x, router_input=torch.zeros(2, 7, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="router_bias must be False for router = 'ngram', got True"):
        DSC(6, num_atoms=4, top_k=2, router="ngram", router_bias=True)
    with pytest.raises(ValueError, match="router_rank must be None for router = 'ngram', got 3"):
        DSC(6, num_atoms=4, top_k=2, router="ngram", router_rank=3)


@pytest.mark.parametrize(
    ("option", "value"), [("router_norm", "layer_affine"), ("router_init_std", 0.1), ("z_loss_on_raw_logits", True)]
)
def test_options_without_effect_are_refused(option, value):
    with pytest.raises(ValueError, match=f"{option} must be .* for router = 'ngram', got {value!r}"):
        DSC(6, num_atoms=4, top_k=2, router="ngram", **{option: value})


def test_a_single_atom_without_a_gate_trains():
    layer = DSC(6, num_atoms=4, top_k=1, router="ngram", gate="none", frame_weight=0.0).train()
    layer(torch.randn(5, 6), router_input=ngram_codes(torch.arange(5), (2,))).sum().backward()
    assert layer.bank.v.grad.abs().sum() > 0


def test_coefficients_are_float32_whatever_the_default(layer, codes):
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert layer.float().route(codes).coefficients.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_compiled():
    # Compiled code does not wrap the product of an index and a large constant.
    layers = torch.nn.ModuleList(DSC(6, num_atoms=11, top_k=4, router="ngram", frame_weight=0.0) for _ in range(3))
    for salt, layer in enumerate(layers):
        layer.router.salt = salt

    def run(x, tokens):
        seen = ngram_codes(tokens, (1, 3))
        return sum(layer(x, router_input=seen) for layer in layers)

    x, tokens = torch.randn(2, 7, 6), torch.randint(500, (2, 7))
    torch.testing.assert_close(torch.compile(run, fullgraph=True)(x, tokens), run(x, tokens))
