// The last sweep over a row: its gradient.
#pragma once
#include "row_compare.h"

namespace hkdfast {
namespace HKDFAST_ISA {

template <class ThreadContext, class Divergence, Kind KIND, bool PURIFIED>
class RowGradient : protected RowCompare<ThreadContext, Divergence, KIND, PURIFIED> {
 protected:
  using Base = RowCompare<ThreadContext, Divergence, KIND, PURIFIED>;
  using Base::Base;
  using typename Base::Compare;
  using typename Base::F;
  using typename Base::Stored;
  using typename Base::W;
  using Base::FAST, Base::stashes_tilts;
  using Base::compare, Base::constants, Base::divergence_, Base::hard, Base::row_, Base::task_, Base::thread_;
  using Base::stashed_tilts, Base::stored, Base::student, Base::teacher_again;

  HKDFAST_HD void gradient(const Contrast& contrast) {
    const Compare words = compare();
    const RowConstants f = constants();
    const Stored out = stored();
    const int label = hard() && f.hard_by != 0.f ? static_cast<int>(task_.labels[row_]) : -1;
    this->template sweep<false, true>([&](int at, int begin, int word) {
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
};

}  // namespace HKDFAST_ISA
}  // namespace hkdfast
