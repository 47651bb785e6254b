// How every operation begins: a rank publishes its record in the windows of all, and waits for
// everybody's. From the same records all ranks draw the same verdict.
#pragma once

#include "device.cuh"

__device__ __forceinline__ State& state_of(const World& world) {
  return *reinterpret_cast<State*>(world.state);
}

__device__ __forceinline__ u64 window_of(const World& world, int rank) {
  return reinterpret_cast<const u64*>(world.windows)[rank];
}

// Records alternate between two places, since a fast rank may begin the next operation while a slow
// one still reads; it cannot begin the one after that.
__device__ __forceinline__ i64* record_in(const World& world, u64 window, u32 epoch, int rank) {
  i64 index = (epoch & 1) * world.num_ranks + rank;
  return at_bytes<i64>(window, world.records_at + index * world.record_bytes);
}

__device__ __forceinline__ u64* record_flag_in(const World& world, u64 window, u32 epoch,
                                               int rank) {
  i64 index = (epoch & 1) * world.num_ranks + rank;
  return at_bytes<u64>(window, world.record_flags_at + index * 8);
}

// Of rank `rank`'s record in the own window.
__device__ __forceinline__ const i64* record_of(const World& world, u32 epoch, int rank) {
  return record_in(world, window_of(world, world.rank), epoch, rank);
}

__device__ __forceinline__ const i32* counts_in(const i64* record) {
  return reinterpret_cast<const i32*>(record + kRecordHead);
}

// Tells the host of the first failure, which it has to raise before this rank can go on; of a loss,
// which is for good, whatever else it has to raise.
__device__ __forceinline__ void report_failure(const World& world, const Call& call, i32 verdict,
                                               i32 awaited, i64 item, i64 need) {
  State& state = state_of(world);
  const u32 epoch = state.epoch + 1;
  if (verdict == kLost) {
    if (atomicExch(&state.lost, 1u)) return;
    atomicExch(&state.pending, epoch);
  } else if (atomicCAS(&state.pending, 0u, epoch) != 0) {
    return;
  }
  volatile Failure* failure = reinterpret_cast<volatile Failure*>(world.failure);
  failure->epoch = epoch;
  failure->operation = call.operation;
  failure->ticket = call.ticket;
  failure->awaited = awaited;
  failure->item = item;
  failure->need = need;
  __threadfence_system();
  failure->verdict = verdict;
}

// Spins until `ready()`, at most for `timeouts` times the timeout; false where this rank has given
// up.
template <typename Ready>
__device__ __forceinline__ bool wait_until(const World& world, Ready ready, u64 timeouts = 1) {
  if (ready()) return true;
  const u64 begin = now_ns();
  const volatile u32* lost = &state_of(world).lost;
  for (u32 spin = 1;; ++spin) {
    if (ready()) return true;
    if (spin % 64 == 0 &&
        (*lost || now_ns() - begin > timeouts * static_cast<u64>(world.timeout_ns))) {
      return false;
    }
    __nanosleep(20);
  }
}

// As `wait_until`, for something that rank `awaited` does: its record, for which `item` is
// negative, or the `item`-th of `total` rows. Gives up for the whole device, and says so.
template <typename Ready>
__device__ __forceinline__ bool wait_for(const World& world, const Call& call, i32 awaited,
                                         i64 item, i64 total, Ready ready) {
  if (wait_until(world, ready)) return true;
  report_failure(world, call, kLost, awaited, item, total);
  return false;
}

// Whether an operation is nothing at all, not even published: one of fixed outputs after a failure
// of an earlier one. How many such operations there are may differ from rank to rank, since each
// raises the failure as soon as it knows of it.
__device__ __forceinline__ bool is_void(const World& world, u32 epoch) {
  const u32 failed = *const_cast<volatile u32*>(&state_of(world).pending);
  return world.static_rows && failed && failed != epoch;
}

