// The numbers of a tile, from shared memory to floats, and gradients from floats to global memory.
//
// Of aligned tiles a lane takes 8 words of a step: neighbors if they are bfloat16, in one 16-byte access, or two times 4
// neighbors if they are float32, so that the accesses of a warp are dense. Of others it takes every 32nd word, one by
// one: that needs no alignment, and is as dense for the warp.
#pragma once
#include "layout.h"

namespace hkdfast {
namespace HKDFAST_ISA {

template <Kind KIND>
struct LaneWords {
  static constexpr int count = KIND == Kind::any ? 4 : 8, step = count * warp_lanes;
  float of[count];

  HKDFAST_HD static int place(int lane, int k) {
    if (KIND == Kind::narrow) return lane * 8 + k;
    if (KIND == Kind::wide) return k / 4 * 4 * warp_lanes + lane * 4 + k % 4;
    return k * warp_lanes + lane;
  }
};

struct alignas(16) Bytes16 {  // words of 16 bits, or four of 32
  std::uint32_t of[4];
};

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

HKDFAST_HD std::uint32_t pack_bf16(float low, float high) {
#ifdef __CUDA_ARCH__
  std::uint32_t two;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(two) : "f"(high), "f"(low));
  return two;
#else
  return to_bf16(low) | static_cast<std::uint32_t>(to_bf16(high)) << 16;
#endif
}

HKDFAST_HD std::uint32_t pack_fp16(float low, float high) {
#ifdef __CUDA_ARCH__
  std::uint32_t two;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(two) : "f"(high), "f"(low));
  return two;
#else
  return to_fp16(low) | static_cast<std::uint32_t>(to_fp16(high)) << 16;
#endif
}

HKDFAST_HD std::uint16_t narrow(float x, Dtype dtype) {
  if (dtype == Dtype::bfloat16) return static_cast<std::uint16_t>(pack_bf16(x, 0.f));
#ifdef __CUDA_ARCH__
  std::uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
#else
  return to_fp16(x);
#endif
}

struct alignas(8) Bytes8 {  // words of 16 bits
  std::uint32_t of[2];
};
HKDFAST_HD Bytes8 read_8_bytes(const void* from) {
#ifdef __CUDA_ARCH__
  const uint2 two = *static_cast<const uint2*>(from);
  return {{two.x, two.y}};
#else
  return *static_cast<const Bytes8*>(from);
#endif
}
HKDFAST_HD void write_8_bytes(void* to, const Bytes8& four) {
#ifdef __CUDA_ARCH__
  *static_cast<uint2*>(to) = make_uint2(four.of[0], four.of[1]);
#else
  *static_cast<Bytes8*>(to) = four;
#endif
}

HKDFAST_HD LaneWords<Kind::narrow> unpacked(const Bytes16& eight) {
  LaneWords<Kind::narrow> x;
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    x.of[2 * k] = float_of(static_cast<std::int32_t>(eight.of[k] << 16));
    x.of[2 * k + 1] = float_of(static_cast<std::int32_t>(eight.of[k] & 0xffff0000u));
  }
  return x;
}

// In one access: a copy of the struct is taken apart by the compiler, and four accesses meet in the banks of shared memory.
HKDFAST_HD Bytes16 read_16_bytes(const void* from) {
#ifdef __CUDA_ARCH__
  const uint4 four = *static_cast<const uint4*>(from);
  return {{four.x, four.y, four.z, four.w}};
#else
  return *static_cast<const Bytes16*>(from);
#endif
}
HKDFAST_HD void write_16_bytes(void* to, const Bytes16& eight) {
#ifdef __CUDA_ARCH__
  *static_cast<uint4*>(to) = make_uint4(eight.of[0], eight.of[1], eight.of[2], eight.of[3]);
#else
  *static_cast<Bytes16*>(to) = eight;
#endif
}

