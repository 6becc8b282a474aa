// The products of structured dropout, without the units that a step drops: y = x W, dx = dy W', dW += x' dy.
//
// Rows of step t lie at `first_row[t] + b * row_stride`, b < active[t], of contiguous matrices. The weight is [units]
// [padded], its rows multiples of 16 bytes, zeros past `columns`. Step t keeps the units of `kept + t * kept_stride`,
// `count` of them in ascending order; an entry that is no unit counts for nothing. Of lists in any other order the
// results are of no use, but nothing is accessed that is not there.
//
// Every sum has one order of its terms: results do not depend on the number of blocks that run at a time.
#include "device.cuh"

// Rows of a step that a block has: SD_TILES times the rows of a tensor core's product.
#ifndef SD_TILES
#define SD_TILES 1
#endif
#define ROWS (8 * SD_TILES)
#define THREADS 128
#define WARPS (THREADS / 32)
#define STAGES 3
#define PER_COPY ((int)(16 / sizeof(real)))
// For conditions that keep an index in range.
#ifndef GUARD
#define GUARD(condition) (condition)
#endif

// Results are stored like operands, or as float.
#if SD_FLOAT_RESULT
typedef float result;
static __device__ __forceinline__ result to_result(float x) { return x; }
#else
typedef real result;
static __device__ __forceinline__ result to_result(float x) { return to_real(x); }
#endif

// An element as the tensor cores take it.
static __device__ __forceinline__ real as_operand(real x) {
#if SD_PRECISION == SD_TF32
    return to_operand(x);
#else
    return x;
#endif
}

static __device__ __forceinline__ int divided_up(int x, int by) { return (x + by - 1) / by; }
static __device__ __forceinline__ bool is_unit(int unit, int units) { return unit >= 0 && unit < units; }

// The unit at a position of a list; past its end none, which `units` stands for.
static __device__ __forceinline__ int unit_at(const int* list, int count, int position, int units) {
    return GUARD(position < count) ? __ldg(list + position) : units;
}

// What a block has of one step: rows of it, counted from `row`, and one tile of something else.
struct Place {
    int step, tile, rows;
    long long row;
};
static __device__ __forceinline__ Place place_of(const int* first_row, const int* active, int row_stride, int tiles,
                                                 int row_tiles) {
    const int rest = blockIdx.x / tiles, above = rest % row_tiles * ROWS;
    Place p;
    p.tile = blockIdx.x % tiles;
    p.step = rest / row_tiles;
    p.rows = min(__ldg(active + p.step) - above, ROWS);
    p.row = __ldg(first_row + p.step) + (long long)above * row_stride;
    return p;
}

// ROWS x DEPTH elements of an activation on their way to shared memory, [ROWS][DEPTH + PER_COPY]: while they come, the
// tile before is multiplied. A thread has elements of one column.
template <int DEPTH>
struct Staged {
    static const int APART = THREADS / DEPTH, EACH = ROWS / APART, LD = DEPTH + PER_COPY;
    real value[EACH];

    // `from`: column `column` of the tile, of the block's first row; not read if !valid. `stride`: from row to row.
    __device__ __forceinline__ void load(const real* from, bool valid, long long stride, int rows) {
        const int first = threadIdx.x / DEPTH;
        from += first * stride;
#pragma unroll
        for (int i = 0; i < EACH; ++i, from += APART * stride)
            value[i] = valid && GUARD(first + i * APART < rows) ? __ldg(from) : (real)0;
    }
    __device__ __forceinline__ void store(real* to) const {
        to += threadIdx.x / DEPTH * LD + column();
#pragma unroll
        for (int i = 0; i < EACH; ++i) to[i * APART * LD] = as_operand(value[i]);
    }
    static __device__ __forceinline__ int column() { return threadIdx.x % DEPTH; }
};

