"""Triton kernels of the fused selection; triton.py launches them.

Blocks: BLOCK_T tokens, BLOCK_M atoms, BLOCK_D features. A logit and its atom are packed into one int64 key: in the
upper half an integer that orders as the float32 logit does, in the lower half the inverted index of the atom. So keys
are distinct, and of equal logits the first atom wins. NaN becomes the largest key, as in ``torch.topk``.
"""

import triton
import triton.language as tl

_LOW = tl.constexpr(0x7FFFFFFF)
_LEAST = tl.constexpr(-(2**63))
_GREATEST = tl.constexpr(2**63 - 1)


@triton.jit
def _logits(
    x, x_t, x_d, weight, w_m, w_d, bias, b_m, t, in_t, m, in_m, width,
    NARROW: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A tile of ``x @ weight.t() + bias`` in float32."""
    total = tl.zeros([t.shape[0], m.shape[0]], tl.float32)
    for start in range(0, width, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        in_d = d < width
        d = d.to(tl.int64)
        a = tl.load(x + t[:, None] * x_t + d[None, :] * x_d, mask=in_t[:, None] & in_d[None, :], other=0.0)
        b = tl.load(weight + m[None, :] * w_m + d[:, None] * w_d, mask=in_m[None, :] & in_d[:, None], other=0.0)
        if NARROW:
            # Both of one half-precision dtype: tensor cores, with float32 sums.
            total = tl.dot(a, b, total)
        else:
            total = tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    if bias is not None:
        total += tl.load(bias + m * b_m, mask=in_m, other=0.0).to(tl.float32)[None, :]
    return total


@triton.jit
def _clamp(logits, tau):
    # By comparisons, which keep NaN, where minimum and maximum would drop it.
    logits = tl.where(logits > tau, tau, logits)
    return tl.where(logits < -tau, -tau, logits)


@triton.jit
def _keys(logits, m, in_m):
    bits = logits.to(tl.int32, bitcast=True)
    ordered = tl.where(bits >= 0, bits, bits ^ _LOW)
    ordered = tl.where(logits != logits, _LOW, ordered)
    keys = (ordered.to(tl.int64) << 32) + (m ^ _LOW)[None, :]
    return tl.where(in_m[None, :], keys, _LEAST)


@triton.jit
def _insert(best, keys):
    """Insert into ``best`` the keys that are greater than its least, one in each round, until none is."""
    greatest = tl.max(keys, 1)
    least = tl.min(best, 1)
    while tl.max((greatest > least).to(tl.int32), 0) > 0:
        enters = (greatest > least)[:, None]
        best = tl.where(enters & (best == least[:, None]), greatest[:, None], best)
        keys = tl.where(keys == greatest[:, None], _LEAST, keys)
        greatest = tl.max(keys, 1)
        least = tl.min(best, 1)
    return best


@triton.jit
def select_kernel(
    x, x_t, x_d, weight, w_m, w_d, bias, b_m, values, indices, log_normalizer, tokens, num_atoms, width, tau,
    K: tl.constexpr, STATISTICS: tl.constexpr, NARROW: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The K largest logits of a block of tokens, sorted, and the logsumexp of all clamped logits."""
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    in_t = t < tokens
    slot = tl.arange(0, BLOCK_K)
    # Empty slots hold distinct values below every key, so that one is filled at a time; slots beyond K are never least.
    empty = tl.where(slot < K, slot.to(tl.int64) + _LEAST, _GREATEST)
    best = tl.zeros([BLOCK_T, BLOCK_K], tl.int64) + empty[None, :]
    largest = tl.full([BLOCK_T], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_T], tl.float32)
    for start in range(0, num_atoms, BLOCK_M):
        m = (start + tl.arange(0, BLOCK_M)).to(tl.int64)
        in_m = m < num_atoms
        logits = _logits(x, x_t, x_d, weight, w_m, w_d, bias, b_m, t, in_t, m, in_m, width, NARROW, BLOCK_D)
        best = _insert(best, _keys(logits, m, in_m))
        if STATISTICS:
            clamped = tl.where(in_m[None, :], _clamp(logits, tau), float("-inf"))
            new = tl.maximum(largest, tl.max(clamped, 1))
            total = total * tl.exp(largest - new) + tl.sum(tl.exp(clamped - new[:, None]), 1)
            largest = new
    if STATISTICS:
        tl.store(log_normalizer + t, largest + tl.log(total), mask=in_t)
    best = tl.where((slot < K)[None, :], best, _LEAST)
    for k in range(K):
        key = tl.max(best, 1)
        best = tl.where(best == key[:, None], _LEAST, best)
        ordered = (key >> 32).to(tl.int32)
        bits = tl.where(ordered >= 0, ordered, ordered ^ _LOW)
        tl.store(values + t * K + k, bits.to(tl.float32, bitcast=True), mask=in_t)
        tl.store(indices + t * K + k, (key & _LOW) ^ _LOW, mask=in_t)


@triton.jit
def probability_kernel(
    x, x_t, x_d, weight, w_m, w_d, bias, b_m, log_normalizer, counted, n_t, partial, tokens, num_atoms, width, tau,
    NARROW: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sum of the softmax of clamped logits for a block of atoms, over this program's share of the blocks of tokens."""
    row = tl.program_id(0)
    m = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_m = m < num_atoms
    total = tl.zeros([BLOCK_M], tl.float32)
    for first in range(row * BLOCK_T, tokens, tl.num_programs(0) * BLOCK_T):
        t = (first + tl.arange(0, BLOCK_T)).to(tl.int64)
        in_t = t < tokens
        logits = _logits(x, x_t, x_d, weight, w_m, w_d, bias, b_m, t, in_t, m, in_m, width, NARROW, BLOCK_D)
        normalizer = tl.load(log_normalizer + t, mask=in_t, other=0.0)
        share = tl.exp(_clamp(logits, tau) - normalizer[:, None])
        if counted is not None:
            # Tokens that do not count may be NaN.
            times = tl.load(counted + t * n_t, mask=in_t, other=0.0).to(tl.float32)[:, None]
            share = tl.where(times == 0.0, 0.0, share * times)
        total += tl.sum(tl.where(in_t[:, None], share, 0.0), 0)
    tl.store(partial + row.to(tl.int64) * num_atoms + m, total, mask=in_m)
