// An input-feeding attentional decoder between the products that cuBLAS does: LSTM cells, and attention with the output.
//
// Rows of activations lie where emb has them: step t of sequence b is row t * step_stride + b * row_stride. What only
// these kernels use is [steps][batch]. Keys and values are linear in the source, so that neither the query's product of
// general attention nor the context's half of the output's product is left to be done at every step.
#include "device.cuh"

#define THREADS 256
#define MOST_THREADS 512
#define PER_LOAD ((int)(16 / sizeof(real)))
#define GUARD(condition) (condition)

static __device__ __forceinline__ float sigmoid(float x) { return 1.f / (1.f + expf(-x)); }

// Multipliers of a step, one for each unit, or for each unit of each row; none at all are ones.
static __device__ __forceinline__ float factor_of(const float* factors, int per_row, int t, int b, int u, int batch,
                                                  int hidden) {
    if (!factors) return 1.f;
    return factors[(per_row ? (long long)t * batch + b : (long long)t) * hidden + u];
}
// What is dropped is zero, whatever it was.
static __device__ __forceinline__ float dropped(float x, float factor) { return factor != 0.f ? x * factor : 0.f; }

// ---- once for a sequence -------------------------------------------------------------------------------------------

// What the first step's product takes of an initial state: half of the operand's columns.
extern "C" __global__ void __launch_bounds__(THREADS, 1) decoder_start(
    const real* __restrict__ state,     // [batch][hidden]
    const float* __restrict__ factors,  // [steps][hidden] or [steps][batch][hidden], or null
    real* __restrict__ operand,         // rows of [2 hidden]
    int per_row, int batch, int hidden, int row_stride, int column) {
    const long long e = (long long)blockIdx.x * THREADS + threadIdx.x;
    const int b = (int)(e / hidden), u = (int)(e % hidden);
    if (!GUARD(b < batch)) return;
    operand[(long long)b * row_stride * 2 * hidden + column + u] =
        to_operand(dropped(to_float(state[e]), factor_of(factors, per_row, 0, b, u, batch, hidden)));
}

// The gradient of that state.
extern "C" __global__ void __launch_bounds__(THREADS, 1) decoder_finish(
    const float* __restrict__ through,  // [batch][2 hidden]: gradient of the operand
    const float* __restrict__ factors, real* __restrict__ dstate, int per_row, int batch, int hidden, int column) {
    const long long e = (long long)blockIdx.x * THREADS + threadIdx.x;
    const int b = (int)(e / hidden), u = (int)(e % hidden);
    if (!GUARD(b < batch)) return;
    dstate[e] = to_real(dropped(through[(long long)b * 2 * hidden + column + u],
                                factor_of(factors, per_row, 0, b, u, batch, hidden)));
}

