// An input-feeding decoder over a whole target sequence: stacked LSTM cells, Luong attention (dot or general) over the
// source, and the attention's output, dropped, fed back into the first cell. One team of threads per call; what does
// not depend on the previous step (the embedding's product, all weight gradients) is done for all steps at once.
#pragma once

#include <cmath>
#include <memory>

#include "lstm.h"

extern "C" {
struct sd_decoder {
  sd_steps steps;                     // every step has all rows
  int32_t layers, embed, hidden, source;
  const void *const *w, *const *u, *const *bias;  // packed, of each layer; a layer's bias may be null
  const void *w_in, *w_out;           // packed [hidden][hidden] (null: dot) and [2 hidden: context, query][hidden]
  sd_rows emb;
  const sd_kept *kept_input;          // input of each layer; the first's: embed + hidden units, embedding and feed
  const sd_kept *kept_recurrent;      // h_{t-1} of each layer
  sd_kept kept_query, kept_out;       // of the last layer's output; of the decoder's
  // Multipliers [count][batch][hidden] beside lists of all units, or null: of h_{t-1} of each layer, of each layer's
  // output but the last's, and of the two above.
  const void *const *mask_h, *const *mask_between;
  const void *mask_query, *mask_out;
  const void* memory;                 // [batch][source][hidden]
  const int32_t* lengths;             // [batch]
  const void *h0, *c0;                // [layers][batch][hidden]
  const void* feed0;                  // [batch][hidden]
  // Kept for the backward call: of each layer as in sd_lstm, and the compact operand of its input product.
  void *const *gates, *const *cells, *const *operand, *const *input;
  void* query;                        // compact, as the list kept_query says
  void *scored;                       // [count][batch][hidden] what was multiplied with the memory: query, or query @ w_in
  void* context;                      // [count][hidden][batch]
  void* align;                        // [count][batch][source]
  void* attended;                     // [count][batch][hidden] tanh, before dropout
};
struct sd_decoder_out {
  sd_rows y;
  void *h_n, *c_n;  // [layers][batch][hidden]
};
struct sd_decoder_grad {
  sd_rows dy;
  const void *dh_n, *dc_n;
  const void* dalign;                 // [count][batch][source] or null
  sd_rows demb;
  void* dmemory;                      // [batch][source][hidden]
  void *dh0, *dc0, *dfeed0;
  void *const *dw, *const *du, *const *dbias;  // of each layer; null, and dw_out and dw_in too: not wanted
  void *dw_in, *dw_out;               // [hidden][hidden], [hidden][2 hidden]
};
}

namespace sd {

// A plain product inside a sequence: rows of its result are [batch][stride] in panels' columns.
template <class T>
struct Plain {
  Plain(const void* w, int64_t units, int64_t columns)
      : w(static_cast<const T*>(w)), units(units), columns(columns), panels(Columns<T>{columns, false}.panels()),
        // An odd number of panels: rows of a power of two would compete for the same sets of the cache.
        stride((panels | 1) * kPanel<T>) {}

  const T* panel(int64_t p) const { return w + p * panel_size<T>(units); }

  const T* w;
  int64_t units, columns, panels, stride;
};

template <class T>
SD_INLINE T dot(const T* a, const T* b, int64_t n) {
  Vec<T> parts[2] = {};
  int64_t i = 0;
  for (; i + 2 * kLanes<T> <= n; i += 2 * kLanes<T>) {
    parts[0] += load(a + i) * load(b + i);
    parts[1] += load(a + i + kLanes<T>) * load(b + i + kLanes<T>);
  }
  Vec<T> all = parts[0] + parts[1];
  T sum = sum_each<T, 1>(&all)[0];
  for (; i < n; i++) sum += a[i] * b[i];
  return sum;
}

template <class T>
SD_INLINE void add_scaled(T* to, const T* from, T factor, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes<T> <= n; i += kLanes<T>) store(to + i, Vec<T>(load(to + i) + load(from + i) * factor));
  for (; i < n; i++) to[i] += from[i] * factor;
}

