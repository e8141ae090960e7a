// With a law: the softmax sums of the clean and the noisy branch, from them what contrasts the two, and the contrast as an
// operation of its own.
#pragma once
#include "row_sums.h"

namespace hkdfast {
namespace HKDFAST_ISA {

template <class ThreadContext, class Divergence, Kind KIND, bool PURIFIED>
class RowContrast : protected RowSums<ThreadContext, Divergence, KIND, PURIFIED> {
 protected:
  using Base = RowSums<ThreadContext, Divergence, KIND, PURIFIED>;
  using Base::Base;
  using typename Base::F;
  using typename Base::Pair;
  using typename Base::Stored;
  using typename Base::W;
  using Base::a_, Base::confidence_, Base::row_, Base::scale_, Base::task_, Base::thread_;
  using Base::clean, Base::constants, Base::leader, Base::noisy, Base::stored, Base::teacher;
  using Base::join_both, Base::less, Base::record, Base::reduced, Base::take;

  // Clean and noisy branch at temperature 1, and the student's sums where they are not gathered with the contrast.
  HKDFAST_HD void purify(float clean_label, SoftmaxTriple& found) {
    const bool by_entropy = task_.law.confidence == Confidence::entropy;
    const Scale at_1(1);
    LaneSums clean_sums, noisy_sums;
    this->template sweep<true, false>([&](int at, int begin, int word) {
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
    found = reduced(mine, [&](const SoftmaxTriple& of, int width) {
      SoftmaxTriple all;
      all.side[1] = joined(thread_, of.side[1], at_1, {false, by_entropy, false, false}, width);
      all.side[2] = joined(thread_, of.side[2], at_1, {false, false, false, false}, width);
      return all;
    });
    if (leader()) contrast_constants(found, clean_label);
    thread_.sync_block();
    if (task_.law.plausibility == 0 || task_.law.outside == Outside::drop) return;

    // the words of the set share their clean mass by their purified odds
    const Contrast contrast = constants().contrast;
    LaneSums mass, odds;
    this->template sweep<false, false>([&](int at, int begin, int word) {
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
    const SoftmaxTriple set = reduced(mine, [&](const SoftmaxTriple& of, int width) {
      SoftmaxTriple all;
      all.side[1] = joined(thread_, of.side[1], at_1, {false, false, false, false}, width);
      all.side[2] = joined(thread_, of.side[2], at_1, {false, false, false, false}, width);
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
    // without a single noisy token there is no contrast to compare with, and the common constant is free
    to.clean_only_offset = noisy.sum == 0 ? 0.f : static_cast<float>(a_ * (to.extrapolate * log_clean - log_noisy));
    if (law.plausibility != 0) {
      to.min_clean = static_cast<float>(log(law.plausibility));
      to.outside = law.outside == Outside::drop ? -INFINITY : static_cast<float>(-log_clean);
    }
    constants().contrast = to;
  }

  HKDFAST_HD void decode() {
    const Contrast contrast = constants().contrast;
    Pair r;
    this->template sweep<false, false>([&](int at, int begin, int word) {
      const W z = teacher(at, begin, word, contrast);
      this->template add_both<false, true>(r, z, z, begin + word);
    });
    const SoftmaxTriple all = reduced(record(r), [&](const SoftmaxTriple& of, int width) { return join_both(of, width); });
    if (leader()) constants().peak_p = finite(all.side[1].peak), constants().shift = static_cast<float>(log(all.side[1].sum));
    thread_.sync_block();
    const float peak = constants().peak_p, log_sum = constants().shift;
    const Stored out = stored();
    this->template sweep<false, true>([&](int at, int begin, int word) {
      W z = teacher(at, begin, word, contrast);
#pragma unroll
      for (int k = 0; k < W::count; ++k) z.of[k] = (z.of[k] - peak) * scale_.by - log_sum;
      out.store(begin + word, z);
    });
  }
};

}  // namespace HKDFAST_ISA
}  // namespace hkdfast
