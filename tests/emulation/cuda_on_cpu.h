// CUDA, as far as the kernels use it, on one thread of a CPU: what a kernel's source sees.
//
// Included ahead of the source (g++ -include). A CUDA thread is a fiber; every function here that waits for others
// hands over to another fiber, in an order drawn from a seed. The scheduler and all that is not a few instructions is
// in cuda_on_cpu.cpp, which is compiled once. No system header: this one is compiled with every variant of a kernel.
//
// Found, as an error with the place or as a wrong result under some seed: missing barriers, waits and guards, accesses
// outside of shared memory and of arguments, misaligned accesses and copies, indices outside of arrays, overflowing
// ints, divergence at what a block or a warp does together, waiting for ever. Not found: what depends on the memory
// model of a GPU, since all fibers see one memory in the order of execution (a missing fence, an atomic that is too
// weak), and what depends on preemption between two functions of this header.
#pragma once

#define SD_EMULATED 1

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

typedef unsigned short half_bits;

struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) int2 {
    int x, y;
};
struct alignas(16) int4 {
    int x, y, z, w;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static inline int2 make_int2(int x, int y) { return {x, y}; }
static inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
static inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
static inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

namespace emulator {

struct Index {
    unsigned x, y, z;
};

// Where the running fiber is.
struct Place {
    Index thread, block;
    unsigned char* shared;  // its block's memory
};
extern Place* here;
extern Index grid_size, block_size;

// What a warp does together. The order is that of the names in cuda_on_cpu.cpp.
enum Together {
    SYNC_WARP, SHUFFLE, MMA_TF32, MMA_F16, MMA_BF16, LDMATRIX_X2, LDMATRIX_X2_T, LDMATRIX_X4, LDMATRIX_X4_T
};

// These run in cuda_on_cpu.cpp. `line` is that of the call in the kernel's source.
void sync_threads(int line);
// All lanes of `mask` give `in` and get `out`, words of 32 bits as `what` needs them.
void together(Together what, unsigned mask, const void* in, void* out, int line);
void copy_async(void* shared, const void* global, unsigned size, bool valid, int line);
void copy_commit(int line);
void copy_wait(int groups, int line);
void announce_to(unsigned* counter, int line);
void await_count(const unsigned* counter, unsigned count, int line);
[[noreturn]] void trap(int line);

// ---- launching: what of a kernel the other side needs to know ---------------------------------------------------

struct Parameter {
    char kind;      // p: pointer, i: integer, f: floating point
    char constant;  // what it points to
    char element;   // what it points to: as above, h for 16 bits of any kind, ? for a struct
    char size;      // of the element or the value
};
struct Kernel {
    void (*call)(void* const* arguments);
    const Parameter* parameters;
    int count;
    int most_threads;  // of a block
};

template <class T>
struct KindOf {
    static constexpr char value = '?';
};
#define SD_KIND(type, kind)                   \
    template <>                               \
    struct KindOf<type> {                     \
        static constexpr char value = kind;   \
    };
SD_KIND(float, 'f')
SD_KIND(double, 'f')
SD_KIND(unsigned short, 'h')
SD_KIND(short, 'h')
SD_KIND(bool, 'i')
SD_KIND(char, 'i')
SD_KIND(signed char, 'i')
SD_KIND(unsigned char, 'i')
SD_KIND(int, 'i')
SD_KIND(unsigned, 'i')
SD_KIND(long long, 'i')
SD_KIND(unsigned long long, 'i')
#undef SD_KIND

template <class T>
struct ParameterOf {
    static constexpr Parameter value = {KindOf<T>::value, 0, 0, sizeof(T)};
};
template <class T>
struct ParameterOf<T*> {
    static constexpr Parameter value = {'p', 0, KindOf<T>::value, sizeof(T)};
};
template <class T>
struct ParameterOf<const T*> {
    static constexpr Parameter value = {'p', 1, KindOf<T>::value, sizeof(T)};
};

template <unsigned... I>
struct Numbers {};
template <unsigned N, unsigned... I>
struct Count : Count<N - 1, N - 1, I...> {};
template <unsigned... I>
struct Count<0, I...> {
    typedef Numbers<I...> type;
};

template <class F>
struct Plain;  // without the __restrict of parameters, which is not part of a function's type
template <class... P>
struct Plain<void(P...)> {
    static constexpr int count = sizeof...(P);
    static constexpr Parameter parameters[sizeof...(P) + 1] = {ParameterOf<P>::value...};
    template <unsigned... I>
    static void apply(void (*kernel)(P...), void* const* arguments, Numbers<I...>) {
        kernel(*(P*)arguments[I]...);
    }
    template <void (*kernel)(P...)>
    static void call(void* const* arguments) {
        apply(kernel, arguments, typename Count<sizeof...(P)>::type());
    }
};

// Makes the kernel `name`, declared before, known to the other side. The argument after it: __launch_bounds__ or 1024.
#define SD_EMULATED_KERNEL(name, most_threads)                                                             \
    extern "C" __attribute__((visibility("default"))) const emulator::Kernel sd_emulated_##name = {        \
        emulator::Plain<decltype(name)>::call<name>, emulator::Plain<decltype(name)>::parameters,          \
        emulator::Plain<decltype(name)>::count, most_threads};
#define SD_FIRST(first, ...) (first)

template <class To, class From>
static inline To bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "bits of another size");
    To to;
    __builtin_memcpy(&to, &from, sizeof(To));
    return to;
}

