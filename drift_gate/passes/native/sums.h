/* Sums over rows in double: how those of tiles are added, and what comes of them. */

struct mass {
    float top;   /* largest z */
    float shift; /* the same, at least LOWEST */
    double sum;  /* of exp(z - shift) */
    double mean; /* sum of exp(z - shift) (z - shift) */
};

struct masses {
    struct mass u, v;
    double moment; /* sum of exp(u - shift) ((u - shift) - (v - shift)) */
    int missing;   /* whether v is -inf where u is not */
};

struct divergence {
    double loss, centre;
    float top, other_top;
    double log_sum, other_log_sum, entropy, other_entropy;
};

/* Of a row's gradient, see divergence.h: other_factor is the teacher's factor, or for the JSD the
ratio of its mass to the student's. */
struct slopes {
    float top, other_top, factor, other_factor, centre;
};

#define NO_MASS {-INFINITY, LOWEST, 0, 0}
#define NO_MASSES {NO_MASS, NO_MASS, 0, 0}

static struct mass shifted(struct mass a, float shift)
{
    if (a.shift == shift || a.sum == 0)
        return (struct mass){a.top, shift, a.sum, a.mean};
    double by = (double)a.shift - shift, factor = exp(by);
    return (struct mass){a.top, shift, factor * a.sum, factor * (a.mean + by * a.sum)};
}

static struct mass sum(struct mass a, struct mass b)
{
    float top = a.top > b.top ? a.top : b.top;
    return (struct mass){top, a.shift, a.sum + b.sum, a.mean + b.mean};
}

static struct mass add(struct mass a, struct mass b)
{
    float shift = a.shift > b.shift ? a.shift : b.shift;
    return sum(shifted(a, shift), shifted(b, shift));
}

static struct masses both_shifted(struct masses a, float shift, float other_shift)
{
    double by = (double)a.u.shift - shift, other_by = (double)a.v.shift - other_shift;
    double moment = a.moment + (by - other_by) * a.u.sum;
    if (by != 0 && a.u.sum != 0)
        moment *= exp(by);
    return (struct masses){shifted(a.u, shift), shifted(a.v, other_shift), moment, a.missing};
}

static struct masses add_both(struct masses a, struct masses b)
{
    float shift = a.u.shift > b.u.shift ? a.u.shift : b.u.shift;
    float other_shift = a.v.shift > b.v.shift ? a.v.shift : b.v.shift;
    a = both_shifted(a, shift, other_shift), b = both_shifted(b, shift, other_shift);
    return (struct masses){sum(a.u, b.u), sum(a.v, b.v), a.moment + b.moment,
                           a.missing | b.missing};
}

static double log_sum_of(struct mass a)
{
    return a.top == -INFINITY ? NAN : log(a.sum);
}

struct statistics {
    float maximum, log_sum, entropy; /* log_sum of exp(z - maximum) */
};

static struct statistics statistics_of(struct mass all)
{
    int nan = all.sum != all.sum && all.top != INFINITY, none = all.top == -INFINITY;
    double log_sum = log_sum_of(all);
    return (struct statistics){nan ? NAN : all.top, none ? -INFINITY : (float)log_sum,
                               (float)(log_sum - all.mean / all.sum)};
}

static struct divergence divergence_of(struct mass u, struct mass v, double loss, double centre)
{
    double log_sum = log_sum_of(u), other_log_sum = log_sum_of(v);
    double entropy = log_sum - u.mean / u.sum, other_entropy = other_log_sum - v.mean / v.sum;
    return (struct divergence){loss, centre, u.top, v.top, log_sum, other_log_sum, entropy,
                               other_entropy};
}

/* KL(u || v). */
static struct divergence kl_of(struct masses all)
{
    double loss = all.moment / all.u.sum - log_sum_of(all.u) + log_sum_of(all.v);
    if (all.missing && loss == loss)
        loss = INFINITY;
    return divergence_of(all.u, all.v, loss, loss);
}

/* exp(u) to exp(v), summed over a row: the same bits in the forward and in the gradient. */
static float mass_ratio(float log_sum, float other_log_sum)
{
    return (float)exp((double)log_sum - other_log_sum);
}

/* The generalised JSD, from sum exp(u) (u - log m) and the same of v, with the mixture m of the
masses exp(u) and ratio * exp(v). Of its rounded ratio: the loss has its minimum there, and hardly
feels the rounding, if only the mixture sums to 1. The centre is KL(p || m) without the correction
for that, which the terms that it is taken from lack, too: where one word has all the mass they
cancel. */
static struct divergence jsd_of(struct mass u, struct mass v, float ratio, double beta,
                                double moment, double other_moment)
{
    double log_mixed = log((1 - beta) * u.sum + beta * (ratio * v.sum));
    double centre = moment / u.sum, other_centre = other_moment / v.sum;
    double divergence = centre - log_sum_of(u) + log_mixed;
    double other_divergence = other_centre - log_sum_of(v) + log_mixed;
    return divergence_of(u, v, (1 - beta) * divergence + beta * other_divergence, centre);
}

static struct divergence swapped(struct divergence a)
{
    return (struct divergence){a.loss, a.centre, a.other_top, a.top, a.other_log_sum, a.log_sum,
                               a.other_entropy, a.entropy};
}

/* A row of the statistics [5, N] from which the gradient is taken. */
static void put_statistics(struct divergence found, float *out, int64_t stride)
{
    out[0] = found.top;
    out[stride] = (float)found.log_sum;
    out[2 * stride] = found.other_top;
    out[3 * stride] = (float)found.other_log_sum;
    out[4 * stride] = (float)found.centre;
}

static struct slopes slopes_of(const float *data, int64_t stride, double weight, int64_t direction,
                               double beta)
{
    float top = data[0], log_sum = data[stride];
    float other_top = data[2 * stride], other_log_sum = data[3 * stride];
    double centre = data[4 * stride];
    double factor = exp(-(double)log_sum) * weight;
    double other_factor = exp(-(double)other_log_sum) * weight;
    if (direction == REVERSE) /* log p - log q - L = (a - b) - centre */
        centre += (double)log_sum - other_log_sum;
    if (direction == JSD)
        factor *= 1 - beta, other_factor = mass_ratio(log_sum, other_log_sum);
    return (struct slopes){top, other_top, (float)factor, (float)other_factor, (float)centre};
}
