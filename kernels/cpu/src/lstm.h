// One LSTM layer, one direction, over a sequence: one team of threads per call, barriers between time steps.
//
// A thread owns whole panels, that is, all four gates of some hidden units, so that the state of those units never
// leaves it; threads meet only where a product needs every unit of h_{t-1} (forward) or every gate (backward).
#pragma once

#include "gemm.h"

extern "C" {
struct sd_lstm {
  sd_steps steps;
  int32_t inputs, hidden, reverse;
  const void *w, *u, *bias;  // packed; bias null: none
  sd_rows x;
  sd_kept kept_x, kept_h;
  const void* mask;     // [count][batch][hidden] multiplier of h_{t-1} beside kept_h, or null
  const void *h0, *c0;  // [batch][hidden]
  // Kept for the backward call. gates: [panels][padded rows of all steps][panel], after their non-linearities; cells:
  // [rows][padded hidden] c_t; operand: [kept][rows] of each step, the dropped h_{t-1}.
  void *gates, *cells, *operand;
};
struct sd_lstm_out {
  sd_rows y;
  void *h_n, *c_n;  // [batch][hidden]
};
struct sd_lstm_grad {
  sd_rows dy;
  const void *dh_n, *dc_n;
  sd_rows dx;           // data null: not wanted
  void *dh0, *dc0;      // [batch][hidden]
  void *dw, *du, *dbias;  // [4 hidden][inputs], [4 hidden][hidden], [4 hidden]; null: not wanted
};
}

namespace sd {

template <class T>
class Layer {
 public:
  static constexpr int L = kLanes<T>;

  Layer(const sd_lstm& call, int threads)
      : call(call), arena_(Arena::mine()), threads_(threads), x_lists(call.kept_x, call.steps, arena_),
        h_lists(call.kept_h, call.steps, arena_), columns{4 * int64_t(call.hidden), true} {
    panels = columns.panels();
    padded = panels * L;
    first_row_ = arena_.take<int64_t>(call.steps.count + 1);
    first_row_[0] = 0;
    for (int t = 0; t < call.steps.count; t++) first_row_[t + 1] = first_row_[t] + call.steps.rows[t];
    rows = first_row_[call.steps.count];
  }

  void forward(const sd_lstm_out& out);
  void backward(const sd_lstm_grad& grad);

 private:
  int count() const { return call.steps.count; }
  int rows_at(int t) const { return call.steps.rows[t]; }
  // Time steps in the order in which they are run.
  int step(int i) const { return call.reverse ? count() - 1 - i : i; }
  int64_t cell(int t, int b) const { return first_row_[t] + b; }
  int units_of(int64_t p) const { return columns.lanes(p, 0); }

  T* gates(int64_t p, int t) const { return static_cast<T*>(call.gates) + (p * padded_rows<T>(rows) + first_row_[t]) * kPanel<T>; }
  T* cells(int t, int b) const { return static_cast<T*>(call.cells) + cell(t, b) * padded; }
  T* operand(int t) const { return static_cast<T*>(call.operand) + h_lists.offset(t); }

  Vec<T> load_state(const void* state, int b, int64_t p) const {
    const T* from = static_cast<const T*>(state) + int64_t(b) * call.hidden + p * L;
    return units_of(p) == L ? load(from) : load_some(from, units_of(p));
  }
  void store_state(void* state, int b, int64_t p, Vec<T> v) const {
    T* to = static_cast<T*>(state) + int64_t(b) * call.hidden + p * L;
    units_of(p) == L ? store(to, v) : store_some(to, v, units_of(p));
  }
  // c_{t-1} of the i-th step run.
  Vec<T> cell_before(int i, int b, int64_t p) const {
    return i > 0 && b < rows_at(step(i - 1)) ? load(cells(step(i - 1), b) + p * L) : load_state(call.c0, b, p);
  }

