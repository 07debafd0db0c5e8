import json
import math

import pytest
import torch
from torch import nn

from torchdsc import DSC, Residual
from torchdsc.baselines import DenseFFN, MixtureOfLoRAs, StandardMoE
from torchdsc.diagnostics import RoutingMonitor
from torchdsc.diagnostics.routing import shared
from torchdsc.ops import ngram_codes


def only(monitor):
    (layer,) = monitor.layers()
    return layer


def one_hot_dsc(num_atoms=6, top_k=1):
    """A layer whose token e_j selects atom j."""
    layer = DSC.basic(num_atoms, num_atoms=num_atoms, top_k=top_k)
    with torch.no_grad():
        layer.router.weight.copy_(torch.eye(num_atoms))
    return layer


def tokens(*atoms, num_atoms=6):
    return torch.eye(num_atoms)[list(atoms)]


def test_shared_selections_count_in_any_order():
    assert shared(torch.tensor([[0, 1], [2, 3]]), torch.tensor([[1, 0], [4, 3]])) == 0.75


class TestDSC:
    def test_counts_a_routing_made_by_hand(self):
        layer = one_hot_dsc()
        with RoutingMonitor(layer) as monitor:
            layer(tokens(0, 0, 1, 1))
            layer(tokens(3, 3, 3, 3).view(2, 2, 6))
        routing = only(monitor)
        assert routing.num_atoms == 6
        assert routing.utilization == pytest.approx(3 / 6)
        assert routing.load == pytest.approx([4 / 8, 2 / 8, 2 / 8, 0, 0, 0])
        assert routing.effective_atoms == pytest.approx(math.exp(0.5 * math.log(2) + 0.5 * math.log(4)))

    def test_histogram_of_loads_in_multiples_of_the_even_share(self):
        layer = one_hot_dsc(num_atoms=8)
        # The even share is 8: none, 1, 3, 4, 8, 15, 16 and 17 more.
        with RoutingMonitor(layer) as monitor:
            layer(tokens(*([1] + [2] * 3 + [3] * 4 + [4] * 8 + [5] * 15 + [6] * 16 + [7] * 17), num_atoms=8))
        assert only(monitor).histogram == pytest.approx([1 / 8, 1 / 8, 1 / 8, 1 / 8, 2 / 8, 2 / 8, 0])

    def test_keeps_the_selections_of_the_first_tokens(self):
        layer = one_hot_dsc()
        with RoutingMonitor(layer, tokens=3) as monitor:
            layer(tokens(4, 0, 2, 1))
            layer(tokens(3, 3, 3, 3))
        (selected,) = monitor.selections()
        assert selected.tolist() == [[4], [0], [2]]
        with RoutingMonitor(layer) as monitor:
            layer(tokens(4))
        assert monitor.selections() == []

    @pytest.mark.parametrize(("atoms", "effective"), [((2,) * 5, 1.0), (range(6), 6.0)], ids=["collapsed", "uniform"])
    def test_effective_atoms_at_the_ends(self, atoms, effective):
        layer = one_hot_dsc()
        with RoutingMonitor(layer) as monitor:
            layer(tokens(*atoms))
        assert only(monitor).effective_atoms == pytest.approx(effective)

    @pytest.mark.parametrize("options", [{}, {"logit_clamp": 0.3}, {"gate": "mean"}, {"router_bias": True}])
    def test_strength_and_gate_are_those_of_the_layer(self, options):
        layer, x = DSC(5, 7, num_atoms=11, top_k=3, **options), torch.randn(2, 9, 5)
        torch.nn.init.normal_(layer.router.weight)
        with RoutingMonitor(layer) as monitor:
            layer(x)
        routing = layer.route(x)
        assert only(monitor).strength == pytest.approx(routing.strength.mean().item(), rel=1e-5)
        divisor = 3 if options.get("gate") == "mean" else 1
        assert only(monitor).gate == pytest.approx((routing.strength / divisor).tanh().mean().item(), rel=1e-5)
        assert only(monitor).utilization == len(routing.indices.unique()) / 11


def test_where_atoms_are_hashed_there_is_no_gate_to_watch():
    layer = DSC(6, num_atoms=10, top_k=4, router="ngram", frame_weight=0.0)
    with RoutingMonitor(layer) as monitor:
        layer(torch.randn(50, 6), router_input=ngram_codes(torch.arange(50), (1, 2)))
    routing = only(monitor)
    assert (routing.num_atoms, routing.strength, routing.gate) == (10, None, None)
    assert routing.utilization == 1.0


@pytest.mark.parametrize(
    "make",
    [
        lambda: StandardMoE(5, 4, 6, 2),
        lambda: MixtureOfLoRAs(5, num_experts=6, rank=2, top_k=2),
    ],
    ids=["moe", "mixture of loras"],
)
def test_experts_are_counted_and_have_no_gate(make):
    layer, x = make(), torch.randn(3, 8, 5)
    with RoutingMonitor(layer) as monitor:
        layer(x)
    routing, chosen = only(monitor), layer.router(x.view(-1, 5)).indices
    counts = torch.bincount(chosen.flatten(), minlength=6).sort(descending=True).values
    assert routing.num_atoms == 6
    assert routing.load == pytest.approx((counts / counts.sum()).tolist())
    assert routing.strength is None
    assert routing.gate is None


def test_layers_come_in_order_and_those_without_tokens_are_left_out():
    model = nn.ModuleList(
        [
            DenseFFN(5, 4),
            Residual(DenseFFN(5, 4), DSC(5, num_atoms=11, top_k=3)),
            StandardMoE(5, 4, 6),
            one_hot_dsc(),
        ]
    )
    with RoutingMonitor(model) as monitor:
        for layer in model[:3]:
            layer(torch.randn(4, 5))
        model[3](torch.zeros(0, 6))
    assert [layer.num_atoms for layer in monitor.layers()] == [11, 6]


def test_long_loads_are_thinned_for_the_record():
    layer = DSC(5, num_atoms=1523, top_k=4)
    with RoutingMonitor(layer) as monitor:
        layer(torch.randn(300, 5))
    load = only(monitor).load
    assert len(load) == 200
    assert load == sorted(load, reverse=True)
    assert json.loads(json.dumps(only(monitor).as_dict()))["num_atoms"] == 1523


@pytest.mark.parametrize("fails", [False, True])
def test_leaves_nothing_behind(fails):
    layer = one_hot_dsc()
    expected, monitor = layer(tokens(1, 2)), RoutingMonitor(layer)
    try:
        with monitor:
            assert torch.equal(layer(tokens(1, 2)), expected)
            if fails:
                raise RuntimeError
    except RuntimeError:
        pass
    layer(tokens(3, 4, 5))
    assert not layer.router._forward_hooks
    assert only(monitor).utilization == pytest.approx(2 / 6)


def test_gradients_flow_as_without_it():
    layer, x = one_hot_dsc(top_k=2).eval(), tokens(1, 2, 5)
    expected = torch.autograd.grad(layer(x).sum(), layer.router.weight)[0]
    with RoutingMonitor(layer):
        actual = torch.autograd.grad(layer(x).sum(), layer.router.weight)[0]
    assert torch.equal(actual, expected)
