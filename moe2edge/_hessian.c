/* The Hessian Y^T Y of inputs Y [n, k] in bfloat16, summed in float32, of
 * numerics/error_feedback.py. numerics/bfloat16.py calls it.
 *
 * An instruction multiplies pairs of numbers: those of two rows of Y lie side by side in 32 bits.
 */

#define Py_LIMITED_API 0x030B0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>

/* Of a Hessian: pairs of rows that are worked on together; columns of a panel, of which sixteen
 * stand side by side; rows and panels of a tile of the result. */
#define PAIRS 512
#define LANES 16
#define ROWS 8
#define PANELS 3
/* Pairs whose products are summed up before they are added to the sum of others: long sums in
 * float32 lose digits. */
#define RUN 64
/* Numbers of 32 bits from panel to panel: not a power of two, which caches do not like. */
#define STRIDE (PAIRS * LANES + LANES)
/* Columns of a block of numbers that is mirrored at the diagonal. */
#define SIDE 32

#define VERSION 1

typedef long long Address;

#if defined(__x86_64__) && defined(__gnu_linux__) && (defined(__clang__) || __GNUC__ >= 10)
#include <immintrin.h>
#define HAS_KERNEL
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))
#define INLINED static inline __attribute__((always_inline)) TARGET

/* Inputs of a part of at most 2 * PAIRS rows. */
typedef struct {
    Address count, columns, stride, is_float, inputs, weights, packed;
} Inputs;

INLINED __m512
load(const Inputs *in, int64_t row, int64_t column, __mmask16 mask)
{
    if (in->is_float)
        return _mm512_maskz_loadu_ps(mask, (const float *)in->inputs + row * in->stride + column);
    const uint16_t *from = (const uint16_t *)in->inputs + row * in->stride + column;
    return _mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from)), 16));
}

INLINED __m512i
round_numbers(__m512 numbers)
{
    return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(numbers));
}

TARGET static void
pack_pairs(const Inputs *in, int64_t begin, int64_t end)
{
    const float *weights = (const float *)in->weights;
    for (int64_t t = begin; t < end; t++) {
        const int64_t row = 2 * t;
        const int has_second = row + 1 < in->count;
        const __m512 first = _mm512_set1_ps(weights ? weights[row] : 1.0f);
        const __m512 second = _mm512_set1_ps(weights && has_second ? weights[row + 1] : 1.0f);
        uint32_t *to = (uint32_t *)in->packed + t * LANES;
        for (int64_t j = 0; j < in->columns; j += LANES, to += STRIDE) {
            const int64_t left = in->columns - j;
            const __mmask16 mask = left < LANES ? (1u << left) - 1 : 0xffff;
            __m512i pairs = round_numbers(_mm512_mul_ps(load(in, row, j, mask), first));
            if (has_second) {
                const __m512 numbers = load(in, row + 1, j, mask);
                pairs = _mm512_or_si512(
                    pairs, _mm512_slli_epi32(round_numbers(_mm512_mul_ps(numbers, second)), 16));
            }
            _mm512_storeu_si512(to, pairs);
        }
    }
}

/* What is summed: lower triangle of [columns, columns], from packed pairs. */
typedef struct {
    Address pairs, columns, started, packed, sums;
} Sum;

