import pytest
import torch

from torchdsc import DSC
from torchdsc.diagnostics import sensitivity


@pytest.fixture
def layer():
    torch.manual_seed(0)
    layer = DSC(10, 7, num_atoms=24, top_k=3, dtype=torch.float64)
    torch.nn.init.normal_(layer.router.weight, std=0.5)
    torch.nn.init.normal_(layer.gamma)
    return layer


@pytest.fixture
def x():
    return torch.randn(40, 10, dtype=torch.float64)


@pytest.mark.parametrize("gate", ["sum", "mean"])
def test_local_lipschitz_is_that_of_the_jacobian(layer, x, gate):
    layer = DSC(10, 7, num_atoms=24, top_k=3, gate=gate, dtype=torch.float64)
    torch.nn.init.normal_(layer.router.weight, std=0.5)
    layer.eval()
    norms = [
        torch.linalg.matrix_norm(torch.autograd.functional.jacobian(lambda t: layer(t[None])[0], token), ord=2)
        for token in x[:6]
    ]
    found = sensitivity(layer, x[:6])
    assert found.local_lipschitz == pytest.approx(max(norms).item(), rel=1e-9)
    assert found.fixed_norm != pytest.approx(found.local_lipschitz, rel=1e-3)


def test_of_an_update_that_is_zero_and_of_no_gate_there_is_no_figure(x):
    zero = DSC(10, 7, num_atoms=24, top_k=3, gamma_init=0.0, dtype=torch.float64)
    assert sensitivity(zero, x).noise_norm is None
    ungated = DSC(10, 7, num_atoms=24, top_k=3, gate="none", dtype=torch.float64)
    found = sensitivity(ungated, x)
    assert found.gate is found.noise_gate is None
    assert found.noise_norm > 0


def test_without_a_router_that_moves_it_is_the_fixed_norm(layer, x):
    torch.nn.init.zeros_(layer.router.weight)
    layer.router.bias = torch.nn.Parameter(torch.randn(24, dtype=torch.float64))
    found = sensitivity(layer, x)
    assert found.local_lipschitz == pytest.approx(found.fixed_norm)
    assert found.changed == found.jump == 0.0
    assert found.noise_strength == pytest.approx(1.0)
    assert found.gate == found.noise_gate


def test_jump_is_that_of_two_atoms_that_change_places():
    """Token (1, t): atom 0 is selected below t = 1, atom 1 above, and both outputs are known."""
    layer = DSC.basic(2, num_atoms=2, top_k=1, gamma_init=1.0, dtype=torch.float64)
    with torch.no_grad():
        layer.router.weight.copy_(torch.eye(2))
        layer.bank.u.copy_(torch.eye(2))
        layer.bank.v.copy_(torch.eye(2))
    x = torch.tensor([[1.0, 0.999], [0.999, 1.0], [1.0, 0.5]], dtype=torch.float64)
    found = sensitivity(layer, x, step=0.05, seed=3)
    # On the boundary both latents and both coefficients are equal: from (a, 0) to (0, a).
    assert found.changed in (pytest.approx(1 / 3), pytest.approx(2 / 3))
    assert found.jump == pytest.approx(2**0.5, rel=1e-6)


def test_larger_steps_change_more(layer, x):
    small, large = (sensitivity(layer, x, step=step).changed for step in (1e-4, 1.0))
    assert small < 0.2 < large


def test_noise_is_compared_with_tokens():
    """Tokens along the directions of the router's rows have a large S, which noise of the same scale has not."""
    layer = DSC.basic(10, num_atoms=6, top_k=3, dtype=torch.float64)
    signs = torch.randn(10, dtype=torch.float64).sign()
    with torch.no_grad():
        layer.router.weight.copy_(torch.stack([signs] * 3 + [-signs] * 3))
    found = sensitivity(layer, torch.stack([signs, -signs] * 50))
    assert found.noise_strength < 0.5
    assert found.noise_gate < found.gate


def test_mode_and_gradients_are_as_before(layer, x):
    layer.train()
    sensitivity(layer, x)
    assert layer.training
    assert all(parameter.grad is None for parameter in layer.parameters())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"router": "ngram", "top_k": 4}, "layer must be routed by x, got router = 'ngram'"),
        ({"activation": "relu"}, "layer must have no activation, thin atoms or offset"),
        ({"atom_features": 4}, "layer must have no activation, thin atoms or offset"),
    ],
)
def test_other_layers_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        sensitivity(DSC(10, **{"num_atoms": 24, "top_k": 3, **options}), torch.randn(4, 10))


def test_step_is_positive(layer, x):
    with pytest.raises(ValueError, match="step must be"):
        sensitivity(layer, x, step=0.0)
