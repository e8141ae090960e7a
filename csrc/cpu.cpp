// hkdfast._cpu: reads Python's objects into plain structs, picks the instruction set, runs the loop.
#include <memory>
#include <string>
#include <vector>

#include <pybind11/pybind11.h>

#include "cpu.h"

namespace py = pybind11;

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
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512cd"))
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

// The position of a word in a list of them, as the enumeration that lists the same words.
template <class Enum>
Enum choice(py::handle from, const char* name, std::initializer_list<const char*> words) {
  const auto word = from.attr(name).cast<std::string>();
  std::string known;
  int i = 0;
  for (const char* w : words) {
    if (word == w) return static_cast<Enum>(i);
    known += i++ ? std::string(", ") + w : w;
  }
  throw py::value_error("unknown " + std::string(name) + " '" + word + "', expected one of " + known);
}

template <class Number>
void read(py::handle from, const char* name, Number& to) {
  to = from.attr(name).cast<Number>();
}

Transform transform(py::handle from) {
  Transform to;
  read(from, "scale", to.scale);
  if (!from.attr("softcap").is_none()) read(from, "softcap", to.softcap);
  return to;
}

// The one place where hkdfast.objective.Objective is spelled in C++.
Objective objective(py::handle from) {
  Objective to;
  to.divergence = from.attr("divergence").cast<std::string>();
  read(from, "beta", to.beta);
  read(from, "temperature", to.temperature);
  read(from, "soft_weight", to.soft_weight);
  read(from, "hard_weight", to.hard_weight);
  read(from, "ignore_index", to.ignore_index);
  read(from, "floor", to.floor);
  read(from, "difference", to.difference);
  to.student = transform(from.attr("student"));
  to.teacher = transform(from.attr("teacher"));
  to.noisy = transform(from.attr("noisy"));
  const py::object law = from.attr("law");
  to.purified = !law.is_none();
  if (!to.purified) return to;
  to.law.weight = choice<Weight>(law, "weight", {"constant", "linear", "gate", "rows"});
  to.law.confidence = choice<Confidence>(law, "confidence", {"max_prob", "entropy", "target"});
  to.law.mode = choice<Mode>(law, "mode", {"extrapolate", "subtract"});
  to.law.outside = choice<Outside>(law, "outside", {"clean", "drop"});
  read(law, "alpha", to.law.alpha);
  read(law, "threshold", to.law.threshold);
  read(law, "plausibility", to.law.plausibility);
  return to;
}

template <class T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// (address, dtype, stride), or None
Tile tile(py::handle from) {
  Tile to;
  if (from.is_none()) return to;
  const auto parts = py::reinterpret_borrow<py::tuple>(from);
  to.data = pointer<void>(parts[0].cast<std::uintptr_t>());
  to.stride = parts[2].cast<std::int64_t>();
  const auto dtype = parts[1].cast<std::string>();
  if (dtype == "bfloat16")
    to.dtype = Dtype::bfloat16;
  else if (dtype == "float16")
    to.dtype = Dtype::float16;
  else if (dtype != "float32")
    throw py::value_error("tiles are float32, bfloat16 or float16, not " + dtype);
  return to;
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
  if (!known) throw py::value_error("csrc/divergence.h has no divergence '" + o.divergence + "'");
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
