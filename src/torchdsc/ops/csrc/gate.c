/* The gate for few tokens, where the overhead of a dozen tensor operations exceeds their work. */
#include "native.h"

typedef struct {
    const float *logits;
    float *coefficients, *strength;
    int64_t tokens, top_k, kind;        /* kind: sum 0, mean 1, none 2 */
    float clamp, eps;
} Gate;

static const Field GATE[] = {FIELD(Gate, logits), FIELD(Gate, coefficients), FIELD(Gate, strength), FIELD(Gate, tokens),
                             FIELD(Gate, top_k), FIELD(Gate, kind), FIELD(Gate, clamp), FIELD(Gate, eps)};

/* Equation (5). */
PyObject *gate(ARGUMENTS) {
    Gate g;
    if (!READ(&g, GATE)) return NULL;
    const float *logits = g.logits;
    float *coefficients = g.coefficients;
    const int64_t top_k = g.top_k;
    for (int64_t t = 0; t < g.tokens; t++, logits += top_k, coefficients += top_k) {
        float sum = 0.0f;
        for (int64_t k = 0; k < top_k; k++) {
            float r = logits[k], inside = clamped(r, g.clamp);
            /* Softplus without overflow; a logit that is not finite makes its row NaN. */
            float score = inside > 0 ? inside + log1pf(expf(-inside)) : log1pf(expf(inside));
            coefficients[k] = score + 0.0f * r;
            sum += coefficients[k];
        }
        float factor = g.kind == 0 ? tanhf(sum) : (g.kind == 1 ? tanhf(sum / (float)top_k) : 1.0f);
        factor /= sum + g.eps;
        for (int64_t k = 0; k < top_k; k++) coefficients[k] *= factor;
        g.strength[t] = sum;
    }
    Py_RETURN_NONE;
}
