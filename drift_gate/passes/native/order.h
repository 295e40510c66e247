/* The entries of lists in the order of their words. */

struct by_word {
    int64_t entries, vocab;
    const void *ids; /* [entries] */
    int64_t wide;
    int64_t *starts; /* [vocab + 1]: where a word's entries begin; those without a word come last */
    int64_t *order;  /* [entries] */
};

int64_t drift_gate_by_word(const void *given, int64_t first, int64_t last)
{
    const struct by_word *job = given;
    int64_t vocab = job->vocab, *next = calloc((size_t)vocab + 2, sizeof *next);
    (void)first, (void)last;
    if (!next)
        return NO_MEMORY;
    for (int64_t e = 0; e < job->entries; e++) {
        int64_t id = id_at(job->ids, job->wide, e);
        next[id < 0 || id >= vocab ? vocab + 1 : id + 1]++;
    }
    for (int64_t word = 0; word <= vocab; word++)
        next[word + 1] += next[word], job->starts[word] = next[word];
    for (int64_t e = 0; e < job->entries; e++) {
        int64_t id = id_at(job->ids, job->wide, e);
        job->order[next[id < 0 || id >= vocab ? vocab : id]++] = e;
    }
    free(next);
    return 0;
}
