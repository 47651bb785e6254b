// Combine: the rank of an expert sums a token's rows there and sends one row, its partial, to the
// token's rank, which adds the partials up in the order of the contract (engines/base.py).
//
// A block is a pipeline. Its first warp takes segments to return or tokens to sum, items, and
// fetches piece by piece of their rows into shared memory; two groups of warps sum these there, an
// item each in turn; the last few warps send the sums on, likewise. Half of the blocks begin with
// returning, which never waits for others, and go on with summing, which does.

#include "agree.cuh"
#include "element.cuh"
#include "links.cuh"
#include "pipeline.cuh"

// What becomes of a row of a piece.
enum Op : u32 {
  kEndTerm = 1,  // the sum so far is one of several partials: it is rounded and added to its node's
  kEndNode = 2,  // that of the node is one of several: it is rounded and added to the token's
};

struct alignas(16) Row {
  i32 at;  // where it lies among the rows in shared memory
  u32 op;
  float weight;
  i32 unused;
};

struct Piece {
  u8* out;    // where the sum goes
  u64* flag;  // what to set then; null for none
  i32 size;   // bytes of each row; negative where there are no more pieces
  i32 num_rows;
  u32 ops;  // all that its rows have
  i32 unused;
  Row rows[kWarp];
};

struct Sent {
  u8* out;
  u64* flag;
  i32 size;
};

// What the warps of a block share.
struct Shared {
  Barrier full[kPieces], empty[kPieces];
  Barrier sum_full[kSenders * kBuffers], sum_empty[kSenders * kBuffers];
  Sent sent[kSenders * kBuffers];
  Piece pieces[kPieces];
};

static_assert(sizeof(Shared) <= kCombineSharedBytes, "see structs.py");

constexpr int kGroupThreads = kGroupWarps * kWarp;
constexpr int kCombineThreads = kWarp + kGroups * kGroupThreads + kSenders * kWarp;
static_assert(kSenders % kGroups == 0, "a sender serves one group");

struct Fetcher {
  const World& world;
  const Call& call;
  const CombineArgs& args;
  const Links& links;
  const u32 epoch;
  Shared& shared;
  u8* rows_in_shared;
  // The lanes of the warp look at several items at once, `width` lanes each.
  const int width, num_items;
  // Pieces and slots of the ring: taken, and given back so far.
  u32 head = 0, tail = 0;
  i32 next_slot = 0, num_free;

  __device__ __forceinline__ Fetcher(const World& world, const Call& call, const CombineArgs& args,
                                     const Links& links, u32 epoch, Shared& shared, u8* rows)
      : world(world),
        call(call),
        args(args),
        links(links),
        epoch(epoch),
        shared(shared),
        rows_in_shared(rows),
        width(max(world.top_k, min(world.num_ranks, kWarp))),
        num_items(max(1, min(kWarp / width, args.items_at_once))),
        num_free(args.num_slots) {}

  __device__ __forceinline__ u64* return_flag(u64 window, i64 row) const {
    return at_bytes<u64>(window, world.return_flags_at) +
           args.part * static_cast<i64>(world.num_returns) + row;
  }

  __device__ __forceinline__ const u8* row_at(i32 slot) const {
    return reinterpret_cast<const u8*>(args.rows) + static_cast<i64>(slot) * args.row_bytes;
  }

  __device__ __forceinline__ float weight_of(i32 slot) const {
    return args.row_weights && slot >= 0 ? reinterpret_cast<const float*>(args.row_weights)[slot]
                                         : 1;
  }

  __device__ __forceinline__ u32 lanes_of(int item) const {
    return (width == kWarp ? kFullWarp : (1u << width) - 1) << item * width;
  }

  // Until there is room for a piece of `num_rows` rows.
  __device__ __forceinline__ void make_room(i32 num_rows) {
    while (num_free < num_rows || head - tail == kPieces) {
      const u32 oldest = tail % kPieces;
      shared.empty[oldest].wait(tail / kPieces & 1);
      num_free += shared.pieces[oldest].num_rows;
      ++tail;
    }
  }

