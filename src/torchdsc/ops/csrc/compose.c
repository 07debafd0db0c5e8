/* The composition, float32: every selected row is read once, for its product and its norm. */
#include "native.h"

/* Dot product with a row, and the row's squared norm if asked for. */
INLINE float dot_and_square(const float *x, const float *row, int64_t n, float *square) {
    Sums products = {{{0}}}, squares = {{{0}}};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        add_products(&products, x + i, row + i);
        add_products(&squares, row + i, row + i);
    }
    float product = 0.0f, rest = 0.0f;
    for (; i < n; i++) {
        product += x[i] * row[i];
        rest += row[i] * row[i];
    }
    *square = rest + sum_lanes((const float *)&squares);
    return product + sum_lanes((const float *)&products);
}

INLINE void add_scaled(float *sum, float weight, const float *row, int64_t n) {
    int64_t i = 0;
    for (; i + WIDTH <= n; i += WIDTH) *(Vector *)(sum + i) += weight * AT(row + i);
    for (; i < n; i++) sum[i] += weight * row[i];
}

/* Add four weighted rows in one pass over the sum. */
INLINE void add_four(float *sum, const float *weights, const float *const *rows, int64_t n) {
    const float a = weights[0], b = weights[1], c = weights[2], d = weights[3];
    const float *p = rows[0], *q = rows[1], *r = rows[2], *s = rows[3];
    int64_t i = 0;
    for (; i + WIDTH <= n; i += WIDTH)
        *(Vector *)(sum + i) += (a * AT(p + i) + b * AT(q + i)) + (c * AT(r + i) + d * AT(s + i));
    for (; i < n; i++) sum[i] += (a * p[i] + b * q[i]) + (c * r[i] + d * s[i]);
}

/* Rows to be added to a sum, collected until there are four. */
typedef struct {
    const float *rows[4];
    float weights[4];
    int held;
} Pending;

INLINE void add_later(Pending *pending, float *sum, float weight, const float *row, int64_t n) {
    pending->rows[pending->held] = row;
    pending->weights[pending->held++] = weight;
    if (pending->held < 4) return;
    add_four(sum, pending->weights, pending->rows, n);
    pending->held = 0;
}

INLINE void add_pending(const Pending *pending, float *sum, int64_t n) {
    for (int i = 0; i < pending->held; i++) add_scaled(sum, pending->weights[i], pending->rows[i], n);
}

INLINE float inverse_norm(float square, float eps) {
    float norm = sqrtf(square);
    return 1.0f / (norm < eps ? eps : norm);
}

typedef struct {
    const float *x, *u, *v, *coefficients;
    const float *scale_u, *scale_v;     /* 1 / norm of each atom; NULL: computed for each pair */
    const int64_t *indices;
    float *y, *latent;
    int64_t tokens, top_k, d_in, d_out, num_atoms, threads;
    float eps;      /* negative: atoms are not normalised */
} Composition;

static const Field COMPOSE[] = {
    FIELD(Composition, x),           FIELD(Composition, u),          FIELD(Composition, v),
    FIELD(Composition, coefficients), OPTIONAL(Composition, scale_u), OPTIONAL(Composition, scale_v),
    FIELD(Composition, indices),     FIELD(Composition, y),          FIELD(Composition, latent),
    FIELD(Composition, tokens),      FIELD(Composition, top_k),      FIELD(Composition, d_in),
    FIELD(Composition, d_out),       FIELD(Composition, num_atoms),  FIELD(Composition, threads),
    FIELD(Composition, eps)};

/* Four pairs of a token, with known norms of the atoms. */
INLINE void compose_four(const Composition *c, const float *x, int64_t pair, float *y) {
    const float *rows[4];
    float products[4];
    for (int j = 0; j < 4; j++) rows[j] = c->u + c->indices[pair + j] * c->d_in;
    dot_four(x, rows, products, c->d_in);
    for (int j = 0; j < 4; j++) {
        const int64_t atom = c->indices[pair + j];
        c->latent[pair + j] = products[j] * c->scale_u[atom];
        products[j] = c->latent[pair + j] * c->coefficients[pair + j] * c->scale_v[atom];
        rows[j] = c->v + atom * c->d_out;
    }
    add_four(y, products, rows, c->d_out);
}

