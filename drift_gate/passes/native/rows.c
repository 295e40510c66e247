/* Rows of [N, V], [N, K] and [N] data on a CPU: what the functions compute is said in the Python
modules that call them. A row is summed by one thread in one order: the same bits every time. */

#include <float.h>
#include <math.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { BFLOAT16, FLOAT16, FLOAT32 };
enum { TILE = 2048, LANES = 64, SHORT_LANES = 32 };
enum { NO_MEMORY = -1 }; /* functions return this, 0, or what is wrong with their arguments */
#if defined(__GNUC__)
#define INLINE static inline __attribute__((always_inline)) /* or loops do not become vectors */
#define APART __attribute__((noinline))
#else
#define INLINE static inline
#define APART
#endif
#define LOWEST (-1e30f) /* stands for -inf */

#include "rules.h"
#include "lists.h"
#include "valid.h"
#include "blocks.h"
#include "position.h"
#include "gate.h"
#include "finish.h"
#include "support.h"
#include "order.h"
#include "jobs.h"
#include "sums.h"
#include "topk_sums.h"
#include "candidates.h"

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

/* Bytes of what a function is given: Python packs as many. */
int64_t drift_gate_size(const char *job)
{
    static const struct {
        const char *job;
        int64_t size;
    } sizes[] = {
        {"scan", sizeof(struct scan)},
        {"select", sizeof(struct select)},
        {"expand", sizeof(struct expand)},
        {"divergence", sizeof(struct divergences)},
        {"divergence_grad", sizeof(struct divergence_slopes)},
        {"valid_rows", sizeof(struct validity)},
        {"finish", sizeof(struct finish)},
        {"measured_rows", sizeof(struct measured)},
        {"support", sizeof(struct support)},
        {"topk", sizeof(struct topk)},
        {"by_word", sizeof(struct by_word)},
        {"sum_words", sizeof(struct word_sums)},
    };
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        if (strcmp(sizes[i].job, job) == 0)
            return sizes[i].size;
    return -1;
}

/* What a thread of several does: `size` rows at a time, the next ones that nobody has taken, until
there are none or a function returns what is not 0. */
int64_t drift_gate_share(int64_t (*run)(const void *, int64_t, int64_t), const void *job,
                         int64_t rows, int64_t size, _Atomic int64_t *next)
{
    for (;;) {
        int64_t first = atomic_fetch_add(next, size);
        if (first >= rows)
            return 0;
        int64_t found = run(job, first, rows - first < size ? rows : first + size);
        if (found)
            return found;
    }
}
