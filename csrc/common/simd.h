// As many floats as one register of the instruction set holds. Arithmetic and comparisons are the compiler's own
// (GCC and clang vectors); here is the rest, and its scalar twin, so that a formula is written once for both.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__) && !defined(__CUDACC__)
#include <immintrin.h>
#elif defined(__aarch64__) && !defined(__CUDACC__)
#include <arm_neon.h>
#endif

#ifndef HKDFAST_ISA
#define HKDFAST_ISA generic
#endif
#ifndef HKDFAST_LANES
#define HKDFAST_LANES 4
#endif

#ifdef __CUDACC__
#define HKDFAST_HD __host__ __device__ __forceinline__
#else
#define HKDFAST_HD inline __attribute__((always_inline))
#endif

// Everything that computes lies in a namespace of the instruction set: the same headers are compiled for several, and
// of two functions with one name the linker would keep one, perhaps that with AVX-512, for all.
namespace hkdfast {
namespace HKDFAST_ISA {

HKDFAST_HD std::int32_t bits_of(float x) {
  std::int32_t i;
  memcpy(&i, &x, sizeof i);
  return i;
}
HKDFAST_HD float float_of(std::int32_t i) {
  float x;
  memcpy(&x, &i, sizeof x);
  return x;
}
HKDFAST_HD float to_float(std::int32_t i) { return static_cast<float>(i); }
HKDFAST_HD float select(bool mask, float a, float b) { return mask ? a : b; }

HKDFAST_HD float absolute(float x) { return float_of(bits_of(x) & 0x7fffffff); }

// a * b + c, fused where the target has the instruction. Nothing else is: p and q of equal inputs come out equal.
HKDFAST_HD float fused(float a, float b, float c) {
#if defined(__CUDACC__) || defined(__FMA__) || defined(__aarch64__)
  return fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

#ifndef __CUDACC__
constexpr int lanes = HKDFAST_LANES;
typedef float Lanes __attribute__((vector_size(4 * lanes)));
typedef std::int32_t Ints __attribute__((vector_size(4 * lanes)));
typedef double Doubles __attribute__((vector_size(4 * lanes)));

HKDFAST_HD Ints bits_of(Lanes x) { return reinterpret_cast<Ints>(x); }
HKDFAST_HD Lanes float_of(Ints i) { return reinterpret_cast<Lanes>(i); }
HKDFAST_HD Lanes to_float(Ints i) { return __builtin_convertvector(i, Lanes); }
HKDFAST_HD Lanes select(Ints mask, Lanes a, Lanes b) { return mask ? a : b; }
HKDFAST_HD Lanes all(float x) { return x - Lanes{}; }

HKDFAST_HD Lanes fused(Lanes a, Lanes b, Lanes c) {
#if HKDFAST_LANES == 16
  return _mm512_fmadd_ps(a, b, c);
#elif HKDFAST_LANES == 8
  return _mm256_fmadd_ps(a, b, c);
#elif defined(__aarch64__)
  return vfmaq_f32(c, a, b);
#else
  return a * b + c;
#endif
}
HKDFAST_HD Lanes fused(Lanes a, float b, Lanes c) { return fused(a, all(b), c); }
HKDFAST_HD Lanes fused(Lanes a, float b, float c) { return fused(a, all(b), all(c)); }
HKDFAST_HD Lanes fused(Lanes a, Lanes b, float c) { return fused(a, b, all(c)); }
HKDFAST_HD Lanes fused(float a, Lanes b, Lanes c) { return fused(all(a), b, c); }

HKDFAST_HD Lanes load(const float* from) {
  Lanes x;
  memcpy(&x, from, sizeof x);
  return x;
}
HKDFAST_HD void store(float* to, Lanes x) { memcpy(to, &x, sizeof x); }

HKDFAST_HD Lanes absolute(Lanes x) { return float_of(bits_of(x) & 0x7fffffff); }

// a where it is larger; b where either is NaN
HKDFAST_HD Lanes larger(Lanes a, Lanes b) {
#if HKDFAST_LANES == 16
  return _mm512_max_ps(a, b);
#elif HKDFAST_LANES == 8
  return _mm256_max_ps(a, b);
#elif defined(__x86_64__)
  return _mm_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

HKDFAST_HD float largest(Lanes x) {
  float peak = x[0];
  for (int i = 1; i < lanes; ++i) peak = x[i] > peak ? x[i] : peak;
  return peak;
}

// Numbers whose upper halves these are: bfloat16 as float.
HKDFAST_HD Lanes load_upper(const std::uint16_t* from) {
#if HKDFAST_LANES == 16
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from)), 16));
#elif HKDFAST_LANES == 8
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)from)), 16));
#else
  typedef std::uint16_t Shorts __attribute__((vector_size(2 * lanes)));
  Shorts x;
  memcpy(&x, from, sizeof x);
  return float_of(__builtin_convertvector(x, Ints) << 16);
