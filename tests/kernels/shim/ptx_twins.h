// CPU twins of csrc/ptx.cuh, in the same order.
#pragma once

#include "cuda_shim.h"
#include "numbers.h"

namespace den_kernels {

inline unsigned char* shared_memory() { return shim::shared.get(); }
inline uint32_t shared_address() { return 0; }

inline int here(int v) { return v; }

inline void sync_block() {
  shim::meet(0, static_cast<int>(shim::fibers.size()), shim::State::waits_for_block, [] {});
}
inline void sync_warp() {
  int nothing = 0;
  shim::collective(nothing, [](int**) {});
}
inline int count_bits(uint32_t v) { return __builtin_popcount(v); }

struct Vote {
  int in;
  int argument;
  uint32_t out;
};

inline uint32_t match_any(int v) {
  Vote vote = {v, 0, 0};
  shim::collective(vote, [](Vote** lanes) {
    for (int i = 0; i < shim::kWarp; ++i)
      for (int j = 0; j < shim::kWarp; ++j) lanes[i]->out |= static_cast<uint32_t>(lanes[i]->in == lanes[j]->in) << j;
  });
  return vote.out;
}
inline uint32_t ballot(bool v) {
  Vote vote = {v, 0, 0};
  shim::collective(vote, [](Vote** lanes) {
    for (int i = 0; i < shim::kWarp; ++i)
      for (int j = 0; j < shim::kWarp; ++j) lanes[i]->out |= static_cast<uint32_t>(lanes[j]->in) << j;
  });
  return vote.out;
}
inline int shuffle(int v, int lane) {
  Vote vote = {v, lane, 0};
  shim::collective(vote, [](Vote** lanes) {
    for (int i = 0; i < shim::kWarp; ++i) lanes[i]->out = static_cast<uint32_t>(lanes[lanes[i]->argument & 31]->in);
  });
  return static_cast<int>(vote.out);
}
inline int shuffle_up(int v, int delta) {
  return shuffle(v, shim::lane() < delta ? shim::lane() : shim::lane() - delta);
}

inline unsigned char* shared_at(uint32_t address, std::size_t bytes) {
  if (address % bytes) {
    std::fprintf(stderr, "cuda_shim: shared address %u is not aligned to %zu bytes\n", address, bytes);
    std::abort();
  }
  return shim::shared.get() + address;
}

inline void copy_async16(uint32_t to, const void* from) {
  shim::bytes_streamed += 16;
  shim::Copy copy = {shared_at(to, 16), from};
  static_cast<void>(*static_cast<const Words<4>*>(from));  // aligned
  shim::fibers[shim::current].issued.push_back(copy);
  if (!shim::schedule.lazy) std::memcpy(copy.to, copy.from, 16);
}
inline void copy_async_commit() {
  shim::Fiber& fiber = shim::fibers[shim::current];
  fiber.commits.push_back(std::move(fiber.issued));
  fiber.issued.clear();
}
template <int n>
void copy_async_wait() {
  shim::Fiber& fiber = shim::fibers[shim::current];
  for (; fiber.commits.size() > n; fiber.commits.pop_front())
    for (const shim::Copy& copy : fiber.commits.front())
      if (shim::schedule.lazy) std::memcpy(copy.to, copy.from, 16);
}

template <class V>
V load_global(const void* from) {
  shim::bytes_loaded += sizeof(V);
  return *static_cast<const V*>(from);
}
template <class V>
void store_global(void* to, V v) {
  shim::bytes_stored += sizeof(V);
  *static_cast<V*>(to) = v;
}
template <class V>
V load_shared(uint32_t from) {
  return *reinterpret_cast<const V*>(shared_at(from, sizeof(V)));
}
template <class V>
void store_shared(uint32_t to, V v) {
  *reinterpret_cast<V*>(shared_at(to, sizeof(V))) = v;
}

struct MatrixRows {
  const unsigned char* row;
  uint32_t* words;
};
inline void load_matrices(uint32_t (&words)[4], uint32_t row) {
  MatrixRows operand = {shared_at(row, 16), words};
  shim::collective(operand, [](MatrixRows** lanes) {
    for (int i = 0; i < shim::kWarp; ++i)
      for (int matrix = 0; matrix < 4; ++matrix)
        std::memcpy(&lanes[i]->words[matrix], lanes[8 * matrix + i / 4]->row + i % 4 * 4, 4);
  });
}

inline float as_float(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}
inline uint32_t as_word(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, sizeof bits);
  return bits;
}

