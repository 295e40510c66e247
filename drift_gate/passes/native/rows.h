/* All that depends on the instruction set, in the names that NAME gives. */

#include "arithmetic.h"
#define LIST(name) NAME(name)
#define WIDTH LANES
#include "lanes.h"
#include "tiles.h"
#include "scan.h"
#include "select.h"
#include "expand.h"
#include "divergence.h"
#include "topk.h"
#undef LIST
#undef WIDTH

/* Lists of up to so many entries are padded to half as many: the sums have the same bits. */
#define LIST(name) NAME(name##_short)
#define WIDTH SHORT_LANES
#include "lanes.h"
#include "topk.h"
#undef LIST
#undef WIDTH

int64_t NAME(topk)(const void *given, int64_t first, int64_t last)
{
    const struct topk *job = given;
    int few = job->words <= SHORT_LANES;
    return (few ? NAME(topk_rows_short) : NAME(topk_rows))(given, first, last);
}

#include "words.h"
