// Sums of a lane, and how those of a cluster become one: over a warp by shuffles, over a block and over the cluster by one
// warp of each block, always in the same order.
#pragma once
#include <cstddef>

#include "layout.h"
#include "approx_math.h"
#include "tile_io.h"

namespace hkdfast {
namespace HKDFAST_ISA {

constexpr int no_word = INT32_MAX;

// 1 / temperature: logits are multiplied by it.
struct Scale {
  float by;
  Rate rate;

  HKDFAST_HD explicit Scale(double by) : by(static_cast<float>(by)), rate(by) {}
};

// The softmax sums of one lane, in float: a lane has few words. They are taken relative to an origin, some logit that the
// lane met: its peak, or within slack of it, so that a larger logit seldom makes the sums move.
struct LaneSums {
  float origin = 0, bound = -INFINITY;  // above it a logit becomes the new origin
  float peak = -INFINITY, other_at_peak = -INFINITY;
  int word = no_word;
  float sum = 0, sum_at_1 = 0, moment = 0, gap = 0;

  // By how much the origin moves, which the gap of the side that keeps one must learn.
  HKDFAST_HD float move(float to, const Scale& scale, float slack) {
    const float by = to - origin;
    if (bound > -INFINITY) {
      const float factor = exp_(-by, scale.rate);
      moment = factor * (moment - by * scale.by * sum);
      sum *= factor, gap *= factor, sum_at_1 *= exp_(-by, Rate(1));
    }
    origin = to;
    bound = to + slack;
    return by;
  }

  // Before peak learns of max_logit, the largest of x.
  template <class W>
  HKDFAST_HD void note_peak(const W& x, const W& other, float max_logit, int lane, int base) {
    if (!(max_logit > peak)) return;
#pragma unroll
    for (int k = W::count - 1; k >= 0; --k)
      if (x.of[k] == max_logit) word = base + W::place(lane, k), other_at_peak = other.of[k];
  }
};

template <class W>
HKDFAST_HD float largest(const W& x) {
  float max_logit = x.of[0];
#pragma unroll
  for (int k = 1; k < W::count; ++k) max_logit = fmaxf(max_logit, x.of[k]);
  return max_logit;
}

// By pairs.
template <class F, int count>
HKDFAST_HD float total(const F (&x)[count]) {
  float part[count];
#pragma unroll
  for (int k = 0; k < count; ++k) part[k] = plain(x[k]);
#pragma unroll
  for (int distance = 1; distance < count; distance *= 2)
#pragma unroll
    for (int k = 0; k < count; k += 2 * distance) part[k] += part[k + distance];
  return part[0];
}

// A sum of many floats that loses none of them: what rounding takes is kept (Kahan).
struct KahanSum {
  float sum = 0, lost = 0;

