// The softmax sums of a row, gathered block by block and piece by piece, and what follows from them.
#pragma once
#include "../common/divergence.h"
#include "tiles.h"

namespace hkdfast {
namespace HKDFAST_ISA {

// Over some words of a row, with d = x - peak in logits.
struct Sums {
  float peak = -INFINITY;
  std::int64_t top = 0;  // the first word that has the peak: the arg max
  double sum = 0;        // of e^(scale d)
  double moment = 0;     // of d e^(scale d)
  double gap = 0;        // of (y - x) e^(scale d), y - x the teacher's logit less the student's

  double log_sum() const { return log(sum); }
  double lse(double scale) const { return peak * scale + log(sum); }
  double entropy(double scale) const { return log(sum) - scale * moment / sum; }
  // Masked words alone have no peak to take off; they add 0, and a NaN among them adds itself.
  float origin() const { return peak > -INFINITY ? peak : 0.f; }

  inline void move(float to, double scale) {
    if (sum != 0) {
      const double shift = static_cast<double>(peak) - to, factor = exp(shift * scale);
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

  // Takes note of the peak of the block that begins at begin; true if it is a new one.
  template <class Logits>
  inline bool raise(Logits x, int n, std::int64_t begin, double scale) {
    const float of_block = x.peak(n);
    if (!(of_block > peak)) return false;
    move(of_block, scale);
    int i = 0;
    while (!any(x(i) == of_block)) i += lanes;
    while (x.one(i) != of_block) ++i;
    top = begin + i;
    return true;
  }
};

// Adds a block of one tile at temperature 1 / scale.
template <bool with_moment = false>
inline void add(Sums& sums, Floats x, int n, std::int64_t begin, double scale) {
  sums.raise(x, n, begin, scale);
  const float origin = sums.origin();
  const Rate rate(scale);
  Sum sum, moment;
  each_lanes(
      n,
      [&](int i) {
        // peak first: x * scale - lse would round at the size of the logits, not of the answer
        const Lanes d = x(i) - origin, e = exp_(d, rate);
        sum.add(e);
        if (with_moment) moment.add_product(e, select(e > 0.f, d, Lanes{}));
      },
      [&] {
        sum.fold();
        if (with_moment) moment.fold();
      });
  sums.sum += sum.total();
  if (with_moment) sums.moment += moment.total();
}

inline double finite_or_0(double x) { return x - x == 0 ? x : 0; }

// Adds a block of student and teacher; mean says whose sums are to hold the gap.
template <bool with_moments, Mean mean, class Student, class Teacher>
inline void add(Sums& q, Sums& p, Student x, Teacher y, int n, std::int64_t begin, double scale) {
  const bool new_q = q.raise(x, n, begin, scale), new_p = p.raise(y, n, begin, scale);
  const float origin_x = q.origin(), origin_y = p.origin();
  const Rate rate(scale);
  Sum sum_q, sum_p, moment_q, moment_p, gaps;
  each_lanes(
      n,
      [&](int i) {
        const Lanes to_q = x(i) - origin_x, to_p = y(i) - origin_y;
        const Lanes of_q = exp_(to_q, rate), of_p = exp_(to_p, rate);
        sum_q.add(of_q), sum_p.add(of_p);
        if (with_moments) {
          moment_q.add_product(of_q, select(of_q > 0.f, to_q, Lanes{}));
          moment_p.add_product(of_p, select(of_p > 0.f, to_p, Lanes{}));
        }
        // a masked word's gap is infinite or NaN, and its probability 0
        if (mean == Mean::gap_under_q) gaps.add_product(of_q, select(of_q > 0.f, to_p - to_q, Lanes{}));
        if (mean == Mean::gap_under_p) gaps.add_product(of_p, select(of_p > 0.f, to_p - to_q, Lanes{}));
      },
      [&] {
        sum_q.fold(), sum_p.fold();
        if (with_moments) moment_q.fold(), moment_p.fold();
        if (mean != Mean::none) gaps.fold();
      });
  const double total_q = sum_q.total(), total_p = sum_p.total();
  q.sum += total_q, p.sum += total_p;
  if (with_moments) q.moment += moment_q.total(), p.moment += moment_p.total();
  if (mean == Mean::none) return;
  const bool by_q = mean == Mean::gap_under_q;
  Sums& lead = by_q ? q : p;
  lead.gap += gaps.total() + (static_cast<double>(origin_y) - origin_x) * (by_q ? total_q : total_p);
  if (by_q ? new_q : new_p) {
    // The most probable word may have nearly all of the probability: its gap is put right where it was rounded.
    const int top = static_cast<int>(lead.top - begin);
    const float to_q = x.one(top) - origin_x, to_p = y.one(top) - origin_y, rounded = to_p - to_q;
    const double exact = (static_cast<double>(y.one(top)) - origin_y) - (static_cast<double>(x.one(top)) - origin_x);
    lead.gap += finite_or_0(exact - rounded);
  }
}

}  // namespace HKDFAST_ISA
}  // namespace hkdfast
