// What pladis_core/impl/rows.cu takes from CUDA, for a CPU: the 32 lanes of a warp are threads, which meet where lanes do.
// tests/core/test_nvrtc.py puts a variant's definitions before this text, and rows.cu and the loops below after it.
#include <barrier>
#include <cmath>
#include <cstring>
#include <thread>
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
static thread_local Index blockIdx, threadIdx;
static const Index blockDim{128};

static std::barrier<> lanes_meet(32);
static float lane_values[32];

static float __shfl_xor_sync(unsigned, float x, int other) {
    const unsigned lane = threadIdx.x & 31u;
    lane_values[lane] = x;
    lanes_meet.arrive_and_wait();
    const float theirs = lane_values[lane ^ (unsigned)other];
    lanes_meet.arrive_and_wait();
    return theirs;
}

static bool __all_sync(unsigned, bool x) {
    lane_values[threadIdx.x & 31u] = x;
    lanes_meet.arrive_and_wait();
    bool all = true;
    for (float value : lane_values) all = all && value != 0.0f;
    lanes_meet.arrive_and_wait();
    return all;
}

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
