// SEED's purification, once for both compilers: how sure the clean branch is, how strongly the noisy one is
// subtracted, and the contrast of one word. hkdfast/ops/reference.py has the formulas and their sources.
#pragma once
#include "objective.h"
#include "number_math.h"

namespace hkdfast {
namespace HKDFAST_ISA {

// The weight a of the noisy branch; alpha is the row's own weight, read by Schedule::per_row only.
HKDFAST_HD double contrast_weight(const Law& law, double confidence, double alpha) {
  if (law.schedule == Schedule::per_row) return alpha;
  if (law.schedule == Schedule::linear) return law.alpha * (1 - confidence);
  if (law.schedule == Schedule::gate) return confidence < law.threshold ? law.alpha : 0;
  return law.alpha;
}

// The contrast of one word, with the constants of its row. own and other are clean and noisy logits less their peaks.
struct Contrast {
  float a = 0;
  float extrapolate = 1;  // 0: subtract
  float clean_peak = 0, noisy_peak = 0;
  float clean_only_offset = 0;  // takes a token that only the clean branch has to the constant of the others
  float min_clean = -INFINITY;  // the plausibility set: own >= min_clean
  float inside = 0;         // added to the words of the set
  float outside = 0;        // added to the clean ones beyond it; -infinity drops them

  // log p_clean + a (log p_clean - log p_noisy), or log p_clean - a log p_noisy, up to a constant of the row
  template <class F>
  HKDFAST_HD F odds(F own, F other) const {
    const F gap = fused(extrapolate, own, -other);
    // two steps, for masked on both sides is NaN, and "and" is spelled differently for lanes
    const F both = select(other > -INFINITY, fused(a, gap, own), own + clean_only_offset);
    return select(own > -INFINITY, both, own);
  }
  template <class F>
  HKDFAST_HD F operator()(F own, F other) const {
    return select(own >= min_clean, odds(own, other) + inside, own + outside);
  }
};

}  // namespace HKDFAST_ISA
}  // namespace hkdfast
