/* Selection from rows of logits, float32: top-K and the regularisers' statistics in one pass, and its gradient. */
#include "native.h"

#include <stdlib.h>

/* exp of a value <= 0, to about an ulp; results are at least the smallest normal number. NaN stays NaN. */
INLINE float exp_nonpositive(float x) {
    x = x < -87.0f ? -87.0f : x;
    /* Adding 1.5 * 2^23 rounds to an integer, which is then in the low bits. */
    union { float value; uint32_t bits; } shifted = {.value = x * 1.44269504f + 12582912.0f}, power;
    float n = shifted.value - 12582912.0f;
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    power.bits = (shifted.bits << 23) + 0x3f800000u;
    return p * power.value;
}

INLINE void write_largest(const float *row, int64_t n, Largest largest, float *values, int64_t *at) {
    offer_all(&largest, row, n);
    sort_largest(&largest);
    for (int64_t k = 0; k < largest.k; k++) {
        at[k] = largest.at[k];
        /* Keys of NaN are infinite. */
        values[k] = row[at[k]];
    }
}

typedef struct {
    const float *logits, *weights;          /* weights: of tokens, or NULL */
    float *values;
    int64_t *indices;
    float *log_normalizer, *probability_sum;
    int64_t tokens, num_atoms, top_k, stride, threads;      /* stride: floats from one row of logits to the next */
    float clamp;
} Forward;

static const Field FORWARD[] = {
    FIELD(Forward, logits),         OPTIONAL(Forward, weights),      FIELD(Forward, values), FIELD(Forward, indices),
    FIELD(Forward, log_normalizer), FIELD(Forward, probability_sum), FIELD(Forward, tokens), FIELD(Forward, num_atoms),
    FIELD(Forward, top_k),          FIELD(Forward, stride),          FIELD(Forward, threads), FIELD(Forward, clamp)};

/* One token; adds softmax times weight to partial. */
static void select_row(const Forward *f, int64_t token, Largest largest_values, float *exponentials,
                                  float *partial) {
    const int64_t n = f->num_atoms;
    const float *row = f->logits + token * f->stride, clamp = f->clamp;
    int64_t *at = f->indices + token * f->top_k;
    write_largest(row, n, largest_values, f->values + token * f->top_k, at);
    float largest = clamped(row[at[0]], clamp);
    double total = 0.0;
    int64_t i = 0;
    for (; i + BLOCK <= n; i += BLOCK) {
        float lanes[LANES] = {0};
        for (int j = 0; j < BLOCK; j += LANES)
            for (int lane = 0; lane < LANES; lane++) {
                float e = exp_nonpositive(clamped(row[i + j + lane], clamp) - largest);
                exponentials[i + j + lane] = e;
                lanes[lane] += e;
            }
        total += sum_lanes(lanes);
    }
    for (; i < n; i++) total += exponentials[i] = exp_nonpositive(clamped(row[i], clamp) - largest);
    f->log_normalizer[token] = (float)(log(total) + largest);
    /* Tokens that do not count may be NaN. */
    if (f->weights && f->weights[token] == 0.0f) return;
    float share = (float)((f->weights ? f->weights[token] : 1.0) / total);
    for (int64_t j = 0; j < n; j++) partial[j] += exponentials[j] * share;
}

static void carry_over(float *partial, double *sums, int64_t n) {
    for (int64_t j = 0; j < n; j++) {
        sums[j] += partial[j];
        partial[j] = 0.0f;
    }
}

