// SEED's purification, once for both compilers: how sure the clean branch is, how strongly the disturbed one is
// subtracted, and the contrast of one word. hkdfast/ops/reference.py has the formulas and their sources.
#pragma once
#include "objective.h"
#include "number_math.h"

namespace hkdfast {
namespace HKDFAST_ISA {

// The weight a of the disturbed branch; alpha is the row's own weight, read by Weight::rows only.
HKDFAST_HD double purification(const Law& law, double confidence, double alpha) {
  if (law.weight == Weight::rows) return alpha;
  if (law.weight == Weight::linear) return law.alpha * (1 - confidence);
  if (law.weight == Weight::gate) return confidence < law.threshold ? law.alpha : 0;
  return law.alpha;
}

// The contrast of one word, with the constants of its row. own and other are clean and noisy logits less their peaks.
struct Contrast {
  float a = 0;
  float extrapolate = 1;  // 0: subtract
  float clean_peak = 0, noisy_peak = 0;
  float alone = 0;          // takes a word that only the clean branch has to the constant of the others
  float least = -INFINITY;  // the plausibility set: own >= least
  float inside = 0;         // added to the words of the set
  float outside = 0;        // added to the clean ones beyond it; -infinity drops them

  // log p_clean + a (log p_clean - log p_noisy), or log p_clean - a log p_noisy, up to a constant of the row
  template <class F>
  HKDFAST_HD F odds(F own, F other) const {
    const F gap = fused(extrapolate, own, -other);
    // two steps, for masked on both sides is NaN, and "and" is spelled differently for lanes
    const F both = select(other > -INFINITY, fused(a, gap, own), own + alone);
    return select(own > -INFINITY, both, own);
  }
  template <class F>
  HKDFAST_HD F operator()(F own, F other) const {
    return select(own >= least, odds(own, other) + inside, own + outside);
  }
};

}  // namespace HKDFAST_ISA
}  // namespace hkdfast
