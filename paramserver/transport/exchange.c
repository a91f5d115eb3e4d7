/* A round of the usual kind in one call: take all pushes, sum, update, commit, tell. exchange.py says what is usual.

   Whatever is not as it was foretold is left where it is, for Python to look at: nothing is decided here. */

#define _GNU_SOURCE
#include <errno.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "work.h"

enum { EVENTS = 16, SPINS = 2000, PUT_OFF_MS = 1 };

/* -- threads that share a pass ----------------------------------------------------------------------------------------- */

struct task {
    void (*pass)(struct work *);
    struct work work;
};

struct team {
    int32_t start;      /* futex: rises when there is something to do */
    int32_t busy;       /* futex: helpers that are not done */
    int32_t quits;
    int32_t size;       /* helpers */
    struct task *tasks;
    int64_t num_tasks;
    int kept_off;       /* core that helpers keep off */
    pthread_t threads[];
};

static void futex_wait(int32_t *word, int32_t value)
{
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, NULL, NULL, 0);
}

static void futex_wake(int32_t *word, int32_t count)
{
    syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, count, NULL, NULL, 0);
}

static void take_shares(struct team *team)
{
    for (int64_t i = 0; i < team->num_tasks; i++)
        team->tasks[i].pass(&team->tasks[i].work);
}

static void *help(void *argument)
{
    struct team *team = argument;
    for (int32_t seen = 0;; seen++) {
        while (__atomic_load_n(&team->start, __ATOMIC_ACQUIRE) == seen)
            futex_wait(&team->start, seen);
        if (team->quits)
            return NULL;
        take_shares(team);
        if (__atomic_sub_fetch(&team->busy, 1, __ATOMIC_RELEASE) == 0)
            futex_wake(&team->busy, 1);
    }
}

static void start(struct team *team)
{
    __atomic_add_fetch(&team->start, 1, __ATOMIC_RELEASE);
    futex_wake(&team->start, team->size);
}

/* As Team._keep_off: a kernel likes to put a thread where it was woken from, and moves it away too late. */
static void keep_off(struct team *team)
{
    cpu_set_t cores;
    const int core = sched_getcpu();
    if (core < 0 || core == team->kept_off || sched_getaffinity(0, sizeof cores, &cores))
        return;
    CPU_CLR(core, &cores);
    if (!CPU_COUNT(&cores))
        return;
    team->kept_off = core;
    for (int32_t i = 0; i < team->size; i++)
        pthread_setaffinity_np(team->threads[i], sizeof cores, &cores);
}

static void run_together(struct team *team, struct task *tasks, int64_t num_tasks)
{
    team->tasks = tasks;
    team->num_tasks = num_tasks;
    team->busy = team->size;
    if (team->size) {
        keep_off(team);
        start(team);
    }
    take_shares(team);
    for (int spins = 0; team->size;) {
        const int32_t busy = __atomic_load_n(&team->busy, __ATOMIC_ACQUIRE);
        if (!busy)
            return;
        if (spins++ > SPINS)
            futex_wait(&team->busy, busy);
    }
}

struct team *pushpull_team(int32_t helpers)
{
    struct team *team = calloc(1, sizeof *team + helpers * sizeof(pthread_t));
    if (!team)
        return NULL;
    team->kept_off = -1;
    for (; team->size < helpers; team->size++)
        if (pthread_create(&team->threads[team->size], NULL, help, team))
            break; /* fewer do it, too */
    return team;
}

void pushpull_disband(struct team *team)
{
    team->quits = 1;
    start(team);
    for (int32_t i = 0; i < team->size; i++)
        pthread_join(team->threads[i], NULL);
    free(team);
}

/* -- a round ----------------------------------------------------------------------------------------------------------- */

/* A row, and with it a row's place: microbatch, loss, weight, samples, 8 bytes each. */
enum { ROW = 32, WEIGHT = 16, SAMPLES = 24 };

struct contributor {
    int32_t socket;
    int32_t here;                /* whether its push has been taken off the socket */
    int64_t worker;
    int64_t length;              /* of the push, which must be of this length */
    int64_t head;                /* with so many bytes of `wanted`, behind which come rows */
    int64_t num_rows;
    int64_t first;               /* microbatch of the first row; the others follow */
    const char *wanted;
    char *push;                  /* (length + 1,): one more shows that something follows */
    int64_t sent;                /* bytes of the answer that it has got, -1: it is gone */
};

struct divisor {
    float *at;
    int64_t counts_samples;      /* or weights */
};

struct round {
    int32_t epoll;
    int32_t flags;               /* of the commit; others may write it at any time */
    struct team *team;
    int64_t num_contributors;
    struct contributor *contributors;
    int64_t num_divisors;
    const struct divisor *divisors;
    int64_t num_tasks;
    struct task *tasks;
    char *answer;                /* whole frame of the commit but for what is filled in */
    int64_t answer_length, record, rows, integers, last_worker, flags_at, update_ms; /* offsets in the answer */
    char *kept;                  /* where the record is kept: its length, then itself */
    int64_t *kept_version;       /* ... and the word that says so, which is one more than the version */
    int64_t num_slices;
    int64_t *const *slices;      /* words of the slices */
    int64_t *committed;          /* word of this server */
    int64_t version;             /* that is made */
    int64_t began;               /* becomes 1 once memory is written */
};

static double milliseconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return 1e3 * now.tv_sec + 1e-6 * now.tv_nsec;
}

