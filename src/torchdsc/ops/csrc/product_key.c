/* Selection among the sums of two halves, float32: the largest of each half, and of the sums that can be among the
 * largest. */
#include "native.h"

typedef struct {
    const float *left, *right;          /* one row a token, of side scores */
    float *values;
    int64_t *indices;
    int64_t side, top_k, left_stride, right_stride, out_stride;
    float half;                         /* to which scores are clamped */
} Halves;

INLINE void sort_half(Largest *largest, const float *scores, int64_t side, float half) {
    offer_all(largest, scores, side);
    sort_largest(largest);
    for (int64_t i = 0; i < largest->k; i++) {
        /* Adding nothing of a score that is not finite makes it NaN, which clamping would hide. */
        float score = scores[largest->at[i]];
        largest->keys[i] = clamped(score, half) + 0.0f * score;
    }
}

VECTORIZED static void sum_halves(const Halves *h, int64_t token, Largest left, Largest right, Largest sums) {
    const int64_t k = h->top_k;
    sort_half(&left, h->left + token * h->left_stride, h->side, h->half);
    sort_half(&right, h->right + token * h->right_stride, h->side, h->half);
    /* Of the sums in order of both, one at (i, j) has (i + 1)(j + 1) - 1 before it that are no smaller. */
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

/* select_sums(left, right, values, indices, tokens, side, top_k, left_stride, right_stride, out_stride, threads, half):
 * top_k at most side^2; strides in elements from one token to the next. */
PyObject *select_sums(PyObject *self, PyObject *args) {
    int64_t p[11];
    float half;
    if (!read_integers(args, p, 11) || !read_float(args, 11, &half)) return NULL;
    Halves h = {(const float *)(intptr_t)p[0], (const float *)(intptr_t)p[1], (float *)(intptr_t)p[2],
                (int64_t *)(intptr_t)p[3], p[5], p[6], p[7], p[8], p[9], half};
    int64_t tokens = p[4], threads = p[10], kept = h.top_k < h.side ? h.top_k : h.side;
    if (!can_select(h.top_k)) return NULL;
    int64_t second = capacity_for(kept), third = 2 * second;
    Room room;
    if (!make_room(&room, threads, 0, third + capacity_for(h.top_k))) return NULL;
    Py_BEGIN_ALLOW_THREADS
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t token = 0; token < tokens; token++)
        sum_halves(&h, token, list_of(&room, THREAD, 0, kept), list_of(&room, THREAD, second, kept),
                   list_of(&room, THREAD, third, h.top_k));
    Py_END_ALLOW_THREADS
    free_room(&room);
    Py_RETURN_NONE;
}
