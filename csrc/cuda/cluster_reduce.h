// Sums of a lane, and how those of a cluster become one: over a warp by shuffles, over a block and over the cluster by one
// warp of each block, always in the same order.
#pragma once
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
struct Running {
  float origin = 0, bound = -INFINITY;  // above it a logit becomes the new origin
  float peak = -INFINITY, mate = -INFINITY;
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

  // Before peak learns of most, the largest of x.
  template <class W>
  HKDFAST_HD void find_first(const W& x, const W& other, float most, int lane, int base) {
    if (!(most > peak)) return;
#pragma unroll
    for (int k = W::count - 1; k >= 0; --k)
      if (x.of[k] == most) word = base + W::place(lane, k), mate = other.of[k];
  }
};

template <class W>
HKDFAST_HD float largest(const W& x) {
  float most = x.of[0];
#pragma unroll
  for (int k = 1; k < W::count; ++k) most = fmaxf(most, x.of[k]);
  return most;
}

// By pairs.
template <class F, int count>
HKDFAST_HD float total(const F (&x)[count]) {
  float part[count];
#pragma unroll
  for (int k = 0; k < count; ++k) part[k] = plain(x[k]);
#pragma unroll
  for (int apart = 1; apart < count; apart *= 2)
#pragma unroll
    for (int k = 0; k < count; k += 2 * apart) part[k] += part[k + apart];
  return part[0];
}

// A sum of many floats that loses none of them: what rounding takes is kept (Kahan).
struct Careful {
  float sum = 0, lost = 0;

  HKDFAST_HD void add(float x) {
    const float more = x - lost, next = sum + more;
    lost = (next - sum) - more;
    sum = next;
  }
  HKDFAST_HD double total() const { return static_cast<double>(sum) - lost; }
};

// Of a lane at its peak; offset: the other side's origin less this one's, with the sign that the gap has.
HKDFAST_HD Softmax softmax(const Running& r, const Scale& scale, double offset) {
  Softmax s;
  s.peak = r.peak, s.mate = r.mate, s.word = r.word;
  const float by = r.peak > -INFINITY ? r.origin - r.peak : 0.f, factor = exp_(by, scale.rate);
  s.sum = static_cast<double>(factor) * r.sum;
  s.moment = static_cast<double>(factor) * r.moment + static_cast<double>(by) * scale.by * s.sum;
  s.gap = static_cast<double>(factor) * r.gap + offset * s.sum;
  s.sum_at_1 = static_cast<double>(exp_(by, Rate(1))) * r.sum_at_1;
  return s;
}

// Over the lanes of a warp; every lane gets the result.
template <class Team>
HKDFAST_HD Softmax joined(const Team& team, const Softmax& of, const Scale& scale, bool moment, bool gap, bool at_1) {
  Softmax s;
  s.peak = team.largest(of.peak);
  // lanes without a word: their sums are 0, or NaN
  const float by = of.peak > -INFINITY ? of.peak - s.peak : 0.f;
  const double factor = exp_(by, scale.rate);
  s.word = team.smallest(of.peak == s.peak ? of.word : no_word);
  s.mate = team.largest(of.peak == s.peak && of.word == s.word ? of.mate : -INFINITY);
  s.sum = team.sum(factor * of.sum);
  if (moment) s.moment = team.sum(factor * (of.moment + static_cast<double>(by) * scale.by * of.sum));
  if (gap) s.gap = team.sum(factor * of.gap);
  if (at_1) s.sum_at_1 = team.sum(static_cast<double>(exp_(by, Rate(1))) * of.sum_at_1);
  return s;
}

// Records of all lanes of the cluster made one, for the first warp of every block. join(record) does it over a warp.
// Between two calls the block has met at least once.
template <class Team, class Join>
HKDFAST_HD Record reduce(Team& team, int& turn, Record mine, Join join) {
  Shared& shared = team.template at<Shared>(0);
  mine = join(mine);
  if (team.lane() == 0) shared.of_warp[team.warp()] = mine;
  team.sync_block();
  Record* const of_block = shared.of_block[turn];
  turn ^= 1;
  if (team.warp() == 0) {
    mine = join(team.lane() < team.warps() ? shared.of_warp[team.lane()] : Record());
    if (team.blocks() > 1) {
      if (team.lane() == 0) of_block[team.block()] = mine;
      team.sync_warp();
      constexpr int parts = sizeof(Record) / 8;
      static_assert(parts <= warp_lanes, "a lane sends one part of a record");
      const std::uint64_t* from = reinterpret_cast<const std::uint64_t*>(of_block + team.block());
      for (int block = 0; block < team.blocks(); ++block)
        if (team.lane() < parts && block != team.block()) team.send(block, from + team.lane());
    }
  }
  if (team.blocks() > 1) {
    team.sync_cluster();
    if (team.warp() == 0) mine = join(team.lane() < team.blocks() ? of_block[team.lane()] : Record());
  }
  return mine;
}

}  // namespace HKDFAST_ISA
}  // namespace hkdfast
