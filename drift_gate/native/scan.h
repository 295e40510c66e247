/* Statistics of rows, and their softmax. */

void NAME(scan)(int64_t first, int64_t last, int64_t vocab, struct rows x, float scale,
                int64_t with_entropy, float *out, int64_t stride)
{
    for (int64_t row = first; row < last; row++)
        put_statistics(NAME(row_mass)(x, row, vocab, scale, with_entropy), out + row, stride);
}

void NAME(softmax)(int64_t first, int64_t last, int64_t vocab, struct rows x, struct rows out,
                   float scale, const float *row_data, int64_t stride)
{
    float tile[TILE];
    for (int64_t row = first; row < last; row++) {
        float top = row_data[row], factor = row_data[stride + row];
        for (int64_t at = 0; at < vocab; at += TILE) {
            int64_t n = vocab - at < TILE ? vocab - at : TILE;
            int64_t whole = NAME(load)(x, row, at, n, scale, tile);
            for (int64_t i = 0; i < whole; i++)
                tile[i] = NAME(exp)(tile[i] - top) * factor;
            NAME(store)(out, row, at, n, tile);
        }
    }
}
