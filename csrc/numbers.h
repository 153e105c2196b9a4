// Element types narrower than float, and the conversions that are inlined into every clone of an inner loop.
#pragma once

#include <cstdint>
#include <cstring>

#define ALWAYS_INLINE inline __attribute__((always_inline))

namespace den_kernels {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  _Float16 value;
};

ALWAYS_INLINE float widen(float v) { return v; }
ALWAYS_INLINE float widen(fp16 v) { return static_cast<float>(v.value); }
ALWAYS_INLINE float widen(bf16 v) {
  const uint32_t u = static_cast<uint32_t>(v.bits) << 16;
  float f;
  std::memcpy(&f, &u, sizeof f);
  return f;
}

ALWAYS_INLINE void narrow(float f, float& out) { out = f; }
ALWAYS_INLINE void narrow(float f, fp16& out) { out.value = static_cast<_Float16>(f); }
ALWAYS_INLINE void narrow(float f, bf16& out) {  // to nearest even; a NaN keeps a set mantissa bit
  uint32_t u;
  std::memcpy(&u, &f, sizeof u);
  const uint32_t rounded = (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16;
  out.bits = static_cast<uint16_t>((u & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded);
}

}  // namespace den_kernels