// ---- a cell: a thread does one unit of one row ---------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(THREADS, 1) decoder_cell_forward(
    const float* __restrict__ sums,    // [batch][columns]: operand times weight, the gates of a unit side by side
    const float* __restrict__ inputs,  // rows of [columns] to add, or null
    const float* __restrict__ bias,    // [4 hidden], gates one after the other, or null
    float* cells,                      // [steps + 1][batch][hidden]: of before each step, and the last
    float4* __restrict__ gates,        // [steps][batch][hidden]
    // The dropped output for the next layer's product, or as the query; multipliers as for decoder_start.
    const float* __restrict__ above_factors, real* __restrict__ above,  // rows of [above_width]
    // The dropped output for this layer's next product.
    const float* __restrict__ own_factors, real* __restrict__ own,  // rows of [2 hidden], in the second half
    real* __restrict__ h_n,                                         // [batch][hidden]
    int above_per_row, int own_per_row, int above_width, int batch, int hidden, int columns, int steps, int step_stride,
    int row_stride, int t) {
    const long long e = (long long)blockIdx.x * THREADS + threadIdx.x;
    const int b = (int)(e / hidden), u = (int)(e % hidden);
    if (!GUARD(b < batch)) return;
    const long long size = (long long)batch * hidden, row = (long long)t * step_stride + (long long)b * row_stride;
    float4 s = *(const float4*)(sums + (long long)b * columns + 4 * u);
    if (inputs) {
        const float4 in = *(const float4*)(inputs + row * columns + 4 * u);
        s.x += in.x, s.y += in.y, s.z += in.z, s.w += in.w;
    }
    if (bias) s.x += bias[u], s.y += bias[hidden + u], s.z += bias[2 * hidden + u], s.w += bias[3 * hidden + u];
    const float4 gate = make_float4(sigmoid(s.x), sigmoid(s.y), tanhf(s.z), sigmoid(s.w));
    const float c = fmaf(gate.y, cells[t * size + e], gate.x * gate.z), h = gate.w * tanhf(c);
    cells[(t + 1) * size + e] = c;
    gates[t * size + e] = gate;
    above[row * above_width + u] =
        to_operand(dropped(h, factor_of(above_factors, above_per_row, t, b, u, batch, hidden)));
    if (GUARD(t + 1 < steps))
        own[((row + step_stride) * 2 + 1) * hidden + u] =
            to_operand(dropped(h, factor_of(own_factors, own_per_row, t + 1, b, u, batch, hidden)));
    else
        h_n[e] = to_real(h);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) decoder_cell_backward(
    const float4* __restrict__ gates, const float* __restrict__ cells,
    // Gradient of the dropped output: of the next layer's operand, or of the query.
    const float* __restrict__ above,  // [batch][above_width]
    const float* __restrict__ also,   // [batch][hidden] to add, or null
    const float* __restrict__ above_factors,
    const float* __restrict__ through,  // [batch][2 hidden]: of this layer's operand of the step after
    const float* __restrict__ own_factors,
    float* __restrict__ dc,             // [batch][hidden], in: of the cell after this step; out: before it
    real* __restrict__ dgates,          // rows of [columns]
    int above_per_row, int own_per_row, int above_width, int batch, int hidden, int columns, int steps, int step_stride,
    int row_stride, int t) {
    const long long e = (long long)blockIdx.x * THREADS + threadIdx.x;
    const int b = (int)(e / hidden), u = (int)(e % hidden);
    if (!GUARD(b < batch)) return;
    const long long size = (long long)batch * hidden, row = (long long)t * step_stride + (long long)b * row_stride;
    // After the last step comes the gradient of the final state, which nothing was dropped of.
    const float next_factor =
        GUARD(t + 1 < steps) ? factor_of(own_factors, own_per_row, t + 1, b, u, batch, hidden) : 1.f;
    const float from_above = above[(long long)b * above_width + u] + (also ? also[e] : 0.f);
    const float dh = dropped(from_above, factor_of(above_factors, above_per_row, t, b, u, batch, hidden)) +
                     dropped(through[((long long)b * 2 + 1) * hidden + u], next_factor);
    const float4 gate = gates[t * size + e];
    const float tanh_c = tanhf(cells[(t + 1) * size + e]);
    const float dc_t = fmaf(dh * gate.w, 1.f - tanh_c * tanh_c, dc[e]);
    dc[e] = dc_t * gate.y;
    real* to = dgates + row * columns + 4 * u;
    to[0] = to_operand(dc_t * gate.z * gate.x * (1.f - gate.x));
    to[1] = to_operand(dc_t * cells[t * size + e] * gate.y * (1.f - gate.y));
    to[2] = to_operand(dc_t * gate.x * (1.f - gate.z * gate.z));
    to[3] = to_operand(dh * tanh_c * gate.w * (1.f - gate.w));
}

// ---- attention and the output: a block does one row ----------------------------------------------------------------

template <int N>
static __device__ __forceinline__ void load(float (&values)[N], const real* from) {
    if constexpr (N == 1) {
        values[0] = to_float(*from);
    } else {
        const uint4 bits = *(const uint4*)from;
        const unsigned words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
        for (int i = 0; i < N; ++i)
#if SD_HALF
            values[i] = to_float((real)(words[i / 2] >> 16 * (i % 2)));
#else
            values[i] = __uint_as_float(words[i]);
#endif
    }
}
template <int N>
static __device__ __forceinline__ void load(float (&values)[N], const float* shared, int) {
    if constexpr (N == 1) {
        values[0] = *shared;
    } else {
#pragma unroll
        for (int i = 0; i < N; i += 4) {
            const float4 four = *(const float4*)(shared + i);
            values[i] = four.x, values[i + 1] = four.y, values[i + 2] = four.z, values[i + 3] = four.w;
        }
    }
}

static __device__ __forceinline__ float sum_of_warp(float x) {
#pragma unroll
    for (int apart = 16; apart > 0; apart /= 2) x += __shfl_xor_sync(0xffffffffu, x, apart);
    return x;
}

