// The softmax sums of a row: of a lane's words, and joined over the cluster.
#pragma once
#include "row_logits.h"

namespace hkdfast {
namespace HKDFAST_ISA {

template <class ThreadContext, class Divergence, Kind KIND, bool PURIFIED>
class RowSums : protected RowLogits<ThreadContext, Divergence, KIND, PURIFIED> {
 protected:
  using Base = RowLogits<ThreadContext, Divergence, KIND, PURIFIED>;
  using Base::Base;
  using typename Base::F;
  using typename Base::W;
  using Base::mean_p, Base::mean_q, Base::stashes_tilts;
  using Base::measured, Base::needs_sum_at_1, Base::scale_, Base::slack, Base::thread_, Base::reductions_;

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
    return reduce(thread_, reductions_, mine, join);
  }

  HKDFAST_HD SoftmaxTriple join_both(const SoftmaxTriple& of, int width) const {
    SoftmaxTriple all;
    const bool of_peak = measured() || mean_q || stashes_tilts;
    all.side[0] = joined(thread_, of.side[0], scale_, {of_peak, measured(), mean_q, needs_sum_at_1()}, width);
    all.side[1] = joined(thread_, of.side[1], scale_, {measured(), measured(), mean_p, false}, width);
    return all;
  }
};

}  // namespace HKDFAST_ISA
}  // namespace hkdfast
