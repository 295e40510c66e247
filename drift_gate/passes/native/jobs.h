/* What the functions over rows of logits are given. Python packs these structures, see jobs.py: all
members take eight bytes, and pointers may be NULL where that is said. */

struct rows { /* [B, T, V], last dimension contiguous */
    void *data;
    int64_t of_batch, of_row; /* strides in elements */
    int64_t length;           /* T */
    int64_t kind;
};

#define LABELS ((int64_t)1 << 62) /* beyond every entry, in what `scan` returns */

struct scan {
    struct rows logits;
    int64_t vocab;
    double scale;
    const uint8_t *valid; /* [N], or NULL for all */
    const void *ids;      /* [N, K] */
    int64_t wide, words;  /* whether they are int64; K */
    float *gathered, *log_probs; /* [N, K] */
    float *maximum, *log_sum;    /* [N]; maximum NULL: `gathered` alone */
    float *entropy;              /* [N], or NULL */
    const void *labels;          /* [N], or NULL */
    int64_t labels_wide;
    float *of_labels; /* [N]: their log-probs */
};

struct select {
    struct rows logits;
    int64_t vocab;
    double scale;
    const uint8_t *valid; /* [N], or NULL for all */
    int64_t words;        /* K */
    int64_t *ids;         /* [N, K] */
    float *chosen;        /* [N, K]: their logits */
    float *log_sum;       /* [N] */
};

struct expand {
    struct rows logits, out;
    int64_t vocab;
    double scale;
    const uint8_t *valid; /* [N], or NULL for all */
    const void *ids;
    int64_t wide, words;
    const float *maximum, *log_sum, *alpha; /* [N], or NULL: alpha is 0 */
    const float *gathered, *beta;           /* [N, K]; gathered NULL likewise */
    const float *gamma;                     /* [N], or NULL */
};

struct divergences {
    struct rows student, teacher;
    int64_t rows, vocab;
    double scale, teacher_scale, beta;
    int64_t direction;
    const uint8_t *valid;
    const void *labels; /* [N], or NULL */
    int64_t wide;
    float *loss, *log_probs; /* [N] */
    float *statistics;       /* [5, N] */
    float *entropy;          /* [N], or NULL */
};

struct divergence_slopes {
    struct rows student, teacher, out;
    int64_t rows, vocab, all_words; /* words of the teacher, of the student */
    double scale, teacher_scale, beta;
    int64_t direction;
    const uint8_t *valid;
    const float *statistics, *upstream;
};

struct word_sums {
    struct rows hidden, out; /* [1, N, H], [1, V, H] */
    int64_t width, words;    /* H, K */
    const float *slope;      /* [N, K] */
    const int64_t *starts, *order; /* of by_word */
};

static int64_t start(struct rows x, int64_t row)
{
    return row / x.length * x.of_batch + row % x.length * x.of_row;
}

/* Zeros in words from ... to of rows first ... last; rows that touch in one go, which the C library
writes without reading. */
static void zero_rows(struct rows out, int64_t first, int64_t last, int64_t from, int64_t to)
{
    int64_t size = out.kind == FLOAT32 ? 4 : 2, words = to - from;
    for (int64_t row = first; row < last;) {
        int64_t next = row + 1;
        while (next < last && start(out, next) == start(out, next - 1) + words)
            next++;
        memset((char *)out.data + (start(out, row) + from) * size, 0,
               (size_t)((next - row) * words * size));
        row = next;
    }
}

/* Room for a row's listed words. */
struct entries {
    int32_t *slots; /* of a table; the others follow in the same block */
    float *sum, *value;
    int64_t *place;
    int64_t *owners; /* in the place of the table: see `owner_of`; NULL where words are many */
};

static int room_for(int64_t words, int64_t vocab, struct entries *room)
{
    size_t n = (size_t)words, slots = (size_t)slots_for(words);
    int direct = words > 1 && vocab <= FEW_OWNERS;
    room->slots = malloc(slots * sizeof(int32_t) + n * (sizeof(int64_t) + 2 * sizeof(float)));
    room->owners = direct ? calloc((size_t)vocab, sizeof *room->owners) : NULL;
    if (!room->slots || (direct && !room->owners)) {
        free(room->slots), free(room->owners);
        return 0;
    }
    room->place = (int64_t *)(room->slots + slots); /* slots are even in number */
    room->sum = (float *)(room->place + n);
    room->value = room->sum + n;
    return 1;
}
