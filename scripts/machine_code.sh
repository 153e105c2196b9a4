#!/usr/bin/env bash
# Looks at the machine code of WRN-32-4's launches (bfloat16 on every kind of chip, TF32 on Hopper) as other releases of
# Triton compile them; each given version is laid over the installed packages for its run.
#
#   scripts/machine_code.sh 3.7.1 3.8.0
#   FILTER=wrn32_4 scripts/machine_code.sh 3.8.0                 another choice of tests (pytest -k): masks and IEEE too
#   FOLDER=~/tritons scripts/machine_code.sh 3.8.0               keeps versions and caches there, for the next time
set -euo pipefail
[ $# -gt 0 ] || { echo "usage: scripts/machine_code.sh VERSION..." >&2; exit 2; }
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ -z "${FOLDER:-}" ]; then
  FOLDER=$(mktemp -d)
  trap 'rm -rf "$FOLDER"' EXIT
fi
mkdir -p "$FOLDER" && FOLDER=$(cd "$FOLDER" && pwd)
workers=$(nproc)

for version; do
  place=$FOLDER/triton-$version
  # Whatever else a constraint holds Triton to.
  [ -d "$place/triton" ] || env -u PIP_CONSTRAINT python -m pip install --quiet --no-deps --target "$place" "triton==$version"
  echo "Triton $version"
  TRITON_CACHE_DIR=$FOLDER/cache-$version PYTHONPATH=$place${PYTHONPATH:+:$PYTHONPATH} \
    pytest tests/kernels/test_{machine_code,wgmma_hazards}.py -q -p no:cacheprovider -n "$workers" \
    -k "${FILTER:-hazard or (wrn32_4 and levels and (bf16 or (tf32 and sm_90)))}"
done
