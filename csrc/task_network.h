// Networks of several tasks around layers that they share, at inference on a CPU in one call.
#pragma once

#include <cstdint>
#include <vector>

#include "dense_conv.h"
#include "dynamic_trunk.h"
#include "pooled_head.h"

namespace den_kernels {

// The instances of one task: its images, its layers and where its logits go.
template <class T>
struct TaskPart {
  int64_t count, H, W;
  const T* images;  // [count, H, W, C]
  const DenseConv<T>* stem;
  const Head<T>* head;
  T* logits;  // [count, O]
};

// logits of each part = its head (features (layers (its stem (images)))), the instances of the parts one after the
// other. The shared layers are a trunk, or plain convolutions and the mean of their map.
template <class T>
struct TaskNetwork {
  std::vector<TaskPart<T>> parts;
  std::vector<const DenseConv<T>*> convs;
  const Trunk<T>* trunk;  // its blocks, groups, levels, scale and shift; null: convs
};

void run_task_network(const TaskNetwork<float>& network);
void run_task_network(const TaskNetwork<bf16>& network);

}  // namespace den_kernels