// The softmax of scores[0, n) in place; zeros from n to size. No source word at all: zeros.
template <class T>
inline void softmax(T* scores, int n, int size) {
  std::fill(scores + n, scores + size, T(0));
  if (n == 0) return;
  T top = *std::max_element(scores, scores + n), sum = 0;
  for (int s = 0; s < n; s++) sum += scores[s] = std::exp(scores[s] - top);
  for (int s = 0; s < n; s++) scores[s] /= sum;
}

template <class T>
class Decoder {
 public:
  Decoder(const sd_decoder& call, Arena& arena)
      : call(call), arena(arena), count(call.steps.count), batch(call.steps.batch), hidden(call.hidden),
        query_lists(call.kept_query, call.steps, arena), out_lists(call.kept_out, call.steps, arena),
        w_in(call.w_in, call.hidden, call.hidden), w_out(call.w_out, 2 * int64_t(call.hidden), call.hidden) {
    calls_.reserve(call.layers);
    for (int l = 0; l < call.layers; l++) {
      sd_lstm one{};
      one.steps = call.steps;
      one.inputs = l ? call.hidden : call.embed + call.hidden;
      one.hidden = call.hidden;
      one.w = call.w[l];
      one.u = call.u[l];
      one.bias = call.bias[l];
      one.kept_input = call.kept_input[l];
      one.kept_recurrent = call.kept_recurrent[l];
      one.h0 = state(call.h0, l);
      one.c0 = state(call.c0, l);
      one.mask = call.mask_h[l];
      one.gates = call.gates[l];
      one.cells = call.cells[l];
      one.operand = call.operand[l];
      calls_.push_back(one);
    }
    layers.reserve(call.layers);
    for (const sd_lstm& one : calls_) layers.emplace_back(one, arena);
    padded = layers[0].padded;
    all_hidden = arena.take<int32_t>(hidden);
    for (int i = 0; i < hidden; i++) all_hidden[i] = i;
  }

  void forward(int threads, const sd_decoder_out& out);
  void backward(int threads, const sd_decoder_grad& grad);

 private:
  const void* state(const void* states, int l) const {
    return static_cast<const T*>(states) + int64_t(l) * batch * hidden;
  }
  void* state(void* states, int l) const { return static_cast<T*>(states) + int64_t(l) * batch * hidden; }
  T* input(int l, int t) const { return static_cast<T*>(call.input[l]) + layers[l].input_lists.offset(t); }
  T* query(int t) const { return static_cast<T*>(call.query) + query_lists.offset(t); }
  T* step_rows(void* data, int64_t t) const { return static_cast<T*>(data) + t * batch * hidden; }
  T* align(int64_t t, int b) const { return static_cast<T*>(call.align) + (t * batch + b) * call.source; }
  const T* memory(int b) const { return static_cast<const T*>(call.memory) + int64_t(b) * call.source * hidden; }
  // Step t's rows of a multiplier.
  const T* factors(const void* mask, int64_t t) const {
    return mask ? static_cast<const T*>(mask) + t * batch * hidden : nullptr;
  }
  const void* mask_above(int l) const {
    return l + 1 == int(layers.size()) ? call.mask_query : call.mask_between[l];
  }
  // The feed's positions in the first layer's list, and the embedding's.
  Range feed_part(int t) const { return layers[0].part(layers[0].input_lists, t, call.embed, call.embed + hidden); }
  Range embed_part(int t) const { return {0, feed_part(t).begin}; }

  void start_forward(T* h, T* c, Range panels, int me, int team);
  void run_layer(int l, int t, T* h, T* c, Range panels);
  void write_query(int t, int64_t p, const T* h);
  void attend(int t, const T* scored, int64_t stride, Range rows);
  void join(int t, T* joined, Range panels, const sd_rows& y);