// A lane's words of the step that begins at this offset of shared memory.
template <Kind KIND, class ThreadContext>
HKDFAST_HD LaneWords<KIND> read(const ThreadContext& thread, int at, Dtype dtype) {
  using W = LaneWords<KIND>;
  W x;
  if constexpr (KIND == Kind::narrow) {
    x = unpacked(read_16_bytes(&thread.template at<Bytes16>(at + 2 * W::place(thread.lane(), 0))));
  } else if constexpr (KIND == Kind::wide) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const Bytes16 four = read_16_bytes(&thread.template at<Bytes16>(at + 4 * W::place(thread.lane(), 4 * i)));
#pragma unroll
      for (int k = 0; k < 4; ++k) x.of[4 * i + k] = float_of(four.of[k]);
    }
  } else if (dtype == Dtype::float32) {
#pragma unroll
    for (int k = 0; k < W::count; ++k) x.of[k] = thread.template at<float>(at + 4 * W::place(thread.lane(), k));
  } else {
#pragma unroll
    for (int k = 0; k < W::count; ++k)
      x.of[k] = number(thread.template at<std::uint16_t>(at + 2 * W::place(thread.lane(), k)), dtype);
  }
  return x;
}

// A lane's words of a step of which so many exist; from is the step's first word in global memory.
template <Kind KIND, class ThreadContext>
HKDFAST_HD LaneWords<KIND> read_global(const ThreadContext& thread, const char* from, Dtype dtype, int exist) {
  using W = LaneWords<KIND>;
  const int lane = thread.lane();
  if constexpr (KIND != Kind::any)
    if (exist >= W::step) {
      Bytes16 eight;
      if (KIND == Kind::narrow) {
        eight = read_16_bytes(from + 2 * W::place(lane, 0));
      } else {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const Bytes8 four = read_8_bytes(from + 2 * W::place(lane, 4 * i));
          eight.of[2 * i] = four.of[0], eight.of[2 * i + 1] = four.of[1];
        }
      }
      W x;
      const LaneWords<Kind::narrow> in_order = unpacked(eight);
#pragma unroll
      for (int k = 0; k < W::count; ++k) x.of[k] = in_order.of[k];
      return x;
    }
  W x = W();
#pragma unroll
  for (int k = 0; k < W::count; ++k) {
    const int word = W::place(lane, k);
    if (word >= exist) continue;
    if (dtype == Dtype::float32)
      x.of[k] = reinterpret_cast<const float*>(from)[word];
    else
      x.of[k] = number(reinterpret_cast<const std::uint16_t*>(from)[word], dtype);
  }
  return x;
}

// Stores a lane's words of a step of which so many exist; to is the step's first word in global memory.
template <Kind KIND, class ThreadContext>
HKDFAST_HD void write(const ThreadContext& thread, char* to, Dtype dtype, int exist, const LaneWords<KIND>& x) {
  using W = LaneWords<KIND>;
  const int lane = thread.lane();
  if (KIND != Kind::any && exist >= W::step) {
    Bytes16 eight;
#pragma unroll
    for (int k = 0; k < 4; ++k) eight.of[k] = pack_bf16(x.of[2 * k % W::count], x.of[(2 * k + 1) % W::count]);
    if (KIND == Kind::narrow) {
      write_16_bytes(to + 2 * W::place(lane, 0), eight);
    } else {
#pragma unroll
      for (int i = 0; i < 2; ++i)
        write_8_bytes(to + 2 * W::place(lane, 4 * i), {{eight.of[2 * i], eight.of[2 * i + 1]}});
    }
    return;
  }
#pragma unroll
  for (int k = 0; k < W::count; ++k) {
    const int word = W::place(lane, k);
    if (word >= exist) continue;
    if (dtype == Dtype::float32)
      reinterpret_cast<float*>(to)[word] = x.of[k];
    else
      reinterpret_cast<std::uint16_t*>(to)[word] = narrow(x.of[k], dtype);
  }
}

}  // namespace HKDFAST_ISA
}  // namespace hkdfast
