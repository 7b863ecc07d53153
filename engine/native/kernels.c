/* One whole forward of a Llama-shaped decoder over ragged trees of tokens, for CPUs.
 *
 * Every sum runs in an order that depends on nothing but its own operands: a product adds over its inputs first to last, a score adds
 * over the head's dimensions in one fixed tree, a softmax and its weighted sum add over the text first to last. So a token's logits are
 * the same bits whatever else is computed beside it: in a chunk of a prompt, alone, or as a node of a tree.
 *
 * Weights lie in panels of PANEL output columns, [panels][in][PANEL]: one stream from memory for up to ROWS rows of input.
 * Inputs of a product lie in tiles of m <= ROWS rows, [tiles][in][m].
 *
 * Where the processor multiplies bfloat16 and the model is to be computed in it, weights lie in blocks of DEEP inputs,
 * [panels][in / DEEP][2][DEEP / 2][LANES][2], inputs are rounded to bfloat16 and lie row by row, [rows][in], and sums stay float32. AMX does it
 * or VDPBF16PS, one of them for any number of rows: the two round differently.
 */
#include <fenv.h>
#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__)
#define LANES 16
#define ROWS 12
#elif defined(__AVX2__)
#define LANES 8
#define ROWS 6
#else
#define LANES 4
#define ROWS 8
#endif
#define PANEL (2 * LANES)
#if defined(__AVX512BF16__)
#include <immintrin.h>
#define DEEP 32
#define PAIRS /* products of bfloat16 with bfloat16, two at a time */
#endif
#if defined(PAIRS) && defined(__AMX_BF16__) && defined(__AMX_TILE__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#define AMX /* and sixteen rows at a time */
#endif
#define QUERIES 8   /* queries of one head attended together */
#define TOGETHER 64 /* queries of all heads attended together */
#define SPINS 20000 /* turns of waiting before a thread sleeps */
#define AHEAD 512   /* floats of weights that are fetched before they are needed */

typedef float vf __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t vi __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint32_t vu __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint16_t vs __attribute__((vector_size(LANES * 2), aligned(2), may_alias));
#define INLINE static inline __attribute__((always_inline))

enum { SINGLE, WIDENED, PAIRED }; /* float32; bfloat16, widened; bfloat16 in pairs of inputs, for bfloat16 inputs */

typedef struct {
    const void *weight;  /* panels */
    const float *bias;   /* [panels * PANEL] or NULL */
    int32_t in, panels, kind, pad;
} Linear;

typedef struct {
    const float *norm_attention, *norm_mlp, *norm_query, *norm_key; /* the last two [dim] or NULL */
    Linear qkv, out, gate_up, down;
    char *keys, *values;  /* [slots][kv_heads][dim], float32 or bfloat16 */
    int64_t window;       /* positions seen, 0: all */
} Layer;

typedef struct {
    int32_t layers, hidden, heads, kv_heads, dim, paired; /* paired: all weights are */
    float eps, scale, embed_scale, residual_scale, logit_scale;
    int32_t halved; /* keys and values are bfloat16 */
    const float *embed, *norm, *cosine, *sine; /* cosine, sine: [context][dim / 2] */
    Linear head;
    const Layer *layer;
} Model;

typedef struct {
    const int64_t *context; /* slots of the text so far */
    const int32_t *parents; /* of each new token within the row, -1: the text; NULL: a chain */
    int32_t length, count, start, longest; /* of the context; new tokens; index of the first; context + deepest node + 1 */
} Row;

typedef struct {
    int32_t tokens, rows, kept, pad;
    const int32_t *ids, *positions;
    const int64_t *slots; /* where each new token's key and value go */
    const int32_t *keep;
    const Row *row;
    float *logits, *hidden; /* [kept][panels * PANEL], [kept][hidden] */
} Batch;

/* ---- threads ---------------------------------------------------------------------------------------------------------------------- */

typedef struct Pool Pool;
typedef void (*Job)(Pool *, int thread, const void *);

struct Pool {
    int threads;
    pthread_t *workers;
    pthread_mutex_t mutex, busy; /* busy: held by the caller whose job runs */
    pthread_cond_t wake;
    _Atomic unsigned generation; /* jobs so far */
    _Atomic int arrived, sleeping, inside, stop; /* inside: workers that have not left the job yet */
    _Atomic unsigned phase; /* barriers passed so far */
    _Atomic int next[2]; /* work counters, used in turn */
    Job job;
    const void *argument;
    char *scratch;
    size_t scratch_size;
};

INLINE void pause_cpu(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

/* One of many turns of a short wait. */
INLINE void linger(int *turns) {
    if (*turns < 2000) ++*turns, pause_cpu();
    else sched_yield();
}

/* Wait until every thread is here. `phase` is the caller's own count of barriers, as Pool.phase was when its job began. */
static void barrier(Pool *p, unsigned *phase) {
    unsigned mine = ++*phase;
    if (atomic_fetch_add(&p->arrived, 1) == p->threads - 1) {
        atomic_store(&p->arrived, 0);
        atomic_store(&p->next[(mine - 1) & 1], 0);
        atomic_store(&p->phase, mine);
        return;
    }
    for (int turns = 0; (int)(atomic_load_explicit(&p->phase, memory_order_acquire) - mine) < 0;) linger(&turns);
}

/* The next piece of the work between two barriers. */
INLINE int take(Pool *p, unsigned phase, int count) { return atomic_fetch_add_explicit(&p->next[phase & 1], count, memory_order_relaxed); }

typedef struct { Pool *pool; int index; } Worker;

static void *work(void *argument) {
    Worker worker = *(Worker *)argument;
    free(argument);
    Pool *p = worker.pool;
    fesetenv(FE_DFL_ENV);
    for (unsigned seen = 0;;) {
        int spins = 0;
        while (atomic_load_explicit(&p->generation, memory_order_acquire) == seen && ++spins < SPINS) pause_cpu();
        if (spins >= SPINS) {
            pthread_mutex_lock(&p->mutex);
            atomic_fetch_add(&p->sleeping, 1);
            while (atomic_load(&p->generation) == seen) pthread_cond_wait(&p->wake, &p->mutex);
            atomic_fetch_sub(&p->sleeping, 1);
            pthread_mutex_unlock(&p->mutex);
        }
        ++seen;
        if (atomic_load(&p->stop)) return NULL;
        p->job(p, worker.index, p->argument);
        atomic_fetch_sub_explicit(&p->inside, 1, memory_order_release);
    }
}

Pool *pool_new(int threads) {
    Pool *p = calloc(1, sizeof(Pool));
    p->threads = threads;
    pthread_mutex_init(&p->mutex, NULL);
    pthread_mutex_init(&p->busy, NULL);
    pthread_cond_init(&p->wake, NULL);
    p->workers = calloc(threads, sizeof(pthread_t));
    for (int i = 1; i < threads; ++i) {
        Worker *worker = malloc(sizeof(Worker));
        *worker = (Worker){p, i};
        if (!pthread_create(&p->workers[i], NULL, work, worker)) continue;
        free(worker);
        p->threads = i; /* the system gives no more */
        break;
    }
    return p;
}

static void launch(Pool *p) {
    pthread_mutex_lock(&p->mutex);
    atomic_fetch_add(&p->generation, 1);
    if (atomic_load(&p->sleeping)) pthread_cond_broadcast(&p->wake);
    pthread_mutex_unlock(&p->mutex);
}

void pool_free(Pool *p) {
    atomic_store(&p->stop, 1);
    launch(p);
    for (int i = 1; i < p->threads; ++i) pthread_join(p->workers[i], NULL);
    free(p->workers);
    free(p->scratch);
    free(p);
}

/* Run a job on every thread; it ends with a barrier. Behind it no thread reads the argument any more. However the caller rounds and flushes
 * small numbers, all threads do it alike. */
static void run(Pool *p, Job job, const void *argument) {
    fenv_t held;
    fegetenv(&held);
    fesetenv(FE_DFL_ENV);
    p->job = job;
    p->argument = argument;
    atomic_store(&p->inside, p->threads - 1);
    if (p->threads > 1) launch(p);
    job(p, 0, argument);
    for (int turns = 0; atomic_load_explicit(&p->inside, memory_order_acquire);) linger(&turns);
    fesetenv(&held);
}

static char *reserve(Pool *p, size_t size) {
    if (size > p->scratch_size || !p->scratch) {
        size_t wanted = (size + size / 4) / 64 * 64 + 64;
        free(p->scratch);
        p->scratch = aligned_alloc(64, wanted);
        p->scratch_size = p->scratch ? wanted : 0;
    }
    return p->scratch;
}

/* ---- vectors ---------------------------------------------------------------------------------------------------------------------- */

INLINE vf load(const float *x) { return *(const vf *)x; }
INLINE void store(float *x, vf v) { *(vf *)x = v; }
INLINE vf all(float x) { return x - (vf){}; }

/* To bfloat16, to the nearest, and back. */
INLINE vs halve(vf v) {
#ifdef PAIRS
    return (vs)_mm512_cvtneps_pbh((__m512)v);
#else
    vi wrong = v != v;
    vu bits = (vu)v, near = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return __builtin_convertvector((near & ~(vu)wrong) | (0x7fc0 & (vu)wrong), vs);
#endif
}

INLINE vf widen(vs v) { return (vf)(__builtin_convertvector(v, vu) << 16); }

/* e^x, to about one unit in the last place; 0 below -87.3 */
INLINE vf exponential(vf x) {
    vi tiny = x < all(-87.3f);
    vf bounded = (vf)(((vi)x & ~(x > all(88.7f))) | ((vi)all(88.7f) & (x > all(88.7f))));
    bounded = (vf)(((vi)bounded & ~tiny) | ((vi)all(-87.3f) & tiny));
    vf shifted = bounded * 1.44269504088896341f + 12582912.0f;
    vf n = shifted - 12582912.0f;
    vf r = bounded - n * 0.693359375f;
    r = r - n * -2.12194440e-4f;
    vf y = all(1.9875691500e-4f);
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * (r * r) + r + 1.0f;
    vi power = ((vi)shifted - (vi)all(12582912.0f) + 127) << 23;
    return (vf)((vi)(y * (vf)power) & ~tiny);
}

/* The sum of a vector's lanes: halves onto halves. */
INLINE float fold(vf v) {
    float x[LANES];
    store(x, v);
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; ++i) x[i] += x[i + width];
    return x[0];
}

