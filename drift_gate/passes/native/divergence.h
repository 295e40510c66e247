/* Divergences between two rows, and their gradient. */

/* Sums of a tile of u and of v; with_mean is 1 for the mean of u, 2 for that of v. */
static struct masses NAME(tile_masses)(const float *restrict u, const float *restrict v, int64_t n,
                                       int64_t with_mean)
{
    struct masses all = NO_MASSES;
    float lane[LANES] = {0}, other[LANES] = {0}, moment[LANES] = {0};
    uint32_t missing[LANES] = {0};
    all.u = NAME(empty_mass)(u, n), all.v = NAME(empty_mass)(v, n);
    float shift = all.u.shift, other_shift = all.v.shift;
    for (int64_t i = 0; i < n; i += LANES)
        for (int64_t l = 0; l < LANES; l++) {
            float x = NAME(centred)(u[i + l], shift), y = NAME(centred)(v[i + l], other_shift);
            float e = NAME(exp)(x);
            lane[l] += e;
            other[l] += NAME(exp)(y);
            moment[l] += e * (x - y);
            missing[l] |= (v[i + l] <= LOWEST) & (u[i + l] > LOWEST);
        }
    all.u.sum = NAME(total)(lane), all.v.sum = NAME(total)(other);
    all.moment = NAME(total)(moment);
    for (int64_t l = 0; l < LANES; l++)
        all.missing |= missing[l] != 0;
    if (with_mean == 1)
        all.u.mean = NAME(tile_mean)(u, n, shift);
    if (with_mean == 2)
        all.v.mean = NAME(tile_mean)(v, n, other_shift);
    return all;
}

static struct divergence NAME(kl)(struct rows x, struct rows y, int64_t row, int64_t vocab,
                                  float scale, float other_scale, int64_t with_mean)
{
    float u[TILE], v[TILE];
    struct masses all = NO_MASSES;
    for (int64_t at = 0; at < vocab; at += TILE) {
        int64_t n = vocab - at < TILE ? vocab - at : TILE;
        NAME(load)(x, row, at, n, scale, u);
        n = NAME(load)(y, row, at, n, other_scale, v);
        all = add_both(all, NAME(tile_masses)(u, v, n, with_mean));
    }
    return kl_of(all);
}

/* log of the mixture of masses e and other_e; finite where both are 0, by what no sum can feel. */
INLINE float NAME(log_mixture)(float e, float other_e, float ratio, float beta)
{
    return NAME(log)((1 - beta) * e + beta * (ratio * other_e) + FLT_MIN);
}

static struct divergence NAME(jsd)(struct rows x, struct rows y, int64_t row, int64_t vocab,
                                   float scale, float other_scale, double beta,
                                   int64_t with_mean)
{
    float u[TILE], v[TILE];
    struct mass of_u = NAME(row_mass)(x, row, vocab, scale, with_mean);
    struct mass of_v = NAME(row_mass)(y, row, vocab, other_scale, 0);
    float top = of_u.shift, other_top = of_v.shift;
    float ratio = mass_ratio((float)log_sum_of(of_u), (float)log_sum_of(of_v));
    double moment = 0, other_moment = 0;
    for (int64_t at = 0; at < vocab; at += TILE) {
        float lane[LANES] = {0}, other[LANES] = {0};
        int64_t n = vocab - at < TILE ? vocab - at : TILE;
        NAME(load)(x, row, at, n, scale, u);
        n = NAME(load)(y, row, at, n, other_scale, v);
        for (int64_t i = 0; i < n; i += LANES)
            for (int64_t l = 0; l < LANES; l++) {
                float a = NAME(centred)(u[i + l], top), b = NAME(centred)(v[i + l], other_top);
                float e = NAME(exp)(a), other_e = NAME(exp)(b);
                float log_m = NAME(log_mixture)(e, other_e, ratio, (float)beta);
                lane[l] += e * (a - log_m);
                other[l] += other_e * (b - log_m);
            }
        moment += NAME(total)(lane), other_moment += NAME(total)(other);
    }
    return jsd_of(of_u, of_v, ratio, beta, moment, other_moment);
}