  HKDFAST_HD void add(float x) {
    const float more = x - lost, next = sum + more;
    lost = (next - sum) - more;
    sum = next;
  }
  HKDFAST_HD double total() const { return static_cast<double>(sum) - lost; }
};

// Of a lane at its peak; offset: the other side's origin less this one's, with the sign that the gap has.
HKDFAST_HD Softmax softmax(const LaneSums& r, const Scale& scale, double offset) {
  Softmax s;
  s.peak = r.peak, s.other_at_peak = r.other_at_peak, s.word = r.word;
  const float by = r.peak > -INFINITY ? r.origin - r.peak : 0.f, factor = exp_(by, scale.rate);
  s.sum = static_cast<double>(factor) * r.sum;
  s.moment = static_cast<double>(factor) * r.moment + static_cast<double>(by) * scale.by * s.sum;
  s.gap = static_cast<double>(factor) * r.gap + offset * s.sum;
  s.sum_at_1 = static_cast<double>(exp_(by, Rate(1))) * r.sum_at_1;
  return s;
}

// Which numbers of a record are wanted beside its peak and its sum.
struct Wanted {
  bool partner, moment, gap, at_1;  // partner: the peak's word and the other side's logit there
};

// Over the lanes of a warp, of which each group of so many holds the same records; every lane gets the result.
template <class ThreadContext>
HKDFAST_HD Softmax joined(const ThreadContext& thread, const Softmax& of, const Scale& scale, const Wanted& wanted, int width) {
  Softmax s;
  s.peak = thread.largest(of.peak);
  // lanes without a word: their sums are 0, or NaN
  const float by = of.peak > -INFINITY ? of.peak - s.peak : 0.f;
  const double factor = exp_(by, scale.rate);
  if (wanted.partner) {
    s.word = thread.smallest(of.peak == s.peak ? of.word : no_word);
    s.other_at_peak = thread.of_lane_that(of.peak == s.peak && of.word == s.word, of.other_at_peak);
  }
  double sums[] = {factor * of.sum, 0, 0, 0};
  if (wanted.moment) sums[1] = factor * (of.moment + static_cast<double>(by) * scale.by * of.sum);
  if (wanted.gap) sums[2] = factor * of.gap;
  if (wanted.at_1) sums[3] = static_cast<double>(exp_(by, Rate(1))) * of.sum_at_1;
  thread.sum(sums, {true, wanted.moment, wanted.gap, wanted.at_1}, width);
  s.sum = sums[0], s.moment = sums[1], s.gap = sums[2], s.sum_at_1 = sums[3];
  return s;
}

// Offset in shared memory of the barrier for a turn. Ring prepares both.
HKDFAST_HD int come_at(int turn) { return static_cast<int>(offsetof(SharedMemory, come)) + 8 * turn; }

// The smallest power of two that is not less.
HKDFAST_HD int group_of(int count) {
  int width = 1;
  while (width < count) width *= 2;
  return width;
}

// Records of all lanes of the cluster made one, for the first warp of every block. join(record, width) does it over the lanes
// of a warp, each group of so many of which has the same records: fewer lanes take fewer steps, in the same order.
// Between two calls the block has met at least once. Only that warp waits for the other blocks, for their records alone: a
// barrier of the cluster would also wait for every earlier store to global memory.
template <class ThreadContext, class Join>
HKDFAST_HD SoftmaxTriple reduce(ThreadContext& thread, unsigned& count, SoftmaxTriple mine, Join join) {
  SharedMemory& shared = thread.template at<SharedMemory>(0);
  const int turn = count & 1;
  const std::uint32_t parity = count >> 1 & 1;
  ++count;
  mine = join(mine, warp_lanes);
  if (thread.lane() == 0) shared.of_warp[thread.warp()] = mine;
  thread.sync_block();
  if (thread.warp() != 0) return mine;
  const auto records = [&](const SoftmaxTriple* of, int count) {
    const int width = group_of(count), i = thread.lane() & (width - 1);
    return join(i < count ? of[i] : SoftmaxTriple(), width);
  };
  if (thread.warps() > 1) mine = records(shared.of_warp, thread.warps());
  if (thread.blocks() == 1) return mine;
  SoftmaxTriple* const of_block = shared.of_block[turn];
  constexpr int parts = sizeof(SoftmaxTriple) / 8;
  static_assert(parts <= warp_lanes, "a lane sends one part of a record");
  if (thread.lane() == 0) {
    of_block[thread.block()] = mine;
    thread.expect_sends(come_at(turn), (thread.blocks() - 1) * parts * 8);
  }
  thread.sync_warp();
  const std::uint64_t* from = reinterpret_cast<const std::uint64_t*>(of_block + thread.block());
  for (int block = 0; block < thread.blocks(); ++block)
    if (thread.lane() < parts && block != thread.block()) thread.send(block, from + thread.lane(), come_at(turn));
  thread.wait_for_sends(come_at(turn), parity);
  return records(of_block, thread.blocks());
}

}  // namespace HKDFAST_ISA
}  // namespace hkdfast
