#!/usr/bin/env bash
# Builds the extension with the address and undefined-behaviour sanitizers, without CUDA, and runs the tests of the ops
# with it. Stops at the first error, which names the line. Takes some 15 minutes on two cores.
#
#   scripts/sanitize.sh [pytest arguments]        in the environment that the tests run in
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cp -r csrc den den_kernels tests setup.py pyproject.toml README.md "$folder"
rm -f "$folder"/den_kernels/_C*.so
cd "$folder"

export CFLAGS="-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer"
export LDFLAGS="-fsanitize=address,undefined"
DEN_KERNELS_CUDA=0 python setup.py -q build_ext --inplace
unset CFLAGS LDFLAGS

tests=("$@")
if [ ${#tests[@]} -eq 0 ]; then
  tests=(tests/kernels/test_{plan,rows,layers,conv_direct,conv_direct_gradients,post_activation,bottleneck_weights}.py
    tests/kernels/test_dynamic_{conv,conv_grad,norm,norm_calls,residual,residual_calls,bottleneck}.py
    tests/kernels/test_dynamic_{inverted_residual,graph,trunk}.py
    tests/kernels/test_{residual_unpacked,native_checks,stale_weights,threads}.py)
fi
# Leaks: the interpreter keeps what it allocates. alloc_dealloc: torch's operators new and delete are its own.
export ASAN_OPTIONS=detect_leaks=0:alloc_dealloc_mismatch=0 UBSAN_OPTIONS=print_stacktrace=1
LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)" \
  PYTHONPATH="$folder" python -m pytest -q -x -p no:cacheprovider "${tests[@]}"
