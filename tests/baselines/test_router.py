import pytest
import torch

from torchdsc import regularization
from torchdsc.baselines import MixtureOfLoRAs, SoftmaxRouter, StandardMoE


def make(num_experts=5, top_k=2, **options):
    router = SoftmaxRouter(4, num_experts, top_k, dtype=torch.float64, **options)
    torch.nn.init.normal_(router.linear.weight)
    return router


@pytest.fixture
def x():
    return torch.randn(9, 4, dtype=torch.float64)


@pytest.mark.parametrize("normalize_weights", [True, False])
@pytest.mark.parametrize("norm", ["none", "layer"])
def test_chooses_as_a_literal_sort_does(x, literal_choice, norm, normalize_weights):
    router = make(norm=norm, normalize_weights=normalize_weights)
    choice = router(x)
    for t in range(len(x)):
        experts, weights = zip(*literal_choice(router, x[t]), strict=True)
        assert choice.indices[t].tolist() == list(experts)
        torch.testing.assert_close(choice.coefficients[t], torch.stack(weights), rtol=1e-12, atol=0)


def test_statistics_are_sums_over_counted_tokens(x):
    router, mask = make(), torch.tensor([1, 0, 1, 1, 0, 1, 0, 0, 1]).bool()
    statistics = router(x, mask, collect=True).statistics
    logits = x[mask] @ router.linear.weight.T
    probabilities = logits.softmax(-1)
    top = probabilities.topk(2)
    torch.testing.assert_close(statistics.num_tokens.item(), 5.0)
    torch.testing.assert_close(statistics.probability_sum, probabilities.sum(0))
    torch.testing.assert_close(statistics.strength_sum, top.values.sum())
    torch.testing.assert_close(statistics.squared_log_normalizer_sum, logits.logsumexp(-1).square().sum())
    torch.testing.assert_close(statistics.load, torch.bincount(top.indices.flatten(), minlength=5).double())


def test_jitter_only_in_training_and_from_the_seed(x):
    router = make(jitter=0.5)

    def weights(seed):
        torch.manual_seed(seed)
        return router(x).coefficients

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))
    router.eval()
    assert torch.equal(weights(1), weights(2))


def test_jitter_is_the_standard_deviation_on_logits():
    router, x = make(2, 2, jitter=0.3, normalize_weights=False), torch.zeros(20_000, 4, dtype=torch.float64)
    choice = router(x)
    log_weights = choice.coefficients.log().gather(1, choice.indices)
    assert (log_weights[:, 0] - log_weights[:, 1]).std().item() == pytest.approx(0.3 * 2**0.5, rel=0.02)


@pytest.mark.parametrize("normalize_weights", [True, False])
def test_weights_of_tokens_that_are_not_finite_are_nan_and_only_those(x, normalize_weights):
    router = make(normalize_weights=normalize_weights)
    with torch.no_grad():  # One infinite logit: the other experts' share is 0.
        router.linear.weight[:, 0] = torch.tensor([-1.0, -1.0, -1.0, 1.0, -1.0])
    x[2, 1], x[5, 0] = torch.nan, torch.inf
    weights = router(x).coefficients
    assert weights.isnan().all(1).tolist() == [t in (2, 5) for t in range(9)]
    assert weights.isnan().any(1).sum() == 2


class TestOneExpert:
    """A weight that is divided by itself is always 1: the router would learn nothing from the task."""

    @pytest.fixture(params=["moe", "mixture"])
    def make_layer(self, request):
        def build(**options):
            if request.param == "moe":
                return StandardMoE(4, 6, 5, 1, dtype=torch.float64, **options)
            layer = MixtureOfLoRAs(4, num_experts=5, rank=2, top_k=1, dtype=torch.float64, **options)
            torch.nn.init.normal_(layer.up)
            return layer

        return build

    def test_its_weight_is_its_probability(self, x):
        router = make(top_k=1)
        torch.testing.assert_close(router(x).coefficients, router.linear(x).softmax(-1).amax(-1, keepdim=True))

    def test_routers_learn_from_the_task(self, x, make_layer):
        layer = make_layer()
        (layer(x).square().sum() + 0.0 * regularization(layer).total).backward()
        # Not rounding of a weight of 1.
        assert layer.router.linear.weight.grad.abs().max() > 1e-6

    def test_a_weight_of_one_is_not_trained(self, x, make_layer):
        layer = make_layer(normalize_weights=True)
        with pytest.raises(ValueError, match="normalize_weights must be False to train with top_k = 1, got True"):
            layer(x)
        assert (layer.eval().router(x).coefficients == 1).all()
        assert layer(x).isfinite().all()


def test_several_are_normalised_by_default(x):
    torch.testing.assert_close(make(top_k=2)(x).coefficients.sum(-1), torch.ones(9, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_routes_in_float32_also_under_autocast(dtype):
    router = SoftmaxRouter(4, 5, 2, dtype=dtype)
    x = torch.randn(9, 4, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        choice = router(x, collect=True)
    assert choice.coefficients.dtype == choice.statistics.probability_sum.dtype == torch.float32
    assert torch.equal(choice.coefficients, router(x).coefficients)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"top_k": 0}, r"top_k must be in \[1, num_experts = 5\], got 0"),
        ({"top_k": 6}, r"top_k must be in \[1, num_experts = 5\], got 6"),
        ({"jitter": -0.1}, "jitter must be finite and >= 0, got -0.1"),
        ({"jitter": float("nan")}, "jitter must be finite and >= 0"),
    ],
)
def test_errors(options, match):
    with pytest.raises(ValueError, match=match):
        make(**options)
