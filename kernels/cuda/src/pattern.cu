// Kept units as the recurrence wants them, and weights by rows of units.
#include "device.cuh"

#define THREADS 256
#define GUARD(condition) (condition)

// Sorts each step's kept units so that neighbours differ modulo `classes` as far as there are enough of each: their rows
// of a weight in shared memory then lie in different banks. Also says of every unit what it is multiplied by.
// A block does one step. Entries that name no unit are left out; a unit named twice counts once.
extern "C" __global__ void __launch_bounds__(THREADS, 1) order_kept(
    const int* __restrict__ kept,  // [steps][count], rows `stride` apart
    int* __restrict__ order,       // [steps][count], ending in `units` where there are fewer
    float* __restrict__ factors,   // [steps][units]: `scale` where a unit is kept, zero elsewhere
    float scale, int stride, int count, int units, int classes) {
    SD_SHARED_MEMORY(shared);
    int* flags = (int*)shared;       // [units]
    int* found = flags + units;      // [THREADS] kept units of a thread's segment
    int* totals = found + THREADS;   // [classes]
    const int* list = kept + (long long)blockIdx.x * stride;
    int* out = order + (long long)blockIdx.x * count;
    for (int u = threadIdx.x; u < units; u += THREADS) flags[u] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < count; i += THREADS) {
        const int u = list[i];
        if (GUARD(u >= 0) && GUARD(u < units)) flags[u] = 1;
    }
    __syncthreads();
    // Threads share each class out in segments, counted first so that every thread knows where it begins.
    const int own = threadIdx.x % classes, segment = threadIdx.x / classes, segments = THREADS / classes;
    const int members = (units + classes - 1) / classes, length = (members + segments - 1) / segments;
    const int begin = segment * length, end = min(begin + length, members);
    int n = 0;
    for (int i = begin; i < end; ++i) {
        const int u = own + classes * i;
        n += GUARD(u < units) ? flags[u] : 0;
    }
    found[threadIdx.x] = n;
    __syncthreads();
    if (threadIdx.x < classes) {
        int total = 0;
        for (int s = 0; s < segments; ++s) total += found[s * classes + threadIdx.x];
        totals[threadIdx.x] = total;
    }
    int rank = 0;
    for (int s = 0; s < segment; ++s) rank += found[s * classes + own];
    __syncthreads();
    // Round by round, one of each class that still has any.
    for (int i = begin; i < end; ++i) {
        const int u = own + classes * i;
        if (!GUARD(u < units) || !flags[u]) continue;
        int at = 0;
        for (int c = 0; c < classes; ++c) at += min(totals[c], rank) + (c < own && totals[c] > rank);
        out[at] = u;
        ++rank;
    }
    int total = 0;
    for (int c = 0; c < classes; ++c) total += totals[c];
    for (int i = total + threadIdx.x; i < count; i += THREADS) out[i] = units;
    for (int u = threadIdx.x; u < units; u += THREADS)
        factors[(long long)blockIdx.x * units + u] = flags[u] ? scale : 0.f;
}

// The sum of `value` over the block, for all its threads. `room`: [THREADS / 32], other memory than the last call's.
static __device__ __forceinline__ int block_sum(int value, int* room) {
#pragma unroll
    for (int lane = 16; lane > 0; lane /= 2) value += __shfl_xor_sync(0xffffffffu, value, lane);
    if (threadIdx.x % 32 == 0) room[threadIdx.x / 32] = value;
    __syncthreads();
    int sum = 0;
#pragma unroll
    for (int w = 0; w < THREADS / 32; ++w) sum += room[w];
    return sum;
}

