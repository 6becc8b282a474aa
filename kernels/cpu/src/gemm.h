// The three sparse products over all time steps, panels outside and time inside.
#pragma once

#include "operands.h"

namespace sd {

template <class T>
void pack(int threads, const T* w, int64_t ld, bool units_first, int64_t units, Columns<T> columns, T* out) {
  int64_t panels = columns.panels();
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t p = 0; p < panels; p++) {
    T* panel = out + p * panel_size<T>(units);
    if (units_first)
      copy_panel_in(w, ld, units, columns, p, panel);
    else
      pack_panel(w, ld, units, columns, p, panel);
  }
}

// The columns of a host's matrix beyond its last full panel, widened with zeros to a panel: what tiles may read.
template <class T>
class Tail {
 public:
  Tail(const sd_rows& g, const sd_steps& steps, int64_t columns, Arena& arena)
      : g_(g), steps_(steps), full_(columns / kPanel<T>), width_(int(columns % kPanel<T>)) {
    if (!width_) return;
    first_ = arena.take<int64_t>(steps.count + 1);
    first_[0] = 0;
    for (int t = 0; t < steps.count; t++) first_[t + 1] = first_[t] + steps.rows[t];
    copy_ = arena.take<T>(first_[steps.count] * kPanel<T>);
  }
  void fill(int me, int threads) {
    if (!width_) return;
    Range mine = share(steps_.count, me, threads);
    for (int64_t t = mine.begin; t < mine.end; t++)
      for (int b = 0; b < steps_.rows[t]; b++) {
        T* to = copy_ + (first_[t] + b) * kPanel<T>;
        std::memcpy(to, data() + g_.start[t] + b * g_.stride + full_ * kPanel<T>, size_t(width_) * sizeof(T));
        std::fill(to + width_, to + kPanel<T>, T(0));
      }
  }
  // Step t's rows at the columns of a panel, and their stride.
  const T* at(int64_t t, int64_t panel) const {
    return panel < full_ ? data() + g_.start[t] + panel * kPanel<T> : copy_ + first_[t] * kPanel<T>;
  }
  int64_t stride(int64_t panel) const { return panel < full_ ? g_.stride : kPanel<T>; }
  int64_t full() const { return full_; }
  int64_t panels() const { return full_ + (width_ > 0); }

 private:
  const T* data() const { return static_cast<const T*>(g_.data); }
  sd_rows g_;
  sd_steps steps_;
  int64_t full_;
  int width_;
  int64_t* first_ = nullptr;
  T* copy_ = nullptr;
};

// y_t = scale * x_t[:, kept_t] @ W[kept_t, :] + bias
template <class T>
void gemm_fp(int threads, const sd_steps& steps, const sd_rows& x, const T* w, int64_t columns, const T* bias,
             const sd_kept& kept, const sd_rows& y) {
  Arena& arena = Arena::mine();
  Lists lists(kept, steps, arena);
  T* a = arena.take<T>(lists.offset(steps.count));
  Columns<T> layout{columns, false};
  int64_t panels = layout.panels();
  T* start = arena.take<T>(panels * kPanel<T>);
  std::fill(start, start + panels * kPanel<T>, T(0));
  if (bias) std::copy(bias, bias + columns, start);
  T* edge = arena.take<T>(int64_t(steps.batch) * kPanel<T> * threads);
  T* out = static_cast<T*>(y.data);
  // Few panels: the steps are shared out too.
  int64_t chunks = std::min<int64_t>(steps.count, panels >= 8 * threads ? 1 : 4 * threads);
#pragma omp parallel num_threads(threads)
  {
    int me = omp_get_thread_num(), team = omp_get_num_threads();
    gather_all(x, steps, lists, a, me, team);
#pragma omp barrier
    Range mine = share(panels * chunks, me, team);
    for (int64_t item = mine.begin; item < mine.end; item++) {
      int64_t p = item / chunks, width = std::min<int64_t>(kPanel<T>, columns - p * kPanel<T>);
      Range some = share(steps.count, int(item % chunks), int(chunks));
      for (int64_t t = some.begin; t < some.end; t++) {
        T* c = out + y.start[t] + p * kPanel<T>;
        T* to = width == kPanel<T> ? c : edge + int64_t(me) * steps.batch * kPanel<T>;
        int64_t ldc = width == kPanel<T> ? y.stride : kPanel<T>;
        forward_panel(a + lists.offset(t), steps.rows[t], w + p * panel_size<T>(kept.size), lists.at(t), lists.count(t),
                      start + p * kPanel<T>, to, ldc);
        if (to != c)
          for (int b = 0; b < steps.rows[t]; b++)
            std::memcpy(c + b * y.stride, to + b * kPanel<T>, size_t(width) * sizeof(T));
      }
    }
  }
}

