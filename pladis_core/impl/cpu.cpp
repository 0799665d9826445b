// PLADIS attention for a CPU: a tile of queries goes through scores, softmax, entmax, mix and product with V in cache.
//
// The lanes of a vector are neighbouring queries, so that no reduction over keys crosses lanes. The threshold is found
// as in eager.py, whose docstring has the mathematics. Compiled by cpu.py for the machine it runs on.

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__)
enum { LANES = 16 };
#elif defined(__AVX__)
enum { LANES = 8 };
#else
enum { LANES = 4 };
#endif
// vectors of queries in a tile; value columns that a block of the second product holds in registers
enum { WIDTH = 3, TILE = WIDTH * LANES, COLUMNS = 2 * LANES };

typedef float vec __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

// mirrored by cpu.py, field by field; strides in elements, the last dimension of the query contiguous, key
// [batch, kv_heads, keys, width], value [batch, kv_heads, columns / COLUMNS, keys, COLUMNS], gain [batch, kv_heads]
struct Problem {
    const float *query, *key, *value, *gain, *mask, *row_lse;
    float *out;
    int64_t batch, heads, kv_heads, queries, keys, width, value_width, columns;
    int64_t query_stride[3], mask_stride[4], row_lse_stride[3], out_stride[3];
    int64_t steps, threads;
    float alpha, dense, sparse;
};

// below it 1 + x forgets the digits of x that entmax near softmax needs
static const float SMALL_ALPHA = 1.05f;
// sums of weights are about 1, and 0 where all is masked: then no lambda may make the quotient infinite
static const float LEAST_SUM = 1e-20f;
static const float TINY = 1.17549435e-38f, LARGE = 3.40282347e38f, LOWEST_EXP = -87.3365f;

// one number per query of a tile
struct row {
    vec v[WIDTH];
};

template <class F>
static inline row map(F f) {
    row r;
    for (int i = 0; i < WIDTH; i++) r.v[i] = f(i);
    return r;
}
static inline row fill(float x) {
    return map([&](int) { return vec{} + x; });
}
#define OPERATOR(op)                                                                              \
    static inline row operator op(row a, row b) { return map([&](int i) { return a.v[i] op b.v[i]; }); } \
    static inline row operator op(row a, float b) { return map([&](int i) { return a.v[i] op b; }); }
OPERATOR(+) OPERATOR(-) OPERATOR(*) OPERATOR(/)
#undef OPERATOR

// comparisons are written so that NaN stays
static inline vec at_least(vec x, float low) { return x < low ? vec{} + low : x; }
static inline row at_least(row x, float low) {
    return map([&](int i) { return at_least(x.v[i], low); });
}
static inline row larger(row a, row b) {
    return map([&](int i) { return b.v[i] < a.v[i] ? a.v[i] : b.v[i]; });
}

static inline bool same(row a, row b) {
    ivec equal = a.v[0] == b.v[0];
    for (int i = 1; i < WIDTH; i++) equal &= a.v[i] == b.v[i];
    int all = -1;
    for (int l = 0; l < LANES; l++) all &= equal[l];
    return all;
}

// f of every single number
template <class F>
static inline row each(F f) {
    row r;
    for (int i = 0; i < TILE; i++) ((float *)&r)[i] = f(i);
    return r;
}

// e^x for x <= 88, and 0 where float has no normal number for it (Cephes' polynomial)
static inline vec exponential(vec x) {
    vec clamped = at_least(x, LOWEST_EXP);
    vec shifted = clamped * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the integer nearest, in the low bits
    vec n = shifted - 12582912.0f;
    vec r = clamped - n * 0.693359375f + n * 2.12194440e-4f;
    vec p = 1.9875691500e-4f * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    vec scaled = (vec)((ivec)p + ((ivec)shifted << 23));
    return x < LOWEST_EXP ? vec{} : scaled;
}
static inline row exponential(row x) {
    return map([&](int i) { return exponential(x.v[i]); });
}

