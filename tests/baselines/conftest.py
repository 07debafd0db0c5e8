import pytest
import torch


@pytest.fixture
def equal_with_gradients():
    """Compare two functions of the same parameters: output and the gradient of every parameter and of x."""

    def compare(function, expected_function, parameters, x, tolerance=1e-12):
        x = x.clone().requires_grad_()
        inputs = [x, *parameters]
        results = []
        for f in (function, expected_function):
            y = f(x)
            weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
            results.append([y, *torch.autograd.grad(y, inputs, weight, materialize_grads=True)])
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)

    return compare


@pytest.fixture
def literal_choice():
    """A token's experts and weights, by a sort of Python floats: [(expert, weight), ...]."""

    def choose(router, token):
        x = token
        if router.linear.norm.__class__ is torch.nn.LayerNorm:
            x = (x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt()
        exponentials = [(x @ row).exp() for row in router.linear.weight]
        probabilities = [e / sum(exponentials) for e in exponentials]
        order = sorted(range(len(probabilities)), key=lambda j: -probabilities[j].item())[: router.top_k]
        total = sum(probabilities[j] for j in order) if router.normalize_weights else 1.0
        return [(j, probabilities[j] / total) for j in order]

    return choose
