// The choice of a layout, for Python: of hkdfast._cuda and of the emulation in tests/tools/cluster.cpp.
#pragma once
#include "../common/binding.h"
#include "plan.h"

namespace hkdfast {

// A tuple with the members of PlanRequest.
inline PlanRequest plan_request(const py::tuple& from) {
  const auto number = [&](int i) { return from[i].cast<int>(); };
  return {number(0), number(1), number(2), number(3), number(4)};
}

// Two or three tiles, as (address, dtype, elements from one row to the next).
inline Task task_with(const py::list& given, int vocab) {
  Task task;
  task.vocab = vocab;
  Tile* const tiles[] = {&task.student, &task.teacher, &task.noisy};
  for (std::size_t i = 0; i < given.size() && i < 3; ++i) *tiles[i] = tile(given[i]);
  return task;
}

// The best layout; None if a row does not fit. block, sm, reserved: a Machine, which takes clusters of so many blocks.
inline py::object plan_of(const py::list& tiles, int vocab, const py::tuple& request, int block, int sm, int reserved,
                          int largest_cluster) {
  const Plan plan = first_plan(task_with(tiles, vocab), {block, sm, reserved}, plan_request(request),
                               [=](const Plan& one) { return one.cluster <= largest_cluster; });
  if (!plan.cluster) return py::none();
  py::dict of;
  of["cluster"] = plan.cluster, of["blocks"] = plan.blocks, of["warps"] = plan.warps, of["chunk"] = plan.chunk;
  of["slots"] = plan.slots, of["chunks"] = plan.chunks, of["bytes"] = plan.bytes;
  return of;
}

}  // namespace hkdfast
