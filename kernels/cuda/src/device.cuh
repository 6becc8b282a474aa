// What every kernel here is written in: storage types, tensor-core products, asynchronous copies, a barrier of blocks.
//
// No header is included, so that NVRTC compiles in milliseconds and needs no toolkit. Under SD_EMULATED the functions
// between the two marks come from another implementation of the same names, which runs on a CPU for the tests.
#pragma once

// Storage of operands (SD_PRECISION): float in full precision, float rounded to TF32, float16, bfloat16. Sums are float.
#define SD_STRICT 0
#define SD_TF32 1
#define SD_F16 2
#define SD_BF16 3
#ifndef SD_PRECISION
#define SD_PRECISION SD_STRICT
#endif

typedef unsigned short half_bits;  // of a float16 or bfloat16

#ifndef SD_EMULATED
// ---- what an emulation replaces --------------------------------------------------------------------------------
#define SD_SHARED_MEMORY(name) extern __shared__ __align__(128) unsigned char name[]

static __device__ __forceinline__ unsigned shared_address(const void* p) {
    return (unsigned)__cvta_generic_to_shared(p);
}

// Copies 16 (or 4) bytes to shared memory some time before cp_async_wait says so; zeros, and nothing read, if !valid.
// Both addresses are multiples of the size.
static __device__ __forceinline__ void cp_async_16(void* shared, const void* global, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
                 "r"(valid ? 16 : 0)
                 : "memory");
}
static __device__ __forceinline__ void cp_async_4(void* shared, const void* global, bool valid) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(shared)), "l"(global),
                 "r"(valid ? 4 : 0)
                 : "memory");
}
// Closes this thread's group of copies.
static __device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most N of this thread's latest groups are under way. Other threads see the data after a barrier.
template <int N>
static __device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// c[16x8] += a[16x8] b[8x8] by a warp, in TF32: PTX mma.m16n8k8, its fragment layout. Lane = 4 g + q.
// a: (g, q), (g+8, q), (g, q+4), (g+8, q+4);  b: (q, g), (q+4, g);  c: (g, 2q), (g, 2q+1), (g+8, 2q), (g+8, 2q+1).
static __device__ __forceinline__ void mma_tf32(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// c[16x8] += a[16x16] b[16x8] by a warp: PTX mma.m16n8k16; a register holds two neighbours in k, the first in its low
// half. a: (g, 2q), (g+8, 2q), (g, 2q+8), (g+8, 2q+8);  b: (2q, g), (2q+8, g);  c as above.
static __device__ __forceinline__ void mma_f16(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
static __device__ __forceinline__ void mma_bf16(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Loads 8x8 matrices of 16-bit elements from shared memory. Lane l gives the address of row l % 8 of matrix l / 8, 16
// bytes wherever they lie (x2: lanes 0 to 15). Of each matrix, a lane gets row g, columns 2q and 2q+1, in one register;
// transposed: rows 2q and 2q+1, column g.
static __device__ __forceinline__ void ldmatrix_x4(unsigned (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}
static __device__ __forceinline__ void ldmatrix_x4_trans(unsigned (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}
static __device__ __forceinline__ void ldmatrix_x2(unsigned (&r)[2], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(shared_address(row))
                 : "memory");
}
static __device__ __forceinline__ void ldmatrix_x2_trans(unsigned (&r)[2], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(shared_address(row))
                 : "memory");
}

// The bits of a float rounded to TF32 (ties away from zero), the low 13 bits zero.
static __device__ __forceinline__ unsigned tf32_bits(float x) {
    unsigned r;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(x));
    return r & 0xffffe000u;
}
static __device__ __forceinline__ float f16_to_float(half_bits h) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
    return f;
}
static __device__ __forceinline__ half_bits float_to_f16(float f) {
    half_bits h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
    return h;
}
static __device__ __forceinline__ half_bits float_to_bf16(float f) {
    half_bits h;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h) : "f"(f));
    return h;
}

// Reads past the L1 cache, where other blocks write during the kernel.
static __device__ __forceinline__ float load_shared_by_blocks(const float* p) { return __ldcg(p); }
static __device__ __forceinline__ float4 load_shared_by_blocks(const float4* p) { return __ldcg(p); }

// A counter in global memory on which blocks wait for each other. Everything this block wrote before `announce` (by
// the calling thread, or before a barrier of the block) is seen by whoever has `await`ed the count, and by its block
// after a barrier: release and acquire are cumulative, and no other fence is needed. Called by one thread of a block.
static __device__ __forceinline__ void announce(unsigned* counter) {
    asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
}
static __device__ __forceinline__ void await(const unsigned* counter, unsigned count) {
    unsigned seen;
    do {
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
    } while (seen < count);
}
// A launch that breaks what the kernel relies on must not end as if it had worked.
static __device__ __forceinline__ void stop_unless(bool holds) {
    if (!holds) asm volatile("trap;");
}
// ----------------------------------------------------------------------------------------------------------------
#endif

static __device__ __forceinline__ float bf16_to_float(half_bits h) { return __uint_as_float((unsigned)h << 16); }

#if SD_PRECISION == SD_F16 || SD_PRECISION == SD_BF16
#define SD_HALF 1
typedef half_bits real;
#else
#define SD_HALF 0
typedef float real;
#endif

// `real` is how operands are stored; TF32 operands that a kernel writes for another are rounded when written.
static __device__ __forceinline__ float to_float(real x) {
#if SD_PRECISION == SD_F16
    return f16_to_float(x);
#elif SD_PRECISION == SD_BF16
    return bf16_to_float(x);
#else
    return x;
#endif
}
static __device__ __forceinline__ real to_real(float x) {
#if SD_PRECISION == SD_F16
    return float_to_f16(x);
#elif SD_PRECISION == SD_BF16
    return float_to_bf16(x);
#else
    return x;
#endif
}
// As an operand of a product: rounded to what the tensor cores take.
static __device__ __forceinline__ real to_operand(float x) {
#if SD_PRECISION == SD_TF32
    return __uint_as_float(tf32_bits(x));
#else
    return to_real(x);
#endif
}
#if SD_HALF
static __device__ __forceinline__ void mma_half(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
#if SD_PRECISION == SD_F16
    mma_f16(c, a, b);
#else
    mma_bf16(c, a, b);
#endif
}
#endif
