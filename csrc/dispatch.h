// Variants of an inner function for several instruction sets, chosen when the library is loaded.
//
// Use: the OpenMP loop stands outside, in a plain function; the inner function that it calls is marked. A marked
// function must not hold an OpenMP region itself: the region is outlined into a function that is not cloned. Nor may it
// call a helper that is not inlined into it: the helper would run in the default variant.
#pragma once

#include <cstdint>  // any header of the C library defines __GLIBC__

#if defined(__x86_64__) && defined(__linux__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#if __GNUC__ >= 12
#define DEN_KERNELS_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#define DEN_KERNELS_HAS_AVX512 __builtin_cpu_supports("x86-64-v4")
#define DEN_KERNELS_HAS_AVX2 __builtin_cpu_supports("x86-64-v3")
#define DEN_KERNELS_AMX
#else  // the level names came with GCC 12
#define DEN_KERNELS_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#define DEN_KERNELS_HAS_AVX512 __builtin_cpu_supports("avx512f")
#define DEN_KERNELS_HAS_AVX2 \
  (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2"))
#endif
#else
#define DEN_KERNELS_CLONES
#endif

#ifdef __SANITIZE_THREAD__  // the function that chooses would run before the sanitizer's own are bound
#undef DEN_KERNELS_CLONES
#define DEN_KERNELS_CLONES
#endif

#define KERNEL __attribute__((always_inline)) inline  // a helper that becomes part of the function that calls it
#define UNROLL _Pragma("GCC unroll 16")
