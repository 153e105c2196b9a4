// Element types narrower than float, and the conversions that are inlined into every clone of an inner loop.
#pragma once

#include <cstdint>
#include <cstring>

#define ALWAYS_INLINE inline __attribute__((always_inline))

namespace den_kernels {

// The compiler's own half precision; its bits alone where C++ has none: GCC before 12 on x86, before 13 on ARM.
#if !defined(__FLT16_MANT_DIG__) || (!defined(__clang__) && __GNUC__ < 13 && !(defined(__x86_64__) && __GNUC__ == 12))
#define DEN_KERNELS_FP16_BITS
#endif
#ifdef DEN_KERNELS_FP16_BITS
using Half = uint16_t;
#else
using Half = _Float16;
#endif

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  Half value;
};

ALWAYS_INLINE float float_of(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}
ALWAYS_INLINE uint32_t bits_of(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, sizeof bits);
  return bits;
}

template <class T>
ALWAYS_INLINE float widen_half(T half) {
  return static_cast<float>(half);
}
// Shifted, the ten bits of the mantissa and the five of the exponent are those of a float 2^112 times as small.
ALWAYS_INLINE float widen_half(uint16_t half) {
  const uint32_t sign = (half & 0x8000u) << 16, magnitude = half & 0x7FFFu;
  const uint32_t finite = bits_of(float_of(magnitude << 13) * 0x1p112f), special = magnitude << 13 | 0x7F800000u;
  return float_of((magnitude < 0x7C00u ? finite : special) | sign);
}

template <class T>
ALWAYS_INLINE void narrow_half(float f, T& half) {
  half = static_cast<T>(f);
}
// To nearest even. Below 2^-14 the addition of a number whose last place is 2^-24 rounds.
ALWAYS_INLINE void narrow_half(float f, uint16_t& half) {
  const uint32_t bits = bits_of(f), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
  const uint32_t tiny = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  const uint32_t usual = (magnitude + 0xFFFu + (magnitude >> 13 & 1u) - (112u << 23)) >> 13;
  const uint32_t huge = magnitude > 0x7F800000u ? 0x7E00u | (magnitude >> 13 & 0x3FFu) : 0x7C00u;
  half = static_cast<uint16_t>((magnitude < 113u << 23 ? tiny : magnitude < 0x477FF000u ? usual : huge) | sign);
}

ALWAYS_INLINE float widen(float v) { return v; }
ALWAYS_INLINE float widen(fp16 v) { return widen_half(v.value); }
ALWAYS_INLINE float widen(bf16 v) { return float_of(static_cast<uint32_t>(v.bits) << 16); }

ALWAYS_INLINE void narrow(float f, float& out) { out = f; }
ALWAYS_INLINE void narrow(float f, fp16& out) { narrow_half(f, out.value); }
ALWAYS_INLINE void narrow(float f, bf16& out) {  // to nearest even; a NaN keeps a set mantissa bit
  const uint32_t u = bits_of(f), rounded = (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16;
  out.bits = static_cast<uint16_t>((u & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded);
}

}  // namespace den_kernels
