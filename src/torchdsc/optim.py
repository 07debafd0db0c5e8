"""Parameter groups and optimizers, also for banks with row-sparse gradients."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import AdamW, Optimizer, SparseAdam

from torchdsc.arguments import check_not_negative, check_positive
from torchdsc.nn import BasisBank, Router, ShortConvolution

__all__ = ["DenseAndSparseAdam", "build_optimizer", "clip_grad_norm", "decay_parameter_names", "parameter_groups"]


def parameter_groups(
    model: nn.Module,
    *,
    learning_rate: float,
    weight_decay: float,
    router_lr_multiplier: float = 1.0,
    atom_lr_multiplier: float = 1.0,
) -> list[dict[str, Any]]:
    """The paper's groups: routers with their own rate and no decay, other matrices with decay, the rest without.

    Weight decay does not apply to embeddings, gamma, short convolutions, norms, biases and banks with row-sparse
    gradients. Those banks are the last group, for an optimizer that takes such gradients (:func:`build_optimizer`).

    Args:
        model: Any module, also a Hugging Face model or one wrapped by PEFT.
        learning_rate: Base learning rate.
        weight_decay: Weight decay of matrices.
        router_lr_multiplier: Factor on the learning rate of routers.
        atom_lr_multiplier: Factor on the learning rate of banks.

    Returns:
        Groups for an optimizer; every trainable parameter is in exactly one.

    Raises:
        ValueError: If a factor is not positive, or a rate or ``weight_decay`` negative.
    """
    check_positive(router_lr_multiplier=router_lr_multiplier, atom_lr_multiplier=atom_lr_multiplier)
    check_not_negative(learning_rate=learning_rate, weight_decay=weight_decay)
    groups: dict[str, list[nn.Parameter]] = {"router": [], "atoms": [], "decay": [], "no_decay": [], "sparse": []}
    for _, parameter, kind in _kinds(model):
        if parameter.requires_grad:
            groups[kind].append(parameter)
    settings = {
        "router": {"lr": learning_rate * router_lr_multiplier, "weight_decay": 0.0},
        "atoms": {"lr": learning_rate * atom_lr_multiplier, "weight_decay": weight_decay},
        "decay": {"lr": learning_rate, "weight_decay": weight_decay},
        "no_decay": {"lr": learning_rate, "weight_decay": 0.0},
        "sparse": {"lr": learning_rate * atom_lr_multiplier, "weight_decay": 0.0},
    }
    return [{"params": members, **settings[name]} for name, members in groups.items() if members]


def decay_parameter_names(model: nn.Module) -> list[str]:
    """Names of the parameters that :func:`parameter_groups` decays, to return in ``Trainer.get_decay_parameter_names``.

    Trainer's own method would also decay gamma, short convolutions and routers.

    Args:
        model: Any module.

    Returns:
        Names as in ``model.named_parameters()``.
    """
    return [name for name, _, kind in _kinds(model) if kind in ("atoms", "decay")]


def _kinds(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, str]]:
    """The name, parameter and group of every parameter."""
    routers, atoms, without = (
        {id(p) for module in model.modules() if isinstance(module, kind) for p in module.parameters()}
        for kind in (Router, BasisBank, (nn.Embedding, ShortConvolution))
    )
    sparse = _sparse_parameters(model)
    for name, parameter in model.named_parameters():
        if id(parameter) in routers:
            kind = "router"
        elif id(parameter) in sparse:
            kind = "sparse"
        elif id(parameter) in atoms:
            kind = "atoms"
        else:
            kind = "decay" if parameter.dim() >= 2 and id(parameter) not in without else "no_decay"
        yield name, parameter, kind


def build_optimizer(
    model: nn.Module,
    *,
    learning_rate: float,
    weight_decay: float,
    router_lr_multiplier: float = 1.0,
    atom_lr_multiplier: float = 1.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> Optimizer:
    """AdamW over :func:`parameter_groups`, and SparseAdam for banks with row-sparse gradients, if there are any.

    Args:
        model: See :func:`parameter_groups`, as for the next four.
        learning_rate: See there.
        weight_decay: See there.
        router_lr_multiplier: See there.
        atom_lr_multiplier: See there.
        betas: Of Adam.
        eps: Of Adam.

    Returns:
        The optimizer. With row-sparse gradients, clip by :func:`clip_grad_norm` instead of torch's function.

    Raises:
        ValueError: As :func:`parameter_groups`.
    """
    groups = parameter_groups(
        model,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        router_lr_multiplier=router_lr_multiplier,
        atom_lr_multiplier=atom_lr_multiplier,
    )
    held = _sparse_parameters(model)
    sparse = [group for group in groups if id(group["params"][0]) in held]
    dense = [group for group in groups if id(group["params"][0]) not in held]
    if sparse:
        return DenseAndSparseAdam(dense, sparse, betas=betas, eps=eps)
    return AdamW(dense, betas=betas, eps=eps, fused=True)


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
        """Load what :meth:`state_dict` returned."""
        for part, state in zip(self._parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self._share_groups()

    def _share_groups(self) -> None:
        # The same dictionaries, so that a scheduler that changes a rate here changes it in the parts.
        self.param_groups = [group for part in self._parts for group in part.param_groups]


def _sparse_parameters(model: nn.Module) -> set[int]:
    """``id`` of every parameter in ``model`` that gets row-sparse gradients."""
    banks = (module for module in model.modules() if isinstance(module, BasisBank) and module.sparse_gradients)
    return {id(parameter) for bank in banks for parameter in bank.parameters()}


@torch.no_grad()
def clip_grad_norm(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """``torch.nn.utils.clip_grad_norm_`` where some gradients may be row-sparse.

    Args:
        parameters: Parameters whose gradients are scaled in place.
        max_norm: Largest norm of all gradients together.

    Returns:
        Their norm before clipping, scalar.
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
