// Properties of this build and this machine: instruction sets, threads, CUDA devices.
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

// The CUDA runtime's answer to whether the library's kernels run on a device, asked of one kernel.
struct KernelStatus {
  int code;             // of the runtime: 0 where they run, 35 driver too old, 209 no code for the device, ...
  std::string message;  // what the runtime says of the code
  int driver;           // the newest CUDA that the driver knows: 12040 is 12.4, 0 without a driver
};

#ifdef DEN_KERNELS_WITH_CUDA
CudaDevices cuda_devices();              // device.cu
KernelStatus kernel_status(int device);  // device.cu; leaves the current device and a capture as they are
int cuda_version();                      // of the toolkit that compiled the library: 13000 is 13.0
#endif

}  // namespace den_kernels
