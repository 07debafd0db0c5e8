/* Shared by the files of the compiled module. A function's arguments are the members of a struct, given by name. Arrays
 * are row-major and contiguous unless a stride is given. The caller keeps the tensors alive during a call. */
#ifndef TORCHDSC_NATIVE_H
#define TORCHDSC_NATIVE_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>

#ifdef _OPENMP
#include <omp.h>
#define THREAD omp_get_thread_num()
#else
#define THREAD 0
#endif

#define INLINE static inline __attribute__((always_inline))

/* Number of partial sums of a dot product, and of values tested together; multiples of WIDTH. */
enum { LANES = 16, BLOCK = 64 };

/* Floats in a vector register of the processors that this build is for. */
#if defined(__AVX512F__)
enum { WIDTH = 16 };
#elif defined(__AVX__)
enum { WIDTH = 8 };
#else
enum { WIDTH = 4 };
#endif

/* After so many rows, single-precision sums over tokens are added to double-precision ones. */
enum { CARRY = 64 };

INLINE float clamped(float value, float clamp) { return value < -clamp ? -clamp : (value > clamp ? clamp : value); }

/* A vector register, for loops that the compiler does not vectorise itself; it may be loaded from any address. A type
 * wider than a register would be written to memory between operations. */
typedef float Vector __attribute__((vector_size(WIDTH * sizeof(float)), aligned(sizeof(float)), may_alias));

#define AT(p) (*(const Vector *)(p))

/* LANES partial sums in every build, so that the order of additions does not depend on WIDTH. */
typedef struct {
    Vector parts[LANES / WIDTH];
} Sums;

INLINE void add_products(Sums *sums, const float *a, const float *b) {
    for (int j = 0; j < LANES / WIDTH; j++) sums->parts[j] += AT(a + j * WIDTH) * AT(b + j * WIDTH);
}

/* By halves, so that an addition does not wait for the one before it. */
INLINE float sum_lanes(const float *lanes) {
    float sums[LANES / 2];
    for (int lane = 0; lane < LANES / 2; lane++) sums[lane] = lanes[lane] + lanes[lane + LANES / 2];
    for (int half = LANES / 4; half > 0; half /= 2)
        for (int lane = 0; lane < half; lane++) sums[lane] += sums[lane + half];
    return sums[0];
}

INLINE float dot(const float *a, const float *b, int64_t n) {
    Sums even = {{{0}}}, odd = {{{0}}};
    int64_t i = 0;
    for (; i + 2 * LANES <= n; i += 2 * LANES) {
        add_products(&even, a + i, b + i);
        add_products(&odd, a + i + LANES, b + i + LANES);
    }
    float rest = 0.0f;
    for (; i < n; i++) rest += a[i] * b[i];
    for (int j = 0; j < LANES / WIDTH; j++) even.parts[j] += odd.parts[j];
    return rest + sum_lanes((const float *)&even);
}

/* Dot products of a with four rows, in one pass over a. */
INLINE void dot_four(const float *a, const float *const *rows, float *products, int64_t n) {
    Sums sums[4] = {{{{0}}}};
    float rest[4] = {0};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int j = 0; j < 4; j++) add_products(&sums[j], a + i, rows[j] + i);
    for (; i < n; i++)
        for (int j = 0; j < 4; j++) rest[j] += a[i] * rows[j][i];
    for (int j = 0; j < 4; j++) products[j] = rest[j] + sum_lanes((const float *)&sums[j]);
}

/* The largest k, as in native.py. */
enum { MOST_SELECTED = 64 };

/* The k largest of the values offered so far, and others, which are pruned when the arrays are full. */
typedef struct {
    float *keys;    /* values, room for capacity; NaN is stored as infinity, the largest, as in torch.topk */
    int64_t *at;
    int64_t k, held, capacity;
    float least;    /* values <= least are not among the k largest; NaN at the start, which excludes none */
} Largest;

INLINE int64_t capacity_for(int64_t k) { return (k + 2 * BLOCK + LANES - 1) / LANES * LANES; }

/* Working memory of all threads, zero at the start: for each thread floats, and lists of the k largest. */
typedef struct {
    float *floats;                      /* for each thread num_floats numbers, then the keys of its lists */
    int64_t *at;
    int64_t num_floats, capacity;       /* per thread; capacity is that of all its lists together */
} Room;

