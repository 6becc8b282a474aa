// One LSTM layer, one direction, over a whole sequence, in one launch each way: blocks keep their part of the recurrent
// weight in shared memory (SD_RESIDENT) or stream its kept rows through it, and meet at one barrier a time step.
//
// Steps are counted in the order in which they are computed; `reverse` says which is which. Rows of activations lie
// where `first_row[t] + b * row_stride` says; at step t the first `active[t]` rows of the batch take part, the state of
// the others stays as it is.
#include "device.cuh"
#include "recurrence.cuh"

#if !SD_RESIDENT && SD_W_STAGES < SD_H_STAGES
#error "the wait for rows of h would not cover those of the weight"
#endif
#define H_STAGE (DEPTH * LD_BATCH)
#define W_STAGE (DEPTH * LD_WEIGHT)
// What a warp has for itself: kept rows of h on their way in, then its sums on their way out.
#define WARP_BYTES_IN (SD_H_STAGES * H_STAGE * (int)sizeof(real))
#define WARP_BYTES_OUT (UNITS * UNIT_PITCH * (int)sizeof(float))
#define WARP_BYTES (WARP_BYTES_IN > WARP_BYTES_OUT ? WARP_BYTES_IN : WARP_BYTES_OUT)

// The kept units of the steps, three steps of them in shared memory: this one's, the next one's, that after it.
struct Lists {
    const int* order;  // [steps][count] in time order; null: every unit
    int* shared;       // [3][count]
    int count;

    __device__ __forceinline__ const int* at(int step) const { return order ? shared + step % 3 * count : 0; }
    __device__ __forceinline__ void fetch(int step, int steps, bool reverse) const {
        if (!order || step >= steps) return;
        const int* from = order + (long long)(reverse ? steps - 1 - step : step) * count;
        for (int i = threadIdx.x; i < count; i += THREADS) shared[step % 3 * count + i] = __ldg(from + i);
    }
};

// One warp's way through the kept rows of all steps: chunks of DEPTH rows, every WARPS-th of a step.
struct Stream {
    Lists lists;
    const real* weight;
    real *h_ring, *w_ring;
    int steps, hidden, columns, first_column, chunks, ahead, warp, lane;

    __device__ __forceinline__ int unit(const int* list, int chunk, int row) const {
        return unit_at(list, lists.count, (chunk * WARPS + warp) * DEPTH + row, hidden);
    }
    // Rows of h of one chunk of the current step.
    __device__ __forceinline__ void fetch_h(const int* list, const real* h, int chunk) const {
        if (chunk >= chunks) return;
        real* to = h_ring + chunk % SD_H_STAGES * H_STAGE;
        const int pieces = BATCH / PER_COPY;
        for (int e = lane; e < DEPTH * pieces; e += 32) {
            const int u = unit(list, chunk, e / pieces), at = e % pieces * PER_COPY;
            const bool valid = GUARD(u < hidden);
            cp_async_16(to + e / pieces * LD_BATCH + at, valid ? h + u * BATCH + at : h, valid);
        }
    }
#if !SD_RESIDENT
    // Rows of the weight of a chunk, counted from the first of the first step.
    __device__ __forceinline__ void fetch_weight(int chunk) const {
        const int step = chunk / chunks;
        if (step >= steps) return;
        real* to = w_ring + chunk % SD_W_STAGES * W_STAGE;
        const int* list = lists.at(step);
        const int pieces = COLUMNS / PER_COPY;
        for (int e = lane; e < DEPTH * pieces; e += 32)
            copy_weight_row(to + e / pieces * LD_WEIGHT, weight, unit(list, chunk % chunks, e / pieces), hidden,
                            columns, first_column, e % pieces, pieces);
    }
#endif
    // The weight's row of a unit of a chunk.
    __device__ __forceinline__ const real* row(const real* resident, const int* list, int step, int chunk,
                                               int row) const {
#if SD_RESIDENT
        return resident + unit(list, chunk, row) * LD_WEIGHT;
#else
        return w_ring + (step * chunks + chunk) % SD_W_STAGES * W_STAGE + row * LD_WEIGHT;
#endif
    }
};