  void output_gradient(int t, const sd_rows& dy, T* dfeed, T* djoined, T* dcontext, Range rows);
  void attention_gradient(int t, const void* dalign, const T* dcontext, T* dscores, T* dscored, Range rows);
  // Room that memory_gradient needs.
  int64_t memory_room() const { return 2 * int64_t(count) * (call.source + kPanel<T>); }
  void memory_gradient(const T* dscores, const T* dcontexts, void* dmemory, const int32_t* all, GradBlock<T>* blocks,
                       T* panel, T* room, Range rows);
  void back(const Plain<T>& plain, const T* g, int64_t offset, const int32_t* idx, int kept, T scale, T* out,
            int64_t ldo, int me, int team);
  template <class A>
  void plain_gradient(const Plain<T>& plain, const T* g, int64_t units, const Lists* lists, A&& a, GradBlock<T>* blocks,
                      T* panel, Range panels, T* dw, int64_t ldw);

  const sd_decoder& call;
  Arena& arena;
  const int count, batch, hidden;
  Lists query_lists, out_lists;
  Plain<T> w_in, w_out;
  std::vector<sd_lstm> calls_;
  std::vector<Layer<T>> layers;
  int64_t padded;
  int32_t* all_hidden;
};

// Initial states, the first step's operands, and the embedding's part of the first layer's product for all steps.
template <class T>
void Decoder<T>::start_forward(T* h, T* c, Range panels, int me, int team) {
  const Layer<T>& first = layers[0];
  Range steps = share(count, me, team);
  const T* emb = static_cast<const T*>(call.emb.data);
  for (int64_t t = steps.begin; t < steps.end; t++)
    gather(emb + call.emb.start[t], call.emb.stride, batch, first.input_lists.at(t), int(embed_part(t).end), T(1),
           input(0, t));
  for (size_t l = 0; l < layers.size(); l++)
    for (int64_t p = panels.begin; p < panels.end; p++) {
      layers[l].load_states(calls_[l].h0, calls_[l].c0, p, h + l * batch * padded, c + l * batch * padded);
      if (count) layers[l].write_operand(0, p, h + l * batch * padded);
    }
  if (count && me == 0)
    write_units<T>(first.input_lists, 0, 0, hidden, call.embed, batch, static_cast<const T*>(call.feed0), hidden, nullptr,
                   0, input(0, 0));
#pragma omp barrier
  for (int64_t p = panels.begin; p < panels.end; p++)
    for (int t = 0; t < count; t++) {
      T zeros[kPanel<T>] = {};
      const T* start = call.bias[0] ? static_cast<const T*>(call.bias[0]) + p * kPanel<T> : zeros;
      forward_panel(input(0, t), batch, static_cast<const T*>(call.w[0]) + p * panel_size<T>(calls_[0].inputs),
                    first.input_lists.at(t), int(embed_part(t).end), start, first.gates(p, t), kPanel<T>);
    }
}

// Layer l at step t, its operand of the next step, and what the next layer or the attention multiplies.
template <class T>
void Decoder<T>::run_layer(int l, int t, T* h, T* c, Range panels) {
  const Layer<T>& layer = layers[l];
  bool last = l + 1 == int(layers.size());
  for (int64_t p = panels.begin; p < panels.end; p++) {
    if (l == 0) {
      Range feed = feed_part(t);
      forward_panel<T>(input(0, t) + feed.begin * batch, batch,
                       static_cast<const T*>(call.w[0]) + p * panel_size<T>(calls_[0].inputs),
                       layer.input_lists.at(t) + feed.begin, int(feed.end - feed.begin), nullptr, layer.gates(p, t),
                       kPanel<T>);
    } else {
      T zeros[kPanel<T>] = {};
      layer.input_product(t, p, static_cast<const T*>(call.input[l]),
                          call.bias[l] ? static_cast<const T*>(call.bias[l]) + p * kPanel<T> : zeros);
    }
    layer.recurrent_product(t, p);
    layer.activate(t, p, h, c, nullptr, 0);
    if (t + 1 < count) layer.write_operand(t + 1, p, h);
    if (last)
      write_query(t, p, h);
    else
      write_units<T>(layers[l + 1].input_lists, t, p * kLanes<T>, (p + 1) * kLanes<T>, 0, batch, h, padded,
                     factors(call.mask_between[l], t), hidden, input(l + 1, t));
  }
}

