/* The loop over the columns of a panel, of numerics/error_feedback.py, and the search for scales, of
 * numerics/rounding.py, which have the same in torch. numerics/compiled.py calls them.
 *
 * Rows of a matrix do not depend on each other, so a few of them go through all columns of the
 * panel while they stay in the cache of a processor.
 */

#define Py_LIMITED_API 0x030B0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <math.h>
#include <stdint.h>

/* Rows that are worked on together, and the largest number of columns. */
#define ROWS 64
#define COLUMNS 128

/* Raised with every change of what they compute or are given: see moe2edge/native.py. */
#define VERSION 1

#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(__clang__) && __GNUC__ >= 12
#define FOR_EACH_PROCESSOR \
    __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EACH_PROCESSOR
#endif

typedef long long Address;

/* Of matrices with their columns below one another; see moe2edge/native.py for each of them. */
typedef struct {
    Address batch, columns, outs, groups, largest, stride;
    Address wanted, errors, lower, weight, scales, zeros, of_column, mask, q, loss;
    float middle;
} Panel;

FOR_EACH_PROCESSOR
static void
round_rows(const Panel *p, int64_t matrix, int64_t first, double *loss)
{
    float wanted[COLUMNS][ROWS], error[ROWS], lost[ROWS] = {0};
    const int64_t outs = p->outs, columns = p->columns;
    const int64_t rows = outs - first < ROWS ? outs - first : ROWS;
    const int64_t near = matrix * columns * outs + first, away = matrix * p->stride + first;
    const float *from = (const float *)p->wanted + near;
    float *errors = (float *)p->errors + away;
    int16_t *q = (int16_t *)p->q + away;
    const uint8_t *mask = p->mask ? (const uint8_t *)p->mask + away : 0;
    const float *lower = (const float *)p->lower + matrix * columns * columns;
    const float *weight = (const float *)p->weight + matrix * columns;
    const int64_t *of_column = (const int64_t *)p->of_column + matrix * columns;
    const int64_t grids = matrix * p->groups * outs + first;

    for (int64_t n = 0; n < columns; n++)
        for (int64_t r = 0; r < ROWS; r++)
            wanted[n][r] = r < rows ? from[n * outs + r] : 0.0f;
    for (int64_t n = columns - 1; n >= 0; n--) {
        const int64_t grid = grids + of_column[n] * outs;
        const float *scale = (const float *)p->scales + grid;
        const float *zero = p->zeros ? (const float *)p->zeros + grid : 0;
        const float largest = (float)p->largest;
        float *own = errors + n * outs;
        int16_t *integer = q + n * outs;
        for (int64_t r = 0; r < rows; r++) {
            const float low = zero ? -zero[r] : -p->middle, high = low + largest;
            float number = rintf(wanted[n][r] / scale[r]);
            number = number < low ? low : number > high ? high : number;
            if (mask)
                number *= (float)mask[n * outs + r];
            integer[r] = (int16_t)number;
            error[r] = own[r] - number * scale[r];
            own[r] = error[r];
            const float missed = wanted[n][r] - number * scale[r];
            lost[r] += missed * missed * weight[n];
        }
        for (int64_t r = rows; r < ROWS; r++)
            error[r] = 0.0f;
        for (int64_t i = 0; i < n; i++) {
            const float feedback = lower[n * columns + i];
            for (int64_t r = 0; r < ROWS; r++)
                wanted[i][r] += feedback * error[r];
        }
    }
    *loss = 0;
    for (int64_t r = 0; r < rows; r++)
        *loss += (double)lost[r];
}

