// The C interface of the CPU backend: every operation for float and for double.
#include "decoder.h"
#include "gemm.h"
#include "loss.h"
#include "lstm.h"

namespace {

// 0, 1 when memory ran out, 2 for kept units that do not ascend: no C++ exception may cross into Python. What may throw
// is done before the threads start.
template <class F>
int guarded(F&& f) {
  try {
    f();
    return 0;
  } catch (const std::bad_alloc&) {
    return 1;
  } catch (const std::invalid_argument&) {
    return 2;
  }
}

}  // namespace

#define SD_EXPORT extern "C" __attribute__((visibility("default")))

SD_EXPORT int sd_isa() { return SD_ISA; }
SD_EXPORT int sd_version() { return 1; }

#define SD_DEFINE(T, SUFFIX)                                                                                          \
  SD_EXPORT int64_t sd_panel_##SUFFIX() { return sd::kPanel<T>; }                                                     \
  SD_EXPORT int64_t sd_padded_rows_##SUFFIX(int64_t rows) { return sd::padded_rows<T>(rows); }                        \
  SD_EXPORT int sd_pack_##SUFFIX(int threads, const T* w, int64_t ld, int units_first, int64_t units,                 \
                                 int64_t columns, int gates, T* out) {                                                \
    return guarded([&] { sd::pack<T>(threads, w, ld, units_first, units, {columns, gates != 0}, out); });             \
  }                                                                                                                   \
  SD_EXPORT int sd_gemm_fp_##SUFFIX(int threads, const sd_steps* steps, const sd_rows* x, const T* w,                 \
                                    int64_t columns, const T* bias, const sd_kept* kept, const sd_rows* y) {          \
    return guarded([&] { sd::gemm_fp<T>(threads, *steps, *x, w, columns, bias, *kept, *y); });                        \
  }                                                                                                                   \
  SD_EXPORT int sd_gemm_bp_##SUFFIX(int threads, const sd_steps* steps, const sd_rows* dy, const T* w,                \
                                    int64_t columns, const sd_kept* kept, const sd_rows* dx) {                        \
    return guarded([&] { sd::gemm_bp<T>(threads, *steps, *dy, w, columns, *kept, *dx); });                            \
  }                                                                                                                   \
  SD_EXPORT int sd_gemm_wg_##SUFFIX(int threads, const sd_steps* steps, const sd_rows* x, const sd_rows* dy,          \
                                    int64_t columns, const sd_kept* kept, T* dw) {                                    \
    return guarded([&] { sd::gemm_wg<T>(threads, *steps, *x, *dy, columns, *kept, dw); });                            \
  }                                                                                                                   \
  SD_EXPORT int sd_cross_entropy_forward_##SUFFIX(int threads, int64_t rows, int64_t columns, const T* logits,         \
                                                  int64_t stride, const int64_t* target, int64_t ignored,             \
                                                  double smoothing, T* lse, T* loss) {                                \
    return guarded([&] {                                                                                              \
      sd::cross_entropy_forward<T>(threads, rows, columns, logits, stride, target, ignored, smoothing, lse, loss);    \
    });                                                                                                               \
  }                                                                                                                   \
  SD_EXPORT int sd_cross_entropy_backward_##SUFFIX(int threads, int64_t rows, int64_t columns, const T* logits,        \
                                                   int64_t stride, const int64_t* target, int64_t ignored,            \
                                                   double smoothing, const T* lse, const T* scale, T* dlogits) {      \
    return guarded([&] {                                                                                              \
      sd::cross_entropy_backward<T>(threads, rows, columns, logits, stride, target, ignored, smoothing, lse, scale,   \
                                    dlogits);                                                                         \
    });                                                                                                               \
  }                                                                                                                   \
  SD_EXPORT int sd_lstm_forward_##SUFFIX(int threads, const sd_lstm* call, const sd_lstm_out* out) {                  \
    return guarded([&] { sd::lstm_forward<T>(threads, *call, *out); });                                              \
  }                                                                                                                   \
  SD_EXPORT int sd_lstm_backward_##SUFFIX(int threads, const sd_lstm* call, const sd_lstm_grad* grad) {               \
    return guarded([&] { sd::lstm_backward<T>(threads, *call, *grad); });                                             \
  }                                                                                                                   \
  SD_EXPORT int sd_decoder_forward_##SUFFIX(int threads, const sd_decoder* call, const sd_decoder_out* out) {         \
    return guarded([&] { sd::Decoder<T>(*call, sd::Arena::mine()).forward(threads, *out); });                         \
  }                                                                                                                   \
  SD_EXPORT int sd_decoder_backward_##SUFFIX(int threads, const sd_decoder* call, const sd_decoder_grad* grad) {      \
    return guarded([&] { sd::Decoder<T>(*call, sd::Arena::mine()).backward(threads, *grad); });                       \
  }

SD_DEFINE(float, f32)
SD_DEFINE(double, f64)
