// Tiles of the persistent LSTM kernels: sizes, fragments, and the two products of a time step.
//
// A block owns SD_UNITS hidden units, all four gates of each, for a slice of SD_TILES * 8 rows of the batch. Its part of
// the recurrent weight is [H, 4 SD_UNITS], gates of a unit side by side. Both passes read it by kept rows: forward as
// kept units x columns, backward as the same rows against the gradients of those columns.
#pragma once

#define THREADS 256
#define WARPS 8
#define UNITS SD_UNITS
#define COLUMNS (4 * UNITS)
#define BATCH (8 * SD_TILES)
// Rows of shared memory begin eight elements apart modulo a turn of the banks: rows of units that differ modulo four
// (eight for 16-bit elements) do not collide, which is how `order_kept` sorts them.
#define LD_WEIGHT (COLUMNS + 8)
#define LD_BATCH (BATCH % 16 == 0 ? BATCH + 8 : BATCH)
// Depth of one tensor-core product: kept units visited together.
#define DEPTH (SD_HALF ? 16 : 8)
#define PER_COPY ((int)(16 / sizeof(real)))
// A warp's sums of one unit, four gates of BATCH: apart by other than a turn of the banks.
#define UNIT_PITCH (4 * BATCH + (SD_PRECISION == SD_STRICT ? 4 : 8))
// Elements of the block's state that one thread keeps in registers.
#define OWNED ((UNITS * BATCH + THREADS - 1) / THREADS)
// For conditions that keep an index in range.
#define GUARD(condition) (condition)

static __device__ __forceinline__ long long aligned(long long bytes) { return (bytes + 127) / 128 * 128; }

struct Slice {
    int part;      // of the hidden units: the block's own begin at `unit`
    int slice;     // of the batch: rows begin at `row`
    int parts;     // blocks that share a slice
    int unit, row;
};

static __device__ __forceinline__ Slice slice_of(int parts) {
    Slice s;
    s.parts = parts;
    s.part = blockIdx.x % parts;
    s.slice = blockIdx.x / parts;
    s.unit = s.part * UNITS;
    s.row = s.slice * BATCH;
    return s;
}

// Consecutive floats, in as wide loads as their number allows; `from` is aligned to them.
template <int N>
static __device__ __forceinline__ void load_floats(float (&to)[N], const float* from) {
    if (N % 4 == 0) {
#pragma unroll
        for (int i = 0; i < N / 4; ++i) {
            const float4 x = ((const float4*)from)[i];
            to[4 * i] = x.x, to[4 * i + 1] = x.y, to[4 * i + 2] = x.z, to[4 * i + 3] = x.w;
        }
    } else if (N % 2 == 0) {
#pragma unroll
        for (int i = 0; i < N / 2; ++i) {
            const float2 x = ((const float2*)from)[i];
            to[2 * i] = x.x, to[2 * i + 1] = x.y;
        }
    } else {
#pragma unroll
        for (int i = 0; i < N; ++i) to[i] = from[i];
    }
}

// Calls f(i, at, u, b) for each element that this thread owns: the i-th, at `at` of [UNITS][BATCH], unit u, row b.
template <class F>
static __device__ __forceinline__ void for_owned(const Slice& own, int hidden, F f) {
#pragma unroll
    for (int i = 0; i < OWNED; ++i) {
        const int at = threadIdx.x + i * THREADS, u = own.unit + at / BATCH;
        if (GUARD(at < UNITS * BATCH) && GUARD(u < hidden)) f(i, at, u, own.row + at % BATCH);
    }
}

template <int N>
static __device__ __forceinline__ void store_floats(float* to, const float (&from)[N]) {
    if (N % 4 == 0) {
#pragma unroll
        for (int i = 0; i < N / 4; ++i)
            ((float4*)to)[i] = make_float4(from[4 * i], from[4 * i + 1], from[4 * i + 2], from[4 * i + 3]);
    } else if (N % 2 == 0) {
#pragma unroll
        for (int i = 0; i < N / 2; ++i) ((float2*)to)[i] = make_float2(from[2 * i], from[2 * i + 1]);
    } else {
#pragma unroll
        for (int i = 0; i < N; ++i) to[i] = from[i];
    }
}

static __device__ __forceinline__ float sigmoid(float x) { return 1.f / (1.f + expf(-x)); }

