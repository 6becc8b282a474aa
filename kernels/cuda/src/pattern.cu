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
