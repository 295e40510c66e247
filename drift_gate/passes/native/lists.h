/* Lists of ids, and which of their entries came before. */

/* ids[at], of int32 or int64 */
static int64_t id_at(const void *ids, int64_t wide, int64_t at)
{
    return wide ? ((const int64_t *)ids)[at] : ((const int32_t *)ids)[at];
}

static void put_id(void *ids, int64_t wide, int64_t at, int64_t id)
{
    if (wide)
        ((int64_t *)ids)[at] = id;
    else
        ((int32_t *)ids)[at] = (int32_t)id;
}

enum { FEW_OWNERS = 4096 }; /* words, whose owners the first level of the cache holds */

/* The first entry of a list with a word: an earlier one, or k itself. `place` is the word's, 0 at
first, and `begin` of each list is beyond all entries of those before: nothing is cleared. */
static int64_t owner_of(int64_t *place, int64_t begin, int64_t k)
{
    if (*place >= begin)
        return *place - begin;
    *place = begin + k;
    return k;
}

/* Entries of a list by their ids, a hash table: each slot holds an entry's number + 1, or 0. */
struct table {
    int32_t *slots;
    int64_t shift; /* of a hash of 64 bits, to the number of a slot */
};

/* Slots for a list of so many entries: two for each, or more. */
static int64_t slots_for(int64_t entries)
{
    int64_t slots = 4;
    while (slots < 2 * entries)
        slots *= 2;
    return slots;
}

static struct table cleared(int32_t *slots, int64_t entries)
{
    int64_t count = slots_for(entries), shift = 64;
    memset(slots, 0, (size_t)count * sizeof *slots);
    for (int64_t left = count; left > 1; left /= 2)
        shift--;
    return (struct table){slots, shift};
}

/* The first entry of the list ids[0 ...] with the id of entry k: an earlier one, or k itself. */
static int64_t first_entry(struct table of, const void *ids, int64_t wide, int64_t k)
{
    int64_t id = id_at(ids, wide, k), last = ((int64_t)1 << (64 - of.shift)) - 1;
    int64_t slot = (int64_t)((uint64_t)id * 0x9e3779b97f4a7c15u >> of.shift);
    for (; of.slots[slot]; slot = (slot + 1) & last)
        if (id_at(ids, wide, of.slots[slot] - 1) == id)
            return of.slots[slot] - 1;
    of.slots[slot] = (int32_t)(k + 1);
    return k;
}
