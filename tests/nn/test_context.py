import pytest
import torch

from torchdsc import DSC, ShortConvolution, certified_spectral_bound, spectral_norm
from torchdsc.baselines import PEER, MixtureOfLoRAs, StandardMoE
from torchdsc.nn import LinearRouter


def literal(context, x, positions=None):
    """Token by token and distance by distance."""
    y = torch.zeros_like(x)
    for sequence in range(x.shape[0]):
        for t in range(x.shape[1]):
            for distance in range(context.num_tokens):
                place = t if positions is None else positions[sequence, t]
                if t >= distance and place >= distance:
                    y[sequence, t] += context.weight[distance] * x[sequence, t - distance]
    return y


@pytest.fixture
def context():
    made = ShortConvolution(5, 4, dtype=torch.float64)
    torch.nn.init.normal_(made.weight)
    return made


@pytest.mark.parametrize("tokens", [0, 1, 3, 4, 9])
def test_equals_literal_loop(context, tokens):
    x = torch.randn(2, tokens, 5, dtype=torch.float64)
    torch.testing.assert_close(context(x), literal(context, x))
    assert torch.equal(context(x[0]), context(x)[0])


def test_packed_sequences_see_nothing_of_each_other(context):
    x = torch.randn(2, 7, 5, dtype=torch.float64)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3], [0, 1, 2, 3, 4, 0, 0]])
    torch.testing.assert_close(context(x, positions=positions), literal(context, x, positions))
    torch.testing.assert_close(context(x[:1], positions=positions[:1])[:, 3:], context(x[:1, 3:]))
    x[0, 2] = torch.nan
    assert context(x, positions=positions)[0, 3:].isfinite().all()


def test_is_added_onto_another(context):
    x, onto = torch.randn(2, 2, 7, 5, dtype=torch.float64)
    torch.testing.assert_close(context(x, onto=onto), onto + literal(context, x))
    assert torch.equal(context(x, length=3, onto=onto[:, 4:]), context(x, onto=onto)[:, 4:])


@pytest.mark.parametrize("length", [0, 1, 5])
def test_the_past_is_seen_and_not_returned(context, length):
    x = torch.randn(2, 8, 5, dtype=torch.float64)
    assert torch.equal(context(x, length=length), context(x)[:, 8 - length :])


def test_gradients(context):
    x = torch.randn(2, 6, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: torch.func.functional_call(context, {"weight": w}, (x,)),
                                    (x, context.weight))  # fmt: skip


def test_starts_with_the_token_itself_foremost():
    assert ShortConvolution(2, 3).weight.tolist() == [[1.0, 1.0], [0.5, 0.5], [0.5, 0.5]]
    other = ShortConvolution(1, 3, own=0.0, earlier=0.25)
    assert other.weight.tolist() == [[0.0], [0.25], [0.25]]


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: ShortConvolution(0, 2), "features must be >= 1, got 0"),
        (lambda: ShortConvolution(4, 1), "num_tokens must be >= 2, got 1"),
        (lambda: ShortConvolution(4, 2)(torch.zeros(3, 5)), r"x must have shape \(..., T, 4\), got \(3, 5\)"),
        (lambda: ShortConvolution(4, 2)(torch.zeros(4)), r"x must have shape \(..., T, 4\), got \(4,\)"),
        (
            lambda: ShortConvolution(4, 2)(torch.zeros(3, 4), length=2, onto=torch.zeros(3, 4)),
            r"onto must have shape \(2, 4\), got \(3, 4\)",
        ),
        (lambda: ShortConvolution(4, 2)(torch.zeros(3, 4), length=4), r"length must be in \[0, 3\], got 4"),
        (
            lambda: ShortConvolution(4, 2)(torch.zeros(3, 4), positions=torch.zeros(2)),
            r"positions must broadcast to \(3,\), got shape \(2,\)",
        ),
        (
            lambda: ShortConvolution(4, 2)(torch.zeros(2, 3, 4), positions=torch.zeros(4, 3)),
            r"positions must broadcast to \(2, 3\), got shape \(4, 3\)",
        ),
        (
            lambda: ShortConvolution(4, 2)(torch.zeros(1, 3, 4), positions=torch.zeros(2, 3)),
            r"positions must broadcast to \(1, 3\), got shape \(2, 3\)",
        ),
    ],
)
def test_errors(call, match):
    with pytest.raises(ValueError, match=match):
        call()


ROUTED = {
    "dsc": lambda: DSC(6, num_atoms=9, top_k=3, gamma_init=1.0),
    "moe": lambda: StandardMoE(6, 5, 4),
    "mixture_of_loras": lambda: MixtureOfLoRAs(6, num_experts=7, rank=2),
    "peer": lambda: PEER(6, num_experts=9),
}


@pytest.mark.parametrize("kind", ROUTED)
class TestRouterInput:
    def layer(self, kind):
        layer = ROUTED[kind]()
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter)
        return layer

    def test_decides_the_routing_alone(self, kind):
        layer, x, other = self.layer(kind), torch.randn(2, 8, 6), torch.randn(2, 8, 6)
        seen = []
        router = layer.router if kind in ("dsc", "peer") else layer.router.linear
        router.register_forward_hook(lambda module, args, output: seen.append(args[0].clone()))
        y = layer(x, router_input=other)
        assert torch.equal(seen[0], other.reshape(-1, 6))
        assert not torch.allclose(y, layer(x))
        torch.testing.assert_close(layer(x, router_input=x), layer(x))
        if kind in ("dsc", "mixture_of_loras"):
            # Composed of x, the update is linear in it with the routing held fixed.
            torch.testing.assert_close(layer(2 * x, router_input=other), 2 * y)

    def test_wrong_shape_and_dtype(self, kind):
        layer = self.layer(kind)
        with pytest.raises(ValueError, match=r"router_input must have the shape of x, \(3, 6\), got \(2, 6\)"):
            layer(torch.randn(3, 6), router_input=torch.randn(2, 6))
        with pytest.raises(TypeError, match="must have the dtype of the parameters"):
            layer(torch.randn(3, 6), router_input=torch.randn(3, 6).double())


def test_route_and_bound_follow_the_router_input():
    layer = DSC(6, num_atoms=9, top_k=3, gamma_init=0.7)
    assert isinstance(layer.router, LinearRouter)
    x, other = torch.randn(4, 6), torch.randn(4, 6)
    routing = layer.route(other)
    assert torch.equal(layer(x, routing=routing), layer(x, router_input=other))
    y = torch.einsum("ti,tio->to", x, layer.delta_weight(x, other))
    torch.testing.assert_close(layer(x, router_input=other), y)
    assert spectral_norm(layer, x, other).max() <= certified_spectral_bound(layer) * (1 + 1e-6)
