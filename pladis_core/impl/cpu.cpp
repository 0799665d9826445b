// PLADIS attention for a CPU: a tile of queries goes through scores, softmax, entmax, mix and product with V in cache.
//
// The lanes of a vector are neighbouring queries, so that no reduction over keys crosses lanes. The threshold is found
// as in eager.py, whose docstring has the mathematics, but a vector takes no more steps once one was small enough.
// Compiled by cpu.py for the machine it runs on.
//
// Of one query (PLADIS, eq. 11; entmax: Peters, Niculae, Martins 2019, eq. 10):
//
//     out = mass * sum_k (dense * softmax(c)_k + sparse * entmax(c)_k) * value_k
//     entmax(c)_k = (b * z_k)^(1 / b),   z_k = [c_k - tau]_+,   tau such that these sum to 1
//
// Symbols
//     dense, sparse  1 - lambda and lambda; of the correction alone, -lambda and lambda
//     mass           1, or what of a longer row's softmax lies on these keys
//     s, c           scores; c once they are centred: times gain, plus the mask, minus the row's maximum, so c <= 0
//     peak           that maximum
//     b              alpha - 1. eager.py and comments here call 1 / b p; in code p is the Problem, or a polynomial
//     tau, u         the threshold, and u = tau + 1 / b, which stays small where alpha is near 1
//     base           b * z = 1 + b * (c - u)
//     step           Newton's, on the norm ||z||_p. The last one is not added to tau, or u, but to z, or the base
//     m              sums over keys, from which a step is made. m.a, m.b: of z^2 and z (alpha 1.5), of z and its
//                    support (2), of base^p and base^(p - 1) (any other)
//     w              numerators of entmax, a constant factor apart
//     kv             a head of key and value, which heads / kv_heads heads of queries share
//
// Buffers, the last dimension contiguous
//     key    [keys][width]                       s, w   [keys][TILE], of a vector of queries [keys][WIDTH] vectors
//     value  [columns / COLUMNS][keys][COLUMNS]  q      [width][TILE]
//                                                o      [TILE][columns]
//     columns is the value's width, rounded up to a multiple of COLUMNS. TILE x COLUMNS is 48 x 32 with AVX-512,
//     24 x 16 with AVX, else 12 x 8. s, w, q and o are a thread's scratch memory.
//
// What runs, outermost first
//     pladis_attend    every tile of every head of every batch, shared out to threads in order
//     tile             one of them:
//       load_queries     q, transposed
//       scores           s = key * q, in blocks of 4 keys x WIDTH vectors of queries, 12 sums in registers
//       centre           c, for a vector of queries at a time, as everything up to `weighted`
//       mix, mix_some    the weights of eq. 11, into s:
//         numerators       of softmax and entmax, and their sums
//           start            a threshold left of the root
//           polynomial       Newton's steps for alpha 1.5 and 2, each a pass over the keys; settle: what is left over
//           generic          for any other
//       weighted         o = weights * value, a slab of 128 keys at a time, in blocks of 6 queries x 2 vectors of
//                        columns, or 12 x 1: 12 sums in registers

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <utility>

#if defined(__AVX512F__)
enum { LANES = 16 };
#elif defined(__AVX__)
enum { LANES = 8 };
#else
enum { LANES = 4 };
#endif
// vectors of queries in a tile; value columns that a block of the second product holds in registers; terms of quick
enum { WIDTH = 3, TILE = WIDTH * LANES, COLUMNS = 2 * LANES, QUICK_TERMS = 8 };

typedef float vec __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

// mirrored by cpu.py, field by field; strides in elements, the last dimension of query and out contiguous
// rise, tolerance, squarings, quick: cpu.py
struct Problem {
    const float *query;    // [batch, heads, queries, width], strided
    const float *key;      // [batch, kv_heads, keys, width]
    const float *value;    // [batch, kv_heads, columns / COLUMNS, keys, COLUMNS]
    const float *gain;     // [batch, kv_heads]
    const float *mask;     // [batch, heads, queries, keys], strided and additive, or NULL
    const float *row_lse;  // [batch, heads, queries], strided: log-sum-exp of a longer row, or NULL
    const int64_t *mixed;  // [batch]: how many keys are mixed, which come first; NULL: all. common.py
    float *out;            // [batch, heads, queries, value_width], strided
    int64_t batch, heads, kv_heads, queries, keys, width, value_width, columns;
    int64_t query_stride[3], mask_stride[4], row_lse_stride[3], out_stride[3];
    int64_t steps, threads, squarings;
    float alpha, dense, sparse, rise, tolerance, quick[QUICK_TERMS];
};