// The unit at a position of a step's list of kept units; `hidden`, whose row is all zeros, past the end.
static __device__ __forceinline__ int unit_at(const int* list, int count, int position, int hidden) {
    if (GUARD(position >= count)) return hidden;
    return list ? list[position] : position;
}

// Copies one row of the block's columns of the weight; `hidden` stands for a row of zeros.
static __device__ __forceinline__ void copy_weight_row(real* to, const real* weight, int unit, int hidden,
                                                       int columns, int first, int lane, int lanes) {
    for (int piece = lane; piece < COLUMNS / PER_COPY; piece += lanes) {
        int column = first + piece * PER_COPY;
        bool valid = GUARD(unit < hidden) && GUARD(column < columns);
        cp_async_16(to + piece * PER_COPY, valid ? weight + (long long)unit * columns + column : weight, valid);
    }
}

// The block's part of the weight, whole, with a row of zeros at the end: it stays for the whole sequence. Every thread
// has waited for its own copies; a barrier must follow.
static __device__ __forceinline__ void load_resident(real* shared, const real* weight, int hidden, int columns,
                                                     int first) {
    const int pieces = COLUMNS / PER_COPY;
    for (int e = threadIdx.x; e < (hidden + 1) * pieces; e += THREADS) {
        int unit = e / pieces;
        copy_weight_row(shared + unit * LD_WEIGHT, weight, unit, hidden, columns, first, e % pieces, pieces);
    }
    cp_async_commit();
    cp_async_wait<0>();
}

// ---- forward: gates[columns, batch] += sum over kept units of weight[unit, columns] h[unit, batch] -----------------

#if SD_PRECISION == SD_STRICT
// A lane has the four gates of one unit, for some rows of the batch.
#define LANE_GROUPS (32 / UNITS)
#define LANE_ROWS (BATCH / LANE_GROUPS)
struct ForwardSum {
    float value[LANE_ROWS][4];
};
static __device__ __forceinline__ void clear(ForwardSum& sum) {
#pragma unroll
    for (int i = 0; i < LANE_ROWS; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) sum.value[i][j] = 0.f;
}
// `rows`: the weight's rows of the DEPTH units; `h`: [DEPTH][LD_BATCH].
static __device__ __forceinline__ void multiply(ForwardSum& sum, const real* const (&rows)[DEPTH], const real* h,
                                                int lane) {
    const int group = lane / UNITS, unit = lane % UNITS;
    if (group >= LANE_GROUPS) return;  // nothing of theirs is stored
#pragma unroll
    for (int k = 0; k < DEPTH; ++k) {
        const float4 w = *(const float4*)(rows[k] + 4 * unit);
        float x[LANE_ROWS];
        load_floats(x, h + k * LD_BATCH + group * LANE_ROWS);
#pragma unroll
        for (int i = 0; i < LANE_ROWS; ++i) {
            sum.value[i][0] = fmaf(w.x, x[i], sum.value[i][0]);
            sum.value[i][1] = fmaf(w.y, x[i], sum.value[i][1]);
            sum.value[i][2] = fmaf(w.z, x[i], sum.value[i][2]);
            sum.value[i][3] = fmaf(w.w, x[i], sum.value[i][3]);
        }
    }
}
// To [UNITS] of [4][BATCH], UNIT_PITCH apart.
static __device__ __forceinline__ void store(float* to, const ForwardSum& sum, int lane) {
    const int group = lane / UNITS, unit = lane % UNITS;
    if (GUARD(group >= LANE_GROUPS)) return;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        float row[LANE_ROWS];
#pragma unroll
        for (int i = 0; i < LANE_ROWS; ++i) row[i] = sum.value[i][j];
        store_floats(to + unit * UNIT_PITCH + j * BATCH + group * LANE_ROWS, row);
    }
}
#else
// Tensor-core tiles of 16 columns x 8 rows of the batch.
struct ForwardSum {
    float value[UNITS / 4][SD_TILES][4];
};
static __device__ __forceinline__ void clear(ForwardSum& sum) {
#pragma unroll
    for (int m = 0; m < UNITS / 4; ++m)
#pragma unroll
        for (int n = 0; n < SD_TILES; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) sum.value[m][n][i] = 0.f;
}
#if SD_HALF
// `row`: the weight's row of unit `lane % 8`, of the second eight for the lanes whose matrix it is.
static __device__ __forceinline__ void multiply(ForwardSum& sum, const real* row, const real* h, int lane) {
    unsigned b[SD_TILES][2];
#pragma unroll
    for (int n = 0; n < SD_TILES; ++n) ldmatrix_x2_trans(b[n], h + (lane % 16) * LD_BATCH + 8 * n);
#pragma unroll
    for (int m = 0; m < UNITS / 4; ++m) {
        unsigned a[4];
        ldmatrix_x4_trans(a, row + 16 * m + (lane / 8) % 2 * 8);
#pragma unroll
        for (int n = 0; n < SD_TILES; ++n) mma_half(sum.value[m][n], a, b[n]);
    }
}
#else
// `low`, `high`: the weight's rows of units q and q + 4.
static __device__ __forceinline__ void multiply(ForwardSum& sum, const real* low, const real* high, const real* h,
                                                int lane) {
    const int g = lane / 4, q = lane % 4;
    unsigned b[SD_TILES][2];
#pragma unroll
    for (int n = 0; n < SD_TILES; ++n) {
        b[n][0] = __float_as_uint(h[q * LD_BATCH + 8 * n + g]);
        b[n][1] = __float_as_uint(h[(q + 4) * LD_BATCH + 8 * n + g]);
    }
#pragma unroll
    for (int m = 0; m < UNITS / 4; ++m) {
        const unsigned a[4] = {__float_as_uint(low[16 * m + g]), __float_as_uint(low[16 * m + g + 8]),
                               __float_as_uint(high[16 * m + g]), __float_as_uint(high[16 * m + g + 8])};
#pragma unroll
        for (int n = 0; n < SD_TILES; ++n) mma_tf32(sum.value[m][n], a, b[n]);
    }
}
#endif
static __device__ __forceinline__ void store(float* to, const ForwardSum& sum, int lane) {
    const int g = lane / 4, q = lane % 4;
#pragma unroll
    for (int m = 0; m < UNITS / 4; ++m)
#pragma unroll
        for (int n = 0; n < SD_TILES; ++n) {
            // Rows g and g + 8 of the tile: gates g % 4 of units g / 4 and g / 4 + 2.
            float* low = to + (4 * m + g / 4) * UNIT_PITCH + g % 4 * BATCH + 8 * n + 2 * q;
            *(float2*)low = make_float2(sum.value[m][n][0], sum.value[m][n][1]);
            *(float2*)(low + 2 * UNIT_PITCH) = make_float2(sum.value[m][n][2], sum.value[m][n][3]);
        }
}
#endif

