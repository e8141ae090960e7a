// The divergences, once for both compilers: every row loop is a template over one of these.
// Each gives its value at one word and its slope, d value / d log q up to a multiple of q, in nats. The softmax
// Jacobian, slope_v - q_v sum(slope), removes any such multiple, so the one is taken that rounds least. A multiple that
// is a constant of the row is as free: the gap that ReverseKL's slope is made of may be taken less that of any one word.
#pragma once
#include "number_math.h"

namespace hkdfast {
namespace HKDFAST_ISA {

// One word of the vocabulary, or one in each lane. gap = log p - log q comes from the logits, not from p and q: near
// convergence it is small and their logarithms are not. It is infinite or NaN where a probability is 0.
template <class F>
struct Word {
  F p, q, gap;
};

template <class F>
struct Term {
  F value, slope;
};

// Whether the gradient of a row is 0: its weight is, or its loss is infinite.
HKDFAST_HD bool without_gradient(float loss, float weight) { return weight == 0.f || absolute(loss) == INFINITY; }

// Of any other row: whether all of its gradient is NaN, which its loss or its weight decides.
HKDFAST_HD bool without_numbers(float loss, float weight) { return loss != loss || weight - weight != 0.f; }

// What the sum over the vocabulary follows from, beside the two softmax sums: then no sweep is spent on it.
enum class Mean { none, gap_under_p, gap_under_q };

struct Total {
  double value, slope;
};

// KL(p || q), mass-covering.
struct ForwardKL {
  static constexpr Mean mean = Mean::gap_under_p;
  template <class F>
  HKDFAST_HD Term<F> operator()(Word<F> w) const {
    return {w.p * select(w.p > 0.f, w.gap, F{}), w.q - w.p};
  }
  HKDFAST_HD Total total(double mean_gap) const { return {mean_gap, 0}; }
};

// KL(q || p), mode-seeking.
struct ReverseKL {
  static constexpr Mean mean = Mean::gap_under_q;
  template <class F>
  HKDFAST_HD Term<F> operator()(Word<F> w) const {
    const F value = w.q * select(w.q > 0.f, -w.gap, F{});
    return {value, value};
  }
  HKDFAST_HD Total total(double mean_gap) const { return {-mean_gap, -mean_gap}; }
};

// m = beta p + (1 - beta) q, with p log(p / m) and q log(q / m). The larger of p and q is taken as the unit of the
// logarithm, so that a word which one side all but excludes does not cancel, and the smaller follows from the gap, so
// that near convergence the two logarithms cancel to second order and no rounding of p or q is left over.
template <class F>
struct Mixture {
  F m, p_log_p_m, q_log_q_m;

  HKDFAST_HD Mixture(Word<F> w, float beta) {
    const auto teacher_larger = w.p > w.q;
    const F larger = select(teacher_larger, w.p, w.q), smaller = select(teacher_larger, w.q, w.p);
    const F share = select(teacher_larger, F{} + (1.f - beta), F{} + beta);  // of the smaller
    const F distance = absolute(w.gap);
    const F log_larger = select(larger > 0.f, -log1p_(share * expm1_(-distance)), F{});
    const F log_smaller = select(smaller > 0.f, log_larger - distance, F{});
    m = fused(beta, w.p, (1.f - beta) * w.q);
    const F of_larger = larger * log_larger, of_smaller = smaller * log_smaller;
    p_log_p_m = select(teacher_larger, of_larger, of_smaller);
    q_log_q_m = select(teacher_larger, of_smaller, of_larger);
  }
};

// beta KL(p || m) + (1 - beta) KL(q || m), 0 < beta < 1.
struct JensenShannon {
  static constexpr Mean mean = Mean::none;
  float beta;
  template <class F>
  HKDFAST_HD Term<F> operator()(Word<F> w) const {
    const Mixture<F> mixture(w, beta);
    const F student = (1.f - beta) * mixture.q_log_q_m;
    return {fused(beta, mixture.p_log_p_m, student), student};
  }
};

// KL(p || m).
struct SkewKL {
  static constexpr Mean mean = Mean::none;
  float beta;
  template <class F>
  HKDFAST_HD Term<F> operator()(Word<F> w) const {
    const Mixture<F> mixture(w, beta);
    const F share = select(mixture.m > 0.f, (1.f - beta) * w.q / mixture.m, F{});
    return {mixture.p_log_p_m, -w.p * share};
  }
};

// KL(q || m).
struct SkewReverseKL {
  static constexpr Mean mean = Mean::none;
  float beta;
  template <class F>
  HKDFAST_HD Term<F> operator()(Word<F> w) const {
    const Mixture<F> mixture(w, beta);
    const F share = select(mixture.m > 0.f, (1.f - beta) * w.q / mixture.m, F{});
    return {mixture.q_log_q_m, fused(share, beta * (w.p - w.q), mixture.q_log_q_m)};
  }
};

// Half the L1 distance.
struct TotalVariation {
  static constexpr Mean mean = Mean::none;
  template <class F>
  HKDFAST_HD Term<F> operator()(Word<F> w) const {
    // from the gap: p and q are rounded, and near convergence their difference is that of the roundings
    const F larger = select(w.p > w.q, w.p, w.q), half = 0.5f * w.q;
    const F excess = larger * select(larger > 0.f, -expm1_(-absolute(w.gap)), F{});  // a NaN stays
    return {0.5f * excess, select(w.gap > 0.f, -half, select(w.gap < 0.f, half, F{}))};
  }
};

// Calls run with the divergence of this name; false if there is none.
template <class Run>
inline bool with_divergence(const char* name, float beta, Run run) {
  if (!strcmp(name, "forward_kl")) return run(ForwardKL{}), true;
  if (!strcmp(name, "reverse_kl")) return run(ReverseKL{}), true;
  if (!strcmp(name, "jensen_shannon")) return run(JensenShannon{beta}), true;
  if (!strcmp(name, "skew_kl")) return run(SkewKL{beta}), true;
  if (!strcmp(name, "skew_reverse_kl")) return run(SkewReverseKL{beta}), true;
  if (!strcmp(name, "total_variation")) return run(TotalVariation{}), true;
  return false;
}

}  // namespace HKDFAST_ISA
}  // namespace hkdfast
