import math

import pytest
import torch
from torch import nn

from torchdsc import DSC, Residual, build_optimizer, certified_spectral_bound, regularization, spectral_norm
from torchdsc.baselines import MixtureOfLoRAs, StandardMoE
from torchdsc.bounds import welch_bound
from torchdsc.diagnostics import Diagnostics, coherence, effective_rank, sensitivity
from torchdsc.ops import ngram_codes


def routed_by_hand(atoms, num_atoms=6):
    """A layer, and tokens of which the i-th selects ``atoms[i]``."""
    layer = DSC.basic(num_atoms, num_atoms=num_atoms, top_k=1)
    with torch.no_grad():
        layer.router.weight.copy_(torch.eye(num_atoms))
    return layer, torch.eye(num_atoms)[list(atoms)]


def measured(model, x, **options):
    diagnostics = Diagnostics(model, **options)
    diagnostics.begin()
    model(x)
    (health,) = diagnostics.end().layers
    return health


class TestWithoutAStep:
    def test_counts_a_routing_made_by_hand(self):
        layer, x = routed_by_hand([0, 0, 1, 1, 3, 3, 3, 3])
        health = measured(layer, x)
        assert (health.num_atoms, health.top_k, health.tokens, health.most_rank_u) == (6, 1, 8, 6)
        assert health.utilization == health.unused == pytest.approx(0.5)
        assert health.effective_atoms == pytest.approx(math.exp(0.5 * math.log(2) + 0.5 * math.log(4)))

    def test_unused_counts_all_measurements(self):
        layer, x = routed_by_hand([0, 1])
        diagnostics = Diagnostics(layer)
        found = []
        for tokens in (x, x.flip(1)):
            diagnostics.begin()
            layer(tokens)
            (health,) = diagnostics.end().layers
            found.append((health.utilization, health.unused))
        assert found == [pytest.approx((1 / 3, 2 / 3)), pytest.approx((1 / 3, 1 / 3))]

    @pytest.mark.parametrize("gate", ["sum", "mean"])
    def test_strength_and_gate_are_those_of_the_layer(self, gate):
        layer, x = DSC(5, 7, num_atoms=11, top_k=3, gate=gate), torch.randn(2, 9, 5)
        nn.init.normal_(layer.router.weight)
        health, strength = measured(layer, x), layer.route(x).strength
        assert health.strength == pytest.approx(strength.mean().item(), rel=1e-5)
        assert health.gate == pytest.approx((strength / (3 if gate == "mean" else 1)).tanh().mean().item(), rel=1e-5)

    def test_clamped_and_saturated_are_shares(self):
        layer, x = routed_by_hand([0, 1, 2, 3])
        x = x * torch.tensor([[1.0], [20.0], [30.0], [-1.0]])
        health = measured(layer, x)
        assert health.clamped == health.saturated == pytest.approx(0.5)

    def test_geometry_is_that_of_the_bank(self):
        layer = DSC(8, 6, num_atoms=20, top_k=2)
        for rows in (layer.bank.u, layer.bank.v):
            nn.init.normal_(rows)
        health = measured(layer, torch.randn(3, 8))
        for side in "uv":
            rows = getattr(layer.bank, side)
            assert getattr(health, f"effective_rank_{side}") == pytest.approx(effective_rank(rows), rel=1e-4)
            assert getattr(health, f"coherence_{side}") == pytest.approx(coherence(rows), rel=1e-3)
            least = welch_bound(*rows.shape) / (20 * 19)
            assert getattr(health, f"excess_{side}") == pytest.approx(coherence(rows) ** 2 - least, rel=1e-3)

    def test_a_tight_frame_has_no_excess(self):
        layer = DSC(4, num_atoms=12, top_k=2)
        with torch.no_grad():
            layer.bank.u.copy_(torch.eye(4).repeat(3, 1))
        assert measured(layer, torch.randn(3, 4)).excess_u == pytest.approx(0.0, abs=1e-6)

    def test_rank_of_the_composed_matrices_is_that_of_the_layer(self):
        layer, x = DSC(8, 6, num_atoms=20, top_k=3), torch.randn(5, 8)
        nn.init.normal_(layer.router.weight)
        squares = torch.linalg.svdvals(layer.delta_weight(x)).square()
        share = squares / squares.sum(-1, keepdim=True)
        ranks = torch.special.entr(share).sum(-1).exp()
        assert measured(layer, x).effective_rank_dw == pytest.approx(ranks.mean().item(), rel=1e-4)
        assert ranks.min() > 1
        assert ranks.max() <= 3.001
        nn.init.zeros_(layer.gamma)
        assert measured(layer, x).effective_rank_dw is None

    def test_highest_ranks_are_each_sides_own(self):
        health = measured(DSC(16, 64, num_atoms=40, top_k=2), torch.randn(3, 16))
        assert (health.most_rank_u, health.most_rank_v) == (16, 40)

    def test_masked_tokens_do_not_count(self):
        layer, x = routed_by_hand([0, 1, 2, 3, 3, 3])
        diagnostics = Diagnostics(layer)
        diagnostics.begin()
        layer(x, token_mask=torch.tensor([True, True, True, False, False, False]))
        (health,) = diagnostics.end().layers
        assert health.tokens == 3
        assert health.effective_atoms == pytest.approx(3.0)

    def test_no_gate_is_told_where_there_is_none(self):
        health = measured(DSC(8, num_atoms=9, top_k=3, gate="none"), torch.randn(5, 8))
        assert health.gate is health.saturated is None
        assert health.gate_kind == "none"

    def test_what_is_not_finite_is_told_and_does_not_raise(self):
        layer, x = DSC(8, num_atoms=9, top_k=3), torch.randn(5, 8)
        x[2] = torch.inf
        assert 0 < measured(layer, x).measured_norm < 1
        with torch.no_grad():
            layer.bank.u.fill_(torch.nan)
        health = measured(layer, torch.randn(5, 8))
        assert math.isnan(health.measured_norm)
        assert math.isnan(health.effective_rank_u)
        assert health.effective_rank_v > 1

    def test_rectified_layers_need_their_input(self):
        layer, x = DSC(8, num_atoms=9, top_k=3, activation="relu"), torch.randn(50, 8)
        diagnostics = Diagnostics(layer)
        diagnostics.begin()
        layer(x=x)
        assert diagnostics.end().layers[0].measured_norm == pytest.approx(
            spectral_norm(layer, x).max().item(), rel=1e-5
        )

    def test_geometry_of_fewer_atoms_than_features(self):
        layer = DSC(16, num_atoms=5, top_k=2)
        nn.init.normal_(layer.bank.u)
        health = measured(layer, torch.randn(3, 16))
        assert health.effective_rank_u == pytest.approx(effective_rank(layer.bank.u), rel=1e-4)
        assert health.coherence_v == pytest.approx(0.0, abs=1e-3)

    @pytest.mark.parametrize("options", [{}, {"activation": "relu"}, {"atom_features": 4}], ids=str)
    def test_norms_are_the_layers(self, options):
        layer, x = DSC(8, num_atoms=9, top_k=3, **options), torch.randn(50, 8)
        nn.init.normal_(layer.router.weight)
        health = measured(layer, x)
        assert health.certified_norm == pytest.approx(certified_spectral_bound(layer))
        assert health.measured_norm == pytest.approx(spectral_norm(layer, x).max().item(), rel=1e-5)

    def test_no_token_is_looked_at_if_told_so(self):
        layer = DSC(8, num_atoms=9, top_k=3)
        health = measured(layer, torch.randn(50, 8), tokens=0)
        assert health.utilization is health.measured_norm is health.agreement is None
        assert health.certified_norm
        assert health.effective_rank_u

    def test_no_tokens(self):
        health = measured(DSC(8, num_atoms=9, top_k=3), torch.randn(0, 8))
        assert health.utilization is None

    @pytest.mark.parametrize(
        "layer",
        [StandardMoE(8, 16, num_experts=4), MixtureOfLoRAs(8, num_experts=4, top_k=2, rank=1)],
        ids=lambda e: type(e).__name__,
    )
    def test_layers_without_a_bank(self, layer):
        health = measured(layer, torch.randn(50, 8))
        assert health.num_atoms == 4
        assert health.utilization == 1.0
        assert health.certified_norm is health.effective_rank_u is health.strength is health.agreement is None

    def test_hashed_atoms_have_no_gate_to_watch(self):
        layer, tokens = DSC(8, num_atoms=10, top_k=4, router="ngram"), torch.randint(9, (2, 7))
        diagnostics = Diagnostics(layer)
        diagnostics.begin()
        layer(torch.randn(2, 7, 8), router_input=ngram_codes(tokens, (2, 3)))
        (health,) = diagnostics.end().layers
        assert health.gate is health.agreement is None
        assert 0 < health.measured_norm < health.certified_norm

    def test_hooks_are_gone_afterwards(self):
        layer, x = routed_by_hand([0, 1])
        diagnostics = Diagnostics(layer)
        with diagnostics.measuring() as results:
            layer(x)
        layer(x.flip(0))
        assert len(results) == 1
        assert not layer._forward_pre_hooks
        assert not layer.router._forward_hooks

    def test_modes_are_as_before(self):
        layer = DSC(8, num_atoms=9, top_k=3)
        layer.router.eval()
        measured(layer, torch.randn(5, 8))
        assert layer.training
        assert not layer.router.training

    def test_model_without_routed_layers(self):
        with pytest.raises(ValueError, match="model must contain a routed layer, got Linear"):
            Diagnostics(nn.Linear(2, 2))