#endif
}

// Whether a comparison holds in some lane.
HKDFAST_HD bool any(Ints mask) {
#if HKDFAST_LANES == 16
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif HKDFAST_LANES == 8
  return _mm256_movemask_ps(float_of(mask)) != 0;
#elif defined(__x86_64__)
  return _mm_movemask_ps(float_of(mask)) != 0;
#else
  std::int32_t found = 0;
  for (int i = 0; i < lanes; ++i) found |= mask[i];
  return found != 0;
#endif
}

// A sum that is float for a few terms, then double.
struct Sum {
  static constexpr int terms = 8;
  Lanes part = {};
  Doubles low = {}, high = {};

  HKDFAST_HD void add(Lanes x) { part += x; }
  HKDFAST_HD void add_product(Lanes x, Lanes y) { part = fused(x, y, part); }
  HKDFAST_HD void fold() {
#if HKDFAST_LANES == 16
    low += _mm512_cvtps_pd(_mm512_castps512_ps256(part));
    high += _mm512_cvtps_pd(_mm512_extractf32x8_ps(part, 1));
#elif HKDFAST_LANES == 8
    low += _mm256_cvtps_pd(_mm256_castps256_ps128(part));
    high += _mm256_cvtps_pd(_mm256_extractf128_ps(part, 1));
#else
    typedef float Half __attribute__((vector_size(2 * lanes)));
    Half half[2];
    memcpy(half, &part, sizeof part);
    low += __builtin_convertvector(half[0], Doubles);
    high += __builtin_convertvector(half[1], Doubles);
#endif
    part = Lanes{};
  }
  HKDFAST_HD double total() const {
    const Doubles both = low + high;
    double sum = 0;
    for (int i = 0; i < lanes / 2; ++i) sum += both[i];
    return sum;
  }
};

// step(i) for words i, i + lanes, ... below n; fold() after every few, to bring in the sums that the steps add to.
template <class Step, class Fold>
HKDFAST_HD void each_lanes(int n, Step step, Fold fold) {
  for (int begin = 0; begin < n; begin += Sum::terms * lanes) {
    const int end = n < begin + Sum::terms * lanes ? n : begin + Sum::terms * lanes;
    for (int i = begin; i < end; i += lanes) step(i);
    fold();
  }
}
template <class Step>
HKDFAST_HD void each_lanes(int n, Step step) {
  for (int i = 0; i < n; i += lanes) step(i);
}
#endif

// 2^n with n the integer nearest d * rate, for d * rate < 128.
template <class F>
struct Power {
  F y, n;

  // Adding 1.5 * 2^23 rounds to an integer; the 127 makes its low bits the exponent field of 2^n.
  static constexpr float shift = 12582912.f + 127.f;

  static HKDFAST_HD F bounded(F d, float) { return d; }
  HKDFAST_HD Power(F d, float rate) : y(fused(d, rate, shift)), n(y - shift) {}
  // x 2^n, 0 where that is subnormal
  HKDFAST_HD F times(F x) const { return select(y < shift - 126.f, F{}, x * float_of(bits_of(y) << 23)); }
};

#if HKDFAST_LANES == 16 && !defined(__CUDACC__)
template <>
struct Power<Lanes> {
  Lanes n;

  // scalef knows no underflow that an infinite x would not undo, and x is a polynomial in what n leaves of d * rate
  static HKDFAST_HD Lanes bounded(Lanes d, float min_argument) { return larger(all(min_argument), d); }
  HKDFAST_HD Power(Lanes d, float rate) : n(_mm512_roundscale_ps(d * rate, _MM_FROUND_TO_NEAREST_INT)) {}
  HKDFAST_HD Lanes times(Lanes x) const { return _mm512_scalef_ps(x, n); }
};
#endif

}  // namespace HKDFAST_ISA
}  // namespace hkdfast
