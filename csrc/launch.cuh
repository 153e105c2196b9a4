// Launching a kernel that takes one struct of parameters: on a GPU, or on a CPU under the tests' shim.
#pragma once

#include <cstddef>

#ifdef __CUDACC__

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace den_kernels {

inline void check_cuda(cudaError_t code, const char* call) {
  if (code == cudaSuccess) return;
  cudaGetLastError();  // an error that is reported here must not surface again in somebody else's call
  throw std::runtime_error(std::string(call) + ": " + cudaGetErrorString(code) + " (CUDA error " +
                           std::to_string(static_cast<int>(code)) + ")");
}

// Throws std::runtime_error that names the call and what the CUDA runtime said.
template <class Params>
void launch(const char* name, void (*kernel)(Params), int blocks, int threads, std::size_t shared, void* stream,
            Params params) {
  const std::string call = name;
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)),
             (call + ": cudaFuncSetAttribute").c_str());
  void* arguments[] = {&params};
  check_cuda(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(blocks), dim3(threads), arguments, shared,
                              static_cast<cudaStream_t>(stream)),
             (call + ": cudaLaunchKernel").c_str());
}

}  // namespace den_kernels

#else

#include "cuda_shim.h"

namespace den_kernels {

template <class Params>
void launch(const char*, void (*kernel)(Params), int blocks, int threads, std::size_t shared, void*, Params params) {
  shim::launch(kernel, blocks, threads, shared, params);
}

}  // namespace den_kernels

#endif
