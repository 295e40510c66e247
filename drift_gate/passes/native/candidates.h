/* The K words of a row with the largest logits, of equal ones those with the smallest ids. While
the row is read there are some words more, as numbers that order words as the list does; when their
room is full the K largest stay. Words of logit -inf or NaN are none of them. */

struct candidates {
    uint64_t *ranks; /* [room + LANES] */
    int64_t count, most, room;
    float border; /* what a word must lie above */
};

/* A word as a number: the larger, the further to the front of a list. */
static uint64_t rank_of(float logit, int64_t word)
{
    uint32_t u;
    logit = logit == 0 ? 0 : logit; /* -0 and 0 are equal */
    memcpy(&u, &logit, sizeof u);
    u = u >> 31 ? ~u : u | 0x80000000u;
    return (uint64_t)u << 32 | (uint32_t)~(uint32_t)word;
}

static float logit_of(uint64_t rank)
{
    uint32_t u = (uint32_t)(rank >> 32);
    float logit;
    u = u >> 31 ? u & 0x7fffffffu : ~u;
    memcpy(&logit, &u, sizeof u);
    return logit;
}

static int room_for_candidates(int64_t most, int64_t vocab, struct candidates *all)
{
    int64_t room = most < 64 ? 256 : most < vocab / 4 ? 4 * most : vocab;
    *all = (struct candidates){malloc((size_t)(room + LANES) * sizeof(uint64_t)), 0, most, room, 0};
    return all->ranks != NULL;
}

/* The `most` largest ranks to the front (Hoare's selection), and the border to the last of them. */
static void keep_most(struct candidates *all)
{
    uint64_t *x = all->ranks, seed = 1;
    int64_t low = 0, high = all->count - 1, last = all->most - 1;
    while (low < high) {
        seed = seed * 6364136223846793005u + 1442695040888963407u;
        uint64_t pivot = x[low + (int64_t)((seed >> 33) % (uint64_t)(high - low + 1))];
        int64_t i = low, j = high;
        while (i <= j) {
            while (x[i] > pivot)
                i++;
            while (x[j] < pivot)
                j--;
            if (i <= j) {
                uint64_t swapped = x[i];
                x[i++] = x[j], x[j--] = swapped;
            }
        }
        if (last <= j)
            high = j;
        else if (last >= i)
            low = i;
        else
            break;
    }
    all->count = all->most, all->border = logit_of(x[last]);
}

static int compare_ranks(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return (x < y) - (x > y);
}

/* The list of a row, its entries without a word at the end. */
static void put_list(struct candidates *all, int64_t *ids, float *logits)
{
    if (all->count > all->most)
        keep_most(all);
    qsort(all->ranks, (size_t)all->count, sizeof *all->ranks, compare_ranks);
    for (int64_t k = 0; k < all->count; k++) {
        ids[k] = (uint32_t)~(uint32_t)all->ranks[k];
        logits[k] = logit_of(all->ranks[k]);
    }
    for (int64_t k = all->count; k < all->most; k++)
        logits[k] = -INFINITY, ids[k] = -1;
}
