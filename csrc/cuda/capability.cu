// What a GPU can do: whether it runs these kernels, and how long a row it holds.
#include "launch.h"

#ifndef HKDFAST_CUDA_ARCHS
#error "setup.py says for which architectures it compiles"
#endif

namespace hkdfast {
namespace {

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
  return value;
}

// Whether code for an architecture such as 90a or 100 runs on this compute capability: with a letter on that one alone,
// else on later ones of the same generation too.
bool runs(const std::string& arch, int major, int minor) {
  const int number = std::stoi(arch), of = number / 10, from = number % 10;
  return major == of && (arch.find_first_not_of("0123456789") == std::string::npos ? minor >= from : minor == from);
}

}  // namespace

Machine machine(int device) {
  return {attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
          attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device),
          attribute(cudaDevAttrReservedSharedMemoryPerBlock, device)};
}

int longest(const Task& task, int device) { return longest_row(task, machine(device).block, max_blocks); }

// Asks the driver for constants only: no context is made, no memory of the device taken.
std::string missing(int device) {
  int major, minor;
  try {
    major = attribute(cudaDevAttrComputeCapabilityMajor, device);
    minor = attribute(cudaDevAttrComputeCapabilityMinor, device);
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  const std::string capability = std::to_string(major) + "." + std::to_string(minor);
  if (major < 9) return "compute capability " + capability + " has no thread-block clusters, they begin with 9.0";
  const std::string archs = HKDFAST_CUDA_ARCHS;
  std::size_t begin = 0;
  while (begin < archs.size()) {
    const std::size_t end = std::min(archs.find(' ', begin), archs.size());
    if (end > begin && runs(archs.substr(begin, end - begin), major, minor)) return "";
    begin = end + 1;
  }
  return "built for architectures " + archs + ", not for compute capability " + capability +
         ": set HKDFAST_CUDA_ARCHS and install hkdfast again";
}

}  // namespace hkdfast
