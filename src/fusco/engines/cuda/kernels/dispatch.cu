// Dispatch: every row is read once, written to its slots on this rank, and sent once to each other
// rank with an expert of its token, into the first of its slots there, the landing slot. The
// receiver's warps wait for it, and write it from there to the token's other slots.
//
// A warp takes tokens to send or segments to receive, one by one. Half of the warps begin with
// sending and go on with receiving, which waits; since sending never waits and any warp may do it,
// all is sent in the end, however few blocks run at once.
//
// Compiled with FUSCO_ELEMENT it is the backward of a combine: rows are gradients of sums, and what
// is written to a slot is its weight times the gradient, and instead of the weight the dot product
// of the gradient and the row that was combined, which is the gradient of the weight.

#include "agree.cuh"
#include "copy.cuh"
#include "links.cuh"
#ifdef FUSCO_ELEMENT
#include "element.cuh"
constexpr bool kWeighs = true;
#else
constexpr bool kWeighs = false;
#endif

// Where things lie on one rank.
struct Place {
  u8* part[kMaxParts];
  float* row_weights;
  u64 window;
};

struct Shipped {
  i32 slot;
  float weight;
};

// What a lane sets when what it has sent is written; null for nothing.
struct Arrival {
  u64* flag;
  u64 value;
};

__device__ __forceinline__ bool sends_first() { return warp_id() % 2 == 0; }

// Whether this warp is needed for so many items, of which each block should have as many; half of
// the warps come first. Where items are few, the first blocks to ask would leave the others none.
__device__ __forceinline__ bool is_needed(u32 num_items, bool comes_first) {
  const u32 place = warp_id() / 2 + (comes_first ? 0 : blockDim.x / kWarp / 2);
  return place * gridDim.x < num_items;
}

struct Dispatch {
  const World& world;
  const Call& call;
  const DispatchArgs& args;
  const Links links;
  const Place* places;
  const u32 epoch;
  RowSlot& slot;

  __device__ __forceinline__ u64* arrival_flag(u64 window, int from, i32 segment) const {
    i64 index = static_cast<i64>(from) * world.max_tokens + segment;
    return at_bytes<u64>(window, world.arrival_flags_at + index * 8);
  }

  __device__ __forceinline__ Shipped* shipment(u64 window, int from, i32 segment) const {
    i64 index = static_cast<i64>(from) * world.max_tokens + segment;
    return at_bytes<Shipped>(window, world.shipments_at + index * world.top_k * 8);
  }

  // Bytes `at` and following of a gradient are in the slot: for each lane with `wants`, writes its
  // row's weight times them, and returns their product with the row that was combined.
  __device__ __forceinline__ float weigh(i32 row, bool wants, i32 at, i32 size) const {
    float mine = 0;
#ifdef FUSCO_ELEMENT
    constexpr int kInFlight = FUSCO_BULK ? 7 : 4;
    const i32 row_bytes = args.row_bytes[0];
    for (u32 left = __ballot_sync(kFullWarp, wants); left; left &= left - 1) {
      const int lane = __ffs(left) - 1;
      const i64 its_row = __shfl_sync(kFullWarp, row, lane);
      const Wide weight = reinterpret_cast<const float*>(args.weights)[its_row];
      const u8* combined = reinterpret_cast<const u8*>(args.combined) + its_row * row_bytes + at;
      u8* out = places[world.rank].part[0] + its_row * row_bytes + at;
      Wide dot = 0;
      for (i32 first = lane_id() * 16; first - lane_id() * 16 < size;
           first += kInFlight * kWarp * 16) {
        Vector loaded[kInFlight];
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) {
          const i32 here = first + i * kWarp * 16;
          if (here < size) loaded[i] = load_streamed(combined + here);
        }
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) {
          const i32 here = first + i * kWarp * 16;
          if (here >= size) break;
          const Vector gradient = *reinterpret_cast<const Vector*>(slot.bytes + here);
          Wide weighed[kPerVector];
#pragma unroll
          for (int j = 0; j < kPerVector; ++j) {
            const Wide value = widen(gradient, j);
            dot += value * widen(loaded[i], j);
            weighed[j] = multiply_exact(value, weight);
          }
          store_vector(out + here, narrow(weighed));
        }
      }
#pragma unroll
      for (int step = kWarp / 2; step > 0; step /= 2) dot += __shfl_xor_sync(kFullWarp, dot, step);
      if (lane_id() == lane) mine = static_cast<float>(dot);
    }
