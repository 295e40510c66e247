/* Gate, position losses and their sum, of rows whose log-probs are known. */

struct finish {
    struct row_data data;
    const float *given;        /* [N] weights, or NULL */
    const float *row_weights;  /* [N], or NULL for 1 */
    const float *target;       /* [N] */
    float *weight, *drift;     /* [N] */
    float *token_loss, *slope, *coefficient; /* [N], with a loss */
    int32_t *first;            /* [N] */
    float *loss, *metrics;     /* [], NULL: no position losses; [11] */
    double *totals;            /* [4] */
    struct gate_rule gate;
    struct position_rule position;
    struct reduce_rule reduce;
};

/* What the rows of a call are computed with. */
struct plan {
    struct blocks blocks, units; /* of the gate, and of the ratio, if it is of more than a token */
    int own_units;               /* they are not those of the gate */
    double share;                /* factor / denominator */
};

static double weight_of(const struct finish *job, const struct plan *plan, int64_t row)
{
    if (job->gate.normalize == GIVEN_WEIGHTS)
        return job->given[row];
    return job->gate.normalize == OFF ? 1 : plan->blocks.weight[plan->blocks.of[row]];
}

/* Without old log-probs it is 0, or NaN with the row's log-prob. */
static double log_ratio_of(const struct finish *job, const struct plan *plan, int64_t row)
{
    if (!job->data.old)
        return job->data.now[row] - job->data.now[row];
    if (job->position.ratio == TOKEN)
        return -drift_of(&job->data, row);
    int32_t unit = plan->units.of[row];
    return -(plan->units.sum[unit] / plan->units.rows[unit]);
}

/* A valid row's loss, `coefficient` times of which enters the call's. */
static void finish_row(const struct finish *job, const struct plan *plan, int64_t row,
                       double weight, double coefficient, struct summary *all)
{
    double now = job->data.now[row], old = job->data.old ? job->data.old[row] : now;
    double target = job->target[row], by = job->row_weights ? job->row_weights[row] : 1;
    struct position found = {0};
    if (target < job->position.floor)
        target = job->position.floor, all->floored++;
    found = position_of(&job->position, now, old, target, log_ratio_of(job, plan, row));
    all->clipped += found.clipped;
    double loss = by == 0 ? 0 : by * weight * found.loss;
    job->token_loss[row] = (float)loss;
    job->slope[row] = by == 0 ? 0 : (float)(by * weight * found.slope);
    job->coefficient[row] = (float)coefficient;
    if (by != 0)
        all->loss += loss * coefficient;
}

static void blank_row(const struct finish *job, int64_t row)
{
    job->weight[row] = job->drift[row] = 0;
    job->first[row] = -1;
    if (job->loss)
        job->token_loss[row] = job->slope[row] = job->coefficient[row] = 0;
}

static void finish_rows(const struct finish *job, const struct plan *plan, struct summary *all)
{
    struct sequence rows = {0, 0};
    int by_block = job->gate.normalize != OFF && job->gate.normalize != GIVEN_WEIGHTS;
    for (int64_t i = 0; rows.end < job->data.rows; i++) {
        rows = next_sequence(&job->data, rows, i);
        double coefficient = plan->share, valid = 0;
        for (int64_t row = rows.begin; row < rows.end; row++)
            valid += job->data.valid[row] != 0;
        if (job->reduce.token_mean)
            coefficient /= valid + 1e-8;
        for (int64_t row = rows.begin; row < rows.end; row++) {
            int32_t block = plan->blocks.of[row];
            if (block < 0) {
                blank_row(job, row);
                continue;
            }
            double weight = weight_of(job, plan, row), drift = NAN;
            summarise(all, by_block ? plan->blocks.raw[block] : weight, weight);
            if (is_measured(&job->data, row)) {
                summarise_drift(all, drift = drift_of(&job->data, row));
                all->noise += noise_of(&job->data, row);
            }
            job->weight[row] = (float)weight, job->drift[row] = (float)drift;
            job->first[row] = plan->blocks.first[block];
            if (job->loss)
                finish_row(job, plan, row, weight, coefficient, all);
        }
    }
}

/* Rows that would weigh as much if all weighed the same: (sum w)^2 / sum w^2. Of shares of the
largest weight: the squares of small ones may be too small for a double. */
static double effective_rows(const struct finish *job, const struct plan *plan, double largest)
{
    double unit = largest == 0 ? 1 : largest, total = 0, square = 0;
    for (int64_t row = 0; row < job->data.rows; row++)
        if (plan->blocks.of[row] >= 0) {
            double share = weight_of(job, plan, row) / unit;
            total += share, square += share * share;
        }
    return square == 0 ? 0 : total / square * total;
}

/* Valid rows, sequences with any, and the blocks of gate and ratio; 0 without memory. */
static int plan_rows(const struct finish *job, struct plan *plan, struct summary *all)
{
    const struct gate_rule *gate = &job->gate;
    struct gate_rule units = {.granularity = job->position.ratio, .block_size = gate->block_size};
    struct row_data whole = job->data; /* the ratio is of all valid rows */
    whole.measured = NULL;
    if (!divide(&job->data, gate, &plan->blocks))
        return 0;
    plan->own_units = job->loss && units.granularity != TOKEN &&
                      (units.granularity != gate->granularity || job->data.measured);
    plan->units = plan->blocks;
    if (plan->own_units && !divide(&whole, &units, &plan->units)) {
        free(plan->blocks.rows);
        return 0;
    }
    struct sequence rows = {0, 0};
    int64_t block = 0;
    for (int64_t i = 0; rows.end < job->data.rows; i++) {
        rows = next_sequence(&job->data, rows, i);
        int64_t before = block;
        while (block < plan->blocks.count && plan->blocks.first[block] < rows.end)
            all->rows += plan->blocks.rows[block++];
        all->sequences += block > before;
    }
    return 1;
}

int64_t drift_gate_finish(const void *given, int64_t from, int64_t to)
{
    const struct finish *job = given;
    struct plan plan = {0};
    struct summary all = {.lowest = INFINITY, .largest = -INFINITY, .smallest_drift = INFINITY};
    (void)from, (void)to; /* all rows */
    if (!plan_rows(job, &plan, &all))
        return NO_MEMORY;
    weigh_blocks(&job->data, &job->gate, &plan.blocks);
    for (int64_t b = 0; b < plan.blocks.count; b++)
        all.smallest_drift = smaller(all.smallest_drift, plan.blocks.size[b]);
    double size = job->reduce.denominator == OF_SEQUENCES ? all.sequences : all.rows;
    plan.share = job->reduce.factor;
    if (job->reduce.denominator != OF_CALLER)
        plan.share /= size > 1 ? size : 1;
    finish_rows(job, &plan, &all);
    put_metrics(&all, effective_rows(job, &plan, all.largest), job->metrics);
    put_totals(&all, &job->gate, size, job->totals);
    if (job->loss)
        *job->loss = (float)all.loss;
    if (plan.own_units)
        free(plan.units.rows);
    free(plan.blocks.rows);
    return 0;
}
