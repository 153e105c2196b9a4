// float32 with AVX-512 (direct_graph.h).
#include "dispatch.h"
#include "dynamic_float32.h"
#ifdef DEN_KERNELS_HAS_AVX512
#include "direct_graph.h"

namespace den_kernels {

void dynamic_graph_avx512(const GraphArguments& p) { run_direct(p); }

}  // namespace den_kernels
#endif
