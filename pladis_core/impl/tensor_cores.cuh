// What impl/fused.cu asks of a GPU in one instruction, for NVIDIA's compute capabilities from 7.5 on. Registers of two
// 16-bit numbers are unsigned, the first in the low half. In the tests a CPU does the same (tests/core/warps_on_cpu.cpp).
//
// Defined before this text: TYPE, 16 for float16 or 17 for bfloat16, which needs 8.0.

#define RECENT (__CUDA_ARCH__ >= 800)
#if TYPE == 16
#define NAME "f16"
#define TWO_ONES 0x3c003c00u
#define LARGEST 65504.0f
#else
#define NAME "bf16"
#define TWO_ONES 0x3f803f80u
#define LARGEST 3.3895314e38f
#endif

// whoever computed something from it computes it again
#define LOOK_CHANGED(x) asm volatile("" : "+r"(x))

__device__ __forceinline__ void* shared_memory() {
    extern __shared__ uint4 memory[];
    return memory;
}

// 2^x, and log2(x) to an absolute error of 2^-22
__device__ __forceinline__ float fast_exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
// the same; what is written otherwise is computed again, not kept in registers that others need
__device__ __forceinline__ float fast_exp2_again(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;  // again" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float fast_log2(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// a b + c, not below 0 nor above 1
__device__ __forceinline__ float saturated_product(float a, float b, float c) {
    float r;
    asm("fma.rn.ftz.sat.f32 %0, %1, %2, %3;" : "=f"(r) : "f"(a), "f"(b), "f"(c));
    return r;
}

// the larger one, or what is not a number
__device__ __forceinline__ float max_or_nan(float x, float y) {
#if RECENT
    float z;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
    return z;
#else
    return x > y || x != x ? x : y;
#endif
}

// two numbers, rounded to the type; and those beyond its largest as that
__device__ __forceinline__ unsigned rounded(float first, float second) {
    unsigned both;
#if RECENT
    asm("cvt.rn." NAME "x2.f32 %0, %2, %1;" : "=r"(both) : "f"(first), "f"(second));
#else
    asm("{.reg .b16 a, b; cvt.rn.f16.f32 a, %1; cvt.rn.f16.f32 b, %2; mov.b32 %0, {a, b};}"
        : "=r"(both) : "f"(first), "f"(second));
#endif
    return both;
}
__device__ __forceinline__ unsigned saturated(float first, float second) {
#if RECENT && __CUDACC_VER_MAJOR__ * 100 + __CUDACC_VER_MINOR__ >= 1201
    unsigned both;
    asm("cvt.rn.satfinite." NAME "x2.f32 %0, %2, %1;" : "=r"(both) : "f"(first), "f"(second));
    return both;
#else
    return rounded(fminf(fmaxf(first, -LARGEST), LARGEST), fminf(fmaxf(second, -LARGEST), LARGEST));
#endif
}

#if RECENT
// Pairs of float16 numbers, whatever the type.
#define TWO_HALF_ONES 0x3c003c00u
__device__ __forceinline__ unsigned two_halves(float first, float second) {
    unsigned both;
    asm("cvt.rn.f16x2.f32 %0, %2, %1;" : "=r"(both) : "f"(first), "f"(second));
    return both;
}
// a b + c, also not below 0 nor above 1; a + b; 1 where above 0, else 0
__device__ __forceinline__ unsigned two_products(unsigned a, unsigned b, unsigned c) {
    unsigned both;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(both) : "r"(a), "r"(b), "r"(c));
    return both;
}
__device__ __forceinline__ unsigned two_saturated_products(unsigned a, unsigned b, unsigned c) {
    unsigned both;
    asm("fma.rn.sat.f16x2 %0, %1, %2, %3;" : "=r"(both) : "r"(a), "r"(b), "r"(c));
    return both;
}
__device__ __forceinline__ unsigned two_sums(unsigned a, unsigned b) {
    unsigned both;
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(both) : "r"(a), "r"(b));
    return both;
}
__device__ __forceinline__ unsigned two_above_zero(unsigned a) {
    unsigned both;
    asm("set.gt.f16x2.f16x2 %0, %1, %2;" : "=r"(both) : "r"(a), "r"(0u));
    return both;
}
#endif

// sums += a b: 16 rows by 16, 16 by 8 columns, in mma's layout; of the type, and of float16
#if RECENT
#define MULTIPLY(name) \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." name "." name ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, " \
        "{%0, %1, %2, %3};" \
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3]) \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
__device__ __forceinline__ void multiply(float* sums, const unsigned* a, const unsigned* b) { MULTIPLY(NAME); }
__device__ __forceinline__ void multiply_halves(float* sums, const unsigned* a, const unsigned* b) { MULTIPLY("f16"); }
#else
__device__ __forceinline__ void multiply(float* sums, const unsigned* a, const unsigned* b) {
    for (int half = 0; half < 2; ++half)
        asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
            : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
            : "r"(a[2 * half]), "r"(a[2 * half + 1]), "r"(b[half]));
}
#endif

// Four matrices of 8 rows of 16 bytes in shared memory, the l-th lane having the address of row l % 8 of the l / 8-th:
// of each, a lane gets the two numbers that mma wants of its second factor, given by columns; or, transposed, by rows.
__device__ __forceinline__ void load_matrices(unsigned* parts, const unsigned short* row) {
    const unsigned at = (unsigned)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
        : "=r"(parts[0]), "=r"(parts[1]), "=r"(parts[2]), "=r"(parts[3]) : "r"(at) : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(unsigned* parts, const unsigned short* row) {
    const unsigned at = (unsigned)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
        : "=r"(parts[0]), "=r"(parts[1]), "=r"(parts[2]), "=r"(parts[3]) : "r"(at) : "memory");
}

// 16 bytes into shared memory, zeros where they are not `inside`; on newer GPUs beside what runs on
__device__ __forceinline__ void copy_16_bytes(unsigned short* to, const unsigned short* from, bool inside) {
#if RECENT
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
        : : "r"((unsigned)__cvta_generic_to_shared(to)), "l"(from), "r"(inside ? 16 : 0) : "memory");
#else
    *(uint4*)to = inside ? *(const uint4*)from : make_uint4(0, 0, 0, 0);
#endif
}
__device__ __forceinline__ void end_copy() {
#if RECENT
    asm volatile("cp.async.commit_group;" : : : "memory");
#endif
}
__device__ __forceinline__ void wait_for_copies() {
#if RECENT
    asm volatile("cp.async.wait_group 0;" : : : "memory");
#endif
}
__device__ __forceinline__ void wait_for_all_copies_but_one() {
#if RECENT
    asm volatile("cp.async.wait_group 1;" : : : "memory");
#endif
}

__device__ __forceinline__ void store_8_bytes(unsigned short* to, const unsigned* four) {
    *(uint2*)to = make_uint2(four[0], four[1]);
}

// of the threads that call it with this number, from 1 on
__device__ __forceinline__ void meet(int number, int threads) {
    asm volatile("bar.sync %0, %1;" : : "r"(number), "r"(threads) : "memory");
}
