/* A round of the usual kind in one call: take all pushes, sum, update, commit, tell. exchange.py says what is usual.

   Workers send a bucket of slices after the other, each as soon as backward has made it; a bucket is updated once all
   have sent theirs, and whoever waits for slices is told, while backward goes on.

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

struct message {                 /* a push of one bucket */
    int64_t length;              /* which it must have */
    int64_t head;                /* with so many bytes of `wanted`, behind which come rows and integer buffers */
    const char *wanted;
    char *push;                  /* (length + 1,): one more shows that something follows */
};

struct contributor {
    int32_t socket;
    int32_t here;                /* how many of its messages have been taken off the socket */
    int64_t worker;
    int64_t num_rows;
    int64_t first;               /* microbatch of the first row; the others follow */
    const struct message *messages; /* one for each bucket, in their order */
    int64_t sent;                /* bytes of the answer that it has got, -1: it is gone */
};

struct bucket {
    int64_t num_tasks;
    struct task *tasks;
    int64_t num_slices;
    int64_t *const *slices;      /* words of its slices */
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
    int64_t num_buckets;
    struct bucket *buckets;
    int64_t num_watchers;
    const int32_t *watchers;     /* sockets of those who are told of each bucket */
    const char *written;         /* how */
    int64_t written_length;
    char *answer;                /* whole frame of the commit but for what is filled in */
    int64_t answer_length, record, rows, integers, last_worker, flags_at, update_ms; /* offsets in the answer */
    char *kept;                  /* where the record is kept: its length, then itself */
    int64_t *kept_version;       /* ... and the word that says so, which is one more than the version */
    int64_t *committed;          /* word of this server */
    int64_t version;             /* that is made */
    int64_t *begun;              /* word that says that memory is written: one more than the version */
    int64_t done;                /* how many buckets stand at it */
    double spent_ms;             /* updating them */
};

static double milliseconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return 1e3 * now.tv_sec + 1e-6 * now.tv_nsec;
}

/* Where the rows of a contributor lie, and its integer buffers: they come with each of its messages. */
static const char *rows_of(const struct contributor *c)
{
    return c->messages->push + c->messages->head;
}

static const char *integers_of(const struct contributor *c)
{
    return rows_of(c) + c->num_rows * ROW;
}

static int64_t length_of_integers(const struct contributor *c)
{
    return c->messages->push + c->messages->length - integers_of(c);
}

/* Whether rows are those of the microbatches that were foretold, and the same in all messages. */
static int fits(const struct contributor *c, const struct message *m)
{
    const char *rows = m->push + m->head;
    for (int64_t i = 0; i < c->num_rows; i++) {
        int64_t microbatch;
        memcpy(&microbatch, rows + i * ROW, sizeof microbatch);
        if (microbatch != c->first + i)
            return 0;
    }
    return m == c->messages || !memcmp(rows, rows_of(c), m->length - m->head);
}

/* Take the next push, if it is what was foretold. Nothing else is taken: descriptors may come with it. */
static int hear(struct contributor *c, int64_t num_buckets)
{
    if (c->here == num_buckets)
        return 0;
    const struct message *m = &c->messages[c->here];
    const int64_t found = recv(c->socket, m->push, m->length + 1, MSG_DONTWAIT | MSG_PEEK);
    if (found < m->length || (found > m->length && c->here + 1 == num_buckets))
        return 0;
    if (memcmp(m->push, m->wanted, m->head) || !fits(c, m))
        return 0;
    if (recv(c->socket, m->push, m->length, MSG_DONTWAIT) != m->length)
        return 0;
    c->here++;
    return 1;
}

static struct contributor *find(struct round *r, int socket)
{
    for (int64_t i = 0; i < r->num_contributors; i++)
        if (r->contributors[i].socket == socket)
            return &r->contributors[i];
    return NULL;
}

/* Whether all have pushed a bucket. */
static int is_whole(const struct round *r, int64_t bucket)
{
    for (int64_t i = 0; i < r->num_contributors; i++)
        if (r->contributors[i].here <= bucket)
            return 0;
    return 1;
}

/* Wait for that. 0 if something else has happened, of which nothing is seen yet. */
static int await(struct round *r, int64_t bucket)
{
    struct epoll_event events[EVENTS];
    while (!is_whole(r, bucket)) {
        const int found = epoll_wait(r->epoll, events, EVENTS, -1);
        if (found < 0 && errno == EINTR)
            continue;
        int strange = found < 0;
        for (int i = 0; i < found; i++) {
            struct contributor *c = find(r, events[i].data.fd);
            if (!c || events[i].events != EPOLLIN || !hear(c, r->num_buckets)) {
                strange = 1;
                continue;
            }
            memcpy(r->answer + r->last_worker, &c->worker, sizeof c->worker);
        }
        if (strange)
            return 0;
    }
    return 1;
}