inline float relu(float v) { return v < 0.f ? 0.f : v; }

inline Float2 unpack(Bf16, Words<1> v) { return {as_float(v.w[0] << 16), as_float(v.w[0] & 0xFFFF0000u)}; }
inline Words<1> pack(Bf16, Float2 v) {
  bf16 lo, hi;
  narrow(v.lo, lo);
  narrow(v.hi, hi);
  return {{lo.bits | static_cast<uint32_t>(hi.bits) << 16}};
}
inline Float2 unpack(Fp16, Words<1> v) {
  fp16 pair[2];
  std::memcpy(pair, &v, sizeof pair);
  return {widen(pair[0]), widen(pair[1])};
}
inline Words<1> pack(Fp16, Float2 v) {
  const _Float16 pair[2] = {static_cast<_Float16>(v.lo), static_cast<_Float16>(v.hi)};
  Words<1> r;
  std::memcpy(&r, pair, sizeof r);
  return r;
}
inline Float2 unpack(Tf32, Words<2> v) { return {as_float(v.w[0]), as_float(v.w[1])}; }
inline Words<2> pack(Tf32, Float2 v) { return {{as_word(v.lo), as_word(v.hi)}}; }
inline uint32_t round_word(Tf32, uint32_t v) { return (v & 0x7F800000u) == 0x7F800000u ? v : (v + 0x1000u) & ~0x1FFFu; }

// The values of one word, in the order of k.
inline int values_of(Bf16 e, uint32_t word, float* out) {
  const Float2 pair = unpack(e, Words<1>{{word}});
  out[0] = pair.lo, out[1] = pair.hi;
  return 2;
}
inline int values_of(Fp16 e, uint32_t word, float* out) {
  const Float2 pair = unpack(e, Words<1>{{word}});
  out[0] = pair.lo, out[1] = pair.hi;
  return 2;
}
inline int values_of(Tf32, uint32_t word, float* out) {
  out[0] = as_float(word & ~0x1FFFu);  // the instruction ignores the low bits
  return 1;
}

struct MmaOperand {
  float* d;
  const uint32_t* a;
  uint32_t b[2];
};
template <class E>
void mma(E e, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  MmaOperand operand = {d, a, {b0, b1}};
  shim::collective(operand, [e](MmaOperand** lanes) {
    float left[16][16], right[8][16];  // a, b; word w of row r lies with lane r % 8 * 4 + w % 4
    int K = 0;
    for (int w = 0; w < 8; ++w) {
      int per_word = 1;
      for (int r = 0; r < 16; ++r) {
        const uint32_t word = lanes[r % 8 * 4 + w % 4]->a[r / 8 + w / 4 * 2];
        per_word = values_of(e, word, &left[r][K]);
      }
      for (int r = 0; r < 8; ++r) values_of(e, lanes[r * 4 + w % 4]->b[w / 4], &right[r][K]);
      K += per_word;
    }
    for (int r = 0; r < 16; ++r)
      for (int n = 0; n < 8; ++n) {
        float sum = 0;
        for (int k = 0; k < K; ++k) sum += left[r][k] * right[n][k];
        lanes[r % 8 * 4 + n / 2]->d[r / 8 * 2 + n % 2] += sum;
      }
  });
}

}  // namespace den_kernels