// log(1 + x), given w = 1 + x > 0 (Cephes' polynomial); SMALL: to full relative precision near 0, Kahan's way, where
// log(w) * x / (w - 1) undoes the rounding of w
template <bool SMALL>
static inline vec log_one_plus(vec x, vec w) {
    ivec bits = (ivec)w;
    ivec e = (bits - 0x3f3504f3) >> 23;  // w = (1 + m) * 2^e, sqrt(1/2) <= 1 + m < sqrt(2)
    vec m = (vec)(bits - (e << 23)) - 1.0f;
    vec n = __builtin_convertvector(e, vec);
    vec z = m * m;
    vec p = 7.0376836292e-2f * m - 1.1514610310e-1f;
    p = p * m + 1.1676998740e-1f;
    p = p * m - 1.2420140846e-1f;
    p = p * m + 1.4249322787e-1f;
    p = p * m - 1.6668057665e-1f;
    p = p * m + 2.0000714765e-1f;
    p = p * m - 2.4999993993e-1f;
    p = p * m + 3.3333331174e-1f;
    vec log = n * -2.12194440e-4f + p * m * z - 0.5f * z + m + n * 0.693359375f;
    if (!SMALL) return log;
    return w == 1.0f ? x : log * x / (w - 1.0f);
}

// sums of z^p, and of z^(p - 1) a constant factor apart, for the Newton step
struct moments {
    row total, slope;
};
static inline moments operator+(moments a, moments b) { return {a.total + b.total, a.slope + b.slope}; }

// sum of term(first) ... term(end - 1), pairwise: a running sum loses digits, which a threshold cannot spare
template <class Sum, class Term>
static Sum sum_of(int64_t first, int64_t end, Term term) {
    if (end - first > 16) {
        int64_t middle = (first + end) / 2;
        return sum_of<Sum>(first, middle, term) + sum_of<Sum>(middle, end, term);
    }
    Sum sum = {};
    for (int64_t k = first; k < end; k++) sum = sum + term(k);
    return sum;
}

// c[i][j] = sum_k a[i * ai + k * ak] * b[k][j], or += where ADD, for R rows and C vectors of columns
template <int R, int C, bool ADD = false>
static inline void block(const float *a, int64_t ai, int64_t ak, const float *b, int64_t bk, int64_t n, float *c,
                         int64_t ci) {
    vec sum[R][C] = {};
    for (int64_t k = 0; k < n; k++)
        for (int i = 0; i < R; i++)
            for (int j = 0; j < C; j++) sum[i][j] += a[i * ai + k * ak] * ((const vec *)(b + k * bk))[j];
    for (int i = 0; i < R; i++)
        for (int j = 0; j < C; j++) {
            vec *to = (vec *)(c + i * ci) + j;
            *to = ADD ? *to + sum[i][j] : sum[i][j];
        }
}

// scores of all keys against the tile of queries q, [width][TILE]; the last block overlaps the one before
static void scores(const float *key, int64_t keys, const float *q, int64_t width, float *s) {
    enum { R = 4 };
    if (keys < R)
        for (int64_t k = 0; k < keys; k++)
            block<1, WIDTH>(key + k * width, width, 1, q, TILE, width, s + k * TILE, TILE);
    else
        for (int64_t i = 0; i < keys; i += R) {
            int64_t k = i + R <= keys ? i : keys - R;
            block<R, WIDTH>(key + k * width, width, 1, q, TILE, width, s + k * TILE, TILE);
        }
}

// o[TILE][columns]: the weights w, [keys][TILE], times the values; a slab of keys at a time, which stays in L1
static void weighted(const float *w, const float *value, int64_t keys, int64_t columns, float *o) {
    enum { R = 6, SLAB = 128 };
    static_assert(TILE % R == 0, "blocks that overlap would add twice");
    for (int64_t k = 0; k < keys; k += SLAB)
        for (int64_t d = 0; d < columns; d += COLUMNS)
            for (int64_t i = 0; i < TILE; i += R) {
                const float *a = w + k * TILE + i, *b = value + d * keys + k * COLUMNS;
                int64_t n = keys - k < SLAB ? keys - k : SLAB;
                if (k == 0) block<R, 2>(a, 1, TILE, b, COLUMNS, n, o + i * columns + d, columns);
                else block<R, 2, true>(a, 1, TILE, b, COLUMNS, n, o + i * columns + d, columns);
            }
}

