/* The words of rows that have the largest logits, and the sums of the rows, in one read. */

/* Words at, at + 1, ... of a tile, which is -inf up to whole vectors. A later word of the border's
logit is no better than those there. */
static void NAME(take_words)(struct candidates *all, const float *restrict tile, int64_t at,
                             int64_t n)
{
    for (int64_t i = 0; i < n; i += LANES) {
        float border = all->border;
        int32_t any = 0, found = 0, lane[LANES];
        for (int64_t l = 0; l < LANES; l++)
            any |= tile[i + l] > border;
        if (!any)
            continue;
        if (all->count > all->room) {
            keep_most(all);
            border = all->border;
        }
        for (int32_t l = 0; l < LANES; l++) {
            lane[found] = l;
            found += tile[i + l] > border;
        }
        for (int32_t f = 0; f < found; f++)
            all->ranks[all->count++] = rank_of(tile[i + lane[f]], at + i + lane[f]);
    }
}

int64_t NAME(select)(const void *given, int64_t first, int64_t last)
{
    const struct select *job = given;
    float tile[TILE], scale = (float)job->scale;
    struct candidates all;
    if (!room_for_candidates(job->words, job->vocab, &all))
        return NO_MEMORY;
    for (int64_t row = first; row < last; row++) {
        struct mass mass = NO_MASS;
        int64_t read = job->valid && !job->valid[row] ? 0 : job->vocab;
        all.count = 0, all.border = -INFINITY;
        for (int64_t at = 0; at < read; at += TILE) {
            int64_t n = read - at < TILE ? read - at : TILE;
            n = NAME(load)(job->logits, row, at, n, 1, tile);
            NAME(take_words)(&all, tile, at, n);
            for (int64_t i = 0; i < n; i++)
                tile[i] *= scale;
            mass = add(mass, NAME(tile_mass)(tile, n, 0));
        }
        put_list(&all, job->ids + row * job->words, job->chosen + row * job->words);
        struct statistics found = statistics_of(mass);
        int nan = found.maximum != found.maximum; /* beside words that are all -inf, too */
        job->log_sum[row] = !read ? 0 : nan ? NAN : found.log_sum;
    }
    free(all.ranks);
    return 0;
}
