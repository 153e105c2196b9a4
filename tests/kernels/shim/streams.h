// What the drivers read and write: sizes as arguments, arrays from standard input to standard output. Every array is an
// allocation of its exact size, so that the sanitizer sees the first byte beyond it.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "cuda_shim.h"

inline std::vector<int64_t> sizes_of(int argc, char** argv, int first) {
  std::vector<int64_t> sizes;
  for (int i = first; i < argc; ++i) sizes.push_back(std::atoll(argv[i]));
  return sizes;
}

template <class T>
std::vector<T> read_array(int64_t count) {
  std::vector<T> values(count);
  if (count && std::fread(values.data(), sizeof(T), count, stdin) != static_cast<std::size_t>(count)) {
    std::fprintf(stderr, "standard input ended early\n");
    std::exit(2);
  }
  return values;
}

template <class T>
void write_array(const std::vector<T>& values) {
  if (!values.empty()) std::fwrite(values.data(), sizeof(T), values.size(), stdout);
}

// "forward", "backward"; "lazy" or "eager" copies: "backward-lazy".
inline shim::Schedule schedule_of(const std::string& name) {
  return {name.find("backward") != std::string::npos, name.find("lazy") != std::string::npos};
}
