/* A position's loss: a function of its log-prob. */

struct position {
    double loss, slope; /* d loss / d log-prob, or in a loss that is given 1 */
    int clipped;
};

/* x within bounds; NaN stays. */
static double clamped(double x, double low, double high)
{
    return x < low ? low : x > high ? high : x;
}

/* Surrogates -r A, with PPO's clip and dual clip; or -sg(clip(r)) A log p. */
static struct position ratio_loss(const struct position_rule *rule, double now, double advantage,
                                  double log_ratio)
{
    double ratio = exp(clamped(log_ratio, -20, 20));
    double within = clamped(ratio, 1 - rule->low, 1 + rule->high);
    if (rule->estimator == CISPO)
        return (struct position){-within * advantage * now, -within * advantage,
                                 within < ratio || within > ratio}; /* a NaN is not clipped */
    double loss = -advantage * ratio, slope = fabs(log_ratio) > 20 ? 0 : loss;
    if (rule->estimator == IMPORTANCE)
        return (struct position){loss, slope, 0};
    double held = -advantage * within, ceiling = -advantage * rule->dual;
    int clipped = held > loss;
    loss = larger(loss, held);
    int dual = advantage < 0 && loss > ceiling;
    return (struct position){dual ? ceiling : loss, clipped || dual ? 0 : slope, clipped};
}

/* k1, k2, k3 of the reverse KL (Schulman 2020), k3 with verl's clamps. */
static struct position divergence_loss(const struct position_rule *rule, double log_ratio)
{
    if (rule->estimator == K1)
        return (struct position){log_ratio, 1, 0};
    if (rule->estimator == K2)
        return (struct position){0.5 * log_ratio * log_ratio, log_ratio, 0};
    double x = rule->clamp ? clamped(-log_ratio, -20, 20) : -log_ratio;
    double growth = expm1(x), loss = growth - x;
    if (!rule->clamp)
        return (struct position){loss, -growth, 0};
    int flat = fabs(log_ratio) > 20 || loss > 10;
    return (struct position){loss > 10 ? 10 : loss, flat ? 0 : -growth, 0};
}

static struct position position_of(const struct position_rule *rule, double now, double old,
                                   double target, double log_ratio)
{
    double advantage = target;
    switch (rule->estimator) {
    case K1:
    case K2:
    case K3:
        return divergence_loss(rule, now - target);
    case GIVEN_LOSS:
        return (struct position){target, 1, 0};
    }
    if (rule->advantage == FROM_OLD)
        advantage = target - old;
    if (rule->advantage == FROM_CURRENT)
        advantage = target - now;
    advantage = clamped(advantage, rule->advantage_low, rule->advantage_high);
    return ratio_loss(rule, now, advantage, log_ratio);
}
