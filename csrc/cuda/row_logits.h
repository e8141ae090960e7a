// A row as the kernels see it: which options it has, its logits as floats, what a sweep leaves in their place, and where its
// gradient is stored. The first of the classes that RowLoop in row_loop.h is made of; it holds their state.
#pragma once
#include <type_traits>

#include "cluster_reduce.h"
#include "cuda.h"
#include "ring.h"

namespace hkdfast {
namespace HKDFAST_ISA {

HKDFAST_HD float finite(float x) { return x - x == 0.f ? x : 0.f; }

template <class ThreadContext, class Divergence, Kind KIND, bool PURIFIED>
class RowLogits {
 protected:
  HKDFAST_HD RowLogits(ThreadContext& thread, const Task& task, Divergence divergence)
      : thread_(thread), task_(task), divergence_(divergence), ring_(thread, task),
        scale_(1 / task.temperature) {}

  static constexpr bool FAST = KIND != Kind::any;
  using F = std::conditional_t<FAST, Fast, float>;
  using W = LaneWords<KIND>;
  static constexpr bool distills = !std::is_same_v<Divergence, Decode>;
  static constexpr bool stashes_tilts = FAST && Tilt<Divergence>::stashed;
  static constexpr float tilt_scale = 256;  // of what is kept: bits up to 200 in a format that ends at 65504
  static constexpr Mean mean = Divergence::mean;
  static constexpr bool mean_q = mean == Mean::gap_under_q, mean_p = mean == Mean::gap_under_p;

  template <bool first, bool last, class Step>
  HKDFAST_HD void sweep(Step step) {
    ring_.template sweep<first, last, W::step>(step);
  }

  HKDFAST_HD bool measured() const { return task_.metrics != nullptr; }
  // Distances from any origin are exact where logits are bfloat16, but a moment about it is not one about the peak.
  HKDFAST_HD float slack() const { return KIND == Kind::narrow && !measured() ? 16.f / (scale_.by > 1.f ? scale_.by : 1.f) : 0.f; }
  HKDFAST_HD bool hard() const { return KIND != Kind::narrow && task_.labels && (task_.hard_weight != 0 || measured()); }
  HKDFAST_HD bool labeled() const { return hard() && task_.labels[row_] >= 0; }
  HKDFAST_HD bool needs_sum_at_1() const { return hard() && scale_.by != 1.f; }
  HKDFAST_HD bool floored() const { return !FAST && task_.teacher_floor > -INFINITY; }
  HKDFAST_HD bool mean_known() const { return mean != Mean::none && !floored(); }
  HKDFAST_HD RowConstants& constants() const { return thread_.template at<SharedMemory>(0).constants; }
  HKDFAST_HD bool leader() const { return thread_.warp() == 0 && thread_.lane() == 0; }  // states the block's constants
  HKDFAST_HD bool writer() const { return thread_.block() == 0 && leader(); }

  HKDFAST_HD W numbers_of(const Tile& tile, int tile_at, int at, int begin, int word) const {
    if (FAST) return read<KIND>(thread_, at + tile_at + (KIND == Kind::wide ? 4 : 2) * word, tile.dtype);
    const int size = tile.dtype == Dtype::float32 ? 4 : 2;
    const std::uintptr_t own = reinterpret_cast<std::uintptr_t>(tile.data) +
                               static_cast<std::uintptr_t>((row_ * tile.stride + begin) * size);
    return read<KIND>(thread_, at + tile_at + static_cast<int>(own & 15) + size * word, tile.dtype);
  }

  HKDFAST_HD static float transformed(float x, const Transform& to) {
    const float z = x * to.scale;
    return to.softcap > 0.f ? to.softcap * tanh_(z / to.softcap) : z;
  }

  // Logits of one step, -infinity past the end of the row, as the numbers are there: a softcap makes them finite.
  HKDFAST_HD void finish(W& x, const Transform& to, int base) const {
    if (FAST || (to.scale == 1.f && to.softcap == 0.f)) return;
#pragma unroll
    for (int k = 0; k < W::count; ++k) x.of[k] = transformed(x.of[k], to);
    if (base + W::step > task_.vocab) {
#pragma unroll
      for (int k = 0; k < W::count; ++k)
        if (base + W::place(thread_.lane(), k) >= task_.vocab) x.of[k] = -INFINITY;
    }
  }

  HKDFAST_HD W student(int at, int begin, int word) const {
    W x = numbers_of(task_.student, task_.plan.tile_at[0], at, begin, word);
    finish(x, task_.student_logits, begin + word);
    return x;
  }

  HKDFAST_HD W other(const Tile& tile, int i, const Transform& to, int at, int begin, int word) const {
    W y = numbers_of(tile, task_.plan.tile_at[i], at, begin, word);
    if (!FAST && task_.difference) {
      const W x = numbers_of(task_.student, task_.plan.tile_at[0], at, begin, word);
#pragma unroll
      for (int k = 0; k < W::count; ++k) y.of[k] += x.of[k];
    }
    finish(y, to, begin + word);
    return y;
  }
  HKDFAST_HD W clean(int at, int begin, int word) const {
    return other(task_.teacher, 1, task_.teacher_logits, at, begin, word);
  }
  HKDFAST_HD W noisy(int at, int begin, int word) const {
    return other(task_.noisy, 2, task_.noisy_logits, at, begin, word);
  }

