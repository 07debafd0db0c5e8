"""Whether a model is being exported: then operations are plain tensor operations, which every format knows."""

import torch

__all__ = ["is_exporting"]


def _never() -> bool:
    return False


# torch 2.6 cannot tell exporting from compiling: there the operators stay in an exported program.
is_exporting = getattr(torch.compiler, "is_exporting", _never)
