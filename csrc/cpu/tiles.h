// Blocks of a tile as floats, and back.
#pragma once
#include "../common/objective.h"
#include "../common/number_math.h"

namespace hkdfast {
namespace HKDFAST_ISA {

constexpr int block_words = 1024;  // of one step of a sweep: a few such buffers of float lie in 32 KiB of L1

struct alignas(64) Block {
  float words[block_words];
};

inline std::int64_t smaller_of(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

template <class Element>
inline Element* at(const Tile& tile, std::int64_t row, std::int64_t begin) {
  return static_cast<Element*>(tile.data) + row * tile.stride + begin;
}

inline void read(const Tile& tile, std::int64_t row, std::int64_t begin, int n, float* to) {
  const std::uint16_t* from = at<std::uint16_t>(tile, row, begin);
  if (tile.dtype == Dtype::float32) {
    memcpy(to, at<float>(tile, row, begin), n * sizeof(float));
  } else if (tile.dtype == Dtype::bfloat16) {
#pragma omp simd
    for (int i = 0; i < n; ++i) to[i] = from_bf16(from[i]);
  } else {
#pragma omp simd
    for (int i = 0; i < n; ++i) to[i] = from_fp16(from[i]);
  }
}

inline void store(const Tile& tile, std::int64_t row, std::int64_t begin, int n, const float* x) {
  if (tile.dtype == Dtype::float32) {
    memcpy(at<float>(tile, row, begin), x, n * sizeof(float));
    return;
  }
  std::uint16_t* to = at<std::uint16_t>(tile, row, begin);
  if (tile.dtype == Dtype::bfloat16) {
#pragma omp simd
    for (int i = 0; i < n; ++i) to[i] = to_bf16(x[i]);
  } else {
#pragma omp simd
    for (int i = 0; i < n; ++i) to[i] = to_fp16(x[i]);
  }
}

// Logits of a block: lanes from word i on, one of them, and the largest of the first n. A NaN is not the largest, or is
// the result; the caller's sums show it.
struct Floats {
  const float* x;
  HKDFAST_HD Lanes operator()(int i) const { return load(x + i); }
  HKDFAST_HD float one(int i) const { return x[i]; }
  HKDFAST_HD float peak(int n) const {
    Lanes max_logit = all(-INFINITY);
    each_lanes(n, [&](int i) { max_logit = larger(load(x + i), max_logit); });
    return largest(max_logit);
  }
};

struct Bfloats {
  const std::uint16_t* x;
  HKDFAST_HD Lanes operator()(int i) const { return load_upper(x + i); }
  HKDFAST_HD float one(int i) const { return from_bf16(x[i]); }
  HKDFAST_HD float peak(int n) const {
    // integers in the order of the numbers: twice as many to a register, and nothing to convert
    std::int16_t max_logit = INT16_MIN;
#pragma omp simd reduction(max : max_logit)
    for (int i = 0; i < n; ++i) {
      const std::int16_t bits = static_cast<std::int16_t>(x[i]);
      const std::int16_t ordered = static_cast<std::int16_t>(bits ^ ((bits >> 15) & 0x7fff));
      max_logit = ordered > max_logit ? ordered : max_logit;
    }
    return from_bf16(static_cast<std::uint16_t>(max_logit ^ ((max_logit >> 15) & 0x7fff)));
  }
};

// Where logits come from: a tile, what it is added to in the difference form, and how its numbers become logits.
struct Source {
  Tile tile;
  Transform transform;
  const Tile* base = nullptr;

  // Whether the numbers of a tile of this type are the logits, without lanes to fill up.
  bool direct(int n, Dtype dtype) const {
    return tile.dtype == dtype && n % lanes == 0 && transform.scale == 1.f && transform.softcap == 0.f && !base;
  }

  // Logits of words begin .. begin + n of a row, in the buffer or in the tile itself. Lanes beyond n are masked words.
  inline Floats logits(std::int64_t row, std::int64_t begin, int n, Block& buffer) const {
    if (direct(n, Dtype::float32)) return {at<float>(tile, row, begin)};
    float* x = buffer.words;
    read(tile, row, begin, n, x);
    if (base || transform.scale != 1.f || transform.softcap > 0.f) transformed(row, begin, n, x);
    for (int i = n; i % lanes; ++i) x[i] = -INFINITY;
    return {x};
  }

  // Prefetches a block before it is needed: the processor does not predict where a sweep that pauses to compute continues.
  void prefetch(std::int64_t row, std::int64_t begin, std::int64_t vocab) const {
    const int size = tile.dtype == Dtype::float32 ? 4 : 2;
    const char* from = static_cast<const char*>(tile.data) + (row * tile.stride + begin) * size;
    const char* to = from + smaller_of(block_words, vocab - begin) * size;
    for (; from < to; from += 64) __builtin_prefetch(from);
  }

  // Takes a gradient in the logits back to the tile's numbers.
  template <class Logits>
  inline void backward(Logits logits, int n, float* grad) const {
    const float scale = transform.scale, cap = transform.softcap;
    if (cap > 0.f) {
      each_lanes(n, [=](int i) {
        const Lanes part = logits(i) / cap;
        store(grad + i, load(grad + i) * (scale * (1.f - part * part)));
      });
    } else if (scale != 1.f) {
      each_lanes(n, [=](int i) { store(grad + i, load(grad + i) * scale); });
    }
  }

 private:
  inline void transformed(std::int64_t row, std::int64_t begin, int n, float* x) const {
    if (base) {
      Block other;
      read(*base, row, begin, n, other.words);
      for (int i = 0; i < n; ++i) x[i] += other.words[i];
    }
    const float scale = transform.scale, cap = transform.softcap;
    each_lanes(n, [=](int i) {
      const Lanes z = load(x + i) * scale;
      store(x + i, cap > 0.f ? cap * tanh_(z / cap) : z);
    });
  }
};

}  // namespace HKDFAST_ISA
}  // namespace hkdfast
