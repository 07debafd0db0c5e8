/* Product-key selection, float32: the largest scores of each half, and the largest of those of their sums that can be
 * among the top-K. */
#include "native.h"

typedef struct {
    const float *left, *right;          /* one row a token, of side scores */
    float *values;
    int64_t *indices;
    /* top_k: at most side^2; strides: elements from one token to the next. */
    int64_t tokens, side, top_k, left_stride, right_stride, out_stride, threads;
    float half;                         /* to which scores are clamped */
} Halves;

static const Field HALVES[] = {FIELD(Halves, left),        FIELD(Halves, right),        FIELD(Halves, values),
                               FIELD(Halves, indices),     FIELD(Halves, tokens),       FIELD(Halves, side),
                               FIELD(Halves, top_k),       FIELD(Halves, left_stride),  FIELD(Halves, right_stride),
                               FIELD(Halves, out_stride),  FIELD(Halves, threads),      FIELD(Halves, half)};

INLINE void sort_half(Largest *largest, const float *scores, int64_t side, float half) {
    offer_all(largest, scores, side);
    sort_largest(largest);
    for (int64_t i = 0; i < largest->k; i++) {
        /* Adding 0 times a score that is not finite makes it NaN, which clamping would hide. */
        float score = scores[largest->at[i]];
        largest->keys[i] = clamped(score, half) + 0.0f * score;
    }
}

static void sum_halves(const Halves *h, int64_t token, Largest left, Largest right, Largest sums) {
    const int64_t k = h->top_k;
    sort_half(&left, h->left + token * h->left_stride, h->side, h->half);
    sort_half(&right, h->right + token * h->right_stride, h->side, h->half);
    /* With sorted halves, (i + 1)(j + 1) - 1 other sums are no smaller than the one at (i, j). */
    for (int64_t i = 0; i < left.k; i++)
        for (int64_t j = 0; j < right.k && (i + 1) * (j + 1) <= k; j++)
            offer(&sums, left.keys[i] + right.keys[j], i * right.k + j);
    sort_largest(&sums);
    for (int64_t i = 0; i < k; i++) {
        int64_t row = sums.at[i] / right.k, column = sums.at[i] % right.k;
        h->values[token * h->out_stride + i] = left.keys[row] + right.keys[column];
        h->indices[token * h->out_stride + i] = left.at[row] * h->side + right.at[column];
    }
}

PyObject *select_sums(ARGUMENTS) {
    Halves h;
    if (!READ(&h, HALVES) || !can_select(h.top_k)) return NULL;
    const int64_t kept = h.top_k < h.side ? h.top_k : h.side;
    int64_t second = capacity_for(kept), third = 2 * second;
    Room room;
    if (!make_room(&room, h.threads, 0, third + capacity_for(h.top_k))) return NULL;
    Py_BEGIN_ALLOW_THREADS
#pragma omp parallel for schedule(static) num_threads(h.threads)
    for (int64_t token = 0; token < h.tokens; token++)
        sum_halves(&h, token, list_of(&room, THREAD, 0, kept), list_of(&room, THREAD, second, kept),
                   list_of(&room, THREAD, third, h.top_k));
    Py_END_ALLOW_THREADS
    free_room(&room);
    Py_RETURN_NONE;
}
