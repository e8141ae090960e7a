// float with the GPU's approximate functions: for tiles of 16-bit numbers, whose own rounding is 2^13 times larger.
#pragma once
#include "../common/divergence.h"
#include "../common/contrast_rule.h"

namespace hkdfast {
namespace HKDFAST_ISA {

#ifndef __CUDA_ARCH__
// Off by up to 2^-22 of size, as the GPU's result may be; in which direction follows from x.
inline float perturbed(float x, float size) {
  const std::uint32_t mixed = static_cast<std::uint32_t>(bits_of(x)) * 2654435761u;
  return x + size * 2.38418579e-7f * (static_cast<float>(mixed >> 8) * 1.1920929e-7f - 1.f);
}
#endif

// Within 2^-22, relative; subnormal results are 0, and 1 is exact.
HKDFAST_HD float approximate_exp2(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  if (x == 0.f || x < -126.f) return x == 0.f ? 1.f : 0.f;
  const float y = exp2f(x);
  return y - y == 0.f ? perturbed(y, y) : y;
#endif
}

// Within 2^-22, absolute near 1 and relative elsewhere; 0 is exact.
HKDFAST_HD float approximate_log2(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  const float y = log2f(x);
  return y == 0.f || y - y != 0.f ? y : perturbed(y, x > 0.5f && x < 2.f ? 1.f : y);
#endif
}

HKDFAST_HD float approximate_quotient(float a, float b) {
#ifdef __CUDA_ARCH__
  float y;
  asm("div.approx.ftz.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
#else
  const float y = a / b;
  return y - y == 0.f ? perturbed(y, y) : y;
#endif
}

struct Fast {
  float x;

  Fast() = default;
  HKDFAST_HD Fast(float x) : x(x) {}
};

HKDFAST_HD Fast operator+(Fast a, Fast b) { return a.x + b.x; }
HKDFAST_HD Fast operator-(Fast a, Fast b) { return a.x - b.x; }
HKDFAST_HD Fast operator-(Fast a) { return -a.x; }
HKDFAST_HD Fast operator*(Fast a, Fast b) { return a.x * b.x; }
HKDFAST_HD Fast operator/(Fast a, Fast b) { return approximate_quotient(a.x, b.x); }
HKDFAST_HD bool operator<(Fast a, Fast b) { return a.x < b.x; }
HKDFAST_HD bool operator>(Fast a, Fast b) { return a.x > b.x; }
HKDFAST_HD bool operator>=(Fast a, Fast b) { return a.x >= b.x; }
HKDFAST_HD Fast select(bool mask, Fast a, Fast b) { return mask ? a.x : b.x; }
HKDFAST_HD Fast absolute(Fast a) { return fabsf(a.x); }
HKDFAST_HD Fast fused(Fast a, Fast b, Fast c) { return fused(a.x, b.x, c.x); }
HKDFAST_HD Fast exp_(Fast d, Rate rate) { return approximate_exp2(d.x * rate.high); }

HKDFAST_HD Fast expm1_(Fast a) {
  const float x = a.x;
  float series = fused(x, 0.00833333333f, 0.0416666667f);
  series = fused(series, x, 0.166666667f);
  series = fused(series, x, 0.5f);
  return select(x > -0.0625f && x < 0.0625f, fused(series, x * x, x), approximate_exp2(x * 1.44269504f) - 1.f);
}

HKDFAST_HD float plain(float x) { return x; }
HKDFAST_HD float plain(Fast x) { return x.x; }

// A word's mixture, as Mixture in common/divergence.h but in bits, with the ratio of p and q straight from the gap, by two
// approximate functions. The gap is bounded, so that a word that one side lacks costs it 0 without a selection.
struct Blend {
  bool teacher_larger;
  float larger, distance, ratio;  // of p and q; the smaller is ratio times the larger
  float part, m;                  // what the smaller adds to the mixture, and the mixture, in units of the larger
  float log_m;                    // of m

  HKDFAST_HD Blend(float larger, float gap, float beta) : larger(larger) {
    teacher_larger = gap > 0.f;
    distance = fminf(fabsf(gap), 200.f);
    ratio = approximate_exp2(-distance);
    part = (teacher_larger ? 1.f - beta : beta) * ratio;
    m = part + (teacher_larger ? beta : 1.f - beta);
    log_m = approximate_log2(m);
  }
  HKDFAST_HD float p() const { return teacher_larger ? larger : larger * ratio; }
  HKDFAST_HD float q() const { return teacher_larger ? larger * ratio : larger; }
  HKDFAST_HD float log_m_over_p() const { return log_m + (teacher_larger ? 0.f : distance); }
  HKDFAST_HD float log_m_over_q() const { return log_m + (teacher_larger ? distance : 0.f); }
};

constexpr float nats_of_a_bit = 0.693147181f, bits_of_a_nat = 1.44269504f;

template <>
HKDFAST_HD Term<Fast> SkewKL::operator()(Word<Fast> w) const {
  const Blend b(fmaxf(w.p.x, w.q.x), w.gap.x * bits_of_a_nat, beta);
  return {b.p() * (-nats_of_a_bit * b.log_m_over_p()), (beta - 1.f) * b.larger * approximate_quotient(b.ratio, b.m)};
}

// Divergences whose slope is q times a tilt that rounds to 16 bits without harm, once that of the student's most probable
// word is taken off: then the sweep that sums the terms keeps it for the gradient.
template <class Divergence>
struct Tilt {
  static constexpr bool stashed = false;
};

struct Logs {
  float p, q, gap;  // logarithms in bits; gap as in Word
};

// A word's value is weight * value, its slope q * tilt, each in a unit of the divergence.
struct Tilted {
  float weight, value, q, tilt;
};

template <>
struct Tilt<JensenShannon> {
  static constexpr bool stashed = true;
  float beta;

  HKDFAST_HD explicit Tilt(JensenShannon divergence) : beta(divergence.beta) {}
  HKDFAST_HD Tilted operator()(const Logs& log) const {
    const Blend b(approximate_exp2(fmaxf(log.p, log.q)), log.gap, beta);
    return {b.larger, fused(b.m, b.log_m, b.part * b.distance), b.q(), b.log_m_over_q()};
  }
  HKDFAST_HD double value_unit() const { return -nats_of_a_bit; }
  HKDFAST_HD double slope_unit() const { return (beta - 1.) * nats_of_a_bit; }
};

template <>
struct Tilt<SkewReverseKL> {
  static constexpr bool stashed = true;
  float beta;

  HKDFAST_HD explicit Tilt(SkewReverseKL divergence) : beta(divergence.beta) {}
  HKDFAST_HD Tilted operator()(const Logs& log) const {
    const Blend b(approximate_exp2(fmaxf(log.p, log.q)), log.gap, beta);
    const float p_over_m = approximate_quotient(b.teacher_larger ? 1.f : b.ratio, b.m), q = b.q();
    return {q, b.log_m_over_q(), q, fused(p_over_m, -bits_of_a_nat * beta, b.log_m_over_q())};
  }
  HKDFAST_HD double value_unit() const { return -nats_of_a_bit; }
  HKDFAST_HD double slope_unit() const { return -nats_of_a_bit; }
};

}  // namespace HKDFAST_ISA
}  // namespace hkdfast
