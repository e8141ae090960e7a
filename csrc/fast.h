// float with the GPU's approximate functions: for tiles of 16-bit numbers, whose own rounding is 2^13 times larger.
#pragma once
#include "divergence.h"
#include "law.h"

namespace hkdfast {
namespace HKDFAST_ISA {

#ifndef __CUDA_ARCH__
// Off by up to 2^-22 of size, as the GPU's result may be; in which direction follows from x.
inline float disturbed(float x, float size) {
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
  return y - y == 0.f ? disturbed(y, y) : y;
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
  return y == 0.f || y - y != 0.f ? y : disturbed(y, x > 0.5f && x < 2.f ? 1.f : y);
#endif
}

HKDFAST_HD float approximate_quotient(float a, float b) {
#ifdef __CUDA_ARCH__
  float y;
  asm("div.approx.ftz.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
#else
  const float y = a / b;
  return y - y == 0.f ? disturbed(y, y) : y;
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

// The logarithm of a rounded sum, and what the rounding lost; near 0 the series, to which no absolute error adds.
HKDFAST_HD Fast log1p_(Fast a) {
  const float x = a.x, sum = 1.f + x, far = fused(approximate_log2(sum), 0.693147181f, x - (sum - 1.f));
  float series = fused(x, 0.2f, -0.25f);
  series = fused(series, x, 0.333333333f);
  series = fused(series, x, -0.5f);
  return select(x > -0.03125f && x < 0.03125f, fused(series, x * x, x), far);
}

HKDFAST_HD Fast expm1_(Fast a) {
  const float x = a.x;
  float series = fused(x, 0.00833333333f, 0.0416666667f);
  series = fused(series, x, 0.166666667f);
  series = fused(series, x, 0.5f);
  return select(x > -0.0625f && x < 0.0625f, fused(series, x * x, x), approximate_exp2(x * 1.44269504f) - 1.f);
}

HKDFAST_HD float plain(float x) { return x; }
HKDFAST_HD float plain(Fast x) { return x.x; }

// As in divergence.h, with the ratio of p and q straight from the gap, by two approximate functions. The gap is
// bounded, so that a word that one side lacks costs it 0 without a selection.
template <>
struct Mixture<Fast> {
  Fast m, p_log_p_m, q_log_q_m;

  HKDFAST_HD Mixture(Word<Fast> w, float beta) {
    const float p = w.p.x, q = w.q.x, distance = fminf(fabsf(w.gap.x), 200.f), larger = fmaxf(p, q);
    const bool teacher_larger = w.gap.x > 0.f;
    const float ratio = approximate_exp2(distance * -1.44269504f);
    const float x = (teacher_larger ? 1.f - beta : beta) * (ratio - 1.f), sum = 1.f + x;
    const float log_m = fused(approximate_log2(sum), 0.693147181f, x - (sum - 1.f));  // less that of the larger
    const float of_larger = larger > 0.f ? larger * -log_m : 0.f, of_smaller = larger * ratio * (-log_m - distance);
    m = fused(beta, p, (1.f - beta) * q);
    p_log_p_m = teacher_larger ? of_larger : of_smaller;
    q_log_q_m = teacher_larger ? of_smaller : of_larger;
  }
};

}  // namespace HKDFAST_ISA
}  // namespace hkdfast