// dx_t[:, kept_t] = scale * dy_t @ W[kept_t, :].T, zero elsewhere
template <class T>
void gemm_bp(int threads, const sd_steps& steps, const sd_rows& dy, const T* w, int64_t columns, const sd_kept& kept,
             const sd_rows& dx) {
  Arena& arena = Arena::mine();
  Lists lists(kept, steps, arena);
  Tail<T> g(dy, steps, columns, arena);
  T* out = static_cast<T*>(dx.data);
  int64_t panel_stride = panel_size<T>(kept.size);
#pragma omp parallel num_threads(threads)
  {
    int me = omp_get_thread_num(), team = omp_get_num_threads();
    zero_rows<T>(dx, steps, kept.size, me, team);
    g.fill(me, team);
#pragma omp barrier
    for (int64_t p = 0; p < g.panels();) {
      // The widened panel has a stride of its own, so it is a block of its own.
      int64_t size = p < g.full() ? std::min<int64_t>(kDotPanels<T>, g.full() - p) : 1;
      for (int64_t t = 0; t < steps.count; t++) {
        int64_t groups = (lists.count(t) + kDotUnits - 1) / kDotUnits;
        Range mine = share(groups, me, team);
        Range units{mine.begin * kDotUnits, std::min<int64_t>(mine.end * kDotUnits, lists.count(t))};
        backward_block(w + p * panel_stride, panel_stride, int(size), g.at(t, p),
                       GradStrides{kPanel<T>, g.stride(p)}, steps.rows[t], lists.at(t), units, T(lists.scale), out + dx.start[t], dx.stride);
      }
      p += size;
    }
  }
}

// Adds one panel of a weight gradient over all steps. g_at(t): step t's rows at that panel, of stride ldg.
template <class T, class F>
void grad_over_steps(const sd_steps& steps, const Lists& lists, const T* a, int64_t ldg, F&& g_at,
                     GradBlock<T>* blocks, T* panel) {
  for (int t = 0; t < steps.count; t++) blocks[t] = {a + lists.offset(t), g_at(t), steps.rows[t]};
  if (lists.uniform) {
    if (steps.count) grad_panel(blocks, steps.count, ldg, lists.at(0), lists.count(0), panel);
    return;
  }
  for (int t = 0; t < steps.count; t++) grad_panel(blocks + t, 1, ldg, lists.at(t), lists.count(t), panel);
}

// dW[kept_t, :] += scale * x_t[:, kept_t].T @ dy_t, written as the host's [N][K]
template <class T>
void gemm_wg(int threads, const sd_steps& steps, const sd_rows& x, const sd_rows& dy, int64_t columns,
             const sd_kept& kept, T* dw) {
  Arena& arena = Arena::mine();
  Lists lists(kept, steps, arena);
  T* a = arena.take<T>(lists.offset(steps.count));
  Columns<T> layout{columns, false};
  int64_t* first = arena.take<int64_t>(steps.count + 1);
  first[0] = 0;
  for (int t = 0; t < steps.count; t++) first[t + 1] = first[t] + steps.rows[t];
  int64_t panel_room = panel_size<T>(kept.size), rows_room = first[steps.count] * kPanel<T>;
  T* rooms = arena.take<T>((panel_room + rows_room) * threads);
  GradBlock<T>* blocks = arena.take<GradBlock<T>>(int64_t(steps.count) * threads);
  const T* g = static_cast<const T*>(dy.data);
#pragma omp parallel num_threads(threads)
  {
    int me = omp_get_thread_num(), team = omp_get_num_threads();
    gather_all(x, steps, lists, a, me, team);
#pragma omp barrier
    T *panel = rooms + me * (panel_room + rows_room), *rows = panel + panel_room;
    Range mine = share(layout.panels(), me, team);
    for (int64_t p = mine.begin; p < mine.end; p++) {
      // This panel's columns of all rows, side by side: they are visited once per few units, and rows far apart
      // would compete for the same sets of the cache.
      int width = int(std::min<int64_t>(kPanel<T>, columns - p * kPanel<T>));
      if (width < kPanel<T>) std::fill(rows, rows + rows_room, T(0));
      for (int t = 0; t < steps.count; t++)
        for (int b = 0; b < steps.rows[t]; b++)
          std::memcpy(rows + (first[t] + b) * kPanel<T>, g + dy.start[t] + b * dy.stride + p * kPanel<T>,
                      size_t(width) * sizeof(T));
      std::fill(panel, panel + panel_room, T(0));
      grad_over_steps(
          steps, lists, a, kPanel<T>, [&](int t) { return rows + first[t] * kPanel<T>; },
          blocks + int64_t(me) * steps.count, panel);
      unpack_panel(panel, kept.size, layout, p, dw, kept.size);
    }
  }
}

}  // namespace sd