template <class T>
void Decoder<T>::write_query(int t, int64_t p, const T* h) {
  write_units<T>(query_lists, t, p * kLanes<T>, (p + 1) * kLanes<T>, 0, batch, h, padded,
                 factors(call.mask_query, t), hidden, query(t));
}

// Scores, softmax and context of the rows that this thread owns.
template <class T>
void Decoder<T>::attend(int t, const T* scored, int64_t stride, Range rows) {
  T* context = step_rows(call.context, t);
  T room[1024];
  for (int64_t b = rows.begin; b < rows.end; b++) {
    int length = std::clamp(call.lengths[b], 0, call.source);
    T* a = align(t, int(b));
    for (int s = 0; s < length; s++) a[s] = dot(scored + b * stride, memory(int(b)) + int64_t(s) * hidden, hidden);
    softmax(a, length, call.source);
    for (int64_t first = 0; first < hidden; first += 1024) {
      int64_t width = std::min<int64_t>(1024, hidden - first);
      std::fill(room, room + width, T(0));
      for (int s = 0; s < length; s++) add_scaled(room, memory(int(b)) + int64_t(s) * hidden + first, a[s], width);
      for (int64_t j = 0; j < width; j++) context[(first + j) * batch + b] = room[j];
    }
  }
}

// attended = tanh([context, query] @ w_out); its dropped value is the output, and the next step's feed.
template <class T>
void Decoder<T>::join(int t, T* joined, Range panels, const sd_rows& y) {
  T zeros[kPanel<T>] = {};
  const int32_t* list = query_lists.at(t);
  T* attended = step_rows(call.attended, t);
  T* y_t = static_cast<T*>(y.data) + y.start[t];
  for (int64_t p = panels.begin; p < panels.end; p++) {
    T* c = joined + p * kPanel<T>;
    forward_panel<T>(step_rows(call.context, t), batch, w_out.panel(p), all_hidden, hidden, zeros, c, w_out.stride);
    forward_panel<T>(query(t), batch, w_out.panel(p) + int64_t(hidden) * kPanel<T>, list, query_lists.count(t), nullptr,
                     c, w_out.stride);
    int64_t first = p * kPanel<T>, last = std::min<int64_t>(first + kPanel<T>, hidden);
    for (int b = 0; b < batch; b++) {
      for (int v = 0; v < kPanelVectors; v++) {
        T* at = c + b * w_out.stride + v * kLanes<T>;
        store(at, tanh<T>(load(at)));
      }
      std::memcpy(attended + int64_t(b) * hidden + first, c + b * w_out.stride, size_t(last - first) * sizeof(T));
      T* y_b = y_t + b * y.stride;
      std::fill(y_b + first, y_b + last, T(0));
      Range kept = layers[0].part(out_lists, t, first, last);
      const T* factor = factors(call.mask_out, t);
      for (int64_t i = kept.begin; i < kept.end; i++) {
        int32_t unit = out_lists.at(t)[i];
        y_b[unit] = (factor ? factor[b * hidden + unit] : T(out_lists.scale)) * joined[b * w_out.stride + unit];
      }
    }
    if (t + 1 < count)
      write_units<T>(layers[0].input_lists, t + 1, first, last, call.embed, batch, y_t, y.stride, nullptr, 0,
                     input(0, t + 1));
  }
}

