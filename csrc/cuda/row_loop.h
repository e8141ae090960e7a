// The row operation by a cluster of thread blocks that holds a row in its shared memory, so that logits are read from
// global memory once. A ThreadContext is what a thread knows of its surroundings: device.h has the GPU's, tests/tools/cluster.cpp one
// that runs on a CPU.
//
// 1. softmax sums of every tile; 2. with a law those of the contrast, whose weight the first sweep found; 3. the sum of the
// terms, unless it follows from those; 4. the gradient. Between sweeps one reduction over the cluster. Of plain tiles a sweep
// leaves in shared memory, in the place of what is not read again, what the next ones would compute once more.
#pragma once
#include <type_traits>

#include "cuda.h"
#include "cluster_reduce.h"
#include "ring.h"

namespace hkdfast {
namespace HKDFAST_ISA {

HKDFAST_HD float finite(float x) { return x - x == 0.f ? x : 0.f; }

template <class ThreadContext, class Divergence, Kind KIND, bool PURIFIED>
class RowLoop {
 public:
  HKDFAST_HD RowLoop(ThreadContext& thread, const Task& task, Divergence divergence)
      : thread_(thread), task_(task), divergence_(divergence), ring_(thread, task),
        scale_(1 / task.temperature) {}

  HKDFAST_HD void rows() {
    for (row_ = thread_.cluster(); row_ < task_.n; row_ += thread_.clusters()) {
      if (ignored(task_, row_))
        blank();
      else
        row();
    }
    thread_.sync_cluster();  // no block leaves while another may still send to it
  }

 private:
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

  // One side's words added to a lane's sums, as distances from its origin; with the mean gap if the other side's are given.
  HKDFAST_HD void take(LaneSums& r, const F (&d)[W::count], const Scale& scale, bool with_moment, const F* to_p = nullptr,
                       const F* to_q = nullptr) const {
    F e[W::count];
#pragma unroll
    for (int k = 0; k < W::count; ++k) e[k] = exp_(d[k], scale.rate);
    r.sum += total(e);
    if (to_p) {
      float gap = 0;
#pragma unroll
      for (int k = 0; k < W::count; ++k)
        if (plain(e[k]) > 0.f) gap = fused(plain(e[k]), plain(to_p[k] - to_q[k]), gap);
      r.gap += gap;
    }
    if (with_moment) {
      float moment = 0;
#pragma unroll
      for (int k = 0; k < W::count; ++k)
        if (plain(e[k]) > 0.f) moment = fused(plain(e[k]), plain(d[k]) * scale.by, moment);
      r.moment += moment;
    }
  }

  HKDFAST_HD static void less(F (&d)[W::count], const W& x, float origin) {
#pragma unroll
    for (int k = 0; k < W::count; ++k) d[k] = x.of[k] - origin;
  }

  struct Pair {
    LaneSums q, p;
  };

  // A step of both sides; the sides are student and (purified) teacher.
  template <bool WITH_Q, bool WITH_P>
  HKDFAST_HD void add_both(Pair& r, const W& x, const W& y, int base) const {
    const bool with_moment = measured(), with_first = measured() || mean_q || stashes_tilts;
    F to_q[W::count], to_p[W::count];
    float by = 0;  // how far the student's origin moves, less how far the teacher's does
    if (WITH_Q) {
      const float max_logit = largest(x);
      if (max_logit > r.q.bound) by += r.q.move(max_logit, scale_, slack());
      if (with_first) r.q.note_peak(x, y, max_logit, thread_.lane(), base);
      r.q.peak = fmaxf(r.q.peak, max_logit);
    }
    if (WITH_P) {
      const float max_logit = largest(y);
      if (max_logit > r.p.bound) by -= r.p.move(max_logit, scale_, slack());
      if (measured()) r.p.note_peak(y, x, max_logit, thread_.lane(), base);
      r.p.peak = fmaxf(r.p.peak, max_logit);
    }
    if (by != 0.f) {
      if (mean_q) r.q.gap += by * r.q.sum;
      if (mean_p) r.p.gap += by * r.p.sum;
    }
    if (WITH_Q) less(to_q, x, r.q.origin);
    if (WITH_P) less(to_p, y, r.p.origin);
    if (WITH_Q) {
      if (mean_q && WITH_P)
        take(r.q, to_q, scale_, with_moment, to_p, to_q);
      else
        take(r.q, to_q, scale_, with_moment);
      if (needs_sum_at_1()) {
        const Scale at_1(1);
        F e[W::count];
#pragma unroll
        for (int k = 0; k < W::count; ++k) e[k] = exp_(to_q[k], at_1.rate);
        r.q.sum_at_1 += total(e);
      }
    }
    if (WITH_P) {
      if (mean_p && WITH_Q)
        take(r.p, to_p, scale_, with_moment, to_p, to_q);
      else
        take(r.p, to_p, scale_, with_moment);
    }
  }

