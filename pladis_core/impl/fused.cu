// PLADIS attention in one kernel on NVIDIA's tensor cores, 16-bit inputs; compiled by NVRTC (pladis_core/impl/cuda.py).
//
// Mathematics and names as in impl/triton_kernel.py: b = alpha - 1, p = 1 / b, scores c <= 0 whose maximum is 0 (here as
// exponents of 2), r = [1 + b (c - u)]_+, and entmax is r^p for the u at which sum r^p = 1, found by Newton's method on
// the p-norm from u = 0. Saturation, which comes free with a product and sum, keeps r within 0 and 1.
//
// A tile is ROWS queries of a head. SHARE warps share a tile, each with every score of its own keys in registers, in the
// layout in which mma leaves a product: of 8 keys, lane l has keys 2 (l % 4) and one more, of rows l / 4 and l / 4 + 8.
// Two such products are what mma takes as a factor of the next one, so weights never leave their lane.
//
// Keys, then values, pass through two buffers in shared memory, CHUNK of them at a time, of which the w-th warp of a
// tile takes the w-th part. With one chunk they stay there while warps go from tile to tile, and no warp waits for
// another.
//
// Defined before this text:
//   KEYS           that the kernel takes at most, a multiple of 16, and LEAST_KEYS at least
//   WIDTH, VALUE   columns of query and key, and of the value: multiples of 8
//   SHARE          warps that share a tile
//   WARPS, BLOCKS  of a block, and blocks that a multiprocessor is meant to hold
//   CHUNK          keys of a buffer, a multiple of 16 SHARE
//   ALPHA          15, 20, 1 for alphas near 1, 0 for any other
//   POWER          p, where it is a small whole number that ALPHA does not say; else 0
//   TYPE           16 float16, 17 bfloat16
//   UNIT           whether the factor of entmax is 1
//   MASK, MIX      whether there is an additive mask; whether only some keys are mixed
//   MASS           of a row: 0 is 1, 1 given, 2 from the log-sum-exp of a longer row
//   FLIP           whether the scale is below 0

#define ROWS 16
#define CHUNKS ((KEYS + CHUNK - 1) / CHUNK)
#define KEYS_OF_WARP (CHUNK / SHARE)           // of a chunk
#define TILES_OF_CHUNK (KEYS_OF_WARP / 8)      // products of 8 keys, of a warp
#define TILES (SHARE == 1 ? KEYS / 8 : CHUNKS * TILES_OF_CHUNK)
#define GROUPS (WARPS / SHARE)                 // tiles of queries that a block has at once
#define PADDED(width) (((width) + 15) / 16 * 16)
#define STEPS (PADDED(WIDTH) / 16)             // products of 16 columns, of query and key
#define COLUMNS (PADDED(VALUE) / 8)            // products of 8 columns, of weights and value
// whether the solver begins in half precision, two scores at once: where an instruction makes such a pair, and they fit
// registers beside what they round
#define IN_HALVES (RECENT && (ALPHA == 15 || ALPHA == 20 || POWER) && TILES * 6 <= 200)
// an odd number of 16 bytes: 8 rows meet in no bank
#define STRIDE(width) (PADDED(width) + 8)
#define BUFFER (CHUNK * (STRIDE(WIDTH) > STRIDE(VALUE) ? STRIDE(WIDTH) : STRIDE(VALUE)))

#define LN_2 0.69314718056f
#define LOG2_E 1.44269504089f
// scores beyond it count as equal
#define LARGEST_SCORE 1e30f
// how far below a row's maximum, as an exponent of 2, keys have no softmax mass
#define FAR 120.0f
// so far below the others are keys that are not mixed, which saturation then leaves out; no 16-bit weight feels it
#define APART 1024.0f
// exponents whose rounding is felt by no 16-bit weight
#define MODERATE 512.0f
// of sums, where all is masked
#define LEAST 1e-30f
// a step back by rounding alone: of steps in float32, and of what those in half precision leave
#define ROUNDED_BACK -1.2e-7f
#define HALVES_BACK -0.02f
// of steps, that are always left for float32
#define LAST_STEPS 2
#define MINUS_INFINITY (-__int_as_float(0x7f800000))
#define ALL_LANES 0xffffffffu
#define UNROLLED _Pragma("unroll") for

typedef unsigned short half_t;  // of either type