// ---- backward: dh[unit, batch] = sum over columns of weight[unit, column] dgates[column, batch], 16 units at a time -

#define UNIT_TILE 16
#if SD_PRECISION == SD_STRICT
#define PAIR_ROWS (BATCH / 4)
// A lane has two units, for a quarter of the batch.
struct BackwardOperand {
    const real* gradients;  // [COLUMNS][LD_BATCH]
};
static __device__ __forceinline__ void load(BackwardOperand& operand, const real* gradients, int) {
    operand.gradients = gradients;
}
struct BackwardSum {
    float value[2][PAIR_ROWS];
};
static __device__ __forceinline__ void clear(BackwardSum& sum) {
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int j = 0; j < PAIR_ROWS; ++j) sum.value[i][j] = 0.f;
}
// Rows of the units that this lane multiplies: first and second.
static __device__ __forceinline__ int lane_unit(int lane, int which) { return lane / 4 + 8 * which; }
static __device__ __forceinline__ void multiply(BackwardSum& sum, const real* first, const real* second,
                                                const BackwardOperand& operand, int lane) {
    const real* rows = operand.gradients + lane % 4 * PAIR_ROWS;
#pragma unroll 1
    for (int column = 0; column < COLUMNS; column += 4) {
        const float4 a = *(const float4*)(first + column), b = *(const float4*)(second + column);
        const float pairs[2][4] = {{a.x, a.y, a.z, a.w}, {b.x, b.y, b.z, b.w}};
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            float x[PAIR_ROWS];
            load_floats(x, rows + (column + k) * LD_BATCH);
#pragma unroll
            for (int j = 0; j < PAIR_ROWS; ++j) {
                sum.value[0][j] = fmaf(pairs[0][k], x[j], sum.value[0][j]);
                sum.value[1][j] = fmaf(pairs[1][k], x[j], sum.value[1][j]);
            }
        }
    }
}
// To rows of BATCH.
static __device__ __forceinline__ void store(float* to, const BackwardSum& sum, int which, int lane) {
    store_floats(to + lane % 4 * PAIR_ROWS, sum.value[which]);
}
#else
// A lane's part of the gradients is kept in registers where there are enough.
#define SD_LOADS_LATE (!SD_HALF && SD_TILES > 4)
struct BackwardOperand {
    const real* gradients;
#if !SD_LOADS_LATE
    unsigned value[COLUMNS / DEPTH][SD_TILES][2];
#endif
};
struct BackwardSum {
    float value[SD_TILES][4];
};
static __device__ __forceinline__ void clear(BackwardSum& sum) {
#pragma unroll
    for (int n = 0; n < SD_TILES; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) sum.value[n][i] = 0.f;
}
#if SD_HALF
static __device__ __forceinline__ void load(BackwardOperand& operand, const real* gradients, int lane) {
#pragma unroll
    for (int k = 0; k < COLUMNS / DEPTH; ++k)
#pragma unroll
        for (int n = 0; n < SD_TILES; ++n)
            ldmatrix_x2_trans(operand.value[k][n], gradients + (16 * k + lane % 16) * LD_BATCH + 8 * n);
}
// The row whose address this lane gives.
static __device__ __forceinline__ int lane_unit(int lane, int) { return lane % 8 + lane / 8 % 2 * 8; }
static __device__ __forceinline__ void multiply(BackwardSum& sum, const real* row, const real*,
                                                const BackwardOperand& operand, int lane) {
#pragma unroll
    for (int k = 0; k < COLUMNS / DEPTH; ++k) {
        unsigned a[4];
        ldmatrix_x4(a, row + 16 * k + lane / 16 * 8);
#pragma unroll
        for (int n = 0; n < SD_TILES; ++n) mma_half(sum.value[n], a, operand.value[k][n]);
    }
}
#else
// The columns of a product are taken in another order, the same in both operands: a lane's two lie side by side.
static __device__ __forceinline__ void load(unsigned (&value)[2], const real* gradients, int k, int n, int lane) {
    const real* at = gradients + (8 * k + lane % 4 * 2) * LD_BATCH + 8 * n + lane / 4;
    value[0] = __float_as_uint(at[0]);
    value[1] = __float_as_uint(at[LD_BATCH]);
}
static __device__ __forceinline__ void load(BackwardOperand& operand, const real* gradients, int lane) {
    operand.gradients = gradients;
#if !SD_LOADS_LATE
#pragma unroll
    for (int k = 0; k < COLUMNS / DEPTH; ++k)
#pragma unroll
        for (int n = 0; n < SD_TILES; ++n) load(operand.value[k][n], gradients, k, n, lane);
#endif
}
static __device__ __forceinline__ int lane_unit(int lane, int which) { return lane / 4 + 8 * which; }
static __device__ __forceinline__ void multiply(BackwardSum& sum, const real* first, const real* second,
                                                const BackwardOperand& operand, int lane) {
    const int q = lane % 4;
#pragma unroll
    for (int k = 0; k < COLUMNS / DEPTH; ++k) {
        const float2 x = *(const float2*)(first + 8 * k + 2 * q), y = *(const float2*)(second + 8 * k + 2 * q);
        const unsigned a[4] = {__float_as_uint(x.x), __float_as_uint(y.x), __float_as_uint(x.y),
                               __float_as_uint(y.y)};
#pragma unroll
        for (int n = 0; n < SD_TILES; ++n) {
#if SD_LOADS_LATE
            unsigned b[2];
            load(b, operand.gradients, k, n, lane);
            mma_tf32(sum.value[n], a, b);
#else
            mma_tf32(sum.value[n], a, operand.value[k][n]);
#endif
        }
    }
}
#endif
static __device__ __forceinline__ void store(float* to, const BackwardSum& sum, int which, int lane) {
    const int q = lane % 4;
#pragma unroll
    for (int n = 0; n < SD_TILES; ++n)
        *(float2*)(to + 8 * n + 2 * q) = make_float2(sum.value[n][2 * which], sum.value[n][2 * which + 1]);
}
#endif
// The unit of a tile whose sums this lane holds: first (which = 0) and second.
static __device__ __forceinline__ int stored_unit(int lane, int which) { return lane / 4 + 8 * which; }
