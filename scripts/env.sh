#!/usr/bin/env bash
# The environment of this checkout. The Makefile, quickstart.sh and the commit hooks all come here.
#
#   scripts/env.sh              make (or refresh) the environment, then say where it is
#   scripts/env.sh CMD ARGS..   the same, then run CMD inside it
#
# It is made once, and again when pyproject.toml, constraints.txt or a setting below changes.
#
#   PYTHON        the interpreter to start from          default: python3
#   LLMPQ_VENV    where the environment lies             default: .venv in the checkout
#                 set but empty: use the active Python as it is and install nothing
#   LLMPQ_EXTRAS  the extras to install                  default: run,dev
#   LLMPQ_TORCH   what pip is told about torch           default: the pin in constraints.txt
#                 On a machine with a GPU, name the build that fits its driver and card:
#                   LLMPQ_TORCH="torch"                                the newest, with CUDA
#                   LLMPQ_TORCH="torch==2.13.0 --index-url INDEX"      a certain CUDA (or CPU) build;
#                 pytorch.org lists the INDEX of each.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-python3}"
venv="${LLMPQ_VENV-$root/.venv}"
extras="${LLMPQ_EXTRAS:-run,dev}"
torch="${LLMPQ_TORCH:-$(grep '^torch==' "$root/constraints.txt")}"

say() { echo "env: $*" >&2; }

check_python() {
    command -v "$python" >/dev/null || { say "no '$python'; set PYTHON=/path/to/python3.11"; exit 2; }
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        say "$("$python" --version) is too old, 3.11 or newer is needed; set PYTHON=/path/to/python3.11"
        exit 2
    }
}

# What the environment was made from; equal to the stamp as long as nothing has changed.
fingerprint() {
    echo "$root" "$torch" "$extras" "$("$python" -c 'import sys; print(sys.version_info[:2], sys.prefix)')"
    cat "$root/pyproject.toml" "$root/setup.py" "$root/constraints.txt"
}

make_env() {
    local stamp="$venv/.llmpq-stamp"
    check_python
    [[ -f "$stamp" ]] && fingerprint | cmp -s - "$stamp" && return
    [[ -d "$venv" && ! -f "$stamp" ]] && say "$venv is half made, starting again"
    say "making $venv (once; a few minutes, most of them torch)"
    rm -f "$stamp"
    "$python" -m venv --clear "$venv"
    # Word splitting is wanted: LLMPQ_TORCH may hold options of pip.
    # shellcheck disable=SC2086
    "$venv/bin/pip" install --quiet --disable-pip-version-check $torch >&2
    # Everything else is held to constraints.txt, torch to the build just installed.
    { grep -v '^torch==' "$root/constraints.txt"; "$venv/bin/pip" freeze | grep '^torch=='; } \
        >"$venv/constraints.txt"
    "$venv/bin/pip" install --quiet --disable-pip-version-check \
        -c "$venv/constraints.txt" -e "$root[$extras]" >&2
    fingerprint >"$stamp"
    say "done"
}

if [[ -n "$venv" ]]; then
    make_env
    export VIRTUAL_ENV="$venv" PATH="$venv/bin:$PATH"
    unset PYTHONHOME
else
    export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
fi

if [[ $# -gt 0 ]]; then
    exec "$@"
fi
say "${venv:-the active Python} is ready${venv:+; 'source $venv/bin/activate' to use it}"
