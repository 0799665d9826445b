// PLADIS weights of rows of scores, a thread or a few to a row; compiled by NVRTC (pladis_core/impl/nvrtc.py), for GPUs
// without Triton and problems that fused.cu does not take. Between two products of torch's it replaces some thirty passes over the scores by one.
//
// Mathematics and names as in impl/eager.py and impl/triton.py: b = alpha - 1, p = 1 / b, centred scores c <= 0 whose
// maximum is 0, r = [1 + b (c - u)]_+, and entmax is r^p for the u at which sum r^p = 1, found by Newton's method on
// the p-norm from u = 0.
//
// Scores lie keys before queries, (heads, keys, queries): neighbouring threads read neighbouring queries. A thread holds
// its scores in registers, so a row is read once, and with one thread to a row no sum leaves a thread. Beyond the keys
// that registers hold, LANES threads of a warp share a row, each with every LANES-th key:
//
//   lane of a warp:  0 .. 32/LANES - 1: keys 0, LANES, ... of 32/LANES queries; the next as many: keys 1, LANES + 1, ...
//
// Defined before this text:
//   LEAST_KEYS, MOST_KEYS  between which the number of keys lies: one kernel for texts of about a length
//   LANES          threads that share a row: a power of two
//   ALPHA          15, 20, 1 for alphas near 1, 0 for any other
//   WEIGHT         16 float16, 17 bfloat16, 32 float32: what the weights are rounded to
//   MASK, MIX      whether there is an additive mask; whether only some keys are mixed

#define KEYS_OF_LANE ((MOST_KEYS + LANES - 1) / LANES)

#if WEIGHT == 32
typedef float weight_t;
#define EXP expf
#define LOG logf
#else
// fast ones err by less than these weights are rounded
typedef unsigned short weight_t;
#define EXP __expf
#define LOG __logf
#endif

// scores beyond it count as equal, as in impl/triton.py
#define LARGEST_SCORE 1e30f
// of sums, where all is masked
#define LEAST 1e-30f
// a step back by rounding alone
#define LEAST_STEP -1.2e-7f
// what a sum of 1 may be rounded by
#define SUM_ROUNDING 4.8e-7f
#define MINUS_INFINITY (-__int_as_float(0x7f800000))

struct Rows {
    int rows, queries, keys;           // of this launch: rows = heads * queries
    int steps;                         // of the solver, at most
    int mass_kind;                     // 0 none, 1 given, 2 from the log-sum-exp of a longer row
    int divided;                       // whether the rounded weights are made to sum to dense + sparse
    float scale, b;
    float tolerance;                   // a step below it is not felt
    float dense, sparse, factor;       // weights are factor * (dense * softmax + sparse * entmax)
    long long mask_h, mask_q, mask_k;  // strides of the additive mask
    long long mixed_k;                 // stride of the keys that are mixed
    long long mass_h, mass_q;          // strides of mass, or of the log-sum-exp
};

// A loop over this thread's keys. Their scores are made to look changed before it: else the compiler keeps what an
// earlier loop computed from them, in registers that are not there.
#define FOR_KEYS _Pragma("unroll") for (int i = 0; i < KEYS_OF_LANE; ++i)
#define FOR_KEYS_ANEW FOR_KEYS { LOOK_CHANGED(c[i]); } FOR_KEYS
#define IS_KEY(i) ((i + 1) * LANES <= LEAST_KEYS || i * LANES + first_key < s.keys)
#define IS_MIXED(i) (!MIX || (mixed_bits[i >> 5] >> (i & 31) & 1u))
#define MIXED_SCORE(i) (!MIX ? c[i] : IS_MIXED(i) ? c[i] - centre : MINUS_INFINITY)
#define ENTMAX(i) fmaxf(entmax(MIXED_SCORE(i), u, s.b, step, total, slope) - surplus, 0.0f)

// over the threads that share a row
__device__ __forceinline__ float row_sum(float x) {
    for (int lanes = 16; lanes >= 32 / LANES; lanes >>= 1) x += __shfl_xor_sync(0xffffffffu, x, lanes);
    return x;
}

__device__ __forceinline__ float row_max(float x) {
    for (int lanes = 16; lanes >= 32 / LANES; lanes >>= 1) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, lanes));
    return x;
}

// four sums in turn: shorter chains, and less rounding
struct Sum {
    float parts[4];
    __device__ __forceinline__ Sum() { parts[0] = parts[1] = parts[2] = parts[3] = 0.0f; }
    __device__ __forceinline__ void add(int i, float x) { parts[i & 3] += x; }
    __device__ __forceinline__ float of_row() { return row_sum((parts[0] + parts[1]) + (parts[2] + parts[3])); }
};

