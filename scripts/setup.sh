#!/usr/bin/env bash
# Create the virtual environment from the lock and convert the default teacher. Needs no root and asks nothing.
# Does next to nothing when neither lock nor pyproject.toml nor this file changed since the last time.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VENV=${VENV:-.venv}
LOCK=requirements/cpu.lock
CPU_TORCH_INDEX=https://download.pytorch.org/whl/cpu # asked only where pip's own sources have no CPU build
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1

say() { printf 'setup: %s\n' "$*" >&2; }
die() {
    say "$@"
    exit 1
}

# A Python that is new enough: $PYTHON, else the first that fits.
find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    die "Python 3.11 or newer is needed, and ${PYTHON:-python3} is $("${PYTHON:-python3}" --version 2>&1 || true)." \
        "Install one (Debian, Ubuntu: sudo apt install python3.11 python3.11-venv), or run: make setup PYTHON=/path/to/python3.11"
}

create_venv() {
    local python=$1
    say "creating $VENV with $("$python" --version)"
    if "$python" -c 'import ensurepip' 2>/dev/null; then
        "$python" -m venv --clear "$VENV"
    elif "$python" -m pip --version >/dev/null 2>&1; then
        # Debian and Ubuntu ship ensurepip apart (python3-venv). The system's pip can fill an empty environment too.
        "$python" -m venv --clear --without-pip "$VENV"
        "$python" -m pip -qq --python "$VENV/bin/python" install pip
    else
        die "neither venv nor pip works with $python. Debian, Ubuntu: sudo apt install python3-venv"
    fi
}

pip_install() { "$VENV/bin/python" -m pip install -qq --no-deps "$@"; } # errors only

# The CPU build of torch from wherever pip is told to look; only where it has none, from PyTorch's own index.
install_torch() {
    local requirement log
    requirement=$(grep -E '^torch==' "$LOCK")
    log=$(mktemp)
    if ! pip_install "$requirement" 2>"$log"; then
        say "pip's sources have no $requirement: asking PyTorch's CPU index"
        if ! pip_install --extra-index-url "$CPU_TORCH_INDEX" "$requirement"; then
            cat "$log" >&2
            die "could not install $requirement: check the network, or point pip at its wheel (PIP_FIND_LINKS=/folder)"
        fi
    fi
    rm -f "$log"
}

install_all() {
    say "installing $(grep -cvE '^(#|$)' "$LOCK") packages: some minutes the first time"
    install_torch
    pip_install -r "$LOCK" || die "could not install $LOCK: the error is above; a second 'make setup' goes on from here"
    # Left over from an older or hand-made environment, their CUDA builds break transformers (see the lock).
    "$VENV/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec 2>/dev/null
    pip_install --no-build-isolation --editable .
}

fingerprint() { cat "$LOCK" pyproject.toml scripts/setup.sh | sha256sum | cut -d' ' -f1; }

stamp=$VENV/.setup-stamp
# The path is part of it: in a copied tree the editable install would still point at the original.
want="$(fingerprint) $(cd "$(dirname "$VENV")" && pwd)/$(basename "$VENV")"
if [[ ! -x $VENV/bin/python || $(cat "$stamp" 2>/dev/null) != "$want" ]]; then
    if ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
        python=$(find_python) # an assignment of its own: its failure ends the script
        create_venv "$python"
    fi
    install_all
    printf '%s\n' "$want" >"$stamp"
fi

# Cached outside the repository, so that it is converted once a machine.
"$VENV/bin/python" -m onpolicy.teachers.convert >/dev/null
