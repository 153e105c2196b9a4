// den_kernels._C: a table of contents. Each op binds itself; its header says what it takes.
#include <pybind11/pybind11.h>

#include "cuda_ops.h"
#include "device.h"
#include "dynamic_conv.h"
#include "dynamic_residual.h"
#include "norm.h"
#include "plan.h"
#include "rows.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled parts of den_kernels: raw pointers and sizes in, nothing of torch.";
  den_kernels::bind_device(m);
  den_kernels::bind_plan(m);
  den_kernels::bind_rows(m);
  den_kernels::bind_norm(m);
  den_kernels::bind_dynamic_conv(m);
  den_kernels::bind_dynamic_residual(m);
  den_kernels::bind_cuda_ops(m);
}
