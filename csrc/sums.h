// The softmax sums of a row, gathered block by block and piece by piece, and what follows from them.
#pragma once
#include "numbers.h"

namespace hkdfast {
namespace HKDFAST_ISA {

// Over some words of a row, with d = (x - peak) * scale.
struct Sums {
  float peak = -INFINITY;
  std::int64_t block = 0;  // where the block begins that has the peak first
  double sum = 0;          // of e^d
  double moment = 0;       // of d e^d
  double gap = 0;          // of (y - x) e^d, y - x the teacher's logit less the student's

  double log_sum() const { return log(sum); }
  double lse(double scale) const { return peak * scale + log(sum); }
  double entropy() const { return log(sum) - moment / sum; }

  inline void move(float to, double scale) {
    if (sum != 0) {
      const double shift = (static_cast<double>(peak) - to) * scale, factor = exp(shift);
      moment = factor * (moment + shift * sum), sum *= factor, gap *= factor;
    }
    peak = to;
  }

  // Later words of the same row, whose gap lacks the offset.
  inline void join(Sums later, double scale, double offset) {
    later.gap += offset * later.sum;
    if (later.peak > peak) {
      move(later.peak, scale);
      block = later.block;
    } else if (later.peak < peak) {
      later.move(peak, scale);
    }
    sum += later.sum, moment += later.moment, gap += later.gap;
  }
};

template <bool with_moment, bool with_gap>
inline void add_words(Sums& sums, const float* x, const float* gap, int n, float origin, float scale) {
  Sum sum, moment, mean;
  each_lanes(
      n,
      [&](int i) {
        // peak first: x * scale - lse would round at the size of the logits, not of the answer
        const Lanes d = (load(x + i) - origin) * scale, e = exp_(d);
        sum.add(e);
        if (with_moment) moment.add(e * select(e > 0.f, d, Lanes{}));
        if (with_gap) mean.add(e * select(e > 0.f, load(gap + i), Lanes{}));
      },
      [&] {
        sum.fold();
        if (with_moment) moment.fold();
        if (with_gap) mean.fold();
      });
  sums.sum += sum.total();
  if (with_moment) sums.moment += moment.total();
  if (with_gap) sums.gap += mean.total();
}

// A block of words that begins at begin; the moment and the mean gap only if they are wanted.
inline void add(Sums& sums, const float* x, int n, std::int64_t begin, float scale, bool with_moment = false,
                const float* gap = nullptr) {
  Lanes most = all(-INFINITY);
  each_lanes(n, [&](int i) { most = larger(load(x + i), most); });
  const float peak = largest(most);
  if (peak > sums.peak) {
    sums.move(peak, scale);
    sums.block = begin;
  }
  // Masked words alone have no peak to take off; they add 0, and a NaN among them adds itself.
  const float origin = sums.peak > -INFINITY ? sums.peak : 0.f;
  if (with_moment)
    gap ? add_words<true, true>(sums, x, gap, n, origin, scale) : add_words<true, false>(sums, x, gap, n, origin, scale);
  else
    gap ? add_words<false, true>(sums, x, gap, n, origin, scale) : add_words<false, false>(sums, x, gap, n, origin, scale);
}

}  // namespace HKDFAST_ISA
}  // namespace hkdfast
