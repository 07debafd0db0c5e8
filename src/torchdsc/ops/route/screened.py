"""Screened selection for CPU inference: bfloat16 logits rule out most atoms, and the rest are compared in float32.

For rounded rows x' and w', ``|x w - x' w'| <= |x - x'| |w'| + |x| |w - w'|``. Both differences are measured for every
row, so that the bound is tight and leaves a handful of atoms per token. An atom whose upper bound is below the K-th
largest lower bound cannot be among the top-K. The logits that are returned are computed in float32.
"""

import torch
from torch import Tensor

from torchdsc.ops.native import MOST_SELECTED, has_bfloat16, module_for

# Screening is faster from so many tokens, with at least so many atoms per selected one.
_PAYS_FROM = ((64, 32), (512, 16))
# Tokens per product, few enough for its logits to stay in cache.
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
    """Whether the tensors can be screened and that is faster."""
    enough = any(x.shape[0] >= tokens and weight.shape[0] >= atoms * top_k for tokens, atoms in _PAYS_FROM)
    return enough and applies_to(x, weight, bias, top_k)


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, top_k: int) -> tuple[Tensor, Tensor] | None:
    """The K largest logits and their atoms, each (T, K); None if a row is not finite, which this cannot order."""
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
    """Rows in bfloat16, the rows' norms, and the norms of the rounding errors."""
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
