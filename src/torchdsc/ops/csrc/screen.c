/* Screened selection: bfloat16 logits, with a proven bound on their errors, rule out nearly every atom, and the logits
 * of the few others are computed again in float32. */
#include "native.h"

/* Half the spacing of bfloat16, relative to the value: its rounding error. */
static const float ROUNDING = 0.00390625f;
/* Margin for the rounding of the bounds themselves, which are sums of a few float32 products. */
static const float SLACK = 1.0001f;

INLINE float widened(uint16_t half) {
    union { uint32_t bits; float value; } wide = {.bits = (uint32_t)half << 16};
    return wide.value;
}

/* Round to nearest, ties to even; infinities and NaN stay so. */
INLINE uint16_t narrowed(float value) {
    union { float value; uint32_t bits; } wide = {.value = value};
    return (uint16_t)((wide.bits + 0x7fffu + ((wide.bits >> 16) & 1u)) >> 16);
}

static void round_row(const float *row, uint16_t *out, int64_t n, float *norm, float *error) {
    float squares[LANES] = {0}, errors[LANES] = {0};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int lane = 0; lane < LANES; lane++) {
            float value = row[i + lane];
            uint16_t half = narrowed(value);
            float lost = value - widened(half);
            out[i + lane] = half;
            squares[lane] += value * value;
            errors[lane] += lost * lost;
        }
    for (; i < n; i++) {
        float lost = row[i] - widened(out[i] = narrowed(row[i]));
        squares[0] += row[i] * row[i];
        errors[0] += lost * lost;
    }
    *norm = sqrtf(sum_lanes(squares)) * SLACK;
    *error = sqrtf(sum_lanes(errors)) * SLACK;
}

typedef struct {
    const float *rows;
    uint16_t *out;
    float *norms, *errors;                /* |row| and |row - out row|, rounded up */
    int64_t count, width, threads;
} Rounding;

static const Field ROUND[] = {FIELD(Rounding, rows),  FIELD(Rounding, out),   FIELD(Rounding, norms),
                              FIELD(Rounding, errors), FIELD(Rounding, count), FIELD(Rounding, width),
                              FIELD(Rounding, threads)};

