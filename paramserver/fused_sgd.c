/* Sum along the tree, mean and SGD of one chunk in one pass over memory; fused_sgd.py says what the bits are. */

#include "fused.h"

struct chunk {
    struct sum sum;
    const float *old;             /* parameters that are read */
    float *new;                   /* parameters that are written; may be old */
    const float *momentum_old;    /* NULL: there is none yet */
    float *momentum_new;          /* NULL: without momentum */
    float weight_decay, momentum, step;
    int32_t nesterov;
};

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
        float gradient = sum / c->sum.divisor;
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
    float gradient[BLOCK] ALIGNED;
    uint32_t bad = 0;
    for (size_t i = 0; i < n; i++) {
        const float sum = right ? left[i] + right[i] : left[i];
        bad |= not_finite(sum);
        gradient[i] = sum / c->sum.divisor;
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

static uint32_t pass(const struct chunk *c, size_t from, size_t to)
{
    float registers[REGISTERS][BLOCK] ALIGNED;
    float parameters[BLOCK] ALIGNED, direction[BLOCK] ALIGNED;
    const int usual = c->momentum_old && c->momentum_new && !c->nesterov, streaming = c->sum.streaming;
    uint32_t bad = 0;
    for (size_t lo = from; lo < to; lo += BLOCK) {
        const size_t n = to - lo < BLOCK ? to - lo : BLOCK;
        const float *left, *right;
        add_up(&c->sum, lo, n, registers, &left, &right);
        ask_for(c->old + lo);
        if (c->momentum_old)
            ask_for(c->momentum_old + lo);
        if (!usual)
            bad |= move_unusually(c, left, right, lo, n, parameters, direction);
        else if (c->weight_decay != 0.0f)
            bad |= right ? MOVE(1, 1) : MOVE(0, 1);
        else
            bad |= right ? MOVE(1, 0) : MOVE(0, 0);
        put(c->new + lo, parameters, n, streaming);
        if (c->momentum_new)
            put(c->momentum_new + lo, direction, n, streaming);
    }
    settle(streaming);
    return bad;
}

#include "fused_work.h"
