// hkdfast._cuda: hands rows to the kernels.
#include "cuda.h"

#include "plan_binding.h"

namespace hkdfast {
namespace {

void check(const Rows& rows) {
  if (rows.vocab > INT32_MAX) throw py::value_error("a vocabulary of " + std::to_string(rows.vocab) + " words is beyond 2**31 - 1");
}

bool rows(py::handle objective_, py::handle student, py::handle teacher, py::handle noisy, std::uintptr_t alpha,
          std::uintptr_t labels, std::uintptr_t weight, std::uintptr_t loss, py::handle grad, std::uintptr_t metrics,
          std::int64_t n, std::int64_t vocab, const py::tuple& plan, int device, std::uintptr_t stream) {
  const Objective o = objective(objective_);
  Rows rows;
  rows.n = n, rows.vocab = vocab;
  rows.student = tile(student), rows.teacher = tile(teacher), rows.noisy = tile(noisy), rows.grad = tile(grad);
  rows.alpha = pointer<const float>(alpha), rows.labels = pointer<const std::int64_t>(labels);
  rows.weight = pointer<const float>(weight);
  rows.loss = pointer<float>(loss), rows.metrics = pointer<float>(metrics);
  check(rows);
  bool fits = true;
  const bool known = n == 0 || generic::with_divergence(o.divergence.c_str(), o.beta, [&](auto divergence) {
    fits = launch_rows(task_of(o, rows), o.purified, divergence, plan_request(plan), device, pointer<void>(stream));
  });
  if (!known) throw py::value_error("csrc/common/divergence.h has no divergence '" + o.divergence + "'");
  return fits;
}

bool contrast(py::handle objective_, py::handle clean, py::handle noisy, std::uintptr_t alpha, std::uintptr_t labels,
              py::handle out, std::int64_t n, std::int64_t vocab, const py::tuple& plan, int device,
              std::uintptr_t stream) {
  const Objective o = objective(objective_);
  Rows rows;
  rows.n = n, rows.vocab = vocab;
  rows.teacher = tile(clean), rows.noisy = tile(noisy), rows.grad = tile(out);
  rows.alpha = pointer<const float>(alpha), rows.labels = pointer<const std::int64_t>(labels);
  check(rows);
  return n == 0 || launch_rows(task_of(o, rows), true, generic::Decode(), plan_request(plan), device, pointer<void>(stream));
}

int longest_of(const py::list& tiles, int device) { return longest(task_with(tiles, 0), device); }

py::tuple machine_of(int device) {
  const Machine has = machine(device);
  return py::make_tuple(has.block, has.sm, has.reserved);
}

}  // namespace
}  // namespace hkdfast

PYBIND11_MODULE(_cuda, m) {
  using namespace pybind11::literals;
  m.attr("architectures") = HKDFAST_CUDA_ARCHS;  // as setup.py names them, "90a 100"
  m.def("missing", &hkdfast::missing, "device"_a);
  m.def("machine", &hkdfast::machine_of, "device"_a);
  m.def("longest", &hkdfast::longest_of, "tiles"_a, "device"_a);
  m.def("plan", &hkdfast::plan_of, "tiles"_a, "vocab"_a, "request"_a, "block"_a, "sm"_a, "reserved"_a,
        "largest_cluster"_a = hkdfast::max_blocks);
  m.def("rows", &hkdfast::rows, "objective"_a, "student"_a, "teacher"_a, "noisy"_a, "alpha"_a, "labels"_a, "weight"_a,
        "loss"_a, "grad"_a, "metrics"_a, "n"_a, "vocab"_a, "plan"_a, "device"_a, "stream"_a);
  m.def("contrast", &hkdfast::contrast, "objective"_a, "clean"_a, "noisy"_a, "alpha"_a, "labels"_a, "out"_a, "n"_a,
        "vocab"_a, "plan"_a, "device"_a, "stream"_a);
}
