#!/usr/bin/env bash
# Dense tasks on scenes of cards (scripts/card_scenes.py): every run of docs/results/dag-dense-settings.md.  An
# interrupted loop goes on where it stopped.
#   DATA=data docs/results/dag-dense-settings.sh    # DATA: folder of Omniglot; about a minute a run on one core
#   SEEDS=0 ...                                     # one seed
set -euo pipefail
out=${OUT:-runs/cards}
scenes=$out/scenes
if [[ ! -e $scenes.done ]]; then
  python scripts/card_scenes.py "${DATA:-data}" "$scenes"
  touch "$scenes.done"
fi

train() {  # NAME OPTIONS...: the settings of dag-nyuv2 but for channels, updates and the rates that these few need
  local folder=$out/$1-s$seed resume=
  if [[ -e $folder.done ]]; then return; fi
  if [[ -e $folder/last.safetensors ]]; then resume=--resume; fi
  den dag train --data.tasks "folder:$(realpath "$scenes")" --data.batch-size 8 --data.workers 0 \
    --network.channels 24 --training.steps 600 --training.shares 0.2 0.5 0.3 --training.rate 0.05 \
    --training.fine-rate 0.05 --training.gate-rate 0.1 --training.loss-weights 1 3 20 --seed "$seed" \
    --no-progress --out "$folder" $resume "${@:2}"
  touch "$folder.done"
}

for seed in ${SEEDS:-0 1}; do
  train single --mode single
  train base
  train gate0.01 --training.gate-rate 0.01
  train gate0.3 --training.gate-rate 0.3
  train flow7 --network.flow 7
  train states12 --network.states 12
  train shares --training.shares 0.1 0.3 0.6
  train flow2 --network.flow 2
  train states6 --network.states 6
  train rate0.01 --training.rate 0.01 --training.fine-rate 0.01
  train hard --mode hard
done
python scripts/dag_tables.py dense-settings "$out"  # --write: into the page
