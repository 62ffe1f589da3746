#!/usr/bin/env bash
# Everything wanted from one NVIDIA GPU, in one call under ten minutes: the device tests, images/s with and without the loader, extraction
# with two ViT-B, every kernel, whole steps eager and compiled, a grid of decoders, and the table of targets (gpu.py says more).
# Where there is no GPU it runs all of it with small shapes on the CPU, to see that it runs.
#   benchmarks/gpu.sh            PYTHON=path/to/python benchmarks/gpu.sh [--small] [--only PIECE] [--results FOLDER]
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
if [ -z "${PYTHON:-}" ] && [ -x "$here/../.venv/bin/python" ]; then PYTHON=$here/../.venv/bin/python; fi
python=${PYTHON:-python3}
"$python" -c 'import mrmae.train.cli' || {
  echo "benchmarks/gpu.sh: $python cannot import mrmae; give PYTHON=path/to/python, or install it first: pip install -e '.[dev]'" >&2
  exit 2
}
exec "$python" "$here/gpu.py" "$@"