// This warp's share of a step's product.
static __device__ __forceinline__ void forward_product(ForwardSum& sum, const Stream& s, const real* resident,
                                                       const real* h, int step) {
    const int* list = s.lists.at(step);
    clear(sum);
#pragma unroll
    for (int chunk = 0; chunk < SD_H_STAGES - 1; ++chunk) {
        s.fetch_h(list, h, chunk);
        cp_async_commit();
    }
    for (int chunk = 0; chunk < s.chunks; ++chunk) {
        // Groups of copies end in order. This chunk's h is in the one SD_H_STAGES - 1 before the latest; its row of the
        // weight was asked for at least as many chunks ago, or before this step's first groups.
        cp_async_wait<SD_H_STAGES - 2>();
        __syncwarp();
        s.fetch_h(list, h, chunk + SD_H_STAGES - 1);
#if !SD_RESIDENT
        s.fetch_weight(step * s.chunks + chunk + s.ahead);
#endif
        cp_async_commit();
        const real* staged = s.h_ring + chunk % SD_H_STAGES * H_STAGE;
#if SD_PRECISION == SD_STRICT
        const real* rows[DEPTH];
#pragma unroll
        for (int k = 0; k < DEPTH; ++k) rows[k] = s.row(resident, list, step, chunk, k);
        multiply(sum, rows, staged, s.lane);
#elif SD_HALF
        const real* row = s.row(resident, list, step, chunk, s.lane % 8 + s.lane / 16 * 8);
        multiply(sum, row, staged, s.lane);
#else
        const real* low = s.row(resident, list, step, chunk, s.lane % 4);
        const real* high = s.row(resident, list, step, chunk, s.lane % 4 + 4);
        multiply(sum, low, high, staged, s.lane);
#endif
    }
    // The ring becomes the place of the sums.
    __syncwarp();
}

// When a step is computed, and where the rows of one lie.
struct Times {
    const int *first_row, *active;
    int steps, row_stride, reverse;

    __device__ __forceinline__ int at(int step) const { return reverse ? steps - 1 - step : step; }
    __device__ __forceinline__ int rows(int t) const { return __ldg(active + t); }
    __device__ __forceinline__ long long row(int t, int b) const {
        return (long long)__ldg(first_row + t) + (long long)b * row_stride;
    }
};

// What a kept unit, or an element of a mask, is multiplied by on its way into the recurrent product of step t.
static __device__ __forceinline__ float multiplier(const float* kept, const float* mask, int t, int b, int u,
                                                   int batch, int hidden) {
    if (kept) return __ldg(kept + (long long)t * hidden + u);
    if (mask) return __ldg(mask + ((long long)t * batch + b) * hidden + u);
    return 1.f;
}

