// The softmax sums of a row, gathered block by block and piece by piece, and what follows from them.
#pragma once
#include "numbers.h"

namespace hkdfast {
namespace HKDFAST_ISA {

// Over some words of a row, with d = (x - peak) * scale.
struct Sums {
  float peak = -INFINITY;
  std::int64_t top = 0;  // the first word that has the peak: the arg max
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

  // Later words of the same row.
  inline void join(Sums later, double scale) {
    if (later.peak > peak) {
      move(later.peak, scale);
      top = later.top;
    } else if (later.peak < peak) {
      later.move(peak, scale);
    }
    sum += later.sum, moment += later.moment, gap += later.gap;
  }
};

// Takes note of the peak of the block that begins at begin; true if it is a new one.
inline bool raise(Sums& sums, const float* x, int n, std::int64_t begin, float scale) {
  Lanes most = all(-INFINITY);
  each_lanes(n, [&](int i) { most = larger(load(x + i), most); });
  const float peak = largest(most);
  if (!(peak > sums.peak)) return false;
  sums.move(peak, scale);
  int i = 0;
  while (x[i] != peak) ++i;
  sums.top = begin + i;
  return true;
}

inline float finite_or_0(float x) { return x - x == 0.f ? x : 0.f; }

// The teacher's logits less the student's. Those of one word are taken off first, so that a common shift of either side
// does not round the difference; the most probable word, whose own gap is then exact and may be all there is.
struct Gap {
  const float *x = nullptr, *y = nullptr;
  float top_x = 0, top_y = 0;

  void top(int i) { top_x = finite_or_0(x[i]), top_y = finite_or_0(y[i]); }
  HKDFAST_HD Lanes operator()(int i) const { return (load(y + i) - top_y) - (load(x + i) - top_x); }
  double offset() const { return static_cast<double>(top_y) - top_x; }
};

template <bool with_moment, bool with_gap>
inline void add_words(Sums& sums, const float* x, const Gap* gap, int n, float origin, float scale) {
  Sum sum, moment, mean;
  each_lanes(
      n,
      [&](int i) {
        // peak first: x * scale - lse would round at the size of the logits, not of the answer
        const Lanes d = (load(x + i) - origin) * scale, e = exp_(d);
        sum.add(e);
        if (with_moment) moment.add(e * select(e > 0.f, d, Lanes{}));
        if (with_gap) mean.add(e * select(e > 0.f, (*gap)(i), Lanes{}));
      },
      [&] {
        sum.fold();
        if (with_moment) moment.fold();
        if (with_gap) mean.fold();
      });
  const double total = sum.total();
  sums.sum += total;
  if (with_moment) sums.moment += moment.total();
  if (with_gap) sums.gap += mean.total() + gap->offset() * total;
}

// Adds a block whose peak is noted; the moment and the mean gap only if they are wanted.
inline void add(Sums& sums, const float* x, int n, float scale, bool with_moment = false, const Gap* gap = nullptr) {
  // Masked words alone have no peak to take off; they add 0, and a NaN among them adds itself.
  const float origin = sums.peak > -INFINITY ? sums.peak : 0.f;
  if (with_moment)
    gap ? add_words<true, true>(sums, x, gap, n, origin, scale) : add_words<true, false>(sums, x, gap, n, origin, scale);
  else
    gap ? add_words<false, true>(sums, x, gap, n, origin, scale) : add_words<false, false>(sums, x, gap, n, origin, scale);
}

inline void raise_and_add(Sums& sums, const float* x, int n, std::int64_t begin, float scale, bool with_moment = false) {
  raise(sums, x, n, begin, scale);
  add(sums, x, n, scale, with_moment);
}

}  // namespace HKDFAST_ISA
}  // namespace hkdfast
