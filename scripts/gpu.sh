#!/usr/bin/env bash
# What only a machine with an NVIDIA GPU can tell: GPU tests, profiles, kernels, end to end.
#
#   OUT=./gpu-out scripts/gpu.sh [STEP..]      all steps, or those named: tests profile kernels fidelity quality endtoend
#
# Runs on the active Python (PYTHON, default python3), which must have torch with CUDA; nothing is
# installed. A step that fails stops no other; each one's exit code is printed at the end and kept in
# $OUT/steps.tsv, its output in $OUT/STEP.log. Exit 0 if all succeeded.
#
#   MODELS      names of configs/models to profile       default: the six below
#   TYPE        the card's name in cluster files         default: h200-141g
#   STEP_LIMIT  seconds that one step may take           default: 600
set -uo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root" || exit 2
python="${PYTHON:-python3}"
out="${OUT:-./gpu-out}"
models="${MODELS:-opt-13b opt-30b opt-66b llama-3.1-8b llama-3.3-70b qwen2.5-32b}"
limit="${STEP_LIMIT:-600}"
type="${TYPE:-h200-141g}"
wanted=" $* "
failed=0
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
export HF_HUB_OFFLINE=1 # everything here is made of random weights

mkdir -p "$out/profiles"
: >"$out/steps.tsv"

# step GROUP NAME CMD.. : runs CMD if its group is wanted, and notes its exit code and seconds.
step() {
    local group="$1" name="$2" code start=$SECONDS
    shift 2
    [[ $# -gt 0 ]] || return 0
    [[ "$wanted" == "  " || "$wanted" == *" $group "* ]] || return 0
    echo "== $name: $*"
    timeout "$limit" "$@" 2>&1 | tee "$out/$name.log"
    code="${PIPESTATUS[0]}"
    [[ "$code" -eq 0 ]] || failed=1
    printf '%s\t%s\t%s\n' "$name" "$code" "$((SECONDS - start))" >>"$out/steps.tsv"
}

step tests tests "$python" -m pytest -q -m gpu --continue-on-collection-errors tests

step profile devices "$python" -m llmpq.cli.profile devices --cluster-out "$out/cluster.yaml" --force
for model in $models; do
    step profile "profile-$model" "$python" -m llmpq.cli.profile layers \
        --model "configs/models/$model.json" --device cuda --type "$type" --budget-s 60 \
        -o "$out/profiles/$model.json"
done

step kernels kernels "$python" scripts/bench/kernels.py --json "$out/kernels.json"
step fidelity fidelity "$python" scripts/bench/fidelity.py --only shapes memory --device cuda \
    --json "$out/fidelity.json"
step quality sensitivity "$python" -m llmpq.cli.profile sensitivity --device cuda -o "$out/sensitivity.json"
step quality perplexity "$python" -m llmpq.cli.eval --precisions 16,8,4,3 --quantizer gptq --window 256 \
    --moments "$out/sensitivity.moments.safetensors" --device cuda --json "$out/perplexity.json"
step endtoend endtoend "$python" scripts/bench/endtoend.py --device cuda --json "$out/endtoend.json"

echo "== step, exit code, seconds"
cat "$out/steps.tsv"
exit "$failed"
