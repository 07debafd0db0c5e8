/* One-token work, where calling a dozen small tensor operations costs more than what they do. Arrays are float32,
 * indices int64; the callers are gate.py and compose/gather.py. */
#include "native.h"

INLINE float inverse_norm(const float *row, int64_t n, float eps) {
    float norm = sqrtf(dot(row, row, n));
    return 1.0f / (norm < eps ? eps : norm);
}

/* gate(logits, coefficients, strength, tokens, top_k, kind, clamp, eps): equation (5), kinds sum 0, mean 1, none 2. */
PyObject *gate(PyObject *self, PyObject *args) {
    int64_t v[6];
    float clamp, eps;
    if (!read_integers(args, v, 6) || !read_float(args, 6, &clamp) || !read_float(args, 7, &eps)) return NULL;
    const float *logits = (const float *)(intptr_t)v[0];
    float *coefficients = (float *)(intptr_t)v[1], *strength = (float *)(intptr_t)v[2];
    int64_t tokens = v[3], top_k = v[4], kind = v[5];
    for (int64_t t = 0; t < tokens; t++, logits += top_k, coefficients += top_k) {
        float sum = 0.0f;
        for (int64_t k = 0; k < top_k; k++) {
            float r = logits[k], clamped = r < -clamp ? -clamp : (r > clamp ? clamp : r);
            /* Softplus without overflow; a logit that is not finite makes its row NaN. */
            float score = clamped > 0 ? clamped + log1pf(expf(-clamped)) : log1pf(expf(clamped));
            coefficients[k] = score + 0.0f * r;
            sum += coefficients[k];
        }
        float factor = kind == 0 ? tanhf(sum) : (kind == 1 ? tanhf(sum / (float)top_k) : 1.0f);
        factor /= sum + eps;
        for (int64_t k = 0; k < top_k; k++) coefficients[k] *= factor;
        strength[t] = sum;
    }
    Py_RETURN_NONE;
}

VECTORIZED static void compose_tokens(const float *x, const float *u, const float *v, const int64_t *indices,
                                      const float *coefficients, float *y, float *latent, int64_t tokens,
                                      int64_t top_k, int64_t d_in, int64_t d_out, float eps) {
    for (int64_t t = 0; t < tokens; t++, x += d_in, y += d_out, indices += top_k, coefficients += top_k, latent += top_k) {
        for (int64_t i = 0; i < d_out; i++) y[i] = 0.0f;
        for (int64_t k = 0; k < top_k; k++) {
            const float *row_u = u + indices[k] * d_in, *row_v = v + indices[k] * d_out;
            latent[k] = dot(x, row_u, d_in) * (eps < 0 ? 1.0f : inverse_norm(row_u, d_in, eps));
            float weight = latent[k] * coefficients[k] * (eps < 0 ? 1.0f : inverse_norm(row_v, d_out, eps));
            for (int64_t i = 0; i < d_out; i++) y[i] += weight * row_v[i];
        }
    }
}

/* compose(x, u, v, indices, coefficients, y, latent, tokens, top_k, d_in, d_out, num_atoms, eps): equations (3) and
 * (14); eps < 0 leaves atoms as they are. */
PyObject *compose(PyObject *self, PyObject *args) {
    int64_t p[12];
    float eps;
    if (!read_integers(args, p, 12) || !read_float(args, 12, &eps)) return NULL;
    const float *x = (const float *)(intptr_t)p[0], *u = (const float *)(intptr_t)p[1], *v = (const float *)(intptr_t)p[2];
    const int64_t *indices = (const int64_t *)(intptr_t)p[3];
    const float *coefficients = (const float *)(intptr_t)p[4];
    float *y = (float *)(intptr_t)p[5], *latent = (float *)(intptr_t)p[6];
    int64_t tokens = p[7], top_k = p[8], d_in = p[9], d_out = p[10], num_atoms = p[11];
    for (int64_t i = 0; i < tokens * top_k; i++)
        if (indices[i] < 0 || indices[i] >= num_atoms) {
            PyErr_SetString(PyExc_IndexError, "indices must be in [0, number of atoms)");
            return NULL;
        }
    compose_tokens(x, u, v, indices, coefficients, y, latent, tokens, top_k, d_in, d_out, eps);
    Py_RETURN_NONE;
}