  HKDFAST_HD SoftmaxTriple record(const Pair& r) const {
    SoftmaxTriple all;
    const double offset = static_cast<double>(r.p.origin) - r.q.origin;
    all.side[0] = softmax(r.q, scale_, mean_q ? offset : 0);
    all.side[1] = softmax(r.p, scale_, mean_p ? offset : 0);
    return all;
  }

  template <class Join>
  HKDFAST_HD SoftmaxTriple reduced(const SoftmaxTriple& mine, Join join) {
    return reduce(thread_, turn_, mine, join);
  }

  HKDFAST_HD SoftmaxTriple join_both(const SoftmaxTriple& of) const {
    SoftmaxTriple all;
    all.side[0] = joined(thread_, of.side[0], scale_, measured(), mean_q, needs_sum_at_1());
    all.side[1] = joined(thread_, of.side[1], scale_, measured(), mean_p, false);
    return all;
  }

  // Clean and noisy branch at temperature 1, and the student's sums where they are not gathered with the contrast.
  HKDFAST_HD void purify(float clean_label, SoftmaxTriple& found) {
    const bool by_entropy = task_.law.confidence == Confidence::entropy;
    const Scale at_1(1);
    LaneSums clean_sums, noisy_sums;
    sweep<true, false>([&](int at, int begin, int word) {
      const auto side = [&](LaneSums& r, const W& y, bool with_moment) {
        const float max_logit = largest(y);
        if (max_logit > r.bound) r.move(max_logit, at_1, 0.f);
        r.peak = fmaxf(r.peak, max_logit);
        F d[W::count];
        less(d, y, r.origin);
        take(r, d, at_1, with_moment);
      };
      side(clean_sums, clean(at, begin, word), by_entropy);
      side(noisy_sums, noisy(at, begin, word), false);
    });
    SoftmaxTriple mine;
    mine.side[1] = softmax(clean_sums, at_1, 0);
    mine.side[2] = softmax(noisy_sums, at_1, 0);
    found = reduced(mine, [&](const SoftmaxTriple& of) {
      SoftmaxTriple all;
      all.side[1] = joined(thread_, of.side[1], at_1, by_entropy, false, false);
      all.side[2] = joined(thread_, of.side[2], at_1, false, false, false);
      return all;
    });
    if (leader()) contrast_constants(found, clean_label);
    thread_.sync_block();
    if (task_.law.plausibility == 0 || task_.law.outside == Outside::drop) return;

    // the words of the set share their clean mass by their purified odds
    const Contrast contrast = constants().contrast;
    LaneSums mass, odds;
    sweep<false, false>([&](int at, int begin, int word) {
      W in = clean(at, begin, word), out = noisy(at, begin, word);
#pragma unroll
      for (int k = 0; k < W::count; ++k) {
        const float own = in.of[k] - contrast.clean_peak, other = out.of[k] - contrast.noisy_peak;
        const bool inside = own >= contrast.min_clean;
        in.of[k] = inside ? own : -INFINITY;
        out.of[k] = inside ? contrast.odds(own, other) : -INFINITY;
      }
      const auto side = [&](LaneSums& r, const W& y) {
        const float max_logit = largest(y);
        if (max_logit > r.bound) r.move(max_logit, at_1, 0.f);
        r.peak = fmaxf(r.peak, max_logit);
        F d[W::count];
        less(d, y, r.origin);
        take(r, d, at_1, false);
      };
      side(mass, in);
      side(odds, out);
    });
    mine.side[1] = softmax(mass, at_1, 0);
    mine.side[2] = softmax(odds, at_1, 0);
    const SoftmaxTriple set = reduced(mine, [&](const SoftmaxTriple& of) {
      SoftmaxTriple all;
      all.side[1] = joined(thread_, of.side[1], at_1, false, false, false);
      all.side[2] = joined(thread_, of.side[2], at_1, false, false, false);
      return all;
    });
    if (leader()) {
      const Softmax &m = set.side[1], &o = set.side[2];
      constants().contrast.inside =
          static_cast<float>((static_cast<double>(m.peak) - o.peak) + log(m.sum / o.sum) - log(found.side[1].sum));
    }
    thread_.sync_block();
  }

