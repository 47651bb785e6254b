// The parts of a compact plan's `links` and of a dispatch's block; layout/compact.py says the same
// for the host and for tests.
#pragma once

#include "device.cuh"

struct Links {
  i32* number;         // [1] of the plan; 0: it was never made, and the rest means nothing
  i32* sends;          // [P] segments sent to each rank
  i32* arrivals;       // [P] segments that arrive from each rank
  i32* rows;           // [P] rows each rank receives
  i32* return_at;      // [P] where this rank's partials begin in each rank's returns
  i32* return_from;    // [P] where each rank's partials begin in this rank's returns
  i32* token_segment;  // [T, P] the segment of a token among those sent to a rank; -1 for none
  i32* arrival_slot;   // [P, max_tokens, K] slots of each segment that arrives; -1 behind the last

  __device__ __forceinline__ Links(const World& world, int num_tokens, u64 links) {
    number = reinterpret_cast<i32*>(links);
    sends = number + 1;
    arrivals = sends + world.num_ranks;
    rows = arrivals + world.num_ranks;
    return_at = rows + world.num_ranks;
    return_from = return_at + world.num_ranks;
    token_segment = return_from + world.num_ranks;
    arrival_slot = token_segment + static_cast<i64>(num_tokens) * world.num_ranks;
  }

  // Slots of segment `segment` from rank `rank`.
  __device__ __forceinline__ i32* slots(const World& world, int rank, i32 segment) const {
    return arrival_slot + (static_cast<i64>(rank) * world.max_tokens + segment) * world.top_k;
  }
};

// Called by a whole warp: the most segments that arrive from any other rank, of which `arrivals_of`
// tells those from one.
template <typename ArrivalsOf>
__device__ __forceinline__ u32 most_arrivals(const World& world, ArrivalsOf arrivals_of) {
  const bool is_other = lane_id() < world.num_ranks && lane_id() != world.rank;
  return __reduce_max_sync(kFullWarp, is_other ? arrivals_of(lane_id()) : 0);
}

// The rows that a rank's block is laid out for: those it receives, or as many as it always has.
__device__ __forceinline__ i64 rows_of_block(const World& world, const Links& links, int rank) {
  return world.static_rows ? world.static_rows : links.rows[rank];
}

// Where part `part` begins in the block of a rank that receives `num_rows` rows; the part behind
// the last are the row weights.
__device__ __forceinline__ constexpr i64 part_at(const i32* row_bytes, int part, i64 num_rows) {
  i64 at = 0;
#pragma unroll 1
  for (int i = 0; i < part; ++i) at += round_up(num_rows * row_bytes[i], kBlockAlignment);
  return at;
}

__device__ __forceinline__ constexpr i64 block_bytes(const i32* row_bytes, int num_parts,
                                                     i64 num_rows) {
  return part_at(row_bytes, num_parts, num_rows) + round_up(num_rows * 4, kBlockAlignment);
}