template <class T>
void Decoder<T>::forward(int threads, const sd_decoder_out& out) {
  int64_t states = int64_t(layers.size()) * batch * padded;
  T *h = arena.take<T>(states), *c = arena.take<T>(states);
  T *scored = arena.take<T>(batch * w_in.stride), *joined = arena.take<T>(batch * w_out.stride);
#pragma omp parallel num_threads(threads)
  {
    int me = omp_get_thread_num(), team = omp_get_num_threads();
    Range panels = share(layers[0].panels, me, team), plain = share(w_out.panels, me, team),
          rows = share(batch, me, team);
    start_forward(h, c, panels, me, team);
    for (int t = 0; t < count; t++) {
#pragma omp barrier
      for (size_t l = 0; l < layers.size(); l++) {
        run_layer(int(l), t, h + l * batch * padded, c + l * batch * padded, panels);
#pragma omp barrier
      }
      for (int64_t p = plain.begin; p < plain.end; p++) {
        int64_t first = p * kPanel<T>, last = std::min<int64_t>(first + kPanel<T>, hidden);
        if (call.w_in) {
          T zeros[kPanel<T>] = {};
          forward_panel<T>(query(t), batch, w_in.panel(p), query_lists.at(t), query_lists.count(t), zeros,
                           scored + first, w_in.stride);
        } else {
          for (int b = 0; b < batch; b++) std::fill(scored + b * w_in.stride + first, scored + b * w_in.stride + last, T(0));
          Range kept = layers[0].part(query_lists, t, first, last);
          for (int64_t i = kept.begin; i < kept.end; i++)
            for (int b = 0; b < batch; b++)
              scored[b * w_in.stride + query_lists.at(t)[i]] = query(t)[i * batch + b];
        }
        for (int b = 0; b < batch; b++)
          std::memcpy(step_rows(call.scored, t) + int64_t(b) * hidden + first, scored + b * w_in.stride + first,
                      size_t(last - first) * sizeof(T));
      }
#pragma omp barrier
      attend(t, scored, w_in.stride, rows);
#pragma omp barrier
      join(t, joined, plain, out.y);
    }
    for (size_t l = 0; l < layers.size(); l++)
      for (int64_t p = panels.begin; p < panels.end; p++)
        layers[l].store_states(h + l * batch * padded, c + l * batch * padded, p, state(out.h_n, int(l)),
                               state(out.c_n, int(l)));
  }
}

// ---- backward ---------------------------------------------------------------------------------------------------

// Of the joined product's result, from the output's gradient and the feed's, which is taken and left zero.
template <class T>
void Decoder<T>::output_gradient(int t, const sd_rows& dy, T* dfeed, T* djoined, T* dcontext, Range rows) {
  const int32_t* list = out_lists.at(t);
  for (int64_t b = rows.begin; b < rows.end; b++) {
    const T *dy_b = static_cast<const T*>(dy.data) + dy.start[t] + b * dy.stride,
            *attended = step_rows(call.attended, t) + b * hidden;
    T *d = djoined + (int64_t(t) * batch + b) * w_out.stride, *dfeed_b = dfeed + b * hidden;
    std::fill(d, d + w_out.stride, T(0));
    const T* factor = factors(call.mask_out, t);
    for (int i = 0; i < out_lists.count(t); i++) {
      int32_t unit = list[i];
      T scale = factor ? factor[b * hidden + unit] : T(out_lists.scale);
      d[unit] = scale * (dy_b[unit] + dfeed_b[unit]) * (T(1) - attended[unit] * attended[unit]);
    }
    std::fill(dfeed_b, dfeed_b + hidden, T(0));
    T* dcontext_b = dcontext + (int64_t(t) * batch + b) * hidden;
    std::fill(dcontext_b, dcontext_b + hidden, T(0));
  }
}