// Shared memory: resident weight or rings of rows, lists, the warps' own, the block's h for writing out.
extern "C" __global__ void __launch_bounds__(THREADS, 1) lstm_forward(
    const real* __restrict__ weight,    // [hidden][columns], gates of a unit side by side; columns >= 4 hidden
    const float* __restrict__ inputs,   // [rows][4 hidden], the input's product, gates i, f, g, o one after the other
    const float* __restrict__ bias,     // [4 hidden], or null
    const float* __restrict__ h0,       // [batch][hidden]
    const float* __restrict__ c0,
    const int* __restrict__ order,      // [steps][count] kept units, `hidden` for none; null: all, and count = hidden
    const float* __restrict__ kept,     // [steps][hidden] their multipliers, zero for the others; null without order
    const float* __restrict__ mask,     // [steps][batch][hidden], or null
    const int* __restrict__ first_row,  // [steps]
    const int* __restrict__ active,     // [steps]
    real* exchange,                     // [2][slices][hidden][BATCH], for this kernel alone
    unsigned* counters,                 // [slices * 32], zero
    real* __restrict__ y,               // [rows][hidden]
    float* __restrict__ h_n,            // [batch][hidden]
    float* __restrict__ c_n,
    float4* __restrict__ gates,         // [steps][slices][hidden][BATCH]
    float* __restrict__ cells,          // the same
    real* __restrict__ operand,         // [rows][hidden]: h of the step before, dropped and scaled
    float scale, int row_stride, int steps, int batch, int hidden, int columns, int count, int parts, int slices,
    int reverse) {
    SD_SHARED_MEMORY(shared);
    stop_unless(gridDim.x == parts * slices);
    const Slice own = slice_of(parts);
    const Times times = {first_row, active, steps, row_stride, reverse};
    const int warp = threadIdx.x / 32;
    real* resident = (real*)shared;
#if SD_RESIDENT
    const long long weight_size = (long long)(hidden + 1) * LD_WEIGHT;
#else
    const long long weight_size = WARPS * SD_W_STAGES * W_STAGE;
#endif
    unsigned char* lists = shared + aligned(weight_size * sizeof(real));
    unsigned char* warps = lists + (order ? aligned(3 * count * sizeof(int)) : 0);
    float* out = (float*)(warps + WARPS * WARP_BYTES);  // [BATCH][UNITS]

    Stream stream;
    stream.lists.order = order, stream.lists.shared = (int*)lists, stream.lists.count = count;
    stream.weight = weight;
    stream.h_ring = (real*)(warps + warp * WARP_BYTES);
    stream.w_ring = resident + (SD_RESIDENT ? 0 : warp * SD_W_STAGES * W_STAGE);
    stream.steps = steps, stream.hidden = hidden, stream.columns = columns, stream.first_column = 4 * own.unit;
    stream.chunks = (count + WARPS * DEPTH - 1) / (WARPS * DEPTH);
    stream.ahead = min(SD_W_STAGES - 1, stream.chunks);
    stream.warp = warp, stream.lane = threadIdx.x % 32;

    float h[OWNED], c[OWNED], bias_of[OWNED][4], next[OWNED][4];
    stream.lists.fetch(0, steps, reverse);
    stream.lists.fetch(1, steps, reverse);

    const auto prefetch = [&](int step) {
        if (step >= steps) return;
        const int t = times.at(step), rows = times.rows(t);
        for_owned(own, hidden, [&](int i, int, int u, int b) {
            if (!GUARD(b < rows)) return;
            const float* from = inputs + times.row(t, b) * 4 * hidden + u;
#pragma unroll
            for (int j = 0; j < 4; ++j) next[i][j] = __ldg(from + (long long)j * hidden);
        });
    };
    // The state that a step starts from, for all blocks; and for this block to write out.
    const auto publish = [&](int step) {
        real* to = exchange + (long long)(step % 2 * slices + own.slice) * hidden * BATCH + own.unit * BATCH;
        for_owned(own, hidden, [&](int i, int at, int u, int b) {
            out[at % BATCH * UNITS + at / BATCH] = h[i];
            if (step == steps) return;
            const bool masked = mask && GUARD(b < batch);
            to[at] = to_operand(masked ? h[i] * multiplier(0, mask, times.at(step), b, u, batch, hidden) : h[i]);
        });
        __syncthreads();
        if (threadIdx.x == 0 && step < steps) announce(counters + own.slice * 32);
    };
    // What no block waits for, written while the others arrive; units side by side.
    const auto write_rows = [&](int step, bool emitted) {
        if (step >= steps) return;
        const int t = times.at(step), rows = times.rows(t);
        for (int e = threadIdx.x; e < UNITS * BATCH; e += THREADS) {
            const int u = own.unit + e % UNITS, b = own.row + e / UNITS;
            if (!(GUARD(u < hidden) && GUARD(b < rows))) continue;
            const long long to = times.row(t, b) * hidden + u;
            if (emitted)
                y[to] = to_real(out[e]);
            else
                operand[to] = to_operand(out[e] * multiplier(kept, mask, t, b, u, batch, hidden));
        }
    };

    for_owned(own, hidden, [&](int i, int, int u, int b) {
        const bool exists = GUARD(b < batch);
        h[i] = exists ? h0[(long long)b * hidden + u] : 0.f;
        c[i] = exists ? c0[(long long)b * hidden + u] : 0.f;
#pragma unroll
        for (int j = 0; j < 4; ++j) bias_of[i][j] = bias ? bias[j * hidden + u] : 0.f;
    });
    prefetch(0);
    publish(0);
#if SD_RESIDENT
    load_resident(resident, weight, hidden, columns, 4 * own.unit);
#else
    // In one group with the first rows of h.
    for (int chunk = 0; chunk < stream.ahead; ++chunk) stream.fetch_weight(chunk);
#endif
    write_rows(0, false);

    for (int step = 0; step < steps; ++step) {
        const int t = times.at(step), rows = times.rows(t);
        if (threadIdx.x == 0) await(counters + own.slice * 32, (unsigned)(step + 1) * parts);
        __syncthreads();
        ForwardSum sum;
        forward_product(sum, stream, resident, exchange + (long long)(step % 2 * slices + own.slice) * hidden * BATCH,
                        step);
        store((float*)(warps + warp * WARP_BYTES), sum, stream.lane);
        __syncthreads();
        const long long saved = (long long)(t * slices + own.slice) * hidden * BATCH + own.unit * BATCH;
        float4 activated[OWNED];
        for_owned(own, hidden, [&](int i, int at, int, int b) {
            float s[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
            for (int w = 0; w < WARPS; ++w) {
                const float* from = (const float*)(warps + w * WARP_BYTES) + at / BATCH * UNIT_PITCH + at % BATCH;
#pragma unroll
                for (int j = 0; j < 4; ++j) s[j] += from[j * BATCH];
            }
            if (!GUARD(b < rows)) return;
#pragma unroll
            for (int j = 0; j < 4; ++j) s[j] = fmaf(scale, s[j], next[i][j] + bias_of[i][j]);
            const float in = sigmoid(s[0]), forget = sigmoid(s[1]), cell = tanhf(s[2]), emit = sigmoid(s[3]);
            c[i] = fmaf(forget, c[i], in * cell);
            h[i] = emit * tanhf(c[i]);
            activated[i] = make_float4(in, forget, cell, emit);
        });
        publish(step + 1);
        for_owned(own, hidden, [&](int i, int at, int, int b) {
            if (b < rows) gates[saved + at] = activated[i];
            cells[saved + at] = c[i];
        });
        write_rows(step, true);
        write_rows(step + 1, false);
        stream.lists.fetch(step + 2, steps, reverse);
        prefetch(step + 1);
    }
    for_owned(own, hidden, [&](int i, int, int u, int b) {
        if (!GUARD(b < batch)) return;
        h_n[(long long)b * hidden + u] = h[i];
        c_n[(long long)b * hidden + u] = c[i];
    });
}

// ---- backward ------------------------------------------------------------------------------------------------------

// Tiles of UNIT_TILE kept units, every WARPS-th of them this warp's: their rows of the weight times the gradients of the
// block's gates give the block's share of dh.
struct Tiles {
    Lists lists;
    const real* weight;
    real *resident, *ring;
    int steps, hidden, columns, first_column, count, warp, lane;

    __device__ __forceinline__ int unit(const int* list, int tile, int row) const {
        return unit_at(list, lists.count, tile * UNIT_TILE + row, hidden);
    }
#if !SD_RESIDENT
    __device__ __forceinline__ void fetch(const int* list, int turn) const {
        const int tile = warp + turn * WARPS, pieces = COLUMNS / PER_COPY;
        real* to = ring + turn % SD_TILE_STAGES * UNIT_TILE * LD_WEIGHT;
        if (tile < count)
            for (int e = lane; e < UNIT_TILE * pieces; e += 32)
                copy_weight_row(to + e / pieces * LD_WEIGHT, weight, unit(list, tile, e / pieces), hidden, columns,
                                first_column, e % pieces, pieces);
        cp_async_commit();
    }
    // The first tiles of a step, while the blocks still wait for each other.
    __device__ __forceinline__ void begin(int step) const {
        if (step >= steps) return;
#pragma unroll
        for (int turn = 0; turn < SD_TILE_STAGES - 1; ++turn) fetch(lists.at(step), turn);
    }
#endif
};

static __device__ __forceinline__ void backward_product(float* partial, const Tiles& tiles, int step,
                                                        const real* gradients) {
    const int* list = tiles.lists.at(step);
    BackwardOperand operand;
    load(operand, gradients, tiles.lane);
    for (int tile = tiles.warp, turn = 0; tile < tiles.count; tile += WARPS, ++turn) {
#if SD_RESIDENT
        const real* first = tiles.resident + tiles.unit(list, tile, lane_unit(tiles.lane, 0)) * LD_WEIGHT;
        const real* second = tiles.resident + tiles.unit(list, tile, lane_unit(tiles.lane, 1)) * LD_WEIGHT;
#else
        cp_async_wait<SD_TILE_STAGES - 2>();
        __syncwarp();
        tiles.fetch(list, turn + SD_TILE_STAGES - 1);
        const real* rows = tiles.ring + turn % SD_TILE_STAGES * UNIT_TILE * LD_WEIGHT;
        const real* first = rows + lane_unit(tiles.lane, 0) * LD_WEIGHT;
        const real* second = rows + lane_unit(tiles.lane, 1) * LD_WEIGHT;
#endif
        BackwardSum sum;
        clear(sum);
        multiply(sum, first, second, operand, tiles.lane);
#pragma unroll
        for (int which = 0; which < 2; ++which) {
            const int u = tiles.unit(list, tile, stored_unit(tiles.lane, which));
            if (GUARD(u < tiles.hidden)) store(partial + u * BATCH, sum, which, tiles.lane);
        }
    }
}

// The sum of all blocks' shares of dh for the block's own units, in [UNITS][BATCH] of every group of threads.
#define VECTORS (UNITS * BATCH / 4)
#define SHARES (SD_TILES > 4 ? 4 : 8)
#define GROUPS (VECTORS >= THREADS ? 1 : THREADS / VECTORS)
static __device__ __forceinline__ void gather_shares(float* groups, const float* partial, const float* factors,
                                                     const Slice& own, int hidden) {
    for (int e = threadIdx.x; e < GROUPS * VECTORS; e += THREADS) {
        const int group = e / VECTORS, at = e % VECTORS * 4, u = own.unit + at / BATCH;
        // Nobody wrote the share of a unit that was not kept.
        if (!GUARD(u < hidden) || (factors && factors[at / BATCH] == 0.f)) continue;
        float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
        const float* from = partial + (long long)own.unit * BATCH + at;
        // Several loads on their way at once: each takes as long as it takes to L2.
        for (int part = group; part < own.parts; part += SHARES * GROUPS) {
            float4 x[SHARES];
#pragma unroll
            for (int i = 0; i < SHARES; ++i) {
                const int at_part = part + i * GROUPS;
                x[i] = GUARD(at_part < own.parts)
                           ? load_shared_by_blocks((const float4*)(from + (long long)at_part * hidden * BATCH))
                           : make_float4(0.f, 0.f, 0.f, 0.f);
            }
#pragma unroll
            for (int i = 0; i < SHARES; ++i) sum.x += x[i].x, sum.y += x[i].y, sum.z += x[i].z, sum.w += x[i].w;
        }
        *(float4*)(groups + group * UNITS * BATCH + at) = sum;
    }
}

// Shared memory: resident weight or rings of rows, lists, the gates' gradients, sums of the groups, multipliers.
extern "C" __global__ void __launch_bounds__(THREADS, 1) lstm_backward(
    const real* __restrict__ weight,    // all of these as in lstm_forward
    const int* __restrict__ order, const float* __restrict__ kept, const float* __restrict__ mask,
    const int* __restrict__ first_row, const int* __restrict__ active, const float4* __restrict__ gates,
    const float* __restrict__ cells, const float* __restrict__ c0,
    const real* __restrict__ dy,        // [rows][hidden]
    const float* __restrict__ dh_n,     // [batch][hidden]
    const float* __restrict__ dc_n,
    float* partial,                     // [2][slices][parts][hidden][BATCH], for this kernel alone
    unsigned* counters,                 // [slices * 32], zero
    real* __restrict__ dgates,          // [rows][4 hidden], gates one after the other
    float* __restrict__ dh0,            // [batch][hidden]
    float* __restrict__ dc0,
    float* __restrict__ dbias,          // [slices][4 hidden]
    int row_stride, int steps, int batch, int hidden, int columns, int count, int parts, int slices, int reverse) {
    SD_SHARED_MEMORY(shared);
    stop_unless(gridDim.x == parts * slices);
    const Slice own = slice_of(parts);
    // Steps backwards.
    const Times times = {first_row, active, steps, row_stride, !reverse};
    const int warp = threadIdx.x / 32;
    real* resident = (real*)shared;
#if SD_RESIDENT
    const long long weight_size = (long long)(hidden + 1) * LD_WEIGHT;
#else
    const long long weight_size = WARPS * SD_TILE_STAGES * UNIT_TILE * LD_WEIGHT;
#endif
    unsigned char* lists_at = shared + aligned(weight_size * sizeof(real));
    real* gradients = (real*)(lists_at + (order ? aligned(3 * count * sizeof(int)) : 0));  // [COLUMNS][LD_BATCH]
    float* groups = (float*)((unsigned char*)gradients + aligned(COLUMNS * LD_BATCH * sizeof(real)));
    float* factors = groups + (GROUPS > 4 ? GROUPS : 4) * UNITS * BATCH;  // [2][UNITS]
    Tiles tiles;
    tiles.lists.order = order, tiles.lists.shared = (int*)lists_at, tiles.lists.count = count;
    tiles.weight = weight, tiles.resident = resident;
    tiles.ring = resident + (SD_RESIDENT ? 0 : warp * SD_TILE_STAGES * UNIT_TILE * LD_WEIGHT);
    tiles.steps = steps, tiles.hidden = hidden, tiles.columns = columns, tiles.first_column = 4 * own.unit;
    tiles.count = (count + UNIT_TILE - 1) / UNIT_TILE, tiles.warp = warp, tiles.lane = threadIdx.x % 32;

    float dh[OWNED], dc[OWNED], bias_sum[OWNED][4], next_dy[OWNED], next_c[OWNED], c[OWNED];
    float4 next_gates[OWNED];
    bool was_active[OWNED];
    // Of the step whose shares come next, and of the one after it, whose values are on their way.
    float factor[OWNED], next_factor[OWNED];
    const auto saved = [&](int t) {
        return (long long)(t * slices + own.slice) * hidden * BATCH + own.unit * BATCH;
    };
    // What the step needs that is known; `next_c` is the cell before it.
    const auto prefetch = [&](int step) {
        if (step >= steps) return;
        const int t = times.at(step), rows = times.rows(t);
        for_owned(own, hidden, [&](int i, int at, int u, int b) {
            if (!GUARD(b < rows)) return;
            next_factor[i] = multiplier(kept, mask, t, b, u, batch, hidden);
            next_gates[i] = gates[saved(t) + at];
            next_dy[i] = to_float(dy[times.row(t, b) * hidden + u]);
            next_c[i] = step + 1 < steps ? cells[saved(times.at(step + 1)) + at] : c0[(long long)b * hidden + u];
        });
    };
    // Multipliers of the block's own units, for whoever gathers their shares.
    const auto fetch_factors = [&](int step) {
        const int u = own.unit + threadIdx.x;
        if (!kept || step >= steps || threadIdx.x >= UNITS || u >= hidden) return;
        factors[step % 2 * UNITS + threadIdx.x] = __ldg(kept + (long long)times.at(step) * hidden + u);
    };
    // dh of the state before step `step - 1` of this order, once its shares are there.
    const auto receive = [&](int step) {
        if (threadIdx.x == 0) await(counters + own.slice * 32, (unsigned)step * parts);
        __syncthreads();
        gather_shares(groups,
                      partial + (long long)((step - 1) % 2 * slices + own.slice) * parts * hidden * BATCH,
                      kept ? factors + (step - 1) % 2 * UNITS : 0, own, hidden);
        __syncthreads();
        for_owned(own, hidden, [&](int i, int at, int, int) {
            if (!was_active[i]) return;
            float sum = 0.f;
            if (!kept || factor[i] != 0.f)
#pragma unroll
                for (int group = 0; group < GROUPS; ++group) sum += groups[group * UNITS * BATCH + at];
            dh[i] = sum * factor[i];
        });
    };

    for_owned(own, hidden, [&](int i, int at, int u, int b) {
        const bool exists = GUARD(b < batch);
        dh[i] = exists ? dh_n[(long long)b * hidden + u] : 0.f;
        dc[i] = exists ? dc_n[(long long)b * hidden + u] : 0.f;
        was_active[i] = false;
        c[i] = steps > 0 ? cells[saved(times.at(0)) + at] : 0.f;
#pragma unroll
        for (int j = 0; j < 4; ++j) bias_sum[i][j] = 0.f;
    });
    tiles.lists.fetch(0, steps, !reverse);
    tiles.lists.fetch(1, steps, !reverse);
    fetch_factors(0);
    prefetch(0);
#if SD_RESIDENT
    load_resident(resident, weight, hidden, columns, 4 * own.unit);
#endif
    for (int e = threadIdx.x; e < COLUMNS * LD_BATCH; e += THREADS) gradients[e] = to_real(0.f);
    __syncthreads();
#if !SD_RESIDENT
    tiles.begin(0);
#endif

    for (int step = 0; step < steps; ++step) {
        const int t = times.at(step), rows = times.rows(t);
        if (step > 0) receive(step);
        float4 dgate[OWNED];
        for_owned(own, hidden, [&](int i, int at, int, int b) {
            was_active[i] = GUARD(b < rows);
            factor[i] = next_factor[i];
            dgate[i] = make_float4(0.f, 0.f, 0.f, 0.f);
            if (was_active[i]) {
                const float in = next_gates[i].x, forget = next_gates[i].y, cell = next_gates[i].z,
                            emit = next_gates[i].w, tanh_c = tanhf(c[i]), dh_t = dh[i] + next_dy[i];
                const float dc_t = fmaf(dh_t * emit, 1.f - tanh_c * tanh_c, dc[i]);
                dgate[i] = make_float4(dc_t * cell * in * (1.f - in), dc_t * next_c[i] * forget * (1.f - forget),
                                       dc_t * in * (1.f - cell * cell), dh_t * tanh_c * emit * (1.f - emit));
                dc[i] = dc_t * forget;
                c[i] = next_c[i];
                bias_sum[i][0] += dgate[i].x, bias_sum[i][1] += dgate[i].y;
                bias_sum[i][2] += dgate[i].z, bias_sum[i][3] += dgate[i].w;
            }
            real* to = gradients + at / BATCH * 4 * LD_BATCH + at % BATCH;
            to[0] = to_operand(dgate[i].x), to[LD_BATCH] = to_operand(dgate[i].y);
            to[2 * LD_BATCH] = to_operand(dgate[i].z), to[3 * LD_BATCH] = to_operand(dgate[i].w);
        });
        __syncthreads();
        backward_product(partial + ((long long)(step % 2 * slices + own.slice) * parts + own.part) * hidden * BATCH,
                         tiles, step, gradients);
        __syncthreads();
        if (threadIdx.x == 0) announce(counters + own.slice * 32);
#if !SD_RESIDENT
        tiles.begin(step + 1);
#endif
        for (int e = threadIdx.x; e < COLUMNS * BATCH; e += THREADS) {
            const int u = own.unit + e % UNITS, gate = e / UNITS % 4, b = own.row + e / COLUMNS;
            if (GUARD(u < hidden) && GUARD(b < rows))
                dgates[(times.row(t, b) * 4 + gate) * hidden + u] =
                    gradients[(e % UNITS * 4 + gate) * LD_BATCH + e / COLUMNS];
        }
        tiles.lists.fetch(step + 2, steps, !reverse);
        fetch_factors(step + 1);
        prefetch(step + 1);
    }
    if (steps > 0) receive(steps);
    __syncthreads();
    for_owned(own, hidden, [&](int i, int at, int u, int b) {
        float* to = groups + at / BATCH * 4 * BATCH + at % BATCH;
#pragma unroll
        for (int j = 0; j < 4; ++j) to[j * BATCH] = bias_sum[i][j];
        if (!GUARD(b < batch)) return;
        dh0[(long long)b * hidden + u] = dh[i];
        dc0[(long long)b * hidden + u] = dc[i];
    });
    __syncthreads();
    for (int e = threadIdx.x; e < COLUMNS; e += THREADS) {
        const int u = own.unit + e / 4;
        if (!GUARD(u < hidden)) continue;
        float sum = 0.f;
        for (int b = 0; b < BATCH; ++b) sum += groups[e * BATCH + b];
        dbias[(long long)own.slice * 4 * hidden + e % 4 * hidden + u] = sum;
    }
}
