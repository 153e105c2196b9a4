#!/usr/bin/env bash
# Draws 2,000 cases for every test of an op that draws any (the suite draws 4 to 120): against float64, and calls that
# must agree with each other. Takes an hour or two on two cores; stops at the first failure, which it makes small.
#
#   scripts/fuzz.sh [SEED] [pytest arguments]        in the environment that the tests run in
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

seed=${1:-0}
shift || true
tests=("$@")
if [ ${#tests[@]} -eq 0 ]; then
  tests=(tests/kernels/test_{plan,rows,conv_direct,dynamic_conv,dynamic_conv_grad,dynamic_norm,dynamic_residual}.py
    tests/kernels/test_{residual_unpacked,dynamic_bottleneck,bottleneck_weights,dynamic_graph,dynamic_trunk}.py
    tests/kernels/test_{folding,metamorphic}.py)
fi
python -m pytest -q -x -p no:cacheprovider -m "hypothesis and not release" --durations 0 \
  --hypothesis-profile long --hypothesis-seed "$seed" "${tests[@]}"