// Of the scores and of what was scored, from the context's gradient.
template <class T>
void Decoder<T>::attention_gradient(int t, const void* dalign, const T* dcontext, T* dscores, T* dscored, Range rows) {
  for (int64_t b = rows.begin; b < rows.end; b++) {
    int length = std::clamp(call.lengths[b], 0, call.source);
    int64_t row = int64_t(t) * batch + b;
    const T* a = align(t, int(b));
    T *ds = dscores + row * call.source, *dq = dscored + row * w_in.stride, mean = 0;
    for (int s = 0; s < length; s++) {
      ds[s] = dot(dcontext + row * hidden, memory(int(b)) + int64_t(s) * hidden, hidden);
      if (dalign) ds[s] += static_cast<const T*>(dalign)[row * call.source + s];
      mean += a[s] * ds[s];
    }
    std::fill(ds + length, ds + call.source, T(0));
    std::fill(dq, dq + w_in.stride, T(0));
    for (int s = 0; s < length; s++) {
      ds[s] = a[s] * (ds[s] - mean);
      add_scaled(dq, memory(int(b)) + int64_t(s) * hidden, ds[s], hidden);
    }
  }
}

// Over all steps at once: memory[b] gets scores' gradients times what was scored, and attention times dcontext.
template <class T>
void Decoder<T>::memory_gradient(const T* dscores, const T* dcontexts, void* dmemory, const int32_t* all,
                                 GradBlock<T>* blocks, T* panel, T* room, Range rows) {
  const int64_t source = call.source;
  T *weights = room, *sides = room + 2 * source * count;
  for (int64_t b = rows.begin; b < rows.end; b++) {
    for (int64_t t = 0; t < count; t++)
      for (int64_t s = 0; s < source; s++) {
        weights[s * 2 * count + t] = dscores[(t * batch + b) * source + s];
        weights[s * 2 * count + count + t] = align(t, int(b))[s];
      }
    for (int64_t first = 0; first < hidden; first += kPanel<T>) {
      size_t width = size_t(std::min<int64_t>(kPanel<T>, hidden - first)) * sizeof(T);
      std::fill(sides, sides + 2 * int64_t(count) * kPanel<T>, T(0));
      for (int64_t t = 0; t < count; t++) {
        std::memcpy(sides + t * kPanel<T>, step_rows(call.scored, t) + b * hidden + first, width);
        std::memcpy(sides + (count + t) * kPanel<T>, dcontexts + (t * batch + b) * hidden + first, width);
      }
      std::fill(panel, panel + source * kPanel<T>, T(0));
      blocks[0] = {weights, sides, 2 * count};
      grad_panel(blocks, 1, kPanel<T>, all, int(source), panel);
      for (int64_t s = 0; s < source; s++)
        std::memcpy(static_cast<T*>(dmemory) + (b * source + s) * hidden + first, panel + s * kPanel<T>, width);
    }
  }
}

// out[b][idx] += scale * g @ W[offset + idx, :].T for this thread's share.
template <class T>
void Decoder<T>::back(const Plain<T>& plain, const T* g, int64_t offset, const int32_t* idx, int kept, T scale, T* out,
                      int64_t ldo, int me, int team) {
  Range mine = share((kept + kDotUnits - 1) / kDotUnits, me, team);
  Range units{mine.begin * kDotUnits, std::min<int64_t>(mine.end * kDotUnits, kept)};
  in_parts(int(plain.panels), kDotPanels<T>, [&](int p, int size) {
    backward_block(plain.panel(p) + offset * kPanel<T>, panel_size<T>(plain.units), size, g + p * kPanel<T>,
                   GradStrides{kPanel<T>, plain.stride}, batch, idx, units, scale, out, ldo);
  });
}

