// The ThreadContext of a thread on the GPU: one wrapper for each PTX instruction that the row loop needs (compute capability 9.0).
#pragma once
#include "layout.h"
#include "../common/number_math.h"

namespace hkdfast {
namespace HKDFAST_ISA {

extern __shared__ __align__(128) char shared_memory[];

class DeviceThread {
 public:
  // The shuffle tells the compiler that all lanes have the same warp: what follows from it needs no vector registers.
  __device__ __forceinline__ DeviceThread() : warp_(__shfl_sync(all_lanes, threadIdx.x / warp_lanes, 0)) {}

  __device__ __forceinline__ int lane() const { return threadIdx.x % warp_lanes; }
  __device__ __forceinline__ int warp() const { return warp_; }
  __device__ __forceinline__ int warps() const { return blockDim.x / warp_lanes; }
  __device__ __forceinline__ int block() const { return special<0>(); }
  __device__ __forceinline__ int blocks() const { return special<1>(); }
  __device__ __forceinline__ int cluster() const { return special<2>(); }
  __device__ __forceinline__ int clusters() const { return special<3>(); }

  template <class T>
  __device__ __forceinline__ T& at(int offset) const {
    return *reinterpret_cast<T*>(shared_memory + offset);
  }

  // Over the warp. As integers, which one instruction compares: floats are in the order of their bits but for the sign.
  __device__ __forceinline__ float largest(float x) const {
    const int bits = __float_as_int(x), most = __reduce_max_sync(all_lanes, bits ^ (bits >> 31 & INT32_MAX));
    return __int_as_float(most ^ (most >> 31 & INT32_MAX));
  }
  __device__ __forceinline__ int smallest(int x) const { return __reduce_min_sync(all_lanes, x); }
  // x of the first lane that has it; one has.
  __device__ __forceinline__ float of_lane_that(bool has, float x) const {
    return __shfl_sync(all_lanes, x, __ffs(__ballot_sync(all_lanes, has)) - 1);
  }
  __device__ __forceinline__ double of_lane(double x, int lane) const { return __shfl_sync(all_lanes, x, lane); }
  // Of each lane and of those that differ from it in the bits below width, a power of two, for the numbers that are wanted.
  template <int count>
  __device__ __forceinline__ void sum(double (&x)[count], const bool (&wanted)[count], int width) const {
    const auto add = [&](int distance) {
#pragma unroll
      for (int i = 0; i < count; ++i)
        if (wanted[i]) x[i] += __shfl_xor_sync(all_lanes, x[i], distance);
    };
    if (width == warp_lanes) {
#pragma unroll
      for (int distance = warp_lanes / 2; distance; distance /= 2) add(distance);
    } else {
#pragma unroll 1
      for (int distance = width / 2; distance; distance /= 2) add(distance);
    }
  }

  __device__ __forceinline__ void sync_warp() const { __syncwarp(); }
  __device__ __forceinline__ void sync_block() const { __syncthreads(); }
  // Every thread of the cluster has come here, and sees what the others stored before.
  __device__ __forceinline__ void sync_cluster() const {
    asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
  }

  // A barrier of shared memory: a phase ends when its one arrival has come and all bytes that it announced.
  __device__ __forceinline__ void init(int barrier) const {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(address(barrier)) : "memory");
  }
  __device__ __forceinline__ void publish_barriers() const {
    asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
  }
  // Orders this thread's accesses of shared memory before the copies that are issued after the next meeting.
  __device__ __forceinline__ void fence_before_copies() const {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  }
  __device__ __forceinline__ void expect(int barrier, int bytes) const {
    asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(address(barrier)), "r"(bytes)
                 : "memory");
  }
  // Both addresses and the size in whole 16 bytes.
  __device__ __forceinline__ void copy(int to, const char* from, int bytes, int barrier) const {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(address(to)),
        "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(address(barrier))
        : "memory");
  }
  // Until the phase of this parity is over; what its copies brought is visible then, or with of_cluster what other blocks
  // have sent.
  template <bool of_cluster = false>
  __device__ __forceinline__ void wait(int barrier, std::uint32_t parity) const {
    std::uint32_t over;
    do {
      if constexpr (of_cluster)
        asm volatile(
            "{\n.reg .pred over;\n"
            "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 over, [%1], %2;\n"
            "selp.u32 %0, 1, 0, over;\n}"
            : "=r"(over)
            : "r"(address(barrier)), "r"(parity)
            : "memory");
      else
        asm volatile(
            "{\n.reg .pred over;\n"
            "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 over, [%1], %2;\n"
            "selp.u32 %0, 1, 0, over;\n}"
            : "=r"(over)
            : "r"(address(barrier)), "r"(parity)
            : "memory");
    } while (!over);
  }

  // Stores what lies at this address of our shared memory to the same address of another block's; the 8 bytes count at the
  // barrier there. Such stores are seen by who has waited for them, and make nobody wait for other stores.
  __device__ __forceinline__ void send(int block, const std::uint64_t* from, int barrier) const {
    std::uint32_t to, there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(to) : "r"(address(from)), "r"(block));
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address(barrier)), "r"(block));
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.u64 [%0], %1, [%2];" ::"r"(to), "l"(*from),
                 "r"(there)
                 : "memory");
  }
  // Bytes may come before they are expected: the phase does not end without this arrival.
  __device__ __forceinline__ void expect_sends(int barrier, int bytes) const { expect(barrier, bytes); }
  __device__ __forceinline__ void wait_for_sends(int barrier, std::uint32_t parity) const { wait<true>(barrier, parity); }

 private:
  static constexpr std::uint32_t all_lanes = 0xffffffffu;
  int warp_;

  __device__ __forceinline__ static std::uint32_t address(const void* shared) {
    return static_cast<std::uint32_t>(__cvta_generic_to_shared(shared));
  }
  __device__ __forceinline__ static std::uint32_t address(int offset) { return address(shared_memory + offset); }

  template <int which>
  __device__ __forceinline__ static int special() {
    int x;
    if (which == 0) asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(x));
    if (which == 1) asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(x));
    if (which == 2) asm("mov.u32 %0, %%clusterid.x;" : "=r"(x));
    if (which == 3) asm("mov.u32 %0, %%nclusterid.x;" : "=r"(x));
    return x;
  }
};

}  // namespace HKDFAST_ISA
}  // namespace hkdfast
