import math

import pytest
import torch

from torchdsc import DSC, Residual, certified_spectral_bound, spectral_norm
from torchdsc.bounds import frame_excess, welch_bound


@pytest.mark.parametrize(("d_in", "d_out", "top_k"), [(9, 7, 3), (2, 8, 5), (8, 1, 4), (6, 6, 1)])
def test_spectral_norm_equals_that_of_the_matrix(d_in, d_out, top_k):
    layer = DSC(d_in, d_out, num_atoms=12, top_k=top_k).double()
    torch.nn.init.normal_(layer.router.weight)
    torch.nn.init.normal_(layer.gamma)
    x = torch.randn(4, 5, d_in, dtype=torch.float64)
    expected = torch.linalg.matrix_norm(layer.delta_weight(x).detach(), ord=2)
    norms = spectral_norm(layer, x)
    assert norms.shape == (4, 5)
    torch.testing.assert_close(norms, expected, rtol=1e-12, atol=1e-14)
    assert (norms < certified_spectral_bound(layer)).all()


def test_certified_bound_is_the_largest_gamma():
    layer = DSC(4, num_atoms=5, top_k=2)
    with torch.no_grad():
        layer.gamma.copy_(torch.tensor([0.5, -3.0, 1.0, 0.0]))
    assert certified_spectral_bound(layer) == 3.0
    assert math.isclose(
        certified_spectral_bound(DSC.basic(4, num_atoms=5, top_k=2, gamma_init=-0.2)), 0.2, rel_tol=1e-6
    )


class TestMaxUpdateNorm:
    def layer(self, most=0.25, **options):
        torch.manual_seed(0)
        options = {"gamma_init": 0.02, **options}
        layer = DSC(6, num_atoms=12, top_k=3, max_update_norm=most, scale=8.0, **options).double()
        torch.nn.init.normal_(layer.router.weight, std=3.0)
        return layer

    @pytest.mark.parametrize("options", [{}, {"offset": True}, {"activation": "relu"}, {"gate": "none"}], ids=str)
    def test_no_update_exceeds_it(self, options):
        layer, x = self.layer(**options), torch.randn(50, 6, dtype=torch.float64)
        torch.nn.init.constant_(layer.gamma, 100.0)
        assert 0.249 < certified_spectral_bound(layer) <= 0.25
        norms = spectral_norm(layer, x)
        assert (norms <= 0.25 * (1 + 1e-12)).all()
        assert norms.max() > 0.1

    def test_outputs_are_those_of_the_weight(self):
        layer, x = self.layer(gamma_init=0.03), torch.randn(5, 6, dtype=torch.float64)
        expected = torch.einsum("ti,tio->to", x, layer.delta_weight(x))
        torch.testing.assert_close(layer(x), expected)
        torch.testing.assert_close(layer.eval()(x), expected)
        plain = self.layer(most=None, gamma_init=0.03 / (1 + 0.03 * 8 / 0.25))
        torch.testing.assert_close(plain(x), expected)

    def test_a_small_gamma_is_hardly_changed_and_a_large_one_still_learns(self):
        layer = self.layer(gamma_init=1e-4)
        torch.testing.assert_close(layer.output_scale, 8 * layer.gamma, rtol=5e-3, atol=0)
        layer = self.layer().float().eval()
        # Where steps of Adam soon bring it.
        torch.nn.init.constant_(layer.gamma, 4.0)
        layer(torch.randn(5, 6)).square().sum().backward()
        assert (layer.gamma.grad.abs() > 1e-8).all()

    def test_an_initial_gamma_far_beyond_it_is_refused(self):
        with pytest.raises(ValueError, match=r"max_update_norm must be at least scale .* = 0.2, or .* got 0.01"):
            self.layer(most=0.01, gamma_init=0.1)

    def test_thin_atoms_are_refused(self):
        with pytest.raises(ValueError, match=r"max_update_norm must be None for thin atoms, .* got 0.25"):
            self.layer(atom_features=4)


def test_welch_bound_of_the_paper():
    assert math.isclose(welch_bound(1523, 384), 4517.44, abs_tol=0.01)
    assert welch_bound(3, 8) == 0.0
    layer = DSC(384, num_atoms=1523, top_k=4)
    # An orthogonal init sits near the bound: 4523 against 4517.
    assert 0 < frame_excess(layer.bank.u) < 10


def test_frame_excess_is_zero_for_a_tight_frame_and_full_for_equal_rows():
    basis = torch.eye(4)
    assert abs(frame_excess(torch.cat([basis, basis * 3]))) < 1e-12
    assert math.isclose(frame_excess(torch.ones(6, 3)), 30 - welch_bound(6, 3))


@pytest.mark.parametrize("bound", [certified_spectral_bound, lambda layer: spectral_norm(layer, torch.randn(2, 4))])
def test_what_stands_around_a_layer_is_named(bound):
    around = Residual(torch.nn.Linear(4, 4), DSC(4, num_atoms=5, top_k=2))
    with pytest.raises(TypeError, match=r"layer must be a DSC, got Residual: pass layer\.dsc"):
        bound(around)
