// An operation that a rank cannot begin: it only says so to all.

#include "agree.cuh"

extern "C" __global__ void agree(const __grid_constant__ World world,
                                 const __grid_constant__ Call call) {
  await_kernel_before();
  State& state = state_of(world);
  const u32 epoch = state.epoch + 1;
  const i32 verdict = agree(world, call, epoch, nullptr, [] {});
  finish(state, verdict == kVoid ? epoch - 1 : epoch);
}
