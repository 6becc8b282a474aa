// The three products on packed weights, visiting kept units only: register tiles and the loops around them.
//
// A weight of K input units and N output columns is held as panels [N / kPanel][padded K][kPanel]: a dropped unit is a
// row that is never touched, in all three products, and a panel of a layer's size stays in the second-level cache.
// An input is held transposed and compact, [kept][rows], one block per time step: its factors already applied.
#pragma once

#include <algorithm>

#include "vector.h"

namespace sd {

constexpr int kPanelVectors = 4;
template <class T>
constexpr int kPanel = kPanelVectors * kLanes<T>;

// Panels per block of the columns in a backward product: the rows of weights and of gradients that a tile visits fit
// the first-level cache together.
template <class T>
constexpr int kDotPanels = std::max(1, 4096 / int(sizeof(T)) / kPanel<T>);

// Rows of a panel in memory. One more than a multiple of kDotPanels, so that a row's pieces in the panels of a block
// fall into different sets of the cache, whatever the number of rows.
template <class T>
constexpr int64_t padded_rows(int64_t rows) {
  return (rows + kDotPanels<T> - 2) / kDotPanels<T> * kDotPanels<T> + 1;
}
template <class T>
constexpr int64_t panel_size(int64_t rows) {
  return padded_rows<T>(rows) * kPanel<T>;
}

// Tiles that fill the register file: 32 vector registers with AVX-512, else at least 16.
#if SD_ISA == 512
constexpr int kForwardRows = 14;
constexpr int kDotUnits = 6;
template <class T>
constexpr int kDotRows = 4;
constexpr int kGradUnits = 6, kGradVectors = 4;
#else
constexpr int kForwardRows = 6;
constexpr int kDotUnits = 3;
template <class T>
constexpr int kDotRows = std::min(3, kLanes<T>);
constexpr int kGradUnits = 6, kGradVectors = 2;
#endif
constexpr int kForwardVectors = 2;
// Rows of weights fetched ahead; a row takes about ten cycles.
constexpr int kAhead = 24;

struct Range {
  int64_t begin, end;
};

// The share of thread `me` of `count` items.
SD_INLINE Range share(int64_t count, int me, int threads) {
  return {count * me / threads, count * (me + 1) / threads};
}

// Calls f.template operator()<n>() for the n in 1..Max that equals `n`.
template <int Max, class F>
SD_INLINE void with_constant(int n, F&& f) {
  if constexpr (Max > 1) {
    if (n < Max) return with_constant<Max - 1>(n, f);
  }
  f(std::integral_constant<int, Max>());
}

// Splits n into the fewest parts of at most `most`, sizes as equal as can be; f(begin, size).
template <class F>
SD_INLINE void in_parts(int n, int most, F&& f) {
  int parts = (n + most - 1) / most;
  for (int i = 0; i < parts; i++) {
    int begin = int(int64_t(n) * i / parts), end = int(int64_t(n) * (i + 1) / parts);
    f(begin, end - begin);
  }
}

// ---- forward: c[m][:] (+)= sum_i a[i][m] * w[idx[i]][:] ---------------------------------------------------------

// M rows by kForwardVectors vectors; starts from `start` when given, else from c.
template <class T, int M>
inline void forward_tile(const T* a, int64_t lda, const T* w, const int32_t* idx, int kept, const T* start, T* c,
                         int64_t ldc) {
  constexpr int L = kLanes<T>;
  Vec<T> acc[M][kForwardVectors];
  SD_UNROLL
  for (int m = 0; m < M; m++) {
    SD_UNROLL
    for (int v = 0; v < kForwardVectors; v++) acc[m][v] = load(start ? start + v * L : c + m * ldc + v * L);
  }
  for (int i = 0; i < kept; i++) {
    const T* row = w + int64_t(idx[i]) * kPanel<T>;
    const T* ahead = w + int64_t(idx[i + kAhead < kept ? i + kAhead : kept - 1]) * kPanel<T>;
    SD_UNROLL
    for (int v = 0; v < kForwardVectors; v++) __builtin_prefetch(ahead + v * L);
    Vec<T> b[kForwardVectors];
    SD_UNROLL
    for (int v = 0; v < kForwardVectors; v++) b[v] = load(row + v * L);
    SD_UNROLL
    for (int m = 0; m < M; m++) {
      Vec<T> x = splat(a[m]);
      SD_UNROLL
      for (int v = 0; v < kForwardVectors; v++) acc[m][v] += x * b[v];
    }
    a += lda;
  }
  SD_UNROLL
  for (int m = 0; m < M; m++) {
    SD_UNROLL
    for (int v = 0; v < kForwardVectors; v++) store(c + m * ldc + v * L, acc[m][v]);
  }
}

// All rows of one block, one panel of columns. start: kPanel values to begin from, or null to add to c.
template <class T>
inline void forward_panel(const T* a, int rows, const T* w, const int32_t* idx, int kept, const T* start, T* c,
                          int64_t ldc) {
  constexpr int L = kLanes<T>;
  for (int v = 0; v < kPanelVectors; v += kForwardVectors) {
    in_parts(rows, kForwardRows, [&](int m, int size) {
      with_constant<kForwardRows>(size, [&](auto n) {
        forward_tile<T, n.value>(a + m, rows, w + v * L, idx, kept, start ? start + v * L : nullptr,
                                 c + m * ldc + v * L, ldc);
      });
    });
  }
}

// ---- backward: out[b][idx[i]] += scale * sum_n g[b][n] * w[idx[i]][n] ------------------------------------------

// Where a panel's columns of the gradient rows lie: `panel` elements from one panel to the next, `row` between rows.
struct GradStrides {
  int64_t panel, row;
};

// kDotUnits units by B rows, over `panels` panels: vectors run along the columns. Ahead: how many lines of the rows
// `ahead` to fetch from each panel.
template <class T, int B, int Ahead>
__attribute__((noinline)) void dot_tile(const T* const* w, int64_t panel_stride, int panels, const T* g,
                                        GradStrides strides, int units, const T* const* ahead, const int32_t* idx,
                                        T scale, T* out, int64_t ldo) {
  constexpr int L = kLanes<T>;
  Vec<T> acc[kDotUnits][B];
  SD_UNROLL
  for (int a = 0; a < kDotUnits; a++) {
    SD_UNROLL
    for (int b = 0; b < B; b++) acc[a][b] = Vec<T>{};
  }
  const T *row[kDotUnits], *grad[B];
  SD_UNROLL
  for (int a = 0; a < kDotUnits; a++) row[a] = w[a];
  SD_UNROLL
  for (int b = 0; b < B; b++) grad[b] = g + b * strides.row;
  for (int p = 0; p < panels; p++) {
    if constexpr (Ahead > 0) {
      SD_UNROLL
      for (int a = 0; a < kDotUnits; a++) {
        SD_UNROLL
        for (int v = 0; v < Ahead; v++) __builtin_prefetch(ahead[a] + p * panel_stride + v * L, 0, 2);
      }
    }
    SD_UNROLL
    for (int v = 0; v < kPanelVectors; v++) {
      Vec<T> x[B];
      SD_UNROLL
      for (int b = 0; b < B; b++) x[b] = load(grad[b] + v * L);
      SD_UNROLL
      for (int a = 0; a < kDotUnits; a++) {
        Vec<T> y = load(row[a] + v * L);
        SD_UNROLL
        for (int b = 0; b < B; b++) acc[a][b] += y * x[b];
      }
    }
    SD_UNROLL
    for (int a = 0; a < kDotUnits; a++) row[a] += panel_stride;
    SD_UNROLL
    for (int b = 0; b < B; b++) grad[b] += strides.panel;
  }
  SD_UNROLL
  for (int a = 0; a < kDotUnits; a++) {
    T sums[kLanes<T>];
    store(sums, sum_each<T, B>(acc[a]));
    if (a >= units) break;
    SD_UNROLL
    for (int b = 0; b < B; b++) out[b * ldo + idx[a]] += scale * sums[b];
  }
}

// Units [kept.begin, kept.end) of the list, all rows of one block, `panels` panels of columns from w and g on.
template <class T>
inline void backward_block(const T* w, int64_t panel_stride, int panels, const T* g, GradStrides strides, int rows,
                           const int32_t* idx, Range kept, T scale, T* out, int64_t ldo) {
  for (int64_t i = kept.begin; i < kept.end; i += kDotUnits) {
    int units = int(std::min<int64_t>(kDotUnits, kept.end - i));
    const T *row[kDotUnits], *ahead[kDotUnits];
    for (int a = 0; a < kDotUnits; a++) {
      row[a] = w + int64_t(idx[i + (a < units ? a : 0)]) * kPanel<T>;
      ahead[a] = w + int64_t(idx[std::min(i + kDotUnits + a, kept.end - 1)]) * kPanel<T>;
    }
    // The next rows are fetched while these are in use, by one line of each panel per tile if there are enough tiles.
    bool spread = rows > (kPanelVectors - 1) * kDotRows<T>;
    int tiles = 0;
    in_parts(rows, kDotRows<T>, [&](int b, int size) {
      const T* next[kDotUnits];
      for (int a = 0; a < kDotUnits; a++) next[a] = ahead[a] + (spread ? tiles * kLanes<T> : 0);
      int lines = spread ? tiles < kPanelVectors : tiles == 0 ? kPanelVectors : 0;
      tiles++;
      with_constant<kDotRows<T>>(size, [&](auto n) {
        auto tile = lines == 0   ? dot_tile<T, n.value, 0>
                    : lines == 1 ? dot_tile<T, n.value, 1>
                                 : dot_tile<T, n.value, kPanelVectors>;
        tile(row, panel_stride, panels, g + b * strides.row, strides, units, next, idx + i, scale, out + b * ldo, ldo);
      });
    });
  }
}

// ---- weight gradient: dw[idx[i]][:] += sum_b a[i][b] * g[b][:] -------------------------------------------------

// One block of rows as an operand of the weight gradient.
template <class T>
struct GradBlock {
  const T* a;  // [kept][rows]
  const T* g;  // rows of stride ldg, at this panel's columns
  int rows;
};

// U units by kGradVectors vectors, over `blocks` blocks that keep the same units.
template <class T, int U>
inline void grad_tile(const GradBlock<T>* blocks, int64_t count, int unit, int64_t ldg, int v, const int32_t* idx,
                      T* dw) {
  constexpr int L = kLanes<T>;
  Vec<T> acc[U][kGradVectors];
  SD_UNROLL
  for (int j = 0; j < U; j++) {
    SD_UNROLL
    for (int u = 0; u < kGradVectors; u++) acc[j][u] = load(dw + int64_t(idx[j]) * kPanel<T> + (v + u) * L);
  }
  for (int64_t s = 0; s < count; s++) {
    const int rows = blocks[s].rows;
    const T* a = blocks[s].a + int64_t(unit) * rows;
    const T* g = blocks[s].g + v * L;
    for (int b = 0; b < rows; b++) {
      Vec<T> y[kGradVectors];
      SD_UNROLL
      for (int u = 0; u < kGradVectors; u++) y[u] = load(g + u * L);
      SD_UNROLL
      for (int j = 0; j < U; j++) {
        Vec<T> x = splat(a[int64_t(j) * rows + b]);
        SD_UNROLL
        for (int u = 0; u < kGradVectors; u++) acc[j][u] += x * y[u];
      }
      g += ldg;
    }
  }
  SD_UNROLL
  for (int j = 0; j < U; j++) {
    SD_UNROLL
    for (int u = 0; u < kGradVectors; u++) store(dw + int64_t(idx[j]) * kPanel<T> + (v + u) * L, acc[j][u]);
  }
}

// One panel [K][kPanel] of the weight gradient, adding blocks that all keep the units `idx`.
template <class T>
inline void grad_panel(const GradBlock<T>* blocks, int64_t count, int64_t ldg, const int32_t* idx, int kept, T* dw) {
  in_parts(kept, kGradUnits, [&](int i, int size) {
    with_constant<kGradUnits>(size, [&](auto n) {
      for (int v = 0; v < kPanelVectors; v += kGradVectors)
        grad_tile<T, n.value>(blocks, count, i, ldg, v, idx + i, dw);
    });
  });
}

// ---- layouts ----------------------------------------------------------------------------------------------------

// Where the columns of a packed matrix come from. A layer's panel holds kLanes units of each of its four gates,
// side by side, so that the state of those units is updated in registers; a plain matrix is cut into consecutive columns.
template <class T>
struct Columns {
  int64_t total;  // columns of the host's matrix
  bool gates;     // total = 4 H, in the order i, f, g, o