  void write_operand(int t, int64_t p, const T* h);
  void activate(int i, int64_t p, T* h, T* c, const sd_rows& y);
  void gate_gradients(int i, int64_t p, const sd_rows& dy, T* dgates, T* dh, T* dc, T* dbias);
  void backward_through_time(const sd_lstm_grad& grad, T* dgates, T* dh, T* dc, T* dbias, int me, int team);
  void through_product(const void* w, int64_t units, const Lists& lists, int t, const T* dgates, T* out, int64_t ldo,
                       int me, int team) const;
  void weight_gradient(const Lists& lists, const T* a, int64_t units, const T* dgates, GradBlock<T>* blocks, T* panel,
                       Range mine, void* dw) const;

  const sd_lstm& call;
  Arena& arena_;
  int threads_;
  Lists x_lists, h_lists;
  Columns<T> columns;
  int64_t panels, padded, rows;
  int64_t* first_row_;
};

// This panel's units of the product's operand at step t, from h [batch][padded].
template <class T>
void Layer<T>::write_operand(int t, int64_t p, const T* h) {
  const int32_t *list = h_lists.at(t), *end = list + h_lists.count(t);
  const T* mask = static_cast<const T*>(call.mask);
  int n = rows_at(t);
  for (const int32_t* i = std::lower_bound(list, end, int32_t(p * L)); i < end && *i < (p + 1) * L; i++) {
    T* to = operand(t) + (i - list) * n;
    const T* factor = mask ? mask + int64_t(t) * call.steps.batch * call.hidden + *i : nullptr;
    for (int b = 0; b < n; b++)
      to[b] = h[b * padded + *i] * (factor ? factor[int64_t(b) * call.hidden] : T(h_lists.scale));
  }
}

// Gates of the i-th step run, from pre-activations in place; then c_t and h_t.
template <class T>
void Layer<T>::activate(int i, int64_t p, T* h, T* c, const sd_rows& y) {
  int t = step(i);
  T* g = gates(p, t);
  T* y_t = static_cast<T*>(y.data) + y.start[t] + p * L;
  for (int b = 0; b < rows_at(t); b++, g += kPanel<T>) {
    Vec<T> in = sigmoid<T>(load(g)), forget = sigmoid<T>(load(g + L)), cell = tanh<T>(load(g + 2 * L)),
           out = sigmoid<T>(load(g + 3 * L));
    Vec<T> c_t = forget * load(c + b * padded + p * L) + in * cell;
    Vec<T> h_t = out * tanh<T>(c_t);
    store(g, in);
    store(g + L, forget);
    store(g + 2 * L, cell);
    store(g + 3 * L, out);
    store(c + b * padded + p * L, c_t);
    store(cells(t, b) + p * L, c_t);
    store(h + b * padded + p * L, h_t);
    if (units_of(p) == L)
      store(y_t + b * y.stride, h_t);
    else
      store_some(y_t + b * y.stride, h_t, units_of(p));
  }
}

template <class T>
void Layer<T>::forward(const sd_lstm_out& out) {
  T* x = arena_.take<T>(x_lists.offset(count()));
  T* h = arena_.take<T>(call.steps.batch * padded);
  T* c = arena_.take<T>(call.steps.batch * padded);
  T* no_bias = arena_.take<T>(kPanel<T>);
  std::fill(no_bias, no_bias + kPanel<T>, T(0));
  const T *w = static_cast<const T*>(call.w), *u = static_cast<const T*>(call.u);
#pragma omp parallel num_threads(threads_)
  {
    int me = omp_get_thread_num(), team = omp_get_num_threads();
    Range mine = share(panels, me, team);
    gather_all(call.x, call.steps, x_lists, x, me, team);
    for (int64_t p = mine.begin; p < mine.end; p++) {
      for (int b = 0; b < call.steps.batch; b++) {
        store(h + b * padded + p * L, load_state(call.h0, b, p));
        store(c + b * padded + p * L, load_state(call.c0, b, p));
      }
      if (count()) write_operand(step(0), p, h);
    }
#pragma omp barrier
    for (int64_t p = mine.begin; p < mine.end; p++) {
      const T* start = call.bias ? static_cast<const T*>(call.bias) + p * kPanel<T> : no_bias;
      for (int t = 0; t < count(); t++)
        forward_panel(x + x_lists.offset(t), rows_at(t), w + p * panel_size<T>(call.inputs), x_lists.at(t),
                      x_lists.count(t), start, gates(p, t), kPanel<T>);
    }
    for (int i = 0; i < count(); i++) {
      int t = step(i);
      for (int64_t p = mine.begin; p < mine.end; p++) {
        forward_panel<T>(operand(t), rows_at(t), u + p * panel_size<T>(call.hidden), h_lists.at(t), h_lists.count(t),
                         nullptr, gates(p, t), kPanel<T>);
        activate(i, p, h, c, out.y);
        if (i + 1 < count()) write_operand(step(i + 1), p, h);
      }
#pragma omp barrier
    }
    for (int64_t p = mine.begin; p < mine.end; p++)
      for (int b = 0; b < call.steps.batch; b++) {
        store_state(out.h_n, b, p, load(h + b * padded + p * L));
        store_state(out.c_n, b, p, load(c + b * padded + p * L));
      }
  }
}

// Gradients of the i-th step's pre-activations, and of c_{t-1} in dc; takes dh and leaves zeros there.
template <class T>
void Layer<T>::gate_gradients(int i, int64_t p, const sd_rows& dy, T* dgates, T* dh, T* dc, T* dbias) {
  int t = step(i);
  const T *g = gates(p, t), *dy_t = static_cast<const T*>(dy.data) + dy.start[t] + p * L;
  T* d = dgates + (p * padded_rows<T>(rows) + first_row_[t]) * kPanel<T>;
  Vec<T> sums[kPanelVectors];
  for (int v = 0; v < kPanelVectors; v++) sums[v] = load(dbias + p * kPanel<T> + v * L);
  for (int b = 0; b < rows_at(t); b++, g += kPanel<T>, d += kPanel<T>) {
    T *dh_b = dh + b * padded + p * L, *dc_b = dc + b * padded + p * L;
    const T* dy_b = dy_t + b * dy.stride;
    Vec<T> in = load(g), forget = load(g + L), cell = load(g + 2 * L), out = load(g + 3 * L);
    Vec<T> tanh_c = tanh<T>(load(cells(t, b) + p * L));
    Vec<T> dh_t = load(dh_b) + (units_of(p) == L ? load(dy_b) : load_some(dy_b, units_of(p)));
    Vec<T> dc_t = load(dc_b) + dh_t * out * (T(1) - tanh_c * tanh_c);
    Vec<T> parts[kPanelVectors] = {
        dc_t * cell * in * (T(1) - in),
        dc_t * cell_before(i, b, p) * forget * (T(1) - forget),
        dc_t * in * (T(1) - cell * cell),
        dh_t * tanh_c * out * (T(1) - out),
    };
    SD_UNROLL
    for (int v = 0; v < kPanelVectors; v++) {
      store(d + v * L, parts[v]);
      sums[v] += parts[v];
    }
    store(dc_b, Vec<T>(dc_t * forget));
    store(dh_b, Vec<T>{});
  }
  for (int v = 0; v < kPanelVectors; v++) store(dbias + p * kPanel<T> + v * L, sums[v]);
}

// out[b][unit] += scale * dgates_t @ W[unit, :].T for this thread's share of step t's kept units.
template <class T>
void Layer<T>::through_product(const void* w, int64_t units, const Lists& lists, int t, const T* dgates, T* out,
                               int64_t ldo, int me, int team) const {
  Range mine = share((lists.count(t) + kDotUnits - 1) / kDotUnits, me, team);
  Range kept{mine.begin * kDotUnits, std::min<int64_t>(mine.end * kDotUnits, lists.count(t))};
  in_parts(int(panels), kDotPanels<T>, [&](int p, int size) {
    backward_block(static_cast<const T*>(w) + p * panel_size<T>(units), panel_size<T>(units), size,
                   dgates + (p * padded_rows<T>(rows) + first_row_[t]) * kPanel<T>, GradStrides{panel_size<T>(rows), kPanel<T>},
                   rows_at(t), lists.at(t), kept, T(lists.scale), out, ldo);
  });
}

template <class T>
void Layer<T>::backward_through_time(const sd_lstm_grad& grad, T* dgates, T* dh, T* dc, T* dbias, int me, int team) {
  Range mine = share(panels, me, team);
  for (int64_t p = mine.begin; p < mine.end; p++) {
    for (int b = 0; b < call.steps.batch; b++) {
      store(dh + b * padded + p * L, load_state(grad.dh_n, b, p));
      store(dc + b * padded + p * L, load_state(grad.dc_n, b, p));
    }
    std::fill(dbias + p * kPanel<T>, dbias + (p + 1) * kPanel<T>, T(0));
  }
  const T* mask = static_cast<const T*>(call.mask);
  for (int i = count() - 1; i >= 0; i--) {
    int t = step(i);
    for (int64_t p = mine.begin; p < mine.end; p++) gate_gradients(i, p, grad.dy, dgates, dh, dc, dbias);
#pragma omp barrier
    through_product(call.u, call.hidden, h_lists, t, dgates, dh, padded, me, team);
#pragma omp barrier
    if (!mask) continue;
    for (int64_t p = mine.begin; p < mine.end; p++)
      for (int b = 0; b < rows_at(t); b++) {
        T* dh_b = dh + b * padded + p * L;
        store(dh_b, Vec<T>(load(dh_b) * load_state(mask + int64_t(t) * call.steps.batch * call.hidden, b, p)));
      }
  }
  for (int64_t p = mine.begin; p < mine.end; p++)
    for (int b = 0; b < call.steps.batch; b++) {
      store_state(grad.dh0, b, p, load(dh + b * padded + p * L));
      store_state(grad.dc0, b, p, load(dc + b * padded + p * L));
    }
}

template <class T>
void Layer<T>::weight_gradient(const Lists& lists, const T* a, int64_t units, const T* dgates, GradBlock<T>* blocks,
                               T* panel, Range mine, void* dw) const {
  for (int64_t p = mine.begin; p < mine.end; p++) {
    std::fill(panel, panel + units * kPanel<T>, T(0));
    grad_over_steps(
        call.steps, lists, a, kPanel<T>, [&](int t) { return dgates + (p * padded_rows<T>(rows) + first_row_[t]) * kPanel<T>; },
        blocks, panel);
    unpack_panel(panel, units, columns, p, static_cast<T*>(dw), units);
  }
}

template <class T>
void Layer<T>::backward(const sd_lstm_grad& grad) {
  T* x = arena_.take<T>(grad.dw ? x_lists.offset(count()) : 0);
  T* dgates = arena_.take<T>(panels * panel_size<T>(rows));
  T* dh = arena_.take<T>(call.steps.batch * padded);
  T* dc = arena_.take<T>(call.steps.batch * padded);
  T* dbias = arena_.take<T>(panels * kPanel<T>);
  int64_t room = std::max(call.inputs, call.hidden) * int64_t(kPanel<T>);
  T* rooms = arena_.take<T>(room * threads_);
  GradBlock<T>* all_blocks = arena_.take<GradBlock<T>>(int64_t(count()) * threads_);
#pragma omp parallel num_threads(threads_)
  {
    int me = omp_get_thread_num(), team = omp_get_num_threads();
    Range mine = share(panels, me, team);
    if (grad.dw) gather_all(call.x, call.steps, x_lists, x, me, team);
    if (grad.dx.data) zero_rows<T>(grad.dx, call.steps, call.inputs, me, team);
#pragma omp barrier
    backward_through_time(grad, dgates, dh, dc, dbias, me, team);
    if (grad.dx.data)
      for (int t = 0; t < count(); t++)
        through_product(call.w, call.inputs, x_lists, t, dgates, static_cast<T*>(grad.dx.data) + grad.dx.start[t],
                        grad.dx.stride, me, team);
    GradBlock<T>* blocks = all_blocks + int64_t(me) * count();
    T* panel = rooms + me * room;
    if (grad.dw) weight_gradient(x_lists, x, call.inputs, dgates, blocks, panel, mine, grad.dw);
    if (grad.du)
      weight_gradient(h_lists, static_cast<const T*>(call.operand), call.hidden, dgates, blocks, panel, mine, grad.du);
    if (grad.dbias)
      for (int64_t p = mine.begin; p < mine.end; p++)
        for (int v = 0; v < kPanelVectors; v++)
          store_some(static_cast<T*>(grad.dbias) + columns.first(p, v), load(dbias + p * kPanel<T> + v * L),
                     units_of(p));
  }
}

}  // namespace sd
