// The second stage of a combine: most of the warps sum the rows of each piece.
#pragma once

#include "element.cuh"
#include "pieces.cuh"

// The rows of a piece, as a thread sees them that sums kVectors of its vectors.
template <int kVectors>
struct Rows {
  using Sum = Wide[kVectors][kPerVector];

  const Piece& piece;
  const u8* first;  // the thread's first vector of the first row
  i32 stride;       // every how many bytes it has another
  i32 piece_bytes, ring_bytes, num_before_wrap;

  // One row after the other: several at once need code for every number of rows, for which the
  // caches of instructions have no room.
  template <bool kHasWeights>
  __device__ __forceinline__ void add(Sum& sum, i32 begin, i32 end) const {
#pragma unroll 1
    for (i32 row = begin; row < end; ++row) {
      const u8* at = first + row * piece_bytes - (row < num_before_wrap ? 0 : ring_bytes);
      const float weight = kHasWeights ? piece.weights[row] : 1;
      Vector vector[kVectors];
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        vector[v] = *reinterpret_cast<const Vector*>(at + v * stride);
      }
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
#pragma unroll
        for (int i = 0; i < kPerVector; ++i) {
          const Wide value = widen(vector[v], i);
          sum[v][i] = add_exact(sum[v][i], kHasWeights ? multiply_exact(value, weight) : value);
        }
      }
    }
  }

  __device__ __forceinline__ static void add_rounded(Sum& sum, const Vector (&rounded)[kVectors]) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
#pragma unroll
      for (int i = 0; i < kPerVector; ++i) {
        sum[v][i] = add_exact(sum[v][i], widen(rounded[v], i));
      }
    }
  }

  // Leaves `sum` at zero.
  __device__ __forceinline__ static void round(Sum& sum, Vector (&rounded)[kVectors]) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      rounded[v] = narrow(sum[v]);
#pragma unroll
      for (int i = 0; i < kPerVector; ++i) sum[v][i] = 0;
    }
  }

  // To `sum`, which is zero, the rows of a node: partials, the own rows, whose sum is one too, and
  // partials again.
  __device__ __forceinline__ void add_node(Sum& sum, i32 begin, i32 end) const {
    const i32 own_begin = min(max(piece.own_begin, begin), end),
              own_end = min(max(piece.own_end, begin), end);
    add<true>(sum, own_begin, own_end);
    // Rounding a sum that is rounded already changes nothing.
    if (own_end - own_begin == end - begin) return;
    Vector own[kVectors];
    round(sum, own);
    add<false>(sum, begin, own_begin);
    add_rounded(sum, own);
    add<false>(sum, own_end, end);
  }

  __device__ __forceinline__ void store(u8* to, const Sum& sum) const {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      *reinterpret_cast<Vector*>(to + v * stride) = narrow(sum[v]);
    }
  }

  __device__ __forceinline__ void sum_to(u8* to) const {
    Sum sum = {};
    add_node(sum, 0, piece.num_rows);
    store(to, sum);
  }

  __device__ __forceinline__ void sum_nodes_to(u8* to) const {
    Sum total = {}, sum = {};
    Vector node[kVectors];
    i32 begin = 0;
    for (u32 left = piece.node_ends; left; left &= left - 1) {
      const i32 end = __ffs(left);
      add_node(sum, begin, end);
      round(sum, node);
      add_rounded(total, node);
      begin = end;
    }
    store(to, total);
  }
};

// Sums item by item. The pieces of one go to one sender, which so knows when all are there.
__device__ __forceinline__ void sum_items(Pipeline& shared, const CombineArgs& args, int thread,
                                          const u8* rows, u8* sums) {
  const u32 num_pieces = (args.row_bytes + args.piece_bytes - 1) / args.piece_bytes;
  constexpr i32 stride = kSummers * kWarp * 16;
  const i32 ring_bytes = args.num_slots * args.piece_bytes;
  int num_ends = 0;
  for (u32 item = 0; num_ends < kSenders; ++item) {
    i32 size = 0;
    for (u32 i = 0; i < num_pieces; ++i) {
      const u32 number = item * num_pieces + i, place = number % kPieces;
      const u32 sender = item % kSenders, given = item / kSenders * num_pieces + i;  // to it before
      shared.full[place].wait(number / kPieces & 1);
      const Piece& piece = shared.pieces[place];
      size = piece.size;
      if (size >= 0 || i == 0) {
        shared.sum_empty[sender].wait(given & 1 ^ 1);
        if (thread == 0) shared.sent[sender] = Sent{piece.out, piece.flag, size};
      }
      u8* sum = sums + sender * args.piece_bytes;
      const u8* first = rows + piece.slot * args.piece_bytes;
      const i32 num_before_wrap = args.num_slots - piece.slot;
      const int num_vectors = piece.node_ends ? 1 : 2;
      for (i32 at = thread * 16; at < size; at += num_vectors * stride) {
        const Rows<1> one{piece, first + at, stride, args.piece_bytes, ring_bytes, num_before_wrap};
        const Rows<2> two{piece, first + at, stride, args.piece_bytes, ring_bytes, num_before_wrap};
        if (piece.node_ends) {
          one.sum_nodes_to(sum + at);
        } else if (at + stride < size) {
          two.sum_to(sum + at);
        } else {
          one.sum_to(sum + at);
        }
      }
      publish_to_copies();
      shared.empty[place].arrive();
      if (size >= 0 || i == 0) shared.sum_full[sender].arrive();
    }
    num_ends += size < 0;
  }
}