template <class T>
static inline T shuffle(unsigned mask, T value, unsigned lane, int line) {
    static_assert(sizeof(T) == 4, "shuffles take 32 bits");
    unsigned both[2] = {bits<unsigned>(value), lane}, got;
    together(SHUFFLE, mask, both, &got, line);
    return bits<T>(got);
}

}  // namespace emulator

// ---- CUDA's names -----------------------------------------------------------------------------------------------

#define threadIdx (emulator::here->thread)
#define blockIdx (emulator::here->block)
#define blockDim (emulator::block_size)
#define gridDim (emulator::grid_size)
static const int warpSize = 32;

static inline void __syncthreads(int line = __builtin_LINE()) { emulator::sync_threads(line); }
static inline void __syncwarp(unsigned mask = 0xffffffffu, int line = __builtin_LINE()) {
    emulator::together(emulator::SYNC_WARP, mask, nullptr, nullptr, line);
}
template <class T>
static inline T __shfl_sync(unsigned mask, T value, int lane, int width = 32, int line = __builtin_LINE()) {
    const int own = threadIdx.x % 32;
    return emulator::shuffle(mask, value, (own & -width) + (lane & (width - 1)), line);
}
template <class T>
static inline T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, int line = __builtin_LINE()) {
    const int own = threadIdx.x % 32, other = own ^ lanes;
    return emulator::shuffle(mask, value, other < (own & -width) + width ? other : own, line);
}
template <class T>
static inline T __shfl_down_sync(unsigned mask, T value, int by, int width = 32, int line = __builtin_LINE()) {
    const int own = threadIdx.x % 32, other = own + by;
    return emulator::shuffle(mask, value, other < (own & -width) + width ? other : own, line);
}
template <class T>
static inline T __shfl_up_sync(unsigned mask, T value, int by, int width = 32, int line = __builtin_LINE()) {
    const int own = threadIdx.x % 32, other = own - by;
    return emulator::shuffle(mask, value, other >= (own & -width) ? other : own, line);
}

template <class T>
static inline T __ldg(const T* p) {
    return *p;
}
template <class T>
static inline T __ldcg(const T* p) {
    return *p;
}

static inline float __uint_as_float(unsigned x) { return emulator::bits<float>(x); }
static inline unsigned __float_as_uint(float x) { return emulator::bits<unsigned>(x); }
static inline float __int_as_float(int x) { return emulator::bits<float>(x); }
static inline int __float_as_int(float x) { return emulator::bits<int>(x); }

static inline float expf(float x) { return __builtin_expf(x); }
static inline float logf(float x) { return __builtin_logf(x); }
static inline float tanhf(float x) { return __builtin_tanhf(x); }
static inline float sqrtf(float x) { return __builtin_sqrtf(x); }
static inline float fabsf(float x) { return __builtin_fabsf(x); }
static inline float fmaf(float x, float y, float z) { return __builtin_fmaf(x, y, z); }
static inline float fmaxf(float x, float y) { return __builtin_fmaxf(x, y); }
static inline float fminf(float x, float y) { return __builtin_fminf(x, y); }
#define SD_MIN_MAX(type)                                                \
    static inline type min(type x, type y) { return y < x ? y : x; }    \
    static inline type max(type x, type y) { return x < y ? y : x; }
SD_MIN_MAX(int)
SD_MIN_MAX(unsigned)
SD_MIN_MAX(long long)
SD_MIN_MAX(unsigned long long)
#undef SD_MIN_MAX
static inline float min(float x, float y) { return fminf(x, y); }
static inline float max(float x, float y) { return fmaxf(x, y); }

// ---- device.cuh between its marks -------------------------------------------------------------------------------

#define SD_SHARED_MEMORY(name) unsigned char* const name = emulator::here->shared

