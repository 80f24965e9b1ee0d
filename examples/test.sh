#!/usr/bin/env bash
# The tests, in an environment of their own: examples/test.sh [what pytest takes]
set -euo pipefail
cd "$(dirname "$0")/.."
examples/setup.sh test
.venv/bin/pytest "$@"
