// What impl/rows.cu and impl/fused.cu take from CUDA, for a CPU: every thread of a block is a fiber, which gives way
// where it meets others. Of warps one that is drawn goes first: whoever does not wait for the others comes too early.
// The tests put definitions before this text, and the kernel and a loop over its blocks after it.
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define LOOK_CHANGED(x) (void)(x)
#define __expf expf
#define __logf logf

struct Index {
    unsigned x;
};
static Index blockIdx, threadIdx, blockDim;

// Fibers.

struct Barrier {
    int there = 0;
    unsigned turn = 0;
};
// 16 bytes from global into shared memory: at once, or when they are waited for
struct Copy {
    unsigned short* to;
    const unsigned short* from;
    bool inside;
};
struct Thread {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    bool done;
    Barrier* waits_for;
    unsigned turn;
    std::vector<std::vector<Copy>> copies;
};
static const size_t STACK = 1 << 18;
static std::vector<Thread> threads;
static ucontext_t scheduler;
static std::minstd_rand drawn;
static std::function<void()> kernel;
static Barrier of_block, of_number[16], of_warp[32];
alignas(16) static unsigned char shared_bytes[1 << 18];

static void give_way() { swapcontext(&threads[threadIdx.x].context, &scheduler); }

static void arrive_and_wait(Barrier& barrier, int all) {
    Thread& thread = threads[threadIdx.x];
    if (++barrier.there == all) {
        barrier.there = 0;
        ++barrier.turn;
        return;
    }
    thread.waits_for = &barrier;
    thread.turn = barrier.turn;
    give_way();
}

static void start() {
    kernel();
    threads[threadIdx.x].done = true;
    give_way();
}

// `kernel` as one block of `count` threads; false where they wait for each other in vain
static bool run_block(unsigned block, int count) {
    blockIdx.x = block, blockDim.x = count;
    threads.resize(count);
    std::memset(shared_bytes, 0xff, sizeof shared_bytes);
    for (Thread& thread : threads) {
        if (!thread.stack) thread.stack.reset(new char[STACK]);
        thread.done = false, thread.waits_for = nullptr;
        thread.copies.assign(1, {});
        getcontext(&thread.context);
        thread.context.uc_stack.ss_sp = thread.stack.get(), thread.context.uc_stack.ss_size = STACK;
        thread.context.uc_link = nullptr;
        makecontext(&thread.context, start, 0);
    }
    // a warp goes as far as others let it, then another one does
    int left = count;
    const auto moves = [&](int warp) {
        bool moved = false;
        for (int at = warp * 32; at < warp * 32 + 32; ++at) {
            Thread& thread = threads[at];
            if (thread.done || (thread.waits_for && thread.waits_for->turn == thread.turn)) continue;
            moved = true;
            thread.waits_for = nullptr;
            threadIdx.x = at;
            swapcontext(&scheduler, &thread.context);
            left -= thread.done;
        }
        return moved;
    };
    while (left) {
        const int warps = count / 32, first = drawn() / 64 % warps;
        bool moved = false;
        for (int i = 0; i < warps && !moved; ++i)
            while (moves((first + i) % warps)) moved = true;
        if (!moved) return false;
    }
    return true;
}

static void __syncthreads() { arrive_and_wait(of_block, blockDim.x); }
static void meet(int number, int count) { arrive_and_wait(of_number[number], count); }

// Warps: each lane leaves something for the others. The second of two places is free while others still read the first.

template <class T>
static const T* of_all_lanes(const T& mine) {
    static T left[32][2][32];
    static unsigned turns[32][32];
    const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32, turn = turns[warp][lane]++ & 1u;
    left[warp][turn][lane] = mine;
    arrive_and_wait(of_warp[warp], 32);
    return left[warp][turn];
}

template <class T>
static T __shfl_xor_sync(unsigned, T x, int other) {
    return of_all_lanes(x)[(threadIdx.x ^ (unsigned)other) & 31u];
}

static bool __all_sync(unsigned, bool x) {
    const bool* all = of_all_lanes(x);
    bool found = true;
    for (int lane = 0; lane < 32; ++lane) found = found && all[lane];
    return found;
}
static bool __any_sync(unsigned lanes, bool x) { return !__all_sync(lanes, !x); }

// Numbers.

template <class To, class From>
static To bits_of(From x) {
    To y;
    static_assert(sizeof x == sizeof y);
    std::memcpy(&y, &x, sizeof y);
    return y;
}
static float __int_as_float(int x) { return bits_of<float>(x); }
static float __uint_as_float(unsigned x) { return bits_of<float>(x); }
static unsigned __float_as_uint(float x) { return bits_of<unsigned>(x); }
static unsigned short float_to_half_bits(float x) { return bits_of<unsigned short>((_Float16)x); }
static float half_bits_to_float(unsigned short x) { return (float)bits_of<_Float16>(x); }
static int min(int x, int y) { return x < y ? x : y; }

#ifdef TYPE
// What impl/tensor_cores.cuh has.

#define RECENT 1
#define TWO_ONES (TYPE == 16 ? 0x3c003c00u : 0x3f803f80u)
#define TWO_HALF_ONES 0x3c003c00u

static float number(unsigned short x) { return TYPE == 16 ? half_bits_to_float(x) : __uint_as_float((unsigned)x << 16); }