struct Tensor {
    long long batch, head, row, column;  // strides in elements; 0 where it is expanded
};

struct Problem {
    int heads, groups, queries, keys;  // groups: query heads to a head of key and value
    int blocks;                        // of a head
    int steps;                         // of the solver, at most
    int divided;                       // whether the rounded weights are made to sum to dense + sparse
    float gain;                        // from a score to an exponent of 2
    float b, start;                    // alpha - 1; u at first
    float tolerance, coarse;           // how far from 1 sum r^p may be before the last step, or last in half precision
    float dense, sparse, factor;       // weights are factor * (dense * softmax + sparse * entmax)
    Tensor query, key, value, out, mask, mixed, mass;
};

// what a lane has of its two rows
struct Pair {
    float row[2];
};

// Sums and maxima over a tile's rows: within the four lanes that have a row, then among the warps that share it.
struct Meeting {
    float* place;  // (2, SHARE, ROWS, 2): the second of two is free while others still read the first
    int share, id, turn;

    template <bool SUMS>
    static __device__ __forceinline__ float joined(float x, float y) { return SUMS ? x + y : max_or_nan(x, y); }

    // x and, with BOTH, y over their rows
    template <bool SUMS, bool BOTH>
    __device__ __forceinline__ void of_rows(Pair& x, Pair& y) {
        UNROLLED (int lanes = 1; lanes < 4; lanes *= 2)
            UNROLLED (int h = 0; h < 2; ++h) {
                x.row[h] = joined<SUMS>(x.row[h], __shfl_xor_sync(ALL_LANES, x.row[h], lanes));
                if (BOTH) y.row[h] = joined<SUMS>(y.row[h], __shfl_xor_sync(ALL_LANES, y.row[h], lanes));
            }
        of_warps<SUMS, BOTH>(x, y);
    }

    // the same of what all lanes of a row have already
    template <bool SUMS, bool BOTH>
    __device__ __forceinline__ void of_warps(Pair& x, Pair& y) {
        if (SHARE == 1) return;
        const int lane = threadIdx.x & 31, row = lane / 4, h = lane & 1;
        float* here = place + turn * SHARE * ROWS * 2;
        if (lane % 4 < 2) {
            float* at = here + (share * ROWS + row + 8 * h) * 2;
            at[0] = h ? x.row[1] : x.row[0];
            if (BOTH) at[1] = h ? y.row[1] : y.row[0];
        }
        meet(id, SHARE * 32);
        // in one order, so that all come to the same
        UNROLLED (int h = 0; h < 2; ++h)
            UNROLLED (int other = 0; other < SHARE; ++other) {
                const float* at = here + (other * ROWS + row + 8 * h) * 2;
                x.row[h] = other ? joined<SUMS>(x.row[h], at[0]) : at[0];
                if (BOTH) y.row[h] = other ? joined<SUMS>(y.row[h], at[1]) : at[1];
            }
        turn ^= 1;
    }
};

template <int N>
__device__ __forceinline__ float whole_power(float r) {
    float power = r;
    UNROLLED (int i = 1; i < N; ++i) power *= r;
    return power;
}

// r and r^(p - 1) of a score; both 0 where it is not mixed, for which alphas near 1 ask `mixed`
__device__ __forceinline__ float base(float c, float offset, float b, bool mixed, float* slope) {
#if ALPHA == 1
    // through log1p, which stays exact as alpha -> 1; offset is -b u
    const float x = mixed ? fmaxf(fmaf(c, b * LN_2, offset), -1.0f) : -1.0f;
    *slope = fast_exp2(log1pf(x) * (LOG2_E * (1.0f - b) / b));
    return 1.0f + x;
#else
    // offset is 1 - b u
    const float r = saturated_product(c, b * LN_2, offset);
#if ALPHA == 15
    *slope = r;
#elif ALPHA == 20
    *slope = r > 0.0f ? 1.0f : 0.0f;
#else
    // a logarithm and an exponential take the special function units sixteen cycles
    *slope = POWER ? whole_power<POWER - 1>(r) : fast_exp2(fast_log2(r) * ((1.0f - b) / b));
#endif
    return r;
#endif
}

__device__ __forceinline__ float offset_of(float u, float b) { return ALPHA == 1 ? -b * u : 1.0f - b * u; }

