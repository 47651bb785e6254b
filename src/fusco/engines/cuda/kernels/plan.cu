// Planning where the routing lies: count, exchange counts through the windows, and give every pair
// its final slot. What it computes is what `planner.plan_sends` says; see plan.py for the
// arguments.
//
// Each block owns a run of consecutive tokens. The last one to have counted is the leader: it knows
// the rank's totals, exchanges them, and from everybody's computes where each expert's rows begin.
// Meanwhile the others add up what the blocks before them have counted, and so place their pairs.

#include "agree.cuh"
#include "links.cuh"

// How an id is kept: its rank above its number; all ones for no expert.
constexpr u32 kNone = 0xffffffffu;
constexpr int kReadsAtOnce = 16;
// The thread that tells the host.
constexpr u32 kReporter = 2 * kWarp;

struct Pair {
  bool is_there;  // not beyond the last token, and with an expert
  u32 expert, rank;
  u32 same_rank;  // the lanes of its token whose experts are on the same rank
  bool is_first;  // the first of these
};

__device__ __forceinline__ Pair describe(u32 id, int token_in_warp, int num_ranks) {
  Pair pair;
  pair.is_there = id != kNone;
  pair.expert = id & 0xffff;
  pair.rank = id >> 16;
  i32 key =
      pair.is_there ? token_in_warp * num_ranks + static_cast<i32>(pair.rank) : -1 - lane_id();
  pair.same_rank = __match_any_sync(kFullWarp, key);
  pair.is_first = pair.is_there && !(pair.same_rank & lanes_below());
  return pair;
}

struct Chunk {
  int begin, size;      // tokens of this block
  int tokens_per_warp;  // a warp looks at so many tokens at once
};

__device__ __forceinline__ void count(const World& world, const PlanArgs& args, const Chunk& chunk,
                                      u32* ids, i32* counters) {
  const i64* topk_idx = reinterpret_cast<const i64*>(args.topk_idx);
  const i32* rank_of_expert = reinterpret_cast<const i32*>(world.rank_of_expert);
  i32* pair_rank = reinterpret_cast<i32*>(args.pairs);
  State& state = state_of(world);
  const int top_k = world.top_k, stride = chunk.tokens_per_warp;
  for (int first = warp_id() * stride; first < chunk.size; first += blockDim.x / kWarp * stride) {
    int in_warp = lane_id() / top_k, token = first + in_warp;
    bool is_used = in_warp < stride && token < chunk.size;
    u32 id = kNone;
    if (is_used) {
      i64 at = static_cast<i64>(chunk.begin) * top_k + first * top_k + lane_id();
      i64 expert = topk_idx[at];
      if (expert < -1 || expert >= world.num_experts) {
        const i32 told = static_cast<i32>(max(min(expert, 0x7fffffffLL), -0x7fffffffLL));
        atomicMin(&state.lowest_id, told);
        atomicMax(&state.highest_id, told);
        expert = -1;
      }
      if (expert >= 0)
        id = static_cast<u32>(rank_of_expert[expert]) << 16 | static_cast<u32>(expert);
      ids[first * top_k + lane_id()] = id;
      pair_rank[at] = expert >= 0 ? static_cast<i32>(id >> 16) : -1;
    }
    Pair pair = describe(id, in_warp, world.num_ranks);
    if (pair.is_there) atomicAdd(&counters[pair.expert], 1);
    if (pair.is_first) atomicAdd(&counters[world.num_experts + pair.rank], 1);
  }
}

// The expert at each place of the device-major order, and where the experts of its rank begin
// there.
__device__ __forceinline__ void look_up_places(const World& world, u32* places) {
  const i32* rank_of_expert = reinterpret_cast<const i32*>(world.rank_of_expert);
  const i32* first_place = reinterpret_cast<const i32*>(world.first_place);
  for (int place = threadIdx.x; place < world.num_experts; place += blockDim.x) {
    const i32 expert = reinterpret_cast<const i32*>(world.device_major)[place];
    places[place] = first_place[rank_of_expert[expert]] << 16 | expert;
  }
}