/* A tile: ROWS columns of one panel with those of some other panels. */
INLINED void
multiply(const Sum *s, int64_t row, int64_t column, const int panels)
{
    const uint32_t *a = (const uint32_t *)s->packed + row / LANES * STRIDE + row % LANES;
    const uint32_t *b = (const uint32_t *)s->packed + column / LANES * STRIDE;
    const int64_t below = s->columns - row < ROWS ? s->columns - row : ROWS;
    const int64_t width = s->columns - column;
    float *to = (float *)s->sums + row * s->columns + column;
    __m512 total[ROWS][PANELS], sums[ROWS][PANELS];

    for (int64_t r = 0; r < below; r++)
        for (int p = 0; p < panels; p++)
            _mm_prefetch((const char *)(to + r * s->columns + p * LANES), _MM_HINT_T0);
    for (int64_t begin = 0; begin < s->pairs; begin += RUN) {
        const int64_t end = begin + RUN < s->pairs ? begin + RUN : s->pairs;
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 3
            for (int p = 0; p < panels; p++)
                sums[r][p] = _mm512_setzero_ps();
        for (int64_t t = begin; t < end; t++) {
            __m512bh with[PANELS];
#pragma GCC unroll 3
            for (int p = 0; p < panels; p++)
                with[p] = (__m512bh)_mm512_loadu_si512(b + p * STRIDE + t * LANES);
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++) {
                const __m512bh own = (__m512bh)_mm512_set1_epi32((int)a[t * LANES + r]);
#pragma GCC unroll 3
                for (int p = 0; p < panels; p++)
                    sums[r][p] = _mm512_dpbf16_ps(sums[r][p], own, with[p]);
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 3
            for (int p = 0; p < panels; p++)
                total[r][p] = begin ? _mm512_add_ps(total[r][p], sums[r][p]) : sums[r][p];
    }
    for (int64_t r = 0; r < below; r++)
        for (int p = 0; p < panels; p++) {
            const int64_t left = width - p * LANES;
            const __mmask16 mask = left < LANES ? (1u << left) - 1 : 0xffff;
            float *at = to + r * s->columns + p * LANES;
            const __m512 before =
                s->started ? _mm512_maskz_loadu_ps(mask, at) : _mm512_setzero_ps();
            _mm512_mask_storeu_ps(at, mask, _mm512_add_ps(before, total[r][p]));
        }
}

/* All tiles of a strip of columns that reach to the diagonal or below it. */
TARGET static void
sum_strip(const Sum *s, int64_t strip)
{
    const int64_t column = strip * PANELS * LANES;
    const int64_t panels = (s->columns - column + LANES - 1) / LANES;
    for (int64_t row = column; row < s->columns; row += ROWS)
        if (panels >= 3)
            multiply(s, row, column, 3);
        else if (panels == 2)
            multiply(s, row, column, 2);
        else
            multiply(s, row, column, 1);
}

/* Strips are counted from both ends at once, so that threads have the same to do. */
static void
sum_strips(const Sum *s, int64_t begin, int64_t end)
{
    const int64_t strips = (s->columns + PANELS * LANES - 1) / (PANELS * LANES);
    for (int64_t n = begin; n < end; n++) {
        sum_strip(s, n);
        if (strips - 1 - n != n)
            sum_strip(s, strips - 1 - n);
    }
}

typedef struct {
    Address columns, sums;
} Square;

/* Copies numbers below the diagonal to above it, for some rows of blocks. */
TARGET static void
mirror_blocks(const Square *s, int64_t begin, int64_t end)
{
    const int64_t columns = s->columns;
    float *sums = (float *)s->sums;
    for (int64_t row = begin * SIDE; row < end * SIDE && row < columns; row += SIDE)
        for (int64_t column = 0; column <= row; column += SIDE) {
            const int64_t last = row + SIDE < columns ? row + SIDE : columns;
            const int64_t widest = column + SIDE < columns ? column + SIDE : columns;
            for (int64_t j = column; j < widest; j++)
                for (int64_t i = j < row ? row : j + 1; i < last; i++)
                    sums[j * columns + i] = sums[i * columns + j];
        }
}

typedef struct {
    Address columns, from, order, to;
} Order;

/* Brings rows and columns of a symmetric matrix into an order; only below the diagonal. */
static void
order_rows(const Order *o, int64_t begin, int64_t end)
{
    const int64_t columns = o->columns;
    const int64_t *order = (const int64_t *)o->order;
    for (int64_t i = begin; i < end; i++) {
        const float *from = (const float *)o->from + order[i] * columns;
        float *to = (float *)o->to + i * columns;
        for (int64_t j = 0; j <= i; j++)
            to[j] = from[order[j]];
    }
}

static PyObject *
pack(PyObject *self, PyObject *arguments)
{
    Inputs in;
    Address begin, end;
    (void)self;
    if (!PyArg_ParseTuple(arguments, "(LLLL)(LLL)LL", &in.count, &in.columns, &in.stride,
                          &in.is_float, &in.inputs, &in.weights, &in.packed, &begin, &end))
        return NULL;
    if (begin < 0 || end > (in.count + 1) / 2 || end > PAIRS) {
        PyErr_SetString(PyExc_ValueError, "there are not so many pairs");
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
    pack_pairs(&in, begin, end);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyObject *
sum(PyObject *self, PyObject *arguments)
{
    Sum s;
    Address begin, end;
    (void)self;
    if (!PyArg_ParseTuple(arguments, "(LLLLL)LL", &s.pairs, &s.columns, &s.started, &s.packed,
                          &s.sums, &begin, &end))
        return NULL;
    const int64_t strips = (s.columns + PANELS * LANES - 1) / (PANELS * LANES);
    if (begin < 0 || end > (strips + 1) / 2 || s.pairs < 1 || s.pairs > PAIRS) {
        PyErr_SetString(PyExc_ValueError, "there are not so many strips");
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
    sum_strips(&s, begin, end);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyObject *
mirror(PyObject *self, PyObject *arguments)
{
    Square s;
    Address begin, end;
    (void)self;
    if (!PyArg_ParseTuple(arguments, "(LL)LL", &s.columns, &s.sums, &begin, &end))
        return NULL;
    if (begin < 0 || end > (s.columns + SIDE - 1) / SIDE) {
        PyErr_SetString(PyExc_ValueError, "there are not so many blocks");
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
    mirror_blocks(&s, begin, end);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyObject *
order(PyObject *self, PyObject *arguments)
{
    Order o;
    Address begin, end;
    (void)self;
    if (!PyArg_ParseTuple(arguments, "(LLLL)LL", &o.columns, &o.from, &o.order, &o.to, &begin,
                          &end))
        return NULL;
    if (begin < 0 || end > (o.columns + 1) / 2) {
        PyErr_SetString(PyExc_ValueError, "there are not so many rows");
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
    /* Rows are counted from both ends at once, as those at the end are longer. */
    order_rows(&o, begin, end);
    const int64_t middle = o.columns - end > end ? o.columns - end : end;
    order_rows(&o, middle, o.columns - begin);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static int
is_native(void)
{
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
#else
static int
is_native(void)
{
    return 0;
}
#endif

static PyMethodDef methods[] = {
#ifdef HAS_KERNEL
    {"pack", pack, METH_VARARGS, "See moe2edge/numerics/bfloat16.py, which calls it."},
    {"order", order, METH_VARARGS, "See moe2edge/numerics/bfloat16.py, which calls it."},
    {"mirror", mirror, METH_VARARGS, "See moe2edge/numerics/bfloat16.py, which calls it."},
    {"sum", sum, METH_VARARGS, "See moe2edge/numerics/bfloat16.py, which calls it."},
#endif
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_hessian", NULL, -1, methods, NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC
PyInit__hessian(void)
{
    PyObject *made = PyModule_Create(&module);
    if (made && (PyModule_AddIntConstant(made, "PAIRS", PAIRS) < 0 ||
                 PyModule_AddIntConstant(made, "LANES", LANES) < 0 ||
                 PyModule_AddIntConstant(made, "STRIP", PANELS * LANES) < 0 ||
                 PyModule_AddIntConstant(made, "STRIDE", STRIDE) < 0 ||
                 PyModule_AddIntConstant(made, "SIDE", SIDE) < 0 ||
                 PyModule_AddIntConstant(made, "IS_NATIVE", is_native()) < 0 ||
                 PyModule_AddIntConstant(made, "VERSION", VERSION) < 0)) {
        Py_DECREF(made);
        return NULL;
    }
    return made;
}
