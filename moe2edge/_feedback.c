/* The rounding of columns with feedback of errors in bfloat16, summed in float32, of
 * numerics/error_feedback.py. numerics/bfloat16.py calls it.
 *
 * Rows of a matrix do not depend on each other, so a few of them go through all columns while they
 * stay in the cache of a processor. An instruction multiplies pairs of numbers: errors of two
 * columns lie side by side in 32 bits.
 */

#define Py_LIMITED_API 0x030B0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* Columns between two sums of feedback from all columns behind, and between two sums inside of
 * these; numbers of a register; rows that go through all columns together. */
#define COLUMNS 128
#define BLOCK 8
#define LANES 16
#define WIDE 3
#define SLICE (WIDE * LANES)

#define VERSION 1

typedef long long Address;

#if defined(__x86_64__) && defined(__gnu_linux__) && (defined(__clang__) || __GNUC__ >= 10)
#include <immintrin.h>
#define HAS_KERNEL
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))
#define INLINED static inline __attribute__((always_inline)) TARGET

/* Of matrices [outs, ins] whose columns are rounded in some order; see numerics/bfloat16.py. */
typedef struct {
    Address batch, outs, ins, groups, largest, is_sparse;
    Address weights, order, upper, near, weight, scales, zeros, of_column, q, loss;
    float middle;
} Matrices;

/* Memory of a thread.
 *
 * own: weights in the order of rounding, [ins][SLICE]; errors: in pairs, [ins / 2][SLICE];
 * scales, zeros: [groups][SLICE].
 */
typedef struct {
    float *own, *scales, *zeros;
    uint32_t *errors;
} Space;

/* Brings some rows of a matrix and of its grid into columns. */
static void
load_slice(const Matrices *m, const Space *s, int64_t matrix, int64_t first, int64_t rows)
{
    const int64_t *order = (const int64_t *)m->order + matrix * m->ins;
    for (int64_t r = 0; r < SLICE; r++) {
        const int64_t row = matrix * m->outs + first + (r < rows ? r : 0);
        const float *weights = (const float *)m->weights + row * m->ins;
        const float *scales = (const float *)m->scales + row * m->groups;
        for (int64_t c = 0; c < m->ins; c++)
            s->own[c * SLICE + r] = weights[order[c]];
        for (int64_t g = 0; g < m->groups; g++) {
            s->scales[g * SLICE + r] = scales[g];
            s->zeros[g * SLICE + r] =
                m->zeros ? ((const float *)m->zeros)[row * m->groups + g] : m->middle;
        }
    }
}