  HKDFAST_HD void contrast_constants(const SoftmaxTriple& found, float clean_label) {
    const Law& law = task_.law;
    const Softmax &clean = found.side[1], &noisy = found.side[2];
    const double log_clean = log(clean.sum), log_noisy = log(noisy.sum);
    if (law.confidence == Confidence::max_prob)
      confidence_ = 1 / clean.sum;
    else if (law.confidence == Confidence::target)
      confidence_ = exp(static_cast<double>(clean_label) - clean.peak - log_clean);
    else
      confidence_ = task_.vocab == 1 ? 1 : 1 - (log_clean - clean.moment / clean.sum) / log(static_cast<double>(task_.vocab));
    const double alpha = task_.alpha ? task_.alpha[row_] : 0;
    a_ = noisy.sum == noisy.sum ? contrast_weight(law, confidence_, alpha) : NAN;
    Contrast to;
    to.a = static_cast<float>(a_), to.extrapolate = law.mode == Mode::extrapolate;
    to.clean_peak = clean.peak, to.noisy_peak = finite(noisy.peak);
    // without a single noisy word every word stands alone, and their common constant is free
    to.clean_only_offset = noisy.sum == 0 ? 0.f : static_cast<float>(a_ * (to.extrapolate * log_clean - log_noisy));
    if (law.plausibility != 0) {
      to.min_clean = static_cast<float>(log(law.plausibility));
      to.outside = law.outside == Outside::drop ? -INFINITY : static_cast<float>(-log_clean);
    }
    constants().contrast = to;
  }

  HKDFAST_HD void row() {
    const bool by_label = leader() && task_.labels;
    float student_label = 0, clean_label = 0;
    if constexpr (distills)
      if (by_label && labeled()) student_label = label_logit(task_.student, task_.student_logits, false);
    if (PURIFIED && by_label && task_.law.confidence == Confidence::target)
      clean_label = label_logit(task_.teacher, task_.teacher_logits, task_.difference);
    SoftmaxTriple branches;
    if constexpr (PURIFIED) purify(clean_label, branches);
    if constexpr (distills)
      distill(student_label);
    else
      decode();
  }

  HKDFAST_HD void decode() {
    const Contrast contrast = constants().contrast;
    Pair r;
    sweep<false, false>([&](int at, int begin, int word) {
      const W z = teacher(at, begin, word, contrast);
      add_both<false, true>(r, z, z, begin + word);
    });
    const SoftmaxTriple all = reduced(record(r), [&](const SoftmaxTriple& of) { return join_both(of); });
    if (leader()) constants().peak_p = finite(all.side[1].peak), constants().shift = static_cast<float>(log(all.side[1].sum));
    thread_.sync_block();
    const float peak = constants().peak_p, log_sum = constants().shift;
    const Stored out = stored();
    sweep<false, true>([&](int at, int begin, int word) {
      W z = teacher(at, begin, word, contrast);
#pragma unroll
      for (int k = 0; k < W::count; ++k) z.of[k] = (z.of[k] - peak) * scale_.by - log_sum;
      out.store(begin + word, z);
    });
  }

  // The words of a step as a divergence wants them.
  struct Compare {
    Scale scale;
    RowConstants f;
    bool floored;

    // A share rounded to float would make every p off by the same part, which total variation sees near convergence.
    HKDFAST_HD static F shared(F e, float share, float low) {
      return FAST ? e * F(share) : fused(e, F(share), e * F(low));
    }

    HKDFAST_HD Word<F> operator()(float x, float y) const {
      const float to_q = x - f.peak_q;
      float to_p = y - f.peak_p;
      if (floored && x > -INFINITY && !(to_p > f.floor)) to_p = f.floor;
      return {shared(exp_(F(to_p), scale.rate), f.share_p, f.share_p_low), shared(exp_(F(to_q), scale.rate), f.share_q, f.share_q_low),
              fused(to_p - to_q, scale.by, -f.shift)};
    }