static unsigned short rounded_to_type(float x) {
    if (TYPE == 16) return float_to_half_bits(x);
    const unsigned bits = __float_as_uint(x);
    return x != x ? 0x7fff : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}

static void* shared_memory() { return shared_bytes; }

static float flushed(float x) { return fabsf(x) < 1.17549435e-38f ? 0.0f : x; }
static float fast_exp2(float x) { return flushed(exp2f(x)); }
static float fast_exp2_again(float x) { return fast_exp2(x); }
static float fast_log2(float x) { return log2f(flushed(x)); }
static long saturated_products[2];  // of threads: of a number, and of two halves
static float saturated_sum(float a, float b, float c) { return fminf(fmaxf(fmaf(a, b, c), 0.0f), 1.0f); }
static float saturated_product(float a, float b, float c) {
    ++saturated_products[0];
    return saturated_sum(a, b, c);
}
static float max_or_nan(float x, float y) { return x != x || x > y ? x : y; }
static unsigned rounded(float first, float second) {
    return rounded_to_type(first) | (unsigned)rounded_to_type(second) << 16;
}
static float within_type(float x) {
    const float largest = TYPE == 16 ? 65504.0f : 3.3895314e38f;
    return fminf(fmaxf(x, -largest), largest);
}
static unsigned saturated(float first, float second) { return rounded(within_type(first), within_type(second)); }

static float half_of(unsigned both, int which) { return half_bits_to_float(both >> 16 * which); }
static unsigned two_halves(float first, float second) {
    return float_to_half_bits(first) | (unsigned)float_to_half_bits(second) << 16;
}
// what a function makes of each of two halves, rounded once
template <class F, class... Pairs>
static unsigned of_two(F f, Pairs... pairs) {
    return two_halves(f(half_of(pairs, 0)...), f(half_of(pairs, 1)...));
}
static unsigned two_products(unsigned a, unsigned b, unsigned c) { return of_two(fmaf, a, b, c); }
static unsigned two_saturated_products(unsigned a, unsigned b, unsigned c) {
    ++saturated_products[1];
    return of_two(saturated_sum, a, b, c);
}
static unsigned two_sums(unsigned a, unsigned b) {
    return of_two([](float x, float y) { return x + y; }, a, b);
}
static unsigned two_above_zero(unsigned a) {
    return of_two([](float x) { return x > 0.0f ? 1.0f : 0.0f; }, a);
}

struct Factors {
    unsigned a[4], b[2];
};

template <class Number>
static void multiply_as(Number number, float* sums, const unsigned* a, const unsigned* b) {
    Factors mine;
    std::memcpy(mine.a, a, sizeof mine.a);
    std::memcpy(mine.b, b, sizeof mine.b);
    const Factors* of = of_all_lanes(mine);
    const int lane = threadIdx.x % 32;
    for (int e = 0; e < 4; ++e) {
        const int row = lane / 4 + 8 * (e / 2), column = 2 * (lane % 4) + e % 2;
        float sum = 0.0f;
        for (int k = 0; k < 16; ++k) {
            const int pair = k % 8 / 2;
            sum += number(of[row % 8 * 4 + pair].a[row / 8 + 2 * (k / 8)] >> 16 * (k % 2)) *
                number(of[column * 4 + pair].b[k / 8] >> 16 * (k % 2));
        }
        sums[e] += sum;
    }
}
static void multiply(float* sums, const unsigned* a, const unsigned* b) { multiply_as(number, sums, a, b); }
static void multiply_halves(float* sums, const unsigned* a, const unsigned* b) {
    multiply_as(half_bits_to_float, sums, a, b);
}

static void load_matrices(unsigned* parts, const unsigned short* row) {
    const unsigned short* const* rows = of_all_lanes(row);
    const int lane = threadIdx.x % 32;
    for (int m = 0; m < 4; ++m) std::memcpy(parts + m, rows[8 * m + lane / 4] + 2 * (lane % 4), 4);
}

static void load_matrices_transposed(unsigned* parts, const unsigned short* row) {
    const unsigned short* const* rows = of_all_lanes(row);
    const int lane = threadIdx.x % 32, first = 2 * (lane % 4);
    for (int m = 0; m < 4; ++m)
        parts[m] = rows[8 * m + first][lane / 4] | (unsigned)rows[8 * m + first + 1][lane / 4] << 16;
}

static void done(const Copy& copy) {
    if (copy.inside) std::memcpy(copy.to, copy.from, 16);
    else std::memset(copy.to, 0, 16);
}
static void copy_16_bytes(unsigned short* to, const unsigned short* from, bool inside) {
    const Copy copy = {to, from, inside};
    if (drawn() & 64u) done(copy);
    else threads[threadIdx.x].copies.back().push_back(copy);
}
static void end_copy() { threads[threadIdx.x].copies.push_back({}); }
static void wait_for_all_copies_but(size_t last) {
    auto& groups = threads[threadIdx.x].copies;
    while (groups.size() > 1 + last) {
        for (const Copy& copy : groups.front()) done(copy);
        groups.erase(groups.begin());
    }
}
static void wait_for_copies() { wait_for_all_copies_but(0); }
static void wait_for_all_copies_but_one() { wait_for_all_copies_but(1); }
static void store_8_bytes(unsigned short* to, const unsigned* four) { std::memcpy(to, four, 8); }
#endif
