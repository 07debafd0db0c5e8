/* Tokens mixed with those before them, float32: a causal depthwise convolution, in one pass. */
#include "native.h"

/* The most tokens that are mixed into one, as native.py has it. */
enum { MOST_MIXED = 16 };

typedef struct {
    const float *in, *x, *weight;       /* what is mixed: tokens, or gradients with the tokens x beside them */
    const float *onto;                  /* what the mix is added to, or NULL */
    float *out;
    int64_t sequences, length, width, taps;
} Mix;

/* out_t = onto_t + sum_i weight_i * in_(t - i), or in_(t + i) where it goes backward. */
VECTORIZED static void mix_token(const Mix *m, int64_t sequence, int64_t token, int backward) {
    const int64_t d = m->width, seen = backward ? m->length - 1 - token : token;
    const int64_t taps = seen + 1 < m->taps ? seen + 1 : m->taps, step = backward ? d : -d;
    const int64_t place = (sequence * m->length + token) * d;
    const float *row = m->in + place, *onto = m->onto ? m->onto + place : NULL;
    float *out = m->out + place;
    int64_t j = 0;
    for (; j + LANES <= d; j += LANES) {
        Vector sum = AT(m->weight + j) * AT(row + j);
        for (int64_t i = 1; i < taps; i++) sum += AT(m->weight + i * d + j) * AT(row + i * step + j);
        if (onto) sum += AT(onto + j);
        *(Vector *)(out + j) = sum;
    }
    for (; j < d; j++) {
        float sum = 0.0f;
        for (int64_t i = 0; i < taps; i++) sum += m->weight[i * d + j] * row[i * step + j];
        out[j] = onto ? sum + onto[j] : sum;
    }
}

/* The weights' gradient of up to LANES features: sum over tokens of grad_t * x_(t - i). */
VECTORIZED static void weights_of_features(const Mix *m, float *gradient, int64_t first) {
    const int64_t d = m->width, count = d - first < LANES ? d - first : LANES;
    double sums[MOST_MIXED][LANES] = {{0}};
    for (int64_t sequence = 0; sequence < m->sequences; sequence++) {
        const float *grad = m->in + sequence * m->length * d + first, *x = m->x + sequence * m->length * d + first;
        for (int64_t start = 0; start < m->length; start += CARRY) {
            const int64_t end = start + CARRY < m->length ? start + CARRY : m->length;
            for (int64_t i = 0; i < m->taps; i++) {
                float partial[LANES] = {0};
                for (int64_t t = start > i ? start : i; t < end; t++) {
                    const float *g = grad + t * d, *earlier = x + (t - i) * d;
                    if (count == LANES)
                        *(Vector *)partial += AT(g) * AT(earlier);
                    else
                        for (int64_t j = 0; j < count; j++) partial[j] += g[j] * earlier[j];
                }
                for (int lane = 0; lane < LANES; lane++) sums[i][lane] += partial[lane];
            }
        }
    }
    for (int64_t i = 0; i < m->taps; i++)
        for (int64_t j = 0; j < count; j++) gradient[i * d + first + j] = (float)sums[i][j];
}

static int can_mix(int64_t taps) {
    if (taps >= 1 && taps <= MOST_MIXED) return 1;
    PyErr_Format(PyExc_ValueError, "taps must be in [1, %d], got %lld", MOST_MIXED, (long long)taps);
    return 0;
}

/* short_convolution(x, weight, onto or 0, y, sequences, length, width, taps, threads). */
PyObject *short_convolution(PyObject *self, PyObject *args) {
    int64_t p[9];
    if (!read_integers(args, p, 9)) return NULL;
    Mix m = {(const float *)(intptr_t)p[0], NULL, (const float *)(intptr_t)p[1], (const float *)(intptr_t)p[2],
             (float *)(intptr_t)p[3], p[4], p[5], p[6], p[7]};
    int64_t threads = p[8];
    if (!can_mix(m.taps)) return NULL;
    Py_BEGIN_ALLOW_THREADS
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads)
    for (int64_t sequence = 0; sequence < m.sequences; sequence++)
        for (int64_t token = 0; token < m.length; token++) mix_token(&m, sequence, token, 0);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

/* short_convolution_backward(grad, x, weight, dx, dweight, sequences, length, width, taps, threads): gradients of short_convolution. */
PyObject *short_convolution_backward(PyObject *self, PyObject *args) {
    int64_t p[10];
    if (!read_integers(args, p, 10)) return NULL;
    Mix m = {(const float *)(intptr_t)p[0], (const float *)(intptr_t)p[1], (const float *)(intptr_t)p[2], NULL,
             (float *)(intptr_t)p[3], p[5], p[6], p[7], p[8]};
    float *dweight = (float *)(intptr_t)p[4];
    int64_t threads = p[9];
    if (!can_mix(m.taps)) return NULL;
    Py_BEGIN_ALLOW_THREADS
#pragma omp parallel num_threads(threads)
    {
#pragma omp for collapse(2) schedule(static)
        for (int64_t sequence = 0; sequence < m.sequences; sequence++)
            for (int64_t token = 0; token < m.length; token++) mix_token(&m, sequence, token, 1);
#pragma omp for schedule(static)
        for (int64_t first = 0; first < m.width; first += LANES) weights_of_features(&m, dweight, first);
    }
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}
