/* Divergence of student and teacher over K listed words, and its slope in the student's scores.
With log p and log q of the listed words (both softmaxed over the list where it is "renormalized"),
and a mixture m = beta q + (1 - beta) p,

    reverse  L = sum p (log p - log q)                            g = p (log p - log q)
    forward  L = sum q (log q - log p)                            g = -q
    jsd      L = sum beta q log(q / m) + (1 - beta) p log(p / m)  g = (1 - beta) p log(p / m)
    mixed    beta forward + (1 - beta) reverse

"tail" adds a bucket with the rest of either mass. The slope is g - p sum(g) where renormalized,
else p dL/dp, for "tail" less p times that of the bucket.

In the names that LIST gives; lists are padded to WIDTH entries. */

/* The entries that count, and -inf for the others and up to whole vectors. */
static void LIST(take)(const float *restrict from, const uint8_t *restrict present, int64_t n,
                       int64_t whole, float *restrict to)
{
    for (int64_t i = 0; i < n; i++)
        to[i] = present[i] ? from[i] : -INFINITY;
    for (int64_t i = n; i < whole; i++)
        to[i] = -INFINITY;
}

/* e = exp(x) of log-probs, and their sum: in double where 1 - sum is wanted. */
static double LIST(exponentials)(float *restrict x, float *restrict e, int64_t whole, int64_t tail)
{
    double total = 0;
    for (int64_t at = 0; at < whole; at += TILE) {
        int64_t end = whole - at < TILE ? whole : at + TILE;
        if (tail) {
            double lane[WIDTH] = {0};
            for (int64_t i = at; i < end; i += WIDTH)
                for (int64_t l = 0; l < WIDTH; l++) {
                    double p = NAME(exp_double)(x[i + l]);
                    e[i + l] = (float)p, lane[l] += p;
                }
            for (int64_t l = 0; l < WIDTH; l++)
                total += lane[l];
        } else {
            float lane[WIDTH] = {0};
            for (int64_t i = at; i < end; i += WIDTH)
                for (int64_t l = 0; l < WIDTH; l++) {
                    float p = NAME(exp_any)(x[i + l]);
                    e[i + l] = p, lane[l] += p;
                }
            total += LIST(total)(lane);
        }
    }
    for (int64_t i = 0; i < whole; i++)
        x[i] = x[i] < LOWEST ? LOWEST : x[i];
    return total;
}

/* The same of x less its largest, for a softmax. */
static double LIST(centred_exponentials)(float *restrict x, float *restrict e, int64_t whole,
                                         float shift)
{
    double total = 0;
    for (int64_t at = 0; at < whole; at += TILE) {
        int64_t end = whole - at < TILE ? whole : at + TILE;
        float lane[WIDTH] = {0};
        for (int64_t i = at; i < end; i += WIDTH)
            for (int64_t l = 0; l < WIDTH; l++) {
                float y = NAME(centred)(x[i + l], shift), p = NAME(exp)(y);
                x[i + l] = y, e[i + l] = p, lane[l] += p;
            }
        total += LIST(total)(lane);
    }
    return total;
}

static void LIST(read_model)(struct model *of, int64_t whole, int64_t support, int64_t some)
{
    of->log_total = 0, of->over = 1;
    if (support != RENORMALIZED) {
        of->mass = (struct mass){0, 0, LIST(exponentials)(of->x, of->e, whole, support == TAIL), 0};
        return;
    }
    of->mass = LIST(empty_mass)(of->x, whole);
    of->mass.sum = LIST(centred_exponentials)(of->x, of->e, whole, of->mass.shift);
    of->log_total = some ? log_sum_of(of->mass) : 0;
    of->over = some ? 1 / of->mass.sum : 0;
}

/* p and q take the places of e and f, and x - y that of x. */
static struct list_sums LIST(kl_sums)(struct model p, struct model q, int64_t whole)
{
    struct list_sums all = {0};
    float over = (float)p.over, other_over = (float)q.over;
    float *restrict x = p.x, *restrict e = p.e, *restrict f = q.e;
    const float *restrict y = q.x;
    for (int64_t at = 0; at < whole; at += TILE) {
        int64_t end = whole - at < TILE ? whole : at + TILE;
        float forth[WIDTH] = {0}, back[WIDTH] = {0}, overlap[WIDTH] = {0};
        uint32_t lacks[WIDTH] = {0}, lacked[WIDTH] = {0};
        for (int64_t i = at; i < end; i += WIDTH)
            for (int64_t l = 0; l < WIDTH; l++) {
                float a = x[i + l], b = y[i + l], d = a - b;
                float one = e[i + l], other = f[i + l];
                forth[l] += one * d, back[l] -= other * d;
                one *= over, other *= other_over;
                overlap[l] += one < other || one != one ? one : other;
                lacks[l] |= (a <= LOWEST) & (b > LOWEST);
                lacked[l] |= (b <= LOWEST) & (a > LOWEST);
                x[i + l] = d, e[i + l] = one, f[i + l] = other;
            }
        all.forth += LIST(total)(forth), all.back += LIST(total)(back);
        all.overlap += LIST(total)(overlap);
        for (int64_t l = 0; l < WIDTH; l++)
            all.lacks |= lacks[l] != 0, all.lacked |= lacked[l] != 0;
    }
    return all;
}

