#!/usr/bin/env bash
# Everything that needs a GPU, from a bare checkout: correctness, times, tiles, training steps. See benchmarks/README.md.
#   bash benchmarks/gpu.sh                      on a GPU; PYTHON names another python3
#   bash benchmarks/gpu.sh --tiny --device cpu  tries the script itself out, on any machine with Triton
set -eu
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" -P -m benchmarks.gpu "$@"
