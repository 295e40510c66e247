/* From sums over a list to its loss, in double: see topk.h. */

struct topk {
    int64_t rows, words;            /* N, K */
    const float *scores;            /* [N, K]: logits where renormalized, else log-probs */
    const float *log_probs;         /* [N, K] for the student's mass, or NULL */
    const float *teacher;           /* [N, K] */
    const uint8_t *present, *valid; /* [N, K], [N] */
    float *out;                     /* [4, N]: loss, masses of student and teacher, overlap */
    float *slope;                   /* [N, K] */
    int64_t direction, support;
    double beta;
};

/* One model's row. x is log p up to a constant, LOWEST where p is 0; e is its exponential. */
struct model {
    float *x, *e;
    struct mass mass;
    double log_total; /* log p = x - log_total */
    double over;      /* p = over * e */
};

struct list_sums {
    double forth, back; /* sum e (x - y), sum f (y - x); of the JSD p log(p / m), q log(q / m) */
    double overlap;     /* sum of the smaller of p and q */
    int lacks, lacked;  /* whether p is 0 where q is not, and the other way round */
};

/* slope = p (weight d + shift) - other q, where d is x - y; of the JSD log(p / m) */
struct list_slope {
    double weight, shift, other;
};

struct list_loss {
    double loss, overlap;
    struct list_slope slope;
};

/* The bucket with the rest of either mass. */
struct tails {
    double p, q, log_p, log_q;
    int held; /* p is: it does not feel the listed words */
};

static struct tails tails_of(struct model p, struct model q)
{
    double rest = 1 - p.mass.sum, other = 1 - q.mass.sum, eps = FLT_EPSILON;
    struct tails found = {rest < eps ? eps : rest, other < eps ? eps : other, 0, 0, rest < eps};
    found.log_p = log(found.p), found.log_q = log(found.q);
    return found;
}

/* inf where a mass meets none; NaN stays. */
static double infinite_if(int lacks, double loss)
{
    return lacks && loss == loss ? INFINITY : loss;
}

/* Reverse and forward KL, and what lies between. */
static struct list_loss list_kl(const struct topk *job, struct model p, struct model q,
                                struct list_sums sums)
{
    double beta = job->direction == REVERSE ? 0 : job->direction == FORWARD ? 1 : job->beta;
    double between = p.log_total - q.log_total, centre = p.over * sums.forth;
    double reverse = centre - between, forward = q.over * sums.back + between;
    double shift = 1, other_shift = 0; /* of the reverse's and the forward's slope */
    reverse = infinite_if(sums.lacked, reverse), forward = infinite_if(sums.lacks, forward);
    if (job->support == RENORMALIZED)
        shift = reverse == INFINITY ? -INFINITY : -centre, other_shift = 1;
    if (job->support == TAIL) {
        struct tails rest = tails_of(p, q);
        reverse += rest.p * (rest.log_p - rest.log_q);
        forward += rest.q * (rest.log_q - rest.log_p);
        sums.overlap += smaller(rest.p, rest.q);
        if (!rest.held)
            shift = rest.log_q - rest.log_p, other_shift = rest.q / rest.p;
    }
    struct list_loss found = {0, sums.overlap, {1 - beta, 0, beta}};
    if (beta != 1)
        found.loss += (1 - beta) * reverse, found.slope.shift += (1 - beta) * shift;
    if (beta != 0)
        found.loss += beta * forward, found.slope.shift += beta * other_shift;
    return found;
}

static struct list_loss list_jsd(const struct topk *job, struct model p, struct model q,
                                 struct list_sums sums)
{
    double beta = job->beta, loss = (1 - beta) * sums.forth + beta * sums.back, shift = 0;
    if (job->support == RENORMALIZED)
        shift = -(1 - beta) * sums.forth;
    if (job->support == TAIL) {
        struct tails rest = tails_of(p, q);
        double log_m = log((1 - beta) * rest.p + beta * rest.q);
        loss += (1 - beta) * rest.p * (rest.log_p - log_m);
        loss += beta * rest.q * (rest.log_q - log_m);
        sums.overlap += smaller(rest.p, rest.q);
        if (!rest.held)
            shift = -(1 - beta) * (rest.log_p - log_m);
    }
    return (struct list_loss){loss, sums.overlap, {1 - beta, shift, 0}};
}
