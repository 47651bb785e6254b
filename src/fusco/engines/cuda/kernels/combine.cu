// Combine: the rank of an expert sums a token's rows there and sends one row, its partial, to the
// token's rank, which adds the partials up in the order of the contract (engines/base.py).
//
// A warp takes segments to return or tokens to sum, one by one. Half of the warps begin with
// returning, which never waits, and go on with summing, which does.

#include "agree.cuh"
#include "element.cuh"
#include "links.cuh"

constexpr int kColumns = 2;    // vectors of a row that a lane sums at once
constexpr int kInFlight = 4;   // rows of which it has them in flight

struct Sums {
  Wide value[kColumns][kPerVector];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
#pragma unroll
      for (int i = 0; i < kPerVector; ++i) value[c][i] = 0;
    }
  }

  __device__ __forceinline__ void add(int column, const Vector& vector) {
#pragma unroll
    for (int i = 0; i < kPerVector; ++i) value[column][i] = add_exact(value[column][i], widen(vector, i));
  }

  __device__ __forceinline__ void add(int column, const Vector& vector, Wide weight) {
#pragma unroll
    for (int i = 0; i < kPerVector; ++i) {
      Wide term = multiply_exact(widen(vector, i), weight);
      value[column][i] = add_exact(value[column][i], term);
    }
  }
};

struct Combine {
  const World& world;
  const Call& call;
  const CombineArgs& args;
  const Links links;
  const u32 epoch;

  __device__ __forceinline__ u64* return_flag(u64 window, i64 row) const {
    return at_bytes<u64>(window, world.return_flags_at) + args.part * static_cast<i64>(world.num_returns) + row;
  }

