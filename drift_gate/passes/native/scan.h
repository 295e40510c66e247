/* Statistics of rows, and their listed words. */

/* z[ids] of a row; returns the entry + 1 of the first id outside the vocabulary, or 0; for a label
LABELS and its row + 1. Products with the scale are rounded, as nothing else is done here. */
static APART int64_t NAME(gather_row)(const struct scan *job, int64_t row)
{
    int64_t begin = start(job->logits, row);
    for (int64_t k = 0; k < job->words; k++) {
        int64_t at = row * job->words + k, id = id_at(job->ids, job->wide, at);
        if (id < 0 || id >= job->vocab)
            return at + 1;
        job->gathered[at] = NAME(word_at)(job->logits, begin + id, (float)job->scale);
    }
    if (job->labels) {
        int64_t label = id_at(job->labels, job->labels_wide, row);
        if (label < 0 || label >= job->vocab)
            return LABELS + row + 1;
        job->of_labels[row] = NAME(word_at)(job->logits, begin + label, (float)job->scale);
    }
    return 0;
}

static void NAME(scan_row)(const struct scan *job, int64_t row)
{
    struct mass all = NAME(row_mass)(job->logits, row, job->vocab, (float)job->scale,
                                     job->entropy != NULL);
    struct statistics found = statistics_of(all);
    job->maximum[row] = found.maximum, job->log_sum[row] = found.log_sum;
    if (job->entropy)
        job->entropy[row] = found.entropy;
    const float *from = job->gathered + row * job->words;
    float *to = job->log_probs + row * job->words;
    for (int64_t k = 0; k < job->words; k++)
        to[k] = from[k] - found.maximum - found.log_sum;
    if (job->labels)
        job->of_labels[row] = job->of_labels[row] - found.maximum - found.log_sum;
}

int64_t NAME(scan)(const void *given, int64_t first, int64_t last)
{
    const struct scan *job = given;
    size_t size = (size_t)job->words * sizeof(float);
    for (int64_t row = first; row < last; row++) {
        if (job->valid && !job->valid[row]) {
            memset(job->gathered + row * job->words, 0, size);
            if (job->maximum) {
                memset(job->log_probs + row * job->words, 0, size);
                job->maximum[row] = job->log_sum[row] = 0;
            }
            if (job->entropy)
                job->entropy[row] = 0;
            if (job->labels)
                job->of_labels[row] = 0;
            continue;
        }
        int64_t bad = NAME(gather_row)(job, row);
        if (bad)
            return bad;
        if (job->maximum)
            NAME(scan_row)(job, row);
    }
    return 0;
}