// Sums of a warp: 16 M columns (or units) of the result x ROWS rows, lane = 4 g + q.
// The matrix that is gathered is the first operand of the tensor cores, since their second one takes rows in eights.
template <int M>
struct Sums {
#if SD_PRECISION == SD_STRICT
    float value[SD_TILES][4 * M];  // (row g + 8 n, what `column` says)
    static __device__ __forceinline__ int column(int i, int q);
#else
    float value[M][SD_TILES][4];
#endif
    __device__ __forceinline__ void clear() {
        float* all = (float*)value;
#pragma unroll
        for (int i = 0; i < (int)(sizeof(value) / sizeof(float)); ++i) all[i] = 0.f;
    }
    // Calls f(column, row, sum).
    template <class F>
    __device__ __forceinline__ void each(F f) const {
        const int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
#if SD_PRECISION == SD_STRICT
#pragma unroll
        for (int n = 0; n < SD_TILES; ++n)
#pragma unroll
            for (int i = 0; i < 4 * M; ++i) f(column(i, q), g + 8 * n, value[n][i]);
#else
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
            for (int n = 0; n < SD_TILES; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) f(16 * m + g + i / 2 * 8, 8 * n + 2 * q + i % 2, value[m][n][i]);
#endif
    }
};

#if SD_PRECISION != SD_STRICT
// The second operand, rows of an activation: elements k to k + DEPTH of each.
struct Rows {
    unsigned value[SD_TILES][2];
    template <int LD>
    __device__ __forceinline__ void load(const real* x, int k) {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int n = 0; n < SD_TILES; ++n) {
#if SD_HALF
            ldmatrix_x2(value[n], x + (8 * n + lane % 8) * LD + k + lane / 8 % 2 * 8);
#else
            const real* at = x + (8 * n + lane / 4) * LD + k + lane % 4;
            value[n][0] = __float_as_uint(at[0]);
            value[n][1] = __float_as_uint(at[4]);
#endif
        }
    }
};
static __device__ __forceinline__ void multiply(float (&sum)[SD_TILES][4], const unsigned (&a)[4], const Rows& rows) {
#pragma unroll
    for (int n = 0; n < SD_TILES; ++n) {
#if SD_HALF
        mma_half(sum[n], a, rows.value[n]);
#else
        mma_tf32(sum[n], a, rows.value[n]);
#endif
    }
}
#endif
#define MMA_DEPTH (SD_HALF ? 16 : 8)

// ---- y = x W -------------------------------------------------------------------------------------------------------

// A block has FP_COLUMNS columns, a warp 32 of them for all rows; FP_DEPTH kept units come at a time, one for a lane.
#define FP_COLUMNS 128
#define FP_DEPTH 32
// Eight elements of 16 bits, or eight banks, more than a turn of the banks: rows of a fragment do not collide.
#define FP_LD_W (FP_COLUMNS + 8)
#define FP_STAGE (FP_DEPTH * FP_LD_W)
typedef Staged<FP_DEPTH> StagedX;