  // The teacher's logits, purified if there is a law.
  HKDFAST_HD W teacher(int at, int begin, int word, const Contrast& contrast) const {
    W y = clean(at, begin, word);
    if (!PURIFIED) return y;
    const W noisy_step = noisy(at, begin, word);
#pragma unroll
    for (int k = 0; k < W::count; ++k) y.of[k] -= contrast.clean_peak;
    if (task_.law.plausibility == 0) {
#pragma unroll
      for (int k = 0; k < W::count; ++k) y.of[k] = contrast.odds(y.of[k], noisy_step.of[k] - contrast.noisy_peak);
    } else {
#pragma unroll
      for (int k = 0; k < W::count; ++k) y.of[k] = contrast(y.of[k], noisy_step.of[k] - contrast.noisy_peak);
    }
    return y;
  }

  // Likewise, in the sweeps after the first that has asked: in the fast kinds the contrast lies where its branches lay.
  static constexpr bool stashes_contrast = FAST && PURIFIED;
  HKDFAST_HD W teacher_again(int at, int begin, int word, const Contrast& contrast) const {
    if constexpr (stashes_contrast)
      return stashed(at, word);
    else
      return teacher(at, begin, word, contrast);
  }

  // Floats in the teacher's place, or in those of the two branches where they are of 16 bits.
  HKDFAST_HD Bytes16* place_of(int half, int at, int word) const {
    const int lane = thread_.lane(), *const tile_at = task_.plan.tile_at;
    const int offset = KIND == Kind::wide ? tile_at[1] + 4 * (word + W::place(lane, 4 * half))
                                          : tile_at[1 + half] + 2 * (word + W::place(lane, 0));
    return &thread_.template at<Bytes16>(at + offset);
  }
  HKDFAST_HD void stash(int at, int word, const W& x) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      Bytes16 four;
#pragma unroll
      for (int k = 0; k < 4; ++k) four.of[k] = bits_of(x.of[4 * i + k]);
      write_16_bytes(place_of(i, at, word), four);
    }
  }
  HKDFAST_HD W stashed(int at, int word) const {
    W x;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const Bytes16 four = read_16_bytes(place_of(i, at, word));
#pragma unroll
      for (int k = 0; k < 4; ++k) x.of[4 * i + k] = float_of(four.of[k]);
    }
    return x;
  }

  // Tilts in the teacher's place, which the gradient does without.
  HKDFAST_HD void stash_tilts(int at, int word, const W& x) const {
    if (KIND == Kind::wide) return stash(at, word, x);
    Bytes16 eight;
#pragma unroll
    for (int k = 0; k < 4; ++k) eight.of[k] = pack_fp16(x.of[2 * k], x.of[2 * k + 1]);
    write_16_bytes(place_of(0, at, word), eight);
  }
  HKDFAST_HD W stashed_tilts(int at, int word) const {
    if (KIND == Kind::wide) return stashed(at, word);
    const Bytes16 eight = read_16_bytes(place_of(0, at, word));
    W x;
#pragma unroll
    for (int k = 0; k < W::count; ++k)
      x.of[k] = number(static_cast<std::uint16_t>(eight.of[k / 2] >> 16 * (k % 2)), Dtype::float16);
    return x;
  }

  // A number of global memory, for the few that a row needs by name.
  HKDFAST_HD float number_at(const Tile& tile, std::int64_t word) const {
    const std::int64_t i = row_ * tile.stride + word;
    if (tile.dtype == Dtype::float32) return static_cast<const float*>(tile.data)[i];
    return number(static_cast<const std::uint16_t*>(tile.data)[i], tile.dtype);
  }

  // Logit of the label's word; NaN for one beyond the vocabulary.
  HKDFAST_HD float label_logit(const Tile& tile, const Transform& to, bool difference) const {
    const std::int64_t label = task_.labels[row_] < 0 ? 0 : task_.labels[row_];
    if (label >= task_.vocab) return NAN;
    return transformed(number_at(tile, label) + (difference ? number_at(task_.student, label) : 0.f), to);
  }

  // Where a row of the gradient, or of a contrast, lies.
  struct Stored {
    const ThreadContext& thread;
    int vocab, size;
    Dtype dtype;
    char* row;

    HKDFAST_HD W load(int base) const { return read_global<KIND>(thread, row + base * size, dtype, vocab - base); }
    HKDFAST_HD void store(int base, const W& x) const { write(thread, row + base * size, dtype, vocab - base, x); }
  };
  HKDFAST_HD Stored stored() const {
    const Tile& to = task_.grad;
    const Dtype dtype = FAST ? Dtype::bfloat16 : to.dtype;
    const int size = dtype == Dtype::float32 ? 4 : 2;
    return {thread_, task_.vocab, size, dtype, static_cast<char*>(to.data) + row_ * to.stride * size};
  }

  ThreadContext& thread_;
  const Task& task_;
  Divergence divergence_;
  Ring<ThreadContext> ring_;
  Scale scale_;
  std::int64_t row_ = 0;
  unsigned reductions_ = 0;
  double confidence_ = 0, a_ = 0;  // of the row, known to the leader
};

}  // namespace HKDFAST_ISA
}  // namespace hkdfast
