/* Which rows are valid, and whether what callers say of them can be. */

struct validity {
    int64_t rows, vocab, ignore_index, check;
    const void *labels; /* [N], or NULL: the mask alone */
    int64_t wide;
    const void *mask; /* [N], or NULL */
    int64_t mask_kind;
    const void *borders; /* [B + 1], or NULL */
    int64_t wide_borders, count; /* count: B + 1 */
    uint8_t *valid;
};

/* Of a mask: bytes of an integer, or one of these floats. */
enum mask_kind { MASK_BFLOAT16 = 16, MASK_FLOAT16, MASK_FLOAT32, MASK_FLOAT64 };
/* What can be wrong; a function returns it beside where, see `wrong`. */
enum problem { FINE, MASK_VALUE, LABEL, BORDERS };

static int64_t wrong(enum problem problem, int64_t at)
{
    return at * 4 + problem;
}

/* Whether a row is in the mask: 0 or 1, or for a float that is neither 2. */
static int masked_in(const void *mask, int64_t kind, int64_t row)
{
    switch (kind) {
    case 1:
        return ((const uint8_t *)mask)[row] != 0;
    case 2:
        return ((const uint16_t *)mask)[row] != 0;
    case 4:
        return ((const uint32_t *)mask)[row] != 0;
    case 8:
        return ((const uint64_t *)mask)[row] != 0;
    case MASK_BFLOAT16:
    case MASK_FLOAT16: {
        uint16_t bits = ((const uint16_t *)mask)[row];
        return bits << 1 & 0xffff ? bits == (kind == MASK_FLOAT16 ? 0x3c00 : 0x3f80) ? 1 : 2 : 0;
    }
    case MASK_FLOAT32: {
        float x = ((const float *)mask)[row];
        return x == 0 ? 0 : x == 1 ? 1 : 2;
    }
    default: {
        double x = ((const double *)mask)[row];
        return x == 0 ? 0 : x == 1 ? 1 : 2;
    }
    }
}

static int rises(const void *borders, int64_t wide, int64_t count, int64_t rows)
{
    if (count < 1 || id_at(borders, wide, 0) != 0 || id_at(borders, wide, count - 1) != rows)
        return 0;
    for (int64_t i = 1; i < count; i++)
        if (id_at(borders, wide, i) < id_at(borders, wide, i - 1))
            return 0;
    return 1;
}

int64_t drift_gate_valid_rows(const void *given, int64_t first, int64_t last)
{
    const struct validity *job = given;
    int64_t bad = -1;
    for (int64_t row = first; row < last; row++) {
        int64_t label = job->labels ? id_at(job->labels, job->wide, row) : 0;
        int in = job->mask ? masked_in(job->mask, job->mask_kind, row) : 1;
        if (in == 2 && job->check)
            return wrong(MASK_VALUE, row);
        job->valid[row] = in && !(job->labels && label == job->ignore_index);
        if (job->labels && bad < 0 && job->valid[row] && (label < 0 || label >= job->vocab))
            bad = row;
    }
    if (job->check && bad >= 0)
        return wrong(LABEL, bad);
    if (!job->check || !job->borders)
        return FINE;
    int fit = rises(job->borders, job->wide_borders, job->count, job->rows);
    return fit ? FINE : wrong(BORDERS, 0);
}