    // With log_constants.
    HKDFAST_HD float log_q(float x) const { return fused(x - f.peak_q, scale.rate.high, -f.rest_q); }
    HKDFAST_HD Logs logs(float x, float y) const {
      const float to_q = x - f.peak_q, to_p = y - f.peak_p;
      return {fused(to_p, scale.rate.high, -f.rest_p), log_q(x), fused(to_p - to_q, scale.rate.high, -f.rest_gap)};
    }
  };

  HKDFAST_HD Compare compare() const { return {scale_, constants(), floored()}; }

  struct Terms {
    double value = 0, slope = 0, share = 0;  // sums over the row; share: of q
  };

  HKDFAST_HD void distill(float student_label) {
    const bool wanted = task_.grad.data != nullptr;
    const Contrast contrast = PURIFIED ? constants().contrast : Contrast();
    Pair r;
    const auto both = [&](int at, int begin, int word) {
      const W x = student(at, begin, word), y = teacher(at, begin, word, contrast);
      add_both<true, true>(r, x, y, begin + word);
      if constexpr (stashes_contrast) stash(at, word, y);
    };
    if (mean_known() && !wanted)
      sweep<!PURIFIED, true>(both);
    else
      sweep<!PURIFIED, false>(both);
    const SoftmaxTriple found = reduced(record(r), [&](const SoftmaxTriple& of) { return join_both(of); });
    if (leader()) comparison_constants(found);

    Terms sums;
    if (!mean_known()) {
      thread_.sync_block();
      const Compare words = compare();
      KahanSum value, slope, share;
      const auto terms = [&](int at, int begin, int word) {
        const W x = student(at, begin, word), y = teacher_again(at, begin, word, contrast);
        if constexpr (stashes_tilts) {
          const Tilt<Divergence> tilted(divergence_);
          float values = 0, slopes = 0;
          W tilts;
#pragma unroll
          for (int k = 0; k < W::count; ++k) {
            const Tilted t = tilted(words.logs(x.of[k], y.of[k]));
            tilts.of[k] = fused(t.tilt, tilt_scale, -words.f.tilt);
            values = fused(t.weight, t.value, values), slopes = fused(t.q, tilts.of[k], slopes);
          }
          value.add(values), slope.add(slopes);
          if (wanted) stash_tilts(at, word, tilts);
        } else {
          F values[W::count], slopes[W::count], shares[W::count];
#pragma unroll
          for (int k = 0; k < W::count; ++k) {
            const Word<F> w = words(x.of[k], y.of[k]);
            const Term<F> term = divergence_(w);
            values[k] = term.value, slopes[k] = term.slope, shares[k] = w.q;
          }
          value.add(total(values)), slope.add(total(slopes));
          if (!FAST) share.add(total(shares));
        }
      };
      if (wanted)
        sweep<false, false>(terms);
      else
        sweep<false, true>(terms);
      SoftmaxTriple mine;
      mine.side[0].sum = value.total(), mine.side[0].moment = slope.total(), mine.side[0].gap = share.total();
      const Softmax all = reduced(mine, [&](const SoftmaxTriple& of) {
        SoftmaxTriple all;
        all.side[0].sum = thread_.sum(of.side[0].sum), all.side[0].moment = thread_.sum(of.side[0].moment);
        if (!FAST) all.side[0].gap = thread_.sum(of.side[0].gap);
        return all;
      }).side[0];
      sums = {all.sum, all.moment, all.gap};
    }
    if (leader()) result(found, sums, student_label);
    thread_.sync_block();
    if (wanted) gradient(contrast);
  }

  HKDFAST_HD void comparison_constants(const SoftmaxTriple& found) {
    const Softmax &q = found.side[0], &p = found.side[1];
    RowConstants& f = constants();
    f.peak_q = finite(q.peak), f.peak_p = finite(p.peak);
    if constexpr (stashes_tilts) {
      log_constants(q, p);
      return;
    }
    f.share_q = static_cast<float>(1 / q.sum), f.share_q_low = static_cast<float>(1 / q.sum - f.share_q);
    f.share_p = static_cast<float>(1 / p.sum), f.share_p_low = static_cast<float>(1 / p.sum - f.share_p);
    f.shift = static_cast<float>(log(p.sum / q.sum));
    f.floor = floored() ? static_cast<float>((task_.teacher_floor + log(p.sum)) * task_.temperature) : -INFINITY;
  }

