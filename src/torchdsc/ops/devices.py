"""What the operations refuse alike: tensors on several devices."""

from torch import Tensor


def several_devices(**tensors: Tensor | None) -> ValueError:
    """The error for tensors of one call that are on several devices; names each with its own.

    An operator that is given a tensor on meta beside real ones would return memory that nothing has written to.
    """
    found = ", ".join(f"{name} on {tensor.device}" for name, tensor in tensors.items() if tensor is not None)
    return ValueError(f"all tensors must be on one device, got {found}")