#endif
    return mine;
  }

  // Returns while the copies are on their way.
  __device__ __forceinline__ Arrival send(i32 token) const {
    const int top_k = world.top_k, lane = lane_id();
    const i64 pair = static_cast<i64>(token) * top_k + lane;
    const i32* pair_rank = reinterpret_cast<const i32*>(args.pairs);
    const i32* pair_slot = pair_rank + static_cast<i64>(args.num_tokens) * top_k;
    i32 rank = -1, to_slot = -1;
    float weight = 1;
    if (lane < top_k) {
      rank = pair_rank[pair];
      to_slot = pair_slot[pair];
      if (!kWeighs && args.weights) weight = reinterpret_cast<const float*>(args.weights)[pair];
    }
    const bool is_there = rank >= 0;
    if (!__any_sync(kFullWarp, is_there)) return Arrival{nullptr};
    const u32 same = __match_any_sync(kFullWarp, is_there ? rank : -1 - lane);
    const i32 index = __popc(same & lanes_below()), count = __popc(same);
    const bool is_own = rank == world.rank, is_first = is_there && index == 0;
    i32 segment = 0;
    if (is_first) segment = links.token_segment[static_cast<i64>(token) * world.num_ranks + rank];
    segment = __shfl_sync(kFullWarp, segment, __ffs(same) - 1);
    if (is_there) {
      if (is_own) {
        if (!kWeighs) places[rank].row_weights[to_slot] = weight;
        i32* slots = links.slots(world, rank, segment);
        slots[index] = to_slot;
        if (is_first) {
#pragma unroll 1
          for (int i = count; i < top_k; ++i) slots[i] = -1;
        }
      } else {
        shipment(places[rank].window, world.rank, segment)[index] = Shipped{to_slot, weight};
      }
    }
    float dot = 0;
    for (int part = 0; part < args.num_parts; ++part) {
      const i32 row_bytes = args.row_bytes[part];
      const u8* row =
          reinterpret_cast<const u8*>(args.rows[part]) + static_cast<i64>(token) * row_bytes;
      const bool wants = is_own || is_first;
      u8* to = wants ? places[rank].part[part] + static_cast<i64>(to_slot) * row_bytes : nullptr;
      for (i32 at = 0; at < row_bytes; at += args.slot_bytes) {
        const i32 size = min(args.slot_bytes, row_bytes - at);
        slot.fill(row + at, size);
        slot.send(to + at, wants && !(kWeighs && is_own), size);
        if (kWeighs) dot += weigh(to_slot, is_own, at, size);
        slot.wait_read();
      }
    }
    if (kWeighs && is_own) places[rank].row_weights[to_slot] = dot;
    if (!is_first || is_own) return Arrival{nullptr};
    return Arrival{arrival_flag(places[rank].window, world.rank, segment),
                   static_cast<u64>(epoch) << 32 | count};
  }

  __device__ __forceinline__ void announce(const Arrival& arrival) const {
    if (!__any_sync(kFullWarp, arrival.flag != nullptr)) return;
    slot.wait_written();
    if (arrival.flag) store_release(arrival.flag, arrival.value);
  }

  // How many slots a segment has; 0 where its sender is lost.
  __device__ __forceinline__ i32 await(int from, i32 segment) const {
    const u64* flag = arrival_flag(places[world.rank].window, from, segment);
    i32 count = 0;
    if (lane_id() == 0) {
      u64 seen = 0;
      if (wait_for(world, call, from, segment, links.arrivals[from], [&] {
            seen = load_acquire(flag);
            return seen >> 32 == epoch;
          })) {
        count = static_cast<i32>(seen);
      }
    }
    count = __shfl_sync(kFullWarp, count, 0);
    __syncwarp();
    return count;
  }

  // From the landing slot to the others.
  __device__ __forceinline__ void fan_out(int from, i32 segment, i32 count) const {
    const int top_k = world.top_k, lane = lane_id();
    const Place& own = places[world.rank];
    Shipped shipped{-1, 0};
    if (lane < count) shipped = shipment(own.window, from, segment)[lane];
    if (lane < top_k) links.slots(world, from, segment)[lane] = shipped.slot;
    if (!kWeighs && lane < count) own.row_weights[shipped.slot] = shipped.weight;
    if (!kWeighs && count == 1) return;
    float dot = 0;
    const i32 landing = __shfl_sync(kFullWarp, shipped.slot, 0);
    for (int part = 0; part < args.num_parts; ++part) {
      const i32 row_bytes = args.row_bytes[part];
      const u8* row = own.part[part] + static_cast<i64>(landing) * row_bytes;
      u8* to = own.part[part] + static_cast<i64>(shipped.slot) * row_bytes;
      for (i32 at = 0; at < row_bytes; at += args.slot_bytes) {
        const i32 size = min(args.slot_bytes, row_bytes - at);
        slot.fill(row + at, size, true);
        slot.send(to + at, !kWeighs && lane > 0 && lane < count, size);
        if (kWeighs) dot += weigh(shipped.slot, lane < count, at, size);
        slot.wait_read();
      }
    }
    if (kWeighs && lane < count) own.row_weights[shipped.slot] = dot;
  }

  __device__ __forceinline__ void send_all(Claim claim) const {
    for (u32 token = claim.take(); token < args.num_tokens; token = claim.take()) {
      const Arrival arrival = send(static_cast<i32>(token));
      claim.ask();
      announce(arrival);
    }
  }

  __device__ __forceinline__ void receive_all(State& state) const {
    const u32 num_others = world.num_ranks - 1;
    if (num_others == 0) return;
    const u32 end =
        num_others * most_arrivals(world, [&](int rank) { return links.arrivals[rank]; });
    if (!is_needed(end, !sends_first())) return;
    Claim claim{&state.queue[1]};
    claim.ask();
    for (u32 item = claim.take(); item < end; item = claim.take()) {
      // The next rank first, so that not all wait for the same.
      const int from = (world.rank + 1 + item % num_others) % world.num_ranks;
      const i32 segment = item / num_others;
      const bool is_there = segment < links.arrivals[from];
      const i32 count = is_there ? await(from, segment) : 0;
      if (is_there && count == 0) return;
      claim.ask();
      if (is_there) fan_out(from, segment, count);
    }
  }

  // Rows that only pad an expert are zero.
  __device__ __forceinline__ void pad() const {
    const i64* tokens_per_expert = reinterpret_cast<const i64*>(args.tokens_per_expert);
    const i32* expert_offsets = reinterpret_cast<const i32*>(args.expert_offsets);
    const Place& own = places[world.rank];
    slot.clear(args.slot_bytes);
    const int num_warps = gridDim.x * (blockDim.x / kWarp);
    for (int expert = blockIdx.x + gridDim.x * warp_id(); expert < world.num_local;
         expert += num_warps) {
      const i32 begin = expert_offsets[expert] + static_cast<i32>(tokens_per_expert[expert]);
      const i32 end = expert_offsets[expert + 1];
      for (i32 base = begin; base < end; base += kWarp) {
        const i32 row = base + lane_id();
        const bool wants = row < end;
        if (wants) own.row_weights[row] = 0;
        for (int part = 0; part < args.num_parts; ++part) {
          const i32 row_bytes = args.row_bytes[part];
          for (i32 at = 0; at < row_bytes; at += args.slot_bytes) {
            slot.send(own.part[part] + static_cast<i64>(row) * row_bytes + at, wants,
                      min(args.slot_bytes, row_bytes - at));
          }
        }
      }
    }
    slot.wait_read();
  }
};

