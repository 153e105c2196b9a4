// Instructions that C++ has no name for, each behind one function. The tests' shim has a twin of each that runs on a
// CPU.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define DEN_KERNELS_DEVICE __device__ __forceinline__
#else
#define DEN_KERNELS_DEVICE inline
#endif

namespace den_kernels {

template <int N>
struct alignas(4 * N) Words {
  uint32_t w[N];
};
struct Float2 {
  float lo, hi;
};

// Element types: bytes of one, and the words of two neighbours.
struct Bf16 {
  static constexpr int bytes = 2;
  using Pair = Words<1>;
};
struct Fp16 {
  static constexpr int bytes = 2;
  using Pair = Words<1>;
};
struct Tf32 {  // float32 in memory
  static constexpr int bytes = 4;
  using Pair = Words<2>;
};

}  // namespace den_kernels

#ifdef __CUDACC__

namespace den_kernels {

// Dynamic shared memory, as a pointer and as the 32-bit address that the instructions below take.
DEN_KERNELS_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char den_kernels_shared[];
  return den_kernels_shared;
}
DEN_KERNELS_DEVICE uint32_t shared_address() {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared_memory()));
}

// v, in a form that the compiler knows nothing of before this point. It then cannot move computations on v (such as
// the reciprocal of a divisor) out of the loops around, where their results would hold registers.
DEN_KERNELS_DEVICE int here(int v) {
  asm volatile("" : "+r"(v));
  return v;
}

DEN_KERNELS_DEVICE void sync_block() { __syncthreads(); }
DEN_KERNELS_DEVICE void sync_warp() { __syncwarp(); }
DEN_KERNELS_DEVICE int count_bits(uint32_t v) { return __popc(v); }
// The lanes that hold the same value, one bit each.
DEN_KERNELS_DEVICE uint32_t match_any(int v) { return __match_any_sync(0xFFFFFFFFu, v); }
DEN_KERNELS_DEVICE uint32_t ballot(bool v) { return __ballot_sync(0xFFFFFFFFu, v); }
DEN_KERNELS_DEVICE int shuffle(int v, int lane) { return __shfl_sync(0xFFFFFFFFu, v, lane); }
// The value of the lane `delta` below; the first `delta` lanes get their own.
DEN_KERNELS_DEVICE int shuffle_up(int v, int delta) { return __shfl_up_sync(0xFFFFFFFFu, v, delta); }

// Copies of 16 bytes from global to shared memory that run on by themselves. `commit` closes a group; `wait<n>` returns
// when at most the n youngest groups of this thread are still on their way.
DEN_KERNELS_DEVICE void copy_async16(uint32_t to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
DEN_KERNELS_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int n>
DEN_KERNELS_DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(n) : "memory");
}

// Plain accesses of 4, 8 or 16 bytes.
template <class V>
DEN_KERNELS_DEVICE V load_global(const void* from) {
  return *static_cast<const V*>(from);
}
template <class V>
DEN_KERNELS_DEVICE void store_global(void* to, V v) {
  *static_cast<V*>(to) = v;
}
template <class V>
DEN_KERNELS_DEVICE V load_shared(uint32_t from) {
  return *static_cast<const V*>(__cvta_shared_to_generic(from));
}
template <class V>
DEN_KERNELS_DEVICE void store_shared(uint32_t to, V v) {
  *static_cast<V*>(__cvta_shared_to_generic(to)) = v;
}

// Four 8 x 16-byte matrices: lane i gives the address of row i % 8 of matrix i / 8 and gets word i % 4 of row i / 4 of
// each.
DEN_KERNELS_DEVICE void load_matrices(uint32_t (&words)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(row)
               : "memory");
}

// d [16 x 8] += a [16 x 32 bytes] b [8 x 32 bytes]^T, in the fragments of the PTX manual.
#define DEN_KERNELS_MMA(SHAPE, TYPE)                                         \
  asm("mma.sync.aligned." SHAPE ".row.col.f32." TYPE "." TYPE                \
      ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                       \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
DEN_KERNELS_DEVICE void mma(Bf16, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  DEN_KERNELS_MMA("m16n8k16", "bf16");
}
DEN_KERNELS_DEVICE void mma(Fp16, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  DEN_KERNELS_MMA("m16n8k16", "f16");
}
DEN_KERNELS_DEVICE void mma(Tf32, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  DEN_KERNELS_MMA("m16n8k8", "tf32");
}
#undef DEN_KERNELS_MMA

DEN_KERNELS_DEVICE float relu(float v) {  // NaN stays NaN
  float r;
  asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(r) : "f"(v));
  return r;
}

// Two neighbouring values, as memory holds them, rounded to nearest.
DEN_KERNELS_DEVICE Float2 unpack(Bf16, Words<1> v) {
  return {__uint_as_float(v.w[0] << 16), __uint_as_float(v.w[0] & 0xFFFF0000u)};
}
DEN_KERNELS_DEVICE Words<1> pack(Bf16, Float2 v) {
  Words<1> r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r.w[0]) : "f"(v.hi), "f"(v.lo));
  return r;
}
DEN_KERNELS_DEVICE Float2 unpack(Fp16, Words<1> v) {
  Float2 r;
  asm("{.reg .b16 lo, hi; mov.b32 {lo, hi}, %2; cvt.f32.f16 %0, lo; cvt.f32.f16 %1, hi;}"
      : "=f"(r.lo), "=f"(r.hi)
      : "r"(v.w[0]));
  return r;
}
DEN_KERNELS_DEVICE Words<1> pack(Fp16, Float2 v) {
  Words<1> r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r.w[0]) : "f"(v.hi), "f"(v.lo));
  return r;
}
DEN_KERNELS_DEVICE Float2 unpack(Tf32, Words<2> v) { return {__uint_as_float(v.w[0]), __uint_as_float(v.w[1])}; }
DEN_KERNELS_DEVICE Words<2> pack(Tf32, Float2 v) { return {{__float_as_uint(v.lo), __float_as_uint(v.hi)}}; }
DEN_KERNELS_DEVICE uint32_t round_word(Tf32, uint32_t v) {
  uint32_t r;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(__uint_as_float(v)));
  return r;
}
}  // namespace den_kernels

#else
#include "ptx_twins.h"
#endif

namespace den_kernels {

// A word as mma wants it: TF32 is rounded to nearest (the instruction would cut the low bits off), 16-bit types are.
template <class E>
DEN_KERNELS_DEVICE uint32_t operand_word(E, uint32_t v) {
  return v;
}
DEN_KERNELS_DEVICE uint32_t operand_word(Tf32, uint32_t v) { return round_word(Tf32{}, v); }

template <class E>
DEN_KERNELS_DEVICE typename E::Pair operand(E e, Float2 v) {
  typename E::Pair pair = pack(e, v);
  for (uint32_t& word : pair.w) word = operand_word(e, word);
  return pair;
}

}  // namespace den_kernels
