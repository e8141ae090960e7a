// hkdfast._cpu: picks the instruction set and runs the loop.
#include <memory>
#include <string>
#include <vector>

#include "../common/binding.h"

namespace hkdfast {
namespace {

struct InstructionSet {
  const char* name;
  const Loops* loops;
};

// Usable here, fastest first.
std::vector<InstructionSet> usable() {
  std::vector<InstructionSet> sets;
#ifdef HKDFAST_X86
  __builtin_cpu_init();
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    sets.push_back({"avx512", &avx512_loops});
  if (v3) sets.push_back({"avx2", &avx2_loops});
#endif
  sets.push_back({"baseline", &baseline_loops});
  return sets;
}

const std::vector<InstructionSet>& instruction_sets() {
  static const std::vector<InstructionSet> sets = usable();
  return sets;
}

const Loops& loops(const std::string& name) {
  if (name.empty()) return *instruction_sets().front().loops;
  std::string known;
  for (const InstructionSet& set : instruction_sets()) {
    if (name == set.name) return *set.loops;
    known += known.empty() ? set.name : std::string(", ") + set.name;
  }
  throw py::value_error("unknown instruction set '" + name + "', expected one of " + known);
}

template <class Run>
void with_scratch(Rows& rows, const Loops& loops, bool purified, Run run) {
  const py::gil_scoped_release release;
  rows.scratch_each = loops.scratch(rows.vocab, purified);
  // not a vector: its zeros would touch every page
  const std::unique_ptr<char[]> scratch(new char[rows.threads * rows.scratch_each]);
  rows.scratch = scratch.get();
  run();
}

void rows(py::handle objective_, py::handle student, py::handle teacher, py::handle noisy, std::uintptr_t alpha,
          std::uintptr_t labels, std::uintptr_t weight, std::uintptr_t loss, py::handle grad, std::uintptr_t metrics,
          std::int64_t n, std::int64_t vocab, int threads, const std::string& instruction_set) {
  const Objective o = objective(objective_);
  const Loops& with = loops(instruction_set);
  Rows rows;
  rows.n = n, rows.vocab = vocab, rows.threads = threads;
  rows.student = tile(student), rows.teacher = tile(teacher), rows.noisy = tile(noisy), rows.grad = tile(grad);
  rows.alpha = pointer<const float>(alpha), rows.labels = pointer<const std::int64_t>(labels);
  rows.weight = pointer<const float>(weight);
  rows.loss = pointer<float>(loss), rows.metrics = pointer<float>(metrics);
  bool known = false;
  with_scratch(rows, with, o.purified, [&] { known = with.rows(o, rows); });
  if (!known) throw py::value_error("csrc/common/divergence.h has no divergence '" + o.divergence + "'");
}

void contrast(py::handle objective_, py::handle clean, py::handle noisy, std::uintptr_t alpha, std::uintptr_t labels,
              py::handle out, std::int64_t n, std::int64_t vocab, int threads, const std::string& instruction_set) {
  Objective o = objective(objective_);
  o.difference = false;
  const Loops& with = loops(instruction_set);
  Rows rows;
  rows.n = n, rows.vocab = vocab, rows.threads = threads;
  rows.teacher = tile(clean), rows.noisy = tile(noisy), rows.grad = tile(out);
  rows.alpha = pointer<const float>(alpha), rows.labels = pointer<const std::int64_t>(labels);
  with_scratch(rows, with, true, [&] { with.contrast(o, rows); });
}

}  // namespace
}  // namespace hkdfast

PYBIND11_MODULE(_cpu, m) {
  using namespace pybind11::literals;
  m.def("instruction_sets", [] {
    py::list names;
    for (const auto& set : hkdfast::instruction_sets()) names.append(set.name);
    return names;
  });
  m.def("rows", &hkdfast::rows, "objective"_a, "student"_a, "teacher"_a, "noisy"_a, "alpha"_a, "labels"_a, "weight"_a,
        "loss"_a, "grad"_a, "metrics"_a, "n"_a, "vocab"_a, "threads"_a, "instruction_set"_a);
  m.def("contrast", &hkdfast::contrast, "objective"_a, "clean"_a, "noisy"_a, "alpha"_a, "labels"_a, "out"_a, "n"_a,
        "vocab"_a, "threads"_a, "instruction_set"_a);
}