  // Lanes below `num_rows` each name a row; its sum goes to `out`.
  __device__ __forceinline__ void fetch(const u8* row, u32 op, float weight, i32 num_rows, u8* out,
                                        u64* flag) {
    const u32 ops = __reduce_or_sync(kFullWarp, lane_id() < num_rows ? op : 0);
    for (i32 at = 0; at < args.row_bytes; at += args.piece_bytes) {
      const i32 size = min(args.piece_bytes, args.row_bytes - at);
      make_room(num_rows);
      Piece& piece = shared.pieces[head % kPieces];
      i32 slot = next_slot + lane_id();
      if (slot >= args.num_slots) slot -= args.num_slots;
      if (lane_id() < num_rows) piece.rows[lane_id()] = Row{slot * args.piece_bytes, op, weight, 0};
      if (lane_id() == 0) {
        piece.out = out + at;
        piece.flag = at + size == args.row_bytes ? flag : nullptr;
        piece.size = size;
        piece.num_rows = num_rows;
        piece.ops = ops;
      }
      __syncwarp();
      fill_each(rows_in_shared + slot * args.piece_bytes, row + at, num_rows, size,
                &shared.full[head % kPieces]);
      next_slot += num_rows;
      if (next_slot >= args.num_slots) next_slot -= args.num_slots;
      num_free -= num_rows;
      ++head;
    }
  }

  // An item for each sender.
  __device__ __forceinline__ void fetch_end() {
    const int num_pieces = (args.row_bytes + args.piece_bytes - 1) / args.piece_bytes;
    for (int i = 0; i < kSenders * num_pieces; ++i) {
      make_room(0);
      Piece& piece = shared.pieces[head % kPieces];
      if (lane_id() == 0) {
        piece.size = -1;
        piece.num_rows = 0;
      }
      __syncwarp();
      fill_each(rows_in_shared, nullptr, 0, 0, &shared.full[head % kPieces]);
      ++head;
    }
  }

  // Which segment the lanes of an item look at, of those that arrived from other ranks.
  struct Segment {
    int rank;
    i32 number;  // -1 for none
  };

  __device__ __forceinline__ Segment arrived(u32 first, u32 end) const {
    const u32 item = lane_id() / width, number = first + item, num_others = world.num_ranks - 1;
    const int rank = (world.rank + 1 + number % num_others) % world.num_ranks;
    const i32 segment = number / num_others;
    const bool is_there = item < num_items && number < end && segment < links.arrivals[rank];
    return Segment{rank, is_there ? segment : -1};
  }

  __device__ __forceinline__ i32 slot_of(const Segment& segment) const {
    const int index = lane_id() % width;
    if (segment.number < 0 || index >= world.top_k) return -1;
    return links.slots(world, segment.rank, segment.number)[index];
  }

  // Lane i of an item holds the slot of its i-th row.
  __device__ __forceinline__ void give_back(const Segment& segment, i32 slot) {
    const int index = lane_id() % width, to = segment.rank;
    const float weight = weight_of(slot);
    const i64 return_row = links.return_at[to] + segment.number;
    if (args.row_values && slot >= 0) {
      float* values = at_bytes<float>(window_of(world, to), world.values_at);
      values[return_row * world.top_k + index] =
          reinterpret_cast<const float*>(args.row_values)[slot];
    }
    const u32 filled = __ballot_sync(kFullWarp, slot >= 0);
    for (int i = 0; i < num_items; ++i) {
      const i32 count = __popc(filled & lanes_of(i));
      if (count == 0) continue;
      const int source = min(i * width + lane_id(), kWarp - 1);
      const i32 its_slot = __shfl_sync(kFullWarp, slot, source);
      const float its_weight = __shfl_sync(kFullWarp, weight, source);
      const i64 row = __shfl_sync(kFullWarp, return_row, i * width);
      const u64 window = window_of(world, __shfl_sync(kFullWarp, to, i * width));
      fetch(row_at(its_slot), 0, its_weight, count,
            at_bytes<u8>(window, args.returns_at + row * args.row_bytes), return_flag(window, row));
    }
  }

  // Lane i of an item holds the i-th rank, in the order of the sum, and its segment of the token.
  __device__ __forceinline__ Segment of_token(u32 first) const {
    const int item = lane_id() / width, index = lane_id() % width;
    const i64 token = static_cast<i64>(first) + item;
    const int rank =
        index < world.num_ranks ? reinterpret_cast<const i32*>(world.rank_order)[index] : -1;
    const bool is_there = item < num_items && token < args.num_tokens && rank >= 0;
    return Segment{rank, is_there ? links.token_segment[token * world.num_ranks + rank] : -1};
  }