// dw [columns][ldw]: the gradient of `units` units of a plain weight over all steps. lists null: all of them.
template <class T>
template <class A>
void Decoder<T>::plain_gradient(const Plain<T>& plain, const T* g, int64_t units, const Lists* lists, A&& a,
                                GradBlock<T>* blocks, T* panel, Range panels, T* dw, int64_t ldw) {
  for (int64_t p = panels.begin; p < panels.end; p++) {
    std::fill(panel, panel + units * kPanel<T>, T(0));
    for (int64_t t = 0; t < count; t++) blocks[t] = {a(int(t)), g + t * batch * plain.stride + p * kPanel<T>, batch};
    if (!lists || lists->uniform)
      grad_panel(blocks, count, plain.stride, lists && count ? lists->at(0) : all_hidden,
                 lists && count ? lists->count(0) : hidden, panel);
    else
      for (int t = 0; t < count; t++) grad_panel(blocks + t, 1, plain.stride, lists->at(t), lists->count(t), panel);
    unpack_panel(panel, units, Columns<T>{plain.columns, false}, p, dw, ldw);
  }
}

template <class T>
void Decoder<T>::backward(int threads, const sd_decoder_grad& grad) {
  const int depth = int(layers.size());
  const int64_t states = int64_t(depth) * batch * padded, all_rows = int64_t(count) * batch;
  const int64_t gate_size = layers[0].panels * panel_size<T>(layers[0].rows);
  T* dgates = arena.take<T>(depth * gate_size);
  T *dh = arena.take<T>(states), *dc = arena.take<T>(states);
  T* dbias = take_zeros<T>(arena, depth * layers[0].panels * kPanel<T>);
  // Gradient of each layer's output from above: the next layer's input, or the query.
  T* above = take_zeros<T>(arena, states);
  T* dfeed = take_zeros<T>(arena, int64_t(batch) * hidden);
  T *djoined = arena.take<T>(all_rows * w_out.stride), *dcontext = arena.take<T>(all_rows * hidden);
  T *dscores = arena.take<T>(all_rows * call.source), *dscored = arena.take<T>(all_rows * w_in.stride);
  int64_t room = (std::max<int64_t>({call.embed + hidden, 2 * hidden, call.source})) * kPanel<T>;
  T* rooms = arena.take<T>(room * threads);
  GradBlock<T>* all_blocks = arena.take<GradBlock<T>>(int64_t(count + 1) * threads);
  T* memory_rooms = arena.take<T>(memory_room() * threads);
  int32_t* all_source = arena.take<int32_t>(call.source);
  for (int32_t s = 0; s < call.source; s++) all_source[s] = s;
#pragma omp parallel num_threads(threads)
  {
    int me = omp_get_thread_num(), team = omp_get_num_threads();
    Range panels = share(layers[0].panels, me, team), plain = share(w_out.panels, me, team),
          rows = share(batch, me, team);
    for (int l = 0; l < depth; l++)
      for (int64_t p = panels.begin; p < panels.end; p++)
        layers[l].load_states(state(grad.dh_n, l), state(grad.dc_n, l), p, dh + l * batch * padded,
                              dc + l * batch * padded);
    zero_rows<T>(grad.demb, call.steps, call.embed, me, team);
    T* query_above = above + (depth - 1) * batch * padded;
    for (int t = count - 1; t >= 0; t--) {
      const int32_t* list = query_lists.at(t);
      const int kept = query_lists.count(t);
      T *dj = djoined + t * batch * w_out.stride, *ds = dscored + t * batch * w_in.stride;
      output_gradient(t, grad.dy, dfeed, djoined, dcontext, rows);
#pragma omp barrier
      back(w_out, dj, 0, all_hidden, hidden, T(1), dcontext + int64_t(t) * batch * hidden, hidden, me, team);
      back(w_out, dj, hidden, list, kept, T(query_lists.scale), query_above, padded, me, team);
#pragma omp barrier
      attention_gradient(t, grad.dalign, dcontext, dscores, dscored, rows);
#pragma omp barrier
      if (call.w_in)
        back(w_in, ds, 0, list, kept, T(query_lists.scale), query_above, padded, me, team);
      else
        for (int64_t b = rows.begin; b < rows.end; b++)
          for (int i = 0; i < kept; i++)
            query_above[b * padded + list[i]] += T(query_lists.scale) * ds[b * w_in.stride + list[i]];
#pragma omp barrier
      for (int l = depth - 1; l >= 0; l--) {
        const Layer<T>& layer = layers[l];
        T *dg = dgates + l * gate_size, *dh_l = dh + l * batch * padded, *from = above + l * batch * padded;
        const void* mask = mask_above(l);
        for (int64_t p = panels.begin; p < panels.end; p++) {
          if (mask) layer.mask_gradient(mask, t, p, from);
          layer.gate_gradients(t, p, from, padded, dg, dh_l, dc + l * batch * padded,
                               dbias + l * layer.panels * kPanel<T>);
          for (int b = 0; b < batch; b++) store(from + b * padded + p * kLanes<T>, Vec<T>{});
        }
#pragma omp barrier
        layer.through_product(call.u[l], hidden, layer.recurrent_lists, {0, layer.recurrent_lists.count(t)}, t, dg, dh_l, padded, me,
                              team);
        if (l > 0)
          layer.through_product(call.w[l], hidden, layer.input_lists, {0, layer.input_lists.count(t)}, t, dg,
                                above + (l - 1) * batch * padded, padded, me, team);
        else  // the list's feed units are counted from `embed` on
          layer.through_product(call.w[0], calls_[0].inputs, layer.input_lists, feed_part(t), t, dg, dfeed - call.embed,
                                hidden, me, team);
#pragma omp barrier
        if (call.mask_h[l])
          for (int64_t p = panels.begin; p < panels.end; p++) layer.mask_gradient(call.mask_h[l], t, p, dh_l);
      }
    }
    for (int l = 0; l < depth; l++)
      for (int64_t p = panels.begin; p < panels.end; p++)
        layers[l].store_states(dh + l * batch * padded, dc + l * batch * padded, p, state(grad.dh0, l),
                               state(grad.dc0, l));
    for (int t = 0; t < count; t++)
      layers[0].through_product(call.w[0], calls_[0].inputs, layers[0].input_lists, embed_part(t), t, dgates,
                                static_cast<T*>(grad.demb.data) + grad.demb.start[t], grad.demb.stride, me, team);
    for (int64_t b = rows.begin; b < rows.end; b++)
      std::copy(dfeed + b * hidden, dfeed + (b + 1) * hidden, static_cast<T*>(grad.dfeed0) + b * hidden);
    T* panel = rooms + me * room;
    GradBlock<T>* blocks = all_blocks + int64_t(me) * (count + 1);
    for (int l = 0; l < depth && grad.dw; l++) {
      T* dg = dgates + l * gate_size;
      layers[l].weight_gradient(layers[l].input_lists, static_cast<const T*>(call.input[l]), calls_[l].inputs, dg, blocks,
                                panel, panels, grad.dw[l]);
      layers[l].weight_gradient(layers[l].recurrent_lists, static_cast<const T*>(call.operand[l]), hidden, dg, blocks,
                                panel, panels, grad.du[l]);
      layers[l].store_bias_gradient(dbias + l * layers[l].panels * kPanel<T>, panels, grad.dbias[l]);
    }
    auto query_at = [&](int t) { return query(t); };
    auto context_at = [&](int t) { return static_cast<const T*>(step_rows(call.context, t)); };
    T* dw_out = static_cast<T*>(grad.dw_out);
    if (dw_out) {
      plain_gradient(w_out, djoined, hidden, nullptr, context_at, blocks, panel, plain, dw_out, 2 * int64_t(hidden));
      plain_gradient(w_out, djoined, hidden, &query_lists, query_at, blocks, panel, plain, dw_out + hidden,
                     2 * int64_t(hidden));
    }
    if (grad.dw_in)
      plain_gradient(w_in, dscored, hidden, &query_lists, query_at, blocks, panel, plain,
                     static_cast<T*>(grad.dw_in), hidden);
    memory_gradient(dscores, dcontext, grad.dmemory, all_source, blocks, panel, memory_rooms + me * memory_room(), rows);
  }
}

}  // namespace sd
