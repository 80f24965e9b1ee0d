#!/usr/bin/env bash
# From a fresh clone to a spoken answer: examples/talk.sh [RECORDING] writes reply.wav and reply.png.
set -euo pipefail
question=$(realpath "${1:-$(dirname "$0")/question.flac}")
cd "$(dirname "$0")/.."
examples/setup.sh train
.venv/bin/sa2jax chat "$question" -o reply.wav --plot reply.png
