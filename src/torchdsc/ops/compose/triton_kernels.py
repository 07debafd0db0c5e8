"""Triton kernels of the composition; triton.py launches them.

Blocks: BLOCK_K selected atoms, BLOCK_P pairs of token and atom, BLOCK_D features. Offsets are int64, as T K d and M d
may exceed 2**31. Sums have the dtype of ``coefficients``. ``EPS`` is a constant, as a float argument would arrive in
float32.
"""

import triton
import triton.language as tl

# Source of the norms of equation (3): none, computed from the gathered rows, or an array over the bank.
RAW = tl.constexpr(0)
FROM_ROWS = tl.constexpr(1)
FROM_BANK = tl.constexpr(2)


@triton.jit
def _block(start, width, BLOCK: tl.constexpr):
    offsets = start + tl.arange(0, BLOCK)
    return offsets.to(tl.int64), offsets < width


@triton.jit
def _products(vector, stride, bank, stride_m, stride_d, atoms, in_k, width, NORMS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Dot product of one vector with each selected row, and the rows' sums of squares."""
    dtype = tl.float64 if vector.dtype.element_ty == tl.float64 else tl.float32
    dots = tl.zeros([atoms.shape[0], BLOCK_D], dtype)
    squares = tl.zeros([atoms.shape[0], BLOCK_D], dtype)
    for start in range(0, width, BLOCK_D):
        d, in_d = _block(start, width, BLOCK_D)
        values = tl.load(vector + d * stride, mask=in_d, other=0.0).to(dtype)
        at = bank + atoms[:, None] * stride_m + d[None, :] * stride_d
        rows = tl.load(at, mask=in_k[:, None] & in_d[None, :], other=0.0).to(dtype)
        dots += rows * values[None, :]
        if NORMS == FROM_ROWS:
            squares += rows * rows
    return tl.sum(dots, 1), tl.sum(squares, 1)


@triton.jit
def _squares(bank, stride_m, stride_d, atoms, in_k, width, dtype: tl.constexpr, BLOCK_D: tl.constexpr):
    squares = tl.zeros([atoms.shape[0], BLOCK_D], dtype)
    for start in range(0, width, BLOCK_D):
        d, in_d = _block(start, width, BLOCK_D)
        at = bank + atoms[:, None] * stride_m + d[None, :] * stride_d
        rows = tl.load(at, mask=in_k[:, None] & in_d[None, :], other=0.0).to(dtype)
        squares += rows * rows
    return tl.sum(squares, 1)


@triton.jit
def _scale(squares, norms, atoms, in_k, EPS: tl.constexpr, NORMS: tl.constexpr):
    """``1 / max(eps, norm)`` of each row, and its square if the norm exceeds eps (else 0), for the radial gradient."""
    scale = tl.full(squares.shape, 1.0, squares.dtype)
    along = tl.zeros(squares.shape, squares.dtype)
    if NORMS != RAW:
        if NORMS == FROM_BANK:
            norm = tl.load(norms + atoms, mask=in_k, other=1.0)
        elif squares.dtype == tl.float64:
            norm = tl.sqrt(squares)
        else:
            norm = tl.sqrt_rn(squares)
        eps = tl.full(squares.shape, EPS, squares.dtype)
        divisor = tl.where(norm > eps, norm, eps)
        # Plain float32 division is approximate on a GPU; the exact one costs nothing here.
        if squares.dtype == tl.float64:
            scale = 1.0 / divisor
        else:
            scale = tl.div_rn(scale, divisor)
        along = tl.where(norm > eps, scale * scale, 0.0)
    return scale, along


@triton.jit
def _weighted_rows(
    out, stride_out, bank, stride_m, stride_d, indices, stride_index, weights, weight, width,
    K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Weighted sum of the selected rows, with weights from ``weight`` if K fits in one block, else from memory."""
    dtype: tl.constexpr = weight.dtype
    for start in range(0, width, BLOCK_D):
        d, in_d = _block(start, width, BLOCK_D)
        total = tl.zeros([BLOCK_D], dtype)
        for first in range(0, K, BLOCK_K):
            k, in_k = _block(first, K, BLOCK_K)
            atoms = tl.load(indices + k * stride_index, mask=in_k, other=0)
            if K > BLOCK_K:
                weight = tl.load(weights + k, mask=in_k, other=0.0)
            at = bank + atoms[:, None] * stride_m + d[None, :] * stride_d
            rows = tl.load(at, mask=in_k[:, None] & in_d[None, :], other=0.0).to(dtype)
            total += tl.sum(weight[:, None] * rows, 0)
        tl.store(out + d * stride_out, total.to(out.dtype.element_ty), mask=in_d)


@triton.jit
def forward_kernel(
    x, x_t, x_d, u, u_m, u_d, v, v_m, v_d, indices, i_t, i_k, coefficients, c_t, c_k, norms_u, norms_v,
    y, y_t, y_d, latent, l_t, l_k, weights, d_in, d_out,
    K: tl.constexpr, EPS: tl.constexpr, NORMS: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_OUT: tl.constexpr,
):  # fmt: skip
    """One token: ``latent_k = x . u_k`` and ``y = sum_k z_k latent_k v_k``, equation (14)."""
    token = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = coefficients.dtype.element_ty
    weight = tl.zeros([BLOCK_K], dtype)
    for first in range(0, K, BLOCK_K):
        k, in_k = _block(first, K, BLOCK_K)
        atoms = tl.load(indices + token * i_t + k * i_k, mask=in_k, other=0)
        z = tl.load(coefficients + token * c_t + k * c_k, mask=in_k, other=0.0)
        dots, squares = _products(x + token * x_t, x_d, u, u_m, u_d, atoms, in_k, d_in, NORMS, BLOCK_IN)
        scale, _ = _scale(squares, norms_u, atoms, in_k, EPS, NORMS)
        value = dots * scale
        tl.store(latent + token * l_t + k * l_k, value, mask=in_k)
        if NORMS == FROM_ROWS:
            squares = _squares(v, v_m, v_d, atoms, in_k, d_out, dtype, BLOCK_OUT)
        scale, _ = _scale(squares, norms_v, atoms, in_k, EPS, NORMS)
        # Lanes beyond K hold 0 times the token, which is NaN if the token is.
        weight = tl.where(in_k, value * z * scale, 0.0)
        if K > BLOCK_K:
            tl.store(weights + token * K + k, weight, mask=in_k)
    if K > BLOCK_K:
        # Other threads of this program will read these weights.
        tl.debug_barrier()
    _weighted_rows(
        y + token * y_t, y_d, v, v_m, v_d, indices + token * i_t, i_k, weights + token * K, weight, d_out,
        K, BLOCK_K, BLOCK_OUT,
    )  # fmt: skip


@triton.jit
def backward_kernel(
    grad, g_t, g_d, u, u_m, u_d, v, v_m, v_d, indices, i_t, i_k, coefficients, c_t, c_k, latent, l_t, l_k,
    norms_u, norms_v, dx, dx_t, dx_d, dcoefficients, dc_t, dc_k,
    weights_u, weights_v, multiples_u, multiples_v, d_in, d_out,
    K: tl.constexpr, EPS: tl.constexpr, NORMS: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_OUT: tl.constexpr,
):  # fmt: skip
    """One token: gradients of x and the coefficients, and four numbers per pair for the gradients of u and v.

    These are the weight of x in u's gradient and of y's gradient in v's, and for both the multiple of the atom's own
    row to subtract.
    """
    token = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = coefficients.dtype.element_ty
    weight = tl.zeros([BLOCK_K], dtype)
    for first in range(0, K, BLOCK_K):
        k, in_k = _block(first, K, BLOCK_K)
        atoms = tl.load(indices + token * i_t + k * i_k, mask=in_k, other=0)
        z = tl.load(coefficients + token * c_t + k * c_k, mask=in_k, other=0.0)
        value = tl.load(latent + token * l_t + k * l_k, mask=in_k, other=0.0)
        dots, squares = _products(grad + token * g_t, g_d, v, v_m, v_d, atoms, in_k, d_out, NORMS, BLOCK_OUT)
        scale_v, along_v = _scale(squares, norms_v, atoms, in_k, EPS, NORMS)
        projected = dots * scale_v
        tl.store(dcoefficients + token * dc_t + k * dc_k, value * projected, mask=in_k)
        if NORMS == FROM_ROWS:
            squares = _squares(u, u_m, u_d, atoms, in_k, d_in, dtype, BLOCK_IN)
        scale_u, along_u = _scale(squares, norms_u, atoms, in_k, EPS, NORMS)
        common = z * projected * value
        weight = tl.where(in_k, z * projected * scale_u, 0.0)
        pair = token * K + k
        tl.store(weights_u + pair, weight, mask=in_k)
        tl.store(weights_v + pair, z * value * scale_v, mask=in_k)
        if NORMS != RAW:
            tl.store(multiples_u + pair, common * along_u, mask=in_k)
            tl.store(multiples_v + pair, common * along_v, mask=in_k)
    if K > BLOCK_K:
        tl.debug_barrier()
    _weighted_rows(
        dx + token * dx_t, dx_d, u, u_m, u_d, indices + token * i_t, i_k, weights_u + token * K, weight, d_in,
        K, BLOCK_K, BLOCK_IN,
    )  # fmt: skip


@triton.jit
def _segment(
    total, start, end, order, weights, along, tokens, stride_t, stride_d, row, d, in_d,
    K: tl.constexpr, NORMS: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Add the pairs from ``start`` to ``end`` to ``total``: weighted tokens minus multiples of the atom's row."""
    dtype: tl.constexpr = total.dtype
    multiples = tl.zeros([BLOCK_P], dtype)
    for first in range(start, end, BLOCK_P):
        position = first + tl.arange(0, BLOCK_P)
        inside = position < end
        pair = tl.load(order + position, mask=inside, other=0)
        weight = tl.load(weights + pair, mask=inside, other=0.0)
        at = tokens + (pair // K)[:, None] * stride_t + d[None, :] * stride_d
        values = tl.load(at, mask=inside[:, None] & in_d[None, :], other=0.0).to(dtype)
        total += tl.sum(weight[:, None] * values, 0)
        if NORMS != RAW:
            multiples += tl.load(along + pair, mask=inside, other=0.0)
    if NORMS != RAW:
        total -= tl.sum(multiples, 0) * row
    return total


@triton.jit
def cells_kernel(
    order, ordered, weights, along, tokens, t_t, t_d, bank, b_m, b_d, cells, width,
    K: tl.constexpr, NORMS: tl.constexpr, CELL: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sum a cell of CELL ordered pairs if all are of one atom, so that the work of a frequent atom is shared."""
    cell = tl.program_id(0).to(tl.int64)
    start = cell * CELL
    atom = tl.load(ordered + start).to(tl.int64)
    if atom == tl.load(ordered + start + CELL - 1):
        dtype: tl.constexpr = weights.dtype.element_ty
        d, in_d = _block(tl.program_id(1) * BLOCK_D, width, BLOCK_D)
        row = tl.load(bank + atom * b_m + d * b_d, mask=in_d, other=0.0).to(dtype)
        total = tl.zeros([BLOCK_D], dtype)
        total = _segment(
            total, start, start + CELL, order, weights, along, tokens, t_t, t_d, row, d, in_d, K, NORMS, BLOCK_P
        )
        tl.store(cells + cell * width + d, total, mask=in_d)


@triton.jit
def atoms_kernel(
    order, offsets, weights, along, tokens, t_t, t_d, bank, b_m, b_d, cells, out, o_m, o_d, width,
    K: tl.constexpr, NORMS: tl.constexpr, CELL: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The gradient of one atom: the cells that it fills, and its pairs before and after them."""
    atom = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = weights.dtype.element_ty
    d, in_d = _block(tl.program_id(1) * BLOCK_D, width, BLOCK_D)
    start = tl.load(offsets + atom)
    end = tl.load(offsets + atom + 1)
    first_cell = (start + CELL - 1) // CELL
    end_cell = end // CELL
    fills = first_cell < end_cell
    row = tl.load(bank + atom * b_m + d * b_d, mask=in_d, other=0.0).to(dtype)
    total = tl.zeros([BLOCK_D], dtype)
    before = tl.where(fills, first_cell * CELL, end)
    total = _segment(total, start, before, order, weights, along, tokens, t_t, t_d, row, d, in_d, K, NORMS, BLOCK_P)
    if fills:
        for first in range(first_cell, end_cell, BLOCK_P):
            cell = first + tl.arange(0, BLOCK_P)
            at = cells + cell[:, None] * width + d[None, :]
            total += tl.sum(tl.load(at, mask=(cell < end_cell)[:, None] & in_d[None, :], other=0.0), 0)
        after = end_cell * CELL
        total = _segment(total, after, end, order, weights, along, tokens, t_t, t_d, row, d, in_d, K, NORMS, BLOCK_P)
    tl.store(out + atom * o_m + d * o_d, total.to(out.dtype.element_ty), mask=in_d)