  // The own rank's segment among those of an item's lanes, in all of them.
  __device__ __forceinline__ Segment own_of(const Segment& segment) const {
    const int item = min(lane_id() / width, num_items - 1);
    const u32 own = __ballot_sync(kFullWarp, segment.rank == world.rank && segment.number >= 0);
    const int lane = __ffs(own & lanes_of(item)) - 1;
    const i32 number = __shfl_sync(kFullWarp, segment.number, max(lane, 0));
    return Segment{world.rank, lane >= 0 && lane_id() / width < num_items ? number : -1};
  }

  // Tokens `first` and following; lane i of each also holds the slot of its i-th own row. False
  // where a partial's sender is lost.
  __device__ __forceinline__ bool sum(u32 first, const Segment& segment, i32 slot) {
    const i64 token = static_cast<i64>(first) + lane_id() / width;
    const int rank = segment.rank;
    const bool is_there = segment.number >= 0, is_own = is_there && rank == world.rank;
    const float weight = weight_of(slot);
    const u8* partial = nullptr;
    bool has_come = true;
    if (is_there && !is_own) {
      const u64 window = window_of(world, world.rank);
      const i64 row = links.return_from[rank] + segment.number;
      const u64* flag = return_flag(window, row);
      has_come = wait_for(world, call, rank, token, [&] { return load_acquire(flag) == epoch; });
      partial = at_bytes<u8>(window, args.returns_at + row * args.row_bytes);
    }
    if (!__all_sync(kFullWarp, has_come)) return false;
    __syncwarp();
#if FUSCO_BULK
    asm volatile("fence.proxy.async;" ::: "memory");
#endif
    const i32 node = rank >= 0 ? reinterpret_cast<const i32*>(world.node_of_rank)[rank] : 0;
    const u32 terms = __ballot_sync(kFullWarp, is_there),
              own_terms = __ballot_sync(kFullWarp, is_own);
    const u32 filled = __ballot_sync(kFullWarp, slot >= 0);
    const u8* own_row = row_at(slot);
    for (int i = 0; i < num_items && first + i < args.num_tokens; ++i) {
      const int base = i * width;
      const i32 num_own = __popc(filled & lanes_of(i));
      // Lane j takes the j-th row in the order of the sum, and finds the lane that knows it.
      i32 num_rows = 0, last_node = -1;
      int source = 0;
      bool takes_own = false;
      u32 op = 0;
      for (u32 left = terms & lanes_of(i); left; left &= left - 1) {
        const int lane = __ffs(left) - 1;
        const bool owns = own_terms >> lane & 1;
        const i32 its_node = __shfl_sync(kFullWarp, node, lane), count = owns ? num_own : 1;
        if (num_rows && its_node != last_node && lane_id() == num_rows - 1) op |= kEndNode;
        last_node = its_node;
        const int mine = lane_id() - num_rows;
        if (mine >= 0 && mine < count) {
          takes_own = owns;
          source = owns ? base + mine : lane;
          op = mine == count - 1 ? kEndTerm : 0;
        }
        num_rows += count;
      }
      // What there is only one of needs no end.
      const bool has_nodes = __any_sync(kFullWarp, op & kEndNode);
      if (lane_id() == num_rows - 1 && has_nodes) op |= kEndNode;
      if (__popc(terms & lanes_of(i)) == 1) op &= ~kEndTerm;
      const u64 from_own = __shfl_sync(kFullWarp, reinterpret_cast<u64>(own_row), source);
      const u64 from_partial = __shfl_sync(kFullWarp, reinterpret_cast<u64>(partial), source);
      const float own_weight = __shfl_sync(kFullWarp, weight, source);
      u8* out = reinterpret_cast<u8*>(args.out) + (static_cast<i64>(first) + i) * args.row_bytes;
      fetch(reinterpret_cast<const u8*>(takes_own ? from_own : from_partial), op,
            takes_own ? own_weight : 1, num_rows, out, nullptr);
      if (args.pair_values) return_values(first + i);
    }
    return true;
  }

  __device__ __forceinline__ void return_values(i64 token) const {
    const int lane = lane_id(), top_k = world.top_k;
    const i32* pair_rank = reinterpret_cast<const i32*>(args.pairs);
    const i32* pair_slot = pair_rank + static_cast<i64>(args.num_tokens) * top_k;
    const i64 pair = token * top_k + lane;
    const i32 rank = lane < top_k ? pair_rank[pair] : -1;
    const u32 same = __match_any_sync(kFullWarp, rank >= 0 ? rank : -1 - lane);
    const i32 index = __popc(same & lanes_below());
    float value = 0;
    if (rank == world.rank) {
      value = reinterpret_cast<const float*>(args.row_values)[pair_slot[pair]];
    } else if (rank >= 0) {
      const i64 row = links.return_from[rank] + links.token_segment[token * world.num_ranks + rank];
      value = at_bytes<float>(window_of(world, world.rank), world.values_at)[row * top_k + index];
    }
    if (lane < top_k) reinterpret_cast<float*>(args.pair_values)[pair] = value;
  }

