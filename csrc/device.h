// What this build and this machine have: instruction sets, threads, CUDA devices.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace den_kernels {

struct CudaDevice {
  std::string name;
  int major, minor;  // compute capability
  int multiprocessors;
  std::size_t memory;  // bytes
};

struct CudaDevices {
  std::vector<CudaDevice> devices;
  std::string reason;  // why there are none; empty when there are some
};

#ifdef DEN_KERNELS_WITH_CUDA
CudaDevices cuda_devices();  // device.cu
int cuda_version();          // of the toolkit that compiled the library: 13000 is 13.0
#endif

}  // namespace den_kernels
