// A warp's slot in shared memory, through which a row passes on its way: in once, out to many
// places. Hopper and later move it by bulk asynchronous copies, which one lane starts and no lane
// attends; older GPUs by 16-byte loads and stores of the whole warp. Sizes and addresses are
// multiples of 16.
#pragma once

#include "device.cuh"

#if __CUDA_ARCH__ >= 900 && !defined(FUSCO_NO_BULK)
#define FUSCO_BULK 1
#else
#define FUSCO_BULK 0
#endif

struct RowSlot {
  u8* bytes;
#if FUSCO_BULK
  u64* barrier;
  u32 phase;
#endif

  __device__ __forceinline__ RowSlot(u8* slot, u64* its_barrier) : bytes(slot) {
#if FUSCO_BULK
    barrier = its_barrier;
    phase = 0;
    if (lane_id() == 0) {
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)));
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncwarp();
#endif
  }

  // Brings `size` bytes in, and returns when every lane sees them. `was_written_here`: by threads
  // or bulk copies that this thread has acquired, rather than by kernels before this one.
  __device__ __forceinline__ void fill(const u8* from, i32 size, bool was_written_here = false) {
#if FUSCO_BULK
    if (lane_id() == 0) {
      if (was_written_here) asm volatile("fence.proxy.async;" ::: "memory");
      asm volatile(
          "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
          "r"(size)
          : "memory");
      asm volatile(
          "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
              "r"(shared_address(bytes)),
          "l"(from), "r"(size), "r"(shared_address(barrier))
          : "memory");
    }
    u32 done = 0;
    while (!done) {
      asm volatile(
          "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
          : "=r"(done)
          : "r"(shared_address(barrier)), "r"(phase)
          : "memory");
    }
    phase ^= 1;
#else
    for (i32 at = lane_id() * 16; at < size; at += kWarp * 16) {
      *reinterpret_cast<Vector*>(bytes + at) = load_vector(from + at);
    }
    __syncwarp();
#endif
  }

  // Fills it with zeros.
  __device__ __forceinline__ void clear(i32 size) {
#pragma unroll 1
    for (i32 at = lane_id() * 16; at < size; at += kWarp * 16) {
      *reinterpret_cast<Vector*>(bytes + at) = Vector{};
    }
#if FUSCO_BULK
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
    __syncwarp();
  }

  // Every lane with `wants` sends the slot to its own place.
  __device__ __forceinline__ void send(u8* to, bool wants, i32 size) const {
#if FUSCO_BULK
    if (wants) {
      asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to),
                   "r"(shared_address(bytes)), "r"(size)
                   : "memory");
      asm volatile("cp.async.bulk.commit_group;" ::: "memory");
    }
#else
    u32 left = __ballot_sync(kFullWarp, wants);
    while (left) {
      int lane = __ffs(left) - 1;
      left &= left - 1;
      u8* place = reinterpret_cast<u8*>(__shfl_sync(kFullWarp, reinterpret_cast<u64>(to), lane));
      for (i32 at = lane_id() * 16; at < size; at += kWarp * 16) {
        store_vector(place + at, *reinterpret_cast<const Vector*>(bytes + at));
      }
    }
#endif
  }

  // Until the slot may be filled again.
  __device__ __forceinline__ void wait_read() const {
#if FUSCO_BULK
    asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
#endif
    __syncwarp();
  }

  // Until what each lane sent is written, so that it may say so.
  __device__ __forceinline__ void wait_written() const {
#if FUSCO_BULK
    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
#endif
    __syncwarp();
  }
};