  // The logarithm of a sum of float is rounded, which would make every p off by the same part. So most of it goes into the
  // origin, in parts of 2^-12, with which distances are still exact, and a small rest remains. Beyond 2^12 an origin has no
  // such parts: the rest is what it did not take.
  HKDFAST_HD void log_constants(const Softmax& q, const Softmax& p) {
    RowConstants& f = constants();
    const double rate = scale_.rate.high;
    double rest[2];
    const Softmax* const sides[] = {&q, &p};
    float* const origins[] = {&f.peak_q, &f.peak_p};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const double bits = log2(sides[i]->sum), part = floor((bits < 16 * rate ? bits / rate : 16) * 4096) / 4096;
      const double before = *origins[i];
      *origins[i] += static_cast<float>(part);
      rest[i] = bits - (*origins[i] - before) * rate;
    }
    f.rest_q = static_cast<float>(rest[0]), f.rest_p = static_cast<float>(rest[1]);
    f.rest_gap = static_cast<float>(rest[1] - rest[0]);
    f.tilt = Tilt<Divergence>(divergence_)(compare().logs(q.peak, q.other_at_peak)).tilt * tilt_scale;
  }

  // Loss and metrics of the row, and what its gradient is made of.
  HKDFAST_HD void result(const SoftmaxTriple& found, const Terms& sums, float student_label) {
    const Softmax &q = found.side[0], &p = found.side[1];
    RowConstants& f = constants();
    double value = sums.value;
    if constexpr (mean != Mean::none) {
      if (mean_known()) {
        const double gap = mean_p ? p.gap / p.sum : q.gap / q.sum;
        const double offset = (static_cast<double>(p.peak) - q.peak) / task_.temperature + log(p.sum / q.sum);
        value = divergence_.total(gap / task_.temperature - offset).value;
      }
    }
    if constexpr (stashes_tilts) value *= Tilt<Divergence>(divergence_).value_unit();
    // a divergence is never negative; near 0 the sum of its rounded terms can be
    if (value < 0) value = 0;
    // a NaN among the logits is one in these, whatever a divergence selects; they are 0 if every word is masked
    if (!(q.sum > 0) || !(p.sum > 0)) value = NAN;
    const double sum_at_1 = needs_sum_at_1() ? q.sum_at_1 : q.sum;
    const double target = labeled() ? static_cast<double>(student_label) - q.peak - log(sum_at_1) : 0;
    const float loss = static_cast<float>(task_.soft_weight * value - (task_.hard_weight != 0 ? task_.hard_weight * target : 0));
    if (writer()) {
      task_.loss[row_] = loss;
      if (measured()) {
        const double of[] = {value, -target, log(q.sum) - q.moment / q.sum, log(p.sum) - p.moment / p.sum,
                             PURIFIED ? confidence_ : 1 / p.sum, a_, q.word == p.word ? 1. : 0.};
#pragma unroll
        for (int i = 0; i < 7; ++i) task_.metrics[i * task_.n + row_] = static_cast<float>(of[i]);
      }
    }
    const float weight = task_.weight ? task_.weight[row_] : 1.f;
    f.blank = without_gradient(loss, weight);
    // The q of a row are rounded and do not add up to 1. The gradient must add up to 0 for all that.
    const double known_q = FAST && !stashes_tilts ? f.share_q * q.sum : 1, known_p = FAST && !stashes_tilts ? f.share_p * p.sum : 1;
    const double sum_q = FAST || mean_known() ? known_q : sums.share;
    double slope = (mean_known() && mean_p ? known_q - known_p : sums.slope) / sum_q;
    if (mean_known() && mean_q) {
      // Where q is nearly 1 its gap and the mean gap are nearly equal and may be large: the gap of that word is taken off
      // both before either is rounded.
      f.peak_p = q.other_at_peak, f.shift = 0;
      slope = (static_cast<double>(q.other_at_peak) - f.peak_q - q.gap / q.sum) / task_.temperature;
    }
    if (without_numbers(loss, weight)) slope = NAN;
    f.slope = static_cast<float>(slope), f.slope_low = static_cast<float>(slope - f.slope);
    f.soft_by = static_cast<float>(task_.soft_weight * weight / task_.temperature);
    if constexpr (stashes_tilts) f.soft_by *= static_cast<float>(Tilt<Divergence>(divergence_).slope_unit() / tilt_scale);
    f.hard_by = labeled() ? static_cast<float>(task_.hard_weight * weight) : 0.f;
    f.peak_1 = finite(q.peak), f.share_1 = static_cast<float>(1 / sum_at_1);
  }

