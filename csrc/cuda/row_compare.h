// The words of student and teacher as a divergence takes them, from the constants that the sums of the row give.
#pragma once
#include "row_contrast.h"

namespace hkdfast {
namespace HKDFAST_ISA {

template <class ThreadContext, class Divergence, Kind KIND, bool PURIFIED>
class RowCompare : protected RowContrast<ThreadContext, Divergence, KIND, PURIFIED> {
 protected:
  using Base = RowContrast<ThreadContext, Divergence, KIND, PURIFIED>;
  using Base::Base;
  using typename Base::F;
  using Base::FAST, Base::mean, Base::mean_p, Base::stashes_tilts, Base::tilt_scale;
  using Base::constants, Base::divergence_, Base::scale_, Base::task_, Base::thread_;
  using Base::floored, Base::hard, Base::leader, Base::measured, Base::needs_sum_at_1;

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

  // Quotients and logarithms of a row's sums, for the first warp. Each is computed by another lane, all at once: a division
  // or a logarithm of doubles takes one lane as long as it takes all of them.
  struct Ratios {
    double per_q, per_p, per_at_1, per_temperature, mean_gap, moment_q, moment_p;
    double log_q, log_p, log_at_1, log_p_over_q;
  };
  HKDFAST_HD Ratios ratios(const SoftmaxTriple& found) const {
    const Softmax &q = found.side[0], &p = found.side[1];
    const double at_1 = needs_sum_at_1() ? q.sum_at_1 : q.sum;
    const double above[] = {1, 1, 1, p.sum, 1, mean_p ? p.gap : q.gap, q.moment, p.moment};
    const double below[] = {q.sum, p.sum, at_1, q.sum, task_.temperature, mean_p ? p.sum : q.sum, q.sum, p.sum};
    double a = 1, b = 1;
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (thread_.lane() == i) a = above[i], b = below[i];
    const double quotient = a / b, logarithm = log(thread_.lane() == 3 ? quotient : b);
    Ratios of = {};
    of.per_q = thread_.of_lane(quotient, 0), of.per_p = thread_.of_lane(quotient, 1);
    of.per_temperature = thread_.of_lane(quotient, 4);
    if (mean != Mean::none) of.mean_gap = thread_.of_lane(quotient, 5);
    of.log_p = thread_.of_lane(logarithm, 1), of.log_p_over_q = thread_.of_lane(logarithm, 3);
    if (hard()) of.per_at_1 = thread_.of_lane(quotient, 2), of.log_at_1 = thread_.of_lane(logarithm, 2);
    if (measured()) {
      of.log_q = thread_.of_lane(logarithm, 0);
      of.moment_q = thread_.of_lane(quotient, 6), of.moment_p = thread_.of_lane(quotient, 7);
    }
    return of;
  }

  // By the first warp.
  HKDFAST_HD void comparison_constants(const SoftmaxTriple& found, const Ratios& of) {
    const Softmax &q = found.side[0], &p = found.side[1];
    if constexpr (stashes_tilts) {
      log_constants(q, p);
    } else if (leader()) {
      RowConstants& f = constants();
      f.peak_q = finite(q.peak), f.peak_p = finite(p.peak);
      f.share_q = static_cast<float>(of.per_q), f.share_q_low = static_cast<float>(of.per_q - f.share_q);
      f.share_p = static_cast<float>(of.per_p), f.share_p_low = static_cast<float>(of.per_p - f.share_p);
      f.shift = static_cast<float>(of.log_p_over_q);
      f.floor = floored() ? static_cast<float>((task_.teacher_floor + of.log_p) * task_.temperature) : -INFINITY;
    }
  }

  // The logarithm of a sum of float is rounded, which would make every p off by the same part. So most of it goes into the
  // origin, in parts of 2^-12, with which distances are still exact, and a small rest remains. Beyond 2^12 an origin has no
  // such parts: the rest is what it did not take. Even lanes do it for the student, odd ones for the teacher.
  HKDFAST_HD void log_constants(const Softmax& q, const Softmax& p) {
    const double rate = scale_.rate.high;
    const bool of_p = thread_.lane() & 1;
    const float before = finite(of_p ? p.peak : q.peak);
    const double bits = log2(of_p ? p.sum : q.sum), part = floor((bits < 16 * rate ? bits / rate : 16) * 4096) / 4096;
    const float origin = before + static_cast<float>(part);
    const double rest = bits - (static_cast<double>(origin) - before) * rate;
    const double rest_q = thread_.of_lane(rest, 0), rest_p = thread_.of_lane(rest, 1), origin_p = thread_.of_lane(origin, 1);
    if (!leader()) return;
    RowConstants& f = constants();
    f.peak_q = origin, f.peak_p = static_cast<float>(origin_p);
    f.rest_q = static_cast<float>(rest_q), f.rest_p = static_cast<float>(rest_p);
    f.rest_gap = static_cast<float>(rest_p - rest_q);
    f.tilt = Tilt<Divergence>(divergence_)(compare().logs(q.peak, q.other_at_peak)).tilt * tilt_scale;
  }
};

}  // namespace HKDFAST_ISA
}  // namespace hkdfast
