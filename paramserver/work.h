/* Chunks for a pass, of which any number of threads takes shares at once. */

#ifndef PUSHPULL_WORK_H
#define PUSHPULL_WORK_H

#include <stdint.h>

struct chunk;

struct work {
    const struct chunk *const *chunks;
    int64_t count;
    int64_t next;   /* grains that somebody has taken */
    int64_t found;  /* becomes 1 if a sum is not finite somewhere */
};

#endif
