// float32 with AVX2 (direct_graph.h).
#define DEN_KERNELS_AVX2
#include "dispatch.h"
#include "dynamic_float32.h"
#ifdef DEN_KERNELS_HAS_AVX512
#include "direct_graph.h"

namespace den_kernels {

void dynamic_graph_avx2(const GraphArguments& p) { run_direct(p); }

}  // namespace den_kernels
#endif
