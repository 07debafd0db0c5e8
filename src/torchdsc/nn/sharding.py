"""Parameters that FSDP has sharded, read outside the forward pass of the unit that owns them."""

from typing import Any

import torch
from torch import Tensor, nn


def whole(parameter: Tensor) -> Tensor:
    """The whole parameter: itself, or gathered from the shards of all processes.

    ``fully_shard`` gathers the parameters of a unit only for the unit's forward pass. A bank that several blocks share
    is also read in other units, and by L_frame after the forward pass; there it is a sharded DTensor. Its gradient is
    averaged over processes, as FSDP does for the parameters it gathers.

    Args:
        parameter: A parameter, of any shape.

    Returns:
        The tensor, differentiable. If the parameter is a DTensor, every process of its mesh must make this call.
    """
    # The common case first, as every forward pass comes here.
    if type(parameter) in (nn.Parameter, Tensor) or not is_sharded(parameter):
        return parameter
    from torch.distributed.tensor import Partial

    average = [Partial("avg")] * parameter.device_mesh.ndim  # type: ignore[attr-defined]
    gathered: Tensor = parameter.full_tensor(grad_placements=average)  # type: ignore[attr-defined]
    return gathered


def is_sharded(parameter: Tensor) -> bool:
    """Whether each process holds a part of it, as a DTensor."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(parameter, DTensor)


def on_all_processes(module: nn.Module, ready: bool) -> bool:
    """Whether a module can be read: all processes that hold parts of it must do so, or none.

    Args:
        module: If it is not sharded, the answer is ``ready``. Otherwise every process must make this call.
        ready: Whether this process would read it.
    """
    part: Any = next((parameter for parameter in module.parameters() if is_sharded(parameter)), None)
    if part is None:
        return ready
    flag = torch.tensor(float(ready), device=part.to_local().device)
    for group in part.device_mesh.get_all_groups():
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MIN, group=group)
    return bool(flag)


def check_not_flattened(name: str, parameter: Tensor, shape: tuple[int, ...]) -> None:
    """Refuse a parameter that FSDP1 has flattened and resharded.

    Args:
        name: Of the parameter, for the error.
        parameter: As the module holds it now.
        shape: The shape it was made with.

    Raises:
        RuntimeError: If the shape differs or the memory has been freed.
    """
    is_freed = type(parameter) is Tensor and not parameter.is_meta and parameter.untyped_storage().size() == 0
    is_freed = is_freed and parameter.numel() > 0
    if parameter.shape != shape or is_freed:
        raise RuntimeError(
            f"{name} must be whole, of shape {shape}, where it is read outside the forward pass of its FSDP unit, got "
            f"{'memory that is freed' if is_freed else tuple(parameter.shape)}: FullyShardedDataParallel keeps a part "
            "of a flattened parameter there. Use torch.distributed.fsdp.fully_shard, or one unit for the whole model"
        )