static struct divergence NAME(row_divergence)(const struct divergences *job, int64_t row)
{
    struct rows x = job->student, y = job->teacher;
    float scale = (float)job->scale, other_scale = (float)job->teacher_scale;
    int64_t with_entropy = job->entropy != NULL;
    if (job->direction == JSD)
        return NAME(jsd)(x, y, row, job->vocab, scale, other_scale, job->beta, with_entropy);
    if (job->direction == REVERSE)
        return NAME(kl)(x, y, row, job->vocab, scale, other_scale, with_entropy);
    return swapped(NAME(kl)(y, x, row, job->vocab, other_scale, scale, with_entropy ? 2 : 0));
}

int64_t NAME(divergence)(const void *given, int64_t first, int64_t last)
{
    const struct divergences *job = given;
    for (int64_t row = first; row < last; row++) {
        struct divergence found = {0};
        float log_prob = 0;
        if (job->valid[row]) {
            int64_t label = job->labels ? id_at(job->labels, job->wide, row) : 0;
            if (label < 0 || label >= job->vocab)
                return row + 1;
            found = NAME(row_divergence)(job, row);
            if (job->labels)
                log_prob = NAME(word)(job->student, row, label, (float)job->scale) - found.top -
                           (float)found.log_sum;
        }
        job->loss[row] = (float)found.loss, job->log_probs[row] = log_prob;
        put_statistics(found, job->statistics + row, job->rows);
        if (job->entropy)
            job->entropy[row] = (float)found.entropy;
    }
    return 0;
}

/* The gradient of a tile in the place of the student's logits u. */
static void NAME(slopes)(float *restrict u, const float *restrict v, int64_t n, int64_t direction,
                         float beta, struct slopes data)
{
    float top = data.top, other_top = data.other_top, factor = data.factor;
    float other_factor = data.other_factor, centre = data.centre;
    if (direction == REVERSE)
        for (int64_t i = 0; i < n; i++) {
            float a = NAME(centred)(u[i], top), b = NAME(centred)(v[i], other_top);
            u[i] = (a - b - centre) * NAME(exp)(a) * factor;
        }
    else if (direction == FORWARD)
        for (int64_t i = 0; i < n; i++)
            u[i] = NAME(exp)(u[i] - top) * factor - NAME(exp)(v[i] - other_top) * other_factor;
    else
        for (int64_t i = 0; i < n; i++) {
            float a = NAME(centred)(u[i], top), b = NAME(centred)(v[i], other_top);
            float e = NAME(exp)(a);
            float log_m = NAME(log_mixture)(e, NAME(exp)(b), other_factor, beta);
            u[i] = (a - log_m - centre) * e * factor;
        }
}

static void NAME(slope_row)(const struct divergence_slopes *job, int64_t row)
{
    float u[TILE], v[TILE];
    double weight = job->upstream[row] * job->scale;
    struct slopes data = slopes_of(job->statistics + row, job->rows, weight, job->direction,
                                   job->beta);
    for (int64_t at = 0; at < job->vocab; at += TILE) {
        int64_t n = job->vocab - at < TILE ? job->vocab - at : TILE;
        NAME(load)(job->student, row, at, n, (float)job->scale, u);
        int64_t whole = NAME(load)(job->teacher, row, at, n, (float)job->teacher_scale, v);
        NAME(slopes)(u, v, whole, job->direction, (float)job->beta, data);
        NAME(store)(job->out, row, at, n, u);
    }
}

int64_t NAME(divergence_grad)(const void *given, int64_t first, int64_t last)
{
    const struct divergence_slopes *job = given;
    for (int64_t row = first; row < last;) {
        int64_t next = row;
        while (next < last && (!job->valid[next] || job->upstream[next] == 0))
            next++;
        zero_rows(job->out, row, next, 0, job->all_words);
        if (next == row) {
            NAME(slope_row)(job, next++);
            zero_rows(job->out, row, next, job->vocab, job->all_words); /* the teacher lacks them */
        }
        row = next;
    }
    return 0;
}