// `w`: the warp's columns of [FP_DEPTH][FP_LD_W].
static __device__ __forceinline__ void multiply(Sums<2>& sums, const real* w, const real* x) {
    const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
#if SD_PRECISION == SD_STRICT
#pragma unroll 1
    for (int k = 0; k < FP_DEPTH; k += 4) {
        float4 rows[SD_TILES];
#pragma unroll
        for (int n = 0; n < SD_TILES; ++n) rows[n] = *(const float4*)(x + (g + 8 * n) * StagedX::LD + k);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const float4 a = *(const float4*)(w + (k + j) * FP_LD_W + 4 * q);
            const float4 b = *(const float4*)(w + (k + j) * FP_LD_W + 16 + 4 * q);
            const float of[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
            for (int n = 0; n < SD_TILES; ++n) {
                const float by = j == 0 ? rows[n].x : j == 1 ? rows[n].y : j == 2 ? rows[n].z : rows[n].w;
#pragma unroll
                for (int i = 0; i < 8; ++i) sums.value[n][i] = fmaf(of[i], by, sums.value[n][i]);
            }
        }
    }
#else
#pragma unroll
    for (int k = 0; k < FP_DEPTH; k += MMA_DEPTH) {
        Rows rows;
        rows.load<StagedX::LD>(x, k);
#pragma unroll
        for (int m = 0; m < 2; ++m) {
            unsigned a[4];
#if SD_HALF
            ldmatrix_x4_trans(a, w + (k + lane % 8 + lane / 16 * 8) * FP_LD_W + 16 * m + lane / 8 % 2 * 8);
#else
#pragma unroll
            for (int i = 0; i < 4; ++i) a[i] = tf32_bits(w[(k + q + i / 2 * 4) * FP_LD_W + 16 * m + g + i % 2 * 8]);
#endif
            multiply(sums.value[m], a, rows);
        }
    }
#endif
}
#if SD_PRECISION == SD_STRICT
template <>
__device__ __forceinline__ int Sums<2>::column(int i, int q) {
    return i / 4 * 16 + 4 * q + i % 4;
}
#endif

// Shared memory: STAGES of the weight's rows, two of x.
extern "C" __global__ void __launch_bounds__(THREADS, 1) gemm_fp(
    const real* __restrict__ x,       // [rows][units]
    const real* __restrict__ weight,  // [units][padded]
    const real* __restrict__ bias,    // [columns], or null
    const int* __restrict__ kept, const int* __restrict__ first_row, const int* __restrict__ active,
    result* __restrict__ y,  // [rows][columns]
    float scale, int kept_stride, int count, int units, int columns, int padded, int row_stride, int tiles,
    int row_tiles) {
    SD_SHARED_MEMORY(shared);
    const Place place = place_of(first_row, active, row_stride, tiles, row_tiles);
    if (place.rows <= 0) return;
    real* const w_ring = (real*)shared;
    real* const x_ring = w_ring + STAGES * FP_STAGE;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, first = place.tile * FP_COLUMNS;
    const int chunks = divided_up(count, FP_DEPTH);
    const int* list = kept + (long long)place.step * kept_stride;
    const real* rows = x + place.row * units;

    // A lane knows the unit at its position of a chunk, read well before it is needed, and gathers its column of x; who
    // copies a row of the weight asks the lane for the unit.
    const auto unit_in = [&](int chunk) { return unit_at(list, count, chunk * FP_DEPTH + lane, units); };
    const auto fetch_weight = [&](int chunk, int own_unit) {
        if (chunk >= chunks) return;
        const int pieces = FP_COLUMNS / PER_COPY;
        real* to = w_ring + chunk % STAGES * FP_STAGE;
#pragma unroll
        for (int e = threadIdx.x; e < FP_DEPTH * pieces; e += THREADS) {
            const int unit = __shfl_sync(0xffffffffu, own_unit, e / pieces);
            const int at = e % pieces * PER_COPY, column = first + at;
            const bool valid = GUARD(is_unit(unit, units)) && GUARD(column < padded);
            cp_async_16(to + e / pieces * FP_LD_W + at, valid ? weight + (long long)unit * padded + column : weight,
                        valid);
        }
    };
    StagedX staged;
    const auto load_x = [&](int unit) {
        staged.load(rows + unit, GUARD(is_unit(unit, units)), (long long)row_stride * units, place.rows);
    };

    Sums<2> sums;
    sums.clear();
    const int now = unit_in(0);
    int next = unit_in(1), after = unit_in(2);
    fetch_weight(0, now);
    cp_async_commit();
    fetch_weight(1, next);
    cp_async_commit();
    load_x(now);
    staged.store(x_ring);
    for (int chunk = 0; chunk < chunks; ++chunk) {
        cp_async_wait<STAGES - 2>();
        __syncthreads();
        fetch_weight(chunk + 2, after);
        cp_async_commit();
        load_x(next);
        next = after;
        after = unit_in(chunk + 3);
        multiply(sums, w_ring + chunk % STAGES * FP_STAGE + 32 * warp, x_ring + chunk % 2 * ROWS * StagedX::LD);
        staged.store(x_ring + (chunk + 1) % 2 * ROWS * StagedX::LD);
    }
    sums.each([&](int at, int b, float sum) {
        const int column = first + 32 * warp + at;
        if (GUARD(column < columns) && GUARD(b < place.rows)) {
            const float added = bias ? to_float(__ldg(bias + column)) : 0.f;
            y[(place.row + (long long)b * row_stride) * columns + column] = to_result(fmaf(scale, sum, added));
        }
    });
}