/* p and q take the places of e and f, and log(p / m) that of x. With B the larger and S the smaller
of p and q, and g the part of S in m = B (1 + g (S / B - 1)):

    log(B / m) = -log1p(g expm1(-|log p - log q|))        log(S / m) = log(B / m) - |log p - log q|

which keep their digits where p and q are nearly the same; L then feels errors of the logarithms by
their square alone. `between` is what x - y lacks to log p - log q. */
static struct list_sums LIST(jsd_sums)(struct model p, struct model q, int64_t whole, float between,
                                       float beta)
{
    struct list_sums all = {0};
    float over = (float)p.over, other_over = (float)q.over;
    float *restrict x = p.x, *restrict e = p.e, *restrict f = q.e;
    const float *restrict y = q.x;
    for (int64_t at = 0; at < whole; at += TILE) {
        int64_t end = whole - at < TILE ? whole : at + TILE;
        float forth[WIDTH] = {0}, back[WIDTH] = {0}, overlap[WIDTH] = {0};
        for (int64_t i = at; i < end; i += WIDTH)
            for (int64_t l = 0; l < WIDTH; l++) {
                float d = x[i + l] - y[i + l] - between, gap = d < 0 ? d : -d;
                float part = d < 0 ? 1 - beta : beta;
                float of_larger = -NAME(log1p)(part * NAME(expm1)(gap));
                float of_smaller = of_larger + gap;
                float one = e[i + l] * over, other = f[i + l] * other_over;
                float of_p = d < 0 ? of_smaller : of_larger, of_q = d < 0 ? of_larger : of_smaller;
                forth[l] += one * of_p, back[l] += other * of_q;
                overlap[l] += one < other || one != one ? one : other;
                x[i + l] = of_p, e[i + l] = one, f[i + l] = other;
            }
        all.forth += LIST(total)(forth), all.back += LIST(total)(back);
        all.overlap += LIST(total)(overlap);
    }
    return all;
}

/* slope = p (weight d + s) - other q of the entries that count. */
static void LIST(list_slopes)(struct model p, struct model q, struct list_slope by,
                              const uint8_t *restrict present, int64_t n, float *restrict slope)
{
    const float *restrict d = p.x, *restrict one = p.e, *restrict other = q.e;
    float weight = (float)by.weight, shift = (float)by.shift, other_weight = (float)by.other;
    for (int64_t i = 0; i < n; i++) {
        float found = one[i] * (weight * d[i] + shift) - other_weight * other[i];
        slope[i] = present[i] ? found : 0.0f;
    }
}

/* sum of exp(x) of the entries that count */
static double LIST(listed_mass)(const float *restrict x, const uint8_t *restrict present, int64_t n)
{
    double total = 0;
    for (int64_t at = 0; at < n; at += WIDTH) {
        float lane[WIDTH] = {0};
        int64_t count = n - at < WIDTH ? n - at : WIDTH;
        for (int64_t l = 0; l < count; l++)
            lane[l] = present[at + l] ? NAME(exp_any)(x[at + l]) : 0.0f;
        total += LIST(total)(lane);
    }
    return total;
}

static void LIST(topk_row)(const struct topk *job, int64_t row, struct model p, struct model q)
{
    int64_t n = job->words, at = row * n, whole = (n + WIDTH - 1) / WIDTH * WIDTH, some = 0;
    const uint8_t *present = job->present + at;
    for (int64_t i = 0; i < n; i++)
        some |= present[i];
    LIST(take)(job->scores + at, present, n, whole, p.x);
    LIST(take)(job->teacher + at, present, n, whole, q.x);
    LIST(read_model)(&p, whole, job->support, some);
    LIST(read_model)(&q, whole, job->support, some);
    double student_mass = 0, teacher_mass = exp(q.mass.shift) * q.mass.sum;
    if (job->log_probs == job->scores && job->support != RENORMALIZED)
        student_mass = p.mass.sum;
    else if (job->log_probs)
        student_mass = LIST(listed_mass)(job->log_probs + at, present, n);
    struct list_loss found;
    if (job->direction == JSD) {
        float between = (float)(p.log_total - q.log_total);
        found = list_jsd(job, p, q, LIST(jsd_sums)(p, q, whole, between, (float)job->beta));
    } else {
        found = list_kl(job, p, q, LIST(kl_sums)(p, q, whole));
    }
    LIST(list_slopes)(p, q, found.slope, present, n, job->slope + at);
    float *out = job->out + row;
    out[0] = (float)found.loss, out[job->rows] = (float)student_mass;
    out[2 * job->rows] = (float)teacher_mass, out[3 * job->rows] = (float)found.overlap;
}

static int64_t LIST(topk_rows)(const void *given, int64_t first, int64_t last)
{
    const struct topk *job = given;
    int64_t whole = (job->words + WIDTH - 1) / WIDTH * WIDTH;
    float *room = malloc(4 * (size_t)whole * sizeof *room + 1);
    struct model p = {.x = room, .e = room + whole};
    struct model q = {.x = room + 2 * whole, .e = room + 3 * whole};
    if (!room)
        return NO_MEMORY;
    for (int64_t row = first; row < last; row++) {
        if (job->valid[row]) {
            LIST(topk_row)(job, row, p, q);
            continue;
        }
        memset(job->slope + row * job->words, 0, (size_t)job->words * sizeof(float));
        for (int64_t i = 0; i < 4; i++)
            job->out[i * job->rows + row] = 0;
    }
    free(room);
    return 0;
}