#if IN_HALVES
// Of two scores in half precision, r^p and r^(p - 1) are added to their sums.
__device__ __forceinline__ void add_two(
    unsigned c, unsigned factor, unsigned offset, unsigned& total, unsigned& slope
) {
    const unsigned r = two_saturated_products(c, factor, offset);
#if ALPHA == 15
    slope = two_sums(slope, r);
    total = two_products(r, r, total);
#elif ALPHA == 20
    slope = two_sums(slope, two_above_zero(r));
    total = two_sums(total, r);
#else
    unsigned power = r;
    UNROLLED (int i = 1; i < POWER - 1; ++i) power = two_products(power, r, 0u);
    slope = two_sums(slope, power);
    total = two_products(power, r, total);
#endif
}
#endif

// how far from 1 the sum of a row is; nothing where all is masked, with a slope of 0
__device__ __forceinline__ float farthest(Pair total, Pair slope) {
    return fmaxf(
        fminf(fabsf(total.row[0] - 1.0f), slope.row[0]), fminf(fabsf(total.row[1] - 1.0f), slope.row[1]));
}

// how far u moves: (1 - total^-b) total / (b slope), not further back than `least`
__device__ __forceinline__ float newton_step(float total, float slope, float b, float least) {
    slope = fmaxf(slope, LEAST);
#if ALPHA == 15
    const float norm = sqrtf(total);
    return fmaxf(2.0f * (norm - 1.0f) * norm / slope, least);
#elif ALPHA == 20
    return fmaxf((total - 1.0f) / slope, least);
#elif ALPHA == 0
    total = fmaxf(total, LEAST);
    return fmaxf((1.0f - fast_exp2(-b * fast_log2(total))) * total / (b * slope), least);
#else
    total = fmaxf(total, LEAST);
    return fmaxf(-expm1f(-b * logf(total)) * total / (b * slope), least);
#endif
}

// a quarter of the entmax weight: sums of values near the end of float32 stay within it
__device__ __forceinline__ float entmax(float c, float offset, float b, bool mixed) {
#if ALPHA == 15 || ALPHA == 20
    const float shrink = ALPHA == 15 ? 0.5f : 0.25f;
    const float r = saturated_product(c, b * (LN_2 * shrink), offset * shrink);
    return ALPHA == 15 ? r * r : r;
#elif ALPHA == 0
    const float r = saturated_product(c, b * LN_2, offset);
    return 0.25f * (POWER ? whole_power<POWER>(r) : fast_exp2(fast_log2(r) * (1.0f / b)));
#else
    float power;
    const float r = base(c, offset, b, mixed, &power);
    return 0.25f * power * r;
#endif
}

// The part of a chunk of keys or values that a thread copies, zeros past the last key and column: always the same 16
// bytes of a row, of every `rows_at_once`-th one.
template <int COLUMNS_THERE>
__device__ __forceinline__ void copy_chunk(half_t* buffer, const half_t* from, long long row, int first, int keys) {
    const int pieces = PADDED(COLUMNS_THERE) / 8, rows_at_once = WARPS * 32 / pieces;
    // addresses are computed anew: else they are kept, in registers that are not there
    int thread = (int)threadIdx.x;
    LOOK_CHANGED(thread);
    const int start = thread / pieces, column = thread % pieces * 8;
    if (start >= rows_at_once) return;
    buffer += start * STRIDE(COLUMNS_THERE) + column;
    from += (first + start) * row + column;
    // none of a column past the last one
    const int left = PADDED(COLUMNS_THERE) == COLUMNS_THERE || column < COLUMNS_THERE ? keys - first - start : 0;
    UNROLLED (int key = 0; key < CHUNK; key += rows_at_once)
        if (key + rows_at_once <= CHUNK || start < CHUNK - key)
            copy_16_bytes(buffer + key * STRIDE(COLUMNS_THERE), from + key * row, key < left);
}

// the key of a product's element, and whether it may be past the last one
#define FIRST_KEY(i) ((i) / TILES_OF_CHUNK * CHUNK + (i) % TILES_OF_CHUNK * 8)
#define KEY(i, e) (FIRST_KEY(i) + share * KEYS_OF_WARP + 2 * (lane & 3) + ((e) & 1))
#define MAY_BE_PAST(i) (FIRST_KEY(i) + (SHARE - 1) * KEYS_OF_WARP + 8 > LEAST_KEYS)
#define IS_MIXED(i, e) (!MIX || (mixed_bits[(i) / 16] >> ((i) % 16 * 2 + ((e) & 1)) & 1u))
#define FOR_SCORES UNROLLED (int i = 0; i < TILES; ++i) UNROLLED (int e = 0; e < 4; ++e)

extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS) pladis_attention(
    const half_t* query, const half_t* key, const half_t* value, half_t* out, const float* mask,
    const unsigned char* mixed, const float* mass, Problem s
) {
    const float b = ALPHA == 15 ? 0.5f : ALPHA == 20 ? 1.0f : POWER ? 1.0f / POWER : s.b;
    half_t* buffers = (half_t*)shared_memory();
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32, share = warp % SHARE, group = warp / SHARE;
    const int at_head = (int)(blockIdx.x / (unsigned)s.blocks), block = (int)(blockIdx.x % (unsigned)s.blocks);
    const int batch = at_head / s.heads, head = at_head % s.heads, head_of_key = head / s.groups;
    query += batch * s.query.batch + head * s.query.head;
    out += batch * s.out.batch + head * s.out.head;
    if (MASK) mask += batch * s.mask.batch + head * s.mask.head;
    if (MASS) mass += batch * s.mass.batch + head * s.mass.head;
    // behind the buffers
    Meeting meeting = {(float*)(buffers + 2 * BUFFER) + group * 4 * SHARE * ROWS, share, group + 1, 0};

    unsigned mixed_bits[(TILES + 15) / 16] = {};  // two bits for each product: whether its keys are mixed
#if MIX
    mixed += batch * s.mixed.batch;
    UNROLLED (int i = 0; i < TILES; ++i)
        UNROLLED (int e = 0; e < 2; ++e)
            if (KEY(i, e) < s.keys && mixed[KEY(i, e) * s.mixed.column]) mixed_bits[i / 16] |= 1u << (i % 16 * 2 + e);
#endif

    // the n-th of the chunks: those of the keys, then those of the values
    auto copy = [&](int n) {
        half_t* buffer = buffers + n % 2 * BUFFER;
        int i = batch;
        LOOK_CHANGED(i);
        if (n < CHUNKS)
            copy_chunk<WIDTH>(
                buffer, key + i * s.key.batch + head_of_key * s.key.head, s.key.row, n * CHUNK, s.keys);
        else
            copy_chunk<VALUE>(
                buffer, value + i * s.value.batch + head_of_key * s.value.head, s.value.row, (n - CHUNKS) * CHUNK,
                s.keys);
        end_copy();
    };
    // until the n-th chunk is there for all
    auto wait = [&](int n) {
        if (n + 1 < 2 * CHUNKS) wait_for_all_copies_but_one();
        else wait_for_copies();
        __syncthreads();
    };
    // the n-th chunk's buffer is free
    auto replace = [&](int n) {
        __syncthreads();
        if (n + 2 < 2 * CHUNKS) copy(n + 2);
    };

    const bool stay = CHUNKS == 1 && SHARE == 1;  // keys and values, in their buffers
    if (stay) {
        copy(0);
        copy(1);
    }
    const int tiles = (s.queries + ROWS - 1) / ROWS;
    bool first_tile = true;
    for (int start = block * GROUPS; start < tiles; start += s.blocks * GROUPS) {
        // rows past the last one are computed as that one, and not stored
        const int row = (start + group) * ROWS + lane / 4;
        const bool fresh = !stay || first_tile;
        first_tile = false;
        if (!stay) {
            copy(0);
            copy(1);
        }
        unsigned q[STEPS][4];
        const unsigned signs = FLIP ? 0x80008000u : 0u;
        UNROLLED (int h = 0; h < 2; ++h) {
            const half_t* from = query + min(row + 8 * h, s.queries - 1) * s.query.row + 2 * (lane & 3);
            UNROLLED (int k = 0; k < STEPS; ++k) {
                q[k][h] = *(const unsigned*)(from + 16 * k) ^ signs;
                q[k][h + 2] = 16 * k + 8 < WIDTH ? *(const unsigned*)(from + 16 * k + 8) ^ signs : 0u;
            }
        }

        float c[TILES][4] = {};
        UNROLLED (int n = 0; n < CHUNKS; ++n) {
            if (fresh) wait(n);
            // matrices of 8 keys and 8 columns: two for the first 8 keys, two for the next
            const half_t* from = buffers + n % 2 * BUFFER +
                (share * KEYS_OF_WARP + lane / 16 * 8 + lane % 8) * STRIDE(WIDTH) + lane / 8 % 2 * 8;
            const int first = n * TILES_OF_CHUNK;
            UNROLLED (int i = first; i < min(first + TILES_OF_CHUNK, TILES); i += 2)
                UNROLLED (int k = 0; k < STEPS; ++k) {
                    unsigned keys[4];
                    load_matrices(keys, from + (i - first) * 8 * STRIDE(WIDTH) + 16 * k);
                    multiply(c[i], q[k], keys);
                    multiply(c[i + 1], q[k], keys + 2);
                }
            if (CHUNKS > 1) replace(n);
        }

        Pair peak, centre, rise;  // of all keys; on which c is centred, of those mixed; from there to the peak
#if MASK
        const float gain = 1.0f;
#else
        const float gain = s.gain;
#endif
        auto find_peaks = [&]() {
            peak.row[0] = peak.row[1] = centre.row[0] = centre.row[1] = -LARGEST_SCORE;
            FOR_SCORES {
                peak.row[e / 2] = max_or_nan(peak.row[e / 2], c[i][e]);
                if (MIX && IS_MIXED(i, e)) centre.row[e / 2] = fmaxf(centre.row[e / 2], c[i][e]);
            }
            meeting.of_rows<false, MIX>(peak, centre);
            UNROLLED (int h = 0; h < 2; ++h) {
                if (!MIX || !((peak.row[h] - centre.row[h]) * gain <= FAR)) centre.row[h] = peak.row[h];
                rise.row[h] = (centre.row[h] - peak.row[h]) * gain;
            }
        };
        auto within = [](float x) { return fminf(fmaxf(x, -LARGEST_SCORE), LARGEST_SCORE); };
        auto leave_out_past = [&]() {
            FOR_SCORES if (MAY_BE_PAST(i) && KEY(i, e) >= s.keys) c[i][e] = MINUS_INFINITY;
        };
#if MASK
        UNROLLED (int h = 0; h < 2; ++h) {
            const float* biases = mask + min(row + 8 * h, s.queries - 1) * s.mask.row;
            FOR_SCORES {
                if (e / 2 != h) continue;
                const bool past = MAY_BE_PAST(i) && KEY(i, e) >= s.keys;
                const float bias = past ? MINUS_INFINITY : biases[KEY(i, e) * s.mask.column];
                c[i][e] = bias == MINUS_INFINITY ? bias : within(within(c[i][e] * s.gain) + bias * LOG2_E);
            }
        }
        find_peaks();
        FOR_SCORES c[i][e] -= centre.row[e / 2];
#else
        leave_out_past();
        find_peaks();
        // centred in one rounding, which is the same along a row: no matter, but for large scores
        const bool usual = fabsf(peak.row[0] * gain) < MODERATE && fabsf(peak.row[1] * gain) < MODERATE;
        if (!__any_sync(ALL_LANES, !usual)) {
            FOR_SCORES c[i][e] = fmaf(c[i][e], gain, -centre.row[e / 2] * gain);
        } else {
            // sums of products may have left the range of numbers, too
            FOR_SCORES c[i][e] = within(c[i][e]);
            leave_out_past();
            find_peaks();
            FOR_SCORES c[i][e] = (c[i][e] - centre.row[e / 2]) * gain;
        }
#endif
        Pair dense_sum = {}, part_sum = {};
        FOR_SCORES {
            const float p = fast_exp2(MIX ? c[i][e] + rise.row[e / 2] : c[i][e]);
            dense_sum.row[e / 2] += p;
            if (MIX && IS_MIXED(i, e)) part_sum.row[e / 2] += p;
        }
        meeting.of_rows<true, MIX>(dense_sum, part_sum);
        const float apart = MIX && ALPHA != 1 ? APART : 0.0f;
        if (MIX) FOR_SCORES if (!IS_MIXED(i, e)) c[i][e] -= apart;

        Pair u, step = {};
        u.row[0] = u.row[1] = s.start;
        int left = s.steps;
#if IN_HALVES
        // The first steps need few digits. What half precision gets wrong of u, the last ones, in float32, make good.
        unsigned pairs[TILES][2];
        UNROLLED (int i = 0; i < TILES; ++i)
            UNROLLED (int h = 0; h < 2; ++h) pairs[i][h] = two_halves(c[i][2 * h], c[i][2 * h + 1]);
        const unsigned factor = two_halves(b * LN_2, b * LN_2);
        // a product with it adds all that the lanes of a row have: of totals in even columns, of slopes in odd ones
        const unsigned adds[2] = {lane & 4 ? 0u : TWO_HALF_ONES, lane & 4 ? TWO_HALF_ONES : 0u};
        for (; left > LAST_STEPS; --left) {
            unsigned parts[4] = {};  // of totals of both rows, then of slopes
            UNROLLED (int h = 0; h < 2; ++h) {
                u.row[h] += step.row[h];
                const float offset = offset_of(u.row[h], b);
                const unsigned offsets = two_halves(offset, offset);
                UNROLLED (int i = 0; i < TILES; ++i) add_two(pairs[i][h], factor, offsets, parts[h], parts[2 + h]);
            }
            float sums[4] = {};
            multiply_halves(sums, parts, adds);
            Pair total = {sums[0], sums[2]}, slope = {sums[1], sums[3]};
            meeting.of_warps<true, true>(total, slope);
            UNROLLED (int h = 0; h < 2; ++h)
                step.row[h] = newton_step(total.row[h], slope.row[h], b, ROUNDED_BACK);
            if (!__any_sync(ALL_LANES, farthest(total, slope) > s.coarse)) {
                --left;
                break;
            }
        }
#endif
        for (; left > 0; --left) {
            Pair total = {}, slope = {}, offset;
            UNROLLED (int h = 0; h < 2; ++h) {
                u.row[h] += step.row[h];
                offset.row[h] = offset_of(u.row[h], b);
            }
            FOR_SCORES {
                float slope_here;
                const float r = base(c[i][e], offset.row[e / 2], b, IS_MIXED(i, e), &slope_here);
                total.row[e / 2] = ALPHA == 20 ? total.row[e / 2] + r : fmaf(r, slope_here, total.row[e / 2]);
                slope.row[e / 2] += slope_here;
            }
            meeting.of_rows<true, true>(total, slope);
            UNROLLED (int h = 0; h < 2; ++h)
                step.row[h] = newton_step(total.row[h], slope.row[h], b, IN_HALVES ? HALVES_BACK : ROUNDED_BACK);
            if (!__any_sync(ALL_LANES, farthest(total, slope) > s.tolerance)) break;
        }

        // factors, to a quarter of the weight: of exponentials, of those of keys that are not mixed, and of entmax
        Pair offset, of_dense, of_others, of_entmax;
        UNROLLED (int h = 0; h < 2; ++h) {
            const float sum = fmaxf(dense_sum.row[h], LEAST);
            offset.row[h] = offset_of(u.row[h] + step.row[h], b);
            of_dense.row[h] = 0.25f * s.dense / sum;
            of_others.row[h] = 0.25f * (s.dense + s.sparse) / sum;
            of_entmax.row[h] = MIX ? s.sparse * part_sum.row[h] / sum : s.sparse;
        }
        float results[COLUMNS][4] = {}, weight_sums[4] = {};
        UNROLLED (int n = 0; n < CHUNKS; ++n) {
            if (fresh) wait(CHUNKS + n);
            // matrices of 8 keys and 8 columns: the 16 keys of the first 8 columns, then of the next
            const half_t* from = buffers + (CHUNKS + n) % 2 * BUFFER +
                (share * KEYS_OF_WARP + lane % 16) * STRIDE(VALUE) + lane / 16 * 8;
            const int first = n * TILES_OF_CHUNK;
            UNROLLED (int j = first; j < min(first + TILES_OF_CHUNK, TILES); j += 2) {
                unsigned weights[4];
                UNROLLED (int half = 0; half < 2; ++half) {
                    float w[4];
                    UNROLLED (int e = 0; e < 4; ++e) {
                        const int i = j + half;
                        const bool is_mixed = IS_MIXED(i, e);
                        const float sparse = entmax(c[i][e], offset.row[e / 2], b, is_mixed);
                        const float up = is_mixed ? rise.row[e / 2] : rise.row[e / 2] + apart;
                        const float p = fast_exp2_again(MIX ? c[i][e] + up : c[i][e]);
                        w[e] = fmaf(
                            p, is_mixed ? of_dense.row[e / 2] : of_others.row[e / 2],
                            UNIT ? sparse : sparse * of_entmax.row[e / 2]);
                    }
                    weights[2 * half] = rounded(w[0], w[1]);
                    weights[2 * half + 1] = rounded(w[2], w[3]);
                }
                const unsigned ones[2] = {TWO_ONES, TWO_ONES};
                multiply(weight_sums, weights, ones);
                UNROLLED (int d = 0; d < COLUMNS; d += 2) {
                    unsigned values[4];
                    load_matrices_transposed(values, from + (j - first) * 8 * STRIDE(VALUE) + 8 * d);
                    multiply(results[d], weights, values);
                    multiply(results[d + 1], weights, values + 2);
                }
            }
            if (CHUNKS > 1) replace(CHUNKS + n);
        }

        // every column of the product with ones is the sum
        Pair weight_sum;
        weight_sum.row[0] = weight_sums[0], weight_sum.row[1] = weight_sums[2];
#if SHARE > 1
        // the first warp of a tile adds what the others have, where no warp reads any more: keys were there, if values
        // have a buffer of their own
        static_assert(CHUNKS > 1 || GROUPS * (SHARE - 1) * (COLUMNS * 4 + 2) * 32 * 4 <= BUFFER * 2);
        float* parts = (float*)buffers + group * (SHARE - 1) * (COLUMNS * 4 + 2) * 32;
        if (share) {
            float* mine = parts + (share - 1) * (COLUMNS * 4 + 2) * 32 + lane;
            UNROLLED (int d = 0; d < COLUMNS; ++d)
                UNROLLED (int e = 0; e < 4; ++e) mine[(d * 4 + e) * 32] = results[d][e];
            UNROLLED (int h = 0; h < 2; ++h) mine[(COLUMNS * 4 + h) * 32] = weight_sum.row[h];
        }
        __syncthreads();
        if (!share)
            UNROLLED (int other = 1; other < SHARE; ++other) {
                const float* theirs = parts + (other - 1) * (COLUMNS * 4 + 2) * 32 + lane;
                UNROLLED (int d = 0; d < COLUMNS; ++d)
                    UNROLLED (int e = 0; e < 4; ++e) results[d][e] += theirs[(d * 4 + e) * 32];
                UNROLLED (int h = 0; h < 2; ++h) weight_sum.row[h] += theirs[(COLUMNS * 4 + h) * 32];
            }
        // the buffers are free for the next tile
        __syncthreads();
        if (share) continue;
#endif
        UNROLLED (int h = 0; h < 2; ++h) {
            float factor = 4.0f * s.factor;
            const float sum = weight_sum.row[h];
            if (s.divided) factor *= sum != 0.0f ? 0.25f * (s.dense + s.sparse) / sum : 0.0f;
#if MASS
            float part = mass[min(row + 8 * h, s.queries - 1) * s.mass.row];
#if MASS == 2
            part = fast_exp2(peak.row[h] * gain + fast_log2(fmaxf(dense_sum.row[h], LEAST)) - part * LOG2_E);
            // the log-sum-exp of a row that is masked throughout may be anything
            part = dense_sum.row[h] > LEAST ? fminf(part, 1.0f) : 0.0f;
#endif
            factor *= part;
#endif
            // neighbours swap, so that each has four columns: even lanes of the first 8, odd ones of the next
            const bool odd = lane & 1;
            unsigned four[COLUMNS / 2][2];
            UNROLLED (int d = 0; d < COLUMNS; d += 2) {
                const unsigned here = saturated(results[d][2 * h] * factor, results[d][2 * h + 1] * factor);
                const unsigned next = saturated(results[d + 1][2 * h] * factor, results[d + 1][2 * h + 1] * factor);
                const unsigned theirs = __shfl_xor_sync(ALL_LANES, odd ? here : next, 1);
                four[d / 2][0] = odd ? theirs : here;
                four[d / 2][1] = odd ? next : theirs;
            }
            if (row + 8 * h >= s.queries) continue;
            half_t* to = out + (row + 8 * h) * s.out.row + 8 * odd + 4 * (lane % 4 / 2);
            UNROLLED (int d = 0; d < COLUMNS; d += 2)
                if (8 * d + 8 < VALUE || !odd) store_8_bytes(to + 8 * d, four[d / 2]);
        }
    }
}
