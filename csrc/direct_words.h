// The element types of the direct kernels, as they see them: in words of 32 bits, a float or a pair of bfloat16s, and
// in vectors of 16 channels, which are float32 (vectors.h). The bfloat16 half is there for a file that defines
// DEN_KERNELS_DOT_BF16.
#pragma once

#include <cstdint>

#include "direct_channels.h"
#include "numbers.h"
#include "vectors.h"

namespace den_kernels {
namespace {

template <class T>
constexpr int64_t per_word = 4 / sizeof(T);

// Words of the packed weights of 16 outputs over I inputs.
template <class T>
int64_t weight_words(int64_t I, int64_t taps) {
  return ((I + per_word<T> - 1) / per_word<T> + 15) / 16 * taps * 256;
}

template <class T>
const float* words_of(const T* data) {
  return reinterpret_cast<const float*>(data);
}

#pragma GCC push_options
DEN_KERNELS_TARGET

// The lanes of a vector that lie on a map of which `left` channels are left.
KERNEL Lanes lanes_of(int64_t left) { return left >= 16 ? 0xFFFF : static_cast<Lanes>((1u << left) - 1); }

// sum + value * weights, of a word each.
template <class T>
Vector multiply_add(Vector value, Vector weights, Vector sum);
template <>
KERNEL Vector multiply_add<float>(Vector value, Vector weights, Vector sum) {
  return fma(value, weights, sum);
}

// 16 words of `left` values, zeros beyond these, and the values of words times a scale.
template <class T>
Vector load_words(const T* from, int64_t left);
template <>
KERNEL Vector load_words<float>(const float* from, int64_t left) {
  return load16(from, lanes_of(left));
}
template <class T>
Vector scale_words(Vector words, float scale);
template <>
KERNEL Vector scale_words<float>(Vector words, float scale) {
  return multiply(words, broadcast(scale));
}

// Of each of 16 channels the value at `from`; in bfloat16 a word of it and the value `next` on. Zeros in the lanes that
// `first` and `second` leave out.
template <class T>
Vector load_word(const T* from, Lanes first, int64_t next, Lanes second);
template <>
KERNEL Vector load_word<float>(const float* from, Lanes first, int64_t, Lanes) {
  return load16(from, first);
}

// The selected ones of 16 channels, without gaps. words: the words that hold any; what else these hold becomes zero.
template <class T>
void store_words(float* to, Vector v, uint32_t lanes, uint32_t words);
template <>
KERNEL void store_words<float>(float* to, Vector v, uint32_t lanes, uint32_t) {
  store_selected(to, v, static_cast<Lanes>(lanes));
}

#ifdef DEN_KERNELS_DOT_BF16
KERNEL __m512 widen16(__m256i v) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16)); }
KERNEL __m256i rounded(__m512 v) { return (__m256i)_mm512_cvtneps_pbh(v); }
KERNEL __m512 load16(const bf16* from) { return widen16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))); }
KERNEL __m512 load16(const bf16* from, __mmask16 lanes) { return widen16(_mm256_maskz_loadu_epi16(lanes, from)); }
KERNEL void store16(bf16* to, __m512 v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), rounded(v)); }
KERNEL void store16(bf16* to, __m512 v, __mmask16 lanes) { _mm256_mask_storeu_epi16(to, lanes, rounded(v)); }

template <>
KERNEL __m512 multiply_add<bf16>(__m512 value, __m512 weights, __m512 sum) {
  return _mm512_dpbf16_ps(sum, (__m512bh)value, (__m512bh)weights);
}

template <>
KERNEL __m512 load_words<bf16>(const bf16* from, int64_t left) {
  const __mmask32 live = left >= 32 ? ~__mmask32{0} : static_cast<__mmask32>((1u << left) - 1);
  return _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(live, from));
}
template <>
KERNEL __m512 scale_words<bf16>(__m512 words, float scale) {
  const __m512i bits = _mm512_castps_si512(words), high = _mm512_and_si512(bits, _mm512_set1_epi32(-65536));
  const __m512 factor = _mm512_set1_ps(scale);
  const __m256i low = rounded(_mm512_mul_ps(_mm512_castsi512_ps(_mm512_slli_epi32(bits, 16)), factor));
  const __m512 second = widen16(rounded(_mm512_mul_ps(_mm512_castsi512_ps(high), factor)));
  return _mm512_or_ps(_mm512_castsi512_ps(_mm512_cvtepu16_epi32(low)), second);
}

template <>
KERNEL __m512 load_word<bf16>(const bf16* from, __mmask16 first, int64_t next, __mmask16 second) {
  const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first, from));
  return _mm512_or_ps(_mm512_castsi512_ps(low), load16(from + next, second));
}

template <>
KERNEL void store_words<bf16>(float* to, __m512 v, uint32_t lanes, uint32_t words) {
  const __m256i value = rounded(_mm512_maskz_mov_ps(static_cast<__mmask16>(lanes), v));
  if ((words & 0xFF) == 0xFF) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), value);
    return;
  }
  const __mmask8 chosen = static_cast<__mmask8>(words);
  _mm256_mask_storeu_epi32(to, static_cast<__mmask8>(_pext_u32(words, words)),
                           _mm256_maskz_compress_epi32(chosen, value));
}
#endif

#pragma GCC pop_options

// A selection in words: pieces of at most 16 of them, and of each block of 16 channels the words that hold any.
template <class T>
Channels in_words(const Channels& channels) {
  if constexpr (per_word<T> == 1) return channels;
  Channels made;
  for (const Block& block : channels.blocks) {
    made.blocks.push_back({block.index, 0, made.count});
    for (int64_t i = 0; i < 8; ++i) {
      if (!(block.lanes >> 2 * i & 3)) continue;
      const int64_t word = block.index * 8 + i;
      made.blocks.back().lanes |= 1u << i;
      if (made.ranges.empty() || made.ranges.back().first + made.ranges.back().width < word)
        made.ranges.push_back({word, 0});
      made.ranges.back().width++;
      made.count++;
    }
  }
  made.pieces = cut(made.ranges, 16);
  return made;
}

}  // namespace
}  // namespace den_kernels
