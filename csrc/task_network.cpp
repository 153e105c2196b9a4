#include "task_network.h"

#include <algorithm>
#include <memory>

#include "instance_queue.h"

namespace den_kernels {
namespace {

// Pixels of the first map that go through plain convolutions together.
constexpr int64_t conv_pixels = 2048;

template <class T>
std::unique_ptr<T[]> room(int64_t values) {
  return std::unique_ptr<T[]>(new T[static_cast<size_t>(values)]);
}

// A network with the maps of a call.
template <class T>
struct NetworkCall {
  const TaskNetwork<T>& network;
  std::vector<int64_t> first;  // [parts + 1] instance of each part
  int64_t H, W, C;             // of the stems' maps
  std::unique_ptr<T[]> x;      // [B, H, W, C]

  explicit NetworkCall(const TaskNetwork<T>& n) : network(n), first{0} {
    for (const TaskPart<T>& part : n.parts) first.push_back(first.back() + part.count);
    const TaskPart<T>& part = n.parts.front();
    H = part.stem->out(part.H, part.stem->R), W = part.stem->out(part.W, part.stem->S), C = part.stem->C_out;
    x = room<T>(batch() * H * W * C);
  }
  int64_t batch() const { return first.back(); }

  // The stems of some instances.
  void stems(const int32_t* instances, int64_t count) const {
    for (size_t k = 0; k < network.parts.size(); ++k) {
      const TaskPart<T>& part = network.parts[k];
      std::vector<int32_t> own;
      for (int64_t i = 0; i < count; ++i)
        if (first[k] <= instances[i] && instances[i] < first[k + 1])
          own.push_back(static_cast<int32_t>(instances[i] - first[k]));
      dense_conv(*part.stem, part.images, x.get() + first[k] * H * W * C, own.data(), static_cast<int64_t>(own.size()),
                 part.H, part.W);
    }
  }

  void heads(const T* features) const {
    for (size_t k = 0; k < network.parts.size(); ++k) {
      const TaskPart<T>& part = network.parts[k];
      run_head(*part.head, features + first[k] * part.head->C, part.count, part.logits);
    }
  }
};

template <class T>
void run_trunk(const NetworkCall<T>& call) {
  Trunk<T> trunk = *call.network.trunk;
  trunk.B = call.batch(), trunk.H = call.H, trunk.W = call.W, trunk.x = call.x.get();
  std::vector<std::unique_ptr<T[]>> maps;
  int64_t H = call.H, W = call.W, C = call.C;
  for (size_t n = 0; n < trunk.blocks->size(); ++n)
    std::visit(
        [&](const auto& b) {
          H = (H + b.stride - 1) / b.stride, W = (W + b.stride - 1) / b.stride, C = b.C_out;
          if (!trunk.has_map(n)) return;
          maps.push_back(room<T>(trunk.B * H * W * C));
          trunk.maps.push_back(maps.back().get());
        },
        (*trunk.blocks)[n]);
  const std::unique_ptr<T[]> features = room<T>(trunk.B * C);
  trunk.features = features.get();
  trunk.before = [&call](const int32_t* instances, int64_t count) { call.stems(instances, count); };
  dynamic_trunk(trunk);
  call.heads(features.get());
}

template <class T>
void run_convs(const NetworkCall<T>& call) {
  struct Layer {
    const DenseConv<T>& conv;
    int64_t H, W;  // of the map that it reads
    std::unique_ptr<T[]> out;
  };
  std::vector<Layer> layers;
  const int64_t B = call.batch(), together = std::max<int64_t>(1, conv_pixels / (call.H * call.W));
  int64_t H = call.H, W = call.W, C = call.C;
  double cost = call.network.parts.front().stem->cost(H * W);
  for (const DenseConv<T>* conv : call.network.convs) {
    const int64_t Ho = conv->out(H, conv->R), Wo = conv->out(W, conv->S);
    layers.push_back({*conv, H, W, room<T>(B * Ho * Wo * conv->C_out)});
    H = Ho, W = Wo, C = conv->C_out;
    cost += conv->cost(Ho * Wo);
  }
  const std::unique_ptr<T[]> features = room<T>(B * C);
  const T* last = layers.empty() ? call.x.get() : layers.back().out.get();
  for_chunks(std::vector<double>(static_cast<size_t>(B), cost), static_cast<int64_t>(layers.size()) + 1,
             [&](const int32_t* instances, int64_t count, bool) {
               for (int64_t i = 0; i < count; i += together) {
                 const int64_t next = std::min(together, count - i);
                 call.stems(instances + i, next);
                 const T* x = call.x.get();
                 for (const Layer& layer : layers) {
                   dense_conv(layer.conv, x, layer.out.get(), instances + i, next, layer.H, layer.W);
                   x = layer.out.get();
                 }
               }
               for (int64_t i = 0; i < count; ++i) {
                 const int64_t b = instances[i];
                 features_of(last + b * H * W * C, H * W, C, nullptr, nullptr, features.get() + b * C);
               }
             });
  call.heads(features.get());
}

template <class T>
void run(const TaskNetwork<T>& network) {
  const NetworkCall<T> call(network);
  if (network.trunk)
    run_trunk(call);
  else
    run_convs(call);
}

}  // namespace

void run_task_network(const TaskNetwork<float>& network) { run(network); }
void run_task_network(const TaskNetwork<bf16>& network) { run(network); }

}  // namespace den_kernels
