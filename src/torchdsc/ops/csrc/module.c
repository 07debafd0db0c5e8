/* The optional compiled module torchdsc.ops._native, and its builds for AVX2 and AVX-512. */
#include "native.h"

#include <stdlib.h>

static PyObject *data_ptr;

/* The address of a tensor's elements; on failure an error is set. */
static void read_array(const char *name, PyObject *tensor, void **start) {
    PyObject *address = PyObject_CallMethodObjArgs(tensor, data_ptr, NULL);
    if (address == NULL) {
        if (PyErr_ExceptionMatches(PyExc_AttributeError))
            PyErr_Format(PyExc_TypeError, "%s must be a tensor, got %R", name, Py_TYPE(tensor));
        return;
    }
    *start = PyLong_AsVoidPtr(address);
    Py_DECREF(address);
}

int read_fields(void *into, const Field *fields, Py_ssize_t count, PyObject *const *values, Py_ssize_t positional,
                PyObject *names) {
    const Py_ssize_t given = names == NULL ? 0 : PyTuple_Size(names);
    if (positional != 0 || given != count) {
        PyErr_Format(PyExc_TypeError, "arguments must be %zd by name, got %zd by name and %zd by place", count, given,
                     positional);
        return 0;
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *name = PyTuple_GetItem(names, i);
        if (PyUnicode_CompareWithASCIIString(name, fields[i].name) != 0) {
            PyErr_Format(PyExc_TypeError, "argument %zd must be %s, got %U", i + 1, fields[i].name, name);
            return 0;
        }
        char *member = (char *)into + fields[i].offset;
        switch (fields[i].kind) {
        case INTEGER:
            *(int64_t *)member = PyLong_AsLongLong(values[i]);
            break;
        case REAL:
            *(float *)member = (float)PyFloat_AsDouble(values[i]);
            break;
        case OPTIONAL_ARRAY:
            *(void **)member = NULL;
            if (values[i] == Py_None) break;
            /* fall through */
        case ARRAY:
            read_array(fields[i].name, values[i], (void **)member);
        }
        if (PyErr_Occurred()) return 0;
    }
    return 1;
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

/* has_bfloat16(): whether the processor multiplies bfloat16 natively and this is the build for AVX-512. */
static PyObject *has_bfloat16(PyObject *self, PyObject *args) {
#if defined(__AVX512F__)
    __builtin_cpu_init();
    return PyBool_FromLong(__builtin_cpu_supports("avx512bf16") != 0);
#else
    return PyBool_FromLong(0);
#endif
}

#define METHOD(function, documentation) \
    {#function, (PyCFunction)(void (*)(void))function, METH_FASTCALL | METH_KEYWORDS, documentation}

static PyMethodDef methods[] = {
    METHOD(gate, "Equation (5) of a few tokens."),
    METHOD(compose, "Equation (14)."),
    METHOD(compose_backward, "Its gradients."),
    METHOD(select_rows, "Top-K and statistics of rows of logits in one pass."),
    METHOD(select_rows_backward, "Gradient of the logits in one pass."),
    METHOD(largest_of_rows, "Top-K of rows of logits."),
    METHOD(select_sums, "Top-K of the sums of two halves."),
    METHOD(round_rows, "Rows in bfloat16, their norms, and those of what rounding took away."),
    METHOD(screen, "Exact top-K from logits in bfloat16 and bounds on their errors."),
    METHOD(short_convolution, "A causal depthwise convolution."),
    METHOD(short_convolution_backward, "Its gradients."),
    {"has_bfloat16", has_bfloat16, METH_NOARGS, "Whether the processor multiplies bfloat16 natively."},
    {NULL, NULL, 0, NULL},
};

/* MODULE is the name of this build, from setup.py. */
#define QUOTED(name) #name
#define INIT(name) PyInit_##name
#define EXPANDED(macro, name) macro(name)

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, EXPANDED(QUOTED, MODULE), NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC EXPANDED(INIT, MODULE)(void) {
    data_ptr = PyUnicode_InternFromString("data_ptr");
    return data_ptr == NULL ? NULL : PyModule_Create(&module);
}