// out[s] = vector . source[s]; a warp does one position. Reads N elements at once.
template <int N>
static __device__ __forceinline__ void dot_each(float* out, const float* vector, const real* source, int length,
                                                int hidden) {
    const int lane = threadIdx.x % 32;
    for (int s = threadIdx.x / 32; s < length; s += blockDim.x / 32) {
        const real* from = source + (long long)s * hidden;
        float sum = 0.f;
#pragma unroll 4
        for (int u = lane * N; u < hidden; u += 32 * N) {
            float a[N], b[N];
            load(a, from + u);
            load(b, vector + u, 0);
#pragma unroll
            for (int i = 0; i < N; ++i) sum = fmaf(a[i], b[i], sum);
        }
        sum = sum_of_warp(sum);
        if (lane == 0) out[s] = sum;
    }
}

// parts[group] = sum of weights[s] source[s] over every groups-th s. Returns how many groups there are: as many as have
// threads, when a thread does N columns.
template <int N>
static __device__ __forceinline__ int add_up(float* parts, const float* weights, const real* source, int length,
                                             int hidden) {
    const int across = hidden / N, groups = max((int)blockDim.x / across, 1);
    for (int e = threadIdx.x; e < groups * across; e += blockDim.x) {
        const int group = e / across, u = e % across * N;
        float sum[N] = {};
#pragma unroll 4
        for (int s = group; s < length; s += groups) {
            float a[N];
            load(a, source + (long long)s * hidden + u);
#pragma unroll
            for (int i = 0; i < N; ++i) sum[i] = fmaf(weights[s], a[i], sum[i]);
        }
#pragma unroll
        for (int i = 0; i < N; ++i) parts[group * hidden + u + i] = sum[i];
    }
    return groups;
}

// Shared memory of both kernels, and what they do with it.
struct Row {
    float* vector;   // [hidden]
    float* scores;   // [source]
    float* weights;  // [source]
    float* parts;    // [groups][hidden]
    int length, hidden;

    __device__ __forceinline__ Row(unsigned char* shared, const int* lengths, int source, int hidden) : hidden(hidden) {
        vector = (float*)shared;
        scores = vector + (hidden + 3) / 4 * 4;
        weights = scores + source;
        parts = weights + source;
        length = max(0, min(lengths[blockIdx.x], source));
    }
    __device__ __forceinline__ bool whole(const real* of) const {
        return hidden % PER_LOAD == 0 && (unsigned long long)of % 16 == 0;
    }
    __device__ __forceinline__ void score(const real* of) {
        if (whole(of))
            dot_each<PER_LOAD>(scores, vector, of, length, hidden);
        else
            dot_each<1>(scores, vector, of, length, hidden);
    }
    __device__ __forceinline__ int weigh(const real* of) {
        if (whole(of)) return add_up<PER_LOAD>(parts, weights, of, length, hidden);
        return add_up<1>(parts, weights, of, length, hidden);
    }
    __device__ __forceinline__ float part_sum(int groups, int u) const {
        float sum = 0.f;
        for (int group = 0; group < groups; ++group) sum += parts[group * hidden + u];
        return sum;
    }
};

