// The sweeps that compare student and teacher, and what their sums give: loss, metrics and the constants of the gradient.
#pragma once
#include "row_gradient.h"

namespace hkdfast {
namespace HKDFAST_ISA {

template <class ThreadContext, class Divergence, Kind KIND, bool PURIFIED>
class RowDistill : protected RowGradient<ThreadContext, Divergence, KIND, PURIFIED> {
 protected:
  using Base = RowGradient<ThreadContext, Divergence, KIND, PURIFIED>;
  using Base::Base;
  using typename Base::Compare;
  using typename Base::F;
  using typename Base::Pair;
  using typename Base::Ratios;
  using typename Base::W;
  using Base::FAST, Base::mean, Base::mean_p, Base::mean_q, Base::stashes_contrast, Base::stashes_tilts, Base::tilt_scale;
  using Base::a_, Base::confidence_, Base::divergence_, Base::row_, Base::scale_, Base::task_, Base::thread_;
  using Base::constants, Base::labeled, Base::leader, Base::mean_known, Base::measured, Base::writer;
  using Base::compare, Base::comparison_constants, Base::gradient, Base::join_both, Base::ratios, Base::record, Base::reduced;
  using Base::stash, Base::stash_tilts, Base::student, Base::teacher, Base::teacher_again;

  struct Terms {
    double value = 0, slope = 0, share = 0;  // sums over the row; share: of q
  };

  HKDFAST_HD void distill(float student_label) {
    const bool wanted = task_.grad.data != nullptr;
    const Contrast contrast = PURIFIED ? constants().contrast : Contrast();
    Pair r;
    const auto both = [&](int at, int begin, int word) {
      const W x = student(at, begin, word), y = teacher(at, begin, word, contrast);
      this->template add_both<true, true>(r, x, y, begin + word);
      if constexpr (stashes_contrast) stash(at, word, y);
    };
    if (mean_known() && !wanted)
      this->template sweep<!PURIFIED, true>(both);
    else
      this->template sweep<!PURIFIED, false>(both);
    const SoftmaxTriple found = reduced(record(r), [&](const SoftmaxTriple& of, int width) { return join_both(of, width); });
    const bool first_warp = thread_.warp() == 0;
    Ratios of = {};
    if (first_warp) {
      if (!stashes_tilts) of = ratios(found);
      comparison_constants(found, of);
    }

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
        this->template sweep<false, false>(terms);
      else
        this->template sweep<false, true>(terms);
      SoftmaxTriple mine;
      mine.side[0].sum = value.total(), mine.side[0].moment = slope.total(), mine.side[0].gap = share.total();
      const Softmax all = reduced(mine, [&](const SoftmaxTriple& of, int width) {
        double of_row[] = {of.side[0].sum, of.side[0].moment, of.side[0].gap};
        thread_.sum(of_row, {true, true, !FAST}, width);
        SoftmaxTriple all;
        all.side[0].sum = of_row[0], all.side[0].moment = of_row[1], all.side[0].gap = of_row[2];
        return all;
      }).side[0];
      sums = {all.sum, all.moment, all.gap};
    }
    if (first_warp && !mean_known()) of = ratios(found);  // again: they would take registers from the sweep
    if (leader()) result(found, of, sums, student_label);
    thread_.sync_block();
    if (wanted) gradient(contrast);
  }

  // Loss and metrics of the row, and what its gradient is made of.
  HKDFAST_HD void result(const SoftmaxTriple& found, const Ratios& of, const Terms& sums, float student_label) {
    const Softmax &q = found.side[0], &p = found.side[1];
    RowConstants& f = constants();
    double value = sums.value;
    if constexpr (mean != Mean::none) {
      if (mean_known()) {
        const double offset = (static_cast<double>(p.peak) - q.peak) * of.per_temperature + of.log_p_over_q;
        value = divergence_.total(of.mean_gap * of.per_temperature - offset).value;
      }
    }
    if constexpr (stashes_tilts) value *= Tilt<Divergence>(divergence_).value_unit();
    // a divergence is never negative; near 0 the sum of its rounded terms can be
    if (value < 0) value = 0;
    // a NaN among the logits is one in these, whatever a divergence selects; they are 0 if every word is masked
    if (!(q.sum > 0) || !(p.sum > 0)) value = NAN;
    const double target = labeled() ? static_cast<double>(student_label) - q.peak - of.log_at_1 : 0;
    const float loss = static_cast<float>(task_.soft_weight * value - (task_.hard_weight != 0 ? task_.hard_weight * target : 0));
    if (writer()) {
      task_.loss[row_] = loss;
      if (measured()) {
        const double metrics[] = {value, -target, of.log_q - of.moment_q, of.log_p - of.moment_p,
                                  PURIFIED ? confidence_ : of.per_p, a_, q.word == p.word ? 1. : 0.};
#pragma unroll
        for (int i = 0; i < 7; ++i) task_.metrics[i * task_.n + row_] = static_cast<float>(metrics[i]);
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
      slope = (static_cast<double>(q.other_at_peak) - f.peak_q - of.mean_gap) * of.per_temperature;
    }
    if (without_numbers(loss, weight)) slope = NAN;
    f.slope = static_cast<float>(slope), f.slope_low = static_cast<float>(slope - f.slope);
    f.soft_by = static_cast<float>(task_.soft_weight * weight * of.per_temperature);
    if constexpr (stashes_tilts) f.soft_by *= static_cast<float>(Tilt<Divergence>(divergence_).slope_unit() / tilt_scale);
    f.hard_by = labeled() ? static_cast<float>(task_.hard_weight * weight) : 0.f;
    f.peak_1 = finite(q.peak), f.share_1 = static_cast<float>(of.per_at_1);
  }
};

}  // namespace HKDFAST_ISA
}  // namespace hkdfast
