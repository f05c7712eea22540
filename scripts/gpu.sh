#!/usr/bin/env bash
# What only a machine with an NVIDIA GPU can tell, in two parts of at most five minutes each.
#
#   OUT=./gpu-out scripts/gpu.sh 1     kernels, a whole model served, the GPU tests
#   OUT=./gpu-out scripts/gpu.sh 2     experts at once, a profile, its predictions, a mixed cluster rehearsed
#   scripts/gpu.sh trial               all steps at the same time: finds faults, measures nothing
#   scripts/gpu.sh STEP                one step with all the time: kernels serving tests experts predictions cluster
#   scripts/gpu_report.py OUT          afterwards, anywhere: docs/gpu/CARD-DATE.json and its table
#
# Runs on the active Python (PYTHON, default python3), which must have torch with CUDA and what
# llmpq[run] needs; nothing is installed or downloaded. What is there and what lacks is said first.
# A step that fails stops no other. Exit 0 if all succeeded, 1 if one failed, 2 if none could start.
#
#   TOTAL_S   seconds that all steps may take together     default: 290
#   DEVICE    cpu: the same steps on a CPU with a small model. That tries out these scripts and
#             measures no card.                            default: cuda
#   HUMMING_CACHE_DIR   where compiled kernels are kept; they are found again only if the files of
#             the humming package are at the same paths with the same times of change
#   SCRATCH   folder for a model of 8 GB and plans         default: in /dev/shm if it has room
#   COMMIT    for the record where there is no git         default: git's
set -uo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
[[ $# -gt 0 ]] || { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; exit 2; }
out="${OUT:-./gpu-out}"
mkdir -p "$out"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
export HF_HUB_OFFLINE=1 # everything here is made of random weights
"${PYTHON:-python3}" "$root/scripts/gpu_parts.py" --out "$out" "$@" 2>&1 | tee -a "$out/log.txt"
exit "${PIPESTATUS[0]}"
