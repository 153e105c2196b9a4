#!/usr/bin/env bash
# M1 and M2 end to end on the images that there are, at a small budget: the runs of docs/results/m1-m2.md.
#   DATA=data docs/results/m1-m2.sh m1    # or m2; some minutes on one core
set -euo pipefail
out=${OUT:-runs}

train() {  # NAME SCENARIO OPTIONS...
  local folder=$out/$1 resume=
  if [[ -e $folder/last.safetensors ]]; then resume=--resume; fi
  den train "$2" --data-root "${DATA:-data}" --data.validation 0.1 --precision bfloat16 --seed 0 --epoch-steps 200 \
    --stages 1 --methods.updates first --no-progress --out "$folder" $resume --estimator.first.rate 0.1 --estimator.first.schedule cosine \
    --estimator.finish.rate 0.1 --estimator.finish.schedule cosine --estimator.weight-decay 5e-4 \
    --estimator.tau 0.25 --estimator.initial-share 0.04 --selector.phase.rate 3e-3 \
    --selector.phase.schedule cosine --selector.phase.steps 200 --selector.exploration 0.99 \
    --selector.entropy-bonus 0.05 "${@:3}"
}

case $1 in
  m1)
    network="--backbone wrn14_2 --network.trunk-size 16 --tasks cifar100 tin50 stl10 --data.batch-size 128"
    train m1-dense-s0 m1 $network --mode dense --estimator.first.steps 400
    train m1-den-s0 m1 $network --rho 0.03 --estimator.first.steps 250 --estimator.finish.steps 450
    ;;
  m2)
    train m2-dense-s0 m2 --tasks tin50-0..9 --mode dense --estimator.first.steps 108
    train m2-den-s0 m2 --tasks tin50-0..9 --rho 0.1 --estimator.first.steps 80 --selector.phase.steps 40 \
      --estimator.finish.steps 60
    ;;
esac
den report "$out/$1"-* --data-root "${DATA:-data}" --out "$out/report-$1"
