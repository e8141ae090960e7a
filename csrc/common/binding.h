// Python's objects read into plain structs, for every extension module.
#pragma once
#include <initializer_list>
#include <string>

#include <pybind11/pybind11.h>

#include "objective.h"

namespace py = pybind11;

namespace hkdfast {

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

inline Transform transform(py::handle from) {
  Transform to;
  read(from, "scale", to.scale);
  if (!from.attr("softcap").is_none()) read(from, "softcap", to.softcap);
  return to;
}

// The one place where hkdfast.ops.objective.Objective is spelled in C++.
inline Objective objective(py::handle from) {
  Objective to;
  to.divergence = from.attr("divergence").cast<std::string>();
  read(from, "beta", to.beta);
  read(from, "temperature", to.temperature);
  read(from, "soft_weight", to.soft_weight);
  read(from, "hard_weight", to.hard_weight);
  read(from, "ignore_index", to.ignore_index);
  read(from, "teacher_floor", to.teacher_floor);
  read(from, "difference", to.difference);
  read(from, "accumulate", to.accumulate);
  to.student = transform(from.attr("student"));
  to.teacher = transform(from.attr("teacher"));
  to.noisy = transform(from.attr("noisy"));
  const py::object law = from.attr("law");
  to.purified = !law.is_none();
  if (!to.purified) return to;
  to.law.schedule = choice<Schedule>(law, "schedule", {"constant", "linear", "gate", "per_row"});
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
inline Tile tile(py::handle from) {
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

}  // namespace hkdfast
