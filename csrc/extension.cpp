// den_kernels._C: a table of contents, and what this build and this machine have. Holds the bindings of single ops,
// too, which are not compiled by themselves (bindings_of_blocks.cpp says why).

#include "bind.h"
#include "bind_cuda.cpp"
#include "bind_direct.cpp"
#include "bind_passes.cpp"
#include "bind_watch.cpp"
#include "device.h"
#include "dispatch.h"
#include "openmp.h"

#ifndef BINDINGS
#define BINDINGS ""  // setup.py gives a hash of the bindings (den_kernels/_interface.py)
#endif

namespace py = pybind11;

namespace den_kernels {
namespace {

// The instruction set that functions marked DEN_KERNELS_CLONES run with on this machine.
const char* cpu_isa() {
#ifdef DEN_KERNELS_HAS_AVX512
  if (DEN_KERNELS_HAS_AVX512) return "AVX-512";
  if (DEN_KERNELS_HAS_AVX2) return "AVX2";
  return "SSE2";
#else
  return "compiler default";
#endif
}

#ifdef DEN_KERNELS_WITH_CUDA
py::tuple list_devices() {
  const CudaDevices found = cuda_devices();
  py::list devices;
  for (const CudaDevice& device : found.devices) {
    py::dict entry;
    entry["name"] = device.name;
    entry["compute_capability"] = py::make_tuple(device.major, device.minor);
    entry["multiprocessors"] = device.multiprocessors;
    entry["memory"] = device.memory;
    devices.append(entry);
  }
  return py::make_tuple(devices, found.reason);
}
#endif

// Adds the properties of this build and this machine.
void bind_device(py::module_& m) {
  m.def("cpu_isa", &cpu_isa, "Instruction set that the C++ inner functions run with here.");
  m.def("omp_max_threads", &omp_get_max_threads, "Threads that the next OpenMP region would use.");
  m.attr("compiler") = __VERSION__;
#ifdef _OPENMP
  m.attr("with_openmp") = true;
#else
  m.attr("with_openmp") = false;
#endif
  m.attr("interface") = BINDINGS;
#ifdef DEN_KERNELS_WITH_CUDA
  m.attr("with_cuda") = true;
  m.attr("cuda_version") = py::make_tuple(cuda_version() / 1000, cuda_version() % 1000 / 10);
  m.attr("cuda_archs") = py::str(DEN_KERNELS_CUDA_ARCHS).attr("split")(",");
  m.def("cuda_devices", &list_devices, "(devices as a list of dicts, why the list is empty or an empty string).");
#else
  m.attr("with_cuda") = false;
  m.attr("cuda_version") = py::none();
  m.attr("cuda_archs") = py::list();
  m.def(
      "cuda_devices", [] { return py::make_tuple(py::list(), "this build has no CUDA sources"); },
      "(an empty list, the reason).");
#endif
}

}  // namespace
}  // namespace den_kernels

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled parts of den_kernels. Tensors come in through DLPack; nothing of torch is linked.";
  den_kernels::bind_device(m);
  den_kernels::bind_plan(m);
  den_kernels::bind_rows(m);
  den_kernels::bind_norm(m);
  den_kernels::bind_dynamic_conv(m);
  den_kernels::bind_dynamic_graph(m);
  den_kernels::bind_dynamic_residual(m);
  den_kernels::bind_dynamic_bottleneck(m);
  den_kernels::bind_dynamic_inverted_residual(m);
  den_kernels::bind_dynamic_trunk(m);
  den_kernels::bind_task_network(m);
  den_kernels::bind_watch(m);
  den_kernels::bind_cuda_ops(m);
}