// Where the rows of each expert begin on its rank, and how many rows each rank receives, from the
// records of all ranks and `places`. `start` has room for E + 1 numbers, `ahead` for E: rows of an
// expert from the ranks before, less its padded size. Leaves what the neediest rank needs, and
// returns whether every rank has room.
__device__ __forceinline__ bool lay_out(const World& world, const PlanArgs& args, u32 epoch,
                                        const u32* places, i32* start, i32* ahead, i64* need) {
  const i32* first_place = reinterpret_cast<const i32*>(world.first_place);
  i32* slot_base = reinterpret_cast<i32*>(world.slot_base);
  i64* tokens_per_expert = reinterpret_cast<i64*>(args.tokens_per_expert);
  i32* expert_offsets = reinterpret_cast<i32*>(args.expert_offsets);
  const Links links(world, args.num_tokens, args.links);
  const int num_experts = world.num_experts, num_ranks = world.num_ranks, me = world.rank;
  __shared__ i32 warp_sums[kWarp];
  __shared__ i32 carry;
  if (threadIdx.x == 0) carry = start[0] = 0;
  const int first_local = first_place[me], end_local = first_place[me + 1];
  // Inclusive sums of padded sizes over the experts in device-major order.
  for (int base = 0; base < num_experts; base += blockDim.x) {
    int place = base + threadIdx.x;
    i32 total = 0, before = 0, padded = 0;
    if (place < num_experts) {
      const int expert = places[place] & 0xffff;
      for (int rank = 0; rank < num_ranks; ++rank) {
        i32 sent = counts_in(record_of(world, epoch, rank))[expert];
        total += sent;
        if (rank < me) before += sent;
      }
      padded = static_cast<i32>(round_up(total, world.alignment));
      ahead[place] = before - padded;
      if (place >= first_local && place < end_local) {
        tokens_per_expert[place - first_local] = total;
      }
    }
    i32 sum = padded;
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) {
      i32 left = __shfl_up_sync(kFullWarp, sum, step);
      if (lane_id() >= step) sum += left;
    }
    __syncthreads();
    if (lane_id() == kWarp - 1) warp_sums[warp_id()] = sum;
    __syncthreads();
    sum += carry;
    for (int warp = 0; warp < warp_id(); ++warp) sum += warp_sums[warp];
    if (place < num_experts) start[place + 1] = sum;
    __syncthreads();
    if (threadIdx.x == blockDim.x - 1) carry = sum;
  }
  __syncthreads();
  for (int place = threadIdx.x; place < num_experts; place += blockDim.x) {
    const i32 of_rank = start[places[place] >> 16];
    slot_base[places[place] & 0xffff] = ahead[place] + start[place + 1] - of_rank;
    if (place >= first_local && place < end_local) {
      expert_offsets[place - first_local] = start[place] - of_rank;
    }
  }
  bool has_room = true;
  i64 most = 0;
  // From the last thread on: the first ones have experts.
  for (int rank = blockDim.x - 1 - threadIdx.x; rank < num_ranks; rank += blockDim.x) {
    const i64* record = record_of(world, epoch, rank);
    i32 num_rows = start[first_place[rank + 1]] - start[first_place[rank]];
    links.arrivals[rank] = counts_in(record)[num_experts + me];
    links.sends[rank] = counts_in(record_of(world, epoch, me))[num_experts + rank];
    links.rows[rank] = num_rows;
    i32 at = 0, from = 0;
    const i32* mine = counts_in(record_of(world, epoch, me));
    for (int other = 0; other < num_ranks; ++other) {
      if (other < me && other != rank) at += counts_in(record)[num_experts + other];
      if (other < rank && other != me) from += mine[num_experts + other];
    }
    links.return_at[rank] = at;
    links.return_from[rank] = from;
    // What is always as large is measured in rows.
    i64 size = world.static_rows ? num_rows : block_bytes(args.row_bytes, args.num_parts, num_rows);
    most = max(most, size);
    has_room = has_room && size <= (world.static_rows ? world.static_rows : record[kCapacity]);
    if (rank == me) expert_offsets[end_local - first_local] = num_rows;
  }
  __shared__ u64 largest;
  if (threadIdx.x == 0) largest = 0;
  __syncthreads();
  if (most) atomicMax(&largest, static_cast<u64>(most));
  has_room = __syncthreads_and(has_room);
  *need = static_cast<i64>(largest);
  return has_room;
}

