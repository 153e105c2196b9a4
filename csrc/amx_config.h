// The shapes of AMX tiles. Nothing here is called but from a function compiled for AMX.
#pragma once

#include <cstdint>

#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12's own intrinsics: __m512 __Y = __Y
#include <immintrin.h>

#include "dispatch.h"

namespace den_kernels {

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,avx512bf16,amx-tile,amx-bf16,prefer-vector-width=512")

// Tiles 0..3 sum, 4 and 5 hold `rows` rows of `pairs` pairs of values, 6 and 7 hold `pairs` pairs of 16 values.
KERNEL void configure_tiles(int64_t rows, int64_t pairs = 16) {
  alignas(64) struct {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
  } config;
  for (int i = 0; i < 8; ++i) {
    config.bytes[i] = i == 4 || i == 5 ? static_cast<uint16_t>(pairs * 4) : 64;
    config.rows[i] = static_cast<uint8_t>(i < 6 ? rows : pairs);
  }
  __asm__ volatile("" : : "r"(&config) : "memory");  // GCC's intrinsic says that it reads the first eight bytes alone
  _tile_loadconfig(&config);
}

#pragma GCC pop_options

}  // namespace den_kernels
