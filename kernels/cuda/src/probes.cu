// What launches, barriers and gathered reads cost, for scripts/gpu_check.py; no training runs these.
#include "device.cuh"

#define THREADS 256

extern "C" __global__ void __launch_bounds__(THREADS, 1) noop() {}

// `rounds` barriers of all blocks on one counter, which the host has set to zero. The kernels' own barrier.
extern "C" __global__ void __launch_bounds__(THREADS, 1) barrier_counter(unsigned* counter, int rounds) {
    for (int i = 1; i <= rounds; ++i) {
        __syncthreads();
        if (threadIdx.x == 0) {
            announce(counter);
            await(counter, (unsigned)i * gridDim.x);
        }
        __syncthreads();
    }
}

// The same with a flag of each block's own, `stride` words apart and zero at first, which a warp of every block polls:
// nobody waits for another's atomic addition to the same word.
extern "C" __global__ void __launch_bounds__(THREADS, 1) barrier_flags(unsigned* flags, int rounds, int stride) {
    for (int i = 1; i <= rounds; ++i) {
        __syncthreads();
        if (threadIdx.x == 0) announce(flags + blockIdx.x * stride);
        if (threadIdx.x < 32)
            for (int block = threadIdx.x; block < (int)gridDim.x; block += 32) await(flags + block * stride, (unsigned)i);
        __syncthreads();
    }
}

// Every block reads its `width` columns of the kept rows of a matrix of rows of `row` floats, `repeat` times; both are
// multiples of four. `sink` takes what the compiler must not leave out.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    gather_rows(const float* matrix, const int* kept, int count, int row, int width, int repeat, float* sink) {
    const int pieces = width / 4, first = blockIdx.x * width;
    float sum = 0.f;
    for (int r = 0; r < repeat; ++r)
        for (int i = threadIdx.x; i < count * pieces; i += THREADS) {
            const int column = first + i % pieces * 4;
            if (column >= row) continue;
            const float4 x =
                load_shared_by_blocks((const float4*)(matrix + (long long)__ldg(kept + i / pieces) * row + column));
            sum += x.x + x.y + x.z + x.w;
        }
    if (sum == 1234.5f) *sink = sum;
}