/* Divide by all weights, or samples. Weights must be whole numbers, so that they may be added in any order, and integer
   buffers the same. */
static int weigh(const struct round *r)
{
    const struct contributor *one = r->contributors;
    double weight = 0;
    int64_t samples = 0;
    for (int64_t i = 0; i < r->num_contributors; i++) {
        const struct contributor *c = &r->contributors[i];
        for (int64_t j = 0; j < c->num_rows; j++) {
            double of_row;
            int64_t samples_of_row;
            memcpy(&of_row, rows_of(c) + j * ROW + WEIGHT, sizeof of_row);
            memcpy(&samples_of_row, rows_of(c) + j * ROW + SAMPLES, sizeof samples_of_row);
            if (!(of_row >= 0 && of_row <= 0x1p32 && of_row == (double)(int64_t)of_row) || samples_of_row < 0)
                return 0;
            weight += of_row;
            samples += samples_of_row;
        }
        const int64_t length = length_of_integers(c);
        if (length != length_of_integers(one) || memcmp(integers_of(c), integers_of(one), length))
            return 0;
    }
    const float by_weight = weight > 1 ? (float)weight : 1, by_samples = samples > 1 ? (float)(double)samples : 1;
    for (int64_t i = 0; i < r->num_divisors; i++)
        *r->divisors[i].at = r->divisors[i].counts_samples ? by_samples : by_weight;
    return 1;
}

static int update(struct round *r, const struct bucket *b)
{
    const double begin = milliseconds();
    __atomic_store_n(r->begun, r->version + 1, __ATOMIC_RELEASE);
    run_together(r->team, b->tasks, b->num_tasks);
    r->spent_ms += milliseconds() - begin;
    for (int64_t i = 0; i < b->num_tasks; i++)
        if (b->tasks[i].work.found)
            return 0;
    return 1;
}

static void show(const struct round *r, const struct bucket *b)
{
    for (int64_t i = 0; i < b->num_slices; i++)
        __atomic_store_n(b->slices[i], r->version, __ATOMIC_RELEASE);
}

/* A word that is lost is one for which nobody waits for long; half of one would be taken for another. */
static void tell_of_bucket(const struct round *r)
{
    for (int64_t i = 0; i < r->num_watchers; i++) {
        const int64_t sent = send(r->watchers[i], r->written, r->written_length, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (sent > 0 && sent < r->written_length)
            shutdown(r->watchers[i], SHUT_RDWR);
    }
}

static void commit(struct round *r)
{
    const double begin = milliseconds();
    const struct contributor *one = r->contributors;
    for (int64_t i = 0; i < r->num_contributors; i++) {
        const struct contributor *c = &r->contributors[i];
        memcpy(r->answer + r->rows + c->first * ROW, rows_of(c), c->num_rows * ROW);
    }
    memcpy(r->answer + r->integers, integers_of(one), length_of_integers(one));
    const int32_t flags = __atomic_load_n(&r->flags, __ATOMIC_ACQUIRE);
    memcpy(r->answer + r->flags_at, &flags, sizeof flags);
    const double times[] = {r->spent_ms, milliseconds() - begin};
    memcpy(r->answer + r->update_ms, times, sizeof times);
    const int64_t length = r->answer_length - r->record;
    memcpy(r->kept, &length, sizeof length);
    memcpy(r->kept + sizeof length, r->answer + r->record, length);
    __atomic_store_n(r->kept_version, r->version + 1, __ATOMIC_RELEASE);
    show(r, &r->buckets[r->num_buckets - 1]);
    __atomic_store_n(r->committed, r->version, __ATOMIC_RELEASE);
}

static void tell_of_commit(struct round *r)
{
    for (int64_t i = 0; i < r->num_contributors; i++) {
        struct contributor *c = &r->contributors[i];
        c->sent = send(c->socket, r->answer, r->answer_length, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (c->sent < 0 && (errno == EAGAIN || errno == EWOULDBLOCK))
            c->sent = 0;
    }
}

/* Wait for all pushes, then do the rest. 0 if something else has happened, of which nothing is seen yet: what was taken
   lies in the contributors. Returns 1 once everybody was told, and something else has come or PUT_OFF_MS have passed. */
int32_t pushpull_round(struct round *r)
{
    for (int64_t i = 0; i < r->num_buckets; i++) {
        if (!await(r, i) || (!i && !weigh(r)))
            return 0;
        if (!update(r, &r->buckets[i]))
            return 0;
        r->done = i + 1;
        if (r->done == r->num_buckets)
            break;
        show(r, &r->buckets[i]);
        tell_of_bucket(r);
    }
    commit(r);
    tell_of_commit(r);
    struct epoll_event events[EVENTS];
    epoll_wait(r->epoll, events, EVENTS, PUT_OFF_MS); /* they want the cores now; what follows here does not */
    return 1;
}
