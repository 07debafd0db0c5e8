"""Inputs of the composition and comparisons of what comes out, for its ladder and the kernels' own tests."""

import torch
from hypothesis import strategies as st

# Largest error against float64 relative to the largest entry, measured (5e-7, 8e-3) times two.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}


def device_of(impl):
    """Where an implementation is tested: Triton's on a GPU, interpreted on the CPU where there is none."""
    return "cuda" if impl == "triton" and torch.cuda.is_available() else "cpu"


def make_inputs(tokens, atoms, top_k, d_in, d_out, dtype=torch.float64, seed=0, scale=1.0, impl="auto"):
    """x, u times ``scale``, v, indices and coefficients; all but the indices require gradients."""
    generator, device = torch.Generator().manual_seed(seed), device_of(impl)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

    x, u, v = normal(tokens, d_in), normal(atoms, d_in) * scale, normal(atoms, d_out)
    indices = torch.randint(atoms, (tokens, top_k), generator=generator).to(device)
    coefficients = torch.rand(tokens, top_k, generator=generator, dtype=torch.float64)
    coefficients = coefficients.to(device, torch.promote_types(dtype, torch.float32))
    return [t.requires_grad_() for t in (x, u, v)] + [indices, coefficients.requires_grad_()]


def drawn(most_tokens, most_atoms):
    """Arguments of :func:`make_inputs` for a property."""
    return {
        "tokens": st.integers(1, most_tokens),
        "atoms": st.integers(1, most_atoms),
        "top_k": st.integers(1, 9),
        "d_in": st.integers(1, 20),
        "d_out": st.integers(1, 20),
        "scale": st.sampled_from([1e-12, 1e-6, 1.0, 1e6]),
        "seed": st.integers(0, 2**31),
    }


def output_and_gradients(function, inputs):
    """y and the gradients of x, u, v and coefficients."""
    x, u, v, indices, coefficients = inputs
    y = function(x, u, v, indices, coefficients)
    weight = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(y)
    return [y, *torch.autograd.grad(y, (x, u, v, coefficients), weight)]


def assert_agree(actual, expected, u):
    """Outputs and gradients in float64 are the same to rounding, for these u.

    Of u's gradient what points along a row cancels, and its parts are of the size of one over the row's norm.
    """
    sizes = 1.0, 1.0, max(float(u.detach().norm(dim=-1).min()), 1e-6), 1.0, 1.0
    for a, e, size in zip(actual, expected, sizes, strict=True):
        assert (a - e).abs().max() * size <= 1e-12 * (e.abs().max() * size).clamp_min(1.0)
