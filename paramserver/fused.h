/* What the fused passes share: a chunk's contributions, their sum along the tree, and writing past the caches.

   Everything goes through blocks that stay in the nearest cache, so that each vector is read or written once. */

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX__)
#include <immintrin.h>
#endif

enum { BLOCK = 64, AHEAD = 256, LINE = 16 }; /* and REGISTERS, with which this is compiled */

#define ALIGNED __attribute__((aligned(64)))

struct sum {
    int64_t length;
    int64_t num_pushed;
    const float *const *pushed;   /* contributions */
    int64_t num_additions;
    const int32_t *additions;     /* (left, right, target) each; registers begin with the contributions */
    float divisor;
    int32_t streaming;            /* whether what is written goes past the caches */
};

/* Ask for the block that is AHEAD of this one. Processors do so by themselves, but begin anew at each page, and there are
   many vectors. */
static inline __attribute__((always_inline)) void ask_for(const float *block)
{
    const uintptr_t wanted = (uintptr_t)block + AHEAD * sizeof *block; /* may be behind the end, which is no fault */
    for (size_t i = 0; i < BLOCK; i += LINE)
        __builtin_prefetch((const void *)(wanted + i * sizeof *block));
}

/* Elements lo to lo + n of the sum are left[i] + right[i], or left[i] if right is NULL: the last addition is left to
   the update's loop. */
static inline __attribute__((always_inline)) void add_up(
    const struct sum *s, size_t lo, size_t n, float registers[REGISTERS][BLOCK], const float **left,
    const float **right)
{
    for (int64_t v = 0; v < s->num_pushed; v++)
        ask_for(s->pushed[v] + lo);
    *left = s->pushed[0] + lo;
    *right = NULL;
    for (int64_t a = 0; a < s->num_additions; a++) {
        const int32_t *at = s->additions + 3 * a;
        const float *one = at[0] < s->num_pushed ? s->pushed[at[0]] + lo : registers[at[0] - s->num_pushed];
        const float *other = at[1] < s->num_pushed ? s->pushed[at[1]] + lo : registers[at[1] - s->num_pushed];
        *left = one;
        *right = other;
        if (a + 1 == s->num_additions)
            break;
        float *target = registers[at[2] - s->num_pushed];
        for (size_t i = 0; i < n; i++)
            target[i] = one[i] + other[i];
    }
}

static void put(float *to, const float *from, size_t n, int streaming)
{
    size_t i = 0;
#if defined(__AVX__)
    if (streaming && ((uintptr_t)to & 31) == 0)
        for (; i + 8 <= n; i += 8)
            _mm256_stream_ps(to + i, _mm256_load_ps(from + i));
#endif
    for (; i < n; i++)
        to[i] = from[i];
}

/* Whoever is told of the chunk now must see it. */
static void settle(int streaming)
{
#if defined(__AVX__)
    if (streaming)
        _mm_sfence();
#endif
}

static uint32_t not_finite(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return (bits & 0x7f800000u) == 0x7f800000u;
}