/* Adds the feedback of all columns from `end` on to those of a panel in front of them. */
TARGET static void
add_feedback(const Matrices *m, const Space *s, int64_t matrix, int64_t begin, int64_t end,
             float wanted[COLUMNS][SLICE])
{
    const uint16_t *upper = (const uint16_t *)m->upper + matrix * m->ins * m->ins;
    for (int64_t i = begin; i < end; i += BLOCK) {
        const uint16_t *own = upper + i * m->ins;
        __m512 sums[BLOCK][WIDE];
#pragma GCC unroll 8
        for (int r = 0; r < BLOCK; r++)
#pragma GCC unroll 3
            for (int p = 0; p < WIDE; p++)
                sums[r][p] = _mm512_loadu_ps(s->own + (i + r) * SLICE + p * LANES);
        for (int64_t k = end; k < m->ins; k += 2) {
            const uint32_t *errors = s->errors + k / 2 * SLICE;
            __m512bh with[WIDE];
#pragma GCC unroll 3
            for (int p = 0; p < WIDE; p++)
                with[p] = (__m512bh)_mm512_loadu_si512(errors + p * LANES);
#pragma GCC unroll 8
            for (int r = 0; r < BLOCK; r++) {
                int pair;
                memcpy(&pair, own + r * m->ins + k, sizeof pair);
                const __m512bh factor = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 3
                for (int p = 0; p < WIDE; p++)
                    sums[r][p] = _mm512_dpbf16_ps(sums[r][p], factor, with[p]);
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < BLOCK; r++)
#pragma GCC unroll 3
            for (int p = 0; p < WIDE; p++)
                _mm512_storeu_ps(&wanted[i - begin + r][p * LANES], sums[r][p]);
    }
}

/* Rounds one column; returns what it misses, times the weight of the column, in `lost`. */
INLINED void
round_column(const Matrices *m, const Space *s, int64_t matrix, int64_t column, int64_t first,
             int64_t rows, const float *wanted, __m512 error[WIDE], __m512 lost[WIDE])
{
    const int64_t at = matrix * m->ins + column;
    const int64_t group = ((const int64_t *)m->of_column)[at] * SLICE;
    const int64_t place = ((const int64_t *)m->order)[at];
    const __m512 weight = _mm512_set1_ps(((const float *)m->weight)[at]);
    const __m512 largest = _mm512_set1_ps((float)m->largest);
    uint8_t integers[SLICE];

#pragma GCC unroll 3
    for (int p = 0; p < WIDE; p++) {
        const __m512 scale = _mm512_loadu_ps(s->scales + group + p * LANES);
        const __m512 zero = _mm512_loadu_ps(s->zeros + group + p * LANES);
        const __m512 own = _mm512_loadu_ps(s->own + column * SLICE + p * LANES);
        const __m512 target = _mm512_loadu_ps(wanted + p * LANES);
        __m512 number = _mm512_roundscale_ps(_mm512_div_ps(target, scale), 8);
        number = _mm512_max_ps(number, _mm512_sub_ps(_mm512_setzero_ps(), zero));
        number = _mm512_min_ps(number, _mm512_sub_ps(largest, zero));
        if (m->is_sparse)
            number = _mm512_maskz_mov_ps(
                _mm512_cmp_ps_mask(own, _mm512_setzero_ps(), _CMP_NEQ_UQ), number);
        error[p] = _mm512_fnmadd_ps(number, scale, own);
        const __m512 missed = _mm512_fnmadd_ps(number, scale, target);
        lost[p] = _mm512_fmadd_ps(_mm512_mul_ps(missed, missed), weight, lost[p]);
        _mm_storeu_si128((__m128i *)(integers + p * LANES),
                         _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(_mm512_add_ps(number, zero))));
    }
    uint8_t *q = (uint8_t *)m->q + (matrix * m->outs + first) * m->ins + place;
    for (int64_t r = 0; r < rows; r++)
        q[r * m->ins] = integers[r];
}

/* Rounds a few columns, from the last to the first, and adds their feedback to those before. */
INLINED void
round_block(const Matrices *m, const Space *s, int64_t matrix, int64_t begin, int64_t start,
            const int count, int64_t first, int64_t rows, float wanted[COLUMNS][SLICE],
            __m512 lost[WIDE])
{
    const float *near = (const float *)m->near + matrix * m->ins * m->ins + start;
    __m512 errors[BLOCK][WIDE];

#pragma GCC unroll 8
    for (int n = count - 1; n >= 0; n--) {
        round_column(m, s, matrix, start + n, first, rows, wanted[start - begin + n], errors[n],
                     lost);
#pragma GCC unroll 8
        for (int i = 0; i < n; i++) {
            const __m512 factor = _mm512_set1_ps(near[(start + i) * m->ins + n]);
            float *before = wanted[start - begin + i];
#pragma GCC unroll 3
            for (int p = 0; p < WIDE; p++)
                _mm512_storeu_ps(before + p * LANES,
                                 _mm512_fmadd_ps(factor, errors[n][p],
                                                 _mm512_loadu_ps(before + p * LANES)));
        }
#pragma GCC unroll 3
        for (int p = 0; p < WIDE; p++) {
            uint32_t *pair = s->errors + (start + n) / 2 * SLICE + p * LANES;
            const __m512i number = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(errors[n][p]));
            /* The second of a pair comes first, as columns are counted down. */
            _mm512_storeu_si512(pair, n % 2 ? _mm512_slli_epi32(number, 16)
                                            : _mm512_or_si512(_mm512_loadu_si512(pair), number));
        }
    }
    for (int64_t i = begin; i < start; i++) {
        float *before = wanted[i - begin];
        __m512 sums[WIDE];
#pragma GCC unroll 3
        for (int p = 0; p < WIDE; p++)
            sums[p] = _mm512_loadu_ps(before + p * LANES);
#pragma GCC unroll 8
        for (int n = count - 1; n >= 0; n--) {
            const __m512 factor = _mm512_set1_ps(near[i * m->ins + n]);
#pragma GCC unroll 3
            for (int p = 0; p < WIDE; p++)
                sums[p] = _mm512_fmadd_ps(factor, errors[n][p], sums[p]);
        }
#pragma GCC unroll 3
        for (int p = 0; p < WIDE; p++)
            _mm512_storeu_ps(before + p * LANES, sums[p]);
    }
}

