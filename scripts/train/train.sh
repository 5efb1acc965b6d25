#!/bin/sh
# The whole chain: font, tokenizer, tower, language, projector, finetune, export, shard, scores.
# Usage: train.sh SCRATCH_DIR DEMO_DIR     (PYTHON picks the interpreter; see requirements.txt)
set -eu
scratch=${1:?usage: train.sh SCRATCH_DIR DEMO_DIR}
demo=${2:?usage: train.sh SCRATCH_DIR DEMO_DIR}
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python3}
export OMP_NUM_THREADS=1
mkdir -p "$scratch"
font=$("$here/fetch_font.sh" "$scratch/font")
caption="$python $here/train_captioner.py --tokenizer $scratch/tokenizer --font $font"

"$python" "$here/make_tokenizer.py" --out "$scratch/tokenizer"
"$python" "$here/train_tower.py" --font "$font" --out "$scratch/tower.safetensors" --steps 2454
$caption --stage language --out "$scratch/language" --steps 250 --lr 2e-3 --warmup 50
$caption --stage projector --init "$scratch/language" --tower "$scratch/tower.safetensors" \
    --out "$scratch/projector" --steps 150 --batch 16 --warmup 20
$caption --stage finetune --init "$scratch/projector" --out "$scratch/finetune" \
    --steps 1194 --batch 16 --lr 1.2e-3
$caption --stage finetune --init "$scratch/finetune" --out "$scratch/finetune2" \
    --steps 1402 --batch 16 --lr 8e-4 --seed 2
"$python" "$here/export_demo.py" --checkpoint "$scratch/finetune2" --tokenizer "$scratch/tokenizer" --out "$demo"
"$python" "$here/make_shard.py" --font "$font" --out "$demo/shard"
"$python" "$here/evaluate.py" --checkpoint "$demo" --font "$font" --count 1000
"$python" "$here/evaluate.py" --checkpoint "$demo" --shard "$demo/shard/00000.tar"