// The leader's part: exchange and lay out; leaves the verdict for all blocks. `start`, `ahead` and
// `places` have room for E + 1, E and E numbers.
__device__ __forceinline__ void lead(const World& world, const Call& call, const PlanArgs& args,
                                     u32 epoch, i32* start, i32* ahead, u32* places) {
  State& state = state_of(world);
  i32* totals = reinterpret_cast<i32*>(world.totals);
  const int num_counts = world.num_experts + world.num_ranks;
  const bool is_bad = state.lowest_id < -1 || state.highest_id >= world.num_experts;
  const i64 status = call.status == kReady && is_bad ? static_cast<i64>(kBadInput) : call.status;
  publish(world, call, epoch, status, call.plan, totals, num_counts);
  look_up_places(world, places);
  i32 verdict = await_records(world, call, epoch, call.plan, true);
  for (int i = threadIdx.x; i < num_counts; i += blockDim.x) totals[i] = 0;
  i64 need = 0;
  if (verdict == kGo && !lay_out(world, args, epoch, places, start, ahead, &need)) {
    verdict = kShort;
  }
  const Links links(world, args.num_tokens, args.links);
  __syncthreads();
  // By a warp that has no pairs to place.
  if (threadIdx.x == kReporter) {
    const bool is_laid_out = verdict == kGo || verdict == kShort;
    report_to_host(world, call, verdict, is_laid_out ? links.rows[world.rank] : 0, need);
  }
  if (threadIdx.x != 0) return;
  if (is_bad && verdict == kUnlike) {
    report_failure(world, call, verdict, world.rank, state.lowest_id, state.highest_id);
  } else if (verdict == kUnlike || verdict == kStale || (verdict == kShort && world.static_rows)) {
    report_failure(world, call, verdict, -1, -1, need);
  }
  if (is_bad) state.lowest_id = state.highest_id = 0;
  state.verdict = verdict;
  state.arrived = 0;
  state.epoch = epoch;
  *links.number = verdict == kGo ? static_cast<i32>(epoch) : 0;
  store_release_gpu(&state.planned, epoch);
}

// Gives the pairs of this block's tokens their slots, in order. One warp counts experts, another
// the segments, that is, first pairs.
__device__ __forceinline__ void place(const World& world, const PlanArgs& args, const Chunk& chunk,
                                      const u32* ids, i32* counters) {
  const int top_k = world.top_k, stride = chunk.tokens_per_warp;
  const Links links(world, args.num_tokens, args.links);
  i32* pair_slot = reinterpret_cast<i32*>(args.pairs) + static_cast<i64>(args.num_tokens) * top_k;
  const bool counts_experts = warp_id() == 0;
  if (warp_id() > 1) return;
  for (int first = 0; first < chunk.size; first += stride) {
    int in_warp = lane_id() / top_k, token = first + in_warp;
    bool is_used = in_warp < stride && token < chunk.size;
    u32 id = is_used ? ids[first * top_k + lane_id()] : kNone;
    if (counts_experts) {
      u32 same = __match_any_sync(kFullWarp, id != kNone ? static_cast<i32>(id) : -1 - lane_id());
      i32 before = __popc(same & lanes_below());
      i32 slot = id != kNone ? counters[id & 0xffff] + before : -1;
      __syncwarp();
      if (id != kNone && before == 0) counters[id & 0xffff] += __popc(same);
      __syncwarp();
      i64 at = static_cast<i64>(chunk.begin) * top_k + first * top_k + lane_id();
      if (is_used) pair_slot[at] = slot;
      continue;
    }
    Pair pair = describe(id, in_warp, world.num_ranks);
    i32* counter = &counters[world.num_experts + pair.rank];
    u32 same =
        __match_any_sync(kFullWarp, pair.is_first ? static_cast<i32>(pair.rank) : -1 - lane_id());
    i32 before = __popc(same & lanes_below());
    i32 segment = pair.is_first ? *counter + before : 0;
    __syncwarp();
    if (pair.is_first && before == 0) *counter += __popc(same);
    __syncwarp();
    if (pair.is_first) {
      links.token_segment[static_cast<i64>(chunk.begin + token) * world.num_ranks + pair.rank] =
          segment;
    }
  }
}

