// The LSTM cell of one time step, around products that cuBLAS does: for layers that no persistent kernel has room for.
// A thread does one unit of one row.
#include "device.cuh"

#define THREADS 256
#define GUARD(condition) (condition)

static __device__ __forceinline__ float sigmoid(float x) { return 1.f / (1.f + expf(-x)); }

// The state that a step starts from, as the operand of its product and of the weight gradient.
extern "C" __global__ void __launch_bounds__(THREADS, 1) cell_operand(
    const float* __restrict__ h,        // [batch][hidden]
    const float* __restrict__ factors,  // [hidden] or [batch][hidden] of this step, or null
    real* __restrict__ operand,         // rows of [hidden], `stride` apart
    int per_row, int rows, int hidden, int stride) {
    const long long e = (long long)blockIdx.x * THREADS + threadIdx.x;
    const int b = (int)(e / hidden), u = (int)(e % hidden);
    if (!GUARD(b < rows)) return;
    const float factor = factors ? factors[(long long)(per_row ? b : 0) * hidden + u] : 1.f;
    operand[(long long)b * stride * hidden + u] = to_operand(h[e] * factor);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) cell_forward(
    const float* __restrict__ inputs,     // rows of [4 hidden], `stride` apart, gates one after the other
    const float* __restrict__ bias,       // [4 hidden], or null
    const float* __restrict__ recurrent,  // [rows][columns], gates of a unit side by side
    float* __restrict__ h,                // [batch][hidden], the state, in and out
    float* __restrict__ c,
    real* __restrict__ y,                 // rows of [hidden], `stride` apart
    float4* __restrict__ gates,           // [batch][hidden]
    float2* __restrict__ cells,           // [batch][hidden]: before and after
    int rows, int hidden, int columns, int stride) {
    const long long e = (long long)blockIdx.x * THREADS + threadIdx.x;
    const int b = (int)(e / hidden), u = (int)(e % hidden);
    if (!GUARD(b < rows)) return;
    const float4 sums = *(const float4*)(recurrent + (long long)b * columns + 4 * u);
    const float* in = inputs + (long long)b * stride * 4 * hidden + u;
    float s[4] = {sums.x, sums.y, sums.z, sums.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) s[j] += in[(long long)j * hidden] + (bias ? bias[j * hidden + u] : 0.f);
    const float4 gate = make_float4(sigmoid(s[0]), sigmoid(s[1]), tanhf(s[2]), sigmoid(s[3]));
    const float before = c[e], after = fmaf(gate.y, before, gate.x * gate.z), out = gate.w * tanhf(after);
    gates[e] = gate;
    cells[e] = make_float2(before, after);
    c[e] = after;
    h[e] = out;
    y[(long long)b * stride * hidden + u] = to_real(out);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) cell_backward(
    const float4* __restrict__ gates, const float2* __restrict__ cells,
    const real* __restrict__ dy,           // rows of [hidden], `stride` apart
    float* __restrict__ dh,                // [batch][hidden], of the state after this step
    float* __restrict__ dc,                // in: after; out: before
    real* __restrict__ dgates,             // rows of [4 hidden], `stride` apart, gates one after the other
    real* __restrict__ dsums,              // [rows][columns], gates of a unit side by side, zeros after the last
    int rows, int hidden, int columns, int stride) {
    const long long e = (long long)blockIdx.x * THREADS + threadIdx.x;
    const int padded = columns / 4, b = (int)(e / padded), u = (int)(e % padded);
    if (!GUARD(b < rows)) return;
    float d[4] = {0.f, 0.f, 0.f, 0.f};
    if (GUARD(u < hidden)) {
        const long long at = (long long)b * hidden + u;
        const float4 gate = gates[at];
        const float2 cell = cells[at];
        const float tanh_c = tanhf(cell.y), dh_t = dh[at] + to_float(dy[(long long)b * stride * hidden + u]);
        const float dc_t = fmaf(dh_t * gate.w, 1.f - tanh_c * tanh_c, dc[at]);
        d[0] = dc_t * gate.z * gate.x * (1.f - gate.x);
        d[1] = dc_t * cell.x * gate.y * (1.f - gate.y);
        d[2] = dc_t * gate.x * (1.f - gate.z * gate.z);
        d[3] = dh_t * tanh_c * gate.w * (1.f - gate.w);
        dc[at] = dc_t * gate.y;
        real* to = dgates + (long long)b * stride * 4 * hidden + u;
#pragma unroll
        for (int j = 0; j < 4; ++j) to[(long long)j * hidden] = to_operand(d[j]);
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) dsums[(long long)b * columns + 4 * u + j] = to_operand(d[j]);
}

// What came back through the product becomes the gradient of the state, for the rows that took part.
extern "C" __global__ void __launch_bounds__(THREADS, 1) cell_receive(
    const float* __restrict__ product,  // [rows][hidden]
    const float* __restrict__ factors,  // [hidden] or [batch][hidden] of this step, or null
    float* __restrict__ dh,             // [batch][hidden]
    int per_row, int rows, int hidden) {
    const long long e = (long long)blockIdx.x * THREADS + threadIdx.x;
    const int b = (int)(e / hidden), u = (int)(e % hidden);
    if (!GUARD(b < rows)) return;
    const float factor = factors ? factors[(long long)(per_row ? b : 0) * hidden + u] : 1.f;
    dh[e] = factor != 0.f ? product[e] * factor : 0.f;
}
