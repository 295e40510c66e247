/* Sums over the entries of a word: the gradient of a head whose rows list words. */

/* The entries of each word hidden_n * slope_nk, in the order of `order`, summed in float32. */
static void NAME(word_row)(const struct word_sums *job, int64_t word)
{
    float sum[TILE], tile[TILE];
    for (int64_t at = 0; at < job->width; at += TILE) {
        int64_t n = job->width - at < TILE ? job->width - at : TILE;
        memset(sum, 0, (size_t)n * sizeof *sum);
        for (int64_t e = job->starts[word]; e < job->starts[word + 1]; e++) {
            int64_t entry = job->order[e];
            NAME(load)(job->hidden, entry / job->words, at, n, job->slope[entry], tile);
            for (int64_t i = 0; i < n; i++)
                sum[i] += tile[i];
        }
        NAME(store)(job->out, word, at, n, sum);
    }
}

int64_t NAME(sum_words)(const void *given, int64_t first, int64_t last)
{
    const struct word_sums *job = given;
    for (int64_t word = first; word < last;) {
        int64_t next = word;
        while (next < last && job->starts[next] == job->starts[next + 1])
            next++;
        zero_rows(job->out, word, next, 0, job->width);
        if (next < last)
            NAME(word_row)(job, next++);
        word = next;
    }
    return 0;
}
