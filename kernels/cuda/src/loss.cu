// Cross entropy of each row of logits, and its gradient: one block for a row, each element read once.
//
// float32 arithmetic whatever the logits are stored as. Rows may begin anywhere: elements before the first multiple of
// 16 bytes, and after the last one, are read one by one, those between by as many as 16 bytes hold.
#include "device.cuh"

#define MOST_THREADS 512
#define WARPS_OF(threads) ((threads) / 32)
#define PER_LOAD ((int)(16 / sizeof(real)))

// Elements of a row before the first multiple of 16 bytes.
static __device__ __forceinline__ int head_of(const real* row, int columns) {
    return min((int)((16 - (unsigned long long)row % 16) % 16 / sizeof(real)), columns);
}

static __device__ __forceinline__ void load(float (&values)[PER_LOAD], const real* from) {
    const uint4 bits = *(const uint4*)from;
    const unsigned words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int i = 0; i < PER_LOAD; ++i)
#if SD_HALF
        values[i] = to_float((real)(words[i / 2] >> 16 * (i % 2)));
#else
        values[i] = __uint_as_float(words[i]);
#endif
}
static __device__ __forceinline__ void store(real* to, const float (&values)[PER_LOAD]) {
    unsigned words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
#if SD_HALF
        words[i] = to_real(values[2 * i]) | (unsigned)to_real(values[2 * i + 1]) << 16;
#else
        words[i] = __float_as_uint(values[i]);
#endif
    uint4 bits;
    bits.x = words[0], bits.y = words[1], bits.z = words[2], bits.w = words[3];
    *(uint4*)to = bits;
}

// Calls one(column) and many(first column of PER_LOAD), together for every column, of which this thread has a part.
template <class One, class Many>
static __device__ __forceinline__ void each_column(int head, int columns, One one, Many many) {
    const int loads = (columns - head) / PER_LOAD, tail = head + loads * PER_LOAD;
    for (int i = threadIdx.x; i < head; i += blockDim.x) one(i);
#pragma unroll 4
    for (int i = threadIdx.x; i < loads; i += blockDim.x) many(head + i * PER_LOAD);
    for (int i = tail + threadIdx.x; i < columns; i += blockDim.x) one(i);
}

static __device__ __forceinline__ float infinity() { return __uint_as_float(0x7f800000u); }

// The sum of the exponentials of some values, as a multiple of the exponential of the largest, and their own sum.
// An infinite value leaves the exponent alone, since the difference of two is no number.
struct Total {
    float largest, sum, plain;

    static __device__ __forceinline__ float base(float largest) {
        return largest == infinity() || largest == -infinity() ? 0.f : largest;
    }
    __device__ __forceinline__ void raise(float to) {
        if (!(to > largest)) return;
        // Of no finite value, the sum is zero, infinite or no number, whatever the exponent.
        if (largest != -infinity()) sum *= expf(largest - base(to));
        largest = to;
    }
    template <int N>
    __device__ __forceinline__ void add(const float (&values)[N]) {
        float most = values[0];
#pragma unroll
        for (int i = 1; i < N; ++i) most = fmaxf(most, values[i]);
        raise(most);
#pragma unroll
        for (int i = 0; i < N; ++i) {
            sum += expf(values[i] - base(largest));
            plain += values[i];
        }
    }
    __device__ __forceinline__ void add(const Total& other) {
        raise(other.largest);
        // A sum of nothing but minus infinity is zero or no number: the factor only has to be finite.
        sum += other.sum * (other.largest == -infinity() ? 1.f : expf(base(other.largest) - base(largest)));
        plain += other.plain;
    }
    __device__ __forceinline__ Total of_lane(int apart) const {
        Total other;
        other.largest = __shfl_xor_sync(0xffffffffu, largest, apart);
        other.sum = __shfl_xor_sync(0xffffffffu, sum, apart);
        other.plain = __shfl_xor_sync(0xffffffffu, plain, apart);
        return other;
    }
};