// x rounded to the weights' type; `*rounded` is what that stands for
__device__ __forceinline__ weight_t to_weight(float x, float* rounded) {
#if WEIGHT == 32
    *rounded = x;
    return x;
#elif WEIGHT == 17
    // to nearest, ties to even; x is finite
    unsigned bits = __float_as_uint(x);
    bits = (bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u;
    *rounded = __uint_as_float(bits);
    return (weight_t)(bits >> 16);
#else
    unsigned short bits = float_to_half_bits(x);
    *rounded = half_bits_to_float(bits);
    return bits;
#endif
}

// r, and r^(p - 1)
__device__ __forceinline__ float base(float c, float u, float b, float* slope) {
#if ALPHA == 1
    // through log1p, which stays exact as alpha -> 1
    const float x = fmaxf(b * (c - u), -1.0f);
    *slope = expf(log1pf(x) * ((1.0f - b) / b));
    return 1.0f + x;
#else
    const float r = fmaxf(fmaf(c, b, 1.0f - b * u), 0.0f);
#if ALPHA == 15
    *slope = r;
#elif ALPHA == 20
    *slope = r > 0.0f ? 1.0f : 0.0f;
#else
    *slope = EXP(LOG(r) * ((1.0f - b) / b));
#endif
    return r;
#endif
}

// how far u moves: (1 - total^-b) total / (b slope)
__device__ __forceinline__ float newton_step(float total, float slope, float b) {
    slope = fmaxf(slope, LEAST);
#if ALPHA == 15
    const float norm = sqrtf(total);
    return fmaxf(2.0f * (norm - 1.0f) * norm / slope, LEAST_STEP);
#elif ALPHA == 20
    return fmaxf((total - 1.0f) / slope, LEAST_STEP);
#else
    total = fmaxf(total, LEAST);
    return -expm1f(-b * logf(total)) * total / (b * slope);
#endif
}

// entmax of a centred score, a factor apart, after the last step: that is added to r, since u would round it
__device__ __forceinline__ float entmax(float c, float u, float b, float step, float total, float slope) {
#if ALPHA == 15
    const float r = fmaxf(fmaf(c, b, 1.0f - b * u) - b * step, 0.0f);
    return r * r;
#elif ALPHA == 20
    return fmaxf(c + (1.0f - u) - step, 0.0f);
#else
    float power;
    const float r = base(c, u, b, &power);
    return power * fmaxf(r + (1.0f - total) / fmaxf(slope, LEAST), 0.0f);
#endif
}

// Scores (heads, keys, queries) float32 -> quarters of weights, alike, and factors (heads, queries), by which a row's
// product with the values is to be multiplied. mixed: (keys,), true where entmax takes part.
extern "C" __global__ void __launch_bounds__(128, 4) pladis_rows(
    const float* scores, weight_t* weights, float* factors, const float* mask, const unsigned char* mixed,
    const float* mass, Rows s
) {
    const int lane = (int)(threadIdx.x & 31u), first_key = lane / (32 / LANES);
    const int row = (int)(blockIdx.x * (blockDim.x / LANES) + (threadIdx.x >> 5) * (32 / LANES)) + lane % (32 / LANES);
    // threads beyond the last row stay for the sums of the others
    const bool inside = row < s.rows;
    const int head = inside ? row / s.queries : 0, query = inside ? row - head * s.queries : 0;
    const long long start = ((long long)head * s.keys + first_key) * s.queries + query;
    const long long stride = (long long)LANES * s.queries;  // from one of this thread's keys to its next
    scores += start;
    weights += start;
    float c[KEYS_OF_LANE];
    unsigned mixed_bits[(KEYS_OF_LANE + 31) / 32] = {};  // a bit for each key: whether it is mixed
    float peak = -LARGEST_SCORE, centre = -LARGEST_SCORE;
    FOR_KEYS {
        c[i] = MINUS_INFINITY;
        if (IS_KEY(i)) {
            c[i] = *scores * s.scale;
#if MASK
            const float bias = mask[head * s.mask_h + query * s.mask_q + (i * LANES + first_key) * s.mask_k];
            c[i] += bias;
#endif
            c[i] = fminf(fmaxf(c[i], -LARGEST_SCORE), LARGEST_SCORE);
#if MASK
            c[i] = bias == MINUS_INFINITY ? bias : c[i];
#endif
        }
        scores += stride;
        peak = fmaxf(peak, c[i]);
#if MIX
        if (IS_KEY(i) && mixed[(i * LANES + first_key) * s.mixed_k]) {
            mixed_bits[i >> 5] |= 1u << (i & 31);
            centre = fmaxf(centre, c[i]);
        }
#endif
    }
    peak = row_max(peak);
    centre = MIX ? row_max(centre) : peak;

    Sum all, part;
    FOR_KEYS {
        c[i] -= peak;
        const float p = EXP(c[i]);
        all.add(i, p);
        if (MIX) part.add(i, IS_MIXED(i) ? p : 0.0f);
    }
    const float dense_sum = fmaxf(all.of_row(), LEAST);
    const float part_mass = MIX ? part.of_row() / dense_sum : 1.0f;
    centre -= peak;

    float u = 0.0f, step = 0.0f, total = 0.0f, slope = 0.0f;
    for (int left = s.steps; left > 0; --left) {
        u += step;
        Sum totals, slopes;
        FOR_KEYS_ANEW {
            float slope_here;
            const float r = base(MIXED_SCORE(i), u, s.b, &slope_here);
            totals.add(i, ALPHA == 20 ? r : r * slope_here);
            slopes.add(i, slope_here);
        }
        total = totals.of_row();
        slope = slopes.of_row();
        step = newton_step(total, slope, s.b);
        // sparsemax also goes on after a step back by more than a last digit, as in impl/triton_kernel.py
        const float far = ALPHA == 20 ? fmaxf(step, -3.0f * step) : step;
        // a warp goes on until all its rows are done
        if (__all_sync(0xffffffffu, !(far > s.tolerance))) break;
    }

    float surplus = 0.0f;
#if ALPHA == 20
    // a step back by a rounding may have let a whole cluster of keys in again, each with that rounding
    Sum again, kept;
    FOR_KEYS_ANEW {
        const float e = entmax(MIXED_SCORE(i), u, s.b, step, total, slope);
        again.add(i, e);
        kept.add(i, e > 0.0f ? 1.0f : 0.0f);
    }
    const float support = fmaxf(kept.of_row(), 1.0f);
    surplus = again.of_row() - 1.0f;
    surplus = surplus > SUM_ROUNDING ? surplus / support : 0.0f;
#endif
    Sum sparse_sums;
    FOR_KEYS_ANEW sparse_sums.add(i, ENTMAX(i));
    const float sparse_sum = fmaxf(sparse_sums.of_row(), LEAST);

    // quarters keep sums of values near the end of float32 within it; no steps: softmax alone
    const float dense = 0.25f / dense_sum, sparse = s.steps ? 0.25f * s.sparse * part_mass / sparse_sum : 0.0f;
    Sum weight_sums;
    FOR_KEYS_ANEW {
        float rounded = 0.0f;
        const float p = EXP(c[i]) * dense * (IS_MIXED(i) ? s.dense : s.dense + s.sparse);
        const weight_t weight = to_weight(fmaf(ENTMAX(i), sparse, p), &rounded);
        weight_sums.add(i, rounded);
        if (IS_KEY(i) && inside) *weights = weight;
        weights += stride;
    }
    const float weight_sum = weight_sums.of_row();
    if (first_key || !inside) return;

    float factor = 4.0f * s.factor;
    if (s.divided) factor *= weight_sum != 0.0f ? 0.25f * (s.dense + s.sparse) / weight_sum : 0.0f;
    if (s.mass_kind) {
        float share = mass[head * s.mass_h + query * s.mass_q];
        if (s.mass_kind == 2) {
            share = expf(peak + logf(dense_sum) - share);
            // the log-sum-exp of a row that is masked throughout may be anything
            share = dense_sum > LEAST ? fminf(share, 1.0f) : 0.0f;
        }
        factor *= share;
    }
    factors[row] = factor;
}

struct Products {
    int rows, queries, width;
    long long out_h, out_q;  // strides of the output; its last is 1
    float largest;           // of its type: beyond, it saturates
};

// factors (rows,) times products (rows, width) float32, in the output's type
extern "C" __global__ void __launch_bounds__(128) pladis_scale(
    const float* products, const float* factors, weight_t* out, Products s
) {
    const long long at = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    const int row = (int)(at / s.width), column = (int)(at - (long long)row * s.width);
    if (row >= s.rows) return;
    const int head = row / s.queries, query = row - head * s.queries;
    const float x = fminf(fmaxf(products[at] * factors[row], -s.largest), s.largest);
    float rounded;
    out[head * s.out_h + query * s.out_q + column] = to_weight(x, &rounded);
}
