// What the Python side passes in, and scratch memory.
#pragma once

#include <omp.h>
#include <stdlib.h>
#include <sys/mman.h>

#include <new>
#include <stdexcept>
#include <vector>

#include "panels.h"

extern "C" {
// Time steps of an activation: rows[t] of them at step t, never more than `batch`.
struct sd_steps {
  int32_t count, batch;
  const int32_t* rows;
};
// An activation: row b of step t lies at data + start[t] + b * stride, in elements; columns are adjacent.
struct sd_rows {
  void* data;
  const int64_t* start;
  int64_t stride;
};
// Kept units of each step, ascending; entries equal to `size` end a row early. indices null: all of them.
// stride 0: the same at every step.
struct sd_kept {
  const int32_t* indices;
  int64_t stride;
  int32_t width, size;
  double scale;
};
}

namespace sd {

// Memory that lives from call to call, one arena per calling thread: fresh pages cost more than what is done in them.
class Arena {
 public:
  static Arena& mine() {
    static thread_local Arena arena;
    arena.reset();
    return arena;
  }
  ~Arena() { drop(); }

  template <class U>
  U* take(int64_t count) {
    size_t bytes = (size_t(std::max<int64_t>(count, 1)) * sizeof(U) + kAlign - 1) / kAlign * kAlign;
    if (blocks_.empty() || used_ + bytes > blocks_.back().size) add(bytes);
    char* p = blocks_.back().data + used_;
    used_ += bytes;
    return reinterpret_cast<U*>(p);
  }

 private:
  static constexpr size_t kAlign = 64, kHuge = size_t(2) << 20;
  struct Block {
    char* data;
    size_t size;
  };

  // One block that holds what the last call took in several.
  void reset() {
    if (blocks_.size() > 1) {
      size_t total = 0;
      for (const Block& block : blocks_) total += block.size;
      drop();
      add(total);
    }
    used_ = 0;
  }
  void add(size_t bytes) {
    size_t align = bytes < kHuge ? kAlign : kHuge;
    bytes = (bytes + align - 1) / align * align;
    void* p = nullptr;
    if (posix_memalign(&p, align, bytes)) throw std::bad_alloc();
    if (align == kHuge) madvise(p, bytes, MADV_HUGEPAGE);
    blocks_.push_back({static_cast<char*>(p), bytes});
    used_ = 0;
  }
  void drop() {
    for (const Block& block : blocks_) free(block.data);
    blocks_.clear();
  }

  std::vector<Block> blocks_;
  size_t used_ = 0;
};

// Kept units of every step, as plain lists.
class Lists {
 public:
  Lists(const sd_kept& kept, const sd_steps& steps, Arena& arena) : scale(kept.scale), indices_(kept.indices) {
    stride_ = kept.stride;
    uniform = !kept.indices || kept.stride == 0;
    if (!indices_) {
      int32_t* all = arena.take<int32_t>(kept.size);
      for (int32_t i = 0; i < kept.size; i++) all[i] = i;
      indices_ = all;
      stride_ = 0;
    }
    counts_ = arena.take<int32_t>(steps.count);
    offsets_ = arena.take<int64_t>(steps.count + 1);
    int64_t offset = 0;
    for (int t = 0; t < steps.count; t++) {
      int n = kept.indices ? kept.width : kept.size;
      while (n > 0 && at(t)[n - 1] >= kept.size) n--;
      // Everything below indexes by these.
      for (int i = 0; i < n; i++)
        if (at(t)[i] < 0 || (i > 0 && at(t)[i] <= at(t)[i - 1])) throw std::invalid_argument("kept units");
      if (n > kept.size) throw std::invalid_argument("kept units");
      counts_[t] = n;
      offsets_[t] = offset;
      offset += int64_t(n) * steps.rows[t];
    }
    offsets_[steps.count] = offset;
  }
  const int32_t* at(int t) const { return indices_ + t * stride_; }
  int count(int t) const { return counts_[t]; }
  // Where step t's block of the compact operand begins; the total for t = number of steps.
  int64_t offset(int t) const { return offsets_[t]; }

  double scale;
  bool uniform;  // the same units at every step

 private:
  const int32_t* indices_;
  int64_t stride_;
  int32_t* counts_;
  int64_t* offsets_;
};

// Kept columns of one step's rows, scaled, transposed: out[i][b] = scale * x[b][idx[i]].
template <class T>
inline void gather(const T* x, int64_t stride, int rows, const int32_t* idx, int kept, T scale, T* out) {
  for (int b = 0; b < rows; b++)
    for (int i = 0; i < kept; i++) out[int64_t(i) * rows + b] = scale * x[b * stride + idx[i]];
}

// All steps' kept columns; to be called by every thread of a team, each doing its share.
template <class T>
inline void gather_all(const sd_rows& x, const sd_steps& steps, const Lists& lists, T* out, int me, int threads) {
  const T* data = static_cast<const T*>(x.data);
  Range mine = share(steps.count, me, threads);
  for (int64_t t = mine.begin; t < mine.end; t++)
    gather(data + x.start[t], x.stride, steps.rows[t], lists.at(t), lists.count(t), T(lists.scale),
           out + lists.offset(t));
}

template <class T>
inline void zero_rows(const sd_rows& x, const sd_steps& steps, int64_t columns, int me, int threads) {
  T* data = static_cast<T*>(x.data);
  Range mine = share(steps.count, me, threads);
  for (int64_t t = mine.begin; t < mine.end; t++)
    for (int b = 0; b < steps.rows[t]; b++)
      std::memset(data + x.start[t] + b * x.stride, 0, size_t(columns) * sizeof(T));
}

}  // namespace sd