// Draws kept units from uniform noise of [0, 1): the `count` of each step with the most (the first of equals), or, with a
// negative count, those of at least p. A block does one step.
extern "C" __global__ void __launch_bounds__(THREADS, 1) kept_lists(
    const float* __restrict__ noise,  // [steps][units]
    int* __restrict__ kept,           // [steps][width], ascending, ending in `units` where there are fewer
    float* __restrict__ factors,      // [steps][units]: `scale` where a unit is kept, zero elsewhere
    float p, float scale, int count, int width, int units) {
    SD_SHARED_MEMORY(shared);
    unsigned* keys = (unsigned*)shared;    // [units], ordered as the noise is
    int* room = (int*)(keys + units);      // [2][THREADS / 32]
    int* above = room + 2 * THREADS / 32;  // [THREADS] of a thread's segment: units with more than the least kept
    int* equal = above + THREADS;          // [THREADS] and with just as much
    const float* from = noise + (long long)blockIdx.x * units;
    for (int u = threadIdx.x; u < units; u += THREADS) keys[u] = __float_as_uint(from[u]);
    __syncthreads();
    // The largest key that at least `count` units reach, bit by bit; of noise of p, all units that reach it.
    unsigned least = __float_as_uint(p);
    if (count >= 0) {
        least = 0;
        for (int bit = 29; bit >= 0; --bit) {
            const unsigned candidate = least | 1u << bit;
            int n = 0;
            for (int u = threadIdx.x; u < units; u += THREADS) n += keys[u] >= candidate;
            if (block_sum(n, room + bit % 2 * (THREADS / 32)) >= count) least = candidate;
        }
    }
    const int length = (units + THREADS - 1) / THREADS;
    const int begin = min((int)threadIdx.x * length, units), end = min(begin + length, units);
    int more = 0, same = 0;
    for (int u = begin; u < end; ++u) more += keys[u] > least, same += keys[u] == least;
    above[threadIdx.x] = more, equal[threadIdx.x] = same;
    __syncthreads();
    int more_before = 0, same_before = 0, more_in_all = 0, same_in_all = 0;
    for (int i = 0; i < THREADS; ++i) {
        more_before += i < threadIdx.x ? above[i] : 0, same_before += i < threadIdx.x ? equal[i] : 0;
        more_in_all += above[i], same_in_all += equal[i];
    }
    // So many of those that have just as much.
    const int room_left = count >= 0 ? count - more_in_all : same_in_all;
    int* list = kept + (long long)blockIdx.x * width;
    for (int u = begin; u < end; ++u) {
        const bool is_more = keys[u] > least, is_same = keys[u] == least && same_before < room_left;
        if (is_more || is_same) list[more_before + min(same_before, room_left)] = u;
        factors[(long long)blockIdx.x * units + u] = is_more || is_same ? scale : 0.f;
        more_before += is_more, same_before += keys[u] == least;
    }
    for (int i = more_in_all + min(same_in_all, room_left) + threadIdx.x; i < width; i += THREADS) list[i] = units;
}

#define SIDE 32

// packed[k][n] = weight[row of n][k], rounded as an operand; zeros in the columns past the last output. Outputs are in
// `groups` of the weight's rows one after the other, and side by side in the result: 4 for the gates of an LSTM.
// A block turns a tile of SIDE x SIDE.
extern "C" __global__ void __launch_bounds__(THREADS, 1) pack_by_units(
    const real* __restrict__ weight,  // [outputs][units]
    real* __restrict__ packed,        // [units][columns]
    int units, int outputs, int columns, int groups) {
    SD_SHARED_MEMORY(shared);
    float* tile = (float*)shared;  // [SIDE][SIDE + 1], columns of the result by rows
    const int across = (columns + SIDE - 1) / SIDE;
    const int n0 = blockIdx.x % across * SIDE, k0 = blockIdx.x / across * SIDE;
    const int x = threadIdx.x % SIDE;
    for (int y = threadIdx.x / SIDE; y < SIDE; y += THREADS / SIDE) {
        const int n = n0 + y, k = k0 + x, row = n % groups * (outputs / groups) + n / groups;
        tile[y * (SIDE + 1) + x] =
            GUARD(n < outputs) && GUARD(k < units) ? to_float(weight[(long long)row * units + k]) : 0.f;
    }
    __syncthreads();
    for (int y = threadIdx.x / SIDE; y < SIDE; y += THREADS / SIDE) {
        const int n = n0 + x, k = k0 + y;
        if (GUARD(n < columns) && GUARD(k < units))
            packed[(long long)k * columns + n] = to_operand(tile[x * (SIDE + 1) + y]);
    }
}