// below the first, 1 + x forgets digits of x that entmax near softmax needs; below the second, those of first steps too
static const float SMALL_ALPHA = 1.05f, LEAST_QUICK_ALPHA = 1.002f;
// sums of weights are about 1, and 0 where all is masked: then no lambda may make the quotient infinite
static const float LEAST_SUM = 1e-20f;
static const float TINY = 1.17549435e-38f, LARGE = 3.40282347e38f, LOWEST_EXP = -87.3365f;

// comparisons are written so that NaN stays, in `larger` that of b, and is not waited for
static inline vec larger(vec a, vec b) { return b < a ? a : b; }
static inline vec at_least(vec x, float low) { return larger(low - vec{}, x); }
static inline vec at_most(vec x, float high) { return x > high ? high - vec{} : x; }
static inline bool any_above(vec x, float limit) {
    ivec above = x > limit;
    int64_t parts[LANES / 2], any = 0;
    memcpy(parts, &above, sizeof parts);
    for (int64_t part : parts) any |= part;
    return any != 0;
}

// f of every single lane
template <class F>
static inline vec each(F f) {
    vec x = {};
    for (int i = 0; i < LANES; i++) x[i] = f(i);
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

// w = (1 + m) * 2^n with sqrt(1/2) <= 1 + m < sqrt(2), for w > 0
static inline vec split(vec w, vec *n) {
    ivec bits = (ivec)w, e = (bits - 0x3f3504f3) >> 23;
    *n = __builtin_convertvector(e, vec);
    return (vec)(bits - (e << 23)) - 1.0f;
}

// log(1 + x), given w = 1 + x > 0, to full relative precision near 0 (Cephes' polynomial), Kahan's way: log(w) * x /
// (w - 1) undoes the rounding of w
static inline vec log_one_plus(vec x, vec w) {
    vec n, m = split(w, &n), z = m * m;
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

// w^power for w > 0, by minimax polynomials: log2 errs by 5e-8, 2^x relatively by 1e-7. w^power must be a normal
// number. NaN does not stay
static inline vec raised(vec w, float power) {
    vec n, m = split(w, &n);
    vec p = -0.14574436f * m + 0.23689034f;
    p = p * m - 0.25006906f;
    p = p * m + 0.28670746f;
    p = p * m - 0.36008721f;
    p = p * m + 0.48093944f;
    p = p * m - 0.72135715f;
    p = p * m + 1.44269477f;
    vec x = (p * m + n) * power;
    vec shifted = x + 12582912.0f, r = x - (shifted - 12582912.0f);
    p = 0.00134073f * r + 0.00967188f;
    p = p * r + 0.05550308f;
    p = p * r + 0.24022235f;
    p = p * r + 0.69314721f;
    p = p * r + 1.0f;
    return (vec)((ivec)p + ((ivec)shifted << 23));
}

// lanes of a and b, counted through both, by constants
#if defined(__clang__)
#define SHUFFLED(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLED(a, b, ...) __builtin_shuffle(a, b, ivec{__VA_ARGS__})
#endif

struct sums {
    vec a, b;
};
static inline sums operator+(sums x, sums y) { return {x.a + y.a, x.b + y.b}; }

// sum of term(first) ... term(end - 1), in parts: a running sum loses digits, which a threshold cannot spare
template <class Term>
static auto sum_of(int64_t first, int64_t end, Term term) -> decltype(term(first)) {
    if (end - first > 128) {
        int64_t middle = (first + end) / 2;
        return sum_of(first, middle, term) + sum_of(middle, end, term);
    }
    decltype(term(first)) part[4] = {};
    int64_t k = first;
    for (; k + 4 <= end; k += 4)
        for (int j = 0; j < 4; j++) part[j] = part[j] + term(k + j);
    for (; k < end; k++) part[0] = part[0] + term(k);
    return (part[0] + part[1]) + (part[2] + part[3]);
}

// one step of a transposition of LANES vectors: the off-diagonal blocks of H x H change places
template <int H, int... L>
static inline void exchange(vec *rows, std::integer_sequence<int, L...>) {
    for (int i = 0; i < LANES; i++) {
        if (i & H) continue;
        vec a = rows[i], b = rows[i + H];
        rows[i] = SHUFFLED(a, b, (L & H ? L - H + LANES : L)...);
        rows[i + H] = SHUFFLED(a, b, (L & H ? L + LANES : L + H)...);
    }
}
template <int H>
static inline void transpose(vec *rows) {
    if constexpr (H < LANES) {
        exchange<H>(rows, std::make_integer_sequence<int, LANES>());
        transpose<2 * H>(rows);
    }
}

// q[width][TILE] = the queries of a tile, the last block overlaps the one before
static void load_queries(const float *query, int64_t stride, int64_t lanes, int64_t width, float *q) {
    for (int64_t g = 0; g < TILE; g += LANES) {
        const float *from[LANES];
        for (int64_t i = 0; i < LANES; i++) from[i] = query + (g + i < lanes ? g + i : 0) * stride;
        if (width < LANES)
            for (int64_t d = 0; d < width; d++)
                for (int64_t i = 0; i < LANES; i++) q[d * TILE + g + i] = from[i][d];
        else
            for (int64_t i = 0; i < width; i += LANES) {
                int64_t d = i + LANES <= width ? i : width - LANES;
                vec rows[LANES];
                for (int64_t l = 0; l < LANES; l++) rows[l] = *(const vec *)(from[l] + d);
                transpose<1>(rows);
                for (int64_t l = 0; l < LANES; l++) *(vec *)(q + (d + l) * TILE + g) = rows[l];
            }
    }
}

// c[R][C vectors] = sum_k a[i * ai + k * ak] * b[k][j], or += where ADD, for R rows i and C vectors j of columns
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

// s[keys][TILE] = key [keys][width] times the queries q [width][TILE]; the last block overlaps the one before
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

// o[TILE][C vectors of the columns] (+)= w[n][TILE] transposed, times b[n][COLUMNS]
template <int R, int C>
static inline void product(const float *w, const float *b, int64_t n, bool add, float *o, int64_t columns) {
    static_assert(TILE % R == 0, "blocks that overlap would add twice");
    for (int64_t i = 0; i < TILE; i += R)
        if (add) block<R, C, true>(w + i, 1, TILE, b, COLUMNS, n, o + i * columns, columns);
        else block<R, C>(w + i, 1, TILE, b, COLUMNS, n, o + i * columns, columns);
}

// o[TILE][columns] = w[keys][TILE] transposed, times the values; a slab of keys at a time, which stays in L1
static void weighted(const float *w, const float *value, int64_t keys, int64_t width, int64_t columns, float *o) {
    enum { SLAB = 128 };
    for (int64_t k = 0; k < keys; k += SLAB)
        for (int64_t d = 0; d < columns; d += COLUMNS) {
            const float *a = w + k * TILE, *b = value + d * keys + k * COLUMNS;
            int64_t n = keys - k < SLAB ? keys - k : SLAB;
            if (width - d > LANES) product<6, 2>(a, b, n, k > 0, o + d, columns);
            else product<12, 1>(a, b, n, k > 0, o + d, columns);
        }
}

// From here on a vector of queries at a time: s[keys][WIDTH] and w[keys][WIDTH] vectors, of which the first of every
// key is its own.

// scores in, gain * scores + mask minus its maximum out; returns the maximum. common.py: centred
template <class Bias>
static vec centre(const Problem &p, float gain, vec *s, Bias bias) {
    if (p.mask)
        for (int64_t k = 0; k < p.keys; k++)
            s[k * WIDTH] = each([&](int i) {
                float x = s[k * WIDTH][i] * gain, add = bias(i, k);
                x = x < -LARGE / 4 ? -LARGE / 4 : x > LARGE / 4 ? LARGE / 4 : x;
                return x + (add > LARGE / 4 ? LARGE / 4 : add);
            });
    float after = p.mask ? 1.0f : gain;
    vec peak = vec{} - LARGE;
    for (int64_t k = 0; k < p.keys; k++) peak = larger(peak, s[k * WIDTH]);
    for (int64_t k = 0; k < p.keys; k++) s[k * WIDTH] = (s[k * WIDTH] - peak) * after;
    return peak * after;
}

// a threshold left of the root by more than rounding, plus 1 / b. eager.py: _start
static vec start(const Problem &p, const vec *s) {
    return at_least(sum_of(0, p.keys, [&](int64_t k) { return s[k * WIDTH]; }) / (float)p.keys + p.rise - 1e-6f, 0.0f);
}

// Newton's method from the left of the root comes to its right by rounding alone. A cluster of keys may have dropped
// out there, and a step that counts the rest would be wrong for all: a short one leads back to where the next is the
// last
static inline vec back_a_little(const Problem &p, vec step) { return at_least(step, -0.7f * p.tolerance); }
static inline bool far_from_root(const Problem &p, vec step) {
    return any_above(larger(step, step * -2.0f), p.tolerance);
}

// a threshold, a last step that adding to it would round, and for sparsemax the number of keys that the step counted
struct threshold {
    vec tau, step, support;
};

// that of entmax-1.5, or sparsemax. eager.py: _polynomial_numerators
template <bool SQUARE>
static threshold polynomial(const Problem &p, const vec *s) {
    vec tau = start(p, s) - (SQUARE ? 2.0f : 1.0f);
    for (int64_t i = 1;; i++) {
        sums m = sum_of(0, p.keys, [&](int64_t k) -> sums {
            vec z = larger(tau, s[k * WIDTH]) - tau;
            if (SQUARE) return {z * z, z};
            return {z, z > 0.0f ? vec{} + 1.0f : vec{}};
        });
        vec norm = SQUARE ? each([&](int i) { return sqrtf(m.a[i]); }) : m.a;
        vec step = SQUARE ? (norm - 2.0f) * norm / at_least(m.b, TINY) : (norm - 1.0f) / at_least(m.b, 1.0f);
        step = back_a_little(p, step);
        if (i > p.steps || !far_from_root(p, step)) return {tau, step, m.b};
        tau = tau + step;
    }
}

// what is left of sparsemax's z to take off: a step back, by a rounding, lets a whole cluster of keys in again, each
// with that rounding. eager.py: _settle
static vec settle(const Problem &p, const vec *s, threshold t) {
    if (!any_above(-t.step, 0.0f)) return vec{};
    sums m = sum_of(0, p.keys, [&](int64_t k) -> sums {
        vec z = at_least(s[k * WIDTH] - t.tau - t.step, 0.0f);
        return {z, z > 0.0f ? vec{} + 1.0f : vec{}};
    });
    // where none came in, the step was exact, and all that this could see is how the sum was rounded
    return m.b > t.support ? at_least((m.a - 1.0f) / m.b, 0.0f) : vec{};
}

// any other alpha: u = tau + p, and a last step of b * z. z^(p - 1), a constant factor apart, in w, for that u.
// eager.py: _generic_numerators
template <bool SMALL>
static threshold generic(const Problem &p, const vec *s, vec *w) {
    const float b = p.alpha - 1.0f, power = 1.0f / b - 1.0f;
    // its power is a normal number
    const float least = exp2f(-126.0f / (power > 1.0f ? power : 1.0f));
    auto solve = [&](vec u, auto slope_of) {
        vec top = 1.0f - u * b;
        sums m = sum_of(0, p.keys, [&](int64_t k) -> sums {
            vec base = at_least(s[k * WIDTH] * b + top, 0.0f), slope = slope_of(k, base);
            return {slope * base, slope};
        });
        return sums{m.a, at_least(m.b, TINY)};
    };
    // the largest weight is from 1 / keys to 1, which bounds u; where all is masked there is no root, and u becomes 0
    auto moved = [&](vec u, vec step) { return at_most(at_least(u + step, 0.0f), p.rise); };
    vec u = start(p, s);
    // the first steps, on a polynomial close to the power, cost little more than those of entmax-1.5
    for (int64_t i = 0; i < p.steps && p.alpha > LEAST_QUICK_ALPHA; i++) {
        sums m = solve(u, [&](int64_t, vec base) {
            vec x = base, y = vec{} + p.quick[0];
            for (int64_t j = 0; j < p.squarings; j++) x = x * x;
            for (int j = 1; j < QUICK_TERMS; j++) y = y * x + p.quick[j];
            return base == 0.0f ? vec{} : y;
        });
        vec step = (m.a - raised(at_least(m.a, TINY), 1.0f - b)) / (m.b * b);
        u = moved(u, step);
        if (!any_above(step, 0.03f)) break;
    }
    // they may end right of the root, and the first of these steps lead back
    for (int64_t i = 0;; i++) {
        sums m = solve(u, [&](int64_t k, vec base) {
            vec slope;
            if (SMALL) {
                vec x = at_least((s[k * WIDTH] - u) * b, -1.0f);
                slope = exponential(log_one_plus(x, at_least(x + 1.0f, TINY)) * power);
            } else slope = raised(larger(vec{} + least, base), power);
            return w[k * WIDTH] = base == 0.0f ? vec{} : slope;
        });
        vec total = at_least(m.a, TINY);
        vec change = SMALL ? each([&](int i) { return expm1f(logf(total[i]) * b) * expf(logf(total[i]) * (1.0f - b)); })
                           : total - raised(total, 1.0f - b);
        vec step = change / (m.b * b);
        vec next = moved(u, i ? back_a_little(p, step) : step);
        if (i > p.steps || !far_from_root(p, next - u)) return {u, (m.a - 1.0f) / m.b, m.b};
        u = next;
    }
}

// numerators of entmax in w, exponentials of the scores in s; returns the sums of both
template <class Weight>
static sums numerators(vec *s, vec *w, int64_t keys, Weight weight) {
    return sum_of(0, keys, [&](int64_t k) -> sums {
        vec c = s[k * WIDTH], sparse = w[k * WIDTH] = weight(c, w[k * WIDTH]);
        return {s[k * WIDTH] = exponential(c), sparse};
    });
}
static sums numerators(const Problem &p, vec *s, vec *w) {
    if (p.sparse == 0.0f) return numerators(s, w, p.keys, [](vec, vec) { return vec{}; });
    if (p.alpha == 1.5f) {
        threshold t = polynomial<true>(p, s);
        return numerators(s, w, p.keys, [&](vec c, vec) {
            vec z = at_least(c - t.tau - t.step, 0.0f);
            return z * z;
        });
    }
    if (p.alpha == 2.0f) {
        threshold t = polynomial<false>(p, s);
        vec more = settle(p, s, t);
        return numerators(s, w, p.keys, [&](vec c, vec) {
            return at_least(at_least(c - t.tau - t.step, 0.0f) - more, 0.0f);
        });
    }
    threshold t = p.alpha < SMALL_ALPHA ? generic<true>(p, s, w) : generic<false>(p, s, w);
    float b = p.alpha - 1.0f;
    vec top = 1.0f - t.tau * b;
    return numerators(s, w, p.keys, [&](vec c, vec slope) { return slope * at_least(c * b + top - t.step, 0.0f); });
}

// the mass that a longer row puts on these keys. common.py: row_mass
template <class Lse>
static vec mass_of(const Problem &p, vec peak, vec dense_sum, Lse row_lse) {
    if (!p.row_lse) return vec{} + 1.0f;
    return each([&](int i) {
        float part = expf(peak[i] + logf(dense_sum[i]) - row_lse(i));
        return !(part >= 0.0f) || dense_sum[i] == 0.0f ? 0.0f : part > 1.0f ? 1.0f : part;
    });
}

// centred scores in, mass * (dense * softmax + sparse * entmax) out, in place. eager.py: _mix
template <class Lse>
static void mix(const Problem &p, vec *s, vec *w, vec peak, Lse row_lse) {
    sums total = numerators(p, s, w);
    vec mass = mass_of(p, peak, total.a, row_lse);
    vec on_dense = mass * p.dense / at_least(total.a, LEAST_SUM);
    vec on_sparse = mass * p.sparse / at_least(total.b, LEAST_SUM);
    for (int64_t k = 0; k < p.keys; k++) s[k * WIDTH] = on_dense * s[k * WIDTH] + on_sparse * w[k * WIDTH];
}

// the same where the first `mixed` keys alone are mixed. eager.py: _mix_some
template <class Lse>
static void mix_some(const Problem &p, int64_t mixed, vec *s, vec *w, vec peak, Lse row_lse) {
    Problem part = p;
    part.keys = mixed;
    part.rise = -expm1f((1.0f - p.alpha) * logf(mixed)) / (p.alpha - 1.0f);
    vec highest = vec{} - LARGE;
    for (int64_t k = 0; k < mixed; k++) highest = larger(highest, s[k * WIDTH]);
    for (int64_t k = 0; k < mixed; k++) s[k * WIDTH] -= highest;
    sums total = mixed ? numerators(part, s, w) : sums{};
    vec factor = exponential(highest);
    vec rest = sum_of(mixed, p.keys, [&](int64_t k) { return s[k * WIDTH] = exponential(s[k * WIDTH]); });
    vec dense_sum = rest + factor * total.a;
    vec each_dense = mass_of(p, peak, dense_sum, row_lse) / at_least(dense_sum, LEAST_SUM);
    vec on_dense = each_dense * factor * p.dense, on_others = each_dense * (p.dense + p.sparse);
    vec on_sparse = each_dense * factor * total.a * p.sparse / at_least(total.b, LEAST_SUM);
    for (int64_t k = 0; k < mixed; k++) s[k * WIDTH] = on_dense * s[k * WIDTH] + on_sparse * w[k * WIDTH];
    for (int64_t k = mixed; k < p.keys; k++) s[k * WIDTH] *= on_others;
}

// `lanes` queries of one head, from query `first` on; the rest of the tile repeats the first of them
static void tile(const Problem &p, int64_t batch, int64_t head, int64_t first, int64_t lanes, float *scratch) {
    float *s = scratch;  // [keys][TILE], scores, then the weights that are mixed
    float *w = s + p.keys * TILE;  // [keys][TILE], of entmax
    float *q = w + p.keys * TILE;  // [width][TILE]
    float *o = q + p.width * TILE;  // [TILE][columns]
    int64_t kv = batch * p.kv_heads + head / (p.heads / p.kv_heads);
    const float *query = p.query + batch * p.query_stride[0] + head * p.query_stride[1] + first * p.query_stride[2];
    const float *mask = p.mask, *row_lse = p.row_lse;
    if (mask) mask += batch * p.mask_stride[0] + head * p.mask_stride[1] + first * p.mask_stride[2];
    if (row_lse) row_lse += batch * p.row_lse_stride[0] + head * p.row_lse_stride[1] + first * p.row_lse_stride[2];

    // the next tile's rows lie too far apart for the processor to see them coming
    for (int64_t i = TILE; i < 2 * TILE; i++)
        for (int64_t d = 0; d < p.width; d += 16) __builtin_prefetch(query + i * p.query_stride[2] + d);
    load_queries(query, p.query_stride[2], lanes, p.width, q);
    scores(p.key + kv * p.keys * p.width, p.keys, q, p.width, s);
    for (int64_t g = 0; g < WIDTH; g++) {
        auto lane = [&](int i) { return g * LANES + i < lanes ? g * LANES + i : 0; };
        vec *own = (vec *)s + g;
        vec peak = centre(p, p.gain[kv], own, [&](int i, int64_t k) {
            return mask[lane(i) * p.mask_stride[2] + k * p.mask_stride[3]];
        });
        auto lse = [&](int i) { return row_lse[lane(i) * p.row_lse_stride[2]]; };
        if (p.mixed) mix_some(p, p.mixed[batch], own, (vec *)w + g, peak, lse);
        else mix(p, own, (vec *)w + g, peak, lse);
    }
    weighted(s, p.value + kv * p.keys * p.columns, p.keys, p.value_width, p.columns, o);
    float *out = p.out + batch * p.out_stride[0] + head * p.out_stride[1] + first * p.out_stride[2];
    for (int64_t i = 0; i < lanes; i++) memcpy(out + i * p.out_stride[2], o + i * p.columns, p.value_width * 4);
}

extern "C" int64_t pladis_columns() { return COLUMNS; }

// 0, or 1 where memory ran out
extern "C" int pladis_attend(const Problem *problem) {
    const Problem &p = *problem;
    int64_t tiles = (p.queries + TILE - 1) / TILE, failed = 0;
    size_t bytes = (2 * p.keys + p.width + p.columns) * TILE * sizeof(float);
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
