"""Parameter groups and optimizers, also for banks with row-sparse gradients."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import AdamW, Optimizer, SparseAdam

from torchdsc.arguments import check_not_negative, check_positive
from torchdsc.kinds import OptimizerKind
from torchdsc.nn import BasisBank, RoutedLayer, Router, ShortConvolution
from torchdsc.nn.sharding import is_sharded

__all__ = [
    "JoinedOptimizer",
    "build_optimizer",
    "clip_grad_norm",
    "decay_parameter_names",
    "parameter_groups",
]


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
        atom_lr_multiplier: Factor on the learning rate of banks, of the rows of PEER and of n-gram tables.

    Returns:
        Groups for an optimizer; every trainable parameter is in exactly one.

    Raises:
        ValueError: If a factor is not positive, or a rate or ``weight_decay`` negative.
    """
    check_positive(router_lr_multiplier=router_lr_multiplier, atom_lr_multiplier=atom_lr_multiplier)
    check_not_negative(learning_rate=learning_rate, weight_decay=weight_decay)
    kinds = ("router", "atoms", "decay", "no_decay", "tables", "sparse")
    groups: dict[str, list[nn.Parameter]] = {kind: [] for kind in kinds}
    for _, parameter, kind in _kinds(model):
        if parameter.requires_grad:
            groups[kind].append(parameter)
    settings = {
        "router": {"lr": learning_rate * router_lr_multiplier, "weight_decay": 0.0},
        "atoms": {"lr": learning_rate * atom_lr_multiplier, "weight_decay": weight_decay},
        "decay": {"lr": learning_rate, "weight_decay": weight_decay},
        "no_decay": {"lr": learning_rate, "weight_decay": 0.0},
        "tables": {"lr": learning_rate * atom_lr_multiplier, "weight_decay": 0.0},
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
    routers, without = (
        {id(p) for module in model.modules() if isinstance(module, kind) for p in module.parameters()}
        for kind in (Router, (nn.Embedding, ShortConvolution))
    )
    # All of a bank's: parametrized or flattened, they have other names.
    rows = {
        id(parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters()
        if isinstance(module, BasisBank) or name in getattr(module, "row_parameters", ())
    }
    sparse = _sparse_parameters(model)
    for name, parameter in model.named_parameters():
        if id(parameter) in routers:
            kind = "router"
        elif id(parameter) in sparse:
            kind = "sparse"
        elif id(parameter) in rows:
            kind = "tables" if id(parameter) in without else "atoms"
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
    optimizer: OptimizerKind = "adamw",
    muon_learning_rate: float = 0.02,
) -> Optimizer:
    """AdamW over :func:`parameter_groups`, and SparseAdam for banks with row-sparse gradients, if there are any.

    With ``optimizer="muon"``, ``torch.optim.Muon`` trains the hidden matrices in place of AdamW: weights of
    ``nn.Linear``, as attention and feed-forward layers have them, but for routers and the output embedding of a Hugging
    Face model. It takes matrices alone, so that the stacked experts of an MoE stay with AdamW, as do atoms, the rows of
    PEER and Mixture-of-LoRAs, embeddings, short convolutions, norms, biases and gamma.

    Args:
        model: See :func:`parameter_groups`, as for the next four.
        learning_rate: See there.
        weight_decay: See there; of Muon's matrices too.
        router_lr_multiplier: See there.
        atom_lr_multiplier: See there.
        betas: Of Adam.
        eps: Of Adam.
        optimizer: "adamw" or "muon".
        muon_learning_rate: Learning rate of Muon's matrices, whose steps are orthogonal: for a matrix of more rows than
            columns it is multiplied by the root of their ratio, as Muon was published.

    Returns:
        The optimizer, which calls :meth:`torchdsc.nn.RoutedLayer.after_step` of the model's layers after each step.
        With row-sparse gradients, clip by :func:`clip_grad_norm` instead of torch's function.

    Raises:
        ValueError: As :func:`parameter_groups`, or if ``muon_learning_rate`` is negative or ``optimizer`` unknown.
        ImportError: If torch has no Muon, as before 2.9.
    """
    check_not_negative(muon_learning_rate=muon_learning_rate)
    if optimizer not in get_args(OptimizerKind):
        raise ValueError(f"optimizer must be one of {get_args(OptimizerKind)}, got {optimizer!r}")
    if optimizer == "muon" and not hasattr(torch.optim, "Muon"):
        raise ImportError(f"optimizer='muon' needs torch >= 2.9, got {torch.__version__}")
    groups = parameter_groups(
        model,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        router_lr_multiplier=router_lr_multiplier,
        atom_lr_multiplier=atom_lr_multiplier,
    )
    sparse, groups = _split(groups, _sparse_parameters(model))
    hidden, dense = _split(groups, _hidden_matrices(model) if optimizer == "muon" else set())
    parts: list[Optimizer] = [AdamW(dense, betas=betas, eps=eps, fused=True)] if dense else []
    if hidden:
        parts.append(torch.optim.Muon([{**group, "lr": muon_learning_rate} for group in hidden]))
    if sparse:
        parts.append(SparseAdam(sparse, betas=betas, eps=eps))
    built = parts[0] if len(parts) == 1 else JoinedOptimizer(parts)
    layers = [module for module in model.modules() if isinstance(module, RoutedLayer)]

    def after_step(*_: object) -> None:
        for layer in layers:
            layer.after_step()

    built.register_step_post_hook(after_step)
    return built


class JoinedOptimizer(Optimizer):
    """Several optimizers of different parameters as one, for schedulers, Trainer and checkpoints.

    Its groups are theirs, in order. With ``SparseAdam``, rows without a gradient keep their moments, and sparse
    parameters are not decayed.

    Args:
        parts: The optimizers.
    """

    def __init__(self, parts: Iterable[Optimizer]) -> None:
        self._parts = tuple(parts)
        super().__init__([group for part in self._parts for group in part.param_groups], {})
        self._share_groups()
        self._joined = True

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused once the optimizer is made, as no part would train the group.

        Raises:
            ValueError: Always, by then.
        """
        if hasattr(self, "_joined"):
            raise ValueError("param_group must be given to one of the joined optimizers, before they are joined")
        super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_parts": self._parts, "_joined": True}

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step of each."""
        if closure is not None:
            raise ValueError("closure must be None: every optimizer would call it")
        for part in self._parts:
            part.step()

    @property  # type: ignore[override]
    def state(self) -> dict[Tensor, Any]:
        """The states of all, by parameter; :meth:`state_dict` numbers them through."""
        return {parameter: state for part in self._parts for parameter, state in part.state.items()}

    @state.setter
    def state(self, value: Any) -> None:
        """Nothing: each part has its own."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned, or that of an earlier version, which has a list of ``parts``."""
        parts = state_dict.get("parts")
        if parts is None:
            groups, parts = list(state_dict["param_groups"]), []
            if len(groups) != len(self.param_groups):
                raise ValueError(f"param_groups must be as many as here, {len(self.param_groups)}, got {len(groups)}")
            for part in self._parts:
                own, groups = groups[: len(part.param_groups)], groups[len(part.param_groups) :]
                numbers = [number for group in own for number in group["params"]]
                state = {number: state_dict["state"][number] for number in numbers if number in state_dict["state"]}
                parts.append({"state": state, "param_groups": own})
        for part, state in zip(self._parts, parts, strict=True):
            part.load_state_dict(state)
        self._share_groups()

    def _share_groups(self) -> None:
        # The same dictionaries, so that a scheduler that changes a rate here changes it in the parts.
        self.param_groups = [group for part in self._parts for group in part.param_groups]


def _split(groups: list[dict[str, Any]], held: set[int]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Groups of the parameters whose ``id`` is held, and groups of the others."""
    found = tuple(
        [{**group, "params": [p for p in group["params"] if (id(p) in held) == inside]} for group in groups]
        for inside in (True, False)
    )
    inside, outside = ([group for group in side if group["params"]] for side in found)
    return inside, outside


def _hidden_matrices(model: nn.Module) -> set[int]:
    """``id`` of every weight of a linear layer that :func:`parameter_groups` decays, but for the output embedding."""
    find: Any = getattr(model, "get_output_embeddings", lambda: None)
    head = find()
    linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear) and m is not head}
    return {id(parameter) for _, parameter, kind in _kinds(model) if kind == "decay"} & linear


def _sparse_parameters(model: nn.Module) -> set[int]:
    """``id`` of every parameter in ``model`` that gets row-sparse gradients."""
    banks = (module for module in model.modules() if isinstance(module, BasisBank) and module.sparse_gradients)
    return {id(parameter) for bank in banks for parameter in bank.parameters()}


@torch.no_grad()
def clip_grad_norm(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """``torch.nn.utils.clip_grad_norm_`` where some gradients may be row-sparse, or sharded while others are not.

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
    norm = _total_norm(gradients)
    scale = (max_norm / (norm + 1e-6)).clamp_max(1.0)
    for gradient in gradients:
        local = gradient.to_local() if is_sharded(gradient) else gradient  # type: ignore[attr-defined]
        local.mul_(scale)
    return norm


def _total_norm(gradients: list[Tensor]) -> Tensor:
    """The norm of all gradients together, of which some may be DTensors: torch takes all or none."""
    shards = [gradient for gradient in gradients if is_sharded(gradient)]
    if not shards:
        return get_total_norm(gradients)
    of_shards: Tensor = get_total_norm(shards).full_tensor()  # type: ignore[attr-defined]
    others = [gradient for gradient in gradients if not is_sharded(gradient)]
    return torch.hypot(of_shards, get_total_norm(others).to(of_shards)) if others else of_shards