// Called by a whole block: writes this rank's record into every window. `counts` may be null. A
// rank with a failure that it has not raised yet says so, and no rank does anything.
__device__ __forceinline__ void publish(const World& world, const Call& call, u32 epoch, i64 status,
                                        i64 plan, const i32* counts, int num_counts) {
  if (state_of(world).pending) status = kPending;
  const i64 head[kRecordHead] = {epoch,          call.operation, status,        plan,
                                 call.signature, call.base,      call.capacity, call.chunk};
  for (int rank = 0; rank < world.num_ranks; ++rank) {
    i64* record = record_in(world, window_of(world, rank), epoch, world.rank);
    if (threadIdx.x == 0) {
#pragma unroll
      for (int i = 0; i < kRecordHead; ++i) record[i] = head[i];
    }
    i32* to = reinterpret_cast<i32*>(record + kRecordHead);
    for (int i = threadIdx.x; i < num_counts; i += blockDim.x) to[i] = counts[i];
  }
  __syncthreads();
  for (int rank = threadIdx.x; rank < world.num_ranks; rank += blockDim.x) {
    store_release(record_flag_in(world, window_of(world, rank), epoch, world.rank), epoch);
  }
}

// Called by a whole block: waits for the records of all ranks, and compares them with the call and
// its plan. One block counts how long it waits.
__device__ __forceinline__ i32 await_records(const World& world, const Call& call, u32 epoch,
                                             i64 plan, bool counts_time) {
  bool is_there = true, is_alike = true, is_pending = false;
  const u64 own = window_of(world, world.rank);
  for (int rank = threadIdx.x; rank < world.num_ranks; rank += blockDim.x) {
    const u64* flag = record_flag_in(world, own, epoch, rank);
    const u64 begin = now_ns();
    is_there =
        is_there && wait_for(world, call, rank, -1, 0, [&] { return load_acquire(flag) == epoch; });
    if (counts_time) reinterpret_cast<u64*>(world.wait_ns)[rank] += now_ns() - begin;
    if (!is_there) break;
    const i64* theirs = record_of(world, epoch, rank);
    is_alike = is_alike && theirs[kStatus] == kReady && theirs[kOperation] == call.operation &&
               theirs[kPlan] == plan && theirs[kSignature] == call.signature;
    is_pending = is_pending || theirs[kStatus] == kPending;
  }
  if (!__syncthreads_and(is_there)) return kLost;
  if (__syncthreads_or(is_pending)) return kStale;
  return __syncthreads_and(is_alike) ? kGo : kUnlike;
}

// The whole beginning of an operation without counts, called by every block of its kernel, which
// does `meanwhile` while the records are on their way. `plan` is where the number of its plan lies;
// null where it needs none.
template <typename Meanwhile>
__device__ __forceinline__ i32 agree(const World& world, const Call& call, u32 epoch,
                                     const i32* plan, Meanwhile meanwhile) {
  if (is_void(world, epoch)) return kVoid;
  const bool speaks = blockIdx.x == 0;
  const i64 number = plan ? *plan : call.plan;
  if (speaks) publish(world, call, epoch, call.status, number, nullptr, 0);
  meanwhile();
  i32 verdict = await_records(world, call, epoch, number, speaks);
  if (verdict == kGo && plan && !number) verdict = kInvalid;
  if (verdict != kGo && verdict != kLost && speaks && threadIdx.x == 0) {
    report_failure(world, call, verdict, -1, -1, 0);
  }
  return verdict;
}

__device__ __forceinline__ void report_to_host(const World& world, const Call& call, i32 verdict,
                                               i64 num_rows, i64 need) {
  volatile Report* report =
      reinterpret_cast<volatile Report*>(world.reports) + call.ticket % kReports;
  report->verdict = verdict;
  report->num_rows = num_rows;
  report->need = need;
  __threadfence_system();
  report->ticket = call.ticket;
}

// The end of a kernel, called by all threads; `epoch` is the last operation that is over. True for
// one thread, of the block that comes last, when what all blocks share is reset.
__device__ __forceinline__ bool finish(State& state, u32 epoch) {
  __syncthreads();
  let_next_kernel_begin();
  if (threadIdx.x != 0 || add_acq_rel_gpu(&state.finished, 1) != gridDim.x - 1) return false;
  state.finished = 0;
  for (u32& queue : state.queue) queue = 0;
  state.epoch = epoch;
  return true;
}

// A warp's place in a queue; the answer is awaited only when it is needed.
struct Claim {
  u32* queue;
  u32 answer = 0;  // in the first lane

  __device__ __forceinline__ void ask() {
    if (lane_id() == 0) answer = atomicAdd(queue, 1);
  }

  __device__ __forceinline__ u32 take() const { return __shfl_sync(kFullWarp, answer, 0); }
};