  HKDFAST_HD void gradient(const Contrast& contrast) {
    const Compare words = compare();
    const RowConstants f = constants();
    const Stored out = stored();
    const int label = hard() && f.hard_by != 0.f ? static_cast<int>(task_.labels[row_]) : -1;
    sweep<false, true>([&](int at, int begin, int word) {
      if (f.blank) {
        if (!task_.accumulate) out.store(begin + word, W());
        return;
      }
      W before;
      if (task_.accumulate) before = out.load(begin + word);  // first: it is long under way
      const W x = student(at, begin, word);
      W g;
      if constexpr (stashes_tilts) {
        const W tilts = stashed_tilts(at, word);
#pragma unroll
        for (int k = 0; k < W::count; ++k)
          g.of[k] = approximate_exp2(words.log_q(x.of[k])) * fused(tilts.of[k], f.soft_by, -f.slope * f.soft_by);
      } else {
        const W y = teacher_again(at, begin, word, contrast);
#pragma unroll
        for (int k = 0; k < W::count; ++k) {
          // softmax Jacobian: d loss / d z = (slope - q * sum(slope)) / T
          const Word<F> w = words(x.of[k], y.of[k]);
          float slope = fused(plain(w.q), -f.slope, plain(divergence_(w).slope));
          if (!FAST) slope = fused(plain(w.q), -f.slope_low, slope);
          g.of[k] = slope * f.soft_by;
        }
      }
      if (KIND != Kind::narrow && label >= 0) {
        const Scale at_1(1);
#pragma unroll
        for (int k = 0; k < W::count; ++k) {
          g.of[k] = fused(plain(exp_(F(x.of[k] - f.peak_1), at_1.rate)), f.share_1 * f.hard_by, g.of[k]);
          if (begin + word + W::place(thread_.lane(), k) == label) g.of[k] -= f.hard_by;
        }
      }
      if (!FAST) backward(x, g);
      if (task_.accumulate) {
#pragma unroll
        for (int k = 0; k < W::count; ++k) g.of[k] += before.of[k];
      }
      out.store(begin + word, g);
    });
  }

  // From logits back to the tile's numbers.
  HKDFAST_HD void backward(const W& x, W& g) const {
    const float scale = task_.student_logits.scale, cap = task_.student_logits.softcap;
    if (cap > 0.f) {
#pragma unroll
      for (int k = 0; k < W::count; ++k) {
        const float part = x.of[k] / cap;
        g.of[k] *= scale * (1.f - part * part);
      }
    } else if (scale != 1.f) {
#pragma unroll
      for (int k = 0; k < W::count; ++k) g.of[k] *= scale;
    }
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

  HKDFAST_HD void blank() {
    if (writer() && task_.loss) {
      task_.loss[row_] = 0;
      for (int i = 0; measured() && i < 7; ++i) task_.metrics[i * task_.n + row_] = 0;
    }
    if (task_.grad.data && !task_.accumulate) ring_.template each_step<W::step>([out = stored()](int base) { out.store(base, W()); });
  }

  ThreadContext& thread_;
  const Task& task_;
  Divergence divergence_;
  Ring<ThreadContext> ring_;
  Scale scale_;
  std::int64_t row_ = 0;
  int turn_ = 0;
  double confidence_ = 0, a_ = 0;  // of the row, known to the leader
};

// Calls run with the instance for a task: its Kind, and whether there is a law.
template <class Divergence, class Run>
auto with_kind(const Task& task, bool purified, Divergence, Run run) {
  const auto with_law = [&](auto kind) {
    return purified ? run(kind, std::true_type()) : run(kind, std::false_type());
  };
  if constexpr (std::is_same_v<Divergence, Decode>) {
    return run(std::integral_constant<Kind, Kind::any>(), std::true_type());
  } else {
    switch (kind_of(task)) {
      case Kind::narrow: return with_law(std::integral_constant<Kind, Kind::narrow>());
      case Kind::wide: return with_law(std::integral_constant<Kind, Kind::wide>());
      default: return with_law(std::integral_constant<Kind, Kind::any>());
    }
  }
}

}  // namespace HKDFAST_ISA
}  // namespace hkdfast
