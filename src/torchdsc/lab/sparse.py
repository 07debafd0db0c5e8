"""Training a bank with row-sparse gradients: the optimizer and the clipping that torch has for dense ones alone."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import AdamW, Optimizer, SparseAdam

from torchdsc.nn import BasisBank

__all__ = ["DenseAndSparseAdam", "clip_grad_norm", "sparse_parameters"]


class DenseAndSparseAdam(Optimizer):
    """``AdamW`` for dense gradients and ``SparseAdam`` for row-sparse ones, as one optimizer.

    Rows without a gradient keep their moments, and sparse parameters are not decayed.

    Args:
        dense: Parameter groups of ``AdamW``.
        sparse: Parameter groups of ``SparseAdam``.
        betas: Of both.
        eps: Of both.
    """

    def __init__(
        self,
        dense: list[dict[str, Any]],
        sparse: list[dict[str, Any]],
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        self._parts: tuple[Optimizer, ...] = (
            AdamW(dense, betas=betas, eps=eps, fused=True),
            SparseAdam(sparse, betas=betas, eps=eps),
        )
        super().__init__([group for part in self._parts for group in part.param_groups], {})
        self._share_groups()

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step of both."""
        if closure is not None:
            raise ValueError("closure must be None: both optimizers would call it")
        for part in self._parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        """States of both, in order."""
        return {"parts": [part.state_dict() for part in self._parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what :meth:`state_dict` gave."""
        for part, state in zip(self._parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self._share_groups()

    def _share_groups(self) -> None:
        # The same dictionaries, so that a schedule that changes a rate here changes it there.
        self.param_groups = [group for part in self._parts for group in part.param_groups]


def sparse_parameters(model: nn.Module) -> set[int]:
    """Identities of the parameters in ``model`` that get row-sparse gradients."""
    banks = (module for module in model.modules() if isinstance(module, BasisBank) and module.sparse_gradients)
    return {id(parameter) for bank in banks for parameter in bank.parameters()}


@torch.no_grad()
def clip_grad_norm(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """``torch.nn.utils.clip_grad_norm_`` for gradients of which some are row-sparse.

    Args:
        parameters: Those whose gradients are scaled, in place.
        max_norm: Largest norm of all together.

    Returns:
        Their norm before, scalar.
    """
    gradients = []
    for parameter in parameters:
        if parameter.grad is None:
            continue
        if parameter.grad.is_sparse:
            # Rows that occur twice are added up first: the norm is that of their sum.
            parameter.grad = parameter.grad.coalesce()
            gradients.append(parameter.grad.values())
        else:
            gradients.append(parameter.grad)
    norm = get_total_norm(gradients)
    scale = (max_norm / (norm + 1e-6)).clamp_max(1.0)
    for gradient in gradients:
        gradient.mul_(scale)
    return norm
