/* Rows in double: sequences, their blocks, and the drift of each block. Row data is small beside
the logits, so one thread does it, row after row. */

struct row_data { /* [N] each */
    int64_t rows, length;
    const uint8_t *valid;
    const float *now, *old;  /* log-probs; old may be NULL */
    const int64_t *spans;    /* or NULL */
    const void *borders;     /* [B + 1], or NULL: every `length` rows are a sequence */
    int64_t wide, sequences; /* whether they are int64; B */
    const uint8_t *measured; /* rows with a drift, of the valid ones; or NULL for all of those */
    const float *maximum, *log_sum; /* of the logits that now is of, or NULL: see rules.Spacing */
    int64_t bits;
    double scale;
};

/* Rows begin ... end of sequence i. The sequences hold every row once, whatever the borders say. */
struct sequence {
    int64_t begin, end;
};

static struct sequence next_sequence(const struct row_data *data, struct sequence last, int64_t i)
{
    int64_t begin = last.end, end = data->rows;
    if (!data->borders)
        end = begin + data->length;
    else if (i + 1 < data->sequences)
        end = id_at(data->borders, data->wide, i + 1);
    end = end < begin ? begin : end;
    return (struct sequence){begin, end > data->rows ? data->rows : end};
}

static int is_measured(const struct row_data *data, int64_t row)
{
    return !data->measured || data->measured[row];
}

static double drift_of(const struct row_data *data, int64_t row)
{
    return data->old ? (double)data->old[row] - data->now[row] : 0;
}

/* The valid rows by blocks, which are numbered as they begin. */
struct blocks {
    int64_t count;
    int32_t *of;    /* [N]: the row's block, -1 where not valid */
    int32_t *first; /* [count]: its first valid row */
    double *rows;   /* [count]: its valid rows, */
    double *drifts; /* those measured, */
    double *sum;    /* of their drifts, */
    double *size;   /* and |aggregate of them| */
    double *raw, *weight; /* [count]: exp(-tau size), and what the block's rows weigh */
};

/* Room for as many blocks as rows: 0 without memory. `rows` is what there is to free. */
static int room_for_blocks(int64_t rows, struct blocks *found)
{
    size_t n = (size_t)rows + 1; /* malloc(0) may be NULL */
    found->count = 0;
    found->rows = malloc(n * (6 * sizeof(double) + 2 * sizeof(int32_t)));
    if (!found->rows)
        return 0;
    found->drifts = found->rows + n;
    found->sum = found->drifts + n, found->size = found->sum + n;
    found->raw = found->size + n, found->weight = found->raw + n;
    found->of = (int32_t *)(found->weight + n), found->first = found->of + n;
    return 1;
}

/* The block of a valid row that comes after `before`, the last valid row of its sequence (-1:
none); `start` is the first. */
static int32_t block_of(const struct row_data *data, const struct blocks *found,
                        const struct gate_rule *rule, struct table spans, int64_t start,
                        int64_t before, int64_t row)
{
    int32_t new = (int32_t)found->count;
    if (before < 0 || rule->granularity == TOKEN) {
        if (rule->granularity == SPAN)
            first_entry(spans, data->spans + start, 1, 0);
        return new;
    }
    int32_t last = found->of[before];
    if (rule->granularity == SEQUENCE)
        return last;
    if (rule->granularity == BLOCK)
        return (row - start) / rule->block_size == (before - start) / rule->block_size ? last : new;
    if (data->spans[row] == data->spans[before])
        return last;
    int64_t owner = first_entry(spans, data->spans + start, 1, row - start);
    return owner == row - start ? new : found->of[start + owner];
}

/* The larger and the smaller; NaN stays. */
static double larger(double a, double b)
{
    return b > a || b != b ? b : a;
}

static double smaller(double a, double b)
{
    return b < a || b != b ? b : a;
}

static void divide_sequence(const struct row_data *data, const struct gate_rule *rule,
                            struct sequence rows, int32_t *slots, struct blocks *found)
{
    int64_t start = -1, before = -1;
    struct table spans = {0};
    for (int64_t row = rows.begin; row < rows.end; row++) {
        found->of[row] = -1;
        if (!data->valid[row])
            continue;
        if (before < 0) {
            start = row;
            if (rule->granularity == SPAN)
                spans = cleared(slots, rows.end - start);
        }
        int32_t block = block_of(data, found, rule, spans, start, before, row);
        if (block == found->count) {
            found->first[block] = (int32_t)row;
            found->rows[block] = found->drifts[block] = 0;
            found->sum[block] = found->size[block] = 0;
            found->count++;
        }
        found->of[row] = block;
        found->rows[block] += 1;
        before = row;
        if (!is_measured(data, row))
            continue;
        found->drifts[block] += 1;
        double drift = drift_of(data, row), size = fabs(drift);
        found->sum[block] += drift;
        if (rule->aggregate == MEAN_ABS)
            found->size[block] += size;
        else if (rule->aggregate == RMS) /* a double holds the square of any float */
            found->size[block] += size * size;
        else
            found->size[block] = larger(found->size[block], size);
    }
}

/* From the sums and the largest to the aggregates. */
static void aggregate(int64_t kind, struct blocks *found)
{
    for (int64_t b = 0; b < found->count; b++)
        if (kind == MEAN)
            found->size[b] = fabs(found->sum[b] / found->drifts[b]);
        else if (kind == MEAN_ABS)
            found->size[b] /= found->drifts[b];
        else if (kind == RMS)
            found->size[b] = sqrt(found->size[b] / found->drifts[b]);
}

/* Divide the valid rows into blocks, with |aggregate of their drifts|; 0 without memory. */
static int divide(const struct row_data *data, const struct gate_rule *rule, struct blocks *found)
{
    int32_t *slots = NULL;
    struct sequence rows = {0, 0};
    if (!room_for_blocks(data->rows, found))
        return 0;
    if (rule->granularity == SPAN)
        slots = malloc((size_t)slots_for(data->rows) * sizeof *slots);
    if (rule->granularity == SPAN && !slots) {
        free(found->rows);
        return 0;
    }
    for (int64_t i = 0; rows.end < data->rows; i++) {
        rows = next_sequence(data, rows, i);
        divide_sequence(data, rule, rows, slots, found);
    }
    free(slots);
    aggregate(rule->aggregate, found);
    return 1;
}

/* The first valid row of each block, and every `every`-th valid one after it. */
struct measured {
    struct row_data data; /* its log-probs are not read */
    uint8_t *measured;    /* [N] */
    int64_t every;
    struct gate_rule gate;
};

int64_t drift_gate_measured_rows(const void *given, int64_t from, int64_t to)
{
    const struct measured *job = given;
    struct blocks blocks;
    (void)from, (void)to; /* all rows */
    if (!divide(&job->data, &job->gate, &blocks))
        return NO_MEMORY;
    for (int64_t b = 0; b < blocks.count; b++)
        blocks.rows[b] = 0;
    for (int64_t row = 0; row < job->data.rows; row++) {
        int32_t block = blocks.of[row];
        job->measured[row] = block >= 0 && (int64_t)blocks.rows[block] % job->every == 0;
        if (block >= 0)
            blocks.rows[block] += 1;
    }
    free(blocks.rows);
    return 0;
}