// Called by a whole block.
__device__ __forceinline__ void find_places(const World& world, const DispatchArgs& args, u32 epoch,
                                            const Links& links, Place* places) {
  const u64* heaps = reinterpret_cast<const u64*>(world.heaps);
  for (int rank = threadIdx.x; rank < world.num_ranks; rank += blockDim.x) {
    const i64* record = record_of(world, epoch, rank);
    const u64 block = heaps[record[kChunk] * world.num_ranks + rank] + record[kBase];
    const i64 num_rows = rows_of_block(world, links, rank);
    for (int part = 0; part < args.num_parts; ++part) {
      places[rank].part[part] = at_bytes<u8>(block, part_at(args.row_bytes, part, num_rows));
    }
    places[rank].row_weights =
        at_bytes<float>(block, part_at(args.row_bytes, args.num_parts, num_rows));
    places[rank].window = window_of(world, rank);
  }
  if (blockIdx.x == 0) {
    i64 row_bytes = 0;
#pragma unroll 1
    for (int part = 0; part < args.num_parts; ++part) row_bytes += args.row_bytes[part];
    for (int rank = threadIdx.x; rank < world.num_ranks; rank += blockDim.x) {
      reinterpret_cast<u64*>(world.sent_bytes)[rank] += links.sends[rank] * row_bytes;
    }
    const i64* tokens_per_expert = reinterpret_cast<const i64*>(args.tokens_per_expert);
    for (int i = threadIdx.x; i < world.num_local; i += blockDim.x) {
      atomicAdd(&state_of(world).num_rows, static_cast<u64>(tokens_per_expert[i]));
    }
  }
  __syncthreads();
}

