#!/usr/bin/env bash
# M3 and C1 on a thin network: every run of docs/results/cifar100.md.  An interrupted loop goes on where it stopped.
#   DATA=data docs/results/cifar100.sh c1    # or m3; over an hour on one core
set -euo pipefail
scenario=$1 out=${OUT:-runs}

train() {  # NAME OPTIONS...
  local folder=$out/$scenario-$1-s$seed resume=
  shift
  if [[ -e $folder/last.safetensors ]]; then resume=--resume; fi
  den train "$scenario" --backbone wrn14_2 --network.trunk-size 16 --data-root "${DATA:-data}" --data.validation 0.1 \
    --precision bfloat16 --seed "$seed" --epoch-steps 400 --stages 1 --no-progress --out "$folder" $resume \
    --estimator.first.rate 0.1 --estimator.first.schedule cosine --estimator.finish.rate 0.1 \
    --estimator.finish.schedule cosine --estimator.weight-decay 5e-4 --selector.phase.rate 3e-3 \
    --selector.phase.schedule cosine --selector.phase.steps 300 --selector.exploration 0.99 "$@"
}

elastic="--estimator.tau 0.25 --estimator.initial-share 0.04 --selector.entropy-bonus 0.05"
# As many FLOPs to train each estimator as 1,600 updates of the dense one, at the structures that it trains on.
if [[ $scenario == c1 ]]; then
  nested="--methods.levels 2 --estimator.first.steps 914"
  low="0.1 --estimator.first.steps 400 --estimator.finish.steps 2600"
  high="0.3 --estimator.first.steps 400 --estimator.finish.steps 3900"
else
  nested="--methods.levels 1 3 --estimator.first.steps 2560"
  low="0.03 --estimator.first.steps 600 --estimator.finish.steps 2370"
  high="0.1 --estimator.first.steps 600 --estimator.finish.steps 3400"
fi

for seed in 0 1 2; do
  train dense --mode dense --estimator.first.steps 1600
  train "den-${low%% *}" $elastic --rho $low
  train random --mode random --estimator.tau 0.25 --estimator.first.steps 2760 --methods.random-flops 0.5
  train nestednet --mode nestednet $nested
  train blockdrop --mode blockdrop --estimator.first.steps 800 --estimator.finish.steps 900 \
    --estimator.finish.rate 0.03
done
for seed in 0 1 2; do
  train "den-${high%% *}" $elastic --rho $high
done
for folder in "$out/$scenario"-den-*; do
  for share in 0.25 0.5 0.58; do
    den evaluate "$folder" --data-root "${DATA:-data}" --budget-flops $share
  done
done
den report "$out/$scenario"-* --time --data-root "${DATA:-data}" --out "$out/report-$scenario"