/* Returns 0 with an error set if there is not enough memory. */
int make_room(Room *room, int64_t threads, int64_t num_floats, int64_t capacity);
void free_room(Room *room);

INLINE float *floats_of(const Room *room, int64_t thread) {
    return room->floats + thread * (room->num_floats + room->capacity);
}

/* An empty list of the k largest, at the given place in the thread's memory for lists. */
INLINE Largest list_of(const Room *room, int64_t thread, int64_t place, int64_t k) {
    float *keys = floats_of(room, thread) + room->num_floats;
    Largest largest = {keys + place, room->at + thread * room->capacity + place, k, 0, capacity_for(k), NAN};
    return largest;
}

/* Keep only the k largest, in any order. */
void prune(Largest *largest);

INLINE void offer(Largest *l, float value, int64_t index) {
    if (value <= l->least) return;
    l->keys[l->held] = value != value ? INFINITY : value;
    l->at[l->held++] = index;
    if (l->held == l->capacity) prune(l);
}

/* Keep only the k largest, in descending order. A value's rank is the count of those before it, found without
 * branches. */
INLINE void sort_largest(Largest *l) {
    int32_t rank[2 * BLOCK] = {0};
    float keys[MOST_SELECTED + 1];
    int64_t at[MOST_SELECTED + 1];
    if (l->held > 2 * BLOCK) prune(l);
    const int32_t held = (int32_t)l->held, padded = (held + LANES - 1) / LANES * LANES;
    for (int32_t j = held; j < padded; j++) l->keys[j] = -INFINITY;
    for (int32_t j = 0; j < held; j++) {
        const float key = l->keys[j];
        for (int32_t i = 0; i < padded; i++) rank[i] += (key > l->keys[i]) | ((key == l->keys[i]) & (j < i));
    }
    for (int32_t i = 0; i < held; i++) {
        const int64_t place = rank[i] < l->k ? rank[i] : l->k;
        keys[place] = l->keys[i];
        at[place] = l->at[i];
    }
    if (held > l->k) l->held = l->k;
    for (int64_t i = 0; i < l->held; i++) {
        l->keys[i] = keys[i];
        l->at[i] = at[i];
    }
}

/* Steps of bisection towards the k-th largest group maximum, and the k from which that is faster than insertion. */
enum { HALVINGS = 8, FEWEST_HALVED = 8 };

/* Whether one of count values exceeds the bar or is NaN; count must be a compile-time constant to be fast. */
INLINE int any_beyond(const float *values, float bar, const int count) {
    int some = 0;
    for (int i = 0; i < count; i++) some |= !(values[i] <= bar);
    return some;
}

/* Raise groups[j] to the largest of values[j], values[j + count], ...; NaN is ignored. */
INLINE void raise_groups(const float *values, int64_t n, float *groups, const int count) {
    for (int64_t i = 0; i + count <= n; i += count)
        for (int j = 0; j < count; j++) groups[j] = values[i + j] > groups[j] ? values[i + j] : groups[j];
}

/* A value that at least k of count groups reach, close to the k-th largest, by bisection; NaN if one is not finite. */
INLINE float halved_to(const float *groups, int64_t k, const int count) {
    float lows[2 * BLOCK], highs[2 * BLOCK];
    for (int j = 0; j < count; j++) lows[j] = highs[j] = groups[j];
    /* By halves, as in sum_lanes. */
    for (int half = count / 2; half > 0; half /= 2)
        for (int j = 0; j < half; j++) {
            lows[j] = lows[j + half] < lows[j] ? lows[j + half] : lows[j];
            highs[j] = highs[j + half] > highs[j] ? highs[j + half] : highs[j];
        }
    float low = lows[0], high = highs[0];
    if (!(high - low < INFINITY)) return NAN;
    for (int step = 0; step < HALVINGS; step++) {
        float middle = low + 0.5f * (high - low);
        int reach = 0;
        for (int j = 0; j < count; j++) reach += groups[j] >= middle;
        if (reach >= k)
            low = middle;
        else
            high = middle;
    }
    return low;
}

