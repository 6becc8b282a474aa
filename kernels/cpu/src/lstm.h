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
  sd_kept kept_input, kept_recurrent;
  const void* mask;     // [count][batch][hidden] multiplier of h_{t-1} beside kept_recurrent, or null
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
  sd_rows dgates;         // 4 hidden columns, of the gates' pre-activations; data null: not wanted
};
}

namespace sd {

template <class T>
class Layer {
 public:
  static constexpr int L = kLanes<T>;

  Layer(const sd_lstm& call, Arena& arena)
      : call(call), input_lists(call.kept_input, call.steps, arena), recurrent_lists(call.kept_recurrent, call.steps, arena),
        columns{4 * int64_t(call.hidden), true}, panels(columns.panels()), padded(panels * L) {
    first_row_ = arena.take<int64_t>(call.steps.count + 1);
    first_row_[0] = 0;
    for (int t = 0; t < call.steps.count; t++) first_row_[t + 1] = first_row_[t] + call.steps.rows[t];
    rows = first_row_[call.steps.count];
  }

  int count() const { return call.steps.count; }
  int rows_at(int t) const { return call.steps.rows[t]; }
  // Time steps in the order in which they are run.
  int step(int i) const { return call.reverse ? count() - 1 - i : i; }
  int64_t cell(int t, int b) const { return first_row_[t] + b; }
  int units_of(int64_t p) const { return columns.lanes(p, 0); }

  T* gates(int64_t p, int t) const { return static_cast<T*>(call.gates) + (p * padded_rows<T>(rows) + first_row_[t]) * kPanel<T>; }
  T* cells(int t, int b) const { return static_cast<T*>(call.cells) + cell(t, b) * padded; }
  T* operand(int t) const { return static_cast<T*>(call.operand) + recurrent_lists.offset(t); }

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

  // State and running gradients of a sequence, [batch][padded] each.
  T* take_state(Arena& arena) const { return arena.take<T>(call.steps.batch * padded); }
  void load_states(const void* h0, const void* c0, int64_t p, T* h, T* c) const;
  void store_states(const T* h, const T* c, int64_t p, void* h_n, void* c_n) const;

  void write_operand(int t, int64_t p, const T* h) const;
  void input_product(int t, int64_t p, const T* x, const T* start) const;
  void recurrent_product(int t, int64_t p) const;
  void activate(int i, int64_t p, T* h, T* c, T* y, int64_t y_stride) const;

  void gate_gradients(int i, int64_t p, const T* dy, int64_t dy_stride, T* dgates, T* dh, T* dc, T* dbias) const;
  void through_product(const void* w, int64_t units, const Lists& lists, Range some, int t, const T* dgates, T* out,
                       int64_t ldo, int me, int team) const;
  void weight_gradient(const Lists& lists, const T* a, int64_t units, const T* dgates, GradBlock<T>* blocks, T* panel,
                       Range mine, void* dw) const;
  void mask_gradient(const void* mask, int t, int64_t p, T* d) const;
  void store_bias_gradient(const T* dbias, Range mine, void* to) const;
  void store_gate_gradients(const T* dgates, Range mine, const sd_rows& to) const;

  // Positions of step t's units in a list that lie in [first, last).
  static Range part(const Lists& lists, int t, int64_t first, int64_t last) {
    const int32_t *list = lists.at(t), *end = list + lists.count(t);
    return {std::lower_bound(list, end, int32_t(first)) - list, std::lower_bound(list, end, int32_t(last)) - list};
  }

  const sd_lstm& call;
  Lists input_lists, recurrent_lists;
  Columns<T> columns;
  int64_t panels, padded, rows;

