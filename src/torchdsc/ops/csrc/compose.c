/* The composition, float32: every selected row is read once, for its product and its norm. */
#include "native.h"

/* Product with a row and, where it is asked for, the row's squared norm. */
INLINE float dot_and_square(const float *x, const float *row, int64_t n, float *square) {
    Vector products = {0}, squares = {0};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        Vector values = AT(row + i);
        products += AT(x + i) * values;
        squares += values * values;
    }
    float product = 0.0f, rest = 0.0f;
    for (; i < n; i++) {
        product += x[i] * row[i];
        rest += row[i] * row[i];
    }
    *square = rest + sum_lanes((const float *)&squares);
    return product + sum_lanes((const float *)&products);
}

INLINE float inverse_norm(float square, float eps) {
    float norm = sqrtf(square);
    return 1.0f / (norm < eps ? eps : norm);
}

typedef struct {
    const float *x, *u, *v, *coefficients;
    const int64_t *indices;
    float *y, *latent;
    int64_t top_k, d_in, d_out;
    float eps;      /* negative: atoms as they are */
} Composition;

VECTORIZED static void compose_token(const Composition *c, int64_t token) {
    const float *x = c->x + token * c->d_in, eps = c->eps;
    float *y = c->y + token * c->d_out;
    for (int64_t i = 0; i < c->d_out; i++) y[i] = 0.0f;
    for (int64_t pair = token * c->top_k; pair < (token + 1) * c->top_k; pair++) {
        const float *row_u = c->u + c->indices[pair] * c->d_in, *row_v = c->v + c->indices[pair] * c->d_out;
        float square, latent = dot_and_square(x, row_u, c->d_in, &square);
        if (eps >= 0) latent *= inverse_norm(square, eps);
        c->latent[pair] = latent;
        float weight = latent * c->coefficients[pair];
        if (eps >= 0) weight *= inverse_norm(dot(row_v, row_v, c->d_out), eps);
        int64_t i = 0;
        for (; i + LANES <= c->d_out; i += LANES) *(Vector *)(y + i) += weight * AT(row_v + i);
        for (; i < c->d_out; i++) y[i] += weight * row_v[i];
    }
}

/* compose(x, u, v, indices, coefficients, y, latent, tokens, top_k, d_in, d_out, num_atoms, threads, eps): equations
 * (3) and (14); eps < 0 leaves atoms as they are. */
PyObject *compose(PyObject *self, PyObject *args) {
    int64_t p[13];
    float eps;
    if (!read_integers(args, p, 13) || !read_float(args, 13, &eps)) return NULL;
    Composition c = {(const float *)(intptr_t)p[0], (const float *)(intptr_t)p[1], (const float *)(intptr_t)p[2],
                     (const float *)(intptr_t)p[4], (const int64_t *)(intptr_t)p[3], (float *)(intptr_t)p[5],
                     (float *)(intptr_t)p[6], p[8], p[9], p[10], eps};
    int64_t tokens = p[7], num_atoms = p[11], threads = p[12];
    for (int64_t i = 0; i < tokens * c.top_k; i++)
        if (c.indices[i] < 0 || c.indices[i] >= num_atoms) {
            PyErr_SetString(PyExc_IndexError, "indices must be in [0, number of atoms)");
            return NULL;
        }
    if (threads == 1) {
        for (int64_t token = 0; token < tokens; token++) compose_token(&c, token);
        Py_RETURN_NONE;
    }
    Py_BEGIN_ALLOW_THREADS
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t token = 0; token < tokens; token++) compose_token(&c, token);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}