  __device__ __forceinline__ void give_back_all(State& state) {
    const u32 num_others = world.num_ranks - 1;
    i32 most = 0;
    for (int rank = 0; rank < world.num_ranks; ++rank) {
      if (rank != world.rank) most = max(most, links.arrivals[rank]);
    }
    const u32 end = num_others * most;
    // What is known of the items that come next is read while those before them are fetched.
    u32 first = claim(&state.queue[0], num_items), next = claim(&state.queue[0], num_items);
    if (first >= end) return;
    Segment segment = arrived(first, end);
    i32 slot = slot_of(segment);
    while (first < end) {
      const u32 after = claim(&state.queue[0], num_items);
      const Segment next_segment = arrived(next, end);
      const i32 next_slot = slot_of(next_segment);
      give_back(segment, slot);
      first = next;
      next = after;
      segment = next_segment;
      slot = next_slot;
    }
  }

  __device__ __forceinline__ void sum_all(State& state) {
    const u32 end = args.num_tokens;
    u32 first = claim(&state.queue[1], num_items), next = claim(&state.queue[1], num_items);
    if (first >= end) return;
    Segment segment = of_token(first), next_segment = of_token(next);
    i32 slot = slot_of(own_of(segment));
    while (first < end) {
      const u32 after = claim(&state.queue[1], num_items);
      const i32 next_slot = slot_of(own_of(next_segment));
      const Segment after_segment = of_token(after);
      if (!sum(first, segment, slot)) return;
      first = next;
      next = after;
      segment = next_segment;
      next_segment = after_segment;
      slot = next_slot;
    }
  }
};

// A thread's part of a sum: a few vectors of it, so far.
struct Sum {
  Wide term[kPerVector], node[kPerVector], total[kPerVector];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kPerVector; ++i) term[i] = node[i] = total[i] = 0;
  }

  // A weight of 1 changes no bit.
  __device__ __forceinline__ void add(const Vector& vector, u32 op, Wide weight) {
#pragma unroll
    for (int i = 0; i < kPerVector; ++i) {
      term[i] = add_exact(term[i], multiply_exact(widen(vector, i), weight));
    }
    if (op & kEndTerm) add_rounded(node, term);
    if (op & kEndNode) add_rounded(total, node);
  }

  __device__ __forceinline__ Vector rounded(u32 ops) const {
    return ops & kEndNode ? narrow(total) : ops & kEndTerm ? narrow(node) : narrow(term);
  }
};

// Sums every kGroups-th item. Its pieces go to one sender, which so knows when all are there.
__device__ __forceinline__ void sum_items(Shared& shared, const CombineArgs& args, int group,
                                          int thread, const u8* rows, u8* sums) {
  constexpr int kStride = kGroupThreads * 16, kAtOnce = FUSCO_BULK ? 2 : 1;
  const u32 num_pieces = (args.row_bytes + args.piece_bytes - 1) / args.piece_bytes;
  int num_ends = 0;
  for (u32 item = group; num_ends < kSenders / kGroups; item += kGroups) {
    i32 size = 0;
    for (u32 i = 0; i < num_pieces; ++i) {
      const u32 number = item * num_pieces + i, place = number % kPieces;
      const u32 given = item / kSenders * num_pieces + i;  // to this sender before
      const u32 buffer = item % kSenders * kBuffers + given % kBuffers;
      shared.full[place].wait(number / kPieces & 1);
      const Piece& piece = shared.pieces[place];
      const i32 num_rows = piece.num_rows;
      const u32 ops = piece.ops;
      size = piece.size;
      if (size >= 0 || i == 0) {
        shared.sum_empty[buffer].wait(given / kBuffers & 1 ^ 1);
        if (thread == 0) shared.sent[buffer] = Sent{piece.out, piece.flag, size};
      }
      u8* sum = sums + buffer * args.piece_bytes;
      for (i32 at = thread * 16; at < size; at += 2 * kStride) {
        const bool has_second = at + kStride < size;
        Sum first, second;
        first.clear();
        second.clear();
        // Read before they are needed, since a row's addition waits for the one before.
        for (int base = 0; base < num_rows; base += kAtOnce) {
          Row row[kAtOnce];
          Vector here[kAtOnce], there[kAtOnce];
#pragma unroll
          for (int j = 0; j < kAtOnce; ++j) row[j] = piece.rows[min(base + j, num_rows - 1)];
#pragma unroll
          for (int j = 0; j < kAtOnce; ++j) {
            const u8* vectors = rows + row[j].at + at;
            here[j] = *reinterpret_cast<const Vector*>(vectors);
            if (has_second) there[j] = *reinterpret_cast<const Vector*>(vectors + kStride);
          }
#pragma unroll
          for (int j = 0; j < kAtOnce; ++j) {
            if (base + j >= num_rows) break;
            first.add(here[j], row[j].op, row[j].weight);
            if (has_second) second.add(there[j], row[j].op, row[j].weight);
          }
        }
        *reinterpret_cast<Vector*>(sum + at) = first.rounded(ops);
        if (has_second) *reinterpret_cast<Vector*>(sum + at + kStride) = second.rounded(ops);
      }
      publish_to_copies();
      __syncwarp();
      if (lane_id() == 0) {
        shared.empty[place].arrive();
        if (size >= 0 || i == 0) shared.sum_full[buffer].arrive();
      }
    }
    num_ends += size < 0;
  }
}

