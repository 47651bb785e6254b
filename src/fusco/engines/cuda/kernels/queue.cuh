// What the fetching warps of a combine take from: batches of items.
#pragma once

#include "device.cuh"

// How many pipelines before the `place`-th begin with returning. They are spread evenly from the
// first one on: however few blocks run, some return what peers wait for.
__device__ __forceinline__ constexpr int returners_before(int place, int num_returners,
                                                          int num_places) {
  return (place * num_returners + num_places - 1) / num_places;
}

struct Batch {
  u32 first;
  u32 num_items;
};

// Several items each, but `num_single` or a few more at the end come one by one, so that all who
// take them end at once.
struct Batches {
  u32 num_items, size, num_full;

  __device__ __forceinline__ constexpr Batches(u32 num_items, u32 size, u32 num_single)
      : num_items(num_items),
        size(size),
        num_full(num_items > num_single ? (num_items - num_single) / size : 0) {}

  __device__ __forceinline__ constexpr u32 count() const {
    return num_full + num_items - num_full * size;
  }

  // No items from the `count()`-th on.
  __device__ __forceinline__ constexpr Batch operator[](u32 number) const {
    if (number < num_full) return Batch{number * size, size};
    return Batch{num_full * (size - 1) + number, number < count() ? 1u : 0u};
  }
};

// They go to whoever asks, but for a first one that may be dealt out to each pipeline that begins
// with the queue; an answer is awaited only when it is needed.
struct Queue {
  u32* counter;
  const Batches batches;
  const u32 base;
  u32 answer = 0;  // in the first lane: how far behind `base`, modulo 2^32, the next batch is

  // `place`: of this pipeline among the `num_places` that begin with the queue; negative for none.
  __device__ __forceinline__ Queue(u32* counter, const Batches& batches, int place = -1,
                                   u32 num_places = 0)
      : counter(counter), batches(batches), base(num_places) {
    if (place < 0) {
      ask();
    } else {
      answer = place - base;
    }
  }

  __device__ __forceinline__ Batch take() {
    const u32 number = base + __shfl_sync(kFullWarp, answer, 0);
    if (number < batches.count()) ask();
    return batches[number];
  }

 private:
  __device__ __forceinline__ void ask() {
    answer = 0;
    if (base < batches.count() && lane_id() == 0) answer = atomicAdd(counter, 1u);
  }
};
