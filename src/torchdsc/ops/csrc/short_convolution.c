/* A causal depthwise convolution, float32, in one pass. */
#include "native.h"

/* The largest width, as in native.py. */
enum { MOST_TAPS = 16 };

typedef struct {
    const float *x, *weight;            /* (sequences, num_tokens, width) and (taps, width) */
    const float *onto;                  /* added to y, of the same shape, or NULL */
    float *y;                           /* (sequences, length, width): of the last tokens of each sequence */
    int64_t sequences, num_tokens, length, width, taps, threads;
} Convolution;

static const Field CONVOLUTION[] = {
    FIELD(Convolution, x),         FIELD(Convolution, weight),     OPTIONAL(Convolution, onto), FIELD(Convolution, y),
    FIELD(Convolution, sequences), FIELD(Convolution, num_tokens), FIELD(Convolution, length),  FIELD(Convolution, width),
    FIELD(Convolution, taps),      FIELD(Convolution, threads)};

/* out = onto + sum over i < taps of weight_i * row_i, with a stride of step between rows. */
INLINE void sum_rows(const float *row, int64_t step, const float *weight, int64_t taps, int64_t d, const float *onto,
                     float *out) {
    int64_t j = 0;
    for (; j + WIDTH <= d; j += WIDTH) {
        Vector sum = AT(weight + j) * AT(row + j);
        for (int64_t i = 1; i < taps; i++) sum += AT(weight + i * d + j) * AT(row + i * step + j);
        if (onto) sum += AT(onto + j);
        *(Vector *)(out + j) = sum;
    }
    for (; j < d; j++) {
        float sum = weight[j] * row[j];
        for (int64_t i = 1; i < taps; i++) sum += weight[i * d + j] * row[i * step + j];
        out[j] = onto ? sum + onto[j] : sum;
    }
}

INLINE int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }

static int has_room_for(int64_t taps) {
    if (taps >= 1 && taps <= MOST_TAPS) return 1;
    PyErr_Format(PyExc_ValueError, "taps must be in [1, %d], got %lld", MOST_TAPS, (long long)taps);
    return 0;
}

/* y_t = onto_t + sum over i of weight_i * x_(t - i). */
PyObject *short_convolution(ARGUMENTS) {
    Convolution c;
    if (!READ(&c, CONVOLUTION) || !has_room_for(c.taps)) return NULL;
    const int64_t d = c.width, start = c.num_tokens - c.length;
    Py_BEGIN_ALLOW_THREADS
#pragma omp parallel for collapse(2) schedule(static) num_threads(c.threads)
    for (int64_t sequence = 0; sequence < c.sequences; sequence++)
        for (int64_t t = 0; t < c.length; t++) {
            const int64_t place = (sequence * c.length + t) * d;
            sum_rows(c.x + (sequence * c.num_tokens + start + t) * d, -d, c.weight, at_most(start + t + 1, c.taps), d,
                     c.onto ? c.onto + place : NULL, c.y + place);
        }
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

typedef struct {
    const float *grad, *x, *weight;     /* grad: the gradient of y, for every token */
    float *dx, *dweight;
    int64_t sequences, length, width, taps, threads;
} Slopes;

static const Field SLOPES[] = {FIELD(Slopes, grad),      FIELD(Slopes, x),      FIELD(Slopes, weight), FIELD(Slopes, dx),
                               FIELD(Slopes, dweight),   FIELD(Slopes, sequences), FIELD(Slopes, length),
                               FIELD(Slopes, width),     FIELD(Slopes, taps),   FIELD(Slopes, threads)};

/* Gradient of the weights for up to LANES features: sum over tokens of grad_t * x_(t - i). */
static void weights_of_features(const Slopes *s, int64_t first) {
    const int64_t d = s->width, count = at_most(d - first, LANES);
    double sums[MOST_TAPS][LANES] = {{0}};
    for (int64_t sequence = 0; sequence < s->sequences; sequence++) {
        const float *grad = s->grad + sequence * s->length * d + first, *x = s->x + sequence * s->length * d + first;
        for (int64_t start = 0; start < s->length; start += CARRY) {
            const int64_t end = at_most(start + CARRY, s->length);
            for (int64_t i = 0; i < s->taps; i++) {
                float partial[LANES] = {0};
                Sums whole = {{{0}}};
                for (int64_t t = start > i ? start : i; t < end; t++) {
                    const float *g = grad + t * d, *earlier = x + (t - i) * d;
                    if (count == LANES)
                        add_products(&whole, g, earlier);
                    else
                        for (int64_t j = 0; j < count; j++) partial[j] += g[j] * earlier[j];
                }
                const float *found = count == LANES ? (const float *)&whole : partial;
                for (int lane = 0; lane < LANES; lane++) sums[i][lane] += found[lane];
            }
        }
    }
    for (int64_t i = 0; i < s->taps; i++)
        for (int64_t j = 0; j < count; j++) s->dweight[i * d + first + j] = (float)sums[i][j];
}

/* Gradients of short_convolution with length = num_tokens; dx_t = sum over i of weight_i * grad_(t + i). */
PyObject *short_convolution_backward(ARGUMENTS) {
    Slopes s;
    if (!READ(&s, SLOPES) || !has_room_for(s.taps)) return NULL;
    const int64_t d = s.width;
    Py_BEGIN_ALLOW_THREADS
#pragma omp parallel num_threads(s.threads)
    {
#pragma omp for collapse(2) schedule(static)
        for (int64_t sequence = 0; sequence < s.sequences; sequence++)
            for (int64_t t = 0; t < s.length; t++) {
                const int64_t place = (sequence * s.length + t) * d;
                sum_rows(s.grad + place, d, s.weight, at_most(s.length - t, s.taps), d, NULL, s.dx + place);
            }
#pragma omp for schedule(static)
        for (int64_t first = 0; first < d; first += LANES) weights_of_features(&s, first);
    }
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}
