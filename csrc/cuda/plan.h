// The choice of a layout: how many blocks hold a row, how many share a multiprocessor, how the row is cut.
#pragma once
#include <algorithm>

#include "layout.h"

namespace hkdfast {

// Shared memory of a device, in bytes.
struct Machine {
  int block = 0;     // the most that a block can have
  int sm = 0;        // of a multiprocessor
  int reserved = 0;  // what the system takes of it for each block
};

// What HKDFAST_CUDA_PLAN sets, with the names of Plan; 0 is chosen here. hkdfast/ops/cuda_plan.py reads and checks it.
struct PlanRequest {
  int cluster = 0, blocks = 0, warps = 0, chunk = 0, slots = 0;
};

// The bytes of a block where so many share a multiprocessor.
inline int bytes_of_each(const Machine& machine, int blocks) {
  return std::min(machine.block, machine.sm / blocks - machine.reserved);
}

// The layout with chunks of so many words; plan.cluster is 0 if a row does not fit. A warp has at most twice the slots that
// a row takes, or as many as are requested.
inline Plan plan_with(const Task& task, int shared_bytes, int cluster, int warps, int chunk, int slots) {
  Plan plan;
  plan.warps = warps, plan.chunk = chunk;
  plan.chunks = ceil_div(task.vocab, chunk);
  const Tile* tiles[] = {&task.student, &task.teacher, &task.noisy};
  for (int i = 0; i < 3; ++i) {
    plan.tile_at[i] = plan.slot_bytes;
    if (tiles[i]->data) plan.slot_bytes += chunk * size_of(tiles[i]->dtype) + (aligned(*tiles[i]) ? 0 : 16);
  }
  const int row = ceil_div(plan.chunks, cluster * warps), fixed = round_up(sizeof(SharedMemory), 128);
  const int most = (shared_bytes - fixed - 128) / (warps * (plan.slot_bytes + 8));
  plan.slots = slots ? slots : std::min(most, 2 * row);
  if (most < plan.slots || plan.slots < row) return plan;
  plan.slots_at = round_up(fixed + 8 * warps * plan.slots, 128);
  plan.bytes = plan.slots_at + warps * plan.slots * plan.slot_bytes;
  plan.cluster = cluster;
  return plan;
}

// Whether the next row's words load while this row's sums are joined: every warp has a slot for them, all together a quarter
// of a row.
inline bool loads_ahead(const Plan& plan) {
  const int warps = plan.cluster * plan.warps;
  return plan.slots * warps >= plan.chunks + warps && 4 * plan.slots * warps >= 5 * plan.chunks;
}

// The layout for a cluster of so many blocks. Of the chunks that give no warp more steps than the split demands, the longest
// up to 1024 words that loads ahead; else the one with which the cluster holds most words.
inline Plan plan_for(const Task& task, int shared_bytes, int cluster, int warps, int chunk = 0, int slots = 0) {
  if (chunk) return plan_with(task, shared_bytes, cluster, warps, chunk, slots);
  const int own = ceil_div(ceil_div(task.vocab, step_words), cluster * warps);
  Plan most;
  for (int each = std::min(own, 4); each; --each) {
    if (own % each) continue;
    const Plan plan = plan_with(task, shared_bytes, cluster, warps, each * step_words, slots);
    if (!plan.cluster) continue;
    if (loads_ahead(plan)) return plan;
    if (!most.cluster || plan.slots * plan.chunk > most.slots * most.chunk) most = plan;
  }
  return most;
}

// The layouts that hold a row are offered to take(plan), the best first, until it says true; that one, else none, is
// returned. A block that holds a row alone needs no cluster, so as many of those share a multiprocessor as can. Longer rows
// get two blocks on each multiprocessor, so that one computes while the other joins its sums; the longest get one. Beyond 8
// blocks a cluster is not portable: the device may refuse it.
template <class Take>
Plan first_plan(const Task& task, const Machine& machine, const PlanRequest& request, Take take) {
  for (const bool ahead : {true, false})
    for (int blocks = max_warps; blocks; blocks /= 2)
      for (int cluster = 1; cluster <= max_blocks; cluster *= 2) {
        const bool wanted = request.blocks || request.cluster || blocks <= 2 || cluster == 1;
        if (!wanted || (request.blocks && request.blocks != blocks) || (request.cluster && request.cluster != cluster)) continue;
        const int warps = request.warps ? request.warps : max_warps / blocks;
        if (warps * blocks > max_warps) continue;
        Plan plan = plan_for(task, bytes_of_each(machine, blocks), cluster, warps, request.chunk, request.slots);
        plan.blocks = blocks;
        if (plan.cluster && (loads_ahead(plan) || !ahead) && take(plan)) return plan;
      }
  return Plan();
}

// The most words that a row of such tiles can have: what fits does not depend on more than the steps that a warp has.
inline int longest_row(Task task, int shared_bytes, int largest_cluster) {
  const int words = largest_cluster * max_warps * step_words;
  for (task.vocab = words; plan_for(task, shared_bytes, largest_cluster, max_warps).cluster; task.vocab += words) {
  }
  return task.vocab - words;
}

}  // namespace hkdfast
