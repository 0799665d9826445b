// PLADIS attention for a CPU: a tile of queries goes through scores, softmax, entmax, mix and product with V in cache.
//
// The lanes of a vector are neighbouring queries, so that no reduction over keys crosses lanes. The threshold is found as
// in eager.py, whose docstring has the mathematics. Compiled by cpu.py for the machine it runs on; needs GCC or Clang.

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
// vectors of queries in a tile; vectors of value columns that a block of the second product holds in registers
enum { WIDTH = 3, COLUMNS = 2, TILE = WIDTH * LANES };

typedef float vec __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

// mirrored by cpu.py, field by field; strides in elements, the last dimension of query, key and value contiguous
struct Problem {
    const float *query, *key, *value, *gain, *mask, *row_lse;
    float *out;
    int64_t batch, heads, kv_heads, queries, keys, width, value_width, padded_width;
    int64_t query_stride[3], mask_stride[4], row_lse_stride[3], out_stride[3];
    int64_t steps, threads;
    float alpha, dense, sparse;
};

static const float TINY = 1.17549435e-38f, LARGE = 3.40282347e38f, LOWEST_EXP = -87.3365f;

// comparisons are written so that NaN stays
static inline vec at_least(vec x, float low) { return x < low ? vec{} + low : x; }
static inline vec at_most(vec x, float high) { return x > high ? vec{} + high : x; }
static inline vec larger(vec a, vec b) { return a > b ? a : b; }
static inline vec root(vec x) {
    for (int i = 0; i < LANES; i++) x[i] = sqrtf(x[i]);
    return x;
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

// log(1 + x) for x > -1, relative accuracy also near 0: log(w) * x / (w - 1) undoes the rounding of w = 1 + x
static inline vec log_one_plus(vec x, vec w) {
    ivec bits = (ivec)w;
    ivec e = (bits - 0x3f3504f3) >> 23;  // w = m * 2^e, sqrt(1/2) <= m < sqrt(2)
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
    return w == 1.0f ? x : log * x / (w - 1.0f);
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
        for (int j = 0; j < C; j++) ((vec *)(c + i * ci))[j] = ADD ? ((vec *)(c + i * ci))[j] + sum[i][j] : sum[i][j];
}

// scores of all keys against the tile of queries q, [width][TILE]; the last block overlaps the one before
static void scores(const float *key, int64_t keys, const float *q, int64_t width, float *s) {
    enum { R = 4 };
    if (keys < R)
        for (int64_t k = 0; k < keys; k++) block<1, WIDTH>(key + k * width, width, 1, q, TILE, width, s + k * TILE, TILE);
    else
        for (int64_t i = 0; i < keys; i += R) {
            int64_t k = i + R <= keys ? i : keys - R;
            block<R, WIDTH>(key + k * width, width, 1, q, TILE, width, s + k * TILE, TILE);
        }
}

// o[TILE][width] = the weights w, [keys][TILE], times the values; a slab of keys at a time, see sum_of
static void weighted(const float *w, const float *value, int64_t keys, int64_t width, float *o) {
    enum { R = 6, SLAB = 512 };
    static_assert(TILE % R == 0, "blocks that overlap would add twice");
    for (int64_t k = 0; k < keys; k += SLAB)
        for (int64_t d = 0; d < width; d += COLUMNS * LANES)
            for (int64_t i = 0; i < TILE; i += R) {
                const float *a = w + k * TILE + i, *b = value + k * width + d;
                int64_t n = keys - k < SLAB ? keys - k : SLAB;
                if (k == 0) block<R, COLUMNS>(a, 1, TILE, b, width, n, o + i * width + d, width);
                else block<R, COLUMNS, true>(a, 1, TILE, b, width, n, o + i * width + d, width);
            }
}

// sum of term(0) ... term(n - 1), on two levels: a running sum of thousands loses digits
template <class Term>
static inline vec sum_of(int64_t n, Term term) {
    vec sum = {};
    for (int64_t start = 0; start < n; start += 64) {
        vec part = {};
        for (int64_t k = start; k < n && k < start + 64; k++) part += term(k);
        sum += part;
    }
    return sum;
}

// scores in, gain * scores + mask minus its maximum out; returns the maximum. eager.py: common.centred
static void centre(const Problem &p, const float *mask, int64_t lanes, float gain, vec *s, vec *peak) {
    int64_t n = p.keys * WIDTH;
    if (mask)
        for (int64_t k = 0; k < p.keys; k++)
            for (int64_t i = 0; i < TILE; i++) {
                float bias = mask[(i < lanes ? i : 0) * p.mask_stride[2] + k * p.mask_stride[3]];
                float x = ((float *)s)[k * TILE + i] * gain;
                x = x < -LARGE / 4 ? -LARGE / 4 : x > LARGE / 4 ? LARGE / 4 : x;
                ((float *)s)[k * TILE + i] = x + (bias > LARGE / 4 ? LARGE / 4 : bias);
            }
    float after = mask ? 1.0f : gain;
    for (int w = 0; w < WIDTH; w++) {
        vec top = vec{} - LARGE;
        for (int64_t k = w; k < n; k += WIDTH) top = larger(s[k], top);
        for (int64_t k = w; k < n; k += WIDTH) s[k] = (s[k] - top) * after;
        peak[w] = top * after;
    }
}

// eager.py: _start. A threshold left of the root, plus 1 / b
static vec start(const vec *s, int64_t keys, float b) {
    vec sum = sum_of(keys, [&](int64_t k) { return s[k * WIDTH]; });
    return at_least(sum / (float)keys - (float)(expm1(-b * log((double)keys)) / b), 0.0f);
}

// entmax-1.5 (square) or sparsemax, a constant factor apart, into w; returns the sum. eager.py: _polynomial_numerators
template <bool SQUARE>
static vec polynomial(const vec *s, vec *w, int64_t keys, int64_t steps) {
    vec tau = start(s, keys, SQUARE ? 0.5f : 1.0f) - (SQUARE ? 2.0f : 1.0f), step = {};
    for (int64_t i = 0; i < steps; i++) {
        tau += step;
        vec total = {}, other = {};
        for (int64_t k = 0; k < keys; k++) {
            vec z = at_least(s[k * WIDTH] - tau, 0.0f);
            total += z;
            other += SQUARE ? z * z : (z > 0.0f ? vec{} + 1.0f : vec{});
        }
        vec norm = SQUARE ? root(other) : total;
        step = SQUARE ? (norm - 2.0f) * norm / at_least(total, TINY) : (norm - 1.0f) / at_least(other, 1.0f);
    }
    return sum_of(keys, [&](int64_t k) {
        vec z = at_least(s[k * WIDTH] - tau - step, 0.0f);
        return w[k * WIDTH] = SQUARE ? z * z : z;
    });
}

// z^p and z^(p-1), a constant factor apart, z = [s - tau]_+, tau = u - p
static inline void powers(vec s, vec u, float b, vec *weight, vec *slope) {
    vec x = at_least((s - u) * b, -1.0f);
    vec base = at_least(x + 1.0f, TINY);
    *weight = exponential(log_one_plus(x, base) * (1.0f / b));
    *slope = *weight / base;
}

// any other alpha; w needs room for the slopes behind it. eager.py: _generic_numerators
static vec generic(const vec *s, vec *w, vec *slopes, int64_t keys, float alpha, int64_t steps) {
    float b = alpha - 1.0f;
    vec u = start(s, keys, b), total = {}, slope = {};
    for (int64_t i = 0; i <= steps; i++) {
        total = slope = vec{};
        for (int64_t k = 0; k < keys; k++) {
            powers(s[k * WIDTH], u, b, &w[k * WIDTH], &slopes[k * WIDTH]);
            total += w[k * WIDTH];
            slope += slopes[k * WIDTH];
        }
        slope = at_least(slope, TINY);
        if (i == steps) break;
        for (int l = 0; l < LANES; l++) {
            float log_total = logf(total[l] < TINY ? TINY : total[l]);
            float step = expm1f(log_total * b) * expf(log_total * (1.0f - b)) / b / slope[l];
            u[l] += step < -1.0f ? -1.0f : step;
        }
    }
    vec last = (1.0f - total) / slope;
    return sum_of(keys, [&](int64_t k) { return w[k * WIDTH] += slopes[k * WIDTH] * last; });
}

// centred scores in, mass * (dense * softmax + sparse * entmax) out, in place; w is scratch. eager.py: _mix
static void mix(const Problem &p, vec *s, vec *w, vec *slopes, vec peak, vec row_lse) {
    bool entmax = p.sparse != 0.0f;
    vec sum = {};
    if (entmax && p.alpha == 1.5f) sum = polynomial<true>(s, w, p.keys, p.steps);
    else if (entmax && p.alpha == 2.0f) sum = polynomial<false>(s, w, p.keys, p.steps);
    else if (entmax) sum = generic(s, w, slopes, p.keys, p.alpha, p.steps);
    vec total = sum_of(p.keys, [&](int64_t k) { return s[k * WIDTH] = exponential(s[k * WIDTH]); });
    vec mass = vec{} + 1.0f;
    if (p.row_lse)
        for (int l = 0; l < LANES; l++) {
            float part = expf(peak[l] + logf(total[l]) - row_lse[l]);
            mass[l] = total[l] == 0.0f ? 0.0f : part > 1.0f ? 1.0f : part;
        }
    vec on_dense = mass * p.dense / at_least(total, TINY), on_sparse = mass * p.sparse / at_least(sum, TINY);
    for (int64_t k = 0; k < p.keys; k++) {
        vec weight = on_dense * s[k * WIDTH];
        s[k * WIDTH] = entmax ? weight + on_sparse * w[k * WIDTH] : weight;
    }
}

// `lanes` queries of one head, from query `first` on
static void tile(const Problem &p, int64_t b, int64_t h, int64_t first, int64_t lanes, float *scratch) {
    int64_t kv = b * p.kv_heads + h / (p.heads / p.kv_heads);
    float *q = scratch, *s = q + p.width * TILE, *w = s + p.keys * TILE, *slopes = w + p.keys * TILE;
    float *o = slopes + p.keys * TILE;
    const float *query = p.query + b * p.query_stride[0] + h * p.query_stride[1] + first * p.query_stride[2];
    for (int64_t i = 0; i < TILE; i++)
        for (int64_t d = 0; d < p.width; d++) q[d * TILE + i] = query[(i < lanes ? i : 0) * p.query_stride[2] + d];
    scores(p.key + kv * p.keys * p.width, p.keys, q, p.width, s);

    const float *mask = p.mask;
    if (mask) mask += b * p.mask_stride[0] + h * p.mask_stride[1] + first * p.mask_stride[2];
    vec peak[WIDTH], lse[WIDTH] = {};
    centre(p, mask, lanes, p.gain[kv], (vec *)s, peak);
    if (p.row_lse)
        for (int64_t i = 0; i < TILE; i++)
            ((float *)lse)[i] = p.row_lse[b * p.row_lse_stride[0] + h * p.row_lse_stride[1] +
                                          (first + (i < lanes ? i : 0)) * p.row_lse_stride[2]];
    for (int i = 0; i < WIDTH; i++) mix(p, (vec *)s + i, (vec *)w + i, (vec *)slopes + i, peak[i], lse[i]);

    weighted(s, p.value + kv * p.keys * p.padded_width, p.keys, p.padded_width, o);
    float *out = p.out + b * p.out_stride[0] + h * p.out_stride[1] + first * p.out_stride[2];
    for (int64_t i = 0; i < lanes; i++) memcpy(out + i * p.out_stride[2], o + i * p.padded_width, p.value_width * 4);
}

// the multiple of columns to which cpu.py pads the values
extern "C" int64_t pladis_columns() { return COLUMNS * LANES; }

// 0, or 1 where memory ran out
extern "C" int pladis_attend(const Problem *problem) {
    const Problem &p = *problem;
    int64_t tiles = (p.queries + TILE - 1) / TILE, failed = 0;
    size_t floats = (p.width + 3 * p.keys + p.padded_width) * TILE;
#pragma omp parallel num_threads(p.threads) reduction(+ : failed)
    {
        void *memory = NULL;
        failed += posix_memalign(&memory, 64, floats * 4) != 0;
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