/* fold() of LANES vectors at once, in the same order of additions. */
INLINE vf fold_all(const vf *v) {
#if LANES == 16 && !defined(__clang__) /* whose shuffles are named otherwise */
    static const vi mask[4][2] = {
        {{0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23}, {8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31}},
        {{0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27}, {4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31}},
        {{0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29}, {2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31}},
        {{0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30}, {1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31}},
    };
    vf x[16];
    for (int i = 0; i < 16; ++i) x[i] = v[i];
#pragma GCC unroll 4
    for (int stage = 0; stage < 4; ++stage)
#pragma GCC unroll 8
        for (int i = 0; i < (8 >> stage); ++i)
            x[i] = __builtin_shuffle(x[2 * i], x[2 * i + 1], mask[stage][0]) + __builtin_shuffle(x[2 * i], x[2 * i + 1], mask[stage][1]);
    return x[0];
#else
    vf x;
    for (int i = 0; i < LANES; ++i) x[i] = fold(v[i]);
    return x;
#endif
}

/* ---- products --------------------------------------------------------------------------------------------------------------------- */

enum { STORE, ADD, GATE };

typedef struct {
    const Linear *linear;
    const void *input;  /* tiles of float32, or rows of bfloat16 for weights in pairs */
    int rows, size;     /* size: rows per tile */
    int kind;
    float scale;        /* of what is stored or added */
    void *output;       /* STORE, ADD: float [rows][stride]; GATE: inputs of the next product */
    int64_t stride;
} Product;

INLINE int tile_rows(int rows) {
    int tiles = (rows + ROWS - 1) / ROWS;
    return tiles ? (rows + tiles - 1) / tiles : 1;
}

/* Where row m, input k of a tiled matrix of `in` inputs lies, and how far the next k is. */
INLINE float *tiled(float *base, int rows, int size, int64_t in, int m, int *step) {
    int tile = m / size, left = rows - tile * size;
    *step = left < size ? left : size;
    return base + (int64_t)tile * size * in + (m - tile * size);
}

/* Where the inputs of one row of a product are written: float32, one every `step`, or bfloat16 side by side. */
typedef struct { float *at; uint16_t *pairs; int64_t step; } Place;

INLINE Place place(void *base, int paired, int rows, int size, int64_t in, int m) {
    int step = 1;
    float *at = paired ? NULL : tiled(base, rows, size, in, m, &step);
    return (Place){at, paired ? (uint16_t *)base + m * in : NULL, step};
}

/* LANES inputs from k on. */
INLINE void put(Place to, int64_t k, vf v) {
    if (to.pairs) {
        *(vs *)(to.pairs + k) = halve(v);
        return;
    }
    float x[LANES];
    store(x, v);
    for (int i = 0; i < LANES; ++i) to.at[(k + i) * to.step] = x[i];
}

/* The sums of one row over one panel. m: the row within its tile of `step` rows. */
INLINE void finish(const Product *p, int row, int panel, int m, int step, vf low, vf high) {
    if (p->linear->bias) {
        low += load(p->linear->bias + (int64_t)panel * PANEL);
        high += load(p->linear->bias + (int64_t)panel * PANEL + LANES);
    }
    if (p->kind == GATE) {
        int64_t inner = (int64_t)p->linear->panels * LANES;
        float *tile = (float *)p->output + (int64_t)(row - m) * inner + m;
        put((Place){tile, p->linear->kind == PAIRED ? (uint16_t *)p->output + row * inner : NULL, step}, (int64_t)panel * LANES,
            low / (1.0f + exponential(-low)) * high);
        return;
    }
    float *out = (float *)p->output + row * p->stride + (int64_t)panel * PANEL;
    low *= p->scale;
    high *= p->scale;
    if (p->kind == ADD) {
        low += load(out);
        high += load(out + LANES);
    }
    store(out, low);
    store(out + LANES, high);
}

/* sum + x * b: of floats, or of pairs of bfloat16. */
INLINE vf accumulate(const int kind, vf sum, vf x, vf b) {
#ifdef PAIRS
    if (kind == PAIRED) return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)b);
#endif
    return sum + x * b;
}