  // Adds rows `slot` (one a lane, `count` of them) times their weights, at vectors `first + 32 c`.
  __device__ __forceinline__ void add_rows(Sums& sums, i32 slot, float weight, int count, i32 first,
                                           i32 num_vectors) const {
    const u8* rows = reinterpret_cast<const u8*>(args.rows);
    for (int begin = 0; begin < count; begin += kInFlight) {
      Vector loaded[kInFlight][kColumns];
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        const i64 row = __shfl_sync(kFullWarp, slot, min(begin + i, count - 1));
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          if (begin + i < count && first + c * kWarp < num_vectors) {
            loaded[i][c] = load_streamed(rows + row * args.row_bytes + (first + c * kWarp) * 16LL);
          }
        }
      }
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        const Wide factor = __shfl_sync(kFullWarp, weight, min(begin + i, count - 1));
        if (begin + i >= count) break;
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          if (args.row_weights) {
            sums.add(c, loaded[i][c], factor);
          } else {
            sums.add(c, loaded[i][c]);
          }
        }
      }
    }
  }

  // The slots of a segment, one a lane, and their number.
  __device__ __forceinline__ int slots_of(int from, i32 segment, i32& slot, float& weight) const {
    slot = lane_id() < world.top_k ? links.slots(world, from, segment)[lane_id()] : -1;
    weight = 1;
    if (slot >= 0 && args.row_weights) weight = reinterpret_cast<const float*>(args.row_weights)[slot];
    return __popc(__ballot_sync(kFullWarp, slot >= 0));
  }

  __device__ __forceinline__ void give_back(int to, i32 segment) const {
    const u64 window = window_of(world, to);
    const i64 row = links.return_at[to] + segment;
    u8* partial = at_bytes<u8>(window, args.returns_at + row * args.row_bytes);
    i32 slot;
    float weight;
    const int count = slots_of(to, segment, slot, weight);
    const i32 num_vectors = args.row_bytes / 16;
    for (i32 first = lane_id(); first - lane_id() < num_vectors; first += kColumns * kWarp) {
      Sums sums;
      sums.clear();
      add_rows(sums, slot, weight, count, first, num_vectors);
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const i32 vector = first + c * kWarp;
        if (vector < num_vectors) store_vector(partial + vector * 16LL, narrow(sums.value[c]));
      }
    }
    if (args.row_values && slot >= 0) {
      float* values = at_bytes<float>(window, world.values_at) + row * world.top_k;
      values[lane_id()] = reinterpret_cast<const float*>(args.row_values)[slot];
    }
    __syncwarp();
    if (lane_id() == 0) store_release(return_flag(window, row), epoch);
  }

  // Returns false where a partial's sender is lost.
  __device__ __forceinline__ bool sum(i32 token) const {
    const u64 own = window_of(world, world.rank);
    const i32* order = reinterpret_cast<const i32*>(world.rank_order);
    const i32* node_of_rank = reinterpret_cast<const i32*>(world.node_of_rank);
    const i32* segments = links.token_segment + static_cast<i64>(token) * world.num_ranks;
    // Lane i holds the i-th of the token's partials, in order: where it lies, and its node.
    i64 partial_row = -1;
    i32 partial_node = 0;
    int num_partials = 0, own_at = -1;
    i32 own_segment = 0;
    bool is_there = true;
    for (int base = 0; base < world.num_ranks; base += kWarp) {
      const int position = base + lane_id();
      const int rank = position < world.num_ranks ? order[position] : -1;
      const i32 segment = rank >= 0 ? segments[rank] : -1;
      i64 row = -1;
      if (segment >= 0 && rank != world.rank) {
        row = links.return_from[rank] + segment;
        const u64* flag = return_flag(own, row);
        is_there = is_there && wait_for(world, call, rank, token, [&] { return load_acquire(flag) == epoch; });
      }
      u32 left = __ballot_sync(kFullWarp, segment >= 0);
      while (left) {
        const int lane = __ffs(left) - 1;
        left &= left - 1;
        const i64 its_row = __shfl_sync(kFullWarp, row, lane);
        const int its_rank = __shfl_sync(kFullWarp, rank, lane);
        if (lane_id() == num_partials) {
          partial_row = its_row;
          partial_node = node_of_rank[its_rank];
        }
        if (its_rank == world.rank) {
          own_at = num_partials;
          own_segment = __shfl_sync(kFullWarp, segment, lane);
        }
        ++num_partials;
      }
    }
    if (!__all_sync(kFullWarp, is_there)) return false;
    i32 slot = -1;
    float weight = 0;
    int count = 0;
    if (own_at >= 0) count = slots_of(world.rank, own_segment, slot, weight);

    const u8* returns = at_bytes<u8>(own, args.returns_at);
    u8* out = reinterpret_cast<u8*>(args.out) + static_cast<i64>(token) * args.row_bytes;
    const i32 num_vectors = args.row_bytes / 16;
    for (i32 first = lane_id(); first - lane_id() < num_vectors; first += kColumns * kWarp) {
      Sums own_sums, node_sums, total;
      own_sums.clear();
      add_rows(own_sums, slot, weight, count, first, num_vectors);
      node_sums.clear();
      total.clear();
      i32 node = num_partials ? __shfl_sync(kFullWarp, partial_node, 0) : 0;
      for (int i = 0; i < num_partials; ++i) {
        const i64 row = __shfl_sync(kFullWarp, partial_row, i);
        const i32 its_node = __shfl_sync(kFullWarp, partial_node, i);
        if (its_node != node) {
#pragma unroll
          for (int c = 0; c < kColumns; ++c) total.add(c, narrow(node_sums.value[c]));
          node_sums.clear();
          node = its_node;
        }
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          const i32 vector = first + c * kWarp;
          if (vector >= num_vectors) break;
          node_sums.add(c, i == own_at ? narrow(own_sums.value[c])
                                       : load_vector(returns + row * args.row_bytes + vector * 16LL));
        }
      }
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const i32 vector = first + c * kWarp;
        total.add(c, narrow(node_sums.value[c]));
        if (vector < num_vectors) store_vector(out + vector * 16LL, narrow(total.value[c]));
      }
    }
    if (args.pair_values) return_values(token);
    return true;
  }

  __device__ __forceinline__ void return_values(i32 token) const {
    const int lane = lane_id(), top_k = world.top_k;
    const i32* pair_rank = reinterpret_cast<const i32*>(args.pairs);
    const i32* pair_slot = pair_rank + static_cast<i64>(args.num_tokens) * top_k;
    const i64 pair = static_cast<i64>(token) * top_k + lane;
    const i32 rank = lane < top_k ? pair_rank[pair] : -1;
    const u32 same = __match_any_sync(kFullWarp, rank >= 0 ? rank : -1 - lane);
    const i32 index = __popc(same & lanes_below());
    float value = 0;
    if (rank == world.rank) {
      value = reinterpret_cast<const float*>(args.row_values)[pair_slot[pair]];
    } else if (rank >= 0) {
      const i64 row = links.return_from[rank] +
                      links.token_segment[static_cast<i64>(token) * world.num_ranks + rank];
      value = at_bytes<float>(window_of(world, world.rank), world.values_at)[row * top_k + index];
    }
    if (lane < top_k) reinterpret_cast<float*>(args.pair_values)[pair] = value;
  }

  __device__ __forceinline__ void give_back_all(State& state) const {
    const u32 num_others = world.num_ranks - 1;
    if (num_others == 0) return;
    i32 most = 0;
    for (int rank = 0; rank < world.num_ranks; ++rank) {
      if (rank != world.rank) most = max(most, links.arrivals[rank]);
    }
    const u32 end = num_others * most;
    for (u32 item = claim(&state.queue[0]); item < end; item = claim(&state.queue[0])) {
      const int to = (world.rank + 1 + item % num_others) % world.num_ranks;
      const i32 segment = item / num_others;
      if (segment < links.arrivals[to]) give_back(to, segment);
    }
  }

  __device__ __forceinline__ void sum_all(State& state) const {
    for (u32 token = claim(&state.queue[1]); token < args.num_tokens; token = claim(&state.queue[1])) {
      if (!sum(static_cast<i32>(token))) return;
    }
  }
};

// A combine of several tensors is several kernels, of which the first agrees for all.
extern "C" __global__ void __launch_bounds__(256, 2)
    combine(const __grid_constant__ World world, const __grid_constant__ Call call,
            const __grid_constant__ CombineArgs args) {
  State& state = state_of(world);
  const u32 epoch = state.epoch + 1;
  const i32 verdict = args.part == 0 ? agree(world, call, epoch) : state.verdict;
  if (verdict == kGo) {
    const Combine work{world, call, args, Links(world, args.num_tokens, args.links), epoch};
    if (blockIdx.x == 0) {
      for (int rank = threadIdx.x; rank < world.num_ranks; rank += blockDim.x) {
        reinterpret_cast<u64*>(world.sent_bytes)[rank] +=
            work.links.arrivals[rank] * static_cast<i64>(args.row_bytes);
      }
    }
    if (warp_id() % 2 == 0) work.give_back_all(state);
    work.sum_all(state);
    work.give_back_all(state);
  }
  if (finish(state, args.is_last ? epoch : epoch - 1)) state.verdict = verdict;
}
