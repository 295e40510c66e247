/* The teacher's lists: which of their entries count. */

struct support {
    int64_t vocab, words; /* words: K */
    const void *ids;      /* [N, K]; -1 where missing */
    int64_t wide;
    const float *teacher; /* [N, K] log-probs, -inf where missing */
    const uint8_t *valid; /* [N] */
    int64_t check, check_twice;
    void *listed;                 /* [N, K]: ids of the entries present, else 0 */
    uint8_t *present, *supported; /* [N, K], [N] */
    _Atomic int64_t *counts;      /* valid rows without support, entries listed again in others */
    _Atomic int64_t *twice;       /* the first row with an entry listed again */
};

/* The smaller of the two stays, whichever thread comes first. */
static void keep_smaller(_Atomic int64_t *place, int64_t value)
{
    int64_t found = atomic_load(place);
    while (value < found && !atomic_compare_exchange_weak(place, &found, value))
        continue;
}

/* Returns the entry + 1 of the first id of a valid row outside the vocabulary, or 0. `seen` has a
bit for each word, all 0 before and after; where words are few `owners` serve, see `owner_of`. */
static int64_t support_row(const struct support *job, int64_t row, uint64_t *seen, int64_t *owners,
                           int64_t counts[2])
{
    int64_t words = job->words, wide = job->wide, vocab = job->vocab, at = row * words;
    int64_t found = 0, again = 0, bad = 0, k = 0;
    const void *ids = job->ids;
    const float *teacher = job->teacher + at;
    uint8_t *present = job->present + at;
    void *listed = job->listed;
    for (; k < words && !bad; k++) {
        int64_t id = id_at(ids, wide, at + k);
        int here = id != -1 && teacher[k] != -INFINITY;
        if (here && id >= 0 && id < vocab) {
            if (owners) {
                here = owner_of(owners + id, at + 1, k) == k;
            } else {
                uint64_t bit = (uint64_t)1 << (id & 63);
                here = !(seen[id >> 6] & bit);
                seen[id >> 6] |= bit;
            }
            again += !here;
        } else if (here && job->check) {
            bad = at + k + 1;
        }
        present[k] = (uint8_t)here;
        put_id(listed, wide, at + k, here ? id : 0);
        found += here;
    }
    while (!owners && k-- > 0) {
        int64_t id = id_at(ids, wide, at + k);
        if (id >= 0 && id < vocab)
            seen[id >> 6] = 0;
    }
    job->supported[row] = found > 0;
    counts[0] += found == 0, counts[1] += again;
    if (again && job->check_twice)
        keep_smaller(job->twice, row);
    return bad;
}

int64_t drift_gate_support(const void *given, int64_t first, int64_t last)
{
    const struct support *job = given;
    int64_t counts[2] = {0, 0}, bad = 0;
    int few = job->vocab <= FEW_OWNERS;
    void *room = calloc((size_t)(few ? job->vocab : job->vocab / 64 + 1), sizeof(int64_t));
    uint64_t *seen = few ? NULL : room;
    int64_t *owners = few ? room : NULL;
    if (!room)
        return NO_MEMORY;
    for (int64_t row = first; row < last && !bad; row++)
        if (job->valid[row]) {
            bad = support_row(job, row, seen, owners, counts);
        } else {
            size_t size = (size_t)job->words, width = job->wide ? 8 : 4;
            memset(job->present + row * job->words, 0, size);
            memset((char *)job->listed + row * job->words * (int64_t)width, 0, size * width);
            job->supported[row] = 0;
        }
    free(room);
    atomic_fetch_add(&job->counts[0], counts[0]);
    atomic_fetch_add(&job->counts[1], counts[1]);
    return bad;
}
