/* Sum along the tree, mean and SGD of one chunk in one pass over memory; fused_sgd.py says what the bits are.

   Everything goes through blocks that stay in the nearest cache, so that each vector is read or written once. */

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX__)
#include <immintrin.h>
#endif

enum { BLOCK = 64, REGISTERS = 32 };

struct chunk {
    int64_t length;
    int64_t num_pushed;
    const float *const *pushed;   /* contributions */
    int64_t num_additions;
    const int32_t *additions;     /* (left, right, target) each; registers begin with the contributions */
    const float *old;             /* parameters that are read */
    float *new;                   /* parameters that are written; may be old */
    const float *momentum_old;    /* NULL: there is none yet */
    float *momentum_new;          /* NULL: without momentum */
    float divisor, weight_decay, momentum, step;
    int32_t nesterov;
    int32_t streaming;            /* whether what is written goes past the caches */
};

static void write(float *to, const float *from, size_t n, int streaming)
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

static uint32_t not_finite(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return (bits & 0x7f800000u) == 0x7f800000u;
}

/* The formulas of torch/optim/sgd.py _single_tensor_sgd. This is the usual case in one loop; with constant flags each
   call becomes one without branches. */
static inline __attribute__((always_inline)) uint32_t move(
    const struct chunk *c, const float *left, const float *right, size_t lo, size_t n, float *parameters,
    float *direction, const int adds, const int decays)
{
    const float *old = c->old + lo, *before = c->momentum_old + lo;
    uint32_t bad = 0;
    for (size_t i = 0; i < n; i++) {
        const float sum = adds ? left[i] + right[i] : left[i];
        bad |= not_finite(sum);
        float gradient = sum / c->divisor;
        if (decays)
            gradient = fmaf(old[i], c->weight_decay, gradient);
        const float kept = before[i] * c->momentum;
        direction[i] = kept + gradient;
        parameters[i] = fmaf(direction[i], c->step, old[i]);
    }
    return bad;
}

/* The same without momentum, in its first step, and with Nesterov's: a loop for each operation. */
static uint32_t move_unusually(
    const struct chunk *c, const float *left, const float *right, size_t lo, size_t n, float *parameters, float *direction)
{
    const float *old = c->old + lo;
    float gradient[BLOCK] __attribute__((aligned(64)));
    uint32_t bad = 0;
    for (size_t i = 0; i < n; i++) {
        const float sum = right ? left[i] + right[i] : left[i];
        bad |= not_finite(sum);
        gradient[i] = sum / c->divisor;
    }
    if (c->weight_decay != 0.0f)
        for (size_t i = 0; i < n; i++)
            gradient[i] = fmaf(old[i], c->weight_decay, gradient[i]);
    memcpy(direction, gradient, n * sizeof *gradient);
    if (c->momentum_old)
        for (size_t i = 0; i < n; i++) {
            const float kept = c->momentum_old[lo + i] * c->momentum;
            direction[i] = kept + gradient[i];
        }
    if (c->momentum_new && c->nesterov)
        for (size_t i = 0; i < n; i++)
            gradient[i] = fmaf(direction[i], c->momentum, gradient[i]);
    else
        memcpy(gradient, direction, n * sizeof *gradient);
    for (size_t i = 0; i < n; i++)
        parameters[i] = fmaf(gradient[i], c->step, old[i]);
    return bad;
}

#define MOVE(adds, decays) move(c, left, right, lo, n, parameters, direction, adds, decays)

/* Gives 1 if the sum is not finite somewhere, -1 if there are more registers than this file has, else 0. */
int pushpull_fused_sgd(const struct chunk *c)
{
    float registers[REGISTERS][BLOCK] __attribute__((aligned(64)));
    float parameters[BLOCK] __attribute__((aligned(64))), direction[BLOCK] __attribute__((aligned(64)));
    const int usual = c->momentum_old && c->momentum_new && !c->nesterov;
    uint32_t bad = 0;
    for (int64_t a = 0; a < c->num_additions; a++)
        if (c->additions[3 * a + 2] - c->num_pushed >= REGISTERS)
            return -1;
    for (size_t lo = 0; lo < (size_t)c->length; lo += BLOCK) {
        const size_t n = (size_t)c->length - lo < BLOCK ? (size_t)c->length - lo : BLOCK;
        const float *left = c->pushed[0] + lo, *right = NULL;
        for (int64_t a = 0; a < c->num_additions; a++) {
            const int32_t *at = c->additions + 3 * a;
            left = at[0] < c->num_pushed ? c->pushed[at[0]] + lo : registers[at[0] - c->num_pushed];
            right = at[1] < c->num_pushed ? c->pushed[at[1]] + lo : registers[at[1] - c->num_pushed];
            if (a + 1 == c->num_additions)
                break; /* the last one is part of the update's loop */
            float *target = registers[at[2] - c->num_pushed];
            for (size_t i = 0; i < n; i++)
                target[i] = left[i] + right[i];
        }
        if (!usual)
            bad |= move_unusually(c, left, right, lo, n, parameters, direction);
        else if (c->weight_decay != 0.0f)
            bad |= right ? MOVE(1, 1) : MOVE(0, 1);
        else
            bad |= right ? MOVE(1, 0) : MOVE(0, 0);
        write(c->new + lo, parameters, n, c->streaming);
        if (c->momentum_new)
            write(c->momentum_new + lo, direction, n, c->streaming);
    }
#if defined(__AVX__)
    if (c->streaming)
        _mm_sfence(); /* whoever is told of the chunk now must see it */
#endif
    return bad != 0;
}
