#!/bin/bash
# What each precision costs on real weights: run.sh WORK_FOLDER. Writes WORK_FOLDER/results/*.json.
#   RECAPTION  the exporter                           [target/release/recaption]
#   OPERATORS  librecaption_operators.so, for the bundles of target cpu [beside the exporter; without it they are left out]
#   PYTHON     a Python with requirements.txt         [python3]
#   PEERS      a folder with bin/python and bin/optimum-cli of requirements-peers.txt; without it the peers are left out
#   THREADS    [2]    PROMPTS  for greedy decoding [50]    WINDOWS  of 512 tokens per text [6]
set -euo pipefail
work=${1:?usage: run.sh WORK_FOLDER}
here=$(cd "$(dirname "$0")" && pwd)
recaption=${RECAPTION:-$here/../../target/release/recaption}
python=${PYTHON:-python3}
operators=${OPERATORS:-$(dirname "$recaption")/librecaption_operators.so}
[ -e "$operators" ] || operators=
mkdir -p "$work/checkpoints" "$work/bundles" "$work/results"
PYTHON=$python "$here/fetch.sh" "$work/data"

checkpoint() { # NAME [OPTION...]
    local name=$1
    shift
    [ -e "$work/checkpoints/$name/model.safetensors" ] ||
        "$python" "$here/make_smollm2.py" "$work/data/SmolLM2-135M-Instruct.Q4_1.gguf" "$work/checkpoints/$name" "$@"
}

bundle() { # CHECKPOINT NAME [OPTION...]
    local source=$1 name=$2
    shift 2
    "$recaption" export "$work/checkpoints/$source" --out "$work/bundles/$name" --overwrite "$@"
}

evaluate() { # PYTHON RESULT MODEL...
    local interpreter=$1 result=$2
    shift 2
    "$interpreter" "$here/evaluate.py" "$@" --text "gpl3=$work/data/gpl3.txt" --text "alice=$work/data/alice29.txt" \
        ${operators:+--custom-operators "$operators"} --threads "${THREADS:-2}" --prompts "${PROMPTS:-50}" --windows "${WINDOWS:-6}" > "$work/results/$result.json"
}

checkpoint smollm2
checkpoint smollm2-rolled --rolled
for source in smollm2 smollm2-rolled; do
    bundle $source $source-fp32
    bundle $source $source-int8 --precision int8
    bundle $source $source-int8-plain --precision int8 --calibration none
    bundle $source $source-int8-block --precision int8-block
    bundle $source $source-int4 --precision int4
    bundle $source $source-int4-nearest --precision int4 --rounding nearest --calibration none
    own=
    if [ -n "$operators" ]; then
        own="$work/bundles/$source-int8-cpu"
        bundle $source $source-int8-cpu --precision int8 --target cpu
    fi
    evaluate "$python" $source "$work/bundles/$source-"{fp32,int8,int8-plain,int8-block,int4,int4-nearest} ${own:+"$own"}
done

[ -n "${PEERS:-}" ] || exit 0
[ -e "$work/peers/openvino-int8/openvino_language_model.xml" ] ||
    "$PEERS/bin/optimum-cli" export openvino -m "$work/checkpoints/smollm2" --task image-text-to-text \
        --weight-format int8 "$work/peers/openvino-int8"
[ -e "$work/peers/q8_0.gguf" ] ||
    "$PEERS/bin/python" "$here/make_gguf.py" "$work/checkpoints/smollm2" "$work/peers/q8_0.gguf"
# One at a time: each runtime's threads spin while they wait, and would take turns with the others'.
evaluate "$PEERS/bin/python" openvino "$work/bundles/smollm2-fp32" "openvino:$work/peers/openvino-int8"
evaluate "$PEERS/bin/python" llamacpp "$work/bundles/smollm2-fp32" "gguf:$work/peers/q8_0.gguf"