/* The k-th largest of count groups. */
INLINE float kth_of(const float *groups, int64_t k, const int count) {
    float best[FEWEST_HALVED];
    for (int64_t j = 0; j < k; j++) best[j] = -INFINITY;
    for (int j = 0; j < count; j++) {
        /* Insert without branches, which would be mispredicted: each place keeps the larger value. */
        float value = groups[j];
        for (int64_t place = 0; place < k; place++) {
            float kept = value > best[place] ? value : best[place];
            value = value > best[place] ? best[place] : value;
            best[place] = kept;
        }
    }
    return best[k - 1] > -INFINITY ? best[k - 1] : NAN;
}

/* reached_by with a compile-time constant number of groups. */
INLINE float reached_by_groups(const float *values, int64_t n, int64_t k, const int count) {
    float groups[2 * BLOCK];
    if (n < count) return NAN;
    for (int j = 0; j < count; j++) groups[j] = -INFINITY;
    raise_groups(values, n, groups, count);
    return k < FEWEST_HALVED ? kth_of(groups, k, count) : halved_to(groups, k, count);
}

/* A lower bound of the k-th largest of values[0..n), usually close, at a fraction of the cost: about the k-th largest
 * of the maxima of at least 2 k groups. NaN, which excludes no value, if there are too few values or infinite ones. */
INLINE float reached_by(const float *values, int64_t n, int64_t k) {
    if (k <= LANES / 4) return reached_by_groups(values, n, k, LANES);
    if (k <= BLOCK / 4) return reached_by_groups(values, n, k, BLOCK);
    return reached_by_groups(values, n, k, 2 * BLOCK);
}

/* Offer values[0..n) with their indices to the empty list. */
INLINE void offer_all(Largest *l, const float *values, int64_t n) {
    l->least = nextafterf(reached_by(values, n, l->k), -INFINITY);
    int64_t i = 0;
    for (; i + BLOCK <= n; i += BLOCK) {
        if (!any_beyond(values + i, l->least, BLOCK)) continue;
        if (l->held + BLOCK >= l->capacity) prune(l);
        for (int64_t j = i; j < i + BLOCK; j += LANES) {
            if (!any_beyond(values + j, l->least, LANES)) continue;
            for (int64_t lane = j; lane < j + LANES; lane++) {
                /* Without branches: a value that does not exceed least is overwritten by the next. */
                const float value = values[lane];
                l->keys[l->held] = value != value ? INFINITY : value;
                l->at[l->held] = lane;
                l->held += !(value <= l->least);
            }
        }
    }
    for (; i < n; i++) offer(l, values[i], i);
}

/* A member of the struct of a function's arguments. */
typedef struct {
    const char *name;
    size_t offset;
    enum { ARRAY, OPTIONAL_ARRAY, INTEGER, REAL } kind;
} Field;

#define OFFSET(type, member) #member, offsetof(type, member)
/* A pointer is given as a tensor, an int64_t as an int and a float as a float. */
#define FIELD(type, member) \
    {OFFSET(type, member), _Generic(((type *)0)->member, int64_t: INTEGER, float: REAL, default: ARRAY)}
/* A tensor that may be None, which is read as NULL. */
#define OPTIONAL(type, member) {OFFSET(type, member), OPTIONAL_ARRAY}

/* Parameters of a keyword-only function, as METH_FASTCALL | METH_KEYWORDS passes them. */
#define ARGUMENTS PyObject *self, PyObject *const *values, Py_ssize_t positional, PyObject *names
/* Fill a struct from a function's arguments, which must have the names and the order of its fields. Returns 0 with an
 * error set if they do not. */
#define READ(into, fields) read_fields(into, fields, sizeof(fields) / sizeof(*fields), values, positional, names)
int read_fields(void *into, const Field *fields, Py_ssize_t count, PyObject *const *values, Py_ssize_t positional,
                PyObject *names);
/* Returns 0 with an error set if top_k is out of range. */
int can_select(int64_t top_k);

PyObject *gate(ARGUMENTS);
PyObject *compose(ARGUMENTS);
PyObject *compose_backward(ARGUMENTS);
PyObject *select_rows(ARGUMENTS);
PyObject *select_rows_backward(ARGUMENTS);
PyObject *largest_of_rows(ARGUMENTS);
PyObject *select_sums(ARGUMENTS);
PyObject *round_rows(ARGUMENTS);
PyObject *screen(ARGUMENTS);
PyObject *short_convolution(ARGUMENTS);
PyObject *short_convolution_backward(ARGUMENTS);

#endif
