#include "device.h"

#include "cuda_ops.h"
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

namespace {

// Loads one of our kernels on a device, as its first launch would.
cudaError_t load_kernel(int device) {
  int before = 0;
  cudaError_t code = cudaGetDevice(&before);
  if (code == cudaSuccess) code = cudaSetDevice(device);
  if (code != cudaSuccess) return code;
  cudaFuncAttributes attributes;
  code = cudaFuncGetAttributes(&attributes, plan_kernel_cuda());
  cudaSetDevice(before);
  return code;
}

}  // namespace

KernelStatus kernel_status(int device) {
  int driver = 0;
  cudaDriverGetVersion(&driver);
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;  // loading code would end a capture in another mode
  cudaThreadExchangeStreamCaptureMode(&mode);
  const cudaError_t code = load_kernel(device);
  cudaThreadExchangeStreamCaptureMode(&mode);
  cudaGetLastError();  // an error that is reported here must not surface again in somebody else's call
  return {static_cast<int>(code), cudaGetErrorString(code), driver};
}

int cuda_version() { return CUDART_VERSION; }

}  // namespace den_kernels
