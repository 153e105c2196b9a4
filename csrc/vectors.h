// Vectors of 16 float32 values, the unit of the direct kernels, in the instruction set that a file is compiled for: one
// register with AVX-512; in a file that defines DEN_KERNELS_AVX2, two with AVX2. What a kernel computes and how weights
// are packed is the same for both; how much of it the registers hold is not, and said here too.
#pragma once

#include <cstdint>

#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12's own intrinsics: __m512 __Y = __Y
#include <immintrin.h>

#include "dispatch.h"

#define DEN_KERNELS_PRAGMA(text) _Pragma(#text)
#ifdef DEN_KERNELS_AVX2
#define DEN_KERNELS_TARGET DEN_KERNELS_PRAGMA(GCC target("arch=x86-64-v3"))
#include "vectors_avx2.h"
#else
#ifdef DEN_KERNELS_DOT_BF16
#define DEN_KERNELS_TARGET DEN_KERNELS_PRAGMA(GCC target("arch=x86-64-v4,avx512bf16,prefer-vector-width=512"))
#else
#define DEN_KERNELS_TARGET DEN_KERNELS_PRAGMA(GCC target("arch=x86-64-v4,prefer-vector-width=512"))
#endif
#include "vectors_avx512.h"
#endif
