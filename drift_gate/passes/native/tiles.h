/* Tiles of rows: as float32 they stay in the first level of the cache. Their sums are float32 in 64
lanes; those of a row are double. */

/* scale * row[at : at + n] as float32, and -inf up to whole vectors; returns their number. */
static int64_t NAME(load)(struct rows x, int64_t row, int64_t at, int64_t n, float scale,
                          float *restrict tile)
{
    int64_t first = start(x, row) + at, whole = (n + LANES - 1) / LANES * LANES;
    if (x.kind == BFLOAT16) {
        const uint16_t *from = (const uint16_t *)x.data + first;
        for (int64_t i = 0; i < n; i++)
            tile[i] = NAME(from_bits)((uint32_t)from[i] << 16) * scale;
    } else if (x.kind == FLOAT16) {
        const uint16_t *from = (const uint16_t *)x.data + first;
        for (int64_t i = 0; i < n; i++)
            tile[i] = NAME(from_half)(from[i]) * scale;
    } else {
        const float *from = (const float *)x.data + first;
        for (int64_t i = 0; i < n; i++)
            tile[i] = from[i] * scale;
    }
    for (int64_t i = n; i < whole; i++)
        tile[i] = -INFINITY;
    return whole;
}

static void NAME(store)(struct rows out, int64_t row, int64_t at, int64_t n,
                        const float *restrict tile)
{
    int64_t first = start(out, row) + at;
    if (out.kind == BFLOAT16) {
        uint16_t *to = (uint16_t *)out.data + first;
        for (int64_t i = 0; i < n; i++)
            to[i] = NAME(to_brain)(tile[i]);
    } else if (out.kind == FLOAT16) {
        uint16_t *to = (uint16_t *)out.data + first;
        for (int64_t i = 0; i < n; i++)
            to[i] = NAME(to_half)(tile[i]);
    } else {
        memcpy((float *)out.data + first, tile, (size_t)n * sizeof(float));
    }
}

/* scale * x[at] */
INLINE float NAME(word_at)(struct rows x, int64_t at, float scale)
{
    if (x.kind == BFLOAT16)
        return NAME(from_bits)((uint32_t)((const uint16_t *)x.data)[at] << 16) * scale;
    if (x.kind == FLOAT16)
        return NAME(from_half)(((const uint16_t *)x.data)[at]) * scale;
    return ((const float *)x.data)[at] * scale;
}

/* scale * row[word], rounded: no compiler makes one operation of the product and what follows. */
static APART float NAME(word)(struct rows x, int64_t row, int64_t word, float scale)
{
    return NAME(word_at)(x, start(x, row) + word, scale);
}

INLINE void NAME(put_at)(struct rows out, int64_t at, float value)
{
    if (out.kind == BFLOAT16)
        ((uint16_t *)out.data)[at] = NAME(to_brain)(value);
    else if (out.kind == FLOAT16)
        ((uint16_t *)out.data)[at] = NAME(to_half)(value);
    else
        ((float *)out.data)[at] = value;
}

/* z less its largest, at least LOWEST: -inf times a mass of 0 is then 0. NaN stays. */
INLINE float NAME(centred)(float z, float top)
{
    float x = z - top;
    return x < LOWEST ? LOWEST : x;
}

/* sum exp(z - shift) (z - shift) */
static double NAME(tile_mean)(const float *restrict z, int64_t n, float shift)
{
    float lane[LANES] = {0};
    for (int64_t i = 0; i < n; i += LANES)
        for (int64_t l = 0; l < LANES; l++) {
            float x = NAME(centred)(z[i + l], shift);
            lane[l] += NAME(exp)(x) * x;
        }
    return NAME(total)(lane);
}

static struct mass NAME(tile_mass)(const float *restrict z, int64_t n, int64_t with_mean)
{
    float lane[LANES] = {0};
    struct mass found = NAME(empty_mass)(z, n);
    float shift = found.shift;
    for (int64_t i = 0; i < n; i += LANES)
        for (int64_t l = 0; l < LANES; l++)
            lane[l] += NAME(exp)(z[i + l] - shift);
    found.sum = NAME(total)(lane);
    if (with_mean)
        found.mean = NAME(tile_mean)(z, n, shift);
    return found;
}

static struct mass NAME(row_mass)(struct rows x, int64_t row, int64_t vocab, float scale,
                                  int64_t with_mean)
{
    float tile[TILE];
    struct mass all = NO_MASS;
    for (int64_t at = 0; at < vocab; at += TILE) {
        int64_t n = vocab - at < TILE ? vocab - at : TILE;
        n = NAME(load)(x, row, at, n, scale, tile);
        all = add(all, NAME(tile_mass)(tile, n, with_mean));
    }
    return all;
}