/* Take a push, if it is what was foretold. Nothing else is taken: descriptors may come with it. */
static int hear(struct contributor *c)
{
    if (c->here || recv(c->socket, c->push, c->length + 1, MSG_DONTWAIT | MSG_PEEK) != c->length)
        return 0;
    if (memcmp(c->push, c->wanted, c->head))
        return 0;
    for (int64_t i = 0; i < c->num_rows; i++) {
        int64_t microbatch;
        memcpy(&microbatch, c->push + c->head + i * ROW, sizeof microbatch);
        if (microbatch != c->first + i)
            return 0;
    }
    if (recv(c->socket, c->push, c->length, MSG_DONTWAIT) != c->length)
        return 0;
    c->here = 1;
    return 1;
}

static struct contributor *find(struct round *r, int socket)
{
    for (int64_t i = 0; i < r->num_contributors; i++)
        if (r->contributors[i].socket == socket)
            return &r->contributors[i];
    return NULL;
}

/* Weights that are whole numbers, so that they may be added in any order; and integer buffers that are the same. */
static int count(const struct round *r, double *weight, int64_t *samples)
{
    const struct contributor *one = r->contributors;
    *weight = 0;
    *samples = 0;
    for (int64_t i = 0; i < r->num_contributors; i++) {
        const struct contributor *c = &r->contributors[i];
        for (int64_t j = 0; j < c->num_rows; j++) {
            double of_row;
            int64_t samples_of_row;
            memcpy(&of_row, c->push + c->head + j * ROW + WEIGHT, sizeof of_row);
            memcpy(&samples_of_row, c->push + c->head + j * ROW + SAMPLES, sizeof samples_of_row);
            if (!(of_row >= 0 && of_row <= 0x1p32 && of_row == (double)(int64_t)of_row) || samples_of_row < 0)
                return 0;
            *weight += of_row;
            *samples += samples_of_row;
        }
        const int64_t at = c->head + c->num_rows * ROW, one_at = one->head + one->num_rows * ROW;
        if (c->length - at != one->length - one_at || memcmp(c->push + at, one->push + one_at, c->length - at))
            return 0;
    }
    return 1;
}

static void commit(struct round *r, double update_ms)
{
    const double begin = milliseconds();
    const struct contributor *one = r->contributors;
    const int64_t integers = one->head + one->num_rows * ROW;
    for (int64_t i = 0; i < r->num_contributors; i++) {
        const struct contributor *c = &r->contributors[i];
        memcpy(r->answer + r->rows + c->first * ROW, c->push + c->head, c->num_rows * ROW);
    }
    if (one->length > integers)
        memcpy(r->answer + r->integers, one->push + integers, one->length - integers);
    const int32_t flags = __atomic_load_n(&r->flags, __ATOMIC_ACQUIRE);
    memcpy(r->answer + r->flags_at, &flags, sizeof flags);
    const double times[] = {update_ms, milliseconds() - begin};
    memcpy(r->answer + r->update_ms, times, sizeof times);
    const int64_t length = r->answer_length - r->record;
    memcpy(r->kept, &length, sizeof length);
    memcpy(r->kept + sizeof length, r->answer + r->record, length);
    __atomic_store_n(r->kept_version, r->version + 1, __ATOMIC_RELEASE);
    for (int64_t i = 0; i < r->num_slices; i++)
        __atomic_store_n(r->slices[i], r->version, __ATOMIC_RELEASE);
    __atomic_store_n(r->committed, r->version, __ATOMIC_RELEASE);
}

/* Wait for all pushes, then do the rest. 0 if something else has happened, of which nothing is seen yet: what was taken
   lies in the contributors. Returns 1 once everybody was told, and something else has come or PUT_OFF_MS have passed. */
int32_t pushpull_round(struct round *r)
{
    struct epoll_event events[EVENTS];
    for (int64_t missing = r->num_contributors; missing;) {
        const int found = epoll_wait(r->epoll, events, EVENTS, -1);
        int strange = found < 0;
        for (int i = 0; i < found; i++) {
            struct contributor *c = find(r, events[i].data.fd);
            if (!c || events[i].events != EPOLLIN || !hear(c)) {
                strange = 1;
                continue;
            }
            missing--;
            memcpy(r->answer + r->last_worker, &c->worker, sizeof c->worker);
        }
        if (strange)
            return 0;
    }
    double weight;
    int64_t samples;
    if (!count(r, &weight, &samples))
        return 0;
    const float by_weight = weight > 1 ? (float)weight : 1, by_samples = samples > 1 ? (float)(double)samples : 1;
    for (int64_t i = 0; i < r->num_divisors; i++)
        *r->divisors[i].at = r->divisors[i].counts_samples ? by_samples : by_weight;
    const double begin = milliseconds();
    r->began = 1;
    run_together(r->team, r->tasks, r->num_tasks);
    for (int64_t i = 0; i < r->num_tasks; i++)
        if (r->tasks[i].work.found)
            return 0;
    commit(r, milliseconds() - begin);
    for (int64_t i = 0; i < r->num_contributors; i++) {
        struct contributor *c = &r->contributors[i];
        c->sent = send(c->socket, r->answer, r->answer_length, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (c->sent < 0 && (errno == EAGAIN || errno == EWOULDBLOCK))
            c->sent = 0;
    }
    epoll_wait(r->epoll, events, EVENTS, PUT_OFF_MS); /* they want the cores now; what follows here does not */
    return 1;
}
