/* The names of options, and their numbers: the places of the names. */

enum direction { REVERSE, FORWARD, JSD, MIXED };
enum over { RENORMALIZED, TRUNCATED, TAIL };
enum granularity { TOKEN, BLOCK, SPAN, SEQUENCE }; /* of a gate, and of a ratio */
enum aggregate { MEAN, MEAN_ABS, RMS, MAX_ABS };
enum normalize { OVER_BATCH, OVER_SEQUENCE, RAW, OFF, GIVEN_WEIGHTS };
enum estimator { PPO, IMPORTANCE, CISPO, K1, K2, K3, GIVEN_LOSS };
enum advantage { FROM_OLD, FROM_CURRENT, GIVEN_ADVANTAGE };
enum denominator { OF_CALLER, OF_TOKENS, OF_SEQUENCES };

#define MOST_CHOICES 8
static const struct choices {
    const char *option, *names[MOST_CHOICES];
} CHOICES[] = {
    {"direction", {"reverse", "forward", "jsd", "mixed"}},
    {"support", {"renormalized", "truncated", "tail"}},
    {"granularity", {"token", "block", "span", "sequence"}},
    {"ratio", {"token", "block", "span", "sequence"}},
    {"aggregate", {"mean", "mean_abs", "rms", "max_abs"}},
    {"normalize", {"batch", "sequence", "none", "off", "given"}},
    {"estimator", {"ppo", "importance", "cispo", "k1", "k2", "k3", "given"}},
    {"advantage", {"old", "current", "given"}},
    {"denominator", {"given", "tokens", "sequences"}},
};

struct gate_rule {
    int64_t granularity, block_size, aggregate, normalize, part;
    double tau;
};

struct position_rule {
    int64_t estimator, advantage, ratio, clamp;
    double low, high, dual, advantage_low, advantage_high, floor;
};

struct reduce_rule {
    int64_t denominator, token_mean;
    double factor;
};

/* The name of an option with this number, or NULL beyond the last and for unknown options. */
const char *drift_gate_choice(const char *option, int64_t number)
{
    for (size_t i = 0; i < sizeof CHOICES / sizeof *CHOICES; i++)
        if (strcmp(CHOICES[i].option, option) == 0)
            return number >= 0 && number < MOST_CHOICES ? CHOICES[i].names[number] : NULL;
    return NULL;
}