static __device__ __forceinline__ long long ignored_target(int low, int high) {
    return (long long)((unsigned long long)(unsigned)high << 32 | (unsigned)low);
}

// Shared memory: a Total for each warp.
extern "C" __global__ void __launch_bounds__(MOST_THREADS, 1) cross_entropy_forward(
    const real* __restrict__ logits,       // [rows][columns], rows `stride` apart
    const long long* __restrict__ target,  // [rows]
    real* __restrict__ loss,               // [rows]
    float* __restrict__ lse,               // [rows]
    float smoothing, int ignore_low, int ignore_high, int columns, int stride) {
    SD_SHARED_MEMORY(shared);
    Total* totals = (Total*)shared;
    const real* row = logits + (long long)blockIdx.x * stride;
    Total total = {-infinity(), 0.f, 0.f};
    each_column(
        head_of(row, columns), columns,
        [&](int column) {
            const float value[1] = {to_float(row[column])};
            total.add(value);
        },
        [&](int column) {
            float values[PER_LOAD];
            load(values, row + column);
            total.add(values);
        });
#pragma unroll
    for (int apart = 16; apart > 0; apart /= 2) total.add(total.of_lane(apart));
    if (threadIdx.x % 32 == 0) totals[threadIdx.x / 32] = total;
    __syncthreads();
    if (threadIdx.x > 0) return;
    for (int warp = 1; warp < WARPS_OF(blockDim.x); ++warp) total.add(totals[warp]);
    const float log_sum = Total::base(total.largest) + logf(total.sum);
    lse[blockIdx.x] = log_sum;
    const long long hit = target[blockIdx.x];
    if (hit == ignored_target(ignore_low, ignore_high)) {
        loss[blockIdx.x] = to_real(0.f);
        return;
    }
    stop_unless(hit >= 0 && hit < columns);
    float cost = (1.f - smoothing) * (log_sum - to_float(row[hit]));
    // Zero times the infinite loss of a masked column is not a number.
    if (smoothing != 0.f) cost += smoothing * (log_sum - total.plain / columns);
    loss[blockIdx.x] = to_real(cost);
}

extern "C" __global__ void __launch_bounds__(MOST_THREADS, 1) cross_entropy_backward(
    const real* __restrict__ logits, const long long* __restrict__ target, const float* __restrict__ lse,
    const float* __restrict__ scale,  // [rows], `scale_stride` apart: gradients of the losses
    real* __restrict__ dlogits,       // [rows][columns]
    float smoothing, int ignore_low, int ignore_high, int columns, int stride, int scale_stride) {
    const real* row = logits + (long long)blockIdx.x * stride;
    real* to = dlogits + (long long)blockIdx.x * columns;
    const long long hit = target[blockIdx.x];
    const bool ignored = hit == ignored_target(ignore_low, ignore_high);
    stop_unless(ignored || (hit >= 0 && hit < columns));
    const float log_sum = lse[blockIdx.x], factor = scale[(long long)blockIdx.x * scale_stride];
    const float spread = smoothing / columns;
    const auto gradient = [&](float value, int column) {
        return (expf(value - log_sum) - spread - (column == hit ? 1.f - smoothing : 0.f)) * factor;
    };
    // Rows that do not begin at the same part of 16 bytes have no elements to go through together.
    const bool alike = (unsigned long long)row % 16 == (unsigned long long)to % 16;
    each_column(
        alike ? head_of(row, columns) : columns, columns,
        [&](int column) { to[column] = to_real(ignored ? 0.f : gradient(to_float(row[column]), column)); },
        [&](int column) {
            float values[PER_LOAD];
            load(values, row + column);
#pragma unroll
            for (int i = 0; i < PER_LOAD; ++i) values[i] = ignored ? 0.f : gradient(values[i], column + i);
            store(to + column, values);
        });
}
