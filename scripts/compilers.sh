#!/usr/bin/env bash
# Compiles the C++ sources with other compilers than this machine's own, as far as they are installed: each given one
# builds every file or names those that it cannot.
#
#   scripts/compilers.sh g++-11 aarch64-linux-gnu-g++ clang++ "python -m ziglang c++ -target aarch64-macos"
#
# Without OpenMP where a compiler has none, as setup.py does. (pip install ziglang: Clang with the headers of other systems.)
set -euo pipefail
[ $# -gt 0 ] || { echo "usage: scripts/compilers.sh COMPILER..." >&2; exit 2; }
cd "$(dirname "${BASH_SOURCE[0]}")/../csrc"

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
headers=$(python -c 'import pybind11, sysconfig; print("-I" + pybind11.get_include(), "-I" + sysconfig.get_path("include"))')
export folder headers
for compiler; do
  echo "$compiler"
  openmp=-fopenmp
  echo '#include <omp.h>' | $compiler -x c++ -fopenmp -E - >"$folder/probe" 2>&1 || openmp=-Wno-unknown-pragmas
  export compiler openmp
  find . -name '*.cpp' ! -name 'bind_*' -printf '%f\n' | sort | xargs -P "$(nproc)" -I{} sh -c \
    '$compiler -c -O1 -fPIC -std=c++17 -Wall -Wextra $openmp $headers {} -o "$folder/{}.o" || { echo "{}: not compiled" >&2; exit 255; }'
done
