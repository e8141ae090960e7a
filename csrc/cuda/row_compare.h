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
  using Base::FAST, Base::stashes_tilts, Base::tilt_scale;
  using Base::constants, Base::divergence_, Base::floored, Base::scale_, Base::task_;

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
};

}  // namespace HKDFAST_ISA
}  // namespace hkdfast
