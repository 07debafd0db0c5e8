"""Inference on a CPU: atoms ruled out by logits in bfloat16 and bounds on their errors, the rest compared in float32.

With x' and w' the rounded rows, ``|x w - x' w'| <= |x - x'| |w'| + |x| |w - w'|``. Both differences are measured row by
row, not assumed, so that the bound is tight: a handful of atoms a token is left. Atoms whose upper bound is below the
K-th largest lower bound cannot be among the top-K. What is returned are logits in float32.
"""

import torch
from torch import Tensor

from torchdsc.ops.native import MOST_SELECTED, has_bfloat16, module_for

# Tokens that pay for rounding the weight, with atoms a selected one that pay for comparing again.
_PAYS_FROM = ((64, 32), (512, 16))
# Tokens per product: its logits should still be in cache when they are read.
_CHUNK = 512


NEEDS = (
    "inference without statistics, contiguous float32 tensors on a CPU that multiplies bfloat16, "
    f"top_k <= {MOST_SELECTED} and the compiled functions"
)


def applies_to(x: Tensor, weight: Tensor, bias: Tensor | None, top_k: int) -> bool:
    """Whether the tensors can be screened."""
    return (
        x.dtype == torch.float32
        and top_k <= MOST_SELECTED
        and has_bfloat16()
        and module_for(x, weight, bias) is not None
    )


def pays(x: Tensor, weight: Tensor, bias: Tensor | None, top_k: int) -> bool:
    """Whether they can, and that is quicker."""
    enough = any(x.shape[0] >= tokens and weight.shape[0] >= atoms * top_k for tokens, atoms in _PAYS_FROM)
    return enough and applies_to(x, weight, bias, top_k)


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, top_k: int) -> tuple[Tensor, Tensor] | None:
    """The K largest logits and their atoms, each (T, K); None where a row is not finite, which this cannot order."""
    native = module_for(x, weight, bias)
    assert native is not None
    rounded_x, x_norms, x_errors = _round_rows(x)
    rounded_weight, weight_norms, weight_errors = _round_rows(weight)
    # Sums are finite only where every row is, in bfloat16 too.
    if not (x_errors.sum() + weight_errors.sum() + x_norms.sum() * weight_norms.max()).isfinite():
        return None
    if bias is not None and not bias.sum().isfinite():
        return None
    (tokens, width), num_atoms = x.shape, weight.shape[0]
    values, indices = x.new_empty(tokens, top_k), x.new_empty(tokens, top_k, dtype=torch.int64)
    logits = torch.empty(min(_CHUNK, tokens), num_atoms, dtype=torch.bfloat16)
    for start in range(0, tokens, _CHUNK):
        rows = slice(start, min(start + _CHUNK, tokens))
        count = rows.stop - start
        torch.mm(rounded_x[rows], rounded_weight.t(), out=logits[:count])
        native.screen(
            x=x[rows],
            weight=weight,
            bias=bias,
            approximate=logits,
            x_norms=x_norms[rows],
            x_errors=x_errors[rows],
            weight_norms=weight_norms,
            weight_errors=weight_errors,
            values=values[rows],
            indices=indices[rows],
            tokens=count,
            width=width,
            num_atoms=num_atoms,
            top_k=top_k,
            threads=torch.get_num_threads(),
        )
    return values, indices


def _round_rows(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows in bfloat16, their norms, and the norms of what rounding took away."""
    native = module_for(rows)
    assert native is not None
    rounded = torch.empty_like(rows, dtype=torch.bfloat16)
    norms, errors = rows.new_empty(rows.shape[0]), rows.new_empty(rows.shape[0])
    native.round_rows(
        rows=rows,
        out=rounded,
        norms=norms,
        errors=errors,
        count=rows.shape[0],
        width=rows.shape[1],
        threads=torch.get_num_threads(),
    )
    return rounded, norms, errors
