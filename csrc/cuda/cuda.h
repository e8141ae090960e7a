// What the binding calls of the files that nvcc compiles.
#pragma once
#include <string>

#include "plan.h"
#include "../common/divergence.h"

namespace hkdfast {
namespace HKDFAST_ISA {

// Decoding: what the loop over rows is a template over where there is no divergence.
struct Decode {
  static constexpr Mean mean = Mean::none;
};

}  // namespace HKDFAST_ISA

// Starts the row operation on the stream (a cudaStream_t) of a device. False, and nothing is done, if a row does not fit
// into the shared memory of a cluster, or the device cannot run one of that size; throws std::runtime_error with CUDA's
// own text. instances/*.cu instantiate it.
template <class Divergence>
bool launch_rows(const Task& task, bool purified, Divergence divergence, const PlanRequest& request, int device, void* stream);

Machine machine(int device);

// The most words of a row of such tiles for this device.
int longest(const Task& task, int device);

// Why the kernels do not run on this device; empty if they do.
std::string missing(int device);

}  // namespace hkdfast
