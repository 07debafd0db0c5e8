"""Whether a model is being exported. Then plain tensor operations replace operators, so that any runtime can run it."""

import torch

__all__ = ["is_exporting"]


def _never() -> bool:
    return False


# torch 2.6 cannot tell export from compilation, so there the operators stay in exported programs.
is_exporting = getattr(torch.compiler, "is_exporting", _never)
