#include "norm_spans.h"

#include <cstring>
#include <type_traits>

#include "dispatch.h"
#include "numbers.h"

namespace den_kernels {
namespace {

// Sixteen lanes in float32; GCC lowers them to what the instruction set of a clone has. Passed by reference: vectors of
// 64 bytes have no calling convention where they are no registers.
using Lanes = float __attribute__((vector_size(64)));
using Bits = uint32_t __attribute__((vector_size(64)));
using Halves = uint16_t __attribute__((vector_size(32)));
constexpr int64_t lanes = 16;

#define INLINED __attribute__((always_inline))  // for a lambda: it is then compiled for the clone that calls it

// The first n lanes of a row; n is `lanes` unless the compiler does not know it.
template <class V, class T>
ALWAYS_INLINE void copy_in(const T* in, int64_t n, V& v) {
  if (n == lanes) {
    std::memcpy(&v, in, sizeof v);
    return;
  }
  v = V{};
  std::memcpy(&v, in, n * sizeof *in);
}

ALWAYS_INLINE void load(const float* in, int64_t n, Lanes& v) { copy_in(in, n, v); }
ALWAYS_INLINE void load(const bf16* in, int64_t n, Lanes& v) {
  Halves h;
  copy_in(in, n, h);
  const Bits u = __builtin_convertvector(h, Bits) << 16;
  std::memcpy(&v, &u, sizeof v);
}

ALWAYS_INLINE void store(const Lanes& v, int64_t n, float* out) {
  n == lanes ? std::memcpy(out, &v, sizeof v) : std::memcpy(out, &v, n * sizeof *out);
}
ALWAYS_INLINE void store(const Lanes& v, int64_t n, bf16* out) {  // to nearest even; a NaN keeps a set mantissa bit
  Bits u;
  std::memcpy(&u, &v, sizeof u);
  const Bits rounded = (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16;
  const Halves h = __builtin_convertvector((u & 0x7FFFFFFFu) > 0x7F800000u ? Bits{} + 0x7FC0u : rounded, Halves);
  n == lanes ? std::memcpy(out, &h, sizeof h) : std::memcpy(out, &h, n * sizeof *out);
}

ALWAYS_INLINE void keep_only(Lanes& v, const Bits& keep) {  // v or 0, also where v is NaN
  Bits u;
  std::memcpy(&u, &v, sizeof u);
  u &= keep;
  std::memcpy(&v, &u, sizeof u);
}

// Calls tile(W, lane, n) for the lanes of a span: W vectors of 16 lanes, or one of the n that are left.
template <class Tile>
ALWAYS_INLINE void in_tiles(int64_t width, Tile tile) {
  int64_t c = 0;
  for (; width - c >= 4 * lanes; c += 4 * lanes) tile(std::integral_constant<int, 4>(), c, lanes);
  for (; width - c >= 2 * lanes; c += 2 * lanes) tile(std::integral_constant<int, 2>(), c, lanes);
  for (; width - c >= lanes; c += lanes) tile(std::integral_constant<int, 1>(), c, lanes);
  if (c < width) tile(std::integral_constant<int, 1>(), c, width - c);
}

// Rows that are added up before their sums are added to those of the rows before: of a sum of float32 the rounding
// errors grow with its length.
constexpr int64_t part_rows = 16;

// Calls row(r, sums) for the rows of a span in parts. sums: [N], 0 at the beginning of each part; added up in total.
template <int N, class Row>
ALWAYS_INLINE void in_parts(int64_t rows, Lanes (&total)[N], Row row) {
  for (int64_t first = 0; first < rows; first += part_rows) {
    const int64_t last = first + part_rows < rows ? first + part_rows : rows;
    Lanes sums[N] = {};
    for (int64_t r = first; r < last; ++r) row(r, sums);
    UNROLL for (int i = 0; i < N; ++i) total[i] += sums[i];
  }
}

// The coefficients of W vectors of lanes, in registers.
template <int W>
struct Affine {
  Lanes mean[W], scale[W], bias[W];
  ALWAYS_INLINE Affine(const Coefficients& k, int64_t lane, int64_t n) {
    for (int w = 0; w < W; ++w, lane += lanes) {
      load(k.mean + lane, n, mean[w]);
      load(k.scale + lane, n, scale[w]);
      load(k.bias + lane, n, bias[w]);
    }
  }
  ALWAYS_INLINE void operator()(int w, const Lanes& x, Lanes& y) const { y = (x - mean[w]) * scale[w] + bias[w]; }
  // d: the gradient dy where the ReLU let x through, else 0.
  template <class T>
  ALWAYS_INLINE void behind_relu(int w, const Lanes& x, const T* dy, int64_t n, const Lanes& floor, Lanes& d) const {
    Lanes y;
    load(dy, n, d);
    (*this)(w, x, y);
    d = y <= floor ? Lanes{} : d;
  }
};

// The sums are taken about the mean of a sample of the rows: a large common offset does not cancel.
template <class T>
ALWAYS_INLINE void moments(const T* x, const Span& s, float* mean, float* squares) {
  const int64_t samples = s.rows < 4 ? s.rows : 4 + s.rows / 32;
  in_tiles(s.width, [&](auto width, int64_t lane, int64_t n) INLINED {
    constexpr int W = width;
    Lanes centre[W] = {}, total[2 * W] = {}, v;  // total: the sums, then those of squares
    for (int64_t i = 0; i < samples; ++i) UNROLL for (int w = 0; w < W; ++w) {
        load(x + i * s.rows / samples * s.stride + lane + w * lanes, n, v);
        centre[w] += v;
      }
    for (int w = 0; w < W; ++w) centre[w] /= static_cast<float>(samples);
    in_parts(s.rows, total, [&](int64_t r, Lanes(&sums)[2 * W]) INLINED {
      UNROLL for (int w = 0; w < W; ++w) {
        load(x + r * s.stride + lane + w * lanes, n, v);
        v -= centre[w];
        sums[w] += v;
        sums[W + w] += v * v;
      }
    });
    for (int w = 0; w < W; ++w) {
      const Lanes shift = total[w] / static_cast<float>(s.rows), rest = total[W + w] - total[w] * shift;
      store(centre[w] + shift, n, mean + lane + w * lanes);
      store(rest < 0.f ? Lanes{} : rest, n, squares + lane + w * lanes);
    }
  });
}

template <class T>
ALWAYS_INLINE void apply(const T* x, T* y, const Span& s, const Coefficients& k) {
  in_tiles(s.width, [&](auto width, int64_t lane, int64_t n) INLINED {
    constexpr int W = width;
    const Affine<W> affine(k, lane, n);
    const Lanes floor = Lanes{} + k.floor;
    Bits keep[W];
    for (int w = 0; w < W; ++w) copy_in(k.keep + lane + w * lanes, n, keep[w]);
    for (int64_t r = 0; r < s.rows; ++r) UNROLL for (int w = 0; w < W; ++w) {
        const int64_t at = r * s.stride + lane + w * lanes;
        Lanes in, v;
        load(x + at, n, in);
        affine(w, in, v);
        v = v < floor ? floor : v;
        keep_only(v, keep[w]);
        store(v, n, y + at);
      }
  });
}

template <class T>
ALWAYS_INLINE void reduce(const T* dy, const T* x, const Span& s, const Coefficients& k, float* g, float* gx) {
  in_tiles(s.width, [&](auto width, int64_t lane, int64_t n) INLINED {
    constexpr int W = width;
    const Affine<W> affine(k, lane, n);
    const Lanes floor = Lanes{} + k.floor;
    Lanes total[2 * W] = {};  // of the gradients, then of their products with x
    in_parts(s.rows, total, [&](int64_t r, Lanes(&sums)[2 * W]) INLINED {
      UNROLL for (int w = 0; w < W; ++w) {
        const int64_t at = r * s.stride + lane + w * lanes;
        Lanes in, d;
        load(x + at, n, in);
        affine.behind_relu(w, in, dy + at, n, floor, d);
        sums[w] += d;
        sums[W + w] += d * (in - affine.mean[w]);
      }
    });
    for (int w = 0; w < W; ++w) {
      store(total[w], n, g + lane + w * lanes);
      store(total[W + w], n, gx + lane + w * lanes);
    }
  });
}

template <class T>
ALWAYS_INLINE void gradient(const T* dy, const T* x, T* dx, const Span& s, const Coefficients& k) {
  in_tiles(s.width, [&](auto width, int64_t lane, int64_t n) INLINED {
    constexpr int W = width;
    const Affine<W> affine(k, lane, n);
    const Lanes floor = Lanes{} + k.floor;
    Lanes dmean[W], dvar[W];
    Bits keep[W], through[W];  // through: where dvar is not 0, as a product with 0 is NaN where x is not finite
    for (int w = 0; w < W; ++w) {
      load(k.dmean + lane + w * lanes, n, dmean[w]);
      load(k.dvar + lane + w * lanes, n, dvar[w]);
      through[w] = (Bits)(dvar[w] != 0.f);
      copy_in(k.keep + lane + w * lanes, n, keep[w]);
    }
    for (int64_t r = 0; r < s.rows; ++r) UNROLL for (int w = 0; w < W; ++w) {
        const int64_t at = r * s.stride + lane + w * lanes;
        Lanes in, d, of_var;
        load(x + at, n, in);
        affine.behind_relu(w, in, dy + at, n, floor, d);
        of_var = (in - affine.mean[w]) * dvar[w];
        keep_only(of_var, through[w]);
        d = d * affine.scale[w] - dmean[w] - of_var;
        keep_only(d, keep[w]);
        store(d, n, dx + at);
      }
  });
}

// target_clones does not reach templates, so each type gets a plain function around the inlined body.
#define DEFINE_SPANS(NAME, T)                                                                                          \
  DEN_KERNELS_CLONES void moments_##NAME(const void* x, const Span& s, float* mean, float* squares) {                  \
    moments(static_cast<const T*>(x) + s.offset, s, mean, squares);                                                    \
  }                                                                                                                    \
  DEN_KERNELS_CLONES void apply_##NAME(const void* x, void* y, const Span& s, const Coefficients& k) {                 \
    apply(static_cast<const T*>(x) + s.offset, static_cast<T*>(y) + s.offset, s, k);                                   \
  }                                                                                                                    \
  DEN_KERNELS_CLONES void reduce_##NAME(const void* dy, const void* x, const Span& s, const Coefficients& k, float* g, \
                                        float* gx) {                                                                   \
    reduce(static_cast<const T*>(dy) + s.offset, static_cast<const T*>(x) + s.offset, s, k, g, gx);                    \
  }                                                                                                                    \
  DEN_KERNELS_CLONES void gradient_##NAME(const void* dy, const void* x, void* dx, const Span& s,                      \
                                          const Coefficients& k) {                                                     \
    gradient(static_cast<const T*>(dy) + s.offset, static_cast<const T*>(x) + s.offset,                                \
             static_cast<T*>(dx) + s.offset, s, k);                                                                    \
  }

DEFINE_SPANS(f32, float)
DEFINE_SPANS(b16, bf16)

}  // namespace

SpanLoops span_loops(int64_t element_bytes) {
  return element_bytes == 4 ? SpanLoops{moments_f32, apply_f32, reduce_f32, gradient_f32}
                            : SpanLoops{moments_b16, apply_b16, reduce_b16, gradient_b16};
}

}  // namespace den_kernels
