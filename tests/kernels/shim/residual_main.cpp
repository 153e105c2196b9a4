// residual_main TYPE SCHEDULE MODE SIZES...: the fused residual block of csrc/dynamic_residual.cu on a CPU.
//
// TYPE: bfloat16, float16, tf32. MODE: in-place, add (out holds the shortcut), shortcut (the kernel writes it).
// SIZES: B H W C Ho Wo C_out M stride G relu prologue bias2 (the last three 0 or 1), the nine of FusedLayout, the G + 1
// widths. Reads x, out (add only), order, offsets, conv1, conv2, scale2, bias1 and what of scale1, shift1, bias2 there
// is; writes out, then int64: bytes streamed, loaded, stored, of shared memory.
#include "../../../csrc/dynamic_residual.cu"

#include "streams.h"

int main(int argc, char** argv) {
  using namespace den_kernels;
  const std::string type = argv[1], mode = argv[3];
  shim::schedule = schedule_of(argv[2]);
  const std::vector<int64_t> n = sizes_of(argc, argv, 4);
  FusedResidual p = {};
  int i = 0;
  for (int* size : {&p.B, &p.H, &p.W, &p.C, &p.Ho, &p.Wo, &p.C_out, &p.M, &p.stride, &p.G})
    *size = static_cast<int>(n[i++]);
  p.relu = n[i++];
  const int64_t prologue = n[i++], biased = n[i++];
  FusedLayout& l = p.layout;
  for (int* size :
       {&l.instances, &l.rows, &l.columns, &l.hidden_columns, &l.taps1, &l.bytes1, &l.taps2, &l.bytes2, &l.blocks})
    *size = static_cast<int>(n[i++]);
  for (int g = 0; g <= p.G; ++g) p.widths[g] = static_cast<int>(n[i++]);

  const int64_t element = type == "tf32" ? 4 : 2, outs = int64_t{p.B} * p.Ho * p.Wo * p.C_out * element;
  std::vector<uint8_t> x = read_array<uint8_t>(int64_t{p.B} * p.H * p.W * p.C * element);
  std::vector<uint8_t> out =
      mode == "add" ? read_array<uint8_t>(outs) : std::vector<uint8_t>(mode == "shortcut" ? outs : 0, 0xFF);
  const auto order = read_array<int32_t>(p.B), offsets = read_array<int32_t>(p.G + 2);
  const auto conv1 = read_array<uint8_t>(int64_t{p.M} * 9 * p.C * element);
  const auto conv2 = read_array<uint8_t>(int64_t{p.C_out} * 9 * p.M * element);
  const auto scale2 = read_array<float>(p.M), bias1 = read_array<float>(p.M);
  const auto scale1 = read_array<float>(prologue * p.C), shift1 = read_array<float>(prologue * p.C);
  const auto bias2 = read_array<float>(biased * p.C_out);
  p.x = x.data();
  p.out = mode == "in-place" ? x.data() : out.data();
  p.order = order.data(), p.offsets = offsets.data();
  p.conv1 = conv1.data(), p.conv2 = conv2.data();
  p.scale2 = scale2.data(), p.bias1 = bias1.data();
  p.scale1 = prologue ? scale1.data() : nullptr, p.shift1 = prologue ? shift1.data() : nullptr;
  p.bias2 = biased ? bias2.data() : nullptr;
  p.holds_shortcut = mode != "shortcut";

  const FusedType code = type == "bfloat16"  ? FusedType::bfloat16
                         : type == "float16" ? FusedType::float16
                                             : FusedType::tf32;
  fused_residual_cuda(p, code, nullptr);
  write_array(mode == "in-place" ? x : out);
  write_array(std::vector<int64_t>{shim::bytes_streamed, shim::bytes_loaded, shim::bytes_stored,
                                   fused_residual_shared(p, code)});
}
