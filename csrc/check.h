// Errors of the form "op: argument must be X, got Y". pybind11 turns std::invalid_argument into a Python ValueError.
#pragma once

#include <sstream>
#include <stdexcept>

namespace den_kernels {

// check(n >= 0, "gather_rows", "n", "at least 0", n)  ->  "gather_rows: n must be at least 0, got -3"
template <class Got>
void check(bool holds, const char* op, const char* argument, const char* must_be, const Got& got) {
  if (holds) return;
  std::ostringstream text;
  text << op << ": " << argument << " must be " << must_be << ", got " << got;
  throw std::invalid_argument(text.str());
}

}  // namespace den_kernels