// The output: drop(tanh(align . values + query's product)), align = softmax(keys . query) over the row's positions.
extern "C" __global__ void __launch_bounds__(MOST_THREADS, 1) decoder_attend_forward(
    const real* __restrict__ keys, const real* __restrict__ values,  // [batch][source][hidden]
    const int* __restrict__ lengths,                                 // [batch]
    const real* __restrict__ query,      // rows of [hidden]
    const float* __restrict__ joined,    // [batch][hidden]: the query's product
    const float* __restrict__ factors,   // of the output; multipliers as for decoder_start
    const float* __restrict__ fed,       // [steps][hidden] of what is fed back, or null
    real* __restrict__ align,            // [steps][batch][source]
    real* __restrict__ attended,         // rows of [hidden]: the output before it is dropped
    real* __restrict__ y,                // rows of [hidden]
    real* __restrict__ operand,          // rows of [2 hidden]: of the first layer, fed back in the first half
    int per_row, int batch, int hidden, int source, int steps, int step_stride, int row_stride, int t) {
    SD_SHARED_MEMORY(shared);
    Row own(shared, lengths, source, hidden);
    const int b = blockIdx.x, length = own.length;
    const long long row = (long long)t * step_stride + (long long)b * row_stride;
    const long long first = (long long)b * source * hidden;
    for (int u = threadIdx.x; u < hidden; u += blockDim.x) own.vector[u] = to_float(query[row * hidden + u]);
    __syncthreads();
    own.score(keys + first);
    __syncthreads();
    // Every warp goes through all scores, so that none waits for another.
    float most = __uint_as_float(0xff800000u), total = 0.f;
    for (int s = threadIdx.x % 32; s < length; s += 32) most = fmaxf(most, own.scores[s]);
#pragma unroll
    for (int apart = 16; apart > 0; apart /= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, apart));
    for (int s = threadIdx.x % 32; s < length; s += 32) total += expf(own.scores[s] - most);
    total = sum_of_warp(total);
    for (int s = threadIdx.x; s < source; s += blockDim.x) {
        const float weight = GUARD(s < length) ? expf(own.scores[s] - most) / total : 0.f;
        own.weights[s] = weight;
        align[((long long)t * batch + b) * source + s] = to_real(weight);
    }
    __syncthreads();
    const int groups = own.weigh(values + first);
    __syncthreads();
    for (int u = threadIdx.x; u < hidden; u += blockDim.x) {
        const float out = tanhf(own.part_sum(groups, u) + joined[(long long)b * hidden + u]);
        const float kept = dropped(out, factor_of(factors, per_row, t, b, u, batch, hidden));
        attended[row * hidden + u] = to_real(out);
        y[row * hidden + u] = to_real(kept);
        if (GUARD(t + 1 < steps))
            operand[(row + step_stride) * 2 * hidden + u] =
                to_operand(dropped(kept, factor_of(fed, 0, t + 1, b, u, batch, hidden)));
    }
}

// Gradients of the output before tanh, of the scores, and of the query through the scores.
extern "C" __global__ void __launch_bounds__(MOST_THREADS, 1) decoder_attend_backward(
    const real* __restrict__ keys, const real* __restrict__ values, const int* __restrict__ lengths,
    const real* __restrict__ dy,         // rows of [hidden]
    const float* __restrict__ through,   // [batch][2 hidden]: of the first layer's operand of the step after
    const float* __restrict__ factors, const float* __restrict__ fed,
    const real* __restrict__ align, const real* __restrict__ attended,
    const real* __restrict__ dalign,     // [steps][batch][source], or null
    real* __restrict__ djoined,          // rows of [hidden]
    real* __restrict__ dscores,          // [steps][batch][source]
    float* __restrict__ dquery,          // [batch][hidden]
    int per_row, int batch, int hidden, int source, int steps, int step_stride, int row_stride, int t) {
    SD_SHARED_MEMORY(shared);
    Row own(shared, lengths, source, hidden);
    const int b = blockIdx.x, length = own.length;
    const long long row = (long long)t * step_stride + (long long)b * row_stride;
    const long long first = (long long)b * source * hidden, position = ((long long)t * batch + b) * source;
    for (int u = threadIdx.x; u < hidden; u += blockDim.x) {
        const float out = to_float(attended[row * hidden + u]);
        // After the last step nothing was fed back, and the gradient is zero.
        const float next_factor = GUARD(t + 1 < steps) ? factor_of(fed, 0, t + 1, b, u, batch, hidden) : 1.f;
        const float dout = to_float(dy[row * hidden + u]) + dropped(through[(long long)b * 2 * hidden + u], next_factor);
        const float d = dropped(dout * (1.f - out * out), factor_of(factors, per_row, t, b, u, batch, hidden));
        own.vector[u] = d;
        djoined[row * hidden + u] = to_operand(d);
    }
    __syncthreads();
    own.score(values + first);
    __syncthreads();
    const auto gradient = [&](int s) { return own.scores[s] + (dalign ? to_float(dalign[position + s]) : 0.f); };
    float mean = 0.f;
    for (int s = threadIdx.x % 32; s < length; s += 32) mean = fmaf(to_float(align[position + s]), gradient(s), mean);
    mean = sum_of_warp(mean);
    for (int s = threadIdx.x; s < source; s += blockDim.x) {
        const float d = GUARD(s < length) ? to_float(align[position + s]) * (gradient(s) - mean) : 0.f;
        own.weights[s] = d;
        dscores[position + s] = to_operand(d);
    }
    __syncthreads();
    const int groups = own.weigh(keys + first);
    __syncthreads();
    for (int u = threadIdx.x; u < hidden; u += blockDim.x) dquery[(long long)b * hidden + u] = own.part_sum(groups, u);
}
