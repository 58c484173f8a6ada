#!/usr/bin/env bash
# Resolve the newest compatible versions and write requirements/cpu.lock. Takes minutes; installs nothing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-python3}
CPU_TORCH_INDEX=https://download.pytorch.org/whl/cpu # asked only where pip's own sources have no CPU build
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

"$PYTHON" -m venv "$scratch/venv" # a clean one: what happens to be installed must not steer the resolver
resolve() {
    "$scratch/venv/bin/python" -m pip install -qq --dry-run --ignore-installed \
        --report "$scratch/report.json" -r "$scratch/wants.txt" "$@"
}
"$PYTHON" scripts/lock.py wants pyproject.toml >"$scratch/wants.txt"
resolve || resolve --extra-index-url "$CPU_TORCH_INDEX"

teacher=$("$PYTHON" -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["teacher"])')
# shellcheck disable=SC2086  # one argument a pin
"$PYTHON" scripts/lock.py render "$scratch/report.json" $teacher >"$scratch/cpu.lock"
mv "$scratch/cpu.lock" requirements/cpu.lock
echo "requirements/cpu.lock: $(grep -cv '^#' requirements/cpu.lock) packages. Next: make setup test"
