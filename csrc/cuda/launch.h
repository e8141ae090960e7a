// From a task to a running kernel. Every divergence has a source file of its own, which nvcc compiles beside the others.
#pragma once
#include <algorithm>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>

#include <cuda_runtime.h>

#include "row_loop.h"
#include "cuda.h"
#include "device.h"
#include "plan.h"

namespace hkdfast {

inline void check(cudaError_t error, const char* call) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // the error is reported here, not again by the next call
  throw std::runtime_error(std::string(call) + ": " + cudaGetErrorString(error));
}

namespace HKDFAST_ISA {

template <class Divergence, Kind KIND, bool PURIFIED>
__global__ void __launch_bounds__(max_warps * warp_lanes, 1)
    rows_kernel(const __grid_constant__ Task task, const Divergence divergence) {
  DeviceThread thread;
  RowLoop<DeviceThread, Divergence, KIND, PURIFIED>(thread, task, divergence).rows();
}

// Clusters of such blocks that this device runs at a time, 0 if none; asked once for every kernel, layout and device.
template <class Kernel>
int resident(Kernel kernel, const cudaLaunchConfig_t& config, int device, const Machine& machine) {
  static std::mutex mutex;
  static std::map<std::tuple<const void*, int, unsigned, unsigned, std::size_t>, int> known;
  const std::tuple<const void*, int, unsigned, unsigned, std::size_t> key(
      reinterpret_cast<const void*>(kernel), device, config.attrs->val.clusterDim.x, config.blockDim.x, config.dynamicSmemBytes);
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(key);
  if (found != known.end()) return found->second;
  const auto set = [&](cudaFuncAttribute which, int value) {
    check(cudaFuncSetAttribute(kernel, which, value), "cudaFuncSetAttribute");
  };
  set(cudaFuncAttributeMaxDynamicSharedMemorySize, machine.block);
  set(cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  set(cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  int clusters = 0;
  const cudaError_t error = cudaOccupancyMaxActiveClusters(&clusters, kernel, &config);
  if (error == cudaErrorInvalidClusterSize || error == cudaErrorInvalidConfiguration || error == cudaErrorInvalidValue)
    cudaGetLastError(), clusters = 0;  // larger than any cluster of this device
  else
    check(error, "cudaOccupancyMaxActiveClusters");
  return known[key] = clusters;
}

// False, and nothing is done, if the row does not fit on chip or the device cannot run a cluster that holds it.
template <class Divergence, Kind KIND, bool PURIFIED>
bool launch(Task task, Divergence divergence, const PlanRequest& request, int device, cudaStream_t stream) {
  const auto kernel = rows_kernel<Divergence, KIND, PURIFIED>;
  const Machine has = machine(device);
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cudaLaunchConfig_t config = {};
  config.stream = stream, config.attrs = &cluster, config.numAttrs = 1;
  std::int64_t at_once = 0;
  task.plan = first_plan(task, has, request, [&](const Plan& plan) {
    const unsigned blocks = static_cast<unsigned>(plan.cluster);
    cluster.val.clusterDim.x = blocks, cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    config.gridDim = blocks, config.blockDim = static_cast<unsigned>(plan.warps * warp_lanes);
    config.dynamicSmemBytes = static_cast<std::size_t>(plan.bytes);
    at_once = resident(kernel, config, device, has);
    return at_once > 0;
  });
  if (!task.plan.cluster) return false;
  config.gridDim.x *= static_cast<unsigned>(task.n < at_once ? task.n : at_once);
  check(cudaLaunchKernelEx(&config, kernel, task, divergence), "cudaLaunchKernelEx");
  return true;
}

}  // namespace HKDFAST_ISA

template <class Divergence>
bool launch_rows(const Task& task, bool purified, Divergence divergence, const PlanRequest& request, int device, void* stream_) {
  using namespace HKDFAST_ISA;
  const auto stream = static_cast<cudaStream_t>(stream_);
  check(cudaSetDevice(device), "cudaSetDevice");
  return with_kind(task, purified, divergence, [&](auto kind, auto law) {
    return launch<Divergence, kind, law>(task, divergence, request, device, stream);
  });
}

}  // namespace hkdfast