TARGET static void
round_slice(const Matrices *m, const Space *s, int64_t matrix, int64_t first, double *loss)
{
    const int64_t rows = m->outs - first < SLICE ? m->outs - first : SLICE;
    float wanted[COLUMNS][SLICE], missed[SLICE];
    __m512 lost[WIDE] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};

    load_slice(m, s, matrix, first, rows);
    for (int64_t begin = (m->ins - 1) / COLUMNS * COLUMNS; begin >= 0; begin -= COLUMNS) {
        const int64_t end = begin + COLUMNS < m->ins ? begin + COLUMNS : m->ins;
        add_feedback(m, s, matrix, begin, end, wanted);
        for (int64_t start = end - BLOCK; start >= begin; start -= BLOCK)
            round_block(m, s, matrix, begin, start, BLOCK, first, rows, wanted, lost);
    }
    for (int p = 0; p < WIDE; p++)
        _mm512_storeu_ps(missed + p * LANES, lost[p]);
    *loss = 0;
    for (int64_t r = 0; r < rows; r++)
        *loss += (double)missed[r];
}

static PyObject *
round_matrices(PyObject *self, PyObject *arguments)
{
    Matrices m;
    Address begin, end;
    (void)self;
    if (!PyArg_ParseTuple(arguments, "(LLLLLL)(LLLLLLLLLL)fLL", &m.batch, &m.outs, &m.ins,
                          &m.groups, &m.largest, &m.is_sparse, &m.weights, &m.order, &m.upper,
                          &m.near, &m.weight, &m.scales, &m.zeros, &m.of_column, &m.q, &m.loss,
                          &m.middle, &begin, &end))
        return NULL;
    const int64_t slices = (m.outs + SLICE - 1) / SLICE;
    if (begin < 0 || end > m.batch * slices || m.ins < BLOCK || m.ins % BLOCK || m.groups < 1) {
        PyErr_SetString(PyExc_ValueError, "there are not so many slices");
        return NULL;
    }
    const size_t numbers = (size_t)(m.ins + m.ins / 2 + 2 * m.groups) * SLICE;
    float *space = malloc(numbers * sizeof(float));
    if (!space)
        return PyErr_NoMemory();
    const Space s = {space, space + m.ins * SLICE, space + (m.ins + m.groups) * SLICE,
                     (uint32_t *)space + (m.ins + 2 * m.groups) * SLICE};
    Py_BEGIN_ALLOW_THREADS
    for (int64_t n = begin; n < end; n++)
        round_slice(&m, &s, n / slices, n % slices * SLICE, (double *)m.loss + n);
    Py_END_ALLOW_THREADS
    free(space);
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
    {"round_matrices", round_matrices, METH_VARARGS, "See moe2edge/numerics/bfloat16.py."},
#endif
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_feedback", NULL, -1, methods, NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC
PyInit__feedback(void)
{
    PyObject *made = PyModule_Create(&module);
    if (made && (PyModule_AddIntConstant(made, "BLOCK", BLOCK) < 0 ||
                 PyModule_AddIntConstant(made, "SLICE", SLICE) < 0 ||
                 PyModule_AddIntConstant(made, "IS_NATIVE", is_native()) < 0 ||
                 PyModule_AddIntConstant(made, "VERSION", VERSION) < 0)) {
        Py_DECREF(made);
        return NULL;
    }
    return made;
}