// scores in, gain * scores + mask minus its maximum out; returns the maximum. common.py: centred
static row centre(const Problem &p, const float *mask, int64_t lanes, float gain, row *s) {
    if (mask)
        for (int64_t k = 0; k < p.keys; k++)
            s[k] = each([&](int i) {
                float bias = mask[(i < lanes ? i : 0) * p.mask_stride[2] + k * p.mask_stride[3]];
                float x = ((float *)&s[k])[i] * gain;
                x = x < -LARGE / 4 ? -LARGE / 4 : x > LARGE / 4 ? LARGE / 4 : x;
                return x + (bias > LARGE / 4 ? LARGE / 4 : bias);
            });
    float after = mask ? 1.0f : gain;
    row peak = fill(-LARGE);
    for (int64_t k = 0; k < p.keys; k++) peak = larger(peak, s[k]);
    for (int64_t k = 0; k < p.keys; k++) s[k] = (s[k] - peak) * after;
    return peak * after;
}

// a threshold left of the root, plus 1 / b. eager.py: _start
static row start(const row *s, int64_t keys, float b) {
    row mean = sum_of<row>(0, keys, [&](int64_t k) { return s[k]; }) / (float)keys;
    return at_least(mean - (float)(expm1(-b * log((double)keys)) / b), 0.0f);
}

// entmax-1.5, or sparsemax, a constant factor apart, into w; returns the sum. eager.py: _polynomial_numerators
template <bool SQUARE>
static row polynomial(const row *s, row *w, int64_t keys, int64_t steps) {
    row tau = start(s, keys, SQUARE ? 0.5f : 1.0f) - (SQUARE ? 2.0f : 1.0f), step = {};
    for (int64_t i = 0; i < steps; i++) {
        tau = tau + step;
        moments m = sum_of<moments>(0, keys, [&](int64_t k) -> moments {
            row z = at_least(s[k] - tau, 0.0f);
            if (SQUARE) return {z * z, z};
            return {z, map([&](int i) { return z.v[i] > 0.0f ? vec{} + 1.0f : vec{}; })};
        });
        row norm = SQUARE ? each([&](int i) { return sqrtf(((float *)&m.total)[i]); }) : m.total;
        step = SQUARE ? (norm - 2.0f) * norm / at_least(m.slope, TINY) : (norm - 1.0f) / at_least(m.slope, 1.0f);
        if (same(tau + step, tau)) break;
    }
    return sum_of<row>(0, keys, [&](int64_t k) {
        row z = at_least(s[k] - tau - step, 0.0f);
        return w[k] = SQUARE ? z * z : z;
    });
}

// any other alpha; the slopes z^(p - 1) beside the weights z^p. eager.py: _generic_numerators
template <bool SMALL>
static row generic(const row *s, row *w, row *slopes, int64_t keys, float alpha, int64_t steps) {
    float b = alpha - 1.0f;
    row u = start(s, keys, b);
    moments m = {};
    for (int64_t i = 0; i <= steps; i++) {
        m = sum_of<moments>(0, keys, [&](int64_t k) -> moments {
            row x = at_least((s[k] - u) * b, -1.0f), base = at_least(x + 1.0f, TINY);
            row log = map([&](int i) { return log_one_plus<SMALL>(x.v[i], base.v[i]); });
            w[k] = exponential(log * (1.0f / b));
            slopes[k] = w[k] / base;
            return {w[k], slopes[k]};
        });
        m.slope = at_least(m.slope, TINY);
        if (i == steps) break;
        row next = u + each([&](int i) {
            float sum = ((float *)&m.total)[i], log_sum = logf(sum < TINY ? TINY : sum);
            float step = expm1f(log_sum * b) * expf(log_sum * (1.0f - b)) / b / ((float *)&m.slope)[i];
            return step < -1.0f ? -1.0f : step;
        });
        if (same(next, u)) break;
        u = next;
    }
    row last = (fill(1.0f) - m.total) / m.slope;
    return sum_of<row>(0, keys, [&](int64_t k) { return w[k] = w[k] + slopes[k] * last; });
}

