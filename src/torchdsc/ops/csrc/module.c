/* The optional compiled module torchdsc.ops._native: what tensor operations do slowly on a CPU. */
#include "native.h"

#include <stdlib.h>

int read_integers(PyObject *args, int64_t *values, Py_ssize_t count) {
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *item = PyTuple_GetItem(args, i);
        if (item == NULL) return 0;
        values[i] = PyLong_AsLongLong(item);
        if (values[i] == -1 && PyErr_Occurred()) return 0;
    }
    return 1;
}

int read_float(PyObject *args, Py_ssize_t index, float *value) {
    PyObject *item = PyTuple_GetItem(args, index);
    if (item == NULL) return 0;
    *value = (float)PyFloat_AsDouble(item);
    return !PyErr_Occurred();
}

int can_select(int64_t top_k) {
    if (top_k >= 1 && top_k <= MOST_SELECTED) return 1;
    PyErr_Format(PyExc_ValueError, "top_k must be in [1, %d], got %lld", MOST_SELECTED, (long long)top_k);
    return 0;
}

int make_room(Room *room, int64_t threads, int64_t num_floats, int64_t capacity) {
    room->floats = calloc((size_t)(threads * (num_floats + capacity)), sizeof(float));
    room->at = calloc((size_t)(threads * capacity), sizeof(int64_t));
    room->num_floats = num_floats;
    room->capacity = capacity;
    if (room->floats != NULL && room->at != NULL) return 1;
    free_room(room);
    PyErr_NoMemory();
    return 0;
}

void free_room(Room *room) {
    free(room->floats);
    free(room->at);
}

static void swap(Largest *l, int64_t i, int64_t j) {
    float key = l->keys[i];
    int64_t at = l->at[i];
    l->keys[i] = l->keys[j];
    l->at[i] = l->at[j];
    l->keys[j] = key;
    l->at[j] = at;
}

void prune(Largest *l) {
    /* Quickselect: narrow [first, last] down to place k - 1. */
    int64_t first = 0, last = l->held - 1, place = l->k - 1;
    while (first < last) {
        float pivot = l->keys[first + (last - first) / 2];
        int64_t i = first, j = last;
        while (i <= j) {
            while (l->keys[i] > pivot) i++;
            while (l->keys[j] < pivot) j--;
            if (i <= j) swap(l, i++, j--);
        }
        if (place <= j)
            last = j;
        else if (place >= i)
            first = i;
        else
            break;
    }
    if (l->held >= l->k) {
        l->held = l->k;
        l->least = l->keys[l->k - 1];
    }
}

/* has_bfloat16(): whether the processor multiplies bfloat16 natively; elsewhere products in it are slower. */
static PyObject *has_bfloat16(PyObject *self, PyObject *args) {
#if defined(__x86_64__) && defined(__linux__)
    __builtin_cpu_init();
    return PyBool_FromLong(__builtin_cpu_supports("avx512bf16") != 0);
#else
    return PyBool_FromLong(0);
#endif
}

static PyMethodDef methods[] = {
    {"gate", gate, METH_VARARGS, "Equation (5) of a few tokens."},
    {"compose", compose, METH_VARARGS, "Equation (14)."},
    {"compose_backward", compose_backward, METH_VARARGS, "Its gradients."},
    {"select_rows", select_rows, METH_VARARGS, "Top-K and statistics of rows of logits in one pass."},
    {"select_rows_backward", select_rows_backward, METH_VARARGS, "Gradient of the logits in one pass."},
    {"largest_of_rows", largest_of_rows, METH_VARARGS, "Top-K of rows of logits."},
    {"select_sums", select_sums, METH_VARARGS, "Top-K of the sums of two halves."},
    {"round_rows", round_rows, METH_VARARGS, "Rows in bfloat16, their norms, and those of what rounding took away."},
    {"screen", screen, METH_VARARGS, "Exact top-K from logits in bfloat16 and bounds on their errors."},
    {"short_convolution", short_convolution, METH_VARARGS, "Tokens mixed with those before them."},
    {"short_convolution_backward", short_convolution_backward, METH_VARARGS, "Its gradients."},
    {"has_bfloat16", has_bfloat16, METH_NOARGS, "Whether the processor multiplies bfloat16 natively."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_native", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__native(void) { return PyModule_Create(&module); }
