#!/usr/bin/env bash
# Builds the extension with sanitizers, without CUDA, and runs the tests of the ops with it. Stops at the first error,
# which names the line.
#
#   scripts/sanitize.sh [address | thread] [pytest arguments]        in the environment that the tests run in
#
# address: memory and undefined behaviour; all tests of the ops. thread: races, with the OpenMP runtime of
# tests/kernels/threads/openmp.cpp, since GNU's own looks like races; the tests that share work among threads.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

kind=address
case "${1:-}" in address | thread) kind=$1; shift ;; esac
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cp -r csrc den den_kernels tests setup.py pyproject.toml README.md "$folder"
rm -f "$folder"/den_kernels/_C*.so
cd "$folder"

ops=tests/kernels/test_dynamic
if [ "$kind" = address ]; then
  flags="-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer"
  libraries="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)"
  # Leaks: the interpreter keeps what it allocates. alloc_dealloc: torch's operators new and delete are its own.
  export ASAN_OPTIONS=detect_leaks=0:alloc_dealloc_mismatch=0 UBSAN_OPTIONS=print_stacktrace=1
  tests=(tests/kernels/test_{plan,rows,layers,conv_direct,conv_direct_gradients,post_activation,bottleneck_weights}.py
    "$ops"_{conv,conv_grad,norm,norm_calls,residual,residual_calls,bottleneck,inverted_residual,graph,trunk}.py
    tests/kernels/test_{residual_unpacked,native_checks,stale_weights,standing,threads,trunk_shortcuts,one_image}.py)
else
  flags="-fsanitize=thread"
  export LDFLAGS="$folder/openmp.o -ldl"
  libraries="$(gcc -print-file-name=libtsan.so)"
  g++ -c -fPIC -O1 -g -std=c++17 -fopenmp -fsanitize=thread tests/kernels/threads/openmp.cpp -o openmp.o
  export TSAN_OPTIONS="halt_on_error=1 history_size=7 suppressions=$folder/tests/kernels/threads/suppressions.txt" OMP_NUM_THREADS=3
  tests=(tests/kernels/test_{plan,rows,conv_direct,conv_direct_gradients,metamorphic,trunk_shortcuts}.py
    "$ops"_{trunk,inverted_residual,bottleneck,norm,graph}.py)
fi
# -O1 compiles the kernels in a third of the time of -O3; with a sanitizer GCC takes the intrinsics' undefined vectors for mistakes.
export DEN_KERNELS_FLAGS="$flags -g1 -O1 -Wno-uninitialized -Wno-maybe-uninitialized" DEN_KERNELS_CUDA=0
python setup.py -q build_ext --inplace
plain=$(grep -L "__${kind:0:1}san_init" build/temp*/csrc/*.o) || [ $? -eq 1 ] # 2 without any
if [ -n "$plain" ]; then
  echo "sanitize.sh: built without the sanitizer:" $plain >&2
  exit 1
fi

if [ $# -gt 0 ]; then tests=("$@"); fi
fixed=() # addresses that are not random: the thread sanitizer of older GCC needs them on newer kernels
if setarch -R true 2>/dev/null; then fixed=(setarch -R); fi
"${fixed[@]}" env LD_PRELOAD="$libraries" PYTHONPATH="$folder" \
  python -m pytest -q -x -n0 --capture=sys -p no:cacheprovider "${tests[@]}" # what a sanitizer says comes through
