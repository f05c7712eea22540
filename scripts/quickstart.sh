#!/usr/bin/env bash
# The main job, start to end, on any machine with Python 3.11: profile this CPU, plan the shipped
# model on a rehearsed cluster of three unequal devices, run the plan and the baselines, compare.
# Everything it writes lies in quickstart-out/. Needs the package index once, then no network.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export HF_HUB_OFFLINE=1
out="${1:-quickstart-out}"
run() { echo; echo "\$ $*"; scripts/env.sh "$@"; }

scripts/env.sh
rm -rf "$out/plans" "$out/profiles"
mkdir -p "$out/profiles"

# How long a layer takes at each precision, with one thread: what a rehearsed device is made of.
run llmpq-profile layers --device cpu --threads 1 --budget-s 90 --precisions 16,8,4,3 \
    --prefill-micro-batches 1,2,4 --decode-micro-batches 2,4,8 \
    --prompt-tokens 16,48,112 --past-tokens 16,160 -o "$out/profiles/cpu.json"

# What each precision costs in quality, layer by layer.
run llmpq-profile sensitivity -o "$out/sensitivity.json"

# Which device holds which layers, at which precision, in which micro-batches.
run llmpq-plan --cluster configs/clusters/rehearsal-3.yaml --workload configs/workloads/quickstart.yaml \
    --profiles "$out/profiles" --sensitivity "$out/sensitivity.json" --max-quality-loss 0.4 \
    --baseline-plans "$out/plans" -o "$out/plans/llmpq.json"

# The plan, then the baselines, on the same prompts. Every request generates all its tokens, so
# that all methods do the same work.
for plan in "$out"/plans/*.json; do
    name="$(basename "$plan" .json)"
    run llmpq-run --plan "$plan" --prompts llmpq/assets/prompts.jsonl --ignore-eos \
        --output "$out/$name.jsonl" --report "$out/$name.report.json"
done

# The same plan, sampling and stopping at the end of each story.
run llmpq-run --plan "$out/plans/llmpq.json" --prompts llmpq/assets/prompts.jsonl \
    --temperature 0.6 --top-p 0.9 --seed 2 --output "$out/stories.jsonl"
run llmpq-eval "$out"/plans/*.json --window 256 --json "$out/perplexity.json"

scripts/env.sh python scripts/quickstart_table.py "$out"