class TestSensitivities:
    def test_are_those_of_the_tokens_that_were_seen(self):
        layer, x = DSC(6, 5, num_atoms=12, top_k=2), torch.randn(9, 6)
        other = DSC(6, 5, num_atoms=12, top_k=2)
        for each in (layer, other):
            torch.nn.init.normal_(each.router.weight)
        model = nn.ModuleList([layer, other])
        diagnostics = Diagnostics(model)
        diagnostics.begin()
        layer(x)
        other(x, router_input=torch.randn(9, 6))
        # The second's router sees another input.
        assert diagnostics.sensitivities() == {layer: sensitivity(layer, x)}
        health = diagnostics.end().layers[0]
        assert health.tokens == 9, "what sensitivities route is not measured"

    @pytest.mark.parametrize("options", [{"activation": "relu"}, {"offset": True}, {"atom_features": 3}])
    def test_leave_out_layers_that_have_none(self, options):
        layer = DSC(6, 6, num_atoms=12, top_k=2, **options)
        diagnostics = Diagnostics(layer)
        diagnostics.begin()
        layer(torch.randn(9, 6))
        assert diagnostics.sensitivities() == {}

    @pytest.mark.parametrize("name", ["bank.u", "gamma", "router.weight"])
    def test_leave_out_layers_that_a_step_has_spoilt(self, name):
        layer = DSC(6, 5, num_atoms=12, top_k=2)
        diagnostics = Diagnostics(layer)
        diagnostics.begin()
        layer(torch.randn(9, 6))
        with torch.no_grad():
            layer.get_parameter(name)[0] = torch.nan
        assert diagnostics.sensitivities() == {}

    def test_leave_out_inputs_that_are_not_finite(self):
        layer = DSC(6, 5, num_atoms=12, top_k=2)
        diagnostics = Diagnostics(layer)
        diagnostics.begin()
        layer(torch.full((9, 6), torch.inf))
        assert diagnostics.sensitivities() == {}