// ---- dx = dy W' ----------------------------------------------------------------------------------------------------

// A block has BP_UNITS kept units, a warp 16 of them for all rows; 128 bytes of the weight's rows come at a time.
#define BP_UNITS 64
#define BP_DEPTH ((int)(128 / sizeof(real)))
typedef Staged<BP_DEPTH> StagedDy;
#define BP_STAGE (BP_UNITS * StagedDy::LD)

// `w`: the warp's rows of [BP_UNITS][LD].
static __device__ __forceinline__ void multiply(Sums<1>& sums, const real* w, const real* dy) {
    const int LD = StagedDy::LD, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
#if SD_PRECISION == SD_STRICT
#pragma unroll 1
    for (int k = 0; k < BP_DEPTH; k += 4) {
        float4 of[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) of[i] = *(const float4*)(w + (4 * i + q) * LD + k);
#pragma unroll
        for (int n = 0; n < SD_TILES; ++n) {
            const float4 by = *(const float4*)(dy + (g + 8 * n) * LD + k);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                float& sum = sums.value[n][i];
                sum = fmaf(of[i].w, by.w, fmaf(of[i].z, by.z, fmaf(of[i].y, by.y, fmaf(of[i].x, by.x, sum))));
            }
        }
    }
#else
#pragma unroll
    for (int k = 0; k < BP_DEPTH; k += MMA_DEPTH) {
        Rows rows;
        rows.load<StagedDy::LD>(dy, k);
        unsigned a[4];
#if SD_HALF
        ldmatrix_x4(a, w + lane % 16 * LD + k + lane / 16 * 8);
#else
#pragma unroll
        for (int i = 0; i < 4; ++i) a[i] = tf32_bits(w[(g + i % 2 * 8) * LD + k + q + i / 2 * 4]);
#endif
        multiply(sums.value[0], a, rows);
    }
#endif
}
#if SD_PRECISION == SD_STRICT
template <>
__device__ __forceinline__ int Sums<1>::column(int i, int q) {
    return 4 * i + q;
}
#endif

