// The bindings of blocks and networks as one file, as extension.cpp holds the others: pybind11's own code takes a file
// longer to compile than what is bound in it.
#include "bind_blocks.cpp"
#include "bind_inverted_residual.cpp"
#include "bind_task_network.cpp"
#include "bind_trunk.cpp"
