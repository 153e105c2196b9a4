#include "device.h"

#include <stdexcept>

#include <cuda_runtime.h>

namespace den_kernels {
namespace {

void check_cuda(cudaError_t code, const char* call) {
  if (code == cudaSuccess) return;
  cudaGetLastError();  // an error that is reported here must not surface again in somebody else's call
  throw std::runtime_error(std::string(call) + ": " + cudaGetErrorString(code) + " (CUDA error " +
                           std::to_string(static_cast<int>(code)) + ")");
}

}  // namespace

CudaDevices cuda_devices() {
  CudaDevices found;
  int count = 0;
  const cudaError_t code = cudaGetDeviceCount(&count);
  if (code == cudaErrorInsufficientDriver || code == cudaErrorNoDevice) {
    cudaGetLastError();
    found.reason = cudaGetErrorString(code);
    return found;
  }
  check_cuda(code, "cudaGetDeviceCount");
  for (int i = 0; i < count; ++i) {
    cudaDeviceProp properties;
    check_cuda(cudaGetDeviceProperties(&properties, i), "cudaGetDeviceProperties");
    found.devices.push_back({properties.name, properties.major, properties.minor, properties.multiProcessorCount,
                             properties.totalGlobalMem});
  }
  if (count == 0) found.reason = "no CUDA-capable device is detected";
  return found;
}

int cuda_version() { return CUDART_VERSION; }

}  // namespace den_kernels
