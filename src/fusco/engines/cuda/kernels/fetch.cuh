// The first stage of a combine: one warp finds out which rows are summed, and fetches them.
#pragma once

#include "agree.cuh"
#include "links.cuh"
#include "pieces.cuh"
#include "queue.cuh"

// Tuned on H200: the most items of a batch, and for how many of each pipeline they come singly.
constexpr int kItems = 3, kSingles = 4;

// The lanes of the fetching warp look at several items at once, `width` lanes each. What is known
// of the items that come next is read while those before them are fetched.
struct Fetcher {
  const World& world;
  const Call& call;
  const CombineArgs& args;
  const Links& links;
  const u32 epoch;
  const Peer* peers;
  Pipeline& shared;
  u8* rows_in_shared;
  const int width, max_items;
  // Pieces and slots of the ring: taken, and given back so far.
  u32 head = 0, tail = 0;
  i32 next_slot = 0, num_free;

  __device__ __forceinline__ Fetcher(const World& world, const Call& call, const CombineArgs& args,
                                     const Links& links, u32 epoch, const Peer* peers,
                                     Pipeline& shared, u8* rows)
      : world(world),
        call(call),
        args(args),
        links(links),
        epoch(epoch),
        peers(peers),
        shared(shared),
        rows_in_shared(rows),
        width(max(world.top_k, min(world.num_ranks, kWarp))),
        max_items(max(1, min(kWarp / width, kItems))),
        num_free(args.num_slots) {}

