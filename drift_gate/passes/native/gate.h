/* What rows weigh, and what is told of it. */

#define LARGEST_DRIFT 0x1p126 /* stands for infinity where a call is a part of its batch */

/* exp(-tau size) of blocks from ... to over its mean on their rows. */
static void unit_mean(struct blocks *found, double tau, int64_t from, int64_t to)
{
    double lowest = INFINITY, total = 0, rows = 0;
    for (int64_t b = from; b < to; b++)
        lowest = smaller(lowest, found->size[b]);
    for (int64_t b = from; b < to; b++) {
        found->weight[b] = exp(-tau * (found->size[b] - lowest));
        total += found->rows[b] * found->weight[b], rows += found->rows[b];
    }
    for (int64_t b = from; b < to; b++)
        found->weight[b] /= total / rows;
}

/* The raw gate and the weight of every block. */
static void weigh_blocks(const struct row_data *data, const struct gate_rule *rule,
                         struct blocks *found)
{
    if (rule->normalize == OFF || rule->normalize == GIVEN_WEIGHTS)
        return;
    int held = rule->part && rule->normalize == OVER_BATCH && rule->tau != 0;
    for (int64_t b = 0; b < found->count; b++) {
        if (held && found->size[b] > LARGEST_DRIFT)
            found->size[b] = LARGEST_DRIFT;
        found->weight[b] = found->raw[b] = exp(-rule->tau * found->size[b]);
    }
    if (rule->normalize == OVER_BATCH)
        unit_mean(found, rule->tau, 0, found->count);
    if (rule->normalize != OVER_SEQUENCE)
        return;
    struct sequence rows = {0, 0};
    int64_t from = 0;
    for (int64_t i = 0; rows.end < data->rows; i++) {
        rows = next_sequence(data, rows, i);
        int64_t to = from;
        while (to < found->count && found->first[to] < rows.end)
            to++;
        unit_mean(found, rule->tau, from, to);
        from = to;
    }
}

/* Sums over the valid rows, and the smallest and the largest weight. */
struct summary {
    double rows, sequences, raw, lowest, largest, clipped, floored, loss;
    double drifts, drift_size, drift, kl, noise; /* of the measured rows */
    double smallest_drift; /* of a block */
};

static void summarise(struct summary *all, double raw, double weight)
{
    all->raw += raw;
    all->lowest = smaller(all->lowest, weight), all->largest = larger(all->largest, weight);
}

/* How far apart logits lie at z; 0 at infinities. */
static double spaced(const struct row_data *data, double z)
{
    double size = fabs(z / data->scale) * (1 + 0x1p-13);
    if (!(size > 0) || isinf(size))
        return size > 0 ? 0 : size;
    return ldexp(data->scale, ilogb(size) - (int)data->bits);
}

/* The mean |drift| of a row that rounding of the logits alone would show: see rules.Spacing. */
static double noise_of(const struct row_data *data, int64_t row)
{
    if (!data->maximum || !data->old)
        return 0;
    double now = data->now[row], top = data->maximum[row], log_sum = data->log_sum[row];
    double p = exp(now), largest = exp(-log_sum);
    int is_top = now + log_sum > -1e-4;
    double rest = 1 - p - (is_top ? 0 : largest);
    rest = rest < 0 ? 0 : rest;
    double squares = smaller(rest * rest / 3, largest * rest) + (is_top ? 0 : largest * largest);
    double own = spaced(data, now + top + log_sum) * (1 - p), others = spaced(data, top);
    return sqrt(own * own + others * others * squares) / 3;
}

static void summarise_drift(struct summary *all, double drift)
{
    all->drifts += 1, all->drift += drift, all->drift_size += fabs(drift);
    all->kl += clamped(drift, -20, 20);
}

/* rows.METRICS, in their order. */
static void put_metrics(const struct summary *all, double ess, float *metrics)
{
    double n = all->rows > 1 ? all->rows : 1, drifts = all->drifts > 1 ? all->drifts : 1;
    int none = all->rows == 0;
    double values[] = {all->raw / n,   none ? 0 : all->lowest, none ? 0 : all->largest,
                       ess / n,        all->drift_size / drifts, all->drift / drifts,
                       all->clipped / n, all->kl / drifts,     all->noise / drifts,
                       all->rows,      all->floored};
    for (size_t i = 0; i < sizeof values / sizeof *values; i++)
        metrics[i] = (float)values[i];
}

/* Peak, log-mean, tokens and size of the call: the mean of its gates is exp(peak + log-mean). */
static void put_totals(const struct summary *all, const struct gate_rule *rule, double size,
                       double *totals)
{
    int some = all->rows > 0 && rule->normalize == OVER_BATCH;
    int none_weigh = rule->part && rule->tau != 0 && all->smallest_drift == LARGEST_DRIFT;
    totals[0] = !some ? 0 : none_weigh ? -INFINITY : -rule->tau * all->smallest_drift;
    totals[1] = some ? -log(all->largest) : 0;
    totals[2] = all->rows, totals[3] = size;
}
