// Elementary functions and the two 16-bit float formats. F is float, or Lanes of floats on the CPU.
#pragma once
#include "simd.h"

namespace hkdfast {
namespace HKDFAST_ISA {

// A factor on the way to a power of 2: scale * log2(e), in two floats.
struct Rate {
  float high, low;
  float min_argument;  // below it a power is 0

  HKDFAST_HD explicit constexpr Rate(double scale)
      : high(static_cast<float>(scale * 1.4426950408889634)),
        low(static_cast<float>(scale * 1.4426950408889634 - high)),
        min_argument(static_cast<float>(-200 / scale)) {}
};

// e^(scale d) = 2^n (1 + r p), |r| <= 1/2.
template <class F>
struct Exponential {
  Power<F> power;
  F r, p;

  HKDFAST_HD Exponential(F d, Rate rate) : Exponential(Power<F>::bounded(d, rate.min_argument), rate.high, rate.low) {}

 private:
  HKDFAST_HD Exponential(F d, float high, float low) : power(d, high) {
    r = fused(d, low, fused(d, high, -power.n));
    p = fused(r, 0.000153531786f, 0.001339912997f);
    p = fused(p, r, 0.009618439712f);
    p = fused(p, r, 0.055503319949f);
    p = fused(p, r, 0.240226477385f);
    p = fused(p, r, 0.693147182465f);
  }
};

// e^(scale d) for scale d <= 88; 0 for -infinity, and NaN stays NaN. Within 1 ulp down to 1e-37; without a fused
// multiply-add scale d is rounded first, which is 2 ulp at e^-5 and 23 at e^-80.
template <class F>
HKDFAST_HD F exp_(F d, Rate rate) {
#ifdef __CUDA_ARCH__
  return exp2f(fmaf(d, rate.high, d * rate.low));
#else
  const Exponential<F> e(d, rate);
  return e.power.times(fused(e.p, e.r, 1.f));
#endif
}

// e^x - 1 for x <= 0, within 2 ulp.
template <class F>
HKDFAST_HD F expm1_(F x) {
#ifdef __CUDA_ARCH__
  return expm1f(x);
#else
  const Exponential<F> e(select(x < -80.f, F{} - 80.f, x), Rate(1));
  const F power = e.power.times(F{} + 1.f);
  return fused(e.r * e.p, power, power - 1.f);
#endif
}

// log(1 + a) for -1 <= a <= 1, within 1 ulp.
template <class F>
HKDFAST_HD F log1p_(F a) {
#ifdef __CUDA_ARCH__
  return log1pf(a);
#else
  const F s = 1.f + a;
  // s = 2^e (1 + f) with 1 + f between sqrt(1/2) and sqrt(2); without an exponent f is a itself, before it was rounded
  constexpr std::int32_t half = 0x3f3504f3;  // sqrt(1/2)
  const auto offset = bits_of(s) - half, e = offset >> 23;
  const F f = select(e == 0, a, float_of((offset & 0x7fffff) + half) - 1.f), n = to_float(e), square = f * f;
  F p = fused(f, -0.076344937f, 0.127615750f);
  p = fused(p, f, -0.131601825f);
  p = fused(p, f, 0.142017588f);
  p = fused(p, f, -0.166233569f);
  p = fused(p, f, 0.200012267f);
  p = fused(p, f, -0.250008196f);
  p = fused(p, f, 0.333333313f);
  const F log_f = f + fused(n, -2.12194440e-4f, fused(f * square, p, -0.5f * square));
  return select(s > 0.f, fused(n, 0.693359375f, log_f), F{} - INFINITY);
#endif
}

// tanh(x), within 2 ulp.
template <class F>
HKDFAST_HD F tanh_(F x) {
#ifdef __CUDA_ARCH__
  return tanhf(x);
#else
  const F size = absolute(x), square = x * x;
  F p = fused(square, -0.005528633948f, 0.020483316853f);
  p = fused(p, square, -0.053692966700f);
  p = fused(p, square, 0.133308991790f);
  p = fused(p, square, -0.333332628012f);
  const F e = exp_(-size, Rate(2)), far = (1.f - e) / (1.f + e);
  return select(size < 0.65f, fused(x * square, p, x), select(x < 0.f, -far, far));
#endif
}

HKDFAST_HD float from_bf16(std::uint16_t h) { return float_of(static_cast<std::int32_t>(h) << 16); }

// To nearest even; a NaN keeps its sign and its upper bits.
HKDFAST_HD std::uint16_t to_bf16(float x) {
  const std::uint32_t u = bits_of(x);
  return static_cast<std::uint16_t>((x == x ? u + 0x7fff + ((u >> 16) & 1) : u | 0x400000) >> 16);
}

HKDFAST_HD float from_fp16(std::uint16_t h) {
  // Exponent and fraction moved into a float stand for 2^-112 of the value, subnormals included.
  const float size = float_of((h & 0x7fff) << 13) * 5.192296858534828e33f;
  const std::uint32_t u = bits_of(size), sign = static_cast<std::uint32_t>(h & 0x8000) << 16;
  return float_of(static_cast<std::int32_t>((size >= 65536.f ? u | 0x7f800000 : u) | sign));
}

// To nearest even, overflow to infinity; a NaN stays one.
HKDFAST_HD std::uint16_t to_fp16(float x) {
  const std::uint32_t u = bits_of(x), sign = (u >> 16) & 0x8000, size = u & 0x7fffffff;
  // Normal: drop 13 bits, rounding. Subnormal: adding 0.5 lets the FPU round at 2^-24, the unit of these numbers.
  const std::uint32_t normal = (size - 0x38000000 + 0xfff + ((size >> 13) & 1)) >> 13;
  const std::uint32_t subnormal = bits_of(float_of(static_cast<std::int32_t>(size)) + 0.5f) - 0x3f000000;
  const std::uint32_t finite = size < 0x38800000 ? subnormal : normal;
  const std::uint32_t large = size > 0x7f800000 ? 0x7e00 : 0x7c00;
  return static_cast<std::uint16_t>(sign | (size >= 0x47800000 ? large : finite));
}

}  // namespace HKDFAST_ISA
}  // namespace hkdfast
