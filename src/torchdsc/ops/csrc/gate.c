/* The gate of a few tokens, where calling a dozen small tensor operations costs more than what they do. */
#include "native.h"

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
            float r = logits[k], inside = clamped(r, clamp);
            /* Softplus without overflow; a logit that is not finite makes its row NaN. */
            float score = inside > 0 ? inside + log1pf(expf(-inside)) : log1pf(expf(inside));
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
