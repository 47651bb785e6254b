// Combine: the rank of an expert sums a token's rows there and sends one row, its partial, to the
// token's rank, which adds the partials up in the order of the contract (engines/base.py).
//
// A block is two pipelines. The first warp of each takes segments to return or tokens to sum,
// items, and fetches piece by piece of their rows into shared memory; others sum these there; the
// last few send the sums on, an item each in turn. At most half of the pipelines begin with
// returning, which never waits for other ranks, and go on with summing, which does; the others the
// other way round.

#include "agree.cuh"
#include "fetch.cuh"
#include "links.cuh"
#include "pieces.cuh"
#include "sum.cuh"

// Sends the sums of every kSenders-th item.
__device__ __forceinline__ void send_sums(Pipeline& shared, const CombineArgs& args, int sender,
                                          u32 epoch, const u8* sums) {
  for (u32 number = 0;; ++number) {
    shared.sum_full[sender].wait(number & 1);
    const Sent sent = shared.sent[sender];
    if (sent.size < 0) return;
    drain(sent.out, sums + sender * args.piece_bytes, sent.size, sent.flag != nullptr);
    if (lane_id() == 0 && sent.flag) store_release(sent.flag, epoch);
    shared.sum_empty[sender].arrive();
  }
}

// Of an operation that is not carried out.
__device__ __forceinline__ void clear_sums(const World& world, const CombineArgs& args) {
  const i64 num_vectors = args.num_tokens * static_cast<i64>(args.row_bytes) / 16,
            num_values = args.pair_values ? args.num_tokens * static_cast<i64>(world.top_k) : 0,
            first = blockIdx.x * static_cast<i64>(blockDim.x) + threadIdx.x,
            stride = gridDim.x * static_cast<i64>(blockDim.x);
  for (i64 i = first; i < num_vectors; i += stride) {
    store_vector(reinterpret_cast<Vector*>(args.out) + i, Vector{});
  }
#pragma unroll 1
  for (i64 i = first; i < num_values; i += stride) {
    reinterpret_cast<float*>(args.pair_values)[i] = 0;
  }
}

// A combine of several tensors is several kernels, of which the first agrees for all.
extern "C" __global__ void __launch_bounds__(kWarp* kCombineWarps, 1)
    combine(const __grid_constant__ World world, const __grid_constant__ Call call,
            const __grid_constant__ CombineArgs args) {
  extern __shared__ __align__(128) u8 dynamic[];
  const i32 num_rooms = args.num_slots + kSenders;  // for pieces of rows and of sums, a pipeline
  constexpr int kPipelineWarps = kCombineWarps / kPipelines;
  static_assert(kPipelineWarps == 1 + kSummers + kSenders, "see structs.py");
  Shared& shared = *reinterpret_cast<Shared*>(dynamic + kPipelines * num_rooms * args.piece_bytes);
  static_assert(kPieces <= kWarp && kSenders <= kPieces, "a lane for each");
  if (warp_id() < kPipelines && lane_id() < kPieces) {
    Pipeline& pipeline = shared.pipelines[warp_id()];
    pipeline.full[lane_id()].init(kFillArrivals);
    // By every thread that reads rows or sums: one lane after a __syncwarp would do, but racecheck
    // does not follow that.
    pipeline.empty[lane_id()].init(kSummers * kWarp);
    if (lane_id() < kSenders) {
      pipeline.sum_full[lane_id()].init(kSummers * kWarp);
      pipeline.sum_empty[lane_id()].init(kWarp);
    }
#if FUSCO_BULK
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
  }
  await_kernel_before();
  State& state = state_of(world);
  const u32 epoch = state.epoch + 1;
  const Links links(world, args.num_tokens, args.links);
  const auto look_up_peers = [&] {
    if (threadIdx.x >= world.num_ranks) return;
    const int rank = threadIdx.x;
    shared.peers[rank] = Peer{window_of(world, rank),
                              links.arrivals[rank],
                              links.return_at[rank],
                              links.return_from[rank],
                              reinterpret_cast<const i32*>(world.node_of_rank)[rank],
                              reinterpret_cast<const i32*>(world.rank_order)[rank]};
  };
  i32 verdict = state.verdict;
  if (args.part == 0) {
    verdict = agree(world, call, epoch, links.number, look_up_peers);
  } else {
    look_up_peers();
    __syncthreads();
  }
  if (verdict == kGo) {
    if (blockIdx.x == 0 && threadIdx.x < world.num_ranks) {
      reinterpret_cast<u64*>(world.sent_bytes)[threadIdx.x] +=
          shared.peers[threadIdx.x].arrivals * static_cast<i64>(args.row_bytes);
    }
    const int number = warp_id() / kPipelineWarps, warp = warp_id() % kPipelineWarps;
    Pipeline& pipeline = shared.pipelines[number];
    u8* rows = dynamic + number * num_rooms * args.piece_bytes;
    u8* sums = rows + args.num_slots * args.piece_bytes;
    if (warp == 0) {
      Fetcher fetcher(world, call, args, links, epoch, shared.peers, pipeline, rows);
      const int place = blockIdx.x * kPipelines + number, num_places = gridDim.x * kPipelines,
                num_before = returners_before(place, args.num_returners, num_places);
      const bool returns_first =
          returners_before(place + 1, args.num_returners, num_places) > num_before;
#pragma unroll 1
      for (int turn = 0; turn < 2; ++turn) {
        if (returns_first == (turn == 0)) {
          fetcher.give_back_all(state);
        } else {
          fetcher.sum_all(state, turn == 0 ? place - num_before : -1,
                          num_places - args.num_returners);
        }
      }
      fetcher.fetch_end();
    } else if (warp <= kSummers) {
      sum_items(pipeline, args, threadIdx.x - (number * kPipelineWarps + 1) * kWarp, rows, sums);
    } else {
      send_sums(pipeline, args, warp - 1 - kSummers, epoch, sums);
    }
  }
  if (verdict != kGo) clear_sums(world, args);
  const bool is_over = args.is_last && verdict != kVoid;
  if (finish(state, is_over ? epoch : epoch - 1)) state.verdict = verdict;
}