// Shared memory: STAGES of the weight's rows, two of dy.
extern "C" __global__ void __launch_bounds__(THREADS, 1) gemm_bp(
    const real* __restrict__ dy,      // [rows][columns]
    const real* __restrict__ weight,  // [units][padded]
    const int* __restrict__ kept, const int* __restrict__ first_row, const int* __restrict__ active,
    result* __restrict__ dx,  // [rows][units], zeros
    float scale, int kept_stride, int count, int units, int columns, int padded, int row_stride, int tiles,
    int row_tiles) {
    SD_SHARED_MEMORY(shared);
    const Place place = place_of(first_row, active, row_stride, tiles, row_tiles);
    if (place.rows <= 0) return;
    real* const w_ring = (real*)shared;
    real* const dy_ring = w_ring + STAGES * BP_STAGE;
    const int warp = threadIdx.x / 32, first = place.tile * BP_UNITS, chunks = divided_up(columns, BP_DEPTH);
    const int* list = kept + (long long)place.step * kept_stride;
    const real* rows = dy + place.row * columns;

    // Every thread copies the same part of the same rows each time.
    const int pieces = BP_DEPTH / PER_COPY, apart = THREADS / pieces;
    const int piece = threadIdx.x % pieces * PER_COPY;
    int own_units[BP_UNITS / apart];
#pragma unroll
    for (int i = 0; i < BP_UNITS / apart; ++i)
        own_units[i] = unit_at(list, count, first + threadIdx.x / pieces + i * apart, units);
    const auto fetch_weight = [&](int chunk) {
        if (chunk >= chunks) return;
        real* to = w_ring + chunk % STAGES * BP_STAGE + threadIdx.x / pieces * StagedDy::LD + piece;
        const int column = chunk * BP_DEPTH + piece;
#pragma unroll
        for (int i = 0; i < BP_UNITS / apart; ++i) {
            const bool valid = GUARD(is_unit(own_units[i], units)) && GUARD(column < padded);
            cp_async_16(to + i * apart * StagedDy::LD,
                        valid ? weight + (long long)own_units[i] * padded + column : weight, valid);
        }
    };
    StagedDy staged;
    const auto load_dy = [&](int chunk) {
        const int column = chunk * BP_DEPTH + StagedDy::column();
        staged.load(rows + column, GUARD(column < columns), (long long)row_stride * columns, place.rows);
    };

    Sums<1> sums;
    sums.clear();
#pragma unroll
    for (int chunk = 0; chunk < STAGES - 1; ++chunk) {
        fetch_weight(chunk);
        cp_async_commit();
    }
    load_dy(0);
    staged.store(dy_ring);
    for (int chunk = 0; chunk < chunks; ++chunk) {
        cp_async_wait<STAGES - 2>();
        __syncthreads();
        fetch_weight(chunk + STAGES - 1);
        cp_async_commit();
        load_dy(chunk + 1);
        multiply(sums, w_ring + chunk % STAGES * BP_STAGE + 16 * warp * StagedDy::LD,
                 dy_ring + chunk % 2 * ROWS * StagedDy::LD);
        staged.store(dy_ring + (chunk + 1) % 2 * ROWS * StagedDy::LD);
    }
    sums.each([&](int at, int b, float sum) {
        const int unit = unit_at(list, count, first + 16 * warp + at, units);
        if (GUARD(is_unit(unit, units)) && GUARD(b < place.rows))
            dx[(place.row + (long long)b * row_stride) * units + unit] = to_result(scale * sum);
    });
}

// ---- dW += x' dy ---------------------------------------------------------------------------------------------------

// A block has WG_UNITS units x WG_COLUMNS columns of the result in shared memory, and at each step adds to those of its
// units that the step keeps: WG_GROUP of them at a time in registers, two columns for a lane, so that a warp has half
// of the columns for every second group.
//
// This is float32 arithmetic whatever the operands are. Tensor cores would need the kept units of a step in sixteens,
// and add to other rows of the result at each step, from a batch that is only 10 to 64 deep: what goes in and out of
// their sums is as much as what they multiply. One dense product over all steps at once, units that are dropped set to
// zero, does more arithmetic in less time wherever tensor cores are allowed; where they are not, this does less.
#define WG_UNITS 64
#define WG_COLUMNS 128
#define WG_GROUP 8
#define WG_LD (WG_COLUMNS + 2)
// Steps whose part of the list is looked up together, one by each thread.
#define WG_STEPS THREADS

// The first position of an ascending list with at least this unit.
static __device__ __forceinline__ int position_of(const int* list, int count, int unit) {
    int from = 0, to = count;
    while (from < to) {
        const int middle = from + (to - from) / 2;
        if (__ldg(list + middle) < unit)
            from = middle + 1;
        else
            to = middle;
    }
    return from;
}

#if SD_TILES <= 4
struct WgBuffer {
    float dy[ROWS][WG_COLUMNS];
    float x[ROWS][WG_UNITS];  // in the order of the list
    int unit[WG_UNITS];       // of the block's, from its first; negative: none
};