// Sends the sums of every kSenders-th item.
__device__ __forceinline__ void send_sums(Shared& shared, const CombineArgs& args, int sender,
                                          u32 epoch, const u8* sums) {
  for (u32 number = 0;; ++number) {
    const u32 buffer = sender * kBuffers + number % kBuffers;
    shared.sum_full[buffer].wait(number / kBuffers & 1);
    const Sent sent = shared.sent[buffer];
    if (sent.size < 0) return;
    drain(sent.out, sums + buffer * args.piece_bytes, sent.size, sent.flag != nullptr);
    if (lane_id() == 0) {
      if (sent.flag) store_release(sent.flag, epoch);
      shared.sum_empty[buffer].arrive();
    }
  }
}

// A combine of several tensors is several kernels, of which the first agrees for all.
extern "C" __global__ void __launch_bounds__(kCombineThreads, 1)
    combine(const __grid_constant__ World world, const __grid_constant__ Call call,
            const __grid_constant__ CombineArgs args) {
  extern __shared__ __align__(128) u8 dynamic[];
  u8* rows = dynamic;
  u8* sums = rows + args.num_slots * args.piece_bytes;
  Shared& shared = *reinterpret_cast<Shared*>(sums + kSenders * kBuffers * args.piece_bytes);
  State& state = state_of(world);
  const u32 epoch = state.epoch + 1;
  const Links links(world, args.num_tokens, args.links);
  if (threadIdx.x == 0) {
    for (int i = 0; i < kPieces; ++i) {
      shared.full[i].init(kFillArrivals);
      shared.empty[i].init(kGroupWarps);
    }
    for (int i = 0; i < kSenders * kBuffers; ++i) {
      shared.sum_full[i].init(kGroupWarps);
      shared.sum_empty[i].init(1);
    }
#if FUSCO_BULK
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
  }
  __syncthreads();
  const i32 verdict = args.part == 0 ? agree(world, call, epoch, links.number) : state.verdict;
  if (verdict == kGo) {
    if (blockIdx.x == 0 && threadIdx.x < world.num_ranks) {
      reinterpret_cast<u64*>(world.sent_bytes)[threadIdx.x] +=
          links.arrivals[threadIdx.x] * static_cast<i64>(args.row_bytes);
    }
    if (warp_id() == 0) {
      Fetcher fetcher(world, call, args, links, epoch, shared, rows);
      const bool returns_first = blockIdx.x % 2 == 0;
      if (returns_first) fetcher.give_back_all(state);
      fetcher.sum_all(state);
      fetcher.give_back_all(state);
      fetcher.fetch_end();
    } else if (warp_id() <= kGroups * kGroupWarps) {
      const int thread = threadIdx.x - kWarp;
      sum_items(shared, args, thread / kGroupThreads, thread % kGroupThreads, rows, sums);
    } else {
      send_sums(shared, args, warp_id() - 1 - kGroups * kGroupWarps, epoch, sums);
    }
  }
  const bool is_over = args.is_last && verdict != kVoid;
  if (finish(state, is_over ? epoch : epoch - 1)) state.verdict = verdict;
}
