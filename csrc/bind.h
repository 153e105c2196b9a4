// The functions by which each group of ops adds itself to the Python module.
#pragma once

#include <pybind11/pybind11.h>

namespace den_kernels {

// bind_passes.cpp
void bind_plan(pybind11::module_& m);
void bind_rows(pybind11::module_& m);
void bind_norm(pybind11::module_& m);

// bind_direct.cpp
void bind_dynamic_conv(pybind11::module_& m);
void bind_dynamic_graph(pybind11::module_& m);

// bind_blocks.cpp
void bind_dynamic_residual(pybind11::module_& m);
void bind_dynamic_bottleneck(pybind11::module_& m);

void bind_dynamic_trunk(pybind11::module_& m);  // bind_trunk.cpp
void bind_task_network(pybind11::module_& m);   // bind_task_network.cpp

void bind_dynamic_inverted_residual(pybind11::module_& m);  // bind_inverted_residual.cpp

void bind_watch(pybind11::module_& m);     // bind_watch.cpp
void bind_cuda_ops(pybind11::module_& m);  // bind_cuda.cpp; nothing in a build without CUDA

}  // namespace den_kernels