 private:
  int64_t* first_row_;
};

template <class T>
void Layer<T>::load_states(const void* h0, const void* c0, int64_t p, T* h, T* c) const {
  for (int b = 0; b < call.steps.batch; b++) {
    store(h + b * padded + p * L, load_state(h0, b, p));
    store(c + b * padded + p * L, load_state(c0, b, p));
  }
}

template <class T>
void Layer<T>::store_states(const T* h, const T* c, int64_t p, void* h_n, void* c_n) const {
  for (int b = 0; b < call.steps.batch; b++) {
    store_state(h_n, b, p, load(h + b * padded + p * L));
    store_state(c_n, b, p, load(c + b * padded + p * L));
  }
}

// Units [first, last) of [batch][stride] as the operand of a product at step t; `offset` is what the list adds to a unit.
// factor: multiplier [batch][factor_stride] by unit, or null for the list's scale.
template <class T>
inline void write_units(const Lists& lists, int t, int64_t first, int64_t last, int64_t offset, int rows, const T* from,
                        int64_t stride, const T* factor, int64_t factor_stride, T* to) {
  Range found = Layer<T>::part(lists, t, first + offset, last + offset);
  for (int64_t i = found.begin; i < found.end; i++) {
    int64_t unit = lists.at(t)[i] - offset;
    for (int b = 0; b < rows; b++)
      to[i * rows + b] = from[b * stride + unit] * (factor ? factor[b * factor_stride + unit] : T(lists.scale));
  }
}

// This panel's units of the recurrent product's operand at step t, from h [batch][padded].
template <class T>
void Layer<T>::write_operand(int t, int64_t p, const T* h) const {
  const T* mask = static_cast<const T*>(call.mask);
  if (mask) mask += int64_t(t) * call.steps.batch * call.hidden;
  write_units(recurrent_lists, t, p * L, (p + 1) * L, 0, rows_at(t), h, padded, mask, call.hidden, operand(t));
}

// x: the compact operand of all steps. start: the bias.
template <class T>
void Layer<T>::input_product(int t, int64_t p, const T* x, const T* start) const {
  forward_panel(x + input_lists.offset(t), rows_at(t), static_cast<const T*>(call.w) + p * panel_size<T>(call.inputs),
                input_lists.at(t), input_lists.count(t), start, gates(p, t), kPanel<T>);
}

template <class T>
void Layer<T>::recurrent_product(int t, int64_t p) const {
  forward_panel<T>(operand(t), rows_at(t), static_cast<const T*>(call.u) + p * panel_size<T>(call.hidden),
                   recurrent_lists.at(t), recurrent_lists.count(t), nullptr, gates(p, t), kPanel<T>);
}

// Gates of the i-th step run, from pre-activations in place; then c_t and h_t, also to y (rows of that step) unless null.
template <class T>
void Layer<T>::activate(int i, int64_t p, T* h, T* c, T* y, int64_t y_stride) const {
  int t = step(i);
  T* g = gates(p, t);
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
    if (!y) continue;
    if (units_of(p) == L)
      store(y + b * y_stride + p * L, h_t);
    else
      store_some(y + b * y_stride + p * L, h_t, units_of(p));
  }
}