// Shared memory: two buffers, sums, and where the lists of WG_STEPS steps come to the block's units and leave them.
extern "C" __global__ void __launch_bounds__(THREADS, 1) gemm_wg(
    const real* __restrict__ x,   // [rows][units]
    const real* __restrict__ dy,  // [rows][columns]
    const int* __restrict__ kept, const int* __restrict__ first_row, const int* __restrict__ active,
    result* __restrict__ dw,  // [columns][units]
    float scale, int kept_stride, int count, int units, int columns, int row_stride, int steps, int tiles,
    int row_tiles) {
    SD_SHARED_MEMORY(shared);
    WgBuffer* const buffers = (WgBuffer*)shared;
    float* const sums = (float*)(buffers + 2);            // [WG_UNITS][WG_LD]
    int* const bounds = (int*)(sums + WG_UNITS * WG_LD);  // [WG_STEPS][2]
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int first_column = blockIdx.x % tiles * WG_COLUMNS, first_unit = blockIdx.x / tiles * WG_UNITS;
    const int end_unit = min(first_unit + WG_UNITS, units);
    const int column = first_column + threadIdx.x, slot = threadIdx.x % WG_UNITS;
    // Of x, a thread gathers one unit of every second row.
    const int apart = THREADS / WG_UNITS, above = threadIdx.x / WG_UNITS;

    for (int e = threadIdx.x; e < WG_UNITS * WG_LD; e += THREADS) sums[e] = 0.f;

    real staged_dy[ROWS], staged_x[ROWS / apart];
    int staged_unit, staged_rows, staged_number;
    // Of step first_step + item / row_tiles, the rows of tile item % row_tiles.
    const auto load = [&](int first_step, int item) {
        const int step = item / row_tiles, row_tile = item % row_tiles, t = first_step + step;
        const int rows = min(__ldg(active + t) - row_tile * ROWS, ROWS);
        const long long row = __ldg(first_row + t) + (long long)row_tile * ROWS * row_stride;
        const int from = bounds[2 * step], number = bounds[2 * step + 1] - from;
        const int unit = unit_at(kept + (long long)t * kept_stride + from, number, slot, units);
        const bool valid = GUARD(unit >= first_unit) && GUARD(unit < end_unit);
        staged_unit = valid ? unit - first_unit : -1, staged_rows = rows, staged_number = number;
        const real* from_dy = dy + row * columns + column;
        const real* from_x = x + (row + (long long)above * row_stride) * units + unit;
#pragma unroll
        for (int b = 0; b < ROWS; ++b, from_dy += (long long)row_stride * columns)
            staged_dy[b] = GUARD(column < columns) && GUARD(b < rows) ? __ldg(from_dy) : (real)0;
#pragma unroll
        for (int i = 0; i < ROWS / apart; ++i, from_x += (long long)apart * row_stride * units)
            staged_x[i] = valid && GUARD(above + i * apart < rows) ? __ldg(from_x) : (real)0;
    };
    const auto store = [&](WgBuffer& to) {
#pragma unroll
        for (int b = 0; b < ROWS; ++b) to.dy[b][threadIdx.x] = to_float(staged_dy[b]);
#pragma unroll
        for (int i = 0; i < ROWS / apart; ++i) to.x[above + i * apart][slot] = to_float(staged_x[i]);
        if (above == 0) to.unit[slot] = staged_unit;
    };
    const auto multiply = [&](const WgBuffer& of, int rows, int number) {
        const int at = warp % 2 * 64 + 2 * lane;
        for (int group = warp / 2 * WG_GROUP; group < number; group += WARPS / 2 * WG_GROUP) {
            float2 sum[WG_GROUP];
#pragma unroll
            for (int i = 0; i < WG_GROUP; ++i) sum[i] = make_float2(0.f, 0.f);
#pragma unroll 4
            for (int b = 0; b < rows; ++b) {
                const float2 by = *(const float2*)&of.dy[b][at];
                const float4 low = *(const float4*)&of.x[b][group], high = *(const float4*)&of.x[b][group + 4];
                const float values[WG_GROUP] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
                for (int i = 0; i < WG_GROUP; ++i) {
                    sum[i].x = fmaf(values[i], by.x, sum[i].x);
                    sum[i].y = fmaf(values[i], by.y, sum[i].y);
                }
            }
#pragma unroll
            for (int i = 0; i < WG_GROUP; ++i) {
                const int unit = of.unit[group + i];
                if (!GUARD(unit >= 0)) continue;
                float2* to = (float2*)(sums + unit * WG_LD + at);
                *to = make_float2(to->x + sum[i].x, to->y + sum[i].y);
            }
        }
    };

    for (int first_step = 0; first_step < steps; first_step += WG_STEPS) {
        const int here = min(steps - first_step, WG_STEPS), items = here * row_tiles;
        if (GUARD((int)threadIdx.x < here)) {
            const int* list = kept + (long long)(first_step + threadIdx.x) * kept_stride;
            const int from = position_of(list, count, first_unit);
            bounds[2 * threadIdx.x] = from;
            // There are no more than WG_UNITS between them, unless the list names one twice.
            bounds[2 * threadIdx.x + 1] = min(position_of(list, count, end_unit), from + WG_UNITS);
        }
        __syncthreads();
        load(first_step, 0);
        for (int item = 0; item < items; ++item) {
            const int rows = staged_rows, number = staged_number;
            store(buffers[item % 2]);
            __syncthreads();
            if (item + 1 < items) load(first_step, item + 1);
            multiply(buffers[item % 2], rows, number);
        }
    }
    __syncthreads();
    for (int e = threadIdx.x; e < WG_UNITS * WG_COLUMNS; e += THREADS) {
        const int unit = e % WG_UNITS, to = first_column + e / WG_UNITS;
        if (GUARD(first_unit + unit < end_unit) && GUARD(to < columns))
            dw[(long long)to * units + first_unit + unit] = to_result(scale * sums[unit * WG_LD + e / WG_UNITS]);
    }
}
#endif

