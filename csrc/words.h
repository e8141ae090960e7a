// The numbers of a tile, from shared memory to floats, and gradients from floats to global memory.
#pragma once
#include "cluster.h"

namespace hkdfast {
namespace HKDFAST_ISA {

struct Octet {
  float of[width];
};

struct alignas(16) Quad {
  std::uint32_t of[4];
};
struct alignas(8) Pair {
  std::uint32_t of[2];
};

// The k-th word of a lane in a step.
HKDFAST_HD int word_of(Order order, int lane, int k) {
  if (order == Order::octets) return lane * width + k;
  if (order == Order::quads) return k / 4 * (step_words / 2) + lane * 4 + k % 4;
  return k * warp_lanes + lane;
}

HKDFAST_HD float number(std::uint16_t bits, Dtype dtype) {
  if (dtype == Dtype::bfloat16) return from_bf16(bits);
#ifdef __CUDA_ARCH__
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
#else
  return from_fp16(bits);
#endif
}

HKDFAST_HD void numbers(std::uint32_t two, Dtype dtype, float& low, float& high) {
  if (dtype == Dtype::bfloat16) {
    low = float_of(static_cast<std::int32_t>(two << 16)), high = float_of(static_cast<std::int32_t>(two & 0xffff0000u));
  } else {
    low = number(static_cast<std::uint16_t>(two), dtype), high = number(static_cast<std::uint16_t>(two >> 16), dtype);
  }
}

HKDFAST_HD std::uint32_t narrow(float low, float high, Dtype dtype) {
#ifdef __CUDA_ARCH__
  std::uint32_t two;
  if (dtype == Dtype::bfloat16)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(two) : "f"(high), "f"(low));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(two) : "f"(high), "f"(low));
  return two;
#else
  if (dtype == Dtype::bfloat16) return to_bf16(low) | static_cast<std::uint32_t>(to_bf16(high)) << 16;
  return to_fp16(low) | static_cast<std::uint32_t>(to_fp16(high)) << 16;
#endif
}

// A lane's words of the step that begins at this offset of shared memory.
template <class Team>
HKDFAST_HD Octet read(const Team& team, int at, Dtype dtype, Order order) {
  Octet x;
  const int lane = team.lane();
  if (order == Order::strided) {
#pragma unroll
    for (int k = 0; k < width; ++k) {
      const int word = word_of(order, lane, k);
      x.of[k] = dtype == Dtype::float32 ? team.template at<float>(at + 4 * word)
                                        : number(team.template at<std::uint16_t>(at + 2 * word), dtype);
    }
  } else if (dtype == Dtype::float32) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const Quad four = team.template at<Quad>(at + 4 * word_of(order, lane, 4 * i));
#pragma unroll
      for (int k = 0; k < 4; ++k) x.of[4 * i + k] = float_of(static_cast<std::int32_t>(four.of[k]));
    }
  } else if (order == Order::quads) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const Pair four = team.template at<Pair>(at + 2 * word_of(order, lane, 4 * i));
#pragma unroll
      for (int k = 0; k < 2; ++k) numbers(four.of[k], dtype, x.of[4 * i + 2 * k], x.of[4 * i + 2 * k + 1]);
    }
  } else {
    const Quad eight = team.template at<Quad>(at + 2 * word_of(order, lane, 0));
#pragma unroll
    for (int k = 0; k < 4; ++k) numbers(eight.of[k], dtype, x.of[2 * k], x.of[2 * k + 1]);
  }
  return x;
}

// Stores a lane's words of a step of which so many exist; to is the step's first word in global memory.
template <class Team>
HKDFAST_HD void write(const Team& team, char* to, Dtype dtype, Order order, int exist, const Octet& x) {
  const int lane = team.lane();
  if (order == Order::strided || exist < step_words) {
#pragma unroll
    for (int k = 0; k < width; ++k) {
      const int word = word_of(order, lane, k);
      if (word >= exist) continue;
      if (dtype == Dtype::float32)
        reinterpret_cast<float*>(to)[word] = x.of[k];
      else
        reinterpret_cast<std::uint16_t*>(to)[word] = static_cast<std::uint16_t>(narrow(x.of[k], 0.f, dtype));
    }
  } else if (dtype == Dtype::float32) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      Quad four;
#pragma unroll
      for (int k = 0; k < 4; ++k) four.of[k] = static_cast<std::uint32_t>(bits_of(x.of[4 * i + k]));
      *reinterpret_cast<Quad*>(to + 4 * word_of(order, lane, 4 * i)) = four;
    }
  } else if (order == Order::quads) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      Pair four;
#pragma unroll
      for (int k = 0; k < 2; ++k) four.of[k] = narrow(x.of[4 * i + 2 * k], x.of[4 * i + 2 * k + 1], dtype);
      *reinterpret_cast<Pair*>(to + 2 * word_of(order, lane, 4 * i)) = four;
    }
  } else {
    Quad eight;
#pragma unroll
    for (int k = 0; k < 4; ++k) eight.of[k] = narrow(x.of[2 * k], x.of[2 * k + 1], dtype);
    *reinterpret_cast<Quad*>(to + 2 * word_of(order, lane, 0)) = eight;
  }
}

}  // namespace HKDFAST_ISA
}  // namespace hkdfast
