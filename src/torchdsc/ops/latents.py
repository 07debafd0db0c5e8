"""Latent values of the selected atoms, which ``activation="relu"`` needs before the composition."""

import torch
from torch import Tensor, library

from .compose.gather import sampled_product
from .devices import several_devices
from .export import is_exporting


def latents(x: Tensor, u: Tensor, indices: Tensor) -> Tensor:
    """``x_t . u_k`` for the atoms that each token selects, without gradients and with raw atoms.

    Args:
        x: Tokens of shape (T, d_in).
        u: Input atoms of shape (M, d_in), dtype of ``x``.
        indices: Selected atoms of shape (T, K), int64, each in [0, M).

    Returns:
        Tensor of shape (T, K), float32 (float64 for float64 input).

    Raises:
        ValueError: If the tensors are on several devices.
    """
    if not (x.device == u.device == indices.device):
        raise several_devices(x=x, u=u, indices=indices)
    if is_exporting():
        dtype = x.dtype if x.dtype == torch.float64 else torch.float32
        return torch.einsum("td,tkd->tk", x.detach().to(dtype), u.detach()[indices].to(dtype))
    found: Tensor = _latents_op(x.detach(), u.detach(), indices)
    return found


@library.custom_op("torchdsc::latents", mutates_args=())
def _latents_op(x: Tensor, u: Tensor, indices: Tensor) -> Tensor:
    dtype = x.dtype if x.dtype == torch.float64 else torch.float32
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        return sampled_product(x.to(dtype), u.to(dtype), indices)


@_latents_op.register_fake
def _(x: Tensor, u: Tensor, indices: Tensor) -> Tensor:
    return x.new_empty(indices.shape, dtype=x.dtype if x.dtype == torch.float64 else torch.float32)
