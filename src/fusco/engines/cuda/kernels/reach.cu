// Writes into the memory of another GPU, or reads from it: whether that works, and how fast.

#include "device.cuh"

extern "C" __global__ void reach(const __grid_constant__ ReachArgs args) {
  await_kernel_before();
  const i64 stride = static_cast<i64>(gridDim.x) * blockDim.x;
  for (i64 i = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x; i < args.num_vectors;
       i += stride) {
    u8* there = at_bytes<u8>(args.there, i * 16);
    if (args.is_read) {
      store_vector(at_bytes<u8>(args.here, i * 16), load_vector(there));
    } else {
      const u32 number = static_cast<u32>(i);
      store_vector(there, Vector{{number, number ^ args.salt, ~number, args.salt}});
    }
  }
}