static PyObject *
round_panel(PyObject *self, PyObject *arguments)
{
    Panel p;
    Address begin, end;
    (void)self;
    if (!PyArg_ParseTuple(arguments, "(LLLLLL)(LLLLLLLLLL)fLL", &p.batch, &p.columns, &p.outs,
                          &p.groups, &p.largest, &p.stride, &p.wanted, &p.errors, &p.lower,
                          &p.weight, &p.scales, &p.zeros, &p.of_column, &p.mask, &p.q, &p.loss,
                          &p.middle, &begin, &end))
        return NULL;
    if (p.columns < 1 || p.columns > COLUMNS || p.outs < 1 || begin < 0) {
        PyErr_SetString(PyExc_ValueError, "a panel has 1 to 128 columns");
        return NULL;
    }
    const int64_t parts = (p.outs + ROWS - 1) / ROWS;
    if (end > p.batch * parts) {
        PyErr_SetString(PyExc_ValueError, "there are not so many parts");
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
    for (int64_t part = begin; part < end; part++)
        round_rows(&p, part / parts, part % parts * ROWS, (double *)p.loss + part);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

/* Numbers whose errors are summed up side by side. */
#define LANES 16

/* Of groups of numbers, one after the other. */
typedef struct {
    Address count, width, groups, of_matrix, candidates, largest;
    Address numbers, importance, scales, zeros, best;
    float middle;
} Search;

static inline float
squared_error(float number, float scale, float low, float high)
{
    float q = rintf(number / scale);
    q = q < low ? low : q > high ? high : q;
    const float error = number - q * scale;
    return error * error;
}

FOR_EACH_PROCESSOR
static void
search_groups(const Search *s, int64_t begin, int64_t end)
{
    const int64_t width = s->width, whole = width - width % LANES;
    for (int64_t n = begin; n < end; n++) {
        const float *numbers = (const float *)s->numbers + n * width;
        const int64_t of = n / s->of_matrix * s->groups + n % s->groups;
        const float *importance = (const float *)s->importance + of * width;
        float least = INFINITY;
        uint8_t best = 0;
        for (int64_t k = 0; k < s->candidates; k++) {
            const int64_t at = k * s->count + n;
            const float scale = ((const float *)s->scales)[at];
            const float low = -(s->zeros ? ((const float *)s->zeros)[at] : s->middle);
            const float high = low + (float)s->largest;
            float sums[LANES] = {0}, loss = 0;
            for (int64_t i = 0; i < whole; i += LANES)
                for (int64_t j = 0; j < LANES; j++)
                    sums[j] +=
                        squared_error(numbers[i + j], scale, low, high) * importance[i + j];
            for (int64_t i = whole; i < width; i++)
                loss += squared_error(numbers[i], scale, low, high) * importance[i];
            for (int64_t j = 0; j < LANES; j++)
                loss += sums[j];
            if (loss < least) {
                least = loss;
                best = (uint8_t)k;
            }
        }
        ((uint8_t *)s->best)[n] = best;
    }
}

static PyObject *
search(PyObject *self, PyObject *arguments)
{
    Search s;
    Address begin, end;
    (void)self;
    if (!PyArg_ParseTuple(arguments, "(LLLLLL)(LLLLL)fLL", &s.count, &s.width, &s.groups,
                          &s.of_matrix, &s.candidates, &s.largest, &s.numbers, &s.importance,
                          &s.scales, &s.zeros, &s.best, &s.middle, &begin, &end))
        return NULL;
    if (s.width < 1 || s.groups < 1 || s.of_matrix < 1 || s.candidates > 255 || begin < 0 ||
        end > s.count) {
        PyErr_SetString(PyExc_ValueError, "there are not so many groups");
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
    search_groups(&s, begin, end);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"round_panel", round_panel, METH_VARARGS, "See moe2edge/native.py, which calls it."},
    {"search", search, METH_VARARGS, "See moe2edge/native.py, which calls it."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_columns", NULL, -1, methods, NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC
PyInit__columns(void)
{
    PyObject *made = PyModule_Create(&module);
    if (made && (PyModule_AddIntConstant(made, "ROWS", ROWS) < 0 ||
                 PyModule_AddIntConstant(made, "VERSION", VERSION) < 0)) {
        Py_DECREF(made);
        return NULL;
    }
    return made;
}
