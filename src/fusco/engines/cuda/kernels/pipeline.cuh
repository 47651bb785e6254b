// Barriers in shared memory, by which the warps of a block hand each other buffers; and copies into
// and out of these, bulk copies from Hopper on, 16-byte ones before.
#pragma once

#include "copy.cuh"

// How often the warp that fills what a barrier guards arrives there.
constexpr u32 kFillArrivals = FUSCO_BULK ? 1 : kWarp + 1;

struct Barrier {
  u64 word;

  __device__ __forceinline__ void init(u32 num_arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&word)),
                 "r"(num_arrivals)
                 : "memory");
  }

  __device__ __forceinline__ void arrive() {
    asm volatile(
        "{ .reg .b64 t; mbarrier.arrive.shared::cta.b64 t, [%0]; }" ::"r"(shared_address(&word))
        : "memory");
  }

  // Called by the whole warp that fills what the barrier guards, before and after: its phase is
  // over when `num_bytes` have come. `lane` arrives: where one lane alone has written there, that
  // one, since racecheck does not follow it through a `__syncwarp` behind a branch.
  __device__ __forceinline__ void expect(i32 num_bytes, int lane = 0) {
#if FUSCO_BULK
    if (lane_id() == lane) {
      asm volatile(
          "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&word)),
          "r"(num_bytes)
          : "memory");
    }
#endif
  }

  __device__ __forceinline__ void arrive_filled(int lane = 0) {
#if !FUSCO_BULK
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(&word))
                 : "memory");
    if (lane_id() == lane) arrive();  // the others' arrivals release copies, but no stores
#endif
  }

  // Until the phase of that parity is over.
  __device__ __forceinline__ void wait(u32 parity) {
    u32 done = 0;
    while (!done) {
#if FUSCO_BULK
      asm volatile(
          "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
          : "=r"(done)
          : "r"(shared_address(&word)), "r"(parity)
          : "memory");
#else
      asm volatile(
          "{ .reg .pred p; mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
          : "=r"(done)
          : "r"(shared_address(&word)), "r"(parity)
          : "memory");
#endif
    }
  }
};

// Called by a whole warp: lanes that want to each bring `size` bytes to their own place, and
// `barrier` learns of it.
__device__ __forceinline__ void fill_each(u8* to, const u8* from, bool wants, i32 size,
                                          Barrier& barrier) {
#if FUSCO_BULK
  if (wants) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
            "r"(shared_address(to)),
        "l"(from), "r"(size), "r"(shared_address(&barrier.word))
        : "memory");
  }
#else
  for (u32 left = __ballot_sync(kFullWarp, wants); left; left &= left - 1) {
    const int lane = __ffs(left) - 1;
    const u64 source = __shfl_sync(kFullWarp, reinterpret_cast<u64>(from), lane);
    const u32 place = __shfl_sync(kFullWarp, shared_address(to), lane);
#pragma unroll 1
    for (i32 at = lane_id() * 16; at < size; at += kWarp * 16) {
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(place + at), "l"(source + at)
                   : "memory");
    }
  }
#endif
}

// Called by a whole warp: sends `size` bytes, and returns when their place may be written again or,
// with `until_written`, when they have arrived.
__device__ __forceinline__ void drain(u8* to, const u8* from, i32 size, bool until_written) {
#if FUSCO_BULK
  if (lane_id() == 0) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to),
                 "r"(shared_address(from)), "r"(size)
                 : "memory");
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
    if (until_written) {
      asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
    } else {
      asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
    }
  }
#else
  for (i32 at = lane_id() * 16; at < size; at += kWarp * 16) {
    store_vector(to + at, *reinterpret_cast<const Vector*>(from + at));
  }
#endif
  __syncwarp();
}

// What threads have written to shared memory is there for bulk copies that start after a barrier.
__device__ __forceinline__ void publish_to_copies() {
#if FUSCO_BULK
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}
