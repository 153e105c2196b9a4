#include "amx_pack.h"

#include <algorithm>

namespace den_kernels {
namespace {

int64_t begin_of(const int64_t* widths, int64_t g, int64_t O, int64_t R, int64_t S) {
  int64_t steps = 0;
  for (int64_t i = 1; i < g; ++i) steps += is_narrow(widths[i]) ? steps_of(widths[i], R, S) : 0;
  return steps * ((O + 15) / 16) * 512;
}

// One step of up to 32 inputs x 16 outputs of a convolution over the first `width` input channels.
void pack_step(const bf16* weight, const float* scale, bf16* packed, int64_t O, int64_t R, int64_t S, int64_t I,
               int64_t width, int64_t tile, int64_t step) {
  const bool narrow_run = is_narrow(width);
  const Cutting cut = narrow_run ? cutting_of(width, S) : Cutting{32, 1, 16};
  const int64_t outputs = std::min<int64_t>(16, O - tile * 16);
  std::fill_n(packed, 512, bf16{0});
  for (int64_t k = 0; k < cut.pairs * 2; ++k) {
    int64_t tap = step % (R * S), channel = step / (R * S) * 32 + k;
    if (narrow_run) {
      const int64_t run = step % cut.steps * cut.pairs * 2 + k;
      tap = step / cut.steps * S + run / cut.unit;
      channel = run % cut.unit;
    }
    if (channel >= width) continue;
    for (int64_t q = 0, o = tile * 16; q < outputs; ++q, ++o)
      narrow(widen(weight[(o * R * S + tap) * I + channel]) * (scale ? scale[o] : 1.f),
             packed[(k / 2 * 16 + q) * 2 + k % 2]);
  }
}

}  // namespace

Section section_of(const bf16* packed, const std::vector<int64_t>& widths, int64_t width, int64_t O, int64_t R,
                   int64_t S) {
  const int64_t G = static_cast<int64_t>(widths.size()) - 1;
  int64_t g = 1;
  while (g < G && widths[g] != width) ++g;
  return {packed + begin_of(widths.data(), g, O, R, S), steps_of(is_narrow(width) ? width : widths[G], R, S),
          !packed[amx_packed_size(O, R, S, widths) - 1].bits};
}

int64_t amx_packed_size(int64_t O, int64_t R, int64_t S, const std::vector<int64_t>& widths) {
  const int64_t G = static_cast<int64_t>(widths.size()) - 1;
  return begin_of(widths.data(), G, O, R, S) + (O + 15) / 16 * 512 * steps_of(widths[G], R, S) + 1;
}

void amx_pack_weights(const bf16* weight, const float* scale, bf16* packed, int64_t O, int64_t R, int64_t S,
                      const std::vector<int64_t>& widths) {
  const int64_t G = static_cast<int64_t>(widths.size()) - 1, I = widths[G], tiles = (O + 15) / 16;
  for (int64_t g = 1; g <= G; ++g) {
    if (!is_narrow(widths[g]) && g < G) continue;
    const int64_t steps = steps_of(widths[g], R, S);
    bf16* section = packed + begin_of(widths.data(), g, O, R, S);
#pragma omp parallel for schedule(static) if (tiles * steps > 32)
    for (int64_t n = 0; n < tiles * steps; ++n)
      pack_step(weight, scale, section + n * 512, O, R, S, I, widths[g], n / steps, n % steps);
  }
  const int64_t last = amx_packed_size(O, R, S, widths) - 1;
  uint16_t found = 0;
  for (int64_t i = 0; i < last; ++i) found |= (packed[i].bits & 0x7F80) == 0x7F80;
  packed[last].bits = found;
}

}  // namespace den_kernels