// Read and written when the thread waits for it, or at some moment before; not a number until then.
static inline void cp_async_16(void* shared, const void* global, bool valid, int line = __builtin_LINE()) {
    emulator::copy_async(shared, global, 16, valid, line);
}
static inline void cp_async_4(void* shared, const void* global, bool valid, int line = __builtin_LINE()) {
    emulator::copy_async(shared, global, 4, valid, line);
}
static inline void cp_async_commit(int line = __builtin_LINE()) { emulator::copy_commit(line); }
template <int N>
static inline void cp_async_wait(int line = __builtin_LINE()) {
    emulator::copy_wait(N, line);
}

namespace emulator {
static inline void product(Together what, float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2], int line) {
    unsigned in[10];
    __builtin_memcpy(in, a, sizeof a);
    __builtin_memcpy(in + 4, b, sizeof b);
    __builtin_memcpy(in + 6, c, sizeof c);
    together(what, 0xffffffffu, in, c, line);
}
}  // namespace emulator
static inline void mma_tf32(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2],
                            int line = __builtin_LINE()) {
    emulator::product(emulator::MMA_TF32, c, a, b, line);
}
static inline void mma_f16(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2],
                           int line = __builtin_LINE()) {
    emulator::product(emulator::MMA_F16, c, a, b, line);
}
static inline void mma_bf16(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2],
                            int line = __builtin_LINE()) {
    emulator::product(emulator::MMA_BF16, c, a, b, line);
}

static inline void ldmatrix_x4(unsigned (&r)[4], const void* row, int line = __builtin_LINE()) {
    emulator::together(emulator::LDMATRIX_X4, 0xffffffffu, &row, r, line);
}
static inline void ldmatrix_x4_trans(unsigned (&r)[4], const void* row, int line = __builtin_LINE()) {
    emulator::together(emulator::LDMATRIX_X4_T, 0xffffffffu, &row, r, line);
}
static inline void ldmatrix_x2(unsigned (&r)[2], const void* row, int line = __builtin_LINE()) {
    emulator::together(emulator::LDMATRIX_X2, 0xffffffffu, &row, r, line);
}
static inline void ldmatrix_x2_trans(unsigned (&r)[2], const void* row, int line = __builtin_LINE()) {
    emulator::together(emulator::LDMATRIX_X2_T, 0xffffffffu, &row, r, line);
}

static inline unsigned tf32_bits(float x) {
    const unsigned u = __float_as_uint(x);
    // Ties away from zero: half of the last bit kept is added to the magnitude. An infinity has nothing to round.
    return ((u & 0x7fffffffu) > 0x7f800000u ? 0x7fffffffu : u + 0x1000u) & 0xffffe000u;
}
static inline float f16_to_float(half_bits h) {
    const unsigned sign = (unsigned)(h & 0x8000u) << 16, magnitude = h & 0x7fffu;
    if (magnitude >= 0x7c00u) return __uint_as_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
    // As a float with float16's exponent bits, off by the difference of the biases; exact for subnormals too.
    return __uint_as_float(sign | __float_as_uint(__uint_as_float(magnitude << 13) * 0x1p112f));
}
static inline half_bits float_to_f16(float f) {
    const unsigned u = __float_as_uint(f), sign = u >> 16 & 0x8000u, magnitude = u & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return 0x7fff;
    if (magnitude >= 0x477ff000u) return (half_bits)(sign | 0x7c00u);  // 65520 and more
    if (magnitude < 0x38800000u)  // subnormal: adding 0.5 leaves the multiple of 2^-24 in the lowest bits, rounded
        return (half_bits)(sign | (__float_as_uint(__uint_as_float(magnitude) + 0.5f) - 0x3f000000u));
    return (half_bits)(sign | (magnitude + 0xfffu + (magnitude >> 13 & 1u) - 0x38000000u) >> 13);
}
static inline half_bits float_to_bf16(float f) {
    const unsigned u = __float_as_uint(f);
    if ((u & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
    return (half_bits)((u + 0x7fffu + (u >> 16 & 1u)) >> 16);
}

static inline float load_shared_by_blocks(const float* p) { return *p; }
static inline float4 load_shared_by_blocks(const float4* p) { return *p; }

static inline void announce(unsigned* counter, int line = __builtin_LINE()) { emulator::announce_to(counter, line); }
static inline void await(const unsigned* counter, unsigned count, int line = __builtin_LINE()) {
    emulator::await_count(counter, count, line);
}
static inline void stop_unless(bool holds, int line = __builtin_LINE()) {
    if (!holds) emulator::trap(line);
}
