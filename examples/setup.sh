#!/usr/bin/env bash
# Makes .venv with sa2jax and some of its extras: examples/setup.sh train,test
set -euo pipefail
cd "$(dirname "$0")/.."
for python in "${PYTHON:-python3}" python3.12 python3.11; do
    if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        [ -x .venv/bin/python ] || "$python" -m venv .venv
        exec .venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".[$1]"
    fi
done
echo "sa2jax needs Python 3.11 or later; set PYTHON to one" >&2
exit 1
