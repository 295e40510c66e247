/* Rows of [N, V] data on a CPU: what these functions compute is said in __init__.py, which calls
them. A row is summed by one thread in one order: the same bits every time. */

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

enum { BFLOAT16, FLOAT16, FLOAT32 };
enum { REVERSE, FORWARD, JSD };
enum { TILE = 2048, LANES = 64 };
#if defined(__GNUC__)
#define INLINE static inline __attribute__((always_inline)) /* or loops do not become vectors */
#else
#define INLINE static inline
#endif
#define LOWEST (-1e30f) /* stands for -inf */

struct rows {
    void *data;
    const int64_t *offsets; /* of each row's first element, in elements */
    int64_t kind;
};

#include "sums.h"

/* Zeros; rows that touch in one go, which the C library writes without reading. */
void drift_gate_zero(int64_t first, int64_t last, int64_t vocab, struct rows out)
{
    int64_t size = out.kind == FLOAT32 ? 4 : 2;
    for (int64_t row = first; row < last;) {
        int64_t next = row + 1;
        while (next < last && out.offsets[next] == out.offsets[next - 1] + vocab)
            next++;
        memset((char *)out.data + out.offsets[row] * size, 0, (size_t)((next - row) * vocab * size));
        row = next;
    }
}

/* The functions of rows.h for several instruction sets, and the name of the best. */

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
#define NAME(name) drift_gate_##name##_avx512
#include "rows.h"
#undef NAME
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define NAME(name) drift_gate_##name##_avx2
#include "rows.h"
#undef NAME
#pragma GCC pop_options
#define MANY_SETS
#endif

#define NAME(name) drift_gate_##name##_any
#include "rows.h"
#undef NAME

const char *drift_gate_instruction_set(void)
{
#ifdef MANY_SETS
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        return "avx512";
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        return "avx2";
#endif
    return "any";
}
