#!/usr/bin/env bash
# Runs the CPU tests of the ops with other versions of torch: scripts/torch_versions.sh VERSION...
# Each version is installed into an environment of its own (several GB with CUDA's libraries), which is removed
# afterwards. Prints one line per version; the status is 1 where one of them failed, and its log is kept.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ $# -gt 0 ] || { echo "usage: scripts/torch_versions.sh VERSION..." >&2; exit 2; }

files=(tests/kernels/test_{dropin,layers,plan,rows,transforms}.py
  tests/kernels/test_{conv_direct,bottleneck,dynamic_,gpu_launchers}*.py)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

try() ( # VERSION: installs, tests, says what ran
  set -e
  python3 -m venv "$folder/venv"
  # shellcheck disable=SC1091
  source "$folder/venv/bin/activate"
  echo "torch==$1" >"$folder/constraint" # this version, whatever else a machine's own settings ask for
  PIP_CONSTRAINT="$folder/constraint" DEN_KERNELS_CUDA=0 python -m pip install ".[test]"
  export PYTHONSAFEPATH=1 # the installed package, not the source tree
  python -m pytest -q -n 2 -p no:cacheprovider --basetemp "$folder/pytest" "${files[@]}"
  python -c 'import torch; from importlib.metadata import version; print("ran", torch.__version__, version("triton"))'
)

failed=0
for version in "$@"; do
  log=$(mktemp --suffix ".torch-$version.log")
  try "$version" >"$log" 2>&1 # not in the condition of an if, where set -e does nothing
  if [ $? -eq 0 ]; then
    read -r _ torch triton < <(tail -n 1 "$log")
    echo "torch $torch, triton $triton: $(grep -E '^[0-9]+ passed' "$log" | tail -n 1)"
    rm "$log"
  else
    failed=1
    said=$(grep -E '[0-9]+ (passed|failed|error)' "$log" | tail -n 1)
    echo "torch $version: FAILED, ${said:-$(tail -n 1 "$log")} ($log)"
  fi
  rm -rf "${folder:?}"/*
done
exit $failed