// Called by a whole block: of an operation that is not carried out, whose outputs no expert may
// take for rows.
__device__ __forceinline__ void receive_nothing(const World& world, const PlanArgs& args) {
  for (int i = threadIdx.x; i <= world.num_local; i += blockDim.x) {
    reinterpret_cast<i32*>(args.expert_offsets)[i] = 0;
    if (i < world.num_local) reinterpret_cast<i64*>(args.tokens_per_expert)[i] = 0;
  }
}

extern "C" __global__ void __launch_bounds__(512, 1)
    plan(const __grid_constant__ World world, const __grid_constant__ Call call,
         const __grid_constant__ PlanArgs args) {
  extern __shared__ u32 shared[];
  const int num_counts = world.num_experts + world.num_ranks;
  i32* counters = reinterpret_cast<i32*>(shared);
  i32* start = counters + num_counts;
  u32* places = shared + 2 * num_counts + 1;
  u32* ids = places + num_counts;
  await_kernel_before();
  State& state = state_of(world);
  const u32 epoch = state.epoch + 1;
  const Links links(world, args.num_tokens, args.links);

  if (is_void(world, epoch)) {
    if (blockIdx.x != 0) return;
    receive_nothing(world, args);
    if (threadIdx.x == 0) {
      state.verdict = kVoid;
      *links.number = 0;
    }
    return;
  }
  Chunk chunk;
  chunk.begin = static_cast<int>(
      min(static_cast<i64>(blockIdx.x) * args.chunk_tokens, static_cast<i64>(args.num_tokens)));
  chunk.size = min(args.chunk_tokens, args.num_tokens - chunk.begin);
  chunk.tokens_per_warp = kWarp / world.top_k;

  for (int i = threadIdx.x; i < num_counts; i += blockDim.x) counters[i] = 0;
  for (int i = threadIdx.x; i < chunk.size * world.num_ranks; i += blockDim.x) {
    links.token_segment[static_cast<i64>(chunk.begin) * world.num_ranks + i] = -1;
  }
  __syncthreads();
  count(world, args, chunk, ids, counters);
  __syncthreads();
  i32* counted = reinterpret_cast<i32*>(world.counted);
  i32* totals = reinterpret_cast<i32*>(world.totals);
  for (int i = threadIdx.x; i < num_counts; i += blockDim.x) {
    counted[static_cast<i64>(blockIdx.x) * num_counts + i] = counters[i];
    if (counters[i]) atomicAdd(&totals[i], counters[i]);
  }
  __shared__ bool leads;
  __syncthreads();
  if (threadIdx.x == 0) leads = add_acq_rel_gpu(&state.arrived, 1) == gridDim.x - 1;
  __syncthreads();
  if (leads) lead(world, call, args, epoch, start, counters, places);

  __shared__ bool goes_on;
  if (threadIdx.x == 0) {
    // The leader waits once for its peers; twice that, so that its own report is the one.
    const bool is_led =
        wait_until(world, [&] { return load_acquire_gpu(&state.planned) == epoch; }, 2);
    // Pairs without slots must not be moved.
    if (!is_led) report_failure(world, call, kLost, world.rank, -1, 0);
    goes_on = is_led && state.verdict == kGo;
  }
  __syncthreads();
  if (!goes_on) {
    if (blockIdx.x == 0) receive_nothing(world, args);
    return;
  }
  let_next_kernel_begin();
  const i32* slot_base = reinterpret_cast<const i32*>(world.slot_base);
  for (int i = threadIdx.x; i < num_counts; i += blockDim.x) {
    i32 before = i < world.num_experts ? slot_base[i] : 0;
    for (int first = 0; first < blockIdx.x; first += kReadsAtOnce) {
#pragma unroll
      for (int j = 0; j < kReadsAtOnce; ++j) {
        const int block = first + j;
        before += block < blockIdx.x ? counted[block * num_counts + i] : 0;
      }
    }
    counters[i] = before;
  }
  __syncthreads();
  place(world, args, chunk, ids, counters);
}