/* Partial sums of the threads are added in a fixed order. */
PyObject *select_rows(ARGUMENTS) {
    Forward f;
    if (!READ(&f, FORWARD) || !can_select(f.top_k)) return NULL;
    const int64_t n = f.num_atoms, threads = f.threads;
    double *sums = calloc((size_t)(threads * n), sizeof(double));
    Room room;
    if (sums == NULL) return PyErr_NoMemory();
    if (!make_room(&room, threads, 2 * n, capacity_for(f.top_k))) {
        free(sums);
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
#pragma omp parallel num_threads(threads)
    {
        float *partial = floats_of(&room, THREAD), *exponentials = partial + n;
        Largest largest = list_of(&room, THREAD, 0, f.top_k);
        double *own = sums + THREAD * n;
        int64_t done = 0;
#pragma omp for schedule(static)
        for (int64_t token = 0; token < f.tokens; token++) {
            select_row(&f, token, largest, exponentials, partial);
            if (++done % CARRY == 0) carry_over(partial, own, n);
        }
        carry_over(partial, own, n);
    }
    for (int64_t j = 0; j < n; j++) {
        double sum = 0.0;
        for (int64_t thread = 0; thread < threads; thread++) sum += sums[thread * n + j];
        f.probability_sum[j] = (float)sum;
    }
    Py_END_ALLOW_THREADS
    free(sums);
    free_room(&room);
    Py_RETURN_NONE;
}

typedef struct {
    const float *logits, *weights;          /* weights: of tokens, or NULL */
    const int64_t *indices;
    const float *log_normalizer, *grad_values, *grad_log_normalizer, *grad_probability_sum;
    float *grad;
    int64_t tokens, num_atoms, top_k, stride, grad_stride, threads;
    float clamp;
} Backward;

static const Field BACKWARD[] = {
    FIELD(Backward, logits),      OPTIONAL(Backward, weights),         FIELD(Backward, indices),
    FIELD(Backward, log_normalizer), FIELD(Backward, grad_values),     FIELD(Backward, grad_log_normalizer),
    FIELD(Backward, grad_probability_sum), FIELD(Backward, grad),      FIELD(Backward, tokens),
    FIELD(Backward, num_atoms),   FIELD(Backward, top_k),              FIELD(Backward, stride),
    FIELD(Backward, grad_stride), FIELD(Backward, threads),            FIELD(Backward, clamp)};

INLINE void add_selected(const Backward *b, int64_t token, float *out) {
    for (int64_t k = 0; k < b->top_k; k++)
        out[b->indices[token * b->top_k + k]] += b->grad_values[token * b->top_k + k];
}

/* The gradient of w g . p + h logsumexp(r), with p = softmax(r), is p (h + w (g - g . p)); 0 for a clamped logit. */
static void select_row_backward(const Backward *b, int64_t token) {
    const int64_t n = b->num_atoms;
    const float *row = b->logits + token * b->stride, *g = b->grad_probability_sum, clamp = b->clamp;
    float *out = b->grad + token * b->grad_stride, normalizer = b->log_normalizer[token];
    double mean = 0.0;
    int64_t i = 0;
    if (b->weights && b->weights[token] == 0.0f && b->grad_log_normalizer[token] == 0.0f) {
        /* A token without a gradient, whose softmax may be NaN. */
        for (; i < n; i++) out[i] = 0.0f;
        add_selected(b, token, out);
        return;
    }
    for (; i + BLOCK <= n; i += BLOCK) {
        float lanes[LANES] = {0};
        for (int j = 0; j < BLOCK; j += LANES)
            for (int lane = 0; lane < LANES; lane++) {
                float difference = clamped(row[i + j + lane], clamp) - normalizer;
                /* By rounding of the normaliser, the largest can be just above 0. */
                float e = exp_nonpositive(difference > 0.0f ? 0.0f : difference);
                out[i + j + lane] = e;
                lanes[lane] += e * g[i + j + lane];
            }
        mean += sum_lanes(lanes);
    }
    for (; i < n; i++) {
        float difference = clamped(row[i], clamp) - normalizer;
        out[i] = exp_nonpositive(difference > 0.0f ? 0.0f : difference);
        mean += out[i] * g[i];
    }
    float weight = b->weights ? b->weights[token] : 1.0f;
    float constant = b->grad_log_normalizer[token] - weight * (float)mean;
    for (int64_t j = 0; j < n; j++) {
        float gradient = out[j] * (constant + weight * g[j]);
        out[j] = row[j] > clamp || row[j] < -clamp ? 0.0f : gradient;
    }
    add_selected(b, token, out);
}

PyObject *select_rows_backward(ARGUMENTS) {
    Backward b;
    if (!READ(&b, BACKWARD)) return NULL;
    Py_BEGIN_ALLOW_THREADS
#pragma omp parallel for schedule(static) num_threads(b.threads)
    for (int64_t token = 0; token < b.tokens; token++) select_row_backward(&b, token);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

typedef struct {
    const float *logits;
    float *values;
    int64_t *indices;
    int64_t tokens, num_atoms, top_k, stride, threads;
} Rows;

static const Field ROWS[] = {FIELD(Rows, logits),    FIELD(Rows, values), FIELD(Rows, indices), FIELD(Rows, tokens),
                             FIELD(Rows, num_atoms), FIELD(Rows, top_k),  FIELD(Rows, stride),  FIELD(Rows, threads)};

PyObject *largest_of_rows(ARGUMENTS) {
    Rows r;
    if (!READ(&r, ROWS) || !can_select(r.top_k)) return NULL;
    const int64_t k = r.top_k;
    Room room;
    if (!make_room(&room, r.threads, 0, capacity_for(k))) return NULL;
    Py_BEGIN_ALLOW_THREADS
#pragma omp parallel for schedule(static) num_threads(r.threads)
    for (int64_t t = 0; t < r.tokens; t++)
        write_largest(r.logits + t * r.stride, r.num_atoms, list_of(&room, THREAD, 0, k), r.values + t * k,
                      r.indices + t * k);
    Py_END_ALLOW_THREADS
    free_room(&room);
    Py_RETURN_NONE;
}
