#!/usr/bin/env bash
# M3 and C1 on a thin network: every run of docs/results/cifar100.md.  An interrupted loop goes on where it stopped.
#   DATA=data docs/results/cifar100.sh c1    # or m3; one to two hours on one core
#   SEEDS="1 2" REPORT= ...                  # some of the seeds, without the report
set -euo pipefail
scenario=$1 out=${OUT:-runs}

train() {  # NAME OPTIONS...
  local folder=$out/$scenario-$1-s$seed resume=
  shift
  if [[ -e $folder/last.safetensors ]]; then resume=--resume; fi
  den train "$scenario" --backbone wrn14_2 --network.trunk-size 16 --data-root "${DATA:-data}" --data.validation 0.1 \
    --precision bfloat16 --seed "$seed" --epoch-steps 800 --stages 1 --methods.updates first --no-progress --out "$folder" $resume \
    --estimator.first.rate 0.1 --estimator.first.schedule cosine --estimator.finish.rate 0.1 \
    --estimator.finish.schedule cosine --estimator.weight-decay 5e-4 --selector.phase.rate 3e-3 \
    --selector.phase.schedule cosine --selector.exploration 0.99 "$@"
}

elastic="--estimator.tau 0.25"
# As many FLOPs to train each estimator as so many updates of the dense one, at the structures that it trains on.  A
# larger rho has the updates of the smaller one, as in the paper: it costs less.
if [[ $scenario == c1 ]]; then
  dense=1600 random=2760 low=0.1 high=0.3 blockdrop="800 --estimator.finish.steps 900"
  nested="914 --methods.levels 2"
  schedule="--estimator.first.steps 400 --selector.phase.steps 300 --estimator.finish.steps 2600
    --estimator.initial-share 0.04 --selector.entropy-bonus 0.01"
else
  dense=3200 random=5520 low=0.1 high=0.2 blockdrop="1600 --estimator.finish.steps 1800"
  nested="4267 --methods.levels 2 3"
  schedule="--estimator.first.steps 1500 --selector.phase.steps 800 --estimator.finish.steps 4700
    --estimator.initial-share 0.02 --selector.entropy-bonus 0.003"
fi

for seed in ${SEEDS:-0 1 2}; do
  train nestednet --mode nestednet --estimator.first.steps $nested
  train "den-$low" $elastic --rho $low $schedule
  train dense --mode dense --estimator.first.steps $dense
  train "den-$high" $elastic --rho $high $schedule
done
for seed in ${SEEDS:-0 1 2}; do
  train random --mode random --estimator.tau 0.25 --estimator.first.steps $random --methods.random-flops 0.5
  train blockdrop --mode blockdrop --selector.phase.steps 300 --estimator.finish.rate 0.03 \
    --estimator.first.steps $blockdrop
done
if [[ -z ${REPORT-1} ]]; then exit; fi
for folder in "$out/$scenario"-den-*; do
  for share in 0.25 0.5 0.58; do
    den evaluate "$folder" --data-root "${DATA:-data}" --budget-flops $share
  done
done
den report "$out/$scenario"-* --time --data-root "${DATA:-data}" --out "$out/report-$scenario"