  int64_t panels() const {
    int64_t width = gates ? kLanes<T> : kPanel<T>, size = gates ? total / 4 : total;
    return (size + width - 1) / width;
  }
  // The first column of vector v of a panel, and how many of its lanes exist.
  int64_t first(int64_t panel, int v) const {
    return gates ? v * (total / 4) + panel * kLanes<T> : panel * kPanel<T> + v * kLanes<T>;
  }
  int lanes(int64_t panel, int v) const {
    int64_t left = gates ? total / 4 - panel * kLanes<T> : total - first(panel, v);
    return int(std::clamp<int64_t>(left, 0, kLanes<T>));
  }
};

// A square of the host's [N][K] (rows of stride ld) to columns of a panel [K][kPanel], or back.
template <class T>
inline void pack_panel(const T* w, int64_t ld, int64_t units, Columns<T> columns, int64_t panel, T* out) {
  constexpr int L = kLanes<T>;
  for (int v = 0; v < kPanelVectors; v++) {
    const T* from = w + columns.first(panel, v) * ld;
    int lanes = columns.lanes(panel, v);
    for (int64_t k = 0; k < units; k += L) {
      int depth = int(std::min<int64_t>(L, units - k));
      Vec<T> rows[L];
      if (depth == L && lanes == L) {
        SD_UNROLL
        for (int j = 0; j < L; j++) rows[j] = load(from + j * ld + k);
      } else {
        for (int j = 0; j < L; j++) rows[j] = j < lanes ? load_some(from + j * ld + k, depth) : Vec<T>{};
      }
      transpose<T>(rows);
      for (int j = 0; j < depth; j++) store(out + (k + j) * kPanel<T> + v * L, rows[j]);
    }
  }
}

template <class T>
inline void unpack_panel(const T* panel_rows, int64_t units, Columns<T> columns, int64_t panel, T* w, int64_t ld) {
  constexpr int L = kLanes<T>;
  for (int v = 0; v < kPanelVectors; v++) {
    T* to = w + columns.first(panel, v) * ld;
    int lanes = columns.lanes(panel, v);
    for (int64_t k = 0; k < units; k += L) {
      int depth = int(std::min<int64_t>(L, units - k));
      Vec<T> rows[L];
      for (int j = 0; j < L; j++)
        rows[j] = j < depth ? load(panel_rows + (k + j) * kPanel<T> + v * L) : Vec<T>{};
      transpose<T>(rows);
      if (depth == L && lanes == L) {
        SD_UNROLL
        for (int j = 0; j < L; j++) store(to + j * ld + k, rows[j]);
      } else {
        for (int j = 0; j < lanes; j++) store_some(to + j * ld + k, rows[j], depth);
      }
    }
  }
}

// A panel from the host's [K][N], and back: columns of a plain matrix only.
template <class T>
inline void copy_panel_in(const T* w, int64_t ld, int64_t units, Columns<T> columns, int64_t panel, T* out) {
  int64_t first = columns.first(panel, 0), width = std::min<int64_t>(kPanel<T>, columns.total - first);
  for (int64_t k = 0; k < units; k++) {
    std::memcpy(out + k * kPanel<T>, w + k * ld + first, size_t(width) * sizeof(T));
    std::fill(out + k * kPanel<T> + width, out + (k + 1) * kPanel<T>, T(0));
  }
}

template <class T>
inline void copy_panel_out(const T* panel_rows, int64_t units, Columns<T> columns, int64_t panel, T* w, int64_t ld) {
  int64_t first = columns.first(panel, 0), width = std::min<int64_t>(kPanel<T>, columns.total - first);
  for (int64_t k = 0; k < units; k++)
    std::memcpy(w + k * ld + first, panel_rows + k * kPanel<T>, size_t(width) * sizeof(T));
}

}  // namespace sd