class TestAroundSteps:
    @pytest.fixture
    def model(self):
        return Residual(nn.Linear(8, 8), DSC(8, num_atoms=12, top_k=2, atom_init_norm=1.0))

    def step(self, model, optimizer, diagnostics):
        diagnostics.begin()
        (model(torch.randn(30, 8)).square().mean() + regularization(model).total).backward()
        optimizer.step()
        health = diagnostics.end()
        optimizer.zero_grad()
        return health

    def test_turn_is_the_angle_of_a_step(self, model):
        diagnostics = Diagnostics(model)
        diagnostics.begin()
        model(torch.randn(30, 8))
        with torch.no_grad():
            # Half of the atoms turn in the plane of themselves and an orthogonal row.
            u = model.dsc.bank.u
            other = torch.randn_like(u)
            other -= (other * u).sum(1, keepdim=True) * u / u.square().sum(1, keepdim=True)
            angle = math.radians(30)
            turned = math.cos(angle) * u + math.sin(angle) * other / other.norm(dim=1, keepdim=True) * u.norm(
                dim=1, keepdim=True
            )
            u[:6] = turned[:6] * 3.0
        assert diagnostics.end().layers[0].turn == pytest.approx(30.0, abs=0.1)

    def test_gradient_norms_by_component(self, model):
        optimizer, diagnostics = build_optimizer(model, learning_rate=1e-3, weight_decay=0.0), Diagnostics(model)
        diagnostics.begin()
        (model(torch.randn(30, 8)).square().mean() + regularization(model).total).backward()
        norms = diagnostics.end().gradient_norms
        bank, dsc = model.dsc.bank, model.dsc
        assert norms["atoms"] == pytest.approx(math.hypot(bank.u.grad.norm(), bank.v.grad.norm()), rel=1e-5)
        assert norms["router"] == pytest.approx(dsc.router.weight.grad.norm().item(), rel=1e-5)
        assert norms["gamma"] == pytest.approx(dsc.gamma.grad.norm().item(), rel=1e-5)
        assert norms["other"] == pytest.approx(math.hypot(*(p.grad.norm() for p in model.base.parameters())), rel=1e-5)
        optimizer.zero_grad()
        assert diagnostics.end().gradient_norms == {}

    def test_agreement_is_of_the_selections_before_and_after_a_step(self, model):
        diagnostics, x = Diagnostics(model), torch.randn(30, 8)
        agreements = []
        for factor in (1.0, -1.0):
            diagnostics.begin()
            model(x)
            with torch.no_grad():
                model.dsc.router.weight.mul_(factor)
            agreements.append(diagnostics.end().layers[0].agreement)
        assert agreements[0] == 1.0
        # The two highest of twelve logits are now the lowest.
        assert agreements[1] < 0.2

    def test_training_is_the_same_with_and_without(self, model):
        states = []
        start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        for measures in (False, True):
            model.load_state_dict(start)
            torch.manual_seed(0)
            optimizer, diagnostics = build_optimizer(model, learning_rate=1e-2, weight_decay=0.0), Diagnostics(model)
            for _ in range(3):
                if measures:
                    self.step(model, optimizer, diagnostics)
                else:
                    (model(torch.randn(30, 8)).square().mean() + regularization(model).total).backward()
                    optimizer.step()
                    optimizer.zero_grad()
            states.append([parameter.detach().clone() for parameter in model.parameters()])
        assert all(torch.equal(one, other) for one, other in zip(*states, strict=True))

    def test_no_random_number_is_drawn(self):
        model = DSC(8, num_atoms=5000, top_k=2)
        state = torch.get_rng_state()
        Diagnostics(model).end()
        assert torch.equal(torch.get_rng_state(), state)

    def test_row_sparse_gradients(self):
        model = DSC(8, num_atoms=50, top_k=2, sparse_gradients=True, frame_weight=0.0)
        optimizer, diagnostics = build_optimizer(model, learning_rate=1e-2, weight_decay=0.0), Diagnostics(model)
        health = self.step(model, optimizer, diagnostics)
        assert health.gradient_norms["atoms"] > 0
        assert health.layers[0].turn > 0

    def test_a_shared_bank_is_measured_once(self, monkeypatch):
        first = DSC(8, num_atoms=12, top_k=2)
        model = nn.Sequential(first, DSC(8, num_atoms=12, top_k=2, bank=first.bank))
        calls = []
        whole = type(first.bank).forward
        monkeypatch.setattr(
            type(first.bank), "forward", lambda *args, **kw: calls.append(args[1]) or whole(*args, **kw)
        )
        one, other = Diagnostics(model, tokens=0).end().layers
        assert one.effective_rank_u == other.effective_rank_u
        assert len(calls) == 1


class TestMetrics:
    @pytest.fixture
    def health(self):
        model = nn.Sequential(*(DSC(8, num_atoms=9, top_k=3) for _ in range(5)))
        diagnostics = Diagnostics(model)
        with diagnostics.measuring() as results:
            model(torch.randn(20, 8))
        return results[0]

    def test_means_over_layers(self, health):
        metrics = health.metrics()
        assert metrics["dsc/strength"] == pytest.approx(sum(layer.strength for layer in health.layers) / 5)
        assert all(isinstance(value, float) and key.count("/") == 1 for key, value in metrics.items())

    def test_keys_are_capped_by_leaving_layers_out(self, health):
        means = len(health.metrics())
        for most in (means, means + 20, 40, 1000):
            metrics = health.metrics(per_layer=True, max_keys=most)
            assert len(metrics) <= most
        layers = {
            key.split("/")[1] for key in health.metrics(per_layer=True, max_keys=2 * means + 20) if key.count("/") == 2
        }
        assert layers <= {"0", "4", "2", "1", "3"}
        assert "0" in layers
        assert health.metrics(per_layer=True, max_keys=1000)["dsc/3/gate"] == health.layers[3].gate