  __device__ __forceinline__ u64 window_of(int rank) const { return peers[rank].window; }

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
      __syncwarp();  // before one lane writes what the others still read
    }
  }

  // A row that a lane brings; `index` is its place in the order of the sum, negative for none.
  struct Source {
    i32 index;
    const u8* row;
    float weight;
  };

  struct Item {
    u8* out;
    u64* flag;
    i32 num_rows, own_begin, own_end;
    u32 node_ends;
  };

  // What each lane has of an item: a row of this rank's experts, and a partial. `item` is read in
  // lane `teller`.
  __device__ __forceinline__ void fetch(const Item& item, int teller, const Source& own,
                                        const Source& partial) {
    for (i32 at = 0; at < args.row_bytes; at += args.piece_bytes) {
      const i32 size = min(args.piece_bytes, args.row_bytes - at);
      make_room(item.num_rows);
      const u32 place = head % kPieces;
      Piece& piece = shared.pieces[place];
      if (lane_id() == teller) {
        piece.out = item.out + at;
        piece.flag = at + size == args.row_bytes ? item.flag : nullptr;
        piece.size = size;
        piece.slot = next_slot;
        piece.num_rows = item.num_rows;
        piece.own_begin = item.own_begin;
        piece.own_end = item.own_end;
        piece.node_ends = item.node_ends;
      }
      if (own.index >= 0) piece.weights[own.index] = own.weight;
      __syncwarp();
      Barrier& full = shared.full[place];
      full.expect(item.num_rows * size, teller);
      fill_each(slot_of_row(own.index), own.row + at, own.index >= 0, size, full);
      fill_each(slot_of_row(partial.index), partial.row + at, partial.index >= 0, size, full);
      full.arrive_filled(teller);
      next_slot += item.num_rows;
      if (next_slot >= args.num_slots) next_slot -= args.num_slots;
      num_free -= item.num_rows;
      ++head;
    }
  }

  __device__ __forceinline__ u8* slot_of_row(i32 index) const {
    const i32 slot = next_slot + index;
    return rows_in_shared +
           (slot < args.num_slots ? slot : slot - args.num_slots) * args.piece_bytes;
  }

  // An item for each sender, of as many pieces as any, of which the first one tells the sender.
  __device__ __forceinline__ void fetch_end() {
    const int num_pieces = (args.row_bytes + args.piece_bytes - 1) / args.piece_bytes;
    for (int i = 0; i < kSenders * num_pieces; ++i) {
      make_room(0);
      const u32 place = head % kPieces;
      if (lane_id() == 0) {
        shared.pieces[place].size = -1;
        shared.pieces[place].num_rows = 0;
      }
      __syncwarp();
      shared.full[place].expect(0);
      shared.full[place].arrive_filled();
      ++head;
    }
  }

  // A segment that arrived from another rank, and one of its slots, or -1 for none.
  struct Arrived {
    int rank;
    i32 segment, slot;
  };

  __device__ __forceinline__ Arrived arrived(const Batch& batch) const {
    const int item = lane_id() / width, index = lane_id() % width;
    const u32 number = batch.first + item, num_others = world.num_ranks - 1;
    const int rank = (world.rank + 1 + number % num_others) % world.num_ranks;
    const i32 segment = number / num_others;
    const bool is_there =
        item < batch.num_items && index < world.top_k && segment < peers[rank].arrivals;
    return Arrived{rank, segment, is_there ? links.slots(world, rank, segment)[index] : -1};
  }

  // The slots of a segment come first among its lanes.
  __device__ __forceinline__ void give_back(const Batch& batch, const Arrived& its, float weight) {
    const int index = lane_id() % width;
    const bool is_there = its.slot >= 0;
    const u64 window = window_of(its.rank);
    const i64 row = peers[its.rank].return_at + its.segment;
    if (args.row_values && is_there) {
      at_bytes<float>(window, world.values_at)[row * world.top_k + index] =
          reinterpret_cast<const float*>(args.row_values)[its.slot];
    }
    Item item{at_bytes<u8>(window, args.returns_at + row * args.row_bytes),
              return_flag(window, row)};
    const u32 filled = __ballot_sync(kFullWarp, is_there);
    for (int i = 0; i < batch.num_items; ++i) {
      item.num_rows = item.own_end = __popc(filled & lanes_of(i));
      if (item.num_rows == 0) continue;
      const bool is_mine = lane_id() / width == i && is_there;
      fetch(item, i * width, Source{is_mine ? index : -1, row_at(its.slot), weight}, Source{-1});
    }
  }

  // Lane i of a token holds the i-th rank in the order of the sum, with the token's segment there,
  // and where its i-th row is; -1 for none.
  struct Token {
    int rank;
    i32 segment;
    int row_rank;
    i32 row_slot;
  };

  __device__ __forceinline__ Token token(const Batch& batch) const {
    const int item = lane_id() / width, index = lane_id() % width;
    const i64 number = static_cast<i64>(batch.first) + item;
    Token its{-1, -1, -1, -1};
    if (item >= batch.num_items) return its;
    if (index < world.num_ranks) {
      its.rank = peers[index].at_order;
      its.segment = links.token_segment[number * world.num_ranks + its.rank];
    }
    if (index < world.top_k) {
      const i64 pair = number * world.top_k + index;
      its.row_rank = row_ranks()[pair];
      its.row_slot = row_slots()[pair];
    }
    return its;
  }

  __device__ __forceinline__ const i32* row_ranks() const {
    return reinterpret_cast<const i32*>(args.pairs);
  }

  __device__ __forceinline__ const i32* row_slots() const {
    return row_ranks() + static_cast<i64>(args.num_tokens) * world.top_k;
  }

  __device__ __forceinline__ i32 own_slot(const Token& its) const {
    return its.row_rank == world.rank ? its.row_slot : -1;
  }

  __device__ __forceinline__ i32 own_slot(const Arrived& its) const { return its.slot; }

  // Until all partials of a batch are there, which `partial` is then one of; false where a sender
  // is lost.
  __device__ __forceinline__ bool await_partials(const Batch& batch, const Token& its,
                                                 const u8*& partial) const {
    bool has_come = true;
    if (its.segment >= 0 && its.rank != world.rank) {
      const u64 window = window_of(world.rank);
      const i64 row = peers[its.rank].return_from + its.segment;
      const u64* flag = return_flag(window, row);
      has_come = wait_for(world, call, its.rank, batch.first + lane_id() / width, args.num_tokens,
                          [&] { return load_acquire(flag) == epoch; });
      partial = at_bytes<u8>(window, args.returns_at + row * args.row_bytes);
    }
    has_come = __all_sync(kFullWarp, has_come);
    __syncwarp();
#if FUSCO_BULK
    asm volatile("fence.proxy.async;" ::: "memory");
#endif
    return has_come;
  }

  __device__ __forceinline__ void sum(const Batch& batch, const Token& its, const u8* partial,
                                      float weight) {
    const u32 below = lanes_below(), up_to = below << 1 | 1;
    const bool is_there = its.segment >= 0, is_own = is_there && its.rank == world.rank;
    const i32 slot = own_slot(its);
    const u32 terms = __ballot_sync(kFullWarp, is_there), own = __ballot_sync(kFullWarp, is_own),
              rows = __ballot_sync(kFullWarp, slot >= 0), ends = node_ends(its, terms);
    for (int i = 0; i < batch.num_items; ++i) {
      const u32 lanes = lanes_of(i), its_terms = terms & lanes, its_own = own & lanes;
      const bool is_mine = lanes >> lane_id() & 1;
      const i32 num_own = __popc(rows & lanes);
      Item item{reinterpret_cast<u8*>(args.out) +
                (static_cast<i64>(batch.first) + i) * args.row_bytes};
      // Lanes are in the order of the sum; the own rows stand where their rank's lane does. Without
      // them all lanes are below it.
      item.own_begin = __popc(its_terms & (its_own - 1));
      item.own_end = item.own_begin + num_own;
      item.num_rows = __popc(its_terms & ~its_own) + num_own;
      i32 end = __popc(its_terms & up_to);  // of the rows of this lane's rank
      if (its_own & up_to) end += num_own - 1;
      if (__popc(ends & lanes) > 1) {
        item.node_ends =
            __reduce_or_sync(kFullWarp, is_mine && ends >> lane_id() & 1 ? 1u << (end - 1) : 0);
      }
      fetch(item, i * width,
            Source{is_mine && slot >= 0 ? item.own_begin + __popc(rows & lanes & below) : -1,
                   row_at(slot), weight},
            Source{is_mine && is_there && !is_own ? end - 1 : -1, partial});
    }
    if (args.pair_values) return_values(batch, its);
  }

  // The lanes of each token's last rank of each node.
  __device__ __forceinline__ u32 node_ends(const Token& its, u32 terms) const {
    const int item = lane_id() / width;
    const u32 later = terms & lanes_of(item) & ~(lanes_below() << 1 | 1);
    const i32 node = its.rank >= 0 ? peers[its.rank].node : -1;
    const i32 next_node = __shfl_sync(kFullWarp, node, later ? __ffs(later) - 1 : lane_id());
    return __ballot_sync(kFullWarp, its.segment >= 0 && (!later || next_node != node));
  }

  // The values that came with the rows of a batch, to its tokens' pairs.
  __device__ __forceinline__ void return_values(const Batch& batch, const Token& its) const {
    const int item = lane_id() / width, index = lane_id() % width, top_k = world.top_k;
    const i64 token = static_cast<i64>(batch.first) + item;
    const bool has_row = its.row_rank >= 0;
    const u32 same = __match_any_sync(kFullWarp, has_row ? item << 8 | its.row_rank : -1);
    float value = 0;
    if (its.row_rank == world.rank) {
      value = reinterpret_cast<const float*>(args.row_values)[its.row_slot];
    } else if (has_row) {
      const i32 segment = links.token_segment[token * world.num_ranks + its.row_rank];
      const i64 row = peers[its.row_rank].return_from + segment;
      value = at_bytes<float>(window_of(world.rank),
                              world.values_at)[row * top_k + __popc(same & lanes_below())];
    }
    if (item < batch.num_items && index < top_k) {
      reinterpret_cast<float*>(args.pair_values)[token * top_k + index] = value;
    }
  }

  __device__ __forceinline__ Batches batches(u32 num_items) const {
    return Batches(num_items, max_items, kSingles * kPipelines * gridDim.x);
  }

  // Batch after batch, until there are none or `await` is false of one: `look` reads what is known
  // of it, and `use` fetches it. Two batches ahead are known, and the weights of the next.
  template <typename Look, typename Await, typename Use>
  __device__ __forceinline__ void take_all(Queue queue, Look look, Await await, Use use) {
    Batch first = queue.take();
    if (first.num_items == 0) return;
    auto its = look(first);
    Batch second = queue.take();
    auto next = look(second);
    float weight = weight_of(own_slot(its));
    while (first.num_items > 0) {
      if (!await(first, its)) return;
      const Batch third = second.num_items > 0 ? queue.take() : second;
      const auto after = look(third);
      const float next_weight = weight_of(own_slot(next));
      use(first, its, weight);
      first = second;
      second = third;
      its = next;
      next = after;
      weight = next_weight;
    }
  }

  // Nothing is dealt out here: a block that does not run yet, since others' kernels keep it out,
  // would hold what peers wait for, and its own rank's other blocks wait for peers.
  __device__ __forceinline__ void give_back_all(State& state) {
    const u32 num_others = world.num_ranks - 1;
    const u32 end =
        num_others * most_arrivals(world, [&](int rank) { return peers[rank].arrivals; });
    take_all(
        Queue(&state.queue[0], batches(end)), [&](const Batch& batch) { return arrived(batch); },
        [](const Batch&, const Arrived&) { return true; },
        [&](const Batch& batch, const Arrived& its, float weight) {
          give_back(batch, its, weight);
        });
  }

  __device__ __forceinline__ void sum_all(State& state, int place, int num_places) {
    const u8* partial = nullptr;
    take_all(
        Queue(&state.queue[1], batches(args.num_tokens), place, num_places),
        [&](const Batch& batch) { return token(batch); },
        [&](const Batch& batch, const Token& its) { return await_partials(batch, its, partial); },
        [&](const Batch& batch, const Token& its, float weight) {
          sum(batch, its, partial, weight);
        });
  }
};
