// What the warps of a combine share: pieces of rows that are summed to one, in shared memory.
#pragma once

#include "pipeline.cuh"

// A part of the rows that are summed to one, of some bytes each. They lie one behind the other in
// the ring of shared memory, in the order of the sum.
struct alignas(16) Piece {
  u8* out;    // where the sum goes
  u64* flag;  // what to set then; null for none
  i32 size;   // bytes of each row; negative where there are no more pieces
  i32 slot;   // of the first row
  i32 num_rows;
  i32 own_begin, own_end;  // rows of this rank's experts; all others are partials
  u32 node_ends;           // a bit for each node's last row, where there are several nodes
  alignas(16) float weights[kWarp];
};

struct Sent {
  u8* out;
  u64* flag;
  i32 size;
};

// What is looked up of a rank again and again. In shared memory, for copies that bring rows hold up
// whatever else comes from device memory.
struct Peer {
  u64 window;
  i32 arrivals, return_at, return_from;
  i32 node;
  i32 at_order;  // the rank of this place in the order of sums
};

// What the warps of a pipeline share.
struct Pipeline {
  Barrier full[kPieces], empty[kPieces];
  Barrier sum_full[kSenders], sum_empty[kSenders];
  Sent sent[kSenders];
  Piece pieces[kPieces];
};

struct Shared {
  Peer peers[kWarp];
  Pipeline pipelines[kPipelines];
};

static_assert(sizeof(Shared) <= kCombineSharedBytes, "see structs.py");