INLINE void compose_pair(const Composition *c, const float *x, int64_t pair, float *y) {
    const int64_t atom = c->indices[pair];
    const float *row_u = c->u + atom * c->d_in, *row_v = c->v + atom * c->d_out;
    float latent, scale_v = 1.0f;
    if (c->scale_u) {
        latent = dot(x, row_u, c->d_in) * c->scale_u[atom];
        scale_v = c->scale_v[atom];
    } else {
        float square;
        latent = dot_and_square(x, row_u, c->d_in, &square);
        if (c->eps >= 0) {
            latent *= inverse_norm(square, c->eps);
            scale_v = inverse_norm(dot(row_v, row_v, c->d_out), c->eps);
        }
    }
    c->latent[pair] = latent;
    add_scaled(y, latent * c->coefficients[pair] * scale_v, row_v, c->d_out);
}

static void compose_token(const Composition *c, int64_t token) {
    const float *x = c->x + token * c->d_in;
    float *y = c->y + token * c->d_out;
    int64_t pair = token * c->top_k, end = pair + c->top_k;
    for (int64_t i = 0; i < c->d_out; i++) y[i] = 0.0f;
    if (c->scale_u)
        for (; pair + 4 <= end; pair += 4) compose_four(c, x, pair, y);
    for (; pair < end; pair++) compose_pair(c, x, pair, y);
}

/* Returns 0 with an error set if an index is not in [0, num_atoms). */
static int are_atoms(const int64_t *indices, int64_t count, int64_t num_atoms) {
    for (int64_t i = 0; i < count; i++)
        if (indices[i] < 0 || indices[i] >= num_atoms) {
            PyErr_SetString(PyExc_IndexError, "indices must be in [0, number of atoms)");
            return 0;
        }
    return 1;
}

