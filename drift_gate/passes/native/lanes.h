/* Over the lanes of a tile, in the names that LIST gives; WIDTH lanes, 64 or 32. HALVES makes each
half's loop one of its own, of a length that the compiler knows. */

#ifndef HALVES
#define HALVES(FOLD) \
    if (WIDTH > 32) { \
        FOLD(32) \
    } \
    FOLD(16) FOLD(8) FOLD(4) FOLD(2) FOLD(1)
#endif

static float LIST(largest)(const float *restrict tile, int64_t n)
{
    float lane[WIDTH];
    for (int64_t l = 0; l < WIDTH; l++)
        lane[l] = -INFINITY;
    for (int64_t i = 0; i < n; i += WIDTH)
        for (int64_t l = 0; l < WIDTH; l++)
            lane[l] = tile[i + l] > lane[l] ? tile[i + l] : lane[l];
#define FOLD(half) \
    for (int64_t l = 0; l < half; l++) \
        lane[l] = lane[half + l] > lane[l] ? lane[half + l] : lane[l];
    HALVES(FOLD)
#undef FOLD
    return lane[0];
}

static double LIST(total)(const float *restrict lane)
{
    double sum[WIDTH];
    for (int64_t l = 0; l < WIDTH; l++)
        sum[l] = lane[l];
#define FOLD(half) \
    for (int64_t l = 0; l < half; l++) \
        sum[l] += sum[half + l];
    HALVES(FOLD)
#undef FOLD
    return sum[0];
}

/* The largest z of a tile; no sums yet. */
static struct mass LIST(empty_mass)(const float *restrict z, int64_t n)
{
    float top = LIST(largest)(z, n);
    return (struct mass){top, top < LOWEST ? LOWEST : top, 0, 0};
}
