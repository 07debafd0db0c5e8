"""How a layer's output moves with its input, the routing's own movement included."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from torchdsc.arguments import check_positive
from torchdsc.bounds import check_layer, spectral_norm
from torchdsc.nn import DSC, NgramRouter
from torchdsc.nn.modes import evaluating

from .routing import gates_of

# Halvings of the way between two inputs, down to the rounding of float32.
_HALVINGS = 24


@dataclass(frozen=True)
class Sensitivity:
    """What the bound of |dW| does not cover: the routing depends on x too. Figures are over the given tokens.

    Attributes:
        fixed_norm: Largest |dW|_2, the Lipschitz constant of the update while the routing is held fixed.
        local_lipschitz: Largest spectral norm of the update's Jacobian, which has the coefficients' derivative too.
        changed: Share of tokens whose selection differs after a random step of the given relative size.
        jump: Mean size of the jump of the output where the selection first changes on such a step, over the size of
            the output there; 0 where none changes.
        noise_strength: Mean S of noise, over that of the tokens.
        noise_gate: Mean tanh S of noise; tanh (S / K) for ``gate="mean"``, None for ``gate="none"``.
        gate: The same of the tokens.
        noise_norm: Mean |dW|_2 of noise, over that of the tokens; None where that is 0, as at gamma = 0.
    """

    fixed_norm: float
    local_lipschitz: float
    changed: float
    jump: float
    noise_strength: float
    noise_gate: float | None
    gate: float | None
    noise_norm: float | None

    def as_dict(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return asdict(self)


def has_sensitivity(layer: DSC) -> bool:
    """Whether :func:`sensitivity` takes a layer: one whose router sees x, linear in it, and without thin atoms."""
    options = layer.options
    is_plain = options.activation == "none" and options.atom_features is None and not options.offset
    return is_plain and not isinstance(layer.router, NgramRouter)


def sensitivity(layer: DSC, x: Tensor, *, step: float = 0.01, seed: int = 0) -> Sensitivity:
    """Measure how a layer whose router sees x responds to small steps, and to noise.

    The update is ``y = sum_k z_k(x) (x . u_k) v_k`` times the output scale. Its Jacobian is again of rank K, with
    ``z_k u_k + (x . u_k) dz_k/dx`` in place of ``z_k u_k``; it holds as long as the selection does not change, where y
    jumps. Noise are normal tokens with the mean and deviation that x has in each feature.

    Args:
        layer: The layer, without a rectified activation, thin atoms or an offset.
        x: Tokens of shape (..., d_in), in the dtype of the parameters.
        step: Size of a step over that of its token, > 0.
        seed: Of directions and noise.

    Returns:
        The figures.

    Raises:
        ValueError: If ``step`` is not positive, or the layer is of another kind or routed by n-grams.
    """
    check_positive(step=step)
    check_layer(layer)
    if isinstance(layer.router, NgramRouter):
        raise ValueError("layer must be routed by x, got router = 'ngram'")
    if not has_sensitivity(layer):
        raise ValueError("layer must have no activation, thin atoms or offset")
    with evaluating(layer):
        return _measure(layer, x.detach().reshape(-1, x.shape[-1]), step, seed)


def _measure(layer: DSC, x: Tensor, step: float, seed: int) -> Sensitivity:
    random = torch.Generator(x.device).manual_seed(seed)
    direction = torch.randn(x.shape, generator=random, device=x.device, dtype=x.dtype)
    moved = x + direction * (step * x.norm(dim=-1, keepdim=True) / direction.norm(dim=-1, keepdim=True))
    noise = torch.randn(x.shape, generator=random, device=x.device, dtype=x.dtype) * x.std(0, correction=0) + x.mean(0)
    lipschitz = _local_lipschitz(layer, x)
    with torch.no_grad():
        norms, noise_norms = spectral_norm(layer, x), spectral_norm(layer, noise)
        changed, jump = _jumps(layer, x, moved)
        own_logits, other_logits = layer.route(x).logits, layer.route(noise).logits
        assert own_logits is not None
        assert other_logits is not None
        own, gates = gates_of(layer, own_logits)
        others, noise_gates = gates_of(layer, other_logits)
    return Sensitivity(
        fixed_norm=float(norms.max()),
        local_lipschitz=float(lipschitz.max()),
        changed=changed,
        jump=jump,
        noise_strength=float(others.mean() / own.mean()),
        noise_gate=None if noise_gates is None else float(noise_gates.mean()),
        gate=None if gates is None else float(gates.mean()),
        noise_norm=float(noise_norms.mean() / norms.mean()) if bool(norms.any()) else None,
    )


@torch.enable_grad()
def _local_lipschitz(layer: DSC, x: Tensor) -> Tensor:
    """Spectral norm of the Jacobian at each token (T,)."""
    x = x.clone().requires_grad_()
    routing = layer.route(x)
    slopes = [torch.autograd.grad(each.sum(), x, retain_graph=True)[0] for each in routing.coefficients.unbind(dim=-1)]
    with torch.no_grad():
        u, v = layer.bank(None, routing.indices, eps=layer.options.eps)
        latents = (u * x.unsqueeze(-2)).sum(-1, keepdim=True)
        left = routing.coefficients.unsqueeze(-1) * u + latents * torch.stack(slopes, dim=-2)
        right = v * layer.output_scale
        factors = (torch.linalg.qr(each.mT.double(), mode="r").R for each in (left, right))
        first, second = factors
        norm: Tensor = torch.linalg.matrix_norm(first @ second.mT, ord=2)
        return norm


def _jumps(layer: DSC, x: Tensor, moved: Tensor) -> tuple[float, float]:
    """Share of tokens whose selection changes on the way to ``moved``, and the mean relative jump where it does."""
    before = layer.route(x).indices.sort(dim=-1).values

    def differs(points: Tensor, rows: Tensor) -> Tensor:
        return (layer.route(points).indices.sort(dim=-1).values != before[rows]).any(-1)

    rows = torch.arange(x.shape[0], device=x.device)
    rows = rows[differs(moved, rows)]
    if not rows.numel():
        return 0.0, 0.0
    # The selection is that of x at low, and another at high.
    start, way = x[rows], moved[rows] - x[rows]
    low, high = x.new_zeros(len(rows), 1), x.new_ones(len(rows), 1)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        beyond = differs(start + middle * way, rows).unsqueeze(-1)
        low, high = torch.where(beyond, low, middle), torch.where(beyond, middle, high)
    outputs = layer(start + low * way), layer(start + high * way)
    sizes = outputs[0].norm(dim=-1).clamp_min(torch.finfo(x.dtype).tiny)
    return len(rows) / x.shape[0], float(((outputs[1] - outputs[0]).norm(dim=-1) / sizes).mean())