// Gradients of the i-th step's pre-activations, and of c_{t-1} in dc; takes dh and leaves zeros there. dy: rows of that
// step.
template <class T>
void Layer<T>::gate_gradients(int i, int64_t p, const T* dy, int64_t dy_stride, T* dgates, T* dh, T* dc,
                              T* dbias) const {
  int t = step(i);
  const T* g = gates(p, t);
  T* d = dgates + (p * padded_rows<T>(rows) + first_row_[t]) * kPanel<T>;
  Vec<T> sums[kPanelVectors];
  for (int v = 0; v < kPanelVectors; v++) sums[v] = load(dbias + p * kPanel<T> + v * L);
  for (int b = 0; b < rows_at(t); b++, g += kPanel<T>, d += kPanel<T>) {
    T *dh_b = dh + b * padded + p * L, *dc_b = dc + b * padded + p * L;
    const T* dy_b = dy + b * dy_stride + p * L;
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

// out[b][unit] += scale * dgates_t @ W[unit, :].T for this thread's share of the positions `some` of step t's list.
template <class T>
void Layer<T>::through_product(const void* w, int64_t units, const Lists& lists, Range some, int t, const T* dgates,
                               T* out, int64_t ldo, int me, int team) const {
  Range mine = share((some.end - some.begin + kDotUnits - 1) / kDotUnits, me, team);
  Range kept{some.begin + mine.begin * kDotUnits, std::min<int64_t>(some.begin + mine.end * kDotUnits, some.end)};
  in_parts(int(panels), kDotPanels<T>, [&](int p, int size) {
    backward_block(static_cast<const T*>(w) + p * panel_size<T>(units), panel_size<T>(units), size,
                   dgates + (p * padded_rows<T>(rows) + first_row_[t]) * kPanel<T>,
                   GradStrides{panel_size<T>(rows), kPanel<T>}, rows_at(t), lists.at(t), kept, T(lists.scale), out,
                   ldo);
  });
}

// The gradient [batch][padded] of an operand that was multiplied by `mask` [count][batch][hidden], made that of what
// was multiplied.
template <class T>
void Layer<T>::mask_gradient(const void* mask, int t, int64_t p, T* d) const {
  const T* factors = static_cast<const T*>(mask) + int64_t(t) * call.steps.batch * call.hidden;
  for (int b = 0; b < rows_at(t); b++) {
    T* d_b = d + b * padded + p * L;
    store(d_b, Vec<T>(load(d_b) * load_state(factors, b, p)));
  }
}

template <class T>
void Layer<T>::weight_gradient(const Lists& lists, const T* a, int64_t units, const T* dgates, GradBlock<T>* blocks,
                               T* panel, Range mine, void* dw) const {
  for (int64_t p = mine.begin; p < mine.end; p++) {
    std::fill(panel, panel + units * kPanel<T>, T(0));
    grad_over_steps(
        call.steps, lists, a, kPanel<T>,
        [&](int t) { return dgates + (p * padded_rows<T>(rows) + first_row_[t]) * kPanel<T>; }, blocks, panel);
    unpack_panel(panel, units, columns, p, static_cast<T*>(dw), units);
  }
}

template <class T>
void Layer<T>::store_bias_gradient(const T* dbias, Range mine, void* to) const {
  for (int64_t p = mine.begin; p < mine.end; p++)
    for (int v = 0; v < kPanelVectors; v++)
      store_some(static_cast<T*>(to) + columns.first(p, v), load(dbias + p * kPanel<T> + v * L), units_of(p));
}

template <class T>
void Layer<T>::store_gate_gradients(const T* dgates, Range mine, const sd_rows& to) const {
  for (int64_t p = mine.begin; p < mine.end; p++)
    for (int t = 0; t < count(); t++) {
      const T* from = dgates + (p * padded_rows<T>(rows) + first_row_[t]) * kPanel<T>;
      for (int b = 0; b < rows_at(t); b++, from += kPanel<T>)
        for (int v = 0; v < kPanelVectors; v++)
          store_some(static_cast<T*>(to.data) + to.start[t] + b * to.stride + columns.first(p, v), load(from + v * L),
                     units_of(p));
    }
}

template <class T>
T* take_zeros(Arena& arena, int64_t count) {
  T* zeros = arena.take<T>(count);
  std::fill(zeros, zeros + count, T(0));
  return zeros;
}

template <class T>
void lstm_forward(int threads, const sd_lstm& call, const sd_lstm_out& out) {
  Arena& arena = Arena::mine();
  const Layer<T> layer(call, arena);
  const int count = layer.count();
  T *x = arena.take<T>(layer.input_lists.offset(count)), *h = layer.take_state(arena), *c = layer.take_state(arena);
  const T* no_bias = take_zeros<T>(arena, kPanel<T>);
#pragma omp parallel num_threads(threads)
  {
    int me = omp_get_thread_num(), team = omp_get_num_threads();
    Range mine = share(layer.panels, me, team);
    gather_all(call.x, call.steps, layer.input_lists, x, me, team);
    for (int64_t p = mine.begin; p < mine.end; p++) {
      layer.load_states(call.h0, call.c0, p, h, c);
      if (count) layer.write_operand(layer.step(0), p, h);
    }
#pragma omp barrier
    for (int64_t p = mine.begin; p < mine.end; p++)
      for (int t = 0; t < count; t++)
        layer.input_product(t, p, x, call.bias ? static_cast<const T*>(call.bias) + p * kPanel<T> : no_bias);
    for (int i = 0; i < count; i++) {
      int t = layer.step(i);
      T* y = static_cast<T*>(out.y.data) + out.y.start[t];
      for (int64_t p = mine.begin; p < mine.end; p++) {
        layer.recurrent_product(t, p);
        layer.activate(i, p, h, c, y, out.y.stride);
        if (i + 1 < count) layer.write_operand(layer.step(i + 1), p, h);
      }
#pragma omp barrier
    }
    for (int64_t p = mine.begin; p < mine.end; p++) layer.store_states(h, c, p, out.h_n, out.c_n);
  }
}

template <class T>
void lstm_backward(int threads, const sd_lstm& call, const sd_lstm_grad& grad) {
  Arena& arena = Arena::mine();
  const Layer<T> layer(call, arena);
  const int count = layer.count();
  T* x = arena.take<T>(grad.dw ? layer.input_lists.offset(count) : 0);
  T* dgates = arena.take<T>(layer.panels * panel_size<T>(layer.rows));
  T *dh = layer.take_state(arena), *dc = layer.take_state(arena);
  T* dbias = take_zeros<T>(arena, layer.panels * kPanel<T>);
  int64_t room = std::max(call.inputs, call.hidden) * int64_t(kPanel<T>);
  T* rooms = arena.take<T>(room * threads);
  GradBlock<T>* all_blocks = arena.take<GradBlock<T>>(int64_t(count) * threads);
#pragma omp parallel num_threads(threads)
  {
    int me = omp_get_thread_num(), team = omp_get_num_threads();
    Range mine = share(layer.panels, me, team);
    if (grad.dw) gather_all(call.x, call.steps, layer.input_lists, x, me, team);
    if (grad.dx.data) zero_rows<T>(grad.dx, call.steps, call.inputs, me, team);
    for (int64_t p = mine.begin; p < mine.end; p++) layer.load_states(grad.dh_n, grad.dc_n, p, dh, dc);
#pragma omp barrier
    for (int i = count - 1; i >= 0; i--) {
      int t = layer.step(i);
      const T* dy = static_cast<const T*>(grad.dy.data) + grad.dy.start[t];
      for (int64_t p = mine.begin; p < mine.end; p++)
        layer.gate_gradients(i, p, dy, grad.dy.stride, dgates, dh, dc, dbias);
#pragma omp barrier
      layer.through_product(call.u, call.hidden, layer.recurrent_lists, {0, layer.recurrent_lists.count(t)}, t, dgates,
                            dh, layer.padded, me, team);
#pragma omp barrier
      if (call.mask)
        for (int64_t p = mine.begin; p < mine.end; p++) layer.mask_gradient(call.mask, t, p, dh);
    }
    for (int64_t p = mine.begin; p < mine.end; p++) layer.store_states(dh, dc, p, grad.dh0, grad.dc0);
    if (grad.dx.data)
      for (int t = 0; t < count; t++)
        layer.through_product(call.w, call.inputs, layer.input_lists, {0, layer.input_lists.count(t)}, t, dgates,
                              static_cast<T*>(grad.dx.data) + grad.dx.start[t], grad.dx.stride, me, team);
    GradBlock<T>* blocks = all_blocks + int64_t(me) * count;
    T* panel = rooms + me * room;
    if (grad.dw) layer.weight_gradient(layer.input_lists, x, call.inputs, dgates, blocks, panel, mine, grad.dw);
    if (grad.du)
      layer.weight_gradient(layer.recurrent_lists, static_cast<const T*>(call.operand), call.hidden, dgates, blocks,
                            panel, mine, grad.du);
    if (grad.dbias) layer.store_bias_gradient(dbias, mine, grad.dbias);
    if (grad.dgates.data) layer.store_gate_gradients(dgates, mine, grad.dgates);
  }
}

}  // namespace sd
