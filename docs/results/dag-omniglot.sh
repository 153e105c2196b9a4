#!/usr/bin/env bash
# DAG networks on eight alphabets of Omniglot: every run of docs/results/dag-omniglot.md, whose tables
# scripts/dag_tables.py makes.  An interrupted loop goes on where it stopped.
#   DATA=data docs/results/dag-omniglot.sh              # all parts; about three minutes a run on one core
#   SEEDS="0 1" PARTS="main peers" REPORT= ...          # some of them, without the report
set -euo pipefail
out=${OUT:-runs}

train() {  # NAME OPTIONS...
  local folder=$out/$1-s$seed resume=
  if [[ -e $folder.done ]]; then return; fi
  if [[ -e $folder/last.safetensors ]]; then resume=--resume; fi
  den dag train dag-omniglot --data.root "${DATA:-data}" --seed "$seed" --no-progress --out "$folder" $resume "${@:2}"
  touch "$folder.done"
}

again() {  # NAME OPTIONS...: another reduction of the network that was searched in main
  train "$1" --start "$out/dag-s$seed" "${@:2}"
}

main() {  # the reduction by flow, and what it is compared with
  train dag
  train hard --mode hard
  again random --reduction.ranking random
  again gates --reduction.ranking gates
  train narrow --mode hard --network.channels 17  # the FLOPs of a reduced task
}

reductions() {
  again rerank --reduction.rerank
  again ends --reduction.ends 0.5
  again no-guard --reduction.no-guard --reduction.ends 0.5
  again bare --network.gates bare
}

ablations() {
  train no-squeeze --training.squeeze 0
  train no-warm-up --training.shares 0 0.4 0.6
  train joint --training.search joint
  train frozen --training.search frozen
  train no-read-in --network.no-read-in
  train no-read-out --network.no-read-out
  train no-fine-tuning --training.shares 0.1 0.9 0
  train flow5 --network.flow 5
  train flow7 --network.flow 7  # the unrestricted graph
}

balances() {
  train uncertainty --training.balance uncertainty
  train dwa --training.balance dwa
  train pcgrad --training.gradients pcgrad
  train cagrad --training.gradients cagrad
}

peers() {
  train adashare --mode adashare
  train single --mode single
  train cross-stitch --mode cross-stitch
}

for part in ${PARTS:-main reductions ablations balances peers}; do
  for seed in ${SEEDS:-0 1 2 3 4}; do $part; done
done
if [[ -n ${REPORT-yes} ]]; then
  python scripts/dag_tables.py omniglot "$out" --data-root "${DATA:-data}"  # --write: into the page
fi
