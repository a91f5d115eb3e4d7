/* Sum along the tree, mean and Adam of one chunk in one pass over memory; fused_adam.py says what the bits are. */

#include "fused.h"

struct chunk {
    struct sum sum;
    const float *old;             /* parameters that are read */
    float *new;                   /* parameters that are written; may be old */
    const float *average_old, *square_old;
    float *average_new, *square_new;
    void (*root)(int n, const float *from, float *to, int64_t mode); /* torch's own; NULL: the processor's */
    int64_t mode;                 /* of root */
    float weight_decay;           /* Adam's: part of the gradient */
    float keep;                   /* AdamW's: what the parameters are multiplied by; else 1 */
    float average_weight, square_keep, square_weight;
    float correction, eps, step;
    float number;                 /* of the update, which is kept with the averages ... */
    float *count;                 /* ... here */
};

/* The formulas of torch/optim/adam.py _single_tensor_adam, as ATen's vectorised kernels round them. */
static inline __attribute__((always_inline)) uint32_t remember(
    const struct chunk *c, const float *left, const float *right, size_t lo, size_t n, float *average, float *square,
    const int adds, const int decays)
{
    const float *old = c->old + lo, *average_old = c->average_old + lo, *square_old = c->square_old + lo;
    uint32_t bad = 0;
    for (size_t i = 0; i < n; i++) {
        const float sum = adds ? left[i] + right[i] : left[i];
        bad |= not_finite(sum);
        float gradient = sum / c->sum.divisor;
        if (decays)
            gradient = fmaf(old[i], c->weight_decay, gradient);
        average[i] = fmaf(c->average_weight, gradient - average_old[i], average_old[i]);
        const float kept = square_old[i] * c->square_keep, weighed = c->square_weight * gradient;
        square[i] = fmaf(weighed, gradient, kept);
    }
    return bad;
}

#define REMEMBER(adds, decays) remember(c, left, right, lo, n, average, square, adds, decays)

static uint32_t pass(const struct chunk *c, size_t from, size_t to)
{
    float registers[REGISTERS][BLOCK] ALIGNED;
    float parameters[BLOCK] ALIGNED, average[BLOCK] ALIGNED, square[BLOCK] ALIGNED, root[BLOCK] ALIGNED;
    const int streaming = c->sum.streaming, decays = c->weight_decay != 0.0f;
    uint32_t bad = 0;
    if (!from)
        *c->count = c->number;
    for (size_t lo = from; lo < to; lo += BLOCK) {
        const size_t n = to - lo < BLOCK ? to - lo : BLOCK;
        const float *left, *right, *old = c->old + lo;
        add_up(&c->sum, lo, n, registers, &left, &right);
        ask_for(old);
        ask_for(c->average_old + lo);
        ask_for(c->square_old + lo);
        if (right)
            bad |= decays ? REMEMBER(1, 1) : REMEMBER(1, 0);
        else
            bad |= decays ? REMEMBER(0, 1) : REMEMBER(0, 0);
        if (c->root)
            c->root((int)n, square, root, c->mode);
        else
            for (size_t i = 0; i < n; i++)
                root[i] = sqrtf(square[i]);
        for (size_t i = 0; i < n; i++) {
            const float divisor = root[i] / c->correction + c->eps, moved = c->step * average[i];
            const float kept = old[i] * c->keep;
            parameters[i] = kept + moved / divisor;
        }
        put(c->new + lo, parameters, n, streaming);
        put(c->average_new + lo, average, n, streaming);
        put(c->square_new + lo, square, n, streaming);
    }
    settle(streaming);
    return bad;
}

#include "fused_work.h"
