"""The published formulation of the DSC layer, operation by operation: what the library's layer is measured against."""

import torch
from torch import Tensor, nn
from torch.nn import functional


def published_compose(x: Tensor, u: Tensor, v: Tensor, indices: Tensor, coefficients: Tensor) -> Tensor:
    """Both banks normalised in each call, then tokens x K x d gathers and two einsums: (T, d)."""
    unit_u, unit_v = unit_rows(u), unit_rows(v)
    latent = torch.einsum("td,tkd->tk", x, unit_u[indices]) * coefficients
    y: Tensor = torch.einsum("tk,tkd->td", latent, unit_v[indices])
    return y


def unit_rows(rows: Tensor) -> Tensor:
    """Rows divided by their norms."""
    unit: Tensor = rows / rows.norm(dim=-1, keepdim=True).clamp_min(1e-6)
    return unit


class PublishedLayer(nn.Module):
    """M-wide softplus, normalised banks each call, tokens x K x d gathers, M x M Gram matrices.

    Args:
        features: d.
        num_atoms: M.
        top_k: K.
        hidden: Width of the static layer; 0 leaves it out.
    """

    def __init__(self, features: int, num_atoms: int, top_k: int, hidden: int) -> None:
        super().__init__()
        self.top_k = top_k
        self.norm = nn.LayerNorm(features)
        self.router = nn.Linear(features, num_atoms)
        self.u = nn.Parameter(torch.randn(num_atoms, features) * 0.0005)
        self.v = nn.Parameter(torch.randn(num_atoms, features) * 0.0005)
        self.gamma = nn.Parameter(torch.full((features,), 0.1))
        self.static: nn.Module | None = None
        if hidden:
            self.static = nn.Sequential(
                nn.Linear(features, hidden, bias=False), nn.GELU(), nn.Linear(hidden, features, bias=False)
            )
        nn.init.normal_(self.router.weight, std=0.02)

    def forward(self, x: Tensor, regularize: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Tokens (T, d) to outputs (T, d), and the weighted regularisers where asked for."""
        raw = self.router(self.norm(x))
        logits = raw.clamp(-20.0, 20.0)
        scores = functional.softplus(logits)
        selected, indices = scores.topk(self.top_k, dim=-1)
        strength = selected.sum(-1, keepdim=True)
        coefficients = selected / (strength + 1e-6) * torch.tanh(strength)
        unit_u, unit_v = unit_rows(self.u), unit_rows(self.v)
        latent = torch.einsum("td,tkd->tk", x, unit_u[indices]) * coefficients
        y = torch.einsum("tk,tkd->td", latent, unit_v[indices]) * self.gamma
        if self.static is not None:
            y = self.static(x) + y
        if not regularize:
            return y
        probability = logits.softmax(-1).mean(0)
        aux = probability.shape[0] * probability.square().sum()
        budget = functional.relu(1.0 - strength.mean()).square()
        z = logits.logsumexp(-1).square().mean()
        off_diagonal = 1.0 - torch.eye(unit_u.shape[0], device=x.device)
        frame = sum(((unit @ unit.t()) * off_diagonal).norm().square() for unit in (unit_u, unit_v))
        return y, 0.01 * aux + 0.01 * budget + 0.001 * frame + 1e-4 * z