PyObject *round_rows(ARGUMENTS) {
    Rounding r;
    if (!READ(&r, ROUND)) return NULL;
    Py_BEGIN_ALLOW_THREADS
#pragma omp parallel for schedule(static) num_threads(r.threads)
    for (int64_t i = 0; i < r.count; i++)
        round_row(r.rows + i * r.width, r.out + i * r.width, r.width, r.norms + i, r.errors + i);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

typedef struct {
    const float *x, *weight, *bias;       /* (tokens, width), (num_atoms, width), (num_atoms,) or NULL */
    const uint16_t *approximate;          /* (tokens, num_atoms): x weight^T in bfloat16, without the bias */
    const float *x_norms, *x_errors, *weight_norms, *weight_errors;
    float *values;
    int64_t *indices;
    int64_t tokens, width, num_atoms, top_k, threads;
} Screen;

static const Field SCREEN[] = {
    FIELD(Screen, x),        FIELD(Screen, weight),       OPTIONAL(Screen, bias),        FIELD(Screen, approximate),
    FIELD(Screen, x_norms),  FIELD(Screen, x_errors),     FIELD(Screen, weight_norms),   FIELD(Screen, weight_errors),
    FIELD(Screen, values),   FIELD(Screen, indices),      FIELD(Screen, tokens),         FIELD(Screen, width),
    FIELD(Screen, num_atoms), FIELD(Screen, top_k),       FIELD(Screen, threads)};

typedef struct {
    float *lower, *upper;                 /* (num_atoms,) each */
    Largest largest;
} Scratch;

INLINE void offer_logit(const Screen *s, float logit, int64_t atom, Largest *found) {
    offer(found, s->bias != NULL ? logit + s->bias[atom] : logit, atom);
}

/* Offer the logits of count atoms in float32. */
INLINE void offer_exact(const Screen *s, const float *x, const int64_t *atoms, int64_t count, Largest *found) {
    int64_t i = 0;
    for (; i + 4 <= count; i += 4) {
        const float *rows[4];
        float logits[4];
        for (int j = 0; j < 4; j++) rows[j] = s->weight + atoms[i + j] * s->width;
        dot_four(x, rows, logits, s->width);
        for (int j = 0; j < 4; j++) offer_logit(s, logits[j], atoms[i + j], found);
    }
    for (; i < count; i++) offer_logit(s, dot(x, s->weight + atoms[i] * s->width, s->width), atoms[i], found);
}

/* |x w - a| <= |x - x'| |w'| + |x| |w - w'| + accumulation + rounding of a, with primes for rounded rows.
 *
 * Atoms whose upper bound lies below the K-th largest lower bound cannot be among the top-K. |w'| <= |w| + |w - w'|. */
static void screen_row(const Screen *s, int64_t token, const Scratch *scratch) {
    const int64_t n = s->num_atoms, d = s->width, k = s->top_k;
    const uint16_t *approximate = s->approximate + token * n;
    const float *x = s->x + token * d, *weight_norms = s->weight_norms, *weight_errors = s->weight_errors;
    float *lower = scratch->lower, *upper = scratch->upper;
    const float x_norm = s->x_norms[token], x_error = s->x_errors[token];
    /* A generous bound for accumulating d products in float32, with two roundings each. */
    const float accumulation = (float)d * 2.4e-7f * (x_norm + x_error);
    for (int64_t j = 0; j < n; j++) {
        float value = widened(approximate[j]), both = weight_norms[j] + weight_errors[j];
        float bound = (x_error + accumulation) * both + x_norm * weight_errors[j] + ROUNDING * fabsf(value) + 1e-30f;
        lower[j] = value - SLACK * bound;
        upper[j] = value + SLACK * bound;
    }
    if (s->bias != NULL)
        for (int64_t j = 0; j < n; j++) {
            /* Adding the bias rounds once more, here and in the exact logit. */
            float bias = s->bias[j], rounding = 2.4e-7f * (fabsf(upper[j]) + fabsf(lower[j]) + fabsf(bias));
            lower[j] += bias - rounding;
            upper[j] += bias + rounding;
        }
    Largest bounds = scratch->largest, found = scratch->largest;
    float threshold = reached_by(lower, n, k);
    if (threshold != threshold) {
        offer_all(&bounds, lower, n);
        prune(&bounds);
        threshold = bounds.least;
    }
    /* value > bar is the same as value >= threshold. */
    const float bar = nextafterf(threshold, -INFINITY);
    int64_t left[2 * BLOCK], count = 0, i = 0;
    for (; i + BLOCK <= n; i += BLOCK) {
        if (!any_beyond(upper + i, bar, BLOCK)) continue;
        if (count >= BLOCK) {
            offer_exact(s, x, left, count, &found);
            count = 0;
        }
        for (int64_t j = i; j < i + BLOCK; j++) {
            left[count] = j;
            count += upper[j] > bar;
        }
    }
    if (count >= BLOCK) {
        offer_exact(s, x, left, count, &found);
        count = 0;
    }
    for (; i < n; i++) {
        left[count] = i;
        count += upper[i] > bar;
    }
    offer_exact(s, x, left, count, &found);
    sort_largest(&found);
    for (int64_t i = 0; i < k; i++) {
        s->values[token * k + i] = found.keys[i];
        s->indices[token * k + i] = found.at[i];
    }
}

/* The K largest logits of each token and their atoms. All norms must be finite. */
PyObject *screen(ARGUMENTS) {
    Screen s;
    if (!READ(&s, SCREEN) || !can_select(s.top_k)) return NULL;
    Room room;
    if (!make_room(&room, s.threads, 2 * s.num_atoms, capacity_for(s.top_k))) return NULL;
    Py_BEGIN_ALLOW_THREADS
#pragma omp parallel num_threads(s.threads)
    {
        float *own = floats_of(&room, THREAD);
        Scratch scratch = {own, own + s.num_atoms, list_of(&room, THREAD, 0, s.top_k)};
#pragma omp for schedule(static)
        for (int64_t token = 0; token < s.tokens; token++) screen_row(&s, token, &scratch);
    }
    Py_END_ALLOW_THREADS
    free_room(&room);
    Py_RETURN_NONE;
}
