/* The gradient of statistics and of listed words. */

/* alpha + gamma log p; where p is 0 the product with it is to be 0. */
INLINE float NAME(slope)(float log_p, float alpha, float gamma)
{
    return alpha + gamma * (log_p < -1e4f ? -1e4f : log_p);
}

/* scale * (alpha + gamma log p) * p of a row, p its softmax. */
static void NAME(entropy_row)(const struct expand *job, int64_t row)
{
    float tile[TILE], top = job->maximum[row], log_sum = job->log_sum[row];
    float alpha = job->alpha[row], gamma = job->gamma[row];
    float factor = (float)(exp(-(double)log_sum) * job->scale);
    for (int64_t at = 0; at < job->vocab; at += TILE) {
        int64_t n = job->vocab - at < TILE ? job->vocab - at : TILE;
        int64_t whole = NAME(load)(job->logits, row, at, n, (float)job->scale, tile);
        for (int64_t i = 0; i < whole; i++) {
            float z = tile[i] - top;
            tile[i] = NAME(exp)(z) * factor * NAME(slope)(z - log_sum, alpha, gamma);
        }
        NAME(store)(job->out, row, at, n, tile);
    }
}

/* scale * alpha * softmax(z) of a row. */
static void NAME(softmax_row)(const struct expand *job, int64_t row)
{
    if (job->gamma) {
        NAME(entropy_row)(job, row);
        return;
    }
    float tile[TILE], top = job->maximum[row];
    float factor = (float)(exp(-(double)job->log_sum[row]) * job->alpha[row] * job->scale);
    for (int64_t at = 0; at < job->vocab; at += TILE) {
        int64_t n = job->vocab - at < TILE ? job->vocab - at : TILE;
        int64_t whole = NAME(load)(job->logits, row, at, n, (float)job->scale, tile);
        for (int64_t i = 0; i < whole; i++)
            tile[i] = NAME(exp)(tile[i] - top) * factor;
        NAME(store)(job->out, row, at, n, tile);
    }
}

/* scale * ((alpha + gamma log p) p + sum of beta) of the row's listed words, from their log-probs
in `value`. */
static void NAME(entry_values)(int64_t words, float of_softmax, float gamma, float scale,
                               const float *restrict sum, float *restrict value)
{
    for (int64_t k = 0; k < words; k++) {
        float log_p = value[k], p = NAME(exp)(log_p);
        float alpha = gamma == 0 ? of_softmax : NAME(slope)(log_p, of_softmax, gamma);
        /* alpha p + beta = alpha (p - 1) + (alpha + beta): near p = 1, expm1 keeps the digits of
        p - 1. */
        float near_one = p > 0.5f ? (float)(alpha * expm1(log_p) + (alpha + sum[k])) : 0;
        value[k] = (alpha == 0 ? sum[k] : p > 0.5f ? near_one : alpha * p + sum[k]) * scale;
    }
}

/* The first entry with the word of entry k, from k on back. */
INLINE int64_t NAME(owner)(struct entries room, struct table found, const void *ids, int64_t wide,
                           int64_t id, int64_t at, int64_t k)
{
    return room.owners ? owner_of(room.owners + id, at + 1, k) : first_entry(found, ids, wide, k);
}

/* scale * beta at the listed words of a row whose alpha is 0; returns whether one is listed again,
which `put_entries` must see to. */
static int NAME(put_betas)(const struct expand *job, int64_t row, struct entries room)
{
    int64_t words = job->words, wide = job->wide, vocab = job->vocab, at = row * words;
    int64_t begin = start(job->out, row), again = 0;
    const void *ids = (const char *)job->ids + at * (wide ? 8 : 4);
    const float *beta = job->beta + at;
    float scale = (float)job->scale;
    struct rows out = job->out;
    struct table found = {0};
    if (words > 1 && !room.owners)
        found = cleared(room.slots, words);
    for (int64_t k = 0; k < words; k++) {
        int64_t id = id_at(ids, wide, k);
        if (id < 0 || id >= vocab)
            continue;
        if (words > 1 && NAME(owner)(room, found, ids, wide, id, at, k) != k)
            again = 1;
        else
            NAME(put_at)(out, begin + id, beta[k] * scale);
    }
    return again != 0;
}

/* Overwrite the listed words of a row, whose logits it does not read: `out` may have their place.
Entries with the same id receive the sum of their betas. */
static void NAME(put_entries)(const struct expand *job, int64_t row, struct entries room)
{
    int64_t words = job->words, at = row * words;
    const void *ids = (const char *)job->ids + at * (job->wide ? 8 : 4);
    struct table found = {0};
    if (words > 1 && !room.owners)
        found = cleared(room.slots, words);
    for (int64_t k = 0; k < words; k++) {
        int64_t id = id_at(ids, job->wide, k), listed = id >= 0 && id < job->vocab, owner = k;
        if (words > 1 && listed)
            owner = NAME(owner)(room, found, ids, job->wide, id, at, k);
        room.sum[k] = job->beta[at + k];
        room.place[k] = listed && owner == k ? id : -1;
        if (owner != k)
            room.sum[owner] += room.sum[k];
    }
    if (job->alpha) {
        float top = job->maximum[row], log_sum = job->log_sum[row];
        float gamma = job->gamma ? job->gamma[row] : 0;
        for (int64_t k = 0; k < words; k++)
            room.value[k] = job->gathered[at + k] - top - log_sum;
        NAME(entry_values)(words, job->alpha[row], gamma, (float)job->scale, room.sum, room.value);
    } else {
        for (int64_t k = 0; k < words; k++)
            room.value[k] = room.sum[k] * (float)job->scale;
    }
    int64_t begin = start(job->out, row);
    for (int64_t k = 0; k < words; k++)
        if (room.place[k] >= 0)
            NAME(put_at)(job->out, begin + room.place[k], room.value[k]);
}

/* Rows whose softmax is not wanted. */
static int NAME(is_blank)(const struct expand *job, int64_t row)
{
    int flat = !job->alpha || (job->alpha[row] == 0 && (!job->gamma || job->gamma[row] == 0));
    return flat || (job->valid && !job->valid[row]);
}

int64_t NAME(expand)(const void *given, int64_t first, int64_t last)
{
    const struct expand *job = given;
    struct entries room;
    if (!room_for(job->words, job->vocab, &room))
        return NO_MEMORY;
    for (int64_t row = first; row < last;) {
        int64_t next = row;
        while (next < last && NAME(is_blank)(job, next))
            next++;
        zero_rows(job->out, row, next, 0, job->vocab);
        if (next == row)
            NAME(softmax_row)(job, next++);
        for (; row < next; row++)
            if (!job->valid || job->valid[row])
                if (job->alpha || NAME(put_betas)(job, row, room))
                    NAME(put_entries)(job, row, room);
    }
    free(room.slots), free(room.owners);
    return 0;
}