// ---- operands of dense products ------------------------------------------------------------------------------------

#define KEEP_UNITS 1024
#define KEEP_ROWS 8

// Multiplies what a step keeps by `scale`, and puts zero, whatever is there, in place of the rest. May be in place.
// Shared memory: KEEP_UNITS bytes.
extern "C" __global__ void __launch_bounds__(THREADS, 1) keep_units(
    const real* x,  // [rows][units]
    const int* __restrict__ kept, const int* __restrict__ first_row, const int* __restrict__ active, real* y,
    float scale, int kept_stride, int count, int units, int row_stride, int tiles, int row_tiles) {
    SD_SHARED_MEMORY(flags);
    const int rest = blockIdx.x / tiles, step = rest / row_tiles, above = rest % row_tiles * KEEP_ROWS;
    const int first = blockIdx.x % tiles * KEEP_UNITS, end = min(first + KEEP_UNITS, units), here = end - first;
    const int rows = min(__ldg(active + step) - above, KEEP_ROWS);
    const int* list = kept + (long long)step * kept_stride;
    for (int e = threadIdx.x; e < here; e += THREADS) flags[e] = 0;
    __syncthreads();
    for (int e = threadIdx.x; e < count; e += THREADS) {
        const int unit = __ldg(list + e);
        if (GUARD(unit >= first) && GUARD(unit < end)) flags[unit - first] = 1;
    }
    __syncthreads();
    for (int b = 0; b < rows; ++b) {
        const long long at = (__ldg(first_row + step) + (long long)(above + b) * row_stride) * units + first;
        for (int e = threadIdx.x; e < here; e += THREADS)
            y[at + e] = flags[e] ? to_real(scale * to_float(x[at + e])) : (real)0;
    }
}