extern "C" __global__ void __launch_bounds__(kWeighs ? 512 : 448, 1)
    dispatch(const __grid_constant__ World world, const __grid_constant__ Call call,
             const __grid_constant__ DispatchArgs args) {
  extern __shared__ __align__(128) u8 shared[];
  const int num_warps = blockDim.x / kWarp;
  u64* barriers = reinterpret_cast<u64*>(shared + static_cast<i64>(num_warps) * args.slot_bytes);
  Place* places = reinterpret_cast<Place*>(barriers + num_warps);
  await_kernel_before();
  State& state = state_of(world);
  const Links links(world, args.num_tokens, args.links);
  u32 epoch = state.epoch;
  i32 verdict;
  if (args.is_planned) {
    verdict = agree(world, call, ++epoch, links.number, [] {});
    i64 need = 0;
    for (int rank = 0; verdict == kGo && rank < world.num_ranks; ++rank) {
      need =
          max(need, block_bytes(args.row_bytes, args.num_parts, rows_of_block(world, links, rank)));
    }
    for (int rank = 0; verdict == kGo && rank < world.num_ranks; ++rank) {
      const i64 bytes =
          block_bytes(args.row_bytes, args.num_parts, rows_of_block(world, links, rank));
      if (bytes > record_of(world, epoch, rank)[kCapacity]) verdict = kShort;
    }
    if (blockIdx.x == 0 && threadIdx.x == 0) {
      report_to_host(world, call, verdict, links.rows[world.rank], need);
    }
  } else {
    // All threads conclude the same, also of a loss that another block finds meanwhile.
    const bool is_lost = __syncthreads_or(state.lost != 0);
    verdict = is_lost ? static_cast<i32>(kLost) : state.verdict;
  }
  if (verdict == kGo) {
    Claim token{&state.queue[0]};
    const bool sends = is_needed(args.num_tokens, sends_first());
    if (sends && sends_first()) token.ask();
    find_places(world, args, epoch, links, places);
    RowSlot slot(shared + static_cast<i64>(warp_id()) * args.slot_bytes, barriers + warp_id());
    const Dispatch work{world, call, args, links, places, epoch, slot};
    if (sends && sends_first()) work.send_all(token);
    work.receive_all(state);
    if (sends && !sends_first()) {
      token.ask();
      work.send_all(token);
    }
    if (world.alignment > 1) work.pad();
    slot.wait_written();
  }
  finish(state, args.is_planned && verdict == kVoid ? epoch - 1 : epoch);
}
