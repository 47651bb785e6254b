// The elements of rows that are summed, chosen when the kernel is compiled: FUSCO_ELEMENT is 0 for
// bfloat16, 1 for float16, 2 for float32 and 3 for float64. Products and sums are never fused.
#pragma once

#include "device.cuh"

#if FUSCO_ELEMENT == 3
using Wide = double;
constexpr int kPerVector = 2;
__device__ __forceinline__ Wide add_exact(Wide a, Wide b) { return __dadd_rn(a, b); }
__device__ __forceinline__ Wide multiply_exact(Wide a, Wide b) { return __dmul_rn(a, b); }
#else
using Wide = float;
constexpr int kPerVector = FUSCO_ELEMENT == 2 ? 4 : 8;
__device__ __forceinline__ Wide add_exact(Wide a, Wide b) { return __fadd_rn(a, b); }
__device__ __forceinline__ Wide multiply_exact(Wide a, Wide b) { return __fmul_rn(a, b); }
#endif

// The i-th element of a vector, in the dtype that sums are taken in.
__device__ __forceinline__ Wide widen(const Vector& vector, int i) {
#if FUSCO_ELEMENT == 0
  const u32 word = vector.word[i / 2];
  return __uint_as_float(i % 2 ? word & 0xffff0000u : word << 16);
#elif FUSCO_ELEMENT == 1
  const u16 bits = static_cast<u16>(i % 2 ? vector.word[i / 2] >> 16 : vector.word[i / 2]);
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
#elif FUSCO_ELEMENT == 2
  return __uint_as_float(vector.word[i]);
#else
  return __hiloint2double(vector.word[2 * i + 1], vector.word[2 * i]);
#endif
}

// Rounded once to the rows' dtype.
__device__ __forceinline__ Vector narrow(const Wide (&values)[kPerVector]) {
  Vector vector;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#if FUSCO_ELEMENT == 0
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;"
        : "=r"(vector.word[i])
        : "f"(values[2 * i + 1]), "f"(values[2 * i]));
#elif FUSCO_ELEMENT == 1
    asm("cvt.rn.f16x2.f32 %0, %1, %2;"
        : "=r"(vector.word[i])
        : "f"(values[2 * i + 1]), "f"(values[2 * i]));
#elif FUSCO_ELEMENT == 2
    vector.word[i] = __float_as_uint(values[i]);
#else
    vector.word[i] = i % 2 ? __double2hiint(values[i / 2]) : __double2loint(values[i / 2]);
#endif
  }
  return vector;
}