/* rows x together panels: each sum over k runs first to last, whatever the shape of the tile. */
INLINE void tile(const Product *p, const int rows, const int together, const int kind, int row, int panel) {
    const int steps = kind == PAIRED ? p->linear->in / 2 : p->linear->in, width = kind == WIDENED ? LANES : PANEL; /* in floats */
    const float *a = (const float *)p->input + (int64_t)row * steps, *w[4];
    vf sum[2 * ROWS]; /* [rows][2 * together]; arrays have constant sizes so that they become registers */
    for (int j = 0; j < together; ++j) w[j] = (const float *)p->linear->weight + (int64_t)(panel + j) * steps * width;
#pragma GCC unroll 12
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
        for (int j = 0; j < 2 * together; ++j) sum[r * 2 * together + j] = (vf){};
#pragma GCC unroll 1
    for (int k = 0; k < steps; ++k) {
        vf b[8];
#pragma GCC unroll 4
        for (int j = 0; j < together; ++j) {
            const float *at = w[j] + (int64_t)k * width, *next = at + LANES;
#ifdef PAIRS
            if (kind == PAIRED) at = w[j] + (k + (k & -(DEEP / 2))) * (int64_t)LANES, next = at + DEEP / 2 * LANES;
#endif
            __builtin_prefetch(at + AHEAD);
            if (kind != WIDENED) __builtin_prefetch(next + AHEAD);
            if (kind == WIDENED) {
                vu pair = *(const vu *)at;
                b[2 * j] = (vf)(pair << 16);
                b[2 * j + 1] = (vf)(pair & 0xffff0000u);
            } else {
                b[2 * j] = load(at);
                b[2 * j + 1] = load(next);
            }
        }
#pragma GCC unroll 12
        for (int r = 0; r < rows; ++r) {
            vf x = kind == PAIRED ? (vf)(((const int32_t *)a)[(int64_t)r * steps + k] - (vi){}) : all(a[(int64_t)k * rows + r]);
#pragma GCC unroll 8
            for (int j = 0; j < 2 * together; ++j) sum[r * 2 * together + j] = accumulate(kind, sum[r * 2 * together + j], x, b[j]);
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
        for (int j = 0; j < together; ++j) finish(p, row + r, panel + j, r, rows, sum[(r * together + j) * 2], sum[(r * together + j) * 2 + 1]);
}

#if defined(PAIRS) && !defined(AMX)
#define KINDS(rows, together, row, panel) \
    p->linear->kind == PAIRED    ? tile(p, rows, together, PAIRED, row, panel) \
    : p->linear->kind == WIDENED ? tile(p, rows, together, WIDENED, row, panel) \
                                 : tile(p, rows, together, SINGLE, row, panel)
#else
#define KINDS(rows, together, row, panel) \
    p->linear->kind == WIDENED ? tile(p, rows, together, WIDENED, row, panel) : tile(p, rows, together, SINGLE, row, panel)
#endif
#define TILE(n) \
    case n: KINDS(n, 1, row, panel); break;

static void tile_of(const Product *p, int rows, int row, int panel) {
    switch (rows) {
        TILE(1) TILE(2) TILE(3) TILE(4) TILE(5) TILE(6)
#if ROWS > 6
        TILE(7) TILE(8)
#endif
#if ROWS > 8
        TILE(9) TILE(10) TILE(11) TILE(12)
#endif
    }
}

static void tiles_of_one_row(const Product *p, int panel) { KINDS(1, 4, 0, panel); }
static void tiles_of_two_rows(const Product *p, int panel) { KINDS(2, 2, 0, panel); }

#ifdef AMX
#define HIGH 16  /* rows of a tile register */
#define BYTES 64 /* of one of them: DEEP inputs, two of each of LANES columns, or as many sums */

typedef struct { uint8_t palette, start, reserved[14]; uint16_t bytes[16]; uint8_t rows[16]; } Shapes;

INLINE int high_rows(int rows) {
    int tiles = (rows + HIGH - 1) / HIGH;
    return tiles ? (rows + tiles - 1) / tiles : 1;
}

/* A tile register is loaded row by row, which no processor sees coming. */
INLINE void fetch_register(const char *w) {
    for (int i = 0; i < HIGH; ++i) __builtin_prefetch(w + i * BYTES);
}

/* One or two tiles of `size` rows by one panel. Rows beyond the last are computed from whatever lies there, and dropped. */
INLINE void block(const Product *p, const int both, int size, int row, int panel) {
    int64_t pitch = (int64_t)p->linear->in * 2;
    const char *a = (const char *)p->input + row * pitch, *w = (const char *)p->linear->weight + panel * pitch * PANEL;
    float sum[4][HIGH][LANES] __attribute__((aligned(BYTES)));
    _tile_zero(0);
    _tile_zero(1);
    if (both) {
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t k = 0; k < pitch; k += BYTES, w += 2 * HIGH * BYTES) {
        fetch_register(w + HIGH * BYTES);
        _tile_loadd(6, w, BYTES);
        fetch_register(w + 2 * HIGH * BYTES);
        _tile_loadd(7, w + HIGH * BYTES, BYTES);
        _tile_loadd(4, a + k, pitch);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (both) {
            _tile_loadd(5, a + k + size * pitch, pitch);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, sum[0], BYTES);
    _tile_stored(1, sum[1], BYTES);
    if (both) {
        _tile_stored(2, sum[2], BYTES);
        _tile_stored(3, sum[3], BYTES);
    }
    __asm__ volatile("" ::: "memory"); /* some compilers do not know that the registers were stored there */
    for (int r = 0; r < (both ? 2 : 1) * size && row + r < p->rows; ++r) {
        int low = r < size ? 0 : 2, at = r < size ? r : r - size;
        finish(p, row + r, panel, 0, 0, load(sum[low][at]), load(sum[low + 1][at]));
    }
}

static void blocks(const Product *p, int panel) {
    int size = high_rows(p->rows), row = 0;
    for (; row + size < p->rows; row += 2 * size) block(p, 1, size, row, panel);
    if (row < p->rows) block(p, 0, size, row, panel);
}
#endif

/* Before products of so many rows in pairs, and once more before those of another number. Registers 0 to 3 hold sums and 4 and 5 inputs of
 * as many rows as a tile has, 6 and 7 weights. */
INLINE void open_registers(int paired, int rows) {
#ifdef AMX
    Shapes shapes = {.palette = 1};
    for (int i = 0; i < 8; ++i) shapes.bytes[i] = BYTES, shapes.rows[i] = (uint8_t)(i < 6 ? high_rows(rows) : HIGH);
    if (paired) _tile_loadconfig(&shapes);
#endif
}

/* After them: registers in use would be saved and restored whenever another thread gets the processor. */
INLINE void close_registers(int paired) {
#ifdef AMX
    if (paired) _tile_release();
#endif
}

/* This thread's share of a product. Ends without a barrier. */
static void multiply(Pool *pool, unsigned phase, const Product *p) {
    int panels = p->linear->panels, share = panels / (pool->threads * 4);
    int together = p->rows == 1 ? 4 : p->rows == 2 ? 2 : 1;
    if (together > 1 && share < together) share = panels >= pool->threads * together ? together : 1;
    share = share < 1 ? 1 : share;
    if (share >= together) share -= share % together;
    for (int first; (first = take(pool, phase, share)) < panels;) {
        int last = first + share < panels ? first + share : panels, panel = first;
#ifdef AMX
        for (; p->linear->kind == PAIRED && panel < last; ++panel) blocks(p, panel);
#endif
        for (; p->rows == 1 && panel + 4 <= last; panel += 4) tiles_of_one_row(p, panel);
        for (; p->rows == 2 && panel + 2 <= last; panel += 2) tiles_of_two_rows(p, panel);
        for (; panel < last; ++panel)
            for (int row = 0; row < p->rows; row += p->size) tile_of(p, p->rows - row < p->size ? p->rows - row : p->size, row, panel);
    }
}

/* How bfloat16 is best multiplied with bfloat16 here: 2 by AMX, which the system must grant to the process, 1 by VDPBF16PS, 0 not at all.
 * The Intel processor that was measured takes two cycles for a VDPBF16PS, which is half of what it does in float32. */
int pairs(void) {
#if defined(AMX)
    return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XFEATURE_XTILEDATA */) ? 0 : 2;
#elif defined(PAIRS)
    __builtin_cpu_init();
    return __builtin_cpu_is("intel") ? 0 : 1;
#else
    return 0;
#endif
}

/* ---- norms and rotation ----------------------------------------------------------------------------------------------------------- */

INLINE float inverse_rms(const float *x, int n, float eps) {
    vf sum = {};
    for (int i = 0; i < n; i += LANES) sum += load(x + i) * load(x + i);
    return 1.0f / sqrtf(fold(sum) / (float)n + eps);
}

/* RMS norm of rows as inputs of a product, and plainly as well where `plain` is given. */
static void normalise(Pool *pool, unsigned phase, const Model *model, const float *x, int rows, const float *weight, void *inputs, float *plain) {
    int n = model->hidden, size = tile_rows(rows);
    for (int m; (m = take(pool, phase, 1)) < rows;) {
        const float *row = x + (int64_t)m * n;
        float factor = inverse_rms(row, n, model->eps);
        Place to = place(inputs, model->paired, rows, size, n, m);
        for (int i = 0; i < n; i += LANES) {
            vf v = load(row + i) * factor * load(weight + i);
            put(to, i, v);
            if (plain) store(plain + (int64_t)m * n + i, v);
        }
    }
}

/* Norm (where the model has one) and rotation of one head, in place. */
INLINE void turn(float *x, int dim, const float *weight, float eps, const float *cosine, const float *sine) {
    if (weight) {
        float factor = inverse_rms(x, dim, eps);
        for (int i = 0; i < dim; i += LANES) store(x + i, load(x + i) * factor * load(weight + i));
    }
    int half = dim / 2;
    for (int i = 0; i < half; ++i) {
        float a = x[i], b = x[i + half];
        x[i] = a * cosine[i] - b * sine[i];
        x[i + half] = b * cosine[i] + a * sine[i];
    }
}

/* ---- attention -------------------------------------------------------------------------------------------------------------------- */

typedef struct { int32_t row, first, count; } Unit; /* some new tokens of a row, attended by one kv head at a time */

typedef struct {
    Unit *unit;
    int units, rows;      /* rows: tokens that go on after the attention */
    const int32_t *place; /* of each new token among them; NULL: its own index */
    float *x;             /* residual [rows][hidden] */
} Part;

typedef struct {
    const Model *model;
    const Batch *batch;
    Part all, kept;  /* the last layer goes on with the tokens whose logits are wanted */
    int32_t **keys;  /* per row: slots of the text and, for a chain, of its new tokens */
    int32_t **paths; /* per new token of a tree: [depth + 1] slots from the text down to itself */
    float *tiles, *wide, *qkv; /* inputs of products; gated; [T][stride] */
    float *scores;
    int64_t stride, longest;
} Forward;

/* Slots lie anywhere, so the processor cannot guess which come next. */
INLINE void fetch(const char *x, int bytes) {
    for (int i = 0; i < bytes; i += 64) __builtin_prefetch(x + i);
}

/* LANES floats of keys or values. */
INLINE vf recall(const int halved, const char *x) { return halved ? widen(*(const vs *)x) : load((const float *)x); }

INLINE int bytes_of(int halved) { return halved ? 2 : 4; }

/* Scores of each head's queries with `count` keys from `from` on. query, out: [heads][queries]; keys: of the first head; pitch: bytes from
 * slot to slot. */
INLINE void score(const int halved, const int dim, int heads, int queries, const float *const *query, const char *keys, int64_t pitch,
                  const int32_t *slots, int from, int count, float scale, float *const *out) {
    const int each = bytes_of(halved);
    for (int first = from; first < from + count; first += LANES) {
        int many = from + count - first < LANES ? from + count - first : LANES;
        for (int j = 0; j < many && first + j + LANES < from + count; ++j) fetch(keys + slots[first + j + LANES] * pitch, heads * dim * each);
        for (int h = 0; h < heads; ++h) {
            vf part[QUERIES][LANES];
            for (int j = 0; j < many; ++j) {
                const char *key = keys + slots[first + j] * pitch + h * dim * each;
                for (int q = 0; q < queries; ++q) {
                    const float *one = query[h * queries + q];
                    vf sum = load(one) * recall(halved, key);
                    for (int i = LANES; i < dim; i += LANES) sum += load(one + i) * recall(halved, key + i * each);
                    part[q][j] = sum;
                }
            }
            for (int q = 0; q < queries; ++q) {
                float *to = out[h * queries + q] + first;
                for (int j = many; j < LANES; ++j) part[q][j] = (vf){};
                vf s = fold_all(part[q]) * scale;
                if (many == LANES) {
                    store(to, s);
                } else {
                    float t[LANES];
                    store(t, s);
                    for (int j = 0; j < many; ++j) to[j] = t[j];
                }
            }
        }
    }
}

#define SCORE(halved, dim) score(halved, dim, heads, queries, query, keys, pitch, slots, from, count, scale, out)

static void score_of(int halved, int dim, int heads, int queries, const float *const *query, const char *keys, int64_t pitch,
                     const int32_t *slots, int from, int count, float scale, float *const *out) {
    if (dim == 64) halved ? SCORE(1, 64) : SCORE(0, 64);
    else if (dim == 128) halved ? SCORE(1, 128) : SCORE(0, 128);
    else halved ? SCORE(1, dim) : SCORE(0, dim);
}

/* Scores to weights over [from, length), zero before; the sum's inverse. */
INLINE float softmax(float *s, int from, int length) {
    int begin = from / LANES * LANES, end = (length + LANES - 1) / LANES * LANES;
    for (int i = begin; i < from; ++i) s[i] = -INFINITY;
    for (int i = length; i < end; ++i) s[i] = -INFINITY;
    vf top = load(s + begin);
    for (int i = begin + LANES; i < end; i += LANES) {
        vf v = load(s + i);
        vi more = v > top;
        top = (vf)(((vi)v & more) | ((vi)top & ~more));
    }
    float best = top[0];
    for (int i = 1; i < LANES; ++i) best = top[i] > best ? top[i] : best;
    vf sum = {};
    for (int i = begin; i < end; i += LANES) {
        vf e = exponential(load(s + i) - best);
        store(s + i, e);
        sum += e;
    }
    return 1.0f / fold(sum);
}

#define WIDTH 4 /* vectors of a head's value that are summed together */

INLINE void weigh_part(const int halved, const int vectors, const int together, const float *const *weights, const char *values, int64_t pitch,
                       const int32_t *slots, int from, int to, float *const *out, int at) {
    const int each = bytes_of(halved);
    vf sum[4][WIDTH];
#pragma GCC unroll 4
    for (int q = 0; q < together; ++q)
#pragma GCC unroll 4
        for (int i = 0; i < vectors; ++i) sum[q][i] = load(out[q] + at + i * LANES);
    for (int j = from; j < to; ++j) {
        const char *value = values + slots[j] * pitch + at * each;
        vf v[WIDTH];
#pragma GCC unroll 4
        for (int i = 0; i < vectors; ++i) v[i] = recall(halved, value + i * LANES * each);
#pragma GCC unroll 4
        for (int q = 0; q < together; ++q) {
            vf w = all(weights[q][j]);
#pragma GCC unroll 4
            for (int i = 0; i < vectors; ++i) sum[q][i] += w * v[i];
        }
    }
#pragma GCC unroll 4
    for (int q = 0; q < together; ++q)
#pragma GCC unroll 4
        for (int i = 0; i < vectors; ++i) store(out[q] + at + i * LANES, sum[q][i]);
}

/* out += sum over j in [from, to) of weights[j] * value of slot j, first to last. weights, out: [heads][queries]. */
INLINE void weigh(const int halved, int dim, int heads, int queries, const float *const *weights, const char *values, int64_t pitch,
                  const int32_t *slots, int from, int to, float *const *out) {
    for (int first = from; first < to; first += LANES) {
        int last = first + LANES < to ? first + LANES : to;
        for (int j = last; j < last + LANES && j < to; ++j) fetch(values + slots[j] * pitch, heads * dim * bytes_of(halved));
        for (int h = 0; h < heads; ++h)
            for (int q = 0, step; q < queries; q += step) {
                const float *const *w = weights + h * queries + q;
                float *const *o = out + h * queries + q;
                const char *v = values + h * dim * bytes_of(halved);
                int d = 0;
                step = queries - q >= 4 ? 4 : 1;
                for (; d + WIDTH * LANES <= dim; d += WIDTH * LANES)
                    step == 4 ? weigh_part(halved, WIDTH, 4, w, v, pitch, slots, first, last, o, d)
                              : weigh_part(halved, WIDTH, 1, w, v, pitch, slots, first, last, o, d);
                for (; d < dim; d += LANES)
                    step == 4 ? weigh_part(halved, 1, 4, w, v, pitch, slots, first, last, o, d)
                              : weigh_part(halved, 1, 1, w, v, pitch, slots, first, last, o, d);
            }
    }
}

static void weigh_of(int halved, int dim, int heads, int queries, const float *const *weights, const char *values, int64_t pitch,
                     const int32_t *slots, int from, int to, float *const *out) {
    halved ? weigh(1, dim, heads, queries, weights, values, pitch, slots, from, to, out)
           : weigh(0, dim, heads, queries, weights, values, pitch, slots, from, to, out);
}

/* Write one token's keys or values of all heads to its slot. */
INLINE void remember(int halved, char *store, int64_t slot, const float *x, int count) {
    char *to = store + slot * count * bytes_of(halved);
    if (!halved) memcpy(to, x, sizeof(float) * count);
    else for (int i = 0; i < count; i += LANES) *(vs *)(to + 2 * i) = halve(load(x + i));
}

/* Some new tokens of one row with kv heads [first_head, first_head + heads): at most QUERIES queries of each, TOGETHER in all. */
static void attend(const Forward *f, const Part *part, const Layer *layer, Unit unit, int first_head, int heads, int first_query, int queries,
                   float *scratch) {
    const Model *m = f->model;
    const Row *row = f->batch->row + unit.row;
    int dim = m->dim, group = m->heads / m->kv_heads, tree = row->parents != NULL, all_queries = heads * queries;
    int halved = m->halved, each = dim * bytes_of(halved); /* bytes of a head */
    int64_t pitch = (int64_t)m->kv_heads * each;
    const char *keys = layer->keys + (int64_t)first_head * each, *values = layer->values + (int64_t)first_head * each;
    const int32_t *slots = f->keys[unit.row];
    const float *query[TOGETHER];
    float *scores[TOGETHER], *out[TOGETHER], sums[TOGETHER], *results = scratch + TOGETHER * f->longest;
    int token[QUERIES], length[QUERIES], from[QUERIES], begin = INT32_MAX, shared = 0, least = INT32_MAX;
    for (int q = 0; q < queries; ++q) {
        token[q] = row->start + unit.first + (first_query + q) / group;
        length[q] = f->batch->positions[token[q]] + 1;
        from[q] = layer->window && length[q] > layer->window ? length[q] - (int)layer->window : 0;
        int common = tree ? row->length : length[q];
        if (common > shared) shared = common;
        if (common < least) least = common;
        if (from[q] < begin) begin = from[q];
    }
    begin = (begin < shared ? begin : shared) / LANES * LANES;
    for (int i = 0; i < all_queries; ++i) {
        int h = i / queries, q = i % queries, head = (first_head + h) * group + (first_query + q) % group;
        query[i] = f->qkv + token[q] * f->stride + (int64_t)head * dim;
        scores[i] = scratch + i * f->longest;
        out[i] = results + i * dim;
    }
    memset(results, 0, sizeof(float) * all_queries * dim);
    score_of(halved, dim, heads, queries, query, keys, pitch, slots, begin, shared - begin, m->scale, scores);
    for (int i = 0; i < all_queries; ++i) {
        int q = i % queries;
        float *tail[1] = {scores[i] + row->length};
        if (tree)
            score_of(halved, dim, 1, 1, query + i, keys + i / queries * each, pitch, f->paths[token[q]], 0, length[q] - row->length, m->scale, tail);
        sums[i] = softmax(scores[i], from[q], length[q]);
        for (int j = begin; j < from[q] / LANES * LANES; ++j) scores[i][j] = 0;
    }
    weigh_of(halved, dim, heads, queries, (const float *const *)scores, values, pitch, slots, begin, least, out);
    for (int i = 0; i < all_queries; ++i) {
        int q = i % queries, head = (first_head + i / queries) * group + (first_query + q) % group;
        const float *tail[1] = {tree ? scores[i] + row->length : scores[i]};
        const char *v = values + i / queries * each;
        if (tree) weigh_of(halved, dim, 1, 1, tail, v, pitch, f->paths[token[q]], 0, length[q] - row->length, out + i);
        else if (length[q] > least) weigh_of(halved, dim, 1, 1, tail, v, pitch, slots, least, length[q], out + i);
        int index = part->place ? part->place[token[q]] : token[q];
        Place to = place(f->tiles, m->paired, part->rows, tile_rows(part->rows), (int64_t)m->heads * dim, index);
        for (int d = 0; d < dim; d += LANES) put(to, (int64_t)head * dim + d, load(out[i] + d) * sums[i]);
    }
}

/* This thread's share of a layer's attention: pieces of rows by ranges of heads, as wide as leaves a few for every thread. */
static void attend_all(Pool *pool, unsigned phase, const Forward *f, const Part *part, const Layer *layer, float *scratch) {
    int kv_heads = f->model->kv_heads, group = f->model->heads / kv_heads, heads = kv_heads;
    while (heads > 1 && part->units * ((kv_heads + heads - 1) / heads) < 3 * pool->threads) heads = (heads + 1) / 2;
    int ranges = (kv_heads + heads - 1) / heads;
    for (int u; (u = take(pool, phase, 1)) < part->units * ranges;) {
        Unit unit = part->unit[u / ranges];
        int first = u % ranges * heads, last = first + heads < kv_heads ? first + heads : kv_heads, queries = unit.count * group;
        for (int q = 0; q < queries; q += QUERIES) {
            int many = queries - q < QUERIES ? queries - q : QUERIES, wide = TOGETHER / many;
            for (int h = first; h < last; h += wide) attend(f, part, layer, unit, h, last - h < wide ? last - h : wide, q, many, scratch);
        }
    }
}

/* ---- the forward ------------------------------------------------------------------------------------------------------------------ */

static void forward_job(Pool *pool, int thread, const void *argument) {
    const Forward *f = argument;
    const Model *m = f->model;
    const Batch *b = f->batch;
    int T = b->tokens, size = tile_rows(T), hidden = m->hidden, dim = m->dim;
    unsigned phase = atomic_load(&pool->phase);
    float *scratch = f->scores + (int64_t)thread * TOGETHER * (f->longest + dim);
    open_registers(m->paired, T);
    for (int t; (t = take(pool, phase, 1)) < T;) {
        const float *from = m->embed + (int64_t)b->ids[t] * hidden;
        float *to = f->all.x + (int64_t)t * hidden;
        for (int i = 0; i < hidden; ++i) to[i] = from[i] * m->embed_scale;
    }
    barrier(pool, &phase);
    const Part *part = &f->all;
    for (int l = 0; l < m->layers; ++l) {
        const Layer *layer = m->layer + l;
        normalise(pool, phase, m, part->x, T, layer->norm_attention, f->tiles, NULL);
        barrier(pool, &phase);
        multiply(pool, phase, &(Product){&layer->qkv, f->tiles, T, size, STORE, 1.0f, f->qkv, f->stride});
        barrier(pool, &phase);
        if (l == m->layers - 1) part = &f->kept;
        for (int t; (t = take(pool, phase, 1)) < T;) {
            float *q = f->qkv + t * f->stride, *k = q + (int64_t)m->heads * dim, *v = k + (int64_t)m->kv_heads * dim;
            const float *cosine = m->cosine + (int64_t)b->positions[t] * (dim / 2), *sine = m->sine + (int64_t)b->positions[t] * (dim / 2);
            for (int h = 0; h < m->heads; ++h) turn(q + h * dim, dim, layer->norm_query, m->eps, cosine, sine);
            for (int h = 0; h < m->kv_heads; ++h) turn(k + h * dim, dim, layer->norm_key, m->eps, cosine, sine);
            remember(m->halved, layer->keys, b->slots[t], k, m->kv_heads * dim);
            remember(m->halved, layer->values, b->slots[t], v, m->kv_heads * dim);
            if (part == &f->kept && part->place[t] >= 0)
                memcpy(part->x + (int64_t)part->place[t] * hidden, f->all.x + (int64_t)t * hidden, sizeof(float) * hidden);
        }
        barrier(pool, &phase);
        if (!part->rows) break;
        attend_all(pool, phase, f, part, layer, scratch);
        barrier(pool, &phase);
        size = tile_rows(part->rows);
        if (part == &f->kept) open_registers(m->paired, part->rows);
        multiply(pool, phase, &(Product){&layer->out, f->tiles, part->rows, size, ADD, m->residual_scale, part->x, hidden});
        barrier(pool, &phase);
        normalise(pool, phase, m, part->x, part->rows, layer->norm_mlp, f->tiles, NULL);
        barrier(pool, &phase);
        multiply(pool, phase, &(Product){&layer->gate_up, f->tiles, part->rows, size, GATE, 1.0f, f->wide, 0});
        barrier(pool, &phase);
        multiply(pool, phase, &(Product){&layer->down, f->wide, part->rows, size, ADD, m->residual_scale, part->x, hidden});
        barrier(pool, &phase);
    }
    if (part->rows) {
        normalise(pool, phase, m, part->x, part->rows, m->norm, f->tiles, b->hidden);
        barrier(pool, &phase);
        int64_t stride = (int64_t)m->head.panels * PANEL;
        multiply(pool, phase, &(Product){&m->head, f->tiles, part->rows, size, STORE, m->logit_scale, b->logits, stride});
        barrier(pool, &phase);
    }
    close_registers(m->paired);
}

INLINE size_t room(size_t *total, size_t bytes) {
    size_t at = *total;
    *total += (bytes + 63) / 64 * 64;
    return at;
}

/* Compute a batch. Keys and values of its tokens are written to their slots. Returns 0, or -1 without memory. */
int forward(Pool *pool, const Model *m, const Batch *b) {
    int T = b->tokens, units = 0, widest = m->hidden > m->heads * m->dim ? m->hidden : m->heads * m->dim;
    int64_t stride = (int64_t)m->layer[0].qkv.panels * PANEL, longest = 0, text = 0, nodes = 0, inner = (int64_t)m->layer[0].gate_up.panels * LANES;
    for (int r = 0; r < b->rows; ++r) {
        const Row *row = b->row + r;
        units += (row->count + QUERIES - 1) / QUERIES;
        text += row->length + row->count;
        if (row->longest > longest) longest = row->longest;
        if (row->parents) nodes += (int64_t)row->count * row->count;
    }
    longest = (longest + LANES) / LANES * LANES + LANES;
    size_t total = 0;
    size_t x = room(&total, sizeof(float) * T * m->hidden), kept = room(&total, sizeof(float) * b->kept * m->hidden);
    size_t tiles = room(&total, sizeof(float) * T * widest), wide = room(&total, sizeof(float) * T * inner);
    size_t qkv = room(&total, sizeof(float) * T * stride), scores = room(&total, sizeof(float) * pool->threads * TOGETHER * (longest + m->dim));
    size_t unit = room(&total, sizeof(Unit) * units), last = room(&total, sizeof(Unit) * T), place = room(&total, sizeof(int32_t) * T);
    size_t keys = room(&total, sizeof(int32_t *) * b->rows), paths = room(&total, sizeof(int32_t *) * T);
    size_t slots = room(&total, sizeof(int32_t) * (text + nodes));
    pthread_mutex_lock(&pool->busy);
    char *base = reserve(pool, total);
    if (!base) return pthread_mutex_unlock(&pool->busy), -1;
    int32_t *places = (int32_t *)(base + place);
    Forward f = {m, b, {(Unit *)(base + unit), 0, T, NULL, (float *)(base + x)}, {(Unit *)(base + last), 0, b->kept, places, (float *)(base + kept)},
                 (int32_t **)(base + keys), (int32_t **)(base + paths), (float *)(base + tiles), (float *)(base + wide), (float *)(base + qkv),
                 (float *)(base + scores), stride, longest};
    for (int t = 0; t < T; ++t) places[t] = -1;
    for (int i = 0; i < b->kept; ++i) places[b->keep[i]] = i;
    int32_t *at = (int32_t *)(base + slots);
    for (int r = 0; r < b->rows; ++r) {
        const Row *row = b->row + r;
        const int64_t *new = b->slots + row->start;
        f.keys[r] = at;
        for (int i = 0; i < row->length; ++i) *at++ = (int32_t)row->context[i];
        for (int i = 0; !row->parents && i < row->count; ++i) *at++ = (int32_t)new[i];
        for (int i = 0; row->parents && i < row->count; ++i) {
            int depth = b->positions[row->start + i] - row->length;
            f.paths[row->start + i] = at;
            at += depth + 1;
            for (int node = i, d = depth; d >= 0; node = row->parents[node], --d) f.paths[row->start + i][d] = (int32_t)new[node];
        }
        for (int first = 0; first < row->count; first += QUERIES)
            f.all.unit[f.all.units++] = (Unit){r, first, row->count - first < QUERIES ? row->count - first : QUERIES};
        for (int first = 0; first < row->count; ++first) {
            Unit *before = f.kept.unit + f.kept.units - 1;
            if (places[row->start + first] < 0) continue;
            if (f.kept.units && before->row == r && before->first + before->count == first && before->count < QUERIES) ++before->count;
            else f.kept.unit[f.kept.units++] = (Unit){r, first, 1};
        }
    }
    run(pool, forward_job, &f);
    return pthread_mutex_unlock(&pool->busy);
}

/* ---- a single product, for drafters ----------------------------------------------------------------------------------------------- */

typedef struct {
    const Linear *linear;
    const float *x;
    int rows;
    float *tiles, *y;
} Single;

static void linear_job(Pool *pool, int thread, const void *argument) {
    const Single *s = argument;
    unsigned phase = atomic_load(&pool->phase);
    int in = s->linear->in, size = tile_rows(s->rows);
    (void)thread;
    for (int m; (m = take(pool, phase, 1)) < s->rows;) {
        int step;
        float *out = tiled(s->tiles, s->rows, size, in, m, &step);
        for (int k = 0; k < in; ++k) out[(int64_t)k * step] = s->x[(int64_t)m * in + k];
    }
    barrier(pool, &phase);
    multiply(pool, phase, &(Product){s->linear, s->tiles, s->rows, size, STORE, 1.0f, s->y, (int64_t)s->linear->panels * PANEL});
    barrier(pool, &phase);
}

/* y [rows][panels * PANEL] = x [rows][in] by the weights, plus bias. Returns 0, or -1 without memory. */
int linear(Pool *pool, const Linear *weights, const float *x, int rows, float *y) {
    pthread_mutex_lock(&pool->busy);
    float *tiles = (float *)reserve(pool, sizeof(float) * rows * weights->in);
    if (tiles) run(pool, linear_job, &(Single){weights, x, rows, tiles, y});
    return pthread_mutex_unlock(&pool->busy), tiles ? 0 : -1;
}

/* ---- noise ------------------------------------------------------------------------------------------------------------------------ */

#define WIDE (LANES / 2)
typedef double vd __attribute__((vector_size(WIDE * 8), aligned(8), may_alias));
typedef int64_t vl __attribute__((vector_size(WIDE * 8), aligned(8), may_alias));
typedef uint32_t vh __attribute__((vector_size(WIDE * 4), aligned(4), may_alias));

/* ln x for positive normal x, to about a unit in the last place: x = 2^e m, and a series in (m - 1) / (m + 1). */
INLINE vd logarithm(vd x) {
    vl bits = (vl)x, shift = bits - 0x3fe6a09e667f3bcdLL; /* the exponent, counted so that m lies in [sqrt(1/2), sqrt(2)) */
    vl e = shift >> 52;
    vd m = (vd)(bits - (e << 52)), f = m - 1.0, s = f / (m + 1.0), z = s * s, n = __builtin_convertvector(e, vd);
    vd p = 1.0 / 21 + (vd){};
    p = p * z + 1.0 / 19;
    p = p * z + 1.0 / 17;
    p = p * z + 1.0 / 15;
    p = p * z + 1.0 / 13;
    p = p * z + 1.0 / 11;
    p = p * z + 1.0 / 9;
    p = p * z + 1.0 / 7;
    p = p * z + 1.0 / 5;
    p = p * z + 1.0 / 3;
    vd tail = 2.0 * s * z * p;
    return n * 0.693147180369123816490 + (2.0 * s + (tail + n * 1.90821492927058770002e-10));
}

INLINE vu mix(vu x) {
    x = (x ^ (x >> 16)) * 0x7FEB352Du;
    x = (x ^ (x >> 15)) * 0x846CA68Bu;
    return x ^ (x >> 16);
}

INLINE uint32_t mix_one(uint32_t x) {
    x = (x ^ (x >> 16)) * 0x7FEB352Du;
    x = (x ^ (x >> 15)) * 0x846CA68Bu;
    return x ^ (x >> 16);
}

#define STRETCH 4096 /* tokens of a row that one thread does at a time, a multiple of LANES */

typedef struct {
    const int64_t *seeds, *positions; /* [rows] */
    int rows;
    int64_t vocab;
    float *out; /* [rows][vocab] */
} Noise;

static void noise_job(Pool *pool, int thread, const void *argument) {
    const Noise *n = argument;
    unsigned phase = atomic_load(&pool->phase);
    int64_t vocab = n->vocab;
    int stretches = (int)((vocab + STRETCH - 1) / STRETCH);
    (void)thread;
    for (int piece; (piece = take(pool, phase, 1)) < n->rows * stretches;) {
        int row = piece / stretches;
        int64_t begin = (int64_t)(piece % stretches) * STRETCH, end = begin + STRETCH < vocab ? begin + STRETCH : vocab;
        uint32_t seed = mix_one((uint32_t)n->seeds[row]) + mix_one((uint32_t)((uint64_t)n->seeds[row] >> 32)) * 3;
        uint32_t key = mix_one(seed + (uint32_t)n->positions[row] * 0x9E3779B9u);
        for (int64_t first = begin; first < end; first += LANES) {
            uint32_t number[LANES], hashed[LANES];
            float noise[LANES];
            for (int i = 0; i < LANES; ++i) number[i] = key + (uint32_t)(first + i) * 0x85EBCA6Bu;
            *(vu *)hashed = mix(*(vu *)number);
            for (int half = 0; half < 2; ++half) {
                vd u = (__builtin_convertvector(*(vh *)(hashed + half * WIDE), vd) + 0.5) * 0x1p-32;
                vd g = -logarithm(-logarithm(u));
                for (int i = 0; i < WIDE; ++i) noise[half * WIDE + i] = (float)g[i];
            }
            memcpy(n->out + row * vocab + first, noise, sizeof(float) * (end - first < LANES ? end - first : LANES));
        }
    }
    barrier(pool, &phase);
}

/* Gumbel noise of every token for pairs of seed and position. seeds, positions: [rows]; out: [rows][vocab] */
void gumbel(Pool *pool, const int64_t *seeds, const int64_t *positions, int rows, int64_t vocab, float *out) {
    pthread_mutex_lock(&pool->busy);
    run(pool, noise_job, &(Noise){seeds, positions, rows, vocab, out});
    pthread_mutex_unlock(&pool->busy);
}

int lanes(void) { return LANES; }

/* ---- draws ------------------------------------------------------------------------------------------------------------------------ */

/* The best token of each row: of logits / temperature + noise, or of the bare logits at temperature 0; the first of equals, -1 if any is not
 * a number. logits, noise: [rows] rows of the vocabulary; out: [rows] */
void draw(const float *const *logits, int rows, int64_t vocab, const float *temperature, const float *const *noise, int64_t *out) {
    for (int row = 0; row < rows; ++row) {
        const float *x = logits[row], warmth = temperature[row];
        vf best = all(-INFINITY);
        vi where = {}, index, wrong = {};
        for (int i = 0; i < LANES; ++i) index[i] = i;
        for (int64_t first = 0; first < vocab; first += LANES, index += LANES) {
            float value[LANES], shift[LANES];
            int64_t many = vocab - first < LANES ? vocab - first : LANES;
            vf v;
            if (many < LANES) {
                for (int i = 0; i < LANES; ++i) value[i] = i < many ? x[first + i] : -INFINITY;
                for (int i = 0; i < LANES; ++i) shift[i] = i < many && warmth > 0 ? noise[row][first + i] : 0;
                v = load(value);
                if (warmth > 0) v = v / warmth + load(shift);
            } else {
                v = load(x + first);
                if (warmth > 0) v = v / warmth + load(noise[row] + first);
            }
            vi more = v > best;
            best = (vf)(((vi)v & more) | ((vi)best & ~more));
            where = (index & more) | (where & ~more);
            wrong |= v != v;
        }
        int chosen = 0, bad = 0;
        for (int i = 0; i < LANES; ++i) {
            bad |= wrong[i];
            if (best[i] > best[chosen] || (best[i] == best[chosen] && where[i] < where[chosen])) chosen = i;
        }
        out[row] = bad ? -1 : where[chosen];
    }
}

/* ---- drafting --------------------------------------------------------------------------------------------------------------------- */

typedef struct {
    Linear project, head;
    const float *embed, *scale, *shift; /* [vocab][width], the token's weight multiplied in; [width] */
} SpeculatorHead;

typedef struct {
    int32_t heads, inputs, width, scaled;
    int64_t vocab;
    const SpeculatorHead *head;
} Speculator;

typedef struct {
    const Speculator *speculator;
    int rows, depth;
    const float *const *hidden;     /* [rows] rows of `inputs` */
    const float *temperature;       /* [rows] */
    const float *const *noise;      /* [rows][depth] rows of the vocabulary, read where the temperature is above 0 */
    const int32_t *last;            /* [rows] */
    int64_t *paths;                 /* [rows][depth] */
    float *certain;                 /* [rows][depth] how sure the head is of its token, see `certainty` */
    float *tiles, *state, *logits;  /* [rows][inputs], [rows][panels * PANEL] twice */
} Chains;

#define SPECULATOR_EPS 1e-6f

/* x times the normal distribution's mass below x: Abramowitz and Stegun 7.1.26, to 2e-7. */
INLINE vf gelu(vf x) {
    vf z = x * 0.70710678118654752f, a = (vf)((vi)z & 0x7fffffff), t = 1.0f / (1.0f + 0.3275911f * a);
    vf p = ((((1.061405429f * t - 1.453152027f) * t + 1.421413741f) * t - 0.284496736f) * t + 0.254829592f) * t;
    vf tail = p * exponential(-(a * a)) * 0.5f; /* the mass beyond |x| */
    vi below = z < all(0.0f);
    return x * (vf)(((vi)tail & below) | ((vi)(1.0f - tail) & ~below));
}

/* One row's state after it has read a token: u = projection + embedding; GELU of its scaled and shifted RMS norm. */
INLINE void advance(float *u, const SpeculatorHead *head, int width, int64_t token, float *tiles, int step) {
    const float *embed = head->embed + token * width;
    for (int i = 0; i < width; i += LANES) store(u + i, load(u + i) + load(embed + i));
    float factor = inverse_rms(u, width, SPECULATOR_EPS), y[LANES];
    for (int i = 0; i < width; i += LANES) {
        vf v = gelu(load(u + i) * factor * load(head->scale + i) + load(head->shift + i));
        store(y, v);
        for (int j = 0; j < LANES; ++j) tiles[(int64_t)(i + j) * step] = y[j];
    }
}

/* The softmax of a row's scores (logits / warmth + noise, or the bare logits at 0) at its best token, whose place is given. */
static float certainty(const float *x, int64_t vocab, float warmth, const float *noise, int64_t best) {
    float rate = warmth > 0 ? 1.0f / warmth : 1.0f, total = 0, peak = x[best] * rate + (warmth > 0 ? noise[best] : 0);
    vf sum = {};
    int64_t whole = vocab - vocab % LANES;
    for (int64_t i = 0; i < whole; i += LANES) {
        vf v = load(x + i) * rate;
        if (warmth > 0) v += load(noise + i);
        v -= peak;
        sum += exponential((vf)(((vi)v & (v > all(-80.0f))) | ((vi)all(-80.0f) & ~(v > all(-80.0f)))));
    }
    for (int i = 0; i < LANES; ++i) total += sum[i];
    for (int64_t i = whole; i < vocab; ++i) {
        float v = x[i] * rate + (warmth > 0 ? noise[i] : 0) - peak, e[LANES];
        store(e, exponential(all(v > -80.0f ? v : -80.0f)));
        total += e[0];
    }
    return total >= 1 ? 1 / total : total > 0 ? 1 : 0;
}

/* A number that at least k of the row's are no less than: the k-th of the greatest in each lane. */
static float floor_of(const float *x, int64_t vocab, int k) {
    if (k > LANES || vocab < LANES) return -INFINITY;
    vf most = load(x);
    for (int64_t first = LANES; first + LANES <= vocab; first += LANES) {
        vf v = load(x + first);
        vi more = v > most;
        most = (vf)(((vi)v & more) | ((vi)most & ~more));
    }
    float sorted[LANES];
    for (int i = 0; i < LANES; ++i) {
        int at = i;
        for (; at && sorted[at - 1] < most[i]; --at) sorted[at] = sorted[at - 1];
        sorted[at] = most[i];
    }
    return sorted[k - 1];
}

/* The k best tokens of some rows of logits [..][stride], best first and the first of equals, and their log-softmax. k is at most vocab.
 * rows, places: [count], where they are and where they are written to; all_ids, all_logprobs: [..][k] */
void likeliest(const float *logits, int64_t stride, const int32_t *rows, const int32_t *places, int count, int64_t vocab, int k,
               int32_t *all_ids, float *all_logprobs) {
    for (int row = 0; row < count; ++row) {
        int32_t *ids = all_ids + (int64_t)places[row] * k;
        float *logprobs = all_logprobs + (int64_t)places[row] * k;
        const float *x = logits + rows[row] * stride;
        float bound = floor_of(x, vocab, k);
        int found = 0;
        for (int64_t first = 0; first < vocab; first += LANES) {
            int64_t end = vocab - first < LANES ? vocab : first + LANES;
            if (end == first + LANES) {
                vi able = load(x + first) >= all(bound);
                int any = 0;
                for (int i = 0; i < LANES; ++i) any |= able[i];
                if (!any) continue;
            }
            for (int64_t i = first; i < end; ++i) {
                if (!(found < k ? x[i] >= bound : x[i] > bound)) continue;
                int at = found < k ? found++ : k - 1;
                for (; at && logprobs[at - 1] < x[i]; --at) logprobs[at] = logprobs[at - 1], ids[at] = ids[at - 1];
                logprobs[at] = x[i], ids[at] = (int32_t)i;
                if (found == k) bound = logprobs[k - 1];
            }
        }
        float best = logprobs[0], sure = logf(certainty(x, vocab, 0, NULL, ids[0]));
        for (int i = 0; i < k; ++i) logprobs[i] = logprobs[i] - best + sure;
    }
}

/* Rows of float32 [..][stride] in bfloat16, rounded to the nearest and to even. rows, places: [count]; out: [..][width] */
void halved(const float *x, int64_t stride, const int32_t *rows, const int32_t *places, int count, int64_t width, uint16_t *out) {
    for (int row = 0; row < count; ++row)
        for (int64_t i = 0; i < width; ++i) {
            uint32_t bits;
            memcpy(&bits, x + rows[row] * stride + i, 4);
            out[places[row] * width + i] = (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
        }
}

static void chains_job(Pool *pool, int thread, const void *argument) {
    const Chains *c = argument;
    const Speculator *s = c->speculator;
    unsigned phase = atomic_load(&pool->phase);
    int rows = c->rows, size = tile_rows(rows), step;
    (void)thread;
    for (int r; (r = take(pool, phase, 1)) < rows;) {
        float factor = s->scaled ? inverse_rms(c->hidden[r], s->inputs, SPECULATOR_EPS) * 0.70710678118654752f : 1.0f;
        float *out = tiled(c->tiles, rows, size, s->inputs, r, &step);
        for (int k = 0; k < s->inputs; ++k) out[(int64_t)k * step] = c->hidden[r][k] * factor;
    }
    barrier(pool, &phase);
    for (int i = 0; i < c->depth; ++i) {
        const SpeculatorHead *head = s->head + i;
        int64_t wide = (int64_t)head->project.panels * PANEL, stride = (int64_t)head->head.panels * PANEL;
        multiply(pool, phase, &(Product){&head->project, c->tiles, rows, size, STORE, 1.0f, c->state, wide});
        barrier(pool, &phase);
        for (int r; (r = take(pool, phase, 1)) < rows;) {
            int64_t token = i ? c->paths[(int64_t)r * c->depth + i - 1] : c->last[r];
            float *out = tiled(c->tiles, rows, size, s->width, r, &step);
            advance(c->state + r * wide, head, s->width, token, out, step);
        }
        barrier(pool, &phase);
        multiply(pool, phase, &(Product){&head->head, c->tiles, rows, size, STORE, 1.0f, c->logits, stride});
        barrier(pool, &phase);
        for (int r; (r = take(pool, phase, 1)) < rows;) {
            int64_t *token = c->paths + (int64_t)r * c->depth + i;
            const float *logits = c->logits + r * stride, *const *noise = c->noise + (int64_t)r * c->depth + i;
            draw(&logits, 1, s->vocab, c->temperature + r, noise, token);
            int sane = *token >= 0;
            if (!sane) *token = 0; /* logits that are not numbers draft anything */
            c->certain[(int64_t)r * c->depth + i] = sane ? certainty(logits, s->vocab, c->temperature[r], *noise, *token) : 0;
        }
        barrier(pool, &phase);
    }
}

/* Draft one chain for every row: the best token of each head in the noise of its position. Returns 0, or -1 without memory. */
int chains(Pool *pool, const Speculator *s, Chains *c) {
    size_t total = 0;
    int most = s->inputs > s->width ? s->inputs : s->width;
    int64_t wide = 0, stride = 0;
    for (int i = 0; i < c->depth; ++i) {
        if ((int64_t)s->head[i].project.panels * PANEL > wide) wide = (int64_t)s->head[i].project.panels * PANEL;
        if ((int64_t)s->head[i].head.panels * PANEL > stride) stride = (int64_t)s->head[i].head.panels * PANEL;
    }
    size_t tiles = room(&total, sizeof(float) * c->rows * most), state = room(&total, sizeof(float) * c->rows * wide);
    size_t logits = room(&total, sizeof(float) * c->rows * stride);
    pthread_mutex_lock(&pool->busy);
    char *base = reserve(pool, total);
    if (base) {
        c->speculator = s;
        c->tiles = (float *)(base + tiles), c->state = (float *)(base + state), c->logits = (float *)(base + logits);
        run(pool, chains_job, c);
    }
    return pthread_mutex_unlock(&pool->busy), base ? 0 : -1;
}