/* Equations (3) and (14). */
PyObject *compose(ARGUMENTS) {
    Composition c;
    if (!READ(&c, COMPOSE) || !are_atoms(c.indices, c.tokens * c.top_k, c.num_atoms)) return NULL;
    if (c.threads == 1) {
        for (int64_t token = 0; token < c.tokens; token++) compose_token(&c, token);
        Py_RETURN_NONE;
    }
    Py_BEGIN_ALLOW_THREADS
#pragma omp parallel for schedule(static) num_threads(c.threads)
    for (int64_t token = 0; token < c.tokens; token++) compose_token(&c, token);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

typedef struct {
    const float *grad, *x, *u, *v, *coefficients, *latent;
    const float *scale_u, *scale_v;     /* 1 / norm of each atom; NULL: atoms are not normalised */
    const int64_t *indices;
    float *dx, *du, *dv, *d_coefficients;
    float *weight_u, *weight_v, *common;    /* of each pair: weights in the gradients of u and v, and radial part */
    int64_t *order, *ends;              /* pairs sorted by atom, and where each atom's pairs end */
    int64_t tokens, top_k, d_in, d_out, num_atoms, threads;
    float eps;
} Gradients;

static const Field GRADIENTS[] = {
    FIELD(Gradients, grad),         FIELD(Gradients, x),              FIELD(Gradients, u),
    FIELD(Gradients, v),            FIELD(Gradients, coefficients),   FIELD(Gradients, latent),
    OPTIONAL(Gradients, scale_u),   OPTIONAL(Gradients, scale_v),     FIELD(Gradients, indices),
    FIELD(Gradients, dx),           FIELD(Gradients, du),             FIELD(Gradients, dv),
    FIELD(Gradients, d_coefficients), FIELD(Gradients, weight_u),     FIELD(Gradients, weight_v),
    FIELD(Gradients, common),       FIELD(Gradients, order),          FIELD(Gradients, ends),
    FIELD(Gradients, tokens),       FIELD(Gradients, top_k),          FIELD(Gradients, d_in),
    FIELD(Gradients, d_out),        FIELD(Gradients, num_atoms),      FIELD(Gradients, threads),
    FIELD(Gradients, eps)};

static void gradients_of_token(const Gradients *g, int64_t token) {
    const float *grad = g->grad + token * g->d_out;
    float *dx = g->dx + token * g->d_in;
    Pending pending = {.held = 0};
    for (int64_t i = 0; i < g->d_in; i++) dx[i] = 0.0f;
    for (int64_t pair = token * g->top_k; pair < (token + 1) * g->top_k; pair++) {
        int64_t atom = g->indices[pair];
        float scale_u = g->scale_u ? g->scale_u[atom] : 1.0f, scale_v = g->scale_v ? g->scale_v[atom] : 1.0f;
        float projected = scale_v * dot(grad, g->v + atom * g->d_out, g->d_out);
        float latent = g->latent[pair], weight = g->coefficients[pair] * projected;
        g->d_coefficients[pair] = latent * projected;
        g->common[pair] = weight * latent;
        g->weight_u[pair] = weight * scale_u;
        g->weight_v[pair] = g->coefficients[pair] * latent * scale_v;
        add_later(&pending, dx, weight * scale_u, g->u + atom * g->d_in, g->d_in);
    }
    add_pending(&pending, dx, g->d_in);
}

/* Subtract the radial part of a row's gradient; a row with a norm below eps, divided by a constant, has none. */
INLINE void leave_radial(float *sum, float common, float scale, const float *row, int64_t n, float eps) {
    if (scale < 1.0f / eps) add_scaled(sum, -common * scale * scale, row, n);
}

static void gradients_of_atom(const Gradients *g, int64_t atom) {
    float *du = g->du + atom * g->d_in, *dv = g->dv + atom * g->d_out, common = 0.0f;
    Pending for_u = {.held = 0}, for_v = {.held = 0};
    for (int64_t i = 0; i < g->d_in; i++) du[i] = 0.0f;
    for (int64_t i = 0; i < g->d_out; i++) dv[i] = 0.0f;
    for (int64_t i = atom ? g->ends[atom - 1] : 0; i < g->ends[atom]; i++) {
        int64_t pair = g->order[i], token = pair / g->top_k;
        add_later(&for_u, du, g->weight_u[pair], g->x + token * g->d_in, g->d_in);
        add_later(&for_v, dv, g->weight_v[pair], g->grad + token * g->d_out, g->d_out);
        common += g->common[pair];
    }
    add_pending(&for_u, du, g->d_in);
    add_pending(&for_v, dv, g->d_out);
    if (g->scale_u) leave_radial(du, common, g->scale_u[atom], g->u + atom * g->d_in, g->d_in, g->eps);
    if (g->scale_v) leave_radial(dv, common, g->scale_v[atom], g->v + atom * g->d_out, g->d_out, g->eps);
}

/* Stable counting sort of the pairs by atom; afterwards ends[j] is where the pairs of atom j end in order. */
static void sort_pairs(const Gradients *g) {
    int64_t pairs = g->tokens * g->top_k, start = 0;
    for (int64_t atom = 0; atom < g->num_atoms; atom++) g->ends[atom] = 0;
    for (int64_t pair = 0; pair < pairs; pair++) g->ends[g->indices[pair]]++;
    for (int64_t atom = 0; atom < g->num_atoms; atom++) {
        int64_t count = g->ends[atom];
        g->ends[atom] = start;
        start += count;
    }
    for (int64_t pair = 0; pair < pairs; pair++) g->order[g->ends[g->indices[pair]]++] = pair;
}

/* Gradients of compose. */
PyObject *compose_backward(ARGUMENTS) {
    Gradients g;
    if (!READ(&g, GRADIENTS) || !are_atoms(g.indices, g.tokens * g.top_k, g.num_atoms)) return NULL;
    Py_BEGIN_ALLOW_THREADS
    sort_pairs(&g);
#pragma omp parallel num_threads(g.threads)
    {
#pragma omp for schedule(static)
        for (int64_t token = 0; token < g.tokens; token++) gradients_of_token(&g, token);
#pragma omp for schedule(dynamic, 8)
        for (int64_t atom = 0; atom < g.num_atoms; atom++) gradients_of_atom(&g, atom);
    }
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}