// centred scores in, mass * (dense * softmax + sparse * entmax) out, in place. eager.py: _mix
static void mix(const Problem &p, row *s, row *w, row *slopes, row peak, const float *row_lse, int64_t lanes) {
    bool entmax = p.sparse != 0.0f;
    row sum = {}, mass = fill(1.0f);
    if (entmax && p.alpha == 1.5f) sum = polynomial<true>(s, w, p.keys, p.steps);
    else if (entmax && p.alpha == 2.0f) sum = polynomial<false>(s, w, p.keys, p.steps);
    else if (entmax && p.alpha < SMALL_ALPHA) sum = generic<true>(s, w, slopes, p.keys, p.alpha, p.steps);
    else if (entmax) sum = generic<false>(s, w, slopes, p.keys, p.alpha, p.steps);
    row total = sum_of<row>(0, p.keys, [&](int64_t k) { return s[k] = exponential(s[k]); });
    if (row_lse)
        mass = each([&](int i) {
            float own = ((float *)&total)[i], lse = row_lse[(i < lanes ? i : 0) * p.row_lse_stride[2]];
            float part = expf(((float *)&peak)[i] + logf(own) - lse);
            return own == 0.0f ? 0.0f : part > 1.0f ? 1.0f : part;
        });
    row on_dense = mass * p.dense / at_least(total, LEAST_SUM), on_sparse = mass * p.sparse / at_least(sum, LEAST_SUM);
    for (int64_t k = 0; k < p.keys; k++) s[k] = entmax ? on_dense * s[k] + on_sparse * w[k] : on_dense * s[k];
}

// `lanes` queries of one head, from query `first` on; the rest of the tile repeats the first of them
static void tile(const Problem &p, int64_t b, int64_t h, int64_t first, int64_t lanes, float *scratch) {
    float *s = scratch, *w = s + p.keys * TILE, *slopes = w + p.keys * TILE;
    float *q = slopes + p.keys * TILE, *o = q + p.width * TILE;
    int64_t kv = b * p.kv_heads + h / (p.heads / p.kv_heads);
    const float *query = p.query + b * p.query_stride[0] + h * p.query_stride[1] + first * p.query_stride[2];
    const float *mask = p.mask, *row_lse = p.row_lse;
    if (mask) mask += b * p.mask_stride[0] + h * p.mask_stride[1] + first * p.mask_stride[2];
    if (row_lse) row_lse += b * p.row_lse_stride[0] + h * p.row_lse_stride[1] + first * p.row_lse_stride[2];

    // the next tile's rows lie too far apart for the processor to see them coming
    for (int64_t i = TILE; i < 2 * TILE; i++)
        for (int64_t d = 0; d < p.width; d += 16) __builtin_prefetch(query + i * p.query_stride[2] + d);
    for (int64_t i = 0; i < TILE; i++)
        for (int64_t d = 0; d < p.width; d++) q[d * TILE + i] = query[(i < lanes ? i : 0) * p.query_stride[2] + d];
    scores(p.key + kv * p.keys * p.width, p.keys, q, p.width, s);
    row peak = centre(p, mask, lanes, p.gain[kv], (row *)s);
    mix(p, (row *)s, (row *)w, (row *)slopes, peak, row_lse, lanes);
    weighted(s, p.value + kv * p.keys * p.columns, p.keys, p.columns, o);
    float *out = p.out + b * p.out_stride[0] + h * p.out_stride[1] + first * p.out_stride[2];
    for (int64_t i = 0; i < lanes; i++) memcpy(out + i * p.out_stride[2], o + i * p.columns, p.value_width * 4);
}

extern "C" int64_t pladis_columns() { return COLUMNS; }

// 0, or 1 where memory ran out
extern "C" int pladis_attend(const Problem *problem) {
    const Problem &p = *problem;
    int64_t tiles = (p.queries + TILE - 1) / TILE, failed = 0;
    size_t bytes = (3 * p.keys + p.width + p.columns) * sizeof(row);
#pragma omp parallel num_threads(p.threads) reduction(+ : failed)
    {
        void *memory = NULL;
        failed += posix_memalign(&memory, 64, bytes) != 0;
#pragma omp for schedule(static)
        for (int64_t i = 0; i < p.batch * p.heads * tiles; i++) {
            int64_t head = i / tiles, first = i % tiles * TILE;
            int64_t lanes = p.queries - first < TILE ? p.queries - first : TILE;
            if (memory) tile(p, head / p.heads, head % p.heads, first, lanes, (float *)memory);
        }
        free(memory);
    }
    return failed != 0;
}
