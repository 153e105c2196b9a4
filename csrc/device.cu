#include "device.h"

#include "launch.cuh"

namespace den_kernels {

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
