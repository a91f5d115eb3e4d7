/* How threads share a pass: included behind `struct chunk` and `pass`, which gives what is not 0 if the sum is not finite
   somewhere in elements lo to hi of a chunk. */

#include "work.h"

enum { GRAIN = 1 << 14 };

/* Take the next GRAIN elements as long as there are any. */
void pushpull_work(struct work *w)
{
    int64_t at = 0, before = 0; /* the chunk of the grain taken last, and the grains of those before it */
    for (;;) {
        const int64_t grain = __atomic_fetch_add(&w->next, 1, __ATOMIC_RELAXED);
        for (int64_t here; at < w->count; at++, before += here) {
            here = (w->chunks[at]->sum.length + GRAIN - 1) / GRAIN;
            if (grain < before + here)
                break;
        }
        if (at == w->count)
            return;
        const struct chunk *c = w->chunks[at];
        const size_t length = (size_t)c->sum.length, lo = (size_t)(grain - before) * GRAIN;
        if (pass(c, lo, length - lo < GRAIN ? length : lo + GRAIN))
            __atomic_store_n(&w->found, 1, __ATOMIC_RELAXED);
    }
}
