#!/usr/bin/env bash
# M3 and C1 on a thin network: every run of docs/results/cifar100.md.  An interrupted loop goes on where it stopped.
#   DATA=data docs/results/cifar100.sh c1              # or m3; one to two hours on one core
#   DATA=data docs/results/cifar100.sh c1 converged    # PASSES over the images for every network; some four hours on one core
#   SEEDS="1 2" ONLY="dense den" REPORT= ...           # some of the seeds and of the runs, without the report
set -euo pipefail
scenario=$1 length=${2:-short} out=${OUT:-runs}

train() {  # NAME OPTIONS...
  local folder=$out/$prefix-$1-s$seed resume=
  if [[ -n ${ONLY-} && " $ONLY " != *" $1 "* ]]; then return; fi
  shift
  if [[ -e $folder/last.safetensors ]]; then resume=--resume; fi
  den train "$scenario" --backbone wrn14_2 --network.trunk-size 16 --data-root "${DATA:-data}" --data.validation 0.1 \
    --precision bfloat16 --seed "$seed" --epoch-steps 800 --stages 1 --methods.updates first --no-progress --out "$folder" $resume \
    --estimator.first.rate 0.1 --estimator.first.schedule cosine --estimator.finish.rate 0.1 \
    --estimator.finish.schedule cosine --estimator.weight-decay 5e-4 --selector.phase.rate 3e-3 \
    --selector.phase.schedule cosine --selector.exploration 0.99 "$@"
}

short() {
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
}

# As many updates of every network: PASSES over the 45,000 images, cosine to 0.  DEN has the head start that was the best
# at the small budget, and rho is steered to the share of the FLOPs that the run's name has.
converged() {
  local updates=$((${PASSES:-40} * 352)) levels="2"
  if [[ $scenario == m3 ]]; then levels="2 3"; fi
  local start=$((updates / 4)) policy=$((updates / 10))
  local elastic="--estimator.tau 0.25 --estimator.first.steps $start --estimator.finish.steps $((updates - start))
    --selector.phase.steps $policy --estimator.initial-share 0.02 --selector.entropy-bonus 0.003 --rho 0.3"
  for seed in ${SEEDS:-0 1}; do
    train dense --mode dense --estimator.first.steps $updates
    train den-0.5 $elastic --selector.budget 0.5
    train den-0.5-from-dense $elastic --selector.budget 0.5 --mode den --start "$out/$prefix-dense-s$seed" \
      --estimator.first.rate 0.05 --estimator.finish.rate 0.05 --estimator.finish.steps $((updates / 2))
    train den-0.55-taught $elastic --selector.budget 0.55 --mode den --start "$out/$prefix-dense-s$seed" \
      --estimator.first.rate 0.05 --estimator.finish.rate 0.05 --estimator.first.steps 2000 \
      --selector.phase.steps 1000 --estimator.finish.steps $updates \
      --estimator.teacher "$out/$prefix-dense-s$seed" --estimator.distill 0.9 --estimator.distill-temperature 4
    train nestednet --mode nestednet --estimator.first.steps $updates --methods.levels $levels
    train den-0.5-from-nestednet $elastic --selector.budget 0.5 --mode den --start "$out/$prefix-nestednet-s$seed" \
      --estimator.first.rate 0.02 --estimator.finish.rate 0.03 --estimator.first.steps 1600 \
      --selector.phase.steps 1000 --estimator.finish.steps $((updates / 2)) \
      --estimator.teacher "$out/$prefix-dense-s$seed" --estimator.distill 0.9 --estimator.distill-temperature 4
    train den-0.35 $elastic --selector.budget 0.35
    train blockdrop --mode blockdrop --selector.phase.steps $policy --estimator.finish.rate 0.03 \
      --estimator.first.steps $((updates / 2)) --estimator.finish.steps $((updates / 2))
  done
}

case $length in
  short) prefix=$scenario ;;
  converged) prefix=converged-$scenario ;;
  *) echo "cifar100.sh: length must be short or converged, got $length" >&2; exit 2 ;;
esac
$length
if [[ -z ${REPORT-1} ]]; then exit; fi
for folder in "$out/$prefix"-den-*; do
  den evaluate "$folder" --data-root "${DATA:-data}" --time --static 60 --dense "$out/$prefix-dense-${folder##*-}"
  if [[ $length == converged ]]; then den evaluate "$folder" --data-root "${DATA:-data}" --selector random; fi
  for share in 0.25 0.5 0.58; do
    den evaluate "$folder" --data-root "${DATA:-data}" --budget-flops $share
  done
done
den report "$out/$prefix"-* --time --data-root "${DATA:-data}" --out "$out/report-$prefix"
