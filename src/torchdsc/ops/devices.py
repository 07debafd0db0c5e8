"""The error for tensors on several devices."""

from torch import Tensor


def several_devices(**tensors: Tensor | None) -> ValueError:
    """The error for a call whose tensors are on several devices; it names each with its device.

    This includes meta: an operator with one meta tensor among real ones would return uninitialised memory.
    """
    found = ", ".join(f"{name} on {tensor.device}" for name, tensor in tensors.items() if tensor is not None)
    return ValueError(f"all tensors must be on one device, got {found}")
