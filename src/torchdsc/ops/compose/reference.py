"""The equations as written, with every gathered row in memory. Slow, and never chosen by ``auto``.

Shape suffixes: T tokens, K selected atoms, D input features, E output features, M atoms.
"""

import torch
from torch import Tensor


def forward(
    x_TD: Tensor, u_MD: Tensor, v_ME: Tensor, indices_TK: Tensor, coefficients_TK: Tensor, eps: float | None
) -> tuple[Tensor, Tensor]:
    """Equations (3) and (14) as written."""
    accumulated = coefficients_TK.dtype
    u_TKD = _unit_and_norm(u_MD.to(accumulated)[indices_TK], eps)[0]
    v_TKE = _unit_and_norm(v_ME.to(accumulated)[indices_TK], eps)[0]
    latent_TK = torch.einsum("td,tkd->tk", x_TD.to(accumulated), u_TKD)
    y_TE = torch.einsum("tk,tke->te", latent_TK * coefficients_TK, v_TKE)
    return y_TE.to(x_TD.dtype), latent_TK


def backward(
    grad_TE: Tensor,
    x_TD: Tensor,
    u_MD: Tensor,
    v_ME: Tensor,
    indices_TK: Tensor,
    coefficients_TK: Tensor,
    latent_TK: Tensor,
    eps: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The chain rule through equations (14) and (3), step by step."""
    accumulated = coefficients_TK.dtype
    u_TKD, norm_u = _unit_and_norm(u_MD.to(accumulated)[indices_TK], eps)
    v_TKE, norm_v = _unit_and_norm(v_ME.to(accumulated)[indices_TK], eps)
    x, grad = x_TD.to(accumulated), grad_TE.to(accumulated)
    projected_TK = torch.einsum("te,tke->tk", grad, v_TKE)
    weight_TK = coefficients_TK * projected_TK
    dx_TD = torch.einsum("tk,tkd->td", weight_TK, u_TKD)
    du_TKD = torch.einsum("tk,td->tkd", weight_TK, x)
    dv_TKE = torch.einsum("tk,te->tke", coefficients_TK * latent_TK, grad)
    if eps is not None:
        du_TKD = _through_norm(du_TKD, u_TKD, norm_u, eps)
        dv_TKE = _through_norm(dv_TKE, v_TKE, norm_v, eps)
    du_MD = torch.zeros_like(u_MD, dtype=accumulated).index_put_((indices_TK,), du_TKD, accumulate=True)
    dv_ME = torch.zeros_like(v_ME, dtype=accumulated).index_put_((indices_TK,), dv_TKE, accumulate=True)
    return dx_TD.to(x_TD.dtype), du_MD.to(u_MD.dtype), dv_ME.to(v_ME.dtype), latent_TK * projected_TK


def _unit_and_norm(rows: Tensor, eps: float | None) -> tuple[Tensor, Tensor]:
    norm = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    return (rows if eps is None else rows / norm.clamp_min(eps)), norm


def _through_norm(grad: Tensor, unit: Tensor, norm: Tensor, eps: float) -> Tensor:
    """Gradient of a raw row from that of ``row / max(eps, |row|)``."""
    along = (grad * unit).sum(-1, keepdim=True) * unit
    return torch.where(norm > eps, (grad - along) / norm, grad / eps)
