"""Triton: top-K and statistics of router logits, without writing the T x M logits to memory.

One program handles a block of tokens and loops over the atoms. This saves memory and traffic if T M is large. For few
tokens, where one program does all the work, library products are faster.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from torchdsc.ops.triton_runtime import device_of, interprets, power_of_two, require_triton

# The selected logits of a block of tokens must fit in registers.
LARGEST_TOP_K = 64
# Rows of partial sums of probabilities: the number of programs that share the tokens.
_ROWS = 32


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weights: Tensor | None,
    top_k: int,
    logit_clamp: float,
    need_statistics: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``ops.select`` of the logits ``x @ weight.t() + bias``, tile by tile.

    Products are in half precision if ``x`` and ``weight`` both have that dtype, and otherwise in float32, also for
    float64; sums and results are float32. Of equal logits the first atom is selected.

    Args:
        x: Tokens of shape (T, d), any floating dtype.
        weight: Router weight of shape (M, d), any floating dtype.
        bias: Optional router bias of shape (M,).
        weights: Optional weight of each token in the probability sum, of shape (T,).
        top_k: K, with 1 <= K <= min(M, 64).
        logit_clamp: tau > 0.
        need_statistics: Whether to compute the log-normaliser and the probability sum.

    Returns:
        The K largest raw logits in descending order (T, K), float32; their atoms (T, K), int64; ``logsumexp`` of the
        clamped logits (T,); the sum over tokens of their softmax (M,). The last two are empty without statistics.

    Raises:
        ValueError: If ``top_k`` is outside [1, min(M, 64)].
        ImportError: If triton is missing or does not import.
        RuntimeError: If ``x`` is on the CPU and triton does not interpret its kernels.
    """
    tokens, (num_atoms, width) = x.shape[0], weight.shape
    if not 1 <= top_k <= min(num_atoms, LARGEST_TOP_K):
        limit = f"min(num_atoms = {num_atoms}, {LARGEST_TOP_K})"
        raise ValueError(f"top_k must be in [1, {limit}] for impl='triton', got {top_k}")
    kernels = _kernels(x)
    values = x.new_empty(tokens, top_k, dtype=torch.float32)
    indices = torch.empty_like(values, dtype=torch.int64)
    log_normalizer = values.new_empty(tokens if need_statistics else 0)
    if tokens == 0:
        return values, indices, log_normalizer, values.new_zeros(num_atoms if need_statistics else 0)
    inputs = [x, *x.stride(), weight, *weight.stride(), *_optional(bias)]
    # The interpreter knows no bfloat16 products; those of float32 are the same numbers.
    halves = (torch.float16,) if interprets() else (torch.float16, torch.bfloat16)
    narrow = x.dtype == weight.dtype and x.dtype in halves
    blocks = _blocks(tokens, num_atoms, width, max(x.element_size(), weight.element_size()))
    options = {"K": top_k, "STATISTICS": need_statistics, "NARROW": narrow, "BLOCK_K": power_of_two(top_k)}
    with device_of(x):
        kernels.select_kernel[(-(-tokens // blocks["BLOCK_T"]),)](
            *inputs, values, indices, log_normalizer, tokens, num_atoms, width, logit_clamp, **options, **blocks
        )
        if not need_statistics:
            return values, indices, log_normalizer, values.new_empty(0)
        partial = values.new_empty(min(_ROWS, -(-tokens // blocks["BLOCK_T"])), num_atoms)
        kernels.probability_kernel[(partial.shape[0], -(-num_atoms // blocks["BLOCK_M"]))](
            *inputs, log_normalizer, *_optional(weights), partial, tokens, num_atoms, width, logit_clamp,
            NARROW=narrow, **blocks,
        )  # fmt: skip
    return values, indices, log_normalizer, partial.sum(0)


def _kernels(x: Tensor) -> ModuleType:
    require_triton(x.device)
    from . import triton_kernels

    return triton_kernels


def _blocks(tokens: int, num_atoms: int, width: int, element_size: int) -> dict[str, int]:
    """Sizes of a tile. A product needs at least 16; more than 32 tokens would leave multiprocessors idle, and more than
    128 bytes of features would spill registers.
    """
    sizes = {"BLOCK_T": (tokens, 32), "BLOCK_M": (num_atoms, 64), "BLOCK_D": (width, 128 // element_size)}
    return {name: max(16, min(power_of_two(size), limit)) for name, (size, limit) in sizes.items()}


def _optional(vector: Tensor | None) -> list[Any]:
    return [None, 0] if vector is None else [vector, vector.stride(0)]
